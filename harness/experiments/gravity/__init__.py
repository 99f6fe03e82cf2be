"""Semantic gravity: how strongly a prompt pulls toward a word, how often a ban on it fails, and what explains it.

inputs.py       what a run is made of: prompts.py, conditions.py, settings.py
stages/         one file a stage; contents.py lists them
schema.py       its tables
certificate.py  every measurement, fast against plain
analysis        bins.py, summary.py, remarks.py, figures.py, report.py: from rows to what people read
bench.py        speed as ratios; least.py: tokens forwarded, against the least possible
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from harness.experiments.experiment import Case, Entry, Headline, Page, Prepared, Report
from harness.experiments.gravity.settings import GravitySettings
from harness.experiments.remarks import Remark
from harness.experiments.weights import Models
from harness.run import Manifest
from harness.settings import ExperimentSettings, Resolved
from harness.store import Reader, Schema

# What loads torch, or takes a while, is imported where it is used: `harness runs` should answer at once.


class Gravity:
    """The experiment, as the registry hands it out."""

    name = "gravity"
    title = "Semantic gravity"
    sentence = (
        "how strongly a prompt pulls toward a word X, how often “do not use X” fails, and what inside explains it"
    )
    planted = "The bundled demo model's answers are planted: these numbers test the pipeline and say nothing of language models."
    other_model: Literal["none", "optional", "required"] = "none"
    settings: type[ExperimentSettings] = GravitySettings

    @cached_property
    def schema(self) -> Schema:
        from harness.experiments.gravity.schema import SCHEMA

        return SCHEMA

    @cached_property
    def stages(self) -> tuple[Entry, ...]:
        from harness.experiments.gravity.contents import STAGES

        return STAGES

    @cached_property
    def pages(self) -> tuple[Page, ...]:
        from harness.experiments.gravity.pages import PAGES

        return PAGES

    def demo(self) -> Mapping[str, Any]:
        return {}  # the defaults: the demo model and the bundled prompts

    def prepare(self, resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
        from harness.experiments.gravity.inputs import prepare

        return prepare(resolved, models, stages)

    def render(self, reader: Reader, manifest: Manifest) -> list[object]:
        from harness.experiments.gravity import summary

        return summary.render(summary.summarise(reader, manifest), manifest)

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        from harness.experiments.gravity.remarks import remarks_of

        return remarks_of(reader, manifest)

    def headlines(self, reader: Reader, manifest: Manifest) -> list[Headline]:
        from harness.experiments.gravity.summary import headlines

        return headlines(reader)

    def report(self, reader: Reader, manifest: Manifest) -> Report:
        from harness.experiments.gravity.report import report

        return report(reader, manifest)

    def certify(self, prepared: Prepared, num_subjects: int) -> Mapping[str, list[dict[str, Any]]]:
        from harness.experiments.gravity.certificate import tables_of

        return tables_of(prepared.given, num_subjects)

    @cached_property
    def benches(self) -> Mapping[str, Case]:
        from harness.experiments.gravity.bench import CASES

        return CASES


EXPERIMENT = Gravity()
