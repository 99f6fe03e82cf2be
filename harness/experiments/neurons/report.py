"""What the report says of neurons: the strongest, some prompts, agreement with effects, curves, background, what was left out.

Reads the snapshot and the manifest and nothing else. Prompts, tokens and names are data: whoever renders the page escapes them,
and their control characters are made visible here.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from harness.experiments.experiment import Drawn, Report, Section, Table
from harness.experiments.neurons import figures, method
from harness.experiments.neurons.figures import FigureData
from harness.experiments.neurons.settings import CONTROLS, LEVEL, METRICS
from harness.experiments.neurons.summary import (
    MEASURED,
    Writes,
    beyond,
    change_told,
    first_ranking,
    in_order,
    interval_told,
    narrow,
    sets_cut,
    shown_text,
    shown_token,
    strongest,
    texts_of,
    writes_of,
)
from harness.run import Manifest
from harness.store import Reader, Row

_STRONGEST = 15
_EACH = 6
"""Neurons of a prompt: so many by what was measured, and so many by the first metric."""
_BEYOND = 15
_TOKENS = 4
_MOST_TEXT = 200
"""Signs of a prompt that are shown: its last ones."""
_MOST_CATEGORIES = 4
_MOST_NAMES = 3
STAGES = ("prompts", "dump", "partials", "background", "peaks", "targets", "influence", "effects", "writes", "analysis")
_KINDS: dict[str, str] = {
    "zero": "set to 0",
    "mean": "set to its mean over the background",
    "resample": "set to its value in another prompt",
    "add": "raised by standard deviations",
    "flip": "given the other sign",
    "swap": "moved to its value in another prompt",
}


class Run(NamedTuple):
    """What every part of the page is told from."""

    reader: Reader
    settings: dict[str, Any]
    """The experiment's own, by name."""
    stages: dict[str, str]
    """Why a stage has no rows, or not all of them."""
    first: str
    """The metric whose claims stand beside what was measured."""
    kind: str
    """What was done to neurons, in words."""
    data: FigureData

    def told(self, *needed: str, otherwise: str = "not measured") -> str:
        """In place of a table that needs these stages."""
        found = [self.stages[name] for name in needed if name in self.stages]
        return f"not measured: {'; '.join(found)}" if found else otherwise


def report(reader: Reader, manifest: Manifest) -> Report:
    """All of it, of a run that may still go on."""
    data = figures.gather(reader)
    kinds = [r["kind"] for r in reader.query("SELECT DISTINCT kind FROM effects ORDER BY kind")]
    settings = {k.removeprefix("neurons."): s.value for k, s in manifest.settings.items() if k.startswith("neurons.")}
    kind = " or ".join(_KINDS.get(str(k), str(k)) for k in kinds) or "changed"
    if settings.get("background") == "off":
        kind = kind.replace("over the background", "over the prompts themselves, as there is no background")
    run = Run(reader, settings, _stages(reader, manifest), first_ranking(reader), kind, data)
    return Report(
        question="Which neurons move the target, and does changing them do what the rankings say?",
        headlines=tuple(_headlines(run)),
        sections=(
            _strongest(run),
            _prompts(run),
            _agreement(run),
            _curves(run),
            _influence(run),
            _background(run),
            _left_out(run, manifest),
        ),
        figures={name: Drawn(*figures.CAPTIONS[name], partial(draw, data)) for name, draw in figures.FIGURES.items()},
        method=method.TERMS,
        method_text=(method.QUESTION, f"After {method.SOURCES}."),
        limits=method.LIMITS,
    )


def _stages(reader: Reader, manifest: Manifest) -> dict[str, str]:
    found = {row["stage"]: row for row in reader.query("SELECT * FROM stages")}
    planned = {stage.name for stage in manifest.fingerprint_parts.stages}
    told = {}
    for name in STAGES:
        row = found.get(name)
        if row is None:
            asked = "has not begun" if name in planned else "is not among the stages of this run"
            told[name] = f"stage {name} {asked}"
        elif row["status"] == "running":
            told[name] = f"stage {name} has done {row['num_done']:,} of {row['num_items']:,} items"
        elif not row["num_done"]:
            told[name] = (
                f"stage {name} had nothing to do" if not row["num_failed"] else f"all items of stage {name} failed"
            )
    return told


