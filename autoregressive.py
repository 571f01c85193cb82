"""Autoregressive models: p(x) = prod_i p(x_i | x_1 ... x_i-1), so the likelihood of x is exact.

A network sees the earlier pixels and gives the distribution of the next one. The weakness of the
family is sampling: it takes one pass of the network for every pixel. This file shows two remedies.
Caches keep what was computed for earlier pixels, so a pixel costs the work of a pixel and not that
of an image. Fixed-point (Jacobi) sampling guesses all pixels at once and repeats this until nothing
changes. Both draw exactly the sample that the slow way draws from the same noise. Besides, the
network can take a patch of pixels as one position; a small head models these one after the other.

Papers: MADE (Germain 2015), PixelCNN and gated PixelCNN (van den Oord 2016a and b), PixelCNN++
(Salimans 2017), caches (Ramachandran 2017), transformer (Child 2019), fixed points (Song 2021).
  chain rule, exact likelihood ............. log_likelihood      PixelCNN eq. 1
  mixture of logistics ..................... logistic_mixture    PixelCNN++ eqs. 1 and 2
  pixels of a patch, channels of a pixel ... Head                PixelCNN eq. 2
  naive, fixed-point, cached sampling ...... sample              Song 2021 alg. 1
  vertical and horizontal stack, gate ...... GatedPixelCNN       gated PixelCNN eq. 4, fig. 2
  masks of a multilayer perceptron ......... MADE                MADE eqs. 8 and 9

  python autoregressive.py                                       # digits
  python autoregressive.py --dataset mnist --minutes 10          # 79.4 nats after 15,934 steps
  python autoregressive.py --dataset mnist --mode sample --sampler jacobi --complete top
"""

import copy
import math
from dataclasses import dataclass
from itertools import count, product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
    from kernels.logistic_mixture import logistic_mixture
    from kernels.masked_conv import gated_masked_conv2d, masked_conv2d
except ImportError:
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")
    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])
    def masked_conv2d(x, weight, bias, mask_type):  # of one row: A leaves the taps on the left, B also the centre
        r = weight.shape[3] // 2
        live = weight.clone()
        live[..., r if mask_type == "A" else r + 1:] = 0
        return F.conv2d(x, live, bias, padding=(0, r))
    def gated_masked_conv2d(x, weight, bias, cond, mask_type):
        a, b = (masked_conv2d(x, weight, bias, mask_type) + cond).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)
    def logistic_mixture(x, params):  # PixelCNN++ eqs. 1 and 2, with the 256 levels at -1, -1 + 2 / 255, ..., 1
        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)  # (B, M, H, W)
        x = x / 127.5 - 1
        inv_scales = torch.exp(-log_scales.clamp(min=-7))
        upper = torch.where(x > 0.999, math.inf, (x - means + 1 / 255) * inv_scales)  # the last bins are open
        lower = torch.where(x < -0.999, -math.inf, (x - means - 1 / 255) * inv_scales)
        log_p = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        return torch.logsumexp(log_p + torch.log_softmax(logits, 1), 1)


@dataclass
class Config:
    # model
    arch: Literal["transformer", "pixelcnn", "made"] = "transformer"  # network that sees the earlier pixels
    output: Literal["auto", "bernoulli", "softmax", "mixture"] = "auto"  # auto: bernoulli for mnist, else softmax
    mixtures: int = 5  # logistics in the mixture of --output mixture (1 to 1000)
    patch: int | None = None  # side of a position in pixels; not given: 2 below 16 pixels, else 4 (1 to 4096)
    width: int | None = None  # channels; not given: 128, for pixelcnn 64, for made 1000 units (1 to 65536)
    blocks: int = 4  # transformer blocks, gated blocks or hidden layers (1 to 1000)
    n_head: int = 4  # transformer: attention heads, which share the width (1 to 65536)
    kernel: int = 3  # pixelcnn: side of the convolutions, an odd number (3 to 255)
    # training
    labels: bool = True  # condition on the class; the test likelihood is the exact mean over the classes
    dropout: float | None = None  # dropout in the blocks; not given: 0.3 for digits, which are few, else 0 (0 to 1)
    optimizer: Literal["muon", "adam"] = "muon"  # of the matrices inside the network; all else moves by Adam
    warmup: int = 100  # steps in which the learning rate rises to --lr (>= 0)
    decay: int = 2000  # step from which on the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling, free to change on a trained model
    sampler: Literal["cached", "naive", "jacobi"] = "cached"  # three ways to one and the same sample
    temperature: float = 1.0  # temperature of the samples, below 1 they are nearer to the mode (0.001 to 100)
    label: str | None = None  # sample this class only, by its name or number; else all in turn
    complete: Literal["no", "left", "right", "top", "bottom"] = "no"  # complete test images of which this half is given
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


