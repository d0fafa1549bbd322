#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["PyMySQL>=1.0.2"]
# ///
"""queuectl: a queue of shell commands, kept in MySQL.

The file reads downwards, in the order of a job's life: a room uses only the rooms
above it.

    errors              what a person can mend, and the exit status that says so
    settings            every setting: its name, its default, where it may be set
    connection address  where the database is, and who we are there
    states              the states, the ways between them; no clock, no database
    schema              the tables, as migrations.sql prints them
    database            reaching MySQL; transactions, and what an error asks of us
    job model           what a job may say, and how its row looks to us
    transitions         the one writer of a job's state; dead letters, dependents
    enqueue             a job's way into the table
    claim               taking pending jobs for one worker
    leases              who is alive; taking over what a lost worker ran
    maintenance         purge, and a second look at what waits for others
    turn                one round of a worker with the database
    queries             what status, list, show and wait ask
    actions             cancel, retry, limits, settings: what a person changes
    doorbell            waking idle workers at once, by MySQL alone
    OS processes        signals, /proc, and the end of a process
    runs                one shell command: its output, its time limit, its end
    worker              claim, run, settle, again
    supervisor          keeping workers alive: PID file, log, signals, restarts
    private server      a MySQL for a machine without one
    terminal            tables, JSON, escapes
    explain             why a job is where it is, in one sentence
    diagnostics         what is off, and its remedy
    commands            what a person can type
    main                one door in, one door out
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import getpass
import hmac
import itertools
import json
import math
import mmap
import os
import queue
import random
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from typing import (
    IO, TYPE_CHECKING, Callable, Collection, Generic, Iterable, Iterator, List,
    Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple, TypeVar, Union,
)

if TYPE_CHECKING:
    import ssl
    from pymysql.connections import Connection
    from pymysql import cursors

VERSION = "0.2.0"
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
Thunk = Callable[[], None]
Values = Union[Sequence[object], Mapping[str, object]]
Json = Union[None, bool, int, float, str, List["Json"], "dict[str, Json]"]


# ---- errors ------------------------------------------------------------------
#
# What a person can mend: an error worded for its reader, and the exit status
# that says so. It is raised where the cause is known and told in `main` alone;
# whatever else is raised is a bug, and its traceback is let out. A message
# never carries characters that could steer the terminal it is printed on.

# The exit statuses. 69 is EX_UNAVAILABLE of sysexits.h, 124 is what timeout(1)
# exits with, and 130 is what a shell reports of a program that Ctrl-C ended.
CANNOT = 1
USAGE = 2
UNAVAILABLE = 69
TIMED_OUT = 124
INTERRUPTED = 130

class Problem(Exception):
    """What happened, what to do next, and the exit status that says so."""

    def __init__(self, what: str, hint: str = "",
                 status: int = CANNOT) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.status = status

def excerpt(value: object, limit: int = 60) -> str:
    """Returns the value for a message: printable, on one line, and short."""
    if not isinstance(value, str):
        value = json.dumps(value, default=str)
    # A lone surrogate stands for a byte that was no UTF-8; it is escaped too.
    data = value.encode("unicode_escape", "backslashreplace")
    text = data.decode("ascii")
    if len(text) > limit:
        text = text[:limit - 1] + "…"
    return text

def absolute(path: str) -> str:
    """Returns the path from the root on.

    It raises a Problem where the working directory was deleted under us.
    """
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        what = f"the working directory is gone: no {excerpt(path)} from here"
        hint = "cd to a directory that is there, and try again"
        raise Problem(what, hint) from None

# C0, DEL and C1: a terminal obeys them, also in the middle of a line.
CONTROL_CODES = (*range(32), *range(127, 160))
# These turn the direction of text around, or end a line unseen, so that what
# is shown is not what is there.
BIDI_CODES = (
    0x200e,
    0x200f,
    *range(0x2028, 0x202f),
    *range(0x2066, 0x206a),
)
# Text goes through one of these tables before it is printed.
ESCAPES = {
    **{code: f"\\x{code:02x}" for code in CONTROL_CODES},
    **{code: f"\\u{code:04x}" for code in BIDI_CODES},
    ord("\n"): "\\n",
    ord("\t"): "\\t",
    ord("\r"): "\\r",
}
# In text of several lines, line ends and tabs are meant.
MULTILINE = ESCAPES.copy()
del MULTILINE[ord("\n")]
del MULTILINE[ord("\t")]

def nearest(word: str, words: Iterable[str]) -> str:
    """Returns a hint that names the likely word, or an empty one."""
    # Only a mistake needs this module, so only a mistake pays for its import.
    import difflib
    found = difflib.get_close_matches(word, words, 1)
    if not found:
        return ""
    return f"did you mean {found[0]}?"

def notice(text: str) -> None:
    """Prints a line on standard error, at once; controls are escaped."""
    printable = text.translate(MULTILINE)
    print(f"queuectl: {printable}", file=sys.stderr, flush=True)


# ---- settings ----------------------------------------------------------------
#
# Every setting: its name, its default, its limits, and where it may be set.
# What a person types, what .env says and what the config table holds is read
# by the same code, and refused by a message that says what is expected.
# Settings are one frozen value, so nobody sees half a reload. A .env file is
# parsed and never executed.

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# With this bound, every time that a duration leads to fits in a DATETIME.
TEN_YEARS_S = 10 * 366 * 86400
# It is covariant because a ValueType[int] may stand for a ValueType[object].
Value = TypeVar("Value", covariant=True)
Number = TypeVar("Number", int, float)

def parse_duration(text: str) -> float:
    """Returns the seconds that `90`, `90s`, `5m`, `2h30m` or `1d` stand for.

    It raises ValueError for whatever else, a sign or an exponent included.
    """
    if re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text):
        return float(text)
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,6})?[smhd])+", text):
        raise ValueError(text)
    seconds = 0.0
    for amount, unit in re.findall(r"([\d.]+)([smhd])", text):
        seconds += float(amount) * UNITS_S[unit]
    return seconds

def say_duration(seconds: float) -> str:
    """Returns a duration for people: `0.2 s`, `41 s`, `2 m 30 s`, `2 d 1 h`."""
    if seconds < UNITS_S["m"]:
        if seconds < 10 and seconds % 1:
            return f"{seconds:.1f} s"
        return f"{seconds:.0f} s"
    # Two units are enough: nobody asks for the seconds of a day.
    if seconds >= UNITS_S["d"]:
        unit, below = "d", "h"
    elif seconds >= UNITS_S["h"]:
        unit, below = "h", "m"
    else:
        unit, below = "m", "s"
    amount, rest_s = divmod(int(seconds), UNITS_S[unit])
    rest = rest_s // UNITS_S[below]
    if rest:
        return f"{amount} {unit} {rest} {below}"
    return f"{amount} {unit}"

@dataclass(frozen=True)
class ValueType(Generic[Value]):
    """One type of value: how its text is read, and words for what is expected.

    `convert` raises ValueError for a text that it cannot read.
    """
    convert: Callable[[str], Value]
    expects: str
    json_types: tuple[type, ...] = (str,)

    def read(self, value: object, name: str,
             types: tuple[type, ...] = (str,)) -> Value:
        """Returns the value that `name` was given, as this type.

        It raises a Problem that names it, where it is of none of `types` or
        unreadable.
        """
        try:
            # Python takes True for the number 1; who wrote it did not.
            if isinstance(value, bool):
                raise ValueError(value)
            if not isinstance(value, types):
                raise ValueError(value)
            text = value if isinstance(value, str) else json.dumps(value)
            return self.convert(text)
        except (ValueError, OverflowError):
            what = f"{name}: expected {self.expects}, not {excerpt(value)}"
            raise Problem(what, status=USAGE) from None

    def read_json(self, value: object, name: str) -> Value:
        """Returns the value of a JSON document, whose type must be right too."""
        return self.read(value, name, self.json_types)

def bounded(value: Number, low: float, high: float) -> Number:
    """Returns the value; it raises ValueError for NaN, or out of bounds."""
    if not low <= value <= high:
        raise ValueError(value)
    return value

def whole(low: int, high: int) -> ValueType[int]:
    """Returns the type of whole numbers from `low` to `high`."""
    def convert(text: str) -> int:
        # int() alone would also take spaces, underscores and a million digits.
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise ValueError(text)
        return bounded(int(text), low, high)

    expects = f"a whole number from {low} to {high}"
    return ValueType(convert, expects, (int,))

def number(low: float, high: float) -> ValueType[float]:
    """Returns the type of numbers from `low` to `high`."""
    def convert(text: str) -> float:
        return bounded(float(text), low, high)

    expects = f"a number from {low:g} to {high:g}"
    return ValueType(convert, expects, (int, float))

def duration(low: float = 0, high: float = TEN_YEARS_S) -> ValueType[float]:
    """Returns the type of durations from `low` to `high` seconds."""
    def convert(text: str) -> float:
        return bounded(parse_duration(text), low, high)

    limits = ""
    if low:
        limits += f" of at least {low:g} s"
    if high < TEN_YEARS_S:
        limits += f" of at most {say_duration(high)}"
    expects = f"a duration{limits} such as 90, 90s, 5m or 2h30m"
    return ValueType(convert, expects, (int, float, str))

def choice(*words: str) -> ValueType[str]:
    """Returns the type whose values are these words and no others."""
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return ValueType(convert, " or ".join(words))

def read_codes(text: str) -> frozenset[int]:
    """Returns the exit codes of a list; it raises ValueError for others."""
    codes = set()
    for word in re.split(r"[,\s]+", text.strip()):
        if word:
            codes.add(bounded(int(word), 1, 255))
    return frozenset(codes)

EXIT_CODES = ValueType(read_codes, "exit codes from 1 to 255, comma-separated")

def setting(kind: ValueType[T], default: str, help_text: str) -> T:
    """Returns a field of Settings.

    Its default is text, read by the same code as what people type.
    """
    return dataclasses.field(
        default=kind.convert(default),
        metadata={"kind": kind, "default": default, "help": help_text})

@dataclass(frozen=True)
class Settings:
    """The runtime settings, as one frozen value; a reload makes a new one."""
    # What becomes of a job that failed.
    backoff_base: float = setting(
        number(1, 1000), "2",
        "the delay before retry n is this to the power n, in s")
    backoff_max: float = setting(
        duration(), "1h",
        "the longest delay before a retry")
    backoff_jitter: float = setting(
        number(0, 1), "0",
        "the part of a delay that is random, from 0 to 1")
    max_retries: int = setting(
        whole(0, 1000), "3",
        "retries of a job that does not say: 3 means up to 4 runs")

    # How long a run may last, and how much of its output is kept.
    job_timeout: float = setting(
        duration(), "60",
        "time limit of a job that does not say; 0: none")
    kill_grace: float = setting(
        duration(0, 3600), "5",
        "seconds from TERM to KILL when a run is ended")
    output_limit: int = setting(
        whole(0, 16 << 20), "65536",
        "bytes of a run's output that are kept")

    # How soon an idle worker sees a new job.
    poll_interval: float = setting(
        duration(0.05, 60), "1",
        "seconds between looks of an idle worker")
    doorbell: str = setting(
        choice("on", "off"), "on",
        "wake idle workers at once; off behind a proxy")

    # How soon a worker that died is found lost.
    heartbeat: float = setting(
        duration(0.1, 600), "5",
        "the longest time between two beats of a worker")
    worker_timeout: float = setting(
        duration(0.4, 86400), "30",
        "the lease: a worker silent for so long is lost (at least 4 heartbeats)")

    # When a purge deletes what ended long ago.
    retain_completed: float = setting(
        duration(), "14d",
        "how long completed jobs are kept; 0: for ever")
    retain_cancelled: float = setting(
        duration(), "14d",
        "how long cancelled jobs are kept; 0: for ever")
    retain_dead: float = setting(
        duration(), "0",
        "how long dead jobs are kept; 0: for ever")

    # What decides that a job dies at once.
    permanent_exit_codes: frozenset[int] = setting(
        EXIT_CODES, "",
        "exit codes that are never retried")
    on_lost: str = setting(
        choice("retry", "dead"), "retry",
        "what becomes of a job whose worker was lost")

    @property
    def lease_s(self) -> float:
        """How long a heartbeat may stand still before its worker is lost."""
        # In a shorter lease, one slow transaction would look like a dead
        # worker.
        return max(self.worker_timeout, 4 * self.heartbeat)

SETTINGS = {field.name: field for field in dataclasses.fields(Settings)}

def variable_of(key: str) -> str:
    """Returns the environment variable that sets this key."""
    return f"QUEUECTL_{key.upper()}"

# Where variables stand: what it is called, and what it holds.
Source = Tuple[str, Mapping[str, str]]

class Variable(NamedTuple):
    """A variable that is no setting: its default, and what it means."""
    default: str
    help: str

# Only the environment and .env may set these: most say how to reach the
# database that holds the config table, or are secrets, which it should not hold.
VARIABLES = {
    "DATABASE_URL": Variable(
        "", "all of the following in one: "
        "mysql://user:password@host:port/name?ssl-mode=required"),
    "DB_HOST": Variable(
        "127.0.0.1", "server, or several with commas, each with an "
        "optional :port; the first that takes writes is used"),
    "DB_PORT": Variable("3306", "port of those without one"),
    "DB_SOCKET": Variable(
        "", "path of the server's Unix socket, instead of a host"),
    "DB_USER": Variable("", "account; by default the login name"),
    "DB_PASSWORD": Variable("", "its password"),
    "DB_PASSWORD_FILE": Variable(
        "", "a file whose first line is the password"),
    "DB_NAME": Variable("queuectl", "database"),
    "DB_SSL_MODE": Variable(
        "preferred",
        "disabled, preferred, required, verify_ca or verify_identity"),
    "DB_SSL_CA": Variable(
        "", "file of certificate authorities to verify against"),
    "PID_FILE": Variable("./workers.pid", "PID file of worker start --daemon"),
    "QUEUECTL_SKIP_LOCKED": Variable("", "off: claim without SKIP LOCKED"),
    "QUEUECTL_SIGNING_KEY": Variable(
        "", "a secret: jobs are signed, and only those that are run"),
    "QUEUECTL_SIGNING_KEY_FILE": Variable(
        "", "a file whose first line is that secret"),
}
# What a job does not inherit: ways into the database, tokens, and what systemd
# tells a service, with which a job could speak in the supervisor's name.
PRIVATE_VARIABLE = re.compile(
    r"DB_.*|DATABASE_URL|MYSQL_PWD|"
    r"QUEUECTL_.*(KEY|TOKEN)(_FILE)?|"
    r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*")

def beside_script(name: str) -> str:
    """Returns the path of a file beside this program, not beside a link to it."""
    script = os.path.realpath(__file__)
    return os.path.join(os.path.dirname(script), name)

def read_dotenv(path: str) -> dict[str, str]:
    """Returns the variables of a .env file; none where there is no such file.

    It raises a Problem that names the line, and never what the line holds:
    that may be a password.
    """
    try:
        # Bytes that are no UTF-8 come through, as they do in os.environ.
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise Problem(what, status=UNAVAILABLE) from None

    found = {}
    for position, line in enumerate(lines, 1):
        # Some editors begin a file with a byte order mark.
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {position}"
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)", line)
        if not match:
            raise Problem(f"{where}: expected NAME=VALUE", status=USAGE)
        found[match[1]] = _dotenv_value(match[2], where)
    return found

# A text in single or in double quotes, and perhaps a comment.
QUOTED_VALUE = re.compile(
    r"""(?:'([^']*)'|"((?:[^"\\]|\\.)*)")"""
    r"""\s*(?:#.*)?""")

def _dotenv_value(text: str, where: str) -> str:
    """Returns a value of .env without its quotes, its escapes and its comment.

    It raises a Problem for a quote that is not closed; `where` names the line.
    """
    if text[:1] not in ("'", '"'):
        # A # within a word belongs to the value: passwords have them.
        return re.sub(r"(^|\s+)#.*", "", text)
    match = QUOTED_VALUE.fullmatch(text)
    if not match:
        raise Problem(f"{where}: a quote is not closed", status=USAGE)
    # As in a shell, only double quotes know a backslash.
    single, double = match.groups()
    if single is not None:
        return str(single)

    def unescape(escape: re.Match[str]) -> str:
        character = escape[1]
        return "\n" if character == "n" else character

    return re.sub(r"\\(.)", unescape, double)

class Environment(NamedTuple):
    """Where variables are looked up; the first source that sets one decides."""
    layers: tuple[Source, ...]

    @classmethod
    def read(cls) -> Environment:
        """Returns the process's variables, ./.env, and .env beside the script.

        It raises a Problem where one of the files cannot be read.
        """
        beside = beside_script(".env")
        sources: list[Source] = []
        sources.append(("environment", dict(os.environ)))
        sources.append(("./.env", read_dotenv(".env")))
        same = False
        # This fails where one of the two is missing, or the working directory
        # is gone; then they are not the same.
        with contextlib.suppress(OSError):
            same = os.path.samefile(".env", beside)
        if not same:
            sources.append((beside, read_dotenv(beside)))
        return cls(tuple(sources))

    def find(self, name: str) -> tuple[str, str] | None:
        """Returns a variable's value and its source's name, if one sets it."""
        for source, variables in self.layers:
            if name in variables:
                return variables[name], source
        return None

    def get(self, name: str) -> str:
        """Returns the value of one of VARIABLES, or its default."""
        found = self.find(name)
        if found is None:
            return VARIABLES[name].default
        return found[0]

class LoadedSettings(NamedTuple):
    """The settings in force, each one's source and text, and what was unusable."""
    settings: Settings
    origins: dict[str, tuple[str, str]]
    complaints: list[str]

def load_settings(environment: Environment,
                  table: Mapping[str, str]) -> LoadedSettings:
    """Returns the settings by environment, config table and defaults.

    A value in the environment that cannot be read is a Problem; one in the
    table, which somebody else may have written, is passed over with a
    complaint.
    """
    values: dict[str, object] = {}
    origins = {}
    complaints = []
    for key, field in SETTINGS.items():
        about = field.metadata
        kind: ValueType[object] = about["kind"]
        origins[key] = ("default", about["default"])
        # The table is read even where the environment overrides it, so that a
        # bad value is heard of before the variable goes.
        if key in table:
            text = table[key]
            try:
                values[key] = kind.read(text, f"config {key}")
                origins[key] = ("config", text)
            except Problem as problem:
                complaints.append(f"{problem.what}; the default is used")
        variable = variable_of(key)
        found = environment.find(variable)
        if found:
            text, source = found
            values[key] = kind.read(text, f"{variable} ({source})")
            origins[key] = (source, text)
    # Each value came from its own field's type, which mypy cannot know.
    settings = Settings(**values)  # type: ignore[arg-type]
    return LoadedSettings(settings, origins, complaints)


# ---- connection address ------------------------------------------------------
#
# Where the database is, and who we are there. The environment and .env may say
# it, by variables or by one URL; then the private server's folder, then
# MySQL's own option files. Address and account are each taken whole from the
# first source that names them; halves of two are never mixed. Nothing here
# connects, and no message repeats a password. The key that jobs are signed
# with, the other secret we are given, is read and used here too.

SSL_MODES = (
    "disabled",
    "preferred",
    "required",
    "verify_ca",
    "verify_identity",
)
PRIVATE_FOLDER = ".queuectl"
PORT = whole(1, 65535)
ADDRESS = {"DB_HOST", "DB_PORT", "DB_SOCKET"}
ACCOUNT = {"DB_USER", "DB_PASSWORD", "DB_PASSWORD_FILE"}
# What MySQL calls our variables, in its option files and in URLs.
OPTIONS = {
    "host": "DB_HOST",
    "port": "DB_PORT",
    "socket": "DB_SOCKET",
    "user": "DB_USER",
    "password": "DB_PASSWORD",
    "database": "DB_NAME",
    "ssl-mode": "DB_SSL_MODE",
    "ssl-ca": "DB_SSL_CA",
}
# In this variable `main` passes on what --defaults-file says.
DEFAULTS_FILE = "DB_DEFAULTS_FILE"
NOWHERE: Source = ("default", {})
Hosts = Tuple[Tuple[str, int], ...]

@dataclass(frozen=True)
class ConnectionInfo:
    """Where the database is, who we are there, and which sources said so."""
    # The first that takes writes is used. A socket is instead of them.
    hosts: Hosts
    socket: str
    user: str
    password: str = dataclasses.field(repr=False)
    database: str = "queuectl"
    ssl_mode: str = "preferred"
    ssl_ca: str = ""
    source: str = "default"
    account_source: str = "default"
    # The environment or .env named the address, so it is no guess of ours.
    explicit: bool = False

    def __str__(self) -> str:
        if self.socket:
            return f"{self.database} at {self.socket}"
        hosts = [f"{host}:{port}" for host, port in self.hosts]
        where = ",".join(hosts)
        return f"{self.database} at {where}"

def find_connection(environment: Environment) -> ConnectionInfo:
    """Returns the database to use.

    It raises a Problem, naming the variable, for what cannot be read.
    """
    told: list[Source] = []
    for source, variables in environment.layers:
        told.append((source, expand_url(variables, source)))
    sources = [*told, *_further_sources(told)]
    address = next(filter(_names_address, sources), NOWHERE)
    account_source, account = _account_source(sources, address)

    hosts, socket_path = _read_address(address)
    explicit = address[0] in dict(told)
    # Name and TLS of the database may stand apart from its address, but only
    # in what the person wrote, or where the address came from.
    rest = Environment(tuple(told) if explicit else (*told, address))
    mode = _read_ssl_mode(rest.get("DB_SSL_MODE"))
    return ConnectionInfo(
        hosts,
        socket_path,
        user=_read_user(account),
        password=secret("DB_PASSWORD", account),
        database=rest.get("DB_NAME"),
        ssl_mode=mode,
        ssl_ca=rest.get("DB_SSL_CA"),
        source=address[0],
        account_source=account_source,
        explicit=explicit)

def _names_address(source: Source) -> bool:
    """Says whether a source names an address; an empty variable names none."""
    _, variables = source
    return any(variables.get(name) for name in ADDRESS)

def _names_account(source: Source) -> bool:
    """Says whether a source names an account; an empty password is one."""
    _, variables = source
    return not ACCOUNT.isdisjoint(variables)

def _further_sources(told: Sequence[Source]) -> list[Source]:
    """Returns what else may say, after what the person told us, in order."""
    further: list[Source] = []
    folder = find_private_folder()
    if folder:
        own = {
            "DB_SOCKET": private_socket(folder),
            "DB_USER": "root",
        }
        further.append((PRIVATE_FOLDER, own))
    # Option files are opened only where they can matter.
    sources = [*told, *further]
    has_address = any(map(_names_address, sources))
    has_account = any(map(_names_account, sources))
    if not has_address or not has_account:
        only = os.environ.get(DEFAULTS_FILE, "")
        further.append(read_option_files(only))
    return further

def _account_source(sources: Sequence[Source],
                    address: Source) -> Source:
    """Returns the first source that names an account for this address."""
    is_private = address[0] == PRIVATE_FOLDER
    for source in sources:
        # The private server's account is of no use anywhere else.
        if source[0] == PRIVATE_FOLDER and not is_private:
            continue
        if _names_account(source):
            return source
    return NOWHERE

def find_private_folder() -> str:
    """Returns the private server's folder, here or beside the script, if any."""
    beside = beside_script(PRIVATE_FOLDER)
    for folder in (PRIVATE_FOLDER, beside):
        data = os.path.join(folder, "data")
        if os.path.isdir(data):
            return folder
    return ""

def private_socket(folder: str) -> str:
    """Returns the path of the socket of the private server in `folder`."""
    # A socket's path must fit in about 100 bytes. Where the folder's own is
    # longer, the socket lies elsewhere, and this file notes where.
    noted = os.path.join(folder, "socket")
    with contextlib.suppress(OSError), open(noted) as file:
        return file.read().strip()
    return os.path.join(folder, "mysqld.sock")

# Where distributions put the server's socket.
LOCAL_SOCKETS = (
    "/run/mysqld/mysqld.sock",
    "/var/run/mysqld/mysqld.sock",
    "/var/lib/mysql/mysql.sock",
    "/tmp/mysql.sock",
)

def _read_address(source: Source) -> tuple[Hosts, str]:
    """Returns the hosts that a source names, or else the path of the socket."""
    name, variables = source
    host = variables.get("DB_HOST", "")
    port = variables.get("DB_PORT", "")
    socket_path = variables.get("DB_SOCKET", "")
    # As to MySQL's own clients, "localhost" means the socket, and not TCP.
    if host == "localhost" and not port and not socket_path:
        there = filter(os.path.exists, LOCAL_SOCKETS)
        socket_path = next(there, "")
    if socket_path:
        return (), socket_path
    default_port = PORT.read(port or "3306", f"DB_PORT ({name})")
    hosts = _read_hosts(host or "127.0.0.1", default_port)
    return hosts, ""

# [address]:port, as IPv6 needs it; host:port; or a bare name or address.
HOST_FORM = re.compile(r"\[([^\]]+)\](?::(\d+))?|([^:]+):(\d+)|(.+)")

def _read_hosts(text: str, default_port: int) -> Hosts:
    """Returns the hosts of a comma-separated list, each with its port.

    It raises a Problem for an empty list, and for a word that is no host.
    """
    hosts = []
    for word in text.split(","):
        word = word.strip()
        if not word:
            continue
        match = HOST_FORM.fullmatch(word)
        if not match:
            what = f"DB_HOST: expected host or host:port, not {excerpt(word)}"
            raise Problem(what, status=USAGE)
        name = match[1] or match[3] or match[5]
        port_text = match[2] or match[4] or str(default_port)
        port = PORT.read(port_text, "DB_HOST's port")
        hosts.append((name, port))
    if not hosts:
        raise Problem("DB_HOST names no host", status=USAGE)
    return tuple(hosts)

def _read_ssl_mode(text: str) -> str:
    """Returns one of SSL_MODES, however it is written, or raises a Problem."""
    # MySQL writes VERIFY_CA, other programs write verify-ca.
    mode = text.lower().replace("-", "_")
    if mode not in SSL_MODES:
        modes = ", ".join(SSL_MODES)
        what = f"DB_SSL_MODE: expected {modes}, not {excerpt(mode)}"
        raise Problem(what, nearest(mode, SSL_MODES), USAGE)
    return mode

def _read_user(variables: Mapping[str, str]) -> str:
    """Returns the account's user, by default whoever runs us."""
    try:
        return variables.get("DB_USER") or getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that /etc/passwd does not list.
        # Python 3.13 reports that as OSError, older ones as KeyError.
        what = "this user id has no login name"
        raise Problem(what, "set DB_USER", USAGE) from None

def expand_url(variables: Mapping[str, str],
               source: str) -> Mapping[str, str]:
    """Returns the variables of a source, with what its DATABASE_URL adds.

    What stands beside the URL wins over it: address and account each as a
    whole, since half of one and half of the other would name a server or user
    nobody meant.
    """
    url = variables.get("DATABASE_URL", "")
    if not url:
        return variables
    try:
        from_url = _read_url(url)
    except ValueError:
        # The message does not repeat the URL, for it holds a password.
        what = f"DATABASE_URL ({source}) cannot be read"
        hint = "expected mysql://user:password@host:port/name"
        raise Problem(what, hint, USAGE) from None

    beside = {name for name, value in variables.items() if value}
    for group in (ADDRESS, ACCOUNT):
        if group & beside:
            beside |= group
    expanded = dict(variables)
    for name, value in from_url.items():
        if name not in beside:
            expanded[name] = value
    return expanded

def _read_url(url: str) -> dict[str, str]:
    """Returns the variables that a database URL stands for.

    It raises ValueError where that is no URL of MySQL, or asks for a TLS
    option that we do not know: to connect without it could be to connect in
    the clear.
    """
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(url)
    # Frameworks write mysql2://, or mysql+driver://.
    if not re.fullmatch(r"(mysql2?|mariadb)(\+\w+)?", parts.scheme):
        raise ValueError("scheme")
    found = _read_url_query(parts.query)
    account, at, host = parts.netloc.rpartition("@")
    user, colon, password = account.partition(":")
    host = unquote(host)
    # A host that is a path, written with %2F, is the server's Unix socket.
    if host.startswith("/"):
        found["DB_SOCKET"] = host
    elif host:
        found["DB_HOST"] = host
    if at:
        found["DB_USER"] = unquote(user)
    if colon:
        found["DB_PASSWORD"] = unquote(password)
    name = parts.path.strip("/")
    if name:
        found["DB_NAME"] = unquote(name)
    return found

def _read_url_query(query: str) -> dict[str, str]:
    """Returns the variables that stand behind the ? of a database URL.

    It raises ValueError for a TLS option that we do not know; others are for
    somebody else and passed over.
    """
    from urllib.parse import parse_qsl
    found = {}
    # A garbled query is an error, which only strict parsing finds; but then it
    # takes an empty one, which is none, for garbled.
    pairs = parse_qsl(query, strict_parsing=True) if query else []
    for name, value in pairs:
        # Other programs write ssl_mode, or sslmode.
        name = name.replace("_", "-").replace("sslmode", "ssl-mode")
        if name in OPTIONS:
            found[OPTIONS[name]] = value
        elif name.startswith("ssl"):
            raise ValueError(name)
    return found

OPTION_FILES = ("/etc/my.cnf", "/etc/mysql/my.cnf", "~/.my.cnf")
OPTION_GROUPS = {"client", "client-server", "client-mariadb", "queuectl"}

def read_option_files(only: str) -> Source:
    """Returns what MySQL's option files say to clients, and which of them did.

    `only` names the one to read instead of the usual ones; a Problem says that
    it cannot be read.
    """
    if only and not os.access(only, os.R_OK):
        raise Problem(f"--defaults-file: cannot read {only}", status=USAGE)
    paths = [os.path.expanduser(path) for path in OPTION_FILES]
    if only:
        paths = [only]
    found: dict[str, str] = {}
    used = []
    # What a later file says overrides an earlier one, as with mysql.
    for path in paths:
        options = dict(_read_options(path))
        if options:
            found.update(options)
            used.append(path)
    return ", ".join(used) or "default", found

INCLUDE = re.compile(r"!include(dir)?\s+(.+)")
GROUP = re.compile(r"\[\s*([^\]]*?)\s*\]")
# At this depth mysql, too, leaves files that include each other in a circle.
INCLUDE_DEPTH_MAX = 10

def _read_options(path: str,
                  depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yields the variables and values of an option file and what it includes.

    They come in the order of the lines, so that the last of a name is the one
    to use.
    """
    wanted = False
    for line in _option_lines(path):
        include = INCLUDE.fullmatch(line)
        group = GROUP.match(line)
        if include and depth < INCLUDE_DEPTH_MAX:
            for included in _included_files(include):
                yield from _read_options(included, depth + 1)
        elif group:
            wanted = group[1] in OPTION_GROUPS
        elif wanted:
            name, _, value = line.partition("=")
            variable = OPTIONS.get(_option_name(name))
            if variable:
                yield variable, _option_value(value)

def _option_lines(path: str) -> list[str]:
    """Returns the lines of an option file; none where it is passed over."""
    try:
        # As mysql does, what anybody may write is passed over: it could name a
        # server that collects passwords.
        mode = os.stat(path).st_mode
        anybody_writes = mode & 0o002
        if anybody_writes and os.path.isfile(path):
            return []
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.strip() for line in file]
    except (OSError, ValueError):
        # mysql passes these over, too. A NUL in the name is a ValueError.
        return []

def _included_files(include: re.Match[str]) -> list[str]:
    """Returns the files that an !include or !includedir line names, in order."""
    is_folder, path = include.groups()
    if not is_folder:
        return [path]
    try:
        names = sorted(os.listdir(path))
    except (OSError, ValueError):
        # What is no folder that we may list is tried as a file.
        return [path]
    names = [name for name in names if name.endswith(".cnf")]
    return [os.path.join(path, name) for name in names]

def _option_name(text: str) -> str:
    """Returns the name of an option in its usual form."""
    name = text.strip()
    # To MySQL the two signs are the same.
    name = name.replace("_", "-")
    # mysql ignores an option that it does not know, if this stands before it.
    loose = "loose-"
    if name.startswith(loose):
        name = name[len(loose):]
    return name

# Everything before the comment: text in single quotes or in double quotes,
# where a # means nothing and a backslash hides a quote, and what stands
# outside of them.
BEFORE_COMMENT = re.compile(
    r"""(?:'(?:\\.|[^'\\])*(?:'|$)|"""
    r""""(?:\\.|[^"\\])*(?:"|$)|"""
    r"""[^#'"])*""")
QUOTED_OPTION = re.compile(r"""(['"]).*\1""", re.DOTALL)
MYSQL_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "s": " ",
}

def _option_value(text: str) -> str:
    """Returns the value of an option, without its comment, quotes and escapes."""
    before = BEFORE_COMMENT.match(text.strip())
    value = before[0].strip() if before else ""
    if QUOTED_OPTION.fullmatch(value):
        value = value[1:-1]

    def unescape(escape: re.Match[str]) -> str:
        character = escape[1]
        return MYSQL_ESCAPES.get(character, character)

    return re.sub(r"""\\([ntrbs\\'"])""", unescape, value)

def secret(name: str, variables: Mapping[str, str]) -> str:
    """Returns a variable, or the first line of the file that NAME_FILE names.

    It raises a Problem where that file cannot be read.
    """
    value = variables.get(name, "")
    path = variables.get(f"{name}_FILE")
    if value or not path:
        return value
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, ValueError) as error:
        # What is not UTF-8, or has a NUL in its name, is a ValueError.
        why = getattr(error, "strerror", "") or "not a text file"
        shown = excerpt(path, 200)
        what = f"{name}_FILE: cannot read {shown}: {why}"
        raise Problem(what, status=UNAVAILABLE) from None

# A process reads the key once; a reload does not change it.
@functools.lru_cache(maxsize=1)
def signing_key() -> bytes:
    """Returns the key that jobs are signed with; if it is empty, they are not.

    It raises a Problem where the key's file cannot be read.
    """
    name = "QUEUECTL_SIGNING_KEY"
    either = {name, f"{name}_FILE"}
    environment = Environment.read()
    # Key and file are taken from one source, as an account is.
    for _, variables in environment.layers:
        if not either.isdisjoint(variables):
            return secret(name, variables).encode()
    return b""

def sign(job_id: object, *parts: object) -> str:
    """Returns a job's signature, of its id, command, cwd, env and on_failure."""
    text = b""
    # Each part carries its length, so that no text can move from one to the
    # next unseen; its sign tells a missing part from an empty one.
    for part in (job_id, *parts):
        data = b"-"
        if part is not None:
            data = b"+" + str(part).encode()
        text += b"%d:%b" % (len(data), data)
    return hmac.new(signing_key(), text, "sha256").hexdigest()

def is_signed(signature: object, *parts: object) -> bool:
    """Says whether a job may run: its signature fits, or none is asked for."""
    if not signing_key():
        return True
    # The comparison takes the same time wherever the first difference stands.
    expected = sign(*parts)
    return hmac.compare_digest(str(signature), expected)


# ---- states ------------------------------------------------------------------
#
# The states of a job, the ways between them, and what the end of a run means.
# Plain values in, plain values out: no clock, no database. TRANSITIONS says
# once which state may become which; room "transitions" alone carries that out,
# and every other room asks this table.

class State(str, enum.Enum):
    """Where a job is. The first five are the ones that `status` always shows."""
    # StrEnum is of Python 3.11; without this an f-string prints "State.DEAD".
    __str__ = str.__str__
    PENDING = "pending"        # may run now
    PROCESSING = "processing"  # one worker has claimed it, by its token
    COMPLETED = "completed"    # exit status 0; never moves again
    FAILED = "failed"          # waits out its backoff
    DEAD = "dead"              # out of retries, or permanent; only a person moves it
    SCHEDULED = "scheduled"    # waits for its time
    BLOCKED = "blocked"        # waits for other jobs
    CANCELLED = "cancelled"    # a person ended it

ENDED = (State.COMPLETED, State.DEAD, State.CANCELLED)
WAITING = (State.PENDING, State.SCHEDULED, State.BLOCKED, State.FAILED)

class Rule(NamedTuple):
    """One way between states: those that it leaves, and those that it may lead to."""
    leaves: frozenset[State]
    leads_to: tuple[State, ...]
    needs_token: bool = False  # only whoever holds the run's token may go it

    @property
    def to(self) -> State:
        """The state that it leads to, where the caller names no other."""
        return self.leads_to[0]

def _rule(leaves: Iterable[State], *leads_to: State, needs_token: bool = False) -> Rule:
    return Rule(frozenset(leaves), leads_to, needs_token)

TRANSITIONS = {
    # Its time has come, or all that it waited for has ended as it should.
    "release": _rule((State.SCHEDULED, State.FAILED, State.BLOCKED), State.PENDING),
    # All that it waited for has ended, but it has a later time of its own.
    "defer": _rule((State.BLOCKED,), State.SCHEDULED),
    "claim": _rule((State.PENDING,), State.PROCESSING),
    "complete": _rule((State.PROCESSING,), State.COMPLETED, needs_token=True),
    "fail": _rule((State.PROCESSING,), State.FAILED, needs_token=True),
    "die": _rule((State.PROCESSING,), State.DEAD, needs_token=True),
    # It has no run: what it waited for can never end as it should.
    "die unrun": _rule((State.BLOCKED,), State.DEAD),
    "lose": _rule((State.PROCESSING,), State.FAILED, needs_token=True),
    "hand back": _rule((State.PROCESSING,), State.PENDING, needs_token=True),
    "cancel": _rule(WAITING, State.CANCELLED),
    # A running job is only asked to end; whoever settles it carries that out.
    "cancel, ended": _rule((State.PROCESSING,), State.CANCELLED, needs_token=True),
    # A person puts it back; it is blocked while it has to wait for others
    # again.
    "retry": _rule((State.FAILED, State.DEAD, State.CANCELLED),
                   State.PENDING, State.BLOCKED),
    "revive": _rule((State.DEAD,), State.PENDING, State.BLOCKED),
}

class Reason(str, enum.Enum):
    """How a run ended, or why there was none."""
    __str__ = str.__str__
    EXIT = "exit"            # by itself, with an exit status
    SIGNAL = "signal"        # by a signal that queuectl did not send
    TIMEOUT = "timeout"      # at its time limit
    SPAWN = "spawn"          # it never started
    LOST = "lost"            # its worker was lost
    CANCELLED = "cancelled"  # a person cancelled it
    HANDED_BACK = "handed back"  # its worker was stopped before it ended
    SIGNATURE = "signature"  # nobody who has the key enqueued it as it is
    DEPENDENCY = "dependency"  # it never ran: what it waited for did not complete

# A job that was lost so often in a row is next run with no other beside it.
ALONE_AFTER_LOSSES = 2

@dataclass(frozen=True)
class Claim:
    """A job in `processing`, as its row says; NULLs are filled from the settings."""
    seq: int
    id: str
    token: str
    run: int
    attempts: int
    max_attempts: int
    losses: int
    backoff_base: float
    on_lost: str
    cancel_requested: bool
    has_children: bool
    worker: str
    started_at: object
    permanent_exit_codes: frozenset[int]

    @property
    def alone(self) -> bool:
        """Whether this run shares its worker process with no other."""
        return self.losses >= ALONE_AFTER_LOSSES

@dataclass(frozen=True)
class RunOutcome:
    """How a run ended, as its worker saw it."""
    reason: Reason | None  # None: it goes on
    exit_code: int | None = None
    detail: str = ""
    duration_s: float | None = None
    output: bytes = b""
    output_bytes: int = 0  # how many it wrote, kept or not

class Transition(NamedTuple):
    """What an ended run makes of its job: a name in TRANSITIONS, and with it."""
    name: str
    wait_s: float = 0.0
    losses: int = 0
    max_attempts: int | None = None  # from now on; None: as it was

def backoff_s(base: float, attempts: int, settings: Settings, chance: float) -> float:
    """Returns the seconds before the next run: base ^ attempts, at most
    backoff_max.

    `chance`, from 0 to 1, says how much of the jitter is taken off.
    """
    delay = settings.backoff_max
    # Compared by logarithms: the power itself may overflow.
    if delay > 0 and attempts * math.log(base) < math.log(delay):
        delay = base ** attempts
    return delay * (1 - settings.backoff_jitter * chance)

def decide_transition(claim: Claim, outcome: RunOutcome, settings: Settings,
                      chance: float) -> Transition:
    """Returns what the end of a run makes of its job. `chance` feeds the jitter."""
    if claim.cancel_requested:
        return Transition("cancel, ended")
    if outcome.reason is Reason.HANDED_BACK:
        return Transition("hand back", losses=claim.losses)
    wait_s = backoff_s(claim.backoff_base, claim.attempts, settings, chance)
    if outcome.reason is Reason.LOST:
        return _after_loss(claim, wait_s)
    if outcome.reason is Reason.EXIT and outcome.exit_code == 0:
        return Transition("complete")
    spent = claim.attempts >= claim.max_attempts
    permanent = outcome.exit_code in claim.permanent_exit_codes
    if spent or permanent or outcome.reason is Reason.SIGNATURE:
        return Transition("die")
    return Transition("fail", wait_s)

def _after_loss(claim: Claim, wait_s: float) -> Transition:
    """Returns what becomes of a job whose worker was lost."""
    losses = claim.losses + 1
    spent = claim.attempts >= claim.max_attempts
    # Only a run that was alone dies of loss: no neighbour can have caused it.
    if claim.on_lost == "dead" or (spent and claim.alone):
        return Transition("die", losses=losses)
    # One that had neighbours runs once more by itself, whatever its retries
    # say.
    granted = claim.attempts + 1 if spent else None
    first_loss = not claim.losses
    return Transition("lose", 0.0 if first_loss else wait_s, losses, granted)


# ---- schema ------------------------------------------------------------------
#
# The whole current schema: migrations.sql is its print, and a test holds the two
# together. Doing it twice, or over an older schema, changes nothing. The version row
# comes first, so that a half-made schema is known as ours and completed.

SCHEMA_VERSION = 1
# The oldest schema whose programs may still write into these tables.
OLDEST_WRITER = 1
SCHEMA_ROW = "SELECT value FROM config WHERE `key` = 'schema_version'"
SCHEMA = f"""\
-- The tables of queuectl, whole and current. Running this twice, or over an older
-- schema, changes nothing; `queuectl db init` does the same and also upgrades.
CREATE DATABASE IF NOT EXISTS `queuectl`
  DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
USE `queuectl`;

CREATE TABLE IF NOT EXISTS config (
  `key`      VARCHAR(64) NOT NULL PRIMARY KEY,
  value      VARCHAR(1024) COLLATE utf8mb4_bin NOT NULL,
  changed_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6))
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
INSERT IGNORE INTO config (`key`, value) VALUES
  ('schema_version', '{SCHEMA_VERSION}/{OLDEST_WRITER}');

-- Every column but `command` has a default, so that an application may enqueue with
-- INSERT INTO jobs (command) VALUES ('...') inside its own transaction. Lengths have
-- some room, so that a session without a strict mode is refused what it would cut.
CREATE TABLE IF NOT EXISTS jobs (
  seq         BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  id          VARCHAR(160) NOT NULL DEFAULT (UUID()),
  command     MEDIUMTEXT COLLATE utf8mb4_bin NOT NULL,
  queue       VARCHAR(80) NOT NULL DEFAULT 'default',
  state       VARCHAR(20) NOT NULL DEFAULT 'pending',
  priority    INT NOT NULL DEFAULT 0,
  claim_order INT GENERATED ALWAYS AS (-priority) STORED,
  attempts INT NOT NULL DEFAULT 0, max_attempts INT NULL, max_retries INT NULL,
  runs     INT NOT NULL DEFAULT 0, losses INT NOT NULL DEFAULT 0,
  timeout  DOUBLE NULL, backoff_base DOUBLE NULL,
  permanent_exit_codes VARCHAR(1024) NULL, on_lost VARCHAR(20) NULL,
  cwd      TEXT COLLATE utf8mb4_bin NULL, env MEDIUMTEXT COLLATE utf8mb4_bin NULL,
  on_failure MEDIUMTEXT COLLATE utf8mb4_bin NULL, signature VARCHAR(64) NULL,
  schedule VARCHAR(64) NULL, batch CHAR(16) NULL,
  unique_key VARCHAR(128) COLLATE utf8mb4_bin NULL,
  live_key VARCHAR(128) COLLATE utf8mb4_bin GENERATED ALWAYS AS
           (CASE WHEN state IN ('completed', 'dead', 'cancelled') THEN NULL
                 ELSE unique_key END) STORED,
  touched INT NOT NULL DEFAULT 0, has_children TINYINT NOT NULL DEFAULT 0,
  next_run_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  created_at  DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  started_at  DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  cancel_requested_at DATETIME(6) NULL, duration DOUBLE NULL, exit_code INT NULL,
  reason VARCHAR(16) NULL, worker VARCHAR(64) NULL, token CHAR(16) NULL,
  UNIQUE KEY jobs_id (id),
  UNIQUE KEY jobs_live_key (live_key),
  KEY jobs_claim (state, queue, claim_order, seq),
  KEY jobs_due (state, next_run_at),
  CONSTRAINT jobs_state CHECK (state IN ('pending', 'processing', 'completed', 'failed',
                                         'dead', 'scheduled', 'blocked', 'cancelled')
                               AND state NOT REGEXP '[^a-z]'),
  CONSTRAINT jobs_id_form CHECK (LENGTH(id) <= 128 AND id REGEXP '^[A-Za-z0-9]'
                                 AND id NOT REGEXP '[^A-Za-z0-9._:@+-]'),
  CONSTRAINT jobs_queue_form CHECK (LENGTH(queue) <= 64 AND queue REGEXP '^[A-Za-z0-9]'
                                    AND queue NOT REGEXP '[^A-Za-z0-9._:@+-]'),
  CONSTRAINT jobs_command_form CHECK (LENGTH(command) BETWEEN 1 AND 131000),
  CONSTRAINT jobs_priority CHECK (priority BETWEEN -1000000 AND 1000000),
  CONSTRAINT jobs_max_retries CHECK (max_retries BETWEEN 0 AND 1000),
  CONSTRAINT jobs_timeout CHECK (timeout >= 0),
  CONSTRAINT jobs_on_lost CHECK (on_lost IN ('retry', 'dead')
                                 AND on_lost NOT REGEXP '[^a-z]')
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

-- Which job waits for which: needs is 'completed' or 'ended'.
CREATE TABLE IF NOT EXISTS dependencies (
  parent BIGINT UNSIGNED NOT NULL,
  child  BIGINT UNSIGNED NOT NULL,
  needs  VARCHAR(9) NOT NULL DEFAULT 'completed',
  PRIMARY KEY (parent, child),
  KEY dependencies_child (child)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

-- History: a row for each run that ended, or that has output to show.
CREATE TABLE IF NOT EXISTS runs (
  job_seq BIGINT UNSIGNED NOT NULL, run INT NOT NULL, attempt INT NOT NULL,
  worker VARCHAR(64) NULL, started_at DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  duration DOUBLE NULL, exit_code INT NULL, reason VARCHAR(16) NULL,
  detail VARCHAR(1024) COLLATE utf8mb4_bin NULL,
  output LONGBLOB NULL, output_bytes BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (job_seq, run)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS dlq (
  job_seq BIGINT UNSIGNED NOT NULL PRIMARY KEY, id VARCHAR(128) NOT NULL,
  died_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  exit_code INT NULL, reason VARCHAR(16) NULL,
  last_line VARCHAR(255) COLLATE utf8mb4_bin NULL,
  UNIQUE KEY dlq_id (id),
  KEY dlq_died (died_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS workers (
  id VARCHAR(64) NOT NULL PRIMARY KEY,
  host VARCHAR(255) COLLATE utf8mb4_bin NOT NULL, pid BIGINT NOT NULL,
  supervisor BIGINT NOT NULL, process_identity VARCHAR(255) NOT NULL,
  slots INT NOT NULL, queues TEXT NULL, state VARCHAR(10) NOT NULL DEFAULT 'running',
  beat BIGINT NOT NULL DEFAULT 0, lease_s DOUBLE NOT NULL,
  started_at   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  heartbeat_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  lost_at      DATETIME(6) NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS queues (
  name VARCHAR(64) NOT NULL PRIMARY KEY, max_running INT NULL,
  paused_at DATETIME(6) NULL, touched BIGINT NOT NULL DEFAULT 0
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS schedules (
  name VARCHAR(64) NOT NULL PRIMARY KEY, timing VARCHAR(255) NOT NULL,
  zone VARCHAR(64) NOT NULL DEFAULT 'UTC',
  job  MEDIUMTEXT COLLATE utf8mb4_bin NOT NULL,
  next_run_at DATETIME(6) NULL, last_run_at DATETIME(6) NULL,
  last_job VARCHAR(128) NULL, paused_at DATETIME(6) NULL,
  created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  KEY schedules_due (next_run_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
"""

class Upgrade(NamedTuple):
    """A step from an older schema: one column or index more."""
    to: int  # the schema that it belongs to
    why: str
    adds: tuple[str, str]  # table, and column or index: done where it is missing
    statement: str

# A step that has shipped never changes. Programs of the schema before write on until
# they have read the version row, so a step only adds, and what it adds has a default.
UPGRADES: Sequence[Upgrade] = ()

def schema_statements() -> list[str]:
    """Returns the statements that make tables: no CREATE DATABASE, and no USE."""
    text = re.sub(r"(?m)^(--.*|CREATE DATABASE [^;]*;|USE .*;)\n", "", SCHEMA)
    return [part.strip() for part in text.split(";\n") if part.strip()]

def schema_for(database: str) -> str:
    """Returns the text of migrations.sql, for a database of this name."""
    return SCHEMA.replace("`queuectl`", quote_name(database))

def quote_name(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


# ---- database ----------------------------------------------------------------
#
# Reaching MySQL, and saying plainly why we could not. `transact` alone decides what
# an error means: repeat, reconnect, the row's fault, or a Problem for a person. No
# other room catches a PyMySQL error. Nobody forks with a connection open.


class ErrorClass(enum.Enum):
    """What an error of the server or the connection asks of us."""

    REPEAT = "repeat the transaction"
    RECONNECT = "the server is gone, or takes nothing now"
    CROWDED = "the server has no connection to spare"
    ROW = "this row cannot be stored"
    SETUP = "something is not set up"
    BUG = "ours"


BINLOG_NEEDS_REPEATABLE_READ = 1665
LOCK_WAIT_TIMEOUT = 1205
QUERY_KILLED = 1317
# A cluster that did not take a COMMIT, or does not let a transaction begin: a node that
# is not ready (1047), a replication hook that failed (3100), a new primary that is
# still behind (3781 to 3783), a member that waits in vain or leaves (3797 to 3799).
REFUSED_BY_CLUSTER = {1047, 3100, 3781, 3782, 3783, 3797, 3798, 3799}
CODES = {
    ErrorClass.REPEAT: {
        LOCK_WAIT_TIMEOUT,
        1213,
        1020,
        1180,
        1206,
        1412,
        1622,
        1969,
        3024,
        3101,
        3572,
    },
    ErrorClass.RECONNECT: {
        *range(100),  # of its files (3: a full disk), and PyMySQL's 0
        2002,
        2003,
        2006,
        2013,
        2055,
        1053,
        1079,
        1152,
        1158,
        1159,
        1160,
        1161,
        1184,
        1317,
        1927,
        3168,
        3169,
        4031,
        BINLOG_NEEDS_REPEATABLE_READ,
        *REFUSED_BY_CLUSTER,
        1290,
        1792,
        1836,
        3032,
        4311,
        4312,
        4313,  # no writes here now
        1021,
        1026,
        1030,
        1037,
        1038,
        1041,
        1114,
        3675,  # disk, memory
        1598,
        1950,
        1964,  # the binary log did not take the COMMIT
        1105,
        9001,
    },  # unknown; ProxySQL: nobody behind it
    ErrorClass.CROWDED: {1040, 1203, 1226},
    ErrorClass.ROW: {
        1062,
        1153,
        1264,
        1265,
        1366,
        1406,
        3140,
        3819,
        4025,
        1197,
        1705,
        3231,
    },  # more at once than binary log or cluster take
    ErrorClass.SETUP: {
        1044,
        1045,
        1049,
        1054,
        1129,
        1130,
        1142,
        1143,
        1146,
        1698,
        1862,
        2026,
        2059,
        3098,
        3118,
        3159,
        3635,
    },
}
CLASS_OF_CODE = {code: trouble for trouble, codes in CODES.items() for code in codes}
LONGEST_PAUSE_S, SAY_AFTER_S = 3.0, 1.0
SLOW_WIRE_BYTES_S = 32 * 1024  # the slowest wire that is borne with
TRIES_ON_A_HOST = 3
# A statement of fewer bytes waits for the server, and not for the wire.
MANY_BYTES = 16 << 10


class RowRefused(Exception):
    """The server will never take this data as it is: `code` and `text` say why."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code, self.text = code, text


class Unreachable(Problem):
    """The server stayed away for longer than the caller's patience."""

    sent = False  # whether the transaction may have been carried out


@dataclass(frozen=True)
class RetryPolicy:
    """How a caller bears with a server that is away."""

    retry_for_s: float
    timeout_s: float  # of one answer to a short statement
    say: Callable[[str], None]
    longest_s: float = math.inf  # of one answer to a statement of many bytes

    def answer_s(self, statement_bytes: int) -> float:
        """Seconds that a statement of this size may take, on a slow wire too."""
        wire_s = statement_bytes / SLOW_WIRE_BYTES_S
        return min(self.timeout_s + wire_s, max(self.timeout_s, self.longest_s))


READING = RetryPolicy(retry_for_s=2, timeout_s=30, say=notice)
WRITING = RetryPolicy(retry_for_s=10, timeout_s=10, say=notice)
FOLLOWING = RetryPolicy(
    retry_for_s=60, timeout_s=10, say=notice
)  # a failover takes 30 s
UPGRADING = RetryPolicy(retry_for_s=20, timeout_s=4 * 3600, say=notice)


class RefuseClearText:
    """Answers a server that asks for the password in clear text: with nothing."""

    def __init__(self, connection: object) -> None:
        self._connection = connection

    def authenticate(self, packet: object) -> NoReturn:
        raise Problem(
            "the server asked for the password in clear text: refused",
            "give the account caching_sha2_password or mysql_native_password",
            UNAVAILABLE,
        )


def sent_bytes(text: str) -> int:
    return len(text if text.isascii() else text.encode(errors="surrogateescape"))


class Cursor:
    """PyMySQL's cursor, and statements that wait for the next one's round trip."""

    def __init__(
        self, inner: cursors.Cursor, bytes_max: int, read_committed: bool = True
    ) -> None:
        self._inner, self._bytes_max = inner, bytes_max
        # What a transaction must see as it is now, although it has read before.
        self.share = "" if read_committed else "LOCK IN SHARE MODE"
        self.fetchone, self.fetchall = inner.fetchone, inner.fetchall
        self._deferred: list[str] = []
        self.counts: list[int] = []  # the rows matched by those that had waited

    def mogrify(self, statement: str, values: Values = ()) -> str:
        """The statement as it is sent."""
        return str(self._inner.mogrify(statement, values or None))

    def defer(self, statement: str, values: Values = ()) -> None:
        """Have it done before the next statement, which tells its errors too."""
        text = self.mogrify(statement, values)
        self._make_room(text)
        self._deferred.append(text)

    def rows(self, make: Callable[..., T], statement: str, *values: object) -> list[T]:
        """What `make` makes of each row."""
        self.execute(statement, values)
        return [make(*row) for row in self.fetchall()]

    def records(
        self, make: Callable[..., T], statement: str, *values: object
    ) -> list[T]:
        """Returns each row as what `make` makes of it, by the columns' names."""
        self.execute(statement, values)
        names = [column[0] for column in self._inner.description or ()]
        return [make(**dict(zip(names, row))) for row in self.fetchall()]

    def pairs(self, statement: str, *values: object) -> dict[K, V]:
        """Returns two columns as a dict."""
        self.execute(statement, values)
        return dict(self.fetchall())

    def value(self, statement: str, *values: object) -> object:
        """The one value of a one-row answer; None without a row."""
        self.execute(statement, values)
        row = self.fetchone()
        return row[0] if row else None

    def execute(self, statement: str, values: Values = ()) -> int:
        """How many rows it matched or returned."""
        text = self.mogrify(statement, values)
        self._make_room(text)
        return self._send(text)

    def _make_room(self, text: str) -> None:
        """Send what waits, if `text` is too much in one packet with it."""
        if (
            self._deferred
            and sum(map(sent_bytes, [*self._deferred, text])) > self._bytes_max
        ):
            self._send(self._deferred.pop())

    def _send(self, statement: str) -> int:
        """Send what waits and `statement` in one packet, and read all their answers."""
        texts, self._deferred = [*self._deferred, statement], []
        self._before(texts)
        self._inner.execute(";\n".join(texts))
        self.counts = []
        for text in texts[:-1]:
            self._answered(text)
            self.counts.append(self._inner.rowcount)
            self._inner.nextset()
        self._answered(statement)
        return self._inner.rowcount

    def _before(self, statements: Sequence[str]) -> None:
        """Called before these are sent."""

    def _answered(self, statement: str) -> None:
        """Called once the server has answered this one without an error."""


@dataclass
class Tries:
    """What one piece of work has met so far."""

    count: int = 0  # of those that failed
    since: float = 0.0  # the first of them
    begun: bool = False  # whether the present one has come to the work itself
    lost: bool = False  # one broke off after it had begun
    unsure: bool = False  # one sent a COMMIT that may stand: only `verify` can tell
    slow: int = 0  # so many in a row waited in vain for a statement of many bytes


class Commit(enum.Enum):
    """How far a transaction has come."""

    OPEN = "its COMMIT was not sent: nothing of it stands"
    SENT = "its COMMIT was sent and not answered: it may stand"
    ANSWERED = "its COMMIT was answered: it stands"


COMMIT = "COMMIT"


class Transaction(Cursor):
    """One try at a transaction, from its BEGIN to the answer to its COMMIT.

    Each try, and each look whether an earlier one stands, is an object of its own: what
    one has sent can never be taken for what another has.
    """

    def __init__(
        self, inner: cursors.Cursor, bytes_max: int, read_committed: bool, tries: Tries
    ) -> None:
        super().__init__(inner, bytes_max, read_committed)
        self.tries = tries
        self.commit = Commit.OPEN
        self.defer("BEGIN")

    def commit_with_next(self) -> None:
        """Have the COMMIT share the next statement's packet, before that statement."""
        self.defer(COMMIT)

    def finish(self) -> None:
        """Return once the server has answered the COMMIT."""
        if self.commit is not Commit.ANSWERED:
            self.execute(COMMIT)

    def _before(self, statements: Sequence[str]) -> None:
        if COMMIT in statements:
            self.commit = Commit.SENT

    def _answered(self, statement: str) -> None:
        if statement == COMMIT:
            self.commit = Commit.ANSWERED


@dataclass
class Route:
    """Which of several hosts comes first, for all connections of a process."""

    first: int = 0


class Database:
    """One connection to the database, made when first needed and again when lost."""

    def __init__(
        self,
        target: ConnectionInfo,
        policy: RetryPolicy,
        bare: bool = False,
        route: Route | None = None,
    ) -> None:
        self.target, self.policy = target, policy
        self.bare = bare  # connect without naming a database, before there is one
        self.route = route or Route()
        # Done before each try but the first, by itself: a worker's heartbeat.
        self.between_tries: Callable[[Cursor], object] | None = None
        self.packet_bytes = 1 << 20
        self.version = ""
        self.read_committed = True
        self._connection: Connection | None = None
        self._host = 0  # which one it goes to
        self._tls: ssl.SSLContext | None = None
        self._skip_locked: str | None = None
        self._away_since: float | None = None
        self._said_away = False

    def transact(
        self,
        work: Callable[[Transaction], T],
        verify: Callable[[Transaction], T | None] | None = None,
    ) -> T:
        """Do `work` in one transaction, the whole of it again where that is right.

        Returns only what a COMMIT was answered for, or what `verify` found: it looks
        with locking reads whether a COMMIT whose answer was lost was carried out, and
        gives what came of it, or None. Without it, `work` must bear to be done twice.
        Raises RowRefused, Unreachable (`sent`: may have been carried out) and other
        Problems.
        """
        tries = Tries()

        def attempt() -> T:
            tries.begun = False
            if tries.count and self.between_tries:
                self.between_tries(self._cursor())
            if tries.unsure and verify:
                found = self._carry_out(verify, Tries())
                if found is not None:
                    return found
                tries.unsure = False  # it does not stand, and never will
            return self._carry_out(work, tries)

        return self._retry(attempt, tries)

    def read(self, work: Callable[[Cursor], T]) -> T:
        """Do `work`, which changes nothing or one thing by one statement."""
        return self._retry(lambda: work(self._cursor()), Tries())

    def rows(self, make: Callable[..., T], statement: str, *values: object) -> list[T]:
        """What `make` makes of each row that one statement finds."""
        return self.read(lambda cursor: cursor.rows(make, statement, *values))

    def records(
        self, make: Callable[..., T], statement: str, *values: object
    ) -> list[T]:
        """Returns each row as what `make` makes of it, by the columns' names."""
        return self.read(lambda cursor: cursor.records(make, statement, *values))

    def run(self, statement: str, *values: object) -> int:
        """Change one thing by one statement, which twice must do no harm; how many."""
        return self.read(lambda cursor: cursor.execute(statement, values))

    def close(self) -> None:
        connection, self._connection, self._skip_locked = self._connection, None, None
        if connection:
            with contextlib.suppress(_Driver().MySQLError, OSError):
                connection.close()

    def skip_locked(self, cursor: Cursor) -> str:
        """SKIP LOCKED, where it is understood and locks anything; probed once."""
        if self._skip_locked is None:
            try:
                cursor.execute("SELECT 1 FROM queues LIMIT 1 FOR UPDATE SKIP LOCKED")
                self._skip_locked = "" if "TiDB" in self.version else "SKIP LOCKED"
            except _Driver().ProgrammingError:
                self._skip_locked = ""
        return self._skip_locked

    @property
    def mariadb(self) -> bool:
        return "MariaDB" in self.version

    def attempt(self, work: Callable[[Cursor], T]) -> T | None:
        """Try once to do what may as well fail; None if it did."""
        try:
            return work(self._cursor())
        except Problem:
            return None
        except _Driver().MySQLError as error:
            if classify_error(error)[0] is not ErrorClass.BUG:
                self.close()
            return None

    def sleep(self, seconds: int, note: str) -> bool:
        """Sleep in the server, listed there as `note`; whether KILL QUERY ended it."""

        def work(cursor: Cursor) -> bool:
            try:
                # MySQL answers 1, MariaDB with an error.
                return bool(cursor.value(f"SELECT SLEEP({seconds}) /* {note} */"))
            except _Driver().OperationalError as error:
                if error.args[0] != QUERY_KILLED:  # MariaDB
                    raise
                return True

        return self.read(work)

    def _carry_out(self, work: Callable[[Transaction], T], tries: Tries) -> T:
        """Do `work` in a transaction of its own, up to the answer to its COMMIT."""
        self._follow_route()
        self._connection = self._connection or self._connect()
        tries.begun = True
        transaction = Transaction(
            self._connection.cursor(),
            self.packet_bytes // 4,
            self.read_committed,
            tries,
        )
        try:
            result = work(transaction)
            transaction.finish()
            return result
        finally:
            # On an error after ANSWERED what came of it is not known: look, too.
            tries.unsure = transaction.commit is not Commit.OPEN

    def _cursor(self) -> Cursor:
        self._follow_route()
        self._connection = self._connection or self._connect()
        return Cursor(
            self._connection.cursor(), self.packet_bytes // 4, self.read_committed
        )

    def _follow_route(self) -> None:
        if self._connection and self._host != self.route.first:
            self.close()  # another connection of this process has left that host

    def _retry(self, attempt: Callable[[], T], tries: Tries) -> T:
        while True:
            try:
                result = attempt()
                self._came_back()
                return result
            except _Driver().MySQLError as error:
                self._on_failure(error, tries)
            except Exception:
                self.close()  # the next BEGIN would commit what was left half done
                raise

    def _on_failure(self, error: Exception, tries: Tries) -> None:
        """Clean up after a try that failed; return once it is time for another."""
        trouble, code = classify_error(error)
        if (
            trouble is ErrorClass.BUG
            and isinstance(error, _Driver().OperationalError)
            and (tries.unsure or math.isinf(self.policy.retry_for_s))
        ):
            # None that we know: after a COMMIT it may stand, and running jobs go on.
            trouble = ErrorClass.RECONNECT
        if tries.begun:
            slow = timed_out(error) and self._sent_bytes() > MANY_BYTES
            tries.slow = tries.slow + 1 if slow else 0
        self._roll_back(trouble, code)
        if trouble is ErrorClass.ROW:
            raise RowRefused(code, str(error.args[-1])) from None
        tries.count += 1
        tries.since = tries.since or time.monotonic()
        tries.lost = tries.lost or (tries.begun and trouble is ErrorClass.RECONNECT)
        hangs = (
            timed_out(error)
            or code in REFUSED_BY_CLUSTER
            or (tries.unsure and code == LOCK_WAIT_TIMEOUT)
        )  # a COMMIT holds it that hangs
        conflict = trouble is ErrorClass.REPEAT and code != LOCK_WAIT_TIMEOUT
        if hangs or (tries.count % TRIES_ON_A_HOST == 0 and not conflict):
            self._leave_host()
        self._back_off_or_raise(trouble, error, tries)

    def _sent_bytes(self) -> int:
        """Returns the size of the statement that was sent last."""
        return getattr(self._connection, "statement_bytes", 0)

    def _leave_host(self) -> None:
        """Begin with the next host from now on. Not after a mere reset: the next one
        may be a replica that somebody left writable."""
        if len(self.target.hosts) > 1:
            self.route.first = (self.route.first + 1) % len(self.target.hosts)
            self.close()

    def _roll_back(self, trouble: ErrorClass, code: int) -> None:
        """Leave no half-open transaction behind."""
        if code == BINLOG_NEEDS_REPEATABLE_READ and self.read_committed:
            self.read_committed = False
            self.policy.say(
                "the server's binlog_format is STATEMENT: claims wait for "
                "each other; set it to ROW or MIXED"
            )
        if trouble in (ErrorClass.REPEAT, ErrorClass.ROW) and self._connection:
            try:
                self._connection.rollback()
                return
            except _Driver().MySQLError:
                pass  # the connection died too: it is thrown away below
        self.close()

    def _back_off_or_raise(
        self, trouble: ErrorClass, error: Exception, tries: Tries
    ) -> None:
        """Pause before the next try, or raise what a person should read."""
        if trouble is ErrorClass.BUG:
            raise error
        problem = explain_error(self.target, error)
        problem.sent = tries.unsure or tries.lost
        hopeless = not math.isinf(self.policy.retry_for_s) and (
            trouble is ErrorClass.SETUP
            or (not self.target.explicit and _refused(error))
        )
        longest = min(LONGEST_PAUSE_S, self.policy.timeout_s / 4)  # far below a lease
        if trouble is ErrorClass.REPEAT:
            longest = 0.5
        pause = min(longest, 0.01 * 2 ** min(tries.count, 12)) * random.uniform(0.5, 1)
        if trouble is ErrorClass.CROWDED:
            pause += 0.2
        if hopeless or time.monotonic() - tries.since + pause > self.policy.retry_for_s:
            raise problem
        if trouble is not ErrorClass.REPEAT:
            self._went_away(problem)
        time.sleep(pause)

    def _went_away(self, problem: Problem) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if not self._said_away and now - self._away_since >= SAY_AFTER_S:
            self._said_away = True
            self.policy.say(f"{problem.what}; trying again")

    def _came_back(self) -> None:
        if self._said_away and self._away_since is not None:
            gone = say_duration(time.monotonic() - self._away_since)
            self.policy.say(f"the database is back after {gone}")
        self._away_since, self._said_away = None, False

    def _connect(self) -> Connection:
        """The first host that answers and takes writes, in the order of the route; with
        one host, that one."""
        hosts: Sequence[tuple[str, int]] = self.target.hosts or (("localhost", 0),)
        driver = _Driver()
        failure: Exception | None = None
        for step in range(len(hosts)):
            at = (self.route.first + step) % len(hosts)
            host, port = hosts[at]
            connection = None
            try:
                connection = self._open(host, port)
                if self._set_up_session(connection):
                    self._host = self.route.first = at
                    found, connection = connection, None
                    return found
                failure = failure or driver.OperationalError(
                    1290, f"{host}:{port} takes no writes"
                )
            except driver.MySQLError as error:
                failure = error
            except RuntimeError as error:  # caching_sha2_password without TLS says so
                failure = driver.OperationalError(2059, str(error))
            except (OSError, ValueError, IndexError) as error:  # not a MySQL's greeting
                failure = driver.OperationalError(2013, repr(error))
            finally:
                if connection:
                    with contextlib.suppress(driver.MySQLError, OSError):
                        connection.close()
        raise failure or AssertionError("no host")

    def _open(self, host: str, port: int) -> Connection:
        """A connection, with TLS as DB_SSL_MODE says."""
        mode = self.target.ssl_mode
        if self.target.socket or mode == "disabled":
            return self._connect_once(host, port, None)
        try:
            return self._connect_once(host, port, self._context())
        except _Driver().OperationalError as error:
            if mode != "preferred" or error.args[0] != 2026:
                raise
            return self._connect_once(host, port, None)

    def _connect_once(
        self, host: str, port: int, tls: ssl.SSLContext | None
    ) -> Connection:
        patience = max(1.0, min(5.0, self.policy.retry_for_s, self.policy.timeout_s))
        refuse: dict[str, Callable[[Connection], object]] = {
            "mysql_clear_password": RefuseClearText,
            "dialog": RefuseClearText,
        }
        return _Driver().connect(
            user=self.target.user,
            password=self.target.password.encode(),
            host=host,
            port=port,
            unix_socket=self.target.socket or None,
            charset="utf8mb4",
            database=None if self.bare else self.target.database,
            autocommit=True,
            client_flag=_FOUND_ROWS | _MULTI_STATEMENTS,
            auth_plugin_map=refuse,
            ssl=tls,
            ssl_disabled=tls is None,
            connect_timeout=patience,
            read_timeout=patience,
            write_timeout=patience,
        )

    def _context(self) -> ssl.SSLContext:
        """One TLS context for all connections: loading authorities costs 20 ms."""
        import ssl

        if self._tls is None:
            self._tls = context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = self.target.ssl_mode == "verify_identity"
            path = self.target.ssl_ca
            try:
                if self.target.ssl_mode not in ("verify_ca", "verify_identity"):
                    context.verify_mode = ssl.CERT_NONE
                elif path:
                    context.load_verify_locations(path)
                else:
                    context.load_default_certs()
            except OSError as error:  # ssl.SSLError is one
                raise Problem(
                    f"DB_SSL_CA: cannot use {path}: {error}", status=UNAVAILABLE
                ) from None
        return self._tls

    def _set_up_session(self, connection: Connection) -> bool:
        """Set up the session; False for one of several hosts that takes no writes now.

        A session that a partition left behind, with its locks, must not last.
        """
        cursor = Cursor(connection.cursor(), self.packet_bytes)
        cursor.execute(
            "SELECT VERSION(), @@max_allowed_packet, @@read_only, @@innodb_read_only"
        )
        version, self.packet_bytes, *read_only = cursor.fetchone() or ("", 0)
        self.version = str(version)
        several = len(self.target.hosts) > 1
        # Asked before the schema, which on a host that was left behind may be old.
        if several and not (takes_writes(read_only) and _can_commit(cursor)):
            return False
        timeout_s = self.policy.timeout_s
        if several:  # where a COMMIT hangs, there must be time to go to the next host
            timeout_s = min(timeout_s, max(1.0, self.policy.retry_for_s / 3))
        limit = f"max_{'statement' if self.mariadb else 'execution'}_time"
        lock_wait_s = max(1, min(10, int(timeout_s) - 1))
        cursor.execute(
            "SET SESSION sql_mode = 'STRICT_ALL_TABLES', "
            f"time_zone = '+00:00', {limit} = 0, completion_type = 0, "
            f"innodb_lock_wait_timeout = {lock_wait_s}, "
            f"wait_timeout = {int(4 * self.policy.timeout_s)}"
        )
        level = "READ COMMITTED" if self.read_committed else "REPEATABLE READ"
        cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
        if not self.bare:
            check_schema(cursor.value(SCHEMA_ROW), self.target.database)
        policy = dataclasses.replace(self.policy, timeout_s=timeout_s)
        connection.answer_s = policy.answer_s  # type: ignore[attr-defined]
        return True


def _can_commit(cursor: Cursor) -> bool:
    """Whether this server's cluster has a majority; True where that cannot be read.

    A member that lost the others says that it takes writes, and each COMMIT hangs.
    """
    galera = dict(
        cursor.rows(
            lambda name, value: (name, value),
            "SHOW STATUS WHERE Variable_name IN ('wsrep_ready', 'wsrep_provider_name')",
        )
    )
    if galera.get("wsrep_provider_name"):
        return galera.get("wsrep_ready") == "ON"
    try:
        cursor.execute(
            "SELECT COUNT(*), COALESCE(SUM(member_state = 'ONLINE'), 0) "
            "FROM performance_schema.replication_group_members "
            "WHERE member_state <> 'OFFLINE'"
        )
    except _Driver().MySQLError as error:
        if (
            classify_error(error)[0] is not ErrorClass.SETUP
        ):  # no such table, or no right to it
            raise
        return True
    members, online = cursor.fetchone() or (0, 0)
    return not members or 2 * online > members


def takes_writes(read_only: Sequence[object]) -> bool:
    """What a server's variables say: 0 or 1, or from MariaDB 12 on a word."""
    return all(str(value).upper() in ("0", "OFF") for value in read_only)


_TLS_OFFERED, _MULTI_STATEMENTS = 1 << 11, 1 << 16
_FOUND_ROWS = 2  # an UPDATE counts the rows it matched, changed or not


class _Driver:
    """PyMySQL's names that this room uses, loaded when first needed (40 to 70 ms)."""

    def __init__(self) -> None:
        try:
            import pymysql
        except ImportError as error:
            raise Problem(
                f"PyMySQL is missing for {sys.executable} ({error})",
                how_to_install(),
                UNAVAILABLE,
            ) from None
        self.version = ".".join(str(part) for part in pymysql.VERSION[:3])
        if pymysql.VERSION[:3] < PYMYSQL_NEEDED:
            needed = ".".join(map(str, PYMYSQL_NEEDED))
            raise Problem(
                f"PyMySQL {self.version} of {sys.executable} is too old: "
                f"{needed} is needed",
                how_to_install(),
                UNAVAILABLE,
            )

        class Connection(pymysql.connections.Connection):
            """Waits longer for many bytes; refuses plain text where TLS is asked."""

            answer_s: Callable[[int], float] | None = None  # None: while it is set up
            statement_bytes = 0  # of the statement sent last
            _sock: socket.socket | None
            _closed: bool

            def query(self, sql: str, unbuffered: bool = False) -> int:
                self.statement_bytes = len(sql)
                if self.answer_s:
                    allowed_s = self.answer_s(len(sql))
                    self._read_timeout = self._write_timeout = allowed_s
                return super().query(sql, unbuffered)

            def _force_close(self) -> None:
                # After an error: what is unsent is not to reach the server any more.
                if self._sock and not self._closed:
                    with contextlib.suppress(OSError):
                        self._sock.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                super()._force_close()  # type: ignore[misc]

            def _request_authentication(self) -> None:
                # Older PyMySQL would go on in plain text where TLS is not offered.
                offers: int = getattr(self, "server_capabilities")  # noqa: B009
                if self.ssl and not offers & _TLS_OFFERED:
                    raise pymysql.err.OperationalError(
                        2026, "the server does not offer TLS"
                    )
                super()._request_authentication()  # type: ignore[misc]

        self.connect = Connection
        self.MySQLError = pymysql.err.MySQLError
        self.OperationalError = pymysql.err.OperationalError
        self.ProgrammingError = pymysql.err.ProgrammingError


PYMYSQL_NEEDED = (1, 0, 2)
PACKAGES = {
    "apt-get": "apt install python3-pymysql",
    "dnf": "dnf install python3-PyMySQL",
    "apk": "apk add py3-pymysql",
    "zypper": "zypper install python3-PyMySQL",
    "pacman": "pacman -S python-pymysql",
}


def how_to_install() -> str:
    """How this system gets PyMySQL."""
    own = next((line for tool, line in PACKAGES.items() if shutil.which(tool)), "")
    return (
        "install it: "
        + f"{own}, or: " * bool(own)
        + f"{sys.executable} -m pip install PyMySQL"
    )


def use_own_environment() -> None:
    """Go on under the .venv beside the script, where PyMySQL is missing here."""
    import importlib.util

    folder = os.path.join(os.path.dirname(os.path.realpath(__file__)), ".venv")
    python = os.path.join(folder, "bin", "python3")
    if (
        importlib.util.find_spec("pymysql") is None
        and os.access(python, os.X_OK)
        and os.path.realpath(sys.prefix) != os.path.realpath(folder)
    ):
        os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])


def driver_version() -> str:
    try:
        return _Driver().version
    except Problem as problem:
        return "missing" if "missing" in problem.what else "too old"


def classify_error(error: Exception) -> tuple[ErrorClass, int]:
    """The class of a PyMySQL error, and its code."""
    import ssl

    code = error.args[0] if error.args and isinstance(error.args[0], int) else -1
    origin = getattr(error, "original_exception", None)
    if isinstance(origin, ssl.SSLCertVerificationError):  # PyMySQL says 2003: away
        return ErrorClass.SETUP, 2026
    if code == -1 and "Packet sequence" in str(error):
        return ErrorClass.RECONNECT, code
    return CLASS_OF_CODE.get(code, ErrorClass.BUG), code


def timed_out(error: Exception) -> bool:
    """Whether nothing came in time: the server hangs, or the wire to it is slow."""
    causes = (getattr(error, "original_exception", None), error.__context__)
    return any(isinstance(cause, socket.timeout) for cause in causes)


def _refused(error: Exception) -> bool:
    origin = getattr(error, "original_exception", None)
    return isinstance(origin, (ConnectionRefusedError, FileNotFoundError))


def explain_error(target: ConnectionInfo, error: Exception) -> Unreachable:
    """What a person should read about an error; no password in it."""
    code = classify_error(error)[1]
    text = str(error.args[-1]) if error.args else type(error).__name__
    text = text.translate(ESCAPES)  # a hostile server's too
    account = f"{target.user!r} (from {target.account_source})"
    place = f"{target} (from {target.source})"
    if code in (1045, 1698):
        what = f"the server refused the account {account}, {place}: {text}"
        hint = "check DB_USER and DB_PASSWORD"
    elif code in (1049, 1054, 1146):
        what = f"the queue's tables are missing in {place}: {text}"
        hint = "run: queuectl db init"
    elif code in (1044, 1142, 1143):
        what = f"the account {account} lacks a right in {place}: {text}"
        hint = (
            "grant it (README, Accounts), or use another account; an administrator "
            "makes the tables by: queuectl db schema | mysql -u root -p"
        )
    elif classify_error(error)[0] is ErrorClass.REPEAT:
        what = f"others hold locks in {place}: {text}"
        hint = "try again; a long transaction is in SHOW PROCESSLIST"
    elif code in (2026, 2059, 3159):
        what = f"no secure connection to {place}: {text}"
        hint = "check DB_SSL_MODE and DB_SSL_CA"
    elif _refused(error) and target.source == PRIVATE_FOLDER:
        what = f"the private server of {place} is stopped"
        hint = "run: queuectl db start"
    elif _refused(error) and not target.explicit:
        where = str(target).partition(" at ")[2]
        where += f" (from {target.source})" if target.source != "default" else ""
        what = (
            f"no database is configured, and no server answers at {where}; "
            "looked in the environment (DATABASE_URL, DB_HOST, DB_SOCKET), ./.env, "
            f".env beside the script, ./{PRIVATE_FOLDER} and MySQL's option files"
        )
        hint = (
            "set DB_HOST, DB_USER and DB_PASSWORD, or start a private server: "
            "queuectl db start"
        )
    else:
        what = f"cannot reach the database {place}: {text}"
        hint = "check that the server runs, and DB_HOST, DB_PORT and DB_SOCKET"
    return Unreachable(what, hint, UNAVAILABLE)


def schema_of(row: object, database: str) -> int:
    """The schema that a version row tells of; refused: newer than we may write."""
    words = str(row).split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise Problem(
            f"the database {database} has a config table without queuectl's "
            "schema version: it is not a queue",
            "name another database in DB_NAME",
            UNAVAILABLE,
        )
    version, oldest_writer = map(int, words)
    if oldest_writer > SCHEMA_VERSION:
        raise Problem(
            f"the tables in {database} are of schema {version}, newer than "
            f"this program ({VERSION}, schema {SCHEMA_VERSION})",
            "install the newer queuectl.py on this host",
            UNAVAILABLE,
        )
    return version


def check_schema(row: object, database: str) -> None:
    """Refuse tables that this program does not know."""
    version = schema_of(row, database)
    if version < SCHEMA_VERSION:
        raise Problem(
            f"the tables in {database} are of schema {version}, older than "
            f"this program needs ({SCHEMA_VERSION})",
            "run: queuectl db init",
            UNAVAILABLE,
        )


def placeholders(values: Collection[object]) -> str:
    return ", ".join(["%s"] * len(values))


def batched_inserts(
    cursor: Cursor,
    packet_bytes: int,
    head: str,
    rows: Iterable[tuple[str, Values]],
    tail: str,
) -> Iterator[str]:
    """INSERTs of `rows`, each (template, values), of a quarter packet at most."""
    limit, size = packet_bytes // 4, 0
    parts: list[str] = []
    for template, values in rows:
        part = cursor.mogrify(template, values)
        length = sent_bytes(part)
        if length > packet_bytes - 4096:  # sent, it would look like an outage
            raise _Driver().OperationalError(1153, f"a row of {length} bytes")
        if parts and (size + length > limit or len(parts) >= 1000):
            yield f"{head} {', '.join(parts)} {tail}"
            parts, size = [], 0
        parts.append(part)
        size += length + 2
    if parts:
        yield f"{head} {', '.join(parts)} {tail}"


def init_database(target: ConnectionInfo) -> str:
    """Create the database and its tables, or upgrade them; says what was done.

    Refused, with nothing changed: tables newer than this program, and a `jobs` table
    that is not ours. Two at once wait for each other by a named lock.
    """
    name, lock = quote_name(target.database), f"queuectl:{target.database}"[:64]

    def work(cursor: Cursor) -> str:
        if not cursor.value(
            "SELECT COUNT(*) FROM information_schema.schemata WHERE schema_name = %s",
            target.database,
        ):
            cursor.execute(
                f"CREATE DATABASE IF NOT EXISTS {name} "
                "DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
            )
        cursor.execute(f"USE {name}")
        if not cursor.value("SELECT GET_LOCK(%s, 10)", lock):
            raise Problem("another queuectl db init is at work", "try again soon")
        # While we wait for the end of a long transaction all others wait for us.
        cursor.execute("SET SESSION lock_wait_timeout = 1")
        found = _existing_schema(cursor, target.database)
        if found <= SCHEMA_VERSION:
            _upgrade(cursor, found)
        done = (
            f"{SCHEMA_VERSION} created"
            if not found
            else f"{found} is there already"
            if found >= SCHEMA_VERSION
            else f"{found} upgraded to {SCHEMA_VERSION}"
        )
        return f"schema {done} in {target}"

    # Closing lets the lock go.
    with contextlib.closing(Database(target, UPGRADING, bare=True)) as database:
        return database.read(work)


def _existing_schema(cursor: Cursor, database: str) -> int:
    """0: there is none, or one whose making broke off."""
    tables = cursor.rows(
        str,
        "SELECT table_name FROM information_schema.tables WHERE table_schema = %s",
        database,
    )
    if "config" in tables:
        version = cursor.value(SCHEMA_ROW)
        if (
            version is not None
            or "jobs" in tables
            or cursor.rows(str, "SELECT value FROM config LIMIT 1")
        ):
            return schema_of(version, database)
    elif "jobs" in tables:
        raise Problem(
            f"{database} has a jobs table that is not queuectl's: nothing was changed",
            "name another database in DB_NAME",
            UNAVAILABLE,
        )
    return 0


def _upgrade(cursor: Cursor, found: int) -> None:
    """Add what is missing. Broken off, it is done again from its beginning."""
    for statement in schema_statements():
        cursor.execute(statement)
    for step in UPGRADES:
        there = cursor.rows(
            str,
            "SELECT 1 FROM information_schema.columns WHERE table_schema = "
            "DATABASE() AND (table_name, column_name) = (%s, %s) UNION ALL "
            "SELECT 1 FROM information_schema.statistics WHERE table_schema = "
            "DATABASE() AND (table_name, index_name) = (%s, %s)",
            *step.adds * 2,
        )
        if found < step.to and not there:
            cursor.execute(step.statement)
    cursor.execute(
        "UPDATE config SET value = %s WHERE `key` = 'schema_version'",
        (f"{SCHEMA_VERSION}/{OLDEST_WRITER}",),
    )


# ---- job model ---------------------------------------------------------------
#
# What a job may say, and how its row looks to us. Whatever a person or a
# program hands in is checked here, key by key, before anything is stored;
# whatever is read becomes a record whose fields make the SELECT list. Nothing
# here asks the database.

COMMAND_BYTES_MAX = 131000  # the kernel takes 131,071 bytes in one argument
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*")
NAMED = "letters, digits and ._:@+-, the first a letter or digit"
NOT_BLANK = re.compile(r"\s*[^\s\0][^\0]*")  # and without NUL
DATABASE_TIME = "%Y-%m-%d %H:%M:%S.%f"

# -- the keys of a job

def _text(form: re.Pattern[str], bytes_max: int, expects: str) -> ValueType[str]:
    """Returns the type of texts that have this form and at most so many bytes."""
    def convert(text: str) -> str:
        if not form.fullmatch(text) or len(text.encode()) > bytes_max:
            raise ValueError(text)
        return text
    return ValueType(convert, expects)

def _read_time(text: str) -> str:
    """Returns UTC, as the database writes it, from ISO 8601 with a zone.

    A time without a zone is a Problem that shows both readings.
    """
    # Python before 3.11 does not know the Z of ISO 8601.
    moment = datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    if moment.tzinfo is None:
        utc, here = f"{moment.isoformat()}Z", moment.astimezone().isoformat()
        raise Problem(f"the time {excerpt(text)} has no time zone",
                      f"say {utc} for UTC, or {here} for this host's time",
                      USAGE)
    return moment.astimezone(datetime.timezone.utc).strftime(DATABASE_TIME)

def _read_env(text: str) -> str:
    """Returns the canonical JSON of an object of strings."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(text) from None
    if not isinstance(found, dict):
        raise ValueError(text)
    for name, value in found.items():
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(text)
        if not re.fullmatch(r"[^=\0]+", name):
            raise ValueError(text)
        # A lone surrogate cannot be encoded, which is a ValueError too.
        (name + value).encode()
    # Canonical, since it is signed.
    return json.dumps(found, sort_keys=True, separators=(",", ":"),
                      ensure_ascii=False)

def _read_code_list(text: str) -> str:
    codes = read_codes(re.sub(r"^\[(.*)\]$", r"\1", text))
    return ",".join(map(str, sorted(codes)))

def _read_ids(text: str) -> list[str]:
    """Returns the ids of a JSON array, or the one id that the text is."""
    found = json.loads(text) if text.startswith("[") else [text]
    if not all(isinstance(one, str) for one in found):
        raise ValueError(text)
    return [JOB_ID.convert(one) for one in found]

QUEUE_NAME = _text(NAME, 64, f"1 to 64 {NAMED}")
JOB_ID = _text(NAME, 128, f"1 to 128 {NAMED}")
JOB_IDS = ValueType(_read_ids, "a list of job ids", (list, str))
COMMAND = _text(
    NOT_BLANK, COMMAND_BYTES_MAX,
    f"a command of 1 to {COMMAND_BYTES_MAX} bytes of UTF-8 without NUL")
DIRECTORY = _text(NOT_BLANK, 4096, "a path without NUL")
UNIQUE_KEY = _text(re.compile(r"\S(.*\S)?"), 128, "a key of 1 to 128 bytes")
TIME = ValueType(_read_time, "a time such as 2026-11-24T10:00:00Z")
ENV = ValueType(_read_env, "an object of strings", (dict,))
EXIT_CODE_LIST = ValueType(_read_code_list, EXIT_CODES.expects, (list, str))

class Key(NamedTuple):
    """One key of a job: what it takes, its help, and its option's placeholder."""
    kind: ValueType[object]
    help: str
    metavar: str

JOB_KEYS = {
    "id": Key(JOB_ID, "its name; made when not given", "ID"),
    "command": Key(COMMAND, "what /bin/sh -c runs", "CMD"),
    "max_retries": Key(whole(0, 1000), "retries after the first run", "N"),
    "priority": Key(whole(-1000000, 1000000), "higher runs first", "N"),
    "queue": Key(QUEUE_NAME, "the line it waits in", "NAME"),
    "delay": Key(duration(), "not before this much time has passed", "D"),
    "run_at": Key(TIME, "not before this time", "TIME"),
    "timeout": Key(duration(), "a run's time limit, else job_timeout; 0: none",
                   "D"),
    "cwd": Key(DIRECTORY, "directory it runs in", "DIR"),
    "env": Key(ENV, "variable to add to its environment (repeatable)",
               "NAME=VALUE"),
    "backoff_base": Key(number(1, 1000), "its own backoff_base", "X"),
    "permanent_exit_codes": Key(
        EXIT_CODE_LIST, "exit codes after which it is not retried", "CODES"),
    "on_lost": Key(choice("retry", "dead"),
                   "if its worker is lost: retry or dead", "WHAT"),
    "after": Key(JOB_IDS, "a job that must complete first (repeatable)", "ID"),
    "after_any": Key(JOB_IDS, "a job that must end first (repeatable)", "ID"),
    "unique": Key(UNIQUE_KEY, "only if no job with this key lives", "KEY"),
    "on_failure": Key(COMMAND, "a command to enqueue if it dies", "CMD"),
}
# How a key's value is written into the row; the others go in as they are.
EXPRESSIONS = {"delay": "UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND"}
COLUMN_OF = {"delay": "next_run_at", "run_at": "next_run_at",
             "unique": "unique_key"}
TIMES = {"delay", "run_at"}
# These become rows of the table `dependencies`, with what they ask of the
# parent.
NEEDS = {"after_any": "ended", "after": str(State.COMPLETED)}
REPEATABLE = {"env", *NEEDS}
SIGNED = ("id", "command", "cwd", "env", "on_failure")
JobValues = Mapping[str, object]

def new_id() -> str:
    """Returns a time-ordered UUID (version 7 of RFC 9562).

    Rows that come in the order of their ids fill the index page by page;
    random ids would touch a page each.
    """
    moment = f"{time.time_ns() // 1_000_000:012x}"
    noise = os.urandom(10).hex()
    variant = "89ab"[int(noise[3], 16) % 4]
    return (f"{moment[:8]}-{moment[8:]}-7{noise[:3]}-"
            f"{variant}{noise[4:7]}-{noise[7:19]}")

def check_job(document: object, defaults: JobValues) -> dict[str, object]:
    """Returns the checked values of a JSON job; `defaults` fill what it leaves
    out.

    Whatever is wrong with it is a Problem that names the key.
    """
    if not isinstance(document, dict):
        raise Problem(f"a job is a JSON object, not {excerpt(document)}",
                      status=USAGE)
    values: dict[str, object] = {}
    for name, value in document.items():
        if name not in JOB_KEYS:
            hint = nearest(name, JOB_KEYS) or f"keys: {' '.join(JOB_KEYS)}"
            raise Problem(f"unknown key {excerpt(name)}", hint, USAGE)
        values[name] = JOB_KEYS[name].kind.read_json(value, name)
    return complete_job(values, defaults)

def complete_job(values: dict[str, object], defaults: JobValues) -> dict[str, object]:
    """Returns `values` with `defaults`, an id, an absolute directory and a state."""
    timed = TIMES & values.keys()
    for name, value in defaults.items():
        # A delay that the job names is not to meet a run_at of the defaults.
        if not (timed and name in TIMES):
            values.setdefault(name, value)
    if "command" not in values:
        raise Problem("command: missing", 'say {"command": "…"}', USAGE)
    if values.keys() >= TIMES:
        raise Problem("delay and run_at: give only one", status=USAGE)
    values.setdefault("id", new_id())
    if "cwd" in values:
        values["cwd"] = absolute(str(values["cwd"]))
    _set_state(values)
    return values

def _set_state(values: dict[str, object]) -> None:
    """Says in which state the job begins, where that is not `pending`."""
    if "delay" in values:
        values["delay"] = round(float(str(values["delay"])) * 1e6)
        if not values["delay"]:
            del values["delay"]
    if TIMES & values.keys():
        values["state"] = State.SCHEDULED
    if any(values.get(name) for name in NEEDS):
        values["state"] = State.BLOCKED

def parse_json(text: str) -> object:
    """Returns the JSON document; a Problem for what is none, or names a key twice."""
    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")
    def no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found
    try:
        return json.loads(text, parse_constant=no_constant,
                          object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        example = """enqueue '{"command":"echo hello"}'"""
        raise Problem(f"not JSON: {excerpt(str(error), 200)}",
                      f"quote it for the shell: {example}", USAGE) from None

def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []

def env_of(text: object) -> dict[str, str]:
    """Returns the variables that a row's `env` names; none where it is not JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(str(text or "{}"))
        if isinstance(found, dict):
            return {name: str(value) for name, value in found.items()}
    return {}

def batched(items: Iterable[T], size: int = 1000) -> Iterator[list[T]]:
    """Yields the items in lists of at most `size`."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch

# -- a run's output, as it is kept

DETAIL_MAX, LAST_LINE_MAX = 1024, 255
Ended = Tuple[Claim, RunOutcome]

def cut_mark(total: int) -> bytes:
    return b"\n[queuectl: %d bytes in all, the middle is left out]\n" % total

def output_since(kept: bytes, total: int, seen: int) -> bytes:
    """Returns what follows the first `seen` bytes of a stream of `total`
    bytes.

    `kept` is what OutputBuffer.kept left of the stream. Let it be `abcde`, the
    cut mark and `vwxyz`, of 26 letters: who has seen 3 gets `de`, the mark and
    `vwxyz`; who has seen 23 gets `xyz`, for those are in the part after the
    mark.
    """
    if total <= seen:
        return b""
    head, mark, tail = kept.partition(cut_mark(total))
    new = total - seen
    if not mark:
        return head[-new:]
    if new <= len(tail):
        return tail[-new:]
    return head[seen:] + mark + tail

def without_output(outcome: RunOutcome, why: str) -> RunOutcome:
    """Returns the outcome of a run whose output cannot be stored.

    Its detail says so, in ASCII, which no server refuses.
    """
    detail = f"{outcome.detail}; output not stored: {why}".lstrip("; ")
    detail = detail.encode("ascii", "replace").decode()
    return dataclasses.replace(outcome, output=b"", detail=detail)

def last_line(outcome: RunOutcome) -> str | None:
    """Returns the last line that says something, for the dead letter."""
    text = outcome.output[-4096:].decode("utf-8", "replace").strip()
    line = text.split("\n")[-1].strip() or outcome.detail
    return line[:LAST_LINE_MAX] or None

# -- rows as records

Moment = Optional[datetime.datetime]

def say_time(moment: object) -> str | None:
    """Returns a DATETIME of the database in ISO 8601, UTC."""
    if not isinstance(moment, datetime.datetime):
        return None
    return moment.isoformat(timespec="milliseconds") + "Z"

def as_json(record: object, *but: str) -> dict[str, Json]:
    """Returns a dataclass as a JSON object, its times as text, without fields `but`."""
    found: dict[str, Json] = {}
    for name, value in vars(record).items():
        if name not in but:
            is_time = isinstance(value, datetime.datetime)
            found[name] = say_time(value) if is_time else value
    return found

class ClaimedJob(NamedTuple):
    """A claimed job: what to run, and how."""
    claim: Claim
    command: str
    queue: str
    cwd: str | None
    env: str | None
    on_failure: str | None
    signature: str | None
    timeout_s: float
    timeout_name: str  # which setting gave the time limit

@dataclass(frozen=True)
class JobRow:
    """A job as people see it; settings fill what it leaves open."""
    seq: int
    id: str
    command: str
    queue: str
    state: str
    priority: int
    attempts: int
    max_attempts: int
    max_retries: int
    timeout: float
    next_run_at: Moment
    created_at: Moment
    started_at: Moment
    finished_at: Moment
    duration: float | None
    exit_code: int | None
    reason: str | None
    worker: str | None

    def as_json(self) -> dict[str, Json]:
        return as_json(self, "seq", "max_attempts")

def job_columns(settings: Settings) -> str:
    """Returns the SELECT list of a JobRow, from `jobs`."""
    retries = settings.max_retries
    expressions = {
        "max_attempts": "COALESCE(jobs.max_attempts, jobs.max_retries + 1, "
                        f"{retries + 1})",
        "max_retries": f"COALESCE(jobs.max_retries, {retries})",
        "timeout": f"COALESCE(jobs.timeout, {settings.job_timeout})",
    }
    columns = []
    for field in dataclasses.fields(JobRow):
        expression = expressions.get(field.name, f"jobs.{field.name}")
        columns.append(f"{expression} AS {field.name}")
    return ", ".join(columns)

@dataclass(frozen=True)
class RunRecord:
    """One run of a job's history."""
    run: int
    attempt: int
    worker: str | None
    started_at: Moment
    finished_at: Moment
    duration: float | None
    exit_code: int | None
    reason: str | None
    detail: str | None

class JobDetails(NamedTuple):
    """A job with all that is known of it; `output` is its last run's."""
    row: JobRow
    cwd: str | None
    env: dict[str, str]
    after: list[str]
    history: list[RunRecord]
    output: bytes

class ActionResult(NamedTuple):
    """What came of a verb on one job."""
    id: str
    ok: bool
    state: str | None
    error: str | None
    note: str = ""

class SqlCondition(NamedTuple):
    """A condition, and the values that are bound into it."""
    where: str
    values: Sequence[object]

class LockedJob(NamedTuple):
    """A job's row, locked by us."""
    seq: int
    state: State
    runs: int

def no_such_job(job_id: str) -> Problem:
    return Problem(f"no such job: {excerpt(job_id, 140)}", "see: queuectl list")

def abbreviated(names: Sequence[str]) -> str:
    """Returns the first five of `names`, and how many more there are."""
    shown = ", ".join(names[:5])
    if len(names) > 5:
        shown += f" and {len(names) - 5} more"
    return shown


# ---- transitions -------------------------------------------------------------
#
# The one writer of `jobs.state`. A move names its transition, and its WHERE is
# built from TRANSITIONS: the states that it may leave and, for a run, the
# token. So a worker that lost a run changes nothing, whatever it believes.
# With a job's end come its history, its dead letter, and what becomes of the
# jobs that wait for it.

class Sql(NamedTuple):
    """An SQL expression as a column's new value, with what is bound into it."""
    text: str
    values: Sequence[object] = ()

NOW_SQL = Sql("UTC_TIMESTAMP(6)")
# Purge looks for what ended by next_run_at, which is indexed: never later than
# the end.
NOT_LATER_SQL = Sql("LEAST(next_run_at, UTC_TIMESTAMP(6))")

def move(cursor: Cursor, name: str, seqs: Sequence[int], *,
         tokens: Collection[str] | None = None, to: State | None = None,
         **columns: object) -> int:
    """Moves jobs by one transition, and returns how many it moved.

    Left alone is what is not in a state that the transition may leave or,
    where it needs one, does not carry one of `tokens`. `columns` are set
    along, from the row as it was: the state itself is written last.
    """
    statement, values = _move_sql(name, to, columns)
    where, bound = _guard_sql(name, tokens)
    return cursor.execute(f"{statement} {where} AND seq IN %s",
                          [*values, *bound, list(seqs)])

def defer_move(cursor: Cursor, name: str, seqs: Sequence[int], *,
               tokens: Collection[str] | None = None, to: State | None = None,
               **columns: object) -> None:
    """Does the same, in the next statement's packet: for rows that we have locked."""
    statement, values = _move_sql(name, to, columns)
    where, bound = _guard_sql(name, tokens)
    cursor.defer(f"{statement} {where} AND seq IN %s",
                 [*values, *bound, list(seqs)])

def defer_claim(cursor: Cursor, seqs: Sequence[int], token: str, worker: str) -> None:
    """Claims jobs that we have locked, in the next statement's packet."""
    statement, values = _move_sql("claim", None, _claim_columns(token, worker))
    where, bound = _guard_sql("claim", None)
    cursor.defer(f"{statement} {where} AND seq IN %s",
                 [*values, *bound, list(seqs)])

def claim_next(cursor: Cursor, condition: SqlCondition, limit: int, token: str,
               worker: str) -> int:
    """Claims the first `limit` jobs of `condition`, in their order; returns
    how many.

    It finds and takes them in one UPDATE, which is right on any server: the
    claim where SKIP LOCKED is missing.
    """
    columns = _claim_columns(token, worker)
    statement, values = _move_sql("claim", None, columns, index="jobs_claim")
    where, bound = _guard_sql("claim", None)
    return cursor.execute(
        f"{statement} {where} AND {condition.where} "
        f"ORDER BY claim_order, seq LIMIT {limit}",
        [*values, *bound, *condition.values])

def _claim_columns(token: str, worker: str) -> dict[str, object]:
    """Returns what a claim sets beside the state.

    `attempts` rises here and not at the end, so that a job which kills its
    worker runs out of attempts, too. `runs` only ever rises, and numbers the
    history.
    """
    return {
        "token": token,
        "worker": worker,
        "attempts": Sql("attempts + 1"),
        "runs": Sql("runs + 1"),
        "started_at": NOW_SQL,
        "finished_at": None,
        "duration": None,
        "exit_code": None,
        "reason": None,
        "cancel_requested_at": None,
    }

def _move_sql(name: str, to: State | None, columns: Mapping[str, object],
              index: str = "PRIMARY") -> tuple[str, list[object]]:
    """Returns UPDATE … SET of a transition, and what is bound into it."""
    rule = TRANSITIONS[name]
    to = to or rule.to
    if to not in rule.leads_to:
        raise AssertionError(f"{name} leads to {rule.leads_to}, not to {to}")
    assignments: list[str] = []
    values: list[object] = []
    for column, value in {**columns, "state": to}.items():
        if isinstance(value, Sql):
            assignments.append(f"{column} = {value.text}")
            values += value.values
        else:
            assignments.append(f"{column} = %s")
            values.append(value)
    # MySQL with near-empty statistics took another index for rows named by
    # seq.
    return (f"UPDATE jobs FORCE INDEX ({index}) SET {', '.join(assignments)}",
            values)

def _guard_sql(name: str, tokens: Collection[str] | None) -> tuple[str, list[object]]:
    """Returns the WHERE of a transition, and what is bound into it."""
    rule = TRANSITIONS[name]
    states = [str(state) for state in State if state in rule.leaves]
    if not rule.needs_token:
        return "WHERE state IN %s", [states]
    if tokens is None:
        raise AssertionError(f"{name} needs the tokens of the runs")
    return "WHERE state IN %s AND COALESCE(token, '') IN %s", [states, list(tokens)]

# -- settling what has ended

HISTORY_KEPT = 20

class Settlement(NamedTuple):
    """One ended run, and what it makes of its job."""
    claim: Claim
    outcome: RunOutcome
    transition: Transition

    @property
    def to(self) -> State:
        return TRANSITIONS[self.transition.name].to

class RunLock(NamedTuple):
    """A running job's row, locked by us, as far as its settlement depends on it."""
    seq: int
    token: str
    cancelled: bool
    has_children: bool

def lock_runs(cursor: Cursor, seqs: Sequence[int]) -> dict[tuple[int, str], RunLock]:
    """Locks the rows of running jobs, and returns them by (seq, token)."""
    found = cursor.records(
        RunLock,
        """
        SELECT seq, token, cancel_requested_at IS NOT NULL AS cancelled, has_children
          FROM jobs FORCE INDEX (PRIMARY)
         WHERE seq IN %s AND state = 'processing'
         ORDER BY seq
           FOR UPDATE
        """, seqs)
    return {(one.seq, one.token): one for one in found}

def decide_settlement(claim: Claim, outcome: RunOutcome,
                      settings: Settings) -> Settlement:
    """Returns what an ended run makes of its job, as the claim now stands."""
    transition = decide_transition(claim, outcome, settings, random.random())
    if claim.cancel_requested:
        outcome = dataclasses.replace(outcome, reason=Reason.CANCELLED)
    return Settlement(claim, outcome, transition)

def settle(cursor: Cursor, packet_bytes: int,
           settlements: Sequence[Settlement]) -> None:
    """Writes what became of ended runs, whose rows we have locked.

    Runs that ended alike share one UPDATE: of a thousand jobs that complete,
    64 a turn, this costs 16 statements and not a thousand.
    """
    alike: dict[tuple[object, ...], list[Settlement]] = {}
    for one in settlements:
        key = (one.transition, one.outcome.exit_code, one.outcome.reason)
        alike.setdefault(key, []).append(one)
    for group in alike.values():
        _settle_alike(cursor, group)
    write_history(cursor, packet_bytes,
                  [(one.claim, one.outcome) for one in settlements])
    for one in settlements:
        _forget_old_runs(cursor, one.claim)
    dead = {one.claim.seq: last_line(one.outcome) for one in settlements
            if one.to is State.DEAD}
    if dead:
        write_dead_letters(cursor, dead)
    release_children(cursor, [one.claim.seq for one in settlements
                              if one.claim.has_children and one.to in ENDED])

def _settle_alike(cursor: Cursor, group: Sequence[Settlement]) -> None:
    """Moves jobs whose runs ended in the same way; their durations alone differ."""
    first = group[0]
    transition, outcome = first.transition, first.outcome
    seqs = [one.claim.seq for one in group]
    next_run_at, attempts = Sql("next_run_at"), Sql("attempts")
    if first.to in (State.PENDING, State.FAILED):
        wait_us = round(transition.wait_s * 1e6)
        next_run_at = Sql("UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND", [wait_us])
    if transition.name == "hand back":
        attempts = Sql("attempts - 1")
    defer_move(
        cursor, transition.name, seqs,
        tokens={one.claim.token for one in group},
        next_run_at=next_run_at,
        finished_at=NOW_SQL,
        duration=Sql(f"ELT(FIELD(seq, {placeholders(seqs)}), {placeholders(seqs)})",
                     [*seqs, *(one.outcome.duration_s for one in group)]),
        attempts=attempts,
        max_attempts=Sql("COALESCE(%s, max_attempts)", [transition.max_attempts]),
        losses=transition.losses,
        exit_code=outcome.exit_code,
        reason=outcome.reason,
        token=None,
        cancel_requested_at=None)

def _forget_old_runs(cursor: Cursor, claim: Claim) -> None:
    if claim.run > HISTORY_KEPT:
        cursor.defer("DELETE FROM runs WHERE job_seq = %s AND run <= %s",
                     (claim.seq, claim.run - HISTORY_KEPT))

def write_history(cursor: Cursor, packet_bytes: int, found: Iterable[Ended]) -> None:
    """Writes a row for each run that ended; for one that goes on, its output so far."""
    rows = []
    for claim, outcome in found:
        finished_at = "UTC_TIMESTAMP(6)" if outcome.reason else "NULL"
        template = f"(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, {finished_at})"
        # A path that is not UTF-8 may stand in it.
        detail = outcome.detail.encode(errors="backslashreplace").decode()
        rows.append((template, (
            claim.seq, claim.run, claim.attempts, claim.worker, claim.started_at,
            outcome.duration_s, outcome.exit_code, outcome.reason,
            detail[:DETAIL_MAX] or None, outcome.output or None,
            outcome.output_bytes)))
    # A late flush of output must not take away what is there.
    inserts = batched_inserts(
        cursor, packet_bytes,
        "INSERT INTO runs (job_seq, run, attempt, worker, started_at, duration, "
        "exit_code, reason, detail, output, output_bytes, finished_at) VALUES",
        rows,
        """
        ON DUPLICATE KEY UPDATE finished_at = VALUES(finished_at),
            duration = VALUES(duration), exit_code = VALUES(exit_code),
            reason = VALUES(reason), detail = VALUES(detail),
            output = COALESCE(VALUES(output), output),
            output_bytes = GREATEST(VALUES(output_bytes), output_bytes)
        """)
    for insert in inserts:
        cursor.defer(insert)

# -- dead letters

class DyingJob(NamedTuple):
    """What the command for a job's failure is made of, and told."""
    id: str
    queue: str
    command: str
    cwd: str | None
    env: str | None
    on_failure: str
    signature: str | None
    attempts: int
    reason: str | None
    exit_code: int | None
    last_line: str | None

def write_dead_letters(cursor: Cursor, dead: Mapping[int, str | None]) -> None:
    """Writes the dead letters of jobs that have just died, each with its last
    line.

    A job that was dead before, and revived by hand, may have one: it is
    written over.
    """
    seqs, lines = list(dead), list(dead.values())
    cursor.defer(
        f"""
        INSERT INTO dlq (job_seq, id, exit_code, reason, last_line)
        SELECT seq, id, exit_code, reason,
               ELT(FIELD(seq, {placeholders(seqs)}), {placeholders(lines)})
          FROM jobs FORCE INDEX (PRIMARY)
         WHERE seq IN %s
            ON DUPLICATE KEY UPDATE died_at = UTC_TIMESTAMP(6),
               job_seq = VALUES(job_seq), id = VALUES(id),
               exit_code = VALUES(exit_code), reason = VALUES(reason),
               last_line = VALUES(last_line)
        """, [*seqs, *lines, seqs])
    dying = cursor.records(
        DyingJob,
        f"""
        SELECT jobs.id, queue, command, cwd, env, on_failure, signature, attempts,
               dlq.reason, dlq.exit_code, last_line
          FROM jobs JOIN dlq ON job_seq = seq
         WHERE seq IN %s AND LENGTH(on_failure) BETWEEN 1 AND {COMMAND_BYTES_MAX}
        """, seqs)
    for job in dying:
        # What nobody with the key has signed must not become a signed command.
        if is_signed(job.signature, job.id, job.command, job.cwd, job.env,
                     job.on_failure):
            _enqueue_on_failure(cursor, job)

def _enqueue_on_failure(cursor: Cursor, job: DyingJob) -> None:
    """Enqueues the command that a job named for its failure.

    It gets the same queue, directory and variables, and is told of the job by
    more.
    """
    told = {"ID": job.id, "QUEUE": job.queue, "ATTEMPTS": job.attempts,
            "REASON": job.reason, "EXIT_CODE": job.exit_code,
            "LAST_LINE": job.last_line}
    variables = env_of(job.env)
    for name, value in told.items():
        if value is not None:
            variables[f"QUEUECTL_PARENT_{name}"] = str(value)
    row = (new_id(), job.on_failure, job.cwd, json.dumps(variables))
    signature = sign(*row, None) if signing_key() else None
    cursor.defer("INSERT INTO jobs (id, command, cwd, env, queue, signature) "
                 "VALUES %s", [(*row, job.queue, signature)])

# -- dependents

# What a child needs of a parent has come about; or can never come about.
MET_SQL = """(parents.state = 'completed' OR (needs = 'ended' AND
          parents.state IN ('dead', 'cancelled')))"""
HOPELESS_SQL = "(needs = 'completed' AND parents.state IN ('dead', 'cancelled'))"
PARENTS_SQL = "dependencies JOIN jobs AS parents ON parents.seq = parent"

class BlockedJob(NamedTuple):
    """A blocked job: how many of its parents it waits for, and which are hopeless."""
    seq: int
    unmet: int
    hopeless: int
    why: str | None  # which parent will never end as it should
    later: bool  # it has a later time of its own

def release_children(cursor: Cursor, ended: Collection[int]) -> None:
    """Has what waits for these ended jobs run, or die with them, down the chain."""
    while ended:
        children = cursor.rows(
            int, "SELECT DISTINCT child FROM dependencies WHERE parent IN %s "
            f"ORDER BY child {cursor.share}", ended)
        died: list[int] = []
        for batch in batched(children):
            died += resolve_blocked(cursor, batch)
        ended = died

def resolve_blocked(cursor: Cursor, seqs: Sequence[int]) -> list[int]:
    """Releases blocked jobs that wait for nothing more; those that never can
    run die.

    Returns the seqs of the latter. The children are written before their
    parents are read: so of two who settle two parents at once, the second
    waits here for the first, and then sees what that one did.
    """
    if not seqs:
        return []
    cursor.defer("UPDATE jobs FORCE INDEX (PRIMARY) SET touched = touched + 1 "
                 "WHERE state = 'blocked' AND seq IN %s", [list(seqs)])
    found = cursor.records(
        BlockedJob,
        f"""
        SELECT child AS seq, SUM(NOT {MET_SQL}) AS unmet,
               SUM({HOPELESS_SQL}) AS hopeless,
               CONCAT('waited for ', MIN(IF({HOPELESS_SQL}, CONCAT(
                      parents.id, ', which was ', parents.state), NULL))) AS why,
               MAX(jobs.next_run_at > UTC_TIMESTAMP(6)) AS later
          FROM {PARENTS_SQL} JOIN jobs ON jobs.seq = child
         WHERE jobs.state = 'blocked' AND child IN %s
         GROUP BY child {cursor.share}
        """, seqs)
    for name, later in (("release", False), ("defer", True)):
        free = [job.seq for job in found if not job.unmet and bool(job.later) is later]
        if free:
            defer_move(cursor, name, free)
    dead = {job.seq: job.why for job in found if job.hopeless}
    if dead:
        defer_move(cursor, "die unrun", list(dead), reason=Reason.DEPENDENCY,
                   finished_at=NOW_SQL, next_run_at=NOT_LATER_SQL)
        write_dead_letters(cursor, dead)
    return list(dead)


# ---- enqueue -----------------------------------------------------------------
#
# A job's way into the table. Everything is checked and spooled before the first INSERT:
# a bad line refuses the whole input, and a pipe cannot be read again. The id is made
# before the INSERT, so that a repeat is recognised.

STAGED, STAGED_FROM, RELEASED_AT_ONCE = "staged ", 200_000, 2000


class Spool:
    """Checked jobs on disk: a million of them take no memory."""

    def __init__(self) -> None:
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._count = 0
        self._shapes: dict[tuple[str, ...], int] = {}  # which keys a job names
        self.columns: list[str] = []
        self.first_id, self.linked = "", False  # linked: some wait for others
        self.queues: set[str] = set()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, object]]:
        for shape, values in self._read():
            yield dict(zip(shape, values))

    def _read(self) -> Iterator[tuple[tuple[str, ...], list[object]]]:
        shapes = list(self._shapes)
        self._file.seek(0)
        for line in self._file:
            shape, *values = json.loads(line)
            yield shapes[shape], values

    def add(self, values: JobValues) -> None:
        if signing_key():
            values = {**values, "signature": sign(*map(values.get, SIGNED))}
        shape = self._shapes.get(tuple(values))
        if shape is None:
            shape = self._shapes[tuple(values)] = len(self._shapes)
            named = [COLUMN_OF.get(name, name) for name in values if name not in NEEDS]
            self.columns += [name for name in named if name not in self.columns]
            self.linked = self.linked or bool(NEEDS.keys() & values.keys())
            self.first_id = self.first_id or str(values["id"])
        self._file.write(json.dumps([shape, *values.values()]) + "\n")
        self.queues.add(str(values.get("queue", "default")))
        self._count += 1

    def rows(
        self, batch: str, staged: Mapping[str, str]
    ) -> Iterator[tuple[str, list[object]]]:
        """The VALUES template of each job, DEFAULT where it says nothing; values.

        What would be pending gets what `staged` says.
        """
        templates: dict[tuple[str, ...], tuple[str, list[int]]] = {}
        for shape, values in self._read():
            if shape not in templates:
                said = {
                    COLUMN_OF.get(name, name): name
                    for name in shape
                    if name not in NEEDS
                }
                literal = {} if "state" in said else staged
                columns = list(dict.fromkeys([*self.columns, *staged]))
                parts = [
                    EXPRESSIONS.get(said[column], "%s")
                    if column in said
                    else literal.get(column, "DEFAULT")
                    for column in columns
                ]
                order = [shape.index(said[one]) for one in columns if one in said]
                templates[shape] = f"({', '.join(parts)}, '{batch}')", order
            template, order = templates[shape]
            yield template, [values[at] for at in order]


def spool_lines(file: Iterable[bytes], as_json: bool, defaults: JobValues) -> Spool:
    """Every line of `file` as a job; a bad one is named by its number."""
    spool, kind = Spool(), JOB_KEYS["command"].kind
    plain = {} if as_json else complete_job({"command": ""}, defaults)
    for position, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8-sig" if position == 1 else "utf-8").rstrip("\r\n")
            if as_json:
                spool.add(check_job(parse_json(line), defaults))
            else:
                spool.add(
                    {
                        **plain,
                        "id": defaults.get("id") or new_id(),
                        "command": kind.read(line, "command"),
                    }
                )
        except UnicodeDecodeError:
            raise Problem(
                f"line {position}: not UTF-8; nothing was enqueued", status=USAGE
            ) from None
        except Problem as problem:
            raise Problem(
                f"line {position}: {problem.what}; nothing was enqueued",
                problem.hint,
                USAGE,
            ) from None
    return spool


def prefetch(items: Iterator[str]) -> Iterator[str]:
    """The same items, each made by a thread while the one before it is used."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as maker:
        item = maker.submit(next, items, "")
        while found := item.result():
            item = maker.submit(next, items, "")
            yield found


def enqueue(database: Database, spool: Spool, if_absent: bool) -> dict[str, str]:
    """Commit all jobs of the spool, or none.

    `if_absent` passes over ids and unique keys in use: for each such key the id of
    the job that was to have it, and of the one that has it.
    """
    batch = secrets.token_hex(8)
    staged: dict[str, str] = {}
    moment = f"9000-01-01 00:00:00.{int(batch, 16) % 10**6:06}"
    if len(spool) > STAGED_FROM:
        staged = {"state": f"'{State.BLOCKED}'", "next_run_at": f"'{moment}'"}
    columns = ", ".join(dict.fromkeys([*spool.columns, *staged]))
    head = f"INSERT INTO jobs ({columns}, batch) VALUES"
    tail = "ON DUPLICATE KEY UPDATE batch = jobs.batch" if if_absent else ""

    def work(cursor: Cursor) -> dict[str, str]:
        rows = spool.rows(batch, staged)
        made = batched_inserts(cursor, database.packet_bytes, head, rows, tail)
        for one in prefetch(made) if len(spool) > 1000 else made:
            cursor.execute(one)
        if staged:
            cursor.execute(
                "INSERT INTO config (`key`, value) VALUES (%s, %s) "
                "ON DUPLICATE KEY UPDATE value = VALUES(value)",
                (STAGED + batch, moment),
            )
        if spool.linked:
            add_dependencies(cursor, spool, batch)
        return dict(key_holders(cursor, spool)) if if_absent else {}

    def verify(cursor: Cursor) -> dict[str, str] | None:
        ours = "SELECT seq FROM jobs WHERE id = %s AND batch = %s FOR UPDATE"
        return {} if cursor.value(ours, spool.first_id, batch) else None

    try:
        held = database.transact(work, None if if_absent else verify)
    except Unreachable as problem:
        if problem.sent:
            also = f" and {len(spool) - 1} more" if len(spool) > 1 else ""
            problem.hint = (
                f"unknown whether accepted: id {spool.first_id}{also}; "
                "repeat with --if-absent"
            )
        raise
    except RowRefused as refused:
        raise _explain_refusal(database, refused, spool) from None
    with contextlib.suppress(Problem):  # it is accepted: else the workers do the rest
        released = len(staged)
        while released:
            released = database.transact(
                lambda cursor: release_staged(cursor, STAGED + batch, moment)
            )
    return held


def key_holders(cursor: Cursor, spool: Spool) -> Iterator[tuple[str, str]]:
    """For each job whose unique key another job has: its id, and the other's."""
    for page in batched(
        (str(job["unique"]), str(job["id"])) for job in spool if "unique" in job
    ):
        keys = dict(page)
        found = dict(
            cursor.rows(
                lambda *row: row,
                "SELECT live_key, id FROM jobs WHERE live_key IN %s",
                [*keys],
            )
        )
        yield from (
            (job_id, holder)
            for key, job_id in page
            if (holder := found.get(key, job_id)) != job_id
        )


def release_staged(cursor: Cursor, key: str, moment: str) -> int:
    """Make some jobs of a staged batch pending; how many, 0 once it is done with.

    A huge enqueue would lie in the claims' way for as long as it is not committed. So
    its rows are blocked, where no claim comes by, and one config row tells of them.
    """
    blocked = "FROM jobs FORCE INDEX (jobs_due) WHERE state = 'blocked' AND next_run_at"
    seqs = cursor.rows(
        int,
        f"SELECT seq {blocked} = %s ORDER BY seq LIMIT {RELEASED_AT_ONCE} FOR UPDATE",
        moment,
    )
    if seqs:
        return move(cursor, "release", seqs, next_run_at=Sql("created_at"))
    cursor.execute("DELETE FROM config WHERE `key` = %s", (key,))
    return 0


def _explain_refusal(database: Database, refused: RowRefused, spool: Spool) -> Problem:
    taken = re.search(r"Duplicate entry '(.*)' for key", refused.text)
    if refused.code != 1062 or not taken:
        return Problem(
            f"the server refused a job: {refused.text}", "nothing was enqueued", USAGE
        )
    hint = "nothing was enqueued; --if-absent passes over ids and keys in use"
    if "jobs_live_key" in refused.text:
        holders = dict(database.read(lambda cursor: list(key_holders(cursor, spool))))
        for job in spool:
            if job["id"] in holders:
                return Problem(
                    f"key {job['unique']} is held by job {holders[str(job['id'])]}",
                    hint,
                )
        return Problem(f"key {taken[1]} stands twice in the input", hint)
    states = database.rows(
        "a {} job has it".format, "SELECT state FROM jobs WHERE id = %s", taken[1]
    )
    return Problem(
        f"id {taken[1]} is taken: "
        f"{states[0] if states else 'it stands twice in the input'}",
        hint,
    )


def add_dependencies(cursor: Cursor, spool: Spool, batch: str) -> None:
    """Enter what the spool's jobs wait for, and decide which of them need not.

    A parent is an older row, so no cycle can be made. Its row is locked, and marked,
    from here to the COMMIT: whoever settles it comes before that, or sees the mark.
    """
    edges = (
        (str(job["id"]), str(parent), needs)
        for job in spool
        for key, needs in NEEDS.items()
        for parent in as_list(job.get(key))
    )
    for page in batched(edges):
        ours, old = (
            dict(
                cursor.rows(
                    lambda *row: row,
                    "SELECT id, seq FROM jobs FORCE INDEX (jobs_id) "
                    f"WHERE {only} id IN %s ORDER BY seq FOR UPDATE",
                    [edge[end] for edge in page],
                )
            )
            for end, only in enumerate((f"batch = '{batch}' AND", ""))
        )
        rows = []
        for child, parent, needs in page:
            if child in ours:  # else it was there already
                if old.get(parent, ours[child]) >= ours[child]:
                    raise Problem(
                        f"job {child} cannot wait for {parent}: there is no "
                        "such job before it",
                        "a finished one may have been purged; nothing was enqueued",
                        USAGE,
                    )
                rows.append((old[parent], ours[child], needs))
        if rows:
            cursor.defer(
                "UPDATE jobs FORCE INDEX (PRIMARY) SET has_children = 1 "
                "WHERE seq IN %s",
                [[row[0] for row in rows]],
            )
            cursor.defer(
                "INSERT INTO dependencies (parent, child, needs) VALUES "
                f"{placeholders(rows)} ON DUPLICATE KEY UPDATE "
                "needs = VALUES(needs)",
                rows,
            )
    for ids in batched(str(job["id"]) for job in spool if any(map(job.get, NEEDS))):
        release_children(
            cursor,
            resolve_blocked(
                cursor,
                cursor.rows(
                    int,
                    "SELECT seq FROM jobs FORCE INDEX (jobs_id) WHERE batch = %s AND "
                    "id IN %s",
                    batch,
                    ids,
                ),
            ),
        )


# ---- claim -------------------------------------------------------------------
#
# Taking pending jobs for one worker: how much of each queue may run, marking
# rows with a fresh token, and reading back after COMMIT which of them really
# carry it. Only those may start: that holds even where SKIP LOCKED locks
# nothing. SKIP LOCKED is for speed.

SLOW_CLAIM_S = 0.02
# How many jobs of a queue may run at once; NULL: there is no limit.
QUEUE_LIMIT_SQL = "IF(paused_at IS NULL, max_running, 0)"

class WorkerIdentity(NamedTuple):
    """One worker process, as its row describes it."""
    id: str
    host: str
    pid: int
    supervisor: int
    process_identity: str  # boot, PID namespace and start time
    slots: int
    queues: tuple[str, ...]  # none: all

class Candidate(NamedTuple):
    """A pending job in the order of claims."""
    seq: int
    losses: int
    claim_order: int

class Position(NamedTuple):
    """Where a claim in a queue ended; the next one may go on behind it."""
    claim_order: int
    seq: int

class QueueCapacity(NamedTuple):
    """How many more jobs of a limited queue may run now; NULL: any number."""
    name: str
    free: int | None

class Claimer:
    """Claims jobs for one worker, turn by turn.

    `token` is that of the present turn, `seqs` are the rows that it has marked
    so far.
    """
    def __init__(self, database: Database, identity: WorkerIdentity,
                 use_skip_locked: bool) -> None:
        """`use_skip_locked` is False where a person has switched it off."""
        self.token = ""
        self.seqs: list[int] = []
        self._database, self._identity = database, identity
        self._use_skip_locked = use_skip_locked
        self._queues: list[str] = list(identity.queues)
        self._limits: dict[str, int | None] = {}
        self._positions: dict[str, Position] = {}

    def begin_turn(self) -> None:
        """Makes the token for what this turn claims: random, and never used again."""
        self.token = secrets.token_hex(8)
        self.begin_try()

    def begin_try(self) -> None:
        """Forgets what an earlier try of the same turn marked: it was rolled back."""
        self.seqs = []

    def read_limits(self, cursor: Cursor) -> None:
        """Learns which queues have a limit, or are paused."""
        self._limits = cursor.pairs(
            f"SELECT name, {QUEUE_LIMIT_SQL} FROM queues "
            "WHERE paused_at IS NOT NULL OR max_running IS NOT NULL")

    def start_over(self) -> None:
        """Has the next claims begin at the head of each queue again."""
        self._positions.clear()

    def claim(self, cursor: Cursor, wanted: int, idle: bool, looks: bool) -> None:
        """Marks up to `wanted` jobs with the token, shared over the queues
        with some.

        `idle`: the worker runs nothing; `looks`: it looks around in this turn.
        """
        if not self._identity.queues and (looks or not self._queues):
            self._queues = queues_with(cursor, State.PENDING)
        if not self._queues:
            return
        # Each turn begins with another queue, so that none is always the last.
        self._queues.append(self._queues.pop(0))
        capacity = self._free_capacity(cursor)
        open_queues = [name for name in self._queues if capacity.get(name) != 0]
        if not open_queues:
            return
        # First to each queue its share, rounded up; then the rest to who has
        # more.
        share = -(-wanted // len(open_queues))
        for at_most in sorted({share, wanted}):
            for name in open_queues:
                before = len(self.seqs)
                limit = min(at_most, wanted - before, capacity.get(name, wanted))
                if limit > 0 and not self._claim_from_queue(cursor, name, limit, idle):
                    return
                if name in capacity:
                    capacity[name] -= len(self.seqs) - before

    def read_back(self, cursor: Cursor, settings: Settings) -> list[ClaimedJob]:
        """Returns the jobs that carry our token after COMMIT; only these may start."""
        if not self.seqs:
            return []
        condition = SqlCondition("seq IN %s AND token = %s ORDER BY claim_order, seq",
                                 [self.seqs, self.token])
        return read_processing(cursor, settings, "PRIMARY", condition)

    def _free_capacity(self, cursor: Cursor) -> dict[str, int]:
        """Returns how many more jobs of each limited queue may run, by
        counting.

        Where there seems to be room, the queue's row is written, then counted
        again: of two who would fill the last slot, the second waits here, and
        sees what the first took.
        """
        capacity = {name: 0 for name in self._queues if name in self._limits}
        names = [name for name in capacity if self._limits[name] != 0]
        if names:
            names = self._count_free(cursor, names, capacity)
        if names:
            # Not SKIP LOCKED: who skips loses the slot that has just become
            # free.
            cursor.defer("UPDATE queues SET touched = touched + 1 WHERE name IN %s "
                         "ORDER BY name", [names])
            self._count_free(cursor, names, capacity)
        return capacity

    @staticmethod
    def _count_free(cursor: Cursor, names: Sequence[str],
                    capacity: dict[str, int]) -> list[str]:
        """Counts what these queues have free; returns those that have some."""
        found = cursor.records(
            QueueCapacity,
            f"""
            SELECT name, {QUEUE_LIMIT_SQL} - (
                       SELECT COUNT(*) FROM jobs FORCE INDEX (jobs_claim)
                        WHERE queue = name AND state = 'processing' {cursor.share}
                   ) AS free
              FROM queues WHERE name IN %s {cursor.share}
            """, names)
        for one in found:
            # The limit may have gone since we learnt of it.
            capacity[one.name] = sys.maxsize if one.free is None else max(0, one.free)
        return [one.name for one in found if capacity[one.name]]

    def _claim_from_queue(self, cursor: Cursor, name: str, wanted: int,
                          idle: bool) -> bool:
        """Marks jobs of one queue; returns False if nothing beside them may be
        claimed.

        A job that must run alone is taken only by a process with no other run;
        one that has others takes nothing behind it, so that it comes to that.
        """
        if not self._use_skip_locked or not self._database.skip_locked(cursor):
            return self._claim_by_update(cursor, name, wanted, idle)
        seqs: list[int] = []
        alone = False
        candidates, slow = self._candidates(cursor, name, wanted)
        for job in candidates:
            if slow:
                self._positions[name] = Position(job.claim_order, job.seq)
            alone = job.losses >= ALONE_AFTER_LOSSES
            if not alone or (idle and not seqs and not self.seqs):
                seqs.append(job.seq)
            if alone:
                break
        if seqs:
            defer_claim(cursor, seqs, self.token, self._identity.id)
            self.seqs += seqs
        return not alone

    def _candidates(self, cursor: Cursor, name: str,
                    wanted: int) -> tuple[list[Candidate], bool]:
        """Locks and returns the next pending jobs of a queue, and if that was
        slow.

        Under a long snapshot (a mysqldump) the index keeps the entries of
        claimed rows, and a claim walks over them all. So where a claim was
        slow, the next one starts where it ended, until the worker looks around
        again; that finds what has a higher priority, too.
        """
        condition, values = "", [name]
        reached = self._positions.get(name)
        if reached:
            order, seq = reached
            later = f"claim_order = {order} AND seq > {seq}"
            condition = f"AND (claim_order > {order} OR ({later}))"
        started = time.monotonic()
        found = cursor.records(
            Candidate,
            f"""
            SELECT seq, losses, claim_order FROM jobs FORCE INDEX (jobs_claim)
             WHERE state = 'pending' AND queue = %s {condition}
             ORDER BY claim_order, seq LIMIT {wanted}
               FOR UPDATE SKIP LOCKED
            """, *values)
        took_s = time.monotonic() - started
        return found, bool(reached) or took_s > SLOW_CLAIM_S

    def _claim_by_update(self, cursor: Cursor, name: str, wanted: int,
                         idle: bool) -> bool:
        """Claims without SKIP LOCKED: by one guarded UPDATE, then a read by
        token.

        A job that must run alone waits until a process is idle and nothing
        else waits.
        """
        ordinary = SqlCondition(f"queue = %s AND losses < {ALONE_AFTER_LOSSES}", [name])
        alone = SqlCondition(f"queue = %s AND losses >= {ALONE_AFTER_LOSSES}", [name])
        worker = self._identity.id
        claimed = claim_next(cursor, ordinary, wanted, self.token, worker)
        if not claimed and idle and not self.seqs:
            claim_next(cursor, alone, 1, self.token, worker)
        losses: dict[int, int] = cursor.pairs(
            "SELECT seq, losses FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'processing' AND token = %s", self.token)
        self.seqs = list(losses)
        return all(count < ALONE_AFTER_LOSSES for count in losses.values())

def queues_with(cursor: Cursor, state: State) -> list[str]:
    """Returns the queues that have jobs in this state, by one index seek each.

    SELECT DISTINCT would read the whole range: 75 ms for 500,000 rows, and not
    0.2.
    """
    names: list[str] = []
    last = ""
    while True:
        found = cursor.rows(
            str, "SELECT queue FROM jobs FORCE INDEX (jobs_claim) WHERE state = %s "
            "AND queue > %s ORDER BY queue LIMIT 1", state, last)
        if not found:
            return names
        last = found[0]
        names.append(last)

@dataclass(frozen=True)
class ProcessingRow:
    """A job in `processing`, column by column, with the settings in its NULLs."""
    seq: int
    id: str
    token: str
    runs: int
    attempts: int
    max_attempts: int
    losses: int
    backoff_base: float
    on_lost: str
    cancel_requested: bool
    has_children: bool
    worker: str
    started_at: object
    permanent_exit_codes: str | None
    command: str
    queue: str
    cwd: str | None
    env: str | None
    on_failure: str | None
    signature: str | None
    timeout_s: float
    timeout_name: str

    def claimed_job(self, settings: Settings) -> ClaimedJob:
        """Returns the same as what a worker runs and settles."""
        claim = Claim(
            self.seq, self.id, self.token, self.runs, self.attempts, self.max_attempts,
            self.losses, self.backoff_base, self.on_lost, self.cancel_requested,
            self.has_children, self.worker, self.started_at,
            self._permanent_codes(settings))
        return ClaimedJob(
            claim, self.command, self.queue, self.cwd, self.env, self.on_failure,
            self.signature, self.timeout_s, self.timeout_name)

    def _permanent_codes(self, settings: Settings) -> frozenset[int]:
        """Returns its own codes; the setting's where it names none, or nonsense."""
        if self.permanent_exit_codes is not None:
            with contextlib.suppress(ValueError):
                return read_codes(self.permanent_exit_codes)
        return settings.permanent_exit_codes

def read_processing(cursor: Cursor, settings: Settings, index: str,
                    condition: SqlCondition) -> list[ClaimedJob]:
    """Returns the processing jobs that `condition` names."""
    expressions = {
        "token": "COALESCE(token, '')",
        "max_attempts": "COALESCE(max_attempts, max_retries + 1, "
                        f"{settings.max_retries + 1})",
        "backoff_base": f"GREATEST(1, COALESCE(backoff_base, {settings.backoff_base}))",
        "on_lost": f"COALESCE(on_lost, '{settings.on_lost}')",
        "cancel_requested": "cancel_requested_at IS NOT NULL",
        "worker": "COALESCE(worker, '')",
        "timeout_s": f"COALESCE(timeout, {settings.job_timeout})",
        "timeout_name": "IF(timeout IS NULL, 'setting job_timeout', "
                        "'the job''s timeout')",
    }
    columns = []
    for field in dataclasses.fields(ProcessingRow):
        columns.append(f"{expressions.get(field.name, field.name)} AS {field.name}")
    rows = cursor.records(
        ProcessingRow,
        f"SELECT {', '.join(columns)} FROM jobs FORCE INDEX ({index}) "
        f"WHERE state = 'processing' AND {condition.where}", *condition.values)
    return [row.claimed_job(settings) for row in rows]


# ---- leases ------------------------------------------------------------------
#
# Who is alive. A worker raises the heartbeat in its row; the failure detectors
# of the others watch it stand still or move, by their own clocks alone. What a
# lost worker ran is taken over: settled as lost, by one transaction that locks
# its row first. A worker that was declared lost changes nothing any more, and
# is told so by its next heartbeat.

class FailureDetector:
    """Which workers are lost, told by their heartbeats and by our own clock
    alone.

    A worker is lost when its heartbeat stood still for its whole lease, during
    which all our own came through, none more than two heartbeats apart. So an
    outage, a stall, a suspended host or a stepped clock starts the count again
    for everyone.
    """
    def __init__(self) -> None:
        # By worker and heartbeat: when we first saw it.
        self._seen_at: dict[tuple[str, int], float] = {}
        self._last = -math.inf

    def observe(self, now: float, heartbeats: Mapping[str, tuple[int, float]],
                heartbeat_s: float) -> dict[str, int]:
        """Returns the lost workers, each with its last heartbeat.

        `heartbeats` gives of each the heartbeat and its lease in seconds;
        `heartbeat_s` is the longest time between two of our own.
        """
        if now - self._last > 2 * heartbeat_s:
            self._seen_at.clear()
        self._last = now
        seen_at = {}
        lost = {}
        for worker, (heartbeat, lease_s) in heartbeats.items():
            since = self._seen_at.get((worker, heartbeat), now)
            seen_at[worker, heartbeat] = since
            if now - since >= lease_s:
                lost[worker] = heartbeat
        self._seen_at = seen_at
        return lost

def register(database: Database, identity: WorkerIdentity, lease_s: float) -> None:
    """Enters a worker's row; the same row twice is one."""
    database.run(
        """
        INSERT INTO workers (id, host, pid, supervisor, process_identity, slots,
                             queues, lease_s)
        VALUES %s ON DUPLICATE KEY UPDATE slots = VALUES(slots)
        """,
        (identity.id, identity.host, identity.pid, identity.supervisor,
         identity.process_identity, identity.slots,
         ",".join(identity.queues) or None, lease_s))

def deregister(database: Database, worker_id: str) -> None:
    """Removes the row of a worker that has nothing left to run."""
    database.run("DELETE FROM workers WHERE id = %s", worker_id)

def take_over(database: Database, settings: Settings, worker: str | None,
              heartbeat: int | None) -> int | None:
    """Settles the runs of a lost worker as lost.

    Returns how many they were, or None if it is not lost. One transaction
    locks its row, checks that its heartbeat still is `heartbeat` (None: that
    it has no live row; -1: whatever it is), and marks it lost.
    """
    def work(cursor: Cursor) -> int | None:
        """Does it in the order of all transactions: the worker's row, then its runs."""
        # A worker whose row is locked is in a turn right now: it is not dead.
        # One that is known to be dead has left a lock at most, and that is
        # waited for.
        detected = heartbeat is not None and heartbeat >= 0
        skip = database.skip_locked(cursor) if detected else ""
        found = cursor.value(
            "SELECT beat FROM workers WHERE id <=> %s AND lost_at IS NULL "
            f"FOR UPDATE {skip}", worker)
        if heartbeat not in (-1, found):
            return None
        cursor.execute(
            "UPDATE workers SET lost_at = UTC_TIMESTAMP(6), state = 'lost' "
            "WHERE id <=> %s AND lost_at IS NULL", (worker,))
        jobs = read_processing(cursor, settings, "jobs_due",
                               SqlCondition("worker <=> %s FOR UPDATE", [worker]))
        lost = RunOutcome(Reason.LOST)
        settle(cursor, database.packet_bytes,
               [decide_settlement(job.claim, lost, settings) for job in jobs])
        return len(jobs)
    return database.transact(work)

class LiveWorker(NamedTuple):
    """A worker that nobody has declared lost, and the process that it says it is."""
    id: str
    pid: int
    process_identity: str

def exited_local_workers(
        database: Database,
        has_exited: Callable[[int, str], bool]) -> dict[str, list[str]]:
    """Returns the workers whose process is gone, each with the run tags of its
    runs.

    `has_exited` tells by pid and process identity, and only of processes of
    this host.
    """
    workers = database.records(
        LiveWorker,
        "SELECT id, pid, process_identity FROM workers WHERE lost_at IS NULL")
    exited = {}
    for worker in workers:
        if has_exited(worker.pid, worker.process_identity):
            exited[worker.id] = database.rows(
                "{}-{}".format,
                "SELECT token, seq FROM jobs FORCE INDEX (jobs_due) "
                "WHERE state = 'processing' AND worker = %s", worker.id)
    return exited


# ---- maintenance -------------------------------------------------------------
#
# What the workers do now and then, each in a transaction of its own beside the
# turn: delete what ended long ago, and look again at jobs that wait for
# others. One process of each supervisor does it, in small batches, so that no
# claim waits for it.

PURGED_AT_ONCE, PURGE_PAUSE_S = 500, 600.0
RECHECKED_AT_ONCE = 500
DATETIME_MIN = datetime.datetime(1000, 1, 1)

def ended_before(state: State) -> str:
    """Returns the condition of jobs that may be purged; it takes a moment
    twice.

    They are in this state, ended before that moment, and no blocked job waits
    for them. By next_run_at they are found, which is indexed, and never later
    than their end.
    """
    return (f"state = '{state}' AND next_run_at < %s AND finished_at < %s "
            "AND NOT EXISTS (SELECT 1 FROM dependencies JOIN jobs AS waiting "
            "ON waiting.seq = child WHERE parent = jobs.seq "
            "AND waiting.state = 'blocked')")

def purge(database: Database, state: State, before: str) -> int:
    """Deletes a batch of jobs with their history and dead letters; returns how
    many.

    `before` is a moment, as the database writes it.
    """
    def work(cursor: Cursor) -> int:
        """The jobs are locked first; one that others hold is left for next time."""
        seqs = cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) "
            f"WHERE {ended_before(state)} "
            f"ORDER BY next_run_at LIMIT {PURGED_AT_ONCE} "
            f"FOR UPDATE {database.skip_locked(cursor)}", before, before)
        if seqs:
            cursor.defer("DELETE FROM runs WHERE job_seq IN %s", [seqs])
            cursor.defer("DELETE FROM dlq WHERE job_seq IN %s", [seqs])
            cursor.defer("DELETE FROM jobs WHERE seq IN %s", [seqs])
            cursor.defer("DELETE FROM dependencies WHERE parent IN %s", [seqs])
            cursor.defer("DELETE FROM dependencies WHERE child IN %s", [seqs])
        return len(seqs)
    return database.transact(work)

class Maintenance:
    """When each of these was done last, and how far it came."""
    def __init__(self, database: Database) -> None:
        self._database = database
        self._purge_at = self._recheck_at = 0.0
        # The last blocked job looked at: its time, and its seq.
        self._rechecked = (DATETIME_MIN, 0)

    def run(self, settings: Settings) -> None:
        """Does a batch of what is due."""
        if time.monotonic() >= self._purge_at:
            self._purge_old(settings)
        if time.monotonic() >= self._recheck_at:
            self._recheck_blocked(settings)

    def _purge_old(self, settings: Settings) -> None:
        """Deletes a batch in each state that is not kept for ever."""
        kept_s = {
            State.COMPLETED: settings.retain_completed,
            State.DEAD: settings.retain_dead,
            State.CANCELLED: settings.retain_cancelled,
        }
        pause_s, full = PURGE_PAUSE_S, False
        for state, age_s in kept_s.items():
            if age_s:
                [before] = self._database.rows(
                    str, "SELECT UTC_TIMESTAMP(6) - INTERVAL %s SECOND", age_s)
                full |= purge(self._database, state, before) == PURGED_AT_ONCE
                # Ten times within the shortest retention, at most once a
                # second.
                pause_s = min(pause_s, max(age_s / 10, 1.0))
        self._purge_at = time.monotonic() + (0.0 if full else pause_s)

    def _recheck_blocked(self, settings: Settings) -> None:
        """Resolves some blocked jobs once more: the net, should a wake-up be
        lost.

        It walks through all of them, batch by batch, then pauses.
        """
        after, seq = self._rechecked
        found = self._database.rows(
            lambda at, number: (at, number),
            "SELECT next_run_at, seq FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'blocked' AND next_run_at BETWEEN %s AND '9000-01-01' "
            "AND (next_run_at > %s OR seq > %s) "
            f"ORDER BY next_run_at, seq LIMIT {RECHECKED_AT_ONCE}",
            after, after, seq)
        self._rechecked, pause_s = (DATETIME_MIN, 0), 10 * settings.heartbeat
        if len(found) == RECHECKED_AT_ONCE:
            self._rechecked, pause_s = found[-1], 0.0
        self._recheck_at = time.monotonic() + pause_s
        if found:
            seqs = [number for _, number in found]
            self._database.transact(lambda cursor: release_children(
                cursor, resolve_blocked(cursor, seqs)))


# ---- turn --------------------------------------------------------------------
#
# One round of a worker with the database: at most one transaction, always in
# the same lock order, which `TurnTaker._transaction` shows. Around it, now and
# then, a look at the queue by one statement. A batch grows with the load by
# itself: all that ended since the last turn is settled in this one, and as
# much is claimed as there are slots.

RELEASED_WHEN_DUE = 500
# How soon to look again for due rows that another worker is about to release.
OTHERS_RELEASE_S = 0.05

@dataclass(frozen=True)
class TurnRequest:
    """What a worker wants of one turn."""
    ended: Sequence[Ended] = ()
    flushes: Sequence[Ended] = ()  # output so far of runs that go on
    running: Collection[tuple[int, str]] = ()  # (seq, token) of the runs that go on
    free: int = 0  # how many jobs it may claim
    look: bool = False  # for cancellations, settings, due jobs and new queues
    detect: bool = False  # raise the heartbeat in any case, and look for lost workers
    drain: bool = False  # say whether anything is left to run
    state: str = "running"

@dataclass
class QueueSnapshot:
    """What a worker reads when it looks around."""
    config: dict[str, str]
    runs: dict[tuple[int, str], bool]  # ours, and whether each is to be cancelled
    others_cancelled: bool  # a run of another worker is to be cancelled
    waiting: bool  # there are pending jobs
    due_s: float  # until the next scheduled or failed job is due
    heartbeats: dict[str, tuple[int, float]]  # of the others, each with its lease
    orphaned: list[str | None]  # workers that have runs and no live row
    expired: list[str]  # workers that were lost a day ago
    staged: list[str]  # the keys in `config` of batches still to be released
    drained: bool = False

@dataclass(frozen=True)
class TurnResult:
    """What came of a turn."""
    alive: bool = True  # False: we were declared lost, and nothing else was done
    jobs: Sequence[ClaimedJob] = ()
    snapshot: QueueSnapshot | None = None
    due_s: float = math.inf  # until the next scheduled or failed job is due
    settlements: Sequence[Settlement] = ()
    notes: Sequence[str] = ()  # for the log
    unsettled: Sequence[Ended] = ()  # what one turn could not carry: for the next
    unflushed: Collection[tuple[int, str]] = ()  # (seq, token) of the same
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    orphaned: Sequence[str | None] = ()

# -- looking around

# Four columns, all of them text: what the row tells of, then up to three
# values of it.
#   config     a setting's key and its value
#   run        token and seq of a run of ours, and 1 if it is to be cancelled
#   cancelled  the same of another worker's run that is to be cancelled
#   waiting    there is a pending job that we serve
#   due        microseconds until a scheduled, or a failed, job is due
SNAPSHOT_SQL = """
SELECT 'config' AS what, CAST(`key` AS CHAR) AS one, CAST(value AS CHAR) AS two,
       NULL AS three FROM config
UNION ALL
SELECT IF(worker = %s, 'run', 'cancelled'), CAST(token AS CHAR), CAST(seq AS CHAR),
       CAST(cancel_requested_at IS NOT NULL AS CHAR)
  FROM jobs FORCE INDEX (jobs_due)
 WHERE state = 'processing' AND (worker = %s OR cancel_requested_at IS NOT NULL)
UNION ALL
(SELECT 'waiting', NULL, NULL, NULL FROM jobs FORCE INDEX (jobs_claim)
  WHERE state = 'pending' {served} LIMIT 1)
UNION ALL
(SELECT 'due', CAST(TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), next_run_at) AS CHAR),
        NULL, NULL
   FROM jobs FORCE INDEX (jobs_due) WHERE state = 'scheduled'
  ORDER BY next_run_at LIMIT 1)
UNION ALL
(SELECT 'due', CAST(TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), next_run_at) AS CHAR),
        NULL, NULL
   FROM jobs FORCE INDEX (jobs_due) WHERE state = 'failed'
  ORDER BY next_run_at LIMIT 1)"""
#   heartbeat  another worker's id, its heartbeat, and its lease in seconds
#   expired    the id of a worker that was lost a day ago
#   orphaned   the id of a worker that has runs and no live row
OTHERS_SQL = """
UNION ALL
SELECT IF(lost_at IS NULL, 'heartbeat', 'expired'), CAST(id AS CHAR),
       CAST(beat AS CHAR), CAST(lease_s AS CHAR)
  FROM workers
 WHERE id <> %s AND (lost_at IS NULL OR lost_at < UTC_TIMESTAMP(6) - INTERVAL 1 DAY)
UNION ALL
SELECT DISTINCT 'orphaned', CAST(jobs.worker AS CHAR), NULL, NULL
  FROM jobs FORCE INDEX (jobs_due)
  LEFT JOIN workers ON workers.id = jobs.worker AND lost_at IS NULL
 WHERE jobs.state = 'processing' AND workers.id IS NULL"""

class SnapshotRow(NamedTuple):
    """One row of SNAPSHOT_SQL."""
    what: str
    one: str
    two: str
    three: str

def read_snapshot(cursor: Cursor, identity: WorkerIdentity,
                  detect: bool) -> QueueSnapshot:
    """Returns all that an idle worker wants to know, by one statement."""
    values: list[object] = [identity.id, identity.id]
    served = ""
    if identity.queues:
        served = "AND queue IN %s"
        values.append(identity.queues)
    statement = SNAPSHOT_SQL.format(served=served)
    if detect:
        statement += OTHERS_SQL
        values.append(identity.id)
    rows: dict[str, list[SnapshotRow]] = collections.defaultdict(list)
    for row in cursor.records(SnapshotRow, statement, *values):
        rows[row.what].append(row)
    due_s = [int(row.one) / 1e6 for row in rows["due"]]
    return QueueSnapshot(
        config={row.one: row.two for row in rows["config"]},
        runs={(int(row.two), row.one): row.three == "1" for row in rows["run"]},
        others_cancelled=bool(rows["cancelled"]),
        waiting=bool(rows["waiting"]),
        due_s=min(due_s, default=math.inf),
        heartbeats={row.one: (int(row.two), float(row.three))
                    for row in rows["heartbeat"]},
        orphaned=[row.one for row in rows["orphaned"]],
        expired=[row.one for row in rows["expired"]],
        staged=[row.one for row in rows["config"] if row.one.startswith(STAGED)])

def is_drained(cursor: Cursor, served: Sequence[str]) -> bool:
    """Returns whether these queues, paused ones aside, hold nothing that may
    still run.

    No queue named means all. What is `scheduled` is not waited for, nor what
    is blocked by it alone.
    """
    paused = set(cursor.rows(str, "SELECT name FROM queues WHERE paused_at > 0"))
    for state in (State.PENDING, State.FAILED, State.PROCESSING):
        names = set(queues_with(cursor, state)) - paused
        if served:
            names &= set(served)
        if names:
            return False
    children, parents, values = "", "", list[object]()
    if served:
        children = "AND jobs.queue IN %s"
        parents = "AND parents.queue IN %s"
        values = [served, served]
    blocked = cursor.rows(
        int, f"SELECT 1 FROM {PARENTS_SQL} JOIN jobs ON jobs.seq = child "
        f"WHERE jobs.state = 'blocked' {children} "
        f"AND parents.state IN ('scheduled', 'blocked') {parents} LIMIT 1", *values)
    return not blocked

# -- what one transaction carries

class Load(NamedTuple):
    """What one transaction carries of a turn's results, and what it leaves."""
    ended: Sequence[Ended] = ()
    flushes: Sequence[Ended] = ()
    unsettled: Sequence[Ended] = ()
    unflushed: Collection[tuple[int, str]] = ()

class Packer:
    """How much output a transaction may carry, learnt from how long it took.

    On a slow wire a try times out; then half as much is sent. A single result
    that is too much even so goes without its output: but only once our
    heartbeat came through right before it, else it is the server that hangs,
    and not the wire.
    """
    FIRST_BYTES, MOST_BYTES = 256 << 10, 64 << 20
    FAST_S = 0.5  # what was carried in less may be doubled

    def __init__(self) -> None:
        self.load = Load()
        self._bytes_at_once = self.FIRST_BYTES

    def pack(self, tries: Tries, ended: Sequence[Ended],
             flushes: Sequence[Ended] = ()) -> Load:
        """Returns what the next try is to carry of these results, at least one."""
        last = self.load.ended
        if tries.slow and len(last) > 1:
            sent = sum(len(outcome.output) for _, outcome in last)
            self._bytes_at_once = sent // 2
        left = self._bytes_at_once
        taken: list[Ended] = []
        for claim, outcome in ended:
            if left > 0:
                taken.append((claim, outcome))
                left -= len(outcome.output)
        # The first try has no heartbeat right before it; each repeat has.
        if tries.slow > 1 and len(last) == 1:
            claim, outcome = taken[0]
            why = "the database is too slow to reach"
            taken[0] = claim, without_output(outcome, why)
        shown: list[Ended] = []
        unflushed: list[tuple[int, str]] = []
        for claim, outcome in flushes:
            left -= len(outcome.output)
            first = not taken and not shown and not tries.slow
            if left > 0 or first:
                shown.append((claim, outcome))
            else:
                unflushed.append((claim.seq, claim.token))
        self.load = Load(taken, shown, ended[len(taken):], unflushed)
        return self.load

    def took(self, seconds: float) -> None:
        """Learns how long it took; where more was waiting, more may go at once."""
        if self.load.unsettled and seconds < self.FAST_S:
            self._bytes_at_once = min(2 * self._bytes_at_once, self.MOST_BYTES)

# -- the turn

class TurnTaker:
    """Takes one worker's turns with the database."""
    def __init__(self, database: Database, identity: WorkerIdentity,
                 use_skip_locked: bool) -> None:
        """`use_skip_locked` is False where a person has switched it off."""
        self.database, self.identity = database, identity
        self.settings = Settings()
        self.purges = False  # whether this worker does the maintenance
        self._claimer = Claimer(database, identity, use_skip_locked)
        self._detector = FailureDetector()
        self._maintenance = Maintenance(database)
        self._packer = Packer()
        self._settlements: list[Settlement] = []  # of the present try
        self._state = ""  # as our row says

    def take(self, request: TurnRequest) -> TurnResult:
        """Looks around where asked, settles what ended, claims as much as is free."""
        self._claimer.begin_turn()
        # Each repeat of anything shows first that we live: a long wait for a
        # lock takes the heartbeat of its own transaction back.
        self.database.between_tries = functools.partial(
            self._raise_heartbeat, state=request.state)
        snapshot = None
        if request.look:
            snapshot = self.database.read(lambda cursor: read_snapshot(
                cursor, self.identity, request.detect))
        started = time.monotonic()
        try:
            result = self._carry_out(request, snapshot)
        except RowRefused as refused:
            return self._settle_one_by_one(request, refused)
        self._packer.took(time.monotonic() - started)
        if not result.alive or not snapshot:
            return result
        return self._look_around(request, result, snapshot)

    def take_over_lost(self, result: TurnResult) -> list[str]:
        """Takes over what has no live worker; returns what is to be said of
        it.

        Before that, what lost workers of this host left running must have been
        ended.
        """
        notes = []
        for worker, heartbeat in result.lost.items():
            taken = take_over(self.database, self.settings, worker, heartbeat)
            if taken is not None and result.snapshot:
                silence = say_duration(result.snapshot.heartbeats[worker][1])
                notes.append(f"worker {worker} is lost, no heartbeat for {silence}; "
                             f"{taken} runs taken over")
        for orphaned in result.orphaned:
            taken = take_over(self.database, self.settings, orphaned, None)
            if taken:
                notes.append(f"worker {orphaned} has no live row; "
                             f"{taken} runs taken over")
        return notes

    def _carry_out(self, request: TurnRequest,
                   snapshot: QueueSnapshot | None) -> TurnResult:
        """Does the turn's transaction, where there is anything to do in one.

        A heartbeat alone is one statement, and often it is not even due.
        """
        anything = not snapshot or request.ended or request.flushes \
            or snapshot.due_s <= 0 or snapshot.staged \
            or (request.free and snapshot.waiting)
        if anything:
            return self.database.transact(
                lambda cursor: self._transaction(cursor, request, snapshot),
                self._verify_turn)
        due_s = snapshot.due_s if snapshot else math.inf
        if not request.detect and request.state == self._state:
            return TurnResult(due_s=due_s)
        alive = self.database.read(
            lambda cursor: self._raise_heartbeat(cursor, request.state))
        return TurnResult(alive=alive, due_s=due_s)

    def _transaction(self, cursor: Transaction, request: TurnRequest,
                     snapshot: QueueSnapshot | None) -> TurnResult:
        """The lock order of all turns: our worker's row; the ended runs; their
        dead letters and dependents; the rows that are due; the limited queues;
        the claims.

        With the claims the COMMIT is sent, and what stands is read back after
        it.
        """
        self._claimer.begin_try()
        self._settlements = []
        if not self._raise_heartbeat(cursor, request.state):
            return TurnResult(alive=False)
        load = self._packer.pack(cursor.tries, request.ended, request.flushes)
        self._settlements = self._settle(cursor, load)
        due_s = self._release(cursor, snapshot)
        self._claim(cursor, request, len(load.unsettled))
        if self._claimer.seqs:
            cursor.commit_with_next()
        jobs = self._claimer.read_back(cursor, self.settings)
        return self._result(jobs, due_s)

    def _result(self, jobs: Sequence[ClaimedJob], due_s: float) -> TurnResult:
        """Returns what the present try has come to."""
        load = self._packer.load
        return TurnResult(jobs=jobs, due_s=due_s, settlements=self._settlements,
                          unsettled=load.unsettled, unflushed=load.unflushed)

    def _raise_heartbeat(self, cursor: Cursor, state: str) -> bool:
        """Raises our heartbeat, and learns the limits; False if we were taken over."""
        cursor.defer(
            "UPDATE workers SET beat = beat + 1, heartbeat_at = UTC_TIMESTAMP(6), "
            "state = %s, lease_s = %s WHERE id = %s AND lost_at IS NULL",
            (state, self.settings.lease_s, self.identity.id))
        self._claimer.read_limits(cursor)
        self._state = state
        return bool(cursor.counts[-1])

    def _settle(self, cursor: Cursor, load: Load) -> list[Settlement]:
        """Settles the runs that are still ours, and shows the output so far of
        others.

        What is no longer ours, by its token, is left alone.
        """
        if not (load.ended or load.flushes):
            return []
        seqs = [claim.seq for claim, _ in (*load.ended, *load.flushes)]
        ours = lock_runs(cursor, seqs)
        write_history(cursor, self.database.packet_bytes, [
            (claim, outcome) for claim, outcome in load.flushes
            if (claim.seq, claim.token) in ours])
        settlements = []
        for claim, outcome in load.ended:
            row = ours.get((claim.seq, claim.token))
            if row:
                now = dataclasses.replace(claim, cancel_requested=bool(row.cancelled),
                                          has_children=bool(row.has_children))
                settlements.append(decide_settlement(now, outcome, self.settings))
        settle(cursor, self.database.packet_bytes, settlements)
        return settlements

    def _release(self, cursor: Cursor, snapshot: QueueSnapshot | None) -> float:
        """Releases what is due; returns the seconds until more will be."""
        due_s = min((one.transition.wait_s for one in self._settlements
                     if one.to is State.FAILED), default=math.inf)
        if not snapshot:
            return due_s
        if snapshot.due_s > 0:
            due_s = min(due_s, snapshot.due_s)
        else:
            due_s = min(due_s, self._release_due(cursor))
        for key in snapshot.staged:
            release_staged(cursor, key, snapshot.config[key])
            due_s = 0.0
        return due_s

    def _release_due(self, cursor: Cursor) -> float:
        """Makes due jobs pending; returns how soon to look for more of them."""
        released = 0
        for state in (State.SCHEDULED, State.FAILED):
            # One state a statement: `state IN (…)` would sort, and lock all of
            # them.
            seqs = cursor.rows(
                int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) "
                "WHERE state = %s AND next_run_at <= UTC_TIMESTAMP(6) "
                f"ORDER BY next_run_at LIMIT {RELEASED_WHEN_DUE} "
                f"FOR UPDATE {self.database.skip_locked(cursor)}", state)
            released += len(seqs)
            if seqs:
                defer_move(cursor, "release", seqs)
        # A due row that we did not get is being released by another: no hurry
        # for us.
        return 0.0 if released else OTHERS_RELEASE_S

    def _claim(self, cursor: Cursor, request: TurnRequest, unsettled: int) -> None:
        """Claims for the free slots; results that wait for the next turn take
        one each.

        Else they would pile up where jobs end faster than their output can be
        sent.
        """
        wanted = request.free - unsettled
        if wanted <= 0:
            return
        if request.look or not (request.running or request.ended):
            self._claimer.start_over()
        self._claimer.claim(cursor, wanted, idle=not request.running,
                            looks=request.look)

    def _verify_turn(self, cursor: Transaction) -> TurnResult | None:
        """Returns what came of a turn whose COMMIT was not answered; None if
        nothing.

        Locking reads: a plain one was seen to miss a commit half a second
        later. Where a run that it settled still has its token, it does not
        stand; where a row that it claimed has ours, it does. A turn that did
        neither is done again.
        """
        settled = {one.claim.seq: one.claim.token for one in self._settlements}
        seqs = sorted({*self._claimer.seqs, *settled})
        if not seqs:
            return None
        tokens: dict[int, str | None] = cursor.pairs(
            "SELECT seq, token FROM jobs FORCE INDEX (PRIMARY) "
            "WHERE seq IN %s FOR UPDATE", seqs)
        claimed = any(tokens.get(seq) == self._claimer.token
                      for seq in self._claimer.seqs)
        undone = any(tokens.get(seq) == token for seq, token in settled.items())
        if not claimed and (undone or self._claimer.seqs):
            return None
        return self._result(self._claimer.read_back(cursor, self.settings), due_s=0.0)

    def _settle_one_by_one(self, request: TurnRequest,
                           refused: RowRefused) -> TurnResult:
        """Settles each run alone, where the server refused something of them
        together.

        So one bad row never blocks the rest: the guilty one goes without its
        output.
        """
        if not (request.ended or request.flushes):
            raise refused  # no result is to blame
        notes = []
        if request.ended:
            notes.append(f"a result was refused by the database: {refused}")
        for claim, outcome in request.ended:
            try:
                self._settle_now([(claim, outcome)])
            except RowRefused as error:
                self._settle_now([(claim, without_output(outcome, str(error)))])
                notes.append(f"job {claim.id}: its output could not be stored: {error}")
        rest = self.take(dataclasses.replace(request, ended=(), flushes=()))
        return dataclasses.replace(rest, notes=notes)

    def _settle_now(self, ended: Sequence[Ended]) -> None:
        """Settles these runs, in as many transactions as it takes."""
        def work(cursor: Transaction) -> None:
            self._settle(cursor, self._packer.pack(cursor.tries, left))
        left = ended
        while left:
            self.database.transact(work)
            left = self._packer.load.unsettled

    def _look_around(self, request: TurnRequest, result: TurnResult,
                     snapshot: QueueSnapshot) -> TurnResult:
        """Does what follows from a snapshot, each in a transaction of its own."""
        self._hand_back_unknown(request, snapshot)
        if request.drain and not (request.running or result.jobs):
            snapshot.drained = self.database.read(
                lambda cursor: is_drained(cursor, self.identity.queues))
        lost: dict[str, int] = {}
        orphaned: Sequence[str | None] = ()
        if request.detect:
            lost = self._detector.observe(time.monotonic(), snapshot.heartbeats,
                                          self.settings.heartbeat)
            orphaned = snapshot.orphaned
            # By id, one by one: a scan would wait for every worker in a turn.
            for worker in snapshot.expired:
                deregister(self.database, worker)
        if self.purges:
            self._maintenance.run(self.settings)
        return dataclasses.replace(result, snapshot=snapshot, lost=lost,
                                   orphaned=orphaned)

    def _hand_back_unknown(self, request: TurnRequest, snapshot: QueueSnapshot) -> None:
        """Hands back rows under our id that we do not run: a read-back had failed."""
        known = {*request.running,
                 *((claim.seq, claim.token) for claim, _ in request.ended)}
        unknown = [seq for seq, _ in snapshot.runs.keys() - known]
        if not unknown:
            return
        condition = SqlCondition("worker = %s AND seq IN %s",
                                 [self.identity.id, unknown])
        jobs = self.database.read(lambda cursor: read_processing(
            cursor, self.settings, "PRIMARY", condition))
        handed_back = RunOutcome(Reason.HANDED_BACK)
        self._settle_now([(job.claim, handed_back) for job in jobs])


# ---- queries -----------------------------------------------------------------
#
# What status, list, show and wait ask. Nothing here changes a row.

SLOW_START_S = 2.0
FOLLOWED_S = 0.3  # how often at least whoever follows a run reads its output
COUNTED_UP_TO, SORTED_UP_TO = 100_000, 10_000
PAGE = 1000


class JobQueries:
    """What a person asks of the queue."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.rows = database, database.rows
        self.retries = settings.max_retries
        self._columns = job_columns(settings)

    def jobs(
        self, state: str | None, queue_name: str | None, limit: int
    ) -> Iterator[JobRow]:
        """The newest jobs first, read page by page; 0: all."""
        where, values = self._filter(state, queue_name)
        # Few of many are sorted; of what is frequent, the newest are found by walking.
        matching = self.count_rows(f"jobs WHERE {where}", values, SORTED_UP_TO + 1)
        index = "jobs_claim" if values and matching <= SORTED_UP_TO else "PRIMARY"
        left, below = limit or sys.maxsize, 1 << 63
        while left > 0:
            views = self.rows(
                JobRow,
                f"SELECT {self._columns} FROM jobs FORCE INDEX ({index}) "
                f"WHERE seq < %s AND {where} ORDER BY seq DESC LIMIT %s",
                below,
                *values,
                min(PAGE, left),
            )
            yield from views
            if len(views) < min(PAGE, left):
                return
            left, below = left - len(views), views[-1].seq

    def count(self, state: str | None, queue_name: str | None) -> int:
        where, values = self._filter(state, queue_name)
        return self.count_rows(f"jobs WHERE {where}", values, COUNTED_UP_TO + 1)

    @staticmethod
    def _filter(state: str | None, queue_name: str | None) -> tuple[str, list[object]]:
        if not state and not queue_name:
            return "TRUE", []
        states = [state] if state else list(State)  # all: the index begins with it
        named = [queue_name] if queue_name else []
        return "state IN %s" + " AND queue = %s" * len(named), [states, *named]

    def count_rows(
        self, source: str, values: Sequence[object] = (), most: int = 0
    ) -> int:
        """How many rows; counting stops at `most`, 0: never."""
        if most:
            source = f"(SELECT 1 FROM {source} LIMIT {most}) AS some"
        [count] = self.rows(int, f"SELECT COUNT(*) FROM {source}", *values)
        return count

    def follow(
        self, job_id: str, run: int, when_slow: Callable[[], None] = lambda: None
    ) -> Iterator[bytes]:
        """The output of a job from its run number `run` on, as it comes, until the job
        has ended; `when_slow` is called if it has not started after SLOW_START_S."""
        seen, pause, slow_at = 0, 0.02, time.monotonic() + SLOW_START_S
        while True:
            found = self.rows(
                lambda *row: row,
                "SELECT state, run, output_bytes, IF(run > %s OR "
                "output_bytes > %s, output, NULL) FROM jobs LEFT JOIN runs ON "
                "job_seq = "
                "seq AND run >= %s WHERE id = %s ORDER BY run",
                run,
                seen,
                run,
                job_id,
            )
            if not found:
                raise no_such_job(job_id)
            for _, number, total, kept in found:
                run, seen = number or run, seen if number in (run, None) else 0
                if kept:
                    yield output_since(kept, total, seen)
                    seen, pause = total, 0.02
            if found[-1][0] in ENDED:
                return
            if time.monotonic() > slow_at:
                slow_at = math.inf
                if found[-1][0] != State.PROCESSING and not run:
                    when_slow()
            time.sleep(pause)
            pause = min(1.5 * pause, FOLLOWED_S / 3)

    def wait(
        self, ids: Sequence[str], one_is_enough: bool, timeout_s: float
    ) -> Iterator[ActionResult]:
        """Each job as it ends, or the first alone; Problem if that takes too long."""
        until, pause, left = time.monotonic() + timeout_s, 0.02, dict.fromkeys(ids)

        def too_late() -> Problem:
            return Problem(
                f"not ended within {say_duration(timeout_s)}: {abbreviated([*left])}",
                f"see: queuectl explain {next(iter(left))}",
                TIMED_OUT,
            )

        while left:
            for page in batched(list(left)):
                found = self._states_before(until, page)
                if found is None:
                    raise too_late()
                for job_id in page:
                    state = found.get(job_id)
                    if state is None or state in ENDED:
                        del left[job_id]
                        error = (
                            f"job {job_id} is {state}"
                            if state
                            else no_such_job(job_id).what
                        )
                        yield ActionResult(
                            job_id,
                            state == State.COMPLETED,
                            state,
                            error,
                            f"is {state}",
                        )
                        if one_is_enough and state:
                            return
            if left and time.monotonic() >= until:
                raise too_late()
            time.sleep(min(pause, max(0.0, until - time.monotonic())) if left else 0)
            pause = min(1.5 * pause, 0.25)

    def _states_before(self, until: float, ids: Sequence[str]) -> dict[str, str] | None:
        """The present states of jobs; None where an outage lasts past `until`."""
        policy, left_s = self.database.policy, max(0.0, until - time.monotonic())
        self.database.policy = dataclasses.replace(
            policy, retry_for_s=min(policy.retry_for_s, left_s)
        )
        try:
            return states_of(self.database, ids)
        except Unreachable:
            if left_s > policy.retry_for_s:
                raise
            return None

    def details(self, job_id: str) -> JobDetails:
        """Everything about one job; Problem if there is none."""
        rows = (
            self.rows(
                lambda cwd, env, *row: (JobRow(*row), cwd, env),
                f"SELECT cwd, env, {self._columns} FROM jobs WHERE id = %s",
                job_id,
            )
            if NAME.fullmatch(job_id)
            else []
        )
        if not rows:
            raise no_such_job(job_id)
        [(view, cwd, env)] = rows
        history = self.rows(
            RunRecord,
            "SELECT run, attempt, worker, started_at, finished_at, duration, "
            "exit_code, reason, detail FROM runs WHERE job_seq = %s ORDER BY run",
            view.seq,
        )
        after = self.rows(
            str,
            f"SELECT parents.id FROM {PARENTS_SQL} WHERE child = %s ORDER BY parent",
            view.seq,
        )
        output = self.output(view.seq, history[-1].run) if history else b""
        return JobDetails(view, cwd, env_of(env), after, history, output)

    def output(self, seq: int, run: int) -> bytes:
        """What is kept of one run's output."""
        return b"".join(
            self.rows(
                lambda kept: bytes(kept or b""),
                "SELECT output FROM runs WHERE job_seq = %s AND run = %s",
                seq,
                run,
            )
        )

    def job_template(self, job_id: str) -> dict[str, object]:
        """What to enqueue for a job like this one, as complete_job makes it."""
        names = (
            *SIGNED,
            "queue",
            "priority",
            "max_retries",
            "timeout",
            "backoff_base",
            "permanent_exit_codes",
            "on_lost",
            "unique",
        )
        columns = ", ".join(COLUMN_OF.get(name, name) for name in names)
        rows = (
            self.rows(
                lambda *row: row,
                f"SELECT signature, {columns} FROM jobs WHERE id = %s",
                job_id,
            )
            if NAME.fullmatch(job_id)
            else []
        )
        if not rows:
            raise no_such_job(job_id)
        if not is_signed(*rows[0][:6]):
            raise Problem(
                f"job {job_id} is not signed with this QUEUECTL_SIGNING_KEY",
                "look at its command, then enqueue it anew",
            )
        return {
            name: value
            for name, value in zip(names[1:], rows[0][2:])
            if value is not None
        }

    def dead_letters(
        self, limit: int, only: SqlCondition
    ) -> list[tuple[JobRow, Moment]]:
        """The dead jobs, the last to die first, each with the time of its death."""
        return self.rows(
            lambda died, *row: (JobRow(*row), died),
            f"SELECT died_at, {self._columns} "
            f"FROM dlq JOIN jobs ON jobs.seq = job_seq WHERE {only.where} ORDER BY "
            "died_at DESC, job_seq DESC LIMIT %s",
            *only.values,
            limit or 1 << 63,
        )

    def dead_ids(self, only: SqlCondition) -> list[str]:
        """The dead jobs, the first to die first."""
        return self.rows(
            str,
            "SELECT dlq.id FROM dlq JOIN jobs ON jobs.seq = job_seq "
            f"WHERE {only.where} ORDER BY died_at, job_seq",
            *only.values,
        )

    def dead_groups(self) -> list[dict[str, Json]]:
        """The dead letters that are alike but for digits, the most frequent first."""
        return self.rows(
            lambda count, code, reason, line, last, example: {
                "count": count,
                "exit_code": code,
                "reason": reason,
                "last_line": line,
                "last_died_at": say_time(last),
                "example": example,
            },
            "SELECT COUNT(*) AS many, exit_code, reason, REGEXP_REPLACE(last_line, "
            "'[0-9]+', 'N') AS line, MAX(died_at), MAX(id) FROM dlq "
            "GROUP BY exit_code, reason, line ORDER BY many DESC",
        )

    def count_dead_letters(self, only: SqlCondition) -> int:
        return self.count_rows(
            "dlq JOIN jobs ON jobs.seq = job_seq WHERE " + only.where,
            only.values,
            COUNTED_UP_TO + 1,
        )

    def states(self, exact: bool) -> tuple[dict[str, int], list[str]]:
        """Jobs in each state, and the states whose count stops at COUNTED_UP_TO."""
        most = 0 if exact else COUNTED_UP_TO + 1
        counts = {
            str(state): self.count_rows("jobs WHERE state = %s", [state], most)
            for state in State
        }
        capped = [state for state, count in counts.items() if most and count == most]
        return {**counts, **dict.fromkeys(capped, COUNTED_UP_TO)}, capped

    def queues(self) -> list[dict[str, Json]]:
        """The queues with pending or processing jobs, with how many."""
        processing = dict(
            self.rows(
                lambda name, count: (name, count),
                "SELECT queue, COUNT(*) FROM jobs "
                "WHERE state = 'processing' GROUP BY queue",
            )
        )
        waiting = "jobs WHERE state = 'pending' AND queue = %s"
        pending = {
            name: self.count_rows(waiting, [name], COUNTED_UP_TO)
            for name in self.database.read(
                functools.partial(queues_with, state=State.PENDING)
            )
        }
        return [
            {
                "queue": name,
                str(State.PENDING): pending.get(name, 0),
                str(State.PROCESSING): processing.get(name, 0),
            }
            for name in sorted({*pending, *processing})
        ]

    def queue_stats(self) -> list[dict[str, Json]]:
        """The queues that have jobs to run or a limit, and how they move."""
        held = {
            name: (limit, bool(paused))
            for name, limit, paused in self.rows(
                lambda *row: row, "SELECT name, max_running, paused_at FROM queues"
            )
        }
        ended = dict(
            self.rows(
                lambda *row: row,
                "SELECT queue, COUNT(*) FROM (SELECT job_seq, finished_at "
                "FROM runs ORDER BY job_seq DESC LIMIT 5000) AS latest "
                "JOIN jobs ON seq = job_seq "
                "WHERE latest.finished_at > UTC_TIMESTAMP(6) - INTERVAL 1 MINUTE "
                "GROUP BY queue",
            )
        )
        busy = {str(row["queue"]): row for row in self.queues()}
        rows = []
        for name in sorted(
            {*busy, *(one for one, what in held.items() if what != (None, False))}
        ):
            oldest = self.rows(
                say_time,
                "SELECT MIN(created_at) FROM (SELECT created_at FROM jobs "
                "FORCE INDEX (jobs_claim) WHERE state = 'pending' AND queue = %s "
                "ORDER BY claim_order, seq LIMIT 1000) AS first",
                name,
            )
            limit, paused = held.get(name, (None, False))
            row = busy.get(name, {})
            rows.append(
                {
                    "queue": name,
                    "depth": row.get(State.PENDING, 0),
                    "running": row.get(State.PROCESSING, 0),
                    "limit": limit,
                    "paused": paused,
                    "oldest_waiting": oldest[0],
                    "rate": ended.get(name, 0),
                }
            )
        return rows

    def workers(self) -> list[dict[str, Json]]:
        """The workers that are not lost; `silent`: no beat for longer than a lease."""
        return self.rows(
            lambda worker, host, pid, slots, busy, queues, beat_at, state: {
                "id": worker,
                "host": host,
                "pid": pid,
                "slots": slots,
                "busy": busy,
                "queues": queues.split(",") if queues else [],
                "heartbeat_at": say_time(beat_at),
                "state": state,
            },
            "SELECT id, host, pid, slots, (SELECT COUNT(*) FROM jobs "
            "WHERE jobs.state = 'processing' AND worker = workers.id), queues, "
            "heartbeat_at, "
            "IF(heartbeat_at < UTC_TIMESTAMP(6) - INTERVAL lease_s SECOND, "
            "'silent', state) FROM workers WHERE lost_at IS NULL ORDER BY host, pid",
        )

    def unserved(self) -> list[str]:
        """The queues where jobs wait and no live worker serves."""
        served = [
            as_list(worker["queues"])
            for worker in self.workers()
            if worker["state"] == "running"
        ]
        return [
            str(row["queue"])
            for row in self.queues()
            if row[State.PENDING]
            and not any(not names or row["queue"] in names for names in served)
        ]

    def running_under(self, host: str, supervisor: int) -> list[str]:
        """The jobs that the workers of one supervisor run."""
        return self.rows(
            str,
            "SELECT jobs.id FROM jobs JOIN workers ON workers.id = jobs.worker "
            "WHERE jobs.state = 'processing' AND host = %s AND supervisor = %s "
            "AND lost_at IS NULL ORDER BY seq",
            host,
            supervisor,
        )


def states_of(database: Database, ids: Sequence[str]) -> dict[str, str]:
    """The present states of those of some jobs that are there."""
    named = [one for one in ids if NAME.fullmatch(one)]
    return (
        dict(
            database.rows(
                lambda *row: row, "SELECT id, state FROM jobs WHERE id IN %s", named
            )
        )
        if named
        else {}
    )


def read_config(database: Database) -> dict[str, str]:
    """The config table, less the rows that are not settings."""
    found = database.rows(lambda *row: row, "SELECT `key`, value FROM config")
    return {key: value for key, value in found if key in SETTINGS}


# ---- actions -----------------------------------------------------------------
#
# What a person changes: cancel, retry, limits, settings. A write names the transition
# or the row that it is about, reads the answer, and says what it found instead.


class UnmetParent(NamedTuple):
    """A job that another waits for, and whether it waits in vain."""
    hopeless: bool
    id: str
    state: str

def unmet_parents(cursor: Cursor, seq: int) -> list[UnmetParent]:
    """Returns the parents of a job that have not ended as it needs."""
    return cursor.records(
        UnmetParent,
        f"SELECT {HOPELESS_SQL} AS hopeless, parents.id, parents.state "
        f"FROM {PARENTS_SQL} WHERE child = %s AND NOT {MET_SQL}", seq)

class JobStore(JobQueries):
    """What a person asks of the queue, and changes in it."""

    def cancel(self, job_id: str) -> ActionResult:
        """End a waiting job now; ask the worker of a running one to end it."""

        def work(cursor: Cursor, seq: int, state: State) -> ActionResult:
            if state is State.PROCESSING:
                cursor.execute(
                    "UPDATE jobs FORCE INDEX (PRIMARY) SET cancel_requested_at = "
                    "COALESCE(cancel_requested_at, UTC_TIMESTAMP(6)) "
                    "WHERE seq = %s AND state = 'processing'",
                    (seq,),
                )
                return ActionResult(
                    job_id, True, state, None, "is running: its worker ends it"
                )
            if state not in TRANSITIONS["cancel"].leaves:
                return ActionResult(
                    job_id, False, state, f"job {job_id} is {state}: nothing to cancel"
                )
            move(
                cursor,
                "cancel",
                [seq],
                reason=Reason.CANCELLED,
                finished_at=NOW_SQL,
                next_run_at=NOT_LATER_SQL,
            )
            release_children(cursor, [seq])
            return ActionResult(
                job_id, True, TRANSITIONS["cancel"].to, None, "is cancelled"
            )

        return self._on_one(job_id, work, lambda was, now: now.state is State.CANCELLED)

    def revive(self, job_id: str, name: str, retries: int = 1,
               reset: bool = False) -> ActionResult:
        """Puts a job back, due now, or blocked while it has to wait for others.

        It keeps its attempts, a dead one gets `retries` more runs; `reset` counts
        anew. `name` is the transition: retry, or revive.
        """
        def work(cursor: Cursor, seq: int, state: State) -> ActionResult:
            """Says why it cannot be put back, or puts it back."""
            leaves = TRANSITIONS[name].leaves
            if state not in leaves:
                only = " or ".join(one for one in State if one in leaves)
                return ActionResult(job_id, False, state, f"job {job_id} is {state}: "
                                    f"only {only} jobs can be put back")
            unmet = unmet_parents(cursor, seq)
            hopeless = next((one for one in unmet if one.hopeless), None)
            if hopeless:
                return ActionResult(
                    job_id, False, state, f"job {job_id} waits for {hopeless.id}, "
                    f"which is {hopeless.state}: queuectl dlq retry {hopeless.id} "
                    "--dependents brings both back")
            to = State.BLOCKED if unmet else TRANSITIONS[name].to
            # One that did not die by running keeps the runs that are left to it.
            attempts, granted = Sql("attempts"), Sql(
                "IF((state <> 'dead' OR reason = 'dependency') "
                "AND attempts < COALESCE(max_attempts, max_retries + 1, %s), "
                "max_attempts, attempts + %s)", [self.retries + 1, retries])
            if reset:
                attempts, granted = Sql("0"), Sql("NULL")
            move(cursor, name, [seq], to=to, max_attempts=granted, attempts=attempts,
                 losses=0, next_run_at=NOW_SQL)
            cursor.execute("DELETE FROM dlq WHERE job_seq = %s", (seq,))
            return ActionResult(job_id, True, to, None, f"is {to} again")
        def stands(was: LockedJob, now: LockedJob) -> bool:
            """It may have run since, and be where it was."""
            return now.state is not was.state or now.runs > was.runs
        return self._on_one(job_id, work, stands)

    def revive_dependents(self, job_id: str) -> Iterator[ActionResult]:
        """Put back what died with a job, and what died with that."""
        parents = [job_id]
        for parent in parents:
            for child in self.rows(
                str,
                f"SELECT jobs.id FROM {PARENTS_SQL} JOIN jobs ON jobs.seq = child "
                "WHERE parents.id = %s AND jobs.state = 'dead' AND jobs.reason = "
                "'dependency' ORDER BY child",
                parent,
            ):
                result = self.revive(child, "revive")
                parents += [child] * result.ok
                yield result

    def limit(self, name: str, what: str, value: object) -> None:
        """Set max_running or paused_at of a queue; None: it limits it no more."""
        self.database.run(
            f"INSERT INTO queues (name, {what}) VALUES (%s, %s) "
            f"ON DUPLICATE KEY UPDATE {what} = VALUES({what}), "
            "touched = touched + 1",
            name,
            value,
        )

    def _on_one(
        self,
        job_id: str,
        act: Callable[[Cursor, int, State], ActionResult],
        stands: Callable[[LockedJob, LockedJob], bool],
    ) -> ActionResult:
        """Lock one job, and do what its state allows.

        `stands` tells from the row as it was and as it is whether what was done stands,
        after a COMMIT whose answer was lost; where it does not, it is done again.
        """
        nothing = ActionResult(job_id, False, None, no_such_job(job_id).what)
        made: list[tuple[ActionResult, LockedJob]] = []

        def locked(cursor: Cursor) -> LockedJob | None:
            found = cursor.rows(
                lambda seq, state, runs: LockedJob(seq, State(state), runs),
                "SELECT seq, state, runs FROM jobs WHERE id = %s FOR UPDATE",
                job_id,
            )
            return found[0] if found else None

        def work(cursor: Cursor) -> ActionResult:
            row = locked(cursor)
            if not row:
                return nothing
            made.append((act(cursor, row.seq, row.state), row))
            return made[-1][0]

        def verify(cursor: Cursor) -> ActionResult | None:
            row = locked(cursor)
            if not made or not row:
                return None
            result, was = made[-1]
            return result if result.ok and stands(was, row) else None

        if not re.fullmatch(NAME, job_id):
            return nothing
        try:
            return self.database.transact(work, verify)
        except RowRefused:
            return self._key_conflict(job_id)

    def _key_conflict(self, job_id: str) -> ActionResult:
        """Why a job cannot come back: another has its unique key."""
        [(state, key, holder)] = self.rows(
            lambda *row: row,
            "SELECT jobs.state, jobs.unique_key, other.id FROM jobs "
            "LEFT JOIN jobs AS other ON other.live_key = jobs.unique_key "
            "WHERE jobs.id = %s",
            job_id,
        )
        return ActionResult(
            job_id,
            False,
            state,
            f"job {job_id} stays {state}: key {key} is held by job {holder}",
        )

    def set_config(self, key: str, value: str | None) -> None:
        """Store one setting; None removes it."""
        if value is None:
            self.database.run("DELETE FROM config WHERE `key` = %s", key)
            return
        self.database.run(
            "INSERT INTO config (`key`, value) VALUES (%s, %s) "
            "ON DUPLICATE KEY UPDATE value = VALUES(value), "
            "changed_at = UTC_TIMESTAMP(6)",
            key,
            value,
        )


# ---- doorbell ----------------------------------------------------------------
#
# MySQL has no NOTIFY. A supervisor with a free slot parks a sleep on a connection of
# its own; who has something for it finds that sleep among the server's processes and
# ends it by KILL QUERY. The connection does nothing else, so nothing else can be hit.
# This is for speed alone: where it cannot work (a proxy, another account, a cluster's
# other node) the poll finds the work.

DOORBELL = "queuectl doorbell"
PARKED_S = 10  # a sleep outlives its killed client by as much
PARKED = re.compile(rf"SELECT SLEEP\({PARKED_S}\) /\* {DOORBELL} (\S+) (\S+) \*/")

def ring(database: Database, count: int = sys.maxsize, queues: Collection[str] = (),
         worker: str = "") -> None:
    """Wake up to `count` idle supervisors, and one more lest one be dead: those that
    serve one of `queues`, or have this worker; none named: any."""
    def parked(cursor: Cursor) -> list[int]:
        release = [int(part) for part in re.findall(r"\d+", database.version)[:3]]
        schema = "performance" if not database.mariadb and release >= [8, 0, 22] \
            else "information"
        cursor.execute(f"SELECT id, info FROM {schema}_schema.processlist "
                       "WHERE db = DATABASE() AND info LIKE %s",
                       (f"SELECT SLEEP(%) /* {DOORBELL} %",))
        found = []
        for number, text in cursor.fetchall():
            match = PARKED.fullmatch(text)  # what is merely like ours is left alone
            if match and worker in ("", match[1]):
                served = {*match[2].split(",")}
                if served == {"-"} or not queues or served & {*queues}:
                    found.append(number)
        return found
    found = database.attempt(parked) or []
    random.shuffle(found)
    for number in found[:count + 1]:
        database.attempt(functools.partial(Cursor.execute, statement="KILL QUERY %s",
                                           values=(number,)))

class Doorbell:
    """A thread that parks a sleep when told to, and calls `rung` when it was ended."""
    def __init__(self, target: ConnectionInfo, note: str, rung: Callable[[], None],
                 route: Route | None = None) -> None:
        policy = RetryPolicy(math.inf, 1.5 * PARKED_S, say=lambda text: None)
        self._database = Database(target, policy, route=route)
        self._note, self._rung = f"{DOORBELL} {note}", rung
        self._wanted = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def park(self) -> bool:
        """Have it parked from now until it is rung; False if it is so already."""
        if self._wanted.is_set():
            return False
        self._wanted.set()
        return True

    def leave(self) -> None:
        """Let the sleep that is parked be the last."""
        self._wanted.clear()

    def _wait(self) -> None:
        with contextlib.suppress(Problem):  # the worker meets it too, and says so
            while self._wanted.wait():
                if self._database.sleep(PARKED_S, self._note):
                    self._wanted.clear()
                    self._rung()


# ---- OS processes ------------------------------------------------------------
#
# The only room that kills, reaps or reads /proc. What it ends it ends by descriptors
# where the kernel has them, and by run tags, so that no stranger is hit.

STRAY_CHECK_S = 0.05
HOST_IS_SHORT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
MARK = "QUEUECTL_RUN"  # <token>-<seq>: in the environment of all that a run starts
MARKED = f"{MARK}=".encode()

def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "a directory that is gone"

def reap() -> Iterator[tuple[int, int]]:
    """Each ended child, ours or adopted: its pid, and its exit status or -signal."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)

def become_subreaper() -> None:
    """Have orphans below us become our children, where the kernel can (Linux)."""
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

@contextlib.contextmanager
def open_pidfd(pid: int) -> Iterator[int]:
    """A descriptor of a process, -1 where the kernel has none; ProcessLookupError."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):
        handle = -1
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)

def send_signal(pid: int, number: int, handle: int = -1) -> None:
    """Signal a process, by its descriptor if it is pinned; it may be gone already."""
    try:
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        pass  # what was wanted of it has come about
    except PermissionError:
        raise Problem(f"process {pid} belongs to another user",
                      "try again as that user or as root") from None

def is_alive(pid: int) -> bool:
    """Whether a process is there; a child of ours that has ended is reaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return _exists(pid)

def _exists(target: int) -> bool:
    """Whether a process is there, be it a zombie; or with -PID a group."""
    try:
        os.kill(target, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True

def _stat(pid: int) -> list[bytes]:
    """What /proc says of a process, from its state on; OSError if it has ended."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    if not fields or fields[0] in (b"Z", b"X"):
        raise ProcessLookupError
    return fields

def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPU; 0 where that cannot be seen."""
    with contextlib.suppress(OSError):
        return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0

class ProcessInfo(NamedTuple):
    """A living process: its group, its session, and the mark that it carries."""
    group: int
    session: int
    mark: bytes

def read_process(pid: int) -> ProcessInfo | None:
    """What /proc says of a process; None if it has ended."""
    try:
        group, session = map(int, _stat(pid)[2:4])
        marks: list[bytes] = []
        with contextlib.suppress(PermissionError), \
                open(f"/proc/{pid}/environ", "rb") as file:
            marks = [one for one in file.read().split(b"\0") if one.startswith(MARKED)]
        return ProcessInfo(group, session, marks[0] if marks else b"")
    except OSError:
        return None

class ProcessTable:
    """Who lives: one pass over /proc, made when first asked, for all runs that are to
    end together; a pass for each would keep many runs past their kill_grace."""
    def __init__(self) -> None:
        self._by_session: dict[int, set[int]] = {}
        self._by_mark: dict[bytes, set[int]] = {}

    @functools.cached_property
    def _seen(self) -> dict[int, ProcessInfo]:
        pids: list[int] = []
        with contextlib.suppress(OSError):  # no /proc here: groups alone are ended
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        seen = {}
        for pid in pids:
            found = read_process(pid) if pid != os.getpid() else None
            if found:
                seen[pid] = found
        for pid, one in seen.items():
            self._by_session.setdefault(one.session, set()).add(pid)
            self._by_mark.setdefault(one.mark, set()).add(pid)
        return seen

    def signal(self, mark: str, session: int, number: int,
               but_group: int = 0) -> tuple[int, int]:
        """Signal what is left of a run (0: only look): its session, what carries its
        mark, and the sessions of that. How many were left, and one that refused (0:
        none). A group that has had this signal already is passed over."""
        seen, wanted = self._seen, MARKED + mark.encode()
        marked = self._by_mark.get(wanted, set())
        sessions = {session, *(seen[pid].session for pid in marked)}
        sessions -= {0, os.getsid(0)}
        there = marked.union(*(self._by_session.get(one, ()) for one in sessions))
        left = len(there)
        refused = 0
        for pid in there if number else ():
            with contextlib.suppress(ProcessLookupError), open_pidfd(pid) as handle:
                # The number may have passed to a stranger since: look again.
                now = read_process(pid)
                if now and now.group != (but_group or -1) \
                        and (now.mark == wanted or now.session in sessions):
                    try:
                        send_signal(pid, number, handle)
                    except Problem:  # it belongs to another user
                        left, refused = left - 1, pid
        return left, refused

def has_file_open(pid: int, path: str) -> bool:
    """Whether a process has this file open; True where that cannot be seen."""
    try:
        wanted, handles = os.stat(path), os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return True
    for name in handles:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                return True
    return False

def terminate_tagged(marks: Sequence[str], grace_s: float) -> None:
    """End what an earlier worker left running of these runs; return once it is gone."""
    kill_at = time.monotonic() + grace_s
    number = int(signal.SIGTERM)
    while marks:
        process_table = ProcessTable()
        marks = [mark for mark in marks if process_table.signal(mark, 0, number)[0]]
        number = signal.SIGKILL if time.monotonic() >= kill_at else 0
        if marks:
            time.sleep(STRAY_CHECK_S)

def process_identity(pid: int) -> str:
    """Boot, PID namespace and start time: what makes a pid one process; else empty."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        space, started = os.readlink("/proc/self/ns/pid"), _stat(pid)[19].decode()
    except OSError:
        return ""
    return f"{boot}/{space}/{started}"

def is_gone(pid: int, identity: str) -> bool:
    """Whether a process of this boot and this PID namespace no longer runs; False for
    any other, which cannot be judged from here."""
    here, now = process_identity(os.getpid()), process_identity(pid)
    same_place = here and here.rsplit("/", 1)[0] == identity.rsplit("/", 1)[0]
    return bool(same_place) and now != identity

def signal_group(group: int, number: int) -> None:
    """Signals a process group; ProcessLookupError or PermissionError if it cannot."""
    os.killpg(group, number)

def open_oom_score() -> int:
    """Returns a descriptor by which this process sets its own oom_score_adj.

    What it then spawns inherits the score. OSError where there is no such thing.
    """
    return os.open("/proc/self/oom_score_adj", os.O_RDWR)


# ---- runs --------------------------------------------------------------------
#
# One shell command: its output, its time limit, its end. There is one way to end a run,
# whatever the cause: TERM to its group, kill_grace, KILL, until nothing of it is left.

READ_BYTES = 65536
FIRST_FLUSH_S, NEXT_FLUSH_S = 0.05, 1.0
FOLLOWED_LIMITS = 4
OOM_SCORE_ADJ = 500


class OutputBuffer:
    """The first and the last part of a stream, within `limit` bytes, the cut marked.

    While it goes on, FOLLOWED_LIMITS times that is there for those who follow it: they
    lose nothing even if they miss a flush.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._head_max = limit, limit // 2
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_max - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        most = FOLLOWED_LIMITS * self._limit
        if len(self._tail) > most + 2 * READ_BYTES:
            del self._tail[: -most - 1]

    def kept(self, to_follow: bool = False) -> bytes:
        tail_max = self._limit - self._head_max
        if to_follow:
            tail_max = FOLLOWED_LIMITS * self._limit
        if self.total <= self._head_max + tail_max:
            return bytes(self._head + self._tail)
        mark = cut_mark(self.total)
        room = tail_max - len(mark)
        return bytes(self._head + mark + (self._tail[-room:] if room > 0 else b""))


class JobSpawner:
    """What every run of this process starts from: environment, directory, score."""

    def __init__(self, variables: Mapping[bytes, bytes]) -> None:
        self._environment = {
            name: value
            for name, value in variables.items()
            if not PRIVATE_VARIABLE.fullmatch(os.fsdecode(name))
        }
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._home = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
        self._score, self._scores = -1, (b"0", b"0")
        with contextlib.suppress(OSError, ValueError):  # not Linux
            self._score = open_oom_score()
            own = int(os.read(self._score, 16))
            self._scores = b"%d" % own, b"%d" % min(own + OOM_SCORE_ADJ, 1000)
        names = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(3, 64)
        for name in names:  # jobs inherit none of what we were given
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), int(name) < 3)

    def spawn(
        self, command: bytes, cwd: bytes, output: int, variables: Mapping[bytes, bytes]
    ) -> int:
        """The pid of a shell that runs `command` in a session of its own.

        It inherits directory and score from us, who have them just for that moment:
        so posix_spawn can do it, which in Python 3.9 is twice as fast as Popen.
        """
        os.chdir(os.fsdecode(cwd) if cwd else self._home)
        try:
            self._rate(1)
            return os.posix_spawn(
                "/bin/sh",
                [b"/bin/sh", b"-c", command],
                {**self._environment, **variables},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self._null, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                # Python ignores SIGXFSZ; what has a handler is reset by itself.
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGXFSZ,),
            )
        finally:
            self._rate(0)
            with contextlib.suppress(OSError):  # the next spawn would tell
                os.chdir(self._home)

    def _rate(self, which: int) -> None:
        if self._score >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._score, self._scores[which], 0)


class RunningJob:
    """One run: the shell, its pipe, its time limit, and its end."""

    def __init__(
        self, job: ClaimedJob, settings: Settings, spawner: JobSpawner
    ) -> None:
        self.job, self.settings = job, settings
        self.key = (job.claim.seq, job.claim.token)
        self.run_tag = f"{job.claim.token}-{job.claim.seq}"
        self.output = OutputBuffer(settings.output_limit)
        self.cause: Reason | None = None  # why we end it; None: it ends by itself
        self.status: int | None = None  # as `reap` gave it
        self.ending = self.gone = False  # TERM was sent; and nothing of it is left
        self.survivor = 0  # a process that refused our signal
        self.flush_at = math.inf
        self._flushed_bytes = 0
        self.failure = ""  # why it did not start
        self._took: float | None = None  # seconds until the shell ended
        self.pid, self._started = 0, time.monotonic()
        self.check_at = self._started + job.timeout_s if job.timeout_s else math.inf
        self._kill_at = self._shown_at = math.inf
        self.pipe = write_end = -1
        try:
            self.pipe, write_end = os.pipe()
            os.set_blocking(self.pipe, False)
            self.pid = self._spawn(write_end, spawner)
        except (OSError, ValueError) as error:
            self.failure, self.gone = f"{error}, on {socket.gethostname()}", True
            if isinstance(error, OSError) and error.errno in HOST_IS_SHORT:
                self.cause = Reason.HANDED_BACK  # not the job's fault
        finally:
            if write_end >= 0:
                os.close(write_end)

    def _spawn(self, write_end: int, spawner: JobSpawner) -> int:
        held, cwd, own = self.job.claim, self.job.cwd, self.job.env
        added = {
            "QUEUECTL_JOB_ID": held.id,
            "QUEUECTL_ATTEMPT": str(held.attempts),
            "QUEUECTL_MAX_ATTEMPTS": str(held.max_attempts),
            "QUEUECTL_QUEUE": self.job.queue,
            **(json.loads(_read_env(own)) if own else {}),
            MARK: self.run_tag,
        }
        return spawner.spawn(
            self.job.command.encode(),
            cwd.encode() if cwd else b"",
            write_end,
            {name.encode(): text.encode() for name, text in added.items()},
        )

    def read(self) -> bool:
        """Take some of what the pipe holds; False at its end."""
        try:
            data = os.read(self.pipe, READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        if math.isinf(self.flush_at):
            pause = NEXT_FLUSH_S if self.output.total else FIRST_FLUSH_S
            self.flush_at = time.monotonic() + pause
        self.output.add(data)
        return True

    def close_pipe(self) -> None:
        # What was written before the end is in the pipe: at most its capacity.
        for _ in range(32):
            before = self.output.total
            if not self.read() or self.output.total == before:
                break
        os.close(self.pipe)
        self.pipe = -1

    def flush(self) -> Ended | None:
        """The output so far, if there is some that was not flushed."""
        self.flush_at = math.inf
        if self.output.total == self._flushed_bytes:
            return None
        self._flushed_bytes = self.output.total
        return self.job.claim, RunOutcome(
            None, output=self.output.kept(True), output_bytes=self.output.total
        )

    def put_off_flush(self) -> None:
        """What was to be flushed last was not: have it flushed again."""
        self._flushed_bytes, self.flush_at = 0, time.monotonic() + NEXT_FLUSH_S

    def may_settle(self, now: float) -> bool:
        """Whether who follows a run had time to read what its final cut leaves out."""
        if math.isinf(self._shown_at):
            unseen_bytes = self.output.total - self._flushed_bytes
            limit = self.settings.output_limit
            cut = self.output.total > limit and unseen_bytes > limit // 4
            self._shown_at = now + FOLLOWED_S * cut
            if cut:
                self.flush_at, self.check_at = now, self._shown_at
        return now >= self._shown_at

    def terminate(self, cause: Reason | None, process_table: ProcessTable) -> None:
        """Begin to end the run: TERM to its group. The first cause stands, and the end
        of a shell that ended by itself."""
        if self.gone:
            return
        if not self.ending or cause is Reason.LOST:
            self.cause = self.cause or cause
        if self.ending:
            return
        self.ending, now = True, time.monotonic()
        self._kill_at = now + self.settings.kill_grace
        self.check_at = now + STRAY_CHECK_S
        told = 0
        if self.status is None:
            # Not reaped yet, so the group's number cannot belong to anybody else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal_group(self.pid, signal.SIGTERM)
                told = self.pid  # twice means "now" to many programs
        process_table.signal(self.run_tag, self.pid, signal.SIGTERM, told)

    def shorten_grace(self, now: float) -> None:
        """KILL after kill_grace from now, however long it was to take."""
        self._kill_at = min(self._kill_at, now + self.settings.kill_grace)
        self.check_at = min(self.check_at, self._kill_at)

    def reaped(self, status: int, process_table: ProcessTable) -> None:
        """The shell ended: the run too, unless others of its group must go first."""
        self.status, self._took = status, time.monotonic() - self._started
        if self.ending:
            self.check_at = 0.0
        elif status and _exists(-self.pid):
            self.terminate(None, process_table)
        else:
            self.gone = True

    def tick(self, now: float, process_table: ProcessTable) -> None:
        """Act on the time limit, or bring the end a step further."""
        if self.gone or now < self.check_at:
            return
        if not self.ending:
            self.terminate(Reason.TIMEOUT, process_table)
            return
        number = signal.SIGKILL if now >= self._kill_at else 0
        if self.status is None:
            if not number:
                self.check_at = self._kill_at
                return
            try:
                signal_group(self.pid, number)
            except PermissionError:
                self.survivor, self.gone = self.pid, True
        left, refused = process_table.signal(self.run_tag, self.pid, number)
        self.survivor = self.survivor or refused
        self.gone = self.gone or (self.status is not None and not left)
        self.check_at = now + STRAY_CHECK_S

    def outcome(self) -> RunOutcome:
        """How the run ended; asked once it is gone."""
        reason, code, detail = self._reason_and_code()
        if self.survivor:
            detail += f"; process {self.survivor} refused the signal and goes on"
        took = time.monotonic() - self._started if self._took is None else self._took
        return RunOutcome(
            reason,
            code,
            detail.lstrip("; "),
            took,
            self.output.kept(),
            self.output.total,
        )

    def _reason_and_code(self) -> tuple[Reason, int | None, str]:
        status, job = self.status, self.job
        if self.failure:
            return self.cause or Reason.SPAWN, None, self.failure
        if self.cause is Reason.TIMEOUT:
            limit = f"{say_duration(job.timeout_s)} ({job.timeout_name})"
            if "setting" in job.timeout_name:
                limit += "; give it more: --timeout 10m, or config set job_timeout 10m"
            return Reason.TIMEOUT, TIMED_OUT, f"timed out after {limit}"
        code = 128 - status if status and status < 0 else status
        if self.cause:
            return self.cause, code, ""
        if status is None:
            return Reason.LOST, None, "its end was not seen"
        if status < 0:
            names = {one.value: one.name for one in signal.Signals}
            name = names.get(-status, f"signal {-status}")
            return Reason.SIGNAL, code, f"ended by {name}"
        detail = ""
        if code in (126, 127):
            place = f"{excerpt(job.cwd or _here(), 200)} on {socket.gethostname()}"
            detail = (
                f"in {place}, PATH={os.environ.get('PATH', '')}; name it by its "
                "path, or give the job an env with that PATH"
            )
        return Reason.EXIT, code, detail


# ---- worker ------------------------------------------------------------------
#
# One worker process: claim, run, settle, again. A single loop waits for
# signals, for the output of its runs and for its timers, and never for the
# database: a thread of its own talks to that, one request at a time. So runs
# are timed out, ended and reaped in time even while the database is away. A
# run starts only under a claim that has been committed, and what it came to is
# kept until the database has taken it.

# From the supervisor: end what runs. A terminal cannot send it.
STOP_NOW_SIGNAL = signal.SIGUSR1
HANDLED = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT,
           signal.SIGTERM, signal.SIGPIPE, STOP_NOW_SIGNAL)

# -- what a worker shares with its supervisor and its siblings

class RunRegistry:
    """The worker's id and its runs' tags, in memory shared with the supervisor.

    When a worker is killed, its supervisor must know what is to be ended.
    """
    # The bytes of a cell. The first holds the worker's id, the second its
    # kill_grace once it has opened, and each of the others, one a slot, the
    # tag of a run.
    CELL = 64

    def __init__(self, slots: int) -> None:
        cells = slots + 2
        self._memory = mmap.mmap(-1, cells * self.CELL)
        self._free = list(range(2, cells))

    def sign(self, worker: str) -> None:
        """Writes down the worker's id."""
        self._write(0, worker)

    def open(self, kill_grace: float) -> None:
        """Says that the worker has opened, and how long a run takes at most to end.

        What it inherited is written off by then, and only its own runs matter.
        """
        self._write(1, str(kill_grace))

    def note(self, run_tag: str) -> None:
        """Writes down a run that is about to start."""
        self._write(self._free.pop(), run_tag)

    def strike(self, run_tag: str) -> None:
        """Removes a run of which nothing is left."""
        # The tags of one turn differ in their numbers only, and 7 begins 70:
        # the tag is looked for up to its end.
        found = self._memory.find(run_tag.encode() + b"\0")
        cell = found // self.CELL
        self._write(cell, "")
        self._free.append(cell)

    def read(self) -> tuple[str, float | None, list[str]]:
        """Returns the worker's id, its kill_grace if it opened, its runs' tags."""
        texts = []
        size = len(self._memory)
        for start in range(0, size, self.CELL):
            end = start + self.CELL
            cell = self._memory[start:end]
            text = cell.rstrip(b"\0")
            texts.append(text.decode())
        worker, opened, *cells = texts
        grace_s = None
        if opened:
            grace_s = float(opened)
        run_tags = [text for text in cells if text]
        return worker, grace_s, run_tags

    def _write(self, cell: int, text: str) -> None:
        start = cell * self.CELL
        end = start + self.CELL
        data = text.encode()
        self._memory[start:end] = data.ljust(self.CELL, b"\0")

class SiblingWorkers:
    """How busy each worker process of a supervisor is, in memory that all share.

    A pipe to each of them has it look around.
    """
    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = slots
        # Two bytes for each number.
        memory = mmap.mmap(-1, 2 * len(slots))
        self._busy = memoryview(memory).cast("H")
        self._pipes = []
        for _ in slots:
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            os.set_blocking(write_end, False)
            self._pipes.append((read_end, write_end))

    def listener(self, number: int) -> int:
        """Returns what is readable once a worker is to look around."""
        read_end, _ = self._pipes[number]
        return read_end

    def report(self, number: int, busy: int) -> None:
        """Writes down how many slots of a worker are taken."""
        self._busy[number] = busy

    def __len__(self) -> int:
        return len(self._slots)

    def idle(self) -> list[int]:
        """Returns the workers that have a free slot."""
        idle = []
        for number, slots in enumerate(self._slots):
            if self._busy[number] < slots:
                idle.append(number)
        return idle

    def wake(self, numbers: Iterable[int]) -> None:
        """Has these workers look around."""
        for number in numbers:
            _, write_end = self._pipes[number]
            # A full pipe: it was told often enough.
            with contextlib.suppress(BlockingIOError):
                os.write(write_end, b"+")

@dataclass(frozen=True)
class WorkerOptions:
    """What all worker processes of one supervisor have in common."""
    target: ConnectionInfo
    environment: Environment
    settings: Settings
    queues: tuple[str, ...]
    drain: bool
    grace_s: float | None
    verbose: bool  # whether a job that completed is worth a line
    say: Callable[[str], None]

class WorkerContext(NamedTuple):
    """One worker process's place among those of its supervisor."""
    number: int
    siblings: SiblingWorkers
    slots: int
    supervisor: int
    lifeline: int  # readable once the supervisor is gone
    ready: int  # written once the worker has entered its row
    registry: RunRegistry
    # The dead workers whose place it takes, each with the tags of its runs.
    inherited: tuple[tuple[str, tuple[str, ...]], ...]

def catch_signals() -> tuple[int, int]:
    """Returns a pipe that gets each handled signal's number as a byte: both ends.

    The signals are unblocked by this. They get real handlers and are never
    ignored: jobs inherit what is ignored, and under an ignored SIGCHLD a
    failing job would look well.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    for number in HANDLED:
        signal.signal(number, lambda signum, frame: None)
    # A full pipe wakes its reader just as well.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return read_end, write_end

def wake_loop(wake_end: int) -> None:
    """Wakes the loop, by its pipe from `catch_signals`; any thread may do so."""
    # A full pipe: the loop is awake anyway.
    with contextlib.suppress(BlockingIOError):
        os.write(wake_end, b"\0")

def watch(selector: selectors.BaseSelector, handle: int,
          act: Callable[[], None]) -> None:
    """Has the loop call `act` whenever `handle` is readable."""
    selector.register(handle, selectors.EVENT_READ, act)

def reread(say: Callable[[str], None]) -> Environment | None:
    """Returns the environment and `.env` as they are now.

    Where they are wrong, it says so and returns None.
    """
    try:
        environment = Environment.read()
        load_settings(environment, {})
    # Whatever stands in those files: the work goes on.
    except (Problem, OSError, ValueError) as error:
        say(f"{error}; settings are kept as they were")
        return None
    return environment

# -- what a worker is about, and what it waits for

class Lifecycle(enum.Enum):
    """What a worker process is about.

                      row entered
             OPENING -------------> WORKING
                |    <-------------    |
                |      found lost      |
                | stop                 | stop
                v     row entered      v      all settled      row deleted
            STOPPING_ -----------> STOPPING -------------> LEAVING ---> LEFT
         UNREGISTERED <-----------
                       found lost

    It stops when it is told to, when the queue is drained, and when the
    database refuses it; refused where it has no row, it has LEFT at once.
    """
    OPENING = enum.auto()   # its row is being entered
    WORKING = enum.auto()   # it claims jobs and runs them
    STOPPING = enum.auto()  # it claims nothing more, and settles what ends
    STOPPING_UNREGISTERED = enum.auto()  # its row is being entered all the same
    LEAVING = enum.auto()   # its row is being deleted, which is tried once
    LEFT = enum.auto()      # it has no row, and nothing to ask of the database

    @property
    def registered(self) -> bool:
        """Whether it has a row, so that it may take turns."""
        return self in REGISTERED

    @property
    def stopping(self) -> bool:
        """Whether it claims and starts nothing more."""
        return self not in (Lifecycle.OPENING, Lifecycle.WORKING)

    def when_registered(self) -> Lifecycle:
        """Returns what comes next once its row was entered."""
        return Lifecycle.STOPPING if self.stopping else Lifecycle.WORKING

    def when_found_lost(self) -> Lifecycle:
        """Returns what comes next once its row is lost, and a new one is entered."""
        if self.stopping:
            return Lifecycle.STOPPING_UNREGISTERED
        return Lifecycle.OPENING

    def when_stopped(self) -> Lifecycle:
        """Returns what comes next once it is to stop."""
        if self is Lifecycle.WORKING:
            return Lifecycle.STOPPING
        if self is Lifecycle.OPENING:
            return Lifecycle.STOPPING_UNREGISTERED
        return self

REGISTERED = (Lifecycle.WORKING, Lifecycle.STOPPING, Lifecycle.LEAVING)

@dataclass
class Timers:
    """The times that the loop acts on, each in seconds of `time.monotonic()`.

        time           what happens then              what sets it
        snapshot_at    a turn looks around            a turn that does; sooner: due
                                                      jobs, the doorbell, a stop
        detection_at   the heartbeat is raised, and   a turn that does: one
                       lost workers are looked for    heartbeat later
        paused_until   turns are taken again          a refusal by the database
        start_by       claimed jobs are handed back   a claim: one lease after its
                       instead of started             turn was asked for
        grace_over_at  what runs is ended             a stop, if there is a grace
        give_up_at     the process ends, whatever     a stop that ends what runs,
                       is not settled                 or the end of the last run
        host_short_at  (it is past) this host could   a start that failed by no
                       not start a job                fault of the job
    """
    snapshot_at: float = 0.0
    detection_at: float = 0.0
    paused_until: float = 0.0
    start_by: float = 0.0
    grace_over_at: float = math.inf
    give_up_at: float = math.inf
    host_short_at: float = -math.inf

    def look_within(self, seconds: float) -> None:
        """Has the next snapshot taken so soon, if it is not due sooner."""
        latest = time.monotonic() + seconds
        self.snapshot_at = min(self.snapshot_at, latest)

    def give_up_within(self, seconds: float) -> None:
        """Has the process end so soon, if it is not to end sooner."""
        latest = time.monotonic() + seconds
        self.give_up_at = min(self.give_up_at, latest)

# How often a draining worker without runs looks whether anything is left.
LOOK_WHEN_DRAINING_S = 0.2
# How much longer than poll_interval a look may wait where the doorbell is on.
POLL_STRETCH = 1.5

def snapshot_interval_s(settings: Settings, drains_idle: bool) -> float:
    """Returns the seconds between two looks, where nobody calls for one.

    `drains_idle` says of a draining worker that it runs nothing.
    """
    interval_s = settings.poll_interval
    if drains_idle:
        return min(interval_s, LOOK_WHEN_DRAINING_S)
    if settings.doorbell == "on":
        interval_s *= POLL_STRETCH
    # Heartbeats go with the looks, and can come no more often than those.
    return min(interval_s, settings.heartbeat)

# -- the database's side

class Opened(NamedTuple):
    """What came of entering the worker's row."""
    notes: list[str]  # for the log
    configured: LoadedSettings

@dataclass(frozen=True)
class DatabaseRequest(Generic[T]):
    """Work for the database thread, and what the loop does with its result."""
    work: Callable[[], T]
    callback: Callable[[T], None]

    def carry_out(self) -> DatabaseAnswer[T]:
        """Does the work; the database thread calls this."""
        try:
            return DatabaseAnswer(self.callback, self.work())
        # All errors go to the loop, which would wait for a dead thread.
        except Exception as error:
            return DatabaseAnswer(self.callback, error)

@dataclass(frozen=True)
class DatabaseAnswer(Generic[T]):
    """What came of a request: the result for its callback, or the error."""
    callback: Callable[[T], None]
    result: T | Exception

    def deliver(self, on_error: Callable[[Exception], None]) -> None:
        """Acts on it; the loop calls this."""
        if isinstance(self.result, Exception):
            on_error(self.result)
        else:
            self.callback(self.result)

# What a worker asks for: to enter its row, to take a turn, and to leave.
WorkerRequest = Union["DatabaseRequest[Opened]", "DatabaseRequest[TurnResult]",
                      "DatabaseRequest[None]"]
WorkerAnswer = Union["DatabaseAnswer[Opened]", "DatabaseAnswer[TurnResult]",
                     "DatabaseAnswer[None]"]

class DatabaseThread:
    """The thread that alone talks to the database; the loop never waits for it.

    It serves one request at a time: while `asked` is true, nothing else may be
    asked. Its answer is posted to the loop, which is woken and acts on it. So
    nothing but the work of a request ever runs beside the loop.
    """
    def __init__(self, wake_end: int,
                 on_error: Callable[[Exception], None]) -> None:
        """`on_error` is called in the loop with what a request's work raised."""
        self.asked = False  # a request is under way
        self._wake_end = wake_end
        self._on_error = on_error
        self._requests: queue.SimpleQueue[WorkerRequest] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[WorkerAnswer] = queue.SimpleQueue()
        threading.Thread(target=self._serve_requests, daemon=True).start()

    def request(self, request: WorkerRequest) -> None:
        """Has the thread do the work, and the loop act on what comes of it."""
        self.asked = True
        self._requests.put(request)

    def deliver_answer(self) -> None:
        """Has the loop act on the answer, if there is one."""
        if self._answers.empty():
            return
        # Before the callback, which may have more to ask.
        self.asked = False
        self._answers.get().deliver(self._on_error)

    def _serve_requests(self) -> None:
        """Does what is asked, for ever; this is the thread."""
        # Signals are for the loop; here they would only interrupt what is
        # under way.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        while True:
            request = self._requests.get()
            self._answers.put(request.carry_out())
            wake_loop(self._wake_end)

class Membership:
    """The worker as the database knows it: its id, its row, its turns.

    `open`, `enter`, `take_turn` and `leave` are the work of requests: the
    database thread alone calls them. The loop reads the rest, and changes it
    while no request is under way; `environment` it may replace at any time.
    """
    def __init__(self, options: WorkerOptions, context: WorkerContext) -> None:
        self.environment = options.environment
        self.route = Route()
        self._options = options
        self._context = context
        # One worker process tells of an outage for all of the supervisor's.
        say = options.say if context.number == 0 else _say_nothing
        lease_s = options.settings.lease_s
        # The worker waits for the server for ever. An answer is waited for no
        # longer than leaves time for a heartbeat before the lease is over.
        self._policy = RetryPolicy(
            retry_for_s=math.inf,
            timeout_s=max(2.0, lease_s / 3),
            say=say,
            longest_s=max(2.0, lease_s / 2))
        self._turns = self._new_turn_taker(options.settings)

    @property
    def worker(self) -> str:
        """The worker's id."""
        return self._turns.identity.id

    @property
    def settings(self) -> Settings:
        """The settings as they are now."""
        return self._turns.settings

    def use_settings(self, settings: Settings) -> None:
        """Has the next turn use these settings."""
        self._turns.settings = settings

    def start_over(self) -> None:
        """Becomes a new worker, whose row is yet to be entered."""
        self._turns.database.close()
        self._turns = self._new_turn_taker(self._turns.settings)

    def open(self) -> Opened:
        """Takes over from the dead workers of this host, then enters our row."""
        notes = []
        for worker, run_tags in self._context.inherited:
            # Ended first: once its run is written off, the job may run again.
            terminate_tagged(run_tags, self.settings.kill_grace)
            taken = self._take_over(worker)
            notes.append(
                f"worker {worker} died; {taken} runs written off as lost")
        for worker in self._end_orphans():
            taken = self._take_over(worker)
            notes.append(
                f"worker {worker} here is gone; {taken} runs taken over")
        return self.enter(notes)

    def enter(self, notes: list[str]) -> Opened:
        """Enters our row, and reads the settings.

        They may be others by now than when our supervisor began.
        """
        turns = self._turns
        register(turns.database, turns.identity, turns.settings.lease_s)
        config = read_config(turns.database)
        configured = load_settings(self.environment, config)
        return Opened(notes, configured)

    def take_turn(self, request: TurnRequest) -> TurnResult:
        """Takes a turn, then takes over what it found to have no live worker."""
        result = self._turns.take(request)
        if not (result.lost or result.orphaned):
            return result
        # What the dead left running here must be gone before it runs again.
        if result.lost:
            self._end_orphans()
        notes = self._turns.take_over_lost(result)
        return dataclasses.replace(result, notes=[*result.notes, *notes])

    def leave(self, ring_own: bool) -> None:
        """Deletes our row, and with `ring_own` ends our own doorbell's sleep."""
        database = self._turns.database
        deregister(database, self.worker)
        if ring_own:
            ring(database, worker=self.worker)

    def _end_orphans(self) -> list[str]:
        """Ends what dead workers of this host left running; returns their ids."""
        turns = self._turns
        exited = exited_local_workers(turns.database, is_gone)
        # Each may take no longer than our own heartbeat may wait.
        longest_s = turns.settings.lease_s / 4
        grace_s = min(turns.settings.kill_grace, longest_s)
        for run_tags in exited.values():
            terminate_tagged(run_tags, grace_s)
        return list(exited)

    def _take_over(self, worker: str) -> int | None:
        """Settles as lost the runs of a worker whose process is surely gone."""
        turns = self._turns
        # -1: its heartbeat does not matter.
        return take_over(turns.database, turns.settings, worker, -1)

    def _new_turn_taker(self, settings: Settings) -> TurnTaker:
        """Returns what takes a new worker's turns, and signs the registry."""
        identity = self._new_identity()
        self._context.registry.sign(identity.id)
        target = self._options.target
        database = Database(target, self._policy, route=self.route)
        skip_locked = self.environment.get("QUEUECTL_SKIP_LOCKED")
        switched_off = skip_locked.lower() in ("off", "0", "no")
        turns = TurnTaker(database, identity, not switched_off)
        turns.settings = settings
        # One worker process does the maintenance for all of the supervisor's.
        turns.purges = self._context.number == 0
        return turns

    def _new_identity(self) -> WorkerIdentity:
        """Returns this process as a worker with a new id; none is used twice."""
        host = socket.gethostname()
        pid = os.getpid()
        # The id is one word of the doorbell's note, and has its place in a
        # cell of the registry.
        place = re.sub("[^A-Za-z0-9.-]", "-", host)
        chance = secrets.token_hex(4)
        return WorkerIdentity(
            id=f"{place[:40]}-{chance}",
            host=host,
            pid=pid,
            supervisor=self._context.supervisor,
            process_identity=process_identity(pid),
            slots=self._context.slots,
            queues=self._options.queues)

def _say_nothing(text: str) -> None:
    """Stands in for `say` where another process tells the same."""

# How long a sleep takes in the server until others can find it.
PARKING_S = 0.005

class WakeCalls:
    """Who tells us that there is something to look at, and whom we tell.

    An enqueue rings the doorbell, which the first worker process parks for all
    of its supervisor's; the siblings call one another.
    """
    def __init__(self, options: WorkerOptions, context: WorkerContext,
                 wake_end: int) -> None:
        self.came = False  # somebody called since the last turn was asked for
        self.listener = context.siblings.listener(context.number)
        self.doorbell: Doorbell | None = None  # made when it is first parked
        self._options = options
        self._siblings = context.siblings
        self._number = context.number
        self._wake_end = wake_end

    def on_sibling(self) -> None:
        """Hears a sibling's call, once `listener` is readable."""
        os.read(self.listener, 4096)
        self.came = True

    def park(self, doorbell_on: bool, worker: str, route: Route) -> bool:
        """Lets an enqueue find this supervisor, while it has a free slot.

        Returns True if the doorbell is parked from now on, and was not before:
        what was enqueued just now could not ring it.
        """
        if self._number:
            return False
        if not doorbell_on or not self._siblings.idle():
            if self.doorbell:
                self.doorbell.leave()
            return False
        if not self.doorbell:
            options = self._options
            queues = ",".join(options.queues) or "-"
            note = f"{worker} {queues}"
            self.doorbell = Doorbell(options.target, note, self._on_rung,
                                     route)
        return self.doorbell.park()

    def call_siblings(self, snapshot: QueueSnapshot, all_busy: bool) -> None:
        """Tells siblings what a snapshot of ours shows to concern them."""
        siblings = self._siblings
        others = set(range(len(siblings)))
        others.discard(self._number)
        # Of a cancellation the first process tells all: one that tells is
        # enough.
        cancelled = snapshot.others_cancelled and self._number == 0
        if snapshot.drained or cancelled:
            siblings.wake(others)
            return
        if snapshot.waiting and all_busy:
            # One is called, which calls another if it cannot take all that
            # waits.
            idle = [number for number in siblings.idle() if number in others]
            siblings.wake(idle[:1])

    def _on_rung(self) -> None:
        """Hears the doorbell, whose own thread calls this."""
        # The flag before the byte: once awake, the loop must find it set.
        self.came = True
        wake_loop(self._wake_end)

# -- the processes' side

class Results:
    """How runs ended, kept until a turn has settled them."""
    def __init__(self) -> None:
        self.waiting: list[Ended] = []
        self.in_turn: Sequence[Ended] = ()  # for the turn under way to settle

    def add(self, claim: Claim, outcome: RunOutcome) -> None:
        self.waiting.append((claim, outcome))

    def hand_back(self, claim: Claim) -> None:
        """Gives up a claim whose run never began."""
        self.add(claim, RunOutcome(Reason.HANDED_BACK))

    def take(self) -> Sequence[Ended]:
        """Returns all that waits, for a turn to settle."""
        self.in_turn = self.waiting
        self.waiting = []
        return self.in_turn

    def put_back(self, unsettled: Sequence[Ended]) -> None:
        """Ends a turn: what it left unsettled waits for the next, before the rest."""
        self.in_turn = ()
        self.waiting = [*unsettled, *self.waiting]

    def unsettled(self) -> list[Ended]:
        """Returns all that was not settled as far as we know."""
        return [*self.in_turn, *self.waiting]

# The loop starts so many jobs, then looks at what else has happened.
STARTED_AT_ONCE = 4
# A host without descriptors, memory or the like starts nothing for a moment,
# and then one job at a time until no start has failed for a while.
SHORT_PAUSE_S = 1.0
SHORT_MEMORY_S = 10.0

class RunTable:
    """The runs of this worker: claimed, running, or ended and not yet settled.

    A claim goes from `claimed` to `running` to `results`, or from the first
    right to the last, and leaves the table when it is settled or lost.
    """
    def __init__(self, options: WorkerOptions, context: WorkerContext,
                 timers: Timers, selector: selectors.BaseSelector) -> None:
        self.claimed: collections.deque[ClaimedJob] = collections.deque()
        # By pid; also those that are being ended.
        self.running: dict[int, RunningJob] = {}
        self.results = Results()
        self._settings = options.settings
        self._say = options.say
        self._context = context
        self._timers = timers
        self._selector = selector
        self._spawner = JobSpawner(os.environb)

    def use_settings(self, settings: Settings) -> None:
        """Has what runs use these settings too: all have one kill_grace."""
        self._settings = settings
        for process in self.running.values():
            process.settings = settings

    # What the loop asks

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        return len(self.claimed) + len(self.running)

    def claims(self) -> list[Claim]:
        """Returns the claims of all runs that have not ended."""
        jobs = [process.job for process in self.running.values()]
        jobs += self.claimed
        return [job.claim for job in jobs]

    def free_slots(self, now: float) -> int:
        """Returns how many jobs the next turn may claim."""
        claims = self.claims()
        # A job that seems to kill its workers shall take no other run with it.
        if any(claim.alone for claim in claims):
            return 0
        short_at = self._timers.host_short_at
        if now < short_at + SHORT_PAUSE_S:
            return 0
        free = self._context.slots - len(claims)
        # A host that is short takes one at a time, and leaves the others to
        # others.
        if now < short_at + SHORT_MEMORY_S:
            return min(free, 1)
        return free

    def next_check_at(self) -> float:
        """Returns when a run's time limit, or its end, needs us next."""
        times = [process.check_at for process in self.running.values()]
        return min(times, default=math.inf)

    def next_flush_at(self) -> float:
        """Returns when a run's output is to be flushed next."""
        times = [process.flush_at for process in self.running.values()]
        return min(times, default=math.inf)

    def flushes(self, now: float) -> list[Ended]:
        """Returns the output so far of the runs for which it is time."""
        flushes = []
        for process in self.running.values():
            if now >= process.flush_at:
                flush = process.flush()
                if flush:
                    flushes.append(flush)
        return flushes

    def put_off_flushes(self, unflushed: Collection[tuple[int, str]]) -> None:
        """Has the output that a turn could not carry flushed again."""
        for process in self.running.values():
            if process.key in unflushed:
                process.put_off_flush()

    # Starting

    def start_some(self, stopping: bool) -> None:
        """Starts a few of the claimed jobs, or hands them back when stopping."""
        for _ in range(STARTED_AT_ONCE):
            # Also where a start has failed, and all the others were just
            # handed back.
            if not self.claimed:
                return
            job = self.claimed.popleft()
            # Stood we still for a lease since we asked, others may run it by
            # now.
            if stopping or time.monotonic() > self._timers.start_by:
                self.results.hand_back(job.claim)
            else:
                self._start(job)

    def _start(self, job: ClaimedJob) -> None:
        """Starts a run, unless its job does not bear the signature that it needs."""
        claim = job.claim
        signed = (claim.id, job.command, job.cwd, job.env, job.on_failure)
        if not is_signed(job.signature, *signed):
            why = ("not enqueued as it is by one who has this "
                   "QUEUECTL_SIGNING_KEY")
            self.results.add(claim, RunOutcome(Reason.SIGNATURE, detail=why))
            return
        # Noted before it starts: were we killed in between, it could not be
        # found.
        self._context.registry.note(f"{claim.token}-{claim.seq}")
        process = RunningJob(job, self._settings, self._spawner)
        if process.gone:
            # Only a failure that is not the job's own has a cause.
            if process.cause:
                self._on_host_short(process)
            self._settle(process)
            return
        self.running[process.pid] = process
        on_output = functools.partial(self._on_output, process)
        watch(self._selector, process.pipe, on_output)

    def _on_host_short(self, process: RunningJob) -> None:
        """Hands back all that was claimed: this host is short of something."""
        now = time.monotonic()
        timers = self._timers
        # It is said once for a row of such failures.
        if now > timers.host_short_at + SHORT_MEMORY_S:
            self._say(f"cannot start a job: {process.failure}; handing back, "
                      "and one at a time for a while")
        timers.host_short_at = now
        timers.snapshot_at = now + SHORT_PAUSE_S
        for job in self.claimed:
            self.results.hand_back(job.claim)
        self.claimed.clear()

    # Going on, and ending

    def _on_output(self, process: RunningJob) -> None:
        """Takes some of a run's output, whose pipe is readable."""
        if not process.read():
            self._hang_up(process)

    def _hang_up(self, process: RunningJob) -> None:
        """Takes the rest of a run's output, and closes its pipe if still open."""
        if process.pipe < 0:
            return
        # A run that did not start has a pipe that is not watched.
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.pipe)
        process.close_pipe()

    def reap(self) -> None:
        """Takes the exit statuses of all children that have ended."""
        process_table = ProcessTable()
        for pid, status in reap():
            process = self.running.get(pid)
            # Any other is an orphan that we adopted.
            if process:
                self._hang_up(process)
                process.reaped(status, process_table)

    def tick(self) -> None:
        """Acts on the grace and the time limits, and takes down what ended."""
        now = time.monotonic()
        if now >= self._timers.grace_over_at:
            self._timers.grace_over_at = math.inf
            self.end_all(Reason.HANDED_BACK)
        process_table = ProcessTable()
        for process in list(self.running.values()):
            process.tick(now, process_table)
            if process.gone and process.may_settle(now):
                del self.running[process.pid]
                self._settle(process)

    def _settle(self, process: RunningJob) -> None:
        """Takes down how a run ended; the next turn writes it."""
        self._hang_up(process)
        self._context.registry.strike(process.run_tag)
        # What is lost has been settled already, by who declared us lost.
        if process.cause is Reason.LOST:
            return
        outcome = process.outcome()
        self.results.add(process.job.claim, outcome)

    def cancel(self, runs: Mapping[tuple[int, str], bool]) -> None:
        """Begins to end the runs that are to be cancelled."""
        process_table = ProcessTable()
        for process in self.running.values():
            cancelled = runs.get(process.key)
            if cancelled:
                process.terminate(Reason.CANCELLED, process_table)

    def end_all(self, cause: Reason) -> None:
        """Begins to end all that runs; none gets more than kill_grace from now."""
        process_table = ProcessTable()
        for process in self.running.values():
            process.terminate(cause, process_table)
            process.shorten_grace(time.monotonic())

    def drop_lost(self) -> None:
        """Ends what runs, and forgets the rest: all this is others' by now."""
        self.end_all(Reason.LOST)
        self.claimed.clear()
        self.results = Results()

# -- the loop

# While more claimed jobs than these are left to start, no turn is needed for
# more.
LOW_WATER = 8

class TurnPlanner:
    """When a turn is worth asking for, and what it is to carry."""
    def __init__(self, drain: bool, timers: Timers, runs: RunTable,
                 wake_calls: WakeCalls) -> None:
        self._drain = drain
        self._timers = timers
        self._runs = runs
        self._wake_calls = wake_calls

    def due_at(self) -> float:
        """Returns when there will be something to say, as far as is known."""
        if self._runs.results.waiting or self._wake_calls.came:
            return 0.0
        flush_at = self._runs.next_flush_at()
        return min(self._timers.snapshot_at, flush_at)

    def next_request(self, now: float, stopping: bool,
                     settings: Settings) -> TurnRequest | None:
        """Returns what a turn is to carry; None if there is nothing to say.

        What it returns must be asked for: the results have been taken out.
        """
        runs = self._runs
        called = self._wake_calls.came
        look = now >= self._timers.snapshot_at
        # While there is enough to start, results gather: one turn settles all.
        enough = len(runs.claimed) > LOW_WATER
        if enough and not look and not called:
            return None
        flushes = runs.flushes(now)
        ended = bool(runs.results.waiting)
        # With the last result of a draining worker the queue may be drained.
        if self._drain and ended and not runs.busy:
            look = True
        if not (ended or flushes or look or called):
            return None
        detect = self._set_timers(now, look, settings)
        free = 0 if stopping else runs.free_slots(now)
        running = [(claim.seq, claim.token) for claim in runs.claims()]
        return TurnRequest(
            ended=runs.results.take(),
            flushes=flushes,
            running=running,
            free=free,
            look=look,
            detect=detect,
            drain=self._drain and not stopping,
            state="stopping" if stopping else "running")

    def _set_timers(self, now: float, look: bool, settings: Settings) -> bool:
        """Sets when the next look is due; returns whether this one detects."""
        timers = self._timers
        detect = False
        if look:
            drains_idle = self._drain and not self._runs.busy
            interval_s = snapshot_interval_s(settings, drains_idle)
            timers.snapshot_at = now + interval_s
            # The last look that is in time for the heartbeat carries it.
            detect = timers.snapshot_at >= timers.detection_at
        # Who called has work for us: the claim comes first, the look after it.
        if self._wake_calls.came:
            self._wake_calls.came = False
            timers.snapshot_at = now + PARKING_S
        if detect:
            timers.detection_at = now + settings.heartbeat
        return detect

# How long a stopped worker that runs nothing waits for the database to take
# the last results, unless a grace was given; and, without results, to delete
# its row.
RESULTS_WAIT_S = 30.0
NOTHING_TO_SETTLE_WAIT_S = 5.0
# The least of it, even for a grace of 0: a turn may be under way.
LEAST_WAIT_S = 1.0
# How long beyond kill_grace a worker stays that is to end at once: told so by
# its supervisor, which kills it soon after, or alone.
FORCED_WAIT_S = 0.5
ORPHANED_WAIT_S = 1.0
# How long a refusal by the database keeps the worker from asking again.
REFUSED_PAUSE_S = 1.0
# The longest sleep of the loop: a selector takes no endless time.
LONGEST_PAUSE_S = 3600.0

class Worker:
    """The loop of one worker process.

    The other methods are steps of the loop, or act on one event: an answer of
    the database thread, a signal, the end of the supervisor.
    """
    def __init__(self, options: WorkerOptions, context: WorkerContext) -> None:
        self.options = options
        self.context = context
        self.status = 0
        self._lifecycle = Lifecycle.OPENING
        self._forced = False  # it is to end at once
        timers = Timers()
        selector = selectors.DefaultSelector()
        signals, wake_end = catch_signals()
        wake_calls = WakeCalls(options, context, wake_end)
        on_signals = functools.partial(self._on_signals, signals)
        watch(selector, signals, on_signals)
        watch(selector, context.lifeline, self._on_orphaned)
        watch(selector, wake_calls.listener, wake_calls.on_sibling)
        runs = RunTable(options, context, timers, selector)
        self._timers = timers
        self._selector = selector
        self._wake_calls = wake_calls
        self._runs = runs
        self._planner = TurnPlanner(options.drain, timers, runs, wake_calls)
        self._membership = Membership(options, context)
        self._thread = DatabaseThread(wake_end, self._on_refused)

    @property
    def settings(self) -> Settings:
        """The settings as they are now."""
        return self._membership.settings

    def run(self) -> int:
        """Works until told to stop, or drained; returns the exit status."""
        opening = DatabaseRequest(self._membership.open, self._on_opened)
        self._thread.request(opening)
        while not self._finished():
            self._request_turn()
            pause_s = self._pause_s()
            for key, _ in self._selector.select(pause_s):
                key.data()
            self._runs.reap()
            self._runs.tick()
            self._thread.deliver_answer()
            self._runs.start_some(self._lifecycle.stopping)
        return self.status

    # -- asking

    def _request_turn(self) -> None:
        """Asks for a turn, or to leave, if there is a reason to."""
        thread = self._thread
        if thread.asked or not self._lifecycle.registered:
            return
        now = time.monotonic()
        if now < self._timers.paused_until:
            return
        stopping = self._lifecycle.stopping
        request = self._planner.next_request(now, stopping, self.settings)
        if request:
            take_turn = functools.partial(self._membership.take_turn, request)
            on_turn = functools.partial(self._on_turn, now)
            thread.request(DatabaseRequest(take_turn, on_turn))
        elif self._may_leave():
            self._lifecycle = Lifecycle.LEAVING
            # A sleep that is parked would stay in the server for a while.
            ring_own = self._wake_calls.doorbell is not None
            leave = functools.partial(self._membership.leave, ring_own)
            thread.request(DatabaseRequest(leave, self._on_left))

    def _may_leave(self) -> bool:
        """Returns whether our row is to be deleted, and nothing needs it."""
        stopping = self._lifecycle is Lifecycle.STOPPING
        return stopping and not self._runs.busy

    def _pause_s(self) -> float:
        """Returns the seconds until the next timer."""
        if self._runs.claimed:
            return 0.0
        timers = self._timers
        check_at = self._runs.next_check_at()
        wake_at = min(timers.grace_over_at, timers.give_up_at, check_at)
        # Where a turn cannot be asked for, what makes it possible wakes us.
        if self._lifecycle.registered and not self._thread.asked:
            turn_at = 0.0 if self._may_leave() else self._planner.due_at()
            turn_at = max(turn_at, timers.paused_until)
            wake_at = min(wake_at, turn_at)
        pause_s = wake_at - time.monotonic()
        return max(0.0, min(pause_s, LONGEST_PAUSE_S))

    # -- what the database answers

    def _on_opened(self, opened: Opened) -> None:
        """Our row was entered: turns may be taken."""
        for note in opened.notes:
            self.options.say(note)
        self._lifecycle = self._lifecycle.when_registered()
        self._take_settings(opened.configured)
        # A closed pipe: nobody waits for it any more.
        with contextlib.suppress(OSError):
            os.write(self.context.ready, b"+")

    def _take_settings(self, configured: LoadedSettings) -> None:
        """Has all that follows use these settings, what runs now included."""
        for complaint in configured.complaints:
            self.options.say(complaint)
        settings = configured.settings
        self._membership.use_settings(settings)
        self._runs.use_settings(settings)
        self.context.registry.open(settings.kill_grace)

    def _on_turn(self, asked_at: float, result: TurnResult) -> None:
        """Acts on what came of a turn that was asked for at `asked_at`."""
        runs, timers = self._runs, self._timers
        had_results = bool(runs.results.in_turn)
        self._tell(result)
        if not result.alive:
            self._on_found_lost()
            return
        runs.results.put_back(result.unsettled)
        runs.put_off_flushes(result.unflushed)
        if result.jobs:
            runs.claimed.extend(result.jobs)
            # The turn's heartbeat came later: until then they are surely ours.
            timers.start_by = asked_at + self.settings.lease_s
        self.context.siblings.report(self.context.number, runs.busy)
        timers.look_within(result.due_s)
        if result.snapshot:
            self._on_snapshot(result.snapshot)
        # Where runs end as fast as others start, more turns follow at once.
        more_follow = result.jobs and had_results
        if self._lifecycle.stopping or more_follow:
            return
        doorbell_on = self.settings.doorbell == "on"
        worker, route = self._membership.worker, self._membership.route
        if self._wake_calls.park(doorbell_on, worker, route):
            # What was enqueued just before could not ring.
            timers.look_within(PARKING_S)

    def _tell(self, result: TurnResult) -> None:
        """Writes to the log what a turn has come to."""
        for note in result.notes:
            self.options.say(note)
        for settlement in result.settlements:
            completed = settlement.to is State.COMPLETED
            if self.options.verbose or not completed:
                self.options.say(settlement_line(settlement))

    def _on_snapshot(self, snapshot: QueueSnapshot) -> None:
        """Acts on what a look around has shown."""
        runs = self._runs
        runs.cancel(snapshot.runs)
        all_busy = runs.busy >= self.context.slots
        self._wake_calls.call_siblings(snapshot, all_busy)
        config = snapshot.config
        version = config.get("schema_version")
        environment = self._membership.environment
        try:
            check_schema(version, self.options.target.database)
            configured = load_settings(environment, config)
        except Problem as problem:
            if not self._lifecycle.stopping:
                self.options.say(f"{problem.what}; stopping")
                # With this status it is not replaced by another like it.
                self.status = 1
                self._stop()
            return
        if configured.settings != self.settings:
            self._take_settings(configured)
        if snapshot.drained and not runs.busy and not runs.results.waiting:
            self._stop()

    def _on_found_lost(self) -> None:
        """Ends our runs, which are others' now, and enters as a new worker."""
        membership = self._membership
        count = len(self._runs.running)
        self.options.say(
            f"this worker ({membership.worker}) was declared lost: ending its "
            f"{count} runs and entering anew")
        self._runs.drop_lost()
        self._lifecycle = self._lifecycle.when_found_lost()
        membership.start_over()
        enter = functools.partial(membership.enter, [])
        self._thread.request(DatabaseRequest(enter, self._on_opened))

    def _on_left(self, _: None) -> None:
        """Our row was deleted."""
        self._lifecycle = Lifecycle.LEFT

    def _on_refused(self, problem: Exception) -> None:
        """Stops: the database refuses us, say because the schema has moved on.

        Nothing can be settled here then. What is no Problem is a bug.
        """
        if not isinstance(problem, Problem):
            raise problem
        registered = self._lifecycle.registered
        if not self._lifecycle.stopping:
            self.options.say(f"{problem.what}; stopping")
        results = self._runs.results
        results.put_back(results.in_turn)
        self.status = 1
        self._stop()
        self._timers.paused_until = time.monotonic() + REFUSED_PAUSE_S
        # Without a row there is nothing to leave.
        if not registered:
            self._lifecycle = Lifecycle.LEFT

    # -- stopping

    def _on_signals(self, handle: int) -> None:
        """Acts on the signals that came, whose numbers the pipe holds."""
        try:
            numbers = os.read(handle, 4096)
        except BlockingIOError:
            return
        # SIGCHLD, and the byte of `wake_loop`, did enough by waking the loop.
        # What a terminal sends is the supervisor's affair.
        for number in numbers:
            if number == signal.SIGTERM:
                self._stop()
            elif number == STOP_NOW_SIGNAL:
                self._stop_now(FORCED_WAIT_S)
            elif number == signal.SIGHUP:
                environment = reread(self.options.say)
                if environment:
                    self._membership.environment = environment
                self._timers.snapshot_at = 0.0

    def _on_orphaned(self) -> None:
        """Ends soon: the supervisor is gone, and nobody watches over us."""
        self._selector.unregister(self.context.lifeline)
        self.options.say("the supervisor is gone: ending")
        self._stop_now(ORPHANED_WAIT_S)

    def _stop(self) -> None:
        """Claims nothing more; what runs may end, within the grace if any."""
        if self._lifecycle.stopping:
            return
        self._lifecycle = self._lifecycle.when_stopped()
        timers = self._timers
        # At once, since it says in our row that we are stopping.
        timers.snapshot_at = 0.0
        grace_s = self.options.grace_s
        if grace_s is not None:
            timers.grace_over_at = time.monotonic() + grace_s

    def _stop_now(self, wait_s: float) -> None:
        """Ends what runs, and is gone soon, with or without a database."""
        self._stop()
        timers = self._timers
        timers.grace_over_at = math.inf
        # Told once more, it gets no more time.
        if self._forced:
            return
        self._forced = True
        self._runs.end_all(Reason.HANDED_BACK)
        longest_s = self.settings.kill_grace + wait_s
        timers.give_up_at = time.monotonic() + longest_s

    def _finished(self) -> bool:
        """Returns whether the loop is to end: we have left, or time is up."""
        if not self._lifecycle.stopping:
            return False
        results, timers = self._runs.results, self._timers
        if not self._runs.busy:
            if self._lifecycle is Lifecycle.LEFT and not results.waiting:
                return True
            # The first deadline: the last results wait for a database that is
            # away. Those runs would be done again, so it has as long as runs
            # had to end.
            wait_s = self.options.grace_s
            if wait_s is None:
                wait_s = RESULTS_WAIT_S
            # The second: only our row waits to be deleted. If it stays, others
            # find us gone.
            if not results.unsettled():
                wait_s = NOTHING_TO_SETTLE_WAIT_S
            timers.give_up_within(max(wait_s, LEAST_WAIT_S))
        # The third, set by `_stop_now`, holds even while something still runs:
        # what is left of that the supervisor ends.
        if time.monotonic() < timers.give_up_at:
            return False
        self._give_up()
        return True

    def _give_up(self) -> None:
        """Says which results the database has not taken."""
        claims = [claim for claim, _ in self._runs.results.unsettled()]
        claims += self._runs.claims()
        if claims:
            lost = ", ".join(claim.id for claim in claims)
            self.options.say("the database did not take the results of "
                             f"{lost}: they will run again")
            self.status = self.status or 1

def settlement_line(settlement: Settlement) -> str:
    """Returns the log's line on a run that was settled."""
    claim = settlement.claim
    outcome = settlement.outcome
    how = str(outcome.reason)
    if outcome.exit_code is not None:
        if outcome.reason is not Reason.EXIT:
            how += ", exit status"
        how += f" {outcome.exit_code}"
    took = say_duration(outcome.duration_s or 0)
    if settlement.to is State.FAILED:
        wait = say_duration(settlement.transition.wait_s)
        then = f"again in {wait}"
    else:
        then = str(settlement.to)
    if outcome.detail:
        then += f" ({outcome.detail})"
    attempt = f"attempt {claim.attempts}/{claim.max_attempts}"
    return f"job {claim.id}: {how} after {took}, {attempt}: {then}"


# ---- supervisor --------------------------------------------------------------
#
# Keeps worker processes alive: forks, reaps, obeys signals, holds the PID file. It
# never connects to the database, so it works with or without one. The PID file is held
# under an exclusive lock for the daemon's life: locked is alive, unlocked is stale,
# whatever number stands in it.

LOG_BYTES_MAX = 10 << 20
RESPAWN_PAUSE_S, RESPAWN_PAUSE_MAX_S, STEADY_AFTER_S = 0.1, 30.0, 10.0
READY_WAIT_S = 30.0
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


class Log:
    """Lines on standard error, with the time; a file grows to 10 MB, then is `.1`."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        if path:
            self._open()

    def say(self, text: str) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        line = (
            f"{say_time(now.replace(tzinfo=None))} [{os.getpid()}] "
            f"{text.translate(MULTILINE)}\n"
        )
        with contextlib.suppress(OSError):  # a full disk must not end the work
            if self.path:
                with contextlib.suppress(OSError):  # then it goes into the old file
                    self._turn_over()
            os.write(2, line.encode("utf-8", "replace"))

    def _open(self) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    def _turn_over(self) -> None:
        """Rename a full file, or follow when another process has. Whoever gets its
        lock decides: by an own descriptor, for forks share one, and its lock."""
        if os.fstat(2).st_size > LOG_BYTES_MAX:
            with open(self.path, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(2, self.path):
                    os.rename(self.path, self.path + ".1")
        if not _same_file(2, self.path):
            self._open()


def _same_file(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


class PidFileStatus(NamedTuple):
    """What a PID file says: whether it is there, its number, and if that is alive."""

    found: bool
    pid: int
    alive: bool


def probe_pid_file(path: str) -> PidFileStatus:
    """Whether a daemon holds the PID file, by a shared lock taken for an instant."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return PidFileStatus(False, 0, False)
    except OSError as error:
        raise Problem(f"cannot read the PID file {path}: {error.strerror}") from None
    try:
        first = os.read(handle, 64).split(b"\n")[0]
        pid = int(first) if first.isdigit() and len(first) < 10 else 0
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return PidFileStatus(True, pid, False)
    except BlockingIOError:
        return PidFileStatus(True, pid, True)
    finally:
        os.close(handle)


def lock_pid_file(path: str) -> int:
    """A descriptor that holds the PID file for us, emptied; Problem if another does."""
    until = time.monotonic() + 1
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Problem(
                f"cannot write the PID file {path}: {error.strerror}",
                "name another one: --pid-file FILE",
            ) from None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):  # else a stopping daemon has just removed it
                os.ftruncate(handle, 0)
                try:
                    os.write(handle, b"\n" * 12)  # there is room for the number
                except OSError as error:
                    os.unlink(path)
                    raise Problem(
                        f"cannot write the PID file {path}: {error.strerror}",
                        "name another one: --pid-file FILE",
                    ) from None
                return handle
        os.close(handle)
        if time.monotonic() > until:
            pid = probe_pid_file(path).pid or "?"
            raise Problem(
                f"a worker daemon runs already: PID {pid} holds {path}",
                "stop it (queuectl worker stop), or give another --pid-file",
            )
        time.sleep(0.02)


def fork_child(work: Callable[[], int], say: Callable[[str], None]) -> int:
    """The pid of a child that does `work` and exits with its status."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = work()
    except BaseException:
        say(traceback.format_exc())
    finally:
        os._exit(status)  # a child never returns into its parent's stack


@dataclass
class ChildProcess:
    """A worker process as its supervisor knows it."""

    slots: int
    registry: RunRegistry
    inherited: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pid: int = 0
    started: float = 0.0
    pause_s: float = RESPAWN_PAUSE_S
    spawn_at: float = 0.0


class Supervisor:
    """Forks the crew, keeps it up, and stops it."""

    def __init__(
        self, options: WorkerOptions, count: int, held: Collection[int] = ()
    ) -> None:
        self.options = options
        self.stopping = False
        self.stop_signal = 0  # the second signal: leave with 128 + n
        self.status = 0
        self._held = held  # descriptors that only the supervisor may have
        self._kill_at = math.inf
        # Asked now: the terminal is gone when it hangs up. nohup has it ignored.
        self._on_terminal = (
            _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        )
        processes = min(count, os.cpu_count() or 1)
        shares = [len(range(at, count, processes)) for at in range(processes)]
        self._children = [ChildProcess(slots, RunRegistry(slots)) for slots in shares]
        self._siblings = SiblingWorkers(shares)
        self._lifeline, self._life = os.pipe()
        self._ready, self._ready_end = os.pipe()

    def run(self, announce: Callable[[], None]) -> int:
        """Keep the workers up until told to stop, or all drained; the exit status.

        `announce` is called once, when the first worker has entered its row.
        """
        become_subreaper()
        wake, _ = catch_signals()
        announced = False
        while True:
            pause_s = self._spawn_missing()
            readable, _, _ = select.select([wake, self._ready], [], [], pause_s)
            if wake in readable:
                for number in os.read(wake, 4096):
                    self._handle_signal(number)
            if self._ready in readable and os.read(self._ready, 4096) and not announced:
                announced = True
                announce()
            self._reap()
            if time.monotonic() >= self._kill_at:
                self._kill_at = math.inf
                self._signal(signal.SIGKILL)
            if self.stopping and not any(child.pid for child in self._children):
                self._end_inherited()
                return 128 + self.stop_signal if self.stop_signal else self.status

    def _spawn_missing(self) -> float | None:
        """Fork what is due; the seconds until the next timer, None if there is none."""
        now, soonest = time.monotonic(), self._kill_at
        for child in self._children:
            if child.pid or self.stopping:
                continue
            if now >= child.spawn_at:
                self._fork(child)
            else:
                soonest = min(soonest, child.spawn_at)
        return None if math.isinf(soonest) else max(0.0, soonest - now)

    def _fork(self, child: ChildProcess) -> None:
        supervisor = os.getpid()

        def work() -> int:
            signal.set_wakeup_fd(-1)
            for handle in (*self._held, self._life, self._ready):
                os.close(handle)
            become_subreaper()
            number = self._children.index(child)
            context = WorkerContext(
                number,
                self._siblings,
                child.slots,
                supervisor,
                self._lifeline,
                self._ready_end,
                child.registry,
                child.inherited,
            )
            return Worker(self.options, context).run()

        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            child.pid, child.started = (
                fork_child(work, self.options.say),
                time.monotonic(),
            )
        except OSError as error:
            self.options.say(f"cannot start a worker process: {error.strerror}")
            child.spawn_at = time.monotonic() + 1.0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _reap(self) -> None:
        for pid, status in reap():
            for child in self._children:
                if child.pid == pid:
                    child.pid = 0
                    self._on_end(child, status)

    def _on_end(self, child: ChildProcess, status: int) -> None:
        """A worker ended: as told, or drained, or in a crash that we make good."""
        if status == 1 or (status == 0 and (self.stopping or self.options.drain)):
            # Told to, drained, or unable to go on: in each case this one is over.
            self.status = max(self.status, status)
            child.spawn_at = math.inf
            if all(one.spawn_at == math.inf and not one.pid for one in self._children):
                self.stopping = True
            return
        worker, grace_s, marks = child.registry.read()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self.options.say(
            f"worker process of {worker or 'an unknown worker'} ended: {how}"
        )
        if self.stopping:
            terminate_tagged(marks, self._kill_grace())
            self.status = 1
            return
        earlier = () if grace_s is not None else child.inherited
        child.inherited = (*earlier, (worker, tuple(marks))) if worker else earlier
        child.registry = RunRegistry(child.slots)
        now = time.monotonic()
        if now - child.started > STEADY_AFTER_S:
            child.pause_s = RESPAWN_PAUSE_S
        child.spawn_at = now + child.pause_s
        child.pause_s = min(2 * child.pause_s, RESPAWN_PAUSE_MAX_S)

    def _kill_grace(self) -> float:
        """As the workers have it, which may have learnt of another."""
        return max(
            self.options.settings.kill_grace,
            *(child.registry.read()[1] or 0.0 for child in self._children),
        )

    def _end_inherited(self) -> None:
        """End what dead workers left running, where nobody came after them."""
        left = [
            mark
            for child in self._children
            if child.registry.read()[1] is None
            for _, marks in child.inherited
            for mark in marks
        ]
        if left:
            terminate_tagged(left, self._kill_grace())
            self.status = 1

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGHUP and not self._on_terminal:
            self.options.say("SIGHUP: reading the settings again")
            environment = reread(self.options.say)
            if environment:
                self.options = dataclasses.replace(
                    self.options, environment=environment
                )
                self._signal(signal.SIGHUP)
        elif number in STOPS and not self.stopping:
            self.stopping = True
            self.options.say("stopping: running jobs may end; once more ends them now")
            self._signal(signal.SIGTERM)
        elif number in STOPS and not self.stop_signal:
            self.stop_signal = number
            self.options.say("stopping now: running jobs are ended and handed back")
            self._signal(STOP_NOW_SIGNAL)
            self._kill_at = time.monotonic() + self._kill_grace() + 3

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.pid:
                send_signal(child.pid, number)


def _has_terminal() -> bool:
    """Whether a terminal controls us: then SIGHUP means that it went away."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def run_workers(
    options: WorkerOptions, count: int, pid_file: str, log_file: str
) -> int:
    """Run the crew here or, given a log, as a daemon; the exit status."""
    held = lock_pid_file(pid_file) if pid_file else -1
    if log_file:
        return _daemonize(options, count, pid_file, log_file, held)
    return _serve(options, count, pid_file, held)


def _serve(
    options: WorkerOptions, count: int, pid_file: str, held: int, ready_end: int = -1
) -> int:
    if held >= 0:
        os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    served = f"queues {', '.join(options.queues)}" if options.queues else "all queues"
    slots = f"{count} slot{'s' * (count > 1)}"

    def announce() -> None:
        options.say(f"{slots} ready, serving {served} of {options.target}")
        if ready_end >= 0:
            with contextlib.suppress(BrokenPipeError):  # the starter did not wait
                os.write(ready_end, b"+")
            os.close(ready_end)

    try:
        return Supervisor(options, count, [held] if held >= 0 else []).run(announce)
    finally:
        options.say("stopped")
        # Somebody may have removed it, and another daemon have made its own.
        if held >= 0 and _same_file(held, pid_file):
            with contextlib.suppress(OSError):
                os.unlink(pid_file)


def _daemonize(
    options: WorkerOptions, count: int, pid_file: str, log_file: str, held: int
) -> int:
    """Fork the daemon and wait until it is ready; if it dies first, print why."""
    read_end, write_end = os.pipe()
    try:
        os.close(os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
    except OSError as error:
        raise Problem(
            f"cannot write the log {log_file}: {error.strerror}",
            "name another one: --log-file FILE",
        ) from None

    def serve() -> int:
        os.close(read_end)
        os.setsid()
        with open(os.devnull) as null:
            os.dup2(null.fileno(), 0)
        quiet = dataclasses.replace(options, say=Log(log_file).say, verbose=False)
        return _serve(quiet, count, pid_file, held, write_end)

    pid = fork_child(serve, options.say)
    os.close(write_end)
    os.close(held)
    ready, _, _ = select.select([read_end], [], [], READY_WAIT_S)
    if ready and os.read(read_end, 1):
        print(
            f"worker daemon started: PID {pid} in {pid_file}, log in {log_file}",
            file=sys.stderr,
        )
        return 0
    if not ready:
        send_signal(pid, signal.SIGTERM)
    raise Problem(
        f"the worker daemon did not get ready{_log_tail(log_file)}",
        f"see {log_file}",
        UNAVAILABLE,
    )


def _log_tail(path: str) -> str:
    with contextlib.suppress(OSError), open(path, errors="replace") as log:
        lines = [line.rstrip() for line in log.readlines()[-5:]]
        return ":\n  " + "\n  ".join(lines) if lines else ""
    return ""


def stop_daemon(
    path: str, now: bool, timeout_s: float, waits_for: Callable[[int], str]
) -> int:
    """Stop the daemon that holds the PID file, and wait for its end; the exit status.

    A stranger is never signalled: the process is pinned first, then the lock is looked
    at again, and only then is the signal sent.
    """
    standing = probe_pid_file(path)
    until = time.monotonic() + 1
    while standing.alive and not standing.pid and time.monotonic() < until:
        time.sleep(0.02)  # it holds the lock and is about to write its number
        standing = probe_pid_file(path)
    if not standing.alive:
        stale = f"the PID file {path} is stale (no daemon holds it)"
        why = stale if standing.found else f"there is no PID file {path}"
        notice(f"no worker daemon: {why}\n  start one: queuectl worker start --daemon")
        return 0
    if not standing.pid:
        raise Problem(
            f"the PID file {path} is held, but names no process",
            "its daemon may be starting; look again: queuectl status",
        )
    with contextlib.suppress(ProcessLookupError), open_pidfd(standing.pid) as handle:
        if probe_pid_file(path) != standing:
            raise Problem(
                f"the PID file {path} has just changed hands",
                "look again: queuectl status",
            )
        if not has_file_open(standing.pid, path):
            raise Problem(
                f"the PID file {path} names process {standing.pid}, which is "
                "not the one that holds it: nothing was signalled",
                "stop the daemon in the container or on the host it runs in",
            )
        for number in [signal.SIGTERM] + [signal.SIGINT] * now:
            send_signal(standing.pid, number, handle)
        return _await_end(path, standing, timeout_s, waits_for)
    return 0


def _await_end(
    path: str,
    standing: PidFileStatus,
    timeout_s: float,
    waits_for: Callable[[int], str],
) -> int:
    started, daemon = time.monotonic(), f"worker daemon {standing.pid}"
    say_at = started + 1
    while probe_pid_file(path) == standing:
        now = time.monotonic()
        if now - started >= timeout_s:
            notice(
                f"{daemon} is still stopping after {say_duration(timeout_s)}"
                f"{waits_for(standing.pid)}"
            )
            return TIMED_OUT
        if now >= say_at:
            say_at = now + 10
            notice(f"{daemon} stops{waits_for(standing.pid)}")
        time.sleep(0.05)
    notice(f"{daemon} has stopped")
    return 0


# ---- private server ----------------------------------------------------------
#
# A private MySQL or MariaDB for a machine without one: data, socket and log in one
# folder, reachable by that socket alone. Paths are relative to the folder, since an
# absolute one with a space breaks MariaDB's installer.

SERVER_FOLDERS = ("/usr/sbin", "/usr/libexec", "/usr/local/sbin",
                  "/usr/local/mysql/bin")
MARIADB = "mariadb-server-core mariadb-client-core"  # the latter for my_print_defaults
SOCKET_PATH_MAX = 100
SERVER_WAIT_S = 60.0

def find_server() -> str:
    """The path of a mysqld or mariadbd on this machine; Problem if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SERVER_FOLDERS])
    found = shutil.which("mysqld", path=path) or shutil.which("mariadbd", path=path)
    if not found:
        raise Problem(f"no mysqld or mariadbd in PATH, {', '.join(SERVER_FOLDERS)}",
                      f"install one (Debian: apt install {MARIADB}), or point DB_HOST "
                      "at a server", UNAVAILABLE)
    return found

# A MariaDB that starts deletes the temporary tables of all others that share its
# folder for them, and was seen to crash one by that (10.11.19).
OWN_TMPDIR = "--tmpdir=."

class PrivateServer:
    """A server in a folder of its own: start and stop, as often as one likes."""
    def __init__(self, folder: str, program: str = "") -> None:
        self.folder, self.program = absolute(folder), program
        self.log = os.path.join(self.folder, "server.log")
        self._pid_file = os.path.join(self.folder, "mysqld.pid")
        self._data = os.path.join(self.folder, "data")

    @property
    def socket(self) -> str:
        return private_socket(self.folder)

    def running(self) -> int:
        """The server's PID, if it answers on its socket; else 0."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            probe.connect(self.socket)
            if probe.recv(1):  # a dying server still accepts, but says nothing
                return self._noted_pid()
        return 0

    def start(self) -> bool:
        """Have it run, with its data made if need be; False if it ran already."""
        os.makedirs(self.folder, exist_ok=True)
        os.chmod(self.folder, 0o700)  # the only lock: root has no password here
        with open(os.path.join(self.folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.running():
                return False
            self.program = self.program or find_server()
            self._place_socket()
            dying = self._noted_pid()  # it holds its socket's lock until it is gone
            with contextlib.suppress(OSError, Problem):
                self._until(lambda: not (dying and is_alive(dying)), 10,
                            "is still ending")
            if not os.path.isdir(self._data):
                self._install()
            self._launch()
        return True

    def stop(self) -> bool:
        """Shut it down and wait for its end; False if it did not run."""
        pid = self.running()
        if pid:
            send_signal(pid, signal.SIGTERM)
            self._until(lambda: not is_alive(pid), SERVER_WAIT_S, "did not stop")
        return bool(pid)

    def _noted_pid(self) -> int:
        with contextlib.suppress(OSError, ValueError), open(self._pid_file) as file:
            return int(file.read())
        return 0

    def _place_socket(self) -> None:
        plain = os.path.join(self.folder, "mysqld.sock")
        note = os.path.join(self.folder, "socket")
        noted = os.path.dirname(private_socket(self.folder))  # a cleaner may have come
        if len(os.fsencode(plain)) > SOCKET_PATH_MAX and (
                noted == self.folder or not os.path.isdir(noted)):
            elsewhere = tempfile.mkdtemp(prefix="queuectl-")
            with open(note, "w") as file:
                file.write(os.path.join(elsewhere, "mysqld.sock"))

    def _mariadb(self) -> bool:
        """By its own word: Debian's `mysqld` may be MariaDB."""
        told = subprocess.run([self.program, "--version"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, check=False)
        return "mariadb" in told.stdout.lower()

    def _install(self) -> None:
        """Make the data folder beside its place, then move it there whole."""
        making = os.path.join(self.folder, "data.new")
        shutil.rmtree(making, ignore_errors=True)
        command = [self.program, "--no-defaults", "--initialize-insecure",
                   f"--datadir={making}", OWN_TMPDIR]
        if self._mariadb():
            for tool in ("my_print_defaults", "mariadb-install-db"):
                installer = shutil.which(tool) or ""
                if not installer:
                    raise Problem(f"{self.program} is there, but {tool} is not",
                                  f"install both (Debian: apt install {MARIADB})",
                                  UNAVAILABLE)
            command = [installer, "--no-defaults", "--datadir=./data.new", OWN_TMPDIR,
                       "--skip-test-db", "--auth-root-authentication-method=normal"]
        command += ["--user=root"] if os.geteuid() == 0 else []
        with open(self.log, "ab") as log:
            done = subprocess.run(command, cwd=self.folder, stdout=log, stderr=log,
                                  stdin=subprocess.DEVNULL, check=False)
        if done.returncode or not os.path.isdir(making):
            raise self._failure("could not make its data folder")
        os.rename(making, self._data)

    def _launch(self) -> None:
        command = [self.program, "--no-defaults", f"--datadir={self._data}",
                   f"--socket={self.socket}", "--skip-networking",
                   f"--pid-file={self._pid_file}", OWN_TMPDIR]
        command += ["--user=root"] if os.geteuid() == 0 else []
        command += [] if self._mariadb() else ["--mysqlx=OFF"]
        with open(self.log, "ab") as log:
            server = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log,
                                      stdin=subprocess.DEVNULL, start_new_session=True)
        self._until(lambda: bool(self.running()) or server.poll() is not None,
                    SERVER_WAIT_S, "did not answer")
        if server.poll() is not None:
            raise self._failure("did not start")
        server.returncode = 0  # it outlives us

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise self._failure(f"{what} within {say_duration(seconds)}")
            time.sleep(0.05)

    def _failure(self, what: str) -> Problem:
        profile = f"/etc/apparmor.d/usr.sbin.{os.path.basename(self.program)}"
        hint = f"see {self.log}"
        if os.path.exists(profile):
            hint = (f"AppArmor confines {self.program} ({profile}): use a server that "
                    "is set up (DB_HOST), or have an administrator allow this folder")
        return Problem(f"the private server {what}{_log_tail(self.log)}", hint,
                       UNAVAILABLE)


# ---- terminal ----------------------------------------------------------------
#
# What people and programs read. Results go to standard output, talk to standard error.
# No control character of a command or its output reaches a terminal.

BOX = ("┌─┬┐", "│ ││", "├─┼┤", "└─┴┘")
ASCII_BOX = ("+-++", "| ||", "+-++", "+-++")


def escaped(text: str) -> str:
    """`text` on one line, with its control characters shown."""
    return text.translate(ESCAPES)


def print_notice(text: str) -> None:
    """A line of talk."""
    print(text, file=sys.stderr)


def print_line(text: str) -> None:
    """A line of the result; what the locale cannot show becomes `?`."""
    try:
        print(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "replace").decode(encoding))


def print_json(document: Json) -> None:
    print(json.dumps(document))


def print_output(pieces: Iterable[bytes]) -> None:
    """A job's output: raw on a pipe; on a terminal control characters are shown."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    text = "\n"
    for piece in pieces:
        if sys.stdout.isatty():
            text = decode(piece).translate(MULTILINE) or text
            sys.stdout.write(text)
        else:
            sys.stdout.buffer.write(piece)
        sys.stdout.flush()
    if not text.endswith("\n"):
        print_line("")


def columns_of(text: str) -> int:
    """How many columns a terminal gives `text`."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
        if not unicodedata.combining(char)
    )


def fit(text: str, width: int) -> str:
    """`text` padded to `width` columns, or cut with a mark."""
    if columns_of(text) > width:
        while text and columns_of(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns_of(text))


def terminal_width() -> int:
    """Columns of the terminal; a generous width where there is none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 200


def print_progress(part: float) -> None:
    """A bar on a terminal's last line; gone when all is done."""
    if sys.stderr.isatty():
        bar = f"[{'#' * round(30 * part):30}]" if part < 1 else " " * 32
        print(f"\r{bar}\r", end="", file=sys.stderr, flush=True)


def _box() -> Sequence[str]:
    try:
        "".join(BOX).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII_BOX
    return BOX


def print_table(
    titles: Sequence[str], rows: Iterable[Sequence[object]], spare: Sequence[str] = ()
) -> None:
    """A table. Where the terminal is too narrow, its last column gives way down to 12
    columns, then the `spare` ones are left out in their order."""
    columns = [
        list(column)
        for column in zip(
            titles,
            *(
                [escaped("" if cell is None else str(cell)) for cell in row]
                for row in rows
            ),
        )
    ]
    widths = [max(map(columns_of, column)) for column in columns]
    last = min(widths[-1], 12)
    for title in [*spare, ""]:
        room = terminal_width() - sum(widths[:-1]) - 3 * len(widths) - 1
        if room >= last or not title:
            break
        at = next(at for at, column in enumerate(columns) if column[0] == title)
        del columns[at], widths[at]
    widths[-1] = min(widths[-1], max(room, last))
    top, sides, middle, bottom = _box()

    def rule(shape: str) -> str:
        inside = shape[2].join(shape[1] * (width + 2) for width in widths)
        return shape[0] + inside + shape[3]

    print_line(rule(top))
    for number, row in enumerate(zip(*columns)):
        inside = f" {sides[2]} ".join(map(fit, row, widths))
        print_line(f"{sides[0]} {inside} {sides[3]}")
        if number == 0:
            print_line(rule(middle))
    print_line(rule(bottom))


def print_rows(
    rows: Sequence[Mapping[str, Json]],
    as_json: bool,
    titles: Sequence[str],
    keys: Sequence[str],
    spare: Sequence[str] = (),
) -> None:
    """Rows for programs, an object a line, or as a table of these keys."""
    if as_json:
        for row in rows:
            print_json(dict(row))
    else:
        shown = {True: "yes", False: ""}
        print_table(
            titles,
            [
                [
                    shown[cell] if isinstance(cell := row[key], bool) else cell
                    for key in keys
                ]
                for row in rows
            ],
            spare,
        )


# ---- explain -----------------------------------------------------------------
#
# Why a job is where it is: one sentence, with the numbers.

TIMES_WORDS = ("never", "once", "twice", "three times", "four times", "five times")


def explain(store: JobStore, job_id: str) -> tuple[JobRow, str]:
    """A job, and the sentence; Problem if there is no such job."""
    [now] = store.rows(lambda now: now, "SELECT UTC_TIMESTAMP(6)")
    found = store.details(job_id)
    return found.row, _Explanation(store, found, now).sentence()


class _Explanation:
    def __init__(
        self, store: JobStore, job: JobDetails, now: datetime.datetime
    ) -> None:
        self.store, self.job, self.view, self.now = store, job, job.row, now

    def sentence(self) -> str:
        view, ago = self.view, self._ago(self.view.finished_at)
        if view.state == State.PENDING:
            return self._pending()
        if view.state == State.PROCESSING:
            return self._processing()
        if view.state == State.BLOCKED:
            return self._blocked()
        if view.state in (State.SCHEDULED, State.FAILED):
            return self._later()
        if view.state == State.DEAD:
            back = f"queuectl dlq retry {view.id}"
            return f"{self._dead()}, {ago}; put it back: {back}"
        ran = [run for run in self.job.history[-1:] if run.reason == view.reason]
        took = f" in {say_duration(view.duration or 0)}" if ran else ""
        where = f" on {self._host()}" if ran else ""
        return f"{view.state}{where}{took}, {ago}"

    def _rows(self, statement: str, *values: object) -> list[tuple[str, ...]]:
        return self.store.rows(lambda *row: row, statement, *values)

    def _ago(self, moment: Moment) -> str:
        return f"{self._since(moment)} ago"

    def _since(self, moment: Moment) -> str:
        return say_duration(abs((self.now - (moment or self.now)).total_seconds()))

    def _host(self, worker: str = "") -> str:
        """The host of a worker; of one whose row is gone, its id names it."""
        worker = worker or str(self.view.worker)
        found = self._rows("SELECT host FROM workers WHERE id = %s", worker)
        return found[0][0] if found else worker.rpartition("-")[0]

    def _attempt(self, number: int) -> str:
        return f"attempt {number} of {max(self.view.max_attempts, number)}"

    def _later(self) -> str:
        view, next_one = self.view, self._attempt(self.view.attempts + 1)
        if view.next_run_at and view.next_run_at <= self.now:
            return f"due ({next_one}): {self._pending()}"
        failed = f"; {self._outcome(1)}" if view.state == State.FAILED else ""
        unserved = self._unserved()
        return (
            f"due in {self._since(view.next_run_at)} ({next_one}){failed}"
            + f"; then {unserved}" * bool(unserved)
        )

    def _serving(self) -> list[dict[str, Json]]:
        return [
            worker
            for worker in self.store.workers()
            if worker["state"] == "running"
            and self.view.queue in (as_list(worker["queues"]) or [self.view.queue])
        ]

    def _unserved(self) -> str:
        name = self.view.queue
        return (
            ""
            if self._serving()
            else (
                f"no live worker serves queue `{name}`; start one: "
                f"queuectl worker start --queue {name}"
            )
        )

    def _pending(self) -> str:
        view, name, busy = self.view, self.view.queue, f"queue `{self.view.queue}`"
        for limit, paused in self._rows(
            "SELECT max_running, paused_at FROM queues WHERE name = %s", name
        ):
            if paused:
                return f"{busy} paused; resume it: queuectl queue resume {name}"
            running = [
                str(one[0])
                for one in self._rows(
                    "SELECT id FROM jobs WHERE state = 'processing' AND queue = %s",
                    name,
                )
            ]
            if limit is not None and len(running) >= int(limit):
                by = f" by {abbreviated(running)}" if running else ""
                return f"limit {limit} of `{name}` reached{by}{self._ahead()}"
        unserved = self._unserved()
        if unserved:
            return unserved
        if self._rows(
            "SELECT 1 FROM jobs WHERE seq = %s AND losses >= %s",
            view.seq,
            ALONE_AFTER_LOSSES,
        ):
            return "lost with its worker twice: it runs alone, once a worker is idle"
        slots, taken = (
            sum(int(str(one[key])) for one in self._serving())
            for key in ("slots", "busy")
        )
        free = f"{slots - taken} of {slots} slots that serve {busy} are free"
        return f"{self._ahead()[2:] or 'next in ' + busy}; {free}"

    def _ahead(self) -> str:
        view = self.view
        [count] = self.store.rows(
            int,
            "SELECT COUNT(*) FROM (SELECT 1 FROM jobs FORCE INDEX (jobs_claim) "
            "WHERE state = 'pending' AND queue = %s AND (claim_order < %s OR "
            f"(claim_order = %s AND seq < %s)) LIMIT {COUNTED_UP_TO}) AS ahead",
            view.queue,
            -view.priority,
            -view.priority,
            view.seq,
        )
        more = f"{count:,}" + "+" * (count == COUNTED_UP_TO)
        return (
            f"; {more} job{'s' * (count != 1)} ahead in queue `{view.queue}`"
            if count
            else ""
        )

    def _processing(self) -> str:
        view = self.view
        limit = f", time limit {say_duration(view.timeout)}" if view.timeout else ""
        text = (
            f"runs on {self._host()} for {self._since(view.started_at)} "
            f"({self._attempt(view.attempts)}{limit})"
        )
        for asked, beat_at, lease in self.store.rows(
            lambda *row: row,
            "SELECT cancel_requested_at, heartbeat_at, lease_s "
            "FROM jobs LEFT JOIN workers ON workers.id = worker WHERE seq = %s",
            view.seq,
        ):
            if asked:
                text += f"; cancelled {self._ago(asked)}, its worker is to end it"
            if not beat_at:
                text += f"; its worker {view.worker} is gone, another is to take over"
            elif (self.now - beat_at).total_seconds() > lease / 2:
                text += (
                    f"; its worker {view.worker} has been silent for "
                    f"{self._since(beat_at)}: lost after {say_duration(lease)}, "
                    "if another is there to see"
                )
        return text

    def _blocked(self) -> str:
        unmet = self._rows(
            f"SELECT id, state, worker FROM {PARENTS_SQL} WHERE child = %s "
            f"AND NOT {MET_SQL} ORDER BY parent",
            self.view.seq,
        )
        if not unmet:
            return "being enqueued together with many others"
        told = [
            f"{name}, which "
            + (
                f"runs on {self._host(worker)}"
                if state == State.PROCESSING
                else f"is {state}"
            )
            for name, state, worker in unmet[:3]
        ]
        more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
        return f"waits for {'; '.join(told)}{more}"

    def _outcome(self, times: int) -> str:
        view = self.view
        what = (
            f"{view.reason} {view.exit_code}"
            if view.reason == Reason.EXIT
            else str(view.reason)
        )
        often = TIMES_WORDS[times] if times < len(TIMES_WORDS) else f"{times} times"
        return f"{what} {often}"

    def _dead(self) -> str:
        view = self.view
        times = sum(
            (run.reason, run.exit_code) == (view.reason, view.exit_code)
            for run in self.job.history
        )
        [(line,)] = self._rows(
            "SELECT last_line FROM dlq WHERE job_seq = %s", view.seq
        ) or [("",)]
        if view.reason == Reason.DEPENDENCY:
            return f"dead: {line}"
        last = f', last line "{line}"' if line else ""
        return f"dead: {self._outcome(times)}{last}"


# ---- diagnostics -------------------------------------------------------------
#
# What is off with a server, an account or a host, each with its remedy. Nothing here
# changes a row.

TABLES = ("jobs", "dependencies", "runs", "dlq", "workers", "queues", "schedules",
          "config")
SKEW_S, SPARE_CONNECTIONS, MANY_LETTERS = 2.0, 10, 100_000

class Check(NamedTuple):
    """One thing that was looked at, and what to do where it is not well."""
    check: str
    ok: bool
    found: str
    remedy: str = ""

def check_all(target: ConnectionInfo, settings: Settings) -> Iterator[Check]:
    """What stands between here and the server, and in its tables."""
    with contextlib.closing(Database(target, READING)) as one, \
            contextlib.closing(Database(target, READING)) as two:
        try:
            yield Check("connection", bool(one.rows(int, "SELECT 1")),
                        f"{target} (from {target.source}), account {target.user!r} "
                        f"(from {target.account_source})")
        except Problem as problem:
            yield Check("connection", False, problem.what, problem.hint)
            return
        yield from _check_server(one)
        yield from _check_locks(one, two)
        yield from _check_rights(one)
        yield _check_doorbell(one, settings)
        yield from _check_work(JobStore(one, settings))

def _check_server(one: Database) -> Iterator[Check]:
    found: dict[str, str] = dict(one.rows(
        lambda *row: row, "SHOW VARIABLES WHERE Variable_name IN ('log_bin', "
        "'transaction_isolation', 'tx_isolation', 'binlog_format', 'sync_binlog', "
        "'innodb_flush_log_at_trx_commit', 'max_connections', 'max_allowed_packet')"))
    status: dict[str, str] = dict(one.rows(
        lambda *row: row, "SHOW STATUS WHERE Variable_name IN ('Ssl_cipher', "
        "'Threads_connected')"))
    least = (10, 6) if one.mariadb else (8, 0)
    release = [int(part) for part in re.findall(r"\d+", one.version)[:2]]
    yield Check("server", release >= [*least], one.version,
                f"from {least[0]}.{least[1]} on claims do not wait for each other")
    cipher, mode = status.get("Ssl_cipher", ""), one.target.ssl_mode
    hosts = {host for host, _ in one.target.hosts} - {"127.0.0.1", "::1", "localhost"}
    sure = "verified" if mode.startswith("verify") else "not verified"
    yield Check("TLS", bool(cipher or not hosts),
                f"{cipher}, the server's certificate is {sure}" if cipher else
                "none" + ", by a socket" * bool(one.target.socket),
                "set DB_SSL_MODE=required, or verify_identity and DB_SSL_CA")
    level = found.get("transaction_isolation") or found.get("tx_isolation", "")
    logged = f"binlog_format {found.get('binlog_format')}" \
        if found["log_bin"] == "ON" else "no binlog"
    yield Check("isolation", level == "READ-COMMITTED" and one.read_committed,
                f"{level}, {logged}", "SET PERSIST binlog_format = 'ROW'")
    flush = [(name, found[name]) for name in ("innodb_flush_log_at_trx_commit",
             *(["sync_binlog"] if found["log_bin"] == "ON" else []))]
    yield Check("durability", all(value == "1" for _, value in flush),
                ", ".join(f"{name} {value}" for name, value in flush),
                "set them to 1: else a crash of the server loses what was acknowledged")
    [now] = one.rows(lambda now: now, "SELECT UTC_TIMESTAMP(6)")
    here = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    skew_s = abs((here - now).total_seconds())
    yield Check("clock", skew_s < SKEW_S, f"{skew_s:.1f} s apart",
                "run a time service: queuectl compares no clocks, its readers do")
    packet = int(found["max_allowed_packet"])
    yield Check("packet", packet >= 16 << 20, f"max_allowed_packet {packet >> 20} MiB",
                "set it to 16 MiB or more: else large output is not stored")
    [(processes, supervisors)] = one.rows(
        lambda *row: row, "SELECT COUNT(*), COUNT(DISTINCT host, supervisor) FROM "
        "workers WHERE lost_at IS NULL")
    most, used = int(found["max_connections"]), int(status["Threads_connected"])
    yield Check("connections", most - used >= SPARE_CONNECTIONS,
                f"{used} of {most} in use; the workers here want {processes} and "
                f"{supervisors} more", "raise max_connections")

def _check_locks(one: Database, two: Database) -> Iterator[Check]:
    def probe(cursor: Cursor) -> bool:
        [version] = cursor.rows(str, f"{SCHEMA_ROW} FOR UPDATE")
        found = two.rows(str, f"{SCHEMA_ROW} FOR UPDATE SKIP LOCKED")
        return not found and bool(version)
    try:
        skipped = bool(two.read(two.skip_locked)) and one.transact(probe)
        yield Check("SKIP LOCKED", skipped, "a locked row is passed over" if skipped
                    else "it locks nothing here", "claims are right, only slower")
    except Problem as problem:
        yield Check("SKIP LOCKED", False, problem.what, problem.hint)
    [version] = one.rows(str, SCHEMA_ROW)
    yield Check("schema", True, f"schema {version.partition('/')[0]}, this program's "
                f"{SCHEMA_VERSION}")

def _check_rights(one: Database) -> Iterator[Check]:
    lacking = []
    for table in TABLES:
        into, what = ("jobs (command)", "command") if table == "jobs" else (table, "*")
        nothing = f"FROM {table} WHERE FALSE"
        for right, statement in (
                ("SELECT", f"SELECT 1 {nothing}"), ("DELETE", f"DELETE {nothing}"),
                ("INSERT", f"INSERT INTO {into} SELECT {what} {nothing}")):
            try:
                one.run(statement)
            except Problem:
                lacking.append(f"{right} on {table}")
    yield Check("rights", not lacking, f"lacking: {', '.join(lacking)}" if lacking
                else "all that workers need", "grant them: README, Accounts")

def _check_doorbell(one: Database, settings: Settings) -> Check:
    if settings.doorbell != "on":
        return Check("doorbell", True, "switched off: the poll finds the work")
    rung, name = threading.Event(), f"check-{secrets.token_hex(4)}"
    Doorbell(one.target, f"{name} -", rung.set).park()
    until, started = time.monotonic() + 2, 0.0
    while not rung.is_set() and time.monotonic() < until:
        time.sleep(0.05)  # until it is parked
        started = time.monotonic()
        ring(one, worker=name)
        rung.wait(0.2)
    took = (time.monotonic() - started) * 1e3
    return Check("doorbell", rung.is_set(), f"rings in {took:.1f} ms" if rung.is_set()
                 else "cannot be rung", "config set doorbell off: the poll finds work")

def _check_work(store: JobStore) -> Iterator[Check]:
    idle = store.unserved()
    yield Check("queues", not idle, f"no live worker serves {abbreviated(idle)}, where "
                "jobs wait" if idle else "all that may run now are served",
                f"start one: queuectl worker start --queue {','.join(idle)}")
    dead = store.count_dead_letters(SqlCondition("TRUE", ()))
    yield Check("dead letters", dead <= MANY_LETTERS, f"{dead:,}",
                "see: queuectl dlq groups; then dlq retry or purge --state dead")


# ---- commands ----------------------------------------------------------------
#
# What a person can type. A command's name, arguments, help and body stand together;
# the parser, --help, README's table and the tests read COMMANDS.

Body = Callable[[argparse.Namespace], Optional[int]]
Arg = Tuple[Tuple[str, ...], "dict[str, object]"]  # names, and what argparse is told


class Command(NamedTuple):
    """One thing a person can type."""

    name: str
    body: Body
    args: tuple[Arg, ...]
    examples: Sequence[str]

    @property
    def summary(self) -> str:
        return (self.body.__doc__ or "").split("\n")[0].rstrip(".")


COMMANDS: dict[str, Command] = {}


def command(
    name: str, *args: Arg, examples: Sequence[str] = ()
) -> Callable[[Body], Body]:
    def declare(body: Body) -> Body:
        COMMANDS[name] = Command(name, body, args, examples)
        return body

    return declare


def arg(*names: str, **options: object) -> Arg:
    return names, options


def option(kind: ValueType[T]) -> Callable[[str], T]:
    """A Kind as argparse wants it."""

    def read(text: str) -> T:
        try:
            return kind.convert(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"expected {kind.expects}, not {excerpt(text)}"
            ) from None

    return read


AS_JSON = arg("--json", action="store_true", help="for programs: an object a line")
IDS = arg("ids", nargs="+", metavar="ID", help="the job's id")
ID = arg("id", metavar="ID", help="the job's id")
LIMIT = arg(
    "--limit",
    type=option(whole(0, 10**9)),
    metavar="N",
    help="at most so many rows; 0: all (default 100, with --json all)",
)
PID_FILE = arg(
    "--pid-file",
    metavar="FILE",
    help="the daemon's PID file (default $PID_FILE or ./workers.pid)",
)


def option_of(key: str) -> str:
    return "--" + key.replace("_", "-")


COMMAND_OPTION = arg(
    "-c", dest="command", metavar="CMD", help="a shell command", type=option(COMMAND)
)
JOB_OPTIONS = tuple(
    arg(
        option_of(name),
        dest=name,
        help=key.help,
        metavar=key.metavar,
        **({"action": "append"} if name in REPEATABLE else {"type": option(key.kind)}),
    )
    for name, key in JOB_KEYS.items()
    if name != "command"
)


def configured_by(environment: Environment, policy: RetryPolicy) -> LoadedSettings:
    """The settings in force, the stored ones read from the database."""
    with contextlib.closing(Database(find_connection(environment), policy)) as database:
        return load_settings(environment, read_config(database))


@contextlib.contextmanager
def open_store(policy: RetryPolicy = READING) -> Iterator[JobStore]:
    """The queue as a person reaches it, with the settings in force."""
    environment = Environment.read()
    with contextlib.closing(Database(find_connection(environment), policy)) as database:
        yield JobStore(
            database, load_settings(environment, read_config(database)).settings
        )


def report(
    results: Iterable[ActionResult], as_json: bool, store: JobStore | None = None
) -> int:
    """Print what a verb did to each job, tell `store`'s workers; 1 if one failed."""
    status = 0
    for result in results:
        if as_json:
            print_json(
                {
                    "id": result.id,
                    "ok": result.ok,
                    "state": result.state,
                    "error": None if result.ok else result.error,
                }
            )
        elif result.ok:
            print_line(f"job {result.id} {result.note}")
        else:
            notice(f"{result.error}")
        sys.stdout.flush()
        status |= not result.ok
    if store:
        ring(store.database)
    return status


@command(
    "enqueue",
    arg("document", nargs="?", metavar="JSON", help="a job, or an array; - is -f -"),
    COMMAND_OPTION,
    arg("-f", dest="file", metavar="FILE", help="JSON jobs, one a line; - is input"),
    arg("--lines", metavar="FILE", help="commands, one a line; - is input"),
    *JOB_OPTIONS,
    arg("--if-absent", action="store_true", help="pass over an id that is in use"),
    arg("-q", "--quiet", action="store_true", help="print no ids"),
    AS_JSON,
    examples=(
        """enqueue '{"command":"echo hello","max_retries":3}'""",
        "enqueue -c 'sleep 5 && echo done' --priority 10",
        "enqueue -- tar czf /backup/etc.tgz /etc",
        "enqueue --lines commands.txt --queue etl",
    ),
)
def enqueue_jobs(args: argparse.Namespace) -> None:
    """Add jobs to the queue.

    A job comes as JSON, after -c, after --, or a line each from -f or --lines. Options
    fill what the JSON leaves out. More than one job: all or none.
    """
    spool = _spool_jobs(args, _job_defaults(args))
    if len(spool):
        target = find_connection(Environment.read())
        with contextlib.closing(Database(target, WRITING)) as database:
            held = enqueue(database, spool, args.if_absent)
            ring(database, len(spool), spool.queues)
            if not args.quiet:
                _print_ids(database, spool, args, held)


def _job_defaults(args: argparse.Namespace) -> dict[str, object]:
    values = {
        name: getattr(args, name)
        for name in JOB_KEYS
        if name not in ("command", "env") and getattr(args, name) is not None
    }
    for name in NEEDS.keys() & values.keys():
        values[name] = JOB_IDS.read_json(values[name], option_of(name))
    if args.env:
        pairs = [text.partition("=") for text in args.env]
        if not all(name and sign for name, sign, _ in pairs):
            raise Problem("--env: expected NAME=VALUE", status=USAGE)
        values["env"] = JOB_KEYS["env"].kind.read_json(
            {name: value for name, _, value in pairs}, "--env"
        )
    if "delay" in values and "run_at" in values:
        raise Problem("--delay and --run-at: give only one", status=USAGE)
    return values


def _spool_jobs(args: argparse.Namespace, defaults: JobValues) -> Spool:
    if args.document == "-":
        args.document, args.file = None, "-"
    sources = (args.document, args.command, args.rest or None, args.file, args.lines)
    given = sum(source is not None for source in sources)
    if given != 1:
        raise Problem(
            "enqueue takes exactly one of: JSON, -c CMD, -- PROG ARG…, "
            f"-f FILE, --lines FILE; {given} were given",
            "see: queuectl help enqueue",
            USAGE,
        )
    if args.file is not None or args.lines is not None:
        with _opened_input(args.lines if args.file is None else args.file) as file:
            return spool_lines(file, args.file is not None, defaults)
    document: object = {"command": args.command or shlex.join(args.rest)}
    if args.document is not None:
        document = parse_json(args.document)
    jobs = document if isinstance(document, list) else [document]
    spool = Spool()
    for number, one in enumerate(jobs, 1):
        try:
            spool.add(check_job(one, defaults))
        except Problem as problem:
            if isinstance(document, list):
                problem.what = f"job {number} of the array: {problem.what}"
            raise
    return spool


def _opened_input(path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}", status=USAGE) from None


def _print_ids(
    database: Database, spool: Spool, args: argparse.Namespace, held: Mapping[str, str]
) -> None:
    """The ids, `held` giving those that stand for another; with --if-absent or a job
    that waits for others, the states as they are now."""
    jobs = (
        (held.get(str(job["id"]), str(job["id"])), str(job.get("state", State.PENDING)))
        for job in spool
    )
    for page in batched(jobs):
        now = {}
        if (args.if_absent or spool.linked) and args.json:
            now = states_of(database, [job_id for job_id, _ in page])
        for job_id, state in page:
            if args.json:
                print_json({"id": job_id, "state": now.get(job_id, state)})
            else:
                print_line(job_id)


@command(
    "worker start",
    arg(
        "--count",
        type=option(whole(1, 1024)),
        default=1,
        metavar="N",
        help="jobs at once (default 1)",
    ),
    arg("--daemon", action="store_true", help="run in the background, with a PID file"),
    arg("--queue", action="append", metavar="A,B", help="serve these queues only"),
    arg("--drain", action="store_true", help="exit 0 once nothing is left to run"),
    arg(
        "--grace",
        type=option(duration()),
        metavar="D",
        help="after a stop, end running jobs after so long and hand them back",
    ),
    PID_FILE,
    arg(
        "--log-file",
        metavar="FILE",
        help="the daemon's log (default workers.log beside the PID file)",
    ),
    examples=(
        "worker start --count 2",
        "worker start --count 8 --daemon",
        "worker start --queue etl,mail --drain",
    ),
)
def worker_start(args: argparse.Namespace) -> int:
    """Run jobs, here or as a daemon.

    Ctrl-C or TERM lets running jobs end; a second one ends them and hands them back.
    """
    environment = Environment.read()
    target = find_connection(environment)
    names = [name for part in args.queue or [] for name in part.split(",") if name]
    queues = tuple(dict.fromkeys(QUEUE_NAME.read(name, "--queue") for name in names))
    if args.queue and not queues:
        raise Problem("--queue names no queue", status=USAGE)
    configured = configured_by(environment, WRITING)
    for complaint in [*configured.complaints, *_readable_dotenv(environment)]:
        notice(f"warning: {complaint}")
    signing_key()  # an unreadable file is found now
    # Absolute paths: a job's directory is its worker's too, for a moment.
    target = dataclasses.replace(
        target,
        socket=target.socket and absolute(target.socket),
        ssl_ca=target.ssl_ca and absolute(target.ssl_ca),
    )
    options = WorkerOptions(
        target,
        environment,
        configured.settings,
        queues,
        args.drain,
        args.grace,
        sys.stderr.isatty(),
        Log().say,
    )
    pid_file = args.pid_file or (_pid_file(environment) if args.daemon else "")
    log_file = args.log_file or os.path.join(os.path.dirname(pid_file), "workers.log")
    return run_workers(
        options,
        args.count,
        pid_file and absolute(pid_file),
        absolute(log_file) if args.daemon else "",
    )


def _pid_file(environment: Environment) -> str:
    return environment.get("PID_FILE") or VARIABLES["PID_FILE"].default


def _readable_dotenv(environment: Environment) -> list[str]:
    """A .env that others can read."""
    found = []
    for source, variables in environment.layers[1:]:
        with contextlib.suppress(OSError):
            if variables and os.stat(source).st_mode & 0o077:
                found.append(f"others can read {source}; mend it: chmod 600 {source}")
    return found


@command(
    "worker stop",
    PID_FILE,
    arg(
        "--timeout",
        type=option(duration()),
        default=math.inf,
        metavar="D",
        help="wait no longer than this; still stopping: exit 124",
    ),
    arg("--now", action="store_true", help="end running jobs and hand them back"),
    examples=("worker stop", "worker stop --timeout 30s", "worker stop --now"),
)
def worker_stop(args: argparse.Namespace) -> int:
    """Stop the daemon: its running jobs may end first."""
    environment = Environment.read()

    def waits_for(pid: int) -> str:
        policy = dataclasses.replace(READING, timeout_s=2)
        with (
            contextlib.suppress(Problem),
            contextlib.closing(Database(find_connection(environment), policy)) as base,
        ):
            ids = JobStore(base, Settings()).running_under(socket.gethostname(), pid)
            return f", waiting for {abbreviated(ids)}" if ids else ""
        return ""

    path = args.pid_file or _pid_file(environment)
    return stop_daemon(path, args.now, args.timeout, waits_for)


@command("worker list", AS_JSON, examples=("worker list", "worker list --json"))
def worker_list(args: argparse.Namespace) -> None:
    """Show the worker processes of all hosts."""
    with open_store() as store:
        rows = store.workers()
    if args.json:
        for row in rows:
            print_json(row)
        return
    _print_workers(rows)
    slots = sum(int(str(row["slots"])) for row in rows)
    hosts = len({row["host"] for row in rows})
    print_line(f"{slots} slot{'s' * (slots != 1)} on {hosts} host{'s' * (hosts != 1)}")


def _print_workers(rows: Sequence[dict[str, Json]]) -> None:
    print_table(
        ["Worker", "Host", "PID", "Busy", "Heartbeat", "State", "Queues"],
        [
            [
                row["id"],
                row["host"],
                row["pid"],
                f"{row['busy']}/{row['slots']}",
                row["heartbeat_at"],
                row["state"],
                ", ".join(map(str, as_list(row["queues"]))) or "all",
            ]
            for row in rows
        ],
        spare=["Heartbeat", "Host"],
    )


@command(
    "status",
    arg("--exact", action="store_true", help="count every job, however many"),
    arg(
        "--watch",
        nargs="?",
        type=option(number(0.1, 3600)),
        const=2.0,
        metavar="S",
        help="show it again every S seconds (default 2)",
    ),
    PID_FILE,
    AS_JSON,
    examples=("status", "status --watch", "status --json"),
)
def status(args: argparse.Namespace) -> None:
    """Count jobs by state, and show the daemon, queues and workers."""
    path = args.pid_file or _pid_file(Environment.read())
    with open_store() as store:
        while True:
            if args.watch and sys.stdout.isatty() and not args.json:
                print_line("\x1b[2J\x1b[H")
            _print_status(store, path, args)
            if not args.watch:
                return
            sys.stdout.flush()
            time.sleep(args.watch)


def _print_status(store: JobStore, path: str, args: argparse.Namespace) -> None:
    counts, capped = store.states(args.exact)
    queues, workers, standing = store.queues(), store.workers(), probe_pid_file(path)
    where = f"{store.database.target} (from {store.database.target.source})"
    if args.json:
        print_json(
            {
                "database": where,
                "states": dict(counts),
                "capped": list(capped),
                "queues": list(queues),
                "workers": list(workers),
                "daemon": {
                    "pid_file": path,
                    "pid": standing.pid or None,
                    "alive": standing.alive,
                },
            }
        )
        return
    print_line(f"database: {where}\nJob counts by state:")
    print_table(
        ["State", "Count"],
        [
            [state, f"{counts[state]}{'+' * (state in capped)}"]
            for at, state in enumerate(State)
            if at < 5 or counts[state]
        ],
    )
    if not standing.found:
        print_line(f"No worker PID file at {path}")
    elif standing.alive:
        print_line(f"Worker PID file found at {path}\n{standing.pid}")
    else:
        print_line(f"Worker PID file found at {path} (stale, no daemon holds it)")
    if queues:
        print_table(
            ["Queue", "Pending", "Processing"],
            [
                [row["queue"], row[State.PENDING], row[State.PROCESSING]]
                for row in queues
            ],
        )
    if workers:
        _print_workers(workers)
    for name in store.unserved():
        print_notice(
            f"warning: jobs wait in queue {name}, and no live worker serves it; "
            f"start one: queuectl worker start --queue {name}"
        )


@command(
    "list",
    arg("--state", metavar="S", help="only jobs in this state"),
    arg("--queue", type=option(QUEUE_NAME), metavar="Q", help="only of this queue"),
    LIMIT,
    AS_JSON,
    examples=("list", "list --state failed", "list --state pending --queue etl --json"),
)
def list_jobs(args: argparse.Namespace) -> None:
    """List jobs, the newest first."""
    if args.state is not None and args.state not in list(State):
        raise Problem(
            f"--state: no such state: {excerpt(args.state)}",
            nearest(args.state, State) or f"states: {' '.join(State)}",
            USAGE,
        )
    limit = _limit(args)
    with open_store() as store:
        views = store.jobs(args.state, args.queue, limit)
        if args.json:
            for view in views:
                print_json(view.as_json())
            return
        shown = list(views)
        full = len(shown) == limit
        total = store.count(args.state, args.queue) if full else len(shown)
    print_table(
        ["Id", "State", "Attempt", "Queue", "When", "Command"],
        [
            [
                view.id,
                view.state,
                f"{view.attempts}/{view.max_attempts}",
                view.queue,
                _short(_when(view)),
                view.command[:400],
            ]
            for view in shown
        ],
        spare=["When", "Queue"],
    )
    _print_total(len(shown), total)


def _limit(args: argparse.Namespace) -> int:
    """How many rows to show; 0: all."""
    if args.limit is None:
        return 0 if args.json else 100
    return int(args.limit)


def _print_total(shown: int, total: int) -> None:
    if total > shown:
        some = f"{COUNTED_UP_TO:,}+" if total > COUNTED_UP_TO else f"{total:,}"
        print_notice(f"{shown:,} of {some}; --limit 0 for all")


def _when(view: JobRow) -> Moment:
    """The time that matters in this state."""
    return {
        State.PROCESSING: view.started_at,
        State.PENDING: view.created_at,
        State.SCHEDULED: view.next_run_at,
        State.FAILED: view.next_run_at,
        State.BLOCKED: view.created_at,
    }.get(State(view.state), view.finished_at)


def _short(moment: Moment) -> str:
    return str(moment or "")[:19]


@command("show", ID, AS_JSON, examples=("show my-job", "show my-job --json"))
def show(args: argparse.Namespace) -> None:
    """Show all of one job: its settings, history and output."""
    with open_store() as store:
        whole_job = store.details(args.id)
    view, history = whole_job.row, whole_job.history
    output = whole_job.output.decode("utf-8", "replace")
    if args.json:
        print_json(
            {
                **view.as_json(),
                "cwd": whole_job.cwd,
                "env": dict(whole_job.env),
                "after": list(whole_job.after),
                "output": output,
                "history": [as_json(run, "run") for run in history],
            }
        )
        return
    facts = {
        **view.as_json(),
        "attempts": f"{view.attempts}/{view.max_attempts}",
        "cwd": whole_job.cwd,
        "after": " ".join(whole_job.after),
        "env": " ".join(f"{name}=***" for name in whole_job.env),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, ""):
            print_line(f"{name:{width}}  {escaped(str(value))}")
    if history:
        print_line("history:")
        print_table(
            ["Run", "Attempt", "Started", "Seconds", "Exit", "Worker", "Reason"],
            [
                [
                    run.run,
                    run.attempt,
                    say_time(run.started_at),
                    "" if run.duration is None else f"{run.duration:.3f}",
                    run.exit_code,
                    run.worker,
                    _why(run),
                ]
                for run in history
            ],
            spare=["Worker", "Attempt"],
        )
    if output:
        print_line("output:")
        print_line(output.translate(MULTILINE).rstrip("\n"))


def _why(run: RunRecord) -> str:
    """How a run ended, with what is to be said of it."""
    return f"{run.reason or 'running'}{': ' * bool(run.detail)}{run.detail or ''}"


@command(
    "logs",
    ID,
    arg(
        "-f",
        "--follow",
        action="store_true",
        help="go on until the job has ended, whatever host it runs on",
    ),
    arg(
        "--run",
        type=option(whole(1, 2**31)),
        metavar="N",
        help="of this run, as show numbers them (default: the last)",
    ),
    examples=("logs my-first-job", "logs -f my-first-job", "logs my-job > out.bin"),
)
def logs(args: argparse.Namespace) -> None:
    """Print the output of a job's last run; raw on a pipe."""
    with open_store(FOLLOWING if args.follow else READING) as store:
        whole_job = store.details(args.id)
        runs = [run.run for run in whole_job.history]
        if args.run and args.run not in runs:
            kept = ", ".join(map(str, runs)) or "none"
            raise Problem(
                f"job {args.id} has no run {args.run} to show: {kept}",
                f"see: queuectl show {args.id}",
            )
        if args.follow:
            print_output(store.follow(args.id, args.run or max(runs, default=0)))
        elif args.run:
            print_output([store.output(whole_job.row.seq, args.run)])
        else:
            print_output([whole_job.output])
    if not whole_job.history and not args.follow:
        print_notice(f"job {args.id} is {whole_job.row.state} and has not run yet")


@command(
    "wait",
    arg("ids", nargs="+", metavar="ID", help="a job's id; - reads them"),
    arg("--any", action="store_true", help="until one has ended"),
    arg(
        "--timeout",
        type=option(duration()),
        default=math.inf,
        metavar="D",
        help="wait no longer than this: exit 124",
    ),
    AS_JSON,
    examples=(
        "wait build test --timeout 10m",
        "enqueue --lines commands.txt | queuectl wait -",
    ),
)
def wait(args: argparse.Namespace) -> int:
    """Wait until jobs have ended; exit 0 if all completed.

    Exit 1 if one ended otherwise, 124 if --timeout ran out.
    """
    ids = [
        word
        for one in args.ids
        for word in (sys.stdin.read().split() if one == "-" else [one])
    ]
    policy = dataclasses.replace(
        FOLLOWING, retry_for_s=min(FOLLOWING.retry_for_s, args.timeout)
    )
    with open_store(policy) as store:
        return report(store.wait(ids, args.any, args.timeout), args.json)


@command(
    "run",
    COMMAND_OPTION,
    *JOB_OPTIONS,
    examples=("run -- make test", "run -c 'make && make install' --queue build"),
)
def run_here(args: argparse.Namespace) -> int:
    """Enqueue a command, show its output, leave with its status.

    No retries, no time limit, and this directory, unless told. Ctrl-C cancels it.
    """
    given = {
        "max_retries": 0,
        "timeout": 0,
        "cwd": absolute("."),
        **_job_defaults(args),
    }
    if bool(args.command) == bool(args.rest):
        raise Problem(
            "run takes -c CMD, or -- PROG ARG…", "see: queuectl help run", USAGE
        )
    spool = Spool()
    spool.add(check_job({"command": args.command or shlex.join(args.rest)}, given))
    with open_store(FOLLOWING) as store:
        enqueue(store.database, spool, False)
        job_id, cancelled = spool.first_id, False
        try:
            ring(store.database, 1, spool.queues)
            print_output(
                store.follow(
                    job_id,
                    0,
                    lambda: notice(
                        f"job {job_id} has not started: {explain(store, job_id)[1]}"
                    ),
                )
            )
        except KeyboardInterrupt:
            cancelled = True
            notice(f"cancelling job {job_id}; again leaves it to its worker")
            store.cancel(job_id)
            ring(store.database)
            any(store.wait([job_id], False, math.inf))
        view = store.details(job_id).row
        if cancelled:
            return INTERRUPTED
        if view.state != State.COMPLETED and view.reason != Reason.EXIT:
            notice(f"job {job_id}: {explain(store, job_id)[1]}")
        return CANNOT if view.exit_code is None else view.exit_code


@command("explain", ID, AS_JSON, examples=("explain my-first-job",))
def explain_job(args: argparse.Namespace) -> None:
    """Say in one sentence why a job is where it is."""
    with open_store() as store:
        view, why = explain(store, args.id)
    if args.json:
        print_json({"id": view.id, "state": view.state, "why": why})
    else:
        print_line(f"job {view.id}: {escaped(why)}")


@command("retry", IDS, AS_JSON, examples=("retry my-first-job", "retry a b c"))
def retry(args: argparse.Namespace) -> int:
    """Run failed jobs now; put dead and cancelled ones back."""
    with open_store(WRITING) as store:
        return report(
            (store.revive(one, "retry") for one in args.ids), args.json, store
        )


@command(
    "rerun",
    ID,
    COMMAND_OPTION,
    AS_JSON,
    examples=("rerun my-first-job", "rerun my-first-job -c 'echo hello again'"),
)
def rerun(args: argparse.Namespace) -> None:
    """Enqueue a new job like an old one; print its id."""
    with open_store(WRITING) as store:
        spool, values = Spool(), store.job_template(args.id)
        spool.add(
            complete_job({**values, "command": args.command or values["command"]}, {})
        )
        enqueue(store.database, spool, False)
        ring(store.database, 1, spool.queues)
        args.if_absent = False
        _print_ids(store.database, spool, args, {})


@command("cancel", IDS, AS_JSON, examples=("cancel my-first-job", "cancel a b c"))
def cancel(args: argparse.Namespace) -> int:
    """Cancel jobs: waiting ones now, running ones by their worker."""
    with open_store(WRITING) as store:
        return report(map(store.cancel, args.ids), args.json, store)


def _read_age(text: str) -> str:
    with contextlib.suppress(ValueError):
        return f"UTC_TIMESTAMP(6) - INTERVAL {duration().convert(text)} SECOND"
    return f"'{_read_time(text)}'"


AGE = ValueType(
    _read_age, "a duration such as 7d, or a time such as 2026-11-24T10:00:00Z"
)


@command(
    "purge",
    arg("--state", required=True, metavar="S", help="completed, dead or cancelled"),
    arg(
        "--before",
        metavar="D|TIME",
        default="0",
        help="only what ended longer ago than D, or before TIME (default: all)",
    ),
    arg("--dry-run", action="store_true", help="only say how many it would be"),
    examples=("purge --state completed --before 7d", "purge --state dead --dry-run"),
)
def purge_jobs(args: argparse.Namespace) -> None:
    """Delete jobs that ended, with their history.

    A job that a blocked one waits for stays.
    """
    if args.state not in ENDED:
        raise Problem(
            f"--state: expected {', '.join(ENDED)}, not {excerpt(args.state)}",
            "only what has ended can be purged",
            USAGE,
        )
    state, before = State(args.state), AGE.read(args.before, "--before")
    with open_store(WRITING) as store:
        [age] = store.rows(str, f"SELECT {before}")  # as it is now
        if args.dry_run:
            count = store.count_rows(f"jobs WHERE {ended_before(state)}", [age] * 2)
        else:
            count = sum(iter(lambda: purge(store.database, state, age), 0))
    print_line(f"{count:,} {args.state} jobs {'would be ' * args.dry_run}purged")


FILTERS = (
    arg("--reason", metavar="R", help="only what died of this (exit, timeout, …)"),
    arg("--exit-code", type=option(whole(0, 255)), metavar="N", help="only with this"),
    arg("--match", metavar="TEXT", help="only with this in the command or last line"),
    arg(
        "--since",
        type=option(AGE),
        metavar="D|TIME",
        help="only what died no longer ago than D, or since TIME",
    ),
)


def _filter(args: argparse.Namespace) -> SqlCondition:
    if args.reason is not None and args.reason not in list(Reason):
        raise Problem(
            f"--reason: no such reason: {excerpt(args.reason)}",
            nearest(args.reason, Reason) or f"reasons: {', '.join(Reason)}",
            USAGE,
        )
    wanted = [
        ("dlq.reason = %s", args.reason),
        ("dlq.exit_code = %s", args.exit_code),
        ("LOCATE(%s, CONCAT_WS('\\n', command, last_line)) > 0", args.match),
    ]
    if args.since:
        wanted.append((f"died_at >= {args.since} AND %s", 1))
    found = [(part, value) for part, value in wanted if value is not None]
    return SqlCondition(
        " AND ".join(["TRUE", *(part for part, _ in found)]),
        [value for _, value in found],
    )


@command(
    "dlq list",
    *FILTERS,
    LIMIT,
    AS_JSON,
    examples=("dlq list", "dlq list --exit-code 3 --since 2h --json"),
)
def dlq_list(args: argparse.Namespace) -> None:
    """List the dead jobs, the last to die first."""
    limit, only = _limit(args), _filter(args)
    with open_store() as store:
        letters = store.dead_letters(limit, only)
        total = (
            store.count_dead_letters(only) if len(letters) == limit else len(letters)
        )
    if args.json:
        for view, died_at in letters:
            print_json({**view.as_json(), "died_at": say_time(died_at)})
        return
    print_table(
        ["Id", "Attempt", "Exit", "Reason", "Died", "Queue", "Command"],
        [
            [
                view.id,
                f"{view.attempts}/{view.max_attempts}",
                view.exit_code,
                view.reason,
                _short(died_at),
                view.queue,
                view.command[:400],
            ]
            for view, died_at in letters
        ],
        spare=["Died", "Queue", "Exit"],
    )
    _print_total(len(letters), total)


@command("dlq groups", AS_JSON, examples=("dlq groups",))
def dlq_groups(args: argparse.Namespace) -> None:
    """Count dead jobs that are alike, whatever their digits."""
    with open_store() as store:
        print_rows(
            store.dead_groups(),
            args.json,
            ["Count", "Exit", "Reason", "Last died", "Example", "Last line"],
            ["count", "exit_code", "reason", "last_died_at", "example", "last_line"],
            spare=["Last died", "Example"],
        )


@command(
    "dlq retry",
    arg("ids", nargs="*", metavar="ID", help="the job's id"),
    arg("--all", action="store_true", help="all of them"),
    *FILTERS,
    arg(
        "--retries",
        type=option(whole(1, 1000)),
        default=1,
        metavar="N",
        help="grant so many more runs (default 1)",
    ),
    arg("--reset", action="store_true", help="start the count of attempts again"),
    arg("--dependents", action="store_true", help="and what died because of them"),
    arg("--dry-run", action="store_true", help="only say which it would be"),
    AS_JSON,
    examples=(
        "dlq retry my-first-job",
        "dlq retry a b --retries 3",
        "dlq retry --reason timeout --since 1d --dry-run",
    ),
)
def dlq_retry(args: argparse.Namespace) -> int:
    """Put dead jobs back: due now, one more run granted.

    They keep their attempts, unless --reset starts the count again.
    """
    only = _filter(args)
    if sum((bool(args.ids), args.all, bool(only.values))) != 1:
        raise Problem(
            "dlq retry takes ids, or --all, or filters such as --exit-code",
            "see: queuectl help dlq retry",
            USAGE,
        )
    with open_store(WRITING) as store:
        ids = args.ids or store.dead_ids(only)
        if args.dry_run:
            found = states_of(store.database, ids)
            return report(
                (
                    ActionResult(
                        one,
                        one in found,
                        found.get(one),
                        no_such_job(one).what,
                        "would be put back",
                    )
                    for one in ids
                ),
                args.json,
            )

        def revived() -> Iterator[ActionResult]:
            for job_id in ids:
                result = store.revive(job_id, "revive", args.retries, args.reset)
                yield result
                if args.dependents and result.ok:
                    yield from store.revive_dependents(job_id)

        return report(revived(), args.json, store)


QUEUE = arg("name", metavar="NAME", type=option(QUEUE_NAME), help="the queue's name")


@command("queue list", AS_JSON, examples=("queue list",))
def queue_list(args: argparse.Namespace) -> None:
    """Show depth, limit and pace of every queue in use."""
    with open_store() as store:
        print_rows(
            store.queue_stats(),
            args.json,
            [
                "Queue",
                "Depth",
                "Running",
                "Limit",
                "Paused",
                "Rate/min",
                "Oldest waiting",
            ],
            ["queue", "depth", "running", "limit", "paused", "rate", "oldest_waiting"],
        )


@command(
    "queue limit",
    QUEUE,
    arg("limit", metavar="N|none", help="jobs at once over all hosts"),
    examples=("queue limit video 2", "queue limit video none"),
)
def queue_limit(args: argparse.Namespace) -> None:
    """Run at most N jobs of a queue at once, over all hosts."""
    most = None
    if args.limit != "none":
        most = whole(0, 10**6).read(args.limit, "N (or none)")
    with open_store(WRITING) as store:
        store.limit(args.name, "max_running", most)
        ring(store.database)


@command("queue pause", QUEUE, examples=("queue pause video",))
def queue_pause(args: argparse.Namespace) -> None:
    """Start no more jobs of a queue; those that run go on."""
    with open_store(WRITING) as store:
        [now] = store.rows(lambda now: now, "SELECT UTC_TIMESTAMP(6)")
        store.limit(args.name, "paused_at", now)


@command("queue resume", QUEUE, examples=("queue resume video",))
def queue_resume(args: argparse.Namespace) -> None:
    """Start jobs of a paused queue again."""
    with open_store(WRITING) as store:
        store.limit(args.name, "paused_at", None)
        ring(store.database)


def known_key(key: str) -> str:
    if key not in SETTINGS:
        raise Problem(
            f"no such setting: {excerpt(key)}",
            nearest(key, SETTINGS) or f"settings: {' '.join(SETTINGS)}",
            USAGE,
        )
    return key


KEY = arg("key", type=known_key, metavar="KEY", help="the setting's name")


@command(
    "config set",
    KEY,
    arg("value", metavar="VALUE", help="its new value"),
    examples=("config set backoff_base 3", "config set job_timeout 10m"),
)
def config_set(args: argparse.Namespace) -> None:
    """Store a setting; running workers take it within seconds."""
    SETTINGS[args.key].metadata["kind"].read(args.value, args.key)
    with open_store(WRITING) as store:
        store.set_config(args.key, args.value)
        ring(store.database)
        settings = load_settings(Environment(()), read_config(store.database)).settings
    name = variable_of(args.key)
    hidden = Environment.read().find(name)
    if hidden:
        notice(f"warning: {name}={excerpt(hidden[0])} ({hidden[1]}) hides it here")
    if settings.lease_s > settings.worker_timeout:
        notice(
            "warning: worker_timeout is under 4 heartbeats; the lease is "
            f"{say_duration(settings.lease_s)}"
        )


@command("config get", KEY, examples=("config get backoff_base",))
def config_get(args: argparse.Namespace) -> None:
    """Print the value in force."""
    print_line(configured_by(Environment.read(), READING).origins[args.key][1])


@command("config unset", KEY, examples=("config unset backoff_base",))
def config_unset(args: argparse.Namespace) -> None:
    """Remove a stored setting: its default holds again."""
    with open_store(WRITING) as store:
        store.set_config(args.key, None)
        ring(store.database)


@command("config list", AS_JSON, examples=("config list",))
def config_list(args: argparse.Namespace) -> None:
    """Show every setting, its value's source and its default."""
    configured = configured_by(Environment.read(), READING)
    for complaint in configured.complaints:
        notice(f"warning: {complaint}")
    rows = []
    for key, field in SETTINGS.items():
        (source, text), about = configured.origins[key], field.metadata
        rows.append([key, text, source, about["default"], about["help"]])
        if args.json:
            value = getattr(configured.settings, key)
            value = sorted(value) if isinstance(value, frozenset) else value
            print_json(
                {
                    "key": key,
                    "value": value,
                    "source": source,
                    "default": about["default"],
                    "help": about["help"],
                }
            )
    if not args.json:
        print_table(["Key", "Value", "Source", "Default", "Help"], rows, ["Default"])


@command("db init", examples=("db init",))
def db_init(args: argparse.Namespace) -> None:
    """Create the database and its tables, or upgrade older ones."""
    print_line(init_database(find_connection(Environment.read())))


@command("db check", PID_FILE, AS_JSON, examples=("db check",))
def db_check(args: argparse.Namespace) -> int:
    """Look for what is off, and say how to mend it; exit 1 if so."""
    environment = Environment.read()
    target, settings = (
        find_connection(environment),
        load_settings(environment, {}).settings,
    )
    with contextlib.suppress(Problem):
        settings = configured_by(environment, READING).settings
    path = args.pid_file or _pid_file(environment)
    standing, readable = probe_pid_file(path), _readable_dotenv(environment)
    told = f"PID {standing.pid} lives" if standing.alive else "stale, nobody holds it"
    status = 0
    for one in itertools.chain(
        check_all(target, settings),
        (
            Check(
                "PID file",
                standing.alive or not standing.found,
                f"{path}: {told if standing.found else 'none'}",
                "start a daemon: queuectl worker start --daemon",
            ),
            Check(".env", not readable, "; ".join(readable) or "private, or none"),
        ),
    ):
        status |= not one.ok
        if args.json:
            print_json({**one._asdict(), "remedy": "" if one.ok else one.remedy})
        else:
            remedy = f"; {one.remedy}" if one.remedy and not one.ok else ""
            print_line(
                f"{'ok ' if one.ok else 'OFF'} {one.check:12} {one.found}{remedy}"
            )
    return status


@command("db schema", examples=("db schema | mysql -u root -p",))
def db_schema(args: argparse.Namespace) -> None:
    """Print the schema, as migrations.sql has it."""
    print_line(schema_for(find_connection(Environment.read()).database).rstrip("\n"))


@command("db start", examples=("db start",))
def db_start(args: argparse.Namespace) -> None:
    """Start a private MySQL in ./.queuectl, where there is none."""
    target = find_connection(Environment.read())
    if target.explicit:
        raise Problem(
            f"a private server would not be used: {target.source} names {target}",
            "remove what names it there (DB_HOST, DB_PORT, "
            "DB_SOCKET or DATABASE_URL), or use that server",
        )
    folder = find_private_folder() or PRIVATE_FOLDER
    server = PrivateServer(folder)
    done = "started" if server.start() else "runs already"
    print_line(f"private server {done} in {folder}, PID {server.running()}")
    print_line(init_database(find_connection(Environment.read())))


@command("db stop", examples=("db stop",))
def db_stop(args: argparse.Namespace) -> None:
    """Stop the private server; its data stays."""
    folder = find_private_folder()
    if folder and PrivateServer(folder).stop():
        print_line(f"private server in {folder} stopped")
    else:
        notice("no private server runs here")


# ---- main --------------------------------------------------------------------
#
# One door in, one door out: main finds the command, builds its parser alone, runs it,
# and turns a Problem into its message and exit status.

GROUPS = (
    (
        "jobs",
        (
            "enqueue",
            "run",
            "list",
            "show",
            "explain",
            "logs",
            "wait",
            "cancel",
            "retry",
            "rerun",
            "purge",
        ),
    ),
    ("workers", ("worker start", "worker stop", "worker list", "status")),
    ("queues", ("queue list", "queue limit", "queue pause", "queue resume")),
    ("dead letters", ("dlq list", "dlq groups", "dlq retry")),
    ("settings", ("config set", "config get", "config unset", "config list")),
    ("database", ("db init", "db check", "db schema", "db start", "db stop")),
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises Problems."""

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (--[^ =]+).*", message)
        hint = nearest(unknown[1], self._option_string_actions) if unknown else ""
        if not unknown and self.prog.endswith("enqueue"):
            hint = "a program and its arguments go after --: enqueue -- echo hi"
        raise Problem(escaped(message), hint or f"see: {self.prog} --help", USAGE)


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that `words` name, wherever its words stand, and the other words."""
    rest = list(words)
    firsts = {name.split()[0] for name in COMMANDS}
    at = next((at for at, word in enumerate(rest) if word in firsts), None)
    if at is None:
        word = _first_plain(rest)
        raise Problem(
            f"no such command: {excerpt(word)}" if word else "no command",
            nearest(word, [*firsts, *COMMANDS]) or "see: queuectl",
            USAGE,
        )
    name = rest.pop(at)
    if name in COMMANDS:
        return COMMANDS[name], rest
    seconds = [one.split()[1] for one in COMMANDS if one.startswith(f"{name} ")]
    second = next((at for at in range(at, len(rest)) if rest[at] in seconds), None)
    if second is None:
        word = _first_plain(rest[at:])
        raise Problem(
            f"{name}: no such command: {excerpt(word)}"
            if word
            else f"{name}: which of its commands?",
            nearest(word, seconds) or f"{name} {'|'.join(seconds)}",
            USAGE,
        )
    return COMMANDS[f"{name} {rest.pop(second)}"], rest


def _first_plain(words: Sequence[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")


def parser_of(found: Command) -> Parser:
    parser = Parser(
        prog=f"queuectl {found.name}",
        allow_abbrev=False,
        description=found.body.__doc__,
        epilog="\n  queuectl ".join(["examples:", *found.examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for names, options in found.args:
        parser.add_argument(*names, **options)  # type: ignore[arg-type]
    return parser


def print_overview() -> None:
    """Every command in its group, one line each."""
    print_line("queuectl: a queue of shell commands, kept in MySQL")
    for title, names in GROUPS:
        print_line(f"\n{title}:")
        for name in names:
            print_line(f"  {name:14} {COMMANDS[name].summary}")
    print_line("\nqueuectl help COMMAND says more about one; --version what runs here.")


def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    words, rest = _take_defaults_file(words[:cut]), words[cut + 1 :]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not set(words) - {"-h", "--help"}:
        if rest:
            raise Problem("no command is given before --", "see: queuectl", USAGE)
        print_overview()
        return 0
    if words == ["--version"]:
        print_line(
            f"queuectl {VERSION}, schema {SCHEMA_VERSION}, PyMySQL {driver_version()}, "
            f"Python {sys.version.split()[0]}"
        )
        return 0
    found, left = find_command(words)
    # Two take a program after --; elsewhere it ends the options.
    words = left if found.name in ("enqueue", "run") else [*left, *rest]
    args = parser_of(found).parse_intermixed_args(words)
    args.rest = rest
    return found.body(args) or 0


def _take_defaults_file(words: list[str]) -> list[str]:
    """The words without --defaults-file, which every command takes."""
    for at, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name == "--defaults-file":
            taken = words[at : at + 1 + (not sign)]
            if not sign and len(taken) < 2:
                raise Problem("--defaults-file: which?", status=USAGE)
            os.environ[DEFAULTS_FILE] = absolute(value or taken[-1])
            return words[:at] + words[at + len(taken) :]
    return words


def main() -> int:
    """Run, and turn what goes wrong into a message and an exit status."""
    try:
        use_own_environment()
        status_code = run(sys.argv[1:])
        sys.stdout.flush()
        return status_code
    except Problem as problem:
        notice(f"{problem.what}\n  {problem.hint}" if problem.hint else problem.what)
        return problem.status
    except RowRefused as refused:
        notice(f"the server refused the data: {refused}")
        return CANNOT
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The reader has gone (list | head); Python must not meet that again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 0
        notice(
            f"cannot write to standard output or {tempfile.gettempdir()}: "
            f"{error.strerror}"
        )
        return CANNOT


if __name__ == "__main__":
    sys.exit(main())
