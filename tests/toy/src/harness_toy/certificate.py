"""The certificate of surprisal: the batched forward against one text at a time."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from harness.engine import Tables
from harness.experiments.certificate import Certificate, Gap, Verdict
from harness.models.load import LM, ModelIdentity, ModelSpec, load, load_codec, shared
from harness.tolerance import TOLERANCE
from harness_toy.forward import Tokens, plain_surprisals, surprisals
from harness_toy.inputs import Inputs


@dataclass(frozen=True)
class Task:
    """One text, and those it stands beside in a batch; itself among them."""

    name: str
    text: Tokens
    company: tuple[Tokens, ...]
    is_least: bool
    kind = "surprisal"
    measurements = ("surprisal",)


@dataclass(frozen=True)
class ToyChecks:
    """One measurement, of the first texts."""

    model: ModelSpec
    identity: ModelIdentity
    num_subjects: int
    version = 1
    reads = MappingProxyType({"texts": ("text_id", "token_ids")})

    @property
    def dtype(self) -> str:
        return self.identity.dtype

    @property
    def device(self) -> str:
        return self.model.device

    def params(self) -> dict[str, Any]:
        return {"num_subjects": self.num_subjects}

    def tasks(self, tables: Tables) -> list[Task]:
        rows = [r for r in tables["texts"] if len(r["token_ids"]) > 1][: self.num_subjects]
        company = tuple(tuple(r["token_ids"]) for r in rows)
        return [
            Task(r["text_id"], text, company, n == 0) for n, (r, text) in enumerate(zip(rows, company, strict=True))
        ]

    def bench(self, is_full: bool) -> LM:
        return shared(self.model, self.identity)

    def wider(self, dtype: str, device: str, is_full: bool) -> LM:
        return load(replace(self.model, dtype=dtype, device=device))

    def measure(self, bench: LM, task: Task) -> list[Verdict]:
        gap = Gap("surprisal", task.name, TOLERANCE[bench.identity.dtype].nats)
        want = plain_surprisals(bench, task.text)
        for batch in ([task.text], task.company):
            gap.update(want, surprisals(bench, batch)[batch.index(task.text)])
        return [gap.verdict()]

    def left_out(self, bench: LM, task: Task) -> list[Verdict]:
        return [Verdict("surprisal", task.name, TOLERANCE[bench.identity.dtype].nats, left_out=True)]


def build_certificate(given: Inputs) -> Certificate[Task, LM]:
    """The stage `sanity`."""
    own = given.settings.sanity
    return Certificate.of(ToyChecks(given.model, given.identity, own.num_prompts), own)


def tables_of(given: Inputs, num_subjects: int) -> dict[str, list[dict[str, Any]]]:
    """What the certificate reads, of the first texts, without a run."""
    codec = load_codec(given.model, given.identity)
    rows = ({"text_id": t.name, "token_ids": codec.context(t.text)[0]} for t in given.texts[:num_subjects])
    return {"texts": sorted(rows, key=lambda r: r["text_id"])}
