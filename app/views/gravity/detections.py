"""Which answers say X, where in them, and how sure the model was of each token."""

from typing import Any

import pandas as pd
import streamlit as st

from app import chips, frame
from app.charts.chips import in_place
from app.charts.gravity import detections as charts
from app.queries.gravity import View, prompts, token_texts
from app.queries.gravity import detections as ask
from app.views.gravity import open_page
from harness.errors import HarnessError


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if not view:
        return
    try:
        asked = _pick(view)
    except HarnessError as e:
        _cannot(e)
        return
    for part in (
        lambda: _counts(view, asked),
        lambda: _answers(view, asked),
        lambda: _chosen(view, asked),
        lambda: _rates(view, asked.condition),
        lambda: _errors(view),
    ):
        frame.safely(part)


def _cannot(error: HarnessError) -> None:
    st.info("This part cannot be shown for this run.")
    st.text(str(error))


def _pick(view: View) -> ask.Asked:
    first, second, third, fourth, fifth = st.columns([7, 7, 9, 8, 6])
    under = first.selectbox(
        "Answers under",
        list(view.conditions),
        index=None,
        placeholder=f"the sidebar's: {view.condition}",
        key="under",
        bind="query-params",
        on_change=_first_page,
        help="the condition looked at on this page; empty: the one chosen in the sidebar",
    )
    mode = second.segmented_control(
        "Mode", ask.MODES, key="mode", bind="query-params", default="sample", required=True, on_change=_first_page
    )
    says = third.segmented_control(
        "X in the answer",
        ask.SAYS,
        key="says",
        bind="query-params",
        default=ask.ANY,
        required=True,
        on_change=_first_page,
    )
    form = fourth.segmented_control(
        "Format",
        ask.FORMATS,
        key="format",
        bind="query-params",
        default=ask.ANY,
        required=True,
        on_change=_first_page,
        help="ok: the answer is one word",
    )
    finish = fifth.selectbox(
        "Ended by", [ask.ANY, *ask.finish_reasons(view.paths)], key="finish", bind="query-params", on_change=_first_page
    )
    return ask.Asked(str(under or view.condition), str(mode), str(says), str(form), str(finish))


def _first_page() -> None:
    frame.choose(page=1)


def _counts(view: View, asked: ask.Asked) -> None:
    found = ask.counts(view, asked.condition, asked.mode)
    errors = len(ask.mapping_errors(view.paths))
    judged = int(found["judged"])
    shown = {
        "answers": (int(found["answers"]), None),
        "X present": (int(found["present"]), judged),
        "X absent": (judged - int(found["present"]), judged),
        "X only further on": (int(found["elsewhere"]), judged),
        "format ok": (int(found["format_ok"]), judged),
        "mapping errors": (errors, None),
    }
    for column, (label, (n, whole)) in zip(st.columns(len(shown)), shown.items(), strict=True):
        share = f"{n / whole:.1%}" if whole else None
        column.metric(label, f"{n:,}", share, delta_color="off", delta_arrow="off")
    told = f"Counts are of all {asked.mode} answers under the condition, of {int(found['prompts']):,} prompts"
    told += " that the sidebar's filters keep" if view.category is not None or view.outcome is not None else ""
    told += "; mapping errors (X found in the text, but not placed among its tokens) are of the whole run."
    if missing := int(found["answers"]) - judged:
        told += f" {missing:,} answers have no verdict" + (" yet." if view.is_running else ".")
    st.caption(told)


def _answers(view: View, asked: ask.Asked) -> None:
    st.subheader("Answers")
    num = ask.num_answers(view, asked)
    if not num:
        st.info("No answer that the filters keep.")
        return
    pages = -(-num // ask.PAGE_SIZE)
    page = _page(pages)
    rows = ask.answers(view, asked, page)
    rows.insert(4, "X marked", [in_place(t, s) for t, s in zip(rows["text"], rows.pop("char_spans"), strict=True)])
    # A key of its own for each page of each question, so that no row of another one stays selected.
    key = f"answers-{view.paths.run_id}-{asked}-{view.category}-{view.outcome}-{page}"
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        selection_mode="single-row",
        height=390,
        on_select=lambda: _clicked_row(key, rows, with_sample=asked.mode == "sample"),
        column_order=[
            "category",
            "target",
            "sample_id",
            "X marked",
            "answer",
            "word_present",
            "format_ok",
            "num_occurrences",
            "first_step",
            "finish_reason",
            "prompt_id",
        ],
        column_config={
            "target": "X",
            "sample_id": "sample",
            "X marked": st.column_config.TextColumn("text, X marked", width="large"),
            "word_present": "present",
            "format_ok": "format ok",
            "num_occurrences": "occurrences",
            "first_step": "first step",
            "finish_reason": "ended by",
            "prompt_id": "prompt",
        },
    )
    first = ask.PAGE_SIZE * (page - 1) + 1
    st.caption(
        f"Answers {first:,} to {first + len(rows) - 1:,} of {num:,}. Selecting a row shows its tokens and chooses its prompt."
    )
    frame.download(rows, "answers")


