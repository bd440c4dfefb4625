"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

import argparse
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.utils import save_config

from .cli import command
from .config import TEXT_FORMATS, IFPConfig, MaskConfig, TextConfig
from .errors import IFPError
from .keep import resolve_one_keep
from .options import parse_keep
from .subnetwork import share
from .tuner.data import load_examples
from .tuner.dense_targets import DenseTargets
from .tuner.predictor_start import PredictorStart, from_checkpoint, from_layers, from_model
from .tuner.save import save_student
from .tuner.student import FINE_TUNE_TYPES, Source, Student, choose_trainable, load_source
from .tuner.trainer import RunLog, Split, Trainer, identity_of
from .tuner.training_args import TrainingArgs
from .tuner.training_state import latest_checkpoint
from .tuner.warm_start import fit_predictor, mean_importance

CONFIG_NAME = "train_config.json"
CHOICES = {
    "dtype": ("float16", "bfloat16", "float32"),
    "stage": ("pretrain", "sft"),
    "text_format": TEXT_FORMATS,
    "select_by": ("prompt", "task", "static"),
    "mask_operator": ("sigmoid", "capped_exp"),
    "fine_tune_type": FINE_TUNE_TYPES,
    "distill_on": ("all", "answer"),
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
    parser.add_argument("-c", "--config", help="A YAML file with these options")
    start = parser.add_argument_group("start")
    start.add_argument("--model", help="A dense mlx-lm model, or a float checkpoint of mlx_ifp")
    start.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code of the model's repository",
    )
    start.add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        help="Train in this type (default: as stored; on a CPU float32)",
    )
    start.add_argument("--predictor-model", help="A pretrained mlx-lm model as the predictor")
    start.add_argument(
        "--predictor-layers",
        type=int,
        help="Make the predictor of the LLM's first layers (default: 4)",
    )
    start.add_argument("--head-width", type=int, help="P, hidden width of its head (default: 128)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="Directory with {train,valid,test}.jsonl, or a hub data set")
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
        "--warm-start-iters",
        type=int,
        help="Steps of fitting a new predictor to the dense model's activations (default: 200)",
    )
    trained.add_argument(
        "--warm-start-examples", type=int, help="Examples to fit it to (default: 512)"
    )
    trained.add_argument("--warm-start-learning-rate", type=float, help="(default: 1e-3)")
    for each in fields(TrainingArgs):
        flag = f"--{each.name.replace('_', '-')}"
        if each.name.endswith("lr_schedule"):
            continue
        text = f"{each.metadata['help']} (default: {each.default})"
        if isinstance(each.default, bool):
            trained.add_argument(flag, action="store_true", help=text)
        else:
            kind = float if each.default is None else type(each.default)
            trained.add_argument(flag, type=kind, choices=CHOICES.get(each.name), help=text)
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
    "trust_remote_code": False,
    "dtype": None,
    "predictor_model": None,
    "predictor_layers": None,
    "head_width": 128,
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
    "warm_start_iters": 200,
    "warm_start_examples": 512,
    "warm_start_learning_rate": 1e-3,
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
            values = yaml.load(Path(path).read_text(), yaml_loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise IFPError(f"{path} is not valid YAML: {error}.") from error
        if not isinstance(values, dict):
            raise IFPError(f"{path} must hold options, one 'name: value' a line.")
        for name, value in values.items():
            name = str(name).replace("-", "_")
            if name not in DEFAULTS:
                raise IFPError(f"{path}: there is no option {name!r}.")
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
    "mask_temperature_start": 1.0,
    "lr_schedule": {},
    "predictor_lr_schedule": {},
}


def _checked(path: str, name: str, value: Any) -> Any:
    default = DEFAULTS[name]
    if value is None or name == "keep":
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


