"""`harness report`: one page that tells a run from beginning to end, and its figures as files.

Reads the snapshot and the manifest and nothing else; loads no model. The page is whole in itself: no script, and nothing is
fetched. The manifest, the certificate and the notes are every run's; results, method and limits are the experiment's.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.commands.recognise import experiment_of
from harness.errors import EnvironmentFault, RunError
from harness.experiments.experiment import Drawn, Experiment, Report, Table
from harness.experiments.remarks import lines, of_certificate
from harness.files import replacing, sweep
from harness.run import Manifest, RunPaths, now_text, read_manifest, state
from harness.store import Reader, open_snapshot

_DPI = 150


def write(paths: RunPaths, to: Path | None = None) -> Path:
    """Writes report.html and figures/ into the run's report folder, or into `to`; the page's path.

    Each file takes the place of an older one whole. Raises EnvironmentFault where the folder cannot be written.
    """
    folder = to or paths.report
    if to is None and any(path.is_symlink() for path in (folder, folder / "figures")):
        raise RunError(f"{folder}: expected a folder of the run's own, found a link; name one with --to")
    manifest = read_manifest(paths)
    experiment = experiment_of(manifest)
    with open_snapshot(paths, experiment.schema) as reader:
        told = experiment.report(reader, manifest)
        content = _content(experiment, reader, manifest, told)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        sweep(folder, only_dead=True)
        content["figures"] = _write_figures(folder / "figures", told.figures)
        page = folder / "report.html"
        with replacing(page) as temporary:
            temporary.write_text(_render(content), "utf-8")
    except OSError as e:
        raise EnvironmentFault(f"{folder}: the report cannot be written there: {e.strerror or e}") from e
    return page


def _write_figures(folder: Path, drawn: Mapping[str, Drawn]) -> dict[str, dict[str, str]]:
    """Every figure as PNG and SVG; by name its title, caption, and the SVG as a data URI."""
    found = {}
    for name, one in drawn.items():
        figure = one.draw()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # placed once, not once a file: it takes longer than the drawing
        # With a salt and without a date the same data give the same file, byte for byte.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=_DPI)
            with replacing(folder / f"{name}.svg") as temporary:
                figure.savefig(temporary, format="svg", dpi=_DPI, metadata={"Date": None})
        svg = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        found[name] = {"title": one.title, "caption": one.caption, "source": f"data:image/svg+xml;base64,{svg}"}
    return found


def _render(content: Mapping[str, Any]) -> str:
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(content)


def _content(experiment: Experiment, reader: Reader, manifest: Manifest, told: Report) -> dict[str, Any]:
    remarks = [*experiment.remarks(reader, manifest), *of_certificate(reader, manifest)]
    return {
        "run_id": manifest.run_id,
        "title": experiment.title,
        "question": told.question,
        "written": now_text(),
        "planted": experiment.planted if manifest.planted else "",
        "facts": _facts(reader, manifest),
        "headlines": told.headlines,
        "remarks": lines(remarks),
        "sections": told.sections,
        "sanity": _sanity(reader),
        "method": told.method,
        "method_text": told.method_text,
        "limits": told.limits,
        "style": told.style,
        "manifest": _manifest_tables(reader, manifest),
    }


def _facts(reader: Reader, manifest: Manifest) -> list[tuple[str, str]]:
    failed = reader.query("SELECT coalesce(sum(num_failed), 0) AS n FROM stages")[0]["n"]
    model, machine, code = manifest.model, manifest.machine, manifest.code
    gpus = ", ".join(str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in machine.gpus)
    status = state(manifest)
    return [
        ("status", status + (f" ({manifest.reason})" if manifest.reason else "")),
        ("model", f"{model.name}, revision {model.revision}, {model.dtype}"),
        *_prompts_told(manifest),
        ("failed items", str(failed)),
        ("machine", f"{gpus or machine.cpu}, device {manifest.device}"),
        ("computed in", f"{manifest.seconds:,.0f} s" if manifest.seconds else "–"),
        ("created", str(manifest.created)),
        ("code", f"{code.version}, commit {code.git_commit}{' with changes' if code.git_dirty else ''}"),
        ("results as of", f"{reader.age_s:,.0f} s before this page" if status == "running" else "the end of the run"),
    ]


def _prompts_told(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Nothing of an experiment that has none."""
    prompts = manifest.prompts
    if manifest.part("prompts"):
        yield "prompts", f"{_count(prompts.used)} of {_count(prompts.read)} in {prompts.path}"
        yield "rejected prompts", _counts(prompts.rejected)


