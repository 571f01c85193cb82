"""spline_coupling: both directions, their inverses, Jacobians and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    GRADIENTS,
    agree,
    assert_near,
    compilations,
    compiles,
    deterministic,
    gradcheck,
    leaves,
    opcheck,
    traffic,
)

import kernels
from kernels import spline as module
from kernels.spline import MIN, spline_coupling, spline_coupling_reference, spline_coupling_torch

BOUND = 2.7
SHAPES = [(1, 1), (3, 7), (2, 3, 5), (2, 4, 3, 5)]
SPLINES = {(1, 1): 1, (3, 7): 4, (2, 3, 5): 5, (2, 4, 3, 5): 8}  # bins for each shape
both_ways = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture
def small(monkeypatch):
    """Few elements make many programs."""
    monkeypatch.setattr(module, "TILE", 32)


def spline(reverse=False, f=spline_coupling, bound=BOUND):
    return lambda x, params: f(x, params, bound, reverse)


def by_loop(*args):
    """The plain spline without looking bins up, as it is for many places and where gradients are asked for."""
    few, module.FEW = module.FEW, 0
    try:
        return spline_coupling_torch(*args)
    finally:
        module.FEW = few


def by_few(x, params, bound=BOUND, reverse=True):
    """The plain inverse as it is for few numbers, where no gradient is asked for."""
    assert reverse and x.numel() <= module.FEW
    with torch.no_grad():
        return spline_coupling_torch(x, params, bound, reverse)


def reference(reverse=False, bound=BOUND):
    return spline(reverse, spline_coupling_reference, bound)


def inputs(shape, K=None, dtype=torch.float32, spread=2.0):
    K = K or SPLINES[shape]
    params = torch.randn(shape[0], shape[1] * (3 * K - 1), *shape[2:], dtype=dtype, device=DEVICE)
    return torch.randn(shape, dtype=dtype, device=DEVICE) * spread, params


def masks(shape):
    """A checkerboard over everything, one over channels, one over the last dimension alone, none and all."""
    index = torch.arange(math.prod(shape[1:]), device=DEVICE).view(shape[1:])
    return [index % 2, (index % 3 == 0), index.flatten()[:shape[-1]] % 2.0, torch.zeros_like(index), torch.ones_like(index)]


def knots(params, K, bound=BOUND):
    """Knots (K + 1) and derivatives of one spline, by a loop."""
    out = []
    for raw in (params[:K], params[K:2 * K]):
        e = [math.exp(v - max(raw)) for v in raw]
        at = [-bound]
        for v in e:
            at.append(at[-1] + 2 * bound * (MIN + (1 - MIN * K) * v / sum(e)))
        out.append(at)
    return *out, [1.0, *(MIN + math.log1p(math.exp(v)) for v in params[2 * K:]), 1.0]


def brute_force(x, params, K, bound=BOUND):
    """y and its derivative for one x, by eq. 4 and 5 as they are printed."""
    xs, ys, d = knots(params, K, bound)
    if not -bound <= x <= bound:
        return x, 1.0
    k = max(i for i in range(K) if i == 0 or x >= xs[i])
    xi, s = (x - xs[k]) / (xs[k + 1] - xs[k]), (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
    below = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + d[k] * xi * (1 - xi)) / below
    return y, s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / below**2


# ---- the references against what is independent of them


@pytest.mark.parametrize("f", [spline_coupling_reference, spline_coupling_torch, by_loop, spline_coupling])
def test_by_brute_force(f):
    (x, params), K = inputs((3, 7), dtype=torch.float64), 4
    y, log_det = f(x, params, BOUND)
    for b in range(3):
        got = [brute_force(x[b, i].item(), params[b, 11 * i:11 * i + 11].tolist(), K) for i in range(7)]
        torch.testing.assert_close(y[b].cpu(), torch.tensor([v for v, _ in got], dtype=torch.float64), rtol=0, atol=1e-12)
        assert abs(log_det[b].item() - sum(math.log(d) for _, d in got)) < 1e-11


@both_ways
def test_against_nflows(reverse):
    peer = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    (x, params), K = inputs((2, 4, 3, 5), dtype=torch.float64), 8
    p = params.unflatten(1, (4, -1)).movedim(2, -1)
    want, log_d = peer.unconstrained_rational_quadratic_spline(x, p[..., :K], p[..., K:2 * K], p[..., 2 * K:], inverse=reverse,
                                                               tail_bound=BOUND, min_bin_width=MIN, min_bin_height=MIN,
                                                               min_derivative=MIN)
    y, log_det = spline_coupling_reference(x, params, BOUND, reverse)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, log_d.flatten(1).sum(1), rtol=0, atol=1e-9)


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, spline_coupling_reference])
def test_jacobian(f, reverse):
    x, params = inputs((2, 7), 4, torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: spline(reverse, f)(x, params)[0].sum(0), x).movedim(1, 0)
    torch.testing.assert_close(spline(reverse, f)(x, params)[1], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


# ---- inverses, knots, tails, extremes


@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop, spline_coupling_reference])
def test_round_trip(f):
    x, params = inputs((2, 4, 3, 5), dtype=torch.float64)
    y, forward = spline(False, f)(x, params)
    back, inverse = spline(True, f)(y, params)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    assert (y - x).abs().max() > 0.1


@both_ways
@pytest.mark.parametrize("bound", [1.0, 3.0])
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop])
def test_gradients_at_the_bound_and_far_beyond(f, bound, reverse):
    """In float32. From the bound to ten times as far y = x and y' = 1, whatever the params are: nothing is asked of them.
    From the bound inwards log y' has a slope, that of the reference in float64."""
    ends = torch.tensor([bound, 10 * bound])
    ends = torch.cat([torch.nextafter(ends[:1], torch.zeros(1)), ends, torch.nextafter(ends[:1], ends[1:])])
    ends = torch.cat([ends, -ends]).repeat(4).to(DEVICE)[:, None]  # (32,1): each place is a sample of its own
    params = torch.randn(32, 23, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outside = ends.abs() > bound
    assert outside.sum() == 16

    def slopes(f, dtype):
        x, p = leaves((ends, params), dtype)
        y, log_det = spline(reverse, f, bound)(x, p)
        of_y = torch.autograd.grad(y.sum(), (x, p), retain_graph=True)
        of_log_det = torch.autograd.grad(log_det.sum(), (x, p))
        return y, log_det, *of_y, *of_log_det

    y, log_det, y_x, y_p, l_x, l_p = slopes(f, torch.float32)
    want = slopes(spline_coupling_reference, torch.float64)[4]
    assert torch.equal(y[outside], ends[outside]) and (log_det[outside[:, 0]] == 0).all()
    assert (y_x[outside] == 1).all() and (l_x[outside] == 0).all()
    assert (y_p[outside[:, 0]] == 0).all() and (l_p[outside[:, 0]] == 0).all()
    torch.testing.assert_close(y, ends, rtol=1e-6, atol=0)
    for got, at_the_end in ((log_det, 0.0), (y_x, 1.0), (y_p, 0.0), (l_p, 0.0)):
        torch.testing.assert_close(got, torch.full_like(got, at_the_end), rtol=0, atol=1e-3)
    assert (want[~outside] != 0).all()
    torch.testing.assert_close(l_x.double(), want, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop])
