"""Warm prompts on disk: a folder of mlx-lm's prompt caches, which are checked when read."""

import contextlib
import hashlib
import os
import re
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from ..errors import one_line, reason_of
from ..files.atomic import by_last_use, new_file
from ..files.tensor_files import read_any_header
from .key import CacheKey

PromptCache = list[Any]

FORMAT = "mlx_ifp.warm_prompt"
VERSION = "1"
MAX_BYTES_ON_DISK = 4 << 30
_NAME = re.compile(r"[0-9a-f]{32}-\d+-[0-9a-f]{32}\.safetensors")
# A temporary file of this age was left by a process that was killed: no writing takes that long.
_ABANDONED_SECONDS = 3600


def _checksum(prompt_cache: PromptCache) -> str:
    """CRC-32 of the bytes of all arrays and of all counts, which shows a damaged file."""
    crc = 0
    for value in dict(tree_flatten([layer.state for layer in prompt_cache])).values():
        if isinstance(value, mx.array) and value.size:
            content = mx.contiguous(value).reshape(-1).view(mx.uint8)
            crc = zlib.crc32(np.asarray(content).data, crc)
        elif isinstance(value, int):
            crc = zlib.crc32(str(int(value)).encode(), crc)
    return f"{crc:08x}"


class WarmPromptFiles:
    """Prompt caches on disk, so that the next process finds them.

    Each prompt is one safetensors file, which mlx-lm's ``save_prompt_cache`` writes. Names are made
    of hashes and the number of tokens. Neither text nor tokens are stored, but keys and values tell
    much of a text to those who have the model, so only its owner can open the folder. No method
    fails its caller: there is a warning about what cannot be read or written.

    Args:
        directory (Path): that of all caches; the files are in ``warm_prompts`` below it.
        model (str): the checkpoint's name, which commands that list the files show.
        max_bytes (int): bound of all files together; the least recently used ones are deleted.
    """

    def __init__(
        self, directory: Path, model: str = "", max_bytes: int = MAX_BYTES_ON_DISK
    ) -> None:
        self.directory = Path(directory) / "warm_prompts"
        self.model = model
        self.max_bytes = max_bytes
        self._warned = False

    def _path(self, key: str, tokens: Iterable[int]) -> Path:
        tokens = np.asarray(tokens, np.int64)
        name = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
        return self.directory / f"{key[:32]}-{tokens.size}-{name[:32]}.safetensors"

    def has(self, key: str, tokens: Iterable[int]) -> bool:
        """Whether there is a file of exactly this prompt."""
        with contextlib.suppress(OSError):
            return self._path(key, tokens).is_file()
        return False

    def longest(
        self, key: str, tokens: list[int], longer_than: int = 0
    ) -> tuple[PromptCache, int] | None:
        """The longest prefix of ``tokens`` on disk that has more than ``longer_than`` tokens."""
        lengths = {int(path.name.split("-")[1]) for path in self.entries(f"{key[:32]}-")}
        for n in sorted(lengths, reverse=True):
            if longer_than < n <= len(tokens):
                prompt_cache = self._load(self._path(key, tokens[:n]), key, n)
                if prompt_cache is not None:
                    return prompt_cache, n
        return None

    def _load(self, path: Path, key: str, n: int) -> PromptCache | None:
        if not path.is_file():
            return None
        try:
            prompt_cache, metadata = load_prompt_cache(str(path), return_metadata=True)
            expected = {"format": FORMAT, "version": VERSION, "key": key, "tokens": str(n)}
            wrong = [name for name, value in expected.items() if metadata.get(name) != value]
            if wrong:
                raise ValueError(f"{wrong[0]} is {metadata.get(wrong[0])}")
            if metadata.get("crc32") != _checksum(prompt_cache):
                raise ValueError("its checksum is another")
        except Exception as error:
            if not path.exists():
                return None  # another process has deleted it
            reason = reason_of(error)
            warnings.warn(f"Ignoring a damaged warm prompt: {path} ({reason})", stacklevel=2)
            # Nobody can use this file. The next prefill of the prompt writes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return prompt_cache

    def store(self, key: str, tokens: tuple[int, ...], prompt_cache: PromptCache) -> None:
        """Keep a prompt. A file that exists is replaced as a whole."""
        if sum(layer.nbytes for layer in prompt_cache) > self.max_bytes:
            return
        path = self._path(key, tokens)
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
            metadata = {
                "format": FORMAT,
                "version": VERSION,
                "model": self.model,
                "key": key,
                "tokens": str(len(tokens)),
                "crc32": _checksum(prompt_cache),
            }
            with new_file(path) as temporary:
                save_prompt_cache(str(temporary), prompt_cache, metadata)
            self._tidy()
        except Exception as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"The warm prompt was not kept on disk: {error}", stacklevel=2)

    def _tidy(self) -> None:
        total = 0
        for path in self.entries():
            total += path.stat().st_size if path.exists() else 0
            if total > self.max_bytes:
                path.unlink(missing_ok=True)
        for path in self.directory.glob(".*.safetensors"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def entries(self, prefix: str = "") -> list[Path]:
        """The files whose names begin with ``prefix``, most recently used first."""
        # Files that are being written have other names.
        files = (p for p in self.directory.glob(f"{prefix}*") if _NAME.fullmatch(p.name))
        return by_last_use(files)


def load_cache_file(path: str | Path, key: CacheKey) -> PromptCache:
    """Load a file of ``mlx_ifp.cache_prompt``, for mlx-lm's ``prompt_cache``.

    Args:
        path: the file.
        key (CacheKey): the key that it must have been filled under.

    Raises:
        IFPError: if the file is of another kind, or was filled under another key.
    """
    with one_line(f"{path} is not a prompt cache"):
        prompt_cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        key.check(str(path), metadata)
    return prompt_cache


def save_cache_file(
    path: Path, prompt_cache: PromptCache, key: CacheKey, metadata: dict[str, str]
) -> None:
    """Write a file for :func:`load_cache_file`: mlx-lm's, with the key in its metadata.

    Raises:
        IFPError: if it could not be written.
    """
    with new_file(path) as temporary, one_line(f"{path} could not be written"):
        save_prompt_cache(str(temporary), prompt_cache, metadata | key.metadata())


def stored_positions(path: str | Path) -> int:
    """Positions of keys and values in a file of mlx-lm's ``save_prompt_cache``, from its header.

    Raises:
        IFPError: if it is not a safetensors file.
    """
    shapes = [tensor.shape for tensor in read_any_header(Path(path)).values()]
    return max((shape[2] for shape in shapes if len(shape) == 4), default=0)
