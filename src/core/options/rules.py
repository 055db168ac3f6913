"""Rules: functions that build the checks of single values, for the declarations in core.options.declarations.

A rule takes a value. It returns None if the value is allowed, and otherwise a text that describes what is allowed.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import suggest

Rule = Callable[[Any], str | None]

DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(steps?|epochs?|samples?|%)\s*$")


def integer(low: int, high: int = 2**53) -> Rule:
    """Return the rule of an integer in [low, high]."""
    allowed = f"must be an integer >= {low}" + (f" and <= {high}" if high < 2**53 else "")
    return lambda value: None if type(value) is int and low <= value <= high else allowed


def number(low: float = -math.inf, high: float = math.inf, *, without: str = "") -> Rule:
    """Return the rule of a finite number in an interval. `without` excludes ends: `low`, `high` or `low high`."""
    above, below = ("low" in without), ("high" in without)

    def rule(value: Any) -> str | None:
        real = type(value) in (int, float) and math.isfinite(value)
        if real and (value > low if above else value >= low) and (value < high if below else value <= high):
            return None
        quoted = "; this is text: type it without quotes" if isinstance(value, str) and _is_number(value) else ""
        if high == math.inf:
            return f"must be a number {'>' if above else '>='} {low:g}{quoted}"
        return f"must be a number in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}{quoted}"

    return rule


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def one_of(*choices: Any) -> Rule:
    """Return the rule of a value that is one of a few."""
    spelled = ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)

    def rule(value: Any) -> str | None:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return None
        hint = suggest(value, [str(choice) for choice in choices]) if isinstance(value, str) else ""
        return f"must be one of {spelled}" + (f"; {hint}" if hint else "")

    return rule


def optional(rule: Rule) -> Rule:
    """Return a rule that allows null as well."""

    def checked(value: Any) -> str | None:
        allowed = None if value is None else rule(value)
        return allowed and f"{allowed}, or null"

    return checked


def either(*rules: Rule) -> Rule:
    """Return a rule that allows every value that at least one of several rules allows."""

    def rule(value: Any) -> str | None:
        refusals = [option(value) for option in rules]
        if None in refusals:
            return None
        return "must be " + ", or ".join(str(refusal).removeprefix("must be ") for refusal in refusals)

    return rule


def list_of(rule: Rule, *, length: int | None = None) -> Rule:
    """Return the rule of a list, optionally of a fixed length, whose items satisfy a rule."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            return "must be a list" + (f" of {length}" if length else "")
        wrong = next((allowed for item in value if (allowed := rule(item))), None)
        return wrong and f"each item {wrong}"

    return checked


def text(value: Any) -> str | None:
    """Allow text that is not empty."""
    return None if isinstance(value, str) and value else "must be text"


def file_path(value: Any) -> str | None:
    """Allow a path; the text `None`, which users of Python type for null, is not one."""
    allowed = isinstance(value, str) and value and value.lower() != "none"
    return None if allowed else "must be a path" + ("; for none type null" if str(value).lower() == "none" else "")


def like(pattern: re.Pattern[str], allowed: str, *, words: Sequence[str] = ()) -> Rule:
    """Return the rule of text that matches a pattern.

    `allowed` describes it in errors, which suggest the most similar of `words` for a misspelt value.
    """

    def rule(value: Any) -> str | None:
        if isinstance(value, str) and pattern.match(value):
            return None
        hint = suggest(value, words) if isinstance(value, str) else ""
        return f"must be {allowed}" + (f"; {hint}" if hint else "")

    return rule


def mapping_of(rule: Rule) -> Rule:
    """Return the rule of a section with any keys, whose values satisfy a rule."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return section(value)
        wrong = next((allowed for item in value.values() if (allowed := rule(item))), None)
        return wrong and f"each value {wrong}"

    return checked


def flag(value: Any) -> str | None:
    """Allow true and false."""
    return None if isinstance(value, bool) else "must be true or false"


def switched_off_by(override: str) -> Rule:
    """Return the rule of a section that cannot be null; the error names the override that turns it off."""
    return lambda value: None if isinstance(value, dict) else f"must be a section of keys; to turn it off: {override}"


def section(value: Any) -> str | None:
    """Allow a mapping, such as a config group."""
    return None if isinstance(value, dict) else "must be a section of keys (a config group)"


def duration(value: Any) -> str | None:
    """Allow a training duration > 0, such as `1 epoch`."""
    right = isinstance(value, str) and (match := DURATION.match(value)) and 0 < float(match[1]) <= 2**53
    return None if right else 'must be a duration > 0: "N steps", "N epochs", "N samples" or "N%"'
