"""Seconds and memory that the data doctor takes for a million rows of 240 characters.

    python tests/benchmarks/doctor.py [--rows 1000000] [--folder DIR]

Rows are sentences of drawn words; one in fifty repeats another, nearly repeats one, or is damaged.
Prints, as JSON, the rows, the seconds of the whole command from start to end, rows a second, CPU
seconds of all its processes, and the largest sum over these processes of the memory that each holds
alone and its share of what several hold (PSS), and of what each has mapped (RSS), in MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHARS = 240
DAMAGES = ("<|im_end|>", "锟斤拷", "\u200b", "<br>", "13812345678", "\\n", "ã\x81¯", "（")


def words(count: int, rng: random.Random) -> list[str]:
    """Words of one to three common characters (GB 2312, level 1)."""
    chars = [
        bytes((lead, trail)).decode("gb2312")
        for lead in range(0xB0, 0xD7)
        for trail in range(0xA1, 0xF9)
    ]
    return ["".join(rng.choices(chars, k=rng.choice((1, 2, 2, 2, 3)))) for _ in range(count)]


def text(size: int, known: list[str], rng: random.Random) -> str:
    """Sentences of at least `size` characters, cut to it and ended."""
    parts: list[str] = []
    length = 0
    while length < size:
        chosen = rng.choices(known, k=rng.randint(4, 9))
        parts += ["".join(chosen), rng.choice("，，。")]
        length += sum(map(len, chosen)) + 1
    return "".join(parts)[: size - 1] + "。"


def write_rows(path: Path, count: int, seed: int = 1) -> None:
    """Write rows of CHARS characters, a quarter of them the question's."""
    rng = random.Random(seed)
    known = words(20_000, rng)
    earlier: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "instruction": text(CHARS // 4, known, rng),
                "output": text(CHARS - CHARS // 4, known, rng),
            }
            if number % 50 == 49:
                row = earlier[rng.randrange(len(earlier))].copy()
                if number % 150 == 49:
                    row["output"] = row["output"][:100] + rng.choice(known) + row["output"][100:]
                elif number % 150 == 99:
                    row["output"] = row["output"][:100] + rng.choice(DAMAGES) + row["output"][100:]
            elif number % 50 == 0:
                earlier.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def memory_mb(pid: int) -> tuple[float, float]:
    """(PSS, RSS) of a process and all below it."""
    pss = rss = 0
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue
        sizes = dict(line.split(":") for line in rollup.splitlines()[1:])
        pss += int(sizes["Pss"].split()[0])
        rss += int(sizes["Rss"].split()[0])
    return pss / 1000, rss / 1000


def measure(file: Path, output: Path, rows: int) -> dict[str, float]:
    """Run the command once on the file, with all of its outputs."""
    options = [str(file), "--output", str(output), "--write", str(output / "clean.jsonl")]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "qwen_ds.data", "check", *options]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    pss = rss = 0.0
    while run.poll() is None:
        now = memory_mb(run.pid)
        pss, rss = max(pss, now[0]), max(rss, now[1])
        time.sleep(0.25)
    seconds = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(f"the check ended with {run.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "cpu_seconds": round(cpu, 1),
        "pss_mb": round(pss),
        "rss_mb": round(rss),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keeps rows.jsonl from one run to the next")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = (args.folder or Path(scratch)) / f"rows_{args.rows}.jsonl"
        if not file.exists():
            write_rows(file, args.rows)
        print(json.dumps(measure(file, Path(scratch) / "out", args.rows)))


if __name__ == "__main__":
    main()
