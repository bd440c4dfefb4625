"""Several threads select, generate and evict at once with one model."""

import faulthandler
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

import mlx_ifp.selectors.selector
import mlx_ifp.subnetwork.store
from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.convert import convert
from mlx_ifp.llm.prompt import encode_prompt, shared_prefix
from mlx_ifp.lru import Once
from mlx_ifp.subnetwork.cache import SubnetworkCache
from mlx_ifp.subnetwork.store import SubnetworkStore

from ..conftest import make_dense, make_predictor_checkpoint

SECONDS = 120
TEXTS = [f"Text number {i}: {word}." for i, word in enumerate(("rivers", "code", "poems", "sums"))]


def run_threads(*works):
    """Run functions at once, each in a thread. Returns their results, or raises the first error.

    If a thread does not end, the test fails, and the stack of every thread is printed.
    """
    results, errors = [None] * len(works), []

    def run(i, work):
        try:
            results[i] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, w), daemon=True) for i, w in enumerate(works)]
    faulthandler.dump_traceback_later(SECONDS, file=sys.__stderr__)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 5)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]
    return results


class InFlight:
    """How often each key was worked on, and whether two threads ever did so at once."""

    def __init__(self):
        self.lock, self.now, self.total, self.twice = threading.Lock(), Counter(), Counter(), []

    @contextmanager
    def __call__(self, key):
        with self.lock:
            self.now[key] += 1
            self.total[key] += 1
            if self.now[key] > 1:
                self.twice.append(key)
        try:
            yield
        finally:
            with self.lock:
                self.now[key] -= 1


@pytest.fixture
def flights(monkeypatch):
    """Watches what is loaded and what selects: (loads by digest, selector runs)."""
    loads, runs = InFlight(), InFlight()
    load_network, scores = SubnetworkStore._load, mlx_ifp.selectors.selector.activation_scores

    def watched_load(self, selection, make_room):
        with loads("dense" if selection is None else selection.digest):
            return load_network(self, selection, make_room)

    def watched_scores(*args, **kwargs):
        with runs("any"):
            return scores(*args, **kwargs)

    monkeypatch.setattr(SubnetworkStore, "_load", watched_load)
    monkeypatch.setattr(mlx_ifp.selectors.selector, "activation_scores", watched_scores)
    return loads, runs


@contextmanager
def held(monkeypatch, name):
    """A function of the model's module that waits; yields (has begun, may go on)."""
    began, go = threading.Event(), threading.Event()
    original = getattr(mlx_ifp.selectors.selector, name)

    def waits(*args, **kwargs):
        began.set()
        assert go.wait(SECONDS)
        return original(*args, **kwargs)

    monkeypatch.setattr(mlx_ifp.selectors.selector, name, waits)
    try:
        yield began, go
    finally:
        go.set()
        monkeypatch.setattr(mlx_ifp.selectors.selector, name, original)


def test_hits_do_not_wait_for_a_selection(tiny_checkpoint, monkeypatch):
    load(tiny_checkpoint)[0].select(TEXTS[1])
    model, tokenizer = load(tiny_checkpoint)
    ready = model.prepare(TEXTS[0])
    assert ready.source == "activations"
    with held(monkeypatch, "activation_scores") as (began, go):
        slow = threading.Thread(target=model.select, args=(TEXTS[2],), daemon=True)
        slow.start()
        assert began.wait(SECONDS)

        def hits():
            again = model.prepare(TEXTS[0])
            from_disk = model.prepare(TEXTS[1])
            text = list(stream_generate(model, tokenizer, TEXTS[0], max_tokens=4))
            return again.source, again.network is ready.network, from_disk.source, len(text)

        assert run_threads(hits) == [("memory", True, "disk", 4)]
        assert slow.is_alive()
        go.set()
        slow.join(SECONDS)
    assert model.selector_runs == 2


def test_one_text_runs_the_selector_once_whoever_asks(tiny_checkpoint, monkeypatch):
    model, _ = load(tiny_checkpoint)
    with held(monkeypatch, "activation_scores") as (began, go):

        def release():
            assert began.wait(SECONDS)
            go.set()

        *ready, _ = run_threads(*[lambda: model.prepare(TEXTS[0])] * 6, release)
    assert model.selector_runs == 1
    assert sorted(r.source for r in ready) == ["activations", *["memory"] * 5]
    assert len({id(r.network) for r in ready}) == 1
    assert model.networks.info.misses == 1
    assert sum(r.bytes_read for r in ready) == model.networks.info.nbytes


def test_selectors_run_one_after_another(tiny_checkpoint, flights):
    model, _ = load(tiny_checkpoint, cache=False)
    run_threads(*[lambda text=text: model.select(text) for text in TEXTS])
    _, runs = flights
    assert runs.total["any"] == len(TEXTS)
    assert not runs.twice


