"""Batched decoding: prompts in, completions out, each row's answer the same as if it had been alone.

Rows of one batch have different lengths, so they are padded on the left (the next token then stands in the last column
of every row), and the mask and the positions tell the model where each row begins. Greedy answers are those of the row
alone token for token in fp32; in bf16 the last bit of a logit depends on the shape of the matrix products, so near ties
may fall otherwise. Sampling draws one number a step from a generator of the row's own, seeded with (seed, row id): who
else is in the batch, and on which rank, plays no part.

Shapes: B rows of a batch, T tokens of the longest prompt, S decoding steps, V rows of the head, N candidates of a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.model import folder
from qwen_ds.model.adapter import load_adapter
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.tokenizer import Encoding, load_encoding

if TYPE_CHECKING:
    from qwen_ds.model.adapter import PeftModel

STOP_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PREFILTER = 1024  # candidates that are looked at before the whole vocabulary is sorted for top-p
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The numbers are the original project's; greedy unless `do_sample`.

    Raises:
        UserError: a number out of its range.
    """

    do_sample: bool = False
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50
    """0: no limit."""
    max_new_tokens: int = 128
    seed: int = 42

    def __post_init__(self) -> None:
        checks = (
            (
                "temperature",
                self.temperature,
                self.temperature > 0,
                "a number above 0 (do_sample false is greedy)",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (no limit) or more"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
        )
        for name, value, is_right, expected in checks:
            if not is_right:
                raise UserError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True, slots=True)
class Completion:
    """One row's answer.

    `ids` are the new tokens without the one that stopped them. `text` is their text; bytes that are no whole UTF-8
    character (an answer cut at max_new_tokens may end inside one) show as U+FFFD.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)


def row_seed(seed: int, row_id: int) -> int:
    """63 bits that depend on both numbers: nearby rows and nearby seeds share no stream."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities: temperature, then top-k, then top-p.

    A token stays when the more probable ones together have less than top_p, so the first always does. Without a top-k
    the sum runs over the whole vocabulary, but only the PREFILTER most probable tokens are sorted, unless in some row
    these do not reach top_p: the result is the same.

    Args:
        logits_BV: fp32.

    Returns:
        probs_BN (fp32, falling, 0 where dropped, not renormalised) and ids_BN (int64).
    """
    scaled_BV = logits_BV / sampling.temperature
    vocabulary = scaled_BV.shape[1]
    if 0 < sampling.top_k < vocabulary:
        top_BN, ids_BN = scaled_BV.topk(sampling.top_k)
        probs_BN = top_BN.softmax(-1)
    else:
        log_sum_B1 = scaled_BV.logsumexp(-1, keepdim=True)
        top_BN, ids_BN = scaled_BV.topk(min(PREFILTER, vocabulary))
        probs_BN = (top_BN - log_sum_B1).exp()
        if vocabulary > PREFILTER and bool((probs_BN.sum(-1) < sampling.top_p).any()):
            top_BN, ids_BN = scaled_BV.sort(descending=True)
            probs_BN = (top_BN - log_sum_B1).exp()
    before_BN = probs_BN.cumsum(-1) - probs_BN
    kept_BN = before_BN < sampling.top_p
    kept_BN[:, 0] = True
    return probs_BN * kept_BN, ids_BN


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Next tokens ids_B (int64), by inverting the cumulative distribution at uniform_B (in [0, 1)): a pure function."""
    probs_BN, ids_BN = candidates(logits_BV, sampling)
    cumulative_BN = probs_BN.cumsum(-1)
    target_B1 = uniform_B[:, None].to(cumulative_BN) * cumulative_BN[:, -1:]
    # Rounding must not lead past the last token that is kept.
    rank_B1 = (
        (cumulative_BN <= target_B1)
        .sum(-1, keepdim=True)
        .minimum((probs_BN > 0).sum(-1, keepdim=True) - 1)
    )
    return ids_BN.gather(1, rank_B1).squeeze(1)


