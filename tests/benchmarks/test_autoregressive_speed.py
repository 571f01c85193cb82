"""Milliseconds of autoregressive.py's training step and samplers: pytest tests/benchmarks --benchmark-only.

Fixed-point sampling takes as many passes as the network's weights ask for, so it is timed on trained ones:
python autoregressive.py --mode sample --sampler jacobi tells its passes and seconds.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoregressive
from autoregressive import Autoregressive, Config, GatedBlock, choose, log_likelihood, sample

ARCHS = ("transformer", "pixelcnn", "made")


def build(H=28, **fields):
    cfg = choose(Config(**{"output": "bernoulli", "patch": 4, "dropout": 0.0} | fields), H, H)
    torch.manual_seed(0)
    net = Autoregressive(cfg.patch**2, H // cfg.patch, H // cfg.patch, 10, cfg)
    return net.to(memory_format=torch.channels_last), cfg


class OtherForm(GatedBlock):
    """The same block, whose two convolutions, above(v) and left(h), are written in another way."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.r = block.r
        self.v_conv, self.h_conv, self.v_to_h, self.h_out = block.v_conv, block.h_conv, block.v_to_h, block.h_out
        self.label, self.dropout = block.label, block.dropout

    def forward(self, v, h, y):
        label_v, label_h = self.label(y)[:, :, None, None].chunk(2, 1)
        u = self.above(v)
        a, b = (u + label_v).chunk(2, 1)
        v = v + torch.tanh(a) * torch.sigmoid(b)
        a, b = (self.left(h) + self.v_to_h(u) + label_h).chunk(2, 1)
        g = self.dropout(torch.tanh(a) * torch.sigmoid(b))
        return v, h + self.h_out(g), g


class WholeKernels(OtherForm):
    """Square kernels whose dead taps are multiplied by 0."""

    def __init__(self, block):
        super().__init__(block)
        width, k = block.h_out.in_channels, block.h_conv.kernel_size[1]
        self.v_conv, self.h_conv = (nn.Conv2d(width, 2 * width, k, padding=k // 2) for _ in range(2))
        mask = torch.zeros(2, k, k)
        mask[0, :k // 2 + 1], mask[1, k // 2, :k // 2 + 1] = 1, 1
        self.register_buffer("mask", mask)
        with torch.no_grad():
            self.v_conv.weight[:, :, :k // 2 + 1] = block.v_conv.weight
            self.h_conv.weight[:, :, k // 2:k // 2 + 1] = block.h_conv.weight
            self.v_conv.bias[:], self.h_conv.bias[:] = block.v_conv.bias, block.h_conv.bias

    def above(self, v):
        return F.conv2d(v, self.v_conv.weight * self.mask[0], self.v_conv.bias, padding=self.r)

    def left(self, h):
        return F.conv2d(h, self.h_conv.weight * self.mask[1], self.h_conv.bias, padding=self.r)


class CroppedStacks(OtherForm):
    """Kernels of the live taps, as ours, over zeros on all sides; what is too much is cropped. So do some public ones."""

    def above(self, v):
        return F.conv2d(v, self.v_conv.weight, self.v_conv.bias, padding=self.r)[:, :, :v.shape[2]]

    def left(self, h):
        live = self.h_conv.weight[:, :, :, :self.r + 1]
        return F.conv2d(h, live, self.h_conv.bias, padding=(0, self.r))[:, :, :, :h.shape[3]]


def time_step(benchmark, net, cfg, H):
    optimizer = torch.optim.Adam(net.parameters(), cfg.lr, fused=True)
    x, y = torch.randint(0, 2, (cfg.batch_size, 1, H, H)), torch.randint(0, 10, (cfg.batch_size,))

    def step():
        optimizer.zero_grad()
        (-log_likelihood(net, x, y, cfg).mean() / H**2).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
        return norm

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
def test_training_step(benchmark, arch):
    time_step(benchmark, *build(arch=arch), 28)


class Contiguous(Autoregressive):
    """In PyTorch's default memory format."""

    def forward(self, x, y):
        e = self.embed(x).contiguous() if self.embedding else None
        return self.head(self.trunk(self.see(x).contiguous(), y), e)


FORMS = {"live taps": lambda block: block, "whole kernels": WholeKernels, "cropped stacks": CroppedStacks}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patch, kernel", [(4, 3), (4, 5), (1, 3), (1, 5)])
def test_gated_pixelcnn(benchmark, patch, kernel, form, layout):
    """Against the same layers with masked square kernels, and with two stacks padded on all sides and cropped."""
    if benchmark.disabled and patch == 1:
        pytest.skip("large, so only where it is timed")
    benchmark.group = f"gated PixelCNN, training step, patch {patch}, kernel {kernel}"
    net, cfg = build(arch="pixelcnn", patch=patch, kernel=kernel)
    x, y = torch.randint(0, 2, (4, patch**2, 28 // patch, 28 // patch)), torch.arange(4)
    expected = net(x, y)
    net.trunk.blocks = nn.ModuleList(map(FORMS[form], net.trunk.blocks))
    net = net.to(memory_format=getattr(torch, layout))
    if layout == "contiguous_format":
        net.__class__ = Contiguous
    torch.testing.assert_close(net(x, y), expected)
    time_step(benchmark, net, cfg, 28)


@pytest.mark.parametrize("sampler, n, H", [*(("cached", 16, H) for H in (8, 16, 28, 56)), ("cached", 64, 28), ("naive", 16, 8),
                                           ("naive", 16, 28), ("naive", 64, 28)])
@pytest.mark.parametrize("arch", ARCHS)
def test_sampling(benchmark, arch, sampler, n, H):
    if benchmark.disabled and H > 8:
        pytest.skip("large, so only where it is timed")
    benchmark.group = f"sampling {n} images of {H} x {H}, {arch}"
    net, cfg = build(H, arch=arch, sampler=sampler)
    x, _ = benchmark.pedantic(sample, (net.eval(), torch.arange(n) % 10, torch.rand(n, 1, H, H), cfg),
                              rounds=1 if sampler == "naive" else 3, warmup_rounds=int(sampler == "cached"))
    assert x.shape == (n, 1, H, H) and autoregressive.to_pixels(x, cfg).unique().tolist() == [0, 255]
