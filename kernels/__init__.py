"""Fused Triton kernels for the scripts beside this folder. One file a family; `kernels.mode` says what runs.

  mode "auto"    Triton where there is a CUDA (or ROCm) device and the call is worth a launch, plain PyTorch otherwise
  mode "torch"   plain PyTorch, always
  mode "triton"  Triton, or RuntimeError with the reason; with TRITON_INTERPRET=1 set beforehand also on CPU tensors

It starts from the environment variable M2_KERNELS and is set by the scripts' --kernels; an operation's backend= stands in
for it in one call. `report()` says in one line an operation what would run here and why, and what has fallen back.
Importing this needs neither triton nor a GPU.

From a CPU's side a call of a kernel costs some microseconds, a call of PyTorch's own less. On small tensors that decides,
so mode "auto" takes a kernel from a number of elements on, `least` in each file.
"""

import collections
import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # macOS, Windows, or not installed: the kernels below are then plain functions that nothing calls
    triton = None

    class tl:
        constexpr = None

    def jit(fn):
        return fn


INTERPRETING = triton is not None and triton.knobs.runtime.interpret  # decided when the kernels are defined
OPTIONS = {"enable_fp_fusion": True}  # of every launch and of tools/kernel_report.py; triton 3.10 does not fuse by itself
MODES = ("auto", "torch", "triton")
OPS = {  # operation: its file
    "group_norm_silu": "group_norm",
    "attention": "attention",
    "decode_attention": "decode_attention",
    "masked_conv2d": "masked_conv",
    "gated_masked_conv2d": "masked_conv",
    "affine_coupling": "coupling",
    "spline_coupling": "spline",
    "nearest_code": "vector_quantize",
    "logistic_mixture": "logistic_mixture",
    "bias_act": "bias_act",
}
LIBRARY = {  # operation: the calls that "auto" leaves to the kernels that come with PyTorch, faster or not yet timed
    "attention": "calls without bias",
    "masked_conv2d": "all calls",
    "gated_masked_conv2d": "all calls",
}
PLAIN = (torch.Tensor, torch.nn.Parameter)  # tensors with data, whose kernels can be called without an operator
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the types that kernels take
mode = os.environ.get("M2_KERNELS", "auto")
fallbacks = collections.defaultdict(collections.Counter)  # operation: reason: how often auto fell back for it


def available(device: torch.device | str | None = None) -> tuple[bool, str]:
    """(whether Triton kernels can run on a device, by default the first CUDA device; the reason in words)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _available(device.type, device.index)


available._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which takes 1.4 s to import the compiler


@functools.lru_cache
def _available(kind, index):
    if triton is None:
        return False, "triton is not installed"
    if INTERPRETING:
        return kind == "cpu", f"interpreted on the CPU, triton {triton.__version__}"
    if kind != "cuda":
        return False, f"no CUDA device: tensors on {kind}"
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < (8, 0):
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return True, f"triton {triton.__version__} on {name}"


@functools.lru_cache
def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a CUDA device, which should all have programs to run; 132, an H100's, elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def choose(new: str, kind: str) -> None:
    """Set `mode`, for tensors on a kind of device ("cpu", "cuda"), and on a CPU `fast_products`.

    RuntimeError for an unknown mode and one that cannot run.
    """
    global mode
    if new not in MODES:
        raise RuntimeError(f"kernels.mode (--kernels, M2_KERNELS) must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {new!r}")
    runs, reason = available(kind)
    if new == "triton" and not runs:
        raise RuntimeError(f"kernels.mode is 'triton', but {reason}")
    mode = new
    if kind == "cpu":
        fast_products()


@functools.lru_cache
def fast_products():
    """Let oneDNN multiply float32 matrices on the CPU: with AVX-512 it takes half of MKL's time, and is as exact.

    PyTorch uses oneDNN where products may be rounded to bfloat16. On a CPU with units for that it would round them. So a
    product is tried. All stays as it was where it is rounded, on other CPUs, and in PyTorch before 2.9.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if settings is None or not avx512 or not torch.backends.mkldnn.is_available():
        return
    before = settings.fp32_precision
    a = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    settings.fp32_precision = "bf16"
    error = ((a @ a).double() - a.double() @ a.double()).abs().max()  # 2e-5 in float32, 2e-2 in bfloat16
    if error > 1e-3:
        settings.fp32_precision = before


