"""The whole model reads a prompt for the sub-network that answers it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache

from ..dense_pass.layers import DensePass
from ..dense_pass.prefill import Prefilled, PromptPass, RunDense, dense_prefill, without_ffns
from ..errors import one_line
from ..llm.modules import PREFILL_STEP_SIZE
from ..model import IFPModel
from ..prompt_cache.files import PromptCache
from .request import Request


class DensePrompt:
    """A request's prompt, which the whole model reads before the sub-network is loaded.

    Args:
        model (IFPModel): what answers.
        request (Request): what is asked for.
        tokens (list): ids of the prompt that the request's ``encode`` gives.
        positions (int): tokens that keys and values are kept of at most; None for no bound.

    Raises:
        IFPError: if mlx-lm cannot keep the keys and values as the request says.
    """

    def __init__(
        self, model: IFPModel, request: Request, tokens: list[int], positions: int | None
    ) -> None:
        self._model, self._request, self._tokens = model, request, tokens
        self._step = request.options.get("prefill_step_size", PREFILL_STEP_SIZE)
        if request.kv.kv_bits is not None:
            request.kv.check(without_ffns(model.parent), positions)
        self._pass = self._one_pass()

    def _one_pass(self) -> PromptPass | None:
        """The pass over the prompt; None if there is something before it."""
        request = self._request
        given = request.options.get("prompt_cache")
        if request.warm or request.prompt_cache_file is not None:
            return None
        if given is None:
            cache = self.new_cache()
        elif all(layer.empty() for layer in given):
            # The caller's own list stays as it is until everything else has succeeded.
            cache = copy.deepcopy(given)
        else:
            return None
        return PromptPass(self._model.parent, self._tokens, cache, self._step)

    def new_cache(self) -> PromptCache:
        """An empty prompt cache for the prompt."""
        return make_prompt_cache(self._model.trunk, self._request.kv.max_kv_size)

    @property
    def run_dense(self) -> RunDense | None:
        """What runs the whole model for a selector: over the prompt's own tokens only once."""
        if self._pass is None or _kinds(self._pass.cache) != _kinds(
            make_prompt_cache(self._model.trunk)
        ):
            # A selector sees all tokens, whatever is kept of them.
            return None
        return self._pass

    @property
    def seconds(self) -> float:
        """How long reading took so far."""
        done = None if self._pass is None else self._pass.done
        return 0.0 if done is None else done.seconds

    def read(
        self,
        prompt_cache: PromptCache | None = None,
        tokens: list[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prefilled:
        """Read the prompt, unless a selector made the whole model do so already.

        Args:
            prompt_cache (list): holds what stands before the tokens, and is filled; None for
                nothing.
            tokens (list): ids, if the cache holds some of the prompt's.
            progress (Callable): called with the tokens processed, and all.

        Raises:
            IFPError: if it cannot be read, in one line.
        """
        if tokens is not None and not self.seconds:
            # The cache holds the tokens before these.
            self._pass = None
        tokens = self._tokens if tokens is None else tokens
        if self._model.memory is not None and not self.seconds:
            self._model.memory.before_prefill()

        def show(done: int, of: int) -> None:
            if progress is not None:
                progress(len(tokens) * done // of, len(tokens))

        with one_line("The prompt could not be processed"):
            if self._pass is None:
                cache = self.new_cache() if prompt_cache is None else prompt_cache
                prefilled = dense_prefill(
                    self._model.parent, tokens, cache, step=self._step, progress=show
                )
            else:
                prefilled, self._pass = self._pass.prefilled(show), None
                if prompt_cache is not None:
                    prompt_cache[:] = prefilled.cache
        # Nobody needs the hidden states of all tokens while the answer is generated.
        return replace(prefilled, result=DensePass([], [], prefilled.result.ffns_read))


def with_prefill(response: GenerationResponse, seconds: float) -> GenerationResponse:
    """mlx-lm's response, with the time in which the whole model read the prompt before."""
    seconds += response.prompt_tokens / response.prompt_tps
    return replace(response, prompt_tps=response.prompt_tokens / seconds)


def _kinds(cache: list[Any]) -> list[tuple[type, int | None]]:
    return [(type(layer), getattr(layer, "max_size", None)) for layer in cache]
