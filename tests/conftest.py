"""Shared fixtures: golden numbers of the official model, and checkpoint folders made from them."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def official_vocabulary() -> Path:
    """The real qwen.tiktoken, carried by the dashscope wheel; located without importing that package."""
    files = importlib.metadata.files("dashscope") or []
    (found,) = [f for f in files if f.name == "qwen.tiktoken"]
    return Path(str(found.locate()))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def vocab_path() -> Path:
    return official_vocabulary()


def _folder(target: Path, source: Path, vocabulary: Path) -> Path:
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    shutil.copy(vocabulary, target / "qwen.tiktoken")
    return target


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden `small` as a checkpoint folder: 512 rows, hidden 64, 3 layers, fp32, own mini vocabulary."""
    return _folder(tmp_path_factory.mktemp("small"), GOLDEN / "small", GOLDEN / "small" / "mini.tiktoken")


@pytest.fixture(scope="session")
def full_dir(tmp_path_factory: pytest.TempPathFactory, vocab_path: Path) -> Path:
    """Golden `full` as a checkpoint folder: the official 151,936 rows and vocabulary, hidden 8, 2 layers, bf16."""
    return _folder(tmp_path_factory.mktemp("full"), GOLDEN / "full", vocab_path)
