"""Every run; of one of them how it goes, its certificate and what it was made of; and how it differs from another."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from app import experiments, frame, queries
from app.experiments import Extras
from app.queries import runs as asked
from app.selection import RunEntry, Selection
from harness.errors import HarnessError

PARTS = ("Progress", "Certificate", "Manifest", "Compare")
REFRESH_S = 2.0


def _list(entries: list[RunEntry]) -> None:
    table = asked.table(entries)
    now = st.session_state.get("run")
    key = f"runs-{now}"  # so that the marked row is the run, wherever it was chosen

    def chosen() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and entries[rows[0]].manifest is not None:
            frame.choose(run=entries[rows[0]].paths.run_id)

    st.dataframe(
        table,
        hide_index=True,
        key=key,
        on_select=chosen,
        selection_mode="single-row",
        selection_default={"selection": {"rows": [int(n) for n in table.index[table["run"] == now]]}},
        height=min(320, 40 + 35 * len(table)),
        column_config={
            "seconds": _number("seconds", "%.0f"),
            "fingerprint": _text("fingerprint", 90),
            "stages": _text("stages", 80),
        },
    )
    for name, reason in asked.unreadable(table).head(5).itertuples(index=False):
        st.text(f"{name} is broken: {reason}")
    frame.download(table, "runs")


# -- progress


def _progress(entry: RunEntry, extras: Extras) -> None:
    was = Selection(entry).status

    # Only this part is drawn anew, so what is chosen, typed and scrolled elsewhere stays.
    @st.fragment(run_every=REFRESH_S if was == "running" else None)
    def live() -> None:
        try:
            now = Selection(asked.as_it_stands(entry))
        except HarnessError as e:
            st.text(str(e))
            return
        if now.status != was:  # it ended, failed or went on: the rest of the page is out of date as well
            st.rerun()
        _stages(now)
        _events(entry, extras)

    live()


def _stages(run: Selection) -> None:
    stages = asked.progress(run.paths, asked.planned_stages(run.manifest))
    if stages.empty:
        st.info("No stage has begun.")
        return
    age = queries.snapshot_age_s(run.paths)
    told = "no snapshot yet" if age is None else f"snapshot {asked.duration(age)} old"
    st.text(f"{asked.told_progress(stages)} The run is {run.status}; {told}.")
    if run.manifest.reason:
        st.text(f"Why: {run.manifest.reason}")
    st.dataframe(
        stages,
        hide_index=True,
        key="stages",
        height=40 + 35 * len(stages),
        column_config={
            "done": st.column_config.ProgressColumn("done", format="percent", min_value=0, max_value=1),
            "items": _number("items", "%d"),
            "total": _number("of", "%d"),
            "failed": _number("failed", "%d"),
            "items_s": _number("items/s", "%.1f"),
            "tokens_s": _number("tokens/s", "%.0f"),
            "seconds": _number("seconds", "%.1f"),
            "left_s": _number("left, s", "%.0f"),
            "last_items": _number("last batch, items", "%d"),
            "last_tokens": _number("last batch, tokens", "%d"),
            "number": _number("batches", "%d"),
            "splits": _number("splits", "%d"),
        },
    )


def _events(entry: RunEntry, extras: Extras) -> None:
    events = asked.events(entry.paths)
    warnings, errors = asked.event_counts(entry.paths)
    st.markdown("**Warnings and failures**")
    if events.empty:
        st.caption("None.")
        return

    named = extras.of_items(entry.paths, list(events["item"])) if extras.of_items else events[[]]

    def chosen() -> None:
        for n in st.session_state["events"]["selection"]["rows"][:1]:
            frame.choose(**extras.chosen(named.iloc[n].to_dict()))

    shown = "" if warnings + errors <= len(events) else f"; the latest {len(events)} are shown"
    told = f" A row that names a {' or '.join(extras.choices.values())} chooses it." if extras.of_items else ""
    st.caption(f"{warnings:,} warnings, {errors:,} errors{shown}.{told}")
    st.dataframe(
        events,
        hide_index=True,
        key="events",
        on_select=chosen,
        selection_mode="single-row",
        column_config={"message": _text("message", 600)},
    )
    frame.download(events.join(named), "events")


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
    small: dict[str, Any] = {name: _number(name, "%.1e") for name in ("max_abs", "tolerance", "max_rel")}
    small["measurement"] = _text("measurement", 180)  # else the longest names are cut
    st.dataframe(told, hide_index=True, height=min(800, 40 + 35 * len(told)), column_config=small)
    frame.download(told, "certificate")


def _manifest(entry: RunEntry) -> None:
    manifest = Selection(entry).manifest
    st.download_button(
        "JSON",
        entry.paths.manifest.read_bytes(),
        "manifest.json",
        "application/json",
        key="download-manifest",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
    )
    st.subheader("What was run")
    if manifest.argv:
        st.code(shlex.join(manifest.argv), language=None, wrap_lines=True)
    names = (
        "run_id",
        "parent",
        "accepted_differences",
        "experiment",
        "created",
        "ended",
        "seconds",
        "status",
        "reason",
        "device",
        "threads",
        "num_failed",
        "warnings",
        "resumed",
        "random_numbers",
    )
    what = {name: manifest.tree.get(name) for name in names}
    _leaves({k: v for k, v in what.items() if v not in (None, [], {})}, names)
    st.subheader("Identity")
    st.caption("The fingerprint is a hash of everything that decides results.")
    st.code(manifest.fingerprint, language=None)
    _leaves(manifest.part("fingerprint_parts"))
    st.subheader("Settings")
    settings = asked.settings(manifest)
    changed = int((settings["source"] != "default").sum())
    st.caption(f"{changed} of {len(settings)} were changed from their default; those stand first.")
    st.dataframe(settings, hide_index=True)
    st.subheader("Stages")
    st.dataframe(
        asked.stages(manifest),
        hide_index=True,
        column_config={
            "peak_mb": _number("peak memory, MB", "%.0f"),
            "seconds": _number("seconds", "%.1f"),
            "of_contexts": _number("of contexts", "%.0f"),
            "tokens_per_s": _number("tokens/s", "%.0f"),
        },
    )
    if manifest.tables:
        st.caption("Rows of each table")
        _leaves(manifest.tables)
    st.subheader("Model")
    _leaves(manifest.part("model"), ("name", "revision", "dtype", "num_parameters", "path", "weights_sha256"))
    st.subheader("Prompts")
    _leaves({k: v for k, v in manifest.part("prompts").items() if k != "row_hashes"})
    left, right = st.columns(2)
    with left:
        st.subheader("Code and machine")
        _leaves({name: part for name in ("code", "machine", "numerics") if (part := manifest.part(name))})
        if entry.paths.tree_diff.exists():
            st.download_button(
                "Uncommitted changes of the code",
                entry.paths.tree_diff.read_bytes(),
                "working_tree.diff",
                "text/x-diff",
                key="download-diff",
                icon=":material/download:",
                type="tertiary",
                on_click="ignore",
            )
    with right:
        st.subheader("Packages")
        _leaves(manifest.packages)


def _leaves(tree: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    rows = asked.leaves(tree, names)
    if rows.empty:
        st.caption("The manifest does not say.")
        return
    st.dataframe(
        rows,
        hide_index=True,
        height=min(400, 40 + 35 * len(rows)),
        column_config={"key": _text("key", 260), "value": _text("value", None)},
    )


# -- two runs


def _compare(view: Selection | None, extras: Extras, entry: RunEntry, entries: list[RunEntry]) -> None:
    others = {e.paths.run_id: e for e in entries if e.manifest is not None and e.paths.run_id != entry.paths.run_id}
    if not others:
        st.info("There is no other run to compare with.")
        return
    name = st.selectbox("With", list(others), key="other", bind="query-params", index=None, placeholder="another run")
    if name is None:
        return
    other = others[str(name)]
    this, that = Selection(entry).manifest, Selection(other).manifest
    st.subheader("What differs")
    changes = asked.manifest_differences(this, that)
    if this.fingerprint == that.fingerprint:
        st.caption("Both have the same fingerprint: what decides results is the same.")
    if (shared := asked.shared_prompts(this, that)) is not None:
        st.caption(f"{shared[0]:,} prompts in both, {shared[1]:,} only in this, {shared[2]:,} only in the other.")
    if (tables := asked.equal_tables(this, that)) is not None:
        same, apart = tables
        told = (
            f"All {len(same)} measured tables are the same, bit for bit."
            if not apart
            else (
                f"Bit for bit the same: {', '.join(same) or 'no table'}. Not the same: {', '.join(apart)}; "
                "`harness diff` says by how much."
            )
        )
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
    if extras.compare is None:
        st.caption("This run's experiment has no results to put side by side.")
    elif experiments.of_run(this) != experiments.of_run(that):
        st.caption("The runs are of two experiments: their results are not put side by side.")
    else:
        extras.compare(view, entry, other)


def _number(label: str, form: str) -> Any:
    return st.column_config.NumberColumn(label, format=form)


def _text(label: str, width: int | None) -> Any:
    return st.column_config.TextColumn(label, width=width)


def _part(view: Selection | None, extras: Extras, entry: RunEntry, entries: list[RunEntry]) -> None:
    part = st.segmented_control(
        "Part", PARTS, key="part", bind="query-params", default=PARTS[0], required=True, label_visibility="collapsed"
    )
    if part == "Progress":
        _progress(entry, extras)
    elif part == "Certificate":
        _certificate(entry)
    elif part == "Manifest":
        _manifest(entry)
    else:
        _compare(view, extras, entry, entries)


view, extras = frame.open_core("Runs")
entries = queries.entries()
if entries:
    _list(entries)
chosen = next((e for e in entries if e.manifest is not None and e.paths.run_id == st.session_state.get("run")), None)
if chosen is not None:
    st.subheader(chosen.paths.run_id)
    frame.show_remarks(chosen)
    _part(view, extras, chosen, entries)
