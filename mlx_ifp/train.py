"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

import contextlib
import errno
import fcntl
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.utils import save_config

from .cli import command
from .config import IFPConfig, MaskConfig, TextConfig, text_limit
from .errors import IFPError
from .keep import resolve_one_keep
from .structure import find_embedding, get_module
from .subnetwork import share
from .train_options import options_of, setup_arg_parser
from .tuner.batches import spread
from .tuner.data import load_examples
from .tuner.dense_targets import DenseTargets
from .tuner.predictor_start import (
    HEAD_WIDTH,
    PredictorStart,
    from_checkpoint,
    from_layers,
    from_model,
)
from .tuner.quantization_aware import Rounding
from .tuner.run_log import RunLog
from .tuner.save import save_student
from .tuner.student import Source, Student, choose_trainable, load_source
from .tuner.trainer import Split, Trainer, identity_of
from .tuner.training_args import TrainingArgs
from .tuner.training_state import latest_checkpoint
from .tuner.warm_start import fit_predictor, mean_importance

CONFIG_NAME = "train_config.json"


def _task_texts(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        texts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IFPError(f"--tasks {path} is not valid YAML: {error}.") from error
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise IFPError(f"--tasks {path} must hold one 'task: description' a line.")
    return {str(name): text for name, text in texts.items()}


def _teacher(args: types.SimpleNamespace, source: Source, dtype: mx.Dtype | None) -> Source:
    """The model that ``--teacher`` names; it must be of the shape that is trained."""
    teacher = load_source(args.teacher, dtype, args.trust_remote_code, frozen=True)
    shapes = [
        (
            get_module(each.llm, find_embedding(each.llm)).weight.shape[0],
            [ffn.d_ffn for ffn in each.ffns],
        )
        for each in (teacher, source)
    ]
    if shapes[0] != shapes[1]:
        raise IFPError(
            f"--teacher {args.teacher} has another vocabulary or other FFNs than {args.model}; "
            "name the dense model that it was made of."
        )
    return teacher


def _predictor(args: types.SimpleNamespace, source: Source, dtype: Any) -> PredictorStart:
    width = HEAD_WIDTH if args.head_width is None else args.head_width
    if args.predictor_model is not None:
        if args.predictor_layers is not None:
            raise IFPError("--predictor-model and --predictor-layers exclude each other.")
        return from_model(args.predictor_model, source, dtype, width, args.trust_remote_code)
    if _has_predictor(args, source):
        if args.head_width is not None:
            raise IFPError(
                f"{args.model} has a predictor; --head-width is for a new one: name "
                "--predictor-layers or --predictor-model, too."
            )
        return from_checkpoint(source, dtype, args.trust_remote_code)
    layers = args.predictor_layers
    layers = min(4, len(source.ffns)) if layers is None else layers
    return from_layers(source, layers, width, dtype)


def _ifp_config(args: types.SimpleNamespace, source: Source) -> IFPConfig:
    trained = source.checkpoint.ifp if source.checkpoint is not None else None
    keep = args.keep if args.keep is not None else (trained.k if trained else 0.5)
    k = resolve_one_keep(keep, source.ffns[0].d_ffn, len(source.ffns))
    text = replace(trained.text if trained else TextConfig())
    if args.text_format is not None:
        text.format = args.text_format
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
    numbers, task_texts = _check(args)
    path, result, checkpoint = _places(args)
    mx.random.seed(args.seed)
    dtype = getattr(mx, args.dtype) if args.dtype else None
    # LoRA's own weights are float32 in any case.
    frozen = args.fine_tune_type in ("lora", "predictor")
    source = load_source(args.model, dtype, args.trust_remote_code, frozen=frozen)
    teacher = source if args.teacher is None else _teacher(args, source, dtype)
    rounding = _rounding(args, source)
    ifp = _ifp_config(args, source)
    start = None if args.select_by == "static" else _predictor(args, source, dtype)
    if start is not None:
        ifp.head, ifp.predictor_embedding = start.head.config, "llm" if start.embedding else "own"
        ifp.text.max_tokens = min(ifp.text.max_tokens, text_limit(start.config))
    examples = load_examples(
        args.data,
        source.tokenizer,
        start.tokenizer if start else source.tokenizer,
        ifp.text,
        stage=args.stage,
        max_seq_length=args.max_seq_length,
        chunk_size=args.chunk_size,
        task_texts=task_texts,
    )
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path), _told_how_to_go_on(path):
        callback = _callback(args, path)
        train, valid = _splits(args, teacher, examples, path)
        student = _student(args, source, start, ifp, train, rounding)
        identity = _identity(args, numbers, ifp, source, teacher, train)
        trainer = Trainer(student, numbers, path, train, valid, args.select_by, identity, callback)
        if args.resume:
            trainer.resume(checkpoint)
        elif start is not None and args.warm_start_iters and not _has_predictor(args, source):
            _warm_start(args, student, train, trainer.log)
        # The arrays of the dense model go when nothing needs them any more.
        del teacher
        if not numbers.distill_weight:
            train.targets.forget_model()
        if args.resume and trainer.step >= numbers.iters:
            print(f"Nothing is left to train: the run is at iteration {trainer.step}.")
        trainer.train()
        if _is_first():
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


