"""Diffusion: a hierarchical VAE whose fixed encoder adds noise, x_t = alpha_t x + sigma_t eps.

A hierarchical VAE learns a chain p(z_L) p(z_L-1 | z_L) ... p(x | z_1) and an encoder for it. This
is hard: levels collapse, and deep chains hardly train. The remedy shown here is an encoder that is
fixed to a Gaussian Markov chain. Each level's KL is then a squared error, one network learns it for
all levels at once, and the number of levels may go to infinity. A chain asks its network many times
for one image. Consistency tuning teaches the network to give the end of its chain from any point.

Papers: DDPM (Ho 2020), DDIM (Song 2021), VDM (Kingma 2021), v (Salimans 2022), DPM-Solver++ (Lu
2022), flow matching (Lipman 2023), consistency models (Song 2023; Song & Dhariwal 2023).
  q(x_t | x), all schedules ........... SCHEDULES, q_sample   DDPM eq. 4, flow matching eq. 20
  what the network predicts ........... TARGETS, denoise      Salimans sec. 4 and app. D
  training loss ....................... METHODS, loss         DDPM eq. 14
  DDPM, DDIM, DPM-Solver++(2M), Heun .. sample                DDPM eq. 7, DDIM eq. 12, DPM alg. 2
  consistency tuning .................. consistency_loss      Song & Dhariwal 2023 eq. 7
  evidence lower bound, three terms ... elbo                  VDM eqs. 11 and 17

  python diffusion.py                                         # digits, needs no download
  python diffusion.py --dataset mnist --minutes 10            # MNIST on two CPU cores
  python diffusion.py --dataset mnist --consistency --init runs/diffusion-mnist --out runs/fast
The second gives 1.13 bits/dim and a Frechet distance of 0.064 on Zen 5; real images have 0.037.
"""

import copy
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.attention import attention
    from kernels.group_norm import group_norm_silu
except ImportError:
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def group_norm_silu(x, groups, weight, bias, eps=1e-5):
        return F.silu(torch.group_norm(x, groups, weight, bias, eps))


@dataclass
class Config:
    # model
    method: Literal["flow", "jit", "v", "ddpm", "cosine"] = "flow"  # row of METHODS; it sets the next four flags that are auto
    schedule: Literal["auto", "straight", "cosine", "linear"] = "auto"  # how alpha_t and sigma_t depend on t
    predict: Literal["auto", "eps", "x", "v", "velocity"] = "auto"  # what the network predicts
    loss_on: Literal["auto", "eps", "x", "v", "velocity"] = "auto"  # whose squared error is the loss
    times: Literal["auto", "uniform", "logit-normal", "noisy"] = "auto"  # distribution of t in training
    patch: int = 0  # pixels a side that become channels at the input; 0 means 1 below 16 pixels, else 2 (0 to 64)
    width: int = 32  # channels of the first level (1 to 4096)
    mults: tuple[int, ...] = (1, 2)  # factors of --width, one for each level; each further one halves the image (1 to 64)
    blocks: int = 1  # residual blocks a level (1 to 64)
    n_head: int = 4  # attention heads at the lowest level, 0 for no attention (0 to 256)
    # training
    labels: bool = True  # condition on the class
    label_dropout: float = 0.1  # share of labels that are hidden in training, for guidance (0 to 1)
    dropout: float = 0.0  # rate of dropout in the residual blocks (0 to 1)
    consistency: bool = False  # tune the network of --init to give the end of its chain, guided, in one evaluation
    optimizer: Literal["muon", "adam"] = "muon"  # of the matrices inside the network; all else moves by Adam
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    # evaluation and sampling, free to change on a trained model
    decoder_logsnr: float = 5.0  # log SNR at which elbo ends the chain of latents and begins the decoder (0 to 14)
    elbo_samples: int = 8  # values of t that elbo draws for each image (1 to 10000)
    sampler: Literal["auto", "ddim", "ddpm", "dpm++", "heun", "consistency"] = "auto"  # auto: dpm++, tuned consistency
    nfe: int = 0  # most network evaluations a sample, two a guided step; never less than a step; 0: 20, tuned 2 (0 to 10000)
    guidance: float = 1.5  # classifier-free guidance: 0 drops the label, 1 is conditional, more is sharper (0 to 1000)
    guidance_interval: tuple[float, float] = (-3.0, 1.0)  # guide at log SNR from LOW to HIGH only (-14 to 14)
    label: str | None = None  # sample this class only, by its name or number; else all in turn
    inpaint: str | None = None  # complete test images; given is their left, right, top or bottom, or the white of a mask image
    # core, the same in all six scripts
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (0 to 4096)
    batch_size: int = 32  # images a step, over all processes (1 to 65536)
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


