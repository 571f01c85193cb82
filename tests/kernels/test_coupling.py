"""affine_coupling and spline_coupling: both directions of both, their inverses, Jacobians and gradients."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GRADIENTS, agree, compiles, deterministic, gradcheck, leaves, nbytes, opcheck, traffic

import kernels
from kernels import coupling as module
from kernels.coupling import (
    MIN,
    affine_coupling,
    affine_coupling_reference,
    affine_coupling_torch,
    spline_coupling,
    spline_coupling_reference,
    spline_coupling_torch,
)

BOUND = 2.7
SHAPES = [(1, 1), (3, 7), (2, 3, 5), (2, 4, 3, 5)]
SPLINES = {(1, 1): 1, (3, 7): 4, (2, 3, 5): 5, (2, 4, 3, 5): 8}  # bins for each shape
both_ways = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture
def small(monkeypatch):
    """Few elements make many programs."""
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "TILE", 32)


def affine(mask_or_split, reverse=False, f=affine_coupling):
    return lambda x, params: f(x, params, mask_or_split, reverse)


def spline(reverse=False, f=spline_coupling, bound=BOUND):
    return lambda x, params: f(x, params, bound, reverse)


def by_loop(*args):
    """The plain spline without looking bins up, as it is for many places and where gradients are asked for."""
    few, module.FEW = module.FEW, 0
    try:
        return spline_coupling_torch(*args)
    finally:
        module.FEW = few


affine_reference, spline_reference = (functools.partial(a, f=f) for a, f in (
    (affine, affine_coupling_reference), (spline, spline_coupling_reference)))


def affine_inputs(shape, split=0, dtype=torch.float32):
    params = 2 * (shape[1] - split)
    return torch.randn(shape, dtype=dtype, device=DEVICE), torch.randn(shape[0], params, *shape[2:], dtype=dtype, device=DEVICE)


def spline_inputs(shape, K=None, dtype=torch.float32, spread=2.0):
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
def test_spline_by_brute_force(f):
    (x, params), K = spline_inputs((3, 7), dtype=torch.float64), 4
    y, log_det = f(x, params, BOUND)
    for b in range(3):
        got = [brute_force(x[b, i].item(), params[b, 11 * i:11 * i + 11].tolist(), K) for i in range(7)]
        torch.testing.assert_close(y[b].cpu(), torch.tensor([v for v, _ in got], dtype=torch.float64), rtol=0, atol=1e-12)
        assert abs(log_det[b].item() - sum(math.log(d) for _, d in got)) < 1e-11


@both_ways
def test_spline_against_nflows(reverse):
    peer = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    (x, params), K = spline_inputs((2, 4, 3, 5), dtype=torch.float64), 8
    p = params.unflatten(1, (4, -1)).movedim(2, -1)
    want, log_d = peer.unconstrained_rational_quadratic_spline(x, p[..., :K], p[..., K:2 * K], p[..., 2 * K:], inverse=reverse,
                                                               tail_bound=BOUND, min_bin_width=MIN, min_bin_height=MIN,
                                                               min_derivative=MIN)
    y, log_det = spline_coupling_reference(x, params, BOUND, reverse)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, log_d.flatten(1).sum(1), rtol=0, atol=1e-9)


def test_affine_against_distributions():
    x, params = affine_inputs((3, 7), 3, torch.float64)
    raw, shift = params.chunk(2, 1)
    flow = torch.distributions.AffineTransform(shift, torch.exp(2 * torch.tanh(raw / 2)))
    for reverse, transform in ((False, flow), (True, flow.inv)):
        y, log_det = affine_coupling(x, params, 3, reverse)
        torch.testing.assert_close(y, torch.cat([x[:, :3], transform(x[:, 3:])], 1))
        torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(x[:, 3:], y[:, 3:]).sum(1))


@both_ways
@pytest.mark.parametrize("f", [affine_coupling, affine_coupling_torch])
def test_affine_mask_is_split(f, reverse):
    """A mask over the leading channels is a split, and what passes has no gradient to its parameters."""
    x, params = leaves(affine_inputs((2, 4, 3, 5)))
    mask = torch.tensor([1, 0, 0, 0], device=DEVICE).view(4, 1, 1)
    y, log_det = f(x, params, mask, reverse)
    split = params.unflatten(1, (2, 4))[:, :, 1:].flatten(1, 2)
    for a, b in zip((y, log_det), f(x, split, 1, reverse), strict=True):
        torch.testing.assert_close(a, b)
    (y.sum() + log_det.sum()).backward()
    assert torch.equal(y[:, 0], x[:, 0]) and not params.grad[:, [0, 4]].any() and (params.grad[:, 1:4] != 0).all()
    assert (x.grad[:, 0] == 1).all()


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, spline_coupling_reference])
def test_spline_jacobian(f, reverse):
    x, params = spline_inputs((2, 7), 4, torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: spline(reverse, f)(x, params)[0].sum(0), x).movedim(1, 0)
    torch.testing.assert_close(spline(reverse, f)(x, params)[1], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


@both_ways
@pytest.mark.parametrize("f", [affine_coupling, affine_coupling_torch])
@pytest.mark.parametrize("split", [2, torch.arange(7) % 2])
def test_affine_jacobian(f, reverse, split):
    x, params = affine_inputs((2, 7), split if isinstance(split, int) else 0, torch.float64)
    split = split if isinstance(split, int) else split.to(DEVICE)
    jacobian = torch.autograd.functional.jacobian(lambda x: f(x, params, split, reverse)[0].sum(0), x).movedim(1, 0)
    torch.testing.assert_close(f(x, params, split, reverse)[1], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


# ---- inverses, knots, tails, extremes


@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop, spline_coupling_reference])
def test_spline_round_trip(f):
    x, params = spline_inputs((2, 4, 3, 5), dtype=torch.float64)
    y, forward = spline(False, f)(x, params)
    back, inverse = spline(True, f)(y, params)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    assert (y - x).abs().max() > 0.1


@both_ways
@pytest.mark.parametrize("bound", [1.0, 3.0])
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop])
def test_spline_gradients_at_the_bound_and_far_beyond(f, bound, reverse):
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


@pytest.mark.parametrize("f", [affine_coupling, affine_coupling_torch])
@pytest.mark.parametrize("split", [0, 1, 4, "mask"])
def test_affine_round_trip(f, split):
    split = torch.arange(5, device=DEVICE) % 2 if split == "mask" else split
    x, params = affine_inputs((2, 4, 3, 5), split if isinstance(split, int) else 0, torch.float64)
    y, forward = f(x, params, split)
    back, inverse = f(y, params, split, True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    assert isinstance(split, int) and split == 4 or (y - x).abs().max() > 0.1


@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch, by_loop])
def test_spline_is_monotonic(f):
    x = torch.linspace(-1.2 * BOUND, 1.2 * BOUND, 301, dtype=torch.float64, device=DEVICE).view(1, 1, -1)
    params = (torch.randn(1, 14, 1, dtype=torch.float64, device=DEVICE) * 3).expand(1, 14, 301)
    y = spline(False, f)(x, params)[0].flatten()
    assert (y.diff() > 0).all()
    torch.testing.assert_close(spline(True, f)(y.view_as(x), params)[0], x, rtol=0, atol=1e-9)


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spline_tails(f, reverse, dtype):
    """Beyond the bound: x itself bit for bit, a log_det of 0, a gradient of 1 and none for the parameters."""
    x = torch.tensor([[-1e4, -BOUND - 1e-3, BOUND + 1e-3, 1e4, math.inf]], dtype=dtype, device=DEVICE).requires_grad_()
    params = spline_inputs((1, 5), 4, dtype)[1].requires_grad_()
    y, log_det = spline(reverse, f)(x, params)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert torch.equal(y, x) and log_det.item() == 0 and (dx == 1).all() and not d_params.any()
    assert spline(reverse, f)(torch.full_like(x, math.nan), params)[0].isnan().all()


@both_ways
@pytest.mark.parametrize("f", [spline_coupling, spline_coupling_torch])
def test_spline_at_the_knots(f, reverse):
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
def test_spline_of_extreme_parameters(f, reverse, dtype):
    x = torch.linspace(-BOUND, BOUND, 64, dtype=dtype, device=DEVICE).view(1, 64).requires_grad_()
    params = ((torch.rand(1, 64 * 14, device=DEVICE) - 0.5).sign() * 1e3).to(dtype).requires_grad_()
    y, log_det = spline(reverse, f)(x, params)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert all(a.isfinite().all() for a in (y, log_det, dx, d_params)) and y.abs().max() <= BOUND * (1 + 1e-6)
    want, log_want = spline(reverse, spline_coupling_torch)(x.double(), params.double())
    assert torch.allclose(y.double(), want, atol=1e-2)


@both_ways
@pytest.mark.parametrize("f", [affine_coupling, affine_coupling_torch])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_affine_of_extreme_parameters(f, reverse, size):
    x, params = leaves(affine_inputs((2, 6)))
    params.data[:, :6] = torch.where(params[:, :6] > 0, size, -size)
    y, log_det = f(x, params, torch.arange(6, device=DEVICE) % 2, reverse)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert all(a.isfinite().all() for a in (y, log_det, dx, d_params)) and log_det.abs().max() <= 6


def test_zero_parameters():
    """Raw parameters of 0 leave x as it is in an affine layer; in a spline bins are equal, and knots stay in place."""
    x, params = affine_inputs((2, 6), 2)
    y, log_det = affine_coupling(x, params * 0, 2)
    assert torch.equal(y, x) and not log_det.any()
    x = torch.linspace(-BOUND, BOUND, 5, dtype=torch.float64, device=DEVICE).view(1, 5)
    torch.testing.assert_close(spline_coupling(x, x.new_zeros(1, 55), BOUND)[0], x, rtol=0, atol=1e-12)


# ---- values and gradients of the kernels


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_values_and_gradients(small, shape, reverse):
    for split in {0, 1, shape[1] - 1}:
        agree(affine(split, reverse), affine_reference(split, reverse), affine_inputs(shape, split))


@both_ways
@pytest.mark.parametrize("mask", range(5))
def test_affine_masks(small, mask, reverse):
    mask = masks((2, 4, 3, 5))[mask]
    agree(affine(mask, reverse), affine_reference(mask, reverse), affine_inputs((2, 4, 3, 5)))


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_spline_values_and_gradients(shape, reverse):
    agree(spline(reverse), spline_reference(reverse), spline_inputs(shape), torch.float64, tolerance=1e-10)
    agree(spline(reverse), spline_reference(reverse), spline_inputs(shape), tolerance=2e-4)


@both_ways
@pytest.mark.parametrize("shape", [(1, 41), (1, 1, 5, 7)])
def test_spline_of_several_tiles(small, shape, reverse):
    agree(spline(reverse), spline_reference(reverse), spline_inputs(shape, 3), torch.float64, tolerance=1e-10)


@both_ways
@pytest.mark.parametrize("K", [1, 2, 7, 17])
def test_spline_of_any_number_of_bins(K, reverse):
    agree(spline(reverse), spline_reference(reverse), spline_inputs((2, 3), K), torch.float64, tolerance=1e-10)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype, reverse):
    x, params = affine_inputs((2, 4, 3, 3), 1)
    agree(affine(1, reverse), affine_reference(1, reverse), (x, params), dtype)
    x, params = spline_inputs((2, 2, 3, 3), 4)
    agree(spline(reverse, bound=3.0), spline_reference(reverse, bound=3.0), (x, params * 0.5), dtype)
    y, log_det = spline_coupling(x.to(dtype), params)  # params of another type than x
    assert y.dtype == dtype and log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    agree(affine(1), affine_reference(1), affine_inputs((2, 4, 3, 5), 1), gradient=gradient)
    agree(spline(True), spline_reference(True), spline_inputs((2, 4, 3, 5), 3), torch.float64, gradient, 1e-10)


@both_ways
def test_a_single_output(reverse):
    """Gradients through y alone and through log_det alone add up to those through both."""
    for f, inputs in ((spline(reverse), spline_inputs((2, 3), 2)), (affine(1, reverse), affine_inputs((2, 3), 1))):
        x, params = leaves(inputs, torch.float64)
        grads = [torch.autograd.grad(f(x, params)[i].sum(), [x, params], allow_unused=True) for i in (0, 1)]
        y, log_det = f(x, params)
        for a, b, c in zip(*grads, torch.autograd.grad(y.sum() + log_det.sum(), [x, params]), strict=True):
            torch.testing.assert_close(a + b, c)
            assert a.any()


@both_ways
def test_channels_last(reverse):
    for inputs, f, reference in ((affine_inputs((2, 4, 3, 5), 1), affine(1, reverse), affine_reference(1, reverse)),
                                 (spline_inputs((2, 4, 3, 5), 3), spline(reverse), spline_reference(reverse))):
        last = [a.double().to(memory_format=torch.channels_last) for a in inputs]
        agree(f, reference, last, torch.float64, tolerance=1e-10)
        agree(f, reference, [last[0], last[1].contiguous()], torch.float64, "transposed", tolerance=1e-10)
        assert f(*last)[0].is_contiguous(memory_format=torch.channels_last)
    mask = masks((2, 4, 3, 5))[0]
    agree(affine(mask, reverse), affine_reference(mask, reverse),
          [a.to(memory_format=torch.channels_last) for a in affine_inputs((2, 4, 3, 5))])


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    every = (slice(None),) * dim + (slice(None, None, 2),)
    x, params = affine_inputs((4, 4, 4, 6))
    agree(affine(0), affine_reference(0), (x[every], params[every]))
    x, params = spline_inputs((4, 4, 4, 6), 1)
    agree(spline(), spline_reference(), (x[every], params[every]), torch.float64, tolerance=1e-10)


def test_both_forms_of_spline_params():
    x, params = spline_inputs((2, 4, 3, 5))
    for a, b in zip(spline_coupling(x, params), spline_coupling(x, params.unflatten(1, (4, -1))), strict=True):
        assert torch.equal(a, b)


def test_nothing_in_nothing_out():
    for f, inputs in ((affine(1), affine_inputs((0, 4, 3, 3), 1)), (spline(), spline_inputs((0, 4, 3, 3), 2))):
        x, params = leaves(inputs)
        y, log_det = f(x, params)
        (y.sum() + log_det.sum()).backward()
        assert x.grad.shape == x.shape and params.grad.shape == params.shape and log_det.shape == (0,)


@pytest.mark.parametrize("x, params, how", [
    ((2, 4), (2, 8), 1), ((2, 4), (2, 6), 5), ((2, 4), (2, 10), -1), ((2,), (2,), 0), ((2, 4), (3, 8), 0),
    ((2, 4, 3), (2, 8, 4), 0), ((2, 4), (2, 8), torch.ones(3)), ((2, 4), (2, 8), torch.ones(2, 4)),
    ((2, 4), (2, 4), torch.ones(4))])
def test_affine_shapes_that_do_not_fit(x, params, how):
    with pytest.raises(ValueError, match="do not fit"):
        affine_coupling(torch.randn(x), torch.randn(params), how)


@pytest.mark.parametrize("x, params, bound", [
    ((2, 4), (2, 12), 3.0), ((2, 4), (2, 20), 0.0), ((2,), (2, 5), 3.0), ((2, 4), (3, 20), 3.0), ((2, 4), (2, 5, 4), 3.0),
    ((2, 4, 3), (2, 20, 4), 3.0), ((2, 4), (2, 4 * 300_002), 3.0)])
def test_spline_shapes_that_do_not_fit(x, params, bound):
    with pytest.raises(ValueError, match="do not fit"):
        spline_coupling(torch.randn(x), torch.randn(params), bound)


def test_what_is_not_supported():
    x, params = spline_inputs((1, 1), 65)
    with pytest.raises(RuntimeError, match="65 bins"):
        spline_coupling(x, params)
    with pytest.raises(RuntimeError, match="int64"):
        affine_coupling(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 4), 0)


# ---- as operators


@both_ways
def test_gradcheck(reverse):
    gradcheck(affine(1, reverse), affine_inputs((2, 2), 1))
    gradcheck(affine(torch.tensor([1, 0], device=DEVICE), reverse), affine_inputs((1, 2)))
    gradcheck(spline(reverse), spline_inputs((1, 2), 2, spread=1.0))
    gradcheck(spline(reverse, spline_coupling_torch), spline_inputs((2, 4), 3))


@pytest.mark.parametrize("f", [spline_coupling_torch, spline_coupling])
def test_no_second_derivative_rather_than_a_wrong_one(f):
    x, params = leaves(spline_inputs((2, 3), 2))
    y, log_det = f(x, params)
    dx, = torch.autograd.grad(y.sum() + log_det.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@both_ways
def test_as_a_custom_operator(reverse):
    x, params = affine_inputs((2, 3, 2, 2), 1)
    opcheck(module._fwd, (x, params, None, 1, 2.0, reverse))
    compiles(affine(1, reverse), (x, params))
    x, params = spline_inputs((2, 3, 2, 2), 2)
    opcheck(module._fwd, (x, params, None, None, BOUND, reverse))
    compiles(spline(reverse), (x, params))


def test_the_plain_forms_compile(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    compiles(affine(1), affine_inputs((2, 3), 1))
    compiles(spline(True), spline_inputs((2, 3), 2))


def test_deterministic(small):
    deterministic(affine(1), affine_inputs((2, 3, 5), 1))
    deterministic(spline(), spline_inputs((2, 3, 5), 3))
    deterministic(spline(True), spline_inputs((1, 3, 5), 3))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@both_ways
def test_affine_bytes(reverse):
    x = torch.randn(2, 4, 16, 16)
    mask = (torch.arange(16) % 2).expand(4, 16, 16)
    for split, how in ((1, None), (0, mask)):
        params = torch.randn(2, 2 * (4 - split), 16, 16)
        n, r = nbytes(x), nbytes(params) // 2
        masked = 0 if how is None else x.numel()
        with traffic() as moved:
            module._fwd(x, params, how, split, 2.0, reverse)
        assert 2 * n + 2 * r + masked <= moved.total <= 1.05 * (2 * n + 2 * r + masked)
        with traffic() as moved:
            module._bwd(x, x[:, 0, 0, 0], x, params, how, split, 2.0, reverse)
        least = 2 * n + (5 if reverse else 4) * r + masked
        assert least <= moved.total <= 1.05 * least


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@both_ways
@pytest.mark.parametrize("shape", [(2, 2, 14, 14), (2, 300)])
def test_spline_bytes(shape, reverse):
    K, n = 8, 4 * math.prod(shape)
    x, params = torch.randn(shape), torch.zeros(shape[0], shape[1] * 23, *shape[2:])
    x.clamp_(-2, 2)  # equal bins of 0.75 over (-3, 3), and none of the outermost, that have a derivative less
    with traffic() as moved:
        module._fwd(x, params, None, None, 3.0, reverse)
    assert (2 * K + 4) * n <= moved.total <= 1.05 * (2 * K + 4) * n
    with traffic() as moved:
        module._bwd(x, x.flatten()[:2], x, params, None, None, 3.0, reverse)
    assert (5 * K + 4) * n <= moved.total <= 1.05 * (5 * K + 4) * n


# ---- the plain forms


@both_ways
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 2, 3), (2, 2, 17)])
def test_the_plain_spline_is_the_reference(shape, K, reverse):
    if K == 1:  # the identity
        x, params = spline_inputs(shape, K, torch.float64)
        y, log_det = spline_coupling_torch(x, params, BOUND, reverse)
        torch.testing.assert_close((y, log_det), (x, torch.zeros_like(log_det)), rtol=0, atol=1e-12)
        return
    agree(spline(reverse, spline_coupling_torch), spline_reference(reverse), spline_inputs(shape, K), torch.float64,
          tolerance=1e-10)
    agree(spline(reverse, spline_coupling_torch), spline_reference(reverse), spline_inputs(shape, K), tolerance=5e-4)


@both_ways
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("K", [1, 2, 8])
def test_bins_looked_up_or_by_the_loop(K, dtype, near, reverse):
    """The same without gradients as with them: any place, tails, both ends, knots, steep and flat bins, not a number."""
    x, params = spline_inputs((3, 40), K, dtype)
    x[0, :5] = torch.tensor([-BOUND, BOUND, math.inf, -math.inf, math.nan])
    params[1] = 1e3 * params[1].sign()
    xs, ys, _ = knots(params[0, :3 * K - 1].double().tolist(), K)
    x[2, :K + 1], params[2] = torch.tensor(ys if reverse else xs, dtype=dtype), params[0, :3 * K - 1].repeat(40)
    (y, log_det), (want, log_want) = (spline(reverse, f)(x, params) for f in (spline_coupling_torch, by_loop))
    torch.testing.assert_close(y, want, rtol=near, atol=near, equal_nan=True)
    rows = 3 if dtype == torch.float64 else 2  # in float32 a knot rounds to either side, which have other slopes
    torch.testing.assert_close(log_det[:rows], log_want[:rows], rtol=100 * near, atol=100 * near)
    assert want[0, 4].isnan() and want[1:].isfinite().all()


@both_ways
def test_the_plain_affine_is_the_reference(reverse):
    for how in (0, 2, *masks((2, 4, 3, 5))):
        x, params = affine_inputs((2, 4, 3, 5), how if isinstance(how, int) else 0)
        agree(affine(how, reverse, affine_coupling_torch), affine_reference(how, reverse), (x, params))
    y, log_det = affine_coupling_torch(x.bfloat16(), params.bfloat16(), 0)
    assert y.dtype == torch.bfloat16 and log_det.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (2, 2, 17)])
def test_the_plain_spline_in_chunks(shape, monkeypatch):
    x, params = spline_inputs(shape, 4, torch.float64)
    whole = spline_coupling_torch(x, params)
    monkeypatch.setattr(module, "CHUNK", 10)
    for a, b in zip(whole, spline_coupling_torch(x, params), strict=True):
        torch.testing.assert_close(a, b)
    agree(spline(False, spline_coupling_torch), spline_reference(), (x, params), torch.float64, tolerance=1e-10)


def test_softplus_of_the_reference():
    """The threshold of F.softplus is far from the derivatives that the tests ask about."""
    v = torch.linspace(-30, 30, 61, dtype=torch.float64)
    torch.testing.assert_close(F.softplus(v), torch.logaddexp(v, torch.zeros_like(v)), rtol=0, atol=1e-8)
