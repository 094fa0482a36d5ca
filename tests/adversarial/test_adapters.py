"""Adapter folders, wrong, odd or hostile: merge, predict and lora.init_from read them alike.

The adapter that is right has LoRA of rank 4 on c_attn of the small model's three layers. A member
changes its configuration, its tensors or its files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adversarial.harness import Member, Place, check

P = "base_model.model."
C_ATTN = "transformer.h.{}.attn.c_attn"
A1, B1 = (f"{P}{C_ATTN.format(1)}.lora_{side}.weight" for side in "AB")
WTE, HEAD = f"{P}transformer.wte.weight", f"{P}lm_head.weight"
ROWS = f"{P}transformer.wte.token_adapter.trainable_tokens_delta"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RIGHT = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    "target_modules": ["c_attn"], "bias": "none", "base_model_name_or_path": "base",
}  # fmt: skip
Change = Callable[[Path], object]


def adapter(
    place: Place, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None,
    name: str = "adapter",
) -> Path:  # fmt: skip
    """The right adapter with these options (... drops one) and tensors (None drops one)."""
    draw = torch.Generator().manual_seed(1)
    values: dict[str, Tensor | None] = {}
    for i in range(3):
        values[f"{P}{C_ATTN.format(i)}.lora_A.weight"] = torch.randn(4, 64, generator=draw) / 8
        values[f"{P}{C_ATTN.format(i)}.lora_B.weight"] = torch.randn(192, 4, generator=draw) / 50
    stored = {k: v for k, v in {**values, **(tensors or {})}.items() if v is not None}
    folder = place.here / name
    folder.mkdir(parents=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    options = {k: v for k, v in {**RIGHT, **(config or {})}.items() if v is not ...}
    (folder / CONFIG).write_text(json.dumps(options))
    return folder


def merge(place: Place, folder: Path | str, *more: str) -> Sequence[str | Path]:
    return [
        "merge", "--base", place.base(), "--adapter", folder, "--output", place.out / "merged",
        "--verify", "off", *more,
    ]  # fmt: skip


def predict(place: Place, folder: Path | str, *more: str) -> Sequence[str | Path]:
    return [
        "predict", "--model", place.base(), "--adapter", folder, "--input",
        place.rows({"content": "q", "summary": "a"}), "--output", place.out / "answers.jsonl",
        "--max_new_tokens", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def plan(place: Place, folder: Path | str, *more: str) -> Sequence[str | Path]:
    return [
        "plan", "--model.path", place.base(), "--lora.init_from", folder, "--lora.r", "4",
        "--lora.alpha", "8", "--lora.targets", "[c_attn]", "--lora.special_rows", "off",
        "--device", "cpu", *more,
    ]  # fmt: skip


COMMANDS = {"merge": merge, "predict": predict, "plan": plan}


def config(**options: Any) -> Callable[[Place], Path]:
    return lambda place: adapter(place, options)


def tensors(changes: Mapping[str, Tensor | None], **options: Any) -> Callable[[Place], Path]:
    return lambda place: adapter(place, options, changes)


def files(change: Change) -> Callable[[Place], Path]:
    """The right adapter with its files changed."""

    def make(place: Place) -> Path:
        change(folder := adapter(place))
        return folder

    return make


def rewrite(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(content)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def header(folder: Path, length: int, text: str = "") -> None:
    rewrite(folder, WEIGHTS, length.to_bytes(8, "little") + text.encode())


def spelled(folder: Path, text: str) -> None:
    header(folder, len(text), text)


def pickled(folder: Path, keep_config: bool = True) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    if not keep_config:
        (folder / CONFIG).unlink()


ONE = torch.ones(4, 64)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
EMPTY = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
SLOW = r"(\w|\w\w|.)*[^\w.]"
LACK, UNASKED, BROKEN = "the weights lack", "the weights hold", "simple regular expression"
Bad = Mapping[str, tuple[Callable[[Place], Path], Sequence[str]]]

# What the configuration asks for and the file lacks, and the other way round.
DISAGREE: Bad = {
    "saved_missing": (config(modules_to_save=["wte", "lm_head"]), (LACK, "modules_to_save")),
    "head_missing": (
        tensors({WTE: torch.ones(512, 64)}, modules_to_save=["wte", "lm_head"]),
        (LACK, "lm_head.weight", "modules_to_save"),
    ),
    "norms_missing": (config(modules_to_save=["ln_1"]), (LACK, "h.0.ln_1.weight")),
    "rows_missing": (
        config(trainable_token_indices={"transformer.wte": [304, 305]}),
        (LACK, "wte.token_adapter", "trainable_token_indices"),
    ),
    "rows_missing_short": (config(trainable_token_indices=[304]), (LACK, "token_adapter")),
    "layer_missing": (tensors({A1: None, B1: None}), (LACK, A1, "target_modules")),
    "target_missing": (config(target_modules=["c_attn", "w1"]), (LACK, "h.0.mlp.w1.lora_A")),
    "all_linear_missing": (config(target_modules="all-linear"), (LACK, "attn.c_proj.lora_A")),
    "pattern_missing": (config(target_modules=r".*(c_attn|w2)"), (LACK, "mlp.w2.lora_A")),
    "bias_missing": (config(bias="all"), (LACK, "c_attn.bias", "bias in")),
    "bias_of_lora_missing": (config(bias="lora_only"), (LACK, "c_attn.bias")),
    "partner_missing": (tensors({B1: None}), ("has no lora_B beside it",)),
    "dora_missing": (config(use_dora=True), ("comes without lora_magnitude_vector",)),
    "dora_unasked": (
        tensors({B1.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(192)}),
        ("comes with lora_magnitude_vector",),
    ),
    "layers_to_transform": (config(layers_to_transform=[0], layers_pattern="h"), (UNASKED, A1)),
    "excluded": (config(exclude_modules=["h.1.attn.c_attn"]), (UNASKED, A1)),
    "excluded_by_pattern": (config(exclude_modules=r".*\.1\..*"), (UNASKED, A1)),
    "module_unasked": (
        tensors({k.replace("attn.c_attn", "mlp.w1"): t for k, t in (
            (A1, ONE), (B1, torch.ones(176, 4)))}),
        (UNASKED, "mlp.w1.lora_A"),
    ),
    "norm_unasked": (
        tensors({f"{P}transformer.ln_f.weight": torch.ones(64)}), (UNASKED, "ln_f.weight"),
    ),
    "bias_unasked": (
        tensors({f"{P}{C_ATTN.format(0)}.bias": torch.ones(192)}), (UNASKED, "c_attn.bias"),
    ),
    "saved_unasked": (
        tensors({f"{P}lm_head.modules_to_save.default.weight": torch.ones(512, 64)}),
        (UNASKED, "lm_head.weight"),
    ),
    "rows_unasked": (tensors({ROWS: torch.ones(2, 64)}), ("lists none for it",)),
    "rows_of_another_number": (
        tensors({ROWS: torch.ones(2, 64)}, trainable_token_indices={"wte": [1, 2, 3]}),
        ("replaces 2 rows", "lists 3"),
    ),
    "row_beyond_the_vocabulary": (
        tensors({ROWS: torch.ones(2, 64)}, trainable_token_indices={"wte": [1, 900]}),
        ("row 900", "512 rows"),
    ),
    "rows_of_a_scalar": (
        tensors({ROWS: torch.ones(())}, trainable_token_indices=[1]), ("a row for each token",),
    ),
    "copy_of_another_base": (
        tensors({
            f"{P}lm_head.base_layer.weight": torch.ones(512, 64),
            f"{P}lm_head.lora_A.weight": ONE, f"{P}lm_head.lora_B.weight": torch.ones(512, 4),
        }, target_modules=["c_attn", "lm_head"]),
        ("its copy of lm_head.weight differs",),
    ),
    "copy_of_another_shape": (
        tensors({
            f"{P}lm_head.base_layer.weight": torch.ones(500, 64),
            f"{P}lm_head.lora_A.weight": ONE, f"{P}lm_head.lora_B.weight": torch.ones(512, 4),
        }, target_modules=["c_attn", "lm_head"]),
        ("its copy of lm_head.weight is [500, 64]; expected [512, 64]",),
    ),
    "saved_head_of_another_shape": (
        tensors({HEAD: torch.ones(500, 64)}, modules_to_save=["lm_head"]),
        ("lm_head.weight is [500, 64]; expected [512, 64]",),
    ),
    "saved_head_of_whole_numbers": (
        tensors({HEAD: torch.ones(512, 64, dtype=torch.int32)}, modules_to_save=["lm_head"]),
        ("lm_head.weight has dtype I32",),
    ),
    "other_kind_of_model": (config(target_modules=["q_proj", "v_proj"]), ("names no module",)),
    "targets_a_block": (config(target_modules=["c_attn", "mlp"]), ("no linear layer",)),
    "targets_the_embedding": (config(target_modules=["c_attn", "wte"]), ("the embedding",)),
    "rows_of_a_linear_layer": (config(trainable_token_indices={"w1": [1]}), ("mlp.w1", "wte")),
    "rows_of_no_module": (config(trainable_token_indices={"embed": [1]}), ("no module",)),
    "rows_and_saved": (
        tensors({WTE: torch.ones(512, 64)}, modules_to_save=["wte"],
                trainable_token_indices={"wte": [1]}),
        ("transformer.wte",),
    ),
    "other_rank": (config(r=5), ("expected rank 5",)),
    "other_rank_by_pattern": (config(rank_pattern={r"h\.1\..*": 2}), ("expected rank 2",)),
    "other_width": (tensors({A1: torch.ones(4, 65)}), ("[4, 65]", "[4, 64]")),
}  # fmt: skip

# Options that can't be honoured, and values that peft would not have written.
OPTIONS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    **{
        f"{name}": ({name: value}, (name,))
        for name, value in {
            "use_qalora": True, "lora_bias": True, "target_parameters": ["x"], "fan_in_fan_out": 1,
            "megatron_config": {"a": 1}, "arrow_config": {"top_k": 1}, "kasa_config": {"a": 1},
            "monteclora_config": {"a": 1}, "velora_config": {"a": 1}, "use_bdlora": {"a": 1},
            "alora_invocation_tokens": [1], "layer_replication": [[0, 1]], "enable_lora": [True],
        }.items()
    },
    **{
        f"init_{name}": ({"init_lora_weights": name}, ("init_lora_weights", name))
        for name in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "newest")
    },
    **{
        f"r_{str(r)[:12]}": ({"r": r}, ("r is", "whole number"))
        for r in (0, -1, True, 1.5, "8", None, 10**12, 10**400, float("nan"), [8])
    },
    **{
        f"alpha_{str(alpha)[:12]}": ({"lora_alpha": alpha}, ("lora_alpha is",))
        for alpha in (0, -8, True, "16", None, 1e9, float("nan"), float("inf"), 10**400)
    },
    "rank_pattern_list": ({"rank_pattern": [1]}, ("rank_pattern",)),
    "rank_pattern_text": ({"rank_pattern": {"c_attn": "4"}}, ("rank_pattern",)),
    "rank_pattern_zero": ({"rank_pattern": {"c_attn": 0}}, ("rank_pattern",)),
    "alpha_pattern_nan": ({"alpha_pattern": {"c_attn": float("nan")}}, ("alpha_pattern",)),
    "rank_pattern_endless": (
        {"rank_pattern": {f"w{i}": 2 for i in range(100_000)}}, ("100000 patterns", "at most 1000"),
    ),
    "dora_text": ({"use_dora": "false"}, ("use_dora", "true or false")),
    "rslora_number": ({"use_rslora": 1}, ("use_rslora", "true or false")),
    "bias_text": ({"bias": "some"}, ("bias", "lora_only")),
    "bias_list": ({"bias": []}, ("bias",)),
    "no_targets": ({"target_modules": None}, ("target_modules is None",)),
    "empty_targets": ({"target_modules": []}, ("target_modules",)),
    "numbers_as_targets": ({"target_modules": [1]}, ("target_modules",)),
    "object_as_targets": ({"target_modules": {"c_attn": 1}}, ("target_modules",)),
    "empty_name_excluded": ({"exclude_modules": [""]}, ("exclude_modules",)),
    "saved_text": ({"modules_to_save": "wte"}, ("modules_to_save",)),
    "saved_pattern": ({"modules_to_save": [".*"]}, ("modules_to_save",)),
    "layer_negative": ({"layers_to_transform": [-1]}, ("layers_to_transform",)),
    "layer_text": ({"layers_to_transform": "0"}, ("layers_to_transform",)),
    "layer_bool": ({"layers_to_transform": [True]}, ("layers_to_transform",)),
    "layers_pattern_alone": ({"layers_pattern": "h"}, ("layers_pattern",)),
    "layers_pattern_regex": (
        {"layers_to_transform": 0, "layers_pattern": "(h|x)*"}, ("layers_pattern",),
    ),
    "layers_pattern_endless": (
        {"layers_to_transform": 0, "layers_pattern": [f"k{i}" for i in range(99_000)]},
        ("layers_pattern is", "at most 100 names"),
    ),
    "targets_endless": (
        {"target_modules": [f"k{i}" for i in range(99_000)]}, ("at most 10000",),
    ),
    "layers_beside_a_pattern": (
        {"layers_to_transform": 0, "target_modules": ".*c_attn"}, ("target_modules",),
    ),
    "rows_negative": ({"trainable_token_indices": [-1]}, ("trainable_token_indices",)),
    "rows_twice": ({"trainable_token_indices": [3, 3]}, ("trainable_token_indices",)),
    "rows_text": ({"trainable_token_indices": "304"}, ("trainable_token_indices",)),
    "rows_bool": ({"trainable_token_indices": {"wte": [True]}}, ("trainable_token_indices",)),
    "other_method": ({"peft_type": "LOHA"}, ("'LOHA'", "'LORA'")),
    "method_list": ({"peft_type": ["LORA"]}, ("peft_type",)),
    "no_method": ({"peft_type": ...}, ("peft_type",)),
    "classifier": ({"task_type": "SEQ_CLS"}, ("SEQ_CLS", "CAUSAL_LM")),
    **{
        f"slow_{option}": ({option: {SLOW: 4} if option.endswith("n") else SLOW}, ("takes more",))
        for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    },
    "broken_targets": ({"target_modules": "(c_attn"}, (BROKEN,)),
    "broken_key": ({"rank_pattern": {"c_attn)|(x": 4}}, (BROKEN,)),
    "long_pattern": ({"target_modules": "x" * 100_000}, (BROKEN,)),
    "counting_pattern": ({"exclude_modules": "((.?){1000}){1000}"}, (BROKEN,)),
    "fuzzy_pattern": ({"target_modules": ".*c_attn{e<=3}"}, (BROKEN,)),
}  # fmt: skip

FILES: Bad = {
    "no_config": (files(lambda a: (a / CONFIG).unlink()), (CONFIG,)),
    "no_weights": (files(lambda a: (a / WEIGHTS).unlink()), (WEIGHTS,)),
    "empty_folder": (lambda place: _made(place.here / "adapter"), ("adapter", WEIGHTS)),
    "a_file": (lambda place: adapter(place) / WEIGHTS, ("not a folder", CONFIG)),
    "nowhere": (lambda place: place.here / "nowhere", ("no such folder",)),
    "a_model": (lambda place: place.base("model"), (WEIGHTS,)),
    "config_not_json": (files(lambda a: rewrite(a, CONFIG, b"{")), (CONFIG, "JSON")),
    "config_with_a_bom": (files(lambda a: rewrite(a, CONFIG, b"\xef\xbb\xbf{}")), (CONFIG, "BOM")),
    "config_deep": (files(lambda a: rewrite(a, CONFIG, b"[" * 10**6)), (CONFIG, "too deeply")),
    "config_of_40_mb": (files(lambda a: os.truncate(a / CONFIG, 40 << 20)), (CONFIG, "32 MiB")),
    "header_deep": (files(lambda a: header(a, 10**6, "[" * 10**6)), (WEIGHTS, "header")),
    "config_a_list": (files(lambda a: rewrite(a, CONFIG, b"[]")), (CONFIG, "object")),
    "config_of_bytes": (files(lambda a: rewrite(a, CONFIG, b"\xff\xfe{}")), (CONFIG,)),
    "config_a_pipe": (files(lambda a: pipe(a, CONFIG)), (CONFIG, "FIFO")),
    "config_a_folder": (
        files(lambda a: ((a / CONFIG).unlink(), (a / CONFIG).mkdir())), (CONFIG, "a folder"),
    ),
    "config_of_lfs": (files(lambda a: rewrite(a, CONFIG, LFS)), ("git lfs pull",)),
    "config_dangles": (files(lambda a: link(a, CONFIG, "nothing")), (CONFIG, "No such file")),
    "weights_a_pipe": (files(lambda a: pipe(a, WEIGHTS)), (WEIGHTS, "FIFO")),
    "weights_a_device": (files(lambda a: link(a, WEIGHTS, "/dev/zero")), (WEIGHTS, "device")),
    "weights_of_lfs": (files(lambda a: rewrite(a, WEIGHTS, LFS)), (WEIGHTS, "git lfs pull")),
    "weights_cut": (files(lambda a: os.truncate(a / WEIGHTS, 3000)), (WEIGHTS, "cut off")),
    "weights_empty": (files(lambda a: rewrite(a, WEIGHTS, b"")), (WEIGHTS,)),
    "weights_text": (files(lambda a: rewrite(a, WEIGHTS, b"not found" * 9)), (WEIGHTS,)),
    "header_of_20_gb": (files(lambda a: header(a, 20 * 2**30)), (WEIGHTS, "header")),
    "header_not_json": (files(lambda a: header(a, 4, "{{{{")), (WEIGHTS, "header")),
    "no_tensors": (files(lambda a: header(a, 2, "{}")), ("no tensor",)),
    "negative_shape": (
        files(lambda a: header(a, 63, '{"x":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}}'
                               + " " * 8 + "0" * 16)),
        (WEIGHTS, "safetensors file"),
    ),
    "integers": (tensors({A1: torch.ones(4, 64, dtype=torch.int8)}), ("dtype I8", "BF16")),
    "float8": (tensors({A1: ONE.to(torch.float8_e4m3fn)}), ("dtype F8_E4M3", "BF16")),
    "empty_tensor": (tensors({A1: torch.zeros(0)}), ("ZeRO-3",)),
    "unknown_tensor": (tensors({f"{P}model.layers.0.q_proj.lora_A.weight": ONE}), ("q_proj",)),
    "embedding_lora": (
        tensors({f"{P}transformer.wte.lora_embedding_{side}": ONE.clone() for side in "AB"}),
        ("wte.lora_embedding_A is LoRA on the embedding, which is not supported",),
    ),
    "surrogate_in_a_name": (
        files(lambda a: spelled(a, f'{{"\\ud800x":{{{EMPTY}}}}}')),
        (WEIGHTS, "expected a whole safetensors file"),
    ),
    "surrogate_in_metadata": (
        files(lambda a: spelled(a, '{"__metadata__":{"format":"pt","by":"\\udfff"}}')),
        (WEIGHTS, "expected a whole safetensors file"),
    ),
    "a_header_with_nan": (
        files(lambda a: spelled(a, f'{{"x":{{{EMPTY},"y":NaN}}}}')),
        (WEIGHTS, "expected a whole safetensors file"),
    ),
    "two_adapters": (tensors({A1.replace("A.w", "A.x.w"): ONE}), ("are the same tensor",)),
    "pickle": (files(pickled), ("a pickle", "allow_pickle true")),
    "pickle_alone": (files(lambda a: pickled(a, keep_config=False)), ("allow_pickle true",)),
    "pickle_of_lfs": (
        files(lambda a: ((a / WEIGHTS).unlink(), (a / "adapter_model.bin").write_bytes(LFS))),
        ("adapter_model.bin", "git lfs pull"),
    ),
    "run_without_a_result": (
        lambda place: adapter(place, name="run/checkpoints/step_000002/adapter").parents[2],
        ("no final adapter", "step_000002/adapter"),
    ),
    "trainer_without_a_result": (
        lambda place: adapter(place, name="run/checkpoint-500").parent,
        ("no final adapter", "checkpoint-500"),
    ),
}  # fmt: skip


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# Each member by one command in turn, so that every kind meets all of them.
MEMBERS: Bad = {**DISAGREE, **{k: (config(**o), s) for k, (o, s) in OPTIONS.items()}, **FILES}
TURNS = [(name, list(COMMANDS)[i % 3]) for i, name in enumerate(MEMBERS)]
# Those that the three once took differently, by all of them.
ALL = [
    "copy_of_another_shape", "saved_head_of_another_shape", "saved_missing", "rows_missing",
    "layer_missing", "layers_to_transform", "excluded",
]  # fmt: skip
TURNS += [(name, command) for name in ALL for command in COMMANDS if (name, command) not in TURNS]
# The planner compares names and shapes; a copy's values need the base's.
TURNS = [(n, "merge" if (n, c) == ("copy_of_another_base", "plan") else c) for n, c in TURNS]


@pytest.mark.parametrize(("name", "command"), TURNS, ids=lambda value: str(value)[:40])
def test_a_wrong_adapter_is_one_line_that_names_what_is_wrong(
    name: str, command: str, tmp_path: Path, small_dir: Path
) -> None:
    make, says = MEMBERS[name]
    member = Member(name, lambda place: COMMANDS[command](place, make(place)), says=says)
    check(member, tmp_path, small_dir)


RUN = "run/adapter"
CHECKPOINT = "run/checkpoints/step_000002"
# Odd and right: what is said, and the options that allow it.
PASS: Mapping[str, tuple[Callable[[Place], Path], Sequence[str], Sequence[str]]] = {
    "right": (adapter, (), ()),
    "a_run": (lambda place: adapter(place, name=RUN).parent, (RUN,), ()),
    "a_checkpoint": (
        lambda place: adapter(place, name=f"{CHECKPOINT}/adapter").parent, (CHECKPOINT,), (),
    ),
    "pickle": (files(pickled), (), ("--allow_pickle", "true")),
    "layers_of_a_list": (config(layers_to_transform=[0, 1, 2, 9], layers_pattern=["h"]), (), ()),
    "excluded_by_chance": (config(exclude_modules=["w1"]), (), ()),
    "a_module_of_another_model": (config(modules_to_save=["score"]), ("names score",), ()),
    "a_key_for_nothing": (
        config(rank_pattern={"w9": 2}), ("rank_pattern names no module with LoRA by w9",), (),
    ),
    "keys_for_nothing": (
        config(alpha_pattern={f"w{i}": 2 for i in range(3, 503)}), ("by w3 and 499 more",), (),
    ),
    "an_option_of_tomorrow": (config(use_zora=True), ("does not know it: use_zora",), ()),
    "no_rows": (config(trainable_token_indices=[]), (), ()),
    "no_rows_of_a_module": (config(trainable_token_indices={"wte": []}), (), ()),
    "no_rows_of_no_module": (config(trainable_token_indices={}), (), ()),
    "an_empty_tensor_for_no_rows": (
        tensors({ROWS: torch.zeros(0, 64)}, trainable_token_indices=[]), (), (),
    ),
    "eva": (config(init_lora_weights="eva"), (), ()),
    "half": (tensors({A1: ONE.half() / 9, B1: torch.ones(192, 4).bfloat16() / 99}), (), ()),
    "linked_files": (
        files(lambda a: ((a / WEIGHTS).rename(a / "blob"), (a / WEIGHTS).symlink_to("blob"))),
        (), (),
    ),
    "look_ahead": (config(target_modules=r"^(?!.*visual).*c_attn"), (), ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "command"), [(name, list(COMMANDS)[i % 3]) for i, name in enumerate(PASS)]
)
def test_an_odd_adapter_that_is_right_passes_and_says_what_is_not_read(
    name: str, command: str, tmp_path: Path, small_dir: Path
) -> None:
    make, says, more = PASS[name]
    allow = [word.replace("--", "--lora.") for word in more] if command == "plan" else more
    member = Member(name, lambda place: COMMANDS[command](place, make(place), *allow), 0, says)
    check(member, tmp_path, small_dir)


@pytest.mark.parametrize("command", ["merge", "predict", "adapter_only"])
@pytest.mark.parametrize("value", [float("nan"), 1e300], ids=str)
def test_values_that_are_not_finite_are_named(
    value: float, command: str, tmp_path: Path, small_dir: Path
) -> None:
    def make(place: Place) -> Sequence[str | Path]:
        folder = tensors({B1: torch.full((192, 4), value, dtype=torch.float64)})(place)
        if command != "adapter_only":
            return COMMANDS[command](place, folder)
        return [
            "merge", "--base", place.base(), "--adapter", folder, "--format", "qwen2",
            "--adapter_only", "true", "--output", place.out / "adapter",
        ]  # fmt: skip

    check(Member("nan", make, says=("h.1.attn.c_attn", "NaN")), tmp_path, small_dir)


# What an allowed pickle may still not hold.
PICKLES: dict[str, tuple[Any, Sequence[str]]] = {
    "a_sparse_tensor": ({A1: ONE.to_sparse()}, ("is no plain tensor (cpu, torch.sparse_coo)",)),
    "no_values": ({A1: ONE.to("meta")}, ("is no plain tensor (meta",)),
    "numbers_for_names": ({1: ONE}, ("holds a Tensor under '1'",)),
    "another_pickle": ({"state_dict": {A1: ONE}}, ("holds a dict under 'state_dict'",)),
    "complex_numbers": ({A1: ONE.to(torch.complex64)}, ("has dtype torch.complex64",)),
    "a_function": ({A1: os.getcwd}, ("not a whole file of plain tensors",)),
}


@pytest.mark.parametrize(
    ("name", "command"), [(name, list(COMMANDS)[i % 3]) for i, name in enumerate(PICKLES)]
)
def test_an_allowed_pickle_holds_plain_tensors_by_name(
    name: str, command: str, tmp_path: Path, small_dir: Path
) -> None:
    content, says = PICKLES[name]

    def make(place: Place) -> Sequence[str | Path]:
        (folder := adapter(place)).joinpath(WEIGHTS).unlink()
        torch.save(content, folder / "adapter_model.bin")
        allow = "--lora.allow_pickle" if command == "plan" else "--allow_pickle"
        return COMMANDS[command](place, folder, allow, "true")

    check(Member(name, make, says=says), tmp_path, small_dir)
