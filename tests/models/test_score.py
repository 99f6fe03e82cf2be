"""Tree scoring against the plain reference: one sequence at a time, eager attention, no cache, no padding."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.errors import ItemFailed
from harness.experiments.gravity.stages.psem import measures
from harness.models import plain, score
from harness.models.cells import Cells, shared_cells
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.load import LM, Codec, assemble
from harness.models.noise import row_key
from harness.models.score import TreeScores, row_length, score_trees, tree_batch
from harness.text.detect import find_word
from harness.text.words import Tokens, Trie, build_trie, word_forms
from tests.tiny import FAMILIES, build_model, byte_tokenizer, identity, tiny_lm

RELATIVE = 1e-5  # of a probability, in float32 (2.5e-6 was seen)
USUAL_LENGTH = 5  # each token adds rounding of its own, so a sequence n times as long may be n times as far off
SIGMA_999 = 3.29  # two-sided 99.9 % of a normal


def random_ids(length: int, seed: int) -> Tokens:
    return tuple(np.random.default_rng([seed, length]).integers(0, 256, length).tolist())


HAND_MADE = build_trie([(5,), (7, 8, 9), (7, 8, 10), (7, 11), (200, 3, 3, 3, 3)], whole=[(7, 8, 9), (5,)])
ONE_TOKEN = build_trie([(5,), (6,), (250,)])
DEEP = build_trie([random_ids(20, 3), (*random_ids(20, 3)[:18], 1, 2)])  # nodes alone outgrow the tiny windows
START = random_ids(24, 99)

# Contexts of very different length, most longer than the tiny sliding window (16); then some with a common start.
APART = [(random_ids(n, 7), trie) for n, trie in [(1, HAND_MADE), (70, HAND_MADE), (17, ONE_TOKEN), (40, DEEP)]]
TOGETHER = [(START + random_ids(n, 8), trie) for n, trie in [(1, DEEP), (30, HAND_MADE), (5, ONE_TOKEN)]]


@cache
def reference(family: str, context: Tokens, trie_name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Log-probability of every sequence, log-mass of word ends where asked for, and entropy of the first step."""
    lm, trie = tiny_lm(family), globals()[trie_name]
    logprobs = [plain.sequence_logprob(lm, context, s) for s in trie.sequences]
    pairs = zip(trie.sequences, trie.ends, strict=True)
    ends = [plain.word_end_logprob(lm, context, s) if e >= 0 else math.nan for s, e in pairs]
    first = plain.next_logits(lm, context)[-1].double().log_softmax(-1)
    return np.array(logprobs), np.array(ends), float(-(first.exp() * first).sum())


def wanted(family: str, context: Tokens, trie: Trie) -> tuple[np.ndarray, np.ndarray, float]:
    name = next(k for k, v in globals().items() if v is trie)
    return reference(family, context, name)


def scored(lm: LM, items: Sequence[tuple[Tokens, Trie]]) -> list[TreeScores]:
    results = score_trees(lm, [c for c, _ in items], [t for _, t in items])
    assert all(isinstance(r, TreeScores) for r in results), results
    return results  # type: ignore[return-value]


def gap(got: np.ndarray, want: np.ndarray) -> float:
    """Greatest relative difference in probability of two arrays of logarithms; the same places must be NaN."""
    assert np.array_equal(np.isnan(got), np.isnan(want))
    return float(np.nanmax(np.abs(np.expm1(got - want)), initial=0.0))


def worst(lm: LM, family: str, items: Sequence[tuple[Tokens, Trie]]) -> float:
    """Greatest relative difference between the tree's probabilities and the reference's, over a batch."""
    greatest = 0.0
    for (context, trie), got in zip(items, scored(lm, items), strict=True):
        logprobs, ends, entropy = wanted(family, context, trie)
        lengths = np.maximum(1, np.array([len(s) for s in trie.sequences]) / USUAL_LENGTH)
        off = [gap(got.logprobs / lengths, logprobs / lengths), gap(got.word_end, ends), abs(got.entropy - entropy)]
        greatest = max(greatest, *off)
    return greatest


# ---- agreement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_equal_the_plain_reference_for_any_batch_and_order(family: str) -> None:
    lm, items = tiny_lm(family), [*APART, *TOGETHER]
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    batches = [[item] for item in items] + [items[i : i + 2] for i in range(len(items) - 1)] + [items, shuffled]
    assert max(worst(lm, family, batch) for batch in batches) < RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_common_start_is_shared_and_changes_nothing(family: str) -> None:
    contexts, tries = zip(*TOGETHER, strict=True)
    distinct = {c[:n] for c in contexts for n in range(1, len(c) + 1)}
    _, layout = tree_batch(contexts, tries, torch.device("cpu"))
    assert layout.cells is not None
    assert len(layout.cells) == len(distinct) + sum(map(len, tries)) < sum(row_length(c, t) for c, t in TOGETHER)
    assert worst(tiny_lm(family), family, TOGETHER) < RELATIVE
    same = [TOGETHER[1]] * 3  # one context thrice: all of it but its last token is common
    assert worst(tiny_lm(family), family, same) < RELATIVE


