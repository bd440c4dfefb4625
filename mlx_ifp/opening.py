"""Open a checkpoint and load it: from a path or a hub id to a model in use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.directory import Checkpoint, open_checkpoint
from .checkpoint.locate import resolve
from .checkpoint.tokenizers import load_tokenizer_of
from .device import default_dtype
from .model import IFPModel
from .selection.disk_cache import SelectionCache
from .selection.keep import Keep
from .selection.task_library import TaskLibrary
from .selectors.scoring import Scoring
from .subnetwork.ahead import Ahead
from .subnetwork.reuse import check_overlap


def open_model(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    revision: str | None = None,
    begin: Callable[[Checkpoint], object] = lambda _: None,
) -> tuple[Checkpoint, TokenizerWrapper]:
    """The first half of :func:`load`: configs, headers and tokenizer, but no weights.

    Args:
        path_or_hf_repo, tokenizer_config, revision: as there.
        begin (Callable): called with the checkpoint before the tokenizer is loaded, so that it can
            begin to read what is needed later.
    """
    checkpoint = open_checkpoint(resolve(path_or_hf_repo, revision))
    begin(checkpoint)
    return checkpoint, load_tokenizer_of(checkpoint, tokenizer_config)


def load(
    path_or_hf_repo: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    keep: Keep | None = None,
    selector: str | None = None,
    statistic: str | None = None,
    blend: float | None = None,
    keep_by_layer: bool | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    reuse_overlap: float | None = None,
    memory_limit: int | None = None,
) -> tuple[IFPModel, TokenizerWrapper]:
    """Load a checkpoint: its trunk and tokenizer, but no FFN and no predictor yet.

    Args:
        path_or_hf_repo: a local directory or a hub repository; None takes the package's own model.
        tokenizer_config (dict): passed to the tokenizer, as in mlx-lm.
        revision (str): of a hub repository.
        dtype (mx.Dtype): run in this type. The default is float32 on a CPU, and on a GPU the type
            of the stored weights.
        keep: channels to keep in each layer: a count, a list of L counts, or a fraction (float).
            The default is what the checkpoint says.
        selector (str): ``predictor``, ``activations``, ``static`` or ``glass``. The default is what
            the checkpoint says.
        statistic (str): what of the activations counts where no predictor scores: ``griffin`` (the
            default), ``norm`` or ``probe``.
        blend (float): the weight of the prompt's ranks in ``glass``, 0 to 1. The default is what
            the checkpoint says.
        keep_by_layer (bool): let one threshold over all layers say how many channels each keeps, a
            multiple of 64; ``keep`` is their mean. The default is what the checkpoint says.
        cache (bool): keep selections on disk.
        cache_dir: where they are kept, with named tasks beside them. The default is the
            platform's place for caches.
        cache_bytes (int): bound of the sub-networks kept in memory. The default is half of the
            memory that MLX may use.
        reuse_overlap (float): above 0, at most 1. If a text's selection overlaps that much (mean
            over layers) with one whose sub-network is in memory, ``prepare`` and ``generate`` use
            that sub-network and load nothing. ``select`` and ``subnetwork`` stay exact. None turns
            this off.
        memory_limit (int): bytes that trunk, predictor, sub-networks, keys and values may take
            together. Sub-networks get what the rest leaves. The predictor only stays in memory if
            there is room. One generation at a time is counted.

    Returns:
        tuple: the model, and the LLM's tokenizer.

    Raises:
        IFPError: one line that says what is wrong with the checkpoint or an argument, or what
            does not fit ``memory_limit``.
    """
    if reuse_overlap is not None:
        check_overlap(reuse_overlap)
    dtype = dtype if dtype is not None else default_dtype()
    selections = SelectionCache(cache_dir) if cache else None
    ahead: list[Ahead] = []

    def begin(opened: Checkpoint) -> None:
        if memory_limit is None:
            ahead.append(Ahead(opened, dtype, selector=selector, selections=selections))

    checkpoint, tokenizer = open_model(path_or_hf_repo, tokenizer_config, revision, begin)
    model = IFPModel(
        checkpoint,
        tokenizer,
        dtype=dtype,
        keep=keep,
        selector=selector,
        scoring=Scoring.of(checkpoint, statistic, blend, keep_by_layer),
        cache_bytes=cache_bytes,
        selection_cache=selections,
        tokenizer_config=tokenizer_config,
        task_library=TaskLibrary(checkpoint, cache_dir),
        reuse_overlap=reuse_overlap,
        memory_limit=memory_limit,
        ahead=ahead[0] if ahead else None,
    )
    return model, tokenizer