# -- the head of the page


def _headlines(run: Run) -> Iterator[str]:
    (counted,) = run.reader.query(
        "SELECT count(*) AS n, count(DISTINCT layer) AS layers, max(num_prompts) AS prompts FROM neurons"
    )
    (aimed,) = run.reader.query("SELECT count(*) AS n FROM targets")
    if counted["n"]:
        yield f"{counted['n']:,} neurons of {counted['layers']:,} layers over {counted['prompts'] or 0:,} prompts."
    if not run.data.rankings:
        why = run.told("influence", "effects", otherwise="not measured: neurons.effects is 0")
        yield f"No effect yet ({why.removeprefix('not measured: ')})."
    else:
        for r in strongest(run.reader, 1):
            claim = (
                f"; where {run.first} names it, by {_signed(r['mean'])}, and {run.first} claims {_signed(r['claimed'])}"
            )
            yield (
                f"The neuron that moves the target most is {_name(r)}: {run.kind} it changes the {run.data.unit} by "
                f"{r['total'] / r['num_measured']:.3f} up or down, mean over the {_number(r['num_measured'], 'prompt')} in "
                f"which it was measured{claim if r['claimed'] is not None else ''}."
            )
        scores = [(row, name) for name in run.data.rankings if (row := run.data.row("agreement", name, "spearman"))]
        if scores:
            ordered = sorted(scores, key=lambda s: -s[0]["value"])
            told = ", ".join(f"{name} {_interval(row, 2)}" for row, name in ordered)
            yield f"How well rankings foretell what was measured, as a rank correlation over a prompt's neurons: {told}."
    yield from _over_matched(run)
    found = beyond(run.reader)
    if found.known:
        yield (
            f"{found.higher + found.lower:,} of {found.known:,} neurons peak on these prompts otherwise than on the background "
            f"(q < {LEVEL}): {found.higher:,} higher, {found.lower:,} lower."
        )
    if not counted["n"] and not aimed["n"]:
        yield f"No statistics yet ({run.told('partials', 'peaks').removeprefix('not measured: ')})."


def _over_matched(run: Run) -> Iterator[str]:
    """By which metrics sets of neurons do better than those that are only of the same layers and as loud."""
    found = {
        mode: [
            (row, name)
            for name in METRICS
            if (row := run.data.row("curves", name, f"area_{mode}_over_matched")) is not None and row["low"] is not None
        ]
        for mode in figures.MODES
    }
    for (mode, rows), what in zip(found.items(), ("kept", "changed"), strict=True):
        sign = 1 if mode == "keep" else -1
        sure = [(row, name) for row, name in rows if min(sign * row["low"], sign * row["high"]) > 0]
        if sure:
            row, name = max(sure, key=lambda f: sign * f[0]["value"])
            yield (
                f"Sets {what}: {name} is furthest from neurons matched by layer and loudness, its area under the "
                f"curve {_interval(row, 2, signed=True)} from theirs."
            )
        elif rows:
            yield f"Sets {what}: no metric does surely better than neurons matched by layer and loudness."


# -- results


