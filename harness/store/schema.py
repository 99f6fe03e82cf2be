"""What a store may hold: the machinery's tables and those of one experiment, by version, and whether a file holds exactly those.

A store may come from a stranger. Its views run when they are read and its macros stand before DuckDB's own functions, so
nothing of it is asked before every object in it has been compared with what the migrations of its version make.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from harness.errors import StoreError

Row = dict[str, Any]
DATABASE = "run"
"""What every connection calls the store it has attached."""

# The machinery's own tables, for every experiment. Numbered from 1. Never edit one: append another.
CORE: tuple[str, ...] = (
    """
    CREATE TABLE artifacts (
        path VARCHAR PRIMARY KEY, kind VARCHAR, sha256 VARCHAR, bytes BIGINT, shape INTEGER[], dtype VARCHAR,
        stage VARCHAR, batch_id INTEGER, item_key VARCHAR, keys MAP(VARCHAR, VARCHAR));
    CREATE TABLE sanity_items (
        measurement VARCHAR, subject VARCHAR, num_items INTEGER, max_abs DOUBLE, max_rel DOUBLE, flips INTEGER,
        near_ties INTEGER, tolerance DOUBLE, worst VARCHAR, repeated VARCHAR, ok BOOLEAN, left_out BOOLEAN, seconds DOUBLE,
        PRIMARY KEY (measurement, subject));
    CREATE TABLE stages (
        stage VARCHAR PRIMARY KEY, version INTEGER, status VARCHAR, num_items INTEGER, num_done INTEGER,
        num_failed INTEGER, seconds DOUBLE, tokens BIGINT, num_rows BIGINT DEFAULT 0, prefill_tokens BIGINT DEFAULT 0,
        padding_tokens BIGINT DEFAULT 0);
    CREATE TABLE batches (
        stage VARCHAR, batch_id INTEGER, parent INTEGER, status VARCHAR, keys VARCHAR[], num_items INTEGER,
        padded_tokens BIGINT, seconds DOUBLE, peak_bytes BIGINT, attempt INTEGER, tokens BIGINT, prefill_tokens BIGINT,
        padding_tokens BIGINT, work_s DOUBLE,
        PRIMARY KEY (stage, batch_id));
    CREATE SEQUENCE event_ids;
    CREATE TABLE events (
        event_id BIGINT PRIMARY KEY DEFAULT nextval('event_ids'), time TIMESTAMP, level VARCHAR,
        stage VARCHAR, batch_id INTEGER, item_key VARCHAR, kind VARCHAR, message VARCHAR);
    CREATE VIEW sanity AS
        SELECT measurement, sum(num_items)::INTEGER AS num_items, max(max_abs) AS max_abs, max(max_rel) AS max_rel,
               sum(flips)::INTEGER AS flips, sum(near_ties)::INTEGER AS near_ties, max(tolerance) AS tolerance,
               first(worst ORDER BY ok, max_abs DESC, subject) FILTER (NOT left_out) AS worst,
               first(repeated ORDER BY ok, max_abs DESC, subject) FILTER (repeated IS NOT NULL) AS repeated,
               bool_and(ok) AS ok, (count(*) FILTER (left_out))::INTEGER AS num_left_out,
               coalesce(list(subject ORDER BY subject) FILTER (left_out), []) AS left_out
        FROM sanity_items GROUP BY measurement;
    """,
)
CORE_NAME = "core"
"""What the table of applied migrations calls the machinery."""
_MEASURED_OF_CORE = ("artifacts",)
"""Of the machinery's tables those that tell what was measured; the others tell how a run went, which a clock has a part in."""
_CORE_APART = 1
"""How many of CORE a store has once its experiment's first migration after `made_core` has set the machinery apart."""


