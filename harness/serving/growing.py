"""Text that grows token by token: what of it is certain, and where a stop string ends it."""

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Growing:
    """The text of a completion while it is written. Half a character is held back until its other half is there.

    `text` ends before the first of `stops`; `is_cut` says that one has come. Ids are given from the first on each time; fewer
    than before are those of a completion that began again, which is the same one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._num_told = 0
        self.text = ""
        self.is_cut = False

    def add(self, ids: Sequence[int]) -> bool:
        """Take in what is new of `ids`; whether a stop string has come."""
        if self.is_cut or len(ids) <= len(self._ids):
            return self.is_cut
        self._ids.extend(ids[len(self._ids) :])
        # What a token says may depend on the one before it, so that is decoded with it.
        known = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if len(now) > len(known) and not now.endswith(_BROKEN):
            self._grow(self.text + now[len(known) :])
            self._begin, self._read = self._read, len(self._ids)
        return self.is_cut

    def end(self, ids: Sequence[int]) -> str:
        """The whole text, of all ids."""
        if not self.is_cut:
            whole = self._decode(list(ids))
            # Where a tokenizer spells a beginning otherwise once more has come, what was told stays told.
            told = self.text[: self._num_told]
            self._grow(whole if whole.startswith(told) else told + whole[self._num_told :])
        return self.text

    def news(self, *, is_over: bool = False) -> str:
        """What is certain and was not handed out yet; all that is left, where it is over."""
        held = 0 if is_over or self.is_cut else max((_overlap(self.text, stop) for stop in self._stops), default=0)
        told = self.text[self._num_told : len(self.text) - held]
        self._num_told += len(told)
        return told

    def _grow(self, text: str) -> None:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_cut = bool(places)
        self.text = text[: min(places)] if places else text


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
