"""The optimizer of the scripts: Adam, and momentum made orthogonal for the matrices inside a network."""

import copy
import importlib

import pytest
import torch
from torch import nn

import tiny
import vae as script  # the plumbing is the same in all six


class Net(nn.Module):
    def __init__(self, kind=torch.float32):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.inside = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 1), nn.Flatten(),
                                    nn.Linear(96, 5), nn.Tanh(), nn.Linear(5, 96), nn.Linear(96, 5))
        self.last = nn.Linear(5, 4)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.last(self.inside(self.first(x)))


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(7, 3, 4, 4, generator=generator)).square().mean().backward()


@pytest.mark.parametrize("shape", [(4, 6, 6), (3, 5, 40), (3, 40, 5), (1, 64, 128), (2, 1, 9)])
def test_orthogonal_keeps_the_directions(shape):
    """In the basis of the singular vectors the result is diagonal, and what stands there is near 1."""
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(m, full_matrices=False)
    inside = U.mT @ script.orthogonal(m) @ Vh.mT
    kept = torch.diagonal(inside, dim1=1, dim2=2)
    assert (inside - torch.diag_embed(kept)).abs().max() < 1e-3
    large = S > 0.02 * m.flatten(1).norm(dim=1)[:, None]  # five steps do not lift smaller ones all the way
    assert large.float().mean() > 0.8
    assert kept[large].min() > 0.65 and kept[large].max() < 1.25


def test_orthogonal_in_float64():
    m = torch.randn(2, 6, 4, dtype=torch.float64)
    assert script.orthogonal(m).dtype == torch.float64
    assert torch.allclose(script.orthogonal(m).float(), script.orthogonal(m.float()), atol=1e-4)


def test_orthogonal_of_zero_is_zero():
    assert torch.equal(script.orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_it_is_torchs_muon_beside_adam():
    """torch.optim.Muon, whose products are in bfloat16, on the matrices, kernels as matrices, and Adam on all the rest."""
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    optimizer = script.Muon(ours, [ours.inside], 1.0, (0.9, 0.99))
    inside = [p for p in theirs.inside.parameters() if p.ndim > 1]
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in inside]
    muon = torch.optim.Muon(flat, 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([p for p in theirs.parameters() if all(p is not q for q in inside)], 0.01, (0.9, 0.99))
    start = [p.detach().clone() for p in theirs.parameters()]
    for _ in range(5):
        optimizer.param_groups[0]["lr"] = 0.01  # as the scripts set it in each step
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for p, q in zip(flat, inside, strict=True):
            p.grad = q.grad.flatten(1)
        for rule in (optimizer, muon, adam):
            rule.step()
    for p, q in zip(flat, inside, strict=True):
        q.data.copy_(p.data.view(q.shape))
    for (name, p), q, before in zip(ours.named_parameters(), theirs.parameters(), start, strict=True):
        moved = (q - before).norm()
        assert moved > 0
        is_matrix = name.startswith("inside") and p.ndim > 1
        assert (p - q).norm() < (0.05 if is_matrix else 1e-4) * moved, name


def test_a_step_has_about_the_size_of_adams():
    """The root mean square of a step is 0.2 of the learning rate, for wide, square and tall matrices and for kernels."""
    torch.manual_seed(0)
    model = Net()
    optimizer = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    before = [p.detach().clone() for p in model.inside.parameters()]
    gradients(model, 0)
    optimizer.step()
    for p, old in zip(model.inside.parameters(), before, strict=True):
        if p.ndim > 1:
            assert 0.5 * 0.002 < (p - old).square().mean().sqrt() < 1.2 * 0.002


def test_what_has_no_gradient_stays():
    model = Net()
    model.inside[0].requires_grad_(False)
    model.first.requires_grad_(False)
    optimizer = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    before = copy.deepcopy(model)
    for step in range(2):
        optimizer.zero_grad()
        gradients(model, step)
        optimizer.step()
    for part in ("first", "inside.0"):
        assert torch.equal(model.get_parameter(f"{part}.weight"), before.get_parameter(f"{part}.weight"))
    assert not torch.equal(model.inside[2].weight, before.inside[2].weight)


def test_it_goes_on_bit_for_bit_from_its_state():
    torch.manual_seed(0)
    model = Net()
    optimizer = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    for step in range(6):
        if step == 3:
            other = copy.deepcopy(model)
            again = script.Muon(other, [other.inside], 1.0, (0.5, 0.5))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for network, rule in ((model, optimizer), *([(other, again)] if step >= 3 else [])):
            rule.zero_grad()
            gradients(network, step)
            rule.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_scaler_of_fp16_leaves_a_whole_step_out():
    """An infinite gradient in a bias: no matrix moves either."""
    model = Net()
    optimizer = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model)
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(7, 3, 4, 4)).square().mean()).backward()
        if bad:
            model.last.bias.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
        assert not any(moved) if bad else all(moved)
    assert scaler.get_scale() == 2.0


