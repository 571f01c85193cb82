"""How close are generated images to real ones? One small fixed classifier per data set answers, in seconds on a CPU.

  python tools/evaluate.py SAMPLES.npz --dataset digits|mnist|fashion_mnist|stacked_mnist [--data-dir data] [--json]

SAMPLES.npz holds `images` (uint8 {0..255}, N,H,W,C) and maybe `labels` (integers {0..9}, N). The program prints:
- frechet: the Frechet distance (Heusel et al. 2017, arXiv:1706.08500) of two Gaussians, fitted to the features of the
  samples and of the whole train split. Our features are not Inception's: never compare with a published FID.
- density, coverage (Naeem et al. 2020, arXiv:2002.09797): fidelity and diversity, from balls that reach to the k=5th
  neighbour of each of 10,000 fixed train images (1,500 of digits). Coverage grows with n: compare it at equal n only.
- classes: the histogram of predicted classes, its entropy in nats and perplexity (10 when all classes are as frequent).
- label accuracy: where there are labels, the share of samples whose predicted class is their label.
- floor: the same of min(n, test size) real test images. The distance is biased upwards, by about 1/n, so `ratio` is the
  distance of as many samples over the floor's. 1: as good as new real images. Below: suspect copies of train images,
  which score 0.5 (digits, mnist) and 0.8 (fashion_mnist) since the classifier has seen them.

stacked_mnist (three digits as the channels of one image, Metz et al. 2017, arXiv:1611.02163, sec. 3.3.1) has figures of its
own: how many of the 1,000 triples of digits occur, as mnist's classifier sees each channel, and the KL divergence of the
triples' frequencies from equal ones in nats. 26,000 samples are the custom. Also those of as many real stacked images.

The D=64 features are the last hidden layer, in float32; moments and distances are in float64. The train moments lie
beside the weights in tools/classifiers/NAME.pt, whose SHA-256 is written below. They were made by
  python tools/evaluate.py --train-classifier --dataset NAME                 # seed 0, two CPU cores
                 time     test accuracy   floor at the whole test split: frechet, density, coverage
  digits         11 s     100.00%         0.691, 0.969, 0.591 (n = 297)
  mnist          3 min    99.46%          0.0374, 0.993, 0.958 (n = 10,000)
  fashion_mnist  4 min    92.79%          0.0132, 0.999, 0.971 (n = 10,000)
Numbers of two classifiers do not compare, and one trained on another machine differs in its last bits: the hashes
change only when all published numbers are made anew.
"""

import argparse
import hashlib
import io
import json
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts, from whatever directory this is run

from diffusion import load_data

WEIGHTS = Path(__file__).resolve().parent / "classifiers"
SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}  # H, W, C
SHA256 = {
    "digits": "ee169929eea868e1e0f829d8e1736558bcbad5869c2add6779a5754138df145e",
    "mnist": "f35273575a0a63d4b8b586673e91f8dbbf7f39b6c9fc91ff4d5546a4bdf9e97a",
    "fashion_mnist": "735f205be844595770a3eb1324481a7e0fff1f6d665aa1db5eb0a70df1291932",
}
D = 64  # dimension of the features
K = 5  # neighbours that set the radius of a ball, as in the paper
REFERENCE = 10_000  # train images with a ball, at most
CHUNK = 100  # images, or rows of distances, in memory at once


# ---- the classifier ----


def block(c_in, c_out):
    """(B,c_in,H,W) -> (B,c_out,H/2,W/2)"""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))


class Classifier(nn.Module):
    """Three convolutions and two linear layers; `mean`, `cov` are the moments of the train split's features."""

    def __init__(self, dataset):
        super().__init__()
        cells = (SHAPES[dataset][0] // 8) ** 2  # 1 of digits, 9 of 28x28
        self.convolutions = nn.Sequential(block(1, 32), block(32, 64), block(64, 64))  # B 1 H W -> B 64 H/8 W/8
        self.hidden = nn.Sequential(nn.Linear(64 * cells, D, bias=False), nn.BatchNorm1d(D), nn.ReLU())
        self.head = nn.Linear(D, 10)
        self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))
        self.register_buffer("cov", torch.zeros(D, D, dtype=torch.float64))

    def forward(self, x):
        """x: (B,1,H,W) in [0,1] -> features (B,D) >= 0"""
        return self.hidden(self.convolutions(x.contiguous(memory_format=torch.channels_last)).flatten(1))


def load_classifier(dataset):
    """The committed classifier in eval mode; ValueError where its file is not the one this program was written with."""
    path = WEIGHTS / f"{dataset}.pt"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[dataset]:
        raise ValueError(f"{path} does not have the SHA-256 written in evaluate.py: its numbers would not compare")
    classifier = Classifier(dataset)
    classifier.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return classifier.to(memory_format=torch.channels_last).eval()


