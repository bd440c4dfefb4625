"""``mlx_ifp.benchmark``: a sub-network against a dense model of its size and the full model.

One prompt of random tokens is answered greedily, with the same number of tokens, by:

- *sub-network, first prompt*: the selector runs and the channels are read. The system's file cache
  is warm and the predictor is in memory, except in the very first run, the warm-up.
- *sub-network, repeat*: the same task again.
- *dense, same size*: a stock mlx-lm model of the sub-network's widths: :func:`same_size_model`.
- *full model*: all channels.

At first each runs with no other network in memory: that warms up and gives its peak memory. Then
all stay in memory. In a trial each selects, loads and runs the prompt, and then they decode in
turns of a few tokens, in an order that rotates. So a machine that slows down slows all of them:
read the ratios, which are formed turn by turn: a trial's is the median over its turns.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from .atomic import new_file
from .cli import command
from .errors import IFPError
from .model import IFPModel, Prepared
from .options import add_model_options, add_task_name_option, load_model, named_task, parse_seed
from .same_size import float_dtype, memory_of, same_size_model
from .task_library import Task

ROWS = FIRST, REPEAT, SAME_SIZE, FULL = (
    "sub-network, first prompt",
    "sub-network, repeat",
    "dense, same size",
    "full model",
)
# Tokens to decode before it is the next network's turn: so few that all meet the same disturbances,
# so many that the wait at the end, when mlx-lm would run ahead, does not count.
TURN = 8
Run = dict[str, Any]
TASK = "You are an expert Python programmer. Answer with working code and a short explanation."


@dataclass(frozen=True)
class Settings:
    """The numbers of the command line."""

    prompt_tokens: int = field(default=512, metadata={"help": "Random tokens in the prompt"})
    generation_tokens: int = field(default=128, metadata={"help": "Tokens to generate"})
    num_trials: int = field(default=5, metadata={"help": "Runs of each row, after the warm-up"})
    prefill_step_size: int = field(
        default=2048, metadata={"help": "Prompt tokens to process at a time"}
    )
    seed: int = field(default=0, metadata={"help": "PRNG seed of the prompt"})

    def check(self) -> None:
        """Raises IFPError if a number is too small."""
        # Decoding is timed from the first token to the last, so there must be two.
        least = {"generation_tokens": 2, "seed": 0}
        for name, value in asdict(self).items():
            if value < least.get(name, 1):
                option = name.replace("_", "-")
                raise IFPError(f"--{option} must be at least {least.get(name, 1)}, not {value}.")


# Of a run: the name of a figure, the heading of its column, and how it is printed.
FIGURES = (
    ("select_seconds", "selection s", ".4f"),
    ("load_seconds", "loading s", ".4f"),
    ("prefill_seconds", "prefill s", ".4f"),
    ("first_token_seconds", "first token s", ".4f"),
    ("decode_tps", "decode tokens/s", ".1f"),
)
_SPREAD = ("min", "median", "max")


class _Bench:
    """The networks and the prompt that they all answer."""

    def __init__(self, model: IFPModel, task: str | Task, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.selection = task.selection if isinstance(task, Task) else None
        self.prompt = mx.random.randint(
            0,
            model.checkpoint.config.get("vocab_size") or model.tokenizer.vocab_size,
            (settings.prompt_tokens,),
            key=mx.random.key(settings.seed),
        )
        self.texts = (f"{task} [{i}]" for i in itertools.count())
        self.text = ""
        self.networks: dict[str, nn.Module] = {}

    def prepare(self, row: str) -> Prepared:
        """The network of a row, and what getting it costs."""
        if row in self.networks:
            return Prepared(self.networks[row], None, "", 0.0, 0.0, 0)
        if row == FIRST:
            # A text without a selection, and no sub-network that could happen to be its own.
            self.model.networks.clear()
            self.text = next(self.texts)
        if self.selection is not None:
            return self.model.prepare(selection=self.selection)
        return self.model.prepare(self.text)

    def run(self, ready: dict[str, Prepared]) -> dict[str, Run]:
        """Let each row answer the prompt with mlx-lm's own loop, past any end of sequence.

        Returns:
            dict: for each row ``source`` and ``bytes_read`` of its Prepared, and FIGURES: prefill
            is until the first token is there, decode is all that follow. ``turn_seconds`` are of
            each turn of decoding.
        """
        runs: dict[str, Run] = {}
        tokens: dict[str, Iterator[Any]] = {}
        rows, left = list(ready), self.settings.generation_tokens - 1
        with wired_limit(ready[rows[0]].network, [generation_stream]), ExitStack() as stack:
            for row, have in ready.items():
                mx.clear_cache()
                start = time.perf_counter()
                steps = generate_step(
                    self.prompt,
                    have.network,
                    max_tokens=-1,
                    prefill_step_size=self.settings.prefill_step_size,
                )
                # Each holds a stream context: the last to enter must be the first to leave.
                tokens[row] = stack.enter_context(closing(steps))
                next(tokens[row])
                prefill = time.perf_counter() - start
                # mlx-lm has begun the next token; that is not the next row's to wait for.
                mx.synchronize(generation_stream)
                runs[row] = {
                    "source": have.source,
                    "bytes_read": have.bytes_read,
                    "select_seconds": have.select_seconds,
                    "load_seconds": have.load_seconds,
                    "prefill_seconds": prefill,
                    "first_token_seconds": have.select_seconds + have.load_seconds + prefill,
                    "turn_seconds": [],
                }
            for start in range(0, left, TURN):
                for row in rows:
                    began = time.perf_counter()
                    for _ in itertools.islice(tokens[row], min(TURN, left - start)):
                        pass
                    mx.synchronize(generation_stream)
                    runs[row]["turn_seconds"].append(time.perf_counter() - began)
                rows = rows[1:] + rows[:1]
        for run in runs.values():
            run["decode_tps"] = left / sum(run["turn_seconds"])
        return runs

    def forget(self) -> None:
        """Leave nothing in memory but the trunk."""
        self.networks.clear()
        self.model.networks.clear()
        self.model.release_predictor()
        gc.collect()


def benchmark(
    model: IFPModel,
    task: str | Task = TASK,
    settings: Settings | None = None,
    progress: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Measure the four rows.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load` with ``cache=False``, or first prompts may find
            their selections on disk. Its sub-networks in memory are dropped.
        task: a text that selects, to which each first prompt adds a number, so that it is new; or
            a Task of the library, whose selection is used: then no selector runs.
        settings (Settings): lengths and number of trials.
        progress (Callable): called with a line of text after each trial.

    Returns:
        dict: what ``--json`` writes. Seconds and bytes; a figure is a dict of its median, min and
        max over the trials. ``peak_memory_bytes`` is MLX's, of the warm-up run with no other
        network in memory: it holds the trunk and, for the sub-network, the selector.

    Raises:
        IFPError: if a setting is too small, or the task is empty or too long.
    """
    settings = settings or Settings()
    settings.check()
    saved = task if isinstance(task, Task) else None
    text = task if saved is None else saved.text
    if saved is None and not text.strip():
        raise IFPError("The task is empty; give some text with --task.")
    ffns = model.checkpoint.ffns
    bench = _Bench(model, task, settings)
    warm_up: dict[str, Run] = {}
    memory: dict[str, dict[str, int]] = {}

    def run_alone(row: str) -> Prepared:
        mx.reset_peak_memory()
        ready = bench.prepare(row)
        warm_up.update(bench.run({row: ready}))
        memory[row] = memory_of(ready.network) | {"peak_memory_bytes": mx.get_peak_memory()}
        return ready

    bench.forget()
    run_alone(FIRST)
    ready = run_alone(REPEAT)
    selection = ready.selection
    same_size, notes = same_size_model(ready.network, ffns)
    del ready
    bench.forget()
    bench.networks[SAME_SIZE] = same_size
    del same_size
    run_alone(SAME_SIZE)
    bench.forget()
    bench.networks[FULL] = model.dense()
    run_alone(FULL)

    # Now all, in turns. Loading the predictor again is not the first trial's to pay.
    bench.networks[SAME_SIZE], _ = same_size_model(bench.prepare(FIRST).network, ffns)
    trials: list[dict[str, Run]] = []
    for i in range(settings.num_trials):
        turn = i % len(ROWS)
        trials.append(bench.run({r: bench.prepare(r) for r in ROWS[turn:] + ROWS[:turn]}))
        speeds = ", ".join(f"{row}: {trials[-1][row]['decode_tps']:.1f}" for row in ROWS[1:])
        progress(f"Trial {i + 1} of {settings.num_trials}, decode tokens/s: {speeds}")
    if trials[0][FIRST]["source"] == "memory":
        notes.append("The selection is the same for every text; only the warm-up computed it.")
    if saved is not None:
        notes.append(f"The selection is that of the saved task {saved.name!r}; none was computed.")

    return {
        "model": str(model.checkpoint.path),
        "task": text,
        "settings": asdict(settings),
        "machine": {
            "mlx": mx.__version__,
            "mlx_lm": version("mlx_lm"),
            "device": f"{mx.device_info()['device_name']} ({mx.default_device().type.name})",
            "cores": os.cpu_count(),
        },
        "network": {
            "dtype": str(float_dtype(bench.networks[FULL])).removeprefix("mlx.core."),
            "quantization": model.checkpoint.config.get("quantization"),
            "selector": model.selector if saved is None else saved.selector,
            "layers": len(ffns),
            "k": selection.k,
            "d_ffn": selection.d_ffn,
        },
        **_summary(trials, memory),
        "notes": notes,
        "warm_up": warm_up,
        "trials": trials,
    }


