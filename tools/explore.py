"""Play with a trained run in the browser: move a slider, and new images come back.

  pip install "gradio>=6"
  python tools/explore.py RUN [--port 7860]         # for instance runs/diffusion-mnist or pretrained/vae-mnist

The page is served to this computer alone (127.0.0.1). It shows 24 samples, and below them a strip that tells how the
family makes one:
  vae, gan, flow     the way from the latent noise of the first sample to that of the second, all in the class of the first
  diffusion          the chain: the latent of the first sample before some of the steps, then the sample
  autoregressive     the order of drawing: the first sample after each eighth of its positions, grey where nothing is drawn
  vqgan              the same, for the positions of its codes
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the scripts and the other tools, from whatever directory this is run

from strip import script_of

SAMPLES = 24
STRIP = 9  # images of a strip, at most
EVERY = "all in turn"
WAY = "From the noise of the first sample to that of the second"
TITLES = {"vae": WAY, "gan": WAY, "flow": WAY, "diffusion": "The chain of the first sample, from noise to image",
          "autoregressive": "The order in which the first sample is drawn",
          "vqgan": "The order in which the codes of the first sample are drawn"}


@dataclasses.dataclass
class Slider:
    """A control: the field of Config that it sets (or seed), a word about it, its range, first value and step."""

    name: str
    about: str
    low: float
    high: float
    value: float
    step: float

    def kind(self, value):
        """A value as Config has it: whole where the steps are."""
        return int(value) if self.step == 1 else float(value)


def mix(a, b, weight):
    """From noise a (weight 0) to noise b (weight 1), along a quarter circle: standard normal at any point of it."""
    return math.cos(weight * math.pi / 2) * a + math.sin(weight * math.pi / 2) * b


def revealed(image, side):
    """image (C,H,W) -> (STRIP,C,H,W): its positions of side x side pixels, drawn in raster order, an eighth more in each."""
    _, H, W = image.shape
    columns = math.ceil(W / side)
    total = math.ceil(H / side) * columns
    position = torch.arange(H)[:, None] // side * columns + torch.arange(W) // side  # (H,W)
    drawn = [round(total * k / (STRIP - 1)) for k in range(STRIP)]
    return torch.stack([torch.where(position < n, image, 127) for n in drawn])


class Explorer:
    """A run's networks, its controls, and draw(), which makes the images for their values."""

    def __init__(self, folder):
        self.script = script_of(folder)
        self.name = self.script.__name__
        *self.networks, self.cfg = self.script.load(folder)
        _, saved = self.script.read_run(folder)
        self.shape = tuple(saved["facts"]["shape"])
        self.names = list(saved["facts"]["names"])
        self.classes = saved["facts"]["classes"]
        self.sliders = [Slider("seed", "of the noise", 0, 1000, 0, 1), *self.own_sliders()]

    def own_sliders(self):
        cfg = self.cfg
        if self.name == "diffusion":
            sliders = [Slider("nfe", "network evaluations", 1, max(64, cfg.nfe), cfg.nfe, 1)]
        else:
            lowest = 0.05 if self.name in ("autoregressive", "vqgan") else 0  # these two divide by it
            sliders = [Slider("temperature", "below 1: less varied", lowest, max(1.5, cfg.temperature), cfg.temperature, 0.05)]
        tuned = self.name == "diffusion" and cfg.sampler == "consistency"  # it is guided already
        if self.classes and hasattr(cfg, "guidance") and not tuned:
            sliders.append(Slider("guidance", "towards the class", 0, max(5, cfg.guidance), cfg.guidance, 0.25))
        return sliders

    def draw(self, label, **values):
        """label: a class's name, or EVERY; values: one for each slider -> samples and strip, (N,C,H,W) uint8."""
        values = {slider.name: slider.kind(values[slider.name]) for slider in self.sliders}
        torch.manual_seed(values.pop("seed"))
        cfg = dataclasses.replace(self.cfg, **values)
        y = torch.arange(SAMPLES) % max(self.classes, 1)
        if label != EVERY:
            y = torch.full((SAMPLES,), self.names.index(label))
        with torch.no_grad():
            return getattr(self, self.name)(cfg, y)

    def vae(self, cfg, _):
        model, = self.networks
        z = self.script.sample_prior(model, SAMPLES, cfg.temperature)
        way = torch.stack([torch.lerp(z[0], z[1], k / (STRIP - 1)) for k in range(STRIP)])
        samples = self.script.descend(model, z, cfg.temperature)
        strip = self.script.descend(model, way, 0.0)  # in a chain of latents, the means of those below the top
        return [self.script.to_uint8(self.script.pixel_mean(params, cfg.likelihood)) for params in (samples, strip)]

    def gan(self, cfg, y):
        G = self.networks[0]
        z = torch.randn(SAMPLES, cfg.z_dim)
        way = torch.stack([mix(z[0], z[1], k / (STRIP - 1)) for k in range(STRIP)])
        samples = self.script.sample(G, z, y, cfg.temperature)
        strip = self.script.sample(G, way, y[:1].expand(STRIP), cfg.temperature)
        return self.script.to_uint8(samples), self.script.to_uint8(strip)

    def flow(self, cfg, y):
        model, = self.networks
        eps = self.script.draw_noise(model, SAMPLES)
        way = [torch.stack([mix(e[0], e[1], k / (STRIP - 1)) for k in range(STRIP)]) for e in eps]
        samples, _ = self.script.sample(model, eps, y, cfg)
        strip, _ = self.script.sample(model, way, y[:1].expand(STRIP), cfg)
        return self.script.quantize(samples), self.script.quantize(strip)

    def diffusion(self, cfg, y):
        model, = self.networks
        latents = []
        noise = torch.randn(SAMPLES, *self.shape)
        y = y if self.classes else None
        samples = self.script.sample(model, noise, y, cfg, before_step=lambda x_t, t: latents.append(x_t[0]))
        pick = torch.linspace(0, len(latents), STRIP).round().int().unique().tolist()  # the last one is the sample itself
        strip = torch.stack([[*latents, samples[0]][i] for i in pick])
        return self.script.to_uint8(samples), self.script.to_uint8(strip)

    def autoregressive(self, cfg, y):
        model, = self.networks
        levels, _ = self.script.sample(model, y, torch.rand(SAMPLES, *self.shape), cfg)
        samples = self.script.to_pixels(levels, cfg)
        return samples, revealed(samples[0], cfg.patch)

    def vqgan(self, cfg, y):
        autoencoder, prior = self.networks
        _, H, W = self.shape
        indices = self.script.sample(prior, y, torch.rand(SAMPLES, *prior.grid), cfg)
        samples = self.script.to_uint8(autoencoder.draw(indices)[..., :H, :W])
        return samples, revealed(samples[0], cfg.downsample)


