"""What a manifest tells of code, machine, image and settings: all of it, the same where nothing changed, and no secret."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness import environment
from harness.models import noise
from tests.commands import SECRET, harness, manifest, only_run, prompt_file

IMAGE = {"REVISION": "abc123", "VERSION": "1.2.3", "CREATED": "2026-01-01", "SOURCE": "https://example.org/x",
         "DIGEST": "sha256:" + "d" * 64, "SBOM_SHA256": "e" * 64}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in what says it is an image and a SLURM job, with secrets around it."""
    folder = tmp_path_factory.mktemp("environment")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMAGE.items():
            patch.setenv(f"HARNESS_IMAGE_{name}", value)
        for name, value in (("SLURM_JOB_ID", "77"), ("SLURMD_NODENAME", "node3"), ("SLURM_JWT", SECRET)):
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GIT_TOKEN", "MY_PASSWORD"):
            patch.setenv(name, SECRET)
        told = harness("run", "--prompts", prompt_file(folder), "--paths.runs", folder / "runs", "--stages", "psem,sanity",
                       "--gravity.sanity.num_prompts", 1, "--gravity.conditions", "baseline,negative")  # fmt: skip
    assert told.code == 0, told.err
    return only_run(folder / "runs")


def at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_none_here(value: Any) -> bool:
    return torch.cuda.is_available() or value in (None, [])


ITEMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "run_id": ("run_id", is_text), "parent run if any": ("parent", lambda v: v is None),
    "argv": ("argv", lambda v: v[:2] == ["harness", "run"]),
    "a setting": ("settings/gravity.num_samples/value", is_count),
    "a setting's default": ("settings/gravity.num_samples/source", lambda v: v == "default"),
    "a setting's flag": ("settings/gravity.stages/source", lambda v: v == "flag: --gravity.stages"),
    "fingerprint": ("fingerprint", is_hash),
    "its parts": ("fingerprint_parts", lambda v: {"model", "prompts", "seed"} <= v.keys()),
    "git commit": ("code/git_commit", is_text), "dirty flag": ("code/git_dirty", lambda v: v in (True, False, None)),
    "the diff": ("code/diff_sha256", lambda v: v is None or is_hash(v)), "sources": ("code/source_sha256", is_hash),
    "a package": ("packages/torch", lambda v: v == torch.__version__.split("+")[0] or v == torch.__version__),
    "the lock": ("lock_sha256", lambda v: v is None or is_hash(v)),
    "Python": ("machine/python", is_text), "OS": ("machine/os", is_text), "CPU": ("machine/cpu", is_text),
    "its instruction set": ("machine/cpu_capability", is_text), "cores": ("machine/cpu_cores", lambda v: v == os.cpu_count()),
    "RAM": ("machine/ram_bytes", lambda v: v == psutil.virtual_memory().total), "GPUs": ("machine/gpus", is_none_here),
    "driver": ("machine/driver", is_none_here), "CUDA": ("machine/cuda", lambda v: v == torch.version.cuda),
    "cuDNN": ("machine/cudnn", is_none_here), "attention": ("numerics/attention", is_text),
    "attention kernels": ("numerics/sdpa_kernels", lambda v: "math" in v),
    "TF32 of matmul": ("numerics/matmul_tf32", lambda v: v is False),
    "TF32 of cuDNN": ("numerics/cudnn_tf32", lambda v: v is False),
    "determinism": ("numerics/deterministic_algorithms", lambda v: v in (True, False)),
    "device": ("device", is_text), "threads": ("threads", is_count),
    "image digest": ("machine/container/image_digest", lambda v: v == IMAGE["DIGEST"]),
    "SBOM": ("machine/container/sbom_sha256", lambda v: v == IMAGE["SBOM_SHA256"]),
    "image label": ("machine/container/labels", lambda v: v == {
        "revision": "abc123", "version": "1.2.3", "created": "2026-01-01", "source": "https://example.org/x"}),
    "SLURM job": ("machine/slurm", lambda v: v == {"SLURM_JOB_ID": "77", "SLURMD_NODENAME": "node3"}),
    "model": ("model/name", is_text), "revision": ("model/revision", is_text), "weights": ("model/weights_sha256", is_hash),
    "parameters": ("model/num_parameters", is_count), "config": ("model/config/hidden_size", is_count),
    "generation_config": ("model/generation_config", lambda v: v is None or isinstance(v, dict)),
    "tokenizer": ("model/tokenizer_sha256", is_hash),
    "chat template": ("model/chat_template_sha256", lambda v: v is None or is_hash(v)),
    "prompt file": ("prompts/sha256", is_hash),
    "prompt rows": ("prompts/row_hashes", lambda v: set(v) == {"milk", "worm", "paris"} and all(map(is_text, v.values()))),
    "random numbers": ("random_numbers", lambda v: v == noise.RULE),
    "rows of a stage": ("stages/psem/num_rows", lambda v: v == 6), "its seconds": ("stages/psem/seconds", lambda v: v > 0),
    "its tokens/s": ("stages/psem/tokens_per_s", lambda v: v > 0), "its memory": ("stages/psem/peak_bytes", lambda v: v >= 0),
    "its batches": ("stages/psem/sizes", lambda v: sum(v) == 6), "its splits": ("stages/psem/splits", lambda v: v == 0),
    "its failures": ("stages/psem/num_failed", lambda v: v == 0), "its retries": ("stages/psem/retried", lambda v: v == 0),
    "the certificate": ("sanity", lambda v: v and all(row["ok"] for row in v)),
    "status": ("status", lambda v: v == "finished"), "heartbeat": ("heartbeat", is_text),
    "hashes of tables": ("table_sha256/psem", is_hash), "rows of tables": ("tables/psem", lambda v: v == 6),
}  # fmt: skip


