"""Masked convolutions at a PixelCNN's shapes and larger, with --benchmark-only."""

import pytest
import torch
from bench import DEVICE, IMPLS, PASSES, cases, count, run

from kernels import masked_conv as module

CASES = {  # name: (shape of x, output channels, sides of the kernel)
    **{f"autoregressive, mnist, {kh}x{kw}": ((16, 64, 7, 7), 64, (kh, kw)) for kh, kw in ((1, 3), (3, 3))},
    **{f"mnist, {B}x{C}, {k}x{k}": ((B, C, 28, 28), C, (k, k)) for B in (16, 64) for C in (32, 64) for k in (3, 5, 7)},
    "64x128x32x32, 3x3": ((64, 128, 32, 32), 128, (3, 3)),
    "64x128x32x32, 5x5": ((64, 128, 32, 32), 128, (5, 5)),
}
FORMS = {op: {"reference": getattr(module, f"{op}_reference"), "plain": getattr(module, f"{op}_torch"),
              "triton": getattr(module, op)} for op in ("masked_conv2d", "gated_masked_conv2d")}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@pytest.mark.parametrize("op", FORMS)
@cases(CASES, ("autoregressive, mnist, 1x3", "autoregressive, mnist, 3x3", "mnist, 16x64, 5x5"))
def test_masked_conv(benchmark, case, op, dtype, impl, passes):
    shape, N, (kh, kw) = CASES[case]
    if benchmark.disabled and shape[0] > 16:
        pytest.skip("large, so only where it is timed")
    shape = (count(benchmark, shape[0]), *shape[1:])
    torch.manual_seed(0)
    wide = 2 * N if op.startswith("gated") else N
    x = torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(wide, shape[1], kh, kw, device=DEVICE, dtype=dtype) / (shape[1] * kh * kw) ** 0.5
    inputs = (x, weight, torch.randn(wide, device=DEVICE, dtype=dtype))
    n = x.numel() * x.element_size()
    y = n // shape[1] * N
    ideal = {"forward": n + y, "backward": 2 * n + 2 * y}  # dx: dy in, dx out; dweight: x and dy in
    if op.startswith("gated"):
        inputs += (torch.randn(shape[0], wide, device=DEVICE, dtype=dtype),)
        ideal = {"forward": n + y, "backward": 2 * n + 9 * y}  # the gate 5 y, then twice the 2 y of p and q
        ideal["forward+backward"] = 3 * n + 12 * y  # p and q are written for the backward pass
    product = 2 * x.numel() * wide * (kh * kw // 2 + 1)  # over the live taps
    flops = {"forward": product, "backward": 2 * product}
    run(benchmark, f"{op} {case} {dtype}", impl, passes, FORMS[op], inputs, ideal, flops=flops,
        tolerance=1e-3 if dtype == torch.float32 else 5e-2)
