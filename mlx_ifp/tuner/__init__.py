"""Training: data, losses, warm start, trainer."""
