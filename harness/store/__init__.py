"""Where results are kept: one DuckDB file a run. The only package that imports duckdb.

schema.py   tables and views by version, the machinery's and one experiment's, and whether a file holds exactly those
writer.py   `Store`: the one process that writes a run
reader.py   `Reader`: everybody else, locked into a snapshot of it
rows.py     rows of an open store, whole or a piece at a time
snapshot.py which file of a run to read
seal.py     what a finished run was, so that a later change can be named
bench.py    a clean database for rows that came out of a store: digests, comparisons, exports
question.py a question of a reader's own, within limits
"""

from harness.store.bench import Format as Format
from harness.store.question import Answer as Answer
from harness.store.question import ask_locked as ask_locked
from harness.store.reader import Aligned as Aligned
from harness.store.reader import Broken as Broken
from harness.store.reader import Reader as Reader
from harness.store.reader import open_copy as open_copy
from harness.store.schema import AlteredStore as AlteredStore
from harness.store.schema import Row as Row
from harness.store.schema import Schema as Schema
from harness.store.schema import TableFacts as TableFacts
from harness.store.snapshot import open_snapshot as open_snapshot
from harness.store.writer import Batch as Batch
from harness.store.writer import BatchResult as BatchResult
from harness.store.writer import BatchStatus as BatchStatus
from harness.store.writer import Failure as Failure
from harness.store.writer import Store as Store
from harness.store.writer import TableSeal as TableSeal
from harness.store.writer import certificate as certificate
