"""Training speed against what a user would pick instead: HF Trainer + peft + DeepSpeed ZeRO-2.

    python tests/benchmarks/train.py                # three rounds; prints a table (make bench)
    python tests/benchmarks/train.py --rounds 1 --folder bench --json results.json

No maintained trainer loads Qwen v1 on today's transformers. The peers therefore train the same
model in the Qwen2 format (launch/merge.py --format qwen2), on the same token rows, with LoRA r 8 on
the same matrices, 32 rows a step, on two CPU ranks of one thread each, in the dtype whose products
are faster on this CPU:

    a   the official recipe: every row padded to 512, activation checkpointing
    b   micro-batches of 4 rows, padded to the longest, no activation checkpointing
    c   as b, with rows grouped by length
    d   as c in fp32, where bf16 is faster

The contenders take turns, each as a job of its own. A round gives each contender one figure, and
the table shows the medians. Only real tokens count, never padding. Ours compiles its blocks during
the warm-up steps, puts 640 tokens into a micro-batch, and runs ZeRO-2. Its dtype is auto: the
faster one, too. Peak memory is the resident set of rank 0's process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from qwen_ds.data.rows.token_rows import prepare
from qwen_ds.demo.base import GENERATION_CONFIG, TOKENIZER_CONFIG, official_vocabulary
from qwen_ds.dist import free_port
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions
from qwen_ds.train.cpu_speed import is_bf16_faster

ROOT = Path(__file__).parents[2]
RANKS, ROWS_PER_STEP, PEER_MICRO_BATCH, PEER_LENGTH, WARM_UP = 2, 32, 4, 512, 2
LR = 1e-3
PEERS = {
    "a": "official recipe, padded to 512",
    "b": "micro-batch 4",
    "c": "micro-batch 4, by length",
    "d": "as (c), in fp32",
}
SPECIALS = 208


@dataclass(frozen=True, slots=True)
class Shape:
    """The 7B's proportions: head a tenth of the blocks, w1 and w2 2.7 times the hidden width."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    inner: int = 1376
    vocab: int = 4864
    rows: int = 512
    steps: Mapping[str, int] = field(
        default_factory=lambda: {"ours": 14, "a": 5, "b": 8, "c": 8, "d": 8}
    )
    """Optimizer steps of each contender; the first WARM_UP are not timed."""


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one contender in one round."""

    tokens_per_second: float
    rows_per_second: float
    peak_gb: float
    losses: list[float]
    warm_up_seconds: float


def write_inputs(folder: Path, shape: Shape) -> None:
    """Write a random model in both formats, and the rows: text for us, token ids for the peers."""
    model, data = folder / "model", folder / "rows.jsonl"
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, kv_channels=shape.hidden // shape.heads,
        intermediate_size=2 * shape.inner, seq_length=2048, bf16=True,
    )  # fmt: skip
    QWenLMHeadModel(config).to(torch.bfloat16).save_pretrained(model)
    vocabulary = (
        official_vocabulary().read_bytes().splitlines(keepends=True)[: shape.vocab - SPECIALS]
    )
    (model / "qwen.tiktoken").write_bytes(b"".join(vocabulary))
    for name, content in (
        ("generation_config", GENERATION_CONFIG),
        ("tokenizer_config", TOKENIZER_CONFIG),
    ):
        (model / f"{name}.json").write_text(json.dumps(content))
    write_rows(data, model, shape.rows)
    command = [
        sys.executable,
        "launch/merge.py",
        "--base",
        str(model),
        "--output",
        str(folder / "qwen2"),
    ]
    subprocess.run(
        [*command, "--format", "qwen2"],
        cwd=ROOT,
        env=environment(),
        check=True,
        capture_output=True,
    )
    options = DataOptions(train=[str(data)], cache_dir=str(folder / "cache"))
    rows = prepare(options, load_encoding(model), 2048).train
    with (folder / "tokens.jsonl").open("w") as file:
        for i in range(len(rows)):
            ids, labels = (array.tolist() for array in rows[i])
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def write_rows(path: Path, model: Path, count: int) -> None:
    """Write prompts and answers of random words, one token each.

    Lengths are log-normal (medians 37 and 100 tokens, sigma 0.5); the encoder cuts both parts at
    254 tokens, its default.
    """
    import base64

    tokens = [
        base64.b64decode(line.split()[0])
        for line in (model / "qwen.tiktoken").read_bytes().splitlines()
    ]
    words = [
        t.decode()
        for t in tokens
        if t[:1] == b" " and t[1:].isalpha() and t[1:].isascii() and t[1:].islower()
    ]
    draw = np.random.default_rng(1)

    def text(median: float) -> str:
        return "".join(draw.choice(words, max(1, round(draw.lognormal(math.log(median), 0.5)))))

    rows = ({"content": text(37), "summary": text(100)} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    packages = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": packages}


def launch(script: Path, arguments: Sequence[str]) -> None:
    command = [
        "deepspeed",
        "--num_gpus",
        str(RANKS),
        "--master_port",
        str(free_port()),
        str(script),
        *arguments,
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")


def run_ours(folder: Path, shape: Shape, options: Sequence[str]) -> Result:
    """Run launch/train.py as a user starts it."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        steps = shape.steps["ours"]
        launch(ROOT / "launch" / "train.py", [
            "--model.path", str(folder / "model"), "--data.train", str(folder / "rows.jsonl"),
            "--data.cache_dir", str(folder / "cache"), "--output_dir", out, "--device", "cpu",
            "--optim.lr", str(LR), "--optim.max_steps", str(steps), "--save.every_steps", "1000",
            "--batch.rows_per_step", str(ROWS_PER_STEP), "--batch.tokens_per_micro_batch", "640",
            "--model.activation_checkpointing", "none", "--model.compile", "true",
            "--deepspeed", "ds_configs/zero2.json", *options,
        ])  # fmt: skip
        lines = [
            json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
        ]
    tokens = [line["tokens_per_second"] * line["seconds"] for line in lines]
    return result(
        tokens,
        [line["seconds"] for line in lines],
        lines[-1]["memory_gb"],
        [line["loss"] for line in lines],
    )


