"""Text -> selection -> sub-network: this ties the layers below together."""

import contextlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.directory import Checkpoint
from .checkpoint.weights import load_trunk
from .dense_pass.prefill import RunDense
from .device import default_cache_bytes
from .errors import IFPError
from .llm.context import context_length
from .llm.kv_cache import Generation, KVSettings
from .llm.prompt import Text
from .memory.budget import Estimator, Use
from .memory.limit import MemoryLimit
from .prompt_cache.files import WarmPromptFiles
from .prompt_cache.warm import WarmPrompts
from .selection.disk_cache import SelectionCache
from .selection.keep import Keep, compact
from .selection.selection import Selection
from .selection.task_library import TaskLibrary
from .selectors.examples import (
    MAX_TOKENS,
    Example,
    ExampleScores,
    examples_of,
    score_examples,
    with_answers,
)
from .selectors.predictor import Predictor
from .selectors.scoring import Scoring
from .selectors.selector import Selector, resolved_keep
from .subnetwork.ahead import Ahead
from .subnetwork.cache import SubnetworkCache
from .subnetwork.channels import ChannelReader
from .subnetwork.parent import Parent
from .subnetwork.prepared import Chosen, Prepared
from .subnetwork.reuse import Reuse
from .subnetwork.store import Loaded, SubnetworkStore


