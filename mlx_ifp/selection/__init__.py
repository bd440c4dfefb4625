"""What was chosen: masks, selections, and where they are kept."""
