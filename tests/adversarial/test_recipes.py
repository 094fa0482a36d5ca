"""Recipes that are wrong or hostile: one line, and no code of theirs runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.adversarial.harness import PLANTED, Member, Place, check

CLASS = f"{PLANTED}.Options"
# options that are paths, one in each shape, each with paths that cannot be meant: one mechanism
PATHS = {
    "plan": "output_dir data.cache_dir data.train lora.init_from deepspeed model.path",
    "merge": "base output adapter check_texts prompts",
    "data inspect": "model.path data.eval",
    "data encode": "output",
    "predict": "model input output adapter",
    "evaluate": "output_dir data predictions",
}
REQUIRED = {
    "merge": "base output",
    "data inspect": "model.path",
    "data encode": "model.path",
    "predict": "model input output",
    "evaluate": "output_dir",
}
WRONG_PATHS = {
    "~nosuch/x": "no such user",
    "${RUNS}/x": "${RUNS} is for a shell",
    "x" * 256: "too long",
}
# name -> recipe, and a word of the message
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "class_path of a section": (f"optim: {{class_path: {CLASS}}}", "optim.class_path"),
    "class_path with init_args": (
        f"data:\n  class_path: {CLASS}\n  init_args: {{a: 1}}", "data.class_path",
    ),
    "class_path at the top": (f"class_path: {CLASS}", "class_path"),
    "class_path as a number": (f"optim: {{lr: {{class_path: {CLASS}}}}}", "optim.lr"),
    "a dotted name for a section": (f"optim: {CLASS}", "optim is"),
    "a dotted name for a number": (f"optim: {{lr: {CLASS}}}", "optim.lr is"),
    "a dotted name for a choice": (f"model: {{activation_checkpointing: {CLASS}}}", "none or all"),
    "a python object": ("model: {path: !!python/object/apply:os.system [id]}", "python/object"),
    "a python module": (f"model: !!python/module:{PLANTED}", "python/module"),
    "a python name": (f"seed: !!python/name:{CLASS}", "python/name"),
    "a tag of one's own": ("seed: !mine 3", "!mine"),
    "an include": ("model: !include other.yaml", "!include"),
    "a section is a number": ("optim: 3", "optim is '3'"),
    "a section is a list": ("optim: [1]", "optim is a list"),
    "a section is a file": ("optim: other.yaml", "optim is 'other.yaml'"),
    "another recipe": ("config: other.yaml", "unknown option config"),
    "the launcher's option": ("local_rank: 1", "unknown option local_rank"),
    "a list": ("- optim", "a list"),
    "a number": ("3", "'3'"),
    "a word": ("optim", "'optim'"),
    "nothing": ("", "empty"),
    "only comments": ("# optim:\n#   lr: 1", "empty"),
    "two documents": ("seed: 1\n---\nseed: 2", "document"),
    "a key twice": ("optim: {lr: 1, lr: 2}", "'lr' comes twice"),
    "a section twice": ("optim: {lr: 1}\noptim: {eps: 1}", "'optim' comes twice"),
    "a bomb of aliases": (
        "a: &a [1]\n" + "".join(f"{y}: &{y} [{f'*{x},' * 9}]\n" for x, y in pairwise("abcdefghi")),
        "alias",
    ),
    "an alias of itself": ("data: &a {train: *a}", "nested too deeply"),
    "depth": ("seed: " + "[" * 100, "nested too deeply"),
    "great depth": ("seed: " + "[" * 100_000, "nested too deeply"),
    "depth of mappings": ("{a: " * 50 + "1" + "}" * 50, "nested too deeply"),
    "a key that is a list": ("? [1]\n: 2", "unhashable"),
    "a key that is a number": ("1: 2", "unknown option 1"),
    "a misspelt section": ("optm: {lr: 1}", "the nearest is optim.lr"),
    "a misspelt key": ("optim: {lrr: 1}", "the nearest is optim.lr"),
    "JSON with a comma too many": ('{"seed": 1,,}', "line 1"),
    "tabs": ("optim:\n\tlr: 1", "line 2"),
    "binary": (bytes(range(256)) * 8, "not UTF-8"),
    "zeros": (bytes(4096), "special characters"),
    "GBK": ("data: {system: 你好}".encode("gbk"), "not UTF-8"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not UTF-8"),
    "a megabyte": (b"# " + b"x" * 2**20, "bytes"),
    "a lone surrogate": ('data: {system: "\\uD800"}', "Unicode"),
    "true as a number": ("seed: true", "seed is True"),
    "a fraction as a whole number": ("seed: 1.5", "seed is 1.5"),
    "text as a number": ("optim: {lr: fast}", "optim.lr is"),
    "a list as a number": ("optim: {lr: [1]}", "optim.lr"),
    "one beta": ("optim: {betas: [0.9]}", "expected 2 values"),
    "a word as a switch": ("dry_run: perhaps", "dry_run"),
    "columns that are numbers": ("data: {columns: {a: 1}}", "data.columns"),
}  # fmt: skip
# option -> values out of its range
NUMBERS = {
    "optim.lr": ("1e400", "nan", "-inf", "1e9", "-1e-9"),
    "optim.epochs": ("1e18", "inf", "0"),
    "optim.eps": ("nan", "0"),
    "optim.decay_steps": ("0", "1e12"),
    "batch.rows_per_step": ("9223372036854775808", "1e30", "0"),
    "batch.tokens_per_micro_batch": ("1e18",),
    "distributed.timeout_minutes": ("inf", "1e300", "nan", "0"),
    "save.before_minutes": ("1e300", "-1"),
    "model.memory_gb": ("inf", "nan"),
    "lora.r": ("9999999999", "-8"),
    "lora.alpha": ("1e400",),
    "seed": ("-1", "1e30"),
    "gpus": ("1e18", "0"),
    "gpu_memory": ("nan", "inf"),
    "learnt_share": ("nan", "1.5"),
}
# command line -> a word of the message
LINES = {
    "plan --optim CLASS": "--optim is a section",
    "plan --optim=3": "--optim is a section",
    "plan --optim.class_path CLASS": "optim.class_path",
    "plan --optim.lr CLASS": "optim.lr is",
    "plan --config": "--config",
    "plan --config {seed:1}": "no such file",
    "plan --config /": "not a regular file",
    "plan --config /dev/zero": "not a regular file",
    "plan --config " + "x" * 5000: "no such file",
    "plan --data.columns " + "[" * 5000: "data.columns",
    "plan --log.profile_steps [1,.inf]": "profile_steps",
    "merge --base b --output o --weights nan": "weights is",
    "merge --base b --output o --weights 1 1e400": "weights is",
    "merge --base b --output o --dtype CLASS": "dtype is",
    "data inspect --model.path m --rows 1e30": "rows is",
    "data encode --model.path m --data.max_tokens 1e30": "max_tokens is",
    "data encode --model CLASS": "--model is a section",
    "predict --model m --temperature nan": "temperature is",
    "predict --model m --timeout_minutes inf": "timeout_minutes is",
    "predict --model m --batch_size 1e30": "batch_size is",
    "predict --model m --max_new_tokens 1e30": "max_new_tokens is",
    "predict --model m --input i --output o --top_p nan": "top_p is",
    "predict --model m --seed 1e400": "seed is",
    "evaluate --output_dir o --limit 1e30": "limit is",
    "train --optim.epochs 1e18": "optim.epochs is",
    "train --optim CLASS": "--optim is a section",
}  # fmt: skip


def _recipe(text: str | bytes, place: Place) -> Sequence[str | Path]:
    return ["plan", "--config", place.file("recipe.yaml", text)]


def _words(line: str) -> Callable[[Place], Sequence[str | Path]]:
    return lambda _: line.split()


def _fifo(place: Place) -> Sequence[str | Path]:
    os.mkfifo(place.here / "fifo")
    return ["plan", "--config", place.here / "fifo"]


def _path_line(command: str, option: str, path: str) -> str:
    """The command line of an option that is a path, with the other options that it must have."""
    others = [f"--{name} r" for name in REQUIRED.get(command, "").split() if name != option]
    return " ".join([command, *others, f"--{option} {path}"])


def _pipe(content: bytes) -> Callable[[Place], Sequence[str | Path]]:
    """A recipe from a process, such as a shell's <(...) gives."""

    def make(place: Place) -> Sequence[str | Path]:
        place.out.mkdir()  # a pipe's time changes
        os.mkfifo(place.out / "fifo")
        threading.Thread(target=_feed, args=(place.out / "fifo", content), daemon=True).start()
        return ["plan", "--config", place.out / "fifo"]

    return make


