"""Rollouts of many arms against the plainest loop: both models forwarded whole for every token of every completion."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.errors import ItemFailed
from harness.models import attend, plain, rollout
from harness.models.amplify import amplified, arm_log_probs, floored, log_probs, normalised
from harness.models.decode import Request, Sampling, decode
from harness.models.load import LM
from harness.models.noise import row_key, uniform
from harness.models.rollout import Ask, Decoder, Pair, Rollout, Rule, rollouts
from harness.text.words import Vocabulary
from harness.tolerance import TOLERANCE
from tests.models.test_decode import poisoned_lm, random_ids
from tests.tiny import FAMILIES, tiny_lm

NATS = TOLERANCE["float32"].nats
ARMS = (-1.0, -0.4, 0.0, 1.0, 2.5)
FREE = Rule()
RULES = {
    "free": FREE, "greedy": Rule(temperature=0.0), "warm": Rule(temperature=1.3), "nucleus": Rule(top_p=0.9),
    "floor": Rule(floor=0.05), "all": Rule(temperature=0.8, top_p=0.95, floor=0.01),
}  # fmt: skip


# One prompt with every arm and several samples, then others: short, long, and one that shares its start.
PROMPT = random_ids(30, 0)
CONTEXTS = [PROMPT, random_ids(1, 1), random_ids(18, 1), random_ids(60, 1), PROMPT[:26] + random_ids(5, 2)]


def asks_of(
    contexts: Sequence[tuple[int, ...]], samples: int, arms: Sequence[float] = ARMS, most: int = 5
) -> list[Ask]:
    return [
        Ask(context, row_key(0, f"p{n}", "lda", s), alpha, most)
        for n, context in enumerate(contexts)
        for s in range(samples)
        for alpha in arms
    ]


ASKS = asks_of(CONTEXTS, 2)


def pair_of(after: str, before: str | None = None) -> Pair:
    return Pair(tiny_lm(after), tiny_lm(before or after, seed=1), 256)


def made(pair: Pair, asks: Sequence[Ask], rule: Rule = FREE, arms: Sequence[float] = ARMS) -> list[Rollout]:
    found = rollouts(pair, asks, rule, arms)
    assert all(isinstance(r, Rollout) for r in found), found
    return found  # type: ignore[return-value]


def assert_same(got: Sequence[Rollout], want: Sequence[Rollout], nats: float = NATS) -> None:
    assert [g.token_ids for g in got] == [w.token_ids for w in want]
    assert [g.finish_reason for g in got] == [w.finish_reason for w in want]
    for g, w in zip(got, want, strict=True):
        for name in ("logp_after", "logp_before", "logp_arm", "margins", "mass_removed"):
            scale = 1 + 2 * max(map(abs, ARMS))  # an arm multiplies what rounding moved
            assert np.allclose(getattr(g, name), getattr(w, name), rtol=0, atol=scale * nats), name
        assert np.allclose(g.arm_logps, w.arm_logps, rtol=0, atol=20 * nats)


# ---- agreement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_equal_two_plain_forwards_of_the_whole_text(family: str) -> None:
    """Every family, absolute positions and sliding windows too. Controls below."""
    pair = pair_of(family)
    want = [plain.roll_out(pair, ask, FREE, ARMS) for ask in ASKS]
    assert len({tuple(w.token_ids) for w in want}) > len(CONTEXTS) * 4, "arms and samples are different texts"
    assert_same(made(pair, ASKS), want)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_draws_as_the_plain_loop_does(name: str) -> None:
    pair, rule = pair_of("tiny-gemma2", "tiny-llama"), RULES[name]
    want = [plain.roll_out(pair, ask, rule, ARMS) for ask in ASKS]
    assert_same(made(pair, ASKS, rule), want)
    removed = max(max(w.mass_removed) for w in want)
    assert (removed > 0.01) is (rule.top_p < 1 or rule.floor > 0)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_rollout_does_not_depend_on_its_company(size: int) -> None:
    pair = pair_of("tiny-qwen3")
    together = made(pair, ASKS)
    some = ASKS if size > 1 else ASKS[::4]
    parts = [some[i : i + size] for i in range(0, len(some), size)]
    apart = [r for part in parts for r in made(pair, part)]
    assert_same(apart, together if size > 1 else together[::4])
    order = np.random.default_rng(0).permutation(len(ASKS))
    assert_same(made(pair, [ASKS[i] for i in order]), [together[i] for i in order])
    # Control: other noise is another text.
    other = made(pair, [replace(a, key=a.key + 1) for a in ASKS])
    assert sum(o.token_ids != t.token_ids for o, t in zip(other, together, strict=True)) > len(ASKS) // 2


@pytest.mark.parametrize("alpha", [0.0, -1.0])
@pytest.mark.parametrize("rule", [FREE, Rule(top_p=0.9), Rule(temperature=0.0)], ids=["free", "nucleus", "greedy"])
def test_an_arm_that_is_a_model_gives_the_tokens_of_that_model_alone(alpha: float, rule: Rule) -> None:
    """Control: α = 1 differs."""
    pair = Pair(tiny_lm("tiny-olmo2"), tiny_lm("tiny-olmo2", seed=1), 256)
    lm = pair.after if alpha == 0 else pair.before
    assert lm is not None
    asks = asks_of(CONTEXTS, 3, [alpha])
    sampling = Sampling(5, rule.temperature, rule.top_p, stop_at_newline=False)
    size = lm.vocabulary.ends_word.size
    whole = replace(pair, num_common=size)
    want = decode([lm], [Request(a.context, a.key) for a in asks], sampling)
    assert [r.token_ids for r in made(whole, asks, rule)] == [w.token_ids for w in want]  # type: ignore[union-attr]
    only = Pair(lm, None, size) if alpha == 0 else Pair(None, lm, size)
    alone = made(only, asks, rule, ())
    assert [r.token_ids for r in alone] == [w.token_ids for w in want]  # type: ignore[union-attr]
    assert all(math.isnan(x) for r in alone for x in (r.logp_before if alpha == 0 else r.logp_after))
    other = made(whole, [replace(a, alpha=1.0) for a in asks], rule)
    assert [r.token_ids for r in other] != [w.token_ids for w in want]  # type: ignore[union-attr]


def test_a_cache_without_positions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the agreement: every new token told that it stands at the beginning."""
    pair = pair_of("tiny-gpt2")
    want = [plain.roll_out(pair, ask, FREE, ARMS) for ask in ASKS]

    class Lost(attend.Layout):
        def __init__(self, q_positions, k_positions, *args, **kwargs):
            alone = q_positions.shape[1] == 1 and k_positions.shape[1] > 1
            super().__init__(q_positions * 0 if alone else q_positions, k_positions, *args, **kwargs)

    monkeypatch.setattr(rollout, "Layout", Lost)
    with pytest.raises(AssertionError):
        assert_same(made(pair, ASKS), want)


