"""How far ZeRO scales: communication predicted for 1 to 1,024 GPUs, and checked on CPU ranks.

    python tests/benchmarks/scaling.py            # predicts, measures, writes SCALING.md
    python tests/benchmarks/scaling.py --ranks 2  # measures on these ranks only, writes nothing

The measurement reads DeepSpeed's comms logger in one optimizer step of a tiny Qwen, on 2, 4 and 8
CPU ranks: the bytes that a rank puts into each collective. The prediction (qwen_ds/plan/traffic.py)
is made first and printed beside it with its error.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_ds import dist
from qwen_ds.machine import choose_device
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.deepspeed_json import ResolvedConfig, resolve
from qwen_ds.plan.gpus import Gpu, gpu_named
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.seconds import Cluster, Work, step_seconds
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.step import Workload, split
from qwen_ds.plan.traffic import Collective, Links, Zero, traffic
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.recipe.options import BatchOptions, LoraOptions, ModelOptions, Recipe
from qwen_ds.train import setup
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.start import start_process_group, stop_process_group

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "golden" / "small"
MICRO_BATCHES = 3
RANKS = (2, 4, 8)
# Stage of each case, and its changes to ds_configs/zero{stage}.json.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-1": (1, {}),
    "ZeRO-2": (2, {}),
    "ZeRO-3": (3, {}),
    "ZeRO-3, hpZ 2": (3, {"zero_hpz_partition_size": 2}),
}
QWEN_7B = Shape.of(QWenConfig())
BF16 = ModelOptions(dtype="bfloat16", attention="sdpa")
CHAT = LoraOptions(special_rows="off")  # a chat model's control tokens are trained already
PER_GPU_ROWS = 16  # 128 rows a step on 8 GPUs
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


# Prediction


def zero_of(case: str, world: int, *, hpz: int | None = None) -> Zero:
    """ZeRO as ds_configs/zero{1,2,3}.json resolve for the 7B."""
    stage, changes = CASES[case]
    config = read_deepspeed_json(f"ds_configs/zero{stage}.json")
    config["zero_optimization"] |= changes
    recipe = Recipe(model=BF16, lora=CHAT)
    resolved = resolve(config, recipe, frozenset(), hidden_size=QWEN_7B.hidden, world=world)
    zero = Zero.of(resolved.engine_json, world)
    return dataclasses.replace(zero, hpz=min(hpz, world)) if hpz and zero.hpz > 1 else zero


@dataclasses.dataclass(frozen=True)
class Point:
    """One case on so many GPUs."""

    received_gb: float
    seconds: float
    waiting: float
    """Share of the step in which a rank waits for communication."""


def point(case: str, gpu: Gpu, links: Links, gpus: int, rows: int) -> Point:
    how = Saving.of(Recipe(model=BF16, lora=CHAT), on_gpu=True, family=QWEN)
    zero = zero_of(case, gpus, hpz=links.per_machine)
    batch = BatchOptions(rows_per_step=rows, tokens_per_micro_batch=2048)
    parts = split(Workload.like(rows, 157, 0.66, 508), gpus, batch)
    seconds = step_seconds(Work(QWEN_7B, how, zero), Cluster(gpu, links), parts, 0.66, 0)
    sent = traffic(QWEN_7B, how, zero, parts.micro_batches)
    return Point(sum(c.moved for c in sent) / 1e9, seconds.total, seconds.waiting / seconds.total)


def scale_table(gpu: Gpu, links: Links, rows_in_all: int | None) -> list[str]:
    """A table of weak scaling (PER_GPU_ROWS for each GPU), or of one step of `rows_in_all` rows."""
    heads = "".join(f"| {case.replace(' 2', '')}: GB | s/step | waits " for case in CASES)
    lines = [f"| GPUs {heads}|", "|---:" * (1 + 3 * len(CASES)) + "|"]
    ends: dict[str, int] = {}
    for n in GPUS if rows_in_all is None else [n for n in GPUS if n <= rows_in_all]:
        points = {
            case: point(case, gpu, links, n, rows_in_all or PER_GPU_ROWS * n) for case in CASES
        }
        cells = (
            f"| {p.received_gb:.2f} | {p.seconds:.3f} | {p.waiting:.0%} " for p in points.values()
        )
        lines.append(f"| {n:,} {''.join(cells)}|")
        ends |= {
            case: n
            for case, p in points.items()
            if p.waiting <= 0.2 and ends.get(case, n // 2 or 1) >= n // 2
        }
    said = "; ".join(f"{case.replace(' 2', '')}: {n:,}" for case, n in ends.items())
    return [
        *lines,
        "",
        f"Most GPUs up to which no step waits for more than a fifth of its time: {said}.",
    ]


# Measurement


def logged_bytes(collective: Collective) -> float:
    """Bytes as the comms logger counts them: a rank's share of a gather, the whole otherwise."""
    gathers = collective.name.startswith("gather")
    return collective.size / collective.ranks if gathers else collective.size


