"""CPU time of a micro-batch whose arithmetic is next to nothing: 32 layers of width 16, one rank.

A process of its own, started by launches.py with the tree to measure on PYTHONPATH; it uses what
every tree offers. It prints the median milliseconds of forward and backward, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from qwen_ds.demo.base import GENERATION_CONFIG, TOKENIZER_CONFIG, official_vocabulary
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train import setup, survey
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.start import start_process_group, stop_process_group

LAYERS, WIDTH, VOCABULARY, SPECIALS = 32, 16, 1024, 208
STEPS, MICRO_BATCHES = 5, 6


def write_model(folder: Path) -> None:
    config = QWenConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, kv_channels=WIDTH // 2, intermediate_size=88, seq_length=64,
        bf16=True,
    )  # fmt: skip
    torch.manual_seed(0)
    QWenLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    ranks = official_vocabulary().read_bytes().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_bytes(b"".join(ranks[: VOCABULARY - SPECIALS]))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def milliseconds(engine: TrainingEngine) -> float:
    """Median CPU time of forward and backward, in ms, of the steps after the first two."""
    ids_BT = torch.arange(16).reshape(2, 8) % VOCABULARY
    times = []
    for step in range(STEPS):
        for i in range(MICRO_BATCHES):
            began = time.process_time()
            loss = engine.loss_sum(ids_BT, ids_BT)
            engine.backward(loss / 32, last_of_step=i + 1 == MICRO_BATCHES)
            if step >= 2:
                times.append(time.process_time() - began)
        engine.step()
    return 1e3 * statistics.median(times)


def main() -> None:
    config, *options = sys.argv[1:]
    torch.set_num_threads(1)
    device = torch.device("cpu")
    start_process_group(device, 1)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        rows = Path(name) / "rows.jsonl"
        rows.write_text(json.dumps({"content": "a", "summary": "b"}) + "\n")
        asked = load_recipe([
            "--model.path", name, "--deepspeed", config, "--device", "cpu",
            "--model.dtype", "bfloat16", "--model.activation_checkpointing", "none",
            "--output_dir", f"{name}/out", "--data.train", str(rows), *options,
        ])  # fmt: skip
        run = survey.decide(asked, device)
        engine = TrainingEngine(
            setup.load_model(run, device).training, run.recipe.optim, run.deepspeed
        )
        engine.train(True)
        print(json.dumps({"milliseconds": milliseconds(engine)}))
    stop_process_group()


if __name__ == "__main__":
    main()
