"""``python -m mlx_ifp.convert``."""

from . import main

main()
