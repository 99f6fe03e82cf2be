"""What a run of the neuron experiment should say of itself."""

from collections.abc import Iterator

from harness.experiments.neurons.summary import narrow, sets_cut, stored_rows
from harness.experiments.remarks import Remark
from harness.run import Manifest
from harness.store import Reader
from harness.terminal import plain

_LOW = 0.3
"""Rank correlation with measured effects under which a ranking says little."""
_WIDE_GAP = 0.01


def remarks_of(reader: Reader, manifest: Manifest) -> list[Remark]:
    """Texts that are not in the statistics, rankings that foretell nothing, paths that were not followed closely enough."""
    return [*_left_out(reader), *_agreement(reader), *_gaps(reader), *_narrow(reader), *_cut(reader)]


def _left_out(reader: Reader) -> Iterator[Remark]:
    for row in reader.query(
        "SELECT stage, count(*) AS n, min_by(prompt_id, (layer, position)) AS first, min(layer) AS layer FROM left_out "
        "GROUP BY stage ORDER BY stage"
    ):
        why = "too long for the model" if row["layer"] < 0 else "with activations that are no finite numbers"
        yield Remark(
            "left_out", row["stage"], row["n"], row["n"],
            f"{row['n']:,} texts are not in the statistics of {row['stage']}: {why} (the first: {plain(row['first'])}).",
            "Try another `--model.dtype`, or leave them out.", "left out",
        )  # fmt: skip


def _agreement(reader: Reader) -> Iterator[Remark]:
    for (analysis, ranking, measure), row in stored_rows(reader).items():
        if (analysis, measure) == ("agreement", "spearman") and row["value"] is not None and row["value"] < _LOW:
            yield Remark(
                "agreement", ranking, row["n"], row["n"],
                f"Ranking {ranking} foretells what ablation does at a rank correlation of {row['value']:.2f} only.",
                "Read the measured effects in place of it.", "ranking apart from effects",
            )  # fmt: skip


def _gaps(reader: Reader) -> Iterator[Remark]:
    (row,) = reader.query(
        "SELECT count(*) AS n, count(*) FILTER (abs(completeness_gap) > ?) AS wide FROM influence_totals WHERE metric = 'ig'",
        [_WIDE_GAP],
    )
    if row["wide"]:
        yield Remark(
            "gap", "ig", row["wide"], row["n"],
            f"Integrated gradients miss more than 1 % of their sum in {row['wide']:,} of {row['n']:,} prompts.",
            "Try a larger `--neurons.ig_steps`.", "path not followed closely",
        )  # fmt: skip


def _narrow(reader: Reader) -> Iterator[Remark]:
    few, total = narrow(reader)
    if few:
        yield Remark(
            "curves", None, few, total,
            f"In {few:,} of {total:,} prompts all neurons together hardly move the target: their own m(k) divides "
            "by little.",
            "Read the curves of all prompts together, not those of one.", "curves of single prompts not determined",
        )  # fmt: skip


def _cut(reader: Reader) -> Iterator[Remark]:
    found = sets_cut(reader)
    if found:
        told = ", ".join(f"{metric} in {few:,} of {total:,}" for metric, (few, total) in found.items())
        few, total = max(found.values())
        yield Remark(
            "cut", None, few, total,
            f"The set that holds the cumulative share of |influence| was cut: {told} prompts.",
            "Try a larger `--neurons.max_selected`; the files hold every neuron's value.", "set cut off",
        )  # fmt: skip
