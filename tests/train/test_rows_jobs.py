"""Whole jobs on a base model: its control tokens' rows, or embedding and head whole, however the
job is spread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.job

# A parameter of any size is taken apart, and none is brought in before its module asks for it.
ZERO3 = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage": 3}
RUNS = {"rows": {"zero0": 1, "zero2": 2, "zero3": 2}, "whole": {"zero2": 1, "zero3": 2}}


@pytest.mark.parametrize("kind", ["rows", "whole"])
def test_what_is_trained_of_the_vocabulary_does_not_depend_on_the_stage(
    job: Callable, small_job: list[str], small_dir: Path, tmp_path: Path, kind: str
) -> None:
    """Steps of 33 of 100 rows: in the fourth, one of two ranks runs the dummy row. Blocks are
    recomputed (default)."""
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO3}))
    options = ["--model.path", str(base), "--batch.rows_per_step", "33", "--optim.max_steps", "5"]
    options += ["--lora.modules_to_save", "wte", "lm_head"] if kind == "whole" else []
    adapters = {}
    for stage, ranks in RUNS[kind].items():
        out = tmp_path / stage
        config = str(tmp_path / "zero3.json") if stage == "zero3" else f"ds_configs/{stage}.json"
        own = ["--deepspeed", config, "--output_dir", str(out)]
        run = job([*small_job, *options, *own], ranks).ok()
        assert ("lora.special_rows is on" in run.out) == (kind == "rows")
        recipe = yaml.safe_load((out / "recipe.yaml").read_text())
        assert recipe["lora"]["special_rows"] == ("on" if kind == "rows" else "off")
        adapters[stage] = load_file(out / "adapter" / "adapter_model.safetensors")
    reference = adapters.pop("zero0" if kind == "rows" else "zero2")
    start = load_file(base / "model.safetensors")
    suffix = ".token_adapter.trainable_tokens_delta" if kind == "rows" else ".weight"
    for module in ("transformer.wte", "lm_head"):
        name, before = f"base_model.model.{module}{suffix}", start[f"{module}.weight"]
        change = reference[name] - (before[304:307] if kind == "rows" else before)
        assert change.norm() > 1e-2
        for stage, adapter in adapters.items():
            assert adapter.keys() == reference.keys()
            assert (adapter[name] - reference[name]).norm() / change.norm() < 1e-4, (stage, name)
    for stage, adapter in adapters.items():
        for name in (n for n in reference if "lora_B" in n):  # zero at the start
            difference = (adapter[name] - reference[name]).norm()
            assert difference / reference[name].norm() < 1e-4, (stage, name)
