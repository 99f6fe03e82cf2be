"""The cases of `harness bench` for semantic gravity: P_sem, samples, attention, the inside, patching."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import ItemFailed
from harness.experiments.experiment import Case
from harness.experiments.gravity import least
from harness.experiments.gravity.conditions import BUILT_IN
from harness.experiments.gravity.inputs import Inputs
from harness.experiments.gravity.stages.patching import align, cannot
from harness.experiments.gravity.stages.prompts import context_row
from harness.experiments.timing import Apart, Course, Figure, Grounds, Timed, Way, in_turn
from harness.models import attend, peers, plain
from harness.models.attend import Layout, right_padded
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.inside import Probe, View, look_inside
from harness.models.load import LM
from harness.models.noise import row_key
from harness.models.patch import PATCHES, Patched, begin, run_rows, sweep
from harness.models.score import TreeScores, row_length, score_trees
from harness.text.prompts import Prompt
from harness.text.words import Tokens, WordForms, build_trie, word_forms

_SHAPE = "llama-40m"
_REPEATS = 3
_LONG = 384
"""Tokens of a long text, where the size of whole attention maps shows."""
_WIDE = ("float32", "float64")


@dataclass(frozen=True)
class Subject:
    """One context to time, the spellings of its target, and the noise key of its first sample."""

    context: tuple[int, ...]
    forms: WordForms
    key: int


def bench_psem(course: Course, subjects: Sequence[Subject], max_tokens: int = 2048) -> list[Figure]:
    """Tree scoring against one padded row per (context, sequence), and against one sequence at a time.

    Both batched ways get their rows longest first, in batches of the same padded size.
    """
    lm = course.lm
    rows = [(s.context, s.forms.trie) for s in subjects]
    pairs = [(s.context, q) for s in subjects for q in s.forms.trie.sequences]
    stride = max(1, len(pairs) // 40)
    some = pairs[::stride]

    def flat(scores: Sequence[TreeScores]) -> np.ndarray:
        return np.concatenate([s.logprobs for s in scores])

    return in_turn(
        course,
        "psem",
        [
            Way(
                f"tree ({len(subjects)} contexts, {len(pairs)} sequences)",
                lambda: _in_batches(rows, lambda r: row_length(*r), max_tokens, lambda b: _trees(lm, b)),
            ),
            Way(
                "one padded row per (context, sequence)",
                lambda: _in_batches(pairs, lambda r: len(r[0]) + len(r[1]), max_tokens, lambda b: padded_rows(lm, b)),
                lambda fast, own: _rel(own, flat(fast)),
            ),
            Way(
                f"one sequence at a time ({len(some)} timed, scaled)",
                lambda: [plain.sequence_logprob(lm, c, q) for c, q in some],
                lambda fast, own: _rel(own, flat(fast)[::stride]),
                once=True,
                scale=len(pairs) / len(some),
            ),
        ],
    )


def _in_batches(
    rows: Sequence[Any], length: Callable[[Any], int], max_tokens: int, work: Callable[[list[Any]], Sequence[Any]]
) -> list[Any]:
    """`work` on batches of the rows, longest first, at most `max_tokens` padded tokens each; results in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: -length(rows[i]))
    results: list[Any] = [None] * len(rows)
    while order:
        size = max(1, max_tokens // length(rows[order[0]]))
        for i, result in zip(order[:size], work([rows[i] for i in order[:size]]), strict=True):
            results[i] = result
        order = order[size:]
    return results


def _trees(lm: LM, batch: Sequence[Any]) -> list[TreeScores]:
    scores = score_trees(lm, [c for c, _ in batch], [t for _, t in batch])
    assert all(isinstance(s, TreeScores) for s in scores), "a context failed"
    return [s for s in scores if isinstance(s, TreeScores)]


@torch.inference_mode()
def padded_rows(lm: LM, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
    """The usual batched way: every (context, sequence) a right-padded row, logits at all positions."""
    width = max(len(c) + len(q) for c, q in pairs)
    tokens = torch.tensor([[*c, *q, *[0] * (width - len(c) - len(q))] for c, q in pairs], device=lm.device)
    positions = torch.arange(width, device=lm.device).expand(len(pairs), width)
    log_p = lm.logits(lm.hidden(tokens, Layout(positions, positions))).log_softmax(-1)
    at = [(r, len(c) - 1 + n, token) for r, (c, q) in enumerate(pairs) for n, token in enumerate(q)]
    row, column, token = torch.tensor(at, device=lm.device).T
    sums = torch.zeros(len(pairs), device=lm.device, dtype=torch.float64)
    return sums.index_add_(0, row, log_p[row, column, token].double()).cpu().tolist()


def bench_samples(
    course: Course, subjects: Sequence[Subject], num_samples: int, path: Path, max_new_tokens: int = 10
) -> list[Figure]:
    """Every distinct text forwarded once, against every sample forwarded for itself (batched, with a cache), against
    transformers' `generate` and, where the model is a GGUF file, against llama.cpp.

    The peers have random numbers of their own, so their samples are compared in law (`law_apart`).
    """
    lm = course.lm
    sampling = Sampling(max_new_tokens, 1.0, 0.9, stop_at_newline=False)
    contexts = [s.context for s in subjects]
    requests = [Request(s.context, s.key + n) for s in subjects for n in range(num_samples)]
    stops = sorted(lm.vocabulary.stop_ids)
    theirs = peers.twin(lm, "sdpa", course.at_head)

    def in_law(fast: Sequence[Completion], own: Sequence[Tokens]) -> Apart:
        return law_apart(lm, contexts, _ids_of(fast), own)

    def num_differing(fast: Sequence[Completion], own: Sequence[Completion]) -> Apart:
        pairs = zip(_ids_of(fast), _ids_of(own), strict=True)
        return Apart(float(np.mean([a != b for a, b in pairs])), "share of samples")

    def num_made(done: Sequence[Completion]) -> int:
        return _length(_ids_of(done))

    ways = [
        Way(
            f"each distinct text once ({num_samples} samples a prompt)",
            lambda: decode([lm], requests, sampling),
            num_new=num_made,
        ),
        Way("each sample for itself", lambda: _unshared(lm, requests, sampling), num_differing, num_new=num_made),
        Way(
            f"transformers generate(num_return_sequences={num_samples})",
            lambda: peers.generate(theirs, contexts, num_samples, sampling, stops, seed=0),
            in_law,
            num_new=_length,
        ),
    ]
    if path.suffix == ".gguf":
        try:
            llama = peers.LlamaCpp(lm, path, max(map(len, contexts)) + max_new_tokens)
            ways.append(
                Way(
                    f"{llama.name}, quantised weights",
                    lambda: llama.sample(contexts, num_samples, sampling, stops),
                    # Other weights than ours, so its law is another one and is told, not judged.
                    lambda fast, own: _share_apart(_ids_of(fast), own),
                    once=True,
                    num_new=_length,
                )
            )
        except peers.Absent as e:
            course.skipped.append(str(e))
    else:
        course.skipped.append("llama-cpp-python is left out (sampling): the model is no GGUF file")
    return in_turn(course, "samples", ways)


def law_apart(lm: LM, contexts: Sequence[Tokens], ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> Apart:
    """How far two sets of samples are from having been drawn by one law: the difference of their mean ln P under the model,
    of first tokens and of whole samples, in its standard errors; the larger of both.

    Both hold the same number of samples for every context, one context after the other. Given its context a sample depends
    on no other, so the variances of the contexts' means add up.
    """
    num = len(ours) // len(contexts)
    repeated = [c for c in contexts for _ in range(num)]
    found = []
    for cut in (1, None):
        scores = [
            np.array(
                _in_batches(
                    [(c, t[:cut]) for c, t in zip(repeated, texts, strict=True)],
                    lambda r: len(r[0]) + len(r[1]),
                    2048,
                    lambda b: padded_rows(lm, b),
                )
            ).reshape(-1, num)
            for texts in (ours, theirs)
        ]
        gap = abs(float((scores[0] - scores[1]).mean()))
        error = float(np.sqrt(sum(x.var(1, ddof=1).sum() / num for x in scores))) / len(contexts) if num > 1 else 0.0
        found.append(0.0 if gap < 1e-6 else gap / error if error else float("inf"))
    return Apart(max(found), "standard errors")


def _share_apart(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> Apart:
    """The share of first tokens that would have to be others for both to have the same ones."""
    first = [np.unique([t[0] for t in texts], return_counts=True) for texts in (ours, theirs)]
    counts = [dict(zip(ids.tolist(), n.tolist(), strict=True)) for ids, n in first]
    gap = sum(abs(counts[0].get(t, 0) - counts[1].get(t, 0)) for t in counts[0].keys() | counts[1].keys())
    return Apart(gap / 2 / len(ours), "share of samples")


def _unshared(lm: LM, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
    """As `decode`, but no two samples of a prompt in one batch, so that nothing is shared."""
    by_context: dict[Tokens, list[int]] = {}
    for i, request in enumerate(requests):
        by_context.setdefault(request.context, []).append(i)
    rounds = max(map(len, by_context.values()))
    result: list[Any] = [None] * len(requests)
    for n in range(rounds):
        index = [ids[n] for ids in by_context.values() if n < len(ids)]
        for i, done in zip(index, decode([lm], [requests[i] for i in index], sampling), strict=True):
            result[i] = done
    return result


def bench_attention(course: Course, subjects: Sequence[Subject], max_tokens: int = 2048) -> list[Figure]:
    """SDPA with every layer's and head's row of the last token, against plain SDPA, and against eager attention's maps;
    for the contexts as they are, and for texts of `_LONG` tokens joined of them."""
    contexts = [s.context for s in subjects]
    joined = tuple(token for context in contexts for token in context)
    long = [joined[n : n + _LONG] for n in range(0, len(joined) - _LONG + 1, _LONG)][:4]
    return [
        figure
        for name, texts in (("", contexts), (f", {_LONG} tokens", long))
        if texts
        for figure in _attention_figures(course, texts, name, max_tokens)
    ]


def _attention_figures(course: Course, texts: Sequence[Tokens], name: str, max_tokens: int) -> list[Figure]:
    lm = course.lm

    def batched(work: Callable[[LM, list[Tokens]], Sequence[Any]]) -> list[Any]:
        return _in_batches(texts, len, max_tokens, lambda b: work(lm, b))

    def eager() -> list[Any]:
        with plain.eager(lm):
            return batched(_eager_maps)

    def apart(fast: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> Apart:
        return Apart(max(float(np.abs(a - b).max()) for a, b in zip(fast, maps, strict=True)), "probability")

    return in_turn(
        course,
        "attention",
        [
            Way(f"SDPA and the last token's rows{name}", lambda: batched(_tapped)),
            Way(f"plain SDPA, no rows{name}", lambda: batched(_forward_only)),
            Way(f"eager, whole maps returned{name}", eager, apart),
        ],
    )


@torch.inference_mode()
def _tapped(lm: LM, batch: Sequence[Tokens]) -> list[np.ndarray]:
    """[L, H, T] of each context's last token."""
    tokens, layout = right_padded(batch, lm.device)
    at = torch.tensor([[len(c) - 1] for c in batch], device=lm.device)
    rows: list[torch.Tensor] = []
    with attend.watch_rows(at, lambda _layer, weights: rows.append(weights[:, :, 0])):
        lm.hidden(tokens, layout)
    whole = torch.stack(rows, 1).cpu().numpy()
    return [whole[r, :, :, : len(c)] for r, c in enumerate(batch)]


@torch.inference_mode()
def _forward_only(lm: LM, batch: Sequence[Tokens]) -> list[None]:
    lm.hidden(*right_padded(batch, lm.device))
    return [None] * len(batch)


@torch.inference_mode()
def _eager_maps(lm: LM, batch: Sequence[Tokens]) -> list[np.ndarray]:
    tokens, layout = right_padded(batch, lm.device)
    mask = torch.tensor([[n < len(c) for n in range(tokens.shape[1])] for c in batch], device=lm.device).long()
    maps = lm.model.base_model(
        input_ids=tokens, attention_mask=mask, position_ids=layout.q_positions, use_cache=False, output_attentions=True
    ).attentions
    return [np.stack([m[r, :, len(c) - 1, : len(c)].float().cpu().numpy() for m in maps]) for r, c in enumerate(batch)]


def bench_mechanism(
    course: Course, subjects: Sequence[Subject], libraries: Sequence[peers.Library] = (), max_tokens: int = 2048
) -> list[Figure]:
    """All of stage `mechanism` from one forward, against one prompt and one layer at a time, and against libraries that
    are asked for the lens alone."""
    lm = course.lm
    probes = [
        Probe(s.context, (len(s.context) - 1,), (s.context[-1],), s.forms.first_tokens, {"question": (1, 4)})
        for s in subjects
    ]
    stride = max(1, len(probes) // 8)
    some = probes[::stride]

    def one_by_one() -> list[np.ndarray]:
        found = []
        for p in some:
            found.append(plain.layers(lm, p, p.at[0], p.emitted[0])["p_out"])
            plain.attention_rows(lm, p.tokens, p.at[0])
        return found

    def apart(views: Sequence[View | ItemFailed], own: Sequence[np.ndarray]) -> Apart:
        gaps = [np.abs(v.steps[0].p_out - p).max() for v, p in zip(_views(views), own, strict=True)]
        return Apart(float(max(gaps)), "probability")

    ways = [
        Way(
            f"one forward a batch ({len(probes)} contexts)",
            lambda: _in_batches(probes, lambda p: len(p.tokens), max_tokens, lambda b: look_inside(lm, b)),
        ),
        Way(
            f"one prompt, one layer at a time ({len(some)} timed, scaled)",
            one_by_one,
            lambda fast, own: apart(fast[::stride], own),
            once=True,
            scale=len(probes) / len(some),
        ),
    ]
    asked = [peers.Asked(p.tokens, p.targets) for p in probes]

    ways += [
        Way(
            f"{library.name}, the lens alone",
            lambda library=library: _in_batches(asked, lambda a: len(a.tokens), max_tokens, library.lens),
            apart,
        )
        for library in _able(course, "the lens", libraries, lambda library: library.lens(asked[:1]))
    ]
    return in_turn(course, "mechanism", ways)


def bench_patching(
    course: Course,
    prompts: Sequence[Prompt],
    libraries: Sequence[peers.Library] = (),
    chat: bool = False,
    max_new_tokens: int = 8,
) -> list[Figure]:
    """All patches at every layer as the rows of one forward, against one (patch, layer) at a time that goes on from the
    same prefilled prefix, forked each time; and the patched residual stream alone, against libraries."""
    lm = course.lm
    rows = [[context_row(lm.codec, p, n, t, chat) for n, t in BUILT_IN.items()] for p in prompts]
    pairs = [align(*two) for two in rows]
    tries = [build_trie(word_forms(p.target, lm.codec).events) for p in prompts]
    layers = range(len(lm.anatomy.blocks))
    able = [[n for n in PATCHES if cannot(pair, n) is None] for pair in pairs]
    names = [[(name, layer) for name in some for layer in layers] for some in able]

    def together() -> list[float]:
        return [
            x
            for pair, trie, some, which in zip(pairs, tries, able, names, strict=True)
            for x in _p_sems(run_rows(lm, pair, begin(lm, pair, some), which, trie, max_new_tokens, False))
        ]

    def one_at_a_time() -> list[float]:
        found = []
        for pair, trie, some, which in zip(pairs, tries, able, names, strict=True):
            start = begin(lm, pair, some)
            for name in which:
                found += _p_sems(run_rows(lm, pair, start, [name], trie, max_new_tokens, False))
        return found

    def residual() -> list[float]:
        return [
            x
            for pair, trie in zip(pairs, tries, strict=True)
            for x in _p_sems(sweep(lm, pair, ["resid"], trie, 1, False))[1:]
        ]

    ways = [
        Way(
            f"rows of one forward ({len(pairs)} prompts × up to {max(map(len, names))} (patch, layer) pairs)", together
        ),
        Way("one pair at a time, its own fork of the prefix", one_at_a_time, _ratios, once=True),
    ]
    figures = in_turn(course, "patching", ways)
    # A library forwards every layer's patch for itself: some layers of one prompt tell how long all would take.
    some_layers = layers[:: max(1, len(layers) // 4)]
    told = f"{len(some_layers)} layers of a prompt timed, scaled"
    alone = [Way("the residual stream alone, rows of one forward", residual)]
    alone += [
        Way(
            f"{library.name} ({told})",
            lambda library=library: library.patched(pairs[0], tries[0].sequences, some_layers),
            lambda fast, own: _ratios([fast[layer] for layer in some_layers], own),
            once=True,
            scale=len(pairs) * len(layers) / len(some_layers),
        )
        for library in _able(course, "patching", libraries, lambda a: a.patched(pairs[0], tries[0].sequences[:1], [0]))
    ]
    return figures + (in_turn(course, "patching, P_sem", alone) if len(alone) > 1 else [])


def _able(
    course: Course, what: str, libraries: Sequence[peers.Library], attempt: Callable[[peers.Library], object]
) -> list[peers.Library]:
    """Those libraries that can do it on this model, after they did a little of it; a line for each that cannot."""
    able = []
    for library in libraries:
        try:
            with peers.willing(f"{library.name} ({what})"):
                attempt(library)
        except peers.Absent as e:
            course.skipped.append(str(e))
        else:
            able.append(library)
    return able


def _views(found: Sequence[View | ItemFailed]) -> list[View]:
    assert all(isinstance(v, View) for v in found), "a context failed"
    return [v for v in found if isinstance(v, View)]


def _p_sems(rows: Sequence[Patched | ItemFailed]) -> list[float]:
    assert all(isinstance(r, Patched) for r in rows), "a row failed"
    return [float(np.exp(r.scores.logprobs).sum()) for r in rows if isinstance(r, Patched)]


def least_tokens(subjects: Sequence[Subject]) -> int:
    """Tokens that must be forwarded at least once: the distinct prefixes of all contexts and their tries' nodes."""
    texts = least.Texts()
    for s in subjects:
        texts.add_trie(s.context, s.forms.trie)
    return len(texts)


def _rel(a: Sequence[float], b: Sequence[float] | np.ndarray) -> Apart:
    """Two lists of logarithms."""
    x, y = np.asarray(a), np.asarray(b)
    return Apart(float((np.abs(np.expm1(x - y))).max()), "relative")


def _ratios(fast: Sequence[float], own: Sequence[float] | np.ndarray) -> Apart:
    return Apart(float(np.abs(np.array(own) / np.array(fast) - 1).max()), "relative")


def _ids_of(completions: Sequence[Any]) -> list[Tokens]:
    return [tuple(c.token_ids) if isinstance(c, Completion) else () for c in completions]


def _length(texts: Sequence[Tokens]) -> int:
    return sum(map(len, texts))


def _subjects(grounds: Grounds) -> list[Subject]:
    given: Inputs = grounds.prepared.given
    lm = grounds.course.lm
    return [
        Subject(
            tuple(context_row(lm.codec, p, name, t, given.settings.chat)["token_ids"]),
            word_forms(p.target, lm.codec),
            row_key(0, p.prompt_id, name, 0),
        )
        for p in given.prompts
        for name, t in given.conditions.items()
    ][: grounds.num_contexts]


def _psem(grounds: Grounds) -> Timed:
    subjects = _subjects(grounds)
    fewest = least_tokens(subjects)
    line = f"psem: at least {fewest:,} tokens must be forwarded (every distinct prefix once)"
    return Timed(tuple(bench_psem(grounds.course, subjects)), (line,), {"least_tokens": fewest})


def _samples(grounds: Grounds) -> Timed:
    given: Inputs = grounds.prepared.given
    figures = bench_samples(grounds.course, _subjects(grounds), given.settings.num_samples, Path(given.model.name))
    return Timed(tuple(figures))


def _attention(grounds: Grounds) -> Timed:
    return Timed(tuple(bench_attention(grounds.course, _subjects(grounds))))


def _mechanism(grounds: Grounds) -> Timed:
    return Timed(tuple(bench_mechanism(grounds.course, _subjects(grounds), _libraries(grounds.course))))


def _patching(grounds: Grounds) -> Timed:
    given: Inputs = grounds.prepared.given
    prompts = given.prompts[: max(1, grounds.num_contexts // 8)]
    return Timed(tuple(bench_patching(grounds.course, prompts, _libraries(grounds.course), given.settings.chat)))


def _tokens(grounds: Grounds) -> Timed:
    account = least.measure(grounds)
    title = f"{grounds.course.lm.identity.name}, {len(grounds.prepared.given.prompts)} prompts"
    return Timed(lines=tuple(least.render(account, title)), found=account.to_json())


def _libraries(course: Course) -> list[peers.Library]:
    found, missing = peers.libraries(course.lm, course.at_head)
    course.skipped += [line for line in missing if line not in course.skipped]
    return found


CASES: Mapping[str, Case] = {
    "psem": Case(_psem),
    "samples": Case(_samples),
    "attention": Case(_attention),
    "mechanism": Case(_mechanism),
    "patching": Case(_patching),
    "tokens": Case(_tokens, usual=False),
}
