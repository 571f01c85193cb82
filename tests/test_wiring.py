"""The wiring of every script: each field of Config changes what it is for and nothing else, and train, evaluate and generate
hand to the maths what they should."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tiny
from tiny import SCRIPTS, assert_same_state, load_checkpoint, make_data, metrics

# ---- the table: field -> (flags of the run that it is compared with, flags that change the field, what must change)
# Of a field of the model or of training it is the weights. Of a field that is free to change on a trained model it is the
# figures of the test split ("test"), the samples, the other grids, the lines of metrics.jsonl or what is said. These alone,
# but for what is said, in which the figures stand.

WEIGHTS, TEST, SAMPLES, GRIDS, LINES, SAID = "weights", "test", "samples", "grids", "lines", "said"
TABLE = {
    "vae": {
        "levels": ("", "--levels 2", WEIGHTS),
        "prior": ("", "--prior flow", WEIGHTS),
        "posterior": ("", "--posterior iaf", WEIGHTS),
        "z_dim": ("", "--z-dim 3", WEIGHTS),
        "z_channels": ("--levels 2", "--z-channels 2", WEIGHTS),
        "flow_steps": ("--prior flow", "--flow-steps 1", WEIGHTS),
        "flow_hidden": ("--prior flow", "--flow-hidden 5", WEIGHTS),
        "pseudo_inputs": ("--prior vamp", "--pseudo-inputs 3", WEIGHTS),
        "likelihood": ("", "--likelihood mixture", WEIGHTS),
        "mixtures": ("--likelihood mixture", "--mixtures 2", WEIGHTS),
        "patch": ("", "--patch 4", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "beta": ("", "--beta 0.5", WEIGHTS),
        "kl_warmup": ("", "--kl-warmup 1", WEIGHTS),
        "free_nats": ("", "--free-nats 100", WEIGHTS),
        "optimizer": ("", "--optimizer adam", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decay": ("", "--decay 1", WEIGHTS),
        "iw_samples": ("", "--iw-samples 3", TEST),
        "temperature": ("", "--temperature 0.5", SAMPLES),
    },
    "flow": {
        "arch": ("", "--arch glow", WEIGHTS),
        "coupling": ("", "--coupling spline", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "dequantize": ("", "--dequantize variational", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "layers": ("", "--layers 2", WEIGHTS),
        "n_head": ("", "--n-head 1", WEIGHTS),
        "patch": ("", "--patch 4", WEIGHTS),
        "scales": ("--arch glow", "--scales 1", WEIGHTS),
        "steps_per_scale": ("--arch glow", "--steps-per-scale 2", WEIGHTS),
        "labels": ("", "--no-labels", WEIGHTS),
        "optimizer": ("", "--optimizer adam", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decay": ("", "--decay 1", WEIGHTS),
        "inverse": ("--lr 0.0001", "--inverse jacobi", SAID),
        "temperature": ("", "--temperature 0.5", SAMPLES),
        "label": ("", "--label 1", SAMPLES),
    },
    "gan": {
        "z_dim": ("", "--z-dim 3", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "patch": ("", "--patch 2", WEIGHTS),
        "spectral_norm": ("", "--spectral-norm", WEIGHTS),
        "loss": ("", "--loss hinge", WEIGHTS),
        "r1": ("", "--r1 2", WEIGHTS),
        "r2": ("", "--r2 2", WEIGHTS),
        "anneal": ("", "--anneal 1", WEIGHTS),
        "labels": ("", "--no-labels", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decay": ("", "--decay 1", WEIGHTS),
        "temperature": ("", "--temperature 0.5", TEST, SAMPLES, GRIDS),
        "label": ("", "--label 1", SAMPLES, GRIDS),
    },
    "autoregressive": {
        "arch": ("", "--arch pixelcnn", WEIGHTS),
        "output": ("", "--output softmax", WEIGHTS),
        "mixtures": ("--output mixture", "--mixtures 2", WEIGHTS),
        "patch": ("", "--patch 1", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "n_head": ("", "--n-head 2", WEIGHTS),
        "kernel": ("--arch pixelcnn", "--kernel 5", WEIGHTS),
        "labels": ("", "--no-labels", WEIGHTS),
        "dropout": ("", "--dropout 0.6", WEIGHTS),
        "optimizer": ("", "--optimizer adam", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decay": ("", "--decay 1", WEIGHTS),
        "sampler": ("", "--sampler naive", SAID),
        "temperature": ("", "--temperature 0.5", SAMPLES),
        "label": ("", "--label 1", SAMPLES),
        "complete": ("", "--complete top", GRIDS, SAID),
    },
    "diffusion": {
        "method": ("", "--method v", WEIGHTS),
        "schedule": ("", "--schedule cosine", WEIGHTS),
        "predict": ("", "--predict x", WEIGHTS),
        "loss_on": ("", "--loss-on eps", WEIGHTS),
        "times": ("", "--times uniform", WEIGHTS),
        "patch": ("", "--patch 2", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "mults": ("", "--mults 2 2", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "n_head": ("", "--n-head 1", WEIGHTS),
        "labels": ("", "--no-labels", WEIGHTS),
        "label_dropout": ("", "--label-dropout 0.9", WEIGHTS),
        "dropout": ("", "--dropout 0.5", WEIGHTS),
        "optimizer": ("", "--optimizer adam", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decoder_logsnr": ("", "--decoder-logsnr 3", TEST),
        "elbo_samples": ("", "--elbo-samples 2", TEST),
        "sampler": ("--nfe 8", "--sampler ddpm", SAMPLES),
        "nfe": ("", "--nfe 8", SAMPLES),
        "guidance": ("--nfe 8", "--guidance 3", SAMPLES),
        "guidance_interval": ("--nfe 8", "--guidance-interval 0 1", SAMPLES),
        "label": ("", "--label 1", SAMPLES),
        "inpaint": ("", "--inpaint top", GRIDS, SAID),
    },
    "vqgan": {
        "quantizer": ("", "--quantizer simvq", WEIGHTS),
        "n_codes": ("", "--n-codes 5", WEIGHTS),
        "code_dim": ("", "--code-dim 3", WEIGHTS),
        "fsq_levels": ("--quantizer fsq", "--fsq-levels 3 3", WEIGHTS),
        "downsample": ("", "--downsample 4", WEIGHTS),
        "width": ("", "--width 4", WEIGHTS),
        "blocks": ("", "--blocks 2", WEIGHTS),
        "prior_width": ("", "--prior-width 4", WEIGHTS),
        "prior_blocks": ("", "--prior-blocks 2", WEIGHTS),
        "n_head": ("", "--n-head 1", WEIGHTS),
        "dropout": ("", "--dropout 0.5", WEIGHTS),
        "stage1": ("", "--stage1 2", WEIGHTS),
        "beta": ("", "--beta 1", WEIGHTS),
        "disc_start": ("", "--disc-start 1", WEIGHTS),
        "disc_weight": ("", "--disc-weight 1", WEIGHTS),
        "perceptual_weight": ("", "--perceptual-weight 1", WEIGHTS),
        "prior_lr": ("", "--prior-lr 0.01", WEIGHTS),
        "optimizer": ("", "--optimizer adam", WEIGHTS),
        "warmup": ("", "--warmup 3", WEIGHTS),
        "decay": ("", "--decay 1", WEIGHTS),
        "labels": ("", "--no-labels", WEIGHTS),
        "label_dropout": ("", "--label-dropout 0.9", WEIGHTS),
        "temperature": ("", "--temperature 0.5", SAMPLES),
        "guidance": ("", "--guidance 9", SAMPLES),
        "sample_size": ("", "--sample-size 12 10", SAMPLES),
        "label": ("", "--label 1", SAMPLES),
    },
}
CORE = {  # of all six scripts
    "batch_size": ("", "--batch-size 8", WEIGHTS),
    "lr": ("", "--lr 0.01", WEIGHTS),
    "seed": ("", "--seed 4", WEIGHTS),
    "ema": ("", "--ema 0.5", WEIGHTS),
    "steps": ("", "--steps 2", WEIGHTS),
    "amp": ("", "--amp bf16", WEIGHTS),
    "num_samples": ("", "--num-samples 6", SAMPLES),
    "eval_images": ("", "--eval-images 2", TEST),
    "log_every": ("", "--log-every 3", LINES),
}
ELSEWHERE = {  # what these are for is seen in other files: tests of the plumbing, of faults and of the kernels
    "dataset", "data_dir", "image_size", "init", "mode", "minutes", "device", "compile", "kernels", "out", "resume",
    "overwrite", "save_every", "recompute", "consistency", "learn_inverse"}
MAY = {  # change besides
    ("flow", "inverse"): {SAMPLES, GRIDS},  # it ends where nothing changes by 1e-5, and a level may be another
    **{(name, "eval_images"): {GRIDS} for name in SCRIPTS},  # of test images
}
SPEED = "--lr 0.02 --warmup 0 --steps 3 --save-every 1000 --num-samples 8".split()  # so that few steps move an image
CHEAP = {"flow": ["--coupling", "affine"]}


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Every data set is a handful of images; the source is read once, signals are let go."""
    monkeypatch.setattr("inspect.getsource", tiny.getsource)
    for name in SCRIPTS:
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "load_data", lambda dataset, *args, script=script: make_data(
            script, test=5, classes=3, seed=int(dataset == "other")))
    with tiny.handlers_kept():
        yield


