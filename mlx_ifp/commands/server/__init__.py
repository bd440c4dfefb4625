"""``mlx_ifp.server``: an HTTP server whose models are the tasks of one checkpoint."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
