"""A cache keeps what was used last, within a bound."""

import threading

from mlx_ifp.lru import LRU


def test_what_was_used_least_recently_goes_first():
    cache = LRU(2)
    for key in "ab":
        cache.keep(key, key.upper())
    assert cache.get("a") == "A"
    cache.keep("c", "C")
    assert (cache.get("b"), cache.evictions) == (None, 1)
    assert cache.items() == [("a", "A"), ("c", "C")]


def test_sizes_are_bounded_together_and_what_is_too_large_is_not_kept():
    cache = LRU(10)
    assert cache.keep("big", "BIG", 11) == "BIG"
    assert len(cache) == 0
    for key, size in (("a", 4), ("b", 4), ("c", 6)):
        cache.keep(key, key, size)
    assert [key for key, _ in cache.items()] == ["b", "c"]
    assert cache.size == 10


def test_what_is_in_use_stays_and_counts():
    in_use = {"a"}
    cache = LRU(10, in_use)
    cache.keep("a", "A", 12)
    cache.keep("b", "B", 4)
    cache.clear()
    assert [key for key, _ in cache.items()] == ["a"]
    in_use.clear()
    cache.shrink(10)
    assert len(cache) == 0


def test_the_first_of_two_values_stays():
    cache = LRU(2)
    cache.keep("a", "first")
    assert cache.keep("a", "second") == "first"


def test_a_value_is_made_once_whoever_asks():
    cache, go, made, got = LRU(2), threading.Event(), [], []

    def make():
        made.append(1)
        assert go.wait(30)
        return "value", 1

    threads = [
        threading.Thread(target=lambda: got.append(cache.get_or_make("a", make))) for _ in "123"
    ]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1
    assert sorted(got) == [("value", False), ("value", False), ("value", True)]
