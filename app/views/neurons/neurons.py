"""Which neurons a ranking names, where they lie, what one of them does, and whether ablation does what was claimed."""

from typing import Any
from urllib.parse import quote

import pandas as pd
import streamlit as st

from app import frame
from app.charts.chips import in_place
from app.charts.neurons import COLOUR_OF, number_told, size_told
from app.charts.neurons import neurons as charts
from app.charts.neurons.tokens import shown
from app.queries import neurons as shared
from app.queries.neurons import Neuron, View
from app.queries.neurons import neurons as ask
from app.queries.neurons.neurons import Filters
from app.views.neurons import METRIC_TOLD, absent, open_page

_STAGE_OF = {"influence": "influence", "effect": "effects", "peak": "peaks", "background": "background"}
_KINDS = {
    "zero": "set to 0", "mean": "set to its mean over the background", "resample": "set to its value in another prompt",
    "add": "raised by standard deviations", "flip": "turned in sign", "swap": "moved to its value in another prompt",
}  # fmt: skip
_MEASURES = {
    "spearman": "rank correlation", "pearson": "correlation", "sign": "same sign", "slope": "slope",
}  # fmt: skip


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if not view:
        return
    if view.prompt_id is not None:
        st.text(f"Influence, effects and curves of prompt {view.prompt_id}; peaks are of all prompts.")
    layers = shared.layers(view.paths)
    known = ask.rankings(view)
    _missing(view, known)
    if known and layers:
        filters = _filters(known, layers)
        frame.safely(lambda: _density(view, filters, layers))
        frame.safely(lambda: _table(view, filters))
        frame.safely(lambda: _scatter(view, filters))
    for part in (_one, _claims, _curves):
        frame.safely(lambda part=part: part(view))


def _missing(view: View, known: list[str]) -> None:
    if not known:
        st.info(absent(view, "peaks", "Statistics and rankings of neurons"))
    elif "peak" not in known:
        st.info(absent(view, "peaks", "Statistics of neurons' peaks"))
    elif "influence" not in known:
        st.info(absent(view, "influence", "Influence on a target"))


# -- rankings


def _filters(known: list[str], layers: list[int]) -> Filters:
    by, span, sign = st.columns([4, 5, 4], vertical_alignment="bottom")
    q, share, _ = st.columns([4, 4, 5], vertical_alignment="bottom")
    chosen = str(
        by.selectbox(
            "Rank by", known, key="by", bind="query-params", on_change=_first_page,
            help="; ".join(f"{name}: {told}" for name, told in ask.RANKINGS.items()),
        )
    )  # fmt: skip
    ends = (layers[0], layers[-1])
    if ends[0] < ends[1]:
        low, high = span.slider(
            "Layers", ends[0], ends[1], ends, key="layers", bind="query-params", on_change=_first_page
        )
    else:
        low, high = ends
    max_q = q.number_input(
        "q at most", 0.0, 1.0, 1.0, 0.05, key="q", bind="query-params", format="%g", on_change=_first_page,
        help="of peaks against the background, false discoveries controlled; 1 is off",
    )  # fmt: skip
    wanted = sign.segmented_control(
        "Sign", ask.SIGNS, key="sign", bind="query-params", default="any", required=True, on_change=_first_page,
        help="of what is ranked by; of peaks, that of the largest",
    )  # fmt: skip
    min_share = share.number_input(
        "Share at least", 0.0, 1.0, 0.0, 0.001, key="share", bind="query-params", format="%g", on_change=_first_page,
        help="of Σ|influence| of a prompt, mean over prompts; 0 is off",
    )  # fmt: skip
    return Filters(
        chosen, (int(low), int(high)), float(1.0 if max_q is None else max_q), str(wanted), float(min_share or 0.0)
    )


def _first_page() -> None:
    frame.choose(page=1)


