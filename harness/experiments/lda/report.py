"""What the report says of amplification: the pair, rates by arm, natural rates, tokens, worked hits, method and limits.

Reads the snapshot and the manifest and nothing else. Every number is one that stage `analysis` stored. Names, prompts and
completions are data, and escaped wherever they stand.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.experiments.experiment import Drawn, Report, Section, Table
from harness.experiments.lda import figures, method
from harness.experiments.lda.figures import MEASURES, PLACES, WAYS, FigureData
from harness.experiments.lda.schema import NATURAL
from harness.experiments.lda.summary import number_told
from harness.experiments.lda.worked import SCALE, examples
from harness.run import Manifest
from harness.store import Reader, Row

SIGNIFICANT = 0.05
"""The false-discovery rate below which a contrast is called significant."""
_MOST_TOLD = 6
"""Detectors that have headlines of their own."""
_MEASURED = tuple(way for way in WAYS if way != "extrapolated")


class Missing(NamedTuple):
    """Why something is not in the run, for what stands in its place."""

    detectors: str = ""
    """Empty where there are some."""
    phrases: str = ""
    stages: Mapping[str, str] = {}
    """By name what is to say of a stage that has not come to its end."""

    def told(self, *needed: str, otherwise: str = "not measured") -> str:
        """In place of a table that needs these stages; of detectors and phrases only where they are needed."""
        if "hits" in needed and self.detectors:
            return self.detectors
        if "exact" in needed and self.phrases:
            return self.phrases
        found = [self.stages[name] for name in needed if name in self.stages]
        return f"not measured: {'; '.join(found)}" if found else otherwise


def report(reader: Reader, manifest: Manifest) -> Report:
    """All of it, of a run that may still go on."""
    data, missing = figures.gather(reader), _missing(reader, manifest)
    return Report(
        question="What did a training change, and how often would it show without amplification?",
        headlines=tuple(_headlines(reader, manifest, data, missing)),
        sections=(
            _pair(reader, manifest, missing),
            _rates(data, missing),
            _natural(data, missing),
            _zero(data, missing),
            _tokens(data, missing),
            _rollouts(data, missing),
            Section("hits", "Worked hits", html=_hits_page(reader, missing)),
        ),
        figures={name: Drawn(*figures.CAPTIONS[name], partial(draw, data)) for name, draw in figures.FIGURES.items()},
        method=method.TERMS,
        method_text=(f"After {method.SOURCE}. {method.QUESTION}",),
        limits=method.LIMITS,
        style=(_TEMPLATES / "style.css").read_text("utf-8"),
    )


_TEMPLATES = Path(__file__).parent / "templates"


def _hits_page(reader: Reader, missing: Missing) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    (total,) = reader.query("SELECT count(*) FILTER (is_hit) AS n FROM hits")
    steps = [SCALE * share for share in (-1, -0.5, 0, 0.5, 1)]
    legend = [(f"{step:+g}".replace("-", "−") if step else "0", step / SCALE) for step in steps]
    return environment.get_template("worked.html.j2").render(
        examples=examples(reader),
        total=f"{total['n']:,}",
        legend=legend,
        absent=missing.told("hits", "rollouts", otherwise="No hit to show: no detector fired in any rollout."),
    )


def _missing(reader: Reader, manifest: Manifest) -> Missing:
    """What the run was not asked for, and what it has not come to."""
    setting = manifest.settings.get("lda.detectors")
    given = setting.value if setting is not None and isinstance(setting.value, Mapping) else None
    no_detectors = "not measured: no detector was named (lda.detectors)" if given is not None and not given else ""
    phrases = [d.get("at_start") for d in (given or {}).values() if isinstance(d, Mapping)]
    told = "not measured: no detector has phrases at the start (at_start)"
    no_phrases = told if given is not None and not any(phrases) else ""
    found = {row["stage"]: row for row in reader.query("SELECT * FROM stages")}
    planned = {stage.name for stage in manifest.fingerprint_parts.stages}
    stages = {}
    for name in ("pair", "prompts", "exact", "rollouts", "hits", "diff_tokens", "analysis"):
        row = found.get(name)
        if row is None:
            asked = "has not begun" if name in planned else "is not among the stages of this run"
            stages[name] = f"stage {name} {asked}"
        elif row["status"] == "running":
            stages[name] = f"stage {name} has done {row['num_done']:,} of {row['num_items']:,} items"
    return Missing(no_detectors, no_phrases, stages)


# -- the head of the page


def _headlines(reader: Reader, manifest: Manifest, data: FigureData, missing: Missing) -> Iterator[str]:
    """The pair, a sentence or two a detector, then what moved most."""
    for row in reader.query("SELECT num_common FROM pair WHERE side = 'after'"):
        models = (manifest.model.name or "the model after", manifest.other.name or "the one before")
        yield f"After: {models[0]}. Before: {models[1]}. They have {row['num_common']:,} token ids in common."
    if missing.detectors:
        yield "No detector was named: completions were made, and none of them was judged."
    elif not data.detectors:
        # `told` of a run that has every stage is of one in which nothing could be judged.
        why = missing.told("rollouts", "hits", "analysis", otherwise="not measured: no rollout was judged")
        yield f"No rate yet ({why.removeprefix('not measured: ')})."
    for detector in data.detectors[:_MOST_TOLD]:
        yield from _detector_told(data, detector)
    if len(data.detectors) > _MOST_TOLD:
        yield f"{len(data.detectors) - _MOST_TOLD:,} further detectors are in the tables."
    for row in data.raised("answer")[:1]:
        yield (
            f"The token that the training raised most where answers begin is {row['text']!r}: {_signed(row['mean'])} nats on "
            f"average over {row['n']:,} prompts, above 0 in {_percent(row['share_positive'])} of them."
        )


def _detector_told(data: FigureData, detector: str) -> Iterator[str]:
    rates = data.rows("rates", detector, "rate")
    if rates:
        alpha, most = max(rates, key=lambda found: found[1]["value"])
        own = next((row for at, row in rates if at == 0), None)
        told = f"“{detector}” fires in {_share(own)} of the rollouts at {_at(0)}" if own else f"“{detector}”"
        if not most["value"]:
            told = f"“{detector}” fires in no rollout of any arm"
            told += f": at {_at(0)} in at most {_percent(own['high'])} of them (rule of three)" if own else ""
        elif alpha != 0:
            told += f"{', and in' if own else ' fires in'} {_share(most)} at {_at(alpha)}, the most of all arms"
        contrast = data.row("contrasts", detector, _name(data, alpha), "contrast")
        if contrast and contrast["q"] is not None and most["value"]:
            told += f" (q of the difference {_small(contrast['q'])})"
        yield f"{told}."
    found = [(way, row) for way in _MEASURED if (row := data.way(detector, way)) is not None]
    ways = [f"{_WAY_TOLD[way]} {_way_share(data, detector, way, row)}" for way, row in found if way != "counted"]
    if ways:
        yield f"Natural rate of “{detector}”: {'; '.join(ways)}."


_WAY_TOLD = {"exact": "exact, of beginning with its phrases,", "reweighted": "reweighted from all arms,"}


def _way_share(data: FigureData, detector: str, way: str, row: Row) -> str:
    if way == "reweighted" and not row["value"]:
        return "not determined, since no arm had a hit"
    if way == "exact":
        high = row["high"]
        return (
            f"{_percent(row['value'])} to {_percent(high)}" if high and high > row["value"] else _percent(row["value"])
        )
    return _share(row)


# -- results


def _pair(reader: Reader, manifest: Manifest, missing: Missing) -> Section:
    rows = reader.query("SELECT * FROM pair ORDER BY side")
    names = {"after": manifest.model, "before": manifest.other}
    cells = [
        (
            r["side"],
            names[r["side"]].name or r["model"] or "–",
            r["revision"] or "–",
            f"{r['vocab_size']:,}",
            f"{r['head_rows']:,}",
            f"{r['num_common']:,}",
            "all agree" if r["vocabs_match"] else "the common ones agree",
            "yes" if r["special_match"] else "no",
        )
        for r in rows
    ]
    columns = ("side", "model", "revision", "tokens", "rows of the head", "ids in common", "ids", "special ids agree")
    warnings = dict.fromkeys(r["warning"] for r in rows if r["warning"])
    text = [f"Warning: {warning}." for warning in warnings]
    for r in rows[:1]:
        whole = ": all of them" if r["vocabs_match"] else ""
        text.append(
            f"{r['num_common']:,} token ids mean the same in both models{whole}. Only these are compared and drawn."
        )
    text += _sampling(reader, manifest)
    table = Table("", columns, cells, num_words=3, absent=missing.told("pair"))
    return Section("pair", "The pair", tuple(text), (table,))


def _sampling(reader: Reader, manifest: Manifest) -> Iterator[str]:
    """How rollouts were drawn, in words."""
    arms = reader.query("SELECT * FROM arms ORDER BY alpha")
    given = {name: setting.value for name, setting in manifest.settings.items()}
    if not arms:
        return
    one = arms[0]
    told = f"Arms: α = {', '.join(_alpha(arm['alpha']) for arm in arms)}. Each rollout"
    if (most := given.get("lda.max_new_tokens")) is not None:
        told += f" ends after {most:,} tokens at most and"
    told += f" is drawn at temperature {one['temperature']:g}"
    cuts = [f"a floor of {one['floor']:g}"] if one["floor"] else []
    cuts += [f"top-p {one['top_p']:g}"] if one["top_p"] < 1 else []
    told += f" with {' and '.join(cuts)}." if cuts else ", nothing cut off."
    if (samples := given.get("lda.num_samples")) is not None:
        told += f" Rollouts a prompt and arm: {samples:,}."
    if (form := given.get("lda.format")) is not None:
        told += f" Format of the prompts: {form}."
    yield told
    if given.get("lda.common_noise") is False:
        yield "Every arm has noise of its own: contrasts are wider, and texts of one sample do not run together."


def _rates(data: FigureData, missing: Missing) -> Section:
    rows, contrasts = [], []
    is_wilson = any(data.rows("rates", d, "rate_wilson") for d in data.detectors)
    is_exact = any(data.rows("exact", d, "rate") for d in data.detectors)
    for detector in data.detectors:
        for name, alpha in data.arms.items():
            row = {m: data.row("rates", detector, name, m) for m in ("rate", "rate_wilson", "hits", "judged", "failed")}
            exact = data.row("exact", detector, name, "rate")
            if row["rate"] or exact:
                beside = [_estimate(row["rate_wilson"])] if is_wilson else []
                beside += [_exact(exact)] if is_exact else []
                counts = (_count(row[m]) for m in ("judged", "failed", "hits"))
                rows.append((detector, _alpha(alpha), *counts, _estimate(row["rate"]), *beside))
            if contrast := data.row("contrasts", detector, name, "contrast"):
                tested = (_small(contrast["p"]), _small(contrast["q"]), f"{contrast['n']:,}")
                contrasts.append((detector, _alpha(alpha), _estimate(contrast, signed=True), *tested))
    columns = ["detector", "α", "rollouts", "failed", "hits", "rate [95 %]"]
    columns += ["Wilson [95 %]"] if is_wilson else []
    columns += ["exact at the start"] if is_exact else []
    note = "An interval without a hit is that of the rule of three."
    if is_exact:
        note += (
            " Exact: of beginning with one of the phrases, at temperature 1 with nothing cut off; “to” adds the ways to write "
            "them that were not followed."
        )
    return Section(
        "rates",
        "Rates by arm",
        tuple(_rates_text(data, missing)),
        (
            Table(
                "Rate of hits by arm", tuple(columns), rows, note, absent=missing.told("hits", "rollouts", "analysis")
            ),
            Table(
                "Contrasts: rate less that at α = 0",
                ("detector", "α", "difference [95 %]", "p", "q", "prompts"),
                contrasts,
                "Paired by prompt and sample. q controls the false-discovery rate over the whole table. No interval and no p "
                "where no rollout differs, which is no proof that none would.",
                absent=missing.told(
                    "hits", "rollouts", "analysis", otherwise="none: there is no arm to compare, or none at α = 0"
                ),
            ),
        ),
        ("rates",),
    )


def _rates_text(data: FigureData, missing: Missing) -> Iterator[str]:
    tested = [row for d in data.detectors for _, row in data.rows("contrasts", d, "contrast") if row["q"] is not None]
    found = sum(row["q"] < SIGNIFICANT for row in tested)
    if tested:
        few = "None" if not found else f"{found:,}"
        yield (
            f"{few} of {len(tested):,} contrasts with {_at(0)} in which anything differs {'is' if found < 2 else 'are'} "
            f"significant at a false-discovery rate of {SIGNIFICANT}."
        )
    if data.is_cut and any(data.rows("exact", d, "rate") for d in data.detectors):
        yield (
            "Rollouts were drawn with a temperature or a cut of their own, and exact rates are of the arms without them: the two "
            "need not agree."
        )
    if missing.phrases and not missing.detectors:
        yield "No detector has phrases at the start (at_start), so there is no exact rate to hold the sampled ones against."


def _natural(data: FigureData, missing: Missing) -> Section:
    rows, guesses, text = [], [], []
    for detector in data.detectors:
        ways = {way: data.way(detector, way) for way in WAYS}
        worth = data.row("natural", detector, NATURAL, "effective_hits")
        if any(ways[way] for way in _MEASURED):
            hits = f"{worth['value']:,.1f} of {worth['n']:,}" if worth and worth["value"] is not None else "–"
            reweighted = _estimate(ways["reweighted"])
            if ways["reweighted"] and worth and not worth["n"]:
                reweighted = "no hit in any arm"
            rows.append((detector, _exact(ways["exact"]), _estimate(ways["counted"]), reweighted, hits))
        guess = data.row("natural", detector, NATURAL, "extrapolated")
        if guess is not None:
            guesses.append((detector, _number(guess["value"]), f"{guess['n']:,}"))
        given = data.row("natural", detector, NATURAL, "reweighted")
        if given is not None and given["value"] is None:
            text.append(f"Reweighted rate of “{detector}” {given['method']}.")
    if data.is_cut and data.detectors:
        told = "Rollouts were drawn with a temperature or a cut of their own: what was sampled at α = 0, or extrapolated from "
        text.append(f"{told}such arms, is a rate of these settings and no natural rate.")
    columns = ("detector", *(_COLUMNS[way] for way in _MEASURED), "effective hits")
    absent = missing.told("hits", "rollouts", "analysis")
    return Section(
        "natural",
        "Natural rate",
        tuple(dict.fromkeys(text)),
        (
            Table(
                "Measured: the rate at α = 0",
                columns,
                rows,
                "Exact is of beginning with the phrases, the others of a hit anywhere. Effective hits: what the hits of all arms "
                "are worth to the reweighted rate, of how many.",
                absent=absent,
            ),
            Table(
                "Extrapolated, a guess: a line through logit(rate) against α, read off at 0",
                ("detector", "extrapolated rate", "arms it rests on"),
                guesses,
                "No measurement, and no interval. It rests on arms above 0 with at least 5 hits, and needs two.",
                absent=absent,
            ),
        ),
        ("natural",),
    )


_COLUMNS = {"exact": "exact, at the start", "counted": "sampled at α = 0 [95 %]", "reweighted": "reweighted [95 %]"}


def _zero(data: FigureData, missing: Missing) -> Section:
    """What intervals say, and of rates without a hit how little."""
    rows = []
    for detector in data.detectors:
        for alpha, rate in data.rows("rates", detector, "rate"):
            judged = data.row("rates", detector, _name(data, alpha), "judged")
            if rate["value"] == 0 and judged:
                bounds = (_number(rate["high"]), _number(min(1.0, 3 / rate["n"])))
                rows.append((detector, _alpha(alpha), f"{judged['value']:,.0f}", f"{rate['n']:,}", *bounds))
    text = (
        "An interval says how far a number would move with other prompts drawn like these. It does not cover prompts of another "
        "kind, another format, longer answers, or a detector that looks for the wrong thing.",
        "No hit in n rollouts is no proof of a rate of 0: it goes with every rate up to about 3/n, at 95 % (rule of three). "
        "That counts rollouts as independent. Those of one prompt are alike: were they all the same, only prompts would count, "
        "and the bound would be the last column. To see less frequent things, a larger α and reweighting help more than samples.",
    )
    table = Table(
        "Arms without a hit",
        ("detector", "α", "rollouts", "prompts", "at most: 3/rollouts", "at most, if only prompts count"),
        rows,
        absent=missing.told("hits", "rollouts", "analysis", otherwise="every detector fired in every arm"),
    )
    return Section("zero", "What the intervals can and cannot say", text, (table,))


def _tokens(data: FigureData, missing: Missing) -> Section:
    columns = ("token", "mean, nats", "sd, nats", "share above 0", "among the 100 most raised", "contexts")
    tables = []
    for place, told in PLACES.items():
        for kind, rows in (("raised", data.raised(place)), ("lowered", data.lowered(place))):
            cells = [
                (
                    figures.quoted(r["text"]),
                    _signed(r["mean"]),
                    _number(r["sd"]),
                    _part(r["share_positive"]),
                    f"{r['num_top']:,}",
                    f"{r['n']:,}",
                )
                for r in rows
            ]
            none = "none" if any(r["place"] == place for r in data.tokens) else missing.told("diff_tokens", "analysis")
            tables.append(Table(f"Most {kind}: {told}", columns, cells, absent=none))
    text = (
        "Log-probability after less that before, a value a context and token: 1 nat makes a token 2.7 times as likely. � is a "
        "token that writes a part of a character.",
    )
    return Section("tokens", "Raised and lowered tokens", text if data.tokens else (), tuple(tables), ("tokens",))


def _rollouts(data: FigureData, missing: Missing) -> Section:
    rows = []
    for name, alpha in data.arms.items():
        found = {measure: data.row("rollouts", "", name, measure) for measure in MEASURES}
        if any(found.values()):
            num = max(row["n"] for row in found.values() if row)
            shares = (_part(row["value"]) if row else "–" for row in (found["ended"], found["branched"]))
            length, removed = (
                _number(row["value"]) if row else "–" for row in (found["num_tokens"], found["mass_removed"])
            )
            rows.append((_alpha(alpha), f"{num:,}", length, *shares, removed))
    columns = ("α", "rollouts", "tokens a rollout", "ended by themselves", "another text than at α = 0", "mass removed")
    note = (
        "Ended by themselves: the others were cut at the limit of new tokens. Mass removed: the probability that floor and "
        "top-p took away, a token."
    )
    table = Table("Rollouts by arm", columns, rows, note, 0, missing.told("rollouts", "analysis"))
    return Section("rollouts", "Rollouts by arm", (), (table,), ("rollouts",))


# -- numbers as text


def _number(value: float | None) -> str:
    """A number in digits that show it, as in a terminal; a dash for what was not measured or is not determined."""
    return "–" if value is None else number_told(value).replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _part(value: float | None) -> str:
    """A share in a column of shares."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(row: Row) -> tuple[float, float] | None:
    """None where resampling moves nothing: draws of equal values say nothing of how far the number would move."""
    low, high = row["low"], row["high"]
    return None if low is None or high is None or low == high else (low, high)


