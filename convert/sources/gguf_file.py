"""Read the GGUF file format: check the header, and make lazy tensors.

``mx.load`` reads GGUF too. But in mlx 0.32 it reads all at once, decodes every second block of Q4_K
with the scale of its neighbour and needs write access to the file, and a damaged header can end
the process. So the header is read and checked here, and the blocks are rearranged by lazy MLX
operations.
"""

import json
import math
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from mlx_ifp.errors import IFPError

# Each tensor type, by its number, has a name, a count of values in a block and bytes of a block.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
UNREADABLE_TYPES = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 39: "MXFP4"}
PLAIN_TYPES = ("F32", "F16", "BF16")  # safetensors has them by the same names
GROUP_SIZE = 32
VALUES_AT_ONCE = 1 << 20

# These are the metadata types by number, as struct spells them. Strings and arrays are not among
# them, because they have no fixed size.
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file.

    Attributes:
        kind: the name of its type.
        shape: the shape of its values, rows first.
        stored: the shape of what the file has: the same, or [..., blocks, block bytes] if the type
            is quantized.
        span: its first byte and the one after its last, counted from where the data start.
    """

    kind: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    span: tuple[int, int]


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _unpack(file, f"{length}s")[0].decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        kind, count = _unpack(file, "IQ")
        if kind == STRING:
            return [_string(file) for _ in range(count)]
        return list(_unpack(file, f"{count}{NUMBERS[kind]}"))
    (number,) = _unpack(file, NUMBERS[kind])
    # This takes the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(number))) if NUMBERS[kind] == "f" else number


def read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple]]:
    """Read metadata and name -> (shape, type number, offset), up to where the data start."""
    if file.read(4) != b"GGUF":
        raise IFPError("not a GGUF file; give a .gguf file of a llama model.")
    version = int.from_bytes(file.read(4), "little")
    if version not in (2, 3):
        raise IFPError(f"GGUF version {version}; only 2 and 3 are supported.")
    metadata, tensors = {}, {}
    try:
        tensor_count, metadata_count = _unpack(file, "QQ")
        for _ in range(metadata_count):
            key = _string(file)
            metadata[key] = _value(file, *_unpack(file, "I"))
        for _ in range(tensor_count):
            name = _string(file)
            (dims,) = _unpack(file, "I")
            shape = _unpack(file, f"{dims}Q")[::-1]
            tensors[name] = (shape, *_unpack(file, "IQ"))
        alignment = metadata.get("general.alignment", 32)
        file.seek(-(-file.tell() // alignment) * alignment)
    except Exception as error:
        raise IFPError("the header is truncated or damaged; get the file again.") from error
    return metadata, tensors


def check_tensors(found: dict[str, tuple], start: int, size: int) -> dict[str, GGUFTensor]:
    tensors = {}
    for name, (shape, number, offset) in found.items():
        if number not in TENSOR_TYPES:
            raise IFPError(
                f"{name} has the type {UNREADABLE_TYPES.get(number, number)}; only "
                f"{', '.join(kind for kind, *_ in TENSOR_TYPES.values())} are supported."
            )
        kind, per_block, block_bytes = TENSOR_TYPES[number]
        if not math.prod(shape) or shape[-1] % per_block or (len(shape) == 1 and per_block > 1):
            raise IFPError(f"{name} of shape {shape} cannot be {kind}; get the file again.")
        end = offset + math.prod(shape) // per_block * block_bytes
        if start + end > size:
            raise IFPError(
                f"{name} ends at byte {start + end:,}, but the file has {size:,}; it is "
                "truncated. Get it again."
            )
        blocks = (*shape[:-1], shape[-1] // per_block, block_bytes)
        stored = shape if kind in PLAIN_TYPES else blocks
        tensors[name] = GGUFTensor(kind, shape, stored, (offset, end))
    return tensors


def copy_blocks(
    file: BinaryIO, tensors: dict[str, GGUFTensor], scratch: Path | None = None
) -> dict[str, mx.array]:
    """Copy the tensors as they are ``stored``; the file must stand where the data start.

    The arrays are not evaluated. The data are copied to a temporary file in ``scratch``, or where
    the system has such files.
    """
    header = json.dumps(
        {
            name: {
                "dtype": tensor.kind if tensor.kind in PLAIN_TYPES else "U8",
                "shape": tensor.stored,
                "data_offsets": tensor.span,
            }
            for name, tensor in tensors.items()
        }
    ).encode()
    size = 8 + len(header) + max(tensor.span[1] for tensor in tensors.values())
    try:
        # MLX keeps the file open, so it can be deleted at once.
        with tempfile.NamedTemporaryFile(prefix="mlx_ifp-", dir=scratch) as copy:
            copy.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, copy, 1 << 20)
            if copy.tell() < size:
                raise IFPError("the file was truncated while it was read; get it again.")
            copy.flush()
            return cast(dict[str, mx.array], mx.load(copy.name, format="safetensors"))
    except OSError as error:
        raise IFPError(
            f"cannot be copied to {scratch or tempfile.gettempdir()} ({error.strerror}); it takes "
            f"{size / 1e6:,.0f} MB there."
        ) from error


def decode(tensor: GGUFTensor, blocks: mx.array) -> dict[str, mx.array]:
    """Make unevaluated ``weight`` and, for quantized types, ``scales`` and ``biases``."""
    if tensor.kind in PLAIN_TYPES:
        return {"weight": blocks}
    # Some rows are decoded at a time, because MLX holds all intermediate results at once: for Q6_K
    # they take five times the size of the last. Q8_0 has almost none, and joining its steps would
    # take more memory.
    rows = len(blocks) if tensor.kind == "Q8_0" else max(VALUES_AT_ONCE // tensor.shape[-1], 1)
    steps = [_decode_rows(tensor.kind, blocks[i : i + rows]) for i in range(0, len(blocks), rows)]
    return {part: mx.concatenate([step[part] for step in steps]) for part in steps[0]}


def _decode_rows(kind: str, raw: mx.array) -> dict[str, mx.array]:
    """Do as :func:`decode` with blocks of a quantized type, uint8 [rows, blocks, block bytes]."""

    def half(start: int) -> mx.array:
        return raw[..., start : start + 2].view(mx.float16)

    def bytes_at(start: int, stop: int, *split: int) -> mx.array:
        return raw[..., start:stop].reshape(*raw.shape[:-1], *split)

    def nibbles(packed: mx.array) -> mx.array:
        return mx.concatenate([packed & 15, packed >> 4], -1)

    if kind == "Q6_K":
        # Q6_K has groups of 16, which are smaller than any of MLX's, so it becomes floats.
        high = bytes_at(128, 192, 2, 32)
        high = mx.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
        values = nibbles(bytes_at(0, 128, 2, 64)) | high << 4
        values = values.reshape(*raw.shape[:-1], 16, 16).astype(mx.float32) - 32
        scales = half(208).astype(mx.float32) * raw[..., 192:208].view(mx.int8)
        weight = (values * scales[..., None]).astype(mx.float16)
        return {"weight": weight.reshape(*raw.shape[:-2], -1)}
    if kind == "Q8_0":
        packed = raw[..., 2:] ^ 128  # from signed to unsigned
        scales, biases = half(0), half(0) * -128
    else:
        if kind == "Q4_K":
            values = nibbles(bytes_at(16, 144, 4, 32))
            low, mid, top = (raw[..., i : i + 4] for i in (4, 8, 12))
            scales = mx.concatenate([low & 63, (top & 15) | (low >> 6 << 4)], -1)
            biases = mx.concatenate([mid & 63, (top >> 4) | (mid >> 6 << 4)], -1)
            scales = (scales * half(0).astype(mx.float32)).astype(mx.float16)
            biases = -(biases * half(2).astype(mx.float32)).astype(mx.float16)
        elif kind == "Q4_1":
            values, scales, biases = nibbles(raw[..., 4:]), half(0), half(2)
        else:
            values, scales, biases = nibbles(raw[..., 2:]), half(0), half(0) * -8
        packed = values[..., ::2] | (values[..., 1::2] << 4)
    arrays = {"weight": packed.view(mx.uint32), "scales": scales, "biases": biases}
    return {part: array.reshape(*raw.shape[:-2], -1) for part, array in arrays.items()}
