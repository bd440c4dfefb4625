"""Runs of the layout manifest whose head reads the LLM's own state, and who read the prompts."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import mlx_ifp
from mlx_ifp import IFPError
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.dense_pass import layers
from mlx_ifp.fitting.save import check_fittable
from mlx_ifp.selection.by_layer import ks_by_layer, standardised
from mlx_ifp.selection.masks import soft_topk, topk_mask
from mlx_ifp.selectors import own_state

from ..helpers import relative_error
from .trained import D_FFN, LAYERS, K, edit_json, head_tensors, save_own_state_run, save_run

MANIFEST = "ifpruning_config.json"
PREDICTOR = "predictor.safetensors"
QUESTION = [{"role": "user", "content": "What is the car, and the tree?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run, that no test changes."""
    return save_own_state_run(tmp_path_factory.mktemp("own-state") / "run")


@pytest.fixture(scope="module")
def converted(run):
    return convert(str(run), run.with_name("ifp"))


@pytest.fixture
def other(tmp_path):
    """One to change."""
    return save_own_state_run(tmp_path / "run")


def by_hand(run, tokens):
    """Scores [L, d_ffn] of what mlx-lm's model makes of a prompt."""
    network, _ = load_model(run.with_name(f"{run.name}-llm"))
    state = np.array(network.model(mx.array([tokens]))[0, -1], np.float64)
    state = (state - state.mean()) / np.sqrt(state.var() + 1e-5)
    head = {name: np.array(array) for name, array in head_tensors("manifest").items()}
    x = head["mlp.0.weight"] @ state + head["mlp.0.bias"]
    scores = head["mlp.2.weight"] @ np.where(x > 0, x, 0.1 * x)
    return mx.array(scores.reshape(LAYERS, D_FFN).astype(np.float32))


def prompt_of(tokenizer):
    return list(tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True))


def test_the_head_alone_selects_by_the_llms_own_state(run, converted):
    model, tokenizer = mlx_ifp.load(converted, cache=False)
    ifp = model.checkpoint.ifp
    assert (ifp.selector, ifp.predictor_backbone, ifp.predictor_embedding) == (
        "predictor", "llm", "own",
    )  # fmt: skip
    assert (ifp.blend, ifp.prefill, ifp.text.format) == (0, None, "chat_template")
    assert (ifp.head.activation, ifp.head.feature_norm) == ("leaky_relu", "layer_norm")
    assert ifp.prefill_with("predictor") == "dense"
    expected = by_hand(run, prompt_of(tokenizer))
    assert relative_error(model.scores(QUESTION[0]["content"]), expected) < 1e-5
    selection = model.select(QUESTION[0]["content"])
    assert (selection.mask == np.array(topk_mask(expected, K))).all() and selection.weights is None


def test_the_files_are_those_of_a_fitted_checkpoint(converted):
    names = [str(file.relative_to(converted)) for file in (converted / "predictor").rglob("*")]
    assert names == ["predictor/head.safetensors"]
    report = json.loads((converted / "source_tensors.json").read_text())
    assert report["mapped"]["head"]["mlp.2.weight"] == "linear2.weight"
    assert "backbone" not in report["mapped"]


def test_a_first_prompt_is_one_pass_that_measures_nothing(converted, monkeypatch):
    model, tokenizer = mlx_ifp.load(converted, cache=False)
    read, measured = [], []
    run_layers = layers.run_layers

    def counted(parent, pieces, measure=None, *args, **kwargs):
        result = run_layers(parent, pieces, measure, *args, **kwargs)
        read.append((result.ffns_read, sum(piece.tokens.size for piece in pieces)))
        measured.append(measure)
        return result

    monkeypatch.setattr("mlx_ifp.dense_pass.prefill.run_layers", counted)
    mlx_ifp.generate(model, tokenizer, QUESTION, max_tokens=3)
    assert (read, measured) == ([(LAYERS, len(prompt_of(tokenizer)))], [None])


def test_a_blend_takes_the_prompts_own_ranks_too(converted, monkeypatch):
    made, measure = [], own_state.measure_totals
    monkeypatch.setattr(
        own_state, "measure_totals", lambda name: made.append(name) or measure(name)
    )
    model, _ = mlx_ifp.load(converted, cache=False, blend=0.25)
    scores = model.scores(QUESTION[0]["content"])
    assert made == ["griffin"] and mx.min(scores) > 0 and mx.max(scores) <= 1