def go(module, out, *more):
    assert tiny.run(module, tiny.flags(module.__name__, out, *SPEED, *CHEAP.get(module.__name__, ()), *more)) == 0
    return out


def final(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


RUNS = {}


@pytest.fixture
def trained(tmp_path_factory, capsys):
    """trained(module, flag, ...): the outcome of a run and its folder; made once, not to be changed."""
    def run(module, *more):
        key = (module.__name__, *more)
        if key not in RUNS:
            capsys.readouterr()
            out = go(module, tmp_path_factory.mktemp("wiring") / "run", *more)
            RUNS[key] = outcome(out, capsys.readouterr().out), out
        return RUNS[key]
    return run


def network_weights(saved):
    return {name: leaf for name, leaf in tiny.leaves(saved) if torch.is_tensor(leaf) and not name.startswith(".optimizer")}


def outcome(out, said, folder=None):
    """What a run leaves, by kind; samples and grids of --mode sample lie in a folder of their own."""
    folder = folder or out
    lines = metrics(out)
    figures = {k: v for k, v in lines[-1].items() if k != "step"} if lines[-1].get("final") else None
    with np.load(folder / "samples.npz") as arrays:
        samples = {name: arrays[name] for name in arrays.files}
    grids = {path.name: path.read_bytes() for path in folder.glob("*.png") if path.name != "samples.png"}
    said = re.sub(r"\d+\.\d\d s", "", said.replace(str(out), ""))
    return {WEIGHTS: network_weights(load_checkpoint(out)), TEST: figures, SAMPLES: samples, GRIDS: grids,
            LINES: [line for line in lines if not line.get("final")], SAID: said}


def differs(a, b):
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(differs(value, b[name]) for name, value in a.items())
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a.shape != b.shape or bool((a != b).any())
    return a != b


FIELDS = [(name, field) for name in SCRIPTS for field in TABLE[name] | CORE]


def test_every_field_has_its_row(module):
    fields = {field.name for field in dataclasses.fields(module.Config)}
    assert fields == (TABLE[module.__name__] | CORE).keys() | (ELSEWHERE & fields)


@pytest.mark.parametrize("name, field", FIELDS, ids=lambda v: v)
def test_a_field_changes_what_it_is_for(name, field, trained, tmp_path):
    module = importlib.import_module(name)
    base, flag, *kinds = (TABLE[name] | CORE)[field]
    (before, start), (after, out) = (trained(module, *flags.split()) for flags in (base, f"{base} {flag}"))
    default, changed = (module.Config(**load_checkpoint(folder)["config"]) for folder in (start, out))
    assert getattr(default, field) != getattr(changed, field)
    found = {kind for kind in before if differs(before[kind], after[kind])}
    assert found >= set(kinds)
    if kinds == [WEIGHTS]:
        return
    assert found - {SAID} <= set(kinds) | MAY.get((name, field), set())
    if kinds == [LINES]:
        return
    copied = tmp_path / "run"  # on a trained model it does the same
    shutil.copytree(start, copied)
    for mode in ("eval", "sample"):
        assert tiny.run(module, ["--mode", mode, "--out", copied, *flag.split()]) == 0
    again = outcome(copied, "", copied / "sampled")
    assert again[TEST] == after[TEST]
    assert not differs(again[SAMPLES], after[SAMPLES]) and not differs(again[WEIGHTS], before[WEIGHTS])
    made = outcome(copied, "")[GRIDS] | again[GRIDS]
    assert not differs(made, after[GRIDS])


# ---- training

AVERAGES = {"ema_model": "model", "ema_generator": "generator", "ema_prior": "prior"}


def watch_updates(module, monkeypatch, seen):
    """seen(model) after each step of an optimizer."""
    update = module.Run.update

    def wrapped(self, loss, model, optimizer, *args):
        norm = update(self, loss, model, optimizer, *args)
        seen(model)
        return norm

    monkeypatch.setattr(module.Run, "update", wrapped)


def test_the_average_of_the_weights_follows_its_formula(module, tmp_path, monkeypatch):
    """Of every network that has one, from its weights after each step of it."""
    history = {}
    watch_updates(module, monkeypatch, lambda model: history.setdefault(id(model), (model, []))[1].append(
        {name: p.detach().clone() for name, p in model.named_parameters()}))
    more = ["--stage1", 3] if module.__name__ == "vqgan" else []
    go(module, tmp_path / "run", "--ema", 0.3, "--steps", 6, *more)
    saved = load_checkpoint(tmp_path / "run")
    averages = {average: network for average, network in AVERAGES.items() if average in saved}
    assert averages
    for average, network in averages.items():
        steps = next(steps for _, steps in history.values() if steps[-1].keys() <= saved[network].keys() and not differs(
            steps[-1], {name: saved[network][name] for name in steps[-1]}))
        want = steps[0]
        for step, weights in enumerate(steps):
            decay = (1 - 1 / (step + 1)) ** (1 / 0.3)
            want = {name: decay * a + (1 - decay) * weights[name] for name, a in want.items()}
        assert len(steps) == (3 if module.__name__ == "vqgan" else 6)
        for name, a in want.items():
            assert_close(saved[average][name], a, msg=lambda m, name=name: f"{name}: {m}")


VARIANTS = [("flow", "--steps 2 --arch glow --coupling spline --scales 1"), ("gan", "--spectral-norm"),
            ("flow", "--steps 2 --arch glow --recompute --steps-per-scale 2 --dequantize variational"),
            ("gan", "--spectral-norm --loss wgan-gp --r1 1"), ("vae", "--levels 2 --posterior iaf"), ("vae", "--prior vamp"),
            ("vae", "--prior flow --likelihood mixture"), ("vqgan", "--quantizer fsq --stage1 2"),
            ("vqgan", "--quantizer simvq --stage1 2 --disc-start 1"), ("vqgan", "--stage1 2 --dropout 0.5"),
            ("autoregressive", "--arch pixelcnn --dropout 0.5"), ("autoregressive", "--arch made --output mixture"),
            ("diffusion", "--method ddpm --dropout 0.5"), ("diffusion", "--method jit")]
if os.environ.get("M2_ALL_VARIANTS"):  # each field that a training depends on, in each script
    rows = [(name, (TABLE[name] | CORE)[field]) for name, field in FIELDS]
    VARIANTS += [(name, f"{base} {flag}".strip()) for name, (base, flag, *kinds) in rows if WEIGHTS in kinds]


@pytest.mark.parametrize("name, flags", VARIANTS)
def test_stopping_and_looking_change_nothing(name, flags, trained, tmp_path):
    """What is not the default resumes bit for bit, neither a grid nor a line of metrics touches the weights, and the network
    of the checkpoint makes the images that the one in memory made."""
    module = importlib.import_module(name)
    (want, straight), out = trained(module, *flags.split()), tmp_path / "run"
    steps = load_checkpoint(straight)["step"]
    go(module, out, *flags.split(), "--steps", 1)
    assert tiny.run(module, ["--resume", "--steps", steps, "--out", out]) == 0
    again = outcome(out, "")
    assert not any(differs(want[kind], again[kind]) for kind in (WEIGHTS, TEST, SAMPLES, GRIDS, LINES))
    assert_same_state(load_checkpoint(straight), load_checkpoint(out))
    go(module, out, *flags.split(), "--save-every", 1, "--log-every", 1000, "--num-samples", 80, "--overwrite")
    assert_same_state(load_checkpoint(straight), load_checkpoint(out), ["save_every", "log_every", "num_samples"])
    assert (out / "samples.png").read_bytes() == (out / "samples" / f"step_{steps:06d}.png").read_bytes()


@pytest.mark.parametrize("name, flags", [*zip(SCRIPTS, [""] * 6, strict=True), ("gan", "--spectral-norm"),
                                         ("vqgan", "--stage1 2")])
def test_networks_train_in_training_mode_and_are_looked_at_in_the_other(name, flags, tmp_path, monkeypatch):
    """Also in the step after a look, and with no gradient for the weights of what is looked at."""
    module, trained_on, looked_at = importlib.import_module(name), [], []
    watch_updates(module, monkeypatch, trained_on.append)

    def watch(function):
        inside = getattr(module, function)

        def wrapped(*args):
            networks = [net for net in args if isinstance(net, torch.nn.Module)]
            looked_at.append(function)
            assert networks and not any(part.training for net in networks for part in net.modules())
            assert not any(p.requires_grad for net in networks for p in net.parameters())
            result = inside(*args)
            assert not any(part.training for net in networks for part in net.modules())
            return result

        monkeypatch.setattr(module, function, wrapped)

    for function in {"evaluate", "generate", "show", "reconstruct", "to_indices"} & vars(module).keys():
        watch(function)
    watch_modes(module, monkeypatch)
    steps = 3 if flags else 2
    go(module, tmp_path / "run", *flags.split(), "--save-every", 1, "--steps", steps)
    assert looked_at.count("evaluate") == 1 and len(looked_at) >= steps + 2
    assert len(trained_on) >= steps and all(part.training for net in trained_on for part in net.modules())


LOSSES = {"vae": ["loss"], "flow": ["log_likelihood"], "gan": ["loss_d", "loss_g"], "autoregressive": ["log_likelihood"],
          "diffusion": ["loss"], "vqgan": ["loss_autoencoder", "loss_discriminator", "nll"]}


def watch_losses(module, monkeypatch, seen):
    """seen(function, args, result) at each loss of training."""
    for function in LOSSES[module.__name__]:
        inside = getattr(module, function)

        def wrapped(*args, function=function, inside=inside):
            result = inside(*args)
            if module.Run.stepping and torch.is_grad_enabled():
                seen(function, args, result)
            return result

        monkeypatch.setattr(module, function, wrapped)


def watch_modes(module, monkeypatch):
    """A loss of training asks networks in training mode."""
    def seen(function, args, result):
        networks = [arg for arg in args if isinstance(arg, torch.nn.Module)]
        assert networks and all(part.training for net in networks for part in net.modules())

    watch_losses(module, monkeypatch, seen)


def levels_of(name, x):
    """The levels {0..255} that images in [-1,1], or flow.py's numbers between them, came from."""
    return ((x + 1) * 128).floor() if name == "flow" else ((x + 1) * 127.5).round()


@pytest.mark.parametrize("name, flags", [("vae", "--likelihood mixture"), ("flow", ""), ("gan", ""), ("diffusion", ""),
                                         ("autoregressive", "--output softmax"), ("vqgan", "--stage1 2")])
def test_a_loss_is_of_the_images_and_labels_of_the_step(name, flags, tmp_path, monkeypatch):
    module, batches, seen = importlib.import_module(name), [], []
    batch = module.Run.batch
    monkeypatch.setattr(module.Run, "batch", lambda run, data: batches.append(batch(run, data)) or batches[-1])
    watch_losses(module, monkeypatch, lambda function, args, result: seen.append((function, args, len(batches) - 1)))
    more = ["--label-dropout", 0] if name in ("diffusion", "vqgan") else []
    out = go(module, tmp_path / "run", *flags.split(), *more)
    data = module.load_data("digits")
    assert len(batches) == 3 and {step for *_, step in seen} == {0, 1, 2}
    assert {function for function, *_ in seen} == set(LOSSES[name])
    for step, (x, y) in enumerate(batches[:2] if name == "vqgan" else batches):
        index = (module.shuffle(40, 3, 0)[16 * step:16 * step + 16] if step < 2 else
                 torch.cat([module.shuffle(40, 3, 0)[32:], module.shuffle(40, 3, 1)[:8]]))
        assert torch.equal(x, data.train[index]) and torch.equal(y, data.train_labels[index] if name != "vae" else 0 * index)
    for function, args, step in seen:
        x, y = batches[step]
        tensors = [arg for arg in args if torch.is_tensor(arg)]
        images = next(arg for arg in tensors if arg.dim() >= 3)
        if function == "nll":
            autoencoder, _, _ = module.load(out)  # stage 2 leaves it alone
            codes = autoencoder.quantizer(autoencoder.encode(data.train / 127.5 - 1))[1]
            index = torch.cat([module.shuffle(40, 3, 0)[32:], module.shuffle(40, 3, 1)[:8]])
            assert torch.equal(images, codes[index]) and torch.equal(y, data.train_labels[index])
        else:
            found = images if images.dtype == torch.int64 else levels_of(name, images)
            assert torch.equal(found.long(), x.long())
        labels = [arg for arg in tensors if arg.dim() == 1 and arg.dtype == torch.int64]
        assert len(labels) == (name not in ("vae",) and function not in ("loss_autoencoder", "loss_discriminator"))
        assert all(torch.equal(label, y) for label in labels)


def test_what_is_random_in_a_step_depends_on_the_process(module, tmp_path, monkeypatch):
    """From the same weights and images, the first step of two processes is not the same."""
    ends = []
    batch = module.Run.batch

    def of_first_process(run, data):
        rank, run.rank = run.rank, 0
        images = batch(run, data)
        run.rank = rank
        return images

    monkeypatch.setattr(module.Run, "batch", of_first_process)
    more = ["--label-dropout", 0] if module.__name__ == "diffusion" else []
    for rank in ("0", "1", "0"):
        weights = []
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank)
            watch_updates(module, patch, lambda model, w=weights: w.append(copy.deepcopy(model.state_dict())))
            go(module, tmp_path / str(len(ends)), "--steps", 1, *more)
        ends.append(weights)
    assert len(ends[0]) == len(ends[1]) > 0
    assert not differs(dict(enumerate(ends[0])), dict(enumerate(ends[2])))
    assert differs(ends[0][0], ends[1][0])