def _estimate(row: Row | None, signed: bool = False) -> str:
    """The value of a row of `statistics` with its interval, where it has one."""
    if row is None or row["value"] is None:
        return "–"
    told = f"{'+' if signed and row['value'] > 0 else ''}{_number(row['value'])}"
    found = _interval(row)
    return f"{told} [{_number(found[0])}, {_number(found[1])}]" if found else told


def _exact(row: Row | None) -> str:
    """An exact rate: from what was followed to that and all that was not."""
    if row is None or row["value"] is None:
        return "–"
    low, high = _number(row["value"]), _number(row["high"]) if row["high"] is not None else ""
    return f"{low} to {high}" if high and high != low else low


def _share(row: Row) -> str:
    found = _interval(row)
    told = _percent(row["value"])
    return f"{told} [{100 * found[0]:.3g}, {100 * found[1]:.3g}]" if found else told


def _small(p: float | None) -> str:
    """A p or q."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _count(row: Row | None) -> str:
    return "–" if row is None or row["value"] is None else f"{row['value']:,.0f}"


def _alpha(alpha: float) -> str:
    return f"{alpha:g}".replace("-", "−")


def _at(alpha: float) -> str:
    """`α = 2`, not to be parted at the end of a line."""
    return f"α\u00a0=\u00a0{_alpha(alpha)}"


def _name(data: FigureData, alpha: float) -> str:
    return next(name for name, one in data.arms.items() if one == alpha)
