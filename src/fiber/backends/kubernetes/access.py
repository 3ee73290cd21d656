"""The API server, as this backend uses it: the one module that knows Kubernetes' own client.

    kubeconfig, or the service account of this pod ─► Access ─► dicts, as the API writes them
                                                            └─► ApiError

Pods are plain dicts here, not the client's models: they look as in a manifest or a template, newer
fields pass through an older client, and thousands of them cost no time to convert.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import socket
from collections.abc import Iterator
from multiprocessing import util
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fiber.backends.kubernetes import detect
from fiber.errors import StartError

__all__ = ["Access", "ApiError", "Place", "Watching"]

Object = dict[str, Any]

_TIMEOUT = (4.0, 20.0)  # seconds to connect, and between two parts of an answer
_QUICK = (2.0, 4.0)
_WATCH = 240  # seconds after which a watch is begun anew; in between the server may be silent


class ApiError(Exception):
    """The API server refused, or did not answer.

    Attributes:
        status: of HTTP; 0 if there was no answer.
        reason: Kubernetes' word for it, such as "Forbidden".
        message: what it said.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def away(self) -> bool:
        """Whether it is the server that has a problem, and not what it was asked."""
        return self.status == 0 or self.status == 429 or self.status >= 500


class Place(NamedTuple):
    """Which cluster and namespace, for another process that shall use the same."""

    context: str | None
    namespace: str


