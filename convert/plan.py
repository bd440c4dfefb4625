"""What a conversion will write, known before anything is read or written."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.checkpoint.config import IFPConfig, TextConfig, text_limit
from mlx_ifp.checkpoint.directory import HEAD_STEM, PREDICTOR_STEM
from mlx_ifp.checkpoint.precision import Precision, quantize_config, quantize_head
from mlx_ifp.errors import IFPError
from mlx_ifp.llm.ffn import FFN
from mlx_ifp.llm.modules import find_body, get_module
from mlx_ifp.selection.keep import resolve_keep

from .dense import DenseModel, dtype_of
from .layouts.parts import TrainedModel
from .naming import NamedModel, name_tensors
from .shared import leave_out_embedding, same_tokens, shared_embedding
from .sources.tokenizer import open_tokenizer
from .streams import Tensors, split_model

DEFAULT_KEEP = 0.5


@dataclass
class Plan:
    """A conversion that is ready to run.

    Attributes:
        layout: of the source.
        config, predictor_config: mlx-lm's; the second is None without a predictor.
        ifp: what ``ifp_config.json`` will say.
        tensors: file stem -> name -> tensor.
        bytes_in: of the source tensors.
        layers, d_ffn: of the LLM.
        tokenizer, predictor_tokenizer: to be saved.
        extra_files, predictor_files: to be copied as they are.
        sources: groups of source tensors -> name -> its name in mlx-lm.
        skipped: the same groups -> name -> why it is not used.
        notes: what the user should know.
    """

    layout: str
    config: dict[str, Any]
    predictor_config: dict[str, Any] | None
    ifp: IFPConfig
    tensors: dict[str, Tensors]
    bytes_in: int
    layers: int
    d_ffn: int
    tokenizer: TokenizerWrapper | None
    predictor_tokenizer: TokenizerWrapper | None = None
    extra_files: list[Path] = field(default_factory=list)
    predictor_files: list[Path] = field(default_factory=list)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


def plan_dense(dense: DenseModel, keep: Any, precision: Precision, text_format: str | None) -> Plan:
    """A dense model's conversion: no predictor, any k.

    Floats are stored in the type that the config names, as ``mlx_lm.convert`` does.

    Raises:
        IFPError: if k or the precision does not fit the model.
    """
    d_ffn = dense.ffns[0].d_ffn
    k = resolve_keep(DEFAULT_KEEP if keep is None else keep, d_ffn, len(dense.ffns))
    dtype = precision.dtype or dtype_of(dense.config)
    bytes_in = sum(tensor.nbytes for tensor in dense.tensors.values())
    precision.check()
    config, how, notes = quantize_config(dense.config, dense.ffns, precision)
    trunk, channels = _split(dense, dense.ffns, how, dtype)
    if text_format is None:
        text_format = "chat_template" if dense.tokenizer.has_chat_template else "raw"
    ifp = IFPConfig(k=k, text=_text(dense.config, text_format), source=with_versions(dense.source))
    return Plan(
        layout="dense",
        config=config,
        predictor_config=None,
        ifp=ifp,
        tensors={"model": trunk, "channels": channels},
        bytes_in=bytes_in,
        layers=len(dense.ffns),
        d_ffn=d_ffn,
        tokenizer=dense.tokenizer,
        extra_files=dense.extra_files,
        sources={"LLM": dense.mapped},
        skipped={"LLM": dense.skipped},
        notes=dense.notes + notes,
    )


def plan_trained(
    trained: TrainedModel,
    source: dict[str, Any],
    precision: Precision,
    predictor_precision: Precision,
    head_precision: Precision,
    text_format: str | None,
    trust_remote_code: bool,
) -> Plan:
    """A trained checkpoint's conversion.

    Raises:
        IFPError: if something is missing, or LLM, predictor, head and k do not fit together.
    """
    if trained.missing:
        raise IFPError(
            f"The layout {trained.layout!r} has not all that is needed; name "
            f"{', '.join(trained.missing)}."
        )
    precision.check()
    predictor_precision.check()
    llm = name_tensors(trained.llm_config, trained.llm, "the LLM")
    backbone = name_tensors(
        trained.backbone_config, trained.backbone, "the predictor's backbone", body_only=True
    )
    ffns = llm.ffns
    layers, d_ffn = len(ffns), ffns[0].d_ffn
    _check_fit(trained, layers, d_ffn, backbone)
    tokenizer = open_tokenizer(trained.tokenizer, trust_remote_code)
    predictor_tokenizer = open_tokenizer(trained.predictor_tokenizer, trust_remote_code)
    config, how, notes = quantize_config(llm.config, ffns, precision)
    predictor_config, predictor_how, _ = quantize_config(backbone.config, [], predictor_precision)
    embedding = "own"
    if precision.dtype == predictor_precision.dtype and same_tokens(tokenizer, predictor_tokenizer):
        paths = shared_embedding(llm, backbone)
        # An embedding that is to be stored in another precision is another one.
        if paths is not None and how.get(paths[0]) == predictor_how.get(paths[1]):
            leave_out_embedding(backbone, paths[1])
            embedding, predictor_tokenizer = "llm", None
            notes.append("The predictor uses the LLM's embedding and tokenizer: they are the same.")
    trunk, channels = _split(llm, ffns, how, precision.dtype)
    body, _ = _split(backbone, [], predictor_how, predictor_precision.dtype)
    head = {name: tensor.lazy() for name, tensor in trained.head.items()}
    predictor_config, head_how, head_notes = quantize_head(
        predictor_config, trained.head_config().widths, head_precision
    )
    head, _ = split_model(backbone.network, head, [], head_how, head_precision.dtype)
    ifp = IFPConfig(
        k=resolve_keep(trained.keep, d_ffn, layers),
        selector="predictor",
        mask=trained.mask,
        text=_text(backbone.config, text_format or "raw"),
        head=trained.head_config(),
        predictor_embedding=embedding,
        source=with_versions(source | {"layout": trained.layout}),
    )
    return Plan(
        layout=trained.layout,
        config=config,
        predictor_config=predictor_config,
        ifp=ifp,
        tensors={
            "model": trunk,
            "channels": channels,
            PREDICTOR_STEM: body,
            HEAD_STEM: head,
        },
        bytes_in=sum(
            tensor.nbytes
            for tensors in (trained.llm, trained.backbone, trained.head)
            for tensor in tensors.values()
        ),
        layers=layers,
        d_ffn=d_ffn,
        tokenizer=tokenizer,
        predictor_tokenizer=predictor_tokenizer,
        extra_files=trained.extra_files,
        sources={
            "LLM": llm.mapped,
            "backbone": backbone.mapped,
            "head": {tensor.name: name for name, tensor in trained.head.items()},
        },
        skipped={"LLM": llm.skipped, "backbone": backbone.skipped, "others": trained.others},
        notes=trained.notes + llm.notes + backbone.notes + notes + head_notes,
    )


def _check_fit(trained: TrainedModel, layers: int, d_ffn: int, backbone: NamedModel) -> None:
    for name, said, found in (
        ("layers", trained.layers, layers),
        ("FFN channels a layer", trained.d_ffn, d_ffn),
    ):
        if said is not None and said != found:
            raise IFPError(
                f"The predictor was trained for {said} {name}, but the LLM has {found}; "
                "they are not of one checkpoint."
            )
    widths = trained.head_config().widths
    last = trained.head["linear2.weight"]
    if widths[-1] != layers * d_ffn:
        raise IFPError(
            f"{last.path}: {last.name} gives {widths[-1]} scores, but {layers} layers of {d_ffn} "
            f"channels need {layers * d_ffn}."
        )
    first = trained.head["linear1.weight"]
    body = get_module(backbone.network, find_body(backbone.network))
    embedding = next(m for _, m in body.named_modules() if isinstance(m, nn.Embedding))
    if widths[0] != embedding.weight.shape[-1]:
        raise IFPError(
            f"{first.path}: {first.name} takes {widths[0]} values, but the backbone gives "
            f"{embedding.weight.shape[-1]}."
        )


def _split(
    model: DenseModel | NamedModel, ffns: list[FFN], how: dict[str, Any], dtype: str | None
) -> tuple[Tensors, Tensors]:
    """Trunk and channels of a model, which lets go of its tensors."""
    trunk, channels = split_model(model.network, dict(model.tensors), ffns, how, dtype)
    model.tensors.clear()
    return trunk, channels


def _text(config: dict[str, Any], text_format: str) -> TextConfig:
    return TextConfig(format=text_format, max_tokens=text_limit(config))


def with_versions(source: dict[str, Any]) -> dict[str, Any]:
    """A source as ``ifp_config.json`` has it: with the versions that converted it."""
    return source | {"mlx_ifp": version("mlx_ifp"), "mlx_lm": version("mlx_lm")}
