"""How close are generated images to real ones? One small fixed network per data set answers.

  python tools/evaluate.py SAMPLES.npz --dataset digits|mnist|fashion_mnist|stacked_mnist [--json]
  python tools/evaluate.py runs/NAME                       # its samples.npz and its data set
  python tools/evaluate.py IMAGES --dataset FOLDER|FILE.npz|cifar10 --image-size 64

SAMPLES.npz holds `images` (uint8 {0..255}, N,H,W,C) and maybe `labels` (integers {0..9}, N). IMAGES
is a folder of image files; where they lie in folders named like the classes, these are the labels.
tools/features.py says which network sees which data, and the program prints it. It prints also:
- frechet: the Frechet distance (Heusel et al. 2017, arXiv:1706.08500) of two Gaussians, fitted to
  the features of the samples and of the whole train split. Our features are not Inception's: never
  compare with a published FID.
- density, coverage (Naeem et al. 2020, arXiv:2002.09797): fidelity and diversity, from balls that
  reach to the k=5th neighbour of each of 10,000 fixed train images (1,500 of digits). Coverage grows
  with n: compare it at equal n only.
- precision, recall (Kynkaanniemi et al. 2019, arXiv:1904.06991): the share of the samples that lie
  in a ball of those train images, and the share of these that lie in a ball of the samples.
- kernel distance (KID, Binkowski et al. 2018, arXiv:1801.01401): the unbiased squared MMD of samples
  and those train images with the kernel (xy/64 + 1)^3. It has no bias for small n, and may be
  negative by chance.
- classes: the histogram of predicted classes, its entropy in nats and perplexity (10 when all
  classes are as frequent), and its KL divergence from the frequencies of the train split, in nats.
- label accuracy: where there are labels, the share of samples whose predicted class is their label.
- floor: the same of min(n, test size) real test images. The distance is biased upwards, by about
  1/n, so `ratio` is the distance of as many samples over the floor's. 1: as good as new real images.
  Below: suspect copies of train images, which score 0.5 (digits, mnist) and 0.8 (fashion_mnist)
  since the classifier has seen them.
- with --cas, classification accuracy score (Ravuri & Vinyals 2019, arXiv:1905.10887): the accuracy
  on real test images of a classifier trained on the samples and their labels, beside that of one
  trained on as many real train images. It takes a minute or two.
- with --nearest FILE.png, a picture of the samples that are closest to a train image. A sample is
  memorised if its distance to the nearest one, pixel by pixel, is under a third of that to the second
  (Yoon et al. 2023). At most 1,000 samples are looked at.
- with --inception, the FID and KID of InceptionV3, which do compare with published ones. It needs
  torch-fidelity and its weights; a CPU takes hours for a whole train split.

stacked_mnist (three digits as the channels of one image, Metz et al. 2017, arXiv:1611.02163, sec.
3.3.1) has figures of its own: how many of the 1,000 triples of digits occur, as mnist's classifier
sees each channel, and the KL divergence of the triples' frequencies from equal ones in nats. 26,000
samples are the custom. Also those of as many real stacked images.

The D=64 features are the last hidden layer, in float32; moments and distances are in float64. The
train moments lie beside the weights in tools/classifiers/NAME.pt. These were made by
  python tools/evaluate.py --train-classifier --dataset NAME                 # seed 0, two CPU cores
                 time     test accuracy   floor of the whole test split: frechet, density, coverage
  digits         11 s     100.00%         0.691, 0.969, 0.591 (n = 297)
  mnist          3 min    99.46%          0.0374, 0.993, 0.958 (n = 10,000)
  fashion_mnist  4 min    92.79%          0.0132, 0.999, 0.971 (n = 10,000)
Numbers of two networks do not compare, and one trained on another machine differs in its last bits:
the hashes in features.py change only when all published numbers are made anew.
"""

import argparse
import json
import math
import os
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from features import (
    SHAPES,
    Classifier,
    D,
    accuracy_of,
    epochs_for,
    features,
    fit_classes,
    inception_extractor,
    inception_features,
    inception_moments,
    load_classifier,
    nhwc,
    own_network,
    predict,
    train_classifier,
)
from metrics import K, class_histogram, class_kl, frechet_distance, kernel_distance, manifold, moments, nearest_images, radii

from diffusion import load_data, read_image, save_grid

REFERENCE = 10_000  # train images with a ball, at most
LOOKED_AT = 1_000  # samples whose nearest train images are looked for, at most
SHOWN = 10  # of them in the picture
OTHERS = "cifar10, a folder of images or a FILE.npz"


# ---- figures that take more than features ----


