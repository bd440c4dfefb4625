"""PyTorch itself reads pickled tensors, with ``weights_only=True``, so no code in them can run."""

import contextlib
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ifp.errors import IFPError, one_line

from .tensor import SourceTensor, file_rows

_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
# The metadata of a distributed checkpoint is made of these, and of torch's types.
_METADATA_NAMES = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


def import_torch(path: Path) -> Any:
    """Import PyTorch, which only pickled files need.

    Raises:
        IFPError: if it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise IFPError(
            f"{path}: reading it needs PyTorch; install it with: pip install 'mlx_ifp[torch]', "
            "or save the weights as safetensors."
        ) from error
    return torch


def open_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Open the tensors of a ``torch.save`` file: those of a state dict, or of nested ones.

    PyTorch has written the zip form since 1.6. Of this form, only names, shapes and offsets are
    read here; the data are read when they are needed. The older form cannot be read in parts:
    PyTorch reads the whole file.

    Raises:
        IFPError: if PyTorch is missing, or the file is damaged, holds more than tensors and plain
            values, or is a zip file that PyTorch did not write.
    """
    torch = import_torch(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    with _one_line(path):
        if zipped:
            # Fake tensors have shapes and offsets but no data.
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        found: dict[str, Any] = {}
        _flatten(content, "", found, torch)
        if not found:
            raise IFPError(f"{path}: no tensors are in it.")
        make = _zipped_tensor if zipped else _loaded_tensor
        return {name: make(path, name, tensor, torch) for name, tensor in found.items()}


def _check_zip(path: Path) -> None:
    """Refuse compressed records: PyTorch never writes them, and they could unfold to any size."""
    with one_line(f"{path}: a damaged zip file"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise IFPError(f"{path}: a compressed zip file; torch.save never writes one. Refused.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise IFPError(f"{path}: its records overlap or claim more than the file holds. Refused.")
    with _one_line(path), zipfile.ZipFile(path) as archive:
        orders = [archive.read(e) for e in entries if e.filename.endswith("/byteorder")]
    if any(order != b"little" for order in orders):
        # PyTorch would try to swap the bytes of tensors without data, and crash.
        raise IFPError(f"{path}: written on a big-endian machine; save it as safetensors there.")


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Raise PyTorch's errors as one line that names the file."""
    with one_line(f"{path}: PyTorch cannot read it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except pickle.UnpicklingError as error:
            asked = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", str(error))
            what = f" (it asks for {asked[1]})" if asked else ""
            raise IFPError(
                f"{path}: holds more than tensors{what}, or is no PyTorch file. Unpickling it "
                "could run code, so it is refused; save model.state_dict() alone."
            ) from error


def _flatten(value: Any, name: str, found: dict[str, Any], torch: Any) -> None:
    """Join the names of nested dicts and lists by dots; leave out what is not a tensor."""
    if isinstance(value, torch.Tensor):
        if name in found:
            raise ValueError(f"two tensors are called {name}")
        if value.layout != torch.strided or value.is_neg() or value.is_conj():
            raise ValueError(f"{name} is sparse, or a negative or conjugate view")
        found[name] = value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _flatten(item, f"{name}.{key}" if name else str(key), found, torch)


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name.upper())


def _zipped_tensor(path: Path, name: str, tensor: Any, torch: Any) -> SourceTensor:
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    size = tensor.element_size()
    shape = tuple(tensor.shape)
    if offset is None:
        raise IFPError(f"{path}: this version of PyTorch tells no offsets; install 2.8 or later.")
    if tensor.numel() * size > storage.nbytes() or offset + storage.nbytes() > os.path.getsize(
        path
    ):
        raise IFPError(f"{path}: {name} of shape {shape} is larger than its data. Refused.")
    if not tensor.is_contiguous():
        # Its rows do not lie one after another, as in a transposed view. Such tensors are rare and
        # small. The whole file is mapped, not read.
        def read(start: int, stop: int) -> np.ndarray:
            with _one_line(path):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found: dict[str, Any] = {}
            _flatten(content, "", found, torch)
            return _bits(found[name][start:stop] if shape else found[name], torch)

        return SourceTensor(path, name, _dtype(tensor), shape, read)
    begin = offset + tensor.storage_offset() * size
    return SourceTensor(path, name, _dtype(tensor), shape, file_rows(path, begin, shape, size))


def _loaded_tensor(path: Path, name: str, tensor: Any, torch: Any) -> SourceTensor:
    shape = tuple(tensor.shape)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise IFPError(f"{path}: {name} of shape {shape} is larger than its data. Refused.")
    return SourceTensor(
        path,
        name,
        _dtype(tensor),
        shape,
        lambda start, stop: _bits(tensor[start:stop] if shape else tensor, torch),
    )


def _bits(tensor: Any, torch: Any) -> np.ndarray:
    """Return a tensor's bits as unsigned numbers, because numpy has no bfloat16."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    shape = tuple(tensor.shape)
    flat = tensor.contiguous().reshape(-1).view(signed[size])
    return flat.numpy().view(f"u{size}").reshape(shape)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the plain records that PyTorch writes into ``.metadata``."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")
        return super().find_class(module, name)


def open_distributed_checkpoint(directory: Path) -> dict[str, SourceTensor]:
    """Open the tensors of a ``torch.distributed.checkpoint`` directory; they are loaded one by one.

    PyTorch unpickles ``.metadata`` without restrictions, so it is checked before PyTorch sees it.

    Raises:
        IFPError: if PyTorch is missing, or the checkpoint is damaged or refused.
    """
    path = directory / ".metadata"
    torch = import_torch(path)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _one_line(path):
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        records = metadata.state_dict_metadata.items()
        parts = {str(part.relative_path) for part in metadata.storage_data.values()}
    for part in sorted(parts):
        if Path(part).name != part:
            raise IFPError(f"{path}: {part!r} is not a file of this directory.")
        if not (directory / part).is_file():
            raise IFPError(f"{directory / part}: the file is missing; .metadata names it.")

    # PyTorch reads a whole tensor, so it is kept while its blocks are read one after another.
    loaded: dict[str, np.ndarray] = {}

    def make(name: str, shape: tuple[int, ...], dtype: Any) -> SourceTensor:
        def read(start: int, stop: int) -> np.ndarray:
            if name not in loaded:
                loaded.clear()
                whole = {name: torch.empty(shape, dtype=dtype)}
                with _one_line(directory):
                    dcp.load(whole, checkpoint_id=directory, no_dist=True)
                loaded[name] = _bits(whole[name], torch)
            return loaded[name][start:stop] if shape else loaded[name]

        sample = torch.empty(0, dtype=dtype)
        return SourceTensor(directory, name, _dtype(sample), shape, read)

    tensors = {
        name: make(name, tuple(record.size), record.properties.dtype)
        for name, record in records
        if isinstance(record, TensorStorageMetadata)
    }
    if not tensors:
        raise IFPError(f"{directory}: no tensors are in it.")
    return tensors
