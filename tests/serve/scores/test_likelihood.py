"""Likelihoods: by the serving engine those of a plain forward pass, by a server what it tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qwen_ds  # noqa: F401  registers the classes
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import Encoding, load_encoding
from serve.endpoint import patience
from serve.endpoint.client import connect
from serve.endpoint.options import EndpointOptions
from serve.engine.loading import load_engine
from serve.scores import likelihood
from serve.scores.likelihood import (
    Choices,
    ChoiceScore,
    EndpointScorer,
    EngineScorer,
    Item,
    PlainText,
    Scorer,
    TextScore,
)
from tests.serve.scripted_server import Body, Handler, scripted

TEXTS = ("abc de", "the quick brown fox", "山高", "x")
QUESTION = Choices("Q: 1+1?\nA. 2\nB. 3\nAnswer: ", ("A", "B"))


@pytest.fixture(scope="module")
def encoding(small_dir: Path) -> Encoding:
    return load_encoding(small_dir)


@pytest.fixture(scope="module")
def scorer(small_dir: Path, encoding: Encoding) -> EngineScorer:
    return EngineScorer(load_engine(small_dir, device="cpu").start(), encoding)


def scores(scorer: Scorer, *items: Item) -> list[Any]:
    found = dict(scorer.score(items))
    assert sorted(found) == list(range(len(items)))
    return [found[i] for i in range(len(items))]


@pytest.fixture(scope="module")
def logprobs_of(small_dir: Path, encoding: Encoding) -> Any:
    """log p of every token [T, V] by a forward pass of the whole text."""
    model = AutoModelForCausalLM.from_pretrained(small_dir).eval()

    def of(text: str) -> tuple[list[int], torch.Tensor]:
        ids = encoding.ordinary(text)
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0].float()
        return ids, logits_TV.log_softmax(-1)

    return of


def test_a_texts_likelihood_is_that_of_a_forward_pass(
    scorer: EngineScorer, logprobs_of: Any
) -> None:
    for text, found in zip(TEXTS, scores(scorer, *map(PlainText, TEXTS)), strict=True):
        ids, logprobs_TV = logprobs_of(text)
        following = torch.tensor(ids[1:], dtype=torch.int64)
        told = logprobs_TV[:-1].gather(1, following[:, None]).sum()
        assert found.nll == pytest.approx(-float(told), abs=1e-4)
        assert found.tokens == len(ids) - 1
    assert scores(scorer, PlainText("x")) == [TextScore(0.0, 0)]  # nothing follows


def test_a_long_text_is_measured_in_pieces(
    scorer: EngineScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(scorer, PlainText("the quick"), PlainText(" brown fo"), PlainText("x"))
    monkeypatch.setattr(likelihood, "PIECE", 9)
    (found,) = scores(scorer, PlainText("the quick brown fox"))
    assert found.nll == pytest.approx(sum(one.nll for one in whole), abs=1e-4)
    assert found.tokens == sum(one.tokens for one in whole)


def test_the_letters_have_the_likelihood_of_the_next_token(
    scorer: EngineScorer, encoding: Encoding, logprobs_of: Any
) -> None:
    _, logprobs_TV = logprobs_of(QUESTION.prompt)
    (found,) = scores(scorer, QUESTION)
    ids = [encoding.ordinary(letter)[0] for letter in "AB"]
    assert found.logprobs == pytest.approx(logprobs_TV[-1, ids].tolist(), abs=1e-4)


def test_one_item_that_fails_leaves_the_others(
    small_dir: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "PIECE", 60)
    short = EngineScorer(
        replace(load_engine(small_dir, device="cpu"), context=50).start(), encoding
    )
    items = PlainText("abc"), PlainText("a" * 59 + "bcd"), QUESTION  # its first piece is too long
    first, failed, last = scores(short, *items)
    assert isinstance(first, TextScore) and isinstance(last, ChoiceScore)
    assert isinstance(failed, DecodingError)


# A server's side: each character is a token, whose log p depends on its code.


def echoed(prompt: str) -> dict[str, Any]:
    logprobs = [None, *(-ord(character) / 100 for character in prompt[1:])]
    return {"tokens": list(prompt), "token_logprobs": logprobs}


def echoes(handler: Handler, body: Body, _: int) -> bool:
    if "prompt" not in body:
        return False
    assert body["echo"] and body["logprobs"] and body["max_tokens"] == 0
    choices = [{"index": i, "logprobs": echoed(one)} for i, one in enumerate(body["prompt"])]
    handler.reply(200, {"choices": choices[::-1]})  # in any order
    return True


def of_server(url: str) -> EndpointScorer:
    return EndpointScorer(connect(EndpointOptions(url), 5.0, lambda _: None, 4))


def test_a_servers_echo_gives_texts_and_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "PIECE", 4)
    with scripted(echoes) as server:
        text, question = scores(of_server(server.url), PlainText("abcdef"), QUESTION)
    expected = -sum(-ord(c) / 100 for c in "bcdf")  # "a" and "e" begin pieces
    assert text.nll == pytest.approx(expected) and text.tokens == 4
    assert question.logprobs == pytest.approx((-ord("A") / 100, -ord("B") / 100))


def test_a_server_that_tells_nothing_of_a_prompt_is_refused() -> None:
    def silent(handler: Handler, body: Body, _: int) -> bool:
        if "prompt" in body:
            handler.reply(200, {"choices": [{"index": 0, "text": "a", "logprobs": None}]})
        return "prompt" in body

    with scripted(silent) as server, pytest.raises(UserError, match="expected a server that takes"):
        scores(of_server(server.url), PlainText("abc"))


def test_a_server_in_trouble_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)

    def troubled(handler: Handler, body: Body, tries: int) -> bool:
        if "prompt" in body and tries == 0:
            handler.reply(200, {"choices": "cut"})
            return True
        return echoes(handler, json.loads(json.dumps(body)), tries)

    with scripted(troubled) as server:
        (found,) = scores(of_server(server.url), PlainText("ab"))
    assert found == TextScore(ord("b") / 100, 1)
