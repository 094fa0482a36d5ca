"""Pre-training of the demo's base; nothing else needs this file.

    python -m qwen_ds.demo.pretrain --output runs/demo_base

It makes two runs of launch/train.py with `method: full`. In so small a model a softmax over 151,936
rows costs far more than all the rest, so the first and long run has a vocabulary of its own: the
tokens of the corpus and those that they are merged from, about a thousand, which cut every text of
the corpus as the official vocabulary does. Then the rows move to their official places, and a short
second run over all 151,936 teaches the head that the other tokens never occur.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ds.demo import base, corpus
from qwen_ds.demo.base import HEAD, UNUSED_HEAD, USED_IDS, WTE, seeded_rows
from qwen_ds.disk.weights import save_tensors
from qwen_ds.disk.write import replacing
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import Encoding, load_encoding
from qwen_ds.recipe.parser import parse_options
from qwen_ds.recipe.ranges import PositiveInt
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show

RECIPE = "launch/recipes/demo_base.yaml"
BLOCKS_SEED = 3
SECOND_RUN = "--optim.max_steps 60 --optim.lr 1e-3 --optim.warmup_steps 0 --seed 2".split()


def merged_from(token: bytes, ranks: dict[bytes, int]) -> set[bytes]:
    """The token, and all tokens that byte-pair encoding makes on the way from its bytes to it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    made = set(parts)
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[at : at + 2] = [pairs[at]]
        made.add(pairs[at])
    return made


def small_vocabulary(encoding: Encoding, ids: list[int]) -> tuple[bytes, list[int]]:
    """A vocabulary file for texts made of `ids`, and the official id of each of its ids.

    It cuts those texts as the official one does: byte-pair encoding merges the pair of the lowest
    rank first, so with the same order, less the pairs that these texts never merge, it takes the
    same steps.
    """
    tokens = {bytes([byte]) for byte in range(256)}
    for index in ids:
        if isinstance(token := encoding.token(index), bytes):
            tokens |= merged_from(token, encoding.ranks)
    official = sorted(encoding.ranks[token] for token in tokens)
    spelled = {rank: token for token, rank in encoding.ranks.items()}
    lines = [b"%s %d\n" % (base64.b64encode(spelled[o]), i) for i, o in enumerate(official)]
    return b"".join(lines), official + sorted(encoding.special.values())


def fresh_tensors(official_ids: list[int]) -> dict[str, Tensor]:
    """Initial bf16 weights: seeded rows, and blocks as the model initialises them."""
    from qwen_ds import QWenConfig, QWenLMHeadModel

    torch.manual_seed(BLOCKS_SEED)
    model = QWenLMHeadModel(QWenConfig(**base.CONFIG | {"vocab_size": len(official_ids)}))
    state = model.state_dict()
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    return tensors | {name: seeded_rows(name)[official_ids] for name in (WTE, HEAD)}


def widened(
    tensors: dict[str, Tensor], official_ids: list[int], used: list[int]
) -> dict[str, Tensor]:
    """The small model's weights with the used rows in their official places and seeded others."""
    rows, ids = [official_ids.index(index) for index in used], torch.tensor(used)
    wte, head = (seeded_rows(n).index_copy_(0, ids, tensors[n][rows]) for n in (WTE, HEAD))
    return {**tensors, WTE: wte, HEAD: head}


def pack_base(trained: Path, packed: Path) -> None:
    """Pack the part of a trained base that `unpack_base` cannot make from a seed."""
    encoding = load_encoding(trained)
    ids = torch.tensor(base.corpus_ids(encoding))
    tensors = load_file(trained / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    wte, head = tensors.pop(WTE), tensors.pop(HEAD)
    unused = torch.ones(len(wte), dtype=torch.bool).index_fill_(0, ids, False)
    assert torch.equal(wte[unused], seeded_rows(WTE)[unused]), "an unused row has moved"
    movement = (head[unused].float() - seeded_rows(HEAD)[unused].float()).mean(dim=0)
    tensors |= {USED_IDS: ids.to(torch.int32), WTE: wte[ids], HEAD: head[ids]}
    tensors[UNUSED_HEAD] = movement.to(torch.bfloat16)
    about = {"vocabulary_sha256": encoding.sha256, "corpus_sha256": corpus.sha256()}
    with replacing(packed) as unfinished:
        save_tensors(unfinished, tensors, about)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Where the base model is made."""

    output: str
    """New folder for the vocabulary, the corpus and the runs."""
    num_gpus: PositiveInt = 2
    """Ranks: GPUs where there are any, else CPU processes."""
    packed: str = str(base.PACKED_FILE)
    """File to write."""


def main() -> None:
    about = "Pre-train the demo's base model from scratch and pack it into the package."
    options = parse_options(PretrainOptions, about)
    output, packed = Path(options.output), Path(options.packed)
    if output.exists():
        raise UserError(f"--output {output} exists; expected a new folder")
    vocabulary = base.official_vocabulary()
    encoding = load_encoding(vocabulary)
    used, rows = base.corpus_ids(encoding), output / "pretraining.jsonl"
    small, official_ids = small_vocabulary(encoding, used)
    base.write_folder(output / "small", fresh_tensors(official_ids), small)
    corpus.write_rows(corpus.pretraining_rows(), rows)

    def train(model: Path, run: Path, *changes: str) -> dict[str, Tensor]:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"]
        command += [str(options.num_gpus), "launch/train.py", "--config", RECIPE]
        command += ["--model.path", str(model), "--data.train", str(rows)]
        command += ["--output_dir", str(run), *changes]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
        return load_file(run / "model" / "model.safetensors")

    wide = widened(train(output / "small", output / "first_run"), official_ids, used)
    base.write_folder(output / "widened", wide, vocabulary.read_bytes())
    train(output / "widened", output / "second_run", *SECOND_RUN)
    pack_base(output / "second_run" / "model", packed)
    show(f"{packed}: {packed.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main)
