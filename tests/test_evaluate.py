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
