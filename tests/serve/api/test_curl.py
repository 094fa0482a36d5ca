"""The command of the documents, run as it stands there: curl is the client that everybody has."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.api.running import Running, events

DOCUMENTS = Path(__file__).parents[3] / "docs"
ADDRESS, MODEL = "http://127.0.0.1:8044", "zh"


def documented(document: str) -> list[str]:
    """The words of a document's one curl command for chats."""
    text = (DOCUMENTS / document).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [one for one in text.splitlines() if one.startswith(f"curl {ADDRESS}/v1/chat")]
    return shlex.split(line)


@pytest.mark.job
@pytest.mark.parametrize("document", ["serving.md", "zh/serving.md"])
def test_the_documented_command_streams_an_answer(server: Running, document: str) -> None:
    if shutil.which("curl") is None:
        pytest.fail("curl is missing; apt-get install curl gives it", pytrace=False)
    words = [word.replace(ADDRESS, server.url) for word in documented(document)]
    (body,) = [i for i, word in enumerate(words) if word.startswith("{")]
    assert f'"model": "{MODEL}"' in words[body]
    words[body] = words[body].replace(f'"{MODEL}"', '"qwen", "max_tokens": 5, "ignore_eos": true')
    done = subprocess.run(
        [*words, "--no-progress-meter"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr
    found = events(iter(done.stdout.splitlines()))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert {chunk["model"] for chunk in found} == {"qwen"}
