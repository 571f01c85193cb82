"""Play with a trained run in the browser: move a slider, and new images come back.

  pip install "gradio>=6"
  python tools/explore.py RUN [--port 7860]         # for instance runs/diffusion-mnist or pretrained/vae-mnist

The page is served to this computer alone (127.0.0.1). It shows 24 samples. One slider goes along what the family
makes them of, for all 24 at once, and a strip below shows that way for the first one:
  vae, gan, flow     walk: from the latent noise of each sample to that of the next, in the sample's own class
  diffusion          chain: the latents before each of the steps, from noise to the sample
  autoregressive     drawn: the order of drawing; a part of the positions is drawn, the others are grey
  vqgan              the same, for the positions of its codes
Other sliders set the seed of the noise, and temperature, guidance or the number of evaluations where the family has them.
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


def drawn(images, side, share):
    """images (...,H,W) in which the first share (0 to 1) of the positions of side x side pixels is drawn, the rest grey."""
    H, W = images.shape[-2:]
    columns = math.ceil(W / side)
    total = math.ceil(H / side) * columns
    position = torch.arange(H)[:, None] // side * columns + torch.arange(W) // side  # (H,W), in raster order
    return torch.where(position < round(total * share), images, 127)


def revealed(image, side):
    """image (C,H,W) -> (STRIP,C,H,W): an eighth more of its positions is drawn in each."""
    return torch.stack([drawn(image, side, k / (STRIP - 1)) for k in range(STRIP)])


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
        self.sliders = [Slider("seed", "of the noise", 0, 1000, 0, 1), self.way(), *self.own_sliders()]

    def way(self):
        """The slider that goes along what a sample is made of; its value is a share, 0 to 1."""
        if self.name == "diffusion":
            return Slider("chain", "0 is noise, 1 the sample", 0, 1, 1, 0.05)
        if self.name in ("autoregressive", "vqgan"):
            return Slider("drawn", "part of the positions", 0, 1, 1, 0.05)
        return Slider("walk", "from each sample to the next", 0, 1, 0, 0.05)

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
        share = values.pop(self.way().name)
        cfg = dataclasses.replace(self.cfg, **values)
        y = torch.arange(SAMPLES) % max(self.classes, 1)
        if label != EVERY:
            y = torch.full((SAMPLES,), self.names.index(label))
        with torch.no_grad():
            return getattr(self, self.name)(cfg, y, share)

    def vae(self, cfg, _, share):
        model, = self.networks
        z = self.script.sample_prior(model, SAMPLES, cfg.temperature)
        strip = torch.stack([torch.lerp(z[0], z[1], k / (STRIP - 1)) for k in range(STRIP)])
        samples = self.script.descend(model, torch.lerp(z, z.roll(-1, 0), share), cfg.temperature)
        strip = self.script.descend(model, strip, 0.0)  # in a chain of latents, the means of those below the top
        return [self.script.to_uint8(self.script.pixel_mean(params, cfg.likelihood)) for params in (samples, strip)]

    def gan(self, cfg, y, share):
        G = self.networks[0]
        z, y = self.walk(torch.randn(SAMPLES, cfg.z_dim), y, share)
        images = self.script.to_uint8(self.script.sample(G, z, y, cfg.temperature))
        return images[:SAMPLES], images[SAMPLES:]

    def flow(self, cfg, y, share):
        model, = self.networks
        noise = [self.walk(eps, y, share) for eps in self.script.draw_noise(model, SAMPLES)]
        images, _ = self.script.sample(model, [eps for eps, _ in noise], noise[0][1], cfg)
        images = self.script.quantize(images)
        return images[:SAMPLES], images[SAMPLES:]

    def walk(self, noise, y, share):
        """Noise and classes of the samples, each on the way to the next one's noise, then those of the strip."""
        strip = torch.stack([mix(noise[0], noise[1], k / (STRIP - 1)) for k in range(STRIP)])
        return torch.cat([mix(noise, noise.roll(-1, 0), share), strip]), torch.cat([y, y[:1].expand(STRIP)])

    def diffusion(self, cfg, y, share):
        model, = self.networks
        chain = []
        noise = torch.randn(SAMPLES, *self.shape)
        y = y if self.classes else None
        chain.append(self.script.sample(model, noise, y, cfg, before_step=lambda x_t, t: chain.append(x_t)))
        pick = torch.linspace(0, len(chain) - 1, STRIP).round().int().unique().tolist()  # the last one is the sample itself
        strip = torch.stack([chain[i][0] for i in pick])
        return self.script.to_uint8(chain[round(share * (len(chain) - 1))]), self.script.to_uint8(strip)

    def autoregressive(self, cfg, y, share):
        model, = self.networks
        levels, _ = self.script.sample(model, y, torch.rand(SAMPLES, *self.shape), cfg)
        samples = self.script.to_pixels(levels, cfg)
        return drawn(samples, cfg.patch, share), revealed(samples[0], cfg.patch)

    def vqgan(self, cfg, y, share):
        autoencoder, prior = self.networks
        _, H, W = self.shape
        indices = self.script.sample(prior, y, torch.rand(SAMPLES, *prior.grid), cfg)
        samples = self.script.to_uint8(autoencoder.draw(indices)[..., :H, :W])
        return drawn(samples, cfg.downsample, share), revealed(samples[0], cfg.downsample)


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
