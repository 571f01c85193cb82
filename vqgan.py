"""VQGAN: an autoencoder turns an image into a small grid of codes, a transformer models the codes.

The weakness that it answers: an autoregressive model of pixels takes a step for each pixel, so
large images are out of reach. Stage 1 learns discrete codes, one for downsample x downsample
pixels. Its decoder is trained like the generator of a GAN, so it draws sharp detail that the
codes need not hold. Stage 2 is autoregressive over the codes, which are 4 to 256 times fewer than
the pixels. A window that slides over the grid samples images larger than any in the training.

Papers: VQ-VAE (van den Oord 2017), VQGAN (Esser 2021), SimVQ (Zhu 2024), FSQ (Mentzer 2024).
  nearest code, straight through ........... VQ                  VQ-VAE eqs. 1 and 2
  codebook by moving averages .............. VQ.update           VQ-VAE app. A.1 eqs. 6 to 8
  loss of the autoencoder .................. loss_autoencoder    VQGAN eqs. 4 and 6
  adaptive weight .......................... adaptive_weight     VQGAN eq. 7
  loss of the patch discriminator .......... loss_discriminator  VQGAN eq. 5, with the hinge
  chain rule, window, guidance (Ho 2022) ... nll, sample         VQGAN eqs. 9 and 10, fig. 3
  one linear layer over a frozen codebook .. SimVQ               SimVQ eq. 6
  quantization without a codebook .......... FSQ                 FSQ sec. 3.1

  python vqgan.py                                               # digits; it trains both stages
  python vqgan.py --dataset mnist --stage1 1200 --minutes 10    # MNIST on two CPU cores
  python vqgan.py --dataset photos --width 32 --batch-size 8 --stage1 1000 --steps 2500
  python vqgan.py --out runs/vqgan-photos --mode sample --sample-size 256 384 --num-samples 2
With --optimizer adam, 4,460 steps give a Frechet distance of 0.15, reconstructions of 0.07.
The third trains on a folder of photographs (tools/photos.py makes one), the last draws larger ones.
"""

import copy
import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

# Further imports (dist, sys) and the helpers for data, runs and files stand below, in the plumbing block.

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
    from kernels.group_norm import group_norm_silu
    from kernels.vector_quantize import nearest_code, straight_through, sum_and_count
except ImportError:
    def nearest_code(z, codebook):
        e = codebook.detach()
        norms = e.square().sum(1)
        parts = z.detach().flatten(0, -2).split(4096)
        indices = torch.cat([(norms - 2 * part @ e.T).argmin(1) for part in parts]).view(z.shape[:-1])
        return F.embedding(indices, codebook), indices

    def straight_through(z, z_q):
        return z_q.detach() + (z - z.detach())

    def sum_and_count(x, indices, n_codes):
        sums = x.new_zeros(n_codes, x.shape[-1]).index_add_(0, indices.flatten(), x.flatten(0, -2))
        return sums, indices.new_zeros(n_codes).index_add_(0, indices.flatten(), torch.ones_like(indices).flatten())

    def group_norm_silu(x, groups, weight, bias, eps=1e-5):
        return F.silu(torch.group_norm(x, groups, weight, bias, eps))

    def attention(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")

    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])


