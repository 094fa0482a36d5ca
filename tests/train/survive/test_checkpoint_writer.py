"""Bytes of a checkpoint: nothing is written twice, and the weights of full training only where
somebody will load them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_ds import dist
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.survive import checkpoint, result
from qwen_ds.train.survive.checkpoint_writer import RunState, Saver
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.watchdog import Watchdog

CPU = torch.device("cpu")


class FullTraining:
    """An engine around a whole model in fp32; at stage 2 its only rank has one flat piece."""

    overflows = 0

    def __init__(self, model: nn.Module, stage: int) -> None:
        self.stage, self.model = stage, model
        adamw = torch.optim.AdamW(model.parameters())
        self.state: Any = TrainableState(model, adamw, 0, CPU)
        list(self.state.gather())  # makes the moments
        if stage:
            flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            pieces = {f"{kind}.0": flat.clone() for kind in ("value", "exp_avg", "exp_avg_sq")}
            self.state = SimpleNamespace(pieces=lambda: pieces, steps=1, loss_scaler=dict)

    def sizes(self) -> dict[str, int]:
        return {name: p.numel() for name, p in self.model.named_parameters()}

    def all_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.named_parameters():
            yield name, p.detach().to(dtype)


@pytest.fixture
def engines(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine of a stage; there is no process group, and one rank."""
    monkeypatch.setattr(dist, "max_floats", lambda *values: [float(v) for v in values])
    monkeypatch.setattr(dist, "barrier", lambda: None)
    return lambda stage: FullTraining(QWenLMHeadModel.from_pretrained(small_dir), stage)


def saver(folder: Path, base: Path, keep: int = 2) -> Saver:
    output = Output(folder, base, torch.bfloat16, None)
    return Saver(output, {}, keep, Watchdog(10, launched=False), None)


def bytes_a_parameter(folder: Path, engine: FullTraining) -> float:
    found = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return found / sum(engine.sizes().values())


@pytest.mark.parametrize("stage", [0, 2])
def test_full_training_saves_its_weights_once(
    small_dir: Path, tmp_path: Path, engines: Any, stage: int
) -> None:
    """Twelve bytes a parameter, values and two moments in fp32: 93 GB of a 7B. bf16 weights beside
    them, fourteen bytes, come with the best evaluation so far alone."""
    engine, saving = engines(stage), saver(tmp_path, small_dir)
    plain = saving.save(engine, RunState(1, 10, {}, {}))
    assert saving.wait()
    best = saving.save(engine, RunState(2, 10, {}, {}, BestLoss(2.0, 2)))
    assert saving.wait()
    later = saving.save(engine, RunState(3, 10, {}, {}, BestLoss(2.0, 2, since=1)))
    assert saving.wait()
    # The headers of the files and the generators' states: a few KB beside 300,000 parameters.
    assert bytes_a_parameter(best, engine) == pytest.approx(14, abs=0.1)
    assert bytes_a_parameter(later, engine) == pytest.approx(12, abs=0.1)
    assert not plain.exists(), "save.keep is 2"
    assert [p.name for p in tmp_path.glob("checkpoints/*/model")] == ["model"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.folder == later, "whole, by its checksums"
    loaded = dict(QWenLMHeadModel.from_pretrained(best / "model").named_parameters())
    assert all(
        torch.equal(p.to(torch.bfloat16), loaded[name].to(torch.bfloat16))
        for name, p in engine.model.named_parameters()
    )


def test_an_adapter_is_written_once(small_dir: Path, tmp_path: Path, engines: Any) -> None:
    """Its file is that of the values: twelve bytes a parameter in all, in each checkpoint."""
    model = nn.ModuleDict({f"m{i}": nn.Linear(512, 128, bias=False) for i in range(4)})
    engine: Any = FullTraining(model, 0)
    config = result.lora.LoraConfig(r=2, target_modules=["m0"])
    output = Output(tmp_path, small_dir, torch.bfloat16, config)
    saving = Saver(output, {}, 2, Watchdog(10, launched=False), None)
    for step, best in ((1, BestLoss()), (2, BestLoss(2.0, 2))):
        folder = saving.save(engine, RunState(step, 10, {}, {}, best))
        assert saving.wait()
        assert bytes_a_parameter(folder, engine) == pytest.approx(12, abs=0.1)
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    values = {name: t for name, _, t in engine.state.gather(VALUE)}
    assert len(held) == len(values) == 4


def test_a_checkpoint_that_turns_out_to_be_the_best_gets_its_model(
    small_dir: Path, tmp_path: Path, engines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that stops saves before its evaluation, and makes up for that when it resumes."""
    engine, saving = engines(2), saver(tmp_path, small_dir)
    folder = saving.save(engine, RunState(1, 10, {}, {}, evaluated=False), stopping=True)
    assert not (folder / "model").exists()
    saving.add_model(engine, 1)
    assert len(list(folder.glob("model/*.safetensors"))) == 1
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.folder == folder

    def full(path: Path, tensors: object) -> str:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "save_tensors", full)
        saving.add_model(engine, 1)
    assert "No space left" in capsys.readouterr().out, "the training goes on"
    assert (folder / "model").exists(), "the older one stays"
