"""``python -m mlx_ifp COMMAND``."""

from .cli.dispatch import main

main()
