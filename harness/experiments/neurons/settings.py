"""The settings of the neuron experiment: the section `[neurons]`."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from harness.settings import ExperimentSettings, Names, number_of, words_of

METRICS = ("dla", "act_grad", "ig", "relp")
"""The attributions, in the order in which they are told."""
CONTROLS = ("random", "matched", "loudest")
"""Sets of neurons that a curve is held against."""
LEVEL = 0.05
"""Share of false discoveries up to which a neuron counts as beyond the background."""
Metric = Literal["dla", "act_grad", "ig", "relp"]
TargetMode = Literal["last_token", "next_token", "top1_logit", "sequence"]
DumpDtype = Literal["off", "float32", "bfloat16", "float16"]


def _positions(value: str) -> str:
    if value not in ("all", "last") and not re.fullmatch(r"sample:[1-9][0-9]{0,5}", value):
        raise ValueError(f"expected all, last or sample:N, found {value[:80]!r}")
    return value


def _layers(value: object) -> object:
    """`all`, or whole numbers."""
    words = words_of(value)
    if words in ("all", ["all"], ("all",)):
        return ()
    return [number_of(w) for w in words] if isinstance(words, list | tuple) else [number_of(words)]


def _distinct(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


def _metrics(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """In their order, so that it decides nothing."""
    if not metrics:
        raise ValueError(f"expected at least one of {', '.join(METRICS)}, found none")
    return tuple(m for m in METRICS if m in metrics)


def _curve(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


Size = Annotated[int, Field(ge=1, le=10**9)]


class NeuronsSettings(ExperimentSettings):
    """Which activations are read, which logit they are ranked for, what is measured by ablation."""

    text: str = ""
    """One prompt, in place of a prompt file."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_layers), AfterValidator(_distinct)] = ()
    """`all`, or layers by number, the first being 0."""
    positions: Annotated[str, AfterValidator(_positions)] = "all"
    """Tokens whose activations are dumped and counted: `all`, `last`, or `sample:N` of each prompt."""
    skip_first: Annotated[int, Field(ge=0, le=10**6)] = 1
    """Positions at the start that statistics leave out; specials always are. They are dumped all the same."""
    prepend_bos: bool = True
    """Off leaves out the special tokens that the tokenizer puts in front."""
    dump: DumpDtype = "float16"
    """Whole activations as files, rounded to this; `off`: none."""
    background: str = "bundled"
    """What peaks are compared with: a file of one text a line, `bundled`, or `off`."""
    pack: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Prompts whose statistics are made together and kept as one file."""
    top_examples: Annotated[int, Field(ge=1, le=1000)] = 20
    """Prompts kept for each neuron: those in which it peaks highest."""
    target: TargetMode = "top1_logit"
    """The logit that neurons are ranked for: `top1_logit` (the argmax at `target_pos`), `last_token` (the prompt's own last
    token, read one position before it), `next_token` (the one that `token` names), `sequence` (all tokens of `token`)."""
    token: str = ""
    """The target of `next_token` and `sequence`: text, leading space included, or `id:N`. A prompt's own goes before it."""
    contrast: str = ""
    """A token to subtract: the difference of two logits is ranked for. A prompt's own goes before it."""
    target_pos: int = -1
    """Position whose logits are read; negative ones count from the end."""
    context: Literal["at", "upto"] = "at"
    """`at`: the neurons at that position; `upto`: summed over all positions up to it."""
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(words_of), AfterValidator(_metrics)] = METRICS
    """Attributions: direct (dla), activation × gradient, integrated gradients, relevance (relp)."""
    ig_steps: Annotated[int, Field(ge=1, le=4096)] = 32
    """Midpoints of the path of integrated gradients."""
    ig_baseline: Literal["zero", "mean"] = "zero"
    """Where that path begins: at no activation, or at the mean of the background."""
    cumulative: Annotated[float, Field(ge=0, le=1)] = 0.8
    """`selected` marks the smallest set of neurons that holds this share of Σ|influence|; 0 is off."""
    max_selected: Annotated[int, Field(ge=1, le=10**6)] = 2000
    """Of that set no more than these are kept."""
    ablate: Literal["zero", "mean", "resample"] = "mean"
    """What a neuron is set to: nothing, its mean over the background, its value in another prompt."""
    effect: Literal["ablate", "add", "flip", "swap"] = "ablate"
    """What `effects` measures: ablation as above, or steering: `add` puts `strength` standard deviations on top, `flip`
    turns the sign, `swap` goes `strength` of the way to the value in another prompt."""
    strength: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Of `add` and `swap`."""
    effects: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Neurons of each ranking whose effect is measured one by one."""
    curve: Annotated[tuple[Size, ...], BeforeValidator(words_of), AfterValidator(_curve)] = (
        1, 2, 5, 10, 20, 50, 100, 200, 500,
    )  # fmt: skip
    """Sizes of the sets that are kept, and dropped; none: no curves."""
    writes: Literal["ranked", "all", "off"] = "ranked"
    """Neurons whose write tokens are computed: those that a ranking names, or all."""
    top_writes: Annotated[int, Field(ge=1, le=1000)] = 15
    """Tokens each way."""
    write_tokens: Names = ()
    """Further tokens (text or `id:N`) whose logits are computed for each of these neurons."""
    functional_tokens: str = "bundled"
    """A file of one word a line: `share_functional` is the share of peaks at them. `bundled` is English; `off`: none."""

    @model_validator(mode="after")
    def _has_a_target(self) -> "NeuronsSettings":
        if self.contrast and self.target == "sequence":
            raise ValueError(
                "contrast: expected one token's logit to subtract from, found target = sequence; leave it out"
            )
        return self

    @property
    def kind(self) -> str:
        """What a row of `effects` was made by."""
        return self.ablate if self.effect == "ablate" else self.effect
