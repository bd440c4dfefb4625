"""A model writes prompts and answers, and what is kept is of use."""

import io
import json

import pytest
from mlx_lm import load

from mlx_ifp.errors import IFPError
from mlx_ifp.synthesis import writer
from mlx_ifp.synthesis.sampling import Request, sample_texts
from mlx_ifp.synthesis.writer import Prompt, Synthesis, SynthesisArgs

from ..chatting import make_chat_model


@pytest.fixture(scope="module")
def chat(chat_model):
    return load(str(chat_model))


def written(chat, *, prompts=(), tasks=None, earlier=(), **numbers) -> list[dict]:
    """The rows of a synthesis in batches of 4."""
    file = io.StringIO()
    args = SynthesisArgs(**{"count": 0, "batch_size": 4, "max_answer_tokens": 40} | numbers)
    synthesis = Synthesis(*chat, args, file, tasks=tasks, earlier=earlier)
    synthesis.answer(prompts)
    synthesis.write()
    return [json.loads(line) for line in file.getvalue().splitlines()]


def asked(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def test_rows_have_prompts_that_are_not_alike(chat):
    rows = written(chat, count=12)
    assert len(set(asked(rows))) == len(rows) == 12
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
        assert "<|" not in json.dumps(row["messages"])
        assert (row["task"], row["source"]) == ("own", "own")
    assert {row["temperature"] for row in rows} <= {0.7, 0.0, 1.0}


def test_a_seed_gives_the_same_rows_and_earlier_rows_give_others(chat):
    first = written(chat, count=5, seed=3)
    assert written(chat, count=5, seed=3) == first
    assert written(chat, count=5, seed=4) != first
    # The count is of the whole file.
    more = written(chat, count=9, seed=3, earlier=first)
    assert len(more) == 4 and not set(asked(first)) & set(asked(more))


def test_an_answer_that_is_cut_says_so(chat):
    rows = written(chat, count=6, max_answer_tokens=3)
    assert all(row["truncated"] is True for row in rows)
    assert not any("truncated" in row for row in written(chat, count=6, answer_temps=(0.7,))
                   if row["messages"][1]["content"][-1] in "?.!")  # fmt: skip


def test_given_prompts_are_answered_once(chat):
    prompts = [Prompt([{"role": "system", "content": "Be kind."},
                       {"role": "user", "content": f"Name a {i}"}], "names")
               for i in range(6)]  # fmt: skip
    rows = written(chat, prompts=prompts)
    assert [row["messages"][:2] for row in sorted(rows, key=str)] == [p.messages for p in prompts]
    assert {(row["task"], row["source"]) for row in rows} == {("names", "given")}
    assert written(chat, prompts=prompts, earlier=rows) == []
    long = [Prompt([{"role": "user", "content": "a b c " * 40}], "given")]
    assert written(chat, prompts=long, max_seq_length=100) == []


def test_tasks_have_rows_of_their_own(chat, monkeypatch):
    seen = []
    monkeypatch.setattr(writer.UserTurn, "beginning", spy(writer.UserTurn.beginning, seen))
    tasks = {"cars": "The user asks for cars.", "trees": ["Name a tree", "Write a tree"]}
    rows = written(chat, count=8, tasks=tasks)
    assert {row["task"] for row in rows} == {"cars", "trees"}
    assert [{"role": "system", "content": "The user asks for cars."}] in seen
    assert any([message["role"] for message in earlier] == ["user", "user"] for earlier in seen)
    # What makes the model write a prompt is no part of the row.
    assert all(len(row["messages"]) == 2 for row in rows)


def spy(function, seen: list):
    def beginning(self, earlier):
        seen.append(earlier)
        return function(self, earlier)

    return beginning


def test_a_model_that_has_nothing_to_say_comes_to_an_end(tmp_path):
    silent = load(str(make_chat_model(tmp_path / "silent", silent=True)))
    with pytest.raises(IFPError, match=r"0 were of use \(refused: .* empty\)"):
        written(silent, count=5, batch_size=64)


@pytest.mark.parametrize(
    ("numbers", "flag"),
    [
        ({"temp": -1.0}, "--temp"),
        ({"answer_temps": (1.0, -0.1)}, "--temp"),
        ({"top_p": 0.0}, "top"),
    ],
)
def test_numbers_out_of_range_are_refused(chat, numbers, flag):
    with pytest.raises(IFPError, match=flag):
        written(chat, count=1, **numbers)


def test_texts_are_those_of_one_at_a_time(chat):
    model, tokenizer = chat
    prompts = [tokenizer.encode(text) for text in ("\n", "a\n", "What is the car?\n", "\n\n\n")]
    requests = [Request(prompt, 12, 0.0) for prompt in prompts]
    stops = set(tokenizer.eos_token_ids)
    together = sorted(sample_texts(model, requests, stops, top_p=1, batch_size=3),
                      key=lambda text: text.place)  # fmt: skip
    for request, text in zip(requests, together, strict=True):
        (alone,) = sample_texts(model, [request], stops, top_p=1, batch_size=1)
        assert (alone.tokens, alone.ended) == (text.tokens, text.ended)
        assert text.ended or len(text.tokens) == 12
