"""The one way to generate: prompt -> selection -> sub-network -> tokens.

The command line, the Python API, ``cache_prompt`` and whatever serves answers make a
:class:`Request` and read its :class:`Answer`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import GenerationResponse, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..dense_pass.prefill import Prefilled
from ..errors import IFPError, one_line
from ..llm.messages import Message
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.overflow import computing_type, not_finite
from ..llm.prompt import Encoded, Prompt, prompt_ids, shared_prefix, token_ids
from ..model import IFPModel
from ..prompt_cache.files import PromptCache, load_cache_file
from ..prompt_cache.key import CacheKey, claim
from ..selection.keep import Keep
from ..selection.selection import Selection
from ..subnetwork.prepared import Chosen, Prepared
from .dense_prompt import DensePrompt, with_prefill
from .draft import draft_model_of
from .first_token import AfterPrompt
from .length import check_length
from .request import Request
from .stats import Stats, WarmStart, parameter_counts


class Answer:
    """A request that can be served; iterating over it selects, loads and generates, once.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        request (Request): what is asked for.
        tokens: the prompt as mlx-lm is given it, if it was encoded already.

    Attributes:
        request: as given.
        text: what selected; None if a selection was given, or the whole model.
        tokens: the prompt as mlx-lm is given it.
        prefill: who reads the prompt: ``dense``, the whole model, or ``pruned``, the network.
        warm: how the prompt began warm, once the first token is there; None if it did not.
        prefilled: the prompt as the whole model has read it, if it does, once ``ready`` is there.
        progress: called with the tokens processed, and all, while the whole model reads.

    Raises:
        IFPError: if the request cannot be served: a text is empty or too long, stored keys and
            values belong to another selection, or something does not fit the memory limit.
    """

    def __init__(
        self,
        model: IFPModel,
        tokenizer: TokenizerWrapper,
        request: Request,
        tokens: Encoded | None = None,
    ) -> None:
        request.check()
        self.request = request
        self.warm: WarmStart | None = None
        self._model, self._tokenizer = model, tokenizer
        self._first_token_seconds = 0.0
        self._last: GenerationResponse | None = None
        self._dense_prompt: DensePrompt | None = None
        self.prefilled: Prefilled | None = None
        self._rest: list[int] | None = None
        self.progress: Callable[[int, int], None] | None = None
        self.tokens = request.encode(tokenizer) if tokens is None else tokens
        check_length(model, tokenizer, request, self.tokens)
        self.prefill = request.prefill_by(model.checkpoint, model.selector)
        self.text = request.selecting_text(model, tokenizer)
        self._leave_room()
        self._draft_model = draft_model_of(request, model.trunk, tokenizer)
        self._prompt_cache = self._load_prompt_cache()
        if self.prefill == "dense":
            ids = prompt_ids(tokenizer, self.tokens)
            self._dense_prompt = DensePrompt(model, request, ids, self._most_positions())

    @cached_property
    def _chosen(self) -> Chosen:
        request, dense_prompt = self.request, self._dense_prompt
        chosen = self._model.choose(
            self.text,
            selection=request.selection,
            dense=request.dense,
            selector=request.selector,
            keep=request.keep,
            prior=request.prior,
            run_dense=None if dense_prompt is None else dense_prompt.run_dense,
        )
        # If that has read the prompt, it is the prefill's time.
        read = 0.0 if dense_prompt is None else dense_prompt.seconds
        return replace(chosen, seconds=chosen.seconds - read)

    @property
    def selection(self) -> Selection | None:
        """The channels that answer; None is the whole model."""
        return self._chosen.selection

    def go_on_from(self, prompt_cache: PromptCache, rest: list[int]) -> bool:
        """Read only the prompt's end; False if a selector had the whole model read it all."""
        if self._dense_prompt is None or not self._dense_prompt.seconds:
            self._prompt_cache, self._rest = prompt_cache, rest
        return self._rest is not None

    def to_read(self) -> tuple[list[int], PromptCache] | None:
        """What the whole model is to read: tokens, and the cache that they go to.

        It may be read together with other prompts, and is then given to :meth:`was_read`. None if
        there is nothing, or if the prompt cache comes from elsewhere.
        """
        dense_prompt, request = self._dense_prompt, self.request
        if dense_prompt is None or dense_prompt.seconds or request.warm:
            return None
        if self._rest is not None and self._prompt_cache is not None:
            return self._rest, self._prompt_cache
        if self._prompt_cache is not None:
            return None
        return prompt_ids(self._tokenizer, self.tokens), dense_prompt.new_cache()

    def was_read(self, prefilled: Prefilled) -> None:
        """Take what the whole model has made of :meth:`to_read`."""
        self.prefilled = prefilled
        self._prompt_cache = prefilled.cache
        self._claim()

    @cached_property
    def ready(self) -> Prepared:
        """The sub-network, and what getting it cost. Whoever asks for it first lets it be loaded.

        If the whole model reads the prompt, it does so before, as both need memory.

        Raises:
            IFPError: if it does not fit the memory limit, or the prompt cannot be read.
        """
        chosen = self._chosen
        if self._dense_prompt is not None and self.prefilled is None:
            self._read_densely(self._dense_prompt)
        return self._model.load(chosen)

    def _read_densely(self, dense_prompt: DensePrompt) -> None:
        tokens = self._rest
        if tokens is None and self.request.warm:
            tokens = self._start_warm(None)
        self._claim()
        self.prefilled = dense_prompt.read(self._prompt_cache, tokens, self.progress)
        if self._prompt_cache is None:
            self._prompt_cache = self.prefilled.cache

    def _claim(self) -> None:
        """Mark the prompt cache as this answer's."""
        dense = self.prefill == "dense"
        claim(self._prompt_cache or [], self.selection, dense_prefill=dense)

    def _leave_room(self) -> None:
        """Tell the memory limit what is coming, so that it can refuse what does not fit."""
        model, request = self._model, self.request
        if model.memory is None:
            return
        model.memory.expect(
            request.generation(self._tokenizer, self.tokens),
            request.ks(model),
            dense=request.dense,
            dense_prefill=self.prefill == "dense",
        )

    def _load_prompt_cache(self) -> PromptCache | None:
        if self.request.prompt_cache_file is None:
            return self.request.options.get("prompt_cache")
        return load_cache_file(self.request.prompt_cache_file, self.key)

    @property
    def key(self) -> CacheKey:
        """What the prompt's keys and values are right for."""
        model = self._model
        # What the whole model has read is right for every selection.
        selection = None if self.prefill == "dense" else self.selection
        return CacheKey.of(model.checkpoint.digest, model.dtype, selection, self.request.kv)

    def __iter__(self) -> Iterator[GenerationResponse]:
        """mlx-lm's responses; the sub-network stays in memory until the last one is taken.

        Raises:
            IFPError: if mlx-lm cannot go on, in one line.
        """
        ready, prefilled, start = self.ready, self.prefilled, time.perf_counter()
        before = ready.select_seconds + ready.load_seconds
        if prefilled is not None:
            before += prefilled.seconds + (0.0 if self.warm is None else self.warm.seconds)
        with self._model.using(ready) as network, one_line("Generation stopped"):
            tokens: Encoded
            if prefilled is not None:
                tokens = prefilled.tokens
                network = AfterPrompt(network, prefilled.logits, len(tokens))
            else:
                self.request.kv.check(network, self._most_positions())
                tokens = self._start_warm(ready) if self.request.warm else self.tokens
            self._claim()
            options = dict(self.request.options) | {
                "prompt_cache": self._prompt_cache,
                "draft_model": self._draft_model,
            }
            try:
                for response in mlx_lm.stream_generate(network, self._tokenizer, tokens, **options):
                    if prefilled is not None:
                        response = with_prefill(response, prefilled.seconds)
                    if self._last is None:
                        self._check_finite(response)
                        self._first_token_seconds = before + time.perf_counter() - start
                    self._last = response
                    yield response
            finally:
                # With kv_bits mlx-lm puts new, quantized layers into the list.
                self._claim()

    def _most_positions(self) -> int | None:
        """Tokens that keys and values are kept of at most; None if generation has no bound."""
        # 256 is what mlx-lm generates if nothing is said.
        more = self.request.options.get("max_tokens", 256)
        count = self.request.positions(self._tokenizer, self.tokens)
        return None if more < 0 else count + more

    def _check_finite(self, response: GenerationResponse) -> None:
        """Raises IFPError for logits from which no token can be chosen; mlx-lm would choose one."""
        if mx.isnan(response.logprobs).any():
            model = self._model
            weights = model.checkpoint.trunk.values()
            raise not_finite("The logits are no numbers", computing_type(model.dtype, weights))

    def _start_warm(self, ready: Prepared | None) -> list[int]:
        """Set the prompt cache to the prompt's first tokens, and give the tokens that are left.

        ``ready`` has read them; None is the whole model.
        """
        start, warm, request = time.perf_counter(), self._model.warm, self.request
        # Request.check has seen to it that a warm prompt is made of messages.
        tokens = token_ids(cast(list[int], self.tokens))
        messages = cast(list[Message], request.prompt)
        prefix = shared_prefix(self._tokenizer, messages, tokens, **request.chat_template_kwargs)
        before = warm.info
        self._prompt_cache, rest = warm.start(
            ready,
            tokens,
            prefix,
            request.kv,
            disk=request.warm_on_disk,
            prefill_step_size=request.options.get("prefill_step_size", PREFILL_STEP_SIZE),
        )
        source = "disk" if warm.info.loads > before.loads else "memory"
        source = "prefill" if warm.info.prefilled > before.prefilled else source
        seconds = time.perf_counter() - start
        self.warm = WarmStart(source, seconds, len(tokens) - len(rest))
        return rest

    def fill(self, progress: Callable[[int, int], None] | None = None) -> PromptCache:
        """Process the prompt, but generate nothing.

        Args:
            progress (Callable): called with the tokens processed, and all.

        Returns:
            list: mlx-lm's prompt cache.

        Raises:
            IFPError: if mlx-lm cannot process it, in one line.
        """
        kv, tokens = self.request.kv, self.tokens
        if self._dense_prompt is not None:
            prompt_cache = self._dense_prompt.read(progress=progress).cache
            kv.quantize(prompt_cache)
            return claim(prompt_cache, None)
        with (
            self._model.using(self.ready) as network,
            one_line("The prompt could not be processed"),
        ):
            kv.check(network, self.request.positions(self._tokenizer, tokens))
            prompt_cache = make_prompt_cache(network, kv.max_kv_size)
            steps = generate_step(
                mx.array(prompt_ids(self._tokenizer, tokens)),
                network,
                max_tokens=0,
                prompt_cache=prompt_cache,
                prefill_step_size=self.request.options.get("prefill_step_size", PREFILL_STEP_SIZE),
                kv_bits=kv.kv_bits,
                kv_group_size=kv.kv_group_size,
                quantized_kv_start=kv.quantized_kv_start,
                prompt_progress_callback=progress,
            )
            deque(steps, maxlen=0)
            return claim(prompt_cache, self.selection)

    @property
    def stats(self) -> Stats:
        """What it cost, after the last token.

        Raises:
            IFPError: before the first one.
        """
        if self._last is None:
            raise IFPError("Nothing was generated yet.")
        counts = parameter_counts(self._model, self.ready)
        seconds = self._first_token_seconds
        return Stats.of(self.ready, self._last, seconds, counts, self.warm, self.prefill)


