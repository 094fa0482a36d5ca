"""Speed of the decoding engine on a CPU, beside `generate` and transformers' continuous batching.

    OMP_NUM_THREADS=1 python tests/benchmarks/serve.py              # every part, three rounds
    python tests/benchmarks/serve.py --parts greedy,gap --rounds 1 --json serve.json
    python tests/benchmarks/serve.py --parts "" --profile           # where a step's time goes
    python tests/benchmarks/serve.py --clock cpu                    # on cores that others use, too

One process of one thread, a model of 110M parameters in bf16 with random weights. Contenders take
turns within a round, ratios are taken round by round, and the table shows medians. Only tokens that
were asked for count. 64 requests have the lengths of Chinese instruction data (prompts of 8 to 200
tokens, answers of 4 to 400); an answer ends at its length and nowhere else.

    greedy    32 slots; beside static batches of 32, and transformers' continuous batching
    sampling  the same with temperature 0.8, top_p 0.8 and the 7B's head of 151,936 rows, as certain
              as a trained one: about 20 tokens hold 0.8 of the probability
    mixed     greedy, every eighth prompt of 1,000 tokens
    single    one request after another, beside `generate`
    prefix    the first token's time of a prompt whose first 1,024 tokens are known, to a new one's
    gap       7 streams run, then a prompt of 4,000 tokens comes: their longest wait for a token
              meanwhile, to the median wait before; as serve.engine runs on a CPU, and with each of
              --prefill_tokens at any time
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import functools
import json
import os
import pstats
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.paged_attention import PAGE_TOKENS
from qwen_ds.decode.request import Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.model.prepacked import prepack
from tests.benchmarks.serve_peers import Answers, Clock, continuous_batching, static_batches

Contender = Callable[[QWenLMHeadModel, Sequence[Request], int, Clock], tuple[Answers, float]]
Figures = dict[str, float]

PREFILL_BESIDE = 72  # that of serve.engine, which this script's name hides
GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, temperature=0.8, top_p=0.8, top_k=0)
CERTAINTY = 8  # of a trained model's logits, to those of random weights
# Part and contender: ours must be faster by.
BARS = {
    ("greedy", "static"): 3.0, ("greedy", "continuous"): 1.3, ("sampling", "static"): 5.0,
    ("mixed", "static"): 2.0, ("single", "static"): 1.15,
}  # fmt: skip
MOST = {"prefix": 0.3, "gap": 2.5}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of all parts; a test makes them tiny."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 4096
    vocab: int = 16384
    large_vocab: int = 151936
    seq_length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    initializer_range: float = 0.02
    requests: int = 64
    slots: int = 32
    longest_prompt: int = 200
    longest_answer: int = 400
    long_prompt: int = 1000  # every eighth of `mixed`
    single_requests: int = 8
    prefix: int = 1024
    gap_seq_length: int = 8192
    gap_prompt: int = 4000
    streams: int = 7
    steps_before: int = 40  # that the streams run before the long prompt comes
    prefill_tokens: int = 256

    def model(self, *, vocab: int | None = None, seq_length: int | None = None) -> QWenLMHeadModel:
        torch.manual_seed(0)
        config = QWenConfig(
            vocab_size=vocab or self.vocab, hidden_size=self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            kv_channels=self.hidden // self.heads, intermediate_size=self.intermediate,
            seq_length=seq_length or self.seq_length, use_dynamic_ntk=True, use_logn_attn=True,
            initializer_range=self.initializer_range,
        )  # fmt: skip
        return QWenLMHeadModel(config).eval().to(self.dtype)


def make_requests(
    sizes: Sizes, sampling: SamplingParams, *, vocab: int | None = None, long_every: int = 0
) -> list[Request]:
    """Requests of random tokens, with the lengths of Chinese instruction data."""
    draw, made = random.Random(1), []
    for i in range(sizes.requests):
        prompt = min(sizes.longest_prompt, max(8, round(draw.lognormvariate(3.4, 0.6))))
        answer = min(sizes.longest_answer, max(4, round(draw.lognormvariate(4.3, 0.8))))
        if long_every and i % long_every == long_every - 1:
            prompt = sizes.long_prompt
        tokens = random_tokens(draw, prompt, vocab or sizes.vocab)
        choice = replace(sampling, max_new_tokens=answer, seed=i)
        made.append(Request(tokens, choice, StopRule()))
    return made


def random_tokens(draw: random.Random, count: int, vocab: int) -> list[int]:
    return [draw.randrange(vocab) for _ in range(count)]


def make_engine(
    model: QWenLMHeadModel, slots: int, prefill_tokens: int, tokens: int, beside: int | None = None
) -> DecodingEngine:
    """An engine with room for so many tokens in each slot; `beside` as in EngineLimits."""
    shape = kv_shape(model.config, model.dtype, model.device)
    store = ContiguousStore(shape, slots * (tokens // PAGE_TOKENS + 2), PAGE_TOKENS)
    limits = EngineLimits(slots, prefill_tokens, tokens, beside)
    alpha_of = functools.partial(alpha_of_prompt, model.config)
    no_text = Vocabulary(model.config.vocab_size, lambda _: "", lambda _: b"")
    return DecodingEngine(packed(model), store, no_text, limits, alpha_of)


def run(engine: DecodingEngine, requests: Iterable[Request]) -> Answers:
    found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    with torch.inference_mode():
        while engine.is_busy:
            for update in engine.step():
                assert update.token is not None and update.error is None
                found[update.id].append(update.token)
    return list(found.values())


def ours(
    model: QWenLMHeadModel,
    requests: Sequence[Request],
    slots: int,
    clock: Clock,
    prefill_tokens: int = 256,
) -> tuple[Answers, float]:
    """Our engine's answers, and its seconds."""
    most = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
    engine = make_engine(model, slots, prefill_tokens, most)
    began = clock()
    return run(engine, requests), clock() - began


