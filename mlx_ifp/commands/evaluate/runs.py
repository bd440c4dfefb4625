"""What own prompts and benchmarks share: the model, ways to select, and stored results."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from ...cli.arguments import load_model
from ...errors import IFPError, one_line
from ...evaluation.losses import Run
from ...evaluation.store import folder_of
from ...evaluation.ways import Way
from ...files.text import read_text
from ...generation.request import Request
from ...model import IFPModel


def ways_of(args: argparse.Namespace) -> list[Way]:
    """The ways to select that are named."""
    ways = [Way.parse(text) for text in dict.fromkeys(args.select_by)]
    return ways + [Way("named", name=name) for name in dict.fromkeys(args.task_name)]


def load_for(args: argparse.Namespace, ways: list[Way]) -> IFPModel:
    """The model, which has all that the ways need; each run says how many channels it keeps."""
    keeps = args.keep or [None]
    first = argparse.Namespace(**{**vars(args), "keep": keeps[0], "task_name": None})
    model, _ = load_model(first)
    for way in ways:
        way.check(model)
    return model


def load_reference(args: argparse.Namespace, model: IFPModel) -> IFPModel:
    """The model of ``--reference``.

    Raises:
        IFPError: if its tokens are others.
    """
    other = {"model": args.reference, "revision": None, "keep": None, "task_name": None}
    other |= {"selector": None, "keep_by_layer": None, "blend": None}
    reference, _ = load_model(argparse.Namespace(**{**vars(args), **other}))
    if reference.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise IFPError(f"--reference {args.reference}: its tokens are not those of the model.")
    return reference


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


def results_folder(args: argparse.Namespace, model: IFPModel) -> Path | None:
    """Where results of a checkpoint are kept; None if they are not."""
    return None if args.no_cache else folder_of(model.checkpoint, args.cache_dir)
