"""tools/levels.py: the bound with T levels, against Gaussian KLs, a closed form, and diffusion.elbo."""

import math

import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import diffusion
import tiny
from diffusion import MIN_LOGSNR, Config, choose

levels = tiny.load_tool("levels")
STD = 0.3


def config(**fields):
    return choose(Config(**fields))


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def network(x_hat, cfg):
    """The network that predicts the x which x_hat(x_t, alpha, sigma) gives."""
    assert cfg.predict == "x"

    def net(x_t, t, y=None):
        level = diffusion.level_at(t, cfg, x_t)
        return x_hat(x_t, level.alpha, level.sigma)

    return net


def gaussian(x_t, alpha, sigma):
    """E[x | x_t] for Gaussian pixels of deviation STD."""
    return STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * x_t


def gaussian_images(n, seed=0):
    torch.manual_seed(seed)
    return (127.5 * (1 + STD * torch.randn(n, 1, 8, 8))).round().clamp(0, 255).byte()


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_level_is_the_kl_between_two_gaussians(schedule, T):
    """q(x_s | x_t, x) by Bayes' rule for Gaussians, and p(x_s | x_t), the same with x_hat in the place of x."""
    x = torch.randint(0, 256, (3, 1, 4, 5), dtype=torch.uint8, generator=seeded())
    cfg = config(schedule=schedule, predict="x", elbo_samples=2 * T)
    net = network(lambda x_t, alpha, sigma: 0.3 + 0.2 * x_t, cfg)
    which, kls = levels.level_kls(net, x.double(), None, cfg, T, seeded(2))
    assert which.tolist() == [[k // 2] * 3 for k in range(2 * T)]  # each level as often as the others
    generator = seeded(2)
    torch.rand(1, generator=generator, dtype=torch.float64)
    data = x.double() / 127.5 - 1
    for k in range(2 * T):
        noisy, clean = (MIN_LOGSNR + (cfg.decoder_logsnr - MIN_LOGSNR) * (k // 2 + end) / T for end in (0, 1))
        alpha_t, sigma_t, alpha_s, sigma_s = (
            entry.item() for logsnr in (noisy, clean) for entry in
            diffusion.SCHEDULES[schedule].level(diffusion.time_of(logsnr, cfg))[:2])
        x_t = alpha_t * data + sigma_t * torch.randn(data.shape, generator=generator).double()
        step = alpha_t / alpha_s  # x_t = step x_s + noise of this variance
        noise = sigma_t**2 - step**2 * sigma_s**2
        variance = 1 / (1 / sigma_s**2 + step**2 / noise)

        def given(x0, x_t=x_t, step=step, noise=noise, variance=variance, alpha_s=alpha_s, sigma_s=sigma_s):
            return Normal(variance * (alpha_s * x0 / sigma_s**2 + step * x_t / noise), variance**0.5)

        wanted = kl_divergence(given(data), given(0.3 + 0.2 * x_t)).sum((1, 2, 3))
        assert_close(kls[k], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 4, 16, 256])
def test_the_sum_over_all_levels_of_gaussian_data(T):
    """The squared error of the exact denoiser is STD^2 / (1 + STD^2 SNR) for each pixel."""
    cfg = config(predict="x", elbo_samples=8)
    images = gaussian_images(400)
    table, of_levels = levels.bounds(network(gaussian, cfg), images, torch.zeros(400), cfg, torch.ones(32, 256), [T])
    snr = torch.linspace(MIN_LOGSNR, cfg.decoder_logsnr, T + 1, dtype=torch.float64).exp()
    nats = 0.5 * (snr[1:] - snr[:-1]) * STD**2 / (1 + STD**2 * snr[:-1])
    assert table[T]["diffusion"].mean().item() == pytest.approx(nats.sum().item() / math.log(2), rel=0.02)
    assert of_levels[T].sum().item() == pytest.approx(table[T]["diffusion"].mean().item())
    if T <= 16:
        assert_close(of_levels[T], nats / math.log(2), rtol=0.1, atol=1e-5)


def two_colours(x_t, alpha, sigma):
    """E[x | x_t] for pixels that are black or white, each as often."""
    return torch.tanh(alpha * x_t / sigma**2)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("data", ["gaussian", "two colours"])
def test_more_levels_come_down_to_the_limit(schedule, data):
    """Never below diffusion.elbo, ever nearer, and with many levels within the error of its sampling."""
    cfg = config(schedule=schedule, predict="x", elbo_samples=8)
    images = gaussian_images(300)
    if data == "two colours":
        images = (images > 127).byte() * 255
    histogram = diffusion.count_pixels(images, cfg)
    net = network(gaussian if data == "gaussian" else two_colours, cfg)
    counts = [2**k for k in range(13)]
    table, _ = levels.bounds(net, images, torch.zeros(300), cfg, histogram, counts)
    generator = seeded(cfg.seed)
    batches = images.split(diffusion.at_once(images.shape[1:]))
    alone = torch.cat([diffusion.elbo(net, x, None, cfg, histogram, generator)["bpd"].double() for x in batches])
    assert_close(table[math.inf]["bpd"], alone)
    means = [terms["bpd"].mean().item() for terms in table.values()]
    assert all(more > fewer for more, fewer in zip(means, means[1:], strict=False))
    other = torch.cat([diffusion.elbo(net, x, None, cfg, histogram, seeded(5))["bpd"] for x in images.split(100)])
    gap = table[4096]["bpd"] - other  # of other draws
    assert abs(gap.mean()) < 3 * gap.std() / len(images) ** 0.5 < 0.15
    assert means[0] > other.mean() + 1


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The limit is the figure of --mode eval; the picture has both panels."""
    run = tmp_path / "run"
    tiny.tiny_run("diffusion", run, "--eval-images", 6)
    capsys.readouterr()
    diffusion.main(["--mode", "eval", "--out", str(run)])
    wanted = capsys.readouterr().out.split("test bits/dim ")[1].split()[0]
    levels.main([str(run), "--images", "6", "--levels", "64"])
    said = capsys.readouterr().out
    assert f"T = inf: at most {wanted} " in said
    assert [line.split(":")[0] for line in said.splitlines()[1:-1]] == [f"T = {2**k}" for k in range(7)] + ["T = inf"]
    assert Image.open(run / "levels.png").size == (1000, 360)


@pytest.mark.parametrize(("argv", "word"), [(["--levels", "0"], "--levels"), (["--images", "0"], "--images")])
def test_what_cannot_be_is_refused(argv, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        levels.main([str(tmp_path), *argv])
    assert left.value.code == 2 and word in capsys.readouterr().err


def test_images_of_another_size_are_one_line(tmp_path, monkeypatch, capsys):
    tiny.tiny_run("diffusion", tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(levels.diffusion, "load_data", lambda *args: tiny.make_data(diffusion, shape=(1, 9, 9)))
    with pytest.raises(SystemExit):
        levels.main([str(tmp_path)])
    assert "[1, 9, 9]" in tiny.error_line(capsys.readouterr().err)
