"""What a generation cost: the figures of ``--verbose`` and ``--stats``."""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.utils import get_total_parameters

from ..model import IFPModel
from ..subnetwork.prepared import Prepared


@dataclass(frozen=True)
class WarmStart:
    """A prompt that began warm: where its first ``tokens`` came from.

    The ``source`` is ``memory``, ``disk``, or a ``prefill`` now.
    """

    source: str
    seconds: float
    tokens: int


def parameter_counts(model: IFPModel, ready: Prepared) -> tuple[int, int]:
    """Parameters of the network that generates, and of the whole LLM (without the predictor)."""
    active = get_total_parameters(ready.network)
    if ready.selection is None:
        return active, active
    ffn = model.checkpoint.ffns[0]
    channel = 3 * ffn.hidden_size + len(ffn.biases - {"down_proj"})
    left_out = sum(ffn.d_ffn - k for k in ready.selection.ks)
    return active, active + left_out * channel


@dataclass(frozen=True)
class Stats:
    """Seconds, bytes and counts; see :meth:`to_dict` for the names users see."""

    source: str
    select_seconds: float
    load_seconds: float
    bytes_read: int
    prompt_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    decode_tokens: int
    decode_tps: float
    peak_memory: int
    active: int
    total: int
    channels_reused: int = 0
    reuse_overlap: float | None = None
    warm: WarmStart | None = None
    prefill: str = "pruned"

    @classmethod
    def of(
        cls,
        ready: Prepared,
        response: GenerationResponse,
        first_token_seconds: float,
        parameters: tuple[int, int],
        warm: WarmStart | None = None,
        prefill: str = "pruned",
    ) -> "Stats":
        """Gather the figures of a generation from its last response."""
        return cls(
            source=ready.source,
            select_seconds=ready.select_seconds,
            load_seconds=ready.load_seconds,
            bytes_read=ready.bytes_read,
            prompt_tokens=response.prompt_tokens,
            prefill_seconds=response.prompt_tokens / response.prompt_tps,
            first_token_seconds=first_token_seconds,
            decode_tokens=response.generation_tokens,
            decode_tps=response.generation_tps,
            peak_memory=mx.get_peak_memory(),
            active=parameters[0],
            total=parameters[1],
            channels_reused=ready.channels_reused,
            reuse_overlap=ready.reuse_overlap,
            warm=warm,
            prefill="dense" if ready.selection is None else prefill,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``--stats`` file."""
        warm = {} if self.warm is None else {"warm_prompt": asdict(self.warm)}
        return {
            "selection": {
                "source": self.source,
                "seconds": self.select_seconds,
                "reuse_overlap": self.reuse_overlap,
            },
            "load": {
                "seconds": self.load_seconds,
                "bytes_read": self.bytes_read,
                "channels_reused": self.channels_reused,
            },
            **warm,
            "prefill": {
                "tokens": self.prompt_tokens,
                "seconds": self.prefill_seconds,
                "by": self.prefill,
            },
            "first_token_seconds": self.first_token_seconds,
            "decode": {"tokens": self.decode_tokens, "tokens_per_second": self.decode_tps},
            "peak_memory_bytes": self.peak_memory,
            "active_parameters": self.active,
            "total_parameters": self.total,
        }

    def table(self) -> str:
        """The table that ``--verbose`` prints."""
        source = self.source
        if self.reuse_overlap is not None:
            source += f", another reused: overlap {self.reuse_overlap:.3f}"
        read = f"{self.bytes_read / 1e6:.1f} MB read"
        if self.channels_reused:
            read += f", {self.channels_reused:,} channels reused"
        by = ", dense" if self.prefill == "dense" else ""
        rows = [
            ("selection", f"{self.select_seconds:.3f} s", source),
            ("loading", f"{self.load_seconds:.3f} s", read),
            (
                "prefill",
                f"{self.prefill_seconds:.3f} s",
                f"{self.prompt_tokens} tokens{by}",
            ),
            ("first token", f"{self.first_token_seconds:.3f} s", ""),
            ("decode", f"{self.decode_tps:.1f} tokens/s", f"{self.decode_tokens} tokens"),
            ("peak memory", f"{self.peak_memory / 1e9:.3f} GB", ""),
            (
                "parameters",
                f"{self.active / 1e6:.1f} M",
                f"active, of {self.total / 1e6:.1f} M",
            ),
        ]
        if self.warm is not None:
            what = f"{self.warm.tokens} tokens, {self.warm.source}"
            rows.insert(2, ("warm prompt", f"{self.warm.seconds:.3f} s", what))
        return "\n".join(f"{a:<12} {b:>16}  {c}".rstrip() for a, b, c in rows)
