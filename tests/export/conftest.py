"""A base that a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def base_dir(small_dir: Path, tmp_path: Path) -> Path:
    """Golden `small` in a folder that a test may change."""
    return Path(shutil.copytree(small_dir, tmp_path / "base"))
