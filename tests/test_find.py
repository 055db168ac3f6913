"""The finders: rules on synthetic curves, a range test against a known bound, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import composed, run_script
from PIL import Image

from analysis.find import batch_size, data_amount, learning_rate
from analysis.find.batch_size import Throughput
from core.errors import NumericalError
from trainer.build.training import build

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.thorough


def geometric(lowest: float, highest: float, steps: int) -> list[float]:
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


def test_smoothing_equals_the_weighted_mean_of_all_losses():
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    for number, value in enumerate(learning_rate.smooth(losses), 1):
        weights = [0.9 ** (number - 1 - place) for place in range(number)]
        assert value == pytest.approx(sum(w * loss for w, loss in zip(weights, losses)) / sum(weights))


def test_suggestion_is_below_the_learning_rate_of_the_lowest_loss():
    """The loss falls between 1e-3 and 1e-2, stays, and explodes at 1."""
    rates = geometric(1e-4, 10, 101)
    curve = [(lr, max(1.0, min(2.0, 2 - math.log10(lr / 1e-3))) - 0.01 * lr if lr < 1 else 1 + 3 * lr) for lr in rates]
    lowest = min(range(101), key=learning_rate.smooth([loss for _, loss in curve]).__getitem__)
    suggestion = learning_rate.suggest(curve)
    assert suggestion is not None and suggestion.lr == pytest.approx(rates[lowest] / 2.5, rel=0.05)
    assert 0.1 < suggestion.lr < 1


def test_no_learning_rate_is_suggested_without_a_fall():
    rates = geometric(1e-5, 10, 50)
    assert learning_rate.suggest([(lr, 2.3) for lr in rates]) is None
    assert learning_rate.suggest([(lr, 2.3 + lr) for lr in rates]) is None
    assert learning_rate.suggest([(lr, 1 / lr) for lr in rates[:5]]) is None  # too few steps


def test_range_test_ends_where_gradient_descent_on_a_quadratic_diverges(monkeypatch):
    """On loss = c w^2 / 2, a step of size lr multiplies w by 1 - lr c: it diverges for lr > 2 / c."""
    training, _ = build(composed())
    curvature, weight = 10.0, torch.ones(())

    class Result:
        samples, metrics = 8, {}

    losses: list[float] = []

    def step(batches):
        lr = training.state.optimizer.param_groups[0]["lr"]
        losses.append(float(curvature * weight**2 / 2))
        noise = 0.3 * (-1) ** len(losses)
        weight.mul_(1 - lr * curvature).add_(lr * curvature * noise)
        return Result()

    step.clear_gradients = lambda: None
    monkeypatch.setattr(type(training), "step", step, raising=False)
    object.__setattr__(training, "step", step)
    monkeypatch.setattr(training.state.sums, "read", lambda: {"loss": losses[-1]})
    curve = learning_rate.range_test(training, lowest=1e-4, highest=10, steps=200)
    assert len(curve) < 200  # it ended early
    smoothed = learning_rate.smooth([loss for _, loss in curve])
    lowest = curve[min(range(len(curve)), key=smoothed.__getitem__)][0]
    assert 2 / curvature / 10 < lowest < curve[-1][0] < 10 * 2 / curvature
    suggestion = learning_rate.suggest(curve)
    assert suggestion is not None and suggestion.lr < 2 / curvature


def test_range_test_is_reproducible():
    curves = []
    for _ in range(2):
        training, _ = build(composed("model.dropout=0.2", "data.train_samples=200"))
        curves.append(learning_rate.range_test(training, lowest=1e-4, highest=1, steps=30))
    assert curves[0] == curves[1] and len(curves[0]) == 30
    assert [lr for lr, _ in curves[0]] == pytest.approx(geometric(1e-4, 1, 30))


def test_smallest_batch_near_the_highest_throughput_is_suggested():
    results = [
        Throughput(batch_size=8 * 2**power, samples_per_second=rate) for power, rate in enumerate((50, 90, 96, 100))
    ]
    assert batch_size.suggest(results).batch_size == 32


def test_batch_sizes_end_at_the_first_that_does_not_fit():
    def build_one(size: int):
        if size > 32:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return build(composed("data.train_samples=200", f"data.batch_size={size}"))[0]

    results, ending = batch_size.measure(build_one, [8, 16, 32, 64, 128], steps=2)
    assert [each.batch_size for each in results] == [8, 16, 32] and all(each.samples_per_second > 0 for each in results)
    assert ending == "batches of 64 do not fit into memory"
    with pytest.raises(NumericalError):
        batch_size.measure(lambda size: (_ for _ in ()).throw(NumericalError("loss", "NaN")), [8], steps=2)


def test_forecast_recovers_a_power_law():
    samples = [500, 500, 1000, 1000, 2000, 2000, 4000, 4000]
    exact = [3 * number**-0.5 for number in samples]
    result = data_amount.forecast(samples, exact, at=8000)
    assert result.error == pytest.approx(3 * 8000**-0.5) and result.exponent == pytest.approx(0.5)
    assert result.low == pytest.approx(result.high) and result.is_reliable
    # With noise of 5%, the 95% interval contains the true error in about 95 of 100 cases.
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        noise = (0.05 * torch.randn(8, generator=generator)).exp().tolist()
        result = data_amount.forecast(samples, [a * b for a, b in zip(exact, noise)], at=8000)
        inside += result.low <= 3 * 8000**-0.5 <= result.high
    assert 0.91 < inside / 300 < 0.985
    assert not data_amount.forecast([100, 200, 400, 800], [0.3, 0.1, 0.4, 0.2], at=1600).is_reliable


def find(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = run_script(ROOT / "scripts/find.py", *arguments, "trainer.threads=1", cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_command_prints_the_override_and_writes_plot_and_measurements(tmp_path):
    code, out, err = find(tmp_path, "find=lr", "model=mlp", "model.hidden=[32]", "find.dir=lr")
    assert code == 0, err
    content = json.loads((tmp_path / "lr/find.json").read_text())
    assert out.startswith(f"optimizer.lr={content['lr']:g} ") and 0.001 < content["lr"] < 1
    with Image.open(tmp_path / "lr/find.png") as image:
        assert min(image.size) > 300
    code, out, err = find(tmp_path, "find=batch_size", "model=mlp", "find.largest=64", "find.steps=2")
    assert code == 0 and out.startswith("data.batch_size="), err
    (folder,) = (tmp_path / "outputs").iterdir()
    content = json.loads((folder / "find.json").read_text())
    assert [each["batch_size"] for each in content["curve"]] == [8, 16, 32, 64]
    data = ("data.train_samples=400", "data.val_fraction=0.5", "data.batch_size=16", "trainer.max_epochs=2")
    code, out, err = find(tmp_path, "find=data", "data=synthetic", "model=mlp", *data, "find.dir=data")
    assert code == 0 and "with 400 training images the error will be" in out, err
    content = json.loads((tmp_path / "data/find.json").read_text())
    assert [each["samples"] for each in content["curve"]] == [25, 25, 50, 50, 100, 100, 200, 200]
    assert {path.name for path in tmp_path.iterdir()} == {"lr", "outputs", "data"}  # no run folder


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("find.dir=.",), 5, "exists already"),
        (("find.lowest=1", "find.highest=0.1"), 2, "find.highest = 0.1: must be above find.lowest = 1"),
        (("find=batch_size", "find.smallest=5000", "find.largest=9000"), 2, "must be at most 1294"),
        (("find=speed",), 2, "find = speed"),
        (("find=data", "data.val_fraction=0"), 2, "trainer.early_stopping.monitor"),
        (("find=data", "find.fractions=[1.0]"), 2, "must have at least three"),
        (("find=lr", "find.smallest=8"), 2, "find.smallest"),
        (("find.lowest=1e-12", "find.highest=1e-11", "model=mlp"), 4, "the loss does not fall"),
    ],
)
def test_wrong_values_end_in_one_line(tmp_path, arguments, code, text):
    returned, _, err = find(tmp_path, *arguments)
    assert returned == code and text in err and err.count("\n") == 1, err
