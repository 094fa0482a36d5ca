"""Fold an adapter into its base, a block of rows at a time, and prove the result.

The output has the base's shard files and tensor names; a tensor that the adapter does not touch keeps its very bytes,
a touched one is summed in fp32 and rounded once. It is built in `<output>.partial` and renamed, so `<output>` is
complete or absent; one that fails its proof stays as `<output>.rejected`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qwen_ds.errors import UserError
from qwen_ds.export import checkpoint as folders
from qwen_ds.export.changes import Change, load_change
from qwen_ds.export.checkpoint import Checkpoint
from qwen_ds.export.safetensors_file import (
    FLOAT_DTYPES,
    BlockReader,
    BlockWriter,
    Header,
    RowRange,
    TensorSpec,
    row_ranges,
)
from qwen_ds.export.verify import Verification, check_files, verify_merge
from qwen_ds.model.adapter import Adapter, check_adapter_fits, read_adapter
from qwen_ds.model.folder import require_folder, write_json

MergeDtype = Literal["keep", "bfloat16", "float16", "float32"]
REPORT_NAME = "merge_report.json"

_FILE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A block takes about nine times this while it is worked on (fp32 before and after, blocks read ahead, blocks waiting to
# be written), and stays in the processor's cache for most of that. Larger blocks were no faster.
BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was done; `merge_report.json` in the output holds the same.

    Attributes:
        changed: tensor name -> kind ("lora", "dora", "saved", "rows"), and the Frobenius norms of the base's tensor and
            of its change, both of the values as stored.
        untouched: number of tensors whose bytes are the base's.
        converted: number of tensors that only changed their dtype.
        edits: small file -> what was changed in it.
        inputs, outputs: file name -> bytes and sha256, of weights as they passed by.
        verification: None when it was not asked for.
    """

    base: str
    adapter: str | None
    output: str
    dtype: str
    changed: dict[str, dict[str, Any]]
    untouched: int
    converted: int
    edits: dict[str, str]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    seconds: float
    verification: Verification | None = None

    @property
    def rejected(self) -> bool:
        return self.verification is not None and self.verification.status == "failed"

    @property
    def folder(self) -> Path:
        """Where the merged model lies."""
        return _rejected(Path(self.output)) if self.rejected else Path(self.output)

    def in_words(self) -> list[str]:
        """A few lines for the screen."""
        size = sum(facts["bytes"] for facts in self.outputs.values())
        lines = [
            f"{self.folder}: {size / 1e9:.2f} GB in {self.seconds:.1f} s; {len(self.changed)} tensors changed,"
            f" {self.converted} converted, {self.untouched} untouched"
        ]
        lines += [f"  {name}: {what}" for name, what in self.edits.items()]
        proof = self.verification
        if proof is None:
            return [*lines, "  not verified"]
        lines.append(f"  proof {proof.status}: {proof.reason}")
        if proof.status != "skipped":
            lines.append(
                f"  the same most probable token at {proof.top1_agreement:.1%} of {proof.positions} positions;"
                f" the adapter itself moves logits by up to {proof.adapter_effect:.3g}"
            )
        return lines


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is decided before the first byte is written."""

    base: Checkpoint
    adapter: Adapter | None
    changed: frozenset[str]
    target: dict[str, TensorSpec]  # of every output tensor, by name

    def is_rounded(self, spec: TensorSpec) -> bool:
        """Whether the tensor's values pass through a rounding: summed, or brought to a narrower dtype."""
        to = self.target[spec.name].dtype
        return spec.name in self.changed or (to != spec.dtype and to != "F32")


