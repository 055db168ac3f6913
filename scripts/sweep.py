"""Search over configs: many trainings, the poor ones ended early, the best one written down.

scripts/sweep.py                                    20 trials of LeNet-5 on handwritten digits
scripts/sweep.py sweep=tpe sweep.dir=DIR sweep.trials=50 sweep.parallel=4 model=mlp
scripts/sweep.py ...                                the same command goes on, after a kill too
"""

from core.command_line import launch
from core.config import Config
from core.schema import SWEEP


def sweep(config: Config) -> None:
    """Run the trials that are left, and write the report."""
    from sweeps.execute.sweep import search  # optuna is imported here, when the config is known to be good

    search(config)


if __name__ == "__main__":
    launch(sweep, config_name="sweep", rules=SWEEP)
