"""Every way of `harness bench` gives the fast path's results, peers included; what is told of them is counted, not guessed."""

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import cli
from harness.commands import bench as command
from harness.errors import SettingsError
from harness.experiments import timing
from harness.experiments.gravity import bench, least
from harness.experiments.gravity.bench import Subject, law_apart
from harness.experiments.timing import Course, Figure, Grounds, Way, disagreements, in_turn, operations
from harness.models import peers
from harness.models.decode import Completion, Sampling
from harness.models.load import shared
from harness.models.patch import Pair, Patched
from harness.models.score import TreeScores
from harness.text.prompts import Prompt
from harness.text.words import Tokens, build_trie, word_forms
from tests import gravity
from tests.gravity import resolve
from tests.tiny import tiny_lm

LM = tiny_lm("tiny-llama")
TEXTS = ("Question: where do stars live? Answer: in", "Question: name a color. Answer:", "The word is")
SUBJECTS = [
    Subject(tuple(LM.codec.encode(text, add_special_tokens=False)), word_forms("at", LM.codec), 7 * n)
    for n, text in enumerate(TEXTS)
]
CONTEXTS = [s.context for s in SUBJECTS]
PROMPT = Prompt("p", "c", "Where do stars live?", "at", None, None, (), "0")


def course(**changes: Any) -> Course:
    return Course(LM, 1.0, **changes)


def all_figures(libraries: list[peers.Library], at: Course) -> list[Figure]:
    with at.counting():
        return [
            *bench.bench_psem(at, SUBJECTS), *bench.bench_samples(at, SUBJECTS, 4, Path("x"), 3),
            *bench.bench_attention(at, SUBJECTS), *bench.bench_mechanism(at, SUBJECTS, libraries),
            *bench.bench_patching(at, [PROMPT], libraries, max_new_tokens=2),
        ]  # fmt: skip


class Wrong:
    """A library that reads one layer too late."""

    name = "wrong"

    def __init__(self, right: peers.Library):
        self.right = right

    def lens(self, asked: Any) -> list[np.ndarray]:
        return [np.roll(p, 1) for p in self.right.lens(asked)]

    def patched(self, pair: Pair, sequences: Any, layers: Any) -> np.ndarray:
        return np.roll(self.right.patched(pair, sequences, layers), 1)


def test_every_way_gives_the_fast_paths_numbers_and_a_wrong_one_is_found() -> None:
    pytest.importorskip("nnsight")
    at = course()
    library = peers.NNsight(LM, at.at_head)
    figures = all_figures([library, Wrong(library)], at)
    assert at.skipped == ["llama-cpp-python is left out (sampling): the model is no GGUF file"]
    told = disagreements(figures, "float32")
    assert [line.split(":")[0] for line in told] == [
        "mechanism, wrong, the lens alone", "patching, P_sem, wrong (4 layers of a prompt timed, scaled)"
    ]  # fmt: skip
    # Half precision rounds as far as that; only laws are held against each other there.
    assert disagreements(figures, "bfloat16") == []
    assert {f.stage for f in figures} == {"psem", "samples", "attention", "mechanism", "patching", "patching, P_sem"}
    assert all(f.tokens > 0 and f.head_rows >= 0 and f.seconds > 0 for f in figures)
    assert {f.way for f in figures if "generate" in f.way or "nnsight" in f.way} == {
        "transformers generate(num_return_sequences=4)", f"{library.name}, the lens alone",
        f"{library.name} (4 layers of a prompt timed, scaled)",
    }  # fmt: skip


