"""Rows ranked by the loss of a model on their answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qwen_ds.data import __main__ as command
from qwen_ds.data.doctor import losses
from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.rows.token_rows import TokenRows, prepare
from qwen_ds.errors import UserError
from qwen_ds.model import device
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.folder import find_model
from qwen_ds.model.loading import load_base
from qwen_ds.recipe.options import DataOptions
from tests.data.doctor.test_judge import write

ROWS = [{"content": f"q{at}", "summary": "answer " * (1 + at % 3) + str(at)} for at in range(9)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def rows(tmp_path: Path, small_dir: Path, file: str) -> TokenRows:
    data = DataOptions([file], cache_dir=str(tmp_path / "c"))
    return prepare(data, find_model(small_dir).encoding, 64).train


def test_a_row_has_the_mean_loss_of_its_target_tokens_whatever_its_batch(
    small_dir: Path, rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(find_model(small_dir), torch.float32)
    wanted = []
    for row in range(len(rows)):
        ids_T, labels_T = (torch.from_numpy(part).long() for part in rows[row])
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0]
        loss = F.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORE)
        wanted.append(float(loss))
    for tokens in (1, 60, 4096):
        monkeypatch.setattr(losses, "TOKENS_A_BATCH", tokens)
        found = losses.mean_losses(model, rows, torch.device("cpu"))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_lengths_that_vary_never_meet_cudnn_on_a_gpu(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make a plan for each."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    moved: list[torch.device] = []

    class Model:
        def to(self, device: torch.device) -> Model:
            moved.append(device)
            return self

        def eval(self) -> None:
            assert not torch.backends.cuda.cudnn_sdp_enabled()

    monkeypatch.setattr(device, "choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(losses, "load_base", lambda *_: Model())
    try:
        options = CheckCommand(data=DataOptions(["rows.jsonl"]), model=str(small_dir))
        losses.loaded(options, find_model(small_dir))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
    assert moved == [torch.device("cuda", 0)]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["data", "check", *map(str, words)])
    return command.main()


def test_the_worst_rows_are_findings_and_all_are_ranked(
    small_dir: Path, file: str, rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("--data.cache_dir", tmp_path / "c")
    out = tmp_path / "out"
    assert run(monkeypatch, file, "--model", small_dir, *cache, "--worst", 3, "--output", out) == 0
    ranked = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in ranked] == list(range(1, 10))
    values = [row["loss"] for row in ranked]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    found = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    worst = [row["line"] for row in found if row["finding"] == "high-loss"]
    assert worst == [int(row["source"].rpartition(":")[2]) for row in ranked[:3]]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == "counted" and summary["losses"]["rows"] == 9


def test_rows_that_share_a_line_are_ranked_each_in_its_place(
    small_dir: Path, file: str, rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_line = tmp_path / "rows.json"
    one_line.write_text(json.dumps(ROWS))
    words = ("--model", small_dir, "--data.cache_dir", tmp_path / "c", "--worst", 3)
    ranked = {}
    for name, given in (("lines", file), ("line", one_line)):
        assert run(monkeypatch, given, *words, "--output", tmp_path / name) == 0
        ranked[name] = [
            json.loads(line)["source"].rpartition(":")[2]
            for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()
        ]
    assert ranked["line"] == [f"1[{int(line) - 1}]" for line in ranked["lines"]]
    found = [json.loads(line) for line in (tmp_path / "line/findings.jsonl").open()]
    worst = [row["line"] for row in found if row["finding"] == "high-loss"]
    assert worst == ranked["line"][:3]


def test_an_adapter_of_another_base_is_refused(
    small_dir: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (file, "--model", small_dir, "--adapter", tmp_path / "none")
    with pytest.raises(UserError, match="none"):
        run(monkeypatch, *words, "--data.cache_dir", tmp_path / "c")
