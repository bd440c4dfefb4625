"""The options of ``mlx_ifp.train``: flags, defaults and checks, all made of the fields here."""

import argparse
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from ...checkpoint.config import TEXT_FORMATS
from ...choices import FINE_TUNE_TYPES, QUANTIZATION_MODES, STAGES
from ...cli.flags import new_parser, parse_keep
from ...selection.keep import Keep
from ...tuner.training_args import TrainingArgs, option

EXAMPLES = """examples:
  mlx_ifp.train --model Qwen/Qwen3-0.6B --data data --keep 0.5 --run-path runs/qwen3 --iters 600
  mlx_ifp.train -c train.yaml --resume
  mlx_ifp.generate --model runs/qwen3/ifp --prompt "hello"
"""


@dataclass
class Start:
    """The models that training starts from."""

    model: str | None = option(None, "A dense mlx-lm model, or a float checkpoint of mlx_ifp")
    teacher: str | None = option(
        None,
        "The dense model to distil from and to compare with (default: --model's LLM as it is at "
        "the start); for training a checkpoint on",
    )
    trust_remote_code: bool = option(False, "Let the tokenizer run code of the model's repository")
    dtype: str | None = option(
        None,
        "Train in this type (default: float32; what is not trained stays as stored)",
        choices=("bfloat16", "float32"),
    )
    predictor_model: str | None = option(None, "A pretrained mlx-lm model as the predictor")
    predictor_layers: int | None = option(
        None, "Make the predictor of the LLM's first layers (default: 4)"
    )
    head_width: int | None = option(None, "P, hidden width of its head (default: 128)", least=1)


@dataclass
class Data:
    """The data that the model is trained on."""

    data: str | None = option(
        None,
        "Directory with {train,valid}.jsonl, and test.jsonl for --test, or a hub data set",
    )
    stage: str = option("sft", "Consecutive chunks of text, or prompts and answers", choices=STAGES)
    chunk_size: int = option(256, "Tokens of a chunk")
    max_seq_length: int = option(2048, "Maximum tokens")
    text_format: str | None = option(
        None, "How the text that selects is tokenized (default: raw)", choices=TEXT_FORMATS
    )


@dataclass
class Mask:
    """How many channels are selected, and which text selects them."""

    keep: Keep | None = option(
        None, "FFN channels to keep in each layer (default: 0.5)", metavar="K|FRACTION"
    )
    # A list is one k for each layer to --keep, so a range has a name of its own.
    keep_range: list[Keep] | None = option(
        None,
        "Draw k anew for each batch from this range, so that the checkpoint serves every k in it; "
        "--keep is then the checkpoint's own k (default: the middle)",
        metavar=("LOW", "HIGH"),
        nargs=2,
    )
    select_by: str = option(
        "prompt",
        "The prompt, its task's description, or nothing: one mask for all",
        choices=("prompt", "task", "static"),
    )
    tasks: str | None = option(
        None, "A YAML file, task name -> description, for --select-by task", metavar="FILE"
    )
    mask_operator: str = option("sigmoid", "SoftTopK's entropy", choices=("sigmoid", "capped_exp"))
    hard_mask: bool = option(False, "Use a 0/1 mask at inference, not SoftTopK's values")


