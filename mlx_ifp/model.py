"""text -> selection -> sub-network: what ties the layers below together."""

import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.directory import Checkpoint, open_checkpoint
from .checkpoint.locate import resolve
from .checkpoint.tokenizers import load_tokenizer_of
from .checkpoint.weights import load_trunk
from .device import default_cache_bytes, default_dtype
from .errors import IFPError
from .llm.kv_cache import Generation, KVSettings
from .llm.prompt import Text
from .memory.budget import Estimator, Use
from .memory.limit import MemoryLimit
from .prompt_cache.files import WarmPromptFiles
from .prompt_cache.warm import WarmPrompts
from .selection.disk_cache import SelectionCache
from .selection.keep import Keep
from .selection.selection import Selection, digest_of
from .selection.task_library import TaskLibrary
from .selectors.selector import Selecting
from .subnetwork.build import build_subnetwork
from .subnetwork.cache import SubnetworkCache
from .subnetwork.prepared import Prepared
from .subnetwork.residents import Residents
from .subnetwork.reuse import Reuse, check_overlap
from .subnetwork.rows import FFNRows
from .subnetwork.store import _ffn_bytes, _set_width


class IFPModel(Selecting):
    """A checkpoint in use: trunk in memory, sub-networks made and cached as texts ask for them.

    Made by :func:`load`. Thread-safe. What it knows of texts is in :class:`Selecting`.

    Attributes:
        networks: the sub-networks in memory.
        reuse: what stands in for a new selection that is nearly the same, or None.
        tasks: the named tasks of this checkpoint: ``model.tasks.load("python").selection``.
        warm: the prompts whose keys and values are kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: TokenizerWrapper,
        *,
        dtype: mx.Dtype | None,
        keep: Keep | None = None,
        selector: str | None = None,
        cache_bytes: int | None = None,
        selection_cache: SelectionCache | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        task_library: TaskLibrary | None = None,
        reuse_overlap: float | None = None,
        memory_limit: int | None = None,
        use: Use | None = None,
    ) -> None:
        super().__init__(
            checkpoint,
            tokenizer,
            dtype=dtype,
            keep=keep,
            selector=selector,
            selections=selection_cache,
            tokenizer_config=tokenizer_config,
        )
        self.networks = SubnetworkCache(
            default_cache_bytes() if cache_bytes is None else cache_bytes
        )
        self.reuse = None if reuse_overlap is None else Reuse(reuse_overlap, self.networks)
        self.tasks = task_library or TaskLibrary(checkpoint)
        files = None
        if selection_cache is not None:
            files = WarmPromptFiles(selection_cache.directory, str(checkpoint.path))
        self.warm = WarmPrompts(checkpoint.digest, dtype, files)
        if memory_limit is not None:
            # They are not part of the estimate; on disk they may be kept.
            self.warm.max_bytes = 0
        self._residents = Residents(self.reader, checkpoint.ffns, dtype)
        if memory_limit is not None:
            # Before the first weight is read.
            use = use or Use(self.k, Generation(1), self.selector)
            self.memory = MemoryLimit(
                memory_limit, Estimator(checkpoint, dtype), self.networks, use
            )
        width = self.k if isinstance(self.k, int) else max(self.k)
        self.trunk = load_trunk(checkpoint, width, dtype)

    def subnetwork(self, selection: Selection) -> nn.Module:
        """The sub-network of a selection: a stock mlx-lm model that shares the trunk.

        Raises:
            IFPError: if the selection is of another model.
        """
        return self._subnetwork(selection)[0]

    def _subnetwork(self, selection: Selection | None) -> tuple[nn.Module, int, int]:
        """The network (None: the dense one), bytes of channels read now, and channels reused."""
        if selection is not None and selection.checkpoint not in ("", self.checkpoint.digest):
            raise IFPError("The selection was made with another checkpoint.")
        bytes_read = 0
        rows: list[FFNRows] = []

        def load() -> tuple[nn.Module, int]:
            nonlocal bytes_read
            checkpoint = self.checkpoint
            if self.memory is not None:
                self.memory.before_loading(selection)
                self._release_if_tight()
            # Of what is still there.
            nearest = self._residents.nearest(selection, self.networks.digests)

            def read(layer: int) -> FFNRows:
                rows.append(self._residents.read(selection, layer, nearest))
                return rows[-1]

            network, nbytes, bytes_read = build_subnetwork(
                self.trunk, checkpoint.ffns, checkpoint.config, selection, read
            )
            self._residents.add(network, selection, rows)
            _set_width(network, checkpoint.d_ffn if selection is None else selection.k)
            return network, nbytes

        network, _ = self.networks.get(digest_of(selection), load)
        if self.reuse is not None and selection is not None:
            self.reuse.add(selection)
        return network, bytes_read, sum(layer.channels_reused for layer in rows)

    def dense(self) -> nn.Module:
        """The whole model, for comparison: an mlx-lm model with all d_ffn channels."""
        return self._subnetwork(None)[0]

    def prepare(
        self,
        text: Text | None = None,
        *,
        selection: Selection | None = None,
        dense: bool = False,
        selector: str | None = None,
        keep: Keep | None = None,
    ) -> Prepared:
        """Select and load.

        Args:
            text: what selects, unless ``selection`` or ``dense`` is given.
            selection (Selection): use this one.
            dense (bool): use all channels.
            selector (str): None for the default.
            keep: channels to keep; None for the checkpoint's k.
        """
        start = time.perf_counter()
        source = "dense" if dense else "given"
        if selection is None and not dense:
            selection, source = self._select(text, selector, keep)
        selected = time.perf_counter()
        overlap = None
        # A selection that was given is used as it is.
        if self.reuse is not None and source not in ("given", "dense"):
            selection, overlap = self.reuse.stand_in(selection)
        network, bytes_read, channels_reused = self._subnetwork(selection)
        loaded = time.perf_counter()
        return Prepared(
            network=network,
            selection=selection,
            source=source,
            select_seconds=selected - start,
            load_seconds=loaded - selected,
            bytes_read=bytes_read,
            channels_reused=channels_reused,
            reuse_overlap=overlap,
        )

    def using(self, prepared: Prepared) -> AbstractContextManager[nn.Module]:
        """``with model.using(prepared) as network``: keep it in memory while the block runs.

        Without this a sub-network may be evicted while it generates. It lives on, but its bytes do
        not count, and whoever asks for it loads it a second time. :func:`mlx_ifp.stream_generate`
        does this by itself.

        Args:
            prepared (Prepared): from :meth:`prepare`.
        """
        network = prepared.network
        return self.networks.using(
            digest_of(prepared.selection), network, partial(_ffn_bytes, network, self.checkpoint)
        )

    def warm_prompt(
        self,
        prepared: Prepared,
        tokens: list[int] | mx.array,
        settings: KVSettings | None = None,
        **kwargs: Any,
    ) -> int:
        """Prefill a prefix, such as a system prompt, and keep it: see :meth:`WarmPrompts.warm`.

        ``prompt_cache, rest = model.warm.fetch(prepared, tokens)`` uses it: the two are mlx-lm's
        ``prompt_cache`` and ``prompt``.

        Returns:
            int: tokens that the network processed now; 0 if it was kept already.
        """
        with self.using(prepared):
            return self.warm.warm(prepared, tokens, settings, **kwargs)


def open_model(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[Checkpoint, TokenizerWrapper]:
    """The first half of :func:`load`: configs, headers and tokenizer, but no weights."""
    checkpoint = open_checkpoint(resolve(path_or_hf_repo, revision))
    return checkpoint, load_tokenizer_of(checkpoint, tokenizer_config)


def load(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    keep: Keep | None = None,
    selector: str | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    reuse_overlap: float | None = None,
    memory_limit: int | None = None,
) -> tuple[IFPModel, TokenizerWrapper]:
    """Load a checkpoint: its trunk and tokenizer, but no FFN and no predictor yet.

    Args:
        path_or_hf_repo: a local directory or a hub repository; None for the package's own model.
        tokenizer_config (dict): passed to the tokenizer, as in mlx-lm.
        revision (str): of a hub repository.
        dtype (mx.Dtype): run in this type. By default as stored on a GPU, float32 on a CPU.
        keep: channels to keep in each layer: a count, a list of L counts, or a fraction (float).
            By default what the checkpoint says.
        selector (str): ``predictor``, ``activations`` or ``static``. By default what the
            checkpoint says.
        cache (bool): keep selections on disk.
        cache_dir: where, and named tasks beside them; by default the platform's place for caches.
        cache_bytes (int): bound of the sub-networks kept in memory; by default half of the
            memory MLX may use.
        reuse_overlap (float): above 0, at most 1. Where a text's selection overlaps that much (mean
            over layers) with one whose sub-network is in memory, ``prepare`` and ``generate`` use
            that one: nothing is loaded. ``select`` and ``subnetwork`` stay exact. None: never.
        memory_limit (int): bytes that trunk, predictor, sub-networks, keys and values may take
            together. Sub-networks have what the rest leaves of it; the predictor only stays in
            memory if there is room. One generation at a time is counted.

    Returns:
        tuple: the model, and the LLM's tokenizer.

    Raises:
        IFPError: one line that says what is wrong with the checkpoint or an argument, or what
            does not fit ``memory_limit``.
    """
    if reuse_overlap is not None:
        check_overlap(reuse_overlap)
    checkpoint, tokenizer = open_model(path_or_hf_repo, tokenizer_config, revision)
    model = IFPModel(
        checkpoint,
        tokenizer,
        dtype=dtype if dtype is not None else default_dtype(),
        keep=keep,
        selector=selector,
        cache_bytes=cache_bytes,
        selection_cache=SelectionCache(cache_dir) if cache else None,
        tokenizer_config=tokenizer_config,
        task_library=TaskLibrary(checkpoint, cache_dir),
        reuse_overlap=reuse_overlap,
        memory_limit=memory_limit,
    )
    return model, tokenizer
