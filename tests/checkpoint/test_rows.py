"""The one place that knows how channels are stored: to rows and back."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp.checkpoint.rows import from_rows, owners_of, parts_of, stored_modules, to_rows
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import find_ffns

from ..conftest import ARCHITECTURES


@pytest.fixture(params=["llama", "phi3", "granite"])
def model(request):
    """A plain FFN, a fused one and one with biases."""
    name = request.param
    model = build_model(ARCHITECTURES[name] | {"model_type": name})
    mx.eval(model.parameters())
    return model


def test_there_and_back_is_the_same(model):
    ffns, arrays = find_ffns(model), dict(tree_flatten(model.parameters()))
    owners = owners_of(ffns)
    for ffn in ffns:
        own = {n: a for n, a in arrays.items() if owners.get(n.rpartition(".")[0]) is ffn}
        stored = {}
        for name, array in own.items():
            stored |= to_rows(ffn, name, array)
        back = from_rows(ffn, stored)
        assert back.keys() == {name for name in own if not name.endswith("down_proj.bias")}
        assert all(mx.array_equal(array, own[name]) for name, array in back.items())


def test_every_stored_tensor_has_a_row_for_each_channel(model):
    ffn = find_ffns(model)[0]
    arrays = dict(tree_flatten(model.parameters()))
    for name in (n for n in arrays if n.startswith(f"{ffn.path}.")):
        for key, array in to_rows(ffn, name, arrays[name]).items():
            assert array.shape[0] == ffn.d_ffn
            assert key.rpartition(".")[0] in stored_modules([ffn])


def test_what_is_turned_already_stays(model):
    ffn = find_ffns(model)[0]
    name = f"{ffn.path}.down_proj.weight"
    array = mx.zeros((ffn.d_ffn, 8))
    assert to_rows(ffn, name, array, turned=True) == {name: array}


def test_quantized_parts_are_joined_as_the_weights_are(model):
    ffn = find_ffns(model)[0]
    names = [f"{ffn.path}.{p}.{part}" for p in ("gate_proj", "up_proj", "down_proj")
             for part in ("weight", "scales")]  # fmt: skip
    parts = parts_of(ffn, names)
    if ffn.fused:
        gate, up = (f"{ffn.path}.{p}.scales" for p in ("gate_proj", "up_proj"))
        assert parts["gate_up_proj", "scales"] == [gate, up]
    assert sorted(name for found in parts.values() for name in found) == sorted(names)
