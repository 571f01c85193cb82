"""Milliseconds of gan.py's training step and of sampling: pytest tests/benchmarks --benchmark-only."""

import pytest
import torch
from bench import count

import gan
from gan import Config, Discriminator, Generator, choose, loss_d, loss_g


def build(H, **fields):
    cfg = choose(Config(**fields), H, H)
    torch.manual_seed(0)
    nets = (net(1, H, H, 10, cfg).to(memory_format=torch.channels_last) for net in (Generator, Discriminator))
    return *nets, cfg, torch.arange(cfg.batch_size) % 10


@pytest.mark.parametrize("loss", gan.LOSS_D)
@pytest.mark.parametrize("H", [8, 28])
def test_training_step(benchmark, H, loss):
    """A step of D and one of G."""
    G, D, cfg, y = build(H, loss=loss)
    y = y[:count(benchmark, len(y), 4)]
    optimizers = [torch.optim.Adam(net.parameters(), cfg.lr, (0.0, 0.99), fused=True) for net in (D, G)]
    x, z = torch.rand(len(y), 1, H, H) * 2 - 1, torch.randn(len(y), cfg.z_dim)

    def step():
        objectives = (lambda: loss_d(G, D, x, y, z, 0, cfg)[0]), (lambda: loss_g(G, D, x, y, z, cfg))
        for optimizer, objective in zip(optimizers, objectives, strict=True):
            optimizer.zero_grad()
            objective().mean().backward()
            optimizer.step()
        return torch.stack([p.norm() for p in G.parameters()])

    assert benchmark(step).isfinite().all()


def test_sampling(benchmark):
    """250 images of 28 x 28."""
    G, _, cfg, _ = build(28)
    assert benchmark(gan.sample, G, torch.randn(250, cfg.z_dim), torch.arange(250) % 10).shape == (250, 1, 28, 28)