@torch.no_grad()
def features(images, classifier):
    """images: uint8 {0..255} (N,H,W,1), array or tensor -> float32 array (N,D)."""
    chunks = torch.as_tensor(images).permute(0, 3, 1, 2).split(CHUNK)
    return torch.cat([classifier(x.float() / 255) for x in chunks]).numpy()


@torch.no_grad()
def predict(f, classifier):
    """f: features (N,D) -> predicted classes (N,)."""
    return classifier.head(torch.as_tensor(f)).argmax(1).numpy()


def augment(x, shift, flip):
    """Each image of x (B,1,H,W) moved by up to `shift` pixels each way, and with `flip` mirrored by chance."""
    B, _, H, W = x.shape
    rows, cols = (torch.randint(2 * shift + 1, (B, 1)) + torch.arange(size) for size in (H, W))
    if flip:
        cols = torch.where(torch.rand(B, 1) < 0.5, cols, cols.flip(1))
    x = F.pad(x, (shift,) * 4)
    return x[torch.arange(B)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def train_classifier(dataset, data_dir="data"):
    """Trains on the train split, writes tools/classifiers/NAME.pt, prints the test accuracy and the hash for SHA256."""
    torch.manual_seed(0)
    data = load_data(dataset, data_dir)
    epochs, shift = {"digits": (30, 1), "mnist": (5, 2), "fashion_mnist": (6, 0)}[dataset]
    classifier = Classifier(dataset).to(memory_format=torch.channels_last)
    batches = -(-len(data.train) // 100)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * batches)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for i in torch.randperm(len(data.train)).split(100):
            x = augment(data.train[i].float() / 255, shift, flip=dataset == "fashion_mnist")
            loss = F.cross_entropy(classifier.head(classifier(x)), data.train_labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        print(f"epoch {epoch}/{epochs}  loss {total:.4f}", file=sys.stderr)
    classifier.eval()
    mean, cov = moments(features(nhwc(data.train), classifier))
    classifier.mean.copy_(torch.from_numpy(mean))
    classifier.cov.copy_(torch.from_numpy(cov))
    correct = predict(features(nhwc(data.test), classifier), classifier) == data.test_labels.numpy()
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{dataset}.pt"
    torch.save({name: value.contiguous() for name, value in classifier.state_dict().items()}, path)
    print(f"test accuracy {correct.mean():.2%} ({path})")
    print(f'SHA256["{dataset}"] = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')


# ---- the metrics ----


def moments(f):
    """f: (N,D), N >= 2 -> mean (D,), unbiased covariance (D,D), float64."""
    f = np.asarray(f, dtype=np.float64)
    return f.mean(0), np.cov(f, rowvar=False)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1-mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2) (Dowson & Landau 1982), a float >= 0.

    With S = cov1^1/2, the trace of (cov1 cov2)^1/2 is the sum of the roots of the eigenvalues of S cov2 S. This matrix
    is symmetric and positive semi-definite, so singular covariances need no epsilon and nothing turns complex.
    """
    values, vectors = np.linalg.eigh(cov1)
    S = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(S @ cov2 @ S).clip(0)).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def density_coverage(real, fake, k=K):
    """Naeem et al. 2020, eq. 4 and 5: a ball round each of `real` (R,D) reaches to its k-th neighbour in `real`.

    density (>= 0, about 1 when alike): how many balls hold a point of `fake` (N,D), on average, over k;
    coverage (in [0,1]): the share of balls that hold at least one.
    """
    real, fake = (torch.as_tensor(x, dtype=torch.float64) for x in (real, fake))
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than k={k} real images, not {len(real)}")
    # by differences, since |a|^2 - 2ab + |b|^2 would blur the ties that copies of train images make
    distances = partial(torch.cdist, x2=real, compute_mode="donot_use_mm_for_euclid_dist")
    radius = torch.cat([distances(x).kthvalue(k + 1).values for x in real.split(CHUNK)])  # k + 1: itself is at 0
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for x in fake.split(CHUNK):
        hit = distances(x) < radius  # (CHUNK,R)
        inside += int(hit.sum())
        covered |= hit.any(0)
    return inside / (k * len(fake)), float(covered.double().mean())


def class_histogram(predicted):
    """predicted: (N,) in {0..9} -> counts (list of 10), entropy in nats in [0, log 10], its exponential in [1,10]."""
    counts = np.bincount(predicted, minlength=10)
    p = counts[counts > 0] / counts.sum()
    entropy = max(0.0, float(-(p * np.log(p)).sum()))
    return counts.tolist(), entropy, float(np.exp(entropy))


# ---- the evaluation ----


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def subset(n, m):
    """m of n indices, always the same ones, in random order since samples are often sorted by class."""
    return np.random.RandomState(0).permutation(n)[:m]


def check(images, dataset, labels):
    """ValueError, in words for the user, unless the arrays are what the docstring of this file asks for."""
    if dataset not in SHAPES:
        raise ValueError(f"unknown dataset {dataset!r} (choose from {', '.join(SHAPES)})")
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    if images.shape[1:] != SHAPES[dataset]:
        wanted = ",".join(map(str, SHAPES[dataset]))
        raise ValueError(f"images for {dataset} must have shape (N,{wanted}), not {images.shape}")
    if len(images) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(images)}")
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"labels must be in 0..9, not {labels.min()}..{labels.max()}")


def distance_to_train(f, classifier):
    """f: features (N,D), N >= 2 -> their Frechet distance to those of the whole train split."""
    return frechet_distance(*moments(f), classifier.mean.numpy(), classifier.cov.numpy())


def measure(f, classifier, reference, labels=None):
    """f: features (N,D), reference: features (R,D) -> dict of the metrics of this set."""
    predicted = predict(f, classifier)
    result = {"n": len(f), "frechet": distance_to_train(f, classifier)}
    result["density"], result["coverage"] = density_coverage(reference, f)
    result["class_counts"], result["class_entropy"], result["class_perplexity"] = class_histogram(predicted)
    result["label_accuracy"] = None if labels is None else float((predicted == labels).mean())
    return result


def evaluate(images, dataset, data_dir="data", labels=None):
    """images: uint8 (N,H,W,C), labels: integers (N,) or None -> dict of plain values, as --json prints it."""
    images, labels = np.asarray(images, order="C"), None if labels is None else np.asarray(labels)
    check(images, dataset, labels)
    classifier = load_classifier(dataset)
    data = load_data(dataset, data_dir)
    f = features(images, classifier)
    reference = features(nhwc(data.train)[subset(len(data.train), REFERENCE)], classifier)
    m = min(len(f), len(data.test))
    rows = subset(len(data.test), m)
    floor = measure(features(nhwc(data.test)[rows], classifier), classifier, reference, data.test_labels[rows].numpy())
    result = {"dataset": dataset, "reference_points": len(reference), **measure(f, classifier, reference, labels)}
    result["frechet_at_floor_n"] = distance_to_train(f[subset(len(f), m)], classifier)
    result["ratio"] = result["frechet_at_floor_n"] / floor["frechet"]
    return {**result, "floor": floor}


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
    lines = [f"{result['dataset']} train split; density and coverage: {result['reference_points']:,} images of it"]
    for name, row in (("samples", result), ("floor: real test images", result["floor"])):
        accuracy = row["label_accuracy"]
        lines += [
            f"{name}, n = {row['n']:,}" + ("" if accuracy is None else f", label accuracy {accuracy:.4f}"),
            f"  frechet {row['frechet']:.4g}, density {row['density']:.4f}, coverage {row['coverage']:.4f}",
            f"  classes {' '.join(map(str, row['class_counts']))}, "
            f"entropy {row['class_entropy']:.3f}, perplexity {row['class_perplexity']:.2f}",
        ]
    m, distance = result["floor"]["n"], result["frechet_at_floor_n"]
    return "\n".join([*lines, f"ratio {result['ratio']:.2f} = {distance:.4g} of {m:,} samples / floor"])


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


def main(argv=None):
    """The command line; returns the exit code."""

    def fail(message):  # one line below, without argparse's usage
        raise ValueError(message)

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES.npz")
    parser.add_argument("--dataset", required=True, choices=[*SHAPES, "stacked_mnist"])
    parser.add_argument("--data-dir", default="data", help="where mnist and fashion_mnist lie or go [data]")
    parser.add_argument("--json", action="store_true", help="print the whole result as one JSON object")
    parser.add_argument("--train-classifier", action="store_true", help="remake tools/classifiers/NAME.pt instead")
    try:
        args = parser.parse_args(argv)
        if args.train_classifier and args.dataset not in SHAPES:
            fail(f"--train-classifier: {args.dataset} is seen by mnist's classifier")
        if args.train_classifier:
            train_classifier(args.dataset, args.data_dir)
            return 0
        if args.samples is None:
            fail("the following arguments are required: SAMPLES.npz")
        images, labels = read_samples(args.samples)
        if args.dataset == "stacked_mnist":
            print((json.dumps if args.json else report)(evaluate_stacked(images, args.data_dir)))
            return 0
        result = evaluate(images, args.dataset, args.data_dir, labels)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if len(images) <= D:
        why = "the covariance is singular and the distance strongly biased"
        print(f"warning: {len(images)} images for {D} features: {why}", file=sys.stderr)
    print(json.dumps(result) if args.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