def test_is_monotonic(f):
    x = torch.linspace(-1.2 * BOUND, 1.2 * BOUND, 301, dtype=torch.float64, device=DEVICE).view(1, 1, -1)
    params = (torch.randn(1, 14, 1, dtype=torch.float64, device=DEVICE) * 3).expand(1, 14, 301)
    y = spline(False, f)(x, params)[0].flatten()
    assert (y.diff() > 0).all()
    torch.testing.assert_close(spline(True, f)(y.view_as(x), params)[0], x, rtol=0, atol=1e-9)


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails(f, reverse, dtype):
    """Beyond the bound: x itself bit for bit, a log_det of 0, a gradient of 1 and none for the parameters."""
    x = torch.tensor([[-1e4, -BOUND - 1e-3, BOUND + 1e-3, 1e4, math.inf]], dtype=dtype, device=DEVICE).requires_grad_()
    params = inputs((1, 5), 4, dtype)[1].requires_grad_()
    y, log_det = spline(reverse, f)(x, params)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert torch.equal(y, x) and log_det.item() == 0 and (dx == 1).all() and not d_params.any()
    assert spline(reverse, f)(torch.full_like(x, math.nan), params)[0].isnan().all()


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch])
def test_at_the_knots(f, reverse):
    """A knot goes to its knot, with its derivative; the two outer ones to themselves with derivative 1."""
    K, raw = 4, torch.randn(11, dtype=torch.float64)
    xs, ys, d = knots(raw.tolist(), K)
    xs, ys = (torch.tensor([a], dtype=torch.float64, device=DEVICE) for a in ((ys, xs) if reverse else (xs, ys)))
    xs = xs.requires_grad_()
    xs.data[0, -1] = BOUND
    y, _ = spline(reverse, f)(xs, raw.to(DEVICE).repeat(K + 1)[None])
    torch.testing.assert_close(y, ys, rtol=0, atol=1e-12)
    slope, = torch.autograd.grad(y.sum(), xs)
    want = torch.tensor([d], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(slope, 1 / want if reverse else want, rtol=0, atol=1e-9)
    for x in (-BOUND, BOUND):
        y, log_det = spline(reverse, f)(torch.full((1, 1), x, device=DEVICE), raw[None].float().to(DEVICE))
        assert abs(y.item() - x) < 1e-6 and abs(log_det.item()) < 2e-6


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_extreme_parameters(f, reverse, dtype):
    x = torch.linspace(-BOUND, BOUND, 64, dtype=dtype, device=DEVICE).view(1, 64).requires_grad_()
    params = ((torch.rand(1, 64 * 14, device=DEVICE) - 0.5).sign() * 1e3).to(dtype).requires_grad_()
    y, log_det = spline(reverse, f)(x, params)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert all(a.isfinite().all() for a in (y, log_det, dx, d_params)) and y.abs().max() <= BOUND * (1 + 1e-6)
    want, log_want = spline(reverse, spline_coupling_torch)(x.double(), params.double())
    assert torch.allclose(y.double(), want, atol=1e-2)


@pytest.mark.parametrize("K", [1, 2, 8, 64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1, 1), (7, 16), (4, 3, 5), (2, 2, 3, 4)])
def test_the_inverse_of_few(shape, K, monkeypatch):
    """In float64 what comes back is what went in, to the last digits, and both slopes are each other's reciprocal; the sums
    over an image are of its own numbers. Where a gradient is asked for the other form gives the same."""
    x, params = inputs(shape, K, torch.float64)
    x.view(-1)[:4] = torch.tensor([BOUND, -BOUND, 1.5 * BOUND, 0.0], dtype=torch.float64)[:x.numel()]
    y, forward = spline()(x, params)
    calls, inside = [], module._invert_few
    monkeypatch.setattr(module, "_invert_few", lambda *args: calls.append(args) or inside(*args))
    back, inverse = by_few(y, params)
    assert len(calls) == 1 and back.shape == x.shape and inverse.shape == (len(x),)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    for other in (spline(True, spline_coupling_torch)(*leaves((y, params), torch.float64)), by_loop(y, params, BOUND, True)):
        torch.testing.assert_close(other[0].detach(), back, rtol=0, atol=1e-10)
        torch.testing.assert_close(other[1].detach(), inverse, rtol=0, atol=1e-9)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_few_at_ends_knots_and_extremes(dtype):
    """Beyond the bound y itself bit for bit, and a slope of 1; knots go to their knots; what is not a number stays none; bins
    as narrow as they can be give finite numbers within the bound, those of float64."""
    params = inputs((1, 6), 4, dtype)[1]
    far = torch.tensor([[-math.inf, -1e4, -BOUND - 1e-3, BOUND + 1e-3, 1e4, math.inf]], dtype=dtype, device=DEVICE)
    back, inverse = by_few(far, params)
    assert torch.equal(back, far) and inverse.item() == 0
    assert by_few(torch.full_like(far, math.nan), params)[0].isnan().all()
    raw = torch.randn(11, dtype=torch.float64)
    xs, ys, d = (torch.tensor(a, dtype=torch.float64) for a in knots(raw.tolist(), 4))
    back, inverse = by_few(ys.to(DEVICE, dtype)[:, None], raw.to(DEVICE, dtype).repeat(5, 1))  # each knot is a sample
    near = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(back[:, 0].double().cpu(), xs, rtol=0, atol=near)
    torch.testing.assert_close(inverse.double().cpu(), -torch.log(d), rtol=0, atol=10 * near)
    y = torch.linspace(-BOUND, BOUND, 64, dtype=dtype, device=DEVICE).view(1, 64)
    params = ((torch.rand(1, 64 * 14, device=DEVICE) - 0.5).sign() * 1e3).to(dtype)
    back, inverse = by_few(y, params)
    assert inverse.isfinite().all() and back.abs().max() <= BOUND * (1 + 1e-6)
    torch.testing.assert_close(back.double(), by_loop(y.double(), params.double(), BOUND, True)[0], rtol=0, atol=1e-2)


