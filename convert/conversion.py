"""Convert a source of any kind to a checkpoint directory: plan it first, then write it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config
from tqdm import tqdm

from mlx_ifp.checkpoint.directory import (
    ORDER_FILE,
    PREDICTOR,
    open_checkpoint,
    write_checkpoint,
)
from mlx_ifp.checkpoint.hub import upload_checkpoint
from mlx_ifp.checkpoint.locate import TOKENIZER_PATTERNS, expanded, source_name
from mlx_ifp.checkpoint.precision import Precisions
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.errors import IFPError, one_line
from mlx_ifp.files.atomic import new_directory, without_path
from mlx_ifp.selection.by_layer import check_by_layer
from mlx_ifp.selection.keep import per_layer

from .calibrate import calibrate as order_channels
from .dense import load_dense
from .layouts import CHECKPOINT, TRAINED, detect_layout
from .layouts.parts import Given
from .layouts.split import is_split
from .plan import Plan, plan_dense
from .prior import PROMPTS, SECONDS, TooSlow, add_prior
from .prompts import add_static_scores, read_prompts
from .report import REPORT_FILE, print_dry_run, print_missing, print_report, report_of
from .requantize import plan_requantized
from .request import ConversionRequest
from .sources.files import PICKLES
from .trained import plan_trained

# Options for a predictor with a backbone of its own, whose head may be quantized, too.
_OF_A_BACKBONE = (
    *("predictor_config", "predictor_tokenizer"),
    *("predictor_q_bits", "predictor_q_group_size", "head_q_bits"),
)

# This much is left for the tokenizer, the configs and the file system's own needs.
SPARE_BYTES = 64 << 20

# These are a model's own files, and those that the layouts and our checkpoints add to them.
HUB_PATTERNS = [
    *TOKENIZER_PATTERNS,
    *("*.py", "model*.safetensors", "llama/*", "predictor*", "extractor.*", "mask_head.*"),
    *("channels*.safetensors", "static*.safetensors", ORDER_FILE),
]

# Many repositories also have their weights under other names or as pickles. These files are
# downloaded only if the patterns above find no weights.
OTHER_WEIGHTS = ["*.safetensors", *(f"*{suffix}" for suffix in PICKLES), "*.distcp", ".metadata"]
# These are copies of the weights in other programs' formats.
NOT_OURS = ["original/*", "onnx/*", "openvino/*", "coreml/*"]


def convert(model: str, mlx_path: str | Path = "mlx_model", **options: Any) -> Path:
    """Make a checkpoint from a dense model, from one trained with PyTorch, or from a checkpoint.

    Args:
        model (str): a file, a directory or a hub id.
        mlx_path: the checkpoint to make; it must not exist.
        options: the other fields of :class:`~mlx_ifp.convert.request.ConversionRequest`.

    Returns:
        Path: the checkpoint.

    Raises:
        IFPError: if the conversion fails; the message is one line, and nothing is left behind.
    """
    return carry_out(ConversionRequest(model, Path(mlx_path), **options))


def carry_out(request: ConversionRequest) -> Path:
    """Make the checkpoint that is asked for.

    If the source is a checkpoint of mlx_ifp, only its precision and k can change. Tensors stream
    through memory, and the largest ones are read in parts.

    Returns:
        Path: the checkpoint.

    Raises:
        IFPError: if the conversion fails; the message is one line, and nothing is left behind.
    """
    path = request.mlx_path
    static, calibration = (
        None if file is None else read_prompts(Path(file))
        for file in (request.static_prompts, request.calibrate)
    )
    precisions = request.precisions()
    if request.prior and static is not None:
        raise IFPError("--prior and --static-prompts exclude each other: both make static scores.")
    if request.dry_run:
        if path.exists():
            raise IFPError(f"{path} already exists. Delete it or name another path.")
        print_dry_run(_plan(request, precisions, None), path)
        return path
    with new_directory(path) as directory, without_path(directory, f"{request.model}"):
        plan = _plan(request, precisions, directory)
        _set_by_layer(request, plan)
        report = report_of(plan)
        _write(plan, directory, path)
        # Static prompts are used only with a dense model, which always has a tokenizer.
        if static is not None and plan.tokenizer is not None:
            add_static_scores(directory, plan.ifp, plan.tokenizer, static)
        if request.prior is not False and request.prior != 0:
            _add_prior(request, plan, directory)
        if calibration is not None:
            order_channels(directory, _tokenizer(request, plan, directory), calibration)
        # A checkpoint's own report is copied, because it tells where its tensors are from.
        if not (directory / REPORT_FILE).exists():
            (directory / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        open_checkpoint(directory)
    for note in plan.notes:
        print(f"[INFO] {note}", file=sys.stderr)
    print_report(report)
    if request.upload_repo is not None:
        base_model = None if Path(request.model).exists() else request.model
        upload_checkpoint(path, request.upload_repo, base_model=base_model)
    return path


def _set_by_layer(request: ConversionRequest, plan: Plan) -> None:
    """Raises IFPError if k cannot differ by layer, but shall."""
    if request.keep_by_layer is not None:
        plan.ifp.keep_by_layer = request.keep_by_layer
    if plan.ifp.keep_by_layer:
        check_by_layer(per_layer(plan.ifp.k, plan.layers), plan.d_ffn)


def _tokenizer(request: ConversionRequest, plan: Plan, directory: Path) -> TokenizerWrapper:
    options = {"trust_remote_code": request.trust_remote_code}
    return plan.tokenizer or load_tokenizer_of(open_checkpoint(directory), options)


def _add_prior(request: ConversionRequest, plan: Plan, directory: Path) -> None:
    """Add a prior; one that nobody asked for may fail, and the user is told why."""
    if request.prior is not None:
        count = PROMPTS if request.prior is True else request.prior
        try:
            note = add_prior(directory, _tokenizer(request, plan, directory), count)
        except IFPError as error:
            raise IFPError(f"No prior can be made: {error}") from error
        plan.notes.append(note)
        return
    tokenizer = plan.tokenizer
    wanted = plan.layout == "dense" and request.static_prompts is None
    if not wanted or tokenizer is None or not tokenizer.has_chat_template:
        return
    try:
        plan.notes.append(add_prior(directory, tokenizer, PROMPTS, SECONDS))
    except TooSlow as error:
        plan.notes.append(
            f"There is no prior, which would let the selector glass choose better channels: "
            f"{error} To make it all the same: mlx_ifp.convert --model {request.mlx_path} "
            f"--mlx-path {request.mlx_path}-prior --prior"
        )
    except IFPError as error:
        plan.notes.append(f"There is no prior for the selector glass: {error}")


def _plan(request: ConversionRequest, precisions: Precisions, scratch: Path | None) -> Plan:
    """Plan the conversion of any source; ``scratch`` is a directory for temporary files."""
    path = _find(request.model, request.revision)
    kind = request.layout or detect_layout(path)
    if kind == CHECKPOINT:
        return _plan_checkpoint(request, precisions, path)
    if request.quantize_weights and request.dequantize_weights:
        raise IFPError("-d is not allowed with -q, but for a checkpoint of mlx_ifp.")
    if kind == "dense":
        return _plan_dense(request, precisions, path, scratch)
    return _plan_trained(request, precisions, path, kind)


def _plan_checkpoint(request: ConversionRequest, precisions: Precisions, path: Path) -> Plan:
    named = replace(request.given, keep=None) != Given()
    if named or request.text_format or request.static_prompts is not None:
        raise IFPError(
            f"{request.model} is a checkpoint of mlx_ifp already: only its precision, k and "
            "the order of its channels can be changed."
        )
    plan = plan_requantized(path, request.keep, precisions, request.dequantize_weights)
    if plan.ifp.predictor_backbone == "llm":
        _refuse(request, "predictor_dtype", *_OF_A_BACKBONE, why="and is copied as it is")
    return plan


def _plan_dense(
    request: ConversionRequest, precisions: Precisions, path: Path, scratch: Path | None
) -> Plan:
    if request.llm_config or request.for_predictor:
        raise IFPError(
            f"{request.model} is a dense model: it has no predictor, and its own config."
        )
    dense = load_dense(
        request.model,
        path,
        dequantize=request.dequantize_weights,
        tokenizer=request.tokenizer,
        trust_remote_code=request.trust_remote_code,
        scratch=scratch,
    )
    dense.source = _source(request) | dense.source
    return plan_dense(dense, request.keep, precisions.llm, request.text_format)


def _plan_trained(
    request: ConversionRequest, precisions: Precisions, path: Path, layout: str
) -> Plan:
    if request.dequantize_weights:
        raise IFPError("-d is for dense models; the layouts have no quantized weights.")
    trained = TRAINED[layout](path, request.given)
    if request.dry_run and trained.missing:
        print_missing(trained)
    if trained.predictor is None and request.for_predictor:
        raise IFPError(f"{request.model} is a static run: it has no predictor.")
    if trained.predictor is not None and trained.predictor.reads_own_state:
        _refuse(request, *_OF_A_BACKBONE, why="in floats, without a backbone or tokenizer")
    return plan_trained(
        trained, _source(request), precisions, request.text_format, request.trust_remote_code
    )


def _refuse(request: ConversionRequest, *options: str, why: str) -> None:
    """Raises IFPError if an option is given that a head on the LLM's own state has no use for."""
    for name in options:
        if getattr(request, name):
            raise IFPError(
                f"The predictor of {request.model} is a head that reads the LLM's own state, "
                f"{why}; leave out --{name.replace('_', '-')}."
            )


