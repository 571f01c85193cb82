"""Networks that turn images into features, for tools/evaluate.py.

- mnist, fashion_mnist and digits as they are: the classifiers of tools/classifiers/. Their SHA-256 is written below.
- Other data with classes (cifar10, a folder, a FILE.npz, another --image-size): a classifier like those, trained on the
  train split in a few minutes.
- Data without classes: the same network, trained to recognise two views of one image (SimCLR, Chen et al. 2020,
  arXiv:2002.05709). A view is a part of the image with another brightness and contrast, so the features, and each figure
  that comes from them, hardly depend on these.
- --inception: InceptionV3 of torch-fidelity, the network of published FIDs.

A network that is trained here is kept in DATA_DIR/features/, under a name with a hash of the images and labels that it was
trained on. Figures of two networks do not compare.
"""

import hashlib
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from metrics import moments

from diffusion import load_data, progress, write

WEIGHTS = Path(__file__).resolve().parent / "classifiers"
SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}  # H, W, C
SHA256 = {
    "digits": "ee169929eea868e1e0f829d8e1736558bcbad5869c2add6779a5754138df145e",
    "mnist": "f35273575a0a63d4b8b586673e91f8dbbf7f39b6c9fc91ff4d5546a4bdf9e97a",
    "fashion_mnist": "735f205be844595770a3eb1324481a7e0fff1f6d665aa1db5eb0a70df1291932",
}
RECIPE = "1"  # of networks that are trained here; another one makes other files in DATA_DIR/features/
D = 64  # dimension of the features
CHUNK = 100  # images in memory at once


def nhwc(x):
    return x.permute(0, 2, 3, 1)


# ---- the network


def block(c_in, c_out):
    """(B,c_in,H,W) -> (B,c_out,H/2,W/2)"""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))


class Classifier(nn.Module):
    """Convolutions and two linear layers; `mean`, `cov` are the moments of the train split's features.

    shape: H, W, C. With 0 classes the head has D outputs, which are compared with those of another view.
    """

    def __init__(self, shape, classes, note=""):
        super().__init__()
        H, W, C = shape
        most = min(H, W).bit_length() - 1  # how often the shorter side can be halved
        depth = min(max(most - 1, 3), most)  # 3 up to 31 pixels, 6 of 128
        widths = [C, 32] + [64] * depth
        blocks = [block(widths[i], widths[i + 1]) for i in range(depth)]
        self.convolutions = nn.Sequential(*blocks)  # B C H W -> B 64 H/8 W/8 where depth is 3
        cells = (H >> depth) * (W >> depth)
        self.hidden = nn.Sequential(nn.Linear(widths[depth] * cells, D, bias=False), nn.BatchNorm1d(D), nn.ReLU())
        self.head = nn.Linear(D, classes or D)
        self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))
        self.register_buffer("cov", torch.zeros(D, D, dtype=torch.float64))
        self.classes = classes
        self.note = note  # what this network is, in words

    def forward(self, x):
        """x: (B,C,H,W) in [0,1] -> features (B,D) >= 0"""
        return self.hidden(self.convolutions(x.contiguous(memory_format=torch.channels_last)).flatten(1))


@torch.no_grad()
def features(images, classifier):
    """images: uint8 {0..255} (N,H,W,C), array or tensor -> float32 array (N,D)."""
    chunks = torch.as_tensor(images).permute(0, 3, 1, 2).split(CHUNK)
    return torch.cat([classifier(x.float() / 255) for x in chunks]).numpy()


@torch.no_grad()
def predict(f, classifier):
    """f: features (N,D) -> predicted classes (N,)."""
    return classifier.head(torch.as_tensor(f)).argmax(1).numpy()


def load_classifier(dataset):
    """The committed classifier in eval mode; ValueError where its file is not the one this program was written with."""
    path = WEIGHTS / f"{dataset}.pt"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[dataset]:
        raise ValueError(f"{path} does not have the SHA-256 written in features.py: its numbers would not compare")
    classifier = Classifier(SHAPES[dataset], 10, f"the committed classifier of the ten classes of {dataset}")
    classifier.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return classifier.to(memory_format=torch.channels_last).eval()


