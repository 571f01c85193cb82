"""logistic_mixture: one and three channels, every level and extreme parameters; that it is a distribution."""

import numpy as np
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
    nbytes,
    opcheck,
    traffic,
)
from scipy.stats import logistic
from torch import distributions as D

import kernels
from kernels import logistic_mixture as module
from kernels.logistic_mixture import logistic_mixture, logistic_mixture_reference, logistic_mixture_torch

CHANNELS = [1, 3]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 10, 4, 4)]  # images, mixtures, height, width


def inputs(shape=SHAPES[1], C=1):
    B, M, H, W = shape
    x = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8, device=DEVICE)
    x[torch.rand(x.shape) < 0.2], x[torch.rand(x.shape) < 0.2] = 0, 255
    params = torch.randn(B, M * (3 if C == 1 else 10), H, W, device=DEVICE)
    params[:, M * (1 + C):M * (1 + 2 * C)] *= 3  # log_scales, some below -7
    return x, params


def every_level(params, C=1):
    """x of which the last channel takes every level at one position each, params (K,) for each."""
    x = torch.randint(0, 256, (1, C, 1, 1), dtype=torch.uint8, device=DEVICE).repeat(1, 1, 1, 256)
    x[:, -1] = torch.arange(256)
    return x, torch.as_tensor(params, device=DEVICE)[None, :, None, None].repeat(1, 1, 1, 256)


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, C):
    agree(logistic_mixture, logistic_mixture_reference, inputs(shape, C))


@pytest.mark.parametrize("C", CHANNELS)
def test_many_tiles(C, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)
    agree(logistic_mixture, logistic_mixture_reference, inputs((2, 3, 7, 9), C))


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype, C):
    agree(logistic_mixture, logistic_mixture_reference, inputs(C=C), dtype)
    y = logistic_mixture(*(a.to(dtype) if a.is_floating_point() else a for a in inputs(C=C)))
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_floating_levels(dtype):
    x, params = inputs(C=3)
    assert torch.equal(logistic_mixture(x.to(dtype), params), logistic_mixture(x.double(), params))


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient, C):
    x, params = inputs(C=C)
    agree(logistic_mixture, logistic_mixture_reference, (x, params), gradient=gradient)
    last = params.to(memory_format=torch.channels_last)
    agree(logistic_mixture, logistic_mixture_reference, (x, last), gradient=gradient)


def test_layout_is_kept_and_the_lower_bound():
    x, params = inputs()
    params[0, 3 * 2] = -7  # the bound itself has no gradient
    params = params.to(memory_format=torch.channels_last).requires_grad_()
    logistic_mixture(x, params).sum().backward()
    assert params.grad.is_contiguous(memory_format=torch.channels_last) and not params.grad[0, 3 * 2].any()


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_slices(dim, C):
    x, params = (a[(slice(None),) * dim + (slice(None, None, 2),)] for a in inputs((2, 3, 4, 6), C))
    agree(logistic_mixture, logistic_mixture_reference, (x, params))
    agree(logistic_mixture, logistic_mixture_reference, inputs((2, 4, 3, 3), C)[:1] + (inputs((2, 8, 3, 3), C)[1][:, ::2],))


@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch])
@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("log_scale", [-20.0, -7.5, -2.0, 3.0, 10.0, 70.0, 85.0, 300.0])
def test_extreme_parameters(log_scale, C, form):
    """Every value to five digits, however small the probability; every gradient finite and right."""
    x, params = inputs((1, 4, 5, 5), C)
    params[:, :4] *= 30
    params[:, 4:4 + 4 * C] *= 20
    params[:, 4 + 4 * C:4 + 8 * C] = log_scale
    params[:, 4 + 8 * C:] *= 50
    y, want = form(x, params), logistic_mixture_reference(x, params.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=2e-5)
    agree(form, logistic_mixture_reference, (x, params), tolerance=1e-4)


def test_saturated_bins_stay_finite():
    """A level that has all of the probability, and one that has none of it."""
    y = logistic_mixture(*every_level(torch.tensor([0.0, -1.5, -7.0])))[0, 0].cpu()
    assert y.isfinite().all() and abs(y[0]) < 1e-6
    assert abs(y[255] / ((-2.5 + 1 / 255) * np.exp(7)) - 1) < 1e-6


@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch, logistic_mixture_reference])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.0, 0.3, 50.0])
@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -3.0, 0.0, 7.0, 30.0])
def test_sums_to_one(log_scale, mean, form):
    params = torch.tensor([0.5, -1.0, mean, -mean / 2, log_scale, log_scale / 2])
    y = form(*every_level(params))
    assert abs(y.double().exp().sum().item() - 1) < 2e-6 * max(abs(mean), 1)


