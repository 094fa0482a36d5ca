"""The checksum of a model's weights: the same for the same bytes, wherever it comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen_ds.disk import digest
from qwen_ds.disk.digest import model_sha256
from qwen_ds.disk.weights import file_facts


@pytest.fixture
def model(small_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dir, tmp_path / "model"))


def reported(model: Path, **change: object) -> None:
    facts = file_facts(model / "model.safetensors") | change
    (model / "merge_report.json").write_text(json.dumps({"outputs": {"model.safetensors": facts}}))


def test_it_depends_on_the_weights_alone(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "renamed"))
    (copy / "README.md").write_text("more")
    assert model_sha256(copy) == model_sha256(model)
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    assert model_sha256(copy) != model_sha256(model)
    assert model_sha256(tmp_path) is None, "no weights"


def test_a_merge_report_spares_reading_the_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_sha256(model)
    reported(model)
    digest._sha256.cache_clear()
    monkeypatch.setattr(digest, "file_sha256", lambda _: pytest.fail("the weights were read"))
    assert model_sha256(model) == expected


def test_weights_are_read_again_only_once_they_have_changed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    real = digest.file_sha256
    monkeypatch.setattr(digest, "file_sha256", lambda file: reads.append(file) or real(file))
    first = model_sha256(model)
    assert model_sha256(model) == first and len(reads) == 1
    weights = model / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert model_sha256(model) != first and len(reads) == 2


@pytest.mark.parametrize("text", [None, "[1]", '{"outputs": [1]}', '{"outputs": {"a": 1}}'])
def test_a_report_of_other_weights_is_not_believed(model: Path, text: str | None) -> None:
    expected = model_sha256(model)
    if text is None:
        reported(model, bytes=1, sha256="0" * 64)
    else:
        (model / "merge_report.json").write_text(text)
    assert model_sha256(model) == expected