# ---- the maths
# t in [0,1] runs from data to noise; x is in [-1,1]; lambda_t = log(alpha_t^2 / sigma_t^2) is the log SNR.
# One level of the chain, x_t = alpha x + sigma eps; d_alpha and d_sigma are the derivatives with respect to t.
Level = namedtuple("Level", "alpha sigma d_alpha d_sigma")
BETA_0 = 0.1  # DDPM's rate of noise, beta(t) = BETA_0 + SLOPE t: from 0.1 to 20
SLOPE = 19.9


def straight(t):  # flow matching (there t runs the other way) and rectified flow: a line from x to eps
    return Level(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def cosine(t):  # Nichol 2021, without the paper's small offset
    alpha = torch.cos(math.pi / 2 * t)
    sigma = torch.sin(math.pi / 2 * t)
    return Level(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


def linear(t):  # DDPM in continuous time: Song 2021, the SDE paper, eq. 33
    half_beta = (BETA_0 + SLOPE * t) / 2
    log_alpha = -t * BETA_0 / 2 - t**2 * SLOPE / 4
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()  # alpha^2 + sigma^2 = 1
    return Level(alpha, sigma, -half_beta * alpha, half_beta * alpha**2 / sigma)


def linear_time(logsnr):
    """The positive root, without cancellation, of BETA_0 t + SLOPE t^2 / 2 = -2 log alpha = log(1 + exp(-lambda))."""
    c = F.softplus(-logsnr)
    return 2 * c / (BETA_0 + (BETA_0**2 + 2 * SLOPE * c).sqrt())


Schedule = namedtuple("Schedule", "level time")  # two functions: t -> Level, and log SNR -> t
SCHEDULES = {
    "straight": Schedule(straight, lambda logsnr: torch.sigmoid(-logsnr / 2)),
    "cosine": Schedule(cosine, lambda logsnr: 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))),
    "linear": Schedule(linear, linear_time),
}
TARGETS = {  # What a network may predict is a x + b eps. Each row: Level -> (a, b).
    "eps": lambda level: (torch.zeros_like(level.alpha), torch.ones_like(level.alpha)),
    "x": lambda level: (torch.ones_like(level.alpha), torch.zeros_like(level.alpha)),
    "v": lambda level: (-level.sigma, level.alpha),  # Salimans 2022, app. D
    "velocity": lambda level: (level.d_alpha, level.d_sigma),  # dx_t / dt
}
METHODS = {  # Ho 2020 (L_simple), Nichol 2021, Salimans 2022, Lipman 2023 with the times of Esser 2024, Li & He 2025
    "ddpm": {"schedule": "linear", "predict": "eps", "loss_on": "eps", "times": "uniform"},
    "cosine": {"schedule": "cosine", "predict": "eps", "loss_on": "eps", "times": "uniform"},
    "v": {"schedule": "cosine", "predict": "v", "loss_on": "v", "times": "uniform"},
    "flow": {"schedule": "straight", "predict": "velocity", "loss_on": "velocity", "times": "logit-normal"},
    "jit": {"schedule": "straight", "predict": "x", "loss_on": "velocity", "times": "noisy"},
}
TIMES = {"logit-normal": (0.0, 1.0), "noisy": (0.8, 0.8)}  # mean and deviation of log(t / (1 - t))
MAX_WEIGHT = 400.0  # of an image's squared error; JiT's 1 / t^2 where t is not below 0.05
# The range of log SNR in training. At -10 almost no signal is left: sampling and elbo begin there. At 14 the noise is a
# ninth of the distance between two of the 256 pixel values. Sampling goes to t = 0; elbo ends at --decoder-logsnr.
MIN_LOGSNR = -10.0
MAX_LOGSNR = 14.0
HUBER = 0.03  # c of the pseudo-Huber loss: as a square below this mean distance of a pixel in [-1,1], as the distance above
CONTEXTS = 32  # levels of a pixel's neighbours; elbo's decoder has a histogram for each
ROUND = 250  # steps of tuning with the same chains


