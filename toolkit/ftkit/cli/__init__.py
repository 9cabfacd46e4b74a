"""The command line: a file a group of commands, collected by main.py."""
