"""Prompt files in, checked prompts out, with the row number and the rule of every row refused.

A row that breaks a rule is listed and reading goes on; a file that is not what its name claims is a PromptFileError.
Knows no tokenizer, no template and no model: a target of many tokens is as welcome as one of a single token.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import PromptFileError
from harness.files import read_regular

_REQUIRED = ("category", "question", "target")
_COLUMNS = ("prompt_id", *_REQUIRED, "source", "style", "alternatives")
MOST_BYTES = 256_000_000
"""A prompt file is read whole: this is a million prompts, and leaves a small machine its memory."""
MOST_CHARACTERS = 100_000
"""Of one field; far more than any model reads."""
MOST_ROWS = 5_000_000
_MAX_SHOWN = 60  # characters of a found value, and twelve names, are enough to recognise it in a one-line message


@dataclass(frozen=True)
class Prompt:
    """One question with the word it asks for; `row_hash` changes when any other field does."""

    prompt_id: str
    category: str
    question: str
    target: str
    source: str | None
    style: str | None
    alternatives: tuple[str, ...]
    row_hash: str


@dataclass(frozen=True)
class Rejection:
    """A row refused, and the first rule it broke.

    `row` counts from 1 as a person does in that format: lines of JSONL (blank ones too), records of CSV (the header
    and blank lines not counted; a record may span lines), rows of Parquet.
    """

    row: int
    rule: str
    detail: str


@dataclass(frozen=True)
class PromptSet:
    """What a prompt file holds, in file order; `sha256` is of the bytes that were parsed."""

    path: Path
    prompts: tuple[Prompt, ...]
    rejections: tuple[Rejection, ...]
    sha256: str


class _Row(NamedTuple):
    """A row of any format before its fields are checked: texts, None, and for alternatives a list."""

    number: int
    where: str
    cells: Mapping[str, object]


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a .jsonl, .ndjson, .csv or .parquet file, and the rows refused.

    Rules, in the order they are tried: empty_field, target_not_alphabetic, target_in_question, target_hidden,
    duplicate. Duplicates are looked for among accepted rows, so the first of two equal rows is kept.
    Raises PromptFileError, one line, for anything that is wrong with the file and not with a row.
    """
    read_rows, data = _open(path)
    prompts: list[Prompt] = []
    rejections: list[Rejection] = []
    wording_to_row: dict[tuple[str, str], int] = {}
    id_to_where: dict[str, str] = {}
    for row in read_rows(path, data) if data else ():
        prompt = _prompt(path, row)
        wording = (_fold(prompt.question), _fold(prompt.target))
        broken = _broken_rule(prompt)
        if broken is None and wording in wording_to_row:
            broken = ("duplicate", f"the same question and target as row {wording_to_row[wording]}")
        if broken is not None:
            rejections.append(Rejection(row.number, *broken))
            continue
        if prompt.prompt_id in id_to_where:
            found = f"{_show(prompt.prompt_id)} is already the id of {id_to_where[prompt.prompt_id]}"
            raise _fail(path, f"{row.where}, field 'prompt_id'", found, "give each row a prompt_id of its own")
        wording_to_row[wording] = row.number
        id_to_where[prompt.prompt_id] = row.where
        prompts.append(prompt)

    if not prompts and not rejections:
        found = "no row in it" if data else "the file is empty"
        raise _fail(path, "", found, f"write at least one row with {', '.join(_REQUIRED)}")
    if not prompts:
        counts = ", ".join(f"{rule} {count}" for rule, count in Counter(r.rule for r in rejections).items())
        first = f"the first, row {rejections[0].row}: {rejections[0].detail} ({rejections[0].rule})"
        found = f"none of the {len(rejections)} rows passes the rules ({counts}); {first}"
        raise _fail(path, "", found, "mend the rows, or see whether two columns are swapped")
    return PromptSet(path, tuple(prompts), tuple(rejections), hashlib.sha256(data).hexdigest())


