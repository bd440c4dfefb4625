"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

import contextlib
import fcntl
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import yaml
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.utils import save_config

from .cli import command
from .config import IFPConfig, MaskConfig, TextConfig, text_limit
from .errors import IFPError
from .keep import resolve_one_keep
from .structure import find_embedding, get_module
from .subnetwork import share
from .train_options import options_of, setup_arg_parser
from .tuner.data import load_examples
from .tuner.dense_targets import DenseTargets
from .tuner.predictor_start import PredictorStart, from_checkpoint, from_layers, from_model
from .tuner.quantization_aware import Rounding
from .tuner.save import save_student
from .tuner.student import Source, Student, choose_trainable, load_source
from .tuner.trainer import RunLog, Split, Trainer, identity_of
from .tuner.training_args import TrainingArgs
from .tuner.training_state import latest_checkpoint
from .tuner.warm_start import fit_predictor, mean_importance

CONFIG_NAME = "train_config.json"


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
    if args.predictor_model is not None:
        if args.predictor_layers is not None:
            raise IFPError("--predictor-model and --predictor-layers exclude each other.")
        return from_model(
            args.predictor_model, source, dtype, args.head_width, args.trust_remote_code
        )
    if _has_predictor(args, source):
        return from_checkpoint(source, dtype)
    layers = args.predictor_layers
    layers = min(4, len(source.ffns)) if layers is None else layers
    return from_layers(source, layers, args.head_width, dtype)


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
    with contextlib.ExitStack() as held:
        return _run(args, held)


def _run(args: types.SimpleNamespace, held: contextlib.ExitStack) -> Path:
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise IFPError(f"Name --{name}.")
    numbers = TrainingArgs(**{each.name: getattr(args, each.name) for each in fields(TrainingArgs)})
    numbers.check()
    _check_numbers(args)
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise IFPError("--q-bits, --q-group-size and --q-mode need -q.")
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
        again = ", or name another --mlx-path for what comes now" if args.resume else ""
        raise IFPError(
            f"{result} already exists. Delete it{again or ' or name another --mlx-path'}."
        )
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
        task_texts=task_texts if args.select_by == "task" else None,
    )
    path.mkdir(parents=True, exist_ok=True)
    if first:
        held.enter_context(_lock(path))
        save_config(dict(vars(args)), path / CONFIG_NAME)
    try:
        # Only the first rank reports.
        services = args.report_to if first else None
        callback = get_reporting_callbacks(services, args.project_name, str(path), vars(args))
    except (ImportError, ValueError) as error:
        raise IFPError(f"--report-to {args.report_to}: {' '.join(str(error).split())}") from error
    train, valid = _splits(args, teacher, examples, path, first)

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
        rounding,
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
        mask=[ifp.mask.operator, ifp.mask.temperature, ifp.mask.keep_soft_values],
        mask_temperature_start=args.mask_temperature_start,
        text=asdict(ifp.text),
        dtype=args.dtype,
        quantize=[args.q_bits, args.q_group_size, args.q_mode] if args.quantize else None,
        **({"teacher": teacher.digest} if args.teacher else {}),
    )
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
    with _told_how_to_go_on(path):
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


def _lock(path: Path) -> IO[str]:
    """A run belongs to one process, until this file is closed."""
    file = open(path / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise IFPError(f"{path} is in use by another process; name another --run-path.") from error
    return file


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
            raise IFPError(
                f"{path}: {error.strerror or error}; make room, then {go_on}."
            ) from error
        if last:
            print(f"[INFO] {go_on}.", file=sys.stderr)
        raise


def _check_numbers(args: types.SimpleNamespace) -> None:
    for name, least in (("warm_start_iters", 0), ("warm_start_examples", 1), ("head_width", 1),
                        ("num_layers", -1)):  # fmt: skip
        if getattr(args, name) < least:
            raise IFPError(
                f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}."
            )


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


def _spread(n: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, wanted).astype(int)).tolist()


def _splits(
    args: types.SimpleNamespace,
    teacher: Source,
    examples: dict[str, list],
    path: Path,
    first: bool,
) -> tuple[Split, Split | None]:
    """Training and validation data with the dense model's targets; the first rank makes files."""
    targets = Path(args.targets_path) if args.targets_path else path / "targets"
    # The same arrays: training gives the student new ones.
    dense = share(teacher.llm)
    valid = examples["valid"]
    if args.val_batches >= 0:
        valid = (
            [valid[i] for i in _spread(len(valid), args.val_batches * args.batch_size)]
            if valid and args.val_batches
            else []
        )

    def split(part: list) -> Split:
        return Split(part, DenseTargets(targets, dense, teacher.ffns, part, teacher.digest))

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