@dataclass(frozen=True)
class TableFacts:
    """What those who check, compare and export tables should know of them."""

    derived: tuple[str, ...] = ()
    """Tables that rest on measured ones, or hold their hashes: what rounding does to them says nothing more."""
    grows: tuple[str, ...] = ()
    """Tables that another version of the code may have more rows of, of the same measurements."""
    ranks: tuple[str, ...] = ()
    """Columns that hold orders of things that may be equally large; the sizes stand in columns of their own."""
    not_exported: tuple[str, ...] = ()
    """Tables and views that say nothing that another does not."""
    orphans: Mapping[str, str] = field(default_factory=dict)
    """A query for each name: the keys of rows that belong to no row, where they should."""
    sense: Mapping[str, str] = field(default_factory=dict)
    """A query for each name, which says what is wrong: the keys of rows that make no sense."""


_WHOLE = "stage NOT IN (SELECT stage FROM events WHERE kind = 'chain_ended' AND stage IS NOT NULL)"
"""A stage whose items rest on one another ends where one fails, and says so."""
_CORE_FACTS = TableFacts(
    derived=("sanity_items", "artifacts"),
    sense={
        "stages: not every item is done or failed": "SELECT stage FROM stages WHERE status <> 'running' "
        f"AND num_done + num_failed <> num_items AND {_WHOLE}",
        "batches: planned, and never computed": "SELECT stage, b.batch_id FROM batches b JOIN stages s USING (stage) "
        f"WHERE b.status = 'planned' AND s.status <> 'running' AND {_WHOLE}",
        "batches: not as many keys as items": "SELECT stage, batch_id FROM batches WHERE num_items <> len(keys)",
    },
)


class Version(NamedTuple):
    """How many migrations of the machinery and of the experiment a store has; `core` 0 before the two were apart."""

    core: int
    own: int


EMPTY = Version(0, 0)


@dataclass(frozen=True)
class Schema:
    """What a store holds: the machinery's tables and those of one experiment.

    `migrations` are numbered from 1, each applied once, in one transaction with the record that it was. They are never
    edited, only appended. The first `made_core` of them made the machinery's tables themselves, before those were apart,
    and the one after sets them apart; 0 for every experiment that began later. `order`: its measured tables, where they
    are to be sealed and listed in another order than that in which they were made.
    """

    experiment: str
    migrations: tuple[str, ...]
    made_core: int = 0
    order: tuple[str, ...] = ()
    facts: TableFacts = field(default_factory=TableFacts, hash=False)

    @property
    def version(self) -> int:
        """The number of the experiment's last migration."""
        return len(self.migrations)

    @property
    def newest(self) -> Version:
        return Version(len(CORE), len(self.migrations))

    @property
    def tables(self) -> tuple[str, ...]:
        """Every table but the record of migrations: those measured, then the machinery's."""
        return self.measured + self.machinery

    @property
    def views(self) -> tuple[str, ...]:
        """Views of the newest version, the experiment's own first."""
        of_core = _core_made().views
        return tuple(name for name in _made(self, self.newest).views if name not in of_core) + of_core

    @property
    def machinery(self) -> tuple[str, ...]:
        """Tables that tell how a run went."""
        return tuple(name for name in _core_made().tables if name not in _MEASURED_OF_CORE)

    @property
    def measured(self) -> tuple[str, ...]:
        """Tables that tell what a run measured: these are compared, and their hashes are in the manifest."""
        found = [name for name in _made(self, self.newest).tables if name not in (*self.machinery, _RECORD_NAME)]
        own = [name for name in found if name not in _MEASURED_OF_CORE]
        default = [*own, *_MEASURED_OF_CORE]
        places = {name: n for n, name in enumerate((*self.order, *(n for n in default if n not in self.order)))}
        return tuple(sorted(found, key=places.__getitem__))

    @property
    def derived(self) -> tuple[str, ...]:
        """As `TableFacts.derived`, the machinery's too; so the next ones."""
        return self.facts.derived + _CORE_FACTS.derived

    @property
    def grows(self) -> tuple[str, ...]:
        return self.facts.grows + _CORE_FACTS.grows

    @property
    def ranks(self) -> tuple[str, ...]:
        return self.facts.ranks + _CORE_FACTS.ranks

    @property
    def not_exported(self) -> tuple[str, ...]:
        return self.facts.not_exported + _CORE_FACTS.not_exported

    @property
    def orphans(self) -> Mapping[str, str]:
        return {**self.facts.orphans, **_CORE_FACTS.orphans}

    @property
    def sense(self) -> Mapping[str, str]:
        return {**self.facts.sense, **_CORE_FACTS.sense}

    def packed(self) -> dict[str, Any]:
        """All that a reader in another process needs of it, for JSON."""
        return {"experiment": self.experiment, "migrations": self.migrations, "made_core": self.made_core}

    @classmethod
    def unpacked(cls, told: Mapping[str, Any]) -> "Schema":
        """The inverse of `packed`."""
        return cls(told["experiment"], tuple(told["migrations"]), told["made_core"])