def _summary(trials: list[dict[str, Run]], memory: dict[str, dict[str, int]]) -> dict[str, Any]:
    def over(figure: Callable[[dict[str, Run]], float]) -> dict[str, float]:
        values = [figure(trial) for trial in trials]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def of_row(row: str) -> dict[str, Any]:
        names = ["bytes_read", *(name for name, *_ in FIGURES)]
        return {name: over(lambda t, name=name: t[row][name]) for name in names} | memory[row]

    def decode_to(other: str) -> dict[str, float]:
        def ratio(trial: dict[str, Run]) -> float:
            turns = (trial[other]["turn_seconds"], trial[REPEAT]["turn_seconds"])
            return statistics.median(theirs / ours for theirs, ours in zip(*turns, strict=True))

        return over(ratio)

    full, active = (memory[row]["bytes_per_token"] for row in (FULL, REPEAT))
    return {
        "rows": {row: of_row(row) for row in ROWS},
        "decode_to_same_size": decode_to(SAME_SIZE),
        "decode_to_full": decode_to(FULL),
        "bytes_full_to_sub_network": full / active,
        "repeat_seconds": over(lambda t: t[REPEAT]["select_seconds"] + t[REPEAT]["load_seconds"]),
    }


def table(result: dict[str, Any]) -> str:
    """The result of :func:`benchmark` as text."""
    machine, network = result["machine"], result["network"]
    how = network["quantization"]
    dtype = f"{how['bits']}-bit, {network['dtype']}" if how else network["dtype"]
    headings = [f"{heading:>15}" for _, heading, _ in FIGURES]
    lines = [
        "mlx {mlx}, mlx-lm {mlx_lm}, {device}, {cores} cores".format(**machine),
        f"{dtype}, "
        + "k = {k} of {d_ffn} channels in {layers} layers, selector {selector}".format(**network),
        "Median of {num_trials} trials, below it min-max; {prompt_tokens} tokens in, "
        "{generation_tokens} out".format(**result["settings"]),
        "",
        " ".join([f"{'network':<26}", *headings, f"{'weights MB':>11} {'peak MB':>9}"]),
    ]
    for row, figures in result["rows"].items():
        medians, ranges = [f"{row:<26}"], [" " * 26]
        for name, _, form in FIGURES:
            low, median, high = (f"{figures[name][which]:{form}}" for which in _SPREAD)
            # These networks are not selected, and loaded before the clock starts.
            used = row in (FIRST, REPEAT) or name not in ("select_seconds", "load_seconds")
            medians.append(f"{median if used else '-':>15}")
            ranges.append(f"{f'{low}-{high}' if used else '':>15}")
        medians.append(f"{figures['weights_bytes'] / 1e6:11.1f}")
        medians.append(f"{figures['peak_memory_bytes'] / 1e6:9.1f}")
        lines += [" ".join(medians), " ".join(ranges)]
    read = result["rows"][FIRST]["bytes_read"]["median"] / 1e6
    cold = result["warm_up"][FIRST]
    lines += [
        "",
        f"decode, sub-network / same size:  {_text(result['decode_to_same_size'])}",
        f"decode, sub-network / full model: {_text(result['decode_to_full'])}, bytes a token of "
        f"full model / sub-network: {result['bytes_full_to_sub_network']:.3f}",
        f"a repeated task adds:             {_text(result['repeat_seconds'], 1e3)} ms",
        f"a first prompt reads:             {read:.1f} MB of channels",
        f"the very first prompt took:       {cold['select_seconds']:.3f} s to select, "
        f"{cold['load_seconds']:.3f} s to load",
        *result["notes"],
    ]
    return "\n".join(lines)


