"""The trained predictor: any backbone, the last token's hidden state, the head."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.config import MaskConfig, TextConfig
from mlx_ifp.llm.modules import find_body, get_module
from mlx_ifp.selection.masks import soft_topk

from ..conftest import ARCHITECTURES, make_predictor_checkpoint
from ..helpers import mask_model, relative_error

TOKENS = [5, 77, 130, 9, 42, 200, 301, 17, 23, 23, 8]
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.1 * x),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def expected_scores(checkpoint, backbone, activation, feature_norm, tokens=TOKENS):
    """The paper's predictor in plain numpy, on the hidden state of mlx-lm's own model."""
    model = load_model(backbone)[0]
    body = get_module(model, find_body(model))
    x = np.array(body(mx.array([tokens]))[0, -1], np.float64)
    if feature_norm == "layer_norm":
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    head = mx.load(str(checkpoint / "predictor" / "head.safetensors"))
    head = {name: np.array(array, np.float64) for name, array in head.items()}
    x = head["linear1.weight"] @ x + head.get("linear1.bias", 0)
    x = head["linear2.weight"] @ ACTIVATIONS[activation](x) + head.get("linear2.bias", 0)
    return x.reshape(3, 160)


@pytest.mark.parametrize(
    ("activation", "feature_norm", "biases"),
    [
        ("gelu", "none", (True, True)),
        ("none", "none", (True, True)),
        ("leaky_relu", "layer_norm", (True, False)),
        ("relu", "none", (False, False)),
        ("silu", "layer_norm", (True, True)),
    ],
)
def test_scores_of_every_head(tmp_path, activation, feature_norm, biases):
    checkpoint, backbone = make_predictor_checkpoint(
        tmp_path / "ifp", activation=activation, feature_norm=feature_norm, biases=biases
    )
    model, _ = load(checkpoint, cache=False)
    expected = expected_scores(checkpoint, backbone, activation, feature_norm)
    scores = model.scores(TOKENS)
    assert scores.dtype == mx.float32
    assert np.abs(np.array(scores) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_is_a_backbone(tmp_path, architecture):
    checkpoint, backbone = make_predictor_checkpoint(tmp_path / "ifp", architecture)
    model, _ = load(checkpoint, cache=False)
    expected = expected_scores(checkpoint, backbone, "gelu", "none")
    assert np.allclose(np.array(model.scores(TOKENS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_chunks_equal_one_pass(tmp_path, architecture):
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", architecture)
    predictor = load(checkpoint, cache=False)[0].predictor
    tokens = [(7 * i) % 380 for i in range(150)]
    one = predictor.scores(tokens)
    for step in (1, 64, 149):
        assert relative_error(predictor.scores(tokens, prefill_step_size=step), one) < 1e-5


def test_the_output_layer_of_the_backbone_is_not_needed(tmp_path):
    checkpoint, _ = make_predictor_checkpoint(
        tmp_path / "ifp", "llama", backbone={"tie_word_embeddings": False}
    )
    model, _ = load(checkpoint, cache=False)
    assert model.scores(TOKENS).shape == (3, 160)


def test_text_is_tokenized_by_the_predictors_tokenizer(tmp_path):
    raw, _ = make_predictor_checkpoint(tmp_path / "raw")
    chat, _ = make_predictor_checkpoint(tmp_path / "chat", text=TextConfig(format="chat_template"))
    for checkpoint, start in ((raw, []), (chat, ["<|im_start|>"])):
        model, _ = load(checkpoint, cache=False)
        tokenizer = model.selector_tokenizer()
        text = "Sort a list."
        messages = [{"role": "user", "content": text}]
        tokens = tokenizer.encode(text)
        if start:
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert mx.array_equal(model.scores(text), model.scores(tokens))


@pytest.mark.parametrize("operator", ["sigmoid", "capped_exp"])
def test_soft_values_of_the_checkpoint_reach_the_sub_network(tmp_path, operator):
    mask = MaskConfig(operator, temperature=2.0, keep_soft_values=True)
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", mask=mask)
    model, _ = load(checkpoint, cache=False)
    selection = model.select(TOKENS)
    soft = soft_topk(model.scores(TOKENS), 64, operator=operator, temperature=2.0)
    assert mx.array_equal(selection.weights, mx.take_along_axis(soft, selection.indices, axis=-1))
    reference = mask_model(load_model(checkpoint.parent / "ifp-parts" / "llm")[0], selection)
    tokens = mx.array([TOKENS])
    assert relative_error(model.subnetwork(selection)(tokens), reference(tokens)) < 1e-5


def test_the_predictor_is_loaded_only_when_it_is_needed(predictor_checkpoint):
    model, _ = load(predictor_checkpoint)
    assert model.predictor_loads == 0
    first = model.select("Name three rivers.")
    model.select("Write a poem.")
    model.select("Name three rivers.")
    assert (model.predictor_loads, model.selector_runs) == (1, 2)
    again, _ = load(predictor_checkpoint)
    assert again.select("Name three rivers.").digest == first.digest
    assert (again.predictor_loads, again.selector_runs) == (0, 0)
    model.release_predictor()
    model.select("A third text.")
    assert model.predictor_loads == 2


def test_a_quantized_backbone(tmp_path):
    """mlx-lm's quantization of the backbone, as its config.json says."""
    import mlx.nn as nn
    from mlx_lm.utils import save_config

    checkpoint, backbone = make_predictor_checkpoint(
        tmp_path / "ifp", backbone={"hidden_size": 64, "head_dim": 16}
    )
    network, config = load_model(backbone)
    nn.quantize(network, 32, 8)
    config["quantization"] = {"group_size": 32, "bits": 8, "mode": "affine"}
    arrays = {n: a for n, a in tree_flatten(network.parameters()) if n.startswith("model.")}
    file = checkpoint / "predictor" / "model.safetensors"
    mx.save_safetensors(str(file), arrays)
    save_config(config, checkpoint / "predictor" / "config.json")
    text = (checkpoint / "ifp_config.json").read_text()
    import json

    values = json.loads(text)
    values["files"]["predictor/model.safetensors"]["bytes"] = file.stat().st_size
    (checkpoint / "ifp_config.json").write_text(json.dumps(values))
    model, _ = load(checkpoint, cache=False)
    hidden = network.model(mx.array([TOKENS]))[0, -1]
    assert relative_error(model.scores(TOKENS).flatten(), model.predictor.head(hidden)) < 1e-5


def test_empty_and_too_long_texts_are_refused(tmp_path):
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", text=TextConfig(max_tokens=20))
    model, _ = load(checkpoint, cache=False)
    for text in ("", "  \n", []):
        with pytest.raises(IFPError, match="give a prompt or a task"):
            model.select(text)
    with pytest.raises(IFPError, match="take 20"):
        model.select("word " * 100_000)
