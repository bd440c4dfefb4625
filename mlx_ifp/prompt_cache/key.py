"""The key of stored keys and values, in memory and in files: it says what they are right for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version

from ..errors import IFPError
from ..llm.kv_cache import KVSettings
from ..selection.selection import Selection, digest_of

# The digest of the whole model.
DENSE = digest_of(None)
# Added to a selection's digest where the whole model read the prompts that it answered.
_AFTER_DENSE = "+dense prefill"


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines keys and values, except the tokens.

    Attributes:
        checkpoint: its digest.
        dtype: the type that the model runs in; ``None`` stands for the stored types.
        mlx_lm: the version of mlx-lm that computes them.
        selection: the digest of the sub-network's selection, or ``dense`` if the whole model reads
            the prompt, for whichever sub-network.
        settings: how they are kept.
    """

    checkpoint: str
    dtype: str
    mlx_lm: str
    selection: str
    settings: KVSettings

    @classmethod
    def of(
        cls,
        checkpoint: str,
        dtype: mx.Dtype | None,
        selection: Selection | None,
        settings: KVSettings | None = None,
    ) -> "CacheKey":
        """The key for a checkpoint, by its digest, and a selection; None is the dense model."""
        settings = settings or KVSettings()
        return cls(checkpoint, str(dtype), mlx_lm_version, digest_of(selection), settings)

    def after_dense(self, selection: Selection | None) -> "CacheKey":
        """The key where the whole model reads prompts, and the network of a selection answers."""
        return replace(self, selection=owner_of(selection, dense_prefill=True))

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        parts = [
            self.checkpoint, self.dtype, self.mlx_lm, self.selection, self.settings.identity
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def metadata(self) -> dict[str, str]:
        """The key as metadata of a file that mlx-lm saves."""
        return {
            "ifp_selection": self.selection,
            "ifp_checkpoint": self.checkpoint,
            "ifp_dtype": self.dtype,
            "ifp_mlx_lm": self.mlx_lm,
            "ifp_kv_settings": json.dumps(self.settings.identity),
        }

    def check(self, path: str, metadata: Mapping[str, str]) -> None:
        """Raises IFPError, in a line that says what to do, if a file was filled under another key.

        Args:
            path (str): the file's name, for the message.
            metadata: that of the file.
        """
        mine = self.metadata()
        if "ifp_selection" not in metadata:
            raise IFPError(
                f"{path} was not made by mlx_ifp.cache_prompt, so its selection is unknown."
            )
        if metadata["ifp_selection"] != mine["ifp_selection"]:
            if DENSE in (metadata["ifp_selection"], mine["ifp_selection"]):
                raise IFPError(f"{path} {_read_otherwise(mine['ifp_selection'] == DENSE)}")
            raise IFPError(
                f"{path} was filled under another selection than this one; "
                "give the --task or --selection it was made with."
            )
        if not mine.keys() <= metadata.keys():
            raise IFPError(
                f"{path} was made by an earlier mlx_ifp and does not say how; make it again with "
                "mlx_ifp.cache_prompt."
            )
        advice = {
            "ifp_checkpoint": "give the --model it was made with",
            "ifp_mlx_lm": "make it again with mlx_ifp.cache_prompt",
            "ifp_dtype": "give the --dtype it was made with",
            "ifp_kv_settings": "give the --max-kv-size, --kv-bits, --kv-group-size and "
            "--quantized-kv-start it was made with",
        }
        for name, what_to_do in advice.items():
            if metadata[name] != mine[name]:
                what = name.removeprefix("ifp_").replace("_", "-")
                raise IFPError(
                    f"{path} was filled with another {what} ({metadata[name]}) than this one "
                    f"({mine[name]}); {what_to_do}."
                )


def _read_otherwise(dense: bool) -> str:
    """What is wrong with a file; ``dense`` says who reads the prompt now."""
    if dense:
        return (
            "was read by a sub-network, but here the whole model reads (--dense or --prefill "
            "dense); give --prefill pruned and the --task or --selection it was made with."
        )
    return (
        "was read by the whole model, but here a sub-network reads; give --prefill dense, or make "
        "it again with mlx_ifp.cache_prompt --prefill pruned."
    )


def owner_of(selection: Selection | None, *, dense_prefill: bool) -> str:
    """What names who fills a prompt cache: see :func:`claim`."""
    digest = digest_of(selection)
    return digest + _AFTER_DENSE if dense_prefill and selection is not None else digest


def claim(
    prompt_cache: list[Any], selection: Selection | None, *, dense_prefill: bool = False
) -> list[Any]:
    """Mark a prompt cache with who fills it; what others have filled is wrong for them.

    Args:
        prompt_cache (list): mlx-lm's.
        selection (Selection): that of the network which answers; None is the whole model.
        dense_prefill (bool): whether the whole model reads what the network answers. Then the cache
            may be one that only the whole model has filled so far.

    Returns:
        list: the cache.

    Raises:
        IFPError: if it is marked with another.
    """
    digest, owner = digest_of(selection), owner_of(selection, dense_prefill=dense_prefill)
    for layer in prompt_cache:
        mark = getattr(layer, "ifp_selection", owner)
        if mark != owner and not (dense_prefill and mark == DENSE):
            if mark.removesuffix(_AFTER_DENSE) == digest or mark == DENSE:
                right = "pruned" if dense_prefill else "dense"
                raise IFPError(
                    "The prompt cache was filled by "
                    f"{'a sub-network alone' if dense_prefill else 'the whole model'}; use "
                    f"prefill='{right}', or start with an empty prompt cache."
                )
            raise IFPError(
                "The prompt cache was filled under another selection; "
                "use the same task, or start with an empty prompt cache."
            )
        layer.ifp_selection = owner
    return prompt_cache
