"""Whatever peft or a run makes is merged and served as peft would load it: one reading for all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.adapter_asked import asked
from qwen_ds.model.adapter_loading import put_adapter
from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.shapes import state_shapes
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora import add_lora, config_of, write_adapter
from serve.engine.engine import ServingEngine
from serve.engine.loading import load_engine
from tests.export.folders import merge_with
from tests.serve.engine.test_engine import answers

SEEDS = range(24)
IDS = torch.tensor([[304, 5, 71, 9, 305, 88, 306, 2, 200, 17]])
PROMPTS = [[304, 5, 71, 9], [88, 2, 200, 17, 31, 306, 7], [305]]

SHORT = ["c_attn", "c_proj", "w1", "w2", "attn.c_proj", "mlp.c_proj", "h.1.mlp.w1", "lm_head"]
PATTERNS = [
    r".*\.(c_attn|w1)", r"transformer\.h\.[02]\..*(w1|w2)", "all-linear", "All-Linear",
    r"^(?!.*(?:visual|h\.1)).*(?:c_attn|c_proj)$", r".*h\.\d+\.mlp\.(w\d|c_proj)",
]  # fmt: skip
KEYS = ["c_attn", r"h\.1\..*", "transformer.h.0.mlp.w1", ".*w2", "no_such_module"]


def random_options(draw: random.Random) -> dict[str, Any]:
    """Options of a LoraConfig, out of everything that names modules or changes their arithmetic."""
    maybe = draw.choice
    targets = maybe([draw.sample(SHORT, draw.randint(1, 4)), maybe(PATTERNS)])
    ranks, alphas = ({k: draw.randint(1, 9) for k in draw.sample(KEYS, 2)} for _ in range(2))
    layers = draw.sample(range(3), draw.randint(1, 2)) if isinstance(targets, list) else []
    rows = draw.sample(range(306), 3)
    options = {
        "r": draw.randint(1, 8),
        "lora_alpha": maybe([1, 8, 12.5]),
        "target_modules": targets,
        "exclude_modules": maybe([None, None, ["h.1.attn.c_attn", "w2"], r".*\.2\..*"]),
        "rank_pattern": maybe([{}, ranks]),
        "alpha_pattern": maybe([{}, alphas]),
        "use_rslora": maybe([False, True]),
        "use_dora": maybe([False, False, True]),
        "bias": maybe(["none", "none", "all", "lora_only"]),
        "lora_dropout": maybe([0.0, 0.1]),
        "init_lora_weights": maybe([True, False, "gaussian"]),
        "ensure_weight_tying": maybe([False, True]),
        "modules_to_save": maybe([None, None, ["wte", "lm_head"], ["ln_1", "ln_f"], ["score"]]),
        "trainable_token_indices": maybe(
            [None, None, rows, {"wte": rows}, {"lm_head": rows, "transformer.wte": rows[:2]}]
        ),
    }
    if layers and draw.random() < 0.5:
        options["layers_to_transform"] = maybe([layers, layers[0]])
        options["layers_pattern"] = maybe([None, "h", ["layers", "h"]])
    return options


def made_by_peft(base: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Save an adapter of random values; a draw that peft itself refuses is drawn again."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        options = random_options(draw)
        model = QWenLMHeadModel.from_pretrained(str(base), dtype=torch.float32)
        try:
            wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
                wrapped(input_ids=IDS)
        except (ValueError, RuntimeError, TypeError):
            continue
        wrapped.save_pretrained(str(folder))
        return options


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def greedy(folder: Path, adapter: Path | None) -> list[list[int]]:
    return greedy_of(load_engine(folder, adapter, dtype="float32"))


def greedy_of(engine: ServingEngine, adapter: str | None = None) -> list[list[int]]:
    sampling = SamplingParams(max_new_tokens=12)
    rows = [Request(prompt, sampling, StopRule(), adapter) for prompt in PROMPTS]
    return [list(answer.ids) for answer in answers(engine, rows)]


# What a run of ours can train: options of the recipe, and the ids of its trainable token rows.
TRAINED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "lora": ({}, []),
    "rows": ({}, [304, 305, 306]),
    "rslora_and_rows": ({"variant": "rslora"}, [304, 305, 306]),
    "dora_and_rows": ({"variant": "dora"}, [304, 305, 306]),
    "whole_ends": ({"modules_to_save": ["wte", "lm_head"]}, []),
    "rslora_and_a_whole_head": ({"variant": "rslora", "modules_to_save": ["lm_head"]}, []),
}


MADE = [*SEEDS, *TRAINED]


def made_by_a_run(base: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Save an adapter of random values by the code that a run saves its own with."""
    options, row_ids = TRAINED[kind]
    recipe = LoraOptions(r=4, alpha=8, targets=["c_attn", "c_proj", "w1"], **options)
    model = QWenLMHeadModel.from_pretrained(str(base), dtype=torch.float32)
    wrapped = add_lora(model, recipe, base=str(base), seed=3, row_ids=row_ids)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(4)
    values = {n: p + 0.1 * torch.randn(p.shape, generator=draw) for n, p in trained.items()}
    write_adapter(folder, config_of(wrapped), values)
    return options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", MADE)
def test_any_adapter_is_served_as_peft_loads_it_and_merged_to_the_same_tokens(
    small_dir: Path, tmp_path: Path, made: int | str
) -> None:
    adapter = tmp_path / "adapter"
    if isinstance(made, int):
        options = made_by_peft(small_dir, adapter, made)
    else:
        options = made_by_a_run(small_dir, adapter, made)
    base = QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32)
    bare = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)).eval())
    ours = QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32)
    proven = put_adapter(ours, read_adapter(adapter)) or ours
    torch.testing.assert_close(logits(proven), expected, rtol=1e-5, atol=3e-5)
    assert not torch.equal(bare, expected), options

    report = merge_with(
        small_dir,
        [adapter],
        tmp_path / "merged",
        proof="sampled" if MADE.index(made) % 2 else "full",
    )
    assert report.verification is not None and report.verification.status == "passed", options
    merged = greedy(tmp_path / "merged", None)
    assert greedy(small_dir, adapter) == merged, options
    beside = load_engine(small_dir, adapters={"it": adapter}, dtype="float32")
    assert greedy_of(beside, "it") == merged, options
    assert greedy_of(beside) == greedy(small_dir, None), options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_peft_makes_is_what_its_configuration_asks_for(
    small_dir: Path, tmp_path: Path, seed: int
) -> None:
    options = made_by_peft(small_dir, tmp_path, seed)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = state_shapes(QWEN.config_class.from_pretrained(small_dir))
    wanted = asked(tmp_path, config, shapes)
    adapter = read_adapter(tmp_path)
    extra = {name for name, key in adapter.saved.items() if adapter.is_end(key)}
    assert set(wanted.targets) == adapter.pairs.keys(), options
    assert set(wanted.saved) | extra == set(adapter.saved), options
    assert wanted.token_rows == {m: r.indices for m, r in adapter.token_rows.items()}, options
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(adapter.shapes) + len(adapter.copies), options
