"""``mlx_ifp.tasks``: selections with a name, made once and used by every command."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
