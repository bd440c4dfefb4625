"""A tiny chat model whose hidden states tell prompts apart, and a predictor fitted for it."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ifp.commands.fit.command import run
from mlx_ifp.commands.fit.options import setup_arg_parser
from mlx_ifp.convert import convert

from ..chatting import sentences


@pytest.fixture(scope="session")
def fittable(chat_model, tmp_path_factory) -> Path:
    """The chat model with small random weights where it has zeros: 2 layers of 128 channels."""
    dense = tmp_path_factory.mktemp("fit") / "dense"
    shutil.copytree(chat_model, dense)
    weights = mx.load(str(dense / "model.safetensors"))
    for i, name in enumerate(sorted(weights)):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = 0.02 * mx.random.normal(weights[name].shape, key=mx.random.key(i))
    mx.save_safetensors(str(dense / "model.safetensors"), weights, {"format": "mlx"})
    return convert(str(dense), dense.with_name("ifp"), keep=64)


def fit(*args: object) -> None:
    """The command, in this process."""
    run(setup_arg_parser().parse_args([str(arg) for arg in args]))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve rows with an answer, and twelve without."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    said = sentences(3)[:36]
    rows = [
        {"prompt": said[i]} | ({"completion": said[35 - i]} if i % 2 else {}) for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def fitted(fittable, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "ifp"
    fit("--model", fittable, "--mlx-path", path, "--data", data, "--max-tokens", 12, "--rank", 4,
        "--statistics-path", path.with_name("statistics"))  # fmt: skip
    return path
