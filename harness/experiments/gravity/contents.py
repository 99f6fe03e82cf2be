"""The table of contents. A stage is one file in `stages` and one entry here, in the order of running."""

from harness.experiments.experiment import Entry
from harness.experiments.gravity.certificate import certificate_of
from harness.experiments.gravity.stages.analysis import Analysis
from harness.experiments.gravity.stages.detect import Detect
from harness.experiments.gravity.stages.generate import greedy, samples
from harness.experiments.gravity.stages.mechanism import Mechanism
from harness.experiments.gravity.stages.patching import Patching
from harness.experiments.gravity.stages.prompts import Prompts
from harness.experiments.gravity.stages.psem import Psem
from harness.experiments.gravity.stages.select import Select
from harness.experiments.gravity.stages.single_token import SingleToken
from harness.experiments.vocabulary import TokenTexts

STAGES: tuple[Entry, ...] = (
    Entry("vocabulary", lambda given: TokenTexts(given.model, given.identity)),
    Entry("prompts", Prompts.build, needs=("vocabulary",)),
    Entry("sanity", certificate_of, needs=("prompts",)),
    Entry("single_token", SingleToken.build, needs=("prompts",), optional=True),
    Entry("psem", Psem.build, needs=("prompts",)),
    Entry("select", Select.build, needs=("psem",), optional=True),
    Entry("greedy", greedy, needs=("prompts",)),
    Entry("samples", samples, needs=("prompts",)),
    Entry("detect", Detect.build, needs=("greedy",)),
    Entry("mechanism", Mechanism.build, needs=("greedy", "detect")),
    Entry("patching", Patching.build, needs=("psem", "greedy", "detect")),
    Entry("analysis", Analysis.build, needs=("psem", "samples", "detect")),
)
