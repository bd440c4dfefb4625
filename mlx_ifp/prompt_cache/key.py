"""The key of stored keys and values, in memory and in files: it says what they are right for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version

from ..errors import IFPError
from ..llm.kv_cache import KVSettings
from ..selection.selection import Selection, digest_of


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines keys and values, except the tokens.

    Attributes:
        checkpoint: its digest.
        dtype: the type that the model runs in; ``None`` stands for the stored types.
        mlx_lm: the version of mlx-lm that computes them.
        selection: the digest of the sub-network's selection, or ``dense``.
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
