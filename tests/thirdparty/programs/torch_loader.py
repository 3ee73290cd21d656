"""PyTorch's DataLoader loads in processes of Fiber.

usage: torch_loader.py map | stream | error | killed
"""

import os
import signal
import sys

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import fiber

context = fiber.get_context("spawn")


class Squares(Dataset):
    """Tensors, some of them large, and arrays and strings beside them."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        return {
            "square": torch.tensor(i * i),
            "image": torch.full((3, 100, 100), float(i)),
            "name": f"item {i}",
            "pid": os.getpid(),
        }


class Count(IterableDataset):
    """Each worker counts its own part."""

    def __iter__(self):
        info = get_worker_info()
        return iter(range(info.id, 100, info.num_workers))


class Broken(Squares):
    def __getitem__(self, i):
        raise ValueError(f"item {i} is broken")


class Deadly(Squares):
    def __getitem__(self, i):
        if i == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return i  # no tensor, which could not be received once its sender is gone


def load_map():
    dataset = Squares()
    for epochs, persistent in ((1, False), (2, True)):
        loader = DataLoader(
            dataset,
            batch_size=8,
            shuffle=True,
            num_workers=2,
            multiprocessing_context=context,
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(0),
        )
        for epoch in range(epochs):
            batches = list(loader)
            squares = torch.cat([batch["square"] for batch in batches])
            images = torch.cat([batch["image"] for batch in batches])
            names = [name for batch in batches for name in batch["name"]]
            pids = {int(pid) for batch in batches for pid in batch["pid"]}
            right = images.mean((1, 2, 3)).square().eq(squares).all().item()
            print(
                f"epoch {epoch}:",
                squares.sum().item(),
                right,
                sorted(names) == sorted(f"item {i}" for i in range(60)),
                squares.sort()[0].ne(squares).any().item(),
                len(pids - {os.getpid()}),
            )
            images += 1  # what was loaded is the caller's own
        del loader


def load_stream():
    loader = DataLoader(Count(), batch_size=5, num_workers=2, multiprocessing_context=context)
    print("stream:", sorted(torch.cat(list(loader)).tolist()) == list(range(100)))


def load_error():
    loader = DataLoader(Broken(), num_workers=1, multiprocessing_context=context)
    try:
        list(loader)
    except ValueError as error:
        print("raised:", str(error).strip().splitlines()[-1])


def load_killed():
    loader = DataLoader(Deadly(), num_workers=2, multiprocessing_context=context, collate_fn=list)
    try:
        list(loader)
    except RuntimeError as error:
        print("killed:", error)


if __name__ == "__main__":
    globals()[f"load_{sys.argv[1]}"]()
