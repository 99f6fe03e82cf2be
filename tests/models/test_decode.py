"""Tree decoding against the plain reference: the whole text forwarded again for every token of every completion."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from harness.errors import ItemFailed
from harness.models import attend, plain
from harness.models import decode as decode_module
from harness.models.decode import Completion, Request, Sampling, decode, sample
from harness.models.load import LM, Codec, assemble
from harness.models.noise import gumbel, row_key
from harness.text.words import Vocabulary
from harness.tolerance import TOLERANCE
from tests.tiny import FAMILIES, build_model, byte_tokenizer, identity, tiny_lm

NATS = TOLERANCE["float32"].nats
GREEDY = Sampling(4)
FREE = Sampling(4, temperature=1.0)
NUCLEUS = Sampling(4, temperature=1.0, top_p=0.9)
WAYS = {"greedy": GREEDY, "free": FREE, "nucleus": NUCLEUS}


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(0, 256, length).tolist())


# One prompt with many samples, then others: short, long, and two that share its start. The long ones outgrow the
# tiny sliding windows (16), the short one reaches past its own only if padding were counted.
PROMPT = random_ids(30, 0)
CONTEXTS = [PROMPT] * 9 + [random_ids(n, 1) for n in (1, 3, 18, 60)] + [PROMPT[:26] + random_ids(n, 2) for n in (1, 9)]
REQUESTS = [Request(context, row_key(0, "p", "c", i)) for i, context in enumerate([*CONTEXTS, PROMPT])]
SIXTEEN = [Request(PROMPT, row_key(0, "p", "c", i)) for i in range(16)]


def decoded(lms: LM | Sequence[LM], requests: Sequence[Request], sampling: Sampling, combine=None) -> list[Completion]:
    results = decode([lms] if isinstance(lms, LM) else lms, requests, sampling, combine)
    assert all(isinstance(r, Completion) for r in results), results
    return results  # type: ignore[return-value]


def assert_same(got: Sequence[Completion], want: Sequence[Completion]) -> None:
    assert [g.token_ids for g in got] == [w.token_ids for w in want]
    assert [g.finish_reason for g in got] == [w.finish_reason for w in want]
    for g, w in zip(got, want, strict=True):
        assert np.allclose(g.logprobs, w.logprobs, rtol=0, atol=NATS)
        assert np.allclose(g.margins, w.margins, rtol=0, atol=NATS)


# ---- agreement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_completions_equal_the_plain_reference_for_any_batch_and_order(family: str, way: str) -> None:
    lm, sampling = tiny_lm(family), WAYS[way]
    want = [plain.complete(lm, r, sampling) for r in REQUESTS]
    assert len({tuple(w.token_ids) for w in want[:9]}) == (1 if way == "greedy" else 9)
    for i in range(0, len(REQUESTS), 3):  # alone; a third of them, for time
        assert_same(decoded(lm, REQUESTS[i : i + 1], sampling), want[i : i + 1])
    for size in (4, 16):
        batches = [REQUESTS[i : i + size] for i in range(0, len(REQUESTS), size)]
        assert_same([c for b in batches for c in decoded(lm, b, sampling)], want)
    order = np.random.default_rng(0).permutation(len(REQUESTS))
    assert_same(decoded(lm, [REQUESTS[i] for i in order], sampling), [want[i] for i in order])


def test_completions_differ_where_the_prompt_or_its_noise_does() -> None:
    """Control: the agreement above is not one text for all."""
    lm = tiny_lm("tiny-llama")
    samples = decoded(lm, SIXTEEN, FREE)
    assert len({tuple(c.token_ids) for c in samples}) == 16
    again = decoded(lm, [replace(r, key=r.key + 1) for r in SIXTEEN], FREE)
    assert all(a.token_ids != b.token_ids for a, b in zip(samples, again, strict=True))
    greedy = decoded(lm, REQUESTS, GREEDY)
    assert len({tuple(c.token_ids) for c in greedy}) == len({r.context for r in REQUESTS})


def test_greedy_decoding_does_not_use_the_noise_key() -> None:
    lm = tiny_lm("tiny-olmo2")
    assert_same(decoded(lm, SIXTEEN, GREEDY), decoded(lm, [Request(PROMPT)] * 16, GREEDY))


def test_a_low_temperature_decodes_as_greedy_does() -> None:
    lm = tiny_lm("tiny-qwen2")
    cold = decoded(lm, SIXTEEN[:4], replace(FREE, temperature=1e-4))
    assert [c.token_ids for c in cold] == [c.token_ids for c in decoded(lm, SIXTEEN[:4], GREEDY)]


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3"])
def test_a_tree_whose_nodes_saw_their_cousins_would_say_something_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with every earlier node of the row in sight, samples of one prompt disturb each other."""
    lm = tiny_lm(family)
    want = [c.logprobs for c in decoded(lm, SIXTEEN, FREE)]
    forward = decode_module._Tree._forward

    def see_all(self, *given):
        self._slot_sees = np.broadcast_to(np.tri(self._slot_sees.shape[1], dtype=bool), self._slot_sees.shape)
        return forward(self, *given)

    monkeypatch.setattr(decode_module._Tree, "_forward", see_all)
    got = [c.logprobs for c in decoded(lm, SIXTEEN, FREE)]
    assert [g[:1] for g in got] == [w[:1] for w in want]  # the first token is the prompt's own
    assert max(abs(g[1] - w[1]) for g, w in zip(got, want, strict=True)) > 100 * NATS


