"""A handful of prompts: every row is answered by its own parameters, as if it were alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from qwen_ds.decode.batch import decode_batch
from qwen_ds.decode.exceptions import LogitsNotFinite
from qwen_ds.decode.request import Completion, Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.family import QWEN

WORDS = 256  # tokens of the small model that stand for a byte


def spell(ids: tuple[int, ...] | list[int]) -> str:
    """Ids as bytes of UTF-8."""
    return bytes(ids).decode(errors="replace")


VOCABULARY = Vocabulary(WORDS, spell, lambda i: bytes([i]))
NO_STOP = StopRule()
ROWS = [
    Request([3, 1, 4], SamplingParams(max_new_tokens=9), NO_STOP),
    Request([1], SamplingParams(max_new_tokens=4), StopRule(ids=(5,))),
    Request([5, 9, 2, 6, 5], SamplingParams(True, 3.0, 0.9, 0, 12, seed=1), NO_STOP),
    Request(
        [3, 5],
        SamplingParams(True, 1.0, 1.0, 4, 12, seed=2),
        StopRule(ids=tuple(range(0, WORDS, 5))),
    ),
    Request([8, 9] * 50, SamplingParams(True, 1.0, 1.0, 4, 12, seed=3), NO_STOP),
]


class Decoder:
    """The small model, and its forward passes: rows and tokens of each."""

    def __init__(self, folder: Path) -> None:
        self.model = QWEN.model_class.from_pretrained(folder).eval()
        self.calls: list[tuple[int, ...]] = []
        self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )

    def __call__(self, requests: list[Request], **more: object) -> list[Completion]:
        config = self.model.config
        shape = QWEN.kv_shape(config, torch.float32, torch.device("cpu"))
        alpha_of = partial(QWEN.alpha, config)
        return decode_batch(self.model, requests, VOCABULARY, shape, alpha_of, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def decode(small_dir: Path) -> Decoder:
    return Decoder(small_dir)


def test_rows_with_other_lengths_sampling_seeds_and_stops_are_answered_as_if_alone(decode) -> None:
    together = decode(ROWS)
    assert together == [decode([row])[0] for row in ROWS]
    assert {completion.finish_reason for completion in together} == {"stop", "length"}
    for row, completion in zip(ROWS, together, strict=True):
        assert len(completion.ids) <= row.sampling.max_new_tokens
        assert completion.text == spell(completion.ids)
        assert completion.prompt_tokens == len(row.prompt)
        assert not set(completion.ids) & set(row.stop.ids)


def test_decoding_ends_with_its_last_row_unless_other_ranks_go_on(decode) -> None:
    first = ROWS[0]
    (found,) = decode([first])
    stop = StopRule(ids=(found.ids[2],))
    row = Request(first.prompt, first.sampling, stop)
    decode.calls.clear()
    (cut,) = decode([row])
    assert (cut.ids, cut.finish_reason) == (found.ids[: found.ids.index(stop.ids[0])], "stop")
    # All prompts in one pass, then a token a pass.
    assert decode.calls == [(1, 3), *[(1, 1)] * len(cut.ids)]
    asked: list[bool] = []

    def others_go_on(done: bool) -> bool:
        asked.append(done)
        return len(asked) == 7

    decode.calls.clear()
    assert decode([row], all_done=others_go_on) == [cut]
    assert asked == [False] * len(cut.ids) + [True] * (7 - len(cut.ids))
    # The others wait for this rank's share of the weights at each pass.
    assert len(decode.calls) == 7


def test_ids_without_a_token_are_never_chosen(decode) -> None:
    hot = SamplingParams(True, 99.0, 1.0, 0, 40)
    for sampling in (SamplingParams(max_new_tokens=40), hot):
        (found,) = decode([Request([3], sampling, NO_STOP)])
        assert max(found.ids) < WORDS


def test_logits_that_are_no_numbers_are_an_error(small_dir: Path) -> None:
    broken = Decoder(small_dir)
    broken.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(LogitsNotFinite):
        broken(ROWS)
