"""What the system is asked to read: each byte that is needed, and errors are left to the reader."""

from pathlib import Path

import numpy as np

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.cli.early import trunk_files
from mlx_ifp.files import read_ahead as module
from mlx_ifp.files.read_ahead import read_ahead
from mlx_ifp.selection.disk_cache import SelectionCache
from mlx_ifp.subnetwork.ahead import likely_channels

from ..helpers import random_selection


def asked(monkeypatch, ranges) -> int:
    """How many bytes the system is asked for."""
    counts: list[int] = []
    monkeypatch.setattr(module, "advise", lambda _, offset, nbytes: counts.append(nbytes))
    read_ahead(ranges).join()
    return sum(counts)


def test_the_trunk_and_the_tokenizer_are_asked_for_whole(monkeypatch, tiny_checkpoint):
    files = [tiny_checkpoint / "tokenizer.json", *tiny_checkpoint.glob("model*.safetensors")]
    whole = sum(file.stat().st_size for file in files)
    assert asked(monkeypatch, lambda: trunk_files(str(tiny_checkpoint))) == whole


def test_what_is_not_there_is_left_to_the_reader(monkeypatch, tmp_path):
    assert asked(monkeypatch, lambda: trunk_files(str(tmp_path / "none"))) == 0
    assert asked(monkeypatch, lambda: [(tmp_path / "none", 0, 0)]) == 0


def test_all_of_a_range_is_asked_for_in_small_requests(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module.os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(
        module.os, "posix_fadvise", lambda _, start, length, __: seen.append((start, length)),
        raising=False,
    )  # fmt: skip
    module.advise(0, 1000, 300_000)
    ends = [start + length for start, length in seen]
    assert [start for start, _ in seen] == [1000, *ends[:-1]] and ends[-1] == 301_000
    assert max(length for _, length in seen) <= 128 << 10


def test_a_dense_prefill_needs_every_channel(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    ranges = list(likely_channels(checkpoint, "dense", None))
    assert sum(nbytes for *_, nbytes in ranges) == sum(
        tensor.nbytes for tensor in checkpoint.channels.values()
    )


def test_likely_channels_are_those_of_every_selection(tmp_path, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    cache, shape = SelectionCache(tmp_path), (len(checkpoint.ffns), checkpoint.d_ffn)
    assert list(likely_channels(checkpoint, "pruned", cache)) == []
    made = [random_selection(*shape, 90, seed=i, checkpoint=checkpoint.digest) for i in range(3)]
    for i, selection in enumerate(made):
        cache.store(f"{i}", selection, {})
    common = cache.always(checkpoint.digest)
    for layer, channels in enumerate(common):
        kept = set.intersection(*(set(each.layers[layer].tolist()) for each in made))
        assert channels.tolist() == sorted(kept)
    covered: dict[Path, set[int]] = {}
    for path, offset, nbytes in likely_channels(checkpoint, "pruned", cache):
        covered.setdefault(path, set()).update(range(offset, offset + nbytes))
    for layer, ffn in enumerate(checkpoint.ffns):
        info = checkpoint.channels[f"{ffn.path}.up_proj.weight"]
        row = info.nbytes // info.shape[0]
        places = common[layer] if info.places is None else info.places[common[layer]]
        for place in np.asarray(places).tolist():
            first = info.offset + place * row
            assert covered[info.path] >= set(range(first, first + row))
