"""The commands: a file each, or a folder with ``command.py``."""
