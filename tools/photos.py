"""A folder of photographs to train on without a network: random crops of the two that are in scikit-learn.

  python tools/photos.py [--folder photos] [--size 128] [--count 512]
  python vqgan.py --dataset photos --width 32 --batch-size 8 --stage1 1000 --steps 2500

The photographs, a temple and a flower, have 640 x 427 pixels. Of each, `count` crops to train on come from its left three
quarters and an eighth as many crops to test on from the rest (from the last `size` columns where these are more than a
quarter), so that no pixel is in both. The crops are PNG files in FOLDER/train/temple, FOLDER/test/flower and so on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def crops(image, size, n, test, rng):
    """n windows of size x size pixels at random places of image (H,W,3): n arrays (size,size,3)."""
    H, W, _ = image.shape
    edge = W - max(size, W // 4)  # the columns before it are to train on
    first = edge if test else 0
    last = W - size if test else edge - size
    tops = rng.integers(H - size + 1, size=n)
    lefts = rng.integers(first, last + 1, size=n)
    return [image[i:i + size, j:j + size] for i, j in zip(tops, lefts, strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("photos"))
    parser.add_argument("--size", type=int, default=128, help="pixels a side, at most 320")
    parser.add_argument("--count", type=int, default=512, help="crops of each photograph to train on")
    args = parser.parse_args(argv)
    if not 1 <= args.size <= 320:
        sys.exit(f"--size {args.size}: must be 1 to 320, so that crops to train and to test on do not overlap")
    if args.folder.exists():
        sys.exit(f"--folder {args.folder}: is there already")
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for split, n in (("train", args.count), ("test", max(args.count // 8, 1))):
        for name, image in zip(("temple", "flower"), load_sample_images().images, strict=True):
            folder = args.folder / split / name
            folder.mkdir(parents=True)
            for i, crop in enumerate(crops(image, args.size, n, split == "test", rng)):
                Image.fromarray(crop).save(folder / f"{i:04d}.png")
    print(f"{args.folder}: {2 * args.count} crops to train on and {2 * max(args.count // 8, 1)} to test on")


if __name__ == "__main__":
    main()
