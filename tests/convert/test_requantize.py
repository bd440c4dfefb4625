"""mlx_ifp.convert on a checkpoint of mlx_ifp: the same one in another precision."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.selectors.predictor import PredictorHead

from ..checkpoint.test_predictor_format import share_embedding
from ..cli.test_bad_input import fails
from ..conftest import make_dense, make_predictor_checkpoint, run_command
from ..helpers import relative_error

TOKENS = [5, 77, 130, 9, 42, 200, 301, 17]
PARTS = ("weight", "scales", "biases")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """LLM and backbone of one hidden size, a soft mask, static scores."""
    path = tmp_path_factory.mktemp("source") / "ifp"
    make_predictor_checkpoint(path, backbone={"hidden_size": 64, "head_dim": 16})
    scores = path / "static.safetensors"
    mx.save_safetensors(str(scores), {"scores": mx.random.normal((3, 160), key=mx.random.key(9))})
    config = json.loads((path / "ifp_config.json").read_text())
    config["files"]["static.safetensors"] = {"bytes": scores.stat().st_size, "sha256": ""}
    config["mask"] = {"operator": "sigmoid", "temperature": 2.0, "keep_soft_values": True}
    config["text"]["max_tokens"] = 77
    (path / "ifp_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    """Everything in 4 bits, the head in 8."""
    path = tmp_path_factory.mktemp("quantized") / "ifp"
    options = {"quantize_weights": True, "q_bits": 4, "q_group_size": 32, "head_q_bits": 8}
    return convert(str(checkpoint), path, **options)


def arrays(checkpoint):
    """Every tensor of a checkpoint: file -> name -> array."""
    return {f: mx.load(str(checkpoint / f)) for f in open_checkpoint(checkpoint).ifp.files}


def assert_same_tensors(one, other):
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys()
    for file, tensors in one.items():
        assert tensors.keys() == other[file].keys()
        for name, array in tensors.items():
            assert array.dtype == other[file][name].dtype
            assert mx.array_equal(array, other[file][name]), name


def kept(checkpoint):
    """What ifp_config.json says beyond the files and the versions."""
    config = json.loads((checkpoint / "ifp_config.json").read_text())
    return {k: v for k, v in config.items() if k not in ("files", "source")}


@pytest.mark.parametrize("shared", [False, True])
def test_without_flags_every_tensor_stays(checkpoint, tmp_path, shared):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    if shared:
        share_embedding(source)
    out = convert(str(source), tmp_path / "out")
    assert_same_tensors(source, out)
    assert kept(source) | {"predictor_embedding": "llm" if shared else "own"} == kept(out)
    names = {str(f.relative_to(source)) for f in source.rglob("*")}
    assert names <= {str(f.relative_to(out)) for f in out.rglob("*")}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (out / name).read_bytes()
    assert (
        convert(str(out), tmp_path / "again").joinpath("ifp_config.json").read_bytes()
        == (out / "ifp_config.json").read_bytes()
    )


def test_a_quantized_checkpoint_without_flags_stays_too(quantized, tmp_path):
    out = convert(str(quantized), tmp_path / "out")
    assert_same_tensors(quantized, out)
    for config in ("config.json", "predictor/config.json"):
        assert (out / config).read_bytes() == (quantized / config).read_bytes()


def test_logits_are_those_of_quantizing_by_mlx(checkpoint, quantized):
    """Trunk and FFN with nn.quantize, the down projection along the hidden size."""
    network, _ = load_model(checkpoint.parent / "ifp-parts" / "llm")
    for layer in network.layers:
        parts = mx.quantize(layer.mlp.down_proj.weight.T, 32, 4)
        layer.mlp.down_proj.weight = mx.dequantize(*parts, group_size=32, bits=4).T
    nn.quantize(
        network,
        32,
        4,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "down_proj" not in path,
    )
    model, _ = load(quantized, cache=False)
    tokens = mx.array([TOKENS])
    assert relative_error(model.dense()(tokens), network(tokens)) < 1e-5
    stored, source = arrays(quantized), arrays(checkpoint)
    for name, weight in source["channels.safetensors"].items():
        module = name.removesuffix(".weight")
        for part, array in zip(PARTS, mx.quantize(weight, 32, 4), strict=True):
            assert mx.array_equal(stored["channels.safetensors"][f"{module}.{part}"], array)
    assert mx.array_equal(*(a["static.safetensors"]["scores"] for a in (stored, source)))
    assert kept(quantized) == kept(checkpoint) | {"predictor_embedding": "own"}


def test_scores_are_those_of_quantizing_by_mlx(checkpoint, quantized):
    backbone, _ = load_model(checkpoint.parent / "ifp-parts" / "backbone")
    nn.quantize(backbone, 32, 4)
    hidden = backbone.model(mx.array([TOKENS]))[0, -1]
    head = PredictorHead(
        open_checkpoint(checkpoint).ifp.head, arrays(checkpoint)["predictor/head.safetensors"]
    )
    nn.quantize(head, 32, 8)
    expected = head(hidden).reshape(3, 160)
    assert relative_error(load(quantized, cache=False)[0].scores(TOKENS), expected) < 1e-5


def test_the_command(checkpoint, tmp_path):
    out = tmp_path / "out"
    args = ["convert", "--model", checkpoint, "--mlx-path", out, "--keep", "0.8", "-q",
            "--q-bits", "8", "--predictor-q-bits", "4", "--head-q-bits", "4"]  # fmt: skip
    done = run_command(*args, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "layout:      checkpoint" in done.stdout and "as they are stored" in done.stdout
    assert not out.exists()
    done = run_command(*args)
    assert done.returncode == 0, done.stderr
    assert "3 layers of 160 channels, k = 128" in done.stdout
    done = run_command("generate", "--model", out, "-p", "Hello", "-m", 4)
    assert done.returncode == 0, done.stderr
    quantization = json.loads((out / "predictor/config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 64)
    # 128 and 64 inputs: both Linears have whole groups.
    assert {"head.linear1", "head.linear2"} <= quantization.keys()


def test_parts_are_quantized_one_by_one(checkpoint, quantized, tmp_path):
    """A head at first, then the backbone, which must not lose the head's group size."""
    head = convert(str(checkpoint), tmp_path / "head", head_q_bits=8, predictor_q_group_size=32)
    both = convert(str(head), tmp_path / "both", predictor_q_bits=4, predictor_q_group_size=64)
    all_three = convert(
        str(both), tmp_path / "all", quantize_weights=True, q_bits=4, q_group_size=32,
        predictor_q_bits=0,
    )  # fmt: skip
    stored, expected = arrays(all_three), arrays(quantized)
    for file in ("channels.safetensors", "model.safetensors", "predictor/head.safetensors"):
        for name, array in expected[file].items():
            assert mx.array_equal(stored[file][name], array), name
    assert load(all_three, cache=False)[0].scores(TOKENS).shape == (3, 160)
    attention = "model.layers.0.self_attn.q_proj.scales"
    assert stored["predictor/model.safetensors"][attention].shape == (64, 1)


