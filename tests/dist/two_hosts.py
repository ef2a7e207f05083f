"""Two hosts on one machine: network namespaces joined by one cable, each with an sshd of its own.

All addresses exist inside the namespaces only, keys live in a temporary folder, and a `ssh` first on PATH
brings the right settings, so that nothing of the machine or of its user's ~/.ssh is touched. Leaving the
`with` block ends what runs in the two namespaces, by process id, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

NAMES = ("first", "second")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
INTERFACE = "eth0"
NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
SSHD_FOLDER = Path("/run/sshd")


def why_not() -> str | None:
    """What keeps this machine from having two hosts, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for tool, package in NEEDED.items() if find(tool) is None]
    if missing:
        return f"install {' '.join(missing)}"
    probe = f"dsee-probe-{os.getpid()}"
    made = subprocess.run([str(find("ip")), "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    entered = in_namespace(probe, ["true"])
    subprocess.run([str(find("ip")), "netns", "delete", probe], check=False)
    return f"network namespaces cannot be entered: {entered.stderr.strip()}" if entered.returncode else None


def find(tool: str) -> str | None:
    """A tool's path; administrators' folders are not on every PATH."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def in_namespace(namespace: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    words = [str(find("ip")), "netns", "exec", namespace, *command]
    return subprocess.run(words, capture_output=True, text=True)


class TwoHosts:
    """Hosts `first` and `second`, reachable by these names through ssh from both of them.

    Attributes:
        addresses: of `first` and `second`.
        path: value of PATH with the settings of ssh in front.
    """

    addresses = ADDRESSES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = [f"dsee-{os.getpid()}-{name}" for name in NAMES]
        self.path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self, host: int, command: Sequence[str], log: Path, **options: object
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output goes to `log`."""
        words = [str(find("ip")), "netns", "exec", self.namespaces[host], *command]
        with log.open("ab") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **options
            )  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def set_link(self, state: str) -> None:
        """Plug the cable between the hosts in (`up`), or pull it out (`down`)."""
        for name in self.namespaces:
            command = [str(find("ip")), "-n", name, "link", "set", INTERFACE, state]
            subprocess.run(command, check=True)

    def processes(self) -> list[int]:
        """Ids of all that runs on the two hosts."""
        listed = [
            subprocess.run([str(find("ip")), "netns", "pids", name], capture_output=True, text=True).stdout
            for name in self.namespaces
        ]
        return [int(word) for text in listed for word in text.split()]

    def set_up(self) -> None:
        ip = str(find("ip"))
        for name in self.namespaces:
            subprocess.run([ip, "netns", "add", name], check=True)
        ends = [["name", INTERFACE, "netns", name] for name in self.namespaces]
        subprocess.run([ip, "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for name, address in zip(self.namespaces, ADDRESSES, strict=True):
            subprocess.run([ip, "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE], check=True)
            for interface in ("lo", INTERFACE):
                subprocess.run([ip, "-n", name, "link", "set", interface, "up"], check=True)
        self._write_keys()
        for host in range(2):
            self._start_sshd(host)

    def tear_down(self) -> None:
        for _ in range(20):
            alive = self.processes()
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if not alive:
                break
            time.sleep(0.1)
        for process in self.started:
            process.wait()
        for name in self.namespaces:
            subprocess.run([str(find("ip")), "netns", "delete", name], check=False, capture_output=True)

    def _write_keys(self) -> None:
        for name in ("host_key", "user_key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True)
        settings = [f"IdentityFile {self.folder / 'user_key'}", "IdentitiesOnly yes", "BatchMode yes"]
        settings += ["StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR"]
        lines = ["Host *", *(f"  {line}" for line in settings)]
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            lines += [f"Host {name}", f"  HostName {address}"]
        (self.folder / "ssh_config").write_text("\n".join(lines) + "\n")
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} -F {self.folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)

    def _start_sshd(self, host: int) -> None:
        settings = [f"ListenAddress {ADDRESSES[host]}", f"HostKey {self.folder / 'host_key'}"]
        settings += [f"AuthorizedKeysFile {self.folder / 'user_key.pub'}", "StrictModes no", "UsePAM no"]
        settings += ["PermitRootLogin prohibit-password", "PasswordAuthentication no", "PidFile none"]
        config = self.folder / f"sshd_{NAMES[host]}"
        config.write_text("\n".join(settings) + "\n")
        log = self.folder / f"sshd_{NAMES[host]}.log"
        self.start(host, [str(find("sshd")), "-D", "-e", "-f", str(config)], log)
        for _ in range(100):
            reached = in_namespace(
                self.namespaces[0], [str(self.folder / "bin" / "ssh"), NAMES[host], "true"]
            )
            if reached.returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"sshd does not answer on {NAMES[host]}: {reached.stderr}\n{log.read_text()}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Set the hosts up, and take them down whatever happens."""
    hosts = TwoHosts(folder)
    # Compiled into sshd on Debian; absent until its service has run once.
    made_folder = not SSHD_FOLDER.exists()
    if made_folder:
        SSHD_FOLDER.mkdir(mode=0o755)
    # A run that is told to end still takes the hosts down.
    on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        hosts.set_up()
        yield hosts
    finally:
        signal.signal(signal.SIGTERM, on_term)
        hosts.tear_down()
        if made_folder:
            SSHD_FOLDER.rmdir()


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what says that it is part of a run already."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in own} | dict(extra)