def test_optimizers_step_at_the_rate_that_is_logged(module, tmp_path):
    """While it still rises, which it does in each stage of vqgan.py, so that none of them keeps the rate that it began with."""
    stages = [("--stage1", 3, "--prior-lr", 0.008)] if module.__name__ == "vqgan" else []
    out = go(module, tmp_path / "run", "--lr", 0.004, "--warmup", 9, "--steps", 6, *itertools.chain(*stages))
    rising = [0.0004 * (step + 1) for step in range(6)]
    want = rising[:3] + [2 * rate for rate in rising[:3]] if stages else rising
    assert [line["lr"] for line in metrics(out)[:-1]] == pytest.approx(want)
    rates = {name: part["param_groups"][0]["lr"] for name, part in load_checkpoint(out).items() if name.startswith("optimizer")}
    last = dict.fromkeys(rates, 0.0012 if stages else 0.0024) | ({"optimizer_prior": 0.0024} if stages else {})
    assert rates and rates == pytest.approx(last)


BETAS = {"optimizer": (0.9, 0.99), "optimizer_prior": (0.9, 0.99), "optimizer_model": (0.5, 0.9)}  # by name in checkpoint.pt
BETAS_D = {"gan": (0.0, 0.99), "vqgan": (0.5, 0.9)}  # of a game no more momentum than this


