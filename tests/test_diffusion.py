"""The mathematics of diffusion.py: every function against a closed form, an oracle or a formula written out another way."""

import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.testing import assert_close

import diffusion
import tiny
from diffusion import Config, UNet, choose, denoise, elbo, level_at, q_sample, sample, time_of
from tools.evaluate import evaluate

SCHEDULES, TARGETS = list(diffusion.SCHEDULES), list(diffusion.TARGETS)


def config(**fields):
    return choose(Config(**fields))


def level(t, cfg):
    return diffusion.SCHEDULES[cfg.schedule].level(t)


def oracle(x, cfg):
    """The network that knows x: what --predict asks for, worked out from x_t by solving for eps."""

    def net(x_t, t, y=None):
        a, s, da, ds = (c.view(-1, 1, 1, 1) for c in level(t.double(), cfg))
        x0 = x(x_t, a, s) if callable(x) else x
        eps = (x_t - a * x0) / s
        out = {"eps": eps, "x": x0 + 0 * eps, "v": a * eps - s * x0, "velocity": da * x0 + ds * eps}[cfg.predict]
        return out.to(x_t.dtype)

    return net


def posterior_mean(histogram):
    """x, a, s -> E[x | x_t] for pixels drawn on their own from a histogram of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1

    def mean(x_t, a, s):
        logits = histogram.double().log() - (x_t.double()[..., None] - a[..., None] * levels) ** 2 / (2 * s[..., None] ** 2)
        return (logits.softmax(-1) * levels).sum(-1)

    return mean


# ---- schedules, targets, loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule):
    cfg = config(schedule=schedule)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    a, s, da, ds = level(t, cfg)
    assert_close(torch.autograd.grad(a.sum(), t, retain_graph=True)[0], da)
    assert_close(torch.autograd.grad(s.sum(), t, retain_graph=True)[0], ds)
    assert_close(time_of(2 * (a / s).log(), cfg), t)
    if schedule != "straight":
        assert_close(a**2 + s**2, torch.ones_like(a))
    else:
        assert_close(a + s, torch.ones_like(a))
    low, high = time_of([diffusion.MAX_LOGSNR, diffusion.MIN_LOGSNR], cfg)
    assert 0 < low < 0.01 and 0.98 < high <= 1.0


def test_linear_schedule_is_ddpms():
    betas = np.linspace(1e-4, 0.02, 1000)  # Ho et al. 2020, sec. 4
    a = level(torch.arange(1, 1001, dtype=torch.float64) / 1000, config(method="ddpm")).alpha
    assert_close(a.numpy() ** 2, np.cumprod(1 - betas), atol=2e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_moments(schedule):
    cfg, n = config(schedule=schedule), 200_000
    x, t = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64), torch.full((n,), 0.4)
    x_t = q_sample(x, t, torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), cfg)
    a, s = (c.item() for c in level(t[:1], cfg)[:2])
    assert abs(x_t.mean().item() - 0.7 * a) < 5 * s / n**0.5
    assert abs(x_t.std().item() - s) < 5 * s / n**0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", TARGETS)
def test_predictions_convert_into_each_other(schedule, predict):
    cfg = config(schedule=schedule, predict=predict)
    x, eps = torch.rand(7, 2, 3, 5, dtype=torch.float64) * 2 - 1, torch.randn(7, 2, 3, 5, dtype=torch.float64)
    t = time_of(torch.linspace(diffusion.MIN_LOGSNR, diffusion.MAX_LOGSNR, 7), cfg)
    a, s, da, ds = level_at(t, cfg, x)
    out = {"eps": eps, "x": x, "v": a * eps - s * x, "velocity": da * x + ds * eps}[predict]
    x_hat = denoise(lambda x_t, t, y: out, q_sample(x, t, eps, cfg), t, None, cfg)
    assert_close(x_hat, x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_the_squared_error_of_the_target(schedule, predict, target):
    """An arbitrary network's loss in the units of any target, worked out from its x_hat and eps_hat."""
    cfg = config(schedule=schedule, predict=predict, loss_on=target)
    x, eps = torch.rand(5, 1, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(5, 1, 4, 4, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)

    def net(x_t, t, y):
        return torch.sin(3 * x_t) + t.view(-1, 1, 1, 1)

    x_t = q_sample(x, t, eps, cfg)
    x_hat = denoise(net, x_t, t, None, cfg)
    a, s, da, ds = level_at(t, cfg, x)
    eps_hat = (x_t - a * x_hat) / s
    wrong = {"eps": eps_hat - eps, "x": x_hat - x, "v": a * (eps_hat - eps) - s * (x_hat - x),
             "velocity": da * (x_hat - x) + ds * (eps_hat - eps)}
    losses = {name: (error**2).mean((1, 2, 3)) for name, error in wrong.items()}
    # No error of the network counts more than 400 times, which is JiT's 1 / t^2 with t held above 0.05.
    assert_close(diffusion.loss(net, x, None, cfg, t, eps), torch.minimum(losses[target], 400 * losses[predict]))


@pytest.mark.parametrize("method", list(diffusion.METHODS))
def test_the_weight_of_each_method(method):
    """1 at all times, but for jit: an error of x_hat counts 1 / t^2, where t is at least 0.05 (Li and He 2025)."""
    cfg = config(method=method)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64) * 2 - 1
    eps = torch.randn_like(x)
    t = torch.tensor([0.001, 0.02, 0.05, 0.051, 0.5, 0.99], dtype=torch.float64)
    a, b = diffusion.TARGETS[cfg.predict](level_at(t, cfg, x))
    error = torch.arange(1, 7, dtype=torch.float64)
    losses = diffusion.loss(lambda x_t, t, y: a * x + b * eps + error.view(-1, 1, 1, 1), x, None, cfg, t, eps)
    weight = 1 / t.clamp(min=0.05) ** 2 if method == "jit" else torch.ones_like(t)
    assert_close(losses, weight * error**2)


@pytest.mark.parametrize("method, alpha, sigma, target", [
    ("ddpm", math.exp(-0.3 * 0.1 / 2 - 0.3**2 * 19.9 / 4), None, "eps"),  # Song 2021, the SDE paper, eq. 33
    ("cosine", math.cos(0.15 * math.pi), math.sin(0.15 * math.pi), "eps"), ("flow", 0.7, 0.3, "eps - x"),
    ("v", math.cos(0.15 * math.pi), math.sin(0.15 * math.pi), "v"), ("jit", 0.7, 0.3, "x")])
def test_the_chain_and_the_target_of_each_method(method, alpha, sigma, target):
    """At t = 0.3, of the paper that the method is named after: x_t, and what a network without loss says."""
    cfg, sigma = config(method=method), sigma or (1 - alpha**2) ** 0.5
    x, eps = torch.rand(1, 1, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(1, 1, 4, 4, dtype=torch.float64)
    t, seen = torch.tensor([0.3], dtype=torch.float64), []
    said = {"eps": eps, "x": x, "v": alpha * eps - sigma * x, "eps - x": eps - x}[target]
    assert diffusion.loss(lambda x_t, t, y: seen.append(x_t) or said, x, None, cfg, t, eps).item() < 1e-12
    assert_close(seen[0], alpha * x + sigma * eps)


@pytest.mark.parametrize("method", list(diffusion.METHODS))
def test_training_times(method):
    """The drawn t follow --times, within the ends of the chain; a perfect network has no loss."""
    cfg, seen = config(method=method), []
    x = torch.rand(20_000, 1, 1, 1) * 2 - 1

    def net(x_t, t, y):
        seen.append(t)
        return oracle(x.double(), cfg)(x_t.double(), t).float()

    torch.manual_seed(0)
    assert diffusion.loss(net, x, None, cfg).max() < 1e-3
    t = seen[0].double()
    low, high = time_of([diffusion.MAX_LOGSNR, diffusion.MIN_LOGSNR], cfg).tolist()
    assert low - 1e-6 <= t.min() and t.max() <= high + 1e-6
    quantile = torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64)
    normal = torch.tensor([-0.9945, 0.0, 0.9945], dtype=torch.float64)
    times = {"flow": torch.sigmoid(normal), "jit": torch.sigmoid(0.8 + 0.8 * normal)}  # data is at t = 0, in JiT at 1
    expected = times.get(method, quantile)
    assert_close(t.quantile(quantile), low + (high - low) * expected, atol=0.02, rtol=0)


