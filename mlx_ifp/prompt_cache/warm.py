"""Warm prompts: keys and values of a token prefix, kept for the next prompt that begins with it.

They are kept in memory and, on request, on disk. Keys and values that were made under one mask are
wrong under another, so their key contains everything that determines them.
"""

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from ..dense_pass.layers import pieces_of, run_layers
from ..llm.kv_cache import KVSettings
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.prompt import common_prefix, token_ids
from ..lru import LRU, Once
from ..subnetwork.parent import Parent
from ..subnetwork.prepared import Prepared
from .files import PromptCache, WarmPromptFiles
from .key import CacheKey, claim

_Entry = tuple[str, tuple[int, ...]]

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class WarmInfo:
    """Counts of :class:`WarmPrompts` since it was made, and what its memory holds now.

    ``hits`` and ``misses`` count calls of :meth:`WarmPrompts.fetch`, ``prefilled`` counts the
    tokens that a network processed, and ``loads`` counts the prompts that came from disk.
    """

    hits: int
    misses: int
    prefilled: int
    loads: int
    entries: int
    nbytes: int
    max_bytes: int


class WarmPrompts:
    """Prompt caches by (sub-network, tokens), least recently used, bounded in bytes. Thread-safe.

    Callers get copies, so a generation that goes on in one changes nothing here. Copies share their
    arrays until they are written.

    Args:
        checkpoint (str): the digest of the checkpoint.
        dtype (mx.Dtype): the type that the model runs in; None stands for the stored types.
        files (WarmPromptFiles): the prompts on disk; None if none are.
        max_bytes (int): bound of what is kept in memory.
        parent (Parent): the whole model. Where the methods take a ``Prepared``, None stands for it:
            it reads the prompt layer by layer, and what it reads is right for every selection.
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: mx.Dtype | None,
        files: WarmPromptFiles | None = None,
        max_bytes: int = MAX_BYTES,
        *,
        parent: Parent,
    ) -> None:
        self.files = files
        self._owner = (checkpoint, dtype)
        self._parent = parent
        # mlx-lm's LRUPromptCache is not used: it has no lock, does not count a look-up as use,
        # hands out a prompt as a whole, and trims quantized keys and values, although a shorter
        # prompt may need them as floats.
        self._entries: LRU[_Entry, PromptCache] = LRU(max_bytes)
        self._lock = self._entries.lock
        self._once = Once(self._lock)
        self._hits = self._misses = self._prefilled = self._loads = 0

    @property
    def max_bytes(self) -> int:
        """The bound of what is kept in memory."""
        return self._entries.most

    @max_bytes.setter
    def max_bytes(self, nbytes: int) -> None:
        self._entries.most = nbytes

    def key(self, prepared: Prepared | None, settings: KVSettings | None = None) -> str:
        """The hash of everything that determines keys and values, except the tokens."""
        selection = None if prepared is None else prepared.selection
        return CacheKey.of(*self._owner, selection, settings).hash

    def fetch(
        self,
        prepared: Prepared | None,
        tokens: list[int] | mx.array,
        settings: KVSettings | None = None,
    ) -> tuple[PromptCache | None, list[int]]:
        """The longest kept prefix of a prompt.

        Args:
            prepared: from :meth:`mlx_ifp.IFPModel.prepare`; None for the whole model.
            tokens (list or mx.array): the whole prompt's ids.
            settings (KVSettings): those of the generation; None for mlx-lm's defaults.

        Returns:
            tuple: a prompt cache for mlx-lm, or None if there is no prefix; and the tokens that are
            left to process, at least one.
        """
        tokens = token_ids(tokens)
        found = self._longest(self.key(prepared, settings), tokens[:-1], settings or KVSettings())
        with self._lock:
            self._hits += found is not None
            self._misses += found is None
        if found is None:
            return None, tokens
        prompt_cache, n = found
        return _claimed(prompt_cache, prepared), tokens[n:]

    def warm(
        self,
        prepared: Prepared | None,
        tokens: list[int] | mx.array,
        settings: KVSettings | None = None,
        *,
        disk: bool = False,
        prefill_step_size: int = PREFILL_STEP_SIZE,
    ) -> int:
        """Prefill a prefix and keep it, unless it is kept already.

        If several threads ask for the same prefix at once, one prefills and the others wait for it.

        Args:
            prepared: from :meth:`mlx_ifp.IFPModel.prepare`; None for the whole model.
            tokens (list or mx.array): the prefix's ids.
            settings (KVSettings): those of later generations; None for mlx-lm's defaults.
            disk (bool): keep it on disk too, for the next process.
            prefill_step_size (int): tokens to process at a time.

        Returns:
            int: tokens that the network processed now.
        """
        tokens = token_ids(tokens)
        if not tokens:
            return 0
        settings = settings or KVSettings()
        return self._warm(prepared, tokens, settings, disk, prefill_step_size)[1]

    def start(
        self,
        prepared: Prepared | None,
        tokens: list[int] | mx.array,
        prefix: int,
        settings: KVSettings | None = None,
        *,
        disk: bool = False,
        prefill_step_size: int = PREFILL_STEP_SIZE,
    ) -> tuple[PromptCache | None, list[int]]:
        """:meth:`warm` a prompt's first tokens, then :meth:`fetch`, even if nothing can be kept.

        Args:
            prefix (int): the number of first tokens to keep; a prompt's last token is never kept.
            prepared, tokens, settings, disk, prefill_step_size: as for these two.

        Returns:
            tuple: as :meth:`fetch`.
        """
        tokens = token_ids(tokens)
        settings = settings or KVSettings()
        prefix = min(prefix, len(tokens) - 1)
        if prefix > 0:
            kept, _ = self._warm(prepared, tokens[:prefix], settings, disk, prefill_step_size)
        prompt_cache, rest = self.fetch(prepared, tokens, settings)
        if prefix > 0 and len(tokens) - len(rest) < prefix:
            return _claimed(copy.deepcopy(kept), prepared), tokens[prefix:]
        return prompt_cache, rest

    def _warm(
        self,
        prepared: Prepared | None,
        tokens: list[int],
        settings: KVSettings,
        disk: bool,
        prefill_step_size: int,
    ) -> tuple[PromptCache, int]:
        """The prefix's cache, to be copied before writing, and the tokens processed for it."""
        key = self.key(prepared, settings)
        entry = (key, tuple(tokens))
        files = self.files if disk else None

        def kept() -> tuple[PromptCache, int] | None:
            prompt_cache = self._entries.get(entry)
            if prompt_cache is None or (files is not None and not files.has(*entry)):
                return None
            return prompt_cache, 0

        def make() -> tuple[PromptCache, int]:
            prompt_cache, n = self._longest(key, tokens, settings) or (
                make_prompt_cache(
                    self._parent.trunk if prepared is None else prepared.network,
                    settings.max_kv_size,
                ),
                0,
            )
            if n < len(tokens):
                network = None if prepared is None else prepared.network
                self._read(network, tokens[n:], prompt_cache, settings, prefill_step_size)
            prompt_cache = compact(prompt_cache)
            self._keep(*entry, prompt_cache)
            if files is not None and not files.has(*entry):
                files.store(*entry, prompt_cache)
            with self._lock:
                self._prefilled += len(tokens) - n
            return prompt_cache, len(tokens) - n

        (prompt_cache, prefilled), made = self._once.get((entry, disk), kept, make)
        return prompt_cache, prefilled if made else 0

    def _read(
        self,
        network: nn.Module | None,
        tokens: list[int],
        prompt_cache: PromptCache,
        settings: KVSettings,
        prefill_step_size: int,
    ) -> None:
        if network is None:
            run_layers(self._parent, pieces_of(tokens, prompt_cache, prefill_step_size))
            settings.quantize(prompt_cache)
            mx.eval([layer.state for layer in prompt_cache])
            return
        # generate_step is not used, because it processes the last token by itself: quantized keys
        # and values would then differ from those of a prompt that goes on.
        for start in range(0, len(tokens), prefill_step_size):
            network(mx.array(tokens[start : start + prefill_step_size])[None], cache=prompt_cache)
            settings.quantize(prompt_cache)
            mx.eval([layer.state for layer in prompt_cache])
            mx.clear_cache()

    def _longest(
        self, key: str, tokens: list[int], settings: KVSettings
    ) -> tuple[PromptCache, int] | None:
        """A copy of the longest kept prefix of ``tokens``, and its length."""
        with self._lock:
            found = self._longest_in_memory(key, tokens, settings)
        if self.files is not None and (found is None or found[1] < len(tokens)):
            loaded = self.files.longest(key, tokens, found[1] if found else 0)
            if loaded is not None:
                prompt_cache, n = loaded
                self._keep(key, tuple(tokens[:n]), prompt_cache)
                with self._lock:
                    self._loads += 1
                found = copy.deepcopy(prompt_cache), n
        return found

    def _longest_in_memory(
        self, key: str, tokens: list[int], settings: KVSettings
    ) -> tuple[PromptCache, int] | None:
        best: _Entry | None = None
        longest = 0
        for entry, prompt_cache in self._entries.items():
            n = common_prefix(entry[1], tokens) if entry[0] == key else 0
            # An entry that is longer than the common part is cut if that leaves what a shorter
            # prompt would have made. With quantization it may not: a longer prompt is quantized
            # from its first token on.
            cut = n < len(entry[1])
            if cut and (settings.kv_bits is not None or not can_trim_prompt_cache(prompt_cache)):
                continue
            if n > longest:
                best, longest = entry, n
        # It is looked up once more, because a look-up counts as use.
        used = None if best is None else self._entries.get(best)
        if best is None or used is None:
            return None
        prompt_cache = copy.deepcopy(used)
        if longest < len(best[1]):
            trim_prompt_cache(prompt_cache, len(best[1]) - longest)
        return prompt_cache, longest

    def _keep(self, key: str, tokens: tuple[int, ...], prompt_cache: PromptCache) -> None:
        nbytes = sum(layer.nbytes for layer in prompt_cache)
        self._entries.keep((key, tokens), prompt_cache, nbytes)

    def clear(self) -> None:
        """Forget what is in memory; what is on disk stays."""
        self._entries.clear()

    @property
    def info(self) -> WarmInfo:
        """Counts and sizes."""
        with self._lock:
            return WarmInfo(
                self._hits,
                self._misses,
                self._prefilled,
                self._loads,
                len(self._entries),
                self._entries.size,
                self.max_bytes,
            )


def _claimed(prompt_cache: PromptCache, prepared: Prepared | None) -> PromptCache:
    return claim(prompt_cache, None if prepared is None else prepared.selection)


def compact(prompt_cache: PromptCache) -> PromptCache:
    """Free the room that mlx-lm allocates for more tokens. Arrays are evaluated, for any thread."""
    for layer in prompt_cache:
        if type(layer) in (KVCache, QuantizedKVCache) and not layer.empty():
            layer.keys, layer.values = tree_map(
                lambda array, n=layer.offset: mx.contiguous(array[..., :n, :]),
                (layer.keys, layer.values),
            )
    mx.eval([layer.state for layer in prompt_cache])
    return prompt_cache
