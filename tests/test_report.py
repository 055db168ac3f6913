"""The report of a run: its parts against independent computations, its rules on synthetic curves and planted faults."""

import html.parser
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built, composed, run_script, trained
from PIL import Image
from scipy import stats
from sklearn import metrics

from analysis.report.calibration import BINS, best_temperature, calibrate
from analysis.report.comparison import Experiment, compare
from analysis.report.decomposition import parts_of
from analysis.report.measurements import Measured
from analysis.report.slices import confused_pairs, quarters, read_groups, slices_of
from core.errors import ConfigError, DataError, NumericalError
from data.sources.datasets import digits
from diagnosis.finding import Finding, ranked
from diagnosis.run_evidence import RunEvidence, SplitError
from diagnosis.run_rules import run_findings

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.thorough


def measured_of(logits: torch.Tensor, labels: torch.Tensor, names: list[str] | None = None) -> Measured:
    count = len(labels)
    return Measured(
        rows=torch.arange(count),
        labels=labels,
        logits=logits,
        brightness=torch.arange(count).float(),
        contrast=-torch.arange(count).float(),
        names=names or [str(row) for row in range(count)],
        total=count,
    )


@pytest.fixture
def measured() -> Measured:
    generator = torch.Generator().manual_seed(0)
    return measured_of(torch.randn(103, 5, generator=generator), torch.randint(5, (103,), generator=generator))


# Parts of the error


def test_parts_of_the_error_add_up_and_follow_the_order_of_the_splits():
    errors = {
        "test": SplitError(wrong=130, samples=1000),
        "train": SplitError(wrong=50, samples=1000),
        "val": SplitError(wrong=120, samples=1000),
        "train_dev": SplitError(wrong=90, samples=1000),
    }
    parts = parts_of(errors, human_error=0.01)
    assert {part.name: pytest.approx(part.size) for part in parts} == {
        "avoidable bias": 0.04,
        "variance": 0.04,
        "data mismatch": 0.03,
        "overfitting to validation": 0.01,
    }
    assert sum(part.size for part in parts) + 0.01 == pytest.approx(0.13)
    assert [part.is_significant for part in parts] == [True, True, True, False]
    # The 95% interval of a difference of two shares, by hand (with one right and one wrong prediction added).
    p, q = 51 / 1002, 91 / 1002
    assert parts[1].margin == pytest.approx(1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / 1002))
    without = parts_of({name: errors[name] for name in ("train", "val")}, human_error=None)
    assert [(part.name, round(part.size, 9)) for part in without] == [("avoidable bias", 0.05), ("variance", 0.07)]


# Calibration


def test_expected_calibration_error_equals_a_loop_over_bins():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(400, 4, generator=generator) * 3, torch.randint(4, (400,), generator=generator)
    probability, predicted = logits.double().softmax(1).max(1)
    expected = 0.0
    for number in range(BINS):
        inside = [row for row in range(400) if number / BINS < probability[row] <= (number + 1) / BINS]
        if inside:
            accuracy = sum(bool(predicted[row] == labels[row]) for row in inside) / len(inside)
            confidence = sum(float(probability[row]) for row in inside) / len(inside)
            expected += len(inside) / 400 * abs(accuracy - confidence)
    assert calibrate(logits, labels).error == pytest.approx(expected, abs=1e-12)