def picture(images, columns):
    """(N,C,H,W) uint8 -> one image (H',W',3) or (H',W') for the page, small ones enlarged."""
    N, C, H, W = images.shape
    scale = max(1, 84 // max(H, W))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=255)
    rows = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, -N % columns), value=255).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return grid.squeeze(-1).numpy()


def page(explorer, title):
    """The gradio page of an Explorer."""
    import gradio

    def show(label, *values):
        named = {slider.name: value for slider, value in zip(explorer.sliders, values, strict=True)}
        samples, strip = explorer.draw(label, **named)
        return picture(samples, 8), picture(strip, STRIP)

    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {title}")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = gradio.Dropdown([EVERY, *explorer.names], value=EVERY, label="class", visible=explorer.classes > 0)
                controls = [gradio.Slider(s.low, s.high, s.value, step=s.step, label=f"{s.name} ({s.about})")
                            for s in explorer.sliders]
            with gradio.Column(scale=3):
                gradio.Markdown("Samples")
                samples = gradio.Image(show_label=False, format="png", buttons=[], alt_text="samples")
                gradio.Markdown(TITLES[explorer.name])
                strip = gradio.Image(show_label=False, format="png", buttons=[], alt_text=TITLES[explorer.name])
        inputs = [label, *controls]
        for control in inputs:
            control.change(show, inputs, [samples, strip], trigger_mode="always_last", show_progress="hidden")
        blocks.load(show, inputs, [samples, strip])
    return blocks


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run of any of the six scripts")
    parser.add_argument("--port", type=int, default=7860, help="port of the page on this computer, 7860")
    args = parser.parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.exit("error: the page is made with gradio, which is not there: pip install \"gradio>=6\"")
    explorer = Explorer(args.run)
    blocks = page(explorer, f"{explorer.name}.py: {Path(args.run).resolve().name}")
    try:
        blocks.launch(server_name="127.0.0.1", server_port=args.port, share=False, footer_links=["gradio", "settings"])
    except OSError as e:  # the port is taken
        sys.exit(f"error: --port {args.port}: {e}")


if __name__ == "__main__":
    main()
