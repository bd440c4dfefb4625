"""Training data: which rows are taken, what selects, what counts, and which batch comes when."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import processors

from mlx_ifp.checkpoint.config import TextConfig
from mlx_ifp.convert.sources.gguf import load_gguf
from mlx_ifp.errors import IFPError
from mlx_ifp.tuner.batches import Batches, make_batch
from mlx_ifp.tuner.data import Example, load_examples

TEXT = TextConfig()
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
COMPLETION = {"prompt": "Name a river.", "completion": "The Nile."}
CHAT = {
    "messages": [
        {"role": "system", "content": "You know geography."},
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "Another one?"},
        {"role": "assistant", "content": "The Rhine."},
    ]
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN)


@pytest.fixture
def load(tokenizer, tmp_path):
    """load_examples of rows (or of a file's text), with one tokenizer for both."""

    def load(train, valid=None, test=None, text=TEXT, selector=tokenizer, **kwargs):
        for name, rows in (("train", train), ("valid", valid), ("test", test)):
            if rows is not None:
                content = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
                (tmp_path / f"{name}.jsonl").write_text(content)
        return load_examples(str(tmp_path), tokenizer, selector, text, **kwargs)

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The one line that rows are refused with, without the directory."""

    def refused(*args, **kwargs):
        with pytest.raises(IFPError) as error:
            load(*args, **kwargs)
        message = str(error.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return refused


def text_of(n: int) -> str:
    return " ".join(str(i) for i in range(n))


def chunks_of(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


# Supervised fine-tuning


def test_the_prompt_of_a_completion_selects(load, tokenizer):
    (example,) = load([COMPLETION])["train"]
    assert example.selecting == tokenizer.encode("Name a river.")


def test_the_loss_of_a_completion_starts_with_the_answer(load, tokenizer):
    (example,) = load([COMPLETION])["train"]
    assert tokenizer.decode(example.tokens[example.offset :]) == "The Nile."


def test_the_first_user_message_of_a_chat_selects(load, tokenizer):
    (example,) = load([CHAT])["train"]
    assert example.selecting == tokenizer.encode("Name a river.")


def test_the_last_answer_of_a_chat_is_predicted(load, tokenizer):
    (example,) = load([CHAT])["train"]
    assert tokenizer.decode(example.tokens[example.offset :]) == "The Rhine."


@pytest.mark.parametrize("row", [CHAT, COMPLETION], ids=["chat", "completion"])
def test_the_end_of_an_answer_that_was_cut_is_not_predicted(tmp_path, row):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = load_tokenizer(GOLDEN, {"chat_template": template})
    rows = (row, row | {"truncated": True}, row | {"truncated": False})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole, cut, same = load_examples(str(tmp_path), tokenizer, tokenizer, TEXT)["train"]
    assert whole == same
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert tokenizer.decode(whole.tokens[len(cut.tokens) :]) == "<|im_end|>\n"
    assert (cut.offset, cut.selecting) == (whole.offset, whole.selecting)


def test_whether_an_answer_was_cut_is_true_or_false(refused):
    assert "truncated must be true or false" in refused([COMPLETION | {"truncated": "yes"}])


def test_the_system_message_selects_if_the_checkpoint_says_so(load, tokenizer):
    (example,) = load([CHAT], text=TextConfig(source="system"))["train"]
    assert example.selecting == tokenizer.encode("You know geography.")


def test_a_completion_has_no_system_message_to_select_by(refused):
    line = refused([COMPLETION], text=TextConfig(source="system"))
    assert line.startswith("train.jsonl: line 1: There is no system message")


def test_the_selecting_text_goes_through_the_chat_template_if_the_checkpoint_says_so(
    load, tokenizer
):
    (example,) = load([COMPLETION], text=TextConfig(format="chat_template"))["train"]
    message = [{"role": "user", "content": "Name a river."}]
    assert example.selecting == tokenizer.apply_chat_template(message, add_generation_prompt=True)


def test_a_task_description_selects_for_all_of_its_rows(load, tokenizer):
    rows = [COMPLETION | {"task": "rivers"}, COMPLETION | {"task": "towns"}]
    texts = {"rivers": "You know rivers.", "towns": "You know towns."}
    selecting = [e.selecting for e in load(rows, task_texts=texts)["train"]]
    assert selecting == [tokenizer.encode(text) for text in texts.values()]


def test_a_task_without_a_description_is_named(refused):
    rows = [COMPLETION | {"task": "rivers"}, COMPLETION | {"task": "towns"}]
    line = refused(rows, task_texts={"rivers": "You know rivers."})
    assert line == "train.jsonl: line 2: the task 'towns' has no description."


def test_a_row_without_a_task_is_named_if_descriptions_select(refused):
    line = refused([COMPLETION], task_texts={"rivers": "You know rivers."})
    assert line.startswith("train.jsonl: line 1: the row has no task")


def test_tasks_are_counted(load):
    rows = [COMPLETION | {"task": "a"}, COMPLETION, COMPLETION | {"task": "a"}]
    assert Counter(example.task for example in load(rows)["train"]) == {"a": 2, None: 1}


def test_splits_that_are_absent_are_empty(load):
    examples = load([COMPLETION] * 3, valid=[CHAT])
    assert {split: len(rows) for split, rows in examples.items()} == {
        "train": 3,
        "valid": 1,
        "test": 0,
    }


def test_a_long_row_is_refused_with_its_lengths(refused, load):
    (example,) = load([COMPLETION])["train"]
    length, answer = len(example.tokens), len(example.tokens) - example.offset
    line = refused([COMPLETION], max_seq_length=length - 1)
    assert line.startswith(f"train.jsonl: line 1: {length} tokens, {answer} of them the answer")
    assert "--max-seq-length" in line


def test_a_row_of_just_the_longest_length_is_taken(load):
    length = len(load([COMPLETION])["train"][0].tokens)
    assert len(load([COMPLETION], max_seq_length=length)["train"]) == 1


def test_a_selecting_text_that_is_too_long_is_refused(refused):
    rows = [COMPLETION, COMPLETION | {"prompt": text_of(50)}]
    line = refused(rows, text=TextConfig(max_tokens=40))
    assert line.startswith("train.jsonl: line 2: The text that selects has")


def test_the_real_template_and_its_offset(smollm2_gguf, tmp_path):
    real = TokenizerWrapper(load_gguf(smollm2_gguf).tokenizer)
    (tmp_path / "train.jsonl").write_text(json.dumps(CHAT))
    (example,) = load_examples(str(tmp_path), real, real, TEXT)["train"]
    assert real.decode(example.tokens[example.offset :]) == "The Rhine.<|im_end|>\n"
    assert real.decode(example.tokens[: example.offset]).endswith("<|im_start|>assistant\n")


# Continued pre-training


def test_each_chunk_selects_for_the_next(load, tokenizer):
    tokens = [*tokenizer.encode(text_of(60)), tokenizer.eos_token_id]
    chunks = chunks_of(tokens, 16)
    examples = load([{"text": text_of(60)}], stage="pretrain", chunk_size=16)["train"]
    assert [e.selecting for e in examples] == chunks[:-1]
    assert [e.tokens[e.offset :] for e in examples] == chunks[1:]


def test_a_chunk_sees_everything_before_it(load):
    examples = load([{"text": text_of(60)}], stage="pretrain", chunk_size=16)["train"]
    assert [e.offset for e in examples] == [16 * (k + 1) for k in range(len(examples))]


def test_the_first_chunks_go_if_a_text_is_too_long(load, tokenizer):
    tokens = [*tokenizer.encode(text_of(60)), tokenizer.eos_token_id]
    examples = load([{"text": text_of(60)}], stage="pretrain", chunk_size=16, max_seq_length=50)
    last = examples["train"][-1]
    end = len(tokens)
    start = next(i for i in range(0, end, 16) if end - i <= 50)
    assert start > 0
    assert last.tokens == tokens[start:]
    assert last.offset == (end - 1) // 16 * 16 - start


@pytest.mark.parametrize(("limit", "lengths"), [(48, [32, 48, 48]), (47, [32, 32, 32])])
def test_as_many_whole_chunks_stay_as_fit(load, limit, lengths):
    rows = [{"text": text_of(60)}]
    examples = load(rows, stage="pretrain", chunk_size=16, max_seq_length=limit)["train"]
    assert [len(e.tokens) for e in examples[:3]] == lengths


def test_a_chunk_of_one_token_is_predicted(load, tokenizer):
    length = len(tokenizer.encode(text_of(10))) + 1
    row = {"text": text_of(10)}
    (example,) = load([row], stage="pretrain", chunk_size=length - 1)["train"]
    assert len(example.tokens) - example.offset == 1


def test_texts_of_one_chunk_give_nothing(load):
    rows = [{"text": "short"}, {"text": ""}, {"text": " \n"}, {"text": text_of(20), "task": "long"}]
    examples = load(rows, stage="pretrain", chunk_size=32)["train"]
    assert Counter(example.task for example in examples) == {"long": 1}


def test_no_text_of_two_chunks(refused):
    line = refused([{"text": "short"}], stage="pretrain")
    assert "no text of train is longer than one chunk of 256 tokens" in line


def test_chats_and_completions_are_texts_too(load, tokenizer):
    for row in (CHAT, COMPLETION):
        (example, *_) = load([row], stage="pretrain", chunk_size=8)["train"]
        assert tokenizer.decode(example.selecting).startswith("<|im_start|>")


def test_another_tokenizer_reads_the_chunk_without_special_tokens(load, tokenizer):
    other = load_tokenizer(GOLDEN)
    start = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    other._tokenizer.backend_tokenizer.post_processor = start
    assert other.encode("x")[0] == 0
    (example, *_) = load([COMPLETION], stage="pretrain", chunk_size=16, selector=other)["train"]
    chunk = tokenizer.decode(example.tokens[: example.offset], skip_special_tokens=True)
    assert example.selecting == other.encode(chunk, add_special_tokens=False)
    assert example.selecting != example.tokens[: example.offset]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_seq_length": 511}, "does not hold two chunks"),
        ({"chunk_size": 0}, "--chunk-size must be 1 or more"),
        ({"text": TextConfig(max_tokens=255)}, "selectors take 255"),
        ({"task_texts": {"a": "b"}}, "chunks select"),
    ],
)
def test_options_that_do_not_fit_chunks(refused, options, words):
    assert words in refused([{"text": text_of(2000)}], stage="pretrain", **options)


def test_an_unknown_stage(refused):
    assert refused([COMPLETION], stage="rl") == "stage must be one of pretrain, sft, not 'rl'."


# Bad rows


def messages(*roles: str, content: object = "x") -> dict:
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 1}", "not JSON that can be read (Expecting property name"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        (r'{"prompt": "x", "completion": "\ud800"}', "does not take this row"),
        ('["prompt"]', "must be a JSON object, not list"),
        ("{}", "unknown format, with the fields none"),
        ('{"question": "x", "answer": "y"}', "unknown format, with the fields answer, question"),
        ({"prompt": 3, "completion": "x"}, "prompt must be a string"),
        ({"prompt": "x", "completion": None}, "completion must be a string"),
        ({"prompt": "x", "completion": " "}, "the answer is empty"),
        ({"prompt": "", "completion": "x"}, "The text that selects is empty"),
        (COMPLETION | {"task": 3}, "task must be a string"),
        (CHAT, "the format is chat, but completions in the first row"),
    ],
)
def test_a_bad_line_is_named(refused, line, words):
    line = line if isinstance(line, str) else json.dumps(line)
    good = json.dumps(COMPLETION)
    message = refused(f"{good}\n{line}\n{good}\n")
    assert message.startswith("train.jsonl: line 2: ")
    assert words in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["hello"]}, "message 1 must be an object with role and content"),
        ({"messages": [{"content": "x"}]}, "message 1 must be an object with role and content"),
        (messages("user", "assistant", content=3), "the content of message 1 must be a string"),
        (messages("user", "assistant", content=["x"]), "part 1 of the content of message 1 must"),
        (messages("user", "assistant", content=[None]), "part 1 of the content of message 1 must"),
        (
            messages("user", "assistant", content=[{"type": "text", "text": None}]),
            "the text of part 1 of the content of message 1 must be a string",
        ),
        (messages("user", "user"), "the last message must be the assistant's, not of 'user'"),
        (messages("assistant"), "there is nothing before the last message"),
        (messages("system", "assistant"), "There is no user message to select by"),
        (
            {"messages": [*messages("user")["messages"], {"role": "assistant", "content": ""}]},
            "the answer is empty",
        ),
    ],
)
def test_bad_messages_are_named(refused, row, words):
    message = refused([CHAT, row])
    assert message.startswith("train.jsonl: line 2: ")
    assert words in message


def test_text_parts_are_read_as_one_string(load):
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river."}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}]}
        for content in (parts, "Name a river.")
    ]
    first, second = load(rows)["train"]
    assert first == second


def test_a_text_has_no_prompt_that_selects(refused):
    assert "use --stage pretrain" in refused([{"text": "hello"}])


def test_a_bad_line_of_another_split_is_named(refused):
    assert refused([COMPLETION], valid="{").startswith("valid.jsonl: line 1: not JSON")


def test_an_empty_file(refused):
    assert refused("").startswith("train.jsonl: the file is empty")


def test_blank_lines_are_no_rows(load, refused):
    good = json.dumps(COMPLETION)
    assert load(f"{good}\n\n{good}\n\n") == load([COMPLETION, COMPLETION])
    assert refused(f"{good}\n\n{{}}\n").startswith("train.jsonl: line 3: unknown format")


def test_no_train_file(refused):
    assert refused(None, valid=[COMPLETION]).startswith("train.jsonl is missing")


def test_a_model_without_a_chat_template(tmp_path):
    shutil.copytree(GOLDEN, tmp_path, ignore=lambda *_: ["chat_template.jinja"], dirs_exist_ok=True)
    bare = load_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(COMPLETION))
    with pytest.raises(IFPError, match="no chat template"):
        load_examples(str(tmp_path), bare, bare, TEXT)


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_instead_of_the_directory(tokenizer, tmp_path, exists):
    path = tmp_path / "train.jsonl"
    if exists:
        path.write_text(json.dumps(COMPLETION))
    with pytest.raises(IFPError, match="give the directory"):
        load_examples(str(path), tokenizer, tokenizer, TEXT)


# The hub


class FakeHub(ModuleType):
    """The package ``datasets``, as far as mlx-lm uses it."""

    def __init__(self, splits: dict | None) -> None:
        super().__init__("datasets")
        self.splits = splits
        self.exceptions = SimpleNamespace(DatasetNotFoundError=FileNotFoundError)

    def load_dataset(self, name: str) -> dict:
        if self.splits is None:
            raise FileNotFoundError("line one\nline two")
        return self.splits


@pytest.fixture
def load_hub(tokenizer, monkeypatch):
    def load_hub(parts, **kwargs):
        monkeypatch.setitem(sys.modules, "datasets", parts and FakeHub(parts))
        return load_examples("nobody/rivers", tokenizer, tokenizer, TEXT, **kwargs)

    return load_hub


def test_a_dataset_of_the_hub_is_read_as_a_file_is(load_hub, load):
    rows = [COMPLETION | {"task": "a"}, COMPLETION]
    every = ("train", "valid", "test")
    assert load_hub({"train": rows, "test": rows[:1]}, splits=every) == load(rows) | {
        "test": load(rows[:1])["train"]
    }


def test_a_test_set_is_only_read_if_it_is_asked_for(load, refused):
    assert load([COMPLETION], test="{")["test"] == []
    every = ("train", "valid", "test")
    assert refused([COMPLETION], test="{", splits=every).startswith("test.jsonl: line 1: not JSON")


def test_a_bad_row_of_the_hub_is_named(load_hub):
    with pytest.raises(IFPError, match=r"^nobody/rivers: train row 1: prompt must be"):
        load_hub({"train": [COMPLETION, COMPLETION | {"prompt": None}]})


def test_texts_of_the_hub_have_no_prompt_that_selects(load_hub):
    with pytest.raises(IFPError, match="use --stage pretrain"):
        load_hub({"train": [{"text": "hello"}]})


def test_a_dataset_without_the_split_train(load_hub):
    with pytest.raises(IFPError, match="no split named train"):
        load_hub({"validation": [COMPLETION]})


def test_the_package_datasets_is_missing(load_hub):
    with pytest.raises(IFPError, match=r"no such directory.*pip install datasets$"):
        load_hub(None)


def test_a_dataset_that_is_not_there(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(None))
    with pytest.raises(IFPError) as error:
        load_examples("nobody/nothing", tokenizer, tokenizer, TEXT)
    assert "nobody/nothing: neither a directory nor" in str(error.value)
    assert "\n" not in str(error.value)


# Batches


def example(length=5, offset=1, selecting=1, task=None) -> Example:
    return Example(list(range(1, length + 1)), offset, list(range(1, selecting + 1)), task)


def some(n: int, *, seed=0, task=None) -> list[Example]:
    lengths = np.random.default_rng(seed).integers(4, 400, n)
    return [example(int(length), task=task) for length in lengths]


def test_a_batch_is_padded_to_a_multiple_of_32():
    batch = make_batch([example(32, selecting=33), example(3, selecting=2)], [0, 1])
    assert batch.tokens.shape == (2, 32)
    assert batch.selecting.shape == (2, 64)
    assert batch.tokens[1].tolist() == [1, 2, 3] + [0] * 29
    assert batch.selecting_lengths.tolist() == [33, 2]


def test_the_masks_of_a_batch():
    batch = make_batch([example(5, offset=3)], [0])
    # Position 2 predicts token 3, the first that counts; position 3 the last one.
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == [2, 3]
    assert np.flatnonzero(batch.token_mask[0]).tolist() == [0, 1, 2, 3]
    assert batch.loss_mask.shape == batch.token_mask.shape == (1, 31)


def epoch_of(batches: Batches, epoch: int = 0) -> list[list[int]]:
    start = epoch * batches.steps_per_epoch
    return [batches.indices(step) for step in range(start, start + batches.steps_per_epoch)]


def test_an_epoch_sees_every_example():
    batches = Batches(some(101), 4)
    for epoch in range(3):
        assert {i for batch in epoch_of(batches, epoch) for i in batch} == set(range(101))


def test_all_batches_have_one_size():
    batches = Batches(some(10) + some(1, task="a") + some(3, task="b"), 4)
    assert {len(batch) for batch in epoch_of(batches)} == {4}
    assert batches.steps_per_epoch == 3 + 1 + 1


def test_a_batch_is_filled_with_other_examples():
    for seed in range(20):
        for batch in epoch_of(Batches(some(10), 4, seed=seed)):
            assert len(set(batch)) == 4


def test_a_task_smaller_than_a_batch_repeats_evenly():
    (batch,) = epoch_of(Batches(some(2, task="a"), 4))
    assert sorted(batch) == [0, 0, 1, 1]


def test_a_batch_holds_one_task():
    examples = some(30, task="a") + some(30, task="b") + some(30)
    for batch in epoch_of(Batches(examples, 4)):
        assert len({examples[i].task for i in batch}) == 1


def test_the_batch_of_a_step_does_not_depend_on_those_before():
    batches = Batches(some(50), 4, seed=3)
    steps = [batches.indices(step) for step in range(40)]
    assert [Batches(some(50), 4, seed=3).indices(step) for step in range(40)] == steps
    assert [batches.indices(step) for step in reversed(range(40))] == steps[::-1]


def test_each_epoch_and_seed_has_an_order_of_its_own():
    batches = Batches(some(50), 4)
    assert epoch_of(batches, 0) != epoch_of(batches, 1)
    assert epoch_of(batches) != epoch_of(Batches(some(50), 4, seed=1))


def test_examples_of_a_batch_are_of_similar_length():
    examples = some(320)
    lengths = [[len(examples[i].tokens) for i in batch] for batch in epoch_of(Batches(examples, 4))]
    # Random batches of four lengths between 4 and 400 spread over some 240 tokens.
    assert np.mean([max(batch) - min(batch) for batch in lengths]) < 60


def test_examples_meet_others_in_each_epoch():
    batches = Batches([example(length) for length in range(4, 324)], 4)
    first, second = ({frozenset(batch) for batch in epoch_of(batches, e)} for e in range(2))
    assert len(first & second) < 10


def test_batches_are_not_in_order_of_length():
    examples = some(32)
    longest = [max(len(examples[i].tokens) for i in b) for b in epoch_of(Batches(examples, 4))]
    assert longest != sorted(longest)


def test_ranks_share_the_batch_of_one_process():
    examples = some(30, task="a") + some(7)
    alone = Batches(examples, 4, seed=5)
    ranks = [Batches(examples, 4, seed=5, rank=r, world_size=2) for r in range(2)]
    for step in range(2 * alone.steps_per_epoch):
        shares = [rank.indices(step) for rank in ranks]
        assert [len(share) for share in shares] == [2, 2]
        assert sorted(shares[0] + shares[1]) == sorted(alone.indices(step))


def test_calling_makes_the_batch_of_the_step():
    batches = Batches(some(20), 4)
    batch = batches(3)
    assert batch.indices == batches.indices(3)
    assert batch.token_mask.sum(axis=1).tolist() == [
        len(batches.examples[i].tokens) - 1 for i in batch.indices
    ]


@pytest.mark.parametrize(
    ("examples", "size", "options", "words"),
    [
        ([], 4, {}, "no examples"),
        (some(4), 0, {}, "--batch-size 0"),
        (some(4), 3, {"world_size": 2}, "--batch-size 3 must be a positive multiple of the 2"),
        (some(4), 4, {"seed": -1}, "--seed"),
    ],
)
def test_batches_that_cannot_be(examples, size, options, words):
    with pytest.raises(IFPError, match=words):
        Batches(examples, size, **options)