# ---- when a completion ends -----------------------------------------------------------------------------------


def with_ends(lm: LM, stop: Sequence[int] = (), newline: Sequence[int] = ()) -> LM:
    """The same model, where these ids end a text or carry a newline."""
    size = lm.vocabulary.ends_word.size
    return replace(lm, vocabulary=Vocabulary(lm.vocabulary.ends_word, np.isin(range(size), newline), frozenset(stop)))


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_a_completion_ends_by_its_token_and_not_by_its_length(limit: int) -> None:
    """The end token counts as an end even where it is the last one allowed; a cut one is `length`."""
    lm = tiny_lm("tiny-llama")
    request, sampling = next(
        (r, replace(FREE, max_new_tokens=limit)) for r in SIXTEEN if len(set(decoded(lm, [r], FREE)[0].token_ids)) == 4
    )
    tokens = decoded(lm, [request], FREE)[0].token_ids
    for ends, reason in (({"stop": tokens[2:3]}, "stop"), ({"newline": tokens[2:3]}, "newline")):
        (done,) = decoded(with_ends(lm, **ends), [request], sampling)
        assert done.token_ids == tokens[: min(limit, 3)]
        assert done.finish_reason == ("length" if limit < 3 else reason)
        assert len(done.logprobs) == len(done.margins) == len(done.token_ids)
        assert_same([done], [plain.complete(with_ends(lm, **ends), request, sampling)])


def test_a_newline_ends_a_completion_only_where_asked() -> None:
    lm = tiny_lm("tiny-llama")
    tokens = decoded(lm, SIXTEEN[:1], FREE)[0].token_ids
    carries = with_ends(lm, newline=tokens[:1])
    (short,) = decoded(carries, SIXTEEN[:1], FREE)
    (full,) = decoded(carries, SIXTEEN[:1], replace(FREE, stop_at_newline=False))
    assert (short.token_ids, short.finish_reason) == (tokens[:1], "newline")
    assert (full.token_ids, full.finish_reason) == (tokens, "length")
    # A token that ends the text is `stop`, even if it carried a newline as well.
    both = with_ends(lm, stop=tokens[:1], newline=tokens[:1])
    assert decoded(both, SIXTEEN[:1], FREE)[0].finish_reason == "stop"


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_finished_completions_leave_the_others_as_they_were(family: str) -> None:
    """A third of all tokens end a text here, so that rows and branches drop out at every step."""
    lm = with_ends(tiny_lm(family), stop=range(0, 260, 3))
    done = decoded(lm, REQUESTS, FREE)
    assert len({len(c.token_ids) for c in done}) > 2
    assert_same(done, [plain.complete(lm, r, FREE) for r in REQUESTS])


# ---- work -----------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Tokens of each forward, the rows and columns of their grid, and the cache length before and after it."""

    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


