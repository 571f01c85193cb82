"""The mathematics of vae.py: bounds against closed forms, densities that integrate to one, a chain that is Markov."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.testing import assert_close

import tiny
import vae
from vae import VAE, Config, Level, elbo_terms, gaussian_kl, infer, iw_bound, log_normal, log_prior, log_prob, log_weights

KINDS = {"plain": {}, "flow": {"prior": "flow"}, "vamp": {"prior": "vamp"}, "iaf": {"posterior": "iaf"},
         "levels": {"levels": 3}, "all": {"prior": "flow", "posterior": "iaf", "levels": 2},
         "vamp and iaf": {"prior": "vamp", "posterior": "iaf", "levels": 2}}
SMALL = {"width": 8, "blocks": 1, "flow_hidden": 12, "z_dim": 3, "z_channels": 2, "patch": 2, "flow_steps": 2,
         "pseudo_inputs": 5, "mixtures": 2, "likelihood": "bernoulli"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind="plain", shape=(1, 6, 6), std=0.2, **fields):
    """A small model in float64 whose weights are all random, and its Config."""
    cfg = Config(**SMALL | KINDS[kind] | fields)
    torch.manual_seed(0)
    model = VAE(*shape, cfg).double().eval()
    for name, p in model.named_parameters():
        if name != "pseudo":
            nn.init.normal_(p, std=std)
    return model, cfg


def images(n, shape=(1, 6, 6), max_level=1):
    return torch.randint(0, max_level + 1, (n, *shape))


def seeded(function, *args, seed=7, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


# ---- the parts of the bound, against torch.distributions


def test_kl_and_density_of_gaussians():
    mu, logvar, mu_p, logvar_p, z = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)
    q, p = (D.Independent(D.Normal(m, torch.exp(v / 2)), 3) for m, v in ((mu, logvar), (mu_p, logvar_p)))
    assert_close(gaussian_kl(mu, logvar, mu_p, logvar_p), D.kl_divergence(q, p))
    assert_close(log_normal(z, mu, logvar), q.log_prob(z))
    assert_close(gaussian_kl(mu, logvar, mu, logvar), torch.zeros(4, dtype=torch.float64))


def test_bernoulli_pixels():
    params, x = torch.randn(3, 2, 1, 4, 5, dtype=torch.float64), images(3, (2, 4, 5))
    assert_close(log_prob(params, x, "bernoulli"), D.Bernoulli(logits=params[:, :, 0]).log_prob(x.double()).sum((1, 2, 3)))


def test_a_mixture_pixel_sums_to_one():
    """Over its 256 levels, for extreme parameters too; and the channels are independent given z."""
    params = torch.randn(1, 1, 6, 1, 7, dtype=torch.float64) * torch.logspace(-2, 2, 7, dtype=torch.float64)
    for column in params.unbind(4):
        x = torch.arange(256).view(-1, 1, 1, 1)
        total = log_prob(column[..., None].expand(256, -1, -1, -1, -1), x, "mixture").exp().sum()
        assert_close(total, torch.ones((), dtype=torch.float64))
    params, x = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64), images(2, (3, 4, 5), 255)
    alone = sum(log_prob(params[:, c:c + 1], x[:, c:c + 1], "mixture") for c in range(3))
    assert_close(log_prob(params, x, "mixture"), alone)


@pytest.mark.parametrize("std, wide", [(0.3, -7), (0.3, -2), (1, 0), (3, 0)])
def test_the_mean_of_a_pixel(std, wide):
    """Against the sum over all levels, for scales so wide that much lies beyond the ends too."""
    params = torch.randn(2, 1, 6, 3, 3, dtype=torch.float64) * std
    params[:, :, 4:] += wide
    x = torch.arange(256).view(-1, 1, 1, 1)
    for b, i, j in ((0, 0, 0), (1, 2, 1)):
        p = log_prob(params[b:b + 1, :, :, i:i + 1, j:j + 1].expand(256, -1, -1, -1, -1), x, "mixture").exp()
        want = (p * torch.arange(256) / 255).sum().item()
        assert (vae.pixel_mean(params, "mixture")[b, 0, i, j].item() + 1) / 2 == pytest.approx(want, abs=1e-3)
    assert_close(vae.pixel_mean(params[:, :, :1], "bernoulli"), 2 * D.Bernoulli(logits=params[:, :, 0]).mean - 1)


def test_the_mean_of_a_pixel_that_is_certain():
    """Logistics far narrower than a level, whose scale float32 rounds to nought, have the mean of their means."""
    params = torch.tensor([0.0, 1.0, -0.5, 0.5, -200.0, -300.0]).view(1, 1, 6, 1, 1)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert vae.pixel_mean(params, "mixture").item() == pytest.approx((-0.5 * p[0] + 0.5 * p[1]).item(), abs=1e-5)


# ---- the bound


@every_kind
def test_the_elbo_is_its_terms(kind):
    """log p(x | z_1) less the sum of the levels' KLs, each a number an image; the loss is its mean over the batch."""
    model, cfg = build(kind)
    x = images(4)
    log_px, kls = seeded(elbo_terms, model, x, cfg)
    params, draws = seeded(infer, model, model.encode(vae.scale(model, x)))
    assert log_px.shape == (4,) and kls.shape == (cfg.levels, 4)
    assert_close(log_px, log_prob(params, x, cfg.likelihood))
    assert_close(kls.sum(0), sum(d.kl for d in draws))
    assert_close(seeded(vae.loss, model, x, cfg)[0], (kls.sum(0) - log_px).mean())
    assert_close(seeded(vae.loss, model, x, cfg, 0.25)[0], (0.25 * kls.sum(0) - log_px).mean())


