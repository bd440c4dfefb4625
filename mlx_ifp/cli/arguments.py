"""Parsed flags -> a task, a selection, a model."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.directory import Checkpoint
from ..checkpoint.tokenizers import load_predictor_tokenizer
from ..device import default_dtype
from ..errors import IFPError
from ..files.atomic import check_writable
from ..files.text import read_stdin, read_text
from ..generation.request import Request
from ..llm.prompt import Text
from ..memory.advice import check
from ..memory.budget import Estimator, Use
from ..memory.table import table
from ..model import IFPModel
from ..opening import open_model
from ..selection.disk_cache import SelectionCache
from ..selection.files import load_selection
from ..selection.selection import Selection
from ..selection.task_library import EXAMPLES, Task, TaskLibrary
from ..selectors.scoring import Part, Scoring, norms_of, select
from ..selectors.selector import resolved_keep
from ..selectors.text import selecting_text, selector_tokens
from ..subnetwork.ahead import Ahead


def read_prompt(prompt: str) -> str:
    """The prompt of a command line, with mlx-lm's escapes; '-' reads stdin. It is never empty."""
    prompt = read_stdin() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t")
    try:
        # Bytes of a command line that cannot be decoded come as surrogates.
        prompt.encode()
    except UnicodeEncodeError as error:
        raise IFPError("The prompt is not UTF-8 text.") from error
    if not prompt.strip():
        raise IFPError("The prompt is empty; give some text with --prompt, or - and stdin.")
    return prompt


def kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of mlx-lm's ``generate_step`` that ``add_kv_options`` gives."""
    names = (
        "max_kv_size",
        "kv_bits",
        "kv_group_size",
        "quantized_kv_start",
        "prefill_step_size",
    )
    return {name: getattr(args, name) for name in names}


