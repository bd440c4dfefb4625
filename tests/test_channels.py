"""Only the rows of a selection are read, and only they are in memory."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.channels import ChannelReader
from mlx_ifp.checkpoint import open_checkpoint
from mlx_ifp.convert import convert

from .conftest import make_dense
from .helpers import random_selection


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
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    network = model.subnetwork(selection)
    network(mx.array([[1, 2, 3]])).tolist()
    read, held = model.reader.bytes_read, mx.get_peak_memory() - before
    assert read == whole // 4
    assert whole / 4 <= held <= 1.1 * whole / 4


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
