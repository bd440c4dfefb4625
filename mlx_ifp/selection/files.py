"""Selections in files: those that users name, and those kept on disk for the next process."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from ..errors import IFPError, one_line
from ..files.atomic import new_file
from .selection import Selection

SELECTION_VERSION = "1"


def save_selection(
    path: str | Path,
    selection: Selection,
    metadata: dict[str, str] | None = None,
    *,
    scores: np.ndarray | None = None,
    overwrite: bool = True,
) -> None:
    """Write a selection to a safetensors file: one bit a channel, and the soft values.

    The file is complete or not there at all. A file that exists is replaced. ``scores``, float32
    [L, F], are kept beside the selection if they are given; :func:`load_selection` skips them.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is false.
    """
    path = Path(path)
    tensors = {"mask": np.packbits(selection.mask, axis=-1)}
    if selection.soft_values is not None:
        tensors["soft_values"] = np.concatenate(selection.soft_values).astype(np.float32)
    if scores is not None:
        tensors["scores"] = scores.astype(np.float32)
    metadata = {
        "format": "mlx_ifp.selection",
        "version": SELECTION_VERSION,
        "checkpoint": selection.checkpoint,
        "d_ffn": str(selection.d_ffn),
        **(metadata or {}),
    }
    with new_file(path, overwrite=overwrite) as temporary:
        try:
            # save_file is not used, because it makes the file anew, readable only by its owner.
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
    with one_line(f"{path} is not a selection of mlx_ifp, or damaged"):
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
    if checkpoint is not None and metadata.get("checkpoint") != checkpoint:
        raise IFPError(f"{path} was made with another checkpoint; its channels mean others here.")
    return Selection(layers, soft_values, d_ffn, metadata.get("checkpoint", ""))
