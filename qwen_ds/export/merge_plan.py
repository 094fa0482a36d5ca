"""Everything about an output folder that is decided before its first byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_ds.disk.weights import FLOAT_DTYPES, TensorSpec
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.export.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from qwen_ds.export.layout import Format, Layout
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.model.adapter import check_adapter_fits

MergeDtype = Literal["keep", "bfloat16", "float16", "float32"]
_FILE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Hubs and file systems take files of 4 GB; a header is far below the 1 MiB left for it. A single tensor that is larger
# gets a file of its own: the format has no way to cut one.
MAX_SHARD_BYTES = 4_000_000_000 - 2**20


@dataclass(frozen=True, slots=True)
class Shard:
    """A weight file of the output, and its tensors in the order of their bytes."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is read, what is done to it and where it goes.

    Attributes:
        changed: the base's tensors that the adapters change.
        has_index: whether the output gets an index.
    """

    base: Checkpoint
    adapters: Adapters
    format: Format
    dtype: MergeDtype
    layout: Layout
    changed: frozenset[str]
    shards: tuple[Shard, ...]
    has_index: bool

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Of the output."""
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def bytes_read(self, shard: Shard) -> int:
        """Bytes of the base that go into a file of the output."""
        stored = self.base.tensors
        blocks = [rows for spec in shard.tensors for rows in self.layout[spec.name]]
        return sum(rows.num_rows * stored[rows.tensor].bytes_per_row for rows in blocks)

    def rounded(self) -> dict[str, str]:
        """The base's tensors whose values are rounded (summed, or brought to a narrower dtype) -> the dtype."""
        stored, found = self.base.tensors, {}
        for name, spec in self.tensors.items():
            for rows in self.layout[name]:
                if rows.tensor in self.changed or spec.dtype not in (
                    stored[rows.tensor].dtype,
                    "F32",
                ):
                    found[rows.tensor] = spec.dtype
        return found


def make_plan(
    base: Path, adapters: Adapters, to: Format, dtype: MergeDtype, allow_pickle: bool
) -> Plan:
    """Read the headers and check that everything fits.

    Raises:
        UserError: an adapter that does not fit, a broken base.
    """
    checkpoint = open_checkpoint(base, allow_pickle)
    for adapter in adapters.members:
        check_adapter_fits(adapter, checkpoint.shapes)
    layout = to.layout(checkpoint)
    changed = frozenset(adapters.changed_tensors())
    specs = {name: _output_spec(name, checkpoint, layout, dtype, changed) for name in layout}
    shards = _cut(checkpoint, layout, specs)
    has_index = len(shards) > 1 or checkpoint.index_metadata is not None
    return Plan(checkpoint, adapters, to, dtype, layout, changed, shards, has_index)


def _output_spec(
    name: str, base: Checkpoint, layout: Layout, dtype: MergeDtype, changed: frozenset[str]
) -> TensorSpec:
    blocks = layout[name]
    parts = [base.tensors[rows.tensor] for rows in blocks]
    for part in parts:
        if part.dtype not in FLOAT_DTYPES and (part.name in changed or dtype != "keep"):
            raise UserError(
                f"{base.folder}: {part.name} is stored as {part.dtype}; expected one of {', '.join(FLOAT_DTYPES)}"
            )
        if part.dtype != parts[0].dtype and dtype == "keep":
            raise UserError(
                f"{base.folder}: {part.name} is {part.dtype} and {parts[0].name} is {parts[0].dtype}; expected one"
                f" dtype, since they become {name} (or choose a --dtype)"
            )
    whole = len(blocks) == 1 and blocks[0].num_rows == parts[0].num_rows
    shape = (
        parts[0].shape if whole else (sum(rows.num_rows for rows in blocks), *parts[0].shape[1:])
    )
    return TensorSpec(name, parts[0].dtype if dtype == "keep" else _FILE_DTYPES[dtype], shape)


def _cut(base: Checkpoint, layout: Layout, specs: dict[str, TensorSpec]) -> tuple[Shard, ...]:
    """The base's files under the base's names where none is too large; else files of our own, full but for the last.

    Tensors keep the order of the base, so that it is read from front to back.
    """
    places = [(at, spec.name) for at, shard in enumerate(base.shards) for spec in shard.tensors]
    order = {name: (at, i) for i, (at, name) in enumerate(places)}
    names = sorted(layout, key=lambda name: (order[layout[name][0].tensor], layout[name][0].first))
    groups: list[list[TensorSpec]] = [[] for _ in base.shards]
    for name in names:
        groups[order[layout[name][0].tensor][0]].append(specs[name])
    files = [_safetensors_name(shard.path.name) for shard in base.shards]
    if any(
        not group or (len(group) > 1 and _num_bytes(group) > MAX_SHARD_BYTES) for group in groups
    ):
        groups = [[]]
        for name in names:
            if groups[-1] and _num_bytes(groups[-1]) + specs[name].num_bytes > MAX_SHARD_BYTES:
                groups.append([])
            groups[-1].append(specs[name])
        files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            files = [SINGLE_NAME]
    metadata = base.shards[0].metadata
    return tuple(
        Shard(file, tuple(group), metadata) for file, group in zip(files, groups, strict=True)
    )


def _num_bytes(specs: list[TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs)


def _safetensors_name(name: str) -> str:
    """The usual name of what a pickle of that usual name holds; others stay."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def write_index(plan: Plan, output: Path) -> None:
    """The index of the output's weight files, where it has one."""
    if plan.has_index:
        weight_map = {spec.name: shard.name for shard in plan.shards for spec in shard.tensors}
        metadata = {**(plan.base.index_metadata or {}), "total_size": plan.num_bytes}
        write_json(
            output / INDEX_NAME,
            {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
        )
