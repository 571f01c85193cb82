"""Milliseconds of vae.py's training step, importance weights, and of an epoch: pytest tests/benchmarks --benchmark-only."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vae
from vae import VAE, Config, choose

KINDS = {"plain": {}, "flow": {"prior": "flow"}, "vamp": {"prior": "vamp"}, "iaf": {"posterior": "iaf"},
         "levels": {"levels": 3}}


def build(**fields):
    cfg = choose(Config(**fields), 28, 28)
    torch.manual_seed(0)
    return VAE(1, 28, 28, cfg).to(memory_format=torch.channels_last), cfg


@pytest.mark.parametrize("kind", KINDS)
def test_training_step(benchmark, kind):
    model, cfg = build(**KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, fused=True)
    x = torch.randint(0, 2, (cfg.batch_size, 1, 28, 28))

    def step():
        optimizer.zero_grad()
        (vae.loss(model, x, cfg)[0] / 784).backward()
        optimizer.step()
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights(benchmark, kind):
    """Of 1,000 draws: 250 images, 4 each, as in evaluation."""
    model, cfg = build(**KINDS[kind])
    x = torch.randint(0, 2, (250, 1, 28, 28))
    with torch.no_grad():
        assert benchmark(vae.log_weights, model, x, 4, cfg).isfinite().all()


class MLP(nn.Module):
    """784-400-20-400-784, as in pytorch/examples/vae."""

    def __init__(self):
        super().__init__()
        self.fc1, self.mu, self.logvar = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def loss(self, x):
        h = F.relu(self.fc1(x.flatten(1)))
        mu, logvar = self.mu(h), self.logvar(h)
        logits = self.fc4(F.relu(self.fc3(vae.draw(mu, logvar))))
        zeros = torch.zeros_like(mu)
        nats = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
        return nats / len(x) + vae.gaussian_kl(mu, logvar, zeros, zeros).mean()


class Files(torch.utils.data.Dataset):
    """An image at a time, through PIL and a transform to a tensor, as torchvision's MNIST with ToTensor."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i, 0].numpy())
        return torch.from_numpy(np.array(image, np.uint8, copy=True))[None].float().div(255)


@pytest.mark.parametrize("form", ["in memory", "DataLoader"])
def test_epoch(benchmark, form):
    """60,000 images in batches of 128 through one MLP: uint8 in memory, as the scripts hold them, or one image at a time."""
    n = 256 if benchmark.disabled else 60_000
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8)
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    loader = torch.utils.data.DataLoader(Files(images), 128, shuffle=True)

    def batches():
        return loader if form == "DataLoader" else (images[index] / 255 for index in torch.randperm(n).split(128))

    def epoch():
        for x in batches():
            optimizer.zero_grad()
            loss = model.loss(x)
            loss.backward()
            optimizer.step()
        return loss

    benchmark.group = "an epoch of an MLP"
    assert benchmark.pedantic(epoch, rounds=1 if benchmark.disabled else 3).isfinite()
