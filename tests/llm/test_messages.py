"""A message has one reading, whatever form it comes in."""

import json
import re

import pytest

from mlx_ifp import IFPError, generate, load
from mlx_ifp.generation.request import Request
from mlx_ifp.llm.messages import read_messages, row_messages
from mlx_ifp.selectors.text import selecting_text

CALL = {"type": "function", "id": "1", "function": {"name": "sum", "arguments": {"a": [1, 2]}}}


def said(content: object, role: str = "user", **fields: object) -> str:
    """The content of one message, once it is read."""
    (message,) = read_messages([{"role": role, "content": content} | fields])
    return message["content"]


def refusal(*messages: object) -> str:
    with pytest.raises(IFPError) as caught:
        read_messages(list(messages))
    return str(caught.value)


def test_parts_are_joined_as_mlx_lm_joins_them():
    assert said("Name\nthree") == "Name\nthree"
    assert said([{"type": "text", "text": "Name "}, {"type": "text", "text": "three"}]) == (
        "Name three"
    )
    assert said([{"type": "input_text", "text": "a"}, {"text": "b"}]) == "ab"
    assert said([]) == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["w1 w2"], 'part 1 of the content of message 1 must be an object such as {"type": "text"'),
        ([None], "part 1 of the content of message 1 must be an object"),
        ([{"type": "text", "text": None}], "the text of part 1 of the content of message 1 must"),
        (
            [{"text": "a"}, {"type": "image_url", "image_url": {}}],
            "part 2 .* type 'image_url'; onl",
        ),
        (None, "the content of message 1 must be a string"),
        (3, "the content of message 1 must be a string"),
        ({"text": "a"}, "the content of message 1 must be a string"),
        ("\ud83d", "the content of message 1 is not Unicode text"),
    ],
)
def test_a_content_that_is_no_text_is_named(content, words):
    assert re.match(words, refusal({"role": "user", "content": content}))


def test_what_is_no_message_is_named():
    ok = {"role": "user", "content": "a"}
    for bad in ("hello", None, {"content": "a"}, {"role": None, "content": "a"}):
        assert "message 2 must be an object with role and content" in refusal(ok, bad)
    assert "must be a list" in refusal()


def test_a_message_that_calls_tools_may_be_silent():
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    (message,) = read_messages([{"role": "assistant", "tool_calls": [CALL]}])
    assert message["content"] == ""


@pytest.mark.parametrize("arguments", ['{"a": [1, 2]}', {"a": [1, 2]}])
def test_arguments_are_an_object(arguments):
    call = CALL | {"function": {"name": "sum", "arguments": arguments}}
    (message,) = read_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert message["tool_calls"] == [CALL]


@pytest.mark.parametrize("arguments", [None, "", " "])
def test_a_call_may_have_no_arguments(arguments):
    call = {"name": "now", "arguments": arguments}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [{"name": "now", "arguments": {}}]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("sum", "the tool_calls of message 1 must be a list"),
        ([None], "tool call 1 of message 1 must be an object"),
        ([{"function": "sum"}], "tool call 1 of message 1 must be an object"),
        ([CALL, {"function": {"arguments": {}}}], "tool call 2 of message 1 must be an object"),
        ([{"name": "a", "arguments": "{"}], "the arguments of tool call 1 of message 1 are no JS"),
        ([{"name": "a", "arguments": "[1]"}], "the arguments of tool call 1 of message 1 must be"),
    ],
)
def test_a_call_that_cannot_be_read_is_named(calls, words):
    line = refusal({"role": "assistant", "content": None, "tool_calls": calls})
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("21 °C", "21 °C"),
        ([{"type": "text", "text": "21"}], "21"),
        ({"t": 21, "unit": "°C"}, '{"t": 21, "unit": "°C"}'),
        (21, "21"),
        (True, "true"),
        (None, ""),
    ],
)
def test_what_a_tool_gave_back_is_text(content, text):
    assert said(content, "tool", tool_call_id="1") == text


def test_fields_that_are_null_are_left_out():
    row = {"role": "user", "content": "a", "tool_calls": None, "name": None}
    assert read_messages([row]) == [{"role": "user", "content": "a"}]
    assert row["name"] is None
    assert read_messages([row | {"tool_calls": []}]) == [{"role": "user", "content": "a"}]


def test_to_read_twice_changes_nothing():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": {"t": 21}},
    ]
    before = json.dumps(messages)
    once = read_messages(messages)
    assert read_messages(once) == once
    assert json.dumps(messages) == before


def test_a_row_is_read_as_messages_are():
    assert row_messages({"prompt": "a"}) == row_messages({"messages": None, "text": "a"})
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert row_messages({"messages": parts}) == row_messages({"text": "a"})
    with pytest.raises(IFPError, match="a row has messages"):
        row_messages({"text": 3})


def test_selection_and_template_read_the_same(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers."}]
    plain = [{"role": "user", "content": "Name three rivers."}]
    split = [{"role": "user", "content": parts}]
    for kwargs in ({}, {"ignore_chat_template": True}):
        a, b = (Request(prompt, **kwargs) for prompt in (plain, split))
        assert a.encode(tokenizer) == b.encode(tokenizer)
        assert selecting_text(a.prompt) == selecting_text(b.prompt) == "Name three rivers."
    assert generate(model, tokenizer, split, max_tokens=4) == generate(
        model, tokenizer, plain, max_tokens=4
    )


def test_a_bad_message_is_refused_from_python(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    for content in (["w1 w2"], [None], [{"type": "text", "text": None}], None):
        with pytest.raises(IFPError, match="content of message 1"):
            generate(model, tokenizer, [{"role": "user", "content": content}], max_tokens=1)