def _check(args: types.SimpleNamespace) -> tuple[TrainingArgs, dict[str, str] | None]:
    """What can be found wrong before anything is loaded; the numbers, and tasks' descriptions."""
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise IFPError(f"Name --{name}.")
    numbers = TrainingArgs(**{each.name: getattr(args, each.name) for each in fields(TrainingArgs)})
    numbers.check()
    _check_numbers(args)
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise IFPError("--q-bits, --q-group-size and --q-mode need -q.")
    if (args.select_by == "task") != (args.tasks is not None):
        raise IFPError("--select-by task and --tasks, a YAML file of descriptions, go together.")
    return numbers, _task_texts(args.tasks)


def _places(args: types.SimpleNamespace) -> tuple[Path, Path, Path | None]:
    """The run's directory, the checkpoint to be made, and that of the run to go on from."""
    path = Path(args.run_path)
    result = Path(args.mlx_path) if args.mlx_path else path / "ifp"
    checkpoint = latest_checkpoint(path)
    if args.resume and checkpoint is None:
        raise IFPError(f"{path} has no checkpoint to resume from.")
    if not args.resume and checkpoint is not None:
        raise IFPError(f"{path} holds a run already: use --resume, or another --run-path.")
    if result.exists():
        what = "what comes now" if args.resume else "the new one"
        raise IFPError(
            f"{result} already exists. Delete it, or name another --mlx-path for {what}."
        )
    return path, result, checkpoint


def _is_first() -> bool:
    """Whether this is the one of several processes that reports and writes."""
    return mx.distributed.init().rank() == 0


def _callback(args: types.SimpleNamespace, path: Path) -> TrainingCallback | None:
    """mlx-lm's reports, and the run's options in its directory."""
    if not _is_first():
        return None
    save_config(dict(vars(args)), path / CONFIG_NAME)
    try:
        return get_reporting_callbacks(args.report_to, args.project_name, str(path), vars(args))
    except (ImportError, ValueError) as error:
        raise IFPError(f"--report-to {args.report_to}: {' '.join(str(error).split())}") from error


def _student(
    args: types.SimpleNamespace,
    source: Source,
    start: PredictorStart | None,
    ifp: IFPConfig,
    train: Split,
    rounding: Rounding | None,
) -> Student:
    static = None
    if start is None:
        used = spread(len(train.examples), args.warm_start_examples)
        static = mx.array(mean_importance(train.targets, used, args.batch_size))
    student = Student(
        source.llm,
        source.ffns,
        start.backbone if start else None,
        start.head if start else None,
        ifp,
        static,
        start.embedding if start else "",
        rounding,
    )
    choose_trainable(student, args.fine_tune_type, args.lora_parameters, args.num_layers)
    return student


