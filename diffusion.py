"""Diffusion: a Markovian hierarchical VAE whose encoder is fixed to add Gaussian noise, x_t = alpha_t x + sigma_t eps.

A hierarchical VAE learns a chain p(z_L) p(z_L-1 | z_L) ... p(x | z_1) and an encoder for it, and the two fight: levels
collapse, deep chains are hard to train. The remedy shown here is to fix the encoder to a Gaussian Markov chain, so that
each level's KL is a squared error that one network learns for all levels at once, and to let their number go to infinity.

Papers: DDPM (Ho 2020), DDIM (Song 2021), VDM (Kingma 2021), cosine schedule (Nichol 2021), v and distillation (Salimans
2022), DPM-Solver++ (Lu 2022), classifier-free guidance (Ho 2022), flow matching (Lipman 2023), logit-normal t (Esser 2024).
  q(x_t | x), all schedules ............... SCHEDULES, q_sample      DDPM eq. 4, flow matching eq. 20
  what the network predicts, and back ..... TARGETS, denoise         Salimans sec. 4 and app. D
  training loss ........................... METHODS, loss            DDPM eq. 14
  evidence lower bound, its three terms ... elbo                     VDM eqs. 11 and 17
  DDPM, DDIM, DPM-Solver++(2M), Heun ...... sample                   DDPM eq. 11, DDIM eq. 12, DPM-Solver++ alg. 2

  python diffusion.py                                            # digits
  python diffusion.py --dataset mnist --minutes 10               # MNIST on two CPU cores
  python diffusion.py --mode sample --dataset mnist --num-samples 1000 --guidance 2 --label 7
One GPU, CIFAR-10 (not measured): --dataset cifar10 --patch 1 --width 128 --mults 1 2 2 2 --blocks 3 --dropout 0.1
  --batch-size 256 --lr 3e-4 --warmup 2000 --ema 0.05 --steps 200000 --device cuda --amp bf16 --compile
Result on two CPU cores: digits in 88 s, 1.85 bits/dim; MNIST in 10 minutes, 1.29 bits/dim and 10,000 samples at a Frechet
distance of 0.137 in tools/evaluate.py's features, where real test images have 0.037.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.group_norm import group_norm_silu
except ImportError:
    def group_norm_silu(x, groups, weight, bias, eps=1e-5):
        return F.silu(torch.group_norm(x, groups, weight, bias, eps))


try:
    from kernels.attention import attention
except ImportError:
    def attention(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass
class Config:
    # the core, the same in all six scripts
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10 or a folder of images
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (>= 0)
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    batch_size: int = 32  # images a step, over all processes (> 0)
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
    method: Literal["flow", "v", "ddpm", "cosine"] = "flow"  # row of METHODS; the four flags below replace its entries
    schedule: Literal["auto", "straight", "cosine", "linear"] = "auto"  # alpha_t and sigma_t
    predict: Literal["auto", "eps", "x", "v", "velocity"] = "auto"  # what the network puts out
    loss: Literal["auto", "eps", "x", "v", "velocity"] = "auto"  # whose squared error is minimised
    times: Literal["auto", "uniform", "logit-normal"] = "auto"  # distribution of t in training
    patch: int = 0  # pixels a side folded into channels at the door; 0: 1 below 16 pixels, else 2 (>= 0)
    width: int = 32  # channels of the first level (> 0)
    mults: tuple[int, ...] = (1, 2)  # channels of each level over --width; each level halves the image (> 0)
    blocks: int = 1  # residual blocks a level (> 0)
    n_head: int = 4  # attention heads at the lowest level, 0 for no attention (>= 0)
    dropout: float = 0.0  # dropout in residual blocks (0 to 1)
    label_dropout: float = 0.1  # share of labels hidden in training, for guidance (0 to 1)
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    # evaluation and sampling: free to change on a trained model
    max_logsnr: float = 6.0  # log SNR at which the chain of latents ends and the decoder begins, in elbo (0 to 14)
    elbo_samples: int = 8  # time samples an image in elbo (> 0)
    sampler: Literal["ddim", "ddpm", "dpm++", "heun"] = "dpm++"  # update rule
    sampling_steps: int = 20  # network evaluations a sample; guidance other than 0 and 1 takes two at a time (> 0)
    guidance: float = 1.5  # classifier-free guidance: 0 unconditional, 1 conditional, more is sharper (>= 0)
    label: int | None = None  # sample this class only, else all in turn (>= 0)
    inpaint: str | None = None  # fill in test images: left, right, top, bottom, or a mask image whose white is kept
    interpolate: bool = False  # write a grid of interpolations between test images


# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    max_logsnr elbo_samples sampler sampling_steps guidance label inpaint interpolate""".split()


