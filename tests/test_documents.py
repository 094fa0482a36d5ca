"""What the documents say is there: commands parse with their own parsers, paths exist, tables are complete."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from qwen_ds.data.read.readers import READERS
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.errors import UserError
from qwen_ds.plan.deepspeed_json import read_json
from qwen_ds.recipe.loading import load_recipe, to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.recipe.parser import Parser
from serve.options import EvaluateOptions, PredictOptions
from serve.options import parse as parse_serving

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md")
RECIPES = sorted((ROOT / "launch" / "recipes").iterdir())
CLUSTER = sorted((ROOT / "launch" / "cluster").iterdir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
Words = tuple[str, ...]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def split_commands(script: str) -> Iterator[Words]:
    """Words of each command of a shell text: continued lines joined, comments dropped, `&&` separates."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield tuple(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        if words:
            yield tuple(words)


def commands_of(name: str) -> list[Words]:
    return [words for block in blocks(read(name), "bash") for words in split_commands(block)]


def opening_command(recipe: Path) -> Words:
    """The command in the comment that a recipe opens with: its indented lines."""
    comment = re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8"))
    assert comment is not None
    indented = re.findall(r"^#   +(.*)$", comment[0], re.MULTILINE)
    (words,) = split_commands("\n".join(indented))
    return words


def code_spans(text: str) -> list[str]:
    """Inline code outside fenced blocks."""
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )


ALL_COMMANDS = sorted(
    {w for name in (*READMES, "CONTRIBUTING.md") for w in commands_of(name)}
    | {*map(opening_command, [*RECIPES, *CLUSTER])}
)


class Parsed(Exception):
    """A command got through its parser: what it would do next is not this test's business."""