def _density(view: View, filters: Filters, layers: list[int]) -> None:
    st.subheader("Where the ranking lies")
    cells = ask.density(view, filters.by)
    if cells.empty:
        st.info(absent(view, _STAGE_OF[filters.by], "This ranking"))
        return

    def clicked(_: int, item: int) -> dict[str, Any] | None:
        layer = charts.clicked_layer(cells, layers, ask.EDGES, item)
        return None if layer is None else {"layers": (layer, layer), "page": 1}

    st.echarts_chart(
        charts.density(cells, layers, ask.EDGES),
        key="density",
        height=min(560, 150 + 18 * len(layers)),
        on_select=frame.on_click("density", clicked),
        alt="of the neurons at each place of the ranking, the share that lies in each layer",
    )
    within = {"influence": "within each prompt", "effect": "within each prompt, of the neurons that were changed"}
    st.caption(
        f"Of the neurons at these places, {within.get(filters.by, 'once over all neurons')}, the share that lies in a layer; "
        f"evenly spread it would be {1 / len(layers):.1%}. The other filters do not change it. A click keeps one layer below."
    )
    told = cells.to_dict("records")
    frame.download(pd.DataFrame([{"layer": c["layer"], "upto": _upto(c["bin"]), "n": c["n"], "share": c["share"]} for c in told]),
                   "density")  # fmt: skip


def _upto(number: int) -> int | None:
    """The last place of a bin."""
    return ask.EDGES[number] if number < len(ask.EDGES) else None


