"""Every run; of one of them how it goes, its certificate and what it was made of; and how it differs from another."""

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app import frame, queries
from app.charts import runs as charts
from app.queries import runs as asked
from harness.errors import HarnessError
from harness.run import RunEntry, read_manifest, state

PARTS = ("Progress", "Certificate", "Manifest", "Compare")
REFRESH_S = 2.0
MEASURES = {
    "violation_rate": ("rates", "share of samples that say X", 0.0, 1.0),
    "delta": ("suppression", "mean P0 − P1", -1.0, 1.0),
    "relative": ("suppression", "mean (P0 − P1) / P0", None, None),
    "log": ("suppression", "mean ln P0 − ln P1", None, None),
}


def _list(entries: list[RunEntry]) -> None:
    table = asked.table(entries)
    now = st.session_state.get("run")
    key = f"runs-{now}"  # so that the marked row is the run, wherever it was chosen

    def chosen() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and entries[rows[0]].manifest is not None:
            frame.choose(run=entries[rows[0]].paths.run_id)

    st.dataframe(
        table, hide_index=True, key=key, on_select=chosen, selection_mode="single-row",
        selection_default={"selection": {"rows": [int(n) for n in table.index[table["run"] == now]]}},
        height=min(320, 40 + 35 * len(table)),
        column_config={
            "seconds": _number("seconds", "%.0f"), "fingerprint": _text("fingerprint", 90), "stages": _text("stages", 80),
        },
    )  # fmt: skip
    for row in table[table["status"] == "broken"].head(5).to_dict("records"):
        st.text(f"{row['run']} is broken: {row['reason']}")
    frame.download(table, "runs")


# -- progress


def _progress(entry: RunEntry) -> None:
    was = state(entry.manifest or {})

    # Only this part is drawn anew, so what is chosen, typed and scrolled elsewhere stays.
    @st.fragment(run_every=REFRESH_S if was == "running" else None)
    def live() -> None:
        try:
            manifest = read_manifest(entry.paths)
        except HarnessError as e:
            st.text(str(e))
            return
        if state(manifest) != was:  # it ended, failed or went on: the rest of the page is out of date as well
            st.rerun()
        _stages(entry, manifest)
        _events(entry)

    live()


def _stages(entry: RunEntry, manifest: Mapping[str, Any]) -> None:
    stages = asked.progress(entry.paths, asked.planned_stages(manifest))
    if stages.empty:
        st.info("No stage has begun.")
        return
    age = queries.snapshot_age_s(entry.paths)
    told = "no snapshot yet" if age is None else f"snapshot {asked.duration(age)} old"
    st.text(f"{asked.told_progress(stages)} The run is {state(manifest)}; {told}.")
    if manifest.get("reason"):
        st.text(f"Why: {manifest['reason']}")
    st.dataframe(
        stages, hide_index=True, key="stages", height=40 + 35 * len(stages),
        column_config={
            "done": st.column_config.ProgressColumn("done", format="percent", min_value=0, max_value=1),
            "items": _number("items", "%d"), "total": _number("of", "%d"), "failed": _number("failed", "%d"),
            "items_s": _number("items/s", "%.1f"), "tokens_s": _number("tokens/s", "%.0f"),
            "seconds": _number("seconds", "%.1f"), "left_s": _number("left, s", "%.0f"),
            "last_items": _number("last batch, items", "%d"), "last_tokens": _number("last batch, tokens", "%d"),
            "number": _number("batches", "%d"), "splits": _number("splits", "%d"),
        },
    )  # fmt: skip


def _events(entry: RunEntry) -> None:
    events = asked.events(entry.paths)
    warnings, errors = asked.event_counts(entry.paths)
    st.markdown("**Warnings and failures**")
    if events.empty:
        st.caption("None.")
        return

    def chosen() -> None:
        rows = st.session_state["events"]["selection"]["rows"]
        if rows and events["prompt_id"][rows[0]] is not None:
            frame.choose(prompt=events["prompt_id"][rows[0]])

    shown = "" if warnings + errors <= len(events) else f"; the latest {len(events)} are shown"
    st.caption(f"{warnings:,} warnings, {errors:,} errors{shown}. A row that names a prompt chooses it.")
    st.dataframe(
        events.drop(columns="prompt_id"), hide_index=True, key="events", on_select=chosen, selection_mode="single-row",
        column_config={"message": _text("message", 600)},
    )  # fmt: skip
    frame.download(events, "events")


