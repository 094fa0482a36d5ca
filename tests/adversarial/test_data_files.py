"""Data files and folders as people have them, and as nobody should: read whole, or refused in one
line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.adversarial.harness import Member, Place, check

CASES = Path(__file__).parent / "cases"
ROWS = [
    {"instruction": "把下面的话翻译成英文", "input": "今天天气很好", "output": "Nice weather."},
    {"instruction": "你是谁", "input": "", "output": "我是一个助手。"},
]
KEYS = list(ROWS[0])
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "instruction,input,output\n"
CSV += "把下面的话翻译成英文,今天天气很好,Nice weather.\n你是谁,,我是一个助手。\n"
MB = 1_000_000


def dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def translated(question: str, answer: str, encoding: str) -> bytes:
    rows = [
        {"instruction": question, "input": "", "output": answer},
        {"instruction": answer, "input": "", "output": question},
    ]
    return "".join(dumped(row) + "\n" for row in rows).encode(encoding)


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    question, answer = f"{row['instruction']}\t{row['input']}".strip(), row["output"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def archive(members: dict[str, str], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, text in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(text.encode())
            tar.addfile(about, io.BytesIO(text.encode()))
    return out.getvalue()


def zipped(members: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def table(fmt: str, compression: str | None = None, rows: pyarrow.Table = None) -> bytes:
    out, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS) if rows is None else rows
    if fmt == "parquet":
        pyarrow.parquet.write_table(rows, out)
    else:
        new = pyarrow.ipc.new_file if fmt == "file" else pyarrow.ipc.new_stream
        kept = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with new(out, rows.schema, options=kept) as writer:
            writer.write_table(rows)
    return out.getvalue()


def workbook(*sheets: list[list[object]], titles: Sequence[str] = ()) -> bytes:
    book, out = openpyxl.Workbook(), io.BytesIO()
    for at, rows in enumerate(sheets):
        sheet = book.active if at == 0 else book.create_sheet()
        sheet.title = titles[at] if titles else sheet.title
        for row in rows:
            sheet.append(row)
    book.save(out)
    return out.getvalue()


def of_types(fmt: str) -> bytes:
    """The rows beside columns of all kinds, the texts as large strings and a dictionary."""
    rows = pyarrow.Table.from_pylist(ROWS)
    rows = rows.set_column(0, KEYS[0], rows[KEYS[0]].cast(pyarrow.large_string()))
    rows = rows.set_column(2, KEYS[2], rows[KEYS[2]].dictionary_encode())
    more = {
        "nothing": pyarrow.nulls(2), "price": pyarrow.array([Decimal("1.5"), None]),
        "at": pyarrow.array([datetime(2020, 1, 2), None]), "raw": pyarrow.array([b"\xff", None]),
        "map": pyarrow.array([[("a", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
    }  # fmt: skip
    for name, column in more.items():
        rows = rows.append_column(name, column)
    return table(fmt, rows=rows)


def wrong_bytes() -> bytes:
    texts = pyarrow.array([b"q\xff", b"q"]).view(pyarrow.string())
    return table("parquet", rows=pyarrow.table({"content": texts, "summary": ["a", "b"]}))


def zipped_twice(name: str, *texts: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, warnings.catch_warnings(action="ignore"):
        for text in texts:
            file.writestr(name, text)
    return out.getvalue()


def bomb(fmt: str, count: int, megabytes: int) -> bytes:
    """A table of long texts, compressed as a whole to next to nothing."""
    row = {"content": "q" * (megabytes * MB), "summary": "a"}
    batch, out = pyarrow.RecordBatch.from_pylist([row]), io.BytesIO()
    if fmt == "parquet":
        kept = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pyarrow.parquet.ParquetWriter(out, batch.schema, **kept) as writer:
            for _ in range(count):
                writer.write_batch(batch)
        return out.getvalue()
    new = pyarrow.ipc.new_file if fmt == "file" else pyarrow.ipc.new_stream
    with new(out, batch.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    return out.getvalue()


SHEET: list[list[object]] = [list(KEYS), *[list(row.values()) for row in ROWS]]
BY_COLUMN = {key: [row[key] for row in ROWS] for key in KEYS}
RU = "Переведи текст на английский язык", "Сегодня хорошая погода, пойдём гулять"
CZ = "Přelož tento text do angličtiny, žádám tě", "Dnes je šťastný den, půjdeme na louku"

# name -> content; every one gives the two rows. The suffix of the file is in the name.
READ: dict[str, str | bytes] = {
    "plain.jsonl": LINES,
    "cr_only.jsonl": LINES.replace("\n", "\r"),
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "bom_in_the_middle.jsonl": "\ufeff" + LINES.replace("\n", "\n\ufeff", 1),
    "bom_without_line_end.jsonl": "\ufeff" + LINES.replace("\n", "\ufeff", 1),
    "one_line.json": LINES.replace("\n", ""),
    "indented_after_another.json": "\ufeff".join(json.dumps(row, indent=1) for row in ROWS),
    "two_arrays.json": f"{dumped(ROWS[:1])}\n\ufeff{dumped(ROWS[1:])}",
    "nan.json": dumped(ROWS).replace('"input": ""', '"input": NaN'),
    "infinity.jsonl": LINES.replace('"input": ""', '"x": -Infinity'),
    "data.json": dumped({"version": "1.0", "data": ROWS}),
    "rows.json": dumped({"rows": [{"row_idx": 0, "row": row} for row in ROWS], "partial": False}),
    "train.json": dumped({"train": ROWS}),
    "data_splits.json": dumped({"version": "1.0", "train": ROWS, "test": ROWS[:1], "dev": ROWS}),
    "splits.zip": zipped({"a/train.jsonl": LINES, "a/test.jsonl": LINES, "dev.csv": CSV}),
    "splits.xlsx": workbook(SHEET, SHEET, titles=("train", "test")),
    "navicat.json": json.dumps({"RECORDS": ROWS}, indent=1),
    "orient_index.json": dumped({str(at): row for at, row in enumerate(ROWS)}),
    "orient_split.json": dumped(
        {"columns": KEYS, "index": [0, 1], "data": [list(row.values()) for row in ROWS]}
    ),
    "orient_columns.json": dumped(
        {key: {str(at): row[key] for at, row in enumerate(ROWS)} for key in KEYS}
    ),
    "orient_list.json": dumped(BY_COLUMN),
    "orient_table.json": dumped({"schema": {"fields": []}, "data": ROWS}),
    "commas.jsonl": LINES.replace("\n", ",\n"),
    "commas_on_one_line.json": LINES.replace("\n", ", "),
    "list_of_turns.json": "\n".join(dumped(turns(row)) for row in ROWS),
    "list_of_turns_and_commas.json": "".join(dumped(turns(row)) + ",\n" for row in ROWS),
    "array_of_turns.json": json.dumps([turns(row) for row in ROWS], indent=1),
    "turns_in_cells.csv": "id,messages\n1,{}\n2,{}\n".format(
        *('"' + dumped(turns(row)).replace('"', '""') + '"' for row in ROWS)),
    "key_twice_alike.jsonl": LINES.replace('"input": ""', '"input": "", "input": ""'),
    "plain.csv": CSV,
    "cr_only.csv": CSV.replace("\n", "\r"),
    "semicolons.csv": CSV.replace(",", ";"),
    "tabs.txt": CSV.replace(",", "\t"),
    "excel_sep.csv": "sep=;\n" + CSV.replace(",", ";"),
    "excel_sep_quoted.csv": '"sep=,"\r\n' + CSV.replace("\n", "\r\n"),
    "unnamed.csv": "".join(
        f"{at},{line}\n" for at, line in zip(("Unnamed: 0", 0, 1), CSV.splitlines(), strict=True)
    ),
    "colon_in_header.csv": CSV.replace("\n", ",note: x\n", 1).replace("weather.", "weather.,1")
    .replace("助手。", "助手。,2"),
    "brackets_in_header.csv": CSV.replace("\n", ",x[0] {y}\n", 1).replace("weather.", "weather.,1")
    .replace("助手。", "助手。,2"),
    "quotes_in_header.csv": CSV.replace("\n", ',"say ""x"""\n', 1).replace("weather.", "weather.,1")
    .replace("助手。", "助手。,2"),
    "long_header.csv": CSV.replace("\n", f",{'x' * 300}\n", 1).replace("weather.", "weather.,1")
    .replace("助手。", "助手。,2"),
    "trailing_commas.csv": CSV.replace("weather.\n", "weather.,,\n"),
    "equal_names.csv": CSV.replace("\n", ",note,note\n", 1).replace("weather.", "weather.,1,2")
    .replace("助手。", "助手。,3,3"),
    "equal_cells.csv": CSV.replace("\n", ",output\n", 1).replace("er.\n", "er.,\n")
    .replace("助手。", "助手。,我是一个助手。"),
    "line_in_a_cell.csv": CSV.replace("今天天气很好", '"今天\r\n天气"'),
    "utf16.csv": CSV.replace(",", "\t").encode("utf-16"),
    "utf16_be_mark.jsonl": "\ufeff".encode("utf-16-be") + LINES.encode("utf-16-be"),
    "utf16_no_mark.jsonl": LINES.encode("utf-16-le"),
    "utf16_be_no_mark.jsonl": LINES.encode("utf-16-be"),
    "utf16_ascii.jsonl": '{"content": "q", "summary": "a"}\n{"content": "r", "summary": "b"}\n'
    .encode("utf-16-le"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "utf32_no_mark.jsonl": LINES.encode("utf-32-be"),
    "gb18030.jsonl": LINES.encode("gb18030"),
    "gbk.csv": CSV.encode("gbk"),
    "big5.jsonl": translated("請翻譯成英文，謝謝您的幫忙", "今天天氣很好，我們去公園走走", "big5"),
    "euc_kr.jsonl": translated("다음 문장을 영어로 번역하세요", "오늘 날씨가 좋다", "euc_kr"),
    "shift_jis.jsonl": translated("日本語を英語に翻訳", "今日は天気がいい", "shift_jis"),
    "euc_jp.jsonl": translated("日本語を英語に翻訳してください", "今日は天気がいい", "euc_jp"),
    "iso2022_jp.csv": CSV.replace("今天天气很好", "日本語")[:60].split("\n")[0].encode()
    + b"\n" + "日本語,,英語\n今日は,,天気\n".encode("iso2022_jp"),
    "cp1251.jsonl": translated(*RU, "cp1251"),
    "koi8.jsonl": translated(*RU, "koi8-r"),
    "iso8859_5.jsonl": translated(*RU, "iso8859-5"),
    "cp1250.jsonl": translated(*CZ, "cp1250"),
    "cp1250_as_its_twin.jsonl": translated("Fordítsd le a szöveget", "légy szíves, fűz", "cp1250"),
    "cp1252.jsonl": translated("Wie heißt du? Für mich bitte", "ein großes Stück Käse", "cp1252"),
    "cp1253.jsonl": translated("Μετάφρασε το κείμενο", "στα αγγλικά παρακαλώ", "cp1253"),
    "cp1256.jsonl": translated("ترجم النص إلى الإنجليزية", "الطقس جميل اليوم", "cp1256"),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "lines.jsonl.bz2": bz2.compress(LINES.encode()),
    "lines.jsonl.xz": lzma.compress(LINES.encode()),
    "two_streams.xz": lzma.compress(LINES[:9].encode()) + bytes(4)
    + lzma.compress(LINES[9:].encode()),
    "lines.jsonl.zst": zstandard.compress(LINES.encode()),
    "two_frames.zst": b"".join(zstandard.compress(x.encode()) for x in LINES.splitlines(True)),
    "two_members.gz": b"".join(gzip.compress(x.encode()) for x in LINES.splitlines(True)),
    "lines.zip": zipped({"d/a.jsonl": LINES, "README.md": "# x", "__MACOSX/d/._a.jsonl": "x"}),
    "zip_of_gz.zip": zipped({"a.jsonl.gz": gzip.compress(LINES.encode())}),
    "zip_climbs.zip": zipped({"../../../a.jsonl": LINES}),
    "lines.tar.zst": zstandard.compress(archive({"a.jsonl": LINES})),
    "lines.tar.xz": archive({"a.jsonl": LINES}, "w:xz"),
    "table.parquet": table("parquet"),
    "table.parquet.zst": zstandard.compress(table("parquet")),
    "file.arrow": table("file"),
    "stream.arrow": table("stream"),
    "lz4.arrow": table("file", "lz4"),
    "zstd.arrow": table("stream", "zstd"),
    "types.parquet": of_types("parquet"),
    "types.arrow": of_types("file"),
    "sheet.xlsx": workbook(SHEET),
    "formulas.xlsx": workbook(
        [[*KEYS, "at"], [*ROWS[0].values(), "=1+1"], [*ROWS[1].values(), date(2020, 1, 2)]]
    ),
    "excel_bom_sep.csv": "\ufeffsep=;\r\n" + CSV.replace(",", ";").replace("\n", "\r\n"),
    "quotes.tsv": CSV.replace(",", "\t").replace("Nice", 'a 5" N').replace("你是谁", '"你""谁"'),
    "u2028.jsonl": LINES.replace("天气", "天\u2028\x85气"),
    "zero_bytes.csv": CSV.replace("天气", "\0"),
    "deep_meta.jsonl": LINES.replace("}", ', "meta": ' + '{"a":' * 300 + "1" + "}" * 301, 1),
    "zeros_behind.gz": gzip.compress(LINES.encode()) + bytes(99),
    "twice.zip": zipped_twice("a.jsonl", LINES[:9], LINES),
    "chinese_roles.json": dumped(
        [{"conversations": [{"from": "用户", "value": "问"}, {"from": "助手", "value": each}]}
         for each in ("答", "好")]),
    "two_sheets.xlsx": workbook(SHEET[:2], [SHEET[0], SHEET[2]], []),
}  # fmt: skip
SAID = {
    "utf16.csv": "read as utf-16", "big5.jsonl": "read as big5", "cp1251.jsonl": "read as cp1251",
    "cp1250.jsonl": "read as cp1250", "iso8859_5.jsonl": "read as iso8859-5",
    "gbk.csv": "read as gb18030", "euc_kr.jsonl": "read as cp949", "koi8.jsonl": "read as koi8-r",
    "lines.zip": "lines.zip:README.md: not read", "equal_names.csv": "not read: note (2 rows)",
    "data_splits.json": "data_splits.json:1 dev: not read, of the split validation (2 rows)",
    "splits.zip": "splits.zip:dev.csv: not read, of the split validation",
    "twice.zip": "twice.zip:a.jsonl: not read, a later file of this name replaces it",
    "types.parquet": "not read: price, at, raw, map (1 row)",
    "splits.xlsx": "splits.xlsx:test: not read, of the split test",
}  # fmt: skip


