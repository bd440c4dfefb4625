"""Load models that are quantized already, in mlx-lm's format or in another that mlx-lm reads."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from mlx_ifp.checkpoint.expected import parameters_of
from mlx_ifp.errors import IFPError, one_line, reason_of
from mlx_ifp.files.tensor_files import read_any_header
from mlx_ifp.llm.build import quantization_of

from .sources.files import kind_of, weight_files

# mlx-lm's load_model has a branch for each of these methods. It takes any other for floats.
_METHODS = (
    *("awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt"),
    *("mxfp4", "mxfp8"),
)
# mlx-lm reads these files besides the weights.
_CONFIGS = ("config.json", "generation_config.json", "hf_quant_config.json")


def load_quantized(
    model: str, path: Path, config: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a quantized directory as mlx-lm's model, whose arrays are not read yet.

    Args:
        model (str): the name that the user gave.
        path (Path): the directory.
        config: the directory's config, as mlx-lm's models read it.

    Returns:
        tuple: the model, and the config as mlx-lm has changed it.

    Raises:
        IFPError: if mlx-lm does not read this quantization, or leaves some of the weights packed.
    """
    method = _method(config)
    if method is not None and method not in _METHODS:
        raise IFPError(
            f"{model} is quantized with {method!r}, which mlx-lm does not read; convert the "
            "original model in floats."
        )
    files = weight_files(path)
    for file in files:
        if kind_of(file) not in ("safetensors", None):
            raise IFPError(f"{file}: mlx-lm reads quantized weights from safetensors files only.")
        read_any_header(file)
    what = f"{model} cannot be loaded"
    if method is not None:
        what += f"; it is quantized with {method!r}, and mlx-lm does not read it so"
    with one_line(what), tempfile.TemporaryDirectory(prefix="mlx_ifp-") as name:
        view = _view(Path(name), path, files)
        try:
            network, config = load_model(view, lazy=True, model_config=config)
        except Exception as error:
            # This directory is gone when the user reads the message, so it is not named.
            raise IFPError(f"{what}: {reason_of(error).replace(name, str(path))}") from error
    _check_unpacked(network, model, method)
    return network, config


def _method(config: dict[str, Any]) -> str | None:
    """Find out which other quantizer made the model; None stands for mlx-lm's own format."""
    if isinstance(config.get("quantization"), dict):
        return None
    nested = config.get("text_config") or {}
    other = config.get("quantization_config") or nested.get("quantization_config")
    if not isinstance(other, dict):
        return None
    return str(other.get("quant_method"))


def _view(view: Path, path: Path, files: list[Path]) -> Path:
    """Make a directory of links in which mlx-lm finds the model's own weights and no others.

    mlx-lm loads every ``model*.safetensors`` that it finds, and finds none if the path has
    characters that are special in a glob pattern.
    """
    for name in _CONFIGS:
        if (path / name).is_file():
            (view / name).symlink_to((path / name).resolve())
    for i, file in enumerate(files):
        (view / f"model-{i:05d}.safetensors").symlink_to(file.resolve())
    return view


def _check_unpacked(network: nn.Module, model: str, method: str | None) -> None:
    """Refuse weights that mlx-lm has left packed in modules that compute with floats."""
    packed: set[str] = set()
    for path, module in network.named_modules():
        if _is_quantized(module):
            packed.add(f"{path}.")
            if module.get("global_scale") is not None:
                raise IFPError(
                    f"{model}: {path} has a global scale, which a checkpoint cannot hold; convert "
                    "the original model in floats."
                )
    prefixes = tuple(packed)
    for name, array in parameters_of(network):
        if not name.startswith(prefixes) and array.dtype in (mx.uint8, mx.uint32):
            how = f"with {method!r}" if method is not None else "in another way"
            raise IFPError(
                f"{model}: {name} is quantized {how}, and mlx-lm does not unpack it; convert the "
                "original model in floats."
            )


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))


def record_quantization(network: nn.Module, config: dict[str, Any]) -> None:
    """Write into a config how each of a model's modules is quantized.

    When a config does not say it, mlx-lm infers it from the shapes; a checkpoint must say it.
    """
    found = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in network.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    said = config.get("quantization")
    if not found or not isinstance(said, dict):
        return
    # An entry for a module that is not quantized would be wrong, so it is left out.
    said = {name: how for name, how in said.items() if not isinstance(how, dict) or name in found}
    said |= {
        name: how
        for name, how in found.items()
        if quantization_of(config | {"quantization": said}, name) != how
    }
    config["quantization"] = said
