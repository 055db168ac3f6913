"""All rules on a run that has ended: evidence -> findings.

The rules compare metrics of one run with each other, and with chance. They use no absolute threshold on a learning rate
or an accuracy: what is good depends on the data. docs/diagnosis.md explains each finding, and when it is wrong.
"""

from diagnosis.curve_rules import diverged, lr_too_high, lr_too_low, stopped_too_early, train_eval_mismatch
from diagnosis.error_rules import (
    constant_predictor,
    labels_shuffled,
    overfit,
    overfit_to_validation,
    regularisation_too_strong,
    underfit_capacity,
)
from diagnosis.finding import Finding, ranked
from diagnosis.run_evidence import RunEvidence


def run_findings(evidence: RunEvidence) -> list[Finding]:
    """Return the findings of a run, the most severe and most probable first; none for a healthy run."""
    if (failed := diverged(evidence)) is not None:
        return [failed]  # nothing else can be read from such a run
    rules = (
        constant_predictor,
        regularisation_too_strong,
        lr_too_high,
        lr_too_low,
        labels_shuffled,
        train_eval_mismatch,
        stopped_too_early,
        underfit_capacity,
        overfit,
        overfit_to_validation,
    )
    findings = [finding for rule in rules if (finding := rule(evidence)) is not None]
    causes = {finding.id for finding in findings} - {"overfit", "overfit_to_validation", "train_eval_mismatch"}
    if len(causes) > 1:  # a high train error has a more specific cause
        findings = [finding for finding in findings if finding.id != "underfit_capacity"]
    if causes & {"constant_predictor", "lr_too_high", "lr_too_low"}:  # a longer run does not help
        findings = [finding for finding in findings if finding.id != "stopped_too_early"]
    return ranked(findings)
