"""The server of `nemo-rl ui`: which sources it shows, where it listens, and the address that it prints."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.backends import cluster_context, kubernetes_backend
from nemo_rl.extras import explained, is_there, require
from nemo_rl.ui.listing import Source

PORT = 8642
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Options:
    """What `nemo-rl ui` was asked for; its options say what each means."""

    folders: Sequence[Path] = ()
    namespace: str | None = None
    all_namespaces: bool = False
    host: str = LOOPBACK[0]
    port: int | None = None
    allowed_hosts: Sequence[str] = ()
    viewer_tokens: bool = False
    api_server: str | None = None
    certificate_authority: Path | None = None


def serve(options: Options, ready: Callable[[str], None] | None = None) -> int:
    """Serves the page until Ctrl-C or SIGTERM; 0. `ready` gets the address, default: it is printed.

    ValueError for options that do not fit, LibrariesMissing where the page's libraries cannot be had, MissingPackage for
    the extra, OSError for a port that is taken.
    """
    for package in ("starlette", "uvicorn"):
        require("nemo-rl ui", package)
    with explained("nemo-rl ui"):
        import uvicorn

        from nemo_rl.ui.app import create_app
    from nemo_rl.ui import libraries

    found = sources(options)
    folder = libraries.find()
    secret = None if options.viewer_tokens else secrets.token_urlsafe(24)
    app = create_app(found, folder, secret=secret, hosts=_hosts(options))
    listening = _listen(options.host, options.port)
    with contextlib.closing(listening):
        address = _address(options.host, listening.getsockname()[1], secret)
        (ready or _print)(address)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def sources(options: Options) -> list[Source]:
    """What is shown: the folders that are named; else the cluster, where there is one, and ./outputs, where that is."""
    if options.viewer_tokens:
        if options.folders:
            raise ValueError("--viewer-tokens shows the jobs of a cluster; folders of this machine are nobody's there")
        return [_for_viewers(options)]
    if options.folders:
        missing = [folder for folder in options.folders if not folder.expanduser().is_dir()]
        if missing:
            raise ValueError(f"found no folder {str(missing[0])!r}; expected one with runs, such as outputs/")
        return [_runs(options.folders)]
    asked = options.namespace is not None or options.all_namespaces
    found: list[Source] = []
    context = cluster_context()
    if asked or (context is not None and is_there("kubernetes")):
        found.append(_own_cluster(options))
    elif context is not None:
        print(
            f"nemo-rl: {context} is there, but no client to ask it, so only runs of this machine are shown",
            file=sys.stderr,
        )
    if OUTPUTS.is_dir() and not asked:
        found.append(_runs([OUTPUTS]))
    if not found:
        raise ValueError(
            "found neither a Kubernetes context nor ./outputs; name a folder with runs (nemo-rl ui outputs/), or set KUBECONFIG"
        )
    return found


def _runs(folders: Sequence[Path]) -> Source:
    from nemo_rl.ui.runs import Runs

    return Runs(folders)


def _own_cluster(options: Options) -> Source:
    kubernetes_backend("nemo-rl ui")
    from nemo_rl.backends.kubernetes.connect import connect
    from nemo_rl.ui.cluster import Jobs

    cluster = connect(options.namespace)
    namespace = "" if options.all_namespaces else cluster.namespace
    return Jobs(lambda token: cluster, namespace=namespace, title=f"context {cluster.context}")


def _for_viewers(options: Options) -> Source:
    kubernetes_backend("nemo-rl ui --viewer-tokens")
    from nemo_rl.backends.kubernetes.connect import connect_with_token
    from nemo_rl.ui.cluster import Jobs

    def as_viewer(token: str) -> object:
        return connect_with_token(token, options.api_server, options.certificate_authority)

    as_viewer("none")  # the options are wrong for everybody
    return Jobs(as_viewer, namespace=options.namespace or "", title="this cluster")  # type: ignore[arg-type]


def _hosts(options: Options) -> set[str] | None:
    """The names by which the page may be called. A token of the cluster is no cookie, so there any name will do."""
    if options.viewer_tokens and not options.allowed_hosts:
        return None
    own = {options.host} if options.host not in ("0.0.0.0", "::") else set()
    return {*LOOPBACK, *options.allowed_hosts, *own}


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket at this port; without one at the usual port, or at any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tries = (PORT, 0) if port is None else (port,)
    for number in tries:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            if number == tries[-1]:
                raise OSError(
                    f"port {number} of {host} cannot be used ({error.strerror or error}); give another with --port, 0 for any"
                ) from None
    raise AssertionError


def _address(host: str, port: int, secret: str | None) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    # behind the #: it reaches no server, no log and no other site
    return f"http://{shown}:{port}/" + (f"#token={secret}" if secret else "")


def _print(address: str) -> None:
    print(f"nemo-rl: the page is at {address}\nnemo-rl: Ctrl-C ends it; nothing on it changes a job", flush=True)
