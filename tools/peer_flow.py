"""The peer beside flow.py: normflows' multi-scale Glow, trained on MNIST for so long; test bits/dim over 784, ms a step.

In an environment of its own: pip install -r requirements.txt normflows==1.7.3, then
  python tools/peer_flow.py --minutes 10
Three scales of eight steps, 64 hidden channels, batch 64, Adamax 1e-3, as in its own example; images padded to 32 x 32 with
zeros, uniformly dequantised. The padding is paid for in its own bits: over 784 dimensions the figure is an upper bound.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import normflows as nf
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flow import load_data

L, K, HIDDEN = 3, 8, 64


def build():
    bases, merges, flows = [], [], []
    for i in range(L):
        steps = [nf.flows.GlowBlock(2 ** (L + 1 - i), HIDDEN, split_mode="channel", scale=True) for _ in range(K)]
        flows.append([*steps, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        side = 32 // 2 ** (L - i) if i > 0 else 32 // 2**L
        bases.append(nf.distributions.DiagGaussian((2 ** (L - i) if i > 0 else 2 ** (L + 1), side, side)))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--test-images", type=int, default=10_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    data, model = load_data("mnist", args.data_dir), build()
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5)

    def nats(x):  # -log p of [0,1) images, a bound by uniform noise, (B,)
        return -model.log_prob((F.pad(x, (2, 2, 2, 2)).float() + torch.rand(len(x), 1, 32, 32)) / 256, None)

    start, steps, spent = None, 0, 0.0
    while spent < 60 * args.minutes:
        loss = nats(data.train[torch.randint(len(data.train), (64,))]).mean()
        if start is None:
            start = time.monotonic()  # after actnorm has seen its first batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps, spent = steps + 1, time.monotonic() - start
    with torch.no_grad():
        test = data.test[:args.test_images]
        total = sum(nats(x).sum().item() for x in test.split(250)) / len(test)
    bpd = (total + 1024 * math.log(256)) / 784 / math.log(2)
    print(f"{steps} steps, {1000 * spent / steps:.1f} ms each, {sum(p.numel() for p in model.parameters())} parameters, "
          f"{bpd:.3f} bits/dim")


if __name__ == "__main__":
    main()