# -- certificate and manifest


def _certificate(entry: RunEntry) -> None:
    told = asked.certificate(entry.paths)
    if told.empty:
        st.info("Nothing was checked against the plain reference in this run.")
        return
    apart = told.loc[told["verdict"] == "DISAGREES", "measurement"]
    if len(apart):
        st.error(f"The fast path and the plain reference disagree on {len(apart)} of {len(told)} measurements.")
    else:
        made = told.loc[told["verdict"] == "agrees"]
        st.success(f"The fast path agrees with the plain reference on all {len(made)} measurements that were made.")
    small = {name: _number(name, "%.1e") for name in ("max_abs", "tolerance", "max_rel")}
    st.dataframe(told, hide_index=True, height=min(800, 40 + 35 * len(told)), column_config=small)
    frame.download(told, "certificate")


def _manifest(entry: RunEntry) -> None:
    manifest = entry.manifest or {}
    st.download_button(
        "JSON", entry.paths.manifest.read_bytes(), "manifest.json", "application/json", key="download-manifest",
        icon=":material/download:", type="tertiary", on_click="ignore",
    )  # fmt: skip
    st.subheader("What was run")
    argv = manifest.get("argv")
    if isinstance(argv, list):
        st.code(shlex.join(map(str, argv)), language=None, wrap_lines=True)
    names = ("run_id", "parent", "accepted_differences", "experiment", "created", "ended", "seconds", "status", "reason",
             "device", "threads", "num_failed", "warnings", "resumed", "random_numbers")  # fmt: skip
    what = {name: manifest.get(name) for name in names}
    _leaves({k: v for k, v in what.items() if v not in (None, [], {})}, names)
    st.subheader("Identity")
    st.caption("The fingerprint is a hash of everything that decides results.")
    st.code(str(manifest.get("fingerprint")), language=None)
    _leaves(manifest.get("fingerprint_parts"))
    st.subheader("Settings")
    settings = asked.settings(manifest)
    changed = int((settings["source"] != "default").sum())
    st.caption(f"{changed} of {len(settings)} were changed from their default; those stand first.")
    st.dataframe(settings, hide_index=True)
    st.subheader("Stages")
    st.dataframe(
        asked.stages(manifest), hide_index=True,
        column_config={"peak_mb": _number("peak memory, MB", "%.0f"), "seconds": _number("seconds", "%.1f"),
                       "of_contexts": _number("of contexts", "%.0f"), "tokens_per_s": _number("tokens/s", "%.0f")},
    )  # fmt: skip
    if manifest.get("tables"):
        st.caption("Rows of each table")
        _leaves(manifest["tables"])
    st.subheader("Model")
    _leaves(manifest.get("model"), ("name", "revision", "dtype", "num_parameters", "path", "weights_sha256"))
    st.subheader("Prompts")
    prompts = manifest.get("prompts")
    _leaves({k: v for k, v in prompts.items() if k != "row_hashes"} if isinstance(prompts, dict) else None)
    left, right = st.columns(2)
    with left:
        st.subheader("Code and machine")
        _leaves({name: manifest.get(name) for name in ("code", "machine", "numerics") if manifest.get(name)})
        if entry.paths.tree_diff.exists():
            st.download_button(
                "Uncommitted changes of the code", entry.paths.tree_diff.read_bytes(), "working_tree.diff", "text/x-diff",
                key="download-diff", icon=":material/download:", type="tertiary", on_click="ignore",
            )  # fmt: skip
    with right:
        st.subheader("Packages")
        _leaves(manifest.get("packages"))


def _leaves(tree: Any, names: tuple[str, ...] | list[str] = ()) -> None:
    rows = asked.leaves(tree, names)
    if rows.empty:
        st.caption("The manifest does not say.")
        return
    st.dataframe(rows, hide_index=True, height=min(400, 40 + 35 * len(rows)),
                 column_config={"key": _text("key", 260), "value": _text("value", None)})  # fmt: skip


# -- two runs