@every_kind
def test_one_importance_sample_is_the_elbo(kind):
    """In expectation where a KL is in closed form, exactly where it is by Monte Carlo with the same z."""
    model, cfg = build(kind)
    x = images(2)
    if cfg.levels == 1 and kind != "plain":
        log_px, kls = seeded(elbo_terms, model, x, cfg)
        assert_close(iw_bound(seeded(log_weights, model, x, 1, cfg), 1), log_px - kls.sum(0))
    n = 10_000 if cfg.levels > 2 else 4_000
    with torch.no_grad():
        log_px, kls = elbo_terms(model, x.repeat_interleave(n, 0), cfg)
        a, b = (log_px - kls.sum(0)).view(2, -1), log_weights(model, x, n, cfg)
    error = ((a.var(1) + b.var(1)) / n).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 5 * error).all() and (error < 0.1).all()


def test_the_importance_weighted_bound_against_a_loop():
    log_w = torch.randn(3, 12, dtype=torch.float64) * 3
    for k in (1, 2, 3, 5, 12):
        groups = [log_w[:, i * k:(i + 1) * k] for i in range(12 // k)]
        want = torch.stack([g.exp().mean(1).log() for g in groups]).mean(0)
        assert_close(iw_bound(log_w, k), want)
    rising = torch.stack([iw_bound(log_w, k) for k in (1, 2, 4, 12)])
    assert (rising.diff(dim=0) >= 0).all()


def test_the_bound_rises_with_k_to_the_evidence():
    """A model of one binary pixel and a z on a line: the evidence by quadrature."""
    model, cfg = build("plain", (1, 1, 1), std=0.5, z_dim=1, patch=1)
    x = images(1, (1, 1, 1))
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    joint = log_prob(model.decode(grid), x.expand(4001, -1, -1, -1), "bernoulli") + log_prior(model, grid)
    evidence = (joint.exp().sum() * (grid[1] - grid[0])).log()
    log_w = log_weights(model, x, 100_000, cfg)
    bounds = [iw_bound(log_w, k).item() for k in (1, 10, 100, 10_000)]
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(evidence.item(), abs=5e-3)


class Linear(nn.Module):
    """x = W z + noise, W with orthogonal columns so that the posterior is a diagonal Gaussian, of which it is given."""

    lower_levels, flow, iaf, pseudo, max_level = (), (), (), None, 1

    def __init__(self, x_dim=6, z_dim=2, noise=0.5):
        super().__init__()
        self.noise, self.z_dim = noise, z_dim
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(x_dim, z_dim, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7]))
        self.stem, self.down = nn.Linear(1, 1).double(), [None]
        precision = 1 + self.W.detach().square().sum(0) / noise**2
        self.q, self.logvar = nn.Parameter(self.W.detach().T / noise**2 / precision[:, None]), nn.Parameter(-precision.log())

    def encode(self, x):
        return [(x + 1) / 2]  # what scale did

    def top(self, e):
        mu = e.flatten(1) @ self.q.T
        return mu, self.logvar.expand_as(mu), None

    def decode(self, z):
        return (z @ self.W.T).view(len(z), 1, 1, 1, -1)

    def evidence(self, x):
        covariance = self.W @ self.W.T + self.noise**2 * torch.eye(len(self.W), dtype=torch.float64)
        return D.MultivariateNormal(torch.zeros(len(self.W), dtype=torch.float64), covariance).log_prob(x.flatten(1))


@pytest.fixture
def gaussian_pixels(monkeypatch):
    def log_p(params, x, noise):
        return D.Normal(params[:, :, 0], noise).log_prob(x).sum((1, 2, 3))

    monkeypatch.setattr(vae, "log_prob", log_p)


def test_linear_gaussian_with_the_true_posterior(gaussian_pixels):
    """Every single weight is the evidence."""
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(5, 1, 1, 6, dtype=torch.float64)
    log_w = log_weights(model, x, 7, SimpleNamespace(likelihood=model.noise))
    assert_close(log_w, model.evidence(x)[:, None].expand(-1, 7))


def test_the_gradient_of_the_posterior(gaussian_pixels):
    """At the true posterior it is zero for every draw, and elsewhere on average that of the KL in closed form."""
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(3, 1, 1, 6, dtype=torch.float64)
    cfg = SimpleNamespace(likelihood=model.noise, free_nats=0.0)
    inside = [model.q, model.logvar]

    def gradient(flow, x):
        model.flow = flow
        value, _, _ = vae.loss(model, x, cfg)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, inside)])

    identity = (lambda z: (z, z.new_zeros(len(z))),)  # a learned prior, so no KL in closed form
    assert gradient(identity, x).abs().max() < 1e-12
    with torch.no_grad():
        model.q += 0.1
        model.logvar += 0.5
    many = x.repeat(20_000, 1, 1, 1)
    want = gradient((), many)
    assert (gradient(identity, many) - want).norm() < 0.1 * want.norm()