def test_zero_parameters():
    """Raw parameters of 0 make equal bins, and knots stay in place."""
    x = torch.linspace(-BOUND, BOUND, 5, dtype=torch.float64, device=DEVICE).view(1, 5)
    torch.testing.assert_close(spline_coupling(x, x.new_zeros(1, 55), BOUND)[0], x, rtol=0, atol=1e-12)


# ---- values and gradients of the kernels


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, reverse):
    agree(spline(reverse), reference(reverse), inputs(shape), torch.float64, tolerance=1e-10)
    agree(spline(reverse), reference(reverse), inputs(shape), tolerance=2e-4)


@both_ways
@pytest.mark.parametrize("shape", [(1, 41), (1, 1, 5, 7)])
def test_of_several_tiles(small, shape, reverse):
    agree(spline(reverse), reference(reverse), inputs(shape, 3), torch.float64, tolerance=1e-10)


@both_ways
@pytest.mark.parametrize("K", [1, 2, 7, 17])
def test_of_any_number_of_bins(K, reverse):
    agree(spline(reverse), reference(reverse), inputs((2, 3), K), torch.float64, tolerance=1e-10)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype, reverse):
    x, params = inputs((2, 2, 3, 3), 4)
    agree(spline(reverse, bound=3.0), reference(reverse, bound=3.0), (x, params * 0.5), dtype)
    y, log_det = spline_coupling(x.to(dtype), params)  # params of another type than x
    assert y.dtype == dtype and log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    agree(spline(True), reference(True), inputs((2, 4, 3, 5), 3), torch.float64, gradient, 1e-10)


