"""What the report says of semantic gravity: headlines, tables, figures, worked failures, method and limits.

Reads the snapshot and the manifest and nothing else. Prompts and completions are data, and escaped wherever they stand.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.experiments.experiment import Drawn, Report, Section, Table
from harness.experiments.gravity import figures, method
from harness.experiments.gravity.bins import BIN_NAMES
from harness.experiments.gravity.figures import FigureData
from harness.experiments.gravity.summary import Summary, summarise
from harness.run import Manifest, seed_of
from harness.stats import Estimate, Support
from harness.store import Reader, Row

NUM_EXAMPLES = 20
SIGNIFICANT = 0.05
"""The false-discovery rate below which a difference is called significant."""
_MEASURES = {"iar": "IAR", "nf": "NF", "tmf": "TMF", "pi": "PI"}
_SPANS = ("instruction", "negation", "mention", "question")
_PAPER_MODEL = "Qwen2.5-7B-Instruct"


class Segment(NamedTuple):
    """A piece of text with the spans it lies in, its share of attention, and that share against the largest (0 to 1)."""

    text: str
    spans: tuple[str, ...] = ()
    share: float | None = None
    shade: float = 0.0


@dataclass(frozen=True)
class Example:
    """One failure, worked: all the page shows of it."""

    prompt: Row
    context: list[Segment]
    completion: list[Segment]
    masses: list[tuple[str, str, str]]
    """Span, tokens, attention."""
    attention_layer: int | None
    lens: list[tuple[str, ...]]
    """Layer, p_target, p_emitted, entropy."""
    curves: tuple[str, str]
    """The lens' p_target and p_emitted as points of a polyline, 0…100 wide and 0…30 high."""


def report(reader: Reader, manifest: Manifest) -> Report:
    """All of it, of a run that may still go on."""
    data = figures.gather(reader, seed_of(manifest))
    summary = summarise(reader, manifest)
    return Report(
        question="How often does a model say X when it is told not to, and what inside it explains that?",
        headlines=tuple(_headlines(data, summary)),
        sections=(
            _outcome(summary),
            _violation(summary, data),
            _suppression(data),
            _attention(reader, data),
            _mechanism(data),
            _patching(data),
            _taxonomy(reader, data),
            *_paper(manifest, data),
            Section("examples", "Worked failures", html=_examples_page(_examples(reader))),
        ),
        figures={name: Drawn(*figures.CAPTIONS[name], partial(draw, data)) for name, draw in figures.FIGURES.items()},
        method=method.TERMS,
        method_text=(f"After {method.SOURCE}. {method.QUESTION}",),
        limits=method.LIMITS,
        style=_template("style.css"),
    )


def _examples_page(examples: Sequence[Example]) -> str:
    return _environment().get_template("examples.html.j2").render(examples=examples)


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_TEMPLATES = Path(__file__).parent / "templates"


# -- the head of the page


def _headlines(data: FigureData, summary: Summary) -> Iterator[str]:
    """A sentence or two a condition."""
    for c in summary.conditions:
        if c.sample_rate is None:
            continue
        told = f"Under “{c.condition}”, {_percent(c.sample_rate)} of the sampled answers contain X"
        slope = next(iter(data.where("fit", condition=c.condition, measure="slope")), None)
        if slope is not None and slope["low"] is not None:
            how = "rises" if slope["low"] > 0 else "falls" if slope["high"] < 0 else "does not clearly change"
            told += f"; the rate {how} with pressure (slope of the fit {_estimate(slope, 2)}"
            told += f", prompts with P0 {_rests_on(c.fit.support)[0]})" if c.fit else ")"
        yield told + "."


# -- results


def _outcome(summary: Summary) -> Section:
    rows = [
        (
            c.condition,
            f"{c.num_prompts:,}",
            _number(c.p_sem),
            _number(c.p_word),
            _number(c.greedy_rate),
            _mean(c.sample_rate),
            _number(c.format_rate),
        )
        for c in summary.conditions
    ]
    columns = (
        "condition",
        "prompts",
        "mean P(X)",
        "mean P(X, whole word)",
        "greedy says X",
        "samples say X [95 %]",
        "one word",
    )
    note = "P(X) is p_sem, whole word p_word; “one word” is the share of answers that are exactly one word, as asked."
    return Section("headline", "Headline", tables=(Table("By condition", columns, rows, note),))


