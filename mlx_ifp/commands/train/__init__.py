"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

from ...cli.dispatch import command

main = command(__name__)
