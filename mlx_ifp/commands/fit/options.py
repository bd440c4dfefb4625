"""The command line of ``mlx_ifp.fit``."""

import argparse

from ...choices import DTYPES
from ...cli.flags import add_trust_option, new_parser, parse_count, parse_seed, parse_share

EXAMPLES = """examples:
  mlx_ifp.fit --model qwen-ifp --mlx-path qwen-fitted
  mlx_ifp.fit --model qwen-ifp --mlx-path qwen-fitted --data questions.jsonl --examples 2000
  mlx_ifp.generate --model qwen-fitted --prompt "hello"
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.fit``."""
    parser = new_parser(
        "fit",
        "Give a checkpoint a predictor in closed form: least squares from the LLM's hidden state "
        "at the end of a prompt to what its channels do in the answer. The LLM stays as it is.",
        EXAMPLES,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, help="A checkpoint of mlx_ifp.convert: a directory or a hub id"
    )
    model.add_argument("--revision", help="Revision of the hub repository")
    model.add_argument("--mlx-path", required=True, help="The checkpoint to make")
    model.add_argument(
        "--dtype", choices=DTYPES, help="Run in this type (default: as stored; float32 on a CPU)"
    )
    add_trust_option(model)
    data = parser.add_argument_group("examples")
    data.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help="Prompts with or without answers, a file or a directory with train.jsonl (default: "
        "the model writes them itself)",
    )
    data.add_argument(
        "--examples",
        type=parse_count,
        metavar="N",
        help="How many (default: all of --data; 2000 without it)",
    )
    data.add_argument(
        "--max-tokens",
        type=parse_count,
        default=72,
        help="Of an answer; what comes after them does not count (default: 72)",
    )
    data.add_argument(
        "--max-seq-length",
        type=parse_count,
        default=2048,
        help="Of a prompt with its answer; a longer one is left out (default: 2048)",
    )
    data.add_argument(
        "--batch-size", type=parse_count, default=32, help="Answers at once (default: 32)"
    )
    data.add_argument("--seed", type=parse_seed, default=0, help="PRNG seed (default: 0)")
    data.add_argument(
        "--statistics-path",
        metavar="DIR",
        help="Where examples and statistics are kept, so that a stopped run goes on (default: "
        "beside --mlx-path, and deleted in the end)",
    )
    fit = parser.add_argument_group("predictor")
    fit.add_argument(
        "--rank", type=parse_count, default=128, help="Of the linear map (default: 128)"
    )
    fit.add_argument(
        "--blend",
        type=parse_share,
        default=0.3,
        metavar="SHARE",
        help="Weight of what channels do on the prompt itself, 0 to 1; the rest is the "
        "prediction's (default: 0.3)",
    )
    return parser
