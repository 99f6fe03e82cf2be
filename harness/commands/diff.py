"""`harness diff`: what two runs were made of, where that differs, and how far apart their results are, row by row.

Reads snapshots only; runs no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from harness import log
from harness.commands.recognise import experiment_of
from harness.experiments.experiment import Experiment, Headline
from harness.run import Manifest, RunPaths, read_manifest, state
from harness.run.differences import manifest_differences, shortened
from harness.store import Aligned, Reader, Schema
from harness.store.snapshot import open_snapshot
from harness.tolerance import TOLERANCE

CLOCKED = ("seconds",)
"""Columns that tell how long something took."""
Verdict = Literal["identical", "rounding", "apart"]


class ColumnDrift(NamedTuple):
    """A column whose values are not all the same. The sizes are None where values are not numbers with a fraction."""

    column: str
    num_rows: int
    max_abs: float | None
    max_rel: float | None
    scaled: float
    """Largest |a − b| / max(1, |a|, |b|); infinite where a value is there in one run only."""
    worst: str
    """Key of the row that is furthest apart."""


@dataclass(frozen=True)
class TableDrift:
    """One table of two runs: its rows are matched by their keys."""

    table: str
    num_rows: int
    """Rows that both have."""
    only_one: int
    only_other: int
    columns: tuple[ColumnDrift, ...]

    @property
    def is_equal(self) -> bool:
        return not (self.columns or self.only_one or self.only_other)


def command(one: RunPaths, other: RunPaths, *, ends_in_1: bool) -> int:
    """Print how two runs differ. 0; with `ends_in_1`, 1 where a measured value differs, or rows are missing.

    Rows of an analysis that only one version of the code makes are counted in what is printed, and differ from nothing.
    """
    manifests = [read_manifest(paths) for paths in (one, other)]
    experiments = [experiment_of(manifest) for manifest in manifests]
    for name, paths, manifest in zip("AB", (one, other), manifests, strict=True):
        log.print_out(f"{name} = {paths.run_id} ({state(manifest)})")
    log.print_out(*render_manifests(*manifests))
    if experiments[0].name != experiments[1].name:
        log.print_out(f"A is a run of {experiments[0].name}, B of {experiments[1].name}: no table of theirs compares.")
        return 1 if ends_in_1 else 0
    experiment = experiments[0]
    with open_snapshot(one, experiment.schema) as a, open_snapshot(other, experiment.schema) as b:
        drifts = compare_results(a, b)
        log.print_out(*render_headlines(experiment, (a, b), manifests), *render_results(drifts))
    sources = {manifest.code.source_sha256 for manifest in manifests}
    grows = experiment.schema.grows if len(sources) > 1 else ()
    return 1 if ends_in_1 and not all(d.is_equal or (d.table in grows and not d.columns) for d in drifts) else 0


def compare_results(one: Reader, other: Reader) -> list[TableDrift]:
    """Every measured table that both runs have."""
    there = set(one.tables()) & set(other.tables())
    return [
        joined([table_drift(name, piece) for piece in one.aligned(other, name)])
        for name in one.schema.measured
        if name in there
    ]


def table_drift(table: str, rows: Aligned) -> TableDrift:
    """How far apart the rows are that two sides have in common."""
    drifts = [
        drift
        for column in rows.one.column_names
        if column not in (*rows.key, *CLOCKED) and (drift := _column_drift(column, rows)) is not None
    ]
    return TableDrift(table, len(rows.one), rows.only_one, rows.only_other, tuple(drifts))


def joined(pieces: Sequence[TableDrift]) -> TableDrift:
    """One table's drift from those of its pieces, in the order of its key."""
    first, *rest = pieces
    columns = {c.column: c for c in first.columns}
    for c in (c for piece in rest for c in piece.columns):
        was = columns.get(c.column)
        columns[c.column] = c if was is None else _both(was, c)
    return TableDrift(
        first.table,
        sum(p.num_rows for p in pieces),
        sum(p.only_one for p in pieces),
        sum(p.only_other for p in pieces),
        tuple(columns.values()),
    )


def _both(one: ColumnDrift, other: ColumnDrift) -> ColumnDrift:
    worst = other if other.scaled > one.scaled else one
    return ColumnDrift(
        one.column,
        one.num_rows + other.num_rows,
        _larger(one.max_abs, other.max_abs),
        _larger(one.max_rel, other.max_rel),
        worst.scaled,
        worst.worst,
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def verdict(drifts: Sequence[TableDrift], dtype: str, schema: Schema) -> Verdict:
    """Whether results are the same bits, the same up to rounding in `dtype` (as a share of max(1, |x|)), or something else."""
    if all(d.is_equal for d in drifts):
        return "identical"
    tolerance = TOLERANCE[dtype].nats
    judged = [d for d in drifts if d.table not in schema.derived]
    is_near = not any(d.only_one or d.only_other for d in judged) and all(
        c.scaled <= tolerance for d in judged for c in d.columns if c.column not in schema.ranks
    )
    return "rounding" if is_near else "apart"


def render_manifests(one: Manifest, other: Manifest) -> Iterator[Table | str]:
    """What the runs were made of, where it differs."""
    if one.fingerprint == other.fingerprint:
        yield "The fingerprints are equal: what decides results is the same."
    changes = manifest_differences(one.tree, other.tree)
    if not changes:
        yield "The manifests say the same of identity, settings, code, packages, numerics and machine."
        return
    table = Table(title="Manifests", title_justify="left")
    for column in ("part", "key", "A", "B"):
        table.add_column(column, overflow="fold")
    for part, d in changes:
        table.add_row(part, d.key, shortened(d.old), shortened(d.new))
    yield table


def render_headlines(
    experiment: Experiment, readers: Sequence[Reader], manifests: Sequence[Manifest]
) -> Iterator[Table]:
    """What the experiment calls its headlines, side by side, where any of them differs."""
    a, b = (
        {(h.subject, h.measure): h for h in experiment.headlines(reader, manifest)}
        for reader, manifest in zip(readers, manifests, strict=True)
    )
    if a == b:
        return
    table = Table(title="Headline results, with their 95 % intervals", title_justify="left")
    for column in ("of", "measure", "A", "B", "B − A"):
        table.add_column(column, justify="left" if column in ("of", "measure") else "right")
    for key in sorted(a.keys() | b.keys()):
        first, second = a.get(key), b.get(key)
        apart = f"{second.value - first.value:+.4f}" if first and second else ""
        table.add_row(*key, _estimate(first), _estimate(second), apart)
    yield table


def _estimate(found: Headline | None) -> str:
    if found is None:
        return "–"
    interval = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.value:.4f}{interval}"


