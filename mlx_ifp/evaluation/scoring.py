"""How far a sub-network is from the dense model: on the tokens of an answer, read one by one."""

import copy
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..llm.modules import PREFILL_STEP_SIZE


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a network has read.

    Attributes:
        cache: mlx-lm's prompt cache, with all its tokens; it is copied before it is written.
        logits: [1, V], of the last token.
    """

    cache: list[Any]
    logits: mx.array


def read_prompt(network: nn.Module, tokens: list[int], step: int = PREFILL_STEP_SIZE) -> ReadPrompt:
    """Let a network read a prompt.

    Args:
        network (nn.Module): an mlx-lm model.
        tokens (list): [n] ids, n >= 1.
        step (int): the most tokens that run at a time.
    """
    cache = make_prompt_cache(network)
    for start in range(0, len(tokens), step):
        logits = network(mx.array([tokens[start : start + step]]), cache=cache)[:, -1]
        mx.eval(logits, [layer.state for layer in cache])
    return ReadPrompt(cache, logits)


def answer_logprobs(network: nn.Module, prompt: ReadPrompt, answer: list[int]) -> mx.array:
    """Log-probabilities of each token of an answer, given those before it.

    The first token comes from whoever has read the prompt, as it does when text is generated.

    Args:
        network (nn.Module): what answers.
        prompt (ReadPrompt): from the network itself, or from the dense model.
        answer (list): [m] ids, m >= 1.

    Returns:
        mx.array: float32 [m, V].
    """
    logits = prompt.logits
    if len(answer) > 1:
        cache = copy.deepcopy(prompt.cache)
        logits = mx.concatenate([logits, network(mx.array([answer[:-1]]), cache=cache)[0]])
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Score:
    """An answer's score: sums over its tokens.

    Attributes:
        tokens: m, how many there are.
        kl: the sum of KL(dense || network) over whole vocabularies, in nats.
        agree: for how many of them both find the same token likeliest.
        ce: the sum of the network's cross-entropy, in nats.
        right: for each token whether the network finds it likeliest.
    """

    tokens: int
    kl: float
    agree: int
    ce: float
    right: list[bool]

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def score(dense: mx.array, logprobs: mx.array, answer: list[int]) -> Score:
    """Compare a network's answer with the dense model's.

    Args:
        dense (mx.array): the dense model's log-probabilities, float32 [m, V].
        logprobs (mx.array): the network's, float32 [m, V].
        answer (list): [m] ids.
    """
    labels = mx.array(answer)
    # A token that the dense model excludes adds nothing; infinity times 0 would be no number.
    share = mx.exp(dense)
    kl = mx.where(share > 0, share * (dense - logprobs), 0).sum()
    likeliest = logprobs.argmax(axis=-1)
    agree = (likeliest == dense.argmax(axis=-1)).sum()
    ce = -mx.take_along_axis(logprobs, labels[:, None], axis=-1).sum()
    right = likeliest == labels
    mx.eval(kl, agree, ce, right)
    return Score(len(answer), float(kl), int(agree), float(ce), cast(list[bool], right.tolist()))
