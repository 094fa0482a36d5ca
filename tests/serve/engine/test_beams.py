"""Beam search: what `generate` gives to each row alone, and options that it cannot honour."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

import qwen_ds
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.tokenizer import load_encoding
from serve.answering import Answer, Question
from serve.engine.beams import BeamAnswerer
from serve.files.prediction import predict
from serve.files.sources import find_source
from serve.options import PredictOptions, parse
from tests.serve.engine.test_adapters import make_adapter
from tests.serve.files.test_prediction import read_lines, write_rows

ROWS = ["abc", "类型#裙*裙长#" + "长" * 12, "a", "row" + " row" * 29]
BEAMS, TOKENS = 3, 12


def words_for(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(model), "--input", str(rows), "--output", str(output)]
    return [*words, "--max_new_tokens", str(TOKENS), "--num_beams", str(BEAMS), *more]


@pytest.fixture
def lines_of(small_dir: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": text} for text in ROWS])

    def run(*more: str, model: Path = small_dir) -> list[dict[str, Any]]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        options = parse(PredictOptions, "", words_for(model, rows, output, *more))
        predict(options.model, options.input, output, options)
        return read_lines(output)

    return run


def generated(folder: Path, adapter: Path | None = None, **options: Any) -> list[str]:
    """Each row alone, by transformers, cut at the first token that ends a turn."""
    encoding = load_encoding(folder)
    ends = [encoding.special[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    model: Any = qwen_ds.QWenLMHeadModel.from_pretrained(str(folder)).eval()
    model.generation_config = GenerationConfig()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    config = GenerationConfig(
        num_beams=BEAMS, max_new_tokens=TOKENS, eos_token_id=ends, pad_token_id=ends[0],
        suppress_tokens=list(range(encoding.n_vocab, 512)), **options,
    )  # fmt: skip
    found = []
    for text in ROWS:
        ids = encode_prompt(encoding, Conversation(None, (Turn("user", text),)))
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([ids]), generation_config=config)
        new = out[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        found.append(encoding.decode(new[:end]))
    return found


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--min_tokens", "9"), {"min_new_tokens": 9}),
        (("--repetition_penalty", "1.7"), {"repetition_penalty": 1.7}),
    ],
)
def test_each_row_gets_what_generate_gives_it_alone(
    lines_of: Callable[..., list[dict[str, Any]]],
    small_dir: Path,
    words: tuple[str, ...],
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = lines_of("--batch_size", "3", *words)
    assert [line["prediction"] for line in lines] == generated(small_dir, **options)
    assert "3 beams by transformers' generate: the slow path" in capsys.readouterr().out
    if not words:
        greedy = [line["prediction"] for line in lines_of("--num_beams", "1")]
        assert greedy != [line["prediction"] for line in lines], "or beams change nothing"


def test_the_generation_settings_of_a_folder_have_no_effect(
    lines_of: Callable[..., list[dict[str, Any]]], small_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_dir, tmp_path / "model")
    advice = {"no_repeat_ngram_size": 1, "length_penalty": -9.0, "min_length": 400}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    found = [line["prediction"] for line in lines_of()]
    assert [line["prediction"] for line in lines_of(model=folder)] == found


def answerer_of(folder: Path, tmp_path: Path, *more: str) -> BeamAnswerer:
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": "a"}])
    options = parse(PredictOptions, "", words_for(folder, rows, tmp_path / "out", *more))
    found = find_source(str(folder), options).open()
    assert isinstance(found, BeamAnswerer)
    return found


def ids_of(answerer: BeamAnswerer, *texts: str) -> list[list[int]]:
    asked = [Conversation(None, (Turn("user", text),)) for text in texts]
    return [encode_prompt(answerer.encoding, each) for each in asked]


def test_a_penalty_touches_no_token_for_the_padding(full_dir: Path, tmp_path: Path) -> None:
    """The token that pads is the one that this answer would repeat, were its padding counted."""
    answerer = answerer_of(full_dir, tmp_path, "--dtype", "float32")
    with torch.no_grad():
        answerer.model.lm_head.weight *= 0.01  # a probability of 1 is beyond any penalty
    sampling = SamplingParams(max_new_tokens=1, repetition_penalty=50.0)
    short, long = (Question("", sampling, ids) for ids in ids_of(answerer, "a", "b" * 50))
    row = torch.tensor([short.ids])
    config = GenerationConfig(num_beams=BEAMS, max_new_tokens=1, repetition_penalty=50.0)
    first = int(answerer.model.generate(row, config)[0, -1])
    answerer = replace(answerer, stop=StopRule((first,)))
    ((_, alone),) = answerer.answer([short])
    assert isinstance(alone, Answer) and alone.finish_reason == "stop"
    assert dict(answerer.answer([short, long]))[0] == alone


def test_ids_without_a_token_are_never_chosen(full_dir: Path, tmp_path: Path) -> None:
    answerer = answerer_of(full_dir, tmp_path, "--dtype", "float32")
    sampling = SamplingParams(max_new_tokens=6)
    question = Question("", sampling, ids_of(answerer, "a")[0])
    head = answerer.model.lm_head.weight
    with torch.no_grad():
        head[answerer.encoding.n_vocab :] = head[:85] * 1000
    ((_, found),) = answerer.answer([question])
    assert isinstance(found, Answer) and found.completion_tokens == 6
    assert all(
        token < answerer.encoding.n_vocab for token in answerer.encoding.ordinary(found.text)
    )
    assert len(found.text) > 6


def test_one_adapter_acts(
    lines_of: Callable[..., list[dict[str, Any]]], small_dir: Path, tmp_path: Path
) -> None:
    kind = {"target_modules": ["c_attn", "w1"], "modules_to_save": ["lm_head"]}
    adapter = make_adapter(small_dir, tmp_path / "adapter", kind, 1)
    texts = [line["prediction"] for line in lines_of("--adapter", str(adapter))]
    assert texts == generated(small_dir, adapter) != generated(small_dir)


def test_drawn_rows_depend_on_their_seed_alone(
    lines_of: Callable[..., list[dict[str, Any]]],
) -> None:
    drawn = ("--do_sample", "--temperature", "2", "--top_k", "0")
    lines = lines_of(*drawn)
    assert lines == lines_of(*drawn, "--batch_size", "1", "--seed", "42")
    assert lines != lines_of(*drawn, "--seed", "43")


def test_a_row_whose_logits_are_no_numbers_fails_alone(small_dir: Path, tmp_path: Path) -> None:
    answerer = answerer_of(small_dir, tmp_path)
    poison = answerer.encoding.ordinary("Z")[0]
    with torch.no_grad():
        answerer.model.transformer.wte.weight[poison] = torch.nan
    sampling = SamplingParams(max_new_tokens=4)
    ids = ids_of(answerer, "a", "Z", "b")
    found = dict(answerer.answer(Question("", sampling, one) for one in ids))
    assert str(found[1]) == "the model's logits are not finite; expected numbers"
    assert isinstance(found[0], Answer) and isinstance(found[2], Answer)


def test_what_beams_cannot_do_is_refused_in_one_line(
    lines_of: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.files.sources.find_model", lambda _: pytest.fail("looked for"))
    for words in (
        ("--stop", "a"), ("--choice", "a"), ("--regex", "a"), ("--json_object",),
        ("--json_schema", "{}"), ("--presence_penalty", "1"), ("--frequency_penalty", "1"),
        ("--logit_bias", '{"1": 1}'), ("--ignore_eos",), ("--logprobs", "0"),
        ("--memory_gb", "1"), ("--prefill_tokens", "9"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--num_beams 3 is given with {words[0]}, which"):
            lines_of(*words)
    with pytest.raises(UserError, match="--stop, --adapter NAME=DIR, which beam search does not"):
        lines_of("--stop", "a", "--adapter", "zh=dir")