INSIDE = {  # script and flags: what begins the names of the matrices that move by orthogonal momentum, and how many they are
    "vae --prior flow --flow-steps 2": (("up", "to_top", "down", "flow"), 2 + 1 + 3 + 2 * 3),
    "vae --levels 2 --posterior iaf --flow-steps 2": (("up", "to_top", "down", "iaf"), 8 + 1 + 10 + 2 * 3),
    "flow --blocks 2 --layers 1": (("f.blocks.0.layers", "f.blocks.1.layers"), 8),
    "flow --arch glow": ((), 0),
    "flow --blocks 2 --layers 1 --optimizer adam": ((), 0),
    "vae --optimizer adam": ((), 0),
    "autoregressive --blocks 2 --optimizer adam": ((), 0),
    "diffusion --optimizer adam": ((), 0),
    "vqgan --prior-blocks 2 --optimizer adam": ((), 0),
    "autoregressive --blocks 2": (("trunk.blocks",), 8),
    "autoregressive --arch pixelcnn --blocks 2": (("trunk.blocks",), None),
    "autoregressive --arch made --blocks 2": ((), 0),
    "diffusion": (("down", "mid", "attention", "up"), None),
    "vqgan --prior-blocks 2": (("blocks",), 8),
}


@pytest.mark.parametrize("line", INSIDE)
def test_which_matrices(line, tmp_path, monkeypatch):
    name, *flags = line.split()
    module = importlib.import_module(name)
    made = []
    start = module.Muon.__init__

    def watched(self, model, inside, lr, betas):
        start(self, model, inside, lr, betas)
        made.append((self, dict(model.named_parameters())))

    monkeypatch.setattr(module.Muon, "__init__", watched)
    steps = ["--stage1", 1, "--steps", 2] if name == "vqgan" else ["--steps", 1]
    small = ["--width", 8] if name in ("vae", "flow", "diffusion") else []
    with tiny.handlers_kept():
        tiny.run(module, [*flags, *small, *steps, "--batch-size", 4, "--eval-images", 4, "--num-samples", 1, "--device", "cpu",
                          "--out", tmp_path / "run"])
    (optimizer, parameters), = made
    others, matrices = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert others | matrices == {id(p) for p in parameters.values()} and not others & matrices
    begins, number = INSIDE[line]
    found = {key for key, p in parameters.items() if id(p) in matrices}
    assert found == {key for key, p in parameters.items() if begins and key.startswith(begins) and p.ndim > 1}
    assert number is None or len(found) == number


CHANGES = {  # of what is kept of a matrix, or of a bias
    "another shape": lambda state, matrix, bias: state[matrix].update(exp_avg=state[matrix]["exp_avg"][:1]),
    "nothing kept": lambda state, matrix, bias: state[matrix].clear(),
    "what Adam keeps": lambda state, matrix, bias: state[matrix].update(
        step=torch.tensor(3.0), exp_avg_sq=state[matrix]["exp_avg"].abs()),
    "a bias as a matrix": lambda state, matrix, bias: [state[bias].pop(key) for key in ("step", "exp_avg_sq")],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_state_that_does_not_fit(what, tmp_path, capsys):
    model = Net()
    optimizer = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    gradients(model, 0)
    optimizer.step()
    saved = {"optimizer": copy.deepcopy(optimizer.state_dict())}
    again = script.Muon(model, [model.inside], 0.01, (0.9, 0.99))
    script.restore({"optimizer": again}, copy.deepcopy(saved), tmp_path)
    bias, matrix = (group["params"][-1] for group in saved["optimizer"]["param_groups"])
    CHANGES[what](saved["optimizer"]["state"], matrix, bias)
    with pytest.raises(SystemExit) as stopped:
        script.restore({"optimizer": again}, saved, tmp_path)
    assert stopped.value.code == 2
    assert "its optimizer does not fit" in capsys.readouterr().err
