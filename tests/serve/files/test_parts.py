"""The folder of finished rows: who may join it, who waits, and how it becomes the output."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.disk.lock import Holder
from qwen_ds.errors import UserError
from serve.files import parts as module
from serve.files import ranks
from serve.files.claims import Claims
from serve.files.parts import (
    PredictionParts,
    Settings,
    file_state,
    first_difference,
    held_output,
    remove_parts,
)
from serve.files.ranks import RankWatch, SignOfLife
from tests.serve.files.test_prediction import read_lines
from tests.serve.files.test_ranks import until


def test_a_rank_that_comes_first_does_not_take_the_old_output_for_the_new_one(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run")
    settings, old = {"seed": 1}, file_state(output)
    with pytest.raises(RuntimeError, match="rank 0 did not make it"):
        PredictionParts.join_in(output, settings, 1, 0.01, old)
    with ThreadPoolExecutor() as pool:
        rank1 = pool.submit(PredictionParts.join_in, output, settings, 1, 60.0, old)
        zero = PredictionParts.prepare(output, settings, 2, overwrite=True)
        one = rank1.result()
    assert one is not None
    one.append([{"id": 1}])
    zero.append([{"id": 0}])
    one.close()
    zero.wait(60.0, lambda _: None)
    zero.join()
    remove_parts(output)
    assert [line["id"] for line in read_lines(output)] == [0, 1]
    assert PredictionParts.join_in(output, settings, 1, 0.01, old) is None  # too late: all is done


def test_settings_that_differ_are_named() -> None:
    ours: Settings = {"seed": 1, "model": ["m", 5]}
    assert first_difference(ours, {"seed": 1, "model": ["m", 5]}) is None
    assert first_difference(ours, {"seed": 2, "model": ["m", 5]}) == "seed 2 instead of 1"
    assert first_difference(ours, {"seed": 1}) == 'model null instead of ["m", 5]'


def three_rows(tmp_path: Path) -> Path:
    """The file of rank 0 after an interrupted run of four rows, of which three are done."""
    parts = PredictionParts.prepare(tmp_path / "out.jsonl", {}, 4, overwrite=False)
    parts.append([{"id": i, "prediction": f"答{i}"} for i in range(3)])
    parts.close()
    return parts.folder / "rank_00000.jsonl"


def resumed(tmp_path: Path) -> PredictionParts:
    return PredictionParts.prepare(tmp_path / "out.jsonl", {}, 4, overwrite=False)


# Damage to the second of three lines.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit in a text": lambda line: line.replace("答".encode(), "筕".encode()),
    "another row's id": lambda line: line.replace(b'"id": 1', b'"id": 3'),
    "an id beyond the rows": lambda line: line.replace(b'"id": 1', b'"id": 99'),
    "a negative id": lambda line: line.replace(b'"id": 1', b'"id": -1'),
    "an id that is true": lambda line: line.replace(b'"id": 1', b'"id": true'),
    "a text as id": lambda line: line.replace(b'"id": 1', b'"id": "1"'),
    "no id": lambda line: line.replace(b'"id"', b'"di"'),
    "no object": lambda line: b"[1]\n",
    "empty": lambda line: b"\n",
    "zeros": lambda line: bytes(len(line) - 1) + b"\n",
    "cut": lambda line: line[:20] + b"\n",
    "run into the next": lambda line: line[:-1],
    "no UTF-8": lambda line: line.replace("答".encode(), b"\xff\xfe\xfd"),
    "no checksum": lambda line: line[: line.index(b', "crc32"')] + b"}\n",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_line_is_left_out_and_its_row_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    file = three_rows(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = DAMAGE[what](lines[1])
    file.write_bytes(b"".join(lines))
    parts = resumed(tmp_path)
    parts.refresh()
    missing = [row for row in range(4) if not parts.is_finished(row)]
    assert missing == ([1, 2, 3] if what == "run into the next" else [1, 3])
    assert "a damaged line at byte" in capsys.readouterr().out
    parts.append([{"id": i, "prediction": f"答{i}"} for i in missing])
    parts.wait(60.0, lambda _: None)
    parts.join()
    assert read_lines(parts.output) == [{"id": i, "prediction": f"答{i}"} for i in range(4)]


def test_rows_of_an_earlier_release_have_no_checksum_and_count(tmp_path: Path) -> None:
    file = three_rows(tmp_path)
    rows = [{"id": i, "prediction": f"答{i}"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text + '{"id": 7}\n')
    (file.parent / "settings.json").write_text(json.dumps({"settings": {}, "rows": 4}))
    parts = resumed(tmp_path)
    assert parts.refresh() == 3
    parts.append([{"id": 3, "prediction": "答3"}])
    parts.wait(60.0, lambda _: None)
    parts.join()
    assert read_lines(parts.output) == [{"id": i, "prediction": f"答{i}"} for i in range(4)]


def test_rows_are_on_the_disk_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = resumed(tmp_path)
    synced: list[int] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(module.os, "fsync", seen)
    parts.append([{"id": 0}])
    (file,) = parts.folder.glob("rank_*.jsonl")
    assert synced == [file.stat().st_size] and synced[0] > 0
    parts.close()


def claims_of(parts: PredictionParts, rank: int) -> Claims:
    """The claims as a rank sees them: a block a row."""
    own = Holder("here", rank, "now")
    return Claims(parts.folder, rank, own, 4, 1, lambda rank: Holder("here", rank, "now"))


def test_rank_0_names_the_rank_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("LOOK", 0.02), ("BEAT", 0.05), ("SILENT", 1.0), ("ABSENT", 2.0)):
        monkeypatch.setattr(ranks, f"{name}_SECONDS", seconds)
    zero = resumed(tmp_path)
    watch = RankWatch(tmp_path / "out.jsonl", 2)
    zero.watch(watch, claims_of(zero, 0))
    zero.append([{"id": 0}, {"id": 2}])
    beat = SignOfLife(tmp_path / "out.jsonl", 1, Holder.this_process())
    one = PredictionParts.join_in(tmp_path / "out.jsonl", {}, 1, 60.0, None)
    assert one is not None
    taken = claims_of(one, 1)
    assert taken.take(1) and taken.take(3)
    one.append([{"id": 1}])
    until(lambda: watch._seen[1][2])
    beat._done.set()  # as a kill would stop it
    told = "rank 1 has given no sign of life .* and 1 of its rows are missing; the same command"
    with pytest.raises(RuntimeError, match=told):
        zero.wait(60.0, lambda _: None)
    zero.close()
    watch.stop()
    assert not list(tmp_path.glob("*.alive")), "nor is a killed rank's file left behind"


def test_a_rank_does_not_wait_for_a_rank_0_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("LOOK", 0.02), ("SILENT", 1.0), ("ABSENT", 2.0)):
        monkeypatch.setattr(ranks, f"{name}_SECONDS", seconds)
    watch = RankWatch(tmp_path / "out.jsonl", 3, rank=2)
    with pytest.raises(RuntimeError, match="rank 0 has given no sign of life .* has not begun"):
        PredictionParts.join_in(tmp_path / "out.jsonl", {}, 2, 60.0, None, watch)
    watch.stop()


def test_a_rank_that_has_done_its_share_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero, watch = resumed(tmp_path), RankWatch(tmp_path / "out.jsonl", 2)
    zero.watch(watch, claims_of(zero, 0))
    one = PredictionParts.join_in(tmp_path / "out.jsonl", {}, 1, 60.0, None)
    assert one is not None
    taken = claims_of(one, 1)
    assert taken.take(1) and taken.take(3)
    one.append([{"id": 1}, {"id": 3}])
    one.close()
    monkeypatch.setattr(watch, "gone", lambda: {1: "rank 1 has given no sign of life"})
    assert zero.refresh() == 2
    zero.close()
    watch.stop()


def _hold(output: str, ready: Any) -> None:
    with held_output(Path(output)):
        ready.set()
        signal.pause()


def test_the_second_writer_of_an_output_is_told_at_once_by_whom(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, output = context.Event(), tmp_path / "new" / "out.jsonl"
    other = context.Process(target=_hold, args=(str(output), ready))
    other.start()
    assert ready.wait(20)
    told = rf"out\.jsonl is being written by process {other.pid} on "
    with pytest.raises(UserError, match=told), held_output(output):
        pass
    other.kill()
    other.join()
    with held_output(output):
        assert output.parent.is_dir()
    assert not any(output.parent.iterdir())


def test_a_folder_made_for_the_lock_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with held_output(tmp_path / "a" / "b" / "out.jsonl"):
        pass
    assert not any(tmp_path.iterdir())
    with held_output(tmp_path / "a" / "out.jsonl"):
        (tmp_path / "a" / "out.jsonl").write_text("rows")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.jsonl"]


def test_a_rank_of_a_killed_run_that_still_lives_keeps_its_file(tmp_path: Path) -> None:
    file = three_rows(tmp_path)
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def straggler() -> None:
        parts = PredictionParts(tmp_path / "out.jsonl", 0, 4)
        ready.set()
        time.sleep(60)
        parts.close()

    other = context.Process(target=straggler)
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=f"{file.name}: another process is writing it"):
        resumed(tmp_path)
    other.kill()
    other.join()
    resumed(tmp_path).close()