def test_linear_gaussian_trained_reaches_the_evidence(gaussian_pixels):
    """From a wrong posterior, by the script's own loss."""
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(64, 1, 1, 6, dtype=torch.float64)
    nn.init.normal_(model.q)
    nn.init.zeros_(model.logvar)
    cfg = SimpleNamespace(likelihood=model.noise, free_nats=0.0)
    optimizer = torch.optim.Adam([model.q, model.logvar], 0.02)
    gap = []
    for step in range(1500):
        value, log_px, kls = vae.loss(model, x, cfg)
        gap.append((model.evidence(x) - log_px + kls.sum(0)).mean().item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
    assert gap[0] > 1 and abs(np.mean(gap[-50:])) < 0.02


def test_two_linear_gaussian_levels(gaussian_pixels):
    """z_2 ~ N(0, 1), z_1 ~ N(A z_2, s^2), x ~ N(B z_1, noise^2): the bound comes down to the evidence in closed form."""
    torch.manual_seed(0)
    d, s, noise = 2, 0.8, 0.6
    A, B = torch.randn(2, d, d, dtype=torch.float64)
    level = Level(2 * d, d).double()
    for p in level.parameters():
        nn.init.normal_(p, std=0.1)  # whatever q is
    eye = torch.eye(d, dtype=torch.float64)
    with torch.no_grad():
        level.p.weight.zero_()
        level.p.weight[:d, :, 0, 0] = torch.cat([eye, -eye], 1)  # h is the positive and the negative part of A z_2
        level.p.bias.copy_(torch.tensor([0.0] * d + [6 * math.atanh(2 * math.log(s) / 6)] * d))

    class Two(Linear):
        lower_levels = (level,)

        def encode(self, x):
            return [x[:, :, 0, :1].expand(-1, 2 * d, -1)[..., None], (x + 1) / 2]

        def decode(self, z):
            return (z.flatten(1) @ B.T).view(len(z), 1, 1, 1, d)

    model = Two(d, d, noise)
    nn.init.zeros_(model.q)  # q(z_2 | x) is as wide as the prior
    nn.init.zeros_(model.logvar)
    model.down = [None, lambda z: torch.relu(torch.cat([z @ A.T, -z @ A.T], 1))[:, :, None, None]]
    x = torch.randn(3, 1, 1, d, dtype=torch.float64)
    log_w = log_weights(model, x, 200_000, SimpleNamespace(likelihood=noise))
    covariance = B @ (A @ A.T + s**2 * eye) @ B.T + noise**2 * eye
    want = D.MultivariateNormal(torch.zeros(d, dtype=torch.float64), covariance).log_prob(x.flatten(1))
    assert_close(iw_bound(log_w, 200_000), want, atol=0.02, rtol=0)
    assert (iw_bound(log_w, 1) < want - 0.05).all()


# ---- the chain


def test_each_level_sees_the_one_above_alone():
    """Every level's log p, and p(x | z_1), computed anew from the level above and nothing else."""
    model, cfg = build("levels")
    x = images(3)
    params, (top, middle, bottom) = infer(model, model.encode(vae.scale(model, x)))
    assert_close(top.log_p, log_normal(top.z, torch.zeros_like(top.z), torch.zeros_like(top.z)))
    for i, above, draw in ((1, top, middle), (0, middle, bottom)):
        level, down = model.lower_levels[i], model.down[i + 1]
        assert_close(draw.log_p, log_normal(draw.z, *level.prior(down(above.z))))
    assert_close(params, model.decode(bottom.z))


def test_a_posterior_hears_the_level_above_and_its_own_part_of_the_image(monkeypatch):
    """z_l hears z_l+1 and e_l, of which z_l+1 has heard e_l+1 ..., and no e below. Without noise the shift, which counts active
    units, is how far z_l lies from the mean of its prior, in deviations of that."""
    model, _ = build("levels")
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu)
    e = [part.detach().requires_grad_() for part in model.encode(vae.scale(model, images(3)))]
    _, draws = infer(model, e)
    for level, draw in zip((3, 2, 1), draws, strict=True):
        heard = torch.autograd.grad(draw.shift.square().sum(), e, retain_graph=True, allow_unused=True)
        assert [g is not None and (g != 0).any().item() for g in heard] == [i >= level for i in (1, 2, 3)]
    for i, above, draw in ((1, draws[0], draws[1]), (0, draws[1], draws[2])):
        mu, logvar = model.lower_levels[i].prior(model.down[i + 1](above.z))
        assert_close(draw.shift, (draw.z - mu) * torch.exp(-logvar / 2))


def test_generation_is_that_chain(monkeypatch):
    """With the noise taken away, descend walks the means of the priors."""
    model, cfg = build("levels")
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu)
    z3 = torch.randn(4, 3, dtype=torch.float64)
    z2 = model.lower_levels[1].prior(model.down[2](z3))[0]
    z1 = model.lower_levels[0].prior(model.down[1](z2))[0]
    assert_close(vae.descend(model, z3), model.decode(z1))


def test_a_posterior_without_a_correction_is_the_prior():
    model, _ = build("levels")
    level, h, e = model.lower_levels[0], *torch.randn(2, 2, 8, 3, 3, dtype=torch.float64)
    nn.init.zeros_(level.q.weight)
    nn.init.zeros_(level.q.bias)
    p = level.prior(h)
    *q, shift = level.posterior(h, e, *p)
    for a, b in zip(p, q, strict=True):
        assert_close(a, b)
    assert (shift == 0).all()
    nn.init.normal_(level.q.weight)
    mu_q, _, shift = level.posterior(h, e, *p)
    assert_close(shift, (mu_q - p[0]) * torch.exp(-p[1] / 2))  # in standard deviations of the prior
    assert VAE(1, 6, 6, build("levels")[1]).lower_levels[0].q.weight.abs().max() == 0  # and so it begins


def test_log_variances_are_bounded():
    """By 6, of the top, of each prior and of each correction: weights however large give no exp that overflows."""
    model, _ = build("levels", std=1e4)
    level, h, e = model.lower_levels[0], *torch.randn(2, 2, 8, 3, 3, dtype=torch.float64)
    _, top, _ = model.top(model.encode(torch.randn(2, 1, 6, 6, dtype=torch.float64))[-1])
    mu, prior = level.prior(h)
    _, posterior, _ = level.posterior(h, e, mu, prior)
    for logvar in (top, prior, posterior - prior):
        assert logvar.abs().max() <= 6 and logvar.abs().median() > 5.99


def test_what_a_network_begins_as():
    """Pseudo-inputs differ, or the VampPrior would stay one Gaussian; a step of IAF is near the identity, but for the order."""
    _, cfg = build("vamp")
    pseudo = VAE(1, 6, 6, cfg).pseudo
    assert pseudo.min() >= 0 and pseudo.max() <= 1 and torch.pdist(pseudo.flatten(1)).min() > 0.5
    step, z, context = vae.IAFStep(3, 12, 5), torch.randn(4, 3), torch.randn(4, 5)
    assert ((step(z, context)[0] - z.flip(1)).abs() < 0.5 * (1 + z.flip(1).abs())).all()
    for p in step.parameters():
        nn.init.zeros_(p)
    moved, log_det = step(z, context)
    assert_close(moved, z.flip(1) / (1 + math.exp(-2)))
    assert_close(log_det, torch.full((4,), -3 * math.log(1 + math.exp(-2))))


