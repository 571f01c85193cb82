"""The mathematics of vqgan.py: quantisers against brute force, whose gradients go where, the prior and its caches."""

import importlib.util
import itertools
import json
import math
import signal
import sys
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tiny
import vqgan
from vqgan import FSQ, VQ, Autoencoder, Config, Discriminator, Prior, SimVQ, adaptive_weight, loss_autoencoder, nll, sample


def config(shape=(1, 8, 8), **fields):
    small = {"width": 8, "n_codes": 12, "code_dim": 3, "fsq_levels": (4, 3), "prior_width": 16, "prior_blocks": 2, "n_head": 2,
             "guidance": 1.0}
    return vqgan.choose(Config(**small | fields), *shape[1:])


def build(shape=(1, 8, 8), **fields):
    """A small autoencoder, discriminator and prior of 3 classes in float64, no branch at nothing, and their Config."""
    cfg = config(shape, **fields)
    torch.manual_seed(0)
    model, D = Autoencoder(shape[0], cfg), Discriminator(shape[0])
    prior = Prior(*vqgan.code_grid(*shape[1:], cfg), 3, cfg)
    for net in (model.encoder, model.decoder, prior):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model.double(), D.double(), prior.double().eval(), cfg


def batch(n=4, shape=(1, 8, 8)):
    return torch.rand(n, *shape, dtype=torch.float64) * 2 - 1


# ---- quantisers

QUANTIZERS = {"vq": VQ, "fsq": FSQ, "simvq": SimVQ}
every_quantizer = pytest.mark.parametrize("kind", QUANTIZERS)


def quantizer(kind, **fields):
    torch.manual_seed(1)
    q = QUANTIZERS[kind](config(quantizer=kind, **fields)).double().eval()
    if kind == "simvq":
        torch.nn.init.normal_(q.linear.weight)
    return q, torch.randn(5, 4, 2, 2 if kind == "fsq" else 3, dtype=torch.float64)


@every_quantizer
def test_the_code_is_the_nearest_and_indices_go_there_and_back(kind):
    q, z = quantizer(kind)
    z_q, indices, _ = q(z)
    K = config(quantizer=kind).n_codes
    codebook = q.lookup(torch.arange(K))
    seen = q.scale(q.bound(z)) if kind == "fsq" else z  # fsq rounds a bounded z
    assert indices.shape == z.shape[:-1]
    assert torch.equal(indices, torch.cdist(seen.flatten(0, 2), codebook).argmin(1).view(5, 4, 2))
    assert_close(z_q, q.lookup(indices))
    if kind != "fsq":
        assert torch.equal(q(codebook)[1], torch.arange(K))


@every_quantizer
def test_the_gradient_passes_straight_through(kind):
    q, z = quantizer(kind)
    z, g = z.requires_grad_(), torch.randn_like(z)
    (grad,) = torch.autograd.grad((q(z)[0] * g).sum(), z)
    if kind == "fsq":
        (g,) = torch.autograd.grad((q.scale(q.bound(z)) * g).sum(), z)
    assert_close(grad, g)


def test_beta_is_of_the_commitment_alone():
    for beta in (0.25, 3.0):
        q, z = quantizer("simvq", beta=beta)
        z.requires_grad_()
        z_q, indices, loss = q(z)
        e = q.lookup(indices)
        to_z, to_w = torch.autograd.grad(loss, (z, q.linear.weight))
        assert_close(to_z, beta * 2 * (z - e).detach() / z.numel())
        (want,) = torch.autograd.grad((z.detach() - e).square().mean(), q.linear.weight)
        assert_close(to_w, want)
        assert not q.frozen.requires_grad
        q, z = quantizer("vq", beta=beta)
        z.requires_grad_()
        z_q, indices, loss = q(z)
        assert_close(torch.autograd.grad(loss, z)[0], beta * 2 * (z - q.lookup(indices)).detach() / z.numel())
        assert not q.codebook.requires_grad


def test_the_codebook_is_a_moving_average():
    """Appendix A.1 of VQ-VAE in a loop, over three batches none of which leaves a code dead."""
    q = VQ(config(n_codes=4), decay=0.9, dead=0.0).double().train()
    torch.manual_seed(0)
    size, sums = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(3):
        z, indices = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 4
        q.update(z, indices)
        for i in range(4):
            size[i] = 0.9 * size[i] + 0.1 * (indices == i).sum()
            sums[i] = 0.9 * sums[i] + 0.1 * z[indices == i].sum(0)
        assert_close(q.codebook, sums / size[:, None])


