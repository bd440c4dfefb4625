"""Quantization-aware training: what runs is what convert makes, what is trained are the floats."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ifp.checkpoint.precision import Precision, quantize_config
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.output import output_layer
from mlx_ifp.tuner import quantization_aware
from mlx_ifp.tuner.networks import gathered, masked
from mlx_ifp.tuner.quantization_aware import Rounding, round_through

from ..conftest import ARCHITECTURES
from ..helpers import relative_error

TOKENS = mx.array([[5, 9, 200, 31, 7, 8], [3, 3, 77, 12, 0, 0]])
BITS = {"quantize": True, "bits": 4, "group_size": 32}


def _model(name: str) -> tuple[nn.Module, Rounding]:
    mx.random.seed(1)
    config = {"model_type": name, **ARCHITECTURES[name]}
    model = build_model(config)
    mx.eval(model.parameters())
    ffns = find_ffns(model)
    _, plan, _ = quantize_config(config, ffns, Precision(**BITS))
    return model, Rounding(plan, ffns, mx.float32)


def _selection(model: nn.Module, k: int = 48) -> tuple[mx.array, mx.array, mx.array]:
    ffns = find_ffns(model)
    order = mx.argsort(mx.random.uniform(shape=(len(ffns), ffns[0].d_ffn)), axis=-1)
    indices = mx.sort(order[:, :k], axis=-1)
    soft = mx.random.uniform(0.5, 1, shape=indices.shape)
    mask = mx.put_along_axis(mx.zeros(order.shape), indices, soft, axis=-1)
    return indices, soft, mx.stack([mask, mask])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_narrow_equals_wide_and_gradients_are_those_at_the_rounded_weights(name):
    model, rounding = _model(name)
    ffns, (indices, soft, masks) = find_ffns(model), _selection(model)
    by_hand, _ = _model(name)
    wide = rounding.wide(rounding.trunk(model))
    by_hand.load_weights(tree_flatten(wide.parameters()), strict=False)
    assert relative_error(by_hand(TOKENS), model(TOKENS)) > 1e-3

    def outputs_and_gradients(model, network):
        loss = nn.value_and_grad(model, lambda: network()(TOKENS).square().mean())
        return network()(TOKENS), dict(tree_flatten(loss()[1]))

    expected, gradients = outputs_and_gradients(
        by_hand, lambda: gathered(by_hand, ffns, indices, soft)
    )
    for network in (
        lambda: gathered(rounding.trunk(model), ffns, indices, soft, rounding.rows),
        lambda: masked(rounding.wide(rounding.trunk(model)), ffns, masks),
    ):
        outputs, ours = outputs_and_gradients(model, network)
        assert relative_error(outputs, expected) < 1e-5
        assert ours.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert relative_error(ours[key], gradient) < 1e-4, key


def test_loras_update_is_rounded_with_its_weight():
    model, rounding = _model("llama")
    ffns, (indices, soft, masks) = find_ffns(model), _selection(model)
    model.freeze()
    keys = ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, 3, {"rank": 4, "dropout": 0.0, "scale": 10.0, "keys": keys})
    for key, array in tree_flatten(model.trainable_parameters()):
        model.load_weights([(key, mx.random.normal(array.shape) * 0.1)], strict=False)
    trunk = rounding.trunk(model)
    narrow = gathered(trunk, ffns, indices, soft, rounding.rows)
    assert relative_error(narrow(TOKENS), masked(rounding.wide(trunk), ffns, masks)(TOKENS)) < 1e-5
    loss = nn.value_and_grad(
        model, lambda: gathered(rounding.trunk(model), ffns, indices, soft, rounding.rows)(TOKENS)
        .square().mean()
    )  # fmt: skip
    for key, gradient in tree_flatten(loss()[1]):
        assert mx.abs(gradient).max() > 0, key


def test_what_is_frozen_is_rounded_once(monkeypatch):
    model, rounding = _model("llama")
    counts = []
    monkeypatch.setattr(
        quantization_aware, "round_through",
        lambda *args, **kwargs: (counts.append(1), round_through(*args, **kwargs))[1],
    )  # fmt: skip
    model.model.embed_tokens.freeze()
    trained = len(rounding.plan) - 1 - 3 * len(model.layers)
    rounding.trunk(model)
    assert len(counts) == trained + 1
    trunk = rounding.trunk(model)
    assert len(counts) == 2 * trained + 1
    # What is frozen gets no gradient by the way.
    assert "model.embed_tokens.weight" not in dict(tree_flatten(output_layer(trunk)[0]))


@pytest.mark.parametrize("how", [{"group_size": 64, "bits": 4, "mode": "affine"},
                                 {"group_size": 32, "bits": 4, "mode": "mxfp4"},
                                 {"group_size": 64, "bits": 8, "mode": "affine"}])  # fmt: skip
def test_values_are_those_of_mlx_and_gradients_pass(how):
    weight = mx.random.normal((6, 128))
    expected = mx.dequantize(*mx.quantize(weight.astype(mx.bfloat16), **how), **how)
    rounded = round_through(weight, mx.bfloat16, **how)
    assert rounded.dtype == mx.float32
    assert mx.array_equal(rounded, expected.astype(mx.float32))
    factors = mx.random.normal(weight.shape)
    gradient = mx.grad(lambda w: (factors * round_through(w, mx.bfloat16, **how)).sum())(weight)
    assert mx.array_equal(gradient, factors)
