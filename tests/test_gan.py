"""The mathematics of gan.py: penalties in closed form, whose gradients go where, and which losses converge on small games."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import gan
import tiny
from gan import Config, Discriminator, Generator, diversity, loss_d, loss_g, sample, squared_gradient, wgan_penalty
from tools import gan_toy as toy
from tools.evaluate import evaluate

every_loss = pytest.mark.parametrize("loss", gan.LOSS_D)


def build(shape=(1, 8, 8), classes=3, **fields):
    """Small networks in float64 and their Config."""
    C, H, W = shape
    cfg = gan.choose(Config(**{"width": 8, "z_dim": 5} | fields), H, W)
    torch.manual_seed(0)
    G, D = Generator(C, H, W, classes, cfg).double(), Discriminator(C, H, W, classes, cfg).double()
    return G, D, cfg


def batch(n=6, shape=(1, 8, 8), z_dim=5):
    return torch.rand(n, *shape, dtype=torch.float64) * 2 - 1, torch.arange(n) % 3, torch.randn(n, z_dim, dtype=torch.float64)


class LinearCritic(nn.Module):
    """w . x + b: its gradient is w everywhere."""

    def __init__(self, shape=(1, 8, 8)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x, y):
        return (self.w * x).sum((1, 2, 3)) + 3


# ---- losses and penalties


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_penalties_of_a_linear_critic(shape):
    """Over all of C, H and W of each image: the squared norm of w, and (|w| - 1)^2, whatever the images."""
    torch.manual_seed(0)
    D, (real, y, _), fake = LinearCritic(shape), batch(6, shape), torch.randn(6, *shape, dtype=torch.float64)
    real.requires_grad_()
    norm = D.w.norm()
    assert_close(squared_gradient(D(real, y), real), norm.square().expand(6))
    assert_close(wgan_penalty(D, real.detach(), fake, y), ((norm - 1) ** 2).expand(6))
    (grad,) = torch.autograd.grad(squared_gradient(D(real, y), real).mean(), D.w)
    assert_close(grad, 2 * D.w.detach())


def test_penalties_are_finite_where_the_gradient_is_nought():
    D, (real, y, _) = LinearCritic(), batch()
    nn.init.zeros_(D.w)
    for value in (squared_gradient(D(x := real.clone().requires_grad_(), y), x).mean(), wgan_penalty(D, real, -real, y).mean()):
        (grad,) = torch.autograd.grad(value, D.w)
        assert grad.isfinite().all()


def test_a_penalty_is_that_of_each_image():
    """Against a loop, one image at a time, on a network."""
    _, D, cfg = build()
    real, y, _ = batch()
    real.requires_grad_()
    want = []
    for i in range(6):
        x = real[i:i + 1].detach().requires_grad_()
        (grad,) = torch.autograd.grad(D(x, y[i:i + 1])[0], x)
        want.append(grad.norm() ** 2)
    assert_close(squared_gradient(D(real, y), real), torch.stack(want))


def test_interpolation_is_one_place_for_each_image(monkeypatch):
    seen = []

    class Record(LinearCritic):
        def forward(self, x, y):
            seen.append(x.detach())
            return super().forward(x, y)

    real, fake = torch.zeros(5, 3, 4, 4, dtype=torch.float64), torch.ones(5, 3, 4, 4, dtype=torch.float64)
    wgan_penalty(Record((3, 4, 4)), real, fake, None)
    place = seen[0].flatten(1)
    assert (place == place[:, :1]).all() and len(place[:, 0].unique()) == 5 and (0 <= place).all() and (place <= 1).all()


def test_losses_in_closed_form():
    real, fake = torch.randn(2, 7, dtype=torch.float64)
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    assert_close(gan.LOSS_D["minimax"](real, fake), -torch.log(p) - torch.log(1 - q))  # GAN eq. 1
    assert_close(gan.LOSS_D["nonsaturating"](real, fake), -torch.log(p) - torch.log(1 - q))  # D is that of GAN eq. 1
    assert_close(gan.LOSS_G["minimax"](real, fake), torch.log(1 - q))
    assert_close(gan.LOSS_G["nonsaturating"](real, fake), -torch.log(q))
    assert_close(gan.LOSS_D["relativistic"](real, fake), -torch.log(torch.sigmoid(real - fake)))  # R3GAN eq. 2
    assert_close(gan.LOSS_G["relativistic"](real, fake), -torch.log(torch.sigmoid(fake - real)))
    assert_close(gan.LOSS_D["hinge"](real, fake), (1 - real).clamp(min=0) + (1 + fake).clamp(min=0))
    assert_close(gan.LOSS_D["wgan-gp"](real, fake), fake - real)
    for loss in ("hinge", "wgan-gp"):
        assert_close(gan.LOSS_G[loss](None, fake), -fake)
    assert gan.LOSS_D.keys() == gan.LOSS_G.keys()


@every_loss
def test_each_step_leaves_the_other_network_alone(loss):
    G, D, cfg = build(loss=loss, r1=0.3, r2=0.2)
    real, y, z = batch()
    total, terms = loss_d(G, D, real, y, z, 10, cfg)
    total.mean().backward()
    assert all(p.grad is None for p in G.parameters())
    assert sum(p.grad.abs().sum() for p in D.parameters() if p.grad is not None) > 0
    assert {"d_real", "d_fake", "gap", "r1", "r2"} | ({"gp"} if loss == "wgan-gp" else set()) == terms.keys()
    D.zero_grad(set_to_none=True)
    D.requires_grad_(False)
    loss_g(G, D, real, y, z, cfg).mean().backward()
    assert all(p.grad is None for p in D.parameters())
    assert sum(p.grad.abs().sum() for p in G.parameters() if p.grad is not None) > 0


def test_the_total_is_its_terms():
    G, D, cfg = build(r1=0.3, r2=0.2, anneal=5)
    real, y, z = batch()
    total, t = loss_d(G, D, real, y, z, 10, cfg)
    weight = 1 + 9 * math.exp(-10 / 5)
    assert_close(total, F.softplus(-t["gap"]) + 0.5 * weight * (0.3 * t["r1"] + 0.2 * t["r2"]))
    fake = G(z, y).detach()
    assert_close(t["d_real"], D(real, y))
    assert_close(t["d_fake"], D(fake, y))
    plain, t = loss_d(G, D, real, y, z, 10, gan.choose(Config(loss="hinge"), 8, 8))
    assert "r1" not in t and "r2" not in t
    assert_close(plain, (1 - t["d_real"]).relu() + (1 + t["d_fake"]).relu())


def softplus(x):
    return torch.log(1 + torch.exp(x))


PLAYERS = {  # what D and G minimise, from scores of real and of fake images
    "relativistic": (lambda r, f: softplus(f - r), lambda r, f: softplus(r - f)),
    "nonsaturating": (lambda r, f: softplus(-r) + softplus(f), lambda r, f: softplus(-f)),
    "minimax": (lambda r, f: softplus(-r) + softplus(f), lambda r, f: -softplus(f)),
    "hinge": (lambda r, f: (1 - r).clamp(min=0) + (1 + f).clamp(min=0), lambda r, f: -f),
    "wgan-gp": (lambda r, f: f - r, lambda r, f: -f)}


@every_loss
def test_what_both_players_minimise(loss):
    """In the scores of their own batch, with every penalty that is asked for; at what sign is seen in the gradients, too."""
    G, D, cfg = build(loss=loss, r1=0.3, r2=0.2, anneal=5)
    real, y, z = batch()
    of_d, of_g = PLAYERS[loss]
    s_real, s_fake = D(real, y), D(G(z, y).detach(), y)
    torch.manual_seed(1)
    total, terms = loss_d(G, D, real, y, z, 3, cfg)
    weight = 1 + 9 * math.exp(-3 / 5)
    want = of_d(s_real, s_fake) + weight * (0.3 * terms["r1"] + 0.2 * terms["r2"]) / 2
    if loss == "wgan-gp":
        torch.manual_seed(1)
        want = want + 10 * wgan_penalty(D, real, G(z, y).detach(), y)
    assert_close(total, want)
    at = real.clone().requires_grad_()
    assert_close(terms["r1"], torch.autograd.grad(D(at, y).sum(), at)[0].square().sum((1, 2, 3)))
    assert_close(terms["gap"], s_real - s_fake)
    found = loss_g(G, D, real, y, z, cfg)
    assert_close(found, of_g(D(real, y), D(G(z, y), y)))
    # G is better off where D scores its images higher, D where it scores real ones higher and fake ones lower
    r, f = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    (up,) = torch.autograd.grad(gan.LOSS_G[loss](r, f).sum(), f)
    to_real, to_fake = torch.autograd.grad(gan.LOSS_D[loss](0.1 * r, 0.1 * f).sum(), (r, f))
    assert (up < 0).all() and (to_real < 0).all() and (to_fake > 0).all()


# ---- small games whose outcome is known


def play(loss, r):
    """Distance from the equilibrium of Dirac-GAN after each step; a round about it takes 600."""
    return [math.hypot(*at) for at in toy.dirac(loss, r, steps=1100)]


def test_dirac_gan():
    """The default converges. Without a penalty every loss circles the equilibrium or leaves it, and so does WGAN-GP."""
    path = play("relativistic", 0.5)
    assert path[-1] < 1e-3 < path[0]  # 4e-4
    for loss in ("relativistic", "nonsaturating", "minimax", "hinge", "wgan-gp"):
        assert min(play(loss, 0.0)) > 0.4, loss


def test_a_ring_of_gaussians():
    """Eight modes in the plane: the default covers them all with samples that lie on them."""
    distance, mode = torch.cdist(toy.ring("relativistic", 0.1), toy.CENTRES).min(1)
    share = torch.bincount(mode[distance < 0.25], minlength=8) / 4000
    assert (share > 0.04).all() and share.sum() > 0.7


def test_diversity():
    x = torch.randn(50, 3, 4, 4)
    assert diversity(x[:1].expand(50, -1, -1, -1)) == 0
    assert diversity(x) == pytest.approx(diversity(7 * x), rel=1e-5)
    assert diversity(x) == pytest.approx(2**0.5, rel=0.05)  # two random directions
    pairs = [(a - b).norm().item() for i, a in enumerate(x) for b in x[:i]]
    assert diversity(x) == pytest.approx(np.mean(pairs) / x.flatten(1).norm(dim=1).mean().item(), rel=1e-5)


# ---- networks


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (1, 28, 28), (3, 33, 49)])
@pytest.mark.parametrize("normed", [False, True])
def test_any_size(shape, normed):
    G, D, cfg = build(shape, spectral_norm=normed)
    z, y = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 2])
    x = G(z, y)
    assert x.shape == (2, *shape) and D(x, y).shape == (2,)
    total, _ = loss_d(G, D, x.detach(), y, z, 0, cfg)
    total.mean().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters() if p.grad is not None)


@pytest.mark.parametrize("normed", [False, True])
def test_spectral_norm_is_of_each_weight_of_d_but_for_the_classes(normed):
    """Its largest singular value is 1, a convolution's weight being a matrix with a row for each output; G has none."""
    G, D, _ = build(spectral_norm=normed, blocks=2)
    x, y, _ = batch()
    for _ in range(100 * normed):
        D(x, y)  # each call is a step of the power iteration
    layers = [layer for layer in D.eval().modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 1 + 2 * 2 * 2 + 2  # stem, two blocks at two resolutions, last and out
    for layer in layers:
        assert nn.utils.parametrize.is_parametrized(layer) == normed
        assert not normed or torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.01)
    assert not any(nn.utils.parametrize.is_parametrized(layer) for layer in (*G.modules(), D.class_vector))


