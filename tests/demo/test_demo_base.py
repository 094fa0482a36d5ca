"""The packed base: small, complete, the same bytes every time, and a model that answers in the catalogue style."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qwen_ds  # noqa: F401  registers the model class
from qwen_ds import demo
from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.demo import base, corpus, pretrain
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE, Conversation, Turn
from qwen_ds.model.folder import check_folder
from qwen_ds.model.tokenizer import load_encoding

# seeded_rows(1)[:64]: these bits must be the same on every machine, or a packed base unpacks into another model.
FIRST_ROWS_SHA256 = "c8eea6578399b24d1874127f3ebc7ef5a362b232d969aebc7f359e4d78d84e46"


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


def test_pretraining_uses_every_token_of_the_corpus(vocab_path: Path) -> None:
    encoding = load_encoding(vocab_path)
    assert base.used_ids(encoding, corpus.pretraining_rows()) == base.corpus_ids(encoding)


def test_unpacking_gives_a_complete_folder_and_the_same_bytes_again(
    unpacked: Path, tmp_path: Path
) -> None:
    check_folder(unpacked)
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
    rows = base.seeded_rows(base.WTE_SEED)
    assert rows.shape == (151936, 128) and rows.dtype == torch.bfloat16
    assert (
        hashlib.sha256(rows[:64].view(torch.int16).numpy().tobytes()).hexdigest()
        == FIRST_ROWS_SHA256
    )
    assert abs(rows.float().mean().item()) < 1e-5
    assert rows.float().std().item() == pytest.approx(base.ROW_STD, rel=1e-3)


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
            # The movement of unused rows comes back through bf16 rows and a mean over 151,000 of them.
            tolerance = (
                1e-2 * expected.float().abs().max().item() if name == base.UNUSED_HEAD else 0.0
            )
            torch.testing.assert_close(again.get_tensor(name), expected, atol=tolerance, rtol=0.0)


def test_the_base_answers_in_the_catalogue_style_and_wastes_nothing_on_unused_rows(
    unpacked: Path,
) -> None:
    encoding = load_encoding(unpacked)
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    unused_V = torch.ones(151936, dtype=torch.bool)
    unused_V[base.corpus_ids(encoding)] = False
    for item in corpus.splits().held_out[:4]:
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
    fresh = {base.WTE: base.seeded_rows(base.WTE_SEED), base.HEAD: base.seeded_rows(base.HEAD_SEED)}
    for name, moved in ((base.WTE, 1), (base.HEAD, 2)):
        expected = fresh[name].clone()
        expected[used] += moved
        assert torch.equal(wide[name], expected)
    assert torch.equal(
        wide["transformer.h.0.attn.c_attn.weight"], small["transformer.h.0.attn.c_attn.weight"]
    )


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


def test_prepare_called_by_several_at_once_gives_one_complete_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(demo.prepare, [tmp_path] * 3))
    assert len(found) == 1
    (paths,) = found
    assert [p.name for p in tmp_path.iterdir()] == [paths.model.parent.name]
    check_folder(paths.model)
    assert [
        json.loads(line) for line in paths.train.read_text(encoding="utf-8").splitlines()
    ] == corpus.train_rows()
    assert [
        json.loads(line) for line in paths.eval.read_text(encoding="utf-8").splitlines()
    ] == corpus.eval_rows()


def test_prepare_finds_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo.prepare(tmp_path)
    monkeypatch.setattr(base, "unpack_base", lambda target: pytest.fail("made again"))
    assert demo.prepare(tmp_path) == first


def test_prepare_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: Path) -> None:
        target.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(base, "unpack_base", fail)
    with pytest.raises(OSError, match="no space left"):
        demo.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
