"""Where a benchmark runs: a CUDA device, or with --device cpu this machine, where captured steps are left out."""

import torch

from harness.errors import HarnessError

NO_GRAPHS = "a CUDA graph is of a CUDA device; this is the CPU"
NO_COUNTERS = "the CPU's allocator keeps no counters"


def device_named(name: str) -> torch.device:
    """Raises HarnessError for a device that is not here."""
    if name not in ("cuda", "cpu"):
        raise HarnessError(f"--device {name}; allowed: cuda, cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise HarnessError(f"--device cuda: {why_no_cuda()} Give --device cpu to see the benchmark itself run.")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    # What runs here is tiny, and threads that wait for each other would take most of the time.
    torch.set_num_threads(1)
    return torch.device("cpu")


def why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA. Install a build with it."
    return "PyTorch has CUDA and sees no device (is a driver there, and CUDA_VISIBLE_DEVICES not empty?)."


def set_compute(compute: str, device: torch.device) -> None:
    """The process-wide switches that tell fp32 from tf32. Raises HarnessError for what the device has not."""
    if compute not in ("fp32", "tf32", "bf16"):
        raise HarnessError(f"--compute {compute}; allowed: fp32, tf32, bf16.")
    if compute == "tf32" and device.type == "cpu":
        raise HarnessError("--compute tf32 is a mode of NVIDIA GPUs; this is the CPU. Give fp32 or bf16.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute == "tf32"


def free(device: torch.device) -> None:
    """Give back what is cached of memory, before somebody else's is measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
