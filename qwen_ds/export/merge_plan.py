"""The plan of a merge: everything about the output folder that is decided before its first byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_ds.disk.shards import (
    MAX_SHARD_BYTES,
    StoredWeights,
    only_pickles,
    open_stored,
    plan_shards,
)
from qwen_ds.disk.weights import DTYPE_NAMES, FLOAT_DTYPES, TORCH_DTYPES, TensorSpec
from qwen_ds.errors import UserError
from qwen_ds.export.choices import MergeDtype
from qwen_ds.export.formats import Format
from qwen_ds.export.layout import Layout
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.model.adapter import check_adapter_fits
from qwen_ds.model.carry_over import check_carried

GivenBase = Path | StoredWeights
"""The base of a merge: a folder, or the headers of one that was inspected."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Input, changes and output of a merge."""

    base: StoredWeights
    adapters: Adapters
    format: Format
    dtype: MergeDtype
    layout: Layout
    changed: frozenset[str]  # the base's tensors that the adapters change
    shards: dict[str, tuple[TensorSpec, ...]]
    """Weight file of the output -> its tensors in the order of their bytes."""
    notes: tuple[str, ...] = ()  # what the adapters' configurations say in vain

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The output's tensors."""
        return {spec.name: spec for specs in self.shards.values() for spec in specs}

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the base that go into the output."""
        stored = self.base.tensors
        blocks = [block for blocks in self.layout.values() for block in blocks]
        return sum(block.num_rows * stored[block.tensor].bytes_per_row for block in blocks)

    def rounded(self, of_output: bool = False) -> dict[str, str]:
        """The base's tensors (or the output's) whose values are rounded -> the dtype rounded to.

        They are summed, or brought to a narrower dtype.
        """
        stored, found = self.base.tensors, {}
        for name, spec in self.tensors.items():
            for block in self.layout[name]:
                exact = spec.dtype in (stored[block.tensor].dtype, "F32")
                if block.tensor in self.changed or not exact:
                    found[name if of_output else block.tensor] = spec.dtype
        return found


def make_plan(
    base: GivenBase,
    adapters: Adapters,
    to: Format,
    dtype: MergeDtype,
    allow_pickle: bool,
) -> MergePlan:
    """Plan with a base's headers, which are read where a folder is given. UserError if an adapter
    does not fit, the base is broken, or a file that travels to the output may not be copied."""
    stored = open_stored(base, allow_pickle) if isinstance(base, Path) else base
    if stored.are_pickles and not allow_pickle:
        raise only_pickles(stored.folder)
    check_carried(stored.folder)
    notes = [
        f"{adapter.folder.name}: {note}"
        for adapter in adapters.members
        for note in check_adapter_fits(adapter, stored.shapes)
    ]
    layout = to.layout(stored)
    changed = frozenset(adapters.changed_tensors())
    specs = {name: _output_spec(name, stored, layout, dtype, changed) for name in layout}
    return MergePlan(
        stored, adapters, to, dtype, layout, changed, _cut(stored, layout, specs), tuple(notes)
    )


def _output_spec(
    name: str, base: StoredWeights, layout: Layout, dtype: MergeDtype, changed: frozenset[str]
) -> TensorSpec:
    blocks = layout[name]
    parts = [base.tensors[block.tensor] for block in blocks]
    for part in parts:
        if part.dtype not in FLOAT_DTYPES and (part.name in changed or dtype != "keep"):
            raise UserError(
                f"{base.folder}: {part.name} is stored as {part.dtype}; expected one of"
                f" {', '.join(FLOAT_DTYPES)}"
            )
        if part.dtype != parts[0].dtype and dtype == "keep":
            raise UserError(
                f"{base.folder}: {part.name} is {part.dtype} and {parts[0].name} is"
                f" {parts[0].dtype}; expected one dtype, since they become {name} (or choose a"
                " --dtype)"
            )
    num_rows = sum(block.num_rows for block in blocks)
    shape = (num_rows, *parts[0].shape[1:]) if parts[0].shape else ()
    stored_as = parts[0].dtype if dtype == "keep" else DTYPE_NAMES[TORCH_DTYPES[dtype]]
    return TensorSpec(name, stored_as, shape)


def _cut(
    base: StoredWeights, layout: Layout, specs: dict[str, TensorSpec]
) -> dict[str, tuple[TensorSpec, ...]]:
    """Keep the base's files and names where none becomes too large or empty; else cut new ones.

    Tensors keep the order of the base, so that it is read from front to back.
    """
    order = {name: i for i, name in enumerate(base.tensors)}
    names = sorted(layout, key=lambda name: (order[layout[name][0].tensor], layout[name][0].first))
    members: dict[str, list[str]] = {}
    for shard in base.shards:
        here = {spec.name for spec in shard.tensors}
        # A pickle's usual name becomes the usual one of safetensors; other names stay.
        file = shard.path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        members[file] = [name for name in names if layout[name][0].tensor in here]
    sizes = {name: specs[name].num_bytes for name in names}
    if any(
        not group or (len(group) > 1 and sum(sizes[name] for name in group) > MAX_SHARD_BYTES)
        for group in members.values()
    ):
        members = plan_shards(sizes, MAX_SHARD_BYTES)
    return {file: tuple(specs[name] for name in group) for file, group in members.items()}