def test_optimizers_are_adam_with_their_betas(module, trained):
    """Without weight decay; in a game with little or no momentum, in which the other player is soon another one."""
    saved = load_checkpoint(trained(module)[1])
    groups = {name: group for name, part in saved.items() if name.startswith("optimizer") for group in part["param_groups"]}
    games = {"optimizer_d", "optimizer_g"}
    for name, group in groups.items():
        assert tuple(group["betas"]) == (BETAS_D[module.__name__] if name in games else BETAS[name]), name
        assert (group["eps"], group["weight_decay"], group["amsgrad"]) == (1e-8, 0, False)
    assert len(groups) == {"gan": 2, "vqgan": 3}.get(module.__name__, 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_logged_was_minimised(name, tmp_path, monkeypatch):
    """Each line holds the losses of its step, nats and bits agree, and sums with their parts; an image has 64 dimensions."""
    module, seen = importlib.import_module(name), []
    watch_losses(module, monkeypatch, lambda function, args, result: seen.append((function, result)))
    more = {"vae": ["--kl-warmup", 0], "vqgan": ["--stage1", 2]}.get(name, [])
    lines = metrics(go(module, tmp_path / "run", *more))
    step = -1
    for function, result in seen:
        step += function not in ("loss_g", "loss_discriminator")  # which come second in a step
        line = lines[step]
        first = result[0] if isinstance(result, tuple) else result
        value = first.mean().item()
        if function == "loss_d":
            want = {"loss_d": value, **{key: term.mean().item() for key, term in result[1].items()}}
            want["gap"] = line["d_real"] - line["d_fake"]
        elif name == "flow":
            want = {"loss": -value / 64, "bpd": -value / 64 / math.log(2)}
        elif name == "autoregressive":
            want = {"loss": -value / 64, "nats": -value}
        elif function == "nll":
            want = {"loss": value / 16, "bits_per_code": value / 16 / math.log(2)}
        elif function == "loss_autoencoder":
            want = {"loss": value} | {key: term.item() for key, term in result[1].items() if key != "loss_d"}
        elif name == "vae":
            want = {"loss": value / 64, "elbo": -value}
        else:
            want = {"loss_d" if function == "loss_discriminator" else "loss": value}
        assert {key: line[key] for key in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert lines[step + 1]["final"] and {function for function, _ in seen} == set(LOSSES[name])


def test_the_norms_that_are_logged_are_those_of_the_gradients(module, tmp_path, monkeypatch):
    """Of each network that has one in the log, before they are clipped: by autograd from the loss of its step."""
    norms, update = [], module.Run.update

    def wrapped(self, loss, model, *args):
        weights = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        norms.append((type(model).__name__, torch.cat([g.flatten() for g in grads if g is not None]).norm().item()))
        return update(self, loss, model, *args)

    monkeypatch.setattr(module.Run, "update", wrapped)
    lines = metrics(go(module, tmp_path / "run", *(["--stage1", 2] if module.__name__ == "vqgan" else [])))[:-1]
    names = {"Generator": "grad_norm_g", "Discriminator": "grad_norm_d" if module.__name__ == "gan" else None}
    found = {name: [line[name] for line in lines if name in line] for name in ("grad_norm", "grad_norm_g", "grad_norm_d")}
    for name, logged in found.items():
        assert logged == pytest.approx([norm for network, norm in norms if names.get(network, "grad_norm") == name], rel=1e-4)
    assert sum(map(len, found.values())) == (6 if module.__name__ == "gan" else 3)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_each_loss_of_training_has_the_precision_of_amp(amp, module, tmp_path, monkeypatch):
    """In each of the steps, of each network."""
    seen = []
    watch_losses(module, monkeypatch, lambda function, *_: seen.append((function, torch.is_autocast_enabled("cpu"))))
    go(module, tmp_path / "run", "--amp", amp, *(["--stage1", 2] if module.__name__ == "vqgan" else []))
    assert {function for function, _ in seen} == set(LOSSES[module.__name__])
    assert {enabled for _, enabled in seen} == {amp == "bf16"}


# ---- evaluation and samples


def caught(module, function, monkeypatch, out, *more):
    """The arguments of the first call of a function in a run."""
    calls, inside = [], getattr(module, function)

    def wrapped(*args, **kwargs):
        calls.append(args)
        return inside(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, wrapped)
        go(module, out, *more)
    return list(calls[-1])


def with_config(args, module, **fields):
    """The same arguments, with fields of their Config replaced."""
    return [dataclasses.replace(arg, **fields) if isinstance(arg, module.Config) else arg for arg in args]


def training_fields(module, folder):
    """(field, value) of each field of training, by the table. The folder is one that is not there."""
    lines = tiny.getsource(module.Config).splitlines()
    names = [line.split(":")[0].strip() for line in lines[lines.index("    # training") + 1:]]
    end = next(i for i, name in enumerate(names) if name.startswith("#"))
    for name in [name for name in names[:end] if name not in ELSEWHERE]:
        cfg, _ = module.parse_args([*TABLE[module.__name__][name][1].split(), "--out", str(folder)])
        yield name, getattr(cfg, name)


def test_what_is_for_training_changes_no_figure_and_no_sample(module, tmp_path, monkeypatch):
    """evaluate and generate with every such field at another value. That of labels has made another network."""
    for function in ("evaluate", "generate"):
        args = caught(module, function, monkeypatch, tmp_path / function)
        want = getattr(module, function)(*args)
        for name, value in training_fields(module, tmp_path / "new"):
            if name == "labels":
                continue
            found = getattr(module, function)(*with_config(args, module, **{name: value}))
            pairs = zip(want, found, strict=True) if isinstance(want, tuple) else [(want, found)]
            assert not any(differs(a, b) for a, b in pairs), f"{function} depends on {name}"


def test_evaluation_repeats_itself_whatever_was_drawn_before(module, tmp_path, monkeypatch):
    args = caught(module, "evaluate", monkeypatch, tmp_path / "run")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(module.evaluate(*args))
    assert not differs(*found) if module.__name__ == "flow" else found[0] == found[1]


def test_what_evaluation_draws_follows_the_seed(module, tmp_path, monkeypatch):
    """Noise of levels, latents, samples and times; what draws nothing is the same for all seeds."""
    args = caught(module, "evaluate", monkeypatch, tmp_path / "run")
    found = [module.evaluate(*with_config(args, module, seed=seed)) for seed in (3, 4)]
    assert differs(*found) == (module.__name__ not in ("autoregressive", "vqgan"))


def test_figures_are_of_the_test_split_and_of_all_of_it(module, tmp_path, monkeypatch):
    """In batches of 2, the last of which is short, they are those of one batch where no noise enters; other test images give
    others, and so do other labels where there are any."""
    args = caught(module, "evaluate", monkeypatch, tmp_path / "run")
    if module.__name__ == "flow":  # which is handed the images, and gives a figure for each
        model, images, *rest = args
        figures = [module.evaluate(model, x, *rest) for x in (images, 255 - images)]
        assert len(figures[0]) == len(images) and (figures[0] != figures[1]).all()
        return
    at = next(i for i, arg in enumerate(args) if isinstance(arg, module.Data))
    data, want = args[at], module.evaluate(*args)

    def figures(**fields):
        args[at] = data._replace(**fields)
        return module.evaluate(*args)

    assert figures(test=255 - data.test) != want
    labelled = module.__name__ != "vae"
    assert (figures(test_labels=(data.test_labels + 1) % 3) != want) == labelled
    if module.__name__ in ("gan", "autoregressive", "vqgan"):
        if module.__name__ == "gan":  # the noise of samples comes in batches, too
            samples = module.generate(args[0], torch.arange(5) % 3, *args[-2:])
            monkeypatch.setattr(module, "generate", lambda *args: samples)
        monkeypatch.setattr(module, "at_once", lambda *args: 2)
        assert figures() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["vae", "autoregressive"])
def test_the_test_split_is_binarised_once_and_for_all(name, tmp_path, monkeypatch):
    """Not from --seed: with the other draws taken away, evaluation is the same for all seeds, and for no other binarisation."""
    module = importlib.import_module(name)
    args = caught(module, "evaluate", monkeypatch, tmp_path / "run")
    if name == "vae":
        monkeypatch.setattr(module, "draw", lambda mu, logvar, temperature=1.0: mu)
    want = module.evaluate(*args)
    assert all(module.evaluate(*with_config(args, module, seed=seed)) == want for seed in (0, 7))
    to_levels = module.to_levels
    monkeypatch.setattr(module, "to_levels", lambda x, cfg, generator: to_levels(x, cfg, torch.Generator().manual_seed(1)))
    assert module.evaluate(*args) != want


def images_of(result):
    return result[0] if isinstance(result, tuple) else result


def generate_args(module, monkeypatch, out, n, *more):
    """Arguments of generate for n images of a trained network."""
    args = caught(module, "generate", monkeypatch, out, *more)
    if module.__name__ == "gan":
        args[1] = torch.arange(n) % 3
    else:
        args[next(i for i, arg in enumerate(args) if isinstance(arg, int))] = n
    return args


def test_samples_follow_the_seed_and_come_in_batches(module, tmp_path, monkeypatch):
    """7 images in batches of 3 are 7 different ones, the same at each call, and others for another seed; each is made for
    the label that stands beside it."""
    args, told, inside = generate_args(module, monkeypatch, tmp_path / "run", 7), [], module.sample
    monkeypatch.setattr(module, "at_once", lambda *args: 3)

    def watch(*args, **kwargs):
        labels = [arg for arg in args if torch.is_tensor(arg) and arg.dtype == torch.int64 and arg.dim() == 1]
        told.extend(labels)
        return inside(*args, **kwargs)

    monkeypatch.setattr(module, "sample", watch)
    torch.manual_seed(1)
    result = module.generate(*args)
    images = images_of(result)
    assert images.shape == (7, 1, 8, 8) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) > 3
    torch.manual_seed(2)
    assert torch.equal(images_of(module.generate(*args)), images)
    assert not torch.equal(images_of(module.generate(*with_config(args, module, seed=8))), images)
    if module.__name__ != "vae":
        labels = args[1] if module.__name__ == "gan" else result[1]
        assert torch.equal(labels, torch.arange(7) % 3) and torch.equal(torch.cat(told[:3]), labels)
        assert len(told) == 9