def take(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """`limit` prompts in file order, drawn in turn from the categories so that a small sample holds every one.

    Categories take turns in order of first appearance, each giving its rows in file order; hence a smaller sample
    is part of every larger one. None, or a limit of at least len(prompts), keeps all.
    """
    assert limit is None or limit >= 0, f"limit counts prompts, got {limit}"
    category_to_places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        category_to_places.setdefault(prompt.category, []).append(place)
    turns = chain.from_iterable(zip_longest(*category_to_places.values()))
    drawn = [place for place in turns if place is not None][:limit]
    return tuple(prompts[place] for place in sorted(drawn))


def letters(text: str) -> str:
    """The letters of a text and nothing else, folded whatever the case, width, ligatures, spaces and signs."""
    return "".join(filter(str.isalpha, normalize("NFKC", text).casefold()))


# Rows to prompts


def _fold(text: str) -> str:
    return " ".join(normalize("NFKC", text).casefold().split())


def _prompt(path: Path, row: _Row) -> Prompt:
    """A row with its fields stripped, defaulted and hashed; required fields may still be empty."""

    def text(name: str) -> str:
        value = row.cells.get(name)
        return "" if value is None else _text(path, f"{row.where}, field '{name}'", value)

    where = f"{row.where}, field 'alternatives'"
    found = row.cells.get("alternatives")
    if found is not None and not isinstance(found, list):
        raise _fail(path, where, f"expected a list of texts, found {_describe(found)}", 'write it as ["one", "two"]')
    alternatives = tuple(_text(path, f"{where}, element {i}", value) for i, value in enumerate(found or [], 1))

    category, question, target = (text(name) for name in _REQUIRED)
    prompt = Prompt(
        prompt_id=text("prompt_id") or f"{category}_{target}_{hashlib.sha256(question.encode()).hexdigest()[:8]}",
        category=category,
        question=question,
        target=target,
        source=text("source") or None,
        style=text("style") or None,
        alternatives=tuple(filter(None, alternatives)),
        row_hash="",
    )
    fields = {name: value for name, value in asdict(prompt).items() if name != "row_hash"}
    canonical = json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return replace(prompt, row_hash=hashlib.sha256(canonical.encode()).hexdigest())


def _text(path: Path, where: str, value: object) -> str:
    if not isinstance(value, str):
        raise _fail(path, where, f"expected text, found {_describe(value)}", "write it as text, in quotes")
    # JSON can spell both with an escape and Parquet can hold a NUL; no tokenizer, hash or table takes them.
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        raise _fail(path, where, f"a NUL or half of a surrogate pair in {_show(value)}", "remove the character")
    if len(value) > MOST_CHARACTERS:
        found = f"{len(value):,} characters, expected at most {MOST_CHARACTERS:,}"
        raise _fail(path, where, found, "see whether a quote or a line end is missing, or shorten the text")
    return value.strip()


def _broken_rule(prompt: Prompt) -> tuple[str, str] | None:
    """The slug of the first rule a prompt breaks on its own, with what was found; None when it keeps them all."""
    for name in _REQUIRED:
        if not getattr(prompt, name):
            return "empty_field", f"{name} is empty"

    # NFC, so that an accent typed as a mark of its own counts as part of its letter. The letters are asked for as
    # well: a few symbols are alphabetic to Unicode and fold to nothing, which would be "hidden" in any question.
    shown, word = _show(prompt.target), normalize("NFC", prompt.target)
    if not word.isalpha() or min(len(word), len(letters(word))) < 2:
        return "target_not_alphabetic", f"target {shown} is not one word of two or more letters"

    # As in detection, a word ends at any sign that is neither a letter nor a digit: "_" ends it, which \b would not.
    whole_word = rf"(?<![^\W_]){re.escape(_fold(prompt.target))}(?![^\W_])"
    if re.search(whole_word, _fold(prompt.question)):
        return "target_in_question", f"the question {_show(prompt.question)} names the target {shown}"
    if letters(prompt.target) in letters(prompt.question):
        return "target_hidden", f"the target {shown} is spelled by letters in a row in {_show(prompt.question)}"
    return None


# Files to rows


def _open(path: Path) -> tuple[Callable[[Path, bytes], Iterator[_Row]], bytes]:
    expected = f"name a prompt file that ends in {', '.join(_FORMATS)}"
    read_rows = _FORMATS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise _fail(path, "", "a folder, expected a file", expected)
        if not path.is_file():  # nor read a pipe or a device, which may never end
            raise _fail(path, "", "no such file", expected)
        if read_rows is None:
            raise _fail(path, "", f"unknown format {path.suffix!r}", expected)
        return read_rows, read_regular(path, MOST_BYTES)
    except OSError as e:
        raise _fail(path, "", f"cannot be read ({e.strerror})", expected) from e


def _jsonl_rows(path: Path, data: bytes) -> Iterator[_Row]:
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
            raise _fail(path, f"{where}, column {e.colno}", f"not valid JSON ({e.msg})", advice) from e
        except (ValueError, RecursionError) as e:  # a key given twice, a number of 5,000 digits, a nest without end
            raise _fail(path, where, f"JSON that cannot be read ({e})", advice) from e
        if not isinstance(cells, dict):
            raise _fail(path, where, f"expected a JSON object, found {_describe(cells)}", advice)
        _check_columns(path, where, "field", list(cells))
        yield _Row(number, where, cells)


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # json would keep the last of two equal keys and say nothing.
    names = [name.strip() for name, _ in pairs]
    for name in _repeated(names):
        raise ValueError(f"the field {_show(name)} occurs twice in one object")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _csv_rows(path: Path, data: bytes) -> Iterator[_Row]:
    records = _csv_records(path, _decode(path, data))
    _, where, header = next(records, (0, "", []))
    if not header:
        return
    names = [name.strip() for name in header]
    _check_columns(path, where, "column", names)
    for number, where, values in records:
        if len(values) != len(names):
            found = f"{len(values)} cells under a header of {len(names)}"
            if len(values) < len(names):
                found += f", the field {_show(names[len(values)])} has none"
                advice = "write an empty cell for what is not known, and see that the file is not cut short"
            else:
                found += f", one too many is {_show(values[len(names)])}"
                advice = 'put a cell that holds a comma in quotes, with no space before the first quote: ,"a, b",'
            raise _fail(path, where, found, advice)
        cells: dict[str, object] = dict(zip(names, values, strict=True))
        yield _Row(number, where, {**cells, "alternatives": str(cells.get("alternatives", "")).split("|")})


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
            raise _fail(path, where, f"not valid CSV from here on ({e})", advice) from e
        if cells is None:
            return
        if len(cells) > 1 or any(map(str.strip, cells)):
            yield number, where, cells
            number += 1


def _parquet_rows(path: Path, data: bytes) -> Iterator[_Row]:
    try:
        # Of the bytes that were hashed. Not read_table, which takes a column from a folder named category=facts.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
        names = [name.strip() for name in schema.names]
        _check_columns(path, "", "column", names)
        places = {name: place for place, name in enumerate(names) if name in _COLUMNS}
        for name, place in places.items():
            _check_type(path, name, schema.types[place])
        if file.metadata.num_rows > MOST_ROWS:
            found = f"{file.metadata.num_rows:,} rows, expected at most {MOST_ROWS:,}"
            raise _fail(path, "", found, "write the rows that are wanted to a file of their own")
        table = _parquet_table(path, file, [schema.names[place] for place in places.values()])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise _fail(path, "", f"not a whole Parquet file ({e})", "write or copy the file again") from e
    columns = [table.column(schema.names[place]) for place in places.values()]
    for number in range(1, table.num_rows + 1):
        cells: dict[str, object] = {}
        for name, column in zip(places, columns, strict=True):
            try:
                cells[name] = column[number - 1].as_py()
            except UnicodeDecodeError as e:
                found = f"not UTF-8 (byte {e.start} of the value)"
                raise _fail(path, f"row {number}, field '{name}'", found, "write the file again as UTF-8") from e
        alternatives = cells.get("alternatives")
        if isinstance(alternatives, str):
            cells["alternatives"] = alternatives.split("|")
        yield _Row(number, f"row {number}", cells)


def _parquet_table(path: Path, file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """The columns of these names. A few thousand bytes can stand for as many gigabytes, so what comes out is counted."""
    batches, num_bytes = [], 0
    for batch in file.iter_batches(batch_size=64, columns=names):
        num_bytes += batch.nbytes
        if num_bytes > MOST_BYTES:
            found = f"more than {MOST_BYTES:,} bytes once it is unpacked"
            raise _fail(path, "", found, "write the rows that are wanted to a file of their own")
        batches.append(batch)
    table = pa.Table.from_batches(batches) if batches else file.read(columns=names)
    if table.num_rows != file.metadata.num_rows:
        found = f"{table.num_rows:,} rows, and its footer speaks of {file.metadata.num_rows:,}"
        raise _fail(path, "", f"not a whole Parquet file ({found})", "write or copy the file again")
    return table


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    # By type and not by value: a timestamp, say, may not even have a Python value to look at.
    element = kind.value_type if name == "alternatives" and isinstance(kind, _LISTS) else kind
    element = element.value_type if isinstance(element, pa.DictionaryType) else element
    if element not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise _fail(path, f"field '{name}'", f"expected a column of text, found {kind}", "write the column as strings")


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
_FORMATS = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _decode(path: Path, data: bytes) -> str:
    marks = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
        "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    }
    for name, starts in marks.items():
        if data.startswith(starts):
            raise _fail(path, "line 1, byte 0", f"expected UTF-8, found the mark of {name}", "save the file as UTF-8")
    bom_bytes = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[bom_bytes:].decode()
    except UnicodeDecodeError as e:
        at = bom_bytes + e.start
        found = f"expected UTF-8, found {data[at]:#04x}"
        raise _fail(path, _place(data, at), found, "save the file as UTF-8 (it may be Windows-1252 now)") from e
    if (at := data.find(0)) >= 0:
        raise _fail(path, _place(data, at), "a NUL byte", "save the file as UTF-8 (it may be UTF-16 or binary now)")
    return text


def _place(data: bytes, at: int) -> str:
    newline = b"\n"
    return f"line {data.count(newline, 0, at) + 1}, byte {at}"


def _check_columns(path: Path, where: str, kind: str, names: list[str]) -> None:
    """Every required name is there, and none twice (cells without a name, as spreadsheets leave them, may be many)."""
    for name in _repeated(list(filter(None, names))):
        raise _fail(path, where, f"the {kind} {_show(name)} occurs twice", "rename or remove one of the two")
    missing = [name for name in _REQUIRED if name not in names]
    if not missing:
        return
    spare = [name for name in names if name and name not in _COLUMNS]
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
        renames = ", ".join(f"rename {_show(have)} to '{want}'" for want, have in guesses.items())
        advice = f"{renames} if that is what it holds"
    found = ", ".join(map(_show, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise _fail(path, where, f"missing {kind} {wanted}, found {found or 'none'}", advice)


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


# Messages


def _fail(path: Path, where: str, found: str, advice: str) -> PromptFileError:
    name = str(path) if len(str(path)) <= 1_000 else f"{str(path)[:999]}…"
    line = f"{name}, {where}: {found}; {advice}" if where else f"{name}: {found}; {advice}"
    # One printable line, whatever the file name or a library's message holds.
    return PromptFileError(" ".join("".join(c if c.isprintable() else " " for c in line).split()))


def _show(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")


def _describe(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return f"the number {str(value)[:_MAX_SHOWN]}"
        case str():
            return f"the text {_show(value)}"
        case list():
            return "a list"
        case _:
            return "an object"
