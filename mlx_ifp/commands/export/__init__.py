"""``mlx_ifp.export``: a task's sub-network as a stock mlx-lm directory, or as GGUF."""

from ...cli.dispatch import command

main = command(__name__)
