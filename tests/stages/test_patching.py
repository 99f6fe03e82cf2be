"""The stage `patching`: which prompts and tokens are patched, and that its rows agree with other stages and references."""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.engine import AnyStage
from harness.engine.executors import Item, ItemResult
from harness.experiments.gravity.settings import PatchingSettings
from harness.experiments.gravity.stages.patching import Patching, added, align, cannot, choose, shared_span, threshold
from harness.models import plain
from harness.models.load import LM
from harness.models.patch import PATCHES, Move, Pair, Patched, sweep
from harness.store import Row
from harness.text.detect import answer_of, detect, find_word
from harness.tolerance import TOLERANCE
from tests.fakes import events_of, rows_of, run_stages
from tests.models.test_patch import reference
from tests.stages.test_mechanism import stage_named, stages_of, tables_of

OF_PROBS = TOLERANCE["float32"].prob

# ---- which prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p0", "want"),
    [
        ([0.1, 0.5, 0.8, 0.9, 1.0], 0.9),  # the third quartile itself
        ([0.1, 0.2, 0.3, 0.4, 0.9], 0.7),  # .4, raised to .7
        ([0.9, 0.99, 0.99, 0.99, 1.0], 0.95),  # .99, lowered to .95
        ([0.1, 0.2, 0.3, 0.4, 0.6], 0.3),  # .4, raised to .7, which nobody reaches: the median
        ([0.1, 0.2, 0.3, 0.4, 0.7], 0.7),  # which one just reaches
        ([0.2, 0.9], 0.725),  # between the two
        ([0.05], 0.05),
        ([0.97], 0.95),
    ],
)
def test_the_threshold_is_the_third_quartile_within_its_bounds_or_the_median(p0: list[float], want: float) -> None:
    assert threshold(p0, None) == pytest.approx(want)
    assert threshold(p0[::-1], None) == pytest.approx(want)
    assert any(p >= threshold(p0, None) for p in p0), "never empty"
    assert threshold(p0, 0.31) == 0.31, "a given one is taken as it is"


def chosen(
    p0: Mapping[str, float], failures: str, order: int = 0, seed: int = 0, missing: str = "", **rules: Any
) -> list[str]:
    """Prompts of one letter each; `failures` broke the ban, those of `missing` have no answer."""
    suppression = [{"prompt_id": i, "condition": c, "p0": p if c == "negative" else 1.0}
                   for i, p in p0.items() for c in ("reframe", "negative")]  # fmt: skip
    outcomes = [{"prompt_id": i, "condition": c, "outcome": "failure" if (i in failures) == (c == "negative") else "success"}
                for i in p0 if i not in missing for c in ("negative", "reframe")]  # fmt: skip
    random.Random(order).shuffle(suppression)
    random.Random(-order).shuffle(outcomes)
    return choose(suppression, outcomes, PatchingSettings(**rules), seed)


HIGH = dict.fromkeys("abcdefgh", 0.8)


def test_all_successes_are_taken_and_as_many_failures() -> None:
    ids = chosen({**HIGH, "x": 0.1}, failures="abcdex")
    assert set(ids[:3]) == set("fgh"), "successes first"
    assert len(ids) == 6
    assert set(ids[3:]) < set("abcde"), "and not x, whose pressure is low"
    assert set(chosen(HIGH, failures="a")) == set(HIGH), "a single failure, and every success"


def test_an_empty_side_leaves_the_other_whole() -> None:
    assert set(chosen(HIGH, failures="")) == set(HIGH)
    assert set(chosen(HIGH, failures="abcdefgh")) == set(HIGH)
    assert len(chosen(HIGH, failures="abcdefgh", max_prompts=3)) == 3
    assert choose([], [], PatchingSettings(), 0) == []
    assert chosen(HIGH, failures="", condition="ban") == []


def test_the_median_is_tried_where_the_third_quartile_within_its_bounds_has_nobody() -> None:
    low = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5}
    assert set(chosen(low, failures="")) == {"c", "d", "e"}
    assert set(chosen(low, failures="d")) == {"c", "d", "e"}
    assert len(chosen(low, failures="cd")) == 2, "one success, so one of the two failures"


