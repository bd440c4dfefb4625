"""Rows of one batch go through the channels of different sub-networks."""

import mlx.core as mx
import pytest

from mlx_ifp import load
from mlx_ifp.convert import convert
from mlx_ifp.generation.groups import has_batches
from mlx_ifp.generation.mixed import MixedNetwork, can_mix
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.kv_cache import KVSettings

from ..conftest import ARCHITECTURES, make_dense
from ..helpers import random_selection, relative_error


# Of gemma3 some layers have a sliding window; phi3's projections are fused.
@pytest.mark.parametrize("architecture", ["gemma3_text", "phi3"])
def test_each_row_gets_what_its_own_subnetwork_gives(architecture, tmp_path):
    dense = make_dense(tmp_path / "dense", architecture)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    assert can_mix(model.parent)
    layers, d_ffn = len(model.checkpoint.ffns), model.checkpoint.d_ffn
    networks = {
        selection.digest: model.subnetwork(selection)
        for selection in (random_selection(layers, d_ffn, k, seed=k) for k in (64, 48))
    }
    networks["dense"] = model.dense()
    mixed = MixedNetwork(model.parent)
    for digest, network in networks.items():
        mixed.add(digest, network)
    rows = [*networks, *reversed(networks)]
    tokens = mx.random.randint(0, 384, (len(rows), 7), key=mx.random.key(0))
    caches = [mixed.make_cache(None, digest) for digest in rows]
    merged = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]

    def check(start, end):
        logits = mixed(tokens[:, start:end], merged)
        for row, digest in enumerate(rows):
            own = networks[digest](tokens[row : row + 1, :end])[:, start:]
            assert relative_error(logits[row : row + 1], own) < 1e-5

    check(0, 5)
    # Rows leave, others join behind them, and what is kept of a row is its own.
    for layer in merged:
        layer.filter([4, 0, 2])
    rows, tokens = [rows[i] for i in (4, 0, 2)], tokens[mx.array([4, 0, 2])]
    check(5, 7)
    assert merged[-1].extract(1).digests == [rows[1]]


def test_models_whose_batches_fail_in_mlx_lm_are_known_before():
    def built(architecture):
        return build_model(ARCHITECTURES[architecture] | {"model_type": architecture})

    assert has_batches(built("llama"), KVSettings())
    assert not has_batches(built("llama"), KVSettings(kv_bits=8))
    assert not has_batches(built("gemma2"), KVSettings())
