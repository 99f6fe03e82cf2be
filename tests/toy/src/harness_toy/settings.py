"""The settings of surprisal: the section `[toy]`."""

import math
from typing import Literal

from harness.settings import ExperimentSettings

UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}
"""How many of each unit a nat is."""


class ToySettings(ExperimentSettings):
    """What surprisal is counted in. Which texts are taken is said in `[data]`, which all experiments share."""

    unit: Literal["nats", "bits"] = "nats"
    """What surprisal is counted in."""