def test_rows_that_looked_into_their_empty_slots_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("tiny-llama")
    want = [plain.roll_out(pair, ask, FREE, ARMS) for ask in ASKS]

    class Open(attend.Layout):
        def __init__(self, q_positions, k_positions, allowed=None, **kwargs):
            super().__init__(q_positions, k_positions, None if allowed is None else torch.ones_like(allowed), **kwargs)

    monkeypatch.setattr(rollout, "Layout", Open)
    with pytest.raises(AssertionError):
        assert_same(made(pair, ASKS), want)


# ---- joining and leaving --------------------------------------------------------------------------------------


def finished(decoder: Decoder, most: int = 10_000) -> dict[int, Rollout | ItemFailed]:
    found: dict[int, Rollout | ItemFailed] = {}
    for _ in range(most):
        if not len(decoder):
            return found
        found |= decoder.step()
    raise AssertionError("it does not end")


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3", "tiny-gpt2", "tiny-neox"])
def test_completions_that_join_between_steps_are_what_they_are_alone(family: str) -> None:
    """Lengths, contexts and arms of every kind come and go; gaps in the cache are closed on the way."""
    pair = pair_of(family)
    rng = np.random.default_rng(3)
    asks = [
        Ask(random_ids(int(rng.integers(1, 60)), n), row_key(0, str(n), "lda", 0), float(rng.choice(ARMS)), int(m))
        for n, m in enumerate(rng.integers(1, 25, 40))
    ]
    decoder, found, place = Decoder(pair, FREE, ARMS), {}, {}
    waiting = list(enumerate(asks))
    while waiting or len(decoder):
        joining = [waiting.pop() for _ in range(min(len(waiting), int(rng.integers(0, 4))))]
        for (n, _), number in zip(joining, decoder.add([a for _, a in joining]), strict=True):
            place[number] = n
        for number, done in decoder.step().items():
            found[place[number]] = done
    assert sorted(found) == list(range(len(asks)))
    assert_same([found[n] for n in range(len(asks))], made(pair, asks))  # type: ignore[misc]
    assert_same([found[n] for n in range(3)], [plain.roll_out(pair, a, FREE, ARMS) for a in asks[:3]])  # type: ignore[misc]


