"""Surprisal: how many nats or bits each token of a text takes a language model by surprise. A small experiment, to be
read as an example (docs/experiments.md).

settings.py     its section of the settings
schema.py       its tables
inputs.py       its texts, and all that a run is made of
forward.py      surprisal itself: many texts in one forward, and one text plainly
stages.py       its stages, and the table of contents
certificate.py  the one forward against the other
results.py      from rows to what people read
bench.py        the same two, timed
page.py         its page of the review app
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.experiments.experiment import Case, Entry, Headline, Page, Prepared, Report
from harness.experiments.remarks import Remark
from harness.experiments.weights import Models
from harness.run import Manifest
from harness.settings import ExperimentSettings, Resolved
from harness.store import Reader, Schema
from harness_toy.schema import SCHEMA
from harness_toy.settings import ToySettings

# What loads torch, or takes a while, is imported where it is used: `harness runs` should answer at once.


class Toy:
    """The experiment, as the registry hands it out."""

    name = "toy"
    title = "Surprisal"
    sentence = "how surprised a model is by each token of a text"
    planted = "This model was never trained: it shows that the numbers are right, and says nothing of language."
    other_model: Literal["none", "optional", "required"] = "none"
    settings: type[ExperimentSettings] = ToySettings
    schema: Schema = SCHEMA
    pages = (Page("surprisal", "Surprisal", Path(__file__).parent / "page.py", needs=("surprisals",)),)

    @cached_property
    def stages(self) -> tuple[Entry, ...]:
        from harness_toy.stages import STAGES

        return STAGES

    def demo(self) -> Mapping[str, Any]:
        return {"model.name": "random:tiny-llama"}  # it knows nothing, so ln V nats a token is what is to come out

    def prepare(self, resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
        from harness_toy.inputs import prepare

        return prepare(resolved, models)

    def render(self, reader: Reader, manifest: Manifest) -> list[object]:
        from harness_toy import results

        return results.render(reader, manifest)

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        return []

    def headlines(self, reader: Reader, manifest: Manifest) -> list[Headline]:
        from harness_toy import results

        return results.headlines(reader, manifest)

    def report(self, reader: Reader, manifest: Manifest) -> Report:
        from harness_toy import results

        return results.report(reader, manifest)

    def certify(self, prepared: Prepared, num_subjects: int) -> Mapping[str, list[dict[str, Any]]]:
        from harness_toy import certificate

        return certificate.tables_of(prepared.given, num_subjects)

    @cached_property
    def benches(self) -> Mapping[str, Case]:
        from harness_toy import bench

        return bench.CASES


EXPERIMENT = Toy()