def accuracy_score(images, labels, data):
    """Classification accuracy score: train a classifier on images uint8 (N,H,W,C) and labels (N,), test on the test split."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(images.shape[1:], len(data.names)).to(memory_format=torch.channels_last)
        x = torch.as_tensor(images).permute(0, 3, 1, 2)
        shift = max(x.shape[2] // 14, 1)
        fit_classes(classifier, x, torch.as_tensor(labels).long(), epochs_for(len(x), 60_000), shift)
    return accuracy_of(classifier, data)


def show_nearest(images, train, path):
    """Write the picture of --nearest -> how many samples were looked at, the share that is memorised, the least ratio."""
    x = torch.as_tensor(images)[subset(len(images), LOOKED_AT)].permute(0, 3, 1, 2)
    d, where = nearest_images(x, train)
    ratio = torch.where(d[:, 0] == 0, 0.0, d[:, 0] / d[:, 1])  # of a copy of an image that is there twice too
    rows = [torch.cat([x[i][None], train[where[i]]]) for i in ratio.argsort()[:SHOWN]]
    grid = torch.cat(rows)
    save_grid(grid, path, len(rows[0]))
    return {"n": len(x), "memorised": float((ratio < 1 / 3).double().mean()), "least_ratio": float(ratio.min())}


# ---- the evaluation ----


def subset(n, m):
    """m of n indices, always the same ones, in random order since samples are often sorted by class."""
    return np.random.RandomState(0).permutation(n)[:m]


def check(images, dataset, shape, classes, labels):
    """ValueError, in words for the user, unless the arrays are what the docstring of this file asks for."""
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    if images.shape[1:] != shape:
        wanted = ",".join(map(str, shape))
        raise ValueError(f"images for {dataset} must have shape (N,{wanted}), not {images.shape}")
    if len(images) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(images)}")
    if labels is not None and classes:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels must be in 0..{classes - 1}, not {labels.min()}..{labels.max()}")


def distance_to_train(f, classifier):
    """f: features (N,D), N >= 2 -> their Frechet distance to those of the whole train split."""
    return frechet_distance(*moments(f), classifier.mean.numpy(), classifier.cov.numpy())


def measure(f, classifier, reference, radius, train_counts, labels=None):
    """f: features (N,D), reference: features (R,D) and the radii of their balls -> dict of the metrics of this set."""
    found = manifold(reference, f, radius=radius)
    result = {"n": len(f), "frechet": distance_to_train(f, classifier)}
    result |= {name: found[name] for name in ("density", "coverage")}
    result |= dict.fromkeys(("class_counts", "class_entropy", "class_perplexity", "label_accuracy", "class_kl"))
    if classifier.classes:
        predicted = predict(f, classifier)
        histogram = class_histogram(predicted, classifier.classes)
        result["class_counts"], result["class_entropy"], result["class_perplexity"] = histogram
        result["label_accuracy"] = None if labels is None else float((predicted == labels).mean())
        kl = class_kl(histogram[0], train_counts)
        result["class_kl"] = kl if math.isfinite(kl) else None  # a class that the train split does not have
    return result | {name: found[name] for name in ("precision", "recall")} | {"kernel_distance": kernel_distance(f, reference)}


def known(dataset):
    return dataset in (*SHAPES, "cifar10") or Path(dataset).is_dir() or dataset.endswith(".npz") and Path(dataset).is_file()


def evaluate(images, dataset, data_dir="data", labels=None, image_size=0, cas=False, nearest=None, inception=False):
    """images: uint8 (N,H,W,C) or a folder, labels: integers (N,) or None -> dict of plain values, as --json prints it."""
    if not known(dataset):
        raise ValueError(f"unknown dataset {dataset!r} (choose from {', '.join(SHAPES)}, {OTHERS})")
    committed = dataset in SHAPES and image_size in (0, SHAPES[dataset][0])
    data = None if committed else load_data(dataset, data_dir, image_size)
    shape = SHAPES[dataset] if committed else tuple(nhwc(data.train).shape[1:])
    names = tuple("0123456789") if committed else data.names
    if isinstance(images, Path):
        images, labels = read_folder(images, shape, names)
    images, labels = np.asarray(images, order="C"), None if labels is None else np.asarray(labels)
    check(images, dataset, shape, len(names), labels)
    if cas and (labels is None or not names):
        raise ValueError("--cas needs samples with labels, of data with classes")
    if inception:
        inception = inception_extractor()
    classifier = load_classifier(dataset) if committed else own_network(dataset, data, data_dir)
    data = data or load_data(dataset, data_dir)
    f = features(images, classifier)
    chosen = nhwc(data.train)[subset(len(data.train), REFERENCE)]
    reference = torch.as_tensor(features(chosen, classifier), dtype=torch.float64)
    if len(reference) <= K:
        raise ValueError(f"density and coverage need more than k={K} train images, not {len(reference)}")
    train_counts = np.bincount(data.train_labels, minlength=len(names))
    measured = partial(measure, classifier=classifier, reference=reference, radius=radii(reference), train_counts=train_counts)
    m = min(len(f), len(data.test))
    rows = subset(len(data.test), m)
    floor = measured(features(nhwc(data.test)[rows], classifier), labels=data.test_labels[rows].numpy())
    result = {"dataset": dataset, "reference_points": len(reference), **measured(f, labels=labels)}
    result["frechet_at_floor_n"] = distance_to_train(f[subset(len(f), m)], classifier)
    result["ratio"] = result["frechet_at_floor_n"] / floor["frechet"] if floor["frechet"] else None
    result |= {"floor": floor, "features": classifier.note}
    if cas:
        i = subset(len(data.train), len(images))
        real = accuracy_score(nhwc(data.train)[i].numpy(), data.train_labels[i], data)
        result["cas"] = {"samples": accuracy_score(images, labels, data), "real": real, "real_images": len(i)}
    if nearest:
        result["nearest"] = show_nearest(images, data.train, nearest)
    if inception:
        mean, cov = inception_moments(data, *inception, data_dir)
        f, real = (inception_features(x, inception[0]) for x in (images, chosen))
        result["inception"] = {"fid": frechet_distance(*moments(f), mean, cov), "kid": kernel_distance(f, real)}
    return result


def modes(images, classifier):
    """images: uint8 (N,28,28,3) -> of 1,000 triples of digits how many occur, and KL(their frequencies | equal), nats."""
    digits = [predict(features(images[..., c:c + 1], classifier), classifier) for c in range(3)]
    p = np.bincount(np.array([100, 10, 1]) @ digits, minlength=1000) / len(images)
    return {"n": len(images), "modes": int((p > 0).sum()), "kl": float((p[p > 0] * np.log(1000 * p[p > 0])).sum())}


def evaluate_stacked(images, data_dir="data"):
    """images: uint8 (N,28,28,3) -> modes(images), and under "floor" those of as many stacks of three random test images."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28, 3) or not len(images):
        raise ValueError(f"images for stacked_mnist must be uint8 of shape (N,28,28,3), not {images.dtype} of {images.shape}")
    classifier, test = load_classifier("mnist"), nhwc(load_data("mnist", data_dir).test).numpy()
    real = test[np.random.RandomState(0).randint(len(test), size=(3, len(images)))]  # (3,N,28,28,1)
    return {"dataset": "stacked_mnist", **modes(images, classifier), "floor": modes(np.concatenate(real, -1), classifier)}


