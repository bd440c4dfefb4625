"""``mlx_ifp.manage``: list and clear the selections and warm prompts kept on disk."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
