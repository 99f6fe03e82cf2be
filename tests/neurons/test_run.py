"""Whole runs over the command line: tables, files, kill and resume, and the laws that a run can show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from harness.models import plain_neurons as plain
from harness.models.load import ModelSpec, load
from harness.store import Batch, Store
from tests.cases import some_of
from tests.commands import harness, manifest, only_run, query
from tests.neurons.runs import TEXTS, given_in, prompts_in, run
from tests.tiny import FAMILIES

ORDER = {
    "contexts": "1", "neuron_rows": "1", "neurons": "1, 2", "targets": "1", "influence": "1, 2, 3, 4",
    "influence_totals": "1, 2", "effects": "1, 2, 3, 4", "curves": "1, 2, 3, 4", "neuron_writes": "1, 2",
    "statistics": "1, 2, 3",
}  # fmt: skip
FILES = "SELECT path, sha256 FROM artifacts ORDER BY path"


def rows(folder: Path, table: str, columns: str = "*") -> list[tuple]:
    return query(folder, f"SELECT {columns} FROM {table} ORDER BY {ORDER[table]}")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return given_in(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    root = tmp_path_factory.mktemp("whole")
    told = run(root, given)
    assert told.code == 0, told.err
    assert "Certificate: all 6 measurements agree" in told.out
    return only_run(root)


def dumped(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """Every prompt's rows by layer, from the files."""
    found = {}
    for prompt_id, path, start, end in query(folder, "SELECT prompt_id, path, row_start, row_end FROM neuron_rows"):
        with safe_open(folder / "artifacts" / path, "numpy") as tensors:
            names = list(tensors.keys())
            found[prompt_id] = {int(n.split(".")[1]): tensors.get_slice(n)[start:end] for n in names}
    return found


# ---- tables and files --------------------------------------------------------------------------------------------


def test_every_table_has_its_rows(whole: Path) -> None:
    num, layers, size = len(TEXTS), 4, 128
    counted = {
        "prompts": num, "contexts": num, "neuron_rows": num, "neurons": layers * size, "targets": num,
        "influence_totals": 4 * num, "effects": 5 * 4 * num, "curves": num * 7 * 2 * (3 + 2), "left_out": 0,
    }  # fmt: skip
    for table, number in counted.items():
        assert query(whole, f"SELECT count(*) FROM {table}") == [(number,)], table
    (at_least,) = query(whole, "SELECT min(n) FROM (SELECT count(*) AS n FROM influence GROUP BY prompt_id, metric)")[0]
    assert at_least >= 5
    assert query(whole, "SELECT count(*) FROM neuron_writes")[0][0] > 0
    assert {a for (a,) in query(whole, "SELECT DISTINCT analysis FROM statistics")} == {
        "agreement", "curves", "background", "influence",
    }  # fmt: skip


@pytest.mark.parametrize("family", some_of(FAMILIES, ("tiny-gemma2", "tiny-gpt2", "tiny-neox")))
def test_dumped_rows_are_those_of_a_plain_forward(family: str, tmp_path: Path) -> None:
    """Law 1. The control is another text's rows."""
    given = given_in(tmp_path, family)
    assert run(tmp_path / "runs", given, "--stages", "dump", "--batching.max_tokens", 60).code == 0
    folder = only_run(tmp_path / "runs")
    lm, found = load(ModelSpec(str(given["model.name"]))), dumped(folder)
    for prompt_id, tokens in query(folder, "SELECT prompt_id, token_ids FROM contexts"):
        want = plain.activations(lm, tokens)
        for layer, got in found[prompt_id].items():
            assert np.abs(got - want[layer]).max() <= 2e-5 * np.abs(want).max()
    one, other = found["p0"][1], found["p3"][1]
    assert np.abs(one[:13] - other[:13]).max() > 1e-3


