"""What all plots share: figures without a screen, and checks before the work."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import IFPError
from ...files.atomic import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """A figure in inches. It is made without pyplot, which would open a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """A name as it is, not too long; matplotlib would read mathematics between dollars."""
    text = " ".join(text.split())
    return (text if len(text) <= 32 else f"{text[:31]}…").replace("$", r"\$")


def check_output(path: Path, option: str = "--output") -> None:
    """Raises IFPError if the plot cannot be written, before hours of work are spent on it."""
    if path.suffix.lower() != ".png":
        raise IFPError(f"{option} {path}: the name must end in .png.")
    check_writable(path)


def check_matplotlib() -> None:
    """Raises IFPError if it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise IFPError("Plots need matplotlib: pip install 'mlx_ifp[plot]'") from error
