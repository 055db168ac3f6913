"""Types of option values: a Python type, its range, and marks. core.options.declarations uses them."""

import re
from enum import Enum
from typing import Annotated, Literal

from core.options.rules import duration, file_path, integer, like, number


class Mark(Enum):
    """A property of an option besides its type and range."""

    FREE_ON_RESUME = "a resumed run may change it"
    NOT_COMPARED = "runs with other values are comparable: it changes no result"
    IS_PATH = "a path: `~` is expanded, and Hydra's quotes are added where they are needed"


FREE_ON_RESUME, NOT_COMPARED, IS_PATH = Mark.FREE_ON_RESUME, Mark.NOT_COMPARED, Mark.IS_PATH

DEVICE = re.compile(r"^(auto|cpu|mps|(cuda|xpu)(:\d{1,3})?)$")

# Types with a range

Count = Annotated[int, integer(1)]
CountOrZero = Annotated[int, integer(0)]
Pixels = Annotated[int, integer(1, 2**14)]
Positive = Annotated[float, number(0, without="low")]
NonNegative = Annotated[float, number(0)]
Share = Annotated[float, number(0, 1)]
ShareBelowOne = Annotated[float, number(0, 1, without="high")]
ShareAboveZero = Annotated[float, number(0, 1, without="low")]
OpenShare = Annotated[float, number(0, 1, without="low high")]
Duration = Annotated[str, duration]
FilePath = Annotated[str, IS_PATH, file_path]
Metric = Literal["train/loss", "train/accuracy", "val/loss", "val/accuracy"]
Mode = Literal["auto", "min", "max"]
Device = Annotated[
    str, like(DEVICE, "auto, cpu, cuda, cuda:N, mps or xpu", words=("auto", "cpu", "cuda", "mps", "xpu"))
]
Switch = Literal["auto", True, False]
