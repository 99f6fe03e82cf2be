"""What pages of neurons ask: each page's questions in the module of its name; here what they share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from app import queries
from app.selection import Selection
from harness.experiments.neurons.settings import CONTROLS as CONTROLS
from harness.experiments.neurons.settings import METRICS
from harness.run import RunPaths, own_setting

EXAMPLES: dict[str, str] = {
    "Beyond the background": (
        "SELECT layer, neuron, mean_peak, peak_background, z_background, q\n"
        "FROM neurons\nWHERE q < .05\nORDER BY abs(z_background) DESC\nLIMIT 50"
    ),
    "Claimed and measured": (
        "-- neurons whose ablation does most, and what each metric said of them\n"
        "SELECT layer, neuron, prompt_id, any_value(delta_logit) AS measured,\n"
        "       max(predicted) FILTER (ranking = 'dla') AS dla,\n"
        "       max(predicted) FILTER (ranking = 'relp') AS relp\n"
        "FROM effects\nGROUP BY ALL\nORDER BY abs(measured) DESC\nLIMIT 50"
    ),
    "Loud, and of no influence": (
        "SELECT layer, neuron, mean_peak\nFROM neurons ANTI JOIN influence USING (layer, neuron)\n"
        "ORDER BY mean_peak DESC\nLIMIT 50"
    ),
    "How sparse": (
        "SELECT metric, avg(num_selected) AS selected, avg(effective) AS effective, count(*) AS prompts\n"
        "FROM influence_totals\nGROUP BY ALL\nORDER BY ALL"
    ),
    "Curves": (
        "SELECT ranking, mode, k, avg(m) AS m, count(m) AS prompts\nFROM curves\nGROUP BY ALL\nORDER BY mode, ranking, k"
    ),
    "Who raises a token": (
        "SELECT w.layer, w.neuron, v.text, w.top_logits[list_position(w.top_ids, v.token_id)] AS logit\n"
        "FROM neuron_writes w JOIN vocabulary v ON list_contains(w.top_ids, v.token_id)\n"
        "WHERE NOT v.is_special\nORDER BY logit DESC\nLIMIT 50"
    ),
}
"""Questions that the page SQL offers, by title."""


class Neuron(NamedTuple):
    """A neuron by its layer and its number in it, both from 0."""

    layer: int
    number: int

    @property
    def label(self) -> str:
        """As it is named in addresses and tables: `layer.number`."""
        return f"{self.layer}.{self.number}"


@dataclass(frozen=True)
class View(Selection):
    """What is looked at: a run, a metric of those it has, a prompt (None: all of them), and a neuron (None: none yet)."""

    metrics: tuple[str, ...]
    metric: str | None
    prompt_id: str | None
    neuron: Neuron | None


def neuron_of(text: str | None) -> Neuron | None:
    """The neuron that `layer.number` names; None for what names none."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*[./:, ]\s*(\d{1,9})\s*", text or "", re.ASCII)
    return Neuron(int(found[1]), int(found[2])) if found else None


def metrics(paths: RunPaths) -> tuple[str, ...]:
    """The metrics by which this run has rows, in their order."""
    if "influence_totals" not in queries.tables(paths):
        return ()
    rows = queries.ask(paths, "SELECT metric FROM influence_totals UNION SELECT ranking FROM effects")
    found = set(map(str, rows["metric"]))
    return tuple(m for m in METRICS if m in found)


def prompt_ids(paths: RunPaths) -> list[str]:
    """Every prompt, in the order of the run."""
    if "prompts" not in queries.tables(paths):
        return []
    return list(map(str, queries.ask(paths, "SELECT prompt_id FROM prompts ORDER BY rowid")["prompt_id"]))


def layers(paths: RunPaths) -> list[int]:
    """The layers that have statistics or influence."""
    rows = queries.ask(
        paths, "SELECT DISTINCT layer FROM neurons UNION SELECT DISTINCT layer FROM influence ORDER BY 1"
    )
    return [int(n) for n in rows["layer"]]


def token_texts(paths: RunPaths, token_ids: set[int]) -> dict[int, tuple[str, bool]]:
    """The text of each of these ids and whether it is a special token; ids the run does not know are shown by number."""
    wanted = sorted(token_ids)
    rows = queries.ask(
        paths, "SELECT token_id, text, is_special FROM vocabulary WHERE list_contains(?, token_id)", [wanted]
    )
    known = zip(rows["token_id"], rows["text"], rows["is_special"], strict=True)
    return {n: (f"[{n}]", False) for n in wanted} | {
        int(n): (text if isinstance(text, str) else f"[{n}]", bool(special)) for n, text, special in known
    }


def prompts_of_items(paths: RunPaths, items: Sequence[str | None]) -> pd.DataFrame:
    """prompt_id of each of these keys of items, None where one names no prompt of the run."""
    known = set(prompt_ids(paths))
    return pd.DataFrame({"prompt_id": [item if item in known else None for item in items]}, dtype=object)


def asked_for(view: View, setting: str) -> Any:
    """What a setting of the experiment was in this run; None where the manifest does not say."""
    return own_setting(view.manifest, setting)


def plain_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A dictionary a row, of Python's own numbers and lists, None for what is not known."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's, which JSON does not know
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if value is None or value is pd.NA or value != value else value
