"""One pass over all rows: each gets what it gets alone, by formulas and transformers' processors.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qwen_ds.decode import sampler as sampler_module
from qwen_ds.decode.exceptions import InvalidSampling, LogitsNotFinite, NoTokenLeft
from qwen_ds.decode.grammar import GrammarCompiler
from qwen_ds.decode.sampler import (
    RowSampler,
    Sampled,
    change,
    prepare,
    prompt_logprobs,
    sample,
)
from qwen_ds.decode.sampling import SamplingParams, draw, only_tokens, sampling_groups

CPU = torch.device("cpu")
TOKENS, HEAD, STOPS = 3000, 3072, (2998, 2999)


def row(*prompt: int, **params: Any) -> RowSampler:
    return RowSampler(SamplingParams(**params), prompt or (1, 2, 3), TOKENS, STOPS)


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, HEAD, generator=torch.Generator().manual_seed(seed)) * spread


def tokens_of(found: Sequence[Sampled]) -> list[int]:
    assert all(one.error is None for one in found)
    return [one.token for one in found]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A vocabulary of all bytes, then of pairs of letters, and two stops at its end."""
    letters = [bytes([a, b]) for a in range(97, 123) for b in range(33, 127)]
    spelled = [bytes([i]) for i in range(256)] + letters
    spelled += [b"<|extra_%d|>" % i for i in range(TOKENS - len(spelled))]
    return GrammarCompiler(spelled.__getitem__, TOKENS, STOPS)


MIXED: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 0, "seed": 1},
    {"do_sample": True, "top_k": 50, "temperature": 1.5, "seed": 2},
    {"repetition_penalty": 1.7},
    {"do_sample": True, "top_k": 0, "top_p": 1.0, "seed": 3, "presence_penalty": 1.5},
    {"frequency_penalty": 2.0, "logit_bias": ((7, 9.0), (8, -100.0)), "logprobs": 3},
    {"do_sample": True, "min_p": 0.2, "top_k": 0, "top_p": 1.0, "logprobs": 20, "seed": 4},
    {"min_tokens": 5, "logit_bias": ((STOPS[0], 100.0),)},
    {"do_sample": True, "seed": 5, "min_tokens": 3, "repetition_penalty": 0.8, "logprobs": 0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_mixed_batch_gets_what_it_gets_alone(
    compiler: GrammarCompiler, dtype: torch.dtype
) -> None:
    """Rows come and go; whoever else is there, and in which order, plays no part."""
    grammar = compiler.json_object()

    def rows() -> list[RowSampler]:
        held = [
            RowSampler(SamplingParams(sampled, 1.0, 1.0, 0, seed=9), (1,), TOKENS, STOPS, grammar)
            for sampled in (False, True)
        ]
        return [row(**params) for params in MIXED] + held

    together, alone = rows(), rows()
    found: list[list[Sampled]] = [[] for _ in together]
    expected: list[list[Sampled]] = [[] for _ in together]
    for step in range(8):
        # The rows are at different steps of their own; every third one rests.
        active = [i for i in range(len(together)) if (i + step) % 3 or step == 0]
        active = active[step:] + active[:step]
        logits_RV = random_logits(len(together), step, 1.0 + step % 3).to(dtype)
        kept_RV = logits_RV.clone()
        answers = sample(logits_RV[active], [together[i] for i in active])
        for i, one in zip(active, answers, strict=True):
            found[i].append(one)
        for i in active:
            expected[i] += sample(logits_RV[i : i + 1], [alone[i]])
        assert torch.equal(logits_RV, kept_RV)
    assert found == expected
    for state, answers in zip(together, found, strict=True):
        assert state.tokens == tokens_of(answers)
        assert max(state.tokens) < TOKENS


def test_a_device_apart_gets_the_tokens_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, compiler: GrammarCompiler
) -> None:
    """There, a row whose number may draw any token of the vocabulary is tried twice."""
    grammar, tries = compiler.json_object(), list[bool]()
    read = sampler_module._read

    def spying(*args: Any, may_wait: bool) -> Any:
        tries.append(may_wait)
        return read(*args, may_wait=may_wait)

    monkeypatch.setattr(sampler_module, "_read", spying)

    def tokens(is_apart: bool) -> list[list[Sampled]]:
        monkeypatch.setattr(sampler_module, "is_apart", lambda _: is_apart)
        params = SamplingParams(True, 1.0, 1.0, 0, seed=9)
        rows = [row(**params) for params in MIXED]
        rows.append(RowSampler(params, (1,), TOKENS, STOPS, grammar))
        # Nearly flat ones are among them: 1,024 tokens have a third of the probability.
        spreads = [3.0, 0.05, 1.0]
        return [sample(random_logits(len(rows), i, spreads[i % 3]), rows) for i in range(12)]

    expected = tokens(False)
    assert tries == [True] * 12
    tries.clear()
    assert tokens(True) == expected
    assert tries.count(False) == 12 and 0 < tries.count(True) < 12


