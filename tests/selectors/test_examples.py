"""A task from examples, and glass, which blends the prompt with a prior."""

import importlib
import json
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate as lm_generate

from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.dense_pass.statistics import down_norms, text_statistics
from mlx_ifp.llm.prompt import template_tokens
from mlx_ifp.selection.by_layer import ks_by_layer
from mlx_ifp.selection.files import load_selection
from mlx_ifp.selectors.answers import write_answers
from mlx_ifp.synthesis.sampling import safe_batch_size

from ..conftest import make_dense, run_command

QUESTIONS = ["What is a file?", "Name one token or path!", "The tree is near a car."]
ANSWERS = ["It is a path.", "token", "The car is near a tree, and the tree is near a car."]
ROWS = [
    {"prompt": question, "completion": answer}
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of 256 channels a layer, k = 128, with static scores."""
    folder = tmp_path_factory.mktemp("examples")
    dense = make_dense(folder / "dense", intermediate_size=256, max_position_embeddings=256)
    (folder / "prompts.txt").write_text("Name three rivers.\nAdd two numbers.\n")
    return convert(str(dense), folder / "ifp", keep=128, static_prompts=folder / "prompts.txt")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint, cache=False)[0]


def tokens_of(tokenizer, question, answer):
    """A prompt and its answer as a conversation's tokens, without the end of the turn."""
    prompt = template_tokens(tokenizer, [{"role": "user", "content": question}])
    return prompt, prompt + tokenizer.encode(answer, add_special_tokens=False)


def test_scores_are_the_mean_statistic_of_answers(model):
    found = model.score_examples(ROWS)
    assert (found.examples, found.written) == (3, 0)
    assert found.ffns_read == len(model.parent.ffns)
    rows, lengths = [], []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        prompt, tokens = tokens_of(model.tokenizer, question, answer)
        span = (len(prompt), len(tokens))
        values = text_statistics(model.parent, [tokens], [span]).values[0]
        rows.append(values / np.linalg.norm(values, axis=-1, keepdims=True))
        lengths.append(len(tokens) - len(prompt))
    assert found.lengths == lengths
    assert np.allclose(found.scores, np.mean(rows, axis=0), rtol=1e-5, atol=1e-7)
    as_chat = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    assert model.select(examples=as_chat).digest == model.select(examples=found).digest
    assert model.select(examples=found, keep=64).ks == [64] * 3


def test_the_dense_model_writes_answers_that_are_missing(model):
    prompts = [tokens_of(model.tokenizer, question, "")[0] for question in QUESTIONS]
    stops = set(model.tokenizer.eos_token_ids)
    dense = model.dense()
    expected = [
        model.tokenizer.encode(
            lm_generate(dense, model.tokenizer, prompt, max_tokens=6), add_special_tokens=False
        )
        for prompt in prompts
    ]
    in_memory = write_answers(model.parent, prompts, stops, 6, network=dense)
    read = model.reader.bytes_read
    streamed = write_answers(model.parent, prompts, stops, 6)
    assert in_memory == streamed
    # Text that is encoded again may have other tokens, so texts are compared.
    assert [model.tokenizer.decode(each) for each in streamed] == [
        model.tokenizer.decode(each) for each in expected
    ]
    # Each token of all answers reads the FFNs once.
    assert model.reader.bytes_read - read == max(map(len, streamed)) * model.reader.nbytes
    found = model.score_examples([{"prompt": q} for q in QUESTIONS], max_tokens=6)
    given = model.score_examples([
        {"prompt": q, "completion": model.tokenizer.decode(each)}
        for q, each in zip(QUESTIONS, streamed, strict=True)
    ])  # fmt: skip
    assert found.written == 3
    assert found.lengths == [len(each) for each in streamed]
    if given.lengths == found.lengths:
        assert np.allclose(given.scores, found.scores, rtol=1e-5, atol=1e-7)


def test_a_model_that_mlx_lm_cannot_batch_writes_answers_too(tmp_path):
    dense = make_dense(tmp_path / "dense", "gemma2")
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    network, prompts = model.dense(), [[5, 77, 130, 9], [42, 200]]
    # mlx-lm's Gemma 2 fails on two texts at once.
    assert safe_batch_size(network, prompts[0], 8) == 1
    in_memory = write_answers(model.parent, prompts, set(), 3, network=network)
    assert in_memory == write_answers(model.parent, prompts, set(), 3)


def test_under_a_memory_limit_answers_are_streamed(checkpoint, model):
    limited, _ = load(checkpoint, cache=False, memory_limit=64 << 20)
    rows = [{"prompt": question} for question in QUESTIONS]
    found = limited.score_examples(rows, max_tokens=3)
    assert limited.networks.nbytes == 0
    assert np.allclose(found.scores, model.score_examples(rows, max_tokens=3).scores, rtol=1e-5)


def test_glass_is_ranks_of_prompt_and_prior(checkpoint, model):
    text = "Name three rivers."
    prompt = np.array(model.scores(text, selector="activations"))
    prior = np.array(model.scores(text, selector="static"))

    def rank(scores):
        return scores.argsort(axis=-1).argsort(axis=-1)

    for blend in (0.5, 0.2):
        own, _ = load(checkpoint, cache=False, selector="glass", blend=blend)
        expected = blend * rank(prompt) + (1 - blend) * rank(prior)
        scores = np.array(own.scores(text)) * 256 - 1
        assert np.allclose(scores, expected, atol=1e-3)
        kept = own.select(text).layers
        for layer, row in zip(kept, expected, strict=True):
            assert row[layer].min() >= np.delete(row, layer).max()
    task = model.score_examples(ROWS).scores
    blended = model.scores(text, selector="glass", prior=task)
    assert np.allclose(np.array(blended) * 256 - 1, (rank(prompt) + rank(task)) / 2, atol=1e-3)
    # Selections with one prior and with another one are remembered apart.
    assert (
        model.select(text, selector="glass").digest
        != model.select(text, selector="glass", prior=task).digest
    )
    response = next(
        stream_generate(model, model.tokenizer, text, selector="glass", prior=task, max_tokens=1)
    )
    assert response.text is not None


def test_glass_needs_a_prior(tiny_checkpoint, model):
    plain, _ = load(tiny_checkpoint, cache=False)
    with pytest.raises(IFPError, match=r"no prior.*convert it with --prior"):
        plain.select("Hello", selector="glass")
    prior = np.ones((3, 160), np.float32)
    assert plain.select("Hello", selector="glass", prior=prior).ks == [64] * 3
    with pytest.raises(IFPError, match=r"prior must be finite scores of the shape \(3, 160\)"):
        plain.select("Hello", selector="glass", prior=prior[:2])


def test_a_checkpoint_may_say_how_it_selects(checkpoint, tmp_path):
    values = json.loads((checkpoint / CONFIG_FILE).read_text())
    own = tmp_path / "ifp"
    own.mkdir()
    for file in checkpoint.iterdir():
        (own / file.name).symlink_to(file)
    (own / CONFIG_FILE).unlink()
    values |= {"selector": "glass", "blend": 0.25, "keep_by_layer": True}
    (own / CONFIG_FILE).write_text(json.dumps(values))
    opened = open_checkpoint(own)
    assert opened.selectors == ["activations", "static", "glass"]
    model, _ = load(own, cache=False)
    assert model.selector == "glass"
    scoring = model.text_selector.scoring
    assert (scoring.statistic, scoring.blend, scoring.by_layer) == ("griffin", 0.25, True)
    given = load(own, cache=False, blend=0.75, keep_by_layer=False, statistic="probe")[0]
    scoring = given.text_selector.scoring
    assert (scoring.statistic, scoring.blend, scoring.by_layer) == ("probe", 0.75, False)
    values["blend"] = 2
    (own / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(IFPError, match="blend must be from 0 to 1"):
        load(own)


@pytest.mark.parametrize("statistic", ["griffin", "norm"])
def test_k_by_layer_compares_what_channels_add(checkpoint, statistic):
    model, _ = load(checkpoint, cache=False, keep_by_layer=True, statistic=statistic)
    text = "Name three rivers."
    selection = model.select(text, selector="activations")
    scores = np.array(model.scores(text, selector="activations"))
    # The statistic norm has the norm of the down projection's column already.
    norms = down_norms(model.reader, model.parent.ffns, model.parent.config)
    factor = np.array(norms) if statistic == "griffin" else 1.0
    assert selection.ks == ks_by_layer(scores * factor, 128)
    assert sum(selection.ks) == 3 * 128
    for layer, row in zip(selection.layers, scores, strict=True):
        assert row[layer].min() >= np.delete(row, layer).max(initial=-np.inf)
    mx.eval(model.subnetwork(selection)(mx.array([[5, 6, 7]])))
    # glass compares layers by what its two parts add, as ranks are the same in every layer.
    stored = np.array(model.scores(text, selector="static"))
    parts = (scores * factor, stored * np.array(norms))
    sizes = sum((p - p.mean(1, keepdims=True)) / p.std(1, keepdims=True) for p in parts)
    assert model.select(text, selector="glass").ks == ks_by_layer(sizes, 128)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "There are no examples; give 8 to 64."),
        ([{"text": "a"}], "Example 1: a row has messages, or prompt and completion."),
        ([*ROWS, {"prompt": "a", "completion": " "}], "Example 4: the answer is empty."),
        ([{"prompt": "a " * 400}], r"Example 1: 4\d\d tokens, but this model reads at most 256"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}],
         "Example 1: there is nothing before the answer."),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used(model, rows, words):
    with pytest.raises(IFPError, match=words):
        model.score_examples(rows)


