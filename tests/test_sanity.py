"""The certificate: green where the fast path is right, red for every bug that has been made in one like it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from harness import store
from harness.engine import Item, Tables
from harness.engine.plan import CPU_BUDGET
from harness.errors import EnvironmentFault, ItemFailed, NotFinite
from harness.experiments.certificate import Asked, Certificate, Verdict, Work
from harness.experiments.gravity import certificate as stage
from harness.experiments.gravity.certificate import (
    Bench,
    GravityChecks,
    Sampler,
    Subject,
    Task,
    certificate_of,
    check,
    subjects_of,
    tables_of,
    tasks_of,
)
from harness.experiments.gravity.conditions import Template
from harness.experiments.gravity.stages.mechanism import probe_of
from harness.experiments.gravity.stages.prompts import context_row
from harness.models import attend, inside, patch, plain, taps
from harness.models import decode as decode_module
from harness.models import score as score_module
from harness.models.attend import Layout
from harness.models.cells import Cells, Late, shared_cells
from harness.models.decode import Completion, Sampling
from harness.models.inside import View, look_inside
from harness.models.load import LM, ModelSpec, identify, load, load_codec
from harness.models.patch import PATCHES
from harness.models.score import TreeScores
from harness.text.prompts import Prompt
from harness.text.words import Trie
from harness.tolerance import TOLERANCE, Tolerance
from tests import gravity
from tests.cases import some_of
from tests.commands import DATA, Told, harness, manifest, only_run, prompt_file, query
from tests.gravity import resolve
from tests.tiny import build_model, byte_tokenizer, tiny_lm

DEMO = DATA / "models" / "demo"
SCORES = {"p_sem", "p_word", "paper_p_sem", "logprobs", "entropy"}
TOKENS = {"greedy", "samples"}
INSIDE = {"attention", "lens", "lens_nats", "decomposition", "resid_norm", "neurons"}
PATCHED = {f"patch {name}" for name in PATCHES}
EVERYTHING = SCORES | TOKENS | INSIDE | PATCHED
HOT = Sampler(Sampling(6), Sampling(8, 3.0, 1.0))
"""The demo model's second token is all but certain at T=1, where no noise would change it."""
COOL = Sampler(Sampling(4), Sampling(4, 1.0, 0.9))


def red(verdicts: Sequence[Verdict]) -> set[str]:
    return {v.measurement for v in verdicts if not v.ok}


def named(verdicts: Sequence[Verdict], name: str) -> Verdict:
    (found,) = (v for v in verdicts if v.measurement == name)
    return found


# Green


@pytest.fixture(scope="module")
def demo() -> LM:
    return load(ModelSpec(str(DEMO)))


@pytest.fixture(scope="module")
def demo_subjects() -> list[Subject]:
    """Two prompts of different lengths, in both conditions."""
    given = gravity.prepare(resolve({"data.limit": "2"}, None, {})).inputs
    tables, codec = tables_of(given, 2), load_codec(given.model, given.identity)
    targets = {p["prompt_id"]: p["target"] for p in tables["prompts"]}
    return subjects_of(tables["contexts"], targets, codec, given.seed)


@pytest.fixture(scope="module")
def green(demo: LM, demo_subjects: list[Subject]) -> list[Verdict]:
    """The certificate of the code as it is: the control of every break below."""
    return check(demo, demo_subjects, HOT)


def test_the_certificate_of_the_demo_model_is_green_and_names_every_measurement(green: list[Verdict]) -> None:
    assert [v.measurement for v in green if not v.ok] == []
    assert {v.measurement for v in green} == EVERYTHING
    assert len(green) == 4 * len(EVERYTHING - PATCHED) + 2 * 3 * len(PATCHED), (
        "two of four are patched, in three layers"
    )
    assert all(
        v.num_items >= 1 and v.flips == 0 and v.worst and np.isfinite(v.max_abs) for v in green if v.max_abs is not None
    )
    assert max(v.max_abs or 0.0 for v in green) > 0, "two different computations are compared"


def test_the_command_prints_the_whole_certificate_and_exits_0() -> None:
    told = harness("sanity", "--num-prompts", 2)
    assert told.code == 0, told.out
    assert "2 subjects" in told.out
    assert lines_of(told, "ok") == EVERYTHING
    assert "DISAGREES" not in told.out


def lines_of(told: Told, verdict: str) -> set[str]:
    """The measurements whose line has this verdict."""
    rows = ([cell.strip() for cell in line.split("│")] for line in told.out.splitlines())
    return {row[1] for row in rows if len(row) > 8 and row[8].startswith(verdict)}


TEMPLATES = {
    "baseline": Template("Say a letter.\nQ: {question}\nA:"),
    "negative": Template('Say a letter.\nDo not use "{target}".\nQ: {question}\nA:'),
}


def tiny_subjects(lm: LM, targets: Mapping[str, str]) -> list[Subject]:
    """Bytes are many, so the texts are short; they are longer than the tiny sliding windows (16) all the same."""
    prompts = [Prompt(name, "letters", name, target, None, None, (), "") for name, target in targets.items()]
    rows = [context_row(lm.codec, p, name, t, False) for p in prompts for name, t in TEMPLATES.items()]
    assert min(len(row["token_ids"]) for row in rows) > 20
    return subjects_of(rows, targets, lm.codec, 0)


FAMILIES = ("tiny-gemma3", "tiny-neox", "tiny-mistral", "tiny-qwen3", "tiny-gemma2", "tiny-olmo2", "tiny-gpt2")


@pytest.mark.parametrize("family", some_of(FAMILIES, 2))
def test_the_certificate_is_green_on_families_of_other_builds(family: str) -> None:
    """Sliding windows, normed queries, soft caps, norms around and behind, absolute positions, parallel parts."""
    lm = tiny_lm(family)
    verdicts = check(lm, tiny_subjects(lm, {"first?": "hi", "so": "q"}), COOL)
    assert red(verdicts) == set()
    assert {v.measurement for v in verdicts} == EVERYTHING


