"""``mlx_ifp.evaluate``: what pruning loses, on own prompts and on benchmarks."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
