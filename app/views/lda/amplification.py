"""How often a behaviour shows as the difference of two models is amplified, where it does, and how rare it is by nature."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from app import chips, frame
from app.charts.chips import in_place
from app.charts.lda import amplification as charts
from app.charts.lda import rate_told
from app.queries.lda import NATURAL, Arm, View
from app.queries.lda import amplification as ask
from app.queries.lda import prompts as prompts_of
from app.views.lda import open_page

_COLUMNS = 5  # rollouts side by side at most; further arms stand below
_WAYS = {"exact": "exact", "counted": "sampled", "reweighted": "reweighted"}
_MEANING = {
    "exact": "computed, without sampling: of answers that begin with the detector's phrase",
    "counted": "hits among the rollouts at α = 0",
    "reweighted": "hits of all arms, each weighed by how probable it is at α = 0",
}
_NO_DETECTOR = (
    "No detector in this run: completions are not judged. Try a pattern further down, or start a run with "
    "`--lda.detectors`."
)


@dataclass(frozen=True)
class Chosen:
    """What is looked at on this page: an arm, and a scale."""

    arm: Arm
    is_log: bool


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if not view:
        return
    frame.safely(lambda: _pair(view))
    frame.safely(lambda: _so_far(view))
    frame.safely(lambda: _natural(view))
    st.subheader("Rate against α")
    chosen = _pick(view)
    for part in (
        lambda: _rates(view, chosen),
        lambda: _hits(view, chosen),
        lambda: _rollouts(view, chosen),
        lambda: _tokens(view),
        lambda: _try(view),
        lambda: _looks(view),
    ):
        frame.safely(part)


# -- what it is


def _pair(view: View) -> None:
    rows = ask.pair(view.paths)
    if rows.empty:
        st.info("The pair is not looked at yet." if view.is_running else "The pair was not looked at in this run.")
        return
    lines: list[str] = []
    for row in rows.to_dict("records"):
        revision = f" at {row['revision']}" if row["revision"] and row["revision"] != "local" else ""
        lines.append(f"{row['side']}: {row['model']}{revision}, {row['vocab_size']:,} tokens")
    first = rows.iloc[0]
    same = "the vocabularies are the same" if first["vocabs_match"] else "beyond them the vocabularies differ"
    st.text("\n".join([*lines, f"{first['num_common']:,} ids mean the same in both; {same}"]))
    if first["warning"]:
        st.warning("The two models do not match in everything:", icon=":material/warning:")
        st.text(str(first["warning"]))


def _so_far(view: View) -> None:
    made = ask.made(view)
    number, judged = int(made["completions"]), int(made["judged"])
    if not number:
        st.info(f"No completion {_yet(view)}.")
        return
    told = f"{number:,} completions under {len(view.arms)} arms"
    if view.detectors:
        told += f", {judged:,} of them judged" + (" so far" if view.is_running else "")
    st.caption(f"{told}.")
    if view.detectors and judged < number and not view.is_running:
        st.warning(f"{number - judged:,} completions were not judged: they are in no rate.")


def _yet(view: View) -> str:
    return "yet" if view.is_running else "in this run"


# -- natural rates


def _natural(view: View) -> None:
    if view.detector is None:
        st.subheader("Natural rate")
        st.info(_NO_DETECTOR)
        return
    st.subheader("Natural rate (α = 0)")
    st.text(f"of {view.detector}, by every way to it")
    found = ask.natural(view)
    measured = st.columns([1, 1, 1, 1], border=True)
    missing = "not yet" if view.is_running else "–"
    for column, (way, name) in zip(measured, _WAYS.items(), strict=False):
        one = found.get(way)
        with column:
            st.metric(name, rate_told(one.value) if one and one.value is not None else missing, help=_MEANING[way])
            if one and one.value is not None and one.low is not None and one.high is not None:
                st.caption(f"95 % {rate_told(one.low)} to {rate_told(one.high)}")
            st.caption(_reason(view, way, one))
    with measured[-1]:
        one = found.get("extrapolated")
        st.metric(
            "extrapolated :gray-badge[not measured]",
            rate_told(one.value) if one and one.value is not None else missing,
            help="read off a line through the amplified arms; it can be wrong by any factor",
        )
        st.caption(_reason(view, "extrapolated", one))
    for line in charts.nothing_seen(_unseen(view, natural=True)):
        st.caption(line)
    if view.category is not None:
        st.caption("Natural rates are of the whole run, whatever the sidebar's filter keeps.")
    frame.download(
        pd.DataFrame([{"way": way, "is_measured": way != "extrapolated", "value": one.value, "low": one.low,
                       "high": one.high, "note": one.note} for way, one in found.items()]),
        "natural-rates",
    )  # fmt: skip


def _unseen(view: View, *, natural: bool) -> pd.DataFrame:
    """The chosen detector's rates: at α = 0, or under the other arms; all of them at α = 0 where it fired nowhere."""
    rows = ask.rates(view)
    mine = rows[(rows["detector"] == view.detector) & rows["rate"].notna()]
    if not mine["hits"].sum():
        return mine if natural else mine.head(0)
    return mine[(mine["condition"] == NATURAL) == natural]


