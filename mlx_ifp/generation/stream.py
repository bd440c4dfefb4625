"""Text from a sub-network: prompt -> selection -> sub-network -> tokens."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..llm.kv_cache import Generation, KVSettings
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.prompt import Prompt, Text, encode_prompt, is_messages, shared_prefix
from ..model import IFPModel
from ..prompt_cache.warm import claim
from ..selection.keep import Keep, compact
from ..selection.selection import Selection
from ..selectors.selector import resolved_keep
from ..selectors.text import selecting_text
from ..subnetwork.prepared import Prepared


def _selecting_text(
    model: IFPModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    task: str | None = None,
    task_from: str | None = None,
    selector: str | None = None,
) -> Text:
    """The task if there is one, else what the prompt says."""
    if task is not None:
        return task
    decode = None
    if model.selector_tokenizer(selector) is not tokenizer:
        decode = partial(tokenizer.decode, skip_special_tokens=True)
    return selecting_text(prompt, task_from or model.checkpoint.ifp.text.source, decode)


def _check_warm(prompt: Prompt, kwargs: dict[str, Any]) -> None:
    if not is_messages(prompt):
        raise IFPError("A warm prompt is found by the chat template; give the prompt as messages.")
    for name in ("prompt_cache", "draft_model"):
        if kwargs.get(name) is not None:
            raise IFPError(f"A warm prompt and {name} exclude each other.")


def _start_warm(
    model: IFPModel,
    ready: Prepared,
    tokens: list[int],
    prefix: int,
    kwargs: dict[str, Any],
    disk: bool = False,
) -> tuple[list[Any] | None, list[int]]:
    """The prompt cache with a prompt's first tokens, and the tokens that are left."""
    return model.warm.start(
        ready,
        tokens,
        prefix,
        KVSettings.of(kwargs),
        disk=disk,
        prefill_step_size=kwargs.get("prefill_step_size", PREFILL_STEP_SIZE),
    )


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
    warm: bool = False,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's ``stream_generate`` on the sub-network that the task or the prompt selects.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        prompt: a string, token ids, or a list of messages (which the chat template formats).
        task (str): a task description that selects. Without it the prompt does: of messages the
            first of the user, for the whole conversation.
        task_from (str): ``"system"``: the system message is the task.
        selection (Selection): use this one.
        dense (bool): use the whole model.
        selector (str): ``predictor``, ``activations`` or ``static``.
        keep: channels to keep in each layer, instead of the checkpoint's k.
        warm (bool): keep the keys and values of what stands before the first user message, in
            memory, so that the next prompt of the same selection begins after it. The prompt must
            be messages.
        kwargs: passed on to ``mlx_lm.stream_generate``.

    Yields:
        GenerationResponse: mlx-lm's.

    Raises:
        IFPError: if a text is empty or too long, ``prompt_cache`` belongs to another selection, or
            ``warm`` cannot be.
    """
    if warm:
        _check_warm(prompt, kwargs)
    tokens = encode_prompt(tokenizer, prompt)
    text = None
    if selection is None and not dense:
        text = _selecting_text(model, tokenizer, prompt, task, task_from, selector)
    prompt_cache = kwargs.get("prompt_cache") or []
    if model.memory is not None:
        count = len(tokenizer.encode(tokens) if isinstance(tokens, str) else tokens)
        count += max((getattr(layer, "offset", 0) for layer in prompt_cache), default=0)
        generation = Generation.of(count, **kwargs)
        if dense:
            model.memory.expect(generation, model.checkpoint.d_ffn, dense=True)
        elif selection is None:
            k = model.k if keep is None else compact(resolved_keep(model.checkpoint, keep))
            model.memory.expect(generation, k)
        else:
            model.memory.expect(generation, selection.ks)
    ready = model.prepare(text, selection=selection, dense=dense, selector=selector, keep=keep)
    with model.using(ready) as network:
        if warm:
            prefix = shared_prefix(tokenizer, prompt, tokens)
            kwargs["prompt_cache"], tokens = _start_warm(model, ready, tokens, prefix, kwargs)
        prompt_cache = kwargs.get("prompt_cache") or []
        claim(prompt_cache, ready.selection)
        try:
            yield from mlx_lm.stream_generate(network, tokenizer, tokens, **kwargs)
        finally:
            # With kv_bits mlx-lm puts new, quantized layers into the list.
            claim(prompt_cache, ready.selection)


def generate(
    model: IFPModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    task: str | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """A complete answer from the sub-network that the task or the prompt selects.

    Args:
        model, tokenizer, prompt, task: as in :func:`stream_generate`.
        verbose (bool): print the text as it comes, and mlx-lm's figures.
        kwargs: passed on to :func:`stream_generate`.
    """
    text = ""
    response = None
    for response in stream_generate(model, tokenizer, prompt, task, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(
            f"\n{'=' * 10}\n"
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {response.peak_memory:.3f} GB"
        )
    return text
