"""``mlx_ifp.generate``: text from the sub-network that a prompt or a task selects."""

import argparse
import json
import sys
import time
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import check_given, given_selection, load_model, read_prompt, task_of, use_of
from ...errors import IFPError
from ...files.atomic import check_writable, new_file
from ...generation.stats import Stats, WarmStart, parameter_counts
from ...generation.stream import _selecting_text, _start_warm
from ...llm.kv_cache import Generation
from ...llm.prompt import Text, encode_prompt, shared_prefix, token_ids
from ...memory.budget import Use
from ...model import IFPModel
from ...prompt_cache.files import stored_positions
from ...selection.files import save_selection
from ...selection.selection import Selection, digest_of
from ...subnetwork.prepared import Prepared


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


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.generate``."""
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


def messages_of(args: argparse.Namespace, prompt: str) -> list[dict[str, Any]]:
    """The chat that the flags make of a prompt."""
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    if args.prefill_response is not None:
        messages.append({"role": "assistant", "content": args.prefill_response})
    return messages


def template_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--chat-template-config`` says."""
    try:
        kwargs = json.loads(args.chat_template_config or "{}")
    except ValueError as error:
        raise IFPError(f"--chat-template-config is not valid JSON: {error}.") from error
    if not isinstance(kwargs, dict):
        raise IFPError("--chat-template-config must be a JSON object.")
    return kwargs


def check_flags(args: argparse.Namespace) -> None:
    """Raises IFPError if flags contradict one another."""
    if args.max_tokens < -1 or args.max_tokens == 0:
        raise IFPError("--max-tokens must be above 0, or -1 for no limit.")
    if args.dense and (args.selection or args.task_name):
        option = "--selection" if args.selection else "--task-name"
        raise IFPError(f"--dense and {option} exclude each other.")
    if args.dense and args.show_selection:
        raise IFPError("--dense selects nothing to show.")
    check_given(args)
    if args.prompt_cache_file is not None:
        if args.draft_model is not None:
            raise IFPError("--prompt-cache-file and --draft-model exclude each other.")
        if args.system_prompt is not None:
            raise IFPError(
                "--system-prompt has no effect with --prompt-cache-file: the prompt begins with "
                "what the file holds."
            )
    if args.stats is not None:
        check_writable(args.stats)
    if args.reuse_overlap is not None and args.no_cache:
        raise IFPError("--reuse-overlap looks at the selections on disk; --no-cache hides them.")
    if args.warm_system_prompt:
        for name in ("no_cache", "prompt_cache_file", "draft_model", "ignore_chat_template"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise IFPError(f"--warm-system-prompt and --{flag} exclude each other.")
