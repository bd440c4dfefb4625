"""Text from a sub-network: the Python API, and ``mlx_ifp.generate``."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .atomic import new_file
from .budget import Use
from .checkpoint import Checkpoint
from .cli import command
from .errors import IFPError
from .generate_options import (
    check_flags,
    messages_of,
    read_prompt,
    setup_arg_parser,
    template_kwargs,
)
from .keep import Keep
from .kv_size import Generation, stored_positions
from .masks import Selection, digest_of
from .model import IFPModel
from .options import (
    given_selection,
    load_model,
    task_of,
    use_of,
)
from .prepared import Prepared
from .prompt_cache import KVSettings, claim
from .selections import save_selection
from .stats import Stats, WarmStart, parameter_counts
from .structure import PREFILL_STEP_SIZE
from .text import Prompt, Text, encode_prompt, is_messages, selecting_text, shared_prefix, token_ids


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
            k = model.k if keep is None else model.resolve_keep(keep)
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


def _tokens(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, messages: list[dict[str, Any]]
) -> list[int]:
    """The prompt's tokens; with a prompt cache only those that follow what it holds."""
    user = next(message for message in messages if message["role"] == "user")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        begins = args.prompt_cache_file is None
        return tokenizer.encode(user["content"], add_special_tokens=begins)
    kwargs = template_kwargs(args)
    if args.prompt_cache_file is None:
        return encode_prompt(tokenizer, messages, **kwargs)
    # The stored prefix ends inside the user message, so the template up to it is left out.
    marker = "<query>"
    content, user["content"] = user["content"], marker
    text = encode_prompt(tokenizer, messages, tokenize=False, **kwargs)
    if marker not in text:
        raise IFPError(
            "The chat template changes its messages; --prompt-cache-file cannot be used."
        )
    suffix = text[text.index(marker) + len(marker) :]
    return tokenizer.encode(content + suffix, add_special_tokens=False)


def _load_prompt_cache(args: argparse.Namespace, ready: Prepared) -> list[Any] | None:
    if args.prompt_cache_file is None:
        return None
    path = args.prompt_cache_file
    try:
        prompt_cache, metadata = load_prompt_cache(path, return_metadata=True)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise IFPError(f"{path} is not a prompt cache: {error}") from error
    owner = metadata.get("ifp_selection")
    mine = digest_of(ready.selection)
    if owner is None:
        raise IFPError(f"{path} was not made by mlx_ifp.cache_prompt, so its selection is unknown.")
    if owner != mine:
        raise IFPError(
            f"{path} was filled under another selection than this one; "
            "give the --task or --selection it was made with."
        )
    return prompt_cache


def _load_draft_model(name: str | None, tokenizer: TokenizerWrapper) -> nn.Module | None:
    if name is None:
        return None
    try:
        draft_model, own = mlx_lm.load(name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise IFPError(f"--draft-model {name} cannot be loaded: {error}") from error
    if own.vocab_size != tokenizer.vocab_size:
        raise IFPError(
            f"--draft-model {name} has another tokenizer than the model: {own.vocab_size} tokens, "
            f"not {tokenizer.vocab_size}."
        )
    return draft_model


def _plan(
    args: argparse.Namespace,
    messages: list[dict[str, Any]],
    task: str | None,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
) -> Use:
    """What is going to be generated, known before any weight is read."""
    tokens = len(_tokens(args, tokenizer, [dict(message) for message in messages]))
    if args.prompt_cache_file is not None:
        tokens += stored_positions(args.prompt_cache_file)
    generation = Generation.of(tokens, **vars(args))
    return use_of(args, checkpoint, tokenizer, generation, messages, task)


@command
def main() -> None:
    """Run ``mlx_ifp.generate``."""
    args = setup_arg_parser().parse_args()
    prompt = read_prompt(args.prompt)
    check_flags(args)
    task = task_of(args)
    messages = messages_of(args, prompt)
    model, tokenizer = load_model(args, partial(_plan, args, messages, task))
    if args.warm_system_prompt and not tokenizer.has_chat_template:
        raise IFPError("--warm-system-prompt needs a chat template; this model has none.")
    if model.reuse is not None:
        # This process has no sub-network in memory that could be used again.
        model.reuse.on_disk = model.selections
    for token in args.extra_eos_token:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise IFPError(f"--extra-eos-token: {error}.") from error
    tokens = _tokens(args, tokenizer, [dict(message) for message in messages])
    text = None
    selection = given_selection(args, model.checkpoint)
    if selection is None and not args.dense:
        text = _selecting_text(model, tokenizer, messages, task, args.task_from)
    ready = model.prepare(text, selection=selection, dense=args.dense)
    if args.save_selection is not None:
        save_selection(args.save_selection, ready.selection)
    if args.show_selection:
        _show_selection(model, ready.selection, text)
    draft_model = _load_draft_model(args.draft_model, tokenizer)
    prompt_cache = _load_prompt_cache(args, ready)
    # Only now: making the sub-network must not move the random state of the sampler.
    if args.seed is not None:
        mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    start = time.perf_counter()
    first = response = warm = None
    try:
        if args.warm_system_prompt:
            tokens = token_ids(tokens)
            prefix = shared_prefix(tokenizer, messages, tokens, **template_kwargs(args))
            prompt_cache, rest = _start_warm(model, ready, tokens, prefix, vars(args), disk=True)
            source = "prefill" if model.warm.info.prefilled else "disk"
            warm = WarmStart(source, time.perf_counter() - start, len(tokens) - len(rest))
            tokens = rest
        for response in mlx_lm.stream_generate(
            ready.network,
            tokenizer,
            tokens,
            max_tokens=args.max_tokens,
            sampler=sampler,
            max_kv_size=args.max_kv_size,
            prefill_step_size=args.prefill_step_size,
            prompt_cache=prompt_cache,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            draft_model=draft_model,
            num_draft_tokens=args.num_draft_tokens,
        ):
            first = first or time.perf_counter()
            print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        # The message of it begins a line.
        print(flush=True)
        raise
    except IFPError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise IFPError(f"Generation stopped: {error}") from error
    print(flush=True)
    first_token_seconds = ready.select_seconds + ready.load_seconds + first - start
    stats = Stats.of(ready, response, first_token_seconds, parameter_counts(model, ready), warm)
    if args.verbose:
        print(stats.table(), file=sys.stderr)
    if args.stats is not None:
        with new_file(args.stats) as file:
            file.write_text(json.dumps(stats.to_dict(), indent=2) + "\n")


def _show_selection(model: IFPModel, selection: Selection, text: Text | None) -> None:
    previous = None
    if model.selections is not None:
        key = model.selection_key(text) if text is not None else ""
        previous = model.selections.previous(selection.checkpoint, key)
    mean, by_layer = selection.overlap(previous) if previous is not None else (None, None)
    lines = ["layer  kept   share  overlap with the previous task"]
    for i, channels in enumerate(selection.layers):
        overlap = "-" if by_layer is None else f"{by_layer[i]:.3f}"
        share = len(channels) / selection.d_ffn
        lines.append(f"{i:5d}  {len(channels):5d}  {share:.3f}  {overlap}")
    lines.append(f" mean         {selection.share:.3f}  {'-' if mean is None else f'{mean:.3f}'}")
    print("\n".join(lines), file=sys.stderr)
