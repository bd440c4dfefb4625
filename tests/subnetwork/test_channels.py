"""Only the rows of a selection are read, and only these are in memory."""

import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.files.tensor_files import read_header
from mlx_ifp.subnetwork import channels, residents, rows
from mlx_ifp.subnetwork.channels import ChannelReader

from ..conftest import make_dense
from ..helpers import memory_peak, random_selection


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_equal_what_mlx_loads(tmp_path, dtype):
    dense = make_dense(tmp_path / "dense")
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp", dtype=dtype))
    whole = mx.load(str(tmp_path / "ifp" / "channels.safetensors"))
    reader = ChannelReader(checkpoint.channels)
    rows = np.array([0, 3, 4, 5, 90, 159], np.int32)
    for name, expected in whole.items():
        some, every = reader.read([[(name, rows)], [(name, None)]])
        assert some.dtype == expected.dtype == getattr(mx, dtype)
        assert mx.array_equal(some, expected[mx.array(rows)])
        assert mx.array_equal(every, expected)


def test_parts_are_read_below_one_another(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    reader = ChannelReader(checkpoint.channels)
    names = [f"model.layers.1.mlp.{p}.weight" for p in ("gate_proj", "up_proj")]
    rows = np.array([7, 8, 100], np.int32)
    (both,) = reader.read([[(name, rows) for name in names]])
    apart = reader.read([[(name, rows)] for name in names])
    assert mx.array_equal(both, mx.concatenate(apart))


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4-bit"])
def test_generate_path_reads_and_holds_only_its_share(tmp_path, quantized):
    """Bytes read and peak memory are within 10% of k / d_ffn of the whole FFN."""
    dense = make_dense(
        tmp_path / "dense",
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=8,
    )
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=1024, quantize_weights=quantized)
    model, _ = load(checkpoint, cache=False)
    whole = model.reader.nbytes
    selection = random_selection(8, 4096, 1024)
    with memory_peak() as peak:
        network = model.subnetwork(selection)
        network(mx.array([[1, 2, 3]])).tolist()
    assert model.reader.bytes_read == whole // 4
    assert whole / 4 <= peak.nbytes <= 1.1 * whole / 4


def test_a_file_that_changes_under_us_is_an_error(tiny_checkpoint, tmp_path):
    data = (tiny_checkpoint / "channels.safetensors").read_bytes()
    checkpoint = open_checkpoint(tiny_checkpoint)
    moved = tmp_path / "channels.safetensors"
    moved.write_bytes(data)
    info = {
        name: type(tensor)(moved, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
        for name, tensor in checkpoint.channels.items()
    }
    reader = ChannelReader(info)
    name = next(iter(info))
    reader.read([[(name, None)]])
    moved.write_bytes(data[: len(data) // 2])
    with pytest.raises(IFPError, match=r"channels\.safetensors was changed"):
        reader.read([[(name, None)]])
    moved.unlink()
    with pytest.raises(IFPError, match="is gone"):
        reader.read([[(name, None)]])


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A copy of a checkpoint's channels that a test may damage, and its tensors."""
    path = tmp_path / "channels.safetensors"
    path.write_bytes((tiny_checkpoint / "channels.safetensors").read_bytes())
    return path, read_header(path)


@pytest.mark.parametrize("rows", [None, [0, 5, 159], list(range(160))], ids=["all", "some", "run"])
def test_a_file_truncated_in_the_middle_of_a_read_is_an_error(copied, monkeypatch, rows):
    path, tensors = copied
    reader = ChannelReader(tensors)
    name = max(tensors, key=lambda name: tensors[name].offset)
    rows = rows and np.array(rows, np.int32)
    preadv = os.preadv

    def truncate_and_read(*args):
        os.truncate(path, tensors[name].offset + 100)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", truncate_and_read)
    with pytest.raises(IFPError, match=r"channels\.safetensors was changed while in use: it ends"):
        reader.read([[(name, rows)]])
    assert reader.bytes_read == 0


def test_a_file_written_to_in_the_middle_of_a_read_is_an_error(copied, monkeypatch):
    path, tensors = copied
    reader = ChannelReader(tensors)
    preadv = os.preadv

    def read_and_write(*args):
        with open(path, "r+b") as file:
            file.write(b"\0" * 8)
        os.utime(path, ns=(1, 1))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", read_and_write)
    with pytest.raises(IFPError, match=r"channels\.safetensors was changed while in use"):
        reader.read([[(next(iter(tensors)), None)]])


def test_reads_in_pieces_are_put_together(copied, monkeypatch):
    """The system may return less than was asked for."""
    tensors = copied[1]
    whole = mx.load(str(copied[0]))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:1000]], at))
    rows = np.array([0, 1, 2, 3, 40, 41, 43, 159], np.int32)
    reader = ChannelReader(tensors)
    for name, expected in whole.items():
        (some,) = reader.read([[(name, rows)]])
        assert mx.array_equal(some, expected[mx.array(rows)])


