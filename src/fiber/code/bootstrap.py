"""What a job runs first, on a Python that has nothing of Fiber: it gets Fiber from the master.

    python -c TEXT ─► connect ─► TLS, handshake, hello ─► is the same Fiber installed?
                                                                  └─ no ─► BUNDLE ─► import hook
    fiber.runtime.elsewhere.main(sock) ◄────────────── yes ─┴───────────────────────────┘

It is sent as text, so it stands alone: what `wire.auth` and `wire.framing` do for a caller is here
once more, in a few lines, and a test holds both against each other. What it prints is what a user
sees in the log of a container that does not get any further.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import linecache
import marshal
import os
import pickle
import socket
import ssl
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

__all__ = ["text"]

PATIENCE = 30.0  # seconds in which one of the addresses must answer
CONNECT = 3.0  # seconds for each
HANDSHAKE = 5.0  # seconds for each answer: a master may have hundreds to greet at once
REFUSALS = 5  # a master in a rush drops some that wait, but hardly the same one so often
PACKAGES = ("cloudpickle", "fiber")
MAGIC = b"\xf1fiber\r\n"
VERSION = 1
HELLO, BUNDLE, REFUSED = 1, 101, 103  # kinds of frames
OPTIONS = {  # as `wire.tls` has them
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
}


class Hopeless(Exception):
    """Another attempt at this address would end the same."""


class Refused(Exception):
    """The listener closed the connection when it had our proof."""


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise ConnectionResetError("it closed the connection")
        data += piece
    return bytes(data)


def send(sock: socket.socket, kind: int, body: bytes) -> None:
    sock.sendall(struct.pack("!BxxxIQ", kind, 0, len(body)) + body)


def read(sock: socket.socket) -> tuple[int, bytes]:
    kind, _, size = struct.unpack("!BxxxIQ", receive(sock, 16))
    return kind, receive(sock, size)


def prove(sock: socket.socket, secret: bytes) -> None:
    """Do the caller's side of the handshake."""
    greeting = receive(sock, 44)
    magic, version, *python = struct.unpack("!8sHBB32x", greeting)
    if magic != MAGIC:
        raise Hopeless("it does not speak Fiber's protocol")
    if version != VERSION:
        raise Hopeless(f"it speaks version {version} of Fiber's protocol and not {VERSION}")
    ours, theirs = "{}.{}".format(*sys.version_info), "{}.{}".format(*python)
    if ours != theirs:
        sys.exit(
            f"fiber: this job has Python {ours}, the master {theirs}: code does not pass between "
            f"the two, so take an image (on Slurm, slurm_python) with Python {theirs} or run the "
            f"program with {ours}."
        )
    hello = struct.pack("!8sHBB32s", MAGIC, VERSION, *python, os.urandom(32))
    both = greeting + hello
    try:
        sock.sendall(hello + hmac.digest(secret, b"caller" + both, "sha256"))
        proof = receive(sock, 32)
    except ConnectionError as error:
        raise Refused from error
    if not hmac.compare_digest(proof, hmac.digest(secret, b"listener" + both, "sha256")):
        raise Hopeless("it does not know this session's secret")


def trust(certificate: str) -> ssl.SSLContext:
    """Return what trusts this certificate and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0x80000)
    context.load_verify_locations(cadata=certificate)
    return context


def connect(address: str, context: ssl.SSLContext, secret: bytes) -> socket.socket:
    """Return the socket of a connection to the master, proved on both sides."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), CONNECT)
    try:
        sock.settimeout(HANDSHAKE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in OPTIONS.items():
            if hasattr(socket, name):
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
                except OSError:
                    pass
        try:
            sock = context.wrap_socket(sock)
        except ssl.SSLCertVerificationError as error:
            raise Hopeless("it shows another certificate than this session's") from error
        prove(sock, secret)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def reach(
    addresses: Sequence[str], context: ssl.SSLContext, secret: bytes
) -> tuple[str, socket.socket]:
    """Return the first address that answers, and the socket of the connection to it."""
    deadline = time.monotonic() + PATIENCE
    reasons = dict.fromkeys(addresses, "was not tried")
    refusals = dict.fromkeys(addresses, 0)
    left, pause = list(addresses), 0.1
    while left:
        for address in list(left):
            try:
                return address, connect(address, context, secret)
            except Hopeless as error:
                reasons[address] = str(error)
                left.remove(address)
            except Refused:
                reasons[address] = "it refused the secret that this job was given"
                refusals[address] += 1
                if refusals[address] == REFUSALS:
                    left.remove(address)
            except ssl.SSLEOFError:
                reasons[address] = "it closed the connection"
            except ssl.SSLError as error:
                reasons[address] = f"it does not speak TLS as a master does: {error.reason}"
            except (ValueError, OverflowError):
                reasons[address] = "that is not HOST:PORT"
                left.remove(address)
            except TimeoutError:
                reasons[address] = "it did not answer in time"
            except OSError as error:
                reasons[address] = (error.strerror or str(error)).lower()
            if time.monotonic() > deadline:
                left.clear()
                break
        if left:
            # Not all at the same moment, where hundreds of jobs wait for one master.
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 256))
            pause = min(2 * pause, 2)
    tried = "; ".join(f"{address} ({reason})" for address, reason in reasons.items()) or "nothing"
    sys.exit(
        f"fiber: this job cannot reach its master; tried {tried}. If the addresses "
        "are right, see whether the program still runs, and whether a firewall or network policy "
        "keeps the job from it."
    )


