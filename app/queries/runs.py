"""What the folder of runs holds, how one run goes, what it was made of, and how two of them differ.

Not called `runs`, which is a function of the package.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from app import experiments, queries
from harness.run import Manifest, RunEntry, RunPaths, differences, read_manifest

LIST_COLUMNS = (
    "run",
    "status",
    "experiment",
    "model",
    "fingerprint",
    "prompts",
    "warnings",
    "failed",
    "sanity",
    "seconds",
    "stages",
    "reason",
)


# -- the list


def table(entries: Sequence[RunEntry]) -> pd.DataFrame:
    """One row a run, with `LIST_COLUMNS`; of a broken one its name, `broken` and the reason."""
    rows = [_row(entry) for entry in entries]
    frame = pd.DataFrame(rows, columns=list(LIST_COLUMNS))
    for column in ("prompts", "warnings", "failed"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype("Int64")
    frame["seconds"] = pd.to_numeric(frame["seconds"], errors="coerce")
    return frame


def _row(entry: RunEntry) -> dict[str, Any]:
    facts, manifest = entry.facts(), entry.manifest
    if manifest is None:
        return facts | dict.fromkeys(("fingerprint", "sanity", "stages", "experiment"), "")
    return facts | {
        "fingerprint": manifest.fingerprint[:8],
        "warnings": sum(manifest.warnings.values()) if manifest.says("warnings") else None,
        "sanity": verdict(manifest),
        "stages": _stages_done(manifest),
        "experiment": experiments.of_run(manifest),
        "reason": facts["reason"] or experiments.problem_of(manifest) or "",
    }


def unreadable(table: pd.DataFrame) -> pd.DataFrame:
    """run and reason of the broken runs of a `table`."""
    return table.loc[table["status"] == "broken", ["run", "reason"]]


def as_it_stands(entry: RunEntry) -> RunEntry:
    """The same run with its manifest of this moment. Raises HarnessError where it cannot be read any more."""
    return entry._replace(manifest=read_manifest(entry.paths))


def _stages_done(manifest: Manifest) -> str:
    done, planned = len(manifest.stages), len(planned_stages(manifest))
    return f"{done} of {planned}" if planned else str(done)


def verdict(manifest: Manifest) -> str:
    """What the certificate says: `agrees`, `DISAGREES on …`, `not measured: …`, or `not checked`."""
    if not manifest.sanity:
        return "not checked"
    apart = [v.measurement for v in manifest.sanity if v.ok is False]
    missing = [v.measurement for v in manifest.sanity if v.ok is None]
    if apart:
        return f"DISAGREES on {', '.join(apart)}"
    return f"not measured: {', '.join(missing)}" if missing else "agrees"


# -- how it goes


def progress(paths: RunPaths, planned: Sequence[str] = ()) -> pd.DataFrame:
    """A row a stage, those of `planned` that have not begun at the end: stage, status, done (0 to 1), items, total, failed,
    items_s, tokens_s, seconds, left_s (of a stage that runs), and of its batches last_items, last_tokens, number, splits.
    """
    known = queries.tables(paths)
    if "stages" not in known:
        return _progress(pd.DataFrame(columns=["stage"]), planned)
    batches = (
        """(SELECT stage, count(*) FILTER (status = 'done') AS number, count(*) FILTER (status = 'split') AS splits,
                   arg_max(num_items, batch_id) FILTER (status = 'done') AS last_items,
                   arg_max(padded_tokens, batch_id) FILTER (status = 'done') AS last_tokens
            FROM batches GROUP BY stage)"""
        if "batches" in known
        else "(SELECT NULL AS stage, 0 AS number, 0 AS splits, NULL AS last_items, NULL AS last_tokens)"
    )
    rows = queries.ask(
        paths,
        f"""SELECT stage, status, CASE WHEN num_items = 0 THEN 1 ELSE (num_done + num_failed) / num_items END AS done,
                   num_done AS items,
                   num_failed AS failed, num_items AS total, num_done / nullif(seconds, 0) AS items_s,
                   nullif(tokens, 0) / nullif(seconds, 0) AS tokens_s, seconds,
                   CASE WHEN status = 'running'
                        THEN (num_items - num_done - num_failed) * seconds / nullif(num_done, 0) END AS left_s,
                   last_items, last_tokens, number, splits
            FROM stages s LEFT JOIN {batches} USING (stage) ORDER BY s.rowid""",
    )
    return _progress(rows, planned)


def _progress(rows: pd.DataFrame, planned: Sequence[str]) -> pd.DataFrame:
    waiting = [name for name in planned if name not in set(rows["stage"])]
    later = pd.DataFrame({"stage": waiting, "status": "not begun"}, columns=["stage", "status"])
    names = [
        "stage",
        "status",
        "done",
        "items",
        "total",
        "failed",
        "items_s",
        "tokens_s",
        "seconds",
        "left_s",
        "last_items",
        "last_tokens",
        "number",
        "splits",
    ]
    frame = pd.DataFrame([*rows.to_dict("records"), *later.to_dict("records")], columns=names)
    numbers = frame.columns.difference(["stage", "status"])
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    return frame


def planned_stages(manifest: Manifest) -> list[str]:
    """Names of the stages of a run, in order, as its fingerprint has them; none where it does not say."""
    return [stage.name for stage in manifest.fingerprint_parts.stages]


def told_progress(stages: pd.DataFrame) -> str:
    """Where a run stands, in a line."""
    running = stages[stages["status"] == "running"]
    if running.empty:
        return f"{int((stages['status'] == 'done').sum())} of {len(stages)} stages done."
    row = running.iloc[-1]
    line = f"Stage {running.index[-1] + 1} of {len(stages)}, {row['stage']}: {row['items']:,.0f} of {row['total']:,.0f} items"
    line += f", {row['failed']:,.0f} failed" if row["failed"] else ""
    return f"{line}, about {duration(row['left_s'])} left in it." if pd.notna(row["left_s"]) else f"{line}."


def duration(seconds: float) -> str:
    """So many seconds, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def events(paths: RunPaths, limit: int = 200) -> pd.DataFrame:
    """time, level, stage, kind, item and message of the latest warnings and errors, newest first."""
    if "events" not in queries.tables(paths):
        return pd.DataFrame(columns=["time", "level", "stage", "kind", "item", "message"])
    return queries.ask(
        paths,
        "SELECT time, level, stage, kind, item_key AS item, message FROM events "
        "WHERE level <> 'info' ORDER BY event_id DESC LIMIT ?",
        [limit],
    )


