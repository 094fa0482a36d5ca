"""Evaluation during training: loss on held-out rows, answers to a few, the best loss so far.

Shapes: L tokens of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_ds import dist
from qwen_ds.data.batches import evaluation_batches
from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.decode.batch import decode_batch
from qwen_ds.decode.exceptions import LogitsNotFinite
from qwen_ds.decode.request import Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.chatml import IGNORE
from qwen_ds.plan.run import Base
from qwen_ds.recipe.options import Recipe
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.survive.watchdog import Watchdog

MICRO_BATCHES_UNTIL_ASKED = 16  # on a GPU: some seconds, also of long rows


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the evaluation data with the model's answer of this moment."""

    prompt: str
    answer: str
    reference: str

    def as_markdown(self) -> str:
        return f"**{self.prompt}**\n\n{self.answer}\n\n*{self.reference}*"


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

    Args:
        budget: most padded tokens of a micro-batch; that of the training, whose memory is planned.
    """

    def __init__(
        self, rows: TokenRows, base: Base, recipe: Recipe, budget: int, watchdog: Watchdog
    ) -> None:
        self._rows, self._options, self._budget = rows, recipe.eval, budget
        encoding = base.encoding
        assert encoding is not None
        self._vocabulary = Vocabulary(encoding.n_vocab, encoding.decode, encoding.token_bytes)
        self._base, self._dtype = base, TORCH_DTYPES.get(recipe.model.dtype, torch.float32)
        self._stop = StopRule(base.family.stop_ids(encoding))
        self._header = tuple(encoding.ordinary("assistant\n"))
        self._watchdog = watchdog

    @torch.no_grad()
    def loss(
        self, engine: TrainingEngine, step: int, asked_to_stop: Callable[[], bool]
    ) -> float | None:
        """Nats per target token over all rows, by the training formula, dropout off; None if the
        run is asked to stop meanwhile.

        `asked_to_stop` is a collective, called after every so many micro-batches: an evaluation may
        take longer than the time between a signal and the kill.
        """
        engine.train(False)
        # On a GPU each look at a result makes the CPU wait, so the sums stay there to the end, and
        # the ranks agree to go on after some seconds.
        on_gpu = engine.device.type == "cuda"
        every = MICRO_BATCHES_UNTIL_ASKED if on_gpu else 1
        loss_sum, targets = torch.zeros((), dtype=torch.float64, device=engine.device), 0
        batches = evaluation_batches(self._rows, dist.world_size(), dist.rank(), self._budget)
        for i, batch in enumerate(batches):
            self._watchdog.at(step, f"evaluation, micro-batch {i + 1}")
            if i % every == 0 and asked_to_stop():
                engine.train(True)
                return None
            batch = batch.pinned() if on_gpu else batch  # a copy from other memory may wait, too
            loss_sum += engine.loss_sum(batch.ids_BT, batch.labels_BT, batch.places_P)
            targets += batch.num_targets
        # All ranks, once an evaluation.
        ranks = dist.gather_numbers(torch.stack([loss_sum, torch.full_like(loss_sum, targets)]))
        engine.train(True)
        return sum(loss for loss, _ in ranks) / max(sum(count for _, count in ranks), 1.0)

    def samples(self, engine: TrainingEngine, step: int) -> list[Sample]:
        """Greedy answers to the first rows, in one batch that all ranks decode alike."""
        rows = [self._split(i) for i in range(min(self._options.samples, len(self._rows)))]
        if not rows:
            return []
        self._watchdog.at(step, "sampled answers")
        sampling = SamplingParams(max_new_tokens=self._options.sample_tokens)
        batch = [Request(prompt, sampling, self._stop) for prompt, _ in rows]
        partitioned = engine.stage == 3 and dist.world_size() > 1

        def all_done(done: bool) -> bool:
            self._watchdog.touch()  # a token is progress
            # Ranks end together: the others would wait for the weights of one that left earlier.
            return dist.sum_floats(float(not done)) == [0.0] if partitioned else done

        engine.train(False)
        model, vocabulary, base = engine.model.model, self._vocabulary, self._base
        shape = base.family.kv_shape(base.config, self._dtype, engine.device)
        alpha_of = base.family.alpha_of(base.config)
        # Decoding runs the blocks with a cache, for which torch would compile them anew.
        with torch.compiler.set_stance("force_eager"):
            try:
                found = decode_batch(model, batch, vocabulary, shape, alpha_of, all_done)
                answers = [completion.text for completion in found]
            except LogitsNotFinite:
                # Every rank gets here, and the loss beside the samples is NaN as well.
                answers = [""] * len(rows)
        engine.train(True)
        decode = vocabulary.decode
        return [
            Sample(decode(prompt), answer, decode(reference))
            for (prompt, reference), answer in zip(rows, answers, strict=True)
        ]

    def _split(self, row: int) -> tuple[list[int], tuple[int, ...]]:
        """Prompt and answer of a row's first turn with targets, as token ids: the prompt ends with
        "<|im_start|>assistant\\n"."""
        ids_L, labels_L = (array.tolist() for array in self._rows[row])
        first = next((i for i, label in enumerate(labels_L) if label != IGNORE), len(ids_L))
        if tuple(ids_L[first : first + len(self._header)]) == self._header:
            first += len(self._header)
        return ids_L[:first], self._stop.cut(ids_L[first:])[0]
