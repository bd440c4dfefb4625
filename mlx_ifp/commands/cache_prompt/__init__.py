"""``mlx_ifp.cache_prompt``: run a prompt once and keep its keys and values in a file."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