DROPPED = "what it rested on was measured again, and it is not among the items any more"
FAILED = (  # an item's last word counts: failed, or recovered or dropped since
    "SELECT item_key FROM events WHERE stage = ? AND kind IN ('failed_item', 'recovered_item', 'dropped_item') "
    "GROUP BY item_key HAVING arg_max(kind, event_id) = 'failed_item' ORDER BY item_key"
)


class Entry(NamedTuple):
    """One object of a store: its kind, schema, name, and how it is defined."""

    kind: str
    schema: str
    name: str
    sql: str | None


class AlteredStore(StoreError):
    """A store that holds something else than a schema's own objects; `problems` names each."""

    def __init__(self, path: Path, problems: list[str]):
        self.problems = problems
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        super().__init__(
            f"{path}: not a results store as harness writes them, so nothing of it is read: {shown}; "
            "take the run from where it was made"
        )


# Every function by its full name: an unqualified one could be the store's own macro.
_CATALOG = " UNION ALL ".join(
    f"SELECT '{kind}', schema_name, {name}, {sql} FROM system.main.duckdb_{kind}s() WHERE database_name = '{DATABASE}'"
    for kind, name, sql in (
        ("table", "table_name", "sql"),
        ("view", "view_name", "sql"),
        ("function", "function_name", "macro_definition"),
        ("schema", "schema_name", "sql"),
        ("type", "type_name", "logical_type"),
        ("sequence", "sequence_name", "sql"),
        ("indexe", "index_name", "sql"),
        ("trigger", "trigger_name", "sql"),
    )
)


def catalog(con: duckdb.DuckDBPyConnection) -> frozenset[Entry]:
    """Every object of the attached store, DuckDB's own in it included; reads no row of it and runs nothing of it."""
    found = (Entry(*row) for row in con.execute(_CATALOG).fetchall())
    # A sequence tells where it stands as its start.
    return frozenset(
        e._replace(sql=re.sub(r"START \d+", "", e.sql or "")) if e.kind == "sequence" else e for e in found
    )


class _Made(NamedTuple):
    """What migrations make: every object; tables and views in the order in which they were made; the tables' keys."""

    entries: frozenset[Entry]
    tables: tuple[str, ...]
    views: tuple[str, ...]
    keys: Mapping[str, tuple[str, ...]]


def expected(schema: Schema, version: Version) -> frozenset[Entry]:
    """What a store of this version holds; EMPTY: what an empty file does."""
    return _made(schema, version).entries


def primary_keys(schema: Schema, version: Version) -> Mapping[str, tuple[str, ...]]:
    """The columns of each table's key in a store of this version, which `check` has found to be one."""
    return _made(schema, version).keys


@lru_cache(maxsize=256)
def _made(schema: Schema, version: Version) -> _Made:
    return _made_by(sql for step in _lineage(schema, version) for sql in step.statements)


@lru_cache(maxsize=1)
def _core_made() -> _Made:
    return _made_by(CORE)