def test_statistics_are_those_of_plain_forwards(tmp_path: Path) -> None:
    """Law 2 up to the rounding of norms (to 1e-12 on the same rows: test_packs). Control: counting the skipped token."""
    given = given_in(tmp_path, **{"model.dtype": "float64", "neurons.pack": 2, "neurons.background": "off"})
    found = {}
    for skip in (1, 0):
        root = tmp_path / f"runs{skip}"
        assert run(root, {**given, "neurons.skip_first": skip}, "--stages", "dump,peaks").code == 0
        found[skip] = only_run(root)
    lm = load(ModelSpec(str(given["model.name"]), dtype="float64"))
    contexts = query(found[1], "SELECT prompt_id, token_ids, is_counted FROM contexts ORDER BY 1")
    whole = {p: plain.activations(lm, t)[:, np.flatnonzero(c)] for p, t, c in contexts}
    columns = "layer, neuron, mean, sd, mean_peak, sd_peak, max_peak, min_peak, share_active, kurtosis, examples"
    kept = rows(found[1], "neurons", columns)
    for layer in range(4):
        a = np.concatenate([w[layer] for w in whole.values()])
        peaks = np.stack([np.abs(w[layer]).max(0) for w in whole.values()])
        left = a - a.mean(0)
        kurtosis = (left**4).mean(0) / (left**2).mean(0) ** 2
        want = [
            a.mean(0), a.std(0), peaks.mean(0), peaks.std(0), peaks.max(0), peaks.min(0), (a > 0).mean(0), kurtosis,
        ]  # fmt: skip
        got = [r for r in kept if r[0] == layer]
        for k, values in enumerate(want, 2):
            # Norms run in float32 in either case, and in other company sum in another order.
            assert np.allclose([r[k] for r in got], values, rtol=1e-5, atol=1e-6 * np.abs(a).max()), (layer, k)
        for neuron in (0, 63):
            order = np.argsort(-peaks[:, neuron], kind="stable")[:3]
            assert [e["prompt_id"] for e in got[neuron][10]] == [contexts[n][0] for n in order]
    assert rows(found[0], "neurons", columns) != kept, "the control"


@pytest.mark.parametrize("size", [1, 4, 256])
def test_the_size_of_packs_decides_nothing(size: int, given: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, {**given, "neurons.pack": size, "batching.max_tokens": 50}, "--stages", "peaks").code == 0
    folder = only_run(tmp_path)
    exact = (
        "layer, neuron, num_prompts, num_tokens, peak_token_mode, peak_token_share, num_peak_tokens, next_token_mode"
    )
    assert rows(folder, "neurons", exact) == rows(whole, "neurons", exact)
    near = "mean, sd, mean_peak, sd_peak, kurtosis, z_background"
    for one, other in zip(rows(folder, "neurons", near), rows(whole, "neurons", near), strict=True):
        assert np.allclose(
            np.array(one, dtype=float), np.array(other, dtype=float), rtol=1e-3, atol=1e-5, equal_nan=True
        )


def test_peak_tokens_are_those_at_which_a_neuron_peaks(whole: Path) -> None:
    rows_of, tokens = dumped(whole), dict(query(whole, "SELECT prompt_id, token_ids FROM contexts"))
    for layer, neuron, mode, share, distinct in query(
        whole, "SELECT layer, neuron, peak_token_mode, peak_token_share, num_peak_tokens FROM neurons WHERE neuron < 9"
    ):
        at = [tokens[p][1 + int(np.abs(r[layer][1:, neuron]).argmax())] for p, r in rows_of.items()]
        counts = {t: at.count(t) for t in at}
        assert distinct == len(counts)
        assert share == pytest.approx(max(counts.values()) / len(at))
        assert mode == min(t for t, n in counts.items() if n == max(counts.values()))


# ---- what is measured --------------------------------------------------------------------------------------------


def test_curves_are_whole_at_their_ends_and_ranked_rows_are_in_order(whole: Path) -> None:
    """Law 6's ends: m(0) = 0, m(all) = 1."""
    ends = query(whole, "SELECT DISTINCT k, mode, m FROM curves WHERE k IN (0, 512) ORDER BY ALL")
    assert ends == [(0, "drop", 1.0), (0, "keep", 0.0), (512, "drop", 0.0), (512, "keep", 1.0)]
    assert {r for (r,) in query(whole, "SELECT DISTINCT ranking FROM curves")} == {
        "dla", "act_grad", "ig", "relp", "random", "matched", "loudest",
    }  # fmt: skip
    disorder = query(
        whole,
        "SELECT count(*) FROM (SELECT abs(value) AS v, lag(abs(value)) OVER (PARTITION BY prompt_id, metric ORDER BY place) "
        "AS before FROM influence) WHERE v > before",
    )
    assert disorder == [(0,)]