def test_soft_values_are_those_of_the_scores(tmp_path, other):
    edit_json(other / MANIFEST, keep_soft_values=True, mask_temperature=0.5)
    model, tokenizer = mlx_ifp.load(convert(str(other), tmp_path / "ifp"), cache=False)
    selection = model.select(QUESTION[0]["content"])
    soft = soft_topk(by_hand(other, prompt_of(tokenizer)), K, operator="sigmoid", temperature=0.5)
    expected = np.array(soft)[selection.mask].reshape(LAYERS, K)
    np.testing.assert_allclose(np.array(selection.weights), expected, atol=1e-4)


def test_one_threshold_over_all_layers_takes_the_scores_as_they_are(run, converted):
    """They are no statistic of activations, which the down projection would scale."""
    model, tokenizer = mlx_ifp.load(converted, cache=False, keep_by_layer=True)
    scores = np.array(by_hand(run, prompt_of(tokenizer)))
    assert model.select(QUESTION[0]["content"]).ks == ks_by_layer(standardised(scores), K)


def test_a_task_from_examples_has_no_part_of_a_trained_heads_scores(run, converted, tmp_path):
    rows = [{"prompt": "The car?", "completion": "The car is near a tree."}]
    dense = convert(str(run.with_name("run-llm")), tmp_path / "dense", keep=K)
    found = [
        mlx_ifp.load(path, cache=False)[0].score_examples(rows).scores
        for path in (converted, dense)
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("said", "text_format"),
    [("chat", "chat_template"), (None, "chat_template"), ("raw", "raw")],
)
def test_prompts_are_wrapped_as_in_training(tmp_path, other, said, text_format):
    edit_json(other / MANIFEST, chat_template_format=said)
    out = convert(str(other), tmp_path / "ifp")
    assert open_checkpoint(out).ifp.text.format == text_format
    out = convert(str(other), tmp_path / "raw", text_format="raw")
    assert open_checkpoint(out).ifp.text.format == "raw"


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("llm", "dense", None),
        ("llm", "pruned", "pruned"),
        ("llm", None, None),
        ("own", "dense", "dense"),
        ("own", "pruned", None),
        ("own", None, None),
        ("static", "dense", None),
        ("static", "pruned", "pruned"),
        ("static", None, None),
    ],
)
def test_prompts_are_read_as_in_training(tmp_path, kind, said, expected):
    run = tmp_path / "run"
    if kind == "llm":
        save_own_state_run(run)
    else:
        save_run(run, "manifest")
    values = {"predictor_model": None if kind == "llm" else "predictor_config"}
    if kind == "static":
        (run / PREDICTOR).unlink()
        mx.save_safetensors(str(run / "static.safetensors"), {"scores": mx.ones((LAYERS, D_FFN))})
        values["static_scores"] = True
    edit_json(run / MANIFEST, prefill=said, **values)
    ifp = open_checkpoint(convert(str(run), tmp_path / "ifp")).ifp
    assert ifp.prefill == expected
    if said is not None:
        assert ifp.prefill_with(ifp.selector) == said


def test_precisions(tmp_path, run, converted):
    """The LLM is quantized and the head is not, neither now nor later."""
    how = {"quantize_weights": True, "q_bits": 8, "q_group_size": 32}
    now = convert(str(run), tmp_path / "now", **how)
    later = convert(str(converted), tmp_path / "later", **how)
    stored = head_tensors("manifest")
    for path in (now, later):
        head = mx.load(str(path / "predictor" / "head.safetensors"))
        assert mx.array_equal(head["linear2.weight"], stored["mlp.2.weight"])
        assert len(head) == 3 and open_checkpoint(path).reads_own_state
        model, _ = mlx_ifp.load(path, cache=False)
        expected = by_hand(run, prompt_of(model.tokenizer))
        assert relative_error(model.scores(QUESTION[0]["content"]), expected) < 0.1
    for name in ("model", "channels"):
        one, other = (mx.load(str(path / f"{name}.safetensors")) for path in (now, later))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]) for key in one)
    half = convert(str(run), tmp_path / "half", predictor_dtype="float16")
    checkpoint = open_checkpoint(half)
    assert {tensor.dtype for tensor in checkpoint.head.values()} == {"F16"}
    assert {tensor.dtype for tensor in checkpoint.trunk.values()} == {"F32"}


