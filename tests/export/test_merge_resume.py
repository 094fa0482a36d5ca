"""A merge that is stopped and given again: it goes on where it was, and only from what is still true."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qwen_ds.errors import UserError
from qwen_ds.export import merge as merge_module
from qwen_ds.export import merge_resume as resume
from qwen_ds.export.merge import merge
from qwen_ds.export.merge_report import MergeReport
from tests.export.folders import shard

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(base_dir: Path) -> Path:
    shard(base_dir, load_file(base_dir / "model.safetensors"), 3)
    return base_dir


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells how long it took; of that, what must not depend on how it came about."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("merge_report.json"))
    told = {
        key: value
        for key, value in report.items()
        if key not in ("seconds", "taken_over", "output")
    }
    return found | {"merge_report.json": json.dumps(told).encode()}


def run(base: Path, adapter: Path, output: Path, **options: Any) -> MergeReport:
    return merge(base, [adapter], output, **{"proof": "off", "block_bytes": 2000, **options})


def stop_in_shard_3(base: Path, adapter: Path, output: Path) -> None:
    """As Ctrl-C would, in the middle of the last file."""
    done_before = sum((base / name).stat().st_size for name in SHARDS[:2])

    def stop(done: int, total: int) -> None:
        if done > done_before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, adapter, output, progress=stop)
    assert not output.exists() or not any(output.iterdir())


@pytest.fixture
def stopped(sharded: Path, golden: Path, tmp_path: Path) -> Callable[..., MergeReport]:
    """A merge stopped in its last file; what is returned gives it again and compares it with one never stopped."""
    adapter = Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter"))
    (tmp_path / "out").mkdir()  # empty folders are no obstacle
    stop_in_shard_3(sharded, adapter, tmp_path / "out")

    def again(**options: Any) -> MergeReport:
        report = run(sharded, adapter, tmp_path / "out", **options)
        run(sharded, adapter, tmp_path / "straight", **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "straight")
        assert not (tmp_path / "out.partial").exists()
        return report

    return again


def test_finished_files_are_taken_over(stopped: Callable[..., MergeReport], tmp_path: Path) -> None:
    before = {name: (tmp_path / "out.partial" / "model" / name).stat() for name in SHARDS[:2]}
    seen: list[tuple[int, int]] = []
    report = stopped(progress=lambda done, total: seen.append((done, total)))
    assert report.taken_over == SHARDS[:2]
    for name, stat in before.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert seen[-1][0] == seen[-1][1]  # what was there already counts as done
    assert "2 files were there already" in "\n".join(report.in_words())


def test_a_finished_file_that_was_spoilt_is_written_again(
    stopped: Callable[..., MergeReport], tmp_path: Path
) -> None:
    with (tmp_path / "out.partial" / "model" / SHARDS[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert stopped().taken_over == SHARDS[1:2]


def test_other_options_start_over(stopped: Callable[..., MergeReport]) -> None:
    assert stopped(dtype="bfloat16").taken_over == []


def test_weights_start_over(stopped: Callable[..., MergeReport]) -> None:
    assert stopped(weights=[0.5]).taken_over == []


def test_another_adapter_starts_over(stopped: Callable[..., MergeReport], tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    assert stopped().taken_over == []


def test_a_base_that_only_its_bytes_tell_from_the_old_one_starts_over(
    stopped: Callable[..., MergeReport], sharded: Path
) -> None:
    """Same size, same time: what the finished files were made from is held by its checksum."""
    path = sharded / SHARDS[1]
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3d")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stopped().taken_over == []


def test_a_small_file_that_is_gone_from_the_base_does_not_come_along(
    stopped: Callable[..., MergeReport], tmp_path: Path
) -> None:
    (tmp_path / "out.partial" / "model" / "NOTICE").write_text("of an earlier day")
    assert stopped().taken_over == SHARDS[:2]
    assert not (tmp_path / "out" / "NOTICE").exists()


def test_only_what_is_left_must_fit_on_the_disk(
    stopped: Callable[..., MergeReport],
    sharded: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(
        free=int(1.1 * (sharded / SHARDS[2]).stat().st_size)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run(sharded, tmp_path / "adapter", tmp_path / "out").taken_over == SHARDS[:2]


def test_a_merge_stopped_in_its_proof_has_only_that_left(
    sharded: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    adapter = golden / "lora" / "adapter"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge_module, "verify_merge", stop)
        run(sharded, adapter, tmp_path / "out", proof="sampled")
    assert not (tmp_path / "out").exists()
    report = run(sharded, adapter, tmp_path / "out", proof="sampled")
    assert report.taken_over == SHARDS and report.verification is not None


def test_finished_work_outlives_an_error_that_is_not_its_own(
    sharded: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one at the very end, where the output gets its name."""
    adapter = golden / "lora" / "adapter"
    for where in ("_write_small_files", "publish"):

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"Input/output error; .*goes on from there"),
        ):
            patch.setattr(merge_module if where != "publish" else resume, where, fail)
            run(sharded, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert run(sharded, adapter, tmp_path / "out").taken_over == SHARDS
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_two_merges_never_build_the_same_output(
    sharded: Path, golden: Path, tmp_path: Path
) -> None:
    adapter, refused = golden / "lora" / "adapter", []

    def meanwhile(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(
                UserError, match=r"out\.partial: another merge is building this output"
            ) as caught:
                run(sharded, adapter, tmp_path / "out")
            refused.append(caught.value)

    run(sharded, adapter, tmp_path / "out", progress=meanwhile)
    run(sharded, adapter, tmp_path / "straight")
    assert refused and contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_what_a_kill_leaves_of_a_removal_is_taken_for_a_merge_s(
    sharded: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = golden / "lora" / "adapter"
    removals = 0
    while not (tmp_path / "out").exists():
        stop_in_shard_3(sharded, adapter, tmp_path / "out")
        left = removals

        def hook(path: Path, **_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            os.unlink(path)

        # A dtype of its own starts over: what is there is removed.
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", hook)
            try:
                run(sharded, adapter, tmp_path / "out", dtype="float16")
            except KeyboardInterrupt:
                removals += 1
    assert removals >= 4  # files of the output, in the end the note
    with pytest.raises(UserError, match="out: exists and is not empty"):
        run(sharded, adapter, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


# Forks a merge for each number given, and kills it with SIGKILL at that many file operations and finished blocks.
KILLED = """
import os, signal, sys
from pathlib import Path
from qwen_ds.export.merge import merge

base, adapter, folder = map(Path, sys.argv[1:4])

def run(number, limit):
    output, count = folder / f"out{number}", 0

    def tick(*_):
        nonlocal count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod") and str(args[0]).startswith(str(output)):
            tick()

    sys.addaudithook(hook)
    merge(base, [adapter], output, proof="off", block_bytes=4000, progress=tick)
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
def test_killed_at_any_instant_the_rerun_s_output_is_the_same_bit_for_bit(
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
    limits = [
        *random.Random(0).sample(range(1, int(instants)), 10),
        int(instants) - 1,
        int(instants),
    ]
    taken_over = set()
    for number, (status, _) in enumerate(killed(*limits)):
        output = tmp_path / f"out{number}"
        assert status == str(int(signal.SIGKILL)), f"killed at {limits[number]} of {instants}"
        if output.exists():
            assert contents(output) == straight
            continue
        report = run(sharded, adapter, output, block_bytes=4000)
        taken_over.add(len(report.taken_over))
        assert contents(output) == straight
        assert not (tmp_path / f"out{number}.partial").exists()
    assert {0, 1, 2} <= taken_over  # the instants lay within the work
