"""Plan the conversion of a trained checkpoint."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ifp.checkpoint.config import IFPConfig
from mlx_ifp.checkpoint.directory import (
    CHANNELS,
    HEAD_STEM,
    PREDICTOR_STEM,
    STATIC_FILE,
    TRUNK,
    token_rows,
)
from mlx_ifp.checkpoint.precision import Precisions, quantize_config, quantize_head
from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import LazyTensor
from mlx_ifp.llm.modules import find_body, get_module
from mlx_ifp.selection.keep import compact, resolve_keep

from .layouts.parts import TrainedModel, TrainedPredictor
from .naming import NamedModel, name_tensors
from .plan import Plan, format_of, note_tokens, split_tensors, text_of, with_versions
from .shared import leave_out_embedding, same_tokens, shared_embedding
from .sources.tensor import SourceTensor
from .sources.tokenizer import open_tokenizer
from .streams import split_model


def plan_trained(
    trained: TrainedModel,
    source: dict[str, Any],
    precisions: Precisions,
    text_format: str | None,
    trust_remote_code: bool,
) -> Plan:
    """Plan a trained checkpoint's conversion.

    Raises:
        IFPError: if something is missing, or LLM, predictor, head and k do not fit together.
    """
    if trained.missing:
        raise IFPError(
            f"The layout {trained.layout!r} has not all that is needed; name "
            f"{', '.join(trained.missing)}."
        )
    # The code above has refused a checkpoint that lacks one of them.
    assert trained.llm_config is not None and trained.tokenizer is not None
    llm = name_tensors(trained.llm_config, trained.llm, "the LLM")
    ffns = llm.ffns
    layers, d_ffn = len(ffns), ffns[0].d_ffn
    _check_shape(trained, layers, d_ffn)
    config, how, notes = quantize_config(llm.config, ffns, precisions.llm)
    tokenizer = open_tokenizer(trained.tokenizer, trust_remote_code)
    notes += note_tokens(tokenizer, token_rows(llm.network), "the LLM's tokenizer")
    ifp = IFPConfig(
        k=compact(resolve_keep(trained.keep, d_ffn, layers)),
        selector="static",
        mask=trained.mask,
        text=text_of(llm.config, text_format or format_of(tokenizer)),
        source=with_versions(source | {"layout": trained.layout}),
    )
    plan = Plan(
        layout=trained.layout,
        config=config,
        predictor_config=None,
        ifp=ifp,
        tensors={},
        bytes_in=sum(tensor.nbytes for tensor in trained.sources),
        layers=layers,
        d_ffn=d_ffn,
        tokenizer=tokenizer,
        extra_files=trained.extra_files,
        sources={"LLM": llm.mapped},
        skipped={"LLM": llm.skipped, "others": trained.others},
        notes=trained.notes + llm.notes + notes,
    )
    if trained.predictor is not None:
        if trained.predictor.reads_own_state:
            _add_own_state_head(plan, trained.predictor, llm, precisions)
        else:
            _add_predictor(plan, trained.predictor, llm, how, precisions, trust_remote_code)
        plan.ifp.text.format = text_format or trained.predictor.text_format
        _check_template(plan, trained)
    elif trained.static is not None:
        plan.tensors[Path(STATIC_FILE).stem] = {"scores": _scores(trained.static, layers, d_ffn)}
        plan.sources["static"] = {trained.static.name: "scores"}
    if trained.prefill != ifp.prefill_with(ifp.selector):
        ifp.prefill = trained.prefill
    trunk, channels = split_tensors(llm, ffns, how, precisions.llm.dtype)
    plan.tensors = {TRUNK: trunk, CHANNELS: channels} | plan.tensors
    return plan


def _add_predictor(
    plan: Plan,
    predictor: TrainedPredictor,
    llm: NamedModel,
    llm_how: dict[str, dict[str, Any]],
    precisions: Precisions,
    trust_remote_code: bool,
) -> None:
    """Add to the plan of an LLM the predictor that selects its channels."""
    # plan_trained has refused a checkpoint that lacks one of them.
    assert predictor.config is not None and predictor.tokenizer is not None
    assert predictor.backbone is not None  # as plan_trained has seen
    backbone = name_tensors(
        predictor.config, predictor.backbone, "the predictor's backbone", body_only=True
    )
    head = predictor.head_config()
    _check_head(predictor, head.widths, plan, _hidden_size(backbone), "backbone")
    config, how, _ = quantize_config(backbone.config, [], precisions.predictor)
    own = open_tokenizer(predictor.tokenizer, trust_remote_code)
    plan.predictor_tokenizer = own
    plan.notes += note_tokens(own, token_rows(backbone.network), "the predictor's tokenizer")
    if plan.tokenizer is not None and same_tokens(plan.tokenizer, own):
        paths = shared_embedding(llm, backbone)
        # Embeddings that will be stored in different precisions cannot be shared.
        alike = precisions.llm.dtype == precisions.predictor.dtype
        if paths is not None and alike and llm_how.get(paths[0]) == how.get(paths[1]):
            leave_out_embedding(backbone, paths[1])
            plan.ifp.predictor_embedding, plan.predictor_tokenizer = "llm", None
            plan.notes.append(
                "The predictor uses the LLM's embedding and tokenizer: its own are the same."
            )
    body, _ = split_tensors(backbone, [], how, precisions.predictor.dtype)
    plan.predictor_config, head_how, head_notes = quantize_head(
        config, head.widths, precisions.head
    )
    linears = {name: tensor.lazy() for name, tensor in predictor.head.items()}
    linears, _ = split_model(backbone.network, linears, [], head_how, precisions.head.dtype)
    plan.ifp.selector, plan.ifp.head = "predictor", head
    plan.ifp.text = text_of(backbone.config, "raw")
    plan.tensors |= {PREDICTOR_STEM: body, HEAD_STEM: linears}
    plan.sources |= {"backbone": backbone.mapped, "head": _mapped(predictor)}
    plan.skipped["backbone"] = backbone.skipped
    plan.notes += backbone.notes + head_notes


def _add_own_state_head(
    plan: Plan, predictor: TrainedPredictor, llm: NamedModel, precisions: Precisions
) -> None:
    """Add to the plan of an LLM a head that reads the LLM's own hidden state, in floats."""
    head = predictor.head_config()
    _check_head(predictor, head.widths, plan, llm.ffns[0].hidden_size, "LLM")
    linears = {name: tensor.lazy() for name, tensor in predictor.head.items()}
    linears, _ = split_model(llm.network, linears, [], {}, precisions.head.dtype)
    # The head alone selects: what the prompt's own channels do had no part in its training.
    plan.ifp.selector, plan.ifp.head, plan.ifp.blend = "predictor", head, 0.0
    plan.ifp.predictor_backbone = "llm"
    plan.tensors |= {HEAD_STEM: linears}
    plan.sources |= {"head": _mapped(predictor)}


