"""``mlx_ifp.cache_prompt``: run a prompt once and keep its keys and values in a file."""

from ...cli.dispatch import command

main = command(__name__)
