"""The peer beside vqgan.py's quantizers: vector-quantize-pytorch's VectorQuantize in the same autoencoder, the same steps.

In an environment of its own: pip install -r requirements.txt vector-quantize-pytorch==1.32.0, then
  python tools/peer_quantizer.py --dataset mnist --steps 601 --stage1 600 --disc-weight 0 --out runs/peer-quantizer
and any other flags of vqgan.py. The class takes the place of vqgan.VQ, with its own defaults, or with those its README
advises against dead codes (--tuned: k-means at the start, codes of fewer than 2 vectors replaced, decay 0.99). What vqgan.py
prints at the end compares.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vqgan

TUNED = {"kmeans_init": True, "threshold_ema_dead_code": 2, "decay": 0.99} if "--tuned" in sys.argv else {}


class Peer(nn.Module):
    """z (B,h,w,D) -> z_q, indices, loss, as vqgan.VQ."""

    def __init__(self, cfg):
        super().__init__()
        self.vq = VectorQuantize(cfg.code_dim, cfg.n_codes, commitment_weight=cfg.beta, **TUNED)

    def forward(self, z):
        z_q, indices, loss = self.vq(z.flatten(1, 2))
        return z_q.view_as(z), indices.view(z.shape[:-1]), loss.sum()

    def lookup(self, indices):
        return self.vq.get_codes_from_indices(indices)


def follow(ema, model, step, share, average=vqgan.update_ema):
    """Its codebook is a buffer, which the averaged autoencoder takes over as it stands."""
    average(ema, model, step, share)
    for mine, its in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


if __name__ == "__main__":
    vqgan.VQ, vqgan.update_ema = Peer, torch.no_grad()(follow)
    sys.argv = [a for a in sys.argv if a != "--tuned"]
    vqgan.launch(vqgan.main)