def result(
    tokens: Sequence[float], seconds: Sequence[float], peak_gb: float, losses: list[float]
) -> Result:
    timed = sum(seconds[WARM_UP:])
    rows = ROWS_PER_STEP * len(seconds[WARM_UP:])
    return Result(
        sum(tokens[WARM_UP:]) / timed, rows / timed, peak_gb, losses, sum(seconds[:WARM_UP])
    )


def run_peer(folder: Path, shape: Shape, peer: str, dtype: str) -> Result:
    out = folder / f"peer_{peer}.json"
    steps = str(shape.steps[peer])
    arguments = ["--peer", peer, "--folder", str(folder), "--steps", steps, "--dtype", dtype]
    launch(Path(__file__), arguments)
    found = json.loads(out.read_text())
    return result(found["tokens"], found["seconds"], found["peak_gb"], found["losses"])


def peer_main(folder: Path, peer: str, steps: int, dtype: str) -> None:
    """Run one rank of a peer: the script of an HF Trainer user, with a clock around its steps."""
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    # As in our engine: otherwise DeepSpeed first compiles its shared-memory op.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    # <|endoftext|> is two before <|im_end|>, the largest id.
    pad = max(max(row["input_ids"]) for row in rows) - 2

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = PEER_LENGTH if peer == "a" else max(len(row["input_ids"]) for row in batch)
        filled = {"input_ids": pad, "labels": IGNORE}
        made = {
            k: [row[k] + [v] * (length - len(row[k])) for row in batch] for k, v in filled.items()
        }
        made["attention_mask"] = [
            [1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch
        ]
        return {name: torch.tensor(values) for name, values in made.items()}

    tokens: list[int] = [0]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.began)
            tokens.append(0)

    class Counting(Trainer):
        def training_step(
            self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            tokens[-1] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, bf16=dtype == "bfloat16", max_steps=steps,
        learning_rate=LR, lr_scheduler_type="constant", logging_steps=1, report_to="none",
        per_device_train_batch_size=PEER_MICRO_BATCH, save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=ROWS_PER_STEP // (RANKS * PEER_MICRO_BATCH),
        gradient_checkpointing=peer == "a", gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length" if peer in "cd" else "random",
        deepspeed={
            "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
            "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        },
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen2", dtype=getattr(torch, dtype))
    model.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]  # c_attn and both c_proj
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets
    )
    model = get_peft_model(model, lora)
    if peer == "a":
        model.enable_input_require_grads()
    trainer = Counting(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    )
    trainer.train()
    world_tokens = torch.tensor(tokens[:-1])
    torch.distributed.all_reduce(world_tokens)
    if torch.distributed.get_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found = {
            "tokens": world_tokens.tolist(),
            "seconds": seconds,
            "peak_gb": peak_gb,
            "losses": losses,
        }
        (folder / f"peer_{peer}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    # Otherwise gloo's threads may abort a rank while it exits.
    torch.distributed.destroy_process_group()


def measure(
    folder: Path, shape: Shape, rounds: int, peers: str = "abcd", options: Sequence[str] = ()
) -> dict[str, Any]:
    """Run all contenders in turns, `rounds` times; their results by name ("ours", "a" ...)."""
    if not (folder / "tokens.jsonl").exists():
        write_inputs(folder, shape)
    dtype = "bfloat16" if is_bf16_faster() else "float32"
    print(f"(a), (b) and (c) in {dtype}", flush=True)
    if dtype == "float32" and "d" in peers:
        peers = peers.replace("d", "")
        print("(d) is left out: (c) is in fp32", flush=True)
    found: dict[str, list[Result]] = {name: [] for name in ("ours", *peers)}
    for number in range(rounds):
        for name, results in found.items():
            results.append(
                run_ours(folder, shape, options)
                if name == "ours"
                else run_peer(folder, shape, name, "float32" if name == "d" else dtype)
            )
            last = results[-1]
            speed = f"{last.tokens_per_second:,.0f} tokens/s, {last.rows_per_second:.2f} rows/s"
            load = f"load {os.getloadavg()[0]:.1f}"
            print(f"round {number + 1}, {name}: {speed}, {last.peak_gb:.2f} GB, {load}", flush=True)
    return {name: [asdict(one) for one in results] for name, results in found.items()}


def table(found: dict[str, Any]) -> str:
    """A table of the medians and of each contender's ratio to ours, taken round by round."""
    lines = [
        "| | real tokens/s | rows/s | ours is faster by | peak memory, GB | loss by step |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in found.items():
        pairs = zip(found["ours"], results, strict=True)
        ratio = statistics.median(
            ours["tokens_per_second"] / other["tokens_per_second"] for ours, other in pairs
        )
        tokens, rows, peak = (
            statistics.median(one[key] for one in results)
            for key in ("tokens_per_second", "rows_per_second", "peak_gb")
        )
        label = "Qwen-DS" if name == "ours" else f"({name}) {PEERS[name]}"
        losses = " ".join(f"{loss:.2f}" for loss in results[0]["losses"])
        lines.append(
            f"| {label} | {tokens:,.0f} | {rows:.2f} | {ratio:.2f} x | {peak:.2f} | {losses} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="keep model and rows here for another run; unset: delete them"
    )
    parser.add_argument(
        "--peers", default="abcd", help="the peers to run; unknown options go to launch/train.py"
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options, ours = parser.parse_known_args()
    if options.peer:
        return peer_main(options.folder, options.peer, options.steps, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, Shape(), options.rounds, options.peers, ours)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return None


if __name__ == "__main__":
    main()
