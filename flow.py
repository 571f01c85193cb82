"""Normalizing flows: an invertible network f turns an image x into noise, so p(x) is known exactly.

log p(x) = log N(f(x); 0, 1) + log |det df/dx|, and the inverse of f turns noise into images. The
weakness: every step must be invertible and have a cheap determinant, so a step does little. The
classical remedy is the coupling: one half of the numbers stays, and a network reads from it how to
transform the others: by adding (NICE), by scaling too (RealNVP, Glow), or by a monotonic spline.
The modern remedy is the autoregressive flow (TarFlow): a causal transformer reads from all earlier
numbers how to transform the next one. Forward takes one pass, inverse one position after another.

Papers: NICE (Dinh 2015), RealNVP (Dinh 2017), Glow (Kingma 2018), Flow++ (Ho 2019), spline flows
(Durkan 2019), TarFlow (Zhai 2024), Jacobi inversion (Song 2021), BiFlow (Lu 2025), R3GAN (Huang
2024).
  change of variables, bits/dim ... log_density, log_likelihood       RealNVP eq. 3, Flow++ eq. 12
  couplings, splines .............. affine_coupling, spline_coupling  RealNVP 3.2, Durkan eqs. 4-8
  autoregressive flow ............. TarBlock, TarFlow                 TarFlow eqs. 4 to 6
  classical flow .................. Step, Glow                        Glow table 1, RealNVP sec. 3.6
  learned inverse ................. LearnedInverse, inverse_losses    BiFlow sec. 4, R3GAN eq. 2
  extras .......................... inverse_jacobi, Dequantizer

  python flow.py                                                # digits, needs no download
  python flow.py --dataset mnist --minutes 10                   # MNIST on two CPU cores
The second gives 1.06 bits/dim on two Zen 5 cores (docs/flow.md); Glow has 1.05 published.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    # model
    arch: Literal["tarflow", "glow"] = "tarflow"  # transformer autoregressive flow, or couplings at several scales
    coupling: Literal["additive", "affine", "spline"] = "spline"  # how a number is transformed (NICE, RealNVP, Durkan)
    width: int = 0  # channels of the networks; 0: 64 for glow, 128 for tarflow (0 to 8192)
    dequantize: Literal["uniform", "variational"] = "uniform"  # noise that makes levels continuous: fixed, or learned
    blocks: int = 2  # tarflow: autoregressive blocks (1 to 256)
    layers: int = 2  # tarflow: transformer layers a block (1 to 256)
    n_head: int = 4  # tarflow: attention heads (1 to 256)
    patch: int = 0  # tarflow: pixels a side of a position, 0: the most that fit, 2 below 16 pixels, else 4 (0 to 64)
    learn_inverse: bool = False  # tarflow: train a network that inverts the flow of --init in one pass; the flow stays
    scales: int = 0  # glow: how often the image is halved, 0: while both sides are even, 1 to 3 times (0 to 12)
    steps_per_scale: int = 8  # glow: steps of actnorm, 1x1 convolution and coupling at each scale (1 to 1024)
    recompute: bool = False  # glow: keep the inputs of the steps alone, the backward pass computes the rest again
    # training
    labels: bool = True  # condition on the class; the test likelihood is then the mean of p(x | y) over all classes
    optimizer: Literal["muon", "adam"] = "muon"  # of the transformer's matrices; all else moves by Adam
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 2000  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling, free to change on a trained model
    inverse: Literal["auto", "cached", "jacobi", "learned"] = "auto"  # of tarflow; auto: learned where it is, else cached
    temperature: float = 1.0  # factor on the noise that samples are made of; 0: the image of zero noise (0 to 100)
    label: str | None = None  # sample this class only, by its name or number; else all in turn
    # core, the same in all six scripts
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (0 to 4096)
    batch_size: int = 16  # images a step, over all processes (1 to 65536)
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


# ---- the maths: log p(v) = log N(eps; 0, 1) + log |det d eps / dv|, where eps = f(v)
# model.f(v, y) takes images v (B,C,H,W) in [-1,1] and classes y (B,) to eps, a list of tensors of noise (B,*), and gives
# log |det d eps / dv| (B,) too. model.f.inverse takes eps back to v. All logarithms are natural.

LEVELS_PER_UNIT = 128  # the 256 levels of an 8-bit image fill [-1,1], which is 2 units long


def log_normal(eps):
    """log N(eps; 0, 1) of a list of tensors (B,*), summed over all but the batch, (B,)."""
    return sum(-0.5 * (e**2 + math.log(2 * math.pi)).flatten(1).sum(1) for e in eps)


def log_density(model, v, y):
    """log p(v | y), exactly. v (B,C,H,W) in [-1,1], y (B,) -> (B,)."""
    eps, log_det = model.f(v, y)
    return log_normal(eps) + log_det  # the change of variables, RealNVP eq. 3


def dequantize(model, x, generator=None):
    """Levels x (B,C,H,W) in {0..255} to numbers v in [-1,1], by noise u in [0,1); and log q(u | x), (B,)."""
    if model.dequantizer is None:
        u = torch.rand(x.shape, generator=generator).to(x.device)
        log_q = u.new_zeros(len(u))
    else:
        u, log_q = model.dequantizer(x / 127.5 - 1)  # it sees levels as images in [-1,1]
    return (x + u) / LEVELS_PER_UNIT - 1, log_q


def quantize(v):
    """The levels {0..255}, uint8 on the CPU, of numbers v in [-1,1]: the inverse of dequantize, whatever u was."""
    return ((v + 1) * LEVELS_PER_UNIT).floor().clamp(0, 255).byte().cpu()


def log_likelihood(model, v, log_q, y):
    """One draw of a lower bound on log P(x | y), from v, log_q = dequantize(model, x) of 8-bit x; (B,). Flow++ eq. 12:
    log P(x) = log E_q[p(x + u) / q(u | x)] >= E_q[log p(x + u) - log q(u | x)], with p(x + u) = p(v) / 128 a number."""
    return log_density(model, v, y) - v[0].numel() * math.log(LEVELS_PER_UNIT) - log_q


def loss(model, x, y, cfg):
    """What training minimises: -log P(x | y) in nats a dimension, mean over the batch. Levels x (B,C,H,W) in {0..255}."""
    v, log_q = dequantize(model, x)
    return -log_likelihood(model, v, log_q, y).mean() / v[0].numel()


def draw_noise(model, n, generator=None):
    """eps of n images: a list of standard normal tensors, one for each part in which numbers leave the flow."""
    return [torch.randn(n, *shape, generator=generator) for shape in model.f.noise_shapes]


@torch.no_grad()
def sample(model, eps, y, cfg):
    """Images v (B,C,H,W), about [-1,1], from eps of draw_noise and classes y (B,); and how often a network was called."""
    return model.f.inverse([cfg.temperature * e for e in eps], y, cfg.inverse)


# ---- how a number is transformed: z = g(x; params), monotonic in x; reverse=True gives x from z
# Each function also gives the sum of log |dz/dx| over all numbers of an image (or of log |dx/dz| in reverse), (B,).

BINS = 8  # of a spline
PARAMS = {"additive": 1, "affine": 2, "spline": 3 * BINS - 1}  # parameters that transform one number

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.coupling import affine_coupling, spline_coupling
except ImportError:
    def affine_coupling(x, params, kept, reverse=False, s_max=2.0):
        raw, shift = params.to(x.dtype).chunk(2, 1)
        stays, x = x.tensor_split([kept], 1)
        log_s = s_max * torch.tanh(raw / s_max)  # within +-s_max, so that neither direction overflows
        z = (x - shift) * torch.exp(-log_s) if reverse else x * torch.exp(log_s) + shift  # RealNVP sec. 3.2
        return torch.cat([stays, z], 1), (-log_s if reverse else log_s).flatten(1).sum(1)  # and log_det, sec. 3.3

    def spline_coupling(x, params, T=3.0, reverse=False):
        """Durkan 2019: a monotonic curve from x in [-T,T] to y in [-T,T], the identity outside. x (B,C,*), params
        (B,C * (3K - 1),*): widths and heights of K bins, then the slopes between them. A bin from (x0,y0) to (x0 + w,
        y0 + h) has slopes d0 and d1 at its ends; theta in [0,1] is the place in it. x is y where reverse."""
        def place(distance, size):  # in [0,1]; where rounding leads beyond, the gradient goes on
            theta = distance / size
            return theta + (theta.clamp(0, 1) - theta).detach()

        least = 1e-5  # the least share of a bin, and the least slope
        one = math.log(math.expm1(1 - least))  # becomes the slope 1, at both ends as outside
        p = params.to(x.dtype).unflatten(1, (x.shape[1], -1)).movedim(2, -1)  # (B,C,*,3K - 1)
        K = (p.shape[-1] + 1) // 3
        shares = torch.softmax(p[..., :2 * K].unflatten(-1, (2, K)), -1)  # of widths and heights
        sizes = 2 * T * (least + (1 - least * K) * shares)  # (B,C,*,2,K)
        knots = F.pad(sizes.cumsum(-1), (1, 0)) - T  # (B,C,*,2,K + 1)
        slopes = least + F.softplus(F.pad(p[..., 2 * K:], (1, 1), value=one))  # (B,C,*,K + 1)
        v = x.clamp(-T, T)
        k = (knots[..., int(reverse), 1:-1] <= v[..., None]).sum(-1, keepdim=True)  # the bin in which each number lies
        w, h = torch.take_along_dim(sizes, k[..., None], -1)[..., 0].unbind(-1)
        x0, y0 = torch.take_along_dim(knots, k[..., None], -1)[..., 0].unbind(-1)
        d0, d1 = torch.take_along_dim(slopes, torch.cat([k, k + 1], -1), -1).unbind(-1)
        s = h / w  # the mean slope of the bin
        if reverse:  # eqs. 6 to 8 divided by h, where b = u + 2 s eta; the root in two forms, so that nothing cancels
            eta = place(v - y0, h)
            u = d0 * (1 - eta) - d1 * eta
            r = u.abs() + torch.sqrt(u**2 + 4 * s**2 * eta * (1 - eta))  # the square root is that of b^2 - 4ac
            theta = torch.where(u < 0, r / (r + 2 * s * (1 - eta)), 2 * s * eta / (2 * s * eta + r))
        else:
            theta = place(v - x0, w)
        t = theta * (1 - theta)
        D = s + (d0 + d1 - 2 * s) * t  # the denominator of eqs. 4 and 5
        M = d1 * theta**2 + 2 * s * t + d0 * (1 - theta) ** 2  # dy/dx = s^2 M / D^2
        inside = x.abs() < T
        log_det = torch.where(inside, 2 * torch.log(s / D) + torch.log(M), 0).flatten(1).sum(1)  # eq. 5
        y = theta * w + x0 if reverse else y0 + h * (s * theta**2 + d0 * t) / D  # eq. 4
        return torch.where(inside, y, x), -log_det if reverse else log_det


def couple(kind, x, params, kept, reverse, s_max=2.0, bound=3.0):
    """All but the first `kept` channels of x (B,C,*) transformed by params (B,(C - kept) * PARAMS[kind],*) -> z, log_det.
    s_max bounds the log-scale of an affine coupling; a spline maps [-bound,bound] to itself."""
    if kind == "affine":
        return affine_coupling(x, params, kept, reverse, s_max)
    stays, x = x.tensor_split([kept], 1)
    if kind == "spline":
        z, log_det = spline_coupling(x, params, bound, reverse)
    else:
        z = x - params if reverse else x + params  # NICE
        log_det = x.new_zeros(len(x))
    return torch.cat([stays, z], 1), log_det


# ---- the autoregressive flow: each number is transformed by what comes before it (--arch tarflow)
# An image is T positions of D numbers, (B,T,D). A causal transformer makes features h (B,T,width) of a position from earlier
# positions. A head makes params of a number from h and from the numbers before it in its own position. Both stand below.

class TarBlock(nn.Module):
    """z_i = g(x_i; params_i), where params_i depend on the numbers before i alone. x (B,T,D) -> z (B,T,D), log_det (B,).
    So dz/dx is triangular, and log_det = sum_i log dz_i/dx_i, which couple gives.
    --coupling affine is TarFlow's z = (x - mu) exp(-alpha), eqs. 4 to 6, with log-scale -alpha and shift -mu exp(-alpha).
    Beyond the paper are the splines, and that the numbers of a position depend on each other (the head)."""

    def __init__(self, T, D, classes, cfg):
        super().__init__()
        self.kind = cfg.coupling
        self.n_head = cfg.n_head
        self.embed = nn.Linear(D, cfg.width)
        self.start = nn.Embedding(max(classes, 1), cfg.width)  # stands before the first position
        self.position = nn.Parameter(0.1 * torch.randn(T, cfg.width))
        self.layers = nn.ModuleList(TransformerBlock(cfg.width, cfg.n_head) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.head = Head(cfg.width, D, PARAMS[self.kind])

    def transform(self, x, params, reverse=False):
        """g or its inverse. x (B,T,d): the D numbers of each position, or one of them; params (B,T,d,n_params).
        couple wants channels second: (B,d,T) and (B,d * n_params,T), all params of a number together for splines alone."""
        params = params.permute((0, 2, 3, 1) if self.kind == "spline" else (0, 3, 2, 1))  # (B,d,n,T) or (B,n,d,T)
        # s_max is larger than in Glow, which has more steps; a spline transforms [-1,1], see TarFlow
        z, log_det = couple(self.kind, x.transpose(1, 2), params.flatten(1, 2), 0, reverse, s_max=4.0, bound=1.0)
        return z.transpose(1, 2), log_det

    def features(self, x, y):
        """What each position knows of those before it: x (B,T,D), y (B,) -> h (B,T,width)."""
        h = torch.cat([self.start(y)[:, None], self.embed(x[:, :-1])], 1) + self.position
        for layer in self.layers:
            h = layer(h, lambda q, k, v: attention(q, k, v, "causal"))
        return self.norm(h)

    def forward(self, x, y):
        return self.transform(x, self.head(self.features(x, y), x))

    def solve(self, z, h):
        """x from z (B,T,D) where the features h (B,T,width) are known: one number of each position after the other."""
        A_h, W_h = self.head.from_features(h)
        x = z[:, :, :0]
        for z_d in z.split(1, 2):
            x_d, _ = self.transform(z_d, self.head.params_of_next(A_h, W_h, x), reverse=True)
            x = torch.cat([x, x_d], 2)
        return x

    def inverse(self, z, y):
        """x from z (B,T,D), one position after the other, and the calls of the network. Caches hold earlier keys, values."""
        T, width = self.position.shape
        caches = z.new_zeros(len(self.layers), 2, len(z), self.n_head, T, width // self.n_head)
        x = torch.zeros_like(z)
        token = self.start(y)
        for t in range(T):
            h = (token + self.position[t])[:, None]  # (B,1,width)
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                def attend(q, k, v, keys=keys, values=values, t=t):
                    keys[:, :, t] = k[:, :, 0]
                    values[:, :, t] = v[:, :, 0]
                    return decode_attention(q, keys, values, t + 1)
                h = layer(h, attend)
            x[:, t:t + 1] = self.solve(z[:, t:t + 1], self.norm(h))
            token = self.embed(x[:, t])
        return x, T


class TarFlow(nn.Module):
    """TarBlocks over patches of pixels: in raster order, and back to front in every second block.
    Splines map [-1,1] to itself, so what they make of the data is uniform noise, and to_normal makes it normal."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.patch = cfg.patch
        self.rows = H // cfg.patch  # of patches
        D = channels * cfg.patch**2
        T = channels * H * W // D
        self.spline = cfg.coupling == "spline"
        self.blocks = nn.ModuleList(TarBlock(T, D, classes, cfg) for _ in range(cfg.blocks))
        self.noise_shapes = [(T, D)]
        self.learned = LearnedInverse(T, D, classes, cfg) if cfg.learn_inverse else None
        self.critic = Critic(channels, H, W, classes) if cfg.learn_inverse else None

    def forward(self, v, y):
        x = F.pixel_unshuffle(v, self.patch).flatten(2).transpose(1, 2)  # (B,T,D)
        total = v.new_zeros(len(v))
        for block in self.blocks:
            x, log_det = block(x, y)
            x = x.flip(1, 2)
            total = total + log_det
        if self.spline:
            x, log_det = to_normal(x)
            total = total + log_det
        return [x], total

    def inverse(self, eps, y, how):
        """v (B,C,H,W), and how often a network was called. `how` is cached, jacobi (inverse_jacobi), learned or auto."""
        learned = how == "learned" or how == "auto" and self.learned is not None
        x = from_normal(eps[0]) if self.spline else eps[0]
        if learned:
            x = self.learned(eps[0], y)
        calls = int(learned)
        for block in [] if learned else reversed(self.blocks):
            x = x.flip(1, 2)
            x, more = inverse_jacobi(block, x, y) if how == "jacobi" else block.inverse(x, y)
            calls += more
        x = x.transpose(1, 2).unflatten(2, (self.rows, -1))  # (B,D,rows,columns)
        return F.pixel_shuffle(x, self.patch), calls


