"""Files of records in, rows of named cells out: JSONL, JSON lists, CSV and Parquet, with the place of whatever is wrong.

Which columns there are is the caller's; a file that is not what its name claims is a PromptFileError.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import PromptFileError
from harness.files import read_regular

MOST_BYTES = 256_000_000
"""A prompt file is read whole: this is a million prompts, and leaves a small machine its memory."""
MOST_CHARACTERS = 100_000
"""Of one field; far more than any model reads."""
MOST_ROWS = 5_000_000
_TOLD = 20
"""Rejected rows that are named one by one."""
_MAX_SHOWN = 60  # characters of a found value, and twelve names, are enough to recognise it in a one-line message


@dataclass(frozen=True)
class Columns:
    """Which columns a file has. `lists`: those that hold several texts (in CSV with a bar between them). `known_as`: other
    names that a column may go by, where it is not there by its own, the first of them that is there."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    known_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.optional, *self.required, *self.lists)

    def named(self, names: list[str]) -> list[str]:
        """The names of a file's columns as they are called here."""
        other = {
            next(o for o in others if o in names): name
            for name, others in self.known_as.items()
            if name not in names and not set(others).isdisjoint(names)
        }
        return [other.get(name, name) for name in names]


@dataclass(frozen=True)
class Rejection:
    """A row refused, and the first rule it broke.

    `row` counts from 1 as a person does in that format: lines of JSONL (blank ones too), records of CSV (the header
    and blank lines not counted; a record may span lines), rows of Parquet.
    """

    row: int
    rule: str
    detail: str


class Record(NamedTuple):
    """A row of any format before its fields are checked: texts, None, and for columns of several texts a list."""

    number: int
    where: str
    cells: Mapping[str, object]


T = TypeVar("T")


class Accepted(NamedTuple):
    """What a file holds, in file order, the rows refused, and the hash of the bytes that were read."""

    found: tuple[Any, ...]
    rejections: tuple[Rejection, ...]
    sha256: str


def accepted(
    path: Path,
    columns: Columns,
    build: Callable[[Record], T],
    broken: Callable[[T], tuple[str, str] | None],
    wording: Callable[[T], Hashable],
    same: str,
) -> Accepted:
    """What `build` makes of the rows of a .jsonl, .ndjson, .json, .csv or .parquet file; each has a `prompt_id` of its own.

    `broken` gives the rule that one breaks, and what was found. Of several with the same `wording` the first is kept, and the
    others break the rule `duplicate`, told in the words `same`.
    Raises PromptFileError, one line, for anything that is wrong with the file and not with a row.
    """
    read_rows, data = _open(path)
    found: list[Any] = []
    rejections: list[Rejection] = []
    wording_to_row: dict[Hashable, int] = {}
    id_to_where: dict[str, str] = {}
    for row in read_rows(path, data, columns) if data else ():
        made: Any = build(row)
        said = wording(made)
        rule = broken(made)
        if rule is None and said in wording_to_row:
            rule = ("duplicate", f"{same} as row {wording_to_row[said]}")
        if rule is not None:
            rejections.append(Rejection(row.number, *rule))
            continue
        if made.prompt_id in id_to_where:
            told = f"{quoted(made.prompt_id)} is already the id of {id_to_where[made.prompt_id]}"
            raise fail(path, f"{row.where}, field 'prompt_id'", told, "give each row a prompt_id of its own")
        wording_to_row[said] = row.number
        id_to_where[made.prompt_id] = row.where
        found.append(made)
    if not found and not rejections:
        told = "no row in it" if data else "the file is empty"
        raise fail(path, "", told, f"write at least one row with {', '.join(columns.required)}")
    if not found:
        counts = ", ".join(f"{rule} {count}" for rule, count in Counter(r.rule for r in rejections).items())
        first = f"the first, row {rejections[0].row}: {rejections[0].detail} ({rejections[0].rule})"
        told = f"none of the {len(rejections)} rows passes the rules ({counts}); {first}"
        raise fail(path, "", told, "mend the rows, or see whether two columns are swapped")
    return Accepted(tuple(found), tuple(rejections), hashlib.sha256(data).hexdigest())


