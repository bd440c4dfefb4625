"""``mlx_ifp.tasks add --max-kl``: as few channels as a loss on prompts allows."""

import argparse
import math
from collections.abc import Callable

import mlx.core as mx
from tqdm import tqdm

from ...errors import IFPError
from ...evaluation.fewest import fewest_channels
from ...evaluation.own_answers import with_own_answers
from ...evaluation.rows import read_rows
from ...evaluation.store import folder_of, store_in
from ...llm.context import context_length
from ...model import IFPModel
from ...selection.keep import Keep
from ...selection.selection import Selection
from ...selection.task_library import EXAMPLES, Task

MAX_TOKENS = 64


def check_max_kl(args: argparse.Namespace) -> None:
    """Raises IFPError if the flags contradict one another."""
    if (args.max_kl is None) != (args.prompts is None):
        raise IFPError("--max-kl and --prompts go together.")
    if args.max_kl is None:
        return
    if not (args.max_kl >= 0 and math.isfinite(args.max_kl)):
        raise IFPError("--max-kl must be 0 or more.")
    if args.keep is not None:
        raise IFPError("--max-kl and --keep exclude each other: --max-kl finds k.")


def fewest(args: argparse.Namespace, model: IFPModel, task: Task) -> tuple[Selection, float]:
    """The selection with the fewest channels that lose no more than ``--max-kl``, and its KL.

    Raises:
        IFPError: if there is none, or the prompts cannot be used.
    """
    longest = context_length(model.checkpoint.config)
    rows = read_rows(args.prompts, model.tokenizer, longest=longest)
    folder = None if args.no_cache else folder_of(model.checkpoint, args.cache_dir)
    with tqdm(total=len(rows), desc="Answers", unit="prompt", disable=None, leave=False) as bar:
        rows = with_own_answers(model, rows, MAX_TOKENS, store_in(folder, "answers"), bar.update)
    selector = model.selector if task.selector == EXAMPLES else task.selector
    selection, loss = fewest_channels(
        model,
        rows,
        _select(model, task),
        args.max_kl,
        store_in(folder, "scores"),
        dense_prefill=model.checkpoint.ifp.prefill_with(selector) == "dense",
    )
    return selection, loss.kl


def _select(model: IFPModel, task: Task) -> Callable[[Keep], Selection]:
    """How the task selects a number of channels."""
    if task.scores is None:
        return lambda keep: model.select(task.text, keep=keep)
    scores = mx.array(task.scores)
    return lambda keep: model.text_selector.of_scores(scores, keep)
