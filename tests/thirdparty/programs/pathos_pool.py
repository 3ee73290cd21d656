"""pathos' ProcessPool with Fiber's pool under it."""

import pathos.multiprocessing

import fiber

pathos.multiprocessing.Pool = fiber.Pool


def scaled(x, y):
    return x * y


if __name__ == "__main__":
    pool = pathos.multiprocessing.ProcessPool(2)
    print("map:", pool.map(scaled, [1, 2, 3], [4, 5, 6]))
    print("imap:", list(pool.imap(scaled, range(5), range(5))))
    print("uimap:", sorted(pool.uimap(scaled, range(5), range(5))))
    print("amap:", pool.amap(scaled, range(5), range(5)).get(30))
    print("pipe:", pool.pipe(scaled, 6, 7))
    pool.close()
    pool.join()
    pool.clear()
