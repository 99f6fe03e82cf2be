"""What every page has: its title, the run and the filters in the sidebar, what the run is, and how data leave the page.

All state is in the address: each widget is bound to a query parameter, so a copied link opens the same view, and the
filters go along from page to page. A chart that selects something calls `choose`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from app import queries
from harness.errors import HarnessError
from harness.experiments.gravity.remarks import TITLES, Kind, lines
from harness.run import RunEntry, RunPaths, state
from harness.spreadsheet import defused

PAGES = {
    "runs": "Runs", "pressure": "P_sem", "detections": "Detections", "attention": "Attention", "layers": "Layers",
    "patching": "Patching", "activations": "Activations", "prompt": "Prompt", "sql": "SQL",
}  # fmt: skip
"""Each page's file and address, and its title."""
REMARKS: dict[str, tuple[Kind, ...]] = {
    "P_sem": ("empty", "cut", "one_outcome", "one_bin", "fit", "split"),
    "Detections": ("empty", "cut", "one_outcome"),
    "Attention": ("empty", "one_outcome"),
    "Layers": ("empty", "one_outcome", "split"),
    "Patching": ("one_outcome", "one_bin", "split"),
}
"""By title of a page, the remarks that concern what it shows; the page of runs shows all."""
ALL = "all"
OUTCOMES = (ALL, "success", "failure")
STEPS = ("first", "decision")
PLANTED = "The bundled demo model's answers are **planted**: this page tests the pipeline and says nothing of language models."


@dataclass(frozen=True)
class View:
    """What is looked at: a run, and the filters that all pages share.

    `condition` is the one compared with baseline; `category` and `outcome` are None for all; `prompt_id` and `pin` are
    the chosen prompt and the one it is compared with. `is_running` says that the numbers still grow.
    """

    entry: RunEntry
    conditions: tuple[str, ...]
    condition: str
    category: str | None
    outcome: str | None
    prompt_id: str | None
    pin: str | None
    is_running: bool

    @property
    def paths(self) -> RunPaths:
        return self.entry.paths

    @property
    def manifest(self) -> dict[str, Any]:
        return self.entry.manifest or {}

    def where(self, prompt: str = "prompt_id") -> tuple[str, list[Any]]:
        """A condition in SQL that keeps the prompts of the filters, and its parameters; `prompt` is the column's name."""
        parts, params = ["TRUE"], []
        if self.category is not None:
            parts.append(f"{prompt} IN (SELECT prompt_id FROM prompts WHERE category = ?)")
            params.append(self.category)
        if self.outcome is not None:
            parts.append(f"{prompt} IN (SELECT prompt_id FROM outcomes WHERE condition = ? AND outcome = ?)")
            params += [self.condition, self.outcome]
        return " AND ".join(parts), params

    def prompt_ids(self) -> list[str]:
        """Ids of the prompts that the filters keep, in order."""
        where, params = self.where()
        return list(
            queries.ask(self.paths, f"SELECT prompt_id FROM prompts WHERE {where} ORDER BY prompt_id", params)[
                "prompt_id"
            ]
        )


def open_page(title: str, needs: Sequence[str] = (), *, pick_prompt: bool = True) -> View | None:
    """Draw the head of a page; its view, or None where there is nothing to show, which the page then says itself.

    `needs` are tables that must have rows: where one has none, a line says what was not measured.
    """
    st.title(title)
    entries = {e.paths.run_id: e for e in queries.entries() if e.manifest is not None}
    if not entries:
        st.info(f"No run in `{queries.runs_root()}` yet. Start one with `harness run`.")
        return None
    with st.sidebar:
        run_id = st.selectbox("Run", list(entries), key="run", bind="query-params")
        entry = entries[str(run_id)]
        view = _filters(entry, pick_prompt)
    if view.manifest.get("planted"):
        st.warning(PLANTED, icon=":material/science:")
    status = state(view.manifest)
    if status != "finished":
        age = queries.snapshot_age_s(view.paths)
        told = "no snapshot yet" if age is None else f"snapshot {age:.0f} s old"
        st.caption(f"This run is **{status}**; {told}.")
    if not queries.tables(view.paths):
        problem = queries.problem(view.paths)
        if problem is None:
            st.info("This run has no results yet.")
        else:
            st.code(problem, language=None, wrap_lines=True)  # it quotes what stands in the run
        return None
    for table in needs:
        if not has_rows(view.paths, table):
            st.info(f"Not measured in this run: it has no rows in `{table}`.")
            return None
    if title in REMARKS:
        show_remarks(view.entry, REMARKS[title])
    return view


