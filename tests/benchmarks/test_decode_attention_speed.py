"""decode_attention at growing lengths of the cache, with --benchmark-only."""

import pytest
import torch
from bench import DEVICE, IMPLS, cases, count, run

from kernels.decode_attention import decode_attention, decode_attention_reference, decode_attention_torch

CASES = {  # name: shape of the cache, positions of it that are valid
    "16x4x784x32 at 49": ((16, 4, 784, 32), 49),
    "16x4x784x32 at 784": ((16, 4, 784, 32), 784),
    "8x8x4096x64 at 1024": ((8, 8, 4096, 64), 1024),
    "8x8x4096x64 at 4096": ((8, 8, 4096, 64), 4096),
}
FORMS = {"reference": decode_attention_reference, "plain": decode_attention_torch, "triton": decode_attention}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("16x4x784x32 at 49", "8x8x4096x64 at 4096"))
def test_decode_attention(benchmark, case, dtype, impl):
    shape, length = CASES[case]
    shape = (count(benchmark, shape[0]), *shape[1:])
    torch.manual_seed(0)
    k, v = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
    q = torch.randn(*shape[:2], 1, shape[3], device=DEVICE, dtype=dtype)
    with torch.no_grad():
        run(benchmark, f"decode_attention {case} {dtype}", impl, "forward", FORMS, (q, k, v, length),
            {"forward": (2 * length + 2) * shape[0] * shape[1] * shape[3] * q.element_size()},
            tolerance=1e-3 if dtype == torch.float32 else 5e-2)
