"""The demo's base model: a tiny Qwen in the official layout, with the official vocabulary of 151,936 rows.

It was pre-trained from scratch by this project's own engine:

    python -m qwen_ds.demo.base --output runs/demo_base

The package keeps it packed. Only the rows of tokens that the corpus uses were trained in the embedding and the head.
The embedding's other rows still are what they started from, and the head's moved together, away from every hidden state.
So base.safetensors holds the blocks, the used rows and the common movement, and `unpack_base` makes the rest from a
seed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_ds.data.encode import EncodeOptions, encode_row
from qwen_ds.demo import corpus
from qwen_ds.errors import UserError, run_command
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import VOCABULARY_FILE, Encoding, load_encoding

PACKED_FILE = Path(__file__).with_name("base.safetensors")
RECIPE = "launch/recipes/demo_base.yaml"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
USED_IDS, UNUSED_HEAD = "used_ids", "unused." + HEAD
WTE_SEED, HEAD_SEED, BLOCKS_SEED = 1, 2, 3
ROW_STD = 0.02

CONFIG: dict[str, object] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "intermediate_size": 512,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": ROW_STD,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "emb_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "use_cache": True,
    "bf16": True,
    "fp16": False,
    "fp32": False,
    "tokenizer_class": "QWenTokenizer",
}
GENERATION_CONFIG: dict[str, object] = {
    "chat_format": "chatml",
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "max_window_size": 1024,
    "max_new_tokens": 128,
    "do_sample": True,
    "top_k": 50,
    "top_p": 0.8,
    "temperature": 0.8,
}
TOKENIZER_CONFIG: dict[str, object] = {"model_max_length": 2048, "tokenizer_class": "QWenTokenizer"}


def official_vocabulary() -> Path:
    """The real qwen.tiktoken, which the dashscope wheel carries; found without importing that package.

    Raises:
        UserError: the package is not installed, or came without the file.
    """
    try:
        files = importlib.metadata.files("dashscope") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == VOCABULARY_FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(
        f"the demo takes {VOCABULARY_FILE} from the package dashscope, which is missing here; "
        "expected: pip install 'qwen-ds[demo]'"
    )


def used_ids(encoding: Encoding, rows: Iterable[corpus.Row]) -> list[int]:
    """Every token id of the rows as training encodes them, sorted."""
    used: set[int] = set()
    for row in rows:
        turns = (Turn("user", row["content"]), Turn("assistant", row["summary"]))
        used.update(encode_row(encoding, Conversation(None, turns), EncodeOptions()).ids)
    return sorted(used)


def corpus_ids(encoding: Encoding) -> list[int]:
    """The token ids of the whole corpus: pre-training, fine-tuning, held out."""
    return used_ids(encoding, corpus.pretraining_rows() + corpus.train_rows() + corpus.eval_rows())


def seeded_rows(seed: int) -> Tensor:
    """bf16 [vocab_size, hidden_size] of mean 0 and standard deviation ROW_STD, the same bits on every machine.

    Bytes from PCG64, not normal numbers: those differ in the last bit between processors.
    """
    shape = (int(str(CONFIG["vocab_size"])), int(str(CONFIG["hidden_size"])))
    steps = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, size=shape, dtype=np.uint8)
    step = ROW_STD / ((256**2 - 1) / 12) ** 0.5  # the standard deviation of 0..255 is sqrt((256^2 - 1) / 12)
    return torch.from_numpy(steps).float().sub_(127.5).mul_(step).to(torch.bfloat16)


def write_folder(target: Path, tensors: dict[str, Tensor], vocabulary: Path) -> None:
    """A checkpoint folder in the official layout."""
    target.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(vocabulary, target / VOCABULARY_FILE)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)


def pack_base(trained: Path, packed: Path) -> None:
    """Keep of a trained base what `unpack_base` cannot make from a seed; bf16 as trained."""
    encoding = load_encoding(trained)
    ids = torch.tensor(corpus_ids(encoding))
    with safe_open(trained / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    wte, head = tensors.pop(WTE), tensors.pop(HEAD)
    unused = torch.ones(len(wte), dtype=torch.bool).index_fill_(0, ids, False)
    assert torch.equal(wte[unused], seeded_rows(WTE_SEED)[unused]), "an embedding row outside the corpus has moved"
    movement = (head[unused].float() - seeded_rows(HEAD_SEED)[unused].float()).mean(dim=0)
    tensors |= {
        USED_IDS: ids.to(torch.int32),
        WTE: wte[ids],
        HEAD: head[ids],
        UNUSED_HEAD: movement.to(torch.bfloat16),
    }
    about = {"format": "pt", "vocabulary_sha256": encoding.sha256, "corpus_sha256": corpus.sha256()}
    save_file(tensors, packed, metadata=about)
    packed.chmod(0o644)


def unpack_base(target: Path, packed: Path = PACKED_FILE) -> None:
    """Write the base as a checkpoint folder in the official layout (bf16, 80 MB); the same bytes every time.

    Raises:
        UserError: the vocabulary is missing, or is not the one that the base was trained with.
    """
    vocabulary = official_vocabulary()
    with safe_open(packed, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = file.metadata()["vocabulary_sha256"]
    if (found := load_encoding(vocabulary).sha256) != expected:
        raise UserError(f"{vocabulary} has sha256 {found[:8]}..; expected the official vocabulary, {expected[:8]}..")
    ids = tensors.pop(USED_IDS).long()
    wte = seeded_rows(WTE_SEED).index_copy_(0, ids, tensors[WTE])
    head = seeded_rows(HEAD_SEED).add_(tensors.pop(UNUSED_HEAD)).index_copy_(0, ids, tensors[HEAD])
    write_folder(target, {**tensors, WTE: wte, HEAD: head}, vocabulary)


def write_fresh_base(target: Path) -> None:
    """The base before its first step: seeded embedding and head, blocks as the model class initialises them."""
    from qwen_ds import QWenConfig, QWenLMHeadModel

    torch.manual_seed(BLOCKS_SEED)
    state = QWenLMHeadModel(QWenConfig(**CONFIG)).state_dict()  # type: ignore[arg-type]
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    tensors |= {WTE: seeded_rows(WTE_SEED), HEAD: seeded_rows(HEAD_SEED)}
    write_folder(target, tensors, official_vocabulary())


def main() -> None:
    """Pre-train the base with the project's engine and pack the result into the package."""
    from qwen_ds.config import Parser

    parser = Parser(description="Pre-train the demo's base model from scratch and pack it into the package.")
    parser.add_argument("--output", type=str, required=True, help="new folder for the start, the corpus and the run")
    parser.add_argument("--num_ranks", type=int, default=2, help="CPU ranks that train")
    parser.add_argument("--packed", type=str, default=str(PACKED_FILE), help="file to write")
    options = parser.parse()
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output {output} exists; expected a new folder")
    fresh, rows, run = output / "fresh", output / "pretraining.jsonl", output / "run"
    write_fresh_base(fresh)
    corpus.write_rows(corpus.pretraining_rows(), rows)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", str(options.num_ranks), "launch/train.py"]
    command += ["--config", RECIPE, "--model.path", str(fresh), "--data.train", str(rows), "--output_dir", str(run)]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
    pack_base(run / "model", Path(options.packed))
    print(f"packed {run / 'model'} into {options.packed}: {Path(options.packed).stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main)
