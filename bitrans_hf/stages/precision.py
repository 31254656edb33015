"""The precision for a device: bf16 if the hardware multiplies bf16 numbers, float32 otherwise."""

import platform
import time

import torch

SHOWN = {"no": "float32", "bf16": "bf16"}
"""Display names of the precisions; the keys are those of Accelerate and recipes."""


def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 numbers in hardware, which makes bf16 faster than float32.

    NVIDIA's GPUs do from compute capability 8.0 on, and so do AMD's. On a CPU, oneDNN is asked, which computes such
    products for torch. Its answer respects limits in the environment such as `ONEDNN_MAX_CPU_ISA=AVX2`. On x86 it also
    says yes if it emulates bf16 with AVX-512, so the CPU must have bf16 instructions too. Other devices count as
    having none: Apple's first GPUs emulate bf16, and the rest are untested.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch was built without oneDNN
    if asked is None or not asked():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in queries)


def why(device: torch.device) -> str:
    """Explain the answer of `has_native_bf16` in a few words."""
    name = {"cpu": "this CPU", "cuda": "this GPU", "mps": "Apple's GPU"}.get(device.type, f"the device {device.type}")
    return f"{name} has native bf16" if has_native_bf16(device) else f"torch has no native bf16 on {name}"


def bf16_slowdown(device: torch.device) -> float:
    """Measure how many times longer a linear layer takes in bf16 than in float32, in under half a second."""
    inputs, layer = torch.ones(256, 384, device=device), torch.nn.Linear(384, 384, device=device)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, same_layer = inputs.to(dtype), layer.to(dtype)
        times = []
        for _ in range(12):  # the fastest counts: the first call sets up, and others share the machine
            start = time.perf_counter()
            with torch.no_grad():
                same_layer(x).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]