def _source(request: ConversionRequest) -> dict[str, Any]:
    """What is recorded about the source; a local one has no revision, whatever was asked for."""
    source = {"model": source_name(request.model)}
    if request.revision is not None and not expanded(request.model).exists():
        source["revision"] = request.revision
    return source


def _find(model: str, revision: str | None) -> Path:
    path = expanded(model)
    if path.exists():
        return path
    with one_line(f"{model} cannot be loaded"):
        path = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
        if not any(path.glob("model*.safetensors")) and not is_split(path):
            path = Path(
                snapshot_download(
                    model,
                    revision=revision,
                    allow_patterns=[*HUB_PATTERNS, *OTHER_WEIGHTS],
                    ignore_patterns=NOT_OURS,
                )
            )
    return path


def _write(plan: Plan, directory: Path, mlx_path: Path) -> None:
    """Write everything but the report; the plan's tensors are used up."""
    _check_space(mlx_path, plan.nbytes)
    if plan.tokenizer is not None:
        plan.tokenizer.save_pretrained(str(directory))
    _copy(plan.extra_files, directory)
    if plan.predictor_config is not None:
        (directory / PREDICTOR).mkdir()
        save_config(dict(plan.predictor_config), directory / PREDICTOR / "config.json")
        if plan.predictor_tokenizer is not None:
            plan.predictor_tokenizer.save_pretrained(str(directory / PREDICTOR))
        _copy(plan.predictor_files, directory / PREDICTOR)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="Converting") as bar:
        write_checkpoint(directory, plan.config, plan.ifp, plan.tensors, bar.update)


def _copy(files: list[Path], directory: Path) -> None:
    """Copy files and whole directories, but no hidden files inside of them."""
    for file in files:
        if file.is_dir():
            hidden = shutil.ignore_patterns(".*")
            shutil.copytree(
                file, directory / file.name, ignore=hidden, ignore_dangling_symlinks=True
            )
        else:
            shutil.copy(file, directory)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE_BYTES:
        raise IFPError(
            f"{path} needs {(needed + SPARE_BYTES) / 1e6:,.0f} MB, but its disk has only "
            f"{free / 1e6:,.0f} MB free. Free some space or name another --mlx-path."
        )
