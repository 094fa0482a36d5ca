"""Evaluation while training: sampled answers of real rows, by the decoding core.

Losses, and samples under ZeRO-3, are in test_jobs.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from qwen_ds.model.chatml import IGNORE, Conversation, Turn, encode_prompt
from qwen_ds.model.family import QWEN
from qwen_ds.plan.run import Base
from qwen_ds.recipe.options import EvalOptions, Recipe
from qwen_ds.train.observe.evaluation import BestLoss, Evaluator
from qwen_ds.train.survive.watchdog import Watchdog
from tests.train.gpu_waits import Waits, as_on_cuda


class FakeRows:
    """Two rows whose targets begin with the role of the turn, as data.learn_on original has it."""

    pad_id = 304

    def __init__(self, folder: Path) -> None:
        encoding = QWEN.load_encoding(folder)
        self.rows, self.prompts = [], []
        header, end = encoding.ordinary("assistant\n"), encoding.im_end_id
        for question, answer in (("colour#1", "abc de 0"), ("a", "b")):
            prompt = encode_prompt(encoding, Conversation(None, (Turn("user", question),)))
            labels = [*header, *encoding.ordinary(answer), end]
            ids_L = [*prompt[: -len(header)], *labels]
            unlearnt = [IGNORE] * (len(ids_L) - len(labels))
            self.rows.append((torch.tensor(ids_L), torch.tensor([*unlearnt, *labels])))
            self.prompts.append(prompt)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[row]


Setting = tuple[Evaluator, Any, FakeRows, Mock]


@pytest.fixture
def setting(small_dir: Path) -> Setting:
    rows, watchdog = FakeRows(small_dir), Mock(Watchdog)
    recipe = Recipe(eval=EvalOptions(samples=5, sample_tokens=6))
    model = QWEN.model_class.from_pretrained(small_dir)
    engine = SimpleNamespace(
        model=SimpleNamespace(model=model), stage=2, device=torch.device("cpu"), train=model.train
    )
    evaluator = Evaluator(rows, Base.read(small_dir), recipe, 2048, watchdog)  # type: ignore[arg-type]
    return evaluator, engine, rows, watchdog


def test_samples_are_the_models_greedy_answers(setting: Setting, small_dir: Path) -> None:
    evaluator, engine, rows, watchdog = setting
    encoding, model = QWEN.load_encoding(small_dir), engine.model.model
    found = evaluator.samples(engine, 7)
    watchdog.at.assert_called_once_with(7, "sampled answers")
    assert watchdog.touch.call_count == 6 and model.training
    assert [sample.reference for sample in found] == ["abc de 0", "b"]
    model.eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=304)
    for sample, prompt in zip(found, rows.prompts, strict=True):
        assert sample.prompt == encoding.decode(prompt)
        ids = torch.tensor([prompt])
        stops = list(QWEN.stop_ids(encoding))
        (alone,) = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=stops
        )
        new = [i for i in alone[len(prompt) :].tolist() if i not in stops]
        assert sample.answer == encoding.decode(new)


def test_a_model_of_nan_has_empty_answers_and_training_decides_what_follows(
    setting: Setting,
) -> None:
    evaluator, engine, *_ = setting
    engine.model.model.lm_head.weight.data.fill_(torch.nan)
    assert [sample.answer for sample in evaluator.samples(engine, 7)] == ["", ""]
    assert engine.model.model.training


class FourRows:
    """Rows of 6 to 9 tokens; all but the first are learnt."""

    pad_id, lens = 0, np.arange(6, 10)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(1, 7 + row)
        return ids, ids


def test_an_evaluation_reads_its_sums_once_at_the_end(small_dir: Path) -> None:
    """A row of L tokens has a loss of 2 (L - 1) here, so each target costs 2 nats."""
    read: list[torch.Tensor] = []
    asked: list[bool] = []

    def loss_sum(ids_BT: torch.Tensor, labels_BT: torch.Tensor, places_P: torch.Tensor) -> Any:
        read.append(ids_BT)
        return torch.full((), 2.0 * len(places_P))

    def asked_to_stop() -> bool:
        asked.append(True)
        return len(asked) > 4

    waits = Waits()
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"), loss_sum=loss_sum, train=lambda mode: None
    )
    rows: Any = FourRows()
    evaluator = Evaluator(rows, Base.read(small_dir), Recipe(), 9, Mock(Watchdog))
    with as_on_cuda(waits), waits:
        loss = evaluator.loss(engine, 3, asked_to_stop)
    # Batches are made in CPU memory: from_numpy, and where their targets are.
    del waits.counts["lift_fresh"], waits.counts["nonzero"]
    assert loss == 2.0 and len(read) == 4 and waits.counts == {"tolist": 1}
    assert evaluator.loss(engine, 3, asked_to_stop) is None and len(read) == 4


def test_batches_of_an_evaluation_reach_a_gpu_from_page_locked_memory(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a GPU of no kind: what is put on it stays where it is."""
    zeros, locked = torch.zeros, set[int]()

    def lock(self: torch.Tensor) -> torch.Tensor:
        locked.add(id(self))
        return self

    def loss_sum(*batch: torch.Tensor) -> torch.Tensor:
        assert {id(tensor) for tensor in batch} <= locked
        return torch.ones(())

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: zeros(*size, **how))
    engine: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), loss_sum=loss_sum, train=lambda mode: None
    )
    rows = FourRows()
    evaluator = Evaluator(rows, Base.read(small_dir), Recipe(), 9, Mock(Watchdog))  # type: ignore[arg-type]
    asked = Mock(return_value=False)
    assert evaluator.loss(engine, 3, asked) == pytest.approx(4 / (5 + 6 + 7 + 8))
    assert asked.call_count == 1, "of 4 micro-batches"


def test_the_best_loss_is_kept_and_patience_counts_from_it() -> None:
    best = BestLoss()
    for step, loss in enumerate([3.0, 2.0, float("nan"), 2.0], 1):
        best = best.after(loss, step)
    assert best == BestLoss(2.0, 2, since=2), "an equal loss is no better one, NaN never is"
    assert best.out_of_patience(2) and not best.out_of_patience(3)
    assert not best.out_of_patience(None)
