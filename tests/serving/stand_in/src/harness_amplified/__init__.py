"""An experiment that is nothing but its service: the bundled pair, amplified. What `harness serve` needs of one is here."""

from collections.abc import Mapping
from typing import Any, Literal

from harness.experiments.lda.settings import LdaSettings
from harness.experiments.weights import Models
from harness.settings import ExperimentSettings, Resolved
from harness.store import Schema
from tests.commands import DATA


class Amplified:
    name = "amplified"
    title = sentence = planted = "a stand-in"
    other_model: Literal["none", "optional", "required"] = "required"
    settings: type[ExperimentSettings] = LdaSettings
    schema = Schema("amplified", ())
    stages = pages = ()
    benches: Mapping[str, Any] = {}
    prepare = render = remarks = headlines = report = certify = None

    def demo(self) -> Mapping[str, Any]:
        pair = DATA / "models" / "lda"
        return {"model.name": str(pair / "after"), "other.name": str(pair / "before"), "runtime.device": "cpu"}

    def service(self, resolved: Resolved, models: Models, keys: tuple[bytes, ...]) -> Any:
        from harness.experiments.lda.service import service_of

        return service_of(resolved, models, keys)


EXPERIMENT = Amplified()
