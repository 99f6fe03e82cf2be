"""Neurons: which MLP neurons fire, which move a logit, and whether switching them off does what the ranking says.

inputs.py       what a run is made of: prompts.py, tokens.py, settings.py
packs.py        statistics over texts, and how they are merged
stages/         one file a stage; contents.py lists them
schema.py       its tables
certificate.py  every measurement, fast against plain
results         summary.py, remarks.py, report.py, figures.py: from rows to what people read; method.py says what they mean
browser/        a run on the terminal
bench.py        speed as ratios
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.experiments.experiment import Case, Entry, Headline, Page, Prepared, Report
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.remarks import Remark
from harness.experiments.weights import Models
from harness.run import Manifest, RunPaths
from harness.settings import ExperimentSettings, Resolved
from harness.store import Reader, Schema

# What loads torch, or takes a while, is imported where it is used: `harness runs` should answer at once.


class Neurons:
    """The experiment, as the registry hands it out."""

    name = "neurons"
    title = "Neurons"
    sentence = "which MLP neurons fire on these prompts, which move a logit, and what switching them off does"
    planted = (
        "This model's neurons were written into it: these numbers test the pipeline and say nothing of language models."
    )
    other_model: Literal["none", "optional", "required"] = "none"
    settings: type[ExperimentSettings] = NeuronsSettings
    pages = (
        Page("neurons", "Neurons", Path("neurons/neurons.py"), remarks=("left_out", "agreement")),
        Page("heat_map", "Token heat map", Path("neurons/heat_map.py")),
    )

    @cached_property
    def schema(self) -> Schema:
        from harness.experiments.neurons.schema import SCHEMA

        return SCHEMA

    @cached_property
    def stages(self) -> tuple[Entry, ...]:
        from harness.experiments.neurons.contents import STAGES

        return STAGES

    def demo(self) -> Mapping[str, Any]:
        return {"model.name": "planted-neurons", "neurons.writes": "all"}

    def prepare(self, resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
        from harness.experiments.neurons.inputs import prepare

        return prepare(resolved, models, stages)

    def render(self, reader: Reader, manifest: Manifest) -> list[object]:
        from harness.experiments.neurons import summary

        return summary.render(reader, manifest)

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        from harness.experiments.neurons.remarks import remarks_of

        return remarks_of(reader, manifest)

    def headlines(self, reader: Reader, manifest: Manifest) -> list[Headline]:
        from harness.experiments.neurons import summary

        return summary.headlines(reader)

    def report(self, reader: Reader, manifest: Manifest) -> Report:
        from harness.experiments.neurons.report import report

        return report(reader, manifest)

    def certify(self, prepared: Prepared, num_subjects: int) -> Mapping[str, list[dict[str, Any]]]:
        from harness.experiments.neurons.certificate import tables_of

        return tables_of(prepared.given, num_subjects)

    def browse(self, paths: RunPaths) -> int:
        from harness.experiments.neurons.browser import browse

        return browse(paths)

    @cached_property
    def benches(self) -> Mapping[str, Case]:
        from harness.experiments.neurons.bench import CASES

        return CASES


EXPERIMENT = Neurons()
