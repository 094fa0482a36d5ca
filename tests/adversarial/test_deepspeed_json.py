"""DeepSpeed JSON that would break inside DeepSpeed, or be ignored there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.adversarial.harness import Member, Place, check


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2} | keys}


def scheduler(kind: str = "WarmupDecayLR", **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def on(**keys: Any) -> dict[str, Any]:
    return {"enabled": True} | keys


# content -> the words of the message
REFUSED: list[tuple[Any, str]] = [
    # What breaks inside deepspeed.initialize, or ends the run.
    ({"comet": on()}, "comet_ml is not installed"),
    ({"tensorboard": on(output_path="/dev/null/x")}, "tensorboard.output_path is '/dev/null/x'"),
    ({"csv_monitor": on(output_path="/dev/null/x")}, "csv_monitor.output_path"),
    ({"csv_monitor": on(output_path="x" * 5000)}, "csv_monitor.output_path is 'xxx"),
    ({"csv_monitor": on(output_path=f"no/{'x' * 256}")}, "csv_monitor.output_path is 'no/xxx"),
    ({"tensorboard": on(output_path="no", job_name="x" * 256)}, "tensorboard.output_path is 'no'"),
    ({"tensorboard": on(output_path="a\0b")}, "tensorboard.output_path is 'a"),
    (zero(cpu_offload=True), "zero_optimization.cpu_offload is True"),
    (zero(cpu_offload_param=True), '"offload_param": {"device": "cpu"}'),
    (zero(legacy_stage1=True), "legacy_stage1 is True"),
    (zero(stage=0, offload_optimizer={"device": "cpu"}), "at stage 0; expected stage 1 or more"),
    (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio is 0.5 at stage 2"),
    (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.device is 'nvme'"),
    (zero(mics_shard_size=8), "mics_shard_size is 8"),
    (zero(zenflow={"topk_ratio": 0.1}), "zenflow"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2"),
    ({"gradient_predivide_factor": 2.0} | zero(), "gradient_predivide_factor is 2.0"),
    ({"prescale_gradients": True} | zero(), "prescale_gradients is True"),
    ({"autotuning": on()}, "autotuning is on"),
    ({"hybrid_engine": on()}, "hybrid_engine is on"),
    # What would change the training, or what nobody does.
    ({"data_efficiency": on()}, "data_efficiency is on"),
    ({"data_efficiency": {"data_routing": {"random_ltd": on()}}}, "data_efficiency is on"),
    ({"curriculum_learning": on()}, "curriculum_learning is on"),
    ({"progressive_layer_drop": on(theta=0.5)}, "progressive_layer_drop is on"),
    ({"compression_training": {"weight_quantization": {}}}, "compression_training is on"),
    ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention is on"),
    ({"elasticity": on(max_train_batch_size=8)}, "elasticity is on"),
    ({"amp": on(opt_level="O1")}, "amp is on"),
    ({"sparse_gradients": True}, "sparse_gradients is on"),
    ({"weight_quantization": {"post_init_quant": {}}}, "weight_quantization is on"),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile is True"),
    ({"torch_autocast": on(dtype="bfloat16")}, "torch_autocast.enabled is True"),
    ({"bf16": on(bf16_master_weights_and_grads=True)}, "bf16_master_weights_and_grads"),
    ({"fp16": on(auto_cast=True)}, "fp16.auto_cast is True"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype is 'bf16'"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is False"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2"),
    # Types and ranges.
    (zero(stage=4), "zero_optimization.stage is 4"),
    (zero(stage="2"), "zero_optimization.stage is '2'"),
    (zero(stage=True), "zero_optimization.stage is True"),
    (zero(reduce_bucket_size="5e8"), "reduce_bucket_size is '5e8'"),
    (zero(reduce_bucket_size=0), "reduce_bucket_size is 0"),
    (zero(allgather_bucket_size=-1), "allgather_bucket_size is -1"),
    (zero(reduce_bucket_size=1.5), "reduce_bucket_size is 1.5"),
    (zero(stage3_max_live_parameters=1e30), "stage3_max_live_parameters is 1e+30"),
    (zero(overlap_comm="true"), "overlap_comm is 'true'"),
    (zero(offload_optimizer="cpu"), "offload_optimizer is 'cpu'; expected an object"),
    (zero(offload_optimizer={"device": "gpu"}), "expected one of cpu, nvme, none"),
    ({"zero_optimization": True}, "zero_optimization is True; expected an object"),
    ({"zero_optimization": []}, "zero_optimization is []; expected an object"),
    ({"train_batch_size": 0}, "train_batch_size is 0"),
    ({"train_batch_size": "128"}, "train_batch_size is '128'"),
    ({"gradient_clipping": -1}, "gradient_clipping is -1"),
    ({"communication_data_type": "int8"}, "communication_data_type is 'int8'"),
    ({"log_level": "loud"}, "log_level is 'loud'"),
    ({"fp16": on(loss_scale_window=0)}, "loss_scale_window is 0"),
    ({"fp16": on(initial_scale_power=1000)}, "initial_scale_power is 1000"),
    ({"fp16": on(), "bf16": on()}, "both true"),
    (adam(lr="fast"), "optimizer.params.lr is 'fast'"),
    (adam(betas=[0.9, 1.5]), "optim.betas"),
    (adam(adam_w_mode=False), "plain Adam"),
    (adam(amsgrad=True), "optimizer.params.amsgrad is True"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'"),
    ({"optimizer": "AdamW"}, "optimizer is 'AdamW'; expected an object"),
    (scheduler("OneCycle"), "scheduler.type is 'OneCycle'"),
    (scheduler(total_num_steps="many"), "total_num_steps is 'many'"),
    (scheduler(total_num_steps=0), "optim.decay_steps is 0"),
    (scheduler(total_num_steps=5, warmup_num_steps=10), "optim.warmup_steps 10"),
    (scheduler("WarmupLR", total_num_steps=260), "total_num_steps"),
    (scheduler(warmup_type="log", warmup_num_steps=3), "warmup_type is 'log'"),
    (scheduler(warmup_min_lr=1e-6), "warmup_min_lr is 1e-06"),
    (scheduler("WarmupCosineLR", cos_min_ratio=0.1), "cos_min_ratio is 0.1"),
    # Names.
    ({"zero_optimisation": {}}, "the nearest is 'zero_optimization'"),
    (zero(stag=2), "zero_optimization has no key 'stag'; the nearest is 'stage'"),
    (zero(offload_optimizer={"devise": "cpu"}), "the nearest is 'device'"),
    ({"fp16": {"enable": True}}, "fp16 has no key 'enable'; the nearest is 'enabled'"),
    ({"data_efficiency": {"enabeld": True}}, "the nearest is 'enabled'"),
    ({"activation_checkpointing": {"cpu_checkpoint": True}}, "'cpu_checkpointing'"),
    ({"flops_profiler": {"profile_steps": 1}}, "the nearest is 'profile_step'"),
    (adam(learning_rate=1), "optimizer.params has no key 'learning_rate'"),
    (scheduler(warmup_steps=1), "scheduler.params has 'warmup_steps'"),
    ({"timers": {"throughput": {"enable": True}}}, "timers.throughput has no key"),
    ({"x" * 10_000: 1}, "has no top-level key 'xxx"),
    # No object.
    ([], "expected an object"),
    (3, "expected an object"),
    (None, "expected an object"),
]
TEXTS = {
    "nothing": b"",
    "a comment": b'{"zero_optimization": {"stage": 2}} // mine',
    "a trailing comma": b'{"zero_optimization": {"stage": 2,}}',
    "NaN": b'{"gradient_clipping": NaN}',
    "Infinity": b'{"zero_optimization": {"reduce_bucket_size": Infinity}}',
    "a huge number": b'{"gradient_clipping": 1e400}',
    "binary": bytes(range(256)),
    "GBK": '{"_": "注释"}'.encode("gbk"),
    "UTF-16": '{"_": 1}'.encode("utf-16"),
    "YAML": b"zero_optimization:\n  stage: 2\n",
}
# content -> what is said of it, "" for nothing
READ: list[tuple[Any, str]] = [
    ({"_comment": "ZeRO-2", "zero_optimization": {"stage": 2, "_note": 1}}, ""),
    ({"comms_config": {"x": 1}, "monitor_config": {}}, "comms_config (DeepSpeed has no such key)"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "model.activation_checkpointing"),
    ({"comms_logger": on(verbose=True)}, "no effect here: comms_logger"),
    ({"checkpoint": {"load_universal": True}}, "no effect here: checkpoint"),
    ({"aio": {"block_size": 1048576}}, "no effect here: aio"),
    ({"pipeline": {"stages": 2}}, "no effect here: pipeline"),
    ({"dataloader_drop_last": True}, "no effect here: dataloader_drop_last"),
    ({"steps_per_print": 100}, "steps_per_print (log.every_steps)"),
    ({"bf16": {"enabled": False}}, "bf16.enabled is false and model.dtype bfloat16"),
    (scheduler(total_num_steps=260, warmup_max_lr="auto"), "warmup_num_steps"),
    (scheduler("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2), "ends at 0"),
    ({"tensorboard": on(output_path="/tmp")}, "tensorboard: DeepSpeed writes the learning rate"),
    ({"autotuning": {"enabled": False}, "elasticity": {"enabled": False}}, ""),
    ({"wandb": {"enabled": False}, "zero_allow_untested_optimizer": True}, ""),
    (zero(cpu_offload=False, offload_param=None), ""),
    (dict.fromkeys(("optimizer", "scheduler", "bf16", "fp16", "zero_optimization"), "auto"), ""),
    ({"optimizer": {"type": "AdamW", "params": "auto"}, "scheduler": {}}, ""),
    ({"scheduler": {"type": "WarmupLR", "params": "auto"}, "optimizer": {}}, ""),
    (zero(offload_optimizer="auto", offload_param="auto", stage="auto"), ""),
    (zero(offload_param={"device": "cpu"}), "no effect here: zero_optimization.offload_param"),
    (zero(stage=1, offload_param={"device": "nvme"}), "zero_optimization.offload_param"),
    ({"fp16": {"enabled": False, "auto_cast": True}}, ""),
    ({"flops_profiler": on()}, "flops_profiler (log.profile_steps)"),
    ({"steps_per_print": 0}, ""),
    ({"steps_per_print": float("inf")}, ""),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": False}},
        "activation_checkpointing (model",
    ),
    (adam(amsgrad=False), ""),
    ({"train_batch_size": 32.0, "train_micro_batch_size_per_gpu": 1.0}, ""),
    ({"//": "mine", "#": 1, "comment": "x", "fp16": {"comments": [], "__comment__": "y"}}, ""),
]


def _plan(content: Any, place: Place) -> Sequence[str | Path]:
    file = place.json("ds.json", content)
    return ["plan", "--deepspeed", file]


def _text(raw: bytes, place: Place) -> Sequence[str | Path]:
    return ["plan", "--deepspeed", place.file("ds.json", raw)]


def _odd(kind: str, place: Place) -> Sequence[str | Path]:
    path = place.here / "ds.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return ["plan", "--deepspeed", "/dev/zero" if kind == "device" else path]


def _train(content: Any, place: Place) -> Sequence[str | Path]:
    command = ["train", "--model.path", place.base(), "--data.train", place.rows()]
    return [*command, "--output_dir", place.out / "run", "--deepspeed", place.json("d", content)]


MEMBERS = [
    *(
        Member(f"{i} {said[:40]}", partial(_plan, content), says=("ds.json: ", said))
        for i, (content, said) in enumerate(REFUSED)
        if "optim." not in said
    ),
    *(
        Member(f"{i} {said[:40]}", partial(_plan, content), says=(said,))
        for i, (content, said) in enumerate(REFUSED)
        if "optim." in said
    ),
    *(Member(name, partial(_text, raw), says=("ds.json: ",)) for name, raw in TEXTS.items()),
    *(
        Member(f"read {i} {said[:40]}", partial(_plan, content), code=0, says=(said,))
        for i, (content, said) in enumerate(READ)
    ),
    *(
        Member(kind, partial(_odd, kind), says=("deepspeed: ",))
        for kind in ("fifo", "folder", "device", "missing")
    ),
    Member("before training", partial(_train, {"comet": on()}), says=("comet.enabled",),
           leaves=lambda place: not any(place.out.iterdir())),
]  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_deepspeed_json(member: Member, tmp_path: Path, small_dir: Path) -> None:
    check(member, tmp_path, small_dir)