def test_a_revived_code_is_a_vector_of_the_batch_and_survives():
    q = VQ(config(n_codes=6)).double().train()
    torch.manual_seed(0)
    z, nobody = torch.randn(30, 3, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
    for _ in range(60):
        q.update(z, nobody)  # all take code 0
    assert torch.cdist(q.codebook.detach()[1:], z).min(1).values.max() < 1e-6
    before = q.codebook.detach().clone()
    q.update(torch.randn(30, 3, dtype=torch.float64), nobody)
    assert_close(q.codebook.detach()[1:], before[1:])
    assert (q.counts[1:] > q.dead * 5).all()


def test_fsq_takes_every_level_and_no_other():
    for levels in ((3,), (4,), (8, 5), (5, 4, 3)):
        q = FSQ(config(fsq_levels=levels)).double()
        z = torch.cat([torch.linspace(-9, 9, 4001, dtype=torch.float64), torch.tensor([-1e9, 0, 1e9], dtype=torch.float64)])
        z_q, indices, loss = q(z[:, None].expand(-1, len(levels)))
        for d, n in enumerate(levels):
            assert len(z_q[:, d].unique()) == n and z_q[:, d].min() == -1 and z_q[:, d].max() == 1
        assert q.bound(torch.zeros(len(levels), dtype=torch.float64)).frac().abs().max() < 1e-9  # 0 is a level
        assert indices.min() == 0 and indices.max() == math.prod(levels) - 1 and loss == 0
        every = torch.arange(math.prod(levels))
        digits = (q.lookup(every) + 1) / 2 * (q.levels - 1)
        assert torch.equal((digits.round().long() * q.basis).sum(-1), every) and len(digits.unique(dim=0)) == len(every)


@every_quantizer
def test_mixed_precision_does_not_change_the_codes(kind):
    cfg = config(quantizer=kind)
    torch.manual_seed(0)
    model = Autoencoder(1, cfg).eval()
    z = torch.randn(6, 4, 4, model.decoder[0].in_channels)
    model.encode = lambda x: z
    x = torch.zeros(6, 1, 8, 8)
    want = model(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x)[1], want)


def test_usage_and_perplexity():
    assert vqgan.usage(torch.arange(8).view(2, 4), 8) == pytest.approx((1, 8))
    share, perplexity = vqgan.usage(torch.tensor([0, 0, 0, 1]), 8)
    assert share == 0.25 and perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


# ---- the losses of stage 1


def test_adaptive_weight_is_a_ratio_of_norms_without_gradient():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    a, b = (w * torch.randn(3, 4)).sum(), (w**2).sum()
    weight = adaptive_weight(a, b, w)
    ga, gb = torch.autograd.grad(a, w, retain_graph=True)[0], torch.autograd.grad(b, w)[0]
    assert_close(weight, ga.norm() / (gb.norm() + 1e-6))
    assert not weight.requires_grad
    assert adaptive_weight((1e9 * w).sum(), (w**2).sum(), w) == 1e4  # its limit


def test_a_score_is_of_a_patch_of_23_pixels():
    x = torch.randn(1, 1, 48, 48, requires_grad=True)
    score, _ = Discriminator(1)(x)
    (grad,) = torch.autograd.grad(score[0, 0, 6, 6], x)
    for side in (2, 3):
        (seen,) = grad.abs().amax(5 - side)[0, 0].nonzero(as_tuple=True)
        assert len(seen) == seen.max() - seen.min() + 1 == 23


def test_the_discriminator_against_its_formula():
    D, h = build()[1], batch(2, (1, 9, 12))
    score, features = D(h)
    for layer, feature, stride in zip(D.convs, features, (2, 2, 1), strict=True):
        h = torch.nn.functional.conv2d(h, layer.weight, layer.bias, stride, padding=1)
        h = torch.where(h > 0, h, 0.2 * h)
        assert_close(feature, h)
    assert_close(score, torch.nn.functional.conv2d(h, D.out.weight, D.out.bias, padding=1))


def test_the_total_is_its_terms_and_each_step_leaves_the_other_alone():
    model, D, _, cfg = build(disc_start=5, disc_weight=0.3, perceptual_weight=0.7)
    x = batch()
    total, terms, _ = loss_autoencoder(model, D, x, 4, cfg)
    assert terms.keys() == {"l1", "loss_q"} and torch.equal(total, terms["l1"] + terms["loss_q"])
    plain, terms, _ = loss_autoencoder(model, D, x, 5, config(disc_start=5, disc_weight=0.0))  # a plain VQ-VAE
    assert terms.keys() == {"l1", "loss_q"} and torch.equal(plain, terms["l1"] + terms["loss_q"])
    D.requires_grad_(False)
    total, t, x_hat = loss_autoencoder(model, D, x, 5, cfg)
    assert_close(t["l1"], (x_hat - x).abs().mean())
    assert_close(t["perceptual"], vqgan.feature_distance(D(x)[1], D(x_hat)[1]))
    assert len(D(x)[1]) == 3
    assert_close(total, t["l1"] + t["loss_q"] + 0.7 * t["perceptual"] + 0.3 * t["adaptive"] * t["adversarial"])
    assert_close(t["adversarial"], -D(x_hat)[0].mean())
    reconstruction = t["l1"] + 0.7 * t["perceptual"]
    assert_close(t["adaptive"], adaptive_weight(reconstruction, t["adversarial"], model.last.weight))
    total.backward()
    assert all(p.grad is None for p in D.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    D.requires_grad_(True)
    loss = vqgan.loss_discriminator(D, x, x_hat)
    assert_close(loss, (1 - D(x)[0]).relu().mean() + (1 + D(x_hat)[0]).relu().mean())
    loss.backward()
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in D.parameters())