def _sanity(reader: Reader) -> Table:
    rows = reader.query("SELECT * FROM sanity ORDER BY ok, measurement") if "sanity" in reader.tables() else []
    columns = (
        "measurement",
        "verdict",
        "items",
        "largest difference",
        "relative",
        "tolerance",
        "flips",
        "near ties",
        "worst item",
        "repeated",
        "left out",
    )
    cells = [
        (
            r["measurement"],
            "left out" if r["ok"] is None else "agrees" if r["ok"] else "DISAGREES",
            _count(r["num_items"]),
            *(_power(r[k]) for k in ("max_abs", "max_rel", "tolerance")),
            _count(r["flips"]),
            _count(r["near_ties"]),
            r["worst"] or "–",
            r["repeated"] or "–",
            ", ".join(r.get("left_out") or ()) or "–",
        )
        for r in rows
    ]
    note = (
        "Every measurement of the fast, batched path against a plain one-by-one reference, on a few prompts of this run; and "
        "which of them its budget of time left out."
    )
    return Table("Sanity certificate", columns, cells, note, 2, "not checked in this run")


# -- the manifest


def _manifest_tables(reader: Reader, manifest: Manifest) -> list[Table]:
    settings = [(name, str(told.value), str(told.source)) for name, told in manifest.settings.items()]
    stages = [
        (
            r["stage"],
            str(r["version"]),
            r["status"],
            f"{r['num_items']:,}",
            f"{r['num_done']:,}",
            f"{r['num_failed']:,}",
            f"{r.get('num_rows') or 0:,}",
            f"{r['seconds']:,.1f}",
            f"{r['tokens']:,}",
            f"{r.get('prefill_tokens') or 0:,}",
            f"{r.get('padding_tokens') or 0:,}",
            f"{r['tokens'] / r['seconds']:,.0f}" if r["seconds"] and r["tokens"] else "",
        )
        for r in reader.query("SELECT * FROM stages ORDER BY rowid")
    ]
    events = [
        (r["level"], r["kind"], r["stage"] or "", r["item_key"] or "", r["message"] or "")
        for r in reader.query("SELECT * FROM events WHERE level IN ('warning', 'error') ORDER BY event_id LIMIT 50")
    ]
    packages = [(name, str(version)) for name, version in manifest.packages.items()]
    shown_apart = {"settings", "packages", "stages", "tables", "table_sha256"}
    rest = [
        (name, value)
        for name, value in _leaves({k: v for k, v in manifest.tree.items() if k not in shown_apart})
        if not name.startswith("prompts.row_hashes")
    ]
    tables = [(name, f"{n:,}", manifest.table_sha256.get(name, "")) for name, n in manifest.tables.items()]
    return [
        Table("Settings, and where each came from", ("setting", "value", "source"), settings, num_words=3),
        Table(
            "Stages",
            (
                "stage",
                "version",
                "status",
                "items",
                "done",
                "failed",
                "rows",
                "seconds",
                "tokens",
                "of contexts",
                "padding",
                "tokens/s",
            ),
            stages,
            num_words=3,
        ),
        Table(
            "Warnings and errors",
            ("level", "kind", "stage", "item", "message"),
            events,
            "The first 50; all are in the table `events`.",
            5,
            "none",
        ),
        Table("Rows of each table", ("table", "rows", "sha256 of what was measured"), tables),
        Table("Packages", ("package", "version"), packages, num_words=2),
        Table("Everything else in the manifest", ("key", "value"), rest, num_words=2),
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, value)) if key == "argv" and value else str(value)


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}".replace("-", "−")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counted.items()) or "none"
