"""Keys and values are kept for each selection, in memory and on disk."""