def test_tokens_and_head_rows_of_a_peer_are_those_that_went_through_its_modules() -> None:
    """generate copies each context before it forwards it, pads to the longest, and feeds each new token but the last."""
    at = course()
    with at.counting():
        figures = {f.way: f for f in bench.bench_samples(at, SUBJECTS, 4, Path("x"), 3)}
    theirs = figures["transformers generate(num_return_sequences=4)"]
    rows = 4 * len(SUBJECTS)
    most = rows * (max(map(len, CONTEXTS)) + 2)
    assert rows * max(map(len, CONTEXTS)) <= theirs.tokens <= most
    if theirs.new_tokens == 3 * rows:  # nobody stopped
        assert theirs.tokens == most
    assert theirs.head_rows <= 3 * rows
    ours = figures["each distinct text once (4 samples a prompt)"]
    assert ours.tokens < theirs.tokens / 2, "ours forwards each context once, and no padding"


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gpt2", "tiny-neox", "tiny-qwen3"])
def test_the_formula_of_operations_is_what_torch_counts(shape: str) -> None:
    lm = tiny_lm(shape)
    tokens = torch.arange(32).reshape(2, 16)
    model = peers.twin(lm, "sdpa")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    # Norms and biases are parameters that no product reads: a hundredth of a tiny layer, less of a large one.
    assert operations(lm, 32.0, 32) == pytest.approx(products, rel=0.02)
    assert abs(operations(lm, 32.0, 0) / products - 1) > 0.02, "the control: the head counts"


def test_a_twin_shares_the_weights_and_leaves_ours_as_it_was() -> None:
    twin = peers.twin(LM, "sdpa")
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in LM.model.parameters()]
    assert (twin.config._attn_implementation, LM.model.config._attn_implementation) == ("sdpa", "harness")
    mine, theirs = set(LM.model.modules()), set(twin.modules())
    assert not mine & theirs


# Sampling


def first_tokens(sampling: Sampling, num: int) -> np.ndarray:
    made = peers.generate(peers.twin(LM, "sdpa"), CONTEXTS[:1], num, sampling, [], seed=3)
    return np.bincount([t[0] for t in made], minlength=260) / num


@pytest.mark.thorough
def test_generate_draws_first_tokens_by_our_law() -> None:
    """Against the law written out, at a temperature and a nucleus; the control is the law without the nucleus."""
    sampling, num = Sampling(1, 0.8, 0.7), 4_000
    with torch.inference_mode():
        logits = LM.model(input_ids=torch.tensor([CONTEXTS[0]])).logits[0, -1].double()
    whole = (logits / 0.8).softmax(-1)
    values, ids = whole.sort(descending=True)
    kept = values.cumsum(-1) - values < 0.7
    law = torch.zeros_like(whole).index_copy(0, ids[kept], values[kept] / values[kept].sum()).numpy()
    found = first_tokens(sampling, num)
    # The mean distance of a sample of this size from its own law, by the variance of each share.
    expected = float(np.sqrt(2 / np.pi * law * (1 - law) / num).sum())
    assert np.abs(found - law).sum() < 1.5 * expected
    assert found[law == 0].sum() == 0
    assert np.abs(first_tokens(replace(sampling, top_p=1.0), num) - law).sum() > 5 * expected


def test_samples_of_another_law_are_many_standard_errors_apart() -> None:
    def made(seed: int, **changes: float) -> list[Tokens]:
        sampling = replace(Sampling(4, 1.0, 0.9), **changes)
        return peers.generate(peers.twin(LM, "sdpa"), CONTEXTS, 64, sampling, [256], seed)

    most = timing.MOST_APART["standard errors"]
    assert law_apart(LM, CONTEXTS, made(1), made(2)).value < most
    assert law_apart(LM, CONTEXTS, made(1), made(2, temperature=0.6)).value > most
    assert law_apart(LM, CONTEXTS, made(1), made(2, top_p=0.5)).value > most
    assert law_apart(LM, CONTEXTS, made(1), made(1)).value == 0.0


def test_a_peers_sample_ends_with_the_token_that_stops_it() -> None:
    stops = list(range(0, 257, 2))
    made = peers.generate(peers.twin(LM, "sdpa"), CONTEXTS, 8, Sampling(6, 1.0, 1.0), stops, seed=0)
    assert {len(t) for t in made} > {1, 2}
    assert all(token not in stops for t in made for token in t[:-1])
    assert all(t[-1] in stops or len(t) == 6 for t in made)


# Peers that are not there