@dataclass
class Config:
    # model
    quantizer: Literal["vq", "fsq", "simvq"] = "vq"  # moving averages, fixed levels, frozen codebook under a linear layer
    n_codes: int = 256  # size of the codebook of vq and simvq; of fsq it is the product of the levels (1 to 65536)
    code_dim: int = 0  # numbers in a code, 0: 16 for vq, 8 for simvq; fsq has one for each of its levels (0 to 4096)
    fsq_levels: tuple[int, ...] = (8, 6, 5)  # of fsq: how many values each number of a code can take (3 to 65536)
    downsample: int = 0  # pixels a side of a code: 2, 4, 8 or 16; 0: 2 below 16 pixels, 4 up to 64, else 8 (0 to 16)
    width: int = 48  # channels at half resolution; there are twice as many at a quarter, then four times (1 to 4096)
    blocks: int = 1  # residual blocks at each resolution of the encoder and the decoder (1 to 256)
    prior_width: int = 128  # channels of the transformer (1 to 16384)
    prior_blocks: int = 4  # blocks of the transformer (1 to 256)
    n_head: int = 4  # attention heads of the transformer (1 to 1024)
    dropout: float = 0.1  # dropout in the blocks of the transformer (0 to 1)
    # training
    stage1: int = 1600  # so many of the --steps train the autoencoder, those after them the transformer (> 0)
    beta: float = 0.25  # weight of the commitment loss, which holds the encoder to its codes, of vq and simvq (>= 0)
    disc_start: int = 500  # the discriminator is trained, and takes part in the loss, from this step on (>= 0)
    disc_weight: float = 0.1  # factor of the adversarial loss, times the adaptive weight; 0: a plain VQ-VAE (>= 0)
    perceptual_weight: float = 0.2  # weight of the distance in the discriminator's features, from --disc-start on (>= 0)
    prior_lr: float = 3e-3  # learning rate of the transformer (> 0)
    optimizer: Literal["muon", "adam"] = "muon"  # of the transformer's matrices; all else moves by Adam
    warmup: int = 100  # steps of linear warm-up of the learning rate, in each stage (>= 0)
    decay: int = 2000  # steps of a stage after which the learning rate falls as 1 / sqrt(step) (> 0)
    labels: bool = True  # condition the transformer on the class
    label_dropout: float = 0.1  # share of labels that are hidden from the transformer, for guidance (0 to 1)
    # evaluation and sampling, free to change on a trained model
    temperature: float = 1.0  # of the samples; less is nearer to the mode (> 0)
    guidance: float = 1.5  # classifier-free guidance: 0 drops the label, 1 is conditional, more is sharper (0 to 1000)
    sample_size: tuple[int, ...] = (0, 0)  # height and width of samples, also larger ones; 0: as trained (0 to 16384)
    label: str | None = None  # sample this class only, by its name or number; else all in turn
    # core, the same in all six scripts
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (0 to 4096)
    batch_size: int = 32  # images a step, over all processes (1 to 65536)
    lr: float = 1e-3  # learning rate of the autoencoder and the discriminator (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    ema: float = 0.15  # share of a stage so far over which the weights are averaged, not a decay rate (> 0 to 0.5)
    init: str | None = None  # start from the weights of the run in this folder, of the same script and network
    # core, free to change on a trained model
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    steps: int | None = None  # optimizer steps of both stages, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training, of both stages (> 0)
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


# ---- stage 1: encoder x (B,C,H,W) in [-1,1] -> z (B,h,w,D), quantizer z -> z_q of the same shape, decoder z_q -> x_hat
# A code is one of K vectors of D numbers; indices (B,h,w) in {0..K-1} say which. A quantizer gives z_q, whose gradient
# passes on to z as it is, then the indices, then a loss of its own, a number. Its lookup(indices) gives z_q again.


class VQ(nn.Module):
    """Each code is the moving average of the z that took it. A code that few take becomes a z of the batch."""

    def __init__(self, cfg, decay=0.99, dead=0.1):
        super().__init__()
        self.beta = cfg.beta
        self.decay = decay  # gamma of VQ-VAE app. A.1
        self.dead = dead  # a code is dead if it is taken less often than this share of the mean
        # These have no gradient. They are parameters, and no buffers, so that update_ema averages them like weights.
        self.codebook = nn.Parameter(torch.randn(cfg.n_codes, cfg.code_dim), requires_grad=False)  # e_k
        self.counts = nn.Parameter(torch.zeros(cfg.n_codes), requires_grad=False)  # N_k
        self.sums = nn.Parameter(torch.zeros(cfg.n_codes, cfg.code_dim), requires_grad=False)  # m_k

    def forward(self, z):
        z_q, indices = nearest_code(z, self.codebook)  # VQ-VAE eqs. 1 and 2
        if self.training:
            self.update(over_ranks(z.detach()).flatten(0, -2), over_ranks(indices).flatten())  # of all processes
        commitment = self.beta * F.mse_loss(z, z_q.detach())  # the last term of VQ-VAE eq. 3
        return straight_through(z, z_q), indices, commitment

    @torch.no_grad()
    def update(self, z, indices):
        """z (N,D) took the codes indices (N,)."""
        K = len(self.codebook)
        sums, n = sum_and_count(z, indices, K)
        self.counts.lerp_(n.to(z.dtype), 1 - self.decay)  # N_k <- gamma N_k + (1 - gamma) n_k, VQ-VAE eq. 6
        self.sums.lerp_(sums, 1 - self.decay)  # m_k <- gamma m_k + (1 - gamma) sum of z, eq. 7

        # A dead code becomes a vector of the batch. It gets the mean count, so that it outlives the updates to come.
        # Counts are 0 at first. One update gives a used code a hundredth of n_k, so nearly all are dead, and begin here.
        mean_count = len(z) / K
        dead = self.counts < self.dead * mean_count
        chosen = torch.randint(len(z), (K,), device=z.device)
        if dist.is_initialized():
            dist.broadcast(chosen, 0)  # the same vectors in all processes
        self.sums.copy_(torch.where(dead[:, None], mean_count * z[chosen], self.sums))
        self.counts.masked_fill_(dead, mean_count)

        self.codebook.copy_(self.sums / self.counts[:, None])  # e_k = m_k / N_k, eq. 8

    def lookup(self, indices):
        return F.embedding(indices, self.codebook)


