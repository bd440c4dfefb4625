"""Make checkpoints: ``mlx_ifp.convert``. In the repository this package stands at the top."""

from .command import convert, main

__all__ = ["convert", "main"]
