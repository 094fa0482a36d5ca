"""Fold an adapter into its base model, and prove that the output equals base + adapter.

    python launch/merge.py --base DIR_OR_HUB_ID --adapter runs/NAME/adapter --output DIR
    # the second adapter onto the result of the first
    python launch/merge.py ... --adapter FIRST SECOND
    # a weighted sum of what both change
    python launch/merge.py ... --adapter ONE OTHER --weights 0.7 0.3
    # for engines without the original Qwen, and back
    python launch/merge.py ... --format qwen2
    python launch/merge.py --base QWEN2_DIR --from qwen2 --output DIR
    # the adapter alone, for the base's Qwen2
    python launch/merge.py ... --format qwen2 --adapter_only true

Without an adapter, --dtype, --format or --from converts the base.

The base is streamed: a model of any size merges in a few hundred MB of memory. The output has the
base's files and names (in another format, that format's); `merge_report.json` in it says what was
changed, with checksums and the figures of the proof. The output is complete or absent: after a kill
the same command starts anew.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from qwen_ds import dist
from qwen_ds.disk.adapter_folder import tell_adapter
from qwen_ds.disk.digest import REPORT_NAME
from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE, UserError
from qwen_ds.export.choices import FormatName, MergeDtype, Proof
from qwen_ds.model.family import QWEN
from qwen_ds.model.folder import find_model, find_qwen2
from qwen_ds.recipe.parser import Parser
from qwen_ds.recipe.ranges import FiniteFloat, PathText
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show

OPTIONS = {
    "from": (FormatName, "qwen", "format of the base; qwen2: back to the qwen format"),
    "adapter": (
        list[PathText],
        [],
        "PEFT folders, or runs and checkpoints that hold one in adapter/; each is folded onto the"
        " result of the one before; without any, the base is converted as --dtype, --format or"
        " --from say",
    ),
    "weights": (
        list[FiniteFloat] | None,
        None,
        "one for each adapter: instead, the weighted sum of what each does to the bare base",
    ),
    "format": (
        FormatName,
        "qwen",
        "of the output; qwen2: the same function up to seq_length, for engines without the"
        " original Qwen",
    ),
    "adapter_only": (
        bool,
        False,
        "with --format qwen2: convert the adapter and merge nothing; takes --allow_pickle and no"
        " other option",
    ),
    "check_texts": (
        list[PathText],
        [],
        "data files: every text in them must get the same ids from a converted tokenizer",
    ),
    "dtype": (MergeDtype, "keep", "dtype of all weights in the output; keep: each as in the base"),
    "verify": (
        Proof,
        "auto",
        "compare logits with base + adapters: of whole models, or layer by layer in the memory of"
        " one layer on shorter texts; auto: full if the model fits in memory",
    ),
    "prompts": (PathText | None, None, "text file, a prompt a line, instead of the built-in ones"),
    "allow_pickle": (
        bool,
        False,
        "also read pytorch_model.bin and adapter_model.bin, and of them nothing but tensors",
    ),
}  # name -> type, default, help


def command_line() -> Parser:
    parser = Parser(
        description="Fold an adapter into its base model, a block of rows at a time, with proof."
    )
    parser.add_argument(
        "--base",
        type=PathText,
        required=True,
        help="folder or hub id of the base model, in safetensors",
    )
    parser.add_argument(
        "--output", type=PathText, required=True, help="new folder for the merged model"
    )
    for name, (kind, default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def main() -> int:
    options = command_line().parse()
    if dist.rank() != 0:
        return EXIT_DONE  # a launcher started many ranks: one of them merges
    # The proof loads models through transformers and peft. The only bar is the merge's, and a user
    # of this command can do nothing about the warnings of those libraries.
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", RuntimeWarning)
    return convert_adapter_only(options) if options.adapter_only else merge_whole(options)


def merge_whole(options: Namespace) -> int:
    """Merge or convert a whole model, with a progress bar; say what the proof found."""
    # Not above: --help and a misspelt option should not wait for peft and datasets.
    from qwen_ds.export.formats import find_format
    from qwen_ds.export.merge import MergeOptions, merge
    from qwen_ds.export.proof.verify import read_prompts

    chosen = MergeOptions(
        weights=options.weights,
        dtype=options.dtype,
        to=find_format(options["from"], options.format, merges_adapter=bool(options.adapter)),
        proof=options.verify,
        prompts=None if options.prompts is None else read_prompts(Path(options.prompts)),
        allow_pickle=options.allow_pickle,
        check_texts=options.check_texts,
    )
    is_native = options["from"] == QWEN.model_type
    find = find_model if is_native else find_qwen2
    base = find(options.base, allow_pickle=options.allow_pickle).stored
    adapters = [tell_adapter(adapter) for adapter in options.adapter]
    with tqdm(unit="B", unit_scale=True, desc="merge", disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total and options.verify != "off":
                bar.set_description("proof")

        report = merge(base, adapters, Path(options.output), chosen, advance)
    show("\n".join(report.in_words()))
    if not report.rejected:
        return EXIT_DONE
    show(
        f"the proof failed: the output is left as {report.folder}; see {REPORT_NAME} in it",
        err=True,
    )
    return EXIT_FAILURE


def convert_adapter_only(options: Namespace) -> int:
    """Write the adapter as one for the base's Qwen2, without the base's weights."""
    from qwen_ds.export.qwen2.adapter import convert_adapter

    if len(options.adapter) != 1 or options.format != "qwen2":
        raise UserError(
            "adapter_only converts one adapter to Qwen2; expected one --adapter, and --format qwen2"
        )
    for name in ("weights", "from", "check_texts", "dtype", "verify", "prompts"):
        if options[name] != OPTIONS[name][1]:
            raise UserError(
                f"{name} was given with adapter_only, which converts an adapter as it is; expected"
                " neither"
            )
    output, base = Path(options.output), find_model(options.base, weights="if there").path
    num_modules = convert_adapter(
        base, tell_adapter(options.adapter[0]), output, allow_pickle=options.allow_pickle
    )
    show(f"{output}: an adapter of {num_modules} modules, for the base in the qwen2 format")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
