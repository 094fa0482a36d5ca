"""The packed base: small, complete, equal bytes every time, and it answers in catalogue style."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qwen_ds  # noqa: F401  registers the model class
from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.demo import base, corpus
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE, Conversation, Turn
from qwen_ds.model.folder import inspect_folder
from qwen_ds.model.tokenizer import load_encoding

# seeded_rows(WTE)[:64]: these bits must be the same on every machine, or a packed base unpacks into
# another model.
FIRST_ROWS_SHA256 = "c8eea6578399b24d1874127f3ebc7ef5a362b232d969aebc7f359e4d78d84e46"

_, _, HELD_OUT = corpus.splits()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    base.unpack_base(folder)
    return folder


def test_the_packed_base_is_smaller_than_2_mb_and_bf16() -> None:
    assert base.PACKED_FILE.stat().st_size < 2_000_000
    with safe_open(base.PACKED_FILE, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes.pop(base.USED_IDS) == torch.int32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_every_token_of_the_corpus_is_among_the_packed_rows(vocab_path: Path) -> None:
    with safe_open(base.PACKED_FILE, "pt") as file:
        ids = file.get_tensor(base.USED_IDS).tolist()
    assert ids == base.corpus_ids(load_encoding(vocab_path))


def test_unpacking_gives_a_complete_folder_and_the_same_bytes_again(
    unpacked: Path, tmp_path: Path
) -> None:
    inspect_folder(unpacked)
    base.unpack_base(tmp_path / "again")
    names = sorted(file.name for file in unpacked.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (unpacked / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_rows_from_the_seed_are_these_bits() -> None:
    rows = base.seeded_rows(base.WTE)
    assert rows.shape == (151936, 128) and rows.dtype == torch.bfloat16
    assert (
        hashlib.sha256(rows[:64].view(torch.int16).numpy().tobytes()).hexdigest()
        == FIRST_ROWS_SHA256
    )
    assert abs(rows.float().mean().item()) < 1e-5
    assert rows.float().std().item() == pytest.approx(base.ROW_STD, rel=1e-3)


def test_the_base_answers_in_the_catalogue_style_and_wastes_nothing_on_unused_rows(
    unpacked: Path,
) -> None:
    encoding = load_encoding(unpacked)
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    unused_V = torch.ones(151936, dtype=torch.bool)
    unused_V[base.corpus_ids(encoding)] = False
    for item in HELD_OUT[:4]:
        turns = (Turn("user", item.content), Turn("assistant", corpus.catalogue_text(item)))
        row = encode_row(encoding, Conversation(None, turns), EncodeOptions())
        ids_1T, labels_T = torch.tensor([row.ids]), torch.tensor(row.labels)
        with torch.no_grad():
            logits_TV = model(ids_1T, use_cache=False).logits[0]
        learnt_T = labels_T[1:] != IGNORE
        assert torch.equal(logits_TV[:-1].argmax(-1)[learnt_T], labels_T[1:][learnt_T]), (
            item.content
        )
        assert logits_TV[:-1].softmax(-1)[learnt_T][:, unused_V].sum(-1).max().item() < 1e-2


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with safe_open(base.PACKED_FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(
        tensors,
        tmp_path / "other.safetensors",
        metadata={"format": "pt", "vocabulary_sha256": "0" * 64},
    )
    with pytest.raises(
        UserError, match=r"sha256 b2b1b8df\.\.; expected the official vocabulary, 00000000\.\."
    ):
        base.unpack_base(tmp_path / "base", tmp_path / "other.safetensors")
    assert not (tmp_path / "base").exists()


def test_a_missing_dashscope_is_one_line_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(
        UserError, match=r"dashscope, which is missing.*pip install 'qwen-ds\[demo\]'"
    ):
        base.official_vocabulary()
