"""What stands in each part of the screen, as lines: pieces of text, each with the name of its style.

Text of a prompt, a vocabulary or a manifest is made visible here, and once more where it is drawn. Knows no Textual.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from harness.experiments.neurons.browser import heat
from harness.experiments.neurons.browser.data import Curve, Ranking, Run
from harness.experiments.neurons.browser.heat import Depth
from harness.experiments.neurons.browser.keys import HINTS, KEYS
from harness.experiments.neurons.browser.tokens import CONTINUED, Cell, Context, visible

Line = list[tuple[str, str]]
"""Pieces of text and their styles: `dim`, `bold`, `title`, `here`, `plus`, `minus`, `alarm`, or none."""
_NAME_WIDTH = 9
_TITLES = f"{'':>6} {'neuron':>9}"


@dataclass(frozen=True)
class Place:
    """What is looked at: a prompt by number, a layer, a neuron of it, a token by position."""

    prompt: int
    layer: int
    neuron: int
    position: int


def number(value: float | None, sign: bool = False) -> str:
    """A number in five or six signs; a dash for none."""
    if value is None or isnan(value):
        return "–"
    if not value:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:{'+' if sign else ''}.0e}"
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:{'+' if sign else ''}.{digits}f}"


def count(value: int | None) -> str:
    """A whole number; a dash for none."""
    return "–" if value is None else f"{value:,}"


def signed(value: float | None, width: int = 0) -> tuple[str, str]:
    """A number with its sign, in the colour of that sign."""
    text = number(value, sign=True).rjust(width)
    return text, "" if value is None or isnan(value) or not value else "plus" if value > 0 else "minus"


def quoted(text: str, width: int) -> str:
    """A token's text between quotes, cut to a width."""
    shown = visible(text)
    return f"'{shown if cell_len(shown) <= width else set_cell_size(shown, max(1, width - 1)) + '…'}'"


def cut(text: str, width: int) -> str:
    """Text made visible, and cut to a width."""
    shown = visible(text)
    return shown if cell_len(shown) <= width else set_cell_size(shown, max(0, width - 1)) + "…"


# -- the head of the screen


def header(run: Run, place: Place, value: float | None, width: int) -> list[Line]:
    """Two lines: which run and what is being computed; what is looked at."""
    told = run.told()
    style = "alarm" if run.state in ("failed", "stopped") else "bold" if run.state == "running" else "dim"
    room = width - cell_len(told) - 2
    name = cut(f"{run.paths.run_id}  {run.manifest.model.name or ''}", room)
    first: Line = [(name + " " * max(2, width - cell_len(name) - cell_len(told)), "title"), (visible(told), style)]
    if not run.prompts:
        return [first, [("no prompt yet", "dim")]]
    context = run.context(place.prompt)
    cells = context.cells
    parts: Line = [
        ("prompt ", "dim"), (f"{place.prompt + 1:,}/{len(run.prompts):,} ", "bold"), (f"{cut(context.prompt_id, 16)}  ", ""),
        ("layer ", "dim"), (f"{place.layer}", "bold"), (f"/{run.layers[-1] if run.layers else '–'}  ", "dim"),
        ("neuron ", "dim"), (f"{place.neuron}", "bold"), (f"/{run.num_neurons - 1}  ", "dim"),
        ("at ", "dim"), (f"{place.position}", "bold"), (f"/{max(0, len(cells) - 1)} ", "dim"),
    ]  # fmt: skip
    if place.position < len(cells):
        parts += [(f"{quoted(_raw(context, place.position), 14)} ", ""), signed(value)]
    return [first, parts]


def token_note(context: Context, position: int) -> str:
    """What is to be known of a token: that it is special, left out of statistics, not dumped, or part of a character."""
    if position >= len(context.cells):
        return ""
    cell = context.cells[position]
    notes = [
        *(["special token"] if cell.is_special else []),
        *(["left out of statistics"] if not cell.is_counted else []),
        *(["not dumped"] if cell.row is None else []),
        *([f"part {cell.part} of {cell.of} of a character"] if cell.of > 1 else []),
    ]
    return ", ".join(notes)


def _raw(context: Context, position: int) -> str:
    cell = context.cells[position]
    start, end = context.spans[position]
    return context.text[start:end] if start < end and cell.of > 1 else cell.text


# -- the strip


def hints(width: int) -> Line:
    """As many of the keys as there is room for."""
    found: list[str] = []
    for hint in HINTS:
        if cell_len("  ".join([*found, hint])) > width:
            break
        found.append(hint)
    return [("  ".join(found), "dim")]


