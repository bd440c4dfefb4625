"""``mlx_ifp.benchmark``: a sub-network against dense models and a mixture of experts."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
