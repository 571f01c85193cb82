"""Milliseconds of vqgan.py's steps, of sampling, and of quantisation as the codebook grows: pytest tests/benchmarks."""

import pytest
import torch
from bench import count, peak_bytes

import vqgan
from vqgan import Autoencoder, Config, Discriminator, Prior, choose, loss_autoencoder, loss_discriminator, nll, sample


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "simvq"])
def test_step_of_stage_1(benchmark, quantizer):
    """A step of the autoencoder and one of the discriminator, 32 images of 28 x 28."""
    cfg = choose(Config(quantizer=quantizer), 28, 28)
    model, D = Autoencoder(1, cfg).to(memory_format=torch.channels_last), Discriminator(1)
    optimizers = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True) for net in (model, D)]
    x = torch.rand(count(benchmark, 32), 1, 28, 28) * 2 - 1

    def step():
        optimizers[0].zero_grad()
        D.requires_grad_(False)
        loss, _, x_hat = loss_autoencoder(model, D, x, cfg.disc_start, cfg)
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        D.requires_grad_(True)
        loss_discriminator(D, x, x_hat).backward()
        optimizers[1].step()
        return loss.detach()

    assert benchmark(step).isfinite()


def test_step_of_stage_2(benchmark):
    """32 grids of 7 x 7 codes, without the optimizer."""
    cfg = Config()
    n = count(benchmark, 32)
    prior, indices, y = Prior(7, 7, 10, cfg), torch.randint(256, (n, 7, 7)), torch.arange(n) % 10

    def step():
        prior.zero_grad()
        nll(prior, indices, y).mean().backward()
        return prior.out.weight.grad

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("grid", [(7, 7), (16, 16)], ids=str)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "naive"])
def test_sampling(benchmark, cached, grid):
    """16 grids of codes."""
    if benchmark.disabled and not cached and grid == (16, 16):
        pytest.skip("slow, so only where it is timed")
    cfg = Config()
    prior = Prior(*grid, 10, cfg).eval()
    n = count(benchmark, 16)
    noise = torch.rand(n, *grid)
    assert benchmark(sample, prior, torch.arange(n) % 10, noise, cfg, cached=cached).shape == (n, *grid)


@pytest.mark.parametrize("K", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("form", ["kernels", "cdist"])
def test_quantisation(benchmark, form, K):
    """The codes of 32 x 16 x 16 vectors of 16 numbers among K; the most bytes held at once are in the extra info."""
    z, codebook = torch.randn(count(benchmark, 32 * 256, 256), 16), torch.randn(K, 16)
    search = {"kernels": lambda: vqgan.nearest_code(z, codebook)[1], "cdist": lambda: torch.cdist(z, codebook).argmin(1)}[form]
    benchmark.extra_info["peak_mib"] = round(peak_bytes(search) / 2**20, 1)
    assert (benchmark(search) == torch.cdist(z, codebook).argmin(1)).float().mean() > 0.999
