"""All settings of a command: the only reader of environment variables, settings files and flags.

Flags win over environment variables, those over a TOML file, those over defaults; every value remembers which of them
it came from. The tree is frozen, unknown names are refused with the nearest known one, and importing this module
touches no disk.
"""

import difflib
import json
import os
import re
import tomllib
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from harness.errors import SettingsError
from harness.files import read_regular

PREFIX = "HARNESS_"
ALIASES = {
    "HF_HOME": "paths.hf_home",
    "MODEL_PATH": "model.name",
    "DATA_ROOT": "paths.data",
    "OUTPUT_ROOT": "paths.runs",
}
"""Environment names that people already have, and the setting each one is."""
NOT_SETTINGS = ("HARNESS_IMAGE_REVISION", "HARNESS_IMAGE_VERSION", "HARNESS_IMAGE_CREATED", "HARNESS_IMAGE_SOURCE",
                "HARNESS_IMAGE_DIGEST", "HARNESS_IMAGE_SBOM_SHA256")  # fmt: skip
"""What a container says about itself, its labels and what it was handed: facts for the manifest."""
SECTION_ALIASES = {"gravity": "experiment"}
"""Other names of sections, in flags, variables and files. What is recorded has the name on the right."""
SHORT_FLAGS = {
    "model": "model.name",
    "prompts": "data.prompts",
    "limit": "data.limit",
    "stages": "experiment.stages",
}
DEMO_MODEL = "demo"
BUNDLED_PROMPTS = "bundled"
MOST_FILE_BYTES = 1_000_000
"""A settings file is read whole; a thousand long templates fit in this."""
_MOST_SHOWN = 200  # characters of a found value are enough to recognise it in a one-line message


def _words(value: object) -> object:
    """A list may be written `a,b` or as JSON wherever text is all there is (flags, environment)."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("[", "{")):
            try:
                return json.loads(text, object_pairs_hook=_once)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"expected a JSON list or table, or names separated by commas: {e}") from e
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table whose keys are each there once: json would keep the last of two and say nothing."""
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


def _number(value: object) -> object:
    """Text that is a number, as flags and the environment give it."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,4000}", value.strip()) else value


def _named(templates: Any) -> Any:
    """Names of conditions go into keys, tables and figures: a bar would make two keys one."""
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w.][\w. -]{0,63}", name):
            raise ValueError(
                "expected names of conditions of at most 64 letters, digits, spaces and . _ -, "
                f"found the name {_shortened(name)}"
            )
    return templates


Names = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Section(BaseModel):
    """One section of the tree: frozen, and closed to names that are not fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: Any) -> object:
        """No truth value for a number, which Python would take for 0 or 1, and no text that no file could hold."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("expected no truth value")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError("expected text in UTF-8 without a NUL")
        return value


class ModelSettings(Section):
    """Which model, and how it is loaded."""

    name: str = DEMO_MODEL
    """`demo` (the bundled model), a name that `harness fetch --list` shows, a Hugging Face id, a checkpoint folder, a GGUF
    file, or `random:<shape>`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; resolved to a commit and recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """`auto`: the checkpoint's own, the same on every device; float32 for a GGUF file."""
    trust_remote_code: bool = False
    """Run Python that comes with a checkpoint. Only as a flag, beside `--model` in the same command."""


class DataSettings(Section):
    """Which prompts, and how many of them."""

    prompts: str = BUNDLED_PROMPTS
    """A JSONL, CSV or Parquet file; `bundled` is data/prompts/gravity.jsonl."""
    limit: Annotated[Annotated[int, Field(ge=1, le=10**9)] | Literal["auto", "all"], BeforeValidator(_number)] = "auto"
    """Prompts to use, taken in turn from the categories, or `all`; `auto`: 250 of the bundled set, all of any other."""

    @property
    def num_prompts(self) -> int | None:
        """How many prompts to take; None for all."""
        if self.limit == "auto":
            return 250 if self.prompts == BUNDLED_PROMPTS else None
        return None if self.limit == "all" else self.limit


class TemplateSettings(Section):
    """One condition's template."""

    text: str
    """The whole prompt, with {question} once and {target}, {category}, {style} where wanted."""
    instruction: str | None = None
    """The words of the template that instruct, where that is not all before the question's line."""
    negation: str | None = None
    """The words that forbid, where they are not found by themselves ("Do not use")."""


