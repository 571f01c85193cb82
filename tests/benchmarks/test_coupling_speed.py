"""Both couplings at a flow's shape and two larger ones, with --benchmark-only.

Where nflows and normflows are installed (pip install nflows normflows), their splines are timed beside ours.
"""

import functools

import pytest
import torch
from bench import DEVICE, IMPLS, PASSES, cases, count, run

from kernels import coupling

CASES = {  # name: shape of x; a spline transforms all of it, an affine layer half of its channels
    "flow, mnist, 2x2 squeezed": (64, 4, 14, 14),
    "64x12x32x32": (64, 12, 32, 32),
    "8192x64": (8192, 64),
}
K = 8  # bins
PEERS = {"nflows": "nflows.transforms.splines.rational_quadratic", "normflows": "normflows.utils.splines"}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)


def time_it(benchmark, op, case, dtype, impl, passes, reverse, how, channels, ideal):
    """ideal: bytes forward and backward, in bytes of x."""
    shape = (count(benchmark, CASES[case][0]), *CASES[case][1:])
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    params = torch.randn(shape[0], channels, *shape[2:], device=DEVICE, dtype=dtype)
    if op == "spline_coupling":
        x = away_from_knots(x, params, how["tail_bound"], reverse)
    forms = {name: functools.partial(getattr(coupling, op + suffix), **how, reverse=reverse)
             for name, suffix in (("reference", "_reference"), ("plain", "_torch"), ("triton", ""))}
    if impl in PEERS:
        forms[impl] = functools.partial(peer, pytest.importorskip(PEERS[impl]), **how, reverse=reverse)
    n = x.numel() * x.element_size()
    run(benchmark, f"{op} {case} {dtype}{', reverse' * reverse}", impl, passes, forms, (x, params),
        {"forward": ideal[0] * n, "backward": ideal[1] * n},
        tolerance=1e-2 if dtype == torch.float32 else 1e-1)


def away_from_knots(x, params, bound, reverse, distance=1e-4):
    """x, moved off every knot: the gradient of log_det jumps there, and in float32 rounding would choose the side."""
    raw = params.unflatten(1, (x.shape[1], -1))[:, :, K * reverse:K * (reverse + 1)].double()
    sizes = coupling.MIN + (1 - coupling.MIN * K) * torch.softmax(raw, 2)
    inner = 2 * bound * sizes.cumsum(2) - bound
    gaps = (x.unsqueeze(2) - torch.cat([torch.full_like(inner[:, :, :1], -bound), inner], 2)).abs()
    return torch.where(gaps.amin(2) < distance, x + 2 * distance, x)


def peer(module, x, params, tail_bound, reverse):
    """The same spline by a peer's function, which takes and gives the parameters of a number last."""
    w, h, d = params.unflatten(1, (x.shape[1], -1)).movedim(2, -1).split((K, K, K - 1), -1)
    least = dict.fromkeys(("min_bin_width", "min_bin_height", "min_derivative"), coupling.MIN)
    y, log_det = module.unconstrained_rational_quadratic_spline(x, w, h, d, inverse=reverse, tail_bound=tail_bound, **least)
    return y, log_det.flatten(1).sum(1)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", (*IMPLS, *PEERS))
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@dtypes
@cases(CASES, ("flow, mnist, 2x2 squeezed", "64x12x32x32"))
def test_spline_coupling(benchmark, case, dtype, reverse, impl, passes):
    time_it(benchmark, "spline_coupling", case, dtype, impl, passes, reverse, {"tail_bound": 3.0}, CASES[case][1] * (3 * K - 1),
            (2 * K + 4, 5 * K + 4))


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", IMPLS)
@dtypes
@cases(CASES, ("flow, mnist, 2x2 squeezed", "64x12x32x32"))
def test_affine_coupling(benchmark, case, dtype, impl, passes):
    channels = CASES[case][1]
    time_it(benchmark, "affine_coupling", case, dtype, impl, passes, False, {"mask_or_split": channels // 2}, channels, (3, 4))
