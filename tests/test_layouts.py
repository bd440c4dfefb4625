"""Trained checkpoints of every layout, against what PyTorch computed with them (tests/golden)."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint import open_checkpoint
from mlx_ifp.convert import convert

from .conftest import run_command
from .helpers import relative_error
from .test_bad_input import fails

GOLDEN = Path(__file__).parent / "golden"
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


def convert_fails(model, out, *args, **kwargs) -> str:
    """The one line; and nothing is left where the checkpoint would be."""
    line = fails("convert", "--model", model, "--mlx-path", out, *args, **kwargs)
    assert not list(Path(out).parent.glob(".*"))
    assert not Path(out).exists()
    return line


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
    from mlx_ifp.structure import build_model, quantization_of

    predicate = mixed_quant_predicate_builder(recipe, build_model(checkpoint.config), 32)
    for name in checkpoint.channels:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            assert quantization_of(checkpoint.config, path) == predicate(path, None)
    model, _ = load(out, cache=False)
    assert mx.isfinite(model.dense()(mx.array([[1, 2, 3]]))).all()


# -- bad input


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
    (run / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "is not a file of this directory" in line


def test_a_missing_shard(tmp_path):
    run = damaged(tmp_path, "split")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (run / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "model-00002-of-00002.safetensors: the shard is missing" in line


def test_without_pytorch_the_extra_is_named(tmp_path):
    """Where PyTorch is installed, too: this command cannot import it."""
    run = damaged(tmp_path, "split")
    (run / "extractor.safetensors").rename(run / "extractor.pt")
    (tmp_path / "blocked").mkdir()
    block = "import sys; sys.modules['torch'] = None"
    (tmp_path / "blocked" / "sitecustomize.py").write_text(block)
    line = convert_fails(
        run, tmp_path / "out", *FLAGS["split"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "blocked")},
    )  # fmt: skip
    assert "extractor.pt: reading it needs PyTorch" in line
    assert "pip install 'mlx_ifp[torch]'" in line


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
    ):
        line = convert_fails(MODELS["split"], tmp_path / "out", *FLAGS["split"], *flags)
        assert expected in line


def test_a_hub_id_is_downloaded_in_the_ordinary_way(tmp_path, monkeypatch):
    from mlx_ifp.convert import command

    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return GOLDEN / "split"

    monkeypatch.setattr(command, "_download", download)
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
    from mlx_ifp.convert import precision, source_files

    reads, taken = [], []
    file_rows = source_files.file_rows

    def counting(path, offset, shape, size):
        read = file_rows(path, offset, shape, size)
        row = int(np.prod(shape[1:])) * size

        def counted(start, stop):
            reads.append((stop - start) * row)
            return read(start, stop)

        return counted

    take = source_files.buffers.take
    for module in (precision, source_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(source_files, "file_rows", counting)
    monkeypatch.setattr(source_files.buffers, "take", lambda n: taken.append(n) or take(n))
    out = convert(str(MODELS["module"]), tmp_path / "ifp", **options("module"))
    checkpoint = open_checkpoint(out)
    groups = (checkpoint.trunk, checkpoint.channels, checkpoint.predictor, checkpoint.head)
    assert sum(reads) == sum(tensor.nbytes for group in groups for tensor in group.values())
    down = checkpoint.channels["model.layers.0.mlp.down_proj.weight"].nbytes
    assert max(taken) == down
    assert sorted(taken)[-4] <= 4096  # only the three layers' down projections are read whole


def test_uploading(tmp_path, monkeypatch):
    """A model card as mlx-lm writes one, and the hub's own client."""
    from huggingface_hub import ModelCard

    from mlx_ifp import hub

    calls = []

    class Recorder:
        def create_repo(self, **kwargs):
            calls.append(("create_repo", kwargs))

        def upload_large_folder(self, **kwargs):
            calls.append(("upload_large_folder", kwargs))

    monkeypatch.setattr(hub, "HfApi", Recorder)
    out = convert(
        str(MODELS["split"]), tmp_path / "ifp", upload_repo="me/trained-ifp", **options("split")
    )
    assert calls == [
        ("create_repo", {"repo_id": "me/trained-ifp", "exist_ok": True}),
        (
            "upload_large_folder",
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


def test_an_upload_that_fails_keeps_the_checkpoint(tmp_path):
    """Offline: the checkpoint is complete, the line says that it was not uploaded."""
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
