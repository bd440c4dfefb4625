"""The command line of ``mlx_ifp.chat``."""

import argparse

from ...cli.flags import (
    add_kv_options,
    add_memory_options,
    add_model_options,
    add_prefill_option,
    add_sampling_options,
    add_task_options,
    new_parser,
)

# What it reads can be read ahead while libraries are imported.
READS_ONE_CHECKPOINT = True

EXAMPLES = """examples:
  mlx_ifp.chat --model smollm2-ifp
  mlx_ifp.chat --model smollm2-ifp --task-name python --system-prompt "Answer in one sentence."
  printf 'Name a river.\\nAnd another one.\\n' | mlx_ifp.chat --model smollm2-ifp
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.chat``: those of ``mlx_lm.chat`` that mean the same, and ours."""
    parser = new_parser(
        "chat",
        "Chat with the sub-network that the first message or a task selects. /help lists what "
        "else can be typed.",
        EXAMPLES,
    )
    add_model_options(parser)
    add_task_options(parser, save=False)
    ours = parser.add_argument_group("sub-network")
    ours.add_argument("--dense", action="store_true", help="Use the whole model, for comparison")
    add_prefill_option(ours)
    text = parser.add_argument_group("prompt")
    text.add_argument("--system-prompt", help="System prompt for the chat template")
    text.add_argument(
        "--chat-template-config", help="Arguments for the chat template, as a JSON object"
    )
    add_sampling_options(parser, max_tokens=256)
    add_kv_options(parser)
    add_memory_options(parser)
    return parser
