"""group_norm_silu at diffusion.py's shapes and two larger ones, with --benchmark-only."""

import pytest
import torch
from bench import DEVICE, IMPLS, PASSES, cases, count, prepare, run

import kernels
from kernels import group_norm as module
from kernels.group_norm import group_norm_silu, group_norm_silu_reference, group_norm_silu_torch

CASES = {  # name: (shape of x, groups)
    "diffusion, mnist, level 1": ((32, 32, 14, 14), 8),
    "diffusion, mnist, level 2": ((32, 64, 7, 7), 8),
    "64x128x32x32": ((64, 128, 32, 32), 8),
    "8x256x64x64": ((8, 256, 64, 64), 32),
}
FORMS = {"reference": group_norm_silu_reference, "plain": group_norm_silu_torch, "triton": group_norm_silu}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("diffusion, mnist, level 1", "diffusion, mnist, level 2", "64x128x32x32"))
def test_group_norm_silu(benchmark, case, dtype, impl, passes):
    (B, *size), groups = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(count(benchmark, B), *size, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, size[0], device=DEVICE, dtype=dtype)
    n = x.numel() * x.element_size()
    run(benchmark, f"group_norm_silu {case} {dtype}", impl, passes, FORMS, (x, groups, weight, bias),
        {"forward": 2 * n, "backward": 3 * n}, tolerance=1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("group", ["whole", "split"])
def test_part_of_the_cpu(benchmark, group, backend, passes, monkeypatch):
    """What a call costs before anything is computed: of the kernels without their launches, of the plain form on 32 numbers."""
    launched = []
    monkeypatch.setattr(kernels, "available", lambda device=None: (True, ""))
    monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: launched.append(kernel.__name__))
    monkeypatch.setattr(module, "TILE", module.TILE if group == "whole" else 4)
    benchmark.group = f"group_norm_silu, the part of the CPU, {group} groups, {passes}"
    x = torch.randn(2, 4, 2, 2)
    weight, bias = torch.randn(2, 4)
    call = prepare(lambda *args: group_norm_silu(*args, backend=backend), (x, 2, weight, bias), passes)
    with torch.set_grad_enabled(passes != "forward"):
        benchmark(call)
    if backend == "triton":
        assert (set(launched) == {"_group_fwd_kernel", *["_group_bwd_kernel"] * (passes != "forward")}) == (group == "whole")
    else:
        assert not launched
