"""attention under every mask and with a bias, one tile and several."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    GRADIENTS,
    TOLERANCE,
    agree,
    assert_near,
    compilations,
    compiles,
    deterministic,
    leaves,
    nbytes,
    opcheck,
    traffic,
)

import kernels
import kernels.decode_attention
from kernels import attention as module
from kernels.attention import attention, attention_reference, attention_torch

MASKS = [None, "causal", "strict"]


def set_tiles(monkeypatch, BLOCK=16, STEP=16, SPLIT=True):
    """Tiles of a size, in all kernels."""
    chosen = module._chosen
    small = {"BLOCK": BLOCK, "STEP": STEP, "SPLIT": SPLIT}

    def smaller(*args):
        constants = chosen(*args)
        return constants | {key: size for key, size in small.items() if key in constants}

    monkeypatch.setattr(module, "_chosen", smaller)


@pytest.fixture
def tiles(monkeypatch):
    set_tiles(monkeypatch)


def inputs(T=9, head_dim=16, n_head=1, B=1, n_head_kv=None):
    q = torch.randn(B, n_head, T, head_dim, device=DEVICE)
    return [q, *torch.randn(2, B, n_head_kv or n_head, T, head_dim, device=DEVICE)]


def table(H, W, n_head=1):
    return torch.randn(n_head, 2 * H - 1, 2 * W - 1, device=DEVICE)


def masked(op, mask, scale=None):
    return lambda q, k, v, bias=None: op(q, k, v, mask, bias=bias, scale=scale)


def compare(inputs, mask, scale=None, op=attention, **kwargs):
    agree(masked(op, mask, scale), masked(attention_reference, mask, scale), inputs, **kwargs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(9, 16, 2, 2), (5, 20, 1, 1), (3, 48, 1, 1), (70, 16, 1, 1)])
def test_values_and_gradients(shape, mask):
    compare(inputs(*shape), mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [16, 35, 48])
def test_tiles(tiles, T, mask):
    compare(inputs(T), mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [{"STEP": 32}, {"BLOCK": 32}, {"BLOCK": 32, "SPLIT": False}], ids=str)
def test_tiles_of_two_sizes(sizes, mask, monkeypatch):
    """What a tile goes against is longer or shorter than it; all tiles masked, or those at the edge."""
    set_tiles(monkeypatch, **sizes)
    compare((*inputs(70), table(7, 10)), mask)


@pytest.mark.parametrize("n_head, n_head_kv", [(4, 2), (3, 1)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("biased", [False, True])
def test_shared_keys(tiles, biased, mask, n_head, n_head_kv):
    x = [*inputs(20, 16, n_head, 2, n_head_kv), *([table(4, 5, n_head)] if biased else [])]
    compare(x, mask)
    compare(x, mask, op=attention_torch)


def test_shared_keys_are_pytorchs():
    q, k, v = inputs(9, 16, 4, 2, 2)
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), enable_gqa=True)
    assert_near(attention(q, k, v), want, 2e-5)
    torch.testing.assert_close(attention_reference(*(x.double() for x in (q, k, v))), want)


@pytest.mark.parametrize("scale, dtype", [(1, torch.float32), (2.5, torch.float32), (0.3, torch.float64),
                                          (0.1, torch.bfloat16)])
def test_scale(tiles, scale, dtype):
    for x in (inputs(20), [*inputs(20), table(4, 5)]):
        compare(x, "causal", scale, dtype=dtype)
        compare(x, "causal", scale, attention_torch, dtype=dtype)
    q, k, v = inputs(5)
    assert_near(attention(q, k, v, scale=scale), F.scaled_dot_product_attention(q, k, v, scale=scale), 2e-5)


@pytest.mark.parametrize("T, T_k", [(5, 20), (20, 5)])
def test_keys_of_another_length(tiles, T, T_k):
    q, k, v = inputs(20)
    compare((q[:, :, :T], k[:, :, :T_k], v[:, :, :T_k]), None)


@pytest.mark.parametrize("H, W, n_head, B, mask", [(3, 3, 2, 2, None), (2, 3, 1, 2, "causal"), (2, 3, 2, 1, "strict"),
                                                   (1, 7, 1, 1, None), (5, 1, 1, 2, "causal")])
def test_bias(H, W, n_head, B, mask):
    compare((*inputs(H * W, 16, n_head, B), table(H, W, n_head)), mask)


@pytest.mark.parametrize("H, W, mask", [(2, 18, None), (1, 35, "strict"), (5, 7, "causal")])
def test_bias_in_tiles(tiles, H, W, mask):
    compare((*inputs(H * W), table(H, W)), mask)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_a_bias_over_several_shares(mask, monkeypatch):
    """More pairs of tiles than one program adds up, and not a multiple of it."""
    monkeypatch.setattr(module, "DBIAS_PAIRS", 2)
    compare((*inputs(6, 16, 1, 3), table(3, 2)), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", ["strict", None])
def test_types(tiles, dtype, mask):
    compare((*inputs(18), table(3, 6)), mask, dtype=dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    compare((*inputs(6, 16, 2), table(2, 3, 2)), "strict", gradient=gradient)


def test_strided_inputs():
    """As diffusion.py hands them over: one linear layer's output, split and permuted; and with the last dimension strided."""
    qkv = torch.randn(2, 9, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)
    compare(tuple(qkv), "causal")
    compare(tuple(torch.randn(3, 2, 1, 16, 9, device=DEVICE).transpose(3, 4)), None)
    compare((*torch.randn(3, 1, 1, 12, 32, device=DEVICE)[:, :, :, ::2, ::2], table(3, 6)[:, 1:4, 1:10:2]), "strict")