@pytest.mark.parametrize("name", ["flow", "autoregressive"])
def test_the_passes_that_are_told_are_the_most_of_a_batch(name, tmp_path, monkeypatch):
    module, used = importlib.import_module(name), iter([4, 9, 2])
    args, inside = generate_args(module, monkeypatch, tmp_path / "run", 7), module.sample
    monkeypatch.setattr(module, "at_once", lambda *args: 3)
    monkeypatch.setattr(module, "sample", lambda *args: (inside(*args)[0], next(used)))
    assert module.generate(*args)[2] == 9


@pytest.mark.parametrize("asked", [{}, {"label": 1, "temperature": 0.5, "guidance": 3}], ids=["default", "flags"])
def test_the_last_grid_of_training_is_that_of_the_samples(asked, module, tmp_path):
    """Made of the averaged network, the noise of --seed and what is asked of samples: as many images of the same checkpoint,
    the same picture."""
    flags = [word for name, value in asked.items() if hasattr(module.Config, name) for word in (f"--{name}", value)]
    out = go(module, tmp_path / "run", "--num-samples", 80, "--save-every", 3, "--ema", 0.5, *flags)
    assert (out / "samples.png").read_bytes() == (out / "samples" / "step_000003.png").read_bytes()


FIGURES = {  # as they are said
    "gan": ["on all 5 test images, at most 1,000: samples have {test_diversity:.0%} of their diversity, in D's features "
            "{test_feature_diversity:.0%}; D scores train images {test_d_train:.2f}, test images {test_d_test:.2f}, samples "
            "{test_d_fake:.2f}; "],
    "autoregressive": ["test nll {test_nats:.3f} nats, {test_bpd:.4f} bits/dim (exact, all 5 test images, ",
                       "This is the mean of p(x | y) over the classes. Given the label it is {test_nats_given_label:.3f} nats"],
    "diffusion": ["test bits/dim {test_bpd:.4f} (upper bound given the label, all 5 test images, 1 time samples each: prior "
                  "{test_prior:.4f} + diffusion {test_diffusion:.4f} + reconstruction {test_reconstruction:.4f})"],
    "vqgan": ["all 5 test images reconstructed: L1 {test_l1:.4f}, PSNR {test_psnr:.1f} dB; train images use {percent:.1f} % of "
              "8 codes, perplexity {perplexity:.1f}; {test_bits_per_code:.3f} bits a code given the label, 16 codes an image"]}


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_said_is_what_was_measured(name, trained):
    """The figures of the last line of metrics.jsonl, each under its name; of vae.py and flow.py in their own files."""
    (before, out), figures = trained(importlib.import_module(name)), {}
    figures = final(out) | {"percent": 100 * final(out).get("usage", 0)}
    lines = before[SAID].splitlines()
    for want in FIGURES[name]:
        assert sum(line.startswith(want.format(**figures)) for line in lines) == 1, (want.format(**figures), lines)