def text_of(path: Path, where: str, value: object, *, is_exact: bool = False) -> str:
    """A cell that holds text, without spaces at its ends unless it is wanted as it is. Raises PromptFileError."""
    if not isinstance(value, str):
        raise fail(path, where, f"expected text, found {described(value)}", "write it as text, in quotes")
    # JSON can spell both with an escape and Parquet can hold a NUL; no tokenizer, hash or table takes them.
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        raise fail(path, where, f"a NUL or half of a surrogate pair in {quoted(value)}", "remove the character")
    if len(value) > MOST_CHARACTERS:
        found = f"{len(value):,} characters, expected at most {MOST_CHARACTERS:,}"
        raise fail(path, where, found, "see whether a quote or a line end is missing, or shorten the text")
    return value if is_exact else value.strip()


def rejections_told(path: Path, rejections: Sequence[Rejection]) -> list[str]:
    """Lines on the rows refused: the first of them one by one, then how many broke each rule."""
    told = [f"{path.name} row {r.row}: {r.rule}: {r.detail}" for r in rejections[:_TOLD]]
    if rejections:
        counts = Counter(r.rule for r in rejections)
        by_rule = ", ".join(f"{n} {rule}" for rule, n in sorted(counts.items()))
        told.append(f"{path}: {len(rejections)} rows rejected ({by_rule})")
    return told


# Files to rows


def _open(path: Path) -> tuple[Callable[[Path, bytes, Columns], Iterator[Record]], bytes]:
    expected = f"name a prompt file that ends in {', '.join(_FORMATS)}"
    read_rows = _FORMATS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise fail(path, "", "a folder, expected a file", expected)
        if not path.is_file():  # nor read a pipe or a device, which may never end
            raise fail(path, "", "no such file", expected)
        if read_rows is None:
            raise fail(path, "", f"unknown format {path.suffix!r}", expected)
        return read_rows, read_regular(path, MOST_BYTES)
    except OSError as e:
        raise fail(path, "", f"cannot be read ({e.strerror})", expected) from e


def _jsonl_rows(path: Path, data: bytes, columns: Columns) -> Iterator[Record]:
    # Not splitlines(): a JSON string may hold U+2028 and its kin as they are.
    lines = _decode(path, data).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, advice = f"line {number}", "write one JSON object a line"
        try:
            cells = json.loads(line, object_pairs_hook=_json_object)
        except json.JSONDecodeError as e:
            if number == len(lines):  # a whole file ends with a line end, so its last piece is blank
                advice += "; the file may be cut short"
            raise fail(path, f"{where}, column {e.colno}", f"not valid JSON ({e.msg})", advice) from e
        except (ValueError, RecursionError) as e:  # a key given twice, a number of 5,000 digits, a nest without end
            raise fail(path, where, f"JSON that cannot be read ({e})", advice) from e
        if not isinstance(cells, dict):
            raise fail(path, where, f"expected a JSON object, found {described(cells)}", advice)
        names = columns.named(list(cells))
        _check_columns(path, where, "field", names, columns)
        yield Record(number, where, dict(zip(names, cells.values(), strict=True)))


