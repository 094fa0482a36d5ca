"""Fold adapters into their base, a block of rows at a time, and prove the result.

A tensor that no adapter touches keeps its very bytes; a touched one is summed in fp32 and rounded
once. The output is built in `<output>.partial`, brought to the disk and renamed, so `<output>` is
complete or absent. One that fails its proof stays as `<output>.rejected`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_ds.disk.write import publish
from qwen_ds.errors import UserError
from qwen_ds.export import output_place
from qwen_ds.export.base_check import check_copies
from qwen_ds.export.build import ShowProgress, build_files
from qwen_ds.export.choices import MergeDtype, Proof
from qwen_ds.export.formats import QWEN_FORMAT, Format
from qwen_ds.export.merge_plan import GivenBase, make_plan
from qwen_ds.export.merge_report import MergeReport
from qwen_ds.export.proof.verify import choose_proof, verify_merge
from qwen_ds.export.qwen2.tokenizer_check import check_tokenizer, texts_of
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.export.stream.shard import BLOCK_BYTES
from qwen_ds.export.stream.source import Source
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.tokenizer import load_encoding


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Everything that may be chosen about a merge, but for its inputs and its output."""

    weights: Sequence[float] | None = None
    """One for each adapter: the output is the weighted sum of what each does to the bare base,
    instead of one adapter folded onto the result of the one before."""
    dtype: MergeDtype = "keep"
    """Of all tensors in the output; "keep" leaves each as it is in the base."""
    to: Format = QWEN_FORMAT
    proof: Proof = "auto"
    """How the output's logits are compared with those of base + adapters (see `verify_merge`)."""
    prompts: Sequence[str] | None = None
    """The texts that logits are computed on; None: the built-in ones."""
    allow_pickle: bool = False
    """Also read pytorch_model.bin and adapter_model.bin, with `weights_only`."""
    check_texts: Sequence[str] = ()
    """Files with texts on which a converted tokenizer must agree with the base's."""
    block_bytes: int = BLOCK_BYTES  # of a block of rows that is read, changed and written at once


_DEFAULTS = MergeOptions()


def merge(
    base: GivenBase,
    adapters: Sequence[Path],
    output: Path,
    options: MergeOptions = _DEFAULTS,
    progress: ShowProgress | None = None,
) -> MergeReport:
    """Write base + adapters (PEFT folders) to the folder `output`; `<output>.rejected` if the
    report says `rejected`.

    Each adapter is folded onto the result of the one before, and the sum of all is rounded once.
    Without any the base is only brought to another dtype or format. UserError if an adapter does
    not fit, the base is broken, or the output exists or cannot be written.

    Args:
        progress: called with (bytes read, bytes in all) after each block.
    """
    _check_options(len(adapters), options)
    output = Path(os.path.abspath(output))
    folder_of_base = base if isinstance(base, Path) else base.folder
    output_place.check_inputs_elsewhere(output, (folder_of_base, *adapters))
    members = tuple(read_adapter(path, allow_pickle=options.allow_pickle) for path in adapters)
    changes = Adapters(members, options.weights)
    plan = make_plan(base, changes, options.to, options.dtype, options.allow_pickle)
    kind = choose_proof(plan, options.proof)
    with (
        output_place.telling_errors(output, "files that can be read and a disk"),
        Source(plan.base) as source,
        output_place.building(output) as folder,
    ):
        output_place.check_names_free(output)
        check_copies(plan, source, options.block_bytes)
        output_place.make_room(output, plan.num_bytes)
        report = build_files(plan, source, folder, output, options.block_bytes, progress)
        if options.to.converts_tokenizer:
            sides = (plan.base.folder, folder)
            native, other = sides if options.to.from_qwen else sides[::-1]
            check = check_tokenizer(load_encoding(native), other, options.check_texts)
            report = replace(report, tokenizer=check)
        if kind is not None:
            proven = verify_merge(plan, folder, kind, options.prompts)
            report = replace(report, verification=proven)
        report.write(folder)
        publish(folder, report.folder)
    return report


def _check_options(num_adapters: int, options: MergeOptions) -> None:
    if not num_adapters and options.dtype == "keep" and options.to is QWEN_FORMAT:
        raise UserError(
            "neither an adapter nor a dtype nor a format was given; expected --adapter, or --dtype"
            " or --format to convert the base"
        )
    if options.weights is not None and len(options.weights) != num_adapters:
        raise UserError(
            f"{len(options.weights)} weights and {num_adapters} adapters were given; expected one"
            " for each"
        )
    if options.check_texts and not options.to.converts_tokenizer:
        raise UserError(
            "check_texts was given, but the tokenizer stays as it is; expected --format or --from"
            " qwen2"
        )
    for file in options.check_texts:
        for _ in texts_of(file):  # a bad row is found now, not when all is written
            pass
