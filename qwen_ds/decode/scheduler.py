"""Who runs in the next step: queues, slots, and the pages that rows need."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from qwen_ds.decode.answer_text import AnswerText
from qwen_ds.decode.kv import KVStore, PageKey, StoredRow, page_keys
from qwen_ds.decode.request import EngineFigures, Request
from qwen_ds.decode.sampler import RowSampler, TokenLogprobs


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much the engine does at once."""

    slots: int = 64  # rows that run together
    prefill_tokens: int = 256  # tokens of prompts in one step
    context: int = 8192  # tokens that prompt and answer may have together
    prefill_beside: int | None = None
    """As prefill_tokens, beside rows that decode and must not wait long. Tokens late in a long
    prompt count more there, by what attention costs on a CPU. None: prefill_tokens."""


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way, whether it runs or waits."""

    id: int
    request: Request
    sampler: RowSampler
    text: AnswerText
    alpha: int
    tokens: list[int]  # prompt and new ones
    keys: list[PageKey]  # of the full pages of the prompt
    row: StoredRow | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def todo(self) -> int:
        """Tokens whose keys and values are not there yet; the last one gives the next token."""
        return len(self.tokens) - (self.row.length if self.row else 0)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def wants_prompt(self) -> bool:
        """Whether the logits of its prompt are asked for, and not all there."""
        known = len(self.prompt_logprobs)
        return self.request.sampling.prompt_logprobs is not None and known < self.prompt_len - 1


class Scheduler:
    """The requests of an engine. The oldest has the first claim to pages and to the room for
    prompts; where pages run out, the youngest is put back into the queue."""

    def __init__(self, store: KVStore, limits: EngineLimits, figures: EngineFigures) -> None:
        self.store, self.limits, self.figures = store, limits, figures
        self.waiting: list[Running] = []  # by id
        self.running: list[Running] = []  # by id

    def find(self, request_id: int) -> Running | None:
        """A request that has not ended."""
        return next((one for one in self.waiting + self.running if one.id == request_id), None)

    def remove(self, one: Running) -> None:
        """Forget a request, and give its pages back."""
        (self.running if one in self.running else self.waiting).remove(one)
        self._close(one)

    def put_back(self, one: Running) -> None:
        """Let a running request begin again later; it goes on with the same tokens."""
        self.running.remove(one)
        self._close(one)
        if one.wants_prompt:  # its pieces run once more
            one.prompt_logprobs.clear()
        insort(self.waiting, one, key=lambda waiting: waiting.id)
        self.figures.put_back += 1

    def next_shares(self) -> list[tuple[Running, int]]:
        """The requests of the next step, each with its number of tokens; pages are there."""
        self._keep_room()
        self._admit()
        return self._shares()

    def _keep_room(self) -> None:
        """Make room for the next token of each running row, the oldest first."""
        number = 0
        while number < len(self.running):
            one = self.running[number]
            assert one.row is not None
            if self.store.grow(one.row, len(one.tokens)):
                number += 1
            else:
                self.put_back(self.running[-1])  # perhaps this one
        self._grow_ahead()

    def _grow_ahead(self) -> None:
        """Give the next page to the row that needs it first, a little early: on a CPU it is copied
        then, and many rows that are copied in one step would hold up all of them."""
        store, rows = self.store, [one for one in self.running if one.todo == 1]
        if not rows or store.available_pages <= len(rows):
            return

        def free(one: Running) -> int:
            assert one.row is not None
            return one.row.pages * store.page_size - len(one.tokens)

        first = min(rows, key=free)
        left = first.request.sampling.max_new_tokens - len(first.sampler.tokens)
        if free(first) < min(len(rows), store.page_size) and left > free(first):
            assert first.row is not None
            store.grow(first.row, len(first.tokens) + store.page_size)

    def _admit(self) -> None:
        """Begin the requests that have waited longest, while slots and pages last."""
        store = self.store
        while self.waiting and len(self.running) < self.limits.slots:
            one = self.waiting[0]
            # A page beyond the prompt, or the first new tokens would push somebody out.
            pages = min(store.pages_for(len(one.tokens)) + 1, store.num_pages)
            if pages > store.available_pages:
                return
            keys = one.keys
            if len(one.tokens) > one.prompt_len:  # put back before
                keys = page_keys(one.tokens, store.page_size, one.request.adapter, one.alpha)
            # The last token of the prompt is run in any case: its logits are wanted.
            full = 0 if one.wants_prompt else (len(one.tokens) - 1) // store.page_size
            one.row = store.open(keys[:full])
            if not store.grow(one.row, len(one.tokens)):
                self._close(one)
                return
            one.cached_tokens = one.row.length
            self.figures.cached_tokens += one.row.length
            self.waiting.pop(0)
            insort(self.running, one, key=lambda running: running.id)

    def _shares(self) -> list[tuple[Running, int]]:
        """The tokens that each row runs in this step; rows that run a single one come first.

        Half of the room for prompts is the oldest prompt's, the rest goes to the shortest ones: a
        long prompt gets on, and a short one need not wait for it.
        """
        decoding = [(one, 1) for one in self.running if one.todo == 1]
        prompts = [one for one in self.running if one.todo > 1]
        if not prompts:
            return decoding
        room = self._prefill_room(prompts[0]) if decoding else self.limits.prefill_tokens
        shares = {prompts[0].id: min(prompts[0].todo, -(-room // 2))}
        room -= shares[prompts[0].id]
        for one in sorted(prompts, key=lambda one: one.todo):
            more = min(one.todo - shares.get(one.id, 0), room)
            shares[one.id] = shares.get(one.id, 0) + more
            room -= more
        pieces = [(one, shares[one.id]) for one in prompts if shares[one.id]]
        return sorted(decoding + pieces, key=lambda share: share[1] > 1)

    def _prefill_room(self, oldest: Running) -> int:
        """Tokens of prompts that hold up the rows that decode no longer than `prefill_beside`
        tokens without a past (measured by tests/benchmarks/serve.py, part gap)."""
        beside = self.limits.prefill_beside
        if beside is None:
            return self.limits.prefill_tokens
        past = oldest.row.length if oldest.row else 0
        # To read 60 tokens' keys takes as long as a new token; at 2,000, that takes twice as long.
        # Reading the keys costs the same for any piece, so tiny ones are not worth it.
        room = int((beside - past / 60) / (1 + past / 2000))
        return min(max(min(8, beside), room), self.limits.prefill_tokens)

    def _close(self, one: Running) -> None:
        if one.row is not None:
            self.store.close(one.row)
            one.row = None
