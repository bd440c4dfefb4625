"""The layout "manifest": an LLM's directory with ``predictor.safetensors`` beside it.

A directory of this layout holds the LLM as transformers saves it, with its tokenizer, and:

- ``predictor.safetensors``: the backbone's tensors as ``extractor.*``, by the names of its body
  (``extractor.embed_tokens.weight``), and the head: ``mlp.0.weight`` [P, D], ``mlp.0.bias`` [P] and
  ``mlp.2.weight`` [L * d_ffn, P]. A LayerNorm without parameters stands before the head. An
  embedding that equals the LLM's bit for bit is converted with the LLM's, if both tokenizers are
  equal, too.
- ``predictor_tokenizer/``: the predictor's tokenizer. There is neither this nor ``extractor.*`` if
  the head reads the LLM's own hidden state, the final one of the prompt's last token.
- ``static.safetensors``, in place of the two: ``scores`` float32 [L, d_ffn], the same for every
  text. Such a run converts to the selector ``static``.
- ``ifpruning_config.json``: an object with these fields:

  - ``num_layers``, ``full_intermediate_dim``, ``target_intermediate_dim``: L, d_ffn and k;
  - ``predictor_backbone`` (optional, ``own``): ``llm`` if the head reads the LLM's own state;
  - ``chat_template_format`` (optional, ``chat``): ``chat`` if such a head was trained on prompts
    that the chat template wraps, ``raw`` if not. With a backbone of its own it is ignored;
  - ``prefill`` (optional): who read the prompts in training, ``dense`` for the LLM with all of its
    channels or ``pruned``, as ``prefill`` in ``ifp_config.json``;
  - ``predictor_hidden_dim`` (optional): P;
  - ``predictor_model`` (optional): where the backbone's ``config.json`` is: a file or a directory,
    relative to the checkpoint or absolute, or a hub id. Without it the user names one;
  - ``head_activation`` (optional, ``leaky_relu``): the activation between the head's two Linears,
    as ``head.activation`` in ``ifp_config.json``;
  - ``mask_operator`` (optional, ``sigmoid``) and ``mask_temperature`` (optional, 1.0): SoftTopK
    and its epsilon, as ``mask`` in ``ifp_config.json``;
  - ``keep_soft_values`` (optional, false): whether inference multiplies each kept channel by its
    soft value. If not, the mask was trained soft and is used hard, which selects the same channels;
  - ``quantization`` (optional): an object with ``bits``, ``group_size`` and ``bits_of`` (part of a
    weight's name -> its bits), if training saw rounded weights. The user is told;
  - ``static_scores`` (optional): true for a static run with ``static.safetensors``, or the name of
    another file that holds ``scores``.

Other fields are ignored.
"""

from pathlib import Path
from typing import Any

from mlx_ifp.checkpoint.config import ACTIVATIONS, BACKBONES, MaskConfig
from mlx_ifp.checkpoint.directory import STATIC_FILE
from mlx_ifp.choices import PREFILLS
from mlx_ifp.errors import IFPError

from ..sources.files import below, open_tensors, read_json
from ..sources.tensor import SourceTensor
from .parts import (
    Given,
    TrainedModel,
    TrainedPredictor,
    generation_config,
    has_tokenizer,
    read_config,
    take_head,
)

MANIFEST = "ifpruning_config.json"
_PREDICTOR = "predictor.safetensors"
_HEAD = {
    "mlp.0.weight": "linear1.weight",
    "mlp.0.bias": "linear1.bias",
    "mlp.2.weight": "linear2.weight",
}
_EXTRACTOR = "extractor."
# What a manifest says of a text that selects -> what ifp_config.json says.
_TEXT_FORMATS = {"chat": "chat_template", "raw": "raw"}
_FIELDS = ("num_layers", "full_intermediate_dim", "target_intermediate_dim")


def is_manifest(path: Path) -> bool:
    """Whether a directory looks like one of this layout."""
    return (path / MANIFEST).is_file() or (path / _PREDICTOR).is_file()


def open_manifest(path: Path, given: Given) -> TrainedModel:
    """Open a checkpoint of this layout.

    Raises:
        IFPError: if a field or tensor is wrong; the message names it and its file.
    """
    manifest = read_json(path / MANIFEST)
    for name in _FIELDS:
        if not isinstance(manifest.get(name), int):
            raise IFPError(f"{path / MANIFEST}: {name} must be a number.")
    mask = _mask(manifest, path)
    prefill = manifest.get("prefill")
    if prefill is not None:
        _one_of(path, "prefill", prefill, PREFILLS)
    static = manifest.get("static_scores")
    return TrainedModel(
        layout="manifest",
        llm=open_tensors(path),
        llm_config=read_config(given.llm_config or str(path)),
        predictor=None if static else _predictor(given, manifest, path),
        static=_static(static, path) if static else None,
        prefill=prefill,
        mask=mask,
        keep=given.keep if given.keep is not None else manifest["target_intermediate_dim"],
        layers=manifest["num_layers"],
        d_ffn=manifest["full_intermediate_dim"],
        tokenizer=given.tokenizer or (str(path) if has_tokenizer(path) else None),
        extra_files=generation_config(path),
        notes=_rounding(manifest, path),
    )


