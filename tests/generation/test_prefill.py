"""Dense prefill: the whole model reads the prompt, and the sub-network answers."""

import json

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.checkpoint.config import IFPConfig
from mlx_ifp.convert import convert
from mlx_ifp.generation.request import Request
from mlx_ifp.generation.stream import Answer

from ..conftest import make_dense, make_predictor_checkpoint
from ..helpers import mask_model, memory_peak, random_selection

CHAT = [{"role": "user", "content": "Name three rivers of a country that you know well."}]
SYSTEM = [{"role": "system", "content": "You are a poet."}]
TASK = "You know all rivers."
SELECTION = random_selection(3, 160, 64)
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def dense(request, tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("prefill") / request.param, request.param)


@pytest.fixture(scope="module")
def checkpoint(dense):
    return convert(str(dense), dense.with_name(f"{dense.name}-ifp"), keep=64)


@pytest.fixture
def llama_model(tiny_checkpoint):
    return load(tiny_checkpoint, cache=False)


def reference(dense, selection, turns, n):
    """The dense model reads each turn, and the masked dense model answers, on one cache."""
    whole, masked = load_model(dense)[0], mask_model(load_model(dense)[0], selection)
    cache, said = make_prompt_cache(whole), []
    for turn in turns:
        logits = whole(mx.array([turn]), cache=cache)[:, -1]
        for _ in range(n):
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            said.append((logprobs.argmax().item(), logprobs[0]))
            logits = masked(mx.array([[said[-1][0]]]), cache=cache)[:, -1]
    return said


def said(responses):
    return [(r.token, r.logprobs) for r in responses]


def same(ours, expected):
    assert [token for token, _ in ours] == [token for token, _ in expected]
    for (_, a), (_, b) in zip(ours, expected, strict=True):
        assert mx.abs(a - b).max() < TOLERANCE


@pytest.mark.parametrize("step", [2048, 9])
def test_it_is_what_the_two_models_give(dense, checkpoint, step):
    model, tokenizer = load(checkpoint, cache=False)
    responses = list(stream_generate(model, tokenizer, CHAT, max_tokens=8, prefill_step_size=step))
    tokens = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    same(said(responses), reference(dense, model.select(CHAT[0]["content"]), [tokens], 8))
    assert {r.prompt_tokens for r in responses} == {len(tokens)}


def test_the_next_turn_is_read_densely_too(dense, checkpoint):
    model, tokenizer = load(checkpoint, cache=False)
    turns, cache, ours = ([5, 9, 88, 14], [7, 31, 2]), make_prompt_cache(model.trunk), []
    for turn in turns:
        ours += said(
            stream_generate(
                model, tokenizer, turn, selection=SELECTION, prompt_cache=cache, max_tokens=5
            )
        )
    same(ours, reference(dense, SELECTION, turns, 5))
    other = {"selection": random_selection(3, 160, 64, seed=1)}
    for wrong, message in (
        (other, "another selection"),
        ({"selection": SELECTION, "prefill": "pruned"}, "use prefill='dense'"),
        ({"dense": True}, "another selection"),
    ):
        with pytest.raises(IFPError, match=message):
            next(stream_generate(model, tokenizer, [1], prompt_cache=cache, **wrong))


@pytest.fixture
def processed(monkeypatch):
    """Counts the tokens that each attention layer of a llama processes."""
    counts = []
    attend = llama.Attention.__call__

    def counting(self, x, *args, **kwargs):
        counts.append(x.shape[1])
        return attend(self, x, *args, **kwargs)

    monkeypatch.setattr(llama.Attention, "__call__", counting)
    return lambda: sum(counts) / 3


def test_no_token_is_processed_twice(llama_model, processed):
    model, tokenizer = llama_model
    n = len(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True))
    ffns = model.reader.nbytes

    def answer(**kwargs):
        read, tokens = model.reader.bytes_read, processed()
        options = {"max_tokens": 4, "prefill_step_size": 9}
        given = Answer(model, tokenizer, Request(CHAT, options=options, **kwargs))
        # mlx-lm begins with the token after the last one.
        assert len(list(given)) == 4
        figures = given.stats.to_dict()
        assert figures["prefill"]["tokens"] == n
        return model.reader.bytes_read - read, processed() - tokens - 4, figures

    # The first prompt: one pass scores the channels, and reads the prompt.
    read, tokens, figures = answer()
    assert (read, tokens) == (ffns + figures["load"]["bytes_read"], n)
    assert figures["load"]["bytes_read"] > 0 and figures["prefill"]["by"] == "dense"
    # Again: the selection and the sub-network are there.
    assert answer()[:2] == (ffns, n)
    # A task has another text, so the prompt has a pass of its own.
    read, tokens, figures = answer(task=TASK)
    assert read == 2 * ffns + figures["load"]["bytes_read"] and tokens > n
    assert answer(task=TASK)[:2] == (ffns, n)
    read, tokens, figures = answer(task=TASK, prefill="pruned")
    assert (read, tokens, figures["prefill"]["by"]) == (0, n, "pruned")


def test_logits_processors_see_the_whole_prompt(llama_model):
    model, tokenizer = llama_model
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    prompt = list(range(20, 40))
    options = {"max_tokens": 2, "logits_processors": [look], "prefill_step_size": 8}
    responses = list(stream_generate(model, tokenizer, prompt, **options))
    assert seen[:2] == [prompt, [*prompt, responses[0].token]]


