"""Trains a network that reads handwritten digits on a ring of processes, with torch.distributed.

Every member has the same network and takes its share of each batch. They sum their gradients, so
that all make the same step, as one process with the whole batch would:

    batch ─┬─► share of rank 0 ─► gradients ─┐
           ├─► share of rank 1 ─► gradients ─┼─► all_reduce ─► the same step everywhere
           └─► …                             ┘

The ring tells its members where to meet; what they say there is PyTorch's own (gloo, on CPUs).

    python examples/ring_torch.py --processes 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fiber

BATCH = 64  # digits in a step, over all members


def meet(ring: Any) -> None:
    """Prepare a member: join the process group at the ring's address."""
    host, port = ring.address
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=ring.rank, world_size=ring.size
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with, and those kept for the test; they come with scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        torch.tensor(images / 16, dtype=torch.float32),
        torch.tensor(labels),
        test_size=0.25,
        random_state=0,
        stratify=labels,
    )
    return train_images, train_labels, test_images, test_labels


def sum_gradients(model: nn.Module) -> None:
    """Replace the gradients of this member by the sum over all members, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def train(epochs: int, seed: int, rank: int, size: int) -> None:
    """What each member does; the ring adds the last two arguments."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)  # the same network and the same batches for all
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    started = time.perf_counter()

    for epoch in range(1, epochs + 1):
        total = torch.zeros(())
        for batch in torch.randperm(len(images)).split(BATCH):
            share = batch[rank::size]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[share]), labels[share], reduction="sum")
            (loss / len(batch)).backward()
            sum_gradients(model)
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            accuracy = model(test_images).argmax(1).eq(test_labels).float().mean()
            print(
                f"epoch {epoch:3}   loss {total / len(images):.4f}   test accuracy {accuracy:.4f}",
                flush=True,
            )

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    furthest = weights.clone()
    dist.all_reduce(furthest, dist.ReduceOp.MAX)
    if not torch.equal(weights, furthest):
        raise SystemExit(f"Member {rank} has other weights than the rest.")
    if rank == 0:
        rate = epochs * len(images) / (time.perf_counter() - started)
        print(f"Every member of {size} has the same network; {rate:.0f} digits/s.")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, help="members (default: one for each CPU)")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same network")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1.")

    work = partial(train, options.epochs, options.seed)
    fiber.Ring(options.processes or fiber.cpu_count(), work, initializer=meet).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
