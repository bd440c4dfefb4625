"""Reuse of a sub-network whose selection is nearly the new one: counted, and equal to that one."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import IFPError, Selection, generate, load, stream_generate
from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.generation.stats import Stats
from mlx_ifp.selection.overlap import overlap_matrix
from mlx_ifp.selection.packed import overlap, pack
from mlx_ifp.subnetwork import reuse as reuse_module
from mlx_ifp.subnetwork.cache import SubnetworkCache
from mlx_ifp.subnetwork.reuse import Reuse, check_overlap

from ..conftest import make_predictor_checkpoint
from ..helpers import random_selection

TEXT = "Name three rivers."
TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])


def alike(selection: Selection, exchanged: int, seed: int = 0, soft: bool = False) -> Selection:
    """Another selection that has all but a few channels of each layer in common."""
    rng = np.random.default_rng(seed)
    layers = []
    for channels in selection.layers:
        left = np.setdiff1d(np.arange(selection.d_ffn), channels)
        kept = rng.choice(channels, len(channels) - exchanged, replace=False)
        new = rng.choice(left, exchanged, replace=False)
        layers.append(np.sort(np.concatenate([kept, new])).astype(np.int32))
    values = tuple(rng.uniform(0.1, 1, len(x)).astype(np.float32) for x in layers)
    return Selection(tuple(layers), values if soft else None, selection.d_ffn, selection.checkpoint)


@pytest.fixture(scope="module")
def own(predictor_checkpoint) -> Selection:
    """What TEXT selects: 64 of 160 channels."""
    return load(predictor_checkpoint, cache=False)[0].select(TEXT)


def loaded(checkpoint, *selections, at_least=0.75, **kwargs):
    """A model with the sub-networks of some selections in memory, and its tokenizer."""
    model, tokenizer = load(checkpoint, cache=False, reuse_overlap=at_least, **kwargs)
    for selection in selections:
        model.prepare(selection=selection)
    return model, tokenizer


# -- comparing


@pytest.mark.parametrize("d_ffn", [64, 160, 163])
def test_the_overlap_is_that_of_the_lists_of_channels(d_ffn):
    for seed in range(10):
        a = random_selection(5, d_ffn, 40, seed=seed)
        b = random_selection(5, d_ffn, [1, 39, 40, 41, d_ffn], seed=100 + seed)
        shared = [len(np.intersect1d(*pair)) for pair in zip(a.layers, b.layers, strict=True)]
        expected = np.array(shared) / np.maximum(a.ks, b.ks)
        assert (overlap(pack(a.mask), pack(b.mask)) == expected).all()
        assert (overlap(pack(b.mask), pack(b.mask)) == 1).all()
        assert a.overlap(b)[0] == expected.mean()
        assert (overlap_matrix([a, b])[0, 1] == expected).all()


@pytest.mark.parametrize("value", [0, -0.1, 1.001, float("nan"), float("inf")])
def test_the_overlap_must_be_a_share(tiny_checkpoint, value):
    with pytest.raises(IFPError, match="above 0 and at most 1"):
        check_overlap(value)
    with pytest.raises(IFPError, match="above 0 and at most 1"):
        load(tiny_checkpoint, reuse_overlap=value)


# -- in memory


def test_reuse_reads_nothing_and_builds_nothing(predictor_checkpoint, own):
    other = alike(own, 16)
    model, _ = loaded(predictor_checkpoint, other)
    network, read, misses = model.subnetwork(other), model.reader.bytes_read, 1
    ready = model.prepare(TEXT)
    assert ready.network is network
    assert ready.selection.digest == other.digest
    assert (ready.source, ready.reuse_overlap, ready.bytes_read) == ("predictor", 0.75, 0)
    assert model.reader.bytes_read == read
    assert (model.networks.info.misses, model.networks.info.entries) == (misses, 1)
    again = model.prepare(TEXT)
    assert (again.source, again.reuse_overlap, again.bytes_read) == ("memory", 0.75, 0)
    assert again.network is network
    # A selection that is asked for by itself is exact.
    assert model.select(TEXT).digest == own.digest
    assert model.subnetwork(own) is not network


def test_just_below_the_threshold_it_loads(predictor_checkpoint, own):
    # One layer has one channel less than in the test before.
    other, less = alike(own, 16), alike(own, 17)
    below = Selection((less.layers[0], *other.layers[1:]), None, own.d_ffn, own.checkpoint)
    assert 0.74 < own.overlap(below)[0] < 0.75
    model, _ = loaded(predictor_checkpoint, below)
    ready = model.prepare(TEXT)
    assert ready.selection.digest == own.digest
    assert ready.reuse_overlap is None
    # Rows that are not in memory are read.
    assert ready.bytes_read == (17 + 16 + 16) * 3 * 64 * 4
    assert model.networks.info.misses == 2


def test_off_by_default(predictor_checkpoint, own):
    model, _ = load(predictor_checkpoint, cache=False)
    model.prepare(selection=alike(own, 1))
    ready = model.prepare(TEXT)
    assert ready.bytes_read > 0 and ready.reuse_overlap is None
    assert ready.selection.digest == own.digest


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_outputs_are_those_of_the_reused_selection(tmp_path, soft):
    mask = MaskConfig("sigmoid", 1.0, soft)
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", mask=mask)
    exact, tokenizer = load(checkpoint, cache=False)
    own = exact.select(TEXT)
    assert (own.soft_values is not None) is soft
    other = alike(own, 4, soft=soft)
    model, _ = loaded(checkpoint, other, at_least=0.9)
    ready = model.prepare(TEXT)
    assert ready.reuse_overlap == 60 / 64
    expected = exact.subnetwork(other)(TOKENS)
    assert mx.array_equal(ready.network(TOKENS), expected)
    assert not mx.array_equal(exact.subnetwork(own)(TOKENS), expected)
    text = generate(model, tokenizer, TEXT, max_tokens=8)
    assert text == generate(exact, tokenizer, TEXT, selection=other, max_tokens=8)


def test_the_most_alike_is_used(predictor_checkpoint, own):
    others = [alike(own, n, seed=n) for n in (10, 2, 5)]
    model, _ = loaded(predictor_checkpoint, *others)
    assert model.prepare(TEXT).selection.digest == others[1].digest


def test_its_own_sub_network_is_used_if_it_is_there(predictor_checkpoint, own):
    model, _ = loaded(predictor_checkpoint, own, alike(own, 1))
    ready = model.prepare(TEXT)
    assert (ready.selection.digest, ready.reuse_overlap) == (own.digest, None)
    assert ready.bytes_read == 0


def test_a_given_selection_and_the_dense_model_are_never_replaced(predictor_checkpoint, own):
    model, _ = loaded(predictor_checkpoint, own, at_least=0.01)
    other = alike(own, 1)
    ready = model.prepare(selection=other)
    assert (ready.selection.digest, ready.reuse_overlap) == (other.digest, None)
    assert ready.bytes_read > 0
    dense = model.prepare(dense=True)
    assert dense.selection is None and dense.reuse_overlap is None


def test_the_dense_model_stands_in_for_nothing(predictor_checkpoint, own):
    model, _ = loaded(predictor_checkpoint, at_least=0.01)
    model.dense()
    assert model.prepare(TEXT).selection.digest == own.digest


def test_what_was_evicted_is_not_reused(predictor_checkpoint, own):
    other = alike(own, 1)
    model, _ = loaded(predictor_checkpoint, other)
    model.networks.clear()
    ready = model.prepare(TEXT)
    assert ready.selection.digest == own.digest
    assert ready.bytes_read > 0


def test_a_conversation_keeps_its_stand_in(predictor_checkpoint, own):
    other, later = alike(own, 8), alike(own, 1)
    model, tokenizer = loaded(predictor_checkpoint, other)
    prompt_cache = make_prompt_cache(model.dense())

    def turn(prompt):
        chunks = stream_generate(
            model, tokenizer, prompt, task=TEXT, max_tokens=2, prompt_cache=prompt_cache
        )
        return list(chunks)

    turn("Hello")
    # A closer one is there now, and the stand-in is gone, but keys and values are still those of
    # the stand-in.
    model.networks.clear()
    model.prepare(selection=later)
    turn("More")
    ready = model.prepare(TEXT)
    assert (ready.selection.digest, ready.reuse_overlap) == (other.digest, 56 / 64)


def test_a_conversation_without_a_stand_in_gets_none_later(predictor_checkpoint, own):
    model, _ = loaded(predictor_checkpoint)
    assert model.prepare(TEXT).bytes_read > 0
    model.networks.clear()
    model.prepare(selection=alike(own, 1))
    ready = model.prepare(TEXT)
    assert (ready.selection.digest, ready.reuse_overlap) == (own.digest, None)


def test_an_exact_hit_compares_nothing(predictor_checkpoint, own, monkeypatch):
    model, _ = loaded(predictor_checkpoint, *(alike(own, 40, seed=seed) for seed in range(4)))
    model.prepare(TEXT)
    monkeypatch.setattr(reuse_module, "pack", lambda *_: pytest.fail("packed"))
    monkeypatch.setattr(reuse_module, "overlap", lambda *_: pytest.fail("compared"))
    ready = model.prepare(TEXT)
    assert (ready.source, ready.bytes_read) == ("memory", 0)


def test_what_is_remembered_is_bounded():
    networks = SubnetworkCache(max_bytes=3)
    reuse = Reuse(1.0, networks)
    for seed in range(300):
        selection = random_selection(1, 16, 8, seed=seed)
        reuse.stand_in(selection)
        networks.get(selection.digest, lambda: (object(), 1))
        reuse.add(selection)
    assert len(reuse._packed) <= 4
    assert len(reuse._settled) <= 256


def test_threads(predictor_checkpoint, own):
    others = [alike(own, n, seed=n) for n in range(1, 9)]
    model, _ = loaded(predictor_checkpoint, cache_bytes=3 * 147_456)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for i in range(12):
            try:
                if rng.random() < 0.5:
                    model.prepare(selection=others[rng.integers(8)])
                else:
                    ready = model.prepare(f"{TEXT} {i}")
                    assert ready.network.args.intermediate_size == 64
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_figures_say_it(predictor_checkpoint, own):
    model, tokenizer = loaded(predictor_checkpoint, alike(own, 4))
    ready = model.prepare(TEXT)
    (response,) = stream_generate(model, tokenizer, TEXT, max_tokens=1)
    stats = Stats.of(ready, response, 0.1, (1, 1))
    assert stats.to_dict()["selection"]["reuse_overlap"] == 60 / 64
    assert "predictor, another reused: overlap 0.938" in stats.table()