@pytest.mark.parametrize("kind", ["flow", "iaf"])
def test_without_free_nats_the_loss_is_the_bound(kind):
    """Also where log q - log p of the draws at hand is negative, as it may be where the KL is near zero."""
    model, cfg = build(kind)
    nn.init.zeros_(model.to_top.weight)
    nn.init.zeros_(model.to_top.bias)  # q(z | x) is one Gaussian for all x
    values = [vae.loss(model, images(2), cfg) for _ in range(20)]
    assert any(kls.mean() < 0 for _, _, kls in values)
    for value, log_px, kls in values:
        assert_close(value, (kls.sum(0) - log_px).mean())


def test_mixed_precision_is_for_the_networks_alone():
    """Log-likelihoods and KLs are made in float32."""
    for kind in ("plain", "flow", "vamp", "iaf", "levels"):
        model, cfg = build(kind)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model, x = model.float(), images(2)
            params, draws = infer(model, model.encode(vae.scale(model, x)))
            made = [params, log_prob(params, x, cfg.likelihood), *(t for d in draws for t in d)]
            made += [t for step in model.iaf for t in step(draws[0].z, torch.zeros(2, cfg.flow_hidden))]
            assert {t.dtype for t in made} == {torch.float32}


def test_free_nats_cost_nothing():
    model, cfg = build("levels", free_nats=1e6)
    value, log_px, kls = vae.loss(model, images(4), cfg)
    assert_close(value, 3e6 - log_px.mean())
    grads = torch.autograd.grad(value, [model.lower_levels[0].q.weight, model.out.weight], allow_unused=True)
    assert grads[1].abs().sum() > 0


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_free_nats_between_the_levels(weight):
    """A level whose mean KL over the batch lies below them costs the free nats, one above costs its KL."""
    model, cfg = build("levels")
    x = images(6)
    log_px, kls = seeded(elbo_terms, model, x, cfg)
    low, middle, high = kls.mean(1).sort().values
    assert (kls.min(1).values < kls.max(1).values).all()
    for free in ((low + middle) / 2, (middle + high) / 2):
        cfg.free_nats = free.item()
        paid = sum(max(kl, free) for kl in kls.mean(1))
        assert_close(seeded(vae.loss, model, x, cfg, weight)[0], weight * paid - log_px.mean())


@pytest.mark.parametrize("prior", ["gaussian", "flow", "vamp"])
@pytest.mark.parametrize("temperature", [0.5, 0.3])
def test_temperature_is_a_factor_on_deviations(prior, temperature, monkeypatch):
    """Of noise before the flow prior, of each component of the VampPrior, and of the levels below the top."""
    model, cfg = build(prior=prior, levels=3)

    def noise_of(z):
        for step in model.flow:
            z, _ = step(z)
        return z

    model.float()  # as it samples
    cold, hot, mean = (noise_of(seeded(vae.sample_prior, model, 500, t)) for t in (temperature, 1.0, 0.0))
    assert_close(cold - mean, temperature * (hot - mean), rtol=1e-4, atol=1e-4)
    assert (hot - mean).std() > 0.1 and (mean.std() > 0.01) == (prior == "vamp")
    seen = []
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, t=1.0: seen.append(t) or mu)
    cfg.temperature = temperature
    vae.sample(model, 4, cfg)
    assert seen == [temperature] * (3 if prior == "vamp" else 2)  # the two levels below the top, and a component
    monkeypatch.undo()
    mu, logvar = torch.randn(2, 4000)
    drawn = seeded(vae.draw, mu, logvar, temperature)
    assert_close(drawn - mu, temperature * (seeded(vae.draw, mu, logvar) - mu))
    assert ((drawn - mu) / torch.exp(logvar / 2)).std().item() == pytest.approx(temperature, rel=0.05)


# ---- priors and posteriors


@pytest.mark.parametrize("prior", ["gaussian", "flow", "vamp"])
def test_the_prior_integrates_to_one(prior):
    model, _ = build(prior=prior, z_dim=2, std=0.3)
    line = torch.linspace(-9, 9, 901, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    p = log_prior(model, z).exp()
    assert (p.sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=1e-4)
    draws = vae.sample_prior(model.float(), 100_000).double()  # and what is drawn has the means and the spread of that density
    p = p / p.sum()
    mean = (p[:, None] * z).sum(0)
    assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
    assert_close(draws.T.cov(), (p[:, None, None] * (z - mean)[:, :, None] * (z - mean)[:, None]).sum(0), atol=0.04, rtol=0)


def test_vampprior_is_the_mixture_of_its_posteriors():
    model, _ = build("vamp")
    mu, logvar = vae.vamp_components(model)
    assert mu.shape == (5, 3)
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(5, dtype=torch.float64)),
                                  D.Independent(D.Normal(mu, torch.exp(logvar / 2)), 1))
    z = torch.randn(50, 3, dtype=torch.float64) * 2
    assert_close(log_prior(model, z), mixture.log_prob(z))
    x = 2 * model.pseudo.clamp(0, 1) - 1
    assert_close(mu, model.top(model.encode(x)[-1])[0])


def test_pseudo_inputs_are_seen_as_images():
    """However far training has moved their pixels, the encoder sees none below black and none above white."""
    model, _ = build("vamp")
    seen, encode = [], model.encode
    model.encode = lambda x: seen.append(x) or encode(x)
    far = torch.linspace(-1, 2, model.pseudo.numel(), dtype=torch.float64).view_as(model.pseudo)
    model.pseudo.data.copy_(far)
    vae.vamp_components(model)
    assert_close(seen[0].detach(), (2 * far - 1).clamp(-1, 1))


