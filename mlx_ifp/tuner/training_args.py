"""The numbers of a training run."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ..errors import IFPError


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
    short: str | None = None,
    yaml_only: bool = False,
    nargs: int | None = None,
) -> Any:
    """Make a dataclass field an option: its flag, check, default and YAML name follow from it.

    Args:
        default: its value if it is not given; None if there is none.
        help: what it does, for people.
        choices: the words it can be.
        least: the smallest number it can be; it must be finite then.
        metavar: what stands for its value in help.
        short: another, short flag.
        yaml_only: whether it has no flag.
        nargs: how many values its flag takes; YAML has a list of them.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "least": least,
        "metavar": metavar,
        "short": short,
        "yaml_only": yaml_only,
        "nargs": nargs,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_least(options: Iterable[Field], values: Mapping[str, Any]) -> None:
    """Raise IFPError if the value of an option is below its least, or not finite."""
    for each in options:
        least, value = each.metadata["least"], values[each.name]
        if least is not None and value is not None and not least <= value < math.inf:
            flag = each.name.replace("_", "-")
            raise IFPError(f"--{flag} must be a number from {least}, not {value}.")


@dataclass
class TrainingArgs:
    """The numbers of a run; names are mlx-lm's where they mean the same."""

    iters: int = option(1000, "Iterations to train for", least=0)
    batch_size: int = option(4, "Examples of a batch", least=1)
    grad_accumulation_steps: int = option(1, "Batches whose gradients make one update", least=1)
    learning_rate: float = option(1e-5, "AdamW's (with bias correction), of the LLM", least=0)
    predictor_learning_rate: float = option(1e-4, "AdamW's, of the predictor", least=0)
    weight_decay: float = option(0.01, "AdamW's", least=0)
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 for never", least=0
    )
    lr_schedule: dict[str, Any] | None = option(None, "mlx-lm's, of the LLM", yaml_only=True)
    predictor_lr_schedule: dict[str, Any] | None = option(
        None, "Likewise of the predictor", yaml_only=True
    )
    mask_temperature: float = option(
        0.1, "Epsilon of SoftTopK at the end of training, and after it"
    )
    mask_temperature_start: float | None = option(
        None, "Epsilon at the first iteration (default: the same)"
    )
    blend_iters: int = option(0, "Iterations over which the mask rises from none to whole", least=0)
    distill_weight: float = option(
        0.0, "Share of KL(dense || student) in the loss; the rest is cross-entropy"
    )
    distill_on: str = option("all", "Tokens that are distilled", choices=("all", "answer"))
    contrastive_weight: float = option(
        0.0, "Factor of the term that pulls prompts of one task together", least=0
    )
    contrastive_batch_size: int = option(16, "Prompts of that term", least=2)
    group_masks: bool = option(
        False, "One prompt of each batch, drawn at random, selects for all of it"
    )
    val_batches: int = option(25, "Validation batches, -1 for the entire set", least=-1)
    steps_per_report: int = option(10, "Iterations between reports", least=1)
    steps_per_eval: int = option(200, "Iterations between validations", least=1)
    save_every: int = option(100, "Iterations between checkpoints", least=1)
    keep_checkpoints: int = option(2, "Checkpoints to keep", least=1)
    grad_checkpoint: bool = option(False, "Recompute activations to save memory")
    clear_cache_threshold: int = option(
        0, "Clear MLX's cache between steps if it is larger, bytes", least=0
    )
    seed: int = option(0, "PRNG seed")

    def check(self) -> None:
        """Raises IFPError if a number is out of range."""
        check_least(fields(self), vars(self))
        if not 0 <= self.seed < 1 << 64:
            raise IFPError(f"--seed must be from 0 to 2**64 - 1, not {self.seed}.")
        if not 0 <= self.distill_weight <= 1:
            raise IFPError(f"--distill-weight must be between 0 and 1, not {self.distill_weight}.")
        for name in ("mask_temperature", "mask_temperature_start"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise IFPError(f"--{name.replace('_', '-')} must be above 0, not {value}.")

    def temperature(self, step: int) -> float:
        """The epsilon of SoftTopK at a step, which changes geometrically from start to end."""
        start = self.mask_temperature_start or self.mask_temperature
        done = min(1.0, step / max(1, self.iters - 1))
        return start ** (1 - done) * self.mask_temperature**done

    def blend(self, step: int) -> float:
        """How much of the mask holds at a step; from ``blend_iters`` on it is 1."""
        return min(1.0, (step + 1) / (self.blend_iters + 1))
