"""Inputs that change under a stopped run, each alone and all of them together: the run is refused
with the name of what changed, or goes on where a change is allowed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qwen_ds.data.rows.token_rows import prepare
from qwen_ds.errors import UserError
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train.survive import resume
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.checkpoint_writer import BEGAN_WITH
from qwen_ds.train.survive.identity import Began


class Place:
    """A run's inputs, which the changes below act on."""

    def __init__(self, here: Path, small: Path, golden: Path) -> None:
        self.here = here
        self.base, self.adapter = here / "base", here / "adapter"
        shutil.copytree(small, self.base)
        shutil.copytree(golden / "lora" / "adapter", self.adapter)
        self.rows, self.cache = here / "rows.jsonl", here / "cache"
        lines = [json.dumps({"content": f"q{i}", "summary": f"a{i}"}) + "\n" for i in range(40)]
        self.rows.write_text("".join(lines))

    def run(self, *allowed: str) -> Run:
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        asked = load_recipe([
            "--model.path", str(self.base), "--data.train", str(self.rows),
            "--data.cache_dir", str(self.cache), "--output_dir", str(self.here / "run"),
            "--lora.init_from", str(self.adapter), "--lora.r", str(config["r"]),
            "--lora.alpha", str(config["lora_alpha"]), "--lora.special_rows", "off",
            "--lora.targets", json.dumps(sorted(config["target_modules"])),
            *(["--resume.allow_changes", *allowed] if allowed else []),
        ])  # fmt: skip
        return resolve(asked, Machine(1, 1, False, 1e10, ""), Base.read(self.base))

    def data_sha256(self, run: Run) -> str:
        return prepare(run.recipe.data, run.encoding, run.base.config.seq_length).train.sha256

    def edit(self, file: Path, **changes: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scaled(file: Path, *names: str) -> None:
    """Weights that somebody trained: those whose names end so, or all."""
    tensors = load_file(file)
    for name in tensors:
        if not names or name.endswith(names):
            tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_vocabulary(place: Place) -> None:
    """One token is spelled otherwise; the table has the same length."""
    file = place.base / "qwen.tiktoken"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[-1] = b"enp6enp6eg== " + lines[-1].split()[1] + b"\n"
    file.write_bytes(b"".join(lines))


def sharded(place: Place) -> None:
    file = place.base / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in part}, place.base / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (place.base / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


CONFIG, GENERATION = "config.json", "generation_config.json"
# Changes that are refused: (what changes, the option that would allow it, words of the message).
REFUSED: dict[str, tuple[Callable[[Place], object], str, Sequence[str]]] = {
    **{
        key: (
            lambda p, key=key, value=value: p.edit(p.base / CONFIG, **{key: value}),
            "model.path", [f"{key} of {CONFIG} was", f"is {value!r} now"],
        )
        for key, value in {
            "rotary_emb_base": 77, "layer_norm_epsilon": 1e-3, "seq_length": 17,
            "use_dynamic_ntk": False, "use_logn_attn": False, "emb_dropout_prob": 0.5,
            "attn_dropout_prob": 0.25, "max_position_embeddings": 99,
        }.items()
    },
    "chat_format": (
        lambda p: p.edit(p.base / GENERATION, chat_format="raw"),
        "model.path", [f"chat_format of {GENERATION}", "'raw' now"],
    ),
    "vocabulary": (other_vocabulary, "model.path", ["the vocabulary was sha256"]),
    "all weights": (
        lambda p: scaled(p.base / "model.safetensors"),
        "model.path", ["base: model.safetensors was sha256"],
    ),
    "a norm": (
        lambda p: scaled(p.base / "model.safetensors", "ln_f.weight"),
        "model.path", ["model.safetensors was sha256"],
    ),
    "a bit of the weights": (
        lambda p: flipped(p.base / "model.safetensors"), "model.path", ["model.safetensors was"],
    ),
    "weights in shards": (sharded, "model.path", ["model.safetensors was", "is absent now"]),
    "adapter weights": (
        lambda p: scaled(p.adapter / "adapter_model.safetensors"),
        "lora.init_from", ["adapter: adapter_model.safetensors was"],
    ),
    "adapter config": (
        lambda p: p.edit(p.adapter / "adapter_config.json", base_model_name_or_path="elsewhere"),
        "lora.init_from", ["adapter: adapter_config.json was"],
    ),
    "data": (
        lambda p: p.rows.write_text(p.rows.read_text().replace("a7", "a8")),
        "data", ["the rows are not those that the run began with"],
    ),
    "fewer rows": (
        lambda p: p.rows.write_text("".join(p.rows.read_text().splitlines(True)[:-1])),
        "data", ["the rows are not those"],
    ),
}  # fmt: skip
# Changes after which the run goes on, with the rows that it had.
HARMLESS: dict[str, Callable[[Place], object]] = {
    "cache flipped": lambda p: [flipped(file) for file in p.cache.glob("*.arrow")],
    "cache cut": lambda p: [os.truncate(file, 500) for file in p.cache.glob("*.arrow")],
    "cache gone": lambda p: shutil.rmtree(p.cache),
    "times": lambda p: [os.utime(file, (1, 1)) for file in p.base.iterdir()],
    "sampling": lambda p: p.edit(p.base / GENERATION, temperature=0.3),
    "library in config": lambda p: p.edit(p.base / CONFIG, transformers_version="9.9"),
    "weights rewritten": lambda p: shutil.copy(
        shutil.move(p.base / "model.safetensors", p.here / "moved"), p.base / "model.safetensors"
    ),
}


@pytest.fixture
def place(tmp_path: Path, small_dir: Path, golden: Path) -> Place:
    return Place(tmp_path, small_dir, golden)


def stopped(place: Place) -> Checkpoint:
    """A checkpoint of the run as it stands."""
    run = place.run()
    began = json.loads(json.dumps(Began.of(run).as_json()))
    state = {BEGAN_WITH: began, "data_sha256": place.data_sha256(run)}
    return Checkpoint(place.here / "step_000002", state)


def resumes(place: Place, found: Checkpoint, *allowed: str) -> None:
    """As a job that resumes compares, in its order."""
    run = place.run(*allowed)
    resume.check_same_files(found, run, Began.of(run))
    resume.check_same_data(found.state, run.recipe, place.data_sha256(run))


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_is_refused_with_its_name_or_allowed(
    place: Place, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, option, words = REFUSED[name]
    found = stopped(place)
    resumes(place, found)
    change(place)
    with pytest.raises(UserError) as error:
        resumes(place, found)
    message = str(error.value)
    assert "\n" not in message and f"--resume.allow_changes {option}" in message, message
    assert all(word in message for word in words), message
    # A vocabulary changes the rows, too, unless they do not have the token.
    resumes(place, found, option, "data")
    if option != "data":
        assert "as resume.allow_changes has it" in capsys.readouterr().out
    with pytest.raises(UserError):
        resumes(place, found, "optim.lr")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_number_goes_on(
    place: Place, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With nothing allowed, and the same rows."""
    found = stopped(place)
    HARMLESS[name](place)
    resumes(place, found)
    assert place.data_sha256(place.run()) == found.state["data_sha256"]
    assert "resume.allow_changes" not in capsys.readouterr().out


KINDS = ("rotary_emb_base", "vocabulary", "all weights", "adapter weights", "data")
TOGETHER = [group for n in range(2, len(KINDS) + 1) for group in combinations(KINDS, n)]


@pytest.mark.parametrize("group", TOGETHER, ids=" + ".join)
def test_of_several_changes_each_must_be_allowed(place: Place, group: tuple[str, ...]) -> None:
    """With the cache damaged under all of them. The first is named, and allowing it leads to the
    next."""
    found = stopped(place)
    HARMLESS["cache flipped"](place)
    for name in group:
        REFUSED[name][0](place)
    options = list(dict.fromkeys(REFUSED[name][1] for name in group))
    for known in range(len(options)):
        with pytest.raises(UserError) as error:
            resumes(place, found, *options[:known])
        assert f"--resume.allow_changes {options[known]}" in str(error.value)
    resumes(place, found, *options, "data")


def test_a_run_of_an_earlier_release_goes_on_and_says_what_is_not_compared(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stopped(place)
    del found.state[BEGAN_WITH]
    REFUSED["all weights"][0](place)
    resumes(place, found)
    said = capsys.readouterr().out
    assert "first adapter and libraries, which cannot be compared" in said


def test_other_libraries_are_said_and_not_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stopped(place)
    found.state[BEGAN_WITH]["versions"]["torch"] = "1.0"
    resumes(place, found)
    assert "torch was 1.0 and is" in capsys.readouterr().out


def test_bytes_known_after_the_last_save_are_compared_from_the_run_folder(place: Place) -> None:
    found = stopped(place)
    began = found.state[BEGAN_WITH] | {"whole": {"base/model.safetensors": "0" * 64}}
    (place.here / "run").mkdir()
    (place.here / "run" / "identity.json").write_text(json.dumps(began))
    run = place.run()
    assert resume.check_same_files(found, run, Began.of(run)).whole == began["whole"]