def report(result):
    """The result as a few lines of text."""
    if result["dataset"] == "stacked_mnist":
        return "\n".join(f"{name}, n = {row['n']:,}: {row['modes']} of 1000 modes, KL {row['kl']:.4f} nats"
                         for name, row in (("samples", result), ("floor: real stacks", result["floor"])))
    lines = [f"{result['dataset']} train split; density and coverage: {result['reference_points']:,} images of it",
             f"features: {result['features']}"]
    for name, row in (("samples", result), ("floor: real test images", result["floor"])):
        accuracy = row["label_accuracy"]
        recall = "unknown" if row["recall"] is None else f"{row['recall']:.4f}"
        lines += [
            f"{name}, n = {row['n']:,}" + ("" if accuracy is None else f", label accuracy {accuracy:.4f}"),
            f"  frechet {row['frechet']:.4g}, density {row['density']:.4f}, coverage {row['coverage']:.4f}",
            f"  kernel distance {row['kernel_distance']:.4g}, precision {row['precision']:.4f}, recall {recall}",
        ]
        if row["class_counts"]:
            kl = "infinite" if row["class_kl"] is None else f"{row['class_kl']:.4f}"
            lines += [
                f"  classes {' '.join(map(str, row['class_counts'][:20]))}{' ...' * (len(row['class_counts']) > 20)}, "
                f"entropy {row['class_entropy']:.3f}, perplexity {row['class_perplexity']:.2f}",
                f"  KL of the classes from the train split's {kl} nats",
            ]
    if score := result.get("cas"):
        lines.append(f"classification accuracy score {score['samples']:.4f}; of {score['real_images']:,} real images "
                     f"{score['real']:.4f}")
    if found := result.get("nearest"):
        lines.append(f"memorised: {found['memorised']:.2%} of {found['n']:,} samples; least ratio of the distances to the "
                     f"nearest and the second train image {found['least_ratio']:.3f}")
    if found := result.get("inception"):
        lines.append(f"InceptionV3: FID {found['fid']:.4g}, KID {found['kid']:.4g}")
    ratio = "" if result["ratio"] is None else f"ratio {result['ratio']:.2f} = "
    return "\n".join([*lines, f"{ratio}{result['frechet_at_floor_n']:.4g} of {result['floor']['n']:,} samples / floor"])


# ---- the command line ----