class Flow(nn.Module):
    """The flow f, and the learned noise that makes levels continuous (None where the noise is uniform)."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.f = (Glow if cfg.arch == "glow" else TarFlow)(channels, H, W, classes, cfg)
        self.dequantizer = Dequantizer(channels) if cfg.dequantize == "variational" else None


# ---- what the autoregressive flow is made of: transformer, head, normal noise

try:
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
except ImportError:
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")

    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])


class TransformerBlock(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, attend):
        """h (B,T,width) -> the same shape; attend(q, k, v) takes and gives (B,n_head,T,head_dim)."""
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class Head(nn.Module):
    """The params of the D numbers of a position, from its features h and from the numbers x before each (as in MADE).
    Each number d has a small network of its own: params_d = W_d h + V_d relu(A_d h + B_d x_{<d}), biases left out here."""

    def __init__(self, width, D, n_params, n_hidden=32):
        super().__init__()
        self.A = nn.Linear(width, D * n_hidden)
        self.B = nn.Linear(D, D * n_hidden, bias=False)
        self.V = nn.Parameter(torch.zeros(D, n_hidden, n_params))
        self.W = zero(nn.Linear(width, D * n_params))
        mask = torch.arange(D).repeat_interleave(n_hidden)[:, None] > torch.arange(D)  # units of d see what is before d
        self.register_buffer("mask", mask.float(), persistent=False)

    def from_features(self, h):
        """A h (B,T,D,n_hidden) and W h (B,T,D,n_params), with their biases, of h (B,T,width)."""
        return self.A(h).unflatten(2, (len(self.V), -1)), self.W(h).unflatten(2, (len(self.V), -1))

    def forward(self, h, x):
        """All numbers at once: h (B,T,width), x (B,T,D) -> params (B,T,D,n_params)."""
        A_h, W_h = self.from_features(h)
        hidden = F.relu(A_h + F.linear(x, self.B.weight * self.mask).view_as(A_h))
        return W_h + torch.einsum("btdi,dio->btdo", hidden, self.V)

    def params_of_next(self, A_h, W_h, x):
        """The params (B,T,1,n_params) of the one number that comes after x (B,T,d). A_h, W_h are of from_features."""
        d = x.shape[2]
        B_d = self.B.weight.view(*self.V.shape[:2], -1)[d, :, :d]  # (n_hidden,d)
        hidden = F.relu(A_h[:, :, d] + F.linear(x, B_d))
        return (W_h[:, :, d] + hidden @ self.V[d])[:, :, None]


def zero(module):
    """Set all weights to 0. What puts out params then begins as the identity, or, for a spline, close to it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


