"""Times Fiber and its peers in turn, in the same run, and writes `RESULTS.md`.

    __main__      the command line                 against.py  the same, with an older commit
       │ rows/: what is measured, and how it is printed  │
       ▼                                                 ▼
    harness.py    rounds; the peers in turn; one fresh process with a deadline for each measurement
       │ argv                                 ▲ JSON lines
       ▼                                      │
    child.py ──► measure.py, objects.py, ... ──► peers.py ──► tasks.py (what the workers run)

    report.py     results.json ──► RESULTS.md, with the pictures of plots.py
    soak.py       watches load.py for half an hour ──► SOAK.md
    crowd.py      simulated workers, thousands of them
    startup.py    the start of pools on Docker, Kubernetes and Slurm

The child's side (child, measure, objects, peers, tasks) imports as little as it can: a module that
is loaded already would be a gift to the peer whose start is timed.
"""