PEERS: dict[str, Contender] = {"static": static_batches, "continuous": continuous_batching}


class Benchmark:
    """All parts; each returns the figures of every round by name."""

    def __init__(
        self,
        sizes: Sizes,
        rounds: int,
        prefill_tokens: Sequence[int] = (16, 64, 256),
        clock: Clock = time.perf_counter,
    ) -> None:
        """
        Args:
            prefill_tokens: the engine's limits that `gap` tries.
        """
        self.sizes, self.rounds, self.prefill_tokens = sizes, rounds, prefill_tokens
        self.clock = clock

    def seconds_of(self, work: Callable[[], object]) -> float:
        began = self.clock()
        work()
        return self.clock() - began

    def greedy(self) -> list[Figures]:
        return self.compare(self.sizes.model(), make_requests(self.sizes, GREEDY))

    def sampling(self) -> list[Figures]:
        vocab = self.sizes.large_vocab
        requests = make_requests(self.sizes, SAMPLED, vocab=vocab)
        model = self.sizes.model(vocab=vocab)
        with torch.no_grad():
            model.lm_head.weight *= CERTAINTY
        return self.compare(model, requests)

    def mixed(self) -> list[Figures]:
        return self.compare(self.sizes.model(), make_requests(self.sizes, GREEDY, long_every=8))

    def single(self) -> list[Figures]:
        requests = make_requests(self.sizes, GREEDY)[: self.sizes.single_requests]
        return self.compare(self.sizes.model(), requests, slots=1, peers=("static",))

    def compare(
        self,
        model: QWenLMHeadModel,
        requests: Sequence[Request],
        slots: int | None = None,
        peers: Sequence[str] = tuple(PEERS),
    ) -> list[Figures]:
        """Tokens per second of each contender."""
        slots = slots or self.sizes.slots
        served = copy.deepcopy(model)  # as serve's engine loads it; the peers have plain layers
        prepack(served)

        def mine(_: QWenLMHeadModel, *more: Any) -> tuple[Answers, float]:
            return ours(served, *more, self.sizes.prefill_tokens)

        contenders: dict[str, Contender] = {"ours": mine, **{peer: PEERS[peer] for peer in peers}}
        counts = [request.sampling.max_new_tokens for request in requests]
        short = [replace(r, sampling=replace(r.sampling, max_new_tokens=3)) for r in requests[:2]]
        for contender in contenders.values():
            contender(model, short, slots, self.clock)  # warms up
        rounds = []
        for number in range(self.rounds):
            figures: Figures = {}
            for name, contender in contenders.items():
                answers, seconds = contender(model, requests, slots, self.clock)
                figures[name] = sum(counts) / seconds
                assert [len(answer) for answer in answers] == counts
                print(f"  round {number + 1}, {name}: {figures[name]:.1f} tokens/s", flush=True)
            rounds.append(figures)
        return rounds

    def prefix(self) -> list[Figures]:
        """Seconds to the first token of a new prompt, and of one that begins as it does."""
        model, sizes = self.sizes.model(), self.sizes
        draw, rounds = random.Random(2), []
        for _ in range(self.rounds):
            engine = make_engine(model, 2, sizes.prefill_tokens, 2 * sizes.prefix)
            begin = random_tokens(draw, sizes.prefix, sizes.vocab)
            seconds = []
            for _ in range(2):
                prompt = begin + random_tokens(draw, 16, sizes.vocab)
                request = Request(prompt, replace(GREEDY, max_new_tokens=1), StopRule())
                seconds.append(self.seconds_of(functools.partial(run, engine, [request])))
            assert engine.figures.cached_tokens == sizes.prefix // PAGE_TOKENS * PAGE_TOKENS
            rounds.append({"new": seconds[0], "known": seconds[1]})
        return rounds

    def gap(self) -> list[Figures]:
        model = self.sizes.model(seq_length=self.sizes.gap_seq_length)
        rounds = []
        for _ in range(self.rounds):
            figures: Figures = {}
            settings = [(f"{count}", count, None) for count in self.prefill_tokens]
            for setting, count, beside in [("served", 256, PREFILL_BESIDE), *settings]:
                found = self._gap(model, count, beside)
                figures |= {f"{name}, {setting}": value for name, value in found.items()}
            rounds.append(figures)
        return rounds

    def _gap(self, model: QWenLMHeadModel, prefill_tokens: int, beside: int | None) -> Figures:
        """The waits of running streams for a token: the median one before a long prompt comes, the
        median and longest ones meanwhile; and that prompt's time to its first token."""
        sizes, draw = self.sizes, random.Random(3)
        engine = make_engine(model, sizes.streams + 1, prefill_tokens, 2 * sizes.gap_prompt, beside)
        stream = SamplingParams(max_new_tokens=sizes.gap_prompt)
        for _ in range(sizes.streams):
            engine.submit(Request(random_tokens(draw, 32, sizes.vocab), stream, StopRule()))
        with torch.inference_mode():
            while len(engine.step()) < sizes.streams:
                pass
            before = [self.seconds_of(engine.step) for _ in range(sizes.steps_before)]
            prompt = random_tokens(draw, sizes.gap_prompt, sizes.vocab)
            number = engine.submit(Request(prompt, replace(GREEDY, max_new_tokens=1), StopRule()))
            meanwhile: list[float] = []
            is_first = False
            while not is_first:
                began = self.clock()
                updates = engine.step()
                meanwhile.append(self.clock() - began)
                assert len(updates) >= sizes.streams  # every stream, at every step
                is_first = number in [update.id for update in updates]
        return {
            "before": median(before),
            "meanwhile": median(meanwhile),
            "longest": max(meanwhile),
            "prompt": sum(meanwhile),
        }


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("greedy", "sampling", "mixed", "single", "prefix", "gap")


