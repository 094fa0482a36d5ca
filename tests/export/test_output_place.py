"""The place where a merge builds: after a kill the same command gives the undisturbed output."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen_ds.errors import UserError
from qwen_ds.export import merge as merge_module
from qwen_ds.export.build import ShowProgress
from qwen_ds.export.output_place import building
from tests.export.folders import merge_with, shard

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(base_dir: Path) -> Path:
    shard(base_dir, load_file(base_dir / "model.safetensors"), 3)
    return base_dir


def contents(folder: Path) -> dict[str, bytes]:
    """All files; of the report, only the part that does not depend on place and time."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("merge_report.json"))
    told = {key: value for key, value in report.items() if key not in ("seconds", "output")}
    return found | {"merge_report.json": json.dumps(told).encode()}


def run(base: Path, adapter: Path, output: Path, progress: ShowProgress | None = None) -> None:
    merge_with(base, [adapter], output, block_bytes=4000, progress=progress)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_interrupted_merge_leaves_nothing(sharded: Path, golden: Path, tmp_path: Path) -> None:
    """As by Ctrl-C, in the middle of the last file; an empty folder is no obstacle, and stays."""
    (tmp_path / "out").mkdir()
    done_before = sum((sharded / name).stat().st_size for name in SHARDS[:2])

    def stop(done: int, total: int) -> None:
        if done > done_before:
            assert set(SHARDS) <= names(tmp_path / "out.partial" / "model")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sharded, golden / "lora" / "adapter", tmp_path / "out", stop)
    assert names(tmp_path) == {"base", "out"} and not names(tmp_path / "out")
    run(sharded, golden / "lora" / "adapter", tmp_path / "out")
    assert set(SHARDS) <= names(tmp_path / "out")


@pytest.mark.parametrize("where", ["build_files", "publish"])
def test_an_error_of_the_disk_is_one_line_and_leaves_nothing(
    sharded: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also at the very end, where the output gets its name."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(merge_module, where, fail)
    with pytest.raises(
        UserError, match="Input/output error; expected files that can be read.* takes .*out$"
    ):
        run(sharded, golden / "lora" / "adapter", tmp_path / "out")
    assert names(tmp_path) == {"base"}


def test_two_merges_never_build_the_same_output(
    sharded: Path, golden: Path, tmp_path: Path
) -> None:
    adapter, refused = golden / "lora" / "adapter", []

    def meanwhile(done: int, total: int) -> None:
        if not refused:
            message = r"out\.partial: another merge is building this output"
            with pytest.raises(UserError, match=message) as caught:
                run(sharded, adapter, tmp_path / "out")
            refused.append(caught.value)

    run(sharded, adapter, tmp_path / "out", meanwhile)
    run(sharded, adapter, tmp_path / "straight")
    assert refused and contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_killed_merge_s_rest_makes_room_and_anything_else_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    (place / "model").mkdir(parents=True)
    (place / "model" / SHARDS[0]).write_text("half")
    with (
        pytest.raises(UserError, match=r"out\.partial: in the way and not a killed merge's"),
        building(tmp_path / "out"),
    ):
        pass
    assert (place / "model" / SHARDS[0]).read_text() == "half"
    for name in ("merge.lock", "notes.txt"):
        (place / name).touch()
    with pytest.raises(UserError, match="in the way"), building(tmp_path / "out"):
        pass
    (place / "notes.txt").unlink()
    with building(tmp_path / "out") as folder:
        assert folder == place / "model" and not names(folder)
    assert not place.exists()
    place.mkdir()  # killed before the lock was there
    with building(tmp_path / "out"):
        pass
    assert not place.exists()


@pytest.mark.parametrize("removals", range(3))
def test_a_kill_during_the_clearing_leaves_what_is_known_as_a_merge_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removals: int
) -> None:
    """Two files of the output, then the lock: the kill comes after none, one or both files."""
    place, left = tmp_path / "out.partial", removals
    (place / "model").mkdir(parents=True)
    for name in ("merge.lock", "model/a", "model/b"):
        (place / name).touch()

    def hook(path: str, *_: object, original: object = os.unlink, **options: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(path, **options)  # type: ignore[operator]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", hook)
        with building(tmp_path / "out"):
            pass
    assert (place / "merge.lock").exists()
    with building(tmp_path / "out") as folder:
        assert not names(folder)
    assert not place.exists()


# Forks a merge for each number given, and kills it with SIGKILL at that many file operations and
# finished blocks.
KILLED = """
import os, signal, sys
from pathlib import Path
from qwen_ds.export.merge import MergeOptions, merge

base, adapter, folder = map(Path, sys.argv[1:4])
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")

def run(number, limit):
    output, count = folder / f"out{number}", 0

    def tick(*_):
        nonlocal count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in WATCHED and str(args[0]).startswith(str(output)):
            tick()

    sys.addaudithook(hook)
    merge(base, [adapter], output, MergeOptions(proof="off", block_bytes=4000), tick)
    return count

for number, limit in enumerate(map(int, sys.argv[4:])):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(run(number, limit)).encode())
        os._exit(0)
    os.close(write)
    print(os.waitpid(child, 0)[1], os.read(read, 20).decode() or "-")
"""


@pytest.mark.job
def test_killed_at_any_instant_the_same_command_gives_the_same_output_bit_for_bit(
    sharded: Path, golden: Path, tmp_path: Path
) -> None:
    adapter = golden / "lora" / "adapter"

    def killed(*limits: int) -> list[list[str]]:
        command = [sys.executable, "-c", KILLED, *map(str, (sharded, adapter, tmp_path, *limits))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    ((status, instants),) = killed(0)
    assert status == "0" and int(instants) > 200
    straight = contents(tmp_path / "out0")
    shutil.rmtree(tmp_path / "out0")
    # The last ones are where the output gets its name.
    last = [int(instants) - 1, int(instants)]
    limits = [*random.Random(0).sample(range(1, int(instants)), 10), *last]
    unfinished = 0
    for number, (status, _) in enumerate(killed(*limits)):
        output = tmp_path / f"out{number}"
        assert status == str(int(signal.SIGKILL)), f"killed at {limits[number]} of {instants}"
        if not output.exists():
            unfinished += 1
            run(sharded, adapter, output)
            assert not (tmp_path / f"out{number}.partial").exists()
        assert contents(output) == straight
    assert unfinished >= 8  # the instants lay within the work