def _task_texts(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        texts = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IFPError(f"--tasks {path} is not valid YAML: {error}.") from error
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise IFPError(f"--tasks {path} must hold one 'task: description' a line.")
    return {str(name): text for name, text in texts.items()}


def _predictor(args: types.SimpleNamespace, source: Source, dtype: Any) -> PredictorStart:
    if args.predictor_model is not None:
        if args.predictor_layers is not None:
            raise IFPError("--predictor-model and --predictor-layers exclude each other.")
        return from_model(
            args.predictor_model, source, dtype, args.head_width, args.trust_remote_code
        )
    if _has_predictor(args, source):
        return from_checkpoint(source, dtype)
    return from_layers(source, args.predictor_layers or min(4, len(source.ffns)), args.head_width)


def _ifp_config(args: types.SimpleNamespace, source: Source) -> IFPConfig:
    trained = source.checkpoint.ifp if source.checkpoint is not None else None
    keep = args.keep if args.keep is not None else (trained.k if trained else 0.5)
    k = resolve_one_keep(keep, source.ffns[0].d_ffn, len(source.ffns))
    text = trained.text if trained else TextConfig()
    if args.text_format is not None:
        text = TextConfig(text.source, args.text_format, text.max_tokens)
    soft = args.select_by != "static"
    mask = MaskConfig(
        args.mask_operator if soft else "topk",
        args.mask_temperature,
        soft and not args.hard_mask,
    )
    return IFPConfig(k=k, selector="predictor" if soft else "static", mask=mask, text=text)


def run(args: types.SimpleNamespace) -> Path:
    """Train as the options say.

    Returns:
        Path: the checkpoint that was made.
    """
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise IFPError(f"Name --{name}.")
    numbers = TrainingArgs(**{each.name: getattr(args, each.name) for each in fields(TrainingArgs)})
    numbers.check()
    task_texts = _task_texts(args.tasks)
    if args.select_by == "task" and task_texts is None:
        raise IFPError("--select-by task needs --tasks, a YAML file of task descriptions.")
    first = mx.distributed.init().rank() == 0
    path = Path(args.run_path)
    result = Path(args.mlx_path) if args.mlx_path else path / "ifp"
    checkpoint = latest_checkpoint(path)
    if args.resume and checkpoint is None:
        raise IFPError(f"{path} has no checkpoint to resume from.")
    if not args.resume and checkpoint is not None:
        raise IFPError(f"{path} holds a run already: use --resume, or another --run-path.")
    if result.exists():
        raise IFPError(f"{result} already exists. Delete it or name another --mlx-path.")
    mx.random.seed(args.seed)
    dtype = getattr(mx, args.dtype) if args.dtype else None
    source = load_source(args.model, dtype, args.trust_remote_code)
    ifp = _ifp_config(args, source)
    start = None if args.select_by == "static" else _predictor(args, source, dtype)
    if start is not None:
        ifp.head, ifp.predictor_embedding = start.head.config, "llm" if start.embedding else "own"
    examples = load_examples(
        args.data,
        source.tokenizer,
        start.tokenizer if start else source.tokenizer,
        ifp.text,
        stage=args.stage,
        max_seq_length=args.max_seq_length,
        chunk_size=args.chunk_size,
        task_texts=task_texts if args.select_by == "task" else None,
    )
    path.mkdir(parents=True, exist_ok=True)
    if first:
        save_config(dict(vars(args)), path / CONFIG_NAME)
    try:
        # Only the first rank reports.
        services = args.report_to if first else None
        callback = get_reporting_callbacks(services, args.project_name, str(path), vars(args))
    except (ImportError, ValueError) as error:
        raise IFPError(f"--report-to {args.report_to}: {' '.join(str(error).split())}") from error
    train, valid = _splits(args, source, examples, path, first)

    static = None
    if start is None:
        used = _spread(len(train.examples), args.warm_start_examples)
        static = mx.array(mean_importance(train.targets, used, args.batch_size))
    student = Student(
        source.llm,
        source.ffns,
        start.backbone if start else None,
        start.head if start else None,
        ifp,
        static,
        start.embedding if start else "",
    )
    choose_trainable(student, args.fine_tune_type, args.lora_parameters, args.num_layers)
    identity = identity_of(
        source.digest,
        train.examples,
        numbers,
        stage=args.stage,
        k=ifp.k,
        select_by=args.select_by,
        fine_tune_type=args.fine_tune_type,
        mask=args.mask_operator,
    )
    trainer = Trainer(student, numbers, path, train, valid, args.select_by, identity, callback)
    if args.resume:
        trainer.resume(checkpoint)
    elif start is not None and args.warm_start_iters and not _has_predictor(args, source):
        _warm_start(args, student, train, trainer.log)
    trainer.train()
    if first:
        save_student(
            student,
            source,
            result,
            dtype=source.dtype,
            predictor_config=start.config if start else None,
            predictor_tokenizer=start.tokenizer if start else None,
            training={
                "tokens": trainer.trained_tokens,
                "iters": trainer.step,
                "stage": args.stage,
                "select_by": args.select_by,
            },
        )
        print(f"Saved the checkpoint to {result}.")
    return result


def _has_predictor(args: types.SimpleNamespace, source: Source) -> bool:
    """Whether the source's own predictor is trained on."""
    trained = source.checkpoint is not None and source.checkpoint.ifp.head is not None
    return trained and args.predictor_model is None and args.predictor_layers is None


def _spread(n: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, wanted).astype(int)).tolist()


def _splits(
    args: types.SimpleNamespace,
    source: Source,
    examples: dict[str, list],
    path: Path,
    first: bool,
) -> tuple[Split, Split | None]:
    """Training and validation data with the dense model's targets; the first rank makes files."""
    targets = Path(args.targets_path) if args.targets_path else path / "targets"
    # The same arrays: training gives the student new ones.
    dense = share(source.llm)
    valid = examples["valid"]
    if args.val_batches >= 0:
        valid = (
            [valid[i] for i in _spread(len(valid), args.val_batches * args.batch_size)]
            if valid and args.val_batches
            else []
        )

    def split(part: list) -> Split:
        return Split(part, DenseTargets(targets, dense, source.ffns, part, source.digest))

    if first:
        made = [split(part) for part in (examples["train"], valid) if part]
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    if not first:
        made = [split(part) for part in (examples["train"], valid) if part]
    return made[0], made[1] if len(made) > 1 else None


def _warm_start(args: types.SimpleNamespace, student: Student, train: Split, log: RunLog) -> None:
    def report(values: dict[str, Any]) -> None:
        log.write(
            values,
            f"Warm start {values['warm_start_iteration']}: "
            f"loss {values['warm_start_loss']:.4f}, variance between examples explained "
            f"{values['variance_explained']:.1%}",
        )

    fit_predictor(
        student,
        train.examples,
        train.targets,
        iters=args.warm_start_iters,
        learning_rate=args.warm_start_learning_rate,
        examples_used=args.warm_start_examples,
        seed=args.seed,
        report=report,
    )


@command
def main() -> None:
    """Run ``mlx_ifp.train``."""
    run(options_of(vars(setup_arg_parser().parse_args())))
