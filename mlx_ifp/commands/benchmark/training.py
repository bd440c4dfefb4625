"""Training speed and memory against mlx-lm's own full fine-tuning of the same dense model.

Run with ``python -m mlx_ifp.commands.benchmark.training --model DENSE``. Both train all layers of
the LLM in float, with AdamW, on the same batches of random tokens, with cross-entropy on every
token:

- *mlx-lm*: what ``mlx_lm.lora --fine-tune-type full --num-layers -1`` does, by its own loop.
- *mlx_ifp*: LLM and predictor together; one prompt of a batch selects for all of it.

Each runs in a process of its own, which gives its own peak of memory. They take turns: while one
trains the other waits. So a machine that slows down slows both: read the ratios.
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer as stock
from mlx_lm.tuner.callbacks import TrainingCallback

from ...checkpoint.config import IFPConfig
from ...cli.dispatch import script
from ...cli.flags import parse_count, parse_keep
from ...errors import IFPError
from ...selection.keep import Keep, resolve_one_keep
from ...tuner.data import Example
from ...tuner.dense_targets import DenseTargets, Split
from ...tuner.predictor_start import from_layers
from ...tuner.source import load_source
from ...tuner.student import Student, choose_trainable
from ...tuner.trainer import Trainer
from ...tuner.training_args import TrainingArgs

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Settings:
    """The numbers of the command line."""

    model: str
    keep: Keep
    batch_size: int
    tokens: int
    steps: int
    num_trials: int

    @property
    def iters(self) -> int:
        """Steps in all: a warm-up round, and the trials."""
        return self.steps * (self.num_trials + 1)


class _Turns(TrainingCallback):
    """Called after each round: reports it, and waits for the next turn."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Both loops call it with the same names."""
        self.pipe.send((train_info["iterations_per_second"], mx.get_peak_memory()))
        self.pipe.recv()


def _begin(pipe: Connection) -> None:
    """Say that the model and the options are fine, and wait for the first turn."""
    pipe.send("ready")
    pipe.recv()


def _tokens(settings: Settings, vocabulary: int) -> list[list[int]]:
    """Sequences for a few batches, all of one length, so that no padding differs."""
    random = np.random.default_rng(0)
    # Position t predicts t + 1.
    shape = (4 * settings.batch_size, settings.tokens + 1)
    return random.integers(0, vocabulary, shape).tolist()


def _run_stock(settings: Settings, pipe: Connection) -> None:
    source = load_source(settings.model)
    model = source.llm
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    rows = [(tokens, 0) for tokens in _tokens(settings, source.config["vocab_size"])]
    _begin(pipe)
    with tempfile.TemporaryDirectory() as directory:
        args = stock.TrainingArgs(
            batch_size=settings.batch_size,
            iters=settings.iters,
            steps_per_report=settings.steps,
            steps_per_save=settings.iters + 1,
            max_seq_length=settings.tokens + 1,
            adapter_file=str(Path(directory) / "adapters.safetensors"),
        )
        optimizer = optim.AdamW(learning_rate=LEARNING_RATE)
        stock.train(model, optimizer, rows, None, args, training_callback=_Turns(pipe))


