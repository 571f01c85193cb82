"""The peer beside diffusion.py: denoising-diffusion-pytorch.

  runs/peers/venv/bin/python tools/peer_diffusion.py --minutes 10     # the environment is that of tools/peers.py
  python tools/evaluate.py runs/peers/diffusion-peer/samples.npz --dataset mnist

The network is its Unet(dim=32, dim_mults=(1, 2, 4)). The training is that of its Trainer (Adam 1e-4, averaged weights
0.995 every 10 steps, clipping at 1), with batch 64 and the data in memory. Samples take 20 evaluations (DDIM). It gives no
likelihood. --patch folds pixels into channels, and --mults has a factor for each level: so the network becomes like ours.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peer

UNUSED = ("accelerate", "torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid",
          "pytorch_fid.fid_score", "pytorch_fid.inception")  # of its Trainer


def main(argv=None):
    parser = peer.arguments(__doc__, "diffusion", 64)
    parser.add_argument("--mults", type=int, nargs="+", default=[1, 2, 4], help="factors of 32 channels [1 2 4]")
    parser.add_argument("--patch", type=int, default=1, help="pixels a side that become channels [1]")
    args = parser.parse_args(argv)
    peer.stub(*UNUSED)
    library = peer.need("denoising_diffusion_pytorch")
    EMA = peer.need("ema_pytorch").EMA

    data = peer.begin(args)
    net = library.Unet(dim=32, dim_mults=tuple(args.mults), channels=args.patch**2, flash_attn=False)
    model = library.GaussianDiffusion(net, image_size=28 // args.patch, timesteps=1000, sampling_timesteps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)

    def step():
        x = peer.draw(data, args.batch_size).float() / 255  # [0,1]
        model(F.pixel_unshuffle(x, args.patch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    trained = peer.train(step, args)
    ema.ema_model.eval()
    peer.finish(args, "denoising-diffusion-pytorch", trained, peer.parameters(net),
                lambda n: F.pixel_shuffle(ema.ema_model.sample(batch_size=n), args.patch))


if __name__ == "__main__":
    main()
