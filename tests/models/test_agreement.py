"""Logit lens and residual patching against independent libraries, on the same weights: nnsight and TransformerLens.

Neither shares a line with the harness: they run the family's eager attention, hook it their own way and know nothing of
layouts, caches or trees.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from harness.models.inside import Probe, StepView, View, look_inside
from harness.models.load import LM, Codec, assemble
from harness.models.patch import Pair, Patched, sweep
from harness.text.words import Tokens, build_trie
from tests.tiny import build_model, byte_tokenizer, identity

FAMILIES = ("tiny-llama", "tiny-qwen3", "tiny-gpt2", "tiny-neox")
CLOSE = 1e-4
"""On probabilities, log-probabilities and nats: float32 rounding of logits up to about 60."""
SOURCE, TARGET, LONG = (
    tuple(np.random.default_rng(length).integers(1, 256, length).tolist()) for length in (15, 19, 27)
)
WORDS: tuple[Tokens, ...] = ((65,), (66,), (200,), (7, 80), (7, 9, 11))
"""Single tokens, so that their probability is the next token's, and two words whose later tokens must be recomputed."""
TARGETS = (65, 7, 200)


def model_of(family: str) -> Any:
    """Weights that do not depend on who asks. Its final norm is uneven: applied twice, an even one would not show."""
    model = build_model(family)
    norm = {"tiny-gpt2": "transformer.ln_f", "tiny-neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
    weight = model.get_submodule(norm).weight
    weight.mul_(0.3 + 1.4 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(11)))
    return model


def lm_of(family: str) -> LM:
    return assemble(model_of(family), Codec(byte_tokenizer()), identity(family))


def eager(family: str) -> Any:
    """The same weights in a model of their own, which never meets our attention."""
    model = model_of(family)
    model.set_attn_implementation("eager")
    return model


class Reference(NamedTuple):
    """What a library says of one text: log-probabilities after every block's output, and the model's own."""

    entered: Float[Tensor, "T V"]
    """The lens on what enters the first block."""
    lens: Float[Tensor, "L T V"]
    final: Float[Tensor, "T V"]


class Library(Protocol):
    """The two things asked of a library, on one loaded model."""

    def look(self, tokens: Tokens) -> Reference: ...

    def patched(self, source: Tokens, target: Tokens, at: int, layer: int) -> Float[Tensor, "T V"]:
        """The target's log-probabilities, the output of block `layer` at token `at` being that of the source's last."""
        ...


class NNsight:
    """A `with` block of a trace is taken as source code and run beside the forward: what leaves it must be saved."""

    def __init__(self, family: str) -> None:
        nnsight = pytest.importorskip("nnsight")
        self.save = nnsight.save
        self.model = nnsight.NNsight(eager(family))
        self.decoder = getattr(self.model, {"tiny-gpt2": "transformer", "tiny-neox": "gpt_neox"}.get(family, "model"))
        names = {"tiny-gpt2": ("h", "ln_f"), "tiny-neox": ("layers", "final_layer_norm")}.get(
            family, ("layers", "norm")
        )
        self.blocks, self.norm = (getattr(self.decoder, name) for name in names)
        self.head = self.model.lm_head

    def look(self, tokens: Tokens) -> Reference:
        save, blocks, norm, head = self.save, self.blocks, self.norm, self.head
        with torch.inference_mode(), self.model.trace(input_ids=torch.tensor([tokens]), use_cache=False):
            entered = save(head(norm(blocks[0].input)))
            outputs = [block.output for block in blocks]
            lens = save([head(norm(output)) for output in outputs])
            final = save(self.model.output.logits)
        lens = torch.cat(lens)
        return Reference(*(logits.log_softmax(-1).double() for logits in (entered[0], lens, final[0])))

    def patched(self, source: Tokens, target: Tokens, at: int, layer: int) -> Float[Tensor, "T V"]:
        save, block = self.save, self.blocks[layer]
        with torch.inference_mode(), self.model.trace(input_ids=torch.tensor([source]), use_cache=False):
            value = save(block.output[0, -1].clone())
        with torch.inference_mode(), self.model.trace(input_ids=torch.tensor([target]), use_cache=False):
            block.output[0, at] = value
            logits = save(self.model.output.logits)
        return logits[0].log_softmax(-1).double()


class TransformerLens:
    """The bridge, without any of the rewriting of weights that it offers."""

    def __init__(self, family: str) -> None:
        bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
        self.model = bridge.boot_transformers("tiny", hf_model=eager(family), tokenizer=byte_tokenizer())

    def look(self, tokens: Tokens) -> Reference:
        with torch.inference_mode():
            logits, cache = self.model.run_with_cache(torch.tensor([tokens]))
            resid = [cache["blocks.0.hook_resid_pre"]]
            resid += [cache[f"blocks.{n}.hook_resid_post"] for n in range(self.model.cfg.n_layers)]
            entered, *lens = (self.model.unembed(self.model.ln_final(x)) for x in resid)
        return Reference(*(x.log_softmax(-1).double() for x in (entered[0], torch.cat(lens), logits[0])))

    def patched(self, source: Tokens, target: Tokens, at: int, layer: int) -> Float[Tensor, "T V"]:
        name = f"blocks.{layer}.hook_resid_post"
        with torch.inference_mode():
            value = self.model.run_with_cache(torch.tensor([source]))[1][name][0, -1]

            def put(resid: Tensor, hook: object) -> Tensor:
                changed = resid.clone()
                changed[0, at] = value
                return changed

            logits = self.model.run_with_hooks(torch.tensor([target]), fwd_hooks=[(name, put)])
        return logits[0].log_softmax(-1).double()


LIBRARIES = {"nnsight": NNsight, "transformer_lens": TransformerLens}
everywhere = pytest.mark.parametrize("family", FAMILIES)
by_each = pytest.mark.parametrize("library", LIBRARIES)