@pytest.mark.parametrize("item", ITEMS)
def test_a_manifest_tells_of_everything_it_is_meant_to(run: Path, item: str) -> None:
    path, is_right = ITEMS[item]
    value = at(manifest(run), path)
    assert is_right(value), value


def test_nothing_of_the_environment_gets_in_but_what_is_asked_for(run: Path) -> None:
    text = (run / "manifest.json").read_text()
    assert SECRET not in text
    assert not [p for p in run.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    names = {name for name in os.environ if len(name) > 8 and not name.startswith(("SLURM", "CUBLAS"))}
    assert not [name for name in names if f'"{name}"' in text], "no dump of all variables"
    assert "SLURM_JWT" not in text


# The image


def test_an_images_variables_are_no_settings_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in IMAGE.items():
        monkeypatch.setenv(f"HARNESS_IMAGE_{name}", value)
    assert harness("runs", "--paths.runs", tmp_path).code == 0
    monkeypatch.setenv("HARNESS_IMAGE_DIGESTS", "x")
    assert harness("runs", "--paths.runs", tmp_path).code == 2


def test_the_commit_is_the_images_where_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "tree_diff", environment.tree_diff.__wrapped__)
    monkeypatch.setenv("HARNESS_IMAGE_REVISION", "abc123")
    found = environment.code()
    assert (found["git_commit"], found["git_dirty"], found["diff_sha256"]) == ("abc123", None, None)
    assert found["source_sha256"] == environment.source_sha256()
    monkeypatch.delenv("HARNESS_IMAGE_REVISION")
    assert environment.code()["git_commit"] is None


def test_a_digest_makes_a_container_of_what_does_not_look_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "Path", lambda name: Path("/nowhere"))
    assert environment._container() is None
    monkeypatch.setenv("HARNESS_IMAGE_DIGEST", IMAGE["DIGEST"])
    assert environment._container() == {"image_digest": IMAGE["DIGEST"], "sbom_sha256": None, "labels": {}}


# The sources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "harness"
    (folder / "stages").mkdir(parents=True)
    for name, text in (("a.py", "x = 1\n"), ("stages/b.py", "y = 2\n"), ("page.j2", "<p>")):
        (folder / name).write_text(text)
    monkeypatch.setattr(environment, "_PACKAGE", folder)
    return folder


def test_the_hash_of_the_sources_follows_their_bytes_names_and_places_and_nothing_else(package: Path) -> None:
    first = environment.source_sha256()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    (package / "a.pyc").write_bytes(b"x")
    (package / "notes.txt").write_text("x")
    os.utime(package / "a.py", (0, 0))
    assert environment.source_sha256() == first
    changes: list[Callable[[], object]] = [
        lambda: (package / "a.py").write_text("x = 1 \n"), lambda: (package / "page.j2").write_text("<b>"),
        lambda: (package / "c.py").write_text(""), lambda: (package / "stages" / "b.py").rename(package / "b.py"),
        lambda: (package / "c.py").rename(package / "d.py"), lambda: (package / "d.py").unlink(),
    ]  # fmt: skip
    seen = {first}
    for change in changes:
        change()
        seen.add(environment.source_sha256())
    assert len(seen) == 1 + len(changes)


