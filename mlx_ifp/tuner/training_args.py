"""The numbers of a training run."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import IFPError


@dataclass
class TrainingArgs:
    """The numbers of a run; names are mlx-lm's where they mean the same."""

    iters: int = field(default=1000, metadata={"help": "Iterations to train for"})
    batch_size: int = field(default=4, metadata={"help": "Examples of a batch"})
    grad_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches whose gradients make one update"}
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "AdamW's (with bias correction), of the LLM"}
    )
    predictor_learning_rate: float = field(
        default=1e-4, metadata={"help": "AdamW's, of the predictor"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are scaled down to this norm; 0 for never"}
    )
    lr_schedule: dict[str, Any] | None = field(
        default=None, metadata={"help": "mlx-lm's, of the LLM (YAML only)"}
    )
    predictor_lr_schedule: dict[str, Any] | None = field(
        default=None, metadata={"help": "Likewise of the predictor (YAML only)"}
    )
    mask_temperature: float = field(
        default=0.1, metadata={"help": "Epsilon of SoftTopK at the end of training, and after it"}
    )
    mask_temperature_start: float | None = field(
        default=None, metadata={"help": "Epsilon at the first iteration (default: the same)"}
    )
    blend_iters: int = field(
        default=0,
        metadata={"help": "Iterations over which the mask rises from none to whole"},
    )
    distill_weight: float = field(
        default=0.0,
        metadata={"help": "Share of KL(dense || student) in the loss; the rest is cross-entropy"},
    )
    distill_on: str = field(default="all", metadata={"help": "Tokens that are distilled"})
    contrastive_weight: float = field(
        default=0.0, metadata={"help": "Factor of the term that pulls prompts of one task together"}
    )
    contrastive_batch_size: int = field(default=16, metadata={"help": "Prompts of that term"})
    group_masks: bool = field(
        default=False,
        metadata={"help": "One prompt of each batch, drawn at random, selects for all of it"},
    )
    val_batches: int = field(
        default=25, metadata={"help": "Validation batches, -1 for the entire set"}
    )
    steps_per_report: int = field(default=10, metadata={"help": "Iterations between reports"})
    steps_per_eval: int = field(default=200, metadata={"help": "Iterations between validations"})
    save_every: int = field(default=100, metadata={"help": "Iterations between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "Checkpoints to keep"})
    grad_checkpoint: bool = field(
        default=False, metadata={"help": "Recompute activations to save memory"}
    )
    clear_cache_threshold: int = field(
        default=0, metadata={"help": "Clear MLX's cache between steps if it is larger, bytes"}
    )
    seed: int = field(default=0, metadata={"help": "PRNG seed"})

    def check(self) -> None:
        """Raises IFPError if a number is out of range."""
        for name, least in (("iters", 0), ("batch_size", 1), ("grad_accumulation_steps", 1),
                            ("steps_per_report", 1), ("steps_per_eval", 1), ("save_every", 1),
                            ("keep_checkpoints", 1), ("blend_iters", 0), ("learning_rate", 0),
                            ("predictor_learning_rate", 0), ("weight_decay", 0),
                            ("contrastive_weight", 0), ("contrastive_batch_size", 2),
                            ("max_grad_norm", 0), ("val_batches", -1),
                            ("clear_cache_threshold", 0)):  # fmt: skip
            if not least <= getattr(self, name) < math.inf:
                raise IFPError(
                    f"--{name.replace('_', '-')} must be a number from {least}, not "
                    f"{getattr(self, name)}."
                )
        if not 0 <= self.seed < 1 << 64:
            raise IFPError(f"--seed must be from 0 to 2**64 - 1, not {self.seed}.")
        if not 0 <= self.distill_weight <= 1:
            raise IFPError(f"--distill-weight must be between 0 and 1, not {self.distill_weight}.")
        for name in ("mask_temperature", "mask_temperature_start"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise IFPError(f"--{name.replace('_', '-')} must be above 0, not {value}.")

    def temperature(self, step: int) -> float:
        """Epsilon of SoftTopK at a step: geometric from start to end."""
        start = self.mask_temperature_start or self.mask_temperature
        done = min(1.0, step / max(1, self.iters - 1))
        return start ** (1 - done) * self.mask_temperature**done

    def blend(self, step: int) -> float:
        """How much of the mask holds at a step: 1 from ``blend_iters`` on."""
        return min(1.0, (step + 1) / (self.blend_iters + 1))