def _feed(fifo: Path, content: bytes) -> None:
    with suppress(BrokenPipeError), fifo.open("wb") as stream:
        stream.write(content)


MEMBERS = [
    *(Member(name, partial(_recipe, text), says=(said,)) for name, (text, said) in TEXTS.items()),
    *(
        Member(f"{key} {value}", _words(f"plan --{key}={value}"), says=(f"{key} is",))
        for key, values in NUMBERS.items()
        for value in values
    ),
    *(
        Member(
            f"{command} {option} {path[:12]}",
            _words(_path_line(command, option, path)),
            says=(f"{option} is '{path[:100]}", said),
        )
        for command, options in PATHS.items()
        for option in options.split()
        for path, said in WRONG_PATHS.items()
    ),
    *(
        Member(line[:60], _words(line.replace("CLASS", CLASS)), says=(said,))
        for line, said in LINES.items()
    ),
    Member("a FIFO", _fifo, says=("nothing came through the pipe for 10 s",)),
    Member("a pipe with a recipe", _pipe(b"seed: 7"), code=0),
    Member("a pipe with a mistake", _pipe(b"sed: 7"), says=("unknown option sed",)),
    Member("an endless pipe", _pipe(b"# " + bytes(2**21)), says=("over 1,048,576 bytes",)),
    Member(
        "a pipe that a launcher closed",
        _words("plan --config /dev/fd/987"),
        says=("no such file (a launcher passes no pipe on to its ranks)",),
    ),
    Member("a BOM", partial(_recipe, b"\xef\xbb\xbfseed: 1"), code=0),
    Member("a variable in a text", partial(_recipe, "data: {system: '${HOME}'}"), code=0),
    Member("a section is empty", partial(_recipe, "optim:\n  # lr: 1\nseed: 1"), code=0),
    Member("one text for a list", partial(_recipe, f"data: {{train: {CLASS}}}"), code=0),
    Member("an alias", partial(_recipe, "data: {train: &a [x], eval: *a}"), code=0),
    Member("dotted keys", partial(_recipe, "optim.lr: 1e-4"), code=0),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_recipe(member: Member, tmp_path: Path, small_dir: Path) -> None:
    check(member, tmp_path, small_dir)
