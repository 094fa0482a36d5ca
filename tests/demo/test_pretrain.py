"""Pre-training: the small vocabulary, the places of its rows, and packing undone by unpacking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qwen_ds  # noqa: F401  registers the model class
from qwen_ds.demo import base, corpus, pretrain
from qwen_ds.model.tokenizer import load_encoding


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    base.unpack_base(folder)
    return folder


def test_pretraining_uses_every_token_of_the_corpus(vocab_path: Path) -> None:
    encoding = load_encoding(vocab_path)
    assert base.used_ids(encoding, corpus.pretraining_rows()) == base.corpus_ids(encoding)


def test_unpacking_undoes_packing_but_for_unused_rows_of_the_head(
    unpacked: Path, tmp_path: Path
) -> None:
    pretrain.pack_base(unpacked, tmp_path / "packed.safetensors")
    with (
        safe_open(tmp_path / "packed.safetensors", "pt") as again,
        safe_open(base.PACKED_FILE, "pt") as packed,
    ):
        assert set(again.keys()) == set(packed.keys())
        for name in packed.keys():  # noqa: SIM118
            expected = packed.get_tensor(name)
            # The movement of unused rows comes back through a mean over 151,000 bf16 rows.
            tolerance = (
                1e-2 * expected.float().abs().max().item() if name == base.UNUSED_HEAD else 0.0
            )
            torch.testing.assert_close(again.get_tensor(name), expected, atol=tolerance, rtol=0.0)


def test_the_small_vocabulary_cuts_every_text_as_the_official_one_does(
    vocab_path: Path, tmp_path: Path
) -> None:
    official = load_encoding(vocab_path)
    content, official_ids = pretrain.small_vocabulary(official, base.corpus_ids(official))
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    small = load_encoding(tmp_path)
    assert small.n_vocab == len(official_ids) < 2000
    for row in corpus.pretraining_rows():
        for text in row.values():
            assert [official_ids[index] for index in small.ordinary(text)] == official.ordinary(
                text
            )
    assert official_ids[small.im_end_id] == official.im_end_id


def test_widening_puts_used_rows_in_their_official_places(vocab_path: Path) -> None:
    official = load_encoding(vocab_path)
    used = base.corpus_ids(official)
    _, official_ids = pretrain.small_vocabulary(official, used)
    small = pretrain.fresh_tensors(official_ids)
    trained = small | {base.WTE: small[base.WTE] + 1, base.HEAD: small[base.HEAD] + 2}
    wide = pretrain.widened(trained, official_ids, used)
    for name, moved in ((base.WTE, 1), (base.HEAD, 2)):
        expected = base.seeded_rows(name)
        expected[used] += moved
        assert torch.equal(wide[name], expected)
    assert torch.equal(
        wide["transformer.h.0.attn.c_attn.weight"], small["transformer.h.0.attn.c_attn.weight"]
    )
