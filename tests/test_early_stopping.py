"""Early stopping: a table of sequences, and a second implementation that uses the full history at each epoch."""

import json
import math
import random
from fractions import Fraction
from typing import Any

import pytest

from trainer.monitor.early_stopping import EarlyStopping

NAN, INF = math.nan, math.inf


def stopping(**changes: Any) -> EarlyStopping:
    return EarlyStopping(**({"monitor": "val/loss", "mode": "min", "patience": 2} | changes))


def stops(stopper: EarlyStopping, value: float, epoch: float) -> bool:
    """Return whether training should stop after this evaluation."""
    stopper.observe(value, epoch)
    return stopper.stopped


def first_stop(values: list[float], **settings: Any) -> int | None:
    """Return the epoch, counted from 1, after which training stops."""
    stopper = stopping(**settings)
    return next((epoch for epoch, value in enumerate(values, 1) if stops(stopper, value, epoch)), None)


@pytest.mark.parametrize(
    ("values", "settings", "stop"),
    [
        # Patience: epochs since the best epoch
        ([3, 2, 1, 1, 1], {}, 5),  # an equal value is no improvement
        ([3, 2, 1, 0, -1], {}, None),
        ([1, 2, 0.5, 2, 2], {}, 5),
        ([1, 2], {"patience": 1}, 2),
        ([1, 2, 3, 4, 5, 6], {"patience": None}, None),
        # Improvements
        ([3, 2.95, 2.9, 2.85], {"min_delta": 0.1}, 3),  # each value is compared with the best, which stays 3
        ([3, 2.95, 2.89, 2.85, 2.8], {"min_delta": 0.1}, 5),
        ([1, 2, 3, 3, 3], {"mode": "max"}, 5),
        ([3, 2, 1], {"mode": "max"}, 3),
        ([1, 1.4, 1.5, 1.6], {"mode": "max", "min_delta": 0.5}, 3),
        # A non-finite value is never an improvement
        ([NAN, NAN, NAN], {}, 2),
        ([NAN, 3, NAN, NAN], {}, 4),
        ([-INF, -INF], {}, 2),
        ([3, INF, -INF], {"mode": "max"}, 3),
        # Geometric: stops after epoch e, counted from 1, if e >= max(patience, geometric x best epoch)
        ([1, 2, 2, 2, 2], {"patience": 4, "geometric": 2}, 4),
        ([3, 2, 1, 2, 2, 2, 2], {"patience": 4, "geometric": 2}, 6),
        ([3, 2, 1, 2, 0, *[2] * 6], {"patience": 4, "geometric": 2}, 10),
        ([3, 2, 1, 2, 2, 2], {"patience": 2, "geometric": 1.5}, 5),  # 1.5 x 3 = 4.5
        ([1, 2, 2], {"patience": 1, "geometric": 2}, 2),  # not after epoch 1, which is its own best epoch
        ([9, 8, 7, 6, 5, 4], {"patience": 3, "geometric": 1.1}, None),
    ],
)
def test_early_stopping_stops_at_the_expected_epoch(values, settings, stop):
    assert first_stop(values, **settings) == stop


def second_implementation(values: list[float], mode: str, patience: int, delta: float, factor: float | None) -> Any:
    sign = 1 if mode == "min" else -1
    for epoch in range(1, len(values) + 1):
        best, best_epoch = INF, 0
        for earlier in range(1, epoch + 1):
            value = sign * values[earlier - 1]
            if math.isfinite(value) and (best == INF or value < best - delta):
                best, best_epoch = value, earlier
        if factor is None:
            if best_epoch <= epoch - patience:
                return epoch
        elif epoch >= patience and epoch >= factor * best_epoch:
            return epoch
    return None


def test_early_stopping_equals_a_second_implementation_on_random_sequences():
    generator, stop_count = random.Random(0), 0
    for _ in range(3000):
        values = [generator.choice([NAN, INF, -INF, *range(8), *range(8)]) for _ in range(generator.randint(1, 25))]
        mode, patience, delta = (
            generator.choice(["min", "max"]),
            generator.randint(1, 6),
            generator.choice([0.0, 1.0, 2.5]),
        )
        factor = generator.choice([None, None, 1.5, 2.0])
        settings: dict[str, Any] = {"mode": mode, "patience": patience, "min_delta": delta, "geometric": factor}
        expected = second_implementation(values, mode, patience, delta, factor)
        assert first_stop(values, **settings) == expected, (values, settings)
        stop_count += expected is not None
    assert 1000 < stop_count < 3000


def test_state_dict_restores_the_early_stopping_decision():
    generator = random.Random(1)
    for _ in range(200):
        values = [generator.choice([NAN, *range(6)]) for _ in range(20)]
        uninterrupted, resumed = stopping(patience=4), stopping(patience=4)
        for epoch, value in enumerate(values, 1):
            decisions = stops(uninterrupted, value, epoch), stops(resumed, value, epoch)
            assert decisions[0] == decisions[1]
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = stopping(patience=4)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == uninterrupted.state_dict()


def test_patience_is_exact_for_rounded_fractions_of_epochs():
    """With evaluations every few steps, training stops `patience` epochs later, independent of rounding."""
    for steps_per_epoch in range(1, 40):
        for best in range(1, 80):
            for patience in (1, 2, 7):
                stopper = stopping(patience=patience)
                stopper.observe(1.0, round(best / steps_per_epoch, 4))
                last = best + patience * steps_per_epoch
                previous_epoch = round((last - 1) / steps_per_epoch, 4)
                case = (Fraction(best, steps_per_epoch), patience)
                assert not stops(stopper, 2.0, previous_epoch), case
                assert stops(stopper, 2.0, round(last / steps_per_epoch, 4)), case
