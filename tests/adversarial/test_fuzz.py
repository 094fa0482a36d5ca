"""Random damage to the files that a user brings: whatever comes, it is read or it is a UserError.

Each document begins as a valid one. Types, ranges, nesting and bytes of it are changed, so that
most examples get past the first check, and shrink to the one change that matters.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qwen_ds.data.read.sources import ReadOptions, iter_conversations
from qwen_ds.disk.shards import open_stored
from qwen_ds.disk.weights import read_header
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.folder import inspect_folder
from qwen_ds.plan.deepspeed_json import resolve
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import Recipe
from tests.conftest import GOLDEN

Read = Callable[[Path], object]
"""Read the document from a folder that has it, with what belongs to it."""

# What people and programs really put where something else was expected.
DEEP = re.compile(rb'"?DEEP(\d+)"?')  # stands for a list in a list in a list, so many times
ODD = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, -(2**63)]),
    st.integers(-5, 5), st.floats(), st.text(max_size=8),
    st.sampled_from(["auto", "none", "", "1", "DEEP60", "DEEP990", "DEEP100000"]),
    st.just([]), st.just({}), st.just([[]]), st.just({"": None}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every member of a document."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """A valid document with one to four members changed, removed, doubled or added."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(document))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        holder = document
        for step in above:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "remove", "add", "swap"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(ODD))
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = copy.deepcopy(draw(ODD))
            case "add":
                holder.insert(key, copy.deepcopy(draw(ODD)))
            case _:
                *above, other = draw(st.sampled_from(places))
                found = document
                with contextlib.suppress(KeyError, IndexError, TypeError):
                    for step in (*above, other):
                        found = found[step]
                    holder[key] = copy.deepcopy(found)
    return document


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes with some of them cut off, flipped, or replaced."""
    for _ in range(draw(st.integers(0, 2))):
        if not raw:
            break
        first = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(["cut", "replace", "insert", "double"])):
            case "cut":
                raw = raw[:first]
            case "replace":
                raw = raw[:first] + draw(st.binary(max_size=4)) + raw[first + 1 :]
            case "insert":
                odd = [b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"\r", b"\\ud800", b"1e999"]
                raw = raw[:first] + draw(st.sampled_from(odd)) + raw[first:]
            case _:
                raw = raw[:first] + raw[first // 2 :]
    return raw


def as_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


def as_lines(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    return b"".join(as_json(row) + b"\n" for row in rows)


def as_csv(rows: Any) -> bytes:
    cells = [row if isinstance(row, list) else [row] for row in rows]
    lines = (",".join(str(cell) for cell in row) for row in cells)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def as_yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def as_header(header: Any) -> bytes:
    """A safetensors file: the length of the header, the header, zeros for the tensors."""
    raw = as_json(header)
    ends = [0]
    if isinstance(header, dict):
        entries = (entry for entry in header.values() if isinstance(entry, dict))
        offsets = (entry.get("data_offsets") for entry in entries)
        ends += [e for o in offsets if isinstance(o, list) for e in o if isinstance(e, int)]
    return len(raw).to_bytes(8, "little") + raw + bytes(min(max(0, *ends, 0), 100_000))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DEEPSPEED = {
    "train_batch_size": 128,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10},
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "zero_hpz_partition_size": 1,
    },
    "steps_per_print": 100,
}
RECIPE = {
    "output_dir": "runs/a",
    "seed": 7,
    "method": "lora",
    "model": {"path": "base", "dtype": "bfloat16", "activation_checkpointing": "auto"},
    "data": {"train": ["a.jsonl", "b.json"], "weights": [1.0, 2.0], "columns": {"content": "q"}},
    "lora": {"r": 8, "alpha": 16, "targets": ["c_attn", "c_proj"], "dropout": 0.05},
    "optim": {"lr": 3e-4, "betas": [0.9, 0.95], "schedule": "cosine", "warmup_steps": 10},
    "log": {"profile_steps": [2, 3]},
    "save": {"every_steps": 10, "keep": 2},
}
ROWS = [
    {"content": "q", "summary": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "do", "input": "this", "output": "done", "history": [["q", "a"]]},
    {"prompt": "q", "response": "a", "system": "s"},
    {"question": "q", "chatgpt_answers": ["a", "b"]},
]
TABLE = [["instruction", "input", "output"], ["a", "b", "c"], ['"d,e"', "", '"f""g"'], [1, 2, 3]]


def read_rows(path: Path) -> None:
    """Both ways to treat a bad row; the refusal of one does not keep the other from its turn."""
    refused: list[UserError] = []
    for options in (ReadOptions(), ReadOptions(bad_rows="skip")):
        try:
            for _ in iter_conversations([path], options):
                pass
        except UserError as error:
            assert "\n" not in str(error), f"more than one line: {error}"
            refused.append(error)
    if refused:
        raise refused[0]


def read_recipe(path: Path) -> None:
    load_recipe(["--config", str(path)])


def resolve_deepspeed(path: Path) -> None:
    for method in ("lora", "full"):
        config = read_deepspeed_json(str(path))
        recipe = Recipe(method=method)  # type: ignore[arg-type]
        resolve(config, recipe, frozenset(), hidden_size=64, world=2)


@dataclass(frozen=True)
class Kind:
    """One kind of file: a valid one, how it is written, and who reads it."""

    name: str  # of the file
    valid: Any
    write: Callable[[Any], bytes]
    read: Read
    beside: Mapping[str, Path] = field(default_factory=dict)
    """What the file belongs to, under the names that it has there."""


SMALL, ADAPTER = GOLDEN / "small", GOLDEN / "lora" / "adapter"
MODEL = {"qwen.tiktoken": SMALL / "mini.tiktoken", "model.safetensors": SMALL / "model.safetensors"}
SHARD = "model-00001-of-00001.safetensors"


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def index() -> dict[str, Any]:
    tensors = read_header(SMALL / "model.safetensors").tensors
    size = sum(spec.num_bytes for spec in tensors)
    return {
        "metadata": {"total_size": size},
        "weight_map": {spec.name: SHARD for spec in tensors},
    }


KINDS = {
    "config": Kind(
        "config.json", _json(SMALL / "config.json"), as_json,
        lambda path: inspect_folder(path.parent), MODEL,
    ),
    "index": Kind(
        "model.safetensors.index.json", index(), as_json,
        lambda path: open_stored(path.parent), {SHARD: SMALL / "model.safetensors"},
    ),
    "header": Kind("model.safetensors", HEADER, as_header, read_header),
    "adapter": Kind(
        "adapter_config.json", _json(ADAPTER / "adapter_config.json"), as_json,
        lambda path: read_adapter(path.parent),
        {"adapter_model.safetensors": ADAPTER / "adapter_model.safetensors"},
    ),
    "deepspeed": Kind("ds.json", DEEPSPEED, as_json, resolve_deepspeed),
    "recipe": Kind("recipe.yaml", RECIPE, as_yaml, read_recipe),
    "lines": Kind("rows.jsonl", ROWS, as_lines, read_rows),
    "csv": Kind("rows.csv", TABLE, as_csv, read_rows),
}  # fmt: skip


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"1" + b"]" * depth


def documents(kind: Kind) -> st.SearchStrategy[bytes]:
    """Files of a kind: members changed, bytes damaged, or both."""

    def written(document: Any) -> bytes:
        return DEEP.sub(lambda found: _nested(int(found[1])), kind.write(document))

    whole = st.one_of(st.just(kind.valid), changed(kind.valid))
    return whole.map(written).flatmap(damaged)


def fuzz(name: str, seconds: float, *, same_each_time: bool) -> Counter[str]:
    """Read damaged files of a kind for some seconds; a failure shows the smallest such file.

    Counts the files that were "read" and that were "refused".
    """
    kind = KINDS[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as here:
        for beside, source in kind.beside.items():
            (Path(here) / beside).symlink_to(source)
        path = Path(here) / kind.name

        @settings(
            max_examples=1_000_000 if seconds > 10 else EXAMPLES, deadline=None, database=None,
            derandomize=same_each_time, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(documents(kind))
        def reads_or_refuses(raw: bytes) -> None:
            # Once a fault is found, hypothesis goes on to make it smaller, for longer than this.
            if time.monotonic() - began > seconds and not found:
                return
            path.write_bytes(raw)
            try:
                kind.read(path)
            except UserError as error:
                assert "\n" not in str(error), f"more than one line: {error}"
                outcomes["refused"] += 1
            except Exception:
                found.append(raw)
                raise
            else:
                outcomes["read"] += 1

        found: list[bytes] = []
        outcomes: Counter[str] = Counter()
        reads_or_refuses()
    return outcomes


# As many as one file of each kind takes two seconds for, at most; the same ones each time.
EXAMPLES = 150


@pytest.mark.parametrize("name", KINDS)
def test_the_valid_file_is_read(name: str, tmp_path: Path) -> None:
    """Else the changes would start from something that no check lets pass."""
    kind = KINDS[name]
    for beside, source in kind.beside.items():
        shutil.copy(source, tmp_path / beside)
    path = tmp_path / kind.name
    path.write_bytes(kind.write(kind.valid))
    kind.read(path)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_a_user_error(name: str) -> None:
    outcomes = fuzz(name, 8, same_each_time=True)
    assert outcomes["read"] and outcomes["refused"]


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_a_minute_of_damage_is_a_user_error(name: str) -> None:
    outcomes = fuzz(name, 60, same_each_time=False)
    assert outcomes["read"] and outcomes["refused"]
