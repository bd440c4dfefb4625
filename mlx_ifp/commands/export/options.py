"""The command line of ``mlx_ifp.export``."""

import argparse

from ...cli.flags import add_model_options, add_task_options, new_parser

GGUF_FILE = "ggml-model-f16.gguf"  # mlx-lm's default name

EXAMPLES = """examples:
  mlx_ifp.export --model qwen3-ifp --task "You are an expert Python programmer." \\
      --save-path qwen3-python
  mlx_lm.generate --model qwen3-python --prompt "Sort a list of dates."
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.export``; those that ``mlx_lm.fuse`` has too have its names."""
    parser = new_parser(
        "export", "Write the sub-network of a task as a model that plain mlx-lm opens.", EXAMPLES
    )
    add_model_options(parser)
    add_task_options(parser)
    parser.add_argument("--dense", action="store_true", help="Export all channels")
    parser.add_argument("--save-path", default="exported_model", help="The directory to make")
    parser.add_argument("--dequantize", action="store_true", help="Write floats only")
    parser.add_argument(
        "--gguf",
        "--export-gguf",
        action="store_true",
        help=f"Write {GGUF_FILE} too (llama and mistral, not quantized)",
    )
    parser.add_argument("--upload-repo", help="Upload the model to this hub repository")
    return parser