def test_a_cache_whose_gaps_were_closed_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("tiny-mistral")
    long, short = Ask(random_ids(90, 0), 1, 1.0, 30), Ask(random_ids(4, 0), 2, 2.5, 30)
    want = made(pair, [short])
    widths = []
    for slack in (0, 10_000):
        monkeypatch.setattr(rollout, "_SLACK", slack)
        decoder = Decoder(pair, FREE, ARMS)
        dropped, kept = decoder.add([long, short])
        decoder.step()
        decoder.drop([dropped])
        decoder.step()
        assert decoder._rows is not None
        widths.append(decoder._rows._is_filled.shape[1])
        assert_same([finished(decoder)[kept]], want)  # type: ignore[list-item]
    assert widths[0] < 10 < 90 < widths[1], "the control: it was closed in one of them"


def test_dropped_completions_free_their_rows_with_the_next_step() -> None:
    pair = pair_of("tiny-llama")
    decoder = Decoder(pair, FREE)
    numbers = decoder.add([replace(a, max_new_tokens=50) for a in asks_of(CONTEXTS, 4)])
    decoder.step()
    decoder.step()
    assert decoder._rows is not None
    before = len(decoder._rows)
    decoder.drop(numbers[5:])
    decoder.step()
    assert before > 50
    assert len(decoder._rows) <= 5
    decoder.drop(numbers)
    assert len(decoder) == 0
    assert decoder.step() == {}


def test_what_is_written_of_a_completion_can_be_read_while_it_goes_on() -> None:
    decoder = Decoder(pair_of("tiny-llama"), FREE)
    numbers = decoder.add(ASKS[:3])
    seen: list[list[int]] = []
    for _ in range(4):
        assert decoder.step() == {}
        seen.append(list(decoder.written(numbers[1]).token_ids))
    done = finished(decoder)[numbers[1]]
    assert isinstance(done, Rollout)
    assert seen == [done.token_ids[:n] for n in range(1, 5)]


def test_a_number_is_never_used_twice() -> None:
    decoder = Decoder(pair_of("tiny-llama"), FREE)
    first = decoder.add(ASKS[:3])
    finished(decoder)
    second = decoder.add(ASKS[:3])
    assert not set(first) & set(second)
    assert sorted(finished(decoder)) == second


# ---- what is computed once ------------------------------------------------------------------------------------


@contextmanager
def traffic(lm: LM) -> Iterator[list[int]]:
    """Tokens of each forward."""
    seen: list[int] = []

    def count(_, args, kwargs):
        seen.append(kwargs["input_ids"].numel())

    hook = lm.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def test_every_distinct_text_is_forwarded_once_and_a_prompt_once_a_model() -> None:
    pair = pair_of("tiny-llama")
    asks = asks_of([PROMPT], 3, [0.0, 0.001, 0.002, 2.5], most=6)
    assert pair.after is not None
    assert pair.before is not None
    for lm in pair.lms:
        with traffic(lm) as seen:
            done = made(pair, asks)
        beginnings = {tuple(d.token_ids[:n]) for d in done for n in range(1, len(d.token_ids))}
        alone = sum(len(d.token_ids) - 1 for d in done)
        assert sum(seen) == len(PROMPT) + len(beginnings)
        assert len(beginnings) < 0.7 * alone, "arms that agree share their text"


