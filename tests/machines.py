"""Two simulated machines: network namespaces with a virtual cable if the system allows them, else the loopback."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """An address, and the prefix that makes a command run on this machine."""

    address: str
    interface: str
    enter: tuple[str, ...] = ()
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on this machine; its output is appended to the log."""
        environment = os.environ | {"GLOO_SOCKET_IFNAME": self.interface} | variables
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.enter, *command], env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.processes.append(process)
        return process


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Yield two machines; remove them afterwards, with all their processes."""
    with ExitStack() as stack:
        try:
            machines = _joined(stack)
        except (OSError, subprocess.CalledProcessError):
            machines = [Machine("127.0.0.1", "lo"), Machine("127.0.0.1", "lo")]
        try:
            yield machines
        finally:
            for process in [process for machine in machines for process in machine.processes]:
                kill(process)


def _joined(stack: ExitStack) -> list[Machine]:
    """Create two network namespaces in one user namespace, which needs no privileges."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        raise FileNotFoundError("no tools for network namespaces")
    first = _hold(stack, ["unshare", "--user", "--map-root-user", "--net"])
    inside = ["nsenter", "--target", str(first), "--user", "--preserve-credentials", "--net"]
    second = _hold(stack, [*inside, "unshare", "--net"])
    outside = ["nsenter", "--target", str(second), "--user", "--preserve-credentials", "--net"]
    _run(*inside, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second))
    machines = []
    for number, enter in enumerate((inside, outside), start=1):
        _run(*enter, "ip", "address", "add", f"10.1.0.{number}/24", "dev", "cable")
        for link in ("cable", "lo"):
            _run(*enter, "ip", "link", "set", link, "up")
        machines.append(Machine(f"10.1.0.{number}", "cable", tuple(enter)))
    return machines


def _hold(stack: ExitStack, namespace: list[str]) -> int:
    """Start a process that keeps a namespace alive until this process ends."""
    holder = subprocess.Popen(
        [*namespace, "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stack.enter_context(holder)  # closes its standard input, and waits
    if holder.stdout is None or not holder.stdout.readline():
        raise OSError("no namespaces here")
    return holder.pid


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants at once, as a power failure would."""
    if process.poll() is not None:
        return
    for member in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def family(process: int) -> list[int]:
    """Return the ids of a process and all its descendants, oldest first."""
    children = Path(f"/proc/{process}/task/{process}/children")
    with suppress(OSError):
        return [process, *(member for child in children.read_text().split() for member in family(int(child)))]
    return [process]


def free_port(lowest: int = 20000, highest: int = 29999) -> int:
    """Return a port that is not in use."""
    for port in range(lowest, highest):
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            return port
    raise OSError("no free port")
