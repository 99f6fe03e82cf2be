"""The bundled model and prompts against the truth that was planted in them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from harness.experiments.gravity.conditions import BUILT_IN
from harness.experiments.gravity.stages.psem import measures
from harness.models.load import LM, ModelSpec, load
from harness.models.score import TreeScores, score_trees
from harness.stats import fit_violations
from harness.text.prompts import PromptSet, read_prompts
from harness.text.words import word_forms
from tests.commands import DATA, harness, only_run, query

DEMO = DATA / "models" / "demo"
RELATIONS = {"UsedFor", "MadeOf", "HasProperty", "HasPart", "AtLocation", "CapableOf", "UsedBy", "Requires", "Contains",
             "WornOn"}  # fmt: skip


@pytest.fixture(scope="module")
def bundled() -> PromptSet:
    return read_prompts(DATA / "prompts" / "gravity.jsonl")


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(ModelSpec(str(DEMO)))


@pytest.fixture(scope="module")
def planted() -> dict[str, dict[str, float]]:
    rows = map(json.loads, (DEMO / "planted.jsonl").read_text().splitlines())
    return {row["prompt_id"]: row for row in rows}


# The bundled set


def test_the_bundled_set_is_large_balanced_and_without_a_rejection(bundled: PromptSet) -> None:
    counts = Counter(p.category for p in bundled.prompts)
    assert set(counts) == {"idioms", "facts", "common_sense", "creative", "ood"}
    assert min(counts.values()) >= 200
    assert counts.total() >= 1000
    assert bundled.rejections == ()
    assert {p.style for p in bundled.prompts if p.category == "common_sense"} == RELATIONS


def test_every_bundled_prompt_has_a_planted_probability_and_answers_beside_its_target(
    bundled: PromptSet, planted: dict[str, dict[str, float]]
) -> None:
    assert [p.prompt_id for p in bundled.prompts] == list(planted)
    p0 = np.array([row["baseline"] for row in planted.values()])
    negative = np.array([row["negative"] for row in planted.values()])
    assert negative == pytest.approx(1 / (1 + np.exp(2.40 - 2.27 * p0)), abs=1e-5)  # the published fit
    assert np.histogram(p0, bins=5, range=(0, 1))[0].min() > 150, "every pressure is there"
    assert all(p.alternatives and p.target not in p.alternatives for p in bundled.prompts)


def test_the_demo_model_is_small(lm: LM) -> None:
    assert sum(p.numel() for p in lm.model.parameters()) <= 4_000_000
    files = [f for f in DEMO.iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files if f.suffix == ".safetensors") <= 16_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jsonl", ".md"}, "nothing to unpickle"


# The planted truth


def pressures(lm: LM, prompts: PromptSet, condition: str) -> dict[str, float]:
    """The model's exact p_word of every prompt."""
    found: dict[str, float] = {}
    # Sorted by length, so that a batch wastes little.
    coded = [
        (p, lm.codec.context(BUILT_IN[condition].render(p))[0], word_forms(p.target, lm.codec)) for p in prompts.prompts
    ]
    coded.sort(key=lambda c: len(c[1]))
    for i in range(0, len(coded), 64):
        batch = coded[i : i + 64]
        scores = score_trees(lm, [c for _, c, _ in batch], [f.trie for _, _, f in batch])
        for (prompt, _, forms), score in zip(batch, scores, strict=True):
            assert isinstance(score, TreeScores), score
            found[prompt.prompt_id] = measures(forms, score)["p_word"]
    return found


@pytest.fixture(scope="module")
def p_word(lm: LM, bundled: PromptSet) -> dict[str, float]:
    return pressures(lm, bundled, "baseline")


def test_measured_pressure_is_the_planted_one_over_all_bundled_prompts(
    p_word: dict[str, float], planted: dict[str, dict[str, float]]
) -> None:
    measured = np.array([p_word[i] for i in planted])
    truth = np.array([row["baseline"] for row in planted.values()])
    assert np.corrcoef(measured, truth)[0, 1] >= 0.95
    assert abs((measured - truth).mean()) < 0.05, "nor is it off by a constant"
    shuffled = np.random.default_rng(0).permutation(truth)
    assert abs(np.corrcoef(measured, shuffled)[0, 1]) < 0.15, "the control"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 prompts, 16 samples each under `baseline` and `negative`, from the model's own distribution (T=1, no top-p)."""
    root = tmp_path_factory.mktemp("sampled")
    told = harness("run", "--limit", 120, "--gravity.top_p", 1, "--paths.runs", root, "--stages", "psem,samples,detect")
    assert told.code == 0, told.err
    return only_run(root)


def rates(run: Path, condition: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per prompt: P0 (p_sem under baseline), p_word, violations, samples."""
    rows = query(run, f"""
        SELECT b.p_sem, c.p_word, v.num_violations, v.num_samples FROM psem c
        JOIN psem b USING (prompt_id) JOIN violation v USING (prompt_id)
        WHERE b.condition = 'baseline' AND c.condition = '{condition}' AND v.condition = '{condition}'
        ORDER BY prompt_id""")  # fmt: skip
    p0, p, k, n = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return p0, p, k, n


@pytest.mark.thorough
def test_the_fitted_slope_contains_the_one_that_follows_from_the_models_own_probabilities(sampled: Path) -> None:
    p0, p, k, n = rates(sampled, "negative")
    assert len(p0) == 120
    measured, expected = fit_violations(p0, k, n), fit_violations(p0, p * n, n)
    assert measured is not None
    assert expected is not None
    low, high = measured.slope_interval
    assert low <= expected.slope <= high
    assert 1.5 < expected.slope < 3, "about the published 2.27, as planted"
    assert low > 0
    shuffled = fit_violations(np.random.default_rng(0).permutation(p0), k, n)
    assert shuffled is not None
    assert not shuffled.slope_interval[0] <= expected.slope <= shuffled.slope_interval[1], "the control"


def misfit(p: np.ndarray, k: np.ndarray, n: np.ndarray) -> float:
    """p-value of a chi-square test that each prompt's count is a binomial draw at its own probability."""
    enough = (n * p > 1) & (n * (1 - p) > 1)  # below, the statistic is not chi-square
    p, k, n = p[enough], k[enough], n[enough]
    assert len(p) > 60
    return float(chi2.sf(((k - n * p) ** 2 / (n * p * (1 - p))).sum(), df=len(p)))


@pytest.mark.parametrize("condition", ["baseline", "negative"])
def test_sampled_rates_agree_with_p_word(sampled: Path, condition: str) -> None:
    _, p, k, n = rates(sampled, condition)
    assert misfit(p, k, n) > 0.001
    total = (k.sum() - (n * p).sum()) / np.sqrt((n * p * (1 - p)).sum())
    assert abs(total) < 3.3, "nor are all a little off to one side"
    assert misfit(np.random.default_rng(0).permutation(p), k, n) < 1e-6, "the control"