def time_of(logsnr, cfg):
    """The time t at which the chain has this log SNR, in double precision."""
    return SCHEDULES[cfg.schedule].time(torch.as_tensor(logsnr, dtype=torch.float64))


def level_at(t, cfg, x):
    """The level at times t (B,): each entry is (B,1,1,1), of the type and on the device of x."""
    return Level(*(entry.to(x).view(-1, 1, 1, 1) for entry in SCHEDULES[cfg.schedule].level(t)))


def q_sample(x, t, eps, cfg):
    """The encoder of the hierarchical VAE, q(x_t | x) = N(alpha_t x, sigma_t^2). x, eps (B,C,H,W), t (B,)."""
    level = level_at(t, cfg, x)
    return level.alpha * x + level.sigma * eps  # DDPM eq. 4


def loss(model, x, y, cfg, t=None, eps=None):
    """Squared error of --loss-on for a network that predicts --predict. x (B,C,H,W) in [-1,1] -> means (B,)."""
    if t is None:
        t = torch.rand_like(x[:, 0, 0, 0])
        if cfg.times != "uniform":
            mean, deviation = TIMES[cfg.times]
            t = torch.sigmoid(mean + deviation * torch.randn_like(t))
        low, high = time_of([MAX_LOGSNR, MIN_LOGSNR], cfg).tolist()
        t = low + (high - low) * t
    eps = torch.randn_like(x) if eps is None else eps
    level = level_at(t, cfg, x)
    a_out, b_out = TARGETS[cfg.predict](level)
    a_loss, b_loss = TARGETS[cfg.loss_on](level)
    out = model(q_sample(x, t, eps, cfg), t, y)
    error = out - (a_out * x + b_out * eps)
    # At fixed x_t an error d in x_hat is an error of -alpha d / sigma in eps_hat. So the target a x + b eps is off by
    # (a - b alpha / sigma) d. The weight is the squared ratio of the two targets' errors.
    weight = ((level.alpha * b_loss - level.sigma * a_loss) / (level.alpha * b_out - level.sigma * a_out)) ** 2
    return (weight.clamp(max=MAX_WEIGHT) * error**2).mean((1, 2, 3))  # DDPM eq. 14 is eps on eps, where the weight is 1


def denoise(model, x_t, t, y, cfg, guidance=1.0):
    """x_hat, from any prediction: the solution of {alpha x + sigma eps = x_t, a x + b eps = out}."""
    t_in = t.to(x_t)
    if y is None or guidance == 1:
        out = model(x_t, t_in, y)
    else:
        out = model(x_t, t_in, torch.full_like(y, model.classes))  # without the label
        if guidance != 0:
            # Classifier-free guidance (Ho 2022) mixes eps_hat, and its w is guidance - 1. At fixed x_t every target is
            # affine in eps_hat, so mixing the targets is the same.
            out = out + guidance * (model(x_t, t_in, y) - out)
    out = out.to(x_t)
    level = level_at(t, cfg, x_t)
    a, b = TARGETS[cfg.predict](level)
    return (b * x_t - level.sigma * out) / (level.alpha * b - level.sigma * a)


def move(x_t, d, here, there, tau=0.0):
    """x_t at level `here` -> at level `there`, exact where d is the true x; tau leaves room for fresh noise."""
    keep = (there.sigma**2 - tau**2) ** 0.5 / here.sigma
    return keep * x_t + (there.alpha - here.alpha * keep) * d  # DDIM eq. 12


