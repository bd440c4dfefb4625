"""The command line of ``mlx_ifp.evaluate``."""

import argparse

from ...choices import WAYS
from ...cli.flags import (
    add_model_options,
    add_prefill_option,
    new_parser,
    parse_count,
    parse_keep,
    parse_number,
    parse_object,
)

EXAMPLES = """examples:
  mlx_ifp.evaluate --model smollm2-ifp --prompts mine.jsonl --keep 0.25 0.5 0.75
  mlx_ifp.evaluate --model smollm2-ifp --prompts mine.jsonl --select-by prompt task static --max-kl 0.1
  mlx_ifp.evaluate --model smollm2-ifp --tasks arc_easy gsm8k --limit 100 --select-by prompt dense
"""  # noqa: E501


def parse_way(text: str) -> str:
    """Read ``prompt``, ``task``, ``static``, ``dense``, or ``prompt:SELECTOR``."""
    by, _, selector = text.partition(":")
    if by not in WAYS or (":" in text and (not selector or by not in WAYS[:2])):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(WAYS)}, prompt:SELECTOR and task:SELECTOR"
        )
    return text


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.evaluate``: mlx-lm's where they mean the same, and ours."""
    # --keep is another one here.
    parser = new_parser(
        "evaluate",
        "Measure what pruning loses: on own prompts, or on tasks of lm-evaluation-harness.",
        EXAMPLES,
        conflict_handler="resolve",
    )
    what = parser.add_argument_group("data").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompts", metavar="FILE", help="JSON lines with messages or prompt, and maybe task"
    )
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="Tasks of lm-evaluation-harness")
    add_model_options(parser)
    _add_ways(parser)
    _add_prompt_options(parser)
    _add_harness_options(parser)
    return parser


def _add_ways(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_argument_group("ways to select")
    ways.add_argument(
        "--select-by",
        nargs="+",
        type=parse_way,
        default=["prompt"],
        metavar="WAY",
        help="prompt: each prompt selects; task: a description of its task; static: stored scores; "
        "dense: nothing is left out. prompt:SELECTOR and task:SELECTOR name what scores (default: "
        "prompt)",
    )
    ways.add_argument(
        "--task-name", nargs="+", default=[], metavar="NAME", help="Also tasks of mlx_ifp.tasks"
    )
    ways.add_argument(
        "--keep",
        nargs="+",
        type=parse_keep,
        metavar="K|FRACTION",
        help="FFN channels to keep in each layer, one or several (default: what the checkpoint "
        "says)",
    )
    text = ways.add_mutually_exclusive_group()
    text.add_argument("--task", metavar="TEXT", help="The description of all tasks")
    text.add_argument(
        "--task-texts",
        metavar="FILE",
        help="YAML or JSON: descriptions by the names of tasks (default: saved tasks of the names)",
    )
    add_prefill_option(ways)
    ways.add_argument(
        "--limit", type=parse_count, metavar="N", help="The first N prompts of each task"
    )


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("own prompts")
    own.add_argument(
        "--given-answers",
        action="store_true",
        help="Measure on the answers of the file (default: on the dense model's own)",
    )
    own.add_argument(
        "--reference",
        metavar="MODEL",
        help="A checkpoint whose dense model is compared with, such as that of the model before "
        "training (default: the model's own)",
    )
    own.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="Print the smallest k for each task that loses no more",
    )
    own.add_argument("--json", metavar="FILE", help="Write the figures to a JSON file")
    own.add_argument("--plot", metavar="FILE", help="Draw loss against bytes as PNG")
    own.add_argument(
        "--speed-tokens",
        type=parse_number,
        default=32,
        metavar="N",
        help="Tokens to decode for the speed; 0 leaves it out (default: 32)",
    )
    both = parser.add_argument_group("generation")
    both.add_argument(
        "--max-tokens",
        "-m",
        type=parse_count,
        help="The most tokens of an answer (default: 64 for own prompts; else what a task says)",
    )


def _add_harness_options(parser: argparse.ArgumentParser) -> None:
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--output-dir", default=".", help="Where results are written")
    harness.add_argument(
        "--batch-size", type=parse_count, default=8, help="Sequences at once (default: 8)"
    )
    harness.add_argument("--num-shots", type=parse_number, help="Number of shots")
    harness.add_argument(
        "--include-path", metavar="DIR", help="A folder with YAML files of tasks of your own"
    )
    harness.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the shots as turns of a conversation, rather than in one",
    )
    harness.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put prompts into the chat template (default: if the model has one)",
    )
    harness.add_argument(
        "--chat-template-args",
        type=parse_object,
        default={},
        help="Arguments for the chat template, as a JSON object",
    )
    harness.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code which the model writes",
    )
    harness.add_argument("--seed", type=parse_number, default=123, help="PRNG seed (default: 123)")
    harness.add_argument("--temp", type=float, default=0.0, help="Sampling temperature")
    harness.add_argument("--top-p", type=float, default=1.0, help="Sampling top-p")
    harness.add_argument("--top-k", type=int, default=0, help="Sampling top-k")