def _table(view: View, filters: Filters) -> None:
    st.subheader("Ranking")
    num = ask.num_ranked(view, filters)
    if not num:
        st.info("No neuron that these filters keep.")
        return
    page = _page(-(-num // ask.PAGE_SIZE))
    rows = ask.ranked(view, filters, page)
    rows.insert(0, "name", [Neuron(int(a), int(b)).label for a, b in zip(rows["layer"], rows["neuron"], strict=True)])
    rows["peak_token"] = [shown(t) if isinstance(t, str) else "" for t in rows["peak_token"]]
    key = f"ranking-{view.paths.run_id}-{view.prompt_id}-{view.metric}-{filters}-{page}"
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        selection_mode="single-row",
        on_select=lambda: _clicked_row(key, rows),
        height=min(390, 40 + 35 * len(rows)),
        column_order=["name", "size", "influence", "share", "num_ranked", "place", "effect", "predicted", "mean_peak",
                      "z_background", "q", "share_active", "peak_token", "peak_token_share"],
        column_config={
            "name": "neuron",
            "size": _number("|influence|", "%.4f", "mean over all prompts, or the chosen one's"),
            "influence": _number("influence", "%+.4f", "the same with its sign: prompts may cancel"),
            "share": st.column_config.NumberColumn("share", format="percent", help="of Σ|influence|"),
            "num_ranked": st.column_config.NumberColumn("prompts", help="in which the metric keeps it"),
            "place": st.column_config.NumberColumn("best place", help="in any prompt's ranking"),
            "effect": _number("measured", "%+.4f", "change of the target when it is changed; mean over those measured"),
            "predicted": _number("claimed", "%+.4f", "that change by the metric's first order"),
            "mean_peak": _number("mean peak", "%.3f", "mean over prompts of max |a|: loudness, no influence"),
            "z_background": _number("z", "%+.1f", "of its mean peak against the background"),
            "q": _number("q", "%.2g", "of that z, over all neurons"),
            "share_active": st.column_config.NumberColumn("active", format="percent", help="share of tokens with a > 0"),
            "peak_token": "peaks at",
            "peak_token_share": st.column_config.NumberColumn("of peaks", format="percent"),
        },
    )  # fmt: skip
    first = ask.PAGE_SIZE * (page - 1) + 1
    st.caption(
        f"Neurons {first:,} to {first + len(rows) - 1:,} of {num:,}, {ask.RANKINGS[filters.by]}. A metric keeps the neurons "
        "that it ranks first in each prompt: the others have no influence here, which is not none. Selecting a row shows the "
        "neuron below."
    )
    frame.download(rows, "ranking")


def _page(pages: int) -> int:
    """The page number, in range whatever the address says."""
    if int(st.session_state.get("page") or 1) > pages:
        frame.choose(page=pages)
    if pages == 1:
        return 1
    left, _ = st.columns([1, 4])
    return int(left.number_input(f"Page, of {pages:,}", 1, pages, key="page", bind="query-params") or 1)


def _clicked_row(key: str, rows: pd.DataFrame) -> None:
    for n in (st.session_state.get(key) or {}).get("selection", {}).get("rows", [])[:1]:
        if n < len(rows):
            frame.choose(neuron=str(rows.iloc[n]["name"]))


def _number(title: str, form: str, told: str) -> Any:
    return st.column_config.NumberColumn(title, format=form, help=told)


def _chosen(view: View) -> charts.Point | None:
    return charts.Point(view.neuron.layer, view.neuron.number) if view.neuron else None


def _scatter(view: View, filters: Filters) -> None:
    st.subheader("Peak against influence")
    rows = ask.points(view, filters)
    if rows.empty:
        st.info(absent(view, "influence", "A neuron with both a peak and an influence, within these filters"))
        return

    def clicked(series: int, item: int) -> dict[str, Any] | None:
        point = charts.clicked_point(rows, series, item)
        return point and {"neuron": Neuron(point.layer, point.neuron).label}

    st.echarts_chart(
        charts.scatter(rows, _chosen(view)),
        key="scatter",
        height=420,
        on_select=frame.on_click("scatter", clicked),
        alt="mean peak of each neuron against its influence on the target",
    )
    both = ask.loud_and_strong(view)
    st.caption(
        f"{len(rows):,} neurons, {ask.RANKINGS[filters.by]}; a click on a point chooses a neuron. Peaks are not influence: of "
        f"the {int(both['num']):,} that peak highest, {int(both['both']):,} are among as many of the largest |influence|. Loud "
        "neurons that the metric keeps in no prompt have no point."
    )
    frame.download(rows, "peak-against-influence")


# -- one neuron


def _one(view: View) -> None:
    st.subheader(f"Neuron {view.neuron.label}" if view.neuron else "One neuron")
    if view.neuron is None:
        st.info("None is chosen: click a point or a row above, or name one in the sidebar.")
        return
    chosen = view.neuron
    if not ask.is_known(view, chosen):
        st.info(f"Neuron {chosen.label} has no row in this run: its layer or number may not be there, or not yet.")
        return
    left, right = st.columns([4, 5])
    with left:
        _statistics(view, chosen)
    with right:
        _examples(view, chosen)
    _writes(view, chosen)
    _effects_of(view, chosen)


def _statistics(view: View, chosen: Neuron) -> None:
    st.markdown("**Statistics**")
    row = ask.neuron(view, chosen)
    if row is None:
        st.info(absent(view, "peaks", "Its statistics"))
        return
    error = f", counts off by at most {row['tokens_error']:,}" if row["tokens_error"] else ""
    told = [
        ("mean peak, max |a| of a prompt", f"{size_told(row['mean_peak'])} ± {size_told(row['sd_peak'])}"),
        ("smallest and largest", f"{size_told(row['min_peak'])} to {size_told(row['max_peak'])}"),
        ("the largest with its sign", number_told(row["max_signed"])),
        ("z against the background", f"{number_told(row['z_background'])}, q {size_told(row['q'])}"),
        ("mean peak in the background", f"{size_told(row['peak_background'])} ± {size_told(row['sd_background'])}"),
        ("mean a over tokens", f"{number_told(row['mean'])} ± {size_told(row['sd'])}"),
        ("tokens with a > 0", _percent(row["share_active"])),
        ("kurtosis of a", size_told(row["kurtosis"])),
        ("peaks most often at", f"{_token(row['peak_token'])}, {_percent(row['peak_token_share'])}{error}"),
        ("different tokens at peaks", _count(row["num_peak_tokens"])),
        ("most often followed by", f"{_token(row['next_token'])}, of {_count(row['num_next_tokens'])}"),
        ("peaks at function words", _percent(row["share_functional"])),
        ("length of what it writes", size_told(row["out_norm"])),
        ("over", f"{_count(row['num_prompts'])} prompts, {_count(row['num_tokens'])} tokens"),
    ]
    table = pd.DataFrame(told, columns=["what", "value"])
    st.dataframe(table, hide_index=True, key="statistics", height=40 + 35 * len(table))
    frame.download(table, "statistics")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _token(text: str | None) -> str:
    return "–" if text is None else f"“{shown(text)}”"


def _examples(view: View, chosen: Neuron) -> None:
    st.markdown("**Top examples**")
    found = ask.examples(view, chosen)
    if not found:
        st.info(absent(view, "peaks", "Its examples"))
        return
    rows = pd.DataFrame(
        {
            "value": [e["value"] for e in found],
            "where": [_where(e) for e in found],
            "look": [_address(view, e["prompt_id"], chosen) for e in found],
            "prompt_id": [e["prompt_id"] for e in found],
            "position": [e["position"] for e in found],
        }
    )
    key = f"neuron-examples-{view.paths.run_id}-{chosen.label}"
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        height=min(530, 40 + 35 * len(rows)),
        selection_mode="single-row",
        on_select=frame.on_row(key, list(rows["prompt_id"])),
        column_order=["value", "look", "where", "prompt_id", "position"],
        column_config={
            "value": _number("a", "%+.4g", "its peak in that prompt"),
            "where": st.column_config.TextColumn("prompt, the token of the peak marked", width="large"),
            "look": st.column_config.LinkColumn("heat map", display_text="open", help="the prompt, token by token"),
            "prompt_id": "id",
        },
    )
    st.caption("The prompts in which it peaks highest. Selecting a row chooses the prompt.")
    frame.download(rows.drop(columns="look"), "examples")


