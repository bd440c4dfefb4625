"""Keys and values of earlier requests, for later ones that begin with the same tokens."""

import threading
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ..prompt_cache.files import PromptCache
from ..prompt_cache.key import CacheKey

# mlx-lm's kinds, in the order in which it drops them.
ANSWER, PROMPT, SYSTEM = "assistant", "user", "system"
MAX_ENTRIES = 10


class KeptPrompts:
    """mlx-lm's ``LRUPromptCache``, by :class:`CacheKey`, with a lock. Thread-safe.

    A whole conversation is kept when its answer ends, so that the next turn only processes what is
    new. Callers get copies, which share their arrays until they are written.

    Args:
        entries (int): how many are kept at most.
        nbytes (int): the bound of their bytes; None for no bound.
    """

    def __init__(self, entries: int = MAX_ENTRIES, nbytes: int | None = None) -> None:
        self._kept = LRUPromptCache(entries, 1 << 63 if nbytes is None else nbytes)
        self._lock = threading.Lock()

    def fetch(self, key: CacheKey, tokens: list[int]) -> tuple[PromptCache | None, list[int]]:
        """The longest kept beginning of a prompt.

        Args:
            key (CacheKey): what its keys and values must be right for.
            tokens (list): the whole prompt's ids.

        Returns:
            tuple: a prompt cache, or None if there is none; and the tokens that are left to
            process, at least one.
        """
        with self._lock:
            # The last token is left out because its logits are needed.
            found, rest = self._kept.fetch_nearest_cache(key.hash, tokens[:-1])
        n = len(tokens) - 1 - len(rest)
        if found is None or n <= 0:
            return None, tokens
        if key.settings.kv_bits is not None and found[0].ifp_tokens != n:
            # mlx-lm has cut a longer prompt. Its first tokens may be quantized already where those
            # of a shorter one are not.
            return None, tokens
        return found, tokens[n:]

    def keep(self, key: CacheKey, tokens: list[int], cache: PromptCache, kind: str) -> None:
        """Keep keys and values.

        Args:
            key (CacheKey): what they are right for.
            tokens (list): the ids that they are of.
            cache (list): mlx-lm's prompt cache, which nobody changes any more.
            kind (str): ``ANSWER``, ``PROMPT`` or ``SYSTEM``.
        """
        # Other threads use them, so nothing may be left to compute on this thread's stream.
        mx.eval([layer.state for layer in cache])
        for layer in cache:
            layer.ifp_tokens = len(tokens)
            # The key says whose they are.
            if hasattr(layer, "ifp_selection"):
                del layer.ifp_selection
        with self._lock:
            self._kept.insert_cache(key.hash, list(tokens), cache, cache_type=kind)

    def shrink(self, nbytes: int) -> None:
        """Drop the least recently kept ones until at most so many bytes are left."""
        with self._lock:
            self._kept.trim_to(n_bytes=nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return self._kept.nbytes

    @property
    def by_kind(self) -> dict[str, Any]:
        """For each kind the number of entries and their bytes."""
        with self._lock:
            return self._kept.stats_by_type()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)