def event_counts(paths: RunPaths) -> tuple[int, int]:
    """How many warnings and errors there are."""
    if "events" not in queries.tables(paths):
        return 0, 0
    found = queries.ask(
        paths, "SELECT count(*) FILTER (level = 'warning') AS w, count(*) FILTER (level = 'error') AS e FROM events"
    ).iloc[0]
    return int(found["w"]), int(found["e"])


# -- what it was made of


def certificate(paths: RunPaths) -> pd.DataFrame:
    """The certificate: measurement, verdict, max_abs, tolerance, max_rel, num_items, flips, near_ties, worst, repeated, left_out;
    what disagrees first. Without rows where nothing was checked.
    """
    names = [
        "measurement",
        "verdict",
        "max_abs",
        "tolerance",
        "max_rel",
        "num_items",
        "flips",
        "near_ties",
        "worst",
        "repeated",
        "left_out",
    ]
    tables = queries.tables(paths)
    if "sanity" not in tables:
        return pd.DataFrame(columns=names)
    left_out = "array_to_string(left_out, ', ')" if "sanity_items" in tables else "''"  # an older run had no budget
    return queries.ask(
        paths,
        "SELECT measurement, CASE WHEN ok IS NULL THEN 'left out' WHEN ok THEN 'agrees' ELSE 'DISAGREES' END AS verdict, "
        "max_abs, tolerance, max_rel, num_items, flips, near_ties, worst, repeated, "
        f"{left_out} AS left_out FROM sanity ORDER BY ok, measurement",
    )


def settings(manifest: Manifest) -> pd.DataFrame:
    """setting, value, source of every setting, those that were not left at their default first."""
    rows = [
        {"setting": name, "value": _told(given.value), "source": given.source or ""}
        for name, given in manifest.settings.items()
    ]
    return pd.DataFrame(sorted(rows, key=lambda r: r["source"] == "default"), columns=["setting", "value", "source"])


def leaves(tree: Mapping[str, Any], names: Sequence[str] = ()) -> pd.DataFrame:
    """key (dotted) and value of every leaf; those whose key is in `names` first, in that order."""
    found = [(key, _told(value)) for key, value in _leaves(tree).items()]
    order = {name: n for n, name in enumerate(names)}
    return pd.DataFrame(sorted(found, key=lambda kv: order.get(kv[0], len(order))), columns=["key", "value"])


_STAGE_COLUMNS = {
    "status": "status",
    "items": "num_items",
    "failed": "num_failed",
    "rows": "num_rows",
    "batches": "num_batches",
    "splits": "splits",
    "tokens": "tokens",
    "of_contexts": "prefill_tokens",
    "padding": "padding_tokens",
    "seconds": "seconds",
    "tokens_per_s": "tokens_per_s",
}


def stages(manifest: Manifest) -> pd.DataFrame:
    """stage, status, items, failed, rows, batches, splits, tokens, of_contexts, padding, seconds, tokens_per_s, peak_mb of
    every stage that ended, as the manifest has them; a column is empty where an older harness did not write it.
    """
    rows = []
    for name, stage in manifest.stages.items():
        found = {column: getattr(stage, key) for column, key in _STAGE_COLUMNS.items()}
        rows.append({"stage": name, **found, "peak_mb": stage.peak_bytes / 1e6 if stage.peak_bytes else None})
    return pd.DataFrame(rows, columns=["stage", *_STAGE_COLUMNS, "peak_mb"])


# -- two runs


def manifest_differences(this: Manifest, other: Manifest) -> pd.DataFrame:
    """part, key, this, other of every leaf on which two manifests differ: what decides results first (`identity`), then
    settings, code, packages, numerics, machine."""
    found = differences.manifest_differences(this.tree, other.tree)
    rows = [(part, d.key, _told(d.old), _told(d.new)) for part, d in found]
    return pd.DataFrame(rows, columns=["part", "key", "this", "other"])


def shared_prompts(this: Manifest, other: Manifest) -> tuple[int, int, int] | None:
    """How many prompts both runs used, and how many only this or only the other; None where one does not say."""
    found = [m.prompts.row_hashes for m in (this, other)]
    if not all(found):
        return None
    a, b = (set(hashes.items()) for hashes in found)
    return len(a & b), len(a - b), len(b - a)


def equal_tables(this: Manifest, other: Manifest) -> tuple[list[str], list[str]] | None:
    """Names of the measured tables that are the same in both runs, bit for bit, and of those that are not; None where one
    does not say: it is not finished, or was made by an older harness."""
    found = [m.table_sha256 for m in (this, other)]
    if not all(found):
        return None
    names = sorted(found[0].keys() | found[1].keys())
    same = [name for name in names if found[0].get(name) == found[1].get(name)]
    return same, [name for name in names if name not in same]


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {d.key: d.new for d in differences.differences({}, tree) if d.key}


def _told(value: Any) -> str:
    """A value of a manifest as text: one type a column, whatever stands there."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