def _compare(view: frame.View | None, entry: RunEntry, entries: list[RunEntry]) -> None:
    others = {e.paths.run_id: e for e in entries if e.manifest is not None and e.paths.run_id != entry.paths.run_id}
    if not others:
        st.info("There is no other run to compare with.")
        return
    name = st.selectbox("With", list(others), key="other", bind="query-params", index=None, placeholder="another run")
    if name is None:
        return
    other = others[str(name)]
    this, that = entry.manifest or {}, other.manifest or {}
    st.subheader("What differs")
    changes = asked.manifest_differences(this, that)
    if this.get("fingerprint") == that.get("fingerprint"):
        st.caption("Both have the same fingerprint: what decides results is the same.")
    if (shared := asked.shared_prompts(this, that)) is not None:
        st.caption(f"{shared[0]:,} prompts in both, {shared[1]:,} only in this, {shared[2]:,} only in the other.")
    if (tables := asked.equal_tables(this, that)) is not None:
        same, apart = tables
        told = f"All {len(same)} measured tables are the same, bit for bit." if not apart else (
            f"Bit for bit the same: {', '.join(same) or 'no table'}. Not the same: {', '.join(apart)}; "
            "`harness diff` says by how much."
        )  # fmt: skip
        st.caption(told)
    if changes.empty:
        st.caption("The manifests say the same of identity, settings, packages, code and machine.")
    else:
        st.dataframe(
            changes,
            hide_index=True,
            key="changes",
            column_config={"key": _text("key", 230), "this": _text("this", 300), "other": _text("other", 300)},
        )
        frame.download(changes, "differences")
    _results(view, entry, other)


def _results(view: frame.View | None, entry: RunEntry, other: RunEntry) -> None:
    st.subheader("Results side by side")
    both = [asked.results(e.paths) for e in (entry, other)]
    for rows, which in zip(both, ("This run", "The other run"), strict=True):
        if rows.empty:
            st.info(f"{which} has no statistics.")
            return
    rows = asked.compare(*both)
    for which, names in asked.conditions_of_one(rows).items():
        if names:
            st.text(f"Conditions that only {which} run has: {', '.join(names)}")
    _intervals(view, rows, (f"this: {entry.paths.run_id}", f"other: {other.paths.run_id}"))
    st.caption(
        "difference = other − this. Intervals are 95 %; that they overlap does not show that the runs agree, and prompts that "
        "both runs share make a smaller difference real than the intervals suggest."
    )
    st.dataframe(
        rows, hide_index=True, key="results",
        column_config={name: _number(name, "%.4f") for name in rows.select_dtypes("float").columns},
    )  # fmt: skip
    frame.download(rows, "compared")


def _intervals(view: frame.View | None, rows: pd.DataFrame, names: tuple[str, str]) -> None:
    measure = st.segmented_control(
        "Measure", list(MEASURES), key="compared", bind="query-params", default="violation_rate", required=True
    )
    analysis, title, low, high = MEASURES[str(measure)]
    condition = view.condition if view else ""
    shown = rows[(rows["analysis"] == analysis) & (rows["measure"] == measure) & (rows["condition"] == condition)]
    shown = pd.DataFrame(
        [r for r in shown.to_dict("records") if r["grouping"] == "all" or asked.bin_start(r["grouping"]) is not None]
    )
    if shown.empty:
        st.caption("Neither run has this measure under the chosen condition.")
        return
    st.echarts_chart(charts.intervals(shown, names, title, low, high), height=320, key="compared-chart")
    st.text(f"Condition {condition}.")


def _number(label: str, form: str) -> Any:
    return st.column_config.NumberColumn(label, format=form)


def _text(label: str, width: int | None) -> Any:
    return st.column_config.TextColumn(label, width=width)


def _part(view: frame.View | None, entry: RunEntry, entries: list[RunEntry]) -> None:
    part = st.segmented_control(
        "Part", PARTS, key="part", bind="query-params", default=PARTS[0], required=True, label_visibility="collapsed"
    )
    if part == "Progress":
        _progress(entry)
    elif part == "Certificate":
        _certificate(entry)
    elif part == "Manifest":
        _manifest(entry)
    else:
        _compare(view, entry, entries)


view = frame.open_page("Runs")
entries = queries.entries()
if entries:
    _list(entries)
chosen = next((e for e in entries if e.manifest is not None and e.paths.run_id == st.session_state.get("run")), None)
if chosen is not None:
    st.subheader(chosen.paths.run_id)
    frame.show_remarks(chosen)
    _part(view, chosen, entries)