@both_ways
def test_a_single_output(reverse):
    """Gradients through y alone and through log_det alone add up to those through both."""
    f = spline(reverse)
    x, params = leaves(inputs((2, 3), 2), torch.float64)
    grads = [torch.autograd.grad(f(x, params)[i].sum(), [x, params], allow_unused=True) for i in (0, 1)]
    y, log_det = f(x, params)
    for a, b, c in zip(*grads, torch.autograd.grad(y.sum() + log_det.sum(), [x, params]), strict=True):
        torch.testing.assert_close(a + b, c)
        assert a.any()


@both_ways
def test_channels_last(reverse):
    x, params = inputs((2, 4, 3, 5), 3, torch.float64)
    last = [a.to(memory_format=torch.channels_last) for a in (x, params)]
    f = spline(reverse)
    agree(f, reference(reverse), last, torch.float64, tolerance=1e-10)
    agree(f, reference(reverse), (last[0], params), torch.float64, "transposed", tolerance=1e-10)
    assert f(*last)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    every = (slice(None),) * dim + (slice(None, None, 2),)
    x, params = inputs((4, 4, 4, 6), 1)
    agree(spline(), reference(), (x[every], params[every]), torch.float64, tolerance=1e-10)


def test_both_forms_of_spline_params():
    x, params = inputs((2, 4, 3, 5))
    for a, b in zip(spline_coupling(x, params), spline_coupling(x, params.unflatten(1, (4, -1))), strict=True):
        assert torch.equal(a, b)


