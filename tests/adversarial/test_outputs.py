"""Outputs that are wrong or hostile: one line, and nothing of the user's is written over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.adversarial.harness import Member, Place, check
from tests.conftest import GOLDEN

Words = Sequence[str | Path]
FAST = ("--max_new_tokens", "3", "--device", "cpu")
ADAPTER = GOLDEN / "lora" / "adapter"


def predict(place: Place, output: str | Path, *more: str | Path) -> Words:
    rows = place.here / "rows.jsonl"
    given = rows if rows.exists() else place.rows()
    return ["predict", "--model", place.small, "--input", given, "--output", output, *FAST, *more]


def evaluate(place: Place, folder: Path, *more: str | Path) -> Words:
    words = ["evaluate", "--model", place.small, "--data", place.rows(), "--output_dir", folder]
    return [*words, *FAST, *more]


def train(place: Place, folder: str | Path, *more: str | Path) -> Words:
    words = ["train", "--model.path", place.small, "--data.train", place.rows()]
    words += ["--output_dir", folder, "--data.cache_dir", place.out / "cache"]
    return [*words, "--dry_run", "true", "--optim.max_steps", "1", *more]


def merge(place: Place, output: str | Path, *more: str | Path) -> Words:
    return ["merge", "--base", place.small, "--adapter", ADAPTER, "--output", output, *more]


def encode(place: Place, output: str | Path, *more: str | Path) -> Words:
    words = ["data", "encode", "--model.path", place.small, "--data.train", place.rows()]
    return [*words, "--data.cache_dir", place.out / "cache", "--output", output, *more]


def loop(place: Place, name: str = "loop") -> Path:
    (place.here / name).symlink_to(place.here / "back")
    (place.here / "back").symlink_to(place.here / name)
    return place.here / name


def link(place: Place, name: str, to: str | Path) -> Path:
    (place.here / name).parent.mkdir(parents=True, exist_ok=True)
    (place.here / name).symlink_to(to)
    return place.here / name


def fifo(place: Place, name: str = "fifo") -> Path:
    (place.here / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place.here / name)
    return place.here / name


def folder(place: Place, name: str) -> Path:
    (place.here / name).mkdir(parents=True)
    return place.here / name


def _beside(build: Callable[[Place], object], words: Callable[[Place], Words]) -> Callable:
    """Inputs of a member that something else was put beside."""

    def make(place: Place) -> Words:
        build(place)
        return words(place)

    return make


OVER = ("--overwrite", "true")
IS_INPUT = "expected an output that is no input"
MAKE: dict[str, tuple[Callable[[Place], Words], str]] = {
    "predict: a loop": (lambda p: predict(p, loop(p)), "output is '"),
    "predict: its input": (lambda p: predict(p, p.rows(), *OVER), IS_INPUT),
    "predict: a link to its input": (
        lambda p: predict(p, link(p, "l", p.rows()), *OVER), IS_INPUT,
    ),
    "predict: a file of the model": (
        lambda p: predict(p, p.base() / "config.json", "--model", p.here / "base", *OVER), IS_INPUT,
    ),
    "predict: a file of the adapter": (
        lambda p: predict(
            p, Path(shutil.copytree(ADAPTER, p.here / "a")) / "adapter_config.json",
            "--adapter", p.here / "a", *OVER,
        ),
        IS_INPUT,
    ),
    "predict: in a folder of inputs": (
        lambda p: [
            "predict", "--model", p.small, "--input", p.rows(name="d/r.jsonl").parent,
            "--output", p.here / "d" / "o.jsonl", *FAST,
        ],
        IS_INPUT,
    ),
    "predict: a FIFO": (lambda p: predict(p, fifo(p), *OVER), "not a regular file"),
    "predict: /proc": (lambda p: predict(p, "/proc/o"), "/proc/.o.lock"),
    "predict: a lock that is a link": (
        _beside(
            lambda p: link(p, ".o.lock", p.file("precious", "mine")),
            lambda p: predict(p, p.here / "o"),
        ),
        ".o.lock: Too many levels of symbolic links",
    ),
    "predict: a lock that is a FIFO": (
        _beside(lambda p: fifo(p, ".o.lock"), lambda p: predict(p, p.here / "o")),
        ".o.lock: not a regular file",
    ),
    "predict: parts that are a link": (
        _beside(
            lambda p: link(p, "o.parts", folder(p, "else")), lambda p: predict(p, p.here / "o")
        ),
        "o.parts: a symbolic link",
    ),
    "evaluate: a loop": (lambda p: evaluate(p, loop(p)), "output_dir is '"),
    "evaluate: a FIFO": (
        _beside(lambda p: fifo(p, "e/metrics.json"), lambda p: evaluate(p, p.here / "e", *OVER)),
        "metrics.json: not a regular file",
    ),
    "evaluate: its predictions": (
        lambda p: [
            "evaluate", "--output_dir", p.here / "e", *OVER, "--predictions",
            p.rows({"prediction": "a", "reference": "b"}, name="e/metrics.json"),
        ],
        IS_INPUT,
    ),
    "evaluate: its data": (
        lambda p: [
            "evaluate", "--model", p.small, "--data", p.rows(name="e/predictions.jsonl"),
            "--output_dir", p.here / "e", *FAST, *OVER,
        ],
        IS_INPUT,
    ),
    "train: a loop": (lambda p: train(p, loop(p)), "output_dir is '"),
    "train: below a loop": (lambda p: train(p, loop(p) / "x"), "output_dir is '"),
    "train: a link to nothing": (
        lambda p: train(p, link(p, "l", p.here / "no")), "l: a link to nothing",
    ),
    "train: a device": (lambda p: train(p, "/dev/null"), "/dev/null: a file"),
    "train: a cache that is a loop": (
        lambda p: train(p, p.out / "r", "--data.cache_dir", loop(p)), "data.cache_dir is '",
    ),
    "train: logs that are a file": (
        _beside(lambda p: p.file("r/logs"), lambda p: train(p, p.here / "r")),
        "logs: a file; expected a folder for the logs",
    ),
    "train: a log that is a FIFO": (
        _beside(lambda p: fifo(p, "r/logs/rank_0.log"), lambda p: train(p, p.here / "r")),
        "rank_0.log: not a regular file",
    ),
    "train: a lock that is a link": (
        _beside(
            lambda p: link(p, "r/.lock", p.file("precious", "mine")),
            lambda p: train(p, p.here / "r"),
        ),
        ".lock: Too many levels of symbolic links",
    ),
    "merge: a loop": (lambda p: merge(p, loop(p)), "output is '"),
    "merge: a place to build in that is a loop": (
        _beside(lambda p: loop(p, "o.partial"), lambda p: merge(p, p.here / "o")),
        "o.partial: in the way",
    ),
    "merge: prompts that are a FIFO": (
        lambda p: merge(p, p.out / "m", "--prompts", fifo(p)), "a FIFO, not a regular file",
    ),
    "merge: prompts without an end": (
        lambda p: merge(p, p.out / "m", "--prompts", "/dev/zero"), "a device, not a regular file",
    ),
    "encode: its input": (lambda p: encode(p, p.rows(), *OVER), IS_INPUT),
    "encode: a FIFO": (lambda p: encode(p, fifo(p), *OVER), "not a regular file"),
}  # fmt: skip


def _junk(content: str) -> Callable[[Place], Words]:
    """A parts folder with settings that no run of ours wrote."""

    def make(place: Place) -> Words:
        place.out.mkdir()
        place.file("out/o.parts/settings.json", content)
        return predict(place, place.out / "o")

    return make


def _is_there(place: Place) -> bool:
    return (place.out / "o").is_file() and not (place.out / "o").is_symlink()


def _is_linked(place: Place) -> bool:
    return (place.here / "l").is_symlink() and (place.out / "o").is_file()


MEMBERS = [
    *(Member(name, make, says=(said,)) for name, (make, said) in MAKE.items()),
    Member("settings that are a number", _junk('{"settings": 5, "rows": 1}'), 0, leaves=_is_there),
    Member("settings without rows", _junk('{"settings": {}}'), 0, leaves=_is_there),
    Member("settings that are a list", _junk("[1]"), 0, leaves=_is_there),
    *(
        Member(
            f"a link to nothing: {command.__name__}",
            lambda p, command=command: command(p, link(p, "l", p.out / "o")),  # type: ignore[misc]
            0,
            leaves=_is_linked,
        )
        for command in (predict, encode)
    ),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_an_output(member: Member, tmp_path: Path, small_dir: Path) -> None:
    check(member, tmp_path, small_dir)
