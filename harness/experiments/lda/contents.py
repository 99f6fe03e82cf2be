"""The table of contents. A stage is one file in `stages` and one entry here, in the order of running."""

from harness.experiments.experiment import Entry
from harness.experiments.lda.certificate import certificate_of
from harness.experiments.lda.stages.analysis import Analysis
from harness.experiments.lda.stages.diff_tokens import DiffTokens
from harness.experiments.lda.stages.exact import Exact
from harness.experiments.lda.stages.hits import Hits
from harness.experiments.lda.stages.pair import PairUp
from harness.experiments.lda.stages.prompts import Prompts
from harness.experiments.lda.stages.rollouts import Rollouts
from harness.experiments.vocabulary import TokenTexts

STAGES: tuple[Entry, ...] = (
    Entry("pair", PairUp.build),
    Entry("vocabulary", lambda given: TokenTexts(given.both.after, given.both.of_after), needs=("pair",)),
    Entry("prompts", Prompts.build, needs=("vocabulary",)),
    Entry("sanity", certificate_of, needs=("prompts",)),
    Entry("exact", Exact.build, needs=("prompts",)),
    Entry("rollouts", Rollouts.build, needs=("prompts",)),
    Entry("hits", Hits.build, needs=("rollouts",)),
    Entry("diff_tokens", DiffTokens.build, needs=("prompts",)),
    Entry("analysis", Analysis.build, needs=("exact", "hits", "diff_tokens")),
)
