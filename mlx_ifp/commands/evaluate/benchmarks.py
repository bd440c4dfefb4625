"""Tasks of lm-evaluation-harness, under each way to select."""

import argparse
import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.manage import tabulate
from mlx_lm.sample_utils import make_sampler

from ...errors import IFPError, one_line
from ...evaluation.losses import Run
from ...evaluation.store import key_of
from ...evaluation.ways import Selections
from ...files.atomic import check_writable, new_file
from ...files.text import write_text
from ...model import IFPModel
from ...selectors.selector import resolved_keep
from .report import width
from .runs import load_for, read_task_texts, reads_densely, results_folder, runs_of, ways_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def check_harness() -> None:
    """Raises IFPError if the package is not installed."""
    if find_spec("lm_eval") is None:
        raise IFPError("--tasks needs lm-evaluation-harness: pip install 'mlx_ifp[evaluate]'")


def run_benchmarks(args: argparse.Namespace) -> None:
    """Run the tasks of ``--tasks`` under each way, and write a file of results for each."""
    check_harness()
    _check(args)
    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    manager = _manager(args.tasks, args.include_path)
    ways, texts = ways_of(args), read_task_texts(args.task_texts)
    model = load_for(args, ways)
    tables = []
    for run in runs_of(model, ways, args.keep):
        results = _evaluate(args, model, run, Selections(model, texts, args.task), manager)
        _write(args, directory, run, results)
        tables.append((run, results))
    print(_table(model, tables))
    if args.json is not None:
        found = [
            {"way": run.way.label, "ks": _ks(model, run), "results": results}
            for run, results in tables
        ]
        with new_file(args.json) as file:
            write_text(file, json.dumps(found, indent=2) + "\n")


def _check(args: argparse.Namespace) -> None:
    given = ("given_answers", "reference", "max_kl", "plot")
    for name in given:
        if getattr(args, name):
            raise IFPError(f"--{name.replace('_', '-')} is for --prompts.")
    if args.json is not None:
        check_writable(args.json)
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise IFPError(f"--include-path {args.include_path}: there is no such directory.")


def _manager(names: list[str], include_path: str | None) -> "TaskManager":
    """What knows the tasks. Those of the package are thousands, and are only read if needed."""
    from lm_eval.tasks import TaskManager

    for defaults in (False, True):
        if not defaults and include_path is None:
            continue
        with one_line(f"--include-path {include_path} cannot be read"):
            manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise IFPError(
        f"lm-evaluation-harness knows no task {', '.join(unknown)}; lm-eval ls tasks lists them, "
        "and --include-path adds your own."
    )


def _evaluate(
    args: argparse.Namespace,
    model: IFPModel,
    run: Run,
    selections: Selections,
    manager: "TaskManager",
) -> dict[str, Any]:
    import lm_eval
    from mlx_lm.evaluate import chat_template_fn

    from ...evaluation.harness import IFPLM, questions_of

    what = f"The tasks {', '.join(args.tasks)} cannot be run"
    with one_line(what):
        # Data sets are fetched now.
        names = manager.match_tasks(args.tasks)
        tasks = manager.load(names)
    sampler = make_sampler(args.temp, args.top_p, top_k=args.top_k)
    mx.random.seed(args.seed)
    lm = IFPLM(
        model,
        run,
        selections,
        questions_of(tasks["tasks"]),
        dense_prefill=reads_densely(args, model, run.way),
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        use_chat_template=args.apply_chat_template,
        sampler=sampler,
    )
    IFPLM.apply_chat_template = chat_template_fn(**args.chat_template_args)
    with one_line(what):
        results: Any = lm_eval.simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=manager,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            apply_chat_template=lm.use_chat_template,
            num_fewshot=args.num_shots,
            limit=args.limit,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=None,
            fewshot_random_seed=args.seed,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            use_cache=_cache(args, model, run),
        )
    found: dict[str, Any] = results["results"]
    return found


def _cache(args: argparse.Namespace, model: IFPModel, run: Run) -> str | None:
    """Where finished requests of a run are kept; None if they are not, as with sampling."""
    folder = results_folder(args, model)
    if folder is None or args.temp > 0:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    name = key_of(
        run.way.label,
        run.keep,
        str(model.dtype),
        model.selector,
        args.task,
        args.task_texts and Path(args.task_texts).read_text(encoding="utf-8"),
        reads_densely(args, model, run.way),
        repr(model.text_selector.scoring),
        args.max_tokens,
        args.apply_chat_template,
        args.chat_template_args,
        # The description of a task is no part of a request.
        args.tasks if run.way.by == "task" else None,
        # A saved task may be replaced.
        None if run.way.name is None else model.tasks.load(run.way.name).selection.digest,
    )
    return str(folder / f"harness-{name[:32]}.db")


def _write(args: argparse.Namespace, directory: Path, run: Run, results: dict[str, Any]) -> None:
    parts = ["eval", (args.model or "default").replace("/", "_"), version("lm_eval")]
    parts += [
        run.way.label.replace(":", "-").replace(" ", "-"),
        "" if run.keep is None else str(run.keep).replace(" ", ""),
    ]
    if args.num_shots is not None:
        parts.append(f"{args.num_shots:02d}")
    with new_file(directory / "_".join([*filter(None, parts), *args.tasks])) as file:
        # The form is that of mlx_lm.evaluate.
        write_text(file, json.dumps(results, indent=4))


def _ks(model: IFPModel, run: Run) -> list[int]:
    """Channels that a run keeps in each layer; their mean if a threshold decides for each."""
    if run.way.name is not None and run.keep is None:
        return model.tasks.load(run.way.name).selection.ks
    if run.way.by == "dense":
        return resolved_keep(model.checkpoint, 1.0)
    return model.text_selector.ks if run.keep is None else resolved_keep(model.checkpoint, run.keep)


def _table(model: IFPModel, tables: list[tuple[Run, dict[str, Any]]]) -> str:
    """Each task's metrics, one column a run."""
    labels = [f"{run.way.label} {width(_ks(model, run))}" for run, _ in tables]
    rows: list[list[str | int]] = []
    for task, metrics in tables[0][1].items():
        for metric, value in metrics.items():
            if not isinstance(value, float) or "_stderr" in metric:
                continue
            values = [results[task][metric] for _, results in tables]
            rows.append([task, metric.removesuffix(",none"), *(f"{each:.4f}" for each in values)])
    return tabulate(rows, ["TASK", "METRIC", *labels])
