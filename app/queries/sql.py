"""A reader's own questions to a run: examples, what there is to ask about, the answer and its files."""

import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st

from app import queries
from harness import asking
from harness.run import RunPaths
from harness.spreadsheet import defused
from harness.store import Answer

MAX_ROWS = 10_000
LIMIT_S = 10.0
EXAMPLES: dict[str, str] = {
    "Slow batches": "SELECT * EXCLUDE (keys)\nFROM batches\nORDER BY seconds DESC\nLIMIT 20",
    "Events": "SELECT level, kind, count(*) AS number, any_value(message) AS example\nFROM events\nGROUP BY ALL\nORDER BY ALL",
}
"""What can be asked of any run; an experiment has examples of its own."""


def columns(paths: RunPaths) -> pd.DataFrame:
    """table, column, type of all that can be asked about, by table and in the order of its columns."""
    return queries.ask(
        paths,
        'SELECT table_name AS "table", column_name AS "column", data_type AS type FROM information_schema.columns '
        "WHERE table_catalog = 'run' ORDER BY table_name, ordinal_position",
    )


def answer(paths: RunPaths, sql: str) -> Answer:
    """What a query gives. Raises HarnessError, in one line, for one that is wrong, not allowed, or too slow."""
    return _answer(str(paths.live), queries.published(paths), sql)


def for_spreadsheets(rows: pa.Table) -> tuple[pa.Table, int]:
    """The same with its text, names of columns included, made harmless for a spreadsheet; and how many cells that changed."""
    columns, number = [], sum(name != defused(name) for name in rows.column_names)
    for column in rows.columns:
        if _is_text(column.type):
            text = column.to_pylist()
            safe = [None if v is None else defused(v) for v in text]
            number += sum(was != now for was, now in zip(text, safe, strict=True))
            column = pa.array(safe, pa.string())
        columns.append(column)
    return pa.table(columns, names=[defused(name) for name in rows.column_names]), number


def as_csv(rows: pa.Table) -> bytes:
    """UTF-8 CSV; lists and structures as JSON, so that they can be read back."""
    shown = {}
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        values = column.to_pylist() if _is_told_as_text(column.type) else column.to_pandas()
        shown[name] = [_json(v) for v in values] if pa.types.is_nested(column.type) else values
    return pd.DataFrame(shown).to_csv(index=False).encode()


def as_parquet(rows: pa.Table) -> bytes:
    """A Parquet file; what the format does not have, such as an interval, as text."""
    kept = [
        pa.array([None if v is None else str(v) for v in c.to_pylist()], pa.string())
        if pa.types.is_interval(c.type)
        else c
        for c in rows.columns
    ]
    file = io.BytesIO()
    pq.write_table(pa.table(kept, names=rows.column_names), file)
    return file.getvalue()


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def _is_told_as_text(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or pa.types.is_temporal(kind)


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


@st.cache_data(max_entries=8, show_spinner="Asking …")
def _answer(live: str, published: float, sql: str) -> Answer:
    return asking.answer(Path(live), queries.schema_of(Path(live)), sql, MAX_ROWS, LIMIT_S)