def _violation(summary: Summary, data: FigureData) -> Section:
    sampled = [c for c in summary.conditions if c.sample_rate is not None]
    bins = [
        (name, f"{summary.bin_counts[b]:,}", *(_mean(c.by_bin[b]) for c in sampled)) for b, name in enumerate(BIN_NAMES)
    ]
    names = tuple(c.condition for c in sampled)
    rates = [r for r in data.where("rates") if r["grouping"].startswith("category:")]
    categories = list(dict.fromkeys(r["grouping"] for r in rates))
    value = {(r["grouping"], r["condition"]): r for r in rates}
    by_category = [(g.removeprefix("category:"), *(_estimate(value.get((g, c))) for c in names)) for g in categories]
    fits, supports = [], {c.condition: c.fit.support for c in summary.conditions if c.fit is not None}
    for condition in data.compared:
        fit = {r["measure"]: r for r in data.where("fit", condition=condition, grouping="all")}
        if fit:
            fits.append(
                (
                    condition,
                    *(_estimate(fit.get(m), 2) for m in ("intercept", "slope")),
                    _estimate(fit.get("mcfadden_r2")),
                    f"{fit['slope']['n']:,}",
                    *_rests_on(supports.get(condition)),
                )
            )
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for r in data.where("fit"):
        if r["grouping"].startswith("group:"):
            groups.setdefault((r["condition"], r["grouping"]), {})[r["measure"]] = r
    calibration = [
        (c, *(_estimate(g.get(f"calibration_{m}")) for m in ("p0", "observed", "predicted")), _largest_n(g.values()))
        for (c, _), g in sorted(groups.items())
    ]
    phrasing = [
        (
            r["condition"],
            r["measured"],
            _PHRASING[r["measure"]],
            _estimate(r),
            _small(r["p"]),
            _small(r["q"]),
            f"{r['n']:,}",
        )
        for r in data.where("phrasing", grouping="difference")
    ]
    return Section(
        "violation",
        "Violation and pressure",
        (),
        (
            Table(
                "Share of samples that say X, by pressure P0",
                ("P0", "prompts", *names),
                bins if sampled else [],
                "Interval: 95 %, bootstrap over prompts. P0 is P(X) under baseline.",
            ),
            Table("Share of samples that say X, by category", ("category", *names), by_category),
            Table(
                "Fit: P(says X) = σ(intercept + slope·P0)",
                ("condition", "intercept", "slope", "McFadden R²", "prompts", "their P0", "5–95 % of it"),
                fits,
                "The fit rests on the P0 of its prompts, and is dashed in the figure where none reaches.",
                absent="no fit: it needs stage analysis, samples of a condition beside the baseline, and both outcomes",
            ),
            Table(
                "Calibration of the fit, in groups of equally many prompts",
                ("condition", "mean P0", "observed rate [95 %]", "rate of the fit", "prompts"),
                calibration,
                absent="no fit",
            ),
            Table(
                "Phrasings compared: difference from the reference, paired by prompt",
                ("condition", "reference", "measure", "difference [95 %]", "p", "q", "prompts"),
                phrasing,
                "q controls the false-discovery rate over the whole table. Below zero: fewer violations than the reference.",
                num_words=3,
                absent="no further phrasing was measured in this run",
            ),
        ),
        ("violation",),
    )


def _rests_on(support: Support | None) -> tuple[str, str]:
    """The P0 of a fit's prompts: all of them, and from the 5th to the 95th in a hundred."""
    if support is None:
        return "–", "–"
    return (
        f"{_number(support.low)} to {_number(support.high)}",
        f"{_number(support.most_low)} to {_number(support.most_high)}",
    )


_PHRASING = {"violation_rate": "samples say X", "greedy_rate": "greedy says X", "p_sem": "P(X)"}


def _suppression(data: FigureData) -> Section:
    rows = []
    for condition in data.compared:
        for group in ("all", "success", "failure", "difference"):
            found = {r["measure"]: r for r in data.where("suppression", condition=condition, grouping=group)}
            if found:
                name = "failure − success" if group == "difference" else group
                rows.append(
                    (
                        condition,
                        name,
                        *(_estimate(found.get(m)) for m in ("delta", "relative", "log")),
                        _small((found.get("delta") or {}).get("q")),
                        _largest_n(found.values()),
                    )
                )
    columns = ("condition", "greedy outcome", "Δ = P0 − P1", "relative Δ / P0", "ln P0 − ln P1", "q of Δ", "prompts")
    note = "Success: the greedy answer avoids X. The relative measure has no lower bound, so its mean may be extreme."
    return Section(
        "suppression",
        "Suppression",
        (),
        (Table("Suppression of P(X) by outcome", columns, rows, note, 2),),
        ("suppression",),
    )