def test_nothing_in_nothing_out():
    x, params = leaves(inputs((0, 4, 3, 3), 2))
    y, log_det = spline_coupling(x, params)
    (y.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape and params.grad.shape == params.shape and log_det.shape == (0,)


@pytest.mark.parametrize("x, params, bound", [
    ((2, 4), (2, 12), 3.0), ((2, 4), (2, 20), 0.0), ((2,), (2, 5), 3.0), ((2, 4), (3, 20), 3.0), ((2, 4), (2, 5, 4), 3.0),
    ((2, 4, 3), (2, 20, 4), 3.0), ((2, 4), (2, 4 * 300_002), 3.0)])
def test_shapes_that_do_not_fit(x, params, bound):
    with pytest.raises(ValueError, match="do not fit"):
        spline_coupling(torch.randn(x), torch.randn(params), bound)


def test_what_is_not_supported():
    x, params = inputs((1, 1), 65)
    with pytest.raises(RuntimeError, match="65 bins"):
        spline_coupling(x, params)
    with pytest.raises(RuntimeError, match="int64"):
        spline_coupling(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 10))
    with pytest.raises(RuntimeError, match="2\\^31"):
        spline_coupling(torch.zeros(1, 1).expand(1, 2**30), torch.zeros(1, 1).expand(1, 2 * 2**30))


# ---- which form runs, and in which types


def test_backend(monkeypatch):
    """backend stands in for kernels.mode in one call."""
    ran = []
    monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: ran.append(kernel))
    x, params = inputs((2, 4), 3)
    for mode in kernels.MODES:
        monkeypatch.setattr(kernels, "mode", mode)
        spline_coupling(x, params, backend="torch")
        assert not ran
        spline_coupling(x, params, backend="triton")
        assert ran.pop() is module._spline_fwd_kernel
    with pytest.raises(ValueError, match="must be one of"):
        spline_coupling(x, params, backend="cuda")


@both_ways
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float64, torch.float32), (torch.bfloat16, torch.float16)])
def test_mixed_types_and_autocast(kinds, autocast, reverse):
    """Both forms give x's type, the accumulator's for log_det, and the inputs' own for gradients; near float64."""
    x, params = inputs((2, 2, 3, 3), 4)
    x = x.to(kinds[0]).requires_grad_()
    params = (params * 0.5).to(kinds[1]).requires_grad_()
    exact = [a.detach().double().requires_grad_() for a in (x, params)]
    want = spline_coupling_reference(*exact, 3.0, reverse)
    d_want = torch.autograd.grad([a.sum() for a in want], exact)
    tolerance = 2e-2 if torch.bfloat16 in kinds else 4e-3 if torch.float16 in kinds else 2e-4
    for backend in ("torch", "triton"):
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            got = spline_coupling(x, params, 3.0, reverse, backend=backend)
        grads = torch.autograd.grad([a.sum() for a in got], (x, params))
        assert [a.dtype for a in (*got, *grads)] == [kinds[0], kernels.accumulator(x), *kinds]
        for a, b in zip((*got, *grads), (*want, *d_want), strict=True):
            assert_near(a, b, tolerance, backend)


def test_few_compilations(monkeypatch):
    """Sizes are arguments: images of ten sizes, and vectors, differ only by what triton makes of integers."""
    sizes = [(3, 3), (4, 4), (5, 6), (7, 7), (8, 8), (9, 12), (14, 14), (11, 15), (16, 16), (19, 20)]
    images = [(1, 2, *size) for size in sizes]
    for shapes, most in ((images, 3), ([(2, D) for D in range(1, 40, 3)], 3)):
        with compilations(module, monkeypatch) as keys:
            for shape in shapes:
                x, params = leaves(inputs(shape, 2))
                y, log_det = spline_coupling(x, params)
                (y.sum() + log_det.sum()).backward()
        assert {name for name, _ in keys} == {"_spline_fwd_kernel", "_spline_bwd_kernel"}
        assert len(keys) <= 2 * most


# ---- as operators


@both_ways
def test_gradcheck(reverse):
    gradcheck(spline(reverse), inputs((1, 2), 2, spread=1.0))
    gradcheck(spline(reverse, spline_coupling_torch), inputs((2, 4), 3))


@pytest.mark.parametrize("f", [spline_coupling_torch, spline_coupling])
def test_no_second_derivative_rather_than_a_wrong_one(f):
    x, params = leaves(inputs((2, 3), 2))
    y, log_det = f(x, params)
    with pytest.raises(RuntimeError, match="derivative"):
        dx, = torch.autograd.grad(y.sum() + log_det.sum(), x, create_graph=True)
        (dx.sum() + x.sum()).backward()  # which has a derivative, so that a missing one of dx would be 0 without a word


