"""affine_coupling: both directions, with a split and with a mask; their inverses, Jacobians and gradients."""

import math

import pytest
import torch
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
    nbytes,
    opcheck,
    traffic,
)

import kernels
from kernels import coupling as module
from kernels.coupling import affine_coupling, affine_coupling_reference, affine_coupling_torch

SHAPES = [(1, 1), (3, 7), (2, 3, 5), (2, 4, 3, 5)]
FORMS = [affine_coupling, affine_coupling_torch]
both_ways = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture
def small(monkeypatch):
    """Few elements make many programs."""
    monkeypatch.setattr(module, "BLOCK", 16)


def affine(mask_or_split, reverse=False, f=affine_coupling):
    return lambda x, params: f(x, params, mask_or_split, reverse)


def reference(mask_or_split, reverse=False):
    return affine(mask_or_split, reverse, affine_coupling_reference)


def inputs(shape, split=0, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    return x, torch.randn(shape[0], 2 * (shape[1] - split), *shape[2:], dtype=dtype, device=DEVICE)


def masks(shape):
    """A checkerboard over everything, one over channels, one over the last dimension alone, none, all, and fractions."""
    index = torch.arange(math.prod(shape[1:]), device=DEVICE).view(shape[1:])
    none = torch.zeros_like(index)
    last = index.flatten()[:shape[-1]] % 2.0
    return [index % 2, index % 3 == 0, last, none, none + 1, last.bfloat16() / 8]


# ---- against what is independent


def test_against_distributions():
    x, params = inputs((3, 7), 3, torch.float64)
    raw, shift = params.chunk(2, 1)
    flow = torch.distributions.AffineTransform(shift, torch.exp(2 * torch.tanh(raw / 2)))
    for reverse, transform in ((False, flow), (True, flow.inv)):
        y, log_det = affine_coupling(x, params, 3, reverse)
        torch.testing.assert_close(y, torch.cat([x[:, :3], transform(x[:, 3:])], 1))
        torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(x[:, 3:], y[:, 3:]).sum(1))


@both_ways
@pytest.mark.parametrize("f", FORMS)
def test_mask_is_split(f, reverse):
    """A mask over the leading channels is a split, and what passes has no gradient to its parameters."""
    x, params = leaves(inputs((2, 4, 3, 5)))
    mask = torch.tensor([1, 0, 0, 0], device=DEVICE).view(4, 1, 1)
    y, log_det = f(x, params, mask, reverse)
    split = params.unflatten(1, (2, 4))[:, :, 1:].flatten(1, 2)
    for a, b in zip((y, log_det), f(x, split, 1, reverse), strict=True):
        torch.testing.assert_close(a, b)
    (y.sum() + log_det.sum()).backward()
    assert torch.equal(y[:, 0], x[:, 0]) and not params.grad[:, [0, 4]].any() and (params.grad[:, 1:4] != 0).all()
    assert (x.grad[:, 0] == 1).all()


