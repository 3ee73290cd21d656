"""What a job runs first: it gets Fiber from its master, or says in a sentence why it cannot."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import marshal
import shutil
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from tests.code.conftest import Job, Master, other_python

import fiber
from fiber.code import bootstrap, bundle, protocol
from fiber.code.project import Project
from fiber.runtime import endpoint
from fiber.wire import auth, framing, tls

REPORT = """
import json, os, sys
def main(sock):
    import fiber, cloudpickle
    print(json.dumps({
        "fiber": fiber.__file__,
        "pool": fiber.Pool.__module__,
        "cloudpickle": cloudpickle.__version__,
        "peer": sock.getpeername()[1],
        "timeout": sock.gettimeout(),
        "master": os.environ["FIBER_INTERNAL_MASTER"],
        "modules": sorted(name for name in sys.modules if name.startswith("fiber")),
    }))
"""


def impatient(text: str) -> str:
    """Wait for a master no longer than a test can."""
    assert "PATIENCE = 30.0" in text
    return text.replace("PATIENCE = 30.0", "PATIENCE = 0.5")


def test_a_bare_python_gets_all_of_fiber(job: Job, master: Master) -> None:
    done = job(REPORT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fiber"] == fiber.__file__  # as at home, though it has no such file
    assert report["pool"] == "fiber.pool"
    assert report["cloudpickle"] == cloudpickle.__version__
    assert master.address.endswith(f":{report['peer']}")
    assert report["timeout"] is None
    assert master.hellos == [{"service": "code"}]
    assert [kind for kind, _ in master.asked] == [protocol.BUNDLE]
    assert done.stderr == ""


def test_a_python_of_another_magic_compiles_for_itself(job: Job) -> None:
    asks = "importlib.util.MAGIC_NUMBER"
    done = job(REPORT, edit=lambda text: text.replace(asks, "b'none'"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pool"] == "fiber.pool"


def test_what_an_agent_needs_can_be_imported(job: Job) -> None:
    done = job("def main(sock):\n    import fiber.runtime.agent, fiber.pool.worker, fiber.managers")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with the Fiber that is tested, its `elsewhere` a stand-in."""
    folder = tmp_path / "image"
    for package in (fiber, cloudpickle):
        root = Path(str(package.__file__)).parent
        shutil.copytree(root, folder / root.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fiber/runtime/elsewhere.py").write_text(REPORT)
    return folder


def content_hash_of(image: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the hash that the text computes where `image` is what is installed."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(image)])
        patch.delitem(sys.modules, "fiber")
        patch.delitem(sys.modules, "cloudpickle")
        return bootstrap.installed()


def test_the_installed_fiber_is_used_if_it_is_the_same(
    job: Job, master: Master, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = content_hash_of(image, monkeypatch)
    environment = {"PYTHONPATH": str(image), "FIBER_INTERNAL_CODE": wanted}
    done = job(None, environment, flags=("-S",))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fiber"] == str(image / "fiber/__init__.py")
    assert master.asked == []


@pytest.mark.parametrize("changed", ["fiber/wire/auth.py", "cloudpickle/__init__.py"])
def test_another_version_in_the_image_is_hidden(
    changed: str, job: Job, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = content_hash_of(image, monkeypatch)
    with open(image / changed, "a") as file:
        file.write("\n# another\n")
    (image / "fiber/of_the_image.py").write_text("")
    leaks = REPORT.replace("print(", "import importlib.util as u\n    print(", 1).replace(
        '"fiber":', '"leak": u.find_spec("fiber.of_the_image") is not None, "fiber":'
    )
    environment = {"PYTHONPATH": str(image), "FIBER_INTERNAL_CODE": wanted}
    done = job(leaks, environment, flags=("-S",))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fiber"] == fiber.__file__
    assert not report["leak"]


def test_a_fiber_that_was_imported_before_makes_way(job: Job, image: Path) -> None:
    def import_first(text: str) -> str:
        return text.replace("import hashlib", "import fiber\nimport hashlib", 1)

    done = job(REPORT, {"PYTHONPATH": str(image)}, flags=("-S",), edit=import_first)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fiber"] == fiber.__file__


def test_the_hash_is_the_same_on_both_sides(image: Path) -> None:
    program = (
        "from fiber.code import bootstrap, bundle\n"
        "assert bootstrap.PACKAGES == bundle.PACKAGES\n"
        "print(bootstrap.installed(), bundle.content_hash())\n"
    )
    environment = {"PYTHONPATH": str(image)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], env=environment, stdout=subprocess.PIPE, check=True
    )
    text, master = done.stdout.split()
    assert text == master


def test_what_is_repeated_agrees_with_the_wire() -> None:
    assert bootstrap.MAGIC == auth.MAGIC
    assert bootstrap.VERSION == auth.VERSION
    assert endpoint.HELLO == bootstrap.HELLO
    assert protocol.BUNDLE == bootstrap.BUNDLE
    assert protocol.REFUSED == bootstrap.REFUSED
    assert bootstrap.OPTIONS == tls._OPTIONS
    ours, theirs = socket.socketpair()
    with ours, theirs:
        bootstrap.send(ours, 101, b"question")
        assert framing.FrameReader(theirs).read() == [framing.Frame(101, b"question", ())]
        theirs.sendall(b"".join(map(bytes, framing.encode(102, b"answer"))))
        assert bootstrap.read(ours) == (102, b"answer")


def test_it_trusts_as_the_wire_does() -> None:
    certificate, _ = tls.make_certificate()
    ours, theirs = bootstrap.trust(certificate.decode()), tls.client_context(certificate)
    for name in ("minimum_version", "check_hostname", "verify_mode", "verify_flags"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.verify_mode == ssl.CERT_REQUIRED


# Addresses --------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that refuses connections: bound, so that nobody else takes it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def test_the_address_that_works_comes_first(job: Job, master: Master, nobody: str) -> None:
    done = job(REPORT, {"FIBER_INTERNAL_MASTER": f"{nobody} {master.address} [::1]:9"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["master"] == f"{master.address} {nobody} [::1]:9"


def test_addresses_of_ipv6_stand_in_brackets(job: Job, master: Master) -> None:
    other = Master(Project(), "::1")
    try:
        other.secret, other.context = master.secret, master.context
        done = job(None, {"FIBER_INTERNAL_MASTER": other.address}, edit=until_connected)
    finally:
        other.close()
    assert done.returncode == 0, done.stderr
    assert other.hellos == [{"service": "code"}]


def until_connected(text: str) -> str:
    """End as soon as the hello is sent."""
    wanted = "if installed() != wanted:"
    assert wanted in text
    return text.replace(wanted, "import time; sock.close(); sys.exit(0)\n        " + wanted)


def test_a_master_that_comes_late_is_waited_for(job: Job, master: Master) -> None:
    dropped = []

    def drop_the_first(greeting: bytes) -> bytes:
        if len(dropped) < 2:
            dropped.append(1)
            raise OSError
        return greeting

    master.greeting = drop_the_first
    done = job(REPORT)
    assert done.returncode == 0, done.stderr
    assert len(dropped) == 2


def test_unreachable_addresses_are_named_with_their_reasons(job: Job, nobody: str) -> None:
    addresses = f"{nobody} no-such-host.invalid:1 nonsense"
    done = job(None, {"FIBER_INTERNAL_MASTER": addresses}, edit=impatient)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fiber: this job cannot reach its master; tried ")
    assert f"{nobody} (connection refused)" in done.stderr
    assert "no-such-host.invalid:1 (" in done.stderr
    assert "nonsense (that is not HOST:PORT)" in done.stderr


def test_a_wrong_secret_is_told(job: Job, master: Master, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"of another session")
    done = job(REPORT)
    assert done.returncode == 1
    assert f"{master.address} (it refused the secret that this job was given)" in done.stderr
    assert master.hellos == []


def test_a_wrong_certificate_is_told(job: Job, master: Master) -> None:
    certificate, _ = tls.make_certificate()
    done = job(REPORT, {"FIBER_INTERNAL_CERTIFICATE": certificate.decode()})
    assert done.returncode == 1
    reason = f"{master.address} (it shows another certificate than this session's)"
    assert reason in done.stderr
    assert master.hellos == []


def test_a_listener_without_the_secret_gets_nothing(job: Job, master: Master) -> None:
    master.greeting = lambda greeting: b"HTTP/1.1 400 Bad Request\r\n".ljust(44)
    done = job(REPORT)
    assert done.returncode == 1
    assert f"{master.address} (it does not speak Fiber's protocol)" in done.stderr
    assert master.hellos == []


def test_who_does_not_prove_itself_is_left(job: Job, master: Master) -> None:
    # It knows the caller's proof to be right or not to matter, and cannot make its own.
    class Impostor(auth.ListenerHandshake):
        def feed(self, data: bytes) -> bytes | None:
            return None if super().feed(data) is None else bytes(32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.code.conftest.ListenerHandshake", Impostor)
        done = job(REPORT)
    assert done.returncode == 1
    assert f"{master.address} (it does not know this session's secret)" in done.stderr
    assert master.hellos == []


OTHERS = {"3.8", "3.10", "3.11", "3.12", "3.13"} - {"{}.{}".format(*sys.version_info)}


@pytest.mark.parametrize("version", sorted(OTHERS))
def test_another_version_of_python_is_told(job: Job, version: str) -> None:
    python = other_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    done = job(REPORT, python=python)
    ours = "{}.{}".format(*sys.version_info)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fiber: this job has Python {version}, the master {ours}: ")
    assert done.stderr.count("\n") == 1


def test_what_is_missing_in_the_environment_is_told(job: Job) -> None:
    done = job(None, {"FIBER_INTERNAL_SECRET_FILE": "/nonexistent/secret"})
    assert done.returncode == 1
    assert (
        "secret cannot be read from /nonexistent/secret: No such file or directory." in done.stderr
    )
    done = job(None, {"FIBER_INTERNAL_CERTIFICATE": "nonsense"})
    assert done.returncode == 1
    assert "FIBER_INTERNAL_CERTIFICATE holds no certificate" in done.stderr


def test_the_text_holds_no_words_for_readers_only() -> None:
    text = bootstrap.text()
    assert len(text) < 12_000
    assert '"""' not in text
    assert "#" not in text
    compile(text, "text", "exec")


def test_a_traceback_through_fiber_shows_its_lines(job: Job, master: Master) -> None:
    master.away = True
    done = job(
        "def main(sock):\n"
        "    from fiber.wire.framing import encode\n"
        "    encode(1, b'', [b''] * ((1 << 20) + 1))\n"
    )
    assert done.returncode == 1
    assert 'File "/nowhere/' in done.stderr
    assert 'raise ValueError(f"a frame holds at most {MAX_BUFFERS} buffers' in done.stderr


def test_a_job_passes_on_what_it_got(job: Job, master: Master) -> None:
    done = job(
        "def main(sock):\n"
        "    import importlib.util, hashlib\n"
        "    from fiber.code import bootstrap, bundle\n"
        "    data = bundle.bundle(importlib.util.MAGIC_NUMBER)\n"
        "    print(bundle.content_hash(), hashlib.sha256(bootstrap.text().encode()).hexdigest())\n"
    )
    assert done.returncode == 0, done.stderr
    text = hashlib.sha256(bootstrap.text().encode()).hexdigest()
    assert done.stdout.split() == [bundle.content_hash(), text]


def test_code_goes_along_where_the_magic_is_the_same() -> None:
    for magic in (importlib.util.MAGIC_NUMBER, b"none"):
        modules = marshal.loads(zlib.decompress(bundle.bundle(magic)))
        assert {"fiber", "fiber.runtime.agent", "fiber.code.finder", "cloudpickle"} <= set(modules)
        assert (modules["fiber.pool.worker"][3] is not None) == (magic != b"none")
        assert all(source is not None for _, _, source, _ in modules.values())
