"""DeepSpeed's operations: CPU Adam compiled without CUDA; all in turns, and for one kind of CPU."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder import builder
from torch import nn
from torch.utils import cpp_extension

from qwen_ds.disk.lock import holding
from qwen_ds.disk.place import given_build_folder
from qwen_ds.errors import UserError
from qwen_ds.train.engine import compiled, start
from qwen_ds.train.engine.loading import partitioned_loading

WEIGHT = [nn.Parameter(torch.zeros(2))]


def put_nvcc(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA toolkit that says its version and cannot compile."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(
        f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.1"\n[ $1 = -V ]\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_cuda_toolkit_of_another_version_is_none_of_its_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder that DeepSpeed takes beside a GPU compiles C++ alone and looks at no nvcc, so
    nothing has to be skipped (DS_SKIP_CUDA_CHECK)."""
    put_nvcc(tmp_path, "11.2", monkeypatch)
    with pytest.raises(builder.CUDAMismatchException):  # as any CUDA operation would be met
        builder.assert_no_cuda_mismatch()
    given: dict[str, Any] = {}
    monkeypatch.setattr(cpp_extension, "load", lambda **settings: given.update(settings))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    CUDA_Accelerator().get_op_builder("CPUAdamBuilder")().load()
    assert given["name"] == "cpu_adam" and not given["with_cuda"]
    assert {Path(source).suffix for source in given["sources"]} == {".cpp"}
    assert not any("cuda" in word for word in [*given["extra_cflags"], *given["extra_ldflags"]])


def test_cuda_code_is_compiled_by_a_toolkit_of_torchs_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "installed_ops", {})
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    for version, can in (("11.2", False), ("12.9", False), ("13.0", True), ("13.1", True)):
        put_nvcc(tmp_path, version, monkeypatch)
        assert start.can_quantise_weights(torch.device("cuda")) == can, version
    (tmp_path / "bin" / "nvcc").unlink()
    assert not start.can_quantise_weights(torch.device("cuda"))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The folder in which torch would have compiled, for each optimizer; nothing is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(compiled, "installed_ops", {})
    monkeypatch.setattr(compiled, "cpu_kind", lambda: "x86_64-aaaa")
    found: list[Path | None] = []

    def build(parameters: object, **settings: Any) -> None:
        found.append(given_build_folder())
        if found[-1]:
            assert not (found[-1] / "cpu_adam" / "lock").exists(), "torch would wait for ever"

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", build)
    return found


def test_each_kind_of_cpu_has_a_build_of_its_own(
    made: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-march=native: on a home that unlike machines share, the other's build would end the run."""
    compiled.cpu_adam(WEIGHT, {})
    monkeypatch.setattr(compiled, "cpu_kind", lambda: "x86_64-bbbb")
    compiled.cpu_adam(WEIGHT, {})
    first, second = made
    assert first and second and first != second and first.parent == second.parent
    assert torch.__version__ in first.name and first.name.endswith("x86_64-aaaa")
    assert given_build_folder() is None, "for this build alone"
    monkeypatch.setattr(compiled, "installed_ops", {"cpu_adam": True})
    compiled.cpu_adam(WEIGHT, {})
    assert made[2] is None, "one that was built with DeepSpeed is loaded from there"


def test_a_lock_of_a_killed_run_is_removed(made: list[Path | None]) -> None:
    compiled.cpu_adam(WEIGHT, {})
    assert made[0]
    lock = made[0] / "cpu_adam" / "lock"
    lock.touch()
    compiled.cpu_adam(WEIGHT, {})
    assert made == made[:1] * 2 and not lock.exists()


@pytest.mark.parametrize("wanted", [True, False])
def test_zero_3_finds_the_quantiser_that_was_built_in_turns(
    made: list[Path | None], monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """DeepSpeed itself would wait for a killed run's lock while it partitions the first weight."""
    locks: list[Path] = []

    def load(**_: Any) -> None:
        folder = given_build_folder()
        assert folder
        lock = folder / "quantizer" / "lock"
        assert not lock.exists(), "torch would wait for ever"
        lock.touch()  # and the run is killed
        locks.append(lock)

    builder_of = SimpleNamespace(QuantizerBuilder=lambda: SimpleNamespace(load=load))
    monkeypatch.setattr(deepspeed.ops, "op_builder", builder_of)
    zero = {"stage": 3, "zero_quantized_weights": wanted}
    json = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    for _ in range(2):
        resolved: Any = SimpleNamespace(stage=3, engine_json=json)
        with partitioned_loading(resolved, torch.float32):
            assert len(set(locks)) == wanted
    assert len(locks) == 2 * wanted


def test_a_build_under_way_is_waited_for(
    made: list[Path | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rank or run holds the folder, and its lock is none of a killed one's."""
    compiled.cpu_adam(WEIGHT, {})
    assert made[0]
    folder, other, now = made[0] / "cpu_adam", ExitStack(), [0.0]
    other.enter_context(holding(folder / ".turn", "the other"))
    (folder / "lock").touch()

    def sleep(seconds: float) -> None:
        now[0] += 6
        assert (folder / "lock").exists()
        if now[0] > 20:  # it is through
            (folder / "lock").unlink()
            other.close()

    monkeypatch.setattr(compiled.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(compiled.time, "sleep", sleep)
    compiled.cpu_adam(WEIGHT, {})
    assert len(made) == 2 and now[0] == 24
    told = capsys.readouterr().out
    assert told.startswith("waiting: ") and f"process {os.getpid()} on " in told
    assert told.count("\n") == 1


def test_an_old_lock_in_a_folder_of_the_users_is_named(
    made: list[Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs may build there: a young lock is waited for, none is removed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    lock = tmp_path / "own" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setattr(compiled.time, "sleep", lambda seconds: lock.unlink())
    compiled.cpu_adam(WEIGHT, {})
    assert made == [tmp_path / "own"]
    lock.touch()
    hours_ago = time.time() - 3 * 3600
    os.utime(lock, (hours_ago, hours_ago))
    with pytest.raises(UserError, match="lock: is 180 minutes old.*remove it") as error:
        compiled.cpu_adam(WEIGHT, {})
    assert lock.exists() and "\n" not in str(error.value)


def test_a_users_folder_with_another_cpus_build_is_refused(
    made: list[Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    compiled.cpu_adam(WEIGHT, {})
    (tmp_path / "own" / "cpu_adam" / "cpu_adam.so").touch()
    compiled.cpu_adam(WEIGHT, {})
    monkeypatch.setattr(compiled, "cpu_kind", lambda: "x86_64-bbbb")
    with pytest.raises(UserError, match="another kind of CPU .x86_64-aaaa; this one is x86_64-bbb"):
        compiled.cpu_adam(WEIGHT, {})
    assert len(made) == 2


def test_a_missing_compiler_is_one_line(
    made: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(parameters: object, **settings: Any) -> None:
        cause = RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed.")
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from cause

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", fails)
    with pytest.raises(UserError, match="ninja not being installed.*expected a C") as error:
        compiled.cpu_adam(WEIGHT, {})
    assert "\n" not in str(error.value)
