"""Variational autoencoders: p(x) = int p(x | z) p(z) dz, trained by a lower bound with an encoder q(z | x).

The weakness: Gaussians are chosen for p(z) and q(z | x) because they are convenient, and they are too simple. The codes of
the data do not fill a Gaussian, and the true posterior is not one; both cost likelihood. The remedies shown here, all on
one bound: a prior that is learned (a normalizing flow, or a mixture of posteriors: VampPrior), a posterior that is bent by
an inverse autoregressive flow, and a Markov chain of latents, each the prior of the next: p(z_L) prod p(z_l | z_l+1).
diffusion.py is the limit of that chain: ever more levels, each of the size of x, and q no longer learned but fixed to add
Gaussian noise, so that the KL of every level is a squared error and no level can collapse.

Papers: VAE (Kingma and Welling 2014), IWAE (Burda 2016), ladder VAE (Sonderby 2016), IAF and free bits (Kingma 2016),
RealNVP (Dinh 2017), VampPrior (Tomczak and Welling 2018), residual posterior (Vahdat and Kautz 2020).
  evidence lower bound ..................... infer, elbo             VAE eq. 3
  chain of latents, shared top-down ........ infer, Level            ladder VAE eqs. 1 to 3, NVAE sec. 3.2
  importance-weighted bound ................ log_weights, iw_bound   IWAE eq. 8
  flow prior, VampPrior .................... log_prior               RealNVP eqs. 2 to 4, VampPrior eq. 9
  inverse autoregressive flow .............. IAFStep                 IAF eqs. 9 to 15

  python vae.py                                                           # digits
  python vae.py --dataset mnist --minutes 10 --prior flow                 # MNIST, dynamically binarised, on two CPU cores
  python vae.py --dataset mnist --minutes 10 --levels 2 --iw-samples 1000 --out runs/vae-chain
The second gives log p(x) >= -82.7 nats on two Zen 5 cores, a Gaussian prior -88.0. All results: docs/vae.md
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
        log_s, (kept, x) = s_max * torch.tanh(raw / s_max), (x[:, :split], x[:, split:])
        y = (x - shift) * torch.exp(-log_s) if reverse else x * torch.exp(log_s) + shift
        return torch.cat([kept, y], 1), (-log_s if reverse else log_s).sum(1)

try:
    from kernels.logistic_mixture import logistic_mixture
except ImportError:
    def logistic_mixture(x, params):
        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)  # (B, M, H, W)
        x, inv = x / 127.5 - 1, torch.exp(-log_scales.clamp(min=-7))
        upper = torch.where(x > 0.999, math.inf, (x - means + 1 / 255) * inv)  # the last bins are open
        lower = torch.where(x < -0.999, -math.inf, (x - means - 1 / 255) * inv)
        log_p = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        return torch.logsumexp(log_p + torch.log_softmax(logits, 1), 1)


@dataclass
class Config:
    # the core, the same in all six scripts
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10 or a folder of images
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (>= 0)
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    batch_size: int = 100  # images a step, over all processes (> 0)
    lr: float = 2e-3  # learning rate of Adam (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    ema: float = 0.15  # share of the run so far over which the weights are averaged that are evaluated and sampled (> 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)
    # the model
    likelihood: Literal["bernoulli", "mixture"] = "bernoulli"  # of binarised, or of 8-bit pixels
    binarize: Literal["dynamic", "static"] = "dynamic"  # draw the binary training images anew each step, or once
    levels: int = 1  # latents in the Markov chain: the top one a vector, those below maps (> 0)
    prior: Literal["gaussian", "flow", "vamp"] = "gaussian"  # of the top latent
    posterior: Literal["gaussian", "iaf"] = "gaussian"  # of the top latent
    z_dim: int = 40  # dimensions of the top latent (> 0)
    z_channels: int = 4  # channels of the latents below (> 0)
    patch: int = 0  # pixels a side folded into channels at the door; 0: 2 below 16 pixels, else 4 (>= 0)
    width: int = 32  # channels of encoder and decoder (> 0)
    blocks: int = 0  # residual blocks a level, up and down; 0: 1, in a chain 2 (>= 0)
    hidden: int = 128  # units of the networks in the flow prior and in IAF (> 0)
    flow_steps: int = 4  # couplings of the flow prior, steps of IAF (> 0)
    pseudo_inputs: int = 100  # components of the VampPrior (> 0)
    mixtures: int = 5  # logistics in --likelihood mixture (> 0)
    beta: float = 1.0  # weight of the KL in training (>= 0)
    kl_warmup: int = 1000  # steps in which that weight rises from 0 (>= 0)
    free_bits: float = 0.0  # nats of KL a level that cost nothing in training (>= 0)
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 2000  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling: free to change on a trained model
    iw_samples: int = 100  # importance samples of the test bound; those of every power of ten up to it are given too (> 0)
    temperature: float = 1.0  # of the latents drawn for samples, times their standard deviation (> 0)


# ---- the model


def zero(module):
    """Start a residual branch, a correction or a coupling at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


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
    """p(z_l | z_l+1) and q(z_l | z_l+1, x), Gaussian maps. The posterior is a correction to the prior: zero means no news.

    Their parameters, as all that log-likelihoods are made of here, are in float32 at least, whatever --amp.
    """

    def __init__(self, width, z_channels):
        super().__init__()
        self.p = nn.Conv2d(width, 2 * z_channels, 1)
        self.q = zero(nn.Conv2d(2 * width, 2 * z_channels, 1))

    def prior(self, h):
        """h (B,width,H',W'), from z_l+1 -> mu, logvar (B,z_channels,H',W')."""
        mu, logvar = self.p(h).to(self.p.weight.dtype).chunk(2, 1)
        return mu, bounded(logvar)

    def posterior(self, p, h, e):
        """The same from p = prior(h) and e (B,width,H',W'), of x; what it adds to mu, in standard deviations of the prior."""
        shift, d_logvar = self.q(torch.cat([h, e], 1)).to(self.q.weight.dtype).chunk(2, 1)
        return p[0] + torch.exp(p[1] / 2) * shift, p[1] + bounded(d_logvar), shift