def test_labels_reach_both_networks():
    G, D, _ = build()
    _, _, z = batch(1)
    x = G(z.expand(3, -1), torch.arange(3))
    assert not torch.equal(x[0], x[1])
    scores = D(x[:1].expand(3, -1, -1, -1), torch.arange(3))
    assert len(scores.unique()) == 3
    e = D.class_vector.weight  # (3,8); projection eq. 3, scaled to a variance that the width does not change
    assert_close(scores - scores[0], (e - e[0]) @ D.features(x[:1])[0] / 8**0.5)


def test_bf16_keeps_small_differences_of_large_scores():
    """A number that is added to every score changes no difference of two, which is all that the relativistic loss sees."""
    _, D, _ = build()
    D.float()
    x, y, _ = batch()
    found = []
    for shift in (0.0, 100.0):
        nn.init.constant_(D.out.bias, shift)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(D(x.float(), y) - shift)
            assert D.features(x.float()).dtype == torch.bfloat16
    assert_close(found[1], found[0], atol=1e-4, rtol=0)
    assert found[0].std() > 0.01


def test_the_features_of_d_against_their_formula():
    """At one resolution: the stem, a residual block, and all places together in one layer, each after an activation."""
    _, D, _ = build((2, 4, 3))
    for p in D.parameters():
        nn.init.normal_(p, std=0.3)

    def act(h, layer):
        h = h + layer.bias.view(-1, *(1,) * (h.dim() - 2))
        return math.sqrt(2) * torch.where(h > 0, h, 0.2 * h)

    x, _, _ = batch(5, (2, 4, 3))
    first, conv1, second, conv2 = D.levels[0][0]
    h = F.conv2d(x, D.stem.weight)
    h = h + F.conv2d(act(F.conv2d(act(h, first), conv1.weight, padding=1), second), conv2.weight, padding=1)
    h = act(h, D.act).permute(0, 2, 3, 1).flatten(1)
    assert_close(D.features(x), act(F.linear(h, D.last.weight, D.last.bias), D.act_last))


