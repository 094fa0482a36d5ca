"""The files of an output, in the order of their writing: weights, index, settings, card."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_ds.disk.digest import weights_sha256
from qwen_ds.disk.shards import INDEX_NAME, write_index
from qwen_ds.disk.weights import TensorSpec, file_facts, open_tensors
from qwen_ds.disk.write import sync
from qwen_ds.export.base_check import doubts
from qwen_ds.export.card import CARD_NAME, write_card
from qwen_ds.export.merge_plan import MergePlan
from qwen_ds.export.merge_report import MergeReport
from qwen_ds.export.stream.shard import ChangedTensor, add_changed, write_shard
from qwen_ds.export.stream.source import Source
from qwen_ds.model.carry_over import legal_texts

Facts = dict[str, dict[str, Any]]
"""File name -> bytes and sha256."""
ShowProgress = Callable[[int, int], None]


def build_files(
    plan: MergePlan,
    source: Source,
    folder: Path,
    output: Path,
    block_bytes: int,
    progress: ShowProgress | None,
) -> MergeReport:
    """Write all files of `output` into `folder`, but for the report, which is returned.

    It is that of a merge before its proof. UserError if a value of the output is not finite.
    """
    started = time.monotonic()
    outputs, changed = _write_weights(plan, source, folder, block_bytes, progress)
    sums = {shard.path.name: source.facts(shard.path.name) for shard in plan.base.shards}
    edits = _write_small_files(plan, folder, _sha256_of(outputs), _sha256_of(sums))
    for path in sorted(folder.iterdir()):
        if path.name not in outputs:
            outputs[path.name] = file_facts(path)
    inputs = _input_facts(plan, source, folder, outputs)
    seconds = time.monotonic() - started
    stored, adapters = plan.base.tensors, plan.adapters
    kept = {block.tensor for blocks in plan.layout.values() for block in blocks}
    converted = {
        block.tensor
        for name, spec in plan.tensors.items()
        for block in plan.layout[name]
        if spec.dtype != stored[block.tensor].dtype and block.tensor not in changed
    }
    return MergeReport(
        base=str(plan.base.folder),
        adapters=[str(adapter.folder) for adapter in adapters.members],
        weights=adapters.weights,
        output=str(output),
        format=plan.format.name,
        dtype=plan.dtype,
        changed=changed,
        untouched=len(kept) - len(changed) - len(converted),
        converted=len(converted),
        left_out=sorted(stored.keys() - kept),
        edits=edits,
        inputs=inputs,
        outputs=outputs,
        seconds=round(seconds, 3),
        warnings=[*doubts(plan.base.folder, adapters.members), *plan.notes],
    )


def _write_weights(
    plan: MergePlan, source: Source, folder: Path, block_bytes: int, progress: ShowProgress | None
) -> tuple[Facts, dict[str, ChangedTensor]]:
    """Write the weight files; returns their facts, and the changes of the base's tensors."""
    total, done = plan.bytes_read, 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    facts: Facts = {}
    changed: dict[str, ChangedTensor] = {}
    flushed = []
    # Publishing waits until the disk has every file. Here it takes one while the next is written.
    with ThreadPoolExecutor(max_workers=1) as flushing:
        for name in plan.shards:
            path = folder / name
            facts[name], part = write_shard(plan, source, path, block_bytes, advance)
            add_changed(changed, part)  # a tensor's rows may lie in several files
            flushed.append(flushing.submit(sync, path))
    for done_flushing in flushed:
        done_flushing.result()  # raises the disk's error, which the system reports only once
    for name, specs in plan.shards.items():
        _check_header(folder / name, specs)
    return dict(sorted(facts.items())), dict(sorted(changed.items()))


def _check_header(path: Path, specs: Iterable[TensorSpec]) -> None:
    """Check that the safetensors library reads what our block writer meant."""
    with open_tensors(path) as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        read = {key: (piece.get_dtype(), list(piece.get_shape())) for key, piece in found.items()}
    wanted = {spec.name: (spec.dtype, list(spec.shape)) for spec in specs}
    assert read == wanted, f"{path}: safetensors reads another header than written"


def _sha256_of(weights: Facts) -> str:
    return weights_sha256({name: facts["sha256"] for name, facts in weights.items()})


def _write_small_files(
    plan: MergePlan, folder: Path, own_sha256: str, base_sha256: str
) -> dict[str, str]:
    """Write everything beside the weights, whose checksums are given; returns what was changed, by
    file name."""
    if len(plan.shards) > 1 or plan.base.index_name is not None:
        members = {file: [spec.name for spec in specs] for file, specs in plan.shards.items()}
        write_index(folder, members, plan.num_bytes, plan.base.index_metadata)
    base, adapters = plan.base.folder, plan.adapters
    dtype = None if plan.dtype == "keep" else plan.dtype
    edits = plan.format.write_files(base, folder, dtype, bool(adapters.members))
    sums = own_sha256, base_sha256
    write_card(folder, base, adapters, plan.format.name, plan.dtype, sums)
    return edits


def _input_facts(plan: MergePlan, source: Source, folder: Path, outputs: Facts) -> Facts:
    """Size and sha256 of all files of the base and the adapters that were read."""
    base, adapters = plan.base, plan.adapters.members
    facts = {shard.path.name: source.facts(shard.path.name) for shard in base.shards}
    carried = legal_texts(folder) if plan.format.reads else outputs.keys() - {INDEX_NAME, CARD_NAME}
    index = () if base.index_name is None else (base.index_name,)
    for name in sorted({*carried, *plan.format.reads, *index} - facts.keys()):
        if (base.folder / name).is_file():
            facts[name] = file_facts(base.folder / name)
    for number, adapter in enumerate(adapters, start=1):
        label = "adapter" if len(adapters) == 1 else f"adapter{number}"
        facts |= {f"{label}/{path.name}": file_facts(path) for path in adapter.files()}
    return facts