def _mapped(predictor: TrainedPredictor) -> dict[str, str]:
    """The head's tensors by the source's names -> ours."""
    return {tensor.name: name for name, tensor in predictor.head.items()}


def _check_template(plan: Plan, trained: TrainedModel) -> None:
    """Raises IFPError if the LLM's tokenizer reads the text that selects, and cannot wrap it."""
    wraps = plan.ifp.predictor_backbone == "llm" and plan.ifp.text.format == "chat_template"
    if wraps and plan.tokenizer is not None and not plan.tokenizer.has_chat_template:
        raise IFPError(
            f"{trained.tokenizer} has no chat template, which wraps the prompts that the head "
            "reads; name a --tokenizer that has one."
        )


def _scores(static: SourceTensor, layers: int, d_ffn: int) -> LazyTensor:
    """Return the scores of a static run; they must have the LLM's shape."""
    if static.shape != (layers, d_ffn) or static.dtype != "F32":
        raise IFPError(
            f"{static.path}: {static.name} is {static.dtype} {static.shape}, but {layers} layers "
            f"of {d_ffn} channels need F32 {(layers, d_ffn)}."
        )
    return static.lazy()


def _check_shape(trained: TrainedModel, layers: int, d_ffn: int) -> None:
    for name, said, found in (
        ("layers", trained.layers, layers),
        ("FFN channels a layer", trained.d_ffn, d_ffn),
    ):
        if said is not None and said != found:
            raise IFPError(
                f"The predictor was trained for {said} {name}, but the LLM has {found}; "
                "they are not of one checkpoint."
            )


def _hidden_size(backbone: NamedModel) -> int:
    """The width of a backbone's hidden states."""
    body = get_module(backbone.network, find_body(backbone.network))
    embedding = next(m for _, m in body.named_modules() if isinstance(m, nn.Embedding))
    return embedding.weight.shape[-1]


def _check_head(
    predictor: TrainedPredictor, widths: list[int], plan: Plan, hidden_size: int, whose: str
) -> None:
    """Raises IFPError if a head does not take these hidden states, or score all channels."""
    first, last = predictor.head["linear1.weight"], predictor.head["linear2.weight"]
    scores = plan.layers * plan.d_ffn
    if widths[-1] != scores:
        raise IFPError(
            f"{last.path}: {last.name} gives {widths[-1]} scores, but {plan.layers} layers of "
            f"{plan.d_ffn} channels need {scores}."
        )
    if widths[0] != hidden_size:
        raise IFPError(
            f"{first.path}: {first.name} takes {widths[0]} values, but the {whose} gives "
            f"{hidden_size}."
        )