class Autoencoder(nn.Module):
    """It takes any H and W: the image is padded with its last row and column to whole codes, and cropped back."""

    def __init__(self, channels, cfg):
        super().__init__()
        widths = [cfg.width * min(2**i, 4) for i in range(int(math.log2(cfg.downsample)))]  # one for each halving
        self.downsample = cfg.downsample
        self.encoder = Encoder(channels, cfg.code_dim, widths, cfg.blocks)
        self.quantizer = {"vq": VQ, "fsq": FSQ, "simvq": SimVQ}[cfg.quantizer](cfg)
        self.decoder = Decoder(cfg.code_dim, widths, cfg.blocks)
        self.last = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def encode(self, x):
        """x (B,C,H,W) in [-1,1] -> z (B,h,w,D), at least in float32, whatever the precision of the rest is."""
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % self.downsample, 0, -H % self.downsample), mode="replicate")
        z = self.encoder(x).permute(0, 2, 3, 1)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def decode(self, z_q):
        """z_q (B,h,w,D) -> (B,C,h*downsample,w*downsample)."""
        return F.pixel_shuffle(self.last(self.decoder(z_q.permute(0, 3, 1, 2))), 2)

    def draw(self, indices):
        """indices (B,h,w) -> the images of these codes, (B,C,h*downsample,w*downsample), [-1,1] when clipped."""
        return self.decode(self.quantizer.lookup(indices))

    def forward(self, x):
        H, W = x.shape[2:]
        z = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            z_q, indices, loss = self.quantizer(z)
        return self.decode(z_q)[..., :H, :W], indices, loss


# ---- the losses of stage 1


class Discriminator(nn.Module):
    """x (B,C,H,W) -> a score for every patch of 23 x 23 pixels, and the features of the layers below."""

    def __init__(self, channels, width=32):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, stride=2, padding=1),
                                    nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                                    nn.Conv2d(2 * width, 4 * width, 3, padding=1)])
        self.out = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.out(x), features


def feature_distance(a, b):
    """Perceptual distance of features a and b, lists of (B,c,h,w), one for each layer: LPIPS eq. 1 without weights.

    VQGAN takes LPIPS itself, with the features of a pretrained network. Here they are those of D, so none is needed.
    """
    total = 0
    for p, q in zip(a, b, strict=True):
        difference = F.normalize(p, dim=1) - F.normalize(q, dim=1)
        total = total + difference.square().sum(1).mean()
    return total / len(a)


def gradient_norm(loss, weight):
    """|d loss / d weight|, of the loss over all processes."""
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return over_ranks(grad[None]).mean(0).norm()


def adaptive_weight(reconstruction, adversarial, last):
    """lambda = |d reconstruction / d w| / (|d adversarial / d w| + 1e-6), w the decoder's last weight. No gradient."""
    weight = gradient_norm(reconstruction, last) / (gradient_norm(adversarial, last) + 1e-6)  # VQGAN eq. 7
    return weight.clamp(0, 1e4).detach()  # the limit is that of the authors' code