def test_the_result_lies_as_the_next_layer_reads_it():
    y = attention(*inputs(5, 16, 2))
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
def test_row_0_of_strict(bias):
    """Zeros, and zero gradients, whatever there is of huge values."""
    q, k, v = leaves([x * 1e4 for x in inputs(4)])
    b = leaves([table(2, 2) * 1e4])[0] if bias else None
    y = attention(q, k, v, "strict", bias=b)
    assert (y[:, :, 0] == 0).all() and y.isfinite().all()
    y.sum().backward()
    assert (q.grad[:, :, :2] == 0).all()  # row 1 sees one key
    assert (k.grad[:, :, -1] == 0).all() and (v.grad[:, :, -1] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, *([b] if bias else [])))
    one = leaves([x.detach()[:, :, :1] for x in (q, k, v)])
    attention(*one, "strict").sum().backward()
    assert all((x.grad == 0).all() for x in one)


def test_a_single_position_is_its_value():
    q, k, v = leaves(inputs(1))
    y = attention(q, k, v, "causal")
    torch.testing.assert_close(y, v)
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    torch.testing.assert_close(dv, torch.ones_like(v))
    assert (dq.abs() < 1e-5).all() and (dk.abs() < 1e-5).all()


def test_scores_far_apart(tiles):
    """Softmax that sees its largest score in any tile; scores of some hundreds, and all equal."""
    q, k, v = inputs(35)
    compare((q * 0, k, v), "causal")
    y = attention(q * 20, k * 20, v)
    assert_near(y, attention_reference(q.double() * 20, k.double() * 20, v.double()), 1e-3)
    big = attention(*(x.half() * 1000 for x in (q, k, v)))
    assert big.isfinite().all()


def test_nothing_in_nothing_out():
    for shape in ((0, 2, 4, 16), (2, 2, 0, 16)):
        for mask in MASKS:
            x = torch.randn(shape, device=DEVICE, requires_grad=True)
            attention(x, x, x, mask).sum().backward()
            assert x.grad.shape == x.shape


