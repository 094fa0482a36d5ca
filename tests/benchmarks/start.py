"""The seconds that knowing its inputs adds to a start: a base of Qwen-7B's shape (15.44 GB) on a
warm disk, and a cache of token rows.

    python tests/benchmarks/start.py [--folder DIR] [--layers 32] [--rounds 3]

The base's files are holes but for their headers: once read they are zeros in the page cache, as a
warm disk has it, and take no room on the disk. Each round times, one after another,

    load     every tensor read into memory of its own, a file at a time: the least that a start does
    inspect  configuration, vocabulary and the headers of the weights, compared with each other
    begin    what a run keeps of its inputs: the quick hashes of the weights
    cache    the checksum of a gigabyte of token rows, once on each machine
    whole    every byte of the base, as the thread does it after the start

and prints their medians, and (load + inspect + begin + cache) / load: what all the looking costs
beside the least that a start does, even without the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from safetensors import safe_open

from qwen_ds.data.rows import row_file
from qwen_ds.demo.base import official_vocabulary
from qwen_ds.disk.shards import plan_shards, write_index
from qwen_ds.disk.weights import TensorSpec, header_bytes
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import inspect_folder
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train.survive.identity import Began, WholeFiles, files_of
from tests.benchmarks.merge import Shape

CACHE_BYTES = 1 << 30
SHARD_BYTES = 2_000_000_000


def write_base(folder: Path, shape: Shape, vocabulary: Path) -> None:
    """A checkpoint folder of zeros in bf16, without room on the disk."""
    folder.mkdir()
    specs = {name: TensorSpec(name, "BF16", size) for name, size in shape.tensors().items()}
    sizes = {name: spec.num_bytes for name, spec in specs.items()}
    plan = plan_shards(sizes, SHARD_BYTES)
    for file, names in plan.items():
        header = header_bytes([specs[name] for name in names], {})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(sizes[name] for name in names))
    if len(plan) > 1:
        write_index(folder, plan, sum(sizes.values()))
    config = QWenConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, kv_channels=shape.hidden // shape.heads,
        intermediate_size=2 * shape.inner,
    )  # fmt: skip
    config.save_pretrained(folder)
    shutil.copy(vocabulary, folder / "qwen.tiktoken")


def load(base: Path) -> None:
    """Read every tensor into memory of its own, and let go of it after its file."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name).clone()


def run_of(base: Path) -> Run:
    asked = load_recipe(["--model.path", str(base), "--device", "cpu"])
    return resolve(asked, Machine(1, 1, False, 1e12, ""), Base.read(base), rows=False)


def read_whole(run: Run, folder: Path) -> None:
    with WholeFiles(Began.of(run), files_of(run), folder / "identity.json") as reader:
        reader._thread.join()


def check_cache(file: Path) -> None:
    with file.open("rb") as opened:
        row_file._checksum(opened.fileno(), os.fstat(opened.fileno()).st_size)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, shape: Shape, vocabulary: Path, rounds: int) -> dict[str, float]:
    """Medians in seconds, the base's gigabytes, and the ratio (of round by round the median)."""
    base, cache = folder / "base", folder / "rows.arrow"
    write_base(base, shape, vocabulary)
    with cache.open("wb") as out:
        out.truncate(CACHE_BYTES)
    run = run_of(base)
    load(base)  # warms the page cache
    check_cache(cache)
    parts: dict[str, Callable[[], object]] = {
        "load": lambda: load(base),
        "inspect": lambda: inspect_folder(base),
        "begin": lambda: Began.of(run),
        "cache": lambda: check_cache(cache),
        "whole": lambda: read_whole(run, folder),
    }
    found = [{name: seconds_of(part) for name, part in parts.items()} for _ in range(rounds)]
    medians = {name: median(one[name] for one in found) for name in parts}
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    looks = ("inspect", "begin", "cache")
    ratio = median(1 + sum(one[look] for look in looks) / one["load"] for one in found)
    return {"gigabytes": size / 1e9, **medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        shape = Shape(layers=options.layers)
        found = measure(folder, shape, official_vocabulary(), options.rounds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