def test_feature_distance_is_nought_for_equals_and_blind_to_scale():
    a = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert vqgan.feature_distance(a, a) == 0
    assert_close(vqgan.feature_distance(a, [3 * f for f in a]), torch.tensor(0.0))
    flipped = vqgan.feature_distance(a, [-f for f in a])
    assert_close(flipped, torch.tensor(4.0))  # |u + u|^2 of unit vectors


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (1, 28, 28), (3, 33, 49)])
@every_quantizer
def test_any_size(shape, kind):
    model, D, _, cfg = build(shape, quantizer=kind)
    x = batch(2, shape)
    x_hat, indices, loss = model(x)
    f = cfg.downsample
    assert x_hat.shape == x.shape and indices.shape == (2, -(-shape[1] // f), -(-shape[2] // f)) and loss.isfinite()
    model.eval()
    _, indices, _ = model.quantizer(model.encode(x))
    assert_close(model.draw(indices)[..., :shape[1], :shape[2]], model(x)[0])


def test_an_odd_size_is_a_whole_one_that_is_cropped():
    """5 x 7 in codes of 4 x 4: the last row and column go on to the right and below, what is drawn there is dropped."""
    model, _, prior, cfg = build((2, 5, 7), downsample=4)
    model.eval()
    x = batch(3, (2, 5, 7))
    whole = torch.cat([x, x[..., -1:, :].expand(-1, -1, 3, -1)], 2)
    whole = torch.cat([whole, whole[..., -1:]], 3)
    assert_close(model.encode(x), model.encode(whole))
    assert_close(model(x)[0], model(whole)[0][..., :5, :7])
    cfg.sample_size = (6, 11)  # so are samples
    run = types.SimpleNamespace(device="cpu", shape=(2, 5, 7), labels=lambda n: torch.arange(n) % 3)
    images, y = vqgan.generate(model, prior, 4, cfg, run)
    noise = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(cfg.seed))
    assert torch.equal(images, vqgan.to_uint8(model.draw(sample(prior, y, noise, cfg)))[..., :6, :11])


def test_channels_double_with_each_halving_and_stop_at_four_times():
    """In the encoder, and back in the decoder."""
    model = Autoencoder(1, config((1, 32, 32), downsample=16))
    up, down = ([block.branch[1].in_channels for block in part if isinstance(block, vqgan.ResBlock)]
                for part in (model.encoder, model.decoder))
    assert up == [8, 16, 32, 32, 32] and down == [32, 32, 32, 16, 8]  # one more at the lowest resolution


def test_what_is_chosen_by_size_and_quantizer():
    for side, downsample in {8: 2, 15: 2, 16: 4, 64: 4, 65: 8, 256: 8}.items():
        assert vqgan.choose(Config(), side + 9, side).downsample == downsample
    for kind, codes, dim in (("vq", 256, 16), ("simvq", 256, 8), ("fsq", 240, 3)):
        cfg = vqgan.choose(Config(quantizer=kind), 8, 8)
        assert (cfg.n_codes, cfg.code_dim) == (codes, dim)
    assert vqgan.choose(Config(quantizer="simvq", code_dim=5, downsample=8), 8, 8).code_dim == 5


def test_what_codes_begin_as():
    """Of simvq W is the identity, and the frozen vectors have a norm of about 1."""
    q = SimVQ(config(n_codes=500, code_dim=64))
    assert torch.equal(q.lookup(torch.arange(500)), q.frozen)
    assert q.frozen.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_groups_are_normalised_and_bent():
    """Of at least 8 channels each, with PyTorch's own epsilon: that of small numbers shows it."""
    for channels, groups in ((4, 1), (8, 1), (48, 6), (20, 2)):
        norm, x = vqgan.GroupNormSiLU(channels), 1e-2 * torch.randn(2, channels, 3, 3)
        want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups))
        assert_close(norm(x), want, rtol=1e-4, atol=1e-5)


def test_all_of_a_branch_is_dropped():
    """At a rate of 1 a block of the transformer adds nothing."""
    block, x = vqgan.TransformerBlock(8, 2, 1.0).train(), torch.randn(2, 5, 8)
    assert torch.equal(block(x, lambda q, k, v: v), x)


# ---- the prior