# Red

Break = Callable[[pytest.MonkeyPatch], Any]


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token after the first stands one place too far for each one before it (RoPE does not see a common shift)."""
    real = score_module.Layout
    monkeypatch.setattr(score_module, "Layout", lambda q, k, *more, **given: real(2 * q, k, *more, **given))


def open_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node sees all nodes of its item, not just its ancestors."""
    monkeypatch.setattr(Trie, "ancestry", lambda self: np.ones((len(self), len(self)), dtype=bool))


def ignore_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of step 0 at every step."""
    real = decode_module.sample
    monkeypatch.setattr(decode_module, "sample", lambda logits, keys, step, *rest: real(logits, keys, 0, *rest))


def open_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """New nodes see the padding behind the shorter prompts of their batch."""
    real = decode_module.Layout
    monkeypatch.setattr(
        decode_module,
        "Layout",
        lambda q, k, allowed=None, **more: real(q, k, None if allowed is None else allowed | True, **more),
    )


def pad_texts_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes padded on the left, positions and causality as if on the right."""

    def left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Layout]:
        width = max(map(len, texts))
        tokens = torch.tensor([[*[0] * (width - len(t)), *t] for t in texts], device=device)
        positions = torch.arange(width, device=device).expand(len(texts), width)
        return tokens, Layout(positions, positions)

    monkeypatch.setattr(inside, "right_padded", left_padded)


def pad_trees_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of scoring trees, one a context, pushed to the right end; the layout left where it was."""
    real = score_module.tree_batch

    def left_padded(contexts: Sequence[Sequence[int]], tries: Sequence[Trie], *rest: Any) -> Any:
        tokens, layout = real(contexts, tries, *rest)
        filled = [len(context) + len(trie) for context, trie in zip(contexts, tries, strict=True)]
        rolled = [row.roll(tokens.shape[1] - n) for row, n in zip(tokens, filled, strict=True)]
        return torch.stack(rolled), layout

    monkeypatch.setattr(score_module, "tree_batch", left_padded)


def pad_prompts_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts to be continued padded on the left, everything else as if on the right."""
    real_init, real_hidden = decode_module._Tree.__init__, LM.hidden
    prompts: list[Sequence[Sequence[int]]] = []

    def init(self: Any, lms: Sequence[LM], contexts: Sequence[tuple[int, ...]], is_apart: bool = False) -> None:
        prompts.append(contexts)
        real_init(self, lms, contexts, is_apart)
        prompts.pop()

    def hidden(self: LM, token_ids: Tensor, layout: Layout, cache: Any = None) -> Tensor:
        if prompts and len(token_ids) == len(prompts[-1]):
            width = max(map(len, prompts[-1]))
            rolled = [row.roll(width - len(c)) for row, c in zip(token_ids, prompts[-1], strict=True)]
            token_ids = torch.stack(rolled)
        return real_hidden(self, token_ids, layout, cache)

    monkeypatch.setattr(decode_module._Tree, "__init__", init)
    monkeypatch.setattr(LM, "hidden", hidden)


def lose_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No position ids: the decoder counts from the length of its cache, whatever stands in it."""

    def hidden(self: LM, token_ids: Tensor, layout: Layout, cache: Any = None) -> Tensor:
        cells = layout.cells
        if cells is not None:
            token_ids = cells.gather(token_ids)
        with attend.use(layout, is_cached=cache is not None):
            output = self.model.base_model(input_ids=token_ids, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state if cells is None else cells.spread(output.last_hidden_state)

    monkeypatch.setattr(LM, "hidden", hidden)


def lose_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is handed no mask, as where it is registered without one: SDPA is causal on its own or not at all."""
    monkeypatch.setattr(Layout, "is_causal", lambda self, window, layer=None: True)


def see_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens look at the future, at their siblings and at padding."""

    def mask(self: Layout, window: int | None = None, layer: int | None = None) -> Tensor:
        (rows, queries), keys = self.q_positions.shape, self.k_positions.shape[1]
        return torch.ones(rows, 1, queries, keys, dtype=torch.bool)

    monkeypatch.setattr(Layout, "is_causal", lambda self, window, layer=None: False)
    monkeypatch.setattr(Layout, "mask", mask)


def share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork whose rows are one and the same: what is patched in one is patched in all."""

    def fork(cache: Any, rows: int) -> Any:
        forked: Any = real(cache, rows)
        for layer, source in zip(forked.layers, cache.layers, strict=True):
            layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (source.keys, source.values))
        return forked

    real = patch.fork
    monkeypatch.setattr(patch, "fork", fork)


def norm_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The final norm on what is normed already, as for Hugging Face's last hidden state."""

    def lens_log_p(lm: LM, resid: Tensor) -> Tensor:
        norm = lm.anatomy.final_norm
        return lm.logits(norm(norm(resid))).log_softmax(-1)

    monkeypatch.setattr(inside, "lens_log_p", lens_log_p)


def read_rows_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention rows of the token before the one asked for."""
    real = taps.watch_rows
    monkeypatch.setattr(taps, "watch_rows", lambda at, receive: real((at - 1).clamp_min(0), receive))


def shift_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls on each part of a prompt, a token too far to the right."""
    real = inside.measure.span_masses
    monkeypatch.setattr(inside.measure, "span_masses", lambda weights, spans: real(weights, spans.roll(1, -1)))