# ---- the model


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies, dim even. t (B,) in [0,1] -> (B, dim)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


class GroupNormSiLU(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


def zero(module):
    """Start a residual branch (or the output) at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_cond, dropout):
        super().__init__()
        self.norm1, self.conv1 = GroupNormSiLU(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.cond = nn.Linear(c_cond, c_out)
        self.norm2, self.conv2 = GroupNormSiLU(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cond):
        h = self.conv1(self.norm1(x)) + self.cond(cond)[:, :, None, None]  # (B, c_out, H, W)
        return self.skip(x) + self.conv2(self.dropout(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels, n_head):
        super().__init__()
        self.n_head, self.norm = n_head, nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = self.qkv(self.norm(tokens)).view(B, H * W, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)  # from (B, n_head, H*W, head_dim)
        return x + self.proj(y).transpose(1, 2).view(B, C, H, W)


class UNet(nn.Module):
    """The network of all levels of the chain: (x_t, t, y) -> eps, x, v or velocity, of the shape of x_t.

    x_t (B,C,H,W), about [-1,1] at t=0; t (B,) in [0,1]; y (B,) int64 in {0..classes}, where `classes` means no label.
    Any H and W: the image is zero-padded at the right and bottom to a multiple of patch * 2^(levels-1), and cropped back.
    """

    def __init__(self, channels, classes, patch, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.mults]
        if cfg.n_head and widths[-1] % cfg.n_head:
            raise ValueError(f"--n-head {cfg.n_head} does not divide the {widths[-1]} channels of the lowest level")
        c_cond, self.classes, self.patch = 4 * cfg.width, classes, patch
        self.multiple = patch * 2 ** (len(widths) - 1)
        self.time = nn.Sequential(nn.Linear(2 * -(-cfg.width // 2), c_cond), nn.SiLU(), nn.Linear(c_cond, c_cond))
        self.label = nn.Embedding(classes + 1, c_cond) if classes else None
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, w in enumerate(widths):
            if level > 0:
                self.down.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], w, 1)))
            self.down.extend(ResBlock(w, w, c_cond, cfg.dropout) for _ in range(cfg.blocks))
        self.mid = ResBlock(w, w, c_cond, cfg.dropout)
        self.attention = Attention(w, cfg.n_head) if cfg.n_head else nn.Identity()
        for level, w in reversed(list(enumerate(widths))):
            self.up.extend(ResBlock(2 * w, w, c_cond, cfg.dropout) for _ in range(cfg.blocks))
            if level > 0:
                self.up.append(nn.Sequential(nn.Conv2d(w, 4 * widths[level - 1], 1), nn.PixelShuffle(2)))
        self.norm, self.head = GroupNormSiLU(widths[0]), zero(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x, t, y=None):
        H, W = x.shape[-2:]
        cond = self.time(timestep_embedding(t, self.time[0].in_features))
        if self.label is not None:
            cond = cond + self.label(y)
        cond = F.silu(cond)  # (B, 4*width)
        h = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple))
        h = self.stem(F.pixel_unshuffle(h, self.patch))  # (B, width, H/patch, W/patch)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResBlock):
                skips.append(h := layer(h, cond))
            else:
                h = layer(h)  # half the size
        h = self.attention(self.mid(h, cond))  # (B, C', H/multiple, W/multiple)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), cond)
            else:
                h = layer(h)  # twice the size
        return F.pixel_shuffle(self.head(self.norm(h)), self.patch)[..., :H, :W]


# ---- the maths
# t in [0,1] runs from data to noise, x in [-1,1], lambda_t = log(alpha_t^2 / sigma_t^2) is the log signal-to-noise ratio.


def straight(t):  # flow matching, rectified flow
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def cosine(t):  # Nichol and Dhariwal 2021, without their offset
    a, s = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return a, s, -math.pi / 2 * s, math.pi / 2 * a


def linear(t, b0=0.1, b1=20.0):  # DDPM: beta_t = b0 + (b1 - b0) t, in continuous time as Song et al. 2021, eq. 33
    log_a = -t * b0 / 2 - t**2 * (b1 - b0) / 4
    a, s, half_beta = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt(), (b0 + (b1 - b0) * t) / 2
    return a, s, -half_beta * a, half_beta * a**2 / s


def linear_time(logsnr, b0=0.1, b1=20.0):  # 1/alpha^2 = 1 + exp(-lambda), and log alpha is quadratic in t
    return 2 * F.softplus(-logsnr) / (b0 + (b0**2 + 2 * (b1 - b0) * F.softplus(-logsnr)).sqrt())


SCHEDULES = {  # name: (t -> alpha, sigma and their derivatives, log SNR -> t)
    "straight": (straight, lambda logsnr: torch.sigmoid(-logsnr / 2)),
    "cosine": (cosine, lambda logsnr: 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))),
    "linear": (linear, linear_time),
}
TARGETS = {  # what a network may predict is a x + b eps: name: (alpha, sigma, alpha', sigma') -> (a, b)
    "eps": lambda a, s, da, ds: (0 * a, 1 + 0 * a),
    "x": lambda a, s, da, ds: (1 + 0 * a, 0 * a),
    "v": lambda a, s, da, ds: (-s, a),
    "velocity": lambda a, s, da, ds: (da, ds),  # dx_t / dt
}
METHODS = {  # --method: (--schedule, --predict, --loss, --times)
    "ddpm": ("linear", "eps", "eps", "uniform"),  # Ho 2020, L_simple
    "cosine": ("cosine", "eps", "eps", "uniform"),  # Nichol 2021
    "v": ("cosine", "v", "v", "uniform"),  # Salimans 2022
    "flow": ("straight", "velocity", "velocity", "logit-normal"),  # Lipman 2023, Esser 2024
}
MIN_LOGSNR, MAX_LOGSNR = -10.0, 14.0  # the ends of the chain: noise without signal, signal without noise


def choose(cfg):
    """Write the method's entries into the fields left at auto."""
    for field, value in zip(("schedule", "predict", "loss", "times"), METHODS[cfg.method], strict=True):
        if getattr(cfg, field) == "auto":
            setattr(cfg, field, value)
    return cfg


def time_of(logsnr, cfg):
    return SCHEDULES[cfg.schedule][1](torch.as_tensor(logsnr, dtype=torch.float64))


def coefficients(t, cfg, x=None):
    """alpha, sigma, alpha', sigma' at t (B,), as (B,1,1,1) of the type of x where x is given."""
    out = SCHEDULES[cfg.schedule][0](t)
    return out if x is None else [c.to(x).view(-1, 1, 1, 1) for c in out]


def q_sample(x, t, eps, cfg):
    """The encoder of the hierarchical VAE, q(x_t | x) = N(alpha_t x, sigma_t^2). x, eps (B,C,H,W), t (B,)."""
    a, s, _, _ = coefficients(t, cfg, x)
    return a * x + s * eps


def loss(model, x, y, cfg, t=None, eps=None):
    """Squared error of --loss for a network that predicts --predict, mean over pixels. x (B,C,H,W) in [-1,1] -> (B,)."""
    if t is None:
        u = torch.rand_like(x[:, 0, 0, 0])
        t = torch.sigmoid(torch.randn_like(u)) if cfg.times == "logit-normal" else u
        low, high = time_of([MAX_LOGSNR, MIN_LOGSNR], cfg).tolist()
        t = low + (high - low) * t
    eps = torch.randn_like(x) if eps is None else eps
    c = a, s, _, _ = coefficients(t, cfg, x)
    (ax, bx), (al, bl) = TARGETS[cfg.predict](*c), TARGETS[cfg.loss](*c)
    out = model(a * x + s * eps, t, y)
    weight = ((a * bl - s * al) / (a * bx - s * ax)) ** 2  # an error of one target in the units of the other
    return (weight * (out - (ax * x + bx * eps)) ** 2).mean((1, 2, 3))


def denoise(model, x_t, t, y, cfg, guidance=1.0):
    """What the network says of x and eps, from any prediction: solves {alpha x + sigma eps = x_t, a x + b eps = out}."""
    if y is None or guidance == 1:
        out = model(x_t, t.to(x_t), y)
    else:  # classifier-free guidance
        out = model(x_t, t.to(x_t), torch.full_like(y, model.classes))
        if guidance != 0:
            out = out + guidance * (model(x_t, t.to(x_t), y) - out)
    c = a, s, _, _ = coefficients(t, cfg, x_t)
    ax, bx = TARGETS[cfg.predict](*c)
    out = out.to(x_t)
    return (bx * x_t - s * out) / (a * bx - s * ax), (a * out - ax * x_t) / (a * bx - s * ax)


@torch.no_grad()
def sample(model, x, y, cfg, generator=None, t_start=None, fix=lambda x, t: x):
    """Run the chain from noise to data: x (B,C,H,W), N(0, 1) noise, or x_t at t_start -> [-1,1].

    Every sampler steps from t to s by x_s = keep x_t + (alpha_s - alpha_t keep) d + tau noise, which moves x_t = alpha_t
    x + sigma_t eps to level s exactly where d is the true x. They differ in d, the estimate of x, and in tau:
      ddim   d = x_hat(t)                                   tau = 0
      ddpm   d = x_hat(t)                                   tau^2 = variance of q(x_s | x_t, x)
      dpm++  d = x_hat(t) extrapolated from the last step   tau = 0
      heun   d = mean of x_hat(t) and x_hat(s)              tau = 0
    The last step goes to t = 0, where x_s = d: no noise is added. `fix(x, t)` may replace x after each step (inpainting).
    """
    n = max(cfg.sampling_steps // (1 if y is None or cfg.guidance in (0, 1) else 2), 1)  # times at which x_hat is asked
    n = (n + 1) // 2 if cfg.sampler == "heun" else n
    if t_start is None:
        t_start = time_of(MIN_LOGSNR, cfg).item()
        x = coefficients(torch.tensor(t_start), cfg)[1].item() * x
    times = torch.linspace(t_start, 0, n + 1, dtype=torch.float64)

    def x_hat(x, t):
        return denoise(model, x, t.expand(len(x)), y, cfg, cfg.guidance)[0].clamp(-1, 1)

    last_d = last_h = None
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        a_t, s_t, a_s, s_s = (c.item() for c in (*coefficients(t, cfg)[:2], *coefficients(s, cfg)[:2]))
        tau = s_s * max(1 - (a_t * s_s / (a_s * s_t)) ** 2, 0) ** 0.5 if cfg.sampler == "ddpm" else 0.0
        keep = (s_s**2 - tau**2) ** 0.5 / s_t
        d0 = d = x_hat(x, t)
        if i < n - 1:
            if cfg.sampler == "heun":
                d = (d0 + x_hat(keep * x + (a_s - a_t * keep) * d0, s)) / 2
            h = math.log(a_s * s_t / (s_s * a_t))  # half the step in log SNR
            if cfg.sampler == "dpm++" and i > 0:
                d = d0 + h / (2 * last_h) * (d0 - last_d)
            last_d, last_h = d0, h
        x = keep * x + (a_s - a_t * keep) * d
        if tau > 0:
            x = x + tau * torch.randn(x.shape, generator=generator).to(x)
        x = fix(x, s)
    return x.clamp(-1, 1)


def inpaint(model, x, mask, y, cfg, generator=None):
    """Sample the pixels where mask is 0, given those where it is 1. x (B,C,H,W) in [-1,1], mask (1,1,H,W) in {0,1}.

    After each step the known pixels are replaced by x_t = alpha_t x + sigma_t eps (Song et al. 2021, app. I.2), eps the first
    noise of the chain.
    """
    noise = torch.randn(x.shape, generator=generator).to(x)
    return sample(model, noise, y, cfg, generator, None,
                  lambda x_t, t: mask * q_sample(x, t.expand(len(x)), noise, cfg) + (1 - mask) * x_t)


def interpolate(model, x1, x2, y, cfg, generator=None, count=8, logsnr=-1.0):
    """Mix two images at a noisy level of the chain, and come back (DDPM sec. 4.4). x1, x2 (B,C,H,W) -> (B,count,C,H,W)."""
    t, noise = time_of(logsnr, cfg).item(), torch.randn(x1.shape, generator=generator).to(x1)
    mixes = [(1 - w) * x1 + w * x2 for w in torch.linspace(0, 1, count).tolist()]
    level = x1.new_full((len(x1),), t)
    return torch.stack([sample(model, q_sample(m, level, noise, cfg), y, cfg, generator, t) for m in mixes], 1)


def decoder_log_prob(x, x_0, logsnr, histogram):
    """log p(x | x_0) of each pixel: Bayes' rule for a pixel that has this histogram and was seen through Gaussian noise.

    x (B,C,H,W) in {0..255}; x_0 (B,C,H,W), the last latent divided by alpha; histogram (256,). Sums to 1 over the levels.
    """
    prior, value = (histogram / histogram.sum()).log().to(x_0), torch.arange(256).to(x_0) / 127.5 - 1

    def joint(level):
        return prior[level] - 0.5 * math.exp(logsnr) * (x_0 - value[level]) ** 2

    return joint(x.long()) - reduce(torch.logaddexp, map(joint, range(256)))


@torch.no_grad()
def elbo(model, x, y, cfg, histogram, generator=None):
    """Bits per dimension of 8-bit data under the hierarchical VAE with infinitely many levels (an upper bound), as terms.

    x (B,C,H,W) uint8 in {0..255}, y (B,) the given labels; log p(x | y) >= -(prior + diffusion + reconstruction).
    The integral over log SNR is estimated with --elbo-samples stratified times an image (low variance, VDM app. I.1).
    """
    data, dims = x / 127.5 - 1, x[0].numel()  # [-1,1]
    low, high, K, B = MIN_LOGSNR, cfg.max_logsnr, cfg.elbo_samples, len(x)
    prior = 0.5 * math.exp(low) * (data**2).sum((1, 2, 3))  # KL(q(x_1|x) || N(0, sigma_1^2)), VDM eq. 11, first term
    rand = torch.rand(1, generator=generator, dtype=torch.float64)
    u = (rand + torch.arange(B) / B) % 1
    diffusion = 0
    for k in range(K):  # sum of all levels' KLs = 1/2 int E|eps - eps_hat|^2 d lambda, VDM eq. 17
        t = time_of(low + (high - low) * (k + u) / K, cfg)
        eps = torch.randn(data.shape, generator=generator).to(data)
        eps_hat = denoise(model, q_sample(data, t, eps, cfg), t, y, cfg)[1]
        diffusion = diffusion + 0.5 * (high - low) / K * ((eps - eps_hat) ** 2).sum((1, 2, 3))
    x_0 = data + math.exp(-high / 2) * torch.randn(data.shape, generator=generator).to(data)
    reconstruction = -decoder_log_prob(x, x_0, high, histogram).sum((1, 2, 3))
    terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
    terms["bpd"] = prior + diffusion + reconstruction
    return {name: nats / (dims * math.log(2)) for name, nats in terms.items()}


# ---- the loops


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(model, ema, data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, (0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run.begin(parts)
    net = torch.compile(model) if cfg.compile else model
    model.train()
    for step in run.steps():
        x, y = run.batch(data)
        y = torch.where(torch.rand(len(y), device=y.device) < cfg.label_dropout, data.classes, y)
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1))
        with run.autocast():
            batch_loss = loss(net, x / 127.5 - 1, y, cfg).mean()
        norm = run.update(batch_loss, model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(loss=batch_loss, grad_norm=norm, lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(generate(ema, 80, data.train.shape[1:], data.classes, cfg, run)[0])
    run.save(parts)
    run.check()


def evaluate(ema, data, cfg, run):
    """Bits per dimension of the whole test split (given the labels) and its terms."""
    histogram = 1 + torch.bincount(data.train.flatten(), minlength=256).double()
    generator, sums = torch.Generator().manual_seed(cfg.seed), {}
    for x, y in zip(*(a.split(at_once(data.test.shape[1:])) for a in (data.test, data.test_labels)), strict=True):
        run.check()
        for name, bits in elbo(ema, x.to(run.device), y.to(run.device), cfg, histogram, generator).items():
            sums[name] = sums.get(name, 0) + bits.cpu().double().sum().item()
    return {f"test_{name}": total / len(data.test) for name, total in sums.items()}


def generate(ema, n, shape, classes, cfg, run):
    """n images (n,C,H,W) uint8 and labels (n,), from the averaged weights and the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.arange(n) % max(classes, 1) if cfg.label is None else torch.full((n,), cfg.label)
    images = []
    for y in labels.split(at_once(shape)):
        run.check()
        noise = torch.randn(len(y), *shape, generator=generator).to(run.device)
        images.append(to_uint8(sample(ema, noise, y.to(run.device) if classes else None, cfg, generator)))
    return torch.cat(images), labels


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()


def show_edits(ema, data, mask, cfg, run):
    """inpaint.png: pairs of the given pixels and the completed image; interpolations.png: a row a pair of test images."""
    generator = torch.Generator().manual_seed(cfg.seed)
    x, y = data.test[:40].to(run.device) / 127.5 - 1, data.test_labels[:40].to(run.device) if data.classes else None
    if mask is not None:
        mask = mask.to(x)
        pairs = torch.stack([x * mask - (1 - mask), inpaint(ema, x, mask, y, cfg, generator)], 1)
        save_grid(to_uint8(pairs.flatten(0, 1)), run.out / "inpaint.png", 10)
    if cfg.interpolate:
        unconditional = replace(cfg, guidance=0.0)
        rows = interpolate(ema, x[:10], x[:10].roll(1, 0), y if y is None else y[:10], unconditional, generator)
        save_grid(to_uint8(rows.flatten(0, 1)), run.out / "interpolations.png", rows.shape[1])


def read_mask(name, H, W):
    """(1,1,H,W) of 1 where the pixel is known: a half of the image, or the white of an image file."""
    row, column = torch.arange(H)[:, None].expand(H, W), torch.arange(W).expand(H, W)
    halves = {"left": column < W // 2, "right": column >= W // 2, "top": row < H // 2, "bottom": row >= H // 2}
    try:
        if name in halves:
            return halves[name][None, None]
        return torch.from_numpy(np.asarray(Image.open(name).convert("L").resize((W, H))) > 127)[None, None]
    except OSError as e:
        fail(f"--inpaint {name}: neither left, right, top nor bottom, nor a readable image ({e})")


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
    run = Run(choose(cfg), given, FREE)
    if cfg.mode != "sample" or cfg.inpaint or cfg.interpolate:
        data = load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        run.describe(data)
    shape, classes = run.facts["shape"], run.facts["classes"]
    if cfg.label is not None and cfg.label >= classes:
        fail(f"--label {cfg.label}: the model knows {classes} classes")
    mask = read_mask(cfg.inpaint, *shape[1:]) if cfg.inpaint else None
    torch.manual_seed(cfg.seed)
    try:
        model = UNet(shape[0], classes, cfg.patch or (1 if min(shape[1:]) < 16 else 2), cfg)
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
        print(f"test bits/dim {metrics['test_bpd']:.4f} (upper bound{' given the label' * (classes > 0)}, all "
              f"{len(data.test)} test images, {cfg.elbo_samples} time samples each: prior {metrics['test_prior']:.4f} + "
              f"diffusion {metrics['test_diffusion']:.4f} + reconstruction {metrics['test_reconstruction']:.4f})")
    if cfg.mode != "eval":
        images, labels = generate(ema, cfg.num_samples, shape, classes, cfg, run)
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels.numpy()} if classes else {})
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, **arrays))
        save_grid(images[:80], run.out / "samples.png", 10)
        print(f"{len(images)} samples in {run.out / 'samples.npz'}, the first of them in {run.out / 'samples.png'}")
    if cfg.inpaint or cfg.interpolate:
        show_edits(ema, data, mask, cfg, run)
    run.check()


if __name__ == "__main__":
    launch(main)
