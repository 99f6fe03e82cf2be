"""What the pages of neurons ask: rankings, means and agreement by hand, slices of files, and files that are not what they say."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from scipy.stats import rankdata

from app.queries import neurons as shared
from app.queries.neurons import Neuron, View
from app.queries.neurons import heat_map as heat
from app.queries.neurons import neurons as ask
from app.queries.neurons.neurons import EDGES, Filters
from harness.errors import HarnessError
from harness.experiments.neurons.schema import SCHEMA
from harness.run import RunEntry, RunPaths, read_manifest
from harness.store import Store
from tests.app.neurons.conftest import WHOLE

ALL = (0, 99)
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def view_of(
    paths: RunPaths, prompt_id: str | None = None, metric: str | None = "dla", neuron: Neuron | None = None
) -> View:
    return View(RunEntry(paths, read_manifest(paths), None), shared.metrics(paths), metric, prompt_id, neuron)


def store_of(folder: Path, **tables: list[dict[str, Any]]) -> RunPaths:
    """A published run with these rows; every table may be empty."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir()
    paths.manifest.write_text('{"run_id": "x", "fingerprint": "0", "status": "finished", "experiment": "neurons"}')
    with Store(paths.results, SCHEMA) as store:
        for table, rows in tables.items():
            if rows:
                store._insert(table, rows)
        store.publish(paths.live)
    return paths


def influence(prompt_id: str, layer: int, neuron: int, value: float, place: int, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "metric": "dla", "layer": layer, "neuron": neuron, "position": 3, "value": value,
            "share": abs(value) / 10, "place": place, **more}  # fmt: skip


def effect(prompt_id: str, layer: int, neuron: int, predicted: float, measured: float, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "ranking": "dla", "layer": layer, "neuron": neuron, "predicted": predicted,
            "delta_logit": measured, "kind": "zero", **more}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> RunPaths:
    """Two prompts; neuron 0.1 moves both in ways that cancel, 1.0 moves one of them, 1.1 is the loudest and moves nothing."""
    statistics = [(0, 1, 1.0, -0.5, 0.9), (1, 0, 2.0, 4.0, 0.01), (1, 1, 30.0, 0.0, 0.5), (0, 0, 0.5, None, None)]
    return store_of(
        tmp_path,
        neurons=[{"layer": a, "neuron": b, "mean_peak": peak, "max_signed": -peak if b else peak, "z_background": z, "q": q}
                 for a, b, peak, z, q in statistics],
        influence_totals=[{"prompt_id": p, "metric": "dla", "total_abs": 10.0} for p in "ab"],
        influence=[influence("a", 0, 1, 3.0, 1), influence("b", 0, 1, -3.0, 1), influence("a", 1, 0, 2.0, 2)],
        effects=[effect("a", 0, 1, -3.0, -1.0), effect("a", 1, 0, -2.0, 9.0, delta_contrast=-0.5),
                 effect("b", 0, 1, 3.0, 9.0, delta_logp=2.0)],
        targets=[{"prompt_id": "a", "mode": "top1_logit"}, {"prompt_id": "b", "mode": "sequence"}],
    )  # fmt: skip


# -- rankings


def test_influence_is_a_mean_over_all_prompts_and_of_one_where_one_is_chosen(small: RunPaths) -> None:
    rows = ask.ranked(view_of(small), Filters("influence", ALL), 1)
    assert rows[["layer", "neuron", "influence", "size", "share", "num_ranked", "place"]].values.tolist() == [
        [0, 1, 0.0, 3.0, pytest.approx(0.3), 2, 1],
        [1, 0, 1.0, 1.0, pytest.approx(0.1), 1, 2],
    ]
    of_one = ask.ranked(view_of(small, "b"), Filters("influence", ALL), 1)
    assert of_one[["layer", "neuron", "influence", "size"]].values.tolist() == [[0, 1, -3.0, 3.0]]