def render_results(drifts: Sequence[TableDrift]) -> Iterator[Table | str]:
    """How far apart the measured tables are."""
    equal = [f"{d.table} ({d.num_rows:,})" for d in drifts if d.is_equal]
    if len(equal) == len(drifts):
        yield f"All {len(drifts)} measured tables are equal, bit for bit: {', '.join(equal)}."
        return
    table = Table(title="Results", title_justify="left")
    for column in (
        "table",
        "rows in both",
        "only A",
        "only B",
        "column",
        "rows apart",
        "max abs",
        "max rel",
        "furthest apart",
    ):
        numeric = column not in ("table", "column", "furthest apart")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for d in (d for d in drifts if not d.is_equal):
        for n, c in enumerate(d.columns or (ColumnDrift("", 0, None, None, 0.0, ""),)):
            counts = (f"{d.num_rows:,}", f"{d.only_one:,}", f"{d.only_other:,}") if n == 0 else ("", "", "")
            sizes = ("" if v is None else f"{v:.1e}" for v in (c.max_abs, c.max_rel))
            apart = f"{c.num_rows:,}" if c.column else ""
            table.add_row(d.table if n == 0 else "", *counts, c.column, apart, *sizes, c.worst)
    yield table
    yield f"Equal, bit for bit: {', '.join(equal) or 'no table'}."


def _column_drift(name: str, rows: Aligned) -> ColumnDrift | None:
    one, other = (side.column(name).combine_chunks() for side in (rows.one, rows.other))
    if one.equals(other):
        return None
    if _is_number(one.type) and _is_number(other.type):
        found = _numbers_apart(one, other)
    elif _is_numbers(one.type) and _is_numbers(other.type):
        found = _lists_apart(one, other)
    else:
        found = None
    if found is None:
        apart = [i for i, (a, b) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True)) if a != b]
        return ColumnDrift(name, len(apart), None, None, np.inf, _key_of(rows, apart[0])) if apart else None
    row, gap, scale = found
    if not len(row):  # 0.0 and -0.0 are equal numbers and other bits; they are counted as equal
        return None
    scaled = gap / np.maximum(1.0, scale)
    worst = int(np.argmax(scaled))
    return ColumnDrift(
        name,
        len(np.unique(row)),
        float(gap.max()),
        float((gap / scale).max()),
        float(scaled[worst]),
        _key_of(rows, int(row[worst])),
    )


class _Apart(NamedTuple):
    """The numbers that differ: the row each is in, how far it is apart, and the larger magnitude of the two."""

    row: np.ndarray
    gap: np.ndarray
    scale: np.ndarray


def _numbers_apart(one: pa.Array, other: pa.Array) -> _Apart | None:
    """None where a number is there on one side only."""
    if not one.is_null().equals(other.is_null()):
        return None
    there = np.flatnonzero(one.is_valid().to_numpy(zero_copy_only=False))
    a, b = (side.drop_null().to_numpy(zero_copy_only=False).astype(np.float64) for side in (one, other))
    return _where_apart(there, a, b)


def _lists_apart(one: pa.Array, other: pa.Array) -> _Apart | None:
    """As `_numbers_apart`, of every number of every list; None where lists are not equally long."""
    lengths = [pc.call_function("list_value_length", [side]).fill_null(-1) for side in (one, other)]
    if not lengths[0].equals(lengths[1]):
        return None
    values = [side.flatten() for side in (one, other)]
    row = np.repeat(np.arange(len(one)), np.maximum(lengths[0].to_numpy(), 0))
    apart = _numbers_apart(*values)
    return None if apart is None else apart._replace(row=row[apart.row])


def _where_apart(row: np.ndarray, a: np.ndarray, b: np.ndarray) -> _Apart:
    apart = a != b
    a, b = a[apart], b[apart]
    return _Apart(row[apart], np.abs(a - b), np.maximum(np.abs(a), np.abs(b)))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind)


def _is_numbers(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) and _is_number(kind.value_type)


def _key_of(rows: Aligned, index: int) -> str:
    return ", ".join(str(rows.one.column(name)[index].as_py()) for name in rows.key)
