"""Rules on the splits of a training: duplicates, classes, constant images, differences between splits."""

from diagnosis.finding import Finding, Severity, ranked
from diagnosis.start_evidence import DataEvidence


def data_findings(evidence: DataEvidence) -> list[Finding]:
    """Return the findings on the data before training, the most severe first; none for healthy data."""
    rules = (split_leak, missing_class, class_imbalance, constant_input, distribution_shift)
    return ranked(finding for rule in rules if (finding := rule(evidence)) is not None)


def split_leak(evidence: DataEvidence) -> Finding | None:
    """Images of a held-out split are also in the train split."""
    shares = {
        split: (evidence.duplicates.get(split, 0) + evidence.near.get(split, 0)) / number
        for split, number in evidence.compared.items()
        if number
    }
    leaking = {
        split: share for split, share in shares.items() if share >= 0.01 and share * evidence.compared[split] >= 5
    }
    if not leaking:
        return None
    exact = max(evidence.duplicates.get(split, 0) / evidence.compared[split] for split in leaking)
    severity: Severity = "error" if exact > 0.05 else "warning"
    texts = [f"{share:.1%} of {split}" for split, share in leaking.items()]
    return Finding(
        id="split_leak",
        severity=severity,
        probability=0.9,
        explanation=f"{' and '.join(texts)} are copies of training images, or nearly equal to one. Accuracy on them "
        f"measures memory. Examples: {'; '.join(evidence.examples.get(split, '') for split in leaking)}",
        evidence={
            **{f"exact copies in {split}": evidence.duplicates.get(split, 0) for split in leaking},
            **{f"nearly equal in {split}": evidence.near.get(split, 0) for split in leaking},
        },
    )


def missing_class(evidence: DataEvidence) -> Finding | None:
    """A split has no image of a class."""
    missing = {
        split: [name for name, number in counts.items() if number == 0] for split, counts in evidence.counts.items()
    }
    missing = {split: names for split, names in missing.items() if names}
    if not missing:
        return None
    texts = [f"{split} has no image of {', '.join(names[:5])}" for split, names in missing.items()]
    return Finding(
        id="missing_class",
        severity="error" if "train" in missing else "warning",
        probability=0.95,
        explanation=f"{'; '.join(texts)}. A class without training images is never learned; a class without "
        "held-out images is not measured.",
        evidence={f"classes missing in {split}": len(names) for split, names in missing.items()},
    )


def class_imbalance(evidence: DataEvidence) -> Finding | None:
    """The largest class has many times the training images of the smallest, and the loss has no class weights."""
    numbers = [number for number in evidence.counts["train"].values() if number]
    if not numbers or max(numbers) < 10 * min(numbers) or evidence.config["loss"].get("class_weights"):
        return None
    ordered = sorted(evidence.counts["train"], key=lambda name: evidence.counts["train"][name])
    return Finding(
        id="class_imbalance",
        severity="warning",
        probability=0.7,
        explanation=f"{ordered[-1]} has {max(numbers):,} training images and {ordered[0]} has {min(numbers):,}. "
        "Without class weights the model may ignore the small classes at a high accuracy.",
        evidence={"largest class": max(numbers), "smallest class": min(numbers)},
        remedy=("loss.class_weights=balanced",),
    )


def constant_input(evidence: DataEvidence) -> Finding | None:
    """Images without any content: all pixels are equal."""
    shares = {split: share for split, share in evidence.constant.items() if share > 0.01}
    if not shares:
        return None
    share = max(shares.values())
    return Finding(
        id="constant_input",
        severity="error" if share > 0.5 else "warning",
        probability=0.9,
        explanation=f"{', '.join(f'{each:.0%} of {split}' for split, each in shares.items())} are images whose pixels "
        "are all equal. They were lost when they were written or decoded; for 16-bit files see data.bits.",
        evidence={f"constant images in {split}": round(each, 4) for split, each in shares.items()},
    )


def distribution_shift(evidence: DataEvidence) -> Finding | None:
    """A simple statistic of the images differs between a held-out split and the train split."""
    large = {
        (split, name): difference
        for split, differences in evidence.shifts.items()
        for name, difference in differences.items()
        if abs(difference) > 0.5
    }
    if not large:
        return None
    texts = [f"{name} of {split} by {difference:+.1f}" for (split, name), difference in large.items()]
    return Finding(
        id="distribution_shift",
        severity="warning",
        probability=0.7,
        explanation=f"The splits differ, in standard deviations of the train split: {', '.join(texts)}. Metrics of "
        "such a split measure the difference too.",
        evidence={f"{split} {name}": round(difference, 3) for (split, name), difference in large.items()},
    )