@dataclass
class Training:
    """What is trained, and how a new predictor is fitted first."""

    fine_tune_type: str = option(
        "layers",
        "What is trained beside the predictor: everything, all but the embeddings, the FFNs, LoRA "
        "layers, or nothing",
        choices=FINE_TUNE_TYPES,
    )
    num_layers: int = option(-1, "Layers to train, -1 for all", least=-1)
    # This is mlx-lm's default.
    lora_parameters: dict[str, Any] = option(
        {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "Settings of LoRA layers, as in mlx-lm",
        yaml_only=True,
    )
    test: bool = option(False, "Evaluate on the test set after training")
    test_batches: int = option(500, "Test batches, -1 for the entire set", least=-1)
    warm_start_iters: int = option(
        200, "Steps of fitting a new predictor to the dense model's activations", least=0
    )
    warm_start_examples: int = option(512, "Examples to fit it to", least=1)
    warm_start_learning_rate: float = option(1e-3, "Adam's, in these steps", least=0)


@dataclass
class Rounding:
    """Quantization-aware training."""

    quantize: bool = option(
        False,
        "Train what mlx_ifp.convert -q will make: the LLM's weights are rounded in the forward "
        "pass. The result is still floats, to be converted with these options",
        short="-q",
    )
    q_bits: int | None = option(None, "Bits per weight, as convert will have them")
    q_group_size: int | None = option(None, "Group size, likewise")
    q_mode: str = option("affine", "Mode, likewise", choices=QUANTIZATION_MODES)


@dataclass
class Run:
    """Where the run is kept, and who receives its reports."""

    run_path: str = option("run", "Directory of the run: log, checkpoints")
    mlx_path: str | None = option(None, "Where the result goes (default: ifp in the run's path)")
    targets_path: str | None = option(
        None,
        "Where the dense model's results are kept (default: in the run's path); runs on the same "
        "data may share it",
    )
    resume: bool = option(False, "Go on from the last checkpoint")
    report_to: str | None = option(None, "'wandb', 'swanlab' or both, as in mlx-lm")
    project_name: str | None = option(None, "Project name for these")


GROUPS: dict[str, tuple[type, ...]] = {
    "start": (Start,),
    "data": (Data,),
    "mask": (Mask,),
    "training": (Training, TrainingArgs),
    "quantization-aware training": (Rounding,),
    "run": (Run,),
}
# All options that flags and YAML can set, by name.
OPTIONS: dict[str, Field] = {
    each.name: each for classes in GROUPS.values() for one in classes for each in fields(one)
}
_HINTS = {
    name: hint
    for classes in GROUPS.values()
    for one in classes
    for name, hint in typing.get_type_hints(one).items()
}


def defaults() -> dict[str, Any]:
    """Give the default of every option, and of ``config``, the path of the YAML file."""
    return {"config": None} | {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in OPTIONS.values()
    }


def type_of(name: str) -> Any:
    """An option's type: bool, int, float, str, dict, list or :data:`Keep`."""
    if name == "keep":
        return Keep
    hint = _HINTS[name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(typing.get_origin(part) or part for part in parts if part is not type(None))


def setup_arg_parser() -> argparse.ArgumentParser:
    """Make the parser: arguments are named as in mlx_lm.lora where they mean the same.

    An option that is not given is absent from the namespace, as a YAML file may set it.
    """
    parser = new_parser(
        "train",
        "Train an LLM and its sparsity predictor together.",
        EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    only = [name for name, each in OPTIONS.items() if each.metadata["yaml_only"]]
    parser.add_argument(
        "-c",
        "--config",
        help="A YAML file with these options, and with "
        f"{', '.join(only[:-1])} and {only[-1]}, as in mlx-lm",
    )
    for title, classes in GROUPS.items():
        group = parser.add_argument_group(title)
        for each in [each for one in classes for each in fields(one)]:
            if each.name not in only:
                _add(group, each)
    return parser


def _add(group: argparse._ArgumentGroup, each: Field) -> None:
    """Add an option to the parser as a flag."""
    about = each.metadata
    flags = [*([about["short"]] if about["short"] else []), f"--{each.name.replace('_', '-')}"]
    kind = type_of(each.name)
    if kind is bool:
        group.add_argument(*flags, action="store_true", help=about["help"])
        return
    default = "" if each.default is None else f" (default: {each.default})"
    group.add_argument(
        *flags,
        type=parse_keep if each.name in ("keep", "keep_range") else kind,
        nargs=about["nargs"],
        choices=about["choices"],
        metavar=about["metavar"],
        help=about["help"] + default,
    )
