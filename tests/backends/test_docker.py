"""The docker backend on a real engine. Its image is a stock Python without Fiber in it."""

from __future__ import annotations

import functools
import signal
import site
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
from tests import waiting

from fiber.backends.base import BLAMELESS, Backend, Job, JobSpec, JobState, JobStatus
from fiber.backends.docker import DockerBackend
from fiber.config import config
from fiber.errors import ConfigError, StartError
from fiber.resources import Resources
from fiber.testing import BackendConformance

IMAGE = f"local/python:{sys.version_info[0]}.{sys.version_info[1]}"
SOCKET = "/var/run/docker.sock"
SRC = Path(__file__).resolve().parents[2] / "src"
PATIENCE = 30.0

until = functools.partial(waiting.until, patience=PATIENCE)

SLEEP = "import time; time.sleep(600)"
EAT = "x = bytearray(400 << 20)"


def probe() -> None:
    client = docker.DockerClient(f"unix://{SOCKET}")
    try:
        client.api.inspect_image(IMAGE)
    finally:
        client.close()


@pytest.fixture(autouse=True)
def image(engine: Callable[..., None], clean_environ: None) -> None:
    engine("docker", probe)
    config.image = IMAGE


@pytest.fixture
def client(image: None) -> Iterator[Any]:
    client = docker.DockerClient(f"unix://{SOCKET}")
    yield client
    client.close()


@pytest.fixture
def session(client: Any) -> Iterator[str]:
    """The session of a test; none of its containers may be there at the end."""
    name = uuid.uuid4().hex[:8]
    yield name
    until(lambda: not of_session(client, name), lambda: f"{of_session(client, name)} gone")


def of_session(client: Any, session: str) -> list[str]:
    found = client.api.containers(all=True, filters={"label": f"fiber.session={session}"})
    return [container["Names"][0].lstrip("/") for container in found]


@pytest.fixture
def backend(session: str) -> Iterator[DockerBackend]:
    backend = DockerBackend()
    yield backend
    backend.close()


# The SDK does not close the sockets that it could not connect.
away = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)

Submit = Callable[..., "list[Job]"]


@pytest.fixture
def submit(backend: DockerBackend, session: str) -> Submit:
    def submit(*programs: str, **fields: Any) -> list[Job]:
        return backend.submit([spec(program, session, **fields) for program in programs])

    return submit


def spec(program: str, session: str, **fields: Any) -> JobSpec:
    given = {"environment": {}, "resources": Resources(), **fields}
    return JobSpec(name="a job", command=["python3", "-c", program], session=session, **given)


def ended(backend: Backend, job: Job) -> JobStatus:
    (status,) = backend.wait([job], PATIENCE)
    assert status.state is JobState.ENDED, status
    return status


def inspect(client: Any, job: Job) -> dict[str, Any]:
    found: dict[str, Any] = client.api.inspect_container(job.id)
    return found