class _NextToken(LogitsProcessor):
    """Chooses the token itself and leaves `generate` nothing else to take, so that no common random state is used."""

    def __init__(
        self, n_vocab: int, sampling: Sampling, prompt_len: int, uniform_BS: Tensor | None
    ) -> None:
        self.n_vocab, self.sampling, self.prompt_len, self.uniform_BS = (
            n_vocab,
            sampling,
            prompt_len,
            uniform_BS,
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        logits_BV[:, self.n_vocab :] = -torch.inf  # padding rows of the head: ids without a token
        step = input_ids.shape[1] - self.prompt_len
        if step == 0 and not bool(logits_BV.max(-1).values.isfinite().all()):
            raise UserError(
                "the model's logits are not finite; expected numbers: float16 overflows, try --dtype bfloat16"
            )
        if self.uniform_BS is None:
            return logits_BV
        chosen_B = draw(logits_BV, self.sampling, self.uniform_BS[:, step])
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


def choose_device(name: str) -> torch.device:
    """auto: this rank's GPU when there is one, else the CPU. Raises UserError when what was asked for cannot be had."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if dist.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"local rank {dist.local_rank()} has no GPU; expected at most {torch.cuda.device_count()} ranks here"
            )
        return torch.device("cuda", dist.local_rank())
    if (
        name == "cuda" or dist.nvidia_card_present()
    ):  # slow on the CPU by accident is worse than not at all
        raise UserError(
            f"torch {torch.__version__} sees no usable GPU; expected a newer driver, another torch, a "
            "CUDA_VISIBLE_DEVICES that is not empty, or --device cpu"
        )
    return torch.device("cpu")


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """auto: as stored, but fp16 becomes fp32 on a CPU, which computes fp16 slowly and in part not at all."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def context_of(config: QWenConfig) -> int:
    """Tokens of prompt and answer together at most: beyond seq_length only with dynamic NTK."""
    seq_length = config.seq_length or config.max_position_embeddings
    return max(seq_length, config.max_position_embeddings) if config.use_dynamic_ntk else seq_length


def silence_libraries() -> None:
    """No progress bar of loading weights, and no advice of transformers', on a command's terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # between libraries: peft asks transformers in words that will go


class Engine:
    """A model in evaluation mode with its tokenizer, on one device.

    `stop_ids` end a row (default: <|endoftext|>, <|im_start|> and <|im_end|> of the tokenizer).
    """

    def __init__(
        self,
        model: QWenLMHeadModel | PeftModel,
        encoding: Encoding,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        self.model = model.eval()  # dropout off, that of an adapter included
        # What the folder recommends (repetition_penalty, top_k 0 ..) would be merged into every call.
        self.model.generation_config = GenerationConfig()
        self.encoding = encoding
        self.device = next(model.parameters()).device
        self.stop_ids = (
            tuple(stop_ids)
            if stop_ids is not None
            else tuple(encoding.special[t] for t in STOP_TOKENS)
        )
        self.context = context_of(model.config)
        self.pad_id = encoding.special["<|endoftext|>"]

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> Engine:
        """Load a checkpoint folder or hub id, with an unmerged PEFT adapter on it if given.

        Args:
            device: auto, cuda or cpu.
            dtype: auto (see `choose_dtype`), bfloat16, float16 or float32.

        Raises:
            UserError: no such model or adapter, an adapter for another base, a device that is not there.
        """
        path = folder.find_model(str(model_dir))
        place = choose_device(device)
        model = QWenLMHeadModel.from_pretrained(
            path, dtype="auto" if dtype == "auto" else DTYPES[dtype]
        )
        model = model.to(choose_dtype(dtype, model.dtype, place))
        if adapter is not None:
            model = load_adapter(model, Path(adapter))
        return cls(model.to(place), load_encoding(path))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        batch_size: int = 16,
        row_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts; arguments as in `stream`."""
        found = dict(self.stream(prompts, sampling, batch_size=batch_size, row_ids=row_ids))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        batch_size: int = 16,
        row_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index into prompts, completion) as batches finish: rows sorted by length, the longest first.

        Args:
            prompts: token ids, at least one a row.
            batch_size: rows decoded together; halved for a batch that does not fit the GPU.
            row_ids: what each row's random numbers are drawn from, with the seed; default: its index.

        Raises:
            UserError: a prompt that leaves no room for max_new_tokens.
        """
        row_ids = range(len(prompts)) if row_ids is None else row_ids
        assert len(row_ids) == len(prompts)
        for i, prompt in enumerate(prompts):
            assert prompt, "a prompt has at least one token"
            if len(prompt) + sampling.max_new_tokens > self.context:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens; expected at most {self.context - sampling.max_new_tokens}: "
                    f"the model's context of {self.context} less {sampling.max_new_tokens} new tokens"
                )
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]

            def run(part: list[int]) -> list[Completion]:
                return self._batch([prompts[i] for i in part], [row_ids[i] for i in part], sampling)

            yield from zip(chosen, _halving(run, chosen), strict=True)

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), longest), self.pad_id, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask_BT[row, longest - len(prompt) :] = 1
        return ids_BT.to(self.device), mask_BT.to(self.device)

    def _uniforms(self, row_ids: Sequence[int], sampling: Sampling) -> Tensor | None:
        """All random numbers of a batch up front, drawn on the CPU: the same on every device."""
        if not sampling.do_sample:
            return None
        rows = [
            torch.rand(
                sampling.max_new_tokens,
                generator=torch.Generator().manual_seed(row_seed(sampling.seed, row)),
            )
            for row in row_ids
        ]
        return torch.stack(rows).to(self.device)

    @torch.inference_mode()
    def _batch(
        self, prompts: Sequence[Sequence[int]], row_ids: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        ids_BT, mask_BT = self._pad_left(prompts)
        chooser = _NextToken(
            self.encoding.n_vocab, sampling, ids_BT.shape[1], self._uniforms(row_ids, sampling)
        )
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(self.stop_ids) or None,
            pad_token_id=self.pad_id,
        )
        all_ids = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
        )
        new_BS = all_ids[:, ids_BT.shape[1] :].tolist()
        return [
            self._completion(ids, len(prompt)) for ids, prompt in zip(new_BS, prompts, strict=True)
        ]

    def _completion(self, ids: list[int], prompt_tokens: int) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        kept = tuple(ids[:end])
        return Completion(
            kept,
            self.encoding.decode(list(kept)),
            "length" if end is None else "stop",
            prompt_tokens,
        )


def _halving(run: Callable[[list[int]], list[Completion]], rows: list[int]) -> list[Completion]:
    """run(rows), in two halves when they do not fit the GPU together. A single row that does not is an error."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return run(rows)
    if len(rows) == 1:
        raise UserError(
            "one row does not fit the GPU's memory; expected a shorter prompt or fewer --max_new_tokens"
        )
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return _halving(run, rows[:middle]) + _halving(run, rows[middle:])
