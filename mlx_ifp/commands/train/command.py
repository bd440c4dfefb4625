"""``mlx_ifp.train``: a dense model becomes a checkpoint whose prompts select well."""

import argparse
import contextlib
import errno
import fcntl
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.utils import save_config

from ...checkpoint.config import text_limit
from ...errors import IFPError
from ...tuner.data import load_examples
from ...tuner.dense_targets import Split
from ...tuner.predictor_start import PredictorStart
from ...tuner.run_log import RunLog
from ...tuner.save import save_student
from ...tuner.source import Source, load_source
from ...tuner.student import Student
from ...tuner.trainer import Trainer
from ...tuner.training_args import TrainingArgs, check_least
from ...tuner.training_state import latest_checkpoint
from ...tuner.warm_start import fit_predictor
from .given import options_of
from .options import OPTIONS
from .setup import (
    has_predictor,
    identity_of_run,
    ifp_config,
    is_first,
    keep_range_of,
    load_teacher,
    predictor_start,
    rounding_of,
    splits_of,
    student_of,
)

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


def train(args: types.SimpleNamespace) -> Path:
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
    teacher = source if args.teacher is None else load_teacher(args, source, dtype)
    rounding = rounding_of(args, source)
    ifp = ifp_config(args, source)
    start = None if args.select_by == "static" else predictor_start(args, source, dtype)
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
        splits=("train", "valid", "test") if args.test else ("train", "valid"),
    )
    if args.test and not examples["test"]:
        raise IFPError(f"{args.data} has no test set to evaluate on, which --test asks for.")
    if not examples["valid"] and args.val_batches:
        print("[WARNING] There is no validation set; training goes on without.", file=sys.stderr)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path), _told_how_to_go_on(path):
        callback = _callback(args, path)
        train, valid, test = splits_of(args, teacher, examples, path)
        student = student_of(args, source, start, ifp, train, rounding)
        identity = identity_of_run(args, numbers, ifp, source, teacher, train)
        trainer = Trainer(student, numbers, path, train, valid, args.select_by, identity, callback,
                          keep_range_of(args, source))  # fmt: skip
        if checkpoint is not None:  # and so --resume was given
            trainer.resume(checkpoint)
        if is_first():
            # The options are saved only now: until here they may not have fitted the run to resume.
            save_config(dict(vars(args)), path / CONFIG_NAME)
        new = start is not None and not args.resume and not has_predictor(args, source)
        if new and args.warm_start_iters:
            _warm_start(args, student, train, trainer.log)
        del teacher
        _let_teacher_go(numbers, train, valid, test)
        if args.resume and trainer.step >= numbers.iters:
            print(f"Nothing is left to train: the run is at iteration {trainer.step}.")
        trainer.train()
        if is_first():
            _save(args, trainer, source, start, result)
        if test is not None:
            trainer.test(test)
    return result


def _check(args: types.SimpleNamespace) -> tuple[TrainingArgs, dict[str, str] | None]:
    """Check the options before anything is loaded; give the numbers and the tasks' descriptions."""
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise IFPError(f"Name --{name}.")
    numbers = TrainingArgs(**{each.name: getattr(args, each.name) for each in fields(TrainingArgs)})
    check_least(OPTIONS.values(), vars(args))
    if args.num_layers == 0:
        raise IFPError("--num-layers must be above 0, or -1 for all.")
    numbers.check()
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise IFPError("--q-bits, --q-group-size and --q-mode need -q.")
    if (args.select_by == "task") != (args.tasks is not None):
        raise IFPError("--select-by task and --tasks, a YAML file of descriptions, go together.")
    if args.select_by == "static" and (args.hard_mask or args.mask_operator != "sigmoid"):
        raise IFPError("A static mask is hard: --mask-operator and --hard-mask are for the others.")
    for name in ("contrastive_weight", "predictor_model"):
        if args.select_by == "static" and getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise IFPError(f"A static mask has no predictor: {option} is for the others.")
    if args.distill_on != "all" and not args.distill_weight:
        raise IFPError("--distill-on needs --distill-weight.")
    return numbers, _task_texts(args.tasks)


def _places(args: types.SimpleNamespace) -> tuple[Path, Path, Path | None]:
    """Give the run's directory, the checkpoint to make, and the run's checkpoint to go on from."""
    path = Path(args.run_path)
    result = Path(args.mlx_path) if args.mlx_path else path / "ifp"
    checkpoint = latest_checkpoint(path)
    if args.resume and checkpoint is None:
        raise IFPError(f"{path} has no checkpoint to resume from.")
    if not args.resume and checkpoint is not None:
        raise IFPError(f"{path} holds a run already: use --resume, or another --run-path.")
    above = next(parent for parent in result.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise IFPError(f"{result} cannot be written: no files can be made in {above}.")
    if result.exists():
        what = "what comes now" if args.resume else "the new one"
        raise IFPError(
            f"{result} already exists. Delete it, or name another --mlx-path for {what}."
        )
    return path, result, checkpoint


def _callback(args: types.SimpleNamespace, path: Path) -> TrainingCallback | None:
    """Make mlx-lm's callback for reports, if one is asked for and this is the first process."""
    if not is_first():
        return None
    try:
        return get_reporting_callbacks(
            args.report_to,
            args.project_name,
            str(path),
            vars(args),  # type: ignore[arg-type]  # mlx-lm's hint says str, its code takes options.
        )
    except (ImportError, ValueError) as error:
        raise IFPError(f"--report-to {args.report_to}: {' '.join(str(error).split())}") from error


def _let_teacher_go(
    numbers: TrainingArgs, train: Split, valid: Split | None, test: Split | None
) -> None:
    """Free the memory of the dense model as soon as nothing needs it any more."""
    if not numbers.distill_weight:
        train.targets.forget_model()
    if test is not None and is_first():
        test.targets.compute_all(numbers.batch_size)
    for split in (valid, test):
        # Only the first process evaluates, so the others need no dense model for this.
        if split is not None and not is_first():
            split.targets.forget_model()


def _save(
    args: types.SimpleNamespace,
    trainer: Trainer,
    source: Source,
    start: PredictorStart | None,
    result: Path,
) -> None:
    training = {
        "tokens": trainer.trained_tokens,
        "iters": trainer.step,
        "stage": args.stage,
        "select_by": args.select_by,
    }
    if trainer.keep_range is not None:
        training["keep_range"] = [trainer.keep_range.low, trainer.keep_range.high]
    try:
        save_student(
            trainer.student,
            source,
            result,
            dtype=source.dtype,
            predictor_config=start.config if start else None,
            predictor_tokenizer=start.tokenizer if start else None,
            training=training,
        )
    except IFPError as error:
        raise IFPError(f"{error} Name another --mlx-path and use --resume.") from error
    print(f"Saved the checkpoint to {result}.")
    if args.quantize:
        print(
            "[INFO] Training only saw rounded weights, so the model must be rounded before use: "
            "run mlx_ifp.convert with the same -q options."
        )
    if args.select_by == "task":
        print("[INFO] It was trained to select by descriptions of tasks: give it --task.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a run: it belongs to one process and those that were launched with it."""
    if not is_first():
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
    """Tell users who stop a run, or whose disk is full at its end, how to go on with it."""
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


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.train``."""
    train(options_of(vars(args)))