def predicted(case: str, world: int) -> dict[str, float]:
    shape = Shape.of(QWenConfig.from_pretrained(SMALL))
    recipe = small_recipe(SMALL)
    resolved = resolve_small(case, recipe, shape, world)
    zero = Zero.of(resolved.engine_json, world)
    how = Saving.of(recipe, on_gpu=False, family=QWEN)
    found = {"gather": 0.0, "reduce": 0.0}
    for collective in traffic(shape, how, zero, MICRO_BATCHES):
        found["gather" if collective.name.startswith("gather") else "reduce"] += logged_bytes(
            collective
        )
    return found


def small_recipe(model_dir: Path) -> Recipe:
    return Recipe(
        device="cpu",
        model=ModelOptions(
            path=str(model_dir),
            dtype="bfloat16",
            attention="eager",
            activation_checkpointing="none",
            compile=False,
        ),
        lora=CHAT,
    )


def resolve_small(case: str, recipe: Recipe, shape: Shape, world: int) -> ResolvedConfig:
    """Resolve a case, with ZeRO-3's bounds on gathered parameters scaled down from the 7B's."""
    stage, changes = CASES[case]
    config = read_deepspeed_json(f"ds_configs/zero{stage}.json")
    section = config["zero_optimization"]
    section |= changes
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        if key in section:
            section[key] = int(section[key] * shape.parameters / QWEN_7B.parameters)
    return resolve(config, recipe, frozenset(), hidden_size=shape.hidden, world=world)


def work(out: Path) -> None:
    """Run one rank: two steps of each case, the second one logged."""
    from deepspeed.comm import comm

    device = choose_device("cpu")
    start_process_group(device, 10)
    model_dir = out.parent / "model"
    base = Base.read(model_dir)
    shape, world = Shape.of(base.config), dist.world_size()
    machine = Machine(world, world, on_gpu=False, memory=0, memory_source="")
    results: dict[str, dict[str, float]] = {}
    for case in CASES:
        recipe = small_recipe(model_dir)
        resolved = resolve_small(case, recipe, shape, world)
        model = setup.load_model(Run(recipe, base, machine, resolved), device)
        trained = TrainingEngine(model.training, recipe.optim, resolved)
        trained.train(True)
        comm.configure(enabled=True, prof_all=True, verbose=False)
        ids_BT = torch.randint(
            0, shape.vocab, (2, 24), generator=torch.Generator().manual_seed(dist.rank())
        )
        for _ in range(2):
            comm.comms_logger.comms_dict.clear()
            for i in range(MICRO_BATCHES):
                trained.backward(
                    trained.loss_sum(ids_BT, ids_BT), last_of_step=i + 1 == MICRO_BATCHES
                )
            trained.step()
        found = {"gather": 0.0, "reduce": 0.0}
        for name, sizes in comm.comms_logger.comms_dict.items():
            kind = "gather" if "gather" in name else "reduce"
            found[kind] += sum(size * entry[0] for size, entry in sizes.items())
        results[case] = found
        comm.comms_logger.enabled = False
    if dist.rank() == 0:
        out.write_text(json.dumps(results), encoding="utf-8")
    stop_process_group()


def measured(world: int) -> dict[str, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        model_dir = out.parent / "model"
        shutil.copytree(SMALL, model_dir)
        (model_dir / "mini.tiktoken").rename(model_dir / "qwen.tiktoken")
        base = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--work", str(out)],
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
                cwd=ROOT, stdout=subprocess.DEVNULL,
                stderr=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(world)
        ]  # fmt: skip
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world, codes
        return json.loads(out.read_text(encoding="utf-8"))


