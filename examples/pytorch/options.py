"""The options of ``train.py``, and what is wrong with them."""

import argparse
import math
import os
from pathlib import Path

import yaml
from data import DataError
from masks import OPERATORS
from rounding import BITS, GROUP_SIZES, bits_of_parts

DTYPES = ("bfloat16", "float16", "float32")
STATE = "state"  # in the output directory, of a run that can be resumed


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(prog="train.py")
    add = parser.add_argument
    add("--model", required=True, help="Directory of a dense model, or of a trained checkpoint")
    add("--teacher", help="Dense model to distil from and compare with (default: --model)")
    add("--data", required=True, help="JSONL file, or a directory with train.jsonl (valid.jsonl)")
    add("--valid", help="JSONL file to validate on (default: valid.jsonl of the directory, if any)")
    add("--output", required=True, help="New directory for checkpoint, log and state")
    add("--resume", action="store_true", help="Go on from the state in --output")
    add("--stage", choices=["sft", "pretrain"], default="sft", help="The paper's two stages")
    add("--max-length", type=int, default=1024, help="Longer rows are left out, in tokens")
    add("--chunk-size", type=int, default=256, help="Tokens of a chunk, for --stage pretrain")
    group = parser.add_argument_group("masks and predictor")
    add = group.add_argument
    add("--keep", type=float, nargs="+", default=[0.5], metavar="K",
        help="Channels kept in each layer, a count or a share up to 1.0; two: k is drawn anew from "
        "this range in each step")  # fmt: skip
    add("--select-by", choices=["prompt", "task", "static"], default="prompt",
        help="The prompt, the description of its task, or nothing: one mask for all")  # fmt: skip
    add("--task-descriptions", help="YAML file: task -> description, for --select-by task")
    add("--predictor-layers", type=int, help="The predictor is the LLM's first so many layers")
    add("--predictor-model", help="Directory of a pretrained predictor backbone")
    add("--predictor-llm", action="store_true",
        help="The predictor is a head that reads what the whole LLM makes of the prompt; needs "
        "--prefill dense")  # fmt: skip
    add("--predictor-head", type=int, default=128, metavar="P", help="Width of its hidden layer")
    add("--prefill", choices=["pruned", "dense"],
        help="Who reads the prompt: dense, the LLM with all of its channels (default: the "
        "checkpoint's, or pruned)")  # fmt: skip
    add("--mask", choices=["soft", "straight_through"], default="straight_through",
        help="Values of the mask in training; straight_through is 0 or 1")  # fmt: skip
    add("--mask-operator", choices=OPERATORS, default="sigmoid", help="SoftTopK")
    add("--mask-temperature", type=float, default=0.1, help="Epsilon of SoftTopK at the end")
    add("--mask-temperature-start", type=float, help="At the beginning (default: the same)")
    add("--blend-iters", type=int, default=0, help="Steps in which the mask rises from none")
    add("--warm-start-iters", type=int, default=0,
        help="Steps that fit the predictor to the dense model's activations first")  # fmt: skip
    add("--warm-start-examples", type=int, default=2048, help="Training examples used for that")
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--iters", type=int, help="Steps of the optimizer")
    add("--minutes", type=float, help="Time limit of the whole command, last save included")
    add("--distill-weight", type=float, default=0.0,
        help="Share of KL(dense || masked) in the loss; the rest is cross-entropy")  # fmt: skip
    add("--distill-on", choices=["all", "answer"], default="all", help="Tokens that are distilled")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, of the LLM")
    add("--predictor-learning-rate", type=float, default=1e-4, help="AdamW's, of the predictor")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine",
        help="How the rates fall to 0 at the end")  # fmt: skip
    add("--warmup-iters", type=int, default=20, help="Steps in which the rates rise")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, of matrices")
    add("--max-grad-norm", type=float, default=1.0, help="Gradients are clipped; 0 for never")
    add("--skip-above", type=float, default=5.0,
        help="A step is skipped if its gradients' norm is so many times the usual one")  # fmt: skip
    add("--batch-tokens", type=int, default=16384, help="Tokens of a batch, padding included")
    add("--grad-accumulation-steps", type=int, default=1, help="Batches of a step, each process")
    add("--seed", type=int, default=0)
    group = parser.add_argument_group("rounded weights")
    add = group.add_argument
    add("--quantize-from", type=float, default=1.0,
        help="From this share of the run on the weights are those of convert -q")  # fmt: skip
    add("--q-bits", type=int, default=4, help="As for mlx_ifp.convert")
    add("--q-group-size", type=int, default=64, help="As for mlx_ifp.convert")
    add("--q-bits-of", nargs="+", default=[], metavar="NAME=BITS",
        help="Other bits for weights with this in their name: embed_tokens=5")  # fmt: skip
    group = parser.add_argument_group("memory and speed")
    add = group.add_argument
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
        help="Of computation; weights are trained in float32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile layers and loss")
    add("--grad-checkpoint", action="store_true", help="Recompute activations to save memory")
    add("--loss-block", type=int, help="Positions whose logits are in memory at once")
    group = parser.add_argument_group("reports and files")
    add = group.add_argument
    add("--steps-per-report", type=int, default=10)
    add("--steps-per-eval", type=int, default=0, help="0: only at the beginning and at the end")
    add("--valid-examples", type=int, default=512, help="Used, evenly spread")
    add("--save-every", type=int, default=0, help="Steps between states to resume from; 0: none")
    add("--save-dtype", choices=DTYPES, default="float16", help="Of the weights in the checkpoint")
    add("--shard-size", default="4GB", help="Of the LLM's files at most, for instance 16MB")
    return parser