def test_a_given_threshold_is_kept_to_even_where_it_leaves_nobody() -> None:
    assert set(chosen({"a": 0.1, "b": 0.5, "c": 0.9}, failures="", min_p0=0.5)) == {"b", "c"}
    assert chosen({"a": 0.1, "b": 0.5}, failures="", min_p0=0.6) == []
    assert set(chosen({"a": 0.0, "b": 0.5}, failures="", min_p0=0.0)) == {"a", "b"}


def test_either_side_is_cut_at_the_most_that_is_asked_for() -> None:
    ids = chosen(HIGH, failures="abcd", max_prompts=2)
    assert (sum(i in "abcd" for i in ids), sum(i in "efgh" for i in ids)) == (2, 2)
    ids = chosen(HIGH, failures="abcdefg", max_prompts=5)
    assert (sum(i in "abcdefg" for i in ids), "h" in ids) == (1, True), "never more failures than successes"


def test_prompts_without_a_known_answer_are_passed_over_and_do_not_count_in_the_threshold() -> None:
    p0 = {"a": 0.75, "b": 0.75, "c": 0.75, "d": 1.0, "e": 1.0, "f": 1.0}
    assert set(chosen(p0, failures="", missing="def")) == {"a", "b", "c"}
    assert set(chosen(p0, failures="")) == {"d", "e", "f"}, "control"


def test_the_choice_follows_from_the_seed_and_not_from_the_order_of_rows() -> None:
    want = chosen(HIGH, failures="abcdef", max_prompts=2)
    assert all(chosen(HIGH, failures="abcdef", max_prompts=2, order=n) == want for n in range(6))
    assert len({tuple(chosen(HIGH, failures="abcdef", max_prompts=2, seed=n)) for n in range(8)}) > 3


# ---- which tokens ---------------------------------------------------------------------------------------------


def test_what_is_added_is_between_the_common_beginning_and_the_common_end() -> None:
    old = (9, 1, 2, 3, 9)  # the span is 1 2 3
    assert added(old, (1, 4), (9, 1, 2, 3, 7, 8, 9), (1, 6)) == (4, 6)  # behind
    assert added(old, (1, 4), (9, 7, 8, 1, 2, 3, 9), (1, 6)) == (1, 3)  # before
    assert added(old, (1, 4), (9, 1, 7, 8, 2, 3, 9), (1, 6)) == (2, 4)  # amid
    assert added(old, (1, 4), (9, 1, 7, 3, 9), (1, 4)) == (2, 3)  # in the place of one
    assert added(old, (1, 4), (9, 1, 2, 55, 7, 9), (1, 5)) == (3, 5)  # the edge 3 was joined with what follows
    assert added(old, (1, 4), (5, 6, 7, 9), (0, 3)) == (0, 3)  # another text
    # A repeated token is not counted from both ends.
    assert added((3, 1, 1, 9), (0, 3), (3, 1, 1, 1, 9), (0, 4)) == (3, 4)
    assert added((1, 1, 9), (0, 2), (1, 1, 1, 9), (0, 3)) == (2, 3)


def test_nothing_is_added_where_nothing_is_or_where_there_is_no_instruction() -> None:
    assert added((9, 1, 2, 9), (1, 3), (9, 1, 2, 9), (1, 3)) is None
    assert added((9, 1, 2, 9), (1, 3), (9, 1, 9), (1, 2)) is None  # something was taken away
    assert added((9, 1, 2, 9), (1, 3), (9, 9), None) is None
    assert added((9, 9), None, (9, 1, 2, 9), (1, 3)) == (1, 3)  # all of it is new


