"""A network whose prompt has been read by another one: the first token comes from given logits."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class AfterPrompt(nn.Module):
    """A sub-network that goes on where the dense LLM has read the prompt.

    mlx-lm is given the whole prompt, so that its counts and logits processors see it. While mlx-lm
    hands over the prompt, nothing is computed; then the network is called.

    Args:
        network (nn.Module): generates the tokens after the first one.
        logits (mx.array): [1, 1, V], of the prompt's last token.
        tokens (int): how many tokens the prompt has.
    """

    def __init__(self, network: nn.Module, logits: mx.array, tokens: int) -> None:
        super().__init__()
        self.network = network
        self._logits = logits
        self._left = tokens

    @property
    def layers(self) -> list[Any]:
        """The network's, for mlx-lm."""
        return self.network.layers

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """The given logits for each token of the prompt; the network's for those after it."""
        if self._left > 0:
            self._left -= inputs.shape[1]
            return self._logits
        return self.network(inputs, cache=cache)
