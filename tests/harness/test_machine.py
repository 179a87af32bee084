"""What a record says of the machine: read from a kernel, a driver and an environment made for the test."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from harness.measure import gpu, machine
from harness.measure.gpu import describe_gpu
from harness.measure.machine import describe_git, describe_machine, describe_versions

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SETTINGS = ("OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says nothing of its CPUs."""
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    return tmp_path


def write_cpu(kernel: Path, number: int, **files: str) -> None:
    folder = kernel / f"cpu{number}" / "cpufreq"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_a_figure_s_machine_on_the_cpu() -> None:
    described = describe_machine(CPU)
    assert described["device"] == "cpu"
    assert described["device_name"] == described["cpu"] == machine.device_name(CPU)
    assert described["load_average"] >= 0
    assert not [name for name in described if "clock" in name or name.startswith("cuda")]


def test_the_cpu_s_clock_by_the_kernel_s_frequency_scaling(kernel: Path) -> None:
    slow = {"scaling_cur_freq": "800000", "cpuinfo_max_freq": "4000000", "scaling_governor": "powersave"}
    write_cpu(kernel, 0, **slow)
    write_cpu(kernel, 11, **slow | {"scaling_cur_freq": "3900500"})
    described = describe_machine(CPU)
    assert described["cpu_mhz"] == 3900.5
    assert described["cpu_max_mhz"] == 4000
    assert described["cpu_governor"] == "powersave"


def test_without_frequency_scaling_by_what_the_cores_say(kernel: Path) -> None:
    (kernel / "cpuinfo").write_text("model name\t: Made Up 9000\ncpu MHz\t\t: 2000.5\n\ncpu MHz\t\t: 2500.5\n")
    described = describe_machine(CPU)
    assert (described["cpu"], described["cpu_mhz"]) == ("Made Up 9000", 2500.5)
    assert "cpu_max_mhz" not in described
    assert "cpu_governor" not in described


def test_a_clock_that_nobody_tells_is_absent(kernel: Path) -> None:
    assert not [name for name in describe_machine(CPU) if "mhz" in name]


def test_settings_that_change_figures_are_kept_where_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert not describe_machine(CPU)["environment"].keys() & set(SETTINGS)
    for name in SETTINGS:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    environment = describe_machine(CPU)["environment"]
    assert {name: environment[name] for name in SETTINGS} == dict.fromkeys(SETTINGS, "1")
    assert "SOME_TOKEN" not in environment


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    """As much of the binding as is used, with the figures of one GPU; `refused` raise as on a virtual GPU."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *refused: str) -> None:
        super().__init__("pynvml")
        self._refused = refused
        self.open = 0

    def _answer(self, name: str, value: Any) -> Any:
        if name in self._refused:
            raise NVMLError(name)
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._answer("driver", "570.86.15")

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self._answer("cuda", 12080)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-one-of-them"
        return self._answer("handle", "handle")

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self._answer("clock", {1: 1755, 2: 2619}[kind])

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return self._answer("max", {1: 1980, 2: 2619}[kind])

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self._answer("power", 650_000)


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of it, on a machine whose kernel module says nothing."""
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=2**37, uuid="one-of-them", clock_rate=1_980_000, memory_clock_rate=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(gpu, "DRIVER_FILE", tmp_path / "version")


EVERYTHING = {
    "cuda_driver": "570.86.15",
    "cuda_driver_supports": "12.8",
    "sm_clock_mhz": 1755,
    "sm_clock_max_mhz": 1980,
    "memory_clock_mhz": 2619,
    "memory_clock_max_mhz": 2619,
    "power_limit_w": 650,
}


@pytest.mark.usefixtures("one_gpu")
def test_driver_clocks_and_power_limit_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert describe_gpu(CUDA) == EVERYTHING
    assert nvml.open == 0
    described = describe_machine(CUDA)
    assert described.items() >= EVERYTHING.items()
    assert (described["device_name"], described["device_memory_bytes"]) == ("NVIDIA H200", 2**37)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("refused", "absent"),
    [
        ("power", {"power_limit_w"}),
        ("clock", {"sm_clock_mhz", "memory_clock_mhz"}),
        ("handle", {"sm_clock_mhz", "memory_clock_mhz", "memory_clock_max_mhz", "power_limit_w"}),
        ("init", EVERYTHING.keys() - {"sm_clock_max_mhz"}),
    ],
)
def test_what_a_gpu_does_not_tell_is_absent(refused: str, absent: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(refused))
    assert describe_gpu(CUDA) == {name: value for name, value in EVERYTHING.items() if name not in absent}


@pytest.mark.usefixtures("one_gpu")
def test_without_the_binding_torch_and_the_kernel_module_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert describe_gpu(CUDA) == {"sm_clock_max_mhz": 1980}
    gpu.DRIVER_FILE.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15\nGCC version: 12\n")
    assert describe_gpu(CUDA)["cuda_driver"].endswith("570.86.15")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_tells_something_and_never_zero() -> None:
    described = describe_gpu(torch.device("cuda"))
    assert described
    assert all(described.values())


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert describe_versions().keys() == {"python", "torch"}


@pytest.mark.skipif(not (Path(__file__).parents[2] / ".git").exists(), reason="needs a git checkout")
def test_the_commit_and_whether_it_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe_git()
    assert len(described["commit"]) == 40
    assert isinstance(described["dirty"], bool)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git to ask
    assert describe_git() == {}