@both_ways
@pytest.mark.parametrize("f", FORMS)
@pytest.mark.parametrize("split", [2, torch.arange(7) % 2])
def test_jacobian(f, reverse, split):
    x, params = inputs((2, 7), split if isinstance(split, int) else 0, torch.float64)
    split = split if isinstance(split, int) else split.to(DEVICE)
    jacobian = torch.autograd.functional.jacobian(lambda x: f(x, params, split, reverse)[0].sum(0), x).movedim(1, 0)
    torch.testing.assert_close(f(x, params, split, reverse)[1], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


# ---- inverses and extremes


@pytest.mark.parametrize("f", FORMS)
@pytest.mark.parametrize("split", [0, 1, 4, "mask"])
def test_round_trip(f, split):
    split = torch.arange(5, device=DEVICE) % 2 if split == "mask" else split
    x, params = inputs((2, 4, 3, 5), split if isinstance(split, int) else 0, torch.float64)
    y, forward = f(x, params, split)
    back, inverse = f(y, params, split, True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    assert isinstance(split, int) and split == 4 or (y - x).abs().max() > 0.1


@both_ways
@pytest.mark.parametrize("f", FORMS)
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_extreme_parameters(f, reverse, size):
    x, params = leaves(inputs((2, 6)))
    params.data[:, :6] = torch.where(params[:, :6] > 0, size, -size)
    y, log_det = f(x, params, torch.arange(6, device=DEVICE) % 2, reverse)
    dx, d_params = torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
    assert all(a.isfinite().all() for a in (y, log_det, dx, d_params)) and log_det.abs().max() <= 6


def test_zero_parameters():
    """Raw parameters of 0 leave x as it is."""
    x, params = inputs((2, 6), 2)
    y, log_det = affine_coupling(x, params * 0, 2)
    assert torch.equal(y, x) and not log_det.any()


# ---- values and gradients of the kernels


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(small, shape, reverse):
    for split in {0, 1, shape[1] - 1}:
        agree(affine(split, reverse), reference(split, reverse), inputs(shape, split))


@both_ways
@pytest.mark.parametrize("mask", range(6))
def test_masks(small, mask, reverse):
    mask = masks((2, 4, 3, 5))[mask]
    agree(affine(mask, reverse), reference(mask, reverse), inputs((2, 4, 3, 5)))


@both_ways
@pytest.mark.parametrize("shape", [(2, 128), (2, 3, 43), (2, 1030)])
def test_blocks(shape, reverse):
    """Samples around the sizes of a small and a large program."""
    agree(affine(1, reverse), reference(1, reverse), inputs(shape, 1))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype, reverse):
    x, params = inputs((2, 4, 3, 3), 1)
    agree(affine(1, reverse), reference(1, reverse), (x, params), dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    agree(affine(1), reference(1), inputs((2, 4, 3, 5), 1), gradient=gradient)


@both_ways
def test_a_single_output(reverse):
    """Gradients through y alone and through log_det alone add up to those through both."""
    f = affine(1, reverse)
    x, params = leaves(inputs((2, 3), 1), torch.float64)
    grads = [torch.autograd.grad(f(x, params)[i].sum(), [x, params], allow_unused=True) for i in (0, 1)]
    y, log_det = f(x, params)
    for a, b, c in zip(*grads, torch.autograd.grad(y.sum() + log_det.sum(), [x, params]), strict=True):
        torch.testing.assert_close(a + b, c)
        assert a.any()


@both_ways
@pytest.mark.parametrize("split", [0, 1, 3, "mask"])
def test_channels_last(split, reverse):
    split = masks((2, 4, 3, 5))[0] if split == "mask" else split
    x, params = inputs((2, 4, 3, 5), split if isinstance(split, int) else 0, torch.float64)
    last = [a.to(memory_format=torch.channels_last) for a in (x, params)]
    f = affine(split, reverse)
    agree(f, reference(split, reverse), last, torch.float64)
    agree(f, reference(split, reverse), (last[0], params), torch.float64, "transposed")
    assert f(*last)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    every = (slice(None),) * dim + (slice(None, None, 2),)
    x, params = inputs((4, 4, 4, 6))
    agree(affine(0), reference(0), (x[every], params[every]))


def test_nothing_in_nothing_out():
    x, params = leaves(inputs((0, 4, 3, 3), 1))
    y, log_det = affine_coupling(x, params, 1)
    (y.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape and params.grad.shape == params.shape and log_det.shape == (0,)


@pytest.mark.parametrize("x, params, how", [
    ((2, 4), (2, 8), 1), ((2, 4), (2, 6), 5), ((2, 4), (2, 10), -1), ((2,), (2,), 0), ((2, 4), (3, 8), 0),
    ((2, 4, 3), (2, 8, 4), 0), ((2, 4), (2, 8), torch.ones(3)), ((2, 4), (2, 8), torch.ones(2, 4)),
    ((2, 4), (2, 4), torch.ones(4))])
def test_shapes_that_do_not_fit(x, params, how):
    with pytest.raises(ValueError, match="do not fit"):
        affine_coupling(torch.randn(x), torch.randn(params), how)


def test_what_is_not_supported():
    with pytest.raises(RuntimeError, match="int64"):
        affine_coupling(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 4), 0)
    with pytest.raises(RuntimeError, match="2\\^31"):
        affine_coupling(torch.zeros(1, 1).expand(1, 2**30), torch.zeros(1, 1).expand(1, 2**31), 0)


# ---- which form runs, and in which types


def test_backend(monkeypatch):
    """backend stands in for kernels.mode in one call."""
    ran = []
    monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: ran.append(kernel))
    x, params = inputs((2, 4), 1)
    for mode in kernels.MODES:
        monkeypatch.setattr(kernels, "mode", mode)
        affine_coupling(x, params, 1, backend="torch")
        assert not ran
        affine_coupling(x, params, 1, backend="triton")
        assert ran.pop() is module._affine_fwd_kernel
    with pytest.raises(ValueError, match="must be one of"):
        affine_coupling(x, params, 1, backend="cuda")


@both_ways
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float64, torch.float32), (torch.bfloat16, torch.float16)])
def test_mixed_types_and_autocast(kinds, autocast, reverse):
    """Both forms give x's type, the accumulator's for log_det, and the inputs' own for gradients; near float64."""
    x, params = inputs((2, 4, 3, 3), 1)
    x = x.to(kinds[0]).requires_grad_()
    params = params.to(kinds[1]).requires_grad_()
    exact = [a.detach().double().requires_grad_() for a in (x, params)]
    want = affine_coupling_reference(*exact, 1, reverse)
    d_want = torch.autograd.grad([a.sum() for a in want], exact)
    tolerance = 2e-2 if torch.bfloat16 in kinds else 4e-3 if torch.float16 in kinds else 1e-5
    for backend in ("torch", "triton"):
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            got = affine_coupling(x, params, 1, reverse, backend=backend)
        grads = torch.autograd.grad([a.sum() for a in got], (x, params))
        assert [a.dtype for a in (*got, *grads)] == [kinds[0], kernels.accumulator(x), *kinds]
        for a, b in zip((*got, *grads), (*want, *d_want), strict=True):
            assert_near(a, b, tolerance, backend)


