"""The headline results of a run, from its snapshot, and how they look in a terminal."""

from collections.abc import Mapping

from rich.table import Table

from harness.experiments.experiment import Headline
from harness.run import Manifest
from harness.store import Reader, Row

_SHOWN = 10


def render(reader: Reader, manifest: Manifest) -> list[object]:
    """Tables for a terminal: the neurons with the largest measured effects, then how well each ranking foretells them."""
    shown: list[object] = []
    for table in (_neurons(reader, manifest), _rankings(reader)):
        if table.row_count:
            shown.append(table)
    return [*shown, *_lines(reader)]


def stored_rows(reader: Reader) -> Mapping[tuple[str, str, str], Row]:
    """What the analysis said, by analysis, ranking and measure."""
    rows = reader.query("SELECT * FROM statistics ORDER BY analysis, ranking, measure")
    return {(r["analysis"], r["ranking"], r["measure"]): r for r in rows}


def headlines(reader: Reader) -> list[Headline]:
    """Agreement with effects, areas of curves, and the share of neurons beyond the background."""
    rows = reader.query(
        "SELECT ranking, measure, value, low, high FROM statistics WHERE value IS NOT NULL AND (analysis = 'agreement' "
        "OR analysis = 'curves' OR (analysis = 'background' AND ranking = 'all')) ORDER BY ALL"
    )
    return [Headline(r["ranking"], r["measure"], r["value"], r["low"], r["high"]) for r in rows]


def interval_told(row: Row | None, digits: int = 3) -> str:
    """A value with its interval; a dash where there is none."""
    if row is None or row["value"] is None:
        return "–"
    value = f"{row['value']:.{digits}f}"
    if row["low"] is None or row["high"] is None:
        return value
    return f"{value} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def strongest(reader: Reader, limit: int = _SHOWN) -> list[Row]:
    """The neurons with the largest mean |effect| over prompts by the first metric's ranking, with what they write."""
    return reader.query(
        """
        WITH ranked AS (
            SELECT any_value(ranking) AS ranking, prompt_id, layer, neuron, any_value(delta_logit) AS delta,
                   max(predicted) FILTER (ranking = 'dla') AS dla
            FROM effects GROUP BY prompt_id, layer, neuron),
        summed AS (
            SELECT layer, neuron, count(*) AS num_prompts, avg(delta) AS mean_effect, avg(abs(delta)) AS size,
                   avg(dla) AS mean_dla
            FROM ranked GROUP BY layer, neuron)
        SELECT s.*, n.mean_peak, n.z_background, n.q, v.text AS peak_token,
               (SELECT string_agg(t.text, ' ' ORDER BY i) FROM (SELECT unnest(w.top_ids[1:3]) AS id, unnest([1, 2, 3]) AS i)
                JOIN vocabulary t ON t.token_id = id) AS writes
        FROM summed s LEFT JOIN neurons n USING (layer, neuron) LEFT JOIN vocabulary v ON v.token_id = n.peak_token_mode
             LEFT JOIN neuron_writes w USING (layer, neuron)
        ORDER BY s.size * s.num_prompts DESC, layer, neuron LIMIT ?
        """,
        [limit],
    )


def shown_text(text: str | None) -> str:
    """A token's text with its spaces and control signs visible."""
    return (
        "–" if text is None else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text).replace(" ", "␣")
    )


def _neurons(reader: Reader, manifest: Manifest) -> Table:
    table = Table(title=f"Run {manifest.run_id}: neurons whose ablation moves the target most", title_justify="left")
    for column in ("neuron", "prompts", "mean Δ logit", "claimed by dla", "mean peak", "z", "peaks at", "raises"):
        table.add_column(column, justify="left" if column in ("neuron", "peaks at", "raises") else "right")
    from rich.text import Text

    for r in strongest(reader):
        table.add_row(
            f"{r['layer']}.{r['neuron']}", f"{r['num_prompts']:,}", f"{r['mean_effect']:+.3f}",
            "–" if r["mean_dla"] is None else f"{r['mean_dla']:+.3f}",
            "–" if r["mean_peak"] is None else f"{r['mean_peak']:.2f}",
            "–" if r["z_background"] is None else f"{r['z_background']:+.1f}",
            Text(shown_text(r["peak_token"])), Text(shown_text(r["writes"])),
        )  # fmt: skip
    return table


def _rankings(reader: Reader) -> Table:
    stored = stored_rows(reader)
    table = Table(title="Rankings against what ablation does", title_justify="left")
    for column in ("ranking", "rank correlation", "slope", "area kept", "area dropped"):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    order = [
        r["ranking"]
        for r in reader.query("SELECT DISTINCT ranking FROM curves UNION SELECT DISTINCT ranking FROM effects")
    ]
    known = ("dla", "act_grad", "ig", "relp", "loudest", "matched", "random")
    for ranking in sorted(order, key=lambda r: known.index(r) if r in known else len(known)):
        told = [stored.get(("agreement", ranking, m)) for m in ("spearman", "slope")]
        told += [stored.get(("curves", ranking, m)) for m in ("area_keep", "area_drop")]
        table.add_row(ranking, *(interval_told(t) for t in told))
    return table


def _lines(reader: Reader) -> list[str]:
    found = stored_rows(reader).get(("background", "all", "share_beyond"))
    lines = []
    if found is not None:
        lines.append(f"{found['value']:.1%} of {found['n']:,} neurons peak beyond the background (q < .05)")
    rows = reader.query("SELECT max(abs(residual)) AS worst FROM influence_totals WHERE metric = 'dla'")
    if rows and rows[0]["worst"] is not None:
        lines.append(f"dla's parts add up to every prompt's logit within {rows[0]['worst']:.1e}")
    return lines
