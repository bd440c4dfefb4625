"""``mlx_ifp.benchmark --first-prompt``: the time to the first token of a command that starts.

Each trial is a process of its own, ``mlx_ifp.generate -m 1``, whose prompt is new. The selections
of the trials before it are on disk, in a folder of their own.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...checkpoint.directory import open_checkpoint
from ...checkpoint.locate import resolve
from ...errors import IFPError
from .loading import ColdFiles

# What each stage does, in the order of the table.
STAGES = {
    "imports": "Python starts, and libraries are imported",
    "headers": "configs and headers are read and checked",
    "tokenizer": "it is loaded",
    "trunk": "all but the channels is loaded, as far as it is not there yet",
    "predictor": "channels are selected",
    "channels": "they are loaded",
    "prefill": "the prompt is read",
    "rest": "chat template, sampling, output",
}


def measure_first_prompt(
    options: list[str],
    directory: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    prompt: str = "hi",
    trials: int = 5,
    cold: bool = False,
    progress: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Measure new processes.

    Args:
        options (list): more of the command line of ``mlx_ifp.generate``.
        directory (Path): empty; gets the selections.
        model (str): the checkpoint; None for the package's own.
        revision (str): of a hub repository.
        prompt (str): each trial adds its number, so that it is new.
        trials (int): how many processes, after one that warms up.
        cold (bool): let the system forget the checkpoint before each. Linux only.
        progress (Callable): called with a line of text after each trial.

    Returns:
        dict: the medians of ``seconds`` by stage and of ``total``, and all ``trials``.

    Raises:
        IFPError: if the command fails, with its last line.
    """
    path = resolve(model, revision)
    files = [path / name for name in open_checkpoint(path).ifp.files] + [path / "tokenizer.json"]
    dropped = ColdFiles([file for file in files if file.exists()]) if cold else None
    figures: list[dict[str, Any]] = []
    for trial in range(trials + 1):
        if dropped is not None:
            dropped.drop()
        flags = ["--model", str(path), "--prompt", f"{prompt} {trial}", "-m", "1", *options]
        one = _one_prompt(flags, directory)
        # The first one warms up.
        if trial:
            figures.append(one)
        progress(f"trial {trial} of {trials}: {one['total']:.3f} s")
    return {
        "seconds": {
            stage: statistics.median(one["seconds"][stage] for one in figures) for stage in STAGES
        },
        "total": statistics.median(one["total"] for one in figures),
        "all_but_prefill": statistics.median(
            one["total"] - one["seconds"]["prefill"] for one in figures
        ),
        "trials": figures,
    }


def _one_prompt(flags: list[str], directory: Path) -> dict[str, Any]:
    file = directory / "figures.json"
    command = [sys.executable, "-m", "mlx_ifp.commands.benchmark.one_prompt"]
    done = subprocess.run(
        [*command, repr(time.time()), str(file), *flags],
        env=os.environ | {"MLX_IFP_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise IFPError(f"A trial failed: {lines[-1] if lines else 'it said nothing'}")
    return json.loads(file.read_text())


def first_prompt_table(result: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [f"{name:<16} {result['seconds'][name]:>8.3f} s  {STAGES[name]}" for name in STAGES]
    lines.append(f"{'all but prefill':<16} {result['all_but_prefill']:>8.3f} s")
    return "\n".join([*lines, f"{'first token':<16} {result['total']:>8.3f} s"])
