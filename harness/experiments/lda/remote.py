"""Rollouts from a `harness serve lda` elsewhere, as `harness.models.rollout.rollouts` gives them here."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from harness.errors import EnvironmentFault, ItemFailed, NotFinite, SettingsError
from harness.models.rollout import Ask, Rollout, Rule, in_parts

_PATIENCE_S = 300.0
"""How long a server may be silent, full or starting before it is given up."""
_WAIT_S = 2.0
"""Between two tries of a server that does not say when to come again."""
_MOST_WAIT_S = 60.0
_CONNECT_S = 10.0
_SILENT_S = 3600.0
"""What one request may take; a server that ends closes the connection, and one whose network is gone does not."""
_LISTS = ("logp_after", "logp_before", "logp_arm", "margins", "mass_removed")


class Remote:
    """A service that makes rollouts of one pair of models.

    What is asked for together is computed together there, so that its numbers are those of the same asks here, bit for bit.
    `batch`: contexts that are sent in one request. `key`: for servers that ask for one.
    """

    def __init__(
        self,
        url: str,
        pair_sha256: str,
        batch: int,
        key: str = "",
        patience_s: float = _PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.BaseTransport | None = None,
    ):
        """Raises SettingsError where the address is none, or another pair is served there; EnvironmentFault where nobody is."""
        self._url, self._pair_sha256, self._batch = checked_url(url), pair_sha256, batch
        self._patience_s, self._sleep, self._clock = patience_s, sleep, clock
        self._client = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_SILENT_S, connect=_CONNECT_S),
            follow_redirects=False,
            transport=transport,
            limits=httpx.Limits(
                max_keepalive_connections=0
            ),  # a request takes seconds; nobody is there to close one at the end
        )
        try:
            self._check_pair()
        except BaseException:
            self.close()
            raise

    def rollouts(self, asks: Sequence[Ask], rule: Rule, arms: Sequence[float] = ()) -> list[Rollout | ItemFailed]:
        """A completion for every ask, in order; see `rollout.rollouts`. Raises EnvironmentFault, SettingsError."""
        found: list[Rollout | ItemFailed | None] = [None] * len(asks)
        for places in in_parts(asks, self._batch):
            contexts = {asks[n].context: None for n in places}
            number = {context: n for n, context in enumerate(contexts)}
            body = {
                "pair_sha256": self._pair_sha256,
                "contexts": [list(context) for context in contexts],
                "asks": [[number[a.context], a.key, a.alpha, a.max_new_tokens] for a in (asks[n] for n in places)],
                "temperature": rule.temperature,
                "top_p": rule.top_p,
                "floor": rule.floor,
                "stop_at_end": rule.stop_at_end,
                "arms": list(arms),
            }
            told = self._asked("POST", "/rollouts", body).get("rollouts")
            if not isinstance(told, list) or len(told) != len(places):
                raise self._strange(f"expected {len(places)} rollouts")
            for place, one in zip(places, told, strict=True):
                found[place] = self._read(one, len(arms))
        return [one for one in found if one is not None]

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_pair(self) -> None:
        told = self._asked("GET", "/tokenizer_compatibility").get("pair_sha256")
        if told != self._pair_sha256:
            raise SettingsError(
                f"lda.server: {self._url} serves another pair: expected {self._pair_sha256}, found {str(told)[:80]}; "
                "start it with the same --model and --other"
            )

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, however often it has to be made."""
        deadline = self._clock() + self._patience_s
        while True:
            wait, why = _WAIT_S, ""
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as e:
                why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            else:
                if response.status_code == 200:
                    return self._object(response)
                why = f"{response.status_code} {_line(response)}"
                if response.status_code not in (429, 502, 503, 504):
                    raise self._refused(response.status_code, why)
                wait = _seconds(response.headers.get("Retry-After"))
            if self._clock() + wait > deadline:
                raise EnvironmentFault(
                    f"lda.server: {self._url} gave no answer in {self._patience_s:g} s ({why}); "
                    "see whether it runs, and type the same command again"
                )
            self._sleep(wait)

    def _refused(self, status: int, why: str) -> Exception:
        if status >= 500:
            return EnvironmentFault(f"lda.server: {self._url} failed: {why}")
        hints = {
            409: "another pair is served there now",
            413: "give a smaller lda.server_batch",
        }
        return SettingsError(f"lda.server: {self._url}: {why}{f'; {hints[status]}' if status in hints else ''}")

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except (ValueError, RecursionError) as e:
            raise self._strange("expected JSON") from e
        if not isinstance(answer, dict):
            raise self._strange("expected a JSON object")
        return answer

    def _read(self, told: Any, num_arms: int) -> Rollout | ItemFailed:
        try:
            if "error" in told:
                kind = ItemFailed if told.get("is_finite", True) else NotFinite
                return kind(str(told["error"])[:1000])
            token_ids = [int(t) for t in told["token_ids"]]
            lists = {name: [_float(x) for x in told[name]] for name in _LISTS}
            arm_steps = [[_float(x) for x in step] for step in told["arm_steps"]]
            if {len(token_ids)} != {len(x) for x in (*lists.values(), arm_steps)} or {num_arms} != set(
                map(len, arm_steps)
            ):
                raise ValueError("of other lengths")
            return Rollout(token_ids, **lists, arm_steps=arm_steps, finish_reason=str(told["finish_reason"]))
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise self._strange("expected rollouts") from e

    def _strange(self, expected: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"lda.server: {self._url}: {expected}, found something else; is it a `harness serve lda`?"
        )


def checked_url(url: str) -> str:
    """The address of a server, without a slash at its end. Raises SettingsError for what is none."""
    try:
        parts = httpx.URL(url.strip())
        is_one = parts.scheme in ("http", "https") and bool(re.fullmatch(r"[\w.:-]+", parts.host))
        is_one = is_one and not (parts.userinfo or parts.query or parts.fragment)
    except (httpx.InvalidURL, ValueError, UnicodeError):
        is_one = False
    if not is_one:
        shown = "".join(c for c in url[:100] if c.isprintable() and c != "@")
        raise SettingsError(f"lda.server: expected an address such as http://host:8000, found {shown!r}")
    return url.strip().rstrip("/")


def _line(response: httpx.Response) -> str:
    """The one line of an error, whoever sent it."""
    try:
        line = response.json()["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        line = response.text[:200]
    return "".join(c if c.isprintable() else " " for c in str(line))[:300]


def _seconds(given: str | None) -> float:
    """How long to wait, by a `Retry-After`."""
    try:
        seconds = float(given or _WAIT_S)
    except ValueError:  # it may be a date
        return _WAIT_S
    return min(max(seconds, 0.1), _MOST_WAIT_S) if seconds == seconds else _WAIT_S


def _float(told: float | str | None) -> float:
    return float("nan") if told is None else float(told)