_AROUND = 60  # characters on each side of a marked token


def _where(example: dict[str, Any]) -> str:
    """The text around a token, with the token marked."""
    text, span = example["text"], example["offset"]
    if not isinstance(text, str) or not span or span[1] <= span[0]:
        return shown(f"⟦{example['piece'] or ''}⟧ {(text or '')[:_AROUND]}")
    start, end = max(0, span[0] - _AROUND), span[1] + _AROUND
    marked = in_place(text[start:end], [(span[0] - start, span[1] - start)])
    return shown(("…" if start else "") + marked + ("…" if end < len(text) else ""))


def _address(view: View, prompt_id: str, chosen: Neuron) -> str:
    """The heat map of a prompt and neuron, relative to this page."""
    metric = f"&metric={quote(view.metric, safe='')}" if view.metric else ""
    return f"heat_map?run={quote(view.paths.run_id, safe='')}&prompt={quote(prompt_id, safe='')}&neuron={chosen.label}{metric}"


def _writes(view: View, chosen: Neuron) -> None:
    st.markdown("**What it writes**")
    found = ask.writes(view, chosen)
    if found is None:
        st.info(absent(view, "writes", "Its write tokens", "neurons.writes"))
        return
    kinds = [kind for kind in ("raised", "lowered", "explicit") if len(found[kind])]
    titles = {"raised": "raises", "lowered": "lowers", "explicit": "asked for"}
    for column, kind in zip(st.columns(max(len(kinds), 1)), kinds, strict=False):
        rows = found[kind].assign(text=[shown(t) for t in found[kind]["text"]])
        with column:
            st.dataframe(
                rows,
                hide_index=True,
                key=f"writes-{kind}",
                height=min(320, 40 + 35 * len(rows)),
                column_order=["text", "logit", "token_id"],
                column_config={
                    "text": titles[kind],
                    "logit": _number("logit", "%+.3f", "added for each unit of a, by the frozen path"),
                    "token_id": "id",
                },
            )
            frame.download(rows, f"writes-{kind}")
    st.caption(
        "Logits that one unit of activation adds by the direct path alone: nothing that follows it reads along. A neuron that "
        "writes much and never fires moves nothing."
    )


