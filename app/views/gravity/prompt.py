"""One prompt from every side, with the pinned one beside it on the same scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from app import chips, frame, queries
from app.charts.chips import Chip
from app.charts.gravity import activations as norm_charts
from app.charts.gravity import attention as attention_charts
from app.charts.gravity import layers as layer_charts
from app.charts.gravity import patching as patch_charts
from app.charts.gravity import prompt as drawing
from app.queries.gravity import View, activations, attention, layers, patching
from app.queries.gravity import prompt as asking
from app.views.gravity import open_page, pick_step


@dataclass(frozen=True)
class Section:
    """A part of the page: drawn once for each prompt, on a scale that all share; `data` can be downloaded."""

    title: str
    draw: Callable[[str], None]
    note: str = ""
    data: pd.DataFrame | None = None


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if view is None:
        return
    kept = view.prompt_ids()
    prompt_id = view.prompt_id or (kept[0] if kept else None)
    if prompt_id is None:
        st.info("The filter keeps no prompt.")
        return
    _walk(view, prompt_id, kept)
    step = pick_step()
    ids = list(dict.fromkeys(i for i in (prompt_id, view.pin) if i is not None))
    _lay(ids, [_facts(view)])
    _lay(ids, [_text(view)])
    _lay(ids, [_pressure(view, ids)])
    _lay(ids, [_greedy(view, ids), _samples(view, ids)])
    _lay(ids, [_ratios(view, ids, step), _shares(view, ids, step)])
    _lay(ids, [_lens(view, ids, step), _contributions(view, ids, step)])
    _lay(ids, [_patching(view, ids), _norms(view, ids)])
    _lay(ids, [_events(view, ids)])


def _walk(view: View, prompt_id: str, kept: list[str]) -> None:
    """Where the prompt stands in the filter, with buttons to go on, and to pin it."""
    at = kept.index(prompt_id) if prompt_id in kept else None
    before, here, after, pin, _ = st.columns([1, 2, 1, 1, 3], vertical_alignment="center")
    before.button(
        "Previous",
        key="prompt-previous",
        disabled=not at,
        icon=":material/arrow_back:",
        width="stretch",
        on_click=frame.choose,
        kwargs={"prompt": kept[at - 1] if at else prompt_id},
    )
    is_last = at == len(kept) - 1 or not kept
    after.button(
        "Next",
        key="prompt-next",
        disabled=is_last,
        icon=":material/arrow_forward:",
        width="stretch",
        on_click=frame.choose,
        kwargs={"prompt": prompt_id if is_last else kept[0 if at is None else at + 1]},
    )
    pin.button(
        "Pin",
        key="prompt-pin",
        disabled=view.pin == prompt_id,
        icon=":material/push_pin:",
        width="stretch",
        on_click=frame.choose,
        kwargs={"pin": prompt_id},
    )
    here.text(f"{at + 1} of {len(kept)}" if at is not None else f"not among the filter's {len(kept)}")


def _lay(ids: Sequence[str], sections: Sequence[Section]) -> None:
    """One prompt: the sections side by side. Two: a section after the other, the prompts side by side."""
    if len(ids) == 1:
        for column, section in zip(st.columns(len(sections)), sections, strict=True):
            with column:
                _one(section, ids)
    else:
        for section in sections:
            _one(section, ids)


def _one(section: Section, ids: Sequence[str]) -> None:
    st.subheader(section.title, anchor=False)
    for column, prompt_id in zip(st.columns(len(ids)), ids, strict=True):
        with column:
            section.draw(prompt_id)
    if section.note:
        st.caption(section.note)
    if section.data is not None and len(section.data):
        frame.download(section.data, f"prompt-{section.title}".lower().replace(" ", "-"))


def _together(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The prompts' rows below each other, with their ids."""
    known = [rows.assign(prompt_id=i) for i, rows in found.items() if len(rows)]
    return pd.concat(known, ignore_index=True) if known else pd.DataFrame()


def _key(ids: Sequence[str], prompt_id: str, name: str) -> str:
    return f"prompt-{name}-{ids.index(prompt_id)}"


# -- what it is


def _facts(view: View) -> Section:
    def draw(prompt_id: str) -> None:
        row = asking.facts(view.paths, prompt_id)
        verdicts = (
            asking.verdicts(view.paths, prompt_id) if "outcomes" in queries.tables(view.paths) else pd.DataFrame()
        )
        lines = [f"{'prompt':<13}{prompt_id}{'  (pinned)' if prompt_id == view.pin else ''}"]
        lines += [
            f"{name:<13}{_words(row[name])}"
            for name in ("question", "target", "category", "alternatives", "style", "source", "tier", "single_token")
            if name in row
        ]
        lines += [
            f"{v['condition']:<13}{v['outcome']}" + (f", {v['taxonomy']}" if isinstance(v["taxonomy"], str) else "")
            for v in verdicts.to_dict("records")
        ]
        st.code("\n".join(lines), language=None, wrap_lines=True)

    return Section("What it is", draw)


