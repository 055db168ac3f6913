"""Find a value for a training: the learning rate, the batch size, or what more images would gain.

    python scripts/find.py find=lr model=mlp data=mnist
    python scripts/find.py find=batch_size model=resnet20 data=cifar10
    python scripts/find.py find=data model=lenet data=fashion_mnist

The command takes the arguments of train.py and the section `find`. It prints the override to paste, and writes the plot
find.png and the measurements find.json to find.dir.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import FindConfig

if __name__ == "__main__":
    launch("analysis.find.command.find", config_name="find", schema=FindConfig)
