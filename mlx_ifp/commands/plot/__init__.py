"""``mlx_ifp.plot``: a training run's curves, and how much the selections of prompts overlap."""

from ...cli.dispatch import command

main = command(__name__)
