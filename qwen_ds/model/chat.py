"""The official chat interface: `model.chat`, `model.chat_stream` and the functions around them.

Signatures and results are the official code's, so that callers need not change. Where a result
differs on purpose, the docstring says so.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import GenerationMode

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.request import Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.decode.text import TextStream
from qwen_ds.model.chatml import DEFAULT_SYSTEM, Turn, encode_turns, render_turns, turn_ids
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.model.transformers_tokenizer import QWenTokenizer
from qwen_ds.terminal import show

History = Sequence[Sequence[str]]  # (query, response) pairs, the oldest first
MAX_WINDOW_SIZE = 6144  # tokens; the official default


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt of a chat as text and as ids.

    The history keeps as many of its latest pairs as leave it and the system turn together below
    max_window_size tokens; the query is not counted. No text yields a control token. "raw", for
    base models, is the query alone; there, control tokens spelled in it are parsed.
    """
    _check_format(chat_format)
    encoding = tokenizer.encoding
    if chat_format == "raw":
        return query, encoding.with_specials(query)
    # The official code counts a turn's closing line break with the turn that follows.
    size = len(turn_ids(encoding, "system", system)) - 1
    kept: list[Turn] = []
    for asked, answered in reversed(history or ()):
        pair = [Turn("user", asked), Turn("assistant", answered)]
        size += sum(len(turn_ids(encoding, turn.role, turn.text)) for turn in pair)
        if size >= max_window_size:
            break
        kept = pair + kept
    turns = [Turn("system", system), *kept, Turn("user", query)]
    return render_turns(turns, add_generation_prompt=True), encode_turns(
        encoding, turns, add_generation_prompt=True
    )


