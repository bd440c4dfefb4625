"""Convert a checkpoint of mlx_ifp to another precision or another k."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import CHAT_TEMPLATE_DIR

from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.checkpoint.directory import (
    CHANNELS,
    HEAD_STEM,
    ORDER_FILE,
    PREDICTOR,
    PREDICTOR_STEM,
    STATIC_FILE,
    TRUNK,
    Checkpoint,
    open_checkpoint,
)
from mlx_ifp.checkpoint.expected import head_quantization, quantized_modules
from mlx_ifp.checkpoint.locate import TOKENIZER_PATTERNS
from mlx_ifp.checkpoint.precision import (
    Precision,
    Precisions,
    name_head_modules,
    quantize_config,
    quantize_head,
)
from mlx_ifp.checkpoint.rows import stored_modules
from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import DTYPES, TensorInfo
from mlx_ifp.llm.build import build_model, quantization_of
from mlx_ifp.selection.keep import compact, resolve_keep

from .layouts import CHECKPOINT
from .plan import Plan, with_versions
from .sources.tensor import SourceTensor, file_rows
from .streams import Tensors, dequantized, split_model

# These files are written anew, so they are not copied.
_NOT_COPIED = ("config.json", CONFIG_FILE)
_COPIED = (*TOKENIZER_PATTERNS, "*.py")


def plan_requantized(
    path: Path,
    keep: Any,
    precisions: Precisions,
    dequantize: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint: everything is kept but its precision and k.

    Args:
        path (Path): the checkpoint.
        keep: k, as :func:`~mlx_ifp.selection.keep.resolve_keep` takes it; None keeps the
            checkpoint's.
        precisions (Precisions): what is asked for; tensors for which nothing is stay as they are.
        dequantize (bool): undo the quantization of LLM, backbone and head first.

    Raises:
        IFPError: if a part that is to be quantized is quantized already, or k does not fit.
    """
    checkpoint = open_checkpoint(path)
    ifp, layers = checkpoint.ifp, len(checkpoint.ffns)
    k = ifp.k if keep is None else compact(resolve_keep(keep, checkpoint.d_ffn, layers))
    config, tensors, notes = _llm(checkpoint, precisions.llm, dequantize)
    predictor_config, predictor_files = None, []
    infos = [checkpoint.trunk, checkpoint.channels, checkpoint.static, checkpoint.order]
    if checkpoint.reads_own_state:
        if precisions.head.quantize:
            raise IFPError(
                f"The head of {path} reads the LLM's own state and stays in floats; leave out "
                "--head-q-bits."
            )
        # What it reads changes as little as the LLM does.
        tensors[HEAD_STEM] = _lazy(checkpoint.head)
        infos.append(checkpoint.head)
    elif ifp.head is not None:
        predictor_config, predictor, more = _predictor(
            checkpoint, precisions.predictor, precisions.head, dequantize
        )
        tensors |= predictor
        notes += more
        infos += [checkpoint.predictor, checkpoint.head]
        predictor_files = _files(path / PREDICTOR)
    elif precisions.head.quantize:
        raise IFPError(f"{path} has no predictor, so no head for --head-q-bits.")
    if checkpoint.order:
        # Rows stay where they are, because each row is quantized by itself.
        tensors[Path(ORDER_FILE).stem] = _lazy(checkpoint.order)
    if checkpoint.static:
        tensors[Path(STATIC_FILE).stem] = _lazy(checkpoint.static)
    return Plan(
        layout=CHECKPOINT,
        config=config,
        predictor_config=predictor_config,
        ifp=replace(ifp, k=k, files={}, source=with_versions(ifp.source)),
        tensors=tensors,
        bytes_in=sum(info.nbytes for group in infos for info in group.values()),
        layers=layers,
        d_ffn=checkpoint.d_ffn,
        tokenizer=None,
        extra_files=_files(path),
        predictor_files=predictor_files,
        notes=notes,
    )


def _llm(
    checkpoint: Checkpoint, precision: Precision, dequantize: bool
) -> tuple[dict[str, Any], dict[str, Tensors], list[str]]:
    old, ffns = checkpoint.config, checkpoint.ffns
    _check(checkpoint, "LLM", checkpoint.trunk | checkpoint.channels, precision, dequantize)
    config, how, notes = quantize_config(_config(old, precision, dequantize), ffns, precision)
    modules = stored_modules(ffns)

    def how_of(module: str) -> dict[str, Any]:
        return quantization_of(old, modules.get(module, module))

    network = build_model(_config(old, precision, True))
    channel_how = {name: how[module] for name, module in modules.items() if module in how}
    tensors = {}
    for stem, infos, plan in (
        (TRUNK, checkpoint.trunk, how),
        (CHANNELS, checkpoint.channels, channel_how),
    ):
        stored = _stored(infos, how_of, dequantize)
        # Down projections are stored as rows already, so channels are treated as other tensors.
        tensors[stem], _ = split_model(network, stored, [], plan, precision.dtype)
    return config, tensors, notes


