"""The layers of kernels/modules.py: against their functional forms, as state_dicts of torch.nn, compiled, inverted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, TOLERANCE, assert_near, leaves
from torch import nn

import kernels
from kernels import modules
from kernels.coupling import affine_coupling_reference, spline_coupling_reference
from kernels.masked_conv import gated_masked_conv2d_reference, masked_conv2d_reference
from kernels.modules import (
    AffineCoupling,
    GatedMaskedConv2d,
    GroupNormSiLU,
    MaskedConv2d,
    SplineCoupling,
    VectorQuantizer,
)

SPLIT = 2
CHANNELS = 5
BINS = 4
CHECKERS = torch.tensor([[1, 0, 1], [0, 1, 0]])


@pytest.fixture(params=["torch", "triton"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(kernels, "mode", request.param)


class Conditioner(nn.Module):
    """Two layers, and what else a coupling is given, one number an image, added to the output."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels_in, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, channels_out, 1))

    def forward(self, x, shift=None):
        return self.net(x) + (0 if shift is None else shift.view(-1, 1, 1, 1))


def images(channels=CHANNELS):
    return torch.randn(2, channels, 2, 3, device=DEVICE)


LAYERS = {
    "GroupNormSiLU": lambda: (GroupNormSiLU(2, 4), images(4)),
    "MaskedConv2d": lambda: (MaskedConv2d(CHANNELS, 4, 3, "A"), images()),
    "GatedMaskedConv2d": lambda: (GatedMaskedConv2d(CHANNELS, 4, (1, 3)), images()),
    "AffineCoupling": lambda: (AffineCoupling(Conditioner(SPLIT, 2 * (CHANNELS - SPLIT)), SPLIT), images()),
    "AffineCoupling, mask": lambda: (AffineCoupling(Conditioner(CHANNELS, 2 * CHANNELS), CHECKERS), images()),
    "SplineCoupling": lambda: (SplineCoupling(Conditioner(SPLIT, (CHANNELS - SPLIT) * (3 * BINS - 1)), SPLIT), images()),
    "VectorQuantizer": lambda: (VectorQuantizer(7, 3), images(3).movedim(1, -1)),
    "VectorQuantizer, decay": lambda: (VectorQuantizer(7, 3, decay=0.9), images(3).movedim(1, -1)),
}


def layer(name):
    """A layer, and what it takes."""
    module, x = LAYERS[name]()
    module = module.to(DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))  # GroupNorm's 1 and 0 would hide which is which
    return module, x


def outputs(y):
    return y if isinstance(y, tuple) else (y,)


def same(module, reference, *inputs):
    """Values, and gradients of inputs and parameters, of a module against a function of (its copy in float64, inputs)."""
    exact = copy.deepcopy(module).double()
    ours = leaves(inputs)
    theirs = leaves(inputs, torch.float64)
    got = outputs(module(*ours))
    want = outputs(reference(exact, *theirs))
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 2e-5)
    dy = [torch.randn_like(b) for b in want]
    got = torch.autograd.grad(got, [*ours, *module.parameters()], [d.float() for d in dy])
    want = torch.autograd.grad(want, [*theirs, *exact.parameters()], dy)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 5e-5)


# ---- against what they wrap


def test_group_norm():
    module, x = layer("GroupNormSiLU")
    same(module, lambda m, x: F.silu(F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)), x)


@pytest.mark.parametrize("mask_type, kernel_size", [("A", 3), ("B", (1, 5)), ("vertical A", (3, 5)), ("vertical B", 3)])
def test_masked_convolutions(mask_type, kernel_size):
    x = images()
    cond = torch.randn(2, 6, device=DEVICE)
    plain = MaskedConv2d(CHANNELS, 4, kernel_size, mask_type, bias=mask_type == "A").to(DEVICE)
    gated = GatedMaskedConv2d(CHANNELS, 3, kernel_size, mask_type).to(DEVICE)
    assert gated(x).shape == (2, 3, 2, 3)
    same(plain, lambda m, x: masked_conv2d_reference(x, m.weight, m.bias, mask_type), x)
    same(gated, lambda m, x, c: gated_masked_conv2d_reference(x, m.weight, m.bias, c, mask_type), x, cond)
    same(gated, lambda m, x: gated_masked_conv2d_reference(x, m.weight, m.bias, None, mask_type), x)