def test_the_chain_rule_sums_to_one():
    _, _, prior, cfg = build((1, 4, 4), n_codes=3, downsample=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    for y in range(3):
        assert_close(torch.exp(-nll(prior, every, torch.full((81,), y))).sum(), torch.ones((), dtype=torch.float64))


def test_a_code_sees_those_before_it_alone():
    _, _, prior, _ = build()
    indices, y = torch.randint(12, (1, 4, 4)), torch.tensor([1])
    want = prior(indices, y)
    for t in range(16):
        changed = indices.flatten(1).clone()
        changed[:, t] = (changed[:, t] + 1) % 12
        differs = (prior(changed.view(1, 4, 4), y) - want).abs().amax((0, 2)) > 1e-12
        assert not differs[:t + 1].any() and differs[t + 1:].all()


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("fields", [{}, {"guidance": 3.0, "temperature": 1.3}], ids=str)
def test_caches_give_the_same_codes(grid, fields):
    _, _, prior, cfg = build(**fields)
    noise, y = torch.rand(5, *grid), torch.arange(5) % 3
    assert torch.equal(sample(prior, y, noise, cfg), sample(prior, y, noise, cfg, cached=False))


def test_a_window_slides_over_a_larger_grid():
    """Each code of a 6 x 7 grid is drawn from the 4 x 4 prior's conditional in the window around it, position by position."""
    _, _, prior, cfg = build()
    noise, y = torch.rand(2, 6, 7, dtype=torch.float64), torch.tensor([0, 2])
    x = sample(prior, y, noise, cfg)
    for i, j in itertools.product(range(6), range(7)):
        top, left = min(max(i - 2, 0), 2), min(max(j - 2, 0), 3)
        logits = prior(x[:, top:top + 4, left:left + 4], y)[:, (i - top) * 4 + j - left]
        cdf = torch.softmax(logits, 1).cumsum(1)
        want = (noise[:, i, j, None] >= cdf).sum(1).clamp(max=11)
        assert torch.equal(x[:, i, j], want)


def test_samples_have_the_probabilities_of_the_chain():
    _, _, prior, cfg = build((1, 2, 4), n_codes=3, downsample=2)
    n = 20_000
    x = sample(prior, torch.zeros(n, dtype=torch.long), torch.rand(n, 1, 2), cfg)
    found = torch.bincount((3 * x[:, 0, 0] + x[:, 0, 1]), minlength=9) / n
    every = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 1, 2)
    p = torch.exp(-nll(prior, every, torch.zeros(9, dtype=torch.long)))
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("grid", [(4, 4), (6, 5)], ids=str)
@pytest.mark.parametrize("fields", [{"temperature": 0.5}, {"guidance": 2.5}, {"guidance": 0.0},
                                    {"temperature": 1.5, "guidance": 1.5}], ids=str)
def test_samples_follow_temperature_and_guidance(fields, grid):
    """Each code is the one that its noise asks of p(k | y)^g p(k)^(1 - g), raised to 1 / temperature; p(k) is the
    answer to the label that stands for none. With a cache, and through a window."""
    _, _, prior, cfg = build(**fields)
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.6)  # so that the label matters
    noise, y = torch.rand(3, *grid, dtype=torch.float64), torch.tensor([0, 2, 1])
    x = sample(prior, y, noise, cfg)
    g, T = fields.get("guidance", 1), fields.get("temperature", 1)
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        top, left = min(max(i - 2, 0), grid[0] - 4), min(max(j - 2, 0), grid[1] - 4)
        window, t = x[:, top:top + 4, left:left + 4], (i - top) * 4 + j - left
        with_label = torch.softmax(prior(window, y)[:, t], 1)
        without = torch.softmax(prior(window, torch.full((3,), 3))[:, t], 1)
        p = (with_label**g * without ** (1 - g)) ** (1 / T)
        cdf = (p / p.sum(1, keepdim=True)).cumsum(1)
        assert torch.equal(x[:, i, j], (noise[:, i, j, None] >= cdf).sum(1).clamp(max=11))
    assert not torch.equal(x, sample(prior, y, noise, config(guidance=1.0)))


def test_guidance_needs_classes():
    """Without classes the only label is the one for none, and a guided sample is the plain one, at the price of one pass."""
    cfg = config(guidance=4.0)
    prior = vqgan.build((1, 8, 8), 0, cfg)[2].double().eval()
    calls, step = [], prior.step
    prior.step = lambda indices, y, t, cache: calls.append(len(y)) or step(indices, y, t, cache)
    noise, y = torch.rand(2, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    guided = sample(prior, y, noise, cfg)
    assert calls == [2] * 16
    assert torch.equal(guided, sample(prior, y, noise, config(guidance=1.0)))


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.5, 0.35, 0.65), (1.0, 1, 1)])
def test_labels_are_hidden_from_the_transformer(digits, tmp_path, monkeypatch, rate, low, high):
    seen, inside = [], vqgan.nll

    def watch(prior, indices, y):
        if prior.training:
            seen.append(y)
        return inside(prior, indices, y)

    monkeypatch.setattr(vqgan, "nll", watch)
    flags = f"--stage1 1 --steps 13 --label-dropout {rate} --save-every 100"
    vqgan.main([*TINY, *flags.split(), "--out", str(tmp_path / "run")])
    y = torch.cat(seen)
    assert len(y) == 12 * 16 and low <= (y == 10).float().mean() <= high
    assert len(set(y[y < 10].tolist())) == (10 if rate < 1 else 0)


# ---- the script

TINY = [*tiny.TINY["vqgan"].split(), *"--steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 3".split()]


@pytest.fixture()
def digits(monkeypatch):
    return tiny.small_digits(vqgan, monkeypatch)


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("flags", [
    "--quantizer fsq --no-labels", "--quantizer simvq --perceptual-weight 0", "--amp bf16 --dropout 0.1", "--disc-weight 0",
    "--guidance 0.5 --label 2", "--sample-size 12 10", "--downsample 4", "--stage1 9",
    "--n-codes 4096 --batch-size 1", "--n-codes 4096 --batch-size 1 --quantizer simvq"])
