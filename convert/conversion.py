"""A source of any kind -> a checkpoint directory, planned first, then written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
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
from mlx_ifp.checkpoint.precision import Precision, Precisions
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.errors import IFPError, one_line
from mlx_ifp.files.atomic import new_directory
from mlx_ifp.selection.keep import Keep

from .calibrate import calibrate as order_channels
from .dense import load_dense
from .layouts import CHECKPOINT, TRAINED, detect_layout
from .layouts.parts import Given
from .plan import Plan, plan_dense
from .prompts import add_static_scores, read_prompts
from .report import REPORT_FILE, print_dry_run, print_missing, print_report, report_of
from .requantize import plan_requantized
from .sources.files import PICKLES
from .trained import plan_trained

# Tokenizer, configs and the file system's own needs.
SPARE_BYTES = 64 << 20

# A model's own files, and what the layouts and our checkpoints have beside them.
HUB_PATTERNS = [
    *TOKENIZER_PATTERNS,
    *("*.py", "model*.safetensors", "llama/*", "predictor*", "extractor.*", "mask_head.*"),
    *("*.pt", "*.pth", "*.distcp", ".metadata", "channels*.safetensors"),
    *("static*.safetensors", ORDER_FILE),
]

# A repository may have its weights as safetensors and as pickles: the latter only if need be.
WEIGHTS = (".safetensors", *PICKLES, ".distcp")


def convert(
    model: str,
    mlx_path: str | Path = "mlx_model",
    *,
    keep: Keep | None = None,
    quantize_weights: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dequantize_weights: bool = False,
    dtype: str | None = None,
    predictor_dtype: str | None = None,
    predictor_q_bits: int | None = None,
    predictor_q_group_size: int | None = None,
    head_q_bits: int | None = None,
    layout: str | None = None,
    llm_config: str | None = None,
    predictor_config: str | None = None,
    tokenizer: str | None = None,
    predictor_tokenizer: str | None = None,
    text_format: str | None = None,
    static_prompts: str | Path | None = None,
    calibrate: str | Path | None = None,
    upload_repo: str | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make a checkpoint from a dense model, from one trained with PyTorch, or from a checkpoint.

    A checkpoint stays what it is but for its precision and k. Tensors stream through memory, the
    largest ones in parts.

    Args:
        model (str): a file, a directory or a hub id: a model of Hugging Face or mlx-lm, a GGUF
            file of the llama architecture, a trained checkpoint of a known layout, or a
            checkpoint of mlx_ifp.
        mlx_path: the checkpoint to make; it must not exist.
        keep: k, a count, a fraction (float) or a list of L counts; None for what the layout
            says, or half of the channels of a dense model.
        quantize_weights, q_bits, q_group_size, q_mode, quant_predicate, dequantize_weights,
            dtype: as in ``mlx_lm.convert``. A trained checkpoint and one of mlx_ifp keep their
            types unless ``dtype`` is given; one of mlx_ifp may be dequantized and quantized anew.
        predictor_dtype, predictor_q_bits, predictor_q_group_size: the same for the predictor, if
            it is to differ; ``predictor_q_bits=0`` leaves it unquantized.
        head_q_bits (int): quantize the predictor's head, in the predictor's groups; None does not.
        layout (str): ``split``, ``module``, ``manifest`` or ``dense``; None finds out.
        llm_config, predictor_config: a ``config.json``, or a directory or hub id that has one.
        tokenizer, predictor_tokenizer (str): where to take them from, if not from the model.
        text_format (str): how the text that selects is tokenized, ``raw`` or ``chat_template``;
            by default raw with a predictor, otherwise the latter if the tokenizer has one.
        static_prompts: a text or jsonl file of prompts; their mean ``activations`` scores become
            the scores of the ``static`` selector.
        calibrate: a text or jsonl file of prompts; the channels that the checkpoint's selector
            selects together for them are stored side by side.
        upload_repo (str): a hub repository to upload the checkpoint to.
        dry_run (bool): print what would be done, and write nothing.
        revision (str): of a hub repository.
        trust_remote_code (bool): let the tokenizer run code of its repository.

    Returns:
        Path: the checkpoint.

    Raises:
        IFPError: one line; nothing is left behind.
    """
    mlx_path = Path(mlx_path)
    prompts = read_prompts(Path(static_prompts)) if static_prompts is not None else None
    calibration = read_prompts(Path(calibrate)) if calibrate is not None else None
    precision = Precision(dtype, quantize_weights, q_bits, q_group_size, q_mode, quant_predicate)
    precisions = Precisions.of(
        precision, predictor_dtype, predictor_q_bits, predictor_q_group_size, head_q_bits
    )
    given = Given(llm_config, predictor_config, tokenizer, predictor_tokenizer, keep)

    def make_plan(scratch: Path | None) -> Plan:
        path = _find(model, revision)
        source = {"model": source_name(model)}
        if revision is not None:
            source["revision"] = revision
        kind = layout or detect_layout(path)
        if kind == CHECKPOINT:
            if replace(given, keep=None) != Given() or text_format or prompts:
                raise IFPError(
                    f"{model} is a checkpoint of mlx_ifp already: only its precision, k and "
                    "the order of its channels can be changed."
                )
            return plan_requantized(path, keep, precisions, dequantize_weights)
        if quantize_weights and dequantize_weights:
            raise IFPError("-d is not allowed with -q, but for a checkpoint of mlx_ifp.")
        if kind == "dense" and (
            llm_config or predictor_config or predictor_tokenizer or head_q_bits
        ):
            raise IFPError(f"{model} is a dense model: it has no predictor, and its own config.")
        if kind != "dense" and dequantize_weights:
            raise IFPError("-d is for dense models; the layouts have no quantized weights.")
        if kind == "dense":
            dense = load_dense(
                model,
                path,
                dequantize=dequantize_weights,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
                scratch=scratch,
            )
            dense.source = source | dense.source
            return plan_dense(dense, keep, precision, text_format)
        trained = TRAINED[kind](path, given)
        if dry_run and trained.missing:
            print_missing(trained)
        if trained.predictor is None and (predictor_config or predictor_tokenizer or head_q_bits):
            raise IFPError(f"{model} is a static run: it has no predictor.")
        return plan_trained(trained, source, precisions, text_format, trust_remote_code)

    if dry_run:
        if mlx_path.exists():
            raise IFPError(f"{mlx_path} already exists. Delete it or name another path.")
        print_dry_run(make_plan(None), mlx_path)
        return mlx_path
    with new_directory(mlx_path) as directory:
        plan = make_plan(directory)
        report = report_of(plan)
        _write(plan, directory, mlx_path)
        if prompts is not None:
            add_static_scores(directory, plan.ifp, plan.tokenizer, prompts)
        if calibration is not None:
            options = {"trust_remote_code": trust_remote_code}
            own_tokenizer = plan.tokenizer or load_tokenizer_of(open_checkpoint(directory), options)
            order_channels(directory, own_tokenizer, calibration)
        # A checkpoint brings its own: its source is that of the tensors.
        if not (directory / REPORT_FILE).exists():
            (directory / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        open_checkpoint(directory)
    for note in plan.notes:
        print(f"[INFO] {note}", file=sys.stderr)
    print_report(report)
    if upload_repo is not None:
        upload_checkpoint(mlx_path, upload_repo, base_model=None if Path(model).exists() else model)
    return mlx_path


def _find(model: str, revision: str | None) -> Path:
    path = expanded(model)
    if path.exists():
        return path
    with one_line(f"{model} cannot be loaded"):
        path = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
        if not any(file.suffix in WEIGHTS for file in path.rglob("*")):
            patterns = [*HUB_PATTERNS, *(f"*{suffix}" for suffix in WEIGHTS)]
            path = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    return path


def _write(plan: Plan, directory: Path, mlx_path: Path) -> None:
    """Everything but the report; the plan's tensors are used up."""
    _check_space(mlx_path, plan.nbytes)
    if plan.tokenizer is not None:
        plan.tokenizer.save_pretrained(str(directory))
    for file in plan.extra_files:
        shutil.copy(file, directory)
    if plan.predictor_config is not None:
        (directory / PREDICTOR).mkdir()
        save_config(dict(plan.predictor_config), directory / PREDICTOR / "config.json")
        if plan.predictor_tokenizer is not None:
            plan.predictor_tokenizer.save_pretrained(str(directory / PREDICTOR))
        for file in plan.predictor_files:
            shutil.copy(file, directory / PREDICTOR)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="Converting") as bar:
        write_checkpoint(directory, plan.config, plan.ifp, plan.tensors, bar.update)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE_BYTES:
        raise IFPError(
            f"{path} needs {(needed + SPARE_BYTES) / 1e6:,.0f} MB, but its disk has only "
            f"{free / 1e6:,.0f} MB free. Free some space or name another --mlx-path."
        )
