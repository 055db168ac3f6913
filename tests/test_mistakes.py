"""The figures at the end of a run: confusion matrix against scikit-learn, and the images of the worst mistakes."""

import numpy as np
import pytest
import torch
from conftest import trained
from sklearn import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.json_lines import read_lines
from trainer.inference.evaluation import Predictions
from trainer.report import mistakes

NAMES = ["cat", "d$o$g", "[red]bird", "a name of thirty characters...."]


class Loader:
    """Pixels of sample n: all n."""

    def read_pixels(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, None, None, None].expand(-1, 3, 4, 4).float()


def predictions_of(logits: torch.Tensor, labels: torch.Tensor, *, batch: int = 7) -> Predictions:
    predictions = Predictions()
    for some, right in zip(logits.split(batch), labels.split(batch), strict=True):
        predictions.add(some, right)
    return predictions


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))


def test_confusion_matrix_has_the_counts_of_scikit_learn(logits, labels):
    figure = mistakes.figures_of(predictions_of(logits, labels), Loader(), NAMES)["confusion_matrix"]
    (axes,) = figure.axes
    drawn = np.zeros((4, 4), int)
    for text in axes.texts:
        column, row = text.get_position()
        drawn[row, column] = int(text.get_text())
    expected = metrics.confusion_matrix(labels, logits.argmax(1), labels=range(4))  # row: label, column: prediction
    np.testing.assert_array_equal(drawn, expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == [name[:16] for name in NAMES]
    shares = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(axes.images[0].get_array(), shares, rtol=1e-6)


def test_worst_mistakes_are_the_most_probable_wrong_predictions(logits, labels):
    figure = mistakes.figures_of(predictions_of(logits, labels), Loader(), NAMES)["worst_mistakes"]
    probability = logits.softmax(1)
    expected = sorted(
        (row for row in range(60) if probability[row].argmax() != labels[row]), key=lambda row: -probability[row].max()
    )[:24]
    drawn = [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes if axes.images]
    assert drawn == expected
    first, guess = expected[0], int(probability[expected[0]].argmax())
    share = f"{probability[first, guess].item():.0%}"
    assert figure.axes[0].get_title() == f"{NAMES[labels[first]][:14]}\nnot {NAMES[guess][:14]} ({share})"


def test_figures_that_cannot_be_drawn_are_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(mistakes, "contact_sheet", lambda *_: 1 / 0)
    run = trained(tmp_path / "run", "trainer.log_images=true", "trainer.max_epochs=1", "optimizer.lr=1e-6")
    warnings = [line["text"] for line in read_lines(run.folder.path / "events.jsonl") if line["event"] == "warning"]
    assert [text for text in warnings if "no figures of the mistakes in TensorBoard: ZeroDivisionError" in text]
    assert run.folder.read_summary()["status"] == "finished"


def test_figures_are_off_with_log_images(tmp_path):
    for name, expected in (("true", {"test/confusion_matrix", "test/worst_mistakes"}), ("false", set())):
        run = trained(tmp_path / name, f"trainer.log_images={name}", "trainer.max_epochs=1", "optimizer.lr=1e-6")
        events = EventAccumulator(str(run.folder.path))
        events.Reload()
        assert {tag for tag in events.Tags()["images"] if tag.startswith("test/")} == expected


def test_perfect_model_has_no_worst_mistakes():
    labels = torch.arange(4)
    figures = mistakes.figures_of(predictions_of(torch.eye(4), labels), Loader(), NAMES)
    assert set(figures) == {"confusion_matrix"}
