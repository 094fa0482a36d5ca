"""Speed of the HTTP API: beside its own engine, and with two engines on two cores.

    python -m tests.benchmarks.api [--rounds 3] [--json api.json]

A model of 85M parameters in bf16 (12 layers of 768) with the tests' small vocabulary, random
weights, saved once. 256 greedy requests with the lengths of Chinese instruction data, 32 at a time
for each engine, all streamed: enough for two engines to be full as long as one is. Contenders take
turns within a round; ratios are taken round by round, and the table shows medians. Every engine,
that in Python too, has one thread. The client is plain asyncio, and shares the machine with the
server, so that figures say how many cores that has.

    overhead  tokens/s of the API with one engine, to those of the same engine called in Python
    engines   tokens/s of the API with two engines of one thread, to those with one
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from qwen_ds.decode.request import Request
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from serve.engine.engine import ServingEngine, stream
from serve.engine.loading import load_engine
from tests.benchmarks.serve import GREEDY, Sizes, make_requests
from tests.serve.api.running import running

VOCABULARY = Path(__file__).parents[1] / "golden" / "small"
ORDINARY = 304  # tokens of the small vocabulary that are no control tokens
SLOTS = 32
THREADS = 1  # of each engine
BARS = {"overhead": 0.95, "engines": 1.7}


@dataclass(frozen=True, slots=True)
class Shape:
    """The model and the requests; a test makes them tiny."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 4096
    requests: int = 256
    longest_prompt: int = 200
    longest_answer: int = 400

    def save(self, folder: Path) -> None:
        """Write a checkpoint of this shape."""
        torch.manual_seed(0)
        config = QWenConfig(
            vocab_size=512, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, kv_channels=self.hidden // self.heads,
            intermediate_size=self.intermediate, seq_length=2048, use_dynamic_ntk=True,
            use_logn_attn=True,
        )  # fmt: skip
        QWenLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
        for name, own in (("mini.tiktoken", "qwen.tiktoken"),) + tuple(
            (name, name) for name in ("tokenizer_config.json", "generation_config.json")
        ):
            if (VOCABULARY / name).exists():
                shutil.copy(VOCABULARY / name, folder / own)

    def asked(self) -> list[Request]:
        sizes = Sizes(
            requests=self.requests, vocab=ORDINARY, longest_prompt=self.longest_prompt,
            longest_answer=self.longest_answer,
        )  # fmt: skip
        return make_requests(sizes, GREEDY)


def in_python(engine: ServingEngine, requests: Sequence[Request]) -> tuple[int, float]:
    """Tokens and seconds of the engine by itself."""
    decoding = engine.start(SLOTS, memory_gb=1.0)
    began = time.perf_counter()
    answers = [answer for _, answer in stream(decoding, requests)]
    seconds = time.perf_counter() - began
    return decoding.figures.generated_tokens if answers else 0, seconds


def over_http(url: str, requests: Sequence[Request], clients: int = SLOTS) -> tuple[int, float]:
    """Tokens and seconds of the API, asked by so many clients at a time."""
    began = time.perf_counter()
    tokens = asyncio.run(_ask_all(url, requests, clients))
    return tokens, time.perf_counter() - began


async def _ask_all(url: str, requests: Sequence[Request], clients: int) -> int:
    waiting = iter(requests)

    async def client() -> int:
        return sum([await _ask(url, request) for request in waiting])

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


async def _ask(url: str, request: Request) -> int:
    """One streamed completion; the tokens that the server counts."""
    body = {
        "prompt": list(request.prompt), "max_tokens": request.sampling.max_new_tokens,
        "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    raw, place = json.dumps(body).encode(), httpx.URL(url)
    reader, writer = await asyncio.open_connection(place.host, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.host}:{place.port}\r\n"
    head += f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + raw)
    usage = b""
    async for line in reader:
        if b'"usage"' in line:
            usage = line
    writer.close()
    assert usage, "the answer broke off"
    return int(json.loads(usage[usage.index(b"{") :])["usage"]["completion_tokens"])


@contextmanager
def serving(folder: Path, engines: int) -> Iterator[str]:
    words = ["--model", str(folder), "--device", "cpu", "--memory_gb", "1", "--slots", str(SLOTS)]
    with running(*words, "--engines", str(engines), threads=THREADS) as server:
        over_http(server.url, [Request([1, 2], GREEDY, None)])  # type: ignore[arg-type]
        yield server.url


def measure(shape: Shape, rounds: int) -> list[dict[str, float]]:
    """Tokens a second of each contender, round by round."""
    torch.set_num_threads(THREADS)
    requests, found = shape.asked(), []
    asked = sum(request.sampling.max_new_tokens for request in requests)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape.save(folder)
        engine = load_engine(folder, device="cpu")
        with serving(folder, 1) as one, serving(folder, 2) as two:
            for _ in range(rounds):
                figures: dict[str, float] = {}
                for name, ran in (
                    ("python", lambda: in_python(engine, requests)),
                    ("one engine", lambda: over_http(one, requests)),
                    ("two engines", lambda: over_http(two, requests, 2 * SLOTS)),
                ):
                    tokens, seconds = ran()
                    assert tokens == asked, f"{name}: {tokens} tokens of {asked}"
                    figures[name] = tokens / seconds
                found.append(figures)
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def table(found: Sequence[dict[str, float]]) -> str:
    """The medians, and the ratios beside their bars."""
    lines = [f"{cores()} cores, {THREADS} thread for each engine"]
    lines += [f"{name}: {median(f[name] for f in found):.1f} tokens/s" for name in found[0]]
    ratios = {
        "overhead": [f["one engine"] / f["python"] for f in found],
        "engines": [f["two engines"] / f["one engine"] for f in found],
    }
    for name, values in ratios.items():
        verdict = "met" if median(values) >= BARS[name] else "missed"
        lines.append(f"{name}: {median(values):.2f} x (bar: {BARS[name]} x, {verdict})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, shape: Shape | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures of every round")
    options = parser.parse_args(argv)
    shape = shape or Shape()
    found = measure(shape, options.rounds)
    print(table(found))
    if options.json is not None:
        machine = {"cores": cores(), "threads": THREADS}
        result: dict[str, Any] = {"shape": asdict(shape), **machine, "rounds": found}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
