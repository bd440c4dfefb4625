"""Trained checkpoints with something wrong: one line that says what, and nothing left."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert

from ..cli.test_bad_input import fails
from ..conftest import run_command
from ..convert.test_layouts import FLAGS, GOLDEN, MODELS, TOKENIZER, K, options


def convert_fails(model, out, *args, **kwargs) -> str:
    """The one line; and nothing is left where the checkpoint would be."""
    line = fails("convert", "--model", model, "--mlx-path", out, *args, **kwargs)
    assert not list(Path(out).parent.glob(".*"))
    assert not Path(out).exists()
    return line


def test_what_is_missing_is_named_with_its_flag(tmp_path):
    line = convert_fails(MODELS["module"], tmp_path / "out")
    flags = ("--llm-config", "--predictor-config", "--tokenizer", "--predictor-tokenizer")
    assert all(flag in line for flag in (*flags, "--keep"))
    line = convert_fails(MODELS["split"], tmp_path / "out", "--tokenizer", TOKENIZER)
    assert "--predictor-tokenizer" in line
    assert "--llm-config" not in line
    assert "--predictor-config" in convert_fails(MODELS["manifest"], tmp_path / "out")
    done = run_command("convert", "--model", MODELS["module"], "--dry-run")
    assert done.returncode == 1
    assert "225 scores" in done.stdout
    assert "--keep" in done.stderr


def test_a_layout_can_be_forced(tmp_path):
    line = convert_fails(MODELS["manifest"], tmp_path / "out", "--layout", "split")
    assert "predictor_meta.json: the file is missing" in line
    convert(str(MODELS["manifest"]), tmp_path / "dense", layout="dense", keep=K, text_format="raw")
    assert open_checkpoint(tmp_path / "dense").ifp.selector == "activations"


def damaged(tmp_path: Path, layout: str) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(GOLDEN / layout, tmp_path / layout))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(file: Path, change) -> None:
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    change(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("predictor_meta.json", {"num_layers": 4}, "trained for 4 layers, but the LLM has 3"),
        ("predictor_meta.json", {"intermediate_size": 70}, "trained for 70 FFN channels"),
        ("predictor_meta.json", {"topk": 76}, "k must be between 1 and d_ffn = 75"),
        ("predictor_meta.json", {"topk": "31"}, "topk must be of type int"),
        ("predictor_meta.json", {"mask_method": "hardest"}, "mask_method must be one of"),
        ("predictor_meta.json", {"extractor_config": {"model_type": "none"}}, "mlx-lm cannot"),
        ("llama/config.json", {"hidden_act": "gelu"}, "activation is 'gelu', but mlx-lm's qwen2"),
        ("llama/config.json", {"hidden_act": "mish"}, "activation 'mish' is not known"),
        ("llama/config.json", {"layer_types": [["a"], ["b"]]}, "malformed"),
        ("llama/config.json", {"text_config": [1]}, "text_config must be an object"),
        ("llama/config.json", {"hidden_act": ["silu"]}, "is not known"),
        ("llama/config.json", {"rope_parameters": {"full_attention": 5}}, "malformed"),
        ("llama/config.json", {"num_hidden_layers": 2}, "is left over"),
        ("llama/config.json", {"num_hidden_layers": 4}, "is missing"),
        ("llama/config.json", {"intermediate_size": 76}, "has the shape"),
        ("llama/config.json", {"tie_word_embeddings": False}, "lm_head.weight is missing; if it"),
    ],
)
def test_a_split_that_does_not_fit(tmp_path, file, values, expected):
    run = damaged(tmp_path, "split")
    edit(run / file, **values)
    assert expected in convert_fails(run, tmp_path / "out", *FLAGS["split"])


def test_a_head_that_does_not_fit(tmp_path):
    run = damaged(tmp_path, "split")
    head = run / "mask_head.safetensors"

    def narrower(tensors):
        tensors["2.weight"], tensors["2.bias"] = tensors["2.weight"][:-1], tensors["2.bias"][:-1]

    edit_tensors(head, narrower)
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "2.weight gives 224 scores, but 3 layers of 75 channels need 225" in line
    edit_tensors(head, lambda t: t.update({"2.bias": t["2.bias"][:-1]}))
    assert "2.bias has the shape" in convert_fails(run, tmp_path / "out", *FLAGS["split"])
    edit_tensors(head, lambda t: t.update({"0.weight": t["0.weight"][:, :-1]}))
    edit_tensors(head, lambda t: t.update({"2.bias": mx.zeros(224)}))
    assert "224 scores" in convert_fails(run, tmp_path / "out", *FLAGS["split"])
    edit_tensors(head, lambda t: t.update({"4.weight": mx.zeros(3)}))
    assert "4.weight is left over" in convert_fails(run, tmp_path / "out", *FLAGS["split"])
    edit_tensors(head, lambda t: t.pop("0.bias"))
    assert "0.bias is missing" in convert_fails(run, tmp_path / "out", *FLAGS["split"])
    head.unlink()
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "mask_head.pt: the file is missing" in line


def test_a_backbone_that_does_not_fit(tmp_path):
    run = damaged(tmp_path, "split")
    file = run / "extractor.safetensors"
    edit_tensors(file, lambda t: t.pop("norm.weight"))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "the predictor's backbone: the tensor model.norm.weight is missing" in line
    edit_tensors(file, lambda t: t.update({"norm.weight": mx.zeros(48), "extra": mx.zeros(2)}))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "model.extra is left over" in line
    edit_tensors(file, lambda t: t.pop("extra"))
    edit_tensors(file, lambda t: t.update({"norm.weight": mx.zeros(48, mx.int32)}))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "norm.weight has the type I32" in line


def test_a_module_that_is_none(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(MODELS["module"], file)
    edit_tensors(file, lambda t: t.update({"other": mx.zeros(2)}))
    assert "other is left over" in convert_fails(file, tmp_path / "out", *FLAGS["module"])
    edit_tensors(file, lambda t: [t.pop(n) for n in list(t) if n.startswith("sparsity")])
    line = convert_fails(file, tmp_path / "out", *FLAGS["module"])
    assert "no checkpoint of a known layout" in line
    file.write_bytes(b"not a tensor file" * 100)
    line = convert_fails(file, tmp_path / "out", *FLAGS["module"])
    assert "not a readable safetensors file" in line


def test_tied_weights_that_differ(tmp_path):
    run = damaged(tmp_path, "split")
    file = run / "llama" / "model.safetensors"
    edit_tensors(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    convert(str(run), tmp_path / "same", **options("split"))
    edit_tensors(file, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "tied to the token embedding, but they differ" in line


def test_a_manifest_that_is_none(tmp_path):
    run = damaged(tmp_path, "manifest")
    flags = FLAGS["manifest"]
    edit(run / "ifpruning_config.json", mask_temperature=0)
    assert "mask_temperature" in convert_fails(run, tmp_path / "out", *flags)
    edit(run / "ifpruning_config.json", mask_temperature=0.5, predictor_hidden_dim=64)
    assert "predictor_hidden_dim is 64" in convert_fails(run, tmp_path / "out", *flags)
    (run / "ifpruning_config.json").write_text("[1")
    assert "not valid JSON" in convert_fails(run, tmp_path / "out", *flags)
    (run / "ifpruning_config.json").unlink()
    line = convert_fails(run, tmp_path / "out", *flags)
    assert "ifpruning_config.json: the file is missing" in line


def test_the_folder_above_its_checkpoints(tmp_path):
    for step in (5, 10):
        shutil.copytree(GOLDEN / "manifest", tmp_path / "run" / f"checkpoint-{step}")
    line = convert_fails(tmp_path / "run", tmp_path / "out", *FLAGS["manifest"])
    assert "checkpoint-10, checkpoint-5; name one of them" in line


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_an_index_that_leaves_the_directory(tmp_path, shard):
    run = damaged(tmp_path, "split")
    index = {"weight_map": {"model.norm.weight": shard}}
    (run / "llama" / "model.safetensors").unlink()
    (run / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "is not a file of this directory" in line


def test_a_missing_shard(tmp_path):
    run = damaged(tmp_path, "split")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (run / "llama" / "model.safetensors").unlink()
    (run / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "model-00002-of-00002.safetensors: the shard is missing" in line


def test_without_pytorch_the_extra_is_named(tmp_path):
    """Where PyTorch is installed, too: this command cannot import it."""
    run = damaged(tmp_path, "split")
    (run / "extractor.safetensors").unlink()
    (run / "extractor.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "blocked").mkdir()
    block = "import sys; sys.modules['torch'] = None"
    (tmp_path / "blocked" / "sitecustomize.py").write_text(block)
    line = convert_fails(
        run, tmp_path / "out", *FLAGS["split"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "blocked")},
    )  # fmt: skip
    assert "extractor.pt: reading it needs PyTorch" in line
    assert "pip install 'mlx_ifp[torch]'" in line


def test_a_pattern_of_layers_that_mlx_lm_does_not_have(tmp_path):
    """Its Gemma 3 knows one full layer in every few, and would take its default."""
    run = damaged(tmp_path, "manifest")
    config = json.loads((run / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention", "full_attention", "sliding_attention"]
    config["text_config"].pop("_sliding_window_pattern", None)
    edit(run / "config.json", **config)
    line = convert_fails(run, tmp_path / "out", *FLAGS["manifest"])
    assert "layer_types is not" in line


def test_a_stale_index_does_no_harm(tmp_path):
    """``model.safetensors`` comes first, as in transformers."""
    run = damaged(tmp_path, "split")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (run / "llama" / name).write_text(json.dumps({"weight_map": {"a": "gone.bin"}}))
    out = convert(str(run), tmp_path / "ifp", **options("split"))
    assert len(open_checkpoint(out).ffns) == 3


def test_a_directory_that_was_made_for_nothing_goes(tmp_path):
    line = convert_fails(MODELS["module"], tmp_path / "deep" / "er" / "out")
    assert "--keep" in line
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":["a","b"]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}',
        b'{"a":{"dtype":"F32","shape":null,"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        b"[" * 200_000,
    ],
)
def test_a_header_that_is_none(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    line = convert_fails(file, tmp_path / "out", *FLAGS["module"])
    assert "not a readable safetensors file" in line


def test_an_existing_path_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    line = fails(
        "convert", "--model", MODELS["split"], "--mlx-path", tmp_path / "out", *FLAGS["split"]
    )
    assert "already exists" in line
    assert os.listdir(tmp_path) == ["out"]


def test_precisions_that_contradict(tmp_path):
    for flags, expected in (
        (["--quant-predicate", "mixed_4_6"], "need -q"),
        (["-q", "--quant-predicate", "mixed_4_6", "--q-mode", "mxfp4"], "needs --q-mode affine"),
        (["--predictor-q-bits", "9"], "cannot be quantized"),
        (["--predictor-q-group-size", "32"], "needs --predictor-q-bits"),
        (["-q", "--q-bits", "0"], "numbers above 0"),
        (["-d"], "-d is for dense models"),
        (["--llm-config", "~nosuchuser/x"], "~nosuchuser/x"),
    ):
        line = convert_fails(MODELS["split"], tmp_path / "out", *FLAGS["split"], *flags)
        assert expected in line