# ---- the likelihood
# A "pixel" is one value here: one channel of one point of the image. It has one of 2 or 256 levels, integers from 0 on.
# The network sees an image as a grid of positions. Each holds the n pixels of a patch, modelled one after the other.


def patchify(x, patch):
    """(B,C,H,W) -> (B, n = C*patch^2, H/patch, W/patch), the n channel by channel, row by row. Zeros pad right and bottom."""
    H, W = x.shape[2:]
    return F.pixel_unshuffle(F.pad(x, (0, -W % patch, 0, -H % patch)), patch)


def unpatchify(x, patch, H, W):
    """The inverse of patchify, cropped to H x W."""
    return F.pixel_shuffle(x, patch)[:, :, :H, :W]


def log_prob(params, x, output):
    """log p of each pixel by its K parameters. params (B,n,K,H,W), x (B,n,H,W) levels -> (B,n,H,W)."""
    if output == "bernoulli":  # x may also be the probability of a 1: then this is the mean over draws of the pixel
        return x * F.logsigmoid(params[:, :, 0]) + (1 - x) * F.logsigmoid(-params[:, :, 0])
    if output == "softmax":
        logits = params.permute(0, 3, 4, 1, 2)  # (B, H, W, n, 256), as they lie in memory
        x = x.permute(0, 2, 3, 1)
        nll = F.cross_entropy(logits.flatten(0, 3), x.flatten(), reduction="none")
        return -nll.view_as(x).permute(0, 3, 1, 2)
    pixels = x.flatten(0, 1)[:, None].float()
    return logistic_mixture(pixels, params.flatten(0, 1)).unflatten(0, x.shape[:2])


def log_likelihood(model, x, y, cfg, scored=None):
    """The exact log p(x | y) in nats, or of `scored` after the pixels of x. x (B,C,H,W) levels, int64, y (B,) -> (B,)."""
    patches = patchify(x, cfg.patch)
    inside = patchify(torch.ones_like(x[:1]), cfg.patch)  # 0 where zeros pad the image
    scored = patches if scored is None else patchify(scored, cfg.patch)
    log_p = log_prob(model(patches, y), scored, cfg.output)  # log p(x_i | x_1 ... x_i-1, y)
    return (log_p * inside).sum((1, 2, 3))  # PixelCNN eq. 1


# ---- the model: a trunk and a head
# The trunk gives each position features of the positions before it, the head the distribution of each of its pixels.
# A trunk takes x (B,C,H,W), which is what it sees of the pixels, and labels y (B,), and gives (B,features,H,W).
# The transformer is the default trunk. The two others stand behind the samplers.


class TransformerBlock(nn.Module):
    def __init__(self, width, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, attend):
        """x (B,T,width); attend(q, k, v) takes and gives (B,n_head,T,head_dim)."""
        B, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, width // self.n_head).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Decoder-only, over positions in raster order. Token t holds the position before t and the place of t itself."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        if cfg.width % cfg.n_head:
            raise ValueError(f"--n-head {cfg.n_head} does not divide --width {cfg.width}")
        self.features = cfg.width
        self.embed = nn.Linear(channels, cfg.width)
        self.start = nn.Embedding(max(classes, 1), cfg.width)  # token 0 is the label
        self.at_row = nn.Parameter(0.1 * torch.randn(H, cfg.width))
        self.at_column = nn.Parameter(0.1 * torch.randn(W, cfg.width))
        self.blocks = nn.ModuleList(TransformerBlock(cfg.width, cfg.n_head, cfg.dropout) for _ in range(cfg.blocks))
        self.norm = nn.LayerNorm(cfg.width)

    def places(self):
        return (self.at_row[:, None] + self.at_column).flatten(0, 1)  # (H*W, width)

    def forward(self, x, y):
        H, W = x.shape[2:]
        before = self.embed(x.flatten(2).transpose(1, 2)[:, :-1])
        tokens = torch.cat([self.start(y)[:, None], before], 1) + self.places()  # (B, H*W, width)
        for block in self.blocks:
            tokens = block(tokens, lambda q, k, v: attention(q, k, v, "causal"))
        return self.norm(tokens).unflatten(1, (H, W)).permute(0, 3, 1, 2)


def conv_at(conv, h):
    """A 1x1 convolution at one position: h (B,channels) -> (B,outputs)."""
    return F.linear(h, conv.weight.flatten(1), conv.bias)


