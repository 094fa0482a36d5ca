"""Merge an adapter of rank 64 into random weights of Qwen-7B's shape, beside `cp` and peft's merge.

    python tests/benchmarks/merge.py --folder DIR [--layers 32] [--peft true]

Needs three times the checkpoint on the disk of DIR (32 layers: 48 GB) and deletes what it made.
Before each timed part the base leaves the page cache, and what earlier parts wrote is on the disk.
Prints one line for each part.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_ds.disk.weights import TensorSpec
from qwen_ds.errors import UserError
from qwen_ds.export.proof.verify import available_memory
from qwen_ds.export.stream.blocks import BlockWriter
from qwen_ds.recipe.parser import Parser
from qwen_ds.runlog import run_command

NUM_SHARDS = 8
TABLE = 2**24  # random values, drawn once


@dataclass(frozen=True)
class Shape:
    """Of Qwen-7B, but for its depth."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    inner: int = 11008
    vocab: int = 151936
    rank: int = 64

    def tensors(self) -> dict[str, tuple[int, ...]]:
        h, found = self.hidden, {"transformer.wte.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            block = {
                "ln_1.weight": (h,), "attn.c_attn.weight": (3 * h, h), "attn.c_attn.bias": (3 * h,),
                "attn.c_proj.weight": (h, h), "ln_2.weight": (h,), "mlp.w1.weight": (self.inner, h),
                "mlp.w2.weight": (self.inner, h), "mlp.c_proj.weight": (h, self.inner),
            }  # fmt: skip
            found |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
        return found | {"transformer.ln_f.weight": (h,), "lm_head.weight": (self.vocab, h)}


CHILD = """
import json, resource, sys, time
from pathlib import Path

def kib(name):
    lines = [line.split() for line in open("/proc/self/status")]
    return next(int(line[1]) for line in lines if line[0] == name + ":")

def measured(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
    used = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    result = work()
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    peak_mib = (kib("VmHWM") - imports) / 1024
    return result, {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib}

base, adapter, output = map(Path, sys.argv[2:5])
"""
OURS = (
    CHILD
    + """
import torch
from qwen_ds.export.proof.verify import verify_merge
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.export.formats import QWEN_FORMAT
from qwen_ds.export.merge import MergeOptions, merge
from qwen_ds.export.merge_plan import make_plan
from qwen_ds.model.adapter import read_adapter

torch.zeros(64, 64).addmm_(torch.ones(64, 64), torch.ones(64, 64))
imports = kib("VmRSS")
report, merged = measured(lambda: merge(base, [adapter], output, MergeOptions(proof="off")))
plan = make_plan(base, Adapters((read_adapter(adapter),)), QWEN_FORMAT, "keep", False)
proof, proven = measured(lambda: verify_merge(plan, output, "sampled"))
merged |= {"changed": len(report.changed), "untouched": report.untouched}
proven |= {"status": proof.status, "reason": proof.reason}
proven |= {"top1": proof.top1_agreement, "top1_noise": proof.top1_noise}
print(json.dumps({"merge": merged, "sampled proof": proven}))
"""
)
PEFT = (
    CHILD
    + """
import torch
import qwen_ds
from peft import PeftModel
from transformers import AutoModelForCausalLM

imports = kib("VmRSS")

def work():
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(str(output))

print(json.dumps({"peft": measured(work)[1]}))
"""
)