@pytest.mark.parametrize("seed", range(6))
def test_stretches_cover_all_rows_once(monkeypatch, seed):
    """Long runs are read alone, wide gaps are not read, the rest in pieces of a block."""
    for name, value in (("_GAP_BYTES", 40), ("_RUN_BYTES", 80), ("_BLOCK_BYTES", 200)):
        monkeypatch.setattr(channels, name, value)
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(np.repeat(rng.random(80) < 0.1 + seed / 8, rng.integers(1, 9, 80)))
    stretches = list(zip(*channels._stretches(rows, 10), strict=True))
    assert [i for start, stop in stretches for i in range(start, stop)] == list(range(len(rows)))
    for start, stop in stretches:
        steps = np.diff(rows[start:stop])
        if (steps != 1).any():
            assert steps.max() - 1 <= 40 // 10
            assert rows[stop - 1] - rows[start] < 200 // 10
            runs = np.split(rows[start:stop], np.flatnonzero(steps != 1) + 1)
            # A piece may end inside a run, never inside a long one.
            assert max(map(len, runs)) < 80 // 10


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The bytes of each request to the system."""
    sizes, preadv = [], os.preadv

    def count(fd, views, at):
        sizes.append(len(views[0]))
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", count)
    return sizes


def test_only_short_gaps_are_read_too(copied, asked, monkeypatch):
    """What is asked of the system: runs alone if the gaps are wide."""
    tensors = copied[1]
    monkeypatch.setattr(channels, "_GAP_BYTES", 2 * 256)
    reader = ChannelReader(tensors)
    name = next(name for name in tensors if name.endswith("weight"))
    reader.read([[(name, np.array([0, 1, 2, 80, 81, 84, 159], np.int32))]])
    # 64 floats a row: three rows, five with two of a gap among them, one.
    assert sorted(asked) == [256, 3 * 256, 5 * 256]
    assert (reader.bytes_read, reader.bytes_touched) == (7 * 256, sum(asked))


@pytest.mark.parametrize("targets", [1024, 4])
def test_long_rows_are_read_with_one_request_to_where_they_belong(copied, monkeypatch, targets):
    """Narrow gaps go to a scratch, wide ones are not read, and no request has too many targets."""
    tensors = copied[1]
    monkeypatch.setattr(channels, "_GAP_BYTES", 2 * 256)
    monkeypatch.setattr(channels, "_LONG_ROW_BYTES", 256)
    monkeypatch.setattr(channels, "_TARGETS", targets)
    lengths, preadv = [], os.preadv

    def count(fd, views, at):
        lengths.append([len(view) // 256 for view in views])
        # The system may return less than was asked for, and end inside of a target.
        return preadv(fd, [views[0][:-100] or views[0]], at) if len(views) > 4 else preadv(
            fd, views, at
        )  # fmt: skip

    monkeypatch.setattr(os, "preadv", count)
    name = next(name for name in tensors if name.endswith("weight"))
    rows = np.array([0, 1, 2, 80, 81, 84, 85, 87, 90, 159], np.int32)
    reader = ChannelReader(tensors)
    (some,) = reader.read([[(name, rows)]])
    assert mx.array_equal(some, mx.load(str(copied[0]))[name][mx.array(rows)])
    # Three gaps of at most two rows are read, unless a request ends there.
    assert reader.bytes_touched == (14 if targets == 4 else 15) * 256
    if targets == 4:
        assert lengths == [[3], [2, 2, 2], [1, 2, 1], [1]]
    else:
        assert lengths[:2] == [[3], [2, 2, 2, 1, 1, 2, 1]] and lengths[-1] == [1]


def test_a_thread_reads_several_small_tensors(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    submitted = []
    submit = model.reader.pool.submit
    model.reader.pool.submit = lambda *work: submitted.append(work) or submit(*work)
    model.subnetwork(random_selection(3, 160, 64))
    assert len(submitted) == 3  # one a layer, which has three tensors


def test_the_next_layers_are_read_while_one_is_used():
    said = []

    class Layer:
        def __init__(self, i):
            self.i = i
            said.append(("begin", i))

        def start(self):
            said.append(("start", self.i))

        def rows(self):
            said.append(("rows", self.i))
            return self.i

    assert list(rows.read_in_turn(map(Layer, range(6)))) == list(range(6))
    for i in range(6):
        before = said[: said.index(("rows", i))]
        begun = [layer for what, layer in before if what == "begin"]
        assert begun == list(range(min(i + rows._AHEAD + 1, 6)))
        assert all(("start", layer) in before for layer in range(min(i + rows._AHEAD, 6)))


@pytest.fixture
def own_memory(monkeypatch):
    """A stand-in for a device whose memory the processor does not write to."""
    monkeypatch.setattr(channels, "shares_memory", lambda: False)
    monkeypatch.setattr(residents, "shares_memory", lambda: False)

    def never(arrays):
        raise AssertionError("the memory of an array was asked for")

    monkeypatch.setattr(channels, "row_bytes", never)
    monkeypatch.setattr(residents, "row_bytes", never)


@pytest.mark.parametrize("how", [{}, {"quantize_weights": True, "q_group_size": 32}])
def test_a_device_with_its_own_memory_gets_the_same_rows(tmp_path, request, how):
    """Fresh rows are copied to the device. Those that it has are gathered there."""
    dense = make_dense(tmp_path / "dense", "phi3")
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=64, **how)
    first, second = (random_selection(3, 160, k, soft=True, seed=k) for k in (64, 70))
    expected, _ = load(checkpoint, cache=False)
    expected = [dict(tree_flatten(expected.subnetwork(s).parameters())) for s in (first, second)]
    request.getfixturevalue("own_memory")
    model, _ = load(checkpoint, cache=False)
    for selection, arrays in zip((first, second), expected, strict=True):
        prepared = model.prepare(selection=selection)
        for name, array in tree_flatten(prepared.network.parameters()):
            assert array.dtype == arrays[name].dtype
            assert mx.array_equal(array, arrays[name]), name
    assert prepared.channels_reused > 0
    # With the whole network in memory nothing is read.
    model.networks.clear()
    model.dense()
    assert model.prepare(selection=first).bytes_read == 0
