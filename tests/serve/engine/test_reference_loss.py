"""Losses of references: what peft computes for each adapter, alike whoever else is answered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.folder import find_model
from serve.answering import EngineAnswerer, Question
from serve.engine.beams import BeamAnswerer
from serve.engine.loading import load_engine
from serve.engine.reference_loss import ReferenceLosses
from serve.options import AnswerOptions
from tests.serve.engine.test_adapters import KINDS, PROMPTS, Model, make_adapter
from tests.serve.engine.test_adapters import alone as alone
from tests.serve.engine.test_adapters import folders as folders

ANSWER = [7, 301, 44, 9, *range(100, 130), 305]


def expected(model: Model, prompt: list[int]) -> float:
    logits_TV = model([*prompt, *ANSWER])[len(prompt) - 1 : -1].float()
    return float(F.cross_entropy(logits_TV, torch.tensor(ANSWER), reduction="sum"))


def test_each_adapter_has_its_own_loss(
    small_dir: Path, folders: Mapping[str, Path], alone: Mapping[str | None, Model]
) -> None:
    losses = ReferenceLosses(load_engine(small_dir, adapters=folders))
    for prompt in PROMPTS[:2]:
        found = {name: losses.of(prompt, ANSWER, name) for name in (None, *KINDS)}
        for name, loss in found.items():
            assert loss == pytest.approx(expected(alone[name], prompt), rel=1e-5), name
        assert len({round(loss or 0, 3) for loss in found.values()}) == 1 + len(KINDS)


def test_a_single_adapter_answers_for_all_rows(small_dir: Path, tmp_path: Path) -> None:
    folder = make_adapter(small_dir, tmp_path / "a", KINDS["rows"], 1)
    alone_loss = ReferenceLosses(load_engine(small_dir, folder)).of(PROMPTS[0], ANSWER, None)
    named = ReferenceLosses(load_engine(small_dir, adapters={"a": folder}))
    assert alone_loss == pytest.approx(named.of(PROMPTS[0], ANSWER, "a"), rel=1e-5)
    assert alone_loss != named.of(PROMPTS[0], ANSWER, None)


def test_there_is_no_loss_without_a_reference_or_beyond_the_context(small_dir: Path) -> None:
    engine = load_engine(small_dir)
    losses = ReferenceLosses(engine)
    assert losses.of(PROMPTS[0], [], None) is None
    assert losses.of([5] * (engine.context - len(ANSWER)), ANSWER, None) is not None
    assert losses.of([5] * (engine.context - len(ANSWER) + 1), ANSWER, None) is None


def test_no_bit_of_a_loss_depends_on_who_else_is_answered(small_dir: Path) -> None:
    engine = load_engine(small_dir)

    def losses(prompts: list[list[int]]) -> list[float | None]:
        answerer = EngineAnswerer(engine, engine.start(4, memory_gb=0.01))
        few = SamplingParams(max_new_tokens=3)
        questions = [Question("", few, ids, reference="x", reference_ids=ANSWER) for ids in prompts]
        found = dict(answerer.answer(questions))
        assert all(one.reference_tokens == len(ANSWER) for one in found.values())  # type: ignore[union-attr]
        return [found[i].reference_nll for i in range(len(prompts))]  # type: ignore[union-attr]

    together = losses(PROMPTS)
    assert together == [loss for prompt in PROMPTS for loss in losses([prompt])]


def test_beam_search_has_it_too(small_dir: Path) -> None:
    options = AnswerOptions(num_beams=2, dtype="float32")
    beams = BeamAnswerer.load(find_model(small_dir), None, options)
    question = Question(
        "", SamplingParams(max_new_tokens=2), PROMPTS[0], reference="x", reference_ids=ANSWER
    )
    ((_, found),) = beams.answer([question])
    engine = ReferenceLosses(load_engine(small_dir))
    assert found.reference_nll == pytest.approx(engine.of(PROMPTS[0], ANSWER, None), rel=1e-6)  # type: ignore[union-attr]