@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch, logistic_mixture_reference])
@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 2.0, 7.0])
def test_three_channels_factor(log_scale, form):
    """Each channel is, given those before it, a one-channel mixture, which sums to one; so blue's levels sum to the rest."""
    M = 2
    params = torch.randn(10 * M, dtype=torch.float64)
    params[4 * M:7 * M] = log_scale + torch.rand(3 * M)
    x, spread = every_level(params, 3)
    logits, (mu, ls, c) = params[:M], params[M:].view(3, 3, M)
    red, green, _ = (x.double() / 127.5 - 1)[0, :, 0].cpu()
    means = [mu[0] + 0 * red[:, None], mu[1] + c[0].tanh() * red[:, None],
             mu[2] + c[1].tanh() * red[:, None] + c[2].tanh() * green[:, None]]  # [256, M]
    log_p = torch.zeros(3, 256, M, dtype=torch.float64)
    for channel in range(3):
        for m in range(M):
            one = torch.stack([0 * red, means[channel][:, m], ls[channel, m].expand(256)])[None, :, None].to(DEVICE)
            log_p[channel, :, m] = form(x[:, channel:channel + 1], one)[0, 0].cpu()
    y = form(x, spread)[0, 0].cpu()
    torch.testing.assert_close(y, (logits.log_softmax(0) + log_p.sum(0)).logsumexp(1), rtol=0, atol=1e-9)
    rest = (logits.log_softmax(0) + log_p[:2].sum(0)).logsumexp(1)[0]
    torch.testing.assert_close(y.logsumexp(0), rest, rtol=0, atol=1e-9)


@pytest.mark.parametrize("C", CHANNELS)
def test_the_reference_is_the_paper(C):
    """A loop over pixels and mixtures, with scipy's distribution function."""
    B, M, H, W = 2, 3, 3, 2
    x, params = inputs((B, M, H, W), C)
    params[:, M * (1 + C):M * (1 + 2 * C)].clamp_(-5, 2)
    levels, numbers = x.cpu().numpy(), params.cpu().double().numpy()
    want = np.zeros((B, H, W))
    for b, i, j in np.ndindex(B, H, W):
        logits, rest = numbers[b, :M, i, j], numbers[b, M:, i, j].reshape(-1, C, M)
        v = levels[b, :, i, j].astype(np.float64) / 127.5 - 1
        pi = np.exp(logits) / np.exp(logits).sum()
        for m in range(M):
            mu, s = rest[0, :, m].copy(), np.exp(rest[1, :, m])
            if C == 3:
                k = np.tanh(rest[2, :, m])
                mu += [0, k[0] * v[0], k[1] * v[0] + k[2] * v[1]]
            p = pi[m]
            for c in range(C):
                upper = 1 if levels[b, c, i, j] == 255 else logistic.cdf(v[c] + 1 / 255, mu[c], s[c])
                lower = 0 if levels[b, c, i, j] == 0 else logistic.cdf(v[c] - 1 / 255, mu[c], s[c])
                p *= upper - lower
            want[b, i, j] += p
    for form in (logistic_mixture_reference, logistic_mixture_torch, logistic_mixture):
        np.testing.assert_allclose(form(x, params.double()).exp().cpu().numpy(), want, rtol=1e-8, atol=1e-13)


def test_the_reference_is_a_quantised_logistic():
    """Of torch.distributions: a uniform through the inverse of the sigmoid, scaled and shifted."""
    mean, log_scale = torch.tensor([0.2], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    base = D.Uniform(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    d = D.TransformedDistribution(base, [D.SigmoidTransform().inv, D.AffineTransform(mean, log_scale.exp())],
                                  validate_args=False)
    cdf = d.cdf((torch.arange(255) + 0.5).double() / 127.5 - 1)
    cdf = torch.cat([torch.zeros(1).double(), cdf, torch.ones(1).double()])
    y = logistic_mixture_reference(*every_level(torch.cat([torch.zeros(1).double(), mean, log_scale])))
    torch.testing.assert_close(y[0, 0].exp().cpu(), cdf.diff(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 17, 40, 1])
def test_the_plain_form_is_the_reference(chunk, dtype, C, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    x, params = inputs((3, 2, 4, 3), C)
    agree(logistic_mixture_torch, logistic_mixture_reference, (x, params), dtype)
    agree(logistic_mixture_torch, logistic_mixture_reference, (x, params.to(memory_format=torch.channels_last)), dtype)


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch])
def test_gradcheck(form, C):
    x, params = inputs((1, 2, 1, 2), C)
    params[:, 2 * (1 + C):2 * (1 + 2 * C)].clamp_(-3, 3)
    gradcheck(lambda p: form(x, p), (params,))


@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch])
def test_no_second_derivative(form):
    x, params = inputs()
    params.requires_grad_()
    with pytest.raises(RuntimeError, match="derivative"):
        d, = torch.autograd.grad(form(x, params).sum(), params, create_graph=True)
        (d.sum() + params.sum()).backward()  # which has a derivative, so that a missing one of d would be 0 without a word


@pytest.mark.parametrize("form", [logistic_mixture, logistic_mixture_torch])
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3)])
def test_nothing_in_nothing_out(shape, form):
    x, params = inputs(shape, 3)
    params.requires_grad_()
    y = form(x, params)
    y.sum().backward()
    assert y.shape == (shape[0], *shape[2:]) and params.grad.shape == params.shape


