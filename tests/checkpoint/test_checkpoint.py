"""A checkpoint is checked when it is opened; each fault has its one line."""

import hashlib
import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.files.atomic import new_directory, new_file
from mlx_ifp.files.tensor_files import LazyTensor, read_header, write_safetensors

from ..conftest import make_dense, make_predictor_checkpoint


@pytest.fixture
def checkpoint(predictor_checkpoint, tmp_path):
    """A checkpoint of one's own, to break."""
    return shutil.copytree(predictor_checkpoint, tmp_path / "broken")


def edit_config(checkpoint, change):
    path = checkpoint / "ifp_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(checkpoint, name, change):
    """Rewrite a tensor file, and its size in the config, so that only the tensors are wrong."""
    path = checkpoint / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit_config(checkpoint, lambda c: c["files"][name].update(bytes=path.stat().st_size))


def message(checkpoint):
    with pytest.raises(IFPError) as caught:
        open_checkpoint(checkpoint)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_digest_of_large_rows_is_right(tmp_path):
    """A row larger than a block has one buffer; it must not be read into while it is hashed."""
    rows = np.arange(6 * 900_000, dtype=np.uint32).reshape(6, -1)
    buffer = np.empty((1, 900_000), np.uint32)

    def read(start, stop):
        buffer[...] = rows[start:stop]
        return buffer

    lazy = LazyTensor(rows.shape, mx.uint32, read, step=1)
    record = write_safetensors(tmp_path / "a.safetensors", {"a": lazy})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert data.endswith(rows.tobytes())


def test_the_config_tells_what_the_checkpoint_is(predictor_checkpoint):
    opened = open_checkpoint(predictor_checkpoint)
    assert (len(opened.ffns), opened.d_ffn, opened.ifp.k) == (3, 160, 64)
    assert opened.selectors == ["predictor", "activations"]
    assert opened.ifp.head.widths == [48, 128, 480]
    values = json.loads((predictor_checkpoint / "ifp_config.json").read_text())
    assert values["format_version"] == 2


def test_channels_are_rows_in_every_projection(tiny_checkpoint, dense_llama):
    source = mx.load(str(dense_llama / "model.safetensors"))
    stored = mx.load(str(tiny_checkpoint / "channels.safetensors"))
    assert len(stored) == 9
    for name, array in stored.items():
        expected = source[name].T if "down_proj" in name else source[name]
        assert array.shape == (160, 64)
        assert mx.array_equal(array, expected)


def test_mlx_lm_refuses_the_directory_loudly(tiny_checkpoint):
    from mlx_lm.utils import load_model

    with pytest.raises(ValueError, match="Missing"):
        load_model(tiny_checkpoint)