def _strongest(run: Run) -> Section:
    rows = strongest(run.reader, _STRONGEST)
    writes = _writes(run, rows)
    categories = _by_category(run, rows)
    names = [*categories] if 1 < len(categories) <= _MOST_CATEGORIES else []
    cells = []
    for r in rows:
        own = writes.get(_place(r), Writes())
        apart = (_signed(categories[name].get(_place(r))) for name in names)
        cells.append(
            (
                _name(r),
                shown_token(r["peak_token"]),
                _tokens(own.raised),
                _tokens(own.lowered),
                _plain(r["total"]),
                f"{r['num_prompts']:,}",
                _signed(r["mean"]),
                _signed(r["claimed"]),
                *apart,
                _plain(r["mean_peak"]),
                _plain(r["z_background"], 1),
            )
        )
    columns = (
        "neuron",
        "peaks at",
        "raises",
        "lowers",
        "Σ|Δ|",
        "prompts",
        "mean Δ",
        f"claimed by {run.first or METRICS[0]}",
        *(f"Δ in {shown_text(name)}" for name in names),
        "mean peak",
        "z",
    )
    note = (
        f"Δ is the measured change of the {run.data.unit}: the neuron {run.kind}. Σ|Δ|: over all prompts in which any metric "
        f"ranks it among the measured ones. Mean Δ and claim are both over the prompts in which {run.first} does; "
        "where it never does, there is no claim. A neuron raises and lowers these tokens where its activation is "
        "above 0."
    )
    table = Table("", columns, cells, note, 4, run.told("influence", "effects", otherwise=_no_effects(run)))
    return Section("strongest", "The strongest neurons", tables=(table,))


def _no_effects(run: Run) -> str:
    return "not measured: neurons.effects is 0" if run.settings.get("effects") == 0 else "not measured"