# ---- samplers


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", TARGETS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "heun", "consistency"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_samplers_recover_an_oracle(schedule, predict, sampler, steps):
    cfg = config(schedule=schedule, predict=predict, sampler=sampler, nfe=steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    assert_close(sample(oracle(x, cfg), noise, None, cfg, generator), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_deterministic_samplers_stay_on_the_path(schedule, sampler, monkeypatch):
    """With the oracle every latent on the way is alpha_s x + sigma_s eps, with the eps that it started from."""
    cfg, seen = config(schedule=schedule, sampler=sampler, nfe=9), []
    x, eps = torch.rand(2, 1, 3, 3, dtype=torch.float64) * 2 - 1, torch.randn(2, 1, 3, 3, dtype=torch.float64)
    monkeypatch.setattr(diffusion, "MIN_LOGSNR", -4.0)
    t_start = time_of([-4.0, -4.0], cfg)
    start = q_sample(x, t_start, eps, cfg) / level_at(t_start, cfg, x).sigma  # what sample multiplies by sigma

    def see(x_t, t):
        seen.append((x_t, t))
        return x_t

    assert_close(sample(oracle(x, cfg), start, None, cfg, before_step=see), x, atol=1e-9, rtol=0)
    assert len(seen) == (5 if sampler == "heun" else 9)
    for x_t, t in seen:
        assert_close(x_t, q_sample(x, t.expand(2), eps, cfg), atol=1e-9, rtol=0)


def discrete_chain(cfg, steps):
    """alpha-bar of DDPM's notation at the times the sampler visits, from the noise end to t = 0."""
    times = torch.linspace(time_of(diffusion.MIN_LOGSNR, cfg).item(), 0, steps + 1, dtype=torch.float64)
    return times, level(times, cfg).alpha ** 2


def test_ddim_against_equation_12():
    cfg = config(method="cosine", sampler="ddim", nfe=6)
    net = lambda x_t, t, y: 0.3 * x_t + 0.1 * t.view(-1, 1, 1, 1).to(x_t)  # noqa: E731
    noise = 0.1 * torch.randn(4, 1, 2, 2, dtype=torch.float64)
    times, abar = discrete_chain(cfg, 6)
    x = (1 - abar[0]).sqrt() * noise
    for i in range(6):
        eps = net(x, times[i].expand(4), None)
        x0 = ((x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()).clamp(-1, 1)
        eps = (x - abar[i].sqrt() * x0) / (1 - abar[i]).sqrt()
        x = abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps
    assert_close(sample(net, noise, None, cfg), x.clamp(-1, 1))


def test_ddpm_against_equations_6_and_7():
    """Ancestral sampling written with betas, as in the paper, and the same noise."""
    cfg = config(method="cosine", sampler="ddpm", nfe=5)
    net = lambda x_t, t, y: 0.3 * x_t  # noqa: E731
    noise = 0.1 * torch.randn(4, 1, 2, 2, dtype=torch.float64)
    times, abar = discrete_chain(cfg, 5)
    generator = torch.Generator().manual_seed(3)
    x = (1 - abar[0]).sqrt() * noise
    for i in range(5):
        alpha = abar[i] / abar[i + 1]
        beta = 1 - alpha
        x0 = ((x - (1 - abar[i]).sqrt() * 0.3 * x) / abar[i].sqrt()).clamp(-1, 1)
        mean = abar[i + 1].sqrt() * beta / (1 - abar[i]) * x0 + alpha.sqrt() * (1 - abar[i + 1]) / (1 - abar[i]) * x
        x = mean
        if i < 4:
            variance = (1 - abar[i + 1]) / (1 - abar[i]) * beta
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator).double()
    assert_close(sample(net, noise, None, cfg, torch.Generator().manual_seed(3)), x.clamp(-1, 1))


def test_dpm_solver_against_algorithm_2():
    """DPM-Solver++(2M) as the paper writes it, in half log SNR, first order in the last step."""
    cfg = config(method="v", sampler="dpm++", nfe=7)
    net = lambda x_t, t, y: 0.2 * x_t.cos()  # noqa: E731
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    times = discrete_chain(cfg, 7)[0]
    a, s, _, _ = level(times, cfg)
    lam = (a / s).log()
    x, outs = s[0] * noise, []
    for i in range(7):
        outs.append((a[i] * x - s[i] * net(x, None, None)).clamp(-1, 1))
        if i == 6:
            x = outs[-1]
            break
        h = lam[i + 1] - lam[i]
        d = outs[-1]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * outs[-1] - 1 / (2 * r) * outs[-2]
        x = s[i + 1] / s[i] * x - a[i + 1] * torch.expm1(-h) * d
    assert_close(sample(net, noise, None, cfg), x.clamp(-1, 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_samplers_converge_at_their_order(schedule, sampler, order, monkeypatch):
    """Gaussian data of standard deviation 0.1 with the exact denoiser: the exact ODE only scales, and is known."""
    std = 0.1
    noise = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
    errors = []
    for steps in (32, 64, 128):
        evaluations = 2 * steps - 1 if sampler == "heun" else steps
        cfg = config(schedule=schedule, sampler=sampler, nfe=evaluations)
        net = oracle(lambda x_t, a, s: std**2 * a / (std**2 * a**2 + s**2) * x_t, cfg)
        monkeypatch.setattr(diffusion, "MIN_LOGSNR", -4.0)
        start, end = time_of([-4.0, 4.0], cfg)
        found = {}

        def stop(x_t, t, found=found, end=end):
            found.setdefault("x", x_t) if t <= end else None
            found.setdefault("t", t) if t <= end else None
            return x_t

        a, s, _, _ = level(start, cfg)
        begin = (std**2 * a**2 + s**2) ** 0.5 / s  # sample multiplies by sigma
        sample(net, begin * noise, None, cfg, before_step=stop)
        a, s, _, _ = level(found["t"], cfg)
        errors.append((found["x"] - (std**2 * a**2 + s**2) ** 0.5 * noise).abs().max().item())
    assert errors[0] / errors[2] > 0.6 * 4**order, errors


def test_guidance():
    cfg = config(schedule="cosine", predict="eps", sampler="ddim", nfe=3)

    class Net:
        classes = 10

        def __call__(self, x_t, t, y):
            return 0.1 * x_t + 0.05 * y.view(-1, 1, 1, 1).to(x_t)

    net, y = Net(), torch.tensor([1, 7])
    x, t = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    none = torch.full_like(y, 10)
    plain, free = denoise(net, x, t, y, cfg), denoise(net, x, t, none, cfg)
    assert_close(denoise(net, x, t, y, cfg, guidance=1.0), plain)
    assert_close(denoise(net, x, t, y, cfg, guidance=0.0), free)
    assert_close(denoise(net, x, t, y, cfg, guidance=3.0), free + 3 * (plain - free))
    cfg.guidance = 0.0
    unguided = sample(net, x, y, cfg)
    cfg.guidance = 1.0
    assert_close(unguided, sample(net, x, none, cfg))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "heun", "consistency"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("interval", [(-14.0, 14.0), (-5.0, 2.0)])
@pytest.mark.parametrize("tuned", [False, True])
def test_nfe_counts_network_evaluations(sampler, guidance, interval, tuned):
    """As many as fit, and not one more. A network that --consistency has tuned is guided already, whatever samples it."""
    calls = []

    class Net:
        classes = 10

        def __call__(self, x_t, t, y):
            calls.append(y)
            return x_t

    for steps in (1, 2, 7, 20):
        calls.clear()
        cfg = config(sampler=sampler, nfe=steps, guidance=guidance, guidance_interval=interval, consistency=tuned)
        sample(Net(), torch.zeros(2, 1, 2, 2), torch.tensor([1, 7]), cfg)
        twice = guidance == 1.5 and not tuned and interval[0] < -10  # at the first level
        least = 2 if twice else 1  # one step, whatever it takes
        assert max(steps - 3, least) <= len(calls) <= max(steps, least)
        if tuned:
            assert {tuple(y.tolist()) for y in calls} == {(1, 7)}


@pytest.mark.parametrize("interval", ["1", "-20 3", "nan 1", "-5 x"])
def test_an_interval_of_guidance_is_two_numbers(interval, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        diffusion.main(["--guidance-interval", *interval.split(), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "--guidance-interval" in tiny.error_line(capsys.readouterr().err)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_guidance_acts_in_its_interval_of_log_snr_alone(schedule, sampler):
    """Inside a level is asked about twice, without and with the label, elsewhere once and with it; all steps are equal."""
    calls = []

    class Net:
        classes = 10

        def __call__(self, x_t, t, y):
            calls.append((t[0].item(), y[0].item()))
            return x_t

    cfg = config(schedule=schedule, predict="x", sampler=sampler, nfe=40, guidance=3.0, guidance_interval=(-3.0, 1.0))
    sample(Net(), torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.tensor([4, 4]), cfg)
    asked = {}
    for t, y in calls:
        asked.setdefault(t, []).append(y)
    counts = set()
    for t, labels in asked.items():
        alpha, sigma, _, _ = diffusion.SCHEDULES[schedule].level(torch.tensor(t, dtype=torch.float64))
        inside = -3 <= 2 * math.log(alpha / sigma) <= 1
        assert labels == ([10, 4] if inside else [4]) * (len(labels) // (2 if inside else 1))
        counts.add(inside)
    assert counts == {True, False} and 36 <= len(calls) <= 40
    times = sorted(asked)
    assert_close(torch.tensor(times).diff(), torch.full((len(times) - 1,), times[0]))


def test_guidance_below_one_acts_everywhere():
    """0 drops the label, at every level: an interval of guidance would mix two models."""
    labels = []

    def net(x_t, t, y):
        labels.append(y[0].item())
        return x_t

    net.classes = 10
    cfg = config(sampler="ddim", nfe=5, guidance=0.0, guidance_interval=(0.0, 1.0))
    sample(net, torch.zeros(1, 1, 2, 2), torch.tensor([3]), cfg)
    assert labels == [10] * 5


# ---- consistency tuning: for Gaussian data the chain's end is known, x_hat = std x_t / sqrt(std^2 alpha^2 + sigma^2)

STD = 0.2


def gaussian(cfg, end):
    """The network for Gaussian data that gives the end of the chain, or the mean of x given x_t."""
    def x_hat(x_t, a, s):
        variance = STD**2 * a**2 + s**2
        return STD * x_t / variance**0.5 if end else STD**2 * a / variance * x_t

    net = oracle(x_hat, cfg)
    return lambda x_t, t, y=None: net(x_t, t)


def where_it_ends(x_t, t, cfg):
    level = level_at(t, cfg, x_t)
    return STD * x_t / (STD**2 * level.alpha**2 + level.sigma**2) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", TARGETS)
def test_the_consistency_loss_is_zero_at_the_chains_end_alone(schedule, predict):
    """For who gives the end of the chain; not for who gives the mean of x, as a network does before it is tuned."""
    cfg = config(schedule=schedule, predict=predict)
    t = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    x_t = q_sample(STD * torch.randn(64, 1, 2, 2, dtype=torch.float64), t, torch.randn(64, 1, 2, 2, dtype=torch.float64), cfg)
    end = where_it_ends(x_t, t, cfg)
    assert diffusion.consistency_loss(gaussian(cfg, end=True), x_t, t, end, None, cfg).max() < 1e-12
    assert diffusion.consistency_loss(gaussian(cfg, end=False), x_t, t, end, None, cfg).mean() > 1e-3


def test_the_consistency_loss_is_a_pseudo_huber_distance():
    cfg = config()
    x_t, end = torch.randn(2, 64, 1, 2, 2, dtype=torch.float64)
    t = torch.rand(64, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = diffusion.consistency_loss(lambda x_t, t, y: scale * x_t, x_t, t, end, None, cfg)
    square = ((x_t - t.view(-1, 1, 1, 1) * scale * x_t - end) ** 2).mean((1, 2, 3))  # x_hat = x_t - t velocity
    wanted = (square + 0.03**2).sqrt() - 0.03
    assert_close(loss, wanted)
    assert_close(*(torch.autograd.grad(value.sum(), scale, retain_graph=True)[0] for value in (loss, wanted)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", [1, 3])
def test_tuning_draws_from_the_chains_of_its_teacher(schedule, world):
    """Latents of every level with the ends of their own chains; from other noise in another round, process or seed."""
    cfg = config(schedule=schedule, sampler="dpm++", nfe=50, guidance=1, batch_size=1000, seed=5)
    shape = (3, 8, 16)  # 250 chains

    def draw(step, rank=0, seed=5):
        run = types.SimpleNamespace(step=step, rank=rank, world=world, shape=shape, classes=10, device="cpu")
        batches = diffusion.tuning_batches(gaussian(cfg, end=False), Config(**vars(cfg) | {"seed": seed}), run)
        torch.manual_seed(1)
        return run, batches, next(batches)

    run, batches, (x_t, t, end, y) = draw(1)
    B = [1000, 334][world == 3]
    assert x_t.shape == end.shape == (B, *shape) and t.shape == y.shape == (B,)
    assert len(t.unique()) == 50 and abs(t.max().item() - time_of(diffusion.MIN_LOGSNR, cfg).item()) < 1e-6 and t.min() > 0
    assert sorted(y.unique().tolist()) == list(range(10))
    assert (end - where_it_ends(x_t, t, cfg)).abs().max() < 0.1  # of the solver's 50 steps; two chains' ends are up to 1 apart

    def chains(ends):
        return {tuple(e[0, 0, :2].tolist()) for e in ends}

    first = chains(end)
    torch.manual_seed(2)
    again = chains(next(batches)[2])
    assert len(first) <= 250 and len(first & again) > 100  # the same chains, drawn anew
    run.step = diffusion.ROUND
    assert not first & chains(next(batches)[2])
    assert chains(draw(2)[2][2]) == first  # as a resumed run has them
    assert not first & chains(draw(1, seed=6)[2][2])
    if world == 3:
        assert not first & chains(draw(1, rank=1)[2][2])
        assert len(draw(1, rank=2)[2][1]) == 333


def test_tuning_draws_each_latent_with_the_end_and_the_label_of_its_chain():
    """Of a teacher that knows one image of each class, so that each of its chains is a straight line to it."""
    cfg = config(sampler="dpm++", nfe=6, guidance=1.0, batch_size=200)

    def teacher(x_t, t, y):
        return oracle(y.view(-1, 1, 1, 1) / 10 - 0.45, cfg)(x_t, t)

    run = types.SimpleNamespace(step=1, rank=0, world=1, shape=(1, 2, 2), classes=10, device="cpu")
    x_t, t, end, y = next(diffusion.tuning_batches(teacher, cfg, run))
    assert_close(end, (y / 10 - 0.45).view(-1, 1, 1, 1).expand_as(end), atol=1e-4, rtol=0)
    assert_close(denoise(teacher, x_t, t, y, cfg), end, atol=1e-3, rtol=0)
    assert len(y.unique()) == 10 and len(t.unique()) == 6


@pytest.mark.parametrize("nfe", [1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_consistency_samples_are_of_the_datas_distribution(schedule, nfe):
    cfg = config(schedule=schedule, sampler="consistency", nfe=nfe)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    x = sample(gaussian(cfg, end=True), noise, None, cfg, generator)
    assert abs(x.std().item() / STD - 1) < 0.02 and abs(x.mean().item()) < 4 * STD / 200


# ---- likelihood


def everywhere(histogram):
    """What count_pixels gives of pixels that do not depend on their neighbours."""
    return histogram.expand(diffusion.CONTEXTS, 256)


def test_context_is_the_mean_of_the_four_neighbours():
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.6
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for b, c, i, j in np.ndindex(*x.shape):
        around = [padded[b, c, i + di, j + dj] for di, dj in ((0, 1), (2, 1), (1, 0), (1, 2))]
        want = min(max(math.floor((np.mean(around) + 1) * 16), 0), 31)
        assert diffusion.context(x)[b, c, i, j] == want
    ends = diffusion.context(torch.tensor([[-30.0, -1.0, -0.9376, 0.0, 0.9376, 1.0, 30.0]]).view(7, 1, 1, 1)).flatten()
    assert ends.tolist() == [0, 0, 0, 16, 31, 31, 31]  # a pixel alone is its own neighbour


def test_pixels_are_counted_in_their_contexts(monkeypatch):
    """Without noise, by a loop over the pixels; and one more pixel for each context, spread as all pixels are."""
    images = torch.randint(0, 256, (5, 2, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    where = diffusion.context(images / 127.5 - 1)
    want = np.zeros((32, 256))
    for row, value in zip(where.flatten().tolist(), images.flatten().tolist(), strict=True):
        want[row, value] += 1
    anywhere = 1 + want.sum(0)
    want += anywhere / anywhere.sum()
    found = diffusion.count_pixels(images, config(decoder_logsnr=math.inf))
    assert_close(found, torch.from_numpy(want))
    assert_close(found.sum(1), torch.from_numpy(want.sum(1)))
    many = torch.full((2500, 1, 2, 2), 128, dtype=torch.uint8)  # more than one portion
    assert_close(diffusion.count_pixels(many, config(decoder_logsnr=math.inf))[16, 128].item(), 1e4 + 10_001 / 10_256)
    # with noise: the mean of four neighbours of a large grey image is grey, plus half of the noise of --decoder-logsnr
    grey = torch.full((1, 1, 300, 300), 128, dtype=torch.uint8)
    counts = diffusion.count_pixels(grey, config(decoder_logsnr=2.0))[:, 128] / 90_000
    edges = (torch.arange(33, dtype=torch.float64) / 16 - 1 - (128 / 127.5 - 1)) / (math.exp(-1) / 2)
    edges[0], edges[-1] = -math.inf, math.inf
    assert_close(counts, torch.special.ndtr(edges).diff(), rtol=0, atol=0.01)
    assert torch.equal(diffusion.count_pixels(grey, config()), diffusion.count_pixels(grey, config()))


def test_neighbours_save_bits():
    """Each image is of one grey: the decoder that sees the neighbours says it, where one histogram for all cannot."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (400, 1, 1, 1), dtype=torch.uint8).expand(400, 1, 8, 8).contiguous()
    x_seen = images / 127.5 - 1 + math.exp(-1) * torch.randn(images.shape)
    counts = diffusion.count_pixels(images, config(decoder_logsnr=2.0))
    alone = -diffusion.decoder_log_prob(images, x_seen, 2.0, everywhere(counts.sum(0))).mean() / math.log(2)
    beside = -diffusion.decoder_log_prob(images, x_seen, 2.0, counts).mean() / math.log(2)
    assert beside < alone - 0.5


@pytest.mark.parametrize("logsnr", [-2.0, 3.0, 6.0, 14.0])
def test_decoder_sums_to_one(logsnr):
    x_seen = torch.tensor([-30.0, -1.001, -1.0, 0.003, 0.999, 1.0, 5.0], dtype=torch.float64).view(1, 1, 1, 7)
    histogram = torch.rand(32, 256, dtype=torch.float64) ** 8 + 1e-9
    total = sum(diffusion.decoder_log_prob(torch.full((1, 1, 1, 7), v, dtype=torch.uint8), x_seen, logsnr, histogram).exp()
                for v in range(256))
    assert_close(total, torch.ones_like(total))


def skewed():
    histogram = torch.ones(256)
    histogram[0] = 1000.0
    return histogram / histogram.sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decoder_logsnr", [3.0, 6.0, 10.0])
@pytest.mark.parametrize(("histogram", "bits"), [(torch.ones(256), 8.0), (skewed(), None)])
def test_elbo_of_known_distributions(schedule, decoder_logsnr, histogram, bits):
    """Independent pixels with a known histogram: the exact denoiser makes the bound tight, wherever the chain ends."""
    if bits is None:
        bits = -(histogram * histogram.log2()).sum().item()
    cfg = config(schedule=schedule, decoder_logsnr=decoder_logsnr, elbo_samples=8)
    torch.manual_seed(0)
    x = torch.multinomial(histogram, 64 * 64, replacement=True).view(64, 1, 8, 8).byte()
    bits_of_x = -(histogram / histogram.sum()).log2()[x.long()].mean().item()
    terms = elbo(oracle(posterior_mean(histogram), cfg), x, None, cfg, everywhere(histogram), torch.Generator().manual_seed(1))
    assert abs(bits_of_x - bits) < 0.2
    assert abs(terms["bpd"].mean().item() - bits_of_x) < 0.05
    assert_close(terms["prior"] + terms["diffusion"] + terms["reconstruction"], terms["bpd"])


def test_elbo_of_gaussian_data():
    """Rounded Gaussian pixels with the Gaussian's own denoiser: the entropy, from the normal distribution function."""
    std, cfg = 0.3, config(elbo_samples=16, decoder_logsnr=8.0)
    levels = np.arange(256) / 127.5 - 1
    edges = torch.from_numpy(np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])) / std
    p = torch.special.ndtr(edges).diff().float()
    torch.manual_seed(0)
    x = torch.multinomial(p, 200 * 64, replacement=True).view(200, 1, 8, 8).byte()
    net = oracle(lambda x_t, a, s: std**2 * a / (std**2 * a**2 + s**2) * x_t, cfg)
    bpd = elbo(net, x, None, cfg, everywhere(p + 1e-12), torch.Generator().manual_seed(1))["bpd"].mean().item()
    entropy = -(p * (p + 1e-30).log2()).sum().item()
    assert abs(entropy - (0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5))) < 0.05
    assert abs(bpd - entropy) < 0.05


def test_elbo_is_the_same_whatever_is_predicted():
    histogram, results = everywhere(torch.ones(256)), []
    x = torch.randint(0, 256, (6, 2, 3, 4), dtype=torch.uint8)
    for predict in TARGETS:
        cfg = config(schedule="cosine", predict=predict, elbo_samples=4)
        wrong = oracle(lambda x_t, a, s: 0.5 * x_t.double().tanh(), cfg)
        results.append(elbo(wrong, x, None, cfg, histogram, torch.Generator().manual_seed(0))["bpd"])
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-3, atol=1e-3)


def test_each_term_of_the_bound_in_closed_form(monkeypatch):
    """For a network that is wrong by 0.005 in every eps: prior and diffusion as numbers, however small beside the sum,
    reconstruction as minus the log-probability of x under the noise of its own log SNR."""
    cfg, seen = config(decoder_logsnr=5.0, elbo_samples=3), []
    x = torch.randint(110, 146, (6, 2, 3, 4), dtype=torch.uint8)  # in [-1,1] with the error too
    data = x / 127.5 - 1

    def wrong(model, x_t, t, y, cfg):
        level = level_at(t, cfg, data)
        return data - 0.005 * level.sigma / level.alpha

    monkeypatch.setattr(diffusion, "denoise", wrong)
    monkeypatch.setattr(diffusion, "decoder_log_prob", lambda *args: seen.append(args) or torch.full(args[0].shape, -0.25))
    histogram = torch.rand(32, 256)
    terms = elbo(None, x, None, cfg, histogram, torch.Generator().manual_seed(1))
    one = torch.ones(6)
    # KL(N(a x, s^2) || N(0, s^2)) = (a / s)^2 x^2 / 2, at log SNR -10
    assert_close(terms["prior"], math.exp(-10) * data.square().mean((1, 2, 3)) / 2 / math.log(2), rtol=1e-5, atol=0)
    assert_close(terms["diffusion"], 0.5 * 15 * 0.005**2 / math.log(2) * one, rtol=1e-3, atol=0)
    assert_close(terms["reconstruction"], 0.25 / math.log(2) * one)
    assert_close(terms["bpd"], terms["prior"] + terms["diffusion"] + terms["reconstruction"])
    ((images, x_seen, logsnr, given),) = seen
    assert torch.equal(images, x) and torch.equal(given, histogram) and logsnr == 5.0
    assert ((x_seen - data).std() / math.exp(-2.5)).item() == pytest.approx(1, abs=0.25)


def test_the_bound_knows_that_no_pixel_lies_outside(monkeypatch):
    """What a network says beyond [-1,1] counts as the end of it: white images of which it says 7 cost no diffusion term."""
    monkeypatch.setattr(diffusion, "denoise", lambda model, x_t, t, y, cfg: torch.full_like(x_t, 7))
    white = torch.full((4, 1, 3, 3), 255, dtype=torch.uint8)
    assert elbo(None, white, None, config(), everywhere(torch.ones(256)))["diffusion"].abs().max() == 0
    grey = torch.full((4, 1, 3, 3), 204, dtype=torch.uint8)  # 0.6 in [-1,1], so it is wrong by 0.4
    cfg = config(elbo_samples=200, decoder_logsnr=6.0)
    terms = elbo(None, grey, None, cfg, everywhere(torch.ones(256)))
    exact = 0.5 * 0.4**2 * (math.exp(6) - math.exp(-10)) / math.log(2)  # 1/2 int SNR |x - x_hat|^2 d lambda
    assert terms["diffusion"].mean().item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("K", [1, 4])
def test_the_times_of_the_bound_are_spread_over_the_chain(K, monkeypatch):
    """Each image takes one log SNR from each of K equal intervals; over the images they fill each interval evenly."""
    cfg, seen = config(elbo_samples=K, decoder_logsnr=6.0), []
    monkeypatch.setattr(diffusion, "time_of", lambda logsnr, cfg: seen.append(logsnr) or torch.full((50,), 0.5))
    elbo(lambda x_t, t, y: x_t, torch.zeros(50, 1, 1, 1, dtype=torch.uint8), None, cfg, everywhere(torch.ones(256)))
    assert len(seen) == K
    for k, logsnr in enumerate(seen):
        place = (logsnr + 10) / 16 * K - k
        assert place.min() >= 0 and place.max() < 1
        assert_close(place.sort().values.diff(), torch.full((49,), 0.02).double())


@pytest.mark.parametrize("logsnr", [-1.0, 4.0, 9.0])
def test_decoder_is_bayes_rule(logsnr):
    """The histogram of the pixel's own context times the normal density, over their sum."""
    histogram = np.random.default_rng(0).random((32, 256)) + 0.1
    x_seen, x = np.array([-1.1, 0.02, 0.7]), np.array([0, 130, 200])
    place = diffusion.context(torch.from_numpy(x_seen).view(1, 1, 1, 3)).flatten().numpy()
    assert len(set(place)) == 3
    joint = histogram[place] * stats.norm.pdf(x_seen[:, None], np.arange(256) / 127.5 - 1, math.exp(-logsnr / 2))
    want = np.log(joint[np.arange(3), x] / joint.sum(1))
    found = diffusion.decoder_log_prob(torch.from_numpy(x).view(1, 1, 1, 3), torch.from_numpy(x_seen).view(1, 1, 1, 3), logsnr,
                                       torch.from_numpy(histogram))
    assert_close(found.flatten(), torch.from_numpy(want))


def test_what_evaluation_hands_to_the_bound(digits, tmp_path, monkeypatch):
    """The averaged network, test images with their labels, and the histograms of the images of training."""
    seen, inside = [], diffusion.elbo

    def watch(*args):
        seen.append(args)
        return inside(*args)

    monkeypatch.setattr(diffusion, "elbo", watch)
    monkeypatch.setattr(diffusion, "at_once", lambda shape: 3)
    out = tmp_path / "run"
    diffusion.main([*TINY, "--out", str(out), "--elbo-samples", "2", "--seed", "5", "--save-every", "100"])
    x, y = (torch.cat([args[i] for args in seen]) for i in (1, 2))
    assert torch.equal(x, digits.test) and torch.equal(y, digits.test_labels)
    want = diffusion.count_pixels(digits.train, config(seed=5))
    average = tiny.load_checkpoint(out)["ema_model"]
    for model, _, _, cfg, histogram, generator in seen:
        assert torch.equal(histogram, want) and cfg.elbo_samples == 2 and generator is seen[0][5]
        assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
    generator = torch.Generator().manual_seed(5)
    parts = [inside(model, *args[1:5], generator) for model, *_ in seen[:1] for args in seen]
    found = tiny.metrics(out)[-1]
    for name in ("bpd", "prior", "diffusion", "reconstruction"):
        assert found[f"test_{name}"] == pytest.approx(torch.cat([part[name] for part in parts]).mean().item(), rel=1e-5)


def test_the_guidance_of_samples():
    """At 1.5, neither of the two at which the network is asked once: the sample of the mixture of both answers."""
    class Net:
        classes = 10

        def __call__(self, x_t, t, y):
            return 0.1 * x_t + 0.02 * y.view(-1, 1, 1, 1).to(x_t)

    net, y = Net(), torch.tensor([1, 7])
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)

    def mixed(x_t, t, y):
        free = net(x_t, t, torch.full_like(y, 10))
        return free + 1.5 * (net(x_t, t, y) - free)

    everywhere = config(guidance=1.5, nfe=8, guidance_interval=(-14.0, 14.0))
    assert_close(sample(net, x, y, everywhere), sample(mixed, x, y, config(guidance=1.0, nfe=4)))


def test_without_guidance_the_label_has_no_part_in_a_sample(digits, tmp_path):
    """At 0 the images of two classes are the same, those that the network makes when no label is given. At 1 they are not."""
    out = tmp_path / "run"
    diffusion.main([*TINY, "--out", str(out), "--lr", "0.02", "--warmup", "0", "--ema", "0.5"])
    found = {}
    for flags in ("--guidance 0 --label 3", "--guidance 0 --label 5", "--guidance 1 --label 3", "--guidance 1 --label 5"):
        diffusion.main(["--mode", "sample", "--out", str(out), *flags.split()])
        found[flags] = np.load(out / "sampled" / "samples.npz")["images"]
    a, b, c, d = found.values()
    assert np.array_equal(a, b) and not np.array_equal(c, d) and not np.array_equal(a, c)
    model, cfg = diffusion.load(out)
    cfg.guidance = 1.0
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(cfg.seed))
    want = diffusion.to_uint8(sample(model, noise, torch.full((4,), 10), cfg))
    assert np.array_equal(a, want.permute(0, 2, 3, 1).numpy())


def test_completions_are_of_the_test_images(digits, tmp_path, monkeypatch):
    """Pairs of an image's known half, on black, and an image that has this half, from the noise of --seed."""
    grids, told, inside = {}, [], diffusion.inpaint

    def watch(model, x, mask, y, *rest):
        told.append(y)
        return inside(model, x, mask, y, *rest)

    monkeypatch.setattr(diffusion, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    monkeypatch.setattr(diffusion, "inpaint", watch)
    diffusion.main([*TINY, "--out", str(tmp_path / "run"), "--inpaint", "left", "--seed", "5"])
    model, cfg = diffusion.load(tmp_path / "run")
    mask = diffusion.read_mask("left", 8, 8).float()
    want = inside(model, digits.test / 127.5 - 1, mask, digits.test_labels, cfg, torch.Generator().manual_seed(5))
    pairs = grids["inpaint.png"].unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0, ..., :4], digits.test[..., :4]) and (pairs[:, 0, ..., 4:] == 0).all()
    assert torch.equal(pairs[:, 1, ..., :4], digits.test[..., :4]) and torch.equal(
        pairs[:, 1], diffusion.to_uint8(want))
    assert len(told) == 1 and torch.equal(told[0], digits.test_labels)


class FakeRun:
    device, shape = torch.device("cpu"), (1, 8, 8)


def test_evaluate_weighs_every_test_image_alike(monkeypatch):
    """The mean over 300 images in batches of 250 and 50; a bound that depends on the image shows a wrong weight."""
    data = diffusion.load_data("digits", "data")
    data = data._replace(test=torch.cat([data.test, data.test[:3]]), test_labels=torch.cat([data.test_labels] * 2)[:300])
    monkeypatch.setattr(diffusion, "elbo", lambda model, x, *rest: {"bpd": x.float().mean((1, 2, 3)).double()})
    for batch_size in (7, 128):
        metrics = diffusion.evaluate(None, data, config(batch_size=batch_size), FakeRun())
        assert_close(metrics["test_bpd"], data.test.double().mean().item(), rtol=1e-6, atol=0)


# ---- the network


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (8, 8), (28, 28), (33, 49)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [1, 2])
def test_unet_takes_any_size(size, channels, patch):
    torch.manual_seed(0)
    net = UNet(channels, 0, patch, config(width=8, blocks=1)).eval()
    x = torch.randn(2, channels, *size)
    with torch.no_grad():
        assert_close(net(x, torch.rand(2)), torch.zeros_like(x))  # starts at zero
        torch.nn.init.normal_(net.head.weight)
        out = net(x, torch.tensor([0.1, 0.9]))
        assert out.shape == x.shape and out.isfinite().all()
        assert_close(net(x[1:], torch.tensor([0.9])), out[1:], atol=1e-4, rtol=1e-4)  # no mixing over the batch


def test_unet_uses_time_and_label():
    torch.manual_seed(0)
    net = UNet(1, 3, 1, config(width=8, blocks=1)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 1, 8, 8).expand(4, 1, 8, 8)
    with torch.no_grad():
        by_time = net(x, torch.tensor([0.1, 0.11, 0.5, 0.9]), torch.zeros(4, dtype=torch.long))
        by_label = net(x, torch.full((4,), 0.5), torch.arange(4))
    for out in (by_time, by_label):
        assert len({tuple(o.flatten().tolist()) for o in out}) == 4


def test_wrong_heads_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        config(width=8, n_head=5)
    assert left.value.code == 2 and "--n-head 5" in tiny.error_line(capsys.readouterr().err)


# ---- beyond generation


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "heun"])
def test_inpaint_keeps_what_is_known(sampler):
    cfg = config(sampler=sampler, nfe=6)
    x, mask = torch.rand(2, 1, 4, 6, dtype=torch.float64) * 2 - 1, torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    mask[..., :3] = 1
    out = diffusion.inpaint(oracle(0 * x + 0.25, cfg), x, mask, None, cfg, torch.Generator().manual_seed(0))
    assert_close(out[..., :3], x[..., :3])
    assert_close(out[..., 3:], torch.full_like(out[..., 3:], 0.25))


def test_an_odd_size_is_a_whole_one_that_is_cropped():
    """5 x 7 where a position of the lowest level is 4 x 4: mid-grey stands on the right and below."""
    torch.manual_seed(0)
    net = UNet(2, 3, 2, config(width=8)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, y = torch.randn(3, 2, 5, 7), torch.rand(3), torch.arange(3)
    whole = net(torch.nn.functional.pad(x, (0, 1, 0, 3)), t, y)
    assert_close(net(x, t, y), whole[..., :5, :7], rtol=1e-4, atol=1e-4)


def test_groups_are_normalised_and_bent():
    """8 groups where the channels allow it, with PyTorch's own epsilon: that of small numbers shows it."""
    for channels, groups in ((32, 8), (12, 4), (9, 1)):
        norm, x = diffusion.GroupNormSiLU(channels), 1e-2 * torch.randn(2, channels, 3, 3)
        want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups))
        assert_close(norm(x), want, rtol=1e-4, atol=1e-5)


def test_all_of_a_branch_is_dropped():
    """At a rate of 1 a residual block adds its last bias alone."""
    block, x = diffusion.ResBlock(4, 4, 8, 1.0).train(), torch.randn(2, 4, 3, 3)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    assert_close(block(x, torch.randn(2, 8)), x + block.conv2.bias[:, None, None])


def test_what_is_chosen_by_size_and_tuning():
    for side, patch in {8: 1, 15: 1, 16: 2, 28: 2}.items():
        assert diffusion.build((1, side + 9, side), 0, Config(width=4)).patch == patch
    assert (config().nfe, config().sampler) == (20, "dpm++")
    assert (config(consistency=True).nfe, config(consistency=True).sampler) == (2, "consistency")
    assert config(consistency=True, nfe=7, sampler="ddim") == Config(
        **vars(config(consistency=True)) | {"nfe": 7, "sampler": "ddim"})


@pytest.mark.parametrize("name, known", [("left", np.s_[:, :3]), ("right", np.s_[:, 3:]), ("top", np.s_[:2]),
                                         ("bottom", np.s_[2:]), ("file", np.s_[1:3])])
def test_masks(name, known, tmp_path):
    """Halves of an image of 5 x 7 pixels, the smaller one first; of a picture what is white, at any size."""
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[known] = True
    if name == "file":
        Image.fromarray(255 * expected.numpy().astype(np.uint8).repeat(3, 0).repeat(3, 1)).save(name := tmp_path / "mask.png")
    assert torch.equal(diffusion.read_mask(str(name), 5, 7), expected[None, None])
    if name not in ("left", "right", "top", "bottom"):  # of grey what is nearer to white, as a JPEG has no pure black
        Image.fromarray((127 + expected).numpy().astype(np.uint8)).save(name)
        assert torch.equal(diffusion.read_mask(str(name), 5, 7), expected[None, None])


# ---- training and its options, on the real digits


TINY = ["--width", "8", "--blocks", "1", "--steps", "4", "--batch-size", "16", "--nfe", "2", "--elbo-samples",
        "1", "--num-samples", "4", "--log-every", "1", "--save-every", "3"]


@pytest.fixture()
def digits(monkeypatch):
    """digits with 8 test images, loaded once."""
    return tiny.small_digits(diffusion, monkeypatch)


@pytest.mark.parametrize("flags", [
    ["--method", "ddpm", "--sampler", "ddpm"], ["--method", "v", "--sampler", "ddim"], ["--method", "cosine"],
    ["--predict", "x", "--loss-on", "eps", "--schedule", "cosine", "--times", "uniform"], ["--sampler", "heun"],
    ["--n-head", "0", "--dropout", "0.1"], ["--mults", "1", "--blocks", "2"], ["--patch", "2", "--mults", "1", "2", "2"],
    ["--guidance", "2", "--label", "3"], ["--inpaint", "top"], ["--no-labels"], ["--amp", "bf16"], ["--image-size", "11"],
    ["--minutes", "0.02"], ["--guidance", "1", "--sampler", "ddpm", "--log-every", "2"],
    ["--kernels", "torch"], ["--warmup", "0"], ["--width", "9", "--n-head", "3"], ["--decoder-logsnr", "3"],
], ids=" ".join)
def test_every_option_runs(digits, tmp_path, flags):
    diffusion.main([*TINY, "--out", str(tmp_path / "run"), *flags])
    run = tmp_path / "run"
    names = {"config.json", "metrics.jsonl", "samples.png", "checkpoint.pt", "samples.npz"}
    assert names <= {p.name for p in run.iterdir()}
    samples = np.load(run / "samples.npz")
    assert samples["images"].shape[0] == 4 and samples["images"].dtype == np.uint8
    if "--label" in flags:
        assert (samples["labels"] == 3).all()
    if "--inpaint" in flags:
        assert (run / "inpaint.png").exists()
    assert ("labels" in samples) == ("--no-labels" not in flags)


@pytest.mark.parametrize("flags", ["--inpaint uper", "--label 10", "--n-head 3", "--consistency"])
def test_bad_flags_are_one_line_before_any_training(flags, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffusion.Run, "steps", lambda *args: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stop:
        diffusion.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    assert stop.value.code == 2 and flags.split()[0] in tiny.error_line(capsys.readouterr().err)


def test_the_bound_is_taken_in_eval_mode(digits, tmp_path):
    """With dropout in the network the figure is the same every time."""
    flags = [*TINY, "--dropout", "0.9", "--out", str(tmp_path / "run")]
    diffusion.main(flags)
    diffusion.main([*flags, "--mode", "eval", "--batch-size", "16"])
    bounds = [m["test_bpd"] for m in tiny.metrics(tmp_path / "run") if "final" in m]
    assert len(bounds) == 2 and bounds[0] == bounds[1]


def test_the_averaged_weights_are_sampled_and_never_trained(digits, tmp_path):
    out = tmp_path / "run"
    diffusion.main([*TINY, "--out", str(out), "--ema", "0.5"])
    saved = tiny.load_checkpoint(out)
    assert any(not torch.equal(saved["ema_model"][k], saved["model"][k]) for k in saved["model"])
    images = np.load(out / "samples.npz")["images"]
    for tensor in saved["model"].values():
        tensor.fill_(100.0)
    torch.save(saved, out / "checkpoint.pt")
    diffusion.main(["--mode", "sample", "--out", str(out)])
    assert np.array_equal(np.load(out / "sampled" / "samples.npz")["images"], images)


def test_load_gives_what_mode_sample_samples(digits, tmp_path):
    """Three lines of Python, and the command line: the same images from the same noise."""
    out = tmp_path / "run"
    diffusion.main([*TINY, "--out", str(out), "--label", "3"])
    diffusion.main(["--mode", "sample", "--out", str(out), "--num-samples", "5", "--seed", "0"])
    wanted = np.load(out / "sampled" / "samples.npz")
    model, cfg = diffusion.load(out)
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(5, 1, 8, 8, generator=generator)
    images = diffusion.to_uint8(sample(model, noise, torch.full((5,), 3), cfg, generator))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), wanted["images"]) and (wanted["labels"] == 3).all()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    diffusion.save_grid(images, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 5 * 8


def test_without_labels_the_network_is_told_none(digits, tmp_path, capsys):
    """The bound and the samples are unconditional, and so is what is said of them."""
    out = tmp_path / "run"
    diffusion.main([*TINY, "--out", str(out), "--no-labels", "--guidance", "2"])
    model, cfg = diffusion.load(out)
    said = capsys.readouterr().out
    assert model.label is None and "test bits/dim" in said and "given the label" not in said
    assert sample(model, torch.randn(2, 1, 8, 8), None, cfg).shape == (2, 1, 8, 8)


def test_without_classes_each_evaluation_is_a_step():
    """There is no label to drop, so --guidance takes no second evaluation of what --nfe pays for."""
    asked = []

    def model(x_t, t, y):
        asked.append((t[0].item(), y))
        return x_t

    model.classes = 0
    run = types.SimpleNamespace(shape=(1, 2, 2), classes=0, device="cpu", labels=lambda n: torch.zeros(n, dtype=torch.long))
    diffusion.generate(model, 3, config(nfe=8, guidance=2.0, guidance_interval=(-14.0, 14.0)), run)
    assert len(asked) == len({t for t, _ in asked}) == 8 and all(y is None for _, y in asked)


def test_ema_follows_its_formula(digits, tmp_path, monkeypatch):
    """Each weight's average, from the weights after every step."""
    history = []
    update = diffusion.Run.update

    def record(self, loss, model, optimizer):
        before = [p.detach().clone() for p in model.parameters()]
        norm = update(self, loss, model, optimizer)
        history.append((before, [p.detach().clone() for p in model.parameters()]))
        return norm

    monkeypatch.setattr(diffusion.Run, "update", record)
    diffusion.main([*TINY, "--out", str(tmp_path / "run"), "--ema", "0.3"])
    average = history[0][0]
    for step, (_, weights) in enumerate(history):
        decay = (1 - 1 / (step + 1)) ** (1 / 0.3)
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    assert len(history) == 4
    for a, b in zip(average, tiny.load_checkpoint(tmp_path / "run")["ema_model"].values(), strict=True):
        assert_close(a, b)


def test_label_dropout_rate(digits, tmp_path, monkeypatch):
    seen = []

    def record(model, x, y, cfg):
        seen.append(y)
        return model(x, torch.rand(len(x)), y).mean((1, 2, 3))

    monkeypatch.setattr(diffusion, "loss", record)
    diffusion.main([*TINY, "--out", str(tmp_path / "run"), "--batch-size", "1000", "--label-dropout", "0.2"])
    y = torch.cat(seen)
    assert abs((y == 10).double().mean().item() - 0.2) < 4 * (0.2 * 0.8 / len(y)) ** 0.5


def test_which_labels_are_hidden_depends_on_the_process(digits, tmp_path, monkeypatch):
    """Of the same images, that is: each process hides labels of its own."""
    seen = []

    def record(model, x, y, cfg):
        seen.append(y)
        return model(x, torch.rand(len(x)), y).mean((1, 2, 3))

    monkeypatch.setattr(diffusion, "loss", record)
    monkeypatch.setattr(diffusion.Run, "batch", lambda run, data: (data.train[:100], data.train_labels[:100]))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        diffusion.main([*TINY, "--out", str(tmp_path / rank), "--steps", "1", "--label-dropout", "0.5"])
    first, second = seen
    assert (first != second).any()


def test_tuning_starts_from_the_averaged_weights_and_resumes(digits, tmp_path, monkeypatch):
    """The teacher is the run of --init, guided; eight steps are the same as four and four more."""
    base, whole, parts = (str(tmp_path / name) for name in ("base", "whole", "parts"))
    diffusion.main([*TINY, "--out", base])
    tune = ["--consistency", "--init", base, "--guidance", "2"]
    seen, original = [], diffusion.consistency_loss
    teachers, batches = [], diffusion.tuning_batches

    def record(model, x_t, t, end, y, cfg):
        seen.append([p.detach().clone() for p in model.parameters()])
        assert model.training
        return original(model, x_t, t, end, y, cfg)

    def record_teacher(teacher, cfg, run):
        assert (cfg.sampler, cfg.nfe, cfg.guidance) == ("dpm++", 20, 2) and not teacher.training
        teachers.append(teacher)
        return batches(teacher, cfg, run)

    monkeypatch.setattr(diffusion, "consistency_loss", record)
    monkeypatch.setattr(diffusion, "tuning_batches", record_teacher)
    monkeypatch.setattr(diffusion, "ROUND", 3)
    diffusion.main([*TINY, *tune, "--out", whole, "--steps", "8"])
    averaged = list(tiny.load_checkpoint(tmp_path / "base")["ema_model"].values())
    assert len(seen) == 8 and len(teachers) == 1
    assert all(torch.equal(a, b) for a, b in zip(teachers[0].parameters(), averaged, strict=True))  # it is not trained
    assert all(torch.equal(a, b) for a, b in zip(seen[0], averaged, strict=True))  # the network begins as its teacher
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], averaged, strict=True))
    diffusion.main([*TINY, *tune, "--out", parts])
    diffusion.main(["--resume", "--out", parts, "--steps", "8"])
    one, two = tiny.load_checkpoint(tmp_path / "whole"), tiny.load_checkpoint(tmp_path / "parts")
    assert all(torch.equal(one["ema_model"][key], two["ema_model"][key]) for key in one["ema_model"])
    model, cfg = diffusion.load(whole)
    assert (cfg.sampler, cfg.nfe) == ("consistency", 2) and diffusion.load(base)[1].sampler == "dpm++"


@pytest.mark.parametrize("flags", ["--method cosine", "--predict x", "--no-labels", "--width 16"])
def test_tuning_wants_the_chain_of_its_teacher(flags, digits, tmp_path, capsys, monkeypatch):
    """A teacher of another schedule, target, set of classes or network would be misread, or not be the start."""
    base = str(tmp_path / "base")
    diffusion.main([*TINY, "--out", base, *flags.split()])
    tune = [*TINY, "--consistency", "--init", base, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(diffusion, "consistency_loss", lambda *args: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stop:
        diffusion.main(tune)
    assert stop.value.code == 2 and "--consistency" in tiny.error_line(capsys.readouterr().err)
    monkeypatch.undo()
    diffusion.main([*tune, *flags.split()])
    assert diffusion.load(tmp_path / "run")[1].consistency


def test_the_teacher_is_guided_and_the_network_is_not(monkeypatch):
    """--guidance is that of the teacher's chains; what is learned has it already."""
    asked, inside, cfg = [], diffusion.denoise, diffusion.choose(Config(guidance=3.0, guidance_interval=(-14.0, 14.0), nfe=4))

    def watch(model, x_t, t, y, cfg, guidance=1.0):
        asked.append((model, guidance))
        return inside(model, x_t, t, y, cfg, guidance)

    def network(x, t, y):
        return x + y.view(-1, 1, 1, 1).to(x)

    def teacher(x, t, y):
        return network(x, t, y)

    teacher.classes = 10
    monkeypatch.setattr(diffusion, "denoise", watch)
    run = types.SimpleNamespace(step=1, rank=0, world=1, shape=(1, 4, 4), classes=10, device="cpu")
    diffusion.consistency_loss(network, *next(diffusion.tuning_batches(teacher, cfg, run)), cfg)
    assert asked == [(teacher, 3.0), (teacher, 3.0), (network, 1.0)]


@pytest.mark.parametrize("flags, told", [([], True), (["--no-labels"], False)])
def test_completions_are_told_labels_where_the_network_has_some(flags, told, digits, tmp_path, monkeypatch):
    """Without them all evaluations that --nfe pays for are steps of the chain."""
    seen, inside = [], diffusion.inpaint

    def watch(model, x, mask, y, cfg, generator):
        seen.append(y)
        return inside(model, x, mask, y, cfg, generator)

    monkeypatch.setattr(diffusion, "inpaint", watch)
    diffusion.main([*TINY, "--inpaint", "top", "--out", str(tmp_path / "run"), *flags])
    assert [y is not None for y in seen] == [told]


def test_completions_follow_the_seed_whatever_was_drawn_before(monkeypatch):
    """Those of a sampler that adds noise, too; what is known stays on the line to the noise that the chain began with."""
    cfg = diffusion.choose(Config(sampler="ddpm", nfe=4))
    x, mask = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1, torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    seen = []

    def model(x_t, t, y):
        seen.append((t, x_t))
        return torch.zeros_like(x_t)

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(diffusion.inpaint(model, x, mask, None, cfg, torch.Generator().manual_seed(5)))
    assert torch.equal(*found)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)
    assert len(seen) == 8
    for t, x_t in seen[:4]:
        assert_close((x_t * mask), mask * diffusion.q_sample(x, t, noise, cfg))


def test_short_training_on_digits(tmp_path):
    """350 steps on the real digits: the bound on all 297 test images, and the distance of as many samples."""
    diffusion.main(["--steps", "350", "--num-samples", "297", "--out", str(tmp_path / "run")])
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    samples = np.load(tmp_path / "run" / "samples.npz")
    quality = evaluate(samples["images"], "digits", labels=samples["labels"])
    assert final["final"] and final["test_bpd"] < 2.2, final
    assert quality["frechet"] < 1.5, quality  # the floor is 0.69
    assert quality["label_accuracy"] > 0.95, quality
    tune = ["--consistency", "--init", str(tmp_path / "run"), "--out", str(tmp_path / "fast")]
    diffusion.main([*tune, "--steps", "300", "--num-samples", "297", "--mode", "train", "--elbo-samples", "1"])
    tuned = evaluate(np.load(tmp_path / "fast" / "samples.npz")["images"], "digits")
    diffusion.main(["--mode", "sample", "--out", str(tmp_path / "run"), "--nfe", "4", "--num-samples", "297"])
    untuned = evaluate(np.load(tmp_path / "run" / "sampled" / "samples.npz")["images"], "digits")
    assert tuned["frechet"] < min(1.0, 0.8 * untuned["frechet"]), (tuned, untuned)  # two evaluations against four