def test_couplings():
    shift = torch.randn(2, device=DEVICE)
    module, x = layer("AffineCoupling")
    same(module, lambda m, x, s: affine_coupling_reference(x, m.conditioner(x[:, :SPLIT], s), SPLIT), x, shift)
    module, x = layer("AffineCoupling, mask")
    checkers = CHECKERS.to(DEVICE)
    same(module, lambda m, x, s: affine_coupling_reference(x, m.conditioner(x * checkers, s), checkers), x, shift)

    def spline(m, x, s):
        y, log_det = spline_coupling_reference(x[:, SPLIT:], m.conditioner(x[:, :SPLIT], s))
        return torch.cat([x[:, :SPLIT], y], 1), log_det

    module, x = layer("SplineCoupling")
    same(module, spline, x, shift)


@pytest.mark.parametrize("name", ["AffineCoupling", "AffineCoupling, mask", "SplineCoupling"])
def test_couplings_are_inverted(name):
    """And log_det is that of the Jacobian, which autograd writes out."""
    module, x = layer(name)
    module = module.double()
    x = x.double()
    context = torch.randn(2, device=DEVICE, dtype=torch.float64)
    y, log_det = module(x, context)
    assert (y - x).abs().max() > 0.1
    back, minus = module.inverse(y, context)
    assert_near(back, x, 1e-9)
    assert_near(minus, -log_det, 1e-9)
    rows = [torch.autograd.functional.jacobian(lambda a, c=c: module(a[None], c)[0].flatten(), image).flatten(1)
            for image, c in zip(x, context.split(1), strict=True)]
    assert_near(log_det, torch.stack([torch.linalg.slogdet(row)[1] for row in rows]), 1e-9)


# ---- vector quantisation


def nearest(z, codebook):
    return (z[..., None, :] - codebook).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_codes_loss_and_gradients(decay):
    """VQ-VAE eq. 1 to 3, written out; z_q hands its gradient to z."""
    module = VectorQuantizer(7, 3, beta=0.4, decay=decay).to(DEVICE).eval()
    z = images(3).movedim(1, -1).requires_grad_()
    weights = torch.randn(z.shape, device=DEVICE)
    z_q, indices, loss = module(z)
    assert torch.equal(indices, nearest(z, module.codebook))
    assert torch.equal(z_q, module.codebook[indices]) and torch.equal(module.decode(indices), z_q)
    distance = (z - module.codebook[indices]).detach()
    beta = 0.4 if decay else 1.4
    assert_near(loss, distance.square().mean() * beta, 1e-6)
    dz, = torch.autograd.grad((weights * z_q).sum() + loss, z, retain_graph=True)
    assert_near(dz, weights + 0.4 * 2 * distance / z.numel(), 1e-6)
    if decay is None:
        rows = F.one_hot(indices, 7).to(z).flatten(0, -2)
        assert_near(torch.autograd.grad(loss, module.codebook)[0], -2 * rows.T @ distance.flatten(0, -2) / z.numel(), 1e-6)
    else:
        assert not list(module.parameters())


def test_moving_averages():
    """The codebook after several batches, by a loop over codes; a code that nothing takes stays where it is, for ever."""
    module = VectorQuantizer(4, 2, decay=0.7).to(DEVICE)
    with torch.no_grad():
        module.codebook[3] = 1e3
        module.sums[3] = 1e3
    counts = [1.0] * 4
    sums = list(module.sums.double())
    for _ in range(80):
        z = torch.randn(9, 2, device=DEVICE)
        taken = nearest(z, module.codebook)
        module(z)
        for k in range(4):
            own = z[taken == k].double()
            counts[k] = 0.7 * counts[k] + 0.3 * len(own)
            sums[k] = 0.7 * sums[k] + 0.3 * own.sum(0)
            assert_near(module.codebook[k], sums[k] / counts[k], 1e-4, f"code {k}")
    before = copy.deepcopy(module.state_dict())
    module.eval()(z)
    assert all(torch.equal(a, before[name]) for name, a in module.state_dict().items())


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_moving_averages_of_a_collapsed_codebook(mode, monkeypatch):
    """600 vectors, more than a program of the sums adds, take the same code: it moves to their mean, the others stay."""
    monkeypatch.setattr(kernels, "mode", mode)
    module = VectorQuantizer(4, 2, decay=0.0).to(DEVICE)
    with torch.no_grad():
        module.codebook.copy_(torch.tensor([[9.0, 9.0], [0.0, 0.0], [-9.0, 9.0], [9.0, -9.0]]))
    before = module.codebook.clone()
    z = torch.randn(2, 300, 2, device=DEVICE)
    _, indices, _ = module(z)
    assert (indices == 1).all() and module.counts.tolist() == [0, 600, 0, 0]
    before[1] = z.flatten(0, 1).mean(0)
    assert_near(module.codebook, before, 1e-6)


