"""A conversation answers as generate does, and processes each token once."""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.generation.conversation import Conversation
from mlx_ifp.generation.request import Request

SYSTEM = "You are a poet."
SHORT = {"max_tokens": 6}
PRUNED = {"prefill": "pruned"}
# The assistant's words of earlier turns change, as where a template leaves out old reasoning.
UPPER = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{{ message.content | upper }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint, tmp_path_factory):
    return load(tiny_checkpoint, cache_dir=tmp_path_factory.mktemp("cache"))


def ask(conversation, model, tokenizer, content, **kwargs):
    """The conversation's next answer, compared with generate's to all its messages."""
    messages = [*conversation.messages, {"role": "user", "content": content}]
    options = dict(conversation.request.options)
    kwargs.setdefault("prefill", conversation.request.prefill)
    expected = [*stream_generate(model, tokenizer, messages, **options, **kwargs)]
    got = [*conversation.reply(content)]
    assert [response.token for response in got] == [response.token for response in expected]
    for one, other in zip(got, expected, strict=True):
        assert mx.allclose(one.logprobs, other.logprobs, rtol=0, atol=5e-5)
    said = "".join(response.text for response in got)
    assert conversation.turns[-2:] == [messages[-1], {"role": "assistant", "content": said}]
    processed = conversation.answer.stats.prompt_tokens
    assert processed + conversation.reused == expected[-1].prompt_tokens
    return processed, conversation.reused


@pytest.mark.parametrize("how", [PRUNED, {"dense": True}], ids=str)
def test_a_turn_is_answered_as_the_whole_conversation_would_be(loaded, how):
    conversation = Conversation(*loaded, Request("", options=SHORT, **how), SYSTEM)
    first, reused = ask(conversation, *loaded, "Name three rivers.", **how)
    assert reused == 0
    for content in ("And a lake?", "And a sea?"):
        processed, reused = ask(conversation, *loaded, content, **how)
        assert reused >= first and processed < reused


def test_keys_and_values_stay_while_the_selection_does(loaded):
    conversation = Conversation(*loaded, Request("", options=SHORT, **PRUNED), SYSTEM)
    ask(conversation, *loaded, "Name three rivers.")
    for change in ({"task": "A list.", **PRUNED}, {"keep": 32, **PRUNED}, {"dense": True}):
        conversation.request = Request("", options=SHORT, **change)
        assert ask(conversation, *loaded, "And a lake?", **change)[1] == 0
        assert ask(conversation, *loaded, "And a sea?", **change)[1] > 0
    conversation.system = "You are a painter."
    _, reused = ask(conversation, *loaded, "And a hill?", dense=True)
    assert 0 < reused < 20, "what stands before the first change is kept"
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "You are a painter."}]


def test_the_whole_model_reads_what_is_new(loaded):
    model, _ = loaded
    conversation = Conversation(*loaded, Request("", options=SHORT, prefill="dense"), SYSTEM)
    first, _ = ask(conversation, *loaded, "Name three rivers.")
    before = conversation.answer.request.options["prompt_cache"]
    assert before[0].offset == first + 6
    read = model.reader.bytes_read
    assert [*conversation.reply("And a lake?")]
    # All channels are read once, for the new tokens only.
    assert model.reader.bytes_read - read == model.reader.nbytes
    assert conversation.reused >= first
    assert conversation.answer.request.options["prompt_cache"] is before


def test_what_the_template_changes_is_processed_again(loaded):
    kwargs = {"chat_template_kwargs": {"chat_template": UPPER}, **PRUNED}
    conversation = Conversation(*loaded, Request("", options=SHORT, **kwargs), SYSTEM)
    first, _ = ask(conversation, *loaded, "Name three rivers.", **kwargs)
    conversation.turns[-1]["content"] = "the seine"
    processed, reused = ask(conversation, *loaded, "And a lake?", **kwargs)
    assert reused == first and processed > len("THE SEINE")


def test_a_cache_that_cannot_be_cut_is_filled_anew(loaded, monkeypatch):
    conversation = Conversation(*loaded, Request("", options=SHORT, **PRUNED), SYSTEM)
    ask(conversation, *loaded, "Name three rivers.")
    # A sliding window that is full has lost what stood before it.
    monkeypatch.setattr("mlx_lm.models.cache.KVCache.is_trimmable", lambda self: False)
    conversation.turns[-1]["content"] = "The Seine."
    assert ask(conversation, *loaded, "And a lake?")[1] == 0


def test_an_answer_that_is_closed_is_part_of_the_conversation(loaded):
    conversation = Conversation(*loaded, Request("", options={"max_tokens": 50}, **PRUNED), SYSTEM)
    answer = conversation.reply("Name three rivers.")
    said = "".join(next(answer).text for _ in range(4))
    answer.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": said}
    assert ask(conversation, *loaded, "And a lake?")[1] > 20
    answer = conversation.reply("And a sea?")
    next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    # It may have come while only some of the layers had a token.
    assert ask(conversation, *loaded, "And a hill?")[1] == 0


def test_what_cannot_be_answered_changes_nothing(loaded):
    conversation = Conversation(*loaded, Request("", options=SHORT, **PRUNED), SYSTEM)
    ask(conversation, *loaded, "Name three rivers.")
    before = list(conversation.messages)
    for content in ("word " * 5000, "half a \ud800 pair"):
        with pytest.raises(IFPError):
            conversation.reply(content)
        assert conversation.messages == before
    conversation.request = replace(conversation.request, keep=0)
    with pytest.raises(IFPError):
        conversation.reply("And a lake?")
    conversation.request = replace(conversation.request, keep=None)
    assert conversation.messages == before
    ask(conversation, *loaded, "And a lake?")