def test_a_model_that_no_arm_needs_is_not_run() -> None:
    lm = tiny_lm("tiny-llama")
    with pytest.raises(AssertionError, match="without the model before"):
        Decoder(Pair(lm, None, 256), FREE).add([Ask(PROMPT, 0, 0.5, 3)])
    with pytest.raises(AssertionError, match="without the model after"):
        Decoder(Pair(None, lm, 256), FREE).add([Ask(PROMPT, 0, 0.0, 3)])
    with pytest.raises(AssertionError, match="at least one"):
        Pair(None, None, 256)
    with pytest.raises(AssertionError, match="by two models"):
        Decoder(Pair(lm, None, 256), FREE, (0.0, 1.0))
    with pytest.raises(AssertionError, match="what the model after finds plausible"):
        Decoder(Pair(None, lm, 256), Rule(floor=0.1))


# ---- failures stay alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["after", "before"])
def test_a_prompt_whose_logits_are_not_finite_fails_alone(which: str) -> None:
    """The ill one stands first: what fills the empty places of the others is its token."""
    ill, well = poisoned_lm(256), tiny_lm("tiny-llama", seed=1)
    pair = Pair(ill, well, 256) if which == "after" else Pair(well, ill, 256)
    contexts = [(256, 5, 6), random_ids(10, 1), (5, 256), random_ids(4, 1), random_ids(20, 1)]
    asks = asks_of(contexts, 2)
    results = rollouts(pair, asks, FREE, ARMS)
    assert [isinstance(r, ItemFailed) for r in results] == [256 in a.context for a in asks]
    good = [(r, a) for r, a in zip(results, asks, strict=True) if isinstance(r, Rollout)]
    assert_same([r for r, _ in good], [plain.roll_out(pair, a, FREE, ARMS) for _, a in good])


def test_a_completion_that_turns_not_finite_fails_alone() -> None:
    asks = asks_of([PROMPT], 8, [0.0, 1.0])
    usual = made(Pair(tiny_lm("tiny-llama"), tiny_lm("tiny-llama", seed=1), 256), asks)
    poison = next(t for t in usual[0].token_ids[:3] if t not in PROMPT)
    hit = [poison in u.token_ids[:-1] for u in usual]  # the last token is never read
    assert any(hit)
    assert not all(hit)
    results = rollouts(Pair(poisoned_lm(poison), tiny_lm("tiny-llama", seed=1), 256), asks, FREE, ARMS)
    assert [isinstance(r, ItemFailed) for r in results] == hit
    good = [(r, u) for r, u in zip(results, usual, strict=True) if isinstance(r, Rollout)]
    assert_same([g for g, _ in good], [u for _, u in good])


def test_a_context_that_does_not_fit_either_model_fails_alone() -> None:
    pair = Pair(replace(tiny_lm("tiny-gpt2"), max_positions=30), tiny_lm("tiny-llama"), 256)
    asks = [Ask(random_ids(n, 1), 0, 1.0, 4) for n in (26, 27, 5)] + [Ask((), 0, 1.0, 4)]
    results = rollouts(pair, asks, FREE)
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, False, True]
    assert "needs 1 to 26 tokens of context, has 27" in str(results[1])