def _by_category(run: Run, rows: Sequence[Row]) -> dict[str, dict[tuple[int, int], float]]:
    """Mean Δ of these neurons in each category of prompts, where they were measured there."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    places = [r["layer"] << 32 | r["neuron"] for r in rows]
    query = f"""
        WITH each AS (
            SELECT category, prompt_id, layer, neuron, any_value({MEASURED}) AS delta
            FROM effects e JOIN targets t USING (prompt_id) JOIN prompts p USING (prompt_id)
            WHERE list_contains(?, (layer::BIGINT << 32) | neuron) GROUP BY ALL)
        SELECT category, layer, neuron, avg(delta) AS delta FROM each GROUP BY ALL ORDER BY ALL
        """
    for r in run.reader.query(query, [places]):
        found.setdefault(r["category"] or "", {})[_place(r)] = r["delta"]
    return found


def _prompts(run: Run) -> Section:
    """The most confident prompt, a typical one, and the least."""
    rows = run.reader.query("SELECT * FROM targets ORDER BY p DESC, prompt_id")
    words = {"the most sure": 0, "a typical one": len(rows) // 2, "the least sure": len(rows) - 1}
    chosen = {place: word for word, place in reversed(words.items())} if rows else {}
    tables = [_prompt(run, rows[place], chosen[place]) for place in sorted(chosen)]
    if not tables:
        tables = [Table("", (), (), absent=run.told("targets"))]
    text = (
        f"{_number(len(chosen), 'prompt')} of {len(rows):,}: those of whose target the model is most and least "
        f"sure, and one between. Of each the {_EACH} neurons with the largest measured effects, and the {_EACH} "
        f"that {run.first or METRICS[0]} ranks highest. A dash under a metric: it does not rank the neuron among "
        "the measured ones.",
    )
    return Section("prompts", "Some prompts", text if rows else (), tuple(tables))


def _prompt(run: Run, target: Row, word: str) -> Table:
    prompt_id = target["prompt_id"]
    found = run.reader.query("SELECT text FROM contexts WHERE prompt_id = ?", [prompt_id])
    text = found[0]["text"] if found else ""
    shown = ("…" if len(text) > _MOST_TEXT else "") + text[-_MOST_TEXT:]
    names = texts_of(run.reader, (*target["token_ids"], *target["contrast_ids"], *target["top_ids"]))
    token, contrast, top = (
        "".join(shown_token(names.get(i)) for i in target["token_ids"]),
        "".join(shown_token(names.get(i)) for i in target["contrast_ids"]),
        ", ".join(
            f"{shown_token(names.get(i))} {p:.2f}" for i, p in zip(target["top_ids"], target["top_probs"], strict=True)
        ),
    )
    metrics = in_order([r["metric"] for r in run.reader.query("SELECT DISTINCT metric FROM influence_totals")])
    rows = _neurons_of(run, prompt_id)
    writes = _writes(run, rows)
    cells = []
    for r in rows:
        own = writes.get(_place(r), Writes()).at(r["activation"])
        claims = (_signed(r["claims"].get(m)) for m in metrics)
        place = "–" if r["place"] is None else f"{r['place']:,}"
        cells.append(
            (
                _name(r),
                _tokens(own.raised),
                _tokens(own.lowered),
                _plain(r["activation"]),
                place,
                _signed(r["measured"]),
                *claims,
            )
        )
    is_measured = any(r["measured"] is not None for r in rows)
    beside = "claims" if is_measured else "contributes"
    columns = (
        "neuron",
        "raises here",
        "lowers here",
        "activation",
        f"place by {run.first or (metrics or METRICS)[0]}",
        "measured Δ",
        *(f"{m} {beside}" for m in metrics),
    )
    against = f" against {contrast}" if contrast else ""
    note = (
        f"Target {token}{against} behind token {target['position']:,}: p = {target['p']:.3g}, rank "
        f"{target['rank']:,}, logit {_plain(target['logit'])}, {_plain(target['margin'])} over the best other. "
        f"Likeliest: {top}."
        + (
            ""
            if is_measured
            else " Effects were not measured: what a metric ascribes stands there, not what a change would do."
        )
    )
    title = f"Prompt {shown_text(prompt_id)}, {word}: “{_lines_shown(shown)}” → {token}"
    return Table(title, columns, cells, note, 3, run.told("influence", otherwise="no neuron has an influence here"))


def _neurons_of(run: Run, prompt_id: str) -> list[Row]:
    """The prompt's neurons: `measured`, place by the first metric, `claims` by metric. Where nothing was measured, "
    "by value."""
    first = run.first
    rows = run.reader.query(
        f"""
        WITH each AS (
            SELECT layer, neuron, any_value(e.activation) AS activation, any_value({MEASURED}) AS measured,
                   min(place) FILTER (ranking = ?) AS place
            FROM effects e JOIN targets t USING (prompt_id) WHERE prompt_id = ? GROUP BY layer, neuron)
        SELECT * FROM each
        QUALIFY row_number() OVER (ORDER BY abs(measured) DESC, layer, neuron) <= {_EACH} OR place <= {_EACH}
        ORDER BY abs(measured) DESC, layer, neuron
        """,
        [first, prompt_id],
    )
    column, table, name = "predicted", "effects", "ranking"
    if not rows:
        column, table, name = "value", "influence", "metric"
        metrics = in_order([r["metric"] for r in run.reader.query("SELECT DISTINCT metric FROM influence_totals")])
        rows = run.reader.query(
            f"""
            SELECT layer, neuron, activation, NULL AS measured, place FROM influence
            WHERE prompt_id = ? AND metric = ? AND place <= {_EACH} ORDER BY place
            """,
            [prompt_id, metrics[0] if metrics else ""],
        )
    places = [r["layer"] << 32 | r["neuron"] for r in rows]
    claims: dict[tuple[int, int], dict[str, float]] = {}
    for r in run.reader.query(
        f"SELECT layer, neuron, {name} AS metric, {column} AS claim FROM {table} "
        "WHERE prompt_id = ? AND list_contains(?, (layer::BIGINT << 32) | neuron)",
        [prompt_id, places],
    ):
        claims.setdefault(_place(r), {})[r["metric"]] = r["claim"]
    return [{**r, "claims": claims.get(_place(r), {})} for r in rows]


