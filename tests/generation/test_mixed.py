"""Rows of one batch go through the channels of different sub-networks."""

import mlx.core as mx
import pytest

from mlx_ifp import load
from mlx_ifp.convert import convert
from mlx_ifp.generation.groups import has_batches
from mlx_ifp.generation.mixed import MixedNetwork, can_mix
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.kv_cache import KVSettings
from mlx_ifp.subnetwork.united import Member, RowCost, union_widths, unite

from ..conftest import ARCHITECTURES, make_dense
from ..helpers import random_selection, relative_error

# Channels cost, however many rows go through them.
READING = RowCost(1.0, 0.0)


# Of gemma3 some layers have a sliding window; phi3's projections are fused, llama's have biases.
@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        ("gemma3_text", {}),
        ("phi3", {}),
        ("llama", {"quantize_weights": True, "q_group_size": 32}),
        ("phi3", {"quantize_weights": True, "q_group_size": 32}),
    ],
)
def test_each_row_gets_what_its_own_subnetwork_gives(architecture, how, tmp_path):
    dense = make_dense(tmp_path / "dense", architecture)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64, **how), cache=False)
    assert can_mix(model.parent)
    layers, d_ffn = len(model.checkpoint.ffns), model.checkpoint.d_ffn
    selections = [random_selection(layers, d_ffn, k, seed=k) for k in (64, 48)]
    members = {s.digest: Member(s, model.subnetwork(s)) for s in selections}
    members["dense"] = Member(None, model.dense())
    networks = {digest: member.network for digest, member in members.items()}
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
    check(5, 6)
    assert merged[-1].extract(1).digests == [rows[1]]
    # All rows go through the channels of all, and each one keeps its own.
    mixed.unite(unite(model.parent, members), READING)
    check(6, 7)
    assert mixed.kept


def test_united_channels_are_there_once_and_used_where_that_is_faster(tmp_path):
    model, _ = load(convert(str(make_dense(tmp_path / "dense")), tmp_path / "ifp", keep=64))
    layers, d_ffn = len(model.checkpoint.ffns), model.checkpoint.d_ffn
    members = {
        selection.digest: Member(selection, model.subnetwork(selection))
        for selection in (random_selection(layers, d_ffn, 64, seed=seed) for seed in (1, 2))
    }
    read = model.reader.bytes_read
    united = unite(model.parent, members)
    assert model.reader.bytes_read == read
    widths = union_widths(model.parent, list(members.values()))
    a, b = (member.selection for member in members.values())
    assert widths == [
        len(set(x.tolist()) | set(y.tolist())) for x, y in zip(a.layers, b.layers, strict=True)
    ]
    assert [keep.sum(axis=1).tolist() for keep in united.keeps.values()] == [[64, 64]] * layers
    weight = united.ffns[model.checkpoint.ffns[0].path].gate_proj.weight
    assert (united.width, len(weight)) == (sum(widths), widths[0])
    rows = dict.fromkeys(members, 4)
    assert united.pays(rows, READING)
    # A row costs the same whoever else is there, and more channels cost more.
    assert not united.pays(rows, RowCost(0.0, 1.0))
    assert not united.pays({a.digest: 8}, READING)
    assert not united.pays(rows | {"dense": 1}, READING)
    cost = RowCost.measured(model.parent, members[a.digest])
    assert cost.fixed + cost.each > 0


def test_models_whose_batches_fail_in_mlx_lm_are_known_before():
    def built(architecture):
        return build_model(ARCHITECTURES[architecture] | {"model_type": architecture})

    assert has_batches(built("llama"), KVSettings())
    assert not has_batches(built("llama"), KVSettings(kv_bits=8))
    assert not has_batches(built("gemma2"), KVSettings())