EDGE = 5.0  # deviations of normal noise; beyond, a straight line goes on, so that each number has an image


def to_normal(u):
    """Numbers u (B,T,D) uniform in [-1,1] to standard normal ones, z = Phi^-1((u + 1) / 2), and log |det| (B,)."""
    edge = math.erf(EDGE / math.sqrt(2))
    inside = u.clamp(-edge, edge)
    z = math.sqrt(2) * torch.erfinv(inside)  # Phi is the cumulative distribution of N(0, 1)
    log_slope = 0.5 * math.log(math.pi / 2) + z**2 / 2  # log dz/du
    return z + (u - inside) * torch.exp(log_slope), log_slope.flatten(1).sum(1)


def from_normal(z):
    """The inverse of to_normal."""
    inside = z.clamp(-EDGE, EDGE)
    slope_at_edge = math.sqrt(2 / math.pi) * math.exp(-EDGE**2 / 2)
    return torch.erf(inside / math.sqrt(2)) + (z - inside) * slope_at_edge


# ---- the second architecture: couplings at several scales (--arch glow)

class Step(nn.Module):
    """A step of Glow (table 1): actnorm, an invertible 1x1 convolution, a coupling. x (B,C,H,W) -> z, and log_det (B,).
    Actnorm and convolution are one matrix: x -> W diag(exp(log_scale)) (x + shift), with W = P L (U + diag(s)), eq. 10.
    P permutes, L and U are triangular, L with ones on the diagonal and U with zeros, and s = sign * exp(log_diag)."""

    def __init__(self, C, classes, cfg):
        super().__init__()
        self.kind = cfg.coupling
        self.kept = C // 2
        self.shift = nn.Parameter(torch.zeros(C))
        self.log_scale = nn.Parameter(torch.zeros(C))
        rotation, _ = torch.linalg.qr(torch.randn(C, C))
        P, L, U = torch.linalg.lu(rotation)
        self.register_buffer("P", P)
        self.register_buffer("sign", U.diag().sign())
        self.L = nn.Parameter(L.tril(-1))
        self.U = nn.Parameter(U.triu(1))
        self.log_diag = nn.Parameter(U.diag().abs().log())
        self.conv1 = nn.Conv2d(self.kept, cfg.width, 3, padding=1)
        self.conv2 = nn.Conv2d(cfg.width, cfg.width, 1)
        self.conv3 = zero(nn.Conv2d(cfg.width, (C - self.kept) * PARAMS[self.kind], 3, padding=1))
        self.label = nn.Embedding(max(classes, 1), cfg.width)

    def matrix(self):
        """W diag(exp(log_scale)), (C,C)."""
        L = self.L.tril(-1) + torch.eye(len(self.L), device=self.L.device, dtype=self.L.dtype)
        U = self.U.triu(1) + torch.diag(self.sign * torch.exp(self.log_diag))
        return self.P @ L @ U * torch.exp(self.log_scale)  # Glow eq. 10

    def transform(self, x, y, reverse=False):
        """The first half of the channels stays, and tells how to transform the others."""
        h = self.conv1(x[:, :self.kept]).add_(self.label(y)[:, :, None, None]).relu_()
        params = self.conv3(self.conv2(h).relu_())
        return couple(self.kind, x, params, self.kept, reverse)

    def forward(self, x, y):
        with torch.autocast(x.device.type, enabled=False):  # --amp is for the networks, not for what passes through
            matrix = self.matrix()
            x = F.conv2d(x, matrix[:, :, None, None], matrix @ self.shift)
        z, log_det = self.transform(x, y)
        return z, log_det + z[0, 0].numel() * (self.log_diag.sum() + self.log_scale.sum())  # Glow eqs. 9 and 11

    def inverse(self, z, y):
        x, _ = self.transform(z, y, reverse=True)
        return F.conv2d(x, torch.linalg.inv(self.matrix())[:, :, None, None], -self.shift)


