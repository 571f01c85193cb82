"""The mathematics of autoregressive.py: causality by autograd and by perturbation, exact likelihoods, equal samplers."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import autoregressive
import tiny
from autoregressive import Autoregressive, Config, draw, log_likelihood, log_prob, patchify, sample, unpatchify

ARCHS = {"pixelcnn": {"arch": "pixelcnn"}, "transformer": {"arch": "transformer"}, "made": {"arch": "made", "width": 100}}
SMALL = {"output": "bernoulli", "dropout": 0.0, "width": 8, "blocks": 2, "n_head": 2, "patch": 1, "mixtures": 2}
OUTPUTS = ("bernoulli", "softmax", "mixture")
every_arch = pytest.mark.parametrize("arch", ARCHS)
every_output = pytest.mark.parametrize("output", OUTPUTS)


def build(shape, arch="pixelcnn", classes=3, **fields):
    """A small network in float64 whose weights are all random, and its Config."""
    cfg = Config(**SMALL | ARCHS[arch] | fields)
    C, H, W = shape
    torch.manual_seed(0)
    net = Autoregressive(C * cfg.patch**2, -(-H // cfg.patch), -(-W // cfg.patch), classes, cfg).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net, cfg


def levels(net, *shape):
    return torch.randint(0, net.levels, shape)


# ---- causality


@every_arch
@pytest.mark.parametrize("train", [False, True])
def test_trunk_is_strictly_causal(arch, train):
    """The Jacobian of the features of each position in the positions, by autograd."""
    net, _ = build((2, 4, 5), arch, width=200 if arch == "made" else 16, dropout=0.5)
    net.train(train)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net.trunk(x, torch.tensor([1])), x)  # (1,F,4,5,1,2,4,5)
    seen = jacobian.abs().sum((0, 1, 4, 5)).view(20, 20)  # [output position, input position]
    assert (seen.triu() == 0).all()
    assert (seen.sum(1)[1:] > 0).all()


@pytest.mark.parametrize("arch", ["pixelcnn", "transformer", "made"])
def test_there_is_no_blind_spot(arch):
    net, _ = build((1, 4, 5), arch, **{"blocks": 1, "width": 200} if arch == "made" else {"blocks": 6, "width": 16})
    x = torch.randn(1, 1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net.trunk(x, torch.tensor([1])), x)
    seen = jacobian.abs().sum((0, 1, 4, 5)).view(20, 20)
    assert (seen[torch.ones(20, 20).tril(-1).bool()] > 0).all()


@every_arch
@every_output
@pytest.mark.parametrize("channels, patch", [(3, 1), (1, 2), (3, 2)])
def test_every_pixel_depends_on_those_before_it(arch, output, channels, patch):
    """Change one pixel or channel: parameters of it and of all before it stay bit for bit, some after it change."""
    net, cfg = build((channels, 4, 4), arch, output=output, patch=patch)
    x, y = patchify(levels(net, 4, channels, 4, 4), patch), torch.tensor([2, 1, 0, 2])
    order = [(i, j, c) for i in range(x.shape[2]) for j in range(x.shape[3]) for c in range(x.shape[1])]
    before = net(x, y)
    for n in range(0, len(order), 5):
        i, j, c = order[n]
        changed = x.clone()
        changed[:, c, i, j] = (x[:, c, i, j] + net.levels // 2) % net.levels
        after = net(changed, y)
        same = [torch.equal(before[:, c, :, i, j], after[:, c, :, i, j]) for i, j, c in order]
        assert all(same[:n + 1]) and (n + 1 == len(order) or not all(same))


# ---- likelihood


@every_arch
@pytest.mark.parametrize("channels, patch, shape", [(1, 1, (2, 2)), (1, 2, (2, 3)), (2, 1, (1, 3)), (1, 2, (3, 2))])
def test_probabilities_of_all_images_sum_to_one(arch, channels, patch, shape):
    net, cfg = build((channels, *shape), arch, patch=patch)
    D = channels * shape[0] * shape[1]
    x = torch.tensor(list(itertools.product([0, 1], repeat=D))).view(-1, channels, *shape)
    total = log_likelihood(net, x, torch.ones(len(x), dtype=torch.long), cfg).exp().sum()
    assert_close(total, torch.ones((), dtype=torch.float64))


@every_arch
def test_the_likelihood_is_the_product_of_the_factors(arch):
    """Written out: a loop over pixels, each from a pass in which only the pixels before it are known."""
    net, cfg = build((1, 3, 3), arch)
    x, y, total = levels(net, 2, 1, 3, 3), torch.tensor([0, 2]), 0
    for i, j in itertools.product(range(3), range(3)):
        known = torch.where(torch.arange(9).view(3, 3) < 3 * i + j, x, 0)
        p = torch.sigmoid(net(known, y)[:, 0, 0, i, j])
        total = total + torch.where(x[:, 0, i, j] == 1, p, 1 - p).log()
    assert_close(log_likelihood(net, x, y, cfg), total)


@every_arch
def test_scoring_the_mean_of_the_draws_is_the_same_on_average(arch):
    """Over all binary images that a grey one gives: the mean of log p(x) is that of the factors, each a mean over its pixel."""
    net, cfg = build((1, 2, 3), arch, patch=2)
    grey = torch.tensor([[0.1, 0.9, 0.5], [0.0, 1.0, 0.3]], dtype=torch.float64).view(1, 1, 2, 3)
    x = torch.tensor(list(itertools.product([0, 1], repeat=6))).view(-1, 1, 2, 3)
    chance = torch.where(x == 1, grey, 1 - grey).prod(3).prod(2).flatten()
    y = torch.ones(len(x), dtype=torch.long)
    drawn = log_likelihood(net, x, y, cfg)
    scored = log_likelihood(net, x, y, cfg, grey.expand_as(x))
    assert_close((chance * scored).sum(), (chance * drawn).sum())
    variance = [(chance * (total - (chance * total).sum()) ** 2).sum() for total in (drawn, scored)]
    assert variance[1] < 0.5 * variance[0]
    assert_close(log_likelihood(net, x, y, cfg, x), drawn)  # of itself


@every_output
def test_a_pixel_sums_to_one(output):
    """Over all its levels, for extreme parameters too."""
    K = {"bernoulli": 1, "softmax": 256, "mixture": 6}[output]
    params = torch.randn(5, 1, K, 1, 7, dtype=torch.float64) * torch.logspace(-2, 2, 7, dtype=torch.float64)
    x = torch.arange(2 if output == "bernoulli" else 256).view(-1, 1, 1, 1, 1)
    total = sum(log_prob(params, level.expand(5, 1, 1, 7), output).exp() for level in x)
    assert_close(total, torch.ones_like(total))


def test_mixture_against_scipy():
    params = torch.randn(4, 1, 6, 1, 1, dtype=torch.float64) * 0.5
    logits, means, scales = params[:, 0, :, 0, 0].unflatten(1, (3, 2)).unbind(1)
    for x in (0, 3, 128, 254, 255):
        upper = 1.0 if x == 255 else stats.logistic.cdf((x + 0.5) / 127.5 - 1, means, scales.exp())
        lower = 0.0 if x == 0 else stats.logistic.cdf((x - 0.5) / 127.5 - 1, means, scales.exp())
        want = torch.log((logits.softmax(1) * torch.as_tensor(upper - lower)).sum(1))
        assert_close(log_prob(params, torch.full((4, 1, 1, 1), x), "mixture")[:, 0, 0, 0], want)


def test_the_head_alone_knows_uniform_data():
    """With nothing learnt a 256-way softmax has exactly 8 bits/dim, a Bernoulli log 2 nats a pixel."""
    for output, nats in (("softmax", math.log(256)), ("bernoulli", math.log(2))):
        net, cfg = build((1, 5, 4), output=output)
        for p in net.head.parameters():
            torch.nn.init.zeros_(p)
        x = levels(net, 3, 1, 5, 4)
        assert_close(log_likelihood(net, x, torch.zeros(3, dtype=torch.long), cfg), torch.full((3,), -20 * nats).double())


@pytest.mark.parametrize("shape, patch", [((1, 4, 4), 2), ((3, 5, 7), 2), ((2, 1, 1), 3), ((1, 6, 6), 1)])
def test_fold_and_back(shape, patch):
    x = torch.randint(1, 9, (2, *shape))
    patches = patchify(x, patch)
    assert torch.equal(unpatchify(patches, patch, *shape[1:]), x)
    assert patches.sum() == x.sum()
    if patch == 2 and shape[1] > 1:
        assert torch.equal(patches[:, :4, 0, 0], x[:, 0, :2, :2].flatten(1))


def test_what_pads_a_patch_is_worth_nothing():
    """5x7 in patches of 2: the likelihood is of the 35 pixels; the padding counts neither as given nor as drawn."""
    net, cfg = build((1, 5, 7), patch=2)
    for p in net.head.parameters():
        torch.nn.init.zeros_(p)
    x = levels(net, 2, 1, 5, 7)
    assert_close(log_likelihood(net, x, torch.tensor([0, 1]), cfg), torch.full((2,), -35 * math.log(2)).double())


# ---- sampling


@every_arch
@every_output
@pytest.mark.parametrize("channels, patch", [(1, 1), (1, 2), (3, 1)])
def test_three_samplers_one_sample(arch, output, channels, patch):
    net, cfg = build((channels, 5, 6), arch, output=output, patch=patch)
    y, noise, drawn = torch.tensor([0, 1, 2]), torch.rand(3, channels, 5, 6, dtype=torch.float64), {}
    for sampler in ("naive", "cached", "jacobi"):
        drawn[sampler], passes = sample(net, y, noise, dataclasses.replace(cfg, sampler=sampler))
        assert passes <= channels * 6 * 6 + 1
    assert torch.equal(drawn["naive"], drawn["cached"]) and torch.equal(drawn["naive"], drawn["jacobi"])
    assert drawn["naive"].unique().numel() > 1


@every_arch
@pytest.mark.parametrize("B, H, W", [(1, 3, 3), (5, 8, 3), (2, 1, 9)])
def test_a_step_gives_the_features_of_a_pass(arch, B, H, W):
    net, _ = build((2, H, W), arch)
    x, y = torch.randn(B, 2, H, W, dtype=torch.float64), torch.arange(B) % 3
    with torch.no_grad():
        whole, so_far = net.trunk(x, y), torch.zeros_like(x)
        cache = autoregressive.CACHES[arch](net.trunk, so_far, y)
        for i, j in itertools.product(range(H), range(W)):
            assert_close(cache.step(so_far, i, j), whole[:, :, i, j])
            so_far[:, :, i, j] = x[:, :, i, j]


@pytest.mark.parametrize("kernel", [5, 7])
def test_wide_kernels_are_causal_and_their_cache_gives_the_features_of_a_pass(kernel):
    """At every place: near the edges, where a kernel sees beyond the image, and away from them."""
    net, _ = build((2, 5, 9), "pixelcnn", kernel=kernel, width=32)
    x, y = torch.randn(2, 2, 5, 9, dtype=torch.float64), torch.arange(2)
    jacobian = torch.autograd.functional.jacobian(lambda x: net.trunk(x, y[1:]).sum(1), x[1:])  # (1,5,9,1,2,5,9)
    seen = jacobian.abs().sum((0, 3, 4)).view(45, 45)
    assert (seen.triu() == 0).all() and (seen.sum(1)[1:] > 0).all()
    with torch.no_grad():
        whole, so_far = net.trunk(x, y), torch.zeros_like(x)
        cache = autoregressive.CACHES["pixelcnn"](net.trunk, so_far, y)
        for i, j in itertools.product(range(5), range(9)):
            assert_close(cache.step(so_far, i, j), whole[:, :, i, j])
            so_far[:, :, i, j] = x[:, :, i, j]


def test_a_gated_block_against_its_formula():
    """Gated PixelCNN eq. 4 in both stacks, each with its half of the label, and what the vertical one gives to the other."""
    net, _ = build((3, 4, 5), "pixelcnn", blocks=1)
    block, conv2d = net.trunk.blocks[0], torch.nn.functional.conv2d
    v, h, y = *torch.randn(2, 2, 8, 4, 5, dtype=torch.float64), torch.tensor([0, 2])
    found_v, found_h, found_g = block(v, h, y)
    of_v, of_h = block.label.weight[y][:, :, None, None].split(16, 1)
    u = conv2d(torch.nn.functional.pad(v, (1, 1, 1, 0)), block.v_conv.weight, block.v_conv.bias)
    a, b = (u + of_v).split(8, 1)
    assert_close(found_v, v + torch.tanh(a) * torch.sigmoid(b))
    left = block.h_conv.weight[:, :, :, :2]  # and the centre
    w = conv2d(torch.nn.functional.pad(h, (1, 0)), left, block.h_conv.bias)
    a, b = (w + conv2d(u, block.v_to_h.weight, block.v_to_h.bias) + of_h).split(8, 1)
    assert_close(found_g, torch.tanh(a) * torch.sigmoid(b))
    assert_close(found_h, h + conv2d(found_g, block.h_out.weight, block.h_out.bias))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("n", [1, 5])
def test_the_head_pixel_by_pixel(output, n):
    """At one position, from the pixels before alone, what a pass of the head gives there."""
    net, _ = build((n, 2, 3), output=output)
    x, h = levels(net, 4, n, 2, 3), torch.randn(4, net.trunk.features, 2, 3, dtype=torch.float64)
    whole = net.head(h, net.embed(x) if net.embedding else None)
    for i, j, c in itertools.product(range(2), range(3), range(n)):
        e = net.embedding(x[:, :, i, j]) if net.embedding else None
        if n > 1:
            e[:, c:] = 0  # not drawn yet
        assert_close(net.head.pixel(*net.head.at(h[:, :, i, j]), e, c), whole[:, c, :, i, j])


@every_output
@every_arch
def test_three_samplers_one_sample_in_float32(arch, output):
    """As the script draws, where caches round otherwise than a pass does."""
    net, cfg = build((1, 8, 8), arch, output=output, patch=2)
    noise, net = torch.rand(4, 1, 8, 8), net.float()
    naive, cached, jacobi = (sample(net, torch.tensor([0, 1, 2, 0]), noise, dataclasses.replace(cfg, sampler=s))[0]
                             for s in ("naive", "cached", "jacobi"))
    assert torch.equal(naive, cached) and torch.equal(naive, jacobi)


@every_arch
def test_every_position_knows_the_label(arch):
    net, _ = build((1, 4, 6), arch)
    x = torch.randn(1, 1, 4, 6, dtype=torch.float64).expand(2, -1, -1, -1)
    a, b = net.trunk(x, torch.tensor([0, 1]))
    assert ((a - b).abs().amax(0) > 0).all()


@every_arch
def test_likelihoods_under_mixed_precision_are_not_rounded(arch):
    """A sum of hundreds of nats in bfloat16 would be a multiple of 2."""
    net, cfg = build((1, 8, 8), arch, output="softmax")
    net, x, y = net.float(), levels(net, 6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = log_likelihood(net, x, y, cfg)
    assert mixed.dtype == torch.float32 and (mixed % 1).abs().min() > 0
    assert_close(mixed, log_likelihood(net, x, y, cfg), rtol=2e-2, atol=0)


@every_arch
def test_a_sample_does_not_depend_on_its_batch(arch):
    net, cfg = build((1, 4, 4), arch)
    y, noise = torch.tensor([0, 1, 2, 1]), torch.rand(4, 1, 4, 4, dtype=torch.float64)
    whole, _ = sample(net, y, noise, cfg)
    for n in range(4):
        assert torch.equal(sample(net, y[n:n + 1], noise[n:n + 1], cfg)[0], whole[n:n + 1])


@every_output
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_drawn_levels_have_the_probabilities(output, temperature):
    """Evenly spaced numbers in place of random ones: the share of each level is its probability."""
    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    params = torch.randn({"bernoulli": 1, "softmax": 256, "mixture": 6}[output], dtype=torch.float64)
    hot = params / temperature
    if output == "mixture":
        hot = params.clone()
        hot[:2], hot[4:] = params[:2] / temperature, params[4:] + math.log(temperature)
    shares = torch.bincount(draw(params.expand(n, -1), u, output, temperature), minlength=256).double() / n
    x = torch.arange(2 if output == "bernoulli" else 256)
    want = log_prob(hot.view(1, 1, -1, 1, 1).expand(len(x), -1, -1, -1, -1), x.view(-1, 1, 1, 1), output).exp().flatten()
    assert_close(shares[:len(x)], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["naive", "cached", "jacobi"])
@pytest.mark.parametrize("patch", [1, 2])
def test_given_pixels_stay_and_the_rest_follows_from_them(sampler, patch):
    net, cfg = build((1, 5, 5), patch=patch, sampler=sampler)
    x, noise, y = levels(net, 4, 1, 5, 5), torch.rand(4, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    given = torch.where(torch.rand(5, 5) < 0.5, x, -1)
    drawn, _ = sample(net, y, noise, cfg, given)
    assert torch.equal(drawn[given >= 0], x[given >= 0])
    again, _ = sample(net, y, noise, dataclasses.replace(cfg, sampler="naive"), given)
    assert torch.equal(drawn, again)
    p = torch.sigmoid(net(patchify(drawn, patch), y)[:, :, 0])  # each drawn pixel is the one that its noise asks for
    assert torch.equal(unpatchify((patchify(noise, patch) < p).long(), patch, 5, 5)[given < 0], drawn[given < 0])


@pytest.mark.parametrize("sampler", ["naive", "cached", "jacobi"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_follow_the_temperature(sampler, temperature):
    """Each binary pixel is the one that its noise asks for of a logit divided by the temperature."""
    net, cfg = build((1, 5, 5), temperature=temperature, sampler=sampler)
    y, noise = torch.tensor([0, 1, 2]), torch.rand(3, 1, 5, 5, dtype=torch.float64)
    drawn, _ = sample(net, y, noise, cfg)
    assert torch.equal(drawn, (noise < torch.sigmoid(net(drawn, y)[:, :, 0] / temperature)).long())
    assert not torch.equal(drawn, sample(net, y, noise, dataclasses.replace(cfg, temperature=1.0))[0])


def test_low_temperature_gives_the_mode():
    net, cfg = build((1, 4, 4), temperature=1e-6)
    y = torch.zeros(2, dtype=torch.long)
    drawn, _ = sample(net, y, torch.rand(2, 1, 4, 4, dtype=torch.float64), cfg)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[:, 0], (net(drawn, y)[:, 0, 0] > 0).long())


# ---- the script

TINY = [*tiny.TINY["autoregressive"].split(),
        *"--steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 3".split()]


@pytest.fixture()
def digits(monkeypatch):
    """digits with 8 test images, loaded once."""
    return tiny.small_digits(autoregressive, monkeypatch)


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("flags", [
    "--arch pixelcnn --patch 1", "--arch made --width 32 --output mixture", "--arch pixelcnn --kernel 5",
    "--image-size 11 --patch 4",
    "--output softmax --temperature 0.5", "--output mixture --mixtures 2 --sampler jacobi", "--no-labels --eval-images 3",
    "--complete top --sampler naive", "--complete right --label 3", "--complete bottom --output softmax", "--amp bf16",
    "--complete left --no-labels --arch made --width 32", "--dropout 0.2 --minutes 0.02", "--kernels torch"])
def test_every_option_runs(digits, tmp_path, flags):
    out = tmp_path / "run"
    autoregressive.main([*TINY, "--out", str(out), *flags.split()])
    names = {"config.json", "metrics.jsonl", "samples.png", "checkpoint.pt", "samples.npz"}
    assert names <= {p.name for p in out.iterdir()}
    images = np.load(out / "samples.npz")["images"]
    assert images.shape[0] == 4 and images.dtype == np.uint8
    if "softmax" not in flags and "mixture" not in flags:
        assert set(np.unique(images)) <= {0, 255}
    assert (out / "complete.png").exists() == ("--complete" in flags)
    assert math.isfinite(final(out)["test_nats"])


def test_completions_are_of_the_binarised_test_images(digits, tmp_path, monkeypatch):
    """Which --seed has no part in: it draws what is missing."""
    grids = {}
    monkeypatch.setattr(autoregressive, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    autoregressive.main([*TINY, "--out", str(tmp_path / "run"), "--complete", "top", "--seed", "3"])
    x = torch.rand(digits.test.shape, generator=torch.Generator().manual_seed(0)) * 255 < digits.test
    rows = grids["complete.png"].unflatten(0, (-1, 6)) == 255  # the image, its half, four completions
    assert torch.equal(rows[:, 0], x) and all(torch.equal(rows[:, i, :, :4], x[:, :, :4]) for i in range(1, 6))
    model, cfg = autoregressive.load(tmp_path / "run")
    given = torch.where(torch.arange(8)[:, None] < 4, x.long(), -1).repeat_interleave(4, 0)
    noise = torch.rand(given.shape, generator=torch.Generator().manual_seed(3))
    completed, _ = sample(model, digits.test_labels.repeat_interleave(4), noise, cfg, given)
    assert torch.equal(rows[:, 2:].flatten(0, 1), completed == 1)


@pytest.mark.parametrize("half, rows, columns", [("top", slice(0, 3), slice(0, 5)), ("bottom", slice(4, 7), slice(0, 5)),
                                                 ("left", slice(0, 7), slice(0, 2)), ("right", slice(0, 7), slice(3, 5))])
def test_a_half_of_odd_images_is_the_smaller_one(half, rows, columns, tmp_path, monkeypatch):
    grids, data = {}, tiny.make_data(autoregressive, shape=(1, 7, 5), test=3)
    monkeypatch.setattr(autoregressive, "load_data", lambda *args: data)
    monkeypatch.setattr(autoregressive, "save_grid", lambda images, path, *args, **kwargs: grids.update({path.name: images}))
    autoregressive.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run"), "--complete", half])
    grid = grids["complete.png"].unflatten(0, (-1, 6))  # the image, its half, four completions; black or white
    given = torch.zeros(7, 5, dtype=torch.bool)
    given[rows, columns] = True
    assert torch.equal(grid[:, 1, 0] != 128, given.expand(3, 7, 5))
    assert all(torch.equal(grid[:, i, 0][:, given], grid[:, 0, 0][:, given]) for i in range(1, 6))


def test_completions_without_labels_in_every_mode(digits, tmp_path):
    out = tmp_path / "run"
    autoregressive.main([*TINY, "--no-labels", "--out", str(out)])
    for mode, folder in (("sample", out / "sampled"), ("eval", out)):
        autoregressive.main(["--mode", mode, "--complete", "left", "--out", str(out)])
        assert (folder / "complete.png").exists()


def test_the_passes_used_are_told(digits, tmp_path, capsys):
    """Against the pixels of an image: 64 passes for the naive sampler, at most 65 for the fixed point."""
    told = {}
    for sampler in ("naive", "jacobi"):
        autoregressive.main([*TINY, "--out", str(tmp_path / sampler), "--sampler", sampler])
        told[sampler] = int(re.search(rf"\({sampler}: (\d+) passes for 64 pixels\)", capsys.readouterr().out)[1])
    assert told["naive"] == 64 and 1 < told["jacobi"] <= 65


@every_arch
@every_output
def test_a_lone_copy_computes_the_same(arch, output, monkeypatch):
    """Without the folder kernels/, the few lines under `except ImportError` take the operations' place."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in [n for n in sys.modules if n.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("lone", autoregressive.__file__)
    monkeypatch.setitem(sys.modules, "lone", lone := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(lone)
    assert lone.masked_conv2d.__module__ == lone.logistic_mixture.__module__ == lone.decode_attention.__module__ == "lone"
    net, cfg = build((1, 4, 5), arch, output=output)
    copy = lone.Autoregressive(1, 4, 5, 3, cfg).double().eval()
    copy.load_state_dict(net.state_dict())
    x, y, noise = levels(net, 3, 1, 4, 5), torch.tensor([0, 1, 2]), torch.rand(3, 1, 4, 5, dtype=torch.float64)
    assert_close(lone.log_likelihood(copy, x, y, cfg), log_likelihood(net, x, y, cfg))
    assert torch.equal(lone.sample(copy, y, noise, cfg)[0], sample(net, y, noise, cfg)[0])
    if output == "mixture":  # all levels, for scales of all sizes
        every = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16)
        params = torch.logspace(-1, 1, 40, dtype=torch.float64).view(-1, 1, 1, 1) * torch.randn(40, 6, 16, 16).double()
        want = autoregressive.logistic_mixture(every.expand(40, -1, -1, -1), params)
        assert_close(lone.logistic_mixture(every, params), want)


