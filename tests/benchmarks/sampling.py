"""The choice of the next tokens of 32 rows over the official vocabulary, against full sorts, and
what masks of a grammar add to a step.

    python tests/benchmarks/sampling.py [--rounds 7] [--rows 32]

Logits are bf16, and as uneven as a trained model's: normal numbers with a deviation of 4. Each
round times, one after another,

    sample       temperature 0.8, top_p 0.8
    full sorts   the same by transformers' processors and a multinomial draw
    greedy, top_k 50, top_p 1
    flat         as sample, of logits with a deviation of 1: nearly all tokens are candidates
    logprobs     greedy with 5 alternatives
    free, held   a step without and with a grammar in each row, inside a JSON string and at its
                 structure in turn: the head's product of a hidden size of 768, then sample. A
                 model's other layers would make the step longer, and the difference no larger.

and prints the medians in milliseconds, and the medians of the ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qwen_ds.decode.grammar import Grammar, GrammarCompiler
from qwen_ds.decode.sampler import RowSampler, prepare, sample
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.demo.base import official_vocabulary
from qwen_ds.model.tokenizer import Encoding, load_encoding

HIDDEN, PADDING = 768, 85
BEGINNINGS = ('{"名字": "裙', '{"a": [', '{"价格"', '{"b": {"c": 1', "{")


def full_sort(logits_RV: Tensor, num_tokens: int) -> Tensor:
    scores = logits_RV.float()
    scores[:, num_tokens:] = -torch.inf
    scores = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.8)(None, scores))
    return torch.multinomial(scores.softmax(-1), 1)


class Rows:
    """Rows of one kind, which go on from call to call."""

    def __init__(self, encoding: Encoding, count: int, params: dict[str, Any]) -> None:
        self.encoding, self.count, self.params = encoding, count, SamplingParams(**params)
        self.stops = (encoding.im_end_id, encoding.eod_id)
        self.rows = [self.row(i) for i in range(count)]

    def row(self, i: int, grammar: Grammar | None = None) -> RowSampler:
        params = self.params.of_row(i)
        return RowSampler(params, (1, 2, 3), self.encoding.n_vocab, self.stops, grammar)

    def sample(self, logits_RV: Tensor) -> None:
        assert all(one.error is None for one in sample(logits_RV, self.rows))

    def hold(self, compiler: GrammarCompiler) -> None:
        """Begin anew inside JSON, each row at another place."""
        self.rows = [self.row(i, compiler.json_object()) for i in range(self.count)]
        for i, row in enumerate(self.rows):
            for token in self.encoding.ordinary(BEGINNINGS[i % len(BEGINNINGS)]):
                row.accept(token)

    def step(self, hidden: Tensor, head: Tensor) -> None:
        prepare(self.rows)
        self.sample(hidden @ head)


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def measure(encoding: Encoding, count: int, rounds: int) -> dict[str, float]:
    """Medians of the parts in milliseconds, and two ratios."""
    generator = torch.Generator().manual_seed(0)
    width = encoding.n_vocab + PADDING
    normal_RV = torch.randn(count, width, generator=generator)
    logits_RV, flat_RV = (4 * normal_RV).bfloat16(), normal_RV.bfloat16()
    hidden = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    head = (torch.randn(HIDDEN, width, generator=generator) * 4 / HIDDEN**0.5).bfloat16()
    compiler = GrammarCompiler(encoding.token_bytes, encoding.n_vocab, (encoding.im_end_id,))
    drawn = {"do_sample": True, "top_k": 0}
    plain = Rows(encoding, count, drawn)
    kinds = {
        "greedy": Rows(encoding, count, {}),
        "top_k 50": Rows(encoding, count, {"do_sample": True, "top_k": 50}),
        "top_p 1": Rows(encoding, count, {**drawn, "top_p": 1.0, "temperature": 1.0}),
        "logprobs": Rows(encoding, count, {"logprobs": 5}),
    }
    free, held = Rows(encoding, count, drawn), Rows(encoding, count, drawn)
    found = []
    for _ in range(rounds + 1):
        held.hold(compiler)
        one = {
            "sample": milliseconds(lambda: plain.sample(logits_RV)),
            "full sorts": milliseconds(lambda: full_sort(logits_RV, encoding.n_vocab)),
            "flat": milliseconds(lambda: plain.sample(flat_RV)),
        }
        for name, rows in kinds.items():
            one[name] = milliseconds(lambda rows=rows: rows.sample(logits_RV))  # type: ignore[misc]
        one["free"] = milliseconds(lambda: free.step(hidden, head))
        one["held"] = milliseconds(lambda: held.step(hidden, head))
        found.append(one)
    del found[0]  # it warms up
    medians = {name: median(one[name] for one in found) for name in found[0]}
    faster = median(one["full sorts"] / one["sample"] for one in found)
    longer = median(one["held"] / one["free"] for one in found)
    return {**medians, "full sorts / sample": faster, "held / free": longer}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    found = measure(load_encoding(official_vocabulary()), options.rows, options.rounds)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