def consistency_loss(model, x_t, t, end, y, cfg):
    """How far x_hat is from the end of the chain that x_t is on. x_t, end (B,C,H,W), t (B,) -> pseudo-Huber distances (B,).
    The end is the one that the teacher's sampler reached. Consistency training takes the network's own answer nearby."""
    x_hat = denoise(model, x_t, t, y, cfg)
    square = ((x_hat - end) ** 2).mean((1, 2, 3))
    return (square + HUBER**2).sqrt() - HUBER  # Song & Dhariwal 2023 eq. 7


def guidance_at(t, y, cfg):
    """The guidance at times t (N,): only in --guidance-interval does it help (Kynkaanniemi 2024). Less than 1 is for all t."""
    if y is None or cfg.consistency:  # a tuned network is guided already
        return torch.ones_like(t)
    noisy, clean = time_of(cfg.guidance_interval, cfg)
    return torch.where((t <= noisy) & (t >= clean) | (cfg.guidance < 1), cfg.guidance, 1.0)


@torch.no_grad()
def sample(model, x, y, cfg, generator=None, before_step=None):
    """Run the chain from noise to data: x (B,C,H,W), N(0, 1) noise -> (B,C,H,W) in [-1,1].

    Every sampler steps from t to t_next by x = move(x, d) + tau noise. They differ in d, the estimate of x, and in tau:
      ddim   d = x_hat(t)                                        tau = 0
      ddpm   d = x_hat(t)                                        tau^2 = variance of q(x_t_next | x_t, x)
      dpm++  d = x_hat(t), extrapolated from the step before     tau = 0
      heun   d = mean of x_hat(t) and x_hat(t_next)              tau = 0, Heun's rule for x_t / sigma
      consistency  d = x_hat(t) of a tuned network               tau = sigma of t_next: all noise is fresh
    The last step goes to t = 0. There sigma = 0, so the chain ends in x_hat itself, and no sampler corrects it.
    before_step(x_t, t) sees the latent before each step, and may return another one (inpainting).
    """
    for n in range(max(cfg.nfe, 1), 0, -1):  # the most steps that take no more than --nfe evaluations
        times = torch.linspace(time_of(MIN_LOGSNR, cfg).item(), 0, n + 1, dtype=torch.float64)
        guidance = guidance_at(times, y, cfg)
        calls = 1 + ((guidance != 0) & (guidance != 1)).int()[:-1]  # with and without the label
        if calls.sum() + (cfg.sampler == "heun") * calls[1:].sum() <= cfg.nfe:
            break
    levels = [Level(*map(float, SCHEDULES[cfg.schedule].level(t))) for t in times]  # of plain numbers
    x = levels[0].sigma * x

    def x_hat(x_t, i):
        t = times[i].expand(len(x_t))
        return denoise(model, x_t, t, y, cfg, guidance[i].item()).clamp(-1, 1)  # no pixel lies outside

    last_d = last_h = None  # of the step before
    for i in range(n):
        t, t_next = times[i : i + 2]
        here, there = levels[i : i + 2]
        changed = before_step(x, t) if before_step else None
        x = x if changed is None else changed
        d = x_hat(x, i)
        tau = 0.0
        if cfg.sampler == "ddpm":
            ratio = here.alpha * there.sigma / (there.alpha * here.sigma)
            tau = there.sigma * max(1 - ratio**2, 0) ** 0.5  # DDPM eq. 7; rounding may go below 0
        elif cfg.sampler == "consistency":  # Song 2023 alg. 1
            tau = there.sigma
        elif cfg.sampler == "dpm++" and t_next > 0:  # DPM-Solver++ alg. 2
            h = math.log(there.alpha * here.sigma / (there.sigma * here.alpha))  # the paper's lambda is half of ours
            first_order = d
            if i > 0:
                d = first_order + h / (2 * last_h) * (first_order - last_d)
            last_d = first_order
            last_h = h
        elif cfg.sampler == "heun" and t_next > 0:
            d = (d + x_hat(move(x, d, here, there), i + 1)) / 2
        x = move(x, d, here, there, tau)
        if tau > 0:
            x = x + tau * torch.randn(x.shape, generator=generator).to(x)
    return x.clamp(-1, 1)