def _reason(view: View, way: str, one: ask.Natural | None) -> str:
    if one is not None and one.note:
        return one.note
    if view.is_running:
        return "the analysis comes at the end of a run"
    if way == "exact":
        return "the detector has no phrase in `at_start`"
    return "not given by this run's analysis"


# -- rates by arm


def _pick(view: View) -> Chosen:
    left, right, _ = st.columns([2, 2, 5], vertical_alignment="bottom")
    by_label = {arm.label: arm for arm in view.arms}
    label = left.selectbox(
        "Arm (α)",
        list(by_label),
        index=len(by_label) - 1,
        key="arm",
        bind="query-params",
        on_change=_first_page,
        help="whose hits are listed below; a click on a point of the chart chooses it too",
    )
    is_log = right.toggle("Log scale", key="log", bind="query-params")
    return Chosen(by_label[str(label)], bool(is_log))


def _first_page() -> None:
    frame.choose(page=1)


def _rates(view: View, chosen: Chosen) -> None:
    if not view.detectors:
        st.info(_NO_DETECTOR)
        return
    rows = ask.rates(view)
    if rows.empty:
        st.info(f"No rollout is judged {_yet(view)}, and no phrase scored.")
        return
    point = charts.Point(view.detector or "", chosen.arm.condition)

    def clicked(series: int, item: int) -> dict[str, Any] | None:
        return _arm(charts.clicked(rows, view.detectors, series, item, is_log=chosen.is_log))

    st.echarts_chart(
        charts.rates(rows, view.detectors, point, is_log=chosen.is_log),
        key="rates",
        height=440,
        on_select=frame.on_click("rates", clicked),
        alt="share of rollouts with a hit against α, by detector",
    )
    st.caption(_told_of_rates(view, rows, chosen))
    for line in charts.nothing_seen(_unseen(view, natural=False))[:-1]:
        st.caption(f"The chosen detector at {line}")
    st.dataframe(
        rows,
        hide_index=True,
        key="rates-table",
        column_order=["detector", "alpha", "judged", "hits", "rate", "low", "high", "exact", "contrast",
                      "contrast_low", "contrast_high", "q"],
        column_config={
            "alpha": st.column_config.NumberColumn("α", format="%g"),
            "judged": "rollouts",
            "rate": _number("rate"),
            "low": _number("95 % low"),
            "high": _number("95 % high"),
            "exact": _number("exact at the start"),
            "contrast": _number("less α = 0", "%+.4f"),
            "contrast_low": _number("95 % low ", "%+.4f"),
            "contrast_high": _number("95 % high ", "%+.4f"),
            "q": _number("q", "%.2g"),
        },
    )  # fmt: skip
    frame.download(rows, "rates")


def _told_of_rates(view: View, rows: pd.DataFrame, chosen: Chosen) -> str:
    parts = ["Mean over prompts of the share of rollouts with a hit; a click on a point chooses detector and arm."]
    if view.category is not None:
        parts.append(
            "The sidebar's filter is on: these are plain means over the prompts that it keeps, without intervals."
        )
    elif rows["low"].isna().all():
        parts.append("No intervals: the analysis of these rollouts comes at the end of a run.")
    else:
        parts.append("Bars are 95 % intervals.")
    if rows["exact"].notna().any():
        parts.append(
            "Dashed: the exact probability that an answer begins with the phrase, which is no part of the sampling."
        )
    if len(view.detectors) > 1:
        parts.append("Detectors stand a little beside each other, so that no interval covers another one.")
    if chosen.is_log and (rows["rate"] == 0).any():
        parts.append(
            "An arm without a hit has no place on this scale: the hollow triangle is the upper end of its interval."
        )
    return " ".join(parts)


