"""The command line of ``mlx_ifp.benchmark``."""

import argparse
from dataclasses import fields
from typing import Any

from ...cli.flags import (
    add_model_options,
    add_task_name_option,
    new_parser,
    parse_count,
    parse_seed,
)
from .settings import DEFAULT_SCALE, Settings

TASK = "You are an expert Python programmer. Answer with working code and a short explanation."


OTHER_TASK = "You are an expert in geography. Answer questions about cities, rivers and countries."


EXAMPLES = """Each network runs alone first, which warms up and gives its peak memory. Then all
take turns in one process: read the ratios. Selections on disk are neither read nor written.

examples:
  mlx_ifp.benchmark --model smollm2-ifp
  mlx_ifp.benchmark --model smollm2-ifp -p 128 512 4000 -g 100 --samples 4 --chart times.png
  mlx_ifp.benchmark --model smollm2-ifp --keep 0.25 --num-trials 10 --cold --json figures.json
  mlx_ifp.benchmark --model smollm2-ifp --server -g 64 -n 3
  mlx_ifp.benchmark --first-prompt -n 3
  mlx_ifp.benchmark --shapes paper --scale 4 -q --q-bits 4 -p 4000 -g 100 --samples 4
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.benchmark``: mlx-lm's where they mean the same, and ours."""
    parser = new_parser(
        "benchmark",
        "Measure a sub-network against a dense model of its size, the full model and a "
        "mixture of experts.",
        EXAMPLES,
    )
    add_model_options(parser)
    group = parser.add_argument_group("random weights")
    group.add_argument(
        "--shapes",
        choices=["paper"],
        help="Instead of --model: a checkpoint with the shapes of the paper's 9B -> 3B model and "
        "random weights, in a temporary directory (19 GB in bfloat16 at --scale 1)",
    )
    group.add_argument(
        "--scale",
        type=int,
        metavar="F",
        help="Divide hidden size, FFN, heads, layers and vocabulary by this (default: "
        f"{DEFAULT_SCALE})",
    )
    group.add_argument("-q", "--quantize", action="store_true", help="Quantize its LLM")
    group.add_argument("--q-bits", type=int, help="Bits for quantization (default: 4)")
    group.add_argument("--q-group-size", type=int, help="Group size (default: 64)")
    selecting = parser.add_mutually_exclusive_group()
    selecting.add_argument(
        "--task", "--prompt", metavar="TEXT", default=TASK, help="What selects (default: a task)"
    )
    add_task_name_option(selecting)
    parser.add_argument(
        "--other-task",
        metavar="TEXT",
        default=OTHER_TASK,
        help="The task that is switched to (default: another)",
    )
    short = {"prompt_tokens": ["-p"], "generation_tokens": ["-g"], "num_trials": ["-n"]}
    for each in fields(Settings):
        option = f"--{each.name.replace('_', '-')}"
        value: Any = each.default
        several = isinstance(value, tuple)
        default = " ".join(map(str, value)) if several else value
        parser.add_argument(
            option,
            *short.get(each.name, []),
            type=parse_seed if each.name == "seed" else int,
            nargs="+" if several else None,
            default=each.default,
            help=f"{each.metadata['help']} (default: {default})",
        )
    parser.add_argument("--no-moe", action="store_true", help="Leave out the mixture of experts")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="Also load the channels after the system has been made to forget the files (Linux)",
    )
    parser.add_argument(
        "--server",
        action="store_true",
        help="Instead: many requests at once to mlx_ifp.server, against mlx_lm.server on exported "
        "sub-networks; -g and -n count",
    )
    parser.add_argument(
        "--requests",
        type=parse_count,
        default=16,
        help="With --server: how many are sent at once (default: 16)",
    )
    parser.add_argument(
        "--first-prompt",
        action="store_true",
        help="Instead: the time to the first token of mlx_ifp.generate in new processes, by stage; "
        "-n counts, and --cold",
    )
    parser.add_argument("--json", metavar="FILE", help="Write all figures to a JSON file")
    parser.add_argument(
        "--chart", metavar="FILE.png", help="Draw the seconds of each row as stacked bars"
    )
    return parser