def test_every_option_runs(digits, tmp_path, flags):
    out = tmp_path / "run"
    vqgan.main([*TINY, "--out", str(out), *flags.split()])
    files = {"samples.png", "config.json", "checkpoint.pt", "reconstructions.png", "reconstructions.npz"}
    assert files <= {p.name for p in out.iterdir()}
    found = np.load(out / "samples.npz")["images"]
    assert found.shape == (4, *((12, 10) if "sample-size" in flags else (8, 8)), 1) and found.dtype == np.uint8
    assert np.load(out / "reconstructions.npz")["images"].shape == (8, 8, 8, 1)
    names = "test_l1", "test_psnr", "usage", "perplexity", "test_bits_per_code"
    assert all(math.isfinite(final(out)[name]) for name in names)


@pytest.mark.parametrize("flags", ["", "--no-labels --quantizer fsq"])
def test_what_is_measured_on_the_test_images(digits, tmp_path, monkeypatch, flags):
    """The figures by their definitions, of the averaged networks, in batches of 3 of which the last is short; use and
    perplexity are those of the codes of all images of training together."""
    monkeypatch.setattr(vqgan, "load_data", lambda *args: digits._replace(train=digits.train[:50],
                                                                         train_labels=digits.train_labels[:50]))
    monkeypatch.setattr(vqgan, "at_once", lambda shape: 3)
    out = tmp_path / "run"
    vqgan.main([*TINY, "--out", str(out), "--stage1", "2", "--seed", "5", *flags.split()])
    model, prior, cfg = vqgan.load(out)
    found = final(out)
    x_hat = vqgan.to_uint8(model(digits.test / 127.5 - 1)[0])
    written = np.load(out / "reconstructions.npz")
    assert np.array_equal(written["images"], x_hat.permute(0, 2, 3, 1).numpy())
    assert written["labels"].tolist() == ([0] * 8 if "--no-labels" in flags else digits.test_labels.tolist())
    error = (digits.test.double() - x_hat.double()) / 255
    assert found["test_l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert found["test_mse"] == pytest.approx((error**2).mean().item(), rel=1e-5)
    assert found["test_psnr"] == pytest.approx(-10 * math.log10((error**2).mean().item()), rel=1e-5)
    codes = model(digits.train[:50] / 127.5 - 1)[1].flatten()
    count = np.bincount(codes.numpy(), minlength=cfg.n_codes)
    p = count[count > 0] / count.sum()
    assert found["usage"] == pytest.approx((count > 0).mean()) and found["perplexity"] == pytest.approx(
        math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    of_three = model(digits.train[:3] / 127.5 - 1)[1]
    assert len(of_three.unique()) < (count > 0).sum()  # a batch alone uses fewer
    indices = model(digits.test / 127.5 - 1)[1]
    y = torch.zeros(8, dtype=torch.long) if "--no-labels" in flags else digits.test_labels
    bits = nll(prior, indices, y).double().sum().item() / (8 * 16) / math.log(2)
    assert found["test_bits_per_code"] == pytest.approx(bits, rel=1e-5) and found["codes_per_image"] == 16


def test_grids_of_stage_1_are_pairs_of_test_images_and_reconstructions(digits, tmp_path, monkeypatch):
    """By the averaged autoencoder."""
    grids = {}
    monkeypatch.setattr(vqgan, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    vqgan.main([*TINY, "--out", str(tmp_path / "run"), "--stage1", "9", "--save-every", "4"])
    model, _, _ = vqgan.load(tmp_path / "run")
    pairs = grids["step_000004.png"].unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], digits.test)
    assert torch.equal(pairs[:, 1], vqgan.to_uint8(model(digits.test / 127.5 - 1)[0]))
    assert torch.equal(grids["reconstructions.png"], grids["step_000004.png"])


def test_larger_samples_wait_for_the_end(digits, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(vqgan, "save_grid", lambda images, path, *args, **kw: shown.update({path.name: images.shape[2:]}))
    vqgan.main([*TINY, "--out", str(tmp_path / "run"), "--sample-size", "12", "10", "--save-every", "1"])
    assert shown["step_000001.png"] == shown["step_000004.png"] == (8, 8) and shown["samples.png"] == (12, 10)
    assert np.load(tmp_path / "run" / "samples.npz")["images"].shape[1:] == (12, 10, 1)


@every_quantizer
def test_evaluation_and_samples_leave_the_codebook_alone(kind, digits, tmp_path, monkeypatch):
    """Bit for bit: that of the network in training at each look at it, and that of the averaged one in all modes."""
    looks = []

    def watch(function):
        inside = getattr(vqgan, function)

        def wrapped(model, *args):
            codes = model.quantizer.lookup(torch.arange(12)).clone()
            state = {name: value.clone() for name, value in model.quantizer.state_dict().items()}
            result = inside(model, *args)
            looks.append(function)
            assert torch.equal(codes, model.quantizer.lookup(torch.arange(12)))
            assert all(torch.equal(value, state[name]) for name, value in model.quantizer.state_dict().items())
            return result

        monkeypatch.setattr(vqgan, function, wrapped)

    for function in ("reconstruct", "to_indices", "evaluate", "generate"):
        watch(function)
    flags = ["--quantizer", kind, "--n-codes", "12", "--fsq-levels", "4", "3", "--code-dim", "2", "--stage1", "3"]
    out = tmp_path / "run"
    vqgan.main([*TINY, *flags, "--out", str(out), "--save-every", "1"])
    before = tiny.load_checkpoint(out)
    assert {looks.count(function) > 1 for function in ("reconstruct", "to_indices", "generate")} == {True}
    for mode in ("eval", "sample"):
        vqgan.main(["--mode", mode, "--out", str(out)])
    tiny.assert_same_state(before, tiny.load_checkpoint(out))
    averaged, _, _ = vqgan.load(out)
    assert all(torch.equal(value, before["ema_model"][name]) for name, value in averaged.state_dict().items())


@pytest.mark.parametrize("first, warmup, step", [(None, 0, 16), (None, 8, 19), (12, 0, 16), (15, 0, 16), (20, 0, 21)])
@pytest.mark.parametrize("share, told", [(0.985, 1), (0.975, 0)])
def test_a_prior_that_learns_nothing_is_told_after_a_quarter_of_stage_2(share, told, first, warmup, step, digits, tmp_path,
                                                                        capsys, monkeypatch):
    """Once, where its bits a code are within 2 % of log2(--n-codes) = 3; not while the learning rate still rises. A run that
    is resumed has the quarter of one that was not; one resumed beyond it is told in its first step."""
    def known(prior, indices, y):
        return (0 * prior(indices, y).sum((1, 2)) + share * math.log(8)) * indices[0].numel()

    monkeypatch.setattr(vqgan, "nll", known)
    flags = [*TINY, *"--stage1 10 --steps 30 --save-every 100 --out".split(), str(tmp_path / "run"), "--warmup", str(warmup)]
    vqgan.main([*flags, *(["--steps", str(first)] if first else [])])
    if first:
        assert capsys.readouterr().err.count("has learned nothing") == told
        vqgan.main(["--resume", "--steps", "30", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert err.count("has learned nothing") == told
    assert (f"warning: step {step}: 2.96 bits a code, 3.00 where all" in err) == bool(told)


@pytest.mark.parametrize("flags, told", [("", True), ("--no-labels", False)])
def test_bits_given_the_label_are_told_where_there_are_labels(flags, told, digits, tmp_path, capsys):
    vqgan.main([*TINY, "--steps", "2", "--out", str(tmp_path / "run"), *flags.split()])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "bits a code" in line)
    assert ("bits a code given the label," in line) == told


@pytest.mark.parametrize("given, shape", [("0 0", (6, 10)), ("12 0", (12, 10)), ("0 12", (6, 12)), ("8 14", (8, 14))])
def test_a_side_that_is_not_given_is_that_of_training(given, shape, tmp_path, monkeypatch):
    data = tiny.make_data(vqgan, shape=(1, 6, 10))
    monkeypatch.setattr(vqgan, "load_data", lambda *args: data)
    out = tmp_path / "run"
    vqgan.main([*TINY, "--steps", "2", "--out", str(out), "--sample-size", *given.split()])
    assert np.load(out / "samples.npz")["images"].shape == (4, *shape, 1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_untrained_transformer_is_told(steps, digits, tmp_path, capsys):
    """Where the run, of two steps of stage 1, has not gone beyond them."""
    vqgan.main([*TINY, "--stage1", "2", "--steps", str(steps), "--out", str(tmp_path / "run")])
    assert ("so the transformer is untrained" in capsys.readouterr().err) == (steps <= 2)


def test_the_discriminator_starts_when_it_says(digits, tmp_path):
    """Until then it keeps its first weights, and no loss has a part of it."""
    for start, moved in ((4, False), (2, True)):
        out = tmp_path / str(start)
        vqgan.main([*TINY, "--out", str(out), "--stage1", "4", "--disc-start", str(start)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:-1]
        assert [("adversarial" in line, "loss_d" in line) for line in lines] == [(step >= start,) * 2 for step in range(4)]
        state = tiny.load_checkpoint(out)["optimizer_d"]["state"]
        assert bool(state) == moved


def test_the_autoencoders_step_asks_for_no_gradient_of_the_discriminator(digits, tmp_path, monkeypatch):
    """That of the discriminator does, and sees the image and the reconstruction of the same step."""
    seen = []

    def autoencoder(model, D, x, step, cfg):
        assert not any(p.requires_grad for p in D.parameters())
        result = loss_autoencoder(model, D, x, step, cfg)
        seen.append((x, result[2]))
        return result

    def discriminator(D, x, x_hat, inside=vqgan.loss_discriminator):
        assert all(p.requires_grad for p in D.parameters())
        assert x is seen[-1][0] and x_hat is seen[-1][1]
        return inside(D, x, x_hat)

    monkeypatch.setattr(vqgan, "loss_autoencoder", autoencoder)
    monkeypatch.setattr(vqgan, "loss_discriminator", discriminator)
    vqgan.main([*TINY, "--out", str(tmp_path / "run"), "--stage1", "9", "--disc-start", "2"])
    assert len(seen) == 4


def test_each_stage_trains_its_own_network(digits, tmp_path):
    out = tmp_path / "run"
    vqgan.main([*TINY, "--out", str(out), "--stage1", "2", "--steps", "2"])
    a = tiny.load_checkpoint(out)
    vqgan.main(["--out", str(out), "--resume", "--steps", "4"])
    b = tiny.load_checkpoint(out)
    for name in ("model", "ema_model", "discriminator"):
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])
    assert any(not torch.equal(a["prior"][k], b["prior"][k]) for k in a["prior"])


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_resumed_in_either_stage_is_as_if_never_stopped(digits, tmp_path, first):
    for name, parts in (("whole", (6,)), ("parts", (first, 6))):
        for i, steps in enumerate(parts):
            more = ["--resume"] if i else [*TINY, "--stage1", "3", "--disc-start", "1"]
            vqgan.main([*more, "--out", str(tmp_path / name), "--steps", str(steps)])
    a, b = (tiny.load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    tiny.assert_same_state(a, b)


def test_stopped_while_the_images_are_encoded_nothing_is_lost(digits, tmp_path, monkeypatch):
    flags, to_indices = [*TINY, "--stage1", "2", "--save-every", "100"], vqgan.to_indices
    vqgan.main([*flags, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(vqgan, "to_indices", lambda *args: (signal.raise_signal(signal.SIGTERM), to_indices(*args))[1])
    with tiny.handlers_kept():
        assert tiny.run(vqgan, [*flags, "--out", tmp_path / "run"]) == 143
    assert tiny.load_checkpoint(tmp_path / "run")["step"] == 2
    monkeypatch.setattr(vqgan, "to_indices", to_indices)
    assert tiny.run(vqgan, ["--resume", "--out", tmp_path / "run"]) == 0
    tiny.assert_same_state(tiny.load_checkpoint(tmp_path / "whole"), tiny.load_checkpoint(tmp_path / "run"))


def test_metrics_are_means_of_the_steps_that_had_them(digits, tmp_path):
    """A line whose window the discriminator or the other stage began in counts from there."""
    for log_every in ("1", "3"):
        vqgan.main([*TINY, "--stage1", "4", "--disc-start", "1", "--steps", "6", "--log-every", log_every,
                    "--out", str(tmp_path / log_every)])
    each, threes = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "13")
    assert threes[0]["loss_d"] == pytest.approx((each[1]["loss_d"] + each[2]["loss_d"]) / 2)
    assert threes[1]["bits_per_code"] == pytest.approx((each[4]["bits_per_code"] + each[5]["bits_per_code"]) / 2)
    assert "l1" not in threes[1]


def test_compiled_training_is_the_same(digits, tmp_path, monkeypatch):
    """--compile in both stages, the discriminator started: the adaptive weight differentiates a compiled network twice."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: plain(net, backend="aot_eager"))
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        vqgan.main([*TINY, "--stage1", "2", "--disc-start", "0", "--out", str(tmp_path / name), *more])
    a, b = (tiny.load_checkpoint(tmp_path / name) for name in ("eager", "compiled"))
    for part in ("model", "discriminator", "prior", "ema_model", "ema_prior"):
        for name in a[part]:
            assert_close(a[part][name], b[part][name], rtol=1e-4, atol=1e-5)


def test_what_is_compiled(digits, tmp_path, monkeypatch):
    """Encoder, decoder and transformer, which do the work."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(type(network)))
    vqgan.main([*TINY, "--compile", "--steps", "1", "--out", str(tmp_path / "run")])
    assert sorted(compiled, key=str) == sorted([vqgan.Encoder, vqgan.Decoder, Prior], key=str)


def test_training_on_digits_reaches_its_bar(tmp_path):
    """Codes that hold the image, all of them in use, modelled far better than at random; and no worse for the discriminator."""
    found = {}
    for weight in ("0", "0.1"):
        out = tmp_path / weight
        flags = "--steps 520 --stage1 400 --disc-start 200 --width 32 --n-codes 64 --prior-width 64 --log-every 100"
        vqgan.main([*flags.split(), "--disc-weight", weight, "--out", str(out), "--num-samples", "4"])
        found[weight] = final(out)
    for m in found.values():
        assert m["test_l1"] < 0.075 and m["usage"] >= 0.95 and m["test_bits_per_code"] < 5
    assert found["0.1"]["test_l1"] < 1.1 * found["0"]["test_l1"]


def test_load_gives_what_the_run_samples(digits, tmp_path):
    """By the noise of --mode sample the networks of load() draw the same images; the others of Python's three lines run."""
    out = tmp_path / "run"
    vqgan.main([*TINY, "--out", str(out)])
    vqgan.main(["--mode", "sample", "--out", str(out), "--num-samples", "6", "--seed", "0"])
    autoencoder, prior, cfg = vqgan.load(out)
    assert not (autoencoder.training or prior.training) and cfg.n_codes == 8
    y, noise = torch.arange(6), torch.rand(6, *prior.grid, generator=torch.Generator().manual_seed(0))
    images = vqgan.to_uint8(autoencoder.draw(sample(prior, y, noise, cfg)))
    vqgan.save_grid(images, tmp_path / "six.png")
    found = np.load(out / "sampled" / "samples.npz")
    assert np.array_equal(found["images"], images.permute(0, 2, 3, 1).numpy()) and found["labels"].tolist() == y.tolist()
    assert torch.equal(autoencoder.last.weight, tiny.load_checkpoint(out)["ema_model"]["last.weight"])


def test_started_from_another_run_the_codebook_is_kept(digits, tmp_path):
    """--init: the counts of its codes come along, so the first update does not find them all dead."""
    for name, more in (("a", []), ("b", ["--init", str(tmp_path / "a"), "--steps", "1"])):
        vqgan.main([*TINY, "--stage1", "4", "--disc-start", "9", "--out", str(tmp_path / name), *more])
    a, b = (tiny.load_checkpoint(tmp_path / name) for name in "ab")
    theirs, ours = a["ema_model"]["quantizer.counts"], b["model"]["quantizer.counts"]
    mean = 16 * 16 / 8  # 16 images of 16 codes, and 8 codes in all
    alive = theirs > 0.2 * mean
    assert alive.sum() >= 4 and (ours[alive] >= 0.99 * theirs[alive] - 1e-4).all() and ours.ne(mean).any()
    moved = (b["model"]["quantizer.codebook"] - a["ema_model"]["quantizer.codebook"])[alive].norm(dim=1)
    assert (moved < 0.1 * a["ema_model"]["quantizer.codebook"][alive].norm(dim=1)).all()


def test_photos_are_crops_of_two_pictures_train_and_test_apart(tmp_path):
    photos = tiny.load_tool("photos")
    from sklearn.datasets import load_sample_images

    for size in (64, 200):
        edge = 640 - max(size, 160)
        for image in load_sample_images().images:
            where = np.arange(640)[None, :, None].repeat(427, 0).repeat(3, 2)  # the column of each pixel
            for test in (False, True):
                found = photos.crops(image, size, 16, test, np.random.default_rng(0))
                columns = photos.crops(where, size, 16, test, np.random.default_rng(0))
                assert all(crop.shape == (size, size, 3) for crop in found)
                assert all(x.min() >= edge if test else x.max() < edge for x in columns)
                top = photos.crops(np.arange(427)[:, None, None].repeat(640, 1), size, 16, test, np.random.default_rng(0))
                for crop, rows, x in zip(found, top, columns, strict=True):
                    i, j = rows.min(), x.min()
                    assert np.array_equal(crop, image[i:i + size, j:j + size])


def test_photos_are_trained_on_and_sampled_larger(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "run"
    photos = tiny.load_tool("photos")
    photos.main(["--folder", str(folder), "--size", "16", "--count", "8"])
    with pytest.raises(SystemExit):
        photos.main(["--folder", str(folder)])
    vqgan.main([*TINY, "--batch-size", "4", "--dataset", str(folder), "--out", str(out)])
    assert "16 images to train on, 2 to test on" in capsys.readouterr().out
    assert np.load(out / "samples.npz")["images"].shape == (4, 16, 16, 3)
    vqgan.main(["--mode", "sample", "--sample-size", "24", "32", "--num-samples", "2", "--label", "temple", "--out", str(out)])
    found = np.load(out / "sampled" / "samples.npz")
    assert found["images"].shape == (2, 24, 32, 3) and found["labels"].tolist() == [1, 1]


@pytest.mark.parametrize("flags", [
    "--downsample 3", "--fsq-levels 2 5", "--quantizer fsq --fsq-levels 2048 2048",
    "--sample-size 8", "--n-head 3", "--label 10", "--guidance -1", "--stage1 0"])
def test_bad_flags_are_one_line(flags, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vqgan.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    assert stop.value.code == 2 and next(f for f in flags.split()[::-1] if f[:2] == "--") in tiny.error_line(
        capsys.readouterr().err)


def test_a_lone_copy_computes_the_same(monkeypatch):
    """Without the folder kernels/, the lines under `except ImportError` take the operations' place."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in [n for n in sys.modules if n.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("lone", vqgan.__file__)
    monkeypatch.setitem(sys.modules, "lone", lone := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(lone)
    assert lone.nearest_code.__module__ == "lone"
    for kind in QUANTIZERS:
        model, D, prior, cfg = build(quantizer=kind)
        other, other_prior = lone.Autoencoder(1, cfg).double(), lone.Prior(4, 4, 3, cfg).double().eval()
        other.load_state_dict(model.state_dict())
        other_prior.load_state_dict(prior.state_dict())
        x, y = batch(), torch.tensor([0, 1, 2, 0])
        results = []
        for module, net, p in ((vqgan, model, prior), (lone, other, other_prior)):
            torch.manual_seed(5)
            loss = module.loss_autoencoder(net, D, x, 1000, cfg)[0]
            grads = torch.autograd.grad(loss, [w for w in net.parameters() if w.requires_grad])
            indices = torch.arange(64).view(4, 4, 4) % cfg.n_codes
            results.append([loss, *grads, *net.parameters(), *net.buffers(), module.nll(p, indices, y),
                            module.sample(p, y, torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)), cfg)])
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
