"""What every package may use: files, the console, locks, seeds, processes."""
