"""What the programs of the peers share. A peer is another library's model of one of the six families.

tools/peer_FAMILY.py trains the peer of a family and prints what it found as one JSON object, its last
line. All of them take the flags below, which are those of our scripts too. tools/peers.py makes the
environment that they need, and runs all of them:

  python tools/peers.py --models none                         # makes the environment in runs/peers/venv
  runs/peers/venv/bin/python tools/peer_flow.py --minutes 10
"""

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from diffusion import load_data, save_images

INSTALL = "python tools/peers.py --models none"  # makes the environment
AT_ONCE = 100  # images that are sampled, or evaluated, together


class Stub(types.ModuleType):
    """A module that is imported by a package, and of which nothing is called."""

    __path__ = ()
    __spec__ = None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or (lambda *args, **kwargs: None)


def stub(*names):
    """Put stubs in the place of modules that an imported package names at its top and that are not needed here."""
    for name in names:
        sys.modules[name] = Stub(name)


def need(name):
    """The module of a package of the peers; one line and exit code 2 where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        print(f"error: no package {missing}; {INSTALL} makes an environment with the peers", file=sys.stderr)
        raise SystemExit(2) from error


def arguments(doc, family, batch_size):
    """The parser of a peer's program; batch_size is that of its own examples."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion_mnist"), help="[mnist]")
    parser.add_argument("--data-dir", default="data", help="folder where data sets are looked for [data]")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training by the clock [10]")
    parser.add_argument("--steps", type=int, help="of training, in place of --minutes")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"images a step [{batch_size}]")
    parser.add_argument("--num-samples", type=int, default=500, help="images to write, 0: none [500]")
    parser.add_argument("--eval-images", type=int, default=0, help="the first so many test images, 0: all [0]")
    parser.add_argument("--seed", type=int, default=0, help="of everything random [0]")
    out = Path("runs", "peers", f"{family}-peer")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of samples.npz [{out}]")
    return parser


def begin(args):
    """The data of a run, images uint8 (N,1,28,28) in {0..255}, with the test images that count; seeds what is random."""
    torch.manual_seed(args.seed)
    data = load_data(args.dataset, args.data_dir)
    return data._replace(test=data.test[:args.eval_images or None])


def draw(data, n):
    """n random training images, uint8 (n,1,28,28)."""
    return data.train[torch.randint(len(data.train), (n,))]


def binarise(x, generator=None):
    """x uint8 in {0..255} -> float {0, 1}: 1 with probability x / 255, as vae.py and autoregressive.py draw them."""
    return (torch.rand(x.shape, generator=generator) * 255 < x).float()


def pad(x):
    """(B,1,28,28) -> (B,1,32,32), zeros around it: for networks that halve an image more than twice."""
    return F.pad(x, (2, 2, 2, 2))


def crop(x):
    """The inverse of pad."""
    return x[..., 2:-2, 2:-2]


def train(step, args):
    """Call step() for --minutes by the clock, or --steps times -> how often, and the seconds of all."""
    start = time.monotonic()
    steps = 0
    seconds = 0.0
    while steps < args.steps if args.steps else seconds < 60 * args.minutes:
        step()
        steps += 1
        seconds = time.monotonic() - start
    return steps, seconds


def parameters(*networks):
    """How many numbers are learned."""
    return sum(p.numel() for network in networks for p in network.parameters())


@torch.no_grad()
def finish(args, package, trained, learned, sample, **likelihood):
    """Draw --num-samples images and say what was found.

    trained: what train returned; learned: the number of parameters; sample(n) -> images float (n,1,28,28) in [0,1];
    likelihood: `nats` or `bpd` of a test image, and `kind`, the words that belong to it.
    """
    parts = [sample(min(AT_ONCE, args.num_samples - i)) for i in range(0, args.num_samples, AT_ONCE)]
    if parts:
        args.out.mkdir(parents=True, exist_ok=True)
        save_images((torch.cat(parts).clamp(0, 1) * 255).round().byte(), args.out / "samples.npz")
    steps, seconds = trained
    found = {"package": f"{package} {importlib.metadata.version(package)}", "steps": steps, "seconds": seconds,
             "parameters": learned}
    print(json.dumps(found | likelihood))


def mean_over(nats, images):
    """The mean of nats(part) (B,) over images (N,...), in parts of AT_ONCE."""
    with torch.no_grad():
        return sum(nats(part).double().sum().item() for part in images.split(AT_ONCE)) / len(images)


def importance_bound(log_w):
    """log of the mean of the importance weights exp(log_w) (k,B) -> (B,)."""
    return torch.logsumexp(log_w.double(), 0) - np.log(len(log_w))
