"""The peer beside flow.py: the multi-scale Glow of normflows.

  runs/peers/venv/bin/python tools/peer_flow.py --minutes 10          # the environment is that of tools/peers.py

Three scales of eight steps, 64 hidden channels, batch 64, Adamax 1e-3, as in its own example. Images are padded to 32 x 32
with zeros and uniformly dequantised. The padding is paid for in its own bits: over 784 dimensions the figure is an upper
bound.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peer

L, K, HIDDEN = 3, 8, 64


def build(nf):
    bases = []
    merges = []
    flows = []
    for i in range(L):
        steps = [nf.flows.GlowBlock(2 ** (L + 1 - i), HIDDEN, split_mode="channel", scale=True) for _ in range(K)]
        flows.append([*steps, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        side = 32 // 2 ** (L - i) if i > 0 else 32 // 2**L
        bases.append(nf.distributions.DiagGaussian((2 ** (L - i) if i > 0 else 2 ** (L + 1), side, side)))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def main(argv=None):
    args = peer.arguments(__doc__, "flow", 64).parse_args(argv)
    nf = peer.need("normflows")
    data = peer.begin(args)
    model = build(nf)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5)

    def nats(x):  # of uint8 images (B,1,28,28), a bound by one draw of uniform noise -> (B,)
        v = (peer.pad(x).float() + torch.rand(len(x), 1, 32, 32)) / 256  # [0,1)
        return 1024 * math.log(256) - model.log_prob(v, None)

    def step():
        loss = nats(peer.draw(data, args.batch_size)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def sample(n):
        v, _ = model.sample(n)
        return peer.crop(v * 256).floor() / 255  # the levels that are modelled

    trained = peer.train(step, args)
    model.eval()
    bpd = peer.mean_over(nats, data.test) / 784 / math.log(2)
    peer.finish(args, "normflows", trained, peer.parameters(model), sample, bpd=bpd, kind="at most")


if __name__ == "__main__":
    main()