def context(x_seen):
    """The mean of the four pixels beside each one, as one of CONTEXTS levels. (B,C,H,W), about [-1,1] -> (B,C,H,W) int64."""
    padded = F.pad(x_seen, (1, 1, 1, 1), mode="replicate")
    mean = (padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:] + padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]) / 4
    return ((mean + 1) / 2 * CONTEXTS).long().clamp(0, CONTEXTS - 1)


def count_pixels(images, cfg):
    """How often each pixel value stands in each context. images (N,C,H,W) uint8 -> (CONTEXTS,256), nowhere 0."""
    generator = torch.Generator().manual_seed(cfg.seed)
    counts = torch.zeros(CONTEXTS * 256, dtype=torch.float64)
    for x in images.split(1000):
        noise = torch.randn(x.shape, generator=generator)
        row = context(x / 127.5 - 1 + math.exp(-cfg.decoder_logsnr / 2) * noise)
        counts += torch.bincount((256 * row + x).flatten(), minlength=len(counts))
    counts = counts.view(CONTEXTS, 256)
    anywhere = 1 + counts.sum(0)
    return counts + anywhere / anywhere.sum()  # each context sees one more pixel, which may have any value


def decoder_log_prob(x, x_seen, logsnr, counts):
    """log p(x | x_seen) of each pixel: Bayes' rule with the histogram of its context and the noise of x_seen.

    x (B,C,H,W) in {0..255}, counts of count_pixels. x_seen (B,C,H,W) is VDM's z_0 divided by alpha: x in [-1,1] plus
    Gaussian noise. Each pixel's distribution is normalised, so this is a decoder whatever its context is made of.
    """
    log_prior = (counts / counts.sum(1, keepdim=True)).log().to(x_seen)
    value = torch.arange(256).to(x_seen) / 127.5 - 1  # in [-1,1]
    row = context(x_seen)

    def joint(i):
        return log_prior[row, i] - 0.5 * math.exp(logsnr) * (x_seen - value[i]) ** 2

    total = joint(0)
    for i in range(1, 256):  # one value at a time, as 256 times the images would not fit
        total = torch.logaddexp(total, joint(i))
    return joint(x.long()) - total


@torch.no_grad()
def elbo(model, x, y, cfg, counts, generator=None):
    """A bound on the bits per dimension of 8-bit data, with infinitely many levels: its three terms and their sum.

    x (B,C,H,W) uint8 in {0..255}, y (B,) the given labels, counts of count_pixels. In nats, log p(x | y) >=
    -(prior + diffusion + reconstruction); what is returned is divided by the number of values and log 2.
    """
    data = x / 127.5 - 1  # in [-1,1]
    K = cfg.elbo_samples
    span = cfg.decoder_logsnr - MIN_LOGSNR  # of log SNR, from the noisiest level to the cleanest
    prior = 0.5 * math.exp(MIN_LOGSNR) * (data**2).sum((1, 2, 3))  # KL(q(last x_t | x) || N(0, sigma^2)), VDM eq. 11
    # Image b takes its k-th log SNR from the k-th of K equal intervals, at its own place there (VDM app. I.1).
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    place = (offset + torch.arange(len(x)) / len(x)) % 1  # (B,)
    diffusion = 0
    for k in range(K):  # the KLs of all levels: 1/2 int E[SNR |x - x_hat|^2] d lambda, VDM eq. 17 with x instead of eps
        logsnr = MIN_LOGSNR + span * (k + place) / K
        t = time_of(logsnr, cfg)
        eps = torch.randn(data.shape, generator=generator).to(data)
        x_hat = denoise(model, q_sample(data, t, eps, cfg), t, y, cfg).clamp(-1, 1)  # no pixel lies outside
        diffusion = diffusion + 0.5 * span / K * logsnr.exp().to(data) * ((data - x_hat) ** 2).sum((1, 2, 3))
    x_seen = data + math.exp(-cfg.decoder_logsnr / 2) * torch.randn(data.shape, generator=generator).to(data)
    reconstruction = -decoder_log_prob(x, x_seen, cfg.decoder_logsnr, counts).sum((1, 2, 3))
    total = prior + diffusion + reconstruction
    terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction, "bpd": total}
    return {name: nats / (x[0].numel() * math.log(2)) for name, nats in terms.items()}


