"""The decoding engine: every request gets the tokens that transformers' generate gives it alone,
whoever else comes, goes, or needs the room."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import qwen_ds
from qwen_ds.decode import engine as engine_module
from qwen_ds.decode import sampler as sampler_module
from qwen_ds.decode.batch import GrowingAnswer
from qwen_ds.decode.engine import DecodingEngine, PackedStep, packed
from qwen_ds.decode.exceptions import (
    EmptyPrompt,
    InvalidToken,
    KVBudgetTooSmall,
    LogitsNotFinite,
    PromptTooLong,
    RowOutOfMemory,
)
from qwen_ds.decode.grammar import GrammarCompiler
from qwen_ds.decode.kv import KVStore
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.request import Request, Update, Vocabulary
from qwen_ds.decode.sampler import RowSampler, Sampled
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.packing import alpha_of_prompt, kv_shape

VOCABULARY, SEQ_LENGTH, NEW = 500, 64, 16
WORDS = Vocabulary(VOCABULARY, lambda ids: "".join(map(chr, ids)), lambda i: chr(i).encode())
GAP = 1e-3  # between the two best logits, wherever an expected token was chosen
CPU = torch.device("cpu")
LIMITS = EngineLimits(8, 40, 1000)
STORES = [ContiguousStore, PagedStore]
MakeStore = Callable[..., KVStore]


@pytest.fixture(scope="module")
def model() -> qwen_ds.QWenLMHeadModel:
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        kv_channels=16, intermediate_size=128, seq_length=SEQ_LENGTH, initializer_range=0.3,
        use_dynamic_ntk=True, use_logn_attn=True,
    )  # fmt: skip
    return qwen_ds.QWenLMHeadModel(config).eval()


@pytest.fixture(scope="module")
def cases(model) -> list[tuple[list[int], list[int]]]:
    """64 prompts of many lengths, below and beyond seq_length, some of which begin alike; and the
    greedy tokens of transformers' generate for each alone, none of them nearly a tie."""
    rng = random.Random(1)
    lens = [1, 3, 20, 32, 33, 60, 90, 130, 192]
    found: list[tuple[list[int], list[int]]] = []
    while len(found) < 64:
        prompt = [rng.randrange(490) for _ in range(rng.choice(lens))]
        if len(found) % 4 == 3:
            begin = rng.choice(found)[0]
            prompt = begin[: max(1, len(begin) - 9)] + prompt[:2]
        tokens, gap = greedy(model, prompt)
        if gap >= GAP:
            found.append((prompt, tokens))
    return found


@pytest.fixture(scope="module")
def prompts(cases) -> list[list[int]]:
    return [prompt for prompt, _ in cases]


@pytest.fixture(scope="module")
def expected(cases) -> list[list[int]]:
    return [tokens for _, tokens in cases]