class IFPModel:
    """A checkpoint in use: its trunk is in memory, sub-networks are made as texts ask for them.

    :func:`~mlx_ifp.opening.load` makes it. Thread-safe.

    Attributes:
        checkpoint: what was opened.
        tokenizer: that of its LLM.
        dtype: the type that floats are cast to; None leaves them as they are stored.
        memory: what keeps it within its memory limit, or None.
        parent: the trunk, and the reader of the channels.
        text_selector: text -> selection.
        store: selection -> sub-network.
        networks: the sub-networks in memory.
        reuse: finds the stand-in for a new selection that is nearly the same; None for no reuse.
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
        scoring: Scoring | None = None,
        cache_bytes: int | None = None,
        selection_cache: SelectionCache | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        task_library: TaskLibrary | None = None,
        reuse_overlap: float | None = None,
        memory_limit: int | None = None,
        use: Use | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self.checkpoint, self.tokenizer, self.dtype = checkpoint, tokenizer, dtype
        ks = resolved_keep(checkpoint, keep)
        default = checkpoint.checked_selector(selector or checkpoint.ifp.selector)
        self.networks: SubnetworkCache[Loaded] = SubnetworkCache(
            default_cache_bytes() if cache_bytes is None else cache_bytes
        )
        memory = None
        if memory_limit is not None:
            # What does not fit is refused before the first weight is read.
            dense_prefill = checkpoint.ifp.prefill_with(default) == "dense"
            use = use or Use(ks, Generation(1), default, dense_prefill=dense_prefill)
            memory = MemoryLimit(memory_limit, Estimator(checkpoint, dtype), self.networks, use)
        self.memory = memory
        arrays = None if ahead is None else ahead.take_trunk()
        trunk = load_trunk(checkpoint, max(ks), dtype, arrays)
        self.parent = Parent.of(checkpoint, trunk, dtype)
        self.text_selector = Selector(
            checkpoint,
            self.parent,
            tokenizer,
            keep=keep,
            default=default,
            scoring=scoring,
            on_disk=selection_cache,
            tokenizer_config=tokenizer_config,
            # These are no methods of this object, because a cycle of references would keep its
            # memory until the garbage collector runs.
            make_room=None if memory is None else memory.before_selecting,
            keeps_predictor=None if memory is None else lambda: memory.keeps_predictor,
        )
        self.store = SubnetworkStore(self.parent, self.networks)
        self.reuse = None if reuse_overlap is None else Reuse(reuse_overlap, self.networks)
        self.tasks = task_library or TaskLibrary(checkpoint)
        files = None
        if selection_cache is not None:
            files = WarmPromptFiles(selection_cache.directory, str(checkpoint.path))
        self.warm = WarmPrompts(checkpoint.digest, dtype, files, parent=self.parent)
        if memory_limit is not None:
            # Their bytes are not in the estimate, so they are kept on disk only.
            self.warm.max_bytes = 0

    # Text -> selection.

    @property
    def k(self) -> int | list[int]:
        """Channels kept unless a call says otherwise: one number, or one for each layer."""
        return compact(self.text_selector.ks)

    @property
    def selector(self) -> str:
        """The default selector."""
        return self.text_selector.default

    @property
    def selections(self) -> SelectionCache | None:
        """The selections on disk, or None."""
        return self.text_selector.on_disk

    @property
    def trunk(self) -> nn.Module:
        """An mlx-lm model with all but the FFN channels."""
        return self.parent.trunk

    @property
    def reader(self) -> ChannelReader:
        """What reads channels, and counts their bytes."""
        return self.parent.reader

    @property
    def predictor(self) -> Predictor:
        """The sparsity predictor, loaded at the first use."""
        return self.text_selector.predictor

    @property
    def predictor_loads(self) -> int:
        """How many times the predictor was loaded."""
        return self.text_selector.predictor_loads

    @property
    def selector_runs(self) -> int:
        """How many times a selector computed scores."""
        return self.text_selector.runs

    def release_predictor(self) -> None:
        """Free the predictor's memory; it is loaded again when it is needed."""
        self.text_selector.release_predictor()

    def selector_tokenizer(self, selector: str | None = None) -> TokenizerWrapper:
        """The tokenizer that a selector reads with; None for the default selector."""
        return self.text_selector.tokenizer(selector)

    def scores(
        self, text: Text, *, selector: str | None = None, prior: np.ndarray | None = None
    ) -> mx.array:
        """Channel scores of a text, float32 [L, d_ffn]: see :meth:`Selector.scores`."""
        return self.text_selector.scores(text, selector=selector, prior=prior)

    def select(
        self,
        text: Text | None = None,
        *,
        examples: Iterable[dict[str, Any]] | ExampleScores | None = None,
        selector: str | None = None,
        keep: Keep | None = None,
        prior: np.ndarray | None = None,
    ) -> Selection:
        """The selection of a text, from the caches if it was made before, or that of examples.

        Args:
            text: a prompt or a task, or token ids of the selector's own tokenizer.
            examples: of a task, instead of a text: see :meth:`score_examples`, whose result may
                stand here, too, so that several k need one run.
            selector (str): None for the default.
            keep: channels to keep; None for the checkpoint's k.
            prior (array): float32 [L, d_ffn], what ``glass`` blends with the text instead of the
                checkpoint's prior, such as the ``scores`` of examples.

        Raises:
            IFPError: if both or neither of text and examples are given, or one cannot be used.
        """
        if (text is None) == (examples is None):
            raise IFPError("Give either a text or examples to select by.")
        if examples is not None:
            if not isinstance(examples, ExampleScores):
                examples = self.score_examples(examples)
            return self.text_selector.of_scores(mx.array(examples.scores), keep)
        assert text is not None
        return self.text_selector.select(text, selector=selector, keep=keep, prior=prior)

    def score_examples(
        self,
        examples: Iterable[dict[str, Any] | Example],
        *,
        max_tokens: int = MAX_TOKENS,
        progress: Callable[[int], object] = lambda _: None,
    ) -> ExampleScores:
        """Score channels by what the dense model's do while it answers examples of a task.

        A fitted predictor's scores for the examples' prompts have a part in it.

        Answers that are missing are written by the dense model, greedily. It is in memory for that
        if there is room; if not, its FFNs are read anew for each token.

        Args:
            examples: rows as in training data: ``messages``, or ``prompt`` and ``completion``,
                where the answer may be missing.
            max_tokens (int): the most tokens of an answer that is written.
            progress (Callable): called with the number of answers that were written.

        Raises:
            IFPError: naming the first example that cannot be used, and why.
        """
        limit = context_length(self.checkpoint.config)
        given = examples_of(examples, self.tokenizer, limit)
        if self.memory is not None:
            selector = "predictor" if self.checkpoint.fitted else "activations"
            self.memory.before_selecting(selector, max(len(each.tokens) for each in given))
        roomy = self.memory is None and self.reader.nbytes <= self.networks.max_bytes
        missing = sum(each.answer[0] == each.answer[1] for each in given)
        complete = with_answers(
            self.parent,
            given,
            set(self.tokenizer.eos_token_ids),
            max_tokens=max_tokens,
            network=self.dense() if missing and roomy else None,
            progress=progress,
        )
        return score_examples(
            self.parent,
            complete,
            self.text_selector.scoring.statistic,
            head=self.text_selector.own_state_head if self.checkpoint.fitted else None,
            written=missing,
        )

    def selection_key(
        self,
        text: Text,
        selector: str | None = None,
        keep: Keep | None = None,
        prior: np.ndarray | None = None,
    ) -> str:
        """What names a text's selection on disk: see :meth:`Selector.key`."""
        ks = None if keep is None else resolved_keep(self.checkpoint, keep)
        return self.text_selector.key(text, selector, ks, prior)

    # Selection -> network.

    def subnetwork(self, selection: Selection) -> nn.Module:
        """The sub-network of a selection: a stock mlx-lm model that shares the trunk.

        Raises:
            IFPError: if the selection is of another model.
        """
        return self._load(selection).network

    def dense(self) -> nn.Module:
        """The whole model, for comparison: an mlx-lm model with all d_ffn channels."""
        return self._load(None).network

    def _make_room(self, selection: Selection | None) -> None:
        if self.memory is not None:
            self.memory.before_loading(selection)
            self.text_selector.release_if_tight()

    def _load(self, selection: Selection | None) -> Loaded:
        if selection is not None and selection.checkpoint not in ("", self.checkpoint.digest):
            raise IFPError("The selection was made with another checkpoint.")
        loaded = self.store.get(selection, self._make_room)
        if self.reuse is not None and selection is not None:
            self.reuse.add(selection)
        return loaded

    def prepare(self, text: Text | None = None, **how: Any) -> Prepared:
        """Select and load: :meth:`choose`, then :meth:`load`.

        Args:
            text: as for :meth:`choose`.
            how: the other arguments of :meth:`choose`.

        Raises:
            IFPError: what these two raise.
        """
        return self.load(self.choose(text, **how))

    def choose(
        self,
        text: Text | None = None,
        *,
        selection: Selection | None = None,
        dense: bool = False,
        selector: str | None = None,
        keep: Keep | None = None,
        prior: np.ndarray | None = None,
        run_dense: RunDense | None = None,
    ) -> Chosen:
        """Select, but load nothing.

        Args:
            text: what selects, unless ``selection`` or ``dense`` is given.
            selection (Selection): use this one.
            dense (bool): use all channels.
            selector (str): None for the default.
            keep: channels to keep; None for the checkpoint's k.
            prior (array): as for :meth:`select`.
            run_dense (Callable): see :meth:`Selector.scores`.

        Raises:
            IFPError: if nothing of these is given, or the text is empty or too long.
        """
        if selection is not None or dense:
            return Chosen(selection, "dense" if dense else "given", 0.0)
        if text is None:
            raise IFPError("Nothing selects: give a text, a selection, or dense=True.")
        start, overlap = time.perf_counter(), None
        selection, source = self.text_selector.find(text, selector, keep, run_dense, prior=prior)
        seconds = time.perf_counter() - start
        # A selection that is given never has a stand-in.
        if self.reuse is not None:
            selection, overlap = self.reuse.stand_in(selection)
        return Chosen(selection, source, seconds, overlap)

    def load(self, chosen: Chosen) -> Prepared:
        """The network of what :meth:`choose` gave.

        Raises:
            IFPError: if the selection is of another checkpoint, or the network does not fit the
                memory limit.
        """
        start = time.perf_counter()
        loaded = self._load(chosen.selection)
        return Prepared(
            network=loaded.network,
            selection=chosen.selection,
            source=chosen.source,
            select_seconds=chosen.seconds,
            load_seconds=time.perf_counter() - start,
            bytes_read=loaded.bytes_read,
            channels_reused=loaded.channels_reused,
            reuse_overlap=chosen.reuse_overlap,
        )

    def using(self, prepared: Prepared) -> AbstractContextManager[nn.Module]:
        """``with model.using(prepared) as network``: keep it in memory while the block runs.

        Without this, a sub-network may be evicted while it generates. It lives on, but its bytes
        do not count, and the next call that asks for it loads it a second time.
        :func:`mlx_ifp.stream_generate` does this by itself.

        Args:
            prepared (Prepared): from :meth:`prepare`.
        """
        return self.store.using(prepared.selection, prepared.network)

    def warm_prompt(
        self,
        prepared: Prepared | None,
        tokens: list[int] | mx.array,
        settings: KVSettings | None = None,
        **kwargs: Any,
    ) -> int:
        """Prefill a prefix, such as a system prompt, and keep it: see :meth:`WarmPrompts.warm`.

        ``prompt_cache, rest = model.warm.fetch(prepared, tokens)`` uses it. The two are the
        ``prompt_cache`` and the ``prompt`` of mlx-lm.

        Returns:
            int: tokens that were processed now; 0 if the prefix was kept already.
        """
        with contextlib.nullcontext() if prepared is None else self.using(prepared):
            return self.warm.warm(prepared, tokens, settings, **kwargs)
