"""Beam search, by transformers' own `generate`: slow, a batch at a time.

Shapes: B rows, T tokens of the longest prompt, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from qwen_ds.decode.exceptions import DecodingError, LogitsNotFinite, RowOutOfMemory
from qwen_ds.decode.stop import StopRule
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.adapter_loading import check_copies, put_adapter
from qwen_ds.model.device import take_device
from qwen_ds.model.folder import ModelFolder
from qwen_ds.model.loading import load_base
from qwen_ds.model.tokenizer import Encoding
from serve.answering import Answer, Question
from serve.endpoint.options import given_options
from serve.engine.adapters import DEFAULT, named_adapters
from serve.engine.loading import choose_dtype
from serve.engine.reference_loss import loss_of_answer
from serve.options import AnswerOptions

_COLDEST = 1e-4  # colder ones overflow in generate, and choose nothing else
# Options of the engine alone.
_NOT_HERE = (
    "stop", "json_object", "json_schema", "regex", "choice", "presence_penalty",
    "frequency_penalty", "logit_bias", "ignore_eos", "logprobs", "prefill_tokens", "memory_gb",
)  # fmt: skip


def check_beams(options: AnswerOptions) -> None:
    """Raise UserError for options that beams cannot honour."""
    if options.num_beams == 1:
        return
    given = given_options(options)
    with_it = [f"--{name}" for name in _NOT_HERE if name in given]
    if set(named_adapters(options.adapter)) - {DEFAULT}:
        with_it.append("--adapter NAME=DIR")
    if with_it:
        raise UserError(
            f"--num_beams {options.num_beams} is given with {', '.join(with_it)}, which beam search"
            " does not have; expected one or the other"
        )


class _GivesUp(StoppingCriteria):
    """Ends all rows at once where the answer is not wanted any more."""

    def __init__(self, gives_up: Callable[[], bool]) -> None:
        self._gives_up = gives_up

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ends = self._gives_up()
        return torch.full((len(input_ids),), ends, dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Raises LogitsNotFinite where a row has no number at all."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax(-1).isfinite().all()):
            raise LogitsNotFinite
        return scores


@dataclass(frozen=True, slots=True)
class BeamAnswerer:
    """Answers of a model of transformers' form by beam search."""

    model: Any
    encoding: Encoding
    stop: StopRule
    num_beams: int
    batch_size: int
    context: int  # tokens that prompt and answer may have together
    gives_up: Callable[[], bool] = bool
    """Asked at each token whether to end at once."""

    @classmethod
    @torch.no_grad()
    def load(
        cls, folder: ModelFolder, adapter: Path | None, options: AnswerOptions
    ) -> BeamAnswerer:
        """Load a model, and put an adapter on it as peft does."""
        place, name = take_device(options.device), options.dtype
        model: Any = load_base(folder, "auto" if name == "auto" else TORCH_DTYPES[name])
        stored = next(model.parameters()).dtype
        model = model.to(choose_dtype(name, stored, place))
        if adapter is not None:
            found = read_adapter(adapter, allow_pickle=options.allow_pickle)
            check_copies(found, dict(model.named_parameters()))
            put_adapter(model, found)
        stop = StopRule(folder.family.stop_ids(folder.encoding))
        context = folder.family.context(folder.config)
        rows = options.num_beams, options.batch_size
        return cls(model.to(place).eval(), folder.encoding, stop, *rows, context)

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """As `Answerer.answer`. Rows that are drawn run alone: the numbers of a batch would depend
        on who is in it."""
        coming = enumerate(questions)
        while batch := list(islice(coming, 1)):
            if not batch[0][1].sampling.do_sample:
                batch += islice(coming, self.batch_size - 1)
            found = self._answers([one for _, one in batch])
            for (i, one), each in zip(batch, found, strict=True):
                yield i, self._with_loss(one, each) if isinstance(each, Answer) else each

    def _with_loss(self, one: Question, answer: Answer) -> Answer:
        if not one.reference_ids or len(one.ids) + len(one.reference_ids) > self.context:
            return answer
        model = self.model
        loss = loss_of_answer(model.transformer, model.lm_head, one.ids, one.reference_ids)
        if loss is None:
            return answer
        return replace(answer, reference_nll=loss, reference_tokens=len(one.reference_ids))

    def _answers(self, batch: Sequence[Question]) -> list[Answer | DecodingError]:
        """A batch's answers; where it fails, each row's by itself."""
        try:
            return [*self._generated(batch)]
        except (LogitsNotFinite, torch.OutOfMemoryError) as error:
            if len(batch) == 1:
                return [error if isinstance(error, LogitsNotFinite) else RowOutOfMemory()]
        return [found for one in batch for found in self._answers([one])]

    def _generated(self, batch: Sequence[Question]) -> Iterator[Answer]:
        sampling, rows = batch[0].sampling, self.model.config.vocab_size
        size, device = self.encoding.n_vocab, self.model.device
        config = GenerationConfig(
            num_beams=self.num_beams,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_tokens or None,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(self.stop.ids),
            pad_token_id=self.stop.ids[0],  # which generate penalises for no padding
            do_sample=sampling.do_sample,
        )
        if sampling.do_sample:
            config.update(
                temperature=max(sampling.temperature, _COLDEST), top_p=sampling.top_p,
                top_k=sampling.top_k, min_p=sampling.min_p or None,
            )  # fmt: skip
            torch.manual_seed(sampling.seed)
        no_token = SuppressTokensLogitsProcessor(list(range(size, rows)), device=str(device))
        width = max(len(one.ids) for one in batch)
        ids_BT = torch.full((len(batch), width), config.pad_token_id)
        for row_T, one in zip(ids_BT, batch, strict=True):
            row_T[width - len(one.ids) :] = torch.tensor(one.ids)
        places_1T = torch.arange(width)[None]
        mask_BT = places_1T >= torch.tensor([[width - len(one.ids)] for one in batch])
        out_BT = self.model.generate(
            ids_BT.to(device), config, LogitsProcessorList([_Finite(), no_token]),
            attention_mask=mask_BT.long().to(device),
            stopping_criteria=StoppingCriteriaList([_GivesUp(self.gives_up)]),
        )  # fmt: skip
        for one, new in zip(batch, out_BT[:, width:].tolist(), strict=True):
            kept, reason = self.stop.cut(new)
            yield Answer(self.encoding.decode(kept), reason, len(one.ids), len(kept))