def profile(sizes: Sizes, slots: int, clock: Clock = time.perf_counter, steps: int = 30) -> str:
    """Where the time of decoding steps with so many rows goes, by cProfile."""
    engine = make_engine(sizes.model(), slots, 100_000, 1000)
    for request in make_requests(replace(sizes, requests=slots), GREEDY):
        choice = replace(request.sampling, max_new_tokens=500)
        engine.submit(replace(request, sampling=choice))
    with torch.inference_mode():
        for _ in range(5):  # all prompts in the first
            engine.step()
        with cProfile.Profile(clock) as profiler:
            for _ in range(steps):
                engine.step()
    stats = pstats.Stats(profiler).sort_stats("tottime")
    stats.print_stats(25)
    return f"{slots} rows: {1000 * stats.total_tt / steps:.2f} ms a step"  # type: ignore[attr-defined]


def ratios(part: str, rounds: Sequence[Figures]) -> dict[str, float]:
    """The median over the rounds of each ratio of a part."""
    if part == "prefix":
        return {"known / new": median(one["known"] / one["new"] for one in rounds)}
    if part == "gap":
        counts = [name.partition(", ")[2] for name in rounds[0] if name.startswith("longest")]
        return {
            f"longest / before, {n}": median(
                one[f"longest, {n}"] / one[f"before, {n}"] for one in rounds
            )
            for n in counts
        }
    peers = [name for name in rounds[0] if name != "ours"]
    return {name: median(one["ours"] / one[name] for one in rounds) for name in peers}