# ---- training


def augment(x, shift, flip):
    """Each image of x (B,C,H,W) moved by up to `shift` pixels each way, and with `flip` mirrored by chance."""
    B, _, H, W = x.shape
    rows, cols = (torch.randint(2 * shift + 1, (B, 1)) + torch.arange(size) for size in (H, W))
    if flip:
        cols = torch.where(torch.rand(B, 1) < 0.5, cols, cols.flip(1))
    x = F.pad(x, (shift,) * 4)
    return x[torch.arange(B)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def view(x):
    """Of each image of x (B,C,H,W) in [0,1] a part of 0.6 to 1 of its sides, with another contrast and brightness."""
    B = len(x)
    side = 1 - 0.4 * torch.rand(B)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = side
    theta[:, 1, 1] = side
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - side)[:, None]  # its centre; the image is [-1,1]
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)
    contrast = 0.6 + 0.8 * torch.rand(B, 1, 1, 1)
    brightness = 0.4 * torch.rand(B, 1, 1, 1) - 0.2
    return x * contrast + brightness


def contrastive_loss(z, temperature=0.5):
    """SimCLR eq. 1; z: (2B,D), where rows i and B+i are of two views of one image."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def fit(classifier, loss_of, n, epochs):
    """Train by loss_of(i), the loss of the images with indices i of n."""
    batches = -(-n // 100)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * batches)
    classifier.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for i in torch.randperm(n).split(100):
            if len(i) == 1 and n > 1:  # batch norm needs two
                continue
            loss = loss_of(i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        print(f"epoch {epoch}/{epochs}  loss {total:.4f}", file=sys.stderr)
    classifier.eval()


def fit_classes(classifier, x, y, epochs, shift, flip=False):
    """Train on images x uint8 (N,C,H,W) of classes y (N,)."""

    def loss_of(i):
        return F.cross_entropy(classifier.head(classifier(augment(x[i].float() / 255, shift, flip))), y[i])

    fit(classifier, loss_of, len(x), epochs)


def fit_views(network, x, epochs):
    """Train on images x uint8 (N,C,H,W), without classes."""

    def loss_of(i):
        pixels = x[i].float() / 255
        return contrastive_loss(network.head(network(torch.cat([view(pixels), view(pixels)]))))

    fit(network, loss_of, len(x), epochs)


def set_moments(network, train):
    """Keep the mean and the covariance of the features of train images (N,C,H,W)."""
    mean, cov = moments(features(nhwc(train), network))
    network.mean.copy_(torch.from_numpy(mean))
    network.cov.copy_(torch.from_numpy(cov))


def accuracy_of(classifier, data):
    """The share of test images whose predicted class is theirs."""
    return float((predict(features(nhwc(data.test), classifier), classifier) == data.test_labels.numpy()).mean())


def train_classifier(dataset, data_dir="data"):
    """Trains on the train split, writes tools/classifiers/NAME.pt, prints the test accuracy and the hash for SHA256."""
    torch.manual_seed(0)
    data = load_data(dataset, data_dir)
    epochs, shift = {"digits": (30, 1), "mnist": (5, 2), "fashion_mnist": (6, 0)}[dataset]
    classifier = Classifier(SHAPES[dataset], 10).to(memory_format=torch.channels_last)
    fit_classes(classifier, data.train, data.train_labels, epochs, shift, flip=dataset == "fashion_mnist")
    set_moments(classifier, data.train)
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{dataset}.pt"
    torch.save({name: value.contiguous() for name, value in classifier.state_dict().items()}, path)
    print(f"test accuracy {accuracy_of(classifier, data):.2%} ({path})")
    print(f'SHA256["{dataset}"] = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')


def epochs_for(n, images=300_000, least=450):
    """So many epochs of n images that a network sees about `images` of them: 1 to 30, more where these are few steps."""
    return max(1, min(round(images / n), 30), math.ceil(least / math.ceil(n / 100)))


# ---- the network of other data, trained where it is not there yet


def digest(*tensors):
    """The first digits of a hash of tensors, with their shapes."""
    sha = hashlib.sha256(RECIPE.encode())
    for x in tensors:
        sha.update(str((x.dtype, tuple(x.shape))).encode())
        for part in x.split(4096):
            sha.update(part.numpy().tobytes())
    return sha.hexdigest()[:16]


def train_network(name, data):
    """A classifier of the classes of the data, or without classes a self-supervised network: its state and a note."""
    C, H, W = data.train.shape[1:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Classifier((H, W, C), len(data.names)).to(memory_format=torch.channels_last)
        if data.names:
            fit_classes(network, data.train, data.train_labels, epochs_for(len(data.train)), max(H // 14, 1))
        else:
            fit_views(network, data.train, epochs_for(len(data.train)))
    set_moments(network, data.train)
    note = f"a self-supervised network trained on {name}, which has no classes"
    if data.names:
        right = f"test accuracy {accuracy_of(network, data):.2%}"
        note = f"a classifier trained on the {len(data.names)} classes of {name} ({right})"
    return {"network": network.state_dict(), "note": note}


def own_network(dataset, data, data_dir):
    """The network of this data in eval mode, from DATA_DIR/features/ or trained now."""
    if len(data.train) < 2 or len(data.test) < 2:
        raise ValueError(f"{dataset}: {len(data.train)} train and {len(data.test)} test images; at least 2 of each are needed")
    name = Path(dataset).resolve().name if Path(dataset).exists() else dataset
    short = re.sub(r"[^\w.-]", "_", Path(name).stem)
    path = Path(data_dir, "features", f"{short}-{digest(data.train, data.train_labels)}.pt")
    C, H, W = data.train.shape[1:]
    network = Classifier((H, W, C), len(data.names)).to(memory_format=torch.channels_last)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(saved["network"])
    except Exception as e:  # whatever a missing or damaged file raises
        why = "" if isinstance(e, FileNotFoundError) else f" ({path} cannot be read)"
        print(f"training the network of the features of {name}, once{why}", file=sys.stderr)
        saved = train_network(name, data)
        network.load_state_dict(saved["network"])
        write(path, lambda f: torch.save(saved, f))
    network.note = saved["note"]
    return network.eval()


# ---- InceptionV3


def inception_extractor():
    """torch-fidelity's network and the file of its weights; ValueError, in words for the user, where one is missing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as e:
        raise ValueError(f"--inception needs the package torch-fidelity (pip install torch-fidelity): {e}") from e
    weights = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not weights.is_file():
        raise ValueError(f"--inception needs the weights {weights}, from {URL_INCEPTION_V3}")
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), weights


@torch.no_grad()
def inception_features(images, network):
    """images: uint8 {0..255} (N,H,W,C), grey ones as three equal channels -> float32 array (N,2048)."""
    device = next(network.parameters()).device
    chunks = torch.as_tensor(images).permute(0, 3, 1, 2).split(CHUNK)
    found = []
    for x in progress(chunks, "InceptionV3"):
        x = x.expand(-1, 3, -1, -1).contiguous().to(device)
        found.append(network(x)[0].cpu())
    return torch.cat(found).numpy()


def inception_moments(data, network, weights, data_dir):
    """mean (2048,), cov (2048,2048) of the whole train split, kept in DATA_DIR/features/: they take long on a CPU."""
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    path = Path(data_dir, "features", f"inception-{sha}-{digest(data.train)}.npz")
    if not path.is_file():
        mean, cov = moments(inception_features(nhwc(data.train), network))
        write(path, lambda f: np.savez(f, mean=mean, cov=cov))
    with np.load(path) as saved:
        return saved["mean"], saved["cov"]