def test_what_is_quantized_already_is_refused(checkpoint, quantized, tmp_path):
    out = tmp_path / "out"
    for options, expected in (
        ({"quantize_weights": True}, "The LLM of .* leave out -q, or add --dequantize"),
        ({"predictor_q_bits": 4}, "The predictor of .* --predictor-q-bits 0 to keep it"),
        ({"head_q_bits": 4}, "The predictor's head of .* leave out --head-q-bits"),
    ):
        with pytest.raises(IFPError, match=expected):
            convert(str(quantized), out, **options)
    assert list(tmp_path.iterdir()) == []


def test_dequantizing_gives_floats_and_quantizing_anew_other_bits(quantized, tmp_path):
    whole = convert(str(quantized), tmp_path / "whole", dequantize_weights=True)
    stored = arrays(whole)
    assert all(a.dtype == mx.float32 for tensors in stored.values() for a in tensors.values())
    for config in ("config.json", "predictor/config.json"):
        assert "quantization" not in json.loads((whole / config).read_text())
    models = [load(path, cache=False)[0] for path in (whole, quantized)]
    tokens = mx.array([TOKENS])
    assert relative_error(*(model.dense()(tokens) for model in models)) < 1e-5
    assert relative_error(*(model.scores(TOKENS) for model in models)) < 1e-5
    anew = {"quantize_weights": True, "q_bits": 8, "predictor_q_bits": 0}
    once = convert(str(quantized), tmp_path / "once", dequantize_weights=True, **anew)
    assert_same_tensors(once, convert(str(whole), tmp_path / "twice", **anew))


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("architecture", ["phi3", "granite"])
def test_fused_projections_biases_and_modes(tmp_path, architecture, mode):
    dense = make_dense(tmp_path / "dense", architecture)
    options = {"quantize_weights": True, "q_mode": mode, "q_group_size": 32}
    plain = convert(str(dense), tmp_path / "plain")
    direct = convert(str(dense), tmp_path / "direct", **options)
    again = convert(str(plain), tmp_path / "again", **options)
    assert_same_tensors(direct, again)
    whole = convert(str(again), tmp_path / "whole", dequantize_weights=True)
    models = [load(path, cache=False)[0] for path in (whole, again)]
    tokens = mx.array([TOKENS])
    assert relative_error(*(model.dense()(tokens) for model in models)) < 1e-4


