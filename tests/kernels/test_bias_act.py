"""bias_act: both layouts, with a bias and without, and its derivatives up to the third."""

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    GRADIENTS,
    TOLERANCE,
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
from torch import nn

import kernels
from kernels import bias_act as module
from kernels.bias_act import bias_act, bias_act_reference, bias_act_torch

SHAPES = [(1, 1), (7, 12), (1, 1, 1, 1), (3, 5, 1, 1), (2, 12, 7, 5), (2, 3, 131), (5, 16, 4, 4), (2, 3, 2, 3, 4)]
FORMS = [bias_act, bias_act_torch]


def inputs(shape, channels_last=False):
    x = torch.randn(shape, device=DEVICE) * 2
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    return x, torch.randn(shape[1], device=DEVICE)


def away_from_the_kink(x, bias):
    """x moved so that finite differences do not cross z = 0."""
    b = 0 if bias is None else bias.view(-1, *(1,) * (x.dim() - 2))
    return x + 0.1 * torch.sign(x + b)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape):
    agree(bias_act, bias_act_reference, inputs(shape))
    agree(bias_act, bias_act_reference, inputs(shape)[:1])


@pytest.mark.parametrize("shape", [(2, 12, 7, 5), (3, 1, 4, 4), (3, 5, 1, 1)])
def test_channels_last(shape):
    agree(bias_act, bias_act_reference, inputs(shape, True))
    x, bias = inputs((2, 12, 7, 5), True)
    x.requires_grad_()
    y = bias_act(x, bias)
    d, = torch.autograd.grad(y.sum(), x)
    for a in (y, d):
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_tiles(channels_last, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    agree(bias_act, bias_act_reference, inputs((2, 5, 5, 3), channels_last))
    agree(bias_act, bias_act_reference, inputs((33, 7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_types(dtype, channels_last):
    agree(bias_act, bias_act_reference, inputs((2, 12, 7, 5), channels_last), dtype)


def test_a_bias_of_another_type():
    x, bias = inputs((2, 12, 7, 5))
    x, bias = x.bfloat16().requires_grad_(), bias.requires_grad_()
    for form in FORMS:
        y = form(x, bias)
        dx, db = torch.autograd.grad(y.sum(), (x, bias))
        assert y.dtype == dx.dtype == torch.bfloat16 and db.dtype == torch.float32
        want = torch.autograd.grad(bias_act_reference(x.double(), bias.double()).sum(), bias)[0]
        assert_near(db, want, 2e-2)


@pytest.mark.parametrize("slope, gain", [(0.0, 1.0), (0.01, 3.0), (1.0, 0.5), (2.0, 1e-3)])
@pytest.mark.parametrize("form", FORMS)
def test_slopes_and_gains(slope, gain, form):
    agree(lambda *a: form(*a, slope, gain), lambda *a: bias_act_reference(*a, slope, gain), inputs((2, 12, 7, 5)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient, channels_last):
    agree(bias_act, bias_act_reference, inputs((2, 12, 7, 5), channels_last), gradient=gradient)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    x, bias = inputs((4, 8, 6, 6))
    x = x[(slice(None),) * dim + (slice(None, None, 2),)]
    agree(bias_act, bias_act_reference, (x, bias[::8 // x.shape[1]]))


def test_extreme_values():
    """The kink itself, which has the derivative of the lower side; infinities; the largest and the smallest halves."""
    x = torch.tensor([[0.0, -0.0, float("inf"), -float("inf"), 1e-30, -1e-30, 3e38, -3e38]], device=DEVICE)
    for form in FORMS:
        a, b = (v.requires_grad_() for v in (x.clone(), x.clone()))
        y, want = form(a, None, 0.2, 1.0), F.leaky_relu(b, 0.2)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), a), torch.autograd.grad(want.sum(), b))
    x = torch.tensor([[60000.0, -60000.0, 1.2e-7, -1.2e-7]], device=DEVICE).half()
    assert torch.equal(bias_act(x, None, 0.5, 1.0), torch.tensor([[60000.0, -30000.0, 1.2e-7, -6e-8]], device=DEVICE).half())


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 0, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_nothing_out(shape, form):
    x, bias = (v.requires_grad_() for v in inputs(shape))
    form(x, bias).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("shape, channels", [((4,), 4), ((2, 4), 2), ((2, 4, 3, 3), 3), ((2, 4, 4, 4), 1)])
def test_shapes_that_do_not_fit(shape, channels):
    with pytest.raises(ValueError, match="does not fit"):
        bias_act(torch.zeros(shape), torch.zeros(channels))


@pytest.mark.parametrize("slope, gain", [(-0.1, 1.0), (0.2, 0.0), (0.2, -1.0)])
def test_slopes_and_gains_that_hide_the_sign(slope, gain):
    with pytest.raises(ValueError, match="must"):
        bias_act(torch.zeros(2, 3), None, slope, gain)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 2, 1)])
def test_gradcheck(shape, form, with_bias):
    x, bias = inputs(shape, len(shape) == 4)
    bias = bias if with_bias else None
    gradcheck(form, (away_from_the_kink(x, bias), bias))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 2), (1, 2, 2, 2)])