def loss_autoencoder(model, D, x, step, cfg):
    """What the autoencoder minimises, the terms of it, and x_hat. x (B,C,H,W) in [-1,1]. The caller freezes D."""
    x_hat, _, loss_q = model(x)
    reconstruction = F.l1_loss(x_hat, x)
    terms = {"l1": reconstruction, "loss_q": loss_q}
    if step < cfg.disc_start or cfg.disc_weight == 0:
        return reconstruction + loss_q, terms, x_hat  # VQGAN eq. 4, by L1; vq's codes move by averages, without a loss
    score, features_hat = D(x_hat)
    if cfg.perceptual_weight > 0:
        _, features = D(x)
        terms["perceptual"] = feature_distance(features_hat, features)
        reconstruction = reconstruction + cfg.perceptual_weight * terms["perceptual"]
    adversarial = -score.mean()
    weight = adaptive_weight(reconstruction, adversarial, model.last.weight)
    total = reconstruction + loss_q + cfg.disc_weight * weight * adversarial  # VQGAN eq. 6
    return total, terms | {"adversarial": adversarial, "adaptive": weight}, x_hat


def loss_discriminator(D, x, x_hat):
    """What D minimises: VQGAN eq. 5 with the hinge in place of the logarithm. The autoencoder gets no gradient."""
    real, _ = D(x)
    fake, _ = D(x_hat.detach())
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def usage(indices, n_codes):
    """Share of the codes that occur, and the perplexity exp(entropy) of the indices, at most n_codes."""
    p = torch.bincount(indices.flatten(), minlength=n_codes) / indices.numel()
    return (p > 0).float().mean().item(), torch.exp(torch.special.entr(p).sum()).item()


# ---- stage 2: prior(indices (B,h,w), y (B,)) -> logits (B,h*w,K) of each code, given those before it and the class


def nll(prior, indices, y):
    """-log p(indices | y) in nats, by the chain rule. indices (B,h,w), y (B,) -> (B,)."""
    logits = prior(indices, y)
    return F.cross_entropy(logits.transpose(1, 2), indices.flatten(1), reduction="none").sum(1)  # VQGAN eqs. 9 and 10