def _attention(reader: Reader, data: FigureData) -> Section:
    """Single heads, which the figures do not need, are read here: at most fifteen of them and a count."""
    if "statistics" not in reader.tables():
        return Section("attention", "Attention", (), (Table("", (), []),), ("attention", "priming"))
    where = (
        "analysis = 'attention' AND head >= 0 AND grouping = 'difference' AND measured = condition AND step_kind = 'first' "
        f"AND measure IN ({', '.join(repr(m) for m in _MEASURES)})"
    )
    counts = reader.query(
        f"SELECT condition, measure, count(*) AS tested, count(*) FILTER (q < {SIGNIFICANT}) AS significant FROM statistics "
        f"WHERE {where} AND q IS NOT NULL GROUP BY ALL ORDER BY condition, measure"
    )
    strongest = reader.query(
        f"SELECT * FROM statistics WHERE {where} AND q < {SIGNIFICANT} AND se > 0 "
        "ORDER BY abs(value / se) DESC, condition, measure, layer, head LIMIT 15"
    )
    counted = [(r["condition"], _MEASURES[r["measure"]], f"{r['significant']:,}", f"{r['tested']:,}") for r in counts]
    rows = [
        (
            r["condition"],
            _MEASURES[r["measure"]],
            str(r["layer"]),
            str(r["head"]),
            _estimate(r, 4),
            _small(r["q"]),
            f"{r['n']:,}",
        )
        for r in strongest
    ]
    total = sum(r["significant"] for r in counts)
    text = ()
    if counts:
        tested = sum(r["tested"] for r in counts)
        told = f"{total:,} of {tested:,} differences between failures and successes are significant"
        text = (
            f"{told if total else f'None of {tested:,} differences between failures and successes is significant'} "
            f"at a false-discovery rate of {SIGNIFICANT} (heads of all layers, first step, under the condition itself).",
        )
    return Section(
        "attention",
        "Attention",
        text,
        (
            Table("Significant heads", ("condition", "measure", "significant", "tested"), counted, num_words=2),
            Table(
                "Strongest differences, failure − success",
                ("condition", "measure", "layer", "head", "difference [95 %]", "q", "prompts"),
                rows,
                "Ordered by difference over standard error. q: Benjamini–Hochberg within a measure.",
                2,
                "none is significant" if counts else "not measured",
            ),
        ),
        ("attention", "priming"),
    )


def _mechanism(data: FigureData) -> Section:
    return Section(
        "mechanism",
        "Lens and contributions",
        (),
        (_lens_table(data), _contribution_table(data)),
        ("lens", "contributions"),
    )


def _lens_table(data: FigureData) -> Table:
    rows = []
    found = data.where("lens", step_kind="first", measure="p_target")
    last = max((r["layer"] for r in found), default=-1)
    at = {(r["condition"], r["measured"], r["grouping"]): r for r in found if r["layer"] == last}
    for condition in data.compared:
        for group in ("failure", "success", "difference"):
            before, after = at.get((condition, "baseline", group)), at.get((condition, condition, group))
            if before or after:
                name = "failure − success" if group == "difference" else group
                rows.append(
                    (
                        condition,
                        name,
                        _estimate(before),
                        _estimate(after),
                        _small((after or {}).get("q")),
                        _largest_n([r for r in (before, after) if r]),
                    )
                )
    columns = ("condition", "greedy outcome", "under baseline", "under the condition", "q", "prompts")
    return Table(
        f"Logit lens at the last layer ({last}): P(first token of X)" if rows else "Logit lens at the last layer",
        columns,
        rows,
        num_words=2,
    )


