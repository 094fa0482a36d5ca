"""Fold adapters into their base, a block of rows at a time, and prove the result.

A tensor that no adapter touches keeps its very bytes, a touched one is summed in fp32 and rounded once. The output is
built in `<output>.partial` and renamed, so `<output>` is complete or absent; one that fails its proof stays as
`<output>.rejected`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen_ds.data.sources import locate
from qwen_ds.errors import UserError
from qwen_ds.export.card import Origin, write_card
from qwen_ds.export.changes import Adapters
from qwen_ds.export.checkpoint import file_facts
from qwen_ds.export.layout import QWEN, Format
from qwen_ds.export.plan import MergeDtype, Plan, make_plan, write_index
from qwen_ds.export.report import REPORT_NAME, MergeReport, rejected_name
from qwen_ds.export.source import Source
from qwen_ds.export.stream import BLOCK_BYTES, ChangedTensor, write_shard
from qwen_ds.export.verify import check_files, verify_merge
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.folder import require_folder, write_json

Progress = Callable[[int, int], None]


def merge(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: MergeDtype = "keep",
    to: Format = QWEN,
    verify: bool = True,
    allow_pickle: bool = False,
    check_texts: Sequence[str] = (),
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> MergeReport:
    """Write base + adapters to the folder `output`.

    Args:
        base: a checkpoint folder in safetensors.
        adapters: PEFT folders; each is folded onto the result of the one before, and the sum of all is rounded once.
            Without any the base is only brought to another dtype or format.
        weights: one for each adapter: instead of the above, the weighted sum of what each does to the bare base.
        dtype: of all tensors in the output; "keep" leaves each as it is in the base.
        to: the output's format: its tensors' layout, and the files that are written beside the weights.
        verify: compare the output's logits with base + adapters, where both fit in memory (see `verify_merge`).
        allow_pickle: also read pytorch_model.bin and adapter_model.bin, with `weights_only`.
        check_texts: files with texts on which a converted tokenizer must agree with the base's.
        progress: called with (bytes read, bytes in all) after each block.

    Returns:
        The report. If it is `rejected`, the output is under the name `<output>.rejected` instead.

    Raises:
        UserError: an adapter that does not fit, a broken base, an output that exists or cannot be written.
    """
    if not adapters and dtype == "keep" and to is QWEN:
        raise UserError("neither an adapter nor a dtype was given; expected --adapter, or --dtype to convert the base")
    if weights is not None and len(weights) != len(adapters):
        raise UserError(f"{len(weights)} weights and {len(adapters)} adapters were given; expected one for each")
    if check_texts and to.check_tokenizer is None:
        raise UserError(
            "check_texts was given, but the tokenizer stays as it is; expected a conversion to or from qwen2"
        )
    for file in check_texts:
        locate(file)
    members = tuple(read_adapter(folder, allow_pickle=allow_pickle) for folder in adapters)
    stack = Adapters(members, None if weights is None else tuple(weights))
    plan = make_plan(base, stack, to, dtype, allow_pickle)
    partial = _prepare_output(plan, output)
    try:
        write_json(partial / REPORT_NAME, {"output": str(output), "status": "unfinished"})
        report = _build(plan, output, partial, verify, check_texts, block_bytes, progress)
        write_json(partial / REPORT_NAME, asdict(report))
    except UserError:
        # Found only while the values went by. What a kill leaves is cleared by the next merge to this name.
        shutil.rmtree(partial)
        raise
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{error.filename or partial}: {error.strerror}; expected files that can be read and a disk that takes the "
            "output; what was written of it is removed"
        ) from error
    partial.rename(report.folder)
    return report


def _build(
    plan: Plan,
    output: Path,
    partial: Path,
    verify: bool,
    check_texts: Sequence[str],
    block_bytes: int,
    progress: Progress | None,
) -> MergeReport:
    """Fill the folder `partial` and prove it."""
    started = time.monotonic()
    changed: dict[str, ChangedTensor] = {}
    outputs: dict[str, dict[str, Any]] = {}
    total = sum(spec.num_bytes for spec in plan.base.tensors.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    with Source(plan.base) as source:
        for shard in plan.shards:
            written = write_shard(plan, shard, source, partial / shard.name, block_bytes, advance)
            outputs[shard.name] = written.facts
            for name, after in written.changed.items():
                changed[name] = changed[name].plus(after) if name in changed else after
        inputs = {shard.path.name: source.facts(shard.path.name) for shard in plan.base.shards}
    check_files(partial, {shard.name: list(shard.tensors) for shard in plan.shards})
    write_index(plan, partial)
    edits = plan.format.write_files(plan.base.folder, partial, None if plan.dtype == "keep" else plan.dtype)
    adapters = tuple(adapter.folder for adapter in plan.adapters.members)
    write_card(partial, output.name, Origin(plan.base.folder, adapters, plan.format.name))
    _add_small_files(plan, partial, inputs, outputs)
    report = _report(plan, output, changed, edits, inputs, outputs, time.monotonic() - started)
    if plan.format.check_tokenizer is not None:
        check = plan.format.check_tokenizer(plan.base.folder, partial, check_texts)
        report = replace(report, tokenizer=check)
    if verify:
        proof = verify_merge(plan.base.folder, plan.adapters, partial, plan.tensors, plan.rounded())
        report = replace(report, verification=proof)
    return report


def _report(
    plan: Plan,
    output: Path,
    changed: dict[str, ChangedTensor],
    edits: dict[str, str],
    inputs: dict[str, dict[str, Any]],
    outputs: dict[str, dict[str, Any]],
    seconds: float,
) -> MergeReport:
    stored, kept = plan.base.tensors, {rows.tensor for blocks in plan.layout.values() for rows in blocks}
    converted = {
        rows.tensor
        for name, spec in plan.tensors.items()
        for rows in plan.layout[name]
        if spec.dtype != stored[rows.tensor].dtype and rows.tensor not in changed
    }
    return MergeReport(
        base=str(plan.base.folder),
        adapters=[str(adapter.folder) for adapter in plan.adapters.members],
        weights=None if plan.adapters.weights is None else list(plan.adapters.weights),
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
    )


def _prepare_output(plan: Plan, output: Path) -> Path:
    """Check the place for the output and make the folder that it is built in."""
    require_folder(output.parent, make=True)
    if output.resolve() == plan.base.folder.resolve():
        raise UserError(f"{output}: is the base itself; expected another folder for the output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; expected a new folder for the output")
    partial = output.with_name(output.name + ".partial")
    for old in (partial, rejected_name(output)):
        # Left by an earlier merge to this name. Anything else under that name is not ours to delete.
        if old.exists():
            if not (old / REPORT_NAME).is_file():
                raise UserError(f"{old}: in the way and not an earlier merge's; expected to build the output there")
            shutil.rmtree(old)
    needed = 1.01 * plan.num_bytes  # headers and small files
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(f"{output.parent}: {free / 1e9:.1f} GB free; expected {needed / 1e9:.1f} GB for the output")
    require_folder(partial, make=True)
    return partial


def _add_small_files(
    plan: Plan, output: Path, inputs: dict[str, dict[str, Any]], outputs: dict[str, dict[str, Any]]
) -> None:
    """Size and sha256 of the files beside the weights, on both sides, and of the adapters'."""
    for path in sorted(output.iterdir()):
        if path.name not in outputs and path.name != REPORT_NAME:
            outputs[path.name] = file_facts(path)
            source = plan.base.folder / path.name
            if source.is_file():
                inputs[path.name] = file_facts(source)
    for number, adapter in enumerate(plan.adapters.members, start=1):
        label = "adapter" if len(plan.adapters.members) == 1 else f"adapter{number}"
        for path in sorted(adapter.folder.glob("adapter_*")):
            if path.is_file():
                inputs[f"{label}/{path.name}"] = file_facts(path)