@torch.no_grad()
def sample(prior, y, noise, cfg, cached=True):
    """Indices (B,h,w), of any h and w, from uniform noise (B,h,w) in [0,1), in raster order (VQGAN eq. 10).

    A grid larger than the prior's is seen through a window of the prior's size around the position under way, as far as
    the edges allow (VQGAN fig. 3). The prior takes the window for an image, so the class token stands before it. It is
    causal, so what the window holds from the position under way on does not matter. As the window moves, each position
    costs a whole pass. Without a window a cache saves that; cached=False does without it and gives the same indices.
    With --guidance the prior is asked twice for each position, with the label and without it.
    """
    guided = prior.classes > 0 and cfg.guidance != 1
    if guided:
        y = torch.cat([y, torch.full_like(y, prior.classes)])  # with the label and without
    _, rows, columns = noise.shape
    h = min(rows, prior.grid[0])
    w = min(columns, prior.grid[1])
    cache = prior.cache(len(y), h, w) if cached and (h, w) == (rows, columns) else None
    indices = torch.zeros_like(noise, dtype=torch.long)
    for i, j in product(range(rows), range(columns)):
        top = min(max(i - h // 2, 0), rows - h)
        left = min(max(j - w // 2, 0), columns - w)
        window = indices[:, top:top + h, left:left + w].repeat(1 + guided, 1, 1)
        t = (i - top) * w + (j - left)  # the position of (i, j) in the window
        logits = prior(window, y)[:, t] if cache is None else prior.step(window, y, t, cache)
        if guided:
            with_label, without = logits.chunk(2)
            logits = without + cfg.guidance * (with_label - without)  # Ho 2022, whose w is guidance - 1
        cdf = torch.softmax(logits / cfg.temperature, 1).cumsum(1)
        u = noise[:, i, j, None] * cdf[:, -1:]  # the last value of the cdf is 1, but for rounding
        indices[:, i, j] = (u >= cdf[:, :-1]).sum(1)  # the inverse of the cdf at u
    return indices


# ---- the network of stage 2: a transformer over the codes in raster order


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
        """x (B,T,C); attend(q, k, v) takes and gives (B,n_head,T,head_dim)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, C)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Prior(nn.Module):
    """indices (B,h,w), at most the grid (rows,columns) it is built for, y (B,), `classes` for no label -> logits (B,h*w,K)."""

    def __init__(self, rows, columns, classes, cfg):
        super().__init__()
        width = cfg.prior_width
        self.grid = (rows, columns)
        self.classes = classes
        self.embed = nn.Embedding(cfg.n_codes, width)
        self.start = nn.Embedding(classes + 1, width)  # the class token
        self.at_row = nn.Parameter(torch.empty(rows, width))
        self.at_column = nn.Parameter(torch.empty(columns, width))
        for table in (self.embed.weight, self.start.weight, self.at_row, self.at_column):
            nn.init.normal_(table, std=0.3)  # codes, rows and columns start with the same variance
        self.blocks = nn.ModuleList(TransformerBlock(width, cfg.n_head, cfg.dropout) for _ in range(cfg.prior_blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, cfg.n_codes)

    def positions(self, h, w):
        return (self.at_row[:h, None] + self.at_column[:w]).flatten(0, 1)  # (h*w, width)

    def forward(self, indices, y):
        before = self.embed(indices.flatten(1)[:, :-1])  # position t sees the codes before t
        tokens = torch.cat([self.start(y)[:, None], before], 1) + self.positions(*indices.shape[1:])
        for block in self.blocks:
            tokens = block(tokens, lambda q, k, v: attention(q, k, v, "causal"))
        return self.out(self.norm(tokens))

    def cache(self, B, h, w):
        """Room for the keys and values of each block."""
        n_head = self.blocks[0].n_head
        head_dim = self.out.in_features // n_head
        return [self.at_row.new_zeros(2, B, n_head, h * w, head_dim) for _ in self.blocks]

    def step(self, indices, y, t, cache):
        """Logits (B,K) of position t, as forward gives them, from the keys and values of the positions before it."""
        token = self.start(y) if t == 0 else self.embed(indices.flatten(1)[:, t - 1])
        token = (token + self.positions(*indices.shape[1:])[t])[:, None]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            def attend(q, k, v, keys=keys, values=values):
                keys[:, :, t] = k[:, :, 0]
                values[:, :, t] = v[:, :, 0]
                return decode_attention(q, keys, values, t + 1)
            token = block(token, attend)
        return self.out(self.norm(token))[:, 0]


# ---- the networks of stage 1


class GroupNormSiLU(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(math.gcd(channels, max(channels // 8, 1)), channels)  # groups of at least 8 channels

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias)


def zero(layer):
    """Start the layer at 0, so that the residual branch it ends adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(
            GroupNormSiLU(width), nn.Conv2d(width, width, 3, padding=1),
            GroupNormSiLU(width), zero(nn.Conv2d(width, width, 3, padding=1)))

    def forward(self, x):
        return x + self.branch(x)


class SelfAttention(nn.Module):
    """Every position attends to all, with one head."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zero(nn.Linear(width, width))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = self.qkv(self.norm(tokens))[:, None].chunk(3, 3)  # of one head
        return x + self.proj(attention(q, k, v)[:, 0]).transpose(1, 2).view_as(x)


class Encoder(nn.Sequential):
    """The first halving folds 2 x 2 pixels into channels, each further one is a convolution of stride 2."""

    def __init__(self, channels, D, widths, blocks):
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            layers += [ResBlock(width) for _ in range(blocks)]
            if i + 1 < len(widths):
                layers.append(nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1))
        layers += [SelfAttention(width), ResBlock(width), GroupNormSiLU(width), nn.Conv2d(width, D, 1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """z_q (B,D,h,w) -> (B,width,H/2,W/2). Autoencoder.last comes after it, whose weight adaptive_weight asks for."""

    def __init__(self, D, widths, blocks):
        widths = widths[::-1]
        layers = [nn.Conv2d(D, widths[0], 3, padding=1), ResBlock(widths[0]), SelfAttention(widths[0])]
        for i, width in enumerate(widths):
            layers += [ResBlock(width) for _ in range(blocks)]
            if i + 1 < len(widths):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, widths[i + 1], 3, padding=1)]
        super().__init__(*layers, GroupNormSiLU(widths[-1]))


# ---- two other quantizers


class SimVQ(nn.Module):
    """The codes are W c_k: a learned W, frozen random vectors c_k. So all codes move, whichever of them are used."""

    def __init__(self, cfg):
        super().__init__()
        self.beta = cfg.beta
        self.linear = nn.Linear(cfg.code_dim, cfg.code_dim, bias=False)  # W
        self.register_buffer("frozen", torch.randn(cfg.n_codes, cfg.code_dim) * cfg.code_dim**-0.5)  # c_k, norm about 1
        nn.init.eye_(self.linear.weight)

    def forward(self, z):
        z_q, indices = nearest_code(z, self.linear(self.frozen))
        loss = F.mse_loss(z.detach(), z_q) + self.beta * F.mse_loss(z, z_q.detach())  # SimVQ eq. 6
        return straight_through(z, z_q), indices, loss

    def lookup(self, indices):
        return self.linear(F.embedding(indices, self.frozen))


class FSQ(nn.Module):
    """Each number of z is bounded and rounded to a digit, one of a few levels. The digits together make the index."""

    def __init__(self, cfg):
        super().__init__()
        levels = torch.tensor(cfg.fsq_levels, dtype=torch.float32)
        basis = torch.cumprod(F.pad(levels[:-1], (1, 0), value=1), 0)  # 1, L_1, L_1 L_2, ...
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", basis.long(), persistent=False)

    def bound(self, z):
        """Into (0, levels - 1), which rounds to {0..levels-1}. The lowest and the highest have half a bin each."""
        even = (self.levels + 1) % 2
        shift = torch.atanh(even / (self.levels - 1))  # z = 0 goes to (levels - 1 - even) / 2, a level in both cases
        return (torch.tanh(z - shift) + 1) * (self.levels - 1) / 2

    def scale(self, digits):
        """{0..levels-1} -> [-1,1]."""
        return 2 * digits / (self.levels - 1) - 1

    def forward(self, z):
        bounded = self.bound(z)
        digits = bounded.detach().round()
        z_q = self.scale(straight_through(bounded, digits))
        indices = (digits.long() * self.basis).sum(-1)
        return z_q, indices, z.new_zeros(())

    def lookup(self, indices):
        digits = indices[..., None] // self.basis % self.levels
        return self.scale(digits)


# ---- building a run's networks, and the loops


def over_ranks(x):
    """The rows of x (N,...) of all processes, in the order that one process with the whole batch has them in."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def choose(cfg, H, W):
    """Fill in what depends on the size of the images or on the quantizer; refuse what does not fit together."""
    side = min(H, W)
    cfg.downsample = cfg.downsample or (2 if side < 16 else 4 if side <= 64 else 8)
    if cfg.quantizer == "fsq":
        cfg.n_codes = math.prod(cfg.fsq_levels)
        cfg.code_dim = len(cfg.fsq_levels)
    elif cfg.code_dim == 0:
        cfg.code_dim = 8 if cfg.quantizer == "simvq" else 16
    if cfg.downsample not in (2, 4, 8, 16):
        fail(f"--downsample {cfg.downsample}: must be 2, 4, 8 or 16")
    if cfg.n_codes > 65536:
        fail(f"--fsq-levels {' '.join(map(str, cfg.fsq_levels))}: make more than 65536 codes")
    if cfg.prior_width % cfg.n_head:
        fail(f"--n-head {cfg.n_head}: does not divide --prior-width {cfg.prior_width}")
    return cfg


def code_grid(H, W, cfg):
    """Rows and columns of the codes of H x W pixels; a part of a code counts as one."""
    return math.ceil(H / cfg.downsample), math.ceil(W / cfg.downsample)


def build(shape, classes, cfg):
    """Autoencoder, discriminator and transformer for images of shape (C,H,W). Their weights follow from --seed."""
    C, H, W = shape
    choose(cfg, H, W)
    model = Autoencoder(C, cfg).to(memory_format=torch.channels_last)
    D = Discriminator(C)
    prior = Prior(*code_grid(H, W, cfg), classes, cfg)
    return model, D, prior


def frozen_copy(network):
    return copy.deepcopy(network).eval().requires_grad_(False)


def load(folder, device="cpu"):
    """The averaged autoencoder and transformer of the run in `folder`, ready to sample, and its config. Ten images:

    autoencoder, prior, cfg = load("runs/vqgan-digits")
    indices = sample(prior, torch.arange(10), torch.rand(10, *prior.grid), cfg)
    save_grid(to_uint8(autoencoder.draw(indices)), "ten.png")
    """
    cfg, saved = read_run(folder)
    model, _, prior = build(saved["facts"]["shape"], saved["facts"]["classes"], cfg)
    restore({"ema_model": model, "ema_prior": prior}, saved, folder)
    return frozen_copy(model).to(device), frozen_copy(prior).to(device), cfg


@torch.no_grad()
def to_indices(model, images, run):
    """The indices (N,h,w) of images (N,C,H,W) uint8, in one array: small ones, a batch each, would break up the memory."""
    n = at_once(images.shape[1:])
    found = torch.empty(len(images), *code_grid(*images.shape[2:], run.cfg), dtype=torch.long)
    for x, part in progress(list(zip(images.split(n), found.split(n), strict=True)), "finding codes"):
        _, indices, _ = model.quantizer(model.encode(x.to(run.device) / 127.5 - 1))
        part.copy_(indices)
    return found


@torch.no_grad()
def reconstruct(model, images, run):
    """Images (N,C,H,W) uint8 -> (N,2,C,H,W): each image, and what the decoder makes of its codes."""
    parts = []
    for x in progress(images.split(at_once(images.shape[1:])), "reconstructing"):
        x_hat, _, _ = model(x.to(run.device) / 127.5 - 1)
        parts.append(to_uint8(x_hat))
    return torch.stack([images, torch.cat(parts)], 1)


def adam(network, betas):
    """Its learning rate is set in each step."""
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], betas=betas, fused=True)


def learning_rate(highest, step, cfg):
    """A linear warm-up, then 1 / sqrt(step) from --decay on (Karras et al. 2024, eq. 67). Each stage counts from 0."""
    return highest * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)


def train(data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    model, D, prior = (network.to(run.device) for network in build(run.shape, run.classes, cfg))
    ema_model = frozen_copy(model)
    ema_prior = frozen_copy(prior)
    optimizer = adam(model, betas=(0.5, 0.9))
    optimizer_d = adam(D, betas=(0.5, 0.9))
    optimizer_p = Muon(prior, [prior.blocks] if cfg.optimizer == "muon" else [], cfg.prior_lr, (0.9, 0.99))
    parts = {"model": model, "discriminator": D, "prior": prior, "ema_model": ema_model, "ema_prior": ema_prior,
             "optimizer_model": optimizer, "optimizer_d": optimizer_d, "optimizer_prior": optimizer_p}
    if cfg.compile:
        for network in (model.encoder, model.decoder, prior):
            network.compile()

    # stage 1
    for step in run.steps(parts, lambda: reconstruct(ema_model, data.test[:40], run).flatten(0, 1), until=cfg.stage1):
        lr = learning_rate(cfg.lr, step, cfg)
        optimizer.param_groups[0]["lr"] = lr
        optimizer_d.param_groups[0]["lr"] = lr
        x, _ = run.batch(data)
        x = x / 127.5 - 1
        D.requires_grad_(False)
        with run.autocast():
            loss, terms, x_hat = loss_autoencoder(model, D, x, step, cfg)
        norm = run.update(loss, model, optimizer)
        D.requires_grad_(True)
        if "adversarial" in terms:
            with run.autocast():
                terms["loss_d"] = loss_discriminator(D, x, x_hat)
            run.update(terms["loss_d"], D, optimizer_d)
        update_ema(ema_model, model, step, cfg.ema)
        run.log(loss=loss, **terms, grad_norm=norm, lr=lr)

    if run.over:
        return

    # stage 2, over the codes of the averaged autoencoder, since that will decode them
    encoded = data._replace(train=to_indices(ema_model, data.train, run))
    as_trained = replace(cfg, sample_size=(0, 0))  # larger samples wait for the end
    looked = False
    for step in run.steps(parts, lambda: generate(ema_model, ema_prior, 80, as_trained, run)[0]):
        lr = learning_rate(cfg.prior_lr, step - cfg.stage1, cfg)
        optimizer_p.param_groups[0]["lr"] = lr
        indices, y = run.batch(encoded)
        hidden = torch.rand(len(y), device=y.device) < cfg.label_dropout
        with run.autocast():
            loss = nll(prior, indices, torch.where(hidden, run.classes, y)).mean() / indices[0].numel()
        norm = run.update(loss, prior, optimizer_p, "--prior-lr")
        update_ema(ema_prior, prior, step - cfg.stage1, cfg.ema)
        run.log(loss=loss, bits_per_code=loss / math.log(2), grad_norm=norm, lr=lr)
        total = round(step / max(run.done, 1e-9))  # steps of both stages: --steps, or what --minutes give at the pace so far
        if not looked and step >= cfg.stage1 + max(cfg.warmup, (total - cfg.stage1) / 4):
            looked = True
            if loss > 0.98 * math.log(cfg.n_codes):
                run.bar.write(f"warning: step {run.step}: {loss / math.log(2):.2f} bits a code, {math.log2(cfg.n_codes):.2f} "
                              "where all codes are as likely: the transformer has learned nothing", sys.stderr)


@torch.no_grad()
def evaluate(model, prior, data, cfg, run):
    """Errors of the reconstructions of the test images, which are written out; use of the codes; bits for each code."""
    pairs = reconstruct(model, data.test, run)
    x, x_hat = pairs.unbind(1)
    save_images(x_hat, run.folder / "reconstructions.npz", data.test_labels)
    save_grid(pairs[:40].flatten(0, 1), run.folder / "reconstructions.png", what="test images and reconstructions")
    error = (x.float() - x_hat.float()) / 255
    mse = error.square().mean().item()
    share, perplexity = usage(to_indices(model, data.train, run), cfg.n_codes)
    indices = to_indices(model, x, run)
    n = at_once(x.shape[1:])
    nats = 0.0
    for part, y in zip(indices.split(n), progress(data.test_labels.split(n), "evaluating"), strict=True):
        nats += nll(prior, part.to(run.device), y.to(run.device)).cpu().double().sum().item()
    return {"test_l1": error.abs().mean().item(), "test_mse": mse, "test_psnr": -10 * math.log10(max(mse, 1e-10)),
            "usage": share, "perplexity": perplexity, "test_bits_per_code": nats / indices.numel() / math.log(2),
            "codes_per_image": indices[0].numel()}


@torch.no_grad()
def generate(model, prior, n, cfg, run):
    """n images (n,C,H,W) uint8 and labels (n,), from the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = run.labels(n)
    H = cfg.sample_size[0] or run.shape[1]
    W = cfg.sample_size[1] or run.shape[2]
    images = []
    for y in progress(labels.split(at_once((3, H, W))), "sampling"):
        noise = torch.rand(len(y), *code_grid(H, W, cfg), generator=generator)
        indices = sample(prior, y.to(run.device), noise.to(run.device), cfg)
        images.append(to_uint8(model.draw(indices)[..., :H, :W]))
    return torch.cat(images), labels


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


def main(argv=None):
    cfg, saved = parse_args(argv)
    if len(cfg.sample_size) != 2:
        fail("--sample-size: takes a height and a width")
    run = Run(cfg, saved)
    if cfg.mode != "sample":
        data = run.describe(load_data(cfg.dataset, cfg.data_dir, cfg.image_size), cfg.labels)
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    model, prior, _ = load(cfg.out, run.device)  # what was saved is what is evaluated
    if run.step <= cfg.stage1:
        print(f"note: step {run.step}: stage 1 takes {cfg.stage1} steps, so the transformer is untrained", file=sys.stderr)
    if cfg.mode != "sample":
        m = evaluate(model, prior, data, cfg, run)
        run.write_metrics(final=True, **m)
        given = " given the label" if run.classes else ""
        print(f"{run.tested} reconstructed: L1 {m['test_l1']:.4f}, PSNR {m['test_psnr']:.1f} dB; train images use "
              f"{100 * m['usage']:.1f} % of {cfg.n_codes} codes, perplexity {m['perplexity']:.1f}; "
              f"{m['test_bits_per_code']:.3f} bits a code{given}, {m['codes_per_image']} codes an image")
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels = generate(model, prior, cfg.num_samples, cfg, run)
        run.write_samples(images, labels, f" in {time.monotonic() - start:.2f} s")


if __name__ == "__main__":
    launch(main)
