"""The options of ``mlx_ifp.train``, of the command line and of a YAML file."""

import argparse
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

from ...checkpoint.config import TEXT_FORMATS
from ...choices import FINE_TUNE_TYPES, QUANTIZATION_MODES, STAGES
from ...cli.flags import parse_keep
from ...errors import IFPError
from ...tuner.training_args import TrainingArgs

CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "stage": STAGES,
    "text_format": TEXT_FORMATS,
    "select_by": ("prompt", "task", "static"),
    "mask_operator": ("sigmoid", "capped_exp"),
    "fine_tune_type": FINE_TUNE_TYPES,
    "distill_on": ("all", "answer"),
    "q_mode": QUANTIZATION_MODES,
}

EXAMPLES = """examples:
  mlx_ifp.train --model Qwen/Qwen3-0.6B --data data --keep 0.5 --run-path runs/qwen3 --iters 600
  mlx_ifp.train -c train.yaml --resume
  mlx_ifp.generate --model runs/qwen3/ifp --prompt "hello"
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.lora's arguments where they mean the same, and ours. No defaults: see DEFAULTS."""
    parser = argparse.ArgumentParser(
        prog="mlx_ifp.train",
        description="Train an LLM and its sparsity predictor together.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "-c",
        "--config",
        help="A YAML file with these options, and with lora_parameters, lr_schedule and "
        "predictor_lr_schedule, as in mlx-lm",
    )
    start = parser.add_argument_group("start")
    start.add_argument("--model", help="A dense mlx-lm model, or a float checkpoint of mlx_ifp")
    start.add_argument(
        "--teacher",
        help="The dense model to distil from and to compare with (default: --model's LLM as it is "
        "at the start); for training a checkpoint on",
    )
    start.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code of the model's repository",
    )
    start.add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        help="Train in this type (default: float32, and as stored what is not trained)",
    )
    start.add_argument("--predictor-model", help="A pretrained mlx-lm model as the predictor")
    start.add_argument(
        "--predictor-layers",
        type=int,
        help="Make the predictor of the LLM's first layers (default: 4)",
    )
    start.add_argument("--head-width", type=int, help="P, hidden width of its head (default: 128)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="Directory with {train,valid}.jsonl, and test.jsonl for --test, or a hub data set",
    )
    data.add_argument(
        "--stage",
        choices=CHOICES["stage"],
        help="Consecutive chunks of text, or prompts and answers (default: sft)",
    )
    data.add_argument("--chunk-size", type=int, help="Tokens of a chunk (default: 256)")
    data.add_argument("--max-seq-length", type=int, help="Maximum tokens (default: 2048)")
    data.add_argument(
        "--text-format",
        choices=CHOICES["text_format"],
        help="How the text that selects is tokenized (default: raw)",
    )
    mask = parser.add_argument_group("mask")
    mask.add_argument(
        "--keep",
        type=parse_keep,
        metavar="K|FRACTION",
        help="FFN channels to keep in each layer (default: 0.5)",
    )
    mask.add_argument(
        "--select-by",
        choices=CHOICES["select_by"],
        help="The prompt, its task's description, or nothing: one mask for all (default: prompt)",
    )
    mask.add_argument(
        "--tasks",
        metavar="FILE",
        help="A YAML file, task name -> description, for --select-by task",
    )
    mask.add_argument(
        "--mask-operator",
        choices=CHOICES["mask_operator"],
        help="SoftTopK's entropy (default: sigmoid)",
    )
    mask.add_argument(
        "--hard-mask",
        action="store_true",
        help="Use a 0/1 mask at inference, not SoftTopK's values",
    )
    trained = parser.add_argument_group("training")
    trained.add_argument(
        "--fine-tune-type",
        choices=CHOICES["fine_tune_type"],
        help="What is trained beside the predictor: everything, all but the "
        "embeddings, the FFNs, LoRA layers, or nothing (default: layers)",
    )
    trained.add_argument("--num-layers", type=int, help="Layers to train, -1 for all (default)")
    trained.add_argument(
        "--test", action="store_true", help="Evaluate on the test set after training"
    )
    trained.add_argument(
        "--test-batches", type=int, help="Test batches, -1 for the entire set (default: 500)"
    )
    trained.add_argument(
        "--warm-start-iters",
        type=int,
        help="Steps of fitting a new predictor to the dense model's activations (default: 200)",
    )
    trained.add_argument(
        "--warm-start-examples", type=int, help="Examples to fit it to (default: 512)"
    )
    trained.add_argument(
        "--warm-start-learning-rate", type=float, help="Adam's, in these steps (default: 1e-3)"
    )
    for each in fields(TrainingArgs):
        flag = f"--{each.name.replace('_', '-')}"
        if each.name.endswith("lr_schedule"):
            continue
        text = each.metadata["help"]
        if each.default is not None:
            text += f" (default: {each.default})"
        if isinstance(each.default, bool):
            trained.add_argument(flag, action="store_true", help=text)
        else:
            kind = float if each.default is None else type(each.default)
            trained.add_argument(flag, type=kind, choices=CHOICES.get(each.name), help=text)
    rounded = parser.add_argument_group("quantization-aware training")
    rounded.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="Train what mlx_ifp.convert -q will make: the LLM's weights are rounded in the "
        "forward pass. The result is still floats, to be converted with these options",
    )
    rounded.add_argument("--q-bits", type=int, help="Bits per weight, as convert will have them")
    rounded.add_argument("--q-group-size", type=int, help="Group size, likewise")
    rounded.add_argument(
        "--q-mode", choices=QUANTIZATION_MODES, help="Mode, likewise (default: affine)"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--run-path", help="Directory of the run: log, checkpoints (default: run)")
    run.add_argument("--mlx-path", help="Where the result goes (default: ifp in the run's path)")
    run.add_argument(
        "--targets-path",
        help="Where what the dense model does is kept "
        "(default: in the run's path); runs on the same data may share it",
    )
    run.add_argument("--resume", action="store_true", help="Go on from the last checkpoint")
    run.add_argument("--report-to", help="'wandb', 'swanlab' or both, as in mlx-lm")
    run.add_argument("--project-name", help="Project name for these")
    return parser


DEFAULTS = {
    "model": None,
    "teacher": None,
    "trust_remote_code": False,
    "dtype": None,
    "predictor_model": None,
    "predictor_layers": None,
    "head_width": None,
    "data": None,
    "stage": "sft",
    "chunk_size": 256,
    "max_seq_length": 2048,
    "text_format": None,
    "keep": None,
    "select_by": "prompt",
    "tasks": None,
    "mask_operator": "sigmoid",
    "hard_mask": False,
    "fine_tune_type": "layers",
    "num_layers": -1,
    "test": False,
    "test_batches": 500,
    "warm_start_iters": 200,
    "warm_start_examples": 512,
    "warm_start_learning_rate": 1e-3,
    "quantize": False,
    "q_bits": None,
    "q_group_size": None,
    "q_mode": "affine",
    "run_path": "run",
    "mlx_path": None,
    "targets_path": None,
    "resume": False,
    "report_to": None,
    "project_name": None,
    "config": None,
    "lora_parameters": CONFIG_DEFAULTS["lora_parameters"],
    **{each.name: each.default for each in fields(TrainingArgs)},
}


def options_of(given: dict[str, Any]) -> types.SimpleNamespace:
    """Command line over YAML over defaults.

    Raises:
        IFPError: if the YAML file is none, or has an option that is unknown or of a wrong type.
    """
    options = dict(DEFAULTS)
    if given.get("config"):
        path = given["config"]
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), yaml_loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise IFPError(f"{path} is not valid YAML: {error}.") from error
        if not isinstance(values, dict):
            raise IFPError(f"{path} must hold options, one 'name: value' a line.")
        for name, value in values.items():
            name = str(name).replace("-", "_")
            if name not in DEFAULTS or name == "config":
                raise IFPError(f"{path}: there is no option {name!r}.")
            # As in mlx-lm, an option without a value has its default.
            if value is not None:
                options[name] = _checked(path, name, value)
    options |= given
    if isinstance(options["keep"], str):
        try:
            options["keep"] = parse_keep(options["keep"])
        except argparse.ArgumentTypeError as error:
            raise IFPError(f"{given.get('config')}: keep: {error}.") from error
    return types.SimpleNamespace(**options)