def jacobian(function, z):
    return torch.autograd.functional.jacobian(function, z)


@pytest.mark.parametrize("D_", [2, 3, 6])
def test_flow_prior_step(D_):
    model, _ = build("flow", z_dim=D_, std=0.5)
    for z in torch.randn(4, D_, dtype=torch.float64) * 3:
        for step in model.flow:
            u, log_det = step(z[None])
            assert_close(log_det[0], torch.linalg.slogdet(jacobian(lambda z, s=step: s(z[None])[0][0], z))[1])
            assert_close(step.inverse(u)[0], z)


@pytest.mark.parametrize("D_", [1, 2, 5])
def test_iaf_step(D_):
    """Triangular in the order in which it runs; log |det| by autograd."""
    model, _ = build("iaf", z_dim=D_, std=0.5)
    context = torch.randn(1, 12, dtype=torch.float64)
    for z in torch.randn(4, D_, dtype=torch.float64) * 2:
        for step in model.iaf:
            J = jacobian(lambda z, s=step: s(z[None], context)[0][0], z)
            assert_close(step(z[None], context)[1][0], torch.linalg.slogdet(J)[1])
            flipped = J.flip(1)
            assert_close(flipped, flipped.tril())
            heard = jacobian(lambda c, s=step, z=z: s(z[None], c)[0][0], context)[:, 0]
            assert (heard.abs().sum(1) > 0).all()  # every dimension hears what the encoder says


def test_iaf_is_told_what_the_encoder_says():
    """The context of z_L is the end of e_L: with another one and the same noise each dimension of z is another, and each step
    of the chain z_0, z_1 ... of IAF eq. 10 is that of this context."""
    model, _ = build("iaf")
    e = model.encode(vae.scale(model, images(4)))[-1].detach()
    other = e.clone()
    other[:, 2 * model.z_dim:] += 1
    a, b = (seeded(vae.draw_top, model, part) for part in (e, other))
    assert torch.equal(a.shift, b.shift) and (a.z != b.z).all()
    mu, logvar, context = model.top(e)
    z = seeded(vae.draw, mu, logvar)
    for step in model.iaf:
        z, _ = step(z, context)
    assert_close(a.z, z)


def test_iaf_posterior_is_a_density():
    """E_q[p(z) / q(z)] = 1 for any p that q covers, here a Gaussian of a third of its width."""
    model, cfg = build("iaf", z_dim=2, std=0.3)
    e = [a.expand(200_000, *a.shape[1:]) for a in model.encode(vae.scale(model, images(1)))]
    top = infer(model, e)[1][0]
    centre, logvar = top.z.mean(0), torch.log(top.z.var(0) / 9)
    ratio = (log_normal(top.z, centre.expand_as(top.z), logvar.expand_as(top.z)) - top.log_q).exp()
    assert ratio.std() < 10
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / len(ratio) ** 0.5)


# ---- sizes and the script


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (1, 28, 28), (3, 33, 49)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "mixture"])
def test_any_size(shape, likelihood):
    model, cfg = build("all", shape, likelihood=likelihood, patch=4)
    x = images(2, shape, model.max_level)
    log_px, kls = elbo_terms(model, x, cfg)
    assert log_px.isfinite().all() and kls.isfinite().all()
    z = vae.sample_prior(model.float(), 3)
    out = vae.pixel_mean(vae.descend(model, z), likelihood)
    assert out.shape == (3, *shape) and out.min() >= -1 and out.max() <= 1


def test_an_odd_size_is_a_whole_one_that_is_cropped():
    """5 x 7 in patches of 4: the encoder sees mid-grey on the right and below, and the decoder's pixels there are dropped."""
    (model, cfg), (whole, _) = (build("levels", shape, patch=4) for shape in ((2, 5, 7), (2, 8, 8)))
    whole.load_state_dict(model.state_dict())
    x = 2 * torch.rand(3, 2, 5, 7, dtype=torch.float64) - 1
    for a, b in zip(model.encode(x), whole.encode(nn.functional.pad(x, (0, 1, 0, 3))), strict=True):
        assert_close(a, b)
    z = torch.randn(3, cfg.z_channels, 2, 2, dtype=torch.float64)
    assert_close(model.decode(z), whole.decode(z)[..., :5, :7])


def test_what_is_chosen_by_size_and_levels():
    for side, patch in {8: 2, 15: 2, 16: 4, 28: 4}.items():
        assert vae.choose(Config(), side, side + 9).patch == patch
    assert [vae.choose(Config(levels=levels), 8, 8).blocks for levels in (1, 2, 3)] == [1, 2, 2]
    said = vae.choose(Config(patch=3, blocks=5), 8, 8)
    assert (said.patch, said.blocks) == (3, 5)


TINY = [*tiny.TINY["vae"].split(), *"--steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 3".split()]


@pytest.fixture()
def digits(monkeypatch):
    return tiny.small_digits(vae, monkeypatch)


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("flags", [
    "--prior flow", "--prior vamp", "--posterior iaf", "--levels 3 --free-nats 0.1", "--likelihood mixture --mixtures 2",
    "--prior vamp --posterior iaf --levels 2", "--beta 0.5", "--z-dim 2 --patch 4 --image-size 11",
    "--temperature 0.5 --blocks 2", "--amp bf16 --kernels torch", "--minutes 0.02 --kl-warmup 0"])
def test_every_option_runs(digits, tmp_path, flags):
    out = tmp_path / "run"
    vae.main([*TINY, "--out", str(out), *flags.split()])
    names = {"config.json", "metrics.jsonl", "samples.png", "checkpoint.pt", "samples.npz", "reconstructions.png",
             "reconstructions.npz", "interpolations.png"}
    assert names <= {p.name for p in out.iterdir()}
    assert (out / "manifold.png").exists() == ("--z-dim 2" in flags)
    found = np.load(out / "samples.npz")["images"]
    assert found.shape[0] == 4 and found.dtype == np.uint8
    assert all(math.isfinite(final(out)[f"test_{name}"]) for name in ("neg_elbo", "neg_iw_1", "neg_iw_2", "kl_1", "active_1"))


