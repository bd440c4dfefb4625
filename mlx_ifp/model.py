"""text -> selection -> sub-network: what ties the layers below together."""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .activations import activation_scores
from .budget import Estimator, Use
from .cache import SelectionCache, SubnetworkCache
from .channels import ChannelReader
from .checkpoint import Checkpoint, load_tensors, load_trunk, open_checkpoint, resolve
from .delta import Residents
from .errors import IFPError
from .keep import Keep, resolve_keep
from .kv_size import Generation
from .masks import Selection, select_channels
from .memory_limit import MemoryLimit
from .once import Once
from .predictor import Predictor, load_predictor
from .prompt_cache import KVSettings, WarmPrompts
from .prompt_cache_files import WarmPromptFiles
from .reuse import Reuse, check_overlap
from .structure import get_module
from .subnetwork import FFNRows, build_subnetwork
from .task_library import TaskLibrary
from .text import Text, selector_tokens, token_ids
from .tokenizers import load_predictor_tokenizer, load_tokenizer_of

_REMEMBERED_SELECTIONS = 256


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU device, where half precision is slow and, quantized, wrong; else as is."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def default_cache_bytes() -> int:
    """Half of the memory MLX may use."""
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return int(limit) // 2


def checked_selector(checkpoint: Checkpoint, selector: str) -> str:
    """The selector, if the checkpoint has it.

    Raises:
        IFPError: if it does not.
    """
    if selector not in checkpoint.selectors:
        raise IFPError(
            f"{checkpoint.path} has no selector {selector!r}; "
            f"it has: {', '.join(checkpoint.selectors)}."
        )
    return selector


@dataclass(frozen=True)
class Prepared:
    """A sub-network that is ready, and what getting it cost.

    Attributes:
        network: an mlx-lm model.
        selection: its channels, or None for the dense model.
        source: where the selection came from: ``predictor``, ``activations``, ``static``,
            ``memory``, ``disk``, ``given`` or ``dense``.
        select_seconds: time to get the selection.
        load_seconds: time to get the sub-network.
        bytes_read: bytes of channels read for it; 0 if it was in memory.
        channels_reused: channels, over all layers, whose rows came from another sub-network in
            memory; the others were read.
        reuse_overlap: if another selection stands in for the text's own (``reuse_overlap`` of
            :func:`load`), their overlap; ``selection`` is the one in use. Else None.
    """

    network: nn.Module
    selection: Selection | None
    source: str
    select_seconds: float
    load_seconds: float
    bytes_read: int
    channels_reused: int = 0
    reuse_overlap: float | None = None


