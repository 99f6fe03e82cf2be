"""The image as people use it: what is in its layers, who may run it, where files go, how it stops and goes on.

`just docker-test` builds the image without CUDA and names it in TEST_IMAGE; without that, or without a Docker engine that
answers, only what the Dockerfile and the compose file say is tested. Everything made here carries one label and is removed
at the end. Containers have no network, and folders are Docker's own volumes, so the engine may be on another machine.
"""

import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from harness.commands.diff import compare_results, verdict
from harness.experiments.gravity.schema import SCHEMA
from harness.run.differences import environment_differences
from harness.store import Reader
from tests.commands import ROWS, harness, manifest, run_folders
from tests.test_launch import MEASURED

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text("utf-8"))
MARK = f"harness-test-{uuid.uuid4().hex[:12]}"
"""Label of every container, volume and image of these tests, and the start of every name."""
ANYBODY = ("--user", "12345:12345")
AS_DEPLOYED = (*ANYBODY, "--read-only", "--network", "none")
SHORT = ("run", "--limit", "3", "--gravity.num_samples", "2", "--gravity.sanity.num_prompts", "1")
LONG = ("run", "--limit", "120", "--gravity.num_samples", "8", "--gravity.sanity.num_prompts", "1")


class Told(NamedTuple):
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def docker(*args: str, timeout: float = 120, given: bytes | None = None) -> Told:
    done = subprocess.run(["docker", *args], input=given, capture_output=True, timeout=timeout, check=False)
    return Told(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def right(told: Told) -> str:
    """Standard output of a command that must not fail."""
    assert told.code == 0, told
    return told.out


def engine_answers() -> bool:
    with suppress(OSError, subprocess.TimeoutExpired):
        return docker("info", timeout=20).code == 0
    return False


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The image under test; at the end all that was made of it is removed."""
    name = os.environ.get("TEST_IMAGE")
    if not name:
        pytest.skip("TEST_IMAGE names no image; `just docker-test` builds one")
    if not engine_answers():
        pytest.skip("no Docker engine answers")
    right(docker("image", "inspect", name))
    yield name
    for kind, remove in (("container", ("rm", "-fv")), ("volume", ("volume", "rm", "-f")), ("image", ("rmi", "-f"))):
        names = right(docker(kind, "ls", *(["-a"] * (kind != "volume")), "-q", "--filter", f"label={MARK}")).split()
        if names:
            docker(*remove, *names)


@dataclass(frozen=True)
class Volume:
    """A fresh volume, mounted on /runs unless said otherwise, and the image that writes it."""

    image: str
    name: str = field(default_factory=lambda: f"{MARK}-{uuid.uuid4().hex[:8]}")

    def __post_init__(self) -> None:
        right(docker("volume", "create", "--label", MARK, self.name))

    def run(self, *args: str, options: Sequence[str] = AS_DEPLOYED, timeout: float = 300) -> Told:
        """`docker run` of a harness command, with this volume for its runs."""
        return once(self.image, *args, options=("-v", f"{self.name}:/runs", *options), timeout=timeout)

    def shell(self, script: str, *, options: Sequence[str] = AS_DEPLOYED, given: bytes | None = None) -> str:
        """Output of a few lines of sh in the image, this volume on /runs."""
        options = ("-i", "-v", f"{self.name}:/runs", "--entrypoint", "sh", *options)
        return right(once(self.image, "-c", script, options=options, given=given))

    def manifest(self) -> dict[str, Any]:
        return json.loads(self.shell("cat /runs/*/manifest.json"))

    def tables(self) -> dict[str, str]:
        """A hash of all rows of every measured table of its only run, bit for bit."""
        script = (
            "import duckdb, glob, hashlib, json, sys\n"
            "(live,) = glob.glob('/runs/*/live.duckdb')\n"
            "con = duckdb.connect(':memory:'); con.execute(f\"ATTACH '{live}' AS run (READ_ONLY); USE run\")\n"
            "rows = lambda t: sorted(map(repr, con.execute(f'SELECT * FROM {t}').fetchall()))\n"
            "told = {t: f'{len(rows(t))} ' + hashlib.sha256(repr(rows(t)).encode()).hexdigest() for t in sys.argv[1:]}\n"
            "print(json.dumps(told))"
        )
        options = ("-v", f"{self.name}:/runs", "--entrypoint", "python3", *AS_DEPLOYED)
        return json.loads(right(once(self.image, "-c", script, *MEASURED, options=options)))


def once(
    image: str, *args: str, options: Sequence[str] = AS_DEPLOYED, timeout: float = 300, given: bytes | None = None
) -> Told:
    """`docker run` to its end."""
    return docker("run", "--rm", "--label", MARK, *options, image, *args, timeout=timeout, given=given)


def started(image: str, *args: str, options: Sequence[str] = AS_DEPLOYED) -> str:
    """The name of a container that goes on in the background."""
    name = f"{MARK}-{uuid.uuid4().hex[:8]}"
    right(docker("run", "-d", "--label", MARK, "--name", name, *options, image, *args))
    return name


def stopped(container: str, within_s: float) -> Told:
    """What a container said and ended with after `docker stop`; one that outlasts the time is killed, and ends with 137."""
    right(docker("stop", "-t", str(round(within_s)), container, timeout=within_s + 60))
    logs = docker("logs", container)
    return Told(int(inspect(container, "{{.State.ExitCode}}")), logs.out, logs.err)


def inspect(name: str, what: str) -> str:
    return right(docker("inspect", "--format", what, name)).strip()


def until(is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.25)


# ---- what the files say, no engine needed ------------------------------------------------------------------------


def stages() -> dict[str, str]:
    """Instructions of each stage of the Dockerfile by its name, comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    return {
        name: body.strip() for name, body in re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S)
    }


