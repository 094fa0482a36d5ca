"""The merge's memory does not grow with the model, nor with its largest tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_ds.disk.weights import TensorSpec
from qwen_ds.export.stream.blocks import BlockWriter

MIB = 2**20
NUM_TENSORS, ROWS, COLUMNS, RANK = 4, 8192, 4096, 8  # 64 MiB each in bf16

MEASURE = """
import sys
from pathlib import Path
import torch
from qwen_ds.export.merge import MergeOptions, merge

def kib(name):
    lines = [line.split() for line in open("/proc/self/status")]
    return next(int(line[1]) for line in lines if line[0] == name + ":")

torch.zeros(64, 64).addmm_(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
before = kib("VmRSS")
base, adapter, output = map(Path, sys.argv[1:])
report = merge(base, [adapter], output, MergeOptions(proof="off"))
assert len(report.changed) == 4
print(kib("VmHWM") - before)
"""


def write_checkpoint(folder: Path) -> None:
    """Zeros, as a hole in the file: they cost the merge the same memory, and the test no disk."""
    specs = [
        TensorSpec(f"transformer.h.{i}.mlp.w1.weight", "BF16", (ROWS, COLUMNS))
        for i in range(NUM_TENSORS)
    ]
    path = folder / "model.safetensors"
    header_only = BlockWriter(path, specs, {})
    with path.open("wb") as file:
        file.write(header_only.header)
        file.truncate(len(header_only.header) + sum(spec.num_bytes for spec in specs))
    (folder / "config.json").write_text("{}")


def write_adapter(folder: Path) -> None:
    tensors = {}
    for i in range(NUM_TENSORS):
        module = f"base_model.model.transformer.h.{i}.mlp.w1"
        tensors[f"{module}.lora_A.weight"] = torch.ones(RANK, COLUMNS)
        tensors[f"{module}.lora_B.weight"] = torch.ones(ROWS, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["w1"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_merge_holds_less_than_two_tensors_of_the_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    write_checkpoint(base)
    write_adapter(adapter)
    command = [sys.executable, "-c", MEASURE, str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "out" / "model.safetensors").unlink()
    # Peak resident memory above the imports: blocks of 1 MiB in several stages, about 90 MiB with
    # what the allocator keeps. One tensor in fp32 alone would be 128 MiB, the file 256 MiB.
    assert int(done.stdout) * 1024 < 2 * 64 * MIB, f"grew by {int(done.stdout) / 1024:.0f} MiB"
