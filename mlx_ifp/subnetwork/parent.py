"""The LLM that all sub-networks of a checkpoint are cut from."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.directory import Checkpoint
from ..checkpoint.weights import load_trunk
from ..llm.ffn import FFN
from ..selection.keep import per_layer
from .channels import ChannelReader


@dataclass(frozen=True)
class Parent:
    """The LLM that sub-networks are cut from: its trunk in memory, its channels on disk.

    Attributes:
        trunk: an mlx-lm model with all but the FFN channels.
        reader: reads channels, and counts their bytes.
        ffns: the L FFNs.
        config: that of the LLM, which says how weights are quantized.
        dtype: the type that floats are cast to; None keeps them as they are stored.
    """

    trunk: nn.Module
    reader: ChannelReader
    ffns: list[FFN]
    config: dict[str, Any]
    dtype: mx.Dtype | None

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> "Parent":
        """Load a checkpoint's trunk; the width that it reports is the checkpoint's largest k."""
        width = max(per_layer(checkpoint.ifp.k, len(checkpoint.ffns)))
        return cls.of(checkpoint, load_trunk(checkpoint, width, dtype), dtype)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, trunk: nn.Module, dtype: mx.Dtype | None = None
    ) -> "Parent":
        """A parent made of a trunk that is loaded already, with floats of type ``dtype``."""
        reader = ChannelReader(checkpoint.channels)
        return cls(trunk, reader, checkpoint.ffns, checkpoint.config, dtype)
