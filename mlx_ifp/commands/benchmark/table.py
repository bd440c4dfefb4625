"""What ``mlx_ifp.benchmark`` says: figures of its runs, as JSON has them and as text."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from .runs import (
    EXPERTS,
    FIRST,
    FULL,
    OVERLAPPING,
    REPEAT,
    SAME_SIZE,
    SELECTED,
    SWITCH,
    SWITCHES,
    Measured,
    Trial,
)

# The figures of a run: a name, the heading of its column, and how it is printed.
FIGURES = (
    ("select_seconds", "selection s", ".4f"),
    ("load_seconds", "loading s", ".4f"),
    ("prefill_seconds", "prefill s", ".4f"),
    ("first_token_seconds", "first token s", ".4f"),
    ("decode_seconds", "decode s", ".3f"),
    ("decode_tps", "decode tokens/s", ".1f"),
)
_SPREAD = ("min", "median", "max")
_TO_SELECT = ("select_seconds", "load_seconds")


def summary(measured: Measured) -> dict[str, Any]:
    """The figures of one length of the prompt.

    Returns:
        dict: ``rows``: row -> bytes and seconds; ``ratios`` and what is counted beside them; all
        trials. Measured figures are dicts of median, min and max over the trials.
    """
    trials, memory = measured.trials, measured.memory

    def over(figure: Callable[[Trial], float]) -> dict[str, float]:
        values = [figure(trial) for trial in trials]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def of_trial(row: str, name: str, trial: Trial) -> float:
        return trial["rows"][row][name]

    def of_row(row: str) -> dict[str, Any]:
        names = [name for name, *_ in FIGURES if row not in SWITCHES or name in _TO_SELECT]
        figures = {name: over(partial(of_trial, row, name)) for name in ["bytes_read", *names]}
        return figures | memory.get(row, {})

    def decode_to(trial: Trial, other: str) -> float:
        turns = (trial["rows"][row]["turn_seconds"] for row in (other, REPEAT))
        return statistics.median(theirs / ours for theirs, ours in zip(*turns, strict=True))

    def to_use(trial: Trial, row: str) -> float:
        return sum(trial["rows"][row][name] for name in _TO_SELECT)

    def loading_to(trial: Trial, name: str) -> float:
        return trial["rows"][FIRST]["load_seconds"] / trial[name]

    def dense_to_pruned(known: str) -> dict[str, float] | None:
        if "prefill" not in trials[0]:
            return None
        names = [f"{known}_{prefill}_seconds" for prefill in ("dense", "pruned")]
        return over(lambda t: t["prefill"][names[0]] / t["prefill"][names[1]])

    cold = "cold_load_seconds" in trials[0]

    def cold_to(name: str) -> dict[str, float] | None:
        return over(lambda t: t["cold_load_seconds"] / t[name]) if cold else None

    bytes_ratio = memory[FULL]["bytes_per_token"] / memory[REPEAT]["bytes_per_token"]
    weights = memory[FIRST]["weights_bytes"] + measured.predictor_bytes
    return {
        "prompt_tokens": measured.prompt_tokens,
        "rows": {row: of_row(row) for row in _order(trials[0]["rows"])},
        "ratios": {
            "decode_to_same_size": over(lambda t: decode_to(t, SAME_SIZE)),
            "decode_to_full": over(lambda t: decode_to(t, FULL)),
            "bytes_full_to_sub_network": bytes_ratio,
            "decode_to_full_of_bytes": over(lambda t: decode_to(t, FULL) / bytes_ratio),
            "decode_to_experts": over(lambda t: decode_to(t, EXPERTS))
            if EXPERTS in memory
            else None,
            "first_prompt_to_prefill": over(
                lambda t: to_use(t, FIRST) / t["rows"][FIRST]["prefill_seconds"]
            ),
            "first_prompt_dense_to_pruned": dense_to_pruned("first"),
            "known_task_dense_to_pruned": dense_to_pruned("known"),
            "loading_to_copy": over(lambda t: loading_to(t, "copy_seconds")),
            "cold_loading_to_read": cold_to("sequential_read_seconds"),
            "cold_loading_to_touched_read": cold_to("touched_read_seconds"),
            "peak_to_weights": memory[FIRST]["peak_memory_bytes"] / weights,
            "peak_to_weights_and_caches": memory[FIRST]["peak_memory_bytes"]
            / (weights + measured.kv_bytes),
        },
        "repeat_seconds": over(lambda t: to_use(t, REPEAT)),
        "switch_seconds": over(lambda t: to_use(t, SWITCH)),
        "copy_seconds": over(lambda t: t["copy_seconds"]),
        "cold_load_seconds": over(lambda t: t["cold_load_seconds"]) if cold else None,
        "sequential_read_seconds": over(lambda t: t["sequential_read_seconds"]) if cold else None,
        "touched_bytes": over(lambda t: t["touched_bytes"]) if cold else None,
        "overlap": over(lambda t: t["overlap"]),
        "overlapping_bytes_expected": over(
            lambda t: (1 - t["overlap"]) * t["rows"][FIRST]["bytes_read"]
        ),
        "predictor_bytes": measured.predictor_bytes,
        "kv_bytes": measured.kv_bytes,
        "notes": measured.notes,
        "warm_up": measured.warm_up,
        "trials": trials,
    }


def _order(rows: dict[str, Any]) -> list[str]:
    order = (FIRST, REPEAT, *SWITCHES, SAME_SIZE, FULL, EXPERTS)
    return [row for row in order if row in rows]


def heading(result: dict[str, Any]) -> str:
    """The lines that hold for all tables: the machine, the model, the number of trials."""
    machine, network = result["machine"], result["network"]
    how = network["quantization"]
    dtype = f"{how['bits']}-bit, {network['dtype']}" if how else network["dtype"]
    return "\n".join(
        [
            "mlx {mlx}, mlx-lm {mlx_lm}, {device}, {cores} cores".format(**machine),
            f"{dtype}, k = {network['k']} of {network['d_ffn']} channels in {network['layers']} "
            f"layers, selector {network['selector']}",
            f"Median of {result['settings']['num_trials']} trials, below it min-max",
        ]
    )


def table(one: dict[str, Any], settings: dict[str, Any]) -> str:
    """The :func:`summary` of one length as text, its ratios below it."""
    samples = settings["samples"]
    answers = f", {samples} samples, tokens/s of all" if samples > 1 else ""
    lines = [
        f"{one['prompt_tokens']} tokens in, {settings['generation_tokens']} out{answers}",
        "",
        " ".join(
            [
                f"{'network':<26}",
                *(f"{name:>15}" for _, name, _ in FIGURES),
                f"{'weights MB':>11} {'peak MB':>9}",
            ]
        ),
    ]
    for row, figures in one["rows"].items():
        medians, ranges = [f"{row:<26}"], [" " * 26]
        for name, _, form in FIGURES:
            # These networks are not selected, and they are loaded before the clock starts.
            if name not in figures or (name in _TO_SELECT and row not in SELECTED):
                medians.append(f"{'-':>15}")
                ranges.append(" " * 15)
                continue
            low, median, high = (f"{figures[name][which]:{form}}" for which in _SPREAD)
            medians.append(f"{median:>15}")
            ranges.append(f"{f'{low}-{high}':>15}")
        for name, width in (("weights_bytes", 11), ("peak_memory_bytes", 9)):
            said = f"{figures[name] / 1e6:.1f}" if name in figures else "-"
            medians.append(f"{said:>{width}}")
        lines += [" ".join(medians), " ".join(ranges).rstrip()]
    return "\n".join([*lines, "", *_ratios(one), *one["notes"]])


def _ratios(one: dict[str, Any]) -> list[str]:
    ratios, rows, cold = one["ratios"], one["rows"], one["warm_up"][FIRST]
    read, again = (rows[row]["bytes_read"]["median"] / 1e6 for row in (FIRST, OVERLAPPING))
    expected = one["overlapping_bytes_expected"]["median"] / 1e6
    peak = rows[FIRST]
    said = [
        ("decode, sub-network / same size", _text(ratios["decode_to_same_size"])),
        (
            "decode, sub-network / full model",
            f"{_text(ratios['decode_to_full'])}; bytes a token, full model / sub-network: "
            f"{ratios['bytes_full_to_sub_network']:.3f}; share of it reached: "
            f"{_text(ratios['decode_to_full_of_bytes'])}",
        ),
        ("decode, sub-network / mixture of experts", ratios["decode_to_experts"]),
        ("(selection + loading) / prefill", ratios["first_prompt_to_prefill"]),
        (
            "first prompt, dense prefill / pruned",
            _first_tokens(one, "first_prompt_dense_to_pruned", "first"),
        ),
        (
            "known task, dense prefill / pruned",
            _first_tokens(one, "known_task_dense_to_pruned", "known"),
        ),
        ("loading, warm / copy in memory", ratios["loading_to_copy"]),
        ("loading, warm, parts", _loading_parts(one)),
        ("loading, cold / sequential read", ratios["cold_loading_to_read"]),
        (
            "loading, cold / read of what it touches",
            ratios["cold_loading_to_touched_read"],
        ),
        (
            "peak / (trunk + active channels + predictor)",
            f"{ratios['peak_to_weights']:.3f}, "
            f"{peak['peak_memory_bytes'] / 1e6:.1f} of {peak['weights_bytes'] / 1e6:.1f} + "
            f"{one['predictor_bytes'] / 1e6:.1f} MB; with the KV cache's "
            f"{one['kv_bytes'] / 1e6:.1f} MB: {ratios['peak_to_weights_and_caches']:.3f}",
        ),
        ("a repeated task adds", f"{_text(one['repeat_seconds'], 1e3)} ms"),
        ("a switch between cached tasks adds", f"{_text(one['switch_seconds'], 1e3)} ms"),
        ("a first prompt reads", f"{read:.1f} MB of channels"),
        (
            "an overlapping task reads",
            f"{again:.1f} MB; overlap {_text(one['overlap'])}: {expected:.1f} MB are not in memory",
        ),
        (
            "the very first prompt took",
            f"{cold['select_seconds']:.3f} s to select, {cold['load_seconds']:.3f} s to load",
        ),
    ]
    return [
        f"{f'{name}:':<46} {value if isinstance(value, str) else _text(value)}"
        for name, value in said
        if value is not None
    ]


def _loading_parts(one: dict[str, Any]) -> str:
    """Medians of what loading consists of."""

    def median(name: str) -> float:
        return statistics.median(trial["loading_parts"][name] for trial in one["trials"])

    return (
        f"rows {median('rows'):.4f} s; alone, making their arrays {median('arrays'):.4f}, reading "
        f"the {median('touched_bytes') / 1e6:.1f} MB that are touched {median('read'):.4f}"
    )


def _first_tokens(one: dict[str, Any], ratio: str, known: str) -> str | None:
    """A ratio of times to the first token, and the medians of these; None if not measured."""
    if one["ratios"][ratio] is None:
        return None
    seconds = [
        statistics.median(trial["prefill"][f"{known}_{prefill}_seconds"] for trial in one["trials"])
        for prefill in ("dense", "pruned")
    ]
    text = _text(one["ratios"][ratio])
    return f"{text}; {seconds[0]:.4f} and {seconds[1]:.4f} s to the first token"


def _text(figure: dict[str, float], factor: float = 1) -> str:
    low, median, high = (f"{figure[which] * factor:.3f}" for which in _SPREAD)
    return f"{median} ({low}-{high})"
