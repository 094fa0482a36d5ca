"""A static batch: every row is answered by its own parameters, as if it were alone."""

from __future__ import annotations

import pytest
import torch

from qwen_ds.decode.batch import DecodingRow, Vocabulary, decode_batch
from qwen_ds.decode.exceptions import LogitsNotFinite, PromptTooLong
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from tests.decode.fakes import VOCABULARY, FakeModel, spell

CPU = torch.device("cpu")
WORDS = Vocabulary(VOCABULARY, 0, spell)
NO_STOP = StopRule()
ROWS = [
    DecodingRow([3, 1, 4], SamplingParams(max_new_tokens=9), NO_STOP),
    DecodingRow([1], SamplingParams(max_new_tokens=4), StopRule(ids=(5,))),
    DecodingRow([5, 9, 2, 6, 5], SamplingParams(True, 3.0, 0.9, 0, 12, seed=1), NO_STOP),
    DecodingRow([3, 5], SamplingParams(True, 1.0, 1.0, 4, 12, seed=2), StopRule(ids=(2, 7))),
    DecodingRow([8, 9], SamplingParams(True, 1.0, 1.0, 4, 12, seed=3), NO_STOP),
]


def test_rows_with_other_lengths_sampling_seeds_and_stops_are_answered_as_if_alone() -> None:
    together = decode_batch(FakeModel(), ROWS, WORDS, CPU)
    assert together == [decode_batch(FakeModel(), [row], WORDS, CPU)[0] for row in ROWS]
    assert {completion.finish_reason for completion in together} == {"stop", "length"}
    for row, completion in zip(ROWS, together, strict=True):
        assert len(completion.ids) <= row.sampling.max_new_tokens
        assert completion.prompt_tokens == len(row.prompt)
        assert not set(completion.ids) & set(row.stop.ids)


def test_decoding_ends_with_its_last_row_unless_other_ranks_go_on() -> None:
    model, first = FakeModel(), ROWS[0]
    (found,) = decode_batch(model, [first], WORDS, CPU)
    stop = StopRule(ids=(found.ids[2],))
    model.calls.clear()
    (cut,) = decode_batch(model, [DecodingRow(first.prompt, first.sampling, stop)], WORDS, CPU)
    assert (cut.ids, cut.finish_reason) == (found.ids[: found.ids.index(stop.ids[0])], "stop")
    assert model.calls == [(1, 3), *[(1, 1)] * len(cut.ids)]
    asked: list[bool] = []

    def others_go_on(done: bool) -> bool:
        asked.append(done)
        return len(asked) == 7

    row = DecodingRow(first.prompt, first.sampling, stop)
    assert decode_batch(model, [row], WORDS, CPU, others_go_on) == [cut]
    assert asked == [False] * len(cut.ids) + [True] * (7 - len(cut.ids))


def test_padding_rows_of_the_head_are_never_chosen() -> None:
    wide = FakeModel(head_rows=VOCABULARY + 200)
    for sampling in (SamplingParams(max_new_tokens=20), SamplingParams(True, 9.0, 1.0, 0, 20)):
        (found,) = decode_batch(wide, [DecodingRow([3], sampling, NO_STOP)], WORDS, CPU)
        assert max(found.ids) < VOCABULARY


def test_logits_that_are_no_numbers_are_an_error() -> None:
    class Broken(FakeModel):
        def __call__(self, **kwargs: object) -> object:  # type: ignore[override]
            outputs = super().__call__(**kwargs)  # type: ignore[arg-type]
            outputs.logits.fill_(torch.nan)
            return outputs

    with pytest.raises(LogitsNotFinite):
        decode_batch(Broken(), ROWS, WORDS, CPU)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    row = DecodingRow([5] * 10, SamplingParams(max_new_tokens=6), NO_STOP)
    row.require_room(16)
    with pytest.raises(PromptTooLong, match="10 tokens; expected at most 9") as error:
        row.require_room(15)
    assert (error.value.tokens, error.value.room) == (10, 9)
