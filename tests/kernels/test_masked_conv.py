"""masked_conv2d and gated_masked_conv2d: what a pixel sees, all masks, both layouts, many tiles, every form of condition."""

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
    gradcheck,
    leaves,
    nbytes,
    opcheck,
    traffic,
)

import kernels
from kernels import masked_conv as module
from kernels.masked_conv import (
    MASKS,
    gated_masked_conv2d,
    gated_masked_conv2d_reference,
    gated_masked_conv2d_torch,
    masked_conv2d,
    masked_conv2d_reference,
    masked_conv2d_torch,
)

PLAIN = {"reference": masked_conv2d_reference, "torch": masked_conv2d_torch, "triton": masked_conv2d}
KERNELS = [((1, 1, 1, 1), (1, 1), "B"), ((1, 2, 3, 2), (5, 5), "A"), ((1, 2, 2, 2), (5, 5), "B"), ((2, 2, 3, 4), (1, 5), "A"),
           ((2, 2, 3, 4), (1, 3), "B"), ((1, 17, 2, 3), (3, 1), "vertical A"), ((1, 2, 1, 1), (3, 3), "A"),
           ((1, 2, 4, 3), (3, 5), "vertical B"), ((1, 2, 2, 3), (1, 3), "vertical B")]


@pytest.fixture
def small(monkeypatch):
    """Blocks and chunks so small that few elements give several of each."""
    for blocks in ("BLOCKS", "UNALIGNED"):
        monkeypatch.setattr(module, blocks, dict.fromkeys((2, 4, 8), (16, 16, 16)))
    monkeypatch.setattr(module, "CHUNK", 16)