def test_plain_sampling_draws_the_tokens_of_draw() -> None:
    """Number i of a row's stream is that of its i-th token, in whatever steps it is decoded."""
    params = [
        SamplingParams(True, 0.8, 0.9, 0, 100, seed=1),
        SamplingParams(True, 1.2, 1.0, 40, 100, seed=2),
        SamplingParams(),
    ]
    rows = [RowSampler(one, (1,), TOKENS, STOPS) for one in params]
    streams = [torch.rand(100, generator=torch.Generator().manual_seed(p.seed)) for p in params]
    uniform_RS = torch.stack(streams)  # the greedy row draws by none
    for step in range(100):
        logits_RV = random_logits(3, step).bfloat16()
        expected = draw(
            only_tokens(logits_RV, TOKENS), sampling_groups(params, CPU), uniform_RS[:, step]
        )
        assert tokens_of(sample(logits_RV, rows)) == expected.tolist()


def test_random_numbers_are_a_rows_own() -> None:
    def numbers(params: SamplingParams) -> list[float]:
        state, found = RowSampler(params, (1,), TOKENS, STOPS), []
        for _ in range(params.max_new_tokens):
            found.append(state.uniform())
            state.accept(5)
        return found

    short, long = (SamplingParams(do_sample=True, max_new_tokens=n, seed=7) for n in (3, 200))
    expected = numbers(long)
    torch.manual_seed(99)
    assert numbers(long) == expected and len(set(expected)) > 190
    assert numbers(short) == expected[:3]  # the same seed, however long the row
    assert numbers(long.of_row(1)) != numbers(long.of_row(2))
    assert numbers(SamplingParams(max_new_tokens=5)) == [0.0] * 5