def _contribution_table(data: FigureData) -> Table:
    parts = {"attn_contrib": "attention", "ffn_contrib": "MLP (FFN)"}
    found = [
        r
        for r in data.where("decomposition", step_kind="first")
        if r["measured"] == r["condition"] and r["measure"] in parts
    ]
    layers = sorted({r["layer"] for r in found})[-3:]
    at = {(r["condition"], r["layer"], r["measure"], r["grouping"]): r for r in found}
    rows = []
    for condition in data.compared:
        for layer in layers:
            for part, name in parts.items():
                three = [at.get((condition, layer, part, g)) for g in ("failure", "success", "difference")]
                if any(three):
                    rows.append(
                        (condition, name, str(layer), *(_estimate(r) for r in three), _small((three[2] or {}).get("q")))
                    )
    columns = ("condition", "part", "layer", "failure", "success", "failure − success", "q")
    return Table("Contributions to P(X) at the last layers, first step", columns, rows, num_words=2)


def _patching(data: FigureData) -> Section:
    rows = []
    for condition in data.compared:
        flips = {
            (r["patch"], r["layer"]): r
            for r in data.where("patching", condition=condition, measure="flip", grouping="all")
        }
        effects = data.where("patching", condition=condition, measure="delta_p", grouping="all")
        effects = [r for r in effects if r["value"] is not None]
        for patch in dict.fromkeys([*figures.PATCHES, *sorted({r["patch"] for r in effects})]):
            if mine := [r for r in effects if r["patch"] == patch]:
                best, worst = (pick(mine, key=lambda r: (r["value"], -r["layer"])) for pick in (max, min))
                rows.append(
                    (
                        condition,
                        figures.PATCHES.get(patch, patch),
                        str(best["layer"]),
                        _estimate(best),
                        _number((flips.get((patch, best["layer"])) or {}).get("value")),
                        str(worst["layer"]),
                        _estimate(worst),
                        _number((flips.get((patch, worst["layer"])) or {}).get("value")),
                        f"{best['n']:,}",
                    )
                )
    counts = {(r["condition"], r["grouping"]): r["value"] for r in data.where("patching", measure="num_prompts")}
    text = tuple(
        f"Under “{c}”, {_number(counts.get((c, 'success')), 0)} successes and "
        f"{_number(counts.get((c, 'failure')), 0)} failures were patched."
        for c in dict.fromkeys(c for c, _ in counts)
    )
    columns = (
        "condition",
        "patch",
        "layer ↑",
        "largest ΔP(X) [95 %]",
        "verdicts flipped",
        "layer ↓",
        "smallest ΔP(X) [95 %]",
        "verdicts flipped",
        "prompts",
    )
    note = "The layers of the largest and the smallest mean change, picked from all layers: read them with the figure."
    return Section(
        "patching",
        "Activation patching",
        text,
        (Table("Strongest layers by kind of patch", columns, rows, note, 2),),
        ("patching",),
    )


def _taxonomy(reader: Reader, data: FigureData) -> Section:
    rows = []
    for condition in data.compared:
        found = {r["grouping"]: r for r in data.where("taxonomy", condition=condition)}
        if found:
            counts = [(found.get(kind) or {}).get("value") for kind in ("priming", "override", "unknown")]
            rows.append((condition, *(_number(c, 0) for c in counts), _number(math.fsum(c or 0 for c in counts), 0)))
    rule = next((r["method"] for r in data.where("taxonomy")), "")
    columns = ("condition", "priming", "override", "unknown", "greedy failures")
    return Section(
        "taxonomy",
        "Taxonomy of failures",
        (f"Rule: {rule}.",) if rule else (),
        (Table("Failures by kind", columns, rows),),
        ("taxonomy",),
    )