def _rounding(manifest: dict[str, Any], path: Path) -> list[str]:
    """What the user should know of a run that saw rounded weights: its floats mean little."""
    how = manifest.get("quantization")
    if how is None:
        return []
    parts = how.get("bits_of", {}) if isinstance(how, dict) else None
    if not isinstance(parts, dict) or not all(
        isinstance(n, int) for n in (how.get("bits"), how.get("group_size"), *parts.values())
    ):
        raise IFPError(
            f"{path / MANIFEST}: quantization must have bits and group_size, and may have bits_of."
        )
    note = (
        f"Training saw the LLM's weights in {how['bits']} bits in groups of {how['group_size']}. "
        f"Only -q --q-bits {how['bits']} --q-group-size {how['group_size']} gives the weights that "
        "were trained."
    )
    if parts:
        named = ", ".join(f"{name} in {bits}" for name, bits in parts.items())
        note += f" Some had other bits ({named}), which no option gives."
    return [note]


def _mask(manifest: dict[str, Any], path: Path) -> MaskConfig:
    temperature = manifest.get("mask_temperature", 1.0)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < 1e6:
        raise IFPError(f"{path / MANIFEST}: mask_temperature must be above 0.")
    keep = manifest.get("keep_soft_values", False)
    mask = MaskConfig(manifest.get("mask_operator", "sigmoid"), float(temperature), keep)
    try:
        mask.check()
    except ValueError as error:
        raise IFPError(f"{path / MANIFEST}: {error}.") from error
    return mask


def _predictor(given: Given, manifest: dict[str, Any], path: Path) -> TrainedPredictor:
    activation = manifest.get("head_activation", "leaky_relu")
    _one_of(path, "head_activation", activation, ACTIVATIONS)
    backbone = manifest.get("predictor_backbone", "own")
    _one_of(path, "predictor_backbone", backbone, BACKBONES)
    tensors = open_tensors(path / _PREDICTOR)
    extractor = [name for name in tensors if name.startswith(_EXTRACTOR)]
    if extractor and backbone == "llm":
        raise IFPError(
            f"{path / _PREDICTOR}: {extractor[0]} is a tensor of a backbone, but "
            f"predictor_backbone in {MANIFEST} is 'llm', which has no other; only one of them can "
            "be right."
        )
    if not extractor and backbone == "own":
        raise IFPError(
            f"{path / _PREDICTOR}: the backbone's tensors {_EXTRACTOR}* are missing; if the head "
            f"reads the LLM's own state, {MANIFEST} must have the predictor_backbone 'llm'."
        )
    head = {name: t for name, t in tensors.items() if name not in extractor}
    head = take_head(head, _HEAD, str(path / _PREDICTOR))
    width = (*head["linear1.weight"].shape, 0)[0]
    said = manifest.get("predictor_hidden_dim", width)
    if said != width:
        raise IFPError(
            f"{path / MANIFEST}: predictor_hidden_dim is {said}, but mlp.0.weight gives "
            f"{width} values."
        )
    if backbone == "llm":
        text = manifest.get("chat_template_format", "chat")
        _one_of(path, "chat_template_format", text, tuple(_TEXT_FORMATS))
        return TrainedPredictor(
            backbone=None,
            config=None,
            head=head,
            activation=activation,
            feature_norm="layer_norm",
            tokenizer=None,
            text_format=_TEXT_FORMATS[text],
        )
    tokenizer = path / "predictor_tokenizer"
    return TrainedPredictor(
        backbone=below(tensors, _EXTRACTOR),
        config=_backbone_config(given, manifest, path),
        head=head,
        activation=activation,
        feature_norm="layer_norm",
        tokenizer=given.predictor_tokenizer
        or (str(tokenizer) if has_tokenizer(tokenizer) else None),
    )


def _one_of(path: Path, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises IFPError if a field of the manifest has another value than these."""
    if value not in choices:
        raise IFPError(
            f"{path / MANIFEST}: {name} must be one of {', '.join(choices)}, not {value!r}."
        )


def _backbone_config(given: Given, manifest: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The config that the user gave, or else that of the manifest's backbone if it is found."""
    if given.predictor_config is not None:
        return read_config(given.predictor_config)
    named = manifest.get("predictor_model")
    if not isinstance(named, str) or not named:
        return None
    # A relative path starts at the checkpoint, and an absolute one stays what it is.
    if (path / named).exists():
        return read_config(str(path / named))
    try:
        return read_config(named)
    except IFPError:
        return None


def _static(named: Any, path: Path) -> SourceTensor:
    name = STATIC_FILE if named is True else named
    if not isinstance(name, str) or Path(name).name != name:
        raise IFPError(
            f"{path / MANIFEST}: static_scores must be true or the name of a file of this "
            "directory."
        )
    if (path / _PREDICTOR).is_file():
        raise IFPError(
            f"{path} has static_scores and {_PREDICTOR}: only one of them can select. Delete the "
            f"one that was not trained; static_scores is in {MANIFEST}."
        )
    tensors = open_tensors(path / name)
    if list(tensors) != ["scores"]:
        raise IFPError(f"{path / name}: must hold the tensor scores, and no other.")
    return tensors["scores"]
