"""Evaluation during training: loss on held-out rows, answers to a few, the best loss so far.

Shapes: L tokens of one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.data.batches import evaluation_batches
from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.family import QWEN
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.recipe.options import EvalOptions
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.survive.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the evaluation data with the model's answer of this moment."""

    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class BestLoss:
    """The lowest evaluation loss so far, its step, and the number of evaluations since then."""

    loss: float | None = None
    step: int | None = None
    since: int = 0

    def after(self, loss: float, step: int) -> BestLoss:
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return BestLoss(loss, step, 0)
        return BestLoss(self.loss, self.step, self.since + 1)

    def out_of_patience(self, patience: int | None) -> bool:
        return patience is not None and self.since >= patience


class Evaluator:
    """Loss and sampled answers on `rows`.

    `loss` and `samples` are collectives: under ZeRO-3 every forward pass needs every rank.
    """

    def __init__(
        self,
        rows: TokenRows,
        encoding: Encoding,
        options: EvalOptions,
        tokens_per_micro_batch: int,
        watchdog: Watchdog,
    ) -> None:
        self._rows, self._options, self._budget = rows, options, tokens_per_micro_batch
        self._encoding, self._watchdog = encoding, watchdog

    def due(self, step: int, steps: int, steps_per_epoch: int) -> bool:
        """Whether the evaluation follows optimizer step `step` (1-based) of `steps`."""
        every = self._options.every_steps or steps_per_epoch
        return step > 0 and (step % every == 0 or step == steps)

    @torch.no_grad()
    def loss(self, engine: TrainingEngine, step: int) -> float:
        """Nats per target token over all rows, by the training formula, dropout off."""
        engine.train(False)
        loss = targets = 0.0
        batches = evaluation_batches(self._rows, dist.world_size(), dist.rank(), self._budget)
        for i, batch in enumerate(batches):
            self._watchdog.at(step, f"evaluation, micro-batch {i + 1}")
            loss += engine.loss_sum(batch.ids_BT, batch.labels_BT).item()
            targets += batch.num_targets
        # All ranks, once an evaluation.
        loss, targets = dist.sum_floats(loss, targets)
        engine.train(True)
        return loss / max(targets, 1.0)

    @torch.no_grad()
    def samples(self, engine: TrainingEngine, step: int) -> list[Sample]:
        """Greedy answers to the first rows, in one batch. All ranks decode the same rows side by
        side: ZeRO-3 needs every rank in every forward pass."""
        count = min(self._options.samples, len(self._rows))
        if not count:
            return []
        engine.train(False)
        self._watchdog.at(step, "sampled answers")
        rows = [self._split(i) for i in range(count)]
        width = max(len(prompt) for prompt, _ in rows)
        ids_BT = torch.full((count, width), self._rows.pad_id, device=engine.device)
        real_BT = torch.zeros_like(ids_BT)
        for b, (prompt, _) in enumerate(rows):  # on the right, as transformers' generate wants them
            ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
            real_BT[b, width - len(prompt) :] = 1
        generate: Any = (
            engine.model.model.generate
        )  # transformers', of the model or through PEFT's wrapper
        # Decoding meets the blocks with a cache, for which compiled ones would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            answers = generate(
                input_ids=ids_BT, attention_mask=real_BT, do_sample=False, max_new_tokens=self._options.sample_tokens,
                eos_token_id=self._stop_ids(), pad_token_id=self._rows.pad_id,
                synced_gpus=engine.stage == 3 and dist.world_size() > 1, stopping_criteria=[self._get_on],
            )[:, width:].tolist()  # fmt: skip
        engine.train(True)
        return [
            Sample(self._text(prompt), self._text(self._until_stop(answer)), self._text(reference))
            for (prompt, reference), answer in zip(rows, answers, strict=True)
        ]

    def _get_on(self, ids_BT: Tensor, scores: object, **_: object) -> Tensor:
        """Called by `generate` at each token: none of them ends an answer, all of them are
        progress."""
        self._watchdog.touch()
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

    def _split(self, row: int) -> tuple[list[int], list[int]]:
        """Token ids of a row's first trained turn: those of the prompt, and those of the answer.

        The prompt ends with "<|im_start|>assistant\\n".
        """
        ids_L, labels_L = (array.tolist() for array in self._rows[row])
        first = next((i for i, label in enumerate(labels_L) if label != IGNORE), len(ids_L))
        header = self._encoding.ordinary("assistant\n")
        if ids_L[first : first + len(header)] == header:
            first += len(header)
        return ids_L[:first], self._until_stop(ids_L[first:])

    def _until_stop(self, ids: list[int]) -> list[int]:
        stops = self._stop_ids()
        return ids[: next((i for i, index in enumerate(ids) if index in stops), len(ids))]

    def _stop_ids(self) -> list[int]:
        return list(QWEN.stop_ids(self._encoding))

    def _text(self, ids: list[int]) -> str:
        # Padding rows of the embedding have no token, and an untrained model may choose one.
        return self._encoding.decode([index for index in ids if index < self._encoding.n_vocab])
