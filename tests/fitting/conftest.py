"""A tiny chat model whose hidden states tell prompts apart, as a checkpoint."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ifp.convert import convert


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