def installed() -> str:
    """Return the content hash of the Fiber that is installed here, as `bundle.content_hash`."""
    found = []
    for package in PACKAGES:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            continue
        root = spec.submodule_search_locations[0]
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for file in files:
                if file.endswith(".py"):
                    path = os.path.join(folder, file)
                    parts = [package, *os.path.relpath(path, root)[:-3].split(os.sep)]
                    found.append(("/".join(parts), path))
    digest = hashlib.sha256()
    for relative, path in sorted(found):
        with open(path, "rb") as opened:
            source = opened.read()
        digest.update(b"%b\0%d\0%b" % (relative.encode(), len(source), source))
    return digest.hexdigest()


class Bundle:
    """Finds and loads the modules of Fiber that the master sent; those of the image are hidden."""

    def __init__(self, data: bytes, content_hash: str) -> None:
        self.data = data  # to be passed on, where jobs start jobs
        self.hash = content_hash
        self.modules = marshal.loads(zlib.decompress(data))

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        is_package, file, _, _ = self.modules[name]
        spec = ModuleSpec(name, self, origin=file, is_package=is_package)  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        pass

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name = module.__spec__.name
        _, file, source, _ = self.modules[name]
        if os.path.exists(file):  # of the image, and perhaps another: show the lines of ours
            linecache.cache[file] = len(source), None, source.splitlines(True), file
        exec(self.get_code(name), module.__dict__)

    def is_package(self, name: str) -> bool:
        return bool(self.modules[name][0])

    def get_filename(self, name: str) -> str:
        return str(self.modules[name][1])

    def get_source(self, name: str) -> str:
        return str(self.modules[name][2])

    def get_code(self, name: str) -> CodeType:
        _, file, source, code = self.modules[name]
        if code is None:
            return compile(source, file, "exec", dont_inherit=True)
        unpacked: CodeType = marshal.loads(code)
        return unpacked


def main() -> None:
    """Get Fiber and go on in it."""
    try:
        addresses = os.environ["FIBER_INTERNAL_MASTER"].split()
        certificate = os.environ["FIBER_INTERNAL_CERTIFICATE"]
        wanted = os.environ["FIBER_INTERNAL_CODE"]
        path = os.environ["FIBER_INTERNAL_SECRET_FILE"]
    except KeyError as error:
        sys.exit(f"fiber: the variable {error} is not set: this is a program for jobs of Fiber.")
    try:
        with open(path, "rb") as file:
            secret = file.read()
    except OSError as error:
        sys.exit(f"fiber: the session's secret cannot be read from {path}: {error.strerror}.")
    try:
        context = trust(certificate)
    except ssl.SSLError as error:
        sys.exit(f"fiber: FIBER_INTERNAL_CERTIFICATE holds no certificate: {error.reason}.")
    address, sock = reach(addresses, context, secret)
    others = [other for other in addresses if other != address]
    os.environ["FIBER_INTERNAL_MASTER"] = " ".join([address, *others])
    try:
        send(sock, HELLO, pickle.dumps({"service": "code"}))
        if installed() != wanted:
            send(sock, BUNDLE, importlib.util.MAGIC_NUMBER)
            kind, data = read(sock)
            if kind == REFUSED:
                sys.exit(f"fiber: the master at {address} did not send Fiber: {data.decode()}")
            for name in [n for n in sys.modules if n.partition(".")[0] in PACKAGES]:
                del sys.modules[name]  # something in the image imported it as Python started
            sys.meta_path.insert(0, Bundle(data, wanted))
    except OSError as error:
        sys.exit(f"fiber: the connection to the master at {address} broke: {error}.")
    # Until 3.12 the interpreter's own looks for a traceback's lines in files only.
    sys.excepthook = traceback.print_exception
    elsewhere = importlib.import_module("fiber.runtime.elsewhere")
    elsewhere.main(sock)


def text() -> str:
    """Return this program as `python -c` takes it: without comments, docstrings and types."""
    import ast

    assert __spec__ is not None
    source = __spec__.loader.get_source(__name__)  # type: ignore[union-attr]
    program = ast.parse(source)
    program.body = [part for part in program.body if getattr(part, "name", "") != "text"]
    for node in ast.walk(program):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[:1] = [ast.Pass()] if len(node.body) == 1 else []
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
    return ast.unparse(program)


if __name__ == "__main__":
    main()