def test_the_whole_ffn_is_never_resident(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 8}
    path = convert(str(make_dense(tmp_path / "dense", **shape)), tmp_path / "ifp", keep=64)
    model, tokenizer = load(path, cache=False)
    layer = model.reader.nbytes / 8
    for task in (None, TASK):
        with memory_peak() as peak:
            next(stream_generate(model, tokenizer, CHAT, task, max_tokens=1))
        assert peak.nbytes < 2.2 * layer


# -- who reads by default


def test_the_default_is_what_suits_the_selector(tiny_checkpoint, predictor_checkpoint):
    untrained, trained = load(tiny_checkpoint), load(predictor_checkpoint)

    def by(loaded, **kwargs):
        return Answer(*loaded, Request(CHAT, **kwargs)).prefill

    assert (
        by(untrained) == by(untrained, task=TASK) == by(untrained, selection=SELECTION) == "dense"
    )
    assert by(untrained, prefill="pruned") == by(untrained, dense=True) == "pruned"
    assert by(trained) == by(trained, selection=SELECTION) == "pruned"
    assert by(trained, selector="activations") == by(trained, prefill="dense") == "dense"
    draft = load_model(tiny_draft(tiny_checkpoint))[0]
    assert by(untrained, options={"draft_model": draft}) == "pruned"


def tiny_draft(tiny_checkpoint):
    path = tiny_checkpoint.with_name("draft")
    return path if path.exists() else make_dense(path)


def test_a_checkpoint_says_what_it_was_made_for(tmp_path):
    path, _ = make_predictor_checkpoint(tmp_path / "ifp")
    file = path / "ifp_config.json"
    values = json.loads(file.read_text())
    assert values["format_version"] == 2 and values["prefill"] is None
    for said in ("dense", "pruned"):
        file.write_text(json.dumps(values | {"prefill": said}))
        loaded = load(path, cache=False)
        assert Answer(*loaded, Request(CHAT)).prefill == said
        assert Answer(*loaded, Request(CHAT, selector="activations")).prefill == said
    with pytest.raises(ValueError, match="prefill must be null or one of dense, pruned"):
        IFPConfig.from_dict(values | {"prefill": "both"})


def test_version_1_is_still_read(tiny_checkpoint):
    values = json.loads((tiny_checkpoint / "ifp_config.json").read_text())
    del values["prefill"]
    config = IFPConfig.from_dict(values | {"format_version": 1})
    assert config.prefill is None and config.format_version == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefill": "both"}, "prefill must be 'dense' or 'pruned', not 'both'"),
        ({"prefill": "dense", "dense": True}, "exclude each other"),
        ({"prefill": "dense", "options": {"draft_model": "a"}}, "A draft model does not go with"),
    ],
)
def test_what_does_not_go_together(llama_model, given, message):
    with pytest.raises(IFPError, match=message):
        Answer(*llama_model, Request(CHAT, **given))


# -- key-value caches


def test_keys_and_values_are_quantized_after_the_pass(tmp_path):
    dense = make_dense(tmp_path / "dense", head_dim=32)
    model, tokenizer = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    given = {"selection": SELECTION, "max_tokens": 4}
    exact = said(stream_generate(model, tokenizer, CHAT, **given))
    read = model.reader.bytes_read
    kv = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    with pytest.raises(IFPError, match="mlx-lm cannot keep this model's keys and values in 8"):
        next(stream_generate(model, tokenizer, CHAT, **given, **kv | {"kv_group_size": 128}))
    assert model.reader.bytes_read == read
    cache = make_prompt_cache(model.trunk)
    ours = said(stream_generate(model, tokenizer, CHAT, **given, **kv, prompt_cache=cache))
    assert {type(layer) for layer in cache} == {QuantizedKVCache}
    # The prompt was read with exact keys and values.
    same(ours[:1], exact[:1])
    assert 0 < mx.abs(ours[1][1] - exact[1][1]).max() < 0.02


def test_a_cache_of_the_callers_is_filled_once_all_has_succeeded(llama_model):
    model, tokenizer = llama_model
    expected = said(stream_generate(model, tokenizer, CHAT, max_tokens=4))
    cache = make_prompt_cache(model.trunk)
    answer = Answer(
        model, tokenizer, Request(CHAT, options={"prompt_cache": cache, "max_tokens": 4})
    )
    assert answer.selection is not None and all(layer.empty() for layer in cache)
    same(said(answer), expected)
    assert cache[0].offset == answer.stats.prompt_tokens + 4
    # A window of its own: the selector still sees every token.
    window = [RotatingKVCache(8, 0) for _ in model.trunk.layers]
    runs = model.selector_runs
    model.text_selector._remembered.clear()
    options = {"prompt_cache": window, "max_tokens": 2}
    other = Answer(model, tokenizer, Request(CHAT, options=options))
    assert other.selection.digest == answer.selection.digest
    assert model.selector_runs == runs + 1 and len(list(other)) == 2


def test_a_warm_prompt_is_right_for_every_task(llama_model, processed):
    model, tokenizer = llama_model
    messages = SYSTEM + CHAT
    expected = {
        task: said(stream_generate(model, tokenizer, messages, task, max_tokens=4))
        for task in (TASK, "A cook.")
    }
    n = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    for task, prefilled in ((TASK, True), ("A cook.", False)):
        before = processed()
        request = Request(messages, task, warm=True, options={"max_tokens": 4})
        answer = Answer(model, tokenizer, request)
        same(said(answer), expected[task])
        assert answer.warm.source == ("prefill" if prefilled else "memory")
        tokens = processed() - before - 4
        assert tokens == n if prefilled else tokens == n - answer.warm.tokens
    ready = model.prepare(TASK)
    assert model.warm_prompt(None, [3, 4, 5]) == 3 == model.warm_prompt(ready, [3, 4, 5])
