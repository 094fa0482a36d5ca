"""Full training: the same numbers under every stage, with and without offload, and a complete model
folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ds.model.folder import find_model
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.transformers_tokenizer import QWenTokenizer

RUNS = [(name, "float32") for name in ("zero2", "zero3", "zero2_offload", "zero3_offload")]
RUNS += [("zero2", "bfloat16"), ("zero3_offload", "bfloat16")]


@pytest.fixture(scope="module")
def folders(
    job: Callable, small_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Run folders of two steps on two ranks each."""
    parent = tmp_path_factory.mktemp("full_training")
    found = {}
    for config, dtype in RUNS:
        found[config, dtype] = out = parent / f"{config}_{dtype}"
        options = (
            f"--method full --model.path {small_dir} --data.train {rows_file} --output_dir {out} "
            f"--data.cache_dir {parent / 'cache'} --deepspeed ds_configs/{config}.json "
            f"--batch.rows_per_step 16 --batch.tokens_per_micro_batch 400 --optim.max_steps 2 "
            f"--optim.lr 1e-3 --model.dtype {dtype}"
        )
        job(options.split(), 2).ok()
    return found


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.job
def test_every_stage_trains_all_parameters_alike(
    folders: dict[tuple[str, str], Path], small_dir: Path
) -> None:
    """In fp32, where rounding hides nothing: within 1e-4 of the change that training made, for each
    tensor."""
    start = load_file(small_dir / "model.safetensors")
    reference = weights(folders["zero2", "float32"])
    assert reference.keys() == start.keys()
    for (config, dtype), folder in folders.items():
        if dtype == "float32":
            own = weights(folder)
            for k, t in reference.items():
                assert (own[k] - t).norm() < 1e-4 * (t - start[k]).norm(), (config, k)


@pytest.mark.job
@pytest.mark.parametrize(("config", "dtype"), RUNS)
def test_the_result_is_a_model_folder_like_the_base(
    folders: dict[tuple[str, str], Path], small_dir: Path, config: str, dtype: str
) -> None:
    """Every file of the base is there, every tensor has its official name and shape and has moved,
    and what was carried over is unchanged."""
    run = folders[config, dtype]
    model = run / "model"
    assert sorted(f.name for f in model.iterdir()) == sorted(f.name for f in small_dir.iterdir())
    assert all(f.stat().st_mode & 0o777 == 0o644 for f in model.iterdir())
    for name in ("generation_config.json", "qwen.tiktoken"):
        assert (model / name).read_bytes() == (small_dir / name).read_bytes()
    old, new = load_file(small_dir / "model.safetensors"), weights(run)
    assert {k: t.shape for k, t in new.items()} == {k: t.shape for k, t in old.items()}
    kind = getattr(torch, dtype)
    assert {t.dtype for t in new.values()} == {kind}
    assert [k for k in new if torch.equal(new[k], old[k].to(kind))] == []
    find_model(str(model))  # what every command of ours asks of a model
    loaded = QWenLMHeadModel.from_pretrained(model)
    assert loaded.dtype == kind and len(QWenTokenizer.from_pretrained(model)("abc").input_ids) > 0
    first, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
