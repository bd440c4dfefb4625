"""``mlx_ifp.benchmark``: a sub-network against dense models and a mixture of experts."""

from ...cli.dispatch import command

main = command(__name__)