def test_what_is_printed_is_measured(digits, tmp_path, capsys, monkeypatch):
    """The test figures against the maths on the test split binarised with seed 0, with the draws taken away."""
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu)
    monkeypatch.setattr(vae, "at_once", lambda shape: 3)  # the last batch is a short one
    out = tmp_path / "run"
    vae.main([*TINY, *"--levels 2 --seed 5 --beta 0.5 --free-nats 3 --kl-warmup 0 --out".split(), str(out)])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    cfg = vae.choose(Config(**saved["config"]), 8, 8)
    model = VAE(1, 8, 8, cfg).eval()
    model.load_state_dict(saved["ema_model"])
    x = (torch.rand(digits.test.shape, generator=torch.Generator().manual_seed(0)) * 255 < digits.test).long()
    with torch.no_grad():
        log_px, kls = elbo_terms(model, x, cfg)
        found = final(out)
        assert found["test_neg_elbo"] == pytest.approx((kls.sum(0) - log_px).mean().item(), rel=1e-5)
        assert found["test_reconstruction"] == pytest.approx(-log_px.mean().item(), rel=1e-5)
        for level in (1, 2):
            assert found[f"test_kl_{level}"] == pytest.approx(kls[2 - level].mean().item(), abs=1e-5)
            shift = infer(model, model.encode(vae.scale(model, x)))[1][2 - level].shift.flatten(1)
            active = (shift.double().var(0, correction=0) > 0.01).double().mean().item()
            assert found[f"test_active_{level}"] == pytest.approx(active)
        assert found["test_bpd"] == pytest.approx(found["test_neg_iw_2"] / 64 / math.log(2))
        assert found["test_neg_iw_1"] == pytest.approx(-log_weights(model, x, 1, cfg).mean().item(), rel=1e-5)
        assert found["test_neg_iw_1"] == pytest.approx(found["test_neg_iw_2"], rel=1e-6)  # all draws are the same
    printed = capsys.readouterr().out
    assert f"{found['test_neg_iw_2']:.3f} nats" in printed and "k = 2" in printed and "8 test images" in printed


def test_each_step_binarises_anew(digits, tmp_path, monkeypatch):
    """Every step sees the same images here, and no two steps the same binary ones; their mean is that of the images."""
    seen, loss = [], vae.loss
    monkeypatch.setattr(vae, "loss", lambda model, x, *rest: seen.append(x) or loss(model, x, *rest))
    monkeypatch.setattr(vae.Run, "batch", lambda run, data: (data.train[:400], data.train_labels[:400]))
    vae.main([*TINY, "--out", str(tmp_path / "run")])
    assert len(seen) == 4 and not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert all(x.dtype == torch.int64 and set(x.unique().tolist()) == {0, 1} for x in seen)
    means, levels = torch.stack(seen).double().mean((0, 2, 3, 4)), digits.train[:400].double().mean((1, 2, 3)) / 255
    assert (means - levels).abs().max() < 0.15 and (means - levels).mean().abs() < 0.005


def test_the_bounds_are_of_all_importance_samples(digits, tmp_path, monkeypatch):
    """13 of them an image, drawn a few at a time: the bounds for 1, 10 and 13, on a split whose last batch is a short one."""
    drawn = {}

    def draw(model, x, k, cfg, e):
        log_w = 3 * torch.randn(len(x), k)
        drawn.setdefault(x.numpy().tobytes(), []).append(log_w.double())
        return log_w

    monkeypatch.setattr(vae, "log_weights", draw)
    monkeypatch.setattr(vae, "at_once", lambda shape: 3)
    out = tmp_path / "run"
    vae.main([*TINY, "--out", str(out), "--iw-samples", "13", "--save-every", "100"])
    log_w = torch.cat([torch.cat(parts, 1)[:, :13] for parts in drawn.values()])
    assert log_w.shape == (8, 13)
    for k in (1, 10, 13):
        groups = torch.stack([log_w[:, i:i + k].exp().mean(1).log() for i in range(0, 14 - k, k)])
        assert final(out)[f"test_neg_iw_{k}"] == pytest.approx(-groups.mean().item(), rel=1e-6)
    assert {name for name in final(out) if "neg_iw" in name} == {f"test_neg_iw_{k}" for k in (1, 10, 13)}


def test_the_weight_of_the_kl_rises_to_beta(digits, tmp_path, monkeypatch):
    """In --kl-warmup steps; each step logs the KL of its levels under their names, the top one being the last."""
    seen, loss = [], vae.loss

    def watch(model, x, cfg, kl_weight):
        result = loss(model, x, cfg, kl_weight)
        seen.append((kl_weight, *result))
        return result

    monkeypatch.setattr(vae, "loss", watch)
    vae.main([*TINY, "--out", str(tmp_path / "run"), "--levels", "3", "--beta", "0.4", "--kl-warmup", "2", "--free-nats", "2"])
    assert [weight for weight, *_ in seen] == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, (_, value, log_px, kls) in zip(lines[:-1], seen, strict=True):
        assert line["loss"] == pytest.approx(value.item() / 64)
        assert line["elbo"] == pytest.approx((log_px - kls.sum(0)).mean().item(), rel=1e-5)
        assert [line[f"kl_{level}"] for level in (3, 2, 1)] == pytest.approx(kls.mean(1).tolist(), rel=1e-4)