def _made_by(statements: Iterable[str]) -> _Made:
    with duckdb.connect(":memory:") as con:
        con.execute(f"ATTACH ':memory:' AS {DATABASE}")
        con.execute(f"USE {DATABASE}")
        for sql in statements:
            con.execute(sql)
        tables, views = (
            tuple(
                row[0]
                for row in con.execute(
                    f"SELECT {kind}_name FROM duckdb_{kind}s() WHERE database_name = '{DATABASE}' AND NOT internal "
                    f"ORDER BY {kind}_oid"
                ).fetchall()
            )
            for kind in ("table", "view")
        )
        keys = con.execute(
            "SELECT table_name, constraint_column_names FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'"
        ).fetchall()
        return _Made(catalog(con), tables, views, {name: tuple(columns) for name, columns in keys})


class _Step(NamedTuple):
    """One migration: whose it is, its number, where it is recorded, and what it does."""

    whose: str
    number: int
    record: str
    statements: tuple[str, ...]


def _lineage(schema: Schema, version: Version) -> Iterator[_Step]:
    """The steps that lead from an empty file to this version, in the order in which a new store takes them."""
    old = schema.made_core
    for number in range(1, min(version.own, old) + 1):
        begin = (_VERSIONS,) if number == 1 else ()
        yield _Step(schema.experiment, number, _VERSIONS_NAME, (*begin, schema.migrations[number - 1]))
    if old and version.own > old:
        yield _Step(schema.experiment, old + 1, _RECORD_NAME, (schema.migrations[old],))
    for number in range(_CORE_APART + 1 if old else 1, version.core + 1):
        begin = (_RECORD,) if number == 1 else ()
        yield _Step(CORE_NAME, number, _RECORD_NAME, (*begin, CORE[number - 1]))
    for number in range(old + 2 if old else 1, version.own + 1):
        yield _Step(schema.experiment, number, _RECORD_NAME, (schema.migrations[number - 1],))


def check(con: duckdb.DuckDBPyConnection, path: Path, schema: Schema) -> Version:
    """The version of the attached store, EMPTY for an empty file. Asks nothing of it that it could answer by its own code.

    Raises AlteredStore where an object is missing, is not as this version's migrations make it, or is not of them, and
    StoreError for a store of another experiment or of a newer harness.
    """
    found = catalog(con)
    if found == expected(schema, EMPTY):
        return EMPTY
    recorded = _recorded(con, found, path, schema)
    known = _versions(schema)
    if recorded is not None and recorded in known and expected(schema, recorded) == found:
        return recorded
    version = next((v for v in reversed(known) if expected(schema, v) == found), None)
    if version is not None:
        told = [_told_version(schema, v) for v in (recorded or EMPTY, version)]
        raise AlteredStore(path, [f"{_record_name(version)} records {told[0]}, its tables are those of {told[1]}"])
    if recorded is not None and (recorded.own > schema.version or recorded.core > len(CORE)):
        told = [_told_version(schema, v) for v in (recorded, schema.newest)]
        raise StoreError(f"{path}: has schema {told[0]}, this harness knows up to {told[1]}; use a newer harness")
    nearest = min(known, key=lambda v: len(expected(schema, v) ^ found))
    raise AlteredStore(path, _told(found, expected(schema, nearest)))


def migrate(con: duckdb.DuckDBPyConnection, schema: Schema, current: Version) -> None:
    """Apply what is missing, each migration in one transaction with its record: a crash leaves it pending, never half done."""
    applied = {(step.whose, step.number) for step in _lineage(schema, current)}
    for step in _lineage(schema, schema.newest):
        if (step.whose, step.number) in applied:
            continue
        con.execute("BEGIN")
        try:
            for sql in step.statements:
                con.execute(sql)
            whose = [] if step.record == _VERSIONS_NAME else [step.whose]
            values = [*whose, step.number, utc_now()]
            con.execute(f"INSERT INTO {step.record} VALUES ({', '.join('?' * len(values))})", values)
            con.execute("COMMIT")
        except BaseException:
            with suppress(duckdb.Error):  # a failed COMMIT has ended it already
                con.execute("ROLLBACK")
            raise


