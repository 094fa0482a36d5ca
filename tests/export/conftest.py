"""A base that a test may change, and golden checkpoints in the Qwen2 format, converted once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_ds.export.formats import find_format
from tests.export.folders import merge_with


@pytest.fixture
def base_dir(small_dir: Path, tmp_path: Path) -> Path:
    """Golden `small` in a folder that a test may change."""
    return Path(shutil.copytree(small_dir, tmp_path / "base"))


def converted(base: Path, output: Path) -> Path:
    report = merge_with(base, [], output, to=find_format("qwen", "qwen2"))
    assert not report.rejected and report.untouched > 0 and not report.changed
    return output


@pytest.fixture(scope="session")
def small_qwen2(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden `small` as a Qwen2 folder."""
    return converted(small_dir, tmp_path_factory.mktemp("small_qwen2") / "model")


@pytest.fixture(scope="session")
def full_qwen2(full_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden `full` as a Qwen2 folder: the official vocabulary."""
    return converted(full_dir, tmp_path_factory.mktemp("full_qwen2") / "model")
