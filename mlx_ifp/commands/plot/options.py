"""The command line of ``mlx_ifp.plot``."""

import argparse

from ...cli.flags import add_model_options, new_parser, parse_count
from ...tuner.run_log import LOG_FILE

EXAMPLES = """examples:
  mlx_ifp.plot runs/qwen3 --output curves.png
  mlx_ifp.plot runs/by-prompt runs/by-task --output curves.png
  mlx_ifp.plot --overlap --model runs/qwen3/ifp --prompts data/valid.jsonl --output overlap.png
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.plot``."""
    parser = new_parser(
        "plot",
        "Draw the curves of training runs, or the overlap of a checkpoint's selections, as PNG.",
        EXAMPLES,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"Directory of a training run, or its {LOG_FILE}"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="The PNG file to write")
    overlap = parser.add_argument_group("overlap")
    overlap.add_argument(
        "--overlap",
        action="store_true",
        help="Draw what the selections of prompts share, pair by pair (the paper's Figure 3)",
    )
    overlap.add_argument(
        "--prompts", metavar="FILE", help="JSON lines with messages or prompt, and maybe task"
    )
    overlap.add_argument(
        "--layers",
        type=parse_layers,
        metavar="N,N,...",
        help="Layers to draw, from 0 (default: four, from the first to the last)",
    )
    overlap.add_argument(
        "--max-prompts",
        type=parse_count,
        default=128,
        help="Prompts to draw, as many of each task as there are (default: 128)",
    )
    add_model_options(parser)
    return parser


def parse_layers(text: str) -> list[int]:
    """``0,9,19`` is a list of layers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,9,19")
    return [int(part) for part in parts]
