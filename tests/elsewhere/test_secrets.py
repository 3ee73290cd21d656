"""What a session keeps to itself is in no log, command line, environment or description."""

from __future__ import annotations

import base64
import json
import re

from tests.elsewhere.sites import Site

PROGRAM = """
import glob, json, os, time
import fiber
from fiber.runtime import session

def look(release):
    # What is to be seen of every process in there: the agent, this one, and what started them.
    told = {}
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                told[path] = file.read().decode("latin-1")
        except OSError:
            pass
    print("own", json.dumps(dict(os.environ)), flush=True)
    print("proc", json.dumps(told), flush=True)
    release.get()

if __name__ == "__main__":
    release = fiber.SimpleQueue()
    process = fiber.Process(target=look, args=(release,))
    process.start()
    outside = session.current().outside
    with open("kept.json", "w") as file:
        json.dump([session.secret().hex(), outside.key.decode()], file)
    deadline = time.monotonic() + 60
    while not os.path.exists("described") and time.monotonic() < deadline:
        time.sleep(0.05)
    release.put(None)
    process.join()
    print("exit code", process.exitcode)
"""


def forms(secret: bytes, key: str) -> list[str]:
    """Return how the secret and the key would look in a text."""
    lines = [line for line in key.splitlines() if line and "-----" not in line]
    return [
        secret.hex()[:32],
        base64.b64encode(secret).decode()[:20],
        base64.urlsafe_b64encode(secret).decode()[:20],
        repr(secret[:16])[2:-1],
        secret[:16].decode("latin-1"),
        json.dumps(secret[:16].decode("latin-1"))[1:-1],
        *(line[:40] for line in lines),
    ]


def test_what_a_session_keeps_to_itself_is_nowhere_to_be_seen(site: Site) -> None:
    program = site.start(PROGRAM, env={"FIBER_LOG_LEVEL": "debug"})
    program.wait_for("proc ")
    described = site.describe()
    (site.folder / "described").touch()
    assert program.end() == 0, program.all()
    assert "exit code 0" in program.out

    secret, key = json.loads((site.folder / "kept.json").read_text())
    kept = forms(bytes.fromhex(secret), key)
    [own] = [line for line in program.lines if line.startswith("own ")]
    [proc] = [line for line in program.lines if line.startswith("proc ")]
    seen = json.loads(proc.removeprefix("proc "))
    assert len(seen) >= 4, "agent and process were expected"
    told = {
        "environment": own,
        "processes": "\n".join(seen.values()),
        "log": program.err,
        "description": described,
    }
    for where, text in told.items():
        assert text
        assert not [form for form in kept if form in text], f"in the {where}"

    # The number that a job shows to be told from others is no secret: it is worth nothing without
    # the secret, and used once. Still it has no business in a log, or with the user's own code.
    tokens = set(
        re.findall(r"FIBER_INTERNAL_TOKEN\W{1,12}(?:value\W{1,5})?([0-9a-f]{32})", described)
    )
    assert tokens, described
    for token in tokens:
        assert token not in program.err
        assert token not in own
    internal = {name for name in json.loads(own.removeprefix("own ")) if "FIBER_INTERNAL" in name}
    assert internal <= {
        "FIBER_INTERNAL_FAREWELL",
        "FIBER_INTERNAL_NAMESPACE",
        "FIBER_INTERNAL_POD",
        "FIBER_INTERNAL_SECRET_NAME",
        "FIBER_INTERNAL_THREAD_VARIABLES",
    }
    assert not re.search("WARNING.*refused", program.err)