def test_the_two_targets_differ_in_their_base_and_torch_only() -> None:
    found = stages()
    assert list(found)[-1] == "gpu", "the default target is the last stage"
    for part in ("", "-base"):
        assert found[f"cpu{part}"].replace("cpu", "gpu") == found[f"gpu{part}"]
    assert found["cpu-deps"].replace("cpu", "gpu") != found["gpu-deps"], "the control: torch is another"


def test_the_base_is_made_for_the_cuda_version_of_the_locked_torch() -> None:
    """torch 2.13 asks for cuda-toolkit 13.0; another torch wants another look at its Requires-Dist, and at the base."""
    (base,) = re.findall(r"FROM \$\{BASE_IMAGE:-nvidia/cuda:(\S+?)\} AS gpu-base", DOCKERFILE)
    assert re.search(r"^torch==2\.13\.", (ROOT / "requirements.lock").read_text("utf-8"), re.M)
    assert re.fullmatch(r"13\.0\.\d+-base-\S+", base)


def test_compose_services_are_as_careful_as_the_documents_say() -> None:
    assert set(COMPOSE["services"]) == {"run", "run-cpu", "app"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["user"] == "${UID:-1000}:${GID:-1000}", name
        assert int(service["stop_grace_period"].removesuffix("s")) > 10, f"{name}: a run has 10 s to stop"
        assert {v["target"] for v in service["volumes"]} >= {"/runs", "/cache"}, name
        assert all(v["bind"]["create_host_path"] is False for v in service["volumes"] if v["type"] == "bind"), name
    assert [n for n, s in COMPOSE["services"].items() if "deploy" in s] == ["run"], "one service asks for a GPU"
    assert COMPOSE["services"]["app"]["ports"] == ["127.0.0.1:8501:8501"], "nobody else is served"


def test_the_image_gets_all_bundled_data() -> None:
    """Once a new folder was left out: .dockerignore lets in what it names, and nothing else."""
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]

    def is_let_in(name: str) -> bool:
        return any(name == one or name.startswith(f"{one}/") for one in admitted)

    found = [path.relative_to(ROOT).as_posix() for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert {"data/neurons/planted.jsonl", "data/models/demo/model.safetensors"} <= set(found)
    assert [name for name in found if not is_let_in(name) and not name.endswith((".py", ".pyc"))] == []
    assert not is_let_in("data/models/train_demo.py"), "control: not everything is let in"


# ---- layers ------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Files of a layer by path, with their sizes, and the text of its small ones outside of installed packages."""

    sizes: Mapping[str, int]
    texts: Mapping[str, str]

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


def layers(image: str) -> tuple[list[Layer], dict[str, Any]]:
    """All layers of an image, lowest first, and its configuration with its history."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "image.tar"
        right(docker("save", "-o", str(saved), image, timeout=300))
        with tarfile.open(saved) as archive:

            def part(name: str) -> io.BufferedReader:
                opened = archive.extractfile(name)
                assert opened, name
                return opened  # type: ignore[return-value]

            (about,) = json.load(part("manifest.json"))
            return [_layer(part(name)) for name in about["Layers"]], json.load(part(about["Config"]))


def _layer(file: io.BufferedReader) -> Layer:
    sizes, texts = {}, {}
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            if member.isfile():
                path = member.name.removeprefix("./")
                sizes[path] = member.size
                if member.size < 65_536 and not re.search(r"/site-packages/|^usr/(lib|share)/|^var/lib/dpkg/", path):
                    texts[path] = tar.extractfile(member).read().decode("utf-8", "replace")  # type: ignore[union-attr]
    return Layer(sizes, texts)


_LEFT_FILE = re.compile(
    r"(^|/)(pip\.conf|pip\.ini|\.netrc|\.pypirc|\.git|\.cache|ca_bundle\.crt)(/|$)|^root/.*\bpip\b|^run/secrets/.|"
    r"^var/lib/apt/lists/.|^var/cache/apt/.*\.(deb|bin)$|^wanted/|^source/|\.whl$|^(runs|data|cache|tmp)/."
)
_LEFT_TEXT = re.compile(
    r"(find-links|index-url|trusted-host)[ =]+\S*[:/.]|PIP_[A-Z_]*(INDEX|LINKS|HOST|CERT)|/simple\b|://[^/\s@]+@|PRIVATE KEY|"
    r"\bhf_[A-Za-z0-9]{20}"
)


def left_behind(found: Sequence[Layer], config: Mapping[str, Any]) -> list[str]:
    """What no layer and no line of history should hold: settings of pip, addresses of indexes, secrets, caches, sources."""
    told = [path for layer in found for path, size in layer.sizes.items() if size and _LEFT_FILE.search(path)]
    told += [path for layer in found for path, text in layer.texts.items() if _LEFT_TEXT.search(text)]
    told += [
        line for line in (json.dumps(config["config"]), *map(json.dumps, config["history"])) if _LEFT_TEXT.search(line)
    ]
    return [t for t in told if not t.startswith(("usr/share/python-wheels/", "opt/venv/bin/"))]


@pytest.fixture(scope="session")
def saved(image: str) -> tuple[list[Layer], dict[str, Any]]:
    return layers(image)


def test_no_layer_keeps_a_secret_an_index_or_a_cache(saved: tuple[list[Layer], dict[str, Any]]) -> None:
    assert left_behind(*saved) == []
    assert sum(len(layer.sizes) for layer in saved[0]) > 10_000, "layers were read"


def test_a_secret_or_a_cache_in_a_layer_would_be_seen(image: str) -> None:
    planted = {
        "etc/pip.conf": "[global]\nindex-url = https://me:secret@index.example/simple",
        "root/.cache/pip/x": "x",
        "etc/x.conf": "url = https://me:secret@index.example/",
        "var/cache/apt/archives/x.deb": "x",
        "etc/fine": "nothing",
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, text in planted.items():
            member = tarfile.TarInfo(path)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    name = f"{MARK}:planted"
    change = ("--change", f"LABEL {MARK}=1", "--change", "ENV PIP_INDEX_URL=https://index.example/simple")
    right(docker("import", *change, "-", name, given=packed.getvalue()))
    told = left_behind(*layers(name))
    assert {t for t in told if t in planted} == set(planted) - {"etc/fine"}
    assert any("PIP_INDEX_URL" in t for t in told)


def test_a_change_of_code_ships_a_small_layer(saved: tuple[list[Layer], dict[str, Any]]) -> None:
    """The dependencies are one layer that holds nothing of the project; all above it, the project, is small."""
    found, _ = saved
    (torch,) = [
        i for i, layer in enumerate(found) if any(p.endswith("/site-packages/torch/__init__.py") for p in layer.sizes)
    ]
    (code,) = [
        i for i, layer in enumerate(found) if any(p.endswith("/site-packages/harness/cli.py") for p in layer.sizes)
    ]
    assert torch < code
    assert not any("harness" in path for path in found[torch].sizes)
    assert found[torch].size > 500e6
    assert found[code].size < 5e6
    assert sum(layer.size for layer in found[torch + 1 :]) < 20e6


def test_the_packages_are_those_of_the_lock_and_torch_is_the_cpu_build(image: str) -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    lock = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    locked = {plain(name): version for name, version in lock.items()}
    listed = once(image, "-m", "pip", "list", "--format", "json", options=("--entrypoint", "python3", *AS_DEPLOYED))
    found = {plain(p["name"]): p["version"] for p in json.loads(right(listed))}
    assert found.pop("torch") == f"{locked['torch']}+cpu"
    assert found.pop("harness") == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    apart = {n: (v, locked.get(n)) for n, v in found.items() if locked.get(n) != v and n != "pip"}
    assert apart == {}
    assert not [n for n in found if n.startswith(("nvidia", "cuda", "triton", "pytest"))]


def test_the_image_says_what_it_is(image: str) -> None:
    """Labels for people and registries, the same as variables for the manifest. Those of `just docker-test` are true."""
    labels = json.loads(inspect(image, "{{json .Config.Labels}}"))
    variables = dict(line.split("=", 1) for line in json.loads(inspect(image, "{{json .Config.Env}}")))
    told = {k.removeprefix("org.opencontainers.image."): v for k, v in labels.items()}
    assert {"title", "description", "licenses", "revision", "version", "created", "source"} <= set(told)
    for name in ("revision", "version", "created", "source"):
        assert variables[f"HARNESS_IMAGE_{name.upper()}"] == told[name], name
    assert told["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", told["revision"])
    assert datetime.fromisoformat(told["created"]).tzinfo
    assert "@" not in told["source"].removeprefix("ssh://").removeprefix("git@")


def test_the_image_is_set_up_for_volumes_signals_and_another_user(image: str) -> None:
    config = json.loads(inspect(image, "{{json .Config}}"))
    assert set(config["Volumes"]) == {"/runs", "/data", "/cache"}
    assert config["User"] not in ("", "0", "root", "0:0")
    assert (config["Entrypoint"], config["Cmd"], config["WorkingDir"]) == (["harness"], ["--help"], "/data")
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"8501/tcp"}


# ---- running -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def short(image: str) -> Volume:
    """A finished run of three prompts by a user nobody knows, on a root nobody can write; digest and SBOM handed in."""
    volume = Volume(image)
    handed = ("-e", "HARNESS_IMAGE_DIGEST=sha256:d1", "-e", "HARNESS_IMAGE_SBOM_SHA256=5b0")
    right(volume.run(*SHORT, options=(*handed, *AS_DEPLOYED)))
    return volume


def test_anybody_may_run_it_on_a_root_that_is_read_only_and_owns_what_it_writes(short: Volume) -> None:
    assert short.manifest()["status"] == "finished"
    assert int(short.shell("find /runs -type f | wc -l")) >= 3
    assert short.shell("find /runs -mindepth 1 ! -user 12345 -o -mindepth 1 ! -group 12345") == ""
    refused = once(short.image, "-c", "echo > /opt/harness/x", options=("--entrypoint", "sh", *AS_DEPLOYED))
    assert refused.code != 0, "the control: the root is read-only"


def test_without_options_it_runs_as_its_own_user_and_is_not_root(image: str) -> None:
    volume = Volume(image)
    right(volume.run(*SHORT, options=("--network", "none")))
    assert set(volume.shell("stat -c %u /runs/*").split()) == {"1000"}


def test_the_manifest_says_which_image_it_was(short: Volume) -> None:
    labels = json.loads(inspect(short.image, "{{json .Config.Labels}}"))
    names = ("revision", "version", "created", "source")
    expected = {name: labels[f"org.opencontainers.image.{name}"] for name in names}
    manifest = short.manifest()
    assert manifest["machine"]["container"] == {
        "image_digest": "sha256:d1",
        "sbom_sha256": "5b0",
        "labels": {name: value for name, value in expected.items() if value},
    }
    assert manifest["code"]["git_commit"] == labels["org.opencontainers.image.revision"]
    assert manifest["lock_sha256"], "the lock travels with the image"


def test_the_doctor_finds_nothing_wrong_inside(image: str) -> None:
    told = Volume(image).run("doctor")
    assert told.code == 0, told
    assert all(line.startswith("ok ") for line in told.out.splitlines()), told.out
    assert "CUDA build none" in told.out, "the image without CUDA"


def test_a_gpu_that_is_asked_for_and_missing_ends_with_4_and_says_what_to_do(image: str) -> None:
    told = Volume(image).run(*SHORT, "--runtime.device", "cuda")
    assert (told.code, told.out) == (4, "")
    assert re.fullmatch(r"harness: runtime\.device=cuda: .*GPU.*--runtime\.device cpu\n", told.err), told.err


def test_prompts_mounted_on_data_are_found_by_name_and_hide_nothing_bundled(image: str) -> None:
    data, runs = Volume(image), Volume(image)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    data.shell("cat > /runs/mine.jsonl", given=lines.encode())
    mounted = ("-v", f"{data.name}:/data:ro", *AS_DEPLOYED)
    right(runs.run("run", "--prompts", "mine.jsonl", "--stages", "psem", options=mounted))
    manifest = runs.manifest()
    assert (manifest["prompts"]["used"], manifest["prompts"]["rejected"]) == (len(ROWS), {})
    assert manifest["settings"]["model.name"]["value"] == "demo", "the bundled model, from beside the mount"
    missing = runs.run("run", "--prompts", "other.jsonl", options=mounted)
    assert missing.code == 2, missing


# ---- stopping and going on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def undisturbed(image: str) -> Volume:
    volume = Volume(image)
    right(volume.run(*LONG, timeout=500))
    return volume


def test_a_stopped_container_exits_3_in_time_and_a_new_one_ends_with_the_same_tables(
    image: str, undisturbed: Volume, short: Volume
) -> None:
    volume = Volume(image)
    container = started(image, *LONG, options=("-v", f"{volume.name}:/runs", *AS_DEPLOYED))
    until(lambda: "psem done" in "".join(docker("logs", container)[1:]), 200, "a stage is done")
    start = time.monotonic()
    told = stopped(container, within_s=10)
    assert told.code == 3, told
    assert time.monotonic() - start < 11, "10 s, and docker's own time"
    before = volume.manifest()
    assert before["status"] == "interrupted"
    assert 0 < len(before["stages"]) < len(undisturbed.manifest()["stages"]), "it was stopped in the middle"

    right(volume.run(*LONG, timeout=500))
    after = volume.manifest()
    assert (after["status"], after["run_id"]) == ("finished", before["run_id"])
    assert len(after["resumed"]) == 1
    assert volume.tables() == undisturbed.tables()
    assert short.tables() != undisturbed.tables(), "the control: another run has other tables"


@pytest.mark.parametrize("after_s", [0.5, 2.5])
def test_a_container_stopped_while_it_starts_ends_at_once(image: str, after_s: float) -> None:
    """The first process of a container ignores a signal that it does not handle, and imports take seconds."""
    container = started(image, *LONG)
    time.sleep(after_s)
    told = stopped(container, within_s=9)
    assert told.code == 3, told


def test_a_second_container_with_a_finished_runs_command_has_nothing_to_do(short: Volume) -> None:
    told = right(short.run(*SHORT))
    assert "nothing to do" in told
    assert len(short.shell("ls -d /runs/*/").split()) == 1


# ---- checking and comparing --------------------------------------------------------------------------------------


def copied(runs: Volume) -> Volume:
    """The same files in another volume."""
    copy = Volume(runs.image)
    mounts = ("-v", f"{runs.name}:/data:ro", "-v", f"{copy.name}:/runs", "--entrypoint", "cp", *AS_DEPLOYED)
    right(once(runs.image, "-r", "/data/.", "/runs/", options=mounts))
    return copy


def test_a_run_made_in_one_container_is_verified_in_another(short: Volume) -> None:
    right(short.run("verify", "latest"))
    copy = copied(short)
    halve = "duckdb.connect(*glob.glob('/runs/*/results.duckdb')).execute('UPDATE psem SET p_sem = p_sem / 2')"
    copy.shell(f'python3 -c "import duckdb, glob; {halve}"')
    told = copy.run("verify", "latest", "--batches", "0")
    assert told.code == 1, f"the control, a run that was tampered with: {told}"


def test_two_containers_that_did_the_same_work_differ_in_nothing_measured(short: Volume) -> None:
    both = copied(short)
    first = short.manifest()["run_id"]
    right(both.run(*SHORT, "--resume", "new"))
    right(both.run(*SHORT, "--runtime.seed", "1"))
    others = [f for f in both.shell("ls /runs").split() if f != first]
    codes = {run: both.run("diff", first, run, "--exit-code").code for run in others}
    assert list(codes.values()) == [0, 1], f"the second has another seed: {codes}"


def test_a_run_here_and_one_in_a_container_give_the_same_bits_or_what_differs_is_named(
    image: str, tmp_path: Path
) -> None:
    one_thread = ("--runtime.threads", "1")
    inside = Volume(image)
    right(inside.run(*SHORT, *one_thread))
    carrier = started(image, "60", options=("-v", f"{inside.name}:/runs", "--entrypoint", "sleep"))
    right(docker("cp", f"{carrier}:/runs/.", str(tmp_path)))
    docker("kill", carrier)
    (theirs,) = run_folders(tmp_path)
    assert harness(*SHORT, *one_thread, "--paths.runs", tmp_path, "--resume", "new").code == 0
    (ours,) = (folder for folder in run_folders(tmp_path) if folder != theirs)
    found = harness("diff", ours.name, theirs.name, "--paths.runs", tmp_path, "--exit-code")
    if found.code:
        apart = environment_differences(manifest(ours), manifest(theirs))
        assert apart, f"other results, and nothing says why: {found}"
        assert all(d.key.split(".")[-1] in found.out for d in apart), found
    with Reader(ours / "live.duckdb", SCHEMA) as a, Reader(theirs / "live.duckdb", SCHEMA) as b:
        assert verdict(compare_results(a, b), "float32", SCHEMA) in ("identical", "rounding")


def test_the_stage_that_writes_prompt_files_writes_them_into_its_run(image: str) -> None:
    runs = Volume(image)
    right(runs.run("run", "--limit", "6", "--stages", "single_token", options=AS_DEPLOYED))
    assert "_validated.jsonl" in runs.shell("ls /runs/*/artifacts/single_token")


def test_the_bundled_pair_is_in_the_image(image: str) -> None:
    """A run of amplification without arguments is offline there too."""
    runs = Volume(image)
    told = runs.run("run", "lda", "--limit", "4", "--lda.num_samples", "2", options=AS_DEPLOYED)
    right(told)
    assert "Natural rate" in told.out


# ---- the app -----------------------------------------------------------------------------------------------------


def health_command() -> list[str]:
    kind, *command = COMPOSE["services"]["app"]["healthcheck"]["test"]
    assert kind == "CMD"
    return command


def test_the_app_answers_the_health_check_of_the_compose_file(short: Volume) -> None:
    """As the compose file starts it: the runs read-only, the root too."""
    command = shlex.join(health_command())
    health = (
        "--health-cmd",
        command,
        "--health-interval",
        "1s",
        "--health-start-period",
        "30s",
        "--health-timeout",
        "5s",
    )
    options = ("-v", f"{short.name}:/runs:ro", *health, *AS_DEPLOYED)
    container = started(short.image, *COMPOSE["services"]["app"]["command"], options=options)
    until(lambda: inspect(container, "{{.State.Health.Status}}") == "healthy", 60, f"{container} is healthy")
    listening = right(docker("exec", container, "cat", "/proc/net/tcp"))
    assert re.search(r" 00000000:2135 00000000:0000 0A ", listening), (
        "port 8501 on every address, so it can be published"
    )
    assert stopped(container, within_s=9).code != 137, "it ends on its signal"

    idle = started(short.image, "300", options=("--entrypoint", "sleep", "--init", *AS_DEPLOYED))
    assert docker("exec", idle, *health_command()).code != 0, "the control: nobody serves"
