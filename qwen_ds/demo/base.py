"""The demo's base model: a tiny Qwen in the official layout, with all 151,936 official token rows.

It was pre-trained from scratch by this project (pretrain.py), and the package stores it packed. In
the embedding only the rows of tokens that the corpus uses were trained, the others are unchanged.
The head's other rows moved together, away from all hidden states. So base.safetensors holds the
blocks, the used rows and that common movement, and `unpack_base` makes the rest from a seed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.demo import corpus
from qwen_ds.disk.weights import read_header, save_tensors
from qwen_ds.disk.write import replacing, write_json
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.family import QWEN
from qwen_ds.model.tokenizer import VOCABULARY_FILE, Encoding, load_encoding

PACKED_FILE = Path(__file__).with_name("base.safetensors")
WTE, HEAD = f"{QWEN.embedding}.weight", f"{QWEN.head}.weight"
USED_IDS, UNUSED_HEAD = "used_ids", "unused." + HEAD
ROW_SEEDS = {WTE: 1, HEAD: 2}
ROW_STD = 0.02

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
    "vocab_size": 151936, "hidden_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "kv_channels": 32, "intermediate_size": 512,
    "layer_norm_epsilon": 1e-6, "initializer_range": ROW_STD,
    "seq_length": 2048, "max_position_embeddings": 8192,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True,
    "no_bias": True, "scale_attn_weights": True, "tie_word_embeddings": False,
    "emb_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "use_cache": True,
    "bf16": True, "fp16": False, "fp32": False,
    "tokenizer_class": "QWenTokenizer",
}  # fmt: skip
GENERATION_CONFIG: dict[str, Any] = {
    "chat_format": "chatml", "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "max_window_size": 1024, "max_new_tokens": 128,
    "do_sample": True, "top_k": 50, "top_p": 0.8, "temperature": 0.8,
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {"model_max_length": 2048, "tokenizer_class": "QWenTokenizer"}


def official_vocabulary() -> Path:
    """Path of the official qwen.tiktoken in the dashscope package, found without importing that.

    Raises UserError if the package is not installed, or came without the file.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("dashscope") or []:
            if file.name == VOCABULARY_FILE and (path := Path(str(file.locate()))).is_file():
                return path
    raise UserError(
        f"the demo takes {VOCABULARY_FILE} from the package dashscope, which is missing here; "
        "expected: pip install 'qwen-ds[demo]'"
    )


def used_ids(encoding: Encoding, rows: Iterable[corpus.Row]) -> list[int]:
    """The token ids of the rows as training encodes them, sorted, each once."""
    used: set[int] = set()
    for row in rows:
        turns = (Turn("user", row["content"]), Turn("assistant", row["summary"]))
        used.update(encode_row(encoding, Conversation(None, turns), EncodeOptions()).ids)
    return sorted(used)


def corpus_ids(encoding: Encoding) -> list[int]:
    """The token ids of the whole corpus: pre-training, fine-tuning, held out."""
    return used_ids(encoding, corpus.pretraining_rows() + corpus.train_rows() + corpus.eval_rows())


def seeded_rows(name: str) -> Tensor:
    """Initial WTE or HEAD, bf16 [vocab_size, hidden_size], of mean 0 and deviation ROW_STD.

    They are bytes from PCG64, since normal numbers differ in the last bit between processors.
    """
    bits, shape = np.random.PCG64(ROW_SEEDS[name]), (CONFIG["vocab_size"], CONFIG["hidden_size"])
    steps = np.random.Generator(bits).integers(0, 256, size=shape, dtype=np.uint8)
    step = ROW_STD / ((256**2 - 1) / 12) ** 0.5  # 0..255 has the deviation sqrt((256^2 - 1) / 12)
    return torch.from_numpy(steps).float().sub_(127.5).mul_(step).to(torch.bfloat16)


def write_folder(target: Path, tensors: dict[str, Tensor], vocabulary: bytes) -> None:
    """Write a checkpoint folder in the official layout; the tensors give its vocab_size."""
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", CONFIG | {"vocab_size": len(tensors[WTE])})
    write_json(target / "generation_config.json", GENERATION_CONFIG)
    write_json(target / "tokenizer_config.json", TOKENIZER_CONFIG)
    with replacing(target / VOCABULARY_FILE) as unfinished:
        unfinished.write_bytes(vocabulary)
    save_tensors(target / "model.safetensors", tensors)


def unpack_base(target: Path, packed: Path = PACKED_FILE) -> None:
    """Write the base as a checkpoint folder (bf16, 80 MB), the same bytes every time.

    Raises UserError without the vocabulary that the base was trained with.
    """
    vocabulary, tensors = official_vocabulary(), load_file(packed)
    found = load_encoding(vocabulary).sha256
    expected = read_header(packed).metadata["vocabulary_sha256"]
    if found != expected:
        raise UserError(
            f"{vocabulary} has sha256 {found[:8]}..; expected the official vocabulary, "
            f"{expected[:8]}.."
        )
    ids = tensors.pop(USED_IDS).long()
    wte = seeded_rows(WTE).index_copy_(0, ids, tensors[WTE])
    head = seeded_rows(HEAD).add_(tensors.pop(UNUSED_HEAD)).index_copy_(0, ids, tensors[HEAD])
    write_folder(target, {**tensors, WTE: wte, HEAD: head}, vocabulary.read_bytes())
