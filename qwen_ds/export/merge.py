"""Fold adapters into their base, a block of rows at a time, and prove the result.

A tensor that no adapter touches keeps its very bytes, a touched one is summed in fp32 and rounded once. The output is
built in `<output>.partial`, brought to the disk and renamed, so `<output>` is complete or absent; one that fails its
proof stays as `<output>.rejected`. A merge that was killed is taken up by the next one of the same inputs and options.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_ds.disk.place import require_new_folder
from qwen_ds.disk.write import sync, write_json
from qwen_ds.errors import UserError
from qwen_ds.export.base_check import check_copies, doubts
from qwen_ds.export.card import CARD_NAME, Origin, write_card
from qwen_ds.export.checkpoint import INDEX_NAME, file_facts
from qwen_ds.export.layout import QWEN, Format
from qwen_ds.export.merge_plan import MergeDtype, Plan, make_plan, write_index
from qwen_ds.export.merge_report import REPORT_NAME, MergeReport, describe, rejected_name
from qwen_ds.export.merge_resume import Progress, recipe_of
from qwen_ds.export.proof.verify import Proof, check_files, choose_proof, verify_merge
from qwen_ds.export.qwen2.tokenizer_check import texts_of
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.export.stream.shard import BLOCK_BYTES, write_shard
from qwen_ds.export.stream.source import Source
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.folder import legal_texts

Facts = dict[str, dict[str, Any]]  # file name -> bytes and sha256
ShowProgress = Callable[[int, int], None]


def merge(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: MergeDtype = "keep",
    to: Format = QWEN,
    proof: Proof = "auto",
    prompts: Sequence[str] | None = None,
    allow_pickle: bool = False,
    check_texts: Sequence[str] = (),
    block_bytes: int = BLOCK_BYTES,
    progress: ShowProgress | None = None,
) -> MergeReport:
    """Write base + adapters to the folder `output`.

    Args:
        base: a checkpoint folder.
        adapters: PEFT folders; each is folded onto the result of the one before, and the sum of all is rounded once.
            Without any the base is only brought to another dtype or format.
        weights: one for each adapter: instead of the above, the weighted sum of what each does to the bare base.
        dtype: of all tensors in the output; "keep" leaves each as it is in the base.
        to: the output's format: its tensors' layout, and the files that are written beside the weights.
        proof: how the output's logits are compared with those of base + adapters (see `verify_merge`).
        prompts: what they are computed on; None: the built-in ones.
        allow_pickle: also read pytorch_model.bin and adapter_model.bin, with `weights_only`.
        check_texts: files with texts on which a converted tokenizer must agree with the base's.
        progress: called with (bytes read, bytes in all) after each block.

    Returns:
        The report. If it is `rejected`, the output is under the name `<output>.rejected` instead.

    Raises:
        UserError: an adapter that does not fit, a broken base, an output that exists or cannot be written.
    """
    if not adapters and dtype == "keep" and to is QWEN:
        raise UserError(
            "neither an adapter nor a dtype nor a format was given; expected --adapter, or --dtype or --format to"
            " convert the base"
        )
    if weights is not None and len(weights) != len(adapters):
        raise UserError(
            f"{len(weights)} weights and {len(adapters)} adapters were given; expected one for each"
        )
    output = Path(os.path.abspath(output))
    _check_name(output, (base, *adapters))
    _check_texts(check_texts, to)
    members = tuple(read_adapter(folder, allow_pickle=allow_pickle) for folder in adapters)
    plan = make_plan(
        base,
        Adapters(members, None if weights is None else tuple(weights)),
        to,
        dtype,
        allow_pickle,
    )
    kind = choose_proof(plan, proof)
    adapter_facts = _adapter_facts(plan.adapters)
    work = Progress(_partial_name(output), recipe_of(plan, adapter_facts, block_bytes))
    with Source(plan.base) as source, work:
        _check_output(output)
        check_copies(plan, source, block_bytes)
        work.take_up(source)
        _check_space(plan, work, output)
        try:
            _remove_rejected(output)
            work.start(source)
            started, taken_over = time.monotonic(), sorted(work.finished)
            _write_weights(plan, source, work, block_bytes, progress)
            edits = _write_small_files(plan, work)
            inputs, outputs = _facts(plan, source, work)
            seconds = round(time.monotonic() - started, 3)
            report = describe(
                plan,
                output,
                work.changed(),
                taken_over,
                edits,
                inputs | adapter_facts,
                outputs,
                seconds,
            )
            if to.check_tokenizer is not None:
                report = replace(
                    report, tokenizer=to.check_tokenizer(base, work.folder, check_texts)
                )
            if kind is not None:
                report = replace(
                    report, verification=verify_merge(plan, work.folder, kind, prompts)
                )
            write_json(work.folder / REPORT_NAME, report.as_json())
            work.finish(report.folder)
        except OSError as error:
            if error.errno is None:  # a library's, not the system's
                raise
            raise UserError(
                f"{error.filename or work.folder}: {error.strerror}; expected files that can be read and a disk that"
                f" takes the output; what is finished lies in {work.folder.parent}: the same command goes on from there"
            ) from error
    return report


def _check_texts(files: Sequence[str], to: Format) -> None:
    if files and to.check_tokenizer is None:
        raise UserError(
            "check_texts was given, but the tokenizer stays as it is; expected --format or --from qwen2"
        )
    for file in files:
        for _ in texts_of(file):  # a bad row is found now, not when all is written
            pass


def _check_name(output: Path, inputs: Sequence[Path]) -> None:
    """Nothing that is read lies where the output is built, gets its name, or replaces an earlier one."""
    if not output.name:
        raise UserError(f"{output}: is the root; expected a new folder for the output")
    for place in (output, rejected_name(output), _partial_name(output)):
        for given in inputs:
            if given.resolve().is_relative_to(place.resolve()):
                raise UserError(
                    f"{output}: {given} is an input, and a merge to this output writes to {place};"
                    f" expected another name for the output"
                )


def _partial_name(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _check_output(output: Path) -> None:
    """The name of the output is free, and that of a rejected one free or an earlier merge's."""
    require_new_folder(output)
    rejected = rejected_name(output)
    earlier = (rejected / REPORT_NAME).is_file() and not rejected.is_symlink()
    if (rejected.exists() or rejected.is_symlink()) and not earlier:
        raise UserError(
            f"{rejected}: in the way and not an earlier merge's; expected a free name for the output"
        )


