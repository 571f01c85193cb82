"""bias_act at a discriminator's shapes, to the second derivative, with --benchmark-only."""

import pytest
import torch
import torch.nn.functional as F
from bench import DEVICE, IMPLS, PASSES, cases, count, run

from kernels.bias_act import bias_act, bias_act_reference, bias_act_torch

CASES = {"gan, mnist": (64, 32, 14, 14), "64x64x14x14": (64, 64, 14, 14), "64x128x7x7": (64, 128, 7, 7),
         "64x128x32x32": (64, 128, 32, 32), "8x256x64x64": (8, 256, 64, 64)}
FORMS = {"reference": bias_act_reference, "plain": bias_act_torch, "triton": bias_act,
         "three steps": lambda x, bias: F.leaky_relu(x + bias.view(-1, 1, 1), 0.2) * 2**0.5}
TWICE = "forward+backward twice"


def twice(f):
    """What a gradient penalty does with f: its derivative, as a function of the gradient dy handed to it."""
    def dx(x, bias, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x, bias.detach()), x, dy, create_graph=True)[0]
    return dx


@pytest.mark.parametrize("passes", (*PASSES, TWICE))
@pytest.mark.parametrize("impl", (*IMPLS, "three steps"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("gan, mnist", "64x128x32x32"))
def test_bias_act(benchmark, case, dtype, impl, passes):
    if impl.startswith("compiled") and passes == TWICE:
        pytest.skip("torch.compile cannot differentiate twice")
    torch.manual_seed(0)
    shape = (count(benchmark, CASES[case][0]), *CASES[case][1:])
    x, dy = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
    bias, n = torch.randn(x.shape[1], device=DEVICE, dtype=dtype), x.numel() * x.element_size()
    inputs, forms = (x, bias), FORMS
    if passes == TWICE:
        inputs, forms = (x, bias, dy), {name: twice(f) for name, f in FORMS.items()}
    run(benchmark, f"bias_act {case} {dtype}", impl, passes, forms, inputs,
        {"forward": 2 * n, "backward": 3 * n, TWICE: 8 * n}, tolerance=1e-3 if dtype == torch.float32 else 5e-2)
