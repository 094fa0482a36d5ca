"""transformers' continuous batching with our class answers as its `generate` does."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from qwen_ds.model.modeling import QWenLMHeadModel

# seq_length is 64: the longest answer ends beyond it, where LogN acts.
LENS, NEW = (1, 5, 17, 3, 26, 40, 9, 60), 12
SETTINGS = {"page_size": 16, "num_blocks": 48, "max_batch_tokens": 40}


@pytest.fixture(scope="module")
def model(small_dir: Path) -> QWenLMHeadModel:
    found: QWenLMHeadModel = QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32)
    return found.eval()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Neither errors that a test expects, nor advice on kernels."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def options(**more: Any) -> dict[str, Any]:
    return {
        "generation_config": GenerationConfig(
            do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": ContinuousBatchingConfig(**(SETTINGS | more)),
    }


def prompts_of(lens: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(256) for _ in range(length)] for length in lens]


def greedy(model: QWenLMHeadModel, prompt: list[int]) -> list[int]:
    """The tokens of generate, none of which was nearly a tie."""
    found: Any = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
        max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(found.logits).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4
    tokens: list[int] = found.sequences[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_batch_gives_the_greedy_tokens_of_generate(
    model: QWenLMHeadModel, attention: str
) -> None:
    prompts = prompts_of(LENS)
    expected = [greedy(model, prompt) for prompt in prompts]
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    # A page holds 16 tokens and a step 40, so prompts run in pieces beside rows that decode.
    answers = model.generate_batch(prompts, **options())
    assert model.config._attn_implementation == attention
    model.set_attn_implementation(before)
    assert [answer.generated_tokens for answer in answers.values()] == expected


def test_a_prompt_that_needs_dynamic_ntk_is_refused(model: QWenLMHeadModel) -> None:
    prompts = prompts_of((3, 65))
    message = r"a prompt has 65 tokens; expected at most seq_length, 64: continuous batching"
    with pytest.raises(ValueError, match=message):
        model.generate_batch(prompts, **options())
    with model.continuous_batching_context_manager(**options()) as manager:
        with pytest.raises(ValueError, match=message):
            manager.add_request(prompts[1])
        # The others go on.
        name = manager.add_request(prompts[0])
        assert manager.get_result(name, timeout=60).generated_tokens


def test_a_long_prompt_is_taken_where_there_is_no_dynamic_ntk(
    model: QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "use_dynamic_ntk", False)
    (prompt,) = prompts_of((100,))
    expected = greedy(model, prompt)
    (answer,) = model.generate_batch([prompt], **options()).values()
    assert answer.generated_tokens == expected


def test_other_arguments_of_forward_are_errors_as_before(model: QWenLMHeadModel) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        model(torch.tensor([[1, 2]]), atention_mask=torch.ones(1, 2))
    assert model.accepts_loss_kwargs is False
