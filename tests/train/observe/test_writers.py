"""A tracker may fail, hang or come late; the training and the other trackers never notice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import DataOptions, LoraOptions, OptimOptions, Recipe
from qwen_ds.train.observe import writers
from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import Ending, Guarded, InBackground, Writers, settings_of


class Notes:
    """A Writer that notes its calls; `breaks` is called before each of them."""

    def __init__(self, run_id: str | None = None, breaks: Callable[[], object] = int) -> None:
        self.run_id, self._breaks = run_id, breaks
        self.calls: list[Any] = []

    def _note(self, *call: object) -> None:
        self._breaks()
        self.calls.append(call)

    def start(self) -> str:
        self._note("start")
        return "over there"

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        self._note("lengths", {tag: lengths_N.tolist() for tag, lengths_N in values.items()})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._note(step, dict(values))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._note(step, list(samples))

    def close(self, ending: Ending) -> None:
        self._note("close", ending)


class Failing(Notes):
    """Takes two steps."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if step > 2:
            raise ConnectionError("the server\nis gone")
        super().numbers(step, values)


ALL = [
    ("start",), ("lengths", {"data/tokens": [3, 4], "data/target_tokens": [1, 2]}),
    (1, {"train/loss": 1.0}), (2, {"train/loss": 2.0}),
    (3, {"train/loss": 3.0}), (4, {"train/loss": 4.0}), (4, [Sample("q", "a", "r")]),
    ("close", "finished"),
]  # fmt: skip


def run(found: Writers) -> None:
    found.lengths(np.array([3, 4]), np.array([1, 2]))
    for step in range(1, 5):
        found.numbers(step, {"train/loss": float(step)})
    found.samples(4, [Sample("q", "a", "r")])
    found.close("finished")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(writers, "say", lines.append)
    return lines


@pytest.mark.parametrize("kind", [Guarded, InBackground])
def test_one_that_fails_ends_its_own_curve_with_one_line(
    kind: type[Guarded], said: list[str]
) -> None:
    good, bad = Notes(), Failing("id 7")
    both = Writers([kind("bad", lambda: bad), kind("good", lambda: good)])
    run(both)
    assert good.calls == ALL
    assert bad.calls == ALL[:4]
    assert said == [
        "bad: over there", "good: over there",
        "bad is given up, and the training goes on: the server is gone",
    ]  # fmt: skip
    assert both.known_as() == {"bad": "id 7"}, "a resumed run tries again, under the same id"


@pytest.mark.parametrize("kind", [Guarded, InBackground])
def test_one_that_cannot_begin_is_given_up_before_the_first_step(
    kind: type[Guarded], said: list[str]
) -> None:
    def missing() -> Notes:
        raise ImportError("no module of that name")

    found = Writers([kind("lost", missing, "id 3")])
    run(found)
    assert said == ["lost is given up, and the training goes on: no module of that name"]
    assert found.known_as() == {"lost": "id 3"}


def test_one_that_hangs_holds_up_nothing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the steps, nor, beyond some seconds, the end; the others get everything."""
    monkeypatch.setattr(writers, "SECONDS_TO_START", 0.01)
    monkeypatch.setattr(writers, "SECONDS_AT_END", {"finished": 0.05})
    released = threading.Event()
    stuck, good = Notes(breaks=released.wait), Notes()
    hanging = InBackground("stuck", lambda: stuck)
    run(Writers([hanging, InBackground("good", lambda: good)]))
    assert good.calls == ALL
    assert [line for line in said if "stuck" in line] == [
        "stuck has not taken everything in 0.01 s; the rest is lost"
    ]
    released.set()
    hanging._thread.join()


def test_one_that_falls_behind_for_ever_is_given_up(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it does not fill the memory."""
    monkeypatch.setattr(writers, "SECONDS_TO_START", 0.01)
    monkeypatch.setattr(writers, "MAX_WAITING", 3)
    released = threading.Event()
    slow = InBackground("slow", lambda: Notes(breaks=released.wait))
    for step in range(20):
        Writers([slow]).numbers(step, {})
    released.set()
    slow.close("stopped")
    assert said[:1] == ["slow is given up, and the training goes on: it has not taken 3 lines"]


def test_the_settings_are_flat_and_plain_and_decide_numbers(tmp_path: Path) -> None:
    words = "--optim.lr 0.001 --lora.r 4 --log.trackers wandb --output_dir x --model.compile true"
    recipe = load_recipe(words.split()).recipe
    found = settings_of(recipe, ranks=2, zero_stage=3)
    wanted = {
        "optim.lr": 0.001, "lora.r": 4, "model.compile": True, "method": "lora", "seed": 42,
        "optim.betas": "0.9, 0.999", "lora.targets": "c_attn, c_proj", "ranks": 2, "zero_stage": 3,
    }  # fmt: skip
    assert wanted.items() <= found.items()
    assert {type(value) for value in found.values()} <= {bool, int, float, str}
    names = " ".join(found)
    assert "output_dir" not in names and "log." not in names and "cache_dir" not in names
    full = settings_of(Recipe(method="full", lora=LoraOptions(r=9)), ranks=1, zero_stage=0)
    assert not any(name.startswith("lora.") for name in full)
    listed = Recipe(data=DataOptions(columns={"instruction": "q"}), optim=OptimOptions())
    assert settings_of(listed, 1, 0)["data.columns"] == "{'instruction': 'q'}"
