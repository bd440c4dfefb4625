"""The narrow network, the masked wide one and mlx-lm's own: equal outputs, equal gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.output import hidden_states, output_layer
from mlx_ifp.tuner.networks import gathered, masked

from ..conftest import ARCHITECTURES
from ..helpers import relative_error

K = 48
TOKENS = mx.array([[5, 9, 200, 31, 7, 8], [3, 3, 77, 12, 0, 0]])


def _model(name: str) -> nn.Module:
    mx.random.seed(1)
    model = build_model({"model_type": name, **ARCHITECTURES[name]})
    mx.eval(model.parameters())
    return model


def _selection(model: nn.Module) -> tuple[mx.array, mx.array, mx.array]:
    """Channels [L, k], soft values [L, k], and the same as a mask [L, d_ffn]."""
    ffns = find_ffns(model)
    order = mx.argsort(mx.random.uniform(shape=(len(ffns), ffns[0].d_ffn)), axis=-1)
    indices = mx.sort(order[:, :K], axis=-1)
    soft = mx.random.uniform(0.5, 1, shape=indices.shape)
    mask = mx.put_along_axis(mx.zeros(order.shape), indices, soft, axis=-1)
    return indices, soft, mask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_narrow_equals_masked(name):
    model = _model(name)
    ffns, (indices, soft, mask) = find_ffns(model), _selection(model)
    narrow = gathered(model, ffns, indices, soft)(TOKENS)
    wide = masked(model, ffns, mx.stack([mask, mask]))(TOKENS)
    assert relative_error(narrow, wide) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_narrow_and_masked_are_equal(name):
    model = _model(name)
    ffns, (indices, soft, _) = find_ffns(model), _selection(model)

    def loss(parameters, soft, narrow):
        model.update(parameters)
        if narrow:
            network = gathered(model, ffns, indices, soft)
        else:
            mask = mx.put_along_axis(mx.zeros((len(ffns), ffns[0].d_ffn)), indices, soft, axis=-1)
            network = masked(model, ffns, mx.stack([mask, mask]))
        return network(TOKENS).square().mean()

    parameters = model.trainable_parameters()
    of_narrow, of_wide = (
        dict(tree_flatten(mx.grad(loss, argnums=(0, 1))(parameters, soft, narrow)))
        for narrow in (True, False)
    )
    assert of_narrow.keys() == of_wide.keys()
    for key, gradient in of_wide.items():
        assert relative_error(of_narrow[key], gradient) < 1e-4, key


def test_blend_begins_at_the_dense_model_and_ends_at_the_masked_one():
    model = _model("llama")
    ffns, (_, _, mask) = find_ffns(model), _selection(model)
    masks = mx.stack([mask, mask])
    assert relative_error(masked(model, ffns, masks, 0.0)(TOKENS), model(TOKENS)) < 1e-6
    half = masked(model, ffns, masks, 0.5)(TOKENS)
    assert relative_error(half, masked(model, ffns, 0.5 + 0.5 * masks)(TOKENS)) < 1e-6
    assert relative_error(half, model(TOKENS)) > 1e-3


def test_each_sequence_has_its_own_mask():
    model = _model("llama")
    ffns = find_ffns(model)
    masks = [_selection(model)[2] for _ in range(2)]
    together = masked(model, ffns, mx.stack(masks))(TOKENS)
    for row, mask in enumerate(masks):
        alone = masked(model, ffns, mask[None])(TOKENS[row : row + 1])
        assert relative_error(together[row : row + 1], alone) < 1e-5


def test_lora_is_gathered_with_its_update():
    model = _model("llama")
    ffns, (indices, soft, mask) = find_ffns(model), _selection(model)
    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 4, "dropout": 0.0, "scale": 10.0})
    for name, array in tree_flatten(model.trainable_parameters()):
        model.load_weights([(name, mx.random.normal(array.shape) * 0.1)], strict=False)
    masks = mx.stack([mask, mask])
    narrow = gathered(model, ffns, indices, soft)(TOKENS)
    assert relative_error(narrow, masked(model, ffns, masks)(TOKENS)) < 1e-5

    def gradients(network):
        loss = nn.value_and_grad(model, lambda: network()(TOKENS).square().mean())
        return dict(tree_flatten(loss()[1]))

    wide = gradients(lambda: masked(model, ffns, masks))
    for name, grad in gradients(lambda: gathered(model, ffns, indices, soft)).items():
        assert relative_error(grad, wide[name]) < 1e-4, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_layer_is_what_the_model_does_after_its_body(name):
    model = _model(name)
    parameters, logits = output_layer(model)
    hidden = hidden_states(model, TOKENS)
    assert relative_error(logits(parameters, hidden[0]), model(TOKENS)[0]) < 1e-6


def test_output_layer_of_a_frozen_model_has_nothing_to_train():
    model = _model("llama")
    assert [name for name, _ in tree_flatten(output_layer(model)[0])] == [
        "model.embed_tokens.weight"
    ]
    model.freeze()
    assert not [a for _, a in tree_flatten(output_layer(model)[0]) if isinstance(a, mx.array)]


def test_gathering_shares_the_trunk():
    model = _model("llama")
    indices, soft, _ = _selection(model)
    narrow = gathered(model, find_ffns(model), indices, soft)
    assert narrow.layers[0].self_attn.q_proj.weight is model.layers[0].self_attn.q_proj.weight
    assert narrow.layers[0].mlp.up_proj.weight.shape == (K, 64)
    assert np.array(model.layers[0].mlp.up_proj.weight).shape == (160, 64)
