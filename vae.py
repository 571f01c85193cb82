"""Variational autoencoders: p(x) = int p(x | z) p(z) dz, trained by a lower bound on log p(x).

A decoder p(x | z) makes an image of a latent z, an encoder q(z | x) proposes the z of an image. The
bound is what the decoder explains, less the nats by which q departs from the prior p(z).
The weakness: Gaussians are chosen for p(z) and q(z | x) because they are convenient, and they are
too simple. The codes of the data do not fill a Gaussian, and the true posterior is not one. Both
cost likelihood. The remedies shown here, all on one bound: a prior that is learned (a normalizing
flow, or a mixture of posteriors: VampPrior), a posterior that is bent by an inverse autoregressive
flow, and a Markov chain of latents, each the prior of the next: p(z_L) prod p(z_l | z_l+1).
diffusion.py is the limit of that chain: ever more levels, each of the size of x, and q no longer
learned but fixed to add Gaussian noise. The KL of every level is then a squared error.

Papers: VAE (Kingma and Welling 2014), IWAE (Burda 2016), ladder VAE (Sonderby 2016), IAF and free
bits (Kingma 2016), RealNVP (Dinh 2017), gradient of log q (Roeder 2017), VampPrior (Tomczak and
Welling 2018), NVAE (Vahdat 2020).
  evidence lower bound ............. infer, elbo_terms       VAE eq. 3
  chain of latents, from the top ... infer, Level            ladder VAE eqs. 1 to 3, NVAE sec. 3.2
  importance-weighted bound ........ log_weights, iw_bound   IWAE eq. 8
  flow prior, VampPrior ............ log_prior, Coupling     RealNVP eqs. 3 to 5, VampPrior eq. 9
  inverse autoregressive flow ...... IAFStep                 IAF eqs. 9 to 15

  python vae.py                                              # digits, on any machine
  python vae.py --dataset mnist --minutes 10                 # MNIST on two CPU cores
  python vae.py --dataset mnist --minutes 10 --prior flow    # log p(x): -82.4 nats
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.coupling import affine_coupling
except ImportError:
    def affine_coupling(x, params, split, reverse=False, s_max=2.0):
        raw, shift = params.to(x.dtype).chunk(2, 1)
        kept, moved = x.tensor_split((split,), 1)
        log_s = s_max * torch.tanh(raw / s_max)  # within (-2, 2): both directions stay finite
        moved = (moved - shift) * torch.exp(-log_s) if reverse else moved * torch.exp(log_s) + shift
        return torch.cat([kept, moved], 1), (-log_s if reverse else log_s).sum(1)

try:
    from kernels.logistic_mixture import logistic_mixture
except ImportError:
    def logistic_mixture(x, params):
        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)  # (B,M,H,W)
        x = x / 127.5 - 1
        inv_s = torch.exp(-log_scales.clamp(min=-7))
        upper = torch.where(x > 0.999, math.inf, (x - means + 1 / 255) * inv_s)  # the last bins are open
        lower = torch.where(x < -0.999, -math.inf, (x - means - 1 / 255) * inv_s)
        log_p = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        return torch.logsumexp(log_p + torch.log_softmax(logits, 1), 1)


@dataclass
class Config:
    # model
    levels: int = 1  # latents in the Markov chain: the top one a vector, those below it maps (1 to 100)
    prior: Literal["gaussian", "flow", "vamp"] = "gaussian"  # p(z_L), the prior of the top latent
    posterior: Literal["gaussian", "iaf"] = "gaussian"  # q(z_L | x), the posterior of the top latent
    z_dim: int = 40  # dimensions of the top latent (1 to 65536)
    z_channels: int = 4  # channels of the latents below it (1 to 4096)
    flow_steps: int = 4  # couplings of the flow prior, and steps of IAF (1 to 1000)
    flow_hidden: int = 128  # hidden units of each of those couplings and steps (1 to 16384)
    pseudo_inputs: int = 100  # learned images whose posteriors make the VampPrior (1 to 65536)
    likelihood: Literal["auto", "bernoulli", "mixture"] = "auto"  # 1-bit or 8-bit pixels; auto: 1-bit for digits, mnist
    mixtures: int = 5  # logistics for each 8-bit pixel (1 to 1000)
    patch: int | None = None  # pixels a side that make one position, by default 4, below 16 pixels a side 2 (1 to 1024)
    width: int = 32  # channels of encoder and decoder (1 to 16384)
    blocks: int | None = None  # residual blocks a level, up and down, by default 1, in a chain 2 (1 to 100)
    # training
    beta: float = 1.0  # weight of the KL (0 to 1000000)
    kl_warmup: int = 1000  # steps in which that weight rises from 0 to --beta (>= 0)
    free_nats: float = 0.0  # nats of KL a level that cost nothing, the free bits of the IAF paper (0 to 1000000)
    optimizer: Literal["muon", "adam"] = "muon"  # of the matrices inside the network; all else moves by Adam
    warmup: int = 100  # steps in which the learning rate rises from 0 to --lr (>= 0)
    decay: int = 2000  # step from which on the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling, free to change on a trained model
    iw_samples: int = 100  # importance samples an image; the bound is given for 1, 10, 100 ... of them (1 to 1000000)
    temperature: float = 1.0  # factor on the standard deviation of latents that are sampled (> 0 to 1000)
    # core, the same in all six scripts
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (0 to 4096)
    batch_size: int = 100  # images a step, over all processes (1 to 65536)
    lr: float = 2e-3  # learning rate (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    ema: float = 0.15  # share of the run so far over which the weights are averaged, not a decay rate (> 0 to 0.5)
    init: str | None = None  # start from the weights of the run in this folder, of the same script and network
    # core, free to change on a trained model
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    eval_images: int = 0  # evaluate on the first so many test images, 0: on all (>= 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)


# ---- the bound. What it asks of the network: x goes up on the left, the latents come down on the right.
#
#   e = model.encode(x)               z_L      prior: log_prior(model, z_L)   posterior: model.top(e_L)
#   e_L, a vector for z_L              |       h = model.down[L - 1](z_L)
#   e_L-1, a map for z_L-1            z_L-1    prior: level.prior(h)          posterior: level.posterior(h, e_L-1, ...)
#    :                                 :
#   e_1, a map for z_1                z_1      model.decode(z_1) gives the parameters of p(x | z_1)
#
# These lists start at the bottom: item l - 1 of e, model.down and model.lower_levels belongs to z_l. Draws, and the KLs
# of the levels, start at the top, in the order in which they are made.


def draw(mu, logvar, temperature=1.0):
    return mu + temperature * torch.exp(logvar / 2) * torch.randn_like(mu)


def log_normal(z, mu, logvar, start=1):
    """log N(z; mu, exp(logvar)), summed over the dimensions from `start` on."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar)).flatten(start).sum(start)