def read_samples(path):
    """SAMPLES.npz -> images, labels or None."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file")
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "images" not in arrays:
        raise ValueError(f"{path} has no array `images`")
    return arrays["images"], arrays.get("labels")


def image_files(folder):
    """The image files in a folder at any depth, in the order of their names; hidden ones do not count."""
    known = Image.registered_extensions()
    found = sorted(Path(top, name) for top, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return [path for path in found if path.suffix.lower() in known]


def read_folder(folder, shape, names):
    """A folder of images -> uint8 (N,H,W,C) of this shape, and labels (N,) where each lies in a folder named like a class."""
    H, W, C = shape
    files = image_files(folder)
    images = np.empty((len(files), H, W, C), np.uint8)
    for i, path in enumerate(files):
        try:
            images[i] = np.atleast_3d(read_image(path, (W, H)).convert("L" if C == 1 else "RGB"))
        except Exception as error:  # whatever a decoder raises
            raise ValueError(f"{path} cannot be read: {error}") from error
    folders = [path.relative_to(folder).parts[0] for path in files]
    labels = np.array([names.index(name) for name in folders]) if set(folders) <= set(names) else None
    return images, labels


def read_config(folder):
    """The settings of the run in a folder, or of the run whose sampled/ it is; {} where it is neither."""
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            try:
                config = json.loads(path.read_text())
                kinds = {"dataset": str, "image_size": int, "data_dir": str}
                return {name: kind(config[name]) for name, kind in kinds.items()}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not that of a run: {error!r}") from error
    return {}


def find_samples(path):
    """What the command line names -> images (an array or a folder of files), labels or None, settings of the run or {}."""
    if not path.is_dir():
        return *read_samples(path), {}
    config = read_config(path)
    if (path / "samples.npz").is_file():
        return *read_samples(path / "samples.npz"), config
    if config:
        raise ValueError(f"no file {path / 'samples.npz'}; --mode sample makes one in {path / 'sampled'}")
    if not image_files(path):
        raise ValueError(f"no file samples.npz and no image in {path}")
    return path, None, {}


def main(argv=None):
    """The command line; returns the exit code."""

    def fail(message):  # one line below, without argparse's usage
        raise ValueError(message)

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES.npz", help="or a run, or a folder of images")
    parser.add_argument("--dataset", help=f"{', '.join(SHAPES)}, stacked_mnist, {OTHERS}; of a run its own")
    parser.add_argument("--data-dir", help="where data sets and trained networks lie or go; of a run its own [data]")
    parser.add_argument("--image-size", type=int, help="pixels a side that the data is resized to; of a run its own [0: none]")
    parser.add_argument("--json", action="store_true", help="print the whole result as one JSON object")
    parser.add_argument("--cas", action="store_true", help="classification accuracy score too: a minute or two")
    parser.add_argument("--nearest", type=Path, metavar="FILE.png", help="draw the samples closest to train images, and these")
    parser.add_argument("--inception", action="store_true", help="FID and KID of InceptionV3 too, by torch-fidelity")
    parser.add_argument("--train-classifier", action="store_true", help="remake tools/classifiers/NAME.pt instead")
    try:
        args = parser.parse_args(argv)
        if args.dataset and args.dataset != "stacked_mnist" and not known(args.dataset):
            choices = f"{', '.join(SHAPES)}, stacked_mnist, {OTHERS}"
            fail(f"argument --dataset: invalid choice: {args.dataset!r} (choose from {choices})")
        if args.train_classifier and args.dataset not in SHAPES:
            fail(f"--train-classifier: one of {', '.join(SHAPES)}, not {args.dataset}")
        if args.train_classifier:
            train_classifier(args.dataset, args.data_dir or "data")
            return 0
        if args.samples is None:
            fail("the following arguments are required: SAMPLES.npz")
        images, labels, config = find_samples(args.samples)
        dataset = args.dataset or config.get("dataset") or fail("the following arguments are required: --dataset")
        size = args.image_size
        if size is None:
            size = config.get("image_size", 0) if dataset == config.get("dataset") else 0
        if not 0 <= size <= 4096:
            fail(f"--image-size {size}: must be from 0 to 4096")
        data_dir = args.data_dir or config.get("data_dir", "data")
        if dataset == "stacked_mnist":
            if args.cas or args.nearest or args.inception:
                fail("stacked_mnist: takes neither --cas, --nearest nor --inception")
            print((json.dumps if args.json else report)(evaluate_stacked(images, data_dir)))
            return 0
        result = evaluate(images, dataset, data_dir, labels, size, args.cas, args.nearest, args.inception)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if result["n"] <= D:
        why = "the covariance is singular and the distance strongly biased"
        print(f"warning: {result['n']} images for {D} features: {why}", file=sys.stderr)
    print(json.dumps(result) if args.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