def _predictor(
    checkpoint: Checkpoint, precision: Precision, head_precision: Precision, dequantize: bool
) -> tuple[dict[str, Any], dict[str, Tensors], list[str]]:
    old, head = checkpoint.predictor_config, checkpoint.head
    assert old is not None and checkpoint.ifp.head is not None  # it has a predictor
    _check(checkpoint, "predictor", checkpoint.predictor, precision, dequantize)
    _check(checkpoint, "predictor's head", head, head_precision, dequantize)
    config = old
    if precision.quantize or dequantize:
        config, how, notes = quantize_config(_config(old, precision, dequantize), [], precision)
        if not dequantize:
            kept = {name: head_quantization(old, name) for name in quantized_modules(head)}
            config = name_head_modules(config, kept)
    else:
        how, notes = {}, []
    config, head_how, head_notes = quantize_head(config, checkpoint.ifp.head.widths, head_precision)
    network = build_model(_config(old, precision, True))
    backbone = _stored(checkpoint.predictor, lambda name: quantization_of(old, name), dequantize)
    backbone, _ = split_model(network, backbone, [], how, precision.dtype)
    arrays = _stored(head, lambda name: head_quantization(old, name), dequantize)
    arrays, _ = split_model(network, arrays, [], head_how, head_precision.dtype)
    return config, {PREDICTOR_STEM: backbone, HEAD_STEM: arrays}, notes + head_notes


def _check(
    checkpoint: Checkpoint,
    part: str,
    tensors: dict[str, TensorInfo],
    precision: Precision,
    dequantize: bool,
) -> None:
    precision.check()
    if not precision.quantize or dequantize or not quantized_modules(tensors):
        return
    keep = {
        "LLM": "leave out -q",
        "predictor": "give --predictor-q-bits 0 to keep it",
        "predictor's head": "leave out --head-q-bits",
    }
    raise IFPError(
        f"The {part} of {checkpoint.path} is quantized already; {keep[part]}, or add --dequantize "
        "to quantize everything anew."
    )


def _config(config: dict[str, Any], precision: Precision, dequantize: bool) -> dict[str, Any]:
    """Return the config without a quantization that is undone or about to be replaced."""
    if not (precision.quantize or dequantize):
        return config
    names = ("quantization", "quantization_config")
    return {name: value for name, value in config.items() if name not in names}


def _lazy(infos: dict[str, TensorInfo]) -> Tensors:
    """Tensors as they are stored; their data are not read yet."""
    return {
        name: SourceTensor(
            info.path,
            name,
            info.dtype,
            info.shape,
            file_rows(info.path, info.offset, info.shape, DTYPES[info.dtype].size),
        ).lazy()
        for name, info in infos.items()
    }


def _stored(
    infos: dict[str, TensorInfo], how_of: Callable[[str], dict[str, Any]], dequantize: bool
) -> Tensors:
    """Tensors as they are stored, or with each quantized weight as floats."""
    tensors = _lazy(infos)
    modules: Iterable[str] = quantized_modules(infos) if dequantize else ()
    for module in modules:
        parts = {
            part: tensors.pop(f"{module}.{part}")
            for part in ("weight", "scales", "biases")
            if f"{module}.{part}" in tensors
        }
        tensors[f"{module}.weight"] = dequantized(parts, how_of(module))
    return tensors


def _files(directory: Path) -> list[Path]:
    """List the files to copy: tokenizer, generation config and the report on the source.

    Hidden files are not copied, and neither are indexes of weights: they would list files that the
    new checkpoint does not have.
    """
    found = {file for pattern in _COPIED for file in directory.glob(pattern) if file.is_file()}
    copied = [
        file
        for file in sorted(found)
        if file.name not in _NOT_COPIED
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
    ]
    # A tokenizer with several templates keeps all but the first of them in a directory.
    templates = directory / CHAT_TEMPLATE_DIR
    return [*copied, templates] if templates.is_dir() else copied