def quoted(path: os.PathLike[str] | str) -> str:
    """A path as it stands between quotes in SQL."""
    return str(path).replace("'", "''")


def identifier(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def utc_now() -> datetime:
    """UTC without a zone: DuckDB hands out zoned times only where pytz is installed."""
    return datetime.now(UTC).replace(tzinfo=None)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


_RECORD_NAME, _VERSIONS_NAME = "migrations", "schema_version"
_RECORD = (
    "CREATE TABLE migrations (experiment VARCHAR, number INTEGER, applied TIMESTAMP, PRIMARY KEY (experiment, number))"
)
_VERSIONS = "CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied TIMESTAMP)"
"""The record of stores that were made before the machinery's tables were apart."""


def _versions(schema: Schema) -> list[Version]:
    """Every version that a store of this schema may have, oldest first."""
    old = schema.made_core
    own = range(old + 1 if old else 0, schema.version + 1)
    apart = [Version(core, n) for core in range(1, len(CORE) + 1) for n in own]
    return [Version(0, n) for n in range(1, min(old, schema.version) + 1)] + apart


def _recorded(con: duckdb.DuckDBPyConnection, found: frozenset[Entry], path: Path, schema: Schema) -> Version | None:
    """The version that a store records of itself; None where it has no table for it that is one.

    The table is read by its full name and without a function, so nothing else of the store has a part in the answer.
    """
    if _entries(_RECORD) <= found:
        rows = con.execute(f"SELECT experiment, number FROM {DATABASE}.main.{_RECORD_NAME}").fetchall()
        others = sorted({name for name, _ in rows} - {CORE_NAME, schema.experiment})
        if others:
            shown = ", ".join(repr(name[:60]) for name in others[:3])
            raise StoreError(
                f"{path}: holds results of the experiment {shown}, expected those of {schema.experiment!r}"
            )
        core, own = (max((n for name, n in rows if name == of), default=0) for of in (CORE_NAME, schema.experiment))
        return Version(core, own)
    if _entries(_VERSIONS) <= found:
        if not schema.made_core:
            raise StoreError(
                f"{path}: holds results of a harness that knew one experiment, expected those of {schema.experiment!r}"
            )
        rows = con.execute(f"SELECT version FROM {DATABASE}.main.{_VERSIONS_NAME}").fetchall()
        return Version(0, max((row[0] for row in rows), default=0))
    return None


@lru_cache(maxsize=2)
def _entries(record: str) -> frozenset[Entry]:
    """The objects that making a record's table adds to an empty store."""
    return _made_by((record,)).entries - _made_by(()).entries


def _record_name(version: Version) -> str:
    return _RECORD_NAME if version.core else _VERSIONS_NAME


def _told_version(schema: Schema, version: Version) -> str:
    """The experiment's number; and the machinery's, where it is not the newest."""
    is_usual = version.core == len(CORE) or (not version.core and version.own <= schema.made_core)
    return f"{version.own}" if is_usual else f"{version.own} (machinery {version.core})"


def _told(found: frozenset[Entry], wanted: frozenset[Entry]) -> list[str]:
    """One line for each object that differs."""
    kinds = {"function": "macro", "indexe": "index"}
    names = sorted({(e.kind, e.schema, e.name) for e in found ^ wanted})
    there, due = ({(e.kind, e.schema, e.name) for e in entries} for entries in (found, wanted))
    hows = (
        "is missing" if n not in there else "is not of this schema" if n not in due else "is defined otherwise"
        for n in names
    )
    return [
        f"{kinds.get(kind, kind)} {name if schema == 'main' else f'{schema}.{name}'} {how}"
        for (kind, schema, name), how in zip(names, hows, strict=True)
    ]
