"""Frames, series and arrays travel to a pool and back as they were, and may be written to there."""

import numpy as np
import pandas as pd

import fiber


def summarize(group):
    key, frame = group
    frame["share"] = frame["value"] / frame["value"].sum()
    return frame.assign(key=key)


def doubled(array):
    array *= 2
    return array


if __name__ == "__main__":
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "key": pd.Categorical(random.choice(["north", "south", "west"], 30_000)),
            "value": random.random(30_000),
            "name": [f"row {i}" for i in range(30_000)],
            "day": pd.date_range("2020-01-01", periods=30_000, freq="min", tz="UTC"),
        }
    )
    arrays = [random.random((500, i + 1)) for i in range(6)]
    with fiber.Pool(2) as pool:
        groups = [(key, group.copy()) for key, group in frame.groupby("key", observed=True)]
        together = pd.concat(pool.map(summarize, groups))
        results = pool.map(doubled, arrays)
    alone = pd.concat([summarize((key, group.copy())) for key, group in groups])
    pd.testing.assert_frame_equal(together, alone)
    print("rows:", len(together), "shares:", *together.groupby("key")["share"].sum().round(6))
    print("arrays:", all(np.array_equal(r, 2 * a) for r, a in zip(results, arrays, strict=True)))
    results[0] += 1  # a result is the caller's own
