"""``mlx_ifp.evaluate``: what pruning loses, on own prompts and on benchmarks."""

import argparse
import json
import math
from pathlib import Path

from tqdm import tqdm

from ...errors import IFPError
from ...evaluation.losses import Evaluation
from ...evaluation.own_answers import with_own_answers
from ...evaluation.rows import read_rows
from ...evaluation.store import store_in
from ...evaluation.ways import Selections
from ...files.atomic import check_writable, new_file
from ...files.text import write_text
from ...llm.context import context_length
from ..plot.figures import DPI, check_matplotlib, check_output
from .benchmarks import run_benchmarks
from .report import enough, losses_figure, table
from .runs import (
    load_for,
    load_reference,
    read_task_texts,
    reads_densely,
    results_folder,
    runs_of,
    ways_of,
)

MAX_TOKENS = 64


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.evaluate``."""
    if args.prompts is None:
        run_benchmarks(args)
        return
    _check(args)
    ways, texts = ways_of(args), read_task_texts(args.task_texts)
    model = load_for(args, ways)
    reference = model if args.reference is None else load_reference(args, model)
    folder = results_folder(args, model)
    longest = context_length(model.checkpoint.config)
    rows = read_rows(
        args.prompts,
        model.tokenizer,
        given=args.given_answers,
        per_task=args.limit,
        longest=longest,
    )
    most = args.max_tokens or MAX_TOKENS
    with tqdm(total=len(rows), desc="Answers", unit="prompt", disable=None, leave=False) as bar:
        rows = with_own_answers(reference, rows, most, store_in(folder, "answers"), bar.update)
    evaluation = Evaluation(
        model,
        rows,
        Selections(model, texts, args.task),
        store_in(folder, "scores"),
        dense_prefill=lambda way: reads_densely(args, model, way),
        reference=reference,
    )
    runs = runs_of(model, ways, args.keep)
    try:
        with tqdm(total=len(rows), desc="Prompts", unit="prompt", disable=None, leave=False) as bar:
            losses = evaluation.losses(runs, speed_tokens=args.speed_tokens, progress=bar.update)
    except IFPError as error:
        raise IFPError(f"{args.prompts}: {error}") from error
    print(table(losses))
    if args.max_kl is not None:
        print(f"\n{enough(losses, args.max_kl)}")
    if args.json is not None:
        with new_file(args.json) as file:
            write_text(file, json.dumps([loss.to_dict() for loss in losses], indent=2) + "\n")
    if args.plot is not None:
        with new_file(args.plot) as file:
            losses_figure(losses).savefig(file, format="png", dpi=DPI)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before anything is loaded."""
    if args.max_kl is not None and not (args.max_kl >= 0 and math.isfinite(args.max_kl)):
        raise IFPError("--max-kl must be 0 or more.")
    if args.json is not None:
        check_writable(args.json)
    if args.plot is not None:
        check_output(Path(args.plot), "--plot")
        check_matplotlib()