@pytest.mark.parametrize("x, params", [
    ((2, 1, 3, 3), (2, 10, 3, 3)), ((2, 3, 3, 3), (2, 9, 3, 3)), ((2, 2, 3, 3), (2, 10, 3, 3)), ((2, 1, 3, 3), (2, 0, 3, 3)),
    ((2, 1, 3, 3), (1, 9, 3, 3)), ((2, 1, 3, 3), (2, 9, 3, 4)), ((2, 1, 9), (2, 9, 9)), ((1, 3, 3), (9, 3, 3))])
def test_shapes_that_do_not_fit(x, params):
    with pytest.raises(ValueError, match="do not fit"):
        logistic_mixture(torch.zeros(x), torch.zeros(params))


def test_types_that_do_not_fit():
    x, params = inputs()
    for bad in ((x.long(), params), (x, params.int())):
        with pytest.raises(ValueError, match="must be"):
            logistic_mixture(*bad)


def test_too_many_mixtures():
    x, params = inputs((1, 65, 2, 2))
    with pytest.raises(RuntimeError, match="64"):
        logistic_mixture(x, params)
    agree(logistic_mixture, logistic_mixture_reference, inputs((1, 64, 2, 2), 3))


def test_backend(monkeypatch):
    """backend stands in for kernels.mode in one call."""
    ran = []
    monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: ran.append(kernel))
    x, params = inputs()
    for mode in kernels.MODES:
        monkeypatch.setattr(kernels, "mode", mode)
        logistic_mixture(x, params, backend="torch")
        assert not ran
        logistic_mixture(x, params, backend="triton")
        assert ran.pop() is module._logistic_fwd_kernel
    with pytest.raises(ValueError, match="must be one of"):
        logistic_mixture(x, params, backend="cuda")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [
    (torch.uint8, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16), (torch.uint8, torch.float64)])
def test_mixed_types_and_autocast(kinds, autocast):
    """Both forms give the accumulator's type, and gradients that of params; near float64."""
    x, params = inputs(C=3)
    x = x.to(kinds[0])
    params = params.to(kinds[1]).requires_grad_()
    exact = params.detach().double().requires_grad_()
    want = logistic_mixture_reference(x, exact)
    d_want = torch.autograd.grad(want.sum(), exact)[0]
    for backend in ("torch", "triton"):
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            y = logistic_mixture(x, params, backend=backend)
        grad, = torch.autograd.grad(y.sum(), params)
        assert y.dtype == kernels.accumulator(params) and grad.dtype == params.dtype
        assert_near(y, want, 2e-5, backend)
        assert_near(grad, d_want, {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(kinds[1], 2e-5), backend)


@pytest.mark.parametrize("channels_last", [False, True])
def test_few_compilations(channels_last, monkeypatch):
    """Sizes are arguments: images of ten sizes differ only by what triton makes of integers."""
    with compilations(module, monkeypatch) as keys:
        for H, W in [(1, 2), (3, 3), (4, 4), (5, 6), (7, 7), (8, 8), (9, 12), (10, 11), (13, 11), (12, 16)]:
            x, params = inputs((1, 2, H, W))
            params = params.to(memory_format=torch.channels_last) if channels_last else params
            logistic_mixture(x, params.requires_grad_()).sum().backward()
    assert {name for name, _ in keys} == {"_logistic_fwd_kernel", "_logistic_bwd_kernel"}
    assert len(keys) <= 2 * 2


@pytest.mark.parametrize("C", CHANNELS)
def test_as_a_custom_operator(C):
    x, params = inputs(C=C)
    params = params.to(memory_format=torch.channels_last if C == 3 else torch.contiguous_format)
    opcheck(module._fwd.operator, (x, params, True))
    torch.library.opcheck(module._fwd.operator, (x, params, False))
    torch.library.opcheck(module._bwd.operator, (torch.randn(2, 5, 7, device=DEVICE), params))
    compiles(logistic_mixture, (x, params))


def test_compiled_plain_form(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    x, params = inputs(C=3)
    compiles(logistic_mixture, (x, params.double()))


@pytest.mark.parametrize("C", CHANNELS)
def test_deterministic(C):
    deterministic(logistic_mixture, inputs(C=C))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("C", CHANNELS)
def test_bytes(C):
    x, params = inputs((2, 10, 13, 11), C)
    n = nbytes(params)
    with traffic() as moved:
        ll, grad = module._fwd(x, params, True)
    assert 2 * n + nbytes(x, ll) <= moved.total <= 1.05 * (2 * n + nbytes(x, ll))
    with traffic() as moved:
        module._bwd(ll, grad)
    assert 2 * n + nbytes(ll) <= moved.total <= 1.05 * (2 * n + nbytes(ll))
    with traffic() as moved, torch.no_grad():
        again = logistic_mixture(x, params.requires_grad_())
    assert moved.total <= 1.05 * (n + nbytes(x, ll))
    assert_near(again, ll, 0.0)