def _remove_rejected(output: Path) -> None:
    """An earlier merge's output makes room, once all is checked."""
    if (rejected := rejected_name(output)).exists():
        shutil.rmtree(rejected)


def _check_space(plan: Plan, work: Progress, output: Path) -> None:
    written = sum(shard.num_bytes for shard in plan.shards if shard.name in work.finished)
    needed = int(1.01 * (plan.num_bytes - written))  # headers and small files
    replaced = sum(path.lstat().st_size for path in rejected_name(output).rglob("*"))
    free = shutil.disk_usage(output.parent).free + replaced
    if free < needed:
        raise UserError(
            f"{output.parent}: {free / 1e9:.3g} GB ({free} bytes) free on the disk; expected {needed / 1e9:.3g} GB"
            f" ({needed} bytes) for the output"
        )


def _write_weights(
    plan: Plan, source: Source, work: Progress, block_bytes: int, progress: ShowProgress | None
) -> None:
    total = sum(plan.bytes_read(shard) for shard in plan.shards)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    flushed = []
    with ThreadPoolExecutor(max_workers=1) as flushing:  # while the next file is made
        for shard in plan.shards:
            path = work.folder / shard.name
            if shard.name in work.finished:
                advance(plan.bytes_read(shard))
                continue
            try:
                written = write_shard(plan, shard, source, path, block_bytes, advance)
            except UserError:  # found only while the values went by: no part of them is of use
                work.discard()
                raise
            work.add(shard.name, written, source)
            flushed.append(flushing.submit(sync, path))
    for done_flushing in flushed:
        done_flushing.result()
    check_files(work.folder, plan.shards)


def _write_small_files(plan: Plan, work: Progress) -> dict[str, str]:
    """The index, what travels with the weights, and the card; returns what was changed, by file name."""
    write_index(plan, work.folder)
    dtype = None if plan.dtype == "keep" else plan.dtype
    edits = plan.format.write_files(
        plan.base.folder, work.folder, dtype, bool(plan.adapters.members)
    )
    adapters = tuple(adapter.folder for adapter in plan.adapters.members)
    notes = tuple(doubts(plan.base.folder, plan.adapters.members))
    write_card(
        work.folder,
        Origin(
            plan.base.folder, adapters, plan.format.name, plan.adapters.weights, plan.dtype, notes
        ),
    )
    return edits


def _facts(plan: Plan, source: Source, work: Progress) -> tuple[Facts, Facts]:
    """Size and sha256 of all files that were read of the base, and of the output's."""
    outputs = {name: written.facts for name, written in sorted(work.finished.items())}
    inputs = {shard.path.name: source.facts(shard.path.name) for shard in plan.base.shards}
    for path in sorted(work.folder.iterdir()):
        if path.name not in outputs:
            outputs[path.name] = file_facts(path)
    made = {INDEX_NAME, CARD_NAME}
    index = {plan.base.index_name} if plan.base.index_name is not None else set()
    carried = legal_texts(work.folder) if plan.format.reads else outputs.keys() - made
    for name in sorted({*carried, *plan.format.reads, *index} - inputs.keys()):
        if (plan.base.folder / name).is_file():
            inputs[name] = file_facts(plan.base.folder / name)
    return inputs, outputs


def _adapter_facts(adapters: Adapters) -> Facts:
    """Size and sha256 of the adapters' files."""
    facts: Facts = {}
    for number, adapter in enumerate(adapters.members, start=1):
        label = "adapter" if len(adapters.members) == 1 else f"adapter{number}"
        facts |= {f"{label}/{path.name}": file_facts(path) for path in adapter.files()}
    return facts
