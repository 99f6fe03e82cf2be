"""Two runs' rates by arm."""

from collections.abc import Sequence

import pandas as pd

from app.charts import BLUE, RED, Option
from app.charts.lda import rate_told


def intervals(rows: pd.DataFrame, labels: Sequence[str], names: tuple[str, str]) -> Option:
    """A whisker a run and arm. `rows`: columns value, low, high and the same ending in _other, an arm each in the order of
    `labels`; what a run has not measured is left out."""
    series: list[Option] = []
    for name, ending, colour in ((names[0], "", BLUE), (names[1], "_other", RED)):
        data: list[Option] = []
        for label, row in zip(labels, rows.to_dict("records"), strict=True):
            value, low, high = (row[f"{column}{ending}"] for column in ("value", "low", "high"))
            if pd.isna(value):
                data.append({"name": f"α = {label}: not measured", "value": []})
                continue
            bottom, top = (value if pd.isna(end) else end for end in (low, high))
            data.append(
                {"name": f"α = {label}: {rate_told(value, low, high)}", "value": [bottom, value, value, value, top]}
            )
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
        "xAxis": {"type": "category", "data": list(labels), "name": "α", "nameLocation": "middle", "nameGap": 32},
        "yAxis": {
            "type": "value",
            "name": "share of rollouts with a hit",
            "nameLocation": "middle",
            "nameGap": 52,
            "min": 0,
        },
        "series": series,
    }
