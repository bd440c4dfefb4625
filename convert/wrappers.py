"""Remove what training puts around a model and into tensors' names; all layouts use this.

``torch.compile``, DistributedDataParallel, FSDP and PEFT put segments into names, and programs put
a state dict into a dict with other things. LoRA's adapters alone are not a model: they must be
merged into it first.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from mlx_ifp.errors import IFPError

T = TypeVar("T")

# No module of a model itself has these segments in its name.
_SEGMENTS = (
    ("_orig_mod",),
    ("_fsdp_wrapped_module",),
    ("_checkpoint_wrapped_module",),
    ("module",),
    ("base_model", "model"),
)
# A key of a saved dict that begins with one of these holds training state.
_TRAINING = (
    *("optim", "sched", "lr_", "scaler", "rng", "random", "ema", "epoch", "step", "global_step"),
    *("iter", "loss", "best", "amp", "grad"),
)
# The report gives this as the reason why those are not converted.
TRAINING_STATE = "training state"
_DEPTH = 4
# Only adapters of PEFT have these segments.
_ADAPTERS = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def unwrapped(tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """Take the wrappers' segments out of tensors' names.

    Args:
        tensors: a source's names -> anything.
        where: names the source in messages.

    Raises:
        IFPError: if adapters are among them, or two names become one.
    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        plain = _without_wrappers(name.split("."))
        if plain in found:
            raise IFPError(
                f"{where}: {name} and another tensor are both called {plain} without their "
                "wrappers' names; save one of them only."
            )
        found[plain] = tensor
    return found


def _without_wrappers(parts: list[str]) -> str:
    kept = []
    while parts:
        wrapper = next((s for s in _SEGMENTS if tuple(parts[: len(s)]) == s), None)
        # Something must be left of the name.
        if wrapper is not None and len(parts) > len(wrapper):
            parts = parts[len(wrapper) :]
        else:
            kept.append(parts[0])
            parts = parts[1:]
    return ".".join(kept)


def check_merged(names: Mapping[str, object], where: str) -> None:
    """Refuse adapters that were not merged into the model.

    Raises:
        IFPError: if there are any; the message names one of them.
    """
    for name in names:
        if not set(_ADAPTERS).isdisjoint(name.split(".")):
            raise IFPError(
                f"{where}: {name} belongs to a LoRA adapter that is not merged into the model. "
                "Merge it first, as PEFT's merge_and_unload() or mlx_lm.fuse does, and save the "
                "result."
            )


def state_dicts(tensors: Mapping[str, T]) -> Iterator[tuple[str, dict[str, T]]]:
    """Find what may be the model in a file: all tensors, or those of one dict inside.

    Programs save ``{"model_state_dict": ..., "optimizer": ...}``. A key holds the model if it is
    the only one beside training state.

    Yields:
        tuple: the prefix that is left out, such as ``""`` or ``"model_state_dict."``, and the
        tensors without it.
    """
    prefix, found = "", dict(tensors)
    yield prefix, found
    for _ in range(_DEPTH):
        plain = {n: t for n, t in found.items() if not n.startswith(_TRAINING)}
        if len(plain) < len(found):
            yield prefix, plain
        keys = {name.partition(".")[0] for name in plain}
        if len(keys) != 1 or not all("." in name for name in plain):
            return
        prefix = f"{prefix}{keys.pop()}."
        found = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        yield prefix, found
