"""Give tensors mlx-lm's names through its own ``sanitize``, and account for every one of them."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import DTYPES, LazyTensor
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import FFN, find_ffns
from mlx_ifp.llm.hf_config import buildable, mlx_config
from mlx_ifp.llm.modules import find_body
from mlx_ifp.llm.support import check_support
from mlx_ifp.llm.trial import check_runs

from .sources.tensor import SourceTensor
from .streams import same_values
from .wrappers import TRAINING_STATE, state_dicts

_REASONS = (
    ("rotary_emb", "rotary frequencies, which mlx-lm computes"),
    ("inv_freq", "rotary frequencies, which mlx-lm computes"),
    ("vis", "not part of the text model"),
    ("multi_modal", "not part of the text model"),
    ("audio", "not part of the text model"),
    ("image", "not part of the text model"),
    ("mtp.", "multi-token prediction, which is not used"),
)


@dataclass
class NamedModel:
    """An mlx-lm model and where each of its tensors comes from.

    Attributes:
        network: mlx-lm's model of the config; its own arrays stay unevaluated.
        config: the config that mlx-lm builds it from.
        tensors: mlx-lm's names -> where to read them.
        mapped: the source's names -> mlx-lm's.
        skipped: the source's names -> why they are not used.
        notes: what mlx-lm's model does in another way than transformers'.
    """

    network: nn.Module
    config: dict[str, Any]
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ffns(self) -> list[FFN]:
        """Its FFNs."""
        return find_ffns(self.network)


def name_tensors(
    config: dict[str, Any], sources: dict[str, SourceTensor], where: str, *, body_only: bool = False
) -> NamedModel:
    """Give a Hugging Face model's tensors the names they have in mlx-lm.

    mlx-lm's ``sanitize`` is run on placeholders first. A tensor that comes out as it went in is
    only renamed and can be streamed. The others (transposed, merged, shifted by one) are run
    through ``sanitize`` a second time, with their values.

    Args:
        config: the model's config.
        sources: its tensors by PyTorch's names, which may lack ``model.`` if there is only a body.
        where: names the model in messages.
        body_only: only the final hidden states are wanted, not the output layer.

    Raises:
        IFPError: if mlx-lm has no such architecture; if a tensor is missing, left over, or of
            another shape or type than the config says.
    """
    config = buildable(mlx_config(config))
    network = build_model(config)
    notes = check_support(network, config)
    if not body_only:
        find_ffns(network)
    check_runs(network, body_only=body_only)
    prefixes = [""]
    if body_only:
        prefixes += list(dict.fromkeys(("model.", f"{find_body(network)}.")))
    problems = []
    for around, inner in state_dicts(sources):
        for prefix in prefixes:
            named = {f"{prefix}{name}": tensor for name, tensor in inner.items()}
            try:
                model = _name(config, named, prefix, where, body_only)
            except IFPError as error:
                problems.append(error)
                continue
            model.notes = notes
            used = {f"{around}{name}" for name in inner}
            model.skipped |= {name: TRAINING_STATE for name in sources if name not in used}
            return model
    # The names fit one prefix at most, and the message about that prefix tells the most.
    raise min(problems, key=lambda error: getattr(error, "missing", 0))


class _TensorError(IFPError):
    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


def _name(
    config: dict[str, Any],
    sources: dict[str, SourceTensor],
    prefix: str,
    where: str,
    body_only: bool,
) -> NamedModel:
    network = build_model(config)
    placeholders = {
        name: mx.zeros(tensor.shape, DTYPES.get(tensor.dtype, mx.uint8))
        for name, tensor in sources.items()
    }
    sanitized = _sanitize(network, placeholders, where)
    names = {id(array): name for name, array in placeholders.items()}
    model = NamedModel(network, config)
    expected = dict(tree_flatten(network.parameters()))
    if body_only:
        body = f"{find_body(network)}."
        expected = {name: array for name, array in expected.items() if name.startswith(body)}
    made = {name: array for name, array in sanitized.items() if id(array) not in names}
    used = _used_by(made.values(), placeholders)
    renamed = {names[id(array)]: name for name, array in sanitized.items() if name not in made}
    for name in sources:
        plain = name.removeprefix(prefix)
        target = renamed.get(name)
        if target is None and name not in used:
            model.skipped[plain] = _reason(name, config)
        elif body_only and target is not None and target not in expected:
            model.skipped[plain] = "not used: only the hidden states of the backbone are"
        else:
            model.mapped[plain] = target or "merged or changed by mlx-lm"
    _check(model, sanitized, expected, sources, where, body_only)
    if made:
        made = _with_values(config, sources, placeholders, used, made, where)
    for name in expected:
        if name in made:
            model.tensors[name] = LazyTensor.of(made[name])
        else:
            model.tensors[name] = sources[names[id(sanitized[name])]].lazy()
    return model


def _sanitize(network: nn.Module, arrays: dict[str, mx.array], where: str) -> dict[str, mx.array]:
    if not hasattr(network, "sanitize"):
        return arrays
    try:
        return network.sanitize(dict(arrays))
    except Exception as error:
        raise _TensorError(
            f"{where}: these are not the tensors of a {network.model_type!r} model "
            f"({type(error).__name__}: {error}).",
            len(arrays),
        ) from error


def _used_by(outputs: Iterable[mx.array], placeholders: dict[str, mx.array]) -> set[str]:
    """The placeholders that unevaluated outputs are computed from."""
    outputs = list(outputs)
    if not outputs:
        return set()
    labels = {f"source{i}": name for i, name in enumerate(placeholders)}
    graph = io.StringIO()
    mx.export_to_dot(graph, outputs, **{k: placeholders[name] for k, name in labels.items()})
    edges = graph.getvalue()
    return {name for label, name in labels.items() if f'"{label}" -> ' in edges}


def _reason(name: str, config: dict[str, Any]) -> str:
    if name.endswith("lm_head.weight"):
        return "tied to the token embedding"
    for part, reason in _REASONS:
        if part in name:
            return reason
    return f"mlx-lm's {config['model_type']} has no use for it"


def _check(
    model: NamedModel,
    sanitized: dict[str, mx.array],
    expected: dict[str, mx.array],
    sources: dict[str, SourceTensor],
    where: str,
    body_only: bool,
) -> None:
    missing = [name for name in expected if name not in sanitized]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; if it is tied to the embedding, set tie_word_embeddings in the config"
        elif len(missing) == len(expected):
            some = ", ".join(sorted(model.mapped | model.skipped)[:3])
            hint = f"; the names are others, such as {some}"
        raise _TensorError(f"{where}: the tensor {missing[0]} is missing{hint}.", len(missing))
    for name, array in expected.items():
        if sanitized[name].shape != array.shape:
            raise IFPError(
                f"{where}: {name} has the shape {tuple(sanitized[name].shape)}, but the config "
                f"asks for {tuple(array.shape)}."
            )
    whole = dict(tree_flatten(model.network.parameters()))
    for name in sanitized:
        unused = body_only and name.endswith("lm_head.weight")
        if name not in whole and not unused:
            raise IFPError(
                f"{where}: the tensor {name} is left over; a {model.config['model_type']!r} model "
                "with this config has no such tensor."
            )
    for name, why in model.skipped.items():
        if why.startswith("tied") and not body_only:
            _check_tied(name, sources, where)


def _check_tied(name: str, sources: dict[str, SourceTensor], where: str) -> None:
    """Refuse tied weights that differ: the config would make one replace the other."""
    head = next(tensor for key, tensor in sources.items() if key.endswith(name))
    embeddings = [t for key, t in sources.items() if key.endswith("embed_tokens.weight")]
    if not embeddings or not same_values(head.lazy(), embeddings[0].lazy()):
        raise IFPError(
            f"{where}: the config says that {name} is tied to the token embedding, but they "
            "differ. Set tie_word_embeddings to false in the config."
        )


def _with_values(
    config: dict[str, Any],
    sources: dict[str, SourceTensor],
    placeholders: dict[str, mx.array],
    used: set[str],
    made: dict[str, mx.array],
    where: str,
) -> dict[str, mx.array]:
    """Let ``sanitize`` compute arrays from the values of the tensors that it needs."""
    arrays = {
        name: sources[name].array() if name in used else placeholder
        for name, placeholder in placeholders.items()
    }
    again = _sanitize(build_model(config), arrays, where)
    return {name: again[name] for name in made}
