"""Times Fiber and its peers in turn, in the same run, and writes `RESULTS.md`.

    __main__      the command line
       │ rows.py: what is measured, and how it is printed
       ▼
    harness.py    rounds; the peers in turn; one fresh process with a deadline for each measurement
       │ argv                                 ▲ JSON lines
       ▼                                      │
    child.py ──► measure.py ──► peers.py ──► tasks.py (what the peers' workers run)
             └─► objects.py ──┘

    report.py     results.json ──► RESULTS.md

The child's side (child, measure, objects, peers, tasks) imports as little as it can: a module that
is loaded already would be a gift to the peer whose start is timed.
"""