def test_a_shared_span_is_the_longest_run_that_both_have() -> None:
    assert shared_span((9, 1, 2, 3, 9), (1, 4), (8, 8, 1, 2, 3, 9), (2, 5)) == Move(1, 2, 3)
    # Edges that a tokenizer joined with a neighbour: 1 is 51 in one text, 3 is 53 in the other.
    assert shared_span((9, 1, 2, 4, 3), (1, 5), (8, 51, 2, 4, 3), (1, 5)) == Move(2, 2, 3)
    assert shared_span((9, 1, 2, 4, 53), (1, 5), (8, 8, 1, 2, 4, 3), (2, 6)) == Move(1, 2, 3)
    assert shared_span((1, 2, 7, 3, 4, 5), (0, 6), (1, 2, 8, 3, 4, 5), (0, 6)) == Move(3, 3, 3)
    assert shared_span((1, 2), (0, 2), (3, 4), (0, 2)) is None
    assert shared_span((1, 2), None, (1, 2), (0, 2)) is None
    assert shared_span((1, 2), (0, 2), (1, 2), None) is None
    # Only what is in the spans counts, however much is equal around them.
    assert shared_span((7, 7, 1), (2, 3), (7, 7, 1), (2, 3)) == Move(2, 2, 1)


def test_a_long_question_is_not_cut_short_by_its_common_words() -> None:
    """Difflib's own guess at junk starts at 200 tokens, and would drop the ones that occur often."""
    words = tuple(random.Random(0).choices(range(3), k=400))
    assert shared_span((60, *words), (0, 401), (61, 62, *words), (0, 402)) == Move(1, 2, 400)


def context(token_ids: Sequence[int], **spans: tuple[int, int]) -> Row:
    whole = {
        name: list(spans[name]) if name in spans else None
        for name in ("instruction", "negation", "mention", "question")
    }
    return {"token_ids": list(token_ids), "spans": whole}


BASELINE = context((1, 2, 3, 20, 21, 22, 9), instruction=(0, 3), question=(3, 6))
NEGATIVE = context((1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 22, 9), instruction=(0, 8), question=(8, 11))


def test_two_contexts_are_aligned_by_their_tokens() -> None:
    pair = align(BASELINE, NEGATIVE)
    assert pair == Pair(
        tuple(BASELINE["token_ids"]), tuple(NEGATIVE["token_ids"]), Move(3, 8, 3), Move(0, 3, 3), (3, 8)
    )
    assert pair.question is not None
    assert pair.question.shift == 5
    assert all(cannot(pair, patch) is None for patch in PATCHES)
    # A prohibition shorter than the instruction takes only as many of its tokens.
    short = context((1, 2, 3, 4, 20, 21, 22, 9), instruction=(0, 4), question=(4, 7))
    assert align(BASELINE, short).instruction == Move(0, 3, 1)


def test_what_cannot_be_aligned_says_which_patch_cannot_be_made() -> None:
    for target, gone in (
        (BASELINE, {"kv_instruction", "knockout_instruction"}),  # nothing is forbidden
        (context((20, 21, 22, 9), question=(0, 3)), {"kv_instruction", "knockout_instruction"}),  # no instruction
        (context((1, 2, 3, 4, 30, 31, 9), instruction=(0, 4), question=(4, 6)), {"kv_question"}),  # another question
        (context((1, 2, 3, 4, 9), instruction=(0, 4)), {"kv_question"}),
        (context((9,)), {"kv_question", "kv_instruction", "knockout_instruction"}),
    ):
        pair = align(BASELINE, target)
        told = {patch: cannot(pair, patch) for patch in PATCHES}
        assert {patch for patch, why in told.items() if why} == gone
        assert all(why is None or why.startswith(f"{patch}: ") for patch, why in told.items())
    bare = context((20, 21, 22, 9), question=(0, 3))
    pair = align(bare, NEGATIVE)
    assert pair.prohibition == (0, 8), "a baseline without an instruction: all of the target's is new"
    assert {patch for patch in PATCHES if cannot(pair, patch)} == {"kv_instruction"}


# ---- a run ----------------------------------------------------------------------------------------------------

BARE = '{"bare": "Question: {question}\\nAnswer:"}'
SUBSET = {"gravity.stages": "patching", "data.limit": 20, "gravity.patching.min_p0": 0.3,
          "gravity.patching.max_prompts": 2}  # fmt: skip


