"""How the measurements of `bench/bench.py` are shown: a table of each part, and a plot of the steps."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Line = dict[str, Any]  # unit, the contender that ratios are `of`, and what each reached in each round


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def table_of(part: str, lines: Mapping[str, Line]) -> Any:
    """Medians, and the median ratio of the line's own to each."""
    from rich.table import Table

    table = Table("contender", title=part, title_justify="left")
    for title in ("median", "unit", "ratio"):
        table.add_column(title, justify="right")
    for name, line in lines.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        of = line["of"]
        for contender, values in line.items():
            if contender in ("unit", "of"):
                continue
            ratio = median(one / other for one, other in zip(line[of], values, strict=True))
            told = "" if contender == of else f"{of} = {ratio:.2f} of it"
            table.add_row(f"  {contender}", shown(median(values)), line["unit"], told)
    return table


def plot(lines: Mapping[str, Line], path: Path) -> None:
    """The steps of each network: medians, their spread over rounds, as shares of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 1.1 * len(lines)), layout="constrained")
    contenders = [name for name in next(iter(lines.values())) if name not in ("unit", "of", "limit")]
    height = 0.8 / len(contenders)
    for number, contender in enumerate(contenders):
        shares = [[one / limit for one, limit in zip(line[contender], line["limit"])] for line in lines.values()]
        places = [place + number * height for place in range(len(lines))]
        middles = [median(found) for found in shares]
        spread = [[m - quantiles(found, n=4)[0] for m, found in zip(middles, shares)]]
        spread += [[quantiles(found, n=4)[2] - m for m, found in zip(middles, shares)]]
        axes.barh(places, middles, height, label=contender, xerr=spread, error_kw={"elinewidth": 0.8})
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(lines))], list(lines))
    axes.invert_yaxis()
    axes.set_xlabel("samples a second, as a share of the limit")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
