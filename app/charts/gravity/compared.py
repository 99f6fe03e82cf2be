"""Two runs' numbers side by side, each with its interval."""

import pandas as pd

from app.charts import BLUE, RED, Option


def intervals(
    rows: pd.DataFrame, names: tuple[str, str], y_title: str, low: float | None, high: float | None
) -> Option:
    """A whisker a run and group. `rows`: columns grouping, value, low, high, value_other, low_other, high_other, in order;
    what a run has not measured is left out. The axis is fixed to `low` and `high` where they are given.
    """
    series: list[Option] = []
    for name, ending, colour in ((names[0], "", BLUE), (names[1], "_other", RED)):
        data: list[Option] = []
        for row in rows.to_dict("records"):
            value, bottom, top = (row[f"{column}{ending}"] for column in ("value", "low", "high"))
            if pd.isna(value):
                data.append({"name": f"{row['grouping']}: not measured", "value": []})
                continue
            bottom, top = (value if pd.isna(end) else end for end in (bottom, top))
            told = f"{row['grouping']}: {value:.3f}" + (f" [{bottom:.3f}, {top:.3f}]" if top > bottom else "")
            data.append({"name": told, "value": [bottom, value, value, value, top]})
        series.append(
            {
                "type": "boxplot",
                "name": name,
                "data": data,
                "boxWidth": [8, 28],
                "itemStyle": {"color": colour, "borderColor": colour, "borderWidth": 2},
                "emphasis": {"itemStyle": {"borderWidth": 3}},
            }
        )
    return {
        "grid": {"left": 64, "right": 24, "top": 48, "bottom": 56},
        "legend": {"top": 0, "data": list(names)},
        "tooltip": {"trigger": "item", "formatter": "{a}<br/>{b}"},
        "xAxis": {
            "type": "category",
            "data": [str(g) for g in rows["grouping"]],
            "name": "prompts by pressure P0",
            "nameLocation": "middle",
            "nameGap": 32,
        },
        "yAxis": {
            "type": "value",
            "name": y_title,
            "nameLocation": "middle",
            "nameGap": 44,
            "min": low,
            "max": high,
            "scale": low is None,
        },
        "series": series,
    }
