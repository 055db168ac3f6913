"""The HTML page of a report: one file without links to other files, from a template beside this file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def render(template: str, report: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Return the page of a report, the content of report.json, with figures as data URLs by name.

    `template` is report.html.j2 or comparison.html.j2.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}%"
    environment.filters["points"] = lambda share: f"{100 * share:.1f}"
    return environment.get_template(template).render(report=report, figures=figures)
