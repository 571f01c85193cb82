"""The peer beside autoregressive.py: the decoder of x-transformers, one token for each pixel.

  runs/peers/venv/bin/python tools/peer_autoregressive.py --minutes 10    # the environment is that of tools/peers.py

Its AutoregressiveWrapper around TransformerWrapper(Decoder(dim=128, depth=4, heads=4, attn_flash=True)): our width, depth and
heads with PyTorch's fused attention, the rest its defaults. Adam 1e-4, batch 4 and clipping at 0.5 are those of its example
of characters (enwik8). Pixels are black or white, drawn anew in each step with the probability value / 255. A sequence is a
start token and 784 pixels; the likelihood is exact. --head-dim 32 makes the attention as wide as ours; --no-flash takes the
library's default attention.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peer

START = 2  # the token before the first pixel; pixels are 0 and 1


def main(argv=None):
    parser = peer.arguments(__doc__, "autoregressive", 4)
    parser.add_argument("--head-dim", type=int, default=64, help="channels of an attention head [64]")
    parser.add_argument("--flash", action=argparse.BooleanOptionalAction, default=True, help="fused attention [yes]")
    args = parser.parse_args(argv)
    library = peer.need("x_transformers")
    data = peer.begin(args)
    decoder = library.Decoder(dim=128, depth=4, heads=4, attn_dim_head=args.head_dim, attn_flash=args.flash)
    model = library.AutoregressiveWrapper(library.TransformerWrapper(num_tokens=3, max_seq_len=785, attn_layers=decoder))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def tokens(x):  # (B,1,28,28) in {0,1} -> (B,785)
        start = torch.full((len(x), 1), START)
        return torch.cat([start, x.flatten(1).long()], 1)

    def step():
        loss = model(tokens(peer.binarise(peer.draw(data, args.batch_size))))  # the mean over pixels
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    def nats(x):
        return 784 * model(tokens(x)).repeat(len(x))

    def sample(n):  # the filter of its generate would take the likelier pixel only
        drawn = model.generate(torch.full((n, 1), START), 784, filter_logits_fn=lambda logits: logits)
        return drawn.clamp(max=1).view(n, 1, 28, 28).float()

    trained = peer.train(step, args)
    model.eval()
    test = peer.binarise(data.test, torch.Generator().manual_seed(0))  # as autoregressive.py binarises it
    peer.finish(args, "x-transformers", trained, peer.parameters(model), sample,
                nats=peer.mean_over(nats, test), kind="exact")


if __name__ == "__main__":
    main()
