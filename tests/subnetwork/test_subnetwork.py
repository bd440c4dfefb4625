"""A sub-network equals the full model with masked activations."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_config, save_model

from mlx_ifp import IFPError, load
from mlx_ifp.convert import convert
from mlx_ifp.llm.modules import get_module, share

from ..conftest import ARCHITECTURES, make_dense
from ..helpers import mask_model, random_selection, relative_error

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])


def open_both(tmp_path, architecture, convert_kwargs=None, **overrides):
    dense = make_dense(tmp_path / "dense", architecture, **overrides)
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=64, **(convert_kwargs or {}))
    model, _ = load(checkpoint, cache=False)
    return dense, model


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_subnetwork_equals_masked_model(tmp_path, architecture, soft):
    dense, model = open_both(tmp_path, architecture)
    selection = random_selection(3, 160, 50, soft=soft)
    network = model.subnetwork(selection)
    reference = mask_model(load_model(dense)[0], selection)
    assert relative_error(network(TOKENS), reference(TOKENS)) < 1e-5
    assert type(network).__module__.startswith("mlx_lm.models.")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_equals_the_source_model(tmp_path, architecture):
    dense, model = open_both(tmp_path, architecture)
    assert relative_error(model.dense()(TOKENS), load_model(dense)[0](TOKENS)) < 1e-5


def test_layers_may_keep_different_numbers_of_channels(tmp_path):
    dense, model = open_both(tmp_path, "phi3")
    selection = random_selection(3, 160, [1, 77, 160], soft=True)
    reference = mask_model(load_model(dense)[0], selection)
    assert relative_error(model.subnetwork(selection)(TOKENS), reference(TOKENS)) < 1e-5


MODES = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", None),
    ("nvfp4", None),
    ("mxfp8", None),
]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "granite"])
@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_quantized_subnetwork_equals_its_dequantized_model(
    tmp_path, architecture, mode, bits, soft
):
    how = {"quantize_weights": True, "q_mode": mode, "q_bits": bits}
    if mode == "affine":
        how["q_group_size"] = 32
    _, model = open_both(tmp_path, architecture, how)
    selection = random_selection(3, 160, 50, soft=soft)
    network = model.subnetwork(selection)
    whole = model.dense()
    assert "scales" in get_module(whole, model.checkpoint.ffns[0].path).down_proj
    reference = mask_model(whole, selection, model.checkpoint.ffns)
    assert relative_error(network(TOKENS), reference(TOKENS)) < 2e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_half_precision_weights_are_kept_exactly(tmp_path, dtype, soft):
    dense, model = open_both(tmp_path, "llama", {"dtype": dtype})
    assert {tensor.dtype for tensor in model.checkpoint.channels.values()} <= {"F16", "BF16"}
    selection = random_selection(3, 160, 64, soft=soft)
    reference = load_model(dense)[0]
    # Both sides round in the same way and then compute in float32, as on every CPU.
    reference.set_dtype(getattr(mx, dtype))
    reference.set_dtype(mx.float32)
    reference = mask_model(reference, selection)
    assert relative_error(model.subnetwork(selection)(TOKENS), reference(TOKENS)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_can_be_asked_for(tmp_path, dtype):
    dense = make_dense(tmp_path / "dense")
    model, _ = load(
        convert(str(dense), tmp_path / "ifp", keep=64, dtype=dtype),
        cache=False,
        dtype=getattr(mx, dtype),
    )
    network = model.subnetwork(random_selection(3, 160, 64, soft=True))
    kinds = {array.dtype for _, array in tree_flatten(network.parameters())}
    assert kinds == {getattr(mx, dtype)}
    assert network(TOKENS).dtype == getattr(mx, dtype)


def test_a_shared_tree_has_the_same_arrays_in_modules_of_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.tied = self.one
            self.pair = (nn.Linear(4, 4), mx.ones(3))
            self.sizes = {"a": [1, 2]}
            self.called = self.one.__call__

    model = Model()
    copied = share(model)
    assert copied.one is copied.tied is not model.one
    assert copied.called.__self__ is copied.one
    assert copied.pair[0] is not model.pair[0]
    assert copied.sizes == model.sizes and copied.sizes["a"] is not model.sizes["a"]
    for name, array in tree_flatten(model):
        if isinstance(array, mx.array):
            assert dict(tree_flatten(copied))[name] is array, name
    copied.one.freeze()
    assert model.one.trainable_parameters() and not copied.tied.trainable_parameters()


def test_trunk_arrays_are_shared_not_copied(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    one = model.subnetwork(random_selection(3, 160, 64, seed=1))
    other = model.subnetwork(random_selection(3, 160, 64, seed=2))
    mine, theirs = (dict(tree_flatten(n.parameters())) for n in (one, other))
    for name in mine:
        assert (mine[name] is theirs[name]) == (".mlp." not in name), name


def test_width_is_told_in_the_arguments(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    assert model.subnetwork(random_selection(3, 160, 64)).args.intermediate_size == 64
    assert model.dense().args.intermediate_size == 160


def test_mixed_precision_per_projection(tmp_path):
    """The bits of each module are mlx-lm's own per-path entries in config.json."""
    dense = make_dense(tmp_path / "dense", "llama")
    network, config = load_model(dense)
    nn.quantize(
        network,
        class_predicate=lambda path, m: (
            hasattr(m, "to_quantized")
            and {"group_size": 32, "bits": 8 if "up_proj" in path else 4, "mode": "affine"}
        ),
    )
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"} | {
        f"model.layers.{i}.mlp.up_proj": {"group_size": 32, "bits": 8} for i in range(3)
    }
    save_model(dense, network)
    save_config(config, dense / "config.json")
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    mlp = model.dense().layers[0].mlp
    assert (mlp.gate_proj.bits, mlp.up_proj.bits, mlp.down_proj.bits) == (4, 8, 8)
    assert mx.array_equal(mlp.up_proj.weight, network.layers[0].mlp.up_proj.weight)
    selection = random_selection(3, 160, 64, soft=True)
    narrow = model.subnetwork(selection)(TOKENS)
    reference = mask_model(model.dense(), selection, model.checkpoint.ffns)
    assert relative_error(narrow, reference(TOKENS)) < 2e-5


def test_nothing_to_select_with_is_said(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    with pytest.raises(IFPError, match="give a text, a selection, or dense=True"):
        model.prepare()
