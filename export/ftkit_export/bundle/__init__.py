"""The sealed bundle folder: writing, zipping, signing, hand-off to other compilers."""