# ---- the network


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies, dim even. t (B,) in [0,1] -> (B, dim)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None].float() * freqs  # DDPM counts 1000 steps
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(module):
    """Start a residual branch (or the output) at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class GroupNormSiLU(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_cond, dropout):
        super().__init__()
        self.norm1 = GroupNormSiLU(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.cond = nn.Linear(c_cond, c_out)
        self.norm2 = GroupNormSiLU(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cond):
        h = self.conv1(self.norm1(x)) + self.cond(cond)[:, :, None, None]  # (B, c_out, H, W)
        return self.skip(x) + self.conv2(self.dropout(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero(nn.Linear(channels, channels))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        qkv = self.qkv(self.norm(tokens)).unflatten(2, (3, self.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, H*W, head_dim)
        y = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(y).transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """The network of all levels of the chain: (x_t, t, y) -> eps, x, v or velocity, of the shape of x_t.

    x_t (B,C,H,W), about [-1,1] at t=0; t (B,) in [0,1]; y (B,) int64 in {0..classes}, where `classes` means no label.
    Any H and W: the image is padded at the right and bottom to a multiple of patch * 2^(levels-1), and cropped again.
    """

    def __init__(self, channels, classes, patch, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.mults]
        lowest = widths[-1]
        self.classes = classes
        self.patch = patch
        self.multiple = patch * 2 ** (len(widths) - 1)
        self.t_dim = cfg.width + cfg.width % 2  # even: half of it are sines
        c_cond = 4 * cfg.width
        self.time = nn.Sequential(nn.Linear(self.t_dim, c_cond), nn.SiLU(), nn.Linear(c_cond, c_cond))
        self.label = nn.Embedding(classes + 1, c_cond) if classes else None
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, w in enumerate(widths):
            if level > 0:
                self.down.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], w, 1)))
            self.down.extend(ResBlock(w, w, c_cond, cfg.dropout) for _ in range(cfg.blocks))
        self.mid = ResBlock(lowest, lowest, c_cond, cfg.dropout)
        self.attention = Attention(lowest, cfg.n_head) if cfg.n_head else nn.Identity()
        for level, w in reversed(list(enumerate(widths))):
            self.up.extend(ResBlock(2 * w, w, c_cond, cfg.dropout) for _ in range(cfg.blocks))
            if level > 0:
                self.up.append(nn.Sequential(nn.Conv2d(w, 4 * widths[level - 1], 1), nn.PixelShuffle(2)))
        self.norm = GroupNormSiLU(widths[0])
        self.head = zero(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, t, y=None):
        H, W = x.shape[-2:]
        cond = self.time(timestep_embedding(t, self.t_dim))
        if self.label is not None:
            cond = cond + self.label(y)
        cond = F.silu(cond)  # (B, 4*width)
        h = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple))
        h = self.stem(F.pixel_unshuffle(h, self.patch))  # (B, width, H/patch, W/patch)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResBlock):
                h = layer(h, cond)
                skips.append(h)
            else:
                h = layer(h)  # half the size
        h = self.attention(self.mid(h, cond))  # (B, C', H/multiple, W/multiple)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), cond)
            else:
                h = layer(h)  # twice the size
        return F.pixel_shuffle(self.head(self.norm(h)), self.patch)[..., :H, :W]


# ---- the loops
# run.steps restores and saves, run.batch gives images, run.update steps the optimizer, run.log averages and writes.


def train(data, cfg, run):
    """No schedule depends on when the run will end, so it may be stopped, or continued for longer, at any step."""
    model = build(run.shape, run.classes, cfg).to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    inside = [model.down, model.mid, model.attention, model.up] if cfg.optimizer == "muon" else []
    optimizer = Muon(model, inside, cfg.lr, (0.9, 0.99))
    parts = {"model": model, "ema_model": ema, "optimizer": optimizer}
    net = torch.compile(model) if cfg.compile else model
    if cfg.consistency:
        teacher, taught = load(cfg.init, run.device)
        theirs, ours = ([p.shape for p in network.parameters()] for network in (teacher, model))
        if (taught.schedule, taught.predict, theirs) != (cfg.schedule, cfg.predict, ours):
            fail("--consistency: the run of --init has another --schedule, --predict or network")
        tuning = tuning_batches(teacher, replace(cfg, consistency=False, sampler="dpm++", nfe=20), run)
    model.train()
    for step in run.steps(parts, lambda: generate(ema, 80, cfg, run)[0]):
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1))
        optimizer.param_groups[0]["lr"] = lr
        with run.autocast():
            if cfg.consistency:
                batch_loss = consistency_loss(net, *next(tuning), cfg).mean()
            else:
                x, y = run.batch(data)
                hidden = torch.rand(len(y), device=y.device) < cfg.label_dropout
                batch_loss = loss(net, x / 127.5 - 1, torch.where(hidden, run.classes, y), cfg).mean()
        norm = run.update(batch_loss, model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(loss=batch_loss, grad_norm=norm, lr=lr)


def tuning_batches(teacher, cfg, run):
    """Yield what consistency_loss takes, drawn from the chains that the teacher samples; every ROUND steps from new noise."""
    B = len(range(run.rank, cfg.batch_size, run.world))  # this process's share
    while True:
        now = run.step // ROUND
        generator = torch.Generator().manual_seed((cfg.seed << 20) + now * run.world + run.rank)
        noise = torch.randn(at_once(run.shape), *run.shape, generator=generator).to(run.device)
        y = torch.arange(len(noise), device=run.device) % max(run.classes, 1)
        latents = []
        end = sample(teacher, noise, y, cfg, before_step=lambda x_t, t, to=latents: to.append((x_t, t)))
        x_t, t = map(torch.stack, zip(*latents, strict=True))  # (n,R,C,H,W) and (n,), of R chains at n levels
        while run.step // ROUND == now:
            level, chain = (torch.randint(n, (B,)) for n in (len(t), len(end)))
            yield x_t[level, chain], t[level].to(x_t), end[chain], y[chain]


def evaluate(model, data, cfg, run):
    """Bits per dimension of the test split, given the labels, and the terms of the bound."""
    counts = count_pixels(data.train, cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    size = at_once(run.shape)  # images that fit into memory together
    batches = list(zip(data.test.split(size), data.test_labels.split(size), strict=True))
    totals = Counter()
    for x, y in progress(batches, "evaluation"):
        terms = elbo(model, x.to(run.device), y.to(run.device), cfg, counts, generator)
        totals.update({name: bits.cpu().double().sum().item() for name, bits in terms.items()})
    return {f"test_{name}": total / len(data.test) for name, total in totals.items()}


def generate(model, n, cfg, run):
    """n images (n,C,H,W) uint8 and their labels (n,), from the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = run.labels(n)
    images = []
    for y in progress(labels.split(at_once(run.shape)), "sampling"):
        noise = torch.randn(len(y), *run.shape, generator=generator).to(run.device)
        y = y.to(run.device) if run.classes else None
        images.append(to_uint8(sample(model, noise, y, cfg, generator)))
    return torch.cat(images), labels