CONFIG_FAULTS = {
    "version": (lambda c: c.update(format_version=3), "format_version is 3"),
    "no version": (lambda c: c.pop("format_version"), "format_version is None"),
    "unknown field": (lambda c: c.update(kk=1), "unknown field kk"),
    "unknown mask field": (lambda c: c["mask"].update(eps=1), "unknown field mask.eps"),
    "missing": (lambda c: c.pop("k"), "'k' is missing"),
    "k of 0": (lambda c: c.update(k=0), "k must be 1 or more"),
    "k above d_ffn": (lambda c: c.update(k=161), "between 1 and d_ffn = 160"),
    "k text": (lambda c: c.update(k="64"), "k must be 1 or more"),
    "k list": (lambda c: c.update(k=[64, 64]), "k has 2 entries for 3 layers"),
    "operator": (lambda c: c["mask"].update(operator="hard"), "mask.operator must be one of topk"),
    "temperature": (lambda c: c["mask"].update(temperature=0), "mask.temperature"),
    "soft top-k": (lambda c: c["mask"].update(keep_soft_values=True), "mask.keep_soft_values"),
    "activation": (lambda c: c["head"].update(activation="tanh"), "head.activation must be one"),
    "norm": (lambda c: c["head"].update(feature_norm="rms"), "head.feature_norm must be one"),
    "biases": (lambda c: c["head"].update(biases=[True]), "head.biases"),
    "head width": (lambda c: c["head"].update(widths=[48, 128, 479]), "gives 479 scores"),
    "text": (lambda c: c["text"].update(format="xml"), "text.format must be one of"),
    "max tokens": (lambda c: c["text"].update(max_tokens=0), "text.max_tokens"),
    "selector": (lambda c: c.update(selector="magic"), "selector must be one of"),
    "no head": (lambda c: c.update(head=None), "head is missing"),
    "files": (lambda c: c.update(files=[]), "files must be an object"),
    "file record": (
        lambda c: c["files"]["model.safetensors"].update(bytes="many"),
        "files.model.safetensors must hold",
    ),
    "escape": (
        lambda c: c["files"].update({"../model.safetensors": {"bytes": 1, "sha256": ""}}),
        "leaves the directory",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_in_the_config(checkpoint, fault):
    change, expected = CONFIG_FAULTS[fault]
    edit_config(checkpoint, change)
    text = message(checkpoint)
    assert expected in text
    assert "ifp_config.json" in text


GATE = "model.layers.1.mlp.gate_proj.weight"


def _replace(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


TENSOR_FAULTS = {
    "missing channel": ("channels.safetensors", lambda t: t.pop(GATE), GATE),
    "missing trunk": ("model.safetensors", lambda t: t.pop("model.norm.weight"), "model.norm"),
    "missing head": ("predictor/head.safetensors", lambda t: t.pop("linear2.bias"), "linear2.bias"),
    "missing backbone": (
        "predictor/model.safetensors",
        lambda t: t.pop("model.norm.weight"),
        "model.norm",
    ),
    "extra": (
        "model.safetensors",
        lambda t: t.update(extra=np.zeros(3, np.float32)),
        "extra does not belong",
    ),
    "shape": ("channels.safetensors", _replace(GATE, lambda a: a[:-1].copy()), "(159, 64)"),
    "transposed": ("channels.safetensors", _replace(GATE, lambda a: a.T.copy()), "(64, 160)"),
    "dtype": ("channels.safetensors", _replace(GATE, lambda a: a.view(np.uint32)), "type U32"),
    "foreign dtype": (
        "channels.safetensors",
        _replace(GATE, lambda a: a.astype(np.float64)),
        "type F64",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_fault_in_a_tensor(checkpoint, fault):
    file, change, expected = TENSOR_FAULTS[fault]
    edit_tensors(checkpoint, file, change)
    text = message(checkpoint)
    assert expected in text
    assert str(checkpoint) in text


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "channels.safetensors",
        "predictor/model.safetensors",
        "predictor/head.safetensors",
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_file_is_named(checkpoint, file, part):
    path = checkpoint / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    text = message(checkpoint)
    assert str(path) in text
    assert "truncated" in text


@pytest.mark.parametrize(
    "file", ["model.safetensors", "channels.safetensors", "predictor/head.safetensors"]
)
def test_a_missing_file_is_named(checkpoint, file):
    (checkpoint / file).unlink()
    assert str(checkpoint / file) in message(checkpoint)


@pytest.mark.parametrize("file", ["ifp_config.json", "config.json", "predictor/config.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"model_type": ', "\x00\x01"])
def test_a_json_file_that_is_not_one(checkpoint, file, content):
    (checkpoint / file).write_text(content)
    assert file in message(checkpoint)


def test_quantized_channels_need_their_settings(tmp_path):
    dense = make_dense(tmp_path / "dense")
    checkpoint = convert(str(dense), tmp_path / "ifp", quantize_weights=True)
    config = json.loads((checkpoint / "config.json").read_text())
    changed = config["quantization"] | {"bits": 8}
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization": changed}))
    assert "has the shape" in message(checkpoint)
    del config["quantization"], config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "config.json has no 'quantization'" in message(checkpoint)


def test_static_scores_must_fit(checkpoint):
    record = write_safetensors(checkpoint / "static.safetensors", {"scores": mx.zeros((3, 99))})
    edit_config(checkpoint, lambda c: c["files"].update({"static.safetensors": record}))
    assert "scores has the shape (3, 99)" in message(checkpoint)


def test_static_selector_needs_scores(tiny_checkpoint):
    with pytest.raises(IFPError, match="no selector 'static'; it has: activations"):
        load(tiny_checkpoint, selector="static")


def test_digest_changes_with_the_weights(tmp_path):
    one, _ = make_predictor_checkpoint(tmp_path / "one")
    same, _ = make_predictor_checkpoint(tmp_path / "same")
    other, _ = make_predictor_checkpoint(tmp_path / "other", llm={"seed": 5})
    digests = [open_checkpoint(path).digest for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_written_tensors_are_safetensors(tmp_path):
    arrays = {
        "a": mx.random.normal((5, 3)).T,
        "b": mx.arange(7).astype(mx.bfloat16),
        "c": mx.array([[1, 2, 3]], mx.uint8),
        "d": mx.array([1.5, 2.5], mx.float16),
        "e": mx.array([1, 2], mx.uint32),
    }
    expected = dict(arrays)
    seen = []
    record = write_safetensors(tmp_path / "t.safetensors", arrays, seen.append)
    assert not arrays
    back = mx.load(str(tmp_path / "t.safetensors"))
    assert back.keys() == expected.keys()
    assert all(back[n].dtype == expected[n].dtype for n in back)
    assert all(mx.array_equal(back[n], expected[n]) for n in back)
    assert record["bytes"] == (tmp_path / "t.safetensors").stat().st_size
    assert seen == [array.nbytes for array in expected.values()]
    assert read_header(tmp_path / "t.safetensors")["a"].shape == (3, 5)


def test_a_directory_is_made_whole_or_not_at_all(tmp_path):
    def failing():
        with new_directory(tmp_path / "out") as directory:
            (directory / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "out") as directory:
        (directory / "part").write_text("whole")
    with pytest.raises(IFPError, match="already exists"), new_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "part"]
    assert (tmp_path / "out" / "part").read_text() == "whole"


def test_what_is_made_has_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").touch()
        with new_file(tmp_path / "file") as file:
            file.touch()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
