"""The command line of ``mlx_ifp.generate``."""

import argparse

from ...cli.flags import (
    add_kv_options,
    add_memory_options,
    add_model_options,
    add_prefill_option,
    add_sampling_options,
    add_task_options,
    new_parser,
    parse_bool,
)

# What it reads can be read ahead while libraries are imported.
READS_ONE_CHECKPOINT = True

EXAMPLES = """examples:
  mlx_ifp.generate --model smollm2-ifp --prompt "Name three rivers in France."
  mlx_ifp.generate --model smollm2-ifp --task "You are an expert Python programmer." -p "Sort a list."
  cat question.txt | mlx_ifp.generate --model smollm2-ifp -p - --keep 0.25 --stats stats.json
"""  # noqa: E501


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.generate``: mlx-lm's where they mean the same, and ours."""
    parser = new_parser(
        "generate",
        "Generate text with the sub-network that the prompt or a task selects.",
        EXAMPLES,
    )
    add_model_options(parser)
    add_task_options(parser)
    ours = parser.add_argument_group("sub-network")
    ours.add_argument("--dense", action="store_true", help="Use the whole model, for comparison")
    add_prefill_option(ours)
    ours.add_argument(
        "--show-selection",
        action="store_true",
        help="Show, by layer, the share kept and the overlap with the task used before this one",
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
        "It must have been made with the same --prefill and, if that is pruned, under the same "
        "selection",
    )
    text.add_argument(
        "--warm-system-prompt",
        action="store_true",
        help="Keep the keys and values of the system prompt on disk, so that the next prompt "
        "with it begins at its own first token",
    )
    text.add_argument("--extra-eos-token", nargs="+", default=(), help="More tokens that end it")
    sampling = add_sampling_options(parser, max_tokens=100)
    sampling.add_argument(
        "--verbose",
        type=parse_bool,
        default=True,
        help="Print a table of figures to stderr when 'True' or 'T'",
    )
    sampling.add_argument("--draft-model", help="A model for speculative decoding")
    sampling.add_argument("--num-draft-tokens", type=int, default=3, help="Tokens to draft")
    add_kv_options(parser)
    add_memory_options(parser)
    return parser
