"""The headline results of a run, from its snapshot, and how they look in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from harness.experiments.experiment import Headline
from harness.experiments.neurons.settings import CONTROLS, LEVEL, METRICS
from harness.run import Manifest
from harness.store import Reader, Row

_SHOWN = 10
_MOST_SIGNS = 20
"""Of a token in a table."""
MEASURED = "CASE WHEN t.mode = 'sequence' THEN e.delta_logp ELSE coalesce(e.delta_contrast, e.delta_logit) END"
"""What a row `e` of `effects` did to what its prompt's row `t` of `targets` is ranked for, in SQL."""


def render(reader: Reader, manifest: Manifest) -> list[object]:
    """Tables for a terminal of 80 columns: the neurons with the largest measured effects, then how well each ranking foretells
    them."""
    shown: list[object] = []
    rows = strongest(reader, _SHOWN)
    if rows:
        shown += [_neurons(reader, manifest, rows), _neurons_line(reader)]
    elif (peaks := _peaks(reader, manifest)).row_count:
        shown += [peaks, "A neuron is layer.index. Peaks are not influence: no effect was measured."]
    rankings = _rankings(reader)
    if rankings.row_count:
        shown += [rankings, "Kept: higher is better; dropped: lower. Controls are sets without a claim."]
    return [*shown, *_lines(reader)]


def stored_rows(reader: Reader) -> Mapping[tuple[str, str, str], Row]:
    """What the analysis said, by analysis, ranking and measure."""
    rows = reader.query("SELECT * FROM statistics ORDER BY analysis, ranking, measure")
    return {(r["analysis"], r["ranking"], r["measure"]): r for r in rows}


def headlines(reader: Reader) -> list[Headline]:
    """Agreement with effects, areas of curves, and the share of neurons beyond the background."""
    rows = reader.query(
        "SELECT ranking, measure, value, low, high FROM statistics WHERE value IS NOT NULL AND (analysis = "
        "'agreement' OR analysis = 'curves' OR (analysis = 'background' AND ranking = 'all')) ORDER BY ALL"
    )
    return [Headline(r["ranking"], r["measure"], r["value"], r["low"], r["high"]) for r in rows]


def in_order(rankings: Sequence[str]) -> list[str]:
    """Metrics as they are told everywhere, then controls."""
    known = (*METRICS, *reversed(CONTROLS))
    return sorted(set(rankings), key=lambda r: (known.index(r) if r in known else len(known), r))


def first_ranking(reader: Reader) -> str:
    """The ranking whose claims stand beside what was measured: the first metric; empty where nothing was."""
    found = in_order([r["ranking"] for r in reader.query("SELECT DISTINCT ranking FROM effects")])
    return found[0] if found else ""


def unit_of(reader: Reader) -> str:
    """What the run's neurons are ranked for, in a few words."""
    (row,) = reader.query(
        "SELECT count(*) AS n, count(*) FILTER (mode = 'sequence') AS texts, "
        "count(*) FILTER (mode <> 'sequence' AND len(contrast_ids) > 0) AS pairs FROM targets"
    )
    if row["texts"]:
        return "log-probability in nats"
    return "logit" if not row["pairs"] else "logit difference" if row["pairs"] == row["n"] else "logit or difference"


def strongest(reader: Reader, limit: int) -> list[Row]:
    """The neurons whose effects over all prompts (`num_measured`), without their signs, add up to most (`total`).

    `mean` and `claimed` are of the same `num_prompts`: those in which the first metric ranks the neuron among the measured
    ones. Where it never does, `mean` is of all prompts in which the neuron was measured, and `claimed` is NULL.
    """
    return reader.query(
        f"""
        WITH each AS (
            SELECT prompt_id, layer, neuron, any_value({MEASURED}) AS delta, max(predicted) FILTER (ranking = ?) AS claimed
            FROM effects e JOIN targets t USING (prompt_id) GROUP BY prompt_id, layer, neuron),
        summed AS (
            SELECT layer, neuron, sum(abs(delta)) AS total, count(*) AS num_measured,
                   coalesce(avg(delta) FILTER (claimed IS NOT NULL), avg(delta)) AS mean, avg(claimed) AS claimed,
                   coalesce(nullif(count(claimed), 0), count(*)) AS num_prompts
            FROM each GROUP BY layer, neuron ORDER BY total DESC, layer, neuron LIMIT ?)
        SELECT s.*, n.mean_peak, n.z_background, n.q, n.peak_token_share, v.text AS peak_token
        FROM summed s LEFT JOIN neurons n USING (layer, neuron) LEFT JOIN vocabulary v ON v.token_id = n.peak_token_mode
        ORDER BY s.total DESC, layer, neuron
        """,
        [first_ranking(reader), limit],
    )


