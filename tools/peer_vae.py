"""The peer beside vae.py: the VAE of pythae.

  runs/peers/venv/bin/python tools/peer_vae.py --minutes 10           # the environment is that of tools/peers.py

Encoder and decoder are the library's default, a layer of 512 units each; the latent has 16 dimensions, as in its examples
with MNIST. Adam 1e-4 and batch 64 are the defaults of its trainer. Pixels are black or white, drawn anew in each step with
the probability value / 255. The likelihood is its own bound with k = 100 importance samples, computed in batches. Samples
are the means of p(x | z), as those of vae.py.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peer

K = 100  # importance samples


def log_weights(model, x):
    """log p(x, z) / q(z | x) of one z for each image x (B,1,28,28) in {0,1} -> (B,). As in the library's get_nll."""
    code = model.encoder(x)
    mu = code.embedding
    log_var = code.log_covariance
    eps = torch.randn_like(mu)
    z = mu + eps * (log_var / 2).exp()
    x_hat = model.decoder(z)["reconstruction"]
    log_px = -F.binary_cross_entropy(x_hat, x, reduction="none").sum((1, 2, 3))
    return log_px - (z**2).sum(1) / 2 + (log_var + eps**2).sum(1) / 2  # the log(2 pi) of both cancel


def main(argv=None):
    args = peer.arguments(__doc__, "vae", 64).parse_args(argv)
    library = peer.need("pythae.models")
    data = peer.begin(args)
    model = library.VAE(library.VAEConfig(input_dim=(1, 28, 28), latent_dim=16, reconstruction_loss="bce"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        loss = model({"data": peer.binarise(peer.draw(data, args.batch_size))}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def nats(x):
        return -peer.importance_bound(torch.stack([log_weights(model, x) for _ in range(K)]))

    trained = peer.train(step, args)
    model.eval()
    test = peer.binarise(data.test, torch.Generator().manual_seed(0))  # as vae.py binarises it
    peer.finish(args, "pythae", trained, peer.parameters(model),
                lambda n: model.decoder(torch.randn(n, 16))["reconstruction"],
                nats=peer.mean_over(nats, test), kind=f"at most, k = {K}")


if __name__ == "__main__":
    main()
