"""Find, check, read and write directories in the checkpoint format."""