def test_effects_are_taken_in_the_unit_that_was_ranked_for(small: RunPaths) -> None:
    rows = ask.ranked(view_of(small), Filters("effect", ALL), 1)
    assert rows[["layer", "neuron", "effect", "predicted"]].values.tolist() == [
        [0, 1, 0.5, 0.0],  # −1 as a logit, +2 as the log-probability of a sequence
        [1, 0, -0.5, -2.0],  # a contrast
    ]
    assert ask.effects_of(view_of(small), Neuron(1, 0))["measured"].tolist() == [-0.5]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters("peak", ALL), ["1.1", "1.0", "0.1", "0.0"]),
        (Filters("peak", (0, 0)), ["0.1", "0.0"]),
        (Filters("peak", ALL, max_q=0.05), ["1.0"]),
        (Filters("peak", ALL, sign="negative"), ["1.1", "0.1"]),
        (Filters("background", ALL), ["1.0", "0.1", "1.1"]),
        (Filters("background", ALL, sign="positive"), ["1.0"]),
        (Filters("influence", ALL, sign="positive"), ["1.0"]),
        (Filters("influence", ALL, min_share=0.2), ["0.1"]),
        (Filters("influence", (5, 9)), []),
    ],
)  # fmt: skip
def test_filters_keep_what_they_say(small: RunPaths, filters: Filters, found: list[str]) -> None:
    rows = ask.ranked(view_of(small), filters, 1)
    assert [Neuron(a, b).label for a, b in zip(rows["layer"], rows["neuron"], strict=True)] == found
    assert ask.num_ranked(view_of(small), filters) == len(found)
    assert ask.ranked(view_of(small), filters, 2).empty


def test_pages_of_a_ranking_hold_every_neuron_once(runs: dict[str, RunPaths]) -> None:
    view = view_of(runs["whole"])
    num = ask.num_ranked(view, Filters("peak", ALL))
    pages = [ask.ranked(view, Filters("peak", ALL), n) for n in range(1, 2 + num // ask.PAGE_SIZE)]
    rows = pd.concat(pages)
    assert num == len(rows) == len(rows[["layer", "neuron"]].drop_duplicates()) == WHOLE.num_layers * WHOLE.num_neurons
    assert rows["mean_peak"].is_monotonic_decreasing


def test_loud_neurons_without_influence_are_counted(small: RunPaths) -> None:
    found = ask.loud_and_strong(view_of(small))
    assert (int(found["num"]), int(found["both"])) == (4, 2)
    assert ask.points(view_of(small), Filters("influence", ALL))["neuron"].tolist() == [1, 0]


@pytest.mark.parametrize("by", ask.RANKINGS)
def test_shares_of_a_place_add_up_to_one(runs: dict[str, RunPaths], by: str) -> None:
    for prompt in (None, "p0003"):
        cells = ask.density(view_of(runs["whole"], prompt), by)
        assert cells.groupby("bin")["share"].sum().tolist() == pytest.approx([1.0] * cells["bin"].nunique())
    assert set(cells["bin"]) <= set(range(len(EDGES) + 1))


def test_density_of_influence_counts_places_by_hand(small: RunPaths) -> None:
    cells = ask.density(view_of(small), "influence")
    assert cells[["layer", "bin", "n", "share"]].values.tolist() == [[0, 0, 2, 1.0], [1, 1, 1, 1.0]]
    assert ask.density(view_of(small), "effect")["n"].sum() == 3
    assert ask.rankings(view_of(small)) == ["influence", "effect", "peak", "background"]
    assert ask.rankings(view_of(small, metric=None)) == ["peak", "background"]


# -- one neuron


def test_a_neuron_has_its_examples_with_the_token_in_its_text(runs: dict[str, RunPaths]) -> None:
    view = view_of(runs["whole"])
    found = ask.examples(view, Neuron(1, 3))
    assert found
    assert [abs(e["value"]) for e in found] == sorted((abs(e["value"]) for e in found), reverse=True)
    for e in found:
        told = heat.context(runs["whole"], e["prompt_id"])
        assert told is not None
        assert (tuple(e["offset"]), e["piece"]) == (told.offsets[e["position"]], told.pieces[e["position"]])
    assert ask.neuron(view, Neuron(1, 3)) is not None
    assert ask.neuron(view, Neuron(77, 3)) is None
    assert ask.examples(view, Neuron(77, 3)) == []
    assert (ask.is_known(view, Neuron(1, 3)), ask.is_known(view, Neuron(77, 3))) == (True, False)


def test_write_tokens_come_by_kind_with_their_texts(runs: dict[str, RunPaths]) -> None:
    found = ask.writes(view_of(runs["whole"]), Neuron(0, 1))
    assert found is not None
    assert {kind: len(rows) for kind, rows in found.items()} == {"raised": 15, "lowered": 15, "explicit": 1}
    assert (found["raised"]["logit"] > 0).all()
    assert (found["lowered"]["logit"] < 0).all()
    assert found["raised"]["text"].str.len().min() > 0
    assert ask.writes(view_of(runs["whole"]), Neuron(77, 1)) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("3.77", Neuron(3, 77)), (" 3:77 ", Neuron(3, 77)), ("0/0", Neuron(0, 0)), ("", None), (None, None), ("3", None),
     ("3.", None), ("a.b", None), ("-1.2", None), ("1.2.3", None), ("9" * 30 + ".1", None), ("٣.٤", None)],
)  # fmt: skip
def test_a_neuron_is_named_by_layer_and_number(text: str | None, found: Neuron | None) -> None:
    assert shared.neuron_of(text) == found