def _agreement(run: Run) -> Section:
    measures = {"spearman": "rank correlation", "pearson": "correlation", "sign": "same sign", "slope": "slope"}
    cells = []
    for name in run.data.rankings:
        rows = {m: run.data.row("agreement", name, m) for m in measures}
        if any(rows.values()):
            num = max(row["n"] for row in rows.values() if row)
            cells.append((name, *(_interval(row) for row in rows.values()), f"{num:,}"))
    note = "Means over prompts [95 %]. Slope 1: claims are of the right size on average; below 1 they are too large."
    columns = ("ranking", *(f"{m} [95 %]" for m in measures.values()), "prompts")
    table = Table(
        "", columns, cells, note, absent=run.told("influence", "effects", "analysis", otherwise=_no_effects(run))
    )
    text = (
        f"Each metric says what will happen to the target when a neuron is {run.kind}; then it was done. Only the "
        "neurons that a metric itself ranks highest are held against it, so that a metric is judged where it is "
        "used.",
    )
    return Section("agreement", "Claims against what was measured", text if cells else (), (table,), ("agreement",))


def _curves(run: Run) -> Section:
    names = in_order([k[1] for k in run.data.statistics if k[0] == "curves"])
    cells = []
    for name in names:
        told = [name if name not in CONTROLS else f"{name} (control)"]
        for mode in figures.MODES:
            over = run.data.row("curves", name, f"area_{mode}_over_matched")
            told += [_interval(run.data.row("curves", name, f"area_{mode}")), _interval(over, signed=True)]
            told.append("–" if over is None else _small(over["p"]))
        cells.append(tuple(told))
    columns = (
        "ranking",
        "area kept [95 %]",
        "over matched",
        "p",
        "area dropped [95 %]",
        "over matched",
        "p",
    )
    note = (
        "Areas under m(k) over ln k, all prompts together. Kept: the more the better. Dropped: the less the better. "
        "Over matched: less the area of neurons matched by layer and decile of |activation|, paired by prompt."
    )
    few, num = narrow(run.reader)
    text = []
    if few:
        text.append(
            f"In {few:,} of {_number(num, 'prompt')} all neurons together move the target by less "
            "than a tenth of what they do in the median prompt. Their own m(k) divides by that; figure and table "
            "are of all prompts together."
        )
    absent = run.told("effects", "analysis", otherwise="not measured: neurons.curve names no size")
    return Section(
        "curves",
        "Sets of neurons, with controls",
        tuple(text),
        (Table("", columns, cells, note, absent=absent),),
        ("curves",),
    )


def _influence(run: Run) -> Section:
    names = in_order([k[1] for k in run.data.statistics if k[0] == "influence"])
    cells = []
    for name in names:
        rows = {
            m: run.data.row("influence", name, m)
            for m in ("effective", "num_selected", "largest_residual", "largest_gap")
        }
        held = [("–" if row is None else _interval(row, 1)) for row in (rows["effective"], rows["num_selected"])]
        residual, gap = rows["largest_residual"], rows["largest_gap"]
        ends = (
            "–" if residual is None else _small_size(residual["value"]),
            "–" if gap is None else _percent(gap["value"]),
        )
        num = max((row["n"] for row in rows.values() if row), default=0)
        cells.append((name, *held, *ends, f"{num:,}"))
    share = run.settings.get("cumulative")
    most = run.settings.get("max_selected")
    note = (
        "Effective: e^H of the shares of |influence|, the number of equally important neurons. "
        + (
            f"Selected: the smallest set that holds {share:g} of Σ|influence|, {most:,} at most. "
            if share and most
            else ""
        )
        + "Residual: what dla's parts miss of the logit; gap: what integrated gradients miss of the difference; both at most "
        "over prompts."
    )
    columns = ("metric", "effective neurons [95 %]", "selected [95 %]", "residual", "gap", "prompts")
    table = Table("", columns, cells, note, absent=run.told("influence", "analysis"))
    return Section("influence", "How many neurons, and where", (), (table,), ("layers",))


