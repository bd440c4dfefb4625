"""What fits into memory, known before anything is read."""
