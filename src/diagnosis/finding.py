"""Finding: one diagnosis of a training, with its evidence and the overrides to try next."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the most severe first


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One diagnosis.

    `id` is the heading of its section in docs/diagnosis.md. `probability` is how often this evidence has this cause,
    0 to 1. `evidence` maps names to numbers or short texts, as JSON can store them. `remedy` has overrides to paste,
    the best first; it is empty if no option can help.
    """

    id: str
    severity: Severity
    probability: float
    explanation: str
    evidence: Mapping[str, float | int | str | None]
    remedy: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the finding as plain values, in the order in which a reader needs them."""
        values = asdict(self)
        return values | {"evidence": dict(self.evidence), "remedy": list(self.remedy)}


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings, the most severe first and, within a severity, the most probable first."""
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.probability))
