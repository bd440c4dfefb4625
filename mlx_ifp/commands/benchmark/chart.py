"""Where the time goes, as a chart: the columns of the paper's table of latencies, stacked."""

from typing import TYPE_CHECKING, Any

from ..plot.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    ("select_seconds", "selection", "#d62728"),
    ("load_seconds", "loading", "#ff7f0e"),
    ("prefill_seconds", "prefill", "#1f77b4"),
    ("decode_seconds", "decode", "#9ecae1"),
)


def chart(result: dict[str, Any]) -> "Figure":
    """A stacked bar for each row, a panel for each length of the prompt.

    Args:
        result (dict): of :func:`~mlx_ifp.commands.benchmark.command.benchmark`.
    """
    lengths, settings = result["lengths"], result["settings"]
    rows = max(len(one["rows"]) for one in lengths)
    figure = new_figure(9.0, len(lengths) * (0.42 * rows + 1.1) + 0.5)
    for number, one in enumerate(lengths, 1):
        axes = figure.add_subplot(len(lengths), 1, number)
        names = list(one["rows"])
        ends = [0.0] * len(names)
        for name, label, color in PARTS:
            seconds = [one["rows"][row].get(name, {}).get("median", 0.0) for row in names]
            axes.barh(names, seconds, left=ends, color=color, label=label)
            ends = [end + more for end, more in zip(ends, seconds, strict=True)]
        for place, end in enumerate(ends):
            axes.text(end, place, f" {end:.3g} s", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds, medians")
        samples = f", {settings['samples']} samples" if settings["samples"] > 1 else ""
        axes.set_title(
            f"{one['prompt_tokens']} tokens in, {settings['generation_tokens']} out{samples}",
            fontsize=10,
        )
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, ncols=len(PARTS), fontsize=8, loc="outside lower center")
    return figure
