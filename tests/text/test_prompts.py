"""Prompt files: what is read, which rows are refused by which rule, and what each broken file is told."""

import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import PromptFileError
from harness.text.prompts import Prompt, PromptSet, letters, read_prompts, take

Row = dict[str, Any]

GOOD: Row = {"category": "facts", "question": "What is the capital of France?", "target": "Paris"}
OTHER: Row = {"category": "idioms", "question": "The early bird catches the", "target": "worm"}
GOOD_LINE = json.dumps(GOOD).encode()
FORMATS = [".jsonl", ".ndjson", ".csv", ".parquet"]


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_bytes(rows: list[Row]) -> bytes:
    """As a spreadsheet writes it: nothing is an empty cell, alternatives are joined by "|"."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return out.getvalue().encode()


def parquet(columns: dict[str, Any] | pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), out)
    return out.getvalue()


def encode(rows: list[Row], suffix: str) -> bytes:
    if suffix == ".csv":
        return csv_bytes(rows)
    if suffix == ".parquet":
        return parquet({name: [row.get(name) for row in rows] for name in dict.fromkeys(n for r in rows for n in r)})
    return jsonl(rows)


def read(folder: Path, data: bytes, name: str = "set.jsonl") -> PromptSet:
    path = folder / name
    path.write_bytes(data)
    return read_prompts(path)


def refusal(folder: Path, data: bytes, name: str) -> str:
    """The message of the error that this file must raise, after checking what every such message owes its reader."""
    with pytest.raises(PromptFileError) as caught:
        read(folder, data, name)
    message = str(caught.value)
    assert message.isprintable(), "one line, safe to print on a terminal"
    assert name in message
    assert "; " in message, "says what to try"
    return message


# Reading


@pytest.mark.parametrize("suffix", [*FORMATS, ".JSONL", ".Csv"])
def test_two_rows_are_read_in_file_order_with_their_defaults(tmp_path: Path, suffix: str) -> None:
    data = encode([GOOD, OTHER], suffix.lower())
    result = read(tmp_path, data, f"set{suffix}")
    first, second = result.prompts
    question_hash = hashlib.sha256(GOOD["question"].encode()).hexdigest()
    assert first == Prompt(
        prompt_id=f"facts_Paris_{question_hash[:8]}",
        category="facts",
        question="What is the capital of France?",
        target="Paris",
        source=None,
        style=None,
        alternatives=(),
        row_hash=first.row_hash,
    )
    assert second.target == "worm"
    assert result.rejections == ()
    assert result.path == tmp_path / f"set{suffix}"
    assert result.sha256 == hashlib.sha256(data).hexdigest()


text_field = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
filled_field = text_field.filter(lambda text: text.strip())
rows_of_a_set = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_id": st.none() | text_field,
            "category": filled_field,
            "question": filled_field.filter(lambda text: "zyz" not in letters(text)),
            "target": st.sampled_from(["zyzzyva", "Zyzzyvas", "ZYZ"]),
            "source": st.none() | text_field,
            "style": st.none() | text_field,
            "alternatives": st.none() | st.lists(text_field.map(lambda text: text.replace("|", "/")), max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
    # Folded more coarsely than the reader folds: no two rows are duplicates or share an id.
    unique_by=(lambda row: letters(row["question"]), lambda row: (row["prompt_id"] or "").strip() or row["question"]),
)


@given(rows=rows_of_a_set)
@settings(deadline=None)
def test_rows_written_in_any_format_read_back_equal(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = {suffix: read(Path(folder), encode(rows, suffix), f"set{suffix}") for suffix in FORMATS}
    expected = [
        {
            **{name: row[name].strip() for name in ("category", "question", "target")},
            **{name: (row[name] or "").strip() or None for name in ("source", "style")},
            "alternatives": tuple(text.strip() for text in row["alternatives"] or [] if text.strip()),
        }
        for row in rows
    ]
    for result in sets.values():
        assert result.rejections == ()
        assert [{name: getattr(p, name) for name in expected[0]} for p in result.prompts] == expected
        assert result.prompts == sets[".jsonl"].prompts, "ids and hashes included"


def test_surrounding_white_space_of_fields_and_header_is_stripped(tmp_path: Path) -> None:
    header = b" prompt_id, category ,question,\ttarget,alternatives\r\n"
    row = b" a ,facts ,  Capital of France? , Paris\t, Lyon | |Nice \r\n"
    (prompt,) = read(tmp_path, header + row, "set.csv").prompts
    assert (prompt.prompt_id, prompt.category, prompt.question) == ("a", "facts", "Capital of France?")
    assert (prompt.target, prompt.alternatives) == ("Paris", ("Lyon", "Nice"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_unknown_columns_are_ignored(tmp_path: Path, suffix: str) -> None:
    plain = read(tmp_path, encode([GOOD], suffix), f"a{suffix}")
    wider = read(tmp_path, encode([{"note": "x", **GOOD, "score": 0.5}], suffix), f"b{suffix}")
    assert wider.prompts == plain.prompts


def test_csv_columns_without_a_name_are_ignored_however_many(tmp_path: Path) -> None:
    """Spreadsheets write them for columns that were once in use."""
    (prompt,) = read(tmp_path, b"category,question,target,, \nfacts,Capital?,Paris,,x\n", "set.csv").prompts
    assert prompt.target == "Paris"


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.string()], ids=str)
def test_parquet_alternatives_may_be_lists_or_joined_by_bars(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["Lyon|Nice", None] if kind == pa.string() else [["Lyon", "Nice"], None]
    rows = {name: [GOOD[name], OTHER[name]] for name in GOOD}
    result = read(tmp_path, parquet({**rows, "alternatives": pa.array(values, kind)}), "set.parquet")
    assert [p.alternatives for p in result.prompts] == [("Lyon", "Nice"), ()]


def test_parquet_text_may_be_dictionary_encoded_or_all_null(tmp_path: Path) -> None:
    table = {**{k: pa.array([v]).dictionary_encode() for k, v in GOOD.items()}, "source": pa.nulls(1)}
    (prompt,) = read(tmp_path, parquet(table), "set.parquet").prompts
    assert prompt.target == "Paris"
    assert prompt.source is None


def test_parquet_in_a_folder_named_like_a_partition_gets_no_column_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "category=wrong"
    folder.mkdir()
    (prompt,) = read(folder, encode([GOOD], ".parquet"), "set.parquet").prompts
    assert prompt.category == "facts"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_utf8_mark_at_the_start_is_accepted(tmp_path: Path, suffix: str) -> None:
    result = read(tmp_path, b"\xef\xbb\xbf" + encode([GOOD], suffix), f"set{suffix}")
    assert result.prompts[0].category == "facts"


def test_unicode_line_separators_do_not_end_a_jsonl_line(tmp_path: Path) -> None:
    row = {**GOOD, "question": "Capital\u2028of\u0085France\x0b?"}
    assert read(tmp_path, jsonl([row])).prompts[0].question == row["question"]


def test_line_end_inside_csv_quotes_is_kept_as_written(tmp_path: Path) -> None:
    data = b'category,question,target\nfacts,"Capital\r\nof ""France""?",Paris\n'
    assert read(tmp_path, data, "set.csv").prompts[0].question == 'Capital\r\nof "France"?'


def test_row_hash_changes_with_every_field_and_not_with_the_format_of_the_file(tmp_path: Path) -> None:
    full = {**GOOD, "prompt_id": "a", "source": "s", "style": "t", "alternatives": ["Lyon"]}
    changes: list[Row] = [{}, *({name: "other"} for name in full if name != "alternatives"), {"alternatives": ["Nice"]}]
    hashes = [read(tmp_path, jsonl([{**full, **change}])).prompts[0].row_hash for change in changes]
    assert len(set(hashes)) == len(changes)
    reordered = dict(reversed(full.items()))
    for suffix in FORMATS:
        assert read(tmp_path, encode([reordered], suffix), f"set{suffix}").prompts[0].row_hash == hashes[0]


def test_row_hash_is_pinned() -> None:
    """A stored run is matched to its prompts by this hash: another canonical form would orphan every run."""
    with tempfile.TemporaryDirectory() as folder:
        (prompt,) = read(Path(folder), jsonl([{**GOOD, "prompt_id": "a", "style": "é"}])).prompts
    canonical = (
        '{"alternatives":[],"category":"facts","prompt_id":"a","question":"What is the capital of France?",'
        '"source":null,"style":"é","target":"Paris"}'
    )
    assert prompt.row_hash == hashlib.sha256(canonical.encode()).hexdigest()


# Row numbers


def test_row_numbers_are_lines_in_jsonl_blank_ones_counted(tmp_path: Path) -> None:
    lines = [b"", GOOD_LINE, b"  \t", json.dumps({**GOOD, "target": "R2"}).encode(), b"", GOOD_LINE, b"", b""]
    result = read(tmp_path, b"\r\n".join(lines))
    assert [(r.row, r.rule) for r in result.rejections] == [(4, "target_not_alphabetic"), (6, "duplicate")]
    assert result.rejections[1].detail == "the same question and target as row 2"


def test_row_numbers_are_records_in_csv_header_and_blank_lines_not_counted(tmp_path: Path) -> None:
    data = b'\ncategory,question,target\nfacts,"Two\nlines?",Paris\n\n  \nfacts,Capital?,R2\nfacts,Capital?,\n'
    result = read(tmp_path, data, "set.csv")
    assert [r.row for r in result.rejections] == [2, 3]


def test_row_numbers_are_rows_in_parquet_across_row_groups(tmp_path: Path) -> None:
    rows = [{**GOOD, "question": f"Question {i}?", "target": "Paris" if i != 5 else "R2"} for i in range(1, 8)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=2)
    result = read(tmp_path, out.getvalue(), "set.parquet")
    assert [r.row for r in result.rejections] == [5]
    assert len(result.prompts) == 6


# Rules


RULES = {
    "empty_field": [
        *({name: value} for name in ("category", "question", "target") for value in ("", "  ", "\t\n", "\u3000", None)),
    ],
    "target_not_alphabetic": [
        {"target": target}
        for target in (
            "x",
            "R2",
            "New York",
            "rock'n'roll",
            "up-to-date",
            "Paris.",
            "Par\u200bis",
            "٣٤",
            "☃☃",
            "\ufe7e\ufe7e",
        )
    ],
    "target_in_question": [
        {"question": "Is Paris in France?"},
        {"question": "PARIS is where?"},
        {"question": "Where (paris)?"},
        {"question": "the_paris_of the east"},
        {"question": "Ｐａｒｉｓ in full width"},
        {"question": "Paris's river"},
        {"question": "the cafe\u0301 next door", "target": "Café"},
        {"question": "a STRASSE in Berlin", "target": "straße"},
    ],
    "target_hidden": [
        {"question": "Two parishes?"},
        {"question": "A pair: p-a-r-i-s"},
        {"question": "A spa risen from the sea"},
        {"question": "Comparison of towns"},
        {"question": "Par1is with a digit inside"},
        {"question": "Par\u00adis, softly hyphenated"},
        {"question": "a spacetime diagram", "target": "space"},
    ],
}


@pytest.mark.parametrize(("rule", "change"), [(rule, change) for rule, changes in RULES.items() for change in changes])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_row_that_breaks_a_rule_is_listed_and_reading_goes_on(
    tmp_path: Path, rule: str, change: Row, suffix: str
) -> None:
    result = read(tmp_path, encode([OTHER, {**GOOD, **change}, GOOD], suffix), f"set{suffix}")
    assert [p.target for p in result.prompts] == ["worm", "Paris"]
    (rejection,) = result.rejections
    assert (rejection.row, rejection.rule) == (2, rule)
    assert rejection.detail.isprintable(), "one line"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"category": "0"}, id="a category of one digit is not empty"),
        pytest.param({"question": "?"}, id="a question of one sign is not empty"),
        pytest.param({"source": " ", "style": None, "prompt_id": ""}, id="optional fields may be empty"),
        pytest.param({"target": "ox"}, id="two letters are enough"),
        pytest.param({"target": "naïve"}, id="letters beyond ASCII are letters"),
        pytest.param({"target": "cafe\u0301"}, id="an accent typed apart is part of its letter"),
        pytest.param({"target": "水曜日"}, id="letters need no case"),
        pytest.param({"question": "Is Par is a word?", "target": "parish"}, id="part of the target may stand there"),
        pytest.param({"question": "pariah's town"}, id="a word with the same start may stand there"),
        pytest.param({"question": "sirap backwards"}, id="letters in another order hide nothing"),
        pytest.param({"question": "The resume is", "target": "résumé"}, id="an accent makes another letter"),
    ],
)
def test_row_next_to_a_rule_passes(tmp_path: Path, change: Row) -> None:
    result = read(tmp_path, jsonl([OTHER, {**GOOD, **change}]))
    assert result.rejections == ()
    assert len(result.prompts) == 2


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"category": "other", "prompt_id": "z", "source": "s"},
        {"target": "PARIS"},
        {"question": "what is  the\tcapital\nof FRANCE?"},
        {"question": "Ｗhat is the capital of\u00a0France?"},
    ],
)
def test_same_question_and_target_is_a_duplicate_however_it_is_typed(tmp_path: Path, change: Row) -> None:
    result = read(tmp_path, jsonl([OTHER, GOOD, {**GOOD, **change}]))
    assert [p.target for p in result.prompts] == ["worm", "Paris"], "the first of the two is kept"
    (rejection,) = result.rejections
    assert (rejection.row, rejection.rule) == (3, "duplicate")
    assert "row 2" in rejection.detail


def test_same_question_with_another_target_or_in_other_words_is_no_duplicate(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "target": "Lutetia"}, {**GOOD, "question": "What is the capital of France"}]
    assert read(tmp_path, jsonl(rows)).rejections == ()


def test_row_equal_to_a_refused_row_is_no_duplicate(tmp_path: Path) -> None:
    result = read(tmp_path, jsonl([{**GOOD, "category": ""}, GOOD]))
    assert [r.rule for r in result.rejections] == ["empty_field"]
    assert len(result.prompts) == 1


# Errors

HEADER = b"category,question,target\n"
BROKEN = {
    "missing field in a JSON line": (
        ".jsonl",
        GOOD_LINE + b'\n\n{"category": "a", "question": "b", "Target": "cd"}\n',
        ["line 3", "missing field 'target'", "'category', 'question', 'Target'", "rename 'Target' to 'target'"],
    ),
    "missing column, another name nearby": (
        ".csv",
        b"category,question,word\na,b,cd\n",
        ["header (line 1)", "missing column 'target'", "'category', 'question', 'word'", "rename 'word' to 'target'"],
    ),
    "two missing columns, each with its likest name": (
        ".csv",
        b"Target,category,Questions\na,b,cd\n",
        ["missing column 'question', 'target'", "rename 'Questions' to 'question'", "rename 'Target' to 'target'"],
    ),
    "missing columns, typed in capitals": (
        ".csv",
        b"CATEGORY,question,TARGET,tar\na,b,cd,e\n",
        ["missing column 'category', 'target'", "rename 'CATEGORY' to 'category', rename 'TARGET' to 'target'"],
    ),
    "missing column, no name left to guess": (".csv", b"category,question\na,b\n", ["'target'", "add 'target'"]),
    "missing Parquet column": (
        ".parquet",
        parquet({**{k: [v] for k, v in OTHER.items() if k != "question"}, "prompt": ["a"]}),
        ["missing column 'question'", "rename 'prompt' to 'question'"],
    ),
    "semicolons for commas": (".csv", b"category;question;target\na;b;cd\n", ["missing column", "put commas"]),
    "JSON cut off at the end of the file": (
        ".jsonl",
        GOOD_LINE + b"\n" + GOOD_LINE[:-9],
        ["line 2, column 78", "not valid JSON", "cut short"],
    ),
    "JSON broken in the middle": (
        ".jsonl",
        GOOD_LINE[:-1] + b",}\n" + GOOD_LINE,
        ["line 1, column 87", "not valid JSON"],
    ),
    "JSON array over many lines": (".jsonl", b"[\n" + GOOD_LINE + b"\n]\n", ["line 1", "one JSON object a line"]),
    "JSON list": (".jsonl", GOOD_LINE + b'\n["a", "b"]\n', ["line 2", "expected a JSON object", "a list"]),
    "JSON text": (".jsonl", b'"Paris"\n', ["line 1", "expected a JSON object", "the text 'Paris'"]),
    "JSON null": (".ndjson", b"null\n", ["line 1", "expected a JSON object", "null"]),
    "JSON number of 5,000 digits": (".jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", ["line 1", "cannot be read"]),
    "JSON nested without end": (".jsonl", b"[" * 100_000 + b"\n", ["line 1", "cannot be read"]),
    "JSON key given twice": (
        ".jsonl",
        GOOD_LINE + b"\n" + GOOD_LINE[:-1] + b', "target": "Lyon"}\n',
        ["line 2", "'target' occurs twice"],
    ),
    "half of a surrogate pair": (
        ".jsonl",
        b'{"category": "a", "question": "b\\ud800", "target": "cd"}\n',
        ["line 1", "'question'", "surrogate"],
    ),
    "NUL byte in JSONL": (".jsonl", GOOD_LINE + b"\n\0\n", ["line 2, byte 87", "NUL"]),
    "NUL byte in CSV": (".csv", HEADER + b"a,b\0,cd\n", ["line 2, byte 28", "NUL"]),
    "Latin-1": (".jsonl", GOOD_LINE + "\n{'é'}\n".encode("latin-1"), ["line 2, byte 89", "UTF-8", "0xe9"]),
    "Latin-1 behind a UTF-8 mark": (".csv", b"\xef\xbb\xbf" + HEADER + b"\xe9", ["line 2, byte 28", "UTF-8", "0xe9"]),
    "UTF-8 cut inside a letter": (".csv", HEADER + "a,b,é".encode()[:-1], ["line 2, byte 29", "UTF-8"]),
    "UTF-16, little end first": (".jsonl", b"\xff\xfe" + GOOD_LINE.decode().encode("utf-16-le"), ["byte 0", "UTF-16"]),
    "UTF-16, big end first": (".csv", b"\xfe\xff" + HEADER.decode().encode("utf-16-be"), ["byte 0", "UTF-16"]),
    "UTF-32": (".jsonl", GOOD_LINE.decode().encode("utf-32"), ["byte 0", "UTF-32"]),
    "UTF-16 without its mark": (".csv", HEADER.decode().encode("utf-16-le"), ["line 1, byte 1", "NUL", "UTF-16"]),
    "CSV row with a cell too few": (
        ".csv",
        HEADER + b"a,b,cd\n\na,b\n",
        ["row 2 (line 4)", "2 cells", "header of 3", "field 'target'", "an empty cell"],
    ),
    "CSV row with a cell too many": (
        ".csv",
        HEADER + b"a,b, but c,cd\n",
        ["row 1 (line 2)", "4 cells", "header of 3", "'cd'", "quotes"],
    ),
    "CSV header with a name twice": (
        ".csv",
        b"category,question,target,Note, target\n",
        ["header (line 1)", "'target' occurs twice"],
    ),
    "CSV header with an unknown name twice": (
        ".csv",
        b"category,question,target,x,x\n",
        ["header", "'x' occurs twice"],
    ),
    "CSV quote never closed": (
        ".csv",
        HEADER + b'a,"b\nb",cd\na,"b,cd\n' + b"a,b,cd\n" * 3,
        ["row 2 (line 4)", "not valid CSV", "close every quote"],
    ),
    "CSV quote never closed, to the limit of a cell": (
        ".csv",
        HEADER + b'a,"b,cd\n' + b"a,b,cd\n" * 30_000,
        ["row 1 (line 2)", "close every quote"],
    ),
    "CSV quote never closed in the header": (
        ".csv",
        b'category,"question,target\n',
        ["header (line 1)", "close every quote"],
    ),
    "CSV text behind a closing quote": (".csv", HEADER + b'a,"b"c,cd\n', ["row 1 (line 2)", "not valid CSV"]),
    "Parquet cut short": (".parquet", encode([GOOD], ".parquet")[:-20], ["not a whole Parquet file"]),
    "text named Parquet": (".parquet", GOOD_LINE, ["not a whole Parquet file"]),
    "Parquet column of numbers": (
        ".parquet",
        encode([{**GOOD, "target": 3}], ".parquet"),
        ["'target'", "column of text", "int64"],
    ),
    "Parquet column of bytes": (
        ".parquet",
        encode([{**GOOD, "source": b"a"}], ".parquet"),
        ["'source'", "column of text", "binary"],
    ),
    "Parquet alternatives of numbers": (
        ".parquet",
        encode([{**GOOD, "alternatives": [1]}], ".parquet"),
        ["'alternatives'", "int64"],
    ),
    "Parquet list for text": (".parquet", encode([{**GOOD, "style": ["a"]}], ".parquet"), ["'style'", "list"]),
    "Parquet name twice": (
        ".parquet",
        parquet(pa.table([["a"]] * 4, ["category", "question", "target", "target"])),
        ["'target' occurs twice"],
    ),
    "Parquet text that is not UTF-8": (
        ".parquet",
        parquet(
            {"category": ["a", "b"], "question": pa.array([b"a", b"b\xe9"]).view(pa.string()), "target": ["cd", "ef"]}
        ),
        ["row 2", "'question'", "not UTF-8"],
    ),
    "JSONL of no bytes": (".jsonl", b"", ["the file is empty"]),
    "CSV of no bytes": (".csv", b"", ["the file is empty"]),
    "Parquet of no bytes": (".parquet", b"", ["the file is empty"]),
    "JSONL of blank lines": (".jsonl", b"\n  \n\n", ["no row"]),
    "JSONL of a mark alone": (".jsonl", b"\xef\xbb\xbf", ["no row"]),
    "CSV of a header": (".csv", HEADER, ["no row"]),
    "CSV of blank lines": (".csv", b"\n\n", ["no row"]),
    "Parquet without rows": (".parquet", parquet({name: pa.array([], pa.string()) for name in GOOD}), ["no row"]),
    "unknown format": (".txt", GOOD_LINE, ["'.txt'", ".jsonl", ".ndjson", ".csv", ".parquet"]),
    "compressed file": (".jsonl.gz", GOOD_LINE, ["'.gz'", ".jsonl"]),
    "no suffix": ("", GOOD_LINE, ["unknown format", ".jsonl"]),
}


@pytest.mark.parametrize(("suffix", "data", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_one_line_with_file_place_and_field(
    tmp_path: Path, suffix: str, data: bytes, said: list[str]
) -> None:
    message = refusal(tmp_path, data, f"set{suffix}")
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        (".jsonl", {"question": 42}, "line 2, field 'question': expected text, found the number 42"),
        (".jsonl", {"prompt_id": 7}, "line 2, field 'prompt_id': expected text, found the number 7"),
        (".jsonl", {"source": False}, "line 2, field 'source': expected text, found the truth value false"),
        (".jsonl", {"target": {"a": "b"}}, "line 2, field 'target': expected text, found an object"),
        (".jsonl", {"category": ["a"]}, "line 2, field 'category': expected text, found a list"),
        (".jsonl", {"style": float("nan")}, "line 2, field 'style': expected text, found the number nan"),
        (".jsonl", {"alternatives": "a|b"}, "line 2, field 'alternatives': expected a list of texts, found the text"),
        (".jsonl", {"alternatives": ["a", 2]}, "line 2, field 'alternatives', element 2: expected text, found the num"),
        (".jsonl", {"alternatives": [None]}, "line 2, field 'alternatives', element 1: expected text, found null"),
        (
            ".parquet",
            {"alternatives": ["a", None]},
            "row 2, field 'alternatives', element 2: expected text, found null",
        ),
        (".jsonl", {"question": "a\0b"}, "line 2, field 'question': a NUL"),
        (".parquet", {"question": "a\0b"}, "row 2, field 'question': a NUL"),
    ],
)
def test_field_that_is_not_text_is_named_with_what_was_found(
    tmp_path: Path, suffix: str, change: Row, said: str
) -> None:
    assert said in refusal(tmp_path, encode([OTHER, {**GOOD, **change}], suffix), f"set{suffix}")


@pytest.mark.parametrize("suffix", FORMATS)
def test_prompt_id_given_twice_names_both_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{**GOOD, "prompt_id": "a"}, {**OTHER, "prompt_id": "b"}, {**OTHER, "question": "Bait?", "prompt_id": " a"}]
    message = refusal(tmp_path, encode(rows, suffix), f"set{suffix}")
    first, second = {".csv": ("row 1", "row 3"), ".parquet": ("row 1", "row 3")}.get(suffix, ("line 1", "line 3"))
    assert all(part in message for part in (first, second, "'prompt_id'", "'a'"))


def test_prompt_id_equal_to_the_default_of_another_row_is_an_error(tmp_path: Path) -> None:
    default = read(tmp_path, jsonl([GOOD])).prompts[0].prompt_id
    message = refusal(tmp_path, jsonl([{**OTHER, "prompt_id": default}, GOOD]), "set.jsonl")
    assert all(part in message for part in ("line 1", "line 2", default))


def test_prompt_id_of_a_refused_row_may_be_given_again(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt_id": "a", "target": "R2"}, {**GOOD, "prompt_id": "a"}, {**GOOD, "prompt_id": "a"}]
    result = read(tmp_path, jsonl(rows))
    assert [p.prompt_id for p in result.prompts] == ["a"]
    assert [r.rule for r in result.rejections] == ["target_not_alphabetic", "duplicate"]


def test_file_in_which_no_row_passes_counts_the_rules_and_shows_the_first_row(tmp_path: Path) -> None:
    rows = [{**GOOD, "target": "R2"}, {**GOOD, "target": ""}, {**GOOD, "target": "C3"}]
    message = refusal(tmp_path, b"\n" + jsonl(rows), "set.jsonl")
    said = ["none of the 3 rows", "target_not_alphabetic 2", "empty_field 1", "row 2", "'R2'"]
    assert [part for part in said if part not in message] == []


def test_missing_file_folder_and_file_name_with_line_ends_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in {"none.jsonl": "no such file", "folder.jsonl": "a folder", "a\nb.jsonl": "a b.jsonl"}.items():
        with pytest.raises(PromptFileError) as caught:
            read_prompts(tmp_path / name)
        message = str(caught.value)
        assert message.isprintable()
        assert said in message
        assert ".parquet" in message, "names what is expected"


def test_long_values_and_many_columns_do_not_flood_the_message(tmp_path: Path) -> None:
    wide = ",".join(f"column_{i}" for i in range(1000)).encode()
    long = jsonl([{**GOOD, "prompt_id": "a" * 100_000}, {**OTHER, "prompt_id": "a" * 100_000}])
    huge = jsonl([{**GOOD, "target": 10**4000}])
    for data, suffix in [(wide, ".csv"), (long, ".jsonl"), (huge, ".jsonl")]:
        assert len(refusal(tmp_path, data, f"set{suffix}")) < 1000 + len(str(tmp_path))


def test_parquet_page_that_fails_its_checksum_is_not_read(tmp_path: Path) -> None:
    """Without the check, one changed byte in stored text is another question, and nobody is told."""
    out = io.BytesIO()
    table = pa.table({name: [value] for name, value in GOOD.items()})
    pq.write_table(
        table, out, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    assert len(read(tmp_path, out.getvalue(), "set.parquet").prompts) == 1
    assert "not a whole" in refusal(tmp_path, out.getvalue().replace(b"the capital", b"the Capital"), "set.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@given(data=st.data())
@settings(deadline=None)
def test_damaged_file_is_read_or_refused_in_one_line(suffix: str, data: st.DataObject) -> None:
    rows = [{**GOOD, "alternatives": ["Lyon"]}, {**OTHER, "alternatives": ["bug", "grub"]}]
    damaged = bytearray(encode(rows, suffix))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged)) | st.just(len(damaged))) :]
    with tempfile.TemporaryDirectory() as folder:
        try:
            read(Path(folder), bytes(damaged), f"set{suffix}")
            message = ""
        except PromptFileError as e:
            message = str(e)
    assert message.isprintable()


# Letters and samples


def test_letters_folds_case_width_and_ligatures_and_drops_the_rest() -> None:
    assert letters("Ｓpace-Ｔime, 2 ﬁne cafés!") == "spacetimefinecafés"
    assert letters("cafe\u0301") == letters("CAFÉ") == "café"
    assert letters("Straße") == "strasse"
    assert letters(" 12_\u200b") == ""


PROMPT = Prompt("id", "a", "q", "target", None, None, (), "hash")
CATEGORIES = st.text("abcd", max_size=20)  # a letter a prompt


def prompts_of(categories: str) -> list[Prompt]:
    return [replace(PROMPT, prompt_id=str(i), category=name) for i, name in enumerate(categories)]


@given(categories=CATEGORIES, limit=st.integers(0, 25))
def test_take_keeps_file_order_and_shares_the_limit_among_the_categories(categories: str, limit: int) -> None:
    prompts = prompts_of(categories)
    taken = take(prompts, limit)
    assert len(taken) == min(limit, len(prompts))
    assert list(taken) == [p for p in prompts if p in taken], "file order, none twice"
    held, got = Counter(p.category for p in prompts), Counter(p.category for p in taken)
    for name, count in got.items():
        assert [p for p in taken if p.category == name] == [p for p in prompts if p.category == name][:count]
    for name in held:
        # A category has fewer than another by more than one only when it has no more to give.
        assert got[name] == held[name] or got[name] >= max(got.values(), default=0) - 1
    assert set(take(prompts, max(limit - 1, 0))) <= set(taken), "a smaller sample is part of a larger one"


@given(categories=CATEGORIES)
def test_take_without_a_limit_or_with_a_large_one_keeps_all(categories: str) -> None:
    prompts = prompts_of(categories)
    assert take(prompts, None) == take(prompts, len(prompts)) == take(prompts, len(prompts) + 3) == tuple(prompts)


def test_take_starts_with_the_category_that_appears_first() -> None:
    prompts = prompts_of("bbabc")
    assert [p.prompt_id for p in take(prompts, 2)] == ["0", "2"]
    assert [p.prompt_id for p in take(prompts, 4)] == ["0", "1", "2", "4"]


def test_reading_prompts_imports_neither_torch_nor_transformers() -> None:
    check = "import sys, harness.text.prompts; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
