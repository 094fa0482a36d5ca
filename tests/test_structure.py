"""The rules that keep the code readable: who imports what, how long a file or function may be, names to avoid."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    f for folder in ("qwen_ds", "serve", "launch") for f in (ROOT / folder).rglob("*.py")
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
JUNK_DRAWERS = {"utils.py", "common.py", "helpers.py", "constants.py", "misc.py"}

# Layers from the bottom up; a module imports from its own layer or from below. `serve` and `demo` stand beside train.
LAYERS = {
    "qwen_ds.errors": 0, "qwen_ds.dist": 0, "qwen_ds.runlog": 0, "qwen_ds.machine": 0,
    "qwen_ds.recipe": 1, "qwen_ds.disk": 1, "qwen_ds.model": 2, "qwen_ds": 2, "qwen_ds.data": 3,
    "qwen_ds.plan": 4, "qwen_ds.demo": 4, "qwen_ds.train": 5, "qwen_ds.export": 5, "serve": 5, "launch": 6,
}  # fmt: skip
NEVER = {
    "serve": ("qwen_ds.train", "qwen_ds.export"),
    "qwen_ds.export": ("qwen_ds.train",),
    "qwen_ds.train": ("qwen_ds.export",),
}
OWNERS = {
    "deepspeed": {f"qwen_ds/train/engine/{name}.py" for name in ("engine", "optimizer", "start")},
    "peft": {"qwen_ds/train/lora.py", "qwen_ds/model/adapter.py"},
    "tiktoken": {"qwen_ds/model/tokenizer.py"},
    "tokenizers": {
        "qwen_ds/export/qwen2/tokenizer_json.py",
        "qwen_ds/export/qwen2/tokenizer_check.py",
    },
}


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def layer_name(module: str) -> str | None:
    found = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    return max(found, key=len) if found else None


def module_of(file: Path) -> str:
    return place(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_imports_never_point_up(file: Path) -> None:
    own = layer_name(module_of(file))
    assert own is not None, f"{place(file)} belongs to no layer"
    for module in imports(file):
        other = layer_name(module)
        # `from qwen_ds import dist` names the package, too; what is imported is the second name.
        if other in (None, "qwen_ds") or file == ROOT / "qwen_ds" / "__init__.py":
            continue
        assert LAYERS[other] <= LAYERS[own], f"{place(file)} imports {module}"
        assert not module.startswith(NEVER.get(own, ())), f"{place(file)} imports {module}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_foreign_library_has_one_owner(library: str) -> None:
    users = {place(f) for f in SOURCES if any(m.split(".")[0] == library for m in imports(f))}
    assert users and users <= OWNERS[library]


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_FILE_LINES and file.name not in JUNK_DRAWERS
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
            assert node.end_lineno - node.lineno + 1 - doc_lines <= MAX_FUNCTION_LINES, (
                f"{place(file)}: {node.name}"
            )


def test_environment_variables_are_read_in_one_place() -> None:
    """Handing the environment on to a child process reads nothing from it."""
    reads = re.compile(r"os\.environ(\[|\.get|\.setdefault)|os\.getenv| in os\.environ")
    assert {place(f) for f in SOURCES if reads.search(f.read_text())} == {"qwen_ds/dist.py"}


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_nothing_loads_code_or_pickles(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), (
            f"{place(file)}: {called}"
        )
        arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert arguments.get("trust_remote_code") in (None, "False"), f"{place(file)}: {called}"
        if called == "torch.load":
            assert arguments.get("weights_only") == "True", f"{place(file)}: torch.load"
