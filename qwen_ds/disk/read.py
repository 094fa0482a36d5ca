"""Files of settings, read and checked: one JSON object, UTF-8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The file's object. Raises UserError if it is missing, not UTF-8, not JSON, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); expected an object") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON {type(found).__name__}; expected an object")
    return found
