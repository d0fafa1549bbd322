#!/usr/bin/env python3
"""The promises of queuectl, made executable: against a real server, started once.

    python3 -m unittest -v test_queuectl

uses the mysqld or mariadbd of this machine, or the one that QUEUECTL_TEST_MYSQLD names.
QUEUECTL_SLOW_TESTS=1 adds the tests that take their real time.
"""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

import ast
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import unittest
import unittest.mock
import uuid
import warnings
from typing import IO, Callable, Iterator, Mapping, NoReturn, Optional, Sequence

import pymysql

import queuectl
from queuectl import State

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "queuectl.py")
TABLES = ("jobs", "dependencies", "runs", "dlq", "workers", "queues", "schedules")
# A tenth of the real times: a lease of 3 s, and nothing waits longer than it must.
SCALED = {
    "QUEUECTL_HEARTBEAT": "0.5",
    "QUEUECTL_WORKER_TIMEOUT": "3",
    "QUEUECTL_POLL_INTERVAL": "0.2",
    "QUEUECTL_KILL_GRACE": "1",
    "QUEUECTL_BACKOFF_MAX": "0.3",
}
# The program by a door that keeps the compiled file, which spares 0.12 s of each start.
# With the path of a socket it is loaded once, and forks for each command that comes by
# it, which spares as much again.
DOOR_PY = """
import json, os, signal, socket, sys, time

sys.pycache_prefix = %(folder)r
sys.dont_write_bytecode = False
sys.path[0] = %(here)r
import queuectl


def serve(listener):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return asked
        asked.close()


def become_command(asked):
    _, streams, _, _ = socket.recv_fds(asked, 1, 3)
    command = json.loads(asked.makefile().read())
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        asked.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    asked.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    time.tzset()
    sys.argv[1:] = command["argv"]


if sys.argv[1:2] == ["--forks"]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[2])
    listener.listen(16)
    print(flush=True)
    become_command(serve(listener))
sys.exit(queuectl.main())
"""
slow = unittest.skipUnless(
    os.environ.get("QUEUECTL_SLOW_TESTS"), "QUEUECTL_SLOW_TESTS=1"
)


def setUpModule() -> None:
    """One server for all tests, in a folder of its own, gone at the end."""
    folder = tempfile.mkdtemp(prefix="queuectl-test-")
    unittest.addModuleCleanup(shutil.rmtree, folder, True)
    QueueCase.server = queuectl.PrivateServer(
        os.path.join(folder, "server"), os.environ.get("QUEUECTL_TEST_MYSQLD", "")
    )
    QueueCase.server.start()
    unittest.addModuleCleanup(QueueCase.server.stop)
    QueueCase.door = os.path.join(folder, "door.py")
    with open(QueueCase.door, "w") as file:
        file.write(DOOR_PY % {"folder": folder, "here": HERE})
    QueueCase.forks = Forks(QueueCase.door, os.path.join(folder, "forks"))
    unittest.addModuleCleanup(QueueCase.forks.close)
    with QueueCase.connection(password="", database=None) as database:
        database.cursor().execute(
            "ALTER USER root@localhost IDENTIFIED BY %s", (QueueCase.password,)
        )
    subprocess.run(
        [sys.executable, SCRIPT, "db", "init"],
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        env={
            **plain_environment(),
            "DB_SOCKET": QueueCase.server.socket,
            "DB_USER": "root",
            "DB_PASSWORD": QueueCase.password,
        },
    )


class Forks:
    """A process that has the program loaded, and forks for each command."""

    def __init__(self, door: str, path: str) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", door, "--forks", path],
            stdout=subprocess.PIPE,
            env=plain_environment(),
        )
        assert self.process.stdout
        self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def run(
        self, argv: Sequence[str], stdin: bytes, cwd: str, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[bytes]:
        """What a command came to, within 60 s."""
        command = {"argv": argv, "cwd": cwd, "env": env}
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            streams[0].write(stdin)
            streams[0].seek(0)
            ours = stack.enter_context(socket.socket(socket.AF_UNIX))
            ours.settimeout(60)
            ours.connect(self.path)
            socket.send_fds(ours, [b"!"], [stream.fileno() for stream in streams])
            ours.sendall(json.dumps(command).encode())
            ours.shutdown(socket.SHUT_WR)
            status = int(ours.recv(16))
            for stream in streams:
                stream.seek(0)
            said = [stream.read() for stream in streams[1:]]
        return subprocess.CompletedProcess(argv, status, *said)


class Reported(unittest.TestCase):
    """A test that another process has run."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def runTest(self) -> None:
        """Never called: it has been."""

    def id(self) -> str:
        return self.name

    __str__ = id


class Shards(unittest.TestSuite):
    """All classes, run by several processes, each with a server of its own.

    Tests wait more than they work: so they need half the time. A process takes one
    class after the other; those that take longest come first.
    """

    slowest = "Torture Crashes Running Resets SlowWires Clusters StopAndReload Outages"

    def __init__(self, names: Sequence[str], shards: int) -> None:
        super().__init__()
        first = self.slowest.split()
        self.names = sorted(names, key=lambda name: name not in first)
        self.shards = min(shards, len(names))
        self.count = 0

    def countTestCases(self) -> int:
        return self.count

    def run(
        self, result: unittest.TestResult, debug: bool = False
    ) -> unittest.TestResult:
        names = iter(self.names)
        poll = selectors.DefaultSelector()
        sockets: list[socket.socket] = []
        for _ in range(self.shards):
            ours, theirs = socket.socketpair()
            if not os.fork():
                ours.close()
                for key in poll.get_map().values():
                    os.close(key.fd)
                self.serve(theirs.makefile("rw"))
            theirs.close()
            sockets.append(ours)
            poll.register(ours, selectors.EVENT_READ, ours.makefile("rw"))
        while poll.get_map():
            for key, _ in poll.select():
                line = key.data.readline()
                if line:
                    self.take(result, json.loads(line))
                name = next(names, "") if line else ""
                with contextlib.suppress(BrokenPipeError):  # it died
                    print(name, file=key.data, flush=True)
                if not (line and name):
                    poll.unregister(key.fileobj)
                    key.data.close()
        for ours in sockets:
            ours.close()
        while True:
            try:
                _, status = os.wait()
            except ChildProcessError:
                return result
            if status:
                why = f"a process of the tests ended with status {status}"
                result.errors.append((Reported("shard"), why))

    @staticmethod
    def take(result: unittest.TestResult, news: dict[str, list[list[str]]]) -> None:
        """Add what another process has found."""
        result.testsRun += len(news["ran"])
        for kind in ("failures", "errors", "skipped"):
            told = [(Reported(name), text) for name, text in news[kind]]
            getattr(result, kind).extend(told)
        for mark, kind in (("F", "failures"), ("E", "errors"), ("s", "skipped")):
            print(mark * len(news[kind]), end="", file=sys.stderr)
        well = len(news["ran"]) - sum(map(len, news.values())) + len(news["ran"])
        print("." * max(0, well), end="", file=sys.stderr, flush=True)

    @staticmethod
    def serve(parent: IO[str]) -> NoReturn:
        """Run the classes that the parent names, and tell it what came of each."""
        result = Recorder()
        # As if all classes were one suite: else each would start a server.
        setattr(result, "_testRunEntered", True)  # noqa: B010
        status = 1
        try:
            while True:
                print(json.dumps(result.news()), file=parent, flush=True)
                name = parent.readline().strip()
                if not name:
                    break
                loader = unittest.defaultTestLoader
                loader.loadTestsFromTestCase(globals()[name]).run(result)
            unittest.case.doModuleCleanups()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


class Recorder(unittest.TestResult):
    """What a process of the tests has found since it was asked last."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.ran.append(test.id())

    def news(self) -> dict[str, list[list[str]]]:
        found = {
            "ran": [[name] for name in self.ran],
            "failures": [[str(test), text] for test, text in self.failures],
            "errors": [[str(test), text] for test, text in self.errors],
            "skipped": [[str(test), text] for test, text in self.skipped],
        }
        self.ran = []
        self.failures, self.errors, self.skipped = [], [], []
        return found


def load_tests(
    loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None
) -> unittest.TestSuite:
    """The whole module is run in shards: QUEUECTL_SHARDS of them, 1 for none."""
    shards = int(os.environ.get("QUEUECTL_SHARDS", (os.cpu_count() or 1) + 1))
    if shards == 1:
        return tests
    names = [type(next(iter(suite))).__name__ for suite in tests if list(suite)]
    return Shards(names, shards)


def read_file(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def plain_environment() -> dict[str, str]:
    """This process's variables, less all that would configure queuectl."""
    return {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"DB_|DATABASE_URL|QUEUECTL_|PID_FILE", name)
    }


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
        return children_of(self.pid)


class QueueCase(unittest.TestCase):
    """An empty queue, and the words the tests are written in.

    Whatever a test makes queuectl say, log, store or give to a job is searched for the
    password of the database.
    """

    server: queuectl.PrivateServer
    door: str
    forks: Forks
    script = SCRIPT
    password = secrets.token_hex(12)
    settings: Mapping[str, str] = SCALED

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="queuectl-case-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.environment = {
            **plain_environment(),
            "DB_SOCKET": self.server.socket,
            "DB_USER": "root",
            "DB_PASSWORD": self.password,
            **self.settings,
        }
        self.database = self.connection()
        self.addCleanup(self.database.close)
        self.addCleanup(self.search_for_the_password)
        for table in TABLES:
            self.sql(f"DELETE FROM {table}")
        self.sql("DELETE FROM config WHERE `key` <> 'schema_version'")

    @classmethod
    def connection(
        cls,
        database: str | None = "queuectl",
        password: str | None = None,
        autocommit: bool = True,
    ) -> pymysql.connections.Connection:
        """A connection as root to the server of all tests."""
        return pymysql.connect(
            unix_socket=cls.server.socket,
            user="root",
            password=cls.password if password is None else password,
            database=database,
            autocommit=autocommit,
            ssl_disabled=True,
            charset="utf8mb4",
        )

    def search_for_the_password(self) -> None:
        """In all files that the test has left, and in what the tables keep of jobs."""
        for where, _, names in os.walk(self.folder):
            for path in (os.path.join(where, name) for name in names):
                if os.path.isfile(path):
                    with open(path, "rb") as file:
                        self.assertNotIn(self.password.encode(), file.read(), path)
        for table, column in (("runs", "output"), ("runs", "detail"), ("jobs", "env")):
            self.assertEqual(
                self.sql(
                    f"SELECT COUNT(*) FROM queuectl.{table} WHERE {column} LIKE %s",
                    f"%{self.password}%",
                ),
                [(0,)],
                f"{table}.{column}",
            )

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def sql(self, query: str, *arguments: object) -> list[tuple[object, ...]]:
        with self.database.cursor() as cursor:
            cursor.execute(query, arguments or None)
            return list(cursor.fetchall())

    def run_queuectl(
        self, *argv: str, stdin: bytes = b"", **variables: str
    ) -> subprocess.CompletedProcess[bytes]:
        env = {**self.environment, **variables}
        # What a process was started with stays its environment in /proc, and Python
        # reads its own variables and the locale as it starts.
        differ = {name for name in env if env[name] != os.environ.get(name)}
        early = ("PYTHON", "LC_", "LANG")
        afresh = argv[1:2] == ("start",) or any(
            name.startswith(early) for name in differ
        )
        if afresh or self.door != QueueCase.door:
            done = subprocess.run(
                [sys.executable, self.door, *argv],
                input=stdin,
                cwd=self.folder,
                capture_output=True,
                timeout=60,
                check=False,
                env=env,
            )
        else:
            done = self.forks.run(argv, stdin, self.folder, env)
        self.assertNotIn(self.password.encode(), done.stdout + done.stderr)
        return done

    def queuectl(
        self, *argv: str, status: int = 0, stdin: bytes = b"", **variables: str
    ) -> str:
        """Run a command that must end with `status`; its standard output."""
        done = self.run_queuectl(*argv, stdin=stdin, **variables)
        self.assertEqual(
            done.returncode,
            status,
            f"queuectl {' '.join(argv)}\n"
            f"{done.stdout.decode()}\n{done.stderr.decode()}",
        )
        self.assertNotIn(b"Traceback", done.stderr)
        self.errors = done.stderr.decode()
        return done.stdout.decode()

    def enqueue(self, command: str, **keys: object) -> str:
        """The id of a new job."""
        return self.queuectl(
            "enqueue", json.dumps({"command": command, **keys})
        ).strip()

    def show(self, job_id: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.queuectl("show", job_id, "--json"))
        return found

    def start(self, *argv: str, **variables: str) -> Background:
        """A queuectl in the background; all that it started ends with the test."""
        log = self.path(f"background-{time.monotonic_ns()}.log")
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [
                    sys.executable,
                    self.door if self.script == SCRIPT else self.script,
                    *argv,
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**self.environment, **variables},
            )
        found = Background(process, log)
        self.addCleanup(self.end, found)
        return found

    def worker(self, *argv: str, **variables: str) -> Background:
        """A `worker start`, returned once its first process is ready."""
        found = self.start("worker", "start", *argv, **variables)
        self.wait_until(
            lambda: (
                "ready, serving" in found.said() or found.process.poll() is not None
            ),
            "the worker is ready",
        )
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

    def assert_state(self, job_id: str, state: str) -> None:
        self.assertEqual(self.state(job_id), state)

    def wait_state(self, job_id: str, state: State, timeout: float = 30) -> None:
        self.wait_until(
            lambda: self.state(job_id) == state, f"job {job_id} is {state}", timeout
        )

    def wait_until(
        self, condition: Callable[[], object], what: str, timeout: float = 30
    ) -> None:
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


def ignore_resources(case: unittest.TestCase) -> None:
    """Have a test say nothing of what it leaves open."""
    context = warnings.catch_warnings()
    context.__enter__()
    case.addCleanup(context.__exit__, None, None, None)
    warnings.simplefilter("ignore", ResourceWarning)


def children_of(pid: int) -> list[int]:
    """The pids of a process's children, none if it is gone."""
    path = f"/proc/{pid}/task/{pid}/children"
    with contextlib.suppress(OSError), open(path) as file:
        return [int(word) for word in file.read().split()]
    return []


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, by their parents."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents.setdefault(
                    int(file.read().rsplit(") ", 1)[1].split()[1]), []
                ).append(int(name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


class WorkCase(QueueCase):
    """The words for what workers do. All that a test starts carries its mark."""

    def setUp(self) -> None:
        super().setUp()
        self.environment["TEST_CASE"] = self.folder
        self.addCleanup(self.sweep)

    def worker_under(self, *wrap: str, count: int = 1) -> Background:
        """A worker that another program starts, once its first process is ready."""
        log = self.path(f"background-{time.monotonic_ns()}.log")
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [
                    *(*wrap, sys.executable, self.door),
                    *("worker", "start", f"--count={count}"),
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=self.environment,
            )
        found = Background(process, log)
        self.addCleanup(self.end, found)
        self.wait_until(lambda: "ready, serving" in found.said(), "the worker is ready")
        return found

    def living(self) -> list[int]:
        """The processes that this test started, or they did, less the zombies."""
        mark, found = f"TEST_CASE={self.folder}".encode(), []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{name}/environ", "rb") as file,
            ):
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
        return found

    def sweep(self) -> None:
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def disk(self, size: str) -> str:
        """The path of a disk of its own, of this size."""
        path = self.path("disk")
        os.mkdir(path)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            self.skipTest("cannot mount")
        self.addCleanup(subprocess.run, ["umount", "-l", path], check=False)
        return path

    def hung_directory(self) -> str:
        """The path of a directory that never answers: its file server is silent."""
        path = self.path("hung")
        os.mkdir(path)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            server = os.open("/dev/fuse", os.O_RDWR)
        except OSError as error:
            self.skipTest(f"no file server of our own: {error}")
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"hung", path.encode(), b"fuse", 0, options):
            os.close(server)
            self.skipTest(f"cannot mount: {os.strerror(ctypes.get_errno())}")
        mnt_detach = 2
        self.addCleanup(libc.umount2, path.encode(), mnt_detach)
        # Whoever waits for it gets an error then.
        self.addCleanup(os.close, server)
        return path

    def reach(self, **variables: str) -> queuectl.Database:
        """The program's own way into the database."""
        environment = {**self.environment, **variables}
        target = queuectl.find_connection(
            queuectl.Environment((("test", environment),))
        )
        database = queuectl.Database(target, queuectl.WRITING)
        self.addCleanup(database.close)
        return database

    def turns(
        self, *, skip_locked: bool = True, **variables: str
    ) -> queuectl.TurnTaker:
        """What takes a worker's turns, without a worker."""
        name = f"turns-{secrets.token_hex(4)}"
        me = queuectl.WorkerIdentity(name, "here", 0, 0, "", 100, ())
        turns = queuectl.TurnTaker(self.reach(**variables), me, skip_locked)
        queuectl.register(turns.database, me, turns.settings.lease_s)
        return turns

    def put(self, command: str, **columns: object) -> str:
        """The id of a job that was INSERTed, as an application does it."""
        values = {"id": queuectl.new_id(), "command": command, **columns}
        job_id = str(values["id"])
        self.sql(
            f"INSERT INTO jobs ({', '.join(values)}) "
            f"VALUES ({', '.join(['%s'] * len(values))})",
            *values.values(),
        )
        return job_id

    def put_many(self, count: int, command: str, **columns: object) -> None:
        values = {"command": command, **columns}
        row = f"({', '.join(['%s'] * len(values))})"
        self.sql(
            f"INSERT INTO jobs ({', '.join(values)}) VALUES {', '.join([row] * count)}",
            *[*values.values()] * count,
        )

    def job(self, job_id: str, *columns: str) -> tuple[object, ...]:
        return self.sql(f"SELECT {', '.join(columns)} FROM jobs WHERE id = %s", job_id)[
            0
        ]

    def runs(self, job_id: str, *columns: str) -> list[tuple[object, ...]]:
        """These columns of a job's history, the first run first."""
        return self.sql(
            f"SELECT {', '.join('runs.' + one for one in columns or ('reason',))} "
            "FROM runs JOIN jobs ON job_seq = seq WHERE id = %s ORDER BY run",
            job_id,
        )

    def reasons(self, job_id: str) -> list[object]:
        return [row[0] for row in self.runs(job_id, "reason")]

    @contextlib.contextmanager
    def locked(self, query: str, *arguments: object) -> Iterator[None]:
        """A stranger holds what this locking query reads."""
        stranger = self.connection(autocommit=False)
        try:
            stranger.cursor().execute(query, arguments)
            yield
        finally:
            stranger.close()

    def counts(self) -> dict[object, object]:
        return dict(self.sql("SELECT state, COUNT(*) FROM jobs GROUP BY state"))

    def wait_lines(self, name: str, count: int, timeout: float = 30) -> list[str]:
        """The lines of a file, once there are so many."""
        self.wait_until(
            lambda: len(self.lines(name)) >= count, f"{count} lines in {name}", timeout
        )
        return self.lines(name)

    def stop_now(self, worker: Background) -> None:
        """Ask twice."""
        for said in ("once more", "ended and handed back"):
            worker.signal(signal.SIGTERM)
            self.wait_until(functools.partial(self.has_said, worker, said), said)

    @staticmethod
    def has_said(worker: Background, text: str) -> bool:
        return text in worker.said()

    def wait_beats(self, count: int) -> None:
        """Until every worker has looked around so many times more."""
        for worker, beat in self.sql("SELECT id, beat FROM workers"):
            self.wait_until(
                lambda: self.sql(
                    "SELECT 1 FROM workers WHERE id = %s AND beat >= %s + %s",
                    worker,
                    beat,
                    count,
                ),
                f"{count} beats",
            )

    def wait_ended(self, count: int, timeout: float = 60) -> None:
        """Until so many jobs are completed."""
        self.wait_until(
            lambda: self.counts().get("completed") == count,
            f"{count} jobs are completed",
            timeout,
        )


def cpu_seconds(pid: int) -> float:
    """The CPU time of a living process."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(") ", 1)[1][0] not in "ZX"
    return False


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# A job's own book: `starts` gets its id, pid and time; `overlaps` its id if the process
# of its last run still lives.
BOOKED = """book=book.$QUEUECTL_JOB_ID
if [ -e $book ] && grep -qs '^State:[^Z]*$' "/proc/$(cat $book)/status"
then echo $QUEUECTL_JOB_ID >> overlaps; fi
echo $$ > $book
echo $QUEUECTL_JOB_ID $$ $(date +%s.%N) >> starts
"""
# True in a job's first run only.
FIRST = '[ "$(grep -c $QUEUECTL_JOB_ID starts)" = 1 ]'
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
can_unshare = unittest.skipUnless(
    subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode
    == 0,
    "needs the right to make a PID namespace",
)


COMMIT = re.compile(rb"COMMIT(?!TED)")  # and not the isolation level


class Proxy:
    """A TCP door to the server's socket. `pass_on` and `hold` what comes, `refuse` new
    connections, `cut` the open ones."""

    def __init__(self, to: str) -> None:
        self.to, self.port = to, 0
        self.open = threading.Event()
        self.faults: list[str] = []  # of one COMMIT after the other; "": none
        self.random, self.resets = random.Random(), 0
        self.reset_chance = 0.0  # of each packet, in either direction
        self.sockets: list[socket.socket] = []
        self.listener: socket.socket | None = None
        self.pass_on()

    def variables(self) -> dict[str, str]:
        """What has a program go through this door, in the clear."""
        return {
            "DB_SOCKET": "",
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(self.port),
            "DB_SSL_MODE": "disabled",
        }

    def pass_on(self) -> None:
        self.open.set()
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self.listener.getsockname()[1]
            threading.Thread(
                target=self._accept, args=(self.listener,), daemon=True
            ).start()

    def hold(self) -> None:
        """Answer nothing any more, but stay connected: a black hole."""
        self.open.clear()

    def refuse(self) -> None:
        listener, self.listener = self.listener, None
        if listener:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def cut(self) -> None:
        sockets, self.sockets = self.sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.refuse()
        self.cut()
        self.open.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self.sockets += [client, server]
            threading.Thread(
                target=self._serve, args=(client, server), daemon=True
            ).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            self.open.wait()
            with contextlib.suppress(OSError):
                server.connect(self.to)
                back = threading.Thread(
                    target=self._pump, args=(server, client), daemon=True
                )
                back.start()
                self._pump(client, server)
                back.join()

    def _lose(self, data: bytes, client: socket.socket, server: socket.socket) -> bool:
        """Have a COMMIT's answer lost: it is carried out, or not, or once the client
        has gone; False if this one is to pass."""
        fault = self.faults.pop(0) if self.faults else ""
        if fault:
            client.shutdown(socket.SHUT_RDWR)
        if fault == "late":
            time.sleep(1)
        if fault in ("after", "late"):
            server.sendall(data)
            server.recv(4096)
        return bool(fault)

    def _reset(self, *sockets: socket.socket) -> None:
        """Break off at both ends; a close without time to linger is a reset."""
        self.resets += 1
        for one in sockets:
            no_time = struct.pack("ii", 1, 0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_time)

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                self.open.wait()
                commits = COMMIT.search(data) and to.family == socket.AF_UNIX
                if not data or (commits and self._lose(data, source, to)):
                    break
                if self.random.random() < self.reset_chance:
                    self._reset(source, to)
                    break
                to.sendall(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class CuttingProxy(Proxy):
    """A door that passes `word` on, and cuts before the answer: once, or for good."""

    def __init__(self, to: str, word: bytes, once: bool) -> None:
        self.word, self.once, self.cuts = word, once, 0
        super().__init__(to)

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if self.word in data and not (self.once and self.cuts):
                    self.cuts += 1
                    source.shutdown(socket.SHUT_RDWR)
                    to.sendall(data)
                    if not self.once:
                        self.refuse()
                    break
                to.sendall(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_WR)


class StoppingProxy(Proxy):
    """A door that stops the process `victim` before its claim's COMMIT is passed on."""

    victim = 0

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.victim and b"'processing'" in data and COMMIT.search(data):
                    victim, self.victim = self.victim, 0
                    os.kill(victim, signal.SIGSTOP)
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_RDWR)


class DesignTest(unittest.TestCase):
    """What the design says of the file, held against the file."""

    text: str
    lines: list[str]
    tree: ast.Module
    rooms: list[tuple[str, int]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = read_file("queuectl.py")
        cls.lines = cls.text.splitlines()
        cls.tree = ast.parse(cls.text, feature_version=(3, 9))
        banners = [
            (line, at)
            for at, line in enumerate(cls.lines, 1)
            if line.startswith("# ---- ")
        ]
        cls.rooms = [(line.strip("# -"), at) for line, at in banners]

    def room_of(self, line: int) -> str:
        return [name for name, at in self.rooms if at <= line][-1]

    def functions(self) -> list[ast.FunctionDef]:
        return [one for one in ast.walk(self.tree) if isinstance(one, ast.FunctionDef)]

    def test_the_map_names_the_rooms_in_their_order(self) -> None:
        mapped = re.findall(
            r"(?m)^    (\w+(?: \w+)?) {2,}\S", ast.get_docstring(self.tree) or ""
        )
        self.assertEqual(mapped, [name for name, _ in self.rooms])

    def test_no_room_uses_a_name_of_a_room_below_it(self) -> None:
        table = symtable.symtable(self.text, "queuectl.py", "exec")
        defined: dict[str, int] = {}
        for node in self.tree.body:
            names = (
                [node.name]
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                else [
                    one.id
                    for one in ast.walk(node)
                    if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
                ]
            )
            for name in names:
                defined.setdefault(name, node.lineno)
        order = [name for name, _ in self.rooms]
        first = self.rooms[0][1]

        def look(scope: symtable.SymbolTable) -> None:
            for inner in scope.get_children():
                look(inner)
            if scope.get_type() == "module" or scope.get_lineno() < first:
                return
            here = order.index(self.room_of(scope.get_lineno()))
            for symbol in scope.get_symbols():
                at = defined.get(symbol.get_name(), 0)
                if at >= first and symbol.is_global() and symbol.is_referenced():
                    there = order.index(self.room_of(at))
                    self.assertLessEqual(
                        there,
                        here,
                        f"{scope.get_name()} (line "
                        f"{scope.get_lineno()}) uses {symbol.get_name()}",
                    )

        look(table)

    @staticmethod
    def size(function: ast.FunctionDef) -> int:
        """Its lines, less those of its docstring."""
        text = ast.get_docstring(function, clean=False) or ""
        lines = (function.end_lineno or 0) - function.lineno + 1
        return lines - len(text.splitlines())

    def test_functions_are_short_and_take_few_arguments(self) -> None:
        sizes = sorted(self.size(one) for one in self.functions())
        self.assertLessEqual(sizes[int(len(sizes) * 0.9)], 25)
        for one in self.functions():
            self.assertLessEqual(self.size(one), 60, one.name)
            taken = [
                arg
                for arg in (*one.args.args, *one.args.kwonlyargs)
                if arg.arg not in ("self", "cls")
            ]
            self.assertLessEqual(len(taken), 5, one.name)

    def test_no_name_is_given_twice(self) -> None:
        """In one file the later one would silently take the place of the other."""
        given: list[str] = []
        for one in self.tree.body:
            if isinstance(one, (ast.FunctionDef, ast.ClassDef)):
                given.append(one.name)
            elif isinstance(one, (ast.Assign, ast.AnnAssign)):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                names = [name for target in targets for name in ast.walk(target)]
                given += [name.id for name in names if isinstance(name, ast.Name)]
        self.assertEqual(
            [name for name, times in collections.Counter(given).items() if times > 1],
            [],
        )

    def test_classes_are_small(self) -> None:
        for one in ast.walk(self.tree):
            if not isinstance(one, ast.ClassDef):
                continue
            methods = [part for part in one.body if isinstance(part, ast.FunctionDef)]
            attributes = {
                part.attr
                for part in ast.walk(one)
                if isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
            }
            lines = (one.end_lineno or 0) - one.lineno + 1
            self.assertLessEqual(lines, 300, one.name)
            self.assertLessEqual(len(methods), 20, one.name)
            self.assertLessEqual(len(attributes), 12, one.name)

    def test_what_is_longer_than_six_lines_says_what_the_caller_gets(self) -> None:
        for one in ast.walk(self.tree):
            if isinstance(one, ast.ClassDef) or (
                isinstance(one, ast.FunctionDef) and self.size(one) > 6
            ):
                self.assertTrue(ast.get_docstring(one), f"{one.name}, {one.lineno}")

    def test_there_is_air_between_the_thoughts(self) -> None:
        written = [line for line in self.lines if line.strip()]
        comments = [line for line in written if line.strip().startswith("#")]
        docstrings: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef)
            ) and ast.get_docstring(node):
                text = node.body[0]
                docstrings |= set(range(text.lineno, (text.end_lineno or 0) + 1))
        code = len(written) - len(comments) - len(docstrings)
        nodes = sum(1 for _ in ast.walk(self.tree))
        self.assertLess(nodes / code, 9.0)
        long = [line for line in written if len(line) >= 80]
        self.assertLess(len(long) / len(written), 0.05)
        self.assertGreater(len(comments) / len(written), 0.08)

    def test_no_line_is_longer_than_88_columns(self) -> None:
        for name in ("queuectl.py", "test_queuectl.py", "migrations.sql"):
            for at, line in enumerate(read_file(name).splitlines(), 1):
                self.assertLessEqual(len(line), 88, f"{name}:{at}")

    def test_nothing_is_to_be_run_in_the_head(self) -> None:
        for form in (
            r"lambda \*row: row",
            r"""["')\]] \* (bool\(|len\(|not )""",
            r"\b0 \* \w",
        ):
            for at, line in enumerate(self.lines, 1):
                self.assertNotRegex(line, form, f"line {at}")

    def test_only_the_room_transitions_writes_the_state_of_a_job(self) -> None:
        for update in re.finditer(r"UPDATE jobs\b[^;]{0,400}?\bWHERE\b", self.text):
            at = self.text.count("\n", 0, update.start()) + 1
            if re.search(r"\bstate\s*=", update[0].partition(" SET ")[2]):
                self.assertEqual(self.room_of(at), "transitions", f"line {at}")
        writers = re.findall(r"UPDATE jobs FORCE INDEX \(\{index\}\) SET", self.text)
        self.assertEqual(len(writers), 1)

    def test_only_the_room_database_knows_pymysql(self) -> None:
        for at, line in enumerate(self.lines[self.rooms[0][1] :], self.rooms[0][1] + 1):
            if re.search(r"\bpymysql\b|MySQLError|\b_driver\(", line):
                self.assertEqual(self.room_of(at), "database", line)

    def test_only_the_room_of_processes_kills_and_reaps(self) -> None:
        kills = re.compile(
            r"os\.(kill|killpg|wait\w*|pidfd_open)\(|pidfd_send_signal"
            r"""|f?"/proc"""
        )
        for at, line in enumerate(self.lines, 1):
            if kills.search(line):
                self.assertEqual(self.room_of(at), "OS processes", f"line {at}: {line}")

    def test_a_state_is_never_a_loose_string(self) -> None:
        states = set(State)
        owner = next(
            one
            for one in self.tree.body
            if isinstance(one, ast.ClassDef) and one.name == "State"
        )
        inside = range(owner.lineno, (owner.end_lineno or 0) + 1)
        for one in ast.walk(self.tree):
            if isinstance(one, ast.Constant) and one.value in states:
                max_attempts = one.lineno in inside or (
                    one.value in ("dead", "cancelled")
                )  # also words of on_lost, Reason
                self.assertTrue(max_attempts, f"line {one.lineno}: {one.value}")

    def test_the_schema_and_the_code_list_the_same_states(self) -> None:
        listed = re.search(r"CHECK \(state IN \(([^)]*)\)", queuectl.SCHEMA)
        assert listed
        self.assertEqual(set(re.findall(r"'(\w+)'", listed[1])), set(map(str, State)))

    def test_migrations_sql_is_the_print_of_the_schema(self) -> None:
        self.assertEqual(read_file("migrations.sql"), queuectl.SCHEMA)

    def test_every_command_has_help_and_stands_in_readme(self) -> None:
        readme = read_file("README.md")
        listed = [name for _, names in queuectl.GROUPS for name in names]
        self.assertEqual(sorted(listed), sorted(queuectl.COMMANDS))
        for name, command in queuectl.COMMANDS.items():
            self.assertIn(f"`{name}", readme)
            self.assertTrue(command.summary and command.examples, name)
            self.assertLess(len(command.summary), 64, name)
            self.assertIn("examples:", queuectl.parser_of(command).format_help())

    def test_the_example_environment_is_made_from_the_tables(self) -> None:
        """Its text is what this test makes of them."""

        def entry(name: str, default: str, meaning: str) -> str:
            sentence = f"{meaning[0].upper()}{meaning[1:]}."
            lines = textwrap.wrap(
                sentence, 86, initial_indent="# ", subsequent_indent="# "
            )
            return "\n".join([*lines, f"#{name}={default}"])

        entries = [
            entry(name, variable.default, variable.help)
            for name, variable in queuectl.VARIABLES.items()
        ]
        settings = [
            entry(
                queuectl.variable_of(key),
                field.metadata["default"],
                field.metadata["help"],
            )
            for key, field in queuectl.SETTINGS.items()
        ]
        head = (
            "# The settings of queuectl that the environment may give, with their "
            "defaults. Copy this\n# file to .env (chmod 600) where you run queuectl or "
            "beside it, and uncomment what you change.\n"
        )
        made = "\n".join([head, *entries, "", *settings]) + "\n"
        self.assertEqual(read_file(".env.example"), made)

    def test_readme_and_the_example_environment_list_every_setting(self) -> None:
        readme, example = read_file("README.md"), read_file(".env.example")
        for key, field in queuectl.SETTINGS.items():
            default = field.metadata["default"]
            self.assertIn(
                f"| `{key}` | {default or '(none)'} | {field.metadata['help']} |",
                readme,
            )
            self.assertIn(f"\n#{queuectl.variable_of(key)}={default}\n", example)
        for name, variable in queuectl.VARIABLES.items():
            self.assertIn(f"`{name}`", readme)
            self.assertIn(f"\n#{name}={variable.default}\n", example)


class SettingsTest(unittest.TestCase):
    """Values, .env and the order of the sources."""

    def environment(self, *layers: Mapping[str, str]) -> queuectl.Environment:
        return queuectl.Environment(
            tuple((f"layer {at}", layer) for at, layer in enumerate(layers))
        )

    def test_durations_are_read_as_people_write_them(self) -> None:
        for text, seconds in (
            ("90", 90),
            ("90s", 90),
            ("5m", 300),
            ("2h30m", 9000),
            ("1d", 86400),
            ("0.5", 0.5),
            ("1.5h", 5400),
            ("0", 0),
        ):
            self.assertEqual(queuectl.parse_duration(text), seconds, text)
        for text in (
            "",
            "-1",
            "5x",
            "m",
            "5 m",
            "1e3",
            "inf",
            "nan",
            "1h-5m",
            "9" * 13,
        ):
            with self.subTest(text), self.assertRaises(ValueError):
                queuectl.parse_duration(text)

    def test_durations_are_said_briefly(self) -> None:
        for seconds, text in (
            (0, "0 s"),
            (0.25, "0.2 s"),
            (41, "41 s"),
            (150, "2 m 30 s"),
            (60, "1 m"),
            (11100, "3 h 5 m"),
            (90000, "1 d 1 h"),
        ):
            self.assertEqual(queuectl.say_duration(seconds), text)

    def test_every_default_is_what_config_list_would_take_back(self) -> None:
        plain = queuectl.load_settings(self.environment({}), {})
        defaults = {key: text for key, (_, text) in plain.origins.items()}
        self.assertEqual(plain.settings, queuectl.Settings())
        self.assertEqual(set(defaults), set(queuectl.SETTINGS))
        again = queuectl.load_settings(self.environment({}), defaults)
        self.assertEqual(again.settings, plain.settings)
        self.assertEqual(again.complaints, [])

    def test_values_out_of_bounds_are_refused_with_what_is_expected(self) -> None:
        for key, text in (
            ("backoff_base", "0"),
            ("backoff_base", "nan"),
            ("backoff_base", "x"),
            ("max_retries", "-1"),
            ("max_retries", "1.5"),
            ("max_retries", "9" * 30),
            ("poll_interval", "0"),
            ("on_lost", "maybe"),
            ("permanent_exit_codes", "0"),
            ("permanent_exit_codes", "256"),
            ("output_limit", "17000000"),
            ("job_timeout", "20y"),
        ):
            with (
                self.subTest(f"{key}={text}"),
                self.assertRaises(queuectl.Problem) as caught,
            ):
                queuectl.SETTINGS[key].metadata["kind"].read(text, key)
            self.assertEqual(caught.exception.status, 2)
            self.assertIn(f"{key}: expected ", caught.exception.what)

    def test_the_environment_beats_the_table_which_beats_the_default(self) -> None:
        both = self.environment(
            {"QUEUECTL_BACKOFF_BASE": "5"}, {"QUEUECTL_BACKOFF_BASE": "7"}
        )
        for environment, table, value, source in (
            (both, {"backoff_base": "3"}, 5, "layer 0"),
            (self.environment({}, {"QUEUECTL_BACKOFF_BASE": "7"}), {}, 7, "layer 1"),
            (self.environment(), {"backoff_base": "3"}, 3, "config"),
            (self.environment(), {}, 2, "default"),
        ):
            found = queuectl.load_settings(environment, table)
            self.assertEqual(found.settings.backoff_base, value)
            self.assertEqual(found.origins["backoff_base"][0], source)

    def test_a_bad_value_in_the_table_is_complained_of_and_passed_over(self) -> None:
        found = queuectl.load_settings(self.environment(), {"max_retries": "many"})
        self.assertEqual(found.settings.max_retries, 3)
        self.assertIn("config max_retries: expected", found.complaints[0])

    def test_a_bad_value_in_the_environment_is_named(self) -> None:
        with self.assertRaises(queuectl.Problem) as caught:
            queuectl.load_settings(
                self.environment({"QUEUECTL_MAX_RETRIES": "many"}), {}
            )
        self.assertIn("QUEUECTL_MAX_RETRIES (layer 0)", caught.exception.what)

    def test_the_lease_is_at_least_four_heartbeats(self) -> None:
        self.assertEqual(queuectl.Settings(heartbeat=5, worker_timeout=6).lease_s, 20)
        self.assertEqual(queuectl.Settings(heartbeat=1, worker_timeout=6).lease_s, 6)

    def test_dotenv_is_parsed_and_never_executed(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, ".env")
            with open(path, "w") as file:
                file.write(
                    "# comment\n\nA=1\nexport B = two words # gone\n"
                    'C=\'$(id) # kept\'\nD="a\\"b\\n"\nE=\nF=a#b\n'
                )
            self.assertEqual(
                queuectl.read_dotenv(path),
                {
                    "A": "1",
                    "B": "two words",
                    "C": "$(id) # kept",
                    "D": 'a"b\n',
                    "E": "",
                    "F": "a#b",
                },
            )
            for bad in ("A=1\nsecret-word\n", "A=1\nB='secret-word\n"):
                with open(path, "w") as file:
                    file.write(bad)
                with self.assertRaises(queuectl.Problem) as caught:
                    queuectl.read_dotenv(path)
                self.assertIn(f"{path}, line 2", caught.exception.what)
                self.assertNotIn("secret", caught.exception.what)

    def test_address_and_account_are_each_whole_from_the_first_source(self) -> None:
        target = queuectl.find_connection(
            self.environment(
                {"DB_HOST": "a,b:33,[::1]:44"},
                {"DB_HOST": "x", "DB_PORT": "7", "DB_USER": "u", "DB_PASSWORD": "p"},
                {"DB_USER": "w", "DB_PASSWORD": "q"},
            )
        )
        self.assertEqual(target.hosts, (("a", 3306), ("b", 33), ("::1", 44)))
        self.assertEqual((target.user, target.password), ("u", "p"))
        self.assertEqual((target.source, target.account_source), ("layer 0", "layer 1"))
        self.assertNotIn("'p'", repr(target))

    def test_a_bad_address_is_named(self) -> None:
        for name, text in (
            ("DB_PORT", "none"),
            ("DB_PORT", "70000"),
            ("DB_HOST", "a:99999"),
            ("DB_HOST", ","),
            ("DB_SSL_MODE", "yes"),
        ):
            with (
                self.subTest(f"{name}={text}"),
                self.assertRaises(queuectl.Problem) as caught,
            ):
                queuectl.find_connection(self.environment({name: text}))
            self.assertEqual(caught.exception.status, 2)
            self.assertIn(name, caught.exception.what)


class HostileTest(unittest.TestCase):
    """Whatever is typed, stored or printed: a Problem in plain characters, or a value.

    QUEUECTL_SEED=… does it again as it was.
    """

    pieces = (
        *"\"'\\\0=#%@:/[]{}\n\r\t `;é\ud800\U0001f600\u202e",
        *("\x1b[31m", "%s", "%00", "null", "true", "1e999", "-1", "9" * 400, "NaN"),
        *("..", "$(x)", "!include ", "!includedir ", "[client]", "user", "host"),
        *("mysql://", "?ssl-mode=", "command", "after", "env", "id", "delay"),
        *("run_at", "2026-11-24T10:00:00Z", "1d", "a" * 300, "export A"),
    )

    def setUp(self) -> None:
        self.seed = os.environ.get("QUEUECTL_SEED", str(time.time_ns() % 10**6))
        self.random = random.Random(int(self.seed))
        ignore_resources(self)  # of spools that a Problem leaves behind
        self.file = tempfile.NamedTemporaryFile("wb", buffering=0)
        self.addCleanup(self.file.close)

    def text(self, most: int = 8) -> str:
        return "".join(self.random.choices(self.pieces, k=self.random.randrange(most)))

    def value(self, depth: int = 0) -> object:
        plain = (None, True, 0, -1, 10**30, 1.5, float("inf"), self.text(), self.text())
        made = [self.value(depth + 1) for _ in range(2)] if depth < 3 else []
        return self.random.choice(
            (*plain, made, {self.text(3): one for one in made}, self.text(3))
        )

    def write(self) -> str:
        """The name of a file that holds anything."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(self.text(16).encode("utf-8", "surrogatepass"))
        return self.file.name

    def test_nothing_but_a_problem_comes_of_what_cannot_be_read(self) -> None:
        def environment(name: str, text: str) -> queuectl.Environment:
            return queuectl.Environment((("here", {name: text, "DB_USER": "me"}),))

        def readers() -> Sequence[Callable[[], object]]:
            keys = [*queuectl.JOB_KEYS, self.text(3)]
            job = {self.random.choice(keys): self.value() for _ in range(4)}
            name = self.random.choice([*queuectl.VARIABLES])
            setting = self.random.choice([*queuectl.SETTINGS])
            url = self.random.choice(("mysql://", "mariadb://u:p@", "")) + self.text()
            line = [self.text().encode("utf-8", "surrogatepass")]
            return (
                lambda: queuectl.check_job({**job, "command": "x"}, {}),
                lambda: queuectl.check_job(job, {}),
                lambda: queuectl.check_job(queuectl.parse_json(self.text(12)), {}),
                lambda: queuectl.spool_lines(line, self.random.random() < 0.5, {}),
                lambda: queuectl.read_dotenv(self.write()),
                lambda: queuectl.read_option_files(self.write()),
                lambda: queuectl.find_connection(environment("DATABASE_URL", url)),
                lambda: queuectl.find_connection(environment(name, self.text())),
                lambda: queuectl.load_settings(
                    environment(queuectl.variable_of(setting), self.text(4)),
                    {setting: self.text(3)},
                ),
                lambda: queuectl.find_command([self.text(3) for _ in range(3)]),
                lambda: queuectl.AGE.read(self.text(4), "age"),
            )

        for _ in range(500):
            for number, read in enumerate(readers()):
                try:
                    read()
                except queuectl.Problem as problem:
                    said = f"{problem.what} {problem.hint}"
                    self.assertNotRegex(said, "[\0-\x08\x0b-\x1f\x7f\u202e]")
                except Exception as error:
                    self.fail(f"QUEUECTL_SEED={self.seed}, reader {number}: {error!r}")

    def test_no_control_character_is_left_and_no_output_is_lost(self) -> None:
        for _ in range(700):
            self.assertNotRegex(
                queuectl.escaped(self.text()), "[\0-\x1f\x7f-\x9f\u202e]"
            )
            data = self.text(60).encode("utf-8", "surrogatepass") * 20
            limit = self.random.randrange(2 * len(data) + 1)
            output, seen, followed = queuectl.OutputBuffer(limit), 0, b""
            while seen < len(data):
                step = self.random.randrange(1, limit + 2)
                output.add(data[seen : seen + step])
                kept = output.to_follow() or output.kept()
                for piece in queuectl.output_since(kept, output.total, seen):
                    followed += piece.data
                    seen += len(piece.data) + piece.left_out
                self.assertEqual(seen, output.total)
            if limit > 100:
                self.assertEqual(followed, data, f"QUEUECTL_SEED={self.seed}")
            self.assertLessEqual(len(output.kept()), max(limit, limit // 2 + 80))


class StatesTest(unittest.TestCase):
    """What the end of a run means; no database."""

    settings = queuectl.Settings()

    def claim(self, **changes: object) -> queuectl.Claim:
        plain = queuectl.Claim(
            1, "a", "t", 1, 1, 4, 0, 2.0, "retry", False, False, "w", None, frozenset()
        )
        return dataclasses.replace(plain, **changes)

    def transition(
        self, claim: queuectl.Claim, reason: str, code: int | None = None
    ) -> str:
        outcome = queuectl.RunOutcome(queuectl.Reason(reason), code)
        return queuectl.decide_transition(claim, outcome, self.settings, 0.0).name

    def test_no_transition_leaves_what_has_ended_but_a_revival(self) -> None:
        for name, rule in queuectl.TRANSITIONS.items():
            self.assertNotIn(rule.to, rule.leaves, name)
            ended = rule.leaves & {*queuectl.ENDED}
            by_hand = {
                "revive": {State.DEAD},
                "retry": {State.DEAD, State.CANCELLED},
            }
            self.assertEqual(ended, by_hand.get(name, set()), name)

    def test_the_end_of_a_run_decides_its_transition(self) -> None:
        last = self.claim(attempts=4)
        for claim, reason, code, name in (
            (self.claim(), "exit", 0, "complete"),
            (self.claim(), "exit", 1, "fail"),
            (last, "exit", 0, "complete"),
            (last, "exit", 1, "die"),
            (self.claim(), "timeout", 124, "fail"),
            (last, "timeout", 124, "die"),
            (self.claim(), "signal", 137, "fail"),
            (self.claim(), "spawn", None, "fail"),
            (last, "spawn", None, "die"),
            (self.claim(), "handed back", 143, "hand back"),
            (self.claim(permanent_exit_codes=frozenset({3})), "exit", 3, "die"),
            (self.claim(cancel_requested=True), "exit", 0, "cancel, ended"),
            (self.claim(cancel_requested=True), "lost", None, "cancel, ended"),
        ):
            with self.subTest(f"{reason} {code}, attempt {claim.attempts}"):
                self.assertEqual(self.transition(claim, reason, code), name)

    def test_only_a_job_that_ran_alone_dies_of_loss(self) -> None:
        lost = queuectl.RunOutcome(queuectl.Reason.LOST)
        for losses, attempts, name, wait_s, granted in (
            (0, 1, "lose", 0, None),
            (1, 2, "lose", 4, None),
            (2, 3, "lose", 8, None),
            (0, 4, "lose", 0, 5),
            (1, 4, "lose", 16, 5),
            (2, 4, "die", 0, None),
        ):
            claim = self.claim(losses=losses, attempts=attempts)
            found = queuectl.decide_transition(claim, lost, self.settings, 0.0)
            with self.subTest(f"{losses} losses, attempt {attempts}"):
                self.assertEqual(found, (name, wait_s, losses + 1, granted))
        careful = self.claim(on_lost="dead")
        self.assertEqual(self.transition(careful, "lost"), "die")

    def test_a_failure_that_was_no_loss_starts_the_count_of_losses_again(self) -> None:
        failed = queuectl.RunOutcome(queuectl.Reason.EXIT, 1)
        found = queuectl.decide_transition(
            self.claim(losses=2), failed, self.settings, 0
        )
        self.assertEqual(found.losses, 0)

    def test_the_backoff_grows_by_powers_up_to_its_longest(self) -> None:
        delays = [
            queuectl.backoff_s(2, n, self.settings, 0) for n in (1, 2, 3, 11, 12, 10**6)
        ]
        self.assertEqual(delays, [2, 4, 8, 2048, 3600, 3600])
        self.assertEqual(queuectl.backoff_s(1, 10**6, self.settings, 0), 1)
        half = queuectl.Settings(backoff_jitter=0.5)
        self.assertEqual(queuectl.backoff_s(2, 3, half, 1.0), 4)
        self.assertEqual(
            queuectl.backoff_s(2, 3, queuectl.Settings(backoff_max=0), 0), 0
        )


class SchemaTest(QueueCase):
    """The tables, by `db init` and by the client, and applications that INSERT."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("DROP DATABASE IF EXISTS queuectl_other")
        self.addCleanup(self.sql, "DROP DATABASE IF EXISTS queuectl_other")
        self.other = {"DB_NAME": "queuectl_other"}

    def tables(self) -> int:
        return len(
            self.sql(
                "SELECT table_name FROM information_schema.tables "
                "WHERE table_schema = 'queuectl_other'"
            )
        )

    def test_the_client_can_run_the_migrations_twice(self) -> None:
        beside = os.path.join(os.path.dirname(self.server.program), "mysql")
        client = beside if os.path.exists(beside) else shutil.which("mariadb")
        if not client:
            self.skipTest("no mysql client")
        text = queuectl.schema_for("queuectl_other").encode()
        for _ in range(2):
            subprocess.run(
                [
                    client,
                    "--no-defaults",
                    "-u",
                    "root",
                    f"--socket={self.server.socket}",
                ],
                input=text,
                check=True,
                env={**os.environ, "MYSQL_PWD": self.password},
            )
        self.assertEqual(self.tables(), 8)
        self.assertIn("is there already", self.queuectl("db", "init", **self.other))
        self.queuectl("enqueue", "-c", "true", **self.other)

    def test_two_racing_inits_make_one_schema(self) -> None:
        racers = [self.start("db", "init", **self.other) for _ in range(4)]
        self.assertEqual([racer.wait() for racer in racers], [0] * 4)
        self.assertEqual(self.tables(), 8)
        self.assertEqual(
            self.queuectl("db", "schema", **self.other),
            queuectl.schema_for("queuectl_other"),
        )

    def test_a_dump_of_the_tables_loads_into_the_other_server(self) -> None:
        for (table,) in self.sql("SHOW TABLES"):
            ((_, text),) = self.sql(f"SHOW CREATE TABLE `{table}`")
            # MySQL's word for REGEXP, which MariaDB lacks; and MariaDB's form of a
            # default that is a mere call, which MySQL cannot read.
            self.assertNotRegex(str(text), r"(?i)regexp_like|DEFAULT \w+\(")

    def test_tables_of_others_and_of_other_versions_are_refused(self) -> None:
        self.sql("CREATE DATABASE queuectl_other")
        self.sql("CREATE TABLE queuectl_other.jobs (id INT PRIMARY KEY)")
        self.queuectl("db", "init", status=69, **self.other)
        self.assertIn("not queuectl's: nothing was changed", self.errors)
        self.assertEqual(self.tables(), 1)
        self.sql("DROP TABLE queuectl_other.jobs")
        self.queuectl("db", "init", **self.other)
        for version, message in (
            ("2/2", "newer than this program"),
            ("x", "not a queue"),
            ("0/0", "run: queuectl db init"),
        ):
            self.sql("UPDATE queuectl_other.config SET value = %s", version)
            self.queuectl("list", status=69, **self.other)
            self.assertIn(message, self.errors)
        self.sql("UPDATE queuectl_other.config SET value = '2/1'")
        self.queuectl("list", **self.other)

    def test_a_mysql_that_is_too_old_for_the_tables_is_refused_plainly(self) -> None:
        for version in ("5.7.44-log", "8.0.12", "5.6.51"):
            with self.assertRaises(queuectl.Problem) as caught:
                queuectl.check_server(version)
            said = f"{caught.exception.what}; {caught.exception.hint}"
            self.assertIn(f"the server is MySQL {version}, which cannot", said)
            self.assertIn("use MySQL from 8.0.13 on, or MariaDB from 10.6", said)
        for version in ("8.0.13", "9.7.0", "10.6.1-MariaDB", "5.7.25-TiDB-v7.5.0"):
            queuectl.check_server(version)
        connect = queuectl.Connector.connect

        def old(
            self: queuectl.Connector, policy: queuectl.RetryPolicy, committed: bool
        ) -> queuectl.Session:
            session = connect(self, policy, committed)
            return dataclasses.replace(session, version="5.7.44-log")

        environment = queuectl.Environment(
            (("test", {**self.environment, **self.other}),)
        )
        target = queuectl.find_connection(environment)
        with (
            unittest.mock.patch("queuectl.Connector.connect", old),
            self.assertRaisesRegex(queuectl.Problem, "MySQL 5.7.44-log"),
        ):
            queuectl.init_database(target)
        self.assertEqual(self.tables(), 0)

    def test_an_application_enqueues_by_insert_in_any_session(self) -> None:
        with self.database.cursor() as cursor:
            cursor.execute("SET time_zone = '+02:00', sql_mode = ''")
            cursor.execute("INSERT INTO jobs (command) VALUES ('echo inserted')")
            cursor.execute(
                "INSERT INTO jobs (id, command, queue, priority, max_retries, "
                "timeout, cwd) VALUES ('own', 'pwd', 'q', 5, 0, 9, '/')"
            )
            cursor.execute(
                "INSERT INTO jobs (id, command, state, next_run_at) VALUES "
                "('later', 'true', 'scheduled', UTC_TIMESTAMP(6) + INTERVAL 1 DAY)"
            )
            for columns, values in (
                ("id, command", "REPEAT('a', 200), 'true'"),
                ("id, command", "'a b', 'x'"),
                ("id, command", "'a\\n', 'true'"),
                ("command", "''"),
                ("command, queue", "'true', REPEAT('a', 70)"),
                ("command, state", "'true', 'waiting'"),
                ("command, state", "'true', 'pending '"),
                ("command, state", "'true', 'processing-x'"),
                ("command, on_lost", "'true', 'retry-it'"),
                ("command, max_retries", "'true', -1"),
                ("command, priority", "'true', 2000000000"),
                ("command", "REPEAT('a', 131001)"),
            ):
                with self.subTest(values), self.assertRaises(pymysql.err.MySQLError):
                    cursor.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        self.drain()
        self.assertEqual(
            dict(self.sql("SELECT state, COUNT(*) FROM jobs GROUP BY state")),
            {"completed": 2, "scheduled": 1},
        )
        self.assertEqual(self.show("own")["output"], "/\n")


class ConnectionTest(QueueCase):
    """Reaching the server, and saying plainly why we could not."""

    def setUp(self) -> None:
        super().setUp()
        self.tcp = {"DB_SOCKET": "", "DB_HOST": "127.0.0.1"}

    def seconds(self, *argv: str, status: int, **variables: str) -> float:
        started = time.monotonic()
        self.queuectl(*argv, status=status, **variables)
        return time.monotonic() - started

    def free_port(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return str(server.getsockname()[1])

    def test_nothing_configured_and_no_server_says_at_once_what_to_try(self) -> None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 3306)) == 0:
                self.skipTest("a server answers at 127.0.0.1:3306")
        self.environment = {
            name: value
            for name, value in self.environment.items()
            if not name.startswith("DB_")
        }
        argv = ("enqueue", "-c", "true", "--defaults-file", "/dev/null")
        self.assertLess(self.seconds(*argv, status=69), 1.5)
        self.assertEqual(
            self.errors,
            "queuectl: no database is configured, and no server answers at "
            "127.0.0.1:3306; looked in the environment (DATABASE_URL, DB_HOST, "
            "DB_SOCKET), ./.env, .env beside the script, ./.queuectl and MySQL's "
            "option files\n  set DB_HOST, DB_USER and DB_PASSWORD, or start a "
            "private server: "
            "queuectl db start\n",
        )

    def test_a_server_that_is_away_is_waited_for_as_long_as_it_is_worth(self) -> None:
        away = {**self.tcp, "DB_PORT": self.free_port()}
        writer = self.start("enqueue", "-c", "true", **away)
        proxy = CuttingProxy(self.server.socket, b"\x03COMMIT", False)
        self.addCleanup(proxy.close)
        argv = ("enqueue", "--id", "cut", "-c", "true")
        by_proxy = {**self.tcp, "DB_PORT": str(proxy.port), "DB_SSL_MODE": "disabled"}
        unsure = self.start(*argv, **by_proxy)  # its COMMIT was sent, then it is away
        self.assertLess(self.seconds("status", status=69, **away), 5)
        started = time.monotonic()
        self.assertEqual(writer.wait(20), 69)
        self.assertGreater(time.monotonic() - started, 4)
        self.assertEqual(writer.said().count("trying again"), 1)
        self.assertEqual(unsure.wait(20), 69)
        self.assertIn(
            "unknown whether accepted: id cut; repeat with --if-absent", unsure.said()
        )
        self.assertEqual(self.queuectl(*argv, "--if-absent"), "cut\n")
        self.assertEqual(self.sql("SELECT COUNT(*) FROM jobs"), [(1,)])

    def test_a_write_goes_through_once_the_server_is_back(self) -> None:
        proxy = Proxy(self.server.socket)
        self.addCleanup(proxy.close)
        proxy.refuse()
        writer = self.start(
            "enqueue",
            "--id",
            "patient",
            "-c",
            "true",
            **self.tcp,
            DB_PORT=str(proxy.port),
        )
        self.wait_until(lambda: "trying again" in writer.said(), "it waits")
        proxy.pass_on()
        self.assertEqual(writer.wait(20), 0, writer.said())
        self.assert_state("patient", State.PENDING)

    def test_a_server_s_own_defaults_forbid_nothing_that_the_queue_does(self) -> None:
        read_only = "transaction_read_only"
        if not self.sql(f"SHOW VARIABLES LIKE '{read_only}'"):
            read_only = "tx_read_only"
        for name, value in (
            ("sql_safe_updates", 1),
            ("max_join_size", 1),
            ("sql_select_limit", 1),
            ("autocommit", 0),
            ("completion_type", 2),
            (read_only, 1),
        ):
            [(before,)] = self.sql(f"SELECT @@GLOBAL.{name}")
            self.addCleanup(self.sql, f"SET GLOBAL {name} = %s", before)
            self.sql(f"SET GLOBAL {name} = %s", value)
        for name in ("a", "b", "c"):
            self.enqueue("true", id=name)
        self.queuectl("enqueue", "--after", "a", "-c", "true")
        self.queuectl("cancel", "c")
        self.drain("--count", "2")
        self.assertEqual(len(self.queuectl("list", "--json").splitlines()), 4)

    def test_an_error_that_nobody_foresaw_is_one_line_with_code_and_text(self) -> None:
        self.addCleanup(self.sql, "DROP TRIGGER queuectl_strange")
        self.sql(
            "CREATE TRIGGER queuectl_strange BEFORE INSERT ON jobs FOR EACH ROW "
            "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 4999, MESSAGE_TEXT = 'odd'"
        )
        self.queuectl("enqueue", "-c", "true", status=69)
        self.assertRegex(self.errors, "^queuectl: the server did not do it .*4999, odd")
        self.assertNotIn("unknown whether", self.errors)

    def test_the_set_up_that_is_missing_is_named_and_the_password_is_not(self) -> None:
        self.queuectl("list", status=69, DB_NAME="queuectl_absent")
        self.assertIn("run: queuectl db init", self.errors)
        self.sql(
            "CREATE USER IF NOT EXISTS 'queuectl_guest'@'%%' IDENTIFIED BY 'right'"
        )
        self.addCleanup(self.sql, "DROP USER 'queuectl_guest'@'%%'")
        self.queuectl("list", status=69, DB_USER="queuectl_guest", DB_PASSWORD="wr0ng")
        self.assertIn(
            "refused the account 'queuectl_guest' (from environment)", self.errors
        )
        self.assertNotIn("wr0ng", self.errors)
        with open(self.path("secret"), "w") as file:
            file.write("right\n")
        self.queuectl(
            "list",
            status=69,
            DB_USER="queuectl_guest",
            DB_PASSWORD="",
            DB_PASSWORD_FILE=self.path("secret"),
        )
        self.assertIn("lacks a right", self.errors)

    def test_option_files_are_read_as_mysql_reads_them(self) -> None:
        os.mkdir(self.path("conf.d"))
        for name, text in (
            (
                "my.cnf",
                "!includedir conf.d\n# comment\n[mysqld]\nuser = mysql\n"
                '[client]\nport = 3307 # mine\nuser = "a # b"\n'
                "password = 'p#\\'w\\\\'\nloose-ssl_mode = DISABLED\nport=3308\n"
                "[ client-server ]\nskip-that\n;no\n!include more\n[mysql]\n"
                "host = no\n",
            ),
            ("conf.d/b.cnf", "[client]\nhost = second\nuser = overridden\n"),
            ("conf.d/a.cnf", "[queuectl]\nhost = first\ndatabase = \\sq\n"),
            ("conf.d/c.txt", "[client]\nhost = third\n"),
            ("more", "[client-mariadb]\nssl-ca=/ca.pem\n!include more\n"),
        ):
            with open(self.path(name), "w") as file:
                file.write(text.replace("conf.d\n", self.path("conf.d") + "\n"))
        os.chdir(self.folder)
        self.addCleanup(os.chdir, HERE)
        source, found = queuectl.read_option_files(self.path("my.cnf"))
        self.assertEqual(source, self.path("my.cnf"))
        self.assertEqual(
            found,
            {
                "DB_HOST": "second",
                "DB_NAME": " q",
                "DB_PORT": "3308",
                "DB_USER": "a # b",
                "DB_PASSWORD": "p#'w\\",
                "DB_SSL_MODE": "DISABLED",
                "DB_SSL_CA": "/ca.pem",
            },
        )
        os.chmod(self.path("my.cnf"), 0o666)  # anybody may write it
        self.assertEqual(queuectl.read_option_files(self.path("my.cnf"))[1], {})

    def test_the_first_source_that_names_address_or_account_gives_it_whole(
        self,
    ) -> None:
        with open(self.path("my.cnf"), "w") as file:
            file.write(f"[client]\nsocket={self.server.socket}\nuser=queuectl_open\n")
        self.sql("CREATE USER 'queuectl_open'@'%%'")
        self.addCleanup(self.sql, "DROP USER 'queuectl_open'@'%%'")
        self.sql("GRANT SELECT ON queuectl.* TO 'queuectl_open'@'%%'")
        with open(self.path(".env"), "w") as file:
            file.write("DB_USER=queuectl_nobody\n")
        options = {"DB_SOCKET": "", "DB_HOST": ""}
        del self.environment["DB_USER"], self.environment["DB_PASSWORD"]
        argv = ("status", "--defaults-file", self.path("my.cnf"))
        self.queuectl(*argv, status=69, **options)
        self.assertIn(
            f"the account 'queuectl_nobody' (from ./.env), queuectl at "
            f"{self.server.socket} (from {self.path('my.cnf')})",
            self.errors,
        )
        os.unlink(self.path(".env"))
        self.assertIn(
            f"database: queuectl at {self.server.socket} (from {self.path('my.cnf')})",
            self.queuectl(argv[0], f"--defaults-file={self.path('my.cnf')}", **options),
        )
        for bad in (("--defaults-file",), ("--defaults-file=/absent",)):
            self.queuectl("status", *bad, status=2)
        url = f"mysql://queuectl_open@{self.server.socket.replace('/', '%2F')}/queuectl"
        self.assertIn(
            "(from environment)",
            self.queuectl("status", **options, DATABASE_URL=url),
        )

    def test_a_url_says_all_at_once_and_what_stands_beside_it_wins(self) -> None:
        def find(url: str, **beside: str) -> queuectl.ConnectionInfo:
            layer = ("here", {"DATABASE_URL": url, **beside})
            return queuectl.find_connection(queuectl.Environment((layer,)))

        whole = find("mysql://us%40er:p%2Fw@[::1]:3307/da%20ta?ssl-mode=REQUIRED&x=1")
        self.assertEqual(
            (whole.hosts, whole.user, whole.password, whole.database, whole.ssl_mode),
            ((("::1", 3307),), "us@er", "p/w", "da ta", "required"),
        )
        two = find("mariadb://u:p@a,b:1", DB_NAME="other", DB_PORT="9")
        self.assertEqual((two.hosts, two.database), ((("127.0.0.1", 9),), "other"))
        self.assertEqual((two.user, two.password), ("u", "p"))
        self.assertEqual(find("mysql://u@a,b:1").hosts, (("a", 3306), ("b", 1)))
        self.assertEqual(find("mysql://u@h", DB_USER="me").password, "")
        for url in (
            "postgres://u:s3cret@h/d",
            "u:s3cret@h",
            "mysql://u:s3cret@[h/d",
            "mysql://u:s3cret@h/d?ssl-mod=required",
            "mysql://u:s3cret@h:99999/d",
        ):
            with self.assertRaises(queuectl.Problem) as caught:
                find(url)
            said = f"{caught.exception.what} {caught.exception.hint}"
            self.assertNotIn("s3cret", said)
            self.assertRegex(said, "DATABASE_URL|DB_HOST")

    def test_without_pymysql_the_environment_beside_the_script_is_used_once(
        self,
    ) -> None:
        base = getattr(sys, "_base_executable", sys.executable)
        bare = [os.path.realpath(base), "-I", "-S"]
        script = self.path("queuectl.py")
        shutil.copy(SCRIPT, script)
        plain = {**self.environment, "PYTHONDONTWRITEBYTECODE": "1"}

        def status() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*bare, script, "status"],
                env=plain,
                capture_output=True,
                text=True,
                check=False,
            )

        done = status()
        self.assertEqual(done.returncode, 69)
        self.assertIn("queuectl: PyMySQL is missing for ", done.stderr)
        self.assertIn("-m pip install PyMySQL", done.stderr)
        os.makedirs(self.path(".venv/bin"))
        with open(self.path(".venv/bin/python3"), "w") as file:
            file.write(f'#!/bin/sh\necho once >&2\nexec "{sys.executable}" "$@"\n')
        os.chmod(self.path(".venv/bin/python3"), 0o755)
        os.symlink(script, self.path("linked"))
        script = self.path("linked")
        done = status()
        self.assertEqual((done.returncode, done.stderr), (0, "once\n"), done.stderr)
        package = self.path("old/pymysql")
        os.makedirs(package)
        with open(os.path.join(package, "__init__.py"), "w") as file:
            file.write("VERSION = (0, 9, 3)\n")
        self.queuectl("list", status=69, PYTHONPATH=self.path("old"))
        self.assertIn("PyMySQL 0.9.3 of ", self.errors)
        self.assertIn("is too old: 1.0.2 is needed\n  install it: ", self.errors)

    def grant(self, name: str) -> dict[str, str]:
        """Do README's GRANT block for one account; the variables that use it."""
        blocks = re.findall(
            r"```sql\n(CREATE USER.*?)```", read_file("README.md"), re.S
        )
        [block] = [one for one in blocks if f"'{name}'" in one]
        self.addCleanup(self.sql, f"DROP USER IF EXISTS '{name}'@'%%'")
        for statement in filter(str.strip, block.split(";\n")):
            self.sql(statement)
        return {"DB_USER": name, "DB_PASSWORD": "secret"}

    def test_the_rights_that_readme_grants_are_enough_and_no_more(self) -> None:
        enqueuer, worker, viewer = map(self.grant, ("enqueuer", "worker", "viewer"))
        self.queuectl("enqueue", "--id=a", "-c", "echo out; exit 1", **enqueuer)
        self.queuectl("enqueue", "--id=b", "--after=a", "-c", "true", **enqueuer)
        self.queuectl(
            "enqueue", "--if-absent", "--unique=K", "--lines=-", stdin=b"x", **enqueuer
        )
        self.queuectl("cancel", "b", status=0, **worker)
        self.queuectl("retry", "b", **worker)
        drain = self.start("worker", "start", "--drain", **worker)
        self.assertEqual(drain.wait(30), 0, drain.said())
        self.queuectl("enqueue", "--id=c", "--after=a", "-c", "true", **enqueuer)
        self.assert_state("c", State.DEAD)
        self.queuectl("purge", "--state", "dead", "--dry-run", **worker)
        self.queuectl("dlq", "retry", "--all", **worker)
        self.queuectl("purge", "--state", "dead", **worker)
        self.queuectl("queue", "limit", "q", "1", **worker)
        for argv in (
            ["status"],
            ["list"],
            ["show", "a"],
            ["logs", "a"],
            ["explain", "a"],
            ["queue", "list"],
            ["config", "list"],
        ):
            self.queuectl(*argv, **viewer)
        for argv in (
            ["enqueue", "-c", "true"],
            ["cancel", "a"],
            ["queue", "pause", "q"],
        ):
            self.queuectl(*argv, status=69, **viewer)
            self.assertIn(
                "the account 'viewer' (from environment) lacks a right", self.errors
            )
        self.queuectl("config", "set", "on_lost", "dead", status=69, **enqueuer)
        self.queuectl("db", "check", status=1, **viewer)
        checked = self.queuectl("db", "check", status=1, **worker)  # no worker runs
        self.assertIn("ok  rights       all that workers need", checked)
        self.queuectl("db", "init", status=69, DB_NAME="queuectl_other", **worker)
        self.assertIn("queuectl db schema | mysql -u root -p", self.errors)

    def test_check_names_what_is_off_and_its_remedy(self) -> None:
        def check(status: int, *argv: str, **variables: str) -> dict[str, str]:
            text = self.queuectl(
                "db", "check", "--json", *argv, status=status, **variables
            )
            rows = list(map(json.loads, text.splitlines()))
            self.assertEqual(any(not row["ok"] for row in rows), bool(status))
            return {
                row["check"]: row["found"]
                for row in rows
                if not status or not row["ok"]
            }

        self.assertLessEqual(
            {
                "connection",
                "server",
                "TLS",
                "isolation",
                "SKIP LOCKED",
                "durability",
                "clock",
                "packet",
                "connections",
                "schema",
                "rights",
                "doorbell",
                "queues",
                "dead letters",
                "PID file",
                ".env",
            },
            check(0).keys(),
        )
        open(self.path("workers.pid"), "w").close()
        with open(self.path(".env"), "w") as file:
            file.write("QUEUECTL_DOORBELL=on\n")
        os.chmod(self.path(".env"), 0o644)
        self.enqueue("true", queue="gpu")
        self.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
        self.addCleanup(self.sql, "SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        off = check(1)
        self.assertEqual(off.keys(), {"durability", "queues", "PID file", ".env"})
        self.assertIn("no live worker serves gpu", off["queues"])
        self.assertIn("chmod 600", self.queuectl("db", "check", status=1))
        away = check(1, DB_SOCKET="/absent")
        self.assertIn("cannot reach the database", away["connection"])

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl to make certificates")
    def test_a_certificate_is_verified_as_far_as_asked(self) -> None:
        for name in ("server", "other"):
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
                + ["-days", "2", "-subj", "/CN=localhost", "-keyout"]
                + [self.path(f"{name}.key"), "-out", self.path(f"{name}.pem")]
                + ["-addext", "subjectAltName=DNS:localhost"],
                check=True,
                capture_output=True,
            )
        self.environment["DB_PASSWORD"] = ""  # that server has none
        server = queuectl.PrivateServer(self.path("tls"), self.server.program)
        os.mkdir(server.folder)
        server._install()
        port, pem = self.free_port(), self.path("server.pem")
        process = subprocess.Popen(
            [server.program, "--no-defaults", f"--datadir={server.folder}/data"]
            + [f"--socket={server.socket}", f"--pid-file={server._pid_file}"]
            + [f"--port={port}", "--bind-address=127.0.0.1", f"--ssl-ca={pem}"]
            + [f"--ssl-cert={pem}", f"--ssl-key={self.path('server.key')}"]
            + ["--user=root"] * (os.geteuid() == 0)
            + ["--mysqlx=OFF"] * (not server._mariadb()),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.wait_until(server.running, "the server answers", 60)
        self.queuectl("db", "init", DB_SOCKET=server.socket)
        plain = {"DB_SOCKET": "", "DB_HOST": "localhost", "DB_PORT": port}
        for mode, ca, host, status in (
            ("required", "", "127.0.0.1", 0),
            ("verify_ca", "server", "127.0.0.1", 0),
            ("verify-ca", "other", "localhost", 69),
            ("verify_identity", "server", "localhost", 0),
            ("verify_identity", "server", "127.0.0.1", 69),
            ("verify_identity", "", "localhost", 69),
        ):
            with self.subTest(mode=mode, ca=ca, host=host):
                settings = {
                    **plain,
                    "DB_HOST": host,
                    "DB_SSL_MODE": mode,
                    "DB_SSL_CA": ca and self.path(f"{ca}.pem"),
                }
                self.queuectl("status", status=status, **settings)
                if status:
                    self.assertIn("no secure connection to queuectl at", self.errors)
                    self.assertIn("check DB_SSL_MODE and DB_SSL_CA", self.errors)
        found = self.queuectl("db", "check", DB_SSL_MODE="required", **plain)
        self.assertRegex(
            found, r"(?m)^ok  TLS +TLS\S+, the server's certificate is not "
        )

    def fake_server(
        self, capabilities: int, answers: Sequence[bytes]
    ) -> tuple[str, list[bytes]]:
        """A MySQL that greets, then says `answers`; its port, and what it was sent."""
        heard: list[bytes] = []
        greeting = (
            b"\x0a8.4.0\0"
            + struct.pack("<I", 1)
            + b"12345678\0"
            + struct.pack("<H", capabilities & 0xFFFF)
            + b"\x2d\x02\0"
            + struct.pack("<H", capabilities >> 16)
            + b"\x15"
            + b"\0" * 10
            + b"123456789012\0"
            + b"caching_sha2_password\0"
        )

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    with client, contextlib.suppress(OSError):
                        for number, text in enumerate([greeting, *answers]):
                            head = struct.pack("<I", len(text))[:3] + bytes(
                                [2 * number]
                            )
                            client.sendall(head + text)
                            heard.append(client.recv(65536))

        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        threading.Thread(target=serve, daemon=True).start()
        return str(listener.getsockname()[1]), heard

    def test_a_server_that_asks_for_the_password_in_clear_gets_none(self) -> None:
        plain = 0x000FF7DF & ~0x800 | 0x00080000
        port, heard = self.fake_server(plain, [b"\xfemysql_clear_password\0"])
        self.queuectl(
            "list",
            status=69,
            **self.tcp,
            DB_PORT=port,
            DB_PASSWORD="s3cret",
            DB_SSL_MODE="disabled",
        )
        self.assertIn("in clear text: refused", self.errors)
        self.assertTrue(heard)
        self.assertNotIn(b"s3cret", b"".join(heard))

    def test_what_says_that_it_takes_no_writes_is_passed_over(self) -> None:
        for told, writes in (
            ((0, 0), True),
            (("OFF", "OFF"), True),  # MariaDB 12
            ((1, 0), False),
            (("NO_LOCK_NO_ADMIN", 0), False),
            ((0, "ON"), False),  # Aurora's readers
        ):
            self.assertEqual(queuectl.takes_writes(told), writes, told)

    def test_the_words_of_a_hostile_server_are_shown_and_not_obeyed(self) -> None:
        evil = b"\xff\x15\x04#28000\x1b]0;owned\x07\nqueuectl: ok\x9b2J"
        port, _ = self.fake_server(0x000FF7DF & ~0x800 | 0x00080000, [evil])
        self.queuectl("list", status=69, **self.tcp, DB_PORT=port)
        self.assertIn(r"\x1b]0;owned\x07", self.errors)
        controls = r"[\x00-\x09\x0b-\x1f\x7f-\x9f]"
        self.assertFalse(re.search(f"{controls}|^queuectl: ok", self.errors, re.M))

    def test_required_tls_is_not_done_without(self) -> None:
        port, heard = self.fake_server(0x000FF7DF & ~0x800 | 0x00080000, [])
        self.queuectl(
            "list",
            status=69,
            **self.tcp,
            DB_PORT=port,
            DB_PASSWORD="s3cret",
            DB_SSL_MODE="required",
        )
        self.assertIn("no secure connection", self.errors)
        self.assertNotIn(b"s3cret", b"".join(heard))

    def test_a_commit_whose_answer_was_lost_is_looked_up(self) -> None:
        proxy = CuttingProxy(self.server.socket, b"\x03COMMIT", True)
        self.addCleanup(proxy.close)
        by_proxy = {**self.tcp, "DB_PORT": str(proxy.port), "DB_SSL_MODE": "disabled"}
        argv = ("enqueue", "--id", "cut", "-c", "true")
        self.assertEqual(self.queuectl(*argv, **by_proxy), "cut\n")
        self.assertTrue(proxy.cuts)
        self.assertEqual(self.queuectl(*argv, "--if-absent"), "cut\n")
        self.assertEqual(self.sql("SELECT COUNT(*) FROM jobs"), [(1,)])


class TransitionsTest(WorkCase):
    """One writer of a job's state, which refuses what the table does not name."""

    def one(self, state: State, token: str) -> int:
        self.sql("DELETE FROM jobs")
        self.put("true", id="one", state=str(state), token=token)
        return int(str(self.job("one", "seq")[0]))

    def move(self, name: str, seq: int, token: str) -> int:
        """How many jobs it moves, of the one that is there."""
        rule = queuectl.TRANSITIONS[name]

        def work(cursor: queuectl.Transaction) -> int:
            if name == "claim":
                queuectl.defer_claim(cursor, [seq], "n" * 16, "worker")
                cursor.value("SELECT 1")
                return cursor.counts[-1]
            tokens = [token] if rule.needs_token else None
            return queuectl.move(cursor, name, [seq], tokens=tokens)

        return self.reach().transact(work)

    def test_every_transition_is_refused_from_every_other_state(self) -> None:
        for name, rule in queuectl.TRANSITIONS.items():
            for state in State:
                with self.subTest(name, state=str(state)):
                    seq = self.one(state, "t" * 16)
                    moved = self.move(name, seq, "t" * 16)
                    self.assertEqual(moved, int(state in rule.leaves))
                    wanted = rule.to if state in rule.leaves else state
                    self.assert_state("one", wanted)

    def test_a_run_is_moved_by_its_own_token_alone(self) -> None:
        for name, rule in queuectl.TRANSITIONS.items():
            if rule.needs_token:
                with self.subTest(name):
                    self.assertEqual(rule.leaves, {State.PROCESSING})
                    seq = self.one(State.PROCESSING, "t" * 16)
                    self.assertEqual(self.move(name, seq, "u" * 16), 0)
                    self.assert_state("one", State.PROCESSING)
                    with self.assertRaises(AssertionError):
                        self.reach().transact(
                            functools.partial(queuectl.move, name=name, seqs=[seq])
                        )

    def test_a_transition_leads_only_where_the_table_says(self) -> None:
        seq = self.one(State.DEAD, "t")
        with self.assertRaises(AssertionError):
            self.reach().transact(
                lambda cursor: queuectl.move(
                    cursor, "revive", [seq], to=State.COMPLETED
                )
            )
        self.assert_state("one", State.DEAD)

    def test_without_skip_locked_the_claim_takes_pending_jobs_alone(self) -> None:
        condition = queuectl.SqlCondition("queue = %s", ["default"])
        for state in State:
            self.one(state, "t")
            claimed = self.reach().transact(
                lambda cursor: queuectl.claim_next(cursor, condition, 1, "n", "w")
            )
            self.assertEqual(claimed, int(state is State.PENDING), state)


class EnqueueTest(QueueCase):
    """Every way into the queue, and what is refused at the door."""

    def count(self) -> int:
        return int(str(self.sql("SELECT COUNT(*) FROM jobs")[0][0]))

    def most_memory(self, lines: int) -> int:
        """What an enqueue of so many lines held at most, in KiB."""
        with open(self.path("lines"), "w") as file:
            file.writelines(f"echo line {number}\n" for number in range(lines))
        with open(self.path("lines")) as file, open(os.devnull, "w") as nowhere:
            process = subprocess.Popen(
                [sys.executable, self.door, "enqueue", "-q", "--lines", "-"],
                stdin=file,
                stdout=nowhere,
                cwd=self.folder,
                env=self.environment,
            )
            status, used = os.wait4(process.pid, 0)[1:]
        process.returncode = status
        self.assertEqual(status, 0)
        return used.ru_maxrss

    def test_an_enqueue_of_many_lines_takes_no_more_memory_than_one_of_few(
        self,
    ) -> None:
        few, many = map(self.most_memory, (4_000, 40_000))
        self.assertLess(many, few * 1.2)
        self.assertEqual(self.sql("SELECT COUNT(*) FROM jobs"), [(44_000,)])

    def test_a_job_comes_in_every_form(self) -> None:
        with open(self.path("jobs"), "w") as file:
            file.write('{"command":"echo f1"}\n\n{"command":"echo f2","id":"f2"}\n')
        for argv, stdin, commands in (
            (['{"command":"echo json"}'], b"", ["echo json"]),
            (['[{"command":"a"},{"command":"b"}]'], b"", ["a", "b"]),
            (["-c", "echo c && echo d"], b"", ["echo c && echo d"]),
            (
                ["--", "printf", "%s\\n", "it's", "--json"],
                b"",
                ["printf '%s\\n' 'it'\"'\"'s' --json"],
            ),
            (["-f", "jobs"], b"", ["echo f1", "echo f2"]),
            (["-"], b'{"command":"echo in"}', ["echo in"]),
            (["-f", "-"], b'{"command":"echo in"}', ["echo in"]),
            (["--lines", "-"], "echo é\r\n\n x\n".encode(), ["echo é", " x"]),
        ):
            with self.subTest(argv):
                ids = self.queuectl("enqueue", *argv, stdin=stdin).split()
                found = self.sql("SELECT id, command FROM jobs ORDER BY seq")
                self.assertEqual([one for _, one in found], commands)
                self.assertEqual([one for one, _ in found], ids)
                self.sql("DELETE FROM jobs")
        for argv in (["-f", "-"], ["--lines", "-"], ["[]"]):
            self.assertEqual(self.queuectl("enqueue", *argv), "")
        self.assertEqual(self.queuectl("enqueue", "-q", "-c", "true"), "")
        self.assertRegex(
            self.queuectl("enqueue", "--json", "--delay", "1h", "-c", "true"),
            r'^{"id": "[-0-9a-f]{36}", "state": "scheduled"}\n$',
        )

    def test_every_key_is_an_option_too_and_the_json_wins(self) -> None:
        keys = {
            "id": "x",
            "max_retries": 7,
            "priority": -3,
            "queue": "q.1",
            "timeout": 90,
            "cwd": "/tmp",
            "env": {"A": "1", "B": "="},
            "backoff_base": 1.5,
            "permanent_exit_codes": [2, 3],
            "on_lost": "dead",
        }
        self.enqueue("true", **keys)
        options = [
            "--max-retries=7",
            "--priority",
            "-3",
            "--queue=q.1",
            "--timeout=1m30s",
            "--cwd=/tmp",
            "--env=B==",
            "--env",
            "A=1",
            "--backoff-base=1.5",
            "--permanent-exit-codes=3,2",
            "--on-lost=dead",
        ]
        self.queuectl("enqueue", "--id=y", *options, "-c", "true")
        columns = (
            "max_retries, priority, queue, timeout, cwd, env, backoff_base, "
            "permanent_exit_codes, on_lost"
        )
        first, second = self.sql(f"SELECT {columns} FROM jobs ORDER BY seq")
        self.assertEqual(first, second)
        self.assertEqual(
            first, (7, -3, "q.1", 90.0, "/tmp", '{"A":"1","B":"="}', 1.5, "2,3", "dead")
        )
        self.queuectl(
            "enqueue",
            '{"command":"true","queue":"own","id":"z"}',
            "--queue=q.1",
            "--cwd=.",
        )
        self.assertEqual(
            self.sql("SELECT queue, cwd FROM jobs WHERE id = 'z'"),
            [("own", os.path.realpath(self.folder))],
        )

    def test_a_time_needs_its_zone(self) -> None:
        self.queuectl(
            "enqueue",
            "--run-at",
            "2030-01-02T03:04:05+02:00",
            "--id",
            "a",
            "-c",
            "true",
        )
        self.enqueue("true", id="b", run_at="2030-01-02T01:04:05Z")
        self.assertEqual(
            self.sql("SELECT DISTINCT state, next_run_at FROM jobs"),
            [("scheduled", datetime.datetime(2030, 1, 2, 1, 4, 5))],
        )
        self.queuectl(
            "enqueue", "--run-at", "2030-01-02T03:04:05", "-c", "true", status=2
        )
        self.assertIn(
            "2030-01-02T03:04:05Z for UTC, or 2030-01-02T03:04:05", self.errors
        )

    def test_an_id_that_is_taken_is_refused_or_passed_over(self) -> None:
        self.enqueue("true", id="one")
        self.queuectl(
            "enqueue", '[{"command":"a"},{"command":"b","id":"one"}]', status=1
        )
        self.assertIn("id one is taken: a pending job has it", self.errors)
        self.assertEqual(self.count(), 1)
        self.queuectl(
            "enqueue", '[{"command":"a","id":"x"},{"command":"b","id":"x"}]', status=1
        )
        self.assertIn("it stands twice in the input", self.errors)
        self.assertEqual(
            self.queuectl("enqueue", "--if-absent", "--json", "--id", "one", "-c", "b"),
            '{"id": "one", "state": "pending"}\n',
        )
        self.assertEqual(self.sql("SELECT command FROM jobs"), [("true",)])

    def test_a_unique_key_is_held_while_its_job_lives(self) -> None:
        self.enqueue("true", id="one", unique="K 1")
        both = '[{"command":"a"},{"command":"b","unique":"K 1"}]'
        self.queuectl("enqueue", both, status=1)
        self.assertIn("key K 1 is held by job one", self.errors)
        self.queuectl("enqueue", both.replace('"a"', '"a","unique":"é"'), status=1)
        self.assertEqual(
            self.queuectl(
                "enqueue", "--if-absent", "--json", "--unique=K 1", "-c", "b"
            ),
            '{"id": "one", "state": "pending"}\n',
        )
        self.assertEqual(self.count(), 1)
        twice = '[{"command":"a","unique":"x"},{"command":"b","unique":"x"}]'
        self.queuectl("enqueue", twice, status=1)
        self.assertIn("key x stands twice in the input", self.errors)
        first, second = self.queuectl("enqueue", "--if-absent", twice).split()
        self.assertEqual(first, second)
        self.queuectl("cancel", "one")
        self.enqueue("true", id="two", unique="K 1")
        self.queuectl("retry", "one", status=1)
        self.assertIn(
            "job one stays cancelled: key K 1 is held by job two", self.errors
        )
        for key in ("", " x", "x" * 129, "a\nb", 5):
            self.queuectl(
                "enqueue", json.dumps({"command": "true", "unique": key}), status=2
            )

    def test_of_twenty_racing_enqueues_of_a_key_one_wins(self) -> None:
        started = [
            self.start("enqueue", "--unique", "K", "-c", "true", "--if-absent")
            for _ in range(20)
        ]
        self.assertEqual({one.wait() for one in started}, {0})
        self.assertEqual(len({one.said() for one in started}), 1)
        self.assertEqual(self.count(), 1)

    def test_bad_jobs_are_refused_with_the_part_named(self) -> None:
        for text, part in (
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[1]", "a job is a JSON object"),
            ('"x"', "a job is a JSON object"),
            ("{}", "command: missing"),
            ('{"command":""}', "command:"),
            ('{"command":" "}', "command:"),
            ('{"command":"a\\u0000b"}', "command:"),
            ('{"command":"\\ud800"}', "command:"),
            ('{"command":7}', "command:"),
            ('{"command":["a"]}', "command:"),
            ('{"command":"%s"}' % ("a" * 131001), "command:"),
            ('{"command":"a","comand":"b"}', "unknown key comand"),
            ('{"command":"a","command":"b"}', "a key stands twice"),
            ('{"command":"a","max_retries":"3"}', "max_retries:"),
            ('{"command":"a","max_retries":true}', "max_retries:"),
            ('{"command":"a","max_retries":-1}', "max_retries:"),
            ('{"command":"a","max_retries":1.0}', "max_retries:"),
            ('{"command":"a","max_retries":%s}' % ("9" * 5000), ""),
            ('{"command":"a","priority":1e3}', "priority:"),
            ('{"command":"a","priority":2000000}', "priority:"),
            ('{"command":"a","timeout":-1}', "timeout:"),
            ('{"command":"a","timeout":NaN}', "not JSON"),
            ('{"command":"a","timeout":1e400}', "timeout:"),
            ('{"command":"a","delay":"soon"}', "delay:"),
            (
                '{"command":"a","delay":1,"run_at":"2030-01-01T00:00:00Z"}',
                "delay and run_at",
            ),
            ('{"command":"a","run_at":"tomorrow"}', "run_at:"),
            ('{"command":"a","run_at":7}', "run_at:"),
            ('{"command":"a","backoff_base":0.5}', "backoff_base:"),
            ('{"command":"a","env":["A=1"]}', "env:"),
            ('{"command":"a","env":{"A":1}}', "env:"),
            ('{"command":"a","env":{"A=B":"1"}}', "env:"),
            ('{"command":"a","env":{"A":"\\u0000"}}', "env:"),
            ('{"command":"a","cwd":""}', "cwd:"),
            ('{"command":"a","queue":"a b"}', "queue:"),
            ('{"command":"a","queue":"%s"}' % ("q" * 65), "queue:"),
            ('{"command":"a","id":"%s"}' % ("i" * 129), "id:"),
            ('{"command":"a","id":"-a"}', "id:"),
            ('{"command":"a","id":"a\\n"}', "id:"),
            ('{"command":"a","id":"é"}', "id:"),
            ('{"command":"a","id":null}', "id:"),
            ('{"command":"a","permanent_exit_codes":[0]}', "permanent_exit_codes:"),
            ('{"command":"a","permanent_exit_codes":["x"]}', "permanent_exit_codes:"),
            ('{"command":"a","on_lost":"keep"}', "on_lost:"),
            ("[" * 100000, "not JSON"),
        ):
            with self.subTest(text[:60]), self.assertRaises(queuectl.Problem) as caught:
                queuectl.check_job(queuectl.parse_json(text), {})
            self.assertEqual(caught.exception.status, 2)
            self.assertIn(part, caught.exception.what)
            self.assertLess(len(caught.exception.what), 400)
        self.queuectl("enqueue", '{"command":"a","max_retrys":1}', status=2)
        self.assertIn("did you mean max_retries?", self.errors)
        for argv in (
            [],
            ["-c", "a", "--lines", "-"],
            ["-c", ""],
            ["-f", "absent"],
            ["--env", "A", "-c", "a"],
            ["--max-retries", "x", "-c", "a"],
        ):
            self.queuectl("enqueue", *argv, status=2)
        self.assertEqual(self.count(), 0)

    def test_an_env_that_no_program_could_be_started_with_is_refused(self) -> None:
        most = queuectl.VARIABLE_BYTES_MAX
        for env, part in (
            ({"LONG": "x" * (most - 4)}, "the variable LONG would take 131,001 bytes"),
            ({f"V{n}": "é" * 50_000 for n in range(10)}, "all the variables would"),
        ):
            with self.subTest(part):
                job = json.dumps({"command": "true", "env": env}).encode()
                self.queuectl("enqueue", "-", stdin=job, status=2)
                self.assertIn(part, self.errors)
        self.assertEqual(self.count(), 0)
        # What is taken can be run, beside the longest command.
        env = {f"V{n}": "x" * (most - 3) for n in range(7)}
        command = 'echo "${#V0} ${#V6}" #'.ljust(queuectl.COMMAND_BYTES_MAX, "-")
        job = json.dumps({"command": command, "env": env, "max_retries": 0}).encode()
        job_id = self.queuectl("enqueue", "-", stdin=job).strip()
        self.drain()
        self.assertEqual(self.queuectl("logs", job_id), "130997 130997\n")

    def test_nothing_is_done_where_standard_output_is_closed(self) -> None:
        def shell(redirection: str, *argv: str) -> tuple[int, str, str]:
            done = subprocess.run(
                ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh"]
                + [sys.executable, self.script, *argv],
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return done.returncode, done.stdout, done.stderr

        status, _, said = shell(">&-", "enqueue", "--id=a", "-c", "true")
        self.assertEqual(
            (status, said.splitlines()[0]),
            (1, "queuectl: standard output is closed, so nothing was done"),
        )
        status, _, said = shell("<&- >&- 2>&-", "enqueue", "--id=a", "-c", "true")
        self.assertEqual((status, self.count()), (1, 0))
        for argv in (["enqueue", "--lines", "-"], ["wait", "-"]):
            self.assertEqual(
                shell("<&-", *argv), (2, "", "queuectl: standard input is closed\n")
            )
        # Who closes the others does without what would have been said there.
        self.assertEqual(
            shell("<&- 2>&-", "enqueue", "--id=b", "-c", "true"), (0, "b\n", "")
        )
        self.assertEqual(shell("2>&-", "show", "absent"), (1, "", ""))

    def test_one_bad_line_refuses_the_whole_input(self) -> None:
        lines = [b'{"command":"true"}'] * 10000
        lines[7430] = b'{"command":"true","priority":"high"}'
        self.queuectl("enqueue", "-f", "-", stdin=b"\n".join(lines), status=2)
        self.assertIn("line 7431: priority: expected a whole number", self.errors)
        lines = [b"true"] * 10000
        lines[7430] = b"echo \xff"
        self.queuectl("enqueue", "--lines", "-", stdin=b"\n".join(lines), status=2)
        self.assertIn("line 7431: not UTF-8", self.errors)
        self.assertEqual(self.count(), 0)
        self.queuectl("enqueue", "-q", "--lines", "-", stdin=b"true\n" * 10000)
        self.assertEqual(self.count(), 10000)

    def test_jobs_run_by_priority_and_then_in_the_order_of_enqueueing(self) -> None:
        jobs = [
            {"command": f"echo {name} >>order", "priority": priority}
            for name, priority in (
                ("c", 0),
                ("d", 0),
                ("a", 5),
                ("e", -1),
                ("b", 5),
                ("f", -1),
            )
        ]
        self.queuectl("enqueue", json.dumps(jobs))
        self.drain("--count", "1")
        self.assertEqual("".join(self.lines("order")), "abcdef")


class Claiming(WorkCase):
    """Each job runs once, in order, and no queue starves another."""

    def concurrent_drains(self, jobs: int, **variables: str) -> None:
        """Four drains at once over so many jobs, each of which must run once."""
        self.put_many(jobs, "echo $QUEUECTL_JOB_ID >> ran")
        drains = [
            self.start("worker", "start", "--drain", "--count", "4", **variables)
            for _ in range(4)
        ]
        for drain in drains:
            self.assertEqual(drain.wait(60), 0, drain.said())
        ran = self.lines("ran")
        self.assertEqual((len(ran), len(set(ran))), (jobs, jobs))
        self.assertEqual(self.counts(), {"completed": jobs})
        self.assertEqual(
            len(self.sql("SELECT DISTINCT worker FROM runs")),
            len(self.sql("SELECT DISTINCT worker FROM jobs")),
        )

    def test_four_concurrent_drains_run_each_job_once(self) -> None:
        self.concurrent_drains(400)

    def test_without_skip_locked_four_concurrent_drains_run_each_job_once(self) -> None:
        self.concurrent_drains(400, QUEUECTL_SKIP_LOCKED="off")

    def many_jobs(self, count: int) -> None:
        for _ in range(count // 1000):
            self.put_many(1000, "true")
        workers = [
            self.start("worker", "start", "--drain", "--count", "8") for _ in range(2)
        ]
        for worker in workers:
            self.assertEqual(worker.wait(120), 0, worker.said())
        self.assertEqual(self.counts(), {"completed": count})
        self.assertEqual(
            self.sql("SELECT MIN(attempts), MAX(attempts), MAX(runs) FROM jobs"),
            [(1, 1, 1)],
        )
        self.assertEqual(
            self.sql(
                "SELECT COUNT(*), COUNT(DISTINCT job_seq) FROM runs "
                "WHERE reason = 'exit' AND exit_code = 0"
            ),
            [(count, count)],
        )

    def test_a_thousand_jobs_on_two_supervisors_run_once_each(self) -> None:
        self.many_jobs(1000)

    @slow
    def test_ten_thousand_jobs_on_two_supervisors_run_once_each(self) -> None:
        self.many_jobs(10000)

    def test_higher_priority_runs_first_then_the_order_of_enqueueing(self) -> None:
        for name, priority in (("c", 0), ("a", 7), ("e", -3), ("b", 7), ("d", 0)):
            self.put(f"echo {name} >> order", priority=priority)
        self.drain()
        self.assertEqual(self.lines("order"), list("abcde"))

    def test_a_worker_serves_only_the_queues_it_names(self) -> None:
        ids = {name: self.put("true", queue=name) for name in ("a", "b", "c")}
        self.drain("--queue", "a", "--queue", "b")
        self.assertEqual(
            {name: self.state(one) for name, one in ids.items()},
            {"a": "completed", "b": "completed", "c": "pending"},
        )

    def test_a_queue_with_a_thousand_jobs_does_not_starve_one_with_a_single_job(
        self,
    ) -> None:
        self.put_many(1000, "echo >> big", queue="big")
        self.put("cat big 2> /dev/null | wc -l > small", queue="small")
        self.worker("--count", "2")
        self.assertLess(int(self.wait_lines("small", 1)[0]), 50)

    def test_a_delayed_job_starts_within_half_a_second_of_its_time(self) -> None:
        self.worker(QUEUECTL_POLL_INTERVAL="1")
        job = self.enqueue("date +%s.%N > started", delay=1.7)
        self.wait_state(job, State.COMPLETED)
        [(due,)] = self.sql(
            "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', next_run_at) FROM jobs"
        )
        late = float(self.lines("started")[0]) - int(str(due)) / 1e6
        self.assertTrue(0 <= late < 0.5, late)

    def retry_delays(self, *expected: float, **variables: str) -> None:
        """Fail until dead, and compare the times between the starts."""
        job = self.put(
            "date +%s.%N >> starts; no-such-command", max_retries=len(expected)
        )
        self.worker(**variables)
        self.wait_state(job, State.DEAD, 5 + sum(expected))
        starts = [float(line) for line in self.lines("starts")]
        delays = [later - earlier for earlier, later in zip(starts, starts[1:])]
        self.assertEqual(len(delays), len(expected))
        for delay, least in zip(delays, expected):
            self.assertTrue(least <= delay < least + 0.5, delays)
        self.assertEqual(self.sql("SELECT id, exit_code FROM dlq"), [(job, 127)])

    def test_a_failing_job_is_retried_after_growing_delays(self) -> None:
        self.retry_delays(
            1.2, 1.44, QUEUECTL_BACKOFF_BASE="1.2", QUEUECTL_BACKOFF_MAX="1h"
        )

    @slow
    def test_as_installed_a_failing_job_is_retried_after_two_four_and_eight_seconds(
        self,
    ) -> None:
        for name in SCALED:
            del self.environment[name]
        self.retry_delays(2, 4, 8)

    def test_history_keeps_the_last_twenty_runs(self) -> None:
        job = self.put("exit 1", max_retries=24)
        self.drain(QUEUECTL_BACKOFF_MAX="0")
        self.assertEqual(self.job(job, "state", "attempts"), ("dead", 25))
        self.assertEqual([row[0] for row in self.runs(job, "run")], list(range(6, 26)))

    def busy_worker(self, *argv: str, **variables: str) -> tuple[Background, int]:
        """A worker with a run that does not end in each slot, two a process.

        Also how many processes it has.
        """
        processes = os.cpu_count() or 1
        self.put_many(2 * processes, "exec sleep 600", queue="endless")
        worker = self.worker("--count", str(2 * processes), *argv, **variables)
        self.wait_until(
            lambda: self.counts() == {"processing": 2 * processes}, "all are busy"
        )
        return worker, processes

    def free_a_slot(self) -> None:
        """Cancel an endless run of a process that has another."""
        [(job_id,)] = self.sql(
            "SELECT MIN(id) FROM jobs WHERE state = 'processing' AND queue = 'endless' "
            "GROUP BY worker HAVING COUNT(*) = 2 LIMIT 1"
        )
        self.queuectl("cancel", str(job_id))

    def test_a_job_that_must_run_alone_gets_a_process_where_all_have_runs(self) -> None:
        """With SKIP LOCKED, and without."""
        for skip_locked in ("on", "off"):
            with self.subTest(skip_locked):
                for table in ("jobs", "runs", "workers"):
                    self.sql(f"DELETE FROM {table}")
                worker, processes = self.busy_worker(
                    "--drain", QUEUECTL_SKIP_LOCKED=skip_locked
                )
                lone = self.put("sleep 0.1", losses=2, attempts=2)
                behind = [self.put("sleep 0.1") for _ in range(2)]
                self.wait_beats(1)
                # Without a free slot nothing is forked for it.
                self.assertEqual(len(worker.children()), processes)
                self.free_a_slot()
                for one in (lone, *behind):
                    self.wait_state(one, State.COMPLETED, 10)
                # One after the other, in the one slot that was free.
                overlaps = self.sql(
                    "SELECT 1 FROM runs a JOIN runs b ON a.job_seq < b.job_seq "
                    "AND a.started_at < b.finished_at AND b.started_at < a.finished_at "
                    "WHERE a.reason = 'exit' AND b.reason = 'exit'"
                )
                self.assertEqual(overlaps, [])
                [(runner,)] = self.runs(lone, "worker")
                others = self.sql("SELECT worker FROM runs WHERE worker = %s", runner)
                self.assertEqual(others, [(runner,)])
                busy = self.sql(
                    "SELECT 1 FROM jobs WHERE worker = %s AND state = 'processing'",
                    runner,
                )
                self.assertEqual(busy, [])
                self.wait_until(
                    lambda: len(worker.children()) == processes, "the spare has left"
                )
                for (job_id,) in self.sql(
                    "SELECT id FROM jobs WHERE state = 'processing'"
                ):
                    self.queuectl("cancel", str(job_id))
                self.assertEqual(worker.wait(), 0, worker.said())

    def test_a_job_that_runs_alone_without_end_holds_one_slot_only(self) -> None:
        worker, processes = self.busy_worker()
        lone = self.put("exec sleep 600", losses=2, attempts=2)
        second = self.put("true", losses=2, attempts=2)
        behind = self.put("true")
        self.free_a_slot()
        self.wait_state(lone, State.PROCESSING, 10)
        self.wait_beats(1)
        for one in (second, behind):
            self.assert_state(one, State.PENDING)
        self.assertEqual(len(worker.children()), processes + 1)
        self.queuectl("cancel", lone)
        for one in (second, behind):
            self.wait_state(one, State.COMPLETED, 10)
        worker.signal(signal.SIGTERM)
        self.wait_until(lambda: len(worker.children()) == processes, "the spare left")
        self.stop_now(worker)
        self.assertEqual(worker.wait(), 128 + signal.SIGTERM)

    def test_a_job_that_kills_its_worker_takes_no_run_of_a_busy_one_along(self) -> None:
        worker, processes = self.busy_worker()
        poison = self.put("kill -9 $PPID", losses=2, attempts=2, max_retries=3)
        self.free_a_slot()
        self.wait_state(poison, State.DEAD, 20)
        self.assertEqual(self.job(poison, "reason", "attempts"), ("lost", 4))
        self.assertEqual(
            self.counts(), {"processing": 2 * processes - 1, "cancelled": 1, "dead": 1}
        )
        self.assertEqual(
            self.sql("SELECT MAX(runs) FROM jobs WHERE losses = 0"), [(1,)]
        )

    def test_nothing_of_another_queue_is_claimed_beside_a_job_that_runs_alone(
        self,
    ) -> None:
        """With SKIP LOCKED, and without."""
        for skip_locked in (True, False):
            with self.subTest(skip_locked=skip_locked):
                self.sql("DELETE FROM jobs")
                lone = self.put("true", losses=2, queue="a")
                self.put("true", queue="b")
                turns = self.turns(skip_locked=skip_locked)
                jobs = turns.take(queuectl.TurnRequest(free=2, look=True)).jobs
                self.assertEqual([job.claim.id for job in jobs], [lone])

    def test_a_result_too_large_for_the_server_blocks_no_other(self) -> None:
        [(packet,)] = self.sql("SELECT @@global.max_allowed_packet")
        self.addCleanup(self.sql, "SET GLOBAL max_allowed_packet = %s", packet)
        self.sql("SET GLOBAL max_allowed_packet = 1048576")
        large = self.put("head -c 3000000 /dev/zero")
        others = [self.put("echo fine") for _ in range(3)]
        self.drain("--count", "4", QUEUECTL_OUTPUT_LIMIT="4000000")
        self.assertEqual(self.counts(), {"completed": 4})
        [(detail, output)] = self.runs(large, "detail", "output")
        self.assertIn("output not stored", str(detail))
        self.assertIsNone(output)
        for one in others:
            self.assertEqual(self.runs(one, "reason", "output"), [("exit", b"fine\n")])

    def test_results_that_are_too_large_together_are_stored_one_by_one(self) -> None:
        [(packet,)] = self.sql("SELECT @@global.max_allowed_packet")
        self.addCleanup(self.sql, "SET GLOBAL max_allowed_packet = %s", packet)
        self.sql("SET GLOBAL max_allowed_packet = 1048576")
        turns = self.turns()
        self.put_many(2, "true")
        jobs = turns.take(queuectl.TurnRequest(free=2, look=True)).jobs
        ends = [
            queuectl.RunOutcome(queuectl.Reason.EXIT, 0, output=b"\0" * size)
            for size in (100_000, 500_000)
        ]
        turns.take(
            queuectl.TurnRequest([(job.claim, end) for job, end in zip(jobs, ends)])
        )
        self.assertEqual(self.counts(), {"completed": 2})
        self.assertEqual(
            self.sql("SELECT LENGTH(output) FROM runs ORDER BY job_seq"),
            [(100_000,), (500_000,)],
        )


class LostAnswers(WorkCase):
    """A COMMIT whose answer is lost was carried out, or not; either is found out."""

    def test_no_job_is_lost_or_repeated_when_answers_to_commits_are_lost(self) -> None:
        for fault in ("before", "after", "late"):
            with self.subTest(fault):
                self.lose(fault)

    def lose(self, fault: str) -> None:
        proxy = Proxy(self.server.socket)
        self.addCleanup(proxy.close)
        self.sql("DELETE FROM runs")
        self.sql("DELETE FROM jobs")
        del self.environment["DB_SOCKET"]
        self.environment.update(
            DB_HOST="127.0.0.1", DB_PORT=str(proxy.port), DB_SSL_MODE="disabled"
        )
        self.put_many(12, f"sleep 0.1; echo $QUEUECTL_JOB_ID >> {fault}")
        proxy.faults = [fault, "", fault, fault, "", "", fault][
            : 3 if fault == "late" else 7
        ]
        self.drain("--count", "2")
        self.assertEqual(proxy.faults, [])
        ran = self.lines(fault)
        self.assertEqual((len(ran), len(set(ran))), (12, 12))
        self.assertEqual(
            self.sql(
                "SELECT state, attempts, runs, COUNT(*) FROM jobs GROUP BY 1, 2, 3"
            ),
            [("completed", 1, 1, 12)],
        )
        self.assertEqual(
            self.sql("SELECT reason, COUNT(*) FROM runs GROUP BY reason"),
            [("exit", 12)],
        )
        self.environment["DB_SOCKET"] = self.server.socket


class InterruptedStatements(WorkCase):
    """A statement whose answer nobody waits for any more."""

    def test_its_answer_is_not_taken_for_that_of_the_next(self) -> None:
        database = self.reach()
        self.assertEqual(database.rows(int, "SELECT 1"), [1])
        with (
            unittest.mock.patch(
                "pymysql.connections.Connection._read_query_result",
                side_effect=KeyboardInterrupt,
            ),
            self.assertRaises(KeyboardInterrupt),
        ):
            database.rows(int, "SELECT 2")
        self.assertEqual(database.rows(int, "SELECT 3"), [3])


class LostCommits(WorkCase):
    """A COMMIT that the server never saw, or whose answer was lost, for every caller of
    `transact`: what is told of it holds, and no transaction is left open."""

    def setUp(self) -> None:
        super().setUp()
        self.proxy = Proxy(self.server.socket)
        self.addCleanup(self.proxy.close)
        self.by_proxy = self.proxy.variables()

    def through(self) -> queuectl.Database:
        """A way into the database whose COMMITs can be lost."""
        return self.reach(**self.by_proxy)

    def store(self) -> queuectl.JobStore:
        return queuectl.JobStore(self.through(), queuectl.Settings())

    def losing_turns(self) -> queuectl.TurnTaker:
        me = queuectl.WorkerIdentity(queuectl.new_id(), "here", 0, 0, "", 100, ())
        turns = queuectl.TurnTaker(self.through(), me, True)
        queuectl.register(turns.database, me, turns.settings.lease_s)
        return turns

    def lose(self, fault: str) -> None:
        self.proxy.faults = [fault]

    def states(self) -> dict[object, object]:
        """As another connection sees them; it would wait for a lock that was left."""
        self.sql("SET SESSION innodb_lock_wait_timeout = 1")
        return dict(self.sql("SELECT id, state FROM jobs FOR UPDATE"))

    def spool(self, *jobs: dict[str, object]) -> queuectl.Spool:
        spool = queuectl.Spool()
        self.addCleanup(spool._file.close)
        for job in jobs:
            spool.add(queuectl.check_job({"command": "true", **job}, {}))
        return spool

    # One scenario for each function that calls `transact`; its name says which.

    def lose_enqueue(self, fault: str) -> None:
        self.lose(fault)
        queuectl.enqueue(self.through(), self.spool({"id": "plain"}), False)
        self.assertEqual(self.states(), {"plain": "pending"})
        self.lose(fault)
        queuectl.enqueue(
            self.through(), self.spool({"id": "plain"}, {"id": "other"}), True
        )
        self.assertEqual(self.states(), {"plain": "pending", "other": "pending"})
        self.lose(fault)
        waits = {"id": "child", "after": ["plain"]}
        queuectl.enqueue(self.through(), self.spool(waits), False)
        self.assertEqual(self.states()["child"], "blocked")
        self.lose(fault)
        ids = [f"staged-{at}" for at in range(5)]
        with unittest.mock.patch.multiple(queuectl, STAGED_FROM=2, RELEASED_AT_ONCE=2):
            queuectl.enqueue(
                self.through(), self.spool(*({"id": one} for one in ids)), False
            )
        found = self.states()
        self.assertEqual([found[one] for one in ids], ["pending"] * 5)

    def lose__on_one(self, fault: str) -> None:
        self.put("true", id="waiting")
        self.put("true", id="runs", state="processing", worker="w", token="t" * 16)
        self.put("true", id="failed", state="failed", attempts=1)
        self.put("true", id="dead", state="dead", attempts=4)
        self.sql(
            "INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs WHERE id = 'dead'"
        )
        told = []
        for verb, job_id in (
            ("cancel", "waiting"),
            ("cancel", "runs"),
            ("retry", "failed"),
            ("revive", "dead"),
        ):
            store = self.store()
            self.lose(fault)
            result = (
                store.cancel(job_id) if verb == "cancel" else store.revive(job_id, verb)
            )
            self.assertTrue(result.ok, result)
            told.append(result.note)
        self.assertEqual(
            self.states(),
            {
                "waiting": "cancelled",
                "runs": "processing",
                "failed": "pending",
                "dead": "pending",
            },
        )
        self.assertEqual(told[0], "is cancelled")
        self.assertNotEqual(self.job("runs", "cancel_requested_at"), (None,))
        self.assertEqual(self.job("dead", "attempts", "max_attempts"), (4, 5))
        self.assertEqual(self.sql("SELECT id FROM dlq"), [])

    def lose__carry_out(self, fault: str) -> None:
        turns = self.losing_turns()
        self.put_many(3, "true")
        self.lose(fault)
        claimed = turns.take(queuectl.TurnRequest(free=3)).jobs
        self.assertEqual({*self.states().values()}, {"processing"})
        self.assertEqual(len(claimed), 3)
        self.assertEqual(self.sql("SELECT DISTINCT runs FROM jobs"), [(1,)])
        end = queuectl.RunOutcome(queuectl.Reason.EXIT, 0, output=b"said")
        self.lose(fault)  # of a turn that settles and claims nothing
        turn = turns.take(
            queuectl.TurnRequest(ended=[(job.claim, end) for job in claimed])
        )
        self.assertEqual(turn.unsettled, [])
        self.assertEqual({*self.states().values()}, {"completed"})
        self.assertEqual(
            self.sql("SELECT reason, output FROM runs"), [("exit", b"said")] * 3
        )
        self.lose(fault)  # of one that only releases what is due
        self.put("true", id="due", state="scheduled")
        turns.take(queuectl.TurnRequest(look=True))
        self.assertEqual(self.states()["due"], "pending")

    def lose__settle_now(self, fault: str) -> None:
        turns = self.losing_turns()
        job_id = self.put("true")
        [job] = turns.take(queuectl.TurnRequest(free=1)).jobs
        self.assertEqual(job.claim.id, job_id)
        self.lose(fault)
        # It does not run it: the answer to its claim was lost.
        turns.take(queuectl.TurnRequest(look=True, detect=True))
        self.assertEqual(self.states(), {job_id: "pending"})
        self.assertEqual(self.job(job_id, "attempts"), (0,))

    def lose__resolve(self, fault: str) -> None:
        turns = self.losing_turns()
        turns.after.purges = True
        self.put("true", id="parent", state="completed")
        self.put("true", id="child", state="blocked")
        self.sql(
            "INSERT INTO dependencies (parent, child) SELECT parents.seq, jobs.seq "
            "FROM jobs AS parents JOIN jobs WHERE parents.id = 'parent' "
            "AND jobs.id = 'child'"
        )
        self.proxy.faults = ["", "", fault]  # after two COMMITs of the purge
        turns.take(queuectl.TurnRequest(look=True))
        self.assertEqual(self.states()["child"], "pending")

    def lose_take_over(self, fault: str) -> None:
        lost, turns = self.turns(), self.losing_turns()
        job_id = self.put("true")
        lost.take(queuectl.TurnRequest(free=1))
        self.lose(fault)
        queuectl.take_over(turns.database, turns.settings, lost.identity.id, -1)
        self.assertEqual(self.states(), {job_id: "failed"})
        self.assertEqual(self.reasons(job_id), ["lost"])

    def lose_take_over_but(self, fault: str) -> None:
        lost, turns = self.turns(), self.losing_turns()
        ids = [self.put("true") for _ in range(2)]
        runs = lost.take(queuectl.TurnRequest(free=2)).jobs
        claim = runs[0].claim
        self.lose(fault)
        taken = queuectl.take_over_but(
            turns.database,
            turns.settings,
            lost.identity.id,
            {f"{claim.token}-{claim.seq}": 4711},
        )
        self.assertEqual(taken and taken.kept, [ids[0]])
        self.assertEqual(self.states(), {ids[0]: "processing", ids[1]: "failed"})

    def lose__take_over_singly(self, fault: str) -> None:
        lost, turns = self.turns(), self.losing_turns()
        job_id = self.put("true")
        lost.take(queuectl.TurnRequest(free=1))
        self.lose(fault)
        queuectl._take_over_singly(turns.database, turns.settings, lost.identity.id)
        self.assertEqual(self.states(), {job_id: "failed"})
        self.assertEqual(self.reasons(job_id), ["lost"])

    def lose_refuse(self, fault: str) -> None:
        job_id = self.put("true")
        [(seq,)] = self.sql("SELECT seq FROM jobs")
        self.lose(fault)
        self.assertTrue(queuectl.refuse(self.through(), int(str(seq)), None))
        self.assertEqual(self.states(), {job_id: "dead"})
        self.assertEqual(self.sql("SELECT id, reason FROM dlq"), [(job_id, "refused")])

    def lose__release_one_by_one(self, fault: str) -> None:
        job_id = self.put("true", state="scheduled")
        turns = self.losing_turns()
        self.lose(fault)
        self.assertEqual(turns._refused._release_one_by_one(), [])
        self.assertEqual(self.states(), {job_id: "pending"})

    def lose__trim_some(self, fault: str) -> None:
        self.put("true", id="long")
        turns = self.losing_turns()
        [job] = turns.take(queuectl.TurnRequest(free=1)).jobs
        mark = queuectl.cut_mark(100)
        outcome = queuectl.RunOutcome(
            queuectl.Reason.EXIT,
            0,
            output=b"a" + mark + b"z",
            output_bytes=100,
            to_follow=b"a" * 20 + mark + b"z" * 20,
        )
        turns.take(queuectl.TurnRequest(ended=[(job.claim, outcome)]))
        self.lose(fault)
        turns.after.trimmer.finish()
        self.assertEqual(self.runs("long", "output"), [(b"a" + mark + b"z",)])

    def lose_forget_lost_workers(self, fault: str) -> None:
        lost, turns = self.turns(), self.losing_turns()
        self.lose(fault)
        queuectl.forget_lost_workers(turns.database, [lost.identity.id])
        left = self.sql("SELECT 1 FROM workers WHERE id = %s", lost.identity.id)
        self.assertEqual(left, [])

    def lose_purge(self, fault: str) -> None:
        ago = "2026-01-01 00:00:00"
        self.put_many(3, "true", state="completed", next_run_at=ago, finished_at=ago)
        self.lose(fault)
        queuectl.purge(self.through(), State.COMPLETED, "2999-01-01")
        self.assertEqual(self.states(), {})

    def lose__check_locks(self, fault: str) -> None:
        self.lose(fault)
        found = list(queuectl._check_locks(self.through(), self.through()))
        self.assertEqual([one.ok for one in found], [True, True], found)

    def test_every_caller_of_transact_bears_a_lost_commit(self) -> None:
        tree = ast.parse(read_file("queuectl.py"))
        callers = {
            function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for one in ast.walk(function)
            if isinstance(one, ast.Attribute) and one.attr == "transact"
        }
        self.assertEqual(
            callers, {name[5:] for name in dir(self) if name.startswith("lose_")}
        )
        for caller in sorted(callers):
            for fault in ("before", "after"):
                with self.subTest(caller, fault=fault):
                    for table in TABLES:
                        self.sql(f"DELETE FROM {table}")
                    getattr(self, f"lose_{caller}")(fault)
                    self.assertEqual(self.proxy.faults, [], "no COMMIT was lost")

    def test_run_bears_a_lost_commit(self) -> None:
        self.worker()
        for fault in ("before", "after"):
            with self.subTest(fault):
                self.lose(fault)
                argv = ("run", "-c", f"echo {fault} >> ran; echo said {fault}")
                said = self.queuectl(*argv, **self.by_proxy)
                self.assertEqual(said, f"said {fault}\n")
                self.assertEqual(self.proxy.faults, [])
        self.assertEqual(self.lines("ran"), ["before", "after"])

    def test_a_job_that_was_claimed_meanwhile_is_not_said_to_be_cancelled(self) -> None:
        """Between the lost COMMIT of a cancel and the look whether it stands."""
        job_id = self.put("true")
        store, worker = self.store(), self.turns()
        claimed: list[queuectl.ClaimedJob] = []
        bear = store.database._back_off_or_raise

        def claim_first(*arguments: object) -> None:
            claimed.extend(worker.take(queuectl.TurnRequest(free=1)).jobs)
            bear(*arguments)

        self.lose("before")
        with unittest.mock.patch.object(
            store.database, "_back_off_or_raise", claim_first
        ):
            result = store.cancel(job_id)
        self.assertEqual([job.claim.id for job in claimed], [job_id])
        self.assertEqual(result.note, "is running: its worker ends it")
        self.assertEqual(self.states(), {job_id: "processing"})
        self.assertNotEqual(self.job(job_id, "cancel_requested_at"), (None,))

    def test_a_turn_of_which_one_run_was_taken_over_is_done_again_for_the_rest(
        self,
    ) -> None:
        """The COMMIT of a settle is lost, and one of its two runs taken from us."""
        self.put_many(2, "true")
        turns = self.losing_turns()
        claimed = turns.take(queuectl.TurnRequest(free=2)).jobs
        bear = turns.database._back_off_or_raise

        def take_first(*arguments: object) -> None:
            self.sql("UPDATE jobs SET token = 'x' ORDER BY seq LIMIT 1")
            bear(*arguments)

        self.lose("before")
        end = queuectl.RunOutcome(queuectl.Reason.EXIT, 0)
        with unittest.mock.patch.object(
            turns.database, "_back_off_or_raise", take_first
        ):
            turns.take(
                queuectl.TurnRequest(ended=[(job.claim, end) for job in claimed])
            )
        self.assertEqual(
            self.sql("SELECT state FROM jobs ORDER BY seq"),
            [("processing",), ("completed",)],
        )


class Resets(WorkCase):
    """Connections that break at any packet: what was acknowledged stands. One enqueue
    of four says --if-absent.

    QUEUECTL_RESETS=2000 does it with so many jobs; QUEUECTL_SEED=… as it was.
    """

    settings = {**SCALED, "QUEUECTL_WORKER_TIMEOUT": "15"}

    def setUp(self) -> None:
        super().setUp()
        ignore_resources(self)
        self.jobs = int(os.environ.get("QUEUECTL_RESETS", "40"))
        self.seed = int(os.environ.get("QUEUECTL_SEED", str(time.time_ns() % 10**6)))

    def use(self, proxy: Proxy) -> None:
        self.addCleanup(proxy.close)
        self.environment.update(proxy.variables())

    def many(self, act: Callable[[int], object]) -> None:
        """Do it for each job, by eight threads."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(act, range(self.jobs)))

    def torment(self) -> None:
        """Enqueue, cancel and retry through the door, and run what is there."""
        acknowledged: set[str] = set()
        unsure: set[str] = set()

        def enqueue(number: int) -> None:
            spool = queuectl.Spool()
            command = "echo $QUEUECTL_JOB_ID >> ran"
            spool.add(queuectl.check_job({"id": f"j{number}", "command": command}, {}))
            with contextlib.closing(self.reach()) as database:
                try:
                    queuectl.enqueue(database, spool, number % 4 == 0)
                    acknowledged.add(f"j{number}")
                except queuectl.Unreachable as problem:
                    if problem.sent:
                        unsure.add(f"j{number}")

        stands: dict[str, str] = {}

        def change(number: int) -> None:
            verb = ("cancel", "retry")[number % 2]
            job_id = f"{verb}-{number}"
            with contextlib.closing(self.reach()) as database:
                store = queuectl.JobStore(database, queuectl.Settings())
                try:
                    result = (
                        store.cancel(job_id)
                        if verb == "cancel"
                        else store.revive(job_id, verb)
                    )
                except queuectl.Unreachable:
                    return
            self.assertTrue(result.ok, result)
            stands[job_id] = str(result.state)

        for number in range(self.jobs):
            state = ("pending", "dead")[number % 2]
            self.put(
                "true",
                id=f"{('cancel', 'retry')[number % 2]}-{number}",
                queue="changed",
                state=state,
            )
        workers = [self.worker("--count", "4", "--queue=default") for _ in range(2)]
        self.many(enqueue)
        self.many(change)
        found: dict[object, object] = dict(
            self.sql("SELECT id, state FROM jobs WHERE queue = 'changed'")
        )
        self.assertEqual({**found, **stands}, found)
        self.assertGreater(len(stands), self.jobs / 2)
        self.wait_until(
            lambda: (
                not self.sql(
                    "SELECT 1 FROM jobs WHERE queue = 'default' AND state <> "
                    "'completed' LIMIT 1"
                )
            ),
            "all have ended",
            60 + self.jobs / 10,
        )
        there = {
            str(row[0])
            for row in self.sql("SELECT id FROM jobs WHERE queue = 'default'")
        }
        self.assertEqual(acknowledged - there, set(), "accepted and lost")
        self.assertLessEqual(there, acknowledged | unsure)
        for worker in workers:
            worker.signal(signal.SIGTERM)
            worker.wait()
            self.assertNotRegex(worker.said(), "Traceback|lost")
        ran = self.lines("ran")
        self.assertEqual(sorted(ran), sorted(there), "lost, or repeated")

    def test_under_resets_of_5_percent_what_was_acknowledged_stands(self) -> None:
        proxy = Proxy(self.server.socket)
        proxy.random, proxy.reset_chance = random.Random(self.seed), 0.05
        self.use(proxy)
        with self.subTest(f"QUEUECTL_RESETS={self.jobs} QUEUECTL_SEED={self.seed}"):
            self.torment()
        self.assertGreater(proxy.resets, self.jobs // 10)

    def test_with_every_tenth_commit_dropped_what_was_acknowledged_stands(self) -> None:
        proxy = Proxy(self.server.socket)
        proxy.faults = (["before"] + [""] * 9) * self.jobs * 10
        self.use(proxy)
        self.torment()


class SlowProxy(Proxy):
    """A door that lets so many bytes a second through, to the server."""

    def __init__(self, to: str, bytes_s: int) -> None:
        self.bytes_s = bytes_s
        super().__init__(to)

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        slow = to.family == socket.AF_UNIX  # it goes to the server
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if slow:
                    time.sleep(len(data) / self.bytes_s)
                to.sendall(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class SlowWires(WorkCase):
    """Results that take long on their way arrive, in smaller parts."""

    def slow_worker(self, bytes_s: int, *argv: str, **variables: str) -> Background:
        proxy = SlowProxy(self.server.socket, bytes_s)
        self.addCleanup(proxy.close)
        return self.worker(*argv, **proxy.variables(), **variables)

    def settle(self, jobs: int, output: int, bytes_s: int, within_s: float) -> None:
        """All results arrive, whole and in time, and nobody is taken for lost."""
        self.put_many(jobs, f"head -c {output} /dev/zero | tr '\\0' x")
        worker = self.slow_worker(bytes_s, f"--count={jobs}")
        watcher = self.worker("--queue", "other")
        self.wait_ended(jobs, within_s)
        self.assertEqual(
            self.sql("SELECT LENGTH(output), COUNT(*) FROM runs GROUP BY 1"),
            [(output, jobs)],
        )
        self.assertEqual(self.sql("SELECT MAX(runs) FROM jobs"), [(1,)])
        self.assertNotIn("lost", worker.said() + watcher.said())

    def test_results_that_take_longer_than_the_lease_together_all_arrive(self) -> None:
        self.settle(20, 30_000, 100_000, 30)  # 6 s on the wire, of a lease of 3 s

    @slow
    def test_forty_results_of_60_kb_arrive_by_64_kb_a_second(self) -> None:
        for name in SCALED:
            self.environment.pop(name)
        self.settle(40, 60_000, 64_000, 80)

    def test_a_result_too_large_for_the_wire_goes_without_its_output(self) -> None:
        big = self.put("head -c 400000 /dev/zero | tr '\\0' x; exit 3", max_retries=0)
        small = self.put("sleep 0.2; echo small")
        worker = self.slow_worker(40_000, "--count=2", QUEUECTL_OUTPUT_LIMIT="500000")
        watcher = self.worker("--queue", "other")
        self.wait_state(big, State.DEAD)
        self.wait_state(small, State.COMPLETED)
        [(reason, code, detail, output)] = self.runs(
            big, "reason", "exit_code", "detail", "output"
        )
        self.assertEqual((reason, code, output), ("exit", 3, None))
        self.assertIn("output not stored: the database is too slow", str(detail))
        self.assertEqual(self.runs(small, "output"), [(b"small\n",)])
        self.assertNotIn("lost", worker.said() + watcher.said())

    def test_a_server_that_hangs_costs_no_output(self) -> None:
        """What is longer than the time allowed is no slow wire then."""
        job = self.put("echo > started; sleep 1; head -c 60000 /dev/zero | tr '\\0' x")
        worker = self.worker()
        self.wait_lines("started", 1)
        pid = self.server.running()
        os.kill(pid, signal.SIGSTOP)
        try:
            self.wait_until(lambda: "trying again" in worker.said(), "it waited long")
            began = time.monotonic()
            self.wait_until(lambda: time.monotonic() - began > 5, "and longer")
        finally:
            os.kill(pid, signal.SIGCONT)
        self.wait_state(job, State.COMPLETED)
        self.assertEqual(self.runs(job, "output"), [(b"x" * 60000,)])


class HangingProxy(Proxy):
    """A door to a member that lost its group: it says that it takes writes, and each
    COMMIT hangs for good."""

    def __init__(self, to: str) -> None:
        self.commits, self.closed = 0, threading.Event()
        super().__init__(to)

    def close(self) -> None:
        self.closed.set()
        super().close()

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if to.family == socket.AF_UNIX and COMMIT.search(data):
                    self.commits += 1
                    to.shutdown(socket.SHUT_RDWR)  # its locks are no other member's
                    self.closed.wait()
                to.sendall(data)
        if source.family == socket.AF_UNIX and self.commits:
            self.closed.wait()
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Hosts(WorkCase):
    """DB_HOST=a,b: the first that takes writes, and can."""

    def doors(self, *proxies: Proxy) -> dict[str, str]:
        for one in proxies:
            self.addCleanup(one.close)
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in proxies)
        return {**proxies[0].variables(), "DB_HOST": hosts, "DB_PORT": ""}

    def test_a_host_whose_commits_hang_is_left_for_the_next(self) -> None:
        alone, good = HangingProxy(self.server.socket), Proxy(self.server.socket)
        doors = self.doors(alone, good)
        job = self.put("true")
        worker = self.worker(**doors, QUEUECTL_WORKER_TIMEOUT="9")
        began = time.monotonic()
        self.wait_state(job, State.COMPLETED)
        self.assertLess(time.monotonic() - began, 15)
        self.assertEqual((alone.commits, self.job(job, "runs")), (1, (1,)))
        another = self.queuectl("enqueue", "-c", "true", **doors).strip()
        self.wait_state(another, State.COMPLETED)
        self.assertNotIn("Traceback", worker.said())

    def test_after_a_reset_the_same_host_is_used_again(self) -> None:
        """The other may be a replica that somebody left writable."""
        primary, other = Proxy(self.server.socket), Proxy(self.server.socket)
        doors = self.doors(primary, other)
        for _ in range(4):
            primary.faults = ["before", "after"]
            self.queuectl("enqueue", "-c", "true", **doors)
            self.assertEqual(primary.faults, [])
        self.assertEqual(other.sockets, [])

    def test_a_stale_host_that_takes_no_writes_is_passed_over(self) -> None:
        stale = queuectl.PrivateServer(
            self.path("stale"), os.environ.get("QUEUECTL_TEST_MYSQLD", "")
        )
        stale.start()
        self.addCleanup(stale.stop)
        self.queuectl("db", "init", DB_SOCKET=stale.socket, DB_PASSWORD="")
        with pymysql.connect(
            unix_socket=stale.socket, user="root", autocommit=True
        ) as database:
            for statement in (
                f"ALTER USER root@localhost IDENTIFIED BY '{self.password}'",
                "UPDATE queuectl.config SET value = '0/0'",
                "SET GLOBAL read_only = 1",
            ):
                database.cursor().execute(statement)
        doors = self.doors(Proxy(stale.socket), Proxy(self.server.socket))
        doors["DB_SSL_MODE"] = "preferred"  # a password, which MySQL wants by TLS
        job = self.queuectl("enqueue", "-c", "true", **doors).strip()
        worker = self.worker("--drain", **doors)
        self.assertEqual(worker.wait(), 0, worker.said())
        self.assert_state(job, State.COMPLETED)


class AnsweringProxy(Proxy):
    """A door that answers COMMITs by an error of its own: so many, -1: all."""

    def __init__(self, to: str, code: int, times: int) -> None:
        self.code, self.times = code, times
        super().__init__(to)

    def _lose(self, data: bytes, client: socket.socket, server: socket.socket) -> bool:
        if not self.times:
            return False
        self.times -= 1
        text = b"\xff" + struct.pack("<H", self.code) + b"#HY000the hook failed"
        client.sendall(struct.pack("<I", len(text))[:3] + b"\x01" + text)
        client.shutdown(socket.SHUT_WR)
        return True


class RefusedCommits(WorkCase):
    """A COMMIT that the cluster did not take, or that nobody knows the error of."""

    def enqueue_by(self, code: int, times: int, status: int) -> str:
        proxy = AnsweringProxy(self.server.socket, code, times)
        self.addCleanup(proxy.close)
        argv = ("enqueue", "--id", f"j{code}", "-c", "true")
        self.queuectl(*argv, status=status, **proxy.variables())
        return self.errors

    def test_a_hook_that_fails_at_commit_is_a_lost_answer(self) -> None:
        for code in (3100, 3797, 1950, 4999):
            with self.subTest(code):
                self.enqueue_by(code, 2, 0)
                self.assert_state(f"j{code}", State.PENDING)

    def test_while_it_fails_it_is_unknown_whether_the_job_was_accepted(self) -> None:
        said = self.enqueue_by(3100, -1, 69)
        self.assertIn("unknown whether accepted: id j3100; repeat with", said)

    def test_what_the_server_refused_is_not_unknown(self) -> None:
        self.addCleanup(self.sql, "RENAME TABLE jobs_away TO jobs")
        self.sql("RENAME TABLE jobs TO jobs_away")
        self.queuectl("enqueue", "-c", "true", status=69)
        self.assertNotIn("unknown whether", self.errors)
        self.assertIn("queuectl db init", self.errors)


class SinglesProxy(Proxy):
    """A door that answers packets of several statements as MySQL Router may."""

    refused = 0

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(1 << 20)
                if not data:
                    break
                several = data[4:5] == b"\x03" and b";\n" in data
                if several and to.family == socket.AF_UNIX:
                    self.refused += 1
                    text = b"\xff" + struct.pack("<H", 4501) + b"#HY000forbidden"
                    source.sendall(struct.pack("<I", len(text))[:3] + b"\x01" + text)
                else:
                    to.sendall(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class SingleStatements(WorkCase):
    """A proxy that forbids packets of several statements."""

    def test_where_packets_of_several_statements_are_forbidden_they_go_singly(
        self,
    ) -> None:
        proxy = SinglesProxy(self.server.socket)
        self.addCleanup(proxy.close)
        self.environment.update(proxy.variables())
        self.queuectl("enqueue", "--id", "a", "--max-retries", "0", "-c", "exit 1")
        self.queuectl("enqueue", "--after", "a", "-c", "true")
        self.queuectl("enqueue", "-q", "--lines", "-", stdin=b"echo x >> ran\n" * 20)
        self.assertEqual(proxy.refused, 3)  # asked once by each
        self.drain("--count", "2")
        self.assertEqual(self.counts(), {"completed": 20, "dead": 2})
        self.assertEqual(len(self.lines("ran")), 20)
        self.assertEqual(self.sql("SELECT DISTINCT attempt FROM runs"), [(1,)])
        done = self.run_queuectl("db", "check").stdout.decode()
        self.assertIn("each goes in a packet of its own", done)


class ListeningProxy(Proxy):
    """A door that notes how many statements began with its words."""

    words = b"SELECT id, state FROM jobs"
    heard = 0

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.heard += data[5:].startswith(self.words)
                to.sendall(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Followers(WorkCase):
    """`run`, `wait` and `logs -f` bear an outage that others give up in."""

    def setUp(self) -> None:
        super().setUp()
        self.script = self.path("impatient.py")
        with open(self.script, "w") as file:
            file.write(
                f"import dataclasses, sys; sys.path[0] = {HERE!r}; import queuectl\n"
                "def scaled(policy): return dataclasses.replace(\n"
                "    policy, retry_for_s=policy.retry_for_s / 10)\n"
                "queuectl.WRITING = scaled(queuectl.WRITING)\n"
                "queuectl.FOLLOWING = scaled(queuectl.FOLLOWING)\n"
                "sys.exit(queuectl.main())\n"
            )

    def test_they_go_on_after_an_outage_that_ends_an_enqueue(self) -> None:
        proxy = ListeningProxy(self.server.socket)
        self.addCleanup(proxy.close)
        self.put("echo > started; until [ -e go ]; do sleep 0.1; done", id="held")
        worker = self.worker("--count", "2")
        self.wait_lines("started", 1)
        command = "echo > running; until [ -e go ]; do sleep 0.1; done; echo done"
        followers = [
            self.start(*argv, **proxy.variables())
            for argv in (
                ("run", "-c", command),
                ("wait", "held"),
                ("logs", "-f", "held"),
            )
        ]
        self.wait_lines("running", 1)
        self.wait_until(lambda: proxy.heard, "the first one waits")
        before = proxy.heard
        late = self.start("wait", "held", "--timeout", "4", **proxy.variables())
        self.wait_until(lambda: proxy.heard > before + 10, "the other one, too")
        proxy.refuse()
        proxy.cut()
        self.assertEqual(
            self.start("enqueue", "-c", "true", **proxy.variables()).wait(), 69
        )
        self.assertEqual(late.wait(), 124, late.said())
        self.assertIn("not ended within 4 s: held", late.said())
        open(self.path("go"), "w").close()
        self.wait_state("held", State.COMPLETED)
        for one in followers:
            self.assertIsNone(one.process.poll(), one.said())
        proxy.pass_on()
        for one in followers:
            self.assertEqual(one.wait(), 0, one.said())
        self.assertIn("done\n", followers[0].said())
        worker.signal(signal.SIGTERM)


class ForgettingProxy(Proxy):
    """A door that loses a COMMIT and its client, of which the server never learns."""

    def __init__(self, to: str) -> None:
        self.closed = threading.Event()
        super().__init__(to)

    def close(self) -> None:
        self.closed.set()
        super().close()

    def _lose(self, data: bytes, client: socket.socket, server: socket.socket) -> bool:
        if not (self.faults and self.faults.pop(0)):
            return False
        client.shutdown(socket.SHUT_RDWR)
        self.closed.wait()
        return True


class ForgottenSessions(WorkCase):
    """A partition leaves a session behind whose locks would be kept for hours."""

    def test_a_session_that_the_server_takes_for_alive_stops_the_queue_for_seconds(
        self,
    ) -> None:
        proxy = ForgettingProxy(self.server.socket)
        self.addCleanup(proxy.close)
        del self.environment["DB_SOCKET"]
        self.environment.update(
            DB_HOST="127.0.0.1", DB_PORT=str(proxy.port), DB_SSL_MODE="disabled"
        )
        self.put_many(12, "sleep 0.1; echo $QUEUECTL_JOB_ID >> ran")
        proxy.faults = ["", "", "", "lost"]
        drain = self.start("worker", "start", "--drain", "--count", "2")
        self.wait_until(lambda: drain.process.poll() is not None, "it has drained", 20)
        self.assertEqual(drain.process.returncode, 0, drain.said())
        self.assertEqual(proxy.faults, [])
        ran = self.lines("ran")
        self.assertEqual((len(ran), len(set(ran))), (12, 12))
        self.assertEqual(self.counts(), {"completed": 12})


class Doorbells(WorkCase):
    """Idle workers are woken at once, by MySQL alone. Here the poll comes too late."""

    slow_poll = {"QUEUECTL_POLL_INTERVAL": "60", "QUEUECTL_HEARTBEAT": "60"}

    def setUp(self) -> None:
        super().setUp()
        self.hung: list[queuectl.Doorbell] = []
        self.addCleanup(self.take_down)

    def bells(self) -> list[str]:
        """The notes of the sleeps that are parked."""
        rows = self.sql(
            "SELECT info FROM information_schema.processlist "
            "WHERE info LIKE 'SELECT SLEEP(%%) /* queuectl doorbell %%'"
        )
        return [str(row[0]) for row in rows]

    def idle_worker(self, *argv: str) -> Background:
        worker = self.worker(*argv, **self.slow_poll)
        self.wait_until(self.bells, "it has parked")
        return worker

    def test_an_enqueue_wakes_an_idle_worker_long_before_its_poll(self) -> None:
        self.idle_worker("--count", "2")
        for _ in range(3):
            self.wait_state(self.enqueue("true"), State.COMPLETED, 5)

    def test_a_retry_of_a_dead_letter_and_a_cancellation_ring_too(self) -> None:
        job_id = self.put("test -e again && sleep 60", state="dead")
        self.sql("INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs")
        self.idle_worker("--count", "2")
        open(self.path("again"), "w").close()
        self.queuectl("dlq", "retry", job_id)
        self.wait_state(job_id, State.PROCESSING, 5)
        self.wait_until(self.bells, "it has parked again")
        self.queuectl("cancel", job_id)
        self.wait_state(job_id, State.CANCELLED, 5)

    def test_a_cancellation_reaches_every_process_of_a_supervisor(self) -> None:
        self.idle_worker("--count", "4")
        ids = [self.enqueue("sleep 60") for _ in range(3)]
        for job_id in ids:
            self.wait_state(job_id, State.PROCESSING, 5)
        for job_id in ids:
            self.wait_until(self.bells, "a slot is free")
            self.queuectl("cancel", job_id)
            self.wait_state(job_id, State.CANCELLED, 5)

    def test_a_full_process_leaves_the_ring_to_one_with_a_free_slot(self) -> None:
        if (os.cpu_count() or 1) < 2:
            self.skipTest("one CPU: one process")
        self.idle_worker("--count", "2")
        for _ in range(2):
            self.wait_until(self.bells, "a slot is free")
            job_id = self.enqueue("sleep 60")
            self.wait_state(job_id, State.PROCESSING, 5)
        rows = self.sql("SELECT COUNT(DISTINCT worker) FROM jobs")
        self.assertEqual(rows, [(2,)])

    def test_a_delayed_job_starts_when_it_is_due_without_a_poll(self) -> None:
        self.idle_worker()
        job_id = self.enqueue("true", delay="1s")
        self.wait_state(job_id, State.COMPLETED, 5)
        [(late,)] = self.sql(
            "SELECT started_at >= next_run_at FROM jobs WHERE id = %s", job_id
        )
        self.assertEqual(late, 1)

    def test_a_job_for_another_queue_wakes_nobody_here(self) -> None:
        etl: list[int] = []
        mail: list[int] = []
        self.bell(etl, "a etl")
        self.bell(mail, "b mail,news")
        self.wait_until(lambda: len(self.bells()) == 2, "both have parked")
        queuectl.ring(self.reach(), 1, {"mail"})
        self.wait_until(lambda: mail, "it was rung")
        self.assertEqual(etl, [])
        queuectl.ring(self.reach(), 1, {"mail", "etl"})
        self.wait_until(lambda: etl, "it was rung")

    def test_where_no_thread_is_to_be_had_the_poll_finds_the_work(self) -> None:
        self.script = self.path("short.py")
        with open(self.script, "w") as file:
            file.write(
                f"import sys; sys.path[0] = {HERE!r}; import queuectl\n"
                "def none(*arguments): raise RuntimeError('no new thread')\n"
                "queuectl.Doorbell = none; sys.exit(queuectl.main())\n"
            )
        worker = self.worker()
        self.wait_state(self.put("true"), State.COMPLETED)
        self.assertNotIn("Traceback", worker.said())
        self.assertNotIn("ended: exit", worker.said())

    def test_a_bell_is_found_where_performance_schema_is_switched_off(self) -> None:
        # Then its list of processes is there, and empty.
        self.addCleanup(self.sql, "DROP VIEW no_processes")
        self.sql(
            "CREATE OR REPLACE VIEW no_processes AS "
            "SELECT id, info, db FROM information_schema.processlist WHERE FALSE"
        )
        rung: list[int] = []
        self.bell(rung)
        self.wait_until(self.bells, "it has parked")
        with unittest.mock.patch("queuectl._process_list", lambda _: "no_processes"):
            queuectl.ring(self.reach())
        self.wait_until(lambda: rung, "it was rung", 5)

    def test_with_the_doorbell_off_nobody_parks_and_the_poll_finds_the_work(
        self,
    ) -> None:
        self.queuectl("config", "set", "doorbell", "off")
        self.worker()
        self.wait_state(self.enqueue("true"), State.COMPLETED)
        self.assertEqual(self.bells(), [])

    def bell(self, rung: list[int], note: str = "w -") -> queuectl.Doorbell:
        """A doorbell that is parked, and says when it was rung."""
        database = self.reach()
        bell = queuectl.Doorbell(database.target, note, lambda: rung.append(1))
        bell.park()
        self.hung.append(bell)
        return bell

    def take_down(self) -> None:
        """First all leave: one that is rung before would park again."""
        for bell in self.hung:
            bell.leave()
        queuectl.ring(self.reach())
        for bell in self.hung:
            bell._database.close()  # waits for the end of its sleep

    def test_parking_ends_when_the_doorbell_is_switched_off(self) -> None:
        rung: list[int] = []
        with unittest.mock.patch.object(queuectl, "PARKED_S", 2):
            bell = self.bell(rung)
            self.wait_until(self.bells, "it has parked")
        bell.leave()
        self.wait_until(lambda: not self.bells(), "the last sleep has ended")
        self.assertEqual(rung, [])

    def test_rings_wake_no_more_than_they_have_jobs_for_and_one(self) -> None:
        rung: list[int] = []
        for _ in range(5):
            self.bell(rung)
        self.wait_until(lambda: len(self.bells()) == 5, "all have parked")
        queuectl.ring(self.reach(), 2)
        self.wait_until(lambda: len(rung) == 3, "two were rung, and one more")
        self.assertEqual(len(self.bells()), 2)
        queuectl.ring(self.reach())
        self.wait_until(lambda: len(rung) == 5, "all were rung")

    def test_a_ring_hits_nothing_but_parked_sleeps(self) -> None:
        """Busy connections, one of them in a sleep of its own, race with rings."""
        rung: list[int] = []
        bell = self.bell(rung)
        over, broken = threading.Event(), []

        def work(statement: str) -> None:
            connection = self.connection()
            with connection, connection.cursor() as cursor:
                while not over.is_set():
                    try:
                        cursor.execute(statement)
                        if cursor.fetchone()[0]:  # type: ignore[index]
                            broken.append("a sleep was cut short")
                    except pymysql.MySQLError as error:
                        broken.append(repr(error))

        threads = [
            threading.Thread(target=work, args=(statement,))
            for statement in (
                "SELECT SLEEP(0.01) /* queuectl doorbell w - */",
                "SELECT COUNT(*) * 0 FROM jobs /* queuectl doorbell */",
                "SELECT 0",
            )
        ]
        for thread in threads:
            thread.start()
        rings, database, began = 0, self.reach(), time.monotonic()
        # On a busy machine it takes longer until it was rung often enough.
        least, most = began + 2, began + 20
        while time.monotonic() < (least if rings > 20 else most):
            queuectl.ring(database)
            rings += bell.park()
        over.set()
        for thread in threads:
            thread.join()
        self.assertEqual(broken, [])
        self.assertGreater(rings, 20)


class Scale(WorkCase):
    """What keeps the claim short and the table small."""

    def claim(
        self, turns: queuectl.TurnTaker, free: int, look: bool = False
    ) -> list[str]:
        """The ids that a busy worker claims."""
        turn = turns.take(queuectl.TurnRequest(running=[(0, "")], free=free, look=look))
        return [job.claim.id for job in turn.jobs]

    def test_a_job_of_higher_priority_is_claimed_next(self) -> None:
        turns = self.turns()
        for number in range(4):
            self.put("true", id=f"plain-{number}")
        self.assertEqual(self.claim(turns, 2), ["plain-0", "plain-1"])
        self.put("true", id="urgent", priority=5)
        self.put("true", id="low", priority=-5)
        self.assertEqual(self.claim(turns, 2), ["urgent", "plain-2"])
        self.assertEqual(self.claim(turns, 9), ["plain-3", "low"])

    def test_where_claims_are_slow_they_go_on_from_the_last_until_the_next_look(
        self,
    ) -> None:
        turns = self.turns()
        with unittest.mock.patch.object(queuectl, "SLOW_CLAIM_US", -1):
            early = self.put("true", state="failed", next_run_at="9999-01-01")
            for name in ("first", "second", "third"):
                self.put("true", id=name)
            self.assertEqual(self.claim(turns, 1), ["first"])
            self.sql("UPDATE jobs SET state = 'pending' WHERE id = %s", early)
            self.put("true", id="urgent", priority=5)
            self.assertEqual(self.claim(turns, 1), ["second"])
            self.assertEqual(
                self.claim(turns, 9, look=True), ["urgent", early, "third"]
            )

    def test_a_look_while_all_slots_are_busy_is_made_up_for_by_the_next_claim(
        self,
    ) -> None:
        turns = self.turns()
        self.put_many(20, "true", queue="big")
        self.assertEqual(len(self.claim(turns, 2)), 2)
        late = self.put("true", queue="late")
        self.assertEqual(self.claim(turns, 0, look=True), [])
        self.assertIn(late, self.claim(turns, 2))
        # The same holds for what stands before the place that a claim has reached.
        with unittest.mock.patch.object(queuectl, "SLOW_CLAIM_US", -1):
            self.claim(turns, 2)
            urgent = self.put("true", queue="big", priority=5)
            self.assertEqual(self.claim(turns, 0, look=True), [])
            self.assertIn(urgent, self.claim(turns, 2))

    def test_a_slow_wire_hides_no_job_of_higher_priority(self) -> None:
        proxy = SlowProxy(self.server.socket, 10_000)
        self.addCleanup(proxy.close)
        turns = self.turns(**proxy.variables())
        self.put_many(5, "true")
        self.claim(turns, 1)
        urgent = self.put("true", priority=5)
        self.assertEqual(self.claim(turns, 1), [urgent])

    def put_in_queues(self, queues: int, each: int) -> None:
        names = [f"q{number:04}" for number in range(queues)] * each
        for some in queuectl.batched(names, 1000):
            self.sql(
                "INSERT INTO jobs (command, queue) VALUES "
                + ", ".join(["('true', %s)"] * len(some)),
                *some,
            )

    def test_queues_get_their_turn_by_what_was_taken(self) -> None:
        turns = self.turns()
        self.put_in_queues(queues=4, each=4)
        taken = [self.claimed_queues(turns, 2) for _ in range(4)]
        self.assertEqual(len(set(taken[0] + taken[1])), 4)
        self.assertEqual(taken[:2], taken[2:])

    def claimed_queues(
        self, turns: queuectl.TurnTaker, free: int, look: bool = False
    ) -> list[str]:
        """The queues of the jobs that a busy worker claims."""
        request = queuectl.TurnRequest(running=[(0, "")], free=free, look=look)
        return [job.queue for job in turns.take(request).jobs]

    def test_of_hundreds_of_queues_each_gets_its_turn(self) -> None:
        turns = self.turns()
        self.put_in_queues(queues=230, each=3)
        taken = [self.claimed_queues(turns, 46, look=True) for _ in range(5)]
        self.assertEqual(len(set(sum(taken, []))), 230)

    def questions(self, turns: queuectl.TurnTaker) -> int:
        """How many statements a worker's session has sent so far."""
        query = "SHOW SESSION STATUS LIKE 'Questions'"
        return turns.database.rows(lambda _, count: int(count), query)[0]

    def test_a_claim_from_thousands_of_queues_asks_no_more_than_it_takes(self) -> None:
        turns = self.turns()
        self.put_in_queues(queues=2000, each=1)
        before = self.questions(turns)
        taken = len(self.claim(turns, 1, look=True))
        taken += sum(len(self.claim(turns, 50)) for _ in range(4))
        self.assertGreater(taken, 190)
        self.assertLess(self.questions(turns) - before, 1.5 * taken)

    def test_a_look_reads_the_rows_of_other_workers_with_a_heartbeat_alone(
        self,
    ) -> None:
        turns = self.turns()
        self.put("true", id="own")
        request = queuectl.TurnRequest(free=1)
        [job] = turns.take(request).jobs
        self.sql("UPDATE jobs SET cancel_requested_at = UTC_TIMESTAMP(6)")
        self.put_many(1000, "true", state="processing", worker="other", token="x")
        running = [(job.claim.seq, job.claim.token)]
        read = []
        for detect in (False, True):
            before = self.rows_read(turns)
            look = queuectl.TurnRequest(running=running, look=True, detect=detect)
            snapshot = turns.take(look).snapshot
            assert snapshot
            self.assertEqual(snapshot.runs, {running[0]: True})
            read.append(self.rows_read(turns) - before)
        self.assertLess(read[0], 500)
        self.assertGreater(read[1], 1000)

    def rows_read(self, turns: queuectl.TurnTaker) -> int:
        """How many index entries a worker's session has walked over so far."""
        query = "SHOW SESSION STATUS LIKE 'Handler_read_next'"
        return turns.database.rows(lambda _, count: int(count), query)[0]

    def test_what_ended_long_ago_goes_and_takes_its_history_along(self) -> None:
        ago = "2026-01-01 00:00:00"
        for state in ("completed", "cancelled", "dead", "pending"):
            self.put(
                "true",
                id=state,
                state=state,
                queue="idle",
                next_run_at=ago,
                finished_at=ago,
            )
        self.sql("INSERT INTO runs (job_seq, run, attempt) SELECT seq, 1, 1 FROM jobs")
        self.worker(
            "--queue",
            "other",
            QUEUECTL_RETAIN_COMPLETED="1h",
            QUEUECTL_RETAIN_CANCELLED="0",
        )
        self.wait_until(lambda: self.state("completed") == "absent", "it is purged")
        self.assertEqual(
            self.sql("SELECT id FROM jobs ORDER BY id"),
            [("cancelled",), ("dead",), ("pending",)],
        )
        self.assertEqual(self.sql("SELECT COUNT(*) FROM runs"), [(3,)])

    def test_purge_takes_what_ended_before_a_time_and_says_how_many(self) -> None:
        ago = "2026-01-01 00:00:00"
        for number in range(3):
            self.put(
                "true",
                id=f"old-{number}",
                state="dead",
                finished_at=ago,
                next_run_at=ago,
            )
        self.put_many(1200, "true", state="dead", finished_at=ago, next_run_at=ago)
        self.put("true", id="new", state="dead", finished_at="2999-01-01 00:00:00")
        self.sql("INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs")
        parent = self.sql("SELECT seq FROM jobs WHERE id = 'old-0'")[0][0]
        self.put("true", id="child", state="blocked")
        child = self.sql("SELECT seq FROM jobs WHERE id = 'child'")[0][0]
        self.sql(
            "INSERT INTO dependencies (parent, child) VALUES (%s, %s)", parent, child
        )
        purge = ("purge", "--state", "dead", "--before")
        self.assertEqual(
            self.queuectl(*purge, "1d", "--dry-run"),
            "1,202 dead jobs would be purged\n",
        )
        self.assertEqual(
            self.queuectl(*purge, "2026-02-01T00:00:00Z"), "1,202 dead jobs purged\n"
        )
        self.assertEqual(self.queuectl(*purge, "0"), "0 dead jobs purged\n")
        self.assertEqual(
            self.sql("SELECT id FROM dlq ORDER BY id"), [("new",), ("old-0",)]
        )

    def test_a_cancelled_job_of_the_far_future_is_purged_too(self) -> None:
        job_id = self.enqueue("true", run_at="2999-01-01T00:00:00Z")
        self.queuectl("cancel", job_id)
        purged = self.queuectl("purge", "--state", "cancelled")
        self.assertEqual(purged, "1 cancelled jobs purged\n")

    def test_purge_refuses_what_has_not_ended_and_times_it_cannot_read(self) -> None:
        for argv in (
            ["--state", "pending"],
            ["--state", "dead", "--before", "soon"],
            ["--state", "dead", "--before", "2026-02-01"],
            ["--state", "dead", "--before", "999999999999d"],
            [],
        ):
            self.queuectl("purge", *argv, status=2)

    def test_thousands_of_lines_keep_their_order_and_are_all_or_none(self) -> None:
        lines = "".join(f"echo {number}\n" for number in range(3500))
        self.queuectl("enqueue", "--lines", "-", "-q", stdin=lines.encode())
        rows = self.sql("SELECT command FROM jobs ORDER BY seq")
        self.assertEqual([str(row[0]) for row in rows], lines.splitlines())
        jobs = [json.dumps({"command": "true", "id": f"n{one}"}) for one in range(2500)]
        jobs.append(json.dumps({"command": "true", "id": "n7", "priority": 1}))
        self.queuectl("enqueue", "-f", "-", stdin="\n".join(jobs).encode(), status=1)
        self.assertEqual(self.sql("SELECT COUNT(*) FROM jobs"), [(3500,)])

    def spool(self, count: int, **keys: object) -> queuectl.Spool:
        spool = queuectl.Spool()
        self.addCleanup(spool._file.close)
        for number in range(count):
            job = {"id": f"{number:04}", "command": "true", **keys}
            spool.add(queuectl.check_job(job, {}))
        return spool

    def test_a_huge_enqueue_is_out_of_the_claims_way_until_its_commit(self) -> None:
        database = self.turns().database
        seen = set()

        def look(cursor: object, key: str, moment: str) -> int:
            seen.update(self.sql("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
            return released(cursor, key, moment)

        released = queuectl.release_staged
        with unittest.mock.patch.multiple(
            queuectl, STAGED_FROM=1000, RELEASED_AT_ONCE=900, release_staged=look
        ):
            queuectl.enqueue(database, self.spool(2000), False)
        self.assertIn(("blocked", 2000), seen)
        self.assertEqual(
            self.sql(
                "SELECT state, COUNT(*) FROM jobs "
                "WHERE next_run_at = created_at GROUP BY state"
            ),
            [("pending", 2000)],
        )
        self.assertEqual(self.sql("SELECT COUNT(*) FROM config"), [(1,)])

    def test_workers_release_what_a_dead_enqueuer_left_staged(self) -> None:
        database = self.turns().database
        with unittest.mock.patch.multiple(
            queuectl, STAGED_FROM=20, release_staged=lambda *_: 0
        ):
            queuectl.enqueue(database, self.spool(40), False)
        self.assertEqual(self.sql("SELECT COUNT(*) FROM config"), [(2,)])
        self.drain("--count", "4")
        self.assertEqual(
            self.sql("SELECT state, COUNT(*) FROM jobs GROUP BY state"),
            [("completed", 40)],
        )
        self.assertEqual(self.sql("SELECT COUNT(*) FROM config"), [(1,)])

    def test_a_staged_enqueue_whose_answer_was_lost_is_done_once(self) -> None:
        proxy = CuttingProxy(self.server.socket, b"\x03COMMIT", True)
        self.addCleanup(proxy.close)
        database = self.reach(
            DB_SOCKET="",
            DB_HOST="127.0.0.1",
            DB_PORT=str(proxy.port),
            DB_SSL_MODE="disabled",
        )
        with unittest.mock.patch.multiple(queuectl, STAGED_FROM=20):
            queuectl.enqueue(database, self.spool(40), True)
        self.assertEqual(proxy.cuts, 1)
        self.assertEqual(self.counts(), {"pending": 40})

    def test_jobs_of_one_input_may_name_different_keys(self) -> None:
        jobs = [
            {"id": "a", "command": "true", "priority": 3, "delay": "1h"},
            {"id": "b", "command": "true", "queue": "etl"},
            {"id": "c", "command": "true", "run_at": "2999-01-01T00:00:00Z"},
        ]
        self.queuectl("enqueue", json.dumps(jobs))
        rows = self.sql(
            "SELECT id, state, queue, priority, next_run_at > "
            "UTC_TIMESTAMP() + INTERVAL 59 MINUTE FROM jobs ORDER BY seq"
        )
        self.assertEqual(
            rows,
            [
                ("a", "scheduled", "default", 3, 1),
                ("b", "pending", "etl", 0, 0),
                ("c", "scheduled", "default", 0, 1),
            ],
        )


@unittest.skipUnless(os.environ.get("QUEUECTL_BENCH"), "QUEUECTL_BENCH=1")
class Speed(WorkCase):
    """What this server and this host carry, in one run; medians, after a round that
    does not count. Each drain stands beside xargs, a bare loop of the same spawns.

    QUEUECTL_BENCH=256 does it with so many slots; 1: with 64 for each CPU.
    """

    settings: Mapping[str, str] = {}
    rounds, jobs, pick_ups, idle_s = 3, 5000, 40, 6.0

    def timed(self, act: Callable[[], object]) -> float:
        began = time.monotonic()
        act()
        return time.monotonic() - began

    def drain_once(self, slots: int) -> tuple[float, float, float]:
        """Jobs a second: enqueued, drained by `worker start`, and run by xargs."""
        lines = b"true\n" * self.jobs
        bare = ["xargs", "-P", str(os.cpu_count()), "-I{}", "sh", "-c", "{}"]
        return (
            self.jobs
            / self.timed(
                lambda: self.queuectl("enqueue", "-q", "--lines", "-", stdin=lines)
            ),
            self.jobs / self.timed(lambda: self.drain("--count", str(slots))),
            self.jobs
            / self.timed(lambda: subprocess.run(bare, input=lines, check=True)),
        )

    def waits(self) -> list[float]:
        """Milliseconds from a commit to the command's first output, idle worker."""
        fifo, waits = self.path("fifo"), []
        os.mkfifo(fifo)
        command = {"command": f"echo >{shlex.quote(fifo)}"}
        database = self.reach()
        with open(os.open(fifo, os.O_RDWR), "rb", buffering=0) as told:
            for number in range(self.pick_ups + 1):
                spool = queuectl.Spool()
                spool.add(queuectl.check_job(command, {}))
                queuectl.enqueue(database, spool, False)
                committed = time.monotonic()
                queuectl.ring(database, 1, spool.queues)
                told.read(1)
                if number:  # the first one waited for the worker's start
                    waits.append((time.monotonic() - committed) * 1e3)
                self.wait_until(
                    lambda: time.monotonic() - committed > 0.1, "it is idle again"
                )
        return sorted(waits)

    def used(self, worker: Background) -> tuple[int, float]:
        """Queries that the server has had, and CPU seconds of a worker."""
        [(_, queries)] = self.sql("SHOW GLOBAL STATUS LIKE 'Questions'")
        ticks = 0
        for pid in [worker.pid, *worker.children()]:
            with open(f"/proc/{pid}/stat") as file:
                ticks += sum(map(int, file.read().rsplit(") ", 1)[1].split()[11:13]))
        return int(str(queries)), ticks / os.sysconf("SC_CLK_TCK")

    def test_figures(self) -> None:
        asked = int(os.environ["QUEUECTL_BENCH"])
        slots = asked if asked > 1 else 64 * (os.cpu_count() or 1)
        rounds = [self.drain_once(slots) for _ in range(self.rounds + 1)][1:]
        enqueued, drained, bare = map(statistics.median, zip(*rounds))
        command = statistics.median(
            self.timed(lambda: self.queuectl("enqueue", "-q", "-c", "true"))
            for _ in range(5)
        )
        self.sql("DELETE FROM jobs")
        worker = self.worker()
        waits = self.waits()
        before, began = self.used(worker), time.monotonic()
        self.wait_until(lambda: time.monotonic() - began > self.idle_s, "it has idled")
        after = self.used(worker)
        print(
            f"\n{self.reach().rows(str, 'SELECT VERSION()')[0]}, {slots} slots\n"
            f"enqueued {enqueued:.0f}/s, drained {drained:.0f}/s, "
            f"{drained / bare:.2f} of xargs ({bare:.0f}/s)\n"
            f"one enqueue command {command * 1e3:.0f} ms; from commit to output "
            f"{statistics.median(waits):.1f} ms, {waits[-3]:.1f} at p95, "
            f"{waits[-1]:.1f} at worst\n"
            f"idle: {(after[0] - before[0] - 1) / self.idle_s:.1f} queries/s, "
            f"{(after[1] - before[1]) * 60 / self.idle_s:.2f} s of CPU a minute"
        )
        self.assertGreater(drained / bare, 0.3)


class Running(WorkCase):
    """One shell command: its output, its time limit, its end."""

    def ran(self, command: str, **columns: object) -> tuple[object, ...]:
        """(reason, exit_code, output) of a job's run; keeps `detail` and `state`."""
        job = self.put(command, **{"max_retries": 0, **columns})
        self.drain()
        [(reason, code, output, detail)] = self.runs(
            job, "reason", "exit_code", "output", "detail"
        )
        self.detail, self.ended = str(detail), self.state(job)
        return reason, code, output

    def test_three_slots_run_three_jobs_at_once(self) -> None:
        self.put_many(
            3,
            "echo >> here; until [ $(wc -l < here) = 3 ]; do sleep 0.05; done",
            timeout=10,
        )
        self.drain("--count", "3")
        self.assertEqual(self.counts(), {"completed": 3})

    def test_a_timeout_names_its_setting_and_leaves_no_process(self) -> None:
        started = time.monotonic()
        self.assertEqual(self.ran("sleep 60", timeout=0.3)[:2], ("timeout", 124))
        self.assertIn("the job's timeout", self.detail)
        self.environment["QUEUECTL_JOB_TIMEOUT"] = "0.3"
        stubborn = "trap '' TERM; while :; do sleep 1; done"
        self.assertEqual(
            self.ran(f'(setsid sh -c "{stubborn}") & sleep 60 & {stubborn}')[:2],
            ("timeout", 124),
        )
        self.assertIn("job_timeout", self.detail)
        self.assertEqual(self.living(), [])
        self.assertLess(time.monotonic() - started, 6)

    def test_a_term_during_a_time_limit_gives_the_job_its_grace(self) -> None:
        self.assertEqual(
            self.ran("trap 'echo tidied; exit 0' TERM; sleep 60 & wait", timeout=0.3),
            ("timeout", 124, b"tidied\n"),
        )

    def test_a_worker_stays_small_while_a_job_prints_300_megabytes(self) -> None:
        job = self.put("head -c 300000000 /dev/zero; echo end")
        worker = self.worker()
        self.wait_state(job, State.COMPLETED)
        [pid] = worker.children()
        with open(f"/proc/{pid}/status") as file:
            peak_kb = int(re.findall(r"VmHWM:\s*(\d+) kB", file.read())[0])
        self.assertLess(peak_kb, 60 * 1024)
        # What it has for followers is trimmed before it leaves.
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0, worker.said())
        [(size, output)] = self.runs(job, "output_bytes", "output")
        self.assertEqual(size, 300000004)
        self.assertLessEqual(len(bytes(str(output), "latin-1")), 65536 * 4)
        self.assertEqual(
            self.sql("SELECT LENGTH(output) <= 65536, RIGHT(output, 4) FROM runs"),
            [(1, b"end\n")],
        )

    def test_all_byte_values_are_kept(self) -> None:
        with open(self.path("bytes"), "wb") as file:
            file.write(bytes(range(256)))
        self.assertEqual(self.ran("cat bytes"), ("exit", 0, bytes(range(256))))

    def test_head_and_tail_of_the_output_are_kept_and_the_cut_is_marked(self) -> None:
        self.environment["QUEUECTL_OUTPUT_LIMIT"] = "1000"
        output = self.ran("seq 1 100000")[2]
        assert isinstance(output, bytes)
        self.assertLessEqual(len(output), 1000)
        self.assertTrue(output.startswith(b"1\n2\n3\n"))
        self.assertTrue(output.endswith(b"99999\n100000\n"))
        self.assertIn(b"588895 bytes in all", output)

    def test_output_is_seen_while_the_job_runs(self) -> None:
        job = self.put(
            "echo first; until [ -e go ]; do sleep 0.05; done; "
            "echo second >&2; sleep 60"
        )
        self.worker()
        self.wait_until(lambda: self.runs(job, "output") == [(b"first\n",)], "first", 1)
        with open(self.path("go"), "w"):
            pass
        self.wait_until(
            lambda: self.runs(job, "output") == [(b"first\nsecond\n",)], "second", 2
        )
        self.assertEqual(self.runs(job, "reason", "finished_at"), [(None, None)])
        self.assert_state(job, State.PROCESSING)

    def test_a_background_child_that_holds_the_pipe_outlives_a_job_that_succeeds(
        self,
    ) -> None:
        started = time.monotonic()
        self.assertEqual(
            self.ran("sleep 60 & echo $! > child; echo out"), ("exit", 0, b"out\n")
        )
        self.assertLess(time.monotonic() - started, 5)
        self.assertTrue(alive(int(self.lines("child")[0])))

    def test_a_background_child_is_ended_when_its_job_fails(self) -> None:
        self.assertEqual(self.ran("sleep 60 & echo out; exit 3"), ("exit", 3, b"out\n"))
        self.assertEqual(self.living(), [])

    def test_what_a_failed_run_left_in_another_session_is_gone_before_the_retry(
        self,
    ) -> None:
        stray = 'setsid sh -c "echo \\$\\$ > stray; exec sleep 60" &'
        retried = self.put(
            "if [ -e stray ]; then ! kill -0 $(cat stray); exit; fi; "
            f"{stray} until [ -s stray ]; do sleep 0.02; done; exit 3"
        )
        self.drain()
        self.assert_state(retried, State.COMPLETED)
        self.assertEqual(self.runs(retried, "exit_code"), [(3,), (0,)])

    @can_unshare
    def test_a_run_that_is_being_ended_is_no_other_that_got_its_shells_number(
        self,
    ) -> None:
        if not os.path.exists("/proc/sys/kernel/ns_last_pid"):
            self.skipTest("this kernel lets nobody choose a pid")
        stubborn = self.put(
            "setsid sh -c \"trap '' TERM; echo > deaf; exec sleep 60\" & "
            "echo $$ > pid; exec sleep 60",
            timeout=0.3,
            max_retries=0,
        )
        slots = 4 * (os.cpu_count() or 1)
        worker = self.worker_under(*CONTAINER, count=slots)
        self.wait_lines("deaf", 1)
        # The others shall not get what this worker process is to run.
        [supervisor] = worker.children()
        for pid in children_of(supervisor):
            if not descendants(pid):
                os.kill(pid, signal.SIGSTOP)
        [shell] = self.lines("pid")
        chooser = self.put(
            f"while [ -e /proc/{shell} ]; do :; done; "
            f"echo {int(shell) - 1} > /proc/sys/kernel/ns_last_pid"
        )
        self.wait_state(chooser, State.COMPLETED, 5)
        other = self.put("echo $$ > other; until [ -e go ]; do sleep 0.05; done")
        self.assertEqual(self.wait_lines("other", 1), [shell])
        self.wait_state(stubborn, State.DEAD, 5)
        with open(self.path("go"), "w"):
            pass
        self.wait_state(other, State.COMPLETED, 5)
        self.assertEqual(self.reasons(stubborn), ["timeout"])

    def test_standard_input_is_empty(self) -> None:
        self.assertEqual(self.ran("cat; echo $?"), ("exit", 0, b"0\n"))

    def test_both_streams_are_one_in_order(self) -> None:
        self.assertEqual(
            self.ran("for n in 1 2 3; do echo $n; echo -$n >&2; done")[2],
            b"1\n-1\n2\n-2\n3\n-3\n",
        )

    def test_a_command_of_130000_bytes_runs(self) -> None:
        command = "long='" + "x" * 129978 + "'; echo ${#long}"
        self.assertEqual(len(command), 130000)
        self.assertEqual(self.ran(command), ("exit", 0, b"129978\n"))

    def test_quotes_percent_signs_newlines_and_emoji_reach_the_shell(self) -> None:
        self.assertEqual(
            self.ran(
                """printf '%s|' "it's" '"so"' '100%' '%s %(x)s \\n' '🎉 ü' 'a\nb'"""
            ),
            ("exit", 0, """it's|"so"|100%|%s %(x)s \\n|🎉 ü|a\nb|""".encode()),
        )

    def test_death_by_a_signal_is_128_and_its_number(self) -> None:
        self.assertEqual(
            self.ran("echo out; kill -SEGV $$"),
            ("signal", 128 + signal.SIGSEGV, b"out\n"),
        )
        self.assertEqual(self.ended, State.DEAD)

    def test_a_directory_that_is_missing_is_a_failure_to_start(self) -> None:
        self.assertEqual(
            self.ran("true", cwd="/no/such/directory"), ("spawn", None, None)
        )
        self.assertIn("/no/such/directory", self.detail)
        self.assertEqual(self.ended, State.DEAD)

    def test_why_a_directory_cannot_be_entered_is_told_from_what_a_command_says(
        self,
    ) -> None:
        with open(self.path("file"), "w"):
            pass
        says = 'echo "$QUEUECTL_RUN no" | tee /dev/fd/3; exit 126'
        expected = {
            self.put("true", cwd="file", max_retries=0): (
                ("spawn", None),
                "cannot change into file: it is not a directory, on ",
            ),
            self.put("true", cwd="-", max_retries=0): (
                ("spawn", None),
                "cannot change into -: it is not there",
            ),
            self.put(says, cwd=self.folder, max_retries=0): (
                ("exit", 126),
                f"in {self.folder} on ",
            ),
        }
        self.drain("--count", "4")
        for job, (ended, why) in expected.items():
            [(*found, detail)] = self.runs(job, "reason", "exit_code", "detail")
            self.assertEqual(tuple(found), ended)
            self.assertIn(why, str(detail))

    def test_a_job_in_a_directory_of_its_own_runs_as_any_other_does(self) -> None:
        names = ("-P", "a b'$x\n\u0101\u0301", "plain")
        for name in names:
            os.mkdir(self.path(name))
        os.symlink("plain", self.path("link"))
        self.environment.update(CDPATH=self.folder, OLDPWD="/", PWD="/")
        tells = 'pwd; echo "$PWD" $0 $# ${OLDPWD-none}; ls /proc/self/fd; exit 7'
        jobs = {}
        for name in (*names, "link", "link/../plain"):
            for cwd in (name, self.path(name)):
                job = self.put(tells, cwd=cwd, max_retries=0)
                jobs[job] = os.path.realpath(self.path(name))
        self.drain("--count", "4")
        for job, folder in jobs.items():
            output = f"{folder}\n{folder} /bin/sh 0 none\n0\n1\n2\n3\n"
            ended = [("exit", 7, output.encode())]
            self.assertEqual(self.runs(job, "reason", "exit_code", "output"), ended)

    def test_a_directory_that_hangs_holds_up_no_other_job_and_ends_in_time(
        self,
    ) -> None:
        hung = self.hung_directory()
        # One for each process of the worker.
        stuck = [
            self.put("true", cwd=hung, timeout=0.3, max_retries=0)
            for _ in range(os.cpu_count() or 1)
        ]
        worker = self.worker("--count", str(2 * len(stuck)))
        self.put_many(8, "true")
        self.wait_ended(8, 5)
        for job in stuck:
            self.wait_state(job, State.DEAD, 5)
            self.assertEqual(self.reasons(job), ["timeout"])
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(5), 0)
        self.assertEqual(self.living(), [])

    def test_a_path_that_is_not_utf_8_is_told_of_as_far_as_it_can_be(self) -> None:
        self.environment["PATH"] = os.fsdecode(b"/caf\xe9:") + os.environ["PATH"]
        self.assertEqual(self.ran("no-such-command")[:2], ("exit", 127))
        self.assertIn(r"PATH=/caf\udce9:", self.detail)

    def test_a_command_that_is_not_found_says_where_it_was_looked_for(self) -> None:
        self.assertEqual(self.ran("no-such-command")[:2], ("exit", 127))
        self.assertIn(f"in {self.folder} on {socket.gethostname()}, PATH=", self.detail)

    def test_a_job_gets_its_own_variables_and_no_secrets(self) -> None:
        self.environment.update(
            DB_PASSWORD_FILE="/dev/null",
            MYSQL_PWD="secret",
            QUEUECTL_SIGNING_KEY="secret",
            QUEUECTL_WEB_TOKEN="secret",
            NOTIFY_SOCKET="/nowhere",
            KEPT="kept",
            OWN="worker's",
        )
        job = self.enqueue(
            # A process may end between the look and the read, and cat fails then.
            "env -0 > environment; "
            "cat /proc/[0-9]*/cmdline > everybodys-arguments 2> /dev/null; true",
            queue="etl",
            max_retries=4,
            env={"OWN": "the job's", "DB_HOST": "mine"},
            cwd=self.folder,
        )
        self.drain()
        with open(self.path("environment")) as file:
            found = dict(one.split("=", 1) for one in file.read().split("\0") if one)
        self.assertEqual(
            [name for name in found if re.match("DB_|DATABASE|MYSQL|NOTIFY", name)],
            ["DB_HOST"],
        )
        self.assertNotIn("secret", found.values())
        expected = {
            "KEPT": "kept",
            "OWN": "the job's",
            "QUEUECTL_JOB_ID": job,
            "QUEUECTL_ATTEMPT": "1",
            "QUEUECTL_MAX_ATTEMPTS": "5",
            "QUEUECTL_QUEUE": "etl",
        }
        self.assertEqual({name: found.get(name) for name in expected}, expected)
        self.assertIn("QUEUECTL_RUN", found)

    def test_a_job_has_clean_signals_and_descriptors_under_any_parent(self) -> None:
        job = "grep -E '^Sig(Ign|Blk)' /proc/self/status; ls /proc/self/fd"
        ignoring = "trap '' CHLD INT HUP QUIT PIPE TERM; exec \"$@\""
        wanted = sum(1 << (number - 1) for number in queuectl.HANDLED)
        for wrap in ((), ("nohup",), ("sh", "-c", ignoring, "sh")):
            with self.subTest(wrap[:1]):
                one, failing = self.put(job), self.put("exit 3", max_retries=0)
                worker = self.worker_under(*wrap)
                self.wait_state(one, State.COMPLETED)
                self.wait_state(failing, State.DEAD)
                self.assertEqual(self.runs(failing, "exit_code"), [(3,)])
                words = bytes(self.runs(one, "output")[0][0]).split()  # type: ignore
                self.assertEqual(int(words[1], 16), 0)
                self.assertEqual(int(words[3], 16) & wanted, 0)
                self.assertEqual(words[4:], [b"0", b"1", b"2", b"3"])
                worker.signal(signal.SIGTERM)
                self.assertEqual(worker.wait(), 0)

    def test_a_job_keeps_the_umask_and_directory_of_its_worker(self) -> None:
        job = self.put("umask; pwd; sleep 0.2; cat /proc/self/oom_score_adj")
        self.worker_under("sh", "-c", 'umask 027; exec "$@"', "sh")
        self.wait_state(job, State.COMPLETED)
        self.assertEqual(
            self.runs(job, "output"), [(f"0027\n{self.folder}\n500\n".encode(),)]
        )


class Upgrades(WorkCase):
    """Two releases beside each other; the newer one's tables have a column more."""

    def setUp(self) -> None:
        super().setUp()
        self.sql("DROP DATABASE IF EXISTS queuectl_other")
        self.sql("CREATE DATABASE queuectl_other")
        self.addCleanup(self.sql, "DROP DATABASE IF EXISTS queuectl_other")
        self.sql("USE queuectl_other")
        self.environment["DB_NAME"] = "queuectl_other"
        self.queuectl("db", "init")

    def release(self, name: str, oldest_writer: int) -> str:
        """The path of a program of schema 2."""
        text = read_file("queuectl.py")
        for old, new in (
            ("\nSCHEMA_VERSION = 1\n", "\nSCHEMA_VERSION = 2\n"),
            ("\nOLDEST_WRITER = 1\n", f"\nOLDEST_WRITER = {oldest_writer}\n"),
            ("\n  command     MEDIUM", "\n  note VARCHAR(9) NULL,\n  command MEDIUM"),
            ("\n  KEY jobs_due", "\n  KEY jobs_note (note),\n  KEY jobs_due"),
            (
                "UPGRADES: Sequence[Upgrade] = ()",
                "UPGRADES: Sequence[Upgrade] = (\n"
                "    Upgrade(2, 'why', ('jobs', 'note'),\n"
                "            'ALTER TABLE jobs ADD COLUMN note VARCHAR(9) NULL'),\n"
                "    Upgrade(2, 'why', ('jobs', 'jobs_note'),\n"
                "            'ALTER TABLE jobs ADD KEY jobs_note (note)'))",
            ),
        ):
            self.assertEqual(text.count(old), 1, old)
            text = text.replace(old, new)
        with open(self.path(name), "w") as file:
            file.write(text)
        return self.path(name)

    def use(self, script: str) -> None:
        self.script = self.door = script

    def has_the_column(self) -> bool:
        there = self.sql("SHOW COLUMNS FROM jobs LIKE 'note'")
        return bool(
            there and self.sql("SHOW KEYS FROM jobs WHERE key_name='jobs_note'")
        )

    def test_an_older_schema_is_upgraded_under_load_and_its_workers_stop(self) -> None:
        old = [self.worker("--count", "4") for _ in range(2)]
        self.put_many(4000, "echo x >> ran; sleep 0.1; echo x >> done")
        long = self.put("sleep 2; echo x >> done", priority=1)
        self.wait_lines("done", 20)
        self.use(self.release("newer.py", 2))
        for argv in (["list"], ["enqueue", "-c", "true"], ["worker", "start"]):
            self.queuectl(*argv, status=69)
            self.assertIn("of schema 1, older than this program needs (2)", self.errors)
            self.assertIn("run: queuectl db init", self.errors)
        racers = [self.start("db", "init") for _ in range(3)]
        self.assertEqual([one.wait() for one in racers], [0] * 3)
        said = " ".join(one.said() for one in racers)
        self.assertEqual(
            said.count("schema 1 upgraded to 2 in queuectl_other"), 1, said
        )
        self.assertEqual(said.count("schema 2 is there already"), 2, said)
        for worker in old:
            self.assertEqual(worker.wait(), 1)
            self.assertIn("newer than this program", worker.said())
            self.assertNotIn("Traceback", worker.said())
        self.assertEqual(self.state(long), State.COMPLETED)
        self.assertEqual(self.counts().get("processing"), None)
        self.assertEqual(len(self.lines("ran")), len(self.lines("done")) - 1)
        done, left = len(self.lines("done")), int(str(self.counts()["pending"]))
        self.sql(
            "DELETE FROM jobs WHERE state = 'pending' ORDER BY seq DESC LIMIT %s",
            left - 40,
        )
        self.drain("--count", "8")
        self.assertEqual(self.counts(), {"completed": done + 40})
        # One claimed by a worker that stops is handed back, not started.
        self.assertEqual(self.sql("SELECT DISTINCT attempts FROM jobs"), [(1,)])
        self.assertEqual(len(self.lines("done")), done + 40)
        self.use(SCRIPT)
        for argv in (["list"], ["db", "init"], ["worker", "start"]):
            self.queuectl(*argv, status=69)
            self.assertIn("install the newer queuectl.py on this host", self.errors)

    def test_workers_that_may_still_write_go_on_beside_newer_ones(self) -> None:
        old = self.worker("--queue", "old")
        self.use(self.release("newer.py", 1))
        self.assertIn("upgraded to 2", self.queuectl("db", "init"))
        new = self.worker("--queue", "new")
        jobs = [self.put("true", queue=name) for name in ("old", "new")]
        for job in jobs:
            self.wait_state(job, State.COMPLETED)
        self.use(SCRIPT)
        self.assertIn("schema 2 is there already", self.queuectl("db", "init"))
        self.assertEqual(
            self.sql("SELECT value FROM config WHERE `key` = 'schema_version'"),
            [("2/1",)],
        )
        for worker in (old, new):
            worker.signal(signal.SIGTERM)
            self.assertEqual(worker.wait(), 0)

    def test_an_upgrade_that_broke_off_is_completed(self) -> None:
        self.use(self.release("newer.py", 2))
        self.sql("ALTER TABLE jobs ADD COLUMN note VARCHAR(9) NULL")
        self.assertFalse(self.has_the_column())
        self.assertIn("upgraded to 2", self.queuectl("db", "init"))
        self.assertTrue(self.has_the_column())
        self.assertIn("is there already", self.queuectl("db", "init"))

    def test_an_init_that_broke_off_at_its_first_table_is_completed(self) -> None:
        self.sql("DELETE FROM config")
        for table in TABLES:
            self.sql(f"DROP TABLE {table}")
        self.assertIn("schema 1 created", self.queuectl("db", "init"))
        self.drain()

    def test_an_upgrade_waits_for_a_long_transaction_and_work_goes_on(self) -> None:
        self.worker()
        self.use(self.release("newer.py", 1))
        dump = self.connection(database="queuectl_other", autocommit=False)
        self.addCleanup(dump.close)
        dump.cursor().execute("SELECT * FROM jobs")  # and no COMMIT
        upgrade = self.start("db", "init")
        for _ in range(2):
            self.wait_state(self.put("true"), State.COMPLETED)
            self.wait_beats(2)
        self.assertIsNone(upgrade.process.poll())
        dump.rollback()
        self.assertEqual(upgrade.wait(), 0, upgrade.said())
        self.assertTrue(self.has_the_column())


class StopAndReload(WorkCase):
    """Stop, grace, cancel, drain, and settings that change while workers run."""

    def test_a_job_is_told_once_that_it_is_to_end(self) -> None:
        job = self.put("trap 'echo >> told' TERM; echo > on; while :; do :; done")
        self.worker()
        self.wait_lines("on", 1)
        self.queuectl("cancel", job)
        self.wait_state(job, State.CANCELLED)
        self.assertEqual(len(self.lines("told")), 1)

    def test_a_run_that_failed_is_not_handed_back_for_what_it_left_behind(self) -> None:
        job = self.put(
            "(trap '' TERM; echo $$ > left; sleep 60)& sleep 0.3; exit 3", max_retries=0
        )
        worker = self.worker(QUEUECTL_KILL_GRACE="1.5")
        self.wait_lines("left", 1)
        shell = int(self.lines("left")[0])
        self.wait_until(lambda: not alive(shell), "the shell has failed")
        self.stop_now(worker)
        worker.wait()
        self.assertEqual(self.job(job, "state", "attempts"), ("dead", 1))
        [(reason, code, duration)] = self.runs(job, "reason", "exit_code", "duration")
        self.assertEqual((reason, code), ("exit", 3))
        self.assertLess(float(str(duration)), 1.2)

    def test_a_forced_stop_waits_without_spinning(self) -> None:
        self.put("trap '' TERM; echo > on; sleep 60; sleep 60")
        worker = self.worker("--grace", "0.3", QUEUECTL_KILL_GRACE="2")
        self.wait_lines("on", 1)
        self.stop_now(worker)
        [process] = worker.children()
        began, used = time.monotonic(), cpu_seconds(process)
        self.wait_until(lambda: time.monotonic() - began > 1.4, "the grace is over")
        self.assertLess(cpu_seconds(process) - used, 0.4)

    def test_a_kill_grace_that_was_raised_holds_in_a_forced_stop(self) -> None:
        del self.environment["QUEUECTL_KILL_GRACE"]
        self.queuectl("config", "set", "kill_grace", "0")
        job = self.put("trap 'sleep 3.4; echo >> done; exit' TERM; echo > on; sleep 60")
        worker = self.worker()
        self.wait_lines("on", 1)
        self.queuectl("config", "set", "kill_grace", "20")
        self.wait_beats(3)
        self.stop_now(worker)
        self.assertEqual(worker.wait(), 128 + signal.SIGTERM)
        self.assertEqual(len(self.lines("done")), 1)
        self.assert_state(job, State.PENDING)

    def test_a_bad_env_file_is_refused_and_a_good_one_holds_for_later_workers(
        self,
    ) -> None:
        def write(text: str) -> None:
            with open(self.path(".env"), "w") as file:
                file.write(f"QUEUECTL_JOB_TIMEOUT={text}\n")
            worker.signal(signal.SIGHUP)

        worker = self.worker()
        write("5 sec")
        self.wait_until(lambda: "kept as they were" in worker.said(), "it says so")
        self.wait_state(self.put("true"), State.COMPLETED)
        write("0.3")
        self.wait_until(lambda: worker.said().count("SIGHUP") == 2, "it has heard")
        os.kill(worker.children()[0], signal.SIGKILL)
        late = self.put("sleep 60", max_retries=0)
        self.wait_state(late, State.DEAD)
        self.assertEqual(self.reasons(late), ["timeout"])

    def test_hup_and_a_refused_account_lead_to_another_address_and_account(
        self,
    ) -> None:
        def write(user: str, password: str, **more: object) -> None:
            account = {"DB_USER": user, "DB_PASSWORD": password, **address, **more}
            with open(self.path(".env"), "w") as file:
                file.writelines(f"{name}={value}\n" for name, value in account.items())

        proxies = [Proxy(self.server.socket) for _ in range(2)]
        for proxy in proxies:
            self.addCleanup(proxy.close)
        first, second = (proxy.variables() for proxy in proxies)
        address: dict[str, str] = {}
        for name in ("DB_SOCKET", "DB_USER", "DB_PASSWORD"):
            del self.environment[name]
        for name, secret in (("queuectl_one", "b3fore"), ("queuectl_two", "sec0nd")):
            self.sql(f"CREATE USER {name} IDENTIFIED BY %s", secret)
            self.addCleanup(self.sql, f"DROP USER {name}")
            self.sql(f"GRANT ALL ON queuectl.* TO {name}")
        address = {**first, "DB_SSL_MODE": "preferred"}
        write("queuectl_one", "b3fore")
        worker = self.worker()
        self.wait_state(self.put("true"), State.COMPLETED)
        # The server has moved, and is asked for as another account.
        address = {**second, "DB_SSL_MODE": "preferred"}
        write("queuectl_two", "sec0nd")
        proxies[0].refuse()
        proxies[0].cut()
        worker.signal(signal.SIGHUP)
        self.wait_state(self.put("true"), State.COMPLETED, 10)
        self.assertIn(
            f"the database is queuectl at 127.0.0.1:{second['DB_PORT']} as "
            "'queuectl_two' from now on; it was queuectl at "
            f"127.0.0.1:{first['DB_PORT']} as 'queuectl_one'",
            worker.said(),
        )
        # The password is changed, and nobody tells the worker.
        self.sql("ALTER USER queuectl_two IDENTIFIED BY %s", "aft3r")
        write("queuectl_two", "aft3r")
        proxies[1].cut()
        self.wait_state(self.put("true"), State.COMPLETED, 10)
        self.assertIn("another password", worker.said())
        for secret in ("b3fore", "sec0nd", "aft3r"):
            self.assertNotIn(secret, worker.said())

    def test_hup_ends_no_daemon_whose_directory_was_deleted(self) -> None:
        gone = self.path("release")
        os.mkdir(gone)
        files = ("--pid-file", self.path("pid"), "--log-file", self.path("log"))
        self.addCleanup(self.run_queuectl, "worker", "stop", "--now", *files[:2])
        start = f"cd {gone}; exec {sys.executable} {self.door} worker start --daemon"
        subprocess.run(
            ["sh", "-c", f"{start} {shlex.join(files)}"],
            env=self.environment,
            check=True,
            capture_output=True,
        )
        os.rmdir(gone)
        pid = int(self.lines("pid")[0])
        for times in range(1, 3):
            os.kill(pid, signal.SIGHUP)
            self.wait_until(
                lambda: read_file(self.path("log")).count("SIGHUP") == times, "it heard"
            )
            self.wait_state(self.put("true"), State.COMPLETED)
        self.assertNotIn("Traceback", read_file(self.path("log")))
        self.assertTrue(alive(pid))

    def test_commands_in_a_deleted_directory_say_so_or_work(self) -> None:
        gone = self.path("gone")
        for argv, status in (
            ("list", 0),
            ("run -c true", 1),
            ("enqueue -c true", 0),
            ("enqueue -c true --cwd .", 1),
            ("worker start --daemon", 1),
            ("db start", 1),
            ("status", 0),
        ):
            with self.subTest(argv):
                os.mkdir(gone)
                line = f"cd {gone}; rmdir {gone}; exec {sys.executable} {self.door}"
                done = subprocess.run(
                    ["sh", "-c", f"{line} {argv}"],
                    env=self.environment,
                    capture_output=True,
                    check=False,
                )
                said = done.stderr.decode()
                self.assertEqual(done.returncode, status, said)
                self.assertNotIn("Traceback", said)
                if status and "db" not in argv:
                    self.assertIn("the working directory is gone", said)

    short = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh")

    def test_a_host_that_is_short_of_descriptors_buries_no_job(self) -> None:
        self.put_many(60, "sleep 0.2", max_retries=0)
        self.worker_under(*self.short, count=80)
        self.wait_ended(60)

    def test_a_host_that_is_short_keeps_no_job_from_one_that_is_not(self) -> None:
        worker = self.worker_under(*self.short, count=80)
        self.put_many(60, "sleep 0.2", max_retries=0)
        self.wait_until(
            lambda: "cannot start a job: " in worker.said(), "it has met its limit"
        )
        began = time.monotonic()
        self.worker("--count", "4")
        self.wait_ended(60)
        self.assertLess(time.monotonic() - began, 8)
        [(most,)] = self.sql("SELECT MAX(runs) FROM jobs")
        self.assertLess(int(str(most)), 8)

    @unittest.skipUnless(shutil.which("setsid"), "needs util-linux")
    def test_under_nohup_a_worker_outlives_its_terminal(self) -> None:
        try:
            here, there = pty.openpty()
        except OSError as error:
            self.skipTest(f"no terminal to be had: {error}")
        argv = ["setsid", "--ctty", "nohup", sys.executable, SCRIPT, "worker", "start"]
        with open(self.path("said"), "wb") as said:
            process = subprocess.Popen(
                argv,
                stdin=there,
                stdout=said,
                stderr=said,
                cwd=self.folder,
                env=self.environment,
            )
        os.close(there)
        self.wait_until(
            lambda: any("ready" in line for line in self.lines("said")), "it is ready"
        )
        os.close(here)  # the terminal hangs up
        self.wait_until(
            lambda: any("SIGHUP" in line for line in self.lines("said")), "it has heard"
        )
        self.wait_state(self.put("true"), State.COMPLETED)
        process.kill()
        process.wait()

    def test_a_log_that_cannot_be_turned_over_stops_nobody(self) -> None:
        os.mkdir(self.path("w.log.1"))
        with open(self.path("w.log"), "wb") as log:
            log.truncate(queuectl.LOG_BYTES_MAX + 1)
        text = "import sys; sys.path[0] = sys.argv[1]; import queuectl; "
        text += "queuectl.Log(sys.argv[2]).say('here'); sys.stdin.read()"
        argv = [sys.executable, "-B", "-c", text, HERE, self.path("w.log")]
        with (
            subprocess.Popen(argv, stdin=subprocess.PIPE) as one,
            subprocess.Popen(argv, stdin=subprocess.PIPE) as two,
        ):
            self.wait_until(
                lambda: "".join(self.lines("w.log")).count("here") == 2,
                "both write",
                10,
            )
            for process in (one, two):
                process.communicate()

    def test_a_log_that_nobody_reads_holds_up_no_job_and_no_stop(self) -> None:
        read_end, write_end = os.pipe()
        set_pipe_size = 1031  # fcntl.F_SETPIPE_SZ, from Python 3.10 on
        fcntl.fcntl(write_end, set_pipe_size, 4096)
        os.write(write_end, b"-" * 4096)
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "worker", "start", "--count", "4"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            start_new_session=True,
            env=self.environment,
        )
        self.addCleanup(self.end, Background(process, ""))
        os.close(write_end)
        self.put_many(40, "exit 3", max_retries=0)
        self.wait_until(lambda: self.counts() == {"dead": 40}, "all have run", 10)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(5), 0)
        self.assertEqual(self.sql("SELECT id FROM workers"), [])
        os.close(read_end)

    def test_a_log_says_how_many_lines_it_could_not_take(self) -> None:
        text = "import os, sys; sys.path[0] = sys.argv[1]; import queuectl; "
        text += "log = queuectl.Log(); [log.say(f'n{n}') for n in range(5000)]; "
        text += "print('said', flush=True); sys.stdin.read(); log.finish()"
        argv = [sys.executable, "-B", "-c", text, HERE]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            assert process.stdin and process.stdout and process.stderr
            self.assertEqual(process.stdout.readline(), b"said\n")
            process.stdin.close()
            lines = process.stderr.read().decode().splitlines()
        numbers = [int(line.partition("] n")[2]) for line in lines if "] n" in line]
        missing = [int(line.split()[2]) for line in lines if "missing" in line]
        self.assertEqual(numbers, sorted(numbers))
        self.assertEqual(len(numbers) + sum(missing), 5000)
        self.assertTrue(missing)
        self.assertEqual(process.returncode, 0)

    def test_what_a_forked_process_says_last_is_written_before_it_ends(self) -> None:
        text = "import os, sys; sys.path[0] = sys.argv[1]; import queuectl; "
        text += "log = queuectl.Log(); log.say('parent'); "
        text += "work = lambda: log.say('child') or 1 / 0; "
        text += "pid = queuectl.fork_child(work, log.say, log.finish); "
        text += "_, status = os.waitpid(pid, 0); "
        text += "log.say(f'{status >> 8}'); log.finish()"
        argv = [sys.executable, "-B", "-c", text, HERE]
        done = subprocess.run(argv, capture_output=True, check=True)
        said = re.findall(r"(?m)^\S+Z \[\d+\] (.*)", done.stderr.decode())
        trace = "Traceback (most recent call last):"
        self.assertEqual(said, ["parent", "child", trace, "70"])
        self.assertIn(b"ZeroDivisionError", done.stderr)

    def test_workers_start_beyond_descriptor_1023(self) -> None:
        crowd = (
            "import os, resource, sys; limit = resource.RLIMIT_NOFILE; "
            "hard = resource.getrlimit(limit)[1]; "
            "resource.setrlimit(limit, (hard, hard)); "
            "[os.dup2(0, n) for n in range(3, 1030)]; "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard < 2048:
            self.skipTest(f"no more than {hard} descriptors")
        wrap = (sys.executable, "-c", crowd)
        worker = self.worker_under(*wrap)
        self.wait_state(self.put("ls /proc/self/fd"), State.COMPLETED)
        self.assertEqual(self.sql("SELECT output FROM runs"), [(b"0\n1\n2\n3\n",)])
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)
        daemon = [*wrap, sys.executable, SCRIPT, "worker", "start", "--daemon"]
        done = subprocess.run(
            daemon, cwd=self.folder, env=self.environment, capture_output=True
        )
        self.queuectl("worker", "stop", "--now")
        self.assertIn(b"worker daemon started", done.stderr)

    def test_stop_lets_a_running_job_end(self) -> None:
        job = self.put("echo > started; sleep 1; echo ended")
        later = self.put("true")
        worker = self.worker()
        self.wait_lines("started", 1)
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)
        self.assertEqual(self.runs(job, "reason", "output"), [("exit", b"ended\n")])
        self.assert_state(later, State.PENDING)
        self.assertEqual(self.sql("SELECT id FROM workers"), [])

    def test_a_stop_with_grace_ends_what_runs_and_hands_it_back(self) -> None:
        job = self.put("echo > started; sleep 60")
        worker = self.worker("--grace", "0.5")
        self.wait_lines("started", 1)
        worker.signal(signal.SIGINT)
        self.assertEqual(worker.wait(5), 0)
        self.assertEqual(self.job(job, "state", "attempts", "runs"), ("pending", 0, 1))
        self.assertEqual(self.reasons(job), ["handed back"])
        self.assertEqual(self.living(), [])

    def test_a_second_signal_hands_back_and_exits_with_its_number(self) -> None:
        job = self.put("echo > started; sleep 60")
        worker = self.worker()
        self.wait_lines("started", 1)
        worker.signal(signal.SIGTERM)
        self.wait_until(lambda: "once more" in worker.said(), "it has heard the first")
        worker.signal(signal.SIGINT)
        self.assertEqual(worker.wait(5), 128 + signal.SIGINT)
        self.assertEqual(self.job(job, "state", "attempts"), ("pending", 0))
        self.assertEqual(self.reasons(job), ["handed back"])

    def test_a_job_that_ended_well_just_before_a_forced_stop_is_completed(
        self,
    ) -> None:
        job = self.put("echo $$ > pid; until [ -e go ]; do sleep 0.02; done")
        worker = self.worker()
        [shell] = self.wait_lines("pid", 1)
        [pid] = worker.children()
        os.kill(pid, signal.SIGSTOP)
        with open(self.path("go"), "w"):
            pass
        self.wait_until(lambda: not alive(int(shell)), "its shell has ended")
        self.stop_now(worker)
        os.kill(pid, signal.SIGCONT)
        self.assertEqual(worker.wait(5), 128 + signal.SIGTERM)
        self.assert_state(job, State.COMPLETED)
        self.assertEqual(self.reasons(job), ["exit"])

    def test_cancel_ends_a_running_job_of_any_supervisor_within_two_seconds(
        self,
    ) -> None:
        ids = [self.put("echo $$ >> pids; sleep 60 & wait") for _ in range(2)]
        for _ in range(2):
            self.worker()
        pids = [int(line) for line in self.wait_lines("pids", 2)]
        self.queuectl("cancel", *ids)
        self.wait_until(
            lambda: not any(map(alive, pids)), "their processes are gone", 2
        )
        for one in ids:
            self.wait_state(one, State.CANCELLED, 2)
            self.assertEqual(self.reasons(one), ["cancelled"])

    def test_a_running_worker_takes_a_changed_setting(self) -> None:
        self.worker("--count", "2")
        self.queuectl("config", "set", "job_timeout", "0.4")
        self.wait_beats(3)
        job = self.put("sleep 60", max_retries=0)
        self.wait_state(job, State.DEAD, 5)
        self.assertEqual(self.reasons(job), ["timeout"])

    def test_hup_without_a_terminal_reads_dotenv_again(self) -> None:
        worker = self.worker()
        with open(self.path(".env"), "w") as file:
            file.write("QUEUECTL_JOB_TIMEOUT=0.4\n")
        worker.signal(signal.SIGHUP)
        self.wait_until(lambda: "reading the settings" in worker.said(), "it has heard")
        self.wait_beats(3)
        job = self.put("sleep 60", max_retries=0)
        self.wait_state(job, State.DEAD, 10)
        self.assertEqual(self.reasons(job), ["timeout"])

    def test_a_newer_schema_stops_a_running_worker_gracefully(self) -> None:
        job = self.put("echo > started; sleep 1")
        worker = self.worker()
        self.wait_lines("started", 1)
        old = self.sql("SELECT value FROM config WHERE `key` = 'schema_version'")[0][0]
        change = "UPDATE config SET value = %s WHERE `key` = 'schema_version'"
        self.addCleanup(self.sql, change, old)
        self.sql(change, "9/9")
        worker.wait(10)
        self.assertEqual(self.reasons(job), ["exit"])
        self.assertIn("newer", worker.said())
        self.assertNotIn("Traceback", worker.said())

    def test_drain_waits_for_retries_but_not_for_what_is_scheduled(self) -> None:
        retried = self.put("echo >> tries; exit 1", max_retries=2)
        later = self.put("true", state="scheduled", next_run_at="2099-01-01")
        self.drain()
        self.assert_state(retried, State.DEAD)
        self.assertEqual(len(self.lines("tries")), 3)
        self.assert_state(later, State.SCHEDULED)

    def test_a_job_that_moves_while_drain_looks_is_never_overlooked(self) -> None:
        job = self.put("true")
        stop = threading.Event()

        def move() -> None:
            """Has the job go round, as one that fails and is retried does."""
            connection = self.connection()
            cursor = connection.cursor()
            states = itertools.cycle(("processing", "failed", "pending"))
            while not stop.is_set():
                cursor.execute(
                    "UPDATE jobs SET state = %s WHERE id = %s", (next(states), job)
                )
            connection.close()

        mover = threading.Thread(target=move)
        self.addCleanup(mover.join)
        self.addCleanup(stop.set)
        mover.start()
        database = self.reach()
        for _ in range(400):
            drained = database.read(lambda cursor: queuectl.is_drained(cursor, ()))
            self.assertFalse(drained)

    def test_drain_waits_for_what_another_worker_runs(self) -> None:
        self.put("echo > started; sleep 1")
        self.worker()
        self.wait_lines("started", 1)
        self.drain()
        self.assertEqual(self.counts(), {"completed": 1})


class LeasesTest(unittest.TestCase):
    """Who is lost, told by heartbeats and one clock."""

    def test_a_worker_is_lost_when_its_heartbeat_stood_still_for_its_lease(
        self,
    ) -> None:
        detector = queuectl.FailureDetector()
        for now in range(0, 30, 5):
            self.assertEqual(detector.observe(now, {"w": (7, 30)}, 5), {})
        self.assertEqual(detector.observe(30, {"w": (7, 30)}, 5), {"w": 7})
        self.assertEqual(detector.observe(31, {"w": (8, 30)}, 5), {})

    def test_a_gap_in_our_own_heartbeats_starts_the_count_again_for_everyone(
        self,
    ) -> None:
        detector = queuectl.FailureDetector()
        for now in (0, 5, 10, 15, 20, 30.5, 35, 40, 45, 50, 55, 60):
            self.assertEqual(detector.observe(now, {"w": (7, 30)}, 5), {}, now)
        self.assertEqual(detector.observe(61, {"w": (7, 30)}, 5), {"w": 7})


class Crashes(WorkCase):
    """Whatever dies, each job ends, and no two runs of one overlap."""

    def starts(self, job_id: str) -> list[tuple[int, float]]:
        """(pid, time) of each run that a job wrote down."""
        return [
            (int(pid), float(when))
            for one, pid, when in (line.split() for line in self.lines("starts"))
            if one == job_id
        ]

    def kill(self, worker: Background, jobs_too: bool = True) -> None:
        """kill -9 a supervisor and all below it, its jobs only with `jobs_too`."""
        kill_all(
            [worker.pid, *(descendants(worker.pid) if jobs_too else worker.children())]
        )

    def test_a_crash_of_a_worker_that_drains_is_made_good(self) -> None:
        job = self.put(BOOKED + f"if {FIRST}; then kill -9 $PPID; sleep 60; fi")
        drain = self.start("worker", "start", "--drain")
        self.assertEqual(drain.wait(), 0, drain.said())
        self.assertIn(f" died; 1 run written off as lost: {job}\n", drain.said())
        self.assert_state(job, State.COMPLETED)
        self.assertEqual(self.reasons(job), ["lost", "exit"])

    def test_an_error_of_the_server_that_nobody_knows_ends_no_worker(self) -> None:
        self.sql(
            "CREATE TRIGGER tomorrow BEFORE INSERT ON runs FOR EACH ROW SIGNAL "
            "SQLSTATE '58000' SET MYSQL_ERRNO = 30000, "
            "MESSAGE_TEXT = 'an error of tomorrow'"
        )
        try:
            job = self.put("true")
            drain = self.start("worker", "start", "--drain")
            self.wait_until(lambda: "trying again" in drain.said(), "it bears with it")
        finally:
            self.sql("DROP TRIGGER tomorrow")
        self.assertEqual(drain.wait(), 0, drain.said())
        self.assertIn("an error of tomorrow", drain.said())
        self.assertEqual(self.reasons(job), ["exit"])

    def test_a_stop_before_a_dead_worker_is_replaced_leaves_nothing_running(
        self,
    ) -> None:
        job = self.put(BOOKED + f"if {FIRST}; then sleep 60; fi")
        worker = self.worker()
        self.wait_lines("starts", 1)
        [victim] = worker.children()
        os.kill(victim, signal.SIGKILL)
        self.wait_until(lambda: "ended: signal 9" in worker.said(), "it has seen that")
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 1, worker.said())
        self.assertEqual(self.living(), [])
        self.drain()  # it knows at once that the other is gone
        self.assertEqual(self.reasons(job)[0], "lost")

    def test_a_forced_stop_of_hundreds_of_runs_hands_all_of_them_back(self) -> None:
        self.put_many(500, "sleep 301 | cat; echo x", timeout=0)
        worker = self.worker("--count", "500")
        self.wait_until(lambda: len(self.living()) > 1500, "all of them run")
        self.stop_now(worker)
        self.assertEqual(worker.wait(), 128 + signal.SIGTERM)
        self.assertEqual(self.counts(), {"pending": 500})
        self.assertEqual(self.living(), [])

    def test_jobs_of_a_killed_worker_process_run_again_within_two_seconds(self) -> None:
        ids = [self.put(BOOKED + "sleep 2") for _ in range(4)]
        self.put_many(20, "sleep 0.05")
        worker = self.worker("--count", "4")
        self.wait_lines("starts", 4)
        victim = worker.children()[0]
        taken = [
            str(row[0])
            for row in self.sql(
                "SELECT jobs.id FROM jobs JOIN workers ON workers.id = worker "
                "WHERE jobs.state = 'processing' AND pid = %s",
                victim,
            )
        ]
        self.assertTrue(taken)
        killed_at = time.time()
        os.kill(victim, signal.SIGKILL)
        self.wait_until(
            lambda: all(len(self.starts(one)) == 2 for one in taken), "again"
        )
        for one in taken:
            self.assertLess(self.starts(one)[1][1] - killed_at, 2)
        self.wait_ended(24)
        self.assertEqual(self.lines("overlaps"), [])
        for one in ids:
            self.assertEqual(self.reasons(one), ["lost"] * (one in taken) + ["exit"])
            self.assertEqual(len(self.starts(one)), 1 + (one in taken))

    def test_workers_hand_back_and_leave_when_their_supervisor_is_killed(self) -> None:
        ids = [
            self.put(BOOKED + "trap '' TERM; while :; do sleep 1; done"),
            self.put(BOOKED + "sleep 60"),
        ]
        worker = self.worker("--count", "2")
        self.wait_lines("starts", 2)
        worker.signal(signal.SIGKILL)
        worker.wait()
        self.wait_until(lambda: not self.living(), "all have left", 1 + 2)
        for one in ids:
            self.assertEqual(
                self.job(one, "state", "attempts", "token"), ("pending", 0, None)
            )
            self.assertEqual(self.reasons(one), ["handed back"])
        self.assertEqual(self.sql("SELECT id FROM workers"), [])

    def guardians(self) -> list[int]:
        """The processes that end what runs when supervisor and workers are killed."""
        found = []
        for pid in self.living():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
                if file.read() == "queuectl-guard\n":
                    found.append(pid)
        return found

    def test_no_run_goes_on_when_supervisor_and_workers_are_killed_at_once(
        self,
    ) -> None:
        self.put("setsid sleep 61 > /dev/null 2>&1 & echo $! > left")
        # Its grace is a fifth of the lease at most.
        patient = {"QUEUECTL_KILL_GRACE": "2", "QUEUECTL_WORKER_TIMEOUT": "15"}
        workers = [self.worker("--count", "2", **patient) for _ in range(2)]
        self.wait_ended(1)
        for _ in range(2):
            self.put(BOOKED + "trap '' TERM; while :; do sleep 1; done")
            self.put(
                "trap 'echo told >> told; exit' TERM; " + BOOKED + "sleep 60 & wait"
            )
        self.wait_lines("starts", 4)
        os.killpg(workers[0].pid, signal.SIGKILL)
        self.kill(workers[1], jobs_too=False)
        [left] = map(int, self.lines("left"))
        self.wait_until(lambda: self.living() == [left], "all runs have ended", 2 + 3)
        self.assertEqual(self.lines("told"), ["told", "told"])

    def test_no_run_goes_on_when_a_supervisor_dies_before_it_replaced_a_worker(
        self,
    ) -> None:
        self.put(BOOKED + "sleep 60")
        worker = self.worker()
        self.wait_lines("starts", 1)
        kill_all(worker.children())
        self.wait_until(lambda: "ended: signal 9" in worker.said(), "it has seen that")
        self.kill(worker, jobs_too=False)
        self.wait_until(lambda: not self.living(), "all have ended", 1 + 2)

    def test_the_guardian_has_nothing_open_of_others_and_leaves_with_them(self) -> None:
        self.queuectl("worker", "start", "--daemon", "--count=2")
        daemon = int(self.lines("workers.pid")[0])
        [guardian] = self.guardians()
        self.assertNotIn(os.getsid(guardian), (os.getsid(daemon), guardian))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(guardian, number)
        handles = os.listdir(f"/proc/{guardian}/fd")
        opened = {os.readlink(f"/proc/{guardian}/fd/{one}") for one in handles}
        kinds = {re.sub(r":.*", "", one) for one in opened}
        self.assertEqual(kinds, {"/dev/null", "pipe", "anon_inode"})
        self.assertEqual(self.guardians(), [guardian])
        os.kill(guardian, signal.SIGKILL)
        self.wait_until(
            lambda: self.guardians() not in ([], [guardian]), "there is another"
        )
        self.queuectl("worker", "stop")
        self.assertEqual(self.living(), [])

    def test_a_new_start_on_the_host_takes_over_at_once(self) -> None:
        again = self.put(BOOKED + f"if {FIRST}; then sleep 60; fi")
        unwanted = self.put(BOOKED + "sleep 60")
        worker = self.worker("--count", "2", QUEUECTL_WORKER_TIMEOUT="30")
        self.wait_lines("starts", 2)
        self.kill(worker, jobs_too=False)
        self.assertIn("ends it", self.queuectl("cancel", unwanted))
        self.worker(QUEUECTL_WORKER_TIMEOUT="30")
        self.wait_state(again, State.COMPLETED, 3)
        self.assertEqual(self.reasons(again), ["lost", "exit"])
        self.assertEqual(self.state(unwanted), State.CANCELLED)
        self.assertEqual(self.reasons(unwanted), ["cancelled"])
        self.assertEqual(self.lines("overlaps"), [])
        self.assertFalse(alive(self.starts(unwanted)[0][0]))

    def frozen(self, pids: Sequence[int]) -> Callable[[], None]:
        """Has the kernel keep processes, as a dead disk does: not even KILL ends
        them. What it returns lets them go."""
        group = f"/sys/fs/cgroup/freezer/{os.path.basename(self.folder)}"
        try:
            os.mkdir(group)
        except OSError:
            self.skipTest("needs a freezer of the first kind of cgroups")

        def write(name: str, text: str) -> None:
            with open(f"{group}/{name}", "w") as file:
                file.write(text)

        def thaw() -> None:
            if os.path.isdir(group):
                write("freezer.state", "THAWED")
                self.wait_until(lambda: not any(map(alive, pids)), "they end")
                self.wait_until(lambda: removed(group), "the group is removed")

        def removed(path: str) -> bool:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            return not os.path.isdir(path)

        self.addCleanup(thaw)
        self.addCleanup(kill_all, pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was just passing
                write("cgroup.procs", str(pid))
        write("freezer.state", "FROZEN")
        return thaw

    def test_a_run_that_no_signal_ends_stays_processing_and_holds_up_nobody(
        self,
    ) -> None:
        self.environment["QUEUECTL_WORKER_TIMEOUT"] = "2"
        stuck = self.put(BOOKED + f"if {FIRST}; then sleep 60; fi")
        other = self.put(BOOKED + f"if {FIRST}; then sleep 60; fi")
        worker = self.worker("--count", "2")
        self.wait_lines("starts", 2)
        shell = self.starts(stuck)[0][0]
        thaw = self.frozen([shell, *descendants(shell)])
        judge = self.worker()
        os.killpg(worker.pid, signal.SIGKILL)
        self.wait_state(other, State.COMPLETED)
        workers = [judge, self.worker()]
        begun = time.monotonic()
        self.wait_until(
            lambda: time.monotonic() - begun > 2.5, "the dead worker's lease is over"
        )
        self.assertEqual(self.job(stuck, "state", "runs"), ("processing", 1))
        self.assertRegex(self.queuectl("explain", stuck), "process [0-9]+ of it does")
        for one in workers:
            self.assertIn(f"{stuck} stays processing", one.said())
            self.assertNotIn("declared lost", one.said())
        thaw()
        self.wait_state(stuck, State.COMPLETED)
        self.assertEqual(self.reasons(stuck), ["lost", "exit"])
        self.assertEqual(self.reasons(other), ["lost", "exit"])
        self.assertEqual(self.lines("overlaps"), [])

    @can_unshare
    def test_a_living_worker_that_proc_hides_is_not_taken_over(self) -> None:
        other_user = subprocess.Popen(
            ["setpriv", "--reuid=65534", "--clear-groups", "sleep", "60"]
        )
        self.addCleanup(other_user.wait)
        self.addCleanup(other_user.kill)
        identity = queuectl.process_identity(other_user.pid)
        self.sql(
            "INSERT INTO workers (id, host, pid, supervisor, process_identity, slots, "
            "lease_s) VALUES ('living', 'here', %s, 1, %s, 1, 30)",
            other_user.pid,
            identity,
        )
        job = self.put("true", state="processing", worker="living", token="t", runs=1)
        hidden = "mount -t proc -o hidepid=2,gid=65533 proc /proc"
        blind = "setpriv --bounding-set=-sys_ptrace,-kill"
        self.worker_under(
            "unshare", "--mount", "sh", "-c", f'{hidden} && exec {blind} "$@"', "sh"
        )
        self.wait_state(self.put("true"), State.COMPLETED)
        self.assertEqual(self.job(job, "state", "worker"), ("processing", "living"))
        other_user.kill()
        other_user.wait()
        self.worker()
        self.wait_ended(2)

    def test_the_deaf_runs_of_many_dead_workers_are_ended_together(self) -> None:
        identity = queuectl.process_identity(os.getpid()).rpartition("/")[0]
        for number in range(8):
            token = secrets.token_hex(8)
            self.sql(
                "INSERT INTO workers (id, host, pid, supervisor, process_identity, "
                "slots, lease_s) VALUES (%s, 'here', %s, 1, %s, 1, 30)",
                f"dead-{number}",
                os.getpid(),
                f"{identity}/1",
            )
            job = self.put(
                "true",
                state="processing",
                worker=f"dead-{number}",
                token=token,
                attempts=1,
                runs=1,
            )
            [seq] = self.job(job, "seq")
            subprocess.Popen(
                ["sh", "-c", "trap '' TERM; echo > deaf; while :; do sleep 1; done"],
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
                env={**self.environment, "QUEUECTL_RUN": f"{token}-{seq}"},
            )
        self.wait_until(lambda: len(self.living()) >= 8, "they run")
        began = time.monotonic()
        self.worker()
        self.assertLess(time.monotonic() - began, 4)
        self.wait_ended(8)

    @can_unshare
    def test_another_container_of_that_name_waits_out_the_lease(self) -> None:
        job = self.put(BOOKED + f"if {FIRST}; then sleep 60; fi")
        worker = self.worker()
        self.wait_lines("starts", 1)
        [(held_by,)] = self.sql("SELECT id FROM workers")
        self.worker_under(*CONTAINER)
        self.wait_beats(10)
        self.assertEqual(self.job(job, "worker", "runs"), (held_by, 1))
        self.kill(worker)
        killed = time.monotonic()
        self.wait_state(job, State.COMPLETED, 3 + 5)
        self.assertGreater(time.monotonic() - killed, 2)
        self.assertEqual(self.reasons(job), ["lost", "exit"])

    def test_runs_whose_numbers_begin_alike_are_not_taken_for_each_other(self) -> None:
        for seq in (7, 70, 700):
            self.put(f"sleep 0.{seq % 9}", seq=seq)
        worker = self.worker("--count", "3")
        self.wait_ended(3)
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)
        self.assertNotIn("died", worker.said())
        self.assertEqual(self.sql("SELECT DISTINCT runs FROM jobs"), [(1,)])

    def test_a_worker_stopped_past_its_lease_changes_nothing_and_ends_its_run(
        self,
    ) -> None:
        self.environment["QUEUECTL_WORKER_TIMEOUT"] = "2"
        late = "trap 'for i in 1 2 3 4 5 6 7; do echo late; sleep 0.1; done' TERM"
        job = self.put(
            BOOKED + f"if {FIRST}; then {late}; sleep 60; else sleep 2; echo new; fi"
        )
        old = self.worker()
        self.wait_lines("starts", 1)
        [stopped] = old.children()
        os.kill(stopped, signal.SIGSTOP)
        self.worker()
        self.wait_lines("starts", 2, 3 + 5)
        token = self.job(job, "token")
        os.kill(stopped, signal.SIGCONT)
        first = self.starts(job)[0][0]
        self.wait_until(lambda: not alive(first), "the old run is ended", 2)
        self.assertEqual(self.job(job, "token", "state"), (*token, "processing"))
        self.wait_state(job, State.COMPLETED)
        self.assertEqual(
            self.runs(job, "reason", "output"), [("lost", None), ("exit", b"new\n")]
        )
        self.assertIn("declared lost", old.said())
        later = self.put("true")
        self.wait_state(later, State.COMPLETED)

    def test_a_lost_worker_claims_nothing_until_its_old_runs_are_gone(self) -> None:
        deaf = "trap 'echo >> told' TERM; while :; do sleep 1; done"
        job = self.put(BOOKED + f"if {FIRST}; then {deaf}; fi", timeout=0.6)
        worker = self.worker("--count", "4")
        self.wait_lines("told", 1)  # by its time limit
        [(lost, pid)] = self.sql(
            "SELECT id, pid FROM workers WHERE id IN (SELECT worker FROM jobs)"
        )
        for sibling in set(worker.children()) - {pid}:
            os.kill(sibling, signal.SIGSTOP)  # it would be free to claim the job
        settings = queuectl.Settings()
        queuectl.take_over(self.reach(), settings, str(lost), -1)
        self.wait_state(job, State.COMPLETED)
        self.assertIn("declared lost", worker.said())
        self.assertEqual(self.reasons(job), ["lost", "exit"])
        self.assertEqual(self.lines("overlaps"), [])

    def test_a_worker_stopped_between_claim_and_start_does_not_start(self) -> None:
        self.environment["QUEUECTL_WORKER_TIMEOUT"] = "2"
        proxy = StoppingProxy(self.server.socket)
        self.addCleanup(proxy.close)
        old = self.worker(
            DB_SOCKET="",
            DB_HOST="127.0.0.1",
            DB_PORT=str(proxy.port),
            DB_SSL_MODE="disabled",
        )
        [stopped] = old.children()
        proxy.victim = stopped
        job = self.put(BOOKED + "sleep 2")
        self.wait_until(lambda: not proxy.victim, "it claims")
        self.worker()
        self.wait_lines("starts", 1)
        os.kill(stopped, signal.SIGCONT)
        self.wait_until(lambda: "declared lost" in old.said(), "it learns of it")
        self.wait_state(job, State.COMPLETED)
        self.assertEqual(self.reasons(job), ["lost", "exit"])
        self.assertEqual(len(self.lines("starts")), 1)

    def test_a_worker_that_waits_for_a_strangers_lock_is_not_taken_for_lost(
        self,
    ) -> None:
        self.environment["QUEUECTL_WORKER_TIMEOUT"] = "2"
        held = self.put("echo > started; until [ -e go ]; do sleep 0.1; done")
        worker = self.worker()
        self.wait_lines("started", 1)
        watcher = self.worker("--queue", "other")
        stranger = self.connection(autocommit=False)
        self.addCleanup(stranger.close)
        stranger.cursor().execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", held)
        began = time.monotonic()
        open(self.path("go"), "w").close()
        self.wait_until(
            lambda: time.monotonic() - began > 4.5, "two leases have passed"
        )
        stranger.rollback()
        self.wait_state(held, State.COMPLETED)
        for one in (worker, watcher):
            self.assertNotIn("lost", one.said())
        self.assertEqual(self.job(held, "runs"), (1,))

    def test_nothing_is_lost_or_repeated_when_the_server_is_killed(self) -> None:
        server = queuectl.PrivateServer(
            self.path("own server"), os.environ.get("QUEUECTL_TEST_MYSQLD", "")
        )
        self.assertTrue(server.start())
        self.addCleanup(server.stop)
        self.environment.update(DB_SOCKET=server.socket, DB_PASSWORD="")
        self.queuectl("db", "init")
        self.queuectl(
            "enqueue",
            "--lines",
            "-",
            stdin=b"".join(
                b"sleep 0.1; echo %d >> done\n" % number for number in range(120)
            ),
        )
        workers = [self.worker("--count", "4") for _ in range(2)]
        self.wait_lines("done", 30)
        os.kill(server.running(), signal.SIGKILL)
        self.wait_until(
            lambda: all("trying again" in worker.said() for worker in workers),
            "both say that the database is away",
        )
        self.assertTrue(server.start())
        self.wait_lines("done", 120)
        for worker in workers:
            worker.signal(signal.SIGTERM)
            self.assertEqual(worker.wait(), 0)
            spoken = [
                line for line in worker.said().splitlines() if "the database" in line
            ]
            away, back = spoken
            self.assertIn("trying again", away)
            self.assertIn("is back", back)
        self.assertEqual(sorted(map(int, self.lines("done"))), list(range(120)))
        listed = self.queuectl("list", "--json").splitlines()
        self.assertEqual({json.loads(line)["state"] for line in listed}, {"completed"})
        self.assertEqual({json.loads(line)["attempts"] for line in listed}, {1})

    def test_a_poison_job_dies_without_its_neighbours(self) -> None:
        siblings = [self.put("sleep 4", max_retries=1) for _ in range(3)]
        poison = self.put("kill -9 $PPID", max_retries=3)
        worker = self.worker("--count", "4")
        self.wait_state(poison, State.DEAD)
        self.assertEqual(self.job(poison, "reason", "attempts"), ("lost", 4))
        self.assertEqual(self.reasons(poison), ["lost"] * 4)
        self.assertEqual(self.sql("SELECT id, reason FROM dlq"), [(poison, "lost")])
        for one in siblings:
            self.wait_state(one, State.COMPLETED)
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)

    def test_a_take_over_waits_for_no_strangers_lock(self) -> None:
        """With SKIP LOCKED, and on a server that does not know it."""
        for skip_locked in ("SKIP LOCKED", ""):
            self.sql("DELETE FROM jobs")
            lost, alive = self.turns(), self.turns()
            held, free = self.put("true"), self.put("true")
            lost.take(queuectl.TurnRequest(free=2, look=True))
            others = self.put("true")
            alive.take(queuectl.TurnRequest(free=1, look=True))
            alive.database._skip_locked = skip_locked
            query = "SELECT 1 FROM jobs WHERE id IN (%s, %s) FOR UPDATE"
            began = time.monotonic()
            with self.locked(query, held, others):
                self.assertEqual(
                    len(
                        alive.after.take_over(alive.settings, lost.identity.id, -1)
                        or []
                    ),
                    1,
                )
                self.assert_state(free, State.FAILED)
                self.assert_state(held, State.PROCESSING)
            self.assertEqual(
                len(
                    alive.after.take_over(alive.settings, lost.identity.id, None) or []
                ),
                1,
            )
            self.assert_state(held, State.FAILED)
            self.assert_state(others, State.PROCESSING)
            # A worker whose row is held is in a turn, and not lost.
            query = "SELECT 1 FROM workers WHERE id = %s FOR UPDATE"
            with self.locked(query, alive.identity.id):
                for heartbeat in (0, None, -1):
                    taken = lost.after.take_over(
                        queuectl.Settings(), alive.identity.id, heartbeat
                    )
                    self.assertEqual(taken, None)
            self.assertLess(time.monotonic() - began, 5)
            self.assert_state(others, State.PROCESSING)

    def test_a_heartbeat_comes_between_the_tries_of_any_work(self) -> None:
        turns = self.turns()
        turns.take(queuectl.TurnRequest(look=True))
        tries = 0

        def work(cursor: queuectl.Cursor) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise pymysql.err.OperationalError(1205, "held by others")

        before = self.sql("SELECT beat + 1 FROM workers")
        turns.database.read(work)
        self.assertEqual(self.sql("SELECT beat FROM workers"), before)

    def test_on_lost_dead_buries_a_job_at_its_first_loss(self) -> None:
        job = self.put("kill -9 $PPID", on_lost="dead")
        self.worker()
        self.wait_state(job, State.DEAD)
        self.assertEqual(self.reasons(job), ["lost"])

    def test_without_retries_a_lost_job_runs_again_only_if_it_says_so_itself(
        self,
    ) -> None:
        lost = self.turns()
        for setting in (0, 3):
            lost.settings = queuectl.Settings(max_retries=setting, on_lost="retry")
            for own, on_lost, state in (
                (0, None, State.DEAD),
                (0, "retry", State.FAILED),
                (1, None, State.FAILED),
                (None, None, State.FAILED if setting else State.DEAD),
            ):
                job = self.put("true", max_retries=own, on_lost=on_lost)
                lost.take(queuectl.TurnRequest(free=1, look=True))
                self.sql("UPDATE jobs SET worker = 'gone' WHERE id = %s", job)
                lost.after.take_over(lost.settings, "gone", None)
                found = self.job(job, "state", "reason")
                self.sql("DELETE FROM jobs")
                with self.subTest(f"setting {setting}, job {own}, on_lost {on_lost}"):
                    self.assertEqual(found, (state, "lost"))


class Outages(WorkCase):
    """A database that is away stops claiming, not running, and condemns nobody."""

    black_hole_s = 4.0  # longer than the lease

    def setUp(self) -> None:
        super().setUp()
        self.proxy = Proxy(self.server.socket)
        self.addCleanup(self.proxy.close)
        del self.environment["DB_SOCKET"]
        self.environment.update(DB_HOST="127.0.0.1", DB_PORT=str(self.proxy.port))

    def test_a_black_hole_delays_no_limit_no_pipe_and_no_signal(self) -> None:
        limited = self.put("echo $$ > limited; sleep 60", timeout=2, max_retries=0)
        flood = self.put(
            "echo > flooding; head -c 10000000 /dev/zero; echo >> flooding"
        )
        long = self.put(f"echo $$ > long; sleep {self.black_hole_s + 4}", timeout=0)
        short = self.put("echo > shorting; sleep 1; echo >> short")
        workers = [self.worker("--count", "2") for _ in range(2)]
        for name in ("limited", "flooding", "long", "shorting"):
            self.wait_lines(name, 1)
        started = time.monotonic()
        self.proxy.hold()
        self.wait_lines("flooding", 2, 5)
        self.wait_lines("short", 1, 5)
        pid = int(self.lines("limited")[0])
        self.wait_until(lambda: not alive(pid), "the time limit ends its job", 3)
        self.wait_until(
            lambda: time.monotonic() - started > self.black_hole_s,
            "the black hole has lasted",
            self.black_hole_s + 1,
        )
        self.proxy.pass_on()
        self.wait_ended(3)
        self.wait_until(
            lambda: self.reasons(limited) == ["timeout"], "the result arrives"
        )
        for one in (flood, long, short):
            self.assertEqual(self.runs(one, "reason", "exit_code"), [("exit", 0)])
        self.assertEqual(self.runs(flood, "output_bytes"), [(10000000,)])
        self.assertEqual(len(self.lines("short")), 1)
        self.assertEqual(
            self.sql("SELECT id FROM workers WHERE lost_at IS NOT NULL"), []
        )
        for worker in workers:
            self.assertNotIn("lost", worker.said())

    @slow
    def test_a_black_hole_of_a_minute_delays_nothing(self) -> None:
        self.black_hole_s = 60.0
        self.test_a_black_hole_delays_no_limit_no_pipe_and_no_signal()

    @slow
    @unittest.skipUnless(os.geteuid() == 0, "needs the right to mount")
    def test_a_full_disk_under_the_server_is_an_outage_that_loses_nothing(self) -> None:
        disk = self.disk("1g")
        server = queuectl.PrivateServer(f"{disk}/server", self.server.program)
        server.start()
        self.addCleanup(server.stop)
        self.environment.update(DB_SOCKET=server.socket, DB_HOST="", DB_PASSWORD="")
        self.queuectl("db", "init")
        noisy = b"head -c 60000 /dev/urandom; echo x >> ran; sleep 0.05\n" * 600
        self.queuectl("enqueue", "-q", "--lines", "-", stdin=noisy)
        with contextlib.suppress(OSError), open(f"{disk}/fill", "wb", 0) as file:
            room = os.statvfs(disk)
            for _ in range(room.f_bavail * room.f_bsize // 1024**2 - 8):
                file.write(b"0" * 1024**2)
        worker = self.worker("--count", "4", "--drain")
        self.wait_until(
            lambda: os.statvfs(disk).f_bavail < 256 or len(self.lines("ran")) == 600,
            "the disk is full, or all have run",
            60,
        )
        self.assertLess(len(self.lines("ran")), 600)
        os.unlink(f"{disk}/fill")
        self.assertEqual(worker.wait(120), 0, worker.said())
        self.assertNotIn("Traceback", worker.said())
        self.assertEqual(len(self.lines("ran")), 600)
        states = json.loads(self.queuectl("status", "--json"))["states"]
        self.assertEqual(states["completed"], 600)

    @slow
    def test_twenty_long_jobs_outlive_an_outage_of_three_leases(self) -> None:
        for name in SCALED:
            del self.environment[name]
        self.put_many(20, "echo x >> started; sleep 100; echo x >> ended", timeout=0)
        workers = [self.worker("--count", "10") for _ in range(2)]
        self.wait_lines("started", 20)
        began = time.monotonic()
        self.proxy.refuse()
        self.proxy.cut()
        self.wait_until(lambda: time.monotonic() - began > 90, "90 s have passed", 91)
        self.assertEqual(self.lines("ended"), [])
        self.proxy.pass_on()
        self.wait_ended(20)
        self.assertEqual(len(self.lines("ended")), 20)
        self.assertEqual(
            self.sql("SELECT DISTINCT runs, attempts, reason FROM jobs"),
            [(1, 1, "exit")],
        )
        self.assertEqual(self.sql("SELECT 1 FROM workers WHERE lost_at > 0"), [])
        for worker in workers:
            told = [line for line in worker.said().splitlines() if "database" in line]
            self.assertEqual(len(told), 2, told)
            self.assertIn("trying again", told[0])
            self.assertRegex(told[1], r"the database is back after 1 m [23]\d s")

    locked_s = 3.2  # longer than the lease
    locks: Sequence[str] = (
        f"LOCK TABLES {', '.join(f'{table} READ' for table in TABLES)}",
        "FLUSH TABLES WITH READ LOCK",
    )

    def connections(self) -> int:
        """How many there are to the server, beside our own."""
        found = self.sql(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'root'"
        )
        return int(str(found[0][0])) - 2

    def test_work_waits_for_a_dump_and_leaves_no_connection_behind(self) -> None:
        workers = [self.worker("--count", "2") for _ in range(3)]
        processes = sum(len(worker.children()) for worker in workers)
        for statement in self.locks:
            with self.subTest(statement), self.connection() as dump:
                self.sql("DELETE FROM jobs")
                self.put_many(30, "sleep 0.1")
                self.wait_until(lambda: self.counts().get("completed"), "they run")
                dump.cursor().execute(statement)
                most, until = 0, time.monotonic() + self.locked_s
                while time.monotonic() < until:
                    most = max(most, self.connections())
                    time.sleep(0.02)
                left = 30 - int(str(self.counts().get("completed", 0)))
                dump.cursor().execute("UNLOCK TABLES")
                self.assertGreater(left, 0)
                self.assertLessEqual(most, processes + len(workers) + 1)
                self.wait_ended(30)
        # Some may have been handed back, since their claims were too old to start.
        self.assertEqual(self.sql("SELECT DISTINCT attempts FROM jobs"), [(1,)])
        self.assertEqual(self.sql("SELECT 1 FROM workers WHERE lost_at > 0"), [])
        for worker in workers:
            self.assertNotIn("lost", worker.said())
            self.assertEqual(len(worker.children()), processes // 3)

    @slow
    def test_work_waits_for_a_dump_of_a_minute(self) -> None:
        self.locked_s = 60.0
        self.locks = self.locks[:1]
        for name in SCALED:
            del self.environment[name]
        self.test_work_waits_for_a_dump_and_leaves_no_connection_behind()

    def test_a_second_signal_ends_a_worker_in_a_black_hole(self) -> None:
        self.put("trap '' TERM; echo > started; while :; do sleep 1; done")
        worker = self.worker("--count", "2")
        self.wait_lines("started", 1)
        self.proxy.hold()
        worker.signal(signal.SIGTERM)
        self.wait_until(lambda: "once more" in worker.said(), "it has heard the first")
        asked = time.monotonic()
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 128 + signal.SIGTERM)
        self.assertLess(time.monotonic() - asked, 1 + 1)
        self.assertEqual(self.living(), [])

    def test_results_of_a_stop_in_an_outage_arrive_when_it_ends_in_time(self) -> None:
        job = self.put("echo > started; sleep 1")
        worker = self.worker()
        self.wait_lines("started", 1)
        self.proxy.refuse()
        self.proxy.cut()
        worker.signal(signal.SIGTERM)
        self.wait_until(lambda: "trying again" in worker.said(), "it says so")
        self.proxy.pass_on()
        self.assertEqual(worker.wait(), 0)
        self.assertEqual(self.runs(job, "reason", "exit_code"), [("exit", 0)])

    def test_a_stop_in_a_long_outage_names_the_jobs_whose_results_were_lost(
        self,
    ) -> None:
        job = self.put("echo > started; sleep 0.5")
        worker = self.worker("--grace", "2")
        self.wait_lines("started", 1)
        self.proxy.refuse()
        self.proxy.cut()
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(8), 1)
        self.assertIn(job, worker.said())
        self.assertIn("will run again", worker.said())


@slow
class Clusters(WorkCase):
    """Three nodes of MySQL's Group Replication, each on a port of its own, or `apart`:
    each in a network of its own, with a cable that can be pulled."""

    hosts = ("127.0.0.1",) * 3
    apart = False

    def lay_cables(self) -> None:
        """Three networks with a host in each, joined by a bridge."""
        name = f"q{os.getpid() % 100000}"
        self.cables = [f"{name}c{at}" for at in range(3)]
        self.networks = [f"{name}n{at}" for at in range(3)]
        self.hosts = ("10.77.0.1", "10.77.0.2", "10.77.0.3")
        self.apart = True
        self.addCleanup(self.ip, f"link del {name}b", check=False)
        if not self.ip(f"link add {name}b type bridge", check=False):
            self.skipTest("needs the right to make networks, and iproute2")
        self.ip(f"link set {name}b up")
        for cable, network, host in zip(self.cables, self.networks, self.hosts):
            self.ip(f"netns add {network}")
            self.addCleanup(self.ip, f"netns del {network}", check=False)
            self.ip(f"link add {cable} type veth peer name eth0 netns {network}")
            self.ip(f"link set {cable} master {name}b up")
            self.ip(f"-n {network} addr add {host}/24 dev eth0")
            self.ip(f"-n {network} link set eth0 up")
            self.ip(f"-n {network} link set lo up")

    def ip(self, words: str, check: bool = True) -> bool:
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run(
                ["ip", *words.split()], check=check, capture_output=True
            )
            return done.returncode == 0
        return False

    def form(self, *options: str) -> None:
        """Have the three be a group; all accounts are without a password."""
        if b"MariaDB" in subprocess.check_output([self.server.program, "--version"]):
            self.skipTest("Group Replication is MySQL's")
        ignore_resources(self)
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
        ports = [listener.getsockname()[1] for listener in listeners]
        for listener in listeners:
            listener.close()
        seeds = ",".join(f"{host}:{port}" for host, port in zip(self.hosts, ports[3:]))
        self.ports, self.nodes = ports[:3], []
        for at, (port, host) in enumerate(zip(self.ports, self.hosts)):
            inside = ["ip", "netns", "exec", self.networks[at]] if self.apart else []
            words = [
                "--skip-networking=OFF",
                f"--bind-address={host}",
                f"--port={port}",
                f"--server-id={at + 1}",
                "--gtid-mode=ON",
                "--enforce-gtid-consistency=ON",
                "--log-bin=bin",
                f"--report-host={host}",
                f"--report-port={port}",
                "--plugin-load-add=group_replication.so",
                f"--loose-group-replication-group-name={uuid.UUID(int=1)}",
                f"--loose-group-replication-local-address={host}:{ports[3 + at]}",
                f"--loose-group-replication-group-seeds={seeds}",
                "--loose-group-replication-start-on-boot=OFF",
                "--loose-group-replication-recovery-get-public-key=ON",
                *options,
            ]
            program = self.path(f"mysqld{at}")
            with open(program, "w") as file:
                file.write(
                    f'#!/bin/sh\ncase "$*" in *--pid-file*) set -- "$@" '
                    f"{shlex.join(words)};; esac\n"
                    f'exec {shlex.join([*inside, self.server.program])} "$@"\n'
                )
            os.chmod(program, 0o755)
            node = queuectl.PrivateServer(self.path(f"node{at}"), program)
            node.start()
            self.addCleanup(node.stop)
            self.nodes.append(node)
            self.ask(
                at,
                "SET sql_log_bin = 0",
                "CREATE USER mender@'%' IDENTIFIED BY 'm'",
                "GRANT REPLICATION SLAVE, BACKUP_ADMIN, GROUP_REPLICATION_STREAM, "
                "CONNECTION_ADMIN ON *.* TO mender@'%'",
                "SET sql_log_bin = 1",
                "CHANGE REPLICATION SOURCE TO source_user = 'mender', "
                "source_password = 'm' FOR CHANNEL 'group_replication_recovery'",
                f"SET GLOBAL group_replication_bootstrap_group = {int(not at)}",
                "START GROUP_REPLICATION",
                "SET GLOBAL group_replication_bootstrap_group = 0",
            )
        self.wait_until(
            lambda: [row[1] for row in self.members(0)] == ["ONLINE"] * 3,
            "all three are in the group",
            60,
        )
        self.ask(0, "CREATE USER queue@'%'", "GRANT ALL ON queuectl.* TO queue@'%'")
        del self.environment["DB_SOCKET"], self.environment["DB_PASSWORD"]
        reached = self.ports
        if self.apart:  # clients reach a host whose cable is pulled all the same
            doors = [Proxy(node.socket) for node in self.nodes]
            for door in doors:
                self.addCleanup(door.close)
            reached = [door.port for door in doors]
            self.environment["DB_SSL_MODE"] = "disabled"
        hosts = ",".join(f"127.0.0.1:{port}" for port in reached)
        self.environment.update(DB_USER="queue", DB_HOST=hosts)
        self.queuectl("db", "init")

    def ask(self, at: int, *statements: str) -> list[tuple[object, ...]]:
        with (
            pymysql.connect(
                unix_socket=self.nodes[at].socket,
                user="root",
                autocommit=True,
                read_timeout=60,
            ) as database,
            database.cursor() as cursor,
        ):
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall())

    def members(self, at: int) -> list[tuple[object, ...]]:
        return self.ask(
            at,
            "SELECT member_port, member_state, member_role FROM "
            "performance_schema.replication_group_members",
        )

    def assert_each_ran_once(self, jobs: int) -> None:
        twice = {one for one in self.lines("ran") if self.lines("ran").count(one) > 1}
        self.assertEqual([self.show(one)["history"] for one in twice], [])
        self.assertEqual(len(self.lines("ran")), jobs)
        found = [
            json.loads(one) for one in self.queuectl("list", "--json").splitlines()
        ]
        self.assertEqual(
            [(one["state"], one["attempts"]) for one in found],
            [("completed", 1)] * jobs,
        )

    def test_a_killed_primary_is_replaced_and_nothing_is_lost_or_repeated(self) -> None:
        self.form()
        lines = b"echo $QUEUECTL_JOB_ID >> ran; sleep 0.3; echo x >> ended\n" * 300
        self.queuectl("enqueue", "-q", "--lines", "-", stdin=lines)
        for _ in range(2):
            self.worker("--count", "4")
        self.wait_lines("ended", 30)
        os.kill(self.nodes[0].running(), signal.SIGKILL)
        killed = time.monotonic()
        self.wait_until(
            lambda: any(
                row[1:] == ("ONLINE", "PRIMARY") and row[0] != self.ports[0]
                for row in self.members(1)
            ),
            "another is elected",
            60,
        )
        elected, ended = time.monotonic(), len(self.lines("ended"))
        during = self.queuectl("enqueue", "-c", "echo $QUEUECTL_JOB_ID >> ran").strip()
        self.wait_lines("ended", ended + 1)
        back = time.monotonic()
        self.assertLess(back - elected, 10)
        self.wait_lines("ended", 300, 60)
        self.wait_until(lambda: during in self.lines("ran"), "the late one ran")
        self.wait_until(
            lambda: '"processing": 0' in self.queuectl("status", "--json"), "all ended"
        )
        self.assert_each_ran_once(301)
        print(
            f"failover: elected after {elected - killed:.1f} s, work went on "
            f"{back - elected:.1f} s later"
        )

    def test_a_primary_cut_off_from_its_group_is_left_for_the_next(self) -> None:
        for name in SCALED:  # as installed
            del self.environment[name]
        self.lay_cables()
        self.form()
        lines = b"echo $QUEUECTL_JOB_ID >> ran; sleep 0.3; echo x >> ended\n" * 300
        known = set(self.queuectl("enqueue", "--lines", "-", stdin=lines).split())
        for _ in range(2):
            self.worker("--count", "4")
        self.wait_lines("ended", 30)
        self.ip(f"link set {self.cables[0]} down")
        cut = time.monotonic()
        self.wait_until(
            lambda: any(
                row[1:] == ("ONLINE", "PRIMARY") and row[0] != self.ports[0]
                for row in self.members(1)
            ),
            "another is elected",
            60,
        )
        elected, ended = time.monotonic(), len(self.lines("ended"))
        self.wait_lines("ended", ended + 1, 60)
        back = time.monotonic()
        statuses = collections.Counter[int]()
        while time.monotonic() < cut + 180:
            job_id = queuectl.new_id()
            argv = ("enqueue", "--id", job_id, "-c", "echo $QUEUECTL_JOB_ID >> ran")
            done = self.run_queuectl(*argv)
            statuses[done.returncode] += 1
            if done.returncode == 0:
                known.add(job_id)
            else:
                self.assertEqual(done.returncode, 69, done.stderr.decode())
                self.assertEqual(self.run_queuectl(*argv, "--if-absent").returncode, 0)
                known.add(job_id)
        self.ip(f"link set {self.cables[0]} up")
        self.wait_until(
            lambda: '"processing": 0' in self.queuectl("status", "--json"),
            "all ended",
            60,
        )
        print(
            f"cut off: elected after {elected - cut:.1f} s, work went on "
            f"{back - elected:.1f} s later; enqueues by exit status {dict(statuses)}"
        )
        self.assertLess(back - elected, 20)
        self.assertEqual(sorted(self.lines("ran")), sorted(known))
        self.assert_each_ran_once(len(known))

    def test_workers_on_three_writing_nodes_run_each_job_once_and_keep_limits(
        self,
    ) -> None:
        self.form(
            "--loose-group-replication-single-primary-mode=OFF",
            "--loose-group-replication-enforce-update-everywhere-checks=ON",
        )
        self.queuectl("queue", "limit", "few", "2")
        once = "echo $QUEUECTL_JOB_ID >> ran; "
        counted = "echo + >> count; sleep 0.1; echo - >> count"
        for queue, command, jobs in (
            ("many", once + "sleep 0.05", 200),
            ("few", once + counted, 40),
        ):
            lines = f"{command}\n".encode() * jobs
            self.queuectl("enqueue", "-q", f"--queue={queue}", "--lines=-", stdin=lines)
        ids = [f"parent-{at}" for at in range(20)]
        document = [{"id": one, "command": once} for one in ids] + [
            {"command": once, "after": [one, ids[at - 1]]} for at, one in enumerate(ids)
        ]
        lines = "\n".join(map(json.dumps, document)).encode()
        self.queuectl("enqueue", "-q", "-f", "-", stdin=lines)
        workers = [
            self.start(
                *("worker", "start", "--count", "6", "--drain"),
                DB_HOST=f"127.0.0.1:{port}",
            )
            for port in self.ports
        ]
        for worker in workers:
            self.assertEqual(worker.wait(120), 0, worker.said()[-2000:])
        self.assert_each_ran_once(280)
        running = most = 0
        for sign in self.lines("count"):
            running += 1 if sign == "+" else -1
            most = max(most, running)
        self.assertLessEqual(most, 2)


class HungDirectory:
    """A directory whose file system answers, or does not any more: FUSE, by hand.

    Nothing is in it. Who asks while nobody reads the questions can be killed; who asks
    while they are read and not answered is in D state until they are.
    """

    INIT, GETATTR, ACCESS, OPENDIR, READDIR, RELEASEDIR = 26, 3, 34, 27, 28, 29
    UNANSWERED = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET

    def __init__(self, path: str) -> None:
        self.path, self.answering = path, True
        self.held: list[bytes] = []  # what was asked, and not answered yet
        self.reading, self.over = threading.Event(), False
        self.device = os.open("/dev/fuse", os.O_RDWR)
        self.libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other"
        os.mkdir(path)
        if self.libc.mount(b"hung", path.encode(), b"fuse", 0, options.encode()):
            os.close(self.device)
            raise OSError(ctypes.get_errno(), "mount")
        self.reading.set()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def hang(self, killable: bool) -> None:
        """Answer nothing any more."""
        self.answering = False
        if killable:
            self.reading.clear()

    def answer(self) -> None:
        """Answer again, also what was asked since."""
        self.answering = True
        with contextlib.suppress(IndexError):
            while True:
                self._answer(self.held.pop())
        self.reading.set()

    def close(self) -> None:
        """Unmount it, and let everybody go who waits for it."""
        self.over = True
        self.reading.set()
        self.libc.umount2(self.path.encode(), 2)  # MNT_DETACH
        self.thread.join()
        os.close(self.device)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.device, selectors.EVENT_READ)
            while self.reading.wait() and not self.over:
                if not selector.select(0.05) or not self.reading.is_set():
                    continue
                with contextlib.suppress(OSError):  # who asked was killed
                    asked = os.read(self.device, 1 << 17)
                    self.held.append(asked)
                    if self.answering:
                        self.answer()

    def _answer(self, asked: bytes) -> None:
        _, code, number = struct.unpack_from("IIQ", asked)
        said, error = b"", 0
        if code in self.UNANSWERED:
            return
        if code == self.INIT:
            said = struct.pack("IIIIHHIIHH32x", 7, 31, 0, 0, 0, 0, 65536, 1, 0, 0)[:64]
        elif code == self.OPENDIR:
            said = bytes(16)
        elif code == self.GETATTR:
            mode = stat.S_IFDIR | 0o777
            said = bytes(16) + struct.pack("Q52x7I", 1, mode, 2, 0, 0, 0, 4096, 0)
        elif code not in (self.ACCESS, self.READDIR, self.RELEASEDIR):
            error = -errno.ENOENT
        with contextlib.suppress(OSError):  # who asked was killed
            os.write(
                self.device, struct.pack("IiQ", 16 + len(said), error, number) + said
            )


# How the supervisors of the torture are started: as a program like any other; without
# a sight of other users' processes, as under systemd's ProtectProc; and on two hosts of
# their own, whose first process outlives a supervisor that is killed.
BLIND = """mount -t proc -o hidepid=2,gid=54321 proc /proc &&
exec setpriv --bounding-set -all --inh-caps -all env TEST_CASE="$0" "$@"
"""
HOST = """echo "$0" > /proc/sys/kernel/hostname
env TEST_CASE="$@" & wait $!; status=$?; [ $status -lt 128 ] || sleep 60; exit $status
"""
ELSEWHERE = (*CONTAINER, "--uts", "sh", "-c", HOST)
WORLDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "blind": ("unshare", "--mount", "sh", "-c", BLIND),
    "one": (*ELSEWHERE, "one.example"),
    "two": (*ELSEWHERE, "two.example"),
}
# Where a control group that counts processes can be made.
PIDS_CGROUPS = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup")
F_SETPIPE_SZ = 1031  # Python 3.10 has it


class Host(Background):
    """A `worker start` in one of the worlds; its log goes through a narrow pipe."""

    def __init__(self, case: Torture, world: str, number: int) -> None:
        self.case, self.world, self.number = case, world, number
        self.door = number % 2
        self.reading, self.killed, self._top = threading.Event(), 0, 0
        self.reading.set()
        self.cgroup = self._make_cgroup()
        wrap = (*WORLDS[world], case.folder) if WORLDS[world] else ()
        read_end, write_end = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(write_end, F_SETPIPE_SZ, 4096)
        command = [sys.executable, SCRIPT, "worker", "start", "--count", "4"]
        environment = {
            **case.environment,
            **case.doors[self.door],
            **case.clock(f"clock.{number % 2}"),
            "TORTURE": str(number),
        }
        if wrap:
            del environment["TEST_CASE"]  # its first processes are none of ours
        process = subprocess.Popen(
            [*wrap, *command],
            cwd=case.folder,
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            start_new_session=True,
            env=environment,
            preexec_fn=self._enter_cgroup,
        )
        os.close(write_end)
        self.pipe = read_end
        super().__init__(process, case.path(f"host-{number}.log"))
        open(self.log, "w").close()
        case.addCleanup(case.end, self)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _make_cgroup(self) -> str:
        """The path of a control group for it alone; empty where there are none."""
        for base in PIDS_CGROUPS:
            path = f"{base}/queuectl-torture-{os.getpid()}-{self.number}"
            with contextlib.suppress(OSError):
                os.mkdir(path)
                self.case.addCleanup(self._remove_cgroup, path)
                if os.path.exists(f"{path}/pids.max"):
                    return path
        return ""

    def _remove_cgroup(self, path: str) -> None:
        """Once it is empty: the last of a namespace take a moment to be gone."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                os.rmdir(path)
                return
            time.sleep(0.02)

    def _enter_cgroup(self) -> None:
        if self.cgroup:
            with open(f"{self.cgroup}/cgroup.procs", "w") as file:
                file.write("0")

    def stop_reading(self) -> None:
        """Have nobody read its log, and its pipe be full."""
        self.reading.clear()
        path = f"/proc/self/fd/{self.pipe}"
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.closing(os.fdopen(handle, "wb", 0)) as pipe:
            while pipe.write(b"\n" * 512):
                pass

    def _read(self) -> None:
        with open(self.log, "ab") as file, open(self.pipe, "rb", 0) as pipe:
            while self.reading.wait() and (data := pipe.read(4096)):
                file.write(data)
                file.flush()

    def top(self) -> int:
        """The supervisor's pid; ProcessLookupError if it has not begun, or ended."""
        for pid in [self.pid, *descendants(self.pid)] if not self._top else ():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
                if file.read().startswith(sys.executable):
                    self._top = pid
                    break
        if not self._top or not alive(self._top):
            raise ProcessLookupError
        return self._top

    def signal(self, number: int) -> None:
        os.kill(self.top(), number)

    def children(self) -> list[int]:
        try:
            path = f"/proc/{self.top()}/task/{self.top()}/children"
            with open(path) as file:
                return [int(word) for word in file.read().split()]
        except OSError:
            return []

    def kill(self, pids: Sequence[int]) -> None:
        """Kill some of its workers."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1


def inner_pid(pid: int) -> int:
    """A process's number in its own PID namespace."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.findall(r"(?m)^NSpid:.*\s(\d+)$", file.read())[0])


@dataclasses.dataclass
class Disturbance:
    """What a host's processes did not bring upon themselves: from when to when."""

    why: str
    host: int
    pid: int  # 0: all of them
    began: float
    ended: float


class Nemesis:
    """Faults, at random and together, told by a seed. What it broke it also mends."""

    def __init__(self, case: Torture, seed: int) -> None:
        self.case, self.random = case, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.set_aside: collections.Counter[str] = collections.Counter()
        self.disturbances: list[Disturbance] = []
        self.hangs = 0
        self.killed: set[int] = set()  # the numbers of hosts
        self.stranded: list[float] = []  # when processes began to survive KILL
        self.locked: set[str] = set()  # the jobs whose rows a stranger locked
        # Who waits here for a lock of our own would wait for ever.
        self.wanted: list[Sequence[dict[str, object]]] = []  # to be enqueued
        self.heard: dict[Host, int] = {}  # how much of its log
        self.lost: list[tuple[int, int, float]] = []  # by their own word: and when
        self.undos: list[tuple[float, Iterator[float]]] = []
        alone = len(case.faults) < len(FAULTS)
        self.patient = case.seconds > 20 or alone
        # How long to hold what all wait for: not past a time-out in a short run.
        self.holds_s: tuple[float, ...] = (
            (2.0, 12.0) if alone else (0.5, 1.0, 1.0, 2.0, 2.0)
        )
        if case.seconds >= 60 and not alone:
            self.holds_s += (12.0,)

    def step(self) -> None:
        """One more fault, if it can be."""
        name = self.random.choice(self.case.faults)
        with contextlib.suppress(
            pymysql.MySQLError, ProcessLookupError, IndexError, StopIteration
        ):
            begun = FAULTS[name](self)
            if begun is not None:
                self.undos.append((time.monotonic() + next(begun), begun))
            self.counts[name] += 1

    def undo(self, all_of_them: bool = False) -> None:
        """Take back the faults that are due."""
        due = [one for one in self.undos if all_of_them or time.monotonic() >= one[0]]
        for one in due:
            self.undos.remove(one)
            with contextlib.suppress(pymysql.MySQLError, OSError):
                next(one[1], 0.0)

    def listen(self) -> None:
        """Learn which workers found themselves lost; their clocks may be wrong."""
        for one in self.case.all:
            news = one.said()[self.heard.get(one, 0) :]
            self.heard[one] = self.heard.get(one, 0) + len(news)
            for pid in re.findall(r"\[(\d+)\] this worker .* was declared lost", news):
                self.lost.append((one.number, int(pid), time.time()))

    def disturb(self, why: str, host: Host, pid: int = 0) -> Disturbance:
        """Put down that a process of a host is disturbed, until that is over."""
        found = Disturbance(why, host.number, pid, time.time(), math.inf)
        self.disturbances.append(found)
        return found

    def disturbance(self, host: int, pid: int, since: float, at: float) -> str:
        """What disturbed a process between two moments; empty if nothing did."""
        for one in self.disturbances:
            theirs = one.host == host and one.pid in (0, pid)
            if theirs and one.began <= at and one.ended >= since:
                return one.why
        return ""

    def stopped_between(self, since: float, until: float) -> bool:
        """Whether any worker stood still then."""
        return any(
            one.why == "stopped" and one.began <= until and one.ended >= since
            for one in self.disturbances
        )

    # -- whom it strikes

    def a_host(self) -> Host:
        return self.random.choice([one for one in self.case.workers if one.children()])

    def a_worker(self) -> tuple[Host, int]:
        host = self.a_host()
        return host, self.random.choice(host.children())

    def some_jobs(self, count: int) -> list[tuple[int, str]]:
        """The seq and id of some that have not ended."""
        rows = self.case.ask("SELECT seq, id FROM jobs WHERE finished_at IS NULL")
        found = [(int(str(seq)), str(job)) for seq, job in rows]
        return self.random.sample(found, min(count, len(found)))

    @contextlib.contextmanager
    def cut_off(self, why: str) -> Iterator[None]:
        """What disturbs those that go through the proxy."""
        through = [one for one in self.case.workers if one.door]
        found = [self.disturb(why, one) for one in through]
        yield
        for one in found:
            one.ended = time.time() + 1  # until it has connected anew


# A fault breaks something. If it is a generator it says for how long, and undoes it
# after that.
Fault = Callable[[Nemesis], Optional[Iterator[float]]]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """One that the nemesis may choose."""
    FAULTS[function.__name__] = function
    return function


# -- faults of processes


@fault
def kill_worker(nemesis: Nemesis) -> None:
    host, pid = nemesis.a_worker()
    host.kill([pid])


@fault
def kill_supervisor(nemesis: Nemesis) -> None:
    host = nemesis.a_host()
    host.signal(signal.SIGKILL)
    nemesis.killed.add(host.number)
    nemesis.case.replace(host)


@fault
def kill_host(nemesis: Nemesis) -> Iterator[float]:
    """A supervisor and all its workers in one go; its jobs know nothing of it."""
    host = nemesis.a_host()
    kill_all([host.top(), *host.children()])
    nemesis.killed.add(host.number)
    yield nemesis.random.choice((0, 1, 7))
    nemesis.case.replace(host)


@fault
def kill_shell(nemesis: Nemesis) -> None:
    _, worker = nemesis.a_worker()
    shells = [pid for pid in descendants(worker) if alive(pid)]
    os.kill(nemesis.random.choice(shells), signal.SIGKILL)


@fault
def stop_worker(nemesis: Nemesis) -> Iterator[float]:
    host, pid = nemesis.a_worker()
    stopped = nemesis.disturb("stopped", host, inner_pid(pid))
    os.kill(pid, signal.SIGSTOP)
    yield nemesis.random.uniform(1, 6)
    stopped.ended = time.time() + 3
    os.kill(pid, signal.SIGCONT)


@fault
def stop_reader(nemesis: Nemesis) -> Iterator[float]:
    host = nemesis.a_host()
    host.stop_reading()
    yield nemesis.random.uniform(2, 8)
    host.reading.set()


@fault
def limit_files(nemesis: Nemesis) -> Iterator[float]:
    """A worker can open hardly any more files."""
    _, pid = nemesis.a_worker()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    now = len(os.listdir(f"/proc/{pid}/fd")) + nemesis.random.randrange(3)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (now, before[1]))
    yield nemesis.random.uniform(1, 3)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@fault
def limit_processes(nemesis: Nemesis) -> Iterator[float]:
    """A host can start hardly any more processes."""
    host = nemesis.a_host()
    if not host.cgroup:
        nemesis.set_aside["limit_processes: no control groups for pids"] += 1
        return
    with open(f"{host.cgroup}/pids.current") as file:
        now = int(file.read()) + nemesis.random.randrange(3)
    write_text(f"{host.cgroup}/pids.max", str(now))
    yield nemesis.random.uniform(1, 3)
    write_text(f"{host.cgroup}/pids.max", "max")


# -- faults of directories


@fault
def hang_directory(nemesis: Nemesis) -> Iterator[float]:
    """Who is in the directory, or goes there, hangs, and can be killed."""
    yield from hang(nemesis, killable=True)


@fault
def strand(nemesis: Nemesis) -> Iterator[float]:
    """Who is in the directory, or goes there, is in D state, and a worker dies."""
    yield from hang(nemesis, killable=False)


def hang(nemesis: Nemesis, killable: bool) -> Iterator[float]:
    directory = nemesis.case.directory
    if not directory:
        nemesis.set_aside["hung directory: no right to mount"] += 1
        return
    if not directory.answering:
        return  # it hangs as it is
    directory.hang(killable)
    if not killable:
        nemesis.stranded.append(time.time())
    nemesis.hangs += 1
    jobs = nemesis.case.jobs_beside_a_hung_directory(f"hang{nemesis.hangs}")
    nemesis.wanted.append(jobs)
    yield nemesis.random.uniform(4, 9)
    directory.answer()


# -- faults of the server


@fault
def kill_server(nemesis: Nemesis) -> None:
    pid = nemesis.case.own.running()
    if pid:
        os.kill(pid, signal.SIGKILL)
    nemesis.case.own.start()


@fault
def kill_connections(nemesis: Nemesis) -> None:
    for number, user in nemesis.case.ask(
        "SELECT id, user FROM information_schema.processlist"
    ):
        if user == "torture" and nemesis.random.random() < 0.5:
            with contextlib.suppress(pymysql.MySQLError):
                nemesis.case.ask(f"KILL {number}")


@fault
def read_only(nemesis: Nemesis) -> Iterator[float]:
    nemesis.case.ask("SET GLOBAL read_only = 1")
    yield 0.7
    nemesis.case.ask("SET GLOBAL read_only = 0")


@fault
def crowd(nemesis: Nemesis) -> Iterator[float]:
    nemesis.case.ask("SET GLOBAL max_connections = 10")
    yield 0.7
    nemesis.case.ask("SET GLOBAL max_connections = 151")


@fault
def veto(nemesis: Nemesis) -> Iterator[float]:
    """The server refuses to write one row: its claim, its end, or anything."""
    name = f"veto{nemesis.counts['veto']}"
    states = nemesis.random.choice(
        ("'processing'", "'completed', 'failed'", "OLD.state, NEW.state")
    )
    nemesis.case.ask(f"DROP TRIGGER IF EXISTS {name}")
    nemesis.case.ask(
        f"CREATE TRIGGER {name} BEFORE UPDATE ON jobs FOR EACH ROW "
        f"IF OLD.id = '{name}' AND NEW.state IN ({states}) THEN "
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'vetoed'; END IF"
    )
    job: dict[str, object] = {"id": name, "command": nemesis.case.book, "queue": "veto"}
    nemesis.wanted.append([job])
    yield nemesis.random.uniform(2, 9)
    nemesis.case.ask(f"DROP TRIGGER IF EXISTS {name}")


# -- strangers' locks


@fault
def lock_rows(nemesis: Nemesis) -> Iterator[float]:
    chosen = nemesis.some_jobs(20)
    nemesis.locked |= {job for _, job in chosen}
    how = nemesis.random.choice(("FOR UPDATE", "LOCK IN SHARE MODE"))
    seqs = ", ".join(str(seq) for seq, _ in chosen) or "0"
    with contextlib.closing(nemesis.case.connect()) as held:
        held.cursor().execute("SET innodb_lock_wait_timeout = 1")
        held.begin()
        held.cursor().execute(f"SELECT seq FROM jobs WHERE seq IN ({seqs}) {how}")
        yield nemesis.random.uniform(0.5, 6)


@fault
def freeze(nemesis: Nemesis) -> Iterator[float]:
    with contextlib.closing(nemesis.case.connect()) as held:
        held.cursor().execute("FLUSH TABLES WITH READ LOCK")
        yield nemesis.random.choice(nemesis.holds_s)


@fault
def lock_tables(nemesis: Nemesis) -> Iterator[float]:
    """As a plain mysqldump does."""
    with contextlib.closing(nemesis.case.connect()) as held:
        held.cursor().execute("LOCK TABLES jobs READ, workers READ")
        yield nemesis.random.choice(nemesis.holds_s)


@fault
def alter(nemesis: Nemesis) -> Iterator[float]:
    """An ALTER waits for an open transaction, and all others wait for the ALTER."""
    with contextlib.closing(nemesis.case.connect()) as held:
        held.begin()
        held.cursor().execute("SELECT seq FROM jobs LIMIT 1")
        waiting = threading.Thread(target=nemesis.case.alter)
        waiting.start()
        yield nemesis.random.choice(nemesis.holds_s)
    waiting.join()


# -- faults of the wire


@fault
def lose_commits(nemesis: Nemesis) -> Iterator[float]:
    with nemesis.cut_off("lost COMMITs"):
        nemesis.case.proxy.faults += nemesis.random.choices(
            ("before", "after", ""), k=4
        )
        yield 1.0


@fault
def reset(nemesis: Nemesis) -> Iterator[float]:
    """One packet of twenty breaks its connection."""
    with nemesis.cut_off("reset connections"):
        nemesis.case.proxy.reset_chance = 0.05
        yield 2.0
        nemesis.case.proxy.reset_chance = 0.0


@fault
def silence(nemesis: Nemesis) -> Iterator[float]:
    with nemesis.cut_off("silence"):
        nemesis.case.proxy.hold()
        yield 0.5
        nemesis.case.proxy.open.set()


@fault
def refuse(nemesis: Nemesis) -> Iterator[float]:
    with nemesis.cut_off("refused connections"):
        nemesis.case.proxy.refuse()
        nemesis.case.proxy.cut()
        yield 0.5
        nemesis.case.proxy.pass_on()


# -- what is no fault, and hard all the same


@fault
def jump(nemesis: Nemesis) -> Iterator[float]:
    """A host's clock goes wrong by an hour, the server's by what jobs can wait."""
    clock = nemesis.random.choice(nemesis.case.clocks)
    seconds = 2 if clock.endswith("server") else 3600
    set_clock(clock, nemesis.random.choice((-1, 1)) * seconds)
    yield nemesis.random.uniform(0.5, 3)
    set_clock(clock, 0)


@fault
def fan_out(nemesis: Nemesis) -> None:
    """A parent, and 600 that wait for it."""
    if nemesis.case.ask(
        "SELECT 1 FROM jobs WHERE queue = 'fan' AND finished_at IS NULL LIMIT 1"
    ):
        return
    parent = f"fan{nemesis.counts['fan_out']}"
    keys: dict[str, object] = {"command": ":", "queue": "fan"}
    jobs: list[dict[str, object]] = [{"id": parent, **keys}]
    jobs += [{"id": f"{parent}.{at}", **keys, "after": [parent]} for at in range(600)]
    nemesis.wanted.append(jobs)


# Preloaded, a clock that is wrong by the seconds in the file CLOCK; other clocks stay.
CLOCK_C = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static const volatile signed char *wrong_by;
__attribute__((constructor)) static void begin(void) {
    char *path = getenv("CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = mmap(0, 1, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) wrong_by = page;
    if (file >= 0) close(file);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, clock, at);
    int faked = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
    if (!failed && faked && wrong_by)
        at->tv_sec += wrong_by[0] * 60 + wrong_by[1];
    return failed;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


# How long after its lease's end a worker may learn that it was lost, and how long a
# job may wait after one that should follow it: what claims and outages explain.
LOST_AFTER_S = 8.0
OVERTAKEN_S = 8.0
# The time limit of jobs that would not end by themselves, and how long a run may live
# past it: its kill_grace, and what a load adds.
LIMIT_S = 2
LATE_S = 3.0


def write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def set_clock(path: str, seconds: int) -> None:
    """Have the clock that this file is for go wrong by so many seconds."""
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(struct.pack("bb", seconds // 60, seconds % 60))


# A job's own book outside the database: who ran it, where and when; and whether any
# process of an earlier run still lives, since all hold the lock.
TORTURED = """unset LD_PRELOAD  # true times here
cd {folder}
now=$(date +%s.%N) job=$QUEUECTL_JOB_ID
exec 9>>lock.$job
flock -n 9 || echo "$job $now $TORTURE $PPID $(cat book.$job)" >> overlaps
echo $TORTURE $PPID > book.$job
echo "$job $QUEUECTL_ATTEMPT start $now" >> book
"""
QUEUES = tuple(f"q{number}" for number in range(10))


class Drainer:
    """A `worker start --drain` beside it all: one after the other, each on its own
    queue, in which half of the jobs fail and come back."""

    def __init__(self, case: Torture) -> None:
        self.case, self.round = case, 0
        self.worker: Background | None = None
        self.wrong: list[str] = []
        self.unable = 0

    def step(self) -> None:
        """Look at the one that has ended, and start the next."""
        if self.worker and self.worker.process.poll() is None:
            return
        with contextlib.suppress(pymysql.MySQLError):
            if self.worker:
                self.judge(self.worker)
            self.begin()

    def begin(self) -> None:
        self.worker, self.round = None, self.round + 1
        queue = f"drain{self.round}"
        jobs = [
            {
                "id": f"{queue}.{at}",
                "queue": queue,
                "max_retries": 2,
                "command": f"{self.case.book}sleep 0.1; exit {at % 2}",
            }
            for at in range(8)
        ]
        self.case.enqueue_jobs(jobs, self.case.random)
        door = self.case.doors[0]
        argv = ("worker", "start", "--drain", "--count", "2", "--queue", queue)
        self.worker = self.case.start(*argv, **door, TORTURE="drain")

    def judge(self, worker: Background) -> None:
        """It may end only once nothing is left, and by itself."""
        if worker.process.returncode == 69 and "ready, serving" not in worker.said():
            self.unable += 1
            return
        left = self.case.ask(
            f"SELECT id, state FROM jobs WHERE queue = 'drain{self.round}' "
            "AND state IN ('pending', 'processing', 'failed')"
        )
        if worker.process.returncode or left:
            self.wrong.append(
                f"drain{self.round}: status {worker.process.returncode}, left "
                f"{left}: {worker.said()[-500:]}"
            )


class ConnectionCount:
    """How many connections there are, against those that there may be."""

    def __init__(self, case: Torture) -> None:
        self.case, self.most, self.worst = case, 0, (-sys.maxsize, 0)
        self.own: pymysql.connections.Connection | None = None

    def look(self) -> None:
        """Count once; nothing while the server does not answer."""
        try:
            self.own = self.own or self.case.connect()
            with self.own.cursor() as cursor:
                cursor.execute(
                    "SELECT COUNT(*) FROM information_schema.processlist "
                    "WHERE user = 'torture'"
                )
                found = cursor.fetchall()[0][0]
        except pymysql.MySQLError:
            self.own = None
            return
        hosts = [one for one in self.case.workers if one.children()]
        processes = sum(len(one.children()) for one in hosts)
        self.most = max(self.most, found)
        # The drainer's supervisor and process, and two that enqueue.
        allowed = processes + len(hosts) + 10 + 4
        self.worst = max(self.worst, (found - allowed, found))

    def watch(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            self.look()


@unittest.skipUnless(os.environ.get("QUEUECTL_TORTURE"), "QUEUECTL_TORTURE=20")
class Torture(WorkCase):
    """Everything at once, against a book that the jobs keep outside the database.

    QUEUECTL_TORTURE=3600 does it for so many seconds, QUEUECTL_SEED=… as it was,
    QUEUECTL_FAULTS=veto,blind with these faults and worlds alone. Set aside, and
    counted by its reason, is what a worker did that was stopped or cut off.
    """

    settings = {
        **SCALED,
        "QUEUECTL_HEARTBEAT": "0.3",
        "QUEUECTL_WORKER_TIMEOUT": "4",
        "QUEUECTL_KILL_GRACE": "0.5",
        "QUEUECTL_BACKOFF_MAX": "0.2",
    }

    def connect(self, read_timeout: float = 5) -> pymysql.connections.Connection:
        return pymysql.connect(
            unix_socket=self.own.socket,
            user="root",
            database="queuectl",
            autocommit=True,
            connect_timeout=2,
            read_timeout=read_timeout,
            init_command="SET lock_wait_timeout = 2",
        )

    def ask(self, query: str) -> list[tuple[object, ...]]:
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def alter(self) -> None:
        """Change what nobody sees, once nobody has the table open."""
        with contextlib.suppress(pymysql.MySQLError), self.connect(60) as connection:
            connection.cursor().execute("SET lock_wait_timeout = 60")
            connection.cursor().execute(f"ALTER TABLE jobs COMMENT '{time.time()}'")

    def behind(self) -> int:
        """How many jobs have not ended; many while that cannot be told."""
        with contextlib.suppress(pymysql.MySQLError):
            rows = self.ask(
                "SELECT COUNT(*) FROM jobs WHERE finished_at IS NULL AND queue <> 'fan'"
            )
            return int(str(rows[0][0]))
        return sys.maxsize

    def begin(self, world: str) -> Host:
        """A host more in one of the worlds; through the proxy every other time."""
        self.all.append(Host(self, world, len(self.all)))
        return self.all[-1]

    def replace(self, host: Host) -> None:
        """Have another one in the place of one that was killed."""
        at = self.workers.index(host)
        self.workers[at] = self.begin(host.world)

    def clock(self, name: str) -> dict[str, str]:
        """The variables of a program whose clock can be set, if there is a compiler."""
        compiler, shim, clock = (
            shutil.which("cc"),
            self.path("clock.so"),
            self.path(name),
        )
        if not compiler:
            return {}
        if not os.path.exists(shim):
            command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", shim, "-"]
            subprocess.run(command, input=CLOCK_C.encode(), check=True)
        if clock not in self.clocks:
            set_clock(clock, 0)
            self.clocks.append(clock)
        return {"LD_PRELOAD": shim, "CLOCK": clock}

    def own_server(self) -> queuectl.PrivateServer:
        """A server, with a clock that can be set."""
        words = [f"{key}={value}" for key, value in self.clock("server").items()]
        program = self.path(os.path.basename(self.server.program))
        with open(program, "w") as file:
            file.write(
                f'#!/bin/sh\nexec env {shlex.join(words)} {self.server.program} "$@"\n'
            )
        os.chmod(program, 0o755)
        return queuectl.PrivateServer(self.path("own"), program)

    def some_job(self, job_id: str) -> dict[str, object]:
        """A job of the one or the other kind."""
        chance = self.random.random()
        pause = self.random.choice((0.0, 0.05, 0.2, 0.5))
        code = self.random.choice((0, 0, 0, 0, 1))
        job: dict[str, object] = {"id": job_id, "timeout": 5, "max_retries": 2}
        end = f'sleep {pause}; echo "$job $QUEUECTL_ATTEMPT end" >> book; exit {code}'
        if chance < 0.03:  # outlives a lease
            job.update(queue="long", timeout=9)
            end = "sleep 6"
        elif chance < 0.1:
            job.update(queue="limited", timeout=LIMIT_S)
            end = "sleep 30"
        else:
            job.update(
                queue=self.random.choice(QUEUES),
                priority=self.random.choice((0, 0, 0, 1, 2)),
            )
        job["command"] = self.book + end
        return job

    def jobs_beside_a_hung_directory(self, name: str) -> list[dict[str, object]]:
        """Some go there, and some look into it; they have a time limit."""
        path = self.path("hung")
        keys: tuple[dict[str, object], ...] = (
            {"command": f"{self.book}:", "cwd": path},
            {"command": f"{self.book}exec cat {path}/nothing"},
        )
        return [
            {
                "id": f"{name}.{at}",
                "queue": "hung",
                "timeout": LIMIT_S,
                "max_retries": 1,
                **keys[at % 2],
            }
            for at in range(6)
        ]

    def enqueue_some(self, batch: int) -> None:
        """Twenty jobs, every fifth after the one before it."""
        jobs = [self.some_job(f"j{batch}.{at}") for at in range(20)]
        for at in range(4, 20, 5):
            jobs[at]["after_any"] = [f"j{batch}.{at - 1}"]
        self.ordered |= {
            str(job["id"])
            for job in jobs
            if job["queue"] in QUEUES and "after_any" not in job
        }
        self.enqueue_jobs(jobs, self.random)

    def enqueue_jobs(
        self, jobs: Sequence[dict[str, object]], chance: random.Random
    ) -> None:
        """Enqueue; they are known once that was acknowledged."""
        lines = "\n".join(map(json.dumps, jobs)).encode()
        how = chance.choice(((), ("--if-absent",)))
        while True:
            done = self.run_queuectl(
                *("enqueue", "-f", "-", *how), stdin=lines, **chance.choice(self.doors)
            )
            if done.returncode == 0:
                break
            self.assertEqual(done.returncode, 69, done.stderr.decode())
            how = ("--if-absent",)  # as the message says
        printed = done.stdout.decode().split()
        self.assertEqual(printed, [str(job["id"]) for job in jobs])
        self.known += printed

    def choose_faults(self) -> None:
        """All, or those that QUEUECTL_FAULTS names; and the worlds, likewise."""
        wanted = os.environ.get("QUEUECTL_FAULTS", "").split(",")
        if wanted == [""]:
            wanted = [*FAULTS, *WORLDS]
        self.assertLessEqual(set(wanted), {*FAULTS, *WORLDS})
        self.faults = [name for name in wanted if name in FAULTS]
        self.worlds = [name if name in wanted else "plain" for name in WORLDS]
        if subprocess.run([*CONTAINER, "true"], check=False).returncode:
            print("all hosts are one: needs the right to make namespaces")
            self.worlds = ["plain"] * len(WORLDS)

    def set_up(self) -> None:
        """A server of its own, two doors to it, and the directory that hangs."""
        ignore_resources(self)  # of connections that died
        self.seconds = float(os.environ["QUEUECTL_TORTURE"])
        self.seed = int(os.environ.get("QUEUECTL_SEED", str(time.time_ns() % 10**6)))
        self.random = random.Random(self.seed)
        self.book = TORTURED.format(folder=self.folder)
        self.choose_faults()
        self.known: list[str] = []
        self.ordered: set[str] = set()
        self.clocks: list[str] = []
        self.all: list[Host] = []
        self.environment["DB_PASSWORD"] = ""
        self.own = self.own_server()
        self.own.start()
        self.addCleanup(self.own.stop)
        self.queuectl("db", "init", DB_SOCKET=self.own.socket)
        # With a password a restarted MySQL wants TLS.
        self.ask("CREATE USER torture@'%'")
        self.ask("GRANT ALL ON queuectl.* TO torture@'%'")
        self.proxy = Proxy(self.own.socket)
        self.addCleanup(self.proxy.close)
        socket_door = {"DB_SOCKET": self.own.socket}
        self.doors = tuple(
            {"DB_USER": "torture", **door}
            for door in (socket_door, self.proxy.variables())
        )
        self.directory: HungDirectory | None = None
        with contextlib.suppress(OSError):
            self.directory = HungDirectory(self.path("hung"))
            self.addCleanup(self.directory.close)

    def torment(self, nemesis: Nemesis, over: threading.Event) -> None:
        rarely = len(FAULTS) / max(len(self.faults), 5)  # so that work goes on
        next_at = 0.0
        while not over.wait(0.05):
            nemesis.listen()
            nemesis.undo()
            if self.faults and time.monotonic() >= next_at:
                nemesis.step()
                pause_s = nemesis.random.uniform(0.05, 0.5) * rarely
                next_at = time.monotonic() + pause_s

    def calm(self, nemesis: Nemesis) -> None:
        """All is as it was, also what could not be undone at its time."""
        nemesis.undo(all_of_them=True)
        self.own.start()
        self.ask("SET GLOBAL read_only = 0")
        self.ask("SET GLOBAL max_connections = 151")
        for number in range(nemesis.counts["veto"] + 1):
            self.ask(f"DROP TRIGGER IF EXISTS veto{number}")

    def test_whatever_dies_no_job_is_lost_and_none_runs_twice_at_once(self) -> None:
        self.set_up()
        self.workers = [self.begin(world) for world in self.worlds]
        nemesis, over = Nemesis(self, self.seed), threading.Event()
        drainer, connections = Drainer(self), ConnectionCount(self)
        pool = concurrent.futures.ThreadPoolExecutor()
        beside = [
            pool.submit(self.torment, nemesis, over),
            pool.submit(connections.watch, over),
        ]
        try:
            until, batch = time.monotonic() + self.seconds, 0
            while time.monotonic() < until:
                drainer.step()
                while nemesis.wanted:
                    self.enqueue_jobs(nemesis.wanted.pop(0), self.random)
                if self.behind() > 100:
                    over.wait(0.1)
                    continue
                self.enqueue_some(batch)
                batch += 1
        finally:
            over.set()
            pool.shutdown()
            self.calm(nemesis)
        for one in beside:
            one.result()  # or what went wrong in it
        verdict = Verdict(self, nemesis, drainer, connections)
        verdict.check()


class Verdict:
    """What the book, the tables and the logs say of a torture."""

    def __init__(
        self,
        case: Torture,
        nemesis: Nemesis,
        drainer: Drainer,
        connections: ConnectionCount,
    ) -> None:
        self.case, self.nemesis = case, nemesis
        self.drainer, self.connections = drainer, connections

    def check(self) -> None:
        """Each promise by itself, so that one that is broken hides no other."""
        case = self.case
        again = f"QUEUECTL_TORTURE={case.seconds:g} QUEUECTL_SEED={case.seed}"
        for promise in (
            self.all_end,
            self.all_stop,
            self.nothing_is_lost,
            self.none_overlap,
            self.first_come_is_first_served,
            self.time_limits_are_kept,
            self.none_living_is_declared_lost,
            self.no_worker_crashes,
            self.connections_are_few,
            self.drains_end_when_nothing_is_left,
            self.the_tables_agree,
            self.no_process_is_left,
        ):
            with case.subTest(again, promise=promise.__name__):
                promise()
        if self.nemesis.patient:
            print(
                f"{again}: {len(case.known)} jobs; faults: "
                f"{sum(self.nemesis.counts.values())} {dict(self.nemesis.counts)}; "
                f"at most {self.connections.most} connections; set aside: "
                f"{dict(self.nemesis.set_aside)}"
            )

    def all_end(self) -> None:
        ended = "('completed', 'dead', 'cancelled')"
        left = f"SELECT id, state, queue FROM jobs WHERE state NOT IN {ended}"
        try:
            self.case.wait_until(lambda: not self.case.ask(left), "all have ended", 60)
        except AssertionError:
            self.case.fail(f"these have not ended: {self.case.ask(left)[:20]}")

    def all_stop(self) -> None:
        for host in self.case.workers:
            with contextlib.suppress(ProcessLookupError):  # its status tells
                host.signal(signal.SIGTERM)
        for host in self.case.workers:
            self.case.assertEqual(host.wait(), 0, host.said()[-2000:])
            host.reader.join(5)  # what it said last

    def nothing_is_lost(self) -> None:
        found = [str(row[0]) for row in self.case.ask("SELECT id FROM jobs")]
        self.case.assertEqual(sorted(found), sorted(self.case.known))
        booked = [job for job in found if not job.startswith("fan")]
        ran = {line.split()[0] for line in self.case.lines("book")}
        self.case.assertLessEqual(ran, set(booked))
        self.case.assertGreater(len(ran), len(booked) * 0.9)

    def none_overlap(self) -> None:
        unexplained = []
        for line in self.case.lines("overlaps"):
            job, moment, *pids = line.split()
            at = float(moment)
            whose = [(int(pids[i]), int(pids[i + 1])) for i in (0, 2) if pids[i:]]
            why = [self.nemesis.disturbance(*one, at, at) for one in whose]
            # README: as long as a worker of its host is there to see it.
            older_killed = whose[1:] and whose[1][0] in self.nemesis.killed
            stuck = any(0 <= at - began <= 10 for began in self.nemesis.stranded)
            if job.startswith("hang") and older_killed and stuck:
                why.append("it survives KILL, and no worker of its host is left")
            if any(why):
                self.nemesis.set_aside[f"overlap: {max(why)}"] += 1
            else:
                unexplained.append(line)
        self.case.assertEqual(unexplained, [])

    def time_limits_are_kept(self) -> None:
        """Whatever hangs beside it, a run that has a limit ends there."""
        late: list[tuple[object, float]] = []
        for job, duration, finished in self.case.ask(
            "SELECT id, runs.duration, UNIX_TIMESTAMP(runs.finished_at) FROM runs "
            "JOIN jobs ON job_seq = seq WHERE queue = 'limited' AND "
            f"runs.duration > {LIMIT_S + LATE_S}"
        ):
            ended, lasted = float(str(finished)), float(str(duration))
            if self.nemesis.stopped_between(ended - lasted - 5, ended + 5):
                self.nemesis.set_aside["past its time limit: a worker stopped"] += 1
            else:
                late.append((job, lasted))
        self.case.assertEqual(late, [])

    def none_living_is_declared_lost(self) -> None:
        """By their own word; who was killed says nothing any more."""
        unexplained = []
        for host, pid, at in self.nemesis.lost:
            why = self.nemesis.disturbance(host, pid, at - LOST_AFTER_S, at)
            if why:
                self.nemesis.set_aside[f"declared lost: {why}"] += 1
            else:
                unexplained.append((host, pid, at))
        self.case.assertEqual(unexplained, [])

    def no_worker_crashes(self) -> None:
        """None ends but by the nemesis."""
        for host in self.case.all:
            self.case.assertNotIn("Traceback", host.said())
            ends = re.findall(r"worker process of .* ended: (.*)", host.said())
            # Where processes are limited, one that starts may get no thread.
            for _ in re.findall("no thread to spare", host.said()):
                ends.remove("exit status 70")
                self.nemesis.set_aside["a start: no thread to spare"] += 1
            self.case.assertEqual(set(ends) - {"signal 9"}, set(), host.said())
            self.case.assertLessEqual(len(ends), host.killed, host.said())

    def connections_are_few(self) -> None:
        too_many, count = self.connections.worst
        self.case.assertLessEqual(too_many, 0, f"{count} connections")

    def drains_end_when_nothing_is_left(self) -> None:
        if self.drainer.worker:
            self.drainer.worker.wait(60)
            self.drainer.judge(self.drainer.worker)
        if self.drainer.unable:
            why = "a drain: no server for 10 s when it began"
            self.nemesis.set_aside[why] += self.drainer.unable
        self.case.assertEqual(self.drainer.wrong, [])

    def first_come_is_first_served(self) -> None:
        """In its queue, no job first starts long after one that should follow it."""
        starts: dict[str, float] = {}
        for line in self.case.lines("book"):
            words = line.split()
            if words[2] == "start" and words[0] in self.case.ordered:
                starts.setdefault(words[0], float(words[3]))
        jobs = [
            (str(job), str(queue), int(str(priority)))
            for job, queue, priority in self.case.ask(
                "SELECT id, queue, priority FROM jobs ORDER BY seq DESC"
            )
            if job in starts
        ]
        excused, late = self.excused(), []
        follower: dict[tuple[str, int], float] = {}  # the first start of a later one
        for job, queue, priority in jobs:
            first = min(
                follower.get((queue, lower), math.inf) for lower in range(priority + 1)
            )
            follower[queue, priority] = min(
                starts[job], follower.get((queue, priority), math.inf)
            )
            if starts[job] > first + OVERTAKEN_S:
                if job in excused:
                    self.nemesis.set_aside[f"overtaken: {excused[job]}"] += 1
                else:
                    late.append((job, queue, priority, starts[job] - first))
        self.case.assertEqual(late, [])

    def excused(self) -> dict[str, str]:
        """The jobs that may start late, and why."""
        return {
            **dict.fromkeys(self.nemesis.locked, "a stranger locked its row"),
            **{
                str(job): str(reason)
                for job, reason in self.case.ask(
                    "SELECT DISTINCT id, runs.reason FROM runs JOIN jobs "
                    "ON job_seq = seq WHERE runs.reason "
                    "IN ('lost', 'handed back', 'spawn', 'refused')"
                )
            },
        }

    def the_tables_agree(self) -> None:
        ask, assert_equal = self.case.ask, self.case.assertEqual
        assert_equal(
            ask(
                "SELECT id, runs, COUNT(run), COUNT(runs.finished_at) FROM jobs LEFT "
                "JOIN runs ON job_seq = seq "
                # Of a refused row's last run there is no history.
                "WHERE NOT jobs.reason <=> 'refused' GROUP BY id, runs "
                "HAVING COUNT(run) <> runs OR COUNT(runs.finished_at) <> runs"
            ),
            [],
        )
        assert_equal(
            ask("SELECT id FROM jobs WHERE state = 'dead' ORDER BY id"),
            ask("SELECT id FROM dlq ORDER BY id"),
        )
        assert_equal(ask("SELECT id FROM workers WHERE lost_at IS NULL"), [])

    def no_process_is_left(self) -> None:
        self.case.wait_until(lambda: not self.case.living(), "no process is left")


class Daemon(WorkCase):
    """The PID file, the log, and what keeps worker processes up."""

    def daemon(self, *argv: str) -> int:
        """The PID of a new daemon, as its PID file has it."""
        self.queuectl("worker", "start", "--daemon", *argv)
        return int(self.lines("workers.pid")[0])

    def wait_gone(self, *pids: int) -> None:
        self.wait_until(lambda: not any(map(alive, pids)), "they are gone")

    def test_one_of_eight_racing_daemons_wins(self) -> None:
        racers = [self.start("worker", "start", "--daemon") for _ in range(8)]
        self.assertEqual(sorted(one.wait() for one in racers), [0] + [1] * 7)
        [winner] = [one for one in racers if one.process.returncode == 0]
        pid = int(self.lines("workers.pid")[0])
        self.assertIn(f"PID {pid} ", winner.said())
        self.assertTrue(alive(pid))
        self.assertEqual(self.sql("SELECT DISTINCT supervisor FROM workers"), [(pid,)])
        for one in racers:
            if one is not winner:
                self.assertIn(str(pid), one.said())
        self.queuectl("worker", "stop")
        self.wait_gone(pid)

    def test_a_stranger_named_by_a_pid_file_that_another_holds_is_not_signalled(
        self,
    ) -> None:
        stranger = subprocess.Popen(["sleep", "60"])
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        cases = ((stranger.pid, "nothing was signalled"), (0, "no process"))
        for number, message in cases:
            with open(self.path("workers.pid"), "w") as file:
                file.write(f"{number}\n")
                file.flush()
                fcntl.flock(file, fcntl.LOCK_EX)
                self.queuectl("worker", "stop", status=1)
            self.assertIn(message, self.errors)
        self.assertIsNone(stranger.poll())

    def test_a_stranger_named_by_a_stale_pid_file_is_not_signalled(self) -> None:
        stranger = subprocess.Popen(["sleep", "60"])
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        with open(self.path("workers.pid"), "w") as file:
            file.write(f"{stranger.pid}\n")
        self.queuectl("worker", "stop")
        self.assertIn("stale", self.errors)
        self.queuectl("worker", "stop", "--now")
        self.assertNotEqual(self.daemon(), stranger.pid)
        self.queuectl("worker", "stop")
        self.assertIsNone(stranger.poll())
        self.assertFalse(os.path.exists(self.path("workers.pid")))
        self.queuectl("worker", "stop")
        self.assertIn("no PID file", self.errors)

    def test_the_start_of_a_daemon_returns_and_lets_go_of_its_callers_streams(
        self,
    ) -> None:
        done = subprocess.run(
            [
                "sh",
                "-c",
                'umask 027; out=$("$@"); echo "$?,$out"',
                "sh",
                sys.executable,
                SCRIPT,
                "worker",
                "start",
                "--daemon",
            ],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            timeout=10,
            check=True,
        )
        self.assertEqual(done.stdout, b"0,\n")
        pid = int(self.lines("workers.pid")[0])
        for one in (pid, *descendants(pid)):
            self.assertEqual(
                [os.readlink(f"/proc/{one}/fd/{number}") for number in range(3)],
                [os.devnull] + [self.path("workers.log")] * 2,
            )
        job = self.put("umask; pwd")
        self.wait_state(job, State.COMPLETED)
        self.assertEqual(
            self.runs(job, "output"), [(f"0027\n{self.folder}\n".encode(),)]
        )
        os.kill(pid, signal.SIGTERM)
        self.wait_gone(pid)
        self.assertFalse(os.path.exists(self.path("workers.pid")))
        self.assertIn("stopped", self.lines("workers.log")[-1])

    def test_status_tells_a_live_daemon_from_a_killed_one(self) -> None:
        self.assertIn("No worker PID file at ./workers.pid\n", self.queuectl("status"))
        pid = self.daemon("--count", "3")
        self.assertIn(
            f"Worker PID file found at ./workers.pid\n{pid}\n"
            "is the PID of the daemon's supervisor, ",
            self.queuectl("status"),
        )
        self.assertEqual(
            json.loads(self.queuectl("status", "--json"))["daemon"],
            {"pid_file": "./workers.pid", "pid": pid, "alive": True},
        )
        self.assertEqual(
            self.queuectl("worker", "list").splitlines()[-1], "3 slots on 1 host"
        )
        rows = [
            json.loads(line)
            for line in self.queuectl("worker", "list", "--json").splitlines()
        ]
        self.assertEqual(
            list(rows[0]), "id host pid slots busy queues heartbeat_at state".split()
        )
        self.assertEqual({row["pid"] for row in rows}, set(descendants(pid)))
        self.assertEqual(sum(row["slots"] for row in rows), 3)
        self.queuectl("worker", "start", "--daemon", status=1)
        kill_all([pid, *descendants(pid)])
        self.wait_gone(pid)
        self.assertIn(
            "found at ./workers.pid (stale, no daemon holds it)\n",
            self.queuectl("status"),
        )
        self.assertNotEqual(self.daemon(), pid)

    def test_a_killed_worker_process_is_replaced(self) -> None:
        worker = self.worker("--count", "2")
        before = worker.children()
        os.kill(before[0], signal.SIGKILL)
        self.wait_until(
            lambda: (
                len(worker.children()) == len(before)
                and before[0] not in worker.children()
            ),
            "another is there",
            2,
        )
        self.put_many(4, "true")
        self.wait_ended(4)

    def test_stop_waits_says_for_what_and_can_run_out_of_time(self) -> None:
        job = self.put("echo > started; sleep 60")
        pid = self.daemon()
        self.wait_lines("started", 1)
        self.queuectl("worker", "stop", "--timeout", "1.5s", status=124)
        self.assertIn(f"waiting for {job}", self.errors)
        self.assertTrue(alive(pid))
        started = time.monotonic()
        self.queuectl("worker", "stop", "--now")
        self.assertLess(time.monotonic() - started, 4)
        self.assertFalse(alive(pid))
        self.assertEqual(self.job(job, "state", "attempts"), ("pending", 0))
        self.assertEqual(self.reasons(job), ["handed back"])

    def test_a_daemon_without_its_tables_fails_and_says_why(self) -> None:
        self.queuectl("worker", "start", "--daemon", status=69, DB_NAME="nowhere")
        self.assertIn("db init", self.errors)
        self.assertIn("No worker PID file", self.queuectl("status"))

    def test_a_log_of_ten_megabytes_is_set_aside(self) -> None:
        with open(self.path("workers.log"), "wb") as file:
            file.write(b"x\n" * (5 << 20) + b"end\n")
        self.daemon("--count", "2")
        self.queuectl("worker", "stop")
        self.assertGreaterEqual(os.path.getsize(self.path("workers.log.1")), 10 << 20)
        self.assertIn("ready, serving", self.lines("workers.log")[0])
        self.assertIn("stopped", self.lines("workers.log")[-1])

    def test_hup_has_a_daemon_write_to_a_new_log(self) -> None:
        pid = self.daemon()
        os.rename(self.path("workers.log"), self.path("old.log"))
        os.kill(pid, signal.SIGHUP)
        self.wait_lines("workers.log", 1, 5)


class Dependencies(WorkCase):
    """Jobs that wait for other jobs: none is forgotten, none runs too early."""

    def chain(self, count: int, command: str, **first: object) -> None:
        """Jobs c0, c1, …, each waiting for the one before."""
        jobs: list[dict[str, object]] = [{"id": "c0", "command": command, **first}]
        for at in range(1, count):
            jobs.append({"id": f"c{at}", "command": command, "after": [f"c{at - 1}"]})
        lines = "\n".join(map(json.dumps, jobs))
        self.queuectl("enqueue", "-q", "-f", "-", stdin=lines.encode())

    def test_a_job_runs_once_all_that_it_waits_for_completed(self) -> None:
        self.enqueue("sleep 0.2; echo a >> ran", id="a")
        self.enqueue("echo b >> ran; exit 3", id="b", max_retries=0)
        self.enqueue("echo c >> ran", id="c", after=["a"], after_any=["b"])
        self.queuectl("enqueue", "-c", "echo d >> ran", "--after", "c", "--after", "a")
        self.assertEqual(self.show("c")["after"], ["a", "b"])
        self.assert_state("c", State.BLOCKED)
        self.drain("--count", "4")
        self.assertEqual(sorted(self.lines("ran")[:2]), ["a", "b"])
        self.assertEqual(self.lines("ran")[2:], ["c", "d"])

    def test_two_parents_settled_at_once_on_a_server_without_read_committed(
        self,
    ) -> None:
        """As where binlog_format is STATEMENT: a transaction's snapshot is older."""
        for parent in ("a", "b"):
            self.enqueue("true", id=parent)
        self.enqueue("true", id="c", after=["a", "b"])
        both = [self.turns(), self.turns()]
        ended = []
        for turns in both:
            turns.database.read_committed = False
            turns.database.close()  # the next session is of the other kind
            [job] = turns.take(queuectl.TurnRequest(free=1, look=True)).jobs
            ended.append((job.claim, queuectl.RunOutcome(queuectl.Reason.EXIT, 0)))
        first, second = both
        raise_heartbeat = first._raise_heartbeat

        def while_the_other_settles(cursor: queuectl.Cursor, state: str) -> bool:
            alive: bool = raise_heartbeat(cursor, state)
            second.take(queuectl.TurnRequest([ended[1]]))
            return alive

        with unittest.mock.patch.object(
            first, "_raise_heartbeat", while_the_other_settles
        ):
            first.take(queuectl.TurnRequest([ended[0]]))
        self.assert_state("c", State.PENDING)

    def test_a_job_whose_parents_are_done_waits_for_its_time_alone(self) -> None:
        self.enqueue("true", id="a")
        self.enqueue("true", id="later", after=["a"], delay="1h")
        self.drain()
        self.assert_state("later", State.SCHEDULED)
        self.enqueue("true", id="now", after=["a"])
        self.enqueue("true", id="too", after=["a"], delay="1h")
        self.assert_state("now", State.PENDING)
        self.assert_state("too", State.SCHEDULED)

    def test_a_job_cannot_wait_for_what_is_not_there_before_it(self) -> None:
        self.enqueue("true", id="a")
        for job in (
            {"id": "x", "after": ["absent"]},
            {"id": "x", "after": ["x"]},
            {"id": "x", "after_any": ["a", "y"]},
        ):
            both = [{"command": "true", **job}, {"command": "true", "id": "y"}]
            self.queuectl("enqueue", json.dumps(both), status=2)
            self.assertRegex(self.errors, "job x cannot wait for (absent|x|y)")
        bad: list[object] = ["a b", [1], [["a"]], {}, "[", [""]]
        for after in bad:
            self.queuectl(
                "enqueue", json.dumps({"command": "true", "after": after}), status=2
            )
            self.assertIn("after: expected a list of job ids", self.errors)
        self.assertEqual(self.sql("SELECT id FROM jobs"), [("a",)])
        self.assertEqual(self.sql("SELECT * FROM dependencies"), [])

    def test_what_can_never_run_dies_at_once_down_a_chain_of_a_thousand(self) -> None:
        self.chain(1000, "exit 3", max_retries=0)
        self.drain()
        self.assertEqual(self.counts(), {"dead": 1000})
        self.assertEqual(
            self.sql("SELECT reason, COUNT(*) FROM dlq GROUP BY reason ORDER BY 2"),
            [("exit", 1), ("dependency", 999)],
        )
        self.enqueue("true", id="late", after=["c999"])
        self.assert_state("late", State.DEAD)
        self.assertIn("dead: waited for c999, which was dead", self.explain("late"))
        self.queuectl("cancel", self.enqueue("true", id="p"))
        self.enqueue("true", id="any", after_any=["p"])
        self.enqueue("true", id="all", after=["p"])
        self.assert_state("any", State.PENDING)
        self.assert_state("all", State.DEAD)

    def explain(self, job_id: str) -> str:
        return self.queuectl("explain", job_id)

    def runs_in_its_order(self, length: int) -> None:
        self.chain(length, "echo $QUEUECTL_JOB_ID >> ran")
        self.drain("--count", "4")
        self.assertEqual(self.lines("ran"), [f"c{at}" for at in range(length)])

    def test_a_chain_runs_in_its_order(self) -> None:
        self.runs_in_its_order(200)

    @slow
    def test_a_chain_of_a_thousand_runs_in_its_order(self) -> None:
        self.runs_in_its_order(1000)

    def test_a_fan_in_of_a_thousand_runs_once_after_all(self) -> None:
        ids = [f"p{at}" for at in range(1000)]
        lines = [{"id": one, "command": "echo $QUEUECTL_JOB_ID >> ran"} for one in ids]
        last = {"id": "last", "command": "echo last >> ran", "after": ids}
        both = "\n".join(map(json.dumps, [*lines, last]))
        self.queuectl("enqueue", "-q", "-f", "-", stdin=both.encode())
        drains = [
            self.start("worker", "start", "--drain", "--count", "8") for _ in range(2)
        ]
        for one in drains:
            self.assertEqual(one.wait(60), 0, one.said())
        self.assertEqual(self.lines("ran")[1000:], ["last"])

    def test_no_wake_up_is_lost_when_parents_end_while_children_come(self) -> None:
        """Settles race with each other and with enqueues: nothing stays blocked."""
        self.worker("--count", "8")
        self.worker("--count", "8")
        for round_ in range(8):
            parents = [f"p{round_}.{at}" for at in range(12)]
            lines = [{"id": one, "command": "sleep 0.05"} for one in parents]
            self.queuectl(
                "enqueue",
                "-q",
                "-f",
                "-",
                stdin="\n".join(map(json.dumps, lines)).encode(),
            )
            children = [
                {"id": f"k{round_}.{at}", "command": "true", "after": parents[at:]}
                for at in range(12)
            ]
            self.queuectl("enqueue", "-q", json.dumps(children))
        self.wait_until(lambda: self.counts() == {"completed": 192}, "all are done")
        # None of them needed the net: that looks every ten heartbeats only.
        self.assertEqual(self.sql("SELECT COUNT(*) FROM dlq"), [(0,)])

    def test_blocked_jobs_are_decided_again_now_and_then(self) -> None:
        self.enqueue("true", id="a")
        self.enqueue("echo ran >> ran", id="b", after=["a"])
        self.sql("UPDATE jobs SET state = 'completed' WHERE id = 'a'")  # tells nobody
        self.worker()
        self.wait_state("b", State.COMPLETED)

    def settle_parent(self, turns: queuectl.TurnTaker) -> queuectl.Resolution:
        """What the settlement of the one job that can run leaves of its dependents."""
        [job] = turns.take(queuectl.TurnRequest(free=1, look=True)).jobs
        outcome = queuectl.RunOutcome(queuectl.Reason.EXIT, 0)
        settlement = queuectl.decide_settlement(job.claim, outcome, turns.settings)
        found: queuectl.Resolution = turns.database.transact(
            lambda cursor: queuectl.settle(cursor, 1 << 20, [settlement])
        )
        return found

    def fan_out(self, count: int, **parent: object) -> str:
        """The id of a job for which so many others wait."""
        job_id = self.put("true", has_children=1, **parent)
        self.put_many(count, "true", state="blocked")
        self.sql(
            "INSERT INTO dependencies (parent, child) SELECT parents.seq, jobs.seq "
            "FROM jobs AS parents JOIN jobs ON jobs.state = 'blocked' "
            "WHERE parents.id = %s",
            job_id,
        )
        return job_id

    def test_a_crash_amid_many_dependents_is_made_good_and_drain_waits(self) -> None:
        self.fan_out(1700)
        turns = self.turns()
        self.settle_parent(turns)  # and what it has left goes with its worker
        counts = self.counts()
        self.assertEqual(counts.pop("completed"), 1)
        self.assertEqual(counts, {"pending": 500, "blocked": 1200})
        self.sql("UPDATE jobs SET state = 'completed' WHERE state = 'pending'")
        database = self.reach()
        self.assertFalse(database.read(lambda cursor: queuectl.is_drained(cursor, ())))
        other = self.turns()
        other.after.purges = True
        other.take(queuectl.TurnRequest(look=True))
        self.assertEqual(self.counts(), {"completed": 501, "pending": 1200})

    def test_of_many_dependents_those_that_others_hold_are_not_waited_for(self) -> None:
        self.fan_out(1200)
        turns = self.turns()
        resolver = queuectl.DependentsResolver(turns.database)
        resolver.add(self.settle_parent(turns))
        [[last]] = self.sql("SELECT MAX(seq) FROM jobs")
        with self.locked("SELECT 1 FROM jobs WHERE seq = %s FOR UPDATE", last):
            began = time.monotonic()
            resolver.run(20)
            self.assertLess(time.monotonic() - began, 2)
            self.assertEqual(
                self.counts(), {"completed": 1, "pending": 1199, "blocked": 1}
            )
        self.wait_until(
            lambda: resolver.run(1) or self.counts().get("blocked") is None,
            "the last one is released",
        )

    def test_who_cancels_the_parent_of_many_ends_them_all(self) -> None:
        self.queuectl("cancel", self.fan_out(1200))
        self.assertEqual(self.counts(), {"cancelled": 1, "dead": 1200})

    def test_the_net_waits_for_no_strangers_lock(self) -> None:
        """With SKIP LOCKED, and on a server that does not know it."""
        for skip_locked in ("SKIP LOCKED", ""):
            self.sql("DELETE FROM jobs")
            self.fan_out(2, state="completed")
            ids = self.sql("SELECT id FROM jobs WHERE state = 'blocked'")
            held, other = (str(one) for [one] in ids)
            turns = self.turns()
            turns.after.purges = True
            turns.database.read(turns.database.skip_locked)
            turns.database._skip_locked = skip_locked
            with self.locked("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", held):
                began = time.monotonic()
                turns.take(queuectl.TurnRequest(look=True))
                self.assertLess(time.monotonic() - began, 2)
                self.assert_state(held, State.BLOCKED)
                self.assert_state(other, State.PENDING)
            look = functools.partial(turns.take, queuectl.TurnRequest(look=True))
            self.wait_until(
                lambda: look() and self.state(held) == State.PENDING, "it is released"
            )

    def test_dependents_come_back_with_their_parent_if_asked(self) -> None:
        self.chain(3, "test -e ok", max_retries=0)
        self.drain()
        self.assertEqual(self.counts(), {"dead": 3})
        self.queuectl("dlq", "retry", "c1", status=1)
        self.assertIn("job c1 waits for c0, which is dead", self.errors)
        self.queuectl("dlq", "retry", "c0")
        self.assertEqual(self.counts(), {"pending": 1, "dead": 2})
        self.drain()
        open(self.path("ok"), "w").close()
        self.queuectl("dlq", "retry", "c0", "--dependents")
        self.assertEqual(self.counts(), {"pending": 1, "blocked": 2})
        self.assertEqual(self.job("c2", "attempts", "max_attempts"), (0, None))
        self.drain()
        self.assertEqual(self.counts(), {"completed": 3})

    def test_a_child_that_is_revived_while_its_parent_settles_is_not_forgotten(
        self,
    ) -> None:
        self.chain(2, "exit 3", max_retries=0)
        self.drain()
        self.queuectl("dlq", "retry", "c0")
        turns = self.turns()
        [job] = turns.take(queuectl.TurnRequest(free=1, look=True)).jobs
        store = queuectl.JobStore(self.reach(), turns.settings)
        revive = functools.partial(store.revive, "c1", "revive")
        release = turns._release
        # The server's table of lock waits is stale where it is asked often.
        waiting = (
            "SELECT 1 FROM information_schema.processlist "
            "WHERE info LIKE 'SELECT seq FROM jobs%SHARE MODE'"
        )

        def while_another_revives(*arguments: object) -> float:
            """Goes on once the other is done, or waits for us."""
            revived.append(pool.submit(revive))
            self.wait_until(
                lambda: revived[0].done() or self.sql(waiting), "it is done, or waits"
            )
            return release(*arguments)

        revived: list[concurrent.futures.Future[queuectl.ActionResult]] = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with unittest.mock.patch.object(turns, "_release", while_another_revives):
                outcome = queuectl.RunOutcome(queuectl.Reason.EXIT, 0)
                turns.take(queuectl.TurnRequest([(job.claim, outcome)]))
            self.assertTrue(revived[0].result(20).ok)
        self.assert_state("c0", State.COMPLETED)
        self.assert_state("c1", State.PENDING)

    def test_a_dead_end_names_its_root_and_what_brings_all_back(self) -> None:
        self.chain(4, "test -e ok", max_retries=0)
        self.enqueue("true", id="other")
        self.enqueue("true", id="end", after=["c3", "other"])
        self.queuectl("cancel", "other")
        worker = self.worker()
        self.wait_state("end", State.DEAD)
        self.wait_state("c3", State.DEAD)
        self.wait_until(
            lambda: self.has_said(
                worker, "job c3: waited for c2, which was dead: dead"
            ),
            "the log tells of it",
        )
        self.queuectl("dlq", "retry", "c2", status=1)
        self.assertIn("dlq retry c0 --dependents brings all back", self.errors)
        self.assertIn("goes back to c0 (exit 1), ", self.explain("c3"))
        why = self.explain("end")
        self.assertIn("goes back to other (cancelled), c0 (exit 1), ", why)
        command = why.strip().rpartition("put all back: queuectl ")[2]
        self.assertEqual(command, "dlq retry other c0 --dependents")
        open(self.path("ok"), "w").close()
        self.queuectl(*command.split())
        self.wait_until(lambda: self.counts() == {"completed": 6}, "all are done")

    def test_drain_waits_for_what_waits_for_a_job_that_is_there(self) -> None:
        self.enqueue("true", id="a", delay="1")
        self.enqueue("true", id="b", after=["a"])
        self.enqueue("true", id="else", queue="other", delay="1h")
        self.enqueue("true", id="c", after=["else"])
        self.drain("--queue", "default")
        self.assertEqual(self.counts(), {"completed": 2, "scheduled": 1, "blocked": 1})

    def test_a_parent_of_a_blocked_job_is_not_purged(self) -> None:
        self.enqueue("true", id="a")
        self.drain()
        self.enqueue("true", id="late", delay="1h")
        self.enqueue("true", id="b", after=["a", "late"])
        self.queuectl("purge", "--state", "completed")
        self.assert_state("a", State.COMPLETED)
        self.queuectl("cancel", "late")
        self.assert_state("b", State.DEAD)
        self.queuectl("purge", "--state", "completed")
        self.assert_state("a", "absent")

    def test_a_command_for_failure_runs_as_an_ordinary_job(self) -> None:
        told = "env | grep QUEUECTL_PARENT | sort > told; echo $MINE >> told"
        self.enqueue(
            "echo broke; exit 3",
            id="a",
            max_retries=1,
            on_failure=told,
            env={"MINE": "its own"},
            queue="etl",
        )
        self.enqueue("true", id="b", after=["a"], on_failure="echo b >> died")
        self.enqueue("true", id="c", on_failure="echo c >> died")
        self.drain()
        self.assertEqual(
            self.lines("told"),
            [
                "QUEUECTL_PARENT_ATTEMPTS=2",
                "QUEUECTL_PARENT_EXIT_CODE=3",
                "QUEUECTL_PARENT_ID=a",
                "QUEUECTL_PARENT_LAST_LINE=broke",
                "QUEUECTL_PARENT_QUEUE=etl",
                "QUEUECTL_PARENT_REASON=exit",
                "its own",
            ],
        )
        self.assertEqual(self.lines("died"), ["b"])
        self.assertEqual(
            self.sql("SELECT queue FROM jobs WHERE command = %s", told), [("etl",)]
        )

    def test_a_nul_in_the_last_line_does_not_keep_that_command_from_running(
        self,
    ) -> None:
        told = 'echo "$QUEUECTL_PARENT_LAST_LINE" > told'
        self.enqueue(
            "printf 'broke\\0off\\n\\0\\0'; exit 3", max_retries=0, on_failure=told
        )
        self.drain()
        self.assertEqual(self.lines("told"), ["brokeoff"])
        self.assertEqual(self.sql("SELECT last_line FROM dlq"), [("brokeoff",)])


class QueueLimits(WorkCase):
    """Queues that are limited or paused, over all supervisors."""

    counted = (
        'flock count sh -c "echo + $QUEUECTL_JOB_ID >> count"; sleep 0.1; '
        'flock count sh -c "echo - $QUEUECTL_JOB_ID >> count"'
    )

    def most(self) -> int:
        """How many jobs ran at once, by their own count.

        One that was ended with its killed worker did not count itself out, and is
        left out.
        """
        lines = [line.split() for line in self.lines("count")]
        whole = {job for sign, job in lines if sign == "-"}
        running = most = 0
        for sign, job in lines:
            if job in whole:
                running += 1 if sign == "+" else -1
                most = max(most, running)
        return most

    def test_a_limit_holds_over_all_supervisors_and_through_a_crash(self) -> None:
        self.queuectl("queue", "limit", "video", "2")
        self.put_many(80, self.counted, queue="video", on_lost="dead")
        self.put_many(10, "sleep 0.1; echo >> others")
        workers = [self.worker("--count", "8") for _ in range(3)]
        self.wait_lines("others", 10)
        self.wait_lines("count", 20)
        os.kill(workers[0].children()[0], signal.SIGKILL)
        self.wait_until(
            lambda: set(self.counts()) <= {"completed", "dead"}, "all have ended"
        )
        self.assertEqual(self.most(), 2)
        self.assertLessEqual(int(str(self.counts().get("dead", 0))), 2)

    def test_without_skip_locked_a_limit_holds_too(self) -> None:
        self.queuectl("queue", "limit", "default", "2")
        self.put_many(30, self.counted)
        drains = [
            self.start(
                "worker", "start", "--drain", "--count=4", QUEUECTL_SKIP_LOCKED="off"
            )
            for _ in range(2)
        ]
        for one in drains:
            self.assertEqual(one.wait(60), 0, one.said())
        self.assertEqual(self.most(), 2)

    def test_a_paused_queue_starts_nothing_until_it_is_resumed(self) -> None:
        self.queuectl("queue", "pause", "etl")
        job_id = self.enqueue("true", queue="etl")
        self.drain()  # a paused queue is not waited for
        self.assert_state(job_id, State.PENDING)
        self.assertIn("queue `etl` paused", self.queuectl("explain", job_id))
        self.worker()
        self.wait_state(self.enqueue("true"), State.COMPLETED)
        self.assert_state(job_id, State.PENDING)
        self.queuectl("queue", "resume", "etl")
        self.wait_state(job_id, State.COMPLETED, 5)

    def test_queues_are_listed_with_limit_depth_and_pace(self) -> None:
        self.queuectl("queue", "limit", "video", "2")
        self.queuectl("queue", "pause", "mail")
        self.queuectl("queue", "limit", "none", "0")
        self.put_many(3, "true", queue="etl")
        self.drain("--queue", "etl")
        self.put_many(2, "true", queue="etl")
        rows = map(json.loads, self.queuectl("queue", "list", "--json").splitlines())
        found = {row["queue"]: row for row in rows}
        self.assertEqual(
            {
                name: (row["depth"], row["running"], row["limit"], row["paused"])
                for name, row in found.items()
            },
            {
                "etl": (2, 0, None, False),
                "mail": (0, 0, None, True),
                "none": (0, 0, 0, False),
                "video": (0, 0, 2, False),
            },
        )
        self.assertEqual(found["etl"]["rate"], 3)
        self.assertIsNotNone(found["etl"]["oldest_waiting"])
        self.queuectl("queue", "limit", "video", "none")
        self.assertNotIn("video", self.queuectl("queue", "list"))
        for argv in (["limit", "x", "-1"], ["limit", "x", "many"], ["pause", "a b"]):
            self.queuectl("queue", *argv, status=2)


class OneJob(WorkCase):
    """One job's life from the shell."""

    def test_run_shows_the_output_and_leaves_with_the_exit_status(self) -> None:
        self.worker("--count", "2", QUEUECTL_POLL_INTERVAL="1")
        for argv, status, output in (
            (["--", "sh", "-c", "echo out; exit 7"], 7, "out\n"),
            (["-c", "echo $0; pwd"], 0, f"/bin/sh\n{os.path.realpath(self.folder)}\n"),
            (["-c", "kill -9 $$"], 137, ""),
            (["--timeout", "0.2", "-c", "sleep 9"], 124, ""),
            (["--cwd", "/absent", "-c", "true"], 1, ""),
            (["--max-retries=1", "-c", "echo try; exit 2"], 2, "try\ntry\n"),
        ):
            with self.subTest(argv):
                self.assertEqual(self.queuectl("run", *argv, status=status), output)
                said = status not in (0, 2, 7)
                self.assertEqual(self.errors.startswith("queuectl: job "), said)
        for argv in ([], ["-c", "a", "--", "b"], ["-c", ""]):
            self.queuectl("run", *argv, status=2)

    def test_run_and_logs_lose_no_line_within_the_limit_between_two_flushes(
        self,
    ) -> None:
        self.worker()
        numbers = "".join(f"{n}\n" for n in range(1, 10001))
        burst = "seq 10000 | sed 's/^/line /'"
        followed = self.queuectl("run", "-c", burst)
        self.assertEqual(followed.replace("line ", ""), numbers)
        job_id = self.enqueue("for n in 1 2 3; do seq 10000; sleep 1.1; done")
        self.wait_state(job_id, State.PROCESSING)
        self.assertEqual(self.queuectl("logs", "-f", job_id), numbers * 3)

    def test_a_follower_that_stands_still_at_the_end_of_its_job_loses_no_line(
        self,
    ) -> None:
        worker = self.worker()
        command = "echo > started; until [ -e go ]; do sleep 0.02; done; seq 40000"
        run = self.start("run", "-c", command)
        self.wait_lines("started", 1)
        run.signal(signal.SIGSTOP)
        open(self.path("go"), "w").close()
        self.wait_until(lambda: self.counts() == {"completed": 1}, "its job has ended")
        began = time.monotonic()
        self.wait_until(lambda: time.monotonic() - began > 0.5, "it is late")
        run.signal(signal.SIGCONT)
        self.assertEqual(run.wait(), 0, run.said())
        self.assertEqual(run.said(), "".join(f"{n}\n" for n in range(1, 40001)))
        # Nobody needs that much for long: a worker that stops trims it.
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)
        self.assertEqual(self.sql("SELECT LENGTH(output) FROM runs"), [(65536,)])

    def test_what_is_kept_for_followers_is_trimmed_after_a_while(self) -> None:
        self.script = self.path("soon.py")
        with open(self.script, "w") as file:
            file.write(
                f"import sys; sys.path[0] = {HERE!r}; import queuectl\n"
                "queuectl.FOLLOWED_S = 1.0; sys.exit(queuectl.main())\n"
            )
        self.worker(QUEUECTL_OUTPUT_LIMIT="1000")
        job_id = self.enqueue("seq 2000")
        self.wait_state(job_id, State.COMPLETED)
        size = "SELECT LENGTH(output) FROM runs"
        self.assertEqual(self.sql(size), [(4500,)])
        self.wait_until(lambda: self.sql(size) == [(1000,)], "it is trimmed")
        kept = self.queuectl("logs", job_id)
        self.assertTrue(kept.startswith("1\n2\n") and kept.endswith("\n1999\n2000\n"))
        self.assertIn("[queuectl: 8893 bytes in all, the middle is left out]", kept)

    def test_run_puts_no_mark_into_a_file_and_tells_of_a_cut_by_its_status(
        self,
    ) -> None:
        self.worker()
        cut = self.queuectl("run", "-c", "seq 100000", status=74)
        found = re.search(r": ([0-9,]+) bytes of its output are left out", self.errors)
        assert found, self.errors
        missing = int(found[1].replace(",", ""))
        self.assertEqual(len(cut) + missing, 588895)
        whole = "".join(f"{n}\n" for n in range(1, 100001))
        head = os.path.commonprefix([cut, whole])
        self.assertTrue(whole.endswith(cut[len(head) :]))
        # A status of its own says more.
        self.queuectl("run", "-c", "seq 100000; exit 3", status=3)
        self.assertIn("bytes of its output are left out", self.errors)
        # A terminal shows where.
        shown = self.on_terminal("run", "-c", "seq 100000")
        self.assertIn("bytes are left out here]", shown)

    def on_terminal(self, *argv: str) -> str:
        """Run a command on a terminal of its own; what is shown there."""
        upper, lower = os.openpty()
        process = subprocess.Popen(
            [sys.executable, self.script, *argv],
            cwd=self.folder,
            stdin=lower,
            stdout=lower,
            stderr=lower,
            start_new_session=True,
            env=self.environment,
        )
        os.close(lower)
        shown = b""
        # Once nobody has the lower end, the upper one fails.
        with contextlib.suppress(OSError):
            while data := os.read(upper, 65536):
                shown += data
        os.close(upper)
        self.assertEqual(process.wait(), 0, shown)
        return shown.decode()

    def test_ctrl_c_term_and_hup_in_run_end_the_job_wherever_it_runs(self) -> None:
        self.worker("--count", "3")
        statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
        runs = {}
        for number in statuses:
            command = f"echo $$ > pid.{number}; exec sleep 60"
            runs[number] = self.start("run", "-c", command)
        for number, status in statuses.items():
            with self.subTest(number):
                [pid] = map(int, self.wait_lines(f"pid.{number}", 1))
                run = runs[number]
                run.signal(number)
                self.assertEqual(run.wait(), status, run.said())
                self.assertFalse(alive(pid))
        self.assertEqual(self.counts(), {"cancelled": 3})

    def test_run_cancels_its_job_when_its_terminal_goes_away(self) -> None:
        self.worker()
        upper, lower = os.openpty()
        setsid = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        command = "echo >> started; while sleep 0.05; do echo line; done"
        run = subprocess.Popen(
            [sys.executable, "-c", f"{setsid} os.execv(sys.argv[1], sys.argv[1:])"]
            + [sys.executable, self.script, "run", "-c", command],
            cwd=self.folder,
            stdin=lower,
            stdout=lower,
            stderr=lower,
            start_new_session=True,
            env=self.environment,
        )
        self.addCleanup(run.kill)
        os.close(lower)
        self.wait_lines("started", 1)
        os.close(upper)
        self.assertEqual(run.wait(20), 129)
        self.assertEqual(self.counts(), {"cancelled": 1})

    def test_run_cancels_its_job_once_nobody_reads_its_output(self) -> None:
        self.worker()
        run = subprocess.Popen(
            [sys.executable, self.script, "run", "-c"]
            + ["echo first; while sleep 0.05; do echo more; done"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        self.addCleanup(run.kill)
        assert run.stdout
        self.assertEqual(run.stdout.readline(), b"first\n")
        run.stdout.close()
        run.wait(20)
        self.assertEqual(self.counts(), {"cancelled": 1})

    def test_run_enqueues_nothing_that_its_account_could_not_follow(self) -> None:
        self.sql("CREATE USER IF NOT EXISTS blind IDENTIFIED BY %s", self.password)
        self.addCleanup(self.sql, "DROP USER blind")
        self.sql("GRANT SELECT, INSERT, UPDATE ON queuectl.jobs TO blind")
        for table in ("config", "dependencies", "dlq"):
            self.sql(f"GRANT SELECT, UPDATE ON queuectl.{table} TO blind")
        self.queuectl("run", "-c", "true", status=69, DB_USER="blind")
        self.assertRegex(self.errors, r"nothing was enqueued.*\bruns\b")
        self.assertEqual(self.counts(), {})

    def test_run_says_why_its_job_does_not_start(self) -> None:
        run = self.start("run", "--queue", "gpu", "-c", "true")
        self.wait_until(lambda: "no live worker serves" in run.said(), "it says why")
        self.worker("--queue", "gpu")
        self.assertEqual(run.wait(), 0)

    def test_logs_of_each_run_can_be_had(self) -> None:
        job_id = self.enqueue("echo $QUEUECTL_ATTEMPT; exit 1", max_retries=2)
        self.drain()
        for argv, output in (([], "3\n"), (["--run", "2"], "2\n"), (["-f"], "3\n")):
            self.assertEqual(self.queuectl("logs", job_id, *argv), output)
        self.queuectl("logs", job_id, "--run", "4", status=1)
        self.assertIn("no run 4 to show: 1, 2, 3", self.errors)
        self.queuectl("logs", "-f", "absent", status=1)

    def test_wait_tells_how_jobs_ended(self) -> None:
        self.queuectl("enqueue", "--lines", "-", stdin=b"exit 1\n" * 3)
        ids = [str(row[0]) for row in self.sql("SELECT id FROM jobs ORDER BY seq")]
        self.queuectl("cancel", ids[0])
        self.queuectl("wait", ids[0], status=1)
        self.queuectl("wait", ids[1], "--timeout", "0.2", status=124)
        self.assertIn(f"not ended within 0.2 s: {ids[1]}", self.errors)
        self.queuectl("wait", "--any", *ids, "absent", status=1)
        ok = self.enqueue("sleep 0.3")
        waits = self.start("wait", ok, "absent", "--json")
        self.drain("--count", "2")
        self.assertEqual(waits.wait(), 1)
        rows = list(map(json.loads, waits.said().splitlines()))
        self.assertEqual(
            [(row["id"], row["ok"]) for row in rows], [("absent", False), (ok, True)]
        )
        lines = "\n".join([ok, ok]).encode()
        self.assertEqual(
            self.queuectl("wait", "-", stdin=lines), f"job {ok} is completed\n"
        )
        self.assertEqual(self.queuectl("wait", "-"), "")

    def test_a_thousand_lines_are_enqueued_and_waited_for(self) -> None:
        self.worker("--count", "16")
        lines = "".join(f"echo {n}\n" for n in range(1000)).encode()
        ids = self.queuectl("enqueue", "--lines", "-", stdin=lines)
        done = self.queuectl("wait", "-", "--json", stdin=ids.encode())
        self.assertEqual(len(done.splitlines()), 1000)

    def test_retry_runs_failed_jobs_now_and_puts_dead_and_cancelled_ones_back(
        self,
    ) -> None:
        slow = {"QUEUECTL_BACKOFF_MAX": "1h", "QUEUECTL_BACKOFF_BASE": "60"}
        failed = self.enqueue("echo $QUEUECTL_ATTEMPT/$QUEUECTL_MAX_ATTEMPTS; false")
        self.worker(**slow)
        self.wait_state(failed, State.FAILED)
        dead = self.put("true", state="dead", attempts=4)
        self.sql(
            "INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs WHERE id=%s", dead
        )
        cancelled = self.put("true", state="cancelled")
        done = self.put("true", state="completed")
        self.queuectl("retry", failed, dead, "absent", cancelled, done, status=1)
        self.assertEqual(
            self.errors.splitlines(),
            [
                "queuectl: no such job: absent",
                f"queuectl: job {done} is completed: only failed or dead or cancelled "
                "jobs can be put back",
            ],
        )
        for one in (dead, cancelled):
            self.wait_state(one, State.COMPLETED)
        self.wait_until(lambda: len(self.runs(failed)) == 2, "it ran again")
        self.assertEqual(self.queuectl("logs", failed, "--run", "2"), "2/4\n")
        self.assertEqual(self.job(cancelled, "max_attempts"), (None,))

    def test_rerun_makes_a_new_job_like_the_old_one(self) -> None:
        keys = {"queue": "etl", "priority": 3, "cwd": "/tmp", "env": {"A": "1"}}
        old = self.enqueue("echo $A", max_retries=0, timeout=9, **keys)
        new = self.queuectl("rerun", old).strip()
        other = self.queuectl("rerun", old, "-c", "echo other").strip()
        columns = "queue, priority, cwd, env, max_retries, timeout, command"
        first, second, third = self.sql(f"SELECT {columns} FROM jobs ORDER BY seq")
        self.assertEqual(first, second)
        self.assertEqual(third, (*first[:-1], "echo other"))
        self.assertEqual(len({old, new, other}), 3)
        self.queuectl("rerun", "absent", status=1)

    def test_explain_says_why_a_job_is_where_it_is(self) -> None:
        def why(job_id: str) -> str:
            found = json.loads(self.queuectl("explain", job_id, "--json"))
            self.assertEqual(found["state"], self.state(job_id))
            return str(found["why"])

        gpu = self.enqueue("true", queue="gpu")
        self.assertRegex(why(gpu), "^no live worker serves queue `gpu`; start one: ")
        later = self.enqueue("true", delay="10m", queue="gpu")
        self.assertRegex(why(later), r"^due in (10 m|9 m \d+ s) \(attempt 1 of 4\); ")
        self.queuectl("queue", "limit", "video", "1")
        self.worker(
            "--queue",
            "default,video",
            QUEUECTL_BACKOFF_MAX="1h",
            QUEUECTL_BACKOFF_BASE="60",
        )
        running = self.enqueue("sleep 60", queue="video", timeout=90)
        self.wait_state(running, State.PROCESSING)
        host = socket.gethostname()
        self.assertRegex(
            why(running),
            rf"^runs on {re.escape(host)} for \d.* s "
            r"\(attempt 1 of 4, time limit 1 m 30 s\), by worker \S+, PID \d+ there$",
        )
        ids = [self.enqueue("true", queue="video") for _ in range(3)]
        self.assertEqual(
            why(ids[2]),
            f"limit 1 of `video` reached by {running}; 2 jobs ahead in queue `video`",
        )
        child = self.enqueue("true", after=[running, gpu])
        self.assertEqual(
            why(child),
            f"waits for {gpu}, which is pending; {running}, which runs on {host}",
        )
        behind = self.enqueue("true")
        self.assertEqual(
            why(behind),
            "next in queue `default`; 0 of 1 slots that serve queue `default` are free",
        )
        self.queuectl("cancel", running)
        self.wait_state(running, State.CANCELLED)
        self.assertRegex(why(running), f"^cancelled on {re.escape(host)} in .* ago$")
        failing = self.enqueue("echo oops; exit 3")
        self.wait_state(failing, State.FAILED)
        self.assertRegex(
            why(failing), r"^due in \d+ s \(attempt 2 of 4\); exit 3 once$"
        )
        for _ in range(3):
            runs = len(self.runs(failing))
            self.queuectl("retry", failing)
            self.wait_until(lambda: len(self.runs(failing)) > runs, "it ran")
        self.wait_state(failing, State.DEAD)
        self.assertRegex(why(failing), '^dead: exit 3 four times, last line "oops", ')
        self.assertRegex(why(behind), "^completed on .* in .* ago$")
        self.queuectl("explain", "absent", status=1)


class Signatures(WorkCase):
    """Write access to the table alone is no shell."""

    def setUp(self) -> None:
        super().setUp()
        self.key = {"QUEUECTL_SIGNING_KEY": "s3cret"}

    def sign_in(self, job_id: str, *argv: str) -> None:
        self.queuectl("enqueue", "-q", "--id", job_id, *argv, **self.key)

    def test_only_jobs_that_are_signed_as_they_are_run(self) -> None:
        run = "echo $QUEUECTL_JOB_ID >> ran"
        for job_id in ("good", "command", "cwd", "env", "hook", "id"):
            self.sign_in(job_id, "-c", run, "--env", "A=é", "--on-failure", run)
        self.enqueue(run, id="unsigned", on_failure=run)
        self.queuectl("enqueue", "-c", run, "--id=other", QUEUECTL_SIGNING_KEY="other")
        self.put(run, id="inserted", signature="0" * 64)
        for column, value in (
            ("command", run + " "),
            ("cwd", "/tmp"),
            ("env", '{"A":"b"}'),
            ("on_failure", "echo evil >> ran"),
        ):
            name = column.replace("on_failure", "hook")
            self.sql(f"UPDATE jobs SET {column} = %s WHERE id = %s", value, name)
        self.sql("UPDATE jobs SET id = 'renamed' WHERE id = 'id'")
        self.drain(**self.key)
        self.assertEqual(self.lines("ran"), ["good"])
        self.assertEqual(self.counts(), {"completed": 1, "dead": 8})
        self.assertEqual(
            self.sql("SELECT reason, COUNT(*) FROM dlq GROUP BY reason"),
            [("signature", 8)],
        )
        self.queuectl("rerun", "command", status=1, **self.key)
        self.assertIn("is not signed with this QUEUECTL_SIGNING_KEY", self.errors)
        self.queuectl("rerun", "good", **self.key)
        self.queuectl("dlq", "retry", "unsigned", **self.key)
        self.drain(**self.key)
        self.assertEqual(self.counts(), {"completed": 2, "dead": 8})
        self.queuectl("dlq", "retry", "unsigned")
        self.drain()  # without the key all are run
        self.assertEqual(self.lines("ran")[2:], ["unsigned"])

    def test_a_hook_is_signed_with_its_parent_and_no_job_sees_the_key(self) -> None:
        with open(self.path("key"), "w") as file:
            file.write("s3cret\n")
        self.sign_in(
            "a",
            "-c",
            "env > seen; false",
            "--max-retries=0",
            "--on-failure",
            "env >> seen; echo $QUEUECTL_PARENT_ID > hook",
        )
        self.drain(QUEUECTL_SIGNING_KEY_FILE="key")
        self.assertEqual(self.lines("hook"), ["a"])
        self.assertNotIn("SIGNING", "".join(self.lines("seen")))
        self.queuectl("worker", "start", status=69, QUEUECTL_SIGNING_KEY_FILE="absent")
        self.assertIn("QUEUECTL_SIGNING_KEY_FILE: cannot read absent", self.errors)


class DeadLetters(WorkCase):
    """Bulk repair of what died."""

    def setUp(self) -> None:
        super().setUp()
        for n, (code, line) in enumerate(
            [(3, "no host db17"), (3, "no host db2"), (4, "disk 100% full"), (3, "x")]
        ):
            job_id = self.put(
                f"job {n}",
                id=f"d{n}",
                state="dead",
                exit_code=code,
                reason="exit",
                attempts=4,
            )
            self.sql(
                "INSERT INTO dlq (job_seq, id, exit_code, reason, last_line, died_at) "
                "SELECT seq, id, exit_code, reason, %s, UTC_TIMESTAMP(6) - "
                "INTERVAL %s HOUR FROM jobs WHERE id = %s",
                line,
                n,
                job_id,
            )

    def test_they_are_filtered(self) -> None:
        for argv, ids in (
            ([], ["d0", "d1", "d2", "d3"]),
            (["--exit-code", "3"], ["d0", "d1", "d3"]),
            (["--reason", "timeout"], []),
            (["--reason", "exit", "--match", "100%"], ["d2"]),
            (["--match", "job 3"], ["d3"]),
            (["--since", "90m", "--exit-code=3"], ["d0", "d1"]),
        ):
            with self.subTest(argv):
                rows = self.queuectl("dlq", "list", *argv, "--json").splitlines()
                self.assertEqual([json.loads(row)["id"] for row in rows], ids)
        self.queuectl("dlq", "list", "--reason", "exti", status=2)
        self.assertIn("did you mean exit?", self.errors)
        self.queuectl("dlq", "list", "--since", "yesterday", status=2)

    def test_twenty_thousand_are_four_groups(self) -> None:
        lines = "no route to 10.0.%s.1", "step %s failed", "", "Killed"
        self.sql("DELETE FROM dlq")
        rows = [
            (at, f"x{at}", kind, lines[kind].replace("%s", str(at)))
            for at in range(100_000, 120_000)
            for kind in (at % 4,)
        ]
        with self.database.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO dlq (job_seq, id, exit_code, last_line) "
                "VALUES (%s, %s, %s, %s)",
                rows,
            )
        found = list(
            map(json.loads, self.queuectl("dlq", "groups", "--json").splitlines())
        )
        self.assertEqual(
            sorted((row["exit_code"], row["count"], row["last_line"]) for row in found),
            [
                (0, 5000, "no route to N.N.N.N"),
                (1, 5000, "step N failed"),
                (2, 5000, ""),
                (3, 5000, "Killed"),
            ],
        )

    def test_they_are_put_back_in_bulk_after_a_look(self) -> None:
        for argv in ([], ["d0", "--all"], ["--all", "--exit-code", "3"]):
            self.queuectl("dlq", "retry", *argv, status=2)
        self.queuectl("dlq", "retry", "--exit-code", "3", "--dry-run")
        self.assertEqual(self.counts(), {"dead": 4})
        said = self.queuectl("dlq", "retry", "--match", "no host")
        self.assertEqual(said, "job d1 is pending again\njob d0 is pending again\n")
        self.queuectl("dlq", "retry", "--all")
        self.assertEqual(self.counts(), {"pending": 4})
        self.assertEqual(self.sql("SELECT * FROM dlq"), [])

    def test_one_whose_unique_key_lives_again_stays_and_the_others_go_on(self) -> None:
        self.sql("UPDATE jobs SET unique_key = 'K' WHERE id = 'd1'")
        self.enqueue("true", id="now", unique="K")
        self.queuectl("dlq", "retry", "--all", status=1)
        self.assertIn("job d1 stays dead: key K is held by job now", self.errors)
        self.assertEqual(self.counts(), {"dead": 1, "pending": 4})
        self.assertEqual(self.sql("SELECT id FROM dlq"), [("d1",)])
        self.queuectl("retry", "d1", status=1)
        self.assertIn("key K is held by job now", self.errors)


class Servers(WorkCase):
    """A private server, for a machine without one."""

    def test_a_server_in_a_folder_with_a_space_survives_kill_9_with_its_data(
        self,
    ) -> None:
        server = queuectl.PrivateServer(
            self.path("a folder"), os.environ.get("QUEUECTL_TEST_MYSQLD", "")
        )
        self.addCleanup(server.stop)
        self.assertTrue(server.start())
        self.assertFalse(server.start())

        def ask(query: str) -> object:
            with (
                pymysql.connect(
                    unix_socket=server.socket,
                    user="root",
                    autocommit=True,
                    ssl_disabled=True,
                ) as database,
                database.cursor() as cursor,
            ):
                cursor.execute(query)
                return cursor.fetchall()

        ask("CREATE DATABASE kept")
        ask("CREATE TABLE kept.word (word VARCHAR(9) PRIMARY KEY)")
        ask("INSERT INTO kept.word VALUES ('still')")
        pid = server.running()
        os.kill(pid, signal.SIGKILL)
        self.assertTrue(server.start())
        self.assertNotEqual(server.running(), pid)
        self.assertEqual(ask("SELECT word FROM kept.word"), (("still",),))
        self.assertTrue(server.stop())
        self.assertFalse(server.stop())
        self.assertEqual(server.running(), 0)

    def test_db_start_serves_a_folder_whose_socket_path_is_too_long(self) -> None:
        os.mkdir(self.path("tmp"))
        self.environment["TMPDIR"] = self.path("tmp")
        others = self.path("tmp/#sql-temptable-1-2-3.MAI")  # of another MariaDB
        open(others, "w").close()
        self.folder = self.path("deep" * 12 + "/" + "deeper" * 12)
        os.makedirs(self.folder)
        for name in ("DB_SOCKET", "DB_USER", "DB_PASSWORD"):
            del self.environment[name]
        program = os.environ.get("QUEUECTL_TEST_MYSQLD", "")
        self.environment["PATH"] = os.pathsep.join(
            [os.path.dirname(program) or "/usr/sbin", self.environment["PATH"]]
        )
        self.addCleanup(self.run_queuectl, "db", "stop")
        started = self.queuectl("db", "start")
        self.assertIn("private server started in .queuectl, PID ", started)
        pid = re.findall(r"PID (\d+)", started)[0]
        self.assertIn(
            f"runs already in .queuectl, PID {pid}", self.queuectl("db", "start")
        )
        with open(self.path(".queuectl/socket")) as file:
            self.addCleanup(shutil.rmtree, os.path.dirname(file.read().strip()))
        self.queuectl("enqueue", "-c", "echo it works > it-works")
        self.drain()
        self.assertEqual(self.lines("it-works"), ["it works"])
        self.assertIn("stopped", self.queuectl("db", "stop"))
        self.assertFalse(alive(int(pid)))
        self.queuectl("list", status=69)
        self.assertIn("queuectl db start", self.errors)
        self.assertTrue(os.path.exists(others))


class Messages(WorkCase):
    """What an operator meets first, word for word, each with the next step."""

    settings = {**SCALED, "QUEUECTL_JOB_TIMEOUT": "0.3"}

    def assert_said(self, text: str, *argv: str, status: int, **variables: str) -> None:
        self.queuectl(*argv, status=status, **variables)
        self.assertEqual(self.errors, f"queuectl: {text}\n")

    def test_a_python_that_cannot_do_it_is_told_before_anything_is_claimed(
        self,
    ) -> None:
        # An older one must still be able to read the file.
        ast.parse(read_file("queuectl.py"), feature_version=(3, 8))
        job = self.put("true")
        run = "import runpy; sys.argv[1:] = ['worker', 'start', '--drain']; "
        run += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
        for lack, told in (
            ("import sys; sys.version_info = (3, 8, 18, 'final', 0); ", "Python 3.9"),
            ("import os, sys; del os.posix_spawn; ", "no posix_spawn"),
        ):
            done = subprocess.run(
                [sys.executable, "-B", "-c", lack + run],
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                check=False,
            )
            self.assertEqual(done.returncode, 69)
            first, *rest = done.stderr.decode().splitlines()
            self.assertIn(told, first)
            self.assertEqual(len(rest), 1, rest)
        self.assert_state(job, State.PENDING)

    def test_the_set_up(self) -> None:
        here = f"{self.server.socket} (from environment)"
        self.queuectl("list", status=69, DB_NAME="queuectl_absent")
        self.assertRegex(
            self.errors,
            "^queuectl: the queue's tables are missing in queuectl_absent at "
            f"{re.escape(here)}: Unknown database 'queuectl_absent'\n"
            "  run: queuectl db init\n$",
        )
        self.queuectl("list", status=69, DB_PASSWORD="wrong")
        self.assertTrue(
            self.errors.startswith(
                "queuectl: the server refused the account 'root' (from environment), "
                f"queuectl at {here}: "
            ),
            self.errors,
        )
        self.assertTrue(self.errors.endswith("\n  check DB_USER and DB_PASSWORD\n"))
        self.sql("CREATE USER 'queuectl_new'@'%%'")
        self.addCleanup(self.sql, "DROP USER 'queuectl_new'@'%%'")
        new = {"DB_USER": "queuectl_new", "DB_PASSWORD": ""}
        self.queuectl("db", "init", status=69, **new, DB_NAME="q2")
        self.assertRegex(
            self.errors,
            "^queuectl: the account 'queuectl_new' .from environment. lacks a right in "
            "q2 at .*\n  grant it .README, Accounts., or use another account; an "
            "administrator makes the tables by: "
            "queuectl db schema . mysql -u root -p\n$",
        )
        self.environment = {
            name: value
            for name, value in self.environment.items()
            if not name.startswith("DB_")
        }
        os.makedirs(self.path(".queuectl/data"))
        self.assert_said(
            "the private server of queuectl at .queuectl/mysqld.sock (from .queuectl) "
            "is stopped\n  run: queuectl db start",
            "list",
            status=69,
        )

    def test_an_older_and_a_newer_schema(self) -> None:
        self.addCleanup(
            self.sql, "UPDATE config SET value = '1/1' WHERE `key` = 'schema_version'"
        )
        for version, text in (
            (
                "0/0",
                "the tables in queuectl are of schema 0, older than this program needs "
                "(1)\n  run: queuectl db init",
            ),
            (
                "2/2",
                "the tables in queuectl are of schema 2, newer than this program "
                f"({queuectl.VERSION}, schema 1)\n  install the newer queuectl.py on "
                "this host",
            ),
        ):
            self.sql(
                "UPDATE config SET value = %s WHERE `key` = 'schema_version'", version
            )
            self.assert_said(text, "list", status=69)

    def test_a_job_that_does_not_do_what_it_should(self) -> None:
        self.enqueue("no-such-program", id="a", max_retries=0, cwd="/")
        self.enqueue("sleep 9", id="b", max_retries=0)
        self.assert_said(
            "id a is taken: a pending job has it\n  nothing was enqueued; --if-absent "
            "passes over ids and keys in use",
            "enqueue",
            "--id=a",
            "-c",
            "true",
            status=1,
        )
        self.queuectl("status")
        self.assertEqual(
            self.errors,
            "warning: jobs wait in queue default, and no live worker serves it; start "
            "one: queuectl worker start --queue default\n",
        )
        self.drain("--count", "2", PATH="/usr/bin:/bin")
        self.assertEqual(
            self.runs("a", "detail"),
            [
                (
                    f"in / on {socket.gethostname()}, PATH=/usr/bin:/bin; name it by "
                    "its path, or give the job an env with that PATH",
                )
            ],
        )
        self.assertEqual(
            self.runs("b", "detail"),
            [
                (
                    "timed out after 0.3 s (setting job_timeout); give it more: "
                    "--timeout 10m, or config set job_timeout 10m",
                )
            ],
        )

    def test_a_stale_pid_file(self) -> None:
        open(self.path("workers.pid"), "w").close()
        self.assert_said(
            "no worker daemon: the PID file ./workers.pid is stale (no daemon holds it)"
            "\n  start one: queuectl worker start --daemon",
            "worker",
            "stop",
            status=0,
        )

    def test_apparmor(self) -> None:
        program = self.path("mysqld-confined")
        with open(program, "w") as file:
            file.write("#!/bin/sh\necho denied; exit 1\n")
        os.chmod(program, 0o755)
        server = queuectl.PrivateServer(self.path("server"), program)
        exists = os.path.exists
        profile = "/etc/apparmor.d/usr.sbin.mysqld-confined"
        with (
            unittest.mock.patch(
                "os.path.exists", lambda path: path == profile or exists(path)
            ),
            self.assertRaises(queuectl.Problem) as caught,
        ):
            server.start()
        self.assertEqual(
            (caught.exception.what, caught.exception.hint),
            (
                "the private server could not make its data folder:\n  denied",
                f"AppArmor confines {program} ({profile}): use a server that is set up "
                "(DB_HOST), or have an administrator allow this folder",
            ),
        )


class Vetoes(WorkCase):
    """Rows that the server refuses to write, as a trigger of somebody may."""

    def veto(self, event: str, condition: str) -> None:
        """Have a trigger refuse such rows."""
        name = f"veto_{secrets.token_hex(4)}"
        self.addCleanup(self.sql, f"DROP TRIGGER {name}")
        self.sql(
            f"CREATE TRIGGER {name} BEFORE {event} FOR EACH ROW IF {condition} THEN "
            "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'vetoed'; END IF"
        )

    def test_one_row_that_takes_nothing_stops_nobody(self) -> None:
        self.veto("UPDATE ON jobs", "NEW.id LIKE 'bad%%'")
        for name in ("bad1", "bad2"):
            self.put("true", id=name)
        self.put("true", id="bad3", state="scheduled")
        worker = self.worker("--count", "2")
        self.put_many(20, "true")
        self.wait_ended(20)
        self.assertEqual(self.counts(), {"completed": 20, "pending": 2, "scheduled": 1})
        self.assertIn("vetoed (1644)", worker.said())
        self.assertNotIn("Traceback", worker.said())
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0)

    def test_a_job_that_may_not_run_is_dead_and_the_reason_is_refused(self) -> None:
        self.veto("UPDATE ON jobs", "NEW.id = 'bad' AND NEW.state = 'processing'")
        self.put("true", id="bad")
        self.put_many(5, "true")
        self.drain("--count", "2")
        self.assertEqual(self.job("bad", "state", "reason"), ("dead", "refused"))
        self.assertEqual(self.counts(), {"completed": 5, "dead": 1})
        self.assertEqual(self.sql("SELECT id, reason FROM dlq"), [("bad", "refused")])

    def test_a_job_whose_result_is_refused_is_dead_and_others_are_settled(self) -> None:
        self.veto("INSERT ON runs", "NEW.exit_code = 3")
        self.put("exit 3", id="bad", max_retries=2)
        self.put_many(5, "true")
        worker = self.worker("--count", "2")
        self.wait_state("bad", State.DEAD)
        self.wait_ended(5)
        self.assertEqual(self.job("bad", "reason", "runs"), ("refused", 1))
        self.assertIn("job bad is dead: its result was refused: vetoed", worker.said())

    def test_a_lost_workers_other_runs_are_taken_over(self) -> None:
        self.veto("UPDATE ON jobs", "NEW.id = 'bad' AND NEW.state = 'failed'")
        lost, alive = self.turns(), self.turns()
        for name in ("bad", "good"):
            self.put("true", id=name)
        lost.take(queuectl.TurnRequest(free=2))
        taken = alive.after.take_over(alive.settings, lost.identity.id, -1)
        self.assertEqual(taken, ["good"])
        self.assertEqual(self.state("good"), State.FAILED)
        self.assertEqual(self.job("bad", "state", "reason"), ("dead", "refused"))

    def test_a_parent_is_settled_although_one_that_waits_for_it_is_refused(
        self,
    ) -> None:
        self.veto("UPDATE ON jobs", "NEW.id = 'bad' AND NEW.state = 'pending'")
        parent = self.enqueue("true")
        for name in ("bad", "good"):
            self.enqueue("true", id=name, after=[parent])
        worker = self.worker()
        self.wait_state("good", State.COMPLETED)
        self.wait_state("bad", State.DEAD)
        self.assert_state(parent, State.COMPLETED)
        self.assertEqual(self.job("bad", "reason"), ("refused",))
        self.assertNotIn("Traceback", worker.said())

    def test_a_person_reads_who_vetoed_a_job_in_one_line(self) -> None:
        self.veto("INSERT ON jobs", "NEW.command = 'bad'")
        self.queuectl("enqueue", "-c", "bad", status=2)
        self.assertIn("the server refused a job: vetoed\n", self.errors)


class CommandsTest(WorkCase):
    """What a person types and reads."""

    def test_the_command_line_is_forgiving_in_order_and_strict_in_names(self) -> None:
        self.enqueue("true", id="one")
        for argv in (
            ["list", "--json"],
            ["--json", "list"],
            ["list", "--limit", "1", "--json"],
        ):
            self.assertEqual(json.loads(self.queuectl(*argv))["id"], "one")
        self.assertIn("max_retries", self.queuectl("config", "--json", "list"))
        for argv, hint in (
            (["lst"], "did you mean list?"),
            (["list", "--stat", "dead"], "did you mean --state?"),
            (["list", "--\x1b[1m"], "\\x1b"),
            (["worker", "stat"], "did you mean start?"),
            (["dlq"], "list|groups|retry"),
            (["list", "--state", "pendin"], "did you mean pending?"),
            (["config", "get", "backof_base"], "did you mean backoff_base?"),
            (["list", "--limit", "-1"], "whole number"),
            (["show"], "ID"),
            (["enqueue", "echo", "hi"], "go after --"),
            (["list", "extra"], "extra"),
            (["worker", "start", "--count=0"], ""),
        ):
            self.queuectl(*argv, status=2)
            self.assertIn(hint, self.errors)
        overview = self.queuectl()
        for name, command in queuectl.COMMANDS.items():
            self.assertIn(f"  {name:14} {command.summary}\n", overview)
        self.assertEqual(
            self.queuectl("help", "enqueue"), self.queuectl("enqueue", "--help")
        )
        self.assertRegex(
            self.queuectl("--version"),
            r"^queuectl \S+, schema 1, PyMySQL \d\S+, Python 3\.\S+\n$",
        )

    def test_a_list_is_filtered_limited_and_may_be_cut_off(self) -> None:
        self.put_many(1500, "true")
        self.put_many(3, "true", queue="q", state="failed")
        self.queuectl("list")
        self.assertIn("100 of 1,503; --limit 0 for all", self.errors)
        table = self.queuectl("list", "--state", "failed", "--queue", "q")
        self.assertEqual(len(table.splitlines()), 7)
        self.assertEqual(len(self.queuectl("list", "--json").splitlines()), 1503)
        self.assertEqual(self.queuectl("list", "--json", "--state", "dead"), "")
        done = subprocess.run(
            f"{sys.executable} '{SCRIPT}' list --json | head -n 1",
            shell=True,
            capture_output=True,
            env=self.environment,
            check=False,
        )
        self.assertEqual((done.stdout.count(b"\n"), done.stderr), (1, b""))

    def test_one_job_is_shown_whole(self) -> None:
        job_id = self.enqueue(
            "echo out; exit 3", max_retries=0, env={"TOKEN": "s3cret"}
        )
        self.drain()
        found = self.show(job_id)
        self.assertEqual(
            list(found),
            (
                "id command queue state priority attempts max_retries timeout "
                "next_run_at created_at started_at finished_at duration exit_code "
                "reason worker cwd env after output history"
            ).split(),
        )
        self.assertEqual(
            (
                found["state"],
                found["attempts"],
                found["exit_code"],
                found["reason"],
                found["output"],
                found["env"],
            ),
            ("dead", 1, 3, "exit", "out\n", {"TOKEN": "s3cret"}),
        )
        history = found["history"]
        assert isinstance(history, list)
        for name in (
            "attempt worker started_at finished_at duration exit_code reason"
        ).split():
            self.assertIn(name, history[0])
        self.assertRegex(
            str(found["finished_at"]), r"^\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z$"
        )
        self.assertNotIn("s3cret", self.queuectl("show", job_id))
        self.assertEqual(self.queuectl("logs", job_id), "out\n")
        self.queuectl("show", "absent", status=1)
        self.assertIn("no such job: absent", self.errors)
        self.queuectl("logs", "-", status=1)

    def test_no_control_sequence_reaches_a_terminal_or_a_table(self) -> None:
        job_id = self.enqueue(
            "printf '\\033[31m\\007\\tred\\n'; #\u202e\x1b]0;title\x07"
        )
        self.drain()
        for argv in (["list"], ["show", job_id]):
            self.assertNotRegex(self.queuectl(*argv), "[\x07\x1b\u202e]")
        self.assertEqual(self.queuectl("logs", job_id), "\x1b[31m\x07\tred\n")
        self.assertNotIn("\x1b", self.on_terminal(80, "logs", job_id))

    def on_terminal(self, columns: int, *argv: str, **variables: str) -> str:
        """What a terminal of so many columns is sent."""
        try:
            here, there = pty.openpty()
        except OSError as error:
            self.skipTest(f"no terminal to be had: {error}")
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with subprocess.Popen(
            [sys.executable, SCRIPT, *argv],
            stdin=there,
            stdout=there,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={**self.environment, **variables},
        ):
            os.close(there)
            text = b""
            with contextlib.suppress(OSError):
                while data := os.read(here, 65536):
                    text += data
            os.close(here)
        return text.decode().replace("\r\n", "\n")

    def test_tables_fit_a_terminal_of_80_columns(self) -> None:
        job_id = self.enqueue("echo " + "long 😀 é " * 30, max_retries=0)
        self.sql("UPDATE jobs SET state = 'dead'")
        self.sql("INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs")
        for argv in (["list"], ["dlq", "list"], ["config", "list"], ["status"]):
            text = self.on_terminal(80, *argv)
            for line in text.splitlines():
                if line[:1] in "┌│└├":
                    self.assertLessEqual(queuectl.columns_of(line), 80, line)
        self.assertIn(job_id, self.on_terminal(80, "list"))

    def test_a_locale_without_boxes_gets_plain_ones(self) -> None:
        self.enqueue("echo é😀")
        table = self.queuectl(
            "list", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"
        )
        self.assertTrue(table.isascii())
        self.assertIn("| echo ??", table)

    def test_cancel_and_retry_of_a_dead_letter_survive_a_lost_answer(self) -> None:
        self.put("true", state="dead")
        self.sql("INSERT INTO dlq (job_seq, id) SELECT seq, id FROM jobs")
        [(job_id,)] = self.sql("SELECT id FROM jobs")
        for verb, state in ((("dlq", "retry"), "pending"), (("cancel",), "cancelled")):
            proxy = CuttingProxy(self.server.socket, b"\x03COMMIT", True)
            self.addCleanup(proxy.close)
            self.queuectl(
                *verb,
                "--",
                str(job_id),
                DB_SOCKET="",
                DB_HOST="127.0.0.1",
                DB_PORT=str(proxy.port),
                DB_SSL_MODE="disabled",
            )
            self.assertEqual((proxy.cuts, self.state(str(job_id))), (1, state))

    def test_what_was_put_in_by_hand_stops_no_worker(self) -> None:
        nested = self.put("true", env="[" * 100000, max_retries=0)
        held = self.put("true", state="processing", max_retries=0)
        worker = self.worker()
        self.wait_state(nested, State.DEAD)
        self.wait_state(held, State.DEAD)
        self.assertEqual(self.show(nested)["reason"], "spawn")
        self.assertEqual(self.show(held)["reason"], "lost")
        self.assertNotIn("Traceback", worker.said())

    def test_cancel_ends_what_waits_and_says_why_it_cannot_end_the_rest(self) -> None:
        for state in ("pending", "scheduled", "failed", "blocked", "completed", "dead"):
            self.put("true", state=state)
            self.sql("UPDATE jobs SET id = state WHERE id <> state")
        out = self.queuectl(
            "cancel",
            "pending",
            "absent",
            "scheduled",
            "failed",
            "blocked",
            "completed",
            "dead",
            status=1,
        )
        self.assertEqual(out.count("is cancelled"), 4)
        for text in (
            "no such job: absent",
            "job completed is completed",
            "job dead is dead",
        ):
            self.assertIn(text, self.errors)
        self.assertEqual(
            dict(self.sql("SELECT state, COUNT(*) FROM jobs GROUP BY state")),
            {"cancelled": 4, "completed": 1, "dead": 1},
        )
        self.assertEqual(
            json.loads(self.queuectl("cancel", "dead", "--json", status=1)),
            {
                "id": "dead",
                "ok": False,
                "state": "dead",
                "error": "job dead is dead: nothing to cancel",
            },
        )

    def test_a_dead_letter_is_listed_and_retried_with_its_attempts(self) -> None:
        job_id = self.enqueue("echo broke; exit 4", max_retries=1)
        self.drain()
        letter = json.loads(self.queuectl("dlq", "list", "--json"))
        self.assertEqual(
            (letter["id"], letter["attempts"], letter["exit_code"]), (job_id, 2, 4)
        )
        self.assertIn("died_at", letter)
        self.assertEqual(self.sql("SELECT last_line FROM dlq"), [("broke",)])
        self.assertIn("2/2", self.queuectl("dlq", "list"))
        for argv, attempts, max_attempts in (
            ((), 2, 3),
            (("--retries", "2"), 3, 5),
            (("--reset",), 0, None),
        ):
            self.queuectl("dlq", "retry", job_id, *argv)
            self.assertEqual(
                self.sql("SELECT attempts, max_attempts FROM jobs"),
                [(attempts, max_attempts)],
            )
            self.assertEqual(self.sql("SELECT COUNT(*) FROM dlq"), [(0,)])
            self.queuectl("dlq", "retry", job_id, "absent", status=1)
            self.assertIn(f"job {job_id} is pending: only dead jobs", self.errors)
            self.drain()
            self.assert_state(job_id, State.DEAD)
            self.assertEqual(self.sql("SELECT COUNT(*) FROM dlq"), [(1,)])
        self.assertEqual(self.sql("SELECT runs FROM jobs"), [(7,)])

    def test_a_job_that_was_revived_by_hand_dies_again_in_peace(self) -> None:
        job_id = self.enqueue("exit 4", max_retries=0)
        self.drain()
        self.sql("UPDATE jobs SET state = 'pending' WHERE id = %s", job_id)
        self.drain()
        self.assertEqual(self.sql("SELECT state, runs FROM jobs"), [("dead", 2)])
        self.assertEqual(self.sql("SELECT id, exit_code FROM dlq"), [(job_id, 4)])

    def test_what_the_server_refuses_is_no_traceback(self) -> None:
        codes = ",   ".join(str(code) for code in range(1, 256))
        self.queuectl("config", "set", "permanent_exit_codes", codes, status=1)
        self.assertIn("the server refused the data", self.errors)

    def test_settings_are_stored_checked_and_listed_with_their_source(self) -> None:
        self.assertEqual(self.queuectl("config", "get", "backoff_base"), "2\n")
        self.queuectl("config", "set", "backoff_base", "3")
        self.assertEqual(self.queuectl("config", "get", "backoff_base"), "3\n")
        self.queuectl("config", "set", "backoff_base", "x", status=2)
        self.queuectl("config", "set", "schema_version", "9/9", status=2)
        self.queuectl("config", "set", "backoff_base", "4", QUEUECTL_BACKOFF_BASE="7")
        self.assertIn(
            "QUEUECTL_BACKOFF_BASE=7 (environment) hides it here", self.errors
        )
        self.assertEqual(
            self.queuectl("config", "get", "backoff_base", QUEUECTL_BACKOFF_BASE="7"),
            "7\n",
        )
        listed = [
            json.loads(line)
            for line in self.queuectl("config", "list", "--json").splitlines()
        ]
        self.assertEqual([one["key"] for one in listed], list(queuectl.SETTINGS))
        self.assertEqual(
            {"key": "backoff_base", "value": 4.0, "source": "config", "default": "2"},
            {**listed[0], "help": None}
            and {name: listed[0][name] for name in listed[0] if name != "help"},
        )
        self.queuectl("config", "unset", "backoff_base")
        with open(self.path(".env"), "w") as file:
            file.write("QUEUECTL_BACKOFF_BASE=5\n")
        self.assertIn("│ 5     │ ./.env", self.queuectl("config", "list"))

    def test_an_id_that_cannot_be_is_no_job_to_any_verb(self) -> None:
        for verb in (
            ["show"],
            ["explain"],
            ["logs"],
            ["rerun"],
            ["wait"],
            ["cancel"],
            ["retry"],
            ["dlq", "retry", "--dependents"],
            ["dlq", "retry", "--dry-run"],
        ):
            self.queuectl(*verb, "é", status=1)
            self.assertIn("no such job: ", self.errors)

    def test_a_full_disk_under_the_output_is_said(self) -> None:
        self.put_many(3, "true")
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, SCRIPT, "list"],
                env={**self.environment, "TMPDIR": self.folder},
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
                text=True,
            )
        self.assertEqual(
            (done.returncode, done.stderr),
            (
                1,
                f"queuectl: cannot write to standard output or {self.folder}: "
                "No space left on device\n",
            ),
        )

    @unittest.skipUnless(os.geteuid() == 0, "needs the right to mount")
    def test_a_full_disk_under_log_and_pid_file_is_said_and_stops_no_work(self) -> None:
        full = self.disk("16k")
        with contextlib.suppress(OSError), open(f"{full}/fill", "wb", 0) as file:
            while file.write(b"0" * 1024):
                pass
        self.queuectl("worker", "start", "--daemon", f"--pid-file={full}/p", status=1)
        self.assertIn(
            f"cannot write the PID file {full}/p: No space left on device", self.errors
        )
        self.assertFalse(os.path.exists(f"{full}/p"))
        self.queuectl("worker", "start", "--daemon", f"--log-file={full}/w.log")
        self.addCleanup(self.run_queuectl, "worker", "stop", "--now")
        self.wait_state(self.enqueue("exit 3", max_retries=0), State.DEAD)
        self.queuectl("worker", "stop")

    def test_the_status_counts_and_warns(self) -> None:
        self.put_many(2, "true", queue="gpu")
        lines = self.queuectl("status").splitlines()
        self.assertRegex(lines[0], r"^database: queuectl at \S+ \(from environment\)$")
        self.assertEqual(lines[1], "Job counts by state:")
        self.assertIn("│ pending    │ 2     │", lines)
        self.assertIn("No worker PID file at ./workers.pid", lines)
        self.assertIn(
            "jobs wait in queue gpu, and no live worker serves it", self.errors
        )
        found = json.loads(self.queuectl("status", "--json"))
        self.assertEqual(
            list(found), ["database", "states", "capped", "queues", "workers", "daemon"]
        )
        self.assertEqual(found["states"]["pending"], 2)
        self.assertEqual(
            found["daemon"], {"pid_file": "./workers.pid", "pid": None, "alive": False}
        )


if __name__ == "__main__":
    unittest.main()