def table(found: dict[str, list[Figures]]) -> str:
    """The medians and ratios as Markdown."""
    lines = ["| part | medians | ratio | bar |", "|---|---|---|---|"]
    for part, rounds in found.items():
        unit, factor = ("ms", 1000) if part in MOST else ("tokens/s", 1)
        for name, ratio in ratios(part, rounds).items():
            setting = name.partition(", ")[2]
            figures = ", ".join(
                f"{figure.partition(', ')[0]} {factor * median(one[figure] for one in rounds):,.1f}"
                for figure in rounds[0]
                if figure.partition(", ")[2] == setting
            )
            least, most = BARS.get((part, name)), MOST.get(part)
            bar = f"at most {most}" if most else f"{least} x" if least else ""
            by = name if most else f"faster than {name} by"
            lines.append(f"| {part} | {figures} {unit} | {by} {ratio:.2f} | {bar} |")
    return "\n".join(lines)


def measure(parts: Sequence[str], benchmark: Benchmark) -> dict[str, list[Figures]]:
    """The figures of each part, round by round."""
    works: dict[str, Callable[[], list[Figures]]] = {
        "greedy": benchmark.greedy, "sampling": benchmark.sampling, "mixed": benchmark.mixed,
        "single": benchmark.single, "prefix": benchmark.prefix, "gap": benchmark.gap,
    }  # fmt: skip
    found = {}
    for part in parts:
        found[part] = works[part]()
        load = f"load {os.getloadavg()[0]:.1f}"
        print(f"{part} ({load}): {json.dumps(found[part])}", flush=True)
    return found


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=words, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("requests", "slots", "longest_answer", "layers"):
        parser.add_argument(f"--{name}", type=int, default=asdict(sizes)[name])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--prefill_tokens", type=words, default=["16", "64", "256"], help="of gap")
    parser.add_argument("--profile", action="store_true", help="a step of 32 rows and of one")
    parser.add_argument("--json", type=Path, help="file for the figures of every round")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; known {', '.join(PARTS)}")
    torch.set_num_threads(1)
    sizes = Sizes(
        requests=options.requests, slots=options.slots, layers=options.layers,
        longest_answer=options.longest_answer,
    )  # fmt: skip
    counts = [int(count) for count in options.prefill_tokens]
    clock = CLOCKS[options.clock]
    found = measure(options.parts, Benchmark(sizes, options.rounds, counts, clock))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if found:
        print(table(found))
    for slots in (sizes.slots, 1) if options.profile else ():
        print(profile(sizes, slots, clock))


if __name__ == "__main__":
    main()