def test_layers_begin_with_their_gain():
    """The mean square of what a convolution puts out is gain^2 for an input of 1, and a residual branch begins at a tenth."""
    x = torch.randn(200, 64, 3, 3)
    for gain, kernel in ((1.0, 3), (0.5, 3), (1.0, 1)):
        assert gan.conv(64, 256, gain, kernel)(x)[:, :, 1, 1].square().mean().item() == pytest.approx(gain**2, rel=0.1)
    block = gan.ResBlock(64, lambda layer: layer)
    assert 0.07 < (block(x) - x)[:, :, 1, 1].std() < 0.14


def test_an_odd_size_is_a_whole_one_that_is_cropped():
    """5 x 7 in patches of 4: D sees mid-grey on the right and below, and what G makes there is dropped."""
    (G, D, _), (whole_G, whole_D, _) = (build(shape, patch=4) for shape in ((2, 5, 7), (2, 8, 8)))
    whole_G.load_state_dict(G.state_dict())
    whole_D.load_state_dict(D.state_dict())
    x, y, z = batch(3, (2, 5, 7))
    assert_close(G(z, y), whole_G(z, y)[..., :5, :7])
    assert_close(D(x, y), whole_D(F.pad(x, (0, 1, 0, 3)), y))


def test_what_is_chosen_by_size_and_loss():
    for side, patch in {8: 1, 15: 1, 16: 2, 28: 2}.items():
        assert gan.choose(Config(), side + 9, side).patch == patch
    for loss in gan.LOSS_D:
        cfg = gan.choose(Config(loss=loss), 8, 8)
        assert (cfg.r1, cfg.r2) == ((0.5, 0.5) if loss == "relativistic" else (0, 0))
    cfg = gan.choose(Config(r1=0.0, r2=2.0, patch=4), 8, 8)
    assert (cfg.r1, cfg.r2, cfg.patch) == (0, 2, 4)