def _background(run: Run) -> Section:
    is_off = run.settings.get("background") == "off"
    reason = (
        "not measured: there is no background (neurons.background)"
        if is_off
        else run.told("background", "peaks", "analysis")
    )
    sides = {
        r["layer"]: (f"{r['higher']:,}", f"{r['lower']:,}")
        for r in run.reader.query(
            "SELECT layer, count(*) FILTER (z_background > 0 AND q < ?) AS higher, count(*) FILTER (z_background < 0 AND q < ?) "
            "AS lower FROM neurons GROUP BY layer", [LEVEL, LEVEL]
        )
    }  # fmt: skip
    shares = [
        (f"{layer}", f"{row['n']:,}", *sides.get(layer, ("–", "–")), _percent(row["value"]))
        for layer, row in run.data.background()
    ]
    rows = run.reader.query(
        f"""
        SELECT n.*, v.text AS peak_token, n.max_signed AS activation FROM top_neurons t JOIN neurons n USING (layer, neuron)
        LEFT JOIN vocabulary v ON v.token_id = n.peak_token_mode
        WHERE n.z_background IS NOT NULL ORDER BY t.place LIMIT {_BEYOND}
        """
    )
    writes = _writes(run, rows)
    cells = []
    for r in rows:
        own = writes.get(_place(r), Writes()).at(r["activation"])
        cells.append(
            (
                _name(r),
                shown_token(r["peak_token"]),
                _tokens(own.raised),
                _percent(r["peak_token_share"]),
                _percent(r["share_functional"]),
                _plain(r["mean_peak"]),
                _plain(r["peak_background"]),
                _plain(r["z_background"], 1),
                _small(r["q"]),
            )
        )
    columns = (
        "neuron",
        "peaks most often at",
        "raises there",
        "of its peaks",
        "at function words",
        "mean peak",
        "background's",
        "z",
        "q",
    )
    return Section(
        "background",
        "Against the background",
        (
            "A neuron that peaks on every text says nothing of these prompts: mean peaks are held against those over other "
            "texts. A peak is a maximum: prompts that are shorter than those texts peak lower for that alone.",
        ),
        (
            Table("The furthest beyond", columns, cells, "By |z|. Peaks are not influence.", 3, reason),
            Table("By layer", ("layer", "neurons", "higher", "lower", "share"), shares, f"q < {LEVEL}.", 1, reason),
        ),
        ("background",),
    )


def _left_out(run: Run, manifest: Manifest) -> Section:
    cells = [cell for part in (_not_counted(run), _not_ranked(run), _failed(run, manifest)) for cell in part]
    table = Table("", ("what", "how much", "why"), cells, num_words=3, absent="nothing")
    return Section("left_out", "What was left out", (), (table,))


def _not_counted(run: Run) -> Iterator[tuple[str, str, str]]:
    own = run.settings
    (tokens,) = run.reader.query(
        "SELECT coalesce(sum(len(token_ids)), 0) AS all_tokens, coalesce(sum(len(positions)), 0) AS read, "
        "coalesce(sum(len(list_filter(positions, lambda p: is_counted[p + 1]))), 0) AS counted FROM contexts"
    )
    if tokens["all_tokens"] > tokens["read"]:
        why = f"neurons.positions = {own.get('positions')}: their activations are neither dumped nor counted"
        yield "tokens not read", f"{tokens['all_tokens'] - tokens['read']:,} of {tokens['all_tokens']:,}", why
    if tokens["read"] > tokens["counted"]:
        why = f"special tokens, and the first {own.get('skip_first', 0)} of each prompt (neurons.skip_first): in no statistic"
        yield "tokens not counted", f"{tokens['read'] - tokens['counted']:,} of {tokens['read']:,}", why
    if layers := own.get("layers"):
        told = "neither read nor ranked nor changed; dla's parts of them count as missing"
        yield "layers", f"all but {', '.join(map(str, layers))}", f"neurons.layers: the others are {told}"
    for r in run.reader.query(
        "SELECT stage, min(layer) AS layer, count(*) AS n, list(prompt_id ORDER BY prompt_id)[1:?] AS names FROM "
        "left_out "
        "GROUP BY stage ORDER BY stage", [_MOST_NAMES]
    ):  # fmt: skip
        why = "too long for the model" if r["layer"] < 0 else "an activation is no finite number"
        names = ", ".join(shown_text(n) for n in r["names"])
        yield f"texts of stage {r['stage']}", f"{r['n']:,}", f"{why}: {names}{', …' if r['n'] > _MOST_NAMES else ''}"
    for r in run.reader.query("SELECT count(*) AS n, max(tokens_error) AS error FROM neurons WHERE tokens_error > 0"):
        if r["n"]:
            yield "rare peak tokens", f"{r['n']:,} neurons", f"counts may be too low by up to {r['error']:,}"