def _page(pages: int) -> int:
    """The page number, in range whatever the address says."""
    if int(st.session_state.get("page") or 1) > pages:
        frame.choose(page=pages)
    if pages == 1:
        return 1
    left, _ = st.columns([1, 4])
    return int(left.number_input(f"Page, of {pages:,}", 1, pages, key="page", bind="query-params") or 1)


def _clicked_row(key: str, rows: pd.DataFrame, *, with_sample: bool = False) -> None:
    chosen = (st.session_state.get(key) or {}).get("selection", {}).get("rows") or []
    for n in chosen[:1]:
        if n < len(rows):
            row = rows.iloc[n]
            frame.choose(prompt=str(row["prompt_id"]), **({"sample": int(row["sample_id"])} if with_sample else {}))


def _chosen(view: View, asked: ask.Asked) -> None:
    st.subheader("Token by token")
    if not ask.samples(view.paths, asked.condition, asked.mode):
        st.info("No answer under this condition and in this mode yet.")
        return
    sample = _which_sample(view, asked)
    if view.prompt_id is None:
        st.info("Choose a prompt: in the sidebar, or by a row above.")
        return
    ids = [view.prompt_id] + ([view.pin] if view.pin and view.pin != view.prompt_id else [])
    questions = prompts(view.paths).set_index("prompt_id")
    for column, prompt_id in zip(st.columns(len(ids)), ids, strict=True):
        with column:
            st.text(f"{questions.loc[prompt_id, 'question']}\nX = {questions.loc[prompt_id, 'target']}")
            _tokens(view, asked, prompt_id, sample)


def _which_sample(view: View, asked: ask.Asked) -> int:
    """The chosen sample. It can be chosen before a prompt is: only a widget that is drawn already keeps its address."""
    if asked.mode == "greedy":
        return 0
    known = ask.samples(view.paths, asked.condition, asked.mode)
    if st.session_state.get("sample", known[0]) not in known:
        frame.choose(sample=known[0])
    left, _ = st.columns([1, 4])
    return int(left.selectbox("Sample", known, key="sample", bind="query-params"))


def _tokens(view: View, asked: ask.Asked, prompt_id: str, sample: int) -> None:
    found = ask.answer(view.paths, prompt_id, asked.condition, asked.mode, sample)
    if found is None:
        st.info("This prompt has no such answer.")
        return
    texts = token_texts(view.paths, found["token_ids"])
    chips.show(charts.answer_chips(found, texts), charts.SCALE, f"chips-{prompt_id}")
    st.code(in_place(found["text"], found["char_spans"]), language=None, wrap_lines=True)
    verdict = {True: "X is in the answer", False: "X is not in the answer", None: "no verdict"}[found["word_present"]]
    if found["word_present_full"] and not found["word_present"]:
        verdict += ", but further on in the text"
    form = {True: "one word", False: "not one word", None: "format not judged"}[found["format_ok"]]
    st.text(f"{verdict}; {form}; ended by {found['finish_reason']}; {len(found['token_ids'])} tokens")
    frame.download(_token_rows(found, texts), f"tokens-{prompt_id}")


def _token_rows(found: dict[str, Any], texts: dict[int, str]) -> pd.DataFrame:
    marked = {n for a, b in found["token_spans"] or [] for n in range(a, b)}
    return pd.DataFrame(
        {
            "step": range(len(found["token_ids"])),
            "token_id": found["token_ids"],
            "text": [texts[int(t)] for t in found["token_ids"]],
            "logprob": pd.Series(found["logprobs"] or [], dtype=float),
            "margin": pd.Series(found["margins"] or [], dtype=float),
            "is_x": [n in marked for n in range(len(found["token_ids"]))],
        }
    )


def _rates(view: View, condition: str) -> None:
    st.subheader("Violation rate by prompt")
    rows = ask.violations(view, condition)
    if rows.empty:
        st.info("No sample under this condition has been judged.")
        return
    counts = charts.rate_counts(rows)
    sizes = set(rows["num_samples"])
    left, right = st.columns(2)
    with left:
        option = charts.rate_histogram(counts, int(max(sizes)) if len(sizes) == 1 else None)
        st.echarts_chart(option, key="violation-rates", height=390)
        st.caption(f"{len(rows):,} prompts, mean rate {rows['rate'].mean():.3f}.")
        frame.download(counts, "violation-rates")
    with right:
        key = f"violations-{view.paths.run_id}-{condition}-{view.category}-{view.outcome}"
        st.dataframe(
            rows,
            hide_index=True,
            key=key,
            on_select=lambda: _clicked_row(key, rows),
            selection_mode="single-row",
            height=390,
            column_order=["target", "category", "p0", "num_violations", "num_samples", "rate", "prompt_id"],
            column_config={
                "target": "X",
                "p0": st.column_config.NumberColumn("P0", format="%.3f"),
                "num_violations": "say X",
                "num_samples": "samples",
                "rate": st.column_config.NumberColumn(format="%.3f"),
                "prompt_id": "prompt",
            },
        )
        st.caption("Click a column to sort; a row chooses its prompt.")
        frame.download(rows, "violations")


def _errors(view: View) -> None:
    rows = ask.mapping_errors(view.paths)
    if len(rows):
        st.subheader("Mapping errors")
        st.dataframe(rows, hide_index=True, key="mapping-errors")
        frame.download(rows, "mapping-errors")


main()
