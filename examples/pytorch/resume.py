"""States of a run, from which it goes on with the same losses."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from options import STATE, fail

SAME = ("model", "teacher", "stage", "keep", "select_by", "predictor_layers", "predictor_model",
        "predictor_llm", "predictor_head", "prefill",
        "mask", "mask_operator", "mask_temperature", "mask_temperature_start", "blend_iters",
        "distill_weight", "distill_on", "batch_tokens", "grad_accumulation_steps", "seed",
        "dtype")  # fmt: skip


def identity(args: Any, examples: list[Any], processes: int) -> dict[str, Any]:
    """What two sessions of one run have in common, as JSON gives it back."""
    parts = repr([(e.offset, e.tokens, e.selecting) for e in examples]).encode()
    more = {"data": hashlib.sha256(parts).hexdigest(), "processes": processes}
    return json.loads(json.dumps({name: getattr(args, name) for name in SAME} | more))


def states(output: Path) -> list[Path]:
    """All states of a run, the last one last."""
    return sorted((output / STATE).glob("step-*"))


def save_state(accelerator: Any, output: Path, where: dict[str, Any]) -> None:
    """Save all that accelerate has prepared, and where the run is; older states go afterwards."""
    older, target = states(output), output / STATE / f"step-{where['iteration']:08}"
    temporary = target.with_name(".saving")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=False)
    if accelerator.is_main_process:
        (temporary / "run.json").write_text(json.dumps(where))
        temporary.rename(target)
        for other in older:
            shutil.rmtree(other)
    accelerator.wait_for_everyone()


def load_state(accelerator: Any, output: Path, own: dict[str, Any]) -> dict[str, Any]:
    """Load the last state, and say where the run was; it ends if that is of another run."""
    found = states(output)
    if not found:
        raise fail(f"{output / STATE} holds no state; start again with another --output")
    where = json.loads((found[-1] / "run.json").read_text())
    for name, value in own.items():
        theirs = where["identity"].get(name)
        if theirs != value:
            raise fail(
                f"{found[-1]} is of another run: its {name} is {theirs!r}, here it is {value!r}; "
                "resume with the same, or name another --output"
            )
    accelerator.load_state(str(found[-1]))
    return where
