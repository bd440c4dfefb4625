"""Sample many texts at once with mlx-lm's ``BatchGenerator``."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from ..errors import IFPError


@dataclass(frozen=True)
class Request:
    """A text to write.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: how many to write at most.
        temperature: 0 is greedy.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Written:
    """A text that was written.

    Attributes:
        place: where its request is in the list of requests.
        tokens: what was written, without the token that ended it.
        ended: whether a token ended it, rather than ``max_tokens``.
        end: the token that ended it, or None.
    """

    place: int
    tokens: list[int]
    ended: bool
    end: int | None = None


def check_batchable(model: nn.Module) -> None:
    """Raises IFPError if mlx-lm cannot run several texts through a model at once."""
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        raise IFPError("mlx-lm cannot run this model on several texts at once; use another one.")


def safe_batch_size(model: nn.Module, prompt: list[int], batch_size: int) -> int:
    """The batch size, or 1 if mlx-lm does not run this model on several texts as on each alone.

    Some of its models do not heed the padding of shorter texts, and Gemma 2 fails. So a prompt and
    its first half are tried.

    Args:
        model (nn.Module): a model that :func:`check_batchable` takes.
        prompt (list): token ids, at least one.
        batch_size (int): what is wanted.
    """
    longer = prompt if len(prompt) > 1 else prompt * 2
    requests = [Request(each, 2, 0.0) for each in (longer[: len(longer) // 2], longer)]

    def tokens(size: int) -> list[list[int]]:
        written = sample_texts(model, requests, set(), top_p=1.0, batch_size=size)
        return [each.tokens for each in sorted(written, key=lambda each: each.place)]

    try:
        together = tokens(2)
    except (ValueError, TypeError, RuntimeError):
        return 1
    return batch_size if together == tokens(1) else 1


def sample_texts(
    model: nn.Module,
    requests: list[Request],
    stops: set[int],
    *,
    top_p: float,
    batch_size: int,
) -> Iterator[Written]:
    """Write texts; each comes back as soon as it is finished.

    Requests of one temperature should stand together: mlx-lm samples a batch in one go if all its
    texts are sampled alike.

    Args:
        model (nn.Module): an mlx-lm model.
        requests (list): the texts to write; a finished text makes room for the next one.
        stops (set): ids of tokens that end a text.
        top_p (float): nucleus sampling for all texts; 1 takes the whole distribution.
        batch_size (int): texts at once.
    """
    if not requests:
        return
    samplers = {t: make_sampler(t, top_p=top_p) for t in {each.temperature for each in requests}}
    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in sorted(stops)],
        completion_batch_size=batch_size,
        prefill_batch_size=min(8, batch_size),
    )
    try:
        ids = generator.insert(
            [each.prompt for each in requests],
            max_tokens=[each.max_tokens for each in requests],
            samplers=[samplers[each.temperature] for each in requests],
        )
        places = {uid: place for place, uid in enumerate(ids)}
        tokens: dict[int, list[int]] = {uid: [] for uid in ids}
        while responses := generator.next_generated():
            for response in responses:
                ended = response.finish_reason == "stop"
                if not ended:
                    tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    end = response.token if ended else None
                    yield Written(places[response.uid], tokens.pop(response.uid), ended, end)
    finally:
        generator.close()
