"""The table of contents. A stage is one file in `stages` and one entry here, in the order of running."""

from harness.experiments.experiment import Entry
from harness.experiments.neurons.certificate import certificate_of
from harness.experiments.neurons.stages.analysis import Analysis
from harness.experiments.neurons.stages.dump import Dump
from harness.experiments.neurons.stages.effects import Measured
from harness.experiments.neurons.stages.influence import Influence
from harness.experiments.neurons.stages.partials import Background, Partials
from harness.experiments.neurons.stages.peaks import Peaks
from harness.experiments.neurons.stages.prompts import Prompts
from harness.experiments.neurons.stages.targets import Targets
from harness.experiments.neurons.stages.writes import Writes
from harness.experiments.vocabulary import TokenTexts

STAGES: tuple[Entry, ...] = (
    Entry("vocabulary", lambda given: TokenTexts(given.model, given.identity)),
    Entry("prompts", Prompts.build, needs=("vocabulary",)),
    Entry("sanity", certificate_of, needs=("prompts",)),
    Entry("dump", Dump.build, needs=("prompts",)),
    Entry("partials", Partials.build, needs=("prompts",)),
    Entry("background", Background.build),
    Entry("peaks", Peaks.build, needs=("partials", "background")),
    Entry("targets", Targets.build, needs=("prompts",)),
    Entry("influence", Influence.build, needs=("targets", "background")),
    Entry("effects", Measured.build, needs=("influence", "partials")),
    Entry("writes", Writes.build, needs=("influence", "peaks")),
    Entry("analysis", Analysis.build, needs=("effects", "peaks")),
)
