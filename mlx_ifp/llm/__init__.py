"""An mlx-lm model seen by its structure: nothing here knows of selections."""
