"""``mlx_ifp.fit``: give a checkpoint a predictor in closed form; its LLM stays as it is."""

from ...cli.dispatch import entry_point

main = entry_point(__name__)
