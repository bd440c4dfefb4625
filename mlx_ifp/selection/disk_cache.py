"""Selections on disk, for the next process."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..device import default_cache_dir
from ..errors import IFPError
from ..files.atomic import by_last_use
from .files import load_selection, save_selection
from .selection import Selection

MAX_SELECTIONS = 256


class SelectionCache:
    """Selections on disk, so that the next process finds them.

    Each selection is a file, and each checkpoint has a folder. Names are hashes, and no text is
    stored. No method fails its caller: there is a warning about what cannot be read or written.

    Args:
        directory (Path): where they are; None for :func:`default_cache_dir`.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_cache_dir()

    def _folder(self, checkpoint: str) -> Path:
        return self.directory / "selections" / checkpoint[:32]

    def load(self, checkpoint: str, key: str) -> Selection | None:
        """The selection of a key; None if it is not there."""
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
        for path in self._files(self._folder(checkpoint)):
            with contextlib.suppress(IFPError, OSError):
                if path.stem != key:
                    return load_selection(path, checkpoint)
        return None

    def always(self, checkpoint: str, last: int = 16) -> list[np.ndarray] | None:
        """The channels that each of the last few selections keeps; None if there are none.

        Returns:
            list: int32 [n] for each of L layers, ascending; n may be 0.
        """
        common: list[np.ndarray] | None = None
        for path in self._files(self._folder(checkpoint))[:last]:
            with contextlib.suppress(IFPError, OSError):
                layers = load_selection(path, checkpoint).layers
                if common is None:
                    common = list(layers)
                else:
                    common = [
                        np.intersect1d(*pair, assume_unique=True)
                        for pair in zip(common, layers, strict=True)
                    ]
        return common

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        # The names of files that are being written begin with a dot.
        return by_last_use(folder.glob("[!.]*.safetensors"))

    def entries(self) -> list[Path]:
        """All files, most recently used first."""
        return by_last_use((self.directory / "selections").glob("*/[!.]*.safetensors"))