def show_remarks(entry: RunEntry, kinds: Sequence[Kind] = ()) -> None:
    """What the run should say of itself, as the terminal and the report say it; folded, and of some kinds only, where
    they are named."""
    found = [r for r in queries.remarks(entry.paths, entry.manifest or {}) if not kinds or r.kind in kinds]
    if found:
        about = ", ".join(dict.fromkeys(TITLES[r.kind] for r in found))
        with st.expander(f"To know of this run: {about}", expanded=not kinds):
            for line in lines(found):
                st.text(line)  # it quotes names that stand in the run


def _filters(entry: RunEntry, pick_prompt: bool) -> View:
    paths = entry.paths
    try:
        conditions = tuple(queries.conditions(paths))
        rows = (
            queries.prompts(paths)
            if "prompts" in queries.tables(paths)
            else pd.DataFrame({"prompt_id": [], "category": []})
        )
    except HarnessError as e:
        st.warning(str(e))
        conditions, rows = (), pd.DataFrame({"prompt_id": [], "category": []})
    others = [c for c in conditions if c != "baseline"] or list(conditions)
    condition = st.selectbox("Condition", others, key="condition", bind="query-params", help="compared with baseline")
    category = st.selectbox("Category", [ALL, *sorted(set(rows["category"]))], key="category", bind="query-params")
    outcome = st.segmented_control(
        "Greedy answer", OUTCOMES, key="outcome", bind="query-params", default=ALL, required=True,
        help="success: the answer keeps the ban; failure: it says X",
    )  # fmt: skip
    ids = list(rows["prompt_id"])
    prompt_id = pin = None
    if pick_prompt:
        prompt_id = st.selectbox(
            "Prompt", ids, key="prompt", bind="query-params", index=None, placeholder="none chosen"
        )
        pin = st.selectbox("Pinned", ids, key="pin", bind="query-params", index=None, placeholder="none pinned",
                           help="compared with the prompt above")  # fmt: skip
    return View(
        entry, conditions, str(condition) if condition else "", None if category == ALL else category,
        None if outcome == ALL else outcome, prompt_id, pin, state(entry.manifest or {}) == "running",
    )  # fmt: skip


def has_rows(paths: RunPaths, table: str) -> bool:
    """Whether a table is there and has a row."""
    return table in queries.tables(paths) and not queries.ask(paths, f"SELECT 1 FROM {table} LIMIT 1").empty


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
            "Data", lambda: csv_of(data), f"{name}.csv", "text/csv", key=f"download-{name}", icon=":material/download:",
            type="tertiary", on_click="ignore",
        )  # fmt: skip
        if len(data.select_dtypes(include=["object", "string", "category"]).columns):
            safe, number = for_spreadsheets(data)
            download_for_spreadsheets(lambda: csv_of(safe), number, name)


def download_for_spreadsheets(make: Callable[[], bytes], number: int, name: str) -> None:
    """A second file, in which `number` cells of text were changed so that a spreadsheet shows them and computes nothing."""
    st.download_button(
        f"CSV for spreadsheets ({number:,} changed)", make, f"{name}-for-spreadsheets.csv", "text/csv",
        key=f"download-safe-{name}", icon=":material/download:", type="tertiary", on_click="ignore",
        help="Text that a spreadsheet would take for a formula, such as an answer that begins with =, has an apostrophe "
        "in front. Numbers are as they were.",
    )  # fmt: skip


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


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as Python's."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