def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(q || p) of diagonal Gaussians, summed over all dimensions but the batch."""
    ratio = torch.exp(logvar_q - logvar_p) + (mu_q - mu_p) ** 2 * torch.exp(-logvar_p)
    return 0.5 * (ratio - 1 - (logvar_q - logvar_p)).flatten(1).sum(1)  # VAE appendix B, for any Gaussian prior


def log_prob(params, x, likelihood):
    """log p(x | z_1), pixels independent. params (B,C,K,H,W), x (B,C,H,W) in {0,1} or {0..255} -> (B,)."""
    if likelihood == "mixture":
        log_p = logistic_mixture(x.flatten(0, 1)[:, None].float(), params.flatten(0, 1))  # PixelCNN++ eq. 2
        return log_p.unflatten(0, x.shape[:2]).sum((1, 2, 3))
    return F.logsigmoid((2 * x - 1) * params[:, :, 0]).sum((1, 2, 3))


def pixel_mean(params, likelihood):
    """E[x | z_1], (B,C,H,W) scaled to [-1,1]."""
    if likelihood == "mixture":
        logits, means, log_scales = params.unflatten(2, (3, -1)).unbind(2)
        s = torch.exp(log_scales.clamp(min=-7))
        # A logistic X clipped to [-1,1] has the mean -1 + int_-1^1 P(X > t) dt; P(X > t) = sigmoid((mean - t) / s).
        clipped = s * (F.softplus((means + 1) / s) - F.softplus((means - 1) / s)) - 1
        return (torch.softmax(logits, 2) * clipped).sum(2)
    return 2 * torch.sigmoid(params[:, :, 0]) - 1


class Draw(NamedTuple):
    """One level of the chain, drawn from its posterior."""
    z: torch.Tensor
    shift: torch.Tensor  # where x moves the mean, to count active units: (mu_q - mu_p) / sigma_p; at the top mu, before IAF
    log_q: torch.Tensor  # log q(z_l | z_l+1, x), (B,); for training with k = 1 only: draw_top leaves out a part of its gradient
    log_p: torch.Tensor  # log p(z_l | z_l+1), (B,)
    kl: torch.Tensor  # KL(q || p), (B,), in closed form where both are Gaussian, else log q - log p at this z


def draw_top(model, e):
    """z_L ~ q(z_L | x), a Gaussian that IAF may bend. e is e_L."""
    mu, logvar, context = model.top(e)
    z = draw(mu, logvar)
    log_q = log_normal(z, mu.detach(), logvar.detach())  # without the part of the gradient that is 0 on average (Roeder 2017)
    for step in model.iaf:
        z, log_det = step(z, context)
        log_q = log_q - log_det  # change of variables
    log_p = log_prior(model, z)
    kl = log_q - log_p  # an estimate, by this z
    if model.pseudo is None and not model.flow and not model.iaf:  # q is Gaussian, and p is N(0, 1)
        kl = gaussian_kl(mu, logvar, torch.zeros_like(mu), torch.zeros_like(mu))
    return Draw(z, mu, log_q, log_p, kl)


def infer(model, e):
    """All latents, drawn down the chain given e = model.encode(x) -> parameters of p(x | z_1), and a Draw a level."""
    draws = [draw_top(model, e[-1])]
    z = draws[0].z
    for level in range(len(e) - 1, 0, -1):  # z_l ~ q(z_l | z_l+1, x)
        h = model.down[level](z)  # the one for z_l+1
        mu_p, logvar_p = model.lower_levels[level - 1].prior(h)
        mu_q, logvar_q, shift = model.lower_levels[level - 1].posterior(h, e[level - 1], mu_p, logvar_p)
        z = draw(mu_q, logvar_q)
        kl = gaussian_kl(mu_q, logvar_q, mu_p, logvar_p)
        draws.append(Draw(z, shift, log_normal(z, mu_q, logvar_q), log_normal(z, mu_p, logvar_p), kl))
    return model.decode(z), draws


def scale(model, x):
    """x in {0,1} or {0..255}, as the likelihood has it -> [-1,1], what the network sees."""
    return 2 * x.to(model.stem.weight.dtype, memory_format=torch.channels_last) / model.max_level - 1


def elbo_terms(model, x, cfg):
    """log p(x | z_1) (B,), and the KL of each level (L,B). VAE eq. 3: the bound is the first less the others."""
    params, draws = infer(model, model.encode(scale(model, x)))
    return log_prob(params, x, cfg.likelihood), torch.stack([d.kl for d in draws])


def loss(model, x, cfg, kl_weight=1.0):
    """What is minimised: -ELBO, with the KLs weighted and with free bits, in nats an image. Then the ELBO's terms."""
    log_px, kls = elbo_terms(model, x, cfg)
    kl = kls.mean(1)  # (L,)
    if cfg.free_nats > 0:
        kl = kl.clamp(min=cfg.free_nats)  # free bits (IAF paper), of each level's mean over the batch
    return kl_weight * kl.sum() - log_px.mean(), log_px, kls


def log_weights(model, x, k, cfg, e=None):
    """k draws of log p(x, z) - log q(z | x), (B,k). e is model.encode(scale(model, x)), where that is known already."""
    e = model.encode(scale(model, x)) if e is None else e
    params, draws = infer(model, [e_l.repeat_interleave(k, 0) for e_l in e])
    log_w = log_prob(params, x.repeat_interleave(k, 0), cfg.likelihood) + sum(d.log_p - d.log_q for d in draws)
    return log_w.view(len(x), k)