def by_onednn():
    """Whether `fast_products` is in force."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == "bf16"


by_onednn._dynamo_marked_constant = True


@contextlib.contextmanager
def by_mkl():
    """Undo `fast_products` in a block: for a matrix and a vector MKL is the faster one, up to six times."""
    if not by_onednn():
        yield
        return
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def use_triton(op: str, x: torch.Tensor, supports: Callable[[], tuple[bool, str]], least: int = 0, elementwise: bool = False,
               library: bool = False, backend: str | None = None) -> bool:
    """Whether op is to run its Triton kernels on x: the choice of `mode`, and of size and compiler where that is "auto".

    supports: () -> (bool, reason), what the operation says of its arguments. least: number of elements of x below which a
    launch is not worth it. elementwise: the compiler fuses such an operation better itself. library: this call is one of
    those that LIBRARY names. backend: one of MODES, instead of `mode` in this call.
    Raises ValueError for an unknown mode, RuntimeError where the mode is "triton" and it cannot run.
    """
    wanted = mode if backend is None else backend
    what = "kernels.mode" if backend is None else "backend"
    if wanted not in MODES:
        raise ValueError(f"{what} {wanted!r}: must be one of {', '.join(MODES)}")
    if wanted == "torch":
        return False
    ok, reason = available(x.device)
    if ok:
        ok, reason = supports()
    if wanted == "triton":
        if not ok:
            raise RuntimeError(f"{op}: {what} is 'triton', but {reason}")
        return x.numel() > 0
    if not x.numel() or library or elementwise and torch.compiler.is_compiling():
        return False
    if ok and INTERPRETING:
        ok = False
        reason = "the interpreter is for tests"
    elif ok and x.numel() < least:
        ok = False
        reason = f"fewer than {least} elements"
    if not ok and not torch.compiler.is_compiling():
        fallbacks[op][reason] += 1
    return ok


def report() -> str:
    """One line an operation: what would run here, and why; what has fallen back so far."""
    if mode not in MODES:
        raise ValueError(f"kernels.mode {mode!r}: must be one of {', '.join(MODES)}")
    ok, reason = available("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
    if mode == "torch":
        ok = False
        reason = "kernels.mode is 'torch'"
    elif mode == "auto" and ok and INTERPRETING:
        ok = False
        reason = "the interpreter is for tests"
    lines = []
    for op, file in OPS.items():
        fell = ", ".join(f"{n} x {why}" for why, n in fallbacks[op].items())
        left = LIBRARY.get(op, "") if mode == "auto" and ok else ""
        runs = "triton" if ok and left != "all calls" else "error " if mode == "triton" else "torch "
        lines.append(f"{op:20} {runs}  {reason} (kernels/{file}.py)" + f"; {left} go to PyTorch's own kernels" * bool(left)
                     + f"; fell back {fell}" * bool(fell))
    return "\n".join(lines)


def cdiv(a, b):
    """a / b, rounded up. On the host triton's own, and its next_power_of_2, take some 3 us a call."""
    return -(-a // b)


def power_of_2(n):
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch(kernel, programs, *args, **constants):
    """Start so many programs of a kernel on the device of its first argument, whichever is the current one."""
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, **OPTIONS)


def operator(name, fake, setup=None, backward=None):
    """Make a function that launches kernels an operation of PyTorch's. To be written above it: @operator("norm_fwd", ...).

    The function takes tensors and numbers, annotated, and returns new tensors. fake: the same of tensors without data.
    setup (ctx, inputs, output) and backward (ctx, *gradients) -> gradients are those of torch.autograd.Function and of
    torch.library.register_autograd. An operation without backward, as most of those that a backward calls, raises where its
    gradient is asked for: a second derivative is refused, not taken to be 0.
    What is called is the function itself, in eager mode; where a compiler, fake tensors or a tensor subclass look on, the
    custom operator `operator`, which they can see as one node, and which costs some 30 us a call more.
    """
    def no_setup(ctx, inputs, output):
        pass

    def no_backward(ctx, *gradients):
        raise RuntimeError(f"{name} has no derivative")

    def wrap(function):
        custom = torch.library.custom_op(f"{__name__}::{name}", function, mutates_args=())
        custom.register_fake(fake)
        if backward:
            custom.register_autograd(backward, setup_context=setup)
        function.__signature__ = inspect.signature(function)  # kept: every call of the Function below asks for it
        methods = {"forward": function, "setup_context": setup or no_setup, "backward": backward or no_backward}
        methods = {key: staticmethod(method) for key, method in methods.items()}
        differentiate = type(name, (torch.autograd.Function,), methods).apply

        @functools.wraps(function)
        def call(*args):
            if torch.compiler.is_compiling() or type(args[0]) not in PLAIN or torch._C._len_torch_dispatch_stack():
                return custom(*args)
            return differentiate(*args) if torch.is_grad_enabled() else function(*args)

        call.operator = custom
        return call

    return wrap


def first_derivative_only():
    """Called by the backward of a Function in closed form: refuses create_graph=True, under which it runs with gradients on.

    once_differentiable is not enough: it lets a derivative by what the forward saved be 0 without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True: the second derivative of this operation is not there")


def accumulator(x):
    """The type in which a kernel computes: float64 for float64 (gradcheck), else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def acc_type(x):
    """accumulator(x) as the kernels name it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dense(x):
    """x itself where it is contiguous or channels_last, else a contiguous copy; and whether it is channels_last."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return (x, True) if last else (x.contiguous(), False)


def autocast(*tensors):
    """The tensors (or None) in the type that PyTorch's own products would take them in: under autocast that of autocast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return [a if a is None else a.to(torch.get_autocast_dtype(kind)) for a in tensors]


class Spec(NamedTuple):
    """One way to compile a kernel ahead of time, and what must be true of the result."""

    kernel: str  # name of the kernel in its file
    name: str  # what this variant is
    args: dict  # argument: triton type ("*bf16", "i32", ...; 16-aligned) or the value of a constant
    num_warps: int = 4
    num_stages: int | None = None  # None: what a launch that names none gets, 3 on NVIDIA and 2 on AMD
    registers: int = 255  # at most, a thread, on NVIDIA
    vector: bool = True  # loads of at least 8 bytes a thread must be there
    matrix: bool = False  # matrix instructions must be there
    hip: dict = {}  # what is otherwise on AMD: constants, num_warps, num_stages
    own: dict = {}  # target of tools/kernel_report.py: the same of that one, or None where no launch chooses this variant