@contextmanager
def traffic(lm: LM) -> Iterator[Traffic]:
    seen, decoder = Traffic(), lm.model.base_model

    def before(_module, _args, kwargs) -> None:
        seen.tokens.append(kwargs["input_ids"].numel())
        layout = attend.active()
        assert layout is not None
        seen.rows.append(layout.q_positions.shape[0])
        seen.columns.append(layout.q_positions.shape[1])
        seen.before.append(kwargs["past_key_values"].get_seq_length())

    def after(_module, _args, kwargs, _output) -> None:
        seen.after.append(kwargs["past_key_values"].get_seq_length())

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def distinct_beginnings(done: Sequence[Completion]) -> int:
    """Texts whose continuation was needed: the proper, non-empty beginnings of the completions of one prompt."""
    return len({tuple(c.token_ids[:n]) for c in done for n in range(1, len(c.token_ids))})


@pytest.mark.parametrize("sharpness", [12.0, 60.0])  # at 60 samples often open with the same tokens
def test_each_distinct_text_is_forwarded_once(sharpness: float) -> None:
    lm = tiny_lm("tiny-llama", sharpness=sharpness)
    with traffic(lm) as seen:
        done = decoded(lm, SIXTEEN, FREE)
    assert sum(seen.tokens) == len(PROMPT) + distinct_beginnings(done)
    separately = sum(len(PROMPT) + len(c.token_ids) - 1 for c in done)
    assert sum(seen.tokens) < separately / 4
    if sharpness == 60.0:
        assert distinct_beginnings(done) < sum(len(c.token_ids) - 1 for c in done)


def test_a_common_start_is_forwarded_once_for_all_prompts() -> None:
    lm = tiny_lm("tiny-qwen3")
    contexts = [PROMPT[:25] + random_ids(5, i) for i in range(8)]
    assert len({c[25] for c in contexts}) > 1
    with traffic(lm) as seen:
        decoded(lm, [Request(c) for c in contexts], GREEDY)
    assert seen.tokens == [25 + 8 * 5, 8, 8, 8]


def test_every_forward_grows_the_cache_by_its_own_tokens() -> None:
    lm = with_ends(tiny_lm("tiny-gemma3"), stop=range(0, 260, 3))
    with traffic(lm) as seen:
        decoded(lm, REQUESTS, FREE)
    assert [a - b for a, b in zip(seen.after, seen.before, strict=True)] == seen.columns
    assert all(t <= r * c for t, r, c in zip(seen.tokens, seen.rows, seen.columns, strict=True))
    assert sum(seen.tokens) < sum(r * c for r, c in zip(seen.rows, seen.columns, strict=True)) / 1.5  # no padding is
    assert seen.rows[-1] < max(seen.rows)  # prompts that are finished leave the batch
    starts = [i for i, length in enumerate(seen.before) if length == 0]
    assert all(seen.before[i] == seen.after[i - 1] for i in range(len(seen.before)) if i not in starts)


# ---- drawing --------------------------------------------------------------------------------------------------

SKEWED = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()


def draws(logits: Tensor, sampling: Sampling, num: int = 20_000, step: int = 0) -> np.ndarray:
    """How often each token is drawn from one row of logits."""
    keys = torch.tensor([row_key(0, "draw", "c", i) for i in range(num)])
    tokens = sample(logits[None], keys, step, sampling, torch.zeros(num, dtype=torch.long))
    return np.bincount(tokens.numpy(), minlength=len(logits))


@pytest.mark.parametrize("step", [0, 5])
def test_tokens_are_drawn_as_often_as_the_softmax_says(step: int) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.7):
        counts = draws(logits, Sampling(1, temperature), step=step)
        expected = (logits / temperature).double().softmax(-1).numpy() * counts.sum()
        assert chisquare(counts, expected).pvalue > 1e-3
    # Control: frequencies of one temperature are not those of the other.
    other = logits.double().softmax(-1).numpy() * counts.sum()
    assert chisquare(counts, other).pvalue < 1e-9


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.97, 5), (1.0, 5)]
)
def test_top_p_keeps_the_token_that_crosses_the_threshold_and_no_more(top_p: float, kept: int) -> None:
    counts = draws(SKEWED, Sampling(1, 1.0, top_p))
    assert (counts > 0).tolist() == [i < kept for i in range(5)]
    expected = SKEWED[:kept].double().softmax(-1).numpy() * counts.sum()
    assert kept == 1 or chisquare(counts[:kept], expected).pvalue > 1e-3


