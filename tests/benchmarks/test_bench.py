"""What measures the kernels, itself: passes, gradients, compilation, figures and tables."""

import csv
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import sweep
import table
import torch
import torch.nn.functional as F
from PIL import Image

import kernels


def smooth(x, weight):
    return torch.sin(x) * weight, torch.arange(3)  # integers beside: not differentiated


def inputs():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, device=bench.DEVICE).to(memory_format=torch.channels_last)
    return x, torch.randn(3, 1, 1, device=bench.DEVICE)


@pytest.mark.parametrize("passes", bench.PASSES)
def test_a_pass_can_be_called_again_and_gives_what_is_known(passes):
    x, weight = inputs()
    call = bench.prepare(smooth, (x, weight), passes)
    first = call()
    bench.check(call(), first, 0)
    if passes == "forward":
        assert len(first) == 1 and not first[0].requires_grad
        torch.testing.assert_close(first[0], torch.sin(x) * weight)
        return
    dy = first[0] / (torch.cos(x) * weight)  # the gradient that was handed over
    torch.testing.assert_close(first[1], (dy * torch.sin(x)).sum((0, 2, 3), keepdim=True)[0], rtol=1e-3, atol=1e-3)
    assert dy.std() > 0.5  # not the ones of .sum()


@pytest.mark.parametrize("passes", bench.PASSES[1:])
def test_gradients_are_dense_and_made_before(passes, monkeypatch):
    """In the layout of the output, never a stride of 0; the same for every form; none is made in a call."""
    seen = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x, dy, **more: (seen.append(dy), original(y, x, dy, **more))[1])
    bench.prepare(smooth, inputs(), passes)()
    call = bench.prepare(lambda x, w: w * x.sin(), inputs(), passes)
    call()
    call()
    (a,), (b,), (c,) = seen
    assert b is c and torch.equal(a, b)
    assert a.is_contiguous(memory_format=torch.channels_last) and 0 not in a.stride()


def test_a_backward_pass_alone_runs_no_forward_pass():
    calls = []
    call = bench.prepare(lambda x, w: (calls.append(1), x * w)[1], inputs(), "backward")
    call()
    call()
    assert len(calls) == 1


def test_each_compilation_is_for_one_shape(monkeypatch):
    """Of twelve shapes, more than dynamo's limit of compilations, each gets a graph of its own, without symbolic sizes."""
    graphs = []

    def backend(module, examples):
        graphs.append([s for a in examples if isinstance(a, torch.Tensor) for s in a.shape])
        return module

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile(f, backend=backend, **more))

    def form(x):
        return F.silu(x)

    for n in range(2, 14):
        f = bench.compiled(form)
        f(torch.randn(n))
        f(torch.randn(n))
    torch.compiler.reset()
    assert graphs == [[n] for n in range(2, 14)] and all(type(n) is int for sizes in graphs for n in sizes)


def test_a_wrong_form_is_found():
    x, weight = inputs()
    right = bench.prepare(smooth, (x, weight), "forward+backward")()
    wrong = bench.prepare(lambda x, w: torch.sin(x) * w * 1.01, (x, weight), "forward+backward")()
    with pytest.raises(AssertionError):
        bench.check(wrong, right, 1e-3)


def test_quantiles_and_totals():
    assert bench.quantiles(range(101)) == [20, 50, 80]
    parts = {"forward": 2, "backward": 3, "twice": 8}
    assert [bench.total(parts, p) for p in ("forward", "backward", "forward+backward", "twice")] == [2, 3, 5, 8]
    assert bench.total(parts | {"forward+backward": 7}, "forward+backward") == 7
    seconds = bench.times(lambda: None, least=0.01)
    assert len(seconds) == 3 and 0 <= seconds[0] <= seconds[1] <= seconds[2] < 0.01


def rows():
    figures = {("op", "forward", "reference"): 6.0, ("op", "forward", "plain"): 2.0, ("op", "forward", "compiled"): 1.0,
               ("op", "forward", "peer"): 4.0, ("op", "forward+backward", "reference"): 9.0,
               ("op", "forward+backward", "plain"): 3.0, ("other torch.float32, reverse", "forward", "plain"): 5.0}
    return [{"op": op, "pass": p, "impl": impl, "device": "a card", "torch": "2", "triton": "3", "p20_ms": ms / 2, "p50_ms": ms,
             "p80_ms": 2 * ms, "gb_s": 1.0, "percent_of_peak": 50.0, "peak_mib": 7.0} for (op, p, impl), ms in figures.items()]


