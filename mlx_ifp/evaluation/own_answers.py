"""The dense model's own greedy answers, made once and kept on disk."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from ..errors import IFPError
from ..model import IFPModel
from ..synthesis.sampling import Request, check_batchable, safe_batch_size, sample_texts
from .rows import Row, with_answer
from .store import Store, key_of

BATCH_SIZE = 16


def with_own_answers(
    model: IFPModel,
    rows: list[Row],
    max_tokens: int,
    store: Store,
    progress: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Give each row without an answer the dense model's own.

    Args:
        model (IFPModel): whose dense model answers; it is in memory meanwhile.
        rows (list): the prompts.
        max_tokens (int): the most tokens of an answer, with the token that ends it.
        store (Store): where answers are kept.
        progress (Callable): called for each answer that was written.
    """
    names = [
        key_of("answer", model.checkpoint.digest, str(model.dtype), max_tokens, row.tokens)
        for row in rows
    ]
    open_rows = {
        name: row
        for name, row in zip(names, rows, strict=True)
        if not row.answer and name not in store
    }
    if open_rows:
        _write(model, open_rows, max_tokens, store, progress)
    return [
        row if row.answer else with_answer(row, store.get(name))
        for name, row in zip(names, rows, strict=True)
    ]


def _write(
    model: IFPModel,
    rows: dict[str, Row],
    max_tokens: int,
    store: Store,
    progress: Callable[[], object],
) -> None:
    ready = model.prepare(dense=True)
    stops = set(model.tokenizer.eos_token_ids)
    names = list(rows)
    with model.using(ready) as network:
        for name, answer in _answers(network, [rows[name].tokens for name in names], max_tokens,
                                     stops, names):  # fmt: skip
            store.add(name, answer)
            progress()


def _answers(
    network: nn.Module,
    prompts: list[list[int]],
    max_tokens: int,
    stops: set[int],
    names: list[str],
) -> Iterator[tuple[str, list[int]]]:
    """Each answer with its name, as soon as it is finished."""
    try:
        check_batchable(network)
    except IFPError:
        for name, prompt in zip(names, prompts, strict=True):
            answer = []
            for token, _ in generate_step(mx.array(prompt), network, max_tokens=max_tokens):
                answer.append(int(token))
                if answer[-1] in stops:
                    break
            yield name, answer
        return
    requests = [Request(prompt, max_tokens, 0.0) for prompt in prompts]
    size = safe_batch_size(network, max(prompts, key=len), BATCH_SIZE)
    for written in sample_texts(network, requests, stops, top_p=1.0, batch_size=size):
        end = [] if written.end is None else [written.end]
        yield names[written.place], [*written.tokens, *end]