def test_the_predictor_is_loaded_once(predictor_checkpoint):
    expected = [load(predictor_checkpoint, cache=False)[0].select(text).digest for text in TEXTS]
    model, _ = load(predictor_checkpoint, cache=False)
    got = run_threads(*[lambda text=text: model.select(text).digest for text in TEXTS * 2])
    assert got == expected * 2
    assert model.predictor_loads == 1
    # It is released while others use it. It is loaded again, and nobody notices.
    fresh = [f"{text}!" for text in TEXTS]
    run_threads(*[lambda text=text: model.select(text) for text in fresh], model.release_predictor)
    assert model.predictor_loads <= 2


def test_the_predictor_itself_is_loaded_once(predictor_checkpoint, monkeypatch):
    model, _ = load(predictor_checkpoint, cache=False)
    with held(monkeypatch, "load_predictor") as (began, go):
        barrier = threading.Barrier(5)

        def ask():
            barrier.wait(SECONDS)
            return model.predictor

        def release():
            barrier.wait(SECONDS)
            assert began.wait(SECONDS)
            # The others get time to reach the point where they would load it, too.
            time.sleep(0.1)
            go.set()

        *predictors, _ = run_threads(*[ask] * 4, release)
    assert len(set(map(id, predictors))) == 1
    assert model.predictor_loads == 1


def test_an_error_reaches_all_who_wait_and_is_not_kept(tiny_checkpoint, monkeypatch):
    model, _ = load(tiny_checkpoint, cache=False)
    original, errors, waiters = (
        mlx_ifp.selectors.selector.selector_tokens,
        [],
        threading.Semaphore(0),
    )

    class Watched(Future):
        def result(self, timeout=None):
            waiters.release()
            return super().result(timeout)

    def fails_once(*args):
        if errors:
            return original(*args)
        errors.append(IFPError("refused"))
        raise errors[0]

    def ask():
        with pytest.raises(IFPError) as caught:
            model.select(TEXTS[0])
        return caught.value

    monkeypatch.setattr("mlx_ifp.lru.Future", Watched)
    monkeypatch.setattr(mlx_ifp.selectors.selector, "selector_tokens", fails_once)
    with held(monkeypatch, "selector_tokens") as (began, go):

        def release():
            assert began.wait(SECONDS)
            # Three threads wait for the first.
            for _ in range(3):
                assert waiters.acquire(timeout=SECONDS)
            go.set()

        *raised, _ = run_threads(*[ask] * 4, release)
    # An exception equals only itself.
    assert raised == errors * 4
    expected = load(tiny_checkpoint, cache=False)[0].select(TEXTS[0])
    assert model.select(TEXTS[0]).digest == expected.digest
    assert model.selector_runs == 1


def test_who_waits_for_an_interrupted_thread_takes_its_place():
    once, began, made = Once(threading.Lock()), threading.Event(), []
    waits = threading.Event()

    def interrupted():
        began.set()
        assert waits.wait(SECONDS)
        raise KeyboardInterrupt

    def first():
        with pytest.raises(KeyboardInterrupt):
            once.get("key", lambda: None, interrupted)

    def look():
        waits.set()
        return made[0] if made else None

    def second():
        assert began.wait(SECONDS)
        return once.get("key", look, lambda: made.append("made") or "made")

    assert run_threads(first, second)[1] == ("made", True)


# -- in use


def entry(name, nbytes=10):
    return lambda: (name, nbytes)


def test_what_is_in_use_is_not_evicted_and_counts():
    cache = SubnetworkCache(max_bytes=20)
    cache.get("a", entry("a"))
    with cache.using("a", "a", lambda: 10):
        with cache.using("a", "a", lambda: 10):
            for name in "bcd":
                cache.get(name, entry(name))
        cache.clear()
        assert cache.get("a", entry("another"))[0] == "a"
        assert cache.nbytes == 10
        # One that is larger than the bound is only kept, and counted, while it is in use.
        with cache.using("big", "big", lambda: 50):
            assert cache.nbytes == 60
        assert cache.nbytes == 10
    for name in "bc":
        cache.get(name, entry(name))
    assert cache.get("a", entry("another"))[0] == "another"


def test_two_in_use_may_exceed_the_bound_until_one_is_done():
    cache = SubnetworkCache(max_bytes=10)
    with cache.using("a", "a", lambda: 10):
        with cache.using("b", "b", lambda: 10):
            assert cache.nbytes == 20
        assert cache.nbytes == 10
        assert cache.get("a", entry("another"))[0] == "a"


