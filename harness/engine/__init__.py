"""Plan, skip what is done, execute, commit: knows no experiment, no stage by name and no tensor.

stage.py      what a stage is, its items and results; tables.py: what it reads
engine.py     stages of one run, in order; the only writer of its store
plan.py       items cut into batches, by memory and by time
chain.py      what the batches of a fold or loop hand on
staging.py    files, from who computes them to the run's folder
executors/    who computes batches
stop.py       signals that ask for an end
estimate.py   how long a run will take
"""

from harness.engine.engine import BatchReport as BatchReport
from harness.engine.engine import Engine as Engine
from harness.engine.engine import Limits as Limits
from harness.engine.engine import Observer as Observer
from harness.engine.engine import StageReport as StageReport
from harness.engine.engine import collect as collect
from harness.engine.stage import AnyStage as AnyStage
from harness.engine.stage import Artifact as Artifact
from harness.engine.stage import BatchOutput as BatchOutput
from harness.engine.stage import Chain as Chain
from harness.engine.stage import Item as Item
from harness.engine.stage import ItemResult as ItemResult
from harness.engine.stage import Stage as Stage
from harness.engine.tables import AnyTables as AnyTables
from harness.engine.tables import FileHandle as FileHandle
from harness.engine.tables import Tables as Tables
