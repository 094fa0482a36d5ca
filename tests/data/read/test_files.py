"""Files: content decides how one is read, rows keep their lines, damage stays where it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qwen_ds.data.read import files, files_tables, files_text
from qwen_ds.data.read.files import BadRow, SourceRow, read_rows
from qwen_ds.data.read.files_encoding import encoding_of
from qwen_ds.data.read.limits import FileOptions
from qwen_ds.errors import UserError

ROWS = [
    {"q": "一加一？", "a": '二 {"}["'},
    {"q": "a\nb\\", "a": "\u2028 }{ ]"},
    {"q": "末", "a": {"b": [1, {"c": "]"}]}},
]
TEXTS = [
    {"q": "一加一？", "a": "二"},
    {"q": 'two, "lines"\nof it', "a": "三;四"},
    {"q": "", "a": "五"},
]


def dumped(row: object, indent: int | None = None) -> str:
    return json.dumps(row, ensure_ascii=False, indent=indent)


ARRANGEMENTS: dict[str, tuple[str, list[int]]] = {
    "lines": ("\n".join(dumped(row) for row in ROWS), [1, 2, 3]),
    "lines with blanks": ("\n" + "\r\n\n".join(dumped(row) for row in ROWS) + "\n\n", [2, 4, 6]),
    "several on a line": ("{}\n{}{}\n".format(*map(dumped, ROWS)), [1, 2, 2]),
    "array on one line": (dumped(ROWS), [1, 1, 1]),
    "array, a row a line": ("[\n" + ",\n".join(dumped(row) for row in ROWS) + "\n]\n", [2, 3, 4]),
    "array, indented": (dumped(ROWS, 2), [2, 6, 10]),
    "objects": ("\n".join(dumped(row, 1) for row in ROWS), [1, 5, 9]),
    "objects, a key beside the brace": (
        "\n".join(dumped(row, 1).replace("{\n ", "{") for row in ROWS),
        [1, 4, 7],
    ),
    "objects, closed and opened on a line": ("".join(dumped(row, 0) for row in ROWS), [1, 4, 7]),
}


def saved(folder: Path, content: str | bytes) -> Path:
    path = folder / "name.says.nothing"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_in(path: Path) -> list[object]:
    found = list(read_rows(path))
    assert all(isinstance(row, SourceRow) for row in found), found
    return [row.row for row in found if isinstance(row, SourceRow)]


def lines_in(path: Path) -> list[int]:
    return [int(row.source.removeprefix(f"{path}:")) for row in read_rows(path)]


def verdicts(path: Path) -> list[tuple[int, bool]]:
    """The line of every row, and whether it can be read."""
    return list(
        zip(lines_in(path), (isinstance(r, SourceRow) for r in read_rows(path)), strict=True)
    )


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_arrangement_of_json_is_found_by_content(
    arrangement: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_text, "_CHUNK_BYTES", chunk)
    text, lines = ARRANGEMENTS[arrangement]
    path = saved(tmp_path, text)
    assert rows_in(path) == ROWS
    assert lines_in(path) == lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("arrangement", ["lines", "array, indented", "objects"])
def test_text_is_utf8_with_or_without_mark_or_gb18030(
    arrangement: str, encoding: str, tmp_path: Path
) -> None:
    assert rows_in(saved(tmp_path, ARRANGEMENTS[arrangement][0].encode(encoding))) == ROWS


ASIAN = {
    "big5": "請翻譯成英文，謝謝您的幫忙",
    "euc_kr": "다음 문장을 영어로 번역하세요",
    "shift_jis": "日本語を英語に翻訳してください",
    "utf-16": "把下面的话翻译成英文",
}
LAID_OUT = {
    "lines": lambda rows: "".join(dumped(row) + "\n" for row in rows),
    "array": dumped,
    "objects": lambda rows: "\n".join(dumped(row, 1) for row in rows),
    "csv": lambda rows: "q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in rows),
    "tsv": lambda rows: "q\ta\n" + "".join(f"{row['q']}\t{row['a']}\n" for row in rows),
}


def zip_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner.txt", data)
    return out.getvalue()


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zip_of])
@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("encoding", ASIAN)
def test_every_reader_takes_the_encoding_that_is_named_and_tells_it(
    encoding: str, layout: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    rows = [{"q": ASIAN[encoding], "a": "x"}, {"q": "y", "a": ASIAN[encoding]}]
    path = saved(tmp_path, packed(LAID_OUT[layout](rows).encode(encoding)))
    told: dict[str, str] = {}
    options = FileOptions(encoding, on_encoding=told.__setitem__)
    assert [row.row for row in read_rows(path, options) if isinstance(row, SourceRow)] == rows
    assert told == {f"{path}:inner.txt" if packed is zip_of else str(path): encoding}


def test_one_damaged_byte_does_not_turn_utf8_into_other_characters(tmp_path: Path) -> None:
    good = dumped({"q": "问题", "a": "这是一个完整的回答。"}).encode()
    # Three bytes that GB18030 would take with what follows.
    damaged = good.replace("完".encode(), b"\xc5\xea\x8c")
    assert encoding_of(good, "f", True) == "utf-8"
    assert encoding_of(good + b"\n" + damaged, "f", True) == "utf-8"
    path = saved(tmp_path, good + b"\n" + damaged + b"\n" + good)
    first, second, third = read_rows(path)
    assert isinstance(first, SourceRow) and isinstance(third, SourceRow)
    assert isinstance(second, BadRow)
    assert second.source == f"{path}:2" and second.reason == "not UTF-8 text"


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("arrangement", ["objects", "array, indented"])
def test_a_damaged_byte_inside_a_longer_object_is_told_and_never_left_out(
    arrangement: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_text, "_CHUNK_BYTES", chunk)
    text = ARRANGEMENTS[arrangement][0]
    path = saved(tmp_path, text.encode().replace("加".encode(), b"\xff"))
    if arrangement == "objects":
        bad, *rest = read_rows(path)
        assert isinstance(bad, BadRow) and bad.source == f"{path}:2"
        assert [row.row for row in rest if isinstance(row, SourceRow)] == ROWS[1:]
    else:
        with pytest.raises(UserError, match=":3: byte 0xff is not UTF-8"):
            list(read_rows(path))


def test_a_head_that_ends_inside_a_character_is_still_utf8() -> None:
    assert encoding_of("中".encode()[:2], "f", is_whole=False) == "utf-8"


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_csv_with_any_usual_delimiter_and_quoting(
    delimiter: str, encoding: str, tmp_path: Path
) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["q", "a"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TEXTS)
    path = saved(tmp_path, text.getvalue().encode(encoding))
    assert rows_in(path) == TEXTS
    assert lines_in(path) == [2, 3, 5]


def test_a_csv_row_of_another_width_or_with_a_stray_quote_is_bad_alone(tmp_path: Path) -> None:
    text = b', q,a \r\n0,one,1\r\n1,two\r\n2,"x"y,3\r\n3,\xff,3\r\n\r\n4,four,4\r\n'
    path = saved(tmp_path, text)
    assert lines_in(path) == [2, 3, 4, 5, 7]
    first, *bad, last = read_rows(path)
    reasons = ["wrong number of cells", "not valid CSV", "not UTF-8 text"]
    assert [row.reason for row in bad if isinstance(row, BadRow)] == reasons
    # The unnamed index column is no key.
    assert first == SourceRow({"q": "one", "a": "1"}, f"{path}:2") and isinstance(last, SourceRow)


def test_columns_of_one_name_are_one_where_they_agree(tmp_path: Path) -> None:
    path = saved(tmp_path, "q,a,a,\n1,x,x,0\n2,,y,0\n3,x,y,0\n4,,,0\n")
    said: list[object] = ["x", "y", ("x", "y"), ""]
    assert rows_in(path) == [{"q": str(at), "a": a} for at, a in enumerate(said, 1)]


def test_parquet_rows_are_numbered_from_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_tables, "_ROWS_AT_ONCE", 2)
    path = tmp_path / "rows.json"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS), path)
    assert rows_in(path) == TEXTS
    assert [row.source for row in read_rows(path)] == [f"{path}#{index}" for index in range(3)]


@pytest.mark.parametrize("inside", ["lines", "parquet"])
def test_gzip_is_seen_through(inside: str, tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "packed.json"
    if inside == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS), plain)
    else:
        plain.write_text("\n".join(map(dumped, TEXTS)), encoding="utf-8")
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert rows_in(path) == TEXTS


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_give_their_data_files_by_name(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    members = {
        "./d/b.json": dumped(ROWS[1], 1),
        "./d/a.json": dumped(ROWS[0]),
        "d/._a.json": "x",
        "README.md": "# x",
    }
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    assert rows_in(path) == ROWS[:2]
    sources = [row.source for row in read_rows(path)]
    assert sources == [f"{path}:./d/a.json:1", f"{path}:./d/b.json:1"]


def test_an_archive_inside_an_archive_is_refused(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.tar", tmp_path / "outer.tar"
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    for archive, name in ((inner, "a.json"), (outer, "inner.tar")):
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / name, name)
    with pytest.raises(UserError, match="outer.tar:inner.tar: a tar archive inside an archive"):
        list(read_rows(outer))


def test_a_broken_line_is_bad_alone(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"q": "\\d"}\n{"q": 1}\n{"q": "cut\n{"q": 2\n{"q": 3}\n')
    assert verdicts(path) == [(1, False), (2, True), (3, False), (4, False), (5, True)]
    detail = "not valid JSON: Invalid \\escape at character 8; expected one JSON object"
    assert next(read_rows(path)) == BadRow(f"{path}:1", "not valid JSON", detail)


@pytest.mark.parametrize(
    "first", ['{"q": {"cut": ["}\n', '{"q": "]}{"}\n', '"q": 1}\n', '{"q": "\\"{"}\n']
)
def test_the_first_line_decides_by_what_it_leaves_open(first: str, tmp_path: Path) -> None:
    path = saved(tmp_path, first + '{"q": 2}\n{"q": 3}\n')
    assert verdicts(path) == [(1, first.startswith('{"q": "')), (2, True), (3, True)]


def test_a_row_in_another_encoding_than_its_gb18030_file_is_bad(tmp_path: Path) -> None:
    good = dumped({"q": "问题", "a": "这是一个完整的回答。"}).encode("gb18030")
    path = saved(tmp_path, good + b'\n{"q": "\xff"}\n')
    first, second = read_rows(path)
    assert first == SourceRow({"q": "问题", "a": "这是一个完整的回答。"}, f"{path}:1")
    assert isinstance(second, BadRow)
    assert second.detail == "byte 0xff is not GB18030; expected text in one encoding"


def test_nesting_without_end_is_a_bad_row(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"q": 1}\n{"q": ' + "[" * 100_000 + "\n" + '{"q": 2}\n')
    assert verdicts(path) == [(1, True), (2, False), (3, True)]


def test_an_indented_object_that_is_never_closed_ends_at_the_next(tmp_path: Path) -> None:
    row = '  {\n    "q":\n    {\n    }\n  }\n'
    path = saved(tmp_path, row + '  {\n    "q":\n    {\n    }\n' + row)
    assert verdicts(path) == [(1, True), (6, False), (10, True)]


def test_a_comma_missing_inside_an_object_costs_that_object_only(tmp_path: Path) -> None:
    path = saved(tmp_path, '{\n "q": [\n  {\n  }\n  {\n  }\n ]\n}\n{\n "q": 2\n}\n')
    assert verdicts(path) == [(1, False), (9, True)]


def test_a_number_that_arrives_in_two_parts_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_text, "_CHUNK_BYTES", 2)
    assert rows_in(saved(tmp_path, "[123, 4567]")) == [123, 4567]


def test_an_object_that_is_never_closed_does_not_take_the_file_with_it(tmp_path: Path) -> None:
    path = saved(tmp_path, '{\n "q": [1\n{\n "q": 2\n}\n{\n "q": \\\n}\n{\n "q": 4\n')
    assert verdicts(path) == [(1, False), (3, True), (6, False), (9, False)]


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_broken_element_of_an_array_is_bad_alone(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_text, "_CHUNK_BYTES", chunk)
    path = saved(tmp_path, '[{"q": 1},\n{"q": "\\d}", "r": [[]]},\n{"q": 3}]')
    first, second, third = read_rows(path)
    assert isinstance(first, SourceRow) and third == SourceRow({"q": 3}, f"{path}:3")
    assert isinstance(second, BadRow) and second.source == f"{path}:2"
    assert "at character 8" in second.detail, "counted from the element's beginning"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"q": 1},\n{"q": 2', ":2: .*what follows"),
        ('[{"q": 1}\n{"q": 2}]', ":2: .*expected ',' or ']'"),
        ('[{"q": 1}]\n{"q": 2}', ":2: .*after the end"),
        ('[{"q": 1}\n', ":2: the end of the file inside"),
        ('[{"q": "a},\n{"q": "b"}]', ":1: .*what follows"),
    ],
)
def test_an_array_that_cannot_be_followed_stops_the_reading(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_rows(saved(tmp_path, text)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \n\n", "the file is empty"),
        (
            b"<!DOCTYPE html>\n<p>404</p>",
            ":1: the text begins with '<!DOCTYPE html>'; expected JSON",
        ),
        ("\n\n从前有一座山。".encode(), ":3: the text begins with '从前有一座山。'"),
        (b",\n1,2\n", ":1: the text begins with ','"),
        (b"PK\x03\x04abc", "damaged archive"),
        (b"PAR1 and nothing more", "damaged parquet"),
        (gzip.compress(b'{"q": 1}\n' * 100, mtime=0)[:-20], "damaged archive|gzip"),
    ],
)
def test_a_file_that_is_no_data_is_refused_in_one_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        next(read_rows(tmp_path / "no.json"))
    with pytest.raises(UserError, match="a folder"):
        next(read_rows(tmp_path))


@pytest.mark.parametrize("arrangement", ["lines", "lines.gz", "array", "objects", "csv"])
def test_a_file_is_never_in_memory_as_a_whole(
    arrangement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_HEAD_BYTES", 1 << 16)
    monkeypatch.setattr(files_text, "_CHUNK_BYTES", 1 << 16)
    count, cell = 5_000, "x" * 1000
    text = {
        "lines": (dumped({"q": cell}) + "\n") * count,
        "array": "[" + ",".join([dumped({"q": cell})] * count) + "]",
        "objects": (dumped({"q": cell}, 1) + "\n") * count,
        "csv": "q,a\n" + f"{cell},a\n" * count,
    }[arrangement.removesuffix(".gz")]
    packed = gzip.compress(text.encode(), 1) if arrangement.endswith(".gz") else text
    path = saved(tmp_path, packed)
    del text, packed
    tracemalloc.start()
    try:
        assert sum(isinstance(row, SourceRow) for row in read_rows(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < count * len(cell) / 4, f"{peak} bytes for a file of {count * len(cell)}"
