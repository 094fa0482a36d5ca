"""A merge in one line, and the folders to start from: adapters by peft, shards, pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_ds.export.build import ShowProgress
from qwen_ds.export.choices import Proof
from qwen_ds.export.merge import MergeOptions, merge
from qwen_ds.export.merge_report import MergeReport
from qwen_ds.model.modeling import QWenLMHeadModel


def merge_with(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    proof: Proof = "off",
    progress: ShowProgress | None = None,
    **options: Any,
) -> MergeReport:
    """Merge with these `MergeOptions`, by default without a proof."""
    return merge(base, adapters, output, MergeOptions(proof=proof, **options), progress)


def peft_adapter(base: Path, folder: Path, seed: int = 3, **options: Any) -> dict[str, Tensor]:
    """Save an adapter of random values, and return peft's own merge of it, by official names."""
    torch.manual_seed(seed)
    model = QWenLMHeadModel.from_pretrained(str(base), dtype=torch.float32)
    chosen = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["c_attn", "c_proj", "w1", "w2"],
        **options,
    }
    wrapped = get_peft_model(model, LoraConfig(**chosen))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(str(folder))
    return {
        name: tensor.detach() for name, tensor in wrapped.merge_and_unload().state_dict().items()
    }


def shard(folder: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    """Store `tensors` as num_shards files with an index, in place of the folder's single file."""
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    weight_map = {name: files[i % num_shards] for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0, "made_by": "someone"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_pickles(folder: Path) -> None:
    """The folder's safetensors file (or shards) as torch.save would have written them."""
    for path in sorted(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        renamed = (
            index.read_text().replace(".safetensors", ".bin").replace("model-", "pytorch_model-")
        )
        (folder / "pytorch_model.bin.index.json").write_text(renamed)
        index.unlink()


def bf16_copy(base: Path, folder: Path) -> Path:
    """The single-file checkpoint `base` with all weights in bf16."""
    shutil.copytree(base, folder)
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