def test_a_peer_that_is_missing_is_a_line_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnsight", "transformer_lens", "transformer_lens.model_bridge", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    found, missing = peers.libraries(LM, lambda *_: None)
    assert found == []
    assert missing == [
        "nnsight is left out (lens, patching): it is not installed",
        "TransformerLens is left out (lens, patching): it is not installed",
    ]
    at = course()
    bench.bench_samples(at, SUBJECTS[:1], 2, Path("model.gguf"), 2)
    assert at.skipped == ["llama-cpp-python is left out (sampling): it is not installed"]


def test_a_peer_that_fails_on_a_model_is_a_line_and_the_others_are_timed() -> None:
    class Fails(Wrong):
        name = "fails"

        def __init__(self) -> None: ...

        def lens(self, asked: Any) -> list[np.ndarray]:
            raise RuntimeError("no such\nmodule")

    class Ours(Fails):
        """A library that is there on every machine."""

        name = "ours"

        def lens(self, asked: Any) -> list[np.ndarray]:
            probes = [bench.Probe(a.tokens, (len(a.tokens) - 1,), (1,), a.targets, {}) for a in asked]
            return [v.steps[0].p_out for v in bench._views(bench.look_inside(LM, probes))]

    at = course()
    figures = bench.bench_mechanism(at, SUBJECTS, [Fails(), Ours()])
    assert at.skipped == ["fails (the lens) is left out: RuntimeError: no such module"]
    assert [f.way for f in figures][-1] == "ours, the lens alone"
    assert disagreements(figures, "float32") == []


def test_llama_cpp_is_asked_for_our_law_and_stopped_where_ours_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Llama:
        def __init__(self, path: str, **given: Any):
            asked.append({"path": path, **given})

        def generate(self, tokens: list[int], **given: Any) -> Any:
            asked.append({"tokens": tokens, **given})
            yield from (5, 6, 256, 7, 8)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    llama = peers.LlamaCpp(LM, Path("a.gguf"), 50)
    assert llama.sample([(1, 2)], 2, Sampling(10, 0.9, 0.8), [256]) == [(5, 6, 256)] * 2
    assert llama.sample([(1, 2)], 1, Sampling(2, 0.9, 0.8), [256]) == [(5, 6)]
    assert asked[0]["path"] == "a.gguf"
    assert {k: asked[1][k] for k in ("tokens", "temp", "top_p", "top_k", "min_p", "repeat_penalty")} == {
        "tokens": [1, 2], "temp": 0.9, "top_p": 0.8, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0
    }  # fmt: skip


# Timing


def test_ways_take_turns_and_medians_are_told_of_what_was_timed() -> None:
    seconds = iter([0, 2, 10, 13, 20, 27, 30, 34, 40, 43, 50, 51, 60, 66])
    cpu = iter(range(0, 1000, 1))
    done: list[str] = []
    at = course(clock=lambda: float(next(seconds)), cpu_clock=lambda: float(next(cpu)))
    figures = in_turn(at, "stage", [
        Way("fast", lambda: done.append("fast")), Way("slow", lambda: done.append("slow")),
        Way("once", lambda: done.append("once"), once=True, scale=10.0),
    ])  # fmt: skip
    assert done == ["fast", "slow", "fast", "slow", "once", "fast", "slow", "fast", "slow"]
    by_name = {f.way: f for f in figures}
    assert (by_name["once"].seconds, by_name["once"].cpu_seconds) == (70.0, 10.0)
    assert (by_name["fast"].seconds, by_name["slow"].seconds) == (2.0, 3.0)
    assert (by_name["fast"].speedup, by_name["slow"].speedup, by_name["once"].speedup) == (1.0, 1.5, 35.0)
    assert by_name["fast"].apart is None


# The command


def harness(*args: object) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = cli.main([str(a) for a in args])
    return code, out.getvalue()


