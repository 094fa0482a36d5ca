"""One rule for the device of training, serving and everything else."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ds import dist, machine
from qwen_ds.errors import UserError
from qwen_ds.machine import choose_device
from tests.jobs import fork


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_card_present", lambda: False)
    assert choose_device("cpu").type == choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="shows no NVIDIA GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_card_that_torch_cannot_use_is_no_silent_cpu_run(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_card_present", lambda: True)
    with pytest.raises(UserError, match="cannot use .* NVIDIA GPU; .*CUDA_VISIBLE_DEVICES"):
        choose_device(wanted)
    assert choose_device("cpu").type == "cpu"


def test_every_rank_gets_a_gpu_of_its_own_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "local_rank", lambda: 1)
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("auto", 0) == torch.device("cuda", 0)
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(dist, "local_rank", lambda: 2)
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 on this machine"):
        choose_device("cuda")


XEON = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 143
cpu MHz		: 2100.000
flags		: fpu avx2 avx512f amx_bf16

processor	: 1
vendor_id	: GenuineIntel
cpu MHz		: 2700.000
flags		: fpu avx2 avx512f amx_bf16
"""


@pytest.mark.parametrize(
    ("device", "programs", "variables", "others", "can"),
    [
        ("cpu", ["g++"], {}, [], True),
        ("cpu", ["clang++"], {}, [], False),
        ("cpu", ["clang++"], {"CXX": "clang++"}, [], True),
        ("cuda", ["gcc"], {}, ["triton", "Python.h"], True),
        ("cuda", ["clang"], {}, ["triton", "Python.h"], True),
        ("cuda", ["g++"], {}, ["triton", "Python.h"], False),
        ("cuda", ["gcc"], {}, ["triton"], False),
        ("cuda", ["gcc"], {}, ["Python.h"], False),
        ("cuda of a P100", ["gcc"], {}, ["triton", "Python.h"], False),
    ],
)
def test_what_compiling_needs_is_looked_for_before_the_first_step(
    device: str, programs: list[str], variables: dict[str, str], others: list[str], can: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for program in programs:
        (tmp_path / program).touch(mode=0o755)
    if "Python.h" in others:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(machine, "find_spec", lambda name: name if name in others else None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"PATH": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    capability = (6, 0) if "P100" in device else (7, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.can_compile(torch.device(device.split()[0])) == can


@pytest.mark.parametrize(
    ("capability", "hip", "has"), [((7, 5), None, False), ((8, 0), None, True), ((9, 0), "7", True)]
)
def test_gpus_from_ampere_on_have_units_for_bf16(
    capability: tuple[int, int], hip: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert machine.has_bf16_units(torch.device("cuda")) == has


def test_cpus_of_one_kind_have_one_name_and_no_others() -> None:
    """By what -march=native goes by; the clock changes from one look to the next."""
    kind = machine._cpu_digest(XEON)
    assert machine._cpu_digest(XEON.replace("2100.000", "3000.000")) == kind
    assert machine._cpu_digest(XEON.replace("fpu avx2", "avx2 fpu")) == kind
    arm = "processor\t: 0\nCPU part\t: 0xd40\nFeatures\t: fp asimd\n"
    others = [XEON.replace(" avx512f", ""), XEON.replace("143", "85"), arm]
    others += [arm.replace("asimd", "asimd sve"), "", "some processor"]
    assert len({kind, *map(machine._cpu_digest, others)}) == 7
    assert machine.cpu_kind() == machine.cpu_kind() != "-"


class FakeDriver:
    """libcuda with these answers of its GPUs to the question about virtual memory management."""

    def __init__(self, *answers: int, status: int = 0) -> None:
        self.answers, self.status = answers, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.answers)
        return 0

    def cuDeviceGetAttribute(self, found: Any, attribute: int, gpu: int) -> int:
        found._obj.value = self.answers[gpu]
        return int(attribute != 102)


@pytest.mark.parametrize(
    ("release", "driver", "before", "after"),
    [
        ("2.13.0+cu130", FakeDriver(1, 1), {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.11.0", FakeDriver(1), {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.9.1", FakeDriver(1), {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("2.13.0", FakeDriver(1, 0), {}, {}),  # a virtual GPU, say
        ("2.13.0", FakeDriver(1, status=999), {}, {}),  # the driver does not work at all
        ("2.13.0", FakeDriver(1), {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ("2.13.0", FakeDriver(1), {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_the_allocator_is_told_to_grow_unless_the_user_or_the_driver_says_otherwise(
    release: str,
    driver: FakeDriver,
    before: dict[str, str],
    after: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: driver)
    environment = dict(before)
    machine.let_segments_grow(environment)
    assert environment == after
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for CPUs or for ROCm
    environment = {}
    machine.let_segments_grow(environment)
    assert environment == {}


def _settings_when_told_late(answer: Any) -> None:
    machine._maps_memory = lambda: True
    for name in machine.ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)
    machine.let_segments_grow()
    answer.put(torch._C._accelerator_getAllocatorSettings())


def test_what_training_imports_does_not_settle_the_allocator_before_it_is_told() -> None:
    """The process has imported all that training imports: torch reads the variable after that."""
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        pytest.skip("this torch does not tell its allocator's settings")
    answer = multiprocessing.get_context("forkserver").SimpleQueue()
    process = fork(_settings_when_told_late, answer)
    process.join()
    assert answer.get() == "expandable_segments:True"