class Prior(nn.Module):
    """The prior N(z; mu, sigma) of numbers z (B,C,H,W) that leave the flow: eps = (z - mu) / sigma is standard normal.
    -log sigma and -mu / sigma depend on the class and, where it is given, on `seen`, the channels that go on."""

    def __init__(self, channels, seen, classes):
        super().__init__()
        self.conv = zero(nn.Conv2d(seen, 2 * channels, 3, padding=1)) if seen else None
        self.label = zero(nn.Embedding(max(classes, 1), 2 * channels))

    def forward(self, z, seen, y, reverse=False):
        params = self.label(y)[:, :, None, None].expand(-1, -1, *z.shape[2:])
        if seen is not None:
            params = params + self.conv(seen)
        return affine_coupling(z, params, 0, reverse, s_max=6.0)  # a prior may have to be very narrow


class Glow(nn.Module):
    """At each scale: squeeze 2x2 pixels into channels, steps, half of the channels leave as noise (RealNVP sec. 3.6).
    Where a side is odd, its last row or column leaves before the squeeze, with its own prior: nothing is padded."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        C = channels
        self.recompute = cfg.recompute
        self.scales = nn.ModuleList()
        for i in range(cfg.scales):
            scale = nn.ModuleDict({"row": Prior(C, 0, classes), "column": Prior(C, 0, classes)})
            C = 4 * C
            scale["steps"] = nn.ModuleList(Step(C, classes, cfg) for _ in range(cfg.steps_per_scale))
            if i < cfg.scales - 1:
                C = C // 2
                scale["split"] = Prior(C, C, classes)
            self.scales.append(scale)
        self.last = Prior(C, 0, classes)
        with torch.no_grad():  # the shapes of what leaves the flow, in the order in which it leaves; some are empty
            eps, _ = self(torch.zeros(1, channels, H, W), torch.zeros(1, dtype=torch.long))
        self.noise_shapes = [e.shape[1:] for e in eps]

    def forward(self, x, y):
        eps = []
        log_dets = []

        def leave(prior, z, seen=None):
            e, log_det = prior(z, seen, y)
            eps.append(e)
            log_dets.append(log_det)

        for scale in self.scales:
            H, W = (n - n % 2 for n in x.shape[2:])
            leave(scale["row"], x[:, :, H:])
            leave(scale["column"], x[:, :, :H, W:])
            x = F.pixel_unshuffle(x[:, :, :H, :W], 2)
            total = x.new_zeros(len(x))
            for step in scale["steps"]:
                recompute = self.recompute and self.training
                x, log_det = checkpoint(step, x, y, use_reentrant=False) if recompute else step(x, y)
                total = total + log_det
            log_dets.append(total)
            if "split" in scale:
                x, z = x.chunk(2, 1)
                leave(scale["split"], z, seen=x)
        leave(self.last, x)
        return eps, sum(log_dets)

    def inverse(self, eps, y, how):
        """v (B,C,H,W), and how often the network was called, here once. `how` is for tarflow."""
        eps = list(eps)

        def enter(prior, seen=None):
            return prior(eps.pop(), seen, y, reverse=True)[0]

        x = enter(self.last)
        for scale in reversed(self.scales):
            if "split" in scale:
                x = torch.cat([x, enter(scale["split"], seen=x)], 1)
            for step in reversed(scale["steps"]):
                x = step.inverse(x, y)
            x = F.pixel_shuffle(x, 2)
            x = torch.cat([x, enter(scale["column"])], 3)
            x = torch.cat([x, enter(scale["row"])], 2)
        return x, 1


@torch.no_grad()
def initialise(model, v, y):
    """Set actnorm from data, once, before training: after it each channel has mean 0 and variance 1 (Glow sec. 3.1).
    The hooks run in the order of the steps, so each step sees what the steps before it, already set, put out."""
    def set_actnorm(step, args):
        x, _ = args
        step.log_scale.copy_(-torch.log(x.std((0, 2, 3), correction=0).clamp(min=1e-3)))
        step.shift.copy_(-x.mean((0, 2, 3)))

    hooks = [m.register_forward_pre_hook(set_actnorm) for m in model.modules() if isinstance(m, Step)]
    model.f(v, y)
    for hook in hooks:
        hook.remove()


# ---- extras: other inverses (jacobi, learned), learned noise (--dequantize variational)

def inverse_jacobi(block, z, y):
    """x from z (B,T,D), all positions at once from the last guess until nothing changes; and the calls of the network.
    The first n positions are right after n calls (Song 2021). Only positions that come after a change are solved again."""
    x = z.clone()
    todo = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)  # (B,T)
    calls = 0
    while todo.any():
        calls += 1
        unfinished = todo.any(1)  # images
        h = block.features(x[unfinished], y[unfinished])[todo[unfinished]]  # (N,width), N positions to do
        x_new = block.solve(z[todo][:, None], h[:, None])[:, 0]  # (N,D)
        changed = torch.zeros_like(todo)
        changed[todo] = (x_new - x[todo]).abs().amax(1) >= 1e-5
        x[todo] = x_new
        changed_before = changed.cumsum(1) - changed.int()  # how many changed before each position, in its image
        todo = changed_before > 0
    return x, calls


class LearnedInverse(nn.Module):
    """The inverse of a TarFlow in one pass: a transformer in which each position sees all. Noise z (B,T,D) -> x (B,T,D)."""

    def __init__(self, T, D, classes, cfg):
        super().__init__()
        self.turned = cfg.blocks % 2 == 1  # each block has turned the order round
        self.embed = nn.Linear(2 * D, cfg.width)
        self.label = nn.Embedding(max(classes, 1), cfg.width)
        self.position = nn.Parameter(0.1 * torch.randn(T, cfg.width))
        self.layers = nn.ModuleList(TransformerBlock(cfg.width, cfg.n_head) for _ in range(3 * cfg.blocks))
        self.head = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, D))

    def forward(self, z, y):
        z = z.flip(1, 2) if self.turned else z
        h = torch.cat([z, from_normal(z)], 2)  # as normal numbers and as the uniform ones that the splines make
        h = self.embed(h) + self.label(y)[:, None] + self.position
        for layer in self.layers:
            h = layer(h, lambda q, k, v: attention(q, k, v, None))
        return self.head(h)


class Critic(nn.Module):
    """How much an image v (B,C,H,W) looks like one of the class y (B,): a number each, (B,). The opponent of LearnedInverse."""

    def __init__(self, C, H, W, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, 32, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten(),
        )
        n = 128 * math.ceil(H / 4) * math.ceil(W / 4)
        self.head = nn.Linear(n, 1)
        self.label = zero(nn.Embedding(max(classes, 1), n))

    def forward(self, v, y):
        with torch.autocast(v.device.type, enabled=False):  # small differences of its scores count
            h = self.body(v.float())
            return self.head(h)[:, 0] + (h * self.label(y)).mean(1)


CRITIC_GAMMA = 15.0  # weight of the critic's slope
CRITIC_SIGMA = 0.02  # deviation of the noise by which the slope is measured


def inverse_losses(model, x, y, cfg):
    """What the learned inverse and its critic minimise, given levels x (B,C,H,W) in {0..255}; and parts of it, for the log.

    The mean square alone gives the average of all plausible images, which is blurred. The critic compares an image with its
    copy (R3GAN eq. 2). Its slope is penalised at both (R1 and R2), and estimated by adding small noise (APT, Lin 2025).
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the noise is that of the exact flow
        v, _ = dequantize(model, x)
        eps, _ = model.f(v, y)
    learned, _ = model.f.inverse(eps, y, "learned")
    learned = learned.float()
    mse = F.mse_loss(learned, v)

    critic = model.f.critic

    def slope(images, scores):
        """An estimate of the square of the critic's gradient at the images."""
        near = images + CRITIC_SIGMA * torch.randn_like(images)
        return ((critic(near, y) - scores) / CRITIC_SIGMA) ** 2

    fake = learned.detach()
    real_scores = critic(v, y)
    fake_scores = critic(fake, y)
    slopes = slope(v, real_scores) + slope(fake, fake_scores)
    critic_loss = (F.softplus(fake_scores - real_scores) + CRITIC_GAMMA / 2 * slopes).mean()
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    scores = torch.func.functional_call(critic, frozen, (learned, y))
    adversarial = F.softplus(real_scores.detach() - scores).mean()
    return {"loss": mse + adversarial + critic_loss, "mse": mse, "critic_loss": critic_loss}


