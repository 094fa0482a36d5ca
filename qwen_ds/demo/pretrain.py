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
from torch import Tensor

from qwen_ds.demo import corpus
from qwen_ds.demo.base import (
    CONFIG,
    HEAD,
    HEAD_SEED,
    PACKED_FILE,
    UNUSED_HEAD,
    USED_IDS,
    WTE,
    WTE_SEED,
    corpus_ids,
    official_vocabulary,
    read_tensors,
    seeded_rows,
    write_folder,
)
from qwen_ds.disk.weights import save_tensors
from qwen_ds.disk.write import replacing
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import Encoding, load_encoding
from qwen_ds.recipe.parser import parse_options
from qwen_ds.recipe.ranges import PositiveInt
from qwen_ds.runlog import run_command

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
        token = encoding.token(index)
        if isinstance(token, bytes):
            tokens |= merged_from(token, encoding.ranks)
    official = sorted(encoding.ranks[token] for token in tokens)
    spelled = {rank: token for token, rank in encoding.ranks.items()}
    lines = [b"%s %d\n" % (base64.b64encode(spelled[o]), i) for i, o in enumerate(official)]
    return b"".join(lines), official + sorted(encoding.special.values())


def fresh_tensors(official_ids: list[int]) -> dict[str, Tensor]:
    """Initial bf16 weights: seeded rows, and blocks as the model initialises them."""
    from qwen_ds import QWenConfig, QWenLMHeadModel

    torch.manual_seed(BLOCKS_SEED)
    state = QWenLMHeadModel(QWenConfig(**CONFIG | {"vocab_size": len(official_ids)})).state_dict()  # type: ignore
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    return tensors | {
        WTE: seeded_rows(WTE_SEED)[official_ids],
        HEAD: seeded_rows(HEAD_SEED)[official_ids],
    }


def widened(
    tensors: dict[str, Tensor], official_ids: list[int], used: list[int]
) -> dict[str, Tensor]:
    """The small model's weights with the used rows in their official places and seeded others."""
    rows = [official_ids.index(index) for index in used]
    wte = seeded_rows(WTE_SEED).index_copy_(0, torch.tensor(used), tensors[WTE][rows])
    head = seeded_rows(HEAD_SEED).index_copy_(0, torch.tensor(used), tensors[HEAD][rows])
    return {**tensors, WTE: wte, HEAD: head}


def pack_base(trained: Path, packed: Path) -> None:
    """Pack the part of a trained base that `unpack_base` cannot make from a seed."""
    encoding = load_encoding(trained)
    ids = torch.tensor(corpus_ids(encoding))
    tensors, _ = read_tensors(trained / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    wte, head = tensors.pop(WTE), tensors.pop(HEAD)
    unused = torch.ones(len(wte), dtype=torch.bool).index_fill_(0, ids, False)
    assert torch.equal(wte[unused], seeded_rows(WTE_SEED)[unused]), "an unused row has moved"
    movement = (head[unused].float() - seeded_rows(HEAD_SEED)[unused].float()).mean(dim=0)
    tensors |= {
        USED_IDS: ids.to(torch.int32),
        WTE: wte[ids],
        HEAD: head[ids],
        UNUSED_HEAD: movement.to(torch.bfloat16),
    }
    about = {"vocabulary_sha256": encoding.sha256, "corpus_sha256": corpus.sha256()}
    with replacing(packed) as unfinished:
        save_tensors(unfinished, tensors, about)


def pretrain(output: Path, packed: Path, num_gpus: int) -> None:
    """Make both runs under `output`, then the packed file."""
    vocabulary = official_vocabulary()
    encoding = load_encoding(vocabulary)
    used = corpus_ids(encoding)
    small, official_ids = small_vocabulary(encoding, used)
    rows = output / "pretraining.jsonl"
    write_folder(output / "small", fresh_tensors(official_ids), small)
    corpus.write_rows(corpus.pretraining_rows(), rows)

    def train(model: Path, run: Path, *options: str) -> dict[str, Tensor]:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_gpus)]
        command += ["launch/train.py", "--config", RECIPE, "--model.path", str(model)]
        command += ["--data.train", str(rows), "--output_dir", str(run), *options]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
        return read_tensors(run / "model" / "model.safetensors")[0]

    trained = train(output / "small", output / "first_run")
    write_folder(output / "widened", widened(trained, official_ids, used), vocabulary.read_bytes())
    train(output / "widened", output / "second_run", *SECOND_RUN)
    pack_base(output / "second_run" / "model", packed)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Where the base model is made."""

    output: str
    """New folder for the vocabulary, the corpus and the runs."""
    num_gpus: PositiveInt = 2
    """Ranks: GPUs where there are any, else CPU processes."""
    packed: str = str(PACKED_FILE)
    """File to write."""


def main() -> None:
    about = "Pre-train the demo's base model from scratch and pack it into the package."
    options = parse_options(PretrainOptions, about)
    output, packed = Path(options.output), Path(options.packed)
    if output.exists():
        raise UserError(f"--output {output} exists; expected a new folder")
    pretrain(output, packed, options.num_gpus)
    print(f"{packed}: {packed.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main)