class Beyond(NamedTuple):
    """Neurons whose peaks differ from the background's, and all that could be compared."""

    higher: int
    lower: int
    known: int


def beyond(reader: Reader) -> Beyond:
    """Of all layers together."""
    (row,) = reader.query(
        "SELECT count(*) FILTER (z_background > 0 AND q < ?) AS higher, count(*) FILTER (z_background < 0 AND q < ?) AS lower, "
        "count(q) AS known FROM neurons", [LEVEL, LEVEL]
    )  # fmt: skip
    return Beyond(row["higher"], row["lower"], row["known"])


class Narrow(NamedTuple):
    """Prompts whose m(k) divides by little, and all that have curves."""

    few: int
    total: int


def narrow(reader: Reader) -> Narrow:
    """Of how many prompts all neurons together move the target by less than a tenth of what they do in the median prompt."""
    (row,) = reader.query(
        """
        WITH ends AS (
            SELECT prompt_id, abs(max(logit) FILTER (k > 0) - max(logit) FILTER (k = 0)) AS span FROM curves
            WHERE mode = 'keep' AND (k = 0 OR k = (SELECT max(k) FROM curves)) GROUP BY prompt_id)
        SELECT count(*) AS n, count(*) FILTER (span < 0.1 * (SELECT median(span) FROM ends)) AS few FROM ends
        """
    )
    return Narrow(row["few"], row["n"])


def sets_cut(reader: Reader) -> dict[str, tuple[int, int]]:
    """By metric, of how many of its prompts the cumulative set was cut; metrics of which none was are not there."""
    rows = reader.query(
        "SELECT metric, count(*) AS n, count(*) FILTER (is_cut) AS cut FROM influence_totals GROUP BY metric"
    )
    found = {r["metric"]: (r["cut"], r["n"]) for r in rows if r["cut"]}
    return {metric: found[metric] for metric in in_order([*found])}


class Writes(NamedTuple):
    """Tokens whose logits a neuron's direction raises and lowers, the most first: so it is where its activation is "
    "above 0."""

    raised: tuple[str, ...] = ()
    lowered: tuple[str, ...] = ()
    is_raising: bool = True
    """Whether those that it raises stand out from the next ones more than those that it lowers do."""

    def at(self, activation: float | None) -> "Writes":
        """What it does with this activation: below 0 it raises what its direction lowers."""
        return self if (activation or 0.0) >= 0 else Writes(self.lowered, self.raised, not self.is_raising)

    @property
    def told(self) -> str:
        """The side that stands out, `+` raised or `−` lowered."""
        side = self.raised if self.is_raising else self.lowered
        return f"{'+' if self.is_raising else '−'} {' '.join(side)}" if side else "–"


def writes_of(reader: Reader, neurons: Sequence[tuple[int, int]], number: int) -> dict[tuple[int, int], Writes]:
    """By layer and neuron, `number` tokens each way of those that were computed."""
    places = [layer << 32 | neuron for layer, neuron in neurons]
    rows = reader.query(
        f"""
        SELECT layer, neuron, top_ids[1:{number}] AS top, low_ids[1:{number}] AS low,
               coalesce(top_logits[1] - top_logits[-1] >= low_logits[-1] - low_logits[1], true) AS is_raising
        FROM neuron_writes WHERE list_contains(?, (layer::BIGINT << 32) | neuron)
        """,
        [places],
    )
    names = texts_of(reader, {i for r in rows for i in (*(r["top"] or ()), *(r["low"] or ()))})
    return {
        (r["layer"], r["neuron"]): Writes(
            tuple(shown_token(names.get(i)) for i in r["top"] or ()),
            tuple(shown_token(names.get(i)) for i in r["low"] or ()),
            r["is_raising"],
        )
        for r in rows
    }


def texts_of(reader: Reader, ids: Iterable[int]) -> dict[int, str]:
    """Tokens' texts, as they are."""
    rows = reader.query("SELECT token_id, text FROM vocabulary WHERE list_contains(?, token_id)", [sorted(set(ids))])
    return {r["token_id"]: r["text"] for r in rows}


def interval_told(row: Row | None, digits: int = 3) -> str:
    """A value with its interval; a dash where there is none."""
    if row is None or row["value"] is None:
        return "–"

    def told(value: float) -> str:
        return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.0f}"

    # Without an interval where resampling moves nothing.
    if row["low"] is None or row["high"] is None or row["low"] == row["high"]:
        return told(row["value"])
    return f"{told(row['value'])} [{told(row['low'])}, {told(row['high'])}]"


def change_told(value: float | None) -> str:
    """A change of the target with its sign; what three digits behind the point would hide by its size."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:+.0e}"


def shown_text(text: str | None) -> str:
    """A token's text with its spaces and control signs visible."""
    return (
        "–" if text is None else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text).replace(" ", "␣")
    )


