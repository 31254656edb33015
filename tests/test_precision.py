"""Which precision suits a device."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bitrans_hf.stages import precision
from bitrans_hf.stages.precision import bf16_slowdown, has_native_bf16, why

CPU = torch.device("cpu")


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool | None, avx512_bf16: bool, amx: bool):
    """Make torch speak of another CPU; onednn None is a torch without oneDNN."""
    queries = {} if onednn is None else {"_is_mkldnn_bf16_supported": lambda: onednn}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**queries))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "amx", "native"),
    [
        ("x86_64", True, True, False, True),  # AMD Zen 4, Intel Cooper Lake
        ("AMD64", True, True, True, True),  # Intel Sapphire Rapids, Windows
        ("x86_64", True, False, True, True),
        ("x86_64", True, False, False, False),  # AVX-512 without bf16: oneDNN emulates it and says yes
        ("x86_64", False, True, True, False),  # ONEDNN_MAX_CPU_ISA=AVX2 on a CPU that has it
        ("x86_64", False, False, False, False),  # AVX2
        ("aarch64", True, False, False, True),  # Arm Neoverse V1
        ("aarch64", False, False, False, False),
        ("arm64", None, False, False, False),  # a Mac: torch without oneDNN
    ],
)
def test_a_cpu_has_native_bf16_where_onednn_uses_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool | None, avx512_bf16: bool, amx: bool, native: bool
):
    pretend_cpu(monkeypatch, machine, onednn, avx512_bf16, amx)
    assert has_native_bf16(CPU) is native
    assert why(CPU) == ("this CPU has native bf16" if native else "torch has no native bf16 on this CPU")


def test_a_torch_that_lacks_a_query_counts_as_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch):
    pretend_cpu(monkeypatch, "x86_64", True, True, True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not has_native_bf16(CPU)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_without_emulation(monkeypatch: pytest.MonkeyPatch, native: bool):
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert has_native_bf16(torch.device("cuda", 1)) is native
    assert asked == [False]
    assert ("no native bf16 on this GPU" in why(torch.device("cuda", 1))) is not native


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_compute_in_float32(kind: str):
    assert not has_native_bf16(torch.device(kind))


def test_what_bf16_costs_is_measured(monkeypatch: pytest.MonkeyPatch):
    # Twelve calls of each type, of which the fastest counts: 1 s in float32, 5 s in bf16.
    durations = [9.0, 3.0, 1.0, *[2.0] * 9, 20.0, 6.0, 5.0, *[7.0] * 9]
    readings = (reading for duration in durations for reading in (0.0, duration))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(readings))
    assert bf16_slowdown(CPU) == 5.0
