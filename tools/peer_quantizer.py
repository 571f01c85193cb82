"""The peer beside vqgan.py: VectorQuantize of vector-quantize-pytorch in the same autoencoder, with the same transformer.

The environment is that of tools/peers.py:
  runs/peers/venv/bin/python tools/peer_quantizer.py --dataset mnist --steps 601 --stage1 600 \
    --disc-weight 0 --out runs/peer-quantizer
and any other flags of vqgan.py. The class takes the place of vqgan.VQ, with its own defaults, or with those its README
advises against dead codes (--tuned: k-means at the start, codes of fewer than 2 vectors replaced, decay 0.99). What vqgan.py
prints at the end compares. The last line is a JSON object, as that of every peer.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import peer

import vqgan

PACKAGE = "vector-quantize-pytorch"
TUNED = {"kmeans_init": True, "threshold_ema_dead_code": 2, "decay": 0.99} if "--tuned" in sys.argv else {}


class Peer(nn.Module):
    """z (B,h,w,D) -> z_q, indices, loss, as vqgan.VQ."""

    def __init__(self, cfg):
        super().__init__()
        VectorQuantize = peer.need("vector_quantize_pytorch").VectorQuantize
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


def main():
    peer.need("vector_quantize_pytorch")
    vqgan.main()
    folder = vqgan.Run.out
    if (folder / "metrics.jsonl").is_file():
        final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        model, prior, _ = vqgan.load(folder)
        print(json.dumps({"package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}", "steps": final["step"],
                          "seconds": final["seconds"], "parameters": peer.parameters(model, prior),
                          "bits_per_code": final["test_bits_per_code"], "kind": "of the codes"}))


if __name__ == "__main__":
    vqgan.VQ = Peer
    vqgan.update_ema = torch.no_grad()(follow)
    sys.argv = [a for a in sys.argv if a != "--tuned"]
    vqgan.launch(main)
