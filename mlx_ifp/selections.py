"""Selections in files: one that the user names, and those kept on disk for the next process."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from .atomic import by_last_use, new_file
from .errors import IFPError
from .masks import Selection

SELECTION_VERSION = "1"
MAX_SELECTIONS = 256


def default_cache_dir() -> Path:
    """``$MLX_IFP_CACHE``, or the platform's place for caches."""
    if own := os.environ.get("MLX_IFP_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_ifp"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mlx_ifp"


def save_selection(
    path: str | Path,
    selection: Selection,
    metadata: dict[str, str] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write a selection to a safetensors file: one bit a channel, and the soft values.

    The file is complete or not there at all; one that exists is replaced.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is false.
    """
    path = Path(path)
    tensors = {"mask": np.packbits(selection.mask, axis=-1)}
    if selection.soft_values is not None:
        tensors["soft_values"] = np.concatenate(selection.soft_values).astype(np.float32)
    metadata = {
        "format": "mlx_ifp.selection",
        "version": SELECTION_VERSION,
        "checkpoint": selection.checkpoint,
        "d_ffn": str(selection.d_ffn),
        **(metadata or {}),
    }
    with new_file(path, overwrite=overwrite) as temporary:
        try:
            # Not save_file: it makes the file anew, for its owner's eyes only.
            temporary.write_bytes(serialize(tensors, metadata=metadata))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load_selection(path: str | Path, checkpoint: str | None = None) -> Selection:
    """Read a selection.

    Args:
        path (str): a file of :func:`save_selection`.
        checkpoint (str): digest of the checkpoint it must belong to; None takes any.

    Raises:
        IFPError: if it is not such a file, damaged, or of another checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise IFPError(f"{path}: there is no such selection file.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != "mlx_ifp.selection":
            raise IFPError(f"{path} is not a selection of mlx_ifp.")
        if metadata.get("version") != SELECTION_VERSION:
            raise IFPError(f"{path}: selection version {metadata.get('version')} is not known.")
        d_ffn = int(metadata["d_ffn"])
        packed = tensors["mask"]
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != -(-d_ffn // 8):
            raise IFPError(f"{path}: mask has the shape {packed.shape}, not [L, {d_ffn} / 8].")
        bits = np.unpackbits(packed, axis=-1)
        counts = bits[:, :d_ffn].sum(axis=1)
        if bits[:, d_ffn:].any() or not counts.all():
            raise IFPError(f"{path}: mask keeps no channel of a layer, or one that is not there.")
        layers = tuple(np.flatnonzero(row).astype(np.int32) for row in bits)
        soft_values = None
        if "soft_values" in tensors:
            values = tensors["soft_values"]
            if values.shape != (counts.sum(),) or values.dtype != np.float32:
                raise IFPError(f"{path}: soft_values has the shape {values.shape}.")
            if not np.isfinite(values).all():
                raise IFPError(f"{path}: soft_values are not finite.")
            soft_values = tuple(np.split(values, np.cumsum(counts)[:-1]))
    # numpy has no bfloat16, and says so with a TypeError.
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, IFPError):
            raise
        raise IFPError(f"{path} is not a selection of mlx_ifp, or damaged ({error}).") from error
    if checkpoint is not None and metadata.get("checkpoint") != checkpoint:
        raise IFPError(f"{path} was made with another checkpoint; its channels mean others here.")
    return Selection(layers, soft_values, d_ffn, metadata.get("checkpoint", ""))


class SelectionCache:
    """Selections on disk, so that the next process finds them.

    One file a selection, in a folder a checkpoint. Names are hashes: no text is stored. Nothing
    here fails a caller: what can't be read or written is warned about and left out.

    Args:
        directory (Path): where; None for :func:`default_cache_dir`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_cache_dir()

    def _folder(self, checkpoint: str) -> Path:
        return self.directory / "selections" / checkpoint[:32]

    def load(self, checkpoint: str, key: str) -> Selection | None:
        """The selection of a key, or None."""
        path = self._folder(checkpoint) / f"{key}.safetensors"
        try:
            if not path.exists():
                return None
            selection = load_selection(path, checkpoint)
        except (IFPError, OSError) as error:
            warnings.warn(f"Ignoring a cached selection: {error}", stacklevel=2)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return selection

    def store(self, key: str, selection: Selection, metadata: dict[str, Any]) -> None:
        """Keep a selection."""
        folder = self._folder(selection.checkpoint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_selection(
                folder / f"{key}.safetensors",
                selection,
                {name: value if isinstance(value, str) else json.dumps(value)
                 for name, value in metadata.items()},
            )  # fmt: skip
            for path in self._files(folder)[MAX_SELECTIONS:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"The selection was not cached: {error}", stacklevel=2)

    def previous(self, checkpoint: str, key: str) -> Selection | None:
        """The selection used last, other than that of ``key``."""
        return next((selection for _, selection in self.recent(checkpoint, key, 1)), None)

    def recent(self, checkpoint: str, key: str, limit: int) -> Iterator[tuple[str, Selection]]:
        """Up to ``limit`` selections used last, with their keys, other than that of ``key``."""
        for path in self._files(self._folder(checkpoint)):
            with contextlib.suppress(IFPError, OSError):
                if limit < 1 or path.stat().st_mtime == 0:
                    return
                if path.stem != key:
                    selection = load_selection(path, checkpoint)
                    limit -= 1
                    yield path.stem, selection

    def mark(self, checkpoint: str, key: str, *, used: bool) -> None:
        """Say that a selection was used now, or that it is on disk but was never used."""
        with contextlib.suppress(OSError):
            os.utime(self._folder(checkpoint) / f"{key}.safetensors", None if used else (0, 0))

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        # Those that are being written begin with a dot.
        return by_last_use(folder.glob("[!.]*.safetensors"))

    def entries(self) -> list[Path]:
        """All files, most recently used first."""
        return by_last_use((self.directory / "selections").glob("*/[!.]*.safetensors"))