def test_reconstructions_and_interpolations_are_of_the_test_images(digits, tmp_path, monkeypatch):
    """Pairs of a test image, binarised with seed 0 whatever --seed is, and the mean of p(x | z); rows that begin at the z_L
    of an image and end at that of the one before it."""
    grids = {}
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu)
    monkeypatch.setattr(vae, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    vae.main([*TINY, "--out", str(tmp_path / "run"), "--seed", "5"])
    model, cfg = vae.load(tmp_path / "run")
    x = (torch.rand(digits.test.shape, generator=torch.Generator().manual_seed(0)) * 255 < digits.test).long()
    params, draws = infer(model, model.encode(vae.scale(model, x)))
    pairs = grids["reconstructions.png"].unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], 255 * x.byte())
    assert torch.equal(pairs[:, 1], (255 * torch.sigmoid(params[:, :, 0])).round().byte())
    with np.load(tmp_path / "run" / "reconstructions.npz") as written:  # of the first --num-samples, 4
        assert np.array_equal(written["images"], pairs[:4, 1].permute(0, 2, 3, 1))
        assert written["labels"].tolist() == digits.test_labels[:4].tolist()
    rows = grids["interpolations.png"].unflatten(0, (-1, 10)).int()
    for column, z in ((0, draws[0].z), (9, draws[0].z.roll(1, 0)), (3, draws[0].z * 2 / 3 + draws[0].z.roll(1, 0) / 3)):
        want = (255 * torch.sigmoid(model.decode(z)[:, :, 0])).round().int()
        assert (rows[:, column] - want).abs().max() <= 1


@pytest.mark.parametrize("names", [("0", "1", "2"), ()])
def test_reconstructions_are_written_for_evaluation(names, tmp_path, monkeypatch):
    """Of the first --num-samples test images, though --eval-images be fewer, in batches, with labels where there are some."""
    data = tiny.make_data(vae)._replace(names=names)
    monkeypatch.setattr(vae, "load_data", lambda *args: data)
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu)
    monkeypatch.setattr(vae, "at_once", lambda shape: 3)  # the last batch is a short one
    out = tmp_path / "run"
    flags = ["--likelihood", "mixture", "--eval-images", "2", "--num-samples", "7"]
    vae.main([*TINY, *flags, "--out", str(out)])
    model, cfg = vae.load(out)
    params, _ = infer(model, model.encode(vae.scale(model, data.test[:7])))
    want = vae.to_uint8(vae.pixel_mean(params, cfg.likelihood)).permute(0, 2, 3, 1).int().numpy()
    with np.load(out / "reconstructions.npz") as written:
        assert written["images"].dtype == np.uint8 and written["images"].shape == (7, 8, 8, 1)
        assert np.abs(written["images"].astype(int) - want).max() <= 1  # rounding may depend on the batch
        assert set(written.files) == ({"images", "labels"} if names else {"images"})
        assert not names or written["labels"].tolist() == data.test_labels[:7].tolist()


