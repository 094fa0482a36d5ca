"""The page of one run: whole, small, of text that is shown and never obeyed."""

from __future__ import annotations

import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen_ds.report.folder import read_run
from qwen_ds.report.one_run import page_of, write_page
from tests.report.runs import make_run, make_whole_run, samples, token_losses, write_lines

HOSTILE = "<script>alert('x')</script>\"'{{ 137 * 73 }}${x_{1"
VOID = {"meta", "br", "path", "use", "rect"}


class Outline(HTMLParser):
    """Elements, and whether each is closed where it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: set[str] = set()
        self.headings: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


def test_a_whole_run_has_all_its_sections(tmp_path: Path) -> None:
    page = page_of(read_run(make_whole_run(tmp_path / "run")))
    assert [h for h in Outline(page).headings if h] == [
        "Training", "Evaluation", "dev.jsonl", "Samples over time", "Loss of each token",
        *(f"eval.jsonl:{n}" for n in range(1, 6)), "Data", "Rows that were not taken as they are",
        "What the data check found", "Recipe and environment", "What differs from the defaults",
        "Environment", "The same run again",
    ]  # fmt: skip
    for text in ("锟斤拷", "optim.lr", "10,158,080", "NVIDIA H200", "0.39 to 0.45", "step 30"):
        assert text in page, text


def test_a_run_of_an_earlier_version_gives_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3, eval_losses=())
    for name in ("environment.json", "ds_config.json", "data_report.json", "recipe.yaml"):
        (folder / name).unlink()
    run = read_run(folder)
    outline = Outline(page_of(run))
    assert outline.headings == ["Training", "Recipe and environment"] and run.troubles == []


def test_text_of_others_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    page = page_of(read_run(make_whole_run(tmp_path / "run", text=HOSTILE)))
    outline = Outline(page)
    assert not outline.open and not outline.found & {"script", "img", "iframe", "object", "link"}
    assert "{{ 137 * 73 }}" in page and "10001" not in page
    # Each place that a text can reach has been reached.
    assert page.count("&lt;script&gt;alert(") > 100


def test_a_long_run_with_long_texts_stays_under_400_kb(tmp_path: Path) -> None:
    folder = make_whole_run(tmp_path / "run", steps=3_000)
    text = "春眠不觉晓，" * 500
    write_lines(folder / "samples.jsonl", samples(text, moments=50, prompts=50))
    lines = token_losses()
    for line in lines:
        line["pieces"], line["losses"] = line["pieces"] * 130, line["losses"] * 130
    write_lines(folder / "token_losses.jsonl", lines)
    page = page_of(read_run(folder)).encode()
    assert len(page) < 400_000, len(page)


def test_nothing_is_fetched_and_matplotlib_has_nothing_to_warn_of(tmp_path: Path) -> None:
    folder = make_whole_run(tmp_path / "名字 $x$", text="茶")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(read_run(folder))
    assert not re.findall(r"https?://(?!127)|@import|url\((?!#)|src=", page)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("data_report.json", '{"total": 7, "findings": [{}]}', "data_report.json: its values"),
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl: its values are not as expected"),
        ("token_losses.jsonl", "[]\n", "token_losses.jsonl: no JSON object in line 1"),
        ("environment.json", "{", "environment.json: not readable as JSON"),
        ("recipe.yaml", "- 1", "recipe.yaml: no sections and keys in it"),
        ("eval_after/rows.jsonl", '{"id": 0, "seed.rouge-l": "x"}\n', ""),
    ],
)
def test_a_broken_file_is_said_and_costs_nothing_but_its_part(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    folder = make_whole_run(tmp_path / "run")
    (folder / name).write_text(text, encoding="utf-8")
    run = read_run(folder)
    page = page_of(run)
    costs = {
        "data_report.json": "Data", "samples.jsonl": "Samples over time",
        "environment.json": "Environment",
    }  # fmt: skip
    missing = {"Training", "Samples over time", "Data", "Environment"} - {*Outline(page).headings}
    assert missing <= {costs.get(name)}
    assert (said in page and "Not everything could be read." in page) if said else not run.troubles


def test_the_page_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(make_run(tmp_path / "run"))
    write_page(run, run.folder / "report.html")
    before = (run.folder / "report.html").read_bytes()
    monkeypatch.setattr("qwen_ds.report.one_run.page_of", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(run, run.folder / "report.html")
    assert (run.folder / "report.html").read_bytes() == before
