"""``mlx_ifp.generate``: text from the sub-network that a prompt or a task selects."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