def test_gradgradcheck(shape, form, with_bias):
    x, bias = inputs(shape, len(shape) == 4)
    bias = bias if with_bias else None
    x, *bias = leaves((away_from_the_kink(x, bias), *([bias] if with_bias else [])), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *a: form(*a), (x, *bias), nondet_tol=0.0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_and_third_derivatives(gradient, dtype, channels_last):
    """With respect to the gradient handed over, through dx, dbias and both; the third is the first again."""
    x, bias = leaves(inputs((2, 6, 5, 3), channels_last), dtype)
    results = []
    for form, kind in ((bias_act, dtype), (bias_act_reference, torch.float64)):
        torch.manual_seed(1)
        a, b = (v.detach().to(kind).requires_grad_() for v in (x, bias))
        dy = torch.randn(x.shape, dtype=dtype, device=DEVICE).to(kind).requires_grad_()
        dx, db = torch.autograd.grad(form(a, b), (a, b), dy, create_graph=True)
        us = [GRADIENTS[gradient](v.to(dtype)).to(kind).requires_grad_() for v in (dx, db)]
        out = [torch.autograd.grad(dx, dy, us[0], retain_graph=True)[0],
               torch.autograd.grad(db, dy, us[1], retain_graph=True)[0]]
        ddy, = torch.autograd.grad((dx, db), dy, us, create_graph=True)
        w = torch.randn(ddy.shape, dtype=dtype, device=DEVICE).to(kind)
        results.append([*out, ddy, *torch.autograd.grad(ddy, us, w)])
    for got, want in zip(*results, strict=True):
        assert_near(got, want, TOLERANCE[dtype])


def critic(act, channels=4):
    """A small convolutional critic with act(x, bias) after each layer."""
    torch.manual_seed(3)
    convs = nn.ModuleList(nn.Conv2d(*sizes, 1, bias=False) for sizes in ((2, channels, 3, 1), (channels, channels, 3, 2)))
    linear = nn.Linear(channels * 9, 1)
    biases = nn.ParameterList([nn.Parameter(torch.randn(channels)) for _ in convs])

    def score(x):
        for conv, bias in zip(convs, biases, strict=True):
            x = act(conv(x), bias)
        return linear(x.flatten(1))

    return score, [p.to(DEVICE) for p in (*convs.parameters(), *biases, *linear.parameters())]


@pytest.mark.parametrize("loss", ["R1", "WGAN-GP"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_penalties(form, loss, monkeypatch):
    """The losses that differentiate twice, in a net, against PyTorch's own leaky ReLU."""
    monkeypatch.setattr(module, "TILE", 64)
    results = []
    for act in (form, lambda x, b: F.leaky_relu(x + b[:, None, None], 0.2) * 2**0.5):
        net, parameters = critic(act)
        torch.manual_seed(4)
        x = torch.randn(2, 2, 6, 6).to(DEVICE).requires_grad_()
        score = net(x)
        d, = torch.autograd.grad(score.sum(), x, create_graph=True)
        norm = d.square().sum((1, 2, 3))
        penalty = norm.mean() if loss == "R1" else (norm.sqrt() - 1).square().mean()
        results.append(torch.autograd.grad(penalty + F.softplus(-score).mean(), parameters))
    assert any(a.abs().max() > 0.1 for a in results[1])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_saved():
    """The output, and nothing else of its size."""
    x, bias = (v.requires_grad_() for v in inputs((2, 6, 5, 3)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bias_act(x, bias)
    assert [t.data_ptr() for t in saved if t.numel() == x.numel()] == [y.data_ptr()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_as_a_custom_operator(channels_last):
    x, bias = inputs((2, 6, 5, 3), channels_last)
    x = away_from_the_kink(x, bias)
    opcheck(module._fwd.operator, (x, bias, None, 0.2, 1.5))
    torch.library.opcheck(module._fwd.operator, (x.clone().requires_grad_(), bias.requires_grad_(), x, 0.2, 1.5))
    torch.library.opcheck(module._bwd.operator, (x.clone().requires_grad_(), x, True, 0.2, 1.5))
    torch.library.opcheck(module._bwd.operator, (x.clone().requires_grad_(), x, False, 0.2, 1.5))


@pytest.mark.parametrize("mode", kernels.MODES)
def test_compiles(mode, monkeypatch):
    monkeypatch.setattr(kernels, "mode", mode)
    compiles(bias_act, inputs((2, 6, 5, 3), True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_deterministic(channels_last, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)
    deterministic(bias_act, inputs((2, 5, 5, 3), channels_last))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("shape, channels_last", [
    ((4, 32, 4, 4), False), ((2, 16, 16, 16), False), ((1, 3, 65, 33), False), ((4, 32, 8, 8), True), ((300, 40), False)])
def test_bytes(shape, channels_last):
    x, bias = inputs(shape, channels_last)
    n = nbytes(x)
    with traffic() as moved:
        y = module._fwd(x, bias, None, 0.2, 1.5)
    assert 2 * n + nbytes(bias) <= moved.total <= 1.05 * 2 * n
    with traffic() as moved:
        _, db = module._bwd(x, y, True, 0.2, 1.5)
    assert 3 * n <= moved.total <= 1.05 * 3 * n
    with traffic() as moved:
        module._fwd(x, db, y, 0.2, 1.5)
    assert 3 * n <= moved.total <= 1.05 * 3 * n


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_form_is_the_reference(shape):
    x, bias = inputs(shape)
    kept = x.clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        agree(bias_act_torch, bias_act_reference, (x, bias), dtype)
        agree(bias_act_torch, bias_act_reference, (x,), dtype)
    assert torch.equal(x, kept)


def test_the_plain_form_keeps_the_layout():
    for channels_last in (False, True):
        x, bias = inputs((2, 6, 5, 3), channels_last)
        assert bias_act_torch(x, bias).stride() == bias_act_torch(x).stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_pytorchs(shape):
    x, bias = inputs(shape)
    shifted = torch.stack([a + b for a, b in zip(x.unbind(1), bias, strict=True)], 1)
    torch.testing.assert_close(bias_act_reference(x, bias, 0.3, 1.7), 1.7 * F.leaky_relu(shifted, 0.3))
    torch.testing.assert_close(bias_act_reference(x, None, 0.0, 1.0), F.relu(x))


@pytest.mark.parametrize("op", ["fwd", "bwd"])
def test_backend_of_a_call(op, monkeypatch):
    """It stands in for the mode, both ways, also for what the backward pass runs."""
    launched = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: launched.append(1) or launch(kernel, *a, **k))
    x, bias = leaves(inputs((2, 6, 5, 3)))
    results = []
    for mode, backend, launches in (("torch", "triton", 1), ("triton", "torch", 0), ("torch", None, 0), ("triton", None, 1)):
        monkeypatch.setattr(kernels, "mode", mode)
        launched.clear()
        y = bias_act(x, bias, backend=backend)
        grads = torch.autograd.grad(y.sum(), (x, bias)) if op == "bwd" else ()
        assert len(launched) == (launches if op == "fwd" else 2 * launches)
        results.append((y, *grads))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    with pytest.raises(ValueError, match="must be one of"):
        bias_act(x, bias, backend="cuda")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_types_are_those_of_the_plain_form(dtype, bias_dtype, autocast):
    """Under autocast as well, and for a bias of another type: y and its gradients, in both modes."""
    x, bias = inputs((2, 6, 5, 3), True)
    x = x.to(dtype)
    bias = bias.to(bias_dtype) if bias_dtype else None
    want = bias_act_reference(x.double(), None if bias is None else bias.double())
    for backend in ("torch", "triton"):
        given = leaves((x, bias))
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            y = bias_act(*given, backend=backend)
        grads = torch.autograd.grad(y.float().sum(), [a for a in given if a is not None])
        assert y.dtype == grads[0].dtype == dtype and grads[-1].dtype == (bias_dtype or dtype)
        assert_near(y, want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("channels_last", [False, True])
def test_image_sizes_share_compilations(channels_last, monkeypatch):
    """Sizes are arguments: ten of them make at most four variants of a kernel, by what 16 divides and by long rows or short."""
    monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **constants: None)
    with compilations(module, monkeypatch) as keys:
        for H, W in ((7, 7), (8, 8), (9, 9), (14, 14), (16, 16), (20, 28), (28, 28), (32, 32), (47, 47), (64, 64)):
            x, bias = leaves(inputs((2, 16, H, W), channels_last))
            bias_act(x, bias).sum().backward()
    launched = [name for name, _ in keys]
    counts = {name: launched.count(name) for name in launched}
    assert len(counts) == 2 and max(counts.values()) <= 4, counts


def test_transformed_by_torch_func():
    x, bias = inputs((2, 4, 3, 3))
    got = torch.func.grad(lambda b: bias_act(x, b).sin().sum())(bias)
    torch.testing.assert_close(got, torch.func.grad(lambda b: bias_act_reference(x, b).sin().sum())(bias))