def _json_rows(path: Path, data: bytes, columns: Columns) -> Iterator[Record]:
    advice = "write one list of JSON objects"
    try:
        rows = json.loads(_decode(path, data), object_pairs_hook=_json_object)
    except json.JSONDecodeError as e:
        raise fail(path, f"line {e.lineno}, column {e.colno}", f"not valid JSON ({e.msg})", advice) from e
    except (ValueError, RecursionError) as e:
        raise fail(path, "", f"JSON that cannot be read ({e})", advice) from e
    if not isinstance(rows, list):
        raise fail(path, "", f"expected a list, found {described(rows)}", advice)
    for number, cells in enumerate(rows, 1):
        where = f"row {number}"
        if not isinstance(cells, dict):
            raise fail(path, where, f"expected a JSON object, found {described(cells)}", advice)
        names = columns.named(list(cells))
        _check_columns(path, where, "field", names, columns)
        yield Record(number, where, dict(zip(names, cells.values(), strict=True)))


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # json would keep the last of two equal keys and say nothing.
    names = [name.strip() for name, _ in pairs]
    for name in _repeated(names):
        raise ValueError(f"the field {quoted(name)} occurs twice in one object")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _csv_rows(path: Path, data: bytes, columns: Columns) -> Iterator[Record]:
    records = _csv_records(path, _decode(path, data))
    _, where, header = next(records, (0, "", []))
    if not header:
        return
    names = columns.named([name.strip() for name in header])
    _check_columns(path, where, "column", names, columns)
    for number, where, values in records:
        if len(values) != len(names):
            found = f"{len(values)} cells under a header of {len(names)}"
            if len(values) < len(names):
                found += f", the field {quoted(names[len(values)])} has none"
                advice = "write an empty cell for what is not known, and see that the file is not cut short"
            else:
                found += f", one too many is {quoted(values[len(names)])}"
                advice = 'put a cell that holds a comma in quotes, with no space before the first quote: ,"a, b",'
            raise fail(path, where, found, advice)
        cells: dict[str, object] = dict(zip(names, values, strict=True))
        lists = {name: str(cells.get(name, "")).split("|") for name in columns.lists}
        yield Record(number, where, {**cells, **lists})


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number (0 is the header), place and cells of each record; blank lines are passed over."""
    # newline="" hands over a line end inside quotes as it was written.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    while True:
        line = reader.line_num + 1
        where = f"row {number} (line {line})" if number else f"header (line {line})"
        try:
            cells = next(reader, None)
        except csv.Error as e:
            advice = 'close every quote, and write a quote inside quotes twice: "say ""so"""'
            raise fail(path, where, f"not valid CSV from here on ({e})", advice) from e
        if cells is None:
            return
        if len(cells) > 1 or any(map(str.strip, cells)):
            yield number, where, cells
            number += 1


def _parquet_rows(path: Path, data: bytes, columns: Columns) -> Iterator[Record]:
    try:
        # Of the bytes that were hashed. Not read_table, which takes a column from a folder named category=facts.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
        names = columns.named([name.strip() for name in schema.names])
        _check_columns(path, "", "column", names, columns)
        places = {name: place for place, name in enumerate(names) if name in columns.all}
        for name, place in places.items():
            _check_type(path, name, schema.types[place], is_list=name in columns.lists)
        if file.metadata.num_rows > MOST_ROWS:
            found = f"{file.metadata.num_rows:,} rows, expected at most {MOST_ROWS:,}"
            raise fail(path, "", found, "write the rows that are wanted to a file of their own")
        table = _parquet_table(path, file, [schema.names[place] for place in places.values()])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise fail(path, "", f"not a whole Parquet file ({e})", "write or copy the file again") from e
    values = [table.column(schema.names[place]) for place in places.values()]
    for number in range(1, table.num_rows + 1):
        cells: dict[str, object] = {}
        for name, column in zip(places, values, strict=True):
            try:
                cells[name] = column[number - 1].as_py()
            except UnicodeDecodeError as e:
                found = f"not UTF-8 (byte {e.start} of the value)"
                raise fail(path, f"row {number}, field '{name}'", found, "write the file again as UTF-8") from e
        for name in columns.lists:
            if isinstance(cell := cells.get(name), str):
                cells[name] = cell.split("|")
        yield Record(number, f"row {number}", cells)