def test_what_does_not_fit():
    q, k, v = inputs(6)
    three = inputs(6, 16, 3)
    for wrong in ((q, k[:, :, 1:], v), (q, k[..., :8], v[..., :8]), (q[0], k[0], v[0]), (q, three[1], three[2]),
                  (three[0], *inputs(6, 16, 2)[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            attention(*wrong)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :, 1:], v[:, :, 1:], "causal")
    with pytest.raises(ValueError, match="'Causal' must be"):
        attention(q, k, v, "Causal")
    for bias in (table(2, 2), table(2, 3, 2), table(2, 3)[0], table(2, 3)[:, :2]):
        with pytest.raises(ValueError, match="must be .n_head, 2H-1, 2W-1."):
            attention(q, k, v, bias)
    with pytest.raises(RuntimeError, match="head_dim 8"):
        attention(q[..., :8], k[..., :8], v[..., :8])
    with pytest.raises(RuntimeError, match="k torch.float64"):
        attention(q, k.double(), v)


def test_a_bias_in_the_place_of_the_mask():
    q, k, v = inputs(6)
    bias = table(2, 3)
    assert torch.equal(attention(q, k, v, bias), attention(q, k, v, bias=bias))


def test_gradcheck(tiles):
    """Fast mode, random directions: all of the Jacobian takes minutes in the interpreter."""
    for op, x in ((lambda q, k, v: attention(q, k, v, "strict"), inputs(3)), (attention, [*inputs(4), table(2, 2)])):
        assert torch.autograd.gradcheck(op, leaves(x, torch.float64), fast_mode=True)


def test_as_a_custom_operator():
    q, k, v = inputs(6)
    opcheck(module._fwd.operator, (q, k, v, None, 0, 0.25))
    opcheck(module._fwd.operator, (*inputs(6, 16, 2, 1, 1), table(2, 3, 2), 1, 0.3))


@pytest.mark.parametrize("mode", kernels.MODES)
def test_compiles(mode):
    bias = table(2, 3, 2)
    compiles(lambda *x: attention(*x[:3], "causal", bias=x[3], scale=0.5, backend=mode), (*inputs(6, 16, 2, 1, 1), bias))


def test_the_backend_of_a_call(monkeypatch):
    """Instead of the mode, both ways; no kernel is launched for "torch"."""
    launches = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *args, **constants: launches.append(args[0]) or launch(*args, **constants))
    x = inputs(6)
    for mode, backend, count in (("triton", "torch", 0), ("torch", "triton", 1), ("torch", None, 0), ("triton", None, 1)):
        monkeypatch.setattr(kernels, "mode", mode)
        launches.clear()
        assert_near(attention(*x, backend=backend), attention_reference(*x), 1e-5)
        assert len(launches) == count
    with pytest.raises(ValueError, match="must be one of auto, torch, triton"):
        attention(*x, backend="cuda")