def shown_token(text: str | None) -> str:
    """As `shown_text`, and not too long: some tokens are dozens of spaces."""
    told = shown_text(text)
    return told if len(told) <= _MOST_SIGNS else told[: _MOST_SIGNS - 1] + "…"


def _neurons(reader: Reader, manifest: Manifest, rows: Sequence[Row]) -> Table:
    first, writes = first_ranking(reader), writes_of(reader, [(r["layer"], r["neuron"]) for r in rows], 3)
    table = Table(
        title=f"Run {manifest.run_id}: what moves the target most ({unit_of(reader)})",
        title_justify="left",
    )
    words = ("neuron", "peaks at", "writes")
    for column in ("neuron", "Σ|Δ|", "prompts", "mean Δ", first, "peak", "peaks at", "writes"):
        table.add_column(column, justify="left" if column in words else "right", no_wrap=column != "writes")
    for r in rows:
        own = writes.get((r["layer"], r["neuron"]), Writes())
        table.add_row(
            f"{r['layer']}.{r['neuron']}", f"{r['total']:.1f}", f"{r['num_prompts']:,}", change_told(r["mean"]),
            change_told(r["claimed"]), "–" if r["mean_peak"] is None else f"{r['mean_peak']:.2f}",
            Text(shown_token(r["peak_token"])),
            Text(own.told, no_wrap=True, overflow="ellipsis"),
        )  # fmt: skip
    return table


def _peaks(reader: Reader, manifest: Manifest) -> Table:
    """What there is to show where no neuron was changed: those furthest from the background, or loudest without one."""
    rows = reader.query(
        "SELECT n.*, v.text AS peak_token FROM top_neurons t JOIN neurons n USING (layer, neuron) "
        "LEFT JOIN vocabulary v ON v.token_id = n.peak_token_mode ORDER BY t.place LIMIT ?",
        [_SHOWN],
    )
    writes = writes_of(reader, [(r["layer"], r["neuron"]) for r in rows], 3)
    is_compared = any(r["z_background"] is not None for r in rows)
    told = "furthest from the background" if is_compared else "the highest peaks"
    table = Table(title=f"Run {manifest.run_id}: {told}", title_justify="left")
    for column in ("neuron", "mean peak", "background's", "z", "peaks at", "writes"):
        table.add_column(column, justify="left" if column in ("neuron", "peaks at", "writes") else "right")
    for r in rows:
        own = writes.get((r["layer"], r["neuron"]), Writes())
        numbers = (
            "–" if value is None else f"{value:,.{digits}f}"
            for value, digits in ((r["mean_peak"], 2), (r["peak_background"], 2), (r["z_background"], 1))
        )
        tokens = (Text(shown_token(r["peak_token"])), Text(own.told, no_wrap=True, overflow="ellipsis"))
        table.add_row(f"{r['layer']}.{r['neuron']}", *numbers, *tokens)
    return table


def _neurons_line(reader: Reader) -> str:
    first = first_ranking(reader)
    return (
        f"A neuron is layer.index. Mean Δ is measured, {first} is its claim, both over the prompts in which {first} "
        "names the neuron (–: never). It raises (+) or lowers (−) these tokens where its activation is above 0."
    )


def _rankings(reader: Reader) -> Table:
    stored = stored_rows(reader)
    table = Table(title="Rankings against what was measured", title_justify="left")
    for column in ("ranking", "rank correlation", "slope", "area kept", "area dropped"):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    query = "SELECT DISTINCT ranking FROM curves UNION SELECT DISTINCT ranking FROM effects"
    for ranking in in_order([r["ranking"] for r in reader.query(query)]):
        spearman, slope = (stored.get(("agreement", ranking, m)) for m in ("spearman", "slope"))
        areas = [stored.get(("curves", ranking, m)) for m in ("area_keep", "area_drop")]
        value = "–" if slope is None or slope["value"] is None else f"{slope['value']:.2f}"
        table.add_row(ranking, interval_told(spearman, 2), value, *(interval_told(a, 2) for a in areas))
    return table


def _lines(reader: Reader) -> list[str]:
    found, lines = beyond(reader), []
    if found.known:
        lines.append(
            f"{found.higher + found.lower:,} of {found.known:,} neurons peak otherwise than on the background (q < {LEVEL:g}): "
            f"{found.higher:,} higher, {found.lower:,} lower"
        )
    rows = reader.query("SELECT max(abs(residual)) AS worst FROM influence_totals WHERE metric = 'dla'")
    if rows and rows[0]["worst"] is not None:
        lines.append(f"dla's parts add up to every prompt's target within {rows[0]['worst']:.1e}")
    return lines