# -- agreement and curves


def test_agreement_of_one_prompt_is_what_scipy_says(runs: dict[str, RunPaths]) -> None:
    view = view_of(runs["whole"], "p0004")
    rows = ask.agreement(view).set_index(["ranking", "measure"])["value"]
    for metric in shared.metrics(runs["whole"]):
        pairs = ask.effects(view_of(runs["whole"], "p0004", metric))
        assert len(pairs) == WHOLE.effects
        predicted, measured = pairs["predicted"].to_numpy(float), pairs["measured"].to_numpy(float)
        assert rows[metric, "spearman"] == pytest.approx(np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1])
        assert rows[metric, "pearson"] == pytest.approx(np.corrcoef(predicted, measured)[0, 1])
        assert rows[metric, "sign"] == pytest.approx(float((predicted * measured > 0).mean()))
        assert rows[metric, "slope"] == pytest.approx(float(predicted @ measured / (predicted @ predicted)))


def test_agreement_of_ties_and_of_what_cannot_be_correlated(tmp_path: Path) -> None:
    rows = [effect("a", 0, n, p, m) for n, (p, m) in enumerate([(1, 1), (1, 2), (2, 2), (3, 0)])]
    flat = [effect("b", 0, n, 1.0, float(n)) for n in range(4)]
    paths = store_of(tmp_path, effects=[*rows, *flat, effect("c", 0, 1, 1.0, 1.0)])
    found = ask.agreement(view_of(paths)).set_index("measure")
    assert found.loc["spearman", "value"] == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [2, 3.5, 3.5, 1])[0, 1])
    assert found.loc["spearman", "n"] == 1, "claims that are all the same have no correlation, nor has one neuron"
    assert found["low"].isna().all()


def test_agreement_of_the_run_is_the_analysis_own_with_intervals(runs: dict[str, RunPaths]) -> None:
    rows = ask.agreement(view_of(runs["whole"]))
    assert rows[["low", "high"]].notna().all(axis=None)
    assert ask.agreement(view_of(runs["peaks"])).empty


def test_curves_are_means_over_prompts_or_one_prompts_own(runs: dict[str, RunPaths]) -> None:
    every, one = ask.curves(view_of(runs["whole"])), ask.curves(view_of(runs["whole"], "p0002"))
    assert set(every["n"]) == {WHOLE.num_prompts}
    assert set(one["n"]) == {1}
    assert set(every["ranking"]) == {"dla", "act_grad", "ig", "relp", *shared.CONTROLS}
    ends = every[every["k"] == 0].set_index(["ranking", "mode"])["m"]
    assert ends["dla", "keep"] == pytest.approx(0.0)
    assert ends["dla", "drop"] == pytest.approx(1.0)


def test_empty_tables_are_no_rows_and_no_error(tmp_path: Path) -> None:
    view = view_of(store_of(tmp_path), metric=None)
    assert ask.rankings(view) == []
    assert shared.layers(view.paths) == shared.prompt_ids(view.paths) == []
    assert shared.metrics(view.paths) == ()
    for rows in (
        ask.effects(view),
        ask.agreement(view),
        ask.curves(view),
        ask.areas(view.paths),
        ask.num_effects(view),
    ):
        assert rows.empty
    assert ask.num_ranked(view, Filters("influence", ALL)) == 0
    assert heat.context(view.paths, "p") is None
    assert heat.candidates(view, "p").empty


# -- files


@pytest.mark.parametrize("run", ["whole", "bfloat16"])
def test_values_are_those_of_the_file_at_every_token(runs: dict[str, RunPaths], run: str) -> None:
    told = heat.context(runs[run], "p0003")
    assert told is not None
    found = heat.values(runs[run], told, [Neuron(1, 5), Neuron(0, 2), Neuron(99, 0), Neuron(0, 99_999)])
    assert (found[Neuron(99, 0)], found[Neuron(0, 99_999)]) == (None, None)
    row = shared.queries.ask(runs[run], "SELECT * FROM neuron_rows WHERE prompt_id = 'p0003'").iloc[0]
    if run == "whole":  # numpy has no bfloat16
        stored = load_file(runs[run].artifacts / row["path"])["a.1"][row["row_start"] : row["row_end"], 5]
        assert found[Neuron(1, 5)] == pytest.approx(stored.astype(np.float32))
    peaks = heat.known_peaks(runs[run], told, [Neuron(1, 5)])[Neuron(1, 5)]
    whole = found[Neuron(1, 5)]
    assert peaks is not None
    assert whole is not None
    known = np.isfinite(peaks)
    assert whole[known] == pytest.approx(peaks[known], rel=5e-3), "rounded to the dtype of the dump"