def bounded(logvar):
    return 6 * torch.tanh(logvar / 6)


class VAE(nn.Module):
    """The networks of the chain x, z_1 ... z_L: x (B,C,H,W), z_L (B,z_dim), the others (B,z_channels,H',W')."""

    def __init__(self, channels, H, W, cfg):
        super().__init__()
        if cfg.prior == "flow" and cfg.z_dim < 2:
            raise ValueError(f"--z-dim {cfg.z_dim}: a flow prior needs at least 2")
        self.patch, self.size, L, w = cfg.patch, (H, W), cfg.levels, cfg.width
        rows, columns = -(-H // cfg.patch), -(-W // cfg.patch)
        self.white, K = (1, 1) if cfg.likelihood == "bernoulli" else (255, 3 * cfg.mixtures)
        self.shape = channels, K
        self.stem = nn.Conv2d(channels * cfg.patch**2, w, 1)
        self.up = nn.ModuleList(nn.Sequential(*(ResBlock(w) for _ in range(cfg.blocks))) for _ in range(L))
        context = cfg.hidden if cfg.posterior == "iaf" else 0
        self.to_top = nn.Linear(w * rows * columns, 2 * cfg.z_dim + context)
        entries = [*(nn.Conv2d(cfg.z_channels, w, 1) for _ in range(L - 1)), Spread(cfg.z_dim, w, rows, columns)]
        self.down = nn.ModuleList(nn.Sequential(entry, *(ResBlock(w) for _ in range(cfg.blocks))) for entry in entries)
        self.below = nn.ModuleList(Level(w, cfg.z_channels) for _ in range(L - 1))  # z_1 ... z_L-1
        self.out = nn.Conv2d(w, channels * K * cfg.patch**2, 1)
        self.z_dim, steps = cfg.z_dim, range(cfg.flow_steps)
        self.flow = nn.ModuleList(Coupling(cfg.z_dim, cfg.hidden) for _ in steps if cfg.prior == "flow")
        self.iaf = nn.ModuleList(IAFStep(cfg.z_dim, cfg.hidden, cfg.hidden) for _ in steps if cfg.posterior == "iaf")
        self.pseudo = nn.Parameter(torch.rand(cfg.pseudo_inputs, channels, H, W)) if cfg.prior == "vamp" else None

    def encode(self, x):
        """x (B,C,H,W) in [-1,1] -> what q is told of x at each level: e_1 ... e_L-1 (B,width,H',W'), at the top a vector."""
        H, W = self.size
        e = [self.stem(F.pixel_unshuffle(F.pad(x, (0, -W % self.patch, 0, -H % self.patch)), self.patch))]
        for block in self.up:
            e.append(block(e[-1]))
        return [*e[1:-1], self.to_top(F.relu(e[-1]).permute(0, 2, 3, 1).flatten(1))]

    def top(self, e):
        """mu, logvar (B,z_dim) of q(z_L | x), and what IAF is told of x (B,hidden), from e_L."""
        mu, logvar, context = e.to(self.stem.weight.dtype).tensor_split((self.z_dim, 2 * self.z_dim), 1)
        return mu, bounded(logvar), context

    def decode(self, z):
        """z_1 -> parameters of p(x | z_1), (B,C,K,H,W)."""
        H, W = self.size
        params = self.out(F.relu(self.down[0](z))).to(self.out.weight.dtype)
        return F.pixel_shuffle(params, self.patch)[..., :H, :W].unflatten(1, self.shape)


# ---- the maths


def draw(mu, logvar, temperature=1.0):
    return mu + temperature * torch.exp(logvar / 2) * torch.randn_like(mu)


def log_normal(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over all but the batch."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar)).flatten(1).sum(1)


def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(q || p) of diagonal Gaussians, summed over all but the batch."""
    ratio = torch.exp(logvar_q - logvar_p) + (mu_q - mu_p) ** 2 * torch.exp(-logvar_p)
    return 0.5 * (ratio - 1 - (logvar_q - logvar_p)).flatten(1).sum(1)


def log_prob(params, x, likelihood):
    """log p(x | z_1), pixels independent. params (B,C,K,H,W), x (B,C,H,W) in {0,1} or {0..255} -> (B,)."""
    if likelihood == "bernoulli":
        return F.logsigmoid((2 * x - 1) * params[:, :, 0]).sum((1, 2, 3))
    log_p = logistic_mixture(x.flatten(0, 1)[:, None].float(), params.flatten(0, 1))
    return log_p.unflatten(0, x.shape[:2]).sum((1, 2, 3))


def components(model):
    """mu, logvar (K,z_dim) of the VampPrior: the posteriors of K images that are learned."""
    return model.top(model.encode(2 * model.pseudo.clamp(0, 1) - 1)[-1])[:2]


def log_prior(model, z):
    """log p(z_L). z (B,z_dim) -> (B,)."""
    if model.pseudo is not None:  # a mixture of K Gaussians
        mu, logvar = components(model)
        log_p = -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu) ** 2 * torch.exp(-logvar)).sum(2)  # (B,K)
        return torch.logsumexp(log_p, 1) - math.log(len(mu))
    total = 0
    for step in model.flow:  # change of variables: u = f(z), p(z) = N(u) |du/dz|
        z, log_det = step(z)
        total = total + log_det
    return total + log_normal(z, torch.zeros_like(z), torch.zeros_like(z))


class Draw(NamedTuple):
    """A level of the chain, drawn from the posterior; log q, log p and KL(q || p) are (B,)."""

    z: torch.Tensor
    shift: torch.Tensor  # what x adds to the mean, in standard deviations of the prior
    log_q: torch.Tensor
    log_p: torch.Tensor
    kl: torch.Tensor  # in closed form where both are Gaussian, else log q - log p at this z


def infer(model, e):
    """z_L ~ q(z_L | x), z_l ~ q(z_l | z_l+1, x) down the chain, from e = model.encode(x) -> parameters of p(x | z_1), Draws."""
    mu, logvar, context = model.top(e[-1])
    z = draw(mu, logvar)
    log_q = log_normal(z, mu, logvar)
    for step in model.iaf:
        z, log_det = step(z, context)
        log_q = log_q - log_det
    log_p = log_prior(model, z)
    plain = model.pseudo is None and not len(model.flow) and not len(model.iaf)
    zeros = torch.zeros_like(mu)
    draws = [Draw(z, mu, log_q, log_p, gaussian_kl(mu, logvar, zeros, zeros) if plain else log_q - log_p)]
    for level, down, e_l in reversed(list(zip(model.below, model.down[1:], e[:-1], strict=True))):
        h = F.relu(down(z))
        p = level.prior(h)
        *q, shift = level.posterior(p, h, e_l)
        z = draw(*q)
        draws.append(Draw(z, shift, log_normal(z, *q), log_normal(z, *p), gaussian_kl(*q, *p)))
    return model.decode(z), draws


def scale(model, x):
    return 2 * x.to(model.stem.weight.dtype, memory_format=torch.channels_last) / model.white - 1  # [-1,1]


def elbo(model, x, cfg):
    """log p(x | z_1) (B,) and the levels' KLs (L,B) from the top down: the bound is the first less the sum of the others."""
    params, draws = infer(model, model.encode(scale(model, x)))
    return log_prob(params, x, cfg.likelihood), torch.stack([d.kl for d in draws])


def loss(model, x, cfg, weight=1.0):
    """What is minimised, a mean over the batch: -ELBO with the KLs weighted, and none of a level under --free-bits."""
    log_px, kls = elbo(model, x, cfg)
    return weight * kls.mean(1).clamp(min=cfg.free_bits or -math.inf).sum() - log_px.mean(), log_px, kls


def sample_prior(model, n, temperature=1.0):
    """n draws of z_L (n,z_dim)."""
    if model.pseudo is not None:
        mu, logvar = components(model)
        pick = torch.randint(len(mu), (n,), device=mu.device)
        return draw(mu[pick], logvar[pick], temperature)
    z = temperature * torch.randn(n, model.z_dim, device=model.stem.weight.device)
    for step in reversed(model.flow):
        z = step.inverse(z)
    return z


def descend(model, z, temperature=1.0):
    """From z_L down the chain, each level drawn from its prior: -> parameters of p(x | z_1)."""
    for level, down in reversed(list(zip(model.below, model.down[1:], strict=True))):
        z = draw(*level.prior(F.relu(down(z))), temperature)
    return model.decode(z)


def mean(params, likelihood):
    """E[x | z_1], (B,C,H,W) in [0,1]."""
    if likelihood == "bernoulli":
        return torch.sigmoid(params[:, :, 0])
    logits, means, log_scales = params.unflatten(2, (3, -1)).unbind(2)
    s = torch.exp(log_scales.clamp(min=-7))
    means = s * (F.softplus((means + 1) / s) - F.softplus((means - 1) / s)) - 1  # of logistics clipped to [-1,1]
    return ((torch.softmax(logits, 2) * means).sum(2) + 1) / 2


def log_weights(model, x, k, cfg, e=None):
    """k draws of log p(x, z) - log q(z | x), (B,k). e: model.encode(scale(model, x)), where it is there already."""
    e = model.encode(scale(model, x)) if e is None else e
    params, draws = infer(model, [a.repeat_interleave(k, 0) for a in e])
    log_w = log_prob(params, x.repeat_interleave(k, 0), cfg.likelihood) + sum(d.log_p - d.log_q for d in draws)
    return log_w.view(len(x), k)


def iw_bound(log_w, k):
    """The bound of k importance samples on log p(x), the mean over as many groups of k as there are. log_w (B,n) -> (B,)."""
    groups = log_w[:, :log_w.shape[1] // k * k].unflatten(1, (-1, k))
    return (torch.logsumexp(groups, 2) - math.log(k)).mean(1)


# ---- two remedies: a flow for the prior, an autoregressive flow for the posterior


class Coupling(nn.Module):
    """One step of the flow prior: z (B,D) -> (B,D) and log |det|, (B,)."""

    def __init__(self, D, hidden):
        super().__init__()
        self.split = D // 2
        self.net = nn.Sequential(nn.Linear(self.split, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 zero(nn.Linear(hidden, 2 * (D - self.split))))

    def forward(self, z):
        z = z.flip(1)
        return affine_coupling(z, self.net(z[:, :self.split]), self.split)

    def inverse(self, u):
        return affine_coupling(u, self.net(u[:, :self.split]), self.split, reverse=True)[0].flip(1)


class IAFStep(nn.Module):
    """z' = sigma z + (1 - sigma) m, where m_i and sigma_i see z_1 ... z_i-1 and what the encoder has to say."""

    def __init__(self, D, hidden, context):
        super().__init__()
        self.first, self.context = nn.Linear(D, hidden), nn.Linear(context, hidden, bias=False)
        self.out = nn.Linear(hidden, 2 * D)
        place, degree = torch.arange(D), torch.arange(hidden) % D - 1  # a unit of degree m sees z at places up to m
        self.register_buffer("mask_in", (degree[:, None] >= place).float(), persistent=False)
        self.register_buffer("mask_out", (place[:, None] > degree).float().repeat(2, 1), persistent=False)

    def forward(self, z, context):
        """z (B,D) -> (B,D) and log |det|, (B,)."""
        z = z.flip(1)
        h = F.elu(F.linear(z, self.first.weight * self.mask_in, self.first.bias) + self.context(context))
        m, s = F.linear(h, self.out.weight * self.mask_out, self.out.bias).to(z.dtype).chunk(2, 1)
        log_sigma = F.logsigmoid(s + 2)
        return m + torch.exp(log_sigma) * (z - m), log_sigma.sum(1)


# ---- the loops

# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    iw_samples temperature""".split()


def choose(cfg, H, W):
    """cfg, with what the size of the images and the number of levels decide where nothing was said."""
    cfg.patch = cfg.patch or (2 if min(H, W) < 16 else 4)
    cfg.blocks = cfg.blocks or (2 if cfg.levels > 1 else 1)
    return cfg


def to_levels(x, cfg, generator=None):
    """x uint8 in {0..255} -> the levels that are modelled, int64: a draw of {0,1} with probability x / 255, or x itself."""
    if cfg.likelihood != "bernoulli":
        return x.long()
    return (torch.rand(x.shape, generator=generator).to(x.device) * 255 < x).long()


def to_uint8(x):
    return (255 * x).round().byte().cpu()


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(model, ema, data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    if cfg.likelihood == "bernoulli" and cfg.binarize == "static":
        data = data._replace(train=to_levels(data.train, cfg, torch.Generator().manual_seed(1)).byte() * 255)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, (0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run.begin(parts)
    objective = torch.compile(loss) if cfg.compile else loss
    model.train()
    for step in run.steps():
        x, _ = run.batch(data)
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        with run.autocast():
            nats, log_px, kls = objective(model, to_levels(x, cfg), cfg, cfg.beta * min(1, (step + 1) / (cfg.kl_warmup + 1)))
        norm = run.update(nats / x[0].numel(), model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        levels = {f"kl_{cfg.levels - i}": kl for i, kl in enumerate(kls.mean(1))}
        run.log(loss=nats / x[0].numel(), elbo=log_px.mean() - kls.mean(1).sum(), **levels, grad_norm=norm, lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(generate(ema, 80, cfg, run))
    run.save(parts)
    run.check()


@torch.no_grad()
def evaluate(ema, data, cfg, run):
    """Bounds on -log p(x) over the whole test split, which is binarised once; KL and active units of each level."""
    torch.manual_seed(cfg.seed)
    test = to_levels(data.test, cfg, torch.Generator().manual_seed(0))
    sums, shifts = {}, [[] for _ in range(cfg.levels)]
    each = min(cfg.iw_samples, 4)  # draws at once, few enough to stay in the cache
    for x in test.split(at_once(test.shape[1:])):
        x = x.to(run.device)
        e = ema.encode(scale(ema, x))
        params, draws = infer(ema, e)
        log_px = log_prob(params, x, cfg.likelihood)
        metrics = {"elbo": sum(d.kl for d in draws) - log_px, "reconstruction": -log_px}
        for i, d in enumerate(draws):
            metrics[f"kl_{cfg.levels - i}"] = d.kl
            shifts[i].append(d.shift.flatten(1).cpu())
        chunks = []
        while len(chunks) * each < cfg.iw_samples:
            run.check()
            chunks.append(log_weights(ema, x, each, cfg, e).cpu().double())
        log_w = torch.cat(chunks, 1)[:, :cfg.iw_samples]
        for k in {10**i for i in range(9) if 10**i <= cfg.iw_samples} | {cfg.iw_samples}:
            metrics[f"iw_{k}"] = -iw_bound(log_w, k)
        for name, nats in metrics.items():
            sums[name] = sums.get(name, 0) + nats.cpu().double().sum().item()
    metrics = {f"test_{name}": total / len(test) for name, total in sums.items()}
    metrics["test_bpd"] = metrics[f"test_iw_{cfg.iw_samples}"] / test[0].numel() / math.log(2)
    for i, shift in enumerate(shifts):  # IWAE sec. 5.2: a unit is active if its mean moves with x
        metrics[f"test_active_{cfg.levels - i}"] = (torch.cat(shift).var(0, correction=0) > 0.01).float().mean().item()
    return metrics


def report(metrics, n, cfg):
    """The test figures in words, and a warning for a level that has collapsed onto its prior."""
    k, kind = cfg.iw_samples, f"{cfg.binarize}ally binarised, the test split once with seed 0"
    bounds = {int(name[8:]): nats for name, nats in metrics.items() if name.startswith("test_iw_")}
    print(f"test -log p(x) <= {bounds[k]:.3f} nats, {metrics['test_bpd']:.4f} bits/dim (importance-weighted, k = {k}; all {n} "
          f"test images, {kind if cfg.likelihood == 'bernoulli' else '8 bits'}), -elbo {metrics['test_elbo']:.3f}")
    print("bound by k:", ", ".join(f"{k}: {nats:.3f}" for k, nats in sorted(bounds.items())))
    for level in range(cfg.levels, 0, -1):
        kl, active = metrics[f"test_kl_{level}"], metrics[f"test_active_{level}"]
        collapsed = active < 0.05 and n > 1  # the mean of one image does not move
        print(f"z_{level}: kl {kl:.2f} nats, {100 * active:.0f} % of its units active"
              + "; WARNING: it has collapsed onto its prior, --free-bits or a longer --kl-warmup may help" * collapsed)


@torch.no_grad()
def generate(ema, n, cfg, run):
    """n images (n,C,H,W) uint8, the means of p(x | z_1), from the averaged weights and the noise of --seed."""
    torch.manual_seed(cfg.seed)
    images, most = [], at_once(run.facts["shape"])
    for done in range(0, n, most):
        run.check()
        params = descend(ema, sample_prior(ema, min(most, n - done), cfg.temperature), cfg.temperature)
        images.append(to_uint8(mean(params, cfg.likelihood)))
    return torch.cat(images)


@torch.no_grad()
def show(ema, data, cfg, run):
    """reconstructions.png: pairs of a test image and its mean; interpolations.png: a row a pair of test images, on a line
    between their z_L; manifold.png, where z_L has two dimensions: the images of a grid of the prior's quantiles in each."""
    torch.manual_seed(cfg.seed)
    x = to_levels(data.test[:40], cfg, torch.Generator().manual_seed(0)).to(run.device)
    e = ema.encode(scale(ema, x))
    params, draws = infer(ema, e)
    pairs = torch.stack([to_uint8(x / ema.white), to_uint8(mean(params, cfg.likelihood))], 1)
    save_grid(pairs.flatten(0, 1), run.out / "reconstructions.png", 10)
    z = draws[0].z[:10, None]
    line = torch.lerp(z, z.roll(1, 0), torch.linspace(0, 1, 10, device=z.device)[:, None])  # (10, 10, z_dim)
    grids = {"interpolations": (line.flatten(0, 1), 10)}
    if cfg.z_dim == 2:
        across, up = sample_prior(ema, 10_000).quantile(torch.linspace(0.02, 0.98, 20, device=z.device), 0).unbind(1)
        grids["manifold"] = torch.cartesian_prod(up.flip(0), across).flip(1), 20
    for name, (z, columns) in grids.items():
        save_grid(to_uint8(mean(descend(ema, z, 0.0), cfg.likelihood)), run.out / f"{name}.png", columns)


# ======== plumbing, byte-identical in all six scripts (python tools/sync.py): nothing about the model is in it ========

import argparse
import collections
import contextlib
import dataclasses
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
import urllib.request
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn, get_args, get_origin

import torch.distributed as dist
from PIL import ImageOps
from tqdm import tqdm

MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
SHA256 = {  # of the decompressed files, of the archive itself for cifar10
    "mnist": {"train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion_mnist": {"train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                      "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                      "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                      "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
}
TIMEOUT = 20  # seconds a mirror may stay silent


class Data(NamedTuple):
    """Images (N,C,H,W) uint8 and labels (N,) int64, which are all 0 where there are no classes."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: int  # 0 where there are no labels


def at_once(shape, values=3072):
    """Images (C,H,W) to evaluate or sample at once, whatever --batch-size is: 250, fewer where they have more values."""
    return max(min(250, 250 * values // math.prod(shape)), 1)


def fail(message, code=2) -> NoReturn:
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever an exception's text holds
    raise SystemExit(code)


def fetch(name, file, data_dir):
    """The content of one file of a data set, checked by SHA-256: from --data-dir, Debian's folder or the first good mirror."""
    folder, packed, tried = Path(data_dir) / name, file if file.endswith(".tar.gz") else f"{file}.gz", []
    folders = [folder] + [Path("/usr/share/datasets/fashion-mnist")] * (name == "fashion_mnist")
    places = [place / f for place in folders for f in dict.fromkeys((packed, file)) if (place / f).exists()]
    for source in [*places, *(mirror + packed for mirror in MIRRORS[name])]:
        try:
            if source in places:
                raw = source.read_bytes()
            else:
                with (urllib.request.urlopen(source, timeout=TIMEOUT) as response,
                      tqdm.wrapattr(response, "read", response.length, desc=packed, disable=None) as stream):
                    raw = b"".join(iter(lambda: stream.read(1 << 16), b""))
            content = gzip.decompress(raw) if str(source).endswith(f"{file}.gz") else raw
            if hashlib.sha256(content).hexdigest() != SHA256[name][file]:
                raise ValueError("wrong SHA-256")
            if source not in places:
                write(folder / packed, lambda f, raw=raw: f.write(raw))
            return content
        except Exception as e:  # whatever a mirror sends, or a disk holds: the next may be good
            tried.append(f"{source} ({e or type(e).__name__})")
    fail(f"no good copy of {folder / packed}: tried {', '.join(tried)}; put it there, or use --dataset digits (no network)", 1)


def load_folder(root, size):
    """A folder of images, else its subfolders as classes; every tenth image by name is held out as the test split.

    Grey only where all are grey, else RGB; transparency is laid over white. Each image is scaled to cover size x size, or
    the commonest size where size is 0, and cropped at the centre. What cannot be read is named and skipped.
    """
    known, images, broken = Image.registered_extensions(), {}, []
    for path in sorted(p for p in (*root.glob("*"), *root.glob("*/*")) if p.suffix.lower() in known and p.is_file()):
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits a pixel
                    image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
                if "A" in image.getbands() or "transparency" in image.info:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                image = image.convert("L" if image.mode in ("1", "L") else "RGB")
                images[path] = ImageOps.fit(image, (size, size)) if size else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            broken.append(f"{path} ({e})")
    if broken:
        print(f"skipped {len(broken)} broken images: {'; '.join(broken)}", file=sys.stderr)
    if len(images) < 2:
        fail(f"--dataset {root}: {len(images)} readable images in it or in its subfolders, at least 2 are needed")
    folders = sorted({path.parent for path in images})
    if root in folders[:-1]:
        fail(f"--dataset {root}: holds images as well as subfolders of images; move either away")
    target = collections.Counter(image.size for image in images.values()).most_common(1)[0][0]
    mode = "L" if all(image.mode == "L" for image in images.values()) else "RGB"
    x = np.stack([np.atleast_3d(np.asarray(ImageOps.fit(image.convert(mode), target))) for image in images.values()])
    x, held = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.arange(len(x)) % 10 == 1
    y = torch.tensor([folders.index(path.parent) for path in images])
    mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # so that the first n are of all classes
    x, y, held = x[mixed], y[mixed], held[mixed]
    return Data(x[~held], y[~held], x[held], y[held], 0 if root in folders else len(folders))


def load_data(name, data_dir, image_size=0) -> Data:
    """digits, mnist, fashion_mnist, cifar10 or a folder of images, whole in memory."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits, order = load_digits(), np.random.RandomState(0).permutation(1797)
        x, y = np.round(digits.images[order, None] * 255 / 16).astype(np.uint8), digits.target[order]
        parts = x[297:], y[297:], x[:297], y[:297]
    elif name in ("mnist", "fashion_mnist"):
        raw = [np.frombuffer(fetch(name, file, data_dir), np.uint8) for file in SHA256[name]]
        parts = [r[8:] if i % 2 else r[16:].reshape(-1, 1, 28, 28) for i, r in enumerate(raw)]
    elif name == "cifar10":
        archive = tarfile.open(fileobj=io.BytesIO(fetch(name, "cifar-10-binary.tar.gz", data_dir)))
        files = sorted(f for f in archive.getnames() if f.endswith(".bin"))  # data_batch_1 to 5, test_batch
        rows = np.frombuffer(b"".join(archive.extractfile(f).read() for f in files), np.uint8).reshape(-1, 3073)
        x, y = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
        parts = x[:50_000], y[:50_000], x[50_000:], y[50_000:]
    elif Path(name).is_dir():
        return load_folder(Path(name), image_size)
    else:
        fail(f"--dataset {name}: neither digits, mnist, fashion_mnist nor cifar10, nor a folder")
    x, y, x_test, y_test = (torch.tensor(p) for p in parts)
    if image_size and x.shape[-2:] != (image_size, image_size):
        x, x_test = (F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True) for part in (x, x_test))
    return Data(x, y.long(), x_test, y_test.long(), 10)


def parse_args(config_class, argv=None):
    """The command line built from the dataclass: a flag a field, its comment as help -> the config, the names given.

    A bound in the comment, (> 0), (>= 0) or (0 to 1), is checked. Whatever is wrong is one line and exit code 2.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    for field in dataclasses.fields(config_class):
        kind, origin = (*get_args(field.type), field.type)[0], get_origin(field.type)
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": get_args(field.type)} if origin is Literal else
                   {"type": kind, "metavar": kind.__name__, "nargs": "+" if origin is tuple else None})
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if bound := re.search(r"\((>=?)? ?([\d.]+)(?: to ([\d.]+))?\)", comments[name]):
            sign, low, high = bound[1], float(bound[2]), float(bound[3] or sys.float_info.max)
            for v in value if isinstance(value, tuple) else (value,):
                if not low <= v <= high or sign == ">" and v == low:
                    parser.error(f"argument --{name.replace('_', '-')}: {v}: must be {bound[0][1:-1]}")
    return config_class(**given), set(given)


def set_up(cfg):
    """The device, this process's rank and the number of processes (torchrun's); kernels.mode from --kernels."""
    rank, local, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind = there[0] if cfg.device == "auto" else cfg.device
    if kind not in there:
        fail(f"--device {kind}: not available here, there is {', '.join(there)}")
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size}: cannot be split over {world} processes")
    mode = os.environ.get("M2_KERNELS", "auto") if cfg.kernels == "auto" else cfg.kernels
    try:
        import kernels
        runs, why = kernels.available(kind)  # PyPI's unrelated package of this name has none
        kernels.mode = mode
    except (ImportError, AttributeError):
        runs, why = False, "the folder kernels/ is not beside this script"
    if mode not in ("auto", "torch", "triton") or mode == "triton" and not runs:
        fail(f"--kernels {mode}: {why if mode == 'triton' else 'M2_KERNELS must be auto, torch or triton'}")
    if world > 1 and not dist.is_initialized():
        torch.cuda.set_device(local) if kind == "cuda" else None
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(f"cuda:{local}" if kind == "cuda" else kind), rank, world


def write(path, save):
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


def save_grid(images, path, columns):
    """Images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged."""
    rows = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)  # (rows*(H+2), columns*(W+2)[, C])
    image = ImageOps.scale(Image.fromarray(grid.numpy()), max(1, 56 // max(images.shape[2:])), Image.NEAREST)
    write(path, lambda f: image.save(f, "png"))


@lru_cache(maxsize=4)
def shuffle(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class Run:
    """One run: its directory, checkpoint, log, progress bar, budget and stop signals. Only rank 0 writes.

    Everything random in a step follows from (seed, step, rank), so that the step stands for all states of generators.
    """

    def __init__(self, cfg, given, free):
        self.cfg, self.script, self.signal, self.saved = cfg, Path(__file__).stem, 0, {}
        cfg.out = cfg.out or f"runs/{self.script}-{Path(cfg.dataset).name}"
        self.out, self.path, self.metrics = Path(cfg.out), Path(cfg.out) / "checkpoint.pt", Path(cfg.out) / "metrics.jsonl"
        if cfg.resume or cfg.mode != "train":
            self.load()
            given = given | {"mode", "out", "resume", "overwrite"}
            given |= {"steps", "minutes"} if {"steps", "minutes"} & given else set()
            for name, value in self.saved["config"].items():
                if name not in given:
                    setattr(cfg, name, value)
                elif name not in free and getattr(cfg, name) != value:
                    fail(f"--{name.replace('_', '-')} {getattr(cfg, name)}: the run in {self.path} has {value}")
        elif self.out.is_dir() and any(self.out.iterdir()) and not cfg.overwrite:
            fail(f"--out {self.out}: is not empty; --resume continues a run, --overwrite replaces it")
        self.step, self.seconds, self.facts = (self.saved.get(name, 0) for name in ("step", "seconds", "facts"))
        self.device, self.rank, self.world = set_up(cfg)
        self.scaler, self.sums = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "fp16"), collections.Counter()
        dtype = torch.float16 if cfg.amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, self.device.type, dtype, enabled=cfg.amp != "off")

    def load(self):
        try:
            saved = self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            fail(f"--out {self.out}: there is no checkpoint.pt in it")
        except Exception as e:  # whatever a damaged or hostile file raises: nothing in it is run
            fail(f"{self.path}: not a whole checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:80]})")
        if not isinstance(saved, dict) or saved.get("format") != 1 or not {"script", "config", "step", "facts"} <= saved.keys():
            fail(f"{self.path}: not a checkpoint of a run in format 1 (weights alone, or another version)")
        if saved["script"] != self.script:
            fail(f"{self.path}: is a checkpoint of {saved['script']}.py, not of {self.script}.py")
        if fields := saved["config"].keys() ^ {f.name for f in dataclasses.fields(self.cfg)}:
            fail(f"{self.path}: of another version, whose config differs in {', '.join(sorted(fields))}")

    def describe(self, data):
        """Note what the data is; a checkpoint of other data is refused."""
        self.facts = {"shape": list(data.train.shape[1:]), "classes": data.classes, "train_images": len(data.train)}
        if self.saved and self.saved["facts"] != self.facts:
            fail(f"--dataset {self.cfg.dataset}: is {self.facts}, the run in {self.path} had {self.saved['facts']}")

    def restore(self, parts):
        """Load each named part from the checkpoint, if there is one, and from now on catch stop signals."""
        for name, part in parts.items() if self.saved else ():
            if name not in self.saved:
                fail(f"{self.path}: holds no {name}")
            part.load_state_dict(self.saved[name])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def begin(self, parts):
        """Restore, lay out the directory and save once: what cannot be written is found before any training."""
        self.restore(parts | {"scaler": self.scaler})
        if self.rank == 0:
            lines = [m for m in self.read_metrics() if m["step"] <= self.step and "final" not in m] if self.saved else []
            for old in () if self.saved else self.out.glob("samples/step_*.png"):
                old.unlink()
            write(self.metrics, lambda f: f.write("".join(json.dumps(m) + "\n" for m in lines).encode()))
            write(self.out / "config.json", lambda f: f.write(json.dumps(dataclasses.asdict(self.cfg), indent=1).encode()))
        self.save(parts)

    def save(self, parts):
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in (parts | {"scaler": self.scaler}).items()}
            state |= {"format": 1, "script": self.script, "config": dataclasses.asdict(self.cfg), "facts": self.facts,
                      "step": self.step, "seconds": self.seconds}
            torch.save(state, buffer := io.BytesIO())
            write(self.path, lambda f: f.write(buffer.getbuffer()))

    def on_signal(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def check(self):
        """Exit if a stop signal has come; called between the batches of evaluation and sampling."""
        if self.signal:
            fail(f"stopped by {signal.Signals(self.signal).name}; --resume continues {self.out}", 128 + self.signal)

    def steps(self):
        """Yield step after step until --steps, --minutes or a stop signal; self.step counts the one under way as done."""
        start, minutes, steps = time.monotonic() - self.seconds, self.cfg.minutes or math.inf, self.cfg.steps or math.inf
        form = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
        with tqdm(total=100, disable=self.rank > 0 or None, desc=self.script, bar_format=form) as self.bar:
            while True:
                self.seconds = time.monotonic() - start
                if self.world > 1:  # all processes stop at the same step
                    state = torch.tensor([self.seconds, self.signal], device=self.device)
                    dist.all_reduce(state, dist.ReduceOp.MAX)
                    self.seconds, self.signal = state[0].item(), int(state[1])
                progress = max(self.step / steps, self.seconds / (60 * minutes))
                self.bar.update(100 * min(progress, 1) - self.bar.n)
                if self.signal or progress >= 1:
                    return
                torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]))
                self.step += 1
                yield self.step - 1

    def batch(self, data):
        """This process's share of the step's images and labels: the next of an endless row of shuffles of the data."""
        n, B = len(data.train), self.cfg.batch_size
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
            bad = next((name for name, grad in grads.items() if not grad.isfinite().all()), "none")
            fail(f"step {self.step}: loss {loss.item()}, first bad gradient that of {bad}; {self.path} is the last good "
                 f"checkpoint, a smaller {rate} may help", 1)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def log(self, **metrics):
        """Average metrics, the loss among them, into a line of metrics.jsonl every --log-every steps."""
        self.sums.update({name: torch.as_tensor(value).detach() for name, value in metrics.items()} | {"count": 1})
        if self.step % self.cfg.log_every == 0:
            means = {name: float(total) / self.sums["count"] for name, total in self.sums.items() if name != "count"}
            self.sums.clear()
            self.write_metrics(**means)
            self.bar.set_postfix_str(f"step {self.step} loss {means['loss']:.4f} {self.step / self.seconds:.1f} steps/s")

    def read_metrics(self):
        """The lines of metrics.jsonl but those that a crash or a full disk cut short."""
        lines = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def write_metrics(self, **metrics):
        if self.rank == 0:
            try:
                with open(self.metrics, "a") as f:
                    f.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 3)} | metrics) + "\n")
            except OSError as e:
                fail(f"cannot write {self.metrics}: {e.strerror or e}", 1)

    def show(self, images):
        """The newest grid: samples.png, and samples/ under its step."""
        for name in (f"samples/step_{self.step:06d}.png", "samples.png") if self.rank == 0 else ():
            save_grid(images, self.out / name, 10)

    def curves(self):
        """Every metric against the step, as curves.png."""
        if self.rank == 0:
            from matplotlib.figure import Figure

            lines = self.read_metrics()
            names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in ("step", "seconds")]
            figure = Figure((4 * max(len(names), 1), 3), layout="tight")
            for i, name in enumerate(names):
                axis = figure.add_subplot(1, len(names), i + 1, title=name, xlabel="step")
                axis.plot([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
            write(self.out / "curves.png", lambda f: figure.savefig(f, format="png"))


def launch(main):
    """main(), with what the machine refuses (files, memory, kernels) said in one line."""
    try:
        main()
    except OSError as e:
        fail(f"{e.filename or Path(__file__).stem}: {e.strerror or e}", 1)
    except (MemoryError, RuntimeError) as e:
        if "kernels.mode is 'triton'" in str(e):
            fail(f"--kernels triton: {e}")
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        fail(f"out of memory, a smaller --batch-size or --width helps ({(str(e) or 'no more').splitlines()[0]})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======== end of the plumbing ========================================================================================


def main(argv=None):
    cfg, given = parse_args(Config, argv)
    if cfg.steps is None and cfg.minutes is None:
        cfg.steps = 2000
    run = Run(cfg, given, FREE)
    if cfg.mode != "sample":
        data = load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        run.describe(data)
    C, H, W = run.facts["shape"]
    choose(cfg, H, W)
    torch.manual_seed(cfg.seed)
    try:
        model = VAE(C, H, W, cfg)
    except ValueError as e:
        fail(str(e))
    model = model.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if cfg.mode == "train":
        train(model, ema, data, cfg, run)
        run.curves()
    else:
        run.restore({"ema": ema})
    if run.rank > 0:
        return
    if cfg.mode != "sample":
        metrics = evaluate(ema, data, cfg, run)
        run.write_metrics(final=True, **metrics)
        report(metrics, len(data.test), cfg)
        show(ema, data, cfg, run)
    if cfg.mode != "eval":
        images = generate(ema, cfg.num_samples, cfg, run)
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, images=images.permute(0, 2, 3, 1).numpy()))
        save_grid(images[:80], run.out / "samples.png", 10)
        print(f"{len(images)} samples in {run.out / 'samples.npz'}, the first of them in {run.out / 'samples.png'}")
    run.check()


if __name__ == "__main__":
    launch(main)
