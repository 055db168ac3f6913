"""Run a sweep: train with many configs, stop poor trials early, and write the best config as an experiment card.

python scripts/sweep.py                    20 trials of LeNet-5 on handwritten digits
python scripts/sweep.py sweep=tpe sweep.dir=DIR sweep.trials=50 sweep.parallel=4 model=mlp
python scripts/sweep.py ...                the same command resumes a sweep, also after it was killed
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import SweepConfig

if __name__ == "__main__":
    launch("sweeps.search.search", config_name="sweep", schema=SweepConfig)
