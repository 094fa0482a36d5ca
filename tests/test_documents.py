"""The documents tell the truth: commands parse, links lead somewhere, tables are complete.

A page of docs/ and its Chinese twin in docs/zh/ are checked as README.md and README_zh.md are.
"""

from __future__ import annotations

import argparse
import ast
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

from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.read.readers import READERS
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.errors import UserError
from qwen_ds.model.react import react_prompt
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.recipe.loading import load_recipe, to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.recipe.parser import Parser
from serve.api.bodies import ChatBody, read_body
from serve.api.options import ApiOptions
from serve.options import EvaluateOptions, PredictOptions
from serve.options import parse as parse_serving
from serve.talk.options import ChatOptions

ROOT = Path(__file__).parents[1]
DOCS = sorted(file.name for file in (ROOT / "docs").glob("*.md"))
# A page in English and in Chinese.
PAIRS = [("README.md", "README_zh.md"), *((f"docs/{n}", f"docs/zh/{n}") for n in DOCS)]
PAGES = [name for pair in PAIRS for name in pair]
DOCUMENTS = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md")
TRAINING = ("docs/training.md", "docs/zh/training.md")
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
    """Yield the words of each command: continued lines joined, comments dropped, split at `&&`."""
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
    """The command in the opening comment of a recipe: its indented lines."""
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
    {w for name in (*PAGES, "CONTRIBUTING.md") for w in commands_of(name)}
    | {*map(opening_command, [*RECIPES, *CLUSTER])}
)


class Parsed(Exception):
    """A parser accepted its command. What the command would do next is not this test's business."""


