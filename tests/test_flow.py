"""The mathematics of flow.py: determinants by autograd, inverses, densities that integrate to one, exact bits per dimension."""

import dataclasses
import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import flow
import tiny
from flow import Config, Flow, dequantize, initialise, log_density, log_likelihood, log_normal, sample

KINDS = {"additive": {"arch": "glow", "coupling": "additive"}, "affine": {"arch": "glow", "coupling": "affine"},
         "spline": {"arch": "glow", "coupling": "spline"}, "tarflow": {"arch": "tarflow"}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, shape=(1, 4, 4), std=0.15, classes=3, **fields):
    """A small flow in float64 whose weights are all random, and its Config."""
    C, H, W = shape
    small = {"width": 8, "blocks": 2, "steps_per_scale": 2, "layers": 1, "n_head": 2}
    cfg = flow.choose(Config(**small | KINDS[kind] | fields), H, W)
    torch.manual_seed(0)
    model = Flow(C, H, W, classes, cfg).double().eval()
    for name, p in model.named_parameters():
        if not name.endswith((".L", ".U")):  # the 1x1 convolutions are rotations already
            nn.init.normal_(p, std=std)
    return model, cfg


def batch(n, shape, scale=0.7):
    return scale * torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % 3


def flat(eps):
    return torch.cat([e.flatten(1) for e in eps], 1)


# ---- change of variables


@every_kind
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 2, 6), (1, 5, 3), (1, 1, 1), (3, 2, 2)])
def test_log_det_and_inverse(kind, shape):
    """log |det| is that of autograd's Jacobian, and the inverse brings back what went in: odd sizes lose and gain nothing."""
    model, _ = build(kind, shape)
    check_log_det_and_inverse(model, shape)


