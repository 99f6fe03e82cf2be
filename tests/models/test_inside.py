"""One forward, many measurements: each equals the model's own output or a slow reference, alone and in any batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from harness.errors import ItemFailed, NotFinite
from harness.models import inside, plain
from harness.models.inside import NUM_NEURONS, Probe, Span, StepView, View, lens_log_p, look_inside
from harness.models.load import LM, Codec, assemble
from harness.models.measure import SPANS
from harness.text.words import Tokens
from harness.tolerance import TOLERANCE
from tests.models.test_taps import ALL, captured, lm_of, random_ids
from tests.tiny import build_model, byte_tokenizer, identity

OF_PROBS = TOLERANCE["float32"].prob
OF_NATS = 5e-5  # on log-probabilities, entropies and divergences
TARGETS = (7, 8, 200)
PARTS: Mapping[str, Span | None] = {"instruction": (0, 9), "negation": (4, 6), "mention": (7, 8), "question": (10, 16)}


def probe_at(
    context: Tokens,
    answer: Tokens = (50, 60, 70, 80),
    decision: int = 3,
    keep_whole: bool = True,
    targets: Tokens = TARGETS,
    spans: Mapping[str, Span | None] = PARTS,
) -> Probe:
    last = len(context) - 1
    return Probe(
        (*context, *answer[:decision]),
        (last, last + decision),
        (answer[0], answer[decision]),
        targets,
        spans,
        keep_whole,
    )


CONTEXTS = [random_ids(n, 21) for n in (36, 17, 24)]
PROBES = [probe_at(CONTEXTS[0]), probe_at(CONTEXTS[1], decision=0), probe_at(CONTEXTS[2], decision=1, keep_whole=False)]
"""Longer and shorter than the tiny sliding windows; the decision at the first step, at the second and at the fourth."""


def views_of(lm: LM, probes: Sequence[Probe]) -> list[View]:
    views = look_inside(lm, probes)
    assert all(isinstance(v, View) for v in views), views
    return views  # type: ignore[return-value]


def arrays(step: StepView) -> dict[str, np.ndarray]:
    """Everything in one step, by name."""
    found = {
        "masses": step.masses,
        "mean_row": step.mean_row,
        "p_in": step.p_in,
        "p_attn": step.p_attn,
        "p_out": step.p_out,
    }
    found |= step.lens
    return found | ({} if step.rows is None or step.resid is None else {"rows": step.rows, "resid": step.resid})


def gap(a: View, b: View) -> float:
    """Greatest difference of two views in units of what is allowed; the same arrays of the same shapes must be there."""
    greatest = 0.0
    for x, y in zip(a.steps, b.steps, strict=True):
        mine, other = arrays(x), arrays(y)
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].shape == other[name].shape, name
            scale = {"entropy": OF_NATS, "kl_final": OF_NATS, "resid": 2e-5 * np.abs(mine[name]).max()}.get(
                name, OF_PROBS
            )
            if name != "top_ids":  # two tokens of nearly the same probability may change places
                greatest = max(greatest, float(np.abs(mine[name] - other[name]).max()) / scale)
    norms = np.abs(a.resid_norm / b.resid_norm - 1).max() / 2e-5
    return max(greatest, float(norms))


# ---- the last layer is the model's output ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_last_layers_lens_is_the_models_output(family: str) -> None:
    lm = lm_of(family)
    for probe, view in zip(PROBES, views_of(lm, PROBES), strict=True):
        logits = plain.next_logits(lm, probe.tokens)
        for step, at, emitted in zip(view.steps, probe.at, probe.emitted, strict=True):
            p = logits[at].double().softmax(-1).numpy()
            assert step.p_out[-1] == pytest.approx(p[list(TARGETS)].sum(), abs=OF_PROBS)
            assert step.lens["p_target"][-1] == step.p_out[-1]
            assert step.lens["p_emitted"][-1] == pytest.approx(p[emitted], abs=OF_PROBS)
            assert step.lens["kl_final"][-1] == 0.0
            assert step.lens["entropy"][-1] == pytest.approx(scipy.stats.entropy(p), abs=OF_NATS)
            order = np.argsort(-p)[:5]
            assert step.lens["top_ids"][-1].tolist() == order.tolist()
            assert step.lens["top_probs"][-1] == pytest.approx(p[order], abs=OF_PROBS)
            # Control: no earlier layer says the same.
            assert (step.lens["kl_final"][:-1] > 1e-3).all()
            assert scipy.stats.entropy(p) < np.log(260) - 0.3, "and the output is not flat"


class _Twice(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x))


@pytest.mark.parametrize("family", ALL)
def test_a_final_norm_applied_twice_is_seen(family: str) -> None:
    """Control: the lens of what Hugging Face calls the last hidden state, which is normed already."""
    lm = lm_of(family)
    p = plain.next_logits(lm, PROBES[0].tokens)[-1].double().softmax(-1)
    with torch.inference_mode():
        states = lm.model(input_ids=torch.tensor([PROBES[0].tokens]), output_hidden_states=True).hidden_states
        normed = lens_log_p(lm, states[-1][0, -1:]).double().exp()[0]
        earlier = lens_log_p(lm, states[-2][0, -1:])
    assert float((normed - p).abs().sum()) > 1e-2
    twice = replace(lm, anatomy=replace(lm.anatomy, final_norm=_Twice(lm.anatomy.final_norm)))
    (broken,), (whole,) = views_of(twice, PROBES[:1]), views_of(lm, PROBES[:1])
    assert np.abs(broken.steps[1].lens["top_probs"][-1] - p.topk(5).values.numpy()).max() > 100 * OF_PROBS
    # All earlier hidden states are raw, and their lens is the layer's.
    assert float(earlier[0, PROBES[0].emitted[1]].exp()) == pytest.approx(
        whole.steps[1].lens["p_emitted"][-2], abs=OF_PROBS
    )


# ---- every layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_every_layer_equals_a_forward_with_every_output_recorded(family: str) -> None:
    lm = lm_of(family)
    num_apart = 0
    for probe, view in zip(PROBES, views_of(lm, PROBES), strict=True):
        for n, (step, at, emitted) in enumerate(zip(view.steps, probe.at, probe.emitted, strict=True)):
            want = plain.layers(lm, probe, at, emitted)
            for name in ("p_in", "p_attn", "p_out"):
                assert getattr(step, name) == pytest.approx(want[name], abs=OF_PROBS), name
            assert step.lens["p_emitted"] == pytest.approx(want["p_emitted"], abs=OF_PROBS)
            for name in ("entropy", "kl_final"):
                assert step.lens[name] == pytest.approx(want[name], abs=OF_NATS), name
            # Control: another layer's numbers are others.
            num_apart += int((np.abs(want["p_out"] - np.roll(want["p_out"], 1)) > 10 * OF_PROBS).sum())
            assert view.resid_norm == pytest.approx(want["resid_norm"], rel=2e-5)
            assert view.top_neurons is not None
            assert view.top_values is not None
            assert view.top_neurons.shape == (len(lm.anatomy.blocks), NUM_NEURONS)
            if n == 0:  # neurons are those of the first step
                taken = np.take_along_axis(want["neurons"], view.top_neurons, axis=1)
                scale = np.abs(want["neurons"]).max()
                assert view.top_values / scale == pytest.approx(taken / scale, abs=2e-5)
                largest = np.sort(np.abs(want["neurons"]), axis=1)[:, ::-1][:, :NUM_NEURONS]
                assert np.abs(view.top_values) / scale == pytest.approx(largest / scale, abs=2e-5)
    assert num_apart > 10


@pytest.mark.parametrize("family", ALL)
def test_contributions_telescope_from_the_embedding_to_the_final_probability(family: str) -> None:
    lm = lm_of(family)
    for probe, view in zip(PROBES, views_of(lm, PROBES), strict=True):
        for step, at in zip(view.steps, probe.at, strict=True):
            attn, ffn = step.p_attn - step.p_in, step.p_out - step.p_attn
            assert (attn + ffn).sum() == pytest.approx(step.p_out[-1] - step.p_in[0], abs=1e-12)
            assert step.p_in[1:].tolist() == step.p_out[:-1].tolist()
            # The two ends are not bookkeeping: the token alone, unembedded, and what the model says.
            with torch.inference_mode():
                entering = lens_log_p(lm, captured_input(lm, probe.tokens, at)).double().exp()[0]
                final = plain.next_logits(lm, probe.tokens)[at].double().softmax(-1)
            assert step.p_in[0] == pytest.approx(float(entering[list(TARGETS)].sum()), abs=OF_PROBS)
            assert step.p_out[-1] == pytest.approx(float(final[list(TARGETS)].sum()), abs=OF_PROBS)
            # Control: without one of its terms the sum is another.
            assert np.abs(attn).max() > 10 * OF_PROBS
            assert np.abs(ffn).max() > 10 * OF_PROBS


def captured_input(lm: LM, tokens: Tokens, at: int) -> torch.Tensor:
    """What enters the first block, read off without `taps`."""
    seen: list[torch.Tensor] = []
    handle = lm.anatomy.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([tokens]), use_cache=False)
    handle.remove()
    return seen[0][0, at][None]


# ---- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_attention_is_eager_attentions_and_is_summed_and_averaged_as_said(family: str) -> None:
    lm = lm_of(family)
    for probe, view in zip(PROBES, views_of(lm, PROBES), strict=True):
        assert len(view.steps) == 2
        for step, at in zip(view.steps, probe.at, strict=True):
            rows = plain.attention_rows(lm, probe.tokens, at)
            assert (step.rows is None) == (not probe.keep_whole)
            if step.rows is not None:
                assert step.rows == pytest.approx(rows, abs=OF_PROBS)
                assert step.rows.sum(-1) == pytest.approx(1.0, abs=OF_PROBS)
            assert step.mean_row == pytest.approx(rows.mean(1), abs=OF_PROBS)
            for column, name in enumerate(SPANS):
                span = probe.spans[name]
                assert span is not None
                by_hand = np.zeros(rows.shape[:2])
                for key in range(*span):
                    by_hand += rows[:, :, key]
                assert step.masses[:, :, column] == pytest.approx(by_hand, abs=OF_PROBS), name
    # Control: the spans' masses are not each other's, nor nothing.
    masses = views_of(lm, PROBES)[1].steps[0].masses
    assert (np.abs(masses[:, :, 0] - masses[:, :, 3]).max(-1) > 1e-3).all()
    assert masses.max() > 0.1


def test_a_span_that_is_missing_weighs_nothing_and_the_others_keep_their_weight() -> None:
    lm = lm_of("tiny-llama")
    without = replace(PROBES[0], spans={**PARTS, "negation": None})
    unnamed = replace(PROBES[0], spans={k: v for k, v in PARTS.items() if k != "negation"})
    whole, *others = (v.steps[0].masses for v in views_of(lm, [PROBES[0], without, unnamed]))
    for masses in others:
        assert (masses[:, :, 1] == 0).all()
        assert masses[:, :, [0, 2, 3]] == pytest.approx(whole[:, :, [0, 2, 3]], abs=OF_PROBS)
    assert (whole[:, :, 1] > 0).all()


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "granite"])
def test_a_residual_stream_is_kept_whole_for_those_asked_for_and_no_other(family: str) -> None:
    lm = lm_of(family)
    views = views_of(lm, PROBES)
    with torch.inference_mode():
        blocks = lm.model(input_ids=torch.tensor([PROBES[1].tokens]), output_hidden_states=True).hidden_states
    first = views[1].steps[0]
    assert first.resid is not None
    assert first.resid.shape == (len(lm.anatomy.blocks) + 1, 64)
    for n, state in enumerate(blocks[:-1]):  # the last is normed
        assert first.resid[n] == pytest.approx(state[0, 16].numpy(), abs=2e-5 * float(state.abs().max()))
    assert views[2].steps[0].resid is None
    assert views[2].steps[0].rows is None


# ---- steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_first_step_does_not_know_the_answer_and_the_decision_step_does(family: str) -> None:
    """One forward of context and answer gives both: causality keeps the first step what it is without the answer."""
    lm, answer = lm_of(family), (50, 60, 70, 80)
    (both,) = views_of(lm, [probe_at(CONTEXTS[0], answer, 3)])
    (alone,) = views_of(lm, [Probe(CONTEXTS[0], (35,), (50,), TARGETS, PARTS, keep_whole=True)])
    (later,) = views_of(lm, [Probe((*CONTEXTS[0], *answer[:3]), (38,), (80,), TARGETS, PARTS, keep_whole=True)])
    assert gap(View([both.steps[0]], both.resid_norm[:, :36]), alone) < 1
    assert gap(View([both.steps[1]], both.resid_norm), later) < 1
    assert both.steps[0].mean_row.shape[1] == 36
    assert both.steps[1].mean_row.shape[1] == 39
    # Control: the two steps are two things.
    assert np.abs(both.steps[0].p_out - both.steps[1].p_out).max() > 10 * OF_PROBS
    assert both.top_values is not None
    assert alone.top_values is not None
    assert both.top_values == pytest.approx(alone.top_values, rel=1e-3)


def test_a_decision_at_the_first_step_gives_that_step_twice() -> None:
    for step in ("p_in", "p_attn", "p_out", "masses", "mean_row"):
        first, decision = (getattr(s, step) for s in views_of(lm_of("tiny-qwen2"), PROBES)[1].steps)
        assert np.array_equal(first, decision)


# ---- batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_probe_gives_the_same_alone_and_in_any_batch(family: str) -> None:
    lm = lm_of(family)
    probes = [*PROBES, probe_at(random_ids(70, 5), decision=2), probe_at(random_ids(17, 5), decision=0)]
    alone = [views_of(lm, [p])[0] for p in probes]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0], [1, 1, 3, 1], [3, 4]):
        for view, n in zip(views_of(lm, [probes[i] for i in order]), order, strict=True):
            assert gap(view, alone[n]) < 1
            assert view.resid_norm.shape[1] == len(probes[n].tokens), "padding is cut off"
    assert gap(alone[1], alone[4]) > 100, "control: of another probe of the same shape the numbers are others"


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_the_head_may_be_applied_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("tiny-qwen3")
    want = views_of(lm, PROBES)
    monkeypatch.setattr(inside, "_HEAD_ROWS", block)
    for got, view in zip(views_of(lm, PROBES), want, strict=True):
        assert gap(got, view) < 1


def test_no_targets_have_no_probability() -> None:
    (view,) = views_of(lm_of("tiny-llama"), [probe_at(CONTEXTS[1], targets=())])
    assert view.steps[0].p_out.tolist() == [0.0] * 4
    assert view.steps[0].lens["entropy"].min() > 0


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_half_precision_comes_back_as_float32_near_the_whole(family: str) -> None:
    """Bfloat16 keeps three digits: far from equal, but each layer is its own layer."""
    narrow, wide = (
        assemble(build_model(family, dtype=d), Codec(byte_tokenizer()), identity(family, n))
        for d, n in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32"))
    )
    (half,), (whole,) = views_of(narrow, PROBES[:1]), views_of(wide, PROBES[:1])
    assert half.resid_norm.dtype == half.steps[0].mean_row.dtype == np.float32
    assert half.steps[0].resid is not None
    assert half.steps[0].resid.dtype == np.float32
    assert half.steps[0].lens["kl_final"][-1] == 0.0
    assert half.resid_norm == pytest.approx(whole.resid_norm, rel=0.1)
    assert half.steps[0].mean_row.sum(-1) == pytest.approx(1.0, abs=OF_PROBS)


# ---- failures stay alone --------------------------------------------------------------------------------------

POISON = 255


def poisoned_lm(token: int = POISON, family: str = "tiny-llama") -> LM:
    """A model of its own that gives NaN after one token, as half precision does where a value overflows."""
    model = build_model(family)
    lm = assemble(model, Codec(byte_tokenizer()), identity("poisoned"))
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)  # a head may be tied to it
    embedding.weight[token] = torch.nan
    return lm


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_a_probe_whose_numbers_are_not_finite_fails_alone(family: str) -> None:
    lm = poisoned_lm(family=family)
    ill = probe_at((*CONTEXTS[1][:8], POISON, *CONTEXTS[1][9:]))
    late = probe_at(CONTEXTS[1], answer=(50, POISON, 70, 80))  # its first step is sound, its decision is not
    good = [views_of(lm, [p])[0] for p in PROBES]
    results = look_inside(lm, [PROBES[0], ill, PROBES[1], late, PROBES[2]])
    assert [isinstance(r, NotFinite) for r in results] == [False, True, False, True, False]
    assert "not finite" in str(results[1])
    for got, want in zip(results[::2], good, strict=True):
        assert isinstance(got, View)
        assert gap(got, want) < 1


def test_what_stands_in_the_padding_is_not_the_probes_fault() -> None:
    """A masked NaN is still a NaN (0 × NaN): padding that overflows must not fail the probe it stands behind."""
    lm = poisoned_lm(token=0)
    assert not any(0 in p.tokens for p in PROBES)
    alone = [views_of(lm, [p])[0] for p in PROBES]
    for got, want in zip(look_inside(lm, PROBES), alone, strict=True):
        assert isinstance(got, View), got
        assert gap(got, want) < 1


def test_a_probe_longer_than_the_model_reaches_fails_alone() -> None:
    lm = replace(lm_of("tiny-gpt2"), max_positions=30)
    fits = probe_at(random_ids(27, 1), decision=3)
    results = look_inside(lm, [PROBES[0], fits, probe_at(random_ids(28, 1)), Probe((), (), (), (), {}), PROBES[1]])
    assert [isinstance(r, ItemFailed) for r in results] == [True, False, True, True, False]
    assert "31 positions, the model has 30" in str(results[2])
    assert "at least one token" in str(results[3])
    for got, probe in ((results[1], fits), (results[4], PROBES[1])):
        assert isinstance(got, View)
        assert gap(got, views_of(lm, [probe])[0]) < 1
    assert look_inside(lm, []) == []
    assert [isinstance(r, ItemFailed) for r in look_inside(lm, [PROBES[0]])] == [True]


def test_gpt2_is_looked_into_up_to_its_last_position() -> None:
    lm = lm_of("tiny-gpt2")
    full, over = look_inside(lm, [probe_at(random_ids(1021, 1)), probe_at(random_ids(1022, 1))])
    assert isinstance(full, View)
    assert isinstance(over, ItemFailed)


def test_the_shared_model_is_as_it_was() -> None:
    """All the tests above read one model: none may have left a hook in it or changed a weight."""
    found = captured(lm_of("tiny-llama"))
    lm_of.cache_clear()
    again = captured(lm_of("tiny-llama"))
    assert all(torch.equal(a, b) for a, b in zip(found.resid, again.resid, strict=True))
