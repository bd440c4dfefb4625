"""Save a fitted predictor: a copy of the checkpoint, with a head that reads the LLM's own state."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.config import CONFIG_FILE, HeadConfig
from ..checkpoint.directory import HEAD_FILE, PREDICTOR, Checkpoint, open_checkpoint
from ..errors import IFPError
from ..files.atomic import new_directory, without_path
from ..files.tensor_files import LazyTensor, write_safetensors
from .ridge import Ridge

# The second Linear is float16: half of float32's bytes, and its errors are far below the fit's.
_HEAD_DTYPE = np.float16
_ROWS = 1 << 14


def check_fittable(checkpoint: Checkpoint) -> None:
    """Raises IFPError if a checkpoint has a trained predictor, which its LLM belongs to.

    A predictor that was fitted may be fitted anew.
    """
    if checkpoint.head and not checkpoint.fitted:
        raise IFPError(
            f"{checkpoint.path} has a predictor that was trained together with its LLM; fit one "
            "for a checkpoint of the dense model."
        )


def save_fitted(
    checkpoint: Checkpoint,
    ridge: Ridge,
    path: str | Path,
    *,
    blend: float,
    fit: dict[str, Any],
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write the copy, either completely or not at all. Files are hard links where that is possible.

    Args:
        checkpoint (Checkpoint): the one that the predictor was fitted for.
        ridge (Ridge): the predictor.
        path: a directory that does not exist.
        blend (float): the weight of the prompt's own ranks.
        fit (dict): how it was fitted; kept in ``ifp_config.json``.
        progress (Callable): called with the bytes of each block that is written.

    Raises:
        IFPError: if the path exists.
    """
    with new_directory(Path(path)) as directory, without_path(directory, f"{path}"):
        _copy(checkpoint.path, directory)
        (directory / PREDICTOR).mkdir()
        record = write_safetensors(directory / HEAD_FILE, _tensors(ridge), progress)
        files = {n: f for n, f in checkpoint.ifp.files.items() if not n.startswith(PREDICTOR)}
        ifp = replace(
            checkpoint.ifp,
            selector="predictor",
            head=HeadConfig(
                [ridge.first.shape[1], *ridge.second.shape[::-1]], [True, True], activation="none"
            ),
            predictor_backbone="llm",
            predictor_embedding="own",
            blend=blend,
            # The selector reads prompts as the answers' statistics were made.
            text=replace(checkpoint.ifp.text, format="chat_template"),
            source=checkpoint.ifp.source | {"fit": fit | {"mlx_ifp": version("mlx_ifp")}},
            files=files | {HEAD_FILE: record},
        )
        ifp.check()
        (directory / CONFIG_FILE).write_text(ifp.to_json())
        open_checkpoint(directory)


def _tensors(ridge: Ridge) -> dict[str, mx.array | LazyTensor]:
    """The head's tensors; the largest one is made in blocks of rows."""
    return {
        "linear1.weight": mx.array(ridge.first.astype(np.float32)),
        "linear1.bias": mx.array(ridge.offset.astype(np.float32)),
        "linear2.weight": LazyTensor(
            ridge.second.shape,
            mx.float16,
            lambda start, stop: ridge.second[start:stop].astype(_HEAD_DTYPE),
            _ROWS,
        ),
        "linear2.bias": mx.array(ridge.mean.astype(np.float32)),
    }


def _copy(source: Path, directory: Path) -> None:
    """Take over everything but the predictor, the config that is made anew and hidden files.

    Tensors are linked. All else is copied, because people edit configs and templates.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name in (PREDICTOR, CONFIG_FILE, "README.md"):
            continue
        if file.is_dir():
            shutil.copytree(file, directory / file.name, ignore=shutil.ignore_patterns(".*"))
        elif file.suffix == ".safetensors":
            _link(file.resolve(), directory / file.name)
        else:
            shutil.copy(file, directory)


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
