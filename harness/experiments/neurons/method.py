"""The method in short: what each number is, and what none of them says. The report's text, and part of docs/method.md.

The text stands here and nowhere else: a test holds the documentation to it.
"""

SOURCES = (
    "direct logit attribution: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits); integrated "
    "gradients: Sundararajan et al. 2017 (arXiv 1703.01365); relevance through the neuron basis: Arora et al. 2026 "
    "(arXiv 2601.22594); false negatives of gradients: Kramár et al. 2024 (AtP*, arXiv 2403.00745); moments in one "
    "pass: Pébay 2008 (SAND2008-6212); false discoveries: Benjamini & Hochberg 1995"
)
QUESTION = (
    "Which MLP neurons fire on these prompts, which of them move a given logit, and does changing them do what the "
    "ranking says? A neuron is an input of a block's last MLP projection, named layer.index, both from 0."
)
TERMS: tuple[tuple[str, str], ...] = (
    (
        "Peak, z, q",
        "A neuron's peak in a prompt is its largest |activation| over the counted tokens: neither specials nor the "
        "first positions (neurons.skip_first). z is (mean peak − the background's) over the standard error of that "
        "difference, both with the background's spread: it includes the background's own sampling error. p is "
        "two-sided, q Benjamini–Hochberg over all neurons of all layers. Kurtosis is n·M₄/M₂² of the activations: 3 "
        "for a normal distribution.",
    ),
    (
        "Target",
        "What a prompt's neurons are ranked for: a logit at one position, before any soft cap of the model; with a "
        "contrast the difference of two logits; with target = sequence the log-probability of several tokens, in "
        "nats.",
    ),
    (
        "dla",
        "Direct logit attribution: activation × what a unit of the neuron's output adds to the logit along the "
        "residual stream, every norm's scale frozen at this forward, later layers left out. Neurons, attention, "
        "embedding and biases add up to the logit; what is missing is stored as the residual. Of a sequence it is "
        "about the first token's logit.",
    ),
    (
        "act_grad",
        "Activation × gradient of the target, attention and later layers included. First order: right for small "
        "changes.",
    ),
    (
        "ig",
        "Integrated gradients along the straight path from a start (zero, or the background's mean), all neurons "
        "of all layers moved together. They add up to the difference of the target between the ends; panels of the "
        "path are halved until what is missed is under 1 %, or 32 times as many places were used as were asked for. "
        "The remainder is stored.",
    ),
    (
        "relp",
        "A gradient with norms' scales and attention patterns frozen, half of a gated product given to each factor, "
        "and a nonlinearity replaced by its secant through 0.",
    ),
    (
        "Selected, effective",
        "Selected is the smallest set that holds neurons.cumulative of Σ|influence|, cut at neurons.max_selected. "
        "Effective is e^H of the shares: how many equally important neurons they would be.",
    ),
    (
        "Measured effect, claim",
        "The target with one neuron set to 0, to its mean over the background, or to its value in another prompt, "
        "less that without: below 0 the neuron held the target up. Steering adds, turns the sign, or swaps. A "
        "metric's claim is its first-order prediction of that very change: weight × change of the activation. "
        "Targets, influence and effects are computed in float32 where the model is in half precision.",
    ),
    (
        "Agreement",
        "For every prompt, over the neurons that a metric ranks highest and that were measured: rank correlation "
        "and correlation of claim and effect, the share of equal signs, the slope of effect on claim through 0 (1: "
        "of the right size; below 1: claims are too large). Means over prompts.",
    ),
    (
        "Curve, m(k), area",
        "m(k) = (f(S) − f(∅)) / (f(all) − f(∅)), with f the target and ∅ all neurons changed. Keep leaves only the "
        "first k of a ranking as they are, drop changes only these. The area is under m over ln k from the smallest "
        "set to all. Curve and area are ratios of sums over prompts, which prompts with f(all) near f(∅) cannot upset.",
    ),
    (
        "Controls",
        "random: any order. matched: each neuron of the first metric's ranking replaced by one of its layer and its "
        "decile of |activation| there. loudest: by |activation|. They have no claim: a ranking that does no better "
        "than matched has found the right layers and loud neurons, and no more.",
    ),
    (
        "Write tokens",
        "The tokens whose logits a unit of the neuron's output raises and lowers along the residual stream, every "
        "norm at scale 1: their order is meant, not their size.",
    ),
    (
        "Intervals",
        "95 %: percentile bootstrap over prompts. p of an area against matched: paired t over prompts.",
    ),
)
"""What a reader of the numbers has to know, by term."""
LIMITS = (
    "Peaks are not influence: a loud neuron may write nothing that the target reads.",
    "dla freezes norms and leaves out all that reads a neuron later on. In life norms answer: removing a large part "
    "raises the scale of the rest, so measured effects are often smaller than dla's claims.",
    "act_grad is of first order: it misses what is flat here and steep further on, and effects that cancel (AtP*). "
    "Behind a norm after the MLP the change of a block's whole output along itself does nothing, so act_grad sums "
    "to near zero there although single neurons matter.",
    "ig is of the straight path on which all neurons move together. Points on it are no activations that the model "
    "ever has, and another path gives other values.",
    "relp's rules are conventions: they make relevance add up, and no measurement decides them.",
    "Effects are of one neuron at a time: two that cancel, or stand in for each other, show only in curves.",
    "With context = at neurons are changed at one position only, where the target is read; what they do through "
    "earlier tokens is not seen. Context = upto changes all positions up to it.",
    "Only the first neurons of each ranking are measured (neurons.effects): what no metric ranks high may matter too.",
    "matched follows the first metric alone, and may draw neurons of the ranking itself, the more of them the "
    "larger k is.",
    "A mean over the background is a state that no prompt need have; zero is one further away. Effects depend on "
    "the choice.",
    "z holds prompts against the background's texts. It says that a neuron peaks otherwise on them, not that it "
    "matters, and prompts of one form differ from running text in most neurons.",
    "A peak is a maximum over a text's tokens: prompts shorter than the background's texts have lower peaks for that "
    "alone, and longer ones higher.",
    "An interval speaks of prompts drawn like these.",
)


def terms_markdown() -> str:
    """`TERMS` as docs/method.md has them."""
    return "\n".join(f"- **{term}**: {meaning}" for term, meaning in TERMS)


def limits_markdown() -> str:
    """`LIMITS` as docs/method.md has them."""
    return "\n".join(f"- {limit}" for limit in LIMITS)
