"""``python -m mlx_ifp COMMAND``."""

from .cli import main

main()