def test_temperature_undoes_logits_that_are_scaled():
    """Labels drawn from softmax(z) with logits 4 z: the temperature is 4, up to the noise of the labels."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert best_temperature(4 * logits, labels) == pytest.approx(4, rel=0.05)
    result = calibrate(4 * logits, labels)
    assert result.error > 0.1 > 0.02 > result.error_after


# Slices


def test_slices_count_errors_and_gains(measured):
    class_names = ["a", "b", "c", "d", "e"]
    slices = slices_of(measured, class_names, {"mine": torch.tensor([0, 5, 7])})
    recall = metrics.recall_score(measured.labels, measured.predicted, average=None)
    by_class = [each for each in slices if each.kind == "class"]
    assert [each.error.share for each in by_class] == pytest.approx(list(1 - recall))
    accuracy = metrics.accuracy_score(measured.labels, measured.predicted)
    for kind in ("class", "brightness", "contrast"):
        chosen = [each for each in slices if each.kind == kind]
        assert sum(each.error.samples for each in chosen) == 103
        assert sum(each.gain for each in chosen) == pytest.approx(1 - accuracy)
    (group,) = (each for each in slices if each.kind == "group")
    assert (group.name, group.error.samples) == ("mine", 3)
    assert group.error.wrong == int(measured.wrong[[0, 5, 7]].sum())


def test_quarters_are_equally_large_and_ordered():
    values = torch.tensor([3.0, 1, 1, 1, 9, 7, 5, 2])
    assert [values[mask].tolist() for mask in quarters(values)] == [[1, 1], [1, 2], [3, 5], [9, 7]]


def test_confused_pairs_are_the_largest_cells_off_the_diagonal(measured):
    names = ["a", "b", "c", "d", "e"]
    matrix = metrics.confusion_matrix(measured.labels, measured.predicted, labels=range(5))
    np.fill_diagonal(matrix, 0)
    pairs = confused_pairs(measured, names, most=3)
    assert [number for *_, number in pairs] == sorted(matrix.ravel(), reverse=True)[:3]
    assert all(matrix[names.index(label), names.index(predicted)] == number for label, predicted, number in pairs)


def test_groups_come_from_patterns_or_tags(tmp_path):
    paths = ["x/night-1.png", "x/day-1.png", "y/night-2.png"]
    measured = measured_of(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), paths)
    assert {name: rows.tolist() for name, rows in read_groups("*night*", measured).items()} == {"*night*": [0, 2]}
    table = tmp_path / "tags.csv"
    table.write_text("image,tags\nx/night-1.png,blurry dark\nday-1.png,blurry\nunknown.png,other\n")
    groups = {name: rows.tolist() for name, rows in read_groups(str(table), measured).items()}
    assert groups == {"blurry": [0, 1], "dark": [0]}
    with pytest.raises(ConfigError, match=r"report.groups = \*fog\*: selects no image"):
        read_groups("*fog*", measured)
    table.write_text("file,label\na,b\n")
    with pytest.raises(DataError, match="must have the columns image and tags; it has file, label"):
        read_groups(str(table), measured)


# Rules on synthetic evidence: ten classes, errors of 1,000 images


def evidence(
    losses: list[float],
    *,
    val: list[float] | None = None,
    train: float,
    held_out: float,
    overrides: tuple[str, ...] = (),
    **facts: Any,
) -> RunEvidence:
    """Return the evidence of a run with these losses at its evaluations, and with these errors."""
    lines = [
        {"step": 10 * number, "epoch": number, "train/loss": loss, "val/loss": other}
        for number, (loss, other) in enumerate(zip(losses, val or losses, strict=True), 1)
    ]
    shares = {"train": train, "val": held_out}
    defaults = {"status": "finished", "chance_error": 0.9, "num_classes": 10, "predicted_share": 0.12}
    defaults |= {"losses": {"train": losses[-1]}, "evaluated_step": 10 * len(losses)}
    return RunEvidence(
        lines=lines,
        errors={name: SplitError(wrong=round(1000 * share), samples=1000) for name, share in shares.items()},
        config=composed("schedule=cosine", "model.dropout=0.0", *overrides).record,
        **(defaults | facts),
    )


HEALTHY = [1.2, 0.6, 0.3, 0.15, 0.1, 0.08, 0.07, 0.065]
RISING = [1.3, 0.9, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]


@pytest.mark.parametrize(
    ("cause", "facts"),
    [
        (None, {"losses": HEALTHY, "train": 0.02, "held_out": 0.04}),
        (None, {"losses": [0.9, 0.5, 0.4, 0.37, 0.36, 0.355], "train": 0.02, "held_out": 0.05}),
        ("diverged", {"losses": [2.0, math.nan], "train": 0.9, "held_out": 0.9}),
        ("diverged", {"losses": [2.0, 1.0, 50.0], "train": 0.9, "held_out": 0.9}),
        ("lr_too_high", {"losses": [2.9, 3.4, 2.8, 3.3, 2.7, 1.2, 0.9, 0.8], "train": 0.2, "held_out": 0.22}),
        ("lr_too_low", {"losses": [2.30, 2.29, 2.28, 2.27, 2.265, 2.26], "train": 0.8, "held_out": 0.8}),
        (
            "constant_predictor",
            {"losses": [2.31, 2.3, 2.31, 2.3], "train": 0.9, "held_out": 0.9, "predicted_share": 1.0},
        ),
        ("labels_shuffled", {"losses": HEALTHY, "train": 0.0, "held_out": 0.9, "val": RISING}),
        ("overfit", {"losses": HEALTHY, "val": RISING, "train": 0.0, "held_out": 0.3}),
        ("stopped_too_early", {"losses": [2.0, 1.5, 1.1, 0.8], "train": 0.3, "held_out": 0.31}),
        ("underfit_capacity", {"losses": [2.0, 1.6, 1.5, 1.48, 1.47, 1.465], "train": 0.5, "held_out": 0.51}),
        (
            "regularisation_too_strong",
            {
                "losses": [2.2, 2.0, 1.9, 1.88, 1.87],
                "train": 0.6,
                "held_out": 0.6,
                "overrides": ("model.dropout=0.8",),
            },
        ),
        ("train_eval_mismatch", {"losses": HEALTHY, "train": 0.02, "held_out": 0.03, "measured": 1.5}),
    ],
)
def test_rules_name_the_planted_cause_first(cause, facts):
    """Also: every remedy that is an override composes."""
    measured = {"losses": {"train": facts["measured"]}} if "measured" in facts else {}
    given = {key: value for key, value in facts.items() if key not in ("measured", "losses")}
    findings = run_findings(replace(evidence(facts["losses"], **given), **measured))
    assert [finding.id for finding in findings][:1] == ([cause] if cause else [])
    for finding in findings:
        assert 0 < finding.probability < 1 and finding.explanation
        for override in finding.remedy:
            if "scripts/" not in override:
                composed("model=mlp", *shlex.split(override))


def test_test_error_above_the_validation_error_is_reported_only_if_it_is_significant():
    healthy = evidence(HEALTHY, train=0.02, held_out=0.04)
    for wrong, expected in ((55, []), (120, ["overfit_to_validation"])):
        errors = {**healthy.errors, "test": SplitError(wrong=wrong, samples=1000)}
        assert [finding.id for finding in run_findings(replace(healthy, errors=errors))] == expected


def test_findings_are_ranked_by_severity_then_probability():
    def finding(name: str, severity: str, probability: float) -> Finding:
        return Finding(id=name, severity=severity, probability=probability, explanation="", evidence={})

    chosen = [finding("a", "info", 0.9), finding("b", "error", 0.2), finding("c", "warning", 0.9)]
    assert [each.id for each in ranked([*chosen, finding("d", "error", 0.7)])] == ["d", "b", "c", "a"]


# Comparison of runs


def test_difference_of_experiments_is_that_of_a_paired_t_test():
    first = Experiment(name="a", runs=[], by_seed={0: 0.90, 1: 0.91, 2: 0.93, 7: 0.5})
    second = Experiment(name="b", runs=[], by_seed={2: 0.96, 0: 0.92, 1: 0.94})
    difference = compare(second, first, "val/accuracy")
    test = stats.ttest_rel([0.92, 0.94, 0.96], [0.90, 0.91, 0.93])
    interval = test.confidence_interval(0.95)
    assert difference.seeds == 3
    assert (difference.mean - difference.margin, difference.mean + difference.margin) == pytest.approx(
        (interval.low, interval.high)
    )
    assert difference.sentence == "b is better than a by 2.67 ± 1.43 points in val/accuracy on 3 seeds."
    assert compare(first, second, "val/loss").sentence.startswith("a is better than b by 0.0267")  # a lower loss
    single = compare(Experiment(name="c", runs=[], by_seed={0: 0.5}), first, "val/accuracy")
    assert (
        single.sentence == "c differs from a by -40.00 points in val/accuracy, but one seed says nothing about chance."
    )


def test_runs_are_compared_by_experiment(tmp_path):
    for name, lr in (("a", 0.05), ("b", 1e-6)):
        for seed in (0, 1):
            trained(tmp_path / f"{name}{seed}", f"optimizer.lr={lr}", f"seed={seed}", "trainer.max_epochs=4")
    runs = ",".join(f"{name}{seed}" for name in "ab" for seed in (0, 1))
    done = run_script(ROOT / "scripts/report.py", f"run=[{runs}]", "report.metric=val/loss", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out/report.json").read_text())
    summaries = {run: json.loads((tmp_path / run / "summary.json").read_text()) for run in runs.split(",")}
    losses = {run: summary["best"]["metrics"]["val/loss"] for run, summary in summaries.items()}
    assert [each["runs"] for each in content["experiments"]] == [["a0", "a1"], ["b0", "b1"]]
    (difference,) = content["differences"]
    expected = (losses["b0"] - losses["a0"] + losses["b1"] - losses["a1"]) / 2
    assert difference["mean"] == pytest.approx(expected) and difference["seeds"] == 2
    assert difference["sentence"] in done.stdout
    refused = run_script(ROOT / "scripts/report.py", "run=[a0,missing]", cwd=tmp_path)
    assert refused.returncode == 3 and "error[data] missing: is not a run folder" in refused.stderr


# Whole reports


def report(folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the content of report.json, after checks of the page."""
    done = run_script(ROOT / "scripts/report.py", f"run={folder}", *arguments, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)  # one file, without links to others
    html.parser.HTMLParser().feed(page)
    return json.loads((folder / "report.json").read_text())


