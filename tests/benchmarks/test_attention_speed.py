"""attention at the scripts' shapes and two larger ones, with --benchmark-only; memory.

Where there is a bias, PyTorch's FlexAttention is timed beside it; on a CPU it has no gradients.
"""

import pytest
import torch
from bench import DEVICE, IMPLS, PASSES, cases, compiled, peak_bytes, run

from kernels import attention as module
from kernels.attention import attention, attention_reference, attention_torch

CASES = {  # name: (B, n_head, T, head_dim), H, mask, with a bias
    "diffusion, mnist": ((32, 4, 49, 16), 7, None, False),
    "transformer, mnist": ((16, 4, 49, 32), 7, "causal", False),
    "a position a pixel, strict": ((8, 4, 784, 32), 28, "strict", False),
    "a position a pixel, causal": ((8, 4, 784, 32), 28, "causal", False),
    "a position a pixel, bias": ((8, 4, 784, 32), 28, None, True),
    "a position a pixel, causal, bias": ((8, 4, 784, 32), 28, "causal", True),
    "8x8x1024x64, strict": ((8, 8, 1024, 64), 32, "strict", False),
    "4x8x2048x64, causal, bias": ((4, 8, 2048, 64), 32, "causal", True),
}


def flex(mask, H, W):
    """Attention with a bias by FlexAttention, compiled: a score_mod looks the table up, a mask leaves whole tiles out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = {"causal": lambda b, h, i, j: i >= j, "strict": lambda b, h, i, j: i > j}
    tiles = create_block_mask(seen[mask], None, None, H * W, H * W, device=DEVICE) if mask else None

    def attend(q, k, v, bias):
        def score_mod(score, b, h, i, j):
            return score + bias[h, i // W - j // W + H - 1, i % W - j % W + W - 1]

        return flex_attention(q, k, v, score_mod=score_mod, block_mask=tiles)

    return compiled(attend)


def inputs(shape, H, bias, dtype=torch.float32):
    B, n_head, T, _ = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(3))
    return (q, k, v) + ((torch.randn(n_head, 2 * H - 1, 2 * T // H - 1, device=DEVICE, dtype=dtype),) if bias else ())


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", (*IMPLS, "flex attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("diffusion, mnist", "transformer, mnist", "a position a pixel, strict", "a position a pixel, bias",
               "a position a pixel, causal, bias"))
def test_attention(benchmark, case, dtype, impl, passes):
    shape, H, mask, bias = CASES[case]
    if impl == "flex attention" and (not bias or benchmark.disabled or DEVICE == "cpu" and passes != "forward"):
        pytest.skip("only with a bias, where it is timed, and on a CPU only without gradients")
    if benchmark.disabled and DEVICE == "cpu":  # once, untimed: a check, for which one head of one image is enough
        shape = (1, 1, *shape[2:])
    x = inputs(shape, H, bias, dtype)
    forms = {"reference": attention_reference, "plain": attention_torch, "triton": attention}
    forms = {name: lambda q, k, v, b=None, f=f: f(q, k, v, mask, bias=b) for name, f in forms.items()}
    if impl == "flex attention":
        forms[impl] = flex(mask, H, shape[2] // H)
    n = x[0].numel() * x[0].element_size()
    B, n_head, T, head_dim = shape
    product = 2 * B * n_head * T * T * head_dim / (2 if mask else 1)  # of two T x head_dim matrices; a mask leaves half
    run(benchmark, f"attention {case} {dtype}", impl, passes, forms, x, {"forward": 4 * n, "backward": 8 * n},
        flops={"forward": 2 * product, "backward": 5 * product}, tolerance=1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("mask, bias", [(None, False), ("causal", False), ("strict", False), (None, True), ("strict", True)])
def test_memory_grows_linearly(mask, bias, passes, monkeypatch):
    """Twice, 4 and 8 times as many positions, in an image of as many more rows, take at most that much more memory.

    Without a bias from 1,024 positions on: below, PyTorch's kernel on the CPU takes larger tiles at certain lengths.
    """
    monkeypatch.setattr(module, "PLAIN_SCORES", 1)  # what the plain form holds at least: the scores of one row of the image
    f, peaks = attention if DEVICE == "cuda" else attention_torch, []
    for H in (8, 16, 32, 64) if bias else (64, 128, 256, 512):
        x = [a.requires_grad_(passes != "forward") for a in inputs((1, 1, 16 * H, 16), H, bias)]

        def call(x=x):
            y = f(*x[:3], mask, bias=x[3] if bias else None)
            return torch.autograd.grad(y.sum(), x) if passes != "forward" else y

        call()
        peaks.append(peak_bytes(call))
    assert all(more <= 1.1 * times * peaks[0] for more, times in zip(peaks, (1, 2, 4, 8), strict=True)), peaks