def test_the_cumulative_set_is_the_shortest_that_holds_the_share(given: dict[str, Any], tmp_path: Path) -> None:
    for share, name in ((0.5, "half"), (1, "all"), (0, "off")):
        root = tmp_path / name
        more = {"neurons.cumulative": share, "neurons.metrics": "dla", "neurons.max_selected": 300}
        assert run(root, {**given, **more}, "--stages", "influence").code == 0
    half, every, off = (only_run(tmp_path / n) for n in ("half", "all", "off"))
    for (prompt_id,) in query(half, "SELECT prompt_id FROM prompts"):
        own = query(half, f"SELECT share, selected FROM influence WHERE prompt_id = '{prompt_id}' ORDER BY place")
        held = np.cumsum([s for s, _ in own])
        number = int((held < 0.5).sum()) + 1
        assert [s for _, s in own] == [n < number for n in range(len(own))]
    assert query(every, "SELECT DISTINCT num_selected, is_cut FROM influence_totals") == [(300, True)]
    assert query(off, "SELECT DISTINCT num_selected, is_cut FROM influence_totals") == [(0, False)]


@pytest.mark.parametrize(
    "more",
    [
        {"neurons.ablate": "zero"},
        {"neurons.ablate": "resample", "neurons.context": "upto"},
        {"neurons.effect": "flip"},
        {"neurons.effect": "add", "neurons.strength": 2},
        {"neurons.effect": "swap", "neurons.strength": 0.5, "neurons.target": "last_token"},
        {"neurons.target": "next_token", "neurons.token": "e", "neurons.contrast": "a", "neurons.context": "upto"},
        {"neurons.target": "sequence", "neurons.token": "eva", "neurons.ig_baseline": "mean"},
        {"neurons.target_pos": 1, "neurons.layers": "1,3"},
    ],
    ids=str,
)
def test_every_way_of_asking_is_answered_and_certified(
    more: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    told = run(tmp_path, {**given, **more})
    assert told.code == 0, told.err
    folder = only_run(tmp_path)
    kind = more.get("neurons.effect", more.get("neurons.ablate", "mean"))
    assert query(folder, "SELECT DISTINCT kind FROM effects") == [(kind,)]
    assert query(folder, "SELECT count(*) FROM effects WHERE delta_logit IS NULL OR predicted IS NULL") == [(0,)]
    if "neurons.layers" in more:
        for table in ("neurons", "influence", "effects"):
            assert {n for (n,) in query(folder, f"SELECT DISTINCT layer FROM {table}")} <= {1, 3}, table
    has_contrast = "neurons.contrast" in more
    assert query(folder, "SELECT DISTINCT delta_contrast IS NOT NULL FROM effects") == [(has_contrast,)]


def test_what_is_predicted_of_a_small_change_is_what_happens(given: dict[str, Any], tmp_path: Path) -> None:
    """act_grad is the slope: of a small step it foretells the effect, of ablation only roughly (the control)."""
    found = {}
    for name, more in (
        ("small", {"neurons.effect": "add", "neurons.strength": 0.02}),
        ("large", {"neurons.ablate": "zero"}),
    ):
        assert run(tmp_path / name, {**given, **more, "neurons.metrics": "act_grad"}, "--stages", "effects").code == 0
        rows_of = query(only_run(tmp_path / name), "SELECT predicted, delta_logit FROM effects")
        predicted, measured = np.array(rows_of).T
        found[name] = float(np.abs(predicted - measured).max() / np.abs(measured).max())
    assert found["small"] < 0.05 < found["large"]


def test_prompts_name_their_own_targets(given: dict[str, Any], tmp_path: Path) -> None:
    path = prompts_in(
        tmp_path,
        [{"probe_id": "a", "text": "The sky", "target": "x"}, {"probe_id": "b", "text": "Who ", "contrast": "y"},
         {"probe_id": "c", "text": "The sky", "target": "z"}],
    )  # fmt: skip
    more = {"data.prompts": path, "neurons.target": "next_token", "neurons.token": "q"}
    assert run(tmp_path / "runs", {**given, **more}, "--stages", "targets").code == 0
    found = query(
        only_run(tmp_path / "runs"), "SELECT prompt_id, token_ids, contrast_ids, position FROM targets ORDER BY 1"
    )
    byte = {c: [ord(c) - 33] for c in "xqyz"}
    assert [f[0] for f in found] == ["a", "b", "c"]
    assert [f[1] for f in found] == [byte["x"], byte["q"], byte["z"]]
    assert found[1][2] == byte["y"]
    assert found[1][3] == 3, "a space at the end is a token"


# ---- law 7: the background ---------------------------------------------------------------------------------------


def test_neurons_of_prompts_drawn_from_the_background_are_not_beyond_it() -> None:
    """Law 7: share of q < .05 at most .05 in 95 of 100 seeds. Control: peaks that are moved are found."""
    import torch
    from scipy.special import ndtr

    from harness.experiments.neurons.packs import Moments
    from harness.experiments.neurons.stages.peaks import z_of
    from harness.stats import benjamini_hochberg

    good, found = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        # Peaks are skewed: of a log-normal distribution, another for every neuron.
        spread = rng.uniform(0.2, 1.0, 400)
        peaks = np.exp(spread * rng.standard_normal((500, 400)))
        own, background = (Moments.of(torch.from_numpy(x)) for x in (peaks[:200], peaks[200:]))
        moved = Moments.of(torch.from_numpy(peaks[:200] * np.where(np.arange(400) < 100, 1.5, 1.0)))
        q, other = (benjamini_hochberg(2 * ndtr(-np.abs(z_of(x, background)))) for x in (own, moved))
        good += (q < 0.05).mean() <= 0.05
        found += (other[:100] < 0.05).mean() > 0.8
    assert good >= 95
    assert found >= 95


# ---- kill and resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage", some_of(["dump", "partials", "background", "peaks", "influence", "effects", "writes"], 3)
)
def test_a_run_killed_at_any_stage_and_resumed_has_the_same_rows_and_files(
    stage: str, given: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cache of its own: what an earlier run knows of the background is not to hide what this one does.
    mine = {**given, "paths.cache": tmp_path / "cache"}
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", _killed_after(Store.commit, stage))
        with pytest.raises(_Killed):
            run(tmp_path / "runs", mine)
    assert manifest(only_run(tmp_path / "runs"))["status"] != "finished"
    told = run(tmp_path / "runs", mine)
    assert told.code == 0, told.err
    folder = only_run(tmp_path / "runs")
    for table in ORDER:
        assert rows(folder, table) == rows(whole, table), table
    assert query(folder, FILES) == query(whole, FILES)
    assert harness("verify", folder.name, "--batches", 0, "--paths.runs", folder.parent).code == 0


class _Killed(BaseException):
    """Stands for SIGKILL."""


def _killed_after(commit: Callable[..., Any], stage: str) -> Callable[..., Any]:
    def killed(self: Store, batch: Batch, *args: Any) -> None:
        commit(self, batch, *args)
        if batch.stage == stage:
            raise _Killed

    return killed


def test_the_background_is_computed_once_for_all_runs_of_a_model(
    given: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    told = run(tmp_path, given, "--stages", "background")
    assert "is known from an earlier run" in told.err
    folder = only_run(tmp_path)
    mine = dict(query(folder, FILES))
    assert mine.items() <= dict(query(whole, FILES)).items()
    kept = next((given["paths.cache"] / "neurons").glob("*.safetensors"))
    kept.write_bytes(b"damaged")
    told = run(tmp_path / "again", given, "--stages", "background")
    assert told.code == 0
    assert dict(query(only_run(tmp_path / "again"), FILES)) == mine, "what is damaged is made again"


def test_a_run_is_verified_exported_and_shown(whole: Path, tmp_path: Path) -> None:
    assert harness("verify", whole.name, "--paths.runs", whole.parent).code == 0
    told = harness("export", whole.name, "--paths.runs", whole.parent, "--to", tmp_path / "out", "--format", "jsonl")
    assert told.code == 0, told.err
    names = {p.name.split(".")[0] for p in (tmp_path / "out").rglob("*.jsonl")}
    assert {"neurons_aggregated", "top_neurons", "influence"} <= names
    told = harness("show", whole.name, "--paths.runs", whole.parent)
    assert told.code == 0
    assert "Rankings against what was measured" in told.out
