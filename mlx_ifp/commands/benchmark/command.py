"""``mlx_ifp.benchmark``: a sub-network against dense models and a mixture of experts.

One prompt of random tokens is answered, with the same number of tokens, by:

- *sub-network, first prompt*: the selector runs and the channels are read. The system's file cache
  is warm and the predictor is in memory, except in the very first run, the warm-up.
- *sub-network, repeat*: the same task again.
- *dense, same size*: a stock mlx-lm model of the sub-network's widths.
- *full model*: all channels.
- *mixture of experts*: mlx-lm's, as many active parameters, random weights.

Two more rows only select and load: a switch to a task whose sub-network is in memory, and one to a
new task while another one's is.

At first each runs with no other network in memory: that warms up and gives its peak memory. Then
all stay in memory. In a trial each selects, loads and runs the prompt, and then they decode in
turns of a few tokens, in an order that rotates. So a machine that slows down slows all of them:
read the ratios, which are formed turn by turn: a trial's is the median over its turns.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...cli.arguments import check_given, load_model, named_task
from ...device import default_dtype
from ...errors import IFPError
from ...files.atomic import check_writable, new_file
from ...files.text import write_text
from ...model import IFPModel
from ...selection.task_library import Task
from ..plot.figures import DPI, check_matplotlib, check_output
from .chart import chart
from .first_prompt import first_prompt_table, measure_first_prompt
from .loading import ColdFiles, check_cold
from .options import OTHER_TASK, TASK
from .runs import Bench, measure
from .serving import serve_and_measure, serving_table
from .settings import DEFAULT_SCALE, Settings
from .shapes import check_quantization, describe, paper_shapes, write_shapes
from .table import heading, summary, table


def benchmark(
    model: IFPModel,
    task: str | Task = TASK,
    settings: Settings | None = None,
    progress: Callable[[str], Any] = lambda _: None,
    *,
    other_task: str = OTHER_TASK,
    experts: bool = True,
    cold: bool = False,
) -> dict[str, Any]:
    """Measure all rows.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load` with ``cache=False``, or first prompts may find
            their selections on disk. Its sub-networks in memory are dropped.
        task: a text that selects, to which each first prompt adds a number, so that it is new; or
            a Task of the library, whose selection is used.
        settings (Settings): lengths and number of trials.
        progress (Callable): called with a line of text after each trial.
        other_task (str): what a switch to an overlapping task selects with.
        experts (bool): with a mixture of experts, if mlx-lm has the architecture.
        cold (bool): also load from files that the system was made to forget. Linux only.

    Returns:
        dict: what ``--json`` writes. Seconds and bytes; a figure is a dict of its median, min and
        max over the trials. ``lengths`` has one entry for each length of the prompt.
        ``peak_memory_bytes`` is MLX's, of the warm-up run with no other network in memory: it
        holds the trunk and, for the sub-network, the selector.

    Raises:
        IFPError: if a setting is too small, a task is empty or too long, or ``cold`` is asked for
            where it cannot be had.
    """
    settings = settings or Settings()
    settings.check()
    saved = task if isinstance(task, Task) else None
    text = task.text if isinstance(task, Task) else task
    _check_tasks(text, other_task)
    checkpoint = model.checkpoint
    files = None
    if cold:
        files = ColdFiles(sorted({tensor.path for tensor in checkpoint.channels.values()}))
    bench = Bench(model, (task, other_task), settings)
    measured = [
        measure(bench, tokens, experts=experts, files=files, progress=progress)
        for tokens in settings.prompt_tokens
    ]
    selection = measured[0].selection
    return {
        "model": str(checkpoint.path),
        "task": text,
        "other_task": other_task,
        "settings": asdict(settings),
        "machine": {
            "mlx": version("mlx"),
            "mlx_lm": version("mlx_lm"),
            "device": f"{mx.device_info()['device_name']} ({mx.default_device().type.name})",
            "cores": os.cpu_count(),
        },
        "network": {
            "dtype": measured[0].dtype,
            "quantization": checkpoint.config.get("quantization"),
            "selector": model.selector if saved is None else saved.selector,
            "layers": len(checkpoint.ffns),
            "k": selection.k,
            "d_ffn": selection.d_ffn,
        },
        "lengths": [summary(one) for one in measured],
    }


def _check_tasks(task: str, other_task: str) -> None:
    for option, text in (("--task", task), ("--other-task", other_task)):
        if not text.strip():
            raise IFPError(f"The task is empty; give some text with {option}.")


def settings_of(args: argparse.Namespace) -> Settings:
    """The numbers of the command line; a default that depends on others is set.

    Raises:
        IFPError: for all that can be found wrong before minutes of measuring.
    """
    values = {each.name: getattr(args, each.name) for each in fields(Settings)}
    settings = Settings(**values | {"prompt_tokens": tuple(args.prompt_tokens)})
    settings.check()
    check_given(args)
    _check_tasks(args.task, args.other_task)
    if args.first_prompt and args.server:
        raise IFPError("Give --first-prompt or --server, not both.")
    if args.chart is not None and (args.first_prompt or args.server):
        raise IFPError("--chart draws networks; leave it out with --first-prompt and --server.")
    if args.json is not None:
        check_writable(args.json)
    if args.chart is not None:
        check_output(Path(args.chart), "--chart")
        check_matplotlib()
    if args.cold:
        check_cold()
    if args.shapes is None:
        for option in ("scale", "quantize", "q_bits", "q_group_size"):
            if getattr(args, option) not in (None, False):
                raise IFPError(f"--{option.replace('_', '-')} needs --shapes.")
        return settings
    if args.model is not None or args.revision is not None:
        raise IFPError("Give --shapes or --model, not both.")
    if not args.quantize and (args.q_bits is not None or args.q_group_size is not None):
        raise IFPError("--q-bits and --q-group-size need -q.")
    for option, default in (("scale", DEFAULT_SCALE), ("q_bits", 4), ("q_group_size", 64)):
        if getattr(args, option) is None:
            setattr(args, option, default)
    paper_shapes(args.scale)
    check_quantization(args.q_bits, args.q_group_size)
    return settings


def _write_shapes(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Make the checkpoint, in the type it will run in, and let ``--model`` name it."""
    dtype = getattr(mx, args.dtype) if args.dtype else default_dtype() or mx.bfloat16
    args.model = str(directory / "paper")
    return write_shapes(
        Path(args.model),
        args.scale,
        dtype=dtype,
        bits=args.q_bits if args.quantize else None,
        group_size=args.q_group_size,
    )


def _write_json(path: str | None, result: dict[str, Any]) -> None:
    """Write all figures, if a file is named."""
    if path is not None:
        with new_file(path) as file:
            write_text(file, json.dumps(result, indent=2) + "\n")


def _same_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Flags as they were given, for another command."""
    flags: list[str] = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            # A k for each layer is a list.
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags += [f"--{name}", text]
    return flags


def _run_server(
    args: argparse.Namespace, model: IFPModel, settings: Settings, directory: Path
) -> None:
    """Measure servers, and say the figures."""
    options = [
        "--model",
        str(model.checkpoint.path),
        *_same_flags(args, "dtype", "keep", "selector"),
    ]
    result = serve_and_measure(
        model,
        directory,
        requests=args.requests,
        max_tokens=settings.generation_tokens,
        trials=settings.num_trials,
        options=options,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(serving_table(result))
    _write_json(args.json, result)


def _run_first_prompt(args: argparse.Namespace, settings: Settings, directory: Path) -> None:
    """Measure new processes, and say the figures."""
    options = ["--trust-remote-code"] if args.trust_remote_code else []
    options += _same_flags(args, "dtype", "keep", "selector", "statistic", "blend")
    if args.keep_by_layer is not None:
        options.append("--keep-by-layer" if args.keep_by_layer else "--no-keep-by-layer")
    result = measure_first_prompt(
        options,
        directory,
        model=args.model,
        revision=args.revision,
        trials=settings.num_trials,
        cold=args.cold,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(first_prompt_table(result))
    _write_json(args.json, result)


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.benchmark``."""
    settings = settings_of(args)
    # A first prompt must not find its selection on disk.
    args.no_cache = True
    geometry = None
    with ExitStack() as stack:
        if args.shapes is not None:
            directory = tempfile.TemporaryDirectory(prefix="mlx_ifp-")
            geometry = _write_shapes(args, Path(stack.enter_context(directory)))
        if args.first_prompt:
            directory = tempfile.TemporaryDirectory(prefix="mlx_ifp-")
            _run_first_prompt(args, settings, Path(stack.enter_context(directory)))
            return
        model, _ = load_model(args)
        if args.server:
            directory = tempfile.TemporaryDirectory(prefix="mlx_ifp-")
            _run_server(args, model, settings, Path(stack.enter_context(directory)))
            return
        task = args.task if args.task_name is None else named_task(args, model.checkpoint)
        result = benchmark(
            model,
            task,
            settings,
            lambda line: print(line, file=sys.stderr),
            other_task=args.other_task,
            experts=not args.no_moe,
            cold=args.cold,
        )
    if geometry is not None:
        result["model"] = describe(geometry)
        print(result["model"])
    print(heading(result))
    for one in result["lengths"]:
        print(f"\n{table(one, result['settings'])}")
    _write_json(args.json, result | {"shapes": geometry})
    if args.chart is not None:
        with new_file(args.chart) as file:
            chart(result).savefig(file, format="png", dpi=DPI)
