"""The proof of an output: its logits against those of base + adapters, both in fp32.

Computed so, the only difference between the two is the rounding of the merged weights to their
dtype (and the order of fp32 sums). How far one such rounding moves the logits is a property of the
model, so it is measured rather than guessed: peft folds the adapters into the base in fp32, these
weights are rounded by random errors of the same distribution, and the output may differ from base +
adapters by no more than a small multiple of what that changes.

Shapes: P positions compared, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qwen_ds.disk.read import read_text
from qwen_ds.errors import UserError
from qwen_ds.export.choices import Proof, ProofKind
from qwen_ds.export.merge_plan import MergePlan
from qwen_ds.export.proof.layered import layered_outputs
from qwen_ds.export.proof.sides import (
    POSITIONS,
    Outputs,
    ProofRow,
    first_positions,
    replaced_rows,
    spread_positions,
)
from qwen_ds.export.proof.whole import memory_needed, whole_outputs
from qwen_ds.machine import available_memory
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.folder import inspect_folder

# Each of at least 16 tokens.
PROMPTS = (
    "你好！请用一句话介绍你自己，再说说你能帮我做哪些事情，不能做哪些。",
    "类型#上衣*版型#宽松*颜色#白色*风格#简约*图案#条纹*衣样式#衬衫",
    "Write a Python function that returns the n-th Fibonacci number, and explain its running time.",
    "小明有 12 个苹果，吃了 5 个，又买了 8 个，现在有几个？",
)

# Two draws of the same noise: their largest entries over thousands of logits differ by much less
# than a factor of 3.
ROUNDINGS_ALLOWED = 3.0
# The order of fp32 sums alone moves the official model's logits by 1.2e-6 of the largest (golden
# lora, 3 blocks); it grows with the root of the depth, so 32 blocks reach 4e-6.
FP32_NOISE = 2e-5
# Over all logits the chances even out: 36 right merges in bf16 of the golden model lay between 0.98
# and 1.28 times the noise, and a change that is a tenth too large at the edge of the noise at 1.6.
RMS_ALLOWED = 1.5
# Where two tokens are nearly equal, the most probable one changes by chance: at this many of 64
# positions, beside those that the noise changes.
FLIPS_BY_CHANCE = 5


@dataclass(frozen=True, slots=True)
class Verification:
    """The proof and its figures: absolute differences of logits, over all positions."""

    status: Literal["passed", "failed"]
    reason: str
    kind: ProofKind
    positions: int  # number of positions compared, each with the text up to it given
    max_difference: float  # of the output from base + adapters
    rms_difference: float
    bound: float  # of max_difference
    rms_bound: float
    rounding_noise: float
    """max_difference of base + adapters from itself, folded and rounded at random."""
    rms_noise: float
    top1_agreement: float  # share of positions where the most probable next token is the same
    top1_bound: float  # the lowest top1_agreement that passes
    top1_noise: float
    """top1_agreement of base + adapters with itself, folded and rounded at random."""
    adapter_effect: float
    """Largest difference between base + adapters and the bare base: what the proof can see."""
    seconds: float

    def in_words(self) -> list[str]:
        return [
            f"  {self.kind} proof {self.status} in {self.seconds:.1f} s: {self.reason}",
            f"  the same most probable token at {self.top1_agreement:.1%} of {self.positions}"
            f" positions (a rounding at random: {self.top1_noise:.1%}); adapters move logits"
            f" by up to {self.adapter_effect:.3g}",
        ]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank; UserError if it cannot be read or has none."""
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no text; expected a prompt a line")
    return prompts


def choose_proof(plan: MergePlan, proof: Proof) -> ProofKind | None:
    """Choose the kind of proof: "auto" takes the full one if the models fit in memory.

    UserError if the full one is asked for and they do not.
    """
    if proof in ("off", "sampled"):
        return None if proof == "off" else "sampled"
    needed, free = memory_needed(plan), available_memory()
    if needed <= free:
        return "full"
    if proof == "full":
        raise UserError(
            f"verify is full, which needs {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are"
            " free; expected more of it, or --verify sampled, which goes layer by layer"
        )
    return "sampled"


