#!/usr/bin/env python3
"""The promises of queuectl, made executable: against a real server, started once.

    python3 -m unittest -v test_queuectl

uses the mysqld or mariadbd of this machine, or the one that QUEUECTL_TEST_MYSQLD names.
QUEUECTL_SLOW_TESTS=1 adds the tests that take their real time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Callable, Iterator, Mapping, Sequence

import pymysql

import queuectl
from queuectl import State

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "queuectl.py")
TABLES = ("jobs", "dependencies", "runs", "dlq", "workers", "queues", "schedules")
# A tenth of the real times: a lease of 3 s, and nothing waits longer than it must.
SCALED = {
    "QUEUECTL_HEARTBEAT": "0.5", "QUEUECTL_WORKER_TIMEOUT": "3",
    "QUEUECTL_POLL_INTERVAL": "0.2", "QUEUECTL_KILL_GRACE": "1",
    "QUEUECTL_BACKOFF_MAX": "0.3"}
slow = unittest.skipUnless(os.environ.get("QUEUECTL_SLOW_TESTS"), "QUEUECTL_SLOW_TESTS=1")


def setUpModule() -> None:
    """One server for all tests, in a folder of its own, gone at the end."""
    folder = tempfile.mkdtemp(prefix="queuectl-test-")
    unittest.addModuleCleanup(shutil.rmtree, folder, True)
    QueueCase.server = queuectl.PrivateServer(
        os.path.join(folder, "server"), os.environ.get("QUEUECTL_TEST_MYSQLD", ""))
    QueueCase.server.start()
    unittest.addModuleCleanup(QueueCase.server.stop)
    environment = {"DB_SOCKET": QueueCase.server.socket, "DB_USER": "root"}
    subprocess.run([sys.executable, SCRIPT, "db", "init"], check=True, cwd=folder,
                   stdout=subprocess.DEVNULL, env={**plain_environment(), **environment})


def plain_environment() -> dict[str, str]:
    """This process's variables, less all that would configure queuectl."""
    return {name: value for name, value in os.environ.items()
            if not re.match(r"DB_|DATABASE_URL|QUEUECTL_|PID_FILE", name)}


class Background:
    """A queuectl that runs beside the test: its process, and what it printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: str) -> None:
        self.process, self.log, self.pid = process, log, process.pid

    def said(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def children(self) -> list[int]:
        """The pids of its worker processes."""
        path = f"/proc/{self.pid}/task/{self.pid}/children"
        with contextlib.suppress(OSError), open(path) as file:
            return [int(word) for word in file.read().split()]
        return []


class QueueCase(unittest.TestCase):
    """An empty queue, and the words the tests are written in."""

    server: queuectl.PrivateServer
    settings: Mapping[str, str] = SCALED

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="queuectl-case-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.environment = {**plain_environment(), "DB_SOCKET": self.server.socket,
                            "DB_USER": "root", **self.settings}
        self.database = pymysql.connect(unix_socket=self.server.socket, user="root",
                                        database="queuectl", autocommit=True,
                                        ssl_disabled=True, charset="utf8mb4")
        self.addCleanup(self.database.close)
        for table in TABLES:
            self.sql(f"DELETE FROM {table}")
        self.sql("DELETE FROM config WHERE `key` <> 'schema_version'")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def sql(self, query: str, *arguments: object) -> list[tuple[object, ...]]:
        with self.database.cursor() as cursor:
            cursor.execute(query, arguments or None)
            return list(cursor.fetchall())

    def run_queuectl(self, *argv: str, stdin: bytes = b"",
                     **variables: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, SCRIPT, *argv], input=stdin, cwd=self.folder,
                              capture_output=True, timeout=60, check=False,
                              env={**self.environment, **variables})

    def queuectl(self, *argv: str, status: int = 0, stdin: bytes = b"",
                 **variables: str) -> str:
        """Run a command that must end with `status`; its standard output."""
        done = self.run_queuectl(*argv, stdin=stdin, **variables)
        self.assertEqual(done.returncode, status, f"queuectl {' '.join(argv)}\n"
                         f"{done.stdout.decode()}\n{done.stderr.decode()}")
        self.assertNotIn(b"Traceback", done.stderr)
        self.errors = done.stderr.decode()
        return done.stdout.decode()

    def enqueue(self, command: str, **keys: object) -> str:
        """The id of a new job."""
        return self.queuectl("enqueue", json.dumps({"command": command, **keys})).strip()

    def show(self, job_id: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.queuectl("show", job_id, "--json"))
        return found

    def start(self, *argv: str, **variables: str) -> Background:
        """A queuectl in the background, ended with all that it started after the test."""
        log = self.path(f"background-{time.monotonic_ns()}.log")
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, *argv], cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, start_new_session=True,
                env={**self.environment, **variables})
        found = Background(process, log)
        self.addCleanup(self.end, found)
        return found

    def worker(self, *argv: str, **variables: str) -> Background:
        """A `worker start`, returned once its first process is ready."""
        found = self.start("worker", "start", *argv, **variables)
        self.wait_until(lambda: "ready, serving" in found.said()
                        or found.process.poll() is not None, "the worker is ready")
        return found

    def end(self, background: Background) -> None:
        """Kill a background process, its workers and their jobs."""
        tree = [background.pid, *descendants(background.pid)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        background.process.wait()

    def drain(self, *argv: str, **variables: str) -> None:
        """Run workers until nothing is left to run."""
        worker = self.start("worker", "start", "--drain", *argv, **variables)
        self.assertEqual(worker.wait(60), 0, worker.said())

    def state(self, job_id: str) -> str:
        rows = self.sql("SELECT state FROM jobs WHERE id = %s", job_id)
        return str(rows[0][0]) if rows else "absent"

    def assert_state(self, job_id: str, state: State) -> None:
        self.assertEqual(self.state(job_id), state)

    def wait_state(self, job_id: str, state: State, timeout: float = 30) -> None:
        self.wait_until(lambda: self.state(job_id) == state,
                        f"job {job_id} is {state}", timeout)

    def wait_until(self, condition: Callable[[], object], what: str,
                   timeout: float = 30) -> None:
        """The only way to wait."""
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                self.fail(f"not within {timeout} s: {what}")
            time.sleep(0.02)

    def lines(self, name: str) -> list[str]:
        """The lines of a file that jobs wrote, none if it is not there."""
        with contextlib.suppress(FileNotFoundError), open(self.path(name)) as file:
            return file.read().splitlines()
        return []


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, by their parents."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents.setdefault(int(file.read().rsplit(") ", 1)[1].split()[1]), []).append(
                    int(name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


if __name__ == "__main__":
    unittest.main()