def iw_bound(log_w, k):
    """The bound of k importance samples on log p(x), a mean over all groups of k. log_w (B,n) -> (B,)."""
    groups = log_w[:, :log_w.shape[1] // k * k].unflatten(1, (-1, k))
    return (torch.logsumexp(groups, 2) - math.log(k)).mean(1)  # IWAE eq. 8


def descend(model, z, temperature=1.0):
    """From z_L down the chain, each z_l drawn from its prior -> parameters of p(x | z_1)."""
    for level in range(len(model.lower_levels), 0, -1):  # z_l ~ p(z_l | z_l+1)
        h = model.down[level](z)
        mu, logvar = model.lower_levels[level - 1].prior(h)
        z = draw(mu, logvar, temperature)
    return model.decode(z)


def sample(model, n, cfg):
    """n images (n,C,H,W) in [-1,1]: the latents are drawn from the prior, the pixels are the means of p(x | z_1)."""
    z = sample_prior(model, n, cfg.temperature)
    return pixel_mean(descend(model, z, cfg.temperature), cfg.likelihood)


# ---- the remedies at the top of the chain: a learned prior p(z_L), a posterior q(z_L | x) bent by IAF

def log_prior(model, z):
    """log p(z_L). z (B,z_dim) -> (B,)."""
    if model.pseudo is not None:  # VampPrior eq. 9, a mixture of Gaussians
        mu, logvar = vamp_components(model)
        log_p = log_normal(z[:, None], mu, logvar, start=2)  # (B,pseudo_inputs)
        return torch.logsumexp(log_p, 1) - math.log(len(mu))
    total = 0
    for step in model.flow:  # from z to noise u, RealNVP eq. 3: log p(z) = log N(u; 0, 1) + log |det du/dz|
        z, log_det = step(z)
        total = total + log_det
    return total + log_normal(z, torch.zeros_like(z), torch.zeros_like(z))


def sample_prior(model, n, temperature=1.0):
    """n draws of z_L, (n,z_dim)."""
    if model.pseudo is not None:
        mu, logvar = vamp_components(model)
        pick = torch.randint(len(mu), (n,), device=mu.device)
        return draw(mu[pick], logvar[pick], temperature)
    z = temperature * torch.randn(n, model.z_dim, device=model.stem.weight.device)
    for step in reversed(model.flow):
        z = step.inverse(z)
    return z


def vamp_components(model):
    """mu, logvar (pseudo_inputs,z_dim) of the VampPrior: the posteriors, before IAF, of images in [0,1] that are learned."""
    mu, logvar, _ = model.top(model.encode(2 * model.pseudo.clamp(0, 1) - 1)[-1])
    return mu, logvar


class Coupling(nn.Module):
    """One step of the flow prior, from z towards noise: z (B,D) -> (B,D) and log |det|, (B,). Half of z stays."""

    def __init__(self, D, hidden):
        super().__init__()
        self.split = D // 2
        self.net = nn.Sequential(nn.Linear(self.split, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 zero(nn.Linear(hidden, 2 * (D - self.split))))

    def forward(self, z):
        z = z.flip(1)  # so that each step changes what the last one kept
        return affine_coupling(z, self.net(z[:, :self.split]), self.split)

    def inverse(self, u):
        z, _ = affine_coupling(u, self.net(u[:, :self.split]), self.split, reverse=True)
        return z.flip(1)


class IAFStep(nn.Module):
    """z' = sigma z + (1 - sigma) m, where m_i and sigma_i see the z before place i, and the context of the encoder."""

    def __init__(self, D, hidden, context_dim):
        super().__init__()
        self.first = nn.Linear(D, hidden)
        self.context = nn.Linear(context_dim, hidden, bias=False)
        self.out = nn.Linear(hidden, 2 * D)
        # Masks as in MADE, places counted from 0: a hidden unit of degree m sees the places up to m, output i sees the
        # units of degrees below i. Units of degree -1 see the context alone: they are all that output 0 sees.
        place = torch.arange(D)
        degree = torch.arange(hidden) % D - 1
        self.register_buffer("mask_in", (degree[:, None] >= place).float(), persistent=False)
        self.register_buffer("mask_out", (place[:, None] > degree).float().repeat(2, 1), persistent=False)

    def forward(self, z, context):
        """z (B,D) -> (B,D) and log |det|, (B,)."""
        z = z.flip(1)  # so that what came last, and saw all others, comes first
        h = F.elu(F.linear(z, self.first.weight * self.mask_in, self.first.bias) + self.context(context))
        m, s = F.linear(h, self.out.weight * self.mask_out, self.out.bias).to(z.dtype).chunk(2, 1)
        log_sigma = F.logsigmoid(s + 2)  # a bias as for a forget gate: sigma begins at about 0.88, near the identity
        return m + torch.exp(log_sigma) * (z - m), log_sigma.sum(1)


# ---- the networks

def zero(module):
    """Start a residual branch, a correction or a coupling at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def bounded(logvar):
    """Within (-6, 6), so that no exp overflows: a standard deviation, or the factor on one, from 0.05 to 20."""
    return 6 * torch.tanh(logvar / 6)


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Spread(nn.Linear):
    """A vector to a map: z (B,z_dim) -> (B,width,H',W')."""

    def __init__(self, z_dim, width, rows, columns):
        super().__init__(z_dim, rows * columns * width)
        self.shape = rows, columns, width

    def forward(self, z):
        return super().forward(z).unflatten(1, self.shape).permute(0, 3, 1, 2)


class Level(nn.Module):
    """p(z_l | z_l+1) and q(z_l | z_l+1, x), Gaussian maps. The posterior corrects the prior: zero means no news.

    h (B,width,H',W') is what the decoder makes of z_l+1, e (B,width,H',W') what the encoder makes of x for this level.
    Whatever --amp is, mu and logvar are as precise as the weights, as all log-likelihoods are made of them.
    """

    def __init__(self, width, z_channels):
        super().__init__()
        self.p = nn.Conv2d(width, 2 * z_channels, 1)
        self.q = zero(nn.Conv2d(2 * width, 2 * z_channels, 1))

    def prior(self, h):
        """mu, logvar (B,z_channels,H',W')."""
        mu, logvar = self.p(h).to(self.p.weight.dtype).chunk(2, 1)
        return mu, bounded(logvar)

    def posterior(self, h, e, mu_p, logvar_p):
        """mu and logvar, from those of the prior, and the shift of mu in standard deviations of the prior."""
        shift, d_logvar = self.q(torch.cat([h, e], 1)).to(self.q.weight.dtype).chunk(2, 1)
        mu_q = mu_p + torch.exp(logvar_p / 2) * shift  # NVAE sec. 3.2, with its shift in units of sigma_p
        logvar_q = logvar_p + bounded(d_logvar)
        return mu_q, logvar_q, shift


class VAE(nn.Module):
    """The networks of the chain x, z_1 ... z_L: x (B,C,H,W), z_L (B,z_dim), the others (B,z_channels,H',W')."""

    def __init__(self, channels, H, W, cfg):
        super().__init__()
        width = cfg.width
        grid = math.ceil(H / cfg.patch), math.ceil(W / cfg.patch)  # H', W'
        self.patch = cfg.patch
        self.size = H, W
        self.z_dim = cfg.z_dim
        binary = cfg.likelihood == "bernoulli"
        self.max_level = 1 if binary else 255  # the value of a white pixel
        self.K = 1 if binary else 3 * cfg.mixtures  # parameters of a pixel: a logit, or logits, means and log-scales
        context_dim = cfg.flow_hidden if cfg.posterior == "iaf" else 0

        def blocks():
            return [ResBlock(width) for _ in range(cfg.blocks)]
        self.stem = nn.Conv2d(channels * cfg.patch**2, width, 1)
        self.up = nn.ModuleList(nn.Sequential(*blocks()) for _ in range(cfg.levels))  # to e_1, to e_2 ...
        self.to_top = nn.Linear(width * math.prod(grid), 2 * cfg.z_dim + context_dim)
        entries = [nn.Conv2d(cfg.z_channels, width, 1) for _ in range(cfg.levels - 1)]
        entries.append(Spread(cfg.z_dim, width, *grid))
        self.down = nn.ModuleList(nn.Sequential(entry, *blocks(), nn.ReLU()) for entry in entries)  # for z_1 ... z_L
        self.lower_levels = nn.ModuleList(Level(width, cfg.z_channels) for _ in range(cfg.levels - 1))  # z_1 ... z_L-1
        self.out = nn.Conv2d(width, channels * self.K * cfg.patch**2, 1)
        steps = range(cfg.flow_steps)
        self.flow = nn.ModuleList(Coupling(cfg.z_dim, cfg.flow_hidden) for _ in steps if cfg.prior == "flow")
        self.iaf = nn.ModuleList(IAFStep(cfg.z_dim, cfg.flow_hidden, context_dim) for _ in steps if context_dim)
        self.pseudo = nn.Parameter(torch.rand(cfg.pseudo_inputs, channels, H, W)) if cfg.prior == "vamp" else None

    def encode(self, x):
        """x (B,C,H,W) in [-1,1] -> e_1 ... e_L, what posteriors are told of x: maps (B,width,H',W'), last a vector."""
        H, W = self.size
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))  # mid-grey, to whole patches
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        e = []
        for blocks in self.up:
            h = blocks(h)
            e.append(h)
        e[-1] = self.to_top(F.relu(h).permute(0, 2, 3, 1).flatten(1))
        return e

    def top(self, e):
        """mu, logvar (B,z_dim) of q(z_L | x), and the context (B,flow_hidden) for IAF, (B,0) without. e is e_L."""
        mu, logvar, context = e.to(self.stem.weight.dtype).tensor_split((self.z_dim, 2 * self.z_dim), 1)
        return mu, bounded(logvar), context

    def decode(self, z):
        """z_1 -> parameters of p(x | z_1), (B,C,K,H,W)."""
        H, W = self.size
        params = self.out(self.down[0](z)).to(self.out.weight.dtype)
        return F.pixel_shuffle(params, self.patch)[..., :H, :W].unflatten(1, (-1, self.K))


# ---- the loops

def choose(cfg, H, W):
    """cfg, with what the data set, the size of its images and the number of levels decide where nothing was said."""
    if cfg.prior == "flow" and cfg.z_dim < 2:
        fail(f"--z-dim {cfg.z_dim}: a flow prior needs at least 2")
    if cfg.likelihood == "auto":
        cfg.likelihood = "bernoulli" if cfg.dataset in ("digits", "mnist") else "mixture"
    cfg.patch = cfg.patch or (2 if min(H, W) < 16 else 4)
    cfg.blocks = cfg.blocks or (2 if cfg.levels > 1 else 1)
    return cfg


def to_levels(x, cfg, generator=None):
    """x uint8 in {0..255} -> what is modelled, int64: x itself, or a draw of {0,1} with probability x / 255."""
    if cfg.likelihood == "mixture":
        return x.long()
    return (torch.rand(x.shape, generator=generator).to(x.device) * 255 < x).long()


def train(data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    model = build(run.shape, cfg).to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    inside = [model.up, model.to_top, model.down, model.flow, model.iaf] if cfg.optimizer == "muon" else []
    optimizer = Muon(model, inside, cfg.lr, (0.9, 0.99))
    objective = torch.compile(loss) if cfg.compile else loss
    parts = {"model": model, "ema_model": ema, "optimizer": optimizer}
    for step in run.steps(parts, lambda: generate(ema, 80, cfg, run)):
        x, _ = run.batch(data)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        optimizer.param_groups[0]["lr"] = lr
        kl_weight = cfg.beta * min(1, (step + 1) / (cfg.kl_warmup + 1))
        with run.autocast():
            nats, log_px, kls = objective(model, to_levels(x, cfg), cfg, kl_weight)
        nats_per_dim = nats / x[0].numel()
        norm = run.update(nats_per_dim, model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        named = {f"kl_{level}": kl for level, kl in zip(range(cfg.levels, 0, -1), kls.mean(1), strict=True)}
        run.log(loss=nats_per_dim, elbo=log_px.mean() - kls.mean(1).sum(), **named, grad_norm=norm, lr=lr)


@torch.no_grad()
def evaluate(model, data, cfg, run):
    """Bounds on -log p(x) over the test split, in nats; KL and active units of each level."""
    torch.manual_seed(cfg.seed)
    test = to_levels(data.test, cfg, torch.Generator().manual_seed(0))
    levels = range(cfg.levels, 0, -1)  # from the top down, as Draws are
    sums = {}
    shifts = {level: [] for level in levels}
    size = min(cfg.iw_samples, 4)  # importance samples at once, few enough to stay in the cache
    for x in progress(test.split(at_once(run.shape)), "evaluation"):
        x = x.to(run.device)
        e = model.encode(scale(model, x))
        params, draws = infer(model, e)
        log_px = log_prob(params, x, cfg.likelihood)
        nats = {"neg_elbo": sum(d.kl for d in draws) - log_px, "reconstruction": -log_px}
        for level, d in zip(levels, draws, strict=True):
            nats[f"kl_{level}"] = d.kl
            shifts[level].append(d.shift.flatten(1).cpu())
        log_w = [log_weights(model, x, size, cfg, e).cpu().double() for _ in range(math.ceil(cfg.iw_samples / size))]
        log_w = torch.cat(log_w, 1)[:, :cfg.iw_samples]
        for k in [10**i for i in range(9) if 10**i < cfg.iw_samples] + [cfg.iw_samples]:
            nats[f"neg_iw_{k}"] = -iw_bound(log_w, k)
        for name, value in nats.items():
            sums[name] = sums.get(name, 0) + value.cpu().double().sum().item()
    metrics = {f"test_{name}": total / len(test) for name, total in sums.items()}
    metrics["test_bpd"] = metrics[f"test_neg_iw_{cfg.iw_samples}"] / test[0].numel() / math.log(2)
    for level in levels:
        # IWAE sec. 5.2: a unit is active if its mean moves with x. Below the top the z above moves the shift, too.
        active = torch.cat(shifts[level]).var(0, correction=0) > 0.01
        metrics[f"test_active_{level}"] = active.float().mean().item()
    return metrics


def report(metrics, n, cfg, run):
    """The figures of n test images in words, and a warning for a level that has collapsed onto its prior."""
    bounds = {name[12:]: nats for name, nats in metrics.items() if name.startswith("test_neg_iw_")}
    pixels = "8 bits" if cfg.likelihood == "mixture" else "dynamically binarised, the test split once with seed 0"
    print(f"test -log p(x) <= {bounds[str(cfg.iw_samples)]:.3f} nats, {metrics['test_bpd']:.4f} bits/dim "
          f"(importance-weighted, k = {cfg.iw_samples}; {run.tested}, {pixels}), -elbo {metrics['test_neg_elbo']:.3f}")
    print("bound by k:", ", ".join(f"{k}: {nats:.3f}" for k, nats in bounds.items()))
    for level in range(cfg.levels, 0, -1):
        kl, active = (metrics[f"test_{name}_{level}"] for name in ("kl", "active"))
        print(f"z_{level}: kl {kl:.2f} nats, {100 * active:.0f} % of its units active")
        if active < 0.05 and n > 1:  # the mean of one image does not move
            print(f"WARNING: z_{level} has collapsed onto its prior, --free-nats or a longer --kl-warmup may help")


@torch.no_grad()
def generate(model, n, cfg, run):
    """n images (n,C,H,W) uint8, from the noise of --seed."""
    torch.manual_seed(cfg.seed)
    size = at_once(run.shape)
    starts = progress(range(0, n, size), "sampling")
    return torch.cat([to_uint8(sample(model, min(size, n - start), cfg)) for start in starts])


# ---- grids to look at, besides samples

@torch.no_grad()
def show(model, data, cfg, run):
    """Reconstructions of test images, images between two of them, and the plane of z_L where it has two dimensions."""
    torch.manual_seed(cfg.seed)
    n = cfg.num_samples
    x = to_levels(data.test[:max(n, 40)], cfg, torch.Generator().manual_seed(0)).to(run.device)
    params = (infer(model, model.encode(scale(model, part)))[0] for part in x.split(at_once(run.shape)))
    x_hat = torch.cat([pixel_mean(part, cfg.likelihood) for part in params])
    pairs = to_uint8(torch.stack([scale(model, x), x_hat], 1))  # (N,2,C,H,W)
    save_grid(pairs[:40].flatten(0, 1), run.folder / "reconstructions.png", 10, "pairs of a test image and its reconstruction")
    save_images(pairs[:n, 1], run.folder / "reconstructions.npz", data.test_labels[:n] if data.names else None)
    z = draw_top(model, model.encode(scale(model, x[:10]))[-1]).z[:, None]  # z_L of ten images, (10,1,z_dim)
    share = torch.linspace(0, 1, 10, device=z.device)[:, None]
    line = torch.lerp(z, z.roll(1, 0), share)  # (10,10,z_dim)
    x = pixel_mean(descend(model, line.flatten(0, 1), 0.0), cfg.likelihood)
    save_grid(to_uint8(x), run.folder / "interpolations.png", 10, "rows on a line between the z_L of two test images")
    if cfg.z_dim == 2:
        quantiles = torch.linspace(0.02, 0.98, 20, device=z.device)
        across, up = sample_prior(model, 10_000).quantile(quantiles, 0).unbind(1)
        z = torch.cartesian_prod(up.flip(0), across).flip(1)  # the first number grows to the right, the second upwards
        x = pixel_mean(descend(model, z, 0.0), cfg.likelihood)
        save_grid(to_uint8(x), run.folder / "manifold.png", 20, "the plane of z_L, at the quantiles of its prior")


# ======== plumbing, byte-identical in all six scripts (python tools/sync.py): nothing about the model is in it ========

import argparse
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import os
import re
import signal
import sys
import tarfile
import time
import zipfile
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import get_args, get_origin
from urllib.request import urlopen

import torch.distributed as dist
from PIL import ImageOps
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHA256 = {  # the first digits of each file's hash: of what an IDX file holds, of the archive itself
    "mnist": dict(zip(IDX, "ba891046e6505d7a 65a50cbbf4e906d7 0fa7898d509279e4 ff7bcfd416de3373".split(), strict=True)),
    "fashion_mnist": dict(zip(IDX, "c59f468a2f672dc8 bad3541b69d91243 5b4141f0afbad91e 0402a96d92fd2663".split(), strict=True)),
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a"},
}
MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
TORCHVISION = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": "."}  # its folders under --data-dir
TIMEOUT = 20  # seconds a mirror may stay silent
LOCKS = {}  # of the folders that this process writes to
# images (N,C,H,W) uint8; labels (N,) int64; the names of the classes, () where all labels are 0; what else is to be said
Data = namedtuple("Data", "train train_labels test test_labels names note", defaults=((), ""))


def fail(message, code=2):
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever an exception's text holds
    raise SystemExit(code)


def progress(items=None, what=None, **more):
    """A bar on a terminal, elsewhere a line a minute."""
    bar = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    often = {"bar_format": bar} if sys.stderr.isatty() else {"bar_format": bar + "\n", "mininterval": 60, "delay": 60}
    return tqdm(items, what, miniters=0, **often | more)


def fetch(name, file, data_dir):
    """The content of one file of a data set, checked by SHA-256: from the disk, else from the first good mirror."""
    packed = file.removesuffix(".gz") + ".gz"
    target = Path(data_dir, name, packed).absolute()
    folders = (target.parent, Path(data_dir, TORCHVISION[name]).absolute(), Path("/usr/share/datasets", name.replace("_", "-")))
    disk = [(folder / f).as_uri() for folder in folders for f in (packed, file) if (folder / f).exists()]
    tried = [f"{path} (a pickle is not read)" for folder in folders for path in folder.glob("cifar-10-python.tar.gz")]
    for url in (*disk, *(mirror + packed for mirror in MIRRORS[name])):
        try:
            with urlopen(url, timeout=TIMEOUT) as f, tqdm.wrapattr(f, "read", desc=packed, disable=None) as stream:
                raw = b"".join(iter(partial(stream.read, 1 << 16), b""))
            content = gzip.decompress(raw) if url.endswith(f"{file}.gz") else raw
            if not hashlib.sha256(content).hexdigest().startswith(SHA256[name][file]):
                raise ValueError("wrong SHA-256")
            if url not in disk:
                write(target, lambda f, raw=raw: f.write(raw))
            return content
        except Exception as e:  # whatever a mirror sends, or a disk holds: the next may be good
            tried.append(f"{url.removeprefix('file://')} ({e or type(e).__name__})")
    fail(f"no good copy of {target}: tried {', '.join(tried)}; put it there, or use --dataset digits (no download)", 1)


def in_threads(function, items, what):
    """function of each item, in their order, on all cores, with a bar; 256 at a time, so that few results wait."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = (result for i in range(0, len(items), 256) for result in pool.map(function, items[i:i + 256]))
        yield from progress(results, what, total=len(items))


def read_image(path, size=None, peak=None):
    """An image file in mode L or RGB: upright, over white, of more than 8 bits divided by `peak`, cropped to size (W, H)."""
    image = Image.open(path)
    image.draft(None, size and (2 * max(size), 2 * max(size)))  # a JPEG is decoded smaller, to no less than twice the size
    if image.mode[0] not in "IF" and ";16" in str(image.tile) and not image.getbbox():  # Pillow keeps the high bytes
        raise ValueError("its 16-bit colours are all below 256; save it with 8 bits")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # more than 8 bits
        pixels = np.asarray(image, np.float64)
        if not np.isfinite(pixels.max()):
            raise ValueError("pixels that are not finite")
        image = Image.fromarray((255 * pixels / (peak or pixels.max() or 1)).round().clip(0, 255).astype(np.uint8))
    mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == mode else image.convert(mode)
    return ImageOps.fit(image, size) if size else image


def load_folder(root, side):
    """Images at any depth, in classes by the folder under the root, or under its train/ and test/ or val/ if it has both."""
    known = Image.registered_extensions().keys() | {".heic", ".heif", ".avif", ".jxl"}  # some need a plug-in
    found = []
    walked = set()
    for top, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(top) in walked:
            folders.clear()  # a link leads back here: no further
        else:
            walked.add(os.path.realpath(top))
            found += [Path(top, f).relative_to(root) for f in names]
    found = sorted(f for f in found if f.suffix.lower() in known and not any(part.startswith(".") for part in f.parts))
    found = [found[i] for i in np.random.RandomState(0).permutation(len(found))]  # so that the first n are of all classes
    test = next((name for name in ("test", "val") if {"train", name} <= {f.parts[0] for f in found}), None)
    files = [f for part in ("train", test) for f in found if f.parts[0] == part] if test else found
    modes = set()
    peaks = [0]

    def look(f):
        with contextlib.suppress(Exception), Image.open(root / f) as image:  # what cannot be read is named below
            modes.add(Image.getmodebase(image.mode))
            if image.mode[0] in "IF" and np.isfinite(top := np.asarray(image).max()):
                peaks.append(top)
            if side:
                return side, side
            turned = image.getexif().get(274, 1) >= 5  # by a quarter, says EXIF
            return image.size[::-1] if turned else image.size

    def read(i):
        try:
            x[i] = np.atleast_3d(read_image(root / files[i], size, peak).convert(mode))
        except Exception as e:  # whatever a decoder raises
            return f"{root / files[i]} ({e})"

    sizes = Counter(in_threads(look, files, "looking at images"))
    del sizes[None]
    peak = max(peaks)
    size = max(sizes, key=sizes.get, default=(1, 1))  # the commonest
    if max(size) > 128 and not side:
        fail(f"--dataset {root}: images of {size[0]} x {size[1]} pixels are too large as they are; add --image-size 64")
    mode = "L" if modes <= {"L"} else "RGB"
    x = np.empty((len(files), *size[::-1], len(mode)), np.uint8)
    kept = []
    skipped = []
    for i, error in enumerate(in_threads(read, range(len(files)), "reading images")):
        if error:
            skipped.append(error)
        else:
            x[len(kept)] = x[i]  # without a gap, and without a copy of the whole
            kept.append(files[i])
    if skipped:
        print(f"skipped {len(skipped)} images that cannot be read:", *"; ".join(skipped[:10]).split(), file=sys.stderr)
    n = sum(f.parts[0] == test for f in kept) if test else -(-len(kept) // 10)
    if not 0 < n < len(kept):
        fail(f"--dataset {root}: {len(kept)} readable images, {n} of them to test on; at least 2 are needed, 1 to test on")
    folders = ["".join(f.parts[bool(test):-1][:1]) for f in kept]
    names = sorted(set(folders)) if all(folders) and len(set(folders)) > 1 else []
    y = torch.tensor([names.index(folder) if names else 0 for folder in folders])
    x = torch.from_numpy(x[:len(kept)]).permute(0, 3, 1, 2)
    odd = {"skipped": len(skipped), "cropped": sizes.total() - sizes[size], "in unused folders": len(found) - len(files)}
    note = "".join(f"; {count} {what}" for what, count in odd.items() if count)
    return Data(x[:-n], y[:-n], x[-n:], y[-n:], tuple(names), note)


def load_npz(path):
    """What np.savez wrote: images uint8 (N,H,W) or (N,H,W,C), maybe labels (N,), test_images, test_labels, names of classes."""
    try:
        zipfile.ZipFile(path).close()  # numpy takes what is none for a pickle
        with np.load(path, allow_pickle=False) as file:
            parts = []
            for part in ("", "test_") if {"test_images", "test_labels"} & {*file} else ("",):
                x = file[f"{part}images"]
                y = file[f"{part}labels"] if {"labels", "test_labels"} & {*file} else np.zeros(len(x), int)
                if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[3:] not in ((), (1,), (3,)) or x.size == 0:
                    raise ValueError(f"{part}images are {x.dtype} {x.shape}, not uint8 (N,H,W) or (N,H,W,C) with C 1 or 3")
                if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 65535:
                    raise ValueError(f"{part}labels are {y.dtype} {y.shape}, not {len(x)} integers from 0 to 65535")
                parts += [np.moveaxis(x.reshape(*x.shape[:3], -1), 3, 1), y.astype(np.int64)]
            classes = 1 + max(y.max() for y in parts[1::2])
            names = np.ravel(file["names"] if "names" in file else range(classes)).astype(str).tolist()
        if len(parts) == 2:  # as of a folder: mixed, which needs no second copy in memory, and a tenth held out
            n = -(-len(y) // 10)
            for part in parts:
                np.random.RandomState(0).shuffle(part)
            parts = [*(part[:-n] for part in parts), *(part[-n:] for part in parts)]
        if not len(parts[0]) or parts[0].shape[1:] != parts[2].shape[1:] or len(names) < classes:
            raise ValueError("at least 2 images are needed, test_images of the shape of images, and a name for each label")
        return parts, tuple(names) if classes > 1 else ()
    except Exception as e:  # whatever a damaged file raises
        fail(f"--dataset {path}: {str(e) or type(e).__name__}")


def load_data(name, data_dir, image_size=0):
    """digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz, whole in memory."""
    names = tuple("0123456789")
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(1797)
        x = np.round(digits.images[order, None] * 255 / 16).astype(np.uint8)
        y = digits.target[order]
        parts = (x[297:], y[297:], x[:297], y[:297])
    elif name in ("mnist", "fashion_mnist"):
        raw = [np.frombuffer(fetch(name, file, data_dir), np.uint8) for file in IDX]
        parts = [part[8:] if i % 2 else part[16:].reshape(-1, 1, 28, 28) for i, part in enumerate(raw)]
    elif name == "cifar10":
        archive = tarfile.open(fileobj=io.BytesIO(fetch(name, "cifar-10-binary.tar.gz", data_dir)))
        files = sorted(f for f in archive.getnames() if f.endswith(".bin"))  # data_batch_1 to 5, test_batch
        rows = np.frombuffer(b"".join(archive.extractfile(f).read() for f in files), np.uint8).reshape(-1, 3073)
        x = rows[:, 1:].reshape(-1, 3, 32, 32)
        parts = (x[:50_000], rows[:50_000, 0], x[50_000:], rows[50_000:, 0])
    elif name and Path(name).is_dir():
        return load_folder(Path(name), image_size)
    elif name.endswith(".npz") and Path(name).is_file():
        parts, names = load_npz(name)
    else:
        fail(f"--dataset {name}: neither digits, mnist, fashion_mnist nor cifar10, nor a folder or a FILE.npz")
    x, y, x_test, y_test = (torch.from_numpy(np.require(part, requirements="W")) for part in parts)
    H, W = x.shape[2:]
    if image_size and (H, W) != (image_size, image_size):
        S = min(H, W)  # a square at the centre
        square = (..., slice((H - S) // 2, (H + S) // 2), slice((W - S) // 2, (W + S) // 2))
        x, x_test = (F.interpolate(part[square], (image_size,) * 2, mode="bilinear", antialias=True) for part in (x, x_test))
    elif max(H, W) > 128 and not image_size:
        fail(f"--dataset {name}: images of {W} x {H} pixels are too large as they are; add --image-size 64")
    return Data(x, y.long(), x_test, y_test.long(), names)


def parse_args(argv=None):
    """The command line -> the config, and the checkpoint that the run goes on from, {} for a new one.

    A field of Config is a flag; its comment is the help, and a bound in it is checked; a comment of its own begins a group.
    What no flag says is taken from the checkpoint, from which only fields of a group "free to change" may differ.
    """
    comments = {}
    groups = {}
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--flag value] ...", allow_abbrev=False,
                                     formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100))
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    for heading, name, comment in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", inspect.getsource(Config), re.M):
        if heading:
            section = parser.add_argument_group(heading)
            continue
        comments[name] = comment
        groups[name] = section.title
        field = Config.__dataclass_fields__[name]
        kind = (*get_args(field.type), field.type)[0]  # int of int | None and of tuple[int, ...]
        if get_origin(field.type) is Literal:
            options = {"choices": get_args(field.type)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": os.path.expanduser if kind is str else kind, "metavar": kind.__name__}
            if get_origin(field.type) is tuple:
                options["nargs"] = "+" if ... in get_args(field.type) else len(get_args(field.type))
        text = f"{comment} [{field.default}]".replace("%", "%%")
        section.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if bound := re.search(r"\((>=?)? ?(-?[\d.]+)(?: to ([\d.]+))?\)", comments[name]):
            sign, low, high = bound.groups()
            for v in value if isinstance(value, tuple) else [value]:
                most = float(high or (2**31 - 1 if isinstance(v, int) else np.finfo(np.float32).max))
                if not float(low) <= v <= most or sign == ">" and v == float(low):
                    fail(f"--{name.replace('_', '-')}: {v}: must be {sign or 'from'} {low} to {most:.10g}: {comments[name]}")
    cfg = Config(**given)
    cfg.out = cfg.out or f"runs/{Path(__file__).stem}-{Path(cfg.dataset).resolve().name}"
    saved = {}
    path = Path(cfg.out, "checkpoint.pt")
    lock(path.parent)
    if cfg.mode != "train" or cfg.resume and path.exists():
        old, saved = read_run(cfg.out)
        for name, value in given.items():
            if value != getattr(old, name) and "free to change" not in groups[name]:
                fail(f"--{name.replace('_', '-')} {value}: the run in {path} has {getattr(old, name)}")
        once = ["mode", "resume", "overwrite"]  # these have their defaults again, where no flag says them
        if cfg.steps or cfg.minutes:  # a new budget replaces the old one
            once += ["steps", "minutes"]
        if cfg.mode != "train":  # so does what the training was asked to show besides samples, of whichever --label
            once += [name for name, group in groups.items() if group[:4] == "eval" and getattr(Config, name) in (None, "no")]
        kept = {name: value for name, value in vars(old).items() if name not in once or name == "label"}
        cfg = Config(**kept | given | {"out": cfg.out})
    elif not cfg.overwrite and path.parent.is_dir() and any(f.suffix != ".part" for f in path.parent.iterdir()):
        fail(f"--out {cfg.out}: is not empty; --resume continues a run from its checkpoint.pt, --overwrite replaces it")
    elif cfg.resume:
        print(f"--resume: there is no {path} yet, so the run starts")
    if not cfg.steps and not cfg.minutes:
        cfg.steps = 2000
    return cfg, saved


def lock(folder):
    """Refuse a run's folder that another process writes to, until this one ends."""
    try:
        import fcntl
        if folder not in LOCKS and os.environ.get("RANK", "0") == "0":
            LOCKS[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {folder}: another process is writing to it")
    except (ImportError, OSError):  # Windows, a file system without locks, or no folder
        pass


def read_run(folder):
    """The config and the checkpoint of the run in a folder; what is damaged, not finite or not of this script is refused."""
    path = Path(folder, "checkpoint.pt")
    script = Path(__file__).stem
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))  # runs nothing that a file may hold
        if (saved["format"], saved["script"]) != (2, script):
            raise ValueError(f"is of {saved['script']}.py in format {saved['format']}, not of {script}.py in format 2")
        if fields := saved["config"].keys() ^ Config.__dataclass_fields__.keys():
            raise ValueError(f"of another version, whose config differs in {', '.join(sorted(fields))}")
        if not all(torch.as_tensor(v).isfinite().all() for v in tree_leaves(saved) if isinstance(v, (float, torch.Tensor))):
            raise ValueError("holds numbers that are not finite")
        kinds = {"facts": dict, "step": int, "seconds": (int, float), "log_size": int}
        if odd := [name for name, kind in kinds.items() if not isinstance(saved[name], kind)]:
            raise ValueError(f"its {', '.join(odd)} cannot be read")
        return Config(**saved["config"]), saved
    except Exception as e:  # whatever a missing, damaged or hostile file raises
        fail(f"{path}: is not a checkpoint to go on from: {type(e).__name__}: {(str(e) or '-').splitlines()[0][:200]}")


def restore(parts, saved, folder):
    """Load each named part of a checkpoint; one that is missing, or of other shapes, is named."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
            matrices = set(part.param_groups[1]["params"]) if isinstance(part, Muon) else ()
            for p, state in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():
                adam = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                wanted = {"exp_avg": p.shape} if p in matrices else adam
                if {key: v.shape for key, v in state.items()} != wanted:
                    raise ValueError("the optimizer's moments are not there or of other shapes")  # PyTorch does not look
        except Exception as e:
            fail(f"{Path(folder, 'checkpoint.pt')}: its {name} does not fit: {e!r:.300}")


def write(path, save, what=None):
    """save(file) under a temporary name, flushed to disk, then renamed: at any moment path is whole, old or new."""
    part = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror or e}", 1)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    if what:
        print(f"{path}: {what}")


def save_grid(images, path, columns=10, what=None):
    """Images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged."""
    columns = min(columns, len(images))
    rows = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)  # (rows*(H+2), columns*(W+2)[, C])
    image = ImageOps.scale(Image.fromarray(grid.numpy()), max(1, 56 // max(images.shape[2:])), Image.NEAREST)
    write(path, lambda f: image.save(f, "png"), what)


def save_images(images, path, labels=None, how=""):
    """Images (N,C,H,W) uint8 as an .npz of images (N,H,W,C), and of labels (N,) where they have some."""
    arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    what = f"{len(images)} images, uint8 of (N,H,W,C){' and their labels' * (labels is not None)}{how}"
    write(path, lambda f: np.savez_compressed(f, **arrays), what)


def to_uint8(x):
    """[-1,1] -> {0..255} on the CPU"""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()


def at_once(shape, values=3072):
    """Images (C,H,W) to evaluate or sample at once, whatever --batch-size is: 250, fewer where they have more values."""
    return max(min(250, 250 * values // math.prod(shape)), 1)


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights by the power profile of Karras et al. 2024, eq. 127; share is their 1 / (gamma + 1)."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def orthogonal(m):
    """Nearly the orthogonal matrices next to m (n,rows,columns): singular values from 0.7 to 1.2.

    Five steps of Newton-Schulz, x <- p x with p = 3.4445 - 4.775 s + 2.0315 s^2 and s = x x', all of them on s alone.
    """
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    one = torch.eye(x.shape[1]).to(x)
    s = x @ x.mT
    q = one
    for _ in range(5):
        p = 3.4445 * one + (2.0315 * s - 4.775 * one) @ s
        q = p @ q
        s = p @ s @ p
    return (q @ x).mT if tall else q @ x


class Muon(torch.optim.Adam):
    """Adam, but the matrices of `inside`, parts of the model, move by their momentum made orthogonal (Jordan 2024).

    A factor makes that step about as large as Adam's, so both have one learning rate (Liu et al. 2025, eq. 4). The kernels
    of a convolution are a matrix with a row for each output. torch.optim.Muon multiplies in bfloat16, slow on most CPUs.
    """

    def __init__(self, model, inside, lr, betas):
        matrices = [p for part in inside for p in part.parameters() if p.ndim > 1]
        taken = set(matrices)
        others = [p for p in model.parameters() if p not in taken]
        super().__init__([{"params": others}, {"params": matrices}], lr, betas, fused=True)
        self._step_supports_amp_scaling = False  # the scaler of fp16 itself leaves out a step

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's wants three numbers of every parameter

    @torch.no_grad()
    def step(self):
        shapes = defaultdict(list)  # matrices of one shape are multiplied together
        for p in self.param_groups[1]["params"]:
            if p.grad is not None:
                shapes[p.shape].append(p)
        for shape, params in shapes.items():
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(momenta, grads, 0.05)
            ahead = torch.stack(torch._foreach_lerp(grads, momenta, 0.95)).flatten(2)  # Nesterov's momentum
            size = self.param_groups[0]["lr"] * 0.2 * max(ahead.shape[1:]) ** 0.5
            torch._foreach_add_(params, list((-size * orthogonal(ahead)).unflatten(2, shape[1:])))
            for p in params:
                p.grad = None  # Adam leaves it alone
        super().step()


@lru_cache(maxsize=4)
def shuffle(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class Deaf(contextlib.suppress, contextlib.ContextDecorator):
    """Deaf(errors)(call) is call, but these errors of it end nothing: a training outlives whoever reads what it prints."""


def on_signal(number, frame):
    """A stop signal ends the program: in training after the step under way, else at once. A second one always at once."""
    if Run.signal == number or Run.signal and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun adds a SIGTERM of its own
        os._exit(128 + number)
    Run.signal = Run.signal or number
    if not Run.stepping:
        fail(f"stopped by {signal.Signals(number).name}; --resume continues {Run.out}", 128 + number)
    print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr)


def launch(main):
    """main() as a program: stop signals are heard, and what the machine refuses (files, memory, kernels) is one line."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    deaf = Deaf(OSError, RuntimeError)  # the second: a signal's words within others
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write = deaf(stream.write)
        stream.flush = deaf(stream.flush)
    Run.stepping = False
    numbers = {n for n in signal.valid_signals() if n in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))}
    before = {n: signal.signal(n, on_signal) for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN}
    try:
        main()
        if Run.signal:  # its exception was lost in a library
            sys.exit(128 + Run.signal)
    except OSError as e:
        fail(f"{e.filename or Path(__file__).stem}: {e.strerror or e}", 1)
    except (MemoryError, RuntimeError) as e:
        if "kernels.mode" in str(e):
            fail(f"--kernels: {e}")
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            fail(f"another process cannot be reached; --resume continues {Run.out} ({e!r:.160})", 1)
        if not re.search("MemoryError|allocate memory|overflowed", repr(e)):
            raise
        fail(f"out of memory, a smaller --batch-size or --width helps ({(str(e) or 'no more').splitlines()[0]})", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        Run.signal = 0  # main() may be called again, without launch()
        while LOCKS:
            os.close(LOCKS.popitem()[1])
        if dist.is_initialized():
            dist.destroy_process_group()


class Run:
    """A run's folder, clock, log and processes. What is random in a step follows from (seed, step, rank) alone."""

    signal = 0  # the stop signal that has come
    stepping = False  # whether it waits for the end of a step
    out = "the run"

    def __init__(self, cfg, saved):
        self.cfg = cfg
        self.saved = saved
        self.sums = Counter()
        self.out = Run.out = Path(cfg.out)
        self.folder = self.out / "sampled" if cfg.mode == "sample" else self.out  # of results
        self.step, self.seconds, self.log_size = (saved.get(name, 0) for name in ("step", "seconds", "log_size"))
        vars(self).update(saved.get("facts", {}))  # shape, classes, names and train_images of the data
        self.rank, local, self.world = (int(os.environ.get(*of)) for of in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        mps = torch.backends.mps.is_available() and self.world == 1  # gloo has no tensors of MPS
        there = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
        kind = there[0] if cfg.device == "auto" else cfg.device
        if kind not in there:
            fail(f"--device {kind}: not available here, there is {', '.join(there)}")
        if cfg.batch_size % self.world:
            fail(f"--batch-size {cfg.batch_size}: cannot be split over {self.world} processes")
        mode = os.environ.get("M2_KERNELS", "auto") if cfg.kernels == "auto" else cfg.kernels
        try:
            import kernels
            kernels.choose(mode, kind)
        except (ImportError, AttributeError):  # PyPI has an unrelated package of this name
            if mode == "triton":
                fail("--kernels triton: the folder kernels/ is not beside this script")
        torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: some CPUs compute with them many times slower
        self.device = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        if self.world > 1 and not dist.is_initialized():
            # loaded later, as an optimizer does, it would hold the group, whose threads would then outlive the program
            import torch.distributed.nn as _  # noqa: F401
            if kind == "cuda":
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        dtype = torch.float16 if cfg.amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, kind, dtype, enabled=cfg.amp != "off")
        self.scaler = torch.amp.GradScaler(kind, enabled=cfg.amp == "fp16")
        torch.manual_seed(cfg.seed)  # of the weights that the networks start from

    def describe(self, data, labels=True):
        """Say what the data is, which must be the checkpoint's -> data, cut as --no-labels and --eval-images want it."""
        names = f"{len(data.names)} classes{'' if labels else ' (not used)'}: {', '.join(data.names[:20])}"
        names = names + ", ..." * (len(data.names) > 20) if data.names else "no classes"
        if not labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, names=())
        facts = {"shape": list(data.train.shape[1:]), "classes": len(data.names), "names": list(data.names)}
        facts["train_images"] = len(data.train)
        if self.saved and self.saved["facts"] != facts:
            fail(f"--dataset {self.cfg.dataset}: is {facts}, the run in {self.out} had {self.saved['facts']}")
        self.facts = facts
        vars(self).update(facts)
        self.labels(1)
        total = len(data.test)
        n = min(self.cfg.eval_images or total, total)
        self.tested = f"{f'the first {n} of' if n < total else 'all'} {total} test images"
        if self.rank == 0:
            print(f"{self.cfg.dataset}: {len(data.train)} images to train on, {total} to test on, of "
                  f"{' x '.join(map(str, self.shape))}; {names}{data.note}")
        return data._replace(test=data.test[:n], test_labels=data.test_labels[:n])

    def labels(self, n):
        """The classes (n,) to sample: all in turn, or --label by its name or number."""
        label = getattr(self.cfg, "label", None)
        if label is None:
            return torch.arange(n) % max(self.classes, 1)
        known = self.names + [str(i) for i in range(self.classes)]
        if label not in known:
            fail(f"--label {label}: the model knows {self.classes} classes: {', '.join(self.names)}")
        return torch.full((n,), known.index(label) % self.classes)

    def begin(self, parts):
        """Restore the parts, or start from --init; save; only then clear away what is not of this run."""
        if self.saved:
            restore(parts, self.saved, self.out)
        elif self.cfg.init:
            _, other = read_run(self.cfg.init)
            for name, net in ((name, part) for name, part in parts.items() if isinstance(part, nn.Module)):
                theirs = other.get(f"ema_{name.removeprefix('ema_')}") or other.get(name, {})  # averaged, where it is
                ours = net.state_dict()
                fits = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
                net.load_state_dict(fits, strict=False)
                paths = {key: [*accumulate(key.split("."), "{}.{}".format)] for key in ours.keys() | theirs.keys()}
                fitting = {module for key in fits for module in paths[key]}  # in which something fits
                odd = sorted({next(m for m in paths[key] if m not in fitting) for key in paths.keys() - fits.keys()})
                but = f", but for what does not fit: {', '.join(odd)}" * bool(odd)
                print(f"--init {self.cfg.init}: {name} starts from its weights{but}")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lock(self.out)
            self.save(parts)  # what cannot be written is found before any training
            stale = [f for f in self.out.glob("samples/step_*.png") if f.stem[5:].zfill(12) > f"{self.step:012d}"]
            if not self.saved:  # of the run that is overwritten
                stale += [folder / f"samples.{kind}" for folder in (self.out, self.out / "sampled") for kind in ("npz", "png")]
            for path in (*stale, *self.out.glob("*.[0-9]*.part"), *self.out.glob("s*/*.[0-9]*.part")):
                path.unlink(missing_ok=True)
            with open(self.out / "metrics.jsonl", "ab") as f:  # lines beyond the checkpoint are written again
                f.truncate(min(f.tell(), self.log_size))
            write(self.out / "config.json", lambda f: f.write(json.dumps(vars(self.cfg) | self.facts, indent=1).encode()))
            print(f"{self.out}: settings in config.json, log in metrics.jsonl, state in checkpoint.pt, images in samples.png, "
                  "grids of the training in samples/")
            if self.step >= (self.cfg.steps or math.inf):
                print(f"step {self.step}: --steps {self.cfg.steps} leaves nothing to train")
        self.saved = None
        self.start = time.monotonic() - self.seconds

    def save(self, parts):
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"format": 2, "script": Path(__file__).stem, "config": vars(self.cfg), "facts": self.facts}
            state |= {name: getattr(self, name) for name in ("step", "seconds", "log_size")}
            torch.save(state, buffer := io.BytesIO())
            write(self.out / "checkpoint.pt", lambda f: f.write(buffer.getbuffer()))

    def steps(self, parts, preview, until=math.inf):
        """Yield step after step until --steps, --minutes, `until` or a stop signal; self.step counts the one under way as done.

        Parts are restored before and saved meanwhile; after a save preview() -> images (N,C,H,W) uint8 is the newest grid.
        """
        parts = parts | {"scaler": self.scaler}
        if self.saved is not None:
            self.begin(parts)
        Run.stepping = True
        with progress(what=Path(__file__).stem, total=100, disable=self.rank > 0) as self.bar:
            while True:
                state = torch.tensor([time.monotonic() - self.start, Run.signal], dtype=torch.float64)
                if self.world > 1:  # all processes stop at the same step
                    state = state.to(self.device)
                    dist.all_reduce(state, dist.ReduceOp.MAX)
                self.seconds, number = state.tolist()
                self.done = max(self.step / (self.cfg.steps or math.inf), self.seconds / 60 / (self.cfg.minutes or math.inf))
                self.bar.update(100 * min(self.done, 1) - self.bar.n)
                self.over = number > 0 or self.done >= 1
                if self.over or self.step >= until:
                    break
                torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]))
                self.step += 1
                yield self.step - 1
                if self.step % self.cfg.save_every == 0:
                    self.save(parts)
                    if self.rank == 0 and not Run.signal:
                        Run.stepping = self.world > 1  # one process need not wait for the grid
                        images = preview()
                        save_grid(images, self.out / f"samples/step_{self.step:06d}.png")
                        save_grid(images, self.out / "samples.png")
                        Run.stepping = True
        if self.step % self.cfg.save_every:
            self.save(parts)
        Run.stepping = False
        if number := int(number) or Run.signal:
            fail(f"stopped by {signal.Signals(number).name}; --resume continues {self.out}", 128 + number)

    def batch(self, data):
        """This process's share of the step's images and labels: the next of an endless row of shuffles of the data."""
        n = len(data.train)
        B = self.cfg.batch_size
        at = torch.arange(self.rank, B, self.world) + (self.step - 1) * B
        index = torch.cat([shuffle(n, self.cfg.seed, e)[at[at // n == e] % n] for e in (at // n).unique().tolist()])
        return data.train[index].to(self.device), data.train_labels[index].to(self.device)

    def update(self, loss, model, optimizer, rate="--lr", max_norm=1.0):
        """Backward, mean over processes, clip, optimizer step. A loss or gradient that is not finite ends the run."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if self.world > 1:  # one flat all-reduce
            flat = torch.cat([grad.flatten() for grad in grads.values()])
            dist.all_reduce(flat)
            for grad, mean in zip(grads.values(), flat.split([g.numel() for g in grads.values()]), strict=True):
                grad.copy_(mean.view_as(grad) / self.world)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(grads.values())
        if not loss.isfinite() or not norm.isfinite() and self.scaler.get_scale() <= 1:  # fp16 first tries smaller scales
            bad = next((f"first bad gradient that of {name}" for name, grad in grads.items() if not grad.isfinite().all()),
                       f"gradient norm {norm.item()}, though each gradient is finite")
            fail(f"step {self.step}: loss {loss.item()}, {bad}; {self.out / 'checkpoint.pt'} is the last good checkpoint, "
                 f"a smaller {rate} may help", 1)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def log(self, **metrics):
        """Average metrics, the loss among them, over steps and processes: a line of metrics.jsonl every --log-every steps."""
        if self.sums.keys() - {"count"} != metrics.keys():  # another stage of training
            self.sums.clear()
        self.sums.update({name: torch.as_tensor(value).detach() for name, value in metrics.items()} | {"count": 1})
        if self.step % self.cfg.log_every == 0:
            means = {name: float(total) / self.sums["count"] for name, total in self.sums.items() if name != "count"}
            self.sums.clear()
            if self.world > 1:
                total = torch.tensor(list(means.values()), dtype=torch.float64, device=self.device)
                dist.all_reduce(total)
                means = dict(zip(means, (total / self.world).tolist(), strict=True))
            self.write_metrics(**means)
            rate = self.step / max(self.seconds, 1e-9)
            self.bar.set_postfix_str(f"step {self.step} loss {means['loss']:.4f} {rate:.1f} steps/s", refresh=False)

    def write_metrics(self, final=False, **metrics):
        """Append a line to metrics.jsonl. What is not finite becomes null, and ends the program where it is a test figure."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        line = {"step": self.step, "seconds": round(self.seconds, 3)} | metrics | dict.fromkeys(bad)
        path = self.out / "metrics.jsonl"
        try:
            with open(path if self.rank == 0 else os.devnull, "a+b") as f:
                f.seek(max(f.tell() - 1, 0))
                torn = f.read() not in (b"", b"\n")  # the last line was cut short
                f.write(b"\n" * torn + json.dumps(line | {"final": True} if final else line).encode() + b"\n")
                self.log_size = f.tell()
        except OSError as e:
            fail(f"cannot write {path}: {e.strerror or e}", 1)
        if final and bad:
            fail(f"test figures that are not finite: {', '.join(bad)}", 1)

    def write_samples(self, images, labels=None, how=""):
        """samples.npz, with labels (N,) where there are classes, and samples.png: a grid of the first 80."""
        save_images(images, self.folder / "samples.npz", labels if self.classes else None, how)
        save_grid(images[:80], self.folder / "samples.png", what=f"the first {min(len(images), 80)} of them")


# ======== end of the plumbing ========================================================================================


def build(shape, cfg):
    """The network for images of this shape (C,H,W), with the weights that --seed draws."""
    choose(cfg, *shape[1:])
    return VAE(*shape, cfg).to(memory_format=torch.channels_last)


def load(folder, device="cpu"):
    """The averaged network of the run in a folder, ready to sample, and its config.

    model, cfg = vae.load("runs/vae-digits")
    images = vae.sample(model, 20, cfg)  # in [-1,1]
    vae.save_grid(vae.to_uint8(images), "samples.png")
    """
    cfg, saved = read_run(folder)
    model = build(saved["facts"]["shape"], cfg)
    restore({"ema_model": model}, saved, folder)
    return model.to(device).eval().requires_grad_(False), cfg


def main(argv=None):
    cfg, saved = parse_args(argv)
    run = Run(cfg, saved)
    if cfg.mode != "sample":
        loaded = load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        data = run.describe(loaded, labels=False)
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    model, _ = load(cfg.out, run.device)
    if cfg.mode != "sample":
        metrics = evaluate(model, data, cfg, run)
        run.write_metrics(final=True, **metrics)
        report(metrics, len(data.test), cfg, run)
        show(model, loaded, cfg, run)
    if cfg.mode != "eval":
        run.write_samples(generate(model, cfg.num_samples, cfg, run))


if __name__ == "__main__":
    launch(main)