def merge(
    base: Path,
    adapter: Path | None,
    output: Path,
    *,
    dtype: MergeDtype = "keep",
    verify: bool = True,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write base + adapter to the folder `output`.

    Args:
        base: a checkpoint folder in safetensors.
        adapter: a PEFT folder; None only brings the base to another dtype.
        dtype: of all tensors in the output; "keep" leaves each as it is in the base.
        verify: compare the output's logits with base + adapter, where both fit in memory (see `verify_merge`).
        progress: called with (bytes read, bytes in all) after each block.

    Returns:
        The report. If it is `rejected`, the output is under the name `<output>.rejected` instead.

    Raises:
        UserError: an adapter that does not fit, a broken base, an output that exists or cannot be written.
    """
    plan = _plan(base, adapter, dtype)
    partial = _prepare_output(plan, output)
    try:
        write_json(partial / REPORT_NAME, {"output": str(output), "status": "unfinished"})
        report = _build(plan, output, partial, dtype, verify, block_bytes, progress)
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
    plan: _Plan,
    output: Path,
    partial: Path,
    dtype: MergeDtype,
    verify: bool,
    block_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> MergeReport:
    """Fill the folder `partial` and prove it."""
    started = time.monotonic()
    base = plan.base.folder
    changed: dict[str, dict[str, Any]] = {}
    inputs: dict[str, dict[str, Any]] = {}
    outputs: dict[str, dict[str, Any]] = {}
    total = sum(spec.num_bytes for spec in plan.base.tensors.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    for shard in plan.base.shards:
        name = shard.path.name
        inputs[name], outputs[name] = _stream_shard(plan, shard, partial / name, block_bytes, changed, advance)
    check_files(partial, {s.path.name: [plan.target[spec.name] for spec in s.tensors] for s in plan.base.shards})
    if plan.base.index_metadata is not None:
        folders.write_index(plan.base, plan.target, partial)
    edits = folders.carry_files(base, partial, None if dtype == "keep" else dtype)
    _add_small_files(plan, partial, inputs, outputs)

    converted = sum(
        plan.target[name].dtype != spec.dtype and name not in changed for name, spec in plan.base.tensors.items()
    )
    report = MergeReport(
        base=str(base),
        adapter=None if plan.adapter is None else str(plan.adapter.folder),
        output=str(output),
        dtype=dtype,
        changed=changed,
        untouched=len(plan.base.tensors) - len(changed) - converted,
        converted=converted,
        edits=edits,
        inputs=inputs,
        outputs=outputs,
        seconds=round(time.monotonic() - started, 3),
    )
    if verify:
        tensors = plan.base.tensors.values()
        rounded = {spec.name: plan.target[spec.name].dtype for spec in tensors if plan.is_rounded(spec)}
        report = replace(report, verification=verify_merge(base, plan.adapter, partial, plan.target, rounded))
    return report


def _plan(base: Path, adapter: Path | None, dtype: MergeDtype) -> _Plan:
    checkpoint = folders.open_checkpoint(base)
    opened = None
    if adapter is not None:
        opened = read_adapter(adapter)
        check_adapter_fits(opened, checkpoint.shapes)
    elif dtype == "keep":
        raise UserError("neither an adapter nor a dtype was given; expected --adapter, or --dtype to convert the base")
    changed = frozenset(opened.changed_tensors()) if opened is not None else frozenset()
    target: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        if spec.dtype not in FLOAT_DTYPES and (name in changed or dtype != "keep"):
            raise UserError(f"{base}: {name} is stored as {spec.dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
        target[name] = spec if dtype == "keep" else replace(spec, dtype=_FILE_DTYPES[dtype])
    return _Plan(checkpoint, opened, changed, target)


def _rejected(output: Path) -> Path:
    return output.with_name(output.name + ".rejected")


def _prepare_output(plan: _Plan, output: Path) -> Path:
    """Check the place for the output and make the folder that it is built in."""
    require_folder(output.parent, make=True)
    if output.resolve() == plan.base.folder.resolve():
        raise UserError(f"{output}: is the base itself; expected another folder for the output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; expected a new folder for the output")
    partial = output.with_name(output.name + ".partial")
    for old in (partial, _rejected(output)):
        # Left by an earlier merge to this name. Anything else under that name is not ours to delete.
        if old.exists():
            if not (old / REPORT_NAME).is_file():
                raise UserError(f"{old}: in the way and not an earlier merge's; expected to build the output there")
            shutil.rmtree(old)
    needed = 1.01 * sum(spec.num_bytes for spec in plan.target.values())  # headers and small files
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(f"{output.parent}: {free / 1e9:.1f} GB free; expected {needed / 1e9:.1f} GB for the output")
    require_folder(partial, make=True)
    return partial


def _stream_shard(
    plan: _Plan,
    shard: Header,
    target: Path,
    block_bytes: int,
    changed: dict[str, dict[str, Any]],
    advance: Callable[[int], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one shard; returns size and sha256 of the base's and of the new one. Adds to `changed`."""
    reader = BlockReader(shard)

    def ranges() -> Iterator[RowRange]:
        for spec in shard.tensors:
            yield from row_ranges(spec, block_bytes)

    specs = [plan.target[spec.name] for spec in shard.tensors]
    with ExitStack() as stack:
        writer = stack.enter_context(BlockWriter(target, specs, shard.metadata))
        change: Change | None = None
        for rows, block in reader.blocks(ranges()):
            name = rows.spec.name
            if rows.first == 0:
                change = load_change(plan.adapter, name) if plan.adapter and name in plan.changed else None
                if change is not None:
                    changed[name] = {"kind": change.kind, "norm": 0.0, "norm_of_change": 0.0}
            if change is None and plan.target[name].dtype == rows.spec.dtype:
                writer.write(memoryview(block))
            else:
                stored, norms = _changed_block(rows, block, change, plan.target[name].dtype)
                if change is not None:
                    changed[name]["norm"] = math.hypot(changed[name]["norm"], norms[0])
                    changed[name]["norm_of_change"] = math.hypot(changed[name]["norm_of_change"], norms[1])
                writer.write(stored.view(torch.uint8).reshape(-1).numpy().data)
            advance(rows.num_bytes)
    facts = {"bytes": shard.path.stat().st_size, "sha256": reader.sha256()}
    return facts, {"bytes": target.stat().st_size, "sha256": writer.sha256()}


def _changed_block(
    rows: RowRange, block: bytearray, change: Change | None, dtype: str
) -> tuple[Tensor, tuple[float, float]]:
    """The rows as they are to be stored; and the norms of the base's rows and of what is different afterwards."""
    raw = torch.frombuffer(block, dtype=FLOAT_DTYPES[rows.spec.dtype])
    shape = (rows.last - rows.first, *rows.spec.shape[1:]) if rows.spec.shape else ()
    base = raw.reshape(shape).float()
    # In memory of its own: a change may overwrite its input, and the difference below overwrites `base`.
    after = base.clone() if change is None else change.apply(base.clone(), rows.first)
    stored = after.to(FLOAT_DTYPES[dtype])
    norms = float(torch.linalg.vector_norm(base)), float(torch.linalg.vector_norm(base.sub_(stored)))
    if not math.isfinite(norms[1]):
        raise UserError(
            f"{rows.spec.name}: rows {rows.first} to {rows.last} hold NaN or infinity after the merge as {dtype};"
            " expected a trained adapter and a dtype that holds its values"
        )
    return stored, norms


def _add_small_files(
    plan: _Plan, output: Path, inputs: dict[str, dict[str, Any]], outputs: dict[str, dict[str, Any]]
) -> None:
    """Size and sha256 of the files beside the weights, on both sides, and of the adapter's."""
    for path in sorted(output.iterdir()):
        if path.name not in outputs and path.name != REPORT_NAME:
            outputs[path.name] = folders.file_facts(path)
            source = plan.base.folder / path.name
            if source.is_file():
                inputs[path.name] = folders.file_facts(source)
    if plan.adapter is not None:
        for path in sorted(plan.adapter.folder.glob("adapter_*")):
            if path.is_file():
                inputs[f"adapter/{path.name}"] = folders.file_facts(path)
