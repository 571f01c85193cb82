"""The scripts compute the same with their kernels as without."""

import pytest
import torch
from harness import DEVICE
from torch.testing import assert_close

import autoregressive
import diffusion
import flow
import gan
import kernels
import vae
import vqgan


@pytest.fixture
def counted(monkeypatch):
    """The operations that ran as Triton kernels since."""
    ran, use_triton = [], kernels.use_triton

    def use(op, *args, **kwargs):
        if use_triton(op, *args, **kwargs):
            ran.append(op)
            return True
        return False

    for file in set(kernels.OPS.values()):
        monkeypatch.setattr(f"kernels.{file}.use_triton", use)
    return ran


def test_diffusion_has_equal_losses_and_gradients(counted):
    cfg = diffusion.choose(diffusion.Config(width=16, n_head=2))
    net = diffusion.UNet(1, 10, 1, cfg).to(DEVICE, memory_format=torch.channels_last)
    for p in net.parameters():  # no branch at zero, so that every gradient says something
        torch.nn.init.normal_(p, std=0.1)
    x, y = torch.rand(2, 1, 8, 7, device=DEVICE) * 2 - 1, torch.tensor([3, 10], device=DEVICE)
    t, eps, results = torch.tensor([0.3, 0.8], dtype=torch.float64, device=DEVICE), torch.randn_like(x), {}
    for kernels.mode in ("torch", "triton"):
        loss = diffusion.loss(net, x, y, cfg, t, eps)
        results[kernels.mode] = [loss, *torch.autograd.grad(loss.mean(), list(net.parameters()))]
        assert set(counted) == ({"group_norm_silu", "attention"} if kernels.mode == "triton" else set())
    for name, a, b in zip(["loss", *(n for n, _ in net.named_parameters())], results["torch"], results["triton"], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}")


def test_diffusion_from_the_command_line(counted, tmp_path, monkeypatch):
    """--kernels torch and --kernels triton: the same run, to rounding."""
    weights = []
    for mode in ("torch", "triton"):
        flags = f"--width 16 --n-head 2 --batch-size 2 --steps 2 --mode train --kernels {mode} --out {tmp_path / mode}"
        monkeypatch.setattr(diffusion, "evaluate", lambda *args: dict.fromkeys(
            ("test_bpd", "test_prior", "test_diffusion", "test_reconstruction"), 0.0))
        monkeypatch.setattr(diffusion, "generate", lambda *args: (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1)))
        diffusion.main(flags.split())
        weights.append(torch.load(tmp_path / mode / "checkpoint.pt", weights_only=True)["model"])
    assert set(counted) == {"group_norm_silu", "attention"}
    for name in weights[0]:
        assert_close(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-4)