class Dequantizer(nn.Module):
    """Draws u ~ q(u | x): normal noise, four affine couplings over the colours of a chessboard in turn, a sigmoid."""

    def __init__(self, channels, width=32):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.ReLU(),
            zero(nn.Conv2d(width, 2 * channels, 3, padding=1)),
        ) for _ in range(4))

    def forward(self, x):
        """x (B,C,H,W) in [-1,1] -> u of its shape, and log q(u | x), (B,)."""
        h = torch.randn_like(x)  # becomes u = sigmoid(h)
        log_q = log_normal([h])
        row, column = torch.meshgrid(*(torch.arange(n, device=x.device) for n in x.shape[2:]), indexing="ij")
        for i, net in enumerate(self.nets):
            stays = (row + column + i) % 2 == 0
            params = net(torch.cat([x, h * stays], 1)) * ~stays  # params of 0 change nothing
            h, log_det = affine_coupling(h, params, 0)
            log_q = log_q - log_det  # the change of variables
        u = torch.sigmoid(h)
        log_slope = F.logsigmoid(h) + F.logsigmoid(-h)  # du/dh = u (1 - u)
        return u, log_q - log_slope.sum((1, 2, 3))


# ---- the loops
# run.steps restores and saves, run.batch gives images, run.update steps the optimizer, run.log averages and writes.


