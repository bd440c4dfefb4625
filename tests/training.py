"""What the tests of ``mlx_ifp.train`` share: small data, a short run, and how to read its log."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_ifp.commands.train.given import options_of
from mlx_ifp.commands.train.options import defaults

K = 64
# Options of a run that goes on from a checkpoint, whose own predictor it trains.
OWN_PREDICTOR = {"predictor_layers": None, "head_width": None}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two tasks of short questions and answers."""
    directory = tmp_path_factory.mktemp("data")
    for split, n in (("train", 12), ("valid", 4)):
        with open(directory / f"{split}.jsonl", "w") as file:
            for i in range(n):
                add = {"messages": [{"role": "user", "content": f"What is {i} + {i}?"},
                                    {"role": "assistant", "content": f"It is {i + i}."}],
                       "task": "math"}  # fmt: skip
                write = {"messages": [{"role": "user", "content": f"Write a poem about tree {i}."},
                                      {"role": "assistant", "content": f"O tree {i}, so green!"}],
                         "task": "poems"}  # fmt: skip
                file.write(json.dumps(add) + "\n" + json.dumps(write) + "\n")
    return directory


@pytest.fixture
def options(data, dense_llama, tmp_path) -> Callable[..., SimpleNamespace]:
    """A run of four iterations; keywords change its options."""

    def make(**changes):
        base = {
            "model": str(dense_llama), "data": str(data), "run_path": str(tmp_path / "run"),
            "keep": K, "iters": 4, "batch_size": 2, "predictor_layers": 2, "head_width": 16,
            "warm_start_iters": 6, "warm_start_examples": 12, "steps_per_report": 1,
            "learning_rate": 1e-3, "save_every": 2, "val_batches": 2,
        }  # fmt: skip
        return options_of(base | changes)

    return make


def log(path: Path) -> list[dict]:
    """A run's reports."""
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[int, float]:
    """A run's training losses by iteration. If an iteration was repeated, the last one counts."""
    return {r["iteration"]: r["train_loss"] for r in log(path) if "train_loss" in r}


def flags(args: SimpleNamespace) -> list[str]:
    """The options that differ from the defaults, as a command line."""
    given = {name: value for name, value in vars(args).items() if value != defaults()[name]}
    return [text for name, value in given.items()
            for text in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
