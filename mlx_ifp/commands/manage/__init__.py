"""``mlx_ifp.manage``: list and clear the selections and warm prompts kept on disk."""

from ...cli.dispatch import command

main = command(__name__)
