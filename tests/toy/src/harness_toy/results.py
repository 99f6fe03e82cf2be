"""What people read of a run of surprisal: in the terminal, side by side with another run, and on a page."""

import math

from matplotlib.figure import Figure

from harness.experiments.experiment import Drawn, Headline, Report, Section, Table
from harness.run import Manifest, own_setting
from harness.stats import mean_interval
from harness.store import Reader, Row
from harness_toy.settings import UNITS


def headlines(reader: Reader, manifest: Manifest) -> list[Headline]:
    """The mean over texts; none where no text was measured."""
    rows, unit = _rows(reader), _unit(manifest)
    if not rows:
        return []
    found = mean_interval([r["mean"] for r in rows])
    return [Headline("all texts", f"{unit} a token", found.mean, found.low, found.high)]


def render(reader: Reader, manifest: Manifest) -> list[object]:
    """The same in a sentence, beside what a model gives that knows nothing."""
    return [
        f"Surprisal: {h.value:.3f} [{h.low:.3f}, {h.high:.3f}] {h.measure}; "
        f"one that knows nothing has {ignorance(manifest):.3f}."
        for h in headlines(reader, manifest)
    ]


def ignorance(manifest: Manifest) -> float:
    """The surprisal of a uniform guess over the vocabulary: ln V, in the run's unit."""
    return UNITS[_unit(manifest)] * math.log(manifest.model.config["vocab_size"])


def report(reader: Reader, manifest: Manifest) -> Report:
    """Its section of the page, with one figure."""
    rows, unit = _rows(reader), _unit(manifest)
    cells = [(r["text_id"], f"{r['num_tokens']:,}", f"{r['mean']:.3f}") for r in rows]
    caption = f"Mean {unit} a token; the line is a uniform guess over the vocabulary."
    return Report(
        question="How surprised is the model by each text?",
        headlines=tuple(map(str, render(reader, manifest))),
        sections=(
            Section(
                "surprisal",
                "Surprisal",
                tables=(Table("By text", ("text", "tokens", f"{unit} a token"), cells),),
                figures=("surprisal",),
            ),
        ),
        figures={"surprisal": Drawn("Surprisal of each text", caption, lambda: draw(rows, unit, ignorance(manifest)))},
        method=(("surprisal", "−ln p(token | the tokens before it), of every token but a text's first"),),
        limits=("Texts of different tokenizers are cut differently: means a token do not compare across models.",),
    )


def draw(rows: list[Row], unit: str, ignorance: float) -> Figure:
    """A bar a text, and a line for a model that knows nothing."""
    figure = Figure(figsize=(9.0, 0.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([r["text_id"] for r in rows], [r["mean"] for r in rows], color="#0072B2")
    axes.axvline(ignorance, color="#D55E00", label="uniform guess")
    axes.set_xlabel(f"{unit} a token")
    axes.legend()
    return figure


def _rows(reader: Reader) -> list[Row]:
    return reader.query("SELECT text_id, num_tokens, mean FROM surprisals ORDER BY mean, text_id")


def _unit(manifest: Manifest) -> str:
    return str(own_setting(manifest, "unit"))