def test_an_end_of_text_ends_a_completion_where_that_is_wished() -> None:
    pair = pair_of("tiny-llama")
    usual = made(pair, ASKS)
    end = usual[0].token_ids[1]
    size = pair.lms[0].vocabulary.ends_word.size
    vocabulary = Vocabulary(pair.lms[0].vocabulary.ends_word, np.zeros(size, dtype=bool), frozenset({end}))
    after, before = (replace(lm, vocabulary=vocabulary) for lm in pair.lms)
    ending = Pair(after, before, 256)
    for got, was in zip(made(ending, ASKS), usual, strict=True):
        at = was.token_ids.index(end) + 1 if end in was.token_ids else None
        assert got.token_ids == was.token_ids[:at]
        assert got.finish_reason == ("stop" if at else "length")
    assert_same(made(ending, ASKS, replace(FREE, stop_at_end=False)), usual)


# ---- the arithmetic -------------------------------------------------------------------------------------------


def test_tables_in_parts_give_what_they_give_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("tiny-phi3")
    for rule in RULES.values():
        whole = made(pair, ASKS, rule)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "_TABLE", 256 * 3)
            assert_same(made(pair, ASKS, rule), whole)


def test_a_token_that_one_model_rules_out_is_ruled_out_and_nothing_fails() -> None:
    inf = math.inf
    after = log_probs(torch.tensor([[0.0, -inf, 1.0, -inf, 7.0]]), 4)
    before = log_probs(torch.tensor([[0.0, 2.0, -inf, -inf, 9.0]]), 4)
    for alpha in (-1.0, -0.5, 0.0, 0.7, 30.0):
        z = amplified(after, before, torch.tensor([alpha]))
        ruled_out = after.isinf() if alpha == 0 else before.isinf() if alpha == -1 else after.isinf() | before.isinf()
        assert z.isneginf().tolist() == ruled_out.tolist()
        assert not z.isnan().any()
        assert float(normalised(z, torch.tensor([alpha])).exp().sum()) == pytest.approx(1)


def test_an_arm_between_the_models_is_their_geometric_mean_and_none_needs_raw_logits() -> None:
    one, two = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    after, before = log_probs(one, 50), log_probs(two, 50)
    alpha = torch.tensor([-0.5, 1.0, 2.0], dtype=torch.float64)
    got = normalised(amplified(after, before, alpha), alpha).exp()
    mean = (after[0].exp() * before[0].exp()).sqrt()
    assert torch.allclose(got[0], mean / mean.sum())
    raw = (one + alpha[:, None] * (one - two)).softmax(-1)
    assert torch.allclose(got, raw), "the softmax is the same as on raw logits"


@pytest.mark.parametrize("floor", [1e-6, 0.1, 1.0])
def test_a_floor_keeps_what_the_model_after_finds_plausible_and_always_its_best(floor: float) -> None:
    after = log_probs(torch.randn(20, 40) * 3, 40)
    z = torch.randn(20, 40)
    cut, stays = floored(z, after, floor)
    p = after.exp()
    assert torch.equal(stays, after >= after.max(-1, keepdim=True).values + math.log(floor))
    assert bool(stays.gather(1, p.argmax(-1, keepdim=True)).all())
    assert bool(cut[~stays].isneginf().all())
    assert torch.equal(cut[stays], z[stays])


def test_probabilities_under_all_arms_are_those_of_each_arm() -> None:
    after, before = log_probs(torch.randn(4, 30), 30), log_probs(torch.randn(4, 30), 30)
    tokens = torch.randint(0, 30, (4, 7))
    found = arm_log_probs(after, before, tokens, ARMS)
    for k, alpha in enumerate(ARMS):
        z = after.double() + alpha * (after.double() - before.double())
        assert torch.allclose(found[:, :, k], z.log_softmax(-1).gather(1, tokens), atol=1e-5)


def test_noise_of_a_step_of_ones_own_is_that_of_the_step() -> None:
    keys, ids = torch.tensor([3, -(2**63), 2**63 - 1, 7]), torch.arange(50).expand(4, -1)
    steps = torch.tensor([0, 1, 77, 12_345])
    got = uniform(keys, steps, ids)
    for n, step in enumerate(steps.tolist()):
        assert torch.equal(got[n], uniform(keys[n : n + 1], step, ids[:1])[0])