def test_one_that_was_evicted_comes_back_unread_when_it_is_used(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    ready = model.prepare(TEXTS[0])
    nbytes, read = model.networks.nbytes, model.reader.bytes_read
    assert nbytes == ready.bytes_read
    model.networks.clear()
    with model.using(ready) as network:
        assert network is ready.network
        assert model.networks.nbytes == nbytes
        assert model.prepare(TEXTS[0]).network is network
    assert model.reader.bytes_read == read
    model.networks.clear()
    # Another thread has loaded it again, and everyone uses that one.
    other = model.prepare(TEXTS[0])
    with model.using(ready) as network:
        assert network is other.network
    model.networks.clear()
    assert model.networks.nbytes == 0
    assert model.reader.bytes_read == read + nbytes


def test_one_that_comes_back_while_it_is_loaded_stays_the_only_one():
    cache = SubnetworkCache(max_bytes=20)
    began, go, done = threading.Event(), threading.Event(), threading.Event()

    def slow():
        began.set()
        assert go.wait(SECONDS)
        return "loaded", 10

    def loader():
        network, _ = cache.get("a", slow)
        done.set()
        return network

    def user():
        assert began.wait(SECONDS)
        with cache.using("a", "evicted", lambda: 10):
            go.set()
            assert done.wait(SECONDS)
            return cache.get("a", entry("third"))[0]

    assert run_threads(loader, user) == ["evicted", "evicted"]
    assert cache.nbytes == 10


def test_a_generator_that_is_dropped_lets_go(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    steps = stream_generate(model, tokenizer, TEXTS[0], max_tokens=8)
    next(steps)
    model.networks.clear()
    assert model.networks.info.entries == 1
    steps.close()
    model.networks.clear()
    assert model.networks.info.entries == 0


# -- all at once


def test_one_prefix_is_prefilled_once_whoever_asks(tiny_checkpoint, monkeypatch):
    model, _ = load(tiny_checkpoint, cache=False)
    ready = model.prepare(TEXTS[0])
    prefix = list(range(40))
    counts = run_threads(*[lambda: model.warm_prompt(ready, prefix)] * 6)
    assert sorted(counts) == [0] * 5 + [40]
    assert model.warm.info.prefilled == 40


def messages(text):
    return [
        {"role": "system", "content": "You are a poet who is fond of short answers."},
        {"role": "user", "content": text},
    ]


@pytest.fixture(scope="module", params=["llama", "predictor"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("threads")
    if request.param == "predictor":
        return make_predictor_checkpoint(path / "ifp")[0]
    return convert(str(make_dense(path / "llm")), path / "ifp", keep=64)


@pytest.mark.parametrize("seed", range(2))
def test_a_random_mix_gives_what_one_thread_gives(checkpoint, flights, monkeypatch, seed):
    model, tokenizer = load(checkpoint, cache=False)
    expected = {
        text: [r.token for r in stream_generate(model, tokenizer, messages(text), max_tokens=6)]
        for text in TEXTS
    }
    one = model.networks.nbytes // len(TEXTS)
    digests = {text: model.select(text).digest for text in TEXTS}

    # Two of the four fit, and as many selections are remembered. The others are on disk.
    monkeypatch.setattr(mlx_ifp.selectors.selector, "_REMEMBERED_SELECTIONS", 2)
    model, tokenizer = load(checkpoint, cache_bytes=2 * one)
    model.warm.max_bytes = 30_000
    loads, runs = flights
    loads.total.clear()
    wrong = []

    def check(text, tokens):
        if tokens != expected[text]:
            wrong.append((text, tokens))

    def prepare(text):
        if model.prepare(text).selection.digest != digests[text]:
            wrong.append((text, "selection"))

    def generate(text):
        steps = stream_generate(model, tokenizer, messages(text), max_tokens=6)
        check(text, [r.token for r in steps])

    def generate_warm(text):
        # Without a trained predictor, the whole model reads.
        reader = model.prepare(text) if model.selector == "predictor" else None
        tokens = encode_prompt(tokenizer, messages(text))
        model.warm_prompt(reader, tokens[: shared_prefix(tokenizer, messages(text), tokens)])
        prompt_cache, rest = model.warm.fetch(reader, tokens)
        steps = stream_generate(
            model, tokenizer, rest, text, max_tokens=6, prompt_cache=prompt_cache
        )
        check(text, [r.token for r in steps])

    def stream_warm(text):
        steps = stream_generate(model, tokenizer, messages(text), max_tokens=6, warm=True)
        check(text, [r.token for r in steps])

    def evict(_):
        model.networks.clear()

    def release(_):
        model.release_predictor()
        model.warm.clear()

    operations = [prepare, generate, generate, generate_warm, stream_warm, evict, release]

    def work(i):
        choose = random.Random(100 * seed + i)
        for _ in range(10):
            choose.choice(operations)(choose.choice(TEXTS))

    run_threads(*[lambda i=i: work(i) for i in range(8)])
    assert not wrong
    assert not loads.twice
    assert not runs.twice
    info = model.networks.info
    assert sum(loads.total.values()) == info.misses
    assert info.nbytes <= info.max_bytes
    assert model.selector_runs == len(TEXTS)
    assert model.warm.info.nbytes <= 30_000
    # The model works as before.
    for text in TEXTS:
        generate(text)
    assert not wrong


def test_a_model_is_not_torn_by_an_interrupt(tiny_checkpoint, monkeypatch):
    """What Ctrl-C leaves behind: nothing that anybody would wait for."""
    model, _ = load(tiny_checkpoint, cache=False)
    build = mlx_ifp.subnetwork.store.assemble

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mlx_ifp.subnetwork.store, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.prepare(TEXTS[0])
    monkeypatch.setattr(mlx_ifp.subnetwork.store, "assemble", build)
    (ready,) = run_threads(lambda: model.prepare(TEXTS[0]))
    assert ready.bytes_read == model.networks.nbytes > 0
