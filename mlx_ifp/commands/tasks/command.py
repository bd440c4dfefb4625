"""``mlx_ifp.tasks``: selections with a name, made once and used by every command."""

import argparse
import sys
from dataclasses import replace

from mlx_lm.manage import tabulate
from tqdm import tqdm

from ...checkpoint.directory import open_checkpoint
from ...checkpoint.locate import resolve
from ...cli.arguments import load_model, task_of
from ...errors import IFPError
from ...llm.context import context_length
from ...model import IFPModel
from ...selection.overlap import overlap_matrix
from ...selection.task_library import EXAMPLES, Task, TaskLibrary, check_name
from ...selectors.examples import read_examples
from .fewest import check_max_kl, fewest


def _library(args: argparse.Namespace) -> TaskLibrary:
    return TaskLibrary(open_checkpoint(resolve(args.model, args.revision)), args.cache_dir)


def _add(args: argparse.Namespace) -> None:
    text = task_of(args)
    if text is None and args.examples is None:
        raise IFPError("Name what selects: --task, --task-file or --examples.")
    if args.examples is not None and args.selector is not None:
        raise IFPError("--examples and --selector exclude each other: the examples select.")
    check_max_kl(args)
    # What is wrong with the name is found out before seconds are spent on selecting.
    check_name(args.name)
    _library(args).check_new(args.name, force=args.force)
    model, _ = load_model(args)
    if args.examples is not None:
        task = _by_examples(args, model, text or "")
    else:
        task = Task(args.name, text or "", model.selector, model.select(text))
    loss = ""
    if args.max_kl is not None:
        selection, kl = fewest(args, model, task)
        task, loss = replace(task, selection=selection), f" (KL {kl:.4f})"
    path = model.tasks.add(task, force=args.force)
    size = f"{path.stat().st_size:,} bytes"
    print(f"{task.name}: k = {_of_layers(task.selection.k)}{loss}, {size} in {path}")


def _by_examples(args: argparse.Namespace, model: IFPModel, text: str) -> Task:
    """The task that the examples of a file show; the user is told what is odd about them."""
    limit = context_length(model.checkpoint.config)
    examples = read_examples(args.examples, model.tokenizer, limit)
    missing = sum(each.answer[0] == each.answer[1] for each in examples)
    with tqdm(total=missing, desc="Answers", disable=not missing) as bar:
        found = model.score_examples(examples, max_tokens=args.max_tokens, progress=bar.update)
    for note in found.notes:
        print(f"[INFO] {note}", file=sys.stderr)
    statistic = model.text_selector.scoring.statistic
    selection = model.select(examples=found)
    return Task(args.name, text, EXAMPLES, selection, found.scores, statistic)


def _list(args: argparse.Namespace) -> None:
    library = _library(args)
    names = library.names()
    if not names:
        raise IFPError(
            f"There are no tasks for {library.checkpoint.path}; make one with mlx_ifp.tasks add."
        )
    tasks: list[tuple[int, Task]] = []
    rows: list[list[str | int]] = []
    damaged: list[str] = []
    for number, name in enumerate(names, 1):
        size = f"{library.path(name).stat().st_size:,}"
        try:
            task = library.load(name)
        except IFPError as error:
            damaged.append(f"{name}: {error}")
            rows.append([number, name, "(unusable)", "", "", size])
            continue
        tasks.append((number, task))
        selection = task.selection
        rows.append(
            [number, name, task.selector, _of_layers(selection.k), f"{selection.share:.3f}", size]
        )
    print(tabulate(rows, ["", "TASK", "SELECTOR", "K", "SHARE", "BYTES"]))
    if len(tasks) > 1:
        means = overlap_matrix([task.selection for _, task in tasks]).mean(axis=-1)
        rows = [
            [number, task.name, *(f"{mean:.3f}" for mean in line)]
            for (number, task), line in zip(tasks, means, strict=True)
        ]
        print("\nOverlap, mean over layers")
        print(tabulate(rows, ["", "TASK", *(str(number) for number, _ in tasks)]))
    if damaged:
        raise IFPError("; ".join(damaged))


def _of_layers(k: int | list[int]) -> str:
    return str(k) if isinstance(k, int) else f"{min(k)}-{max(k)}"


def _show(args: argparse.Namespace) -> None:
    library = _library(args)
    task = library.load(args.name)
    path, selection = library.path(args.name), task.selection
    facts = [
        ("name", task.name),
        ("selector", task.selector),
        ("layers", len(selection.layers)),
        ("k", f"{_of_layers(selection.k)} of {selection.d_ffn}"),
        ("other k", "no" if task.scores is None else "yes, --keep selects from stored scores"),
        ("soft values", "no" if selection.soft_values is None else "yes"),
        ("file", path),
        ("bytes", f"{path.stat().st_size:,}"),
        ("checkpoint", selection.checkpoint),
        ("selection", selection.digest),
    ]
    print("\n".join(f"{name + ':':<12} {value}" for name, value in facts))
    print("\nlayer  kept   share")
    for i, channels in enumerate(selection.layers):
        print(f"{i:5d}  {len(channels):5d}  {len(channels) / selection.d_ffn:.3f}")
    print(f" mean         {selection.share:.3f}\n\n{task.text}")


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.tasks``."""
    if args.action == "add":
        _add(args)
    elif args.action == "list":
        _list(args)
    elif args.action == "show":
        _show(args)
    elif args.action == "rm":
        _library(args).remove(args.name)
        print(f"Deleted {args.name}")
    elif args.action == "export":
        _library(args).export(args.name, args.file, force=args.force)
        print(f"{args.name}: written to {args.file}")
    else:
        task = _library(args).import_file(args.file, args.name, force=args.force)
        print(f"{task.name}: k = {_of_layers(task.selection.k)}, from {args.file}")