def plain_draw(logits: np.ndarray, noise: np.ndarray, sampling: Sampling) -> int:
    """The rule of Holtzman et al. written out: sort, add up until top_p is reached, draw among those."""
    scaled = logits / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    kept, total = [], 0.0
    for token in np.argsort(-probs, kind="stable"):
        if total >= sampling.top_p:
            break
        kept.append(token)
        total += probs[token]
    return int(max(kept, key=lambda t: scaled[t] + noise[t]))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32), st.sampled_from([5, 129, 400]), st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_a_draw_equals_the_rule_written_out(seed: int, size: int, spread: float, top_p: float, heat: float) -> None:
    """Nuclei smaller and larger than the first guess, whichever other rows stand beside them."""
    rng = np.random.default_rng(seed)
    logits = np.concatenate([rng.normal(0, spread, (3, size)), rng.normal(0, 10, (1, size))]).astype(np.float32)
    keys, sampling, step = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 4)), Sampling(1, heat, top_p), 3
    noise = gumbel(keys, step, torch.arange(size).expand(4, -1)).numpy()
    want = [plain_draw(logits[i].astype(np.float64), noise[i], sampling) for i in range(4)]
    table = torch.from_numpy(logits)
    assert sample(table, keys, step, sampling).tolist() == want
    alone = [int(sample(table[i : i + 1], keys[i : i + 1], step, sampling)) for i in range(4)]
    assert alone == want


# ---- several models -------------------------------------------------------------------------------------------


def amplify(alphas: Sequence[float]):
    """after + α·(after − before), α for each request; the models are (before, after)."""
    table = torch.tensor(alphas)

    def combine(logits: tuple[Tensor, ...], index: Tensor) -> Tensor:
        before, after = logits
        return after + table[index][:, None] * (after - before)

    return combine


def plain_pair(before: LM, after: LM, request: Request, sampling: Sampling, alpha: float) -> Completion:
    """Two models decoded together in the plainest way."""
    done = Completion()
    for step in range(sampling.max_new_tokens):
        text = [*request.context, *done.token_ids]
        a, b = plain.next_logits(before, text)[-1:], plain.next_logits(after, text)[-1:]
        logits = b + alpha * (b - a)
        greedy = sampling.temperature == 0
        token = int(logits.argmax()) if greedy else plain.draw(logits[0].double().numpy(), request.key, step, sampling)
        best = logits[0].topk(2).values
        done.token_ids.append(token)
        done.logprobs.append(float(logits.log_softmax(-1)[0, token]))
        done.margins.append(float(best[0] - best[1]))
        if token in after.vocabulary.stop_ids or after.vocabulary.has_newline[token]:
            done.finish_reason = "stop" if token in after.vocabulary.stop_ids else "newline"
            break
    return done


