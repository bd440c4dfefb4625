"""Save and load a run's checkpoints, with all that is needed to go on as if uninterrupted."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import IFPError
from ..files.atomic import new_directory
from ..files.tensor_files import write_safetensors
from ..llm.build import random_state, set_random_state

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted(path.parent for path in run.glob(f"checkpoint-*/{_STATE}"))
    return found[-1] if found else None


def save_state(
    run: Path, step: int, student: nn.Module, optimizer: Optimizer, values: dict[str, Any],
    keep: int = 2,
) -> Path:  # fmt: skip
    """Write ``checkpoint-STEP``, either completely or not at all.

    Args:
        run (Path): the run's directory.
        step (int): how many steps are done.
        student (nn.Module): the model whose trainable parameters are written.
        optimizer (Optimizer): the optimizer, whose whole state is written.
        values (dict): other values to keep with it, as JSON.
        keep (int): how many checkpoints to leave, this one included.

    Raises:
        IFPError: if it cannot be written; the message names the last one that was.
    """
    path = run / f"checkpoint-{step:07d}"
    arrays = dict(tree_flatten(optimizer.state))
    scalars = {
        name: [array.item(), str(array.dtype).removeprefix("mlx.core.")]
        for name, array in arrays.items()
        if array.ndim == 0
    }
    arrays = {name: array for name, array in arrays.items() if array.ndim}
    try:
        with new_directory(path) as directory:
            weights = dict(tree_flatten(student.trainable_parameters()))
            write_safetensors(directory / _WEIGHTS, weights, digest=False)
            write_safetensors(directory / _OPTIMIZER, arrays, digest=False)
            state = {"step": step, "scalars": scalars, "random": random_state(), **values}
            (directory / _STATE).write_text(json.dumps(state))
    except (OSError, RuntimeError) as error:
        last = latest_checkpoint(run)
        reason = getattr(error, "strerror", None) or str(error)
        raise IFPError(
            f"{path} could not be saved ({reason}). "
            + (f"The last complete checkpoint is {last}; " if last else "There is none before; ")
            + "make room and continue with --resume."
        ) from error
    for old in sorted(run.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _load(file: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(file)))


def load_state(path: Path, student: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Set weights, optimizer and random state from a checkpoint of :func:`save_state`.

    The learning rates stay the optimizer's own.

    Returns:
        dict: its ``step`` and the values it was saved with.

    Raises:
        IFPError: if it is damaged, or its tensors are not those that are trained here.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        weights = _load(path / _WEIGHTS)
        arrays = _load(path / _OPTIMIZER) if (path / _OPTIMIZER).stat().st_size > 16 else {}
        if missing := {"step", "scalars", "random", "identity"} - state.keys():
            raise ValueError(f"{_STATE} has no {', '.join(sorted(missing))}")
    except Exception as error:
        raise IFPError(
            f"{path} is damaged ({error}); delete it to resume from an older one."
        ) from error
    own = dict(tree_flatten(student.trainable_parameters()))
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            raise IFPError(
                f"{path / _WEIGHTS}: {name} does not fit what is trained here; resume with the "
                "options of the run."
            )
    student.load_weights(list(weights.items()), strict=False)
    for name, (value, dtype) in state["scalars"].items():
        arrays[name] = mx.array(value, getattr(mx, dtype))
    # The rates are taken from the options, as a resumed run may lower them.
    own = dict(tree_flatten(optimizer.state))
    arrays |= {name: array for name, array in own.items() if name.endswith("learning_rate")}
    optimizer.state = tree_unflatten(list(arrays.items()))
    mx.eval(student.parameters(), optimizer.state)
    set_random_state(state["random"])
    return state
