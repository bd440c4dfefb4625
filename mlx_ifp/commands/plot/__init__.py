"""``mlx_ifp.plot``: a training run's curves, and how much the selections of prompts overlap."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