def test_counts_of_drawn_tokens_are_those_of_a_full_sort() -> None:
    """A chi-square statistic over 20,000 draws stays within 5 deviations of its mean."""
    logits_V = random_logits(1, 4, 1.5)
    params = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": 0}
    sorted_V, ids_V = (logits_V[0, :TOKENS] / 0.8).softmax(-1).sort(descending=True)
    kept = int((sorted_V.cumsum(-1) - sorted_V < 0.8).sum())
    probs = sorted_V[:kept] / sorted_V[:kept].sum()
    expected = dict(zip(ids_V[:kept].tolist(), probs.tolist(), strict=True))
    n, counts = 20_000, Counter[int]()
    for start in range(0, n, 500):
        rows = [row(**params, seed=start + i) for i in range(500)]
        counts.update(tokens_of(sample(logits_V.expand(500, -1), rows)))
    assert set(counts) <= set(expected)
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    assert abs(chi_square - (kept - 1)) < 5 * (2 * (kept - 1)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_first_of_equal_logits_as_argmax_in_fp32_does(dtype: torch.dtype) -> None:
    for seed in range(20):
        # Few different values, so that almost every row has its largest more than once.
        logits_RV = random_logits(16, seed).mul(0.4).round().to(dtype)
        logits_RV[:, TOKENS:] = 100.0
        expected = only_tokens(logits_RV, TOKENS).argmax(-1).tolist()
        assert tokens_of(sample(logits_RV, [row() for _ in range(16)])) == expected
        largest = logits_RV[:, :TOKENS].float()
        assert ((largest == largest.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() > 0.5
        for i, token in enumerate(expected):
            same = (logits_RV[i, :TOKENS] == logits_RV[i, token]).nonzero()
            assert token == same[0].item()


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_is_penalised_in_prompt_and_answer_as_in_transformers(penalty: float) -> None:
    prompt, answer = [5, 9, 9, 2990], []
    state = row(*prompt, repetition_penalty=penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for step in range(30):
        logits_RV = random_logits(1, step)
        logits_RV[:, TOKENS:] = -torch.inf
        changed_V = logits_RV[0].clone()
        change(changed_V[None], [state])
        expected_RV = processor(torch.tensor([prompt + answer]), logits_RV)
        assert torch.equal(changed_V, expected_RV[0])
        (one,) = sample(logits_RV, [state])
        assert one.token == expected_RV.argmax().item()
        answer.append(one.token)


def test_presence_and_frequency_are_penalised_in_the_answer_alone() -> None:
    state = row(4, 4, 4, presence_penalty=1.5, frequency_penalty=0.25)
    for token in (8, 8, 8, 11):
        state.accept(token)
    logits_V = torch.zeros(HEAD)
    change(logits_V[None], [state])
    assert logits_V.nonzero()[:, 0].tolist() == [8, 11]
    assert logits_V[8].item() == -(3 * 0.25 + 1.5) and logits_V[11].item() == -(0.25 + 1.5)


def test_bias_comes_before_penalties_and_bans_beat_every_bias() -> None:
    state = row(7, logit_bias=((7, 3.0), (STOPS[0], 100.0)), repetition_penalty=2.0, min_tokens=2)
    logits_V = torch.full((HEAD,), 1.0)
    change(logits_V[None], [state])
    assert logits_V[7].item() == (1.0 + 3.0) / 2.0
    assert logits_V[list(STOPS)].tolist() == [-torch.inf] * 2


def test_min_tokens_holds_stops_back_and_not_longer() -> None:
    biased = {"logit_bias": ((STOPS[0], 50.0), (STOPS[1], 60.0))}
    states = [row(**biased, min_tokens=n) for n in (0, 1, 4)]
    for step in range(6):
        found = tokens_of(sample(random_logits(3, step), states))
        assert [token in STOPS for token in found] == [step >= n for n in (0, 1, 4)]


def test_a_stop_that_is_no_token_bans_none() -> None:
    state = RowSampler(SamplingParams(min_tokens=1), (1,), TOKENS, (-5, TOKENS + 5))
    logits_V = torch.zeros(HEAD)
    change(logits_V[None], [state])
    assert not logits_V.any()


def test_ignore_eos_bans_nothing() -> None:
    state = row(ignore_eos=True, logit_bias=((STOPS[1], 60.0),))
    assert tokens_of(sample(random_logits(1), [state])) == [STOPS[1]]


def test_logprobs_are_the_models_own_whatever_the_parameters() -> None:
    logits_RV = random_logits(3).bfloat16()
    wish = {"temperature": 0.1, "logit_bias": ((17, 100.0),), "repetition_penalty": 2.0}
    states = [row(logprobs=4, **wish), row(), row(logprobs=0, do_sample=True, seed=3, top_k=0)]
    biased, silent, drawn = sample(logits_RV, states)
    expected_RV = logits_RV.float().log_softmax(-1)
    assert biased.token == 17 and silent.logprobs is None
    assert biased.logprobs is not None and drawn.logprobs is not None
    assert biased.logprobs.token == 17
    assert biased.logprobs.logprob == pytest.approx(expected_RV[0, 17].item(), abs=1e-5)
    assert biased.logprobs.rank == 1 + (logits_RV[0, :TOKENS] > logits_RV[0, 17]).sum()
    order = sorted(range(TOKENS), key=lambda i: -expected_RV[0, i].item())[:4]
    assert [value for _, value in biased.logprobs.top] == pytest.approx(
        [expected_RV[0, i].item() for i in order], abs=1e-5
    )
    assert drawn.logprobs.top == ()
    assert drawn.logprobs.logprob == pytest.approx(expected_RV[2, drawn.token].item(), abs=1e-5)


def test_which_of_equal_alternatives_are_reported_depends_on_no_other_row() -> None:
    logits_RV = random_logits(2).mul(0.3).round()
    for few in (1, 2, 3):
        together = sample(logits_RV, [row(logprobs=few), row(logprobs=20)])
        assert together[:1] == sample(logits_RV[:1], [row(logprobs=few)])


def test_logprobs_of_a_prompt_are_those_of_its_next_tokens() -> None:
    logits_TV = random_logits(150)
    logits_TV[:, TOKENS:] = 9.0  # the head's padding: part of the softmax, never an alternative
    ids = [(i * 31) % TOKENS for i in range(150)]
    found = prompt_logprobs(logits_TV, ids, 2, TOKENS)
    expected_TV = logits_TV.log_softmax(-1)
    top = expected_TV[:, :TOKENS].topk(2)
    assert [one.token for one in found] == ids
    for t, one in enumerate(found):
        assert one.logprob == pytest.approx(expected_TV[t, ids[t]].item(), abs=1e-5)
        assert one.rank == 1 + (logits_TV[t, :TOKENS] > logits_TV[t, ids[t]]).sum()
        assert [i for i, _ in one.top] == top.indices[t].tolist()
        assert [p for _, p in one.top] == pytest.approx(top.values[t].tolist(), abs=1e-5)
    assert prompt_logprobs(logits_TV, [], 2) == []
    for broken in (torch.nan, torch.inf):
        logits_TV[3, 4] = broken
        with pytest.raises(LogitsNotFinite):
            prompt_logprobs(logits_TV, ids, 2, TOKENS)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, "all -inf"])
def test_a_row_with_logits_that_are_not_finite_fails_alone(broken: float | str) -> None:
    logits_RV = random_logits(len(MIXED))
    healthy = sample(logits_RV, [row(**params) for params in MIXED])
    for poisoned in range(len(MIXED)):
        bad_RV = logits_RV.clone()
        if isinstance(broken, str):
            bad_RV[poisoned] = -torch.inf
        else:
            bad_RV[poisoned, 40] = broken
        states = [row(**params) for params in MIXED]
        found = sample(bad_RV, states)
        assert isinstance(found[poisoned].error, LogitsNotFinite)
        assert found[poisoned].token == -1 and states[poisoned].tokens == []
        found[poisoned] = healthy[poisoned]
        assert found == healthy
        # Its state is as before: with good logits it goes on with the same token.
        assert sample(logits_RV[poisoned : poisoned + 1], [states[poisoned]]) == [healthy[poisoned]]


def test_garbage_in_the_heads_padding_harms_nobody() -> None:
    logits_RV = random_logits(2)
    logits_RV[:, TOKENS:] = torch.nan
    states = [row(), row(do_sample=True, top_k=0)]
    assert max(tokens_of(sample(logits_RV, states))) < TOKENS
    # But log-probabilities are over the padding, too.
    plain, asked = sample(logits_RV, [row(), row(logprobs=0)])
    assert plain.error is None and isinstance(asked.error, LogitsNotFinite)


def test_ids_beyond_the_vocabulary_cannot_be_biased() -> None:
    with pytest.raises(InvalidSampling, match="token ids below 3000"):
        row(logit_bias=((TOKENS, 1.0),))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_held_to_a_grammar_gives_what_the_grammar_allows(
    compiler: GrammarCompiler, sampled: bool
) -> None:
    wanted = compiler.choice(["ab!", "裙子", "x"])
    params = SamplingParams(sampled, 1.0, 1.0, 0, min_tokens=9)
    given = set()
    for seed in range(30):
        state = RowSampler(params.of_row(seed), (1,), TOKENS, STOPS, wanted)
        free = row(do_sample=sampled, seed=seed)
        while not state.tokens or state.tokens[-1] not in STOPS:
            prepare([state, free])
            tokens_of(sample(random_logits(2, 100 * seed + len(state.tokens)), [state, free]))
        # Nothing may follow a choice, so it ends there, whatever min_tokens says.
        given.add(b"".join(compiler_bytes(i) for i in state.tokens[:-1]).decode())
    assert given == {"ab!", "裙子", "x"}


def compiler_bytes(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    first, second = divmod(token - 256, 94)
    return bytes([97 + first, 33 + second])


def test_a_row_to_which_the_grammar_leaves_nothing_fails_alone(compiler: GrammarCompiler) -> None:
    logits_RV = random_logits(3)
    logits_RV[:, ord("x")] = -torch.inf  # such a model can never say it
    wanted = compiler.choice(["x"])
    for sampled in (False, True):
        held = RowSampler(SamplingParams(sampled), (1,), TOKENS, STOPS, wanted)
        found = sample(logits_RV, [row(), held, row(do_sample=True)])
        assert isinstance(found[1].error, NoTokenLeft) and held.tokens == []
        assert found[0].error is None and found[2].error is None


def test_no_rows_are_no_work() -> None:
    assert sample(torch.zeros(0, HEAD), []) == []
