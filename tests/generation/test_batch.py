"""Many requests at once: each gets the answer that it gets alone, and nobody waits for ever."""

import gc
import random
import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx_lm.generate import StopSequences
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import mlx_ifp.dense_pass.prefill
import mlx_ifp.generation.batch
from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.convert import convert
from mlx_ifp.generation.batch import Scheduler
from mlx_ifp.generation.groups import TURN, Group
from mlx_ifp.generation.preparing import Preparing
from mlx_ifp.generation.request import Request
from mlx_ifp.generation.sampling import Sampling
from mlx_ifp.generation.ticket import BusyError, ClosedError, FailedError, Token
from mlx_ifp.llm.kv_cache import Generation
from mlx_ifp.memory.budget import Estimator
from mlx_ifp.subnetwork.united import RowCost

from ..conftest import make_dense

TASKS = ("Translate to French.", "Write Python.", "Sum up the text.", "Answer questions.")
SECONDS = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny llama that does not repeat itself: its output layer is not its embedding."""
    folder = tmp_path_factory.mktemp("batch")
    dense = make_dense(folder / "dense", tie_word_embeddings=False)
    return convert(str(dense), folder / "ifp", keep=64)


@pytest.fixture(scope="module")
def shared(checkpoint):
    """A model, its tokenizer, and the selections of :data:`TASKS`."""
    model, tokenizer = load(checkpoint, cache=False, dtype=mx.float32)
    return model, tokenizer, [model.select(task) for task in TASKS]


@contextmanager
def scheduler(model, tokenizer, **options):
    """A scheduler that is closed in the end."""
    it = Scheduler(model, tokenizer, **options)
    try:
        yield it
    finally:
        it.close()


def user(text):
    return [{"role": "user", "content": text}]


def tokens_of(ticket):
    """The tokens of an answer, up to its end."""
    return [event.id for event in ticket.events(SECONDS) if isinstance(event, Token)]


def alone(model, tokenizer, prompt, max_tokens, **options):
    """The tokens that a request gets from the one way to generate."""
    answer = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, **options)
    return [response.token for response in answer]


def until(condition):
    """Wait for something that another thread does."""
    for _ in range(100 * SECONDS):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


class Gate:
    """A logits processor that lets an answer go on, token by token."""

    def __init__(self, free=0):
        self._steps = threading.Semaphore(free)
        self.calls = 0

    def __call__(self, tokens, logits):
        self.calls += 1
        assert self._steps.acquire(timeout=SECONDS)
        return logits

    def open(self, steps=10_000):
        self._steps.release(steps)


@pytest.fixture
def by_turns(monkeypatch):
    """Sub-networks do not share a batch, as for an LLM whose FFNs do not see its rows."""
    monkeypatch.setattr(mlx_ifp.generation.batch, "can_mix", lambda parent: False)


def test_a_request_that_comes_while_the_thread_goes_to_sleep_is_served(shared, monkeypatch):
    model, tokenizer, selections = shared
    admit, tickets = Scheduler._admit, []

    def then_submit(self):
        admit(self)
        if not tickets:
            request = Request(user("Hello"), selection=selections[0], prefill="pruned")
            tickets.append(self.submit(request, Sampling(max_tokens=2)))

    monkeypatch.setattr(Scheduler, "_admit", then_submit)
    with scheduler(model, tokenizer):
        until(lambda: tickets)
        until(lambda: tickets[0].generated == 2)


@pytest.mark.parametrize(("mixed", "count"), [(True, 16), (False, 8)], ids=["mixed", "by turns"])
def test_each_answer_is_the_one_it_gets_alone_whoever_joins_or_leaves(
    checkpoint, monkeypatch, mixed, count
):
    monkeypatch.setattr(mlx_ifp.generation.batch, "can_mix", lambda parent: mixed)
    monkeypatch.setattr(RowCost, "measured", lambda *_: RowCost(1.0, 0.0))
    model, tokenizer = load(checkpoint, cache=False, dtype=mx.float32)
    chance = random.Random(0)
    selections = [model.select(task) for task in TASKS]
    kinds = [{"selection": s, "prefill": p} for s in selections for p in ("dense", "pruned")]
    kinds += [{}, {"dense": True}]
    prompts = ["Say " + " ".join(chance.choices(["car", "tree", "key", "not"], k=n))
               for n in (1, 30, 3, 12)]  # fmt: skip
    asked = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        prompt = user(prompts[chance.randrange(4)] if kind else prompts[0])
        asked.append((prompt, kind, chance.randrange(20, 60)))
    expected = [alone(model, tokenizer, p, n, **kind) for p, kind, n in asked]
    model.networks.clear()
    misses = model.networks.info.misses
    loaded = len({id(kind.get("selection")) for _, kind, _ in asked}) + any(
        kind == {"dense": True} for _, kind, _ in asked
    )
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()

    def client(number, results):
        prompt, kind, n = asked[number]
        time.sleep(chance.random() / 5)
        ticket = it.submit(Request(prompt, **kind), Sampling(max_tokens=n))
        got, leaves = [], number % 2
        for event in ticket:
            if isinstance(event, Token):
                got.append(event.id)
            if leaves and len(got) == n // 2:
                ticket.cancel()
        results[number] = got

    with scheduler(model, tokenizer, decode_concurrency=16, prompt_concurrency=3) as it:
        results = {}
        clients = [threading.Thread(target=client, args=(i, results)) for i in range(count)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(SECONDS)
        until(lambda: not it.info.running)
        assert it.info.steps == {}
        # Whether channels were united depends on when requests came; nobody has them any more.
        assert it._sharing.nbytes == 0
        # Nothing is loaded twice.
        assert model.networks.info.misses - misses == loaded
        it.kept.shrink(0)
        model.networks.clear()
    for number, tokens in enumerate(expected):
        got = results[number]
        assert got == (tokens[: len(got)] if number % 2 else tokens), asked[number]
        assert len(got) >= len(tokens) // 2
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() <= before


def test_a_window_of_keys_and_values_gives_the_same_in_company(tmp_path):
    dense = make_dense(tmp_path / "dense", "gemma3_text", tie_word_embeddings=False)
    model, tokenizer = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    selections = [model.select(text) for text in ("Write.", "Read.", "Write.")]
    asked = [(user("car " * n), s) for n, s in zip((2, 40, 11), selections, strict=True)]
    expected = [alone(model, tokenizer, p, 20, selection=s) for p, s in asked]
    with scheduler(model, tokenizer, prefill_step_size=16) as it:
        tickets = [it.submit(Request(p, selection=s), Sampling(max_tokens=20)) for p, s in asked]
        assert [tokens_of(ticket) for ticket in tickets] == expected


def test_quantized_keys_and_values_are_served_too(tmp_path):
    dense = make_dense(tmp_path / "dense", head_dim=32, tie_word_embeddings=False)
    model, tokenizer = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    selections = [model.select("Write.")]
    kv = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    # Parts of 16 tokens, whatever the prompt's length: where quantization begins must not differ.
    options = kv | {"prefill_step_size": 16}
    prompts = [user("car " * n) for n in (2, 40, 11)]
    expected = [alone(model, tokenizer, p, 20, selection=selections[0], **options) for p in prompts]
    with scheduler(model, tokenizer, prefill_step_size=16) as it:
        tickets = [
            it.submit(Request(p, selection=selections[0], options=kv), Sampling(max_tokens=20))
            for p in prompts
        ]
        assert [tokens_of(ticket) for ticket in tickets] == expected


def test_every_busy_group_has_its_share_of_steps(shared, monkeypatch, by_turns):
    model, tokenizer, selections = shared
    order = []
    step = Group.step
    monkeypatch.setattr(Group, "step", lambda self: (order.append(self), step(self))[1])
    with scheduler(model, tokenizer) as it:
        # The first request holds the batches up until all of them can join.
        gate = Gate()
        crowd = [selections[0]] * 7 + selections[1:]
        tickets = [
            it.submit(
                Request(user("Go"), selection=s),
                Sampling(max_tokens=40, logits_processors=() if number else (gate,)),
            )
            for number, s in enumerate(crowd)
        ]
        for ticket in tickets:
            assert ticket.wait(SECONDS)
        order.clear()
        gate.open()
        # One group has seven requests, the others have one each.
        assert [len(tokens_of(ticket)) for ticket in tickets] == [40] * 10
    groups = set(order)
    assert len(groups) == 4
    last = {group: len(order) - order[::-1].index(group) for group in groups}
    first = max(order.index(group) for group in groups)
    busy = order[first : min(last.values())]
    # The last one to join may miss some turns.
    assert len(busy) >= 4 * 20
    shares = [busy.count(group) for group in groups]
    assert max(shares) - min(shares) <= TURN


def test_requests_of_different_tasks_make_each_step_together(shared, monkeypatch):
    model, tokenizer, selections = shared
    sizes = []
    step = Group.step
    monkeypatch.setattr(Group, "step", lambda self: (sizes.append(len(self.jobs)), step(self))[1])
    with scheduler(model, tokenizer) as it:
        gate = Gate()
        tickets = [
            it.submit(
                Request(user("Go"), selection=s),
                Sampling(max_tokens=20, logits_processors=() if number else (gate,)),
            )
            for number, s in enumerate([*selections, *selections])
        ]
        for ticket in tickets:
            assert ticket.wait(SECONDS)
            until(lambda ticket=ticket: ticket.ready)
        gate.open()
        assert [len(tokens_of(ticket)) for ticket in tickets] == [20] * 8
    assert max(sizes) == 8
    # The first one's step before, those of all, and a few for whoever joined later.
    assert len(sizes) <= 20 + 8


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
def test_the_next_turn_of_a_conversation_only_processes_what_is_new(shared, monkeypatch, prefill):
    model, tokenizer, selections = shared
    how = {"selection": selections[0], "prefill": prefill}
    messages = user("What is the name of the layer? " * 4)
    # A template may not give an answer back as it was, so the second turn is made of tokens.
    new = tokenizer.encode("<|im_end|>\nAnd then?", add_special_tokens=False)
    cache = make_prompt_cache(model.trunk)
    answer = alone(model, tokenizer, messages, 6, prompt_cache=cache, **how)
    expected = alone(model, tokenizer, new, 6, prompt_cache=cache, **how)
    decoded, read = [], []
    call, run = llama.Model.__call__, mlx_ifp.dense_pass.prefill.run_layers
    with scheduler(model, tokenizer) as it:
        first = it.submit(Request(messages, **how), Sampling(max_tokens=6))
        assert tokens_of(first) == answer
        monkeypatch.setattr(
            llama.Model,
            "__call__",
            # The output layer is called alone, too, with a hidden state.
            lambda self, x, *args, **kw: (
                decoded.append(x.size * (x.ndim == 2)),
                call(self, x, *args, **kw),
            )[1],
        )
        monkeypatch.setattr(
            mlx_ifp.dense_pass.prefill,
            "run_layers",
            lambda parent, pieces, *args: (
                read.extend(piece.tokens.size for piece in pieces),
                run(parent, pieces, *args),
            )[1],
        )
        tokens = [*first.tokens, *answer, *new]
        second = it.submit(Request(messages, **how), Sampling(max_tokens=6), tokens=tokens)
        assert tokens_of(second) == expected
        assert second.cached_tokens == len(first.tokens) + len(answer)
    # Each generated token is processed as well, the last one too.
    dense = prefill == "dense"
    assert (sum(read), sum(decoded)) == (len(new) * dense, len(new) * (not dense) + 6)


def test_parts_of_a_prompt_are_kept_for_others_of_the_selection(shared):
    model, tokenizer, selections = shared
    system = [{"role": "system", "content": "You are a helpful car. " * 5}]
    with scheduler(model, tokenizer) as it:

        def ask(text, selection):
            messages = [*system, *user(text)]
            request = Request(messages, selection=selection, prefill="pruned")
            tokens = request.encode(tokenizer)
            n = len(tokens) - len(tokenizer.encode(text, add_special_tokens=False)) - 20
            parts = [(tokens[:n], "system"), (tokens[n:], None)]
            ticket = it.submit(request, Sampling(max_tokens=4), tokens=tokens, segments=parts)
            how = {"selection": selection, "prefill": "pruned"}
            assert tokens_of(ticket) == alone(model, tokenizer, messages, 4, **how)
            return ticket, n

        assert ask("One", selections[0])[0].cached_tokens == 0
        ticket, n = ask("Something else", selections[0])
        assert ticket.cached_tokens >= n
        # Under another selection they would be wrong.
        assert ask("Something else", selections[1])[0].cached_tokens == 0


@pytest.mark.parametrize("fails", [False, True])
def test_prompts_that_wait_are_read_together_but_for_those_that_begin_alike(
    shared, monkeypatch, fails
):
    model, tokenizer, selections = shared
    held, groups = threading.Event(), []
    prepare, read = Preparing.prepare, mlx_ifp.generation.preparing.dense_prefill_all

    def first_waits(self, job):
        held.wait(SECONDS)
        prepare(self, job)

    def read_all(parent, prompts, *args):
        groups.append(len(prompts))
        done = read(parent, prompts, *args)
        if fails:
            raise IFPError("The disk is gone.")
        return done

    monkeypatch.setattr(Preparing, "prepare", first_waits)
    monkeypatch.setattr(mlx_ifp.generation.preparing, "dense_prefill_all", read_all)
    texts = ["Go", "car " * 99, "tree", "key " * 40, "car " * 99 + "not"]
    ways = [{"selection": selections[i % 4], "prefill": "dense"} for i in range(len(texts))]
    # The first one reads its own prompt, and the others wait.
    ways[0]["prefill"] = "pruned"
    asked = [(user(text), way) for text, way in zip(texts, ways, strict=True)]
    expected = [alone(model, tokenizer, prompt, 9, **way) for prompt, way in asked]
    with scheduler(model, tokenizer) as it:
        tickets = [it.submit(Request(p, **way), Sampling(max_tokens=9)) for p, way in asked]
        until(lambda: it.info.running == len(tickets))
        held.set()
        assert [tokens_of(ticket) for ticket in tickets] == expected
    assert groups[0] == 3
    # The last prompt goes on from the second one.
    assert tickets[4].cached_tokens > 99 > tickets[1].cached_tokens


def test_the_bytes_of_kept_prompts_are_bounded(shared):
    model, tokenizer, selections = shared
    kept = []
    for most in (None, 200_000):
        with scheduler(model, tokenizer, kv_bytes=most) as it:
            for text in ("One car", "Two trees", "Four keys"):
                request = Request(user(text * 9), selection=selections[0])
                tokens_of(it.submit(request, Sampling(max_tokens=2)))
            until(lambda it=it: not it.info.running)
            kept.append(it.kept.nbytes)
    assert kept[0] > 200_000 >= kept[1] > 0


def test_a_warm_system_prompt_is_used(shared, monkeypatch):
    model, tokenizer, selections = shared
    messages = [{"role": "system", "content": "You are a cat. " * 9}, *user("Hello")]
    prefilled = model.warm.info.prefilled
    with scheduler(model, tokenizer) as it:
        request = Request(messages, selection=selections[2], warm=True)
        ticket = it.submit(request, Sampling(max_tokens=4))
        assert tokens_of(ticket) == alone(model, tokenizer, messages, 4, selection=selections[2])
        assert ticket.cached_tokens == model.warm.info.prefilled - prefilled > 60


def test_requests_beyond_the_queue_are_refused_and_a_place_is_freed_within_a_step(shared):
    model, tokenizer, selections = shared
    gate = Gate()
    with scheduler(model, tokenizer, decode_concurrency=1, max_queue=2) as it:
        request = Request(user("Go"), selection=selections[0])
        long = it.submit(request, Sampling(max_tokens=500, logits_processors=(gate,)))
        assert long.wait(SECONDS)
        waiting = [it.submit(request, Sampling(max_tokens=3)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait already"):
            it.submit(request)
        assert not waiting[0].wait(0)
        waiting[0].cancel()
        third = it.submit(request, Sampling(max_tokens=3))
        until(lambda: gate.calls == 1)
        long.cancel()
        gate.open(2)  # the step that runs, and the one that mlx-lm computes ahead
        assert len(tokens_of(waiting[1])) == len(tokens_of(third)) == 3
        assert gate.calls <= 2
        assert tokens_of(long) == tokens_of(waiting[0]) == []


def test_an_error_reaches_only_the_request_that_makes_it(shared):
    model, tokenizer, selections = shared
    request = Request(user("Go"), selection=selections[0])
    expected = alone(model, tokenizer, user("Go"), 12, selection=selections[0])

    def breaks(tokens, logits):
        if len(tokens) > 30:
            raise ValueError("no grammar")
        return logits

    with scheduler(model, tokenizer) as it:
        good = it.submit(request, Sampling(max_tokens=12))
        bad = it.submit(request, Sampling(max_tokens=400, logits_processors=(breaks,)))
        worse = it.submit(request, Sampling(sampler=make_sampler(1.0, top_k=10**6)))
        nans = it.submit(request, Sampling(logits_processors=(lambda _, logits: logits * mx.nan,)))
        with pytest.raises(IFPError, match="is empty"):
            it.submit(Request(user(" "))).wait(SECONDS)
        assert tokens_of(good) == expected
        with pytest.raises(FailedError, match="no grammar"):
            tokens_of(bad)
        with pytest.raises(FailedError, match="top_k"):
            tokens_of(worse)
        with pytest.raises(IFPError, match="no numbers"):
            tokens_of(nans)
        with pytest.raises(IFPError, match="draft_model"):
            it.submit(Request("Go", options={"draft_model": "x"}))
        assert tokens_of(it.submit(request, Sampling(max_tokens=12))) == expected
        until(lambda: not it.info.running)


def test_a_step_that_fails_ends_its_group_only(shared, monkeypatch, by_turns):
    model, tokenizer, selections = shared
    broken = model.subnetwork(selections[0])
    original = llama.Model.__call__

    def call(self, inputs, *args, **kwargs):
        if self is broken:
            raise RuntimeError("[metal] out of memory")
        return original(self, inputs, *args, **kwargs)

    with scheduler(model, tokenizer) as it:
        monkeypatch.setattr(llama.Model, "__call__", call)
        a, b = (
            it.submit(Request(user("Go"), selection=s), Sampling(max_tokens=9))
            for s in selections[:2]
        )
        with pytest.raises(FailedError, match="out of memory"):
            tokens_of(a)
        assert len(tokens_of(b)) == 9
        monkeypatch.undo()
        again = it.submit(Request(user("Go"), selection=selections[0]), Sampling(max_tokens=9))
        assert len(tokens_of(again)) == 9


def test_a_seed_gives_the_same_tokens_in_any_company(shared):
    model, tokenizer, selections = shared
    request = Request(user("Go"), selection=selections[0])
    seeded = Sampling(20, make_sampler(1.0), seed=7, top_logprobs=2, logprobs=True)
    with scheduler(model, tokenizer) as it:
        events = [e for e in it.submit(request, seeded) if isinstance(e, Token)]
        others = [it.submit(request, Sampling(30, make_sampler(1.0), seed=s)) for s in (1, None)]
        among = tokens_of(it.submit(request, seeded))
        assert among == [event.id for event in events]
        assert len({tuple(among), *(tuple(tokens_of(o)[:20]) for o in others)}) == 3
        assert all(e.logprob < 0 and e.top[0]["logprob"] >= e.logprob for e in events)
        assert events[-1].finish_reason == "length"


def test_stop_sequences_and_lengths_are_each_requests_own(shared):
    model, tokenizer, selections = shared
    expected = alone(model, tokenizer, user("Go"), 12, selection=selections[0])
    stop = StopSequences([tuple(expected[:3])])
    request = Request(user("Go"), selection=selections[0])
    with scheduler(model, tokenizer) as it:
        tickets = [
            it.submit(request, Sampling(max_tokens=12, stop=stop)),
            it.submit(request, Sampling(max_tokens=12)),
            it.submit(request, Sampling(max_tokens=1)),
        ]
        answers = [[e for e in t if isinstance(e, Token)] for t in tickets]
    assert [[t.id for t in a] for a in answers] == [expected[:3], expected, expected[:1]]
    assert [a[-1].finish_reason for a in answers] == ["stop", "length", "length"]


def limited(checkpoint, requests_at_once, length):
    """A model whose memory limit has room for so many requests with networks of their own."""
    model, _ = load(checkpoint, cache=False, dtype=mx.float32)
    estimator = Estimator(model.checkpoint, mx.float32)
    each = estimator.kv(Generation(length)) + estimator.network(model.text_selector.ks)
    limit = estimator.trunk + int((requests_at_once + 0.5) * each)
    return load(checkpoint, cache=False, dtype=mx.float32, memory_limit=limit)[0]


def test_what_does_not_fit_now_waits_and_what_never_fits_is_refused(checkpoint, shared):
    _, tokenizer, selections = shared
    model = limited(checkpoint, 2, 180)
    expected = [alone(model, tokenizer, user("Go"), 120, selection=s) for s in selections]
    running = []
    with scheduler(model, tokenizer) as it:
        tickets = [
            it.submit(Request(user("Go"), selection=s), Sampling(max_tokens=120))
            for s in selections
        ]
        with pytest.raises(IFPError, match=r"The memory limit is .* MB, but .* are needed"):
            it.submit(Request("Go", selection=selections[0]), Sampling(max_tokens=4_000)).wait()
        for ticket in tickets:
            ticket.wait(SECONDS)
            running.append(it.info.running)
        assert [tokens_of(ticket) for ticket in tickets] == expected
        assert max(running) <= 2
        assert it.kept.nbytes <= it._admission.room_for_prompts()
        assert model.networks.nbytes + it.kept.nbytes + model.memory.estimator.trunk <= (
            model.memory.limit
        )


def test_united_channels_make_room_for_a_request(checkpoint, shared, monkeypatch):
    _, tokenizer, selections = shared
    monkeypatch.setattr(RowCost, "measured", lambda *_: RowCost(1.0, 0.0))
    model = limited(checkpoint, 3, 180)
    expected = [alone(model, tokenizer, user("Go"), 120, selection=s) for s in selections[:3]]
    gates = [Gate(), Gate()]
    with scheduler(model, tokenizer) as it:

        def ask(number):
            processors = gates[number : number + 1]
            sampling = Sampling(max_tokens=120, logits_processors=tuple(processors))
            return it.submit(Request(user("Go"), selection=selections[number]), sampling)

        tickets = [ask(0), ask(1)]
        until(lambda: all(ticket.ready for ticket in tickets))
        for gate in gates:
            gate.open(2 * TURN + 2)
        until(lambda: it._sharing.nbytes)
        estimator, networks = model.memory.estimator, model.networks.nbytes
        assert estimator.trunk + networks + it._sharing.nbytes <= model.memory.limit
        tickets.append(ask(2))
        for gate in gates:
            gate.open()
        assert tickets[2].wait(SECONDS)
        assert it._sharing.nbytes == 0
        assert [tokens_of(ticket) for ticket in tickets] == expected


def test_idle_memory_is_freed_and_comes_back(predictor_checkpoint):
    model, tokenizer = load(predictor_checkpoint, cache=False, dtype=mx.float32)
    with scheduler(model, tokenizer, idle_timeout=0.2) as it:
        first = tokens_of(it.submit(Request(user("Go")), Sampling(max_tokens=9)))
        until(lambda: it.info.released == 1)
        assert (len(it.kept), model.networks.nbytes) == (0, 0)
        assert (model.predictor_loads, model.selector_runs) == (1, 1)
        ticket = it.submit(Request(user("Go")), Sampling(max_tokens=9))
        assert tokens_of(ticket) == first
        assert ticket.ready.bytes_read > 0
        # The selection itself is remembered; another one needs the predictor.
        assert (model.predictor_loads, model.selector_runs) == (1, 1)
        tokens_of(it.submit(Request(user("Stop")), Sampling(max_tokens=2)))
        assert (model.predictor_loads, model.selector_runs) == (2, 2)
        until(lambda: it.info.released >= 2)


def test_closing_lets_running_answers_end_if_they_do_in_time(shared):
    model, tokenizer, selections = shared
    request = Request(user("Go"), selection=selections[0])
    it = Scheduler(model, tokenizer, decode_concurrency=2)
    gate = Gate()
    short = it.submit(request, Sampling(max_tokens=30))
    endless = it.submit(request, Sampling(max_tokens=10**6, logits_processors=(gate,)))
    waiting = it.submit(request, Sampling(max_tokens=30))
    until(lambda: it.info.running == 2 and gate.calls)
    gate.open(100)
    closing = threading.Thread(target=it.close, args=(4.0,))
    closing.start()
    with pytest.raises(ClosedError):
        waiting.wait()
    assert len(tokens_of(short)) == 30
    with pytest.raises(ClosedError):
        it.submit(request)
    gate.open(10**6)
    with pytest.raises(ClosedError):
        tokens_of(endless)
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert not it.alive