def inputs(shape=(2, 3, 4, 5), N=4, k=(3, 3), channels_last=False, cond=None):
    """x, weight, bias, and for the gated form a condition of a kind."""
    x = torch.randn(shape, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    out = x, torch.randn(N, shape[1], *k, device=DEVICE) / (shape[1] * k[0] * k[1]) ** 0.5 * 2, torch.randn(N, device=DEVICE)
    if cond is None:
        return out
    B, _, H, W = shape
    sizes = {"vector": (B, N), "1 x 1": (B, N, 1, 1), "map": (B, N, H, W)}
    return *out, torch.randn(sizes[cond], device=DEVICE) if cond in sizes else None


# ---- what a pixel sees


def sees(mask_type, i, j, r, s):
    """Whether pixel (i, j) is to see pixel (r, s), a kernel large enough."""
    if mask_type.startswith("vertical"):
        return r < i or mask_type.endswith("B") and r == i
    return r < i or r == i and (s < j or mask_type == "B" and s == j)


@pytest.mark.parametrize("form", PLAIN)
@pytest.mark.parametrize("mask_type, k", [(m, k) for m in MASKS for k in ((3, 3), (5, 5), (1, 5))
                                          if (m, k) != ("vertical A", (1, 5))] + [("B", (1, 1))])
def test_the_jacobian_is_zero_exactly_where_the_mask_says(form, mask_type, k):
    H = 3
    W = 4
    x = torch.randn(1, 1, H, W, device=DEVICE).repeat(H * W, 1, 1, 1).requires_grad_()  # an image an output pixel
    weight = torch.rand(1, 1, *k, device=DEVICE) + 0.5  # no two cancel
    y = PLAIN[form](x, weight, None, mask_type)
    jacobian = torch.autograd.grad(y.flatten(1).diagonal().sum(), x)[0].view(H, W, H, W)
    want = [[[[sees(mask_type, i, j, r, s) and abs(r - i) <= k[0] // 2 and abs(s - j) <= k[1] // 2 for s in range(W)]
              for r in range(H)] for j in range(W)] for i in range(H)]
    assert (jacobian != 0).tolist() == want


@pytest.mark.parametrize("form", PLAIN)
def test_what_is_not_seen_does_not_matter(form):
    """A pixel that changes leaves every pixel before it, and with mask A itself, as it was."""
    x, weight, bias = inputs((1, 2, 4, 5))
    want = PLAIN[form](x, weight, bias, "A")
    x[:, :, 2, 1] += 1e3
    got = PLAIN[form](x, weight, bias, "A")
    assert torch.equal(got.flatten(2)[:, :, :12], want.flatten(2)[:, :, :12])
    assert (got[:, :, 2, 2] != want[:, :, 2, 2]).all() and (got[:, :, 3, :3] != want[:, :, 3, :3]).all()


@pytest.mark.parametrize("mask_type, live", [("A", "111 100 000"), ("B", "111 110 000"), ("vertical A", "111 000 000"),
                                             ("vertical B", "111 111 000"), ("A", "11111 11111 11000 00000 00000")])
def test_the_mask_written_out(mask_type, live):
    mask = torch.tensor([[int(c) for c in row] for row in live.split()], device=DEVICE)
    x, weight, bias = inputs((2, 3, 5, 4), k=mask.shape)
    want = F.conv2d(x, weight * mask, bias, padding=len(mask) // 2)
    for f in PLAIN.values():
        torch.testing.assert_close(f(x, weight, bias, mask_type), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("f", [*PLAIN.values(), gated_masked_conv2d, gated_masked_conv2d_torch])
@pytest.mark.parametrize("mask_type, live", [("A", 4), ("B", 5), ("vertical A", 3), ("vertical B", 6)])
def test_dead_taps_have_no_gradient(f, mask_type, live):
    x, weight, bias = leaves(inputs())
    gradient = torch.autograd.grad(f(x, weight, bias, mask_type=mask_type).sum(), weight)[0].flatten(2)
    assert (gradient[:, :, live:] == 0).all() and (gradient[:, :, :live] != 0).all()


# ---- values and gradients


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mask_type", MASKS)
def test_values_and_gradients(mask_type, channels_last):
    agree(masked_conv2d, masked_conv2d_reference, (*inputs(channels_last=channels_last), mask_type))
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, (*inputs(channels_last=channels_last, cond="vector"), mask_type))


@pytest.mark.parametrize("shape, k, mask_type", KERNELS)
def test_kernels_and_odd_sizes(shape, k, mask_type):
    agree(masked_conv2d, masked_conv2d_reference, (*inputs(shape, 1, k), mask_type))
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, (*inputs(shape, 2, k, cond="map", channels_last=True), mask_type))


@pytest.mark.parametrize("channels_last", [False, True])
def test_many_tiles(small, channels_last):
    agree(masked_conv2d, masked_conv2d_reference, (*inputs((2, 18, 5, 3), 20, channels_last=channels_last), "A"))


def test_many_tiles_gated(small):
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, (*inputs((2, 18, 5, 3), 42, cond="map", channels_last=True), "A"))


@pytest.mark.parametrize("cond", ["vector", "1 x 1", "map", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_conditions(cond, with_bias):
    x, weight, bias, c = inputs(N=6, cond=cond)
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, (x, weight, bias if with_bias else None, c))


def test_without_bias():
    x, weight, _ = inputs()
    agree(masked_conv2d, masked_conv2d_reference, (x, weight, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype, small):
    agree(masked_conv2d, masked_conv2d_reference, inputs((1, 3, 4, 5)), dtype)
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, inputs((1, 3, 4, 5), cond="map", channels_last=True), dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    for last in (False, True):
        given = inputs((2, 2, 3, 3), channels_last=last, cond="vector")
        agree(masked_conv2d, masked_conv2d_reference, given[:3], gradient=gradient)
        agree(gated_masked_conv2d, gated_masked_conv2d_reference, given, gradient=gradient)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    x, weight, bias, cond = inputs((2, 4, 4, 4), 8, cond="map")
    part = (slice(None),) * dim + (slice(None, None, 2),)
    x = x[part]
    weight = weight.transpose(2, 3)[::2, ::2 if dim == 1 else 1]
    agree(masked_conv2d, masked_conv2d_reference, (x, weight, bias[::2]))
    cond = cond[:, ::2][part] if dim != 1 else cond[:, 1::2]
    agree(gated_masked_conv2d, gated_masked_conv2d_reference, (x, weight, bias[::2], cond))


def test_one_gradient_at_a_time():
    """Every subset of inputs that asks for a gradient gets the same as when all ask."""
    given = inputs(cond="vector")
    all_of_them = leaves(given)
    want = torch.autograd.grad(gated_masked_conv2d(*all_of_them).sum(), all_of_them)
    for i, expected in enumerate(want):
        alone = [a.detach().clone().requires_grad_(i == j) for j, a in enumerate(given)]
        assert torch.equal(torch.autograd.grad(gated_masked_conv2d(*alone).sum(), alone[i])[0], expected)


@pytest.mark.filterwarnings("ignore:overflow")  # exp is infinite, and its inverse 0, as they should be
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saturated_gate(dtype):
    x, weight, bias = (a.to(dtype) for a in inputs((1, 2, 3, 3)))
    for p, q, want in ((1e4, 1e4, 1), (-1e4, 1e4, -1), (1e4, -1e4, 0), (-1e4, -1e4, 0)):
        cond = torch.tensor([[p, p, q, q]], device=DEVICE, dtype=dtype).requires_grad_()
        out = gated_masked_conv2d(x, weight, bias, cond)
        assert (out == want).all()
        assert (torch.autograd.grad(out.sum(), cond)[0] == 0).all()


def test_nothing_in_nothing_out():
    for f in (masked_conv2d, gated_masked_conv2d):
        x, weight, bias = leaves(inputs((0, 3, 4, 5)))
        f(x, weight, bias).sum().backward()
        assert x.grad.shape == x.shape and (weight.grad == 0).all()


# ---- what is refused, what is chosen


@pytest.mark.parametrize("change, message", [
    (dict(weight=torch.ones(4, 2, 3, 3)), "do not fit"), (dict(bias=torch.ones(3)), "do not fit"),
    (dict(x=torch.ones(3, 4, 5)), "do not fit"), (dict(weight=torch.ones(4, 3, 2, 3)), "odd sides"),
    (dict(weight=torch.ones(4, 3, 1, 1), mask_type="A"), "a live tap"), (dict(mask_type="C"), "must be one of"),
    (dict(weight=torch.ones(4, 3, 1, 3), mask_type="vertical A"), "a live tap")])
def test_shapes_that_do_not_fit(change, message):
    given = dict(zip(("x", "weight", "bias"), inputs(), strict=True)) | change
    for f in (masked_conv2d, gated_masked_conv2d):
        with pytest.raises(ValueError, match=message):
            f(**given)


def test_conditions_that_do_not_fit():
    x, weight, bias = inputs()
    for cond in (torch.ones(2, 2), torch.ones(1, 4), torch.ones(2, 4, 5, 4), torch.ones(2, 4, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            gated_masked_conv2d(x, weight, bias, cond)
    with pytest.raises(ValueError, match="do not fit"):
        gated_masked_conv2d(x, weight[:3], bias[:3])


def test_auto_is_the_plain_form_and_triton_says_why_it_cannot(monkeypatch):
    x, weight, bias = inputs()
    with pytest.raises(RuntimeError, match="weight torch.float64"):
        masked_conv2d(x, weight.double(), bias)
    monkeypatch.setattr(kernels, "mode", "auto")
    monkeypatch.setattr(module, "launch", None)  # must not be called
    assert torch.equal(masked_conv2d(x, weight, bias), masked_conv2d_torch(x, weight, bias))
    assert torch.equal(gated_masked_conv2d(x, weight, bias), gated_masked_conv2d_torch(x, weight, bias))


@pytest.mark.parametrize("f", [masked_conv2d, gated_masked_conv2d])
def test_the_backend_of_one_call(f, monkeypatch):
    """It decides against the mode, both ways, and an unknown one is refused."""
    launches = []
    monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: launches.append(kernel))
    x, weight, bias = inputs()
    for mode in kernels.MODES:
        monkeypatch.setattr(kernels, "mode", mode)
        for backend, ran in (("triton", 1), ("torch", 0), ("auto", 0), (None, mode == "triton")):
            launches.clear()
            y = f(x, weight, bias, backend=backend)
            assert len(launches) == ran
            if not ran:
                assert torch.equal(y, getattr(module, f"{f.__name__}_torch")(x, weight, bias))
    with pytest.raises(ValueError, match="must be one of auto, torch, triton"):
        f(x, weight, bias, backend="cuda")


# ---- as operators


def test_gradcheck(small):
    gradcheck(masked_conv2d, (*inputs((1, 1, 2, 2), 1), "A"))
    gradcheck(gated_masked_conv2d, inputs((1, 1, 2, 2), 2, (1, 3), cond="vector"))


@pytest.mark.parametrize("shape, channels_last", [((2, 2, 2, 3), False), ((2, 2, 2, 3), True), ((2, 1, 1, 1), False)])
def test_as_custom_operators(small, shape, channels_last):
    x, weight, bias, cond = inputs(shape, 2, channels_last=channels_last, cond="vector")
    opcheck(module._fwd.operator, (x, weight, bias, 1))
    opcheck(module._gated_fwd.operator, (x, weight, bias if channels_last else None, cond if channels_last else None, 2, True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_operators_say_what_they_return(channels_last):
    x, weight, bias = inputs(channels_last=channels_last)
    dy = masked_conv2d(x, weight, bias)
    pq = dy.contiguous(memory_format=torch.channels_last)
    both = dy, x, weight, 4
    for op, args in ((module._dx, both), (module._dweight, both), (module._gate_bwd, (dy[:, :2], pq))):
        torch.library.opcheck(op.operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles(channels_last):
    compiles(masked_conv2d, inputs(channels_last=channels_last))
    compiles(gated_masked_conv2d, inputs(channels_last=channels_last, cond="vector"))


@pytest.mark.parametrize("differentiate", [lambda y, x: y.backward(), torch.autograd.grad], ids=["backward", "grad"])
@pytest.mark.parametrize("loss", ["linear", "square"])
@pytest.mark.parametrize("f", [masked_conv2d, gated_masked_conv2d])
def test_a_second_derivative_is_refused(f, loss, differentiate):
    """The backward kernels have none, and one without them would be silently wrong. dx depends on the weight; with a linear
    loss it does so though no gradient that comes in does."""
    x, weight, bias = leaves(inputs((1, 2, 2, 3)))
    y = f(x, weight, bias)
    dx, = torch.autograd.grad((y if loss == "linear" else y.square()).sum(), x, create_graph=True)
    penalty = dx.square().sum() + weight.square().sum()
    with pytest.raises(RuntimeError, match="has no derivative"):
        differentiate(penalty, weight)


def test_image_sizes_share_compilations(monkeypatch):
    """Sizes are arguments: ten of them make at most four variants of a kernel, by what 16 divides."""
    monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **constants: None)
    with compilations(module, monkeypatch) as keys:
        for H, W in ((7, 7), (8, 8), (9, 9), (14, 14), (16, 16), (20, 28), (28, 28), (32, 32), (48, 48), (64, 64)):
            given = leaves(inputs((2, 16, H, W), 32, cond="map", channels_last=True))
            y = masked_conv2d(*given[:3]).sum() + gated_masked_conv2d(*given).sum()
            torch.autograd.grad(y, given)
    launched = [name for name, _ in keys]
    counts = {name: launched.count(name) for name in launched}
    assert len(counts) == 5 and max(counts.values()) <= 4, counts


def test_deterministic(small):
    deterministic(masked_conv2d, inputs((1, 2, 5, 4)))
    deterministic(gated_masked_conv2d, inputs((1, 2, 5, 4), cond="map"))


def asked(H, W, k, taps):
    """Pixels that the live taps reach inside the image, all positions together."""
    offsets = [(t // k - k // 2, t % k - k // 2) for t in range(taps)]
    return sum((H - abs(i)) * (W - abs(j)) for i, j in offsets)


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
def test_bytes(small):
    """What is stated: x once a live tap and block of output channels, weights once a block of pixels, the rest once."""
    shape = (2, 16, 4, 4)
    B, C, H, W = shape
    N = 32
    taps = 4
    x, weight, bias = inputs(shape, N, channels_last=True)
    live = taps * C * N
    pixels = B * H * W
    blocks_m = 2
    blocks_n = 2
    blocks_c = 1
    reach = B * asked(H, W, 3, taps)  # at most taps * pixels: the border is not read
    assert reach < taps * pixels
    with traffic() as moved:
        y = module._fwd(x, weight, bias, taps)
    assert moved.total == 4 * (reach * C * blocks_n + (live + N) * blocks_m + y.numel())
    with traffic() as moved:
        module._dx(y, x, weight, taps)
    assert moved.total == 4 * (reach * N * blocks_c + live * blocks_m + x.numel())
    with traffic() as moved:
        module._dweight(y, x, weight, taps)
    assert moved.total == 4 * (reach * C * blocks_n + taps * y.numel() * blocks_c + live * (pixels // 16))
    with traffic() as moved:
        out, pq = module._gated_fwd(x, weight, bias, None, taps, True)
    assert moved.total == 4 * (reach * C + (live + N) * blocks_m) + nbytes(out, pq)
    with traffic() as moved:
        same, nothing = module._gated_fwd(x, weight, bias, None, taps, False)
    assert moved.total == 4 * (reach * C + (live + N) * blocks_m) + nbytes(out)
    assert torch.equal(same, out) and not nothing.numel()
    with traffic() as moved:
        module._gate_bwd(out, pq)
    assert moved.total == nbytes(out) + 2 * nbytes(pq)


# ---- the plain form


@pytest.mark.parametrize("avx512", [True, False])  # which decides on the form of one-row kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, k, mask_type", [*KERNELS, *(((2, 3, 5, 4), (5, 5), m) for m in MASKS)])
def test_the_plain_form_is_the_reference(monkeypatch, avx512, shape, k, mask_type, channels_last):
    monkeypatch.setattr(module, "AVX512", avx512)
    given = inputs(shape, 4, k, channels_last, cond="vector")
    agree(masked_conv2d_torch, masked_conv2d_reference, (*given[:3], mask_type), torch.float64)
    agree(gated_masked_conv2d_torch, gated_masked_conv2d_reference, (*given, mask_type), torch.float64)
    x, weight, bias, cond = (a.double() for a in given)
    gate = masked_conv2d_reference(x, weight, bias, mask_type) + cond[:, :, None, None]
    assert_near(gated_masked_conv2d_torch(x, weight, bias, cond, mask_type), gate[:, :2].tanh() * gate[:, 2:].sigmoid(), 1e-12)


@pytest.mark.parametrize("f", [masked_conv2d, masked_conv2d_torch, gated_masked_conv2d, gated_masked_conv2d_torch])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_stay(f, layout):
    x, weight, bias = inputs()
    assert f(x.to(memory_format=layout), weight, bias).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["all in float32", "x in half", "parameters in half", "condition in half"])
def test_under_autocast_all_take_its_type(given, dtype):
    """As PyTorch's own convolution does, the plain form and the kernels alike, whatever the types of what is given."""
    half = {"all in float32": (), "x in half": (0,), "parameters in half": (1, 2), "condition in half": (3,)}[given]
    x, weight, bias, cond = (a.to(dtype) if i in half else a for i, a in enumerate(inputs((2, 4, 5, 6), 8, cond="vector")))
    for f, args in ((masked_conv2d, (x, weight, bias)), (gated_masked_conv2d, (x, weight, bias, cond))):
        reference = getattr(module, f"{f.__name__}_reference")
        exact = leaves(args, torch.float64)
        want = reference(*exact)
        dy = torch.randn_like(want)
        gradients = torch.autograd.grad(want, exact, dy)
        for backend in ("torch", "triton"):
            ours = leaves(args)
            with torch.autocast(DEVICE, dtype):
                y = f(*ours, backend=backend)
                assert y.dtype == dtype
            assert_near(y, want, 2 * TOLERANCE[dtype])
            got = torch.autograd.grad(y, ours, dy.to(dtype))
            for a, b, leaf in zip(got, gradients, ours, strict=True):
                assert a.dtype == leaf.dtype
                assert_near(a, b, 2 * TOLERANCE[dtype])


def test_autocast_leaves_float64_alone():
    given = inputs(cond="vector")
    want = gated_masked_conv2d_reference(*(a.double() for a in given))
    for backend in ("torch", "triton"):
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_near(gated_masked_conv2d(*(a.double() for a in given), backend=backend), want, 1e-11)
