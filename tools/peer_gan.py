"""The peer beside gan.py: the DCGAN of torchgan.

  runs/peers/venv/bin/python tools/peer_gan.py --minutes 10           # the environment is that of tools/peers.py

Generator and discriminator have the sizes of the library's defaults, its minimax losses (the generator's is the
non-saturating one), and the settings of its DCGAN example: Adam 2e-4 with beta (0.5, 0.999), batch 64. Images are padded
to 32 x 32 with zeros.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peer

UNUSED = ("torchvision", "torchvision.models", "torchvision.models.inception", "torchvision.utils")  # of its Trainer


def main(argv=None):
    args = peer.arguments(__doc__, "gan", 64).parse_args(argv)
    peer.stub(*UNUSED)
    models = peer.need("torchgan.models")
    losses = peer.need("torchgan.losses")
    data = peer.begin(args)
    G = models.DCGANGenerator(out_channels=1)
    D = models.DCGANDiscriminator(in_channels=1)
    optimizer_g = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    loss_g = losses.MinimaxGeneratorLoss()
    loss_d = losses.MinimaxDiscriminatorLoss()

    def step():
        x = peer.pad(peer.draw(data, args.batch_size)).float() / 127.5 - 1  # [-1,1]
        loss_d.train_ops(G, D, optimizer_d, x, "cpu")
        loss_g.train_ops(G, D, optimizer_g, "cpu", len(x))

    trained = peer.train(step, args)
    G.eval()
    peer.finish(args, "torchgan", trained, peer.parameters(G, D),
                lambda n: peer.crop(G(torch.randn(n, G.encoding_dims))) / 2 + 0.5)


if __name__ == "__main__":
    main()
