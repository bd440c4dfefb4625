"""The layout "manifest": an LLM's directory with ``predictor.safetensors`` beside it.

A directory of this layout holds the LLM as transformers saves it, with its tokenizer, and:

- ``predictor.safetensors``: the backbone's tensors as ``extractor.*``, by the names of its body
  (``extractor.embed_tokens.weight``), and the head: ``mlp.0.weight`` [P, D], ``mlp.0.bias`` [P] and
  ``mlp.2.weight`` [L * d_ffn, P]. A LayerNorm without parameters stands before the head. An
  embedding that equals the LLM's bit for bit is converted with the LLM's, if both tokenizers are
  equal, too.
- ``predictor_tokenizer/``: the predictor's tokenizer.
- ``ifpruning_config.json``: an object with the fields

  - ``num_layers``, ``full_intermediate_dim``, ``target_intermediate_dim``: L, d_ffn and k;
  - ``predictor_hidden_dim`` (optional): P;
  - ``predictor_model`` (optional): where the backbone's ``config.json`` is: a file or a directory,
    relative to the checkpoint or absolute, or a hub id. Without it the user names one;
  - ``mask_temperature`` (optional, 1.0): epsilon of SoftTopK.

Other fields are ignored.
"""

from pathlib import Path
from typing import Any

from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.errors import IFPError

from ..sources.files import below, open_tensors, read_json
from .parts import Given, TrainedModel, generation_config, has_tokenizer, read_config, take_head

MANIFEST = "ifpruning_config.json"
_PREDICTOR = "predictor.safetensors"
_HEAD = {
    "mlp.0.weight": "linear1.weight",
    "mlp.0.bias": "linear1.bias",
    "mlp.2.weight": "linear2.weight",
}
_FIELDS = ("num_layers", "full_intermediate_dim", "target_intermediate_dim")


def is_manifest(path: Path) -> bool:
    """Whether a directory looks like it."""
    return (path / MANIFEST).is_file() or (path / _PREDICTOR).is_file()


def open_manifest(path: Path, given: Given) -> TrainedModel:
    """Open a checkpoint of this layout.

    Raises:
        IFPError: naming the file and the field or tensor that is wrong.
    """
    manifest = read_json(path / MANIFEST)
    for name in _FIELDS:
        if not isinstance(manifest.get(name), int):
            raise IFPError(f"{path / MANIFEST}: {name} must be a number.")
    temperature = manifest.get("mask_temperature", 1.0)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < 1e6:
        raise IFPError(f"{path / MANIFEST}: mask_temperature must be above 0.")
    tensors = open_tensors(path / _PREDICTOR)
    head = {name: t for name, t in tensors.items() if not name.startswith("extractor.")}
    head = take_head(head, _HEAD, str(path / _PREDICTOR))
    hidden = manifest.get("predictor_hidden_dim", head["linear1.weight"].shape[0])
    if hidden != head["linear1.weight"].shape[0]:
        raise IFPError(
            f"{path / MANIFEST}: predictor_hidden_dim is {hidden}, but mlp.0.weight gives "
            f"{head['linear1.weight'].shape[0]} values."
        )
    tokenizer = path / "predictor_tokenizer"
    return TrainedModel(
        layout="manifest",
        llm=open_tensors(path),
        backbone=below(tensors, "extractor."),
        llm_config=read_config(given.llm_config or str(path)),
        backbone_config=_backbone_config(given, manifest, path),
        head=head,
        activation="leaky_relu",
        feature_norm="layer_norm",
        # Trained with the soft mask, used with the hard one of the same order.
        mask=MaskConfig("sigmoid", float(temperature), keep_soft_values=False),
        keep=given.keep if given.keep is not None else manifest["target_intermediate_dim"],
        layers=manifest["num_layers"],
        d_ffn=manifest["full_intermediate_dim"],
        tokenizer=given.tokenizer or (str(path) if has_tokenizer(path) else None),
        predictor_tokenizer=given.predictor_tokenizer
        or (str(tokenizer) if has_tokenizer(tokenizer) else None),
        extra_files=generation_config(path),
    )


def _backbone_config(given: Given, manifest: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The user's, or that of the backbone which the manifest names, if it can be found."""
    if given.predictor_config is not None:
        return read_config(given.predictor_config)
    named = manifest.get("predictor_model")
    if not isinstance(named, str) or not named:
        return None
    # A relative path starts at the checkpoint, an absolute one stays what it is.
    if (path / named).exists():
        return read_config(str(path / named))
    try:
        return read_config(named)
    except IFPError:
        return None
