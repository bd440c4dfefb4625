"""Pickled checkpoints: what PyTorch wrote is read without running anything in it.

Run with: pytest -m torch.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlx_ifp import IFPError
from mlx_ifp.convert.sources.files import open_tensors

from ..convert.test_layouts import FLAGS
from ..convert.test_layouts_bad_input import convert_fails, damaged

torch = pytest.importorskip("torch", reason="needs the extra [torch]")

pytestmark = pytest.mark.torch


class Poison:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def values(tensors) -> dict[str, np.ndarray]:
    """Copies: what read returns is only good until two more reads."""
    return {n: t.read(0, t.shape[0] if t.shape else 1).copy() for n, t in tensors.items()}


def bits(tensor) -> np.ndarray:
    size = tensor.element_size()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().reshape(-1).view(kinds[size]).numpy().view(f"u{size}")
    return flat.reshape(tensor.shape)


@pytest.mark.parametrize("legacy", [False, True])
def test_all_kinds_of_tensors(tmp_path, legacy):
    """Types, views that share a storage, transposed ones, scalars, nested dicts."""
    base = torch.randn(6, 4)
    state = {
        "a": base,
        "rows": base[2:5],
        "turned": base.T,
        "half": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(3).half(),
        "count": torch.tensor([7, 8]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    torch.save(
        {"model": state, "step": 3, "name": "x"},
        tmp_path / "model.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    found = open_tensors(tmp_path / "model.pt")
    assert {name: t.dtype for name, t in found.items()} == {
        "model.a": "F32", "model.rows": "F32", "model.turned": "F32", "model.half": "BF16",
        "model.float16": "F16", "model.count": "I64", "model.scalar": "F32", "model.empty": "F32",
    }  # fmt: skip
    for name, got in values(found).items():
        tensor = state[name.removeprefix("model.")]
        assert np.array_equal(got, bits(tensor)), name
    assert np.array_equal(found["model.a"].read(2, 4), bits(base[2:4]))
    assert np.array_equal(found["model.turned"].read(1, 3), bits(base.T[1:3]))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    """By count: of a 4 MB tensor two rows."""
    from mlx_ifp.convert.sources.tensor import buffers

    torch.save({"a": torch.randn(1000, 1000)}, tmp_path / "model.pt")
    tensor = open_tensors(tmp_path / "model.pt")["a"]
    taken = []
    take = buffers.take
    monkeypatch.setattr(buffers, "take", lambda n: taken.append(n) or take(n))
    tensor.read(10, 12)
    assert taken == [8000]


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_poisoned_pickle_runs_nothing(tmp_path, kind):
    run = damaged(tmp_path, "split")
    trap = tmp_path / "trap"
    file = run / "extractor.pt"
    (run / "extractor.safetensors").unlink()
    state = {"norm.weight": torch.ones(3), "trap": Poison(trap)}
    if kind == "bare":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    line = convert_fails(run, tmp_path / "out", *FLAGS["split"])
    assert "holds more than tensors" in line
    assert kind == "bare" or "posix.system" in line
    assert not trap.exists()
    # The trap is armed: unpickling it without restrictions springs it.
    pickle.loads(pickle.dumps(Poison(trap)))
    assert trap.exists()


def test_a_zip_bomb(tmp_path):
    """A compressed archive, and one whose records claim more than the file holds."""
    torch.save({"a": torch.ones(4)}, tmp_path / "good.pt")
    bomb = tmp_path / "model.pt"
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, good.read(name))
        archive.writestr("good/data/9", bytes(200 << 20))
    assert bomb.stat().st_size < 1 << 20
    assert "compressed zip file" in convert_fails(bomb, tmp_path / "out", *FLAGS["module"])
    data = bytearray((tmp_path / "good.pt").read_bytes())
    where = data.rindex(b"PK\x01\x02")  # the last record of the directory
    data[where + 20 : where + 28] = (1 << 30).to_bytes(4, "little") * 2
    bomb.write_bytes(data)
    line = convert_fails(bomb, tmp_path / "out", *FLAGS["module"])
    assert "claim more than the file holds" in line or "damaged" in line


def test_a_tensor_larger_than_its_data(tmp_path):
    """A stride of 0 lets 16 bytes look like any size."""
    huge = torch.ones(4).as_strided((1 << 20, 1 << 20), (0, 0))
    for legacy in (False, True):
        torch.save(
            {"llm.a": huge}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(IFPError, match="larger than its data"):
            open_tensors(tmp_path / "model.pt")


def test_tensors_that_have_no_plain_data(tmp_path):
    cyclic = {}
    cyclic["a"] = cyclic
    for content, expected in (
        ({"a": torch.eye(3).to_sparse()}, "cannot read it"),
        ({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, "two tensors are called a.b"),
        ({"a": torch._neg_view(torch.ones(2))}, "negative or conjugate"),
        (cyclic, "cannot read it"),
    ):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(IFPError, match=expected):
            open_tensors(tmp_path / "model.pt")
    torch.save({"list": [torch.ones(1), {"b": torch.ones(2)}]}, tmp_path / "model.pt")
    assert sorted(open_tensors(tmp_path / "model.pt")) == ["list.0", "list.1.b"]


def test_a_file_of_a_big_endian_machine(tmp_path):
    """PyTorch itself would crash on it."""
    torch.save({"a": torch.ones(4)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "model.pt", "w") as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, b"big" if name.endswith("byteorder") else good.read(name))
    line = convert_fails(tmp_path / "model.pt", tmp_path / "out", *FLAGS["module"])
    assert "big-endian" in line


def test_a_distributed_tensor_is_loaded_once(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.randn(10, 3), "b": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    loads, load = [], dcp.load
    monkeypatch.setattr(dcp, "load", lambda state, **kw: loads.append(1) or load(state, **kw))
    tensor = open_tensors(tmp_path)["a"]
    for start in range(0, 10, 2):
        tensor.read(start, start + 2)
    assert len(loads) == 1


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_truncated_file(tmp_path, legacy):
    file = tmp_path / "model.pt"
    torch.save({"a": torch.randn(5000)}, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    for size in (0, 1, 100, 10_000, len(whole) - 1):
        file.write_bytes(whole[:size])
        line = convert_fails(file, tmp_path / "out", *FLAGS["module"])
        assert str(file) in line


def test_what_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.pt"
    for content in ([1, 2], {"step": 3}, "text"):
        torch.save(content, file)
        assert "no tensors" in convert_fails(file, tmp_path / "out", *FLAGS["module"])
    file.write_bytes(b"garbage" * 100)
    assert str(file) in convert_fails(file, tmp_path / "out", *FLAGS["module"])
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    assert "PyTorch cannot read it" in convert_fails(file, tmp_path / "out", *FLAGS["module"])
    torch.save({"llm.a": torch.ones(2), "other": torch.ones(2)}, file)
    assert "a known layout" in convert_fails(file, tmp_path / "out", *FLAGS["module"])
    run = tmp_path / "two"
    run.mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.ones(2)}, run / name)
    assert "holds a.pt, b.pt; name the one" in convert_fails(run, tmp_path / "out")


def test_a_poisoned_distributed_checkpoint(tmp_path):
    """PyTorch would unpickle .metadata without asking."""
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    dcp.save({"llm.a": torch.ones(3)}, checkpoint_id=run, no_dist=True)
    assert np.array_equal(values(open_tensors(run))["llm.a"], bits(torch.ones(3)))
    (run / "__0_0.distcp").rename(run / "moved")
    assert "is missing; .metadata names it" in convert_fails(run, tmp_path / "out")
    trap = tmp_path / "trap"
    (run / ".metadata").write_bytes(pickle.dumps(Poison(trap)))
    line = convert_fails(run, tmp_path / "out")
    assert "posix.system" in line
    (run / ".metadata").write_bytes(b"\x80\x04garbage")
    assert ".metadata" in convert_fails(run, tmp_path / "out")
    assert not trap.exists()


def test_an_index_of_pickles_that_leaves_the_directory(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"llm.a": torch.ones(3)}, tmp_path / "outside.bin")
    index = {"weight_map": {"llm.a": "../outside.bin"}}
    (run / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "not a file of this directory" in convert_fails(run, tmp_path / "out")