class Head(nn.Module):
    """The parameters of each pixel of a position, from the position's features and its earlier pixels (as PixelCNN eq. 2).

    h (B,features,H,W), e (B,n*dims,H,W) embedded pixels -> (B,n,K,H,W). For n > 1 it is a MADE with one hidden layer
    inside each position: every pixel has `hidden` units, which see h and the pixels before it. A pixel with one output
    also has a direct path from h, as in MADE; for 256 it would be most of the work. For n = 1 there is this path alone.
    """

    def __init__(self, features, n, K, dims, hidden):
        super().__init__()
        self.n = n
        self.K = K
        self.hidden = hidden
        self.direct = nn.Conv2d(features, n * K, 1) if n == 1 or K == 1 else None
        if n > 1:
            self.from_h = nn.Conv2d(features, n * hidden, 1)
            self.from_x = nn.Conv2d(n * dims, n * hidden, 1, bias=False)
            self.to_out = nn.Conv2d(n * hidden, n * K, 1, groups=n)
            pixel = torch.arange(n)  # a unit sees the embedded pixels before the pixel that it belongs to
            mask = pixel.repeat_interleave(hidden)[:, None] > pixel.repeat_interleave(dims)
            self.register_buffer("mask", mask.float()[:, :, None, None], persistent=False)

    def forward(self, h, e):
        out = self.direct(h) if self.direct else 0
        if self.n > 1:
            units = F.relu(self.from_h(h) + F.conv2d(e, self.from_x.weight * self.mask))
            out = out + self.to_out(units)
        return out.unflatten(1, (self.n, self.K))

    def at(self, h):
        """What h (B,features) of one position gives to its units (B,n,hidden), and directly to its pixels (B,n,K) or zeros."""
        units = conv_at(self.from_h, h).unflatten(1, (self.n, self.hidden)) if self.n > 1 else None
        direct = conv_at(self.direct, h).unflatten(1, (self.n, self.K)) if self.direct else h.new_zeros(1, self.n, 1)
        return units, direct

    def pixel(self, units, direct, e, c):
        """As forward, for pixel c of one position: from at(h), and e (B,n,dims), which is zero from pixel c on -> (B,K)."""
        if self.n == 1:
            return direct[:, 0]
        from_x = F.linear(e.flatten(1), self.from_x.weight.view(self.n, self.hidden, -1)[c])  # zeros need no mask
        weight = self.to_out.weight.view(self.n, self.K, -1)[c]
        bias = self.to_out.bias.view(self.n, self.K)[c]
        return F.linear(F.relu(units[:, c] + from_x), weight, bias) + direct[:, c]


class Autoregressive(nn.Module):
    """The parameters of p(x_i | x_1 ... x_i-1, y) for all pixels in one pass.

    x (B,n,H,W) int64 levels of the n pixels of each position, y (B,) int64 -> (B,n,K,H,W).
    """

    def __init__(self, n, H, W, classes, cfg):
        super().__init__()
        self.levels = 2 if cfg.output == "bernoulli" else 256
        K = {"bernoulli": 1, "softmax": 256, "mixture": 3 * cfg.mixtures}[cfg.output]  # numbers a pixel
        dims, hidden = (8, 32) if self.levels == 2 else (16, 64)  # of an embedded level, units a pixel: tried on MNIST
        # The trunk sees binary pixels, and MADE's trunk all pixels, as numbers in [-1,1]. Else it sees them embedded.
        self.sees_levels = self.levels == 2 or cfg.arch == "made"
        self.embedding = nn.Embedding(self.levels, dims) if n > 1 or not self.sees_levels else None
        self.trunk = TRUNKS[cfg.arch](n if self.sees_levels else n * dims, H, W, classes, cfg)
        self.head = Head(self.trunk.features, n, K, dims, hidden)

    def embed(self, x):
        """Levels (B,n,...) -> (B,n*dims,...)."""
        return self.embedding(x.movedim(1, -1)).flatten(-2).movedim(-1, 1)

    def see(self, x):
        """Levels (B,n,...) as the trunk sees them: (B,n,...) in [-1,1], or (B,n*dims,...) embedded."""
        if self.sees_levels:
            return 2 * x.to(next(self.parameters())) / (self.levels - 1) - 1
        return self.embed(x)

    def forward(self, x, y):
        seen = self.see(x).contiguous(memory_format=torch.channels_last)
        e = self.embed(x) if self.embedding else None
        return self.head(self.trunk(seen, y), e).to(seen.dtype)  # at least float32, whatever --amp is


# ---- sampling: three ways to the same sample


