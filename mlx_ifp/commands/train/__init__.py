"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
