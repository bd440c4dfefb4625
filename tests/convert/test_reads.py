"""What a conversion reads and writes, in counts: each byte once, in memory that is used again."""

import builtins
import hashlib
import io
import json
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp.convert import convert, streams
from mlx_ifp.convert.sources import tensor as sources
from mlx_ifp.files import tensor_files
from mlx_ifp.files.tensor_files import BLOCK_BYTES, WRITE_BYTES, LazyTensor, write_safetensors

from ..conftest import make_dense
from .trained import save_run


class Counting(io.FileIO):
    """A file that notes the bytes that are read and written, and the longest write."""

    counts: list[int]
    longest: list[int]

    def readinto(self, buffer):
        self.counts.append(super().readinto(buffer))
        return self.counts[-1]

    def write(self, data):
        self.longest[0] = max(self.longest[0], memoryview(data).nbytes)
        # The system may write less than it is asked to.
        self.counts.append(super().write(memoryview(data)[:100_000]))
        return self.counts[-1]


@pytest.fixture
def counted(monkeypatch):
    """Returns a function that counts a module's reads and writes from now on."""

    def count(module):
        counts, longest = [], [0]
        kind = type("Noting", (Counting,), {"counts": counts, "longest": longest})

        def opened(path, mode="r", buffering=-1):
            return builtins.open(path, mode, buffering) if buffering else kind(path, mode)

        monkeypatch.setattr(module, "open", opened, raising=False)
        return counts, longest

    return count


def data_bytes(file) -> int:
    """Bytes of a safetensors file without its header."""
    data = file.read_bytes()
    return len(data) - 8 - struct.unpack("<Q", data[:8])[0]


def test_a_dense_model_is_read_once(tmp_path, counted):
    source = make_dense(tmp_path / "dense")
    counts, _ = counted(sources)
    convert(str(source), tmp_path / "out", prior=False)
    assert sum(counts) == data_bytes(source / "model.safetensors")


@pytest.mark.torch
def test_a_pickled_model_is_read_once_and_as_the_float_one_is(tmp_path, counted):
    torch = pytest.importorskip("torch", reason="needs the extra [torch]")
    source = make_dense(tmp_path / "dense")
    counts, _ = counted(sources)
    convert(str(source), tmp_path / "out", prior=False)
    arrays = mx.load(str(source / "model.safetensors"))
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    torch.save(state, source / "pytorch_model.bin")
    for file in source.glob("model.safetensors*"):
        file.unlink()
    before = list(counts)
    counts.clear()
    convert(str(source), tmp_path / "pickled", prior=False)
    assert sorted(counts) == sorted(before)
    for name in ("model.safetensors", "channels.safetensors"):
        assert (tmp_path / "pickled" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_of_a_trained_model_only_an_embedding_that_is_shared_is_read_twice(tmp_path, counted):
    given = save_run(tmp_path / "run", "module")
    embedding = mx.load(str(tmp_path / "run" / "model.safetensors"))[
        "llm.model.embed_tokens.weight"
    ]
    counts, _ = counted(sources)
    convert(**given, mlx_path=tmp_path / "out")
    assert sum(counts) == data_bytes(tmp_path / "run" / "model.safetensors") + embedding.nbytes


def test_blocks_are_read_into_a_few_buffers(tmp_path, monkeypatch):
    source = make_dense(tmp_path / "dense")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(streams, "BLOCK_BYTES", 2048)
    buffers, places = sources._Buffers(), []

    class Noted:
        def take(self, nbytes):
            data = buffers.take(nbytes)
            if nbytes <= 2048:
                places.append(data.__array_interface__["data"][0])
            return data

    monkeypatch.setattr(sources, "buffers", Noted())
    monkeypatch.setattr(streams, "buffers", Noted())
    convert(str(source), tmp_path / "out", prior=False)
    assert len(set(places)) <= len(buffers.blocks) < len(places) / 10


def test_writes_are_short_and_the_file_is_what_it_always_was(tmp_path, counted):
    rows = np.random.default_rng(0).integers(0, 1 << 32, (3, 700_001), dtype=np.uint32)
    arrays = {
        "blocks": LazyTensor(rows.shape, mx.uint32, lambda start, stop: rows[start:stop], step=1),
        "whole": mx.array(rows[:, :1000]).T,
        "empty": mx.zeros((0, 4)),
    }
    assert rows[0].nbytes > BLOCK_BYTES > WRITE_BYTES
    counts, longest = counted(tensor_files)
    record = write_safetensors(tmp_path / "a.safetensors", arrays)
    sizes = (rows.nbytes, 12_000, 0)
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    header = json.dumps(
        {
            "__metadata__": {"format": "mlx"},
            "blocks": {"dtype": "U32", "shape": [3, 700_001], "data_offsets": [0, ends[0]]},
            "whole": {"dtype": "U32", "shape": [1000, 3], "data_offsets": ends[:2]},
            "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": ends[1:]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + rows.tobytes()
    expected += rows[:, :1000].T.tobytes()
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == expected
    assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sum(counts) == len(data)
    assert longest[0] <= WRITE_BYTES