def train(data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    model = build(run.shape, run.classes, cfg).to(run.device)
    if cfg.learn_inverse and not run.saved:  # the flow gets no gradient, so it stays as it was
        taught, other = read_run(cfg.init)
        for name in "arch shape classes coupling width dequantize blocks layers n_head patch labels".split():
            if (vars(taught) | other["facts"])[name] != (vars(cfg) | run.facts)[name]:
                fail(f"--learn-inverse: the run in {cfg.init} has another {name}")
    if not run.saved:
        v, _ = dequantize(model, data.train[:256].to(run.device))
        initialise(model, v, data.train_labels[:256].to(run.device))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    transformers = [part for name, part in model.named_modules() if name.endswith("layers")]  # Glow has none
    betas = (0.5 if cfg.learn_inverse else 0.9, 0.99)  # an opponent changes faster than data
    optimizer = Muon(model, transformers if cfg.optimizer == "muon" else [], cfg.lr, betas)
    parts = {"model": model, "ema_model": ema, "optimizer": optimizer}
    if cfg.compile:
        model.f.compile()
    model.train()
    for step in run.steps(parts, lambda: generate(ema, 80, cfg, run)[0]):
        x, y = run.batch(data)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        optimizer.param_groups[0]["lr"] = lr
        with run.autocast():
            if cfg.learn_inverse:
                losses = inverse_losses(model, x, y, cfg)
            else:
                batch_loss = loss(model, x, y, cfg)
                losses = {"loss": batch_loss, "bpd": batch_loss / math.log(2)}
        norm = run.update(losses["loss"], model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(**losses, grad_norm=norm, lr=lr)


@torch.no_grad()
def evaluate(model, images, classes, cfg, device):
    """An upper bound on -log2 P(x) / D of each image, from one draw of noise; P(x) is the mean of P(x | y) over y."""
    generator = torch.Generator().manual_seed(cfg.seed)  # of uniform noise
    torch.manual_seed(cfg.seed)  # of learned noise
    labels = torch.arange(max(classes, 1), device=device)
    bits = []
    for x in progress(images.split(at_once(images.shape[1:])), "evaluation"):
        v, log_q = dequantize(model, x.to(device), generator)
        given_label = [log_likelihood(model, v, log_q, y.expand(len(x))).cpu().double() for y in labels]
        log_p = torch.logsumexp(torch.stack(given_label), 0) - math.log(len(given_label))
        bits.append(-log_p / x[0].numel() / math.log(2))
    return torch.cat(bits)


def generate(model, n, cfg, run):
    """n images (n,C,H,W) uint8, their labels (n,) and how often a network was called, from the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = run.labels(n)
    images = []
    calls = 0
    for y in progress(labels.split(at_once(run.shape)), "sampling"):
        eps = [e.to(run.device) for e in draw_noise(model, len(y), generator)]
        v, more = sample(model, eps, y.to(run.device), cfg)
        images.append(quantize(v))
        calls = max(calls, more)
    return torch.cat(images), labels, calls


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


def choose(cfg, H, W):
    """Write what the size of the images decides into the fields that are 0. ValueError where fields do not fit."""
    glow = cfg.arch == "glow"
    if cfg.learn_inverse and glow:
        raise ValueError("--learn-inverse: is for --arch tarflow")
    cfg.width = cfg.width or (64 if glow else 128)
    largest = 2 if min(H, W) < 16 else 4
    cfg.patch = cfg.patch or max(p for p in range(1, largest + 1) if H % p == 0 and W % p == 0)
    if not cfg.scales and min(H, W) > 1:
        cfg.scales = max(n for n in (1, 2, 3) if n == 1 or H % 2**n == 0 and W % 2**n == 0)
    if not glow and (H % cfg.patch or W % cfg.patch):
        raise ValueError(f"--patch {cfg.patch}: does not divide {H} x {W} pixels")
    if not glow and cfg.width % cfg.n_head:
        raise ValueError(f"--n-head {cfg.n_head}: does not divide --width {cfg.width}")
    if glow and min(H, W) < 2**cfg.scales:
        raise ValueError(f"--scales {cfg.scales}: {H} x {W} pixels cannot be halved so often")
    return cfg


def build(shape, classes, cfg):
    """The network for images of shape (C,H,W), with the weights that --seed draws."""
    try:
        model = Flow(*shape, classes, choose(cfg, *shape[1:]))
    except ValueError as e:
        fail(str(e))
    return model.to(memory_format=torch.channels_last)


def load(folder, device="cpu"):
    """The averaged network of the run in a folder, ready to sample, and its config. From Python:

    model, cfg = flow.load("runs/flow-mnist")
    images, _ = flow.sample(model, flow.draw_noise(model, 80), torch.arange(80) % 10, cfg)  # in [-1,1]
    flow.save_grid(flow.quantize(images), "samples.png")
    """
    cfg, saved = read_run(folder)
    model = build(saved["facts"]["shape"], saved["facts"]["classes"], cfg)
    restore({"ema_model": model}, saved, folder)
    return model.to(device).eval().requires_grad_(False), cfg


def main(argv=None):
    cfg, saved = parse_args(argv)
    if cfg.inverse == "learned" and not cfg.learn_inverse or cfg.mode == "train" and cfg.learn_inverse and not cfg.init:
        fail("--inverse learned needs a run that --learn-inverse --init FOLDER trains, where FOLDER has a trained flow")
    run = Run(cfg, saved)
    if cfg.mode != "sample":
        data = run.describe(load_data(cfg.dataset, cfg.data_dir, cfg.image_size), cfg.labels)
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    model, _ = load(cfg.out, run.device)
    if cfg.mode != "sample":
        bits = evaluate(model, data.test, run.classes, cfg, run.device)
        write(run.folder / "likelihoods.npz", lambda f: np.savez_compressed(f, test=bits), "bits/dim of each test image")
        run.write_metrics(final=True, test_bpd=bits.mean().item())
        mean = ", the mean of p(x | y) over the classes" if run.classes else ""
        print(f"test bits/dim {bits.mean():.4f} (upper bound, one draw of {cfg.dequantize} noise; {run.tested}{mean})")
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels, calls = generate(model, cfg.num_samples, cfg, run)
        run.write_samples(images, labels, f" in {time.monotonic() - start:.2f} s ({calls} calls of a network)")


if __name__ == "__main__":
    launch(main)
