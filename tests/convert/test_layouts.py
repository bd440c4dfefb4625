"""Trained checkpoints of every layout, against what PyTorch computed with them (tests/golden)."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert

from ..conftest import run_command
from ..helpers import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = str(GOLDEN / "tokenizer")
K = 31
FLAGS = {
    "split": ["--tokenizer", TOKENIZER, "--predictor-tokenizer", TOKENIZER],
    "module": [
        *("--llm-config", str(GOLDEN / "module" / "llm.json")),
        *("--predictor-config", str(GOLDEN / "module" / "backbone.json")),
        *("--tokenizer", TOKENIZER, "--predictor-tokenizer", TOKENIZER, "--keep", str(K)),
    ],
    "manifest": ["--predictor-config", str(GOLDEN / "backbone")],
}
MODELS = {
    "split": GOLDEN / "split",
    "module": GOLDEN / "module" / "model.safetensors",
    "manifest": GOLDEN / "manifest",
}
LAYOUTS = list(MODELS)


def options(layout: str) -> dict:
    """FLAGS as arguments of convert()."""
    flags = FLAGS[layout]
    names = [flag[2:].replace("-", "_") for flag in flags[::2]]
    values = dict(zip(names, flags[1::2], strict=True))
    return values | ({"keep": K} if "keep" in values else {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [None, 8])
def test_it_equals_pytorch(tmp_path, layout, bits):
    """Scores to 1e-5, equal sets, logits to 1e-4; with a quantized LLM, logits to 0.05."""
    how = {"quantize_weights": True, "q_bits": 8, "q_group_size": 32, "predictor_q_bits": 0}
    out = convert(str(MODELS[layout]), tmp_path / "ifp", **options(layout), **(how if bits else {}))
    model, _ = load(out, cache=False)
    expected = mx.load(str((GOLDEN / layout) / "expected.safetensors"))
    for i in range(3):
        tokens, scores, mask, masked, dense = (
            expected[f"{i}.{name}"] for name in ("tokens", "scores", "mask", "masked", "dense")
        )
        assert relative_error(model.scores(tokens.tolist()), scores) < 1e-5
        selection = model.select(tokens.tolist())
        assert (selection.mask == np.array(mask > 0)).all()
        if layout == "split":  # the soft values are kept
            values = np.array(mask)[selection.mask].reshape(-1, K)
            assert np.abs(np.array(selection.weights) - values).max() < 1e-5
        else:
            assert selection.weights is None
        bound = 0.05 if bits else 1e-4
        network = model.subnetwork(selection)
        assert relative_error(network(tokens[None])[0], masked) < bound
        assert relative_error(model.dense()(tokens[None])[0], dense) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_commands(tmp_path, layout):
    """convert says what it found and did, generate runs on the result, and so does the export."""
    out = tmp_path / "ifp"
    done = run_command("convert", "--model", MODELS[layout], "--mlx-path", out, *FLAGS[layout])
    assert done.returncode == 0, done.stderr
    assert f"layout {layout}; source tensors:" in done.stdout
    assert f"3 layers of 75 channels, k = {K}" in done.stdout
    again = run_command("generate", "--model", out, "-p", "Hello there", "-m", 4, "--no-cache")
    assert again.returncode == 0, again.stderr
    assert "predictor" in again.stderr
    stock = run_command(
        "export", "--model", out, "--task", "Sort a list.", "--save-path", tmp_path / "stock"
    )
    assert stock.returncode == 0, stock.stderr
    import mlx_lm

    network, _ = mlx_lm.load(str(tmp_path / "stock"))
    assert mx.isfinite(network(mx.array([[1, 2, 3]]))).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_tensor_is_accounted_for(tmp_path, layout):
    out = convert(str(MODELS[layout]), tmp_path / "ifp", **options(layout))
    report = json.loads((out / "source_tensors.json").read_text())
    count = sum(len(n) for part in ("mapped", "skipped") for n in report[part].values())
    files = {
        "split": [*(GOLDEN / "split").glob("*/model.safetensors"),
                  GOLDEN / "split" / "extractor.safetensors",
                  GOLDEN / "split" / "mask_head.safetensors"],
        "module": [MODELS["module"]],
        "manifest": [GOLDEN / "manifest" / "model.safetensors",
                     GOLDEN / "manifest" / "predictor.safetensors"],
    }[layout]  # fmt: skip
    assert count == sum(len(mx.load(str(file))) for file in files)
    reasons = {reason for names in report["skipped"].values() for reason in names.values()}
    assert (
        reasons
        == {
            "split": set(),
            "module": {"not used: only the hidden states of the backbone are"},
            "manifest": {"not part of the text model"},
        }[layout]
        or layout == "module"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_writes_nothing(tmp_path, layout):
    done = run_command(
        "convert", "--model", MODELS[layout], "--mlx-path", tmp_path / "ifp", *FLAGS[layout],
        "--dry-run", "-q", "--q-group-size", 32,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert lines["layout"].strip() == layout
    assert lines["d_ffn"].strip() == "75"
    assert lines["k"].strip() == str(K)
    assert "3 layers" in lines["LLM"]
    assert "nothing" in lines["missing"]
    assert "MB" in lines["memory"]


def test_another_k_and_precision_for_the_predictor(tmp_path):
    out = convert(
        str(MODELS["split"]), tmp_path / "ifp", **options("split"), keep=0.5,
        dtype="bfloat16", predictor_dtype="float16", predictor_q_bits=8,
        predictor_q_group_size=32,
    )  # fmt: skip
    checkpoint = open_checkpoint(out)
    assert checkpoint.ifp.k == 64
    assert {t.dtype for t in checkpoint.channels.values()} == {"BF16"}
    assert {t.dtype for t in checkpoint.head.values()} == {"F16"}
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in checkpoint.predictor.items()}
    # Only o_proj has an input width that is a multiple of 32; the rest stays as it is.
    assert kinds["scales"] == "F16"
    model, _ = load(out, cache=False)
    assert mx.isfinite(model.scores([1, 2, 3])).all()


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4"])
def test_mixed_recipes_are_those_of_mlx_lm(tmp_path, recipe):
    from mlx_lm.convert import mixed_quant_predicate_builder

    out = convert(
        str(MODELS["split"]), tmp_path / "ifp", **options("split"), quantize_weights=True,
        q_group_size=32, quant_predicate=recipe, predictor_q_bits=0,
    )  # fmt: skip
    checkpoint = open_checkpoint(out)
    from mlx_ifp.llm.build import build_model, quantization_of

    predicate = mixed_quant_predicate_builder(recipe, build_model(checkpoint.config), 32)
    for name in checkpoint.channels:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            assert quantization_of(checkpoint.config, path) == predicate(path, None)
    model, _ = load(out, cache=False)
    assert mx.isfinite(model.dense()(mx.array([[1, 2, 3]]))).all()


def test_a_hub_id_is_downloaded_in_the_ordinary_way(tmp_path, monkeypatch):
    from mlx_ifp.convert import conversion

    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return GOLDEN / "split"

    monkeypatch.setattr(conversion, "snapshot_download", download)
    out = convert("someone/trained", tmp_path / "ifp", revision="v2", **options("split"))
    assert asked["name"] == "someone/trained"
    assert "llama/*" in asked["patterns"]
    source = open_checkpoint(out).ifp.source
    assert (source["model"], source["revision"], source["layout"]) == (
        "someone/trained", "v2", "split",
    )  # fmt: skip
    with pytest.raises(IFPError, match="nobody/nothing"):
        monkeypatch.undo()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        convert("nobody/nothing", tmp_path / "none")


def test_every_byte_is_read_once_and_in_small_pieces(tmp_path, monkeypatch):
    """Memory is bounded by construction: blocks, and one matrix at a time that is turned."""
    from mlx_ifp.convert import streams
    from mlx_ifp.convert.sources import files as source_files
    from mlx_ifp.convert.sources import tensor as source_tensor

    reads, taken = [], []
    file_rows = source_files.file_rows

    def counting(path, offset, shape, size):
        read = file_rows(path, offset, shape, size)
        row = int(np.prod(shape[1:])) * size

        def counted(start, stop):
            reads.append((stop - start) * row)
            return read(start, stop)

        return counted

    take = source_tensor.buffers.take
    for module in (streams, source_tensor):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(source_files, "file_rows", counting)
    monkeypatch.setattr(source_tensor.buffers, "take", lambda n: taken.append(n) or take(n))
    out = convert(str(MODELS["module"]), tmp_path / "ifp", **options("module"))
    checkpoint = open_checkpoint(out)
    groups = (checkpoint.trunk, checkpoint.channels, checkpoint.predictor, checkpoint.head)
    assert sum(reads) == sum(tensor.nbytes for group in groups for tensor in group.values())
    down = checkpoint.channels["model.layers.0.mlp.down_proj.weight"].nbytes
    assert max(taken) == down
    assert sorted(taken)[-4] <= 4096  # only the three layers' down projections are read whole


def test_the_end_tokens_of_the_llm_come_along(tmp_path):
    """``generation_config.json`` stands beside the config that the user names."""
    shutil.copytree(GOLDEN / "manifest", tmp_path / "llm")
    config = tmp_path / "llm"
    shutil.copy(GOLDEN / "module" / "llm.json", config / "config.json")
    (config / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    out = convert(
        str(MODELS["module"]), tmp_path / "ifp", **options("module") | {"llm_config": str(config)}
    )
    assert load(out, cache=False)[1].eos_token_ids >= {7, 9}


def test_what_mlx_lm_does_not_do_is_said(tmp_path, capfd):
    shutil.copytree(GOLDEN / "split", tmp_path / "run")
    file = tmp_path / "run" / "llama" / "config.json"
    values = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    convert(str(tmp_path / "run"), tmp_path / "ifp", **options("split"))
    assert "mlx-lm's qwen2 has no sliding window" in capfd.readouterr().err


def test_digests_are_right_however_late_they_are_computed(tmp_path, monkeypatch):
    """Blocks are hashed behind the writing; their buffers must not be used again before."""
    from mlx_ifp.files import tensor_files

    sha256 = hashlib.sha256

    class Slow:
        def __init__(self):
            self.digest = sha256()

        def update(self, data):
            time.sleep(0.002)
            self.digest.update(data)

        def hexdigest(self):
            return self.digest.hexdigest()

    monkeypatch.setattr(tensor_files.hashlib, "sha256", Slow)
    out = convert(str(MODELS["split"]), tmp_path / "ifp", **options("split"))
    monkeypatch.undo()
    for name, record in open_checkpoint(out).ifp.files.items():
        assert record["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest(), name


def test_uploading(tmp_path, monkeypatch):
    """A model card as mlx-lm writes one, and the hub's own client."""
    from huggingface_hub import ModelCard

    from mlx_ifp.checkpoint import hub

    calls = []

    class Recorder:
        def create_repo(self, **kwargs):
            calls.append(("create_repo", kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", kwargs))

    monkeypatch.setattr(hub, "HfApi", Recorder)
    out = convert(
        str(MODELS["split"]), tmp_path / "ifp", upload_repo="me/trained-ifp", **options("split")
    )
    assert calls == [
        ("create_repo", {"repo_id": "me/trained-ifp", "exist_ok": True}),
        (
            "upload_folder",
            {"folder_path": str(out), "repo_id": "me/trained-ifp", "repo_type": "model"},
        ),
    ]
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "mlx_ifp"
    assert card.data.pipeline_tag == "text-generation"
    assert "mlx" in card.data.tags
    assert 'load("me/trained-ifp")' in card.text
    assert "qwen2, 3 layers of 75 FFN" in card.text
    open_checkpoint(out)


@pytest.mark.parametrize("offline", ["1", "0"])
def test_an_upload_that_fails_keeps_the_checkpoint(tmp_path, monkeypatch, offline):
    """Offline, or no answer: the checkpoint is complete, the line says that nothing went up."""
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    out = tmp_path / "ifp"
    line = fails_after(
        "convert", "--model", MODELS["split"], "--mlx-path", out, *FLAGS["split"],
        "--upload-repo", "me/trained-ifp",
    )  # fmt: skip
    assert "not uploaded to me/trained-ifp" in line
    open_checkpoint(out)


def fails_after(*args) -> str:
    """The last line of a command that fails after its work is done."""
    done = run_command(*args)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]