def cell_style(cell: Cell) -> str:
    """The style of a token apart from its activation."""
    return "dim" if cell.is_special or cell.row is None else "left out" if not cell.is_counted else ""


def under_strip(
    scale: float, is_of_prompt: bool, window: int, ranking: Ranking | None, place: int | None, note: str
) -> Line:
    """The line beneath the tokens: the scale, the window, where the neuron stands, what is to be known of the token."""
    parts: Line = [
        ("scale ", "dim"), (number(scale), ""), (f" {'this prompt' if is_of_prompt else 'all prompts'}  ", "dim"),
        *([("window ", "dim"), (f"±{window}  ", "")] if window else []),
    ]  # fmt: skip
    if ranking is not None and len(ranking):
        parts += [
            (f"{ranking.name} ", "dim"),
            (f"{place + 1:,}" if place is not None else "–", ""),
            (f"/{len(ranking):,}  ", "dim"),
        ]
    return [*parts, *([(note, "bold")] if note else [])]


def window_line(
    neuron: int, values: np.ndarray, scale: float, position: int, width: int, depth: Depth, is_here: bool
) -> list[tuple[str, Any]]:
    """A neuron's activations, two columns a token around the position; styles are names or those of `heat`."""
    label = f"{neuron:>6} "
    room = max(1, (width - len(label) - 8) // 2)
    first = max(0, min(position - room // 2, len(values) - room))
    found: list[tuple[str, Any]] = [(label, "bold" if is_here else "dim")]
    for n in range(first, min(len(values), first + room)):
        sign = heat.sign_of(float(values[n]), scale)
        is_at = n == position
        found.append(
            (sign if depth == "mono" else ("▸ " if is_at else "  "), heat.style_of(float(values[n]), scale, depth))
        )
        if is_at and depth == "mono":
            found[-1] = (sign if sign.strip() else "▸ ", "here")
    return [*found, (f" {signed(float(values[position]))[0]}" if position < len(values) else "", "")]


# -- the neuron


def neuron_lines(run: Run, place: Place, values: np.ndarray | None, width: int, target: str = "") -> list[Line]:
    """A neuron: its values here, its statistics, what metrics claim and what was measured, its examples, what it writes."""
    lines: list[Line] = [_here(values, place.position)]
    row = run.statistics(place.layer, place.neuron)
    if row is None:
        lines.append([(cut(run.waits_for("peaks"), width), "dim")])
    else:
        lines += _statistics(run, row, width)
    lines += _claims(run, place, width) + _writes(run, place, width)
    return lines + (_examples(run, row["examples"] or [], place, width) if row is not None else [])


def _here(values: np.ndarray | None, position: int) -> Line:
    if values is None or not len(values) or np.isnan(values).all():
        return [("here ", "dim"), ("not dumped", "")]
    most, least = int(np.nanargmax(values)), int(np.nanargmin(values))
    return [
        ("here ", "dim"), signed(float(values[position]) if position < len(values) else None),
        (" max ", "dim"), signed(float(values[most])), (f"@{most}", "dim"),
        (" min ", "dim"), signed(float(values[least])), (f"@{least}", "dim"),
    ]  # fmt: skip


def _statistics(run: Run, row: Mapping[str, Any], width: int) -> list[Line]:
    peak, following = run.texts([row["peak_token_mode"], row["next_token_mode"]])
    share = lambda value: "–" if value is None else f"{100 * value:.0f} %"  # noqa: E731
    z, q = row["z_background"], row["q"]
    told: Line = [("none to compare with", "dim")]
    if z is not None:
        told = [("z ", "dim"), signed(z), (" q ", "dim"), (number(q), "")]
    lines: list[Line] = [
        [("peak ", "dim"), ("mean ", "dim"), (number(row["mean_peak"]), "bold"), (" sd ", "dim"), (number(row["sd_peak"]), ""),
         (" max ", "dim"), (number(row["max_peak"]), ""), (f" of {count(row['num_prompts'])}", "dim")],
        [("background ", "dim"), *told],
        [("active ", "dim"), (share(row["share_active"]), ""), (" mean ", "dim"), (number(row["mean"], True), ""),
         (" sd ", "dim"), (number(row["sd"]), "")],
    ]  # fmt: skip
    if row["peak_token_mode"] is not None:
        room = max(6, (width - 25) // 2)
        lines.append([
            ("peaks at ", "dim"), (quoted(peak, room), ""), (f" {share(row['peak_token_share'])}", ""),
            (" next ", "dim"), (quoted(following, room), ""),
        ])  # fmt: skip
    lines.append([
        ("functional ", "dim"), (share(row["share_functional"]), ""), (" kurtosis ", "dim"), (number(row["kurtosis"]), ""),
        (" |out| ", "dim"), (number(row["out_norm"]), ""),
    ])  # fmt: skip
    return lines


def _claims(run: Run, place: Place, width: int) -> list[Line]:
    """What each metric claims and the place it gives; what was measured."""
    found = run.claims(place.prompt, place.layer, place.neuron) if run.prompts else {}
    if not found:
        return [
            [(cut("influence here: none of the largest" if run.metrics else run.waits_for("influence"), width), "dim")]
        ]
    lines: list[Line] = [[]]
    for metric, row in found.items():
        if "value" in row:
            name = f"{visible(metric)} "
            piece: Line = [(name, "dim"), signed(row["value"]), (f" #{count(row['place'])}  ", "dim")]
            if _width(lines[-1]) + _width(piece) > width + 2:
                lines.append([])
            lines[-1] += piece
    measured = next((row["measured"] for row in found.values() if "measured" in row), None)
    if measured is not None:
        kind = visible(measured["kind"] or run.kind)
        lines.append([("measured ", "dim"), signed(measured["delta_logit"]), (f" of the logit, by {kind}", "dim")])
    return [line for line in lines if line]


def _width(line: Line) -> int:
    return sum(cell_len(text) for text, _ in line)


def _examples(run: Run, examples: Sequence[Mapping[str, Any]], place: Place, width: int) -> list[Line]:
    lines: list[Line] = [[("top examples", "title"), ("  1 … 9 go there", "dim")]] if examples else []
    prompts = [run.number_of(example["prompt_id"]) for example in examples]
    contexts = dict(
        zip([n for n in prompts if n is not None], run.contexts([n for n in prompts if n is not None]), strict=True)
    )
    for n, (example, prompt) in enumerate(zip(examples, prompts, strict=True), 1):
        head: Line = [(f"{n} " if n < 10 else "  ", "bold"), signed(example["value"], 6), (" ", "")]
        if prompt is None:
            lines.append([*head, (cut(f"{example['prompt_id']} is not here", width - 9), "dim")])
            continue
        is_here = (prompt, example["position"]) == (place.prompt, place.position)
        lines.append(head + _snippet(contexts[prompt], example["position"], width - 9, is_here))
    return lines


def _snippet(context: Context, position: int, width: int, is_here: bool) -> Line:
    """A token in its surroundings, as much of them as there is room for."""
    if not 0 <= position < len(context.cells):
        return [(cut(context.prompt_id, width), "dim")]
    token = cut(context.cells[position].text, max(4, width // 2))
    room = width - cell_len(token)
    before = _joined(context.cells[max(0, position - 40) : position])
    after = _joined(context.cells[position + 1 : position + 41])
    left = max(0, min(cell_len(before), max(room // 2, room - cell_len(after))))
    while cell_len(before) > left:
        before = before[max(1, (cell_len(before) - left) // 2) :]
    return [
        (before, "dim"),
        (token, "here" if is_here else "bold"),
        (cut(after, max(0, room - cell_len(before))), "dim"),
    ]


def _joined(cells: Sequence[Cell]) -> str:
    return "".join(c.text for c in cells if c.part == 1 and not c.is_special)


def _writes(run: Run, place: Place, width: int) -> list[Line]:
    row = run.writes(place.layer, place.neuron)
    if row is None:
        return []
    lines: list[Line] = []
    for what, texts, values in (
        ("up", row["top_texts"], row["top_logits"]),
        ("down", row["low_texts"], row["low_logits"]),
    ):
        line: Line = [(f"writes {what:<5}", "dim")]
        for text, value in zip(texts, values or [], strict=False):
            piece: Line = [(quoted(text, 12), ""), (f" {number(value, True)}  ", signed(value)[1])]
            if _width(line) + _width(piece) > width + 2:
                break
            line += piece
        lines.append(line)
    return lines


# -- rankings, effects


def ranking_head(run: Run, ranking: Ranking, prompt: int, width: int) -> list[Line]:
    """What a ranking is, what it is about, and its columns."""
    about = {
        "background": "z of the mean peak",
        "peak": "the mean of all prompts",
        "active": "strongest at this token",
    }.get(ranking.name)
    line: Line = [(visible(ranking.name), "title"), (cut(f"  {about or _logit(run, prompt)}", width - 9), "dim")]
    if not len(ranking):
        return [line, [(cut(ranking.absent, width), "dim")]]
    columns = f"{_TITLES} {ranking.column:>9}"
    columns += "".join(f" {name:>7}" for name in ranking.more if name != "selected")
    return [line, [(columns, "dim")]]


def ranking_line(ranking: Ranking, n: int, is_here: bool) -> Line:
    """One neuron of a ranking."""
    more: Line = []
    for name, values in ranking.more.items():
        value = float(values[n])
        if name == "share":
            more.append((f" {100 * value:6.1f}%", "dim"))
        elif name == "selected":
            more.append((" ●" if value == 1 else "  ", "dim"))
        else:
            text, style = signed(value, 7)
            more.append((f" {text}" if name != "q" else f" {number(value):>7}", style if name != "q" else "dim"))
    text, style = signed(float(ranking.values[n]), 9)
    return [(_key(ranking, n), "here" if is_here else ""), (" ", ""), (text, style), *more]


def _logit(run: Run, prompt: int) -> str:
    """Which logit a prompt's metrics are about."""
    target = run.target(prompt)
    if target is None:
        return "of the logit asked for"
    texts = ", ".join(quoted(text, 12) for text in target["texts"])
    minus = "".join(f" less {quoted(text, 12)}" for text in run.texts(target["contrast_ids"] or []))
    return f"on the logit of {texts}{minus}"


def _key(ranking: Ranking, n: int) -> str:
    """Place, layer and neuron, as `g` takes them."""
    return f"{n + 1:>6} {f'{ranking.layers[n]}.{ranking.neurons[n]}':>9}"


def effects_head(run: Run, effects: Ranking, curves: Mapping[str, Curve], width: int) -> list[Line]:
    """How well a metric predicts what was measured, and the curves of its prompt in short."""
    lines: list[Line] = [[(f"effects of {visible(effects.name)}", "title"), (f"  by {run.kind}", "dim")]]
    if len(effects):
        r = _correlation(effects.values, effects.more["predicted"])
        lines.append(
            [("predicted against measured ", "dim"), ("r ", "dim"), (number(r), "bold"), (f" n {len(effects)}", "dim")]
        )
    else:
        lines.append([(cut(effects.absent, width), "dim")])
    if curves:
        lines.append([(f"{'':<{_NAME_WIDTH}}{'keep best k':<12}{'drop best k':<12}{'half':>5}", "dim")])
    for ranking, curve in curves.items():
        half = next((k for k, m in zip(curve.sizes, curve.keep, strict=True) if m >= 0.5), None)
        keep, drop = ("".join(map(heat.bar, values))[:11] for values in (curve.keep, curve.drop))
        lines.append([
            (f"{visible(ranking):<{_NAME_WIDTH}}", "bold" if ranking == effects.name else "dim"),
            (f"{keep:<12}", "plus"), (f"{drop:<12}", "minus"),
            (f"{half if half is not None else '–':>5}", ""),
        ])  # fmt: skip
    if len(effects):
        lines.append([(f"{_TITLES} {'measured':>9} {'predicted':>9}", "dim")])
    return lines


def effects_line(effects: Ranking, n: int, is_here: bool) -> Line:
    """One neuron whose effect was measured."""
    return [
        (_key(effects, n), "here" if is_here else ""), (" ", ""), signed(float(effects.values[n]), 9), (" ", ""),
        signed(float(effects.more["predicted"][n]), 9),
    ]  # fmt: skip


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < 3 or not one[both].std() or not other[both].std():
        return None
    return float(np.corrcoef(one[both], other[both])[0, 1])


# -- help


def help_lines(depth: Depth) -> list[Line]:
    """The keys, and what colours and signs mean."""
    lines: list[Line] = [[("keys", "title")]]
    lines += [[(f" {key.shown:<10}", "bold"), (key.says, "")] for key in KEYS]
    shown = {
        "full": ("green", "above zero; orange: below; the stronger, the nearer to the scale"),
        "16": ("green", "above zero; yellow: below; letters, ground, bright ground: .1, .35, .75"),
        "mono": ("+9 -1", "beneath a token: its sign, and its size in ninths of the scale"),
    }[depth]
    marks = (
        shown,
        ("░token░", "a special token"),
        ("underline", "a token that statistics leave out"),
        ("dim", "a token that was not dumped"),
        (CONTINUED, "a further token of the character before it"),
        ("\\x1b", "a character that is not printed, as its code"),
        ("●", "one of the smallest set that holds the share of influence asked for"),
        ("half", "so many neurons, kept alone, bring half of the logit back"),
    )
    return [*lines, [("marks", "title")], *([(f" {mark:<10}", "bold"), (says, "")] for mark, says in marks)]