def test_speed_ups():
    by = {(r["op"], r["pass"], r["impl"]): table.speed_ups(r, rows()) for r in rows()}
    assert by["op", "forward", "reference"] == (2 / 6, 1 / 6) and by["op", "forward", "compiled"] == (2, 1)
    assert by["op", "forward+backward", "reference"] == (3 / 9, None)
    kernel = rows()[2] | {"impl": "triton", "p50_ms": 0.25}
    more = [*rows(), rows()[2] | {"impl": "compiled reference", "p50_ms": 0.5}, kernel]
    assert table.speed_ups(kernel, more) == (8, 2)  # against the faster of the compiled forms


def test_the_table_of_a_run():
    lines = table.text(rows())
    assert [line for line in lines if not line.startswith(" ")] == ["op, forward", "op, forward+backward",
                                                                    "other torch.float32, reverse, forward"]
    plain = next(line for line in lines if "plain" in line).split()
    assert plain == ["plain", "1.0000", "2.0000", "4.0000", "1.0", "50.0", "-", "1.00", "0.50", "7.00"]
    assert len(lines[0].split("  ")) > 1 and len({len(line) for line in lines if line.startswith(" ")}) == 1


def test_the_table_of_the_page(tmp_path):
    table.write_csv(rows(), tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows())
    text = table.markdown(table.read_csv(tmp_path / "a.csv"))
    assert "| op | 2.000, 3.000 | 3.00, 3.00 | 0.50, - | peer 2.00, - |" in text
    assert "| other, reverse | 5.000 |  |  |  |" in text and "a card" in text
    assert "more, compiled: op (forward)." in text and "more, reference: nowhere." in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter\n")
    table.write("new", page)
    assert page.read_text() == f"before\n{table.MARKS[0]}\nnew\n{table.MARKS[1]}\nafter\n"
    kernel = rows() + [rows()[1] | {"impl": "triton", "p50_ms": 0.5}]
    assert "| op | 0.500 | 12.00 | 4.00 | 2.00 | peer 8.00 |" in table.markdown(kernel)


@pytest.mark.parametrize("program, options", [("table.py", ["a.csv"]), ("sweep.py", ["--help"])])
def test_the_programs_start_from_any_folder(tmp_path, program, options):
    table.write_csv(rows(), tmp_path / "a.csv")
    command = [sys.executable, Path(table.__file__).with_name(program), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and ("2.000, 3.000" in done.stdout or "--passes" in done.stdout), done.stderr


def test_times_that_scatter_are_counted():
    steady = rows()[0] | {"p20_ms": 1.0, "p80_ms": 1.4}
    assert table.unsteady([steady, steady]) == 0 and table.unsteady([*rows(), steady]) == len(rows())


def test_the_page_has_a_place_for_the_table():
    page = table.PAGE.read_text()
    assert all(page.count(mark) == 1 for mark in table.MARKS)


@pytest.mark.parametrize("op", sweep.OPS)
def test_a_sweep_checks_and_times_each_implementation(op, monkeypatch, tmp_path):
    """At the least size, two images or heads of it: a row each, a plot; and a wrong form is refused."""
    monkeypatch.setattr(sweep, "IMPLS", ("reference", "plain"))
    monkeypatch.setattr(kernels, "mode", "torch")
    monkeypatch.setattr(bench, "times", lambda call: (call(), (0.001, 0.002, 0.003))[1])
    size = min(sweep.OPS[op].sizes)
    passes = sweep.OPS[op].passes[-1]
    rows = sweep.measure(op, passes, [size])
    assert rows == [(size, impl, 1.0, 2.0, 3.0) for impl in ("reference", "plain")]
    plain = getattr(sweep.OPS[op].module, f"{op}_torch")

    def wrong(*args, **more):
        y = plain(*args, **more)
        return (y[0] * 1.5, *y[1:]) if isinstance(y, tuple) else y * 1.5

    monkeypatch.setattr(sweep.OPS[op].module, f"{op}_torch", wrong)
    with pytest.raises(AssertionError):
        sweep.measure(op, passes, [size])


def test_a_sweep_is_plotted(tmp_path):
    rows = [(n, impl, n / 2, n, 2 * n) for n in (8, 16, 32) for impl in ("reference", "plain")]
    sweep.plot(rows, "side", "an operation", tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 400 and height > 300