def test_errors_of_the_report_are_those_of_evaluate(tmp_path):
    run = trained(tmp_path / "run", "model=mlp", "model.hidden=[32]", "data=digits", "trainer.max_epochs=4")
    content = report(tmp_path / "run", "report.human_error=0.01")
    for split in ("train", "val", "test"):
        done = run_script(ROOT / "scripts/evaluate.py", "run=run", f"split={split}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        expected = json.loads((tmp_path / "run" / f"evaluation-{split}.json").read_text())
        assert content["errors"][split]["share"] == pytest.approx(1 - expected["accuracy"])
        assert content["errors"][split]["samples"] == expected["samples"] == run.training.samples[split]
    assert content["human_error"] == 0.01 and content["analysed"] == "val"
    wrong = content["errors"]["val"]["wrong"]
    assert sum(pair["images"] for pair in content["confused"]) <= wrong and len(content["mistakes"]) == min(24, wrong)
    val = digits_split(run)
    for mistake in content["mistakes"]:
        assert str(val.labels[mistake["row"]].item()) == mistake["label"] != mistake["predicted"]


def digits_split(run: Any) -> Any:
    from trainer.build.training import build

    return build(replace(composed("model=mlp", "model.hidden=[32]", "data=digits", "trainer.max_epochs=4")))[1].val


def test_failed_run_is_reported_as_diverged(tmp_path):
    with pytest.raises(NumericalError):
        trained(tmp_path / "run", "optimizer.lr=1e30", "trainer.max_epochs=2")
    content = report(tmp_path / "run")
    assert content["status"] == "failed" and [finding["id"] for finding in content["findings"]] == ["diverged"]
    assert "optimizer.lr=1e+29" in content["findings"][0]["remedy"]


def test_run_without_any_evaluation_has_a_report(tmp_path):
    run = built(tmp_path / "run")
    run.folder.close()
    content = report(tmp_path / "run")
    assert content["status"] == "running or killed" and content["step"] == 0 and content["errors"]


def photos(root: Path, *, shuffled: bool) -> None:
    """Write 300 digits of three classes as image files; shuffled: into folders that do not depend on the image."""
    images = digits().train
    rows = (images.labels < 3).nonzero().flatten()[:300].tolist()
    for index, row in enumerate(rows):
        name = ["<b>zero</b>", "one & one", "$two$"][index % 3 if shuffled else int(images.labels[row])]
        (root / name.replace("/", "∕")).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[row, 0].numpy()).save(root / name.replace("/", "∕") / f"{index:03}.png")