def test_there_is_no_second_derivative():
    """It says so, and gives no wrong one."""
    q, k, v = leaves(inputs(4))
    dq, = torch.autograd.grad(attention(q, k, v, "causal").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("types", ["fff", "hff", "fhh", "bhf", "ddd"])
@pytest.mark.parametrize("biased", [False, True])
def test_autocast(tiles, biased, types, kind):
    """Result and gradients have the types that the plain form gives them, and are near float64's."""
    names = {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16, "d": torch.float64}
    x = [a.to(names[name]) for a, name in zip(inputs(20), types, strict=True)]
    x += [table(4, 5).to(x[0].dtype)] if biased else []
    y_ref = masked(attention_reference, "strict")(*(wide := leaves(x, torch.float64)))
    dy = torch.randn_like(y_ref)
    want = torch.autograd.grad(y_ref, wide, dy)
    for mode in ("torch", "triton"):
        ours = leaves(x)
        with torch.autocast(DEVICE, kind):
            y = attention(*ours[:3], "strict", bias=ours[3] if biased else None, backend=mode)
        assert y.dtype == (torch.float64 if types == "ddd" else kind)
        tolerance = TOLERANCE[torch.bfloat16 if types != "ddd" else torch.float64]
        assert_near(y, y_ref, tolerance)
        for a, b, got in zip(want, ours, torch.autograd.grad(y, ours, dy.to(y.dtype)), strict=True):
            assert got.dtype == b.dtype
            assert_near(got, a, tolerance, mode)


def test_types_that_differ_need_autocast():
    q, k, v = inputs(6)
    for mode in ("torch", "triton"):
        with pytest.raises(RuntimeError):
            attention(q, k.bfloat16(), v, backend=mode)


def test_few_compilations(monkeypatch):
    """Of ten image sizes, forward and backward; the kernels do not run here."""
    monkeypatch.setattr(module, "launch", lambda *args, **constants: None)
    with compilations(module, monkeypatch) as keys:
        for size in (4, 5, 6, 7, 8, 9, 10, 12, 14, 16):
            x = leaves([*inputs(size * size, 32, 2, 3), table(size, size, 2)])
            attention(*x[:3], "causal", bias=x[3]).sum().backward()
    names = [name for name, _ in keys]
    assert set(names) == set(module.KERNELS)
    assert all(names.count(name) <= 4 for name in names), names


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "gfx9", "gfx11"])
def test_every_size_has_tiles(gpu, element_size):
    """Powers of two of at least 16, for all that `supports` lets through."""
    most = module.MOST.get(gpu, 256) // (2 if element_size == 8 else 1)
    for head_dim in range(16, most + 1):
        for kernel in range(4):
            tiles = module._tiles(kernel, gpu, element_size, head_dim)
            sizes = tiles["BLOCK"], tiles.get("STEP", 16)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("major, gpu", [(8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_80")])
def test_the_kind_of_gpu(major, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.decode_attention._kind.__wrapped__("cuda", 0) == gpu


@pytest.mark.parametrize("name, gpu", [("gfx942:sramecc+:xnack-", "gfx9"), ("gfx1100", "gfx11")])
def test_the_kind_of_gpu_on_amd(name, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(torch.version, "hip", "7")
    assert kernels.decode_attention._kind.__wrapped__("cuda", 0) == gpu


def test_a_gpu_with_too_few_registers(monkeypatch):
    """Where no tile fits, "triton" says so."""
    monkeypatch.setattr(module, "MOST", {"sm_80": 64})
    assert module.supports(*inputs(6, 64))[0] and not module.supports(*inputs(6, 80))[0]
    with pytest.raises(RuntimeError, match="head_dim 80 is not in 16..64"):
        attention(*inputs(6, 80))


def test_deterministic(tiles):
    deterministic(lambda *x: attention(*x[:3], "causal", bias=x[3]), [*inputs(18), table(3, 6)])


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("T, mask", [(64, None), (64, "strict"), (192, None), (192, "causal")])
def test_bytes(T, mask, monkeypatch):
    """One tile reads q, k, v and writes o once; several read keys and values again, half of them under a causal mask."""
    set_tiles(monkeypatch, 64, 64)
    q, k, v = inputs(T, 32)
    n = nbytes(q)
    tiles = T // 64
    pairs = tiles * (tiles + 1) // 2 if mask else tiles * tiles
    with traffic() as moved:
        o, lse = module._fwd(q, k, v, None, module.LAGS[mask], 0.2)
    least = 2 * n + 2 * n * pairs / tiles
    assert least <= moved.total <= 1.05 * least
    with traffic() as moved:
        module._bwd(o, q, k, v, None, o, lse, module.LAGS[mask], 0.2, False)
    least = 4 * n + 4 * n + 4 * n * pairs / tiles
    assert least <= moved.total <= 1.05 * least


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
def test_bytes_of_a_bias():
    """The gradient of a bias reads q, do, k and v once for each pair of rows of the image: 4n a difference of rows, or less."""
    H = 3
    W = 16
    q, k, v = inputs(H * W, 64)
    bias = table(H, W)
    o, lse = module._fwd(q, k, v, bias, -1, 0.125)
    counts = []
    for b in (None, bias):
        with traffic() as moved:
            module._bwd(o, q, k, v, b, o, lse, -1, 0.125, b is not None)
        counts.append(moved.total)
    least = 4 * nbytes(q) * H  # H * H pairs of rows, each 4 n / H
    scores = nbytes(q) // 64 * H * W * 3 + nbytes(bias) * W * 2  # bias read for every score, three times; sums written
    assert least <= counts[1] - counts[0] <= 1.05 * (least + scores)


def brute_force(q, k, v, mask, bias, W):
    """By loops over positions, in plain Python."""
    y = torch.zeros_like(q)
    B, n_head, T, d = q.shape
    for b in range(B):
        for h in range(n_head):
            for i in range(T):
                seen = [j for j in range(T) if mask is None or j < i or (mask == "causal" and j == i)]
                s = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(d) for j in seen]
                if bias is not None:
                    middle = bias.shape[1] // 2, bias.shape[2] // 2
                    s = [a + float(bias[h, i // W - j // W + middle[0], i % W - j % W + middle[1]])
                         for a, j in zip(s, seen, strict=True)]
                total = sum(math.exp(a) for a in s)
                for a, j in zip(s, seen, strict=True):
                    y[b, h, i] += math.exp(a) / total * v[b, h, j]
    return y


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_by_brute_force(mask, biased):
    q, k, v = (x.double().cpu() for x in inputs(6, 16, 2))
    bias = table(2, 3, 2).double().cpu() if biased else None
    torch.testing.assert_close(attention_reference(q, k, v, mask, bias), brute_force(q, k, v, mask, bias, 3))


def test_the_reference_is_pytorchs():
    q, k, v = (x.double() for x in inputs(6, 16, 2))
    for causal in (False, True):
        torch.testing.assert_close(attention_reference(q, k, v, "causal" if causal else None),
                                   F.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", [1, 40, 1 << 22])
def test_the_plain_form_is_the_reference(mask, scores, monkeypatch):
    """Values and gradients, a row of the image at a time, a few, or all."""
    monkeypatch.setattr(module, "PLAIN_SCORES", scores)
    for extra in ([], [table(4, 3, 2)]):
        agree(masked(attention_torch, mask), masked(attention_reference, mask), (*inputs(12, 16, 2), *extra), torch.float64)
    with torch.no_grad():
        q, k, v = inputs(12)
        assert_near(attention_torch(q, k, v, mask, table(4, 3) * 0), attention_reference(q, k, v, mask), 1e-5)


def test_the_plain_strict_form_has_no_nan():
    x = leaves(inputs(1))
    for bias in (None, table(1, 1)):
        y = attention_torch(*x, "strict", bias)
        assert y.shape == x[0].shape and (y == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), x))


def test_auto_prefers_pytorch_where_it_wins(monkeypatch):
    """In mode "auto" only a bias asks for Triton."""
    left = []
    monkeypatch.setattr(module, "use_triton", lambda *rest, library, least, backend: left.append(library))
    q, k, v = inputs(6)
    for mask in (None, "causal", "strict", table(2, 3)):
        attention(q, k, v, mask)
    assert left == [True, True, True, False]


@pytest.mark.skipif(DEVICE != "cpu", reason="the plain form on a CPU")
@pytest.mark.parametrize("T, onednn", [(256, True), (257, True), (256, False)])
@pytest.mark.parametrize("mask", MASKS)
def test_the_plain_form_of_few_and_of_many_positions(mask, T, onednn, monkeypatch):
    """By oneDNN products up to SHORT keys, else PyTorch's kernel; values and gradients of both; 19 images in 3 parts."""
    calls = []
    products = module._products
    monkeypatch.setattr(module, "by_onednn", lambda: onednn)
    monkeypatch.setattr(module, "_products", lambda *args: calls.append(len(args[0])) or products(*args))
    x = leaves(inputs(T, 16, 2, 19), torch.float32)
    wide = leaves(x, torch.float64)
    y = module.attention_torch(*x, mask, scale=0.4)
    few = T - (mask == "strict") <= 256  # "strict" drops the last key
    assert calls == ([19, 9, 9, 1] if onednn and few else [])
    want = attention_reference(*wide, mask, scale=0.4)
    dy = torch.randn_like(want)
    assert_near(y, want, 1e-5)
    for got, right in zip(torch.autograd.grad(y, x, dy.float()), torch.autograd.grad(want, wide, dy), strict=True):
        assert_near(got, right, 1e-5)