def test_moving_averages_over_processes(monkeypatch):
    """Two processes with a batch each move the codebook as one with both does; here they have the same batch."""
    one = VectorQuantizer(4, 2, decay=0.7).to(DEVICE)
    two = copy.deepcopy(one)
    z = torch.randn(9, 2, device=DEVICE)
    one(torch.cat([z, z]))
    monkeypatch.setattr(modules.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(modules.dist, "all_reduce", lambda a: a.mul_(2))
    two(z)
    for name, a in one.state_dict().items():
        assert_near(two.state_dict()[name], a, 1e-6, name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_vectors_of_a_half_type(decay, autocast):
    """Beside a codebook in float32, which stays so; the loss is not rounded to the type of z."""
    module = VectorQuantizer(7, 3, decay=decay).to(DEVICE)
    z = images(3).movedim(1, -1).bfloat16().requires_grad_()
    kept = module.codebook.detach().clone()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        z_q, indices, loss = module(z)
    assert z_q.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_near(z_q, kept[indices], TOLERANCE[torch.bfloat16])
    distance = z.double() - z_q.double()
    assert_near(loss, distance.square().mean() * (0.25 if decay else 1.25), 1e-6)
    (loss + z_q.sum()).backward()
    assert z.grad.dtype == torch.bfloat16 and module.codebook.dtype == torch.float32
    assert decay or module.codebook.grad.dtype == torch.float32


def test_a_codebook_of_one_form_loads_into_the_other():
    trained = VectorQuantizer(4, 2)
    averaged = VectorQuantizer(4, 2, decay=0.9)
    missing, unexpected = averaged.load_state_dict(trained.state_dict(), strict=False)
    assert set(missing) == {"counts", "sums"} and not unexpected and torch.equal(averaged.codebook, trained.codebook)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_that_are_none(decay):
    with pytest.raises(ValueError, match="decay"):
        VectorQuantizer(4, 2, decay=decay)


# ---- as modules


@pytest.mark.parametrize("ours, theirs", [
    (GroupNormSiLU(2, 4), nn.GroupNorm(2, 4)), (MaskedConv2d(3, 4, (1, 3)), nn.Conv2d(3, 4, (1, 3))),
    (MaskedConv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False)), (GatedMaskedConv2d(3, 4, 3), nn.Conv2d(3, 8, 3))])
def test_weights_of_torch_nn(ours, theirs):
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts(name):
    module, x = layer(name)
    other, _ = layer(name)
    other.load_state_dict(module.state_dict())
    for a, b in zip(outputs(module.eval()(x)), outputs(other.eval()(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles(name, training):
    """Without a break: the same values, gradients and buffers."""
    torch.compiler.reset()
    module, x = layer(name)
    results = []
    for compiled in (False, True):
        twin = copy.deepcopy(module).train(training)
        a = x.clone().requires_grad_()
        y = outputs((torch.compile(twin, fullgraph=True, backend="aot_eager") if compiled else twin)(a))
        total = sum(b.square().sum() for b in y if b.is_floating_point())
        results.append([*y, *torch.autograd.grad(total, [a, *twin.parameters()]), *twin.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, words", [
    ("GroupNormSiLU", "2, 4"), ("MaskedConv2d", "5, 4, kernel_size=(3, 3), stride=(1, 1), padding=same, mask_type='A'"),
    ("GatedMaskedConv2d", "5, 4, kernel_size=(1, 3)"), ("AffineCoupling", "split=2, s_max=2.0"),
    ("AffineCoupling, mask", "mask=(2, 3), s_max=2.0"), ("SplineCoupling", "split=2, tail_bound=3.0"),
    ("VectorQuantizer", "7, 3, beta=0.25, decay=None"), ("VectorQuantizer, decay", "7, 3, beta=0.25, decay=0.9")])
def test_what_is_printed(name, words):
    module, _ = layer(name)
    assert words in module.extra_repr() and name.split(",")[0] in repr(module)


@pytest.mark.parametrize("kernel_size, mask_type, words", [
    (2, "B", "odd sides"), (1, "A", "a live tap"), ((1, 3), "vertical A", "a live tap"), (3, "C", "must be one of")])
@pytest.mark.parametrize("kind", [MaskedConv2d, GatedMaskedConv2d])
def test_masks_that_are_none(kind, kernel_size, mask_type, words):
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*{words}"):
        kind(3, 4, kernel_size, mask_type)
