"""A run of the kind `serve`: what a service was asked and what it answered, of whichever experiment it was.

Its store has the machinery's tables and `requests`; it is shown, exported and verified without the experiment itself.
"""

from collections.abc import Mapping
from typing import Any, Literal

from rich.table import Table as Grid

from harness.errors import SettingsError
from harness.experiments.experiment import Case, Entry, Headline, Page, Prepared, Report, Section, Table
from harness.experiments.remarks import Remark
from harness.experiments.weights import Models
from harness.run import Manifest
from harness.settings import ExperimentSettings, Resolved
from harness.store import Reader, Row, Schema, Store, TableFacts

KIND = "serve"
"""What the manifest of such a run calls it."""
TABLE = "requests"
SCHEMA = Schema(
    KIND,
    (
        """
        CREATE TABLE requests (
            request_id BIGINT PRIMARY KEY, time TIMESTAMP, path VARCHAR, status INTEGER, request VARCHAR, answer VARCHAR,
            is_whole BOOLEAN, seconds DOUBLE);
        """,
    ),
    facts=TableFacts(
        sense={
            "requests: one before this is missing": "SELECT request_id FROM "
            "(SELECT request_id, row_number() OVER (ORDER BY request_id) AS place FROM requests) WHERE request_id <> place"
        },
    ),
)
_BY_PATH = """
    SELECT path, status, count(*) AS number, count(*) FILTER (NOT is_whole) AS cut, median(seconds) AS median_s,
           max(seconds) AS max_s
    FROM requests GROUP BY path, status ORDER BY path, status LIMIT 100
"""
_COLUMNS = ("path", "status", "requests", "broken off", "median seconds", "most")


def failed_in(store: Store) -> int:
    """Requests that the service refused or failed, whatever was right with them."""
    return int(store.query("SELECT count(*) AS n FROM requests WHERE status >= 500")[0]["n"])


class Requests:
    """What such a run is shown and checked by, in the place of an experiment. It has no stages and cannot be run."""

    other_model: Literal["none", "optional", "required"] = "optional"
    planted = "The bundled models are made to test the pipeline: what they answer says nothing of language models."
    settings: type[ExperimentSettings] = ExperimentSettings
    schema = SCHEMA
    stages: tuple[Entry, ...] = ()
    pages: tuple[Page, ...] = ()
    benches: Mapping[str, Case] = {}

    def __init__(self, experiment: str):
        """`experiment`: the name of the one that was served."""
        self.name = f"{KIND} {experiment}"
        self.title = f"Requests to harness serve {experiment}"
        self.sentence = "what a service was asked, and what it answered"

    def demo(self) -> Mapping[str, Any]:
        return {}

    def prepare(self, resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
        raise SettingsError(f"{self.name}: requests were asked by clients; there is nothing to run")

    def render(self, reader: Reader, manifest: Manifest) -> list[object]:
        table = Grid(title="Requests", title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "path" else "right")
        for row in reader.query(_BY_PATH):
            table.add_row(*_cells(row))
        return [_told(reader), *([table] if table.row_count else [])]

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        return []

    def headlines(self, reader: Reader, manifest: Manifest) -> list[Headline]:
        return []

    def report(self, reader: Reader, manifest: Manifest) -> Report:
        rows = [_cells(row) for row in reader.query(_BY_PATH)]
        table = Table("Requests by path and status", _COLUMNS, rows, absent="Nothing was asked.")
        return Report(
            question="What was the service asked, and what did it answer?",
            headlines=(_told(reader),),
            sections=(Section(TABLE, "Requests", ("Each is a row of the table `requests`.",), (table,)),),
        )

    def certify(self, prepared: Prepared, num_subjects: int) -> Mapping[str, list[dict[str, Any]]]:
        return {}


def _told(reader: Reader) -> str:
    row = reader.query("SELECT count(*) AS n, min(time) AS first, max(time) AS last FROM requests")[0]
    if not row["n"]:
        return "No request was recorded."
    return f"{row['n']:,} requests, from {row['first']:%Y-%m-%d %H:%M:%S} to {row['last']:%Y-%m-%d %H:%M:%S} UTC."


def _cells(row: Row) -> tuple[str, ...]:
    status = "none" if row["status"] is None else str(row["status"])
    return (
        row["path"],
        status,
        f"{row['number']:,}",
        f"{row['cut']:,}",
        *(f"{row[n]:.3f}" for n in ("median_s", "max_s")),
    )