def _identity(
    args: types.SimpleNamespace,
    numbers: TrainingArgs,
    ifp: IFPConfig,
    source: Source,
    teacher: Source,
    train: Split,
) -> dict[str, Any]:
    """What a run that is resumed must have in common with what began it."""
    return identity_of(
        source.digest,
        train.examples,
        numbers,
        stage=args.stage,
        k=ifp.k,
        select_by=args.select_by,
        fine_tune_type=args.fine_tune_type,
        mask=[ifp.mask.operator, ifp.mask.temperature, ifp.mask.keep_soft_values],
        mask_temperature_start=args.mask_temperature_start,
        text=asdict(ifp.text),
        dtype=args.dtype,
        quantize=[args.q_bits, args.q_group_size, args.q_mode] if args.quantize else None,
        **({"teacher": teacher.digest} if args.teacher else {}),
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A run belongs to one process, and those that it was launched with."""
    if not _is_first():
        yield
        return
    with open(path / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IFPError(
                f"{path} is in use by another process; name another --run-path."
            ) from error
        yield


@contextlib.contextmanager
def _told_how_to_go_on(path: Path) -> Iterator[None]:
    """Whoever stops a run, or has no room for its result, is told that it can go on."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, OSError) as error:
        last = latest_checkpoint(path)
        go_on = "begin again"
        if last:
            go_on = f"go on with --resume; the last complete checkpoint is {last}"
        if isinstance(error, OSError):
            first = "make room, then " if error.errno == errno.ENOSPC else ""
            reason = error.strerror or error
            raise IFPError(f"{error.filename or path}: {reason}; {first}{go_on}.") from error
        if last:
            print(f"[INFO] {go_on}.", file=sys.stderr)
        raise


def _check_numbers(args: types.SimpleNamespace) -> None:
    for name, least in (("warm_start_iters", 0), ("warm_start_examples", 1), ("head_width", 1),
                        ("num_layers", -1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise IFPError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")


def _rounding(args: types.SimpleNamespace, source: Source) -> Rounding | None:
    """What ``mlx_ifp.convert`` with the same options would quantize."""
    if not args.quantize:
        return None
    # In a clone it stands beside this package, and is a part of it only where that is installed.
    from .convert.precision import Precision, quantize_config

    precision = Precision(None, True, args.q_bits, args.q_group_size, args.q_mode)
    precision.check()
    _, plan, notes = quantize_config(source.config, source.ffns, precision)
    for note in notes:
        print(note, file=sys.stderr)
    # The plan knows an output layer that mlx-lm drops when it loads a model with a tied embedding.
    modules = dict(source.llm.named_modules())
    plan = {module: how for module, how in plan.items() if module in modules}
    return Rounding(plan, source.ffns, source.dtype)


def _has_predictor(args: types.SimpleNamespace, source: Source) -> bool:
    """Whether the source's own predictor is trained on."""
    trained = source.checkpoint is not None and source.checkpoint.ifp.head is not None
    return trained and args.predictor_model is None and args.predictor_layers is None


def _splits(
    args: types.SimpleNamespace,
    teacher: Source,
    examples: dict[str, list],
    path: Path,
) -> tuple[Split, Split | None]:
    """Training and validation data with the dense model's targets; the first rank makes files."""
    targets = Path(args.targets_path) if args.targets_path else path / "targets"
    # The same arrays: training gives the student new ones.
    dense = share(teacher.llm)
    valid = examples["valid"]
    if args.val_batches >= 0:
        valid = (
            [valid[i] for i in spread(len(valid), args.val_batches * args.batch_size)]
            if valid and args.val_batches
            else []
        )

    def split(part: list) -> Split:
        return Split(part, DenseTargets(targets, dense, teacher.ffns, part, teacher.digest))

    if _is_first():
        made = [split(part) for part in (examples["train"], valid) if part]
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    if not _is_first():
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