def test_examples_without_a_chat_template(tmp_path):
    dense = make_dense(tmp_path / "dense")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        path = dense / file
        if path.suffix == ".json":
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items()
                                        if k != "chat_template"}))  # fmt: skip
        else:
            path.unlink(missing_ok=True)
    model, tokenizer = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    with pytest.raises(IFPError, match=r"Example 1: there is no answer.*give a completion"):
        model.score_examples([{"prompt": "a"}])
    with pytest.raises(IFPError, match=r"Example 1: .*no chat template; give prompt and"):
        model.score_examples([{"messages": [{"role": "user", "content": "a"}]}])
    found = model.score_examples([{"prompt": "the ", "completion": "path"}])
    tokens = tokenizer.encode("the ")
    whole = tokens + tokenizer.encode("path", add_special_tokens=False)
    values = text_statistics(model.parent, [whole], [(len(tokens), len(whole))]).values[0]
    values = values / np.linalg.norm(values, axis=-1, keepdims=True)
    assert np.allclose(found.scores, values, rtol=1e-5)


def test_few_and_short_examples_are_noted(model):
    (row,) = [row for row in ROWS if row["completion"] == "token"]
    found = model.score_examples([row])
    assert found.notes[0] == "1 example says little about a task; 8 to 64 are better."
    assert (max(found.lengths) == 1) == (len(found.notes) == 2)