def in_order(value):
    """A name for a set that is the same in every process."""
    return str(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize("fields, ran", [
    ({"arch": "pixelcnn", "output": "mixture"}, {"masked_conv2d", "gated_masked_conv2d", "logistic_mixture"}),
    ({"arch": "transformer", "output": "softmax"}, {"attention"})], ids=in_order)
def test_autoregressive_has_equal_likelihoods_and_gradients(fields, ran, counted):
    cfg = autoregressive.Config(dropout=0.0, width=16, blocks=1, n_head=1, patch=1, mixtures=2, **fields)
    net = autoregressive.Autoregressive(1, 4, 5, 3, cfg).to(DEVICE)
    x, y, results = torch.randint(0, net.levels, (2, 1, 4, 5), device=DEVICE), torch.tensor([0, 2], device=DEVICE), {}
    for kernels.mode in ("torch", "triton"):
        nats = autoregressive.log_likelihood(net, x, y, cfg)
        parameters = [p for p in net.parameters() if p.requires_grad]
        results[kernels.mode] = [nats, *torch.autograd.grad(nats.mean(), parameters, allow_unused=True)]
    assert set(counted) == ran
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


def test_cached_sampling_attends_with_the_kernel(counted):
    cfg = autoregressive.Config(arch="transformer", output="bernoulli", dropout=0.0, width=16, blocks=1, n_head=1, patch=1)
    net = autoregressive.Autoregressive(1, 2, 3, 3, cfg).to(DEVICE).eval()
    y, noise, drawn = torch.tensor([0, 2], device=DEVICE), torch.rand(2, 1, 2, 3, device=DEVICE), []
    for kernels.mode in ("torch", "triton"):
        drawn.append(autoregressive.sample(net, y, noise, cfg)[0])
    assert set(counted) == {"decode_attention"} and torch.equal(*drawn)


def test_vae_has_equal_bounds_and_gradients(counted):
    cfg = vae.Config(prior="flow", likelihood="mixture", width=8, blocks=1, patch=2, z_dim=4, flow_hidden=16, flow_steps=2,
                     mixtures=2)
    torch.manual_seed(0)
    model = vae.VAE(1, 6, 6, cfg).to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, results = torch.randint(0, 256, (3, 1, 6, 6), device=DEVICE), {}
    for kernels.mode in ("torch", "triton"):
        torch.manual_seed(1)
        log_px, kls = vae.elbo_terms(model, x, cfg)
        grads = torch.autograd.grad((log_px - kls.sum(0)).mean(), list(model.parameters()), allow_unused=True)
        results[kernels.mode] = [log_px, kls, *(g for g in grads if g is not None)]
    assert set(counted) == {"affine_coupling", "logistic_mixture"}
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("fields, ran", [
    ({"arch": "glow", "coupling": "affine", "dequantize": "variational"}, {"affine_coupling"}),
    ({"arch": "glow"}, {"affine_coupling", "spline_coupling"}),
    ({"arch": "tarflow", "coupling": "affine", "n_head": 1, "layers": 1}, {"affine_coupling", "attention"}),
    ({"arch": "tarflow", "n_head": 1, "layers": 1}, {"spline_coupling", "attention"})], ids=in_order)
def test_flow_has_equal_densities_and_gradients(fields, ran, counted):
    cfg = flow.choose(flow.Config(width=16, blocks=1, steps_per_scale=1, **fields), 4, 4)
    torch.manual_seed(0)
    model = flow.Flow(1, 4, 4, 3, cfg).to(DEVICE)
    for name, p in model.named_parameters():
        if not name.endswith((".L", ".U")):
            torch.nn.init.normal_(p, std=0.1)
    x, y, results = torch.randint(0, 256, (3, 1, 4, 4), device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE), {}
    for kernels.mode in ("torch", "triton"):
        torch.manual_seed(1)
        density = flow.log_likelihood(model, *flow.dequantize(model, x), y)
        grads = torch.autograd.grad(density.mean(), list(model.parameters()), allow_unused=True)
        results[kernels.mode] = [density, *(g for g in grads if g is not None)]
    assert set(counted) == ran
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


def test_gan_has_equal_losses_and_gradients(counted):
    """Those of D through the penalties too, which differentiate bias_act twice."""
    cfg = gan.choose(gan.Config(width=8, z_dim=4, r1=0.3, r2=0.2), 8, 8)
    torch.manual_seed(0)
    G, D = (net(1, 8, 8, 3, cfg).to(DEVICE) for net in (gan.Generator, gan.Discriminator))
    real, y, results = torch.rand(2, 1, 8, 8, device=DEVICE) * 2 - 1, torch.tensor([0, 2], device=DEVICE), {}
    z = torch.randn(2, 4, device=DEVICE)
    for kernels.mode in ("torch", "triton"):
        losses = gan.loss_d(G, D, real, y, z, 5, cfg)[0].mean(), gan.loss_g(G, D, real, y, z, cfg).mean()
        results[kernels.mode] = [*losses, *(g for loss, net in zip(losses, (D, G), strict=True)
                                            for g in torch.autograd.grad(loss, list(net.parameters())))]
    assert set(counted) == {"bias_act"}
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("quantizer, ran", [
    ("vq", {"nearest_code"}), ("simvq", {"nearest_code"}), ("fsq", set())])
def test_vqgan_has_equal_losses_and_gradients(quantizer, ran, counted):
    cfg = vqgan.choose(vqgan.Config(quantizer=quantizer, width=16, n_codes=16, code_dim=4, disc_start=0), 8, 8)
    torch.manual_seed(0)
    D, x, results = vqgan.Discriminator(1).to(DEVICE), torch.rand(2, 1, 8, 8, device=DEVICE) * 2 - 1, {}
    for kernels.mode in ("torch", "triton"):
        torch.manual_seed(1)
        model = vqgan.Autoencoder(1, cfg).to(DEVICE, memory_format=torch.channels_last)
        for p in [*model.encoder.parameters(), *model.decoder.parameters()]:
            torch.nn.init.normal_(p, std=0.1)
        loss = vqgan.loss_autoencoder(model, D, x, 0, cfg)[0]
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results[kernels.mode] = [loss, *grads, *model.buffers()]
    assert set(counted) - {"group_norm_silu", "attention"} == ran and "group_norm_silu" in counted
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1))


def test_the_prior_of_vqgan_attends_with_the_kernels(counted):
    cfg = vqgan.Config(n_codes=7, prior_width=16, prior_blocks=1, n_head=1)
    torch.manual_seed(0)
    prior, y = vqgan.Prior(2, 3, 3, cfg).to(DEVICE).eval(), torch.tensor([0, 2], device=DEVICE)
    codes, noise, results = torch.arange(12, device=DEVICE).view(2, 2, 3) % 7, torch.rand(2, 2, 3, device=DEVICE), {}
    for kernels.mode in ("torch", "triton"):
        results[kernels.mode] = vqgan.nll(prior, codes, y), vqgan.sample(prior, y, noise, cfg)
    assert set(counted) == {"attention", "decode_attention"}
    assert_close(results["torch"][0], results["triton"][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results["torch"][1], results["triton"][1])


def test_what_a_kernel_does_not_take_is_one_line(tmp_path, capsys):
    """Heads of 8 channels in --kernels triton: the operation and the reason, exit code 2."""
    flags = f"--width 8 --n-head 2 --batch-size 2 --steps 1 --kernels triton --out {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stop:
        diffusion.launch(lambda: diffusion.main(flags.split()))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert "error: --kernels: attention: " in line and "head_dim 8" in line
