"""The sealed folder: written, zipped, signed, handed to other compilers."""
