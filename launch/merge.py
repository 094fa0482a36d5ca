"""Fold an adapter into its base model, and prove that the merged model and base + adapter are the same.

    python launch/merge.py --base DIR_OR_HUB_ID --adapter runs/NAME/adapter --output DIR
    python launch/merge.py ... --adapter FIRST SECOND                        # the second onto the result of the first
    python launch/merge.py ... --adapter ONE OTHER --weights 0.7 0.3         # a weighted sum of what both change
    python launch/merge.py ... --format qwen2                                # for engines without the original Qwen
    python launch/merge.py --base QWEN2_DIR --from qwen2 --output DIR        # and back
    python launch/merge.py ... --format qwen2 --adapter_only true            # the adapter alone, for the base's Qwen2

Without an adapter, --dtype, --format or --from converts the base.

The base is streamed: a model of any size merges in a few hundred MB of memory. The output has the base's files and
names (in another format, that format's); `merge_report.json` in it says what was changed, with checksums and the
figures of the proof. A merge that was killed goes on where it was when its command is given again.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from jsonargparse import Namespace

from qwen_ds.recipe.parser import Parser


def command_line() -> Parser:
    parser = Parser(
        description="Fold an adapter into its base model, a block of rows at a time, with proof."
    )
    parser.add_argument(
        "--base", type=str, required=True, help="folder or hub id of the base model, in safetensors"
    )
    parser.add_argument(
        "--adapter",
        type=list[str],
        default=[],
        help="PEFT folders, each folded onto the result of the one before; without any, the base is converted as"
        " --dtype, --format or --from say",
    )
    parser.add_argument(
        "--weights",
        type=list[float] | None,
        help="one for each adapter: instead, the weighted sum of what each does to the bare base",
    )
    parser.add_argument(
        "--format",
        default="qwen",
        choices=["qwen", "qwen2"],
        help="of the output; qwen2: the same function up to seq_length, for engines without the original Qwen",
    )
    parser.add_argument(
        "--from",
        default="qwen",
        choices=["qwen", "qwen2"],
        help="format of the base; qwen2: back to the qwen format",
    )
    parser.add_argument(
        "--adapter_only",
        type=bool,
        default=False,
        help="with --format qwen2: convert the adapter and merge nothing; takes --allow_pickle and no other option",
    )
    parser.add_argument(
        "--check_texts",
        type=list[str],
        default=[],
        help="data files: every text in them must get the same ids from a converted tokenizer",
    )
    parser.add_argument("--output", type=str, required=True, help="new folder for the merged model")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=["keep", "bfloat16", "float16", "float32"],
        help="dtype of all weights in the output; keep: each as in the base",
    )
    parser.add_argument(
        "--verify",
        default="auto",
        choices=["auto", "full", "sampled", "off"],
        help="compare logits with base + adapter: of whole models, or layer by layer in the memory of one layer on"
        " shorter texts; auto: full if the model fits in memory",
    )
    parser.add_argument(
        "--prompts", type=str, help="text file, a prompt a line, instead of the built-in ones"
    )
    parser.add_argument(
        "--allow_pickle",
        type=bool,
        default=False,
        help="also read pytorch_model.bin and adapter_model.bin, and of them nothing but tensors",
    )
    return parser


def main() -> int:
    from qwen_ds import dist
    from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE

    options = command_line().parse()
    if dist.rank() != 0:
        return EXIT_DONE  # a launcher started many ranks: one of them merges

    # Only now: --help and a misspelt option should not wait for torch.
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from qwen_ds.export.formats import find_format
    from qwen_ds.export.merge import merge
    from qwen_ds.export.merge_report import REPORT_NAME
    from qwen_ds.export.proof.verify import read_prompts
    from qwen_ds.model.folder import find_model

    # The proof loads models through transformers and peft; the bar is the merge's, and their notices to each other are
    # nothing that a user of this command could act on.
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", RuntimeWarning)
    to = find_format(options["from"], options.format, merges_adapter=bool(options.adapter))
    if options.adapter_only:
        return convert_adapter_only(options)
    base = find_model(options.base, model_type=options["from"])
    with tqdm(unit="B", unit_scale=True, desc="merge", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total and options.verify != "off":
                bar.set_description("proof")

        report = merge(
            base,
            [Path(folder) for folder in options.adapter],
            Path(options.output),
            weights=options.weights,
            dtype=options.dtype,
            to=to,
            check_texts=options.check_texts,
            proof=options.verify,
            prompts=None if options.prompts is None else read_prompts(Path(options.prompts)),
            allow_pickle=options.allow_pickle,
            progress=show,
        )
    print("\n".join(report.in_words()))
    if report.rejected:
        print(
            f"the proof failed: the output is left as {report.folder}; see {REPORT_NAME} in it",
            file=sys.stderr,
        )
        return EXIT_FAILURE
    return EXIT_DONE


def convert_adapter_only(options: Namespace) -> int:
    """Write the adapter as one for the base's Qwen2, without the base's weights."""
    from qwen_ds.errors import EXIT_DONE, UserError
    from qwen_ds.export.qwen2.adapter import convert_adapter
    from qwen_ds.model.folder import find_model

    if len(options.adapter) != 1 or options.format != "qwen2":
        raise UserError(
            "adapter_only converts one adapter to Qwen2; expected one --adapter, and --format qwen2"
        )
    parser = command_line()
    for name in ("weights", "from", "check_texts", "dtype", "verify", "prompts"):
        if options[name] != parser.get_default(name):
            raise UserError(
                f"{name} was given with adapter_only, which converts an adapter as it is; expected neither"
            )
    output, base = Path(options.output), find_model(options.base, weights=False)
    num_modules = convert_adapter(
        base, Path(options.adapter[0]), output, allow_pickle=options.allow_pickle
    )
    print(f"{output}: an adapter of {num_modules} modules, for the base in the qwen2 format")
    return EXIT_DONE


if __name__ == "__main__":
    from qwen_ds.runlog import run_command

    run_command(main)