def stop_after_parsing(
    main: Callable[[], object], options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a command's main until its own parser has accepted the options."""
    real = Parser.parse

    def parse(self: Parser, argv: Sequence[str] | None = None, **how: bool) -> NoReturn:
        real(self, argv, **how)
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
    """Check the options of a script (launch/x.py) or module (serve.x) with its own parser."""
    if program == "launch/train.py":
        # --help would print and exit, and the launcher adds --local_rank.
        options = [o for o in options if o != "--help" and not o.startswith("--local_rank")]
        loaded = load_recipe(options)
        read_deepspeed_json(loaded.recipe.deepspeed)
        # A second run into the default runs/demo would be refused.
        assert not options or "output_dir" in loaded.set_keys
    elif program == "serve.predict":
        parse_serving(PredictOptions, "", options)
    elif program == "serve.evaluate":
        parse_serving(EvaluateOptions, "", options)
    elif program == "pytest":
        assert all((ROOT / path).exists() for path in options)
    elif program.endswith(".py"):
        stop_after_parsing(load_script(program).main, options, monkeypatch)
    else:
        packages = ("qwen_ds.data", "serve.api")
        name = f"{program}.__main__" if program in packages else program
        stop_after_parsing(importlib.import_module(name).main, options, monkeypatch)


def check_launcher(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check DeepSpeed's own options with its parser, then the command that it launches."""
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    arguments = parse_args(list(words[1:]))
    assert arguments.num_gpus > 0 or fetch_hostfile(arguments.hostfile)
    assert arguments.module == (not arguments.user_script.endswith(".py"))
    # The launcher puts each process's rank before the user's own options.
    check_program(arguments.user_script, ["--local_rank=0", *arguments.user_args], monkeypatch)


def check_tensorboard(words: Words) -> None:
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    assert parser.parse_args(words[1:]).logdir == "runs"


def check_docker(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the image is built from our Dockerfile and runs one of our commands."""
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
    """Check a script that adds the user's options to its own and starts launch/train.py."""
    assert (ROOT / path).is_file() and (ROOT / path).stat().st_mode & 0o111
    (own,) = [words for words in split_commands(read(path)) if "launch/train.py" in words]
    own = [word.replace("$UID", "0") for word in own[own.index("launch/train.py") + 1 :]]
    check_program("launch/train.py", [*own[: own.index("$@")], *options], monkeypatch)


def check_command(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ("make", *targets):
            known = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
            assert targets and {*targets} <= {*known}
        case ("source", path):
            assert f"VENV := {path.removesuffix('/bin/activate')}\n" in read("Makefile")
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
        case ("curl", url, *options):
            port = ApiOptions.__dataclass_fields__["port"].default
            assert url == f"http://127.0.0.1:{port}/v1/chat/completions"
            body = read_body(ChatBody, options[options.index("-d") + 1].encode())
            assert react_prompt(body.messages).conversation.turns
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
        "deepspeed launch/train.py --config launch/recipes/lora_zero9.yaml --output_dir x",
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


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_both_languages_give_the_same_commands_and_examples(english: str, chinese: str) -> None:
    assert commands_of(english) == commands_of(chinese)
    assert blocks(read(english), "python") == blocks(read(chinese), "python")
    # Left of a wide gap both are the same: names of files, or a whole example.
    left, spans, heads = [], [], []
    for text in (read(english), read(chinese)):
        lines = [line for block in blocks(text, "text") for line in block.splitlines()]
        left.append([re.split(r" {4,}", line)[0] for line in lines])
        spans.append({span for span in code_spans(text) if not span.startswith("README")})
        heads.append(re.findall(r"^(#+) ", text, re.MULTILINE))
    assert left[0] == left[1]
    assert spans[0] == spans[1], "code spans that only one language has"
    assert heads[0] == heads[1]


def test_every_page_has_its_twin_and_is_linked_from_both_readmes() -> None:
    assert sorted(file.name for file in (ROOT / "docs" / "zh").iterdir()) == DOCS
    for readme, *pages in zip(*PAIRS, strict=True):
        assert all(f"({page})" in read(readme) for page in pages)


def anchors(name: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_path_leads_somewhere(name: str) -> None:
    text, missing = read(name), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        page = str(target.relative_to(ROOT))
        if not target.exists() or (anchor and anchor not in anchors(page)):
            missing.append(link)
    folders = ("launch/", "ds_configs/", "qwen_ds/", "serve/", "tests/", "docs/", ".ci/")
    paths = [word for span in code_spans(text) for word in span.split() if word.startswith(folders)]
    assert not [*missing, *(path for path in paths if not (ROOT / path).exists())]
    modules = [
        s.removeprefix("python -m ").split()[0]
        for s in code_spans(text)
        if re.match(r"(python -m )?(qwen_ds|serve)\.", s)
    ]
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("folder", ["launch/recipes", "ds_configs"])
def test_the_tables_list_every_recipe_and_configuration(name: str, folder: str) -> None:
    listed = re.findall(rf"^\| \[`({folder}/[^`]+)`\]\(([^)]+)\) \| \S", read(name), re.MULTILINE)
    for shown, target in listed:
        assert ((ROOT / name).parent / target).resolve() == ROOT / shown
    assert sorted(shown for shown, _ in listed) == sorted(
        f"{folder}/{f.name}" for f in (ROOT / folder).iterdir()
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_opens_with_its_own_command(recipe: Path) -> None:
    """The command names the recipe or uses it by default, and the recipe's JSON exists."""
    text = shlex.join(opening_command(recipe))
    by_itself = {
        "demo.yaml": "deepspeed --num_gpus 2 launch/train.py",
        "demo_base.yaml": "python -m qwen_ds.demo.pretrain",
    }
    assert text.startswith(by_itself.get(recipe.name, "deepspeed --num_gpus 8 launch/train.py"))
    assert recipe.name in by_itself or f"--config launch/recipes/{recipe.name}" in text
    read_deepspeed_json(load_recipe(["--config", str(recipe)]).recipe.deepspeed)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_option_in_the_text_exists(name: str) -> None:
    recipe = to_dict(Recipe())
    sections = tuple(key for key, value in recipe.items() if isinstance(value, dict))
    keys = {key for key in recipe if key not in sections}
    keys |= {f"{section}.{key}" for section in sections for key in recipe[section]}
    classes = (PredictOptions, EvaluateOptions, ChatOptions, ApiOptions, CheckCommand)
    serving = {key for kind in classes for key in kind.__dataclass_fields__}
    merging = load_script("launch/merge.py").command_line()._option_string_actions
    options = {"--help", "--config", *merging, *(f"--{key}" for key in (*keys, *serving))}
    texts = [b for b in blocks(read(name), "text") if not b.startswith("error: ")]
    words = [word.strip(";,") for text in texts for word in text.split()]
    for word in [*(span.split()[0] for span in code_spans(read(name))), *words]:
        assert not word.startswith("--") or word in options, word
        if word.split(".")[0] in sections and not word.endswith((".", ".py", ".json", ".jsonl")):
            assert word in {*keys, *sections}, word


@pytest.mark.parametrize("name", ["docs/data.md", "docs/zh/data.md"])
def test_every_reader_is_listed(name: str) -> None:
    paragraph = next(p for p in read(name).split("\n\n") if p.startswith("`messages` "))
    assert re.findall(r"`(\w+)`", paragraph) == list(READERS)


def test_the_example_of_bad_input_is_what_a_user_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = [b.strip() for b in blocks(read("docs/data.md"), "text")]
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


def messages_in_the_code() -> Iterator[tuple[re.Pattern[str], int]]:
    """Yield each sentence in the code as a pattern, with the number of its fixed characters.

    The fields of an f-string match any text.
    """
    files = [f for folder in ("qwen_ds", "serve", "launch") for f in (ROOT / folder).rglob("*.py")]
    for node in (node for f in files for node in ast.walk(ast.parse(f.read_text("utf-8")))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
        if " " in "".join(texts):
            yield re.compile("".join(re.escape(t) or ".+" for t in texts)), sum(map(len, texts))


def test_every_message_in_troubleshooting_is_one_of_the_code() -> None:
    patterns = [(pattern, fixed) for pattern, fixed in messages_in_the_code() if fixed > 12]
    for message in map(str.strip, blocks(read("docs/troubleshooting.md"), "text")):
        # "X is Y; expected Z" fits anything, but little of it is fixed.
        fixed = max((n for pattern, n in patterns if pattern.search(message)), default=0)
        assert fixed > len(message) / 4, message


def test_the_container_installs_what_the_project_declares() -> None:
    """Extras and constraints exist, and .dockerignore keeps out nothing that is needed."""
    command = r"pip install --no-cache-dir -c (\S+) -e '\.\[([\w,]+)\]'"
    ((constraints, extras),) = re.findall(command, read("Dockerfile"))
    assert (ROOT / constraints).is_file() and f"-c {constraints}" in read("Makefile")
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    needed = {*"pyproject.toml LICENSE qwen_ds serve launch ds_configs".split(), constraints}
    assert not set(read(".dockerignore").split()) & {*needed, PROJECT["readme"]}


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == PROJECT["version"]
