"""The method in short: what each number is, and what none of them says. The report's text, and part of docs/method.md.

The text stands here and nowhere else: a test holds the documentation to it.
"""

PAPER = "2601.08070"
"""The arXiv id of the method."""
SOURCE = f"S. Rana, “Semantic Gravity Wells: Why Negative Constraints Backfire” (arXiv {PAPER})"
QUESTION = (
    "A prompt asks for one word, X. Under baseline it is asked plainly; under every other condition the text tells the model, "
    "in its own way, not to say X."
)
TERMS: tuple[tuple[str, str], ...] = (
    (
        "P(X), p_sem",
        "Probability that the answer begins with X in any of its usual spellings (case, leading space, punctuation). Spellings "
        "that contain another one are dropped, so the sum cannot exceed 1. P0 is that under baseline, P1 under the condition. "
        "p_word also asks that the word ends there.",
    ),
    (
        "Says X",
        "The decoded answer, up to its first newline, contains X in any case, with no letter or digit on either side.",
    ),
    (
        "Violation rate",
        "Share of a prompt's samples that say X. Averages and intervals are over prompts, since samples of one prompt are alike.",
    ),
    ("Suppression", "Δ = P0 − P1; relative Δ/P0; and the difference of logarithms."),
    (
        "Success, failure",
        "Whether the greedy answer under the condition avoids X or says it. “Difference” is always failure − success.",
    ),
    (
        "IAR, NF, TMF, PI",
        "From the attention of the last context token. IAR: mass on the instruction over mass on instruction and question. NF: "
        "on the words that forbid, over the instruction's. TMF: on the mention of X, over the instruction's. PI = TMF − NF. "
        "Left out where a condition has no such words.",
    ),
    ("Lens", "The residual after each layer through the final norm and the unembedding: mass on X's first tokens."),
    ("Contributions", "Change of that mass across the attention block and across the MLP block of each layer."),
    (
        "Patching",
        "Under the condition, one site of one layer takes the value it has under baseline (or, in the knock-out, may not be "
        "attended to), and P(X) is computed anew, the continuation under the patch included.",
    ),
    (
        "Intervals, p, q",
        "95 %. Rates, suppression and patching: percentile bootstrap over prompts. Lens, attention, contributions: Welch's t on "
        "per-prompt values. q: Benjamini–Hochberg within each measure.",
    ),
)
"""What a reader of the numbers has to know, by term."""
LIMITS = (
    "What goes with failure need not cause it: attention, lens and contributions are correlations. Attention is where a token "
    "looks, not what it takes from there.",
    "Patching changes one site of one layer at a time: it shows what is sufficient there, not what is necessary, and effects "
    "that need several sites together are not seen.",
    "Detection is literal: a synonym, an inflection or a translation of X does not count as X.",
    "The lens reads middle layers with the last layer's unembedding, which they were not trained for: differences between "
    "outcomes are safer than levels.",
    "Numbers are of this model, these prompts and these wordings.",
)


def terms_markdown() -> str:
    """`TERMS` as docs/method.md has them."""
    return "\n".join(f"- **{term}**: {meaning}" for term, meaning in TERMS)


def limits_markdown() -> str:
    """`LIMITS` as docs/method.md has them."""
    return "\n".join(f"- {limit}" for limit in LIMITS)
