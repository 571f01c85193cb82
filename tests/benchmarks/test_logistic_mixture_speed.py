"""logistic_mixture, and the textbook form beside it, with --benchmark-only."""

import math

import pytest
import torch
import torch.nn.functional as F
from bench import DEVICE, IMPLS, PASSES, cases, count, run

from kernels.logistic_mixture import logistic_mixture, logistic_mixture_reference, logistic_mixture_torch

M = 10
CASES = {"64x1x28x28": (64, 1, 28, 28), "32x3x32x32": (32, 3, 32, 32),
         "16x3x64x64": (16, 3, 64, 64), "256x1x28x28": (256, 1, 28, 28)}


def textbook(x, params):
    """As PixelCNN++ states it: both sigmoids, their difference where it is large enough, else the density times a bin."""
    C, params = x.shape[1], params.float()
    logits, rest = params[:, :M], params[:, M:].unflatten(1, (-1, C, M))
    means, log_scales = rest[:, 0], rest[:, 1].clamp(min=-7)
    x = x[:, :, None].float() / 127.5 - 1
    if C == 3:
        c, red, green = rest[:, 2].tanh(), x[:, 0], x[:, 1]
        means = torch.stack([means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green], 1)
    inv_s, centred = torch.exp(-log_scales), x - means
    upper, middle, lower = inv_s * (centred + 1 / 255), inv_s * centred, inv_s * (centred - 1 / 255)
    difference = torch.sigmoid(upper) - torch.sigmoid(lower)
    log_first, log_last = upper - F.softplus(upper), -F.softplus(lower)
    log_density = middle - log_scales - 2 * F.softplus(middle)
    log_p = torch.where(difference > 1e-5, difference.clamp(min=1e-12).log(), log_density - math.log(127.5))
    log_p = torch.where(x < -0.999, log_first, torch.where(x > 0.999, log_last, log_p))
    return torch.logsumexp(log_p.sum(1) + F.log_softmax(logits, 1), 1)


FORMS = {"reference": logistic_mixture_reference, "plain": logistic_mixture_torch, "triton": logistic_mixture,
         "textbook": textbook}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", (*IMPLS, "textbook"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("64x1x28x28", "32x3x32x32"))
def test_logistic_mixture(benchmark, case, dtype, impl, passes):
    shape = (count(benchmark, CASES[case][0]), *CASES[case][1:])
    torch.manual_seed(0)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    x[torch.rand(x.shape, device=DEVICE) < 0.3] = 0
    params = torch.randn(shape[0], M * (3 if shape[1] == 1 else 10), *shape[2:], device=DEVICE)
    params[:, M * (1 + shape[1]):M * (1 + 2 * shape[1])] -= 2  # log_scales
    params = params.to(dtype)
    n, rest = params.numel() * params.element_size(), x.numel() + 4 * x[:, 0].numel()
    ideal = {"forward": n + rest, "backward": 2 * n + 4 * x[:, 0].numel()}
    ideal["forward+backward"] = n + sum(ideal.values())  # the gradient is written with the forward pass
    run(benchmark, f"logistic_mixture {case} {dtype}", impl, passes, FORMS, (x, params), ideal,
        tolerance=1e-3 if dtype == torch.float32 and impl != "textbook" else 5e-2)  # whose differences cancel