def sampler_of(
    args: argparse.Namespace, tokenizer: TokenizerWrapper
) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler for the flags of ``add_sampling_options``."""
    return make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def check_max_tokens(args: argparse.Namespace) -> None:
    """Raises IFPError if ``--max-tokens`` is no limit that mlx-lm takes."""
    if args.max_tokens < -1 or args.max_tokens == 0:
        raise IFPError("--max-tokens must be above 0, or -1 for no limit.")


def use_of(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    request: Request,
) -> Use:
    """What the options are going to use a checkpoint for.

    Args:
        args: the options.
        checkpoint: what they name.
        tokenizer: of its LLM.
        request: what they ask for.
    """
    generation = request.generation(tokenizer)
    if request.dense:
        ks = resolved_keep(checkpoint, 1.0)
        return Use(ks, generation, networks=args.cached_tasks, dense=True)
    selector = args.selector or checkpoint.ifp.selector
    dense_prefill = request.prefill_by(checkpoint, selector) == "dense"
    networks = args.cached_tasks
    if request.selection is not None:
        ks = request.selection.ks
        return Use(ks, generation, networks=networks, dense_prefill=dense_prefill)
    if request.prior is None:
        checkpoint.checked_selector(selector)
    if selector == "predictor" and checkpoint.has_predictor_tokenizer:
        tokenizer = load_predictor_tokenizer(checkpoint, _tokenizer_config(args))
    text: Text | None = request.task
    if text is None:
        role = request.task_from or checkpoint.ifp.text.source
        text = selecting_text(request.prompt, role)
    tokens = selector_tokens(tokenizer, text, checkpoint.ifp.text)
    ks = resolved_keep(checkpoint, args.keep)
    return Use(ks, generation, selector, len(tokens), networks, dense_prefill=dense_prefill)


def task_of(args: argparse.Namespace) -> str | None:
    """The task description of the command line, or None."""
    if args.task_file is None:
        try:
            # Bytes of a command line that cannot be decoded come as surrogates.
            (args.task or "").encode()
        except UnicodeEncodeError as error:
            raise IFPError("The task is not UTF-8 text.") from error
        return args.task
    return read_text(args.task_file)


def check_given(args: argparse.Namespace, *, has_prompt: bool = False) -> None:
    """Raises IFPError if options contradict a selection that is given, or none can be saved.

    It is to be called before anything is loaded. A command need not have all of these options.

    Args:
        args: the options.
        has_prompt (bool): whether there is a prompt, which glass can blend with a named task.
    """
    for given in ("selection", "task_name", "dense"):
        for name in ("keep", "keep_by_layer", "selector"):
            # A selection has its channels already, so nothing is scored or counted. A task from
            # examples has scores, too.
            if not getattr(args, given, None) or getattr(args, name) is None:
                continue
            if given == "task_name" and (name != "selector" or _blends_task(args, has_prompt)):
                continue
            flags = (f"--{each.replace('_', '-')}" for each in (given, name))
            raise IFPError(f"{' and '.join(flags)} exclude each other.")
    if getattr(args, "save_selection", None) is not None:
        if getattr(args, "dense", False):
            raise IFPError("--dense selects nothing to save.")
        check_writable(args.save_selection)


def named_task(args: argparse.Namespace, checkpoint: Checkpoint) -> Task:
    """The task that ``--task-name`` names, with as many channels as the options ask for.

    Raises:
        IFPError: if there is none of this name, or it has no scores for another k.
    """
    task = TaskLibrary(checkpoint, args.cache_dir).load(args.task_name)
    if args.keep is None and args.keep_by_layer is None:
        return task
    ks = task.selection.ks if args.keep is None else resolved_keep(checkpoint, args.keep)
    by_layer = Scoring.of(checkpoint, by_layer=args.keep_by_layer).by_layer
    if args.keep is None:
        # The task's k may differ by layer; the new one has the same mean.
        ks = [sum(ks) // len(ks)] * len(ks)
    scores = _scores_of(task)
    selection = select(
        checkpoint,
        mx.array(scores),
        ks,
        [Part(scores, task.statistic)],
        by_layer=by_layer,
        norms=lambda: norms_of(checkpoint),
    )
    return replace(task, selection=selection)


def _blends_task(args: argparse.Namespace, has_prompt: bool = True) -> bool:
    """Whether glass blends a named task with the prompt, which selects then."""
    return has_prompt and args.task_name is not None and args.selector == "glass"


def glass_of(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """How a request blends ``--task-name`` with the prompt; empty without ``--selector glass``.

    Raises:
        IFPError: if the task has no scores.
    """
    if not _blends_task(args):
        return {}
    return {
        "selector": "glass",
        "keep": args.keep,
        "prior": _scores_of(TaskLibrary(checkpoint, args.cache_dir).load(args.task_name)),
    }


def note_prefill(args: argparse.Namespace, checkpoint: Checkpoint, prefill: str) -> None:
    """Tell the user if ``--task-name`` was chosen for answers only, but reads the prompt, too.

    Args:
        args: the options.
        checkpoint (Checkpoint): what they name.
        prefill (str): who reads the prompt, ``dense`` or ``pruned``.
    """
    if args.task_name is None or prefill == "dense" or _blends_task(args):
        return
    task = TaskLibrary(checkpoint, args.cache_dir).load(args.task_name)
    if task.selector == EXAMPLES:
        print(
            f"[INFO] The channels of the task {task.name!r} were chosen for answers only, and "
            "here they read the prompt, too; --prefill dense suits them better.",
            file=sys.stderr,
        )


def _scores_of(task: Task) -> np.ndarray:
    if task.scores is None:
        raise IFPError(
            f"The task {task.name!r} was not made from examples, so it has its channels and no "
            "scores: --keep, --keep-by-layer and --selector need a task of "
            "mlx_ifp.tasks add --examples."
        )
    return task.scores


def given_selection(args: argparse.Namespace, checkpoint: Checkpoint) -> Selection | None:
    """The selection of ``--selection`` or ``--task-name``; None if a text selects."""
    if _blends_task(args):
        return None
    if args.task_name is not None:
        return named_task(args, checkpoint).selection
    if args.selection is not None:
        return load_selection(args.selection, checkpoint.digest)
    return None


def scoring_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Scoring:
    """How the options of :func:`~mlx_ifp.cli.flags.add_model_options` let channels be scored."""
    return Scoring.of(checkpoint, args.statistic, args.blend, args.keep_by_layer)


def _tokenizer_config(args: argparse.Namespace) -> dict[str, bool]:
    return {"trust_remote_code": args.trust_remote_code}


def load_model(
    args: argparse.Namespace,
    plan: Callable[[Checkpoint, TokenizerWrapper], Use] | None = None,
) -> tuple[IFPModel, TokenizerWrapper]:
    """Load the checkpoint that the options name.

    Args:
        args: the options.
        plan: of a command with :func:`add_memory_options`, what it is going to use the checkpoint
            for. With ``--estimate-only`` that is printed, and the process ends.

    Raises:
        IFPError: if it does not fit the memory limit; no weight has been read then.
    """
    dtype = getattr(mx, args.dtype) if args.dtype else default_dtype()
    selections = None if args.no_cache else SelectionCache(args.cache_dir)
    ahead: list[Ahead] = []

    def begin(opened: Checkpoint) -> None:
        # With a limit nothing is read before it is known to fit.
        if getattr(args, "memory_limit", None) is None and not getattr(args, "estimate_only", 0):
            given = ("selection", "task_name", "dense")
            ahead.append(
                Ahead(
                    opened,
                    dtype,
                    selector=args.selector,
                    prefill=getattr(args, "prefill", None),
                    selections=selections,
                    channels=not any(getattr(args, name, None) for name in given),
                )
            )

    checkpoint, tokenizer = open_model(args.model, _tokenizer_config(args), args.revision, begin)
    limit = use = None
    if plan is not None and (args.memory_limit is not None or args.estimate_only):
        limit, use = args.memory_limit, plan(checkpoint, tokenizer)
    if use is not None and args.estimate_only:
        estimator = Estimator(checkpoint, dtype)
        print(table(estimator, use, limit), flush=True)
        if limit is not None:
            check(estimator, use, limit)
        sys.exit(0)
    if limit is not None:
        # With it MLX gives freed buffers back before it exceeds the limit.
        mx.set_memory_limit(limit)
    model = IFPModel(
        checkpoint,
        tokenizer,
        dtype=dtype,
        keep=args.keep,
        # With a task's scores glass needs no prior of the checkpoint, and the request names it.
        selector=None if getattr(args, "task_name", None) is not None else args.selector,
        scoring=scoring_of(args, checkpoint),
        selection_cache=selections,
        tokenizer_config=_tokenizer_config(args),
        task_library=TaskLibrary(checkpoint, args.cache_dir),
        memory_limit=limit,
        use=use,
        ahead=ahead[0] if ahead else None,
    )
    return model, tokenizer
