"""Turn the options of ``mlx_ifp.train`` into models, data and the student to train."""

import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checkpoint.config import IFPConfig, MaskConfig, TextConfig
from ...checkpoint.precision import Precision, quantize_config
from ...errors import IFPError
from ...llm.modules import share
from ...selection.keep import DEFAULT_KEEP, resolve_one_keep
from ...tuner.batches import spread
from ...tuner.dense_targets import DenseTargets, Split
from ...tuner.elastic_k import KeepRange
from ...tuner.predictor_start import (
    HEAD_WIDTH,
    PredictorStart,
    from_checkpoint,
    from_layers,
    from_model,
)
from ...tuner.quantization_aware import Rounding
from ...tuner.source import Source, load_source
from ...tuner.student import Student, choose_trainable
from ...tuner.trainer import identity_of
from ...tuner.training_args import TrainingArgs
from ...tuner.warm_start import mean_importance


def is_first() -> bool:
    """Whether this is the one of several processes that reports and writes."""
    return mx.distributed.init().rank() == 0


def load_teacher(args: types.SimpleNamespace, source: Source, dtype: mx.Dtype | None) -> Source:
    """Load the model that ``--teacher`` names; its shape must be that of the model to train."""
    teacher = load_source(args.teacher, dtype, args.trust_remote_code, frozen=True)
    shapes = [
        (
            # The shape is known without running the model.
            each.llm(mx.zeros((1, 1), mx.int32)).shape[-1],
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


def predictor_start(args: types.SimpleNamespace, source: Source, dtype: Any) -> PredictorStart:
    """The predictor to train: a pretrained model, the source's own, or the LLM's first layers."""
    width = HEAD_WIDTH if args.head_width is None else args.head_width
    if args.predictor_model is not None:
        if args.predictor_layers is not None:
            raise IFPError("--predictor-model and --predictor-layers exclude each other.")
        return from_model(args.predictor_model, source, dtype, width, args.trust_remote_code)
    if has_predictor(args, source):
        if args.head_width is not None:
            raise IFPError(
                f"{args.model} has a predictor; --head-width is for a new one: name "
                "--predictor-layers or --predictor-model, too."
            )
        return from_checkpoint(source, dtype, args.trust_remote_code)
    layers = args.predictor_layers
    layers = min(4, len(source.ffns)) if layers is None else layers
    return from_layers(source, layers, width, dtype)


def has_predictor(args: types.SimpleNamespace, source: Source) -> bool:
    """Whether training continues with the predictor that the source already has."""
    checkpoint = source.checkpoint
    # A head that reads the LLM has no backbone of its own to go on with.
    own = checkpoint is not None and bool(checkpoint.head) and not checkpoint.reads_own_state
    return own and args.predictor_model is None and args.predictor_layers is None


def keep_range_of(args: types.SimpleNamespace, source: Source) -> KeepRange | None:
    """The range that k is drawn from in training, or None if k is always the same."""
    if args.keep_range is None:
        return None
    return KeepRange.of(args.keep_range, source.ffns[0].d_ffn, len(source.ffns))


def ifp_config(args: types.SimpleNamespace, source: Source) -> IFPConfig:
    """Make the checkpoint's config, which still lacks its predictor."""
    trained = source.checkpoint.ifp if source.checkpoint is not None else None
    keep_range = keep_range_of(args, source)
    keep = args.keep
    if keep is None:
        keep = keep_range.middle if keep_range else (trained.k if trained else DEFAULT_KEEP)
    k = resolve_one_keep(keep, source.ffns[0].d_ffn, len(source.ffns))
    if keep_range is not None and k not in keep_range:
        raise IFPError(
            f"--keep is {k} channels, outside of --keep-range, {keep_range.low} to "
            f"{keep_range.high}; the checkpoint's k must be one that is trained."
        )
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


def rounding_of(args: types.SimpleNamespace, source: Source) -> Rounding | None:
    """Plan to round what ``mlx_ifp.convert`` would quantize with the same options."""
    if not args.quantize:
        return None
    precision = Precision(None, True, args.q_bits, args.q_group_size, args.q_mode)
    precision.check()
    _, plan, notes = quantize_config(source.config, source.ffns, precision)
    for note in notes:
        print(note, file=sys.stderr)
    # The plan may name an output layer that mlx-lm drops because the embedding is tied.
    modules = dict(source.llm.named_modules())
    plan = {module: how for module, how in plan.items() if module in modules}
    return Rounding(plan, source.ffns, source.dtype)


def splits_of(
    args: types.SimpleNamespace,
    teacher: Source,
    examples: dict[str, list],
    path: Path,
) -> tuple[Split, Split | None, Split | None]:
    """Load training, validation and test data with dense targets; only rank 0 makes files."""
    targets = Path(args.targets_path) if args.targets_path else path / "targets"
    # The arrays may be shared, because training gives the student new ones.
    dense = share(teacher.llm)

    def some(part: list, batches: int) -> list:
        if batches < 0:
            return part
        return [part[i] for i in spread(len(part), batches * args.batch_size)]

    def split(part: list) -> Split:
        return Split(part, DenseTargets(targets, dense, teacher.ffns, part, teacher.digest))

    def splits() -> tuple[Split, Split | None, Split | None]:
        valid = some(examples["valid"], args.val_batches)
        test = some(examples["test"], args.test_batches)
        return (
            split(examples["train"]),
            split(valid) if valid else None,
            split(test) if test else None,
        )

    made = splits() if is_first() else None
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return splits() if made is None else made


def student_of(
    args: types.SimpleNamespace,
    source: Source,
    start: PredictorStart | None,
    ifp: IFPConfig,
    train: Split,
    rounding: Rounding | None,
) -> Student:
    """Join LLM and predictor in one tree, and freeze what is not to be trained."""
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


def identity_of_run(
    args: types.SimpleNamespace,
    numbers: TrainingArgs,
    ifp: IFPConfig,
    source: Source,
    teacher: Source,
    train: Split,
) -> dict[str, Any]:
    """The settings that must not differ between a run's first session and a resumed one."""
    keep_range = keep_range_of(args, source)
    return identity_of(
        source.digest,
        train.examples,
        numbers,
        stage=args.stage,
        k=ifp.k,
        keep_range=[keep_range.low, keep_range.high] if keep_range else None,
        select_by=args.select_by,
        fine_tune_type=args.fine_tune_type,
        mask=[ifp.mask.operator, ifp.mask.temperature, ifp.mask.keep_soft_values],
        mask_temperature_start=args.mask_temperature_start,
        text=asdict(ifp.text),
        dtype=args.dtype,
        quantize=[args.q_bits, args.q_group_size, args.q_mode] if args.quantize else None,
        lora_parameters=args.lora_parameters if args.fine_tune_type == "lora" else None,
        teacher=teacher.digest,
    )
