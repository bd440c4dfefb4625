"""The flags of ``mlx_ifp.generate``: which there are, and what they make of a prompt."""

import argparse
import json
import sys
from typing import Any

from mlx_lm.generate import str2bool

from .atomic import check_writable
from .errors import IFPError
from .options import (
    add_kv_options,
    add_memory_options,
    add_model_options,
    add_reuse_option,
    add_task_options,
    check_given,
    parse_seed,
)

EXAMPLES = """examples:
  mlx_ifp.generate --model smollm2-ifp --prompt "Name three rivers in France."
  mlx_ifp.generate --model smollm2-ifp --task "You are an expert Python programmer." -p "Sort a list."
  cat question.txt | mlx_ifp.generate --model smollm2-ifp -p - --keep 0.25 --stats stats.json
"""  # noqa: E501


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.generate``: mlx-lm's where they mean the same, and ours."""
    parser = argparse.ArgumentParser(
        prog="mlx_ifp.generate",
        description="Generate text with the sub-network that the prompt or a task selects.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_task_options(parser)
    ours = parser.add_argument_group("sub-network")
    ours.add_argument("--dense", action="store_true", help="Use the whole model, for comparison")
    ours.add_argument(
        "--show-selection",
        action="store_true",
        help="Show, by layer, the share kept and the overlap with the task used before this one",
    )
    add_reuse_option(
        ours,
        "Use the selection of a recent run instead of a new one that overlaps it by at least this "
        "much, above 0 and at most 1 (default: never)",
    )
    ours.add_argument("--stats", metavar="FILE", help="Write the figures to a JSON file")
    text = parser.add_argument_group("prompt")
    text.add_argument("--prompt", "-p", default="hello", help="The prompt ('-' reads from stdin)")
    text.add_argument("--system-prompt", help="System prompt for the chat template")
    text.add_argument("--prefill-response", help="Start of the response, to be continued")
    text.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Use the raw prompt without the tokenizer's chat template",
    )
    text.add_argument(
        "--chat-template-config", help="Arguments for the chat template, as a JSON object"
    )
    text.add_argument(
        "--prompt-cache-file",
        help="A file of mlx_ifp.cache_prompt; the prompt continues what it holds. "
        "It must have been made under the same selection",
    )
    text.add_argument(
        "--warm-system-prompt",
        action="store_true",
        help="Keep the keys and values of the system prompt on disk, so that the next prompt "
        "with it begins at its own first token",
    )
    text.add_argument("--extra-eos-token", nargs="+", default=(), help="More tokens that end it")
    sampling = parser.add_argument_group("generation")
    sampling.add_argument("--max-tokens", "-m", type=int, default=100, help="Tokens to generate")
    sampling.add_argument("--temp", type=float, default=0.0, help="Sampling temperature")
    sampling.add_argument("--top-p", type=float, default=1.0, help="Sampling top-p")
    sampling.add_argument("--min-p", type=float, default=0.0, help="Sampling min-p")
    sampling.add_argument("--top-k", type=int, default=0, help="Sampling top-k")
    sampling.add_argument("--xtc-probability", type=float, default=0.0, help="XTC probability")
    sampling.add_argument("--xtc-threshold", type=float, default=0.1, help="XTC threshold")
    sampling.add_argument(
        "--min-tokens-to-keep", type=int, default=1, help="Minimum tokens to keep for min-p"
    )
    sampling.add_argument("--seed", type=parse_seed, help="PRNG seed")
    sampling.add_argument(
        "--verbose",
        type=str2bool,
        default=True,
        help="Print a table of figures to stderr when 'True' or 'T'",
    )
    sampling.add_argument("--draft-model", help="A model for speculative decoding")
    sampling.add_argument("--num-draft-tokens", type=int, default=3, help="Tokens to draft")
    add_kv_options(parser)
    add_memory_options(parser)
    return parser


def read_prompt(prompt: str) -> str:
    """The prompt of a command line: escapes as in mlx-lm, '-' for stdin; never empty."""
    prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    try:
        # Without a standard input Python has None there.
        prompt = (sys.stdin.read() if sys.stdin else "") if prompt == "-" else prompt
        # In some locales Python lets undecodable bytes through as surrogates.
        prompt.encode()
    except UnicodeError as error:
        raise IFPError("The prompt is not UTF-8 text.") from error
    if not prompt.strip():
        raise IFPError("The prompt is empty; give some text with --prompt, or - and stdin.")
    return prompt


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