def test_any_model_can_be_timed_and_the_figures_are_kept(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    code, out = harness("bench", "--model", "random:tiny-qwen2", "--contexts", 1, "--stage", "psem", "--json", told)
    assert code == 0
    assert "random:tiny-qwen2" in out
    found = json.loads(told.read_text())
    assert found["about"]["model"] == "random:tiny-qwen2"
    assert [f["stage"] for f in found["figures"]] == ["psem"] * 3
    fast = found["figures"][0]
    assert fast["tokens"] == found["least_tokens"]
    assert 0 < fast["of_product"] < 1


def test_a_shape_is_taken_before_a_model_from_elsewhere_and_both_as_flags_are_refused() -> None:
    def name(shape: str | None, flags: dict[str, str], environ: dict[str, str]) -> str:
        return command._with_model(resolve(flags, environ=environ), shape).settings.model.name

    assert name(None, {}, {}) == "random:llama-40m"
    assert name("tiny-llama", {}, {"MODEL_PATH": "x/y"}) == "random:tiny-llama"
    assert name(None, {}, {"MODEL_PATH": "x/y"}) == "x/y"
    assert name(None, {"model.name": "demo"}, {}) == "demo"
    with pytest.raises(SettingsError, match="expected one of them"):
        name("tiny-llama", {"model.name": "demo"}, {})


# The least


def test_a_beginning_that_texts_share_is_needed_once() -> None:
    texts = least.Texts()
    texts.add((1, 2, 3))
    texts.add((1, 2, 4, 5))
    assert len(texts) == 5
    texts.add_trie((1, 2), build_trie([(3, 9), (4, 5, 6)]))
    assert len(texts) == 5, "the word's nodes 3, 4 and 4 5 are there already"
    assert texts.holds((1, 2, 4))
    assert not texts.holds((1, 3))


def test_a_patched_row_is_needed_from_its_layer_on() -> None:
    """Four layers; the word has one inner node; each row answers with two tokens, of which one is forwarded."""
    trie = build_trie([(7, 8)])

    def row(layer: int, *made: int) -> Patched:
        nothing = np.empty(0)
        scores = TreeScores(nothing, nothing, 0.0, nothing, nothing)
        return Patched("resid" if layer >= 0 else "", layer, scores, Completion(list(made)))

    need = least.Need(4)
    need.patched((1, 2), trie, row(-1, 5, 6))
    assert need.tokens() == 4, "1, 2, the node 7 and the answer's 5"
    need.patched((1, 2), trie, row(1, 5, 6))
    assert need.tokens() == 4 + 3 * 3 / 4, "last token, node and answer, in three of four layers"
    need.patched((1, 2), trie, row(2, 9, 6))
    assert need.tokens() == 4 + 3 * 3 / 4 + 3 * 2 / 4 + 2 / 4, (
        "nobody untouched says 9: two layers below are needed too"
    )


@pytest.mark.thorough
def test_an_experiment_forwards_no_less_than_the_least_and_small_batches_more(tmp_path: Path) -> None:
    def account(**flags: str) -> least.Account:
        resolved = resolve(
            {"model.name": "random:tiny-llama", "data.limit": "3", "gravity.num_samples": "3", "runtime.device": "cpu",
             "gravity.stages": "psem,greedy,samples,detect,mechanism,patching", **flags}, environ={},
        )  # fmt: skip
        plan = gravity.prepare(resolved)
        at = Course(shared(plan.models.spec, plan.models.identity), 1.0)
        return least.measure(
            Grounds(at, plan.prepared, 1, plan.stages, lambda stages: command._run_aside(plan, resolved, stages))
        )

    # One batch a stage: beginnings are shared within a batch, not between two.
    whole, cut = (account(**{"batching.max_tokens": n}) for n in ("1000000", "64"))
    stages = {s.stage: s for s in whole.stages}
    assert set(stages) == set(least.MEASURING)
    for name in ("psem", "greedy", "samples", "mechanism"):
        assert stages[name].tokens == pytest.approx(stages[name].least), name
    patching = stages["patching"]
    assert patching.least is not None
    assert patching.least <= patching.tokens < 2 * patching.least
    assert whole.least < sum(s.least or 0 for s in whole.stages), "one prefill serves all"
    assert whole.ratio > 1
    assert cut.least == pytest.approx(whole.least), "what is needed does not depend on batches"
    assert cut.tokens > whole.tokens
    assert whole.to_json()["ratio"] == whole.ratio