def encode(place: Place, path: Path | str, *options: str) -> list[str | Path]:
    return [
        "data", "encode", "--model.path", place.small, "--data.train", path,
        "--data.cache_dir", place.out / "cache", "--output", place.out / "rows.jsonl", *options,
    ]  # fmt: skip


def gave(rows: int, place: Place) -> bool:
    return len((place.out / "rows.jsonl").read_text().splitlines()) == rows


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_whole(name: str, tmp_path: Path, small_dir: Path) -> None:
    member = Member(
        name,
        lambda place: encode(place, place.file(name, READ[name])),
        code=0,
        says=[f" of {2:,} read" if "_columns" not in name else " rows", SAID.get(name, "tokens")],
        leaves=partial(gave, 2),
    )
    if name.startswith(("data", "rows", "train", "navicat", "orient")):
        member = Member(name, member.make, code=0, leaves=member.leaves)
    check(member, tmp_path, small_dir)


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda case: case.name)
def test_a_file_that_a_user_had_is_read(case: Path, tmp_path: Path, small_dir: Path) -> None:
    check(Member(case.name, lambda place: encode(place, case), code=0), tmp_path, small_dir)


def gzip_of(char: bytes, megabytes: int) -> bytes:
    """One line of a character, packed a thousand times smaller."""
    return gzip.compress(char * MB * megabytes, 1)


