"""The folder of finished rows: who may join it, who waits, and how it becomes the output."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.files.parts import PredictionParts, Settings, file_state, first_difference
from tests.serve.files.test_prediction import read_lines


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
    assert [line["id"] for line in read_lines(output)] == [0, 1]
    assert PredictionParts.join_in(output, settings, 1, 0.01, old) is None  # too late: all is done


def test_settings_that_differ_are_named() -> None:
    ours: Settings = {"seed": 1, "model": ["m", 5]}
    assert first_difference(ours, {"seed": 1, "model": ["m", 5]}) is None
    assert first_difference(ours, {"seed": 2, "model": ["m", 5]}) == "seed 2 instead of 1"
    assert first_difference(ours, {"seed": 1}) == 'model null instead of ["m", 5]'