class Access:
    """A way to one namespace.

    Args:
        place: the context of the kubeconfig and the namespace; None and empty: what is usual there.

    Raises:
        ModuleNotFoundError: Kubernetes' client is not installed.
        StartError: there is no cluster configured.
    """

    def __init__(self, place: Place) -> None:
        client = importlib.import_module("kubernetes.client")
        config = importlib.import_module("kubernetes.config")
        urllib3 = importlib.import_module("urllib3")
        self._errors: tuple[type[Exception], ...] = (urllib3.exceptions.HTTPError, OSError)
        self._silence: tuple[type[Exception], ...] = (*self._errors, ValueError)
        self._refused: tuple[type[Exception], ...] = (client.ApiException,)
        # Not Configuration(): that copies a default, which the program may have changed for itself.
        self._configuration = type.__call__(client.Configuration)
        # What is worth another attempt is tried again here; urllib3 would log a warning for each.
        self._configuration.retries = False
        self.in_pod = detect.in_pod() and place.context is None
        namespace = place.namespace
        try:
            if self.in_pod:
                config.load_incluster_config(client_configuration=self._configuration)
                namespace = namespace or detect.own_namespace()
            else:
                # The client itself would look at the variable when it is imported, and never again.
                path = os.environ.get("KUBECONFIG") or None
                config.load_kube_config(path, place.context, self._configuration)
                self._keep_files()
                namespace = namespace or _namespace_of(config, path, place.context)
        except (config.ConfigException, OSError) as error:
            raise StartError(
                f"No Kubernetes cluster is configured here ({_one_line(error)}): set KUBECONFIG or "
                f"kubernetes_context to one, or choose another backend"
            ) from error
        self.place = Place(place.context, namespace or "default")
        self.namespace = self.place.namespace
        self.server: str = self._configuration.host
        self._client = client.ApiClient(self._configuration)
        self._core = client.CoreV1Api(self._client)

    def _keep_files(self) -> None:
        """Have the files stay into which the client has put what the kubeconfig holds.

        It removes them as the program ends, and so before the session does, whose pods need them.
        """
        module = importlib.import_module("kubernetes.config.kube_config")
        remove = getattr(module, "_cleanup_temp_files", None)
        if remove is not None:
            atexit.unregister(remove)
            # Run after the end of the session, for that was registered later.
            util.Finalize(None, remove, exitpriority=-200)

    def close(self) -> None:
        """Close its connections."""
        pool = getattr(getattr(self._client, "rest_client", None), "pool_manager", None)
        if pool is not None:
            pool.clear()
        with contextlib.suppress(Exception):  # of some versions, which have a pool of threads
            self._client.close()

    # pods

    def create_pod(self, body: Object) -> Object:
        """Make a pod."""
        return self._json(self._core.create_namespaced_pod, self.namespace, body)

    def pod(self, name: str) -> Object:
        """Return a pod."""
        return self._json(self._core.read_namespaced_pod, name, self.namespace)

    def pods(self, selector: str) -> tuple[list[Object], str]:
        """Return the pods with a label, and the version from which on to watch."""
        found = self._json(self._core.list_namespaced_pod, self.namespace, label_selector=selector)
        return found["items"], found["metadata"]["resourceVersion"]

    def watch_pods(self, selector: str, version: str) -> Watching:
        """Watch the pods with a label, from a version on."""
        response = self._call(
            self._core.list_namespaced_pod,
            self.namespace,
            label_selector=selector,
            resource_version=version,
            watch=True,
            timeout_seconds=_WATCH,
            # So that a server that is gone without a word is noticed.
            _request_timeout=(_TIMEOUT[0], _WATCH + 30.0),
        )
        return Watching(response, self._silence)

    def delete_pod(self, name: str, grace: int) -> None:
        """Delete a pod within `grace` seconds; it may be gone."""
        delete = self._core.delete_namespaced_pod
        with _gone_is_fine():
            self._json(delete, name, self.namespace, grace_period_seconds=grace)

    def delete_pods(self, selector: str) -> None:
        """Delete the pods with a label at once."""
        self._json(
            self._core.delete_collection_namespaced_pod,
            self.namespace,
            label_selector=selector,
            grace_period_seconds=0,
        )

    def log(self, name: str, lines: int) -> str:
        """Return the last lines that a pod wrote."""
        response = self._call(
            self._core.read_namespaced_pod_log, name, self.namespace, tail_lines=lines
        )
        with self._translated():
            data: bytes = response.data
        return data.decode("utf-8", "replace")

    # what else there is

    def create_secret(self, body: Object) -> None:
        """Make a Secret."""
        self._json(self._core.create_namespaced_secret, self.namespace, body)

    def delete_secret(self, name: str) -> None:
        """Delete a Secret; it may be gone."""
        with _gone_is_fine():
            self._json(self._core.delete_namespaced_secret, name, self.namespace)

    def events(self, selector: str) -> list[Object]:
        """Return the events of this namespace that a field selector selects."""
        found = self._json(
            self._core.list_namespaced_event,
            self.namespace,
            field_selector=selector,
            _request_timeout=_QUICK,
        )
        items: list[Object] = found["items"]
        return items

    def nodes(self) -> list[Object]:
        """Return all nodes; most are not allowed to."""
        items: list[Object] = self._json(self._core.list_node, _request_timeout=_QUICK)["items"]
        return items

    def all_pods(self) -> list[Object]:
        """Return the pods of all namespaces that are on a node; most are not allowed to."""
        selector = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"
        items: list[Object] = self._json(
            self._core.list_pod_for_all_namespaces, field_selector=selector, _request_timeout=_QUICK
        )["items"]
        return items

    def forward(self, name: str, port: int) -> socket.socket:
        """Open a port-forward and return its WebSocket's own socket, after the handshake."""
        websockets = importlib.import_module("kubernetes.stream.ws_client")
        scheme, rest = self.server.split("://", 1)
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/portforward?ports={port}"
        url = f"{'wss' if scheme == 'https' else 'ws'}://{rest.rstrip('/')}{path}"
        headers = {
            setting["key"].lower(): setting["value"]
            for setting in self._configuration.auth_settings().values()
            if setting["in"] == "header" and setting["value"]
        }
        headers["sec-websocket-protocol"] = "v4.channel.k8s.io"
        try:
            websocket = websockets.create_websocket(self._configuration, url, headers)
        except OSError as error:
            raise ApiError(0, "Unreachable", _one_line(error)) from error
        except Exception as error:  # of websocket-client, with the answer's status
            status = getattr(error, "status_code", 0) or 0
            words = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound"}
            raise ApiError(status, words.get(status, "Unreachable"), _one_line(error)) from error
        taken: socket.socket = websocket.sock
        # Closing the WebSocket, which its collection may do, shall not close what we took.
        websocket.sock = None
        return taken

    def source_address(self) -> str:
        """Return the address of this machine on the route to the API server."""
        parts = urlsplit(self.server)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        for family, *_, address in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM):
            # A datagram socket that is connected has an address, and nothing is sent.
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        raise OSError(f"there is no route to {self.server}")

    def _call(self, method: Any, *args: Any, **options: Any) -> Any:
        options.setdefault("_request_timeout", _TIMEOUT)
        with self._translated():
            return method(*args, _preload_content=False, **options)

    def _json(self, method: Any, *args: Any, **options: Any) -> Object:
        response = self._call(method, *args, **options)
        with self._translated():
            answer: Object = json.loads(response.data)
        return answer

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._refused as error:
            raise _refusal(error) from error
        except self._silence as error:
            raise ApiError(0, "Unreachable", _one_line(error)) from error


class Watching:
    """A watch that is open: iterate over its events; any thread may stop it."""

    def __init__(self, response: Any, errors: tuple[type[Exception], ...]) -> None:
        self._response = response
        self._errors = errors

    def __iter__(self) -> Iterator[Object]:
        rest = b""
        try:
            for chunk in self._response.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
        except self._errors as error:
            raise ApiError(0, "Unreachable", _one_line(error)) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close it, in the thread that iterates or would have."""
        self._response.close()

    def stop(self) -> None:
        """End the iteration, also while it waits for an event."""
        connection = getattr(self._response, "connection", None)
        sock = getattr(connection, "sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        if error.status != 404:
            raise


def _refusal(error: Any) -> ApiError:
    """What Kubernetes' client raised, in the API server's own words."""
    reason, message = str(error.reason or ""), ""
    body = error.body
    if isinstance(body, (bytes, bytearray)):
        body = body.decode("utf-8", "replace")
    try:
        said = json.loads(body or "")
        reason, message = said.get("reason") or reason, said.get("message") or ""
    except (ValueError, AttributeError):
        message = (body or "").strip()[:300]
    return ApiError(int(error.status or 0), reason, message or reason or _one_line(error))


def _namespace_of(config: Any, path: str | None, context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts(path)
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    return str((chosen.get("context") or {}).get("namespace") or "")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
