"""``mlx_ifp.synthesize``: a chat model writes data to train on."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