# ---- extra: completing images (--inpaint)


def inpaint(model, x, mask, y, cfg, generator=None):
    """Sample the pixels where mask is 0, given those where it is 1. x (B,C,H,W) in [-1,1], mask (1,1,H,W) in {0,1}."""
    noise = torch.randn(x.shape, generator=generator).to(x)

    def put_back(x_t, t):  # Song 2021, the SDE paper, app. I.2, with the noise that the chain began with
        known = q_sample(x, t.expand(len(x)), noise, cfg)
        return mask * known + (1 - mask) * x_t

    return mask * x + (1 - mask) * sample(model, noise, y, cfg, generator, before_step=put_back)


def show_inpainting(model, data, mask, cfg, run):
    """Write inpaint.png: the first 40 test images, each with its known pixels alone and then completed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    x = data.test[:40].to(run.device) / 127.5 - 1
    y = data.test_labels[:40].to(run.device) if run.classes else None
    mask = mask.to(x)
    known = x * mask - (1 - mask)  # black where the pixel is not known
    pairs = torch.stack([known, inpaint(model, x, mask, y, cfg, generator)], 1).flatten(0, 1)
    save_grid(to_uint8(pairs), run.folder / "inpaint.png", 10, "pairs of the known pixels and the completed image")


def read_mask(name, H, W):
    """(1,1,H,W), True where the pixel is known: a half of the image, or the white of an image file."""
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    halves = {"left": column < W // 2, "right": column >= W // 2, "top": row < H // 2, "bottom": row >= H // 2}
    if name in halves:
        return halves[name][None, None]
    try:
        image = read_image(name, (W, H)).convert("L")
    except Exception as e:  # whatever a decoder raises
        fail(f"--inpaint {name}: neither left, right, top nor bottom, nor a readable image ({e})")
    return torch.from_numpy(np.asarray(image) > 127)[None, None]


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


def choose(cfg):
    """Write what the method, and tuning, decide into the fields that are left open."""
    for field, value in (METHODS[cfg.method] | {"sampler": "consistency" if cfg.consistency else "dpm++"}).items():
        if getattr(cfg, field) == "auto":
            setattr(cfg, field, value)
    cfg.nfe = cfg.nfe or (2 if cfg.consistency else 20)
    if cfg.n_head and cfg.width * cfg.mults[-1] % cfg.n_head:
        fail(f"--n-head {cfg.n_head} does not divide --width times the last of --mults, the channels of the lowest level")
    return cfg


def build(shape, classes, cfg):
    """The network for images of shape (C,H,W), with the weights that --seed draws."""
    patch = cfg.patch or (1 if min(shape[1:]) < 16 else 2)
    return UNet(shape[0], classes, patch, choose(cfg)).to(memory_format=torch.channels_last)


def load(folder, device="cpu"):
    """The averaged network of the run in a folder, ready to sample, and its config. From Python:

    model, cfg = diffusion.load("runs/diffusion-mnist")
    images = diffusion.sample(model, torch.randn(80, 1, 28, 28), torch.arange(80) % 10, cfg)  # in [-1,1]
    diffusion.save_grid(diffusion.to_uint8(images), "samples.png")
    """
    cfg, saved = read_run(folder)
    model = build(saved["facts"]["shape"], saved["facts"]["classes"], cfg)
    restore({"ema_model": model}, saved, folder)
    return model.to(device).eval().requires_grad_(False), cfg


def main(argv=None):
    cfg, saved = parse_args(argv)
    run = Run(choose(cfg), saved)
    if cfg.mode == "train" and cfg.consistency and not cfg.init:
        fail("--consistency tunes a trained network; --init FOLDER names its run")
    if cfg.mode != "sample" or cfg.inpaint:
        data = run.describe(load_data(cfg.dataset, cfg.data_dir, cfg.image_size), cfg.labels)
    mask = read_mask(cfg.inpaint, *run.shape[1:]) if cfg.inpaint else None
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    model, _ = load(cfg.out, run.device)
    if cfg.mode != "sample":
        metrics = evaluate(model, data, cfg, run)
        run.write_metrics(final=True, **metrics)
        terms = " + ".join(f"{name} {metrics[f'test_{name}']:.4f}" for name in ("prior", "diffusion", "reconstruction"))
        print(f"test bits/dim {metrics['test_bpd']:.4f} (upper bound{' given the label' * (run.classes > 0)}, {run.tested}, "
              f"{cfg.elbo_samples} time samples each: {terms})")
    if cfg.mode != "eval":
        run.write_samples(*generate(model, cfg.num_samples, cfg, run))
    if cfg.inpaint:
        show_inpainting(model, data, mask, cfg, run)


if __name__ == "__main__":
    launch(main)