def pax_header(megabytes: int) -> bytes:
    """A tar archive whose header is longer than any row."""
    text = io.BytesIO()
    with tarfile.open(fileobj=text, mode="w", format=tarfile.PAX_FORMAT) as tar:
        about = tarfile.TarInfo("a.json")
        about.pax_headers = {"comment": "x" * (megabytes * MB)}
        tar.addfile(about)
    return gzip.compress(text.getvalue(), 1)


def sparse_tar() -> bytes:
    """Eight GB of zeros in one KB: GNU tar's sparse files."""
    about = tarfile.TarInfo("a.jsonl")
    about.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(about.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (8 << 30)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def encrypted_zip() -> bytes:
    data = bytearray(zipped({"a.jsonl": LINES}))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


LIMIT = "data.max_row_mb"
DOUBT = "data.encoding"
# name -> content, words of the message
REFUSED: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "empty.jsonl": (lambda: "", "the file is empty"),
    "mark_only.jsonl": (lambda: "\ufeff\n\ufeff", "the file is empty"),
    "key_twice.jsonl": (lambda: '{"content": "a", "content": "b", "summary": "c"}', "there twice"),
    "trailing_comma.json": (lambda: '[{"content": "a", "summary": "c"},]', "a comma before"),
    "trailing_comma.jsonl": (lambda: '{"content": "a", "summary": "c",}', "a comma before '}'"),
    "single_quotes.jsonl": (lambda: "{'content': 'a', 'summary': 'c'}", "not valid JSON"),
    "deep.jsonl": (lambda: '{"content": ' + "[" * 100_000, "not valid JSON"),
    "deep.json": (lambda: "[" * 1_000_000, "nested too deep"),
    "long_number.jsonl": (lambda: '{"content": ' + "9" * 10_000 + "}", "not valid JSON"),
    "equal_names.csv": (lambda: "content,summary,summary\na,b,c\n", ":2: summary is not the same"),
    "equal_names.xlsx": (
        lambda: workbook([["content", "summary", "summary"], ["a", "b", "c"]]),
        "Sheet:2: summary is not the same",
    ),
    "ragged.csv": (lambda: "content,summary\na,b\nc\n", ":3: 1 cells; expected 2"),
    "prose.txt": (lambda: "从前有一座山。\n山上有一座庙。\n", "the text begins with"),
    "html.json": (lambda: "<!DOCTYPE html>\n<p>404</p>", "the text begins with"),
    "lfs.jsonl": (
        lambda: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"
    ),
    "doubt.jsonl": (lambda: translated("\xe9\xf5", "\xfe\xf0", "latin-1"), DOUBT),
    "iso8859_2.jsonl": (lambda: translated(*CZ, "iso8859-2"), DOUBT),
    "iso8859_15.jsonl": (lambda: translated("Cœur à l'œuvre", "été, sœur", "iso8859-15"), DOUBT),
    "tiny_lines.json": (lambda: '{\n"x": [\n' + "1,\n" * (20 * MB) + "1]\n}", "keys found: x"),
    "odd_utf16.jsonl": (lambda: LINES.encode("utf-16") + b"x", "not UTF-16"),
    "cut.gz": (lambda: gzip.compress(LINES.encode() * 50)[:-9], "expected"),
    "cut.xz": (lambda: lzma.compress(LINES.encode() * 50)[:-30], "damaged archive"),
    "cut.bz2": (lambda: bz2.compress(LINES.encode() * 50)[:-9], "expected"),
    "broken.zst": (lambda: b"\x28\xb5\x2f\xfd" + b"x" * 99, "damaged archive"),
    "broken.zip": (lambda: b"PK\x03\x04" + b"x" * 99, "damaged archive"),
    "locked.zip": (encrypted_zip, "encrypted"),
    "lzma.zip": (lambda: zipped({"a.jsonl": LINES}, zipfile.ZIP_LZMA), "method 14"),
    "zip_in_zip.zip": (lambda: zipped({"b.zip": zipped({"a.json": LINES})}), "inside an archive"),
    "broken.parquet": (lambda: b"PAR1" + b"x" * 99, "damaged parquet"),
    "cut.parquet": (lambda: table("parquet")[:-40], "damaged parquet"),
    "broken.arrow": (lambda: b"ARROW1\0\0" + b"x" * 99, "damaged Arrow"),
    "lying.arrow": (lambda: b"\xff\xff\xff\xff" + b"\xff\xff\xff\x7f" + b"x" * 99, "Arrow"),
    "broken.xlsx": (
        lambda: zipped({"xl/workbook.xml": "<x", "[Content_Types].xml": "<x"}), "damaged Excel"
    ),
    "long_line.jsonl": (lambda: '{"content": "' + "x" * (70 * MB), LIMIT),
    "long_line.gz": (lambda: gzip.compress(b'{"x": "' + b"x" * (200 * MB), 1), LIMIT),
    "zeros.jsonl.gz": (lambda: b"".join([gzip.compress(b"{"), gzip_of(b"\0", 200)]), LIMIT),
    "long_array.gz": (lambda: gzip.compress(b"[" + b'"' + b"x" * (140 * MB), 1), LIMIT),
    "long_object.gz": (lambda: gzip.compress(b'{\n"x": [' + (b"1" * 99 + b",\n") * MB, 1), LIMIT),
    "open_quote.csv.gz": (lambda: gzip.compress(b'q,a\n"' + b"x\n" * (40 * MB), 1), LIMIT),
    "one_cell.csv.gz": (lambda: gzip.compress(b"q,a\n" + b"x" * (80 * MB), 1), LIMIT),
    "blank_lines.gz": (lambda: gzip.compress(b"{}\n" + b"\n" * (90 * MB), 1), ""),
    "pax.tar.gz": (lambda: pax_header(70), LIMIT),
    "sparse.tar": (sparse_tar, "expected"),
    "wrong_bytes.parquet": (wrong_bytes, "wrong_bytes.parquet#0: byte 0xff is not UTF-8"),
    "no_members.zip": (lambda: zipped({}), "holds no rows"),
    "no_batches.arrow": (lambda: table("file", rows=pyarrow.table({"q": []})), "holds no rows"),
    "no_rows.parquet": (lambda: table("parquet", rows=pyarrow.table({"q": []})), "holds no rows"),
    **{f"empty.{each}": (bytes, "the file is empty") for each in ("parquet", "xlsx", "gz", "zip")},
    "zero_byte.jsonl": (lambda: LINES.replace("q", "").replace("谁", "\0"), ":2: not valid JSON"),
    "zeros_at_the_end.jsonl": (lambda: LINES + "\0" * 512, ":3: not valid JSON"),
    "ends_of_u2028.jsonl": (lambda: LINES.replace("\n", "\u2028"), "Extra data"),
    "more_behind.gz": (lambda: gzip.compress(LINES.encode()) + b"more", "Not a gzipped file"),
    "title.xlsx": (lambda: workbook([["Title"], *SHEET]), "3 cells; expected 1"),
    "python.jsonl": (lambda: f"{ROWS[0]}\n", "not valid JSON"),
    "comment.json": (lambda: f"// rows\n{dumped(ROWS)}", "the text begins with '// rows'"),
    "bomb.zip": (
        lambda: zipped({f"{at}.jsonl": LINES.encode() + b" " * (60 * MB) for at in range(5)}),
        "data.max_expansion",
    ),
    "long_row.zip": (lambda: zipped({"a.jsonl": b'{"x": "' + b"x" * (90 * MB)}), LIMIT),
    "bomb.xlsx": (
        lambda: zipped({"xl/workbook.xml": "", "xl/sharedStrings.xml": b" " * (300 * MB)}),
        "data.max_expansion",
    ),
    "bomb.parquet": (lambda: bomb("parquet", 8, 40), "data.max_expansion"),
    "long_row.parquet": (lambda: bomb("parquet", 1, 80), LIMIT),
    "bomb.arrow": (lambda: bomb("file", 8, 40), "data.max_expansion"),
    "bomb_stream.arrow": (lambda: bomb("stream", 8, 40), "data.max_expansion"),
    "long_row.arrow": (lambda: bomb("stream", 1, 80), LIMIT),
    "bomb.bz2": (lambda: bz2.compress(b"{" + b" " * (300 * MB), 1), LIMIT),
    "bomb.zst": (lambda: zstandard.compress(b"{" + b"x" * (300 * MB)), LIMIT),
    "bomb.tar.gz": (
        lambda: gzip.compress(archive({"a": ""})[:512] + bytes(300 * MB), 1), "data.max_expansion"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path, small_dir: Path) -> None:
    content, words = REFUSED[name]
    member = Member(
        name, lambda place: encode(place, place.file(name, content())), says=[name, words]
    )
    check(member, tmp_path, small_dir)


def linked(link: Path, to: str | Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(to)


def files(place: Place, *names: str) -> Path:
    for at, name in enumerate(names):
        place.file(f"d/{name}", dumped({"content": f"q{at}", "summary": f"a{at}"}))
    return place.here / "d"


def with_links(place: Place) -> Path:
    files(place, "a.jsonl")
    place.file("else/b.jsonl", dumped({"content": "r", "summary": "b"}))
    linked(place.here / "d" / "more", place.here / "else")
    linked(place.here / "d" / "same", place.here / "else")
    linked(place.here / "d" / "again.jsonl", "a.jsonl")
    return place.here / "d"


def hub_cache(place: Place, *, main: str | None = "two") -> Path:
    for at, revision in enumerate(("one", "two")):
        blob = place.file(f"d/blobs/{at}", dumped({"content": f"q{at}", "summary": f"a{at}"}))
        linked(place.here / "d" / "snapshots" / revision / "train.json", blob)
    if main is not None:
        place.file("d/refs/main", main)
    return place.here / "d"


def cache_of_datasets(place: Place, *hashes: str) -> Path:
    for each in hashes:
        for name in ("json-train.arrow", "json-test.arrow", "cache-0a1b2c.arrow"):
            place.file(f"d/{each}/{name}", table("stream"))
        place.file(f"d/{each}/dataset_info.json", "{}")
    return place.here / "d"


def with_link(name: str, to: str, place: Place) -> Path:
    folder = files(place, "a.jsonl")
    linked(folder / name, to)
    return folder


def with_special(make: Callable[[Path], object], place: Place) -> Path:
    folder = files(place, "a.jsonl")
    make(folder / "b.jsonl")
    return folder


def bound_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def many_links(place: Place) -> Path:
    """Thirty folders with two links each to the next: a billion paths to one file."""
    folder = files(place, "0/a.jsonl", "0/b.jsonl")
    for at in range(1, 30):
        for side in "lr":
            linked(folder / str(at) / side, f"../{at - 1}")
    return folder / "29"


# name -> folder, rows read, words of the report
FOLDERS: dict[str, tuple[Callable[[Place], Path | str], int, str]] = {
    "links": (with_links, 2, "not read, the same file as"),
    "links to one folder": (with_links, 2, "not read, a second link to the same folder"),
    "many links": (many_links, 2, "a second link to the same folder"),
    "other suffixes": (
        lambda p: files(p, "a.jsonl", "b.txt", "c.jsonl"), 2, "b.txt: not read, no suffix of data"
    ),
    "a split": (lambda p: files(p, "train.jsonl", "dev.jsonl"), 1, "of the split validation"),
    "no split": (lambda p: files(p, "dialog_dev_team.jsonl", "contest.jsonl"), 2, "2 rows of 2"),
    "shards": (
        lambda p: files(p, "data-train-00000-of-00002.json", "data-test-00000-of-00001.json"), 1,
        "of the split test",
    ),
    "a split's folder": (
        lambda p: files(p, "train/x.json", "train/y.json", "validation/x.json"), 2, "of the split"
    ),
    "a named split": (lambda p: f"{files(p, 'train.json', 'xx_dev.json')}:validation", 1, "train"),
    "hub cache": (hub_cache, 1, "1 rows of 1"),
    "cache of datasets": (lambda p: cache_of_datasets(p, "x"), 2, "that datasets has cached"),
    "a split of one file": (
        lambda p: f"{p.json('a.json', {'train': ROWS, 'test': ROWS[1:]})}:test", 1,
        "a.json:1 train: not read, of the split train (2 rows)",
    ),
    "a split of an archive": (
        lambda p: f"{p.file('a.zip', zipped({'train.json': LINES, 'x/dev.csv': CSV}))}:validation",
        2, "a.zip:train.json: not read, of the split train",
    ),
    "a split inside an archive": (
        lambda p: f"{p.file('a.zip', zipped({'x.json': dumped({'test': ROWS})}))}:test",
        2, "2 rows",
    ),
    "a split of a workbook": (
        lambda p: f"{p.file('a.xlsx', workbook(SHEET, SHEET[:2], titles=('train', 'dev')))}:dev", 1,
        "a.xlsx:train: not read, of the split train",
    ),
    "name with a colon": (lambda p: files(p, "a:b.jsonl") / "a:b.jsonl", 1, "1 rows of 1"),
}  # fmt: skip

# name -> path, words of the message
NO_FOLDERS: dict[str, tuple[Callable[[Place], Path | str], str]] = {
    "dangling": (partial(with_link, "b.jsonl", "gone.jsonl"), "a link to gone.jsonl, which is not"),
    "ring": (partial(with_link, "b", "."), "a link to a folder that it lies in"),
    "link to itself": (partial(with_link, "b.jsonl", "b.jsonl"), "symbolic links"),
    "device": (partial(with_link, "b.jsonl", "/dev/zero"), "b.jsonl: a device"),
    "pipe": (partial(with_special, os.mkfifo), "b.jsonl: a pipe"),
    "socket": (partial(with_special, bound_socket), "b.jsonl: a socket"),
    "device alone": (lambda p: "/dev/zero", "/dev/zero: a device"),
    "empty": (lambda p: files(p, ".hidden.jsonl"), "holds no data files"),
    "file:split": (lambda p: f"{files(p, 'a.jsonl') / 'a.jsonl'}:test", "of a file without splits"),
    "file:split, no such": (
        lambda p: f"{p.json('a.json', {'train': ROWS})}:test",
        "no split 'test' in it; splits found",
    ),
    "parquet:split": (lambda p: f"{p.file('a.parquet', table('parquet'))}:test", "without splits"),
    "no such split": (lambda p: f"{files(p, 'train.json')}:dev", "splits found: train"),
    "hub cache, no revision": (partial(hub_cache, main=None), "the revisions one, two"),
    "hub cache, another": (partial(hub_cache, main="three"), "refs/main names three"),
    "two cached data sets": (lambda p: cache_of_datasets(p, "x", "y"), "several cached data sets"),
    "long name": (lambda p: "x" * 5000, "too long; expected at most 255 bytes"),
    "zero byte": (lambda p: "a\0b", "it has a zero byte; expected a path"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_and_the_rest_is_told(name: str, tmp_path: Path, small_dir: Path) -> None:
    make, rows, words = FOLDERS[name]
    member = Member(
        name, lambda p: encode(p, make(p)), code=0, says=[words], leaves=partial(gave, rows)
    )
    check(member, tmp_path, small_dir)


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_path_that_cannot_be_read_is_refused(name: str, tmp_path: Path, small_dir: Path) -> None:
    make, words = NO_FOLDERS[name]
    check(Member(name, lambda p: encode(p, make(p)), says=[words]), tmp_path, small_dir)


# The value of an option, words of the message
OPTIONS = {
    ("--data.encoding", "klingon"): "data.encoding is 'klingon'",
    ("--data.encoding", "rot13"): "data.encoding is 'rot13'",
    ("--data.encoding", "planted_module"): "data.encoding is 'planted_module'",
    ("--data.encoding", "../x"): "data.encoding is '../x'",
    ("--data.max_row_mb", "0"): "data.max_row_mb is 0",
    ("--data.max_expansion", "-1"): "data.max_expansion is -1",
    ("--data.encoding", "ascii"): "is not ASCII",
}


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_an_option_of_reading_is_checked(
    option: tuple[str, str], tmp_path: Path, small_dir: Path
) -> None:
    member = Member(
        " ".join(option),
        lambda p: encode(p, p.file("a.jsonl", LINES), *option),
        says=[OPTIONS[option]],
    )
    check(member, tmp_path, small_dir)


def test_an_encoding_that_is_named_is_believed(tmp_path: Path, small_dir: Path) -> None:
    content = translated("\xe9\xf5", "\xfe\xf0", "latin-1")
    member = Member(
        "named",
        lambda p: encode(p, p.file("a.jsonl", content), "--data.encoding", "latin-1"),
        code=0,
        says=["read as latin-1"],
        leaves=partial(gave, 2),
    )
    check(member, tmp_path, small_dir)
