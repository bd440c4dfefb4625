"""AdamW with two learning rates, and what becomes of a step whose gradients are far from usual."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from model import MaskedLM
from torch import Tensor, nn

MEASURING = 20  # steps until one may be skipped


def make_optimizer(model: MaskedLM, args: Any) -> torch.optim.Optimizer:
    """AdamW for the LLM and the predictor, each with its own rate; matrices decay."""
    of_llm = {id(parameter) for parameter in model.llm.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((id(parameter) in of_llm, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base": args.learning_rate if llm else args.predictor_learning_rate,
                "weight_decay": args.weight_decay if matrix else 0.0,
            }
            for (llm, matrix), parameters in groups.items()
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def rate(args: Any, iteration: int, progress: float) -> float:
    """What the learning rates are multiplied with, after a share of the run."""
    falling = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }
    return min(1.0, (iteration + 1) / (args.warmup_iters + 1)) * falling[args.schedule]


class OddSteps:
    """Lets a step count for nothing if its gradients are far larger than usual.

    A rate of 6e-4 went well for 320 steps, then one bad stretch undid all of them: the loss rose
    from 0.45 to 1.9 and the masks collapsed. Nothing here waits for the device.

    Attributes:
        usual (Tensor): norm of the gradients, a maximum that slowly fades; None before a step.
            With elastic k it is small k that has large gradients, and a run that begins at k = F
            begins with none: a mean would call every later step odd.
        skipped (Tensor): how many steps counted for nothing.
    """

    def __init__(self, above: float, device: torch.device) -> None:
        self.above = above
        self.usual: Tensor | None = None
        self.skipped = torch.zeros((), device=device)

    def __call__(self, norm: Tensor, iteration: int, parameters: Iterable[nn.Parameter]) -> None:
        """Set the gradients to 0 if their norm, before clipping, is odd."""
        # With FSDP2 norm and gradients are divided among the processes.
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach().float()
        usual = norm if self.usual is None else self.usual
        odd = (norm > self.above * usual) & (iteration >= MEASURING)
        # An odd step moves what is usual a little: if it goes on, it is the new usual.
        self.usual = torch.where(odd, 1.02 * usual, torch.maximum(norm, 0.98 * usual))
        self.skipped += odd.float()
        for parameter in parameters:
            grad = parameter.grad
            if grad is not None:
                (grad.to_local() if hasattr(grad, "to_local") else grad).mul_((~odd).float())