def stop_after_parsing(
    main: Callable[[], object], options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a command's main up to where its own parser accepted the options."""
    real = Parser.parse

    def parse(
        self: Parser, argv: Sequence[str] | None = None, *, defaults: bool = True
    ) -> NoReturn:
        real(self, argv, defaults=defaults)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse", parse)
        patch.setattr(sys, "argv", ["command", *options])
        with pytest.raises(Parsed):
            main()


def load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_program(program: str, options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script (launch/x.py) or a module (serve.x) and its options, checked by the parser that it uses itself."""
    if program == "launch/train.py":
        # --help prints and exits; without it the words are those of an empty recipe. The launcher adds --local_rank.
        options = [
            word for word in options if word != "--help" and not word.startswith("--local_rank")
        ]
        loaded = load_recipe(options)
        read_json(loaded.recipe.deepspeed)
        assert not options or "output_dir" in loaded.set_keys, (
            "a second run into runs/demo would be refused"
        )
    elif program == "serve.predict":
        parse_serving(PredictOptions, "", options)
    elif program == "serve.evaluate":
        parse_serving(EvaluateOptions, "", options)
    elif program == "pytest":
        assert all((ROOT / path).exists() for path in options)
    elif program.endswith(".py"):
        stop_after_parsing(load_script(program).main, options, monkeypatch)
    else:
        name = {"qwen_ds.data": "qwen_ds.data.__main__"}.get(program, program)
        stop_after_parsing(importlib.import_module(name).main, options, monkeypatch)


def check_launcher(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher with its own parser, then what it launches."""
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    arguments = parse_args(list(words[1:]))
    assert arguments.num_gpus > 0 or fetch_hostfile(arguments.hostfile)
    assert arguments.module == (not arguments.user_script.endswith(".py"))
    # The launcher hands its number to each process in front of the user's own options.
    check_program(arguments.user_script, ["--local_rank=0", *arguments.user_args], monkeypatch)


def check_tensorboard(words: Words) -> None:
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    assert parser.parse_args(words[1:]).logdir == "runs"


def check_docker(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker build` finds its file; `docker run IMAGE COMMAND` runs a command of ours on an image built before."""
    if words[1] == "build":
        assert (ROOT / "Dockerfile").is_file() and words[-1] == "."
        return
    image = words.index("qwen-ds")
    assert words[1] == "run" and ("docker", "build", "-t", "qwen-ds", ".") in ALL_COMMANDS
    mounted = next(word for word in words if word.endswith("/runs"))
    assert f"WORKDIR {Path(mounted.split(':')[1]).parent}\n" in read("Dockerfile")
    check_command(words[image + 1 :], monkeypatch)


def check_cluster_script(
    path: str, options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that starts launch/train.py with options of its own and, after them, those of the user."""
    assert (ROOT / path).is_file() and (ROOT / path).stat().st_mode & 0o111
    (own,) = [words for words in split_commands(read(path)) if "launch/train.py" in words]
    own = own[own.index("launch/train.py") + 1 :]
    check_program("launch/train.py", [*own[: own.index("$@")], *options], monkeypatch)


def check_command(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ("make", *targets):
            assert targets and all(
                re.search(rf"^{target}:", read("Makefile"), re.MULTILINE) for target in targets
            )
        case ("source", path):
            assert (
                path.removesuffix("/bin/activate")
                == re.findall(r"^VENV := (.+)$", read("Makefile"), re.MULTILINE)[0]
            )
        case ("deepspeed", *_):
            check_launcher(words, monkeypatch)
        case ("python" | ".venv/bin/python", "-m", program, *options):
            check_program(program, options, monkeypatch)
        case ("python", script, *options):
            assert (ROOT / script).is_file()
            check_program(script, options, monkeypatch)
        case ("sbatch", path, *options):
            check_cluster_script(path, options, monkeypatch)
        case (hosts, path, *options) if hosts.startswith("HOSTS="):
            check_cluster_script(path, options, monkeypatch)
        case ("tensorboard", *_):
            check_tensorboard(words)
        case ("docker", *_):
            check_docker(words, monkeypatch)
        case _:
            pytest.fail(f"no check for the command {shlex.join(words)}")


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=lambda words: shlex.join(words)[:90])
def test_every_command_is_accepted_by_its_own_parser(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "deepspeed --num_gpus 8 launch/train.py --optim.lrr 1e-4 --output_dir x",
        "deepspeed --num_gpus 8 launch/train.py --config launch/recipes/lora_zero9.yaml --output_dir x",
        "deepspeed --num_gpus 8 launch/train.py --deepspeed ds_configs/zero9.json --output_dir x",
        "deepspeed --num_gpus 8 launch/train.py --optim.epochs three --output_dir x",
        "deepspeed --num_gpus eight launch/train.py",
        "deepspeed --hostfile launch/cluster/hosts launch/train.py --output_dir x",
        "sbatch launch/cluster/train.sbatch --optim.lrr 1e-4 --output_dir x",
        "HOSTS=gpu01:8 launch/cluster/mpirun.py --output_dir x",
        "deepspeed --num_gpus 8 --module serve.predict --model m --inputs x --output y",
        "python launch/merge.py --base b --adapters a --output o",
        "python launch/plan.py --gpu 8 --gpu_memori 80",
        "python -m serve.evaluate --model m --data d",
        "python -m qwen_ds.data look --model.path m --data.train x",
        "python -m qwen_ds.data inspect --model.path m --data.train x --rows many",
        "make demmo",
        "tensorboard --logdirs runs",
        "nosuchtool",
    ],
)
def test_a_command_with_a_mistake_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would be worth nothing if it let these through."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, AssertionError, SystemExit, pytest.fail.Exception)):
        check_command(tuple(shlex.split(line)), monkeypatch)


def test_both_languages_give_the_same_commands_and_examples() -> None:
    english, chinese = READMES
    assert commands_of(english) == commands_of(chinese)
    assert blocks(read(english), "python") == blocks(read(chinese), "python")
    # What comes before the wide gap is the same: names of files, or a whole example.
    left = [
        [re.split(r" {4,}", line)[0] for b in blocks(read(name), "text") for line in b.splitlines()]
        for name in READMES
    ]
    assert left[0] == left[1]
    spans = [{s for s in code_spans(read(name)) if not s.startswith("README")} for name in READMES]
    assert spans[0] == spans[1], "code spans that only one language has"
    assert len(re.findall(r"^#+ ", read(english), re.MULTILINE)) == len(
        re.findall(r"^#+ ", read(chinese), re.MULTILINE)
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_path_exists(name: str) -> None:
    text = read(name)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    folders = ("launch/", "ds_configs/", "qwen_ds/", "serve/", "tests/", ".ci/")
    spans = [span for span in code_spans(text) if span.startswith(folders) and " " not in span]
    missing = [path for path in [*links, *spans] if path and not (ROOT / path).exists()]
    assert not missing
    modules = [
        s.removeprefix("python -m ").split()[0]
        for s in code_spans(text)
        if re.match(r"(python -m )?qwen_ds\.", s)
    ]
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("folder", ["launch/recipes", "ds_configs"])
def test_the_tables_list_every_recipe_and_configuration(name: str, folder: str) -> None:
    listed = re.findall(rf"^\| \[`({folder}/[^`]+)`\]\(([^)]+)\) \| \S", read(name), re.MULTILINE)
    assert all(shown == target for shown, target in listed)
    assert sorted(shown for shown, _ in listed) == sorted(
        f"{folder}/{f.name}" for f in (ROOT / folder).iterdir()
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_opens_with_its_own_command(recipe: Path) -> None:
    """The command names the file, or is one that takes it by itself; and the file is a recipe with an existing JSON."""
    text = shlex.join(opening_command(recipe))
    by_itself = {
        "demo.yaml": "deepspeed --num_gpus 2 launch/train.py",
        "demo_base.yaml": "python -m qwen_ds.demo.pretrain",
    }
    assert text.startswith(by_itself.get(recipe.name, "deepspeed --num_gpus 8 launch/train.py"))
    assert recipe.name in by_itself or f"--config launch/recipes/{recipe.name}" in text
    read_json(load_recipe(["--config", str(recipe)]).recipe.deepspeed)


def recipe_keys() -> set[str]:
    keys = to_dict(Recipe())
    return {key for key in keys if not isinstance(keys[key], dict)} | {
        f"{section}.{key}"
        for section in keys
        if isinstance(keys[section], dict)
        for key in keys[section]
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_option_in_the_text_exists(name: str) -> None:
    sections = tuple(
        f"{key}." for key, value in to_dict(Recipe()).items() if isinstance(value, dict)
    )
    options = {f"--{key}" for key in recipe_keys()} | {
        f"--{field}"
        for kind in (PredictOptions, EvaluateOptions)
        for field in kind.__dataclass_fields__
    }
    options |= {
        text
        for action in load_script("launch/merge.py").command_line()._actions
        for text in action.option_strings
    }
    in_blocks = [word.strip(";,") for block in blocks(read(name), "text") for word in block.split()]
    for span in [*code_spans(read(name)), *in_blocks]:
        word = span.split()[0]
        assert not word.startswith("--") or word in {*options, "--help", "--config"}, span
        if word.startswith(sections) and not word.endswith((".py", ".json", ".jsonl")):
            assert word in recipe_keys(), span


@pytest.mark.parametrize("name", READMES)
def test_every_reader_is_listed(name: str) -> None:
    paragraph = next(p for p in read(name).split("\n\n") if p.startswith("`messages` "))
    assert re.findall(r"`(\w+)`", paragraph) == list(READERS)


def test_the_example_of_bad_input_is_what_a_user_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = [b.strip() for b in blocks(read("README.md"), "text") if b.startswith("error: ")]
    found = re.fullmatch(r"error: (\S+?):(\d+): role is '(\w+)'; .*", example)
    assert found is not None
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}] * (int(found[2]) - 1) + [
        {"messages": [turns[0], {**turns[1], "role": found[3]}]}
    ]
    monkeypatch.chdir(tmp_path)
    Path(found[1]).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(iter_conversations([found[1]]))
    assert f"error: {error.value}" == example


def test_the_container_installs_what_the_project_declares() -> None:
    """Its pip command: extras that exist, the one constraints file, and nothing of the build is kept out of it."""
    found = re.search(
        r"pip install --no-cache-dir -c (\S+) -e '\.\[([\w,]+)\]'", read("Dockerfile")
    )
    assert (
        found is not None and (ROOT / found[1]).is_file() and f"-c {found[1]}" in read("Makefile")
    )
    assert set(found[2].split(",")) <= PROJECT["optional-dependencies"].keys()
    needed = (
        "pyproject.toml",
        found[1],
        PROJECT["readme"],
        "LICENSE",
        "qwen_ds",
        "serve",
        "launch",
        "ds_configs",
    )
    assert not set(read(".dockerignore").split()) & set(needed)


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == PROJECT["version"]