def check_log_det_and_inverse(model, shape):
    x, y = batch(3, shape)
    eps, log_det = model.f(x, y)
    assert [e.shape[1:] for e in eps] == [torch.Size(s) for s in model.f.noise_shapes]
    assert sum(e[0].numel() for e in eps) == x[0].numel()
    assert log_det.shape == (3,)
    for b in range(3):
        J = torch.autograd.functional.jacobian(lambda v, b=b: flat(model.f(v[None], y[b:b + 1])[0])[0], x[b])
        assert_close(log_det[b], torch.linalg.slogdet(J.view(x[0].numel(), -1))[1])
    for how in ("cached", "jacobi"):
        with torch.no_grad():
            assert_close(model.f.inverse(eps, y, how)[0], x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_log_det_and_inverse_of_other_tarflows(coupling):
    model, _ = build("tarflow", (2, 2, 4), patch=2, coupling=coupling)
    check_log_det_and_inverse(model, (2, 2, 4))


def test_log_scales_of_affine_couplings_are_bounded():
    """In steps of Glow, of which there are many, by 2; in blocks of TarFlow by 4; a prior may be as narrow as exp(-6)."""
    glow, tar = build("affine")[0].f, build("tarflow", coupling="affine")[0].f
    x, y = batch(2, (4, 2, 2))
    step, prior, block = glow.scales[0]["steps"][0], glow.last, tar.blocks[0]
    nn.init.constant_(step.conv3.bias, 1e5)
    nn.init.constant_(prior.label.weight, 1e5)
    nn.init.constant_(block.head.W.bias, 1e5)
    last = torch.randn(2, prior.label.weight.shape[1] // 2, 1, 1, dtype=torch.float64)
    for log_det, numbers, bound in ((step.transform(x, y)[1], 8, 2), (prior(last, None, y)[1], last[0].numel(), 6),
                                    (block(batch(2, (4, 4))[0], y)[1], 16, 4)):
        assert_close(log_det, torch.full((2,), numbers * bound, dtype=torch.float64), rtol=1e-3, atol=0)


def bounded_affine(z, params, bound):
    """z exp(log_s) + shift, log_s within the bound."""
    raw, shift = params.chunk(2, 1)
    return z * torch.exp(bound * torch.tanh(raw / bound)) + shift


def test_what_steps_and_priors_of_glow_hear():
    """A step the class and the channels that stay, a prior the class and the channels that go on, where there are some."""
    model, _ = build("affine", (1, 8, 8))
    (x, y), conv2d = batch(3, (4, 4, 4)), torch.nn.functional.conv2d
    step, split, last = model.f.scales[0]["steps"][0], model.f.scales[0]["split"], model.f.last
    h = torch.relu(conv2d(x[:, :2], step.conv1.weight, step.conv1.bias, padding=1) + step.label.weight[y][:, :, None, None])
    h = torch.relu(conv2d(h, step.conv2.weight, step.conv2.bias))
    params = conv2d(h, step.conv3.weight, step.conv3.bias, padding=1)
    assert_close(step.transform(x, y)[0], torch.cat([x[:, :2], bounded_affine(x[:, 2:], params, 2)], 1))
    seen, z = x.chunk(2, 1)
    params = split.label.weight[y][:, :, None, None] + conv2d(seen, split.conv.weight, split.conv.bias, padding=1)
    assert_close(split(z, seen, y)[0], bounded_affine(z, params, 6))
    z = torch.randn(3, last.label.weight.shape[1] // 2, 1, 1, dtype=torch.float64)
    assert_close(last(z, None, y)[0], bounded_affine(z, last.label.weight[y][:, :, None, None], 6))


@pytest.mark.parametrize("kind, T", [("spline", 3.0), ("tarflow", 1.0)])
def test_where_a_spline_ends(kind, T):
    """From T on it is the identity: 3 in steps of Glow, which normal numbers seldom leave, 1 in blocks of TarFlow."""
    model, _ = build(kind)
    x = torch.linspace(-2 * T, 2 * T, 64, dtype=torch.float64).view(1, 4, 4, 4)
    y = torch.tensor([1])
    if kind == "spline":
        kept, step = 2, model.f.scales[0]["steps"][0]
        z = step.transform(x, y)[0]
    else:
        kept, block = 0, model.f.blocks[0]
        x = x.flatten(2)
        z = block.transform(x, torch.randn(1, 4, 16, flow.PARAMS["spline"], dtype=torch.float64))[0]
    x, z = x[:, kept:], z[:, kept:]
    assert torch.equal(z[x.abs() >= T], x[x.abs() >= T]) and (z[x.abs() < T] != x[x.abs() < T]).all()


@every_kind
def test_log_det_of_the_inverse(kind):
    """The Jacobian of the inverse, whole, has the determinant's reciprocal."""
    shape = (1, 4, 2)
    model, cfg = build(kind, shape)
    x, y = batch(1, shape)
    eps, log_det = model.f(x, y)
    sizes = [e[0].numel() for e in eps]

    def back(z):
        parts = [p.view(1, *s) for p, s in zip(z.split(sizes), model.f.noise_shapes, strict=True)]
        return model.f.inverse(parts, y, "jacobi")[0].flatten()

    J = torch.autograd.functional.jacobian(back, flat(eps)[0])
    assert_close(-torch.linalg.slogdet(J)[1], log_det[0], rtol=1e-4, atol=1e-4)  # stops at 1e-5


@every_kind
def test_inverse_far_out_and_after_training(kind):
    """In the tails of the splines, and with the weights that training leaves."""
    shape = (1, 4, 4)
    model, cfg = build(kind, shape, std=0.05)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    data, y = batch(64, shape)
    data = data.sign() * data.abs().sqrt()
    before = -log_density(model, data, y).mean()
    for _ in range(40):
        loss = -log_density(model, data, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < before - 1
    for scale in (1.0, 3.0):  # further out, or trained longer, a spline flow may shrink by e^-30, more than float64 brings back
        x = data[:8] * scale
        x[:, :, 0, 0] = torch.linspace(-3, 3, 8)[:, None]
        with torch.no_grad():
            eps = model.f(x, y[:8])[0]
            found = model.f.inverse(eps, y[:8], "cached")[0]
            again = model.f(found, y[:8])[0]
        for e, e_again in zip(eps, again, strict=True):
            assert_close(e_again, e, rtol=1e-9, atol=1e-9)
        assert_close(found, x, rtol=1e-7, atol=1e-7)


@every_kind
def test_the_density_integrates_to_one(kind, monkeypatch):
    """An image of two pixels; splines have four bins, so that none is much narrower than the steps of the sum."""
    monkeypatch.setitem(flow.PARAMS, "spline", 3 * 4 - 1)
    shape = (1, 1, 2) if kind == "tarflow" else (2, 1, 1)
    model, cfg = build(kind, shape, std=0.3)
    if kind != "tarflow":
        model.f = TwoChannels(Config(**KINDS[kind], width=8))
    end, points = (1.5, 601) if kind == "tarflow" else (12, 401)
    line = torch.linspace(-end, end, points, dtype=torch.float64)
    line = line - (line[1] - line[0]) / 2  # tarflow's density ends at -1 and 1, between two of these
    v = torch.cartesian_prod(line, line).view(-1, *shape)
    with torch.no_grad():
        total = sum(log_density(model, part, torch.ones(len(part), dtype=torch.long)).exp().sum() for part in v.split(100_000))
    assert (total * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=2e-3)


class TwoChannels(nn.Module):
    """Three steps of Glow over two channels, without a squeeze."""

    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(1)
        self.steps = nn.ModuleList(flow.Step(2, 3, cfg) for _ in range(3)).double()
        for name, p in self.steps.named_parameters():
            if not name.endswith((".L", ".U")):
                nn.init.normal_(p, std=0.3)

    def forward(self, x, y):
        total = 0
        for step in self.steps:
            x, log_det = step(x, y)
            total = total + log_det
        return [x], total


def test_actnorm_is_set_from_data_once():
    model, cfg = build("affine")
    x, y = batch(200, (1, 4, 4))
    x = 3 * x + 1
    initialise(model, x, y)
    step = model.f.scales[0]["steps"][0]
    h = (flow.F.pixel_unshuffle(x, 2) + step.shift[:, None, None]) * torch.exp(step.log_scale)[:, None, None]
    assert_close(h.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(h.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), atol=1e-3, rtol=0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.f(x * 5, y)  # what sets it has gone
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_actnorm_of_a_channel_without_variance_is_finite():
    """As of images that are black, or the same in all of a corner."""
    model, _ = build("affine")
    y = torch.zeros(5, dtype=torch.long)
    v = torch.full((5, 1, 4, 4), -0.5, dtype=torch.float64)
    initialise(model, v, y)
    eps, log_det = model.f(v, y)
    assert flat(eps).isfinite().all() and log_det.isfinite().all()
    assert_close(model.f.scales[0]["steps"][0].log_scale, torch.full((4,), math.log(1e3), dtype=torch.float64))


def test_training_begins_with_actnorm_of_its_images(digits, tmp_path, monkeypatch):
    """At the first 256 of them, dequantized: each channel of each step has mean 0 and variance 1. A run that is continued
    keeps what it has learned."""
    calls, inside = [], flow.initialise
    monkeypatch.setattr(flow, "initialise", lambda model, v, y: calls.append((inside(model, v, y), v, y, model.state_dict())))
    out = tmp_path / "run"
    flow.main([*TINY, "--out", str(out), "--arch", "glow", "--coupling", "affine", "--steps", "1"])
    flow.main(["--out", str(out), "--resume", "--steps", "2"])
    ((_, v, y, _),) = calls
    assert torch.equal(flow.quantize(v), digits.train[:256]) and torch.equal(y, digits.train_labels[:256])
    model, seen = flow.load(out)[0], []
    inside(model, v, y)
    step = model.f.scales[0]["steps"][0]
    for i in range(len(model.f.scales)):
        model.f.scales[i]["steps"][0].register_forward_pre_hook(lambda step, args: seen.append((step, args[0])))
    model.f(v, y)
    for step, x in seen:
        h = (x + step.shift[:, None, None]) * torch.exp(step.log_scale)[:, None, None]
        assert_close(h.mean((0, 2, 3)), torch.zeros(h.shape[1]), atol=1e-3, rtol=0)
        assert_close(h.std((0, 2, 3)), torch.ones(h.shape[1]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_recomputing_changes_no_gradient(kind):
    """Not by a bit, as the same steps are computed again from the same inputs."""
    shape = (1, 8, 8)
    model, cfg = build(kind, shape, recompute=True)
    model.train()  # the averaged network, in eval mode, keeps its activations
    x, y = batch(5, shape)
    results = []
    for model.f.recompute in (False, True):
        v = x.clone().requires_grad_()
        density = log_density(model, v, y)
        results.append([density, *torch.autograd.grad(density.mean(), [v, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_kind
def test_mixed_precision_is_for_the_networks_alone(kind):
    """What passes through stays in float32: a bfloat16 near 1 is a level of 8 bits wide."""
    model, _ = build(kind, (1, 8, 8), std=0.1)
    model, x, y = model.float(), batch(6, (1, 8, 8))[0].float(), torch.arange(6) % 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eps, log_det = model.f(x, y)
    assert log_det.dtype == torch.float32 and all(e.dtype == torch.float32 for e in eps)
    with torch.no_grad():
        assert_close(flat(eps), flat(model.f(x, y)[0]), rtol=0, atol=0.1)


# ---- the transformer flow


def test_a_block_is_causal():
    model, cfg = build("tarflow", (1, 4, 6), patch=2)
    block, y = model.f.blocks[0], torch.tensor([1])
    x = 2 * torch.rand(1, 6, 4, dtype=torch.float64) - 1
    J = torch.autograd.functional.jacobian(lambda x: block(x, y)[0], x).view(24, 24)
    assert (J.triu(1) == 0).all() and (J.diagonal() > 0).all()
    assert (J.tril(-1) != 0).float().mean() > 0.9 * 23 / 48  # all before are seen, those of the same position too


def test_both_inverses_are_the_same():
    """Fixed-point iteration against one position at a time: at most as many calls as there are positions, and images that
    end sooner than others are as they would be alone. Only positions behind a change are solved again."""
    model, cfg = build("tarflow", (1, 8, 8), patch=2, std=0.3)
    z, y = [torch.randn(4, 16, 4, dtype=torch.float64)], torch.tensor([0, 1, 2, 0])
    a, positions = sample(model, z, y, cfg)
    b, calls = sample(model, z, y, dataclasses.replace(cfg, inverse="jacobi"))
    assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert positions == 2 * 16 and 2 < calls <= 2 * 16
    alone = [sample(model, [z[0][i:i + 1]], y[i:i + 1], dataclasses.replace(cfg, inverse="jacobi")) for i in range(4)]
    assert_close(torch.cat([images for images, _ in alone]), b)
    assert calls >= max(used for _, used in alone) > min(used for _, used in alone)
    solved, block = [], model.f.blocks[0]
    block.solve = lambda z, h: solved.append(len(z)) or type(block).solve(block, z, h)
    _, used = flow.inverse_jacobi(block, z[0], y)
    assert len(solved) == used and solved[0] == 4 * 16 and all(n <= 4 * (16 - i) for i, n in enumerate(solved))


# ---- the learned inverse

TRAINED = ("f.learned.", "f.critic.")  # all else stays as it is

def learnable(**fields):
    """A flow with a network that learns its inverse, all weights random."""
    return build("tarflow", (1, 4, 6), patch=2, std=0.3, learn_inverse=True, init="a run", **fields)


class Linear(nn.Module):
    """A critic that is a sum of pixels, so that its slope is known: weight along each of the pixels."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, v, y):
        return self.weight * v.flatten(1).sum(1) + y


def test_the_losses_of_the_learned_inverse_against_their_formulas():
    """An inverse that is off by a known shift, and a linear critic. Labels and noise are those of the flow, and the target is
    what the flow was trained on."""
    model, cfg = learnable()
    model.float()
    x, y = torch.randint(0, 256, (3, 1, 4, 6)), torch.tensor([0, 2, 1])
    torch.manual_seed(1)
    v, _ = dequantize(model, x)
    eps, _ = model.f(v, y)
    near = [0.02 * torch.randn_like(v) for _ in range(2)]
    seen = []

    class Off(nn.Module):
        def forward(self, z, labels):
            seen.append((z, labels))
            return flow.F.pixel_unshuffle(v + 0.2, 2).flatten(2).transpose(1, 2)

    model.f.learned = Off()
    model.f.critic = Linear(0.3)
    torch.manual_seed(1)
    losses = flow.inverse_losses(model, x, y, cfg)
    assert_close(seen[0][0], eps[0].detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[0][1], y)
    assert_close(losses["mse"].item(), 0.04, rtol=1e-4, atol=0)
    gap = 0.3 * 24 * 0.2  # of the scores of 24 pixels
    slopes = sum((0.3 * e.flatten(1).sum(1) / 0.02) ** 2 for e in near).mean().item()
    critic_loss = math.log1p(math.exp(gap)) + 15 / 2 * slopes
    assert_close(losses["critic_loss"].item(), critic_loss, rtol=1e-3, atol=0)
    assert_close(losses["loss"].item(), 0.04 + critic_loss + math.log1p(math.exp(-gap)), rtol=1e-3, atol=0)
    assert_close(model.f.inverse(eps, y, "learned")[0], v + 0.2)  # what is sampled is what is trained


def test_the_learned_inverse_is_taught_the_noise_of_the_exact_flow():
    """Under --amp too: as evaluation has it, the flow is computed in float32."""
    model, cfg = learnable()
    model, seen = model.float(), []
    x, y = torch.randint(0, 256, (3, 1, 4, 6)), torch.tensor([0, 2, 1])
    model.f.learned.register_forward_pre_hook(lambda network, args: seen.append(args[0]))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        flow.inverse_losses(model, x, y, cfg)
    torch.manual_seed(1)
    eps, _ = model.f(dequantize(model, x)[0], y)
    assert_close(seen[0], eps[0].detach(), rtol=1e-4, atol=1e-4)


def test_the_slope_is_the_square_of_the_gradient_in_the_mean():
    """Of a linear critic over 24 pixels: 24 weight^2, at real and at learned images."""
    model, cfg = learnable()
    model.float()
    model.f.critic = Linear(0.3)
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4000, 1, 4, 6))
    with torch.no_grad():
        losses = flow.inverse_losses(model, x, torch.zeros(4000, dtype=torch.long), cfg)
        v, _ = dequantize(model, x)
        eps, _ = model.f(v, torch.zeros(4000, dtype=torch.long))
        gap = 0.3 * (model.f.inverse(eps, torch.zeros(4000, dtype=torch.long), "learned")[0] - v).flatten(1).sum(1)
    slopes = (losses["critic_loss"] - flow.F.softplus(gap).mean()) / (15 / 2)
    assert_close(slopes.item(), 2 * 24 * 0.3**2, rtol=0.1, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 15.0])
def test_each_of_the_two_opponents_minimises_its_own_loss(gamma, monkeypatch):
    """The critic gets the gradient of its loss alone, the inverse that of mean square and softplus(real - learned)."""
    assert flow.CRITIC_GAMMA == 15.0
    monkeypatch.setattr(flow, "CRITIC_GAMMA", gamma)
    model, cfg = learnable()
    model.float()
    nn.init.normal_(model.f.critic.label.weight)
    x, y = torch.randint(0, 256, (3, 1, 4, 6)), torch.tensor([0, 2, 1])
    critic, learned = (list(part.parameters()) for part in (model.f.critic, model.f.learned))
    torch.manual_seed(1)
    losses = flow.inverse_losses(model, x, y, cfg)
    found = torch.autograd.grad(losses["loss"], critic + learned)
    torch.manual_seed(1)
    v, _ = dequantize(model, x)
    eps, _ = model.f(v, y)
    images, _ = model.f.inverse([eps[0].detach()], y, "learned")
    pair = [(v, model.f.critic(v, y)), (images.detach(), model.f.critic(images.detach(), y))]
    steps = [model.f.critic(w + 0.02 * torch.randn_like(w), y) - scores for w, scores in pair]
    loss = flow.F.softplus(pair[1][1] - pair[0][1]).mean() + gamma / 2 * sum((step / 0.02) ** 2 for step in steps).mean()
    got, want = (torch.cat([g.flatten() for g in of]) for of in (found[:len(critic)], torch.autograd.grad(loss, critic)))
    assert (got - want).norm() < 1e-3 * want.norm()  # small differences are divided by small noise
    loss = ((images - v) ** 2).mean() + flow.F.softplus(model.f.critic(v, y) - model.f.critic(images, y)).mean()
    for a, b in zip(found[len(critic):], torch.autograd.grad(loss, learned), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(a.abs().max() > 0 for a in found[len(critic):])


@pytest.mark.parametrize(("C", "H", "W"), [(1, 1, 1), (3, 3, 7), (1, 28, 28), (1, 8, 2)])
def test_the_critic_takes_images_of_any_size_and_their_class(C, H, W):
    torch.manual_seed(0)
    critic = flow.Critic(C, H, W, classes=3)
    v, y = torch.randn(4, C, H, W), torch.tensor([0, 1, 2, 0])
    scores = critic(v, y)
    assert scores.shape == (4,)
    assert torch.equal(scores, critic(v, y.flip(0)))  # the label begins at 0
    nn.init.normal_(critic.label.weight)
    h = v
    for i, stride in ((0, 1), (2, 2), (4, 2)):
        conv = critic.body[i]
        h = flow.F.conv2d(h, conv.weight, conv.bias, stride, padding=1)
        h = torch.where(h > 0, h, 0.2 * h)
    h = h.flatten(1)
    of_class = (h * critic.label.weight[y]).mean(1)
    assert_close(critic(v, y), flow.F.linear(h, critic.head.weight, critic.head.bias)[:, 0] + of_class)
    alone = critic(v.bfloat16().float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(critic(v.bfloat16(), y), alone)  # in float32, whatever comes in


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_learned_inverse_sees_the_noise_in_raster_order(blocks):
    """At the place of the pixels that it makes, whichever way round the flow's last block has it: as it is, and uniform."""
    model, _ = learnable(blocks=blocks)
    z, seen = torch.randn(2, 6, 4, dtype=torch.float64), []
    model.f.learned.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model.f.learned(z, torch.tensor([0, 1]))
    z = z.flip(1, 2) if blocks == 1 else z
    assert_close(seen[0], torch.cat([z, 2 * torch.special.ndtr(z) - 1], 2))


def test_the_learned_inverse_takes_labels_noise_and_temperature():
    """One call; every position sees all of the noise; half the temperature is half the noise."""
    model, cfg = learnable()
    eps, y = [torch.randn(3, *model.f.noise_shapes[0], dtype=torch.float64)], torch.arange(3)
    images, calls = sample(model, eps, y, cfg)  # by default, as there is one
    assert torch.equal(images, sample(model, eps, y, dataclasses.replace(cfg, inverse="learned"))[0])
    assert calls == 1 and images.shape == (3, 1, 4, 6)
    assert not torch.allclose(images, sample(model, eps, (y + 1) % 3, cfg)[0])
    half, _ = sample(model, eps, y, dataclasses.replace(cfg, temperature=0.5))
    assert_close(half, model.f.inverse([eps[0] / 2], y, "learned")[0])
    assert not torch.allclose(half, images)
    J = torch.autograd.functional.jacobian(lambda z: model.f.learned(z, y[:1]), eps[0][:1])
    assert (J.abs() > 0).all()
    exact = [sample(model, eps, y, dataclasses.replace(cfg, inverse=how))[0] for how in ("cached", "jacobi")]
    assert_close(*exact, rtol=1e-4, atol=1e-4)


def test_the_learned_inverse_trains_alone_and_resumes(digits, tmp_path, monkeypatch):
    """From the averaged flow of --init, which stays bit for bit, and so does each test figure; eight steps are the same as
    four and four more; the samples are the network's own."""
    base, whole, parts = (tmp_path / name for name in ("base", "whole", "parts"))
    flow.main([*TINY, "--out", str(base)])
    seen, update = [], flow.Run.update

    def record(self, loss, model, *args):
        norm = update(self, loss, model, *args)
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})
        return norm

    monkeypatch.setattr(flow.Run, "update", record)
    more = ["--learn-inverse", "--init", str(base), "--lr", "0.01", "--warmup", "0"]
    flow.main([*TINY, *more, "--out", str(whole), "--steps", "8"])
    assert len(seen) == 8 and all(name.startswith(TRAINED) for names in seen for name in names)
    flow.main([*TINY, *more, "--out", str(parts)])
    flow.main(["--resume", "--out", str(parts), "--steps", "8"])
    was, one, two = (tiny.load_checkpoint(folder) for folder in (base, whole, parts))
    tiny.assert_same_state(one, two)
    assert was["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert one["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.99)  # of a game
    matrices = [len(saved["optimizer"]["param_groups"][1]["params"]) for saved in (was, one)]
    assert matrices[1] - matrices[0] == 3 * 4  # three layers for the flow's one block, four matrices each
    for part in ("model", "ema_model"):
        for name, value in one[part].items():
            assert name.startswith(TRAINED) or torch.equal(value, was["ema_model"][name])
    assert final(whole)["test_bpd"] == final(base)["test_bpd"]
    bits = [np.load(folder / "likelihoods.npz")["test"] for folder in (base, whole)]
    assert (bits[0] == bits[1]).all()
    assert [line.keys() for line in tiny.metrics(whole)[:-1]] == 8 * [{"step", "loss", "mse", "critic_loss", "grad_norm", "lr"}]

    written = np.load(whole / "samples.npz")["images"]
    model, cfg = flow.load(whole)
    noise = flow.draw_noise(model, 4, torch.Generator().manual_seed(cfg.seed))
    images, calls = sample(model, noise, torch.arange(4), cfg)
    assert calls == 1 and (flow.quantize(images).permute(0, 2, 3, 1).numpy() == written).all()
    flow.main(["--mode", "sample", "--out", str(whole), "--inverse", "cached"])
    exact = np.load(whole / "sampled" / "samples.npz")["images"]
    assert (exact == np.load(base / "samples.npz")["images"]).all() and (exact != written).any()


def test_the_learned_inverse_nears_the_exact_one():
    """Of a flow with random weights, small enough to know by heart: 60 steps halve the error of the mean image."""
    model, cfg = build("tarflow", (1, 4, 4), patch=2, learn_inverse=True, init="a run", width=16, n_head=1)
    model.float()
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if name.startswith(TRAINED)], 3e-3)
    for _ in range(60):
        losses = flow.inverse_losses(model, torch.randint(0, 256, (64, 1, 4, 4)), torch.arange(64) % 3, cfg)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert all((p.grad is not None) == name.startswith(TRAINED) for name, p in model.named_parameters())
    assert all(p.grad.abs().max() > 0 for p in model.f.learned.layers.parameters() if p.dim() > 1)  # none stands idle
    with torch.no_grad():
        v, _ = dequantize(model, torch.randint(0, 256, (200, 1, 4, 4)))
        eps, _ = model.f(v, torch.arange(200) % 3)
    exact, learned = (sample(model, eps, torch.arange(200) % 3, dataclasses.replace(cfg, inverse=how))[0]
                      for how in ("cached", "learned"))
    assert_close(exact, v, rtol=0, atol=1e-3)
    assert ((learned - v) ** 2).mean() < 0.5 * v.var(0).mean()


def test_the_learned_inverse_wants_the_flow_of_init(digits, tmp_path, capsys):
    """Whatever of the network differs: else parts of the flow would be those that nobody trained."""
    flow.main([*TINY, "--out", str(tmp_path / "base")])
    for flags in ("--layers 2", "--n-head 1", "--no-labels", "--coupling affine", "--width 12", "--blocks 2", "--patch 4",
                  "--dequantize variational"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            flow.main([*TINY, *flags.split(), "--learn-inverse", "--init", str(tmp_path / "base"), "--out",
                       str(tmp_path / "run")])
        name = {"--no-labels": "classes", "--n-head": "n_head"}.get(flags.split()[0], flags.split()[0].strip("-"))
        assert stop.value.code == 2
        assert re.fullmatch(rf"--learn-inverse: the run in .* has another {name}", tiny.error_line(capsys.readouterr().err))


def test_the_learned_inverse_is_not_that_of_glow(digits, tmp_path, capsys):
    flow.main([*TINY, "--arch", "glow", "--scales", "1", "--steps-per-scale", "1", "--out", str(tmp_path / "base")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flow.main([*TINY, "--learn-inverse", "--init", str(tmp_path / "base"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "has another arch" in tiny.error_line(capsys.readouterr().err)


def test_no_learned_inverse_is_one_line(digits, tmp_path, capsys):
    out = str(tmp_path / "run")
    flow.main([*TINY, "--out", out])
    for argv in (["--mode", "sample", "--out", out, "--inverse", "learned"], [*TINY, "--out", out + "2", "--learn-inverse"],
                 [*TINY, "--out", out + "3", "--learn-inverse", "--arch", "glow", "--init", out]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            flow.main(argv)
        assert stop.value.code == 2 and "--learn-inverse" in tiny.error_line(capsys.readouterr().err)


def test_the_learned_inverse_wants_images_of_the_size_of_init(digits, tmp_path, capsys, monkeypatch):
    """Else positions would not fit, and the flow that is inverted would have some that nobody trained."""
    flow.main([*TINY, "--out", str(tmp_path / "base")])
    loaded = flow.load_data("digits", None)
    data = loaded._replace(train=loaded.train[..., :4], test=loaded.test[..., :4])
    monkeypatch.setattr(flow, "load_data", lambda *args: data)
    with pytest.raises(SystemExit) as stop:
        flow.main([*TINY, "--learn-inverse", "--init", str(tmp_path / "base"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "another shape" in tiny.error_line(capsys.readouterr().err)


# ---- samples


@pytest.mark.parametrize("temperature", [0.5, 0.3])
@every_kind
def test_the_temperature_is_a_factor_on_the_noise(kind, temperature):
    model, cfg = build(kind)
    eps, y = [torch.randn(3, *shape, dtype=torch.float64) for shape in model.f.noise_shapes], torch.arange(3)
    cold, _ = sample(model, eps, y, dataclasses.replace(cfg, temperature=temperature))
    with torch.no_grad():
        assert_close(cold, model.f.inverse([temperature * e for e in eps], y, "cached")[0])
    assert not torch.allclose(cold, sample(model, eps, y, cfg)[0])


# ---- likelihood


def test_each_term_of_the_bound():
    """Density, the width of a level and the learned noise: one factor each, worked out on their own."""
    model, cfg = build("affine", dequantize="variational")
    v, y = batch(3, (1, 4, 4))
    log_q = torch.randn(3, dtype=torch.float64)
    eps, log_det = model.f(v, y)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    density = normal.log_prob(flat(eps)).sum(1) + log_det
    assert_close(log_density(model, v, y), density)
    assert_close(log_likelihood(model, v, log_q, y), density - 16 * math.log(128) - log_q)


def test_evaluation_takes_the_noise_of_training():
    """The learned noise counts with its density: 5 images in one batch, by the same draws."""
    model, cfg = build("affine", dequantize="variational")
    images, model = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8), model.float()
    found = flow.evaluate(model, images, 3, cfg, "cpu")
    torch.manual_seed(cfg.seed)
    v, log_q = dequantize(model, images, torch.Generator().manual_seed(cfg.seed))
    logs = torch.stack([log_likelihood(model, v, log_q, torch.full((5,), label)).double() for label in range(3)])
    assert_close(found, -logs.exp().mean(0).log() / 16 / math.log(2), rtol=1e-5, atol=1e-5)
    plain, _ = dequantize(model, images, torch.Generator().manual_seed(cfg.seed))
    without = torch.stack([log_likelihood(model, plain, 0, torch.full((5,), label)).double() for label in range(3)])
    assert ((found + without.exp().mean(0).log() / 16 / math.log(2)).abs() > 1e-3).all()


@every_kind
def test_uniform_data_has_eight_bits(kind):
    """Under a uniform density, here that of a flow replaced by one, 8-bit data has exactly 8 bits/dim."""
    model, cfg = build(kind)

    class Uniform(nn.Module):
        def forward(self, v, y):  # density 1/2 a dimension on [-1,1]
            return [v * 0], torch.full((len(v),), v[0].numel() * (math.log(0.5) + 0.5 * math.log(2 * math.pi)), dtype=v.dtype)

    model.f = Uniform()
    x, y = torch.randint(0, 256, (6, 1, 4, 4)), torch.zeros(6, dtype=torch.long)
    v, log_q = dequantize(model, x)
    assert v.min() >= -1 and v.max() <= 1
    assert_close(log_likelihood(model, v.double(), log_q, y), torch.full((6,), -16 * math.log(256), dtype=torch.float64))


def test_a_known_gaussian_has_its_known_bits():
    """v ~ N(0, s^2): bits = entropy of that density in units of a level, 128 a unit of v."""
    s = 0.2

    class Known(nn.Module):
        def forward(self, v, y):
            return [v / s], v.new_full((len(v),), -v[0].numel() * math.log(s))

    model = nn.Module()
    model.f = Known()
    torch.manual_seed(0)
    v = s * torch.randn(20_000, 1, 2, 2, dtype=torch.float64)
    bits = -log_likelihood(model, v, 0, torch.zeros(20_000, dtype=torch.long)) / 4 / math.log(2)
    want = math.log2(128 * s * math.sqrt(2 * math.pi * math.e))
    assert bits.mean().item() == pytest.approx(want, abs=4 * (bits.std() / len(bits) ** 0.5).item())


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_dequantised_levels_stay_in_their_bins(kind):
    """Every level comes back, whatever the noise was; that fills the bins and leaves nothing of them out."""
    model, _ = build("affine", dequantize=kind, std=0.1)
    x = torch.arange(256).repeat(20).view(20, 1, 16, 16)
    torch.manual_seed(0)
    v, log_q = dequantize(model, x.double())
    u = (v.double() + 1) * 128 - x
    assert 0 <= u.min() < 0.05 and 0.95 < u.max() < 1
    assert torch.equal(flow.quantize(v), x.byte())
    assert torch.equal(log_q == 0, torch.full((20,), kind == "uniform"))
    again, _ = dequantize(model, x.double())
    assert not torch.equal(v, again)
    if kind == "variational":  # the network sees levels as images in [-1,1]
        seen = []
        model.dequantizer.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
        dequantize(model, x.double())
        assert_close(seen[0], x / 127.5 - 1, check_dtype=False)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (3, 3, 5)])
def test_the_learned_noise_is_a_density(shape):
    """log q(u | x) against autograd: that of the Gaussian noise less log |det du/dnoise|."""
    model, cfg = build("affine", shape, dequantize="variational", std=0.1)
    net, x = model.dequantizer, torch.rand(1, *shape, dtype=torch.float64) * 2 - 1
    noise = torch.randn(1, *shape, dtype=torch.float64)
    original = torch.randn_like
    try:
        def u_of(n):
            torch.randn_like = lambda _: n
            return net(x)
        u, log_q = u_of(noise)
        J = torch.autograd.functional.jacobian(lambda n: u_of(n)[0].flatten(), noise).view(noise.numel(), -1)
    finally:
        torch.randn_like = original
    assert_close(log_q[0], (log_normal([noise]) - torch.linalg.slogdet(J)[1])[0])
    assert u.min() > 0 and u.max() < 1
    assert (u != torch.sigmoid(noise)).all()  # each pixel is transformed, of both colours of the chessboard


def test_the_learned_noise_depends_on_the_image():
    """From the same normal noise another image has other noise, in each pixel."""
    model, _ = build("affine", dequantize="variational")
    noise = []
    for x in torch.rand(2, 3, 1, 4, 4, dtype=torch.float64):
        torch.manual_seed(1)
        noise.append(model.dequantizer(x)[0])
    assert (noise[0] != noise[1]).all()


def test_labels_matter_and_their_mean_is_the_likelihood(monkeypatch):
    """p(x) = sum_y p(x | y) / 3, on a split whose last batch is a short one."""
    monkeypatch.setattr(flow, "at_once", lambda shape: 3)
    model, cfg = build("tarflow", std=0.4)
    model.float()
    images = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8)

    whole = flow.evaluate(model, images, 3, cfg, "cpu")
    generator = torch.Generator().manual_seed(cfg.seed)
    v = torch.cat([dequantize(model, part, generator)[0] for part in images.split(3)])
    with torch.no_grad():
        logs = torch.stack([log_likelihood(model, v, 0, torch.full((7,), label)).double() for label in range(3)])
    assert logs.std(0).min() > 1e-3
    assert_close(whole, -(logs.exp().mean(0).log()) / 16 / math.log(2), rtol=1e-5, atol=1e-5)


# ---- the script

TINY = [*tiny.TINY["flow"].split(), *"--steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 3".split()]


@pytest.fixture()
def digits(monkeypatch):
    return tiny.small_digits(flow, monkeypatch)


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("flags, said", [
    ("", "one draw of uniform noise; all 8 test images, the mean of p(x | y) over the classes)"),
    ("--dequantize variational --no-labels --eval-images 5", "one draw of variational noise; the first 5 of 8 test images)")])
def test_what_kind_of_figure_it_is_is_told(flags, said, digits, tmp_path, capsys):
    flow.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run"), *flags.split()])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("test bits/dim"))
    assert line.endswith(said) and f"{final(tmp_path / 'run')['test_bpd']:.4f} (upper bound, " in line


@pytest.mark.parametrize("flags", [
    "--arch glow", "--arch glow --coupling additive --recompute", "--arch glow --steps-per-scale 2",
    "--arch glow --scales 1 --no-labels --dequantize variational", "--inverse jacobi --label 2", "--patch 4",
    "--arch glow --recompute --amp bf16", "--temperature 0.5", "--no-labels --minutes 0.02", "--kernels torch --layers 1"])
def test_every_option_runs(digits, tmp_path, flags):
    out = tmp_path / "run"
    flow.main([*TINY, "--out", str(out), *flags.split()])
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "samples.npz"}
    assert names <= {p.name for p in out.iterdir()}
    likelihoods = np.load(out / "likelihoods.npz")
    assert likelihoods.files == ["test"]
    assert likelihoods["test"].shape == (8,)  # there are 8 test images
    assert likelihoods["test"].mean() == pytest.approx(final(out)["test_bpd"])
    found = np.load(out / "samples.npz")["images"]
    assert found.shape[0] == 4 and found.dtype == np.uint8
    assert math.isfinite(final(out)["test_bpd"])


@every_kind
def test_temperature_is_the_scale_of_the_noise(kind):
    """What is sampled at 0.5 has half of the given noise, by the flow's other direction."""
    model, cfg = build(kind)
    eps, y = [torch.randn(3, *shape, dtype=torch.float64) for shape in model.f.noise_shapes], torch.arange(3)
    images, _ = sample(model, eps, y, dataclasses.replace(cfg, temperature=0.5))
    with torch.no_grad():
        assert_close(flat(model.f(images, y)[0]), 0.5 * flat(eps), rtol=1e-6, atol=1e-6)


def test_the_noise_of_training_is_uniform(digits, tmp_path, monkeypatch):
    """It fills the width of a level, and is other in each step and not of the image."""
    seen, inside = [], flow.log_likelihood
    x, y = digits.train[:200], digits.train_labels[:200]

    def watch(model, v, log_q, y):
        if model.training:
            seen.append((v + 1) * 128 - x)
        return inside(model, v, log_q, y)

    monkeypatch.setattr(flow, "log_likelihood", watch)
    monkeypatch.setattr(flow.Run, "batch", lambda run, data: (x, y))
    flow.main([*TINY, *"--steps 2 --save-every 100 --coupling affine --out".split(), str(tmp_path / "run")])
    first, second = (r.flatten() for r in seen)
    assert first.min() >= 0 and first.max() <= 1
    assert first.mean().item() == pytest.approx(1 / 2, rel=0.03)
    assert first.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.03)
    for other in (second, x.flatten().float()):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1].item()) < 5 / len(first) ** 0.5


@pytest.mark.parametrize("arch", ["tarflow", "glow"])
def test_temperature_on_the_command_line(arch, digits, tmp_path):
    out = tmp_path / "run"
    flow.main([*TINY, "--out", str(out), "--arch", arch])
    at_one = np.load(out / "samples.npz")["images"]
    flow.main(["--mode", "sample", "--num-samples", "4", "--out", str(out), "--temperature", "0.5"])
    at_half = np.load(out / "sampled" / "samples.npz")["images"]
    model, cfg = flow.load(out)
    halves = [e / 2 for e in flow.draw_noise(model, 4, torch.Generator().manual_seed(cfg.seed))]
    want, _ = model.f.inverse(halves, torch.arange(4), "cached")
    assert (flow.quantize(want).permute(0, 2, 3, 1).numpy() == at_half).all()
    assert (at_half != at_one).mean() > 0.5


def test_temperature_nought_gives_one_image_a_class(digits, tmp_path):
    flow.main([*TINY, "--out", str(tmp_path / "run"), "--temperature", "0", "--label", "1"])
    images = np.load(tmp_path / "run" / "samples.npz")["images"]
    assert (images == images[0]).all()


@pytest.mark.parametrize("flags", ["--dequantize variational", "--arch glow --temperature 0.7 --label 2",
                                   "--inverse jacobi --no-labels"])
def test_a_checkpoint_in_three_lines(digits, tmp_path, flags):
    """load gives the averaged network: from the same noise, sample gives the images that the run wrote."""
    out = tmp_path / "run"
    flow.main([*TINY, "--out", str(out), *flags.split()])
    written = np.load(out / "samples.npz")["images"]
    flow.main(["--mode", "sample", "--num-samples", "4", "--out", str(out)])
    assert (np.load(out / "sampled" / "samples.npz")["images"] == written).all()

    model, cfg = flow.load(out)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert cfg.width == 8 and cfg.dequantize == ("variational" if "variational" in flags else "uniform")
    y = torch.full((4,), 2) if "--label" in flags else torch.arange(4)
    if "--no-labels" in flags:
        y = torch.zeros(4, dtype=torch.long)
    images, _ = sample(model, flow.draw_noise(model, 4, torch.Generator().manual_seed(cfg.seed)), y, cfg)
    assert (flow.quantize(images).permute(0, 2, 3, 1).numpy() == written).all()


def test_choose_halves_while_both_sides_are_even():
    """Three times at most, once at least where there is more than one row and column; a number that is given holds."""
    for (H, W), want in {(28, 28): 2, (8, 8): 3, (64, 32): 3, (6, 4): 1, (5, 7): 1, (1, 8): 0, (12, 16): 2}.items():
        assert flow.choose(Config(arch="glow"), H, W).scales == want
    assert flow.choose(Config(arch="glow", scales=1), 8, 8).scales == 1


def test_choose_takes_the_largest_patch_that_fits():
    """Of at most 2 pixels below 16, else of at most 4; and the width of the architecture, where none is given."""
    for (H, W), patch in {(8, 8): 2, (7, 5): 1, (14, 30): 2, (16, 16): 4, (18, 36): 3, (28, 28): 4}.items():
        assert flow.choose(Config(), H, W).patch == patch
    assert [flow.choose(Config(arch=arch), 8, 8).width for arch in ("glow", "tarflow")] == [64, 128]
    assert flow.choose(Config(arch="glow", width=12), 8, 8).width == 12


@pytest.fixture()
def lone(monkeypatch):
    """flow.py without the folder kernels/: the lines under `except ImportError` take the operations' place."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in [n for n in sys.modules if n.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("lone", flow.__file__)
    monkeypatch.setitem(sys.modules, "lone", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_a_lone_copy_computes_the_same(lone):
    assert lone.affine_coupling.__module__ == lone.spline_coupling.__module__ == lone.decode_attention.__module__ == "lone"
    for kind in KINDS:
        model, cfg = build(kind, (1, 5, 6), std=0.3)
        copy = lone.Flow(1, 5, 6, 3, cfg).double().eval()
        copy.load_state_dict(model.state_dict())
        x, y = batch(4, (1, 5, 6), 2.0)
        assert_close(lone.log_density(copy, x, y), log_density(model, x, y))
        eps = model.f(x, y)[0]
        assert_close(lone.sample(copy, eps, y, cfg)[0], sample(model, eps, y, cfg)[0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            amp = [f(m.float(), x.float(), y) for f, m in ((lone.log_density, copy), (log_density, model))]
        assert_close(*amp, rtol=0, atol=0.01)
    for reverse in (False, True):  # near the end of a spline, in float32, for bins and slopes of all sizes
        x, params = 1 - torch.rand(1024, 1, 1, 1) / 128, 10 * torch.randn(1024, 23, 1, 1)
        y, log_det = lone.spline_coupling(x, params, 1.0, reverse)
        want, log_slope = lone.spline_coupling(x.double(), params.double(), 1.0, reverse)
        assert log_det.isfinite().all()  # and the error is that of rounding places, times the slope there
        assert ((y - want).abs().flatten() <= 2e-6 * (1 + log_slope.exp())).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_gradients_of_a_spline_at_its_bound_and_far_beyond(T, reverse, lone):
    """The plain lines, in float32. From the bound T to 10 T the spline is the identity, whatever params are: y' = 1, and
    nothing is asked of params. Just inside, d log y' / dx is that of eq. 5 in the outermost bin, at its outer end."""
    inside = torch.tensor([T, -T]).nextafter(torch.zeros(2)).repeat(32)  # each place is a sample of its own
    x = torch.cat([inside, torch.tensor([T, -T, 10 * T, -10 * T])])[:, None].requires_grad_()
    params = torch.randn(len(x), 23, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, log_det = lone.spline_coupling(x, params, T, reverse)
    y_x, y_p = torch.autograd.grad(y.sum(), (x, params), retain_graph=True)
    l_x, l_p = torch.autograd.grad(log_det.sum(), (x, params))
    assert torch.equal(y[64:], x[64:]) and (log_det[64:] == 0).all()
    assert (y_x[64:] == 1).all() and (l_x[64:] == 0).all() and (y_p[64:] == 0).all() and (l_p[64:] == 0).all()
    assert_close(y[:64], x[:64], rtol=1e-6, atol=0)
    for got, at_the_end in ((log_det, 0.0), (y_x, 1.0), (y_p, 0.0), (l_p, 0.0)):
        assert_close(got, torch.full_like(got, at_the_end), rtol=0, atol=1e-3)

    raw = params[:64].detach().double()
    w, h = (2 * T * (1e-5 + (1 - 8e-5) * torch.softmax(raw[:, :16].unflatten(1, (2, 8)), 2))).unbind(1)
    end = torch.tensor([7, 0]).repeat(32)[:, None]  # the outermost bins, in turn, and the slopes at their inner ends
    w, h = w.gather(1, end), h.gather(1, end)
    inner = 1e-5 + torch.log1p(torch.exp(raw[:, 16:].gather(1, (end - 1).clamp(min=0))))
    # at w t inwards log y' = log(s^2 M / D^2), where M is 1 + (2 s - 2) t and D is s + (1 + inner - 2 s) t to first order
    s = h / w
    inwards = ((2 * s - 2) - 2 * (1 + inner - 2 * s) / s) / w
    want = -inwards * inside.sign()[:, None] * (-1 if reverse else 1)
    assert_close(l_x[:64].double(), want, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("flags", ["--patch 3", "--scales 4 --arch glow", "--label 10", "--n-head 3", "--temperature -1",
                                   "--compare mnist"])
def test_bad_flags_are_one_line(flags, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        flow.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert flags.split()[0] in line


@pytest.mark.parametrize("flags, bar", [
    ("--steps 60 --width 32 --warmup 20", 6.0), ("--steps 100 --width 32 --warmup 20 --arch glow --coupling affine "
     "--steps-per-scale 2 --lr 0.01", 7.1), ("--steps 120 --arch glow --coupling spline", 6.5)])  # 5.1, 6.7
def test_a_short_training_learns_digits(flags, bar, tmp_path):
    """Bits/dim of 100 test images; noise has 8, an untrained flow 8.4."""
    out = tmp_path / "run"
    flow.main([*"--eval-images 100 --num-samples 1 --out".split(), str(out), *flags.split()])
    assert final(out)["test_bpd"] < bar


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_against_depth(recompute):
    """Bytes kept for the backward pass, in proportion to the depth: of a step all activations, or what goes in."""
    def kept(steps):
        model, cfg = build("affine", (1, 8, 8), steps_per_scale=steps, recompute=recompute, width=16)
        model.train()
        x, y, sizes = *batch(4, (1, 8, 8)), {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            density = log_density(model, x, y)
        density.mean().backward()
        return sum(sizes.values())

    two, eight = kept(2), kept(8)
    if recompute:  # images of 8 x 8 numbers of 8 bytes, of which half have left after the first of three scales
        per_step = 4 * 8 * (64 + 32 + 16)
        assert 6 * per_step <= eight - two <= 6 * per_step * 1.1
    else:
        assert eight > 3 * two
