"""A console for questions in SQL that the other pages do not ask. It reads this run's snapshot and nothing else."""

import zlib
from functools import partial

import streamlit as st

from app import frame
from app.experiments import Extras
from app.queries import sql as asked
from app.selection import Selection
from harness.errors import HarnessError


def _examples(extras: Extras) -> None:
    st.caption("Examples")
    with st.container(horizontal=True):
        for title, text in {**extras.examples, **asked.EXAMPLES}.items():
            st.button(title, key=f"example-{title}", on_click=partial(frame.choose, sql=text), type="secondary")


def _query() -> str:
    text = st.text_area(
        "Query",
        key="sql",
        bind="query-params",
        height=220,
        placeholder="SELECT … FROM prompts",
        help="DuckDB's SQL, one query that reads. Ctrl+Enter runs it. It cannot change anything or look at another file.",
    )
    st.button("Run", type="primary", icon=":material/play_arrow:")  # a click ends the typing, and so runs the text
    return (text or "").strip()


def _tables(view: Selection) -> None:
    found = asked.columns(view.paths)
    names = sorted(set(found["table"]))
    first = names.index("prompts") if "prompts" in names else 0
    table = st.selectbox("Table or view", names, index=first, key="table", bind="query-params")
    st.dataframe(
        found.loc[found["table"] == table, ["column", "type"]],
        hide_index=True,
        height=270,
        row_height=28,
        key="columns",
    )


def _rows(answer: asked.Answer, extras: Extras, key: str) -> None:
    number = f"{len(answer.rows):,} row{'' if len(answer.rows) == 1 else 's'} in {answer.seconds:.2f} s"
    st.caption(f"{number}. There are more: only these are shown and downloaded." if answer.is_cut else number)

    def chosen() -> None:
        for n in st.session_state[key]["selection"]["rows"][:1]:
            frame.choose(**extras.chosen(answer.rows.slice(n, 1).to_pylist()[0]))

    if set(extras.choices) & set(answer.rows.column_names):
        st.dataframe(answer.rows, hide_index=True, key=key, on_select=chosen, selection_mode="single-row")
    else:
        st.dataframe(answer.rows, hide_index=True, key=key)
    with st.container(horizontal=True):
        for form, make, kind in (
            ("CSV", asked.as_csv, "text/csv"),
            ("Parquet", asked.as_parquet, "application/vnd.apache.parquet"),
        ):
            st.download_button(
                form,
                partial(make, answer.rows),
                f"query.{form.lower()}",
                kind,
                key=f"download-{form}",
                icon=":material/download:",
                type="tertiary",
                on_click="ignore",
            )
        safe, number = asked.for_spreadsheets(answer.rows)
        frame.download_for_spreadsheets(partial(asked.as_csv, safe), number, "query")


view, extras = frame.open_core("SQL")
if view:
    left, right = st.columns([3, 2], gap="medium")
    with left:
        _examples(extras)
        text = _query()
    with right:
        _tables(view)
    if text:
        try:
            _rows(asked.answer(view.paths, text), extras, f"rows-{zlib.crc32(text.encode()):08x}")
        except HarnessError as e:
            st.code(f"No answer. {e}", language=None, wrap_lines=True)  # it may quote what stands in the run
    else:
        st.info("Write a query, or click an example.")
