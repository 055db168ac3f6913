"""Tables and the plot of the measurements of `bench/bench.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# {"unit": ..., "of": the contender that is compared with the others, contender: [one value per round], ...}
Line = dict[str, Any]
LABELS = {"ours": "Preceptor"}  # names of contenders in tables and plots, if they differ from those in bench.json
ACCENT = "#d1495b"  # colour of Preceptor's bars; all other bars are grey


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def label_of(contender: str) -> str:
    return LABELS.get(contender, contender)


def table_of(title: str, lines: Mapping[str, Line]) -> Any:
    """Return a table of medians over rounds, and of the median ratio of the `of` contender to each other one."""
    from rich.table import Table

    table = Table("contender", title=title, title_justify="left")
    for header in ("median", "unit", "relative to this row"):
        table.add_column(header, justify="right")
    for name, line in lines.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        of = line["of"]
        for contender, values in line.items():
            if contender in ("unit", "of"):
                continue
            ratio = median(value / other for value, other in zip(line[of], values, strict=True))
            comparison = "" if contender == of else f"{label_of(of)} = {ratio:.2f}x"
            table.add_row(f"  {label_of(contender)}", format_value(median(values)), line["unit"], comparison)
    return table


def plot(lines: Mapping[str, Line], path: Path) -> None:
    """Write the plot of the step benchmark: throughput as a share of the limit."""
    draw(shares_of_limit(lines)).savefig(path, dpi=110)


def shares_of_limit(lines: Mapping[str, Line]) -> dict[str, dict[str, list[float]]]:
    """Return {line: {contender: the quartiles over rounds of its throughput divided by the limit's}}."""
    return {
        name: {
            contender: quantiles([value / limit for value, limit in zip(values, line["limit"])], n=4)
            for contender, values in line.items()
            if contender not in ("unit", "of", "limit")
        }
        for name, line in lines.items()
    }


def draw(quartiles: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """Return a figure of medians (bars) and quartiles (error bars), with one group of bars per line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 1.1 * len(quartiles)), layout="constrained")
    axes = figure.subplots()
    contenders = list(next(iter(quartiles.values())))
    height = 0.8 / len(contenders)
    for number, contender in enumerate(contenders):
        positions = [position + number * height for position in range(len(quartiles))]
        low, middle, high = zip(*(line[contender] for line in quartiles.values()), strict=True)
        spread = [[m - q for q, m in zip(low, middle)], [q - m for q, m in zip(high, middle)]]
        bars = axes.barh(
            positions, middle, height, label=label_of(contender), xerr=spread, error_kw={"elinewidth": 0.8}
        )
        for bar in bars:
            bar.set(**style_of(contender, contenders))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([position + 0.4 - height / 2 for position in range(len(quartiles))], list(quartiles))
    axes.invert_yaxis()
    axes.set_xlabel("samples per second, as a share of the limit")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def style_of(contender: str, contenders: Sequence[str]) -> dict[str, Any]:
    """Return the style of a contender's bars: ACCENT for Preceptor, grey for the others.

    Each other framework has its own shade; its bars after the first (2 workers) are hatched.
    """
    if contender == "ours":
        return {"facecolor": ACCENT}
    framework = contender.partition(",")[0]
    variants = [name for name in contenders if name.partition(",")[0] == framework]
    shades = list(dict.fromkeys(name.partition(",")[0] for name in contenders if name != "ours"))
    grey = 0.55 + 0.3 * shades.index(framework) / max(1, len(shades) - 1)
    return {
        "facecolor": str(grey),
        "edgecolor": "white",
        "linewidth": 0.5,
        "hatch": "////" if contender != variants[0] else None,
    }
