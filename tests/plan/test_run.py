"""The base model as decisions see it: read once, and nothing of its weights."""

from __future__ import annotations

import builtins
import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from qwen_ds.plan.run import Base, Note
from qwen_ds.plan.shape import Shape


def test_a_base_is_read_once_and_without_its_weights(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    real = io.open

    def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened[Path(str(file)).name] += 1
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    base = Base.read(small_dir)
    assert opened["config.json"] == opened["qwen.tiktoken"] == 1
    assert not [name for name in opened if name.endswith(".safetensors")]
    assert Shape.of(base.config).hidden == 64 and base.folder == small_dir.resolve()


def test_a_broken_generation_config_is_named(small_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(small_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config.json: not readable as JSON"):
        Base.read(tmp_path / "model")


def test_qwen_7b_is_known_without_its_files() -> None:
    base = Base.qwen_7b()
    assert Shape.of(base.config).parameters == 7_721_324_544
    assert base.chat_format == "raw" and base.folder is None and base.encoding is None


def test_a_note_says_what_was_chosen_and_why() -> None:
    assert str(Note("model.dtype", "float32", "faster")) == "model.dtype is float32: faster"