def _parquet_table(path: Path, file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """The columns of these names. A few thousand bytes can stand for as many gigabytes, so what comes out is counted."""
    batches, num_bytes = [], 0
    for batch in file.iter_batches(batch_size=64, columns=names):
        num_bytes += batch.nbytes
        if num_bytes > MOST_BYTES:
            found = f"more than {MOST_BYTES:,} bytes once it is unpacked"
            raise fail(path, "", found, "write the rows that are wanted to a file of their own")
        batches.append(batch)
    table = pa.Table.from_batches(batches) if batches else file.read(columns=names)
    if table.num_rows != file.metadata.num_rows:
        found = f"{table.num_rows:,} rows, and its footer speaks of {file.metadata.num_rows:,}"
        raise fail(path, "", f"not a whole Parquet file ({found})", "write or copy the file again")
    return table


def _check_type(path: Path, name: str, kind: pa.DataType, *, is_list: bool) -> None:
    # By type and not by value: a timestamp, say, may not even have a Python value to look at.
    element = kind.value_type if is_list and isinstance(kind, _LISTS) else kind
    element = element.value_type if isinstance(element, pa.DictionaryType) else element
    if element not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise fail(path, f"field '{name}'", f"expected a column of text, found {kind}", "write the column as strings")


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
_FORMATS = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip


def _decode(path: Path, data: bytes) -> str:
    marks = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
        "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    }
    for name, starts in marks.items():
        if data.startswith(starts):
            raise fail(path, "line 1, byte 0", f"expected UTF-8, found the mark of {name}", "save the file as UTF-8")
    bom_bytes = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[bom_bytes:].decode()
    except UnicodeDecodeError as e:
        at = bom_bytes + e.start
        found = f"expected UTF-8, found {data[at]:#04x}"
        raise fail(path, _place(data, at), found, "save the file as UTF-8 (it may be Windows-1252 now)") from e
    if (at := data.find(0)) >= 0:
        raise fail(path, _place(data, at), "a NUL byte", "save the file as UTF-8 (it may be UTF-16 or binary now)")
    return text


def _place(data: bytes, at: int) -> str:
    newline = b"\n"
    return f"line {data.count(newline, 0, at) + 1}, byte {at}"


def _check_columns(path: Path, where: str, kind: str, names: list[str], columns: Columns) -> None:
    """Every required name is there, and none twice (cells without a name, as spreadsheets leave them, may be many)."""
    for name in _repeated(list(filter(None, names))):
        raise fail(path, where, f"the {kind} {quoted(name)} occurs twice", "rename or remove one of the two")
    missing = [name for name in columns.required if name not in names]
    if not missing:
        return
    spare = [name for name in names if name and name not in columns.all]
    pairs = [(SequenceMatcher(None, want, have.lower()).ratio(), want, have) for want in missing for have in spare]
    guesses: dict[str, str] = {}
    for _, want, have in sorted(pairs, key=lambda pair: -pair[0]):  # the likest pair first; a name answers once
        if want not in guesses and have not in guesses.values():
            guesses[want] = have
    wanted = ", ".join(f"'{name}'" for name in missing)
    advice = f"add {wanted}"
    if len(names) == 1 and re.search("[;\t]", names[0]):
        advice = "put commas between the cells, not semicolons or tabs"
    elif guesses:
        renames = ", ".join(f"rename {quoted(have)} to '{want}'" for want, have in guesses.items())
        advice = f"{renames} if that is what it holds"
    found = ", ".join(map(quoted, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise fail(path, where, f"missing {kind} {wanted}, found {found or 'none'}", advice)


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


# Messages


def fail(path: Path, where: str, found: str, advice: str) -> PromptFileError:
    """One printable line: where, what was found there, what to do."""
    name = str(path) if len(str(path)) <= 1_000 else f"{str(path)[:999]}…"
    line = f"{name}, {where}: {found}; {advice}" if where else f"{name}: {found}; {advice}"
    # One printable line, whatever the file name or a library's message holds.
    return PromptFileError(" ".join("".join(c if c.isprintable() else " " for c in line).split()))


def quoted(text: str) -> str:
    """A found value as a one-line message quotes it."""
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")


def described(value: object) -> str:
    """A found value by its kind, as a one-line message has it."""
    match value:
        case None:
            return "null"
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return f"the number {str(value)[:_MAX_SHOWN]}"
        case str():
            return f"the text {quoted(value)}"
        case list():
            return "a list"
        case _:
            return "an object"