def test_samples_lie_in_range():
    G, _, _ = build()
    _, y, z = batch()
    x = sample(G, 100 * z, y)
    assert x.min() >= -1 and x.max() <= 1 and not x.requires_grad
    assert torch.equal(sample(G, z, y, 0.5), sample(G, 0.5 * z, y))


def test_interpolations_lead_from_one_noise_vector_to_another():
    """Rows of ten: both ends are samples of the first and second half of the noise, of the classes that are asked for."""
    G, _, cfg = build(seed=5)
    G = G.float()
    run = SimpleNamespace(device="cpu", labels=lambda n: torch.arange(n) % 2 + 1)
    rows = gan.interpolations(G, cfg, run).unflatten(0, (10, 10))
    z = torch.randn(2, 10, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    for end, noise in ((0, z[0]), (9, z[1])):
        want = gan.to_uint8(sample(G, noise, run.labels(10)))
        assert (rows[:, end].int() - want.int()).abs().max() <= 1  # cos(pi / 2) is not quite 0
    at_30_degrees = gan.to_uint8(sample(G, math.sqrt(3) / 2 * z[0, :] + z[1] / 2, run.labels(10)))
    assert (rows[:, 3].int() - at_30_degrees.int()).abs().max() <= 1  # on the arc, where noise keeps its length


def test_stacked_digits():
    data = gan.Data(torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), torch.arange(10),
                    torch.arange(40, 60, dtype=torch.uint8).view(5, 1, 2, 2), torch.arange(5), tuple("0123456789"))
    stacked = gan.stack(data)
    assert stacked.train.shape == (10, 3, 2, 2) and stacked.test.shape == (5, 3, 2, 2) and stacked.names == ()
    known = {image.numpy().tobytes() for image in data.train[:, 0]}
    assert all(channel.numpy().tobytes() in known for image in stacked.train for channel in image)
    assert torch.equal(gan.stack(data).train, stacked.train)
    assert any(len(image.flatten(1).unique(dim=0)) == 3 for image in stacked.train)  # each channel is a draw of its own
    tested = {image.numpy().tobytes() for image in data.test[:, 0]}
    assert all(channel.numpy().tobytes() in tested for image in stacked.test for channel in image)