def test_another_type(checkpoint, quantized, tmp_path):
    half = arrays(convert(str(checkpoint), tmp_path / "half", dtype="float16"))
    scores = half.pop("static.safetensors")["scores"]
    assert scores.dtype == mx.float32
    assert all(a.dtype == mx.float16 for tensors in half.values() for a in tensors.values())
    packed = arrays(convert(str(quantized), tmp_path / "packed", predictor_dtype="bfloat16"))
    assert packed["model.safetensors"]["model.norm.weight"].dtype == mx.float32
    assert packed["predictor/head.safetensors"]["linear2.biases"].dtype == mx.bfloat16
    assert packed["predictor/head.safetensors"]["linear2.weight"].dtype == mx.uint32


def test_a_head_whose_width_does_not_fit_stays_and_the_note_says_so(tmp_path, capfd):
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp")
    out = convert(str(checkpoint), tmp_path / "out", head_q_bits=4)
    assert "linear1 of the predictor's head stays unquantized" in capfd.readouterr().err
    names = open_checkpoint(out).head
    assert "linear2.scales" in names and "linear1.scales" not in names


def test_options_that_do_not_fit_the_source(checkpoint, tiny_checkpoint, tmp_path):
    for source, options, expected in (
        (
            checkpoint,
            {"tokenizer": str(checkpoint)},
            "its precision, k and the order of",
        ),
        (
            checkpoint,
            {"text_format": "raw"},
            "its precision, k and the order of",
        ),
        (checkpoint, {"head_q_bits": 7}, "head cannot be quantized so"),
        (tiny_checkpoint, {"head_q_bits": 4}, "has no predictor"),
    ):
        with pytest.raises(IFPError, match=expected):
            convert(str(source), tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(checkpoint, tmp_path):
    for source, args, expected in (
        (checkpoint, ["--keep", "161"], "k must be between 1"),
        (checkpoint, ["--head-q-bits=-4"], "above 0"),
        (checkpoint, ["--predictor-q-group-size", "32"], "needs --predictor-q-bits, --head-q-bits"),
        (checkpoint, ["--q-bits", "4"], "need -q"),
    ):
        line = fails("convert", "--model", source, "--mlx-path", tmp_path / "out", *args)
        assert expected in line
        assert list(tmp_path.iterdir()) == []


def test_a_trained_checkpoint_gets_a_quantized_head_at_once(tmp_path):
    golden = Path(__file__).parents[1] / "golden"
    config = {"predictor_config": str(golden / "backbone")}
    plain = convert(str(golden / "manifest"), tmp_path / "plain", **config)
    at_once = convert(str(golden / "manifest"), tmp_path / "once", **config, head_q_bits=4)
    assert "linear2.scales" in open_checkpoint(at_once).head
    assert_same_tensors(at_once, convert(str(plain), tmp_path / "later", head_q_bits=4))