def compare(ranks: Sequence[int]) -> list[str]:
    lines = [
        "| ranks | case | collectives | predicted KB | measured KB | error |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for world in ranks:
        before = {case: predicted(case, world) for case in CASES}
        after = measured(world)
        for case, kinds in before.items():
            for kind, expected in kinds.items():
                found = after[case][kind]
                error = f"{expected / found - 1:+.1%}" if found else "-"
                both = f"{expected / 1e3:.1f} | {found / 1e3:.1f}"
                lines.append(f"| {world} | {case} | {kind} | {both} | {error} |")
    return lines


TEMPLATE = """# How far ZeRO scales

Written by `python tests/benchmarks/scaling.py` on {date}. Nothing on this page has run on a GPU or
on more than one machine: the first part is arithmetic, and the second checks its bytes against real
collectives on CPU ranks.

## Predicted: Qwen-7B, LoRA r 8 on c_attn and c_proj, H100

Rows like AdvertiseGen's (157 tokens, two thirds of them targets), micro-batches of 2,048 tokens,
nothing recomputed. GB: what each GPU receives in a step. Waits: the share of the step in which it
waits for communication that nothing hides. NVLink at 450 GB/s in machines of 8. The volumes are
those of `traffic`, the times those of `Links.seconds` in qwen_ds/plan/traffic.py (rings, with a
latency for each step of a ring from NCCL's tuning table). A step of more rows pads less, so each of
a few GPUs is faster than one alone.

### {rows} rows for each GPU, 400 Gb/s for each GPU between machines

{weak}

### {rows} rows for each GPU, 400 Gb/s for each machine

{weak_shared}

### 128 rows a step in all, 400 Gb/s for each GPU

{strong}

With LoRA, ZeRO-2 scales as far as there are rows: it sends the adapter's gradients alone, 40 MB a
micro-batch, whatever the number of GPUs. ZeRO-1 sends them once a step. It is the better choice for
LoRA on slow networks, and wherever ranks would wait for each other after every micro-batch: the
gradients of an adapter need no partitioning. At 128 rows a step both end at 32 GPUs, where
micro-batches are so small that a step no longer gets shorter. ZeRO-3 sends the weights twice for
each micro-batch and ends at one machine: its ring has as many steps as there are GPUs, and each
module's gather pays the latency of all of them. hpZ (`zero_hpz_partition_size`, the GPUs of a
machine) keeps the weights off the network, since frozen ones never change: 400 Gb/s for a whole
machine then serve as well as for each GPU. The gathers of the adapter's own small matrices, one by
one, remain. hpZ costs a second copy of the weights in each machine. It is for models that do not
fit one GPU.

## Measured: DeepSpeed's comms logger, 2, 4 and 8 CPU ranks

tests/golden/small (hidden 64, 3 blocks), LoRA r 8, bf16, gloo, the second of two steps of {micro}
micro-batches. KB that a rank puts into its collectives: its share of a gather, the whole of a
reduction. ZeRO-3's bounds on gathered parameters are scaled down from those of
ds_configs/zero3.json for the 7B.

{measured}

This is the formula as corrected. The first prediction, made before anything was measured, was exact
for ZeRO-2 and for ZeRO-3's gradients. It was three times too high for ZeRO-1's (179.7 KB for 59.9),
which it assumed to average after each micro-batch as ZeRO-2 does. It was too simple for ZeRO-3's
gathers: every weight twice, 18.6 % too much on 2 ranks (1,402.4 KB for 1,182.2). After the first
correction it still took each forward gather under hpZ to span all ranks, 29.9 % too little on 4
(818.3 KB for 1,166.7). The log showed what is gathered once (lm_head, which is still there when the
backward pass begins; the embedding and the first block's c_attn, through which no gradient flows),
what is gathered after a step (tensors too small to be partitioned), and that frozen weights stay in
the machine under hpZ. Each was then found in DeepSpeed's code. The 8 ranks were measured for the
first time with the formula as it is.
"""


def write(measurement: list[str], tables: list[list[str]]) -> None:
    text = TEMPLATE.format(
        date=datetime.date.today().isoformat(), rows=PER_GPU_ROWS, micro=MICRO_BATCHES,
        measured="\n".join(measurement),
        **dict(zip(("weak", "weak_shared", "strong"), map("\n".join, tables), strict=True)),
    )  # fmt: skip
    (ROOT / "tests" / "benchmarks" / "SCALING.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        help="measure on these numbers of ranks only, and write nothing",
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work)
    gpu = gpu_named("h100")
    assert gpu is not None
    settings = (
        (Links(8, gpu.link), None),
        (Links(8, gpu.link, 50e9 / 8), None),
        (Links(8, gpu.link), 128),
    )
    tables = [scale_table(gpu, links, rows) for links, rows in settings]
    measurement = compare(RANKS if options.ranks is None else options.ranks)
    for lines in (*tables, measurement):
        print("\n".join(lines), end="\n\n")
    if options.ranks is None:
        write(measurement, tables)
    return None


if __name__ == "__main__":
    main()
