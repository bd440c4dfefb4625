"""Text -> scores -> selection, with what that needs loaded once and kept."""

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.directory import Checkpoint
from ..checkpoint.tokenizers import load_predictor_tokenizer
from ..checkpoint.weights import load_tensors
from ..llm.prompt import Text, token_ids
from ..lru import Once
from ..memory.limit import MemoryLimit
from ..selection.disk_cache import SelectionCache
from ..selection.keep import Keep, resolve_keep
from ..selection.selection import Selection, select_channels
from ..subnetwork.channels import ChannelReader
from .activations import activation_scores
from .predictor import Predictor, load_predictor
from .text import selector_tokens

_REMEMBERED_SELECTIONS = 256


class Selecting:
    """The half of :class:`~mlx_ifp.model.IFPModel` that knows texts. Thread-safe.

    Attributes:
        checkpoint: what was opened.
        tokenizer: its LLM's.
        dtype: the type that floats are cast to; None for as they are stored.
        k: channels kept in each layer, unless a call says otherwise.
        selector: the default selector.
        selections: those on disk, or None.
        reader: counts the bytes of channels read.
        trunk: an mlx-lm model with all but the FFN channels.
        memory: what keeps it within its memory limit, or None.
        predictor_loads: how often the predictor was loaded.
        selector_runs: how often a selector computed scores.
    """

    trunk: nn.Module
    memory: MemoryLimit | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: TokenizerWrapper,
        *,
        dtype: mx.Dtype | None,
        keep: Keep | None,
        selector: str | None,
        selections: SelectionCache | None,
        tokenizer_config: dict[str, Any] | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.k = self.resolve_keep(keep)
        self.selector = checkpoint.checked_selector(selector or checkpoint.ifp.selector)
        self.selections = selections
        self.reader = ChannelReader(checkpoint.channels)
        self.predictor_loads = self.selector_runs = 0
        self._tokenizer_config = tokenizer_config
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
        return self.checkpoint.checked_selector(selector or self.selector)

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
