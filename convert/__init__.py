"""Make checkpoints: ``mlx_ifp.convert``. In the repository this package stands at the top."""

from .command import main
from .conversion import convert

__all__ = ["convert", "main"]