@pytest.mark.parametrize("kind", ["plain", "all", "vamp"])
def test_load_gives_what_mode_sample_draws(kind, digits, tmp_path):
    """The averaged weights, ready to sample: the same images from the same noise."""
    out = tmp_path / "run"
    fields = [word for name, value in KINDS[kind].items() for word in (f"--{name}", str(value))]
    vae.main([*TINY, *fields, "--device", "cpu", "--out", str(out)])
    vae.main(["--mode", "sample", "--num-samples", "6", "--temperature", "0.7", "--out", str(out)])
    model, cfg = vae.load(out)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    averaged = torch.load(out / "checkpoint.pt", weights_only=True)["ema_model"]
    assert_close(dict(model.state_dict()), dict(averaged), rtol=0, atol=0)
    cfg.temperature = 0.7
    images = vae.to_uint8(seeded(vae.sample, model, 6, cfg, seed=cfg.seed))
    found = np.load(out / "sampled" / "samples.npz")["images"]
    assert found.std() > 0 and np.array_equal(found, images.permute(0, 2, 3, 1))
    vae.save_grid(images, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("dataset, likelihood", [("digits", "bernoulli"), ("mnist", "bernoulli"), ("fashion_mnist", "mixture"),
                                                 ("cifar10", "mixture"), ("photos", "mixture")])
def test_the_likelihood_follows_the_data(dataset, likelihood):
    assert vae.choose(Config(dataset=dataset), 8, 8).likelihood == likelihood
    for said in ("bernoulli", "mixture"):
        assert vae.choose(Config(dataset=dataset, likelihood=said), 8, 8).likelihood == said


def test_photographs_are_not_binarised(tmp_path, capsys, monkeypatch):
    data = tiny.make_data(vae, shape=(3, 8, 8))
    monkeypatch.setattr(vae, "load_data", lambda *args: data)
    out = tmp_path / "run"
    vae.main([*TINY, "--dataset", "photos", "--iw-samples", "12", "--out", str(out)])
    assert json.loads((out / "config.json").read_text())["likelihood"] == "mixture"
    bounds = [name for name in final(out) if name.startswith("test_neg_iw_")]
    assert bounds == ["test_neg_iw_1", "test_neg_iw_10", "test_neg_iw_12"]
    printed = capsys.readouterr().out
    assert "8 bits" in printed and "binarised" not in printed
    bpd = final(out)["test_neg_iw_12"] / (3 * 8 * 8 * math.log(2))
    assert final(out)["test_bpd"] == pytest.approx(bpd) and f"{bpd:.4f} bits/dim" in printed


def test_a_collapsed_level_is_told(digits, tmp_path, capsys):
    vae.main([*TINY, "--out", str(tmp_path / "run"), "--beta", "1000", "--kl-warmup", "0", "--steps", "30", "--lr", "0.01",
              "--ema", "0.01"])
    assert final(tmp_path / "run")["test_active_1"] == 0
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize("dataset, likelihood, said", [
    ("digits", "mixture", "8 bits"), ("photos", "mixture", "8 bits"),
    ("photos", "bernoulli", "dynamically binarised, the test split once with seed 0")])
def test_the_report_is_of_every_level_and_of_the_likelihood(dataset, likelihood, said, capsys):
    """A level that has collapsed is named, at whatever place of the chain it is; what the pixels are follows from
    --likelihood, not from the data set."""
    metrics = {"test_neg_iw_1": 9.0, "test_neg_iw_5": 8.0, "test_bpd": 1.5, "test_neg_elbo": 9.5}
    for level, active in ((1, 0.5), (2, 0.04), (3, 1.0)):
        metrics |= {f"test_kl_{level}": level / 4, f"test_active_{level}": active}
    cfg = Config(dataset=dataset, likelihood=likelihood, levels=3, iw_samples=5)
    vae.report(metrics, 10, cfg, SimpleNamespace(tested="all 10 test images"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("test -log p(x) <= 8.000 nats, 1.5000 bits/dim") and "-elbo 9.500" in lines[0]
    assert f"all 10 test images, {said})" in lines[0]
    assert lines[1:4] == ["bound by k: 1: 9.000, 5: 8.000", "z_3: kl 0.75 nats, 100 % of its units active",
                          "z_2: kl 0.50 nats, 4 % of its units active"]
    assert [line for line in lines if "WARNING" in line] == lines[4:5]
    vae.report(metrics, 1, cfg, SimpleNamespace(tested="all 1 test images"))  # the mean of one image does not move
    assert "WARNING" not in capsys.readouterr().out
    assert lines[4].startswith("WARNING: z_2 has collapsed") and lines[5:] == ["z_1: kl 0.25 nats, 50 % of its units active"]


def test_interpolations_of_a_chain_draw_nothing_below_the_top(digits, tmp_path, monkeypatch):
    """Each latent below the top is the mean of its prior, so that a row shows what moves with z_L alone."""
    grids = {}
    monkeypatch.setattr(vae, "draw", lambda mu, logvar, temperature=1.0: mu + temperature)
    monkeypatch.setattr(vae, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    vae.main([*TINY, "--out", str(tmp_path / "run"), "--levels", "2", "--lr", "0.02", "--warmup", "0", "--kl-warmup", "0"])
    model, _ = vae.load(tmp_path / "run")
    x = (torch.rand(digits.test.shape, generator=torch.Generator().manual_seed(0)) * 255 < digits.test).long()
    z = vae.draw_top(model, model.encode(vae.scale(model, x))[-1]).z
    mu, logvar = model.lower_levels[0].prior(model.down[1](z))
    want, other = (vae.to_uint8(vae.pixel_mean(model.decode(z_1), "bernoulli")).int() for z_1 in (mu, mu + 1))
    found = grids["interpolations.png"][::10].int()
    assert (found - want).abs().max() <= 1 < (found - other).abs().max()


def test_a_lone_copy_computes_the_same(monkeypatch):
    """Without the folder kernels/, the few lines under `except ImportError` take the operations' place."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in [n for n in sys.modules if n.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("lone", vae.__file__)
    monkeypatch.setitem(sys.modules, "lone", lone := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(lone)
    assert lone.affine_coupling.__module__ == lone.logistic_mixture.__module__ == "lone"
    model, cfg = build("all", likelihood="mixture")
    copy = lone.VAE(1, 6, 6, cfg).double().eval()
    copy.load_state_dict(model.state_dict())
    x = images(3, max_level=255)
    for a, b in zip(seeded(elbo_terms, model, x, cfg), seeded(lone.elbo_terms, copy, x, cfg), strict=True):
        assert_close(a, b)
    z = torch.randn(4, 3, dtype=torch.float64)
    for a, b in zip(model.flow, copy.flow, strict=True):
        assert_close(a.inverse(z), b.inverse(z))
    every = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16)  # all levels, for scales of all sizes
    params = torch.randn(40, 6, 16, 16, dtype=torch.float64) * torch.logspace(-1, 1, 40, dtype=torch.float64).view(-1, 1, 1, 1)
    assert_close(lone.logistic_mixture(every, params), vae.logistic_mixture(every.expand(40, -1, -1, -1), params))
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.float().flow[0](z.float())[1].dtype == torch.float32


@pytest.mark.parametrize("flags", ["--z-dim 1 --prior flow", "--temperature 0", "--levels 0", "--iw-samples 0"])
def test_bad_flags_are_one_line(flags, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vae.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in line and line.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--prior", "flow"], ["--prior", "vamp"], ["--posterior", "iaf"]], ids=str)
def test_a_short_training_learns_digits(flags, tmp_path):
    """Nats of 100 test images, k = 20; independent pixels of the right frequencies have 27.4."""
    out = tmp_path / "run"
    core = "--steps 300 --kl-warmup 100 --iw-samples 20 --eval-images 100 --num-samples 1"
    vae.main([*core.split(), "--out", str(out), *flags])
    assert final(out)["test_neg_iw_20"] < 25.3 and final(out)["test_kl_1"] > 1  # 24.4 to 25.0, and 2.4 to 3.2


def test_the_manifold_has_the_priors_quantiles(digits, tmp_path, monkeypatch):
    """Of whatever prior: the first number of z grows to the right, the second upwards, from its 2 % to its 98 % quantile."""
    seen, descend = [], vae.descend
    prior = torch.stack([torch.linspace(0, 1, 101), torch.linspace(10, 30, 101)], 1)
    monkeypatch.setattr(vae, "sample_prior", lambda model, n, temperature=1.0: prior[torch.arange(n) % 101])
    monkeypatch.setattr(vae, "descend", lambda model, z, temperature: seen.append((z, temperature)) or descend(
        model, z, temperature))
    vae.main([*TINY, "--out", str(tmp_path / "run"), "--z-dim", "2"])
    grid, temperature = next(call for call in seen if len(call[0]) == 400)
    assert temperature == 0  # nothing is drawn below the top
    grid = grid.view(20, 20, 2)
    assert_close(grid[:, :, 0], torch.linspace(0.02, 0.98, 20).expand(20, 20), atol=0.01, rtol=0)
    assert_close(grid[:, :, 1], torch.linspace(29.6, 10.4, 20)[:, None].expand(20, 20), atol=0.2, rtol=0)