def exact_lm(family: str, monkeypatch: pytest.MonkeyPatch) -> LM:
    """A float64 model without the float32 that families keep in their norms and their eager softmax."""
    softmax = torch.nn.functional.softmax

    def wide_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, dtype=torch.promote_types(x.dtype, dtype or x.dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
    lm = assemble(build_model(family), Codec(byte_tokenizer()), identity(family, "float64"))
    for module in lm.model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps, weight = module.variance_epsilon, module.weight
            module.forward = lambda x, e=eps, w=weight: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)
    return lm


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-mistral", "tiny-gpt2"])
def test_in_float64_every_node_equals_the_reference_to_the_tenth_digit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What float32 hides as rounding would show here: the states of all tokens and nodes, packed and sharing a start."""
    lm = exact_lm(family, monkeypatch)
    for items in (APART, TOGETHER):
        contexts, tries = [c for c, _ in items], [t for _, t in items]
        tokens, layout = tree_batch(contexts, tries, lm.device)
        with torch.inference_mode():
            hidden = lm.hidden(tokens, layout)
        assert hidden.dtype == torch.float64
        for row, (context, trie) in enumerate(zip(contexts, tries, strict=True)):
            node = len(context)
            for sequence, steps in zip(trie.sequences, trie.steps, strict=True):
                with torch.inference_mode(), plain.eager(lm):
                    ids = torch.tensor([[*context, *sequence]])
                    want = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(context) - 1 :]
                got = hidden[row, [node + i for i, _ in steps]]  # -1 is the context's last token
                assert torch.allclose(got, want[: len(steps)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2"])
def test_in_float64_probabilities_equal_the_reference_to_the_tenth_digit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact states round to the same float32 logits, so that even the last digit of a probability is the same."""
    lm = exact_lm(family, monkeypatch)
    for (context, trie), got in zip(APART, scored(lm, APART), strict=True):
        want = [plain.sequence_logprob(lm, context, s) for s in trie.sequences]
        assert gap(got.logprobs, np.array(want)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_a_word_is_scored_as_the_reference_does(family: str) -> None:
    lm, context = tiny_lm(family), random_ids(30, 5)
    forms = word_forms("ox", lm.codec)
    (got,) = scored(lm, [(context, forms.trie)])
    want = np.array([plain.sequence_logprob(lm, context, s) for s in forms.trie.sequences])
    assert gap(got.logprobs, want) < RELATIVE
    row = measures(forms, got)
    at = dict(zip(forms.trie.sequences, np.exp(want), strict=True))
    p_word = sum(at[s] * math.exp(plain.word_end_logprob(lm, context, s)) for s in forms.events)
    assert row["p_sem"] == pytest.approx(sum(at[s] for s in forms.events), rel=RELATIVE)
    assert row["p_word"] == pytest.approx(p_word, rel=RELATIVE)
    assert 0 < row["p_word"] < row["p_sem"]


def test_the_first_step_reports_the_models_top_tokens() -> None:
    lm = tiny_lm("tiny-qwen3")
    for (context, _), got in zip(APART, scored(lm, APART), strict=True):
        top = plain.next_logits(lm, context)[-1].softmax(-1).topk(10)
        assert got.top_ids.tolist() == top.indices.tolist()
        assert np.allclose(got.top_probs, top.values.numpy(), rtol=RELATIVE)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_the_head_may_be_applied_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_HEAD_ROWS", block)
    assert worst(tiny_lm("tiny-llama"), "tiny-llama", [*APART, *TOGETHER]) < RELATIVE


@pytest.mark.parametrize(("logits", "rows"), [(1, 2_048), (5_000, 2_048), (300, 3), (100, 1)])
def test_the_vocabulary_may_be_gone_through_in_slices_of_any_size(
    logits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny vocabulary fits into one slice: without this no test would ever see a second one, nor a shorter last one."""
    lm, real, begins = tiny_lm("tiny-llama"), LM.logits, set[int]()

    def seen(self: LM, hidden: Tensor, tokens: slice | None = None) -> Tensor:
        begins.add(tokens.start if tokens else 0)
        return real(self, hidden, tokens)

    monkeypatch.setattr(score, "_SLICE_OF_CPU", logits)
    monkeypatch.setattr(score, "_SLICE_ROWS", rows)
    monkeypatch.setattr(LM, "logits", seen)
    assert worst(lm, "tiny-llama", [*APART, *TOGETHER]) < RELATIVE
    assert len(begins) > 2, "control: there were several slices"


# ---- controls: each part of the layout is needed --------------------------------------------------------------


class _Triangle(Trie):
    """A trie whose nodes look at all earlier nodes, relatives or not."""

    def ancestry(self) -> np.ndarray:
        return np.tri(len(self), dtype=bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_trees_give_other_probabilities(family: str) -> None:
    """Control: a lower triangle instead of ancestors, and positions off by one, are both seen."""
    lm, (context, trie) = tiny_lm(family), APART[1]
    want = wanted(family, context, trie)[0]
    cousins = _Triangle(**vars(trie))
    late = replace(trie, depths=tuple(d + 1 for d in trie.depths))
    for broken in (cousins, late):
        (got,) = scored(lm, [(context, broken)])
        assert gap(got.logprobs, want) > 100 * RELATIVE


def test_items_that_could_see_each_other_give_other_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: tokens taken for another context's own, as a start that is not common would be."""

    def mixed(contexts: Sequence[Tokens], num_own: Sequence[int], *rest: object) -> Cells:
        return shared_cells([contexts[0][: len(c)] + c[len(contexts[0]) :] for c in contexts], num_own, *rest)  # type: ignore[arg-type]

    items = [(c, ONE_TOKEN) for c, _ in APART]
    lm, family = tiny_lm("tiny-llama"), "tiny-llama"
    monkeypatch.setattr(score, "shared_cells", mixed)
    assert worst(lm, family, items[:1]) < RELATIVE
    assert worst(lm, family, items) > 100 * RELATIVE


@pytest.mark.parametrize("family", ["tiny-mistral", "tiny-gemma2", "tiny-gemma3"])
def test_without_their_sliding_window_these_families_say_something_else(family: str) -> None:
    """Control: the contexts here are long enough for the window to matter, so agreement above means it was cut."""
    sliding, wide = tiny_lm(family), assemble_wide(family)
    (with_window,), (without,) = scored(sliding, APART[1:2]), scored(wide, APART[1:2])
    assert gap(without.logprobs, with_window.logprobs) > 100 * RELATIVE
    assert gap(scored(wide, APART[:1])[0].logprobs, scored(sliding, APART[:1])[0].logprobs) < RELATIVE  # 1 token: none


def assemble_wide(family: str) -> LM:
    return assemble(build_model(family, sliding_window=512), Codec(byte_tokenizer()), identity(family))


# ---- probability ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_over_a_complete_prefix_free_cover_sum_to_one(family: str) -> None:
    """All one- and two-token sequences that cover the vocabulary: the sum is 1, and less for any part of it."""
    lm, context = tiny_lm(family), random_ids(30, 2)
    size = lm.vocabulary.ends_word.size
    likely = scored(lm, [(context, ONE_TOKEN)])[0].top_ids[:3].tolist()
    opened = {*likely, 0, 255}
    cover = [(t,) for t in range(size) if t not in opened] + [(t, u) for t in opened for u in range(size)]
    (got,) = scored(lm, [(context, build_trie(cover))])
    assert np.exp(got.logprobs).sum() == pytest.approx(1, abs=1e-5)
    some = np.random.default_rng(0).random(len(cover)) < 0.5
    assert np.exp(got.logprobs[some]).sum() < 0.9
    # Control: with overlaps the same numbers add up to more than 1, which is what the paper's sum must be clamped for.
    (overlapping,) = scored(lm, [(context, build_trie([*cover, *((t,) for t in opened)]))])
    assert np.exp(overlapping.logprobs).sum() > 1.05


def wordy_lm() -> LM:
    """A model of its own whose head leans toward the letters of `no`, a space, a full stop and the end of text."""
    model = build_model("tiny-llama", seed=4, sharpness=0.0)
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    codec = Codec(byte_tokenizer())
    bias = torch.zeros(head.out_features)
    for text, weight in {"n": 9.0, "o": 9.0, " ": 8.0, ".": 7.5}.items():
        bias[codec.encode(text, add_special_tokens=False)] = weight
    bias[256] = 7.5
    head.weight, head.bias = model.lm_head.weight, nn.Parameter(bias, requires_grad=False)
    model.lm_head = head
    return assemble(model, codec, identity("wordy"))


def test_p_word_is_the_rate_at_which_samples_open_with_the_word() -> None:
    """Sampling at T=1 without top-p agrees with p_word within its interval; p_sem, which has no word end, does not.

    The completions are as long as the longest spelling and what follows it, so that none is cut before it is decided.
    """
    lm, num_samples = wordy_lm(), 6000
    context = tuple(lm.codec.encode("Is it so? ", add_special_tokens=False))
    forms = word_forms("no", lm.codec)
    row = measures(forms, scored(lm, [(context, forms.trie)])[0])
    how = Sampling(max_new_tokens=4, temperature=1.0, top_p=1.0)
    done = decode([lm], [Request(context, row_key(0, "p", "c", i)) for i in range(num_samples)], how)
    assert all(isinstance(d, Completion) for d in done)
    texts = [lm.codec.decode(d.token_ids) for d in done if isinstance(d, Completion)]
    opens = [any(text[:start] in ("", " ") for start, _ in find_word(text, "no")) for text in texts]
    rate = float(np.mean(opens))
    interval = SIGMA_999 * math.sqrt(row["p_word"] * (1 - row["p_word"]) / num_samples)
    assert 0.03 < row["p_word"] < 0.5
    assert abs(rate - row["p_word"]) < interval
    assert abs(rate - row["p_sem"]) > 2 * interval


# ---- many items in one forward --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=8))
def test_whatever_stands_beside_it_each_item_equals_itself_alone(shape: list[tuple[int, int]]) -> None:
    lm, tries = tiny_lm("tiny-gemma3"), [HAND_MADE, ONE_TOKEN, DEEP, build_trie([(9,)])]
    items = [(random_ids(n, i), tries[t]) for i, (n, t) in enumerate(shape)]
    for item, got in zip(items, scored(lm, items), strict=True):
        # Sequences of e^-147 are sums of twenty float32 logits: their rounding grows with them.
        assert gap(got.logprobs, scored(lm, [item])[0].logprobs) < 3 * RELATIVE


# ---- failures stay alone --------------------------------------------------------------------------------------

POISON = 200


def poisoned_lm() -> LM:
    """A model of its own that gives NaN after one token, as half precision does where a value overflows."""
    model = build_model("tiny-llama")
    lm = assemble(model, Codec(byte_tokenizer()), identity("poisoned"))
    model.model.embed_tokens.weight[POISON] = torch.nan
    return lm


def test_an_item_whose_logits_are_not_finite_fails_alone() -> None:
    """Also where it stands in one row with others: masked is not enough, 0 × NaN is NaN."""
    lm, trie = poisoned_lm(), build_trie([(5,), (7, 8)])
    contexts = [(10, 11, 12), (10, POISON, 12), (30, 31, 32, 33)]
    alone = [score_trees(lm, [c], [trie])[0] for c in contexts]
    assert [isinstance(r, ItemFailed) for r in alone] == [False, True, False]
    together = score_trees(lm, contexts, [trie] * 3)
    assert [isinstance(r, ItemFailed) for r in together] == [False, True, False]
    assert "not finite" in str(together[1])
    for a, b in zip(alone, together, strict=True):
        if isinstance(a, TreeScores) and isinstance(b, TreeScores):
            assert gap(a.logprobs, b.logprobs) < RELATIVE


def test_an_item_fails_when_one_of_its_spellings_is_not_finite() -> None:
    """A part of a sum that is unknown makes the sum unknown."""
    (got,) = score_trees(poisoned_lm(), [(10, 11)], [build_trie([(5,), (POISON, 8)])])
    assert isinstance(got, ItemFailed)


def test_a_context_longer_than_the_model_reaches_fails_alone() -> None:
    lm = replace(tiny_lm("tiny-gpt2"), max_positions=30)
    trie = build_trie([(5,), (7, 8, 9)])  # reaches two positions behind the context
    results = score_trees(lm, [random_ids(28, 1), random_ids(29, 1), (), random_ids(5, 1)], [trie] * 4)
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, True, False]
    assert "31 positions, the model has 30" in str(results[1])
    assert "at least one token" in str(results[2])
    assert isinstance(results[0], TreeScores)
    want = [plain.sequence_logprob(lm, random_ids(28, 1), s) for s in trie.sequences]
    assert gap(results[0].logprobs, np.array(want)) < RELATIVE


def test_gpt2_scores_up_to_its_last_position() -> None:
    """Learned positions have a hard end: the last node may stand on the last one, not behind it."""
    lm, trie = tiny_lm("tiny-gpt2"), build_trie([(5,), (7, 8)])
    full, over = score_trees(lm, [random_ids(1023, 1), random_ids(1024, 1)], [trie] * 2)
    assert isinstance(full, TreeScores)
    assert isinstance(over, ItemFailed)