@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffled_labels_are_found_in_a_folder_of_images(tmp_path, shuffled):
    photos(tmp_path / "photos", shuffled=shuffled)
    data = ("data=image_folder", f"data.root={tmp_path / 'photos'}", "data.image_size=8", "data.channels=1")
    model = ("model=mlp", "model.hidden=[256]", "optimizer=adam", "optimizer.lr=0.003")
    trained(tmp_path / "run", *data, *model, "trainer.max_epochs=60", "trainer.early_stopping.patience=null")
    content = report(tmp_path / "run", "report.groups=*[0-4].png")
    assert ("labels_shuffled" in [finding["id"] for finding in content["findings"]]) is shuffled
    assert any(each["kind"] == "group" for each in content["slices"])
    page = (tmp_path / "run/report.html").read_text()
    assert "<b>" not in page and "one &amp; one" in page and "&lt;b&gt;zero" in page
    assert all(mistake["image"].endswith(".png") for mistake in content["mistakes"])

    (tmp_path / "photos").rename(tmp_path / "moved")  # without its data, the report has what is left
    content = report(tmp_path / "run")
    assert content["errors"] == {} and "root=FOLDER" in content["notices"][0]
    assert report(tmp_path / "run", f"root={tmp_path / 'moved'}")["errors"]
