"""Results on disk, so that a run that was killed goes on."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.directory import Checkpoint
from ..device import default_cache_dir


def key_of(*parts: Any) -> str:
    """SHA-256 of what determines a result."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_of(checkpoint: Checkpoint, directory: str | Path | None = None) -> Path:
    """Where results of a checkpoint are kept.

    Args:
        checkpoint (Checkpoint): an opened one.
        directory (Path): that of all caches; None for
            :func:`~mlx_ifp.device.default_cache_dir`.
    """
    root = default_cache_dir() if directory is None else Path(directory)
    return root / "evaluation" / checkpoint.digest[:32]


def store_in(folder: Path | None, name: str) -> "Store":
    """The results of a name, as far as there are any; without a folder they are not kept."""
    return Store(None if folder is None else folder / f"{name}.jsonl")


class Store:
    """Results by key: a line of JSON each, which is on disk as soon as the result is there.

    A line that was cut, as its writer was killed, is left out. No method fails its caller: there is
    a warning about what cannot be read or written.

    Args:
        path (Path): the file; None keeps results in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._results: dict[str, Any] = {}
        self._warned = False
        if path is not None and path.exists():
            with contextlib.suppress(OSError):
                for line in path.read_bytes().splitlines():
                    with contextlib.suppress(ValueError, TypeError):
                        key, result = json.loads(line)
                        self._results[key] = result

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any:
        """The result, or None."""
        return self._results.get(key)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no result."""
        return [key for key in keys if key not in self._results]

    def add(self, key: str, result: Any) -> None:
        """Keep a result."""
        self._results[key] = result
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                # The line begins anew in case the one before it was cut.
                file.write("\n" + json.dumps([key, result]))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"Results are not kept on disk: {error}", stacklevel=2)
