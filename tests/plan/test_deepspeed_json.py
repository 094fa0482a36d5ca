"""The user's DeepSpeed JSON and the recipe: what fills what, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qwen_ds  # noqa: F401  registers the native classes
from qwen_ds.errors import UserError
from qwen_ds.plan.deepspeed_json import ResolvedConfig, resolve
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json as read_json
from qwen_ds.recipe.options import LoraOptions, ModelOptions, Recipe
from qwen_ds.train.lora import add_lora
from tests.jobs import ROOT
from tests.train.test_jobs import adapter, fresh_adapter, largest_difference

RECIPE = Recipe()
OURS = sorted((ROOT / "ds_configs").glob("*.json"))


def auto(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys, "auto")


def optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


# The official project's two files, as its users have them.
_OFFICIAL_COMMON: dict[str, Any] = {
    "fp16": {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16}
    | auto("enabled"),
    "bf16": auto("enabled"),
    **optimizer(**auto("lr", "betas", "eps", "weight_decay")),
    **scheduler("WarmupLR", **auto("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")),
    **auto("gradient_accumulation_steps", "gradient_clipping"),
    **auto("train_batch_size", "train_micro_batch_size_per_gpu"),
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
}
_ON_GPU = {"device": "none", "pin_memory": True}
_OFFICIAL_ZERO: dict[int, dict[str, Any]] = {
    2: {
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
    },
    3: {
        "offload_param": _ON_GPU,
        "sub_group_size": 1e9,
        **auto("reduce_bucket_size", "stage3_prefetch_bucket_size"),
        **auto("stage3_param_persistence_threshold"),
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
_OVERLAP = {"offload_optimizer": _ON_GPU, "overlap_comm": True, "contiguous_gradients": True}
OFFICIAL = {
    stage: _OFFICIAL_COMMON | {"zero_optimization": {"stage": stage} | _OVERLAP | section}
    for stage, section in _OFFICIAL_ZERO.items()
}


def settle(
    config: dict[str, Any], recipe: Recipe = RECIPE, keys: set[str] | None = None
) -> ResolvedConfig:
    return resolve(config, recipe, frozenset(keys or ()), hidden_size=4096, world=8)


def flat(value: Any) -> list[Any]:
    if not isinstance(value, dict):
        return [value]
    return [leaf for inner in value.values() for leaf in flat(inner)]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_official_files_resolve_without_any_auto_left(stage: int) -> None:
    result = settle(OFFICIAL[stage], keys={"optim.lr", "optim.schedule"})
    assert "auto" not in flat(result.engine_json) and result.stage == stage
    assert result.recipe == RECIPE, "a file full of auto leaves the recipe as it is"
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & result.engine_json.keys()
    assert result.engine_json["gradient_clipping"] == 1.0
    if stage == 3:
        zero = result.engine_json["zero_optimization"]
        assert zero["reduce_bucket_size"] == 4096**2
        assert zero["stage3_param_persistence_threshold"] == 10**6
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)


def test_the_json_fills_what_the_user_left_unset() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 8}
    block = {"gradient_clipping": 0.5, "train_batch_size": 64, "fp16": fp16}
    block |= optimizer(lr=1e-5, betas=[0.9, 0.95], weight_decay=0.1)
    result = settle(block | scheduler("WarmupCosineLR", warmup_num_steps=7))
    optim = result.recipe.optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (1e-5, (0.9, 0.95), 0.1)
    assert (optim.schedule, optim.warmup_steps, optim.max_grad_norm) == ("cosine", 7, 0.5)
    assert result.recipe.batch.rows_per_step == 64 and result.recipe.model.dtype == "float16"
    engine = result.engine_json
    assert engine["fp16"] == fp16
    assert (engine["train_batch_size"], engine["gradient_accumulation_steps"]) == (8, 1)


@pytest.mark.parametrize(
    ("config", "key", "named"),
    [
        (optimizer(lr=1.0), "optim.lr", "optimizer.params.lr"),
        ({"gradient_clipping": 9.0}, "optim.max_grad_norm", "gradient_clipping"),
        ({"train_batch_size": 100}, "batch.rows_per_step", "train_batch_size"),
        ({"fp16": {"enabled": True}}, "model.dtype", "fp16.enabled"),
        (scheduler("WarmupDecayLR", warmup_num_steps=1), "optim.schedule", "scheduler"),
    ],
)
def test_a_contradiction_names_both_keys(config: dict[str, Any], key: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        settle(config, keys={key})
    assert key in str(error.value)


def test_the_schedule_ends_where_the_json_says() -> None:
    block = scheduler("WarmupDecayLR", total_num_steps=260, **auto("warmup_max_lr"))
    assert settle(block).recipe.optim.decay_steps == 260
    assert settle(scheduler("WarmupDecayLR", total_num_steps=2.6e2)).recipe.optim.decay_steps == 260
    assert settle(scheduler("WarmupDecayLR", total_num_steps="auto")).recipe == RECIPE
    for kind, value in (("WarmupLR", 260), ("WarmupDecayLR", "many"), ("WarmupDecayLR", True)):
        with pytest.raises(UserError, match="total_num_steps"):
            settle(scheduler(kind, total_num_steps=value))


def test_defaults_of_deepspeeds_that_do_not_act_are_said() -> None:
    told = settle(scheduler("WarmupCosineLR", total_num_steps=9), keys=set()).remarks
    assert "warmup_num_steps; by itself DeepSpeed takes 1000" in told[0] and "0.0001" in told[0]
    params = {"warmup_num_steps": 2, "cos_min_ratio": 0, "warmup_type": "linear"}
    assert settle(scheduler("WarmupCosineLR", total_num_steps=9, **params)).remarks == ()
    assert "takes log" in settle(scheduler("WarmupLR", warmup_num_steps=2)).remarks[0]
    assert settle(OFFICIAL[2]).remarks == ("no effect here: steps_per_print (log.every_steps)",)


def test_explicit_batch_numbers_must_multiply_to_the_rows_of_a_step() -> None:
    good = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    assert settle(good).engine_json["train_micro_batch_size_per_gpu"] == 1
    half = good | {"gradient_accumulation_steps": 2}
    assert settle(half).recipe.batch.rows_per_step == 64, "unset in the recipe: the JSON says it"
    with pytest.raises(UserError, match="64.*batch.rows_per_step is 128"):
        settle(half, keys={"batch.rows_per_step"})
    with pytest.raises(UserError, match="not the 128 rows"):
        settle(half | {"train_batch_size": 128})
    with pytest.raises(UserError, match="7 x 8 ranks does not divide"):
        settle({"train_micro_batch_size_per_gpu": 7})


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "Lion"}},
        optimizer(lrr=1),
        {"scheduler": {"type": "OneCycle"}},
        scheduler("WarmupLR", warmup_num_steps=3, warmup_type="log"),
        {"zero_optimization": {"stage": 4}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"gradient_clipping": "one"},
        optimizer(lr="fast"),
        {"train_batch_size": "abc"},
    ],
)
def test_what_we_cannot_honour_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        settle(config)


def test_precision_sections_follow_what_is_trained() -> None:
    """LoRA on bf16: none, trainables are their own fp32 masters. Full bf16: both fp32 settings,
    either alone is not enough."""
    bf16 = {"bf16": {"enabled": True}}
    assert "bf16" not in settle(bf16).engine_json and "data_types" not in settle(bf16).engine_json
    full = settle(bf16, replace(RECIPE, method="full")).engine_json
    assert full["bf16"] == {"enabled": True}
    assert full["data_types"] == {"grad_accum_dtype": "fp32"}
    assert full["communication_data_type"] == "fp32"
    recipe = replace(RECIPE, method="full", model=ModelOptions(dtype="float32"))
    assert not {"bf16", "fp16"} & settle({}, recipe).engine_json.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"zero_optimisation": {}}', "nearest is 'zero_optimization'"),
        ("{", "not readable as JSON"),
        ("[1]", "expected an object"),
        ('{"zero_optimization": 2}', "zero_optimization is 2; expected an object"),
        ('{"bf16": true}', "bf16 is True; expected an object"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        read_json(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_json(str(tmp_path / "absent.json"))


def test_our_own_files_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_json("ds_configs/zero3.json")["zero_optimization"]["stage"] == 3


def test_every_file_of_ours_resolves() -> None:
    assert len(OURS) >= 7
    for file in OURS:
        result = settle(json.loads(file.read_text()))
        zero = result.engine_json["zero_optimization"]
        assert result.stage == int(file.stem[4]), file
        assert result.offload_optimizer == ("offload" in file.stem), file
        assert ("offload_param" in zero) == (file.stem == "zero3_offload")
        assert ("zero_hpz_partition_size" in zero) == ("hpz" in file.stem)


@pytest.mark.job
def test_every_file_of_ours_and_the_official_ones_give_the_numbers_of_zero_2(
    job: Callable, small_job: list[str], small_dir: Path, tmp_path: Path
) -> None:
    """Each started on two ranks: within 1e-4 of the change that training made. The official files
    run as they are."""
    files = list(OURS)
    for stage, content in OFFICIAL.items():
        files.append(tmp_path / f"official_zero{stage}.json")
        files[-1].write_text(json.dumps(content))
    for file in files:
        options = ["--deepspeed", str(file), "--output_dir", str(tmp_path / file.stem)]
        job([*small_job, *options, "--optim.max_steps", "2"], 2).ok()
    start, reference = fresh_adapter(small_dir), adapter(tmp_path / "zero2")
    runs = {file.stem: adapter(tmp_path / file.stem) for file in files}
    off = {name: largest_difference(reference, run, start) for name, run in runs.items()}
    assert max(off.values()) < 1e-4, off


@pytest.mark.parametrize("name", ["docs/training.md", "docs/zh/training.md"])
def test_the_tables_gigabytes_are_those_of_their_formula(name: str) -> None:
    """7B on 8 GPUs, hpZ on 2 machines of 8: what a stage spreads over the GPUs is divided by their
    number."""
    config = AutoConfig.for_model("qwen", vocab_size=151936, hidden_size=4096, num_hidden_layers=32,
                                  num_attention_heads=32, intermediate_size=22016)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = add_lora(model, LoraOptions(), base="", seed=0)
    base = sum(p.numel() for n, p in lora.named_parameters() if "lora_" not in n)
    adapter_size = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert (base, adapter_size) == (7_721_324_544, 10_158_080)
    row = r"^\| \[`(ds_configs/\w+\.json)`\].*\| (\S+) \| ([^|]+) \|$"
    rows = re.findall(row, (ROOT / name).read_text(), re.MULTILINE)
    assert len(rows) == len(OURS)
    for path, lora_gb, full_gb in rows:
        zero = settle(json.loads((ROOT / path).read_text())).engine_json["zero_optimization"]
        world = 16 if "zero_hpz_partition_size" in zero else 8
        share = [1 / world if zero["stage"] >= stage else 1.0 for stage in range(4)]
        on_gpu, kept = "offload_optimizer" not in zero, "offload_param" not in zero
        weights = 2 * base * share[3] * kept + 2 * base / 8 * (world == 16)
        trained = 4 * share[3] * kept + (4 * share[2] + 8 * share[1]) * on_gpu
        assert lora_gb == f"{(weights + trained * adapter_size) / 1e9:.1f}", path
        if zero["stage"]:
            state = (4 * share[2] + 12 * share[1]) * base * on_gpu
            assert full_gb == f"{(weights + state) / 1e9:.1f}", path


def test_hpz_takes_its_size_from_the_machines() -> None:
    hpz, key = read_json("ds_configs/zero3_hpz.json"), "zero_hpz_partition_size"

    def size(config: dict[str, Any], **machines: int) -> int:
        given = {"world": 16, "ranks_per_machine": 8} | machines
        found = resolve(config, RECIPE, frozenset(), hidden_size=64, **given)
        return found.engine_json["zero_optimization"][key]

    assert size(hpz) == 8 and size(hpz, world=2, ranks_per_machine=1) == 1
    assert size({"zero_optimization": {"stage": 3, key: 4}}) == 4, "the user's own number stays"
    with pytest.raises(UserError, match="zero_hpz_partition_size is 6.*divisor of the 16 ranks"):
        size({"zero_optimization": {"stage": 3, key: 6}})


def test_weights_are_quantised_only_where_they_can_and_should_be() -> None:
    """ "auto": in full training on a machine with the quantiser. What the user asks for is done or
    refused."""
    hpz, key = read_json("ds_configs/zero3_hpz.json"), "zero_quantized_weights"
    full = replace(RECIPE, method="full")
    for recipe, able, expected in ((full, True, True), (full, False, False), (RECIPE, True, False)):
        found = resolve(hpz, recipe, frozenset(), hidden_size=64, world=2, can_quantise=able)
        assert found.engine_json["zero_optimization"][key] is expected
    for name in (key, "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        asked = {"zero_optimization": {"stage": 3, name: True}}
        assert resolve(asked, RECIPE, frozenset(), hidden_size=64, world=2, can_quantise=True)
        with pytest.raises(UserError, match=f"{name} is true.*nvcc"):
            settle(asked)


@pytest.mark.parametrize("stage", OFFICIAL)
@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, method="full", optim=replace(RECIPE.optim, lr=1e-5))]
)
def test_what_is_stored_resolves_to_the_same_again(stage: int, recipe: Recipe) -> None:
    """Also with every key set, as a stored recipe.yaml sets them, and on another number of
    ranks."""
    first = settle(OFFICIAL[stage], recipe)
    sections = ("optim", "batch", "model")
    every_key = frozenset(f"{s}.{k}" for s in sections for k in vars(getattr(recipe, s)))
    again = resolve(first.stored_json(), first.recipe, every_key, hidden_size=4096, world=2)
    assert again.stored_json() == first.stored_json() and again.recipe == first.recipe


@pytest.mark.parametrize(
    ("method", "dtype", "stage"),
    [("lora", "bfloat16", 0), ("lora", "float16", 1), ("full", "bfloat16", 1)],
)
def test_stage_0_with_masters_of_deepspeeds_own_runs_as_stage_1(
    method: str, dtype: str, stage: int
) -> None:
    recipe = replace(RECIPE, method=method, model=ModelOptions(dtype=dtype))  # type: ignore[arg-type]
    result = settle({"zero_optimization": {"stage": 0}}, recipe)
    assert result.stage == result.engine_json["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("stage", "method", "overlaps"),
    [(1, "lora", False), (2, "lora", False), (3, "lora", True), (2, "full", True)],
)
def test_an_adapters_gradients_are_sent_without_making_the_cpu_wait(
    stage: int, method: str, overlaps: bool
) -> None:
    recipe = replace(RECIPE, method=method)  # type: ignore[arg-type]

    def resolved(config: dict[str, Any]) -> dict[str, Any]:
        return settle(config, recipe).engine_json

    found = resolved({"zero_optimization": {"stage": stage, **auto("overlap_comm")}})
    assert found["zero_optimization"]["overlap_comm"] is overlaps
    assert found["timers"] == {"throughput": {"enabled": False}}
    asked = {
        "zero_optimization": {"stage": stage, "overlap_comm": not overlaps},
        "timers": {"throughput": {"enabled": True}},
    }
    found = resolved(asked)
    assert found["zero_optimization"]["overlap_comm"] is not overlaps
    assert found["timers"] == asked["timers"]


def test_zero_3_keeps_an_adapter_whole_and_the_bases_matrices_in_shards() -> None:
    key = "stage3_param_persistence_threshold"

    def threshold(recipe: Recipe, hidden: int, **asked: Any) -> int:
        config = {"zero_optimization": {"stage": 3, **asked}}
        found = resolve(config, recipe, frozenset(), hidden_size=hidden, world=8)
        return found.engine_json["zero_optimization"][key]

    def rank(r: int) -> Recipe:
        return replace(RECIPE, lora=LoraOptions(r=r))

    assert threshold(RECIPE, 4096) == threshold(RECIPE, 4096, **auto(key)) == 10**6
    assert threshold(rank(128), 4096) == 3 * 4096 * 128, "B of c_attn"
    assert 3 * 64 * 8 <= threshold(RECIPE, 64) < 64**2, "attn.c_proj of a small model"
    full = replace(RECIPE, method="full")
    assert threshold(full, 4096, **auto(key)) == 40960
    assert threshold(RECIPE, 4096, **{key: 7}) == 7


@pytest.mark.parametrize("path", [None, "ds_configs/zero1.json", "ds_configs/zero2.json"])
def test_gradient_buckets_are_small_where_the_user_names_no_size(path: str | None) -> None:
    """DeepSpeed allocates two in fp32 whatever is trained, by default of 500 million numbers: 4
    GB."""
    zero = settle(read_json(path), replace(RECIPE, deepspeed=path)).engine_json["zero_optimization"]
    assert 2 * 4 * zero["reduce_bucket_size"] < 0.2e9
