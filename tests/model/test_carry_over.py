"""The small files that travel with a model."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

from qwen_ds.model.carry_over import carry_over, legal_texts

LEGAL = ["NOTICE", "Tongyi Qianwen LICENSE AGREEMENT.txt", "use_policy.md"]
CODE = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}


def test_settings_tokenizer_and_legal_texts_are_carried_over_and_no_code(
    small_dir: Path, tmp_path: Path
) -> None:
    base, out = Path(shutil.copytree(small_dir, tmp_path / "base")), tmp_path / "out"
    out.mkdir()
    for name in (*LEGAL, "README.md", "license.py"):
        (base / name).write_text(name)
    settings = {
        "config.json": json.loads((base / "config.json").read_text()),
        "tokenizer_config.json": {"model_max_length": 64},
    }
    settings["config.json"].pop("auto_map", None)
    for name, content in settings.items():
        (base / name).write_text(json.dumps(content | CODE))
    (base / "NOTICE").chmod(0o600)

    names = carry_over(base, out)
    assert names == sorted(path.name for path in out.iterdir())
    assert set(names) == {*LEGAL, *settings, "generation_config.json", "qwen.tiktoken"}
    for name in names:
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o644
        if name in settings:
            assert json.loads((out / name).read_text()) == settings[name]
        else:
            assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_folder_in_another_format_gets_the_legal_texts_alone(
    small_dir: Path, tmp_path: Path
) -> None:
    base, out = Path(shutil.copytree(small_dir, tmp_path / "base")), tmp_path / "out"
    out.mkdir()
    for name in LEGAL:
        (base / name).write_text(name)
    assert carry_over(base, out, legal_only=True) == legal_texts(base) == legal_texts(out) == LEGAL
    assert sorted(path.name for path in out.iterdir()) == LEGAL
