"""The command line of ``mlx_ifp.convert``."""

import argparse

from mlx_ifp.checkpoint.config import TEXT_FORMATS
from mlx_ifp.choices import DTYPES, LAYOUTS, QUANTIZATION_MODES, RECIPES
from mlx_ifp.cli.flags import (
    add_by_layer_option,
    add_trust_option,
    new_parser,
    parse_count,
    parse_keep,
)
from mlx_ifp.selection.keep import DEFAULT_KEEP

EXAMPLES = """examples:
  mlx_ifp.convert --model mlx-community/Llama-3.2-3B-Instruct-bf16 --mlx-path llama-ifp
  mlx_ifp.convert --model Qwen/Qwen3-8B --mlx-path qwen-ifp --keep 0.33 -q --q-bits 4
  mlx_ifp.convert --model SmolLM2-135M-Instruct.Q4_1.gguf --mlx-path smollm2-ifp --keep 768

  a checkpoint of mlx_ifp, in another precision:
  mlx_ifp.convert --model qwen-ifp --mlx-path qwen-ifp-4bit -q --q-bits 4 --head-q-bits 8

  a checkpoint trained with PyTorch, of the layout split, module or manifest:
  mlx_ifp.convert --model run/checkpoint-2000 --mlx-path trained-ifp --dry-run
  mlx_ifp.convert --model run/model.pt --mlx-path trained-ifp --keep 4096 \\
      --llm-config meta-llama/Llama-3.1-8B --tokenizer meta-llama/Llama-3.1-8B \\
      --predictor-config Qwen/Qwen2.5-0.5B --predictor-tokenizer Qwen/Qwen2.5-0.5B
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.convert``; those that mlx-lm has too are named as mlx-lm's are."""
    parser = new_parser(
        "convert",
        "Make a checkpoint from a dense model, from one trained with PyTorch, or from "
        "a checkpoint in another precision.",
        EXAMPLES,
    )
    parser.add_argument(
        "--model", "--hf-path", required=True, help="A file, a directory or a hub id"
    )
    parser.add_argument("--mlx-path", default="mlx_model", help="The checkpoint to make")
    parser.add_argument("--revision", help="Revision of the hub repository")
    parser.add_argument(
        "--keep",
        type=parse_keep,
        metavar="K|FRACTION",
        help="FFN channels to keep in each layer (default: what the checkpoint was trained for; "
        f"{DEFAULT_KEEP} for a dense model)",
    )
    add_by_layer_option(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="Print what would be done; write nothing"
    )
    parser.add_argument("--upload-repo", help="Upload the checkpoint to this hub repository")
    parser.add_argument(
        "--text-format",
        choices=TEXT_FORMATS,
        help="How the text that selects is tokenized (default: raw with a predictor, otherwise "
        "chat_template if there is one)",
    )
    parser.add_argument(
        "--static-prompts",
        metavar="FILE",
        help="Prompts, one a line or jsonl, whose mean scores the 'static' selector uses",
    )
    prior = parser.add_mutually_exclusive_group()
    prior.add_argument(
        "--prior",
        nargs="?",
        type=parse_count,
        const=True,
        metavar="N",
        help="Let the model make up N prompts (default: 64) and answer them, for the scores of the "
        "selectors 'static' and 'glass' (default: for a dense chat model, if that is quick)",
    )
    prior.add_argument(
        "--no-prior", dest="prior", action="store_const", const=0, help="Make no such scores"
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="Prompts, one a line or jsonl: channels that are selected together for them are "
        "stored side by side",
    )
    add_trust_option(parser)
    _add_source_options(parser)
    _add_precision_options(parser)
    return parser


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the model lacks")
    group.add_argument("--layout", choices=LAYOUTS, help="Its layout (default: found out)")
    group.add_argument(
        "--llm-config", metavar="CONFIG", help="config.json of the LLM: a file, directory or hub id"
    )
    group.add_argument(
        "--predictor-config", metavar="CONFIG", help="config.json of the predictor's backbone"
    )
    group.add_argument("--tokenizer", help="The LLM's tokenizer: a directory or hub id")
    group.add_argument("--predictor-tokenizer", help="The predictor's tokenizer")


def _add_precision_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    group.add_argument("-q", "--quantize", action="store_true", help="Quantize the weights")
    group.add_argument(
        "-d",
        "--dequantize",
        action="store_true",
        help="Dequantize a quantized model; a checkpoint of mlx_ifp may be quantized anew with -q",
    )
    group.add_argument("--q-bits", type=int, help="Bits per weight")
    group.add_argument("--q-group-size", type=int, help="Group size")
    group.add_argument(
        "--q-mode",
        default="affine",
        choices=QUANTIZATION_MODES,
        help="Quantization mode (default: affine)",
    )
    group.add_argument("--quant-predicate", choices=RECIPES, help="Mixed-bit recipe of mlx-lm")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Type of what is not quantized (default: what the config of a dense model says; a "
        "trained checkpoint keeps its own)",
    )
    group.add_argument("--predictor-dtype", choices=DTYPES, help="The predictor's, if different")
    group.add_argument(
        "--predictor-q-bits", type=int, metavar="BITS", help="The same; 0 leaves it unquantized"
    )
    group.add_argument("--predictor-q-group-size", type=int, metavar="SIZE", help="The same")
    group.add_argument(
        "--head-q-bits",
        type=int,
        metavar="BITS",
        help="Quantize the predictor's head (default: it is not)",
    )
