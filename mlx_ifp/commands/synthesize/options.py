"""The command line of ``mlx_ifp.synthesize``."""

import argparse

from ...cli.flags import add_trust_option, new_parser, parse_count, parse_seed

EXAMPLES = """examples:
  mlx_ifp.synthesize --model Qwen/Qwen3-0.6B --output data/train.jsonl --count 20000
  mlx_ifp.synthesize --model Qwen/Qwen3-0.6B --output data/train.jsonl --count 40000 --resume
  mlx_ifp.synthesize --model Qwen/Qwen3-0.6B --output answers.jsonl --prompts prompts.jsonl
  mlx_ifp.synthesize --model Qwen/Qwen3-0.6B --output tasks.jsonl --count 5000 --tasks tasks.yaml
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.synthesize``."""
    parser = new_parser(
        "synthesize",
        "Let a chat model write data to train on: prompts as users write them, and its answers.",
        EXAMPLES,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        required=True,
        help="A chat model of mlx-lm, or a checkpoint of mlx_ifp, of which the whole LLM writes: a "
        "directory or a hub id",
    )
    add_trust_option(model)
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--output", required=True, metavar="FILE.jsonl", help="Each row is written when it is done"
    )
    rows.add_argument(
        "--count",
        type=parse_count,
        metavar="N",
        help="Rows with prompts of the model's own that the file is to have in the end",
    )
    rows.add_argument(
        "--prompts", metavar="FILE.jsonl", help="Answer the first user message of each row, too"
    )
    rows.add_argument(
        "--tasks",
        metavar="FILE.yaml",
        help="Write prompts for these tasks: name -> a description, or a list of sentences that "
        "users say",
    )
    rows.add_argument(
        "--resume", action="store_true", help="Append to a file that exists, with new prompts"
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--batch-size", type=parse_count, default=32, help="Texts at once (default: 32)"
    )
    texts.add_argument(
        "--max-prompt-tokens",
        type=parse_count,
        default=128,
        help="Of a prompt that is written; a longer one is refused (default: 128)",
    )
    texts.add_argument(
        "--max-answer-tokens",
        type=parse_count,
        default=256,
        help="Of an answer; a longer one is cut, and its row says so (default: 256)",
    )
    texts.add_argument(
        "--max-seq-length",
        type=parse_count,
        default=2048,
        help="Of a prompt with its answer; a longer given prompt is left out (default: 2048, as "
        "in mlx_ifp.train)",
    )
    texts.add_argument(
        "--temp", type=float, default=1.0, help="Sampling temperature of prompts (default: 1)"
    )
    texts.add_argument(
        "--answer-temp",
        type=float,
        nargs="+",
        default=[0.7, 0.0, 1.0],
        metavar="TEMP",
        help="One of these is drawn for each answer (default: 0.7 0 1)",
    )
    texts.add_argument("--top-p", type=float, default=0.95, help="Of all texts (default: 0.95)")
    texts.add_argument("--seed", type=parse_seed, default=0, help="PRNG seed (default: 0)")
    return parser