def _words(value: Any) -> str:
    if value is None or (not hasattr(value, "__len__") and pd.isna(value)):
        return "–"
    return str(value) if isinstance(value, str) or not hasattr(value, "__len__") else ", ".join(map(str, value)) or "–"


def _text(view: View) -> Section:
    def draw(prompt_id: str) -> None:
        tokens = activations.tokens(view.paths, prompt_id, view.condition)
        if not tokens:
            st.info(f"No context stored under `{view.condition}`.")
            return
        spans = attention.spans(view.paths, prompt_id, view.condition)
        note = f"{len(tokens)} tokens under {view.condition}; hover for a token's place and parts"
        chips.show(drawing.spans_on(tokens, spans), note, f"prompt-text-{prompt_id == view.pin}")
        chips.show(attention_charts.legend(list(spans)), "", f"prompt-legend-{prompt_id == view.pin}")

    return Section("What the model sees", draw)


# -- pressure and answers


def _pressure(view: View, ids: Sequence[str]) -> Section:
    if not {"psem", "suppression", "detections"} <= queries.tables(view.paths):
        return _unmeasured("Pressure of X")
    found = {i: asking.pressure(view.paths, i) for i in ids}
    part = lambda title: st.column_config.ProgressColumn(title, min_value=0, max_value=1, format="%.4f")  # noqa: E731
    number = lambda title: st.column_config.NumberColumn(title, format="%+.3f")  # noqa: E731

    def draw(prompt_id: str) -> None:
        rows = found[prompt_id]
        if rows.empty:
            st.info("Not measured.")
            return
        said = [
            f"{int(v)} of {int(n)}" if pd.notna(n) else ""
            for v, n in zip(rows["num_violations"], rows["num_samples"], strict=True)
        ]
        st.dataframe(
            rows.drop(columns=["num_violations", "num_samples"]).assign(samples=said),
            hide_index=True,
            column_config={
                "p_sem": part("P_sem"),
                "p_word": part("P_word"),
                "paper_p_sem": part("paper's P_sem"),
                "delta": number("P0 − P1"),
                "relative": number("relative"),
                "log": number("log"),
                "samples": "samples that say X",
            },
        )

    note = "Bars from 0 to 1. P0 − P1, relative, log: the suppression against baseline, below zero where the ban raises P_sem."
    return Section("Pressure of X", draw, note, _together(found))


def _greedy(view: View, ids: Sequence[str]) -> Section:
    if not {"completions", "detections"} <= queries.tables(view.paths):
        return _unmeasured("Greedy answers")
    found = {i: asking.greedy(view.paths, i) for i in ids}

    def draw(prompt_id: str) -> None:
        for row in found[prompt_id].to_dict("records"):
            spans = row["char_spans"] if row["char_spans"] is not None else []
            told = (
                "not judged"
                if pd.isna(row["word_present"])
                else "says X"
                if row["word_present"]
                else "keeps clear of X"
            )
            note = f"{row['condition']}: {told}; {row['finish_reason']}"
            shown = drawing.marked(row["text"] or "", spans) or [Chip("(nothing)")]
            chips.show(shown, note, _key(ids, prompt_id, f"greedy-{row['condition']}"))
        if found[prompt_id].empty:
            st.info("Not generated.")

    return Section("Greedy answers", draw, "X is outlined.", _together(found))


def _samples(view: View, ids: Sequence[str]) -> Section:
    if not {"completions", "detections"} <= queries.tables(view.paths):
        return _unmeasured("Samples")
    found = {i: asking.samples(view.paths, i) for i in ids}

    def draw(prompt_id: str) -> None:
        rows = found[prompt_id]
        if rows.empty:
            st.info("Not sampled.")
            return
        st.dataframe(
            rows,
            hide_index=True,
            height=min(38 + 35 * len(rows), 300),
            column_config={"word_present": "says X", "text": "answer"},
        )

    return Section("Samples", draw, "Equal answers are counted together.", _together(found))


# -- inside


def _ratios(view: View, ids: Sequence[str], step: str) -> Section:
    found = {i: asking.ratios(view.paths, i, step) for i in ids}
    low, high = drawing.ratio_range(list(found.values()))

    def draw(prompt_id: str) -> None:
        if found[prompt_id].empty:
            st.info("Not measured.")
            return
        st.echarts_chart(
            drawing.ratio_lines(found[prompt_id], view.condition, low, high),
            height=320,
            key=_key(ids, prompt_id, "ratios"),
            alt="attention ratios by layer",
        )

    note = f"{view.condition}, {step} step. IAR: share of the instruction against the question; NF, TMF: shares of the negation "
    note += "and of the mention of X in the instruction's; PI = TMF − NF."
    return Section("Attention ratios", draw, note, _together(found))


