"""Milliseconds of flow.py's training step and samplers: pytest tests/benchmarks --benchmark-only.

Fixed-point inversion calls the network as often as the weights ask for, so it is timed on trained ones:
python flow.py --mode sample --inverse jacobi tells its calls and seconds.
"""

import pytest
import torch
from bench import count, peak_bytes

import flow
from flow import Config, Flow, choose

KINDS = {"additive": {"arch": "glow", "coupling": "additive"}, "affine": {"arch": "glow", "coupling": "affine"},
         "spline": {"arch": "glow"}, "affine, recompute": {"arch": "glow", "coupling": "affine", "recompute": True},
         "tarflow": {"arch": "tarflow"}}


def build(kind, n, **fields):
    cfg = choose(Config(**KINDS[kind] | fields), 28, 28)
    torch.manual_seed(0)
    model = Flow(1, 28, 28, 10, cfg).to(memory_format=torch.channels_last)
    return model, cfg, torch.arange(n) % 10


@pytest.mark.parametrize("kind", KINDS)
def test_training_step(benchmark, kind):
    n = count(benchmark, 32)
    model, cfg, y = build(kind, n)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, fused=True)
    x = torch.randint(0, 256, (n, 1, 28, 28))

    def step():
        optimizer.zero_grad()
        (-flow.log_likelihood(model, *flow.dequantize(model, x), y).mean() / 784).backward()
        optimizer.step()
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("kind", ["additive", "affine", "spline", "tarflow"])
def test_sampling(benchmark, kind):
    n = count(benchmark, 16)
    model, cfg, y = build(kind, n)
    eps = [torch.randn(n, *s) for s in model.f.noise_shapes]
    x, _ = benchmark(flow.sample, model.eval(), eps, y, cfg)
    assert x.shape == (n, 1, 28, 28) and x.isfinite().all()


@pytest.mark.parametrize("steps", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["affine", "affine, recompute"])
def test_memory_against_depth(benchmark, kind, steps):
    """Forward and backward at `steps` steps a scale; extra_info has the most MiB held at once beyond the weights."""
    n = count(benchmark, 32)
    model, _, y = build(kind, n, steps_per_scale=steps)
    x, parameters = torch.rand(n, 1, 28, 28) * 2 - 1, list(model.parameters())

    def forward_and_backward():
        return torch.autograd.grad(flow.log_density(model, x, y).mean(), parameters)

    assert all(g.isfinite().all() for g in benchmark(forward_and_backward))
    if not benchmark.disabled:
        benchmark.extra_info["peak_mib"] = round(peak_bytes(forward_and_backward) / 2**20, 1)
