"""Formats: every sample of a public data set gives its expected conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.sources import ReadOptions, iter_conversations

FORMATS = Path(__file__).parents[2] / "formats"
SAMPLES_OF_READER = {
    "adgen": "advertise_gen",
    "alpaca": """
        alpaca_chinese_dataset alpaca_cot alpaca_gpt4_data_zh belle_generated_chat_0.4M
        belle_multiturn_chat_0.8M belle_school_math_0.25M belle_train_1M_CN
        coig_human_value_alignment_instructions_part1 coig_leetcode_instructions guanaco
        history_as_text instinwild_ch llamafactory_alpaca tigerbot_medical_qa tigerbot_sft
    """,
    "input": "belle_train_0.5M_CN_input_target firefly_train_1.1M",
    "sharegpt": "belle_train_3.5M_CN sharegpt",
    "coig_rounds": "coig_counterfactural_correction_multi_round_chat",
    "coig_exam": "coig_exam_instructions coig_human_value_alignment_instructions_part2",
    "coig_translated": "coig_translated_instructions",
    "conversation": "firefly_conversation sharegpt_cn",
    "hc3": "hc3_chinese",
    "instructionwild": "instructionwild_v2 instructionwild_v2_broken",
    "math23k": "math23k",
    "moss_002": "moss_002_sft",
    "moss_003": "moss_003_sft_no_tools moss_003_sft_plugin",
    "oasst_messages": "oasst1_messages",
    "oasst_trees": "oasst1_trees",
    "messages": "messages_as_text openai_messages turns_without_keys",
    "refgpt": "refgpt_fact",
    "prompt": "safety_prompts_typical trl_prompt_completion",
}
READER_OF_SAMPLE = {
    sample: reader for reader, samples in SAMPLES_OF_READER.items() for sample in samples.split()
}
SAMPLES = sorted(path for path in FORMATS.iterdir() if ".expected." not in path.name)


def stem_of(sample: Path) -> str:
    names = [name for name in READER_OF_SAMPLE if sample.name.startswith(f"{name}.")]
    return max(names, key=len)


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
    found = iter_conversations([sample], ReadOptions(fmt, bad_rows=bad_rows))
    assert [shown(result) for result, _ in found] == expected


def test_every_expected_file_has_its_sample() -> None:
    stems = {path.name.removesuffix(".expected.json") for path in FORMATS.glob("*.expected.json")}
    assert stems == set(READER_OF_SAMPLE) == {stem_of(sample) for sample in SAMPLES}
    assert len(SAMPLES) == 42