def _shares(view: View, ids: Sequence[str], step: str) -> Section:
    found = {i: asking.shares(view.paths, i, view.condition, step) for i in ids}
    top = attention_charts.largest_share([r for r in found.values() if len(r)]) or 1.0

    def draw(prompt_id: str) -> None:
        rows = found[prompt_id]
        if rows.empty:
            st.info("Not measured.")
            return
        texts = activations.tokens(view.paths, prompt_id, view.condition)
        texts += asking.answer_tokens(view.paths, prompt_id, view.condition)
        st.echarts_chart(
            drawing.share_grid(rows, texts, top),
            height=_grid_height(rows),
            key=_key(ids, prompt_id, "shares"),
            alt="attention by layer and token",
        )

    note = f"Mean over heads, layer × token, {view.condition}, {step} step. Colours from 0 to {top:.3f}, "
    note += "the largest share of any token but the first."
    return Section("Attention on the tokens", draw, note, _together(found))


def _grid_height(rows: pd.DataFrame) -> int:
    return 150 + max(14 * (int(rows["layer"].max()) + 1), 90)


def _lens(view: View, ids: Sequence[str], step: str) -> Section:
    if not queries.has_rows(view.paths, "lens"):
        return _unmeasured("Logit lens")
    found = {i: layers.lens(view.paths, i, step) for i in ids}

    def draw(prompt_id: str) -> None:
        rows = found[prompt_id]
        if rows.empty:
            st.info("Not measured.")
            return
        st.echarts_chart(
            drawing.lens_lines(rows, view.condition),
            height=320,
            key=_key(ids, prompt_id, "lens"),
            alt="lens probability of X by layer",
        )
        st.dataframe(drawing.last_tokens(rows[rows["condition"] == view.condition]), hide_index=True)

    note = f"The likeliest tokens of the last layers under {view.condition}, {step} step."
    return Section("Logit lens", draw, note, _together(found))


def _contributions(view: View, ids: Sequence[str], step: str) -> Section:
    found = {i: layers.contributions(view.paths, i, step) for i in ids}
    shown = {i: rows[rows["condition"] == view.condition] for i, rows in found.items()}
    every = _together(shown)
    if every.empty:
        return _unmeasured("Contributions")
    limit = layer_charts.axis_limit(every["attn_contrib"], every["ffn_contrib"])

    def draw(prompt_id: str) -> None:
        if shown[prompt_id].empty:
            st.info("Not measured.")
            return
        st.echarts_chart(
            layer_charts.contribution_bars(shown[prompt_id], limit),
            height=320,
            key=_key(ids, prompt_id, "contributions"),
            alt="what attention and the MLP of each layer add",
        )

    note = f"{view.condition}, {step} step; the axis goes from −{limit:g} to {limit:g}."
    return Section("Contributions", draw, note, _together(found))


def _patching(view: View, ids: Sequence[str]) -> Section:
    if not queries.has_rows(view.paths, "patching"):
        return _unmeasured("Patching")
    found = {i: patching.of_prompt(view.paths, i) for i in ids}
    every = _together(found)
    top = patch_charts.top_of(every["value"]) if len(every) else 1.0
    kinds, num_layers = patch_charts.ordered(patching.kinds(view.paths)), patching.num_layers(view.paths)

    def draw(prompt_id: str) -> None:
        if found[prompt_id].empty:
            st.info("This prompt was not patched.")
            return
        cells = patch_charts.placed(found[prompt_id], kinds, num_layers)
        st.echarts_chart(
            patch_charts.own(cells, kinds, num_layers, top=top),
            height=92 + 30 * len(kinds),
            key=_key(ids, prompt_id, "patching"),
            alt="ΔP by layer and kind of patch",
        )

    condition = patching.patched_condition(view.paths, view.manifest)
    note = f"ΔP from baseline into {condition}. {patch_charts.LEGEND} Colours from −{top:.3g} to +{top:.3g}. "
    return Section("Patching", draw, note + "◯: the answer's verdict flips.", every)


def _norms(view: View, ids: Sequence[str]) -> Section:
    if not queries.has_rows(view.paths, "activations"):
        return _unmeasured("Residual norms")
    found = {i: activations.norms(view.paths, i, view.condition) for i in ids}
    low, high = norm_charts.span([r for r in found.values() if len(r)], "relative")

    def draw(prompt_id: str) -> None:
        rows = found[prompt_id]
        if rows.empty:
            st.info("Not measured.")
            return
        texts = activations.tokens(view.paths, prompt_id, view.condition)
        st.echarts_chart(
            norm_charts.grid(rows, texts, scale="relative", low=low, high=high),
            height=_grid_height(rows),
            key=_key(ids, prompt_id, "norms"),
            alt="norm of the residual stream by layer and token",
        )

    note = f"{norm_charts.SCALES['relative']}, {view.condition}. Colours from {low:+.2f} to {high:+.2f}."
    return Section("Residual norms", draw, note, _together(found))


def _events(view: View, ids: Sequence[str]) -> Section:
    found = {i: asking.events(view.paths, i) for i in ids}

    def draw(prompt_id: str) -> None:
        if found[prompt_id].empty:
            st.caption("None.")
        else:
            st.dataframe(found[prompt_id], hide_index=True)

    return Section("Events", draw, "", _together(found))


def _unmeasured(title: str) -> Section:
    return Section(title, lambda prompt_id: st.info("Not measured in this run.") and None)


main()
