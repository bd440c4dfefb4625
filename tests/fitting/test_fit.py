"""mlx_ifp.fit as a user runs it, and the checkpoint that it makes."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_ifp
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.convert.command import run as run_convert
from mlx_ifp.convert.options import setup_arg_parser as convert_parser
from mlx_ifp.dense_pass import layers
from mlx_ifp.errors import IFPError
from mlx_ifp.selection.ranks import ranks

from ..conftest import make_dense, make_predictor_checkpoint, run_command
from .conftest import fit

QUESTION = [{"role": "user", "content": "What is the car, and the tree?"}]


def run_dense(model, tokens):
    """The whole model's final states [n, d], and shares of squared activations [L, n, d_ffn]."""
    dense, inputs = model.dense(), []
    for layer in dense.layers:

        class Recorded(type(layer.mlp.down_proj)):
            def __call__(self, z):
                inputs.append(np.array(z[0]))
                return super().__call__(z)

        layer.mlp.down_proj.__class__ = Recorded
    hidden = np.array(dense.model(mx.array([tokens])))[0]
    squares = np.stack(inputs) ** 2
    return hidden, squares / squares.sum(axis=-1, keepdims=True)


def predicted(model, hidden):
    """What the head says of a state [d]: [L, d_ffn]."""
    head = mx.load(str(model.checkpoint.path / "predictor" / "head.safetensors"))
    head = {name: np.array(array.astype(mx.float32)) for name, array in head.items()}
    x = head["linear1.weight"] @ hidden + head["linear1.bias"]
    return (head["linear2.weight"] @ x + head["linear2.bias"]).reshape(2, 128)


def by_hand(model, tokens):
    """Scores from the whole model's hidden state and its recorded activations."""
    hidden, shares = run_dense(model, tokens)
    own = np.sqrt(shares.sum(axis=1))
    return 0.3 * ranks(own) + 0.7 * ranks(predicted(model, hidden[-1]))


def test_scores_are_those_of_the_dense_model_by_hand(fitted):
    model, tokenizer = mlx_ifp.load(fitted, cache=False)
    assert model.selector == "predictor"
    tokens = list(tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True))
    scores = np.array(model.scores(QUESTION[0]["content"]))
    np.testing.assert_allclose(scores, by_hand(model, tokens), atol=2e-2)
    # Numbers that are nearly equal may change places; nearly all have the same rank.
    assert (np.abs(scores - by_hand(model, tokens)) < 1e-5).mean() > 0.95


def test_a_task_from_examples_has_a_part_of_what_is_predicted_for_their_prompts(fitted):
    model, tokenizer = mlx_ifp.load(fitted, cache=False)
    expected = []
    rows = [
        {"prompt": "The car?", "completion": "The car is near a tree."},
        {"prompt": "The tree, and the house?", "completion": "The tree is old."},
    ]
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True))
        answer = tokenizer.encode(row["completion"], add_special_tokens=False)
        hidden, shares = run_dense(model, prompt + answer)
        parts = (
            np.sqrt(shares[:, len(prompt) :].sum(axis=1)),
            predicted(model, hidden[len(prompt) - 1]),
        )
        measured, guess = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in parts)
        expected.append(0.7 * measured + 0.3 * guess)
    found = model.score_examples(rows)
    np.testing.assert_allclose(found.scores, np.mean(expected, axis=0), atol=1e-5)


def test_a_first_prompt_is_one_pass_of_the_dense_model(fitted, monkeypatch):
    model, tokenizer = mlx_ifp.load(fitted, cache=False)
    read, tokens = [], []
    run_layers = layers.run_layers

    def counted(parent, pieces, *args, **kwargs):
        result = run_layers(parent, pieces, *args, **kwargs)
        read.append(result.ffns_read)
        tokens.append(sum(piece.tokens.size for piece in pieces))
        return result

    monkeypatch.setattr("mlx_ifp.dense_pass.prefill.run_layers", counted)
    mlx_ifp.generate(model, tokenizer, QUESTION, max_tokens=3)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert (read, tokens) == ([2], [len(prompt)])


