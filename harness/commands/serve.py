"""`harness serve`: an experiment's service over HTTP, until a signal ends it."""

import os
import socket
import sys
from contextlib import ExitStack, suppress
from typing import NoReturn

from loguru import logger

from harness.commands import record
from harness.errors import EnvironmentFault, SettingsError
from harness.experiments.experiment import Served
from harness.experiments.weights import Models
from harness.files import read_regular
from harness.models import device
from harness.serving import http
from harness.settings import Resolved, ServeSettings

_MOST_KEY_BYTES = 100_000
_MORE_CONNECTIONS = 256
"""Beside those of requests that wait: those that are answered, refused, or asked how the service is."""


def command(resolved: Resolved, experiment: Served, name: str, argv: list[str]) -> int:
    """Serve the experiment of this name until a signal; 0 after one. The address is taken first, and the folder of runs looked
    at where something is recorded: loading a model for one that is not to be had is in vain."""
    settings = resolved.command_section(ServeSettings)
    keys = _keys(settings)
    if not keys and not settings.open and not http.is_own(settings.host):
        raise SettingsError(
            f"serve.host: {settings.host[:100]} can be reached from elsewhere: give serve.api_key_file, or --serve.open true"
        )
    if settings.record:
        record.check(resolved.settings.paths.runs)
    with _listening(settings) as listening, ExitStack() as stack:
        device.set_threads(resolved.settings.runtime.threads)
        device.be_exact()
        models = Models(resolved.settings, device.resolve_device(resolved.settings.runtime.device))
        service = experiment.service(resolved, models, keys)
        grace_s = http.GRACE_S
        if settings.record:
            service.record(stack.enter_context(record.recorded(resolved, name, models, argv)))
            grace_s -= record.SEAL_S
        host, port = listening.getsockname()[:2]
        logger.info("serving on http://{}:{}", f"[{host}]" if ":" in host else host, port)
        http.run(service, [listening], settings.max_queued_requests + _MORE_CONNECTIONS, grace_s)
    logger.info("stopped")
    return 0


def leave(code: int) -> NoReturn:
    """End the process now. Taking torch apart takes seconds that a signal's ten do not have, and nothing is left to save."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _keys(settings: ServeSettings) -> tuple[bytes, ...]:
    if settings.api_key_file is None:
        return ()
    try:
        return http.keys_of(read_regular(settings.api_key_file, _MOST_KEY_BYTES))
    except OSError as e:
        raise SettingsError(f"serve.api_key_file: {settings.api_key_file} cannot be read: {e.strerror}") from e


def _listening(settings: ServeSettings) -> socket.socket:
    try:
        return http.bound(settings.host, settings.port)
    except (OSError, UnicodeError) as e:
        told = getattr(e, "strerror", None) or str(e)
        raise EnvironmentFault(
            f"serve: {settings.host[:100]} port {settings.port} cannot be listened on: {told}"
        ) from e
