"""Text -> scores -> selection, with what that needs loaded once and kept."""

import hashlib
import json
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.directory import Checkpoint
from ..checkpoint.tokenizers import load_predictor_tokenizer, load_tokenizer_of
from ..checkpoint.weights import load_tensors
from ..dense_pass.prefill import RunDense
from ..errors import IFPError
from ..llm.overflow import computing_type
from ..llm.prompt import Text, token_ids
from ..lru import LRU
from ..selection.by_layer import check_by_layer
from ..selection.disk_cache import SelectionCache
from ..selection.keep import Keep, compact, per_layer, resolve_keep
from ..selection.ranks import blended
from ..selection.selection import Selection, check_finite
from ..subnetwork.parent import Parent
from .activations import activation_scores
from .own_state import own_state_scores
from .predictor import Predictor, PredictorHead, load_head, load_predictor
from .scoring import Part, Scoring, norms_of, select
from .text import selector_tokens

_REMEMBERED_SELECTIONS = 256


class Selector:
    """What a checkpoint selects for texts: its selectors, and what is remembered. Thread-safe.

    ``Selector(checkpoint, Parent.load(checkpoint))`` is enough to select.

    Args:
        checkpoint (Checkpoint): an opened one.
        parent (Parent): its trunk and channels; the predictor's floats are cast to its type too.
        tokenizer: of the LLM; None loads it when it is needed.
        keep: channels to keep in each layer; None for what the checkpoint says.
        default (str): the selector that is used unless a call names one; None for what the
            checkpoint says.
        scoring (Scoring): how channels are scored without training; None for what the checkpoint
            says.
        on_disk (SelectionCache): where selections are kept for the next process, or None.
        tokenizer_config (dict): passed to tokenizers that are loaded, as in mlx-lm.
        make_room (Callable): called with the selector's name and its number of tokens before it
            runs; frees what must not be in memory meanwhile.
        keeps_predictor (Callable): says whether the predictor may stay in memory after it ran.

    Attributes:
        checkpoint, parent, default, scoring, on_disk: as above.
        ks: channels kept in each of L layers, unless a call says otherwise.
        predictor_loads: how often the predictor was loaded.
        runs: how often a selector computed scores.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parent: Parent,
        tokenizer: TokenizerWrapper | None = None,
        *,
        keep: Keep | None = None,
        default: str | None = None,
        scoring: Scoring | None = None,
        on_disk: SelectionCache | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        make_room: Callable[[str, int], None] | None = None,
        keeps_predictor: Callable[[], bool] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.parent = parent
        self.ks = resolved_keep(checkpoint, keep)
        self.default = checkpoint.checked_selector(default or checkpoint.ifp.selector)
        self.scoring = scoring or Scoring.of(checkpoint)
        if self.scoring.by_layer:
            check_by_layer(self.ks, checkpoint.d_ffn)
        self.on_disk = on_disk
        self.predictor_loads = self.runs = 0
        self._make_room = make_room
        self._keeps_predictor = keeps_predictor
        self._tokenizer_config = tokenizer_config
        # One selector runs at a time: two would need the memory of two, and be no faster.
        self._selector_lock = threading.RLock()
        self._tokenizer_lock = threading.Lock()
        # Selections, and where each came from.
        self._remembered: LRU[str, tuple[Selection, str]] = LRU(_REMEMBERED_SELECTIONS)
        self._predictor: Predictor | None = None
        self._head: PredictorHead | None = None
        self._tokenizer = tokenizer
        self._predictor_tokenizer: TokenizerWrapper | None = None

    def _checked(self, selector: str | None, prior: np.ndarray | None = None) -> str:
        selector = selector or self.default
        if selector == "glass" and prior is not None:
            return selector
        return self.checkpoint.checked_selector(selector)

    def _ks(self, keep: Keep | None) -> list[int]:
        return self.ks if keep is None else resolved_keep(self.checkpoint, keep)

    def scores(
        self,
        text: Text,
        *,
        selector: str | None = None,
        prior: np.ndarray | None = None,
        run_dense: RunDense | None = None,
    ) -> mx.array:
        """Channel scores of a text, before the mask.

        Args:
            text: a prompt or a task, or token ids of the selector's own tokenizer.
            selector (str): ``predictor``, ``activations``, ``static`` or ``glass``; None for the
                default.
            prior (array): float32 [L, d_ffn], what ``glass`` blends with the prompt instead of the
                checkpoint's prior, such as the scores of a task from examples.
            run_dense (Callable): runs the dense LLM for selectors that need it.

        Returns:
            mx.array: float32 [L, d_ffn].

        Raises:
            IFPError: if the text is empty or longer than the checkpoint's selectors take.
        """
        return self._scored(text, self._checked(selector, prior), prior, run_dense)[0]

    def _scored(
        self, text: Text, selector: str, prior: np.ndarray | None, run_dense: RunDense | None
    ) -> tuple[mx.array, list[Part]]:
        """Scores, and the parts by which layers are compared."""
        with self._selector_lock:
            tokens = selector_tokens(self.tokenizer(selector), text, self.checkpoint.ifp.text)
            self.runs += 1
            if self._make_room is not None:
                self._make_room(selector, len(tokens))
            if selector == "static":
                return self._stored_scores, [Part(self._stored_scores, "griffin")]
            if selector == "predictor":
                scores, parts = self._predicted(tokens, run_dense)
                self.release_if_tight()
                return scores, parts
            scoring = self.scoring
            scores = activation_scores(
                self.parent, tokens, statistic=scoring.statistic, run_dense=run_dense
            )
            if selector == "activations":
                return scores, [Part(scores, scoring.statistic)]
            # Ranks would hide numbers that are not finite.
            check_finite(scores, self._computed_in(selector))
            statistic = "griffin" if prior is None else scoring.statistic
            prior = np.array(self._stored_scores) if prior is None else prior
            if prior.shape != scores.shape or not np.isfinite(prior).all():
                raise IFPError(
                    f"prior must be finite scores of the shape {scores.shape}, not {prior.shape}."
                )
            parts = [
                Part(scores, scoring.statistic, scoring.blend),
                Part(prior, statistic, 1 - scoring.blend),
            ]
            return mx.array(blended(np.array(scores), prior, scoring.blend)), parts

    @property
    def own_state_head(self) -> PredictorHead | None:
        """The predictor that reads the LLM's own states, loaded at the first use; or None."""
        if not self.checkpoint.reads_own_state:
            return None
        if self._head is None:
            self._head = load_head(self.checkpoint, self.parent.dtype)
            self.predictor_loads += 1
        return self._head

    def _predicted(
        self, tokens: list[int], run_dense: RunDense | None
    ) -> tuple[mx.array, list[Part]]:
        """The predictor's scores, with its own backbone or with the LLM as such."""
        head = self.own_state_head
        if head is None:
            scores = self.predictor.scores(tokens)
            return scores, [Part(scores, None)]
        blend = self.scoring.blend
        predicted, own = own_state_scores(
            self.parent, head, tokens, with_own=blend > 0, run_dense=run_dense
        )
        # What a fitted head predicts is GRIFFIN's statistic, too.
        statistic = "griffin" if self.checkpoint.fitted else None
        if own is None:
            # Not their ranks, because soft values come from the scores themselves.
            return predicted, [Part(predicted, statistic)]
        for scores in (own, predicted):
            # Ranks would hide numbers that are not finite.
            check_finite(scores, self._computed_in("predictor"))
        parts = [Part(own, "griffin", blend), Part(predicted, statistic, 1 - blend)]
        return mx.array(blended(np.array(own), np.array(predicted), blend)), parts

    @cached_property
    def _stored_scores(self) -> mx.array:
        scores = load_tensors(self.checkpoint.static, None)["scores"]
        mx.eval(scores)
        return scores

    @property
    def predictor(self) -> Predictor:
        """The sparsity predictor, loaded at the first use.

        Raises:
            IFPError: if its backbone is the LLM, which is no network of its own.
        """
        if self.checkpoint.reads_own_state:
            raise IFPError(
                f"The predictor of {self.checkpoint.path} has the LLM as its backbone, so it is no "
                "network of its own."
            )
        with self._selector_lock:
            if self._predictor is None:
                parent = self.parent
                self._predictor = load_predictor(self.checkpoint, parent.dtype, parent.trunk)
                self.predictor_loads += 1
            return self._predictor

    def release_predictor(self) -> None:
        """Free the predictor's memory; it is loaded again when it is needed."""
        with self._selector_lock:
            self._predictor = self._head = None

    def release_if_tight(self) -> None:
        """Free the predictor's memory unless it may stay."""
        if self._keeps_predictor is not None and not self._keeps_predictor():
            self.release_predictor()
            mx.clear_cache()

    def tokenizer(self, selector: str | None = None) -> TokenizerWrapper:
        """The tokenizer that a selector reads with; None for the default selector."""
        # glass is no predictor, and a prior of its own may stand in for the checkpoint's.
        predicts = selector != "glass" and self._checked(selector) == "predictor"
        own = predicts and self.checkpoint.has_predictor_tokenizer
        with self._tokenizer_lock:
            if own and self._predictor_tokenizer is None:
                self._predictor_tokenizer = load_predictor_tokenizer(
                    self.checkpoint, self._tokenizer_config
                )
            if not own and self._tokenizer is None:
                self._tokenizer = load_tokenizer_of(self.checkpoint, self._tokenizer_config)
            # One of the two was just made, if it was not there.
            return cast(TokenizerWrapper, self._predictor_tokenizer if own else self._tokenizer)

    def select(
        self,
        text: Text,
        *,
        selector: str | None = None,
        keep: Keep | None = None,
        prior: np.ndarray | None = None,
    ) -> Selection:
        """The selection of a text, from the caches if it was made before.

        Args:
            text: a prompt or a task, or token ids of the selector's own tokenizer.
            selector (str): None for the default.
            keep: channels to keep; None for ``ks``.
            prior (array): as for :meth:`scores`.
        """
        return self.find(text, selector, keep, prior=prior)[0]

    def find(
        self,
        text: Text,
        selector: str | None = None,
        keep: Keep | None = None,
        run_dense: RunDense | None = None,
        *,
        prior: np.ndarray | None = None,
    ) -> tuple[Selection, str]:
        """As :meth:`select`, with where it came from: ``memory``, ``disk`` or the selector.

        ``run_dense`` is that of :meth:`scores`; it is not called if the selection is known.
        """
        selector, ks = self._checked(selector, prior), self._ks(keep)
        key = self.key(text, selector, ks, prior)

        def scored() -> tuple[mx.array, list[Part]]:
            return self._scored(text, selector, prior, run_dense)

        (selection, source), made = self._remembered.get_or_make(
            key, lambda: (self._make(key, selector, ks, scored), 1)
        )
        return selection, source if made else "memory"

    def _make(
        self,
        key: str,
        selector: str,
        ks: list[int],
        scored: Callable[[], tuple[mx.array, list[Part]]],
    ) -> tuple[Selection, str]:
        """The selection from the disk, or from new scores, and where it came from."""
        checkpoint, on_disk = self.checkpoint, self.on_disk
        if on_disk is not None:
            selection = on_disk.load(checkpoint.digest, key)
            if selection is not None:
                return selection, "disk"
        selection = self._select(*scored(), ks, selector)
        if on_disk is not None:
            metadata = {"selector": selector, "model": str(checkpoint.path), "k": compact(ks)}
            on_disk.store(key, selection, metadata)
        return selection, selector

    def of_scores(self, scores: mx.array, keep: Keep | None = None) -> Selection:
        """The selection of a statistic [L, d_ffn], such as that of a task's examples.

        Args:
            scores (mx.array): float32 [L, d_ffn].
            keep: channels to keep; None for ``ks``.
        """
        parts = [Part(scores, self.scoring.statistic)]
        return self._select(scores, parts, self._ks(keep), "activations")

    def _select(
        self, scores: mx.array, parts: list[Part], ks: list[int], selector: str
    ) -> Selection:
        return select(
            self.checkpoint,
            scores,
            ks,
            parts,
            by_layer=self.scoring.by_layer,
            norms=lambda: self._norms,
            computed_in=self._computed_in(selector),
        )

    @cached_property
    def _norms(self) -> mx.array:
        """Norms of the down projections' columns, read once: [L, d_ffn]."""
        return norms_of(self.checkpoint, self.parent.reader)

    def _computed_in(self, selector: str) -> mx.Dtype | None:
        """The type that a selector computes in; None if it only reads scores."""
        if selector == "static":
            return None
        checkpoint = self.checkpoint
        own = selector == "predictor" and not checkpoint.reads_own_state
        weights = checkpoint.predictor if own else checkpoint.trunk
        return computing_type(self.parent.dtype, weights.values())

    def key(
        self,
        text: Text,
        selector: str | None = None,
        ks: list[int] | None = None,
        prior: np.ndarray | None = None,
    ) -> str:
        """What names a selection on disk: the hash of all that determines it.

        The mask, the text's format and the weights are part of the checkpoint's digest.
        """
        if not isinstance(text, str):
            text = token_ids(text)
        selector = self._checked(selector, prior)
        settings: dict[str, Any] = {
            "checkpoint": self.checkpoint.digest,
            "selector": selector,
            "k": compact(self.ks if ks is None else ks),
            "dtype": str(self.parent.dtype),
            # A static selection is the same for every text.
            "text": text if selector != "static" else "",
            "by_layer": self.scoring.by_layer,
        }
        if selector in ("activations", "glass"):
            settings["statistic"] = self.scoring.statistic
        if selector == "glass" or (selector == "predictor" and self.checkpoint.reads_own_state):
            settings["blend"] = self.scoring.blend
        if selector == "glass":
            given = b"" if prior is None else np.ascontiguousarray(prior, np.float32).tobytes()
            settings["prior"] = hashlib.sha256(given).hexdigest()
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def resolved_keep(checkpoint: Checkpoint, keep: Keep | None) -> list[int]:
    """Channels to keep in each of L layers; None for what the checkpoint says."""
    layers = len(checkpoint.ffns)
    if keep is None:
        return per_layer(checkpoint.ifp.k, layers)
    return resolve_keep(keep, checkpoint.d_ffn, layers)