class IFPModel:
    """A checkpoint in use: trunk in memory, sub-networks made and cached as texts ask for them.

    Made by :func:`load`. Thread-safe.

    Attributes:
        checkpoint: what was opened.
        k: channels kept in each layer, unless a call says otherwise.
        selector: the default selector.
        networks: the sub-networks in memory.
        tasks: the named tasks of this checkpoint: ``model.tasks.load("python").selection``.
        warm: the prompts whose keys and values are kept.
        reader: counts the bytes of channels read.
        predictor_loads: how often the predictor was loaded.
        selector_runs: how often a selector computed scores.
        memory: what keeps it within its memory limit, or None.
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
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.k = self.resolve_keep(keep)
        self.selector = checkpoint.ifp.selector
        self.selector = self._checked_selector(selector)
        self.networks = SubnetworkCache(
            default_cache_bytes() if cache_bytes is None else cache_bytes
        )
        self.reuse = None if reuse_overlap is None else Reuse(reuse_overlap, self.networks)
        self.selections = selection_cache
        self.tasks = task_library or TaskLibrary(checkpoint)
        files = None
        if selection_cache is not None:
            files = WarmPromptFiles(selection_cache.directory, str(checkpoint.path))
        self.warm = WarmPrompts(checkpoint.digest, dtype, files)
        if memory_limit is not None:
            # They are not part of the estimate; on disk they may be kept.
            self.warm.max_bytes = 0
        self.reader = ChannelReader(checkpoint.channels)
        self._residents = Residents(self.reader, checkpoint.ffns, dtype)
        self.predictor_loads = self.selector_runs = 0
        self._tokenizer_config = tokenizer_config
        self.memory: MemoryLimit | None = None
        if memory_limit is not None:
            # Before the first weight is read.
            use = use or Use(self.k, Generation(1), self.selector)
            self.memory = MemoryLimit(
                memory_limit, Estimator(checkpoint, dtype), self.networks, use
            )
        width = self.k if isinstance(self.k, int) else max(self.k)
        self.trunk = load_trunk(checkpoint, width, dtype)
        # The first guards dictionaries, and is never held for long. The second lets one selector
        # run at a time: two would need the memory of two, and be no faster.
        self._lock = threading.Lock()
        self._selector_lock = threading.RLock()
        self._tokenizer_lock = threading.Lock()
        self._selecting = Once(self._lock)
        self._remembered: OrderedDict[str, Selection] = OrderedDict()
        self._predictor: Predictor | None = None
        self._predictor_tokenizer: TokenizerWrapper | None = None

    def resolve_keep(self, keep: Keep | None) -> int | list[int]:
        """Channels to keep in each layer; None for what the checkpoint says."""
        checkpoint = self.checkpoint
        if keep is None:
            return checkpoint.ifp.k
        return resolve_keep(keep, checkpoint.d_ffn, len(checkpoint.ffns))

    def _checked_selector(self, selector: str | None) -> str:
        return checked_selector(self.checkpoint, selector or self.selector)

    # -- text -> scores -> selection

    def scores(self, text: Text, *, selector: str | None = None) -> mx.array:
        """Channel scores of a text, before the mask.

        Args:
            text: a prompt or a task, or token ids of the selector's own tokenizer.
            selector (str): ``predictor``, ``activations`` or ``static``; None for the default.

        Returns:
            mx.array: float32 [L, d_ffn].

        Raises:
            IFPError: if the text is empty or longer than the checkpoint's selectors take.
        """
        selector = self._checked_selector(selector)
        checkpoint = self.checkpoint
        with self._selector_lock:
            tokens = selector_tokens(self.selector_tokenizer(selector), text, checkpoint.ifp.text)
            self.selector_runs += 1
            if self.memory is not None:
                self.memory.before_selecting(selector, len(tokens))
            if selector == "static":
                scores = load_tensors(checkpoint.static, None)["scores"]
                mx.eval(scores)
                return scores
            if selector == "predictor":
                scores = self.predictor.scores(tokens)
                self._release_if_tight()
                return scores
            return activation_scores(
                self.trunk,
                self.reader,
                checkpoint.ffns,
                checkpoint.config,
                tokens,
                dtype=self.dtype,
            )

    @property
    def predictor(self) -> Predictor:
        """The sparsity predictor, loaded at the first use."""
        with self._selector_lock:
            if self._predictor is None:
                self._predictor = load_predictor(self.checkpoint, self.dtype, self.trunk)
                self.predictor_loads += 1
            return self._predictor

    def release_predictor(self) -> None:
        """Free the predictor's memory; it is loaded again when it is needed."""
        with self._selector_lock:
            self._predictor = None

    def _release_if_tight(self) -> None:
        if self.memory is not None and not self.memory.keeps_predictor:
            self.release_predictor()
            mx.clear_cache()

    def selector_tokenizer(self, selector: str | None = None) -> TokenizerWrapper:
        """The tokenizer that a selector reads with."""
        shared = self.checkpoint.ifp.predictor_embedding == "llm"
        if self._checked_selector(selector) != "predictor" or shared:
            return self.tokenizer
        with self._tokenizer_lock:
            if self._predictor_tokenizer is None:
                self._predictor_tokenizer = load_predictor_tokenizer(
                    self.checkpoint, self._tokenizer_config
                )
            return self._predictor_tokenizer

    def select(
        self, text: Text, *, selector: str | None = None, keep: Keep | None = None
    ) -> Selection:
        """The selection of a text, from the caches if it was made before.

        Args:
            text: a prompt or a task, or token ids of the selector's own tokenizer.
            selector (str): None for the default.
            keep: channels to keep; None for the checkpoint's k.
        """
        return self._select(text, selector, keep)[0]

    def _select(
        self, text: Text, selector: str | None = None, keep: Keep | None = None
    ) -> tuple[Selection, str]:
        selector = self._checked_selector(selector)
        k = self.k if keep is None else self.resolve_keep(keep)
        key = self.selection_key(text, selector, k)

        def remembered() -> tuple[Selection, str] | None:
            selection = self._remembered.get(key)
            if selection is None:
                return None
            self._remembered.move_to_end(key)
            return selection, "memory"

        def make() -> tuple[Selection, str]:
            selection, source = None, "disk"
            if self.selections is not None:
                selection = self.selections.load(self.checkpoint.digest, key)
            if selection is None:
                source = selector
                mask = asdict(self.checkpoint.ifp.mask)
                scores = self.scores(text, selector=selector)
                selection = select_channels(scores, k, checkpoint=self.checkpoint.digest, **mask)
                if self.selections is not None:
                    self.selections.store(
                        key,
                        selection,
                        {"selector": selector, "model": str(self.checkpoint.path), "k": k},
                    )
            with self._lock:
                self._remembered[key] = selection
                if len(self._remembered) > _REMEMBERED_SELECTIONS:
                    self._remembered.popitem(last=False)
            return selection, source

        (selection, source), made = self._selecting.get(key, remembered, make)
        return selection, source if made else "memory"

    def selection_key(
        self, text: Text, selector: str | None = None, k: int | list[int] | None = None
    ) -> str:
        """What names a selection on disk: the hash of all that determines it.

        The mask, the text's format and the weights are part of the checkpoint's digest.
        """
        if not isinstance(text, str):
            text = token_ids(text)
        selector = self._checked_selector(selector)
        settings = {
            "checkpoint": self.checkpoint.digest,
            "selector": selector,
            "k": self.k if k is None else k,
            "dtype": str(self.dtype),
            # A static selection is the same for every text.
            "text": text if selector != "static" else "",
        }
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    # -- selection -> sub-network

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
                self.trunk,
                self.reader,
                checkpoint.ffns,
                checkpoint.config,
                selection,
                self.dtype,
                read,
            )
            self._residents.add(network, selection, rows)
            _set_width(network, checkpoint.d_ffn if selection is None else selection.k)
            return network, nbytes

        network, _ = self.networks.get(_digest(selection), load)
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
            key = self._key_on_disk(text, selector, keep)
            selection, overlap = self.reuse.stand_in(selection, key)
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

    def _key_on_disk(self, text: Text, selector: str | None, keep: Keep | None) -> str:
        if self.reuse.on_disk is None:
            return ""
        k = self.k if keep is None else self.resolve_keep(keep)
        return self.selection_key(text, selector, k)

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
            _digest(prepared.selection), network, partial(_ffn_bytes, network, self.checkpoint)
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


def _digest(selection: Selection | None) -> str:
    return "dense" if selection is None else selection.digest


def _ffn_bytes(network: nn.Module, checkpoint: Checkpoint) -> int:
    """Bytes of a sub-network's own channels."""
    modules = (get_module(network, ffn.path) for ffn in checkpoint.ffns)
    return sum(array.nbytes for module in modules for _, array in tree_flatten(module.parameters()))


def _set_width(network: nn.Module, k: int | list[int]) -> None:
    """The sub-network's own arguments tell its width, for those who look there."""
    args = getattr(network, "args", None)
    if hasattr(args, "intermediate_size"):
        args.intermediate_size = k


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
