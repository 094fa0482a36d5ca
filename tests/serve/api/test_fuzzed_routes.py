"""Whatever the document of the API allows, and much that it does not: no answer is a 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.api.scripted import scripted_server


@pytest.mark.job
def test_no_request_is_an_error_of_the_server(vocab_path: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "--no-color"]
    command += ["--checks", "not_a_server_error", "--phases", "fuzzing", "--seed", "1"]
    command += ["--max-examples", "25", "--suppress-health-check", "all"]
    with scripted_server(vocab_path, lambda job: ["an ", "answer"]) as (url, pool):
        found = subprocess.run(
            [*command, f"{url}/openapi.json"],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
    assert found.returncode == 0, found.stdout[-3000:]
    assert pool.jobs_seen, "some requests were answered"
