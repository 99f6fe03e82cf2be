"""`harness doctor`: whether this machine can run an experiment, one line a check."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from harness import environment
from harness.commands.findings import Check
from harness.errors import HarnessError, ModelError, SettingsError
from harness.experiments import registry
from harness.experiments.experiment import Contents, Experiment
from harness.experiments.weights import Models
from harness.models import device, processor
from harness.models.fetch import FETCHABLE, path_of
from harness.models.load import ModelIdentity, ModelSpec, load, load_codec
from harness.models.pairing import pair_up
from harness.models.processor import Cores
from harness.models.score import score_trees
from harness.settings import ExperimentSettings, Resolved, Settings
from harness.store import Reader, Store
from harness.text.words import word_forms

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_WORTHWHILE = 1.3
"""How much faster a dtype must multiply to be recommended: a run does other things than multiply."""


def examine(resolved: Resolved, experiment: Experiment) -> Iterator[Check]:
    """Every check, as it is made; what is looked at last is what a run of this experiment would be made of."""
    settings = resolved.settings
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("code", _code),
        ("python", _python),
        ("gpu", _gpu),
        ("memory", _memory),
        ("threads", _threads),
        ("half precision", _half),
        ("runs folder", _runs),
        ("store", partial(_store, experiment)),
        ("experiments", _experiments),
        ("input", partial(_input, resolved, experiment)),
        ("model", _model),
        *([("other model", _other), ("pair", _pair)] if settings.other.name else []),
        ("hub cache", _hub_cache),
        ("model cache", _model_cache),
        ("forward", _forward),
    ]
    for name, check in checks:
        try:
            yield Check("ok", name, check(settings))
        except (HarnessError, OSError) as e:
            yield Check("FAIL", name, str(e))


def _code(settings: Settings) -> str:
    code = environment.code()
    dirty = ", uncommitted changes" if code["git_dirty"] else ""
    return f"harness {code['version']}, commit {str(code['git_commit'])[:12]}{dirty}"


def _python(settings: Settings) -> str:
    machine = environment.machine()
    builds = f"CUDA build {machine['cuda'] or 'none'}, driver {machine['driver'] or 'none'}"
    return f"Python {machine['python']}, torch {machine['torch']}, {builds}"


def _gpu(settings: Settings) -> str:
    where = device.resolve_device(settings.runtime.device)
    gpus = environment.machine()["gpus"]
    found = (
        ", ".join(f"{g['name']} {g['memory_bytes'] / 1e9:.0f} GB (sm {g['compute_capability']})" for g in gpus)
        or "no GPU"
    )
    return f"{found}; runtime.device={settings.runtime.device} means {where}"


def _threads(settings: Settings) -> str:
    return told_of_threads(settings.runtime.threads or torch.get_num_threads(), processor.cores())


def told_of_threads(threads: int, cores: Cores) -> str:
    """Whether torch computes with as many threads as can compute at once, and what to type where it does not."""
    limit = "" if cores.quota is None else f", of which a control group allows the time of {cores.quota:g}"
    told = f"torch computes with {threads}; this process may use {cores.allowed} cores{limit}"
    if threads == cores.usable:
        return told
    why = "more only wait for each other" if threads > cores.usable else "the others stand idle"
    return f"{told}: `--runtime.threads {cores.usable}` is faster, {why}"


def _half(settings: Settings) -> str:
    if device.resolve_device(settings.runtime.device) == "cuda":
        return "a GPU computes: not measured on the CPU"
    float32, bfloat16 = (processor.gflops(dtype) for dtype in (torch.float32, torch.bfloat16))
    return told_of_half(float32, bfloat16, processor.half_instructions(), settings.model.dtype)


def told_of_half(float32: float, bfloat16: float, instructions: Sequence[str], dtype: str) -> str:
    """Which of both dtypes the CPU multiplies faster in, from measured GFLOP/s, and what to type for it.

    `auto` is the checkpoint's own, which may be either.
    """
    has = f"the CPU has {' and '.join(instructions)}" if instructions else "the CPU names no instructions for bfloat16"
    told = f"a matrix product: float32 {float32:,.0f} GFLOP/s, bfloat16 {bfloat16:,.0f} ({has})"
    if bfloat16 >= _WORTHWHILE * float32 and dtype != "bfloat16":
        return (
            f"{told}: `--model.dtype bfloat16` multiplies {bfloat16 / float32:.1f} times as fast; the certificate (stage "
            "sanity) judges its rounding"
        )
    if float32 >= _WORTHWHILE * bfloat16 and dtype != "float32":
        return f"{told}: `--model.dtype float32` multiplies {float32 / bfloat16:.1f} times as fast, and closer"
    return told


def _memory(settings: Settings) -> str:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB RAM free, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text += f"; {free / 1e9:.1f} of {total / 1e9:.1f} GB GPU memory free, {settings.batching.reserve_gb:g} kept in reserve"
    return text


def _runs(settings: Settings) -> str:
    folder = settings.paths.runs
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    if free < settings.runtime.reserve_disk_gb * 1e9:
        raise OSError(
            f"{folder}: {free / 1e9:.1f} GB free, less than runtime.reserve_disk_gb={settings.runtime.reserve_disk_gb:g}"
        )
    return f"{folder.resolve()} is writable, {free / 1e9:.1f} GB free"


def _store(experiment: Experiment, settings: Settings) -> str:
    with tempfile.TemporaryDirectory(dir=settings.paths.runs) as folder:
        with Store(Path(folder) / "results.duckdb", experiment.schema) as store:
            store.event("info", "doctor", "written")
            store.publish(Path(folder) / "live.duckdb")
        with Reader(Path(folder) / "live.duckdb", experiment.schema) as reader:
            assert reader.query("SELECT count(*) AS n FROM events")[0]["n"] == 1, "the snapshot lost a row"
    return "a store writes, publishes and reads back"


def _experiments(settings: Settings) -> str:
    """Raises SettingsError where one is registered and cannot be imported."""
    told, broken = [], []
    for name in registry.names():
        try:
            told.append(f"{name} ({registry.get(name).title})")
        except SettingsError as e:
            broken.append(str(e))
    if broken:
        raise SettingsError("; ".join(broken))
    return ", ".join(told)


def _input(resolved: Resolved, experiment: Experiment, settings: Settings) -> str:
    models = Models(settings, device.resolve_device(settings.runtime.device))
    names = Contents(experiment).wanted(resolved.own(ExperimentSettings).stages)
    prepared = experiment.prepare(resolved, models, names)
    return "; ".join((f"{experiment.name}: {prepared.about}", *prepared.warnings))


def _model(settings: Settings) -> str:
    return _model_told(settings.model.name, Models(settings, "cpu").identity)


def _other(settings: Settings) -> str:
    identity = Models(settings, "cpu").other_identity
    assert identity is not None, "asked only where one is named"
    return _model_told(settings.other.name, identity)


def _pair(settings: Settings) -> str:
    """Whether both models can be read together, and what they need in memory at once. Raises NoPair."""
    models = Models(settings, "cpu")
    assert models.other_spec is not None, "asked only where one is named"
    assert models.other_identity is not None, "as above"
    after, before = models.identity, models.other_identity
    found = pair_up(load_codec(models.spec, after), load_codec(models.other_spec, before), after, before)
    needs = (_weight_bytes(after) + _weight_bytes(before)) / 1e9
    told = f"ids mean the same in both, {found.num_common:,} in common; {needs:.1f} GB for the weights of both"
    free = psutil.virtual_memory().available / 1e9
    if needs > free and not torch.cuda.is_available():
        raise ModelError(f"{told}: more than the {free:.1f} GB of memory that are free; take smaller models or a GPU")
    return f"{told}; {found.warning}" if found.warning else told


def _weight_bytes(identity: ModelIdentity) -> int:
    return int(identity.about.get("num_parameters") or 0) * _BYTES.get(identity.dtype, 4)


def _model_told(name: str, identity: ModelIdentity) -> str:
    weights = _weight_bytes(identity)
    needs = f", {weights / 1e9:.1f} GB in memory" if weights else ""
    return f"{name}: revision {identity.revision}, {identity.dtype}, weights {identity.weights_sha256[:12]}{needs}"


def _hub_cache(settings: Settings) -> str:
    from huggingface_hub import constants

    return _told_of_cache(Path(constants.HF_HOME), "HF_HOME")


def _model_cache(settings: Settings) -> str:
    folder = settings.paths.cache_folder
    kept = [name for name in FETCHABLE if path_of(name, folder).exists()]
    built = sum(1 for _ in folder.glob("planted/*/planted.json"))
    told = f"{_told_of_cache(folder, 'paths.cache')}; fetched: {', '.join(kept) or 'nothing yet (harness fetch)'}"
    return f"{told}; planted models built: {built}" if built else told


def _told_of_cache(folder: Path, setting: str) -> str:
    """Raises OSError where nothing can be written to a folder that may be still to be made."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        raise OSError(f"{folder} is not writable; set {setting}")
    return (
        f"{folder}{'' if folder.exists() else ' (will be made)'}, {shutil.disk_usage(nearest).free / 1e9:.1f} GB free"
    )


def _forward(settings: Settings) -> str:
    where = device.resolve_device(settings.runtime.device)
    spec = ModelSpec("random:tiny-llama", device=where, random_tokenizer=settings.paths.data_folder / "models" / "demo")
    lm = load(spec)
    forms = word_forms("space", lm.codec)
    start = time.perf_counter()
    scores = score_trees(lm, [lm.codec.encode("Question:", add_special_tokens=False)], [forms.trie])[0]
    if isinstance(scores, HarnessError):
        raise scores
    return f"a tiny model scored a tree on {where} in {1e3 * (time.perf_counter() - start):.0f} ms"
