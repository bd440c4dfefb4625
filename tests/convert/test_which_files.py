"""Which files of a directory are the model, what a file is, and the names that training gives."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.convert.layouts import detect_layout
from mlx_ifp.convert.naming import name_tensors
from mlx_ifp.convert.sources.files import kind_of, open_tensors, weight_files
from mlx_ifp.convert.wrappers import state_dicts, unwrapped
from mlx_ifp.errors import IFPError

INDEX = "model.safetensors.index.json"


def touch(directory: Path, *names: str) -> None:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"")


def index(file: Path, *shards: str) -> None:
    file.write_text(json.dumps({"weight_map": {f"t{i}": s for i, s in enumerate(shards)}}))


def names(directory: Path) -> list[str]:
    return [file.name for file in weight_files(directory)]


def test_the_index_is_the_one_that_transformers_reads(tmp_path):
    """Mistral publishes its own shards and their index beside those of transformers."""
    touch(tmp_path, "model-00001-of-00001.safetensors", "consolidated-00001-of-00001.safetensors")
    index(tmp_path / "consolidated.safetensors.index.json", "gone.safetensors")
    index(tmp_path / INDEX, "model-00001-of-00001.safetensors")
    assert names(tmp_path) == ["model-00001-of-00001.safetensors"]
    (tmp_path / INDEX).unlink()
    assert names(tmp_path) == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors", "consolidated.safetensors"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "predictor.safetensors"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "adapter_model.safetensors"], ["pytorch_model.bin"]),
        (["model.safetensors", "._model.safetensors"], ["model.safetensors"]),
        (["weights.safetensors", "._weights.safetensors"], ["weights.safetensors"]),
        (["run.pt", "optimizer.pt", "rng_state_0.pth", "training_args.bin"], ["run.pt"]),
    ],
)
def test_other_files_beside_a_model_do_no_harm(tmp_path, files, expected):
    touch(tmp_path, *files)
    assert names(tmp_path) == expected


def test_an_index_of_another_name_counts_if_it_is_the_only_one(tmp_path):
    touch(tmp_path, "a-1.safetensors", "b-1.safetensors")
    index(tmp_path / "a.safetensors.index.json", "a-1.safetensors")
    assert names(tmp_path) == ["a-1.safetensors"]
    index(tmp_path / "b.safetensors.index.json", "b-1.safetensors")
    with pytest.raises(IFPError, match=r"a\.safetensors\.index\.json, b\.safetensors\.index"):
        weight_files(tmp_path)


def test_what_a_file_is_is_told_by_its_content(tmp_path):
    for name in ("a.pt", "b.SAFETENSORS", "c"):
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {"w": mx.zeros((2,))})
        (tmp_path / "x.safetensors").rename(tmp_path / name)
        assert kind_of(tmp_path / name) == "safetensors"
        assert list(open_tensors(tmp_path / name)) == ["w"]
    (tmp_path / "model.bin").write_bytes(b"GGUF" + bytes(20))
    assert detect_layout(tmp_path / "model.bin") == "dense"
    (tmp_path / "model.GGUF").write_bytes(b"damaged")
    assert detect_layout(tmp_path / "model.GGUF") == "dense"
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(IFPError, match="git lfs pull"):
        open_tensors(tmp_path / "lfs.safetensors")


def test_a_quantized_model_in_a_directory_of_any_name(tmp_path, dense_llama):
    """mlx-lm globs with the path, and takes every ``model*.safetensors``."""
    import mlx_lm

    mlx_lm.convert(str(dense_llama), str(tmp_path / "q"), quantize=True, q_group_size=32)
    odd = tmp_path / "my [q4] model"
    (tmp_path / "q").rename(odd)
    shutil.copy(odd / "model.safetensors", odd / "model.old.safetensors")
    (odd / "real").mkdir()
    os.rename(odd / "model.safetensors", odd / "real" / "blob")
    (odd / "model.safetensors").symlink_to(odd / "real" / "blob")
    out = convert(str(odd), tmp_path / "ifp [1]")
    assert len(open_checkpoint(out).ffns) == 3


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("llm._orig_mod.module.model.norm.weight", "llm.model.norm.weight"),
        ("model.layers.0._fsdp_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.multi_module.weight", "model.multi_module.weight"),
    ],
)  # fmt: skip
def test_wrappers_are_no_part_of_a_name(name, plain):
    assert list(unwrapped({name: 1}, "x")) == [plain]


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(IFPError, match="both called a"):
        unwrapped({"a.b": 1, "module.a.b": 2}, "x")


def test_a_dict_that_holds_a_model_beside_training_state():
    saved = {"model_state_dict.model.a": 1, "optimizer.state.0": 2, "epoch": 3}
    assert ("model_state_dict.", {"model.a": 1}) in list(state_dicts(saved))
    # A stray tensor is no training state: the model must not lose it silently.
    assert [prefix for prefix, _ in state_dicts({"model.a": 1, "stray.b": 2})] == [""]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model.", "net.state."])
def test_a_dense_model_inside_a_wrapper_converts(tmp_path, dense_llama, wrapper):
    run = tmp_path / "run"
    shutil.copytree(dense_llama, run)
    arrays = mx.load(str(dense_llama / "model.safetensors"))
    (run / "model.safetensors").unlink()
    (run / INDEX).unlink()
    wrapped = {f"{wrapper}{name}": array for name, array in arrays.items()}
    mx.save_safetensors(str(run / "model.safetensors"), wrapped)
    config = json.loads((run / "config.json").read_text())
    named = name_tensors(config, open_tensors(run), "run")
    assert sorted(named.tensors) == sorted(arrays)


def test_adapters_that_are_not_merged_are_named(tmp_path):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {name: mx.zeros((2, 2))})
    with pytest.raises(IFPError, match="LoRA adapter that is not merged"):
        open_tensors(tmp_path)


def test_a_model_of_other_names_is_told_apart(dense_llama, tmp_path):
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"tok_embeddings": mx.zeros((2, 2))})
    config = json.loads((dense_llama / "config.json").read_text())
    with pytest.raises(IFPError, match="the names are others, such as tok_embeddings"):
        name_tensors(config, open_tensors(tmp_path / "m.safetensors"), "m")


def test_only_a_downloaded_model_has_a_revision(dense_llama, tmp_path):
    out = convert(str(dense_llama), tmp_path / "ifp", revision="v2")
    assert "revision" not in open_checkpoint(out).ifp.source
