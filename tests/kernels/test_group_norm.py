"""group_norm_silu: both layouts, the whole-group and the split kernels, with SiLU and without."""

import pytest
import torch
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
from kernels import group_norm as module
from kernels.group_norm import group_norm, group_norm_silu, group_norm_silu_reference, group_norm_silu_torch

SHAPES = [(1, 1, 1, 1), (2, 16, 7, 5), (1, 8, 131), (2, 12, 8, 4)]
SPLIT = (1, 6, 20, 15)  # with a small TILE, more than one program a channel


@pytest.fixture
def split(monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)


def inputs(shape, channels_last=False, device=DEVICE):
    x = torch.randn(shape, device=device) * 2 + 1
    x = x.to(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x
    return x, 2 if shape[1] % 2 == 0 else 1, torch.randn(shape[1], device=device), torch.randn(shape[1], device=device)


def reference(x, groups, weight, bias):
    return group_norm_silu_reference(x, groups, weight, bias)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, channels_last):
    agree(group_norm_silu, reference, inputs(shape, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
def test_split(split, channels_last):
    agree(group_norm_silu, reference, inputs(SPLIT, channels_last))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    agree(group_norm_silu, reference, inputs(SHAPES[1], True), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_split(split, dtype):
    agree(group_norm_silu, reference, inputs((1, 2, 20, 15)), dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    agree(group_norm_silu, reference, inputs(SHAPES[3]), gradient=gradient)
    agree(group_norm_silu, reference, inputs(SHAPES[3], True), gradient=gradient)


def test_gradients_of_any_stride_split(split):
    agree(group_norm_silu, reference, inputs((1, 2, 20, 15), True), gradient="transposed")


def test_without_silu():
    agree(group_norm, lambda *x: group_norm_silu_reference(*x, silu=False), inputs(SHAPES[1]))


def test_without_silu_split(split):
    agree(group_norm, lambda *x: group_norm_silu_reference(*x, silu=False), inputs((1, 2, 20, 15)))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(dim):
    x, groups, weight, bias = inputs((2, 8, 6, 6))
    x = x[(slice(None),) * dim + (slice(None, None, 2),)]
    agree(group_norm_silu, reference, (x, groups, weight[::8 // x.shape[1]], bias[:x.shape[1]]))


@pytest.mark.parametrize("tile", [8192, 64])
def test_large_offsets_and_constant_groups(tile, monkeypatch):
    """A mean a thousand times the deviation keeps the digits that float32 has; a constant group gives the bias."""
    monkeypatch.setattr(module, "TILE", tile)
    x, groups, weight, bias = inputs((1, 2, 20, 15))
    agree(group_norm_silu, reference, (x + 3000, groups, weight, bias), tolerance=2e-3)
    constant = group_norm(torch.full_like(x, 7.0), groups, weight, bias)
    torch.testing.assert_close(constant, bias.view(1, -1, 1, 1).expand(x.shape))
    big = group_norm_silu((x * 1e4).clamp(-6e4, 6e4).half(), groups, weight.half() * 1000, bias.half())
    assert big.isfinite().all()


def test_nothing_in_nothing_out():
    x, groups, weight, bias = inputs((0, 4, 3, 3))
    x.requires_grad_()
    group_norm_silu(x, groups, weight, bias).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("groups, channels", [(3, 8), (0, 8), (2, 6)])
def test_shapes_that_do_not_fit(groups, channels):
    with pytest.raises(ValueError, match="do not fit"):
        group_norm_silu(torch.randn(2, 8, 3, 3), groups, torch.ones(channels), torch.ones(channels))


@pytest.mark.parametrize("tile, silu, shape", [(8192, False, (1, 2, 3, 2)), (8192, True, (1, 2, 3, 2)),
                                               (4, True, (1, 1, 5, 1))])  # split
def test_gradcheck(tile, silu, shape, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    assert (module._whole(1, shape[2] * shape[3], 1) is None) == (tile == 4)
    gradcheck(group_norm_silu, (*inputs(shape), 1e-5, silu))


@pytest.mark.parametrize("channels_last", [False, True])
def test_as_a_custom_operator(channels_last):
    x, groups, weight, bias = inputs(SHAPES[1], channels_last)
    opcheck(module._fwd.operator, (x, groups, weight, bias, 1e-5, True))
    compiles(lambda x, w, b: group_norm_silu(x, groups, w, b), (x, weight, bias))


@pytest.mark.parametrize("tile", [8192, 64])
def test_deterministic(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    deterministic(group_norm_silu, inputs((1, 2, 20, 15)))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("shape, channels_last, forward, backward", [
    ((1, 16, 16, 16), False, 2, 3), ((1, 16, 16, 16), True, 2, 3),
    ((1, 2, 128, 128), False, 3, 5), ((1, 64, 32, 16), True, 3, 5)])
def test_bytes(shape, channels_last, forward, backward):
    x, groups, weight, bias = inputs(shape, channels_last)
    with traffic() as moved:
        y, mean, rstd = module._fwd(x, groups, weight, bias, 1e-5, True)
    assert forward * nbytes(x) <= moved.total <= 1.05 * forward * nbytes(x)
    with traffic() as moved:
        module._bwd(x, x, groups, weight, bias, mean, rstd, True)
    assert backward * nbytes(x) <= moved.total <= 1.05 * backward * nbytes(x)


def test_the_plain_form_is_the_reference():
    x, groups, weight, bias = (a.double() if isinstance(a, torch.Tensor) else a for a in inputs(SHAPES[1]))
    for silu in (False, True):
        torch.testing.assert_close(group_norm_silu_torch(x, groups, weight, bias, silu=silu),
                                   group_norm_silu_reference(x, groups, weight, bias, silu=silu))


def test_no_second_derivative():
    """An error, not a wrong number: the backward kernel has no gradients of its own."""
    x, groups, weight, bias = inputs(SHAPES[1])
    x.requires_grad_()
    first, = torch.autograd.grad(group_norm_silu(x, groups, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_backend_stands_in_for_the_mode(mode, backend, monkeypatch):
    launched = []
    launch = module.launch

    def counted(kernel, *args, **more):
        launched.append(kernel)
        launch(kernel, *args, **more)

    monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setattr(kernels, "mode", mode)
    x, groups, weight, bias = inputs(SHAPES[1])
    y = group_norm_silu(x, groups, weight, bias, backend=backend)
    group_norm(x, groups, weight, bias, backend=backend)
    assert len(launched) == (2 if backend == "triton" else 0)
    torch.testing.assert_close(y, group_norm_silu_reference(x, groups, weight, bias))
    with pytest.raises(ValueError, match="must be one of"):
        group_norm_silu(x, groups, weight, bias, backend="cuda")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("B, C, side", [(1, 128, 64), (1, 64, 32), (1, 256, 64), (2, 320, 64), (1, 32, 256), (8, 128, 128)])
def test_there_are_programs_for_every_processor(B, C, side, channels_last):
    """At least two each where there is as much to do: a program has 2,048 elements."""
    wanted = 2 * 132
    block_c, block_p, chunk = module._split(B, C, side**2, channels_last, wanted)
    programs = B * -(-C // block_c) * -(-(side**2) // chunk)
    assert block_c * block_p <= module.TILE and chunk % block_p == 0 and programs >= min(wanted, B * C * side**2 // 2048)


@pytest.mark.parametrize("processors", [16, 132, 592])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("C, side, whole", [(1024, 16, True), (256, 32, True), (32, 16, True), (1024, 32, False)])
def test_programs_of_a_single_image(C, side, whole, channels_last, processors, monkeypatch):
    """A group of up to TILE elements is one program's, in one launch, however few there are; else every processor has two,
    or a program 2,048 elements."""
    started = []
    monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **constants: started.append(programs))
    monkeypatch.setattr(module, "processors", lambda device: processors)
    x, _, weight, bias = inputs((1, C, side, side), channels_last)
    y, mean, rstd = module._fwd(x, 32, weight, bias, 1e-5, True)
    forward = [*started]
    module._bwd(y, x, 32, weight, bias, mean, rstd, True)
    backward = started[len(forward):]
    if whole:
        assert forward == backward == [32] and C // 32 * side**2 <= module.TILE
    else:
        least = min(2 * processors, x.numel() // 2048)
        assert forward[1] == 32 and min(forward[0], *forward[2:], *backward) >= least and len(started) == 5


@pytest.mark.parametrize("channels_last", [False, True])
def test_chunks_change_nothing_but_rounding(channels_last, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)
    assert module._split(1, 2, 300, channels_last, 2) != module._split(1, 2, 300, channels_last, 8)
    results = []
    for number in (1, 4):
        monkeypatch.setattr(module, "processors", lambda device, number=number: number)
        torch.manual_seed(1)
        x, groups, weight, bias = inputs((1, 2, 20, 15), channels_last)
        x.requires_grad_()
        y = group_norm_silu(x, groups, weight, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        agree(group_norm_silu, reference, (x, groups, weight, bias))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_few_compilations_for_many_sizes(channels_last, monkeypatch):
    """Ten sizes of image: what decides code is the power of two above a size, and whether 16 divides it."""
    sizes = [(16 + 2 * i, 20 + i) for i in range(10)]
    with compilations(module, monkeypatch) as keys:
        monkeypatch.setattr(module, "TILE", 1 << 16)
        for H, W in sizes:
            x, groups, weight, bias = inputs((1, 4, H, W), channels_last)
            module._fwd(x, groups, weight, bias, 1e-5, True)
    assert len(keys) <= 4, keys


@pytest.mark.parametrize("path, C", [("whole", 4), ("split", 256)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_few_compilations_of_every_kernel(channels_last, path, C, monkeypatch):
    """The same sizes, and ten larger ones, forward and backward, of groups that are split too; the kernels do not run here."""
    names = {"whole": {"_group_fwd_kernel", "_group_bwd_kernel"},
             "split": {"_split_moments_kernel", "_split_combine_kernel", "_split_fwd_kernel", "_split_sums_kernel",
                       "_split_bwd_kernel"}}[path]
    sizes = [(16 + 2 * i, 20 + i) for i in range(10)]
    larger = [(64 + 8 * i, 60 + 12 * i) for i in range(10)]
    monkeypatch.setattr(module, "launch", lambda *args, **constants: None)
    for images in (sizes, larger) if path == "split" else (sizes,):
        with compilations(module, monkeypatch) as keys:
            for H, W in images:
                x, _, weight, bias = leaves(inputs((1, C, H, W), channels_last))
                group_norm_silu(x, 4, weight, bias).sum().backward()
        found = [name for name, _ in keys]
        assert set(found) == names and all(found.count(name) <= 4 for name in names), found


@pytest.mark.parametrize("policy", ["this device's", "CUDA's"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, policy, monkeypatch):
    """An element-wise operation: autocast leaves the types as they are, in both modes alike, whatever it does to PyTorch's
    own group norm: on CUDA that is in float32."""
    plain = torch.group_norm
    if policy == "CUDA's":
        monkeypatch.setattr(torch, "group_norm", lambda x, groups, *rest: plain(x.float(), groups, rest[0].float(),
                                                                               rest[1].float(), rest[2]))
    x, groups, weight, bias = inputs(SHAPES[1])
    with torch.autocast(DEVICE, dtype):
        for kind in (torch.float32, dtype):
            for affine in (torch.float32, dtype):
                given = leaves((x.to(kind), weight.to(affine), bias.to(affine)))
                exact = [a.detach().double() for a in given]
                wanted = group_norm_silu_reference(exact[0], groups, *exact[1:])
                for backend in ("torch", "triton"):
                    y = group_norm_silu(given[0], groups, *given[1:], backend=backend)
                    assert y.dtype == kind
                    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
                    gradients = torch.autograd.grad(y.float().sum(), given)
                    assert [a.dtype for a in gradients] == [a.dtype for a in given]


@pytest.mark.parametrize("types", ["bf16 and fp32", "fp32 and bf16", "fp16 and bf16", "fp64 and fp32", "fp32 and fp64"])
def test_types_that_differ(types):
    """Both modes take them without autocast too: the result has the type of x."""
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    x, groups, weight, bias = inputs(SHAPES[1])
    kind, affine = (names[name] for name in types.split(" and "))
    given = (x.to(kind), groups, weight.to(affine), bias.to(affine))
    wanted = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in given))
    for backend in ("torch", "triton"):
        y = group_norm_silu(*given, backend=backend)
        assert y.dtype == kind
        assert_near(y, wanted, TOLERANCE[kind], backend)
