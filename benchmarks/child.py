"""One measurement in a process of its own: `python child.py ROW CASE PEER SECONDS FILE`.

It appends a line of JSON to FILE for each figure, as soon as it is there. It is run as a script and
not with `-m`, as a user's program would be, and as a script it is the main module that spawning
peers import again in their workers.
"""

from __future__ import annotations

import sys


def main(row: str, case: str, peer: str, seconds: str, path: str) -> None:
    from benchmarks import measure, peers

    adapter = None if peer == "floor" else peers.load(peer)
    for metric, value in measure.find(row)(case, adapter, float(seconds)):
        import json  # late: a peer that needs it pays for it itself

        with open(path, "a") as file:
            file.write(json.dumps({"metric": metric, "value": value}) + "\n")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder; the harness sets PYTHONPATH to the one above
    main(*sys.argv[1:])