def test_the_pixels_of_an_exact_likelihood_are_told(trained):
    module = importlib.import_module("autoregressive")
    assert "test images, binarised with seed 0)" in trained(module)[0][SAID]
    (before, out), label = trained(module, "--no-labels"), {"test_nats_given_label"}
    assert "the label" not in before[SAID] and not label & final(out).keys() and label < final(trained(module)[1]).keys()
    before, _ = trained(module, "--output", "softmax")
    assert "test images, 8 bits)" in before[SAID] and "(cached: 16 steps for 64 pixels)" in re.sub(" in ", " ", before[SAID])


GRIDS_OF = {"vae": {"reconstructions.png": 80, "interpolations.png": 100}, "gan": {"interpolations.png": 100},
            "autoregressive": {"complete.png": 16 * 6}, "diffusion": {"inpaint.png": 80}, "vqgan": {"reconstructions.png": 80}}


def test_grids_hold_as_many_images_as_they_say(module, tmp_path, monkeypatch):
    """Of 90 samples the first 80; of 50 test images the first 40, of completions 16; each pair begins with its test image."""
    grids, save_grid = {}, module.save_grid
    data = make_data(module, test=50, classes=3)
    monkeypatch.setattr(module, "load_data", lambda *args: data)
    monkeypatch.setattr(module, "save_grid", lambda images, path, *args, **more: grids.update({path.name: images}))
    more = {"autoregressive": "--complete top --output softmax", "diffusion": "--inpaint top", "vae": "--likelihood mixture"}
    go(module, tmp_path / "run", "--num-samples", 90, "--steps", 1, *more.get(module.__name__, "").split())
    assert {name: len(images) for name, images in grids.items()} == {"samples.png": 80} | GRIDS_OF.get(module.__name__, {})
    with np.load(tmp_path / "run" / "samples.npz") as arrays:
        assert np.array_equal(arrays["images"][:80], grids["samples.png"].permute(0, 2, 3, 1)) and len(arrays["images"]) == 90
    for name, each in (("reconstructions.png", 2), ("inpaint.png", 2), ("complete.png", 6)):
        if name in grids:
            given = grids[name][::each, :, :4]  # the upper half, which is also what is given
            assert torch.equal(given, data.test[:len(given), :, :4])
    assert save_grid is not module.save_grid


