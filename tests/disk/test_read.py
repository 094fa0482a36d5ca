"""Files of settings: anything but one JSON object is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.disk.read import read_json
from qwen_ds.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not readable as JSON .*No such file"),
        (b"{", "not readable as JSON"),
        (b'{"a": "\xff"}', "not readable as JSON"),
        (b"[1]", "a JSON list; expected an object"),
    ],
)
def test_what_is_not_an_object_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {message}") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