def verify_merge(
    plan: MergePlan, merged: Path, kind: ProofKind, prompts: Sequence[str] | None = None
) -> Verification:
    """Compare the folder `merged` with base + adapters on `prompts` (None: the built-in ones)."""
    started = time.monotonic()
    native = plan.base.folder if plan.format.from_qwen else merged
    model = inspect_folder(native, weights=False)
    encoding, seq_length = model.encoding, model.config.seq_length
    sampled = kind == "sampled"

    def rows_of(texts: Sequence[str], count: int) -> list[ProofRow]:
        if sampled:  # bare text: of the few tokens that there are, none goes to a system message
            ids = [encoding.ordinary(text) for text in texts]
        else:
            turns = [Conversation(None, (Turn("user", text),)) for text in texts]
            ids = [encode_prompt(encoding, turn) for turn in turns]
        rows_T = [torch.tensor(row[:seq_length]) for row in ids]
        return first_positions(rows_T, count) if sampled else spread_positions(rows_T, count)

    rows = rows_of(prompts or (), POSITIONS)
    if left := POSITIONS - sum(len(row.positions) for row in rows):
        rows += rows_of(PROMPTS, left)
    rows += replaced_rows(plan.adapters, seq_length)
    outputs = (layered_outputs if sampled else whole_outputs)(plan, merged, rows)
    return judge(outputs, kind, time.monotonic() - started)


def judge(outputs: Outputs, kind: ProofKind, seconds: float) -> Verification:
    """Judge the output's differences by those that a rounding at random makes."""
    expected_PV = outputs.expected_PV
    largest, rms, flips = _distance(outputs.merged_PV, expected_PV)
    noise, rms_noise, noise_flips = _distance(outputs.noisy_PV, expected_PV)
    bound = ROUNDINGS_ALLOWED * noise + FP32_NOISE * float(expected_PV.abs().max())
    rms_bound = RMS_ALLOWED * rms_noise + FP32_NOISE * float(expected_PV.square().mean().sqrt())
    positions = expected_PV.shape[0]
    flips_allowed = ROUNDINGS_ALLOWED * noise_flips + FLIPS_BY_CHANCE * positions / POSITIONS
    effect = _distance(expected_PV, outputs.base_PV)[0]
    reason = (
        f"largest difference of logits {largest:.3g}, allowed {bound:.3g}; rms {rms:.3g}, allowed"
        f" {rms_bound:.3g}"
    )
    if flips > flips_allowed:
        reason += (
            f"; another most probable token at {flips} of {positions} positions, allowed"
            f" {flips_allowed:.3g}"
        )
    if 0 < effect <= bound:
        reason += (
            f"; the adapters move logits by {effect:.3g} at most, too little to tell their merge"
            " from the base"
        )
    # NaN compares as false: it must not pass.
    passed = largest <= bound and rms <= rms_bound and flips <= flips_allowed
    return Verification(
        status="passed" if passed else "failed",
        reason=reason,
        kind=kind,
        positions=positions,
        max_difference=largest,
        rms_difference=rms,
        bound=bound,
        rms_bound=rms_bound,
        rounding_noise=noise,
        rms_noise=rms_noise,
        top1_agreement=1 - flips / positions,
        top1_bound=max(0.0, 1 - flips_allowed / positions),
        top1_noise=1 - noise_flips / positions,
        adapter_effect=effect,
        seconds=round(seconds, 3),
    )


def _distance(one_PV: Tensor, other_PV: Tensor) -> tuple[float, float, int]:
    """Largest and rms difference, and the number of positions with another most probable token."""
    difference_PV = one_PV - other_PV
    flips = int((one_PV.argmax(1) != other_PV.argmax(1)).sum())
    return float(difference_PV.abs().max()), float(difference_PV.square().mean().sqrt()), flips