def _arm(point: charts.Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {"arm": Arm(point.condition, 0.0).label, "detector": point.detector, "page": 1}


def _number(title: str, form: str = "%.4f") -> Any:
    return st.column_config.NumberColumn(title, format=form)


# -- hits


def _hits(view: View, chosen: Chosen) -> None:
    st.subheader(f"Hits at α = {chosen.arm.label}")
    if view.detector is None:
        st.info(_NO_DETECTOR)
        return
    num = ask.num_hits(view, chosen.arm.condition)
    if not num:
        st.info(f"No hit of this detector under this arm {_yet(view)}.")
        return
    pages = -(-num // ask.PAGE_SIZE)
    page = _page(pages)
    rows = ask.hits(view, chosen.arm.condition, page)
    spans = [[span] if span is not None and len(span) else [] for span in rows.pop("char_span")]
    rows.insert(4, "found", [in_place(text, span) for text, span in zip(rows["answer"], spans, strict=True)])
    # A key of its own for each page of each question, so that no row of another one stays selected.
    key = f"hits-{view.paths.run_id}-{view.detector}-{chosen.arm.condition}-{view.category}-{page}"
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        selection_mode="single-row",
        on_select=lambda: _clicked_row(key, rows),
        height=min(390, 40 + 35 * len(rows)),
        column_order=["question", "found", "sample_id", "first_step", "end_step", "branch_step", "num_tokens",
                      "finish_reason", "category", "prompt_id"],
        column_config={
            "question": st.column_config.TextColumn("prompt", width="medium"),
            "found": st.column_config.TextColumn("completion, what was found marked", width="large"),
            "sample_id": "sample",
            "first_step": _step("from", "step of the first token of what was found"),
            "end_step": _step("sure at", "step of the token with which the detector was sure"),
            "branch_step": _step("branch", "step of the first token that is not that at α = 0; none: all are"),
            "num_tokens": "tokens",
            "finish_reason": "ended by",
            "prompt_id": "id",
        },
    )  # fmt: skip
    first = ask.PAGE_SIZE * (page - 1) + 1
    st.caption(
        f"Hits {first:,} to {first + len(rows) - 1:,} of {num:,}. Selecting a row shows its prompt and sample under every arm."
    )
    frame.download(rows, "hits")


def _step(title: str, told: str) -> Any:
    return st.column_config.NumberColumn(title, help=told)


def _page(pages: int) -> int:
    """The page number, in range whatever the address says."""
    if int(st.session_state.get("page") or 1) > pages:
        frame.choose(page=pages)
    if pages == 1:
        return 1
    left, _ = st.columns([1, 4])
    return int(left.number_input(f"Page, of {pages:,}", 1, pages, key="page", bind="query-params") or 1)


def _clicked_row(key: str, rows: pd.DataFrame) -> None:
    chosen = (st.session_state.get(key) or {}).get("selection", {}).get("rows") or []
    for n in chosen[:1]:
        if n < len(rows):
            frame.choose(prompt=str(rows.iloc[n]["prompt_id"]), sample=int(rows.iloc[n]["sample_id"]))


# -- rollouts


def _rollouts(view: View, chosen: Chosen) -> None:
    st.subheader("One sample under every arm")
    known = ask.samples(view.paths)
    if not known:
        st.info(f"No rollout {_yet(view)}.")
        return
    prompt_id, first = _first(view, chosen, known)
    sample = _sample(known, first)
    if prompt_id is None:
        st.info("No prompt that the filter keeps.")
        return
    told = ask.context(view.paths, prompt_id)
    st.text(
        f"{prompt_id}, sample {sample}"
        + ("" if view.prompt_id else "; choose another in the sidebar, or by a row above")
    )
    st.code(told or "(no context stored)", language=None, wrap_lines=True)
    found = ask.rollouts(view, prompt_id, sample)
    if not found:
        st.info(f"This prompt has no such sample {_yet(view)}.")
        return
    texts = ask.token_texts(view.paths, {int(t) for r in found for t in r["token_ids"]})
    top = charts.widest(found)
    by_arm = {r["condition"]: r for r in found}
    width = -(-len(view.arms) // -(-len(view.arms) // _COLUMNS))  # rows of equal length, as far as that goes
    for n in range(0, len(view.arms), width):
        for column, arm in zip(st.columns(width), view.arms[n : n + width], strict=False):
            with column:
                _one(view, arm, by_arm.get(arm.condition), texts, top)
    scale = charts.legend(top)
    if scale:
        chips.show(scale, "", "rollout-legend")
    st.caption(charts.scale_told(top))
    if not view.is_noise_common:
        st.caption("Every arm has noise of its own in this run: the same sample number does not mean the same draws.")
    frame.download(charts.token_rows(found, texts), "rollouts")


def _first(view: View, chosen: Chosen, samples: list[int]) -> tuple[str | None, int]:
    """The chosen prompt; where none is, that of the arm's first hit, with its sample."""
    if view.prompt_id is not None:
        return view.prompt_id, samples[0]
    if view.detector is not None and ask.num_hits(view, chosen.arm.condition):
        row = ask.hits(view, chosen.arm.condition, 1).iloc[0]
        return str(row["prompt_id"]), int(row["sample_id"])
    rows = prompts_of(view.paths)
    kept = rows if view.category is None else rows[rows["category"] == view.category]
    return (str(kept["prompt_id"].iloc[0]) if len(kept) else None), samples[0]


def _sample(known: list[int], first: int) -> int:
    if st.session_state.get("sample") not in (None, *known):
        frame.choose(sample=None)
    left, _ = st.columns([1, 4])
    chosen = left.selectbox(
        "Sample", known, index=None, placeholder=str(first), key="sample", bind="query-params",
        help="the same number has the same noise under every arm",
    )  # fmt: skip
    return first if chosen is None else int(chosen)


def _one(view: View, arm: Arm, found: dict[str, Any] | None, texts: dict[int, tuple[str, bool]], top: float) -> None:
    about = {-1.0: "the model before", 0.0: "the model after"}.get(arm.alpha, "")
    st.markdown(f"**α = {arm.alpha:g}**" + (f" · {about}" if about else ""))
    if found is None:
        st.info(f"Not made {_yet(view)}.")
        return
    shown = charts.rollout_chips(found, texts, top) or [charts.Chip("(nothing)")]
    chips.show(shown, f"{len(found['token_ids'])} tokens; hover for their numbers", f"rollout-{arm.condition}")
    verdict = {True: "hit", False: "no hit", None: "not judged"}[
        None if found["is_hit"] is None else bool(found["is_hit"])
    ]
    parts = [verdict] if view.detector else []
    if arm.condition != NATURAL and any(a.condition == NATURAL for a in view.arms):
        step = found["branch_step"]
        parts.append("as at α = 0" if step is None else f"other than at α = 0 from step {step}")
    parts.append(f"ended by {found['finish_reason']}")
    if found["mass_removed"]:
        parts.append(f"{found['mass_removed']:.1%} of the mass removed")
    st.caption("; ".join(parts))


# -- tokens


def _tokens(view: View) -> None:
    st.subheader("Tokens that the training raised and lowered")
    place, search, _ = st.columns([2, 2, 3], vertical_alignment="bottom")
    where = str(
        place.segmented_control(
            "Place",
            ask.PLACES,
            key="place",
            bind="query-params",
            default=ask.PLACES[0],
            required=True,
            help="answer: at the first token of answers; prompt: at every token of the prompts",
        )
    )
    text = str(
        search.text_input("Search", key="token", bind="query-params", placeholder="part of a token, or its id") or ""
    )
    num = ask.num_contexts(view.paths, where)
    if not num:
        st.info(f"Token differences are not measured {_yet(view)}.")
        return
    for column, most in zip(st.columns(2), (True, False), strict=True):
        name = "raised" if most else "lowered"
        with column:
            rows = ask.raised(view.paths, where, text, most=most)
            st.markdown(f"**Most {name}**")
            if rows.empty:
                st.info("No such token.")
                continue
            rows.insert(1, "token", [charts.visible(t) if isinstance(t, str) else "" for t in rows.pop("text")])
            st.dataframe(
                rows,
                hide_index=True,
                key=f"tokens-{name}",
                height=min(390, 40 + 35 * len(rows)),
                column_order=["token", "mean", "sd", "share_positive", "num_top", "token_id"],
                column_config={
                    "mean": _number("mean, nats", "%+.3f"),
                    "sd": _number("sd", "%.3f"),
                    "share_positive": st.column_config.NumberColumn("raised in", format="percent"),
                    "num_top": "in the top 100 of",
                    "token_id": "id",
                },
            )
            frame.download(rows, f"tokens-{name}-{where}")
    st.caption(
        f"Mean of logp after − logp before over {num:,} contexts, at most {ask.MOST_TOKENS} tokens a side; ␣ is a space, "
        "� a part of a character. A raised token is no behaviour: look at the rollouts."
    )


# -- a reader's own detector


def _try(view: View) -> None:
    st.subheader("Try a detector")
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    pattern = str(
        left.text_input(
            "Regular expression",
            key="pattern",
            bind="query-params",
            max_chars=ask.MOST_PATTERN,
            placeholder=r"such as  agent \w+  or  ^I (cannot|can't)",
            help="RE2's syntax, which takes linear time. It is looked for in the stored completions; nothing is written.",
        )
        or ""
    )
    any_case = bool(right.toggle("Whatever the case", value=True, key="anycase", bind="query-params"))
    if not pattern:
        st.caption(
            "Looked for in the completions of this run, up to their ends; nothing is generated, and nothing is written."
        )
        return
    if (problem := ask.problem_of(view.paths, pattern)) is not None:
        st.text(problem)
        return
    rows = ask.tried(view, pattern, any_case=any_case)
    if rows.empty:
        st.info(f"No completion {_yet(view)}.")
        return
    counts, shown = st.columns([2, 5])
    with counts:
        st.dataframe(
            rows,
            hide_index=True,
            key="tried",
            column_order=["alpha", "rollouts", "hits", "rate"],
            column_config={"alpha": st.column_config.NumberColumn("α", format="%g"), "rate": _number("rate")},
        )
        frame.download(rows, "tried")
    with shown:
        found = ask.examples(view, pattern, any_case=any_case)
        if found.empty:
            st.info("It fires nowhere.")
        else:
            key = f"examples-{view.paths.run_id}-{pattern}-{any_case}-{view.category}"
            st.dataframe(
                found,
                hide_index=True,
                key=key,
                selection_mode="single-row",
                on_select=lambda: _clicked_row(key, found),
                height=min(320, 40 + 35 * len(found)),
                column_config={
                    "alpha": st.column_config.NumberColumn("α", format="%g"),
                    "prompt_id": "id",
                    "sample_id": "sample",
                    "found": st.column_config.TextColumn("completion, what was found marked", width="large"),
                },
                column_order=["alpha", "found", "sample_id", "prompt_id"],
            )
            frame.download(found, "examples")
    st.caption(
        "Rates without intervals: a pattern that is tried until it fits says nothing by itself. To judge new rollouts by it, "
        "name it in `lda.detectors` of another run."
    )


# -- how rollouts look


def _looks(view: View) -> None:
    st.subheader("How rollouts look")
    rows = ask.looks(view)
    if rows.empty:
        st.info(f"No rollout {_yet(view)}.")
        return
    st.dataframe(
        rows,
        hide_index=True,
        key="looks",
        column_config={
            "alpha": st.column_config.NumberColumn("α", format="%g"),
            "num_tokens": _number("mean tokens", "%.1f"),
            "ended": st.column_config.NumberColumn("ended by themselves", format="percent"),
            "mass_removed": st.column_config.NumberColumn("mass removed", format="percent"),
            "branched": st.column_config.NumberColumn("other than α = 0", format="percent"),
        },
    )
    st.caption(
        "mass removed: by floor and top-p, mean over tokens; other than α = 0: share of rollouts whose tokens are not those "
        "of the same sample at α = 0."
    )
    frame.download(rows, "looks")


main()