@pytest.mark.parametrize(
    "given",
    [
        {"predictor_config": "any"},
        {"predictor_tokenizer": "any"},
        {"predictor_q_bits": 4},
        {"head_q_bits": 8},
    ],
)
def test_options_for_a_backbone_are_refused(tmp_path, run, given):
    flag = f"leave out --{next(iter(given)).replace('_', '-')}"
    with pytest.raises(IFPError, match=f"reads the LLM's own state.*{flag}"):
        convert(str(run), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [{"predictor_q_bits": 4}, {"head_q_bits": 8}, {"predictor_dtype": "float16"}]
)
def test_the_head_of_a_converted_one_stays_as_it_is(tmp_path, converted, given):
    with pytest.raises(IFPError, match="reads the LLM's own state"):
        convert(str(converted), tmp_path / "out", **given)


def test_the_user_is_told_that_training_saw_rounded_weights(tmp_path, other, capsys):
    rounded = {"bits": 4, "group_size": 32, "bits_of": {"down_proj": 5}}
    edit_json(other / MANIFEST, quantization=rounded)
    convert(str(other), tmp_path / "ifp")
    said = capsys.readouterr().err
    assert "Only -q --q-bits 4 --q-group-size 32 gives the weights" in said
    assert "(down_proj in 5), which no option gives" in said


def test_no_other_predictor_is_fitted_for_its_llm(converted):
    checkpoint = open_checkpoint(converted)
    assert checkpoint.reads_own_state and not checkpoint.fitted
    with pytest.raises(IFPError, match="trained together"):
        check_fittable(checkpoint)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"predictor_backbone": "LLM"}, "predictor_backbone must be one of own, llm, not 'LLM'"),
        ({"predictor_backbone": ["llm"]}, "predictor_backbone must be one of own, llm"),
        ({"prefill": "half"}, "prefill must be one of dense, pruned, not 'half'"),
        ({"chat_template_format": "any"}, "chat_template_format must be one of chat, raw"),
        ({"predictor_hidden_dim": 8}, "predictor_hidden_dim is 8, but"),
        ({"quantization": 4}, "quantization must have bits and group_size"),
        ({"quantization": {"bits": 4}}, "quantization must have bits and group_size"),
        ({"predictor_backbone": None}, r"extractor\.\* are missing; if the head reads the LLM's"),
    ],
)
def test_values_that_a_manifest_cannot_have(tmp_path, other, values, expected):
    edit_json(other / MANIFEST, **values)
    with pytest.raises(
        IFPError, match=rf"{MANIFEST}.*{expected}|{PREDICTOR}.*{expected}"
    ) as caught:
        convert(str(other), tmp_path / "ifp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("mlp.0.bias", None, r"the tensor mlp\.0\.bias is missing"),
        ("mlp.2.weight", None, r"the tensor mlp\.2\.weight is missing"),
        ("mlp.2.bias", mx.zeros(480), r"the tensor mlp\.2\.bias is left over"),
        ("mlp.0.weight", mx.zeros((16, 63)), "takes 63 values, but the LLM gives 64"),
        ("mlp.0.weight", mx.zeros(16), "must have two axes"),
        ("mlp.0.weight", mx.zeros(()), "two axes|predictor_hidden_dim is 16"),
        ("mlp.0.bias", mx.zeros(15), r"mlp\.0\.bias has the shape"),
        ("mlp.2.weight", mx.zeros((480, 15)), "takes 15 values"),
        ("mlp.2.weight", mx.zeros((479, 16)), "gives 479 scores, but 3 layers of 160"),
        ("mlp.0.bias", mx.zeros(16, mx.int32), "I32"),
        (
            "extractor.norm.weight",
            mx.zeros(64),
            r"extractor\.norm\.weight .*predictor_backbone in ifpr",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, other, name, array, expected):
    tensors = head_tensors("manifest") | {name: array}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    mx.save_safetensors(str(other / PREDICTOR), tensors)
    with pytest.raises(IFPError, match=expected) as caught:
        convert(str(other), tmp_path / "ifp")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ifp").exists()


def test_a_tokenizer_without_a_template_cannot_wrap_prompts(tmp_path, other):
    (other / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(other / "tokenizer_config.json", chat_template=None)
    with pytest.raises(IFPError, match="has no chat template, which wraps the prompts"):
        convert(str(other), tmp_path / "ifp")
