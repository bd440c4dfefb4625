"""safetensors files: headers read without the data, and files written tensor by tensor."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError

from .errors import IFPError

# safetensors' names of the types we store; the rest has no place in a checkpoint.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, type, shape, first byte in the file, and size in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    """huggingface_hub's reading of the header, and the first byte of the data."""
    try:
        size = path.stat().st_size
        tensors = parse_local_safetensors_file_metadata(path).tensors
        with open(path, "rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
        ends = [(tensor.data_offsets[1], name) for name, tensor in tensors.items()]
    except FileNotFoundError as error:
        raise IFPError(f"{path}: the file is missing.") from error
    except (SafetensorsParsingError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IFPError(f"{path}: not a readable safetensors file, or truncated.") from error
    end, name = max(ends, default=(0, ""))
    if start + end > size:
        raise IFPError(
            f"{path}: {name} ends at byte {start + end:,}, but the file has {size:,}; "
            "it is truncated. Download or convert it again."
        )
    return tensors, start


def check_not_truncated(path: Path) -> None:
    """Raises IFPError if the file is shorter than its header says, or has no such header."""
    _parse(path)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, without reading their data.

    Raises:
        IFPError: if the file is missing, malformed, truncated, or holds a type we do not know.
    """
    tensors, start = _parse(path)
    header = {}
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        if tensor.dtype not in DTYPES:
            raise IFPError(f"{path}: {name} has the type {tensor.dtype}, which is not supported.")
        shape = tuple(tensor.shape)
        nbytes = DTYPES[tensor.dtype].size
        for length in shape:
            nbytes *= length
        if begin < 0 or end - begin != nbytes:
            raise IFPError(f"{path}: {name} does not have the size its shape {shape} needs.")
        header[name] = TensorInfo(path, tensor.dtype, shape, start + begin, nbytes)
    return header


def check_tensors(
    where: Path,
    found: dict[str, TensorInfo],
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]],
) -> None:
    """Compare tensors with what they must be: name -> (shape, allowed dtypes).

    Raises:
        IFPError: naming the file and the first tensor that is missing, extra or wrong.
    """
    for name, (shape, dtypes) in expected.items():
        if name not in found:
            raise IFPError(f"{where}: the tensor {name} is missing.")
        tensor = found[name]
        if tensor.shape != shape:
            raise IFPError(f"{tensor.path}: {name} has the shape {tensor.shape}, expected {shape}.")
        if tensor.dtype not in dtypes:
            raise IFPError(
                f"{tensor.path}: {name} has the type {tensor.dtype}, "
                f"expected {' or '.join(dtypes)}."
            )
    for name in sorted(found.keys() - expected.keys()):
        raise IFPError(f"{found[name].path}: the tensor {name} does not belong to this model.")


def write_safetensors(
    path: Path,
    arrays: dict[str, mx.array],
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Write arrays one at a time, emptying ``arrays`` on the way.

    mlx's own writer evaluates all arrays before it writes the first. Here lazy arrays (loaded,
    cast, quantized) are evaluated, written and dropped in turn, so the largest one bounds the
    memory.

    Args:
        path (Path): the file; it must not exist.
        arrays (dict): name -> array, evaluated or not.
        progress (Callable): called with the bytes of each tensor written.

    Returns:
        dict: ``bytes`` and ``sha256`` of the file.

    Raises:
        OSError: if the disk is full or the path cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, array in arrays.items():
        if array.dtype not in names:
            raise IFPError(f"{name} has the type {array.dtype}, which a checkpoint cannot hold.")
        end = offset + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(struct.pack("<Q", len(text)))
        put(text)
        for name in list(arrays):
            array = mx.contiguous(arrays.pop(name))
            # numpy's buffer protocol has no bfloat16.
            data = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            mx.eval(data)
            put(memoryview(data).cast("B") if data.size else b"")
            progress(data.nbytes)
            del array, data
            mx.clear_cache()
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}