class TestDocker(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = DockerBackend()
        yield backend
        backend.close()


# What is asked for arrives.


def test_resources_are_limits_of_the_container(submit: Submit, client: Any) -> None:
    (job,) = submit(SLEEP, resources=Resources(cpu=2, memory="512Mi"))
    limits = inspect(client, job)["HostConfig"]
    assert limits["NanoCpus"] == 2 * 10**9
    assert limits["Memory"] == limits["MemorySwap"] == 512 * 2**20


def test_resources_that_were_not_asked_for_are_those_of_the_configuration(
    submit: Submit, client: Any
) -> None:
    config.init(cpu_per_job=2, mem_per_job="300Mi")
    (job,) = submit(SLEEP)
    limits = inspect(client, job)["HostConfig"]
    assert (limits["NanoCpus"], limits["Memory"]) == (2 * 10**9, 300 * 2**20)


def test_a_container_is_labelled_and_has_a_name_for_people(
    submit: Submit, session: str, client: Any
) -> None:
    (job,) = submit(SLEEP)
    assert job.id.startswith(f"fiber-{session}-")
    labels = inspect(client, job)["Config"]["Labels"]
    assert labels["fiber.session"] == session
    assert labels["fiber.name"] == "a job"


def test_the_configuration_reaches_the_container(
    backend: DockerBackend, submit: Submit, client: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("of the host")
    config.docker_mounts = [f"{tmp_path}:/mnt/in:ro"]
    config.docker_environment = {"A": "configured", "B": "b"}
    config.docker_workdir = "/mnt/in"
    config.docker_user = "0:1234"
    config.docker_options = {"shm_size": "32m", "labels": {"mine": "1"}, "environment": {"C": "c"}}
    (job,) = submit(
        "import os; print(os.getgid(), os.getcwd(), open('data').read(), *map(os.getenv, 'ABCD'))",
        environment={"D": "d"},
    )
    assert ended(backend, job).exit_code == 0
    assert backend.logs(job) == "1234 /mnt/in of the host configured b c d"
    (job,) = submit(SLEEP)
    about = inspect(client, job)
    assert about["HostConfig"]["ShmSize"] == 32 * 2**20
    assert about["Config"]["Labels"]["mine"] == "1"
    assert about["Config"]["Labels"]["fiber.name"] == "a job"


@pytest.mark.parametrize(
    "settings",
    [
        {"docker_user": "1234"},
        {"docker_user": "nobody"},
        {"docker_options": {"read_only": True}},
        {"docker_options": {"read_only": True, "user": "1234:1234"}},
    ],
    ids=str,
)
def test_the_secret_can_be_read_by_the_user_of_the_container(
    backend: DockerBackend, submit: Submit, client: Any, settings: dict[str, Any]
) -> None:
    config.init(**settings)
    program = "import os; print(open(os.environ['FIBER_INTERNAL_SECRET_FILE']).read()); "
    (job,) = submit(program + "import sys; sys.stdout.flush(); " + SLEEP, secret=b"sesame")
    until(lambda: backend.logs(job) == "sesame", lambda: f"the logs, not {backend.logs(job)!r}")
    assert "sesame" not in str(inspect(client, job))
    volumes = [mount["Name"] for mount in inspect(client, job)["Mounts"]]
    backend.kill([job])
    until(lambda: not {v.name for v in client.volumes.list()} & set(volumes))


def test_the_image_is_by_default_a_stock_python_of_this_version(backend: DockerBackend) -> None:
    from fiber.backends.docker.arguments import image_name

    config.image = None
    assert image_name() == f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"


# Why a container has ended.


def test_out_of_memory_is_told_with_the_limit(backend: DockerBackend, submit: Submit) -> None:
    (job,) = submit(EAT, resources=Resources(memory=64))
    status = ended(backend, job)
    assert (status.exit_code, status.reason) == (-signal.SIGKILL, "OOMKilled")
    assert "64 MB" in status.message
    assert "@fiber.meta(memory=...)" in status.message
    assert job.id in status.message


def test_a_child_that_was_out_of_memory_shows_while_the_container_goes_on(
    backend: DockerBackend, submit: Submit
) -> None:
    program = f"""
import os, sys, time
pid = os.fork()
if pid == 0:
    {EAT}
os.waitpid(pid, 0)
time.sleep(600)
"""
    (job,) = submit(program, resources=Resources(memory=64))
    until(lambda: backend.status([job])[0].reason == "OOMKilled")
    (status,) = backend.status([job])
    assert status.state is JobState.RUNNING
    assert "64 MB" in status.message


@pytest.mark.parametrize("how", ["kill", "stop", "remove"])
def test_a_container_that_somebody_ended_is_told_as_such(
    backend: DockerBackend, submit: Submit, client: Any, how: str
) -> None:
    jobs = submit(SLEEP, SLEEP)
    container = client.containers.get(jobs[0].id)
    {
        "kill": container.kill,
        "stop": container.stop,
        "remove": lambda: container.remove(force=True),
    }[how]()
    status = ended(backend, jobs[0])
    assert status.reason == "Deleted"
    assert status.reason in BLAMELESS
    assert status.exit_code == (-signal.SIGTERM if how == "stop" else -signal.SIGKILL)
    assert "docker kill" in status.message
    assert backend.status(jobs)[1].state is JobState.RUNNING


def test_a_command_that_was_killed_in_its_container_is_told(
    backend: DockerBackend, submit: Submit
) -> None:
    (job,) = submit("import os; os.kill(os.getpid(), 9)")
    status = ended(backend, job)
    assert (status.exit_code, status.reason) == (-signal.SIGKILL, "Killed")
    assert "SIGKILL" in status.message


def test_a_command_that_failed_is_told_with_its_code(
    backend: DockerBackend, submit: Submit
) -> None:
    (job,) = submit("print('why'); raise SystemExit(7)")
    status = ended(backend, job)
    assert (status.exit_code, status.reason) == (7, "Error")
    assert "exit code 7" in status.message
    assert backend.logs(job) == "why"


def test_what_we_end_has_no_reason(backend: DockerBackend, submit: Submit) -> None:
    jobs = submit(SLEEP, SLEEP)
    backend.terminate(jobs[:1])
    assert ended(backend, jobs[0])[1:3] == (-signal.SIGTERM, "")
    backend.kill(jobs)
    assert backend.status(jobs)[1][1:3] == (-signal.SIGKILL, "")


def test_a_loud_container_is_not_held_up_and_costs_little_memory(
    backend: DockerBackend, submit: Submit
) -> None:
    (job,) = submit("for i in range(200_000): print('line', i, '.' * 50)")
    assert ended(backend, job).exit_code == 0
    lines = backend.logs(job, 100_000).splitlines()
    assert lines[-1] == "line 199999 " + "." * 50
    assert sum(map(len, lines)) < 17 * 1024


# What cannot be started is a sentence with the cure, and leaves nothing.


@pytest.mark.parametrize(
    ("settings", "resources", "words"),
    [
        ({"image": "localhost:1/none:1"}, {}, ["localhost:1/none:1", "Set image"]),
        ({"docker_network": "nosuch"}, {}, ["nosuch", "docker_network"]),
        ({"docker_mounts": ["/x:/y:ro", "/x:/y"]}, {}, ["/y", "docker_mounts"]),
        ({}, {"cpu": 1000}, ["CPUs", "cpu_per_job"]),
        ({}, {"memory": 1}, ["memory limit", "mem_per_job"]),
        ({"docker_options": {"colour": "red"}}, {}, ["docker_options", "colour"]),
        ({"docker_options": {"auto_remove": False}}, {}, ["docker_options", "auto_remove"]),
        ({"docker_options": {"ulimits": [{"x": 1}]}}, {}, ["docker_options", "limit"]),
    ],
    ids=str,
)
def test_what_the_engine_refuses(
    submit: Submit, settings: dict[str, Any], resources: dict[str, Any], words: list[str]
) -> None:
    config.init(**settings)
    with pytest.raises((StartError, ConfigError)) as caught:
        submit(SLEEP, SLEEP, resources=Resources(**resources))
    for word in words:
        assert word in str(caught.value)


def test_one_that_is_refused_leaves_none_of_the_call(
    backend: DockerBackend, session: str, client: Any
) -> None:
    bad = spec(SLEEP, session, resources=Resources(cpu=1000))
    with pytest.raises(StartError):
        backend.submit([*(spec(SLEEP, session) for _ in range(3)), bad])
    until(lambda: not of_session(client, session))


@away
def test_an_engine_that_is_not_there(
    backend: DockerBackend, submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    for call in (lambda: submit(SLEEP), lambda: backend.addresses(80)):
        with pytest.raises(
            StartError, match=r"does not answer: No such file.*Is Docker running.*DOCKER_HOST"
        ):
            call()


def test_an_sdk_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ConfigError, match=r'pip install "fiber\[docker\]"'):
        DockerBackend()


# Addresses.

CONNECTS = """
import os, socket
for address in os.environ["ADDRESSES"].split():
    host, port = address.split(":")
    socket.create_connection((host, int(port)), 10).close()
"""


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def network(client: Any) -> Iterator[str]:
    network = client.networks.create(f"fiber-test-{uuid.uuid4().hex[:8]}")
    yield network.name
    until(lambda: removed(network))


def removed(network: Any) -> bool:
    try:
        network.remove()
    except docker.errors.NotFound:
        return True
    except docker.errors.APIError:  # a container is still on its way out
        return False
    return True


@pytest.mark.parametrize("where", ["bridge", "host", "own"])
def test_every_address_leads_to_this_process(
    backend: DockerBackend,
    submit: Submit,
    port: int,
    network: str,
    where: str,
) -> None:
    config.docker_network = {"bridge": None, "host": "host", "own": network}[where]
    addresses = backend.addresses(port)
    assert addresses[0].startswith("127.0.0.1" if where == "host" else "host.docker.internal")
    if where != "host":
        assert len(addresses) >= 3  # the network's gateway and this machine's own address
    (job,) = submit(CONNECTS, environment={"ADDRESSES": " ".join(addresses)})
    assert ended(backend, job).exit_code == 0, backend.logs(job)


def test_a_network_that_leads_nowhere(backend: DockerBackend) -> None:
    config.docker_network = "none"
    with pytest.raises(StartError, match="docker_network"):
        backend.addresses(80)
    config.docker_network = "nosuch"
    with pytest.raises(StartError, match="docker network create nosuch"):
        backend.addresses(80)


MASTER = """
import socket, sys
from fiber.backends.base import JobSpec, JobState
from fiber.backends.docker import DockerBackend
from fiber.config import config
from fiber.resources import Resources

config.image, session = sys.argv[1:]
backend = DockerBackend()
with socket.create_server(("0.0.0.0", 0)) as listener:
    addresses = backend.addresses(listener.getsockname()[1])
    print(*addresses, socket.gethostbyname(socket.gethostname()))
    program = '''import socket, sys
host, port = sys.argv[1].split(":")
socket.create_connection((host, int(port)), 10).sendall(b"hello")
'''
    command = ["python3", "-c", program, addresses[0]]
    jobs = backend.submit([JobSpec("a job", command, {}, Resources(), session)])
    listener.settimeout(30)
    print(listener.accept()[0].recv(5).decode())
    print(backend.wait(jobs, 30)[0].exit_code)
backend.close()
"""


def test_a_master_in_a_container_is_reached_in_its_own_network(
    session: str, client: Any, network: str
) -> None:
    packages = next(p for p in site.getsitepackages() if Path(p, "docker").exists())
    output = client.containers.run(
        IMAGE,
        ["python3", "-c", MASTER, IMAGE, session],
        remove=True,
        stderr=True,
        network=network,
        hostname="not-its-id",
        environment={"PYTHONPATH": "/src:/packages"},
        volumes=[f"{SRC}:/src:ro", f"{packages}:/packages:ro", f"{SOCKET}:{SOCKET}"],
    ).decode()
    first, hello, code = output.splitlines()
    assert first.split()[0].split(":")[0] == first.split()[-1]
    assert (hello, code) == ("hello", "0")


# Several, again, and the end.


def test_two_backends_side_by_side(
    backend: DockerBackend, submit: Submit, session: str, client: Any
) -> None:
    other = DockerBackend()
    try:
        mine, theirs = submit(SLEEP), other.submit([spec(SLEEP, session)])
        other.kill(theirs)
        assert backend.status(mine)[0].state is JobState.RUNNING
        theirs = other.submit([spec(SLEEP, session)])
    finally:
        other.close()
    assert other.status(theirs)[0].state is JobState.ENDED
    assert backend.status(mine)[0].state is JobState.RUNNING
    assert of_session(client, session) == [mine[0].id]


def test_after_its_end_it_can_be_used_again(backend: DockerBackend, submit: Submit) -> None:
    before = submit(SLEEP)
    backend.close()
    (after,) = submit("raise SystemExit(3)")
    assert ended(backend, after).exit_code == 3
    assert backend.status(before)[0].state is JobState.ENDED


PROGRAM = """
import os, signal, sys, time
from fiber.backends.base import JobSpec
from fiber.backends.docker import DockerBackend, engine
from fiber.config import config
from fiber.resources import Resources

image, session, program, when = sys.argv[1:]
config.image = image
backend = DockerBackend()
if when == "before it is started":
    engine.Engine.start = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
command = ["python3", "-c", program]
backend.submit([JobSpec("a job", command, {}, Resources(), session)])
print("submitted", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["while it runs", "before it is started"])
def test_a_master_that_is_killed_leaves_no_container(
    start_script: Callable[..., subprocess.Popen[str]], session: str, client: Any, when: str
) -> None:
    master = start_script(PROGRAM, IMAGE, session, SLEEP, when)
    assert master.stdout is not None
    if when == "while it runs":
        assert master.stdout.readline() == "submitted\n"
        assert len(of_session(client, session)) == 1
        master.kill()
    assert master.wait(PATIENCE) == -signal.SIGKILL
    until(lambda: not of_session(client, session))


def test_a_container_that_notices_its_masters_death_is_removed_by_the_engine(
    start_script: Callable[..., subprocess.Popen[str]], session: str, client: Any
) -> None:
    """Without the janitor: a machine that is switched off has none."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        listener.settimeout(PATIENCE)
        program = f"""
import socket
line = socket.create_connection(("host.docker.internal", {listener.getsockname()[1]}), 10)
line.settimeout(None)
line.recv(1)
"""
        master = start_script(PROGRAM, IMAGE, session, program, "while it runs")
        assert master.stdout is not None
        assert master.stdout.readline() == "submitted\n"
        line, _ = listener.accept()
        with line:
            janitors = psutil.Process(master.pid).children()
            assert len(janitors) == 1
            for process in [*janitors, master]:
                process.kill()
            master.wait(PATIENCE)
            assert len(of_session(client, session)) == 1
    until(lambda: not of_session(client, session))


# An engine that goes away and comes back.


class Relay:
    """A socket that leads to the engine, and can be cut off."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self._path = str(path)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.connect()

    def connect(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(100)
        self._spawn(self._accept, self._listener)

    def cut(self) -> None:
        Path(self._path).unlink(missing_ok=True)
        for each in [self._listener, *self._sockets]:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join()
        for each in [self._listener, *self._sockets]:
            each.close()
        self._sockets.clear()
        self._threads.clear()

    def _spawn(self, target: Callable[..., None], *args: socket.socket) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                inner, _ = listener.accept()
            except OSError:
                return
            outer = socket.socket(socket.AF_UNIX)
            outer.connect(SOCKET)
            self._sockets += [inner, outer]
            self._spawn(self._copy, inner, outer)
            self._spawn(self._copy, outer, inner)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(64 * 1024):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def relay(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    relay = Relay(tmp_path_factory.mktemp("relay") / "s")
    monkeypatch.setenv("DOCKER_HOST", relay.url)
    yield relay
    relay.cut()


def states(backend: Backend, jobs: Sequence[Job]) -> list[JobState]:
    return [status.state for status in backend.status(jobs)]


@away
def test_an_engine_that_goes_away_leaves_jobs_unknown_until_it_is_back(
    relay: Relay, backend: DockerBackend, submit: Submit, client: Any
) -> None:
    one = "import time; time.sleep(1); raise SystemExit(3)"
    loud = "import time\nwhile True: print('still here', flush=True); time.sleep(0.1)"
    jobs = submit(SLEEP, one, SLEEP, loud)
    relay.cut()
    until(lambda: JobState.UNKNOWN in states(backend, jobs))
    assert "does not answer" in backend.status(jobs)[0].message
    (unknown,) = backend.wait(jobs[:1], 0.1)
    assert unknown.state is JobState.UNKNOWN
    until(lambda: jobs[1].id not in str(client.containers.list()))
    backend.kill(jobs[2:3])  # it cannot be done now
    assert inspect(client, jobs[2])["State"]["Running"]
    relay.connect()
    until(lambda: states(backend, jobs)[0] is JobState.RUNNING)
    assert ended(backend, jobs[1]).exit_code == 3
    until(lambda: states(backend, jobs)[2] is JobState.ENDED)
    until(lambda: backend.logs(jobs[3], 1) == "still here")
    (job,) = submit("raise SystemExit(4)")
    assert ended(backend, job).exit_code == 4


@away
def test_a_container_whose_end_nobody_heard_is_not_waited_for(
    relay: Relay, backend: DockerBackend, submit: Submit, client: Any
) -> None:
    (job,) = submit(SLEEP)
    relay.cut()
    client.containers.get(job.id).kill()
    for _ in range(150):  # the engine remembers 256 events
        client.volumes.create().remove()
    relay.connect()
    status = ended(backend, job)
    assert status.exit_code is None
    assert status.reason in BLAMELESS
    assert job.id in status.message


@away
def test_jobs_are_submitted_when_the_engine_is_back(
    relay: Relay, backend: DockerBackend, submit: Submit
) -> None:
    submit(SLEEP)
    relay.cut()
    timer = threading.Timer(1.0, relay.connect)
    timer.start()
    (job,) = submit("raise SystemExit(3)")
    timer.join()
    assert ended(backend, job).exit_code == 3