def _effects_of(view: View, chosen: Neuron) -> None:
    st.markdown("**Its effects, claimed and measured**")
    rows = ask.effects_of(view, chosen)
    if rows.empty:
        st.info(
            absent(view, "effects", "Effects of this neuron", "neurons.effects")
            + " Only the neurons that a metric ranks first are changed one by one."
        )
        return
    drawn = rows.assign(layer=chosen.layer, neuron=chosen.number)

    def clicked(series: int, item: int) -> dict[str, Any] | None:
        point = charts.clicked_claim(drawn, series, item)
        return point and {"prompt": point.prompt_id}

    left, right = st.columns(2)
    with left:
        st.echarts_chart(
            charts.claims(drawn),
            key="own-effects",
            height=340,
            on_select=frame.on_click("own-effects", clicked),
            alt="measured against claimed change of the target, a point a prompt and metric",
        )
    with right:
        wide = rows.pivot_table(index="prompt_id", columns="ranking", values="predicted", sort=False)
        wide = wide[[n for n in COLOUR_OF if n in wide.columns]]
        first = rows.drop_duplicates("prompt_id").set_index("prompt_id")[["measured", "activation", "edited"]]
        table = first.join(wide).reset_index()
        key = f"own-effects-table-{view.paths.run_id}-{chosen.label}"
        config: dict[str, Any] = {
            name: st.column_config.NumberColumn(f"{name} claims", format="%+.4f") for name in wide.columns
        }
        config |= {
            "prompt_id": "prompt",
            "measured": _number("measured", "%+.4f", "change of the target"),
            "activation": _number("a", "%+.4g", "before"),
            "edited": _number("a set to", "%+.4g", "after"),
        }
        st.dataframe(
            table, hide_index=True, key=key, height=min(340, 40 + 35 * len(table)), column_config=config,
            selection_mode="single-row", on_select=frame.on_row(key, list(table["prompt_id"])),
            column_order=["prompt_id", "measured", *wide.columns, "activation", "edited"],
        )  # fmt: skip
        frame.download(table, "own-effects")
    kind = str(rows["kind"].iloc[0])
    st.caption(
        f"The neuron was {_KINDS.get(kind, 'changed')}; a point a prompt and metric, on the dashed line both are the same. "
        "Claims are first-order: dla freezes every norm and everything in between, which in life answer to the change. Both "
        "are shown, and the measured one is what happened."
    )


# -- all of them


def _claims(view: View) -> None:
    st.subheader("Effects against claims")
    made = ask.num_effects(view)
    if made.empty or view.metric is None:
        st.info(absent(view, "effects", "Measured effects", "neurons.effects"))
        return
    rows = ask.effects(view).assign(ranking=view.metric)
    left, right = st.columns([3, 5])
    with left:
        if rows.empty:
            st.info(absent(view, "effects", "Measured effects of this metric's ranking", "neurons.effects"))
        else:
            _claims_chart(view, rows, made)
    with right:
        _agreement(view)


def _claims_chart(view: View, rows: pd.DataFrame, made: pd.DataFrame) -> None:
    def clicked(series: int, item: int) -> dict[str, Any] | None:
        point = charts.clicked_claim(rows, series, item)
        return point and {"neuron": Neuron(point.layer, point.neuron).label}

    st.echarts_chart(
        charts.claims(rows, _chosen(view)),
        key="claims",
        height=380,
        on_select=frame.on_click("claims", clicked),
        alt="measured against claimed change of the target, a point a neuron and prompt",
    )
    (own,) = made[made["ranking"] == view.metric].to_dict("records")
    part = "" if len(rows) == own["n"] else f"{len(rows):,} of them, drawn at random. "
    st.caption(
        f"{own['n']:,} neurons in {own['prompts']:,} prompts, each {_KINDS.get(str(own['kind']), 'changed')} alone. {part}"
        f"On the dashed line the claim of {view.metric} ({METRIC_TOLD.get(str(view.metric), 'a metric')}) holds. A click "
        "chooses the neuron."
    )
    frame.download(rows, "effects")