def test_the_test_likelihood_is_the_mean_over_classes(digits, tmp_path, monkeypatch):
    """Against p(x) = sum_y p(x | y) / 10 written out, on the test split binarised with seed 0."""
    monkeypatch.setattr(autoregressive, "at_once", lambda *args: 3)  # the last batch is a short one
    out = tmp_path / "run"
    autoregressive.main([*TINY, "--out", str(out), "--seed", "5", "--temperature", "0.5"])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    cfg = Config(**saved["config"])
    net = Autoregressive(4, 4, 4, 10, cfg)  # patches of 2 x 2
    net.load_state_dict(saved["ema_model"])
    x = (torch.rand(digits.test.shape, generator=torch.Generator().manual_seed(0)) * 255 < digits.test).long()
    p = sum(log_likelihood(net.eval(), x, torch.full((8,), y), cfg).double().exp() / 10 for y in range(10))
    assert final(out)["test_nats"] == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert final(out)["test_bpd"] == pytest.approx(-p.log().mean().item() / 64 / math.log(2), rel=1e-5)
    given = -log_likelihood(net, x, digits.test_labels, cfg).mean().item()
    assert final(out)["test_nats_given_label"] == pytest.approx(given, rel=1e-5)


def test_each_step_binarises_anew(digits, tmp_path, monkeypatch):
    """Every step sees the same images here, and no two steps the same binary ones; their mean is that of the images.

    What is scored is the probability of each pixel; with 8 bits it is the image itself.
    """
    seen, scored = [], []
    inner = autoregressive.log_likelihood

    def record(net, x, y, cfg, of=None):
        if net.training:
            seen.append(x)
            scored.append(of)
        return inner(net, x, y, cfg, of)

    monkeypatch.setattr(autoregressive, "log_likelihood", record)
    monkeypatch.setattr(autoregressive.Run, "batch", lambda run, data: (data.train[:16], data.train_labels[:16]))
    autoregressive.main([*TINY, "--out", str(tmp_path / "run")])
    assert len(seen) == 4 and not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert all(torch.equal(of, digits.train[:16] / 255) for of in scored)
    mean = torch.stack([autoregressive.to_levels(digits.train, Config(output="bernoulli")).double() for _ in range(30)]).mean()
    assert mean.item() == pytest.approx((digits.train / 255).mean().item(), abs=2e-3)
    autoregressive.main([*TINY, "--output", "softmax", "--out", str(tmp_path / "8bit")])
    assert len(seen) == 8 and all(of is None for of in scored[4:])


