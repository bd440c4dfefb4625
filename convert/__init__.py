"""Make checkpoints: ``mlx_ifp.convert``. In the repository this package stands at the top."""

from typing import TYPE_CHECKING, Any

from mlx_ifp.cli.dispatch import entry_point

if TYPE_CHECKING:
    from .conversion import convert as convert

__all__ = ["convert", "main"]

main = entry_point(__name__)


def __getattr__(name: str) -> Any:
    # MLX is imported only when it is needed, so that --help answers without it.
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .conversion import convert

    return convert
