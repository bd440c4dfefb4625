"""Find out which of the layouts that IFPruning's PyTorch implementations save a checkpoint has."""

from collections.abc import Callable
from pathlib import Path

from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.errors import IFPError

from ..sources.files import kind_of
from . import manifest, module, split
from .parts import Given, TrainedModel

TRAINED: dict[str, Callable[[Path, Given], TrainedModel]] = {
    "split": split.open_split,
    "module": module.open_module,
    "manifest": manifest.open_manifest,
}
# This is our own layout. It is detected; the user cannot name it.
CHECKPOINT = "checkpoint"


def detect_layout(path: Path) -> str:
    """Find the layout that a file or directory has, or that it looks most like.

    Returns:
        str: one of ``mlx_ifp.choices.LAYOUTS``; ``dense`` for a model without a predictor,
        ``checkpoint`` for a model that is converted already.

    Raises:
        IFPError: if it holds several checkpoints.
    """
    if path.is_file():
        # The kind of a damaged file is known only by its name.
        kind = kind_of(path) or path.suffix.lower().removeprefix(".")
        return "dense" if kind == "gguf" else "module"
    if (path / CONFIG_FILE).exists():
        return CHECKPOINT
    if split.is_split(path):
        return "split"
    if manifest.is_manifest(path):
        return "manifest"
    if (path / "config.json").is_file():
        return "module" if module.is_module(path) else "dense"
    inner = sorted(p.name for p in path.glob("checkpoint-*") if manifest.is_manifest(p))
    if inner:
        raise IFPError(f"{path} holds {', '.join(inner)}; name one of them, as {path / inner[-1]}.")
    return "module"
