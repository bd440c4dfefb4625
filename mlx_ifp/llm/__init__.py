"""These modules treat an mlx-lm model by its structure; none of them knows of selections."""