def draw(params, u, output, temperature=1.0):
    """The level of a pixel from its parameters and a uniform number, by the inverse of the distribution function.

    params (...,K), u (...) in [0,1) -> levels (...), int64. The same u gives the same level, whatever computed params.
    """
    if output == "bernoulli":  # here 1 comes before 0
        return (u < torch.sigmoid(params[..., 0] / temperature)).long()
    if output == "softmax":
        logits = params
    else:
        logits, means, log_scales = params.chunk(3, -1)  # (..., M) each
    cdf = torch.cumsum(torch.softmax(logits / temperature, -1), -1)
    k = (u[..., None] >= cdf[..., :-1]).sum(-1, keepdim=True)  # the level, or the component of the mixture, (..., 1)
    if output == "softmax":
        return k[..., 0]
    # Given that u fell into component k, its place within the interval of k is again uniform. So it serves to draw from
    # the logistic, whose inverse distribution function is mean + scale * log(u / (1 - u)). The clamp keeps that finite.
    high = cdf.gather(-1, k)
    low = torch.where(k > 0, cdf.gather(-1, (k - 1).clamp(min=0)), 0)
    u = ((u[..., None] - low) / (high - low).clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)[..., 0]
    mean = means.gather(-1, k)[..., 0]
    scale = torch.exp(log_scales.gather(-1, k)[..., 0].clamp(min=-7))
    value = mean + temperature * scale * (torch.log(u) - torch.log1p(-u))  # in [-1,1] but for the tails
    return ((value + 1) * 127.5).round().clamp(0, 255).long()


def redraw(params, u, given, cfg):
    """Draw pixels, but keep those that are given, which are not -1. params (...,K), u and given (...) -> (...)."""
    return torch.where(given >= 0, given, draw(params, u, cfg.output, cfg.temperature))


@torch.no_grad()
def sample(model, y, noise, cfg, given=None):
    """Images from uniform noise (B,C,H,W) in [0,1) -> their levels (B,C,H,W), and the number of passes or steps.

    Pixels of `given` (B,C,H,W) that are not -1 are kept. The noise alone decides the sample, whatever --sampler is.
    """
    H, W = noise.shape[2:]
    if given is None:
        given = torch.full_like(noise, -1, dtype=torch.long)
    noise = patchify(noise, cfg.patch)
    given = patchify(given, cfg.patch)  # the zeros that pad the image count as given
    way = {"naive": sample_naive, "jacobi": sample_jacobi, "cached": sample_cached}[cfg.sampler]
    x, passes = way(model, y, noise, given, cfg)
    return unpatchify(x, cfg.patch, H, W), passes


def sample_naive(model, y, noise, given, cfg):
    """The definition: for each pixel one pass of the network, which sees the pixels drawn so far."""
    x = given.clamp(min=0)
    n, H, W = x.shape[1:]
    for i, j, c in product(range(H), range(W), range(n)):
        params = model(x, y)[:, c, :, i, j]  # (B, K)
        x[:, c, i, j] = redraw(params, noise[:, c, i, j], given[:, c, i, j], cfg)
    return x, H * W * n


def sample_jacobi(model, y, noise, given, cfg):
    """Each pass redraws all pixels given the last guess, Song 2021 alg. 1. After pass n the first n pixels are final.

    When a pass changes nothing, x is a fixed point. There is only one: the sample.
    """
    x = given.clamp(min=0)
    for passes in count(1):
        last = x
        x = redraw(model(last, y).movedim(2, -1), noise, given, cfg)
        if torch.equal(last, x):
            return x, passes


def sample_cached(model, y, noise, given, cfg):
    """One position after the other. A cache gives what a whole pass would give there, by the work of one position."""
    x = given.clamp(min=0)
    n, H, W = x.shape[1:]
    seen = model.see(x)
    cache = CACHES[cfg.arch](model.trunk, seen, y)
    for i, j in product(range(H), range(W)):
        units, direct = model.head.at(cache.step(seen, i, j))
        here = x[:, :, i, j]  # a view: what is written to it stands in x
        e = direct.new_zeros(len(x), n, model.embedding.embedding_dim) if n > 1 else None
        for c in range(n):
            params = model.head.pixel(units, direct, e, c)  # (B, K)
            here[:, c] = redraw(params, noise[:, c, i, j], given[:, c, i, j], cfg)
            if n > 1:
                e[:, c] = model.embedding(here[:, c])
        seen[:, :, i, j] = model.see(here)
    return x, H * W


# ---- caches: a position costs the work of a position. First the transformer's
# Cache(trunk, x, y), then step(x, i, j) for one position after the other, in raster order. At each step x holds what is
# known at the positions before (i, j). The step gives the features that the trunk's forward gives there, (B,features).