PAIRS = [("tiny-llama", "tiny-llama"), ("tiny-gemma2", "tiny-gpt2")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("sampling", [GREEDY, FREE])
def test_two_models_decode_one_text_as_the_plain_loop_does(first: str, second: str, sampling: Sampling) -> None:
    before, after = tiny_lm(first, seed=1), tiny_lm(second)
    alphas = [0.0, 0.5, -0.5, 1.5] * 4
    together = decoded([before, after], REQUESTS, sampling, amplify(alphas))
    want = [plain_pair(before, after, r, sampling, a) for r, a in zip(REQUESTS, alphas, strict=True)]
    assert_same(together, want)
    for alpha in set(alphas):  # a row's α is its own: separate runs of each give the same rows
        rows = [i for i, a in enumerate(alphas) if a == alpha]
        separate = decoded([before, after], [REQUESTS[i] for i in rows], sampling, amplify([alpha] * len(rows)))
        assert_same(separate, [together[i] for i in rows])


@pytest.mark.parametrize("sampling", [GREEDY, FREE, NUCLEUS])
def test_a_combination_that_ignores_the_second_model_is_the_first_alone(sampling: Sampling) -> None:
    one, other = tiny_lm("tiny-qwen3"), tiny_lm("tiny-neox", seed=1)
    alone = decoded(one, REQUESTS, sampling)
    assert_same(decoded([one, other], REQUESTS, sampling, lambda logits, _: logits[0]), alone)
    assert_same(decoded([other, one], REQUESTS, sampling, amplify([0.0] * len(REQUESTS))), alone)
    # Control: with some of the other model in it the text is another.
    mixed = decoded([other, one], REQUESTS, sampling, amplify([1.0] * len(REQUESTS)))
    assert [c.token_ids for c in mixed] != [c.token_ids for c in alone]


def test_the_same_prompt_with_several_alphas_shares_what_it_can() -> None:
    """Requests that differ in α alone share the prompt, and the branches they agree on."""
    before, after = tiny_lm("tiny-llama", seed=1), tiny_lm("tiny-llama")
    alphas = [0.0, 0.01, 0.02, 3.0]
    requests = [Request(PROMPT, key=7)] * 4
    with traffic(after) as seen:
        done = decoded([before, after], requests, FREE, amplify(alphas))
    assert sum(seen.tokens) == len(PROMPT) + distinct_beginnings(done)
    assert_same(done, [plain_pair(before, after, requests[0], FREE, a) for a in alphas])


# ---- failures stay alone --------------------------------------------------------------------------------------


def poisoned_lm(token: int) -> LM:
    """A model of its own whose logits are NaN once a token was seen, as in half precision where a value overflows."""
    model = build_model("tiny-llama")
    lm = assemble(model, Codec(byte_tokenizer()), identity("poisoned"))
    model.model.embed_tokens.weight[token] = torch.nan
    return lm


@pytest.mark.parametrize("sampling", [GREEDY, FREE, NUCLEUS])
def test_a_prompt_whose_logits_are_not_finite_fails_alone(sampling: Sampling) -> None:
    contexts = [random_ids(10, 1), (5, 256, 6), random_ids(4, 1), random_ids(20, 1)]
    lm = poisoned_lm(256)  # no other context holds 256, which ends a text and so is never read
    results = decode([lm], [Request(c, 3) for c in contexts], sampling)
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, False, False]
    assert "not finite" in str(results[1])
    for context, got in zip(contexts, results, strict=True):
        if isinstance(got, Completion):
            assert_same([got], [plain.complete(lm, Request(context, 3), sampling)])


def test_a_completion_that_turns_not_finite_fails_alone() -> None:
    """Samples of one prompt share a row: masked is not enough to keep a NaN in it from the others, 0 × NaN is NaN."""
    usual = decoded(tiny_lm("tiny-llama"), SIXTEEN, FREE)
    poison = next(t for t in usual[0].token_ids[:3] if t not in PROMPT)
    hit = [poison in c.token_ids[:-1] for c in usual]  # the last token is never read
    assert any(hit)
    assert not all(hit)
    results = decode([poisoned_lm(poison)], SIXTEEN, FREE)
    assert [isinstance(r, ItemFailed) for r in results] == hit
    good = [(r, u) for r, u in zip(results, usual, strict=True) if isinstance(r, Completion)]
    assert_same([g for g, _ in good], [u for _, u in good])


def test_a_combination_that_is_not_finite_for_one_row_fails_that_row_alone() -> None:
    before, after = tiny_lm("tiny-llama", seed=1), tiny_lm("tiny-llama")
    results = decode([before, after], REQUESTS[:4], FREE, amplify([0.0, math.inf, 1.0, math.nan]))
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, False, True]


def test_a_prompt_that_does_not_fit_fails_alone() -> None:
    lm = replace(tiny_lm("tiny-gpt2"), max_positions=30)
    contexts = [random_ids(26, 1), random_ids(27, 1), (), random_ids(5, 1)]
    results = decode([lm], [Request(c) for c in contexts], GREEDY)
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, True, False]
    assert "1 to 26 tokens of context, has 27" in str(results[1])
    assert_same([results[0]], [plain.complete(lm, Request(contexts[0]), GREEDY)])  # type: ignore[list-item]


def test_no_request_gives_no_completion() -> None:
    assert decode([tiny_lm("tiny-llama")], [], GREEDY) == []


def test_several_models_need_a_function_that_combines_them() -> None:
    with pytest.raises(AssertionError, match="combines"):
        decode([tiny_lm("tiny-llama")] * 2, REQUESTS, GREEDY)
