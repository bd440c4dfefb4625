"""Trained weights as PyTorch programs save them: every tensor's name, type, shape and rows."""

import json
from pathlib import Path
from typing import Any

from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import (
    DTYPES,
    read_any_header,
)

from .tensor import SourceTensor, file_rows

PICKLES = (".pt", ".bin", ".pth", ".ckpt")
# transformers looks for them in this order.
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")


def open_tensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a file, or of all files of a directory, their data unread.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.bin`` or ``.pth`` file; or a directory that holds
            one, shards with an index, or a checkpoint of ``torch.distributed.checkpoint``.

    Raises:
        IFPError: if a file is missing, damaged, refused, or of another kind.
    """
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        from .torch_files import open_torch_file

        return open_torch_file(path)
    raise IFPError(f"{path}: not a .safetensors file nor one of {', '.join(PICKLES)}.")


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights: one file, or those of an index.

    What transformers would take comes first, so that a stale index does no harm.

    Raises:
        IFPError: if there are none, several without an index, or the index names a file that is
            missing or outside of the directory.
    """
    for pattern, index in zip(SINGLE, INDEXES, strict=True):
        if (directory / pattern).is_file():
            return [directory / pattern]
        for file in sorted(directory.glob(index)):
            return sorted(_indexed(file))
        if pattern.endswith(".safetensors"):
            for shards in ("model*.safetensors", "*.safetensors"):
                if found := sorted(directory.glob(shards)):
                    return found
    found = sorted(f for f in directory.iterdir() if f.suffix in PICKLES)
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(f.name for f in found[:4])
        raise IFPError(f"{directory} holds {names}; name the one to convert with --model.")
    if found := sorted(directory.glob("*.gguf")):
        raise IFPError(
            f"{directory} holds {found[0].name}; name the GGUF file itself with --model."
        )
    raise IFPError(f"{directory} holds no weights (.safetensors, .pt, .bin or .pth).")


def _indexed(index: Path) -> set[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IFPError(f"{index}: weight_map is missing.")
    files = set()
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise IFPError(f"{index}: the shard {name!r} is not a file of this directory.")
        if not (index.parent / name).is_file():
            raise IFPError(f"{index.parent / name}: the shard is missing; {index.name} names it.")
        files.add(index.parent / name)
    return files


def _open_directory(directory: Path) -> dict[str, SourceTensor]:
    if (directory / ".metadata").is_file():
        from .torch_files import open_distributed_checkpoint

        return open_distributed_checkpoint(directory)
    tensors: dict[str, SourceTensor] = {}
    for file in weight_files(directory):
        for name, tensor in open_tensors(file).items():
            if name in tensors:
                raise IFPError(f"{file}: {name} is in {tensors[name].path.name} too.")
            tensors[name] = tensor
    return tensors


def _open_safetensors(path: Path) -> dict[str, SourceTensor]:
    tensors = {}
    for name, info in read_any_header(path).items():
        size = DTYPES[info.dtype].size if info.dtype in DTYPES else 1
        tensors[name] = SourceTensor(
            path, name, info.dtype, info.shape, file_rows(path, info.offset, info.shape, size)
        )
    return tensors


def below(tensors: dict[str, SourceTensor], prefix: str) -> dict[str, SourceTensor]:
    """The tensors under a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        IFPError: naming the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IFPError(f"{path}: the file is missing.") from error
    except (ValueError, RecursionError) as error:
        raise IFPError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise IFPError(f"{path}: must hold a JSON object.")
    return values
