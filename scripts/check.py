"""Check model and data of a training before its first step.

    python scripts/check.py data=cifar10 model=resnet20

The command takes the same arguments as train.py. It checks gradients against finite differences, the initial loss and
weights, gradients through the depth, whether one batch can be overfitted, duplicates between splits, classes, constant
images and differences between splits. It prints findings with overrides to try. Exit code 8: a finding is an error.
With run_dir=DIR, the findings are also written to DIR/check.json.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.declarations import TrainConfig

if __name__ == "__main__":
    launch("analysis.check.command.check_training", config_name="check", schema=TrainConfig)
