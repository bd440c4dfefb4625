"""Useless texts are found, and odd ones are not taken for useless."""

import pytest

from mlx_ifp.synthesis.filters import Duplicates, find_loop, why_useless

START = list(range(100, 120))


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        (START + list(range(1, 11)) * 5, 40),
        (START + [7] * 40, 22),
        (START + [1, 2, 3] * 4, None),  # a short list may repeat
        (list(range(300)), None),
        ([], None),
    ],
)
def test_a_loop_ends_after_its_second_round(tokens, end):
    assert find_loop(tokens) == end


@pytest.mark.parametrize(
    ("text", "tokens", "why"),
    [
        ("What rhymes with blorp?", [5, 6, 7], None),
        ("hello <|im_end|>", [5, 2], "special tokens"),
        ("half a \ufffd", [5], "special tokens"),
        ("?!", [5], "empty"),
        ("", [], "empty"),
        ("no " * 30, [5, 6, 7], "repetition"),
    ],
)
def test_odd_prompts_stay_and_useless_ones_go(text, tokens, why):
    assert why_useless(text, tokens, {2}) == why


def test_a_duplicate_shares_most_of_its_trigrams_with_one_earlier_text():
    seen = Duplicates()
    assert not seen.add("What is the capital of France?")
    assert not seen.add("What is the capital of Spain?")
    assert seen.add("what is the capital of FRANCE")
    assert not seen.add("Hi")
    assert seen.add("hi!")
