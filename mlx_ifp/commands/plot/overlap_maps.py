"""Prompts -> selections -> heat maps of their overlap (paper, figure 3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...errors import IFPError
from ...files.jsonl import read_jsonl
from ...llm.messages import row_messages
from ...model import IFPModel
from ...selection.selection import Selection
from ...selectors.text import selecting_text
from .figures import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_TASK = "(no task)"


@dataclass(frozen=True)
class PromptRow:
    """A line of a file of prompts: its number, the messages, and the task or None."""

    line: int
    messages: list[dict[str, Any]]
    task: str | None


def read_prompts(path: str | Path, limit: int) -> list[PromptRow]:
    """Read prompts, sorted by task; those without one come last.

    If there are more than ``limit``, every task keeps its first ones, as many as the others have.

    Args:
        path: JSON lines with ``messages``, ``prompt`` or ``text``, and maybe ``task``.
        limit (int): prompts to keep.

    Raises:
        IFPError: naming the file and the first line that is not usable.
    """

    def prompt_row(row: dict[str, Any], line: int) -> PromptRow:
        if not isinstance(task := row.get("task"), str | None):
            raise IFPError("task must be a string.")
        return PromptRow(line, row_messages(row), task)

    rows = read_jsonl(path, prompt_row)
    if len(rows) < 2:
        raise IFPError(f"{path}: an overlap needs two prompts, here are {len(rows)}.")
    if limit < 2:
        raise IFPError("An overlap needs two prompts; --max-prompts must be 2 or more.")
    tasks: dict[str | None, list[PromptRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    # The first of each task, then the second of each, and so on.
    rounds = sorted(
        (i, row.line, row) for members in tasks.values() for i, row in enumerate(members)
    )
    kept = [row for _, _, row in rounds[:limit]]
    return sorted(kept, key=lambda row: (row.task is None, row.task or "", row.line))


def default_layers(layers: int) -> list[int]:
    """Four layers spread evenly from the first to the last of ``layers``, or all if fewer."""
    if layers <= 4:
        return list(range(layers))
    return [i * (layers - 1) // 3 for i in range(4)]


def select_all(model: IFPModel, rows: Sequence[PromptRow], path: str | Path) -> list[Selection]:
    """The selections of prompts.

    Raises:
        IFPError: naming the line of ``path`` whose text selects nothing.
    """
    selections = []
    for row in tqdm(rows, desc="Selecting", unit="prompt", disable=None):
        try:
            text = selecting_text(row.messages, model.checkpoint.ifp.text.source)
            selections.append(model.select(text))
        except IFPError as error:
            raise IFPError(f"{path}: line {row.line}: {error}") from error
    return selections


def overlap_figure(
    matrix: np.ndarray,
    tasks: Sequence[str | None],
    layers: Sequence[int],
    titles: Sequence[str],
) -> "Figure":
    """Heat maps of the overlap of all pairs of prompts (paper, Figure 3).

    Args:
        matrix: float64 [n, n, L], from :func:`~mlx_ifp.selection.overlap.overlap_matrix`.
        tasks: n names or None, prompts of one task side by side.
        layers: the layers to draw.
        titles: one for each of them.
    """
    n = len(matrix)
    shown = matrix[:, :, list(layers)]
    others = shown[~np.eye(n, dtype=bool)]
    # The diagonal is always 1; the colours are for the rest. At least 0.1 is spanned, so that
    # selections that hardly differ look so.
    high = float(others.max())
    low = min(float(others.min()), high - 0.1)
    if low < 0:
        low, high = 0.0, max(high, 0.1)
    blocks = [(name, len(list(group))) for name, group in groupby(tasks)]
    ends = np.cumsum([size for _, size in blocks])
    centres = ends - np.array([size for _, size in blocks]) / 2 - 0.5
    named = [plain(NO_TASK if name is None else name) for name, _ in blocks]

    columns = len(layers) if len(layers) <= 3 else math.ceil(math.sqrt(len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = new_figure(4.2 * columns + 1.4, 4.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.remove()
    # Lines of many tasks would hide the cells.
    width = min(0.8, 12 / len(blocks))
    for i, title in enumerate(titles):
        axes = grid.flat[i]
        image = axes.imshow(
            shown[:, :, i], vmin=low, vmax=high, cmap="viridis", interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="white", linewidth=width)
            axes.axvline(end - 0.5, color="white", linewidth=width)
        first, last = i % columns == 0, i + columns >= len(layers)
        if set(tasks) == {None}:
            axes.set_xlabel("prompt" if last else "")
            axes.set_ylabel("prompt" if first else "")
            continue
        size = min(9.0, max(4.0, 240 / len(blocks)))
        axes.set_xticks(centres, named if last else [], rotation=90, fontsize=size)
        axes.set_yticks(centres, named if first else [], fontsize=size)
        axes.tick_params(length=0)
    extend = "max" if high < 1 else "neither"
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.7, extend=extend)
    bar.set_label("shared channels / k")
    return figure
