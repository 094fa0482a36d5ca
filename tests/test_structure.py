"""The rules that keep the code readable: who imports whom, how long things are, which names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(f for d in ("qwen_ds", "serve", "launch") for f in (ROOT / d).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_OWN_IMPORTS = 400, 60, 16
MAX_PARAMETERS, MAX_LONG_SIGNATURES = 7, 2
JUNK_DRAWERS = {"utils.py", "common.py", "helpers.py", "constants.py", "misc.py"}

# Rooms from the ground up. A module imports from its own floor or from below.
FLOORS = {
    "qwen_ds.errors": 0, "qwen_ds.dist": 0, "qwen_ds.runlog": 0, "qwen_ds.machine": 0,
    "qwen_ds.terminal": 0, "qwen_ds.signals": 0, "qwen_ds.streams": 0,
    "qwen_ds.network": 0, "qwen_ds.resampling": 0,
    "qwen_ds.disk": 1, "qwen_ds.page": 1, "qwen_ds.recipe": 2, "qwen_ds.decode": 2,
    "qwen_ds.model": 3, "qwen_ds": 3,
    "qwen_ds.data": 4, "qwen_ds.demo": 5, "qwen_ds.plan": 6, "qwen_ds.report": 6,
    "qwen_ds.train": 7, "qwen_ds.export": 7, "serve": 7, "launch": 8,
}  # fmt: skip
# Training, export and use meet through files on disk.
NEVER = {
    "serve": ("qwen_ds.train", "qwen_ds.export", "qwen_ds.plan"),
    "qwen_ds.export": ("qwen_ds.train", "qwen_ds.plan"),
    "qwen_ds.train": ("qwen_ds.export",),
}
OWNERS = {
    "deepspeed": "qwen_ds/train/engine/",
    "rensa": "qwen_ds/data/doctor/duplicates.py",
    "ftfy": "qwen_ds/data/doctor/scripts.py",
    "peft": ("qwen_ds/train/lora.py", "qwen_ds/model/adapter"),
    "tiktoken": "qwen_ds/model/",
    "liger_kernel": "qwen_ds/model/liger.py",
    "llguidance": "qwen_ds/decode/grammar.py",
    "tokenizers": "qwen_ds/export/qwen2/",
    "httpx": "serve/endpoint/",
    "sacrebleu": "serve/scores/",
    "fastapi": "serve/api/",
    "uvicorn": "serve/api/",
    "prometheus_client": "serve/api/",
    "jinja2": ("qwen_ds/export/card.py", "qwen_ds/page/", "qwen_ds/report/"),
    "matplotlib": ("qwen_ds/page/", "qwen_ds/train/observe/run_page.py"),
    "mlflow": "qwen_ds/train/observe/trackers_mlflow.py",
    "swanlab": "qwen_ds/train/observe/trackers_swanlab.py",
    "trackio": "qwen_ds/train/observe/trackers_trackio.py",
    "wandb": "qwen_ds/train/observe/trackers_wandb.py",
}
# What may print: `show` and its like, and rich's console, whose texts go through `visible`.
PRINTERS = ("qwen_ds/terminal.py", "qwen_ds/data/__main__.py", "qwen_ds/data/show.py")
# transformers calls these with its own arguments.
CONTRACTS = {"forward", "generate", "chat", "chat_stream", "apply_chat_template", "tokenize"}
# Modules without a test file of their name, and the test file that covers each.
COVERED_BY = {
    "launch/merge.py": "tests/export/qwen2/test_qwen2_command.py",
    "launch/plan.py": "tests/plan/test_table.py",
    "launch/train.py": "tests/train/test_bad_input.py",
    "qwen_ds/data/pool.py": "tests/data/rows/test_workers.py",
    "qwen_ds/data/doctor/answers.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/batch.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/characters.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/columns.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/endings.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/examine.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/files.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/identity.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/kinds.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/languages.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/limits.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/marks.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/markup.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/options.py": "tests/data/doctor/test_command.py",
    "qwen_ds/data/doctor/output.py": "tests/data/doctor/test_command.py",
    "qwen_ds/data/doctor/personal.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/places.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/scripts.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/spans.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/doctor/table.py": "tests/data/doctor/test_command.py",
    "qwen_ds/data/doctor/tally.py": "tests/data/doctor/test_judge.py",
    "qwen_ds/data/doctor/unclosed.py": "tests/data/doctor/test_detectors.py",
    "qwen_ds/data/options.py": "tests/data/test_data_cli.py",
    "qwen_ds/data/read/dialogue.py": "tests/data/read/test_readers.py",
    "qwen_ds/data/read/file_names.py": "tests/data/read/test_places.py",
    "qwen_ds/data/read/files_arrow.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/files_csv.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/files_encoding.py": "tests/data/read/test_places.py",
    "qwen_ds/data/read/files_json.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/files_packed.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/files_tables.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/files_text.py": "tests/data/read/test_files.py",
    "qwen_ds/data/read/limits.py": "tests/data/read/test_places.py",
    "qwen_ds/data/read/readers_flat.py": "tests/data/read/test_readers.py",
    "qwen_ds/data/read/readers_marked.py": "tests/data/read/test_readers.py",
    "qwen_ds/data/read/readers_tree.py": "tests/data/read/test_readers.py",
    "qwen_ds/data/read/readers_turns.py": "tests/data/read/test_readers.py",
    "qwen_ds/data/show.py": "tests/data/test_data_cli.py",
    "qwen_ds/disk/adapter_folder.py": "tests/model/test_adapter.py",
    "qwen_ds/disk/adapter_options.py": "tests/model/test_adapter.py",
    "qwen_ds/model/adapter_loading.py": "tests/serve/engine/test_merged_and_served.py",
    "qwen_ds/decode/largest.py": "tests/decode/test_sampling.py",
    "qwen_ds/decode/transfers.py": "tests/decode/test_waits.py",
    "qwen_ds/decode/paged_attention.py": "tests/decode/test_kv_rows.py",
    "qwen_ds/decode/kv_pages.py": "tests/decode/test_kv_rows.py",
    "qwen_ds/decode/request.py": "tests/decode/test_engine.py",
    "qwen_ds/decode/scheduler.py": "tests/decode/test_engine.py",
    "qwen_ds/model/packing.py": "tests/decode/test_engine.py",
    "qwen_ds/dist.py": "tests/test_launchers.py",
    "qwen_ds/export/base_check.py": "tests/export/test_merge_bad_input.py",
    "qwen_ds/export/build.py": "tests/export/test_merge.py",
    "qwen_ds/export/card_scores.py": "tests/export/test_card.py",
    "qwen_ds/export/choices.py": "tests/export/test_merge_bad_input.py",
    "qwen_ds/errors.py": "tests/test_runlog.py",
    "qwen_ds/export/formats.py": "tests/export/test_layout.py",
    "qwen_ds/export/merge_plan.py": "tests/export/test_layout.py",
    "qwen_ds/export/merge_report.py": "tests/export/test_merge.py",
    "qwen_ds/export/proof/layered.py": "tests/export/proof/test_verify.py",
    "qwen_ds/export/proof/noise.py": "tests/export/proof/test_verify.py",
    "qwen_ds/export/proof/sides.py": "tests/export/proof/test_verify.py",
    "qwen_ds/export/proof/whole.py": "tests/export/proof/test_verify.py",
    "qwen_ds/export/qwen2/settings.py": "tests/export/qwen2/test_names.py",
    "qwen_ds/export/qwen2/tokenizer_check.py": "tests/export/qwen2/test_tokenizer_json.py",
    "qwen_ds/export/stream/changes.py": "tests/export/proof/test_verify.py",
    "qwen_ds/export/stream/shard.py": "tests/export/test_merge.py",
    "qwen_ds/export/stream/source.py": "tests/export/stream/test_blocks.py",
    "qwen_ds/model/attention.py": "tests/model/test_golden_forward.py",
    "qwen_ds/model/device.py": "tests/serve/engine/test_devices.py",
    "qwen_ds/model/configuration.py": "tests/model/test_loading.py",
    "qwen_ds/model/modeling.py": "tests/model/test_golden_forward.py",
    "qwen_ds/model/rotary.py": "tests/model/test_golden_long.py",
    "qwen_ds/plan/activations.py": "tests/plan/test_memory.py",
    "qwen_ds/plan/candidates.py": "tests/plan/test_resolve.py",
    "qwen_ds/plan/gpus.py": "tests/plan/test_flops.py",
    "qwen_ds/plan/shape.py": "tests/plan/test_memory.py",
    "qwen_ds/plan/step.py": "tests/plan/test_recomputation.py",
    "qwen_ds/plan/traffic.py": "tests/plan/test_seconds.py",
    "qwen_ds/recipe/deepspeed_json.py": "tests/plan/test_deepspeed_json.py",
    "qwen_ds/recipe/recipe_file.py": "tests/recipe/test_parser.py",
    "serve/scores/answers.py": "tests/serve/scores/test_comparison.py",
    "serve/scores/outputs.py": "tests/serve/scores/test_report.py",
    "serve/scores/scored.py": "tests/serve/scores/test_comparison.py",
    "serve/scores/training.py": "tests/serve/scores/test_comparison.py",
    "serve/scores/words.py": "tests/serve/scores/test_report.py",
    "serve/answering.py": "tests/serve/files/test_prediction.py",
    "serve/talk/lines.py": "tests/serve/test_chat.py",
    "serve/talk/options.py": "tests/serve/test_chat.py",
    "serve/files/sources.py": "tests/serve/files/test_prediction.py",
    "serve/files/line_writer.py": "tests/serve/scores/test_general.py",
    "serve/scores/kept_rows.py": "tests/serve/scores/test_general.py",
    "serve/scores/sections.py": "tests/serve/scores/test_general.py",
    "serve/scores/rows.py": "tests/serve/scores/test_profiles.py",
    "qwen_ds/train/engine/loading.py": "tests/train/test_not_finite.py",
    "qwen_ds/train/engine/state.py": "tests/faults/test_killed_jobs.py",
    "qwen_ds/train/job.py": "tests/train/test_jobs.py",
    "qwen_ds/train/loop.py": "tests/faults/test_every_file_operation.py",
    "qwen_ds/train/observe/opening.py": "tests/train/test_jobs.py",
    "qwen_ds/train/observe/trackers_mlflow.py": "tests/train/observe/test_trackers.py",
    "qwen_ds/train/observe/trackers_swanlab.py": "tests/train/observe/test_trackers.py",
    "qwen_ds/train/observe/trackers_trackio.py": "tests/train/observe/test_trackers.py",
    "qwen_ds/train/observe/trackers_wandb.py": "tests/train/observe/test_trackers.py",
    "qwen_ds/train/run.py": "tests/train/test_bad_input.py",
    "qwen_ds/train/screen.py": "tests/train/test_jobs.py",
    "qwen_ds/train/survey.py": "tests/train/test_bad_input.py",
    "serve/engine/adapted.py": "tests/serve/engine/test_adapters.py",
    "qwen_ds/train/survive/checkpoint_writer.py": "tests/faults/test_every_file_operation.py",
    "serve/api/app.py": "tests/serve/api/test_server.py",
    "serve/api/chat.py": "tests/serve/api/test_tool_calls.py",
    "serve/api/completions.py": "tests/serve/api/test_server.py",
    "serve/api/engines.py": "tests/serve/api/test_server.py",
    "serve/api/jobs.py": "tests/serve/api/test_server.py",
    "serve/api/options.py": "tests/serve/api/test_start.py",
    "serve/api/original.py": "tests/serve/api/test_server.py",
    "serve/api/sampling.py": "tests/serve/api/test_server.py",
    "serve/api/served.py": "tests/serve/api/test_server.py",
    "serve/api/server.py": "tests/serve/api/test_start.py",
    "serve/api/worker.py": "tests/serve/api/test_server.py",
}
# Words by which a test runs a command, and the module that the command is.
COMMANDS = {
    "small_job": "launch.train",
    "launch/train.py": "launch.train",
    "launch/plan.py": "launch.plan",
    "launch/merge.py": "launch.merge",
    '"plan.py"': "launch.plan",
    "qwen_ds.data": "qwen_ds.data.__main__",
    "qwen_ds.report": "qwen_ds.report.__main__",
    '"chat.py"': "serve.chat",
    "serve.api.running": "serve.api.__main__",
}


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    return place(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file): file for file in SOURCES}


def floor_of(module: str) -> str | None:
    found = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(found, key=len) if found else None


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names that a file imports, wherever in it; of ours the modules themselves."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found)


def own_imports(file: Path) -> list[str]:
    """Our modules that a file imports."""
    return sorted(imports(file) & MODULES.keys() - {module_of(file)})


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_imports_never_point_up(file: Path) -> None:
    own = floor_of(module_of(file))
    assert own is not None, f"{place(file)} stands on no floor"
    if file == ROOT / "qwen_ds" / "__init__.py":  # it registers the model
        return
    for module in own_imports(file):
        other = floor_of(module)
        assert other is not None
        if other == "qwen_ds":  # `import qwen_ds` registers the classes
            continue
        assert FLOORS[other] <= FLOORS[own], f"{place(file)} imports {module}"
        assert not module.startswith(NEVER.get(own, ())), f"{place(file)} imports {module}"


def test_no_modules_import_each_other_in_a_ring() -> None:
    """Imports inside functions and those for the type checker alone count, too."""
    graph = {name: own_imports(file) for name, file in MODULES.items() if name != "qwen_ds"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", OWNERS)
def test_a_foreign_library_has_one_owner(library: str) -> None:
    users = {place(f) for f in SOURCES if any(m.split(".")[0] == library for m in imports(f))}
    assert users and all(user.startswith(OWNERS[library]) for user in users), users


def test_only_the_engine_brings_deepspeed_in() -> None:
    """By what gets imported, not by what the sources say: every module but those above the
    engine."""
    above = {"qwen_ds.train.engine"}
    while grown := {
        name
        for name, file in MODULES.items()
        if name not in above
        and any(m in above or m.startswith("qwen_ds.train.engine") for m in own_imports(file))
    }:
        above |= grown
    below = [
        n
        for n in MODULES
        if n not in above and not n.startswith(("qwen_ds.train.engine", "launch"))
    ]
    below = [name for name in below if not name.endswith("__main__")]
    script = f"import importlib, sys\nfor name in {below!r}: importlib.import_module(name)\n"
    script += "print([m for m in sys.modules if m.split('.')[0] == 'deepspeed'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert {"qwen_ds.plan.table", "qwen_ds.train.loss", "serve.predict"} <= set(below)


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_FILE_LINES and file.name not in JUNK_DRAWERS
    assert len(own_imports(file)) <= MAX_OWN_IMPORTS, own_imports(file)
    for node in functions(file):
        assert node.end_lineno is not None
        doc = node.body[0] if ast.get_docstring(node) is not None else None
        doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
        lines = node.end_lineno - node.lineno + 1 - doc_lines
        assert lines <= MAX_FUNCTION_LINES, f"{place(file)}: {node.name}"


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_few_functions_take_many_parameters() -> None:
    long = []
    for file in SOURCES:
        for node in functions(file):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            count = len([name for name in names if name not in ("self", "cls", "ctx")])
            if count > MAX_PARAMETERS and node.name not in CONTRACTS:
                long.append(f"{place(file)}: {node.name} ({count})")
    assert len(long) <= MAX_LONG_SIGNATURES, long


def test_no_two_public_classes_have_one_name() -> None:
    places = defaultdict(list)
    for file in SOURCES:
        for node in tree_of(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(place(file))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_docstring_begins_with_what() -> None:
    """The first line is a noun that names the thing, or an imperative verb."""
    found = []
    for file in SOURCES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node) or ""
                if re.match(r"(What|Those|That which)\b", doc):
                    found.append(f"{place(file)}: {doc.splitlines()[0]}")
    assert not found


def reached_by(test: Path) -> set[str]:
    """Our modules that a test file imports or names, those that they import, and all of a command
    that it runs."""
    text = test.read_text(encoding="utf-8")
    named = {name for name in MODULES if re.search(rf"\b{re.escape(name)}\b", text)}
    direct = named | set(own_imports(test))
    run: set[str] = set()
    new = {name for word, name in COMMANDS.items() if word in text}
    while new:
        run |= new
        new = {other for name in new for other in own_imports(MODULES[name])} - run
    return run | direct | {other for name in direct for other in own_imports(MODULES[name])}


def test_each_module_has_its_test_file_or_one_that_is_named_here() -> None:
    """Its own has its name and lies where it lies."""
    for file in SOURCES:
        source = Path(place(file).removeprefix("qwen_ds/"))
        own = ROOT / "tests" / source.parent / f"test_{file.name}"
        stands_alone = file.name in ("__init__.py", "__main__.py") or own.is_file()
        assert stands_alone or place(file) in COVERED_BY, f"{place(file)}: no {own}"
    for name, test in COVERED_BY.items():
        assert (ROOT / name).is_file(), f"{name} is gone: delete its line"
        assert module_of(ROOT / name) in reached_by(ROOT / test), f"{test} never meets {name}"


def test_environment_variables_are_read_in_one_place() -> None:
    """A launcher's, that is; and those that say where caches lie and which compiler to take, as for
    every program. Handing the environment on to a child process reads nothing from it."""
    reads = re.compile(r"os\.environ(\[|\.get|\.setdefault)|os\.getenv| in os\.environ")
    readers = {place(f) for f in SOURCES if reads.search(f.read_text(encoding="utf-8"))}
    assert readers == {"qwen_ds/dist.py", "qwen_ds/disk/place.py", "qwen_ds/machine.py"}


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_nothing_loads_code_or_pickles(file: Path) -> None:
    for node in ast.walk(tree_of(file)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        banned = ("pickle.load", "pickle.loads", "eval", "exec")
        assert called not in banned, f"{place(file)}: {called}"
        arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
        trusts = arguments.get("trust_remote_code")
        assert trusts in (None, "False"), f"{place(file)}: {called}"
        if called == "torch.load":
            assert arguments.get("weights_only") == "True", f"{place(file)}: torch.load"


def printed(file: Path) -> Iterator[str]:
    """Calls that write to a terminal by themselves."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            streams = ("sys.stdout.write", "sys.stderr.write", "sys.__std", "console.print")
            if name in ("print", "tqdm.write", "traceback.print_exc") or name.startswith(streams):
                yield f"{place(file)}:{node.lineno}: {name}"


def test_text_is_printed_by_one_function() -> None:
    """`show` spells what a terminal would act on; a bare print would send it."""
    found = [call for file in SOURCES if place(file) not in PRINTERS for call in printed(file)]
    assert not found
