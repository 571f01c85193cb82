"""tools/evaluate.py: each metric against an independent computation, the committed classifiers, all error messages."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
nets = sys.modules["features"]  # tools/features.py
maths = sys.modules["metrics"]  # tools/metrics.py

ACCURACY = {"digits": 1.0, "mnist": 0.9946, "fashion_mnist": 0.9279}  # as stated in the docstring of the tool
PLACES = [Path(p) for p in (os.environ.get("M2_DATA_DIR"), ROOT / "data", ROOT.parent / "shared" / "data") if p]


def load(dataset):
    place = next((p for p in PLACES if len(list((p / dataset).glob("*ubyte*"))) >= 4), None)
    if dataset != "digits" and place is None:
        pytest.skip(f"no copy of {dataset} in data/ or M2_DATA_DIR")
    return tool.load_data(dataset, place)


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    return data.test.permute(0, 2, 3, 1).numpy(), data.test_labels.numpy()


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "samples.npz", **arrays)
        return str(tmp_path / "samples.npz")

    return write


def gaussian(rng, d, rank=None):
    a = rng.normal(size=(d, rank or d))
    return rng.normal(size=d), a @ a.T


# ---- Frechet distance ----


@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_frechet_is_scipys(d):
    rng = np.random.default_rng(d)
    (mu1, cov1), (mu2, cov2) = gaussian(rng, d), gaussian(rng, d)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(root))
    assert tool.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)
    assert tool.frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-8)


def test_frechet_closed_form_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mu1, mu2, std1, std2 = rng.normal(size=9), rng.normal(size=9), rng.random(9), rng.random(9)
    std1[0] = std2[1] = std1[2] = std2[2] = 0  # and degenerate in some directions
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert tool.frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_frechet_of_identical_gaussians_is_zero(rank):
    mu, cov = gaussian(np.random.default_rng(1), 64, rank)
    assert 0 <= tool.frechet_distance(mu, cov, mu, cov) < 1e-5 * np.trace(cov)


def test_frechet_of_singular_covariances():
    rng = np.random.default_rng(2)
    (mu1, cov1), (mu2, cov2) = gaussian(rng, 32, 3), gaussian(rng, 32, 5)
    exact = tool.frechet_distance(mu1, cov1, mu2, cov2)
    eye = 1e-10 * np.eye(32)
    root = scipy.linalg.sqrtm((cov1 + eye) @ (cov2 + eye))
    assert exact == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(root)), rel=1e-4)
    zero = np.zeros((32, 32))
    assert tool.frechet_distance(mu1, zero, mu2, cov2) == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(cov2))


def test_moments_are_in_float64():
    f = np.random.default_rng(3).normal(1000, 0.01, size=(500, 2)).astype(np.float32)
    mean, cov = tool.moments(f)
    assert mean.dtype == cov.dtype == np.float64
    centred = f.astype(np.float64) - f.astype(np.float64).mean(0)
    np.testing.assert_allclose(cov, centred.T @ centred / 499, rtol=1e-9)


# ---- density and coverage ----


def brute_force(real, fake, k):
    """The definitions of Naeem et al., one pair at a time."""
    inside, covered = 0, 0
    for i, x in enumerate(real):
        radius = sorted(np.linalg.norm(x - other) for j, other in enumerate(real) if j != i)[k - 1]
        hits = sum(np.linalg.norm(x - y) < radius for y in fake)
        inside, covered = inside + hits, covered + (hits > 0)
    return inside / (k * len(fake)), covered / len(real)


@pytest.mark.parametrize("k, n_real, n_fake", [(1, 40, 30), (3, 6, 50), (5, 130, 1), (5, 110, 120)])
def test_density_and_coverage_are_brute_force(k, n_real, n_fake, monkeypatch):
    rng = np.random.default_rng(n_real)
    real, fake = rng.normal(size=(n_real, 4)), rng.normal(0.3, 1.2, size=(n_fake, 4))
    expected = brute_force(real, fake, k)
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(maths, "CHUNK", chunk)
        found = tool.manifold(real, fake, k)
        assert (found["density"], found["coverage"]) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_of_copies():
    """Copies put many points exactly on the border of a ball, which is not inside."""
    real = np.random.default_rng(0).normal(100, 1, size=(150, 64)).astype(np.float32)
    found = tool.manifold(real, real, 5)
    assert found["density"] == pytest.approx(1.0, abs=1e-12)  # itself and the nearest 4, of the 5
    assert found["coverage"] == found["precision"] == found["recall"] == 1.0
    assert set(tool.manifold(real, real + 1000, 5).values()) == {0.0}


def test_too_few_real_images_for_k():
    with pytest.raises(ValueError, match="more than k=5 real images, not 5"):
        tool.manifold(np.zeros((5, 2)), np.zeros((9, 2)))


@pytest.mark.parametrize("k, n_real, n_fake", [(1, 40, 30), (5, 130, 6), (5, 110, 120)])
def test_precision_and_recall_are_brute_force(k, n_real, n_fake, monkeypatch):
    """Kynkaanniemi et al. 2019, eq. 2, one pair at a time; each is the other with real and fake exchanged."""
    rng = np.random.default_rng(n_real)
    real, fake = rng.normal(size=(n_real, 4)), rng.normal(0.5, 0.7, size=(n_fake, 4))

    def inside(points, centres):
        radius = [sorted(np.linalg.norm(x - y) for y in centres)[k] for x in centres]
        hits = [any(np.linalg.norm(x - y) < r for y, r in zip(centres, radius, strict=True)) for x in points]
        return sum(hits) / len(points)

    expected = inside(fake, real), inside(real, fake)
    assert 0 < expected[1] < 1
    for chunk in (7, 1000):
        monkeypatch.setattr(maths, "CHUNK", chunk)
        found = tool.manifold(real, fake, k)
        assert (found["precision"], found["recall"]) == pytest.approx(expected, rel=1e-12)


def test_figures_of_the_prdc_package():
    """Those of prdc 0.2 (Naeem et al.'s own) for these points, k = 5."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 8)), rng.normal(0.3, 0.8, size=(200, 8))
    expected = {"precision": 0.99, "recall": 0.6733333333333333, "density": 1.345, "coverage": 0.8566666666666667}
    assert tool.manifold(real, fake) == pytest.approx(expected, rel=1e-9)


def test_recall_needs_more_samples_than_k():
    assert tool.manifold(np.random.default_rng(0).normal(size=(9, 2)), np.zeros((5, 2)))["recall"] is None


# ---- kernel distance


@pytest.mark.parametrize("n, m, d", [(2, 3, 1), (30, 20, 5)])
def test_kernel_distance_is_brute_force(n, m, d, monkeypatch):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d)), rng.normal(0.5, 2, size=(m, d))

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / d + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (n * m)
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(maths, "CHUNK", chunk)
        assert tool.kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_has_no_bias():
    """Over all pairs of halves of a set the mean is the closed form: 0 where both have one distribution, at any n."""
    rng = np.random.default_rng(0)
    same = [tool.kernel_distance(rng.normal(size=(8, 3)), rng.normal(size=(8, 3))) for _ in range(3000)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(3000) and min(same) < 0
    # one dimension, x = +-1 by chance, y = 0: E k(x,x') = (2^3 + 0^3) / 2, k(y,y') = k(x,y) = 1
    apart = [tool.kernel_distance(rng.choice([-1.0, 1.0], (4, 1)), np.zeros((3, 1))) for _ in range(4000)]
    assert np.mean(apart) == pytest.approx(4 + 1 - 2, abs=4 * np.std(apart) / np.sqrt(4000))


def test_kl_of_the_classes():
    assert tool.class_kl([2, 2, 0], [10, 10, 20]) == pytest.approx(np.log(2))
    assert tool.class_kl([5, 5], [1, 1]) == 0.0
    assert tool.class_kl([3, 1], [1, 1]) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert tool.class_kl([1, 1], [4, 0]) == np.inf


# ---- the nearest train images


def test_nearest_images_are_brute_force():
    rng = np.random.default_rng(0)
    train = torch.from_numpy(rng.integers(0, 256, (10_050, 1, 3, 4), dtype=np.uint8))
    x = torch.from_numpy(rng.integers(0, 256, (20, 1, 3, 4), dtype=np.uint8))
    x[3] = train[10_020]
    every = (x.double()[:, None] - train.double()[None]).square().sum((2, 3, 4)).sqrt()
    d, where = tool.nearest_images(x, train)
    torch.testing.assert_close(d, every.sort(1).values[:, :3])
    assert d[3, 0] == 0 and where[3, 0] == 10_020
    torch.testing.assert_close(every.gather(1, where), d)
    assert tool.nearest_images(x, train[:2])[0].shape == (20, 2)


def test_copies_of_train_images_are_found(tmp_path, capsys):
    """A fifth of the samples are train images with a little noise: they are the memorised ones, and stand in the picture."""
    data = load("digits")
    rng = np.random.default_rng(0)
    images = data.test[:50].permute(0, 2, 3, 1).numpy().copy()
    copies = data.train[:10].permute(0, 2, 3, 1).numpy()
    images[::5] = (copies.astype(int) + rng.integers(-3, 4, copies.shape)).clip(0, 255)
    found = tool.show_nearest(images, data.train, tmp_path / "near.png")
    assert found["n"] == 50 and found["memorised"] == 0.2 and 0 < found["least_ratio"] < 0.2
    grid = np.asarray(Image.open(tmp_path / "near.png").convert("L")).astype(float)
    rows = grid.reshape(10, grid.shape[0] // 10, 4, grid.shape[1] // 4).transpose(0, 2, 1, 3)
    assert (np.abs(rows[:, 0] - rows[:, 1]).mean((1, 2)) < 4).all() and (np.abs(rows[:, 0] - rows[:, 2]).mean((1, 2)) > 4).all()


def test_class_histogram():
    counts, entropy, perplexity = tool.class_histogram(np.array([0, 0, 3, 3]))
    assert counts == [2, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert (entropy, perplexity) == pytest.approx((np.log(2), 2.0))
    assert tool.class_histogram(np.array([9, 9]))[1:] == (0.0, 1.0)
    assert tool.class_histogram(np.arange(10))[2] == pytest.approx(10.0)


# ---- the committed classifiers ----


@pytest.mark.parametrize("dataset", tool.SHAPES)
def test_committed_weights(dataset):
    path = nets.WEIGHTS / f"{dataset}.pt"
    assert path.stat().st_size < 1_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest() == nets.SHA256[dataset]
    assert not tool.load_classifier(dataset).training


@pytest.mark.parametrize("dataset", tool.SHAPES)
def test_stated_accuracy(dataset):
    data, classifier = load(dataset), tool.load_classifier(dataset)
    f = tool.features(data.test.permute(0, 2, 3, 1).numpy(), classifier)
    assert f.shape == (len(data.test), tool.D) and f.dtype == np.float32
    accuracy = (tool.predict(f, classifier) == data.test_labels.numpy()).mean()
    assert accuracy == pytest.approx(ACCURACY[dataset], abs=0.0005)
    assert f"{ACCURACY[dataset]:.2%}" in tool.__doc__


def test_stored_moments_are_those_of_the_train_split():
    classifier = tool.load_classifier("digits")
    mean, cov = tool.moments(tool.features(load("digits").train.permute(0, 2, 3, 1), classifier))
    np.testing.assert_allclose(classifier.mean, mean, atol=1e-4)
    np.testing.assert_allclose(classifier.cov, cov, atol=1e-3)


def test_changed_weights_are_refused(tmp_path, monkeypatch, capsys, save, digits):
    data = bytearray((nets.WEIGHTS / "digits.pt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "digits.pt").write_bytes(data)
    monkeypatch.setattr(nets, "WEIGHTS", tmp_path)
    check_error(capsys, [save(images=digits[0]), "--dataset", "digits"], "does not have the SHA-256")


def test_training_writes_a_classifier_that_loads(tmp_path, monkeypatch, capsys):
    data = load("digits")
    small = type("Small", (), {})()
    for name in ("train", "train_labels", "test", "test_labels"):
        setattr(small, name, getattr(data, name)[:100])
    monkeypatch.setattr(nets, "load_data", lambda dataset, data_dir: small)
    monkeypatch.setattr(nets, "WEIGHTS", tmp_path)
    hashes = []
    for _ in range(2):
        assert tool.main(["--train-classifier", "--dataset", "digits"]) == 0
        hashes.append(capsys.readouterr().out.splitlines()[-1].split('"')[-2])
    assert hashes[0] == hashes[1]
    monkeypatch.setitem(nets.SHA256, "digits", hashes[0])
    f = tool.features(small.train.permute(0, 2, 3, 1), tool.load_classifier("digits"))
    assert tool.distance_to_train(f, tool.load_classifier("digits")) < 1e-3


@pytest.mark.parametrize("flip", [False, True])
def test_augment_shifts_and_flips(flip):
    torch.manual_seed(0)
    x = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    results = {tuple(y.flatten().tolist()) for y in nets.augment(x.repeat(500, 1, 1, 1), 1, flip)}
    expected = set()
    for image in [x, x.flip(3)] if flip else [x]:
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        expected |= {tuple(padded[..., i : i + 3, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert results == expected


# ---- the evaluation of digits ----


def test_real_images_score_the_floor(digits):
    result = tool.evaluate(digits[0], "digits", labels=digits[1])
    floor = result["floor"]
    assert result["ratio"] == pytest.approx(1, abs=1e-3)
    assert result["frechet"] == pytest.approx(0.691, abs=0.002) and f"{floor['frechet']:.3f}" in tool.__doc__
    assert result["label_accuracy"] == floor["label_accuracy"] > 0.99
    assert result["class_counts"] == np.bincount(digits[1], minlength=10).tolist()
    assert result["n"] == floor["n"] == 297 and result["reference_points"] == 1500


def test_worse_images_score_worse(digits):
    images = digits[0]
    rng = np.random.default_rng(0)
    ratios = [1.0]
    for std in (30, 120):
        noisy = (images + rng.normal(0, std, images.shape)).clip(0, 255).astype(np.uint8)
        ratios.append(tool.evaluate(noisy, "digits")["ratio"])
    assert ratios == sorted(ratios) and ratios[-1] > 10
    noise = tool.evaluate(rng.integers(0, 256, images.shape, dtype=np.uint8), "digits")
    assert noise["ratio"] > 30 and noise["coverage"] < 0.1 and noise["density"] < 0.3


def test_one_repeated_image(digits):
    result = tool.evaluate(digits[0][:1].repeat(300, 0), "digits")
    assert result["coverage"] < 0.02 and result["ratio"] > 30
    assert result["class_perplexity"] == 1.0 and sorted(result["class_counts"])[-2:] == [0, 300]


def test_wrong_labels_and_floor_of_a_small_sample(digits):
    images, labels = digits
    result = tool.evaluate(images[:100], "digits", labels=(labels[:100] + 1) % 10)
    assert result["label_accuracy"] == 0.0
    assert result["floor"]["n"] == 100 and result["frechet_at_floor_n"] == pytest.approx(result["frechet"], rel=1e-6)


def test_ratio_compares_equal_numbers(digits):
    """1,000 samples are compared with 297 test images by 297 of them, so a larger file gains nothing by its size."""
    result = tool.evaluate(digits[0].repeat(4, 0)[:1000], "digits")
    assert result["n"] == 1000 and result["floor"]["n"] == 297
    assert result["ratio"] == result["frechet_at_floor_n"] / result["floor"]["frechet"]
    assert result["frechet_at_floor_n"] != result["frechet"]


# ---- the command line ----


def check_error(capsys, argv, message):
    assert tool.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_json_from_another_directory(digits, save, tmp_path):
    path = save(images=digits[0], labels=digits[1])
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), path, "--dataset", "digits"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    result = json.loads(done.stdout)
    assert {"n", "frechet", "density", "coverage", "class_counts", "class_entropy", "class_perplexity"} <= set(result)
    assert {"label_accuracy", "ratio", "floor"} <= set(result)


def test_text(digits, save, capsys):
    assert tool.main([save(images=digits[0]), "--dataset", "digits"]) == 0
    out, err = capsys.readouterr()
    assert "samples, n = 297\n" in out and "floor: real test images, n = 297, label accuracy" in out
    assert "ratio 1.00" in out and err == ""


@pytest.mark.parametrize("n, warned", [(2, True), (64, True), (65, False)])
def test_warning_of_a_singular_covariance(digits, save, capsys, n, warned):
    assert tool.main([save(images=digits[0][:n]), "--dataset", "digits", "--json"]) == 0
    out, err = capsys.readouterr()
    assert np.isfinite(json.loads(out)["frechet"])
    assert (err.startswith(f"warning: {n} images for 64 features") and "singular" in err) == warned


def test_errors_of_the_arguments(capsys, tmp_path, save):
    path = save(images=np.zeros((9, 8, 8, 1), np.uint8))
    check_error(capsys, [path, "--dataset", "imagenet"], "invalid choice: 'imagenet'")
    check_error(capsys, [path, "--dataset", "imagenet"], "fashion_mnist")
    check_error(capsys, [path], "required: --dataset")
    check_error(capsys, ["--dataset", "digits"], "required: SAMPLES.npz")
    check_error(capsys, [path, "--dataset", "digits", "--frobnicate"], "unrecognized arguments: --frobnicate")
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'.*digits"):
        tool.evaluate(np.zeros((9, 8, 8, 1), np.uint8), "imagenet")


def test_errors_of_the_file(capsys, tmp_path, save):
    check_error(capsys, [str(tmp_path / "none.npz"), "--dataset", "digits"], "no file")
    check_error(capsys, [str(tmp_path), "--dataset", "digits"], "no file")
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        check_error(capsys, [str(tmp_path / name), "--dataset", "digits"], "is not an .npz file")
    np.save(tmp_path / "array.npy", np.zeros((9, 8, 8, 1), np.uint8))
    check_error(capsys, [str(tmp_path / "array.npy"), "--dataset", "digits"], "is not an .npz file")
    check_error(capsys, [save(samples=np.zeros(3)), "--dataset", "digits"], "has no array `images`")
    check_error(capsys, [save(images=np.array([{}, {}])), "--dataset", "digits"], "cannot be read")
    path = Path(save(images=np.zeros((9, 8, 8, 1), np.uint8)))
    content = bytearray(path.read_bytes())
    content[300] ^= 255  # a byte of the pixels: the check sum is wrong
    path.write_bytes(content)
    check_error(capsys, [str(path), "--dataset", "digits"], "cannot be read")


@pytest.mark.parametrize(
    "dataset, shape, dtype, message",
    [
        ("digits", (9, 8, 8, 1), np.float32, "images must be uint8, not float32"),
        ("digits", (9, 8, 8), np.uint8, "must have shape (N,8,8,1), not (9, 8, 8)"),
        ("digits", (9, 1, 8, 8), np.uint8, "must have shape (N,8,8,1), not (9, 1, 8, 8)"),
        ("digits", (9, 28, 28, 1), np.uint8, "images for digits must have shape (N,8,8,1), not (9, 28, 28, 1)"),
        ("mnist", (9, 28, 28, 3), np.uint8, "images for mnist must have shape (N,28,28,1), not (9, 28, 28, 3)"),
        ("fashion_mnist", (9, 32, 32, 1), np.uint8, "images for fashion_mnist must have shape (N,28,28,1)"),
        ("digits", (), np.uint8, "must have shape (N,8,8,1), not ()"),
        ("digits", (0, 8, 8, 1), np.uint8, "at least 2 images, not 0"),
        ("digits", (1, 8, 8, 1), np.uint8, "at least 2 images, not 1"),
    ],
)
def test_errors_of_the_images(capsys, save, dataset, shape, dtype, message):
    check_error(capsys, [save(images=np.zeros(shape, dtype)), "--dataset", dataset], message)


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.zeros(8, np.int64), "labels must be 9 integers, not int64 of shape (8,)"),
        (np.zeros((9, 10), np.int64), "labels must be 9 integers, not int64 of shape (9, 10)"),
        (np.zeros(9), "labels must be 9 integers, not float64"),
        (np.full(9, 10), "labels must be in 0..9, not 10..10"),
        (np.full(9, -1), "labels must be in 0..9, not -1..-1"),
    ],
)
def test_errors_of_the_labels(capsys, save, labels, message):
    check_error(capsys, [save(images=np.zeros((9, 8, 8, 1), np.uint8), labels=labels), "--dataset", "digits"], message)


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import evaluate"
    done = subprocess.run([sys.executable, "-c", code, "--bad"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


# ---- what else is evaluated: runs, folders, data of one's own


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Digits as a FILE.npz of three named classes, and as one without classes; a folder for the networks."""
    folder = tmp_path_factory.mktemp("own")
    data = load("digits")
    parts = {}
    for name, x, y in (("", data.train, data.train_labels), ("test_", data.test, data.test_labels)):
        rows = (y < 3).nonzero()[:, 0][:300]
        parts |= {f"{name}images": x[rows].permute(0, 2, 3, 1).numpy(), f"{name}labels": y[rows].numpy()}
    np.savez(folder / "three.npz", **parts, names=["zero", "one", "two"])
    np.savez(folder / "plain.npz", images=parts["images"], test_images=parts["test_images"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nets, "epochs_for", lambda n: 40)
        images, labels = parts["test_images"], parts["test_labels"]
        for name in ("three", "plain"):  # trains the network, and keeps it
            parts[name] = tool.evaluate(images, str(folder / f"{name}.npz"), folder, labels=labels)
    return folder, parts


def noisy(images, std):
    return (images + np.random.default_rng(0).normal(0, std, images.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name, said", [("three", "a classifier trained on the 3 classes of three.npz (test accuracy "),
                                        ("plain", "a self-supervised network trained on plain.npz")])
def test_data_of_ones_own(own, name, said):
    """Real images score the floor, worse ones worse, by a network that is trained once."""
    folder, parts = own
    real = parts[name]
    assert said in real["features"] and real["ratio"] == pytest.approx(1, abs=1e-3)
    assert (real["label_accuracy"] is None) == (real["class_counts"] is None) == (name == "plain")
    if name == "three":
        assert real["label_accuracy"] > 0.9 and len(real["class_counts"]) == 3
    worse = [tool.evaluate(noisy(parts["test_images"], std), str(folder / f"{name}.npz"), folder) for std in (40, 120)]
    for figure, order in (("ratio", 1), ("kernel_distance", 1), ("density", -1), ("recall", -1)):
        assert order * real[figure] < order * worse[1][figure] and order * worse[0][figure] < order * worse[1][figure], figure


def test_a_network_is_trained_once(own, monkeypatch, capsys):
    """It is kept under a hash of images and labels; another label or pixel makes another name; what is damaged is made anew."""
    folder, parts = own
    data = tool.load_data(str(folder / "three.npz"), "data")
    (path,) = (folder / "features").glob("three-*.pt")
    content = path.read_bytes()
    monkeypatch.setattr(nets, "train_network", lambda *args: pytest.fail("trained again"))
    tool.own_network(str(folder / "three.npz"), data, folder)
    other = data.train_labels.clone()
    other[0] += 1
    pixel = data.train.clone()
    pixel[-1, 0, 7, 7] ^= 1
    names = {nets.digest(data.train, data.train_labels), nets.digest(data.train, other), nets.digest(pixel, data.train_labels)}
    assert len(names) == 3 and path.stem.removeprefix("three-") in names
    saved = torch.load(path, weights_only=True)
    monkeypatch.setattr(nets, "train_network", lambda *args: saved)
    path.write_bytes(content[:1000])
    tool.own_network(str(folder / "three.npz"), data, folder)
    assert "cannot be read" in capsys.readouterr().err
    torch.testing.assert_close(torch.load(path, weights_only=True)["network"], saved["network"])


def test_epochs():
    """Digits, MNIST and a million images; few images are seen more often, so that batch norm settles."""
    assert [nets.epochs_for(n) for n in (1_500, 60_000, 1_000_000)] == [30, 5, 1]
    assert nets.epochs_for(10_000, 60_000) == 6
    assert nets.epochs_for(40) == 450 and nets.epochs_for(250) == 150


def test_contrastive_loss_is_simclrs():
    """SimCLR eq. 1, one pair at a time; and its gradient pulls the views of one image together."""
    z = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(8):
        j = (i + 4) % 8
        total -= (u[i] @ u[j] / 0.5 - torch.log(sum(torch.exp(u[i] @ u[k] / 0.5) for k in range(8) if k != i))).item()
    assert nets.contrastive_loss(z).item() == pytest.approx(total / 8, rel=1e-12)


def test_views_are_parts_of_the_image():
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 16).expand(64, 1, 16, 16)  # a ramp: a part of it is a ramp with a smaller slope
    v = nets.view(x)
    slopes = v.diff(dim=3)[..., 1:-1]
    torch.testing.assert_close(slopes, slopes.mean((2, 3), keepdim=True).expand_as(slopes), atol=1e-5, rtol=1e-3)
    ratio = slopes.mean((1, 2, 3)) * 15
    assert 0.3 < ratio.min() < 0.6 and 1 < ratio.max() < 1.41  # 0.6 to 1 of the side, 0.6 to 1.4 of the contrast


def write_run(folder, images, **config):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "samples.npz", images=images)
    (folder / "config.json").write_text(json.dumps({"image_size": 0, "data_dir": "data"} | config))


def test_a_run_says_what_its_data_is(digits, tmp_path, capsys, save):
    images = digits[0][:70]
    assert tool.main([save(images=images), "--dataset", "digits", "--json"]) == 0
    want = json.loads(capsys.readouterr().out)
    write_run(tmp_path / "run", images, dataset="digits")
    (tmp_path / "run" / "sampled").mkdir()
    np.savez(tmp_path / "run" / "sampled" / "samples.npz", images=images)
    for folder in ("run", "run/sampled"):
        assert tool.main([str(tmp_path / folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == want
    (tmp_path / "run" / "samples.npz").unlink()
    check_error(capsys, [str(tmp_path / "run")], "--mode sample makes one")
    (tmp_path / "run" / "config.json").write_text("[]")
    check_error(capsys, [str(tmp_path / "run")], "is not that of a run")


def test_the_size_of_the_run_is_that_of_the_data(tmp_path, monkeypatch, capsys):
    """Where --dataset names other data, its own size holds."""

    def evaluate(images, dataset, data_dir, labels, image_size, *more):
        raise ValueError(f"asked for {dataset} of {image_size}")

    monkeypatch.setattr(tool, "evaluate", evaluate)
    write_run(tmp_path / "run", np.zeros((9, 16, 16, 1), np.uint8), dataset="mnist", image_size=16)
    for more, want in (([], "mnist of 16"), (["--image-size", "20"], "mnist of 20"), (["--dataset", "digits"], "digits of 0")):
        check_error(capsys, [str(tmp_path / "run"), *more], f"asked for {want}")
    check_error(capsys, [str(tmp_path / "run"), "--image-size", "-1"], "--image-size -1: must be from 0")


def test_a_folder_of_images_is_the_file_of_them(digits, tmp_path, capsys, save):
    """Images in folders named like classes have labels; else none; one that cannot be read is named."""
    images, labels = digits[0][:70], digits[1][:70]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "images" / str(label) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    found, given = tool.read_folder(tmp_path / "images", (8, 8, 1), tuple("0123456789"))
    order = np.lexsort((np.arange(70), labels.astype(str)))
    assert (found == images[order]).all() and (given == labels[order]).all()
    assert tool.main([str(tmp_path / "images"), "--dataset", "digits", "--json"]) == 0
    by_folder = json.loads(capsys.readouterr().out)
    assert tool.main([save(images=images, labels=labels), "--dataset", "digits", "--json"]) == 0
    by_file = json.loads(capsys.readouterr().out)
    assert by_folder["frechet"] == pytest.approx(by_file["frechet"])
    assert by_folder["label_accuracy"] == by_file["label_accuracy"] > 0.9
    (tmp_path / "images" / "0").rename(tmp_path / "images" / "other")
    assert tool.read_folder(tmp_path / "images", (8, 8, 1), tuple("0123456789"))[1] is None
    (tmp_path / "images" / "1" / "bad.png").write_text("no image")
    check_error(capsys, [str(tmp_path / "images"), "--dataset", "digits"], "bad.png cannot be read")


def test_accuracy_score(digits, tmp_path, monkeypatch, capsys, save):
    """Real images with their labels teach; with the labels of others they do not; without labels there is none."""
    data = load("digits")
    images, labels = nets.nhwc(data.train)[:400].numpy(), data.train_labels[:400].numpy()
    monkeypatch.setattr(tool, "epochs_for", lambda n, images: 40)
    right = tool.accuracy_score(images, labels, data)
    wrong = tool.accuracy_score(images, (labels + 1) % 10, data)
    assert right > 0.85 and wrong < 0.1
    monkeypatch.setattr(tool, "accuracy_score", lambda images, labels, data: len(images) / 1000)
    assert tool.main([save(images=images[:100], labels=labels[:100]), "--dataset", "digits", "--cas", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cas"] == {"samples": 0.1, "real": 0.1, "real_images": 100}
    check_error(capsys, [save(images=images[:100]), "--dataset", "digits", "--cas"], "--cas needs samples with labels")


def put_in_place_of_fidelity(network, monkeypatch, folder):
    """torch-fidelity with this class in place of InceptionV3; its weights are looked for in the folder."""
    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.URL_INCEPTION_V3 = "https://example.org/weights.pth"
    fake.FeatureExtractorInceptionV3 = network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setenv("TORCH_HOME", str(folder))


def test_inception_where_it_is_missing(digits, save, monkeypatch, capsys, tmp_path):
    """One line and exit code 2, without the package and without its weights; nothing is computed before."""
    path = save(images=digits[0])
    monkeypatch.setattr(tool, "features", lambda *args: pytest.fail("computed"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    check_error(capsys, [path, "--dataset", "digits", "--inception"], "pip install torch-fidelity")
    put_in_place_of_fidelity(None, monkeypatch, tmp_path)
    check_error(capsys, [path, "--dataset", "digits", "--inception"], "weights.pth, from https://example.org")


def test_inception_figures(digits, save, monkeypatch, capsys, tmp_path):
    """With a network in its place: FID and KID are those of its features, and the train moments are kept."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            assert features_list == ["2048"]
            self.weight = torch.nn.Parameter(torch.load(feature_extractor_weights_path))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3 and (x[:, 0] == x[:, 2]).all()
            return (x[:, 1].flatten(1).float() @ self.weight,)

    put_in_place_of_fidelity(Extractor, monkeypatch, tmp_path)
    weight = torch.randn(64, 7, generator=torch.Generator().manual_seed(0)) / 100
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(weight, tmp_path / "hub" / "checkpoints" / "weights.pth")
    argv = [save(images=digits[0]), "--dataset", "digits", "--inception", "--json", "--data-dir", str(tmp_path)]
    train, test = (x.flatten(1).float() @ weight for x in (load("digits").train, load("digits").test))
    for _ in range(2):
        assert tool.main(argv) == 0
        found = json.loads(capsys.readouterr().out)["inception"]
        assert found["fid"] == pytest.approx(tool.frechet_distance(*tool.moments(test), *tool.moments(train)), rel=1e-4)
        assert found["kid"] == pytest.approx(tool.kernel_distance(test, train), rel=1e-3, abs=1e-6)
        assert len(list((tmp_path / "features").glob("inception-*.npz"))) == 1


# ---- stacked digits


def test_modes_of_stacked_digits(monkeypatch):
    """With a classifier that reads the digit off the first pixel: the triples that occur, and KL from equal frequencies."""
    monkeypatch.setattr(tool, "features", lambda images, classifier: np.asarray(images)[:, 0, 0, 0])
    monkeypatch.setattr(tool, "predict", lambda f, classifier: f)
    every = np.zeros((1000, 28, 28, 3), np.uint8)
    every[:, 0, 0] = np.indices((10, 10, 10)).reshape(3, -1).T
    assert tool.modes(every, None) == {"n": 1000, "modes": 1000, "kl": pytest.approx(0, abs=1e-12)}
    assert tool.modes(every[:1].repeat(50, 0), None) == {"n": 50, "modes": 1, "kl": pytest.approx(np.log(1000))}
    p = np.array([3, 1]) / 4
    found = tool.modes(every[[5, 5, 5, 123]], None)
    assert found["modes"] == 2 and found["kl"] == pytest.approx((p * np.log(p * 1000)).sum())


def test_stacked_digits_from_the_command_line(tmp_path, monkeypatch, capsys):
    real = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(tool, "load_data", lambda *args: types.SimpleNamespace(test=real))
    path = tmp_path / "samples.npz"
    np.savez(path, images=np.zeros((30, 28, 28, 3), np.uint8))
    assert tool.main([str(path), "--dataset", "stacked_mnist"]) == 0
    out = capsys.readouterr().out
    assert out.count("1 of 1000 modes, KL 6.9078 nats") == 2 and out.count("n = 30") == 2
    np.savez(path, images=np.zeros((30, 28, 28, 1), np.uint8))
    assert tool.main([str(path), "--dataset", "stacked_mnist"]) == 2 and "(N,28,28,3)" in capsys.readouterr().err
