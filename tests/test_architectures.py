"""Every architecture of mlx-lm: it converts, generates, exports and trains, or is refused."""

import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_config

import mlx_ifp
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.commands.export.stock_model import export
from mlx_ifp.commands.train.command import train
from mlx_ifp.commands.train.given import options_of
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.hf_config import mlx_config
from mlx_ifp.tuner.networks import hidden_states, output_layer

from .architectures import SHAPE, SLIDING, config_of, model_types, saved_by_transformers
from .conftest import tiny_tokenizer

TEXT = "abcdefgh" * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    row = {"prompt": "say abc", "completion": "abc"}
    (path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    return path


def make(path: Path, config: dict, tokenizer: Path) -> Path:
    """A dense model with random weights and this very config.json."""
    model = build_model(mlx_config(config))
    mx.random.seed(0)
    arrays = {
        name: 0.2 * mx.random.normal(array.shape) + (array.ndim == 1)
        if mx.issubdtype(array.dtype, mx.floating)
        else array
        for name, array in tree_flatten(model.parameters())
    }
    shutil.copytree(tokenizer, path)
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    save_config(dict(config), path / "config.json")
    return path


def one_step(checkpoint: Path, rows: Path, path: Path) -> None:
    """Train a checkpoint's or a dense model's predictor for one step, with everything that has."""
    options = {
        "model": str(checkpoint), "data": str(rows), "keep": 0.5, "run_path": str(path),
        "iters": 1, "warm_start_iters": 1, "batch_size": 1, "max_seq_length": 64,
        "predictor_layers": 2, "head_width": 8, "val_batches": 0,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(options_of(options))



# These need more of a config than a shape to be built, or a package; no FFN of theirs is one.
UNKNOWN = {"kimi_k3", "muse_spark", "prism_hadamard_qwen35", "gpt_neox"}


def forms() -> list:
    """Every architecture in the form that transformers 5 saves, or else in its own."""
    found = []
    for name in model_types():
        if name in UNKNOWN:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_of(name)
            found.append(pytest.param(saved_by_transformers(config) or config, id=name))
    return found


def prunable(config: dict) -> str | None:
    """None, or why there are no FFNs to prune."""
    try:
        find_ffns(build_model(mlx_config(config)))
    except IFPError as error:
        return str(error)
    return None


@pytest.mark.parametrize("config", forms())
def test_every_architecture_works_or_is_refused_in_a_line(config, tokenizer, rows, tmp_path):
    reason = prunable(config)
    if reason is not None:
        # The refusal comes before a tensor is looked at.
        shutil.copytree(tokenizer, tmp_path / "dense")
        mx.save_safetensors(str(tmp_path / "dense" / "model.safetensors"), {"a": mx.zeros(1)})
        save_config(dict(config), tmp_path / "dense" / "config.json")
        with pytest.raises(IFPError) as error:
            convert(str(tmp_path / "dense"), tmp_path / "ifp")
        assert str(error.value) == reason and "\n" not in reason
        assert re.search("mixture of experts|FFN|module that holds|channel|is a BitLinear", reason)
        return
    dense = make(tmp_path / "dense", config, tokenizer)
    if config["model_type"] in REFUSED:
        with pytest.raises(IFPError, match=REFUSED[config["model_type"]]):
            convert(str(dense), tmp_path / "ifp")
        return
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp", keep=0.5))
    own = load_tokenizer_of(checkpoint, {})
    model, _ = mlx_ifp.load(str(checkpoint.path))
    assert mlx_ifp.generate(model, own, TEXT, max_tokens=2) is not None
    # The sub-network, the model of its export, and its body with its output layer are one.
    tokens = mx.array([own.encode(TEXT)])
    with model.subnetwork(model.select(TEXT)) as network:
        expected = network(tokens)
    export(checkpoint, own, tmp_path / "export", model.select(TEXT))
    stock, _ = load_model(tmp_path / "export")
    assert mx.allclose(stock(tokens), expected, atol=1e-4)
    parameters, logits = output_layer(stock)
    assert mx.allclose(logits(parameters, hidden_states(stock, tokens)[0]), expected[0], atol=1e-4)
    one_step(dense, rows, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run" / "ifp").ifp.selector == "predictor"


# mlx-lm's own code does not run these.
REFUSED = {"gear": "layers do not run on token ids with a cache"}