def test_stacked_digits_are_made_of_mnist(tmp_path, monkeypatch):
    """At the size that is asked for; what is trained on is the stack."""
    data, asked, batches, batch = tiny.make_data(gan), [], [], gan.Run.batch
    monkeypatch.setattr(gan, "load_data", lambda *args: asked.append(args) or data)
    monkeypatch.setattr(gan.Run, "batch", lambda run, of: batches.append(of.train) or batch(run, of))
    gan.main([*TINY, *"--steps 1 --dataset stacked_mnist --image-size 8 --data-dir here --out".split(), str(tmp_path / "run")])
    assert asked == [("mnist", "here", 8)] and torch.equal(batches[0], gan.stack(data).train)


def test_one_image_has_no_diversity_to_compare_with():
    _, D, _ = build()
    D = D.float()
    assert set(gan.relative_diversity(D, torch.rand(4, 1, 8, 8), torch.rand(1, 1, 8, 8)).values()) == {1.0}


# ---- the script

TINY = [*tiny.TINY["gan"].split(), *"--steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 3".split()]


@pytest.fixture()
def digits(monkeypatch):
    return tiny.small_digits(gan, monkeypatch)


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("flags", [
    "--loss nonsaturating --r1 1", "--loss hinge --spectral-norm", "--loss wgan-gp", "--loss minimax --no-labels",
    "--amp bf16 --patch 2", "--loss wgan-gp --amp bf16 --r2 1", "--temperature 0.5 --label 2", "--dataset stacked_mnist",
    "--blocks 2"])
def test_every_option_runs(digits, tmp_path, flags):
    out = tmp_path / "run"
    gan.main([*TINY, "--out", str(out), *flags.split()])
    assert {"samples.png", "checkpoint.pt", "interpolations.png"} <= {p.name for p in out.iterdir()}
    found = np.load(out / "samples.npz")["images"]
    assert found.shape == (4, 8, 8, 3 if "stacked" in flags else 1) and found.dtype == np.uint8
    assert all(math.isfinite(final(out)[f"test_{name}"]) for name in ("diversity", "feature_diversity", "d_train", "d_fake"))


def test_evaluation_is_of_all_classes(digits, tmp_path):
    """--label is for samples: test images of every class are compared with samples of every class."""
    out = ["--out", str(tmp_path / "run")]
    gan.main([*TINY, *out])
    whole = final(tmp_path / "run")
    gan.main([*TINY, *out, "--mode", "eval", "--label", "2"])
    assert {k: v for k, v in final(tmp_path / "run").items() if "test" in k} == {k: v for k, v in whole.items() if "test" in k}