def test_the_copy_shares_the_files_of_the_checkpoint(fitted, fittable):
    for name in ("model.safetensors", "channels.safetensors"):
        assert (fitted / name).samefile(fittable / name)
    assert not (fitted / "config.json").samefile(fittable / "config.json")
    checkpoint = open_checkpoint(fitted)
    assert checkpoint.fitted and checkpoint.ifp.blend == 0.3
    assert checkpoint.ifp.prefill_with("predictor") == "dense"
    assert 20 <= checkpoint.ifp.source["fit"]["examples"] <= 24
    assert checkpoint.ifp.head.widths == [384, 4, 256]


def test_the_same_statistics_serve_another_fit(fitted, fittable, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_ifp.fitting.collect.run_layers", None)
    monkeypatch.setattr("mlx_ifp.fitting.data.Synthesis.answer", lambda *_: None)
    fit("--model", fittable, "--mlx-path", tmp_path / "other", "--data", data, "--max-tokens", 12,
        "--rank", 2, "--statistics-path", fitted.with_name("statistics"))  # fmt: skip
    assert open_checkpoint(tmp_path / "other").ifp.head.widths == [384, 2, 256]


def test_the_model_writes_its_own_examples_in_a_subprocess(fittable, tmp_path):
    path = tmp_path / "out"
    command = ("fit", "--model", fittable, "--mlx-path", path, "--examples", 20, "--max-tokens", 8)
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    assert f"{path}: 20 examples, rank" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    again = run_command(*command)
    assert again.returncode == 1 and "already exists" in again.stderr
    answer = run_command("generate", "--model", path, "--prompt", "Name one car!", "-m", 4)
    assert answer.returncode == 0, answer.stderr


def test_a_quantized_copy_keeps_the_head(fitted, tmp_path):
    path = convert(str(fitted), tmp_path / "4bit", quantize_weights=True, q_group_size=32)
    assert open_checkpoint(path).fitted
    model, tokenizer = mlx_ifp.load(path, cache=False)
    assert mlx_ifp.generate(model, tokenizer, QUESTION, max_tokens=3) is not None
    with pytest.raises(IFPError, match="--head-q-bits"):
        convert(str(fitted), tmp_path / "head", head_q_bits=8)


def test_the_head_must_fit_the_llm(fitted, tmp_path):
    config = json.loads((fitted / "ifp_config.json").read_text())
    config["head"]["widths"][0] = 100
    for file in fitted.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "predictor").mkdir()
    head = "predictor/head.safetensors"
    (tmp_path / head).write_bytes((fitted / head).read_bytes())
    (tmp_path / "ifp_config.json").write_text(json.dumps(config))
    with pytest.raises(IFPError, match="the head reads 100 values, but"):
        open_checkpoint(tmp_path)


def test_bad_input_is_one_line(fittable, fitted, data, tmp_path):
    out = tmp_path / "out"

    def error(model, *args):
        with pytest.raises(IFPError) as raised:
            fit("--model", model, "--mlx-path", out, *args)
        assert not out.exists()
        return str(raised.value)

    assert "16 or more" in error(fittable, "--examples", 3)
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "One?", "completion": "The car is near a tree."}\n')
    assert "too few" in error(fittable, "--data", few)
    trained, _ = make_predictor_checkpoint(tmp_path / "trained")
    assert "trained together" in error(trained)
    plain = make_dense(tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    assert "no chat template" in error(convert(str(plain), tmp_path / "plain-ifp"))
    statistics = fitted.with_name("statistics")
    other = ("--data", data, "--max-tokens", 5, "--statistics-path", statistics)
    assert "other examples" in error(fittable, *other)


def test_one_threshold_over_all_layers_takes_prompt_and_prediction(fitted):
    model, _ = mlx_ifp.load(fitted, cache=False, keep_by_layer=True)
    assert sum(model.select(QUESTION[0]["content"]).ks) == 2 * 64


def test_conversion_recommends_it(chat_model, tmp_path, capsys):
    options = ("--model", chat_model, "--mlx-path", tmp_path / "ifp", "--no-prior")
    run_convert(convert_parser().parse_args([str(option) for option in options]))
    assert f"mlx_ifp.fit --model {tmp_path / 'ifp'}" in capsys.readouterr().err