def alone(model: qwen_ds.QWenLMHeadModel, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens of transformers' generate for one prompt, which must not be nearly a tie."""
    tokens, gap = greedy(model, prompt)
    assert gap >= GAP
    return tokens


def greedy(model: qwen_ds.QWenLMHeadModel, prompt: Sequence[int]) -> tuple[list[int], float]:
    """The tokens of generate, and the least distance between the two best logits."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
        eos_token_id=VOCABULARY - 1, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    best_S2 = torch.cat(out.logits).topk(2).values
    gap = float((best_S2[:, 0] - best_S2[:, 1]).min())
    return out.sequences[0, len(prompt) :].tolist(), gap


def make_engine(
    model: qwen_ds.QWenLMHeadModel,
    store: MakeStore = ContiguousStore,
    pages: int = 500,
    limits: EngineLimits = LIMITS,
    page_size: int = 8,
) -> DecodingEngine:
    shape = kv_shape(model.config, torch.float32, CPU)
    alpha_of = partial(alpha_of_prompt, model.config)
    kv = store(shape, pages, page_size)
    if isinstance(kv, PagedStore):
        kv._pool.fill_(torch.nan)  # as memory that was another program's may be
    return DecodingEngine(packed(model), kv, WORDS, limits, alpha_of)


def request(prompt: Sequence[int], new: int = NEW, stop: Iterable[int] = ()) -> Request:
    ids = (VOCABULARY - 1, *stop)
    return Request(prompt, SamplingParams(max_new_tokens=new), StopRule(ids))


def run(engine: DecodingEngine, found: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    """Step until all is done: the tokens of each request."""
    found = defaultdict(list) if found is None else found
    while engine.is_busy:
        for update in engine.step():
            assert update.error is None and update.token is not None
            found[update.id].append(update.token)
    return found


def answers(engine: DecodingEngine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    ids = [engine.submit(request(prompt)) for prompt in prompts]
    found = run(engine)
    return [found[number] for number in ids]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("prefill_tokens", [7, 1000])
def test_requests_together_get_the_tokens_that_each_gets_alone(
    model, prompts, expected, store: MakeStore, prefill_tokens: int
) -> None:
    engine = make_engine(model, store, limits=EngineLimits(16, prefill_tokens, 1000))
    assert answers(engine, prompts) == expected
    assert engine.figures.largest_batch >= (16 if prefill_tokens == 1000 else 4)
    assert engine.figures.cached_tokens > 0


@pytest.mark.parametrize("store", STORES)
def test_requests_that_lose_their_pages_go_on_with_the_same_tokens(
    model, prompts, expected, store: MakeStore
) -> None:
    engine = make_engine(model, store, pages=60)
    assert answers(engine, prompts) == expected
    assert engine.figures.put_back > 3
    assert engine.store.available_pages == 60


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("seed", range(5))
def test_late_arrivals_and_cancellations_change_no_answer(
    model, prompts, expected, store: MakeStore, seed: int
) -> None:
    """At random: arrivals, cancellations, a room that is sometimes too small, pieces of prompts."""
    rng = random.Random(seed)
    engine = make_engine(
        model, store, rng.choice([60, 90, 500]),
        EngineLimits(rng.choice([3, 8]), rng.choice([5, 40]), 1000), rng.choice([4, 8, 16]),
    )  # fmt: skip
    order = rng.sample(range(len(prompts)), 40)
    found: dict[int, list[int]] = defaultdict(list)
    index: dict[int, int] = {}
    cancelled: set[int] = set()
    while order or engine.is_busy:
        if order and rng.random() < 0.4:
            i = order.pop()
            index[engine.submit(request(prompts[i]))] = i
        if index and rng.random() < 0.03:
            number = rng.choice(list(index))
            if engine.cancel(number):
                cancelled.add(number)
        for update in engine.step():
            assert update.id not in cancelled
            found[update.id].append(update.token)
    assert cancelled
    for number, i in index.items():
        if number not in cancelled:
            assert found[number] == expected[i]
        else:
            assert found[number] == expected[i][: len(found[number])]
    assert engine.store.available_pages == engine.store.num_pages


@pytest.mark.parametrize("store", STORES)
def test_rows_far_beyond_seq_length_decode_beside_short_ones(model, store: MakeStore) -> None:
    rng = random.Random(4)
    rows = [[rng.randrange(490) for _ in range(int(times * SEQ_LENGTH))] for times in (0.5, 1.5, 3)]
    assert answers(make_engine(model, store), rows) == [alone(model, row) for row in rows]


@pytest.mark.parametrize("store", STORES)
def test_rows_of_another_alpha_share_nothing(model, store: MakeStore) -> None:
    """K is rotated by alpha: the same first tokens of a longer prompt have other keys."""
    rng = random.Random(5)
    short = [rng.randrange(490) for _ in range(SEQ_LENGTH)]
    long = short + [rng.randrange(490) for _ in range(SEQ_LENGTH)]
    engine = make_engine(model, store)
    assert answers(engine, [short]) == [alone(model, short)]
    assert answers(engine, [long]) == [alone(model, long)]
    assert engine.figures.cached_tokens == 0


@pytest.mark.parametrize("store", STORES)
def test_a_known_prefix_is_not_computed_again(model, store: MakeStore) -> None:
    config = replace_config(model, seq_length=2048)
    rng = random.Random(6)
    prefix = [rng.randrange(490) for _ in range(1024)]
    engine = make_engine(config, store, limits=EngineLimits(8, 256, 2000))
    first, second = prefix + [3, 4, 5], prefix + [9, 8]
    assert answers(engine, [first]) == [alone(config, first)]
    before = engine.figures.prefilled_tokens
    assert answers(engine, [second]) == [alone(config, second)]
    assert engine.figures.prefilled_tokens - before <= 8
    # The next turn of a conversation begins with the last one's answer.
    third = first + alone(config, first) + [11, 12]
    before = engine.figures.prefilled_tokens
    assert answers(engine, [third]) == [alone(config, third)]
    assert engine.figures.prefilled_tokens - before <= 8 + 2


def replace_config(model: qwen_ds.QWenLMHeadModel, **changes: int) -> qwen_ds.QWenLMHeadModel:
    """The same weights under another configuration."""
    other = qwen_ds.QWenLMHeadModel(QWenConfig(**{**model.config.to_dict(), **changes})).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("store", STORES)
def test_a_budget_of_tokens_holds_what_fits_and_makes_the_rest_wait(
    model, store: MakeStore
) -> None:
    engine = make_engine(model, store, 8192 // 16, EngineLimits(64, 8192, 9000), 16)
    model_calls: list[int] = []
    inner = engine.model

    def counting(step: PackedStep) -> torch.Tensor:
        model_calls.append(len(engine.scheduler.running))
        used = engine.store.num_pages - engine.store.available_pages
        assert used * 16 <= 8192
        return inner(step)

    engine.model = counting
    for i in range(15):
        engine.submit(request([i + 1] * 492, new=8))
    engine.step()
    big = engine.submit(request([7] * 7990, new=8))
    engine.step()
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (15, 1)
    found = run(engine)
    assert len(found[big]) == 8 and len(found) == 16
    assert max(model_calls) == 15 and engine.figures.put_back == 0


def test_a_long_prompt_holds_up_nobody(model) -> None:
    limits = EngineLimits(16, 40, 5000)
    engine = make_engine(replace_config(model, seq_length=8192), pages=1000, limits=limits)
    endless = replace(request([1, 2], new=200), stop=StopRule())
    streams = [engine.submit(replace(endless, prompt=[i + 1, 2])) for i in range(7)]
    engine.step()
    long = engine.submit(request([5] * 4000, new=2))
    engine.step()
    short = engine.submit(request([6, 7, 8], new=2))
    first: dict[int, int] = {}
    for step in range(1, 150):
        before = engine.figures.prefilled_tokens
        updates = engine.step()
        assert engine.figures.prefilled_tokens - before <= 40
        # Every stream gets a token at every step.
        assert {update.id for update in updates} >= set(streams)
        for update in updates:
            first.setdefault(update.id, step)
    assert first[short] <= 3
    # Half of the room at least, at each step.
    assert first[long] <= 4000 / 20 + 1


def test_pieces_beside_rows_that_decode_are_smaller_the_more_came_before(model) -> None:
    limits = EngineLimits(8, 100, 5000, prefill_beside=48)
    engine = make_engine(replace_config(model, seq_length=8192), pages=1000, limits=limits)
    sizes: list[int] = []
    inner = engine.model

    def counting(step: PackedStep) -> torch.Tensor:
        sizes.append(step.ids_1N.shape[1])
        return inner(step)

    engine.model = counting
    engine.submit(replace(request([1, 2, 3], new=90), stop=StopRule()))
    engine.step()
    long = engine.submit(request([5] * 900, new=2))
    found: list[int] = []
    while not found:
        found += [update.id for update in engine.step() if update.id == long]
    pieces = [size - 1 for size in sizes[1:]]
    assert pieces[0] == 48 and 12 <= min(pieces) < 30
    assert pieces[:-1] == sorted(pieces[:-1], reverse=True)
    # Alone it has all the room there is.
    sizes.clear()
    engine = make_engine(replace_config(model, seq_length=8192), pages=1000, limits=limits)
    inner, engine.model = engine.model, counting
    engine.submit(request([5] * 900, new=1))
    run(engine)
    assert sizes == [100] * 9


def test_one_poisoned_request_fails_alone(model, prompts, expected) -> None:
    broken = replace_config(model)
    poison = min(set(range(VOCABULARY)) - {i for row in prompts + expected for i in row})
    broken.transformer.wte.weight.data[poison] = torch.nan
    for store in STORES:
        engine = make_engine(broken, store, 120)
        ids = [engine.submit(request(prompt)) for prompt in prompts[:16]]
        bad = engine.submit(request([*prompts[0], poison, 3]))
        ids += [engine.submit(request(prompt)) for prompt in prompts[16:31]]
        found: dict[int, list[int]] = defaultdict(list)
        errors = {}
        while engine.is_busy:
            for update in engine.step():
                if update.error is not None:
                    errors[update.id] = update.error
                else:
                    found[update.id].append(update.token)
        assert [found[number] for number in ids] == expected[:31]
        assert errors.keys() == {bad} and isinstance(errors[bad], LogitsNotFinite)
        assert engine.store.available_pages == 120


def test_requests_that_can_never_be_answered_are_refused_at_once(model) -> None:
    engine = make_engine(model, pages=10, limits=EngineLimits(8, 40, 100))
    with pytest.raises(PromptTooLong, match="91 tokens; expected at most 84"):
        engine.submit(request([1] * 91))
    with pytest.raises(KVBudgetTooSmall, match="may be 82 tokens; expected at most 80"):
        engine.submit(request([1] * 66))
    for token in (-1, VOCABULARY):
        with pytest.raises(InvalidToken, match=f"token id is {token}; expected 0 to 499"):
            engine.submit(request([1, token]))
    assert not engine.is_busy


def test_a_stop_token_ends_its_row_and_no_other(model, prompts, expected) -> None:
    engine = make_engine(model)
    i = next(i for i, tokens in enumerate(expected) if tokens[3] not in tokens[:3])
    first = engine.submit(request(prompts[i], stop=[expected[i][3]]))
    second = engine.submit(request(prompts[i]))
    reasons = {}
    found: dict[int, list[int]] = defaultdict(list)
    while engine.is_busy:
        for update in engine.step():
            found[update.id].append(update.token)
            reasons[update.id] = update.finish_reason
    assert found[first] == expected[i][:4] and reasons[first] == "stop"
    assert found[second] == expected[i] and reasons[second] in ("stop", "length")


def test_a_step_that_does_not_fit_costs_one_prompt_or_puts_a_row_back(
    model, prompts, expected, monkeypatch
) -> None:
    monkeypatch.setattr(engine_module.torch.cuda, "empty_cache", lambda: None)
    engine = make_engine(model, limits=EngineLimits(4, 400, 1000))
    inner = engine.model

    def tight(step: PackedStep) -> torch.Tensor:
        if step.ids_1N.shape[1] > 300 or len(engine.scheduler.running) > 3:
            raise torch.OutOfMemoryError
        return inner(step)

    engine.model = tight
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < 30][:6]
    ids = [engine.submit(request(prompts[i])) for i in short]
    huge = engine.submit(request([5] * 350))
    found: dict[int, list[int]] = defaultdict(list)
    errors = {}
    for _ in range(400):
        for update in engine.step():
            if update.error is not None:
                errors[update.id] = update.error
            else:
                found[update.id].append(update.token)
    assert not engine.is_busy
    assert isinstance(errors[huge], RowOutOfMemory)
    for number, i in zip(ids, short, strict=True):
        assert number in errors or found[number] == expected[i]
    assert len(errors) < len(ids)


# The sampler is tried with rows of all kinds, and a memory of so many rows at a time.
KINDS: list[dict[str, Any]] = [
    {}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "logprobs": 2},
    {"repetition_penalty": 1.3}, {"logprobs": 3, "prompt_logprobs": 1}, {"min_tokens": 4},
]  # fmt: skip


def all_updates(model, prompts, store: MakeStore, choose=None) -> dict[int, list[Update]]:
    """The updates of twelve rows of all kinds."""
    engine = make_engine(model, store, limits=EngineLimits(16, 400, 1000))
    found: dict[int, list[Update]] = {}
    for i in range(12):
        params = SamplingParams(max_new_tokens=8, seed=i, **KINDS[i % len(KINDS)])
        asked = replace(request(prompts[i]), sampling=params, choose=choose if i == 7 else None)
        found[engine.submit(asked)] = []
    while engine.is_busy:
        for update in engine.step():
            found[update.id].append(update)
    assert engine.store.available_pages == engine.store.num_pages
    return found


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("place", ["only_tokens", "most_probable", "_logprobs"])
def test_a_sampler_that_does_not_fit_takes_fewer_rows_at_a_time(
    model, prompts, monkeypatch, place: str, room: int
) -> None:
    expected_updates = all_updates(model, prompts, ContiguousStore)
    inner, refused = getattr(sampler_module, place), []

    def tight(logits_RV: torch.Tensor, *more: Any) -> Any:
        if len(logits_RV) > room:
            refused.append(len(logits_RV))
            raise torch.OutOfMemoryError
        return inner(logits_RV, *more)

    monkeypatch.setattr(sampler_module, place, tight)
    assert all_updates(model, prompts, ContiguousStore) == expected_updates
    # A piece of a prompt may be longer than the room for rows of any kind.
    assert refused


def test_a_row_that_does_not_fit_the_sampler_fails_alone(model, prompts, monkeypatch) -> None:
    def own(logits_V: torch.Tensor) -> int:
        return int(logits_V.argmax())

    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    expected_updates = all_updates(model, prompts, ContiguousStore, own)
    inner = engine_module.sample

    def tight(logits_RV: torch.Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
        return no_room() if any(row.params.seed == 3 for row in rows) else inner(logits_RV, rows)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "sample", tight)
        found = all_updates(model, prompts, ContiguousStore, own)
    assert failures(found) == {3: RowOutOfMemory}
    assert_alike(found, expected_updates | {3: found[3]})
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "prompt_logprobs", no_room)
        found = all_updates(model, prompts, ContiguousStore, own)
    assert failures(found) == {i: RowOutOfMemory for i in (4, 10) if len(prompts[i]) > 1}
    assert failures(found)
    found = all_updates(model, prompts, ContiguousStore, no_room)
    assert failures(found) == {7: RowOutOfMemory}
    assert_alike(found, expected_updates | {7: found[7]})


def assert_alike(found: dict[int, list[Update]], expected: dict[int, list[Update]]) -> None:
    """All but the last bits of probabilities, which may depend on a batch's other rows."""

    def figures(updates: dict[int, list[Update]]) -> list[Any]:
        told = [update.logprobs for row in updates.values() for update in row if update.logprobs]
        return [(each.logprob, [logprob for _, logprob in each.top]) for each in told]

    def rest(updates: dict[int, list[Update]]) -> dict[int, list[Update]]:
        return {i: [replace(update, logprobs=None) for update in updates[i]] for i in updates}

    assert rest(found) == rest(expected)
    torch.testing.assert_close(figures(found), figures(expected), rtol=1e-4, atol=1e-4)


def failures(found: dict[int, list[Update]]) -> dict[int, type[Exception]]:
    """The kinds of the errors by which rows ended, which have no other update."""
    failed = {number: updates[0].error for number, updates in found.items()}
    kinds = {number: type(error) for number, error in failed.items() if error is not None}
    assert all(len(found[number]) == 1 for number in kinds)
    return kinds


def test_sampled_rows_do_not_depend_on_the_company(model, prompts) -> None:
    params = SamplingParams(True, 1.0, 0.9, 0, NEW)

    def drawn(i: int) -> Request:
        return replace(request(prompts[i]), sampling=params.of_row(i))

    engine = make_engine(model, pages=60)
    ids = [engine.submit(drawn(i)) for i in range(20)]
    together = run(engine)
    assert engine.figures.put_back > 0
    for i, number in enumerate(ids):
        single = make_engine(model)
        single.submit(drawn(i))
        assert run(single) == {0: together[number]}


# A token of WORDS is a character, so texts are easy to follow.
def text_run(engine: DecodingEngine, asked: Request) -> tuple[list[int], list[str], list[Update]]:
    """Tokens, pieces of text, and all updates of one request."""
    number = engine.submit(asked)
    updates = []
    while engine.is_busy:
        updates += [update for update in engine.step() if update.id == number]
    assert all(update.error is None for update in updates)
    return [u.token for u in updates if u.token is not None], [u.text for u in updates], updates


def test_the_pieces_of_text_are_the_answer(model, prompts, expected) -> None:
    for prompt, tokens in list(zip(prompts, expected, strict=True))[:8]:
        found, pieces, updates = text_run(make_engine(model), request(prompt))
        kept = tokens[:-1] if tokens[-1] == VOCABULARY - 1 else tokens
        assert (found, "".join(pieces)) == (tokens, "".join(map(chr, kept)))
        assert updates[-1].finish_reason == ("length" if kept == tokens else "stop")


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_stop_string_ends_its_row_and_is_never_seen(
    model, prompts, expected, length: int
) -> None:
    tokens = expected[5]
    for start in range(1, NEW - length):
        string = "".join(map(chr, tokens[start : start + length]))
        whole = "".join(map(chr, tokens))
        asked = replace(request(prompts[5]), stop_strings=(string, "never there"))
        found, pieces, updates = text_run(make_engine(model), asked)
        assert "".join(pieces) == whole[: whole.index(string)]
        assert updates[-1].finish_reason == "stop"
        assert found == tokens[: whole.index(string) + length]


def test_a_stop_string_at_the_very_end_ends_its_row(model, prompts, expected) -> None:
    """Completed by the last of max_new_tokens, or by what was held back until then."""
    tokens = expected[5]
    begins = StopRule((VOCABULARY - 1,), ((tokens[3], VOCABULARY - 2),))  # and never goes on
    for stop, count in ((StopRule(), 1), (StopRule(), 3), (begins, 1), (begins, 2)):
        string = "".join(map(chr, tokens[4 - count : 4]))
        asked = replace(request(prompts[5], new=4), stop=stop, stop_strings=(string,))
        found, pieces, updates = text_run(make_engine(model), asked)
        whole = "".join(map(chr, tokens[:4]))
        assert "".join(pieces) == whole[: whole.index(string)] and found == tokens[:4]
        assert updates[-1].finish_reason == "stop" and updates[-1].stop_tokens == 0


def test_no_stop_reaches_into_the_first_min_tokens(model, prompts, expected) -> None:
    tokens = expected[5]
    stops = StopRule(sequences=(tuple(tokens[2:5]), tuple(tokens[6:8])))
    assert len(set(tokens)) == len(tokens)
    for min_tokens, count, kept in ((0, 5, 2), (2, 5, 2), (3, 8, 6), (5, 8, 6), (7, NEW, NEW)):
        sampling = SamplingParams(max_new_tokens=NEW, min_tokens=min_tokens)
        for choice in (sampling, replace(sampling, ignore_eos=True)):
            asked = replace(request(prompts[5]), sampling=choice, stop=stops)
            found, pieces, updates = text_run(make_engine(model), asked)
            assert found == tokens[:count] and updates[-1].stop_tokens == count - kept
            assert "".join(pieces) == "".join(map(chr, tokens[:kept]))
            grown = GrowingAnswer(asked)
            for update in updates:
                grown.add(update)
            assert grown.completion().ids == tuple(tokens[:kept])


def test_a_stop_token_that_is_ignored_is_not_held_back(model, prompts, expected) -> None:
    tokens = expected[5]
    asked = request(prompts[5], stop=[tokens[2]])
    asked = replace(asked, sampling=replace(asked.sampling, ignore_eos=True, min_tokens=8))
    assert text_run(make_engine(model), asked)[0] == tokens


def test_min_tokens_and_ignore_eos_let_a_row_go_on(model, prompts, expected) -> None:
    tokens = expected[5]
    stop = request(prompts[5], stop=[tokens[2]])
    assert len(text_run(make_engine(model), stop)[0]) <= 3
    ignoring = replace(stop, sampling=replace(stop.sampling, ignore_eos=True))
    assert text_run(make_engine(model), ignoring)[0] == tokens
    at_least = replace(stop, sampling=replace(stop.sampling, min_tokens=8))
    found = text_run(make_engine(model), at_least)[0]
    # Until then the stop is not even chosen.
    assert len(found) >= 8 and tokens[2] not in found[:7]


@pytest.mark.parametrize("store", STORES)
def test_log_probabilities_are_the_models_own(model, prompts, expected, store) -> None:
    """Of the prompt, too, whether it runs at once, in pieces, or is known already."""
    prompt, tokens = prompts[4], expected[4]
    ids = torch.tensor([prompt + tokens])
    lens = torch.tensor([len(prompt)])
    with torch.no_grad():
        logits_TV = model(ids, prompt_lens=lens).logits[0]
    logprobs_TV = logits_TV.log_softmax(-1)
    sampling = replace(request(prompt).sampling, logprobs=3, prompt_logprobs=2)
    for prefill_tokens in (1000, 7):
        limits = EngineLimits(8, prefill_tokens, 1000)
        engine = make_engine(model, store, limits=limits)
        answers(engine, [prompt])
        _, _, updates = text_run(engine, replace(request(prompt), sampling=sampling))
        figures = updates[0].prompt
        assert figures is not None and figures.cached_tokens == 0
        assert [one.token for one in figures.logprobs] == prompt[1:]
        new = [update.logprobs for update in updates]
        for place, one in enumerate([*figures.logprobs, *new]):
            assert one is not None
            assert one.logprob == pytest.approx(float(logprobs_TV[place, one.token]), abs=1e-3)
            top = logprobs_TV[place].topk(len(one.top)).indices.tolist()
            assert [token for token, _ in one.top] == top
        assert all(update.prompt is None for update in updates[1:])


def test_a_grammar_holds_the_rows_that_have_one(model, prompts, expected) -> None:
    compiler = GrammarCompiler(
        lambda i: bytes([i]) if i < 256 else b"<|%d|>" % i, VOCABULARY, (VOCABULARY - 1,)
    )
    engine = make_engine(model)
    free = engine.submit(request(prompts[3]))
    held = engine.submit(
        replace(request(prompts[5]), grammar=compiler.choice(["yes", "no", "可以"]))
    )
    found: dict[int, list[str]] = defaultdict(list)
    tokens: dict[int, list[int]] = defaultdict(list)
    while engine.is_busy:
        for update in engine.step():
            assert update.error is None and update.token is not None
            found[update.id].append(update.text)
            tokens[update.id].append(update.token)
    assert tokens[free] == expected[3]
    answer = bytes(i for i in tokens[held] if i < 256).decode()
    assert answer in ("yes", "no", "可以")


@pytest.mark.parametrize("store", STORES)
def test_a_prompt_that_is_put_back_in_the_middle_is_reported_once(model, store) -> None:
    rng = random.Random(8)
    prompt = [rng.randrange(490) for _ in range(60)]
    wanted = replace(
        request(prompt, new=2), sampling=SamplingParams(max_new_tokens=2, prompt_logprobs=0)
    )
    _, _, calm = text_run(make_engine(model, store), wanted)
    engine = make_engine(model, store, pages=20, limits=EngineLimits(8, 6, 1000))
    older = [
        replace(request([i + 1] * 30, new=60), stop=StopRule()) for i in range(2)
    ]  # which grow over the pages that the younger one needs
    for one in older:
        engine.submit(one)
    for _ in range(14):
        engine.step()
    _, _, hurried = text_run(engine, wanted)
    assert engine.figures.put_back > 0
    expected_figures, found = calm[0].prompt, hurried[0].prompt
    assert expected_figures is not None and found is not None
    assert [one.token for one in found.logprobs] == prompt[1:]
    assert [one.logprob for one in found.logprobs] == pytest.approx(
        [one.logprob for one in expected_figures.logprobs], abs=1e-4
    )


def test_a_grammar_that_is_over_ends_a_row_before_min_tokens(model, prompts) -> None:
    compiler = GrammarCompiler(
        lambda i: bytes([i]) if i < 256 else b"<|%d|>" % i, VOCABULARY, (VOCABULARY - 1,)
    )
    sampling = SamplingParams(max_new_tokens=16, min_tokens=12)
    asked = replace(request(prompts[3]), sampling=sampling, grammar=compiler.choice(["yes"]))
    tokens, pieces, updates = text_run(make_engine(model), asked)
    assert "".join(pieces) == "yes" and len(tokens) == 4
    assert updates[-1].finish_reason == "stop"


def test_an_empty_prompt_is_refused(model) -> None:
    with pytest.raises(EmptyPrompt, match="expected at least one token"):
        make_engine(model).submit(request([]))


def test_rows_in_step_get_their_next_pages_one_after_another(model) -> None:
    """Four rows reach the end of a page at once; on a CPU each is copied when it gets another."""
    engine = make_engine(model)
    for _ in range(4):
        engine.submit(request([5, 6, 7], 20))
    engine.step()
    grown = []
    while engine.is_busy:
        before = {one.id: one.row.pages for one in engine.scheduler.running if one.row}
        engine.step()
        rows = [one for one in engine.scheduler.running if one.row]
        grown.append(sum(one.row.pages > before[one.id] for one in rows if one.row))
    assert max(grown) == 1 and sum(grown) == 8
