"""``mlx_ifp.generate``: text from the sub-network that a prompt or a task selects."""

from ...cli.dispatch import command

main = command(__name__)
