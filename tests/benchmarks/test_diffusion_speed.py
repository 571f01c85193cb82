"""Milliseconds of a training step and of sampling: pytest tests/benchmarks --benchmark-only."""

import pytest
import torch

import diffusion
from diffusion import Config, UNet, choose

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@pytest.fixture(params=SHAPES)
def case(request):
    """The default network and a batch of the data set's shape."""
    shape, cfg = SHAPES[request.param], choose(Config())
    torch.manual_seed(0)
    net = UNet(shape[0], 10, 1 if shape[1] < 16 else 2, cfg).to(memory_format=torch.channels_last)
    x, y = torch.rand(cfg.batch_size, *shape) * 2 - 1, torch.randint(0, 10, (cfg.batch_size,))
    return net, x, y, cfg


def test_training_step(benchmark, case):
    net, x, y, cfg = case
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, fused=True)

    def step():
        optimizer.zero_grad()
        diffusion.loss(net, x, y, cfg).mean().backward()
        optimizer.step()
        return [p.grad.norm().item() for p in net.parameters() if p.grad is not None]

    assert torch.tensor(benchmark(step)).isfinite().all()


def test_sampling(benchmark, case):
    net, x, y, cfg = case
    out = benchmark(diffusion.sample, net, torch.randn_like(x), y, cfg)
    assert out.shape == x.shape and out.abs().max() <= 1
