"""Autocast, over all operations: the plain form and the kernels give results of equal types, whatever types come in."""

import pytest
import torch
from harness import DEVICE, TOLERANCE, assert_near, leaves, tensors

import kernels
from kernels.attention import attention
from kernels.bias_act import bias_act
from kernels.coupling import affine_coupling
from kernels.decode_attention import decode_attention
from kernels.group_norm import group_norm_silu
from kernels.logistic_mixture import logistic_mixture
from kernels.masked_conv import gated_masked_conv2d, masked_conv2d
from kernels.spline import spline_coupling
from kernels.vector_quantize import nearest_code

HEADS = (1, 2, 4, 16)  # of attention: images, heads, positions, numbers
IMAGE = (2, 4, 3, 3)
CALLS = {  # operation: the call, and the shapes of its floating tensors
    "group_norm_silu": (lambda x, weight, bias, **more: group_norm_silu(x, 2, weight, bias, **more), IMAGE, (4,), (4,)),
    "attention": (lambda q, k, v, bias, **more: attention(q, k, v, "causal", bias, **more), *[HEADS] * 3, (2, 3, 3)),
    "decode_attention": (lambda q, k, v, **more: decode_attention(q, k, v, 3, **more), (1, 2, 1, 16), HEADS, HEADS),
    "masked_conv2d": (masked_conv2d, IMAGE, (4, 4, 3, 3), (4,)),
    "gated_masked_conv2d": (gated_masked_conv2d, IMAGE, (8, 4, 3, 3), (8,), (2, 8)),
    "affine_coupling": (lambda x, params, **more: affine_coupling(x, params, 2, **more), IMAGE, IMAGE),
    "spline_coupling": (spline_coupling, IMAGE, (2, 4 * 11, 3, 3)),
    "nearest_code": (nearest_code, (20, 8), (5, 8)),
    "logistic_mixture": (logistic_mixture, (2, 1, 3, 3), (2, 6, 3, 3)),
    "bias_act": (bias_act, IMAGE, (4,)),
}


def test_every_operation_is_here():
    assert set(CALLS) == set(kernels.OPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("types", ["all in float32", "the first in half", "the others in half", "all in half",
                                   "the other half type"])
@pytest.mark.parametrize("op", CALLS)
def test_equal_types(op, types, dtype):
    """Of the results, and of gradients those of the inputs; the two are near each other."""
    call, *shapes = CALLS[op]
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    kinds = {"all in float32": (torch.float32, torch.float32), "the first in half": (dtype, torch.float32),
             "the others in half": (torch.float32, dtype), "all in half": (dtype, dtype),
             "the other half type": (other, torch.float32)}[types]
    given = [torch.randn(shape, device=DEVICE).to(kinds[i > 0]) for i, shape in enumerate(shapes)]
    if op == "logistic_mixture":
        given[0] = given[0].abs().mul(60).round().clamp(max=255)  # levels
    results = []
    for backend in ("torch", "triton"):
        x = leaves(given) if op not in ("decode_attention", "nearest_code", "logistic_mixture") else given
        with torch.autocast(DEVICE, dtype):
            results.append(tensors(call(*x, backend=backend)))
        if any(a.requires_grad for a in x):
            gradients = torch.autograd.grad([y.float().sum() for y in results[-1]], x)
            assert [a.dtype for a in gradients] == [a.dtype for a in x], backend
    plain, ours = results
    assert [a.dtype for a in plain] == [a.dtype for a in ours]
    for a, b in zip(ours, plain, strict=True):
        assert_near(a, b, 2 * TOLERANCE[torch.bfloat16], op)