def _not_ranked(run: Run) -> Iterator[tuple[str, str, str]]:
    own = run.settings
    if cut := sets_cut(run.reader):
        told = ", ".join(f"{metric} in {few:,} of {total:,}" for metric, (few, total) in cut.items())
        yield (
            "selected neurons",
            f"cut: {told} prompts",
            "more hold the share asked for than are kept (neurons.max_selected)",
        )
    if run.data.rankings:
        limit = own.get("effects")
        told = "the first" if limit is None else f"the first {limit:,}"
        why = (
            f"of each ranking {told} of a prompt (neurons.effects): what no metric ranks so high was not changed alone"
        )
        (n,) = run.reader.query("SELECT count(DISTINCT (prompt_id, layer, neuron)) AS n FROM effects")
        (total,) = run.reader.query(
            "SELECT (SELECT count(*) FROM neurons) * count(DISTINCT prompt_id) AS n FROM effects"
        )
        of = f" of {total['n']:,}" if total["n"] else ""
        yield "neurons not changed", f"{n['n']:,}{of} prompts × neurons were", why
    if own.get("context") == "at" and run.data.rankings:
        yield (
            "earlier positions",
            "all",
            "neurons.context = at: neurons count, and are changed, where the target is read and nowhere else",
        )
    if own.get("dump") == "off":
        yield "whole activations", "all", "neurons.dump = off: no files of them"
    elif own.get("dump") in ("float16", "bfloat16"):
        yield (
            "digits of dumped activations",
            "",
            f"files hold {own['dump']}; statistics and influence were made from unrounded ones",
        )


def _failed(run: Run, manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    rejected = manifest.prompts.rejected or {}
    for rule, number in sorted(rejected.items()):
        yield "rows of the prompt file", f"{number:,}", f"rejected: {shown_text(str(rule))}"
    read, used = manifest.prompts.read, manifest.prompts.used
    if read is not None and used is not None and used < read:
        yield "prompts", f"{read - used:,} of {read:,}", "not taken: data.limit"
    for r in run.reader.query("SELECT stage, num_failed, num_items FROM stages WHERE num_failed > 0 ORDER BY rowid"):
        yield (
            f"items of stage {r['stage']}",
            f"{r['num_failed']:,} of {r['num_items']:,}",
            "failed: see warnings and errors below",
        )


# -- cells


def _writes(run: Run, rows: Sequence[Row]) -> dict[tuple[int, int], Writes]:
    return writes_of(run.reader, [_place(r) for r in rows], _TOKENS)


def _place(row: Row) -> tuple[int, int]:
    return row["layer"], row["neuron"]


def _name(row: Row) -> str:
    return f"{row['layer']}.{row['neuron']}"


def _tokens(texts: Sequence[str]) -> str:
    return " ".join(texts) or "–"


def _lines_shown(text: str) -> str:
    """A prompt in a line: its breaks as a sign."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _plain(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return change_told(value).replace("-", "−")


def _interval(row: Row | None, digits: int = 3, *, signed: bool = False) -> str:
    told = interval_told(row, digits).replace("-", "−")
    return f"+{told}" if signed and row is not None and (row["value"] or 0) > 0 else told


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _small(p: float | None) -> str:
    """A p or q."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _small_size(value: float) -> str:
    return f"{value:.1e}".replace("-", "−")