class KeyValueCache:
    """For the transformer: the keys and values so far, of each block."""

    def __init__(self, trunk, x, y):
        B, _, H, W = x.shape
        self.trunk = trunk
        self.start = trunk.start(y)
        self.places = trunk.places()
        self.kept = [x.new_zeros(2, B, block.n_head, H * W, trunk.features // block.n_head) for block in trunk.blocks]

    def step(self, x, i, j):
        t = i * x.shape[3] + j
        before = self.trunk.embed(x.flatten(2)[:, :, t - 1]) if t > 0 else self.start
        token = (before + self.places[t])[:, None]  # (B, 1, width)
        for block, (keys, values) in zip(self.trunk.blocks, self.kept, strict=True):
            def attend(q, k, v, keys=keys, values=values):  # the block calls it at once
                keys[:, :, t] = k[:, :, 0]
                values[:, :, t] = v[:, :, 0]
                return decode_attention(q, keys, values, t + 1)
            token = block(token, attend)
        return self.trunk.norm(token)[:, 0]


# ---- two more trunks, each with its cache: the gated PixelCNN, and MADE


class GatedBlock(nn.Module):
    """The vertical stack v sees all rows above, the horizontal stack h sees v and the pixels on the left.

    v_in shifts: v at row i has seen the rows before i alone. So v_conv may look at row i of v, and v_to_h at v itself.
    """

    def __init__(self, width, k, classes, dropout):
        super().__init__()
        self.r = k // 2
        self.v_conv = nn.Conv2d(width, 2 * width, (k // 2 + 1, k))
        self.v_to_h = nn.Conv2d(2 * width, 2 * width, 1)
        self.h_conv = nn.Conv2d(width, 2 * width, (1, k))
        self.h_out = nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(max(classes, 1), 4 * width)
        self.dropout = nn.Dropout(dropout)

    def vertical(self, v, y):
        """The next vertical stack (B,width,H,W), and what it gives to the horizontal one (B,2*width,H,W).

        v is (B,width,r+H,r+W+r): it has r more rows above and r more columns on both sides.
        """
        label_v, label_h = self.label(y)[:, :, None, None].chunk(2, 1)
        u = self.v_conv(v)  # (B, 2*width, H, W)
        a, b = (u + label_v).chunk(2, 1)
        v = v[:, :, self.r:, self.r:-self.r] + torch.tanh(a) * torch.sigmoid(b)  # eq. 4; the paper adds no v here
        return v, self.v_to_h(u) + label_h

    def forward(self, v, h, y):
        v, to_h = self.vertical(F.pad(v, (self.r, self.r, self.r, 0)), y)
        g = self.dropout(gated_masked_conv2d(h, self.h_conv.weight, self.h_conv.bias, to_h, "B"))  # eq. 4
        return v, h + self.h_out(g), g


class GatedPixelCNN(nn.Module):
    """Two stacks, gated PixelCNN fig. 2, so that no earlier pixel stays unseen.

    The PixelCNN before it is one stack of masked k x k convolutions. Pixels above on the right are outside their cone.
    """

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        k = cfg.kernel
        self.r = k // 2
        self.features = cfg.width
        self.v_in = nn.Conv2d(channels, cfg.width, (k // 2, k))  # the rows above alone
        self.h_in = nn.Conv2d(channels, cfg.width, (1, k))  # the pixels on the left alone
        self.blocks = nn.ModuleList(GatedBlock(cfg.width, k, classes, cfg.dropout) for _ in range(cfg.blocks))
        self.skip = nn.Conv2d(cfg.blocks * cfg.width, cfg.width, 1)

    def forward(self, x, y):
        v = self.v_in(F.pad(x, (self.r, self.r, self.r, 0))[:, :, :-1])  # (B, width, H, W)
        h = masked_conv2d(x, self.h_in.weight, self.h_in.bias, "A")
        skips = []
        for block in self.blocks:
            v, h, g = block(v, h, y)
            skips.append(g)
        return F.relu(h + self.skip(torch.cat(skips, 1)))


class GatedCache:
    """Of each block the rows of v so far, with r rows of zeros above, and the row of h under way, with r zeros on its left.

    A row of the vertical stack sees only the rows above it, so the whole row is computed when it begins.
    """

    def __init__(self, trunk, x, y):
        B, _, H, W = x.shape
        r = trunk.r
        self.trunk = trunk
        self.y = y
        self.v_rows = [x.new_zeros(B, trunk.features, r + H, W) for _ in trunk.blocks]
        self.h_row = [x.new_zeros(B, r + W, trunk.features) for _ in trunk.blocks]
        self.w_in = trunk.h_in.weight[:, :, 0, :r].flatten(1).T  # (channels*r, width), the taps on the left
        live = [block.h_conv.weight[:, :, 0, :r + 1] for block in trunk.blocks]  # and of the centre
        self.w_h = [w.permute(2, 1, 0).flatten(0, 1) for w in live]  # ((r+1)*width, 2*width)

    def begin_row(self, x, i):
        r = self.trunk.r
        v = self.trunk.v_in(F.pad(x[:, :, max(i - r, 0):i], (r, r, max(r - i, 0), 0)))  # (B, width, 1, W)
        self.to_h = []  # for each block (W, B, 2*width)
        for block, v_rows, h_row in zip(self.trunk.blocks, self.v_rows, self.h_row, strict=True):
            v_rows[:, :, i + r] = v[:, :, 0]
            v, to_h = block.vertical(F.pad(v_rows[:, :, i:i + r + 1], (r, r)), self.y)
            self.to_h.append(to_h[:, :, 0].permute(2, 0, 1) + block.h_conv.bias)  # with the bias that step would add
            h_row.zero_()

    def step(self, x, i, j):
        if j == 0:
            self.begin_row(x, i)
        r = self.trunk.r
        left = F.pad(x[:, :, i, max(j - r, 0):j], (max(r - j, 0), 0))  # (B, channels, r)
        h = torch.addmm(self.trunk.h_in.bias, left.flatten(1), self.w_in)  # (B, width)
        skips = []
        for block, h_row, to_h, w_h in zip(self.trunk.blocks, self.h_row, self.to_h, self.w_h, strict=True):
            h_row[:, j + r] = h
            a, b = torch.addmm(to_h[j], h_row[:, j:j + r + 1].flatten(1), w_h).chunk(2, 1)  # (B, width)
            g = torch.tanh(a) * torch.sigmoid(b)
            h = h + conv_at(block.h_out, g)
            skips.append(g)
        return F.relu(h + conv_at(self.trunk.skip, torch.cat(skips, 1)))


class MADE(nn.Module):
    """A multilayer perceptron whose weights are masked, so that the outputs of position t see positions before t alone.

    Positions count from 0. A unit of degree m sees the positions up to m; one of degree -1 sees the label alone.
    """

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        T = H * W
        self.features = 16  # of each position, for the head
        self.label = nn.Embedding(max(classes, 1), cfg.width)
        self.layers = nn.ModuleList(nn.Linear(cfg.width if i else T * channels, cfg.width) for i in range(cfg.blocks))
        self.out = nn.Linear(cfg.width, T * self.features)
        self.dropout = nn.Dropout(cfg.dropout)
        degree = torch.arange(cfg.width) * T // cfg.width - 1  # of each unit: -1 to T - 2, in rising order
        of_input = torch.arange(T).repeat_interleave(channels)  # the position of each input and each output
        of_output = torch.arange(T).repeat_interleave(self.features)
        self.register_buffer("degree", degree, persistent=False)
        self.register_buffer("mask_in", (degree[:, None] >= of_input).float(), persistent=False)  # MADE eq. 8
        self.register_buffer("mask_hidden", (degree[:, None] >= degree).float(), persistent=False)
        self.register_buffer("mask_out", (of_output[:, None] > degree).float(), persistent=False)  # MADE eq. 9

    def weights(self):
        """The masked weights of all layers, the output's last."""
        first, *others = self.layers
        hidden = [layer.weight * self.mask_hidden for layer in others]
        return [first.weight * self.mask_in, *hidden, self.out.weight * self.mask_out]

    def forward(self, x, y):
        B, _, H, W = x.shape
        *weights, w_out = self.weights()
        h = x.flatten(2).transpose(1, 2).flatten(1)  # (B, T*channels), position by position
        for i, (layer, weight) in enumerate(zip(self.layers, weights, strict=True)):
            h = F.linear(h, weight, layer.bias)
            if i == 0:
                h = h + self.label(y)
            h = self.dropout(F.relu(h))
        return F.linear(h, w_out, self.out.bias).view(B, H, W, -1).permute(0, 3, 1, 2)


class UnitCache:
    """The hidden units so far. Position t adds those of degree t - 1: a slice, as units are sorted by degree."""

    def __init__(self, trunk, x, y):
        B, _, H, W = x.shape
        self.trunk = trunk
        *self.weights, self.w_out = trunk.weights()
        self.units = [x.new_zeros(B, len(weight)) for weight in self.weights]
        self.biases = [layer.bias.expand(B, -1) for layer in trunk.layers]
        self.biases[0] = trunk.layers[0].bias + trunk.label(y)
        degrees = torch.arange(-1, H * W, device=x.device)  # t - 1 at position t
        self.first = torch.searchsorted(trunk.degree, degrees).tolist()  # the first unit of each degree

    def step(self, x, i, j):
        t = i * x.shape[3] + j
        new = slice(self.first[t], self.first[t + 1])
        h = x.flatten(2).transpose(1, 2).flatten(1)  # (B, T*channels)
        for weight, bias, units in zip(self.weights, self.biases, self.units, strict=True):
            units[:, new] = F.relu(torch.addmm(bias[:, new], h, weight[new].T))
            h = units
        out = slice(t * self.trunk.features, (t + 1) * self.trunk.features)
        return F.linear(h, self.w_out[out], self.trunk.out.bias[out])


TRUNKS = {"transformer": Transformer, "pixelcnn": GatedPixelCNN, "made": MADE}
CACHES = {"transformer": KeyValueCache, "pixelcnn": GatedCache, "made": UnitCache}


# ---- the loops

VALUES_AT_ONCE = 784  # of an image, where 250 are taken at once: so 250 x 784 x 256 logits fit


def choose(cfg, H, W):
    """Set in cfg what the data and the architecture decide where no flag was given."""
    if cfg.output == "auto":
        cfg.output = "bernoulli" if cfg.dataset == "mnist" else "softmax"
    cfg.patch = cfg.patch or min(2 if min(H, W) < 16 else 4, max(H, W))
    cfg.width = cfg.width or {"transformer": 128, "pixelcnn": 64, "made": 1000}[cfg.arch]
    if cfg.dropout is None:
        cfg.dropout = 0.3 if cfg.dataset == "digits" else 0.0
    if cfg.patch > max(H, W):
        raise ValueError(f"--patch {cfg.patch}: is larger than the images, {H} x {W}")
    if cfg.kernel % 2 == 0:
        raise ValueError(f"--kernel {cfg.kernel}: must be odd")
    return cfg


def to_levels(x, cfg, generator=None):
    """x uint8 in {0..255} -> the levels that are modelled, int64. Binary ones are drawn: 1 with probability x / 255."""
    if cfg.output != "bernoulli":
        return x.long()
    return (torch.rand(x.shape, generator=generator).to(x.device) * 255 < x).long()


def to_pixels(levels, cfg):
    """Levels -> uint8 in {0..255} on the CPU, as they are written to files."""
    return (255 * levels if cfg.output == "bernoulli" else levels).byte().cpu()


def train(data, cfg, run):
    """Learning rate and average do not depend on when the run ends: it may be stopped, or continued, at any step."""
    model = build(run.shape, run.classes, cfg).to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    inside = [model.trunk.blocks] if cfg.optimizer == "muon" and cfg.arch != "made" else []  # MADE's are too large
    optimizer = Muon(model, inside, cfg.lr, (0.9, 0.99))
    parts = {"model": model, "ema_model": ema, "optimizer": optimizer}
    net = torch.compile(model) if cfg.compile else model
    model.train()
    for step in run.steps(parts, preview=lambda: generate(ema, 80, cfg, run)[0]):
        x, y = run.batch(data)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        optimizer.param_groups[0]["lr"] = lr
        scored = x / 255 if cfg.output == "bernoulli" else None  # the mean of each pixel is less noisy than a draw
        with run.autocast():
            nats = -log_likelihood(net, to_levels(x, cfg), y, cfg, scored).mean()
        loss = nats / x[0].numel()  # nats a pixel
        norm = run.update(loss, model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(loss=loss, nats=nats, grad_norm=norm, lr=lr)


@torch.no_grad()
def evaluate(model, data, cfg, run):
    """The exact -log p(x) of the test images, binarised once. With labels, p(x) = sum_y p(x | y) / classes."""
    test = to_levels(data.test, cfg, torch.Generator().manual_seed(0))
    size = at_once(run.shape, VALUES_AT_ONCE // 5)  # 49 images of MNIST: less memory to map anew, so faster on a CPU
    batches = list(zip(test.split(size), data.test_labels.split(size), strict=True))
    classes = max(run.classes, 1)
    nats = 0.0
    nats_given_label = 0.0
    for x, y in progress(batches, "evaluation"):
        x = x.to(run.device)
        labels = [torch.full_like(y, label, device=run.device) for label in range(classes)]
        log_p = torch.stack([log_likelihood(model, x, label, cfg) for label in labels]).cpu().double()  # (classes, B)
        nats -= (torch.logsumexp(log_p, 0) - math.log(classes)).sum().item()
        nats_given_label -= log_p.gather(0, y[None]).sum().item()
    metrics = {"test_nats": nats / len(test), "test_bpd": nats / test.numel() / math.log(2)}
    if run.classes:
        metrics["test_nats_given_label"] = nats_given_label / len(test)
    return metrics


def generate(model, n, cfg, run):
    """n images (n,C,H,W) uint8 from the noise of --seed, their labels (n,), and the passes or steps of a batch."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = run.labels(n)
    images = []
    passes = 0
    for y in progress(labels.split(at_once(run.shape, VALUES_AT_ONCE)), "sampling"):
        noise = torch.rand(len(y), *run.shape, generator=generator).to(run.device)
        levels, used = sample(model, y.to(run.device), noise, cfg)
        images.append(to_pixels(levels, cfg))
        passes = max(passes, used)
    return torch.cat(images), labels, passes


def show_completions(model, data, cfg, run, draws=4):
    """complete.png: of 16 test images each, the half of it that is given (with the rest in grey), and 4 completions."""
    x = to_levels(data.test[:16], cfg, torch.Generator().manual_seed(0))  # binarised as in evaluation
    H, W = run.shape[1:]
    row = torch.arange(H)[:, None]
    column = torch.arange(W)
    halves = {"top": row < H // 2, "bottom": row >= H - H // 2, "left": column < W // 2, "right": column >= W - W // 2}
    known = halves[cfg.complete]
    given = torch.where(known, x, -1).repeat_interleave(draws, 0).to(run.device)
    y = data.test_labels[:16].repeat_interleave(draws).to(run.device)
    noise = torch.rand(given.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    completed, _ = sample(model, y, noise, cfg, given)
    whole = to_pixels(x, cfg)[:, None]
    half = torch.where(known, whole, 128)
    grid = torch.cat([whole, half, to_pixels(completed, cfg).unflatten(0, (-1, draws))], 1).flatten(0, 1)
    what = f"{len(x)} test images: each, its {cfg.complete} half that is given, {draws} completions"
    save_grid(grid, run.folder / "complete.png", 2 * (2 + draws), what)


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


def build(shape, classes, cfg):
    """The network for images of shape (C,H,W), with the weights that --seed draws."""
    C, H, W = shape
    try:
        choose(cfg, H, W)
        model = Autoregressive(C * cfg.patch**2, math.ceil(H / cfg.patch), math.ceil(W / cfg.patch), classes, cfg)
    except ValueError as e:
        fail(str(e))
    return model.to(memory_format=torch.channels_last)


def load(folder, device="cpu"):
    """The averaged network of a run, ready to sample, and its config. In three lines:

    model, cfg = autoregressive.load("runs/autoregressive-digits")
    levels, _ = autoregressive.sample(model, torch.arange(10), torch.rand(10, 1, 8, 8), cfg)  # labels, noise
    autoregressive.save_grid(autoregressive.to_pixels(levels, cfg), "samples.png")
    """
    cfg, saved = read_run(folder)
    model = build(saved["facts"]["shape"], saved["facts"]["classes"], cfg)
    restore({"ema_model": model}, saved, folder)
    return model.to(device).eval().requires_grad_(False), cfg


def main(argv=None):
    cfg, saved = parse_args(argv)
    run = Run(cfg, saved)
    if cfg.mode != "sample" or cfg.complete != "no":
        data = run.describe(load_data(cfg.dataset, cfg.data_dir, cfg.image_size), cfg.labels)
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    model, _ = load(cfg.out, run.device)  # what was saved is what is evaluated
    if cfg.mode != "sample":
        found = evaluate(model, data, cfg, run)
        run.write_metrics(final=True, **found)
        kind = "binarised with seed 0" if cfg.output == "bernoulli" else "8 bits"
        print(f"test nll {found['test_nats']:.3f} nats, {found['test_bpd']:.4f} bits/dim (exact, {run.tested}, {kind})")
        if run.classes:
            given = found["test_nats_given_label"]
            print(f"This is the mean of p(x | y) over the classes. Given the label it is {given:.3f} nats.")
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels, passes = generate(model, cfg.num_samples, cfg, run)
        how = f"{passes} {'steps' if cfg.sampler == 'cached' else 'passes'} for {math.prod(run.shape)} pixels"
        run.write_samples(images, labels, f" in {time.monotonic() - start:.2f} s ({cfg.sampler}: {how})")
    if cfg.complete != "no":
        show_completions(model, data, cfg, run)


if __name__ == "__main__":
    launch(main)
