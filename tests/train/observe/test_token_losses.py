"""Losses of each token, in pieces that a person can read; whole runs are in test_jobs."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.family import QWEN
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora import add_lora
from qwen_ds.train.loss import TrainingModel
from qwen_ds.train.observe import token_losses
from qwen_ds.train.observe.token_losses import TokenLosses, evenly_spread, pieces
from qwen_ds.train.survive.watchdog import Watchdog


def test_the_rows_are_spread_evenly_and_each_comes_once() -> None:
    assert evenly_spread(10, 5) == [1, 3, 5, 7, 9]
    assert evenly_spread(1000, 5) == [100, 300, 500, 700, 900]
    assert evenly_spread(3, 5) == [0, 1, 2] and evenly_spread(3, 0) == []


def test_pieces_are_whole_characters_and_give_the_text(vocab_path: Path) -> None:
    """Rare characters are several tokens each, whose losses are summed."""
    encoding = load_encoding(vocab_path)
    text = "a 龘靐 ok 🦜你"
    ids = [*encoding.ordinary(text), encoding.im_end_id]
    losses = [2.0**i for i in range(len(ids))]
    found = list(pieces(encoding, ids, losses))
    texts = [piece for piece, _ in found]
    assert "".join(texts) == text + "<|im_end|>" and texts[-1] == "<|im_end|>"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert len(found) < len(ids), "some character has several tokens, or this tests nothing"
    assert sum(loss for _, loss in found if loss) == sum(losses)
    # Powers of two: each token's loss is in exactly one piece, and neighbours stay neighbours.
    assert [loss for _, loss in found] == sorted(loss for _, loss in found if loss)
    parrot = next(loss for piece, loss in found if "🦜" in piece)
    assert parrot is not None and bin(int(parrot)).count("1") > 1


def test_half_a_character_before_a_control_token_stands_by_itself(vocab_path: Path) -> None:
    encoding = load_encoding(vocab_path)
    half = encoding.ordinary("🦜")[:1]
    ids = [*encoding.ordinary("a"), *half, encoding.im_end_id, *half]
    found = list(pieces(encoding, ids, [1.0, 2.0, 4.0, None]))
    bad = "\N{REPLACEMENT CHARACTER}"
    assert found == [("a", 1.0), (bad, 2.0), ("<|im_end|>", 4.0), (bad, None)]
    assert "".join(piece for piece, _ in found) == encoding.decode(ids)


def test_only_targets_have_a_loss_and_nothing_that_json_has_not(vocab_path: Path) -> None:
    encoding = load_encoding(vocab_path)
    ids = encoding.ordinary("one two three four")
    losses = [None, 0.0, float("nan"), float("inf")]
    assert [loss for _, loss in pieces(encoding, ids, losses)] == [None, 0.0, None, None]


class Rows:
    """Three rows, each a question of 4 tokens and an answer of the rest."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        generator = np.random.default_rng(0)
        self._rows = [generator.integers(0, 250, n).astype(np.int32) for n in lengths]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        labels = self._rows[row].copy()
        labels[:4] = IGNORE
        return self._rows[row].copy(), labels

    def source(self, row: int) -> str:
        return f"rows.jsonl:{row + 1}"


@pytest.mark.parametrize("trained_rows", [(), (5, 250)])
def test_the_losses_add_up_to_the_training_loss(
    small_dir: Path, trained_rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row's first tokens, also with trained token rows in the head, and without dropout."""
    monkeypatch.setattr(token_losses, "MAX_TOKENS", 12)
    base = QWEN.model_class.from_pretrained(small_dir)
    wrapped = add_lora(base, LoraOptions(dropout=0.9), base="", seed=1, row_ids=trained_rows)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:  # B is zero at first, and the rows are those of the base
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.manual_seed(len(name)))
    model = TrainingModel(wrapped, base.base_model, base.get_output_embeddings())
    of_each = partial(model, of_each_token=True)
    engine: Any = SimpleNamespace(token_losses=of_each, train=model.train)
    rows: Any = Rows((9, 30, 5))
    measure = TokenLosses(rows, 2, load_encoding(small_dir), Mock(Watchdog))
    before = torch.get_rng_state()
    first, second = measure(engine, "start", 0)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert (first.source, second.source) == ("rows.jsonl:1", "rows.jsonl:3")
    (third,) = TokenLosses(rows, 1, load_encoding(small_dir), Mock(Watchdog))(engine, "end", 7)
    assert (third.source, third.when, third.step) == ("rows.jsonl:2", "end", 7)
    model.eval()
    for found, row in ((first, 0), (second, 2), (third, 1)):
        ids, labels = (torch.from_numpy(part[:12]).long()[None] for part in rows[row])
        known = [loss for loss in found.losses if loss is not None]
        assert sum(known) == pytest.approx(model(ids, labels).item(), rel=1e-5)
        assert "".join(found.pieces) == load_encoding(small_dir).decode(ids[0].tolist())
        json.dumps(asdict(found), allow_nan=False)