def _paper(manifest: Manifest, data: FigureData) -> list[Section]:
    """The published numbers beside ours, for the model they were published for."""
    name = (manifest.model.name or "").rstrip("/")
    if name.rsplit("/", 1)[-1] != _PAPER_MODEL:
        return []

    def ours(analysis: str, places: int = 3, **keys: Any) -> str:
        return _estimate(next(iter(data.where(analysis, condition="negative", **keys)), None), places)

    # Numbers of the right-hand column: arXiv 2601.08070.
    by_bin = ("0.091 (1,193 prompts)", "0.201 (162)", "0.204 (103)", "0.208 (126)", "0.463 (916)")
    rows = [
        ("fit: intercept", ours("fit", 2, measure="intercept"), "−2.40"),
        ("fit: slope", ours("fit", 2, measure="slope"), "2.27 [2.21, 2.33], resampled over samples"),
        *(
            (f"samples say X, P0 in {b}", ours("rates", grouping=b), published)
            for b, published in zip(BIN_NAMES, by_bin, strict=True)
        ),
        ("Δ in successes", ours("suppression", measure="delta", grouping="success"), "0.228"),
        ("Δ in failures", ours("suppression", measure="delta", grouping="failure"), "0.052"),
        ("priming failures", ours("taxonomy", 0, grouping="priming"), "441"),
        ("override failures", ours("taxonomy", 0, grouping="override"), "63"),
    ]
    for outcome, (before, after) in {"failure": ("0.71", "0.66"), "success": ("0.30", "0.08")}.items():
        for measured, published in (("baseline", before), ("negative", after)):
            keys = {"step_kind": "first", "measure": "p_target", "layer": 27, "grouping": outcome, "measured": measured}
            rows.append((f"lens, last layer, {outcome}, {measured}", ours("lens", **keys), published))
    for part, (failure, success) in {"ffn_contrib": ("0.386", "0.097"), "attn_contrib": ("−0.132", "−0.048")}.items():
        for outcome, published in (("failure", failure), ("success", success)):
            keys = {"step_kind": "first", "measure": part, "layer": 27, "grouping": outcome, "measured": "negative"}
            rows.append((f"{part}, layer 27, {outcome}", ours("decomposition", **keys), published))
    note = (
        "The paper sums overlapping spellings and clamps the sum at 1; ours is the disjoint sum p_sem. Its prompts are not "
        "those of this run, so only sizes and signs compare."
    )
    return [
        Section(
            "paper",
            f"Beside the paper (arXiv {method.PAPER})",
            (),
            (Table("Condition “negative”", ("quantity", "this run [95 %]", "paper"), rows, note),),
        )
    ]


# -- worked failures


