"""Plan, skip what is done, execute, commit: knows no experiment, no stage by name and no tensor.

engine.py     stages of one run, in order; the only writer of its store
plan.py       items cut into batches, by memory and by time
executors.py  who computes batches
stop.py       signals that ask for an end
estimate.py   how long a run will take
"""

from harness.engine.engine import BatchReport as BatchReport
from harness.engine.engine import Engine as Engine
from harness.engine.engine import Limits as Limits
from harness.engine.engine import Observer as Observer
from harness.engine.engine import Stage as Stage
from harness.engine.engine import StageReport as StageReport
from harness.engine.engine import Tables as Tables
from harness.engine.engine import collect as collect
