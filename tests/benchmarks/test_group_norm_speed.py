"""group_norm_silu at diffusion.py's shapes and two larger ones, with --benchmark-only."""

import pytest
import torch
from bench import DEVICE, IMPLS, PASSES, cases, count, run

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
