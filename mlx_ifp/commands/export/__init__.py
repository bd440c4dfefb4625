"""``mlx_ifp.export`` writes a task's sub-network as a stock mlx-lm directory or as GGUF."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
