"""The method in short: what each number is, and what none of them says. The report's text, and part of docs/method.md.

The text stands here and nowhere else: a test holds the documentation to it.
"""

SOURCE = "S. Aranguri and T. McGrath, “Model Diff Amplification” (Goodfire, 2025)"
QUESTION = (
    "A training changed a model. Sampling from after + α·(after − before) makes what it changed more frequent, so that a "
    "behaviour of one answer in ten thousand is seen in a hundred rollouts, and its rate without amplification is worked out."
)
TERMS: tuple[tuple[str, str], ...] = (
    (
        "Arm, α",
        "One value of α. With ℓ the log-probabilities over the tokens that both models have, an arm draws from the softmax of "
        "ℓ_after + α(ℓ_after − ℓ_before). α = 0 is the model after, α = −1 the one before, above 0 is amplified. The same "
        "arithmetic: contrastive decoding (arXiv 2210.15097), DExperts (arXiv 2105.03023).",
    ),
    (
        "Rollout, detector, hit",
        "A rollout is one completion of one prompt under one arm. A detector is a rule on its text up to the end of text. A "
        "hit is a rollout in which the detector fires, wherever in the text that is.",
    ),
    (
        "Rate",
        "Mean over prompts of the share of hits among a prompt's rollouts, since rollouts of one prompt are alike. Failed "
        "rollouts are in neither part of the share and are counted apart.",
    ),
    (
        "Exact rate at the start",
        "The probability that a completion begins with one of the detector's phrases: a sum over ways to tokenise them, none of "
        "which begins another, and no sampling. Temperature 1 and nothing cut off, whatever the rollouts were drawn with. "
        "Where not all ways were followed it is a lower end, and the upper end adds the whole probability of the others.",
    ),
    (
        "Natural rate",
        "The rate at α = 0 and temperature 1 with nothing cut off: what use of the model after would show. Exact, sampled and "
        "reweighted rates measure it; the extrapolated one does not, and stands apart.",
    ),
    (
        "Reweighted, effective hits",
        "Hits of all arms, each weighed by how probable it is at α = 0 against the mixture of the arms as they were drawn "
        "(the balance heuristic, Veach & Guibas 1995; of rare outputs, arXiv 2604.22167). Only the tokens up to where the "
        "detector is sure are weighed. Effective hits are (Σw)²/Σw² (Kish): how many equally weighted hits they are worth.",
    ),
    (
        "Extrapolated",
        "A line through logit(rate) against α over the arms above 0 with at least 5 hits, read off at 0 (Pernice & Aranguri "
        "2026). It assumes that form, and has no interval.",
    ),
    (
        "Contrast",
        "The rate of an arm less that at α = 0, paired by prompt and sample. Unless common noise is off, the same sample "
        "has the same noise in every arm, and two texts are the same until amplification changes a choice: the branch step.",
    ),
    (
        "Raised and lowered tokens",
        "Mean over contexts of ℓ_after − ℓ_before for every token (after “Diff Mining”, ICLR 2026), where the answer begins and "
        "at every token of the prompts; and in how many contexts it is among the 100 most raised.",
    ),
    (
        "Mass removed",
        "The probability that floor and top-p took away: mean over rollouts of the mean over their tokens. The floor drops "
        "tokens less probable than its share of the most probable one by the model after (arXiv 2210.15097), whatever α.",
    ),
    (
        "Intervals, p, q",
        "95 %: percentile bootstrap over prompts, and 0 to 3/n for no hit in n rollouts (rule of three). p: paired t over "
        "prompts. q: Benjamini–Hochberg over detectors × arms.",
    ),
)
"""What a reader of the numbers has to know, by term."""
LIMITS = (
    "The prompts are the sample: rates are of these prompts in this format, and intervals speak of prompts drawn like them, "
    "not of what users ask.",
    "A rollout ends at the limit of new tokens: what the model would have said further on is in no rate.",
    "A phrase at the start and a detector that fires anywhere are two events. They agree where the behaviour begins the answer.",
    "Temperature, top-p and floor are part of what is measured. With any of them the sampled rate at α = 0 is no natural rate, "
    "and a token that is cut off cannot appear, whatever α.",
    "An extrapolated rate is a guess of a form: a line in logit(rate) need not hold down to α = 0.",
    "What amplification shows is possible under the arm that showed it. Text of a large α can be of no use: read the hits.",
    "Detection is literal: a paraphrase of what is looked for is no hit.",
    "Raised tokens tell where the two models differ on these contexts, and not why.",
)


def terms_markdown() -> str:
    """`TERMS` as docs/method.md has them."""
    return "\n".join(f"- **{term}**: {meaning}" for term, meaning in TERMS)


def limits_markdown() -> str:
    """`LIMITS` as docs/method.md has them."""
    return "\n".join(f"- {limit}" for limit in LIMITS)