class Ran(NamedTuple):
    """A finished run in which a few prompts are patched, and its stage with its items."""

    folder: Path
    stage: Patching
    items: dict[str, Item]
    lm: LM
    rows: dict[tuple[str, str, int], Row]
    """By prompt, patch and layer."""

    @property
    def prompts(self) -> dict[str, list[Item]]:
        found: dict[str, list[Item]] = {}
        for item in self.items.values():
            found.setdefault(item.payload.subject.prompt_id, []).append(item)
        return found


class Upstream(NamedTuple):
    """A run that is finished but for its last stage; tests go on with copies of it."""

    folder: Path
    stages: tuple[AnyStage, ...]

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.folder, to)
        return to


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    folder = tmp_path_factory.mktemp("upstream") / "run"
    stages = stages_of(**SUBSET)
    assert stages[-1].name == "patching"
    run_stages(folder, *stages[:-1], max_tokens=350)
    return Upstream(folder, stages)


@pytest.fixture(scope="module")
def ran(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = upstream.copy(tmp_path_factory.mktemp("patching") / "run")
    stage: Any = upstream.stages[-1]
    run_stages(folder, stage, max_tokens=350)
    items = {i.key: i for i in stage.items(tables_of(folder, stage))}
    return Ran(folder, stage, items, stage.setup(), patching_rows(folder))


def test_every_chosen_prompt_has_every_patch_at_every_layer(ran: Ran) -> None:
    tables = tables_of(ran.folder, ran.stage)
    ids = choose(tables["suppression"], tables["outcomes"], ran.stage.rules, ran.stage.seed)
    outcome = {o["prompt_id"]: o["outcome"] for o in tables["outcomes"]}
    assert sorted(outcome[i] for i in ids) == ["failure", "failure", "success", "success"]
    layers = range(ran.stage.identity.num_layers)
    assert set(ran.rows) == {(i, patch, layer) for i in ids for patch in PATCHES for layer in layers}
    assert set(ran.items) == {f"{i}|{patch}" for i in ids for patch in PATCHES}
    assert events_of(ran.folder, "failed_item") == {}
    p0 = {s["prompt_id"]: s["p0"] for s in tables["suppression"]}
    assert all(p0[i] >= 0.3 for i in ids)


def test_pressure_before_the_patch_is_that_of_psem_and_delta_is_the_difference(ran: Ran) -> None:
    pressure = {r["prompt_id"]: r["p_sem"] for r in rows_of(ran.folder, "psem") if r["condition"] == "negative"}
    for (prompt_id, _, _), row in ran.rows.items():
        assert row["p_sem_original"] == pytest.approx(pressure[prompt_id], abs=OF_PROBS)
        assert row["delta_p"] == row["p_sem_patched"] - row["p_sem_original"]
        assert 0 <= row["p_sem_patched"] <= 1 + OF_PROBS
    assert max(abs(r["delta_p"]) for r in ran.rows.values()) > 0.1, "control: patches do something"


def test_the_last_layers_residual_brings_the_baselines_own_first_token(ran: Ran) -> None:
    """A word of one token then has its probability under the baseline; of a longer one only its beginning is as likely,
    since its later tokens are said under the ban. So the sum lies between those of the words and of their beginnings."""
    last = ran.stage.identity.num_layers - 1
    pressure = {r["prompt_id"]: r for r in rows_of(ran.folder, "psem") if r["condition"] == "baseline"}
    num_outside = 0
    for prompt_id, items in ran.prompts.items():
        subject, base = items[0].payload.subject, pressure[prompt_id]
        whole = sum(np.exp(lp) for s, lp in zip(base["sequences"], base["logprobs"], strict=True) if len(s) == 1)
        p = plain.next_logits(ran.lm, subject.pair.source)[-1].double().softmax(-1)
        begun = float(p[sorted({s[0] for s in subject.trie.sequences})].sum())
        assert whole - OF_PROBS <= ran.rows[prompt_id, "resid", last]["p_sem_patched"] <= begun + OF_PROBS
        num_outside += not whole <= ran.rows[prompt_id, "resid", last]["p_sem_original"] <= begun
    assert num_outside > 0, "control: without the patch it need not lie there"


def test_flipped_is_a_change_of_the_detectors_verdict(ran: Ran) -> None:
    target = {p["prompt_id"]: p["target"] for p in rows_of(ran.folder, "prompts")}
    said = {
        d["prompt_id"]: d["word_present"] for d in rows_of(ran.folder, "detections") if d["condition"] == "negative"
    }
    for (prompt_id, _, _), row in ran.rows.items():
        says = bool(find_word(answer_of(row["continuation"]), target[prompt_id]))
        assert row["flipped"] == (says != said[prompt_id])
    assert {row["flipped"] for row in ran.rows.values()} == {True, False}, "control"


def test_the_untouched_row_is_the_greedy_answer_and_each_row_is_the_plain_references(ran: Ran) -> None:
    answers = {c["prompt_id"]: c for c in rows_of(ran.folder, "completions") if c["condition"] == "negative"}
    for prompt_id, items in ran.prompts.items():
        subject = items[0].payload.subject
        (row,) = sweep(ran.lm, subject.pair, [], subject.trie, ran.stage.max_new_tokens, ran.stage.stop_at_newline)
        assert isinstance(row, Patched)
        assert row.continuation.token_ids == answers[prompt_id]["token_ids"]
    # Of the last prompt, at the layers on both ends and in the middle.
    prompt_id, items = list(ran.prompts.items())[-1]
    subject = items[0].payload.subject
    assert ran.stage.stop_at_newline
    for patch in PATCHES:
        for layer in (0, 2, ran.stage.identity.num_layers - 1):
            p_sem, done = reference(ran.lm, subject.pair, patch, layer, subject.trie, ran.stage.max_new_tokens)
            row = ran.rows[prompt_id, patch, layer]
            assert row["p_sem_patched"] == pytest.approx(p_sem, abs=OF_PROBS), (patch, layer)
            assert row["continuation"] == ran.lm.codec.decode(done.token_ids), (patch, layer)


def test_rows_say_how_much_of_its_span_a_patch_covers(ran: Ran) -> None:
    contexts = {(c["prompt_id"], c["condition"]): c for c in rows_of(ran.folder, "contexts")}
    for (prompt_id, patch, _), row in ran.rows.items():
        spans = contexts[prompt_id, "negative"]["spans"]
        question = spans["question"][1] - spans["question"][0]
        ban = added(
            contexts[prompt_id, "baseline"]["token_ids"], contexts[prompt_id, "baseline"]["spans"]["instruction"],
            contexts[prompt_id, "negative"]["token_ids"], spans["instruction"],
        )  # fmt: skip
        assert ban is not None
        whole = {"kv_question": question, "kv_instruction": ban[1] - ban[0], "knockout_instruction": ban[1] - ban[0]}
        assert row["num_span"] == whole.get(patch, 1)
        assert 0 < row["num_patched"] <= row["num_span"]
        if patch in ("kv_question", "knockout_instruction", "resid", "attn", "mlp"):
            assert row["num_patched"] == row["num_span"], patch
    some = next(iter(ran.prompts))
    text = ran.lm.codec.decode
    pair = ran.prompts[some][0].payload.subject.pair
    assert "Do not use the word" in text(pair.target[slice(*pair.prohibition)])
    assert "Question" not in text(pair.target[slice(*pair.prohibition)])


def test_items_of_a_prompt_may_come_in_any_batch_and_order(ran: Ran) -> None:
    """One alone, two of different prompts, all in reverse: the same rows, each under its own key."""
    keys = sorted(ran.items)
    for some in ([keys[3]], [keys[0], keys[-1]], keys[::-1], keys[5:9]):
        results = ran.stage.run(ran.lm, [ran.items[k] for k in some])
        assert [r.key for r in results] == some
        for result in results:
            assert result.error is None
            assert len(result.rows["patching"]) == ran.stage.identity.num_layers
            for row in result.rows["patching"]:
                assert f"{row['prompt_id']}|{row['patch']}" == result.key
                assert near(row, ran.rows[row["prompt_id"], row["patch"], row["layer"]])


def near(a: Row, b: Row) -> bool:
    """Equal, probabilities up to rounding."""
    return a.keys() == b.keys() and all(
        abs(a[c] - b[c]) < OF_PROBS if isinstance(a[c], float) else a[c] == b[c] for c in a
    )


def test_items_do_not_depend_on_the_order_of_rows(ran: Ran) -> None:
    tables = tables_of(ran.folder, ran.stage)
    shuffled = {name: random.Random(0).sample(rows, len(rows)) for name, rows in tables.items()}
    assert {i.key: i for i in ran.stage.items(shuffled)} == ran.items


# ---- killed, and planned anew ---------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


@dataclass(frozen=True)
class _Mortal:
    """A stage whose process dies when it is to compute its third batch."""

    stage: Patching
    seen: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def run(self, context: LM, items: Sequence[Item]) -> Sequence[ItemResult]:
        self.seen.append(len(items))
        if len(self.seen) == 3:
            raise _Killed
        return self.stage.run(context, items)


def patching_rows(folder: Path) -> dict[tuple[str, str, int], Row]:
    return {(r["prompt_id"], r["patch"], r["layer"]): r for r in rows_of(folder, "patching")}


def patching_batches(folder: Path) -> list[list[str]]:
    return [b["keys"] for b in rows_of(folder, "batches") if b["stage"] == "patching"]


def test_a_run_killed_amid_its_patches_ends_with_the_same_rows(ran: Ran, upstream: Upstream, tmp_path: Path) -> None:
    folder = upstream.copy(tmp_path / "run")
    with pytest.raises(_Killed):
        run_stages(folder, _Mortal(ran.stage, []), max_tokens=350)
    assert 0 < len(patching_rows(folder)) < len(ran.rows)
    run_stages(folder, ran.stage, max_tokens=10)  # a budget of now does not undo the plan
    assert patching_rows(folder) == ran.rows, "to the last bit: the batches are the same"
    assert patching_batches(folder) == patching_batches(ran.folder)


@pytest.mark.parametrize(("max_tokens", "num_batches"), [(1, 24), (100_000, 1)])
def test_a_run_cut_into_other_batches_gives_the_same_rows_up_to_rounding(
    ran: Ran, upstream: Upstream, tmp_path: Path, max_tokens: int, num_batches: int
) -> None:
    folder = upstream.copy(tmp_path / "run")
    run_stages(folder, ran.stage, max_tokens=max_tokens)
    assert len(patching_batches(folder)) == num_batches != len(patching_batches(ran.folder))
    rows = patching_rows(folder)
    assert rows.keys() == ran.rows.keys()
    assert all(near(row, ran.rows[key]) for key, row in rows.items())


# ---- what cannot be made --------------------------------------------------------------------------------------


def test_a_patch_that_cannot_be_made_fails_with_its_reason_and_the_others_are_made(tmp_path: Path) -> None:
    """A condition without an instruction forbids nothing; its question is moved to the front."""
    stages = stages_of(
        **{**SUBSET, "data.limit": 5, "gravity.templates": BARE, "gravity.conditions": "baseline,bare",
           "gravity.patching.condition": "bare", "gravity.patching.min_p0": 0.0}
    )  # fmt: skip
    run_stages(tmp_path / "run", *stages, max_tokens=2_000)
    rows = rows_of(tmp_path / "run", "patching")
    ids = {r["prompt_id"] for r in rows}
    assert {r["patch"] for r in rows} == {"resid", "attn", "mlp", "kv_question"}
    assert len(rows) == len(ids) * 4 * stage_named(stages, "patching").identity.num_layers > 0
    told = events_of(tmp_path / "run", "failed_item")
    assert set(told) == {f"{i}|{patch}" for i in ids for patch in ("kv_instruction", "knockout_instruction")}
    for key, why in told.items():
        assert key is not None
        assert why.startswith(key.split("|")[1] + ": ")
    pressure = {r["prompt_id"]: r["p_sem"] for r in rows_of(tmp_path / "run", "psem") if r["condition"] == "bare"}
    assert all(r["p_sem_original"] == pytest.approx(pressure[r["prompt_id"]], abs=OF_PROBS) for r in rows)


def test_a_patch_whose_numbers_are_not_finite_fails_and_leaves_no_row_of_any_layer(ran: Ran) -> None:
    """The baseline overflows in its last blocks: what is taken there, or behind, is not known."""
    items = next(iter(ran.prompts.values()))
    pair, late = items[0].payload.subject.pair, ran.stage.identity.num_layers - 1
    length, behind = len(pair.source), len(pair.target) - 1
    # Tokens of the forward of all texts, the source as often as it is moved and then the target: how many are the source's.
    together = {k * length + behind: k * length for k in (1, 2, 3)}

    def overflow(_module: object, _args: object, output: Tensor) -> Tensor:
        changed, num = output.clone(), output.shape[1] if len(output) == 1 else 0
        changed[:, : length if num == length else together.get(num, 0)] = torch.nan
        return changed

    handle = ran.lm.anatomy.blocks[late].register_forward_hook(overflow)
    try:
        results = {r.key.split("|")[1]: r for r in ran.stage.run(ran.lm, items)}
    finally:
        handle.remove()
    assert {patch for patch, r in results.items() if r.error is not None} == {"resid"}
    assert "not finite" in (results["resid"].error or "")
    assert results["resid"].rows == {}
    for patch, result in results.items():
        if patch != "resid":
            assert all(near(r, ran.rows[r["prompt_id"], patch, r["layer"]]) for r in result.rows["patching"])


def test_a_context_too_long_for_the_model_fails_every_patch_of_its_prompt_and_no_other(ran: Ran) -> None:
    def needed(item: Item) -> int:
        return len(item.payload.subject.pair.target) + ran.stage.max_new_tokens

    longest = max(map(needed, ran.items.values()))
    shorter = replace(ran.lm, max_positions=longest - 1)
    results = ran.stage.run(shorter, list(ran.items.values()))
    for item, result in zip(ran.items.values(), results, strict=True):
        assert (result.error is not None) == (needed(item) == longest)
        assert result.error is None or f"needs {longest} positions" in result.error
    assert {r.error is None for r in results} == {True, False}


def test_a_word_that_cannot_be_traced_in_a_continuation_fails_its_patch(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping error is told, as in the stage `detect`; it is not the same as an absent word."""
    items = list(ran.items.values())
    (before, *_) = ran.stage.run(ran.lm, items[:1])
    assert before.error is None
    codec = ran.lm.codec

    class Odd(type(codec)):
        """Says the word only to those who decode a whole continuation."""

        def __init__(self) -> None:
            super().__init__(codec.tokenizer)

        def decode(self, token_ids: Sequence[int]) -> str:
            whole = super().decode(token_ids)
            return f" {items[0].payload.subject.target}" if len(token_ids) > 1 else whole and "x"

    assert detect([1, 2], "yes", lambda ids: "yes"[: 2 * len(ids)]).word_present, "control: said a part a token"
    (result,) = ran.stage.run(replace(ran.lm, codec=Odd()), items[:1])
    assert result.error is not None
    assert "expected" in result.error
    assert result.rows == {}


def test_the_settings_that_decide_rows_are_in_its_parameters(ran: Ran) -> None:
    changes = {
        "gravity.patching.min_p0": 0.4, "gravity.patching.max_prompts": 3, "gravity.patching.condition": "bare",
        "gravity.max_new_tokens_greedy": 5, "gravity.stop_at_newline": "false",
        "gravity.conditions": "baseline,negative,bare", "gravity.templates": BARE,
    }  # fmt: skip
    before, after = ran.stage.params(), stage_named(stages_of(**{**SUBSET, **changes}), "patching").params()
    assert before.keys() == after.keys() == {
        "condition", "min_p0", "max_prompts", "max_new_tokens", "stop_at_newline"
    }  # fmt: skip
    assert all(before[name] != after[name] for name in before)
