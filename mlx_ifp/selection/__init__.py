"""What was chosen: masks, selections, and the files that they are kept in."""
