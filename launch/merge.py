"""Fold an adapter into its base model, and prove that the merged model and base + adapter are the same.

    python launch/merge.py --base DIR_OR_HUB_ID --adapter runs/NAME/adapter --output DIR

The base is streamed: a model of any size merges in a few hundred MB of memory. The output has the base's files and
names; `merge_report.json` in it says what was changed, with checksums and the figures of the proof.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def main() -> int:
    from qwen_ds import dist
    from qwen_ds.config import Parser
    from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE

    parser = Parser(description="Fold an adapter into its base model, a block of rows at a time, with proof.")
    parser.add_argument("--base", type=str, required=True, help="folder or hub id of the base model, in safetensors")
    parser.add_argument("--adapter", type=str, help="PEFT adapter folder; without it --dtype converts the base")
    parser.add_argument(
        "--format",
        default="qwen",
        choices=["qwen", "qwen2"],
        help="of the output; qwen2: the same function up to seq_length, for engines without the original Qwen",
    )
    parser.add_argument(
        "--from", default="qwen", choices=["qwen", "qwen2"], help="format of the base; qwen2: back to the qwen format"
    )
    parser.add_argument(
        "--check_texts",
        type=list[str],
        default=[],
        help="data files whose texts must get the same ids from the converted tokenizer",
    )
    parser.add_argument(
        "--adapter_only", type=bool, default=False, help="with --format qwen2: convert the adapter and merge nothing"
    )
    parser.add_argument("--output", type=str, required=True, help="new folder for the merged model")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=["keep", "bfloat16", "float16", "float32"],
        help="dtype of all weights in the output; keep: each as in the base",
    )
    parser.add_argument("--verify", type=bool, default=True, help="compare logits with base + adapter if memory allows")
    options = parser.parse()
    if dist.rank() != 0:
        return EXIT_DONE  # a launcher started many ranks: one of them merges

    # Only now: --help and a misspelt option should not wait for torch.
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from qwen_ds.export.formats import find_format
    from qwen_ds.export.merge import merge
    from qwen_ds.export.report import REPORT_NAME
    from qwen_ds.model.folder import find_model

    # The proof loads models through transformers and peft; the bar is the merge's, and their notices to each other are
    # nothing that a user of this command could act on.
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    source = options["from"]
    to = find_format(source, options.format, merges_adapter=options.adapter is not None)
    if options.adapter_only:
        return convert_adapter_only(options.base, options.adapter, Path(options.output), options.format)
    base = find_model(options.base, model_type=source)
    with tqdm(unit="B", unit_scale=True, desc="merge", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = merge(
            base,
            [] if options.adapter is None else [Path(options.adapter)],
            Path(options.output),
            dtype=options.dtype,
            to=to,
            check_texts=options.check_texts,
            verify=options.verify,
            progress=show,
        )
    print("\n".join(report.in_words()))
    if report.rejected:
        print(f"the proof failed: the output is left as {report.folder}; see {REPORT_NAME} in it", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_DONE


def convert_adapter_only(base: str, adapter: str | None, output: Path, target: str) -> int:
    """Write the adapter for the base's Qwen2; the base's weights are not read."""
    from qwen_ds.errors import EXIT_DONE, UserError
    from qwen_ds.export.adapter_qwen2 import convert_adapter
    from qwen_ds.model.folder import find_model

    if adapter is None or target != "qwen2":
        raise UserError("adapter_only converts an adapter to Qwen2; expected --adapter and --format qwen2 beside it")
    num_modules = convert_adapter(find_model(base, weights=False), Path(adapter), output)
    print(f"{output}: an adapter of {num_modules} modules, for the base in the qwen2 format")
    return EXIT_DONE


if __name__ == "__main__":
    from qwen_ds.errors import run_command

    run_command(main)
