"""One server on the golden model with the real vocabulary, for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.api.running import Running, running


@pytest.fixture(scope="session")
def server(full_dir: Path) -> Iterator[Running]:
    with running("--model", str(full_dir), "--served_model_name", "qwen", "alias") as server:
        yield server