def make_base(folder: Path, shape: Shape, vocabulary: Path) -> int:
    """A checkpoint of random bf16 weights; returns the bytes of its weight files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(TABLE, generator=generator) * 0.02).bfloat16()
    tensors = shape.tensors()
    total = sum(math.prod(size) for size in tensors.values())
    shards: list[list[TensorSpec]] = [[]]
    placed = 0
    for name, size in tensors.items():
        if placed >= len(shards) * total / NUM_SHARDS:
            shards.append([])
        shards[-1].append(TensorSpec(name, "BF16", size))
        placed += math.prod(size)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, specs in zip(files, shards, strict=True):
        with BlockWriter(folder / file, specs, {"format": "pt"}) as writer:
            for spec in specs:
                left = spec.num_rows * spec.items_per_row
                while left:
                    first = int(torch.randint(TABLE // 2, (), generator=generator))
                    block = table[first : first + min(left, TABLE // 2)].clone()
                    if len(spec.shape) == 1 and "ln" in spec.name:
                        block.fill_(1.0)
                    writer.write(block.view(torch.uint8).numpy().data)
                    left -= block.numel()
    weight_map = {
        spec.name: file for file, specs in zip(files, shards, strict=True) for spec in specs
    }
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "kv_channels": shape.hidden // shape.heads,
        "intermediate_size": 2 * shape.inner, "seq_length": 8192,
        "max_position_embeddings": 32768, "bf16": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(vocabulary, folder / "qwen.tiktoken")
    return sum((folder / file).stat().st_size for file in files)


def make_adapter(folder: Path, shape: Shape) -> None:
    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for name, size in shape.tensors().items():
        if len(size) == 2 and ".h." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(shape.rank, size[1]) / size[1] ** 0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(size[0], shape.rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["c_attn", "c_proj", "w1", "w2"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": shape.rank,
        "lora_alpha": 16,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def settle(base: Path) -> None:
    """What was written is on the disk, and the base is not in memory: the parts start alike."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_and_read(base: Path, target: Path) -> dict[str, Any]:
    """`cp` of the weights, and one read of the same bytes."""
    files = sorted(map(str, base.glob("*.safetensors")))
    target.mkdir()
    used = os.times()
    started = time.monotonic()
    subprocess.run(["cp", *files, str(target)], check=True)
    copied = time.monotonic() - started
    for name in files:
        with open(name, "rb", buffering=0) as file:
            while file.read(2**22):
                pass
    seconds, after = time.monotonic() - started, os.times()
    return {"seconds": seconds, "cpu_seconds": sum(after[:4]) - sum(used[:4]), "cp_seconds": copied}


def run_child(program: str, *paths: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", program, "child", *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"failed": {"exit_code": done.returncode}}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(
    folder: Path, shape: Shape, vocabulary: Path, with_peft: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each part, in an empty folder.

    Peaks are of resident memory beyond the interpreter and its imports.
    """
    base, adapter = folder / "base", folder / "adapter"
    size = make_base(base, shape, vocabulary)
    make_adapter(adapter, shape)
    yield "checkpoint", {"bytes": size, "files": len(list(base.glob("*.safetensors")))}
    settle(base)
    yield "cp and one read", copy_and_read(base, folder / "copy")
    shutil.rmtree(folder / "copy")
    settle(base)
    yield from run_child(OURS, base, adapter, folder / "merged").items()
    shutil.rmtree(folder / "merged", ignore_errors=True)
    if with_peft and available_memory() > 1.4 * size:
        settle(base)
        yield from run_child(PEFT, base, adapter, folder / "peft").items()
    elif with_peft:
        yield "peft", {"skipped": f"{available_memory() / 1e9:.1f} GB of memory are free"}


def official_vocabulary() -> Path:
    """The real qwen.tiktoken, carried by the dashscope wheel."""
    (found,) = [
        file for file in importlib.metadata.files("dashscope") or [] if file.name == "qwen.tiktoken"
    ]
    return Path(str(found.locate()))


def main() -> None:
    parser = Parser(description="Merge at Qwen-7B's size, beside cp and peft.")
    parser.add_argument(
        "--folder",
        type=str,
        required=True,
        help="where the checkpoints are made, and deleted after",
    )
    parser.add_argument("--layers", type=int, default=32, help="depth; 32 is the real one")
    parser.add_argument(
        "--peft", type=bool, default=True, help="run peft's merge_and_unload beside it"
    )
    options = parser.parse()
    shape = Shape(layers=options.layers)
    needed = 3.05 * 2 * sum(math.prod(size) for size in shape.tensors().values())
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise UserError(
            f"{options.folder}: {free / 1e9:.1f} GB free; expected {needed / 1e9:.1f} GB for the"
            " benchmark"
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(
            f"load average {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads of torch",
            flush=True,
        )
        for part, figures in measure(Path(folder), shape, official_vocabulary(), options.peft):
            shown = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
            )
            print(f"{part}: {shown}", flush=True)
        print(f"load average {os.getloadavg()[0]:.2f}", flush=True)


if __name__ == "__main__":
    run_command(main)
