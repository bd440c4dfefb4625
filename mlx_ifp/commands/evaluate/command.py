"""``mlx_ifp.evaluate``: what pruning loses, on own prompts and on benchmarks."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ...cli.arguments import load_model
from ...device import default_cache_dir
from ...errors import IFPError, one_line
from ...evaluation.losses import Evaluation, Run
from ...evaluation.own_answers import with_own_answers
from ...evaluation.rows import read_rows
from ...evaluation.store import Store
from ...evaluation.ways import Selections, Way
from ...files.atomic import check_writable, new_file
from ...files.text import read_text, write_text
from ...generation.request import Request
from ...llm.context import context_length
from ...model import IFPModel
from ..plot.figures import DPI, check_matplotlib, check_output
from .report import enough, losses_figure, table

MAX_TOKENS = 64


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.evaluate``."""
    ways = [Way.parse(text) for text in dict.fromkeys(args.select_by)]
    ways += [Way("named", name=name) for name in dict.fromkeys(args.task_name)]
    texts = read_task_texts(args.task_texts)
    if args.prompts is None:
        # It needs a package that few have.
        from .benchmarks import run_benchmarks

        run_benchmarks(args, ways, texts)
        return
    _check(args)
    model = load(args)
    for way in ways:
        way.check(model)
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
        rows = with_own_answers(model, rows, most, store_of(args, model, "answers"), bar.update)
    evaluation = Evaluation(
        model,
        rows,
        Selections(model, texts, args.task),
        store_of(args, model, "scores"),
        dense_prefill=lambda way: reads_densely(args, model, way),
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


def load(args: argparse.Namespace) -> IFPModel:
    """The model; each run says how many channels it keeps."""
    keeps = args.keep or [None]
    first = argparse.Namespace(**{**vars(args), "keep": keeps[0], "task_name": None})
    return load_model(first)[0]


def read_task_texts(path: str | None) -> dict[str, str]:
    """The descriptions of tasks, by their names.

    Raises:
        IFPError: if the file is no mapping of names to texts.
    """
    if path is None:
        return {}
    with one_line(f"{path} cannot be read"):
        texts: Any = yaml.safe_load(read_text(path))
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise IFPError(f"{path}: must map the names of tasks to texts.")
    return {str(name): text for name, text in texts.items()}


def runs_of(model: IFPModel, ways: list[Way], keeps: list[Any] | None) -> list[Run]:
    """Each way with each k. The dense model, and saved tasks without scores, have their own."""
    runs = []
    for way in ways:
        own = way.by == "dense"
        if way.name is not None:
            own = model.tasks.load(way.name).scores is None
        runs += [Run(way, keep) for keep in ([None] if own or not keeps else keeps)]
    return runs


def reads_densely(args: argparse.Namespace, model: IFPModel, way: Way) -> bool:
    """Whether the whole model reads the prompts of a way, as it would for an answer."""
    if way.by == "dense":
        return False
    selector = "static" if way.by == "static" else way.selector
    request = Request("", selector=selector, prefill=args.prefill)
    return request.prefill_by(model.checkpoint, model.selector) == "dense"


def store_of(args: argparse.Namespace, model: IFPModel, name: str) -> Store:
    """Where results of a checkpoint are kept."""
    if args.no_cache:
        return Store(None)
    root = default_cache_dir() if args.cache_dir is None else Path(args.cache_dir)
    return Store(root / "evaluation" / model.checkpoint.digest[:32] / f"{name}.jsonl")
