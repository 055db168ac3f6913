"""Early stopping: a table of sequences, and a second implementation that sees the whole past at once."""

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


def stops(machine: EarlyStopping, value: float, epoch: float) -> bool:
    """Whether training should stop after this evaluation."""
    machine.observe(value, epoch)
    return machine.stopped


def first_stop(values: list[float], **settings: Any) -> int | None:
    """The epoch, from 1, after which it stops."""
    machine = stopping(**settings)
    return next((epoch for epoch, value in enumerate(values, 1) if stops(machine, value, epoch)), None)


@pytest.mark.parametrize(
    ("values", "settings", "stop"),
    [
        # Patience: epochs since the best one
        ([3, 2, 1, 1, 1], {}, 5),  # an equal value is no improvement
        ([3, 2, 1, 0, -1], {}, None),
        ([1, 2, 0.5, 2, 2], {}, 5),
        ([1, 2], {"patience": 1}, 2),
        ([1, 2, 3, 4, 5, 6], {"patience": None}, None),
        # What counts as an improvement
        ([3, 2.95, 2.9, 2.85], {"min_delta": 0.1}, 3),  # each is measured from the best, which stays 3
        ([3, 2.95, 2.89, 2.85, 2.8], {"min_delta": 0.1}, 5),
        ([1, 2, 3, 3, 3], {"mode": "max"}, 5),
        ([3, 2, 1], {"mode": "max"}, 3),
        ([1, 1.4, 1.5, 1.6], {"mode": "max", "min_delta": 0.5}, 3),
        # What is not finite never is one
        ([NAN, NAN, NAN], {}, 2),
        ([NAN, 3, NAN, NAN], {}, 4),
        ([-INF, -INF], {}, 2),
        ([3, INF, -INF], {"mode": "max"}, 3),
        # Geometric: after epoch e from 1 when e >= max(patience, geometric x best epoch)
        ([1, 2, 2, 2, 2], {"patience": 4, "geometric": 2}, 4),
        ([3, 2, 1, 2, 2, 2, 2], {"patience": 4, "geometric": 2}, 6),
        ([3, 2, 1, 2, 0, *[2] * 6], {"patience": 4, "geometric": 2}, 10),
        ([3, 2, 1, 2, 2, 2], {"patience": 2, "geometric": 1.5}, 5),  # 1.5 x 3 = 4.5
        ([1, 2, 2], {"patience": 1, "geometric": 2}, 2),  # not after epoch 1: its best is its own
        ([9, 8, 7, 6, 5, 4], {"patience": 3, "geometric": 1.1}, None),
    ],
)
def test_stops_at_the_epoch_of_the_table(values, settings, stop):
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


def test_random_sequences_agree_with_a_second_implementation():
    draw, stops = random.Random(0), 0
    for _ in range(3000):
        values = [draw.choice([NAN, INF, -INF, *range(8), *range(8)]) for _ in range(draw.randint(1, 25))]
        mode, patience, delta = draw.choice(["min", "max"]), draw.randint(1, 6), draw.choice([0.0, 1.0, 2.5])
        factor = draw.choice([None, None, 1.5, 2.0])
        settings: dict[str, Any] = {"mode": mode, "patience": patience, "min_delta": delta, "geometric": factor}
        expected = second_implementation(values, mode, patience, delta, factor)
        assert first_stop(values, **settings) == expected, (values, settings)
        stops += expected is not None
    assert 1000 < stops < 3000


def test_state_dict_restores_the_decision():
    draw = random.Random(1)
    for _ in range(200):
        values = [draw.choice([NAN, *range(6)]) for _ in range(20)]
        straight, resumed = stopping(patience=4), stopping(patience=4)
        for epoch, value in enumerate(values, 1):
            answers = stops(straight, value, epoch), stops(resumed, value, epoch)
            assert answers[0] == answers[1]
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = stopping(patience=4)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == straight.state_dict()


def test_fractions_of_epochs_as_the_trainer_rounds_them():
    """Evaluated every few steps: `patience` epochs later it stops, whatever the last bits of the fractions."""
    for steps_per_epoch in range(1, 40):
        for best in range(1, 80):
            for patience in (1, 2, 7):
                machine = stopping(patience=patience)
                machine.observe(1.0, round(best / steps_per_epoch, 4))
                last = best + patience * steps_per_epoch
                before = round((last - 1) / steps_per_epoch, 4)
                place = (Fraction(best, steps_per_epoch), patience)
                assert not stops(machine, 2.0, before), place
                assert stops(machine, 2.0, round(last / steps_per_epoch, 4)), place
