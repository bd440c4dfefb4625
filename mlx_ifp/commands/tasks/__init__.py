"""``mlx_ifp.tasks``: selections with a name, made once and used by every command."""

from ...cli.dispatch import command

main = command(__name__)