def stream_generate(
    model: IFPModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    task: str | None = None,
    *,
    task_from: str | None = None,
    selection: Selection | None = None,
    dense: bool = False,
    selector: str | None = None,
    keep: Keep | None = None,
    prior: np.ndarray | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    ignore_chat_template: bool = False,
    warm: bool = False,
    warm_on_disk: bool = False,
    prompt_cache_file: str | Path | None = None,
    prefill: str | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's ``stream_generate`` on the sub-network that the task or the prompt selects.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        prompt: a string, token ids, or a list of messages (which the chat template formats). A last
            message of the assistant is continued.
        task (str): a task description that selects. Without it the prompt does: of messages the
            first of the user, for the whole conversation.
        task_from (str): ``"system"``: the system message is the task.
        selection (Selection): use this one.
        dense (bool): use the whole model.
        selector (str): ``predictor``, ``activations``, ``static`` or ``glass``.
        keep: channels to keep in each layer, instead of the checkpoint's k.
        prior (array): float32 [L, d_ffn], what ``glass`` blends with the text that selects instead
            of the checkpoint's prior, such as ``model.tasks.load("python").scores``.
        chat_template_kwargs (dict): arguments for the chat template.
        ignore_chat_template (bool): of messages only what the user says first is the prompt.
        warm (bool): keep the keys and values of what stands before the first user message, in
            memory, so that the next prompt of the same selection begins after it. The prompt must
            be messages.
        warm_on_disk (bool): with ``warm``, keep them on disk too, for the next process.
        prompt_cache_file: a file of ``mlx_ifp.cache_prompt`` that the prompt continues.
        prefill (str): who reads the prompt: ``dense``, the whole model, layer by layer from disk,
            or ``pruned``, the sub-network. The default is what the checkpoint says, or else
            ``pruned`` with a trained predictor or a draft model, and ``dense`` without.
        kwargs: passed on to ``mlx_lm.stream_generate``; ``draft_model`` may be a name.

    Yields:
        GenerationResponse: mlx-lm's.

    Raises:
        IFPError: if a text is empty or too long, stored keys and values belong to another
            selection, ``warm`` cannot be, or mlx-lm stops.
    """
    request = Request(
        prompt,
        task,
        task_from,
        selection,
        dense,
        selector,
        keep,
        prior,
        chat_template_kwargs or {},
        ignore_chat_template,
        warm=warm,
        warm_on_disk=warm_on_disk,
        prompt_cache_file=prompt_cache_file,
        prefill=prefill,
        options=kwargs,
    )
    yield from Answer(model, tokenizer, request)
