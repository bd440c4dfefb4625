"""Report what a conversion did, or would do, with every tensor of the source."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_ifp.files.tensor_files import LazyTensor

from .layouts import CHECKPOINT
from .layouts.parts import TrainedModel
from .plan import Plan

REPORT_FILE = "source_tensors.json"
# Python, MLX and mlx-lm take this much memory, with PyTorch where it is needed.
_PROCESS_BYTES = 420 << 20


def report_of(plan: Plan) -> dict[str, Any]:
    """List every source tensor by group: it is ``mapped`` to a name or ``skipped`` for a reason."""
    return {"layout": plan.layout, "mapped": plan.sources, "skipped": plan.skipped}


def print_report(report: dict[str, Any]) -> None:
    """Print a line of counts, and one for each reason why tensors were skipped."""
    if not any(report["mapped"].values()):
        return
    mapped = ", ".join(
        f"{len(names)} of the {group}" for group, names in report["mapped"].items() if names
    )
    print(f"layout {report['layout']}; source tensors: {mapped} mapped")
    for group, reasons in report["skipped"].items():
        counts = Counter(reasons.values())
        for reason, count in counts.items():
            names = [name for name, why in reasons.items() if why == reason]
            more = f" and {count - 1} more" if count > 1 else ""
            print(f"  skipped, {group}: {names[0]}{more}: {reason}")


def print_missing(trained: TrainedModel) -> None:
    """Print what is known about a checkpoint from which something is missing."""
    predictor = trained.predictor
    print(f"layout:      {trained.layout}")
    backbone = None if predictor is None else predictor.config
    configs = {"LLM": trained.llm_config, "predictor": backbone}
    for what, config in configs.items():
        if config is not None:
            print(f"{what + ':':12} {config.get('model_type')}")
    for what, value in (("L", trained.layers), ("d_ffn", trained.d_ffn), ("k", trained.keep)):
        if value is not None:
            print(f"{what + ':':12} {value}")
    sources = trained.sources
    print(f"tensors in:  {len(sources)}, {_mb(sum(tensor.nbytes for tensor in sources))}")
    if predictor is not None:
        print(f"head:        {predictor.head['linear2.weight'].shape[0]} scores (L * d_ffn)")
    sys.stdout.flush()


def print_dry_run(plan: Plan, mlx_path: Path) -> None:
    """Print the layout, architectures, shapes, sizes and memory of a conversion."""
    ifp = plan.ifp
    backbone = plan.predictor_config
    print(f"layout:      {plan.layout}")
    print(f"LLM:         {plan.config['model_type']}, {plan.layers} layers (L)")
    print(f"d_ffn:       {plan.d_ffn}")
    print(f"k:           {ifp.k}")
    if ifp.head is not None:
        head = " -> ".join(map(str, ifp.head.widths))
        reads = "the LLM's own state" if backbone is None else backbone["model_type"]
        print(f"predictor:   {reads}, head {head}, {ifp.head.activation}")
        values = "soft values kept" if ifp.mask.keep_soft_values else "hard"
        print(f"mask:        {ifp.mask.operator}, {values}")
    how = "as they are stored" if plan.layout == CHECKPOINT else "by mlx-lm"
    print(f"in:          {_mb(plan.bytes_in)}; {', '.join(_counts(plan)) or how}")
    for stem, tensors in plan.tensors.items():
        print(f"out:         {stem}: {_mb(sum(t.nbytes for t in tensors.values()))}")
    print(f"out, total:  {_mb(plan.nbytes)} in {mlx_path}")
    print(f"memory:      up to {_mb(memory_of(plan))}")
    print("missing:     nothing")


def _counts(plan: Plan) -> list[str]:
    counts = [f"{len(n)} of the {group} mapped" for group, n in plan.sources.items() if n]
    return counts + [f"{len(n)} of the {g} skipped" for g, n in plan.skipped.items() if n]


def memory_of(plan: Plan) -> int:
    """Estimate the peak memory in bytes: the process itself and the tensor that needs most."""
    return _PROCESS_BYTES + max(
        _working(tensor) for tensors in plan.tensors.values() for tensor in tensors.values()
    )


def _working(tensor: LazyTensor) -> int:
    """Bytes that a tensor needs; one that is made whole is held twice, as read and as written."""
    if not tensor.step or not tensor.shape:
        return tensor.held + 2 * tensor.nbytes
    block = min(tensor.step * tensor.nbytes // max(tensor.shape[0], 1), tensor.nbytes)
    return tensor.held + 2 * block


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