def test_few_compilations(monkeypatch):
    """Sizes are arguments: images of ten sizes differ only by what triton makes of integers."""
    sizes = [(6, 6), (7, 7), (12, 12), (8, 8), (14, 14), (15, 20), (16, 16), (28, 28), (31, 33), (32, 32)]
    for channels_last in (False, True):
        with compilations(module, monkeypatch) as keys:
            for H, W in sizes:
                a = [a.to(memory_format=torch.channels_last) if channels_last else a for a in leaves(inputs((1, 4, H, W), 2))]
                y, log_det = affine_coupling(*a, 2)
                (y.sum() + log_det.sum()).backward()
        assert {name for name, _ in keys} == {"_affine_fwd_kernel", "_affine_bwd_kernel"}
        assert len(keys) <= 2 * 3


# ---- as operators


@both_ways
def test_gradcheck(reverse):
    gradcheck(affine(1, reverse), inputs((2, 2), 1))
    gradcheck(affine(torch.tensor([1, 0], device=DEVICE), reverse), inputs((1, 2)))


def test_no_second_derivative_rather_than_a_wrong_one():
    x, params = leaves(inputs((2, 3), 1))
    y, log_det = affine_coupling(x, params, 1)
    dx, = torch.autograd.grad(y.square().sum() + log_det.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@both_ways
def test_as_a_custom_operator(reverse):
    x, params = inputs((2, 3, 2, 2), 1)
    opcheck(module._fwd.operator, (x, params, None, 1, 2.0, reverse))
    opcheck(module._fwd.operator, (*inputs((2, 3, 2, 2)), torch.arange(2, device=DEVICE), 0, 2.0, reverse))
    torch.library.opcheck(module._bwd.operator, (x, x[:, 0, 0, 0], x, params, None, 1, 2.0, reverse))
    compiles(affine(1, reverse), (x, params))


def test_the_plain_form_compiles(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    compiles(affine(1), inputs((2, 3), 1))


def test_deterministic(small):
    deterministic(affine(1), inputs((2, 3, 5), 1))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@both_ways
def test_bytes(reverse):
    x = torch.randn(2, 4, 16, 16)
    mask = (torch.arange(16) % 2).bool()
    for split, how in ((1, None), (0, mask)):
        params = torch.randn(2, 2 * (4 - split), 16, 16)
        n = nbytes(x)
        r = nbytes(params) // 2
        masked = 0 if how is None else x.numel()
        with traffic() as moved:
            module._fwd(x, params, how, split, 2.0, reverse)
        assert 2 * n + 2 * r + masked <= moved.total <= 1.05 * (2 * n + 2 * r + masked)
        with traffic() as moved:
            module._bwd(x, x[:, 0, 0, 0], x, params, how, split, 2.0, reverse)
        least = 2 * n + (5 if reverse else 4) * r + masked
        assert least <= moved.total <= 1.05 * least


# ---- the plain form


@both_ways
def test_the_plain_form_is_the_reference(reverse):
    for how in (0, 2, *masks((2, 4, 3, 5))):
        x, params = inputs((2, 4, 3, 5), how if isinstance(how, int) else 0)
        agree(affine(how, reverse, affine_coupling_torch), reference(how, reverse), (x, params))
    y, log_det = affine_coupling_torch(x.bfloat16(), params.bfloat16(), 0)
    assert y.dtype == torch.bfloat16 and log_det.dtype == torch.float32


def test_splines_from_here_too():
    """Scripts import both kinds of coupling from this file."""
    from kernels import spline

    for name in ("spline_coupling", "spline_coupling_reference", "spline_coupling_torch", "MIN"):
        assert getattr(module, name) is getattr(spline, name)
