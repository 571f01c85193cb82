"""The averaged weights, which are evaluated and sampled, are usable after 300 steps: not noise of the first steps."""

import importlib
import shutil

import numpy as np
import pytest
import torch

import tiny

STEPS = 300
FLAGS = "--steps 300 --batch-size 16 --log-every 300 --save-every 1000 --eval-images 100 --seed 0"
SMALL = {
    "vae": "--width 16 --z-dim 8 --kl-warmup 100 --iw-samples 1",
    "flow": "--width 16 --blocks 2 --layers 1 --coupling affine",
    "gan": "--width 8 --z-dim 16 --num-samples 500",
    "autoregressive": "--width 16 --blocks 1 --dropout 0",
    "diffusion": "--width 8 --elbo-samples 2",
    "vqgan": "--width 8 --n-codes 32 --code-dim 4 --prior-width 16 --prior-blocks 1 --n-head 2 --disc-start 100 "
             "--stage1 300 --steps 600",
}
CASES = [("vae", "model", "test_neg_elbo", 1.1), ("flow", "model", "test_bpd", 1.1), ("gan", "generator", "distance", 1.5),
         ("autoregressive", "model", "test_nats", 1.1), ("diffusion", "model", "test_bpd", 1.1),
         ("vqgan", "model", "test_l1", 1.1), ("vqgan", "prior", "test_bits_per_code", 1.1)]


def distance(samples):
    """The Frechet distance of samples.npz, which is what tools/evaluate.py prints."""
    evaluate = tiny.load_tool("evaluate")
    classifier = evaluate.load_classifier("digits")
    with np.load(samples) as arrays:
        return evaluate.distance_to_train(evaluate.features(arrays["images"], classifier), classifier)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name): the folder of a run of 300 steps of digits, for each stage; made once, not to be changed."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            argv = [*FLAGS.split(), "--num-samples", 1, *SMALL[name].split(), "--device", "cpu", "--out", made[name]]
            with tiny.handlers_kept():
                assert tiny.run(importlib.import_module(name), argv) == 0
        return made[name]

    return run


@pytest.mark.parametrize("name, network, figure, factor", CASES)
def test_averages_are_usable_after_300_steps(name, network, figure, factor, trained, tmp_path):
    """Their test figure, which the run ends with, is at most `factor` times that of the weights as they are: with these in
    the place of the averaged ones, the same checkpoint is evaluated again."""
    module = importlib.import_module(name)
    saved = tiny.load_checkpoint(trained(name))

    def figure_of(folder, samples):
        return distance(folder / samples) if name == "gan" else tiny.metrics(folder)[-1][figure]

    averaged = figure_of(trained(name), "samples.npz")
    shutil.copytree(trained(name), tmp_path / "raw")
    torch.save(saved | {f"ema_{network}": saved[network]}, tmp_path / "raw" / "checkpoint.pt")
    with tiny.handlers_kept():
        assert tiny.run(module, ["--mode", "sample" if name == "gan" else "eval", "--out", tmp_path / "raw"]) == 0
    raw = figure_of(tmp_path / "raw", "sampled/samples.npz")
    print(f"{name} {network}: {figure} {averaged:.4f} averaged, {raw:.4f} raw, {averaged / raw:.3f}")
    assert averaged <= factor * raw