def _text(figure: dict[str, float], factor: float = 1) -> str:
    low, median, high = (f"{figure[which] * factor:.3f}" for which in _SPREAD)
    return f"{median} ({low}-{high})"


EXAMPLES = """Each network runs alone first, which warms up and gives its peak memory. Then all
take turns in one process: read the ratios. Selections on disk are neither read nor written.

examples:
  mlx_ifp.benchmark --model smollm2-ifp
  mlx_ifp.benchmark --model smollm2-ifp -p 4000 -g 100 --task "You solve math problems."
  mlx_ifp.benchmark --model smollm2-ifp --keep 0.25 --num-trials 10 --json figures.json
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.benchmark``: mlx-lm's where they mean the same, and ours."""
    parser = argparse.ArgumentParser(
        prog="mlx_ifp.benchmark",
        description="Measure a sub-network against a dense model of its size and the full model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--task", "--prompt", metavar="TEXT", default=TASK, help="What selects (default: a task)"
    )
    add_task_name_option(task)
    short = {"prompt_tokens": ["-p"], "generation_tokens": ["-g"], "num_trials": ["-n"]}
    for each in fields(Settings):
        option = f"--{each.name.replace('_', '-')}"
        text = f"{each.metadata['help']} (default: {each.default})"
        parser.add_argument(
            option,
            *short.get(each.name, []),
            type=parse_seed if each.name == "seed" else int,
            default=each.default,
            help=text,
        )
    parser.add_argument("--json", metavar="FILE", help="Write all figures to a JSON file")
    return parser


@command
def main() -> None:
    """Run ``mlx_ifp.benchmark``."""
    args = setup_arg_parser().parse_args()
    path = Path(args.json) if args.json is not None else None
    # Found out now, not after minutes of measuring.
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise IFPError(f"--json {path}: there is no directory to write such a file in.")
    settings = Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
    settings.check()
    # A first prompt must not find its selection on disk.
    args.no_cache = True
    model, _ = load_model(args)
    task = args.task if args.task_name is None else named_task(args, model.checkpoint)
    result = benchmark(model, task, settings, lambda line: print(line, file=sys.stderr))
    print(table(result))
    if path is not None:
        with new_file(path) as file:
            file.write_text(json.dumps(result, indent=2) + "\n")
