"""Sub-networks in memory and selections on disk."""

import threading
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.device import default_cache_dir
from mlx_ifp.selection.disk_cache import MAX_SELECTIONS, SelectionCache
from mlx_ifp.selection.files import load_selection, save_selection
from mlx_ifp.subnetwork.cache import SubnetworkCache

from ..helpers import random_selection


def entry(nbytes):
    return lambda: (object(), nbytes)


def test_least_recently_used_goes_first():
    cache = SubnetworkCache(max_bytes=30)
    for name in "abc":
        cache.get(name, entry(10))
    assert cache.get("a", entry(10))[1]
    cache.get("d", entry(10))
    assert cache.get("a", entry(10))[1]
    assert not cache.get("b", entry(10))[1]
    info = cache.info
    assert (info.hits, info.misses, info.evictions) == (2, 5, 2)
    assert (info.entries, info.nbytes) == (3, 30)


def test_one_larger_than_the_bound_is_handed_out_but_evicts_nothing():
    cache = SubnetworkCache(max_bytes=20)
    cache.get("a", entry(10))
    assert not cache.get("big", entry(21))[1]
    assert not cache.get("big", entry(21))[1]
    assert cache.get("a", entry(10))[1]
    assert cache.info.evictions == 0


def test_threads_that_want_the_same_one_load_it_once():
    cache = SubnetworkCache(max_bytes=100)
    started, release, loads, got = threading.Event(), threading.Event(), [], []

    def slow():
        loads.append(1)
        started.set()
        release.wait(10)
        return object(), 10

    threads = [threading.Thread(target=lambda: got.append(cache.get("a", slow)[0]))]
    threads[0].start()
    assert started.wait(10)
    threads += [threading.Thread(target=lambda: got.append(cache.get("a", slow)[0])) for _ in "123"]
    for thread in threads[1:]:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(loads) == 1
    assert len(got) == 4
    assert len(set(map(id, got))) == 1


def test_a_failed_load_leaves_nothing_and_can_be_repeated():
    cache = SubnetworkCache(max_bytes=100)

    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        cache.get("a", fail)
    assert not cache.get("a", entry(10))[1]


def test_many_threads_keep_within_the_bound():
    cache = SubnetworkCache(max_bytes=50)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            name = str(rng.integers(12))
            network, _ = cache.get(name, lambda name=name: (name, 10))
            if network != name or cache.nbytes > 50:
                failures.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    info = cache.info
    assert not failures
    assert info.hits + info.misses == 8 * 300
    assert info.misses - info.evictions == info.entries


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("k", [64, [1, 77, 160]], ids=["uniform", "by layer"])
def test_a_selection_survives_its_file(tmp_path, soft, k):
    selection = random_selection(3, 160, k, soft=soft, checkpoint="c" * 64)
    save_selection(tmp_path / "s", selection)
    back = load_selection(tmp_path / "s", "c" * 64)
    assert back.digest == selection.digest
    assert all((a == b).all() for a, b in zip(back.layers, selection.layers, strict=True))
    if soft:
        pairs = zip(back.soft_values, selection.soft_values, strict=True)
        assert all((a == b).all() for a, b in pairs)
    assert back.k == k
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_selection_of_another_checkpoint_is_refused(tmp_path):
    save_selection(tmp_path / "s", random_selection(3, 160, 64, checkpoint="a"))
    with pytest.raises(IFPError, match="another checkpoint"):
        load_selection(tmp_path / "s", "b")


def test_a_second_model_finds_the_selection_on_disk(tiny_checkpoint):
    model, _ = load(tiny_checkpoint)
    fresh = model.prepare("Name three rivers.")
    assert fresh.source == "activations"
    assert fresh.bytes_read > 0
    repeat = model.prepare("Name three rivers.")
    assert (repeat.source, repeat.bytes_read) == ("memory", 0)
    assert repeat.network is fresh.network
    other, _ = load(tiny_checkpoint)
    disk = other.prepare("Name three rivers.")
    assert disk.source == "disk"
    assert other.selector_runs == 0
    assert disk.selection.digest == fresh.selection.digest
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(disk.network(tokens), fresh.network(tokens))


def test_settings_are_part_of_the_key(tiny_checkpoint):
    model, _ = load(tiny_checkpoint)
    model.select("A text.")
    model.select("A text.", keep=32)
    model.select("Another text.")
    assert model.selector_runs == 3
    narrow, _ = load(tiny_checkpoint, keep=32)
    assert narrow.select("A text.").k == 32
    assert narrow.selector_runs == 0


def test_no_cache_writes_nothing(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    model.select("A text.")
    assert not default_cache_dir().exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"mlx_ifp.selection", b"somebody.elses_it"),
        lambda data: data.replace(b'"version":"1"', b'"version":"9"'),
        lambda data: data[:-30] + b"\x00" * 30,
    ],
    ids=["empty", "garbage", "truncated", "foreign", "version", "zeroed"],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_rewritten(tiny_checkpoint, damage):
    model, _ = load(tiny_checkpoint)
    expected = model.select("A text.")
    (path,) = SelectionCache().entries()
    path.write_bytes(damage(path.read_bytes()))
    other, _ = load(tiny_checkpoint)
    with pytest.warns(UserWarning, match="Ignoring a cached selection"):
        assert other.select("A text.").digest == expected.digest
    assert other.selector_runs == 1
    third, _ = load(tiny_checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third.select("A text.")
    assert third.selector_runs == 0


def test_a_cache_that_cannot_be_written_does_no_harm(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    model, _ = load(tiny_checkpoint, cache_dir=tmp_path / "file")
    with pytest.warns(UserWarning, match="not cached"):
        model.select("A text.")


def test_the_disk_cache_is_bounded(tmp_path):
    cache = SelectionCache(tmp_path)
    for i in range(MAX_SELECTIONS + 5):
        cache.store(str(i), random_selection(1, 16, 4, checkpoint="c"), {})
    assert len(cache.entries()) == MAX_SELECTIONS


def test_a_file_that_goes_meanwhile_is_left_out(tmp_path):
    cache = SelectionCache(tmp_path)
    cache.store("ab", random_selection(1, 16, 4, checkpoint="c"), {})
    (folder,) = (tmp_path / "selections").iterdir()
    # This stands for a file that is listed and then deleted.
    (folder / "cd.safetensors").symlink_to(folder / "gone")
    assert [path.stem for path in cache.entries()] == ["ab"]
    assert cache.previous("c", "") is not None


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("darwin", {}, "home/Library/Caches/mlx_ifp"),
        ("linux", {}, "home/.cache/mlx_ifp"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/mlx_ifp"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "home/.cache/mlx_ifp"),
        ("darwin", {"MLX_IFP_CACHE": "own"}, "own"),
    ],
)
def test_the_platforms_place(monkeypatch, platform, environment, expected):
    monkeypatch.delenv("MLX_IFP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "home")
    monkeypatch.setattr("sys.platform", platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(default_cache_dir()) == expected
