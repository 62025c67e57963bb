"""A small U-Net on the CPU: trained on one patient, Dice on another one whom it never saw; goes on after any kill.

    python examples/unet_torch.py               # the real studies under SCANFEED_DATA, else synthetic ones
    python examples/unet_torch.py --resume      # goes on behind the last checkpoint
    python examples/unet_torch.py --ranks 2     # two processes; as: torchrun --nproc-per-node 2 examples/unet_torch.py

A checkpoint holds model, optimizer and `feed.state_dict()`. A training that was killed and resumed has the loss curve of one that was
not, to the last bit: the feed gives the same batches, and one thread with deterministic algorithms computes the same from them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from studies import SCRATCH, catalog, own_catalog, studies, within
from torch import Tensor, nn
from torch.nn import functional

import loaderd

FED = {"structures": ["inner"], "size": (128, 128), "fit": "crop", "channels": "first"}  # px of the middle, where the heart is
CHANGES = [  # one patient is few
    {"name": "rotate", "limit": 180, "fill": "reflect"}, {"name": "scale", "limit": (-0.2, 0.33)}, {"name": "shift", "limit": 0.06},
    {"name": "flip", "p": 0.5}, {"name": "gamma", "limit": (-0.4, 0.6)},
]  # fmt: skip
SCALED = {"name": "zscore"}
BATCH = 4  # samples, of all ranks together
SAVE_EVERY = 10  # steps
LEARNING_RATE = 0.01  # at the beginning; it falls to 0


def main() -> None:
    """Ingest, split, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24, help="in all, those before a resume included")
    parser.add_argument("--resume", action="store_true", help="go on behind the checkpoint; with the same --ranks, as they share a batch")
    parser.add_argument("--checkpoint", type=Path, default=SCRATCH / "unet.pt")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the batches; torchrun starts them")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.checkpoint.exists():
        parser.error(f"--resume: there is no checkpoint {arguments.checkpoint} yet; leave --resume out to begin")
    own_catalog("unet")
    if arguments.ranks > 1 and "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
        os.execv(sys.executable, [*torchrun, __file__, *sys.argv[1:]])
    begin()
    if rank() == 0:
        prepare()
    if dist.is_initialized():
        dist.barrier()
    train(arguments.epochs, arguments.checkpoint, resume=arguments.resume)
    if dist.is_initialized():
        dist.destroy_process_group()


def begin() -> None:
    """Have PyTorch compute the same every time, and find the other ranks, if torchrun started this."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")


def train(epochs: int, checkpoint: Path, *, resume: bool) -> list[float]:
    """Train up to `epochs` epochs; returns the loss of every step."""
    torch.manual_seed(0)
    model = UNet()
    trained: nn.Module = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    run: list[Any] = [None]  # alone a name is made up
    state = None
    if resume:
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses, state = saved["losses"], saved["feed"]
    elif dist.is_initialized():
        run = [f"unet-{time.time_ns()}"]
        dist.broadcast_object_list(run)  # all ranks have the same
    begun = time.monotonic()
    with (
        loaderd.Feed(
            **FED, split="unet/train", transforms=[*CHANGES, SCALED], batch_size=BATCH // ranks(), seed=7, run=run[0], resume=state
        ) as feed,
        # Every rank sees all of it.
        loaderd.Feed(**FED, split="unet/val", transforms=[SCALED], shuffle=False, rank=0, num_ranks=1) as validation,
    ):
        batches = feed.torch()
        for epoch in range(feed.next_epoch, epochs):
            for images, masks in batches:
                step = len(losses)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - step / (epochs * len(feed)))
                loss = loss_of(trained(images), masks[:, None])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(mean_of_ranks(loss.detach()))
                if len(losses) % SAVE_EVERY == 0 and rank() == 0:
                    state = feed.state_dict()  # behind the batch just trained on, and the same on all ranks
                    save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "feed": state})
            if rank() == 0:
                dice = held_out_dice(model, validation)
                say(f"epoch {epoch:2}: loss {losses[-1]:.3f}, Dice on the held-out patient {dice:.3f}, {time.monotonic() - begun:.0f} s")
    return losses


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(checkpoint, new)
    new.replace(path)


class UNet(nn.Module):
    """Four levels, the first at half the images' resolution: (B, 1, rows, columns) to logits of that shape."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList([block(before, after) for before, after in zip([1, *widths], widths, strict=False)])
        self.up = nn.ModuleList([block(3 * after, after) for after in widths[-2::-1]])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(x, 2)
        kept = []
        for number, level in enumerate(self.down):
            x = level(functional.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for level, skipped in zip(self.up, kept[-2::-1], strict=True):
            x = level(torch.cat([enlarged(x, 2, "nearest"), skipped], 1))
        return enlarged(self.last(x), 2, "bilinear")


def block(before: int, after: int) -> nn.Module:
    """Two convolutions, normalised without looking at the other samples of the batch."""
    layers = [[nn.Conv2d(n, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU()] for n in (before, after)]
    return nn.Sequential(*layers[0], *layers[1])


def enlarged(x: Tensor, factor: int, mode: str) -> Tensor:
    """Return it at `factor` times the resolution."""
    return functional.interpolate(x, scale_factor=float(factor), mode=mode)


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Return 1 - Dice, of the probabilities."""
    p = logits.sigmoid()
    dice = (2 * (p * masks).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + masks.sum((1, 2, 3)) + 1)
    return 1 - dice.mean()


def held_out_dice(model: nn.Module, validation: loaderd.Feed) -> float:
    """Return the mean over images of 2 |A ∩ B| / (|A| + |B|), at full resolution."""
    found: list[Tensor] = []
    with torch.no_grad():
        for images, masks in validation.torch():
            predicted, drawn = model(images) > 0, masks[:, None]
            found.extend(2 * (predicted & drawn).sum((1, 2, 3)) / (predicted.sum((1, 2, 3)) + drawn.sum((1, 2, 3))))
    return float(torch.stack(found).mean())


def prepare() -> None:
    """Ingest the studies and give each patient a side: the last one is held out."""
    folder = studies()
    say(f"studies in {folder}; catalog in {os.environ['CATALOG_HOME']}")
    catalog("ingest", str(folder))
    if len(catalog("sql", "--csv", "SELECT name FROM split WHERE name = 'unet'").splitlines()) > 1:
        return
    query = f"SELECT DISTINCT patient FROM sample WHERE structure = 'inner' AND {within(folder)} ORDER BY 1"
    patients = catalog("sql", "--csv", query).splitlines()[1:]
    SCRATCH.mkdir(exist_ok=True)
    split = SCRATCH / "split.csv"
    split.write_text("patient,part\n" + "".join(f"{name},{'val' if name == patients[-1] else 'train'}\n" for name in patients))
    catalog("split", "import", "unet", str(split))


def mean_of_ranks(loss: Tensor) -> float:
    """Return the mean of all ranks' losses."""
    if dist.is_initialized():
        dist.all_reduce(loss)
    return loss.item() / ranks()


def rank() -> int:
    """Return which process this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
