"""What every kernel is held to: agreement with a float64 reference, gradients of any stride, compilers, bytes moved."""

import collections
import contextlib
import inspect

import torch

import kernels

DEVICE = "cpu" if kernels.INTERPRETING or not torch.cuda.is_available() else "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of the largest value
GRADIENTS = {  # kinds of gradients that autograd hands over, by what is done with an output y
    "random": lambda y: torch.randn_like(y),
    "stride 0": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape),  # .sum().backward()
    "sliced": lambda y: torch.randn(*y.shape, 2, dtype=y.dtype, device=y.device)[..., 1] if y.dim() else torch.ones_like(y),
    "saved elsewhere": torch.randn_like,  # what autograd keeps comes back contiguous, as from save_on_cpu
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype, device=y.device).permute(*range(y.dim())[::-1]),
}


def tensors(outputs):
    """The floating tensors among the outputs of an operation."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]


def leaves(inputs, dtype=None):
    """Copies, strides kept, of the tensors among the inputs; floating ones of type dtype, and asking for gradients."""
    out = []
    for x in inputs:
        if isinstance(x, torch.Tensor):
            kind = dtype if dtype and x.is_floating_point() else x.dtype
            copy = torch.empty_strided(x.shape, x.stride(), dtype=kind, device=x.device) if x.numel() else torch.empty_like(x)
            x = copy.copy_(x).requires_grad_(kind.is_floating_point)
        out.append(x)
    return out


def assert_near(got, want, tolerance, what=""):
    """Every element within a share of the largest wanted, NaN nowhere."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    if want.numel():
        scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0
        torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=0, atol=tolerance * max(scale, 1e-6),
                                   msg=lambda m: f"{what}: {m}")


def agree(op, reference, inputs, dtype=torch.float32, gradient="random", tolerance=None):
    """op on inputs of a type against reference on the same numbers in float64: outputs, and all gradients."""
    ours = leaves(inputs, dtype)
    theirs = leaves([x.detach() if isinstance(x, torch.Tensor) else x for x in ours], torch.float64)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda a: torch.empty(a.shape, dtype=a.dtype, device=a.device).copy_(a),
                                                     lambda a: a)
    with hooks if gradient == "saved elsewhere" else contextlib.nullcontext():
        y = tensors(op(*ours))
    y_ref = tensors(reference(*theirs))
    tolerance = tolerance or TOLERANCE[dtype]
    assert len(y) == len(y_ref) > 0
    for i, (a, b) in enumerate(zip(y, y_ref, strict=True)):
        assert_near(a, b, tolerance, f"output {i}")
    dy = [GRADIENTS[gradient](a) for a in y]
    wanted = [i for i, x in enumerate(ours) if isinstance(x, torch.Tensor) and x.requires_grad]
    got = torch.autograd.grad(y, [ours[i] for i in wanted], dy)
    want = torch.autograd.grad(y_ref, [theirs[i] for i in wanted], [d.double() for d in dy])
    for i, a, b in zip(wanted, got, want, strict=True):
        assert a.dtype == ours[i].dtype
        assert_near(a, b, tolerance, f"gradient of input {i}")


def gradcheck(op, inputs):
    """Gradients against finite differences in float64."""
    assert torch.autograd.gradcheck(lambda *x: tuple(tensors(op(*x))), leaves(inputs, torch.float64), nondet_tol=0.0)


def opcheck(custom_op, inputs):
    """The four checks of a custom operator: schema, autograd registration, fake tensors, AOTAutograd with dynamic shapes."""
    torch.library.opcheck(custom_op, leaves(inputs))


def compiles(op, inputs):
    """torch.compile takes op between others without a break, and gives the same values and gradients."""
    def around(*x):
        x = [a * 2 if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in x]
        return [y.sin() for y in tensors(op(*x))]

    torch.compiler.reset()
    results = []
    for f in (around, torch.compile(around, fullgraph=True, backend="aot_eager")):
        x = leaves(inputs)
        y, wanted = f(*x), [a for a in x if isinstance(a, torch.Tensor) and a.requires_grad]
        results.append([*y, *torch.autograd.grad([a.sum() for a in y], wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def deterministic(op, inputs):
    """Twice the same call, and its backward pass twice over the same graph, give the same bits; inputs stay as they were."""
    x = leaves(inputs)
    kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in x]
    wanted = [a for a in x if isinstance(a, torch.Tensor) and a.requires_grad]
    y1, y2 = tensors(op(*x)), tensors(op(*x))
    dy = [torch.randn_like(a) for a in y1]
    first = torch.autograd.grad(y1, wanted, dy, retain_graph=True)
    again = torch.autograd.grad(y1, wanted, dy)
    other = torch.autograd.grad(y2, wanted, dy)
    for a, b in [*zip(y1, y2, strict=True), *zip(first, again, strict=True), *zip(first, other, strict=True)]:
        assert torch.equal(a, b)
    for a, b in zip(x, kept, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


class Traffic:
    read = 0
    written = 0

    def __init__(self):
        self.programs = collections.Counter()  # program: what it read

    @property
    def total(self):
        return self.read + self.written

    @property
    def most(self):
        """What the program that read most read."""
        return max(self.programs.values(), default=0)


@contextlib.contextmanager
def traffic():
    """Counts the bytes that kernels ask for, in the interpreter: elements under the mask times their size."""
    from triton.runtime.interpreter import interpreter_builder as builder

    count, load, store = Traffic(), builder.create_masked_load, builder.create_masked_store

    def counted_load(ptrs, mask, *args):
        size = int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        count.read += size
        count.programs[builder.grid_idx] += size
        return load(ptrs, mask, *args)

    def counted_store(ptrs, value, mask, *args):
        count.written += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(ptrs, value, mask, *args)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield count
    finally:
        del builder.create_masked_load, builder.create_masked_store


@contextlib.contextmanager
def compilations(module, monkeypatch):
    """The set of different compilations that the launches of a module's kernels ask for: what triton's cache is keyed by."""
    keys = set()
    original = module.launch

    def kind(a):
        if isinstance(a, torch.Tensor):
            return str(a.dtype), a.data_ptr() % 16 == 0
        if isinstance(a, bool) or not isinstance(a, int):
            return type(a).__name__
        return 1 if a == 1 else ("i64" if a >= 2**31 else "i32", a % 16 == 0)

    def counted(kernel, programs, *args, **named):
        function = getattr(kernel, "fn", kernel)
        names = list(inspect.signature(function).parameters)
        values = dict(zip(names, args, strict=False)) | named
        constants = {name for name, p in inspect.signature(function).parameters.items() if "constexpr" in str(p.annotation)}
        key = [(name, repr(a) if name in constants or name not in names else kind(a)) for name, a in sorted(values.items())]
        keys.add((function.__name__, tuple(key)))
        return original(kernel, programs, *args, **named)

    monkeypatch.setattr(module, "launch", counted)
    yield keys
    monkeypatch.setattr(module, "launch", original)


def nbytes(*x):
    return sum(a.numel() * a.element_size() for a in x)
