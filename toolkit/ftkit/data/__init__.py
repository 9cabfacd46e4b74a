"""Images in: which files, decoded once, augmented, audited, cleaned."""
