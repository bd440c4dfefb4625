"""What a manifest may say: where the backbone's config is, the head, the mask, static scores."""

import json

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert

from .trained import D_FFN, LAYERS, K, edit_json, save_run

MANIFEST = "ifpruning_config.json"


@pytest.fixture
def run(tmp_path):
    """A run whose manifest names the backbone's config inside of it."""
    save_run(tmp_path / "run", "manifest")
    edit_json(tmp_path / "run" / MANIFEST, predictor_model="predictor_config")
    return tmp_path / "run"


@pytest.mark.parametrize("named", ["predictor_config", "predictor_config/config.json"])
def test_the_backbone_is_found_inside_the_checkpoint(tmp_path, run, named, monkeypatch):
    """Wherever the command is run."""
    monkeypatch.chdir(tmp_path)
    edit_json(run / MANIFEST, predictor_model=named)
    out = convert(str(run), tmp_path / "ifp")
    assert open_checkpoint(out).predictor_config["num_hidden_layers"] == 2


def test_a_config_inside_that_is_none_is_said(tmp_path, run):
    (run / "predictor_config" / "config.json").write_text("{")
    with pytest.raises(IFPError, match=r"predictor_config/config\.json: not valid JSON"):
        convert(str(run), tmp_path / "ifp")


@pytest.fixture
def static_run(run):
    """A run with one mask for every text, in place of the predictor."""
    (run / "predictor.safetensors").unlink()
    edit_json(run / MANIFEST, predictor_model=None, static_scores=True)
    mx.save_safetensors(str(run / "static.safetensors"), {"scores": SCORES})
    return run


SCORES = mx.random.normal((LAYERS, D_FFN), key=mx.random.key(3))


def test_a_static_run_converts_to_the_selector_static(tmp_path, static_run):
    out = convert(str(static_run), tmp_path / "ifp")
    checkpoint = open_checkpoint(out)
    assert checkpoint.ifp.selector == "static"
    assert checkpoint.ifp.head is None
    assert not (out / "predictor").exists()
    model, _ = load(out, cache=False)
    first = mx.sort(mx.argsort(-SCORES, axis=-1)[:, :K], axis=-1)
    assert mx.array_equal(model.select("Any text.").indices, first)
    report = json.loads((out / "source_tensors.json").read_text())
    assert report["mapped"]["static"] == {"scores": "scores"}


def test_static_scores_in_another_file_and_with_soft_values(tmp_path, static_run):
    (static_run / "static.safetensors").rename(static_run / "static_scores.safetensors")
    values = {"static_scores": "static_scores.safetensors", "keep_soft_values": True}
    edit_json(static_run / MANIFEST, **values)
    model, _ = load(convert(str(static_run), tmp_path / "ifp"), cache=False)
    weights = model.select("Any text.").weights
    assert weights.shape == (LAYERS, K)
    assert mx.all((weights > 0) & (weights < 1))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (SCORES[:, :-1], r"scores is F32 \(3, 159\), but 3 layers of 160 channels need F32"),
        (SCORES.astype(mx.float16), "scores is F16"),
        (None, "must hold the tensor scores"),
    ],
)
def test_static_scores_that_do_not_fit(tmp_path, static_run, scores, expected):
    tensors = {"other": SCORES} if scores is None else {"scores": scores}
    mx.save_safetensors(str(static_run / "static.safetensors"), tensors)
    with pytest.raises(IFPError, match=expected):
        convert(str(static_run), tmp_path / "ifp")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"static_scores": "../scores.safetensors"}, "static_scores must be true or the name"),
        ({"static_scores": "gone.safetensors"}, r"gone\.safetensors: the file is missing"),
        ({"keep_soft_values": 1}, "keep_soft_values must be true or false"),
        ({"keep_soft_values": True, "mask_operator": "topk"}, "needs the operator sigmoid"),
        ({"mask_operator": "softmax"}, "mask.operator must be one of"),
        ({"static_scores": None, "head_activation": "tanh"}, "head_activation must be one of"),
    ],
)
def test_values_that_a_manifest_cannot_have(tmp_path, static_run, values, expected):
    edit_json(static_run / MANIFEST, **values)
    with pytest.raises(IFPError, match=expected):
        convert(str(static_run), tmp_path / "ifp")


def test_only_one_of_predictor_and_static_scores(tmp_path, run):
    edit_json(run / MANIFEST, static_scores=True)
    with pytest.raises(IFPError, match="only one of them can select"):
        convert(str(run), tmp_path / "ifp")


@pytest.mark.parametrize("given", [{"predictor_tokenizer": "any"}, {"head_q_bits": 8}])
def test_a_static_run_has_no_predictor(tmp_path, static_run, given):
    with pytest.raises(IFPError, match="is a static run: it has no predictor"):
        convert(str(static_run), tmp_path / "ifp", **given)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_head_has_the_activation_that_is_named(tmp_path, run, activation):
    edit_json(run / MANIFEST, head_activation=activation)
    out = convert(str(run), tmp_path / "ifp")
    assert open_checkpoint(out).ifp.head.activation == (activation or "leaky_relu")


@pytest.mark.parametrize("operator", ["sigmoid", "capped_exp"])
def test_soft_values_are_kept_if_the_manifest_says_so(tmp_path, run, operator):
    edit_json(run / MANIFEST, keep_soft_values=True, mask_operator=operator, mask_temperature=0.5)
    out = convert(str(run), tmp_path / "ifp")
    assert open_checkpoint(out).ifp.mask == MaskConfig(operator, 0.5, keep_soft_values=True)
