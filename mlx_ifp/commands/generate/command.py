"""``mlx_ifp.generate``: text from the sub-network that a prompt or a task selects."""

import argparse
import json
import sys
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import (
    check_given,
    check_max_tokens,
    given_selection,
    glass_of,
    kv_options,
    load_model,
    note_prefill,
    read_prompt,
    sampler_of,
    task_of,
    use_of,
)
from ...errors import IFPError, one_line
from ...files.atomic import check_writable, new_file
from ...files.text import write_text
from ...generation.request import Request
from ...generation.stream import Answer
from ...memory.budget import Use
from ...model import IFPModel
from ...selection.files import save_selection
from ...selection.selection import Selection


def _request(
    args: argparse.Namespace, prompt: str, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> Request:
    """What the flags ask for."""
    options = {
        "max_tokens": args.max_tokens,
        "sampler": sampler_of(args, tokenizer),
        "draft_model": args.draft_model,
        "num_draft_tokens": args.num_draft_tokens,
        **kv_options(args),
    }
    return Request(
        messages_of(args, prompt),
        task_of(args),
        args.task_from,
        given_selection(args, checkpoint),
        args.dense,
        **glass_of(args, checkpoint),
        chat_template_kwargs=template_kwargs(args),
        ignore_chat_template=args.ignore_chat_template or not tokenizer.has_chat_template,
        warm=args.warm_system_prompt,
        warm_on_disk=args.warm_system_prompt,
        prompt_cache_file=args.prompt_cache_file,
        prefill=args.prefill,
        options=options,
    )


def _plan(
    args: argparse.Namespace, prompt: str, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> Use:
    """What is going to be generated, known before any weight is read."""
    return use_of(args, checkpoint, tokenizer, _request(args, prompt, checkpoint, tokenizer))


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.generate``."""
    prompt = read_prompt(args.prompt)
    check_flags(args)
    model, tokenizer = load_model(args, partial(_plan, args, prompt))
    if args.warm_system_prompt and not tokenizer.has_chat_template:
        raise IFPError("--warm-system-prompt needs a chat template; this model has none.")
    for token in args.extra_eos_token:
        with one_line("--extra-eos-token"):
            tokenizer.add_eos_token(token)
    answer = Answer(model, tokenizer, _request(args, prompt, model.checkpoint, tokenizer))
    note_prefill(args, model.checkpoint, answer.prefill)
    # The network is made now, as making it must not move the sampler's random state.
    selection = answer.ready.selection
    # --dense has none, and excludes both flags.
    if args.save_selection is not None and selection is not None:
        save_selection(args.save_selection, selection)
    if args.show_selection and selection is not None:
        _show_selection(model, selection, answer)
    if args.seed is not None:
        mx.random.seed(args.seed)
    try:
        for response in answer:
            print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        # The message about it begins a new line.
        print(flush=True)
        raise
    print(flush=True)
    stats = answer.stats
    if args.verbose:
        print(stats.table(), file=sys.stderr)
    if args.stats is not None:
        with new_file(args.stats) as file:
            write_text(file, json.dumps(stats.to_dict(), indent=2) + "\n")


def _show_selection(model: IFPModel, selection: Selection, answer: Answer) -> None:
    previous = None
    if model.selections is not None:
        text, request = answer.text, answer.request
        key = ""
        if text is not None:
            key = model.selection_key(text, request.selector, request.keep, request.prior)
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
    check_max_tokens(args)
    if args.dense and (args.selection or args.task_name):
        option = "--selection" if args.selection else "--task-name"
        raise IFPError(f"--dense and {option} exclude each other.")
    if args.dense and args.show_selection:
        raise IFPError("--dense selects nothing to show.")
    if args.dense and args.prefill is not None:
        raise IFPError("--dense and --prefill exclude each other.")
    if args.prefill == "dense" and args.draft_model is not None:
        raise IFPError("--prefill dense and --draft-model exclude each other.")
    check_given(args, has_prompt=True)
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
    if args.warm_system_prompt:
        for name in ("no_cache", "prompt_cache_file", "draft_model", "ignore_chat_template"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise IFPError(f"--warm-system-prompt and --{flag} exclude each other.")
