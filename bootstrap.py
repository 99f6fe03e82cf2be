"""Runs a command of this project on a machine that has Python 3.11 or newer and nothing else.

    python3 bootstrap.py harness run      the main job
    python3 bootstrap.py just test        the tests
    python3 bootstrap.py just             what CI runs: lint, types, tests

Makes .venv from requirements.lock the first time, and again when the lock or the project's own dependencies change;
then runs the command with .venv first on the PATH. Uses only Python's standard library.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.sha256"


def wanted() -> str:
    """What the environment is made from; it is stale when this changes."""
    files = (ROOT / "requirements.lock", ROOT / "pyproject.toml")
    return hashlib.sha256(b"".join(f.read_bytes() for f in files) + sys.version.encode()).hexdigest()


def install() -> None:
    """A fresh .venv with the locked packages and this project in it, editable."""
    print("bootstrap: installing the locked packages into .venv (once)", file=sys.stderr, flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", "requirements.lock", "--editable", ".[dev,gguf]"], cwd=ROOT, check=True)
    STAMP.write_text(wanted())


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  (an older Python may well be what runs this)
        print(f"bootstrap: expected Python 3.11 or newer, found {sys.version.split()[0]}", file=sys.stderr)
        return 4
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    if not STAMP.exists() or STAMP.read_text() != wanted():
        try:
            install()
        except subprocess.CalledProcessError as e:
            print(f"bootstrap: pip failed with exit code {e.returncode}; its message is above", file=sys.stderr)
            return 4
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV)}
    program = VENV / "bin" / sys.argv[1]
    os.execvpe(str(program) if program.exists() else sys.argv[1], sys.argv[1:], environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