_TYPICAL = {
    "predictor_layers": 1,
    "head_width": 1,
    "q_bits": 1,
    "q_group_size": 1,
    "mask_temperature_start": 1.0,
    "lr_schedule": {},
    "predictor_lr_schedule": {},
}


def _checked(path: str, name: str, value: Any) -> Any:
    default = DEFAULTS[name]
    if name == "keep":
        if isinstance(value, bool) or not isinstance(value, (int, float, str, list)):
            raise IFPError(f"{path}: keep must be a count, a fraction or a list of counts.")
        return value
    if name in CHOICES and value not in CHOICES[name]:
        raise IFPError(f"{path}: {name} must be one of {', '.join(CHOICES[name])}, not {value!r}.")
    # What has no default still has a type; all others are texts.
    default = _TYPICAL.get(name, "") if default is None else default
    wanted = (int, float) if isinstance(default, float) else type(default)
    right = isinstance(value, wanted) and (isinstance(default, bool) or not isinstance(value, bool))
    if not right:
        kind = "a number" if isinstance(default, (int, float)) else f"a {type(default).__name__}"
        kind = "true or false" if isinstance(default, bool) else kind
        raise IFPError(f"{path}: {name} must be {kind}, not {value!r}.")
    return float(value) if isinstance(default, float) else value