def test_evaluation_and_sampling_leave_each_other_alone(module, trained, tmp_path):
    """--mode eval adds a line of figures and writes no sample, --mode sample writes samples and adds no line."""
    _, straight = trained(module)
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    lines, kept = len(metrics(out)), ("samples.npz", "samples.png", "checkpoint.pt")
    stamps = [(out / name).stat().st_mtime_ns for name in kept]
    assert tiny.run(module, ["--mode", "eval", "--out", out]) == 0
    assert len(metrics(out)) == lines + 1 and not (out / "sampled").exists()
    assert tiny.run(module, ["--mode", "sample", "--out", out]) == 0
    assert len(metrics(out)) == lines + 1 and {"samples.npz", "samples.png"} <= {p.name for p in (out / "sampled").iterdir()}
    assert stamps == [(out / name).stat().st_mtime_ns for name in kept]


def test_data_is_loaded_as_the_flags_say(module, tmp_path, monkeypatch):
    """--dataset, --data-dir and --image-size."""
    calls, load = [], module.load_data
    monkeypatch.setattr(module, "load_data", lambda *args: calls.append(args) or load(*args))
    go(module, tmp_path / "run", "--dataset", "mnist", "--data-dir", tmp_path, "--image-size", 8)
    assert calls == [("mnist", str(tmp_path), 8)]
