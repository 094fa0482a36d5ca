"""The table of DeepSpeed's keys against DeepSpeed's own classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as of_deepspeed
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from qwen_ds.errors import UserError
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json, split_idle
from qwen_ds.recipe.deepspeed_keys import IDLE, OFF, ONLY, SCHEMA, SILENT

CLASSES = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": of_deepspeed.HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}


def at(name: str) -> Any:
    found: Any = SCHEMA
    for key in name.split("."):
        found = found[key]
    return found


@pytest.mark.parametrize("section", CLASSES)
def test_a_section_has_the_keys_of_deepspeeds_class(section: str) -> None:
    fields = CLASSES[section].model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    removed = {name for name in of_deepspeed._REMOVED_ZERO_CONFIG_KEYS if "zero" in section}
    assert {*at(section)} - removed == names


def test_removed_keys_are_known_as_such() -> None:
    removed = {*of_deepspeed._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    assert removed <= {name for name, (_, on_by_itself) in OFF.items() if on_by_itself}
    assert {*of_deepspeed._REMOVED_ZERO_CONFIG_KEYS} <= {
        name.removeprefix("zero_optimization.") for name in ONLY
    }


def test_every_rule_is_about_a_key_that_there_is() -> None:
    for name in (*IDLE, *ONLY, *OFF, *SILENT):
        assert at(name), name


def read(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps(content))
    return read_deepspeed_json(str(folder / "ds.json"))


def test_notes_and_nulls_are_left_out_at_every_level(tmp_path: Path) -> None:
    zero = {"stage": 2, "_why": "fits", "offload_param": None}
    found = read({"_comment": "mine", "zero_optimization": zero, "optimizer": None}, tmp_path)
    assert found == {"zero_optimization": {"stage": 2}}


def test_what_is_switched_off_is_left_out_without_a_word(tmp_path: Path) -> None:
    off = {name: {"enabled": False} for name in OFF}
    idle = {"activation_checkpointing": {"partition_activations": False}, "steps_per_print": 1}
    found = read(off | idle | {"dump_state": True}, tmp_path)
    assert split_idle(found) == ({"dump_state": True}, [])


def test_what_has_no_effect_is_left_out_and_named(tmp_path: Path) -> None:
    asked = {"comms_logger": {"enabled": True}, "checkpoint": {"load_universal": True}}
    rest, words = split_idle(read(asked | {"monitor_config": {"wandb": 1}}, tmp_path))
    assert rest == {} and [word.split()[0] for word in words] == [
        "comms_logger", "checkpoint", "monitor_config",
    ]  # fmt: skip


@pytest.mark.parametrize("inner", ["random_ltd", "anything"])
def test_a_switch_counts_however_deep_it_is(inner: str, tmp_path: Path) -> None:
    routing = {"enabled": False, "data_routing": {inner: {"enabled": True}}}
    with pytest.raises(UserError, match="data_efficiency is on"):
        read({"data_efficiency": routing}, tmp_path)
