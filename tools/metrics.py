"""The figures of tools/evaluate.py, as plain functions of features or images: no network, no file."""

import numpy as np
import torch

K = 5  # neighbours that set the radius of a ball, as in Naeem et al.
CHUNK = 100  # rows of distances in memory at once


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


def distances(x, y):
    """By differences, since |a|^2 - 2ab + |b|^2 would blur the ties that copies of train images make."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(x, k=K):
    """The distance of each of x (N,D) to its k-th neighbour in x: (N,)."""
    return torch.cat([distances(part, x).kthvalue(k + 1).values for part in x.split(CHUNK)])  # k + 1: itself is at 0


def manifold(real, fake, k=K, radius=None):
    """Density and coverage (Naeem et al. 2020, eq. 4 and 5), precision and recall (Kynkaanniemi et al. 2019, eq. 2).

    A ball round each of `real` (R,D) reaches to its k-th neighbour in `real`; its radii are `radius` where they are known.
    density (>= 0, about 1 when alike): how many balls hold a point of `fake` (N,D), on average, over k;
    coverage (in [0,1]): the share of balls that hold at least one; precision: the share of `fake` in at least one ball;
    recall: the share of `real` in a ball round one of `fake`, None where N <= k.
    """
    real, fake = (torch.as_tensor(x, dtype=torch.float64) for x in (real, fake))
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than k={k} real images, not {len(real)}")
    radius = radii(real, k) if radius is None else radius
    reach = radii(fake, k) if len(fake) > k else torch.zeros(len(fake), dtype=torch.float64)
    inside = 0
    precise = 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for x, its_reach in zip(fake.split(CHUNK), reach.split(CHUNK), strict=True):
        d = distances(x, real)  # (CHUNK,R)
        hit = d < radius
        inside += int(hit.sum())
        precise += int(hit.any(1).sum())
        covered |= hit.any(0)
        recalled |= (d < its_reach[:, None]).any(0)
    return {"density": inside / (k * len(fake)), "coverage": float(covered.double().mean()),
            "precision": precise / len(fake), "recall": float(recalled.double().mean()) if len(fake) > k else None}


def kernel_distance(x, y):
    """The unbiased estimate of MMD^2 (Gretton et al. 2012, eq. 3), k(a,b) = (ab/D + 1)^3; x: (N,D), y: (M,D), N, M >= 2."""
    x, y = (torch.as_tensor(f, dtype=torch.float64) for f in (x, y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(f):  # the mean over pairs of two different points
        every = sum(float(kernel(part, f).sum()) for part in f.split(CHUNK))
        itself = float(((f * f).sum(1) / f.shape[1] + 1).pow(3).sum())
        return (every - itself) / (len(f) * (len(f) - 1))

    between = sum(float(kernel(part, y).sum()) for part in x.split(CHUNK)) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def class_histogram(predicted, classes=10):
    """predicted: (N,) in {0..classes-1} -> counts (a list), entropy in nats in [0, log classes], its exponential."""
    counts = np.bincount(predicted, minlength=classes)
    p = counts[counts > 0] / counts.sum()
    entropy = max(0.0, float(-(p * np.log(p)).sum()))
    return counts.tolist(), entropy, float(np.exp(entropy))


def class_kl(counts, train_counts):
    """KL divergence in nats of the frequencies of classes from those of the train split; infinite where these lack a class."""
    p, q = (np.asarray(c) / np.sum(c) for c in (counts, train_counts))
    seen = p > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((p[seen] * np.log(p[seen] / q[seen])).sum()))


def nearest_images(x, train, k=3):
    """x, train: uint8 (N,...), (M,...), M >= 2 -> distances of x to the k nearest of train, nearest first, their indices."""
    k = min(k, len(train))
    x = x.flatten(1)
    train = train.flatten(1)
    a = x.float()
    least = torch.empty(len(x), 0)
    where = torch.empty(len(x), 0, dtype=torch.long)
    for start in range(0, len(train), 10_000):
        b = train[start:start + 10_000].float()
        d = b.square().sum(1) - 2 * a @ b.T  # squared, but for |a|^2, and rounded: they choose the nearest, no more
        least = torch.cat([least, d], 1)
        where = torch.cat([where, torch.arange(start, start + len(b)).expand(len(x), -1)], 1)
        least, order = least.topk(min(k + 2, least.shape[1]), largest=False)
        where = where.gather(1, order)
    exact = torch.stack([(train[i].double() - row.double()).norm(dim=1) for row, i in zip(x, where, strict=True)])
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k], where.gather(1, order)[:, :k]
