"""tqdm counts a pool's results, and its process_map takes a context."""

import io

from tqdm.auto import tqdm
from tqdm.contrib.concurrent import process_map

import fiber


def square(x):
    return x * x


def noisy_square(x):
    tqdm.write(f"item {x}")
    return x * x


if __name__ == "__main__":
    bar = io.StringIO()
    with fiber.Pool(2) as pool:
        total = sum(tqdm(pool.imap(square, range(500)), total=500, file=bar))
    print("imap:", total, "500/500" in bar.getvalue())

    bar = io.StringIO()
    context = fiber.get_context("spawn")
    tqdm.set_lock(context.RLock())
    squares = process_map(noisy_square, range(20), mp_context=context, max_workers=2, file=bar)
    print("process_map:", sum(squares), "20/20" in bar.getvalue())