def _agreement(view: View) -> None:
    rows = ask.agreement(view)
    if rows.empty:
        st.info(absent(view, "analysis", "Agreement of claims and effects"))
        return
    table = _wide(rows, _MEASURES)
    config = {name: st.column_config.TextColumn(told) for name, told in _MEASURES.items()}
    st.dataframe(table, hide_index=True, key="agreement", column_config={"ranking": "metric", **config})
    if rows["low"].notna().any():
        told = "Mean over prompts with 95 % intervals (bootstrap over prompts)."
    elif view.prompt_id is not None:
        told = "Of the chosen prompt alone, without intervals."
    else:
        told = "Mean over prompts so far, without intervals: those come with the stage `analysis`."
    st.caption(
        f"How well each metric's claims foretell what changing the neurons does. {told} Slope: of what is measured "
        "on what is claimed; under 1 the metric claims more than happens."
    )
    frame.download(rows, "agreement")


def _wide(rows: pd.DataFrame, measures: dict[str, str]) -> pd.DataFrame:
    """A row a ranking, a column a measure, each a value with its interval."""
    by_key = {(r["ranking"], r["measure"]): r for r in rows.to_dict("records")}
    names = {r for r, _ in by_key}
    order = [*(n for n in COLOUR_OF if n in names), *sorted(names - set(COLOUR_OF))]
    return pd.DataFrame(
        [{"ranking": n, **{m: _interval(by_key.get((n, m))) for m in measures}} for n in order],
        columns=["ranking", *measures],
    )


def _interval(row: dict[Any, Any] | None) -> str:
    if row is None or pd.isna(row["value"]):
        return "–"
    told = f"{row['value']:.3f}"
    return told if pd.isna(row["low"]) or pd.isna(row["high"]) else f"{told} [{row['low']:.3f}, {row['high']:.3f}]"


def _curves(view: View) -> None:
    st.subheader("Sets of neurons, kept and dropped")
    rows = ask.curves(view)
    if rows.empty:
        st.info(absent(view, "effects", "Curves", "neurons.curve"))
        return
    modes: dict[str, str] = {"keep": "**Kept: all others are ablated**", "drop": "**Dropped: these are ablated**"}
    for column, (mode, title) in zip(st.columns(2), modes.items(), strict=True):
        with column:
            st.markdown(title)
            st.echarts_chart(
                charts.curves(rows, mode, shared.CONTROLS),
                key=f"curve-{mode}",
                height=340,
                alt=f"share of the target that is left when k neurons are {'kept' if mode == 'keep' else 'dropped'}",
            )
    num = int(rows["n"].max())
    st.caption(
        "m(k) = (target with the set − with none) / (with all − with none), "
        + ("mean over " + f"{num:,} prompts" if view.prompt_id is None else "of the chosen prompt")
        + ". Dashed: controls, as many neurons at random, at random with the ranking's layers and deciles of |a| (matched), and "
        "the loudest. A ranking that finds what matters rises above matched when kept, and falls below it when dropped."
    )
    areas = ask.areas(view.paths)
    told: dict[str, str] = {
        "area_keep": "area, kept", "area_drop": "area, dropped", "area_keep_over_matched": "kept, less matched",
        "area_drop_over_matched": "dropped, less matched",
    }  # fmt: skip
    shown_areas = {name: title for name, title in told.items() if name in set(areas["measure"])}
    if shown_areas:
        config: dict[str, Any] = {"ranking": "ranking", **shown_areas}
        st.dataframe(_wide(areas, shown_areas), hide_index=True, key="areas", column_config=config)
        st.caption("Area under m(k) over ln k, of all prompts, with 95 % intervals (bootstrap over prompts).")
    else:
        st.caption("Areas under the curves with their intervals: " + absent(view, "analysis", "statistics"))
    frame.download(rows, "curves")


main()
