"""Tokens become text, thoughts and tool calls, and stop texts are found wherever they begin."""

import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import ToolCallFormatter

from mlx_ifp.commands.server.pieces import Reader, StopText
from mlx_ifp.generation.ticket import Token

END = 0
MACHINE = {
    "normal": [("<think>", "reasoning"), ("<call>", "tool")],
    "reasoning": [("</think>", "normal")],
    "tool": [("</call>", "normal")],
}


def parse(text, tools):
    name, _, argument = text.partition(" ")
    if not argument:
        raise KeyError("argument")
    return {"name": name, "arguments": {"of": argument}}


def read(texts, *, reason="stop", stops=(), last=END, one_call=False):
    """All pieces of an answer joined: text, thoughts, names of tools, reason, stop text."""
    tokens = [Token(i + 1, text) for i, text in enumerate(texts)]
    tokens.append(Token(last, "", finish_reason=reason))
    reader = Reader(
        TextStateMachine(MACHINE), "normal", ToolCallFormatter(parse, None), list(stops), {END},
        decode=lambda token: "." if token == 99 else "", one_call=one_call,
    )  # fmt: skip
    pieces = list(reader.pieces(tokens))
    calls = [call["function"]["name"] for piece in pieces for call in piece.tool_calls]
    end = next(piece for piece in pieces if piece.finish_reason is not None)
    text = "".join(piece.text for piece in pieces)
    thoughts = "".join(piece.reasoning for piece in pieces)
    return text, thoughts, calls, end.finish_reason, end.stopped_by


def test_markers_are_found_across_tokens():
    parts = ["<thi", "nk>so", "</think", ">yes<", "call>f x</call>"]
    assert read(parts) == ("yes", "so", ["f"], "tool_calls", None)


def test_what_only_looks_like_a_marker_is_said():
    assert read(["a <th"])[0] == "a <th"
    assert read(["a <th"], reason="length")[0] == "a <th"


def test_a_call_that_cannot_be_read_is_text():
    assert read(["<call>broken</call>"]) == ("broken", "", [], "stop", None)
    assert read(["<call>f x"], reason="length") == ("", "", ["f"], "length", None)


def test_one_call_is_enough_if_it_is_asked_for():
    parts = ["<call>f x</call>a", "<call>g y</call>b"]
    assert read(parts)[2] == ["f", "g"]
    assert read(parts, one_call=True)[2:4] == (["f"], "tool_calls")


@pytest.mark.parametrize(
    ("parts", "stops", "said", "stop"),
    [
        (["one. Two"], ["."], "one", "."),
        (["one", " E", "ND more"], [" END"], "one", " END"),
        (["aab"], ["ab"], "a", "ab"),
        (["abc"], ["c", "b"], "a", "b"),
        (["a EN"], [" END"], "a EN", None),
        (["<think>a.</think>b.c"], ["."], "b", "."),
    ],
)
def test_a_stop_text_ends_the_answer_before_it(parts, stops, said, stop):
    text, _, _, reason, stopped_by = read(parts, stops=stops)
    assert (text, reason, stopped_by) == (said, "stop", stop)


def test_a_stop_whose_last_token_is_not_given_as_text_is_named():
    assert read(["a", "E"], stops=["E."], last=99) == ("a", "", [], "stop", "E.")


def test_stop_texts_hold_back_no_more_than_they_must():
    stop = StopText(["END", "xx"])
    assert [stop.feed(part) for part in ("ab", "cE", "N", "d", "x", "y")] == [
        "ab", "c", "", "ENd", "", "xy",
    ]  # fmt: skip
