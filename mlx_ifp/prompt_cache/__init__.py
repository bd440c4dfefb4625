"""Keys and values by selection, in memory and on disk."""