def test_the_temperature_of_samples_and_interpolations(digits, tmp_path):
    """At 0.5 they are the images of half the noise."""
    gan.main([*TINY, "--out", str(tmp_path / "run"), "--lr", "0.02", "--warmup", "0"])
    G, _, cfg = gan.load(tmp_path / "run")
    run, y = SimpleNamespace(device="cpu", labels=lambda n: torch.arange(n) % 10), torch.arange(12) % 10
    cfg.temperature = 0.5
    z = torch.randn(12, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    want = gan.to_uint8(sample(G, 0.5 * z, y))
    assert torch.equal(gan.generate(G, y, cfg, run), want) and not torch.equal(want, gan.to_uint8(sample(G, z, y)))
    ends = torch.randn(2, 10, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    first = gan.interpolations(G, cfg, run)[::10]
    assert torch.equal(first, gan.to_uint8(sample(G, 0.5 * ends[0], run.labels(10))))


def test_what_is_measured_is_of_the_right_images(digits, tmp_path):
    """Against the definitions: samples of all classes in turn with the noise of --seed, as many as there are test images,
    and D's scores of train and test images under their labels."""
    out = tmp_path / "run"
    gan.main([*TINY, "--out", str(out), "--seed", "5"])
    G, D, cfg = gan.load(out)
    y, found = torch.arange(8), final(out)
    fake = gan.to_uint8(sample(G, torch.randn(8, cfg.z_dim, generator=torch.Generator().manual_seed(5)), y)) / 127.5 - 1
    train, test = digits.train[:8] / 127.5 - 1, digits.test / 127.5 - 1
    want = {"d_train": D(train, digits.train_labels[:8]).mean(), "d_test": D(test, digits.test_labels).mean(),
            "d_fake": D(fake, y).mean(), "diversity": diversity(fake + 1) / diversity(test + 1),
            "feature_diversity": diversity(D.features(fake)) / diversity(D.features(test))}
    assert {name: found[f"test_{name}"] for name in want} == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-4)


@pytest.mark.parametrize("n", [150, 1010])
def test_as_many_samples_are_measured_as_test_images_at_most_1000(n, tmp_path, monkeypatch):
    data, counts, inside = tiny.make_data(gan, test=n, train=1100), [], gan.relative_diversity
    monkeypatch.setattr(gan, "load_data", lambda *args: data)
    gan.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run")])

    def watch(D, fake, real):
        counts.append((len(fake), len(real)))
        return inside(D, fake, real)

    monkeypatch.setattr(gan, "relative_diversity", watch)
    gan.main(["--mode", "eval", "--out", str(tmp_path / "run")])
    assert counts == [(min(n, 1000),) * 2]


@pytest.mark.parametrize("flags, compiled", [("--loss hinge", True), ("--loss hinge --r1 1", False), ("", False),
                                             ("--loss hinge --r2 1", False), ("--loss wgan-gp", False)])
def test_a_penalty_asks_a_discriminator_that_is_not_compiled(flags, compiled, digits, tmp_path, monkeypatch):
    """As its gradient is differentiated again, which compiled code does not support."""
    asked, inside = [], gan.loss_d
    monkeypatch.setattr(torch, "compile", lambda network: lambda *args: network(*args))

    def watch(G, D, *args):
        asked.append(isinstance(D, gan.Discriminator))
        return inside(G, D, *args)

    monkeypatch.setattr(gan, "loss_d", watch)
    gan.main([*TINY, "--compile", "--out", str(tmp_path / "run"), *flags.split()])
    assert asked == [not compiled] * 4


@pytest.mark.parametrize("flags", ["--loss hinge", ""])
def test_both_networks_are_compiled(flags, digits, tmp_path, monkeypatch):
    """G in both steps, D wherever no penalty asks it: in the step of G always."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network: lambda *args: network(*args))
    for name, function in (("loss_d", loss_d), ("loss_g", loss_g)):
        def watch(G, D, *args, name=name, inside=function):
            asked.append((name, isinstance(G, Generator), isinstance(D, Discriminator)))
            return inside(G, D, *args)
        monkeypatch.setattr(gan, name, watch)
    gan.main([*TINY, "--compile", "--steps", "1", "--out", str(tmp_path / "run"), *flags.split()])
    assert asked == [("loss_d", False, flags == ""), ("loss_g", False, False)]


@pytest.mark.parametrize("shares, told", [((0.6, 0.4), True), ((0.4, 0.6), True), ((0.6, 0.6), False)])
def test_either_diversity_tells_of_dropped_modes(shares, told, digits, tmp_path, capsys, monkeypatch):
    named = dict(zip(("diversity", "feature_diversity"), shares, strict=True))
    monkeypatch.setattr(gan, "relative_diversity", lambda *args: named)
    gan.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run")])
    assert ("the generator has dropped modes" in capsys.readouterr().out) == told


def test_the_detector_looks_at_the_average_beside_images_of_training(digits, tmp_path, monkeypatch):
    """At 64 images each: samples of all classes in turn from fixed noise. What it finds is in the log of its step. At step 2
    the average is what a run of two steps saves."""
    seen, inside = [], gan.relative_diversity

    def watch(D, fake, real):
        seen.append((fake, real, inside(D, fake, real)))
        return seen[-1][2]

    monkeypatch.setattr(gan, "relative_diversity", watch)
    out = tmp_path / "run"
    flags = [*TINY, *"--seed 5 --log-every 2 --lr 0.02 --warmup 0 --ema 0.5".split()]
    gan.main([*flags, "--steps", "2", "--out", str(tmp_path / "two")])
    seen.clear()
    gan.main([*flags, "--out", str(out)])
    z = torch.randn(64, Config(**tiny.load_checkpoint(out)["config"]).z_dim, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    begin = gan.build((1, 8, 8), 10, Config(**tiny.load_checkpoint(out)["config"]))[0]
    assert_close(seen[0][0], sample(begin, z, torch.arange(64) % 10))
    for _, real, _ in seen[:2]:
        assert torch.equal(real, digits.train[:64] / 127.5 - 1)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:-1]
    assert len(seen) == 3 and len(lines) == 2  # of steps 0 and 2, and of the test split
    assert_close(seen[1][0], sample(gan.load(tmp_path / "two")[0], z, torch.arange(64) % 10))
    for line, (*_, shares) in zip(lines, seen, strict=False):
        assert {name: line[name] for name in shares} == pytest.approx(shares)


def test_each_network_steps_on_noise_of_its_own(digits, tmp_path, monkeypatch):
    """D and G see other noise, other at each step, and the same real images and labels. G's step asks for no gradient of D."""
    seen = []
    for name, function in (("loss_d", loss_d), ("loss_g", loss_g)):
        def watch(G, D, real, y, z, *args, inside=function):
            seen.append((real, y, z))
            assert inside is loss_g or args[0] == (len(seen) - 1) // 2  # the step, by which penalties are annealed
            assert all(p.requires_grad == (inside is loss_d) for p in D.parameters())
            return inside(G, D, real, y, z, *args)
        monkeypatch.setattr(gan, name, watch)
    gan.main([*TINY, "--out", str(tmp_path / "run")])
    assert len(seen) == 8 and len({z.numpy().tobytes() for *_, z in seen}) == 8
    for (real, y, _), (again, label, _) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(real, again) and torch.equal(y, label)
    assert torch.cat([z for *_, z in seen]).std().item() == pytest.approx(1, abs=0.1)


def test_the_averaged_generator_is_never_trained(digits, tmp_path):
    """Its weights are the average of the generator's, computed here from those of every step."""
    seen, update = [], gan.update_ema
    try:
        def watch(ema, model, step, share):
            seen.append([p.detach().clone() for p in model.parameters()])
            update(ema, model, step, share)
        gan.update_ema = watch
        gan.main([*TINY, "--out", str(tmp_path / "run")])
    finally:
        gan.update_ema = update
    saved, share = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True), Config().ema
    average = None
    for step, weights in enumerate(seen):
        decay = (1 - 1 / (step + 1)) ** (1 / share)
        average = weights if step == 0 else [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    names = dict(Generator(1, 8, 8, 10, gan.choose(Config(**saved["config"]), 8, 8)).named_parameters())
    for name, want in zip(names, average, strict=True):
        assert_close(saved["ema_generator"][name], want)


def test_load_gives_what_samples_are_drawn_from(digits, tmp_path):
    """The averaged generator and the discriminator of the checkpoint, in three lines of Python."""
    out = tmp_path / "run"
    gan.main([*TINY, "--out", str(out), "--seed", "5", "--loss", "hinge", "--spectral-norm"])
    gan.main([*TINY, "--out", str(out), "--mode", "sample", "--num-samples", "12"])
    G, D, cfg = gan.load(out)
    assert (cfg.seed, cfg.loss, cfg.spectral_norm, cfg.patch, cfg.r1) == (5, "hinge", True, 1, 0)
    assert not G.training and not D.training and not any(p.requires_grad for net in (G, D) for p in net.parameters())
    z = torch.randn(12, cfg.z_dim, generator=torch.Generator().manual_seed(5))
    x = sample(G, z, torch.arange(12) % 10)
    written = np.load(out / "sampled" / "samples.npz")
    assert np.array_equal(gan.to_uint8(x).permute(0, 2, 3, 1).numpy(), written["images"])
    assert (written["labels"] == np.arange(12) % 10).all()
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    for net, name in ((G, "ema_generator"), (D, "discriminator")):
        assert all(torch.equal(value, saved[name][key]) for key, value in net.state_dict().items())
    assert torch.equal(D(x, torch.arange(12) % 10), D(x, torch.arange(12) % 10))  # in training mode each call changes it


def test_collapse_is_told_with_its_step(digits, tmp_path, capsys, monkeypatch):
    calls = iter([torch.rand(64, 1, 8, 8) * 2 - 1])
    monkeypatch.setattr(gan, "sample", lambda G, z, y, temperature=1.0: next(calls, torch.zeros(len(z), 1, 8, 8)))
    gan.main([*TINY, "--out", str(tmp_path / "run"), "--log-every", "2", "--steps", "7"])  # looks at 0, 2, 4 and 6
    said = capsys.readouterr()
    for what in ("diversity", "feature diversity"):
        assert f"step 2: the samples' {what} fell to 0 % of the data's" in said.err
    assert said.err.count("warning") == 2
    assert final(tmp_path / "run")["test_diversity"] < 1e-3 and "WARNING: the generator has dropped modes" in said.out


@pytest.mark.parametrize("rank, before, now, told", [(0, 0.6, 0.4, 1), (1, 0.6, 0.4, 0), (0, 0.4, 0.4, 0), (0, 0.6, 0.6, 0),
                                                     (0, 0.5, 0.49, 1)])
def test_a_collapse_is_told_once_by_one_process(rank, before, now, told):
    said = []
    run = SimpleNamespace(rank=rank, bar=SimpleNamespace(write=lambda *args: said.append(args)))
    gan.warn_if_collapsed({"diversity": before}, {"diversity": now}, 7, run)
    assert len(said) == told and all("step 7" in line and stream is sys.stderr for line, stream in said)


def test_short_training_on_digits(tmp_path):
    """250 steps on the real digits: coverage and distance of 297 samples, as many as there are test images."""
    gan.main([*"--steps 250 --width 16 --batch-size 32 --num-samples 297 --out".split(), str(tmp_path / "run")])
    samples = np.load(tmp_path / "run" / "samples.npz")
    quality = evaluate(samples["images"], "digits", labels=samples["labels"])
    assert quality["frechet"] < 6, quality  # 3.4; 48 after a step, and the floor is 0.69
    assert quality["coverage"] > 0.22, quality  # 0.27; 0.00 after a step, and the floor is 0.59
    assert quality["label_accuracy"] > 0.85, quality  # 0.96


def test_a_lone_copy_computes_the_same(monkeypatch):
    """Without the folder kernels/, the lines under `except ImportError` take the operation's place, twice differentiable."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in [n for n in sys.modules if n.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("lone", gan.__file__)
    monkeypatch.setitem(sys.modules, "lone", lone := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(lone)
    assert lone.bias_act.__module__ == "lone"
    G, D, cfg = build()
    g, d = lone.Generator(1, 8, 8, 3, cfg).double(), lone.Discriminator(1, 8, 8, 3, cfg).double()
    g.load_state_dict(G.state_dict())
    d.load_state_dict(D.state_dict())
    real, y, z = batch()
    a, b = loss_d(G, D, real, y, z, 0, cfg)[0].mean(), lone.loss_d(g, d, real, y, z, 0, cfg)[0].mean()
    assert_close(a, b)
    for p, q in zip(torch.autograd.grad(a, list(D.parameters())), torch.autograd.grad(b, list(d.parameters())), strict=True):
        assert_close(p, q)


@pytest.mark.parametrize("flags", ["--patch 65", "--label 10", "--temperature 0", "--r1 -1"])
def test_bad_flags_are_one_line(flags, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gan.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in line and line.count("\n") == 1