def test_the_command_keeps_scores_for_another_k(checkpoint, tmp_path, monkeypatch, capsys):
    def run(command, *args, ok=True, err=False):
        module = importlib.import_module(f"mlx_ifp.commands.{command}")
        argv = [command, *map(str, args), "--model", str(checkpoint)]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert (not code) == ok, said.err
        return said.err if err or not ok else said.out

    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    # One run is in a process of its own, as users have it.
    done = run_command("tasks", "add", "short", "--examples", file, "--task",
                       "Answer in a sentence.", "--model", checkpoint)  # fmt: skip
    assert "[INFO] 3 examples say little about a task; 8 to 64 are better." in done.stderr
    model, _ = load(checkpoint, cache=False)
    task = model.tasks.load("short")
    found = model.score_examples(ROWS)
    assert (task.text, task.selector) == ("Answer in a sentence.", "examples")
    assert np.array_equal(task.scores, found.scores)
    assert task.selection.digest == model.select(examples=found).digest

    # Another k comes from the stored scores, and equals a fresh one.
    saved = tmp_path / "selection.safetensors"
    flags = ["-m", 1, "--prompt", "What is a car?", "--task-name", "short"]
    run("generate", *flags, "--keep", 64, "--save-selection", saved)
    assert "narrow: k = 64" in run("tasks", "add", "narrow", "--examples", file, "--keep", 64)
    assert load_selection(saved).digest == model.tasks.load("narrow").selection.digest
    by_layer, _ = load(checkpoint, cache=False, keep_by_layer=True)
    run("generate", *flags, "--keep-by-layer", "--save-selection", saved)
    assert load_selection(saved).digest == by_layer.select(examples=ROWS).digest
    # Its channels were chosen for answers, so they should not read the prompt.
    told = "task 'short' were chosen for answers only, and here they read the prompt"
    assert told not in run("generate", *flags, err=True)
    assert told in run("generate", *flags, "--prefill", "pruned", err=True)
    # glass blends the task with the prompt.
    how = ("--selector", "glass", "--prefill", "pruned", "--save-selection", saved)
    assert told not in run("generate", *flags, *how, err=True)
    expected = model.select("What is a car?", selector="glass", prior=task.scores)
    assert load_selection(saved).digest == expected.digest

    run("tasks", "add", "text", "--task", "Answer.")
    refused = run("generate", "--prompt", "a", "--task-name", "text", "--keep", 64, ok=False)
    assert re.search(r"'text' was not made from examples.*tasks add --examples", refused)
    refused = run("tasks", "add", "nothing", ok=False)
    assert "Name what selects: --task, --task-file or --examples." in refused
    file.write_text('{"prompt": "a", "completion": ""}\n')
    refused = run("tasks", "add", "empty", "--examples", file, ok=False)
    assert f"{file}: line 1: the answer is empty." in refused