def _condition(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


Condition = Annotated[TemplateSettings, BeforeValidator(_condition)]


class SelectSettings(Section):
    """The rules of the optional stage `select`."""

    min_p0: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Lowest P0 of a selected prompt."""
    per_bin: Annotated[int, Field(ge=1)] = 100
    """Most prompts from one category in one of the bins [0,.2) [.2,.4) [.4,.6) [.6,.8) [.8,1]."""
    max_categories: Annotated[int, Field(ge=1)] = 2
    """Most categories in which one target may be selected."""


class StoredSettings(Section):
    """The prompts whose whole attention rows and residual streams are kept as files."""

    prompts: Names = ()
    """Their ids. Empty: chosen by outcome, see `max_per_category`."""
    max_per_category: Annotated[int, Field(ge=0)] = 20
    """Most prompts of a category whose greedy answer fails under some condition; as many that succeed are kept beside
    them. 0 keeps none."""


class PatchingSettings(Section):
    """The subset of prompts that activation patching takes, and between which conditions."""

    condition: str = "negative"
    """The condition that is patched with what `baseline` shows."""
    min_p0: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lowest P0 of the subset; unset computes it from the run's own P0 (its third quartile, kept within .7 and .95)."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """Most prompts of either outcome; unset takes all successes and as many failures."""


class SanitySettings(Section):
    """The certificate that every run makes of itself: the fast path against a plain reference."""

    num_prompts: Annotated[int, Field(ge=1)] = 2
    """Prompts measured both ways, in every condition."""
    budget: Annotated[float, Field(ge=0, le=1e9)] | Literal["auto", "unlimited"] = "auto"
    """Seconds it may take; what does not fit is left out, by name. `auto`: 5 % of the run, a minute at most. Each
    measurement is made once even at 0. `unlimited`: everything, with every spelling of every patch."""


class ExperimentSettings(Section):
    """What is measured: conditions, stages, sampling."""

    conditions: Annotated[tuple[str, ...] | dict[str, Condition], BeforeValidator(_words), AfterValidator(_named)] = (
        "baseline",
        "negative",
    )
    """Names of conditions to run, or a table of own templates, which are run beside the two built in."""
    templates: Annotated[dict[str, Condition], BeforeValidator(_words), AfterValidator(_named)] = Field(
        default_factory=dict
    )
    """Own templates by name, for `conditions` to name."""
    chat: bool = False
    """Wrap every prompt in the model's chat template instead of completing raw text."""
    stages: Names = ()
    """Stages to run; what they need is added. Empty: all that are not optional."""
    num_samples: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Sampled completions a prompt and condition."""
    sample_conditions: Names = ()
    """Conditions to sample under. Empty: all of `conditions`."""
    temperature: Annotated[float, Field(ge=1e-4, le=1e4)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""
    max_new_tokens_greedy: Annotated[int, Field(ge=1, le=100_000)] = 8
    max_new_tokens_samples: Annotated[int, Field(ge=1, le=100_000)] = 10
    stop_at_newline: bool = True
    """Off lets the model run on past its answer, as the paper did."""
    select: SelectSettings = SelectSettings()
    stored: StoredSettings = StoredSettings()
    patching: PatchingSettings = PatchingSettings()
    sanity: SanitySettings = SanitySettings()


class BatchingSettings(Section):
    """How much is computed at once; decides no result."""

    max_tokens: Annotated[Annotated[int, Field(ge=1, le=10**12)] | Literal["auto"], BeforeValidator(_number)] = "auto"
    """Padded tokens a batch (rows × longest row); `auto` measures on a GPU, and is 8192 on a CPU."""
    reserve_gb: Annotated[float, Field(ge=0, le=1e6)] = 6.0
    """GPU memory to leave free, in GB."""


class RuntimeSettings(Section):
    """Where it is computed, and the seed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cuda` without a GPU is an error, `auto` says what it chose."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of every random number."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads for torch; unset leaves torch's own choice."""
    executor: Literal["inline"] = "inline"
    """Who computes the batches."""
    reserve_disk_gb: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """Disk to leave free, in GB; a run that would cross it stops, resumable."""


class PathSettings(Section):
    """Where things are on this machine."""

    runs: Path = Path("runs")
    """Where runs are kept."""
    data: Path | None = None
    """The data folder; unset: ./data, or the one this installation came with."""
    hf_home: Path | None = None
    """Hugging Face's cache; unset leaves its own default."""
    cache: Path | None = None
    """Where `harness fetch` keeps models; unset: $XDG_CACHE_HOME/harness, or ~/.cache/harness."""

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_a_path(cls, value: Path | None) -> Path | None:
        """The system refuses such a name wherever it is first used, and nowhere with the name of the setting."""
        if value and (len(os.fsencode(value)) > 4_000 or any(len(os.fsencode(part)) > 255 for part in value.parts)):
            raise ValueError("expected a path of at most 4000 bytes, 255 a name")
        return value

    @property
    def state_folder(self) -> Path:
        """What this user keeps from one command to the next, outside of any run (XDG Base Directory Specification)."""
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(home) / "harness"

    @property
    def cache_folder(self) -> Path:
        """What can be had again, and is kept so that it need not be (XDG Base Directory Specification)."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.cache if self.cache is not None else Path(home) / "harness"

    @property
    def data_folder(self) -> Path:
        """The data folder in effect."""
        if self.data is not None:
            return self.data
        here = Path("data")
        return (
            here if (here / "prompts" / "gravity.jsonl").is_file() else Path(__file__).resolve().parent.parent / "data"
        )


class Settings(BaseSettings):
    """The whole tree; build it with `resolve`, which also knows where each value came from."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    batching: BatchingSettings = BatchingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    paths: PathSettings = PathSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `resolve` hands over: it merges the sources itself, to keep the origin of each value."""
        return (init_settings,)


@dataclass(frozen=True)
class Resolved:
    """Settings and, per dotted name, where the value came from: `default`, `run: …`, `file: …`, `env: …` or `flag: …`."""

    settings: Settings
    sources: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """(name, value, source) of every setting."""
        for name, value in _flatten(self.settings.model_dump(mode="json")):
            yield (
                name,
                value,
                next((s for n, s in self.sources.items() if name == n or name.startswith(n + ".")), "default"),
            )


def resolve(
    flags: Mapping[str, str] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    recorded: Mapping[str, Any] | None = None,
    recorded_by: str = "",
) -> Resolved:
    """Settings from flags (dotted name -> text), the environment and a TOML file, in that order of strength.

    `recorded` are values by dotted name that a run, named by `recorded_by`, had; they are weaker than all of these.
    Raises SettingsError, one line that names the flag, variable or file and what was expected.
    """
    layers = [(name, value, f"run: {recorded_by}") for name, value in (recorded or {}).items()]
    layers += [*_file_values(config), *_env_values(os.environ if environ is None else environ)]
    layers += [(name, value, f"flag: --{name}") for name, value in (flags or {}).items()]
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value, source in _canonical(layers):
        _check_name(name, source)
        _put(tree, name, value, source)
        sources = {n: s for n, s in sources.items() if not n.startswith(name + ".")} | {name: source}
    try:
        resolved = Resolved(Settings(**tree), sources)
    except ValidationError as e:
        raise _refusal(e, sources) from e
    _check_trust(resolved)
    return resolved


def canonical(name: str) -> str:
    """A dotted name with its section's own name in place of an alias."""
    section, dot, rest = name.partition(".")
    return SECTION_ALIASES.get(section, section) + dot + rest


def _canonical(layers: list[tuple[str, Any, str]]) -> Iterator[tuple[str, Any, str]]:
    """Values by their canonical names. Of two names for one value, in one place, none is the stronger."""
    written: dict[tuple[str, str], str] = {}
    for name, value, source in layers:
        place = source.partition(":")[0]
        other = written.setdefault((place, canonical(name)), name)
        if other != name:
            raise SettingsError(
                f"{_cut(name)} ({_cut(source)}): {_cut(other)} is given too, and both name one setting; keep one"
            )
        yield canonical(name), value, source


def _check_trust(resolved: Resolved) -> None:
    """Running a model's own Python is for this call to allow, and for this model: no file or variable that came with
    something else can."""
    if not resolved.settings.model.trust_remote_code:
        return
    trust, name = (resolved.sources.get(n, "default") for n in (_TRUST, "model.name"))
    if not trust.startswith("flag: "):
        raise SettingsError(f"{_TRUST} ({trust}): {_TRUST_RULE}")
    if not name.startswith("flag: "):
        raise SettingsError(f"--{_TRUST}: expected --model beside it, found the model from {name}: {_TRUST_RULE}")


_TRUST = "model.trust_remote_code"
_TRUST_RULE = (
    "trust is given on the command line, to a model that is named there: --model NAME --model.trust_remote_code true"
)


def field_names() -> list[str]:
    """Every dotted name a flag can set."""
    return [f"{section}.{name}" for section, model in _sections() for name in _leaves(model)]


def describe(name: str) -> str:
    """The docstring of a setting, for help texts."""
    section, _, rest = name.partition(".")
    model: type[BaseModel] = dict(_sections())[section]
    for part in rest.split(".")[:-1]:
        model = typing.cast(type[BaseModel], model.model_fields[part].annotation)
    return model.model_fields[rest.split(".")[-1]].description or ""


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` for a name close to a known one."""
    if len(name) > _MOST_SHOWN:  # close to none, and to find that out takes time that grows with its length
        return ""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _sections() -> list[tuple[str, type[BaseModel]]]:
    return [(n, typing.cast(type[BaseModel], f.annotation)) for n, f in Settings.model_fields.items()]


def _leaves(model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from (f"{name}.{leaf}" for leaf in _leaves(info.annotation))
        else:
            yield name


def _file_values(path: Path | None) -> Iterator[tuple[str, Any, str]]:
    if path is None:
        return
    try:
        # A mark at the start, as some editors write it, is no content.
        tree = tomllib.loads(read_regular(path, MOST_FILE_BYTES).decode("utf-8-sig"))
        leaves = list(_toml_leaves(tree))
    except FileNotFoundError as e:
        raise SettingsError(f"--config: no file {str(path)!r}") from e
    except OSError as e:
        raise SettingsError(f"--config: {_shortened(path)} is not a TOML file: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # no TOML, a number of 5,000 digits, a nest without end
        raise SettingsError(f"--config: {path} is not a TOML file: {str(e)[:_MOST_SHOWN]}") from e
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: expected tables such as [model]; found the plain value {_shortened(section)}")
    for name, value in leaves:
        yield name, value, f"file: {path}"


def _toml_leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and canonical(name) not in field_names():
            yield from _toml_leaves(value, f"{name}.")
        else:
            yield name, value


def _env_values(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for variable, name in ALIASES.items():
        if environ.get(variable):
            yield name, environ[variable], f"env: {variable}"
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
            yield variable.removeprefix(PREFIX).lower().replace("__", "."), environ[variable], f"env: {variable}"


def _check_name(name: str, source: str) -> None:
    known = field_names()
    if name in known or any(name.startswith(k + ".") for k in known if _is_table(k)):
        return
    if source.startswith("run: "):
        raise SettingsError(
            f"{source.removeprefix('run: ')} was made by another version of harness: it records the setting {name!r}, "
            f"which this one does not have{nearest(name, known)}"
        )
    spoken = _cut(source.removeprefix("flag: ").removeprefix("env: "))
    if source.startswith("env: "):
        variables = [PREFIX + k.upper().replace(".", "__") for k in known]
        raise SettingsError(f"{spoken}: no such setting{nearest(spoken, variables)}")
    spoken = f"{source.removeprefix('file: ')}: [{_cut(name)}]" if source.startswith("file: ") else spoken
    raise SettingsError(f"{spoken}: no such setting{nearest(name, known)}")


def _is_table(name: str) -> bool:
    return name in ("experiment.conditions", "experiment.templates")


def _put(tree: dict[str, Any], name: str, value: Any, source: str) -> None:
    *parents, last = name.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{source}: {name} cannot be set beside a plain value for {part!r}")
    tree[last] = value


def _refusal(error: ValidationError, sources: Mapping[str, str]) -> SettingsError:
    # Where a setting may be written in two ways the deepest complaint is about the way that was chosen.
    first = max(error.errors(), key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    parts = [str(p) for p in first["loc"] if "[" not in str(p)]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    source = next((sources[n] for n in names if n in sources), None)
    known = field_names()
    name = next((n for n in names if n in known), ".".join(parts))
    found = first.get("input")
    where = f" ({source})" if source else ""
    if first["type"] == "extra_forbidden":
        return SettingsError(f"{_cut('.'.join(parts))}{where}: no such setting{nearest('.'.join(parts), known)}")
    expected = first["msg"].removeprefix("Value error, ")
    return SettingsError(f"{_cut(name)}{where}: {_cut(expected[:1].lower() + expected[1:])}; found {_shortened(found)}")


def _shortened(value: object) -> str:
    return (
        ascii(_cut(str(value) if isinstance(value, Path) else value))
        if isinstance(value, str | Path)
        else _cut(repr(value))
    )


def _cut(text: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: _MOST_SHOWN + 1])
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not _is_table(name):
            yield from _flatten(value, name + ".")
        else:
            yield name, value