def _run_ours(settings: Settings, pipe: Connection) -> None:
    source = load_source(settings.model)
    start = from_layers(source, min(4, len(source.ffns)), 128)
    k = resolve_one_keep(settings.keep, source.ffns[0].d_ffn, len(source.ffns))
    ifp = IFPConfig(k=k, selector="predictor")
    ifp.head, ifp.predictor_embedding = start.head.config, "llm"
    student = Student(source.llm, source.ffns, start.backbone, start.head, ifp, None,
                      start.embedding)  # fmt: skip
    choose_trainable(student, "layers", {})
    examples = [
        Example(tokens, 1, tokens[: max(1, settings.tokens // 4)], "random")
        for tokens in _tokens(settings, source.config["vocab_size"])
    ]
    _begin(pipe)
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        targets = DenseTargets(run, source.llm, source.ffns, examples, source.digest)
        args = TrainingArgs(
            iters=settings.iters,
            batch_size=settings.batch_size,
            learning_rate=LEARNING_RATE,
            predictor_learning_rate=LEARNING_RATE,
            group_masks=True,
            steps_per_report=settings.steps,
            save_every=settings.iters + 1,
        )
        split = Split(examples, targets)
        trainer = Trainer(student, args, run, split, None, "prompt", {}, _Turns(pipe))
        trainer.train()


RUNS = {"mlx-lm, full": _run_stock, "mlx_ifp": _run_ours}


def _work(name: str, settings: Settings, pipe: Connection) -> None:
    """The life of one process, whose own prints are dropped."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        RUNS[name](settings, pipe)
    except EOFError:
        # The benchmark was stopped.
        pass
    except Exception as error:
        pipe.send(error if isinstance(error, IFPError) else IFPError(f"{name}: {error!r}"))


def measure(settings: Settings) -> dict[str, list[tuple[float, int]]]:
    """Rounds of both, in turns.

    Returns:
        dict: name -> for each trial tokens a second, and the peak of memory in bytes so far.

    Raises:
        IFPError: if the model cannot be trained.
    """
    spawn = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in RUNS:
        pipes[name], theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(name, settings, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in RUNS}
    try:
        for name, pipe in pipes.items():
            _answer(name, pipe)
        for trial in range(settings.num_trials + 1):
            for name, pipe in pipes.items():
                # A process that has ended may have said why.
                with suppress(OSError):
                    pipe.send("go")
                per_second, peak = _answer(name, pipe)
                # The first round compiles and fills caches.
                if trial:
                    tokens = settings.batch_size * settings.tokens
                    results[name].append((per_second * tokens, peak))
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return results


def _answer(name: str, pipe: Connection) -> Any:
    """What a process says next; if that is an error, it is raised."""
    try:
        said = pipe.recv()
    except (EOFError, OSError):
        raise IFPError(f"{name}: its process ended.") from None
    if isinstance(said, IFPError):
        raise said
    return said


def table(settings: Settings, results: dict[str, list[tuple[float, int]]]) -> str:
    """The result as text; ratios are formed trial by trial."""

    def spread(values: list[float], form: str) -> str:
        low, high = (f"{value:{form}}" for value in (min(values), max(values)))
        return f"{statistics.median(values):{form}} ({low}-{high})"

    theirs, ours = results.values()
    ratios = [own[0] / other[0] for own, other in zip(ours, theirs, strict=True)]
    lines = [
        f"mlx {version('mlx')}, mlx-lm {version('mlx_lm')}, {os.cpu_count()} cores, "
        f"keep {settings.keep}, batches of {settings.batch_size} x {settings.tokens} tokens, "
        f"median of {settings.num_trials} trials of {settings.steps} steps (min-max)",
        f"{'':<14}{'tokens/s':>24}{'peak MB':>10}",
    ]
    for name, rows in results.items():
        lines.append(f"{name:<14}{spread([row[0] for row in rows], '.1f'):>24}"
                     f"{rows[-1][1] / 1e6:>10.0f}")  # fmt: skip
    lines += [
        f"tokens/s, mlx_ifp / mlx-lm:    {spread(ratios, '.2f')}",
        f"peak memory, mlx_ifp / mlx-lm: {ours[-1][1] / theirs[-1][1]:.2f}",
    ]
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_ifp.commands.benchmark.training",
        description="Training speed and memory, against mlx-lm's full fine-tuning.",
    )
    parser.add_argument("--model", required=True, help="A dense mlx-lm model")
    parser.add_argument(
        "--keep", type=parse_keep, default=0.5, metavar="K|FRACTION", help="Channels to keep"
    )
    for flag, default, text in (
        ("--batch-size", 4, "Sequences of a batch"),
        ("--tokens", 256, "Tokens of a sequence"),
        ("--steps", 2, "Steps of a trial"),
        ("--num-trials", 5, "Trials of each, after the warm-up"),
    ):
        short = ["-n"] if flag == "--num-trials" else []
        text = f"{text} (default: {default})"
        parser.add_argument(flag, *short, type=parse_count, default=default, help=text)
    return parser


@script
def main() -> None:
    """Run the benchmark."""
    settings = Settings(**vars(setup_arg_parser().parse_args()))
    print(table(settings, measure(settings)))


if __name__ == "__main__":
    main()