def patch_the_next_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the source has at layer l + 1 is put in at layer l (the first one's at the last)."""
    real = patch._edits

    def edits(lm: LM, found: Any, name: str, rows: Sequence[tuple[int, int]]) -> list[Any]:
        num = len(lm.anatomy.blocks)
        others = real(lm, found, name, [(row, (layer + 1) % num) for row, layer in rows])
        return [replace(e, values=o.values) for e, o in zip(real(lm, found, name, rows), others, strict=True)]

    monkeypatch.setattr(patch, "_edits", edits)


def leave_keys_unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys moved to another place with the rotation of the place they come from."""
    monkeypatch.setattr(patch, "_shift", lambda lm, move: 0)


def knock_out_one_token_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of the prohibition stays in sight."""
    real = patch._knockouts

    def knockouts(pair: Any, names: Any, allowed: Tensor) -> Any:
        start, end = pair.prohibition
        return real(replace(pair, prohibition=(start, end - 1)), names, allowed)

    monkeypatch.setattr(patch, "_knockouts", knockouts)


def see_the_words_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The continuation after a patch looks at the spellings that were scored beside it."""
    real = patch._next_layout

    def layout(*given: Any) -> Layout:
        right = real(*given)
        return Layout(right.q_positions, right.k_positions, right._allowed | True, cells=right.cells)  # type: ignore[operator]

    monkeypatch.setattr(patch, "_next_layout", layout)


def share_one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token in which a context differs from the batch's first one is taken as common too."""

    def shared(
        contexts: Sequence[Sequence[int]], num_own: Sequence[int], device: torch.device, is_apart: bool = False
    ) -> Cells:
        cells = shared_cells(contexts, num_own, device, is_apart)
        for row, context in enumerate(() if is_apart else contexts):
            pairs = enumerate(zip(contexts[0], context, strict=False))
            apart = next((c for c, (a, b) in pairs if a != b), None)
            if apart is not None:
                cells.source[row, apart] = cells.source[0, apart]
        return cells

    for module in (score_module, attend):
        monkeypatch.setattr(module, "shared_cells", shared)


def enter_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through the layers from the one after that they are patched at."""
    real = patch.enter_late

    def late(layers: Sequence[int], texts: Sequence[Sequence[int]], num_layers: int) -> Late:
        return real([n if n < 0 else min(n + 1, num_layers - 1) for n in layers], texts, num_layers)

    monkeypatch.setattr(patch, "enter_late", late)


EDITS = {"patch resid", "patch attn", "patch mlp"}
KEYS = {"patch kv_question", "patch kv_instruction"}
KNOCKOUT = {"patch knockout_instruction"}
ON_TREES = {"p_word", "paper_p_sem", "logprobs"}
"""What the nodes of a spelling decide; p_sem too, but a word of one likely token hardly shows it."""
BREAKS: dict[Break, tuple[set[str], set[str]]] = {
    shift_positions: (SCORES - {"entropy"}, SCORES),
    open_tree: (ON_TREES | PATCHED, SCORES - {"entropy"} | PATCHED),
    ignore_step: ({"samples"}, {"samples"}),
    open_padding: (TOKENS, TOKENS),
    pad_texts_on_the_left: (INSIDE, INSIDE),
    pad_trees_on_the_left: (SCORES, SCORES),
    pad_prompts_on_the_left: (TOKENS, TOKENS),
    lose_positions: (ON_TREES | TOKENS | PATCHED, EVERYTHING),
    lose_masks: (ON_TREES | TOKENS | PATCHED, SCORES | TOKENS | PATCHED),
    see_everything: (EVERYTHING, EVERYTHING),
    share_memory: (PATCHED, PATCHED),
    norm_twice: ({"lens", "lens_nats", "decomposition"}, {"lens", "lens_nats", "decomposition"}),
    read_rows_too_early: ({"attention"}, {"attention"}),
    patch_the_next_layer: (EDITS, EDITS),
    leave_keys_unturned: (KEYS, KEYS),
    knock_out_one_token_less: (KNOCKOUT, KNOCKOUT),
    see_the_words_nodes: (PATCHED, PATCHED),
    shift_spans: ({"attention"}, {"attention"}),
    share_one_token_too_many: (SCORES | TOKENS | INSIDE, SCORES | TOKENS | INSIDE),
    enter_too_late: (PATCHED, PATCHED),
}
"""What each break must turn red, and what it may: all else must stay green."""


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_fast_path_turns_what_it_feeds_red_and_nothing_else(
    demo: LM, demo_subjects: list[Subject], green: list[Verdict], monkeypatch: pytest.MonkeyPatch, broken: Break
) -> None:
    assert red(green) == set(), "the control: green before"
    broken(monkeypatch)
    one_of_each = [demo_subjects[0], demo_subjects[3]]
    must, may = BREAKS[broken]
    assert must <= red(check(demo, one_of_each, HOT)) <= may


UNSEEN: dict[Break, set[str]] = {
    open_tree: {"p_word"}, lose_masks: {"p_word"}, lose_positions: {"p_word"}, see_the_words_nodes: {"patch resid"},
    enter_too_late: {"patch resid"},
}  # fmt: skip
"""What one context does not show: a word whose spellings all but never share a token, a continuation of one token, a row
that is patched at the last layer and so cannot enter after it. Other
measurements turn red for the same break."""


@pytest.mark.parametrize("broken", some_of(BREAKS, 5), ids=lambda f: f.__name__)
def test_the_least_certificate_sees_every_break_too(
    demo: LM, demo_subjects: list[Subject], green: list[Verdict], monkeypatch: pytest.MonkeyPatch, broken: Break
) -> None:
    """What no budget leaves out: each measurement of one context, each patch in one layer."""
    broken(monkeypatch)
    found = check(demo, demo_subjects, HOT, is_least=True)
    assert len(found) == len(EVERYTHING)
    must, may = BREAKS[broken]
    assert set() < must - UNSEEN.get(broken, set()) <= red(found) <= may


@pytest.mark.parametrize("num", [1, 2])
def test_the_least_certificate_of_one_context_of_each_condition_sees_them_as_well(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    """That all contexts are in one batch is no matter: what is longer than all of them is always there."""
    subjects = demo_subjects[:2] if num == 1 else [demo_subjects[0], demo_subjects[3]]
    assert red(check(demo, subjects, HOT, is_least=True)) == set(), "the control"
    open_padding(monkeypatch)
    assert red(check(demo, subjects, HOT, is_least=True)) == TOKENS


def test_a_lost_sliding_window_turns_everything_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a family that has one: without it attention is causal, as it should be nearly everywhere else."""
    lm = tiny_lm("tiny-mistral")
    subjects = tiny_subjects(lm, {"first?": "q"})
    assert red(check(lm, subjects, COOL)) == set(), "the control"
    monkeypatch.setattr(Layout, "window_cuts", lambda self, window: False)
    found = red(check(lm, subjects, COOL))
    assert {"logprobs", "greedy", *INSIDE} <= found
    full = tiny_lm("tiny-llama")
    assert red(check(full, tiny_subjects(full, {"first?": "q"}), COOL)) == set(), "nor does a family without one mind"


def test_a_final_norm_applied_twice_shows_at_the_last_layer(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lens must be the model's own output."""
    subject = demo_subjects[3]
    context = subject.token_ids
    own = plain.next_logits(demo, context)[-1].softmax(-1)
    best = int(own.argmax())

    def last_lens() -> float:
        view = look_inside(demo, [probe_of(context, [best], 0, (best,), subject.row["spans"])])[0]
        assert isinstance(view, View)
        return float(view.steps[0].lens["p_emitted"][-1])

    assert last_lens() == pytest.approx(own[best].item(), abs=1e-5)
    norm_twice(monkeypatch)
    assert abs(last_lens() - own[best].item()) > 1e-2
    lens = named(check(demo, [subject], HOT, ["inside"]), "lens")
    assert not lens.ok
    assert lens.max_abs is not None
    assert lens.max_abs > 1e-2


def remembering(make: Callable[..., Any], key: Callable[..., object]) -> Callable[..., Any]:
    """`make`, which gives the very same object again for the same key."""
    kept: dict[object, Any] = {}

    def again(*given: Any) -> Any:
        name = key(*given)
        if name not in kept:
            kept[name] = make(*given)
        return kept[name]

    return again


def keep_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all patches of a prompt, as in the paper's code: each forward appends to it."""
    monkeypatch.setattr(patch, "fork", remembering(patch.fork, lambda cache, rows: rows))


def test_a_cache_that_is_used_again_and_so_has_grown_is_refused(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not left to the certificate: no number is computed with it. That patches pass before is `green`."""
    keep_the_fork(monkeypatch)
    for group in PATCHES:
        with pytest.raises(AssertionError, match=r"the cache holds \d+ keys where the layout has \d+"):
            [check(demo, demo_subjects, COOL, [group]) for _ in range(2)]  # a certificate computes a batch once


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-mistral"])
def test_without_its_registration_for_masks_attention_would_see_padding(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Why it is registered twice: transformers hands a function it has no mask for nothing, and says nothing."""
    model = build_model(family)
    token_ids = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (2, 24)))
    is_token = torch.ones_like(token_ids)
    is_token[1, :9] = 0

    @torch.no_grad()
    def logits() -> Tensor:
        return model(input_ids=token_ids, attention_mask=is_token, use_cache=False).logits[is_token.bool()]

    ours = logits()
    model.set_attn_implementation("eager")
    own = logits()
    model.set_attn_implementation(attend.NAME)
    assert torch.allclose(ours, own, atol=5e-5)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, attend.NAME)
    assert (logits() - own).abs().max() > 1