def fail(message: object) -> SystemExit:
    """The end of a run, in one line."""
    return SystemExit(f"train.py: {message}")


def check_options(args: argparse.Namespace) -> None:
    """End with one line if options are out of range or contradict one another."""
    for name, low, high in (
        ("distill_weight", 0, 1), ("quantize_from", 0, 1), ("weight_decay", 0, math.inf),
        ("learning_rate", 0, math.inf), ("predictor_learning_rate", 0, math.inf),
        ("batch_tokens", 1, math.inf), ("grad_accumulation_steps", 1, math.inf),
        ("steps_per_report", 1, math.inf), ("max_length", 2, math.inf), ("seed", 0, 2**32 - 1),
        ("chunk_size", 1, math.inf), ("skip_above", 1, math.inf),
        ("blend_iters", 0, math.inf), ("warmup_iters", 0, math.inf),
        ("predictor_head", 1, math.inf),
    ):  # fmt: skip
        if not low <= getattr(args, name) <= high:
            flag = "--" + name.replace("_", "-")
            raise fail(f"{flag} must be from {low} to {high}, not {getattr(args, name)}")
    for name in ("mask_temperature", "mask_temperature_start", "iters", "minutes", "loss_block"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise fail(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.q_bits not in BITS or args.q_group_size not in GROUP_SIZES:
        raise fail(f"--q-bits must be one of {BITS}, --q-group-size one of {GROUP_SIZES}")
    try:
        bits_of_parts(args.q_bits_of)
    except ValueError as error:
        raise fail(f"--q-bits-of: {error}") from error
    if args.iters is None and args.minutes is None:
        raise fail("say how long to train: --iters or --minutes")
    if len(args.keep) > 2:
        raise fail("--keep takes one number, or the two ends of a range")
    named = [args.predictor_layers, args.predictor_model, args.predictor_llm]
    if args.select_by == "static" and any(named):
        raise fail(
            "--select-by static has no predictor; leave out --predictor-layers, -model or -llm"
        )
    if sum(map(bool, named)) > 1:
        raise fail("the predictor is one of --predictor-layers, --predictor-model, --predictor-llm")
    if args.predictor_llm and (args.prefill != "dense" or args.stage == "pretrain"):
        raise fail("--predictor-llm needs --prefill dense and --stage sft: the LLM reads prompts")
    if (args.select_by == "task") != (args.task_descriptions is not None):
        raise fail("--select-by task and --task-descriptions go together")
    if args.select_by == "task" and args.stage == "pretrain":
        raise fail("in --stage pretrain chunks select; use --select-by prompt or static")
    output = Path(args.output)
    if args.resume and not (output / STATE).is_dir():
        raise fail(f"{output} has no state to resume from; a run saves it with --save-every")
    # The first of several processes may have made it already.
    if output.exists() and not args.resume and os.environ.get("RANK", "0") == "0":
        raise fail(f"{output} exists; name a new directory, or --resume the run in it")


def count_of(keep: float, channels: int) -> int:
    """A count, or a share up to 1.0, as a number of channels."""
    count = round(keep * channels) if keep <= 1 else int(keep)
    if not 1 <= count <= channels:
        raise fail(f"--keep {keep:g} is not between 1 and the {channels} channels of a layer")
    return count


def task_descriptions(path: str | None) -> dict[str, str] | None:
    """The texts that select for each task, if there is a file of them."""
    if path is None:
        return None
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"{path} must map each task to a description")
    return found
