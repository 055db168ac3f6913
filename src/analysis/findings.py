"""Findings in the terminal: severity, id, evidence, explanation, and the overrides to try."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console

from core.errors import printable


def show_findings(
    findings: Iterable[Mapping[str, Any]],
    console: Console,
    *,
    healthy: str,
    text_of: Callable[[Any], str] = str,
) -> None:
    """Print findings, as `Finding.as_json` returns them, or that there are none and what is `healthy`.

    `text_of` formats a value of the evidence.
    """
    findings = list(findings)
    if not findings:
        console.print(f"no finding: {healthy}")
    for finding in findings:
        numbers = ", ".join(f"{name} {text_of(value)}" for name, value in finding["evidence"].items())
        console.print(printable(f"{finding['severity']}: {finding['id']} ({numbers})"), markup=False)
        console.print(printable(f"  {finding['explanation']}"), markup=False)
        for override in finding["remedy"]:
            console.print(printable(f"  try: {override}"), markup=False)