def _copied(paths: RunPaths, folder: Path) -> RunPaths:
    shutil.copytree(paths.folder, folder / paths.run_id)
    return RunPaths(folder / paths.run_id)


def _break(paths: RunPaths, how: str) -> None:
    file = next((paths.artifacts / "dump").iterdir())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "no tensors":
        file.write_bytes(b"\xff" * 4096)
    elif how == "a link":
        aside = paths.folder / "aside"
        file.rename(aside)
        file.symlink_to(aside)


@pytest.mark.parametrize("how", ["missing", "cut", "no tensors", "a link"])
def test_a_file_that_is_not_what_it_should_be_is_told_in_one_line(
    runs: dict[str, RunPaths], tmp_path: Path, how: str
) -> None:
    paths = _copied(runs["whole"], tmp_path)
    told = heat.context(paths, "p0003")
    assert told is not None
    assert heat.values(paths, told, [Neuron(0, 0)])[Neuron(0, 0)] is not None, (
        "control: it is read as long as it is whole"
    )
    _break(paths, how)
    with pytest.raises(HarnessError) as caught:
        heat.values(paths, told, [Neuron(2, 31)])
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_fit_the_tokens_and_files_outside_are_refused(
    tmp_path: Path, runs: dict[str, RunPaths]
) -> None:
    source = next((runs["whole"].artifacts / "dump").iterdir())
    context = {"prompt_id": "a", "condition": "neurons", "text": "ab", "token_ids": [1, 2], "pieces": ["a", "b"],
               "offsets": [[0, 1], [1, 2]], "positions": [0, 1], "is_counted": [True, True]}  # fmt: skip
    cases = {"rows": ("dump/x.safetensors", 3), "outside": ("../x.safetensors", 2), "unlisted": ("dump/other", 2)}
    for name, (path, end) in cases.items():
        (tmp_path / name).mkdir()
        listed = [] if name == "unlisted" else [{"path": path, "kind": "dump", "stage": "dump", "sha256": "0", "bytes": 1,
                                                "shape": [1], "dtype": "float16", "batch_id": 0}]  # fmt: skip
        paths = store_of(
            tmp_path / name,
            contexts=[context],
            neuron_rows=[{"prompt_id": "a", "path": path, "row_start": 0, "row_end": end, "dtype": "float16"}],
            artifacts=listed,
        )
        (paths.artifacts / "dump").mkdir(parents=True)
        shutil.copyfile(source, paths.artifacts / "dump" / "x.safetensors")
        shutil.copyfile(source, paths.folder / "x.safetensors")
        told = heat.context(paths, "a")
        assert told is not None
        with pytest.raises(HarnessError):
            heat.values(paths, told, [Neuron(0, 0)])


def test_only_dumped_positions_have_values(tmp_path: Path, runs: dict[str, RunPaths]) -> None:
    source = next((runs["whole"].artifacts / "dump").iterdir())
    context = {"prompt_id": "a", "condition": "neurons", "text": "abc", "token_ids": [1, 2, 3], "pieces": list("abc"),
               "offsets": [[0, 1], [1, 2], [2, 3]], "positions": [0, 2], "is_counted": [True, True, True]}  # fmt: skip
    told = {"kind": "dump", "stage": "dump", "sha256": "0", "bytes": 1, "shape": [1], "dtype": "float16", "batch_id": 0}
    paths = store_of(
        tmp_path,
        contexts=[context],
        neuron_rows=[{"prompt_id": "a", "path": "dump/x", "row_start": 1, "row_end": 3, "dtype": "float16"}],
        artifacts=[{"path": "dump/x", **told}],
    )
    (paths.artifacts / "dump").mkdir(parents=True)
    shutil.copyfile(source, paths.artifacts / "dump" / "x")
    read = heat.context(paths, "a")
    assert read is not None
    found = heat.values(paths, read, [Neuron(0, 4)])[Neuron(0, 4)]
    stored = load_file(source)["a.0"][:, 4]
    assert found is not None
    assert np.isnan(found).tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == pytest.approx(stored[1:3].astype(float).tolist())


def test_candidates_are_the_prompts_ranking_or_the_loudest(runs: dict[str, RunPaths]) -> None:
    rows = heat.candidates(view_of(runs["whole"]), "p0001")
    assert rows["place"].tolist() == list(range(1, heat.NUM_CANDIDATES + 1))
    loud = heat.candidates(view_of(runs["peaks"], metric=None), "p0001")
    assert loud["mean_peak"].is_monotonic_decreasing
    assert loud["value"].isna().all()