def test_the_hash_of_the_sources_is_that_of_a_copy_elsewhere(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = environment.source_sha256()
    monkeypatch.setattr(environment, "_PACKAGE", Path(shutil.copytree(package, tmp_path / "elsewhere" / "harness")))
    assert environment.source_sha256() == first


# The patch of what is not committed


def git(folder: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, check=False, timeout=30, env=env)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed tree that the code is said to lie in."""
    folder = tmp_path / "repository"
    (folder / "harness").mkdir(parents=True)
    (folder / "harness" / "a.py").write_text("x = 1\n")
    (folder / "harness" / "blob.bin").write_bytes(bytes(range(256)))
    (folder / "notes.md").write_text("one\n")
    (folder / ".gitignore").write_text("*.pyc\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    done = git(folder, "-c", "user.email=a@example.org", "-c", "user.name=a", "commit", "-qm", "one")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(environment, "ROOT", folder)
    monkeypatch.setattr(environment, "tree_diff", environment.tree_diff.__wrapped__)
    return folder


def test_a_clean_tree_has_no_patch_and_is_not_dirty(repository: Path) -> None:
    (repository / "harness" / "a.pyc").write_bytes(b"ignored")
    (repository / "elsewhere.py").write_text("not of the packages\n")
    assert not environment.tree_diff()
    found = environment.code()
    assert found["git_dirty"] is False
    assert found["diff_sha256"] is None
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"])


CHANGES: dict[str, dict[str, bytes | None]] = {
    "a line": {"harness/a.py": b"x = 2\n"}, "a new file": {"harness/b.py": b"y = 1\n"}, "an empty one": {"harness/b.py": b""},
    "no last newline": {"harness/a.py": b"x = 2"}, "blank lines at the end": {"harness/a.py": b"x = 2\n\n\n"},
    "Windows' lines": {"harness/a.py": b"x = 2\r\ny = 3\r\n"}, "a lone carriage return": {"harness/b.py": b"a\rb\nc\n"},
    "bytes that are no text": {"harness/a.py": b"# caf\xe9\n"}, "a binary file": {"harness/blob.bin": bytes(range(255, -1, -1))},
    "a new binary file, then a text": {"harness/n.bin": bytes(range(256)) * 3, "harness/z.py": b"y = 1\n"},
    "a name with letters": {"harness/é ü.py": b"y = 1\n"}, "a file that is gone": {"harness/a.py": None},
    "outside the package": {"notes.md": b"two\n"}, "several": {"harness/a.py": b"x = 3\n", "notes.md": None, "app/c.py": b"z\n"},
}  # fmt: skip


def apply_changes(folder: Path, changes: dict[str, bytes | None]) -> None:
    for name, content in changes.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_saved_patch_makes_the_same_tree_of_the_commit_again(repository: Path, tmp_path: Path, kind: str) -> None:
    """Read as text it lost a byte here and a blank line there, and `git apply` refused it."""
    apply_changes(repository, CHANGES[kind])
    patch = tmp_path / "working_tree.diff"
    patch.write_bytes(environment.tree_diff())
    found = environment.code()
    assert found["git_dirty"] is True
    assert found["diff_sha256"] == hashlib.sha256(patch.read_bytes()).hexdigest()
    clean = tmp_path / "clean"
    assert git(tmp_path, "clone", "-q", str(repository), str(clean)).returncode == 0
    applied = git(clean, "apply", str(patch))
    assert applied.returncode == 0, applied.stderr
    assert content_of(clean) == content_of(repository)


@pytest.mark.parametrize(
    ("name", "value"),
    [("color.ui", "always"), ("diff.noprefix", "true"), ("diff.mnemonicPrefix", "true"), ("diff.external", "/bin/echo"),
     ("core.quotePath", "true"), ("diff.renames", "copies")],
)  # fmt: skip
def test_a_persons_own_settings_of_git_do_not_change_the_patch(repository: Path, name: str, value: str) -> None:
    apply_changes(repository, {"harness/a.py": b"x = 2\n", "harness/b.py": b"y = 1\n", "harness/\xe9.py": b"z = 1\n"})
    expected = environment.tree_diff()
    assert expected.count(b"diff --git ") == 3
    git(repository, "config", name, value)
    assert environment.tree_diff() == expected


def test_changes_that_are_only_staged_are_in_the_patch(repository: Path) -> None:
    apply_changes(repository, {"harness/b.py": b"y = 1\n"})
    git(repository, "add", "-A")
    assert b"+y = 1" in environment.tree_diff()


# What it rests on


def test_a_machine_told_twice_is_the_same_and_can_be_written_down() -> None:
    one, other = environment.machine(), environment.machine()
    assert one == other
    assert json.loads(json.dumps(one)) == one
    assert environment.packages() == environment.packages()
    assert list(environment.packages()) == sorted(environment.packages(), key=str.lower)


def test_the_lock_is_found_beside_the_code_or_the_data_or_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path / "code")
    assert environment.lock_sha256(tmp_path / "data") is None
    (tmp_path / "requirements.lock").write_text("a==1\n")
    assert environment.lock_sha256(tmp_path / "data") == hashlib.sha256(b"a==1\n").hexdigest()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "requirements.lock").write_text("a==2\n")
    assert environment.lock_sha256(tmp_path / "data") == hashlib.sha256(b"a==2\n").hexdigest()