@pytest.mark.parametrize("flags", ["", "--arch pixelcnn --output softmax", "--arch made --output mixture --no-labels"])
def test_load_gives_what_the_run_sampled(digits, tmp_path, flags):
    """The averaged network, frozen and in eval mode: from the same noise and labels the images that main wrote."""
    out = tmp_path / "run"
    autoregressive.main([*TINY, *flags.split(), "--out", str(out), "--num-samples", "12"])
    model, cfg = autoregressive.load(out)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, saved["ema_model"][name]) for name, value in model.state_dict().items())
    noise = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(cfg.seed))
    y = torch.arange(12) % 10 if cfg.labels else torch.zeros(12, dtype=torch.long)
    images = autoregressive.to_pixels(sample(model, y, noise, cfg)[0], cfg)
    written = np.load(out / "samples.npz")["images"]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), written) and len(np.unique(written)) > 1


def test_sampling_flags_are_free_on_a_trained_model(digits, tmp_path):
    """--mode sample with another sampler writes the same images, with another label or temperature others."""
    out = tmp_path / "run"
    autoregressive.main([*TINY, "--out", str(out), "--num-samples", "12"])
    first = np.load(out / "samples.npz")["images"]
    found = {}
    for flags in ("--sampler jacobi", "--label 3", "--temperature 0.5"):
        autoregressive.main(["--mode", "sample", "--out", str(out), *flags.split()])
        found[flags] = np.load(out / "sampled" / "samples.npz")
    assert np.array_equal(found["--sampler jacobi"]["images"], first)
    assert set(found["--label 3"]["labels"]) == {3} and not np.array_equal(found["--label 3"]["images"], first)
    assert not np.array_equal(found["--temperature 0.5"]["images"], first)


