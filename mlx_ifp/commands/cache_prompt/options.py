"""The command line of ``mlx_ifp.cache_prompt``."""

import argparse

from ...cli.flags import (
    add_kv_options,
    add_memory_options,
    add_model_options,
    add_prefill_option,
    add_task_options,
    new_parser,
)

EXAMPLES = """examples:
  mlx_ifp.cache_prompt --model smollm2-ifp --task "Answer questions on a text." \\
      --prompt - --prompt-cache-file text.safetensors < text.txt
  mlx_ifp.generate --model smollm2-ifp --task "Answer questions on a text." \\
      --prompt-cache-file text.safetensors --prompt "Who wrote it?"
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.cache_prompt``: mlx-lm's where they mean the same, and ours."""
    parser = new_parser(
        "cache_prompt",
        "Keep the keys and values of a prompt in a file, so that later prompts go on from it.",
        EXAMPLES,
    )
    add_model_options(parser)
    add_task_options(parser)
    parser.add_argument("--prompt", "-p", required=True, help="The prompt ('-' reads from stdin)")
    parser.add_argument("--prompt-cache-file", required=True, help="The file to write")
    add_prefill_option(parser)
    add_kv_options(parser)
    add_memory_options(parser)
    return parser
