"""Open trained weights as PyTorch programs save them: each tensor's name, type, shape and rows."""

import json
from pathlib import Path
from typing import Any

from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import (
    DTYPES,
    read_any_header,
)

from ..wrappers import check_merged, unwrapped
from .tensor import SourceTensor, file_rows

PICKLES = (".pt", ".bin", ".pth", ".ckpt")
# transformers gives a model's weights these names: one file, shards (which FILE.index.json lists)
# and variants.
_OWN = (
    ("model.safetensors", "model-*-of-*.safetensors", "model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model*.bin"),
)
# transformers never uses these names. A directory is searched for them only if it has none of the
# above.
_OTHER_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
# These are files of a trainer that lie beside the weights.
_TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
# safetensors allows no larger header.
_HEADER_BYTES = 100_000_000
_GIT_LFS = b"version https://git-lfs"


def kind_of(path: Path) -> str | None:
    """Find out what a file is by its first bytes, whatever its name says.

    Returns:
        str: ``safetensors``, ``torch`` (zipped or pickled) or ``gguf``; None if it is none of them.

    Raises:
        IFPError: if it cannot be read, or is the pointer that Git LFS leaves in place of a file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_GIT_LFS))
    except FileNotFoundError as error:
        raise IFPError(f"{path}: the file is missing.") from error
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error
    if start == _GIT_LFS:
        raise IFPError(
            f"{path}: only a pointer to the file; get the file itself with git lfs pull."
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _HEADER_BYTES:
        return "safetensors"
    if start.startswith(b"GGUF"):
        return "gguf"
    return "torch" if start.startswith((b"PK\x03\x04", b"\x80")) else None


def open_tensors(path: Path) -> dict[str, SourceTensor]:
    """Open the tensors of a file, or of all files of a directory, without reading their data.

    What wrappers such as DistributedDataParallel put into the names is taken out.

    Args:
        path: a safetensors file or one of PyTorch's; or a directory that holds one, shards with an
            index, or a checkpoint of ``torch.distributed.checkpoint``.

    Raises:
        IFPError: if a file is missing, damaged, refused, or of another kind; if it holds adapters
            that are not merged.
    """
    tensors = _open_directory(path) if path.is_dir() else _open_file(path)
    tensors = unwrapped(tensors, str(path))
    check_merged(tensors, str(path))
    return tensors


def _open_file(path: Path) -> dict[str, SourceTensor]:
    kind, suffix = kind_of(path), path.suffix.lower()
    # A damaged file is given to the reader that its name calls for, which says what is wrong.
    if kind == "safetensors" or (kind is None and suffix == ".safetensors"):
        return _open_safetensors(path)
    if kind == "torch" or (kind is None and suffix in PICKLES):
        from .torch_files import open_torch_file

        return open_torch_file(path)
    if kind == "gguf":
        raise IFPError(f"{path}: a GGUF file, which cannot be a part of another model.")
    raise IFPError(f"{path}: not a .safetensors file nor one of {', '.join(PICKLES)}.")


def weight_files(directory: Path) -> list[Path]:
    """Find the files that hold a directory's weights: one file, or those of an index.

    transformers' names are tried first, in its order, so that neither a stale index nor the files
    of another program do harm. Hidden files are ignored.

    Raises:
        IFPError: if there are none, several without an index, or the index names a file that is
            missing or outside of the directory.
    """
    for single, *several in _OWN:
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            return sorted(_indexed(index))
        for pattern in several:
            if found := _visible(directory, pattern):
                return found
    for pattern in _OTHER_INDEXES:
        indexes = _visible(directory, pattern)
        if len(indexes) > 1:
            names = ", ".join(file.name for file in indexes)
            raise IFPError(f"{directory} holds {names}; delete or rename all but one of them.")
        if indexes:
            return sorted(_indexed(indexes[0]))
    if found := _visible(directory, "*.safetensors"):
        return found
    found = [file for file in _visible(directory, "*") if file.suffix.lower() in PICKLES]
    found = [file for file in found if not file.name.startswith(_TRAINING_STATE)]
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(f.name for f in found[:4])
        raise IFPError(f"{directory} holds {names}; name the one to convert with --model.")
    if found := [f for f in _visible(directory, "*") if f.suffix.lower() == ".gguf"]:
        raise IFPError(
            f"{directory} holds {found[0].name}; name the GGUF file itself with --model."
        )
    raise IFPError(f"{directory} holds no weights (.safetensors, .pt, .bin or .pth).")


def _visible(directory: Path, pattern: str) -> list[Path]:
    """List a directory's files but hidden ones; broken links count, so that messages name them."""
    return sorted(
        file
        for file in directory.glob(pattern)
        if not file.name.startswith(".") and not file.is_dir()
    )


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
    metadata = directory / ".metadata"
    # Other programs have hidden files of this name, too, so the content is checked.
    if metadata.is_file() and kind_of(metadata) == "torch":
        from .torch_files import open_distributed_checkpoint

        return open_distributed_checkpoint(directory)
    tensors: dict[str, SourceTensor] = {}
    for file in weight_files(directory):
        for name, tensor in _open_file(file).items():
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
    """The tensors whose names begin with a prefix, which is taken off."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IFPError: if it cannot be read; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise IFPError(f"{path}: the file is missing.") from error
    except (ValueError, RecursionError) as error:
        raise IFPError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise IFPError(f"{path}: must hold a JSON object.")
    return values