@pytest.mark.parametrize("flags", ["--kernel 4", "--label 10", "--label 1 --no-labels", "--kernel 1", "--label -1",
                                   "--temperature 0", "--n-head 3 --arch transformer", "--patch 9"])
def test_bad_flags_are_one_line(flags, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        autoregressive.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in line and line.count("\n") == 1


@pytest.mark.parametrize("dataset, output", [("mnist", "bernoulli"), ("digits", "softmax"), ("fashion_mnist", "softmax")])
def test_what_output_is_chosen(dataset, output):
    assert autoregressive.choose(Config(dataset=dataset), 8, 8).output == output
    assert autoregressive.choose(Config(dataset=dataset, output="mixture"), 8, 8).output == "mixture"


@pytest.mark.parametrize("H, W, patch", [(1, 1, 1), (1, 5, 2), (8, 8, 2), (15, 40, 2), (16, 16, 4), (33, 49, 4)])
def test_what_patch_is_chosen(H, W, patch):
    assert autoregressive.choose(Config(), H, W).patch == patch
    assert autoregressive.choose(Config(patch=1), H, W).patch == 1


def test_what_width_is_chosen():
    widths = {arch: autoregressive.choose(Config(arch=arch), 8, 8).width for arch in autoregressive.TRUNKS}
    assert widths == {"transformer": 128, "pixelcnn": 64, "made": 1000}
    assert autoregressive.choose(Config(arch="made", width=7), 8, 8).width == 7


def test_dropout_is_for_digits_alone_unless_asked_for():
    assert [autoregressive.choose(Config(dataset=name), 8, 8).dropout for name in ("digits", "mnist", "photos")] == [0.3, 0, 0]
    assert autoregressive.choose(Config(dropout=0.0), 8, 8).dropout == 0


def test_all_of_a_branch_is_dropped():
    """At a rate of 1 a block of the transformer adds nothing, one of the PixelCNN its bias, and MADE puts out its last bias."""
    x, y = torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.tensor([0, 2])
    block = build((3, 2, 3), "transformer", dropout=1.0)[0].trunk.blocks[0].train()
    h = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.equal(block(h, lambda q, k, v: v), h)
    block = build((3, 2, 3), "pixelcnn", dropout=1.0)[0].trunk.blocks[0].train()
    v, h = torch.randn(2, 2, 8, 2, 3, dtype=torch.float64)
    assert_close(block(v, h, y)[1], h + block.h_out.bias[:, None, None])
    trunk = build((3, 2, 3), "made", dropout=1.0)[0].trunk.train()
    assert_close(trunk(x, y), trunk.out.bias.view(2, 3, -1).permute(2, 0, 1).expand(2, -1, -1, -1))


@pytest.mark.parametrize("flags, bar", [
    ("--steps 200 --width 64 --lr 0.005", 24.6), ("--arch pixelcnn --optimizer adam --steps 80", 25.7),
    ("--arch made --steps 250 --width 400 --lr 0.004", 23.5)])  # 24.1, 24.9, 23.0
def test_a_short_training_learns_digits(flags, bar, tmp_path):
    """Nats of 100 test images; independent pixels of the right frequencies have 27.4, and MADE, shown another image, 23.9."""
    out = tmp_path / "run"
    core = "--output bernoulli --blocks 2 --dropout 0 --warmup 20 --eval-images 100 --num-samples 1"
    autoregressive.main([*core.split(), "--out", str(out), *flags.split()])
    assert final(out)["test_nats"] < bar
