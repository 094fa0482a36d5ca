"""Wrong and hostile inputs as tables: each member is a command over files made for it, and how it
must end.

A command runs in a child with limits on time and memory. Whatever the input, the child writes
nothing outside its `out` folder, imports no planted module, and prints no traceback; exit code 2
comes with exactly one line on stderr.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.jobs import ROOT, fork

SECONDS = 20  # of the CPU: on a busy machine a command takes longer, and is as good
PATIENCE = 180.0  # seconds for a command that waits for something
MEMORY = 4 << 30  # bytes beyond the interpreter's own
PLANTED = "planted_module"  # a module on the child's path that leaves a mark when it is imported

COMMANDS = {
    "train": "launch/train.py",
    "plan": "launch/plan.py",
    "merge": "launch/merge.py",
    "data": "qwen_ds.data",
    "predict": "serve.predict",
    "evaluate": "serve.evaluate",
}


@dataclass(frozen=True)
class Place:
    """A member's own folders: inputs are made in `here`, `out` is all that a command may change."""

    here: Path
    small: Path
    """A checkpoint folder to copy: hidden 64, 3 layers, 512 rows, a vocabulary of bytes."""

    @property
    def out(self) -> Path:
        return self.here / "out"

    def base(self, name: str = "base", **config: Any) -> Path:
        """A copy of the small model; `config` overwrites keys of config.json, ... removes one."""
        folder = self.here / name
        shutil.copytree(self.small, folder)
        if config:
            self.edit_json(folder / "config.json", config)
        return folder

    def edit_json(self, file: Path, changes: Mapping[str, Any]) -> None:
        content = json.loads(file.read_text())
        for key, value in changes.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value
        file.write_text(json.dumps(content))

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def json(self, name: str, content: Any) -> Path:
        return self.file(name, json.dumps(content, ensure_ascii=False))

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """JSON lines; without rows, eight that are right."""
        right = [{"content": f"q{i}", "summary": f"a{i}"} for i in range(8)]
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows or right))


@dataclass(frozen=True)
class Member:
    """One input: `make` builds it and returns the command line, command name first."""

    name: str
    make: Callable[[Place], Sequence[str | Path]]
    code: int = 2
    says: Sequence[str] = ()
    """Parts of stderr (code 2) or of all output (any other code)."""
    leaves: Callable[[Place], bool] | None = field(default=None)
    """A property of what the command leaves behind."""


@dataclass(frozen=True)
class Ended:
    code: int | None
    out: str
    err: str
    seconds: float
    peak: int
    """Most bytes resident, beyond those that the child began with."""


def run(arguments: Sequence[str | Path], place: Place, cpu_seconds: int = SECONDS) -> Ended:
    """Run a command, or a script of a test's own, over a member's files, under the limits."""
    place.out.mkdir(exist_ok=True)
    files = [place.here / name for name in ("stdout", "stderr", "peak")]
    for file in files:
        file.write_text("")
    planted = place.here / "planted"
    planted.mkdir(exist_ok=True)
    (planted / f"{PLANTED}.py").write_text(
        f"from pathlib import Path\nPath({str(place.here / 'imported')!r}).touch()\n"
        "class Options: pass\n"
    )
    _warm_up()
    started = time.monotonic()
    process = fork(_child, [*map(str, arguments)], [*map(str, files)], str(planted), cpu_seconds)
    process.join(PATIENCE)
    seconds = time.monotonic() - started
    if process.is_alive():
        process.kill()
        process.join()
    out, err, peak = (file.read_text(errors="replace") for file in files)
    return Ended(process.exitcode, out, err, seconds, int(peak or 0))


@cache
def _warm_up() -> None:
    """Wait once for the process that has everything imported: no member pays for that."""
    process = fork(time.sleep, 0)
    process.join()


def _child(arguments: Sequence[str], files: Sequence[str], planted: str, cpu_seconds: int) -> None:
    command, *options = arguments
    for path, descriptor in zip(files[:2], (1, 2), strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), planted]
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    began = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (began + MEMORY, began + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resident = _status("VmRSS")
    try:
        script = COMMANDS.get(command, command)
        sys.argv = [script, *options]
        if script.endswith(".py"):
            sys.argv[0] = str(ROOT / script)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.modules.pop(script, None)  # imported before the fork: runpy would warn of it
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    finally:
        Path(files[2]).write_text(str(max(0, _status("VmHWM") - resident)))


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _snapshot(place: Place) -> dict[str, tuple[int, int]]:
    """Every file and folder of a member outside `out`: size and time of the last change."""
    ours = {"out", "stdout", "stderr", "peak", "planted"}
    found = {}
    for root, folders, files in os.walk(place.here):
        if Path(root) == place.here:
            folders[:] = [name for name in folders if name not in ours]
            files = [name for name in files if name not in ours]
        for name in (*folders, *files):
            about = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = (about.st_size, about.st_mtime_ns)
    return found


def check(member: Member, here: Path, small: Path, cpu_seconds: int = SECONDS) -> None:
    """Run a member and assert its outcome, and what holds for every input."""
    place = Place(here, small)
    arguments = member.make(place)
    before = _snapshot(place)
    ended = run(arguments, place, cpu_seconds)
    seen = f"{member.name}: exit {ended.code} after {ended.seconds:.1f} s\n{ended.err[-3000:]}"
    assert ended.seconds < PATIENCE, seen
    assert ended.code == member.code, seen + ended.out[-1000:]
    assert "Traceback" not in ended.out + ended.err, seen
    assert ended.peak < MEMORY, seen
    assert not (here / "imported").exists(), f"{seen}: imported the planted module"
    after = _snapshot(place)
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    # A folder's own time changes with what is in it, and that is compared by itself.
    changed = {path for path in changed if path not in before or not os.path.isdir(path)}
    assert not changed, f"{seen}: changed {sorted(changed)}"
    told = ended.err if member.code == 2 else ended.out + ended.err
    for part in member.says:
        assert part in told, f"{part!r} is not said: {seen}"
    if member.code == 2:
        assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), seen
    if member.leaves is not None:
        assert member.leaves(place), seen
