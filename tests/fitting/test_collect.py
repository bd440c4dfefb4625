"""What the dense LLM computes on examples is what the whole model computes, example by example."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_ifp
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError
from mlx_ifp.fitting.collect import Statistics, collect
from mlx_ifp.fitting.examples import Example, make_examples, read_rows

from ..conftest import make_dense

EXAMPLES = [
    Example([5, 77, 130, 9, 42, 200, 301, 17], 5),
    Example([23, 23, 8, 11, 12, 13, 14, 99, 98, 97, 96, 95, 33], 9),
    Example([7, 8, 9, 10], 2),
]


def load(path, architecture="llama"):
    dense = make_dense(path / "dense", architecture)
    return mlx_ifp.load(convert(str(dense), path / "ifp"), cache=False)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("collect"))


def new(model, directory, examples=EXAMPLES, digest="model"):
    checkpoint = model.checkpoint
    shape = (len(checkpoint.ffns), checkpoint.d_ffn, 64)
    return Statistics(directory, digest, examples, *shape, prompts=True)


def by_hand(model, example):
    """Hidden state and both statistics from the whole model, whose FFNs are recorded."""
    dense, inputs = model.dense(), []
    for layer in dense.layers:
        down = layer.mlp.down_proj

        class Recorded(type(down)):
            def __call__(self, z):
                inputs.append(np.array(z[0]))
                return super().__call__(z)

        down.__class__ = Recorded
    hidden = np.array(dense.model(mx.array([example.tokens])))
    squares = np.stack(inputs) ** 2
    shares = squares / squares.sum(axis=-1, keepdims=True)
    prompt, answer = shares[:, : example.offset], shares[:, example.offset : -1]
    means = [np.sqrt(part.mean(axis=1)).ravel() for part in (prompt, answer)]
    return hidden[0, example.offset - 1], *means


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
def test_it_equals_the_whole_model(architecture, tmp_path):
    model = load(tmp_path, architecture)
    statistics = new(model, tmp_path / "statistics")
    assert collect(model.parent, statistics) == sum(len(each.tokens) for each in EXAMPLES)
    for i, example in enumerate(EXAMPLES):
        hidden, prompt, answer = by_hand(model, example)
        np.testing.assert_allclose(statistics.hidden[i], hidden, atol=5e-5)
        # They are stored in half precision.
        np.testing.assert_allclose(statistics.prompts[i], prompt, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(statistics.answers[i], answer, rtol=2e-3, atol=1e-6)


def test_a_stopped_run_goes_on_with_what_is_missing(model, tmp_path):
    statistics = new(model, tmp_path)
    rows = np.ones((1, *statistics._shape), np.float32)
    statistics.put([1], np.ones((1, 64), np.float32), rows, rows)
    again = new(model, tmp_path)
    assert again.missing == [0, 2]
    assert collect(model.parent, again) == len(EXAMPLES[0].tokens) + len(EXAMPLES[2].tokens)
    assert not again.missing and collect(model.parent, again) == 0
    assert (again.answers[1] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"digest": "other"}, "another model"), ({"examples": EXAMPLES[:2]}, "other examples")],
)
def test_statistics_of_something_else_are_refused(model, tmp_path, change, message):
    new(model, tmp_path)
    with pytest.raises(IFPError, match=message):
        new(model, tmp_path, **change)


def test_a_damaged_array_is_refused(model, tmp_path):
    new(model, tmp_path)
    np.save(tmp_path / "answers.npy", np.zeros(3))
    with pytest.raises(IFPError, match=r"answers\.npy is damaged"):
        new(model, tmp_path)


def test_rows_are_read_up_to_the_first_answer(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(
        '{"prompt": "One?", "completion": "1"}\n'
        '{"prompt": "Two?"}\n'
        '{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": '
        '"Three?"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Four?"}]}\n'
    )
    rows = read_rows(tmp_path)
    assert [row.answer and row.answer["content"] for row in rows] == ["1", None, "3"]
    assert [len(row.messages) for row in rows] == [1, 1, 2]
    assert rows[2].place == f"{file}: line 3"


def test_examples_are_cut_and_useless_ones_left_out(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    long = "word " * 60
    file.write_text(
        '{"prompt": "One?", "completion": "The car is near a tree."}\n'
        f'{{"prompt": "{long}", "completion": "The car is near a tree."}}\n'
    )
    tokenizer = model.tokenizer
    limits = {"max_answer_tokens": 3, "max_seq_length": 60}
    examples, left_out = make_examples(tokenizer, read_rows(file), **limits)
    assert left_out == 1 and len(examples) == 1
    example = examples[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "One?"}], add_generation_prompt=True
    )
    assert example.tokens[: example.offset] == list(prompt)
    assert len(example.tokens) == example.offset + 3


def test_an_example_ends_with_the_token_that_ends_its_answer(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "One?", "completion": "A car."}\n')
    own = copy.deepcopy(model.tokenizer._tokenizer)
    # As most templates do, this one puts a line break after the token that ends an answer.
    own.chat_template = "{% for message in messages %}{{ message.content }}<|im_end|>\n{% endfor %}"
    end = own.convert_tokens_to_ids("<|im_end|>")
    tokenizer = TokenizerWrapper(own, eos_token_ids=[end])
    limits = {"max_answer_tokens": 40, "max_seq_length": 60}
    example = make_examples(tokenizer, read_rows(file), **limits)[0][0]
    answer = example.tokens[example.offset :]
    assert answer.index(end) == len(answer) - 1
