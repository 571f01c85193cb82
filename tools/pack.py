"""Read a folder of images once and keep it as one file, which starts in seconds.

  python tools/pack.py FOLDER FILE.npz --image-size 64
  python diffusion.py --dataset FILE.npz          # the same numbers as --dataset FOLDER --image-size 64

FILE.npz holds `images` and `test_images`, uint8 {0..255} of (N,H,W,C): upright, cropped, mixed and split as the scripts do it.
Where the folder has classes, it also holds `labels` and `test_labels`, int64 of (N,), and `names`, a string for each class.
It is not compressed, so that it is read at the speed of the disk. It is written beside FILE.npz and renamed when it is whole.
Nothing looks at the folder again: make the file anew after the folder has changed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts, from whatever directory this is run

from diffusion import fail, load_folder, write


def arrays_of(data):
    """What --dataset FILE.npz reads, of what load_folder gives: a dictionary from names to arrays."""
    arrays = {"images": data.train.permute(0, 2, 3, 1).numpy(), "test_images": data.test.permute(0, 2, 3, 1).numpy()}
    if data.names:
        labels = {"labels": data.train_labels.numpy(), "test_labels": data.test_labels.numpy()}
        return arrays | labels | {"names": np.array(data.names)}
    return arrays


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of images, as --dataset takes it")
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="the file to write; one that is there is replaced")
    parser.add_argument("--image-size", type=int, default=0, help="pixels a side, 0 leaves them as they are (0 to 4096)")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        fail(f"FOLDER {args.folder}: is not a folder")
    if args.file.suffix != ".npz" or args.file.is_dir():
        fail(f"FILE.npz {args.file}: must be a file whose name ends in .npz")
    if not 0 <= args.image_size <= 4096:
        fail(f"--image-size {args.image_size}: must be from 0 to 4096")
    try:  # what cannot be written is found before the folder is read
        args.file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.file.parent).close()
    except OSError as e:
        fail(f"cannot write {args.file}: {e.strerror or e}", 1)
    data = load_folder(args.folder, args.image_size)
    N, C, H, W = data.train.shape
    what = (f"{N} images to train on, {len(data.test)} to test on, of {C} x {H} x {W}; "
            f"{len(data.names) or 'no'} classes{data.note}")
    write(args.file, lambda f: np.savez(f, **arrays_of(data)), what)


if __name__ == "__main__":
    main()
