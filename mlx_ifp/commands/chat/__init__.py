"""``mlx_ifp.chat``: a conversation in the terminal, which can change its task on the way."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