# The lens


def probe(tokens: Tokens, at: int) -> Probe:
    return Probe(tokens, (at,), (33,), TARGETS, dict.fromkeys(("instruction", "negation", "mention", "question")))


def statistics(log_p: Float[Tensor, "L V"], final: Float[Tensor, " V"]) -> dict[str, Float[np.ndarray, " L"]]:
    """Of every layer, written out."""
    p = log_p.exp()
    return {
        "p_target": sum(p[:, t] for t in TARGETS).numpy(),  # type: ignore[union-attr]
        "p_emitted": p[:, 33].numpy(),
        "entropy": -(p * log_p).sum(-1).numpy(),
        "kl_final": (final.exp() * (final - log_p)).sum(-1).numpy(),
    }


def step_of(view: object) -> StepView:
    assert isinstance(view, View), view
    return view.steps[0]


@everywhere
@by_each
def test_our_lens_is_the_librarys(library: str, family: str) -> None:
    """Two texts in one padded batch of ours, looked at in the middle and at the end; one at a time in the library."""
    other = LIBRARIES[library](family)
    places = ((LONG, 26), (SOURCE, 6))
    views = look_inside(lm_of(family), [probe(tokens, at) for tokens, at in places])
    for (tokens, at), view in zip(places, views, strict=True):
        step, want = step_of(view), other.look(tokens)
        for name, values in statistics(want.lens[:, at], want.final[at]).items():
            assert step.lens[name] == pytest.approx(values, abs=CLOSE), name
        top = want.lens[:, at].topk(5)
        assert step.lens["top_probs"] == pytest.approx(top.values.exp().numpy(), abs=CLOSE)
        assert (step.lens["top_ids"] == top.indices.numpy()).all()
        before = want.entered[at, list(TARGETS)].exp().sum().item()
        assert step.p_in == pytest.approx([before, *step.p_out[:-1]], abs=CLOSE)
        assert torch.allclose(want.lens[-1], want.final, atol=CLOSE), "the library's own last lens is its output"


@everywhere
@by_each
def test_layers_and_tokens_differ_by_much_more_than_the_agreement_allows(library: str, family: str) -> None:
    """The control: had we read another layer, or another token, or the final norm twice, the test above would fail."""
    other, lm = LIBRARIES[library](family), lm_of(family)
    want = other.look(LONG)
    step = step_of(look_inside(lm, [probe(LONG, 26)])[0])
    mine = np.stack([step.lens["entropy"], step.lens["kl_final"]])
    for wrong in (want.lens[:, 26].roll(1, 0), want.lens[:, 25]):
        named = statistics(wrong, want.final[26])
        assert np.abs(mine - np.stack([named["entropy"], named["kl_final"]])).max(0).min() > 20 * CLOSE
    with torch.inference_mode():
        twice = lm.anatomy.final_norm(lm.anatomy.final_norm(lm.model.get_input_embeddings()(torch.tensor(LONG))))
        once = lm.anatomy.final_norm(lm.model.get_input_embeddings()(torch.tensor(LONG)))
        gap = (lm.logits(twice).log_softmax(-1) - lm.logits(once).log_softmax(-1)).abs().max(-1).values
    assert gap.min() > 20 * CLOSE


# Patching


def patched_words(other: Library, layer: int) -> Float[np.ndarray, " W"]:
    """ln P of every word after the patched target, one forward of target + word each."""
    last = len(TARGET) - 1
    found = []
    for word in WORDS:
        log_p = other.patched(SOURCE, TARGET + word[:-1], last, layer)
        found.append(sum(log_p[last + n, token].item() for n, token in enumerate(word)))
    return np.array(found)


def sweep_words(lm: LM, source: Sequence[int] = SOURCE) -> Float[np.ndarray, "N W"]:
    """The same of ours: the untouched target, then one row a layer, all from one forward."""
    rows = sweep(lm, Pair(tuple(source), TARGET), ["resid"], build_trie(WORDS), 1)
    assert [(r.patch, r.layer) for r in rows if isinstance(r, Patched)] == [
        ("", -1), *(("resid", n) for n in range(len(lm.anatomy.blocks)))
    ]  # fmt: skip
    return np.stack([r.scores.logprobs for r in rows if isinstance(r, Patched)])


@everywhere
@by_each
def test_a_patched_residual_stream_gives_the_librarys_probabilities_at_every_layer(library: str, family: str) -> None:
    other, lm = LIBRARIES[library](family), lm_of(family)
    untouched, *mine = sweep_words(lm)
    singles = [n for n, word in enumerate(WORDS) if len(word) == 1]
    own = other.look(TARGET).final[-1]
    assert untouched[singles] == pytest.approx([own[WORDS[n][0]].item() for n in singles], abs=CLOSE)
    for layer, row in enumerate(mine):
        want = patched_words(other, layer)
        assert row == pytest.approx(want, abs=CLOSE), f"layer {layer}"
        # p_sem of a word of one token is the probability of that token.
        assert np.exp(row[singles]).sum() == pytest.approx(np.exp(want[singles]).sum(), abs=CLOSE)


@everywhere
def test_each_layers_patch_changes_what_is_said_in_its_own_way(family: str) -> None:
    """The control: a patch at the layer before or after, or none, is far from what agrees."""
    rows = sweep_words(lm_of(family))
    for one in range(len(rows)):
        for another in range(one):
            assert np.abs(rows[one] - rows[another]).max() > 20 * CLOSE, (one, another)
    own = sweep_words(lm_of(family), TARGET)
    assert own[1:] == pytest.approx(np.repeat(own[:1], len(own) - 1, 0), abs=CLOSE), (
        "its own activations change nothing"
    )