# Verdicts


@pytest.fixture
def subject() -> Subject:
    return tiny_subjects(tiny_lm(), {"first?": "q"})[1]


def tokens_apart(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, margin: float, change: Callable[[list[int]], list[int]]
) -> dict[str, Verdict]:
    """The verdicts on completions whose fast path changes the tokens, where the plain one had leads of `margin`."""
    real = plain.complete

    def complete(*given: Any) -> Completion:
        done = real(*given)
        return replace(done, margins=[margin] * len(done.margins))

    def decode(lms: Sequence[LM], requests: Sequence[Any], sampling: Sampling) -> list[Completion]:
        done = [real(lms[0], request, sampling) for request in requests]
        return [
            replace(d, token_ids=change(d.token_ids), logprobs=d.logprobs[: len(change(d.token_ids))]) for d in done
        ]

    with monkeypatch.context() as m:
        m.setattr(stage.plain, "complete", complete)
        m.setattr(stage, "decode", decode)
        verdicts = check(tiny_lm(), [subject], COOL, ["greedy", "samples"])
    return {v.measurement: v for v in verdicts}


def other_end(tokens: list[int]) -> list[int]:
    return [*tokens[:-1], (tokens[-1] + 1) % 250]


def test_a_near_tie_is_excused_for_greedy_tokens_and_not_for_sampled_ones(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    """Rounding may turn a tie; noise is wide, and a sample that differs has drawn other noise."""
    tolerance = TOLERANCE["float32"].nats
    same = tokens_apart(monkeypatch, subject, 0.0, list)
    assert [(v.flips, v.near_ties, v.ok) for v in same.values()] == [(0, 0, True)] * 2, "the control: equal tokens"
    tie = tokens_apart(monkeypatch, subject, tolerance, other_end)
    assert [(n, v.flips, v.near_ties, v.ok) for n, v in tie.items()] == [
        ("greedy", 2, 2, True), ("samples", 2, 2, False),
    ]  # fmt: skip
    clear = tokens_apart(monkeypatch, subject, 3 * tolerance, other_end)
    assert [(v.flips, v.near_ties, v.ok) for v in clear.values()] == [(2, 0, False)] * 2
    assert clear["greedy"].worst == subject.key
    short = tokens_apart(monkeypatch, subject, 0.0, lambda tokens: tokens[:-1])
    assert [(v.flips, v.near_ties, v.ok) for v in short.values()] == [(2, 0, False)] * 2, "a text cut short is no tie"


def test_log_probabilities_beyond_the_tolerance_are_red_though_every_token_agrees(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    real = stage.decode

    def off_by(shift: float) -> list[bool | None]:
        def decode(*given: Any) -> list[Completion]:
            done = cast("list[Completion]", real(*given))
            return [replace(d, logprobs=[p + shift for p in d.logprobs]) for d in done]

        with monkeypatch.context() as m:
            m.setattr(stage, "decode", decode)
            return [v.ok for v in check(tiny_lm(), [subject], COOL, ["greedy", "samples"])]

    tolerance = TOLERANCE["float32"].nats
    assert off_by(tolerance / 4) == [True, True]
    assert off_by(tolerance * 4) == [False, False]


def spoil(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Scores of the fast path with some fields replaced, each by a function of what was there."""
    real = stage.score_trees

    def score_trees(*given: Any) -> list[TreeScores]:
        return [replace(s, **{k: f(getattr(s, k)) for k, f in changes.items()}) for s in real(*given)]  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "score_trees", score_trees)


def scores_row(lm: LM, subject: Subject) -> dict[str, dict[str, Any]]:
    """The stored rows of the group `scores`, by measurement."""
    made = Certificate(GravityChecks(ModelSpec("none"), lm.identity, COOL, 1, 0))
    task = tasks_of([subject], len(lm.anatomy.blocks))[0]
    (result,) = made.run(Work(Bench(lm, COOL), None), [Item("scores", 1, Asked(task, None, {}))])
    assert result.error is None
    return {row["measurement"]: row for row in result.rows["sanity_items"]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_an_infinite_difference_stored_as_a_number(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, value: float
) -> None:
    lm = tiny_lm()
    before = scores_row(lm, subject)
    assert all(row["ok"] for row in before.values()), "the control"
    spoil(monkeypatch, entropy=lambda entropy: value)
    verdict = named(check(lm, [subject], COOL, ["scores"]), "entropy")
    assert (verdict.max_abs, verdict.ok, verdict.worst) == (float("inf"), False, subject.key)
    rows = scores_row(lm, subject)
    assert {name for name, row in rows.items() if not row["ok"]} == {"entropy"}
    numbers = [x for row in rows.values() for x in row.values() if isinstance(x, float)]
    assert np.isfinite(numbers).all()
    assert rows["entropy"]["max_abs"] > 1e30


def test_another_number_of_values_is_an_infinite_difference(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    real = stage.measures
    calls = []

    def measures(*given: Any) -> dict[str, Any]:
        row = real(*given)
        calls.append(row)
        return row if len(calls) == 1 else row | {"logprobs": row["logprobs"][:-1]}  # the first is the reference's

    monkeypatch.setattr(stage, "measures", measures)
    verdicts = check(tiny_lm(), [subject], COOL, ["scores"])
    assert red(verdicts) == {"logprobs"}
    assert named(verdicts, "logprobs").max_abs == float("inf")


def test_an_item_that_the_fast_path_cannot_measure_is_an_error_not_a_green_line(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    monkeypatch.setattr(stage, "score_trees", lambda *given: [NotFinite("no number")])
    with pytest.raises(ItemFailed, match="no number"):
        check(tiny_lm(), [subject], COOL, ["scores"])


# The sampler


def cut_the_nucleus_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p without the token that crosses it."""

    def sample(logits: Tensor, keys: Tensor, step: int, sampling: Sampling, node: Tensor | None = None) -> Tensor:
        table = (logits if node is None else logits[node]) / sampling.temperature
        values, ids = table.sort(dim=-1, descending=True)
        probs = values.softmax(-1).double()
        kept = probs.cumsum(-1) <= sampling.top_p
        kept[:, 0] = True
        noisy = (values.double() + decode_module.gumbel(keys, step, ids)).masked_fill(~kept, float("-inf"))
        return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]

    monkeypatch.setattr(decode_module, "sample", sample)


def keep_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p not applied at all."""
    real = decode_module.sample
    monkeypatch.setattr(
        decode_module, "sample", lambda lo, k, t, s, *rest: real(lo, k, t, replace(s, top_p=1.0), *rest)
    )


def shift_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the step before."""
    real = decode_module.gumbel
    monkeypatch.setattr(decode_module, "gumbel", lambda keys, step, ids: real(keys, max(0, step - 1), ids))


def shift_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the token before, as where ids are counted from one."""
    real = decode_module.gumbel
    monkeypatch.setattr(decode_module, "gumbel", lambda keys, step, ids: real(keys, step, ids - 1))


def cool_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits divided by the temperature once more."""
    real = decode_module.sample
    monkeypatch.setattr(decode_module, "sample", lambda lo, k, t, s, *rest: real(lo / s.temperature, k, t, s, *rest))


def ignore_the_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens drawn as if the temperature were 1."""
    real = decode_module.sample
    monkeypatch.setattr(
        decode_module, "sample", lambda lo, k, t, s, *rest: real(lo, k, t, replace(s, temperature=1.0), *rest)
    )


def keep_one_token_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p with the token after the one that crosses it."""

    def sample(logits: Tensor, keys: Tensor, step: int, sampling: Sampling, node: Tensor | None = None) -> Tensor:
        table = (logits if node is None else logits[node]) / sampling.temperature
        values, ids = table.sort(dim=-1, descending=True)
        probs = values.softmax(-1).double()
        kept = probs.cumsum(-1) - probs < sampling.top_p
        kept = kept | kept.roll(1, -1)
        noisy = (values.double() + decode_module.gumbel(keys, step, ids)).masked_fill(~kept, float("-inf"))
        return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]

    monkeypatch.setattr(decode_module, "sample", sample)


SHARP = Sampler(Sampling(6), Sampling(8, 3.0, 0.5))
"""The demo model's nucleus at this heat is a handful of tokens."""
NARROW = Sampler(Sampling(6), Sampling(8, 3.0, 0.02))
"""And here it is one: a second one is seen at once, where a further one of many is seldom drawn."""


@pytest.mark.parametrize(
    ("broken", "sampler"),
    [
        (cut_the_nucleus_early, SHARP), (keep_one_token_more, NARROW), (keep_the_whole_vocabulary, SHARP),
        (shift_the_step, SHARP), (shift_the_token, SHARP), (cool_twice, SHARP), (ignore_the_temperature, SHARP),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)  # fmt: skip
def test_a_sampler_with_a_bug_turns_the_samples_red(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch, broken: Break, sampler: Sampler
) -> None:
    """The reference once drew with the fast path's own sampler, and so agreed with whatever that did."""
    kinds = ["greedy", "samples"]
    assert red(check(demo, demo_subjects, sampler, kinds)) == set(), "the control"
    broken(monkeypatch)
    assert red(check(demo, demo_subjects, sampler, kinds)) == {"samples"}


def test_a_completion_that_does_not_end_where_it_should_turns_red(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference once asked the fast path's own completion whether it had come to its end."""
    kinds, real = ["greedy", "samples"], Completion.append
    assert red(check(demo, demo_subjects, SHARP, kinds)) == set(), "the control"

    def append(self: Completion, *given: Any) -> bool:
        real(self, *given)
        return True

    monkeypatch.setattr(Completion, "append", append)
    assert red(check(demo, demo_subjects, SHARP, kinds)) == set(kinds)


# The budget


class Clock:
    """Time passes where something is measured, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """The stage on the demo model's first two prompts, an item taking as long as `costs` says, and measuring nothing."""

    def __init__(self, demo: LM, monkeypatch: pytest.MonkeyPatch, costs: Callable[[str], float] = lambda kind: 1.0):
        self.plan = gravity.prepare(resolve({"data.limit": "2"}, None, {}))
        self.clock = Clock()
        self.measured: list[str] = []
        self.bench = Bench(demo, HOT)

        def measure(bench: Bench, task: Task) -> list[Verdict]:
            self.clock.now += costs(task.kind)
            self.measured.append(f"{task.kind}|{task.name}")
            return [replace(v, left_out=False, max_abs=0.0, num_items=1, ok=True) for v in stage.left_out(bench, task)]

        monkeypatch.setattr(stage, "measure", measure)

    def items(
        self, budget_s: float | None, known: Sequence[dict[str, Any]] = ()
    ) -> tuple[Certificate[Task, Bench], list[Item[Asked[Task]]]]:
        made = replace(certificate_of(self.plan.inputs), budget_s=budget_s, clock=self.clock)
        return made, made.items(Tables.of({**tables_of(self.plan.inputs, 2), "sanity_items": list(known)}))

    def rows(
        self, budget_s: float | None, known: Sequence[dict[str, Any]] = (), some: slice = slice(None)
    ) -> list[dict[str, Any]]:
        """What one process stores for some of the items."""
        made, items = self.items(budget_s, known)
        work = Work(self.bench, None)
        return [row for item in items[some] for r in made.run(work, [item]) for row in r.rows["sanity_items"]]


def names_of(rows: Sequence[Mapping[str, Any]], *, left_out: bool) -> set[tuple[str, str]]:
    return {(r["measurement"], r["subject"]) for r in rows if r["left_out"] is left_out}


def test_items_go_once_through_all_measurements_before_any_is_repeated(
    demo: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which an engine cuts them, each in a batch of its own."""
    _, items = Timed(demo, monkeypatch).items(None)
    ordered = sorted(items, key=lambda i: (-i.length, i.key))
    assert ordered == items
    assert all(i.length > CPU_BUDGET / 2 for i in items)
    tasks = [i.payload.task for i in items]
    kinds = [t.kind for t in tasks]
    assert kinds[:10] == ["scores", "greedy", "samples", "inside", *PATCHES]
    assert [t.is_least for t in tasks] == [n < 10 for n in range(len(items))]
    assert len({t.subject.key for t in tasks[:10]}) == 1
    assert {t.layer for t in tasks[4:10]} == {0, 2, 5}, "first, middle and last layer, going round"
    assert len({(t.kind, t.name) for t in tasks}) == len(items) == 4 * 4 + 2 * 6 * 3


@pytest.mark.parametrize("budget_s", [0.0, 10.0, 15.5, 30.0, None])
def test_a_budget_leaves_out_by_name_what_does_not_fit_and_never_a_whole_measurement(
    demo: LM, monkeypatch: pytest.MonkeyPatch, budget_s: float | None
) -> None:
    made = Timed(demo, monkeypatch)
    rows = made.rows(budget_s)
    assert len(made.measured) == {0.0: 10, 10.0: 10, 15.5: 15, 30.0: 29, None: 52}[budget_s]
    assert made.clock.now <= max(10.0, budget_s or 1e9), "within the budget, but for what is always measured"
    certificate = store.certificate(rows)
    assert {v["measurement"] for v in certificate} == EVERYTHING
    assert all(v["ok"] for v in certificate)
    told = {(v["measurement"], subject) for v in certificate for subject in v["left_out"]}
    assert told == names_of(rows, left_out=True)
    assert len(told) + len(names_of(rows, left_out=False)) == len(rows) == 4 * 13 + 36
    assert (told == set()) == (budget_s is None)


def test_what_is_dear_is_left_out_and_what_is_cheap_still_made(demo: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the next item would end beyond the budget is told from the last one of its kind."""
    made = Timed(demo, monkeypatch, lambda kind: 20.0 if kind == "inside" else 1.0)
    made.rows(60.0)
    assert sum(name.startswith("inside") for name in made.measured) == 2
    assert made.clock.now <= 60.0
    assert len(made.measured) > 20


def test_a_run_that_goes_on_keeps_what_it_measured_and_what_it_left_out(
    demo: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Timed(demo, monkeypatch)
    first = made.rows(12.5, some=slice(0, 14))
    assert (len(made.measured), made.clock.now) == (12, 12.0)
    rest = made.rows(14.5, first, slice(14, None))
    assert len(made.measured) == 14, "two more: what was spent before the kill counts"
    assert names_of(rest, left_out=False)
    assert names_of(first, left_out=True)
    # As `harness verify` does: the same items again, whatever the clock says now.
    made.measured.clear()
    again = made.rows(0.0, [*first, *rest])
    assert names_of(again, left_out=True) == names_of([*first, *rest], left_out=True)
    assert len(made.measured) == 14
    made.measured.clear()
    assert names_of(made.rows(None, [*first, *rest]), left_out=True) == names_of(again, left_out=True)
    assert len(made.rows(None)) == len(again), "the control: without what was stored all is measured"
    assert len(made.measured) == 14 + 52


@pytest.mark.parametrize(
    ("setting", "known", "budget_s"),
    [("auto", None, 20.0), ("auto", 3.5, 3.5), ("auto", 500.0, 60.0), ("7.5", 3.5, 7.5), ("0", 500.0, 0.0),
     ("300", 3.5, 300.0), ("unlimited", 3.5, None)],
)  # fmt: skip
def test_the_budget_is_a_share_of_the_run_a_minute_at_most_or_what_was_asked_for(
    setting: str, known: float | None, budget_s: float | None
) -> None:
    plan = gravity.prepare(resolve({"gravity.sanity.budget": setting, "data.limit": "2"}, None, {}))
    made = certificate_of(plan.inputs)
    if known is not None:  # the run is long enough for an estimate
        made = made.within(known)
    assert made.budget_s == budget_s
    assert plan.fingerprint == gravity.prepare(resolve({"data.limit": "2"}, None, {})).fingerprint, (
        "it decides no number"
    )


def test_full_depth_compares_every_spelling_and_sweeps_each_patch_alone(
    demo: LM, demo_subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in one rare spelling of a word is seen at full depth; the usual certificate takes some, the likeliest and the
    longest, here two of the six that these words have."""
    monkeypatch.setattr(stage, "_SPELLINGS", 1)
    real = stage.sweep
    tasks = [t for t in tasks_of(demo_subjects, 6) if t.kind == "mlp"]
    events = tasks[0].subject.forms.events

    def off_by_one(*given: Any) -> Any:
        rows: Any = real(*given)
        passed_over = set(range(len(events))) - set(stage._spellings(events, rows[0].scores.logprobs))
        for row in rows[1:]:
            row.scores.logprobs[min(passed_over)] += 1.0
        return rows

    usual = [stage.measure(Bench(demo, COOL), t)[0] for t in tasks[:4]]
    full = [stage.measure(Bench(demo, COOL, is_full=True), t)[0] for t in tasks[:4]]
    assert all(v.ok for v in (*usual, *full)), "the control"
    assert [v.num_items for v in usual] == [1, 1, 2, 2]
    assert [v.num_items for v in full] == [2, 2, 2, 2]
    monkeypatch.setattr(stage, "sweep", off_by_one)
    assert stage.measure(Bench(demo, COOL), tasks[0])[0].ok
    assert not stage.measure(Bench(demo, COOL, is_full=True), tasks[0])[0].ok


# Half precision


@pytest.fixture
def half(tmp_path: Path) -> ModelSpec:
    """A checkpoint in bfloat16."""
    folder = tmp_path / "model"
    build_model("tiny-llama", dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSpec(str(folder))


def certificate(spec: ModelSpec, group: str) -> dict[str, dict[str, Any]]:
    """The rows that the stage stores for one group of measurements of one prompt."""
    identity = identify(spec)
    made = Certificate(GravityChecks(spec, identity, COOL, 1, 0))
    codec = load_codec(spec, identity)
    prompt = Prompt("first?", "letters", "first?", "q", None, None, (), "")
    contexts = [context_row(codec, prompt, name, t, False) for name, t in TEMPLATES.items()]
    told = {"prompts": [{"prompt_id": "first?", "target": "q"}], "contexts": contexts, "sanity_items": []}
    (item,) = (i for i in made.items(Tables.of(told)) if i.payload.task.is_least and i.payload.task.kind == group)
    (result,) = made.run(made.setup(), [item])
    return {row["measurement"]: row for row in result.rows["sanity_items"]}


GROUPS = {"scores": SCORES, "inside": INSIDE}


@pytest.mark.parametrize("group", GROUPS)
def test_rounding_in_half_precision_is_settled_in_float64(
    monkeypatch: pytest.MonkeyPatch, half: ModelSpec, group: str
) -> None:
    monkeypatch.setitem(TOLERANCE, "bfloat16", Tolerance(1e3, 1e3))
    before = certificate(half, group)
    assert [row["repeated"] for row in before.values()] == [None] * len(before), "the control: nothing to settle"
    monkeypatch.setitem(TOLERANCE, "bfloat16", Tolerance(0.0, 0.0))
    rows = certificate(half, group)
    assert set(rows) == GROUPS[group]
    apart = {name for name, row in rows.items() if row["repeated"]}
    assert apart == {name for name, row in rows.items() if row["max_abs"] > 0}
    assert apart
    for name in apart:
        assert rows[name]["ok"], rows[name]
        assert rows[name]["repeated"].startswith("float64: ")
        assert rows[name]["repeated"].endswith(", noise")


def test_a_bug_in_half_precision_stays_red_in_float64(monkeypatch: pytest.MonkeyPatch, half: ModelSpec) -> None:
    monkeypatch.setitem(TOLERANCE, "bfloat16", Tolerance(0.0, 0.0))
    read_rows_too_early(monkeypatch)
    rows = certificate(half, "inside")
    assert {name for name, row in rows.items() if not row["ok"]} == {"attention"}
    assert rows["attention"]["repeated"].endswith("still apart")
    assert rows["lens_nats"]["repeated"].endswith("noise"), "the others were rounding"


def test_a_disagreement_that_cannot_be_repeated_stands(monkeypatch: pytest.MonkeyPatch, half: ModelSpec) -> None:
    monkeypatch.setitem(TOLERANCE, "bfloat16", Tolerance(0.0, 0.0))

    tried: list[tuple[str, str]] = []

    def full(spec: ModelSpec, *given: Any) -> LM:
        tried.append((spec.dtype, spec.device))
        raise EnvironmentFault("eight bytes a parameter do not fit" if spec.dtype == "float64" else "nor do four")

    monkeypatch.setattr(stage, "load", full)
    rows = certificate(half, "scores")
    for row in rows.values():
        assert row["ok"] == (row["max_abs"] == 0)
    assert rows["logprobs"]["repeated"] == "not possible: eight bytes a parameter do not fit"
    assert tried == [("float64", "cpu"), ("float32", "cpu")]


def test_where_float64_does_not_fit_float32_settles_it(monkeypatch: pytest.MonkeyPatch, half: ModelSpec) -> None:
    monkeypatch.setitem(TOLERANCE, "bfloat16", Tolerance(0.0, 0.0))
    real = stage.load

    def narrow(spec: ModelSpec, *given: Any) -> LM:
        if spec.dtype == "float64":
            raise torch.OutOfMemoryError("does not fit")
        return real(spec, *given)

    monkeypatch.setattr(stage, "load", narrow)
    rows = certificate(half, "scores")
    assert rows["logprobs"]["ok"]
    assert rows["logprobs"]["repeated"].startswith("float32: ")


def test_float32_is_never_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is held to its own tolerance."""
    build_model("tiny-llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(TOLERANCE, "float32", Tolerance(0.0, 0.0))
    rows = certificate(ModelSpec(str(tmp_path)), "scores")
    assert not rows["logprobs"]["ok"]
    assert {row["repeated"] for row in rows.values()} == {None}


# In a run


def test_a_green_certificate_is_stored_in_the_run_and_in_its_manifest(tmp_path: Path) -> None:
    told = harness("run", "--prompts", prompt_file(tmp_path), "--limit", 1, "--paths.runs", tmp_path / "runs",
                   "--stages", "sanity")  # fmt: skip
    assert told.code == 0, told.err
    run = only_run(tmp_path / "runs")
    assert {
        name for (name,) in query(run, "SELECT measurement FROM sanity WHERE ok AND repeated IS NULL")
    } == EVERYTHING
    known = {row["measurement"]: row for row in manifest(run)["sanity"]}
    assert set(known) == EVERYTHING
    columns = ("measurement", "num_items", "max_abs", "flips", "near_ties", "tolerance", "worst", "ok")
    for row in query(run, f"SELECT {', '.join(columns)} FROM sanity"):
        assert row == tuple(known[row[0]][c] for c in columns)
    assert query(run, "SELECT DISTINCT tolerance FROM sanity ORDER BY 1") == [(1e-5,), (5e-5,)]


def test_a_red_certificate_ends_the_run_with_exit_1_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", "--prompts", prompt_file(tmp_path), "--limit", 1, "--paths.runs", tmp_path / "runs",
            "--stages", "sanity")  # fmt: skip
    with monkeypatch.context() as m:
        norm_twice(m)
        told = harness(*args)
    wrong = {"lens", "lens_nats", "decomposition"}
    assert told.code == 1
    assert "disagree on decomposition, lens, lens_nats" in told.err
    run = only_run(tmp_path / "runs")
    assert {name for (name,) in query(run, "SELECT measurement FROM sanity WHERE NOT ok")} == wrong
    assert {name for (name,) in query(run, "SELECT measurement FROM sanity WHERE ok")} == EVERYTHING - wrong
    assert {row["measurement"] for row in manifest(run)["sanity"] if not row["ok"]} == wrong
    assert (manifest(run)["status"], manifest(run)["num_failed"]) == ("finished", 0)
    again = harness(*args)
    assert again.code == 1, "a run found wrong stays wrong, though the code that made it is mended"
    assert "finished already" in again.out


def test_the_command_names_what_disagrees_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows_too_early(monkeypatch)
    told = harness("sanity", "--num-prompts", 1)
    assert told.code == 1
    assert lines_of(told, "DISAGREES") == {"attention"}
    assert lines_of(told, "ok") == EVERYTHING - {"attention"}


def test_a_number_that_is_not_finite_is_kept_by_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store refuses infinity in any column, and the certificate must be kept just then."""
    spoil(monkeypatch, entropy=lambda entropy: float("nan"))
    told = harness("run", "--prompts", prompt_file(tmp_path), "--limit", 1, "--paths.runs", tmp_path / "runs",
                   "--stages", "sanity")  # fmt: skip
    assert told.code == 1
    run = only_run(tmp_path / "runs")
    ((name, gap),) = query(run, "SELECT measurement, max_abs FROM sanity WHERE NOT ok")
    assert name == "entropy"
    assert gap > 1e30
    assert query(run, "SELECT count(*) FROM events WHERE kind = 'failed_item'") == [(0,)]