def _examples(reader: Reader) -> list[Example]:
    """At most `NUM_EXAMPLES` failures, from every category and kind in turn, those with the highest P1 first."""
    failures = reader.query(
        """
        SELECT o.prompt_id, o.condition, o.taxonomy, p.category, p.question, p.target, s.p0, s.p1, s.delta, v.rate
        FROM outcomes o JOIN prompts p USING (prompt_id)
             LEFT JOIN suppression s USING (prompt_id, condition)
             LEFT JOIN violation v USING (prompt_id, condition)
        WHERE o.outcome = 'failure' ORDER BY s.p1 DESC NULLS LAST, o.prompt_id, o.condition
        """
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    seen: set[str] = set()
    for row in failures:
        if row["prompt_id"] not in seen:  # a prompt is worked once, under the condition where it fails most
            seen.add(row["prompt_id"])
            groups.setdefault((row["category"], row["taxonomy"] or "unknown"), []).append(row)
    in_turn = (row for turn in zip_longest(*groups.values()) for row in turn if row is not None)
    chosen = [row for row, _ in zip(in_turn, range(NUM_EXAMPLES), strict=False)]
    return [_example(reader, row) for row in chosen]


def _example(reader: Reader, row: Row) -> Example:
    key = [row["prompt_id"], row["condition"]]
    here = "prompt_id = ? AND condition = ?"
    context = next(
        iter(reader.query(f"SELECT * FROM contexts WHERE {here}", key)), {"text": "", "token_ids": [], "spans": None}
    )
    rows = reader.query(
        f"SELECT layer, mean_row FROM attention WHERE {here} AND step_kind = 'first' AND mean_row IS NOT NULL ORDER BY layer",
        key,
    )
    # Three quarters deep: past the layers that gather the prompt, before the last ones, which mostly rest on the first token.
    late = rows[round(0.75 * (len(rows) - 1))] if rows else None
    shares = list(late["mean_row"]) if late and len(late["mean_row"]) == len(context["token_ids"]) else None
    spans = {name: (s[0], s[1]) for name in _SPANS if (s := (context["spans"] or {}).get(name))}
    offsets = [(start, end) for start, end in context.get("offsets") or []]
    if offsets:
        segments = token_segments(context["text"], offsets, shares, spans)
    else:
        segments = _plain_segments(context["text"], row["question"], row["target"])
    lens = reader.query(
        f"SELECT layer, p_target, p_emitted, entropy FROM lens WHERE {here} AND step_kind = 'first' ORDER BY layer", key
    )
    answer = reader.query(
        "SELECT c.text, d.char_spans FROM completions c JOIN detections d USING (prompt_id, condition, mode, sample_id) "
        f"WHERE {here} AND mode = 'greedy'",
        key,
    )[0]
    return Example(
        prompt=row,
        context=segments,
        completion=_marked(answer["text"], [(s[0], s[1]) for s in answer["char_spans"] or []], "occurrence"),
        masses=[(n, f"{b - a}", _number(math.fsum(shares[a:b]))) for n, (a, b) in spans.items()] if shares else [],
        attention_layer=late["layer"] if late and shares else None,
        lens=[(str(r["layer"]), *(_number(r[k]) for k in ("p_target", "p_emitted", "entropy"))) for r in lens],
        curves=(_polyline([r["p_target"] for r in lens]), _polyline([r["p_emitted"] for r in lens])),
    )


def token_segments(
    text: str, offsets: Sequence[tuple[int, int]], shares: Sequence[float] | None, spans: Mapping[str, tuple[int, int]]
) -> list[Segment]:
    """The text cut at its tokens, each with the spans it lies in and its share of attention.

    Together the pieces are the text. Tokens that write one character between them make one piece and add up. The shade is
    relative to the largest share but the first token's, which in most models takes what is left over.
    """
    top = max(shares[1:], default=0.0) if shares else 0.0
    found: list[Segment] = []
    done = 0
    for i, (start, end) in enumerate(offsets):
        share = shares[i] if shares else None
        if end <= done:  # a special token, or the rest of a character that was shown already
            if found and share is not None and end > start:
                both = (found[-1].share or 0.0) + share
                found[-1] = found[-1]._replace(share=both, shade=min(1.0, both / top) if top else 0.0)
            continue
        start = max(start, done)
        if start > done:
            found.append(Segment(text[done:start]))
        names = tuple(name for name, (a, b) in spans.items() if a <= i < b)
        found.append(Segment(text[start:end], names, share, min(1.0, share / top) if share and top else 0.0))
        done = end
    return [*found, Segment(text[done:])] if done < len(text) else found


def _plain_segments(text: str, question: str, target: str) -> list[Segment]:
    """Without tokens: the question and the mention of X before it, found by their words."""
    at = text.find(question)
    if at < 0:
        return [Segment(text)]
    mention = text.find(target, 0, at)
    before = [(mention, mention + len(target))] if mention >= 0 else []
    return [
        *_marked(text[:at], before, "mention"),
        Segment(question, ("question",)),
        Segment(text[at + len(question) :]),
    ]


def _marked(text: str, spans: Sequence[tuple[int, int]], name: str) -> list[Segment]:
    found, done = [], 0
    for start, end in sorted(spans):
        found += [Segment(text[done:start]), Segment(text[start:end], (name,))]
        done = end
    return [s for s in [*found, Segment(text[done:])] if s.text]


def _polyline(values: Sequence[float | None]) -> str:
    step = 100 / max(1, len(values) - 1)
    return " ".join(f"{i * step:.1f},{30 - 30 * v:.1f}" for i, v in enumerate(values) if v is not None)


# -- numbers as text


def _number(value: float | None, places: int = 3) -> str:
    """A number; a dash for what was not measured or is not determined."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(value, places) + 0.0  # and −0.000 is 0.000
    text = f"{rounded:,.{places}f}" if abs(value) < 1000 or not places else f"{value:,.3g}"
    return text.replace("-", "−")


def _estimate(row: Row | None, places: int = 3) -> str:
    """The value of a row of `statistics` with its interval, where it has one."""
    if row is None or row["value"] is None:
        return "–"
    if row["low"] is None or row["high"] is None:
        return _number(row["value"], places)
    return f"{_number(row['value'], places)} [{_number(row['low'], places)}, {_number(row['high'], places)}]"


def _mean(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return _estimate({"value": found.mean, "low": _known(found.low), "high": _known(found.high)})


def _percent(found: Estimate) -> str:
    mean, low, high = (f"{100 * v:.1f}" for v in (found.mean, found.low, found.high))
    return f"{mean} % [{low}, {high}]" if math.isfinite(found.low) else f"{mean} %"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _small(p: float | None) -> str:
    """A p or q."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}".replace("-", "−")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counted.items()) or "none"


def _largest_n(rows: Any) -> str:
    return f"{max((r['n'] or 0 for r in rows), default=0):,}"