def decode_tokens(
    tokens: Tensor | Sequence[int],
    tokenizer: QWenTokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The response among `tokens`: the context_length ids of a prompt, then the generated ones.

    The response ends at the first `<|im_end|>`, `<|im_start|>` ("chatml") or `<|endoftext|>` and is
    stripped. Three results differ from the official code's, where they are accidents: a response
    without an end token keeps its last token; the prompt is cut off by its tokens instead of its
    characters (raw_text_len has no effect), so that a text which NFC shortens loses nothing; "raw"
    ends at `<|endoftext|>`, which the official code removes while it keeps what follows.

    Returns:
        The response; with return_end_reason also why it ended, in the official words.
    """
    _check_format(chat_format)
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    turn_ends = (tokenizer.im_start_id, tokenizer.im_end_id) if chat_format == "chatml" else ()
    new = ids[context_length:]
    kept, _ = StopRule((*turn_ends, tokenizer.eod_id)).cut(new)
    end_reason = f"Gen length {len(ids)}"
    if (stopped_by := new[len(kept) : len(kept) + 1]) and stopped_by[0] in turn_ends:
        end_reason = f"Gen {tokenizer.encoding.decode(stopped_by)!r}"
    response = tokenizer.encoding.decode(kept, errors).strip()
    if verbose:
        show(f"Raw generate: {tokenizer.encoding.decode(new, errors)!r}\nEnd reason: {end_reason}")
    return (response, end_reason) if return_end_reason else response


def get_stop_words_ids(chat_format: str, tokenizer: QWenTokenizer) -> list[list[int]]:
    """Token sequences at which generation ends, besides the eos token."""
    _check_format(chat_format)
    if chat_format == "raw":
        return [tokenizer.encoding.ordinary("Human:"), [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def _check_format(chat_format: str) -> None:
    if chat_format not in ("chatml", "raw"):
        raise ValueError(f"chat_format is {chat_format!r}; expected 'chatml' or 'raw'")


class StopWordsLogitsProcessor(LogitsProcessor):
    """Forces the eos token after a stop word, even after one at the end of the prompt.

    Args:
        stop_words_ids: non-empty token sequences; one that is just an eos token is ignored.
        eos_token_id: the token to force; of several, the first.
    """

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], eos_token_id: int | Sequence[int]):
        eos_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        words = [tuple(word) for word in stop_words_ids]
        try:
            self.stop = StopRule(
                sequences=tuple(w for w in words if w not in [(i,) for i in eos_ids])
            )
        except ValueError as error:
            raise ValueError(f"stop_words_ids: {error}") from None
        self.longest = max((len(word) for word in self.stop.sequences), default=0)
        self.eos_token_id = eos_ids[0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.longest:
            return scores
        tails = input_ids[:, -self.longest :].tolist()
        ended = [self.stop.length_of_stop(tail) > 0 for tail in tails]
        ended_B = torch.tensor(ended, device=input_ids.device)
        forced_V = torch.full_like(scores[0], -torch.inf)
        forced_V[self.eos_token_id] = 0.0
        return torch.where(ended_B.unsqueeze(-1), forced_V, scores)


class ChatMixin:
    """`generate` with stop words, `chat` and `chat_stream`, for classes with GenerationMixin."""

    generation_config: GenerationConfig

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does; a row also ends (with the eos token) after a stop word.

        The official code drops the attention mask of a batch with one row. Here it is honoured.
        """
        config = self.generation_config if generation_config is None else generation_config
        if stop_words_ids is None:
            stop_words_ids = getattr(config, "stop_words_ids", None)
        if stop_words_ids:
            eos = kwargs.get("eos_token_id", config.eos_token_id)
            eos = self.generation_config.eos_token_id if eos is None else eos
            if eos is None:
                came = "stop_words_ids are given and no eos_token_id"
                raise ValueError(f"{came}; expected one to end a row with")
            stop = StopWordsLogitsProcessor(stop_words_ids, eos)
            logits_processor = LogitsProcessorList([*(logits_processor or ()), stop])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # type: ignore[misc]

    def chat(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        stream: object = None,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[Sequence[str]]]:
        """Answer a query.

        `chat_format` and `max_window_size` of the generation config are honoured; kwargs go to
        `generate`. Unlike the official code it never generates ids without a token, and it differs
        as `decode_tokens` does, which cuts out the response.

        Returns:
            The response, and the history with this exchange appended, as a new list.

        Raises:
            ValueError: the generation config belongs to a base model (chat_format is not "chatml").
        """
        if stream is not None:
            raise ValueError("chat() does not stream; call chat_stream() instead")
        call = self._chat_call(
            tokenizer, query, history, system, generation_config, stop_words_ids, kwargs
        )
        context: Tensor = call["inputs"]
        if self._is_plain(generation_config, kwargs):
            new = list(self.generate(**call, custom_generate=decode_row))
        else:
            outputs = self.generate(**call)
            ids_BT = outputs if isinstance(outputs, Tensor) else outputs.sequences
            new = ids_BT[0, context.shape[1] :].tolist()
        ids = [*context[0].tolist(), *new]
        response = decode_tokens(ids, tokenizer, 0, context.shape[1], "chatml")
        assert isinstance(response, str)
        return response, [*(history or ()), (query, response)]

    def chat_stream(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Answer as `chat` does, yielding after every token the whole response so far.

        Incomplete characters are held back. Unlike the official code, which always samples, this
        honours do_sample. Control tokens are left out of the text.
        """
        call = self._chat_call(
            tokenizer, query, history, system, generation_config, stop_words_ids, kwargs
        )
        processors = LogitsProcessorList([*(logits_processor or ()), *call.pop("logits_processor")])
        new_tokens = self.generate(**call, logits_processor=processors, custom_generate=decode_row)

        def texts() -> Iterator[str]:
            stream, text = TextStream(tokenizer.encoding.token_bytes, errors="ignore"), ""
            for token in new_tokens:
                if token < tokenizer.eod_id:  # the ids from there on are control tokens
                    text += stream.push(token)
                yield text

        return texts()

    def _is_plain(self, config: GenerationConfig | None, options: dict[str, Any]) -> bool:
        """Whether the decoding core can answer a call: one answer, token by token.

        Beams, assistants and streamers are left to transformers' `generate`.
        """
        asked = copy.deepcopy(self.generation_config if config is None else config)
        asked.update(**options)
        plain = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        one_answer = (asked.num_return_sequences or 1) == 1
        others = {"assistant_model", "past_key_values", "streamer", "synced_gpus"} & options.keys()
        return asked.get_generation_mode() in plain and one_answer and not others

    def _chat_call(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: History | None,
        system: str,
        generation_config: GenerationConfig | None,
        stop_words_ids: Sequence[Sequence[int]] | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments of `generate` for one exchange."""
        config = self.generation_config if generation_config is None else generation_config
        # An object of transformers: it has the official keys only if generation_config.json has.
        chat_format = getattr(config, "chat_format", "chatml")
        if chat_format != "chatml":
            came = f"generation_config.chat_format is {chat_format!r}"
            raise ValueError(f"{came}; expected 'chatml': this is a base model")
        window = getattr(config, "max_window_size", MAX_WINDOW_SIZE)
        window = options.pop("max_window_size", None) or window
        _, context = make_context(tokenizer, query, history, system, window, chat_format)
        model: Any = self  # also a PreTrainedModel
        ids = torch.tensor([context], device=model.device)
        # The head's padding rows have no token.
        padding = list(range(len(tokenizer), model.config.vocab_size))
        real_tokens = SuppressTokensLogitsProcessor(padding, device=str(model.device))
        return {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "generation_config": generation_config,
            "logits_processor": LogitsProcessorList([real_tokens]),
            "stop_words_ids": [*(stop_words_ids or ()), *get_stop_words_ids("chatml", tokenizer)],
            **options,
        }


def decode_row(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Iterator[int]:
    """Yield the new tokens of one row, by the decoding engine: a `custom_generate`.

    transformers has made the arguments: it knows the options that `generate` takes. Those about the
    cache have no effect, since the engine has its own.
    """
    if input_ids.shape[0] != 1:
        came = f"cannot decode {input_ids.shape[0]} rows or beams"
        raise ValueError(f"{came}; expected one row and num_beams 1")
    prompt, ids_1T = input_ids[0].tolist(), input_ids

    def choose(logits_V: Tensor) -> int:
        nonlocal ids_1T
        scores_1V = logits_processor(ids_1T, logits_V[None])
        if generation_config.do_sample:
            next_11 = torch.multinomial(scores_1V.softmax(-1), num_samples=1)
        else:
            next_11 = scores_1V.argmax(-1, keepdim=True)
        ids_1T = torch.cat((ids_1T, next_11), dim=1)
        return int(next_11)

    # What else the caller has for the model's forward, such as extend_context.
    own = {"attention_mask", "past_key_values", "use_cache", "position_ids", "logits_to_keep"}
    more = {name: value for name, value in model_kwargs.items() if name not in own}
    alpha_of = partial(alpha_of_prompt, model.config)
    if more.get("extend_context") is False:
        alpha_of = partial(min, 1)
    room = generation_config.max_length  # of prompt and new tokens, however it was asked for
    assert room is not None
    limits = EngineLimits(1, generation_config.prefill_chunk_size or len(prompt), room)
    store = ContiguousStore.for_rows(kv_shape(model.config, model.dtype, model.device), [room])
    forward = packed(partial(model, **more))
    # The text is the caller's, who has the tokenizer.
    no_text = Vocabulary(model.config.vocab_size, lambda _: "", lambda _: b"")
    engine = DecodingEngine(forward, store, no_text, limits, alpha_of)
    sampling = SamplingParams(max_new_tokens=room - len(prompt))
    engine.submit(Request(prompt, sampling, StopRule(), choose=choose))
    while engine.is_busy:
        for update in engine.step():
            if update.error is not None:
                raise update.error
            assert update.token is not None
            yield update.token
            if bool(stopping_criteria(ids_1T, None).all()):
                return
