"""The data sets: what is read from the disk, what becomes of a folder of images, and what is said about it.

Downloads that fail are in tests/faults/test_downloads.py.
"""

import gzip
import hashlib
import importlib
import io
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import tiny
from tiny import ROOT, SCRIPTS, error_line

p = importlib.import_module(SCRIPTS[0])  # the block is the same in all scripts, as tests/test_plumbing.py says


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    for name in ("socket.getaddrinfo", "socket.create_connection"):
        monkeypatch.setattr(name, refuse)


def refused(capsys, *args):
    """The line of the error that load_data ends in, with exit code 2."""
    with pytest.raises(SystemExit) as e:
        p.load_data(*args)
    assert e.value.code == 2
    return error_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ the known ones


def test_digits():
    data = p.load_data("digits", "nowhere")
    assert data.train.shape == (1500, 1, 8, 8) and data.test.shape == (297, 1, 8, 8)
    assert data.names == tuple("0123456789") and data.note == ""
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train.min() == 0 and data.train.max() == 255
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))
    again = p.load_data("digits", "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(data[:4], again[:4], strict=True))
    from sklearn.datasets import load_digits

    digits = load_digits()  # each image keeps its own label, and the two splits are the whole
    row = {(x * 255 / 16).round().astype(np.uint8).tobytes(): y for x, y in zip(digits.images, digits.target, strict=True)}
    x, y = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    assert all(row[image.numpy().tobytes()] == label for image, label in zip(x[:, 0], y.tolist(), strict=True))
    assert sorted(image.numpy().tobytes() for image in x) == sorted(
        (im * 255 / 16).round().astype(np.uint8).tobytes() for im in digits.images)


def idx(images):
    """The IDX file of uint8 images (N,H,W) or labels (N,)."""
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + images.astype(np.uint8).tobytes()


@pytest.fixture
def small_idx(monkeypatch, tmp_path):
    """Writes a data set of 20 + 10 images in the format of MNIST, whose hashes the script then knows."""
    rng = np.random.RandomState(0)
    arrays = [rng.randint(*how) for how in ((0, 256, (20, 28, 28)), (0, 10, 20), (0, 256, (10, 28, 28)), (0, 10, 10))]
    content = dict(zip(p.SHA256["mnist"], map(idx, arrays), strict=True))

    def put(name, packed, folder=None):
        folder = tmp_path / (folder or name)
        folder.mkdir(parents=True)
        monkeypatch.setitem(p.SHA256, name, {file: hashlib.sha256(raw).hexdigest() for file, raw in content.items()})
        for file, raw in content.items():
            (folder / (file + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
        return arrays

    return put


# ours, and those that torchvision makes under the same --data-dir
PLACES = [("mnist", "mnist"), ("fashion_mnist", "fashion_mnist"), ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw"),
          ("mnist", "a folder of 100 % é #?/mnist")]


@pytest.mark.parametrize("name, folder", PLACES)
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(name, folder, packed, small_idx, tmp_path):
    """Found, whichever of the places they lie in; nothing is downloaded, copied or changed."""
    arrays = small_idx(name, packed, folder)
    before = sorted(tmp_path.rglob("*"))
    data = p.load_data(name, str((tmp_path / folder).parent if "é" in folder else tmp_path))
    for got, want in zip(data[:4], arrays, strict=True):
        assert torch.equal(got.squeeze(), torch.from_numpy(want).to(got.dtype))
    assert data.train.shape == (20, 1, 28, 28) and data.train.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64 and data.names == tuple("0123456789")
    assert sorted(tmp_path.rglob("*")) == before


def test_fashion_mnist_is_not_taken_for_mnist(small_idx, tmp_path, monkeypatch, capsys):
    """Their files have the same names; the folder and the hash tell them apart."""
    small_idx("fashion_mnist", True, "FashionMNIST/raw")
    monkeypatch.setitem(p.MIRRORS, "mnist", ())
    with pytest.raises(SystemExit) as e:
        p.load_data("mnist", str(tmp_path))
    assert e.value.code == 1 and "no good copy" in error_line(capsys.readouterr().err)


def test_idx_tensors_can_be_written_to(small_idx, tmp_path):
    small_idx("mnist", True)
    data = p.load_data("mnist", str(tmp_path))
    for part in data[:4]:
        part.add_(1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_files_where_they_are(name, data_dir):
    data = p.load_data(name, data_dir)
    assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    known = {"mnist": ([5, 0, 4, 1, 9], 33.32), "fashion_mnist": ([9, 0, 0, 3, 0], 72.94)}[name]
    assert data.train_labels[:5].tolist() == known[0]
    assert data.train[:, :, :, :].float().mean().item() == pytest.approx(known[1], abs=0.01)
    assert torch.bincount(data.test_labels).sum() == 10_000


@pytest.mark.parametrize("folder", ["cifar10", "."], ids=["ours", "torchvision's"])
def test_cifar10_archive(folder, tmp_path, monkeypatch):
    archive, rows = tiny.cifar10_archive()
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "cifar-10-binary.tar.gz").write_bytes(archive)
    monkeypatch.setitem(p.SHA256, "cifar10", {"cifar-10-binary.tar.gz": hashlib.sha256(archive).hexdigest()})
    data = p.load_data("cifar10", str(tmp_path))
    assert data.train.shape == (50_000, 3, 32, 32) and data.test.shape == (10_000, 3, 32, 32) and len(data.names) == 10
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    for x, y, i, row in ((data.train, data.train_labels, 49_999, 49_999), (data.test, data.test_labels, 0, 50_000)):
        assert y[i] == rows[row, 0]
        assert np.array_equal(x[i].numpy(), rows[row, 1:].reshape(3, 32, 32))  # planes of red, green, blue


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload ran",)


@pytest.mark.parametrize("folder", ["cifar10", "."])
def test_the_pickles_of_cifar10_are_named_and_not_executed(folder, tmp_path, monkeypatch, capsys):
    """torchvision's archive holds pickles, which could run anything: it is named, and so is the one that works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    path, raw = tmp_path / folder / "cifar-10-python.tar.gz", pickle.dumps(Payload())
    with tarfile.open(path, "w:gz") as archive:
        for i in range(6):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{'test_batch' if i == 5 else f'data_batch_{i + 1}'}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    monkeypatch.setitem(p.MIRRORS, "cifar10", ())
    with pytest.raises(SystemExit) as e:
        p.load_data("cifar10", str(tmp_path))
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 1 and str(path) in line and "pickle" in line and "cifar-10-binary.tar.gz" in line
    assert not Path("payload ran").exists()


def test_resize_of_a_data_set():
    whole = p.load_data("digits", "nowhere")
    for size in (4, 16, 13):
        data = p.load_data("digits", "nowhere", size)
        assert data.train.shape == (1500, 1, size, size) and data.test.shape == (297, 1, size, size)
        assert data.train.dtype == torch.uint8 and torch.equal(data.train_labels, whole.train_labels)
        mean = data.train.float().mean((1, 2, 3)) - whole.train.float().mean((1, 2, 3))
        assert mean.abs().max() < 14  # of 255: the same image
    assert torch.equal(p.load_data("digits", "nowhere", 8).train, whole.train)
    for size in (4, 13):  # as PIL does it: bilinear, antialiased, so that every pixel of the original counts
        pil = [Image.fromarray(x[0].numpy()).resize((size, size), Image.BILINEAR) for x in whole.test]
        test = p.load_data("digits", "nowhere", size).test[:, 0]
        assert (test.int() - torch.from_numpy(np.stack(pil)).int()).abs().max() <= 2


@pytest.mark.parametrize("name", ["", "mnsit", "no/such/folder", "a file.png"])
def test_a_data_set_that_there_is_not(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a file.png").write_text("")
    line = refused(capsys, name, "data")
    assert f"--dataset {name}".strip() in line
    assert all(word in line for word in ("digits", "mnist", "fashion_mnist", "cifar10", "folder"))


# --------------------------------------------------------------------------------------------------- folders of images


def paint(path, value=128, size=(6, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def store(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def levels(images):
    """The one level of each image (N,C,H,W) of a single level."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def all_of(data):
    """The images of both splits."""
    return torch.cat([data.train, data.test])


def test_folder_flat(tmp_path):
    """A tenth is held out, the last one of the files in an order that is mixed, and the same every time."""
    for i in random.Random(0).sample(range(25), 25):
        paint(tmp_path / f"{i:02d}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.names == () and data.note == ""
    assert data.train.shape == (22, 1, 6, 6) and data.test.shape == (3, 1, 6, 6)
    assert levels(data.train) + levels(data.test) == np.random.RandomState(0).permutation(25).tolist()
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert len(data.train_labels) == 22 and len(data.test_labels) == 3
    assert not data.train_labels.any() and not data.test_labels.any()


def test_folder_with_a_subfolder_a_class(tmp_path):
    for label, name in enumerate(("apple", "berry", "cherry")):
        for i in range(10):
            paint(tmp_path / name / f"{i}.png", (80 * label + i, 0, 0))
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.names == ("apple", "berry", "cherry")
    assert data.train.shape == (27, 3, 6, 6) and data.test.shape == (3, 3, 6, 6)
    for x, y in (data[:2], data[2:4]):
        assert torch.equal(x[:, 0, 0, 0].long() // 80, y)  # the label is that of the subfolder
        assert not x[:, 1:].any()
    assert set(data.train_labels[:9].tolist()) == {0, 1, 2}  # mixed


def test_a_class_may_have_folders_in_it(tmp_path):
    """Images at any depth; the folder under the root is the class."""
    for i, name in enumerate(("a/1.png", "a/x/2.png", "b/x/y/z/3.png", "b/x/4.png")):
        paint(tmp_path / name, i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert data.names == ("a", "b") and dict(zip(levels(all_of(data)), labels, strict=True)) == {0: 0, 1: 0, 2: 1, 3: 1}


@pytest.mark.parametrize("files", [("1.png", "2.png", "a/3.png"), ("a/1.png", "a/2.png", "a/b/3.png")],
                         ids=["some images in no folder", "one folder"])
def test_no_classes_where_folders_name_none(files, tmp_path):
    for i, name in enumerate(files):
        paint(tmp_path / name, i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.names == () and not data.train_labels.any() and not data.test_labels.any()
    assert sorted(levels(all_of(data))) == [0, 1, 2]


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_folders_are_the_split(test, tmp_path):
    for i in range(12):
        paint(tmp_path / "train" / "cd"[i % 2] / f"{i}.png", i, mode="L")
    for i in range(20, 25):  # a class more, at another depth
        paint(tmp_path / test / "cde"[i % 3] / "deep" / f"{i}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(data.train)) == list(range(12)) and sorted(levels(data.test)) == list(range(20, 25))
    assert data.names == ("c", "d", "e")
    assert all(y == x % 2 for x, y in zip(levels(data.train), data.train_labels.tolist(), strict=True))
    assert all(y == x % 3 for x, y in zip(levels(data.test), data.test_labels.tolist(), strict=True))
    assert levels(data.train) != list(range(12))  # mixed


def test_a_split_without_classes(tmp_path):
    for i in range(4):
        paint(tmp_path / ("test" if i == 2 else "train") / f"{i}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(data.train)) == [0, 1, 3] and levels(data.test) == [2] and data.names == ()


def test_of_test_and_val_the_one_is_tested_on_and_the_other_is_left_alone(tmp_path):
    for i, folder in enumerate(("train", "train", "val", "test", "extra")):
        paint(tmp_path / folder / f"{i}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(data.train)) == [0, 1] and levels(data.test) == [3]


def test_hidden_and_other_files_do_not_count(tmp_path, capsys):
    root = tmp_path / ".cache" / "photos"  # the way to the folder may be hidden
    for i in range(4):
        paint(root / "ab"[i % 2] / f"{i}.png", i, mode="L")
    for hidden in (".thumbnails/5.png", "a/.thumbnails/6.png", "a/.7.png", ".8.png", "a/._9.png", ".git/x/y/10.png"):
        paint(root / hidden, 9, mode="L")
    (root / "notes.txt").write_text("no image")
    (root / "c").mkdir()
    (root / "c" / "labels.csv").write_text("no image")
    (root / ".DS_Store").write_text("no image")
    data = p.load_data(str(root), "nowhere")
    assert sorted(levels(all_of(data))) == [0, 1, 2, 3] and data.names == ("a", "b")
    assert data.note == "" and capsys.readouterr().err == ""


def test_hidden_train_and_test_folders_are_no_split(tmp_path):
    for i, folder in enumerate((".train", ".test", "x", "y", "train")):
        paint(tmp_path / folder / f"{i}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(all_of(data))) == [2, 3, 4] and data.names == ("train", "x", "y")


def test_names_of_classes_are_kept_whatever_they_are(tmp_path):
    names = sorted(["Größe", "日本", "two words", "100%", "7", os.fsdecode(b"not \xff utf-8")])
    for i, name in enumerate(names):
        paint(tmp_path / name / "1.png", i, mode="L")
        paint(tmp_path / name / "2.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.names == tuple(names)
    assert levels(data.train) == data.train_labels.tolist() and levels(data.test) == data.test_labels.tolist()


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "JPEG", "bmp", "gif", "webp", "tif", "ppm", "jp2", "ico", "avif"])
def test_formats(suffix, tmp_path):
    sort = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix)
    if sort.upper() not in Image.SAVE and (Image.init(), sort.upper() not in Image.SAVE)[1]:
        pytest.skip(f"this Pillow writes no {suffix}")
    for i in range(2):
        paint(tmp_path / f"{i}.{suffix}", (200, 100, 50), size=(16, 16), format=sort)
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    assert x.shape == (2, 3, 16, 16)
    assert (x.int() - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 4  # some formats lose a little


MODES = {  # mode, value as it is stored, and what is read (over white where it is transparent)
    "bits": ("1", 1, (255,)),
    "grey": ("L", 77, (77,)),
    "grey, half transparent": ("LA", (100, 127), (178,)),
    "grey, transparent": ("LA", (100, 0), (255,)),
    "colour": ("RGB", (10, 20, 30), (10, 20, 30)),
    "colour, half transparent": ("RGBA", (0, 100, 200, 127), (128, 178, 228)),
    "colour, transparent": ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    "CMYK": ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
}


@pytest.mark.parametrize("mode, value, want", MODES.values(), ids=MODES)
def test_modes(mode, value, want, tmp_path):
    for i in range(2):
        paint(tmp_path / f"{i}.{'tif' if mode == 'CMYK' else 'png'}", value, mode=mode)
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    assert x.shape == (2, len(want), 6, 6)
    assert (x.int() - torch.tensor(want).view(-1, 1, 1)).abs().max() <= 1


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(transparent, tmp_path):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    for i in range(2):
        image.save(tmp_path / f"{i}.png", **({"transparency": 1} if transparent else {}))
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    want = (255, 255, 255) if transparent else (10, 200, 30)
    assert x.shape == (2, 3, 6, 6) and (x == torch.tensor(want).view(3, 1, 1)).all()


def test_grey_among_colour(tmp_path):
    """One coloured image makes a coloured data set; the levels of the grey ones stay."""
    paint(tmp_path / "1.png", 77, mode="L")
    paint(tmp_path / "2.png", (10, 20, 30))
    paint(tmp_path / "3.png", 90, mode="L")
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    assert sorted(image[:, 0, 0].tolist() for image in x) == [[10, 20, 30], [77, 77, 77], [90, 90, 90]]


TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],  # by the EXIF standard
         5: lambda a: a.T, 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_photographs_are_turned_upright(orientation, dtype, tmp_path):
    stored = np.random.RandomState(0).permutation(35).reshape(5, 7).astype(dtype)
    stored = (stored * 7 + 17).clip(max=255)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(2):
        store(tmp_path / f"{i}.png", stored, exif=exif)
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    want = TURNS[orientation](stored).astype(np.uint8)
    assert x.shape == (2, 1, *want.shape) and all(np.array_equal(image[0], want) for image in x.numpy())


DEEP = {"png": np.uint16, "tif, 16 bits": np.uint16, "tif, 32 bits": np.int32, "tif, real": np.float32}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("largest", [1, 255, 1000, 4095, 65535])
def test_more_than_8_bits_are_scaled_by_the_largest_value_of_all(kind, largest, tmp_path):
    """Not each image by its own: a dark one stays dark. The largest value becomes 255, however much the file could hold."""
    tops = [largest, largest // 2, largest // 4]
    for i, top in enumerate(tops):
        store(tmp_path / f"{i}.{kind[:3]}", np.linspace(0, top, 36).round().reshape(6, 6).astype(DEEP[kind]))
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    got = sorted((image[0].numpy().astype(int) for image in x), key=lambda image: -image.max())
    assert got[0].max() == 255 and got[0].min() == 0
    for image, top in zip(got, tops, strict=True):
        assert np.abs(image - np.linspace(0, top, 36).round().reshape(6, 6) * 255 / largest).max() <= 0.5 + 1e-6


def test_8_bits_among_16_stay_as_they_are(tmp_path):
    paint(tmp_path / "1.png", 100, mode="L")
    paint(tmp_path / "2.png", (1, 2, 3))
    store(tmp_path / "3.png", np.full((6, 6), 500, np.uint16))
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    assert sorted(image[:, 0, 0].tolist() for image in x) == [[1, 2, 3], [100] * 3, [255] * 3]


def test_black_images_of_16_bits_and_values_below_zero_are_black(tmp_path):
    for i in range(2):
        store(tmp_path / "zero" / f"{i}.png", np.zeros((6, 6), np.uint16))
        store(tmp_path / "below" / f"{i}.tif", np.full((6, 6), [-5, 0, 50, 100, -1, 0], np.int32))
    assert not all_of(p.load_data(str(tmp_path / "zero"), "nowhere")).any()
    below = all_of(p.load_data(str(tmp_path / "below"), "nowhere"))
    assert (below == torch.tensor([0, 0, 128, 255, 0, 0], dtype=torch.uint8)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_value_that_is_not_finite_spoils_its_image_alone(bad, place, tmp_path, capsys):
    """A hole in a scientific image: skipped and named, and the others are scaled as if it were not there."""
    for i in range(4):
        pixels = np.full((6, 6), 10.0 * (i + 1), np.float32)
        pixels[place:, :2] = bad if i == 1 else pixels[0, 0]
        store(tmp_path / f"{i}.tif", pixels)
    data = p.load_data(str(tmp_path), "nowhere")
    assert str(tmp_path / "1.tif") in capsys.readouterr().err and "1 skipped" in data.note
    assert sorted(levels(all_of(data))) == [64, 191, 255]


def test_the_commonest_size_holds_and_others_are_cropped_to_it(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png", (0, 0, 255), size=(8, 6))
    wide = np.zeros((12, 48, 3), np.uint8)  # twice as large and three times as wide: red, in the middle green
    wide[:, :, 0], wide[:, 16:32] = 255, (0, 255, 0)
    store(tmp_path / "wide.png", wide)
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    assert x.shape == (4, 3, 6, 8)
    (green,) = (image for image in x if not image[2].any())
    assert (green[:, :, 2:-2] == torch.tensor([0, 255, 0]).view(3, 1, 1)).all()  # cropped at the centre, not squeezed
    for size in (4, 16):
        assert p.load_data(str(tmp_path), "nowhere", size).train.shape[1:] == (3, size, size)


def test_photographs_without_an_image_size_are_refused(tmp_path, capsys):
    for i in range(2):
        paint(tmp_path / "large" / f"{i}.png", size=(640, 480))
        paint(tmp_path / "tall" / f"{i}.png", size=(1, 129))
        paint(tmp_path / "fits" / f"{i}.png", size=(128, 128))
    line = refused(capsys, str(tmp_path / "large"), "nowhere")
    assert "640 x 480" in line and re.search(r"--image-size \d+", line) and str(tmp_path / "large") in line
    assert "--image-size" in refused(capsys, str(tmp_path / "tall"), "nowhere")
    assert p.load_data(str(tmp_path / "fits"), "nowhere").train.shape == (1, 3, 128, 128)
    size = int(re.search(r"--image-size (\d+)", line)[1])  # what the line says works
    assert p.load_data(str(tmp_path / "large"), "nowhere", size).train.shape == (1, 3, size, size)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("noise", [0, 3])
def test_too_few_images(count, noise, tmp_path, capsys):
    for i in range(count):
        paint(tmp_path / f"{i}.png")
    for i in range(noise):
        (tmp_path / f"broken{i}.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as e:
        p.load_data(str(tmp_path), "nowhere")
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and err[-1].startswith("error: ") and len(err) == 1 + (noise > 0)
    assert str(tmp_path) in err[-1] and f"{count} readable images" in err[-1]


def test_two_images_are_enough(tmp_path):
    for i in range(2):
        paint(tmp_path / f"{i}.png")
    data = p.load_data(str(tmp_path), "nowhere")
    assert len(data.train) == len(data.test) == 1


def test_a_split_of_which_one_part_cannot_be_read(tmp_path, capsys):
    for i in range(3):
        paint(tmp_path / "train" / f"{i}.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as e:
        p.load_data(str(tmp_path), "nowhere")
    line = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and line.startswith("error: ") and "0 of them to test on" in line


# --------------------------------------------------------------------------------------- images that cannot be read


def png(size=(6, 6), value=(1, 2, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", size, value).save(buffer, "png")
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "html": b"<!DOCTYPE html><html></html>",
    "cut in its head": png()[:20],
    "cut in its pixels": png((64, 64))[:-30],
    "a wrong checksum": png()[:-20] + bytes(8) + png()[-12:],
    "sides of 0": png()[:16] + bytes(8) + png()[24:],
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_broken_images_are_skipped_and_named(raw, tmp_path, capsys):
    """Wherever they stand in the order: images and labels of the others stay together."""
    for i in range(9):
        paint(tmp_path / "abc"[i % 3] / f"{i}.png", (i, i, i))
    (tmp_path / "b" / "broken.png").write_bytes(raw)
    (tmp_path / "a" / "4b.png").write_bytes(raw)
    data = p.load_data(str(tmp_path), "nowhere")
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped 2 images" in line and all(str(tmp_path / name) in line for name in ("b/broken.png", "a/4b.png"))
    assert "2 skipped" in data.note
    assert sorted(levels(all_of(data))) == list(range(9)) and len(data.test) == 1
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert labels == [level % 3 for level in levels(all_of(data))]


def test_ten_are_named_and_the_rest_counted(tmp_path, capsys):
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    for i in range(25):
        (tmp_path / f"broken{i:02d}.png").write_bytes(b"broken")
    data = p.load_data(str(tmp_path), "nowhere")
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped 25 images" in line and line.count(str(tmp_path)) >= 10
    assert len(set(re.findall(r"/(broken\d\d\.png)", line))) == 10
    assert "25 skipped" in data.note


def save_png16(path, pixels):
    """A PNG of 16 bits for each colour, which Pillow cannot write. pixels (H,W,C) uint16, C: 2 LA, 3 RGB, 4 RGBA."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    H, W, C = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", W, H, 16, {2: 4, 3: 2, 4: 6}[C], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_that_hold_8_are_not_black_images(channels, tmp_path, capsys):
    """Pillow keeps the high byte of each, which is 0 in such a file: it is skipped and named. A file that fills 16 is read."""
    for i in range(3):
        paint(tmp_path / f"{i}.png", i, mode="L")
    save_png16(tmp_path / "dark.png", np.random.RandomState(0).randint(0, 256, (6, 6, channels)).astype(np.uint16))
    save_png16(tmp_path / "whole.png", np.full((6, 6, channels), 65535, np.uint16))
    data = p.load_data(str(tmp_path), "nowhere")
    line = " ".join(capsys.readouterr().err.split())
    assert "skipped 1 images" in line and str(tmp_path / "dark.png") in line and "below 256" in line
    assert "1 skipped" in data.note
    assert sorted(levels(all_of(data))) == [0, 1, 2, 255]


def test_links_that_lead_round_bring_no_image_twice(tmp_path):
    """A folder that holds two links to the one above it, whose paths are without number, and one that lies elsewhere."""
    for i in range(4):
        paint(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", i, mode="L")
        paint(tmp_path / "elsewhere" / f"{i}.png", 10 + i, mode="L")
    for name in ("loop", "another"):
        (tmp_path / "data" / "a" / name).symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    data = p.load_data(str(tmp_path / "data"), "nowhere")
    assert sorted(levels(all_of(data))) == [0, 1, 2, 3, 10, 11, 12, 13] and data.names == ("a", "b", "c")


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "jxl"])
def test_formats_that_need_a_plug_in_count_as_skipped(suffix, tmp_path, capsys):
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    (tmp_path / f"phone.{suffix}").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(100))
    data = p.load_data(str(tmp_path), "nowhere")
    assert f"phone.{suffix}" in capsys.readouterr().err and "1 skipped" in data.note and len(all_of(data)) == 3


@pytest.mark.parametrize("error", [struct.error("x"), RecursionError(), MemoryError(), KeyError(3), SyntaxError("no"),
                                   ZeroDivisionError(), UnicodeDecodeError("utf8", b"", 0, 1, "odd\nreason"), AssertionError()])
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises(error, where, tmp_path, monkeypatch, capsys):
    for i in range(4):
        paint(tmp_path / f"{i}.png", (i, i, i))
    real = Image.open if where == "open" else Image.Image.convert

    def bad_open(path, *args, **kwargs):
        if Path(path).name == "2.png":
            raise error
        return real(path, *args, **kwargs)

    def bad_convert(image, *args, **kwargs):
        if image.getpixel((0, 0)) == (2, 2, 2):
            raise error
        return real(image, *args, **kwargs)

    if where == "open":
        monkeypatch.setattr(Image, "open", bad_open)
    else:
        monkeypatch.setattr(Image.Image, "convert", bad_convert)
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(all_of(data))) == [0, 1, 3] and "1 skipped" in data.note
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "2.png") in line


def test_a_bomb_is_skipped(tmp_path, monkeypatch, capsys):
    for i in range(3):
        paint(tmp_path / f"{i}.png", (i, i, i))
    paint(tmp_path / "bomb.png", size=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = p.load_data(str(tmp_path), "nowhere")
    assert sorted(levels(all_of(data))) == [0, 1, 2] and "bomb.png" in capsys.readouterr().err


def test_a_stop_signal_is_no_broken_image(tmp_path, monkeypatch):
    """SystemExit and KeyboardInterrupt end the program, whatever is being read."""
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    for error in (SystemExit(143), KeyboardInterrupt()):
        monkeypatch.setattr(Image, "open", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            p.load_data(str(tmp_path), "nowhere")


def test_progress_is_shown_while_a_folder_is_read(tmp_path, monkeypatch):
    for i in range(5):
        paint(tmp_path / f"{i}.png")
    seen = []
    monkeypatch.setattr(p, "progress", lambda items, what, total: (seen.append((total, what)), items)[1])
    p.load_data(str(tmp_path), "nowhere")
    assert (5, "reading images") in seen


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_whatever_the_number_of_threads(threads, tmp_path, monkeypatch, capsys):
    """Images end in another order than that of the files, more of them than are read at once, some of them broken."""
    for i in range(300):
        store(tmp_path / "abc"[i % 3] / f"{i}.png", np.full((2, 2), i % 251, np.uint8))
    broken = sorted(tmp_path / "b" / f"{i}.png" for i in (1, 100, 298))
    for path in broken:
        path.write_bytes(b"broken")
    real = p.read_image

    def slow(path, *args):
        time.sleep(0.002 * (int(path.stem) % 5 == 0))
        return real(path, *args)

    monkeypatch.setattr(p, "read_image", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    data = p.load_data(str(tmp_path), "nowhere")
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    files = [files[i] for i in np.random.RandomState(0).permutation(300)]
    want = [int(f.stem) for f in files if tmp_path / f not in broken]
    assert levels(data.train) + levels(data.test) == [i % 251 for i in want]
    assert torch.cat([data.train_labels, data.test_labels]).tolist() == [i % 3 for i in want] and len(data.test) == 30
    (line,) = capsys.readouterr().err.splitlines()
    assert [line.index(str(tmp_path / f)) for f in files if tmp_path / f in broken] == sorted(
        line.index(str(path)) for path in broken)  # named in the order of the files


def test_a_stop_signal_ends_the_reading(tmp_path, monkeypatch, capsys):
    """The images under way are finished and the others are not begun."""
    for i in range(200):
        paint(tmp_path / "images" / f"{i}.png", i, mode="L", size=(2, 2))
    begun = []

    def read(path, *args):
        begun.append(path)
        if len(begun) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02 if len(begun) < 5 else 1)  # the signal has time to arrive, on a crowded machine too
        return Image.new("L", (2, 2))

    monkeypatch.setattr(p, "read_image", read)
    with tiny.handlers_kept():
        code = tiny.run(p, tiny.flags(SCRIPTS[0], tmp_path / "run", "--dataset", tmp_path / "images"))
    assert code == 128 + signal.SIGINT and "stopped by SIGINT" in capsys.readouterr().err
    assert 5 <= len(begun) < 100 and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- large photographs


def photograph(size, orientation=1):
    """JPEG of a real photograph, a temple, enlarged to size (W, H)."""
    from sklearn.datasets import load_sample_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize(size, Image.BICUBIC).save(buffer, "jpeg", quality=90, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("size, orientation, decoded", [((1600, 1200), 1, (200, 150)), ((1200, 1600), 6, (200, 150)),
                                                        ((640, 427), 1, (160, 107)), ((3000, 150), 1, (1500, 75))])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(size, orientation, decoded, tmp_path, monkeypatch):
    """To a half, a quarter or an eighth, never to less than twice the size that is wanted, which costs next to nothing."""
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(photograph(size, orientation))
    seen = []
    real = ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda image, size: (seen.append(image.size), real(image, size))[1])
    x = p.load_data(str(tmp_path), "nowhere", 32).train[0]
    assert seen == [decoded] * 2 and min(decoded) >= 64
    whole = ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg"))
    want = torch.from_numpy(np.asarray(real(whole, (32, 32))).copy()).permute(2, 0, 1)
    difference = (x.int() - want.int()).abs()
    assert difference.float().mean() < 1.5 and difference.max() <= 16


@pytest.mark.parametrize("side", [64, 0])
def test_a_jpeg_that_is_not_four_times_as_large_is_decoded_whole(side, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(photograph((255, 255) if side else (96, 64)))
    x = p.load_data(str(tmp_path), "nowhere", side).train[0]
    image = Image.open(tmp_path / "0.jpg")
    want = ImageOps.fit(image, (side, side)) if side else image
    assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(want))


def test_a_large_grey_jpeg_stays_grey(tmp_path):
    image = Image.open(io.BytesIO(photograph((1600, 1200)))).convert("L")
    for i in range(2):
        image.save(tmp_path / f"{i}.jpg", quality=90)
    x = p.load_data(str(tmp_path), "nowhere", 32).train[0]
    want = torch.from_numpy(np.asarray(ImageOps.fit(image, (32, 32))).astype(int))
    assert x.shape == (1, 32, 32) and (x[0] - want).abs().float().mean() < 1


MEASURE = """
import re, sys
from pathlib import Path
import {script} as p

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

p.load_data("few" + "{suffix}", "nowhere", 256)  # what the first call alone takes: libraries
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
data = p.load_data("many" + "{suffix}", "nowhere", 256)
print(before, memory("VmHWM"), data.train.numel() + data.test.numel())
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("kind", ["folder", "folder with a broken image", "npz", "npz with a split", "compressed npz"])
def test_memory_is_at_most_one_and_a_half_times_the_data(kind, tmp_path):
    for name, count in (("few", 3), ("many", 250)):
        if "folder" in kind:
            for i in range(count):
                paint(tmp_path / name / f"{i}.png", size=(16, 16))
            if "broken" in kind:
                (tmp_path / name / "broken.png").write_bytes(b"")
        else:
            images = np.random.RandomState(0).randint(0, 256, (count, 256, 256, 3), np.uint8)
            n = count // 2
            arrays = {"images": images[n:], "test_images": images[:n]} if "split" in kind else {"images": images}
            (np.savez_compressed if "compressed" in kind else np.savez)(tmp_path / f"{name}.npz", **arrays)
    code = MEASURE.format(script=SCRIPTS[0], suffix=".npz" * ("npz" in kind))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    before, peak, size = map(int, done.stdout.split())
    assert size == 250 * 3 * 256 * 256
    assert size / 2 < peak - before < 1.5 * size


# --------------------------------------------------------------------------------------------- one image, as data or mask


def test_one_reader_reads_data_and_masks(tmp_path):
    """read_image gives what load_data gives, at a size that is asked for."""
    pixels = np.random.RandomState(0).randint(0, 256, (9, 6, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        store(tmp_path / f"{i}.png", pixels, exif=exif)
    x = all_of(p.load_data(str(tmp_path), "nowhere"))
    image = p.read_image(tmp_path / "0.png")
    assert image.mode == "RGB" and image.size == (9, 6)
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), x[0])
    assert p.read_image(tmp_path / "0.png", (4, 3)).size == (4, 3)


def test_a_mask_of_16_bits_is_scaled_by_its_own_largest_value(tmp_path):
    store(tmp_path / "mask.png", np.array([[0, 500, 1000]], np.uint16))
    assert np.asarray(p.read_image(tmp_path / "mask.png")).tolist() == [[0, 128, 255]]


# ------------------------------------------------------------------------------------------------ files of numpy arrays


def images_of(n, *shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape), np.uint8)


def assert_same_data(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a.names == b.names


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, ">i8"])
def test_npz_with_a_split(save, shape, kind, tmp_path):
    """What is in the file, in its order."""
    x, x_test = images_of(9, *shape), images_of(4, *shape, seed=1)
    y, y_test = np.arange(9).astype(kind) % 3, np.array([0, 1, 1, 0]).astype(kind)
    save(tmp_path / "a.npz", images=x, labels=y, test_images=x_test, test_labels=y_test, names=["x", "y", "z"], other=[1.5])
    data = p.load_data(str(tmp_path / "a.npz"), "nowhere")
    C = shape[2] if len(shape) == 3 else 1
    assert data.train.shape == (9, C, 5, 7) and data.test.shape == (4, C, 5, 7) and data.names == ("x", "y", "z")
    for got, want in ((data.train, x), (data.test, x_test)):
        assert got.dtype == torch.uint8 and np.array_equal(got.permute(0, 2, 3, 1).numpy(), want.reshape(-1, 5, 7, C))
    for got, want in ((data.train_labels, y), (data.test_labels, y_test)):
        assert got.dtype == torch.int64 and got.tolist() == want.tolist()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [2, 10, 25])
def test_npz_without_a_split_is_split_as_a_folder(labelled, n, tmp_path):
    """The images of a folder in the order of their names, as arrays: the same are held out, and all stand in the same order."""
    x = images_of(n, 4, 6)
    y = np.arange(n) * 2 // n
    for i in range(n):
        store(tmp_path / "folder" / "ab"[y[i] if labelled else 0] / f"{i:02d}.png", x[i])
    np.savez(tmp_path / "a.npz", images=x, **{"labels": y, "names": ["a", "b"]} if labelled else {})
    data = p.load_data(str(tmp_path / "a.npz"), "nowhere")
    assert_same_data(data, p.load_data(str(tmp_path / "folder"), "nowhere"))
    assert len(data.test) == -(-n // 10) and len(data.names) == 2 * labelled


def test_npz_names(tmp_path):
    """Numbers where none are given; none where all labels are 0; more than labels may be."""
    def names(labels, **more):
        np.savez(tmp_path / "a.npz", images=images_of(4, 2, 2), labels=labels, **more)
        return p.load_data(str(tmp_path / "a.npz"), "nowhere").names

    assert names([0, 3, 1, 0]) == ("0", "1", "2", "3")
    assert names([0, 0, 0, 0]) == names([0, 0, 0, 0], names=["a"]) == ()
    assert names([0, 1, 1, 0], names=["a", "b", "c"]) == ("a", "b", "c")


def test_npz_at_another_size_is_cropped_at_the_centre(tmp_path):
    """As PIL does it: bilinear, antialiased, of the square at the centre."""
    for H, W in ((40, 60), (61, 40), (40, 40)):
        x = np.repeat(np.repeat(images_of(4, H // 10 + 1, W // 10 + 1, 3), 10, 1), 10, 2)[:, :H, :W]
        np.savez(tmp_path / "a.npz", images=x[:2], test_images=x[2:])
        S, top, left = min(H, W), (H - min(H, W)) // 2, (W - min(H, W)) // 2
        for size in (16, 50):
            got = all_of(p.load_data(str(tmp_path / "a.npz"), "nowhere", size)).permute(0, 2, 3, 1)
            squares = [Image.fromarray(image[top:top + S, left:left + S]) for image in x]
            want = [np.asarray(square.resize((size, size), Image.BILINEAR)) for square in squares]
            assert (got.int() - torch.from_numpy(np.stack(want)).int()).abs().max() <= 2


def test_large_images_in_an_npz_are_refused_without_an_image_size(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=images_of(3, 20, 129))
    line = refused(capsys, str(tmp_path / "a.npz"), "nowhere")
    assert "129 x 20" in line and "--image-size 64" in line
    assert p.load_data(str(tmp_path / "a.npz"), "nowhere", 64).train.shape == (2, 1, 64, 64)


GOOD = {"images": images_of(6, 4, 4, 3), "labels": np.arange(6) % 2}
TESTED = GOOD | {"test_images": GOOD["images"], "test_labels": GOOD["labels"]}
BAD = {  # what is in the file, and the words of the error
    "no images": ({"x": GOOD["images"]}, "images is not a file"),
    "images of real numbers": (GOOD | {"images": np.zeros((6, 4, 4), np.float32)}, "images are float32 (6, 4, 4), not uint8"),
    "images in rows": (GOOD | {"images": np.zeros((6, 48), np.uint8)}, "(6, 48), not uint8 (N,H,W) or (N,H,W,C)"),
    "channels first": (GOOD | {"images": np.zeros((6, 3, 4, 4), np.uint8)}, "(6, 3, 4, 4), not uint8"),
    "videos": (GOOD | {"images": np.zeros((6, 4, 4, 1, 3), np.uint8)}, "(6, 4, 4, 1, 3)"),
    "one number": (GOOD | {"images": np.uint8(3)}, "()"),
    "nothing": (GOOD | {"images": np.zeros((0, 4, 4, 3), np.uint8), "labels": np.zeros(0, int)}, "(0, 4, 4, 3)"),
    "one image": ({"images": GOOD["images"][:1]}, "at least 2 images"),
    "fewer labels": (GOOD | {"labels": np.zeros(5, int)}, "labels are int64 (5,), not 6 integers"),
    "labels in a column": (GOOD | {"labels": np.zeros((6, 1), int)}, "labels are int64 (6, 1)"),
    "labels below 0": (GOOD | {"labels": np.arange(6) - 1}, "integers from 0 to 65535"),
    "labels without end": (GOOD | {"labels": np.arange(6) * 10**9}, "integers from 0 to 65535"),
    "real labels": (GOOD | {"labels": np.zeros(6)}, "labels are float64"),
    "fewer names than labels": (GOOD | {"names": ["a"]}, "a name for each label"),
    "no test labels": ({key: a for key, a in TESTED.items() if key != "test_labels"}, "test_labels is not a file"),
    "no labels": ({key: a for key, a in TESTED.items() if key != "labels"}, "labels is not a file"),
    "no test images": ({key: a for key, a in TESTED.items() if key != "test_images"}, "test_images is not a file"),
    "test images of another size": (TESTED | {"test_images": np.zeros((6, 5, 4, 3), np.uint8)}, "test_images of the shape"),
    "grey test images": (TESTED | {"test_images": np.zeros((6, 4, 4), np.uint8)}, "test_images of the shape of images"),
    "bad test labels": (TESTED | {"test_labels": np.arange(6) - 3}, "test_labels are int64"),
    "objects": (GOOD | {"images": np.array([Payload()] * 6)}, "Object arrays cannot be loaded"),
    "names that are objects": (GOOD | {"names": np.array([Payload(), Payload()])}, "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("arrays, words", BAD.values(), ids=BAD)
def test_an_npz_of_other_things_is_refused(arrays, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **arrays)
    line = refused(capsys, "a.npz", "nowhere")
    assert line.startswith("--dataset a.npz: ") and words in line
    assert not Path("payload ran").exists()


def npy():
    buffer = io.BytesIO()
    np.save(buffer, GOOD["images"])
    return buffer.getvalue()


@pytest.mark.parametrize("raw", [b"", b"text", npy(), pickle.dumps(Payload())], ids=["empty", "text", "npy", "pickle"])
def test_what_is_no_zip_is_refused(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.npz").write_bytes(raw)
    assert refused(capsys, "a.npz", "nowhere") == "--dataset a.npz: File is not a zip file"
    assert not Path("payload ran").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["images", "labels", "test_images", "test_labels", "names"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_npz_is_refused(save, key, damage, tmp_path, capsys):
    """No image with a wrong pixel goes unseen: each array has a checksum."""
    path = tmp_path / "a.npz"
    save(path, **TESTED, names=["a", "b"])
    assert len(p.load_data(str(path), "nowhere").train) == 6
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
    at = info.header_offset + 30 + len(info.filename) + info.compress_size  # 20 bytes of extra fields stand before the data
    if damage == "cut":
        raw = raw[:at]
    else:
        raw[at] ^= 16
    path.write_bytes(raw)
    assert refused(capsys, str(path), "nowhere").startswith(f"--dataset {path}: ")


def test_an_npz_that_there_is_not(tmp_path, capsys):
    assert "nor a folder or a FILE.npz" in refused(capsys, str(tmp_path / "a.npz"), "nowhere")


def test_a_script_reads_its_own_samples(tmp_path, monkeypatch):
    """samples.npz of a run is a data set."""
    name = "diffusion"  # its samples have labels
    module = importlib.import_module(name)
    tiny.small_digits(module, monkeypatch)
    assert tiny.run(module, tiny.flags(name, tmp_path / "run", "--num-samples", 20)) == 0
    data = p.load_data(str(tmp_path / "run" / "samples.npz"), "nowhere")
    assert data.train.shape == (18, 1, 8, 8) and data.test.shape == (2, 1, 8, 8) and data.names == tuple("0123456789")
    order = np.random.RandomState(0).permutation(20)
    with np.load(tmp_path / "run" / "samples.npz") as arrays:
        assert np.array_equal(all_of(data)[:, 0].numpy(), arrays["images"][order, :, :, 0])


# --------------------------------------------------------------------------------------------------------- tools/pack.py


pack = tiny.load_tool("pack")


def classes_of_photographs(root):
    """Two classes in train/ and test/, a file in neither, one that is broken, one turned by a quarter and one large JPEG."""
    for i in range(24):
        store(root / ("test" if i % 6 == 0 else "train") / "ab"[i % 2] / f"{i}.png", images_of(1, 12, 9 + i % 3, 3, seed=i)[0])
    (root / "train" / "a" / "broken.png").write_bytes(b"broken")
    (root / "train" / "a" / "turned.jpg").write_bytes(photograph((400, 300), 6))
    store(root / "other" / "1.png", images_of(1, 8, 8, 3)[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_on_the_packed_file_is_that_on_the_folder(script, tmp_path, capsys):
    """Bit for bit: weights, figures and samples, classes and split."""
    module = importlib.import_module(script)
    classes_of_photographs(tmp_path / "photos")
    pack.main([str(tmp_path / "photos"), str(tmp_path / "new" / "photos.npz"), "--image-size", "8"])
    out, err = capsys.readouterr()
    assert out == (f"{tmp_path / 'new' / 'photos.npz'}: 21 images to train on, 4 to test on, of 3 x 8 x 8; 2 classes"
                   "; 1 skipped; 1 in unused folders\n") and "broken.png" in err
    runs = []
    for name, flags in (("photos", ["--image-size", 8]), ("new/photos.npz", [])):
        runs.append(tmp_path / f"run{len(runs)}")
        assert tiny.run(module, tiny.flags(script, runs[-1], "--dataset", tmp_path / name, *flags)) == 0
        assert f"{name}: 21 images to train on, 4 to test on, of 3 x 8 x 8; " in capsys.readouterr().out
    tiny.assert_same_state(*map(tiny.load_checkpoint, runs), ignore=("dataset", "image_size"))
    assert tiny.metrics(runs[0]) == tiny.metrics(runs[1])
    assert np.array_equal(*(np.load(run / "samples.npz")["images"] for run in runs))


@pytest.mark.parametrize("names", [(), ("Größe", "日本", os.fsdecode(b"not \xff utf-8"))])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pack_keeps_everything(names, mode, tmp_path):
    for i in range(33):
        path = tmp_path / "photos" / (names[i % 3] if names else "") / f"{i}.png"
        paint(path, i if mode == "L" else (i, 0, 1), mode=mode)
    path = tmp_path / "photos.npz"
    pack.main([str(tmp_path / "photos"), str(path)])
    data = p.load_data(str(tmp_path / "photos"), "nowhere")
    assert data.train.shape == (29, len(mode), 6, 6) and set(data.names) == set(names)
    assert_same_data(data, p.load_data(str(path), "nowhere"))
    with np.load(path) as arrays:
        assert set(arrays) == {"images", "test_images"} | ({"labels", "test_labels", "names"} if names else set())
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("argv, code, words", [
    (["nowhere", "a.npz"], 2, "FOLDER nowhere: is not a folder"),
    (["photos", "a.zip"], 2, "FILE.npz a.zip: must be a file whose name ends in .npz"),
    (["photos", "folder.npz"], 2, "FILE.npz folder.npz: must be a file"),
    (["photos", "a.npz", "--image-size", "-1"], 2, "--image-size -1: must be from 0 to 4096"),
    (["photos", "a.npz", "--image-size", "x"], 2, "--image-size"),
    (["photos"], 2, "FILE.npz"),
    (["photos", "a file/a.npz"], 1, "cannot write"),
    (["folder.npz", "a.npz"], 2, "at least 2 are needed"),
    (["large", "a.npz"], 2, "add --image-size 64"),
])
def test_pack_says_what_it_cannot_do(argv, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        paint(Path(f"photos/{i}.png"))
        paint(Path(f"large/{i}.png"), size=(200, 100))
    Path("folder.npz").mkdir()
    Path("a file").write_text("")
    Path("a.npz").write_text("old")
    with pytest.raises(SystemExit) as e:
        pack.main(argv)
    assert e.value.code == code and words in error_line(capsys.readouterr().err)
    assert Path("a.npz").read_text() == "old"  # a file that is there stays until a new one is whole


def test_a_pack_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    for i in range(2):
        paint(tmp_path / "photos" / f"{i}.png")
    path = tmp_path / "a.npz"
    path.write_text("old")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SystemExit) as e:
        pack.main([str(tmp_path / "photos"), str(path)])
    assert e.value.code == 1 and "No space left on device" in error_line(capsys.readouterr().err)
    assert path.read_text() == "old" and {f.name for f in tmp_path.iterdir()} == {"photos", "a.npz"}
