"""What every page has: its title, the run and the filters in the sidebar, what the run is, and how data leave the page.

All state is in the address: each widget is bound to a query parameter, so a copied link opens the same view, and the
filters go along from page to page. A chart that selects something calls `choose`. Knows no experiment: what one adds
comes from `app.experiments`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import streamlit as st

from app import experiments, queries
from app.experiments import Extras
from app.selection import Selection, pick_run
from harness.errors import HarnessError
from harness.experiments.remarks import lines
from harness.run import RunEntry
from harness.spreadsheet import defused

Picked = TypeVar("Picked", bound=Selection)


def open_page(file: str, pick: Callable[[RunEntry], Picked]) -> Picked | None:
    """Draw the head of an experiment's page, `file` being its own; what is selected, or None where there is nothing to
    show, which the page then says itself. Only runs of the experiment can be chosen.

    `pick` draws the experiment's filters of a run in the sidebar. Where a table that the page needs has no rows, a line
    says what was not measured.
    """
    name, page = experiments.page_of(Path(file))
    st.title(page.title)
    entries = [e for e in queries.entries() if e.manifest is not None and experiments.of_run(e.manifest) == name]
    if not entries:
        st.info(
            f"No run of {experiments.get(name).title} in `{queries.runs_root()}` yet. Start one with `harness run {name}`."
        )
        return None
    with st.sidebar:
        selected = pick(pick_run(entries))
    if not _head(selected):
        return None
    for table in page.needs:
        if not queries.has_rows(selected.paths, table):
            st.info(f"Not measured in this run: it has no rows in `{table}`.")
            return None
    if page.remarks:
        show_remarks(selected.entry, page.remarks)
    return selected


def open_core(title: str) -> tuple[Selection | None, Extras]:
    """Draw the head of a page of the core, of which any run can be chosen; what is selected, None where there is nothing
    to show, and what the run's experiment gives."""
    st.title(title)
    entries = [e for e in queries.entries() if e.manifest is not None]
    if not entries:
        st.info(f"No run in `{queries.runs_root()}` yet. Start one with `harness run`.")
        return None, Extras()
    with st.sidebar:
        entry = pick_run(entries)
        manifest = Selection(entry).manifest
        problem = experiments.problem_of(manifest)
        extras = Extras() if problem else experiments.extras_of(experiments.of_run(manifest))
        selected = extras.pick(entry)
    if problem:
        st.info("The results of this run cannot be shown.")
        st.text(problem)
        return None, extras
    return (selected if _head(selected) else None), extras


def _head(selected: Selection) -> bool:
    """What stands above every page of a run; whether there are results to show."""
    if planted := experiments.planted_of(selected.manifest):
        st.warning(planted, icon=":material/science:")
    if selected.status != "finished":
        age = queries.snapshot_age_s(selected.paths)
        told = "no snapshot yet" if age is None else f"snapshot {age:.0f} s old"
        st.caption(f"This run is **{selected.status}**; {told}.")
    if queries.tables(selected.paths):
        return True
    problem = queries.problem(selected.paths)
    if problem is None:
        st.info("This run has no results yet.")
    else:
        st.code(problem, language=None, wrap_lines=True)  # it quotes what stands in the run
    return False


def show_remarks(entry: RunEntry, kinds: Sequence[str] = ()) -> None:
    """What the run should say of itself, as the terminal and the report say it; folded, and of some kinds only, where
    they are named."""
    found = [r for r in queries.remarks(entry) if not kinds or r.kind in kinds]
    if found:
        about = ", ".join(dict.fromkeys(r.title for r in found))
        with st.expander(f"To know of this run: {about}", expanded=not kinds):
            for line in lines(found):
                st.text(line)  # it quotes names that stand in the run


def choose(**values: Any) -> None:
    """Set shared state, such as `prompt="…"`. Only in a callback: the widgets of this draw have their values already."""
    for key, value in values.items():
        st.session_state[key] = value


def on_click(key: str, chosen: Callable[[int, int], dict[str, Any] | None]) -> Callable[[], None]:
    """A callback for `st.echarts_chart(..., key=key, on_select=...)`: `chosen(series, item)`, both by index, says which
    shared state a clicked item sets, such as {"prompt": …}; None for nothing."""

    def clicked() -> None:
        selection = (st.session_state.get(key) or {}).get("selection") or {}
        for series in selection.get("selected") or []:
            for index in series["data_indices"][:1]:
                choose(**(chosen(int(series["series_index"]), int(index)) or {}))

    return clicked


def on_row(key: str, prompt_ids: Sequence[str]) -> Callable[[], None]:
    """A callback for `st.dataframe(..., key=key, on_select=...)` whose rows are prompts: the selected one is chosen."""

    def clicked() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows:
            choose(prompt=prompt_ids[rows[0]])

    return clicked


def safely(part: Callable[[], None]) -> None:
    """Draw a part of a page; one that a run of an older schema cannot answer is a line, not the end of the page."""
    try:
        part()
    except HarnessError as e:
        st.info("This part cannot be shown for this run.")
        st.text(str(e))


def download(data: pd.DataFrame, name: str) -> None:
    """The data of a chart or table, as a CSV file; where they hold text, as one for spreadsheets too."""
    with st.container(horizontal=True):
        st.download_button(
            "Data",
            lambda: csv_of(data),
            f"{name}.csv",
            "text/csv",
            key=f"download-{name}",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
        if len(data.select_dtypes(include=["object", "string", "category"]).columns):
            safe, number = for_spreadsheets(data)
            download_for_spreadsheets(lambda: csv_of(safe), number, name)


def download_for_spreadsheets(make: Callable[[], bytes], number: int, name: str) -> None:
    """A second file, in which `number` cells of text were changed so that a spreadsheet shows them and computes nothing."""
    st.download_button(
        f"CSV for spreadsheets ({number:,} changed)",
        make,
        f"{name}-for-spreadsheets.csv",
        "text/csv",
        key=f"download-safe-{name}",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        help="Text that a spreadsheet would take for a formula, such as an answer that begins with =, has an apostrophe "
        "in front. Numbers are as they were.",
    )


def for_spreadsheets(data: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The same with its text, names of columns included, made harmless for a spreadsheet; and how many cells that changed."""
    safe, number = data.copy(), 0
    for column in data.select_dtypes(include=["object", "string", "category"]).columns:
        marked = {v: defused(v) for v in set(filter(_is_text, data[column])) if v != defused(v)}
        if marked:
            safe[column] = [marked.get(v, v) if _is_text(v) else v for v in data[column]]
            number += sum(_is_text(v) and v in marked for v in data[column])
    safe.columns = [defused(c) if _is_text(c) else c for c in data.columns]
    return safe, number + sum(a != b for a, b in zip(safe.columns, data.columns, strict=True))


def csv_of(data: pd.DataFrame) -> bytes:
    """UTF-8 CSV; lists as JSON, so that they can be read back."""
    shown = data.copy()
    for column in shown.select_dtypes(include="object").columns:
        shown[column] = [
            json.dumps(list(v)) if hasattr(v, "__len__") and not isinstance(v, str) else v for v in shown[column]
        ]
    return shown.to_csv(index=False).encode()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