@both_ways
def test_as_a_custom_operator(reverse):
    x, params = inputs((2, 3, 2, 2), 2)
    opcheck(module._fwd.operator, (x, params, BOUND, reverse))
    torch.library.opcheck(module._bwd.operator, (x, x[:, 0, 0, 0], x, params, BOUND, reverse))
    compiles(spline(reverse), (x, params))


def test_the_plain_forms_compile(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    compiles(spline(True), inputs((2, 3), 2))


def test_deterministic(small):
    deterministic(spline(), inputs((2, 3, 5), 3))
    deterministic(spline(True), inputs((1, 3, 5), 3))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@both_ways
@pytest.mark.parametrize("shape", [(2, 2, 14, 14), (2, 300)])
def test_bytes(shape, reverse):
    K = 8
    n = 4 * math.prod(shape)
    x = torch.randn(shape)
    params = torch.zeros(shape[0], shape[1] * 23, *shape[2:])
    x.clamp_(-2, 2)  # equal bins of 0.75 over (-3, 3), and none of the outermost, that have a derivative less
    with traffic() as moved:
        module._fwd(x, params, 3.0, reverse)
    assert (2 * K + 4) * n <= moved.total <= 1.05 * (2 * K + 4) * n
    with traffic() as moved:
        module._bwd(x, x.flatten()[:2], x, params, 3.0, reverse)
    assert (5 * K + 4) * n <= moved.total <= 1.05 * (5 * K + 4) * n


# ---- the plain forms


@both_ways
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 2, 3), (2, 2, 17)])
def test_the_plain_spline_is_the_reference(shape, K, reverse):
    if K == 1:  # the identity
        x, params = inputs(shape, K, torch.float64)
        y, log_det = spline_coupling_torch(x, params, BOUND, reverse)
        torch.testing.assert_close((y, log_det), (x, torch.zeros_like(log_det)), rtol=0, atol=1e-12)
        return
    agree(spline(reverse, spline_coupling_torch), reference(reverse), inputs(shape, K), torch.float64,
          tolerance=1e-10)
    agree(spline(reverse, spline_coupling_torch), reference(reverse), inputs(shape, K), tolerance=5e-4)


@both_ways
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("K", [1, 2, 8])
def test_bins_looked_up_or_by_the_loop(K, dtype, near, reverse):
    """The same without gradients as with them: any place, tails, both ends, knots, steep and flat bins, not a number."""
    x, params = inputs((3, 40), K, dtype)
    x[0, :5] = torch.tensor([-BOUND, BOUND, math.inf, -math.inf, math.nan])
    params[1] = 1e3 * params[1].sign()
    xs, ys, _ = knots(params[0, :3 * K - 1].double().tolist(), K)
    x[2, :K + 1], params[2] = torch.tensor(ys if reverse else xs, dtype=dtype), params[0, :3 * K - 1].repeat(40)
    (y, log_det), (want, log_want) = (spline(reverse, f)(x, params) for f in (spline_coupling_torch, by_loop))
    torch.testing.assert_close(y, want, rtol=near, atol=near, equal_nan=True)
    rows = 3 if dtype == torch.float64 else 2  # in float32 a knot rounds to either side, which have other slopes
    torch.testing.assert_close(log_det[:rows], log_want[:rows], rtol=100 * near, atol=100 * near)
    assert want[0, 4].isnan() and want[1:].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (2, 2, 17)])
def test_the_plain_spline_in_chunks(shape, monkeypatch):
    x, params = inputs(shape, 4, torch.float64)
    whole = spline_coupling_torch(x, params)
    monkeypatch.setattr(module, "CHUNK", 10)
    for a, b in zip(whole, spline_coupling_torch(x, params), strict=True):
        torch.testing.assert_close(a, b)
    agree(spline(False, spline_coupling_torch), reference(), (x, params), torch.float64, tolerance=1e-10)


def test_softplus_of_the_reference():
    """The threshold of F.softplus is far from the derivatives that the tests ask about."""
    v = torch.linspace(-30, 30, 61, dtype=torch.float64)
    torch.testing.assert_close(F.softplus(v), torch.logaddexp(v, torch.zeros_like(v)), rtol=0, atol=1e-8)
