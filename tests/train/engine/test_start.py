"""DeepSpeed before there is a model: mistakes in its JSON, and its compiled operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.train.engine import start

ROOT = Path(__file__).parents[3]
GOOD: dict[str, Any] = {"train_batch_size": 1, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [({"stage": 2, "reduce_buckt_size": 5}, "reduce_buckt_size"), ({"stage": "two"}, "stage")],
)
def test_a_mistake_within_a_section_is_named_in_one_line(
    zero: dict[str, Any], expected: str
) -> None:
    start.check_config(GOOD)
    with pytest.raises(UserError, match=f"^DeepSpeed JSON: .*{expected}") as error:
        start.check_config(GOOD | {"zero_optimization": zero})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_training_on_a_gpu_is_without_cudnn_attention(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It plans for each new shape. The GPU is this rank's own before anything else is done."""
    taken: list[torch.device] = []

    class Joined(Exception):
        pass

    def join(**_: Any) -> None:
        raise Joined

    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(start, "set_accelerator", lambda _: None)
    monkeypatch.setattr(start.deepspeed, "init_distributed", join)
    monkeypatch.setattr(start.dist, "use_network", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    try:
        with pytest.raises(Joined):
            start.start_process_group(
                torch.device(device, 1) if device == "cuda" else torch.device(device), 1
            )
        assert torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
    assert taken == ([torch.device("cuda", 1)] if device == "cuda" else [])


def test_a_cpu_has_no_quantiser_and_one_rank_without_it_decides_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not start.can_quantise_weights(torch.device("cpu"))
    monkeypatch.setattr(start, "installed_ops", {"quantizer": True})
    assert start.can_quantise_weights(torch.device("cuda"))
    monkeypatch.setattr(dist, "gather", lambda ready: [ready, False])
    assert not start.can_quantise_weights(torch.device("cuda"))


def test_deepspeed_comes_without_mlflow_which_still_comes_when_it_is_asked_for(
    tmp_path: Path,
) -> None:
    """Its autotuner would import it, in every rank."""
    (tmp_path / "mlflow.py").write_text("")
    check = (
        "import sys, qwen_ds.train.engine.engine as e; assert 'mlflow' not in sys.modules; "
        "assert not e.deepspeed.autotuning.autotuner.has_mlflow; import mlflow"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    subprocess.run([sys.executable, "-c", check], check=True, env=os.environ | {"PYTHONPATH": path})
