"""https: answers come, and no idle client holds up the end."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.serve.api.running import running


@pytest.mark.job
def test_an_idle_client_under_tls_does_not_hold_up_the_end(small_dir: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    words = ["--model", str(small_dir), "--ssl_certfile", str(certificate)]
    with running(*words, "--ssl_keyfile", str(key)) as server:
        assert server.url.startswith("https://")
        assert server.client.get("/health").status_code == 200  # its connection stays
        server.process.terminate()
        began = time.monotonic()
        assert server.process.wait(60) == 0
        # asyncio waits 30 s for the good-bye of each.
        assert time.monotonic() - began < 25
