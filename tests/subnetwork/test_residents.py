"""A switch between overlapping selections reads only what is missing, and gives the same bits."""

import gc
import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import load
from mlx_ifp.convert import convert
from mlx_ifp.selection.selection import Selection
from mlx_ifp.subnetwork.rows import folded_parts

from ..conftest import make_dense
from ..helpers import random_selection

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])
MODES = {
    "float": {},
    "affine": {"quantize_weights": True, "q_bits": 4, "q_group_size": 32},
    "mxfp4": {"quantize_weights": True, "q_mode": "mxfp4"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints by (architecture, mode): llama plain, phi3 fused, granite with biases."""
    root = tmp_path_factory.mktemp("delta")
    made = {}
    for architecture in ("llama", "phi3", "granite"):
        dense = make_dense(root / architecture, architecture)
        for mode, how in MODES.items():
            path = root / f"{architecture}-{mode}"
            made[architecture, mode] = convert(str(dense), path, keep=64, dtype="float16", **how)
    return made


def varied(k, *, soft, seed) -> Selection:
    """Random channels. A third of the soft values is 1, and a third is the same for every seed."""
    selection = random_selection(3, 160, k, soft=soft, seed=seed)
    if soft:
        for channels, values in zip(selection.layers, selection.soft_values, strict=True):
            values[channels % 3 == 0] = 1
            values[channels % 3 == 1] = 0.3
    return Selection(selection.layers, selection.soft_values, 160)


def expected_bytes(model, old: Selection | None, new: Selection | None) -> list[int]:
    """What each layer must read, from the two selections and the sizes on disk."""
    tensors, expected = model.checkpoint.channels, []
    for i, ffn in enumerate(model.checkpoint.ffns):
        row = {
            name.removeprefix(f"{ffn.path}."): info.nbytes // info.shape[0]
            for name, info in tensors.items()
            if name.startswith(f"{ffn.path}.")
        }
        values = []
        for selection in (old, new):
            channels = range(160) if selection is None else selection.layers[i].tolist()
            soft = itertools.repeat(1.0)
            if selection is not None and selection.soft_values is not None:
                soft = selection.soft_values[i].tolist()
            values.append(dict(zip(channels, soft, strict=False)))
        before, after = values
        missing = after.keys() - before.keys()
        stale = {c for c in after.keys() & before.keys() if before[c] not in (1.0, after[c])}
        parts = ["up_proj.weight", "up_proj.bias"]
        if "up_proj.scales" in row:
            parts = ["up_proj.scales", "up_proj.biases", "up_proj.bias"]
            if "up_proj.biases" not in row:
                parts = []
        again = sum(row.get(part, 0) for part in parts)
        expected.append(len(missing) * sum(row.values()) + len(stale) * again)
    return expected


def arrays_of(network) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def assert_same(network, fresh):
    mine, theirs = arrays_of(network), arrays_of(fresh)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        assert mx.array_equal(array, theirs[name]), name
    assert mx.array_equal(network(TOKENS), fresh(TOKENS))


@pytest.mark.parametrize(
    ("soft", "dtype"),
    [
        ((False, False), None),
        ((False, True), None),
        ((True, False), mx.float16),
        ((True, True), mx.float16),
    ],
    ids=["hard", "to soft, cast", "to hard, as stored", "soft, as stored"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "granite"])
def test_a_switch_equals_a_fresh_load_and_reads_the_difference(
    checkpoints, architecture, mode, soft, dtype
):
    path = checkpoints[architecture, mode]
    model, _ = load(path, cache=False, dtype=dtype)
    old, new = (varied(64, soft=s, seed=seed) for seed, s in enumerate(soft))
    first = model.prepare(selection=old)
    before = {name: mx.array(array) for name, array in arrays_of(first.network).items()}
    start = model.reader.bytes_read
    second = model.prepare(selection=new)
    expected = expected_bytes(model, old, new)
    assert second.bytes_read == model.reader.bytes_read - start == sum(expected)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(old.layers, new.layers, strict=True)]
    assert second.channels_reused == sum(shared) > 0
    if not any(soft):
        whole = sum(info.nbytes for info in model.checkpoint.channels.values()) * 64 / 160
        assert second.bytes_read == pytest.approx(whole * (1 - old.overlap(new)[0]), abs=1e-3)
    other, _ = load(path, cache=False, dtype=dtype)
    assert_same(second.network, other.subnetwork(new))
    # The network that rows were taken from has not changed.
    for name, array in arrays_of(first.network).items():
        assert mx.array_equal(array, before[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_exact_in_each_layer(checkpoints, mode):
    model, _ = load(checkpoints["granite", mode], cache=False)
    old, new = varied([20, 64, 160], soft=True, seed=1), varied([64, 30, 64], soft=True, seed=2)
    model.subnetwork(old)
    source = model.store.residents.nearest(new, model.networks.digests)
    begun = [model.store.residents.begin(new, layer, source) for layer in range(3)]
    read = [each.rows().bytes_read for each in begun]
    assert read == expected_bytes(model, old, new)
    other, _ = load(checkpoints["granite", mode], cache=False)
    assert_same(model.subnetwork(new), other.subnetwork(new))


@pytest.mark.parametrize("mode", MODES)
def test_the_dense_model_gives_and_takes_rows(checkpoints, mode):
    path = checkpoints["phi3", mode]
    model, _ = load(path, cache=False)
    selection = varied(64, soft=True, seed=3)
    dense = model.prepare(dense=True)
    narrow = model.prepare(selection=selection)
    assert (narrow.bytes_read, narrow.channels_reused) == (0, 3 * 64)
    other, _ = load(path, cache=False)
    fresh = other.prepare(selection=selection)
    assert_same(narrow.network, fresh.network)
    wide = other.prepare(dense=True)
    assert wide.bytes_read == sum(expected_bytes(other, selection, None))
    assert_same(wide.network, dense.network)


def test_the_one_with_the_largest_overlap_gives_the_rows(checkpoints):
    model, _ = load(checkpoints["llama", "float"], cache=False)
    new = random_selection(3, 160, 64, seed=1)
    near = Selection(tuple(np.sort(np.r_[row[:60], _others(row)[:4]]) for row in new.layers),
                     None, 160)  # fmt: skip
    far = Selection(tuple(np.sort(np.r_[row[:9], _others(row)[:55]]) for row in new.layers),
                    None, 160)  # fmt: skip
    networks = [model.subnetwork(s) for s in (far, near, random_selection(3, 160, 64, seed=8))]
    ready = model.prepare(selection=new)
    assert ready.channels_reused == 3 * 60
    assert ready.bytes_read == sum(expected_bytes(model, near, new))
    assert len(networks) == 3


def test_only_those_used_last_are_compared(checkpoints):
    model, _ = load(checkpoints["llama", "float"], cache=False)
    near, *others = (random_selection(3, 160, 64, seed=seed) for seed in range(9))
    networks = [model.subnetwork(selection) for selection in (near, *others[:7])]
    new = Selection((*near.layers[:2], others[7].layers[2]), None, 160)
    residents = model.store.residents
    assert residents.nearest(new, model.networks.digests)[0].channels is near.layers[0]
    networks.append(model.subnetwork(others[7]))
    assert residents.nearest(new, model.networks.digests)[0].channels is not near.layers[0]
    assert len(networks) == 9


def _others(channels):
    return np.setdiff1d(np.arange(160), channels).astype(np.int32)


def test_soft_values_decide_between_two_of_the_same_channels(checkpoints):
    """Rows with other soft values must be read again in part, rows without any need not."""
    model, _ = load(checkpoints["llama", "float"], cache=False)
    layers = random_selection(3, 160, 64).layers
    soft = [tuple(np.full(64, value, np.float32) for _ in range(3)) for value in (0.2, 0.7)]
    model.subnetwork(Selection(layers, soft[0], 160))
    again = model.prepare(selection=Selection(layers, soft[1], 160))
    assert again.bytes_read == model.reader.nbytes * 64 // 160 // 3
    hard = model.prepare(selection=Selection(layers, None, 160))
    assert hard.bytes_read == again.bytes_read
    third = tuple(np.full(64, 0.4, np.float32) for _ in range(3))
    assert model.prepare(selection=Selection(layers, third, 160)).bytes_read == 0


def test_equal_layers_are_one_array(checkpoints):
    model, _ = load(checkpoints["llama", "affine"], cache=False)
    old = random_selection(3, 160, 64, seed=1)
    new = Selection((old.layers[0], old.layers[1], random_selection(3, 160, 64, seed=2).layers[2]),
                    None, 160)  # fmt: skip
    mine, theirs = (arrays_of(model.subnetwork(s)) for s in (old, new))
    for name in mine:
        same = ".mlp." not in name or "layers.2" not in name
        assert (mine[name] is theirs[name]) == same, name


def test_rows_go_with_their_network(checkpoints):
    model, _ = load(checkpoints["llama", "float"], cache=False)
    old, new = (random_selection(3, 160, 64, seed=seed) for seed in (1, 2))
    # Cycles of earlier tests are freed here, because freeing them below would spoil the count.
    gc.collect()
    before = mx.get_active_memory()
    held = model.subnetwork(old)
    model.networks.clear()
    # No rows are taken from a network that is in use but not cached, so that a benchmark's first
    # prompt stays a first one.
    assert model.prepare(selection=new).channels_reused == 0
    model.networks.clear()
    assert model.store.residents.nearest(new, [old.digest]) is not None
    del held
    gc.collect()
    assert model.store.residents.nearest(new, [old.digest]) is None
    assert mx.get_active_memory() == before


def test_what_a_user_does_to_a_network_is_not_passed_on(checkpoints):
    model, _ = load(checkpoints["llama", "float"], cache=False)
    old, new = (random_selection(3, 160, 64, seed=seed) for seed in (1, 2))
    model.subnetwork(old).set_dtype(mx.bfloat16)
    other, _ = load(checkpoints["llama", "float"], cache=False)
    expected = other.subnetwork(new)
    mine, theirs = arrays_of(model.subnetwork(new)), arrays_of(expected)
    for name in (name for name in theirs if ".mlp." in name):
        assert mx.array_equal(mine[name], theirs[name]), name


def test_rows_of_no_use_are_not_taken(checkpoints):
    model, _ = load(checkpoints["llama", "float"], cache=False)
    old = random_selection(3, 160, 64, seed=1)
    new = Selection(tuple(_others(row)[:64] for row in old.layers), None, 160)
    first, second = (model.prepare(selection=s) for s in (old, new))
    assert second.channels_reused == 0
    assert second.bytes_read == first.bytes_read


def test_mixed_precision_folds_into_a_float_down_projection(checkpoints):
    """With 8-bit scales, soft values go into a down projection that is in floats."""
    ffn = load(checkpoints["llama", "float"], cache=False)[0].checkpoint.ffns[0]
    arrays = {("up_proj", "weight"): None, ("up_proj", "scales"): None, ("down_proj", "weight"): 0}
    assert folded_parts(ffn, arrays) == [("down_proj", "weight")]
    assert folded_parts(ffn, arrays | {("down_proj", "scales"): None}) == []
