"""The peer beside diffusion.py in the README: denoising-diffusion-pytorch, trained for so long, sampled into peer-DATASET.npz.

In an environment of its own: pip install denoising-diffusion-pytorch==2.3.4 ema-pytorch tqdm pillow, then
  python tools/peer_diffusion.py mnist --minutes 10 && python tools/evaluate.py peer-mnist.npz --dataset mnist
The settings are its Trainer's (Adam 1e-4, averaged weights 0.995 every 10 steps, clipping at 1), with batch 64 and the data in
memory; the Trainer itself wants torchvision, whose names are stubs here as nothing of it is called.
"""

import argparse
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion import load_data


class Stub(types.ModuleType):
    __path__, __spec__ = (), None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or (lambda *args, **kwargs: None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("mnist", "fashion_mnist"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--num-samples", type=int, default=500)
    args = parser.parse_args()
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid", "pytorch_fid.fid_score",
                 "pytorch_fid.inception"):
        sys.modules[name] = Stub(name)
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    torch.manual_seed(0)
    x = load_data(args.dataset, args.data_dir).train
    net = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, flash_attn=False)
    model = GaussianDiffusion(net, image_size=28, timesteps=1000, sampling_timesteps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema, start, steps = EMA(model, beta=0.995, update_every=10), time.monotonic(), 0
    while time.monotonic() - start < 60 * args.minutes:
        model(x[torch.randint(len(x), (64,))].float() / 255).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        steps += 1
    print(f"{steps} steps, {sum(p.numel() for p in net.parameters())} parameters")
    ema.ema_model.eval()
    with torch.no_grad():
        images = torch.cat([ema.ema_model.sample(batch_size=min(100, args.num_samples - i))
                            for i in range(0, args.num_samples, 100)])
    np.savez_compressed(f"peer-{args.dataset}", images=(images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    main()
