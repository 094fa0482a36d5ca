"""Formats: every sample of a public data set gives its expected conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.sources import ReadOptions, iter_conversations

FORMATS = Path(__file__).parents[2] / "formats"
READER_OF_SAMPLE = {
    "advertise_gen": "adgen",
    "alpaca_chinese_dataset": "alpaca",
    "alpaca_cot": "alpaca",
    "alpaca_gpt4_data_zh": "alpaca",
    "belle_generated_chat_0.4M": "alpaca",
    "belle_multiturn_chat_0.8M": "alpaca",
    "belle_school_math_0.25M": "alpaca",
    "belle_train_0.5M_CN_input_target": "input",
    "belle_train_1M_CN": "alpaca",
    "belle_train_3.5M_CN": "sharegpt",
    "coig_counterfactural_correction_multi_round_chat": "coig_rounds",
    "coig_exam_instructions": "coig_exam",
    "coig_human_value_alignment_instructions_part1": "alpaca",
    "coig_human_value_alignment_instructions_part2": "coig_exam",
    "coig_leetcode_instructions": "alpaca",
    "coig_translated_instructions": "coig_translated",
    "firefly_conversation": "conversation",
    "firefly_train_1.1M": "input",
    "guanaco": "alpaca",
    "hc3_chinese": "hc3",
    "instinwild_ch": "alpaca",
    "instructionwild_v2": "instructionwild",
    "instructionwild_v2_broken": "instructionwild",
    "llamafactory_alpaca": "alpaca",
    "math23k": "math23k",
    "moss_002_sft": "moss_002",
    "moss_003_sft_no_tools": "moss_003",
    "moss_003_sft_plugin": "moss_003",
    "oasst1_messages": "oasst_messages",
    "oasst1_trees": "oasst_trees",
    "openai_messages": "messages",
    "refgpt_fact": "refgpt",
    "safety_prompts_typical": "prompt",
    "sharegpt": "sharegpt",
    "sharegpt_cn": "conversation",
    "tigerbot_medical_qa": "alpaca",
    "tigerbot_sft": "alpaca",
}
SAMPLES = sorted(path for path in FORMATS.iterdir() if ".expected." not in path.name)


def stem_of(sample: Path) -> str:
    return next(
        name
        for name in sorted(READER_OF_SAMPLE, key=len, reverse=True)
        if sample.name.startswith(f"{name}.")
    )


def shown(result: object) -> dict[str, object]:
    """A result in the words of the expected files."""
    if isinstance(result, Dropped):
        return {"dropped": result.reason}
    return {"system": result.system, "turns": [[turn.role, turn.text] for turn in result.turns]}  # type: ignore


@pytest.mark.parametrize("named", [False, True], ids=["found by keys", "named"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_every_sample_gives_its_expected_conversations(sample: Path, named: bool) -> None:
    stem = stem_of(sample)
    expected = json.loads((FORMATS / f"{stem}.expected.json").read_text(encoding="utf-8"))
    fmt = READER_OF_SAMPLE[stem] if named else "auto"
    # Broken lines are part of one sample's expectation, counted when the user lets them pass.
    bad_rows = "skip" if stem.endswith("_broken") else "stop"
    assert [
        shown(result)
        for result, _ in iter_conversations([sample], ReadOptions(fmt, bad_rows=bad_rows))
    ] == expected


def test_every_expected_file_has_its_sample() -> None:
    stems = {path.name.removesuffix(".expected.json") for path in FORMATS.glob("*.expected.json")}
    assert stems == set(READER_OF_SAMPLE) == {stem_of(sample) for sample in SAMPLES}
    assert len(SAMPLES) == 38
