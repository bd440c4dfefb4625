"""safetensors files: headers read without the data, and files written tensor by tensor."""

import hashlib
import json
import math
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata

from ..errors import IFPError

# The types that a checkpoint may hold, by their names in safetensors.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATS = ("F32", "F16", "BF16")
# Bytes that are read at a time. Two MB stay in a processor's cache until they are written.
BLOCK_BYTES = 2 << 20
# Bytes that are written at a time. With 2 MB, copying 1.6 GB took 5 s instead of 0.6 in some runs
# on a virtual machine. A probable cause: Linux takes one piece of memory for a long write, and the
# machine has given the large pieces back to its host.
WRITE_BYTES = 256 << 10
# How many blocks hashing may lag behind the one that is written.
BLOCKS_HELD = 4
_BYTES = {name: dtype.size for name, dtype in DTYPES.items()} | {"I64": 8, "I32": 4, "F64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, type, shape, first byte in the file, and size in bytes.

    Attributes:
        places: of FFN channels that are stored in another order: int64 [rows], the row of each
            channel; None if channel i is row i.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    places: np.ndarray | None = field(default=None, compare=False, repr=False)


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header with huggingface_hub, and find the first byte of the data."""
    try:
        size = path.stat().st_size
        tensors = parse_local_safetensors_file_metadata(path).tensors
        with open(path, "rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
        for name, tensor in tensors.items():
            numbers = [*tensor.data_offsets, *tensor.shape]
            if len(tensor.data_offsets) != 2 or not all(map(_is_size, numbers)):
                raise ValueError(name)
        ends = [(tensor.data_offsets[1], name) for name, tensor in tensors.items()]
    except FileNotFoundError as error:
        raise IFPError(f"{path}: the file is missing.") from error
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:
        raise IFPError(f"{path}: not a readable safetensors file, or truncated.") from error
    end, name = max(ends, default=(0, ""))
    if start + end > size:
        raise IFPError(
            f"{path}: {name} ends at byte {start + end:,}, but the file has {size:,}; "
            "it is truncated. Download or convert it again."
        )
    return tensors, start


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_any_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, of any type, without reading their data.

    Raises:
        IFPError: if the file is missing, malformed or truncated.
    """
    tensors, start = _parse(path)
    header = {}
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        nbytes = math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 0)
        if begin < 0 or end < begin or (tensor.dtype in _BYTES and end - begin != nbytes):
            shape = tuple(tensor.shape)
            raise IFPError(f"{path}: {name} does not have the size its shape {shape} needs.")
        header[name] = TensorInfo(
            path, tensor.dtype, tuple(tensor.shape), start + begin, end - begin
        )
    return header


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint's file, without reading their data.

    Raises:
        IFPError: if the file is missing, malformed, truncated, or holds a type we do not know.
    """
    header = read_any_header(path)
    for name, tensor in header.items():
        if tensor.dtype not in DTYPES:
            raise IFPError(f"{path}: {name} has the type {tensor.dtype}, which is not supported.")
    return header


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is its turn to be written, some rows at a time.

    Attributes:
        shape: of the whole.
        dtype: its type.
        read: rows start to stop, along the first axis, as an MLX array, or as a numpy one of
            ``dtype``'s bits (numpy has no bfloat16), which need only last for BLOCKS_HELD more
            reads.
            A tensor without axes has one row.
        step: rows to read at a time; 0 for all at once.
        held: bytes that reading keeps in memory besides what it returns.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[int, int], mx.array | np.ndarray]
    step: int = 0
    held: int = 0

    @classmethod
    def of(cls, array: mx.array) -> "LazyTensor":
        """Wrap an array, evaluated or not."""
        return cls(
            tuple(array.shape),
            array.dtype,
            lambda start, stop: array if stop - start == len_of(array.shape) else array[start:stop],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.size

    def blocks(self) -> Iterator[mx.array | np.ndarray]:
        """The rows in order, ``step`` at a time."""
        rows = len_of(self.shape)
        step = self.step or rows
        for start in range(0, rows, max(step, 1)):
            yield self.read(start, min(start + step, rows))


def len_of(shape: tuple[int, ...]) -> int:
    """Rows along the first axis; 1 if there is none."""
    return shape[0] if shape else 1


@dataclass
class Spent:
    """Seconds that :func:`write_safetensors` has taken in this process.

    Attributes:
        making: reading, casting, transposing and quantizing.
        writing: the calls that write.
        waiting: waiting for hashes.
        hashing: hashing, which a thread of its own does meanwhile.
    """

    making: float = 0.0
    writing: float = 0.0
    waiting: float = 0.0
    hashing: float = 0.0


spent = Spent()


def write_safetensors(
    path: Path,
    tensors: dict[str, mx.array] | dict[str, LazyTensor] | dict[str, mx.array | LazyTensor],
    progress: Callable[[int], Any] = lambda _: None,
    *,
    digest: bool = True,
) -> dict[str, Any]:
    """Write tensors one at a time, emptying ``tensors`` on the way.

    mlx's own writer evaluates all arrays before it writes the first. Here lazy arrays (loaded,
    cast, quantized) are evaluated, written and dropped in turn, so the largest one bounds the
    memory.

    Args:
        path (Path): the file; it must not exist.
        tensors (dict): name -> array, evaluated or not, or :class:`LazyTensor`.
        progress (Callable): called with the bytes of each block written.
        digest (bool): hash what is written, which takes longer than writing it.

    Returns:
        dict: ``bytes`` and, with ``digest``, ``sha256`` of the file.

    Raises:
        OSError: if the disk is full or the path cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise IFPError(f"{name} has the type {tensor.dtype}, which a checkpoint cannot hold.")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()

    def update(data: bytes | memoryview) -> None:
        start = time.perf_counter()
        sha256.update(data)
        spent.hashing += time.perf_counter() - start

    # Blocks are hashed while they are written and the next ones are read.
    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        hashing: deque[Future] = deque()

        def put(data: bytes | memoryview) -> None:
            if digest:
                hashing.append(hasher.submit(update, data))
            _wait(hashing, BLOCKS_HELD)
            start = time.perf_counter()
            view = memoryview(data)
            while view.nbytes:
                view = view[file.write(view[:WRITE_BYTES]) :]
            spent.writing += time.perf_counter() - start
            if memoryview(data).nbytes > BLOCK_BYTES:
                # There is one large buffer, and the next read may need it.
                _wait(hashing, 0)

        put(struct.pack("<Q", len(text)))
        put(text)
        for name in list(tensors):
            tensor = tensors.pop(name)
            if isinstance(tensor, mx.array):
                tensor = LazyTensor.of(tensor)
            start = time.perf_counter()
            for block in tensor.blocks():
                data = _bytes_of(block)
                spent.making += time.perf_counter() - start
                put(data)
                progress(data.nbytes)
                del block, data
                start = time.perf_counter()
            del tensor
            mx.clear_cache()
        _wait(hashing, 0)
        size = file.tell()
    return {"bytes": size} | ({"sha256": sha256.hexdigest()} if digest else {})


def _wait(hashing: deque[Future], count: int) -> None:
    """Wait until no more than this many blocks are left to hash."""
    start = time.perf_counter()
    while len(hashing) > count:
        hashing.popleft().result()
    spent.waiting += time.perf_counter() - start


def _bytes_of(block: mx.array | np.ndarray) -> memoryview:
    if isinstance(block, mx.array):
        block = mx.contiguous(block)
        # numpy's buffer protocol has no bfloat16.
        block = block.view(mx.uint16) if block.dtype == mx.bfloat16 else block
        mx.eval(block)
    else:
        block = np.ascontiguousarray(block)
    # MLX's arrays have the buffer protocol, which its type stubs do not say.
    buffer: Any = block
    return memoryview(buffer).cast("B") if block.size else memoryview(b"")


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Cast a float array; packed weights and 8-bit scales stay what they are."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(dtype)
