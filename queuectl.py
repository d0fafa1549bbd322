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
import warnings
from dataclasses import dataclass
from typing import (
    IO, TYPE_CHECKING, Callable, Collection, Generic, Iterable, Iterator, List,
    Mapping, NamedTuple, NoReturn, Optional, Sequence, TextIO, Tuple, TypeVar,
    Union,
)

if TYPE_CHECKING:
    import ssl
    from pymysql.connections import Connection
    from pymysql import cursors

VERSION = "0.2.0"
T = TypeVar("T")
Thunk = Callable[[], None]
Values = Union[Sequence[object], Mapping[str, object]]
Json = Union[None, bool, int, float, str, List["Json"], "dict[str, Json]"]


# ---- errors ------------------------------------------------------------------
#
# What a person can mend: an error worded for its reader, and the exit status
# that says so. It is raised where the cause is known and told in `main` alone;
# whatever else is raised is a bug, and its traceback is let out. A message
# never carries characters that could steer the terminal it is printed on.

# The exit statuses. 69 is EX_UNAVAILABLE of sysexits.h and 74 its EX_IOERR, 124
# is what timeout(1) exits with, and 130 is what a shell reports of a program
# that Ctrl-C ended.
CANNOT = 1
USAGE = 2
UNAVAILABLE = 69
OUTPUT_CUT = 74
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

class Interrupted(KeyboardInterrupt):
    """A signal tells us to leave; `status` is what a shell reports of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number

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
        "seconds between two snapshots of an idle worker")
    doorbell: str = setting(
        choice("on", "off"), "on",
        "wake idle workers at once; off behind a proxy")

    # How soon a worker that died is found lost.
    heartbeat: float = setting(
        duration(0.1, 600), "5",
        "the longest time between two heartbeats of a worker")
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

    @property
    def orphan_grace_s(self) -> float:
        """How long what a dead worker left running has until KILL.

        It must be gone before the worker's lease is over, since others run its
        jobs again then; and those who end it must not miss their heartbeats.
        """
        return min(self.kill_grace, self.lease_s / 5)

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

def say_new_target(old: ConnectionInfo, new: ConnectionInfo) -> str:
    """Returns what the log is to say of another connection, or ""; no password."""
    if old == new:
        return ""
    before = f"{old} as {old.user!r}"
    now = f"{new} as {new.user!r}"
    if before == now:
        return f"the database is {now} as before, by another password or TLS setting"
    return f"the database is {now} from now on; it was {before}"

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
    # Its row takes nothing else that is written to it.
    "refuse": _rule((State.PROCESSING,), State.DEAD, needs_token=True),
    "refuse unrun": _rule(WAITING, State.DEAD),
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
    REFUSED = "refused"      # the server refuses what is to be written to its row

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
    def key(self) -> tuple[int, str]:
        """What names this run in the database."""
        return self.seq, self.token

    @property
    def run_tag(self) -> str:
        """What names this run in the environment of its processes."""
        return f"{self.token}-{self.seq}"

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
    # More of it than is kept, for those who follow the run: see OutputTrimmer.
    to_follow: bytes = b""

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
  changed_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
INSERT IGNORE INTO config (`key`, value) VALUES
  ('schema_version', '{SCHEMA_VERSION}/{OLDEST_WRITER}');

-- Every column but `command` has a default, so that an application may enqueue with
-- INSERT INTO jobs (command) VALUES ('...') inside its own transaction. Lengths have
-- some room, so that a session without a strict mode is refused what it would cut.
-- A dump of either server loads into the other: MySQL writes REGEXP as a function that
-- MariaDB lacks, and MariaDB writes a default that is a mere call as MySQL reads none.
CREATE TABLE IF NOT EXISTS jobs (
  seq         BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  id          VARCHAR(160) NOT NULL DEFAULT (CAST(UUID() AS CHAR)),
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
  next_run_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  created_at  DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  started_at  DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  cancel_requested_at DATETIME(6) NULL, duration DOUBLE NULL, exit_code INT NULL,
  reason VARCHAR(16) NULL, worker VARCHAR(64) NULL, token CHAR(16) NULL,
  UNIQUE KEY jobs_id (id),
  UNIQUE KEY jobs_live_key (live_key),
  KEY jobs_claim (state, queue, claim_order, seq),
  KEY jobs_due (state, next_run_at),
  CONSTRAINT jobs_state CHECK (state IN ('pending', 'processing', 'completed', 'failed',
                                         'dead', 'scheduled', 'blocked', 'cancelled')
                               AND REGEXP_INSTR(state, '[^a-z]') = 0),
  CONSTRAINT jobs_id_form CHECK (LENGTH(id) <= 128
                                 AND REGEXP_INSTR(id, '^[A-Za-z0-9]') = 1
                                 AND REGEXP_INSTR(id, '[^A-Za-z0-9._:@+-]') = 0),
  CONSTRAINT jobs_queue_form CHECK (LENGTH(queue) <= 64
                                    AND REGEXP_INSTR(queue, '^[A-Za-z0-9]') = 1
                                    AND REGEXP_INSTR(queue, '[^A-Za-z0-9._:@+-]') = 0),
  CONSTRAINT jobs_command_form CHECK (LENGTH(command) BETWEEN 1 AND 131000),
  CONSTRAINT jobs_priority CHECK (priority BETWEEN -1000000 AND 1000000),
  CONSTRAINT jobs_max_retries CHECK (max_retries BETWEEN 0 AND 1000),
  CONSTRAINT jobs_timeout CHECK (timeout >= 0),
  CONSTRAINT jobs_on_lost CHECK (on_lost IN ('retry', 'dead')
                                 AND REGEXP_INSTR(on_lost, '[^a-z]') = 0)
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
  died_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
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
  started_at   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  heartbeat_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
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
  created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
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
# Reaching MySQL, and saying plainly why we could not. Here alone it is decided
# what an error means: repeat the transaction, connect anew, the row's own
# fault, or a Problem for a person. What `transact` returns was committed. No
# other room names PyMySQL or catches its errors. Nobody forks with a
# connection open: a child that closes it would end its parent's session.

class ErrorClass(enum.Enum):
    """What an error of the server or the connection asks of us."""
    REPEAT = "repeat the transaction"
    RECONNECT = "the server is gone, or takes nothing now"
    CROWDED = "the server has no connection to spare"
    ROW = "this row cannot be stored"
    SETUP = "something is not set up"
    BUG = "ours"

# -- what each error code means

LOCK_WAIT_TIMEOUT = 1205
LOCK_NOWAIT = 3572
QUERY_KILLED = 1317
BINLOG_NEEDS_REPEATABLE_READ = 1665
# We lost against another transaction. The server is well and the same work may
# succeed at once: the connection stays, and the transaction is repeated.
REPEAT_CODES = {
    LOCK_WAIT_TIMEOUT,  # it ends the statement, and leaves the locks: ROLLBACK
    1213,  # a deadlock, and this transaction is its victim
    1020,  # MariaDB: the row has changed since this snapshot read it
    1180,  # the engine failed during COMMIT
    1206,  # the lock table is full
    1412,  # an ALTER changed the table under this snapshot
    1622,  # the engine rolled the transaction back
    1969,  # MariaDB: max_statement_time is over
    3024,  # MySQL: max_execution_time is over
    3101,  # group replication certified another transaction first
    LOCK_NOWAIT,  # NOWAIT met a lock
}
# A cluster did not take a COMMIT, or lets no transaction begin. Another host
# of the same cluster may take it, so these count as a host that hangs.
REFUSED_BY_CLUSTER = {
    1047,  # a Galera node that is not ready, as one without a majority
    3100,  # a replication hook failed
    3781,  # a new primary took too long over its backlog
    3782,  # a new primary was stopped while still behind
    3783,  # a new primary fell into error while still behind
    3797,  # consistency BEFORE was waited for in vain
    3798,  # consistency AFTER was waited for in vain
    3799,  # the member leaves its group
}
# The connection is gone, or this server stores nothing now. Time mends it, or
# another host: connect anew, and go on for as long as the caller has patience.
RECONNECT_CODES = {
    # Below 100 are the server's errors with its files, such as 3 for a full
    # disk, and the 0 with which PyMySQL says that a connection is closed.
    *range(100),
    # The client's words for a server that cannot be reached, or went away.
    2002,  # no socket, or nobody behind it
    2003,  # no connection to the host
    2006,  # the server has gone away
    2013,  # the connection was lost during a statement
    2055,  # the same, with the system's reason
    # The server's words for a connection that it ends.
    1053,  # it shuts down
    1079,  # it has shut down
    1152,  # a connection was aborted
    1158,  # reading a packet failed
    1159,  # reading a packet took too long
    1160,  # writing a packet failed
    1161,  # writing a packet took too long
    1184,  # a new connection was aborted
    QUERY_KILLED,  # an administrator's KILL QUERY, or a shutdown
    1927,  # MariaDB: the connection was killed
    3168,  # the server is not available
    3169,  # the session was killed
    4031,  # wait_timeout is over
    # With binlog_format STATEMENT, READ COMMITTED cannot write: `_roll_back`
    # makes the next session REPEATABLE READ.
    BINLOG_NEEDS_REPEATABLE_READ,
    *REFUSED_BY_CLUSTER,
    # No writes here now: a replica, or a primary that was demoted.
    1290,  # an option such as read_only forbids them
    1792,  # the transaction is read-only
    1836,  # the server is in read-only mode
    3032,  # the server is in offline mode
    4311,  # group replication is busy handing connections over
    4312,  # offline mode, with the reason
    4313,  # offline mode, with the account that set it
    # The server lacks disk or memory.
    1021,  # the disk is full
    1026,  # writing a file failed
    1030,  # the engine gave an error of its own
    1037,  # out of memory
    1038,  # out of sort memory
    1041,  # out of resources
    1114,  # the table is full
    3675,  # a tablespace cannot grow: the disk is full
    # The binary log did not take the COMMIT.
    1598,  # it cannot be written
    1950,  # MariaDB: its GTID would be out of order
    1964,  # MariaDB: an earlier COMMIT that this one follows has failed
    # Both of these also stand for causes that pass.
    1105,  # an unknown error
    9001,  # ProxySQL: there is no server behind it
}
# Too many connect at once. It is an outage that our haste would lengthen, so
# the pauses are longer.
CROWDED_CODES = {
    1040,  # the server's max_connections
    1203,  # the account's max_user_connections
    1226,  # a limit of the account's own
}
# Sent again, this data would be refused again: the caller must store it
# without the part that does not fit, or tell the person.
ROW_CODES = {
    1048,  # a column that may not be NULL
    1062,  # a unique key has this value already
    1153,  # more than max_allowed_packet
    1264,  # a number out of range
    1265,  # a value would be cut
    1292,  # a text that is no such value
    1364,  # a column without a default
    1366,  # text that the column's character set lacks
    1406,  # text longer than the column
    1442,  # a trigger would change the table that it is of
    1451,  # a foreign key of others points to this row
    1452,  # a foreign key of others points to nothing
    1644,  # a trigger's SIGNAL: somebody vetoes it
    1690,  # an expression is out of its range
    3140,  # no JSON
    3819,  # MySQL: a CHECK failed
    4025,  # MariaDB: a CHECK failed
    # More at once than the binary log or the cluster takes.
    1197,  # max_binlog_cache_size
    1705,  # max_binlog_stmt_cache_size
    3231,  # group_replication_transaction_size_limit
}
# A person must mend these. A command says so at once; a running worker goes on
# trying, because the mending may be under way.
SETUP_CODES = {
    1044,  # no right to this database
    1045,  # a wrong account or password
    1049,  # there is no such database
    1054,  # there is no such column
    1129,  # the server blocks this host, after many errors
    1130,  # the server does not admit this host
    1142,  # no right to this table
    1143,  # no right to this column
    1146,  # there is no such table
    1698,  # the account is bound to a system user
    1862,  # the password has expired
    2026,  # no secure connection
    2059,  # a way to log in that the client lacks
    3098,  # a plugin, such as group replication, refuses the table
    3118,  # the account is locked
    3159,  # the server wants TLS
    3635,  # the same as 3098, of a table in the transaction
}
# The account is refused, or the host that it comes from.
ACCOUNT_CODES = {1044, 1045, 1130, 1698, 1862, 3118}
CLASS_OF_CODE = {
    **dict.fromkeys(REPEAT_CODES, ErrorClass.REPEAT),
    **dict.fromkeys(RECONNECT_CODES, ErrorClass.RECONNECT),
    **dict.fromkeys(CROWDED_CODES, ErrorClass.CROWDED),
    **dict.fromkeys(ROW_CODES, ErrorClass.ROW),
    **dict.fromkeys(SETUP_CODES, ErrorClass.SETUP),
}

def classify_error(error: Exception) -> tuple[ErrorClass, int]:
    """Returns the class of a PyMySQL error, and its code or -1."""
    import ssl
    code = -1
    if error.args and isinstance(error.args[0], int):
        code = error.args[0]
    origin = getattr(error, "original_exception", None)
    # PyMySQL says 2003 of a bad certificate too, which no waiting will mend.
    if isinstance(origin, ssl.SSLCertVerificationError):
        return ErrorClass.SETUP, 2026
    # SQLSTATE 45: a SIGNAL, whatever code its trigger gave it. Older PyMySQL
    # does not tell it.
    state = getattr(error, "sqlstate", None) or ""
    if state.startswith("45"):
        return ErrorClass.ROW, code
    # An InternalError without a code: answers came out of order.
    if code == -1 and "Packet sequence" in str(error):
        return ErrorClass.RECONNECT, code
    return CLASS_OF_CODE.get(code, ErrorClass.BUG), code

def timed_out(error: Exception) -> bool:
    """Says whether no answer came in time: the server or its wire hangs."""
    origin = getattr(error, "original_exception", None)
    return (isinstance(origin, socket.timeout)
            or isinstance(error.__context__, socket.timeout))

def _refused(error: Exception) -> bool:
    """Says whether nobody listens at the address."""
    origin = getattr(error, "original_exception", None)
    return isinstance(origin, (ConnectionRefusedError, FileNotFoundError))

class RowRefused(Exception):
    """The server refuses this data for good: `code` and `text` say why."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.text = text

class Unreachable(Problem):
    """The server stayed away for longer than the caller's patience."""
    # Whether the transaction may have been carried out.
    sent = False

# -- what a person reads about an error

class Explanation(NamedTuple):
    """What happened, with places for account, place and text; and a hint."""
    what: str
    hint: str

NO_ACCOUNT = Explanation(
    "the server refused the account {account}, {place}: {text}",
    "check DB_USER and DB_PASSWORD")
NO_TABLES = Explanation(
    "the queue's tables are missing in {place}: {text}",
    "run: queuectl db init")
# The server's text names the column that is missing.
OTHER_TABLES = Explanation(
    "the tables in {place} have another form than this program's: {text}",
    "they were made by another version: name another database in DB_NAME, "
    "or make them anew (queuectl db init)")
NO_RIGHT = Explanation(
    "the account {account} lacks a right in {place}: {text}",
    "grant it (README, Accounts), or use another account; an administrator "
    "makes the tables by: queuectl db schema | mysql -u root -p")
NOT_SECURE = Explanation(
    "no secure connection to {place}: {text}",
    "check DB_SSL_MODE and DB_SSL_CA")
LOCKED = Explanation(
    "others hold locks in {place}: {text}",
    "try again; a long transaction is in SHOW PROCESSLIST")
# Whatever nobody foresaw: its code and text say what to look for.
NOT_FORESEEN = Explanation(
    "the server did not do it in {place}: error {code}, {text}",
    "see: queuectl db check, and the server's documentation for this code")
STOPPED = Explanation(
    "the private server of {place} is stopped",
    "run: queuectl db start")
NOT_CONFIGURED = Explanation(
    "no database is configured, and no server answers at {tried}; "
    "looked in the environment (DATABASE_URL, DB_HOST, DB_SOCKET), ./.env, "
    f".env beside the script, ./{PRIVATE_FOLDER} and MySQL's option files",
    "set DB_HOST, DB_USER and DB_PASSWORD, or start a private server: "
    "queuectl db start")
AWAY = Explanation(
    "cannot reach the database {place}: {text}",
    "check that the server runs, and DB_HOST, DB_PORT and DB_SOCKET")
EXPLANATIONS = {
    1045: NO_ACCOUNT,
    1698: NO_ACCOUNT,
    1049: NO_TABLES,
    1146: NO_TABLES,
    1054: OTHER_TABLES,
    1044: NO_RIGHT,
    1142: NO_RIGHT,
    1143: NO_RIGHT,
    2026: NOT_SECURE,
    2059: NOT_SECURE,
    3159: NOT_SECURE,
}

def explain_error(target: ConnectionInfo, error: Exception) -> Unreachable:
    """Returns what a person should read of an error; no password is in it."""
    text = type(error).__name__
    if error.args:
        text = str(error.args[-1])
    tried = str(target).partition(" at ")[2]
    if target.source != "default":
        tried += f" (from {target.source})"
    what, hint = _explanation(target, error)
    told = what.format(
        account=f"{target.user!r} (from {target.account_source})",
        place=f"{target} (from {target.source})",
        tried=tried,
        code=classify_error(error)[1],
        # Nothing that a hostile server says steers the terminal.
        text=text.translate(ESCAPES))
    return Unreachable(told, hint, UNAVAILABLE)

def _explanation(target: ConnectionInfo, error: Exception) -> Explanation:
    """Returns the words for an error; they depend on who named the host."""
    error_class, code = classify_error(error)
    if code in EXPLANATIONS:
        return EXPLANATIONS[code]
    if error_class is ErrorClass.BUG:
        return NOT_FORESEEN
    if error_class is ErrorClass.REPEAT:
        return LOCKED
    if _refused(error) and target.source == PRIVATE_FOLDER:
        return STOPPED
    if _refused(error) and not target.explicit:
        return NOT_CONFIGURED
    return AWAY

# -- the driver

PYMYSQL_NEEDED = (1, 0, 2)
# The system's own package is named first, by the tool that the system has.
PACKAGES = {
    "apt-get": "apt install python3-pymysql",
    "dnf": "dnf install python3-PyMySQL",
    "apk": "apk add py3-pymysql",
    "zypper": "zypper install python3-PyMySQL",
    "pacman": "pacman -S python-pymysql",
}

class _Driver:
    """The names of PyMySQL, loaded when first needed: it takes 40 to 70 ms."""

    def __init__(self) -> None:
        """Raises a Problem where PyMySQL is missing, or too old."""
        try:
            import pymysql
        except ImportError as error:
            what = f"PyMySQL is missing for {sys.executable} ({error})"
            raise Problem(what, how_to_install(), UNAVAILABLE) from None
        self.version = ".".join(str(part) for part in pymysql.VERSION[:3])
        if pymysql.VERSION[:3] < PYMYSQL_NEEDED:
            needed = ".".join(str(part) for part in PYMYSQL_NEEDED)
            what = (f"PyMySQL {self.version} of {sys.executable} is too old: "
                    f"{needed} is needed")
            raise Problem(what, how_to_install(), UNAVAILABLE)
        self.MySQLError = pymysql.err.MySQLError
        self.OperationalError = pymysql.err.OperationalError
        self.ProgrammingError = pymysql.err.ProgrammingError

def how_to_install() -> str:
    """Returns how this system gets PyMySQL."""
    ways = [line for tool, line in PACKAGES.items() if shutil.which(tool)][:1]
    ways.append(f"{sys.executable} -m pip install PyMySQL")
    return "install it: " + ", or: ".join(ways)

def use_own_environment() -> None:
    """Goes on under the .venv beside the script if PyMySQL is missing here.

    It returns where there is nothing to go on under; else it never does.
    """
    import importlib.util
    if importlib.util.find_spec("pymysql") is not None:
        return
    script = os.path.realpath(__file__)
    folder = os.path.join(os.path.dirname(script), ".venv")
    python = os.path.join(folder, "bin", "python3")
    if not os.access(python, os.X_OK):
        return
    # Under it already, and it lacks PyMySQL too: going on would never end.
    if os.path.realpath(sys.prefix) == os.path.realpath(folder):
        return
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])

def driver_version() -> str:
    """Returns PyMySQL's version, or what is wrong with it."""
    try:
        return _Driver().version
    except Problem as problem:
        return "missing" if "missing" in problem.what else "too old"

@dataclass
class Wire:
    """How long one connection waits for an answer, and what it sent last."""
    # Seconds for a statement of so many bytes; None while it is being set up,
    # when the time-outs of the login hold.
    answer_s: Callable[[int], float] | None = None
    statement_bytes: int = 0

# A bit of what the server offers in its greeting.
TLS_OFFERED = 1 << 11

def _connection_class(wire: Wire) -> type[Connection]:
    """Returns PyMySQL's connection, held to what it leaves open.

    It waits longer for many bytes, refuses plain text where TLS is asked for,
    and lets nothing out after an error.
    """
    import pymysql
    class WiredConnection(pymysql.connections.Connection):
        """A connection that keeps to its `wire`."""
        _sock: socket.socket | None
        _closed: bool

        def query(self, sql: str, unbuffered: bool = False) -> int:
            """Sends a statement, with the patience that its size needs."""
            wire.statement_bytes = len(sql)
            if wire.answer_s:
                allowed_s = wire.answer_s(len(sql))
                self._read_timeout = allowed_s
                self._write_timeout = allowed_s
            return super().query(sql, unbuffered)

        def _force_close(self) -> None:
            """Closes after an error, with what is unsent."""
            # What is unsent is not to reach the server any more: by lingering
            # for 0 s the kernel drops it and resets the connection.
            if self._sock and not self._closed:
                linger = struct.pack("ii", 1, 0)
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger)
            super()._force_close()  # type: ignore[misc]

        def _request_authentication(self) -> None:
            """Logs in, unless TLS was asked for and is not offered."""
            # Older PyMySQL would go on in plain text where TLS is not offered.
            offers: int = getattr(self, "server_capabilities")  # noqa: B009
            if self.ssl and not offers & TLS_OFFERED:
                raise pymysql.err.OperationalError(
                    2026, "the server does not offer TLS")
            super()._request_authentication()  # type: ignore[misc]
    return WiredConnection

class RefuseClearText:
    """Gives nothing to a server that wants the password in clear text."""

    def __init__(self, connection: object) -> None:
        self._connection = connection

    def authenticate(self, packet: object) -> NoReturn:
        what = "the server asked for the password in clear text: refused"
        hint = "give the account caching_sha2_password or mysql_native_password"
        raise Problem(what, hint, UNAVAILABLE)

# -- how long a caller waits

# The slowest wire that is borne with.
SLOW_WIRE_BYTES_S = 32 * 1024
# A statement of fewer bytes waits for the server, and not for the wire.
MANY_BYTES = 16 << 10
# A pause between two tries; it must stay far below a worker's lease.
RETRY_PAUSE_MAX_S = 3.0
# A pause after a conflict: the other transaction is over soon.
CONFLICT_PAUSE_MAX_S = 0.5
# So much more for a server that has no connection to spare.
CROWDED_PAUSE_S = 0.2
# A shorter outage is nobody's business.
SAY_AFTER_S = 1.0
# After so many failures the next host is tried, if there are several.
TRIES_ON_A_HOST = 3

@dataclass(frozen=True)
class RetryPolicy:
    """How a caller bears with a server that is away."""
    retry_for_s: float
    # Of one answer to a short statement.
    timeout_s: float
    say: Callable[[str], None]
    # Of one answer to a statement of many bytes.
    longest_s: float = math.inf

    @property
    def endless(self) -> bool:
        """Whether the caller never gives up, as a worker with running jobs."""
        return math.isinf(self.retry_for_s)

    def answer_s(self, statement_bytes: int) -> float:
        """Returns how long a statement of this size may take on a slow wire."""
        wire_s = statement_bytes / SLOW_WIRE_BYTES_S
        longest_s = max(self.timeout_s, self.longest_s)
        return min(self.timeout_s + wire_s, longest_s)

READING = RetryPolicy(retry_for_s=2, timeout_s=30, say=notice)
WRITING = RetryPolicy(retry_for_s=10, timeout_s=10, say=notice)
# A failover takes 30 s.
FOLLOWING = RetryPolicy(retry_for_s=60, timeout_s=10, say=notice)
# An ALTER of a big table takes hours.
UPGRADING = RetryPolicy(retry_for_s=20, timeout_s=4 * 3600, say=notice)

def _pause_s(error_class: ErrorClass, failed: int, timeout_s: float) -> float:
    """Returns the pause after so many failures: growing, and never in step.

    Many that failed at once, as in a deadlock, must not come back at once.
    """
    longest_s = min(RETRY_PAUSE_MAX_S, timeout_s / 4)
    if error_class is ErrorClass.REPEAT:
        longest_s = CONFLICT_PAUSE_MAX_S
    growing_s = 0.01 * 2.0 ** min(failed, 12)
    pause_s = min(longest_s, growing_s) * random.uniform(0.5, 1)
    if error_class is ErrorClass.CROWDED:
        pause_s += CROWDED_PAUSE_S
    return pause_s

class Outage:
    """Tells a person of an outage that lasts, once, and of its end."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._said = False

    def goes_on(self, policy: RetryPolicy, what: str) -> None:
        """Takes note of one more failure; says so where it has lasted."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if not self._said and now - self._since >= SAY_AFTER_S:
            self._said = True
            policy.say(f"{what}; trying again")

    def ends(self, policy: RetryPolicy) -> None:
        """Takes note of a success; says so to who knows of the outage."""
        if self._said and self._since is not None:
            gone = say_duration(time.monotonic() - self._since)
            policy.say(f"the database is back after {gone}")
        self._since = None
        self._said = False

# -- statements

# Of the two columns of `Cursor.pairs`.
Left = TypeVar("Left")
Right = TypeVar("Right")

def field_list(record: type, prefix: str = "") -> str:
    """Returns the SELECT list of a dataclass's or NamedTuple's fields.

    The prefix stands before each name: "jobs." makes "jobs.seq, jobs.id".
    """
    import inspect
    names = inspect.signature(record).parameters
    return ", ".join(prefix + name for name in names)

def placeholders(values: Collection[object]) -> str:
    return ", ".join("%s" for _ in values)

def sent_bytes(text: str) -> int:
    """Returns how many bytes the text has on the wire."""
    # Counting is all that most statements need: they are ASCII.
    if text.isascii():
        return len(text)
    return len(text.encode(errors="surrogateescape"))

class Cursor:
    """PyMySQL's cursor, with statements that share a round trip.

    What was deferred goes out in one packet with the statement after it. The
    server does them in order and stops at the first that fails, so a deferred
    statement's error is raised by the one that took it along.
    """

    def __init__(self, inner: cursors.Cursor, bytes_max: int,
                 read_committed: bool = True) -> None:
        """One packet takes `bytes_max` bytes of deferred statements; 0: none."""
        self._inner = inner
        self._bytes_max = bytes_max
        # What a transaction must see as it is now, although it has read
        # before: under READ COMMITTED each plain read does, else only a
        # locking one.
        self.share = "LOCK IN SHARE MODE"
        if read_committed:
            self.share = ""
        self.fetchone = inner.fetchone
        self.fetchall = inner.fetchall
        self._deferred: list[str] = []
        # The rows matched by those that had waited for the last statement, and
        # by those of the next one that were sent already.
        self.counts: list[int] = []
        self._early: list[int] = []

    @property
    def packs(self) -> bool:
        """Whether statements may share a packet here."""
        return self._bytes_max > 0

    def mogrify(self, statement: str, values: Values = ()) -> str:
        """Returns the statement as it is sent, with its values."""
        # Without values PyMySQL must get None: a % then stands for itself.
        return str(self._inner.mogrify(statement, values or None))

    def defer(self, statement: str, values: Values = ()) -> None:
        """Has it done before the next statement, which tells its errors too."""
        text = self.mogrify(statement, values)
        self._make_room(text)
        self._deferred.append(text)

    def rows(self, make: Callable[..., T], statement: str,
             *values: object) -> list[T]:
        """Returns what `make` makes of each row, given its columns in order."""
        self.execute(statement, values)
        return [make(*row) for row in self.fetchall()]

    def records(self, make: Callable[..., T], statement: str,
                *values: object) -> list[T]:
        """Returns what `make` makes of each row, by the columns' names."""
        self.execute(statement, values)
        names = [column[0] for column in self._inner.description or ()]
        found = []
        for row in self.fetchall():
            fields = dict(zip(names, row))
            found.append(make(**fields))
        return found

    def pairs(self, statement: str, *values: object) -> dict[Left, Right]:
        """Returns two columns as a dict from the first to the second."""
        self.execute(statement, values)
        return dict(self.fetchall())

    def value(self, statement: str, *values: object) -> object:
        """Returns the one value of a one-row answer; None without a row."""
        self.execute(statement, values)
        row = self.fetchone()
        return row[0] if row else None

    def execute(self, statement: str, values: Values = ()) -> int:
        """Sends a statement; returns how many rows it matched or returned."""
        text = self.mogrify(statement, values)
        self._make_room(text)
        return self._send(text)

    def _make_room(self, text: str) -> None:
        """Sends what waits, if `text` is too much in one packet with it."""
        if not self._deferred:
            return
        together = sum(map(sent_bytes, self._deferred)) + sent_bytes(text)
        if together > self._bytes_max:
            matched = self._send(self._deferred.pop())
            # The statement that these wait for is still to come.
            self._early = [*self.counts, matched]

    def _send(self, statement: str) -> int:
        """Sends what waits and `statement` in one packet; reads all answers."""
        waiting = self._deferred
        # Taken off first: after an error nobody sends them again.
        self._deferred = []
        self._before([*waiting, statement])
        self._inner.execute(";\n".join([*waiting, statement]))
        self.counts = self._early
        self._early = []
        # Each answer is read: only then is it known that the server did it,
        # and an unread one would be taken for the next statement's.
        for text in waiting:
            self._answered(text)
            self.counts.append(self._inner.rowcount)
            self._inner.nextset()
        self._answered(statement)
        return self._inner.rowcount

    def _before(self, statements: Sequence[str]) -> None:
        """Is called before these are sent."""

    def _answered(self, statement: str) -> None:
        """Is called once the server has answered this one without an error."""

def batched_inserts(cursor: Cursor, packet_bytes: int, head: str,
                    rows: Iterable[tuple[str, Values]],
                    tail: str) -> Iterator[str]:
    """Yields INSERTs of `rows`, each (template, values).

    A statement has 1000 rows or a quarter of a packet at most, but for a row
    that is larger alone. It raises 1153 for a row that no packet takes.
    """
    bytes_max = packet_bytes // 4
    size = 0
    parts: list[str] = []
    for template, values in rows:
        part = cursor.mogrify(template, values)
        length = sent_bytes(part)
        # Sent, it would break the connection, and look like an outage.
        if length > packet_bytes - 4096:
            text = f"a row of {length} bytes"
            raise _Driver().OperationalError(1153, text)
        full = size + length > bytes_max or len(parts) >= 1000
        if parts and full:
            yield f"{head} {', '.join(parts)} {tail}"
            parts = []
            size = 0
        parts.append(part)
        size += length + 2
    if parts:
        yield f"{head} {', '.join(parts)} {tail}"

# -- one try at a transaction

@dataclass
class Tries:
    """What one piece of work has met so far, over all its tries."""
    # How many failed, and when the first of them did.
    count: int = 0
    since: float = 0.0
    # Whether the present one has come to the work itself. Before that nothing
    # of it was sent, so a host that cannot be reached leaves no doubt.
    begun: bool = False
    # Whether one broke off after it had begun. The caller learns of it in
    # Unreachable.sent; it decides nothing here.
    lost: bool = False
    # Whether one sent a COMMIT that may stand, because no answer came. As long
    # as it is set, the work is not done again: only `verify` can tell, and
    # when that finds nothing, this is cleared. It outlives tries that could
    # not even ask.
    unsure: bool = False
    # How many in a row waited in vain for a statement of many bytes. Who packs
    # the work sends less at once then, since the wire may be too slow for it.
    slow: int = 0

    def waited(self, in_vain: bool, statement_bytes: int) -> None:
        """Takes note of how the present one waited for its last statement."""
        if in_vain and statement_bytes > MANY_BYTES:
            self.slow += 1
        else:
            self.slow = 0

    def failed(self, error_class: ErrorClass) -> None:
        """Takes note of one more that failed."""
        self.count += 1
        self.since = self.since or time.monotonic()
        if self.begun and error_class is ErrorClass.RECONNECT:
            self.lost = True

class Commit(enum.Enum):
    """How far a transaction has come.

    SENT is set before the packet leaves, never after: whatever goes wrong from
    then on, an error of the server included, the COMMIT may have been carried
    out. A statement that fails before it in the same packet leaves it SENT as
    well, and `verify` then finds nothing: it costs a look, and no job.
    """
    OPEN = "its COMMIT was not sent: nothing of it stands"
    SENT = "its COMMIT was sent and not answered: it may stand"
    ANSWERED = "its COMMIT was answered: it stands"

COMMIT = "COMMIT"

class Transaction(Cursor):
    """One try at a transaction, from its BEGIN to the answer to its COMMIT.

    Each try, and each look whether an earlier one stands, is an object of its
    own: what one has sent can never be taken for what another has.
    """

    def __init__(self, inner: cursors.Cursor, bytes_max: int,
                 read_committed: bool, tries: Tries) -> None:
        super().__init__(inner, bytes_max, read_committed)
        self.tries = tries
        self.commit = Commit.OPEN
        self.defer("BEGIN")

    def commit_with_next(self) -> None:
        """Has the COMMIT stand before the next statement, in its packet.

        Where it reads what came of the transaction, a round trip is saved.
        """
        self.defer(COMMIT)

    def finish(self) -> None:
        """Returns once the server has answered the COMMIT."""
        if self.commit is not Commit.ANSWERED:
            self.execute(COMMIT)

    def _before(self, statements: Sequence[str]) -> None:
        if COMMIT in statements:
            self.commit = Commit.SENT

    def _answered(self, statement: str) -> None:
        if statement == COMMIT:
            self.commit = Commit.ANSWERED

# -- connecting

@dataclass
class Route:
    """Which of several hosts comes first, for all connections of a process."""
    first: int = 0

@dataclass(frozen=True)
class Session:
    """A connection that is ready for statements, and what its server is."""
    connection: Connection
    wire: Wire
    # Which of the hosts it goes to.
    host: int
    version: str
    packet_bytes: int
    # Whether a packet may have several statements: a proxy may forbid it.
    packs: bool = True

    @property
    def packed_bytes(self) -> int:
        """How many bytes of statements may share a packet; 0: none may."""
        return self.packet_bytes // 4 if self.packs else 0

    @property
    def mariadb(self) -> bool:
        return "MariaDB" in self.version

def _close_quietly(connection: Connection) -> None:
    # The goodbye is a courtesy, and fails where the server has gone.
    with contextlib.suppress(_Driver().MySQLError, OSError):
        connection.close()

# An UPDATE counts the rows it matched, changed or not: else a heartbeat in the
# same instant as the last one would look like a lost lease.
FOUND_ROWS = 1 << 1
# It lets statements share a packet, and so a round trip (`Cursor.defer`). What
# came from outside is in them as escaped values only, and so starts none.
MULTI_STATEMENTS = 1 << 16

# As many rows as the statement itself allows.
ALL_ROWS = (1 << 64) - 1

class Connector:
    """Finds the host to use, logs in, and sets the session up."""

    def __init__(self, target: ConnectionInfo, route: Route,
                 bare: bool) -> None:
        """`bare` connects without naming a database, before there is one."""
        self.target = target
        self._route = route
        self._bare = bare
        # A socket has no host, and goes through the same walk.
        self._hosts: Hosts = target.hosts or (("localhost", 0),)
        self._tls: ssl.SSLContext | None = None

    def towards(self, target: ConnectionInfo) -> Connector:
        """Returns the like of it for another server."""
        return Connector(target, self._route, self._bare)

    def connect(self, policy: RetryPolicy, read_committed: bool) -> Session:
        """Returns a session on the first host that answers and takes writes.

        The hosts are tried once each, in the order of the route, which from
        then on begins with the one found; one host alone may take no writes.
        It raises the error of the last that failed.
        """
        driver = _Driver()
        failure: Exception | None = None
        for step in range(len(self._hosts)):
            at = (self._route.first + step) % len(self._hosts)
            try:
                session = self._connect_to(at, policy, read_committed)
            except (driver.MySQLError, RuntimeError, OSError, ValueError,
                    IndexError) as error:
                failure = _as_driver_error(error)
                continue
            if session:
                self._route.first = at
                return session
            # A host that failed outright says more than one that is a replica.
            if not failure:
                host, port = self._hosts[at]
                failure = driver.OperationalError(
                    1290, f"{host}:{port} takes no writes")
        raise failure or AssertionError("no host")

    def leave_host(self) -> None:
        """Begins with the next host from now on, if there is one.

        A mere reset is no reason for it: the next one may be a replica that
        somebody left writable. Sessions on this host are closed when they are
        next asked for.
        """
        self._route.first = (self._route.first + 1) % len(self._hosts)

    def _connect_to(self, at: int, policy: RetryPolicy,
                    read_committed: bool) -> Session | None:
        """Returns a session on one host; None where it takes no writes now."""
        wire = Wire()
        connection = self._open(at, policy, wire)
        ready = False
        try:
            session = self._greet(connection, wire, at)
            if session:
                packs = self._set_up_session(session, policy, read_committed)
                session = dataclasses.replace(session, packs=packs)
                ready = True
            return session
        finally:
            # Also after a Problem or Ctrl-C: nothing half made stays.
            if not ready:
                _close_quietly(connection)

    def _open(self, at: int, policy: RetryPolicy, wire: Wire) -> Connection:
        """Returns a connection, with TLS as DB_SSL_MODE says."""
        mode = self.target.ssl_mode
        if self.target.socket or mode == "disabled":
            return self._connect_once(at, policy, wire, None)
        try:
            return self._connect_once(at, policy, wire, self._tls_context())
        except _Driver().OperationalError as error:
            if mode != "preferred" or error.args[0] != 2026:
                raise
            return self._connect_once(at, policy, wire, None)

    def _connect_once(self, at: int, policy: RetryPolicy, wire: Wire,
                      tls: ssl.SSLContext | None) -> Connection:
        """Returns a connection that is logged in, all time-outs short."""
        host, port = self._hosts[at]
        patience_s = min(5.0, policy.retry_for_s, policy.timeout_s)
        patience_s = max(1.0, patience_s)
        # Either plugin sends the password as it is, at the server's mere word.
        refuse: dict[str, Callable[[Connection], object]] = {
            "mysql_clear_password": RefuseClearText,
            "dialog": RefuseClearText,
        }
        return _connection_class(wire)(
            user=self.target.user,
            # PyMySQL would encode a text as latin-1.
            password=self.target.password.encode(),
            host=host,
            port=port,
            unix_socket=self.target.socket or None,
            database=None if self._bare else self.target.database,
            charset="utf8mb4",
            # Without it the first SELECT would open a snapshot that a poll
            # never leaves. A transaction has its BEGIN.
            autocommit=True,
            client_flag=FOUND_ROWS | MULTI_STATEMENTS,
            auth_plugin_map=refuse,
            ssl=tls,
            ssl_disabled=tls is None,
            connect_timeout=patience_s,
            read_timeout=patience_s,
            write_timeout=patience_s)

    def _tls_context(self) -> ssl.SSLContext:
        """Returns one TLS context for all connections.

        Loading the authorities costs 20 ms. A bad DB_SSL_CA is a Problem.
        """
        import ssl
        if self._tls is not None:
            return self._tls
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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
            what = f"DB_SSL_CA: cannot use {path}: {error}"
            raise Problem(what, status=UNAVAILABLE) from None
        self._tls = context
        return context

    def _greet(self, connection: Connection, wire: Wire,
               at: int) -> Session | None:
        """Asks the server what it is; None where it takes no writes now.

        One host alone is used as it is: it may be a replica that is only read.
        Of several the right one is asked for before the schema is, which on a
        host that was left behind may be old.
        """
        cursor = Cursor(connection.cursor(), 0)
        cursor.execute("SELECT VERSION(), @@max_allowed_packet, @@read_only, "
                       "@@innodb_read_only")
        version, packet_bytes, *read_only = cursor.fetchone() or ("", 0)
        several = len(self._hosts) > 1
        if several and not (takes_writes(read_only) and _can_commit(cursor)):
            return None
        return Session(connection, wire, at, str(version), packet_bytes)

    def _set_up_session(self, session: Session, policy: RetryPolicy,
                        read_committed: bool) -> bool:
        """Sets the session's variables; raises a Problem for another schema.

        Returns whether several statements may be sent in one packet.
        """
        cursor = Cursor(session.connection.cursor(), 0)
        timeout_s = policy.timeout_s
        # Where a COMMIT hangs, there must be time to go to the next host.
        if len(self._hosts) > 1:
            timeout_s = min(timeout_s, max(1.0, policy.retry_for_s / 3))
        limit = "max_execution_time"
        if session.mariadb:
            limit = "max_statement_time"
        # The server must give up a lock before we give up the server: our
        # giving up would leave the session there, with the locks that it has
        # and the place that it takes. So it is for rows, and for what whole
        # tables wait for: an ALTER, LOCK TABLES, FLUSH TABLES WITH READ LOCK.
        longest_s = min(10.0, timeout_s - 1, policy.retry_for_s)
        lock_wait_s = max(1, int(longest_s))
        # A session that a partition left behind has locks: it must end.
        idle_s = int(4 * policy.timeout_s)
        # What a statement relies on is set here: the server's own defaults may
        # forbid an UPDATE, a join or a write, cut an answer, or end a session.
        variables = (
            "SET SESSION sql_mode = 'STRICT_ALL_TABLES', "
            f"time_zone = '+00:00', {limit} = 0, completion_type = 0, "
            "autocommit = 1, sql_safe_updates = 0, "
            f"sql_big_selects = 1, sql_select_limit = {ALL_ROWS}, "
            f"innodb_lock_wait_timeout = {lock_wait_s}, "
            f"lock_wait_timeout = {lock_wait_s}, "
            f"wait_timeout = {idle_s}")
        level = "REPEATABLE READ"
        if read_committed:
            level = "READ COMMITTED"
        packs = _send_both(
            session, variables,
            f"SET SESSION TRANSACTION ISOLATION LEVEL {level}, READ WRITE")
        # From here on the caller's own patience holds, no more the login's: it
        # is longer than a wait for a lock, and the next statement reads a table.
        patience = dataclasses.replace(policy, timeout_s=timeout_s)
        session.wire.answer_s = patience.answer_s
        if not self._bare:
            check_schema(cursor.value(SCHEMA_ROW), self.target.database)
        return packs

def _send_both(session: Session, one: str, two: str) -> bool:
    """Does two statements, which may be done twice.

    Returns whether they went in one packet: a proxy that shares connections
    (MySQL Router) answers such a packet with an error.
    """
    cursor = Cursor(session.connection.cursor(), MANY_BYTES)
    try:
        cursor.defer(one)
        cursor.execute(two)
        return True
    except _Driver().MySQLError as error:
        if classify_error(error)[0] is not ErrorClass.BUG:
            raise
    cursor.execute(one)
    cursor.execute(two)
    return False

def _as_driver_error(error: Exception) -> Exception:
    """Returns the error that PyMySQL should have raised while connecting."""
    driver = _Driver()
    if isinstance(error, driver.MySQLError):
        return error
    # caching_sha2_password without TLS needs a package that is not here.
    if isinstance(error, RuntimeError):
        return driver.OperationalError(2059, str(error))
    # What answers there does not greet like a MySQL.
    return driver.OperationalError(2013, repr(error))

def takes_writes(read_only: Sequence[object]) -> bool:
    """Says whether none of a server's read-only variables is on.

    They are 0 or 1, or from MariaDB 12 on a word.
    """
    return all(str(value).upper() in ("0", "OFF") for value in read_only)

def _can_commit(cursor: Cursor) -> bool:
    """Says whether this server's cluster has a majority, or none is known of.

    A member that lost the others takes writes, it says; each COMMIT hangs.
    """
    galera: dict[str, str] = cursor.pairs(
        "SHOW STATUS WHERE Variable_name IN "
        "('wsrep_ready', 'wsrep_provider_name')")
    if galera.get("wsrep_provider_name"):
        return galera.get("wsrep_ready") == "ON"
    try:
        cursor.execute(
            "SELECT COUNT(*), COALESCE(SUM(member_state = 'ONLINE'), 0) "
            "FROM performance_schema.replication_group_members "
            "WHERE member_state <> 'OFFLINE'")
    except _Driver().MySQLError as error:
        # SETUP: there is no such table, or no right to it.
        if classify_error(error)[0] is not ErrorClass.SETUP:
            raise
        return True
    members, online = cursor.fetchone() or (0, 0)
    if not members:
        return True
    return bool(2 * online > members)

def _is_for_next_host(error: Exception, tries: Tries) -> bool:
    """Says whether the next try is to begin with another host."""
    error_class, code = classify_error(error)
    if timed_out(error) or code in REFUSED_BY_CLUSTER:
        return True
    if code == LOCK_WAIT_TIMEOUT and tries.unsure:
        # What holds the lock is our own COMMIT, which hangs.
        return True
    # A conflict with others is no fault of the host.
    conflict = error_class is ErrorClass.REPEAT and code != LOCK_WAIT_TIMEOUT
    return tries.count % TRIES_ON_A_HOST == 0 and not conflict

# -- the database

class Database:
    """One connection, made when it is first needed, and again when lost."""

    def __init__(self, target: ConnectionInfo, policy: RetryPolicy,
                 bare: bool = False, route: Route | None = None) -> None:
        """Connects to nothing yet; a bare one will not name the database."""
        # Both of these may be exchanged at any time, by any thread.
        self.target = target
        # Where the server refuses the account, this says what the target is now.
        self.find_target: Callable[[], ConnectionInfo | None] | None = None
        # It may be exchanged at any time, and holds from the next try on.
        self.policy = policy
        self.route = route or Route()
        # Done before each try but the first: a worker's heartbeat.
        self.between_tries: Callable[[Cursor], object] | None = None
        # What the server said last; a guess until it is asked.
        self.packet_bytes = 1 << 20
        self.version = ""
        self.read_committed = True
        self._connector = Connector(target, self.route, bare)
        self._session: Session | None = None
        self._skip_locked: str | None = None
        self._outage = Outage()

    def transact(self, work: Callable[[Transaction], T],
                 verify: Callable[[Transaction], T | None] | None = None) -> T:
        """Does `work` in one transaction, and all of it again where that is right.

        Returns only what a COMMIT was answered for, or what `verify` found: it
        looks with locking reads whether a COMMIT whose answer was lost was
        carried out, and gives what came of it, or None. Without it, `work`
        must bear to be done twice. Raises RowRefused, Unreachable (`sent`: may
        have been carried out) and other Problems.
        """
        tries = Tries()
        def attempt() -> T:
            """Looks whether an earlier try stands; if none does, makes one more."""
            tries.begun = False
            # By itself, and first: a try that waits for a lock in vain takes
            # back what it wrote, a heartbeat included.
            if tries.count and self.between_tries:
                self.between_tries(self._cursor())
            if tries.unsure and verify:
                # It gets Tries of its own, so that a COMMIT of the look is
                # never taken for one of the work. Should the look fail, we
                # stay unsure.
                found = self._carry_out(verify, Tries())
                if found is not None:
                    return found
                # Its locking reads have waited for whoever still held the
                # rows, so the COMMIT that we are unsure of does not stand, and
                # never will.
                tries.unsure = False
            return self._carry_out(work, tries)
        return self._retry(attempt, tries)

    def _carry_out(self, work: Callable[[Transaction], T], tries: Tries) -> T:
        """Does `work` in a transaction, up to the answer to its COMMIT."""
        session = self._ready_session()
        tries.begun = True
        transaction = Transaction(
            session.connection.cursor(),
            session.packed_bytes,
            self.read_committed,
            tries)
        try:
            result = work(transaction)
            transaction.finish()
            return result
        finally:
            # After ANSWERED too: should `work` fail then, what came of it is
            # not known here, and must be looked for.
            tries.unsure = transaction.commit is not Commit.OPEN

    def read(self, work: Callable[[Cursor], T]) -> T:
        """Does `work`, which changes nothing or one thing by one statement."""
        tries = Tries()
        def attempt() -> T:
            """Makes one more try; a heartbeat comes before each but the first."""
            if tries.count and self.between_tries:
                self.between_tries(self._cursor())
            return work(self._cursor())
        return self._retry(attempt, tries)

    def run(self, statement: str, *values: object) -> int:
        """Changes one thing by one statement, which twice must do no harm.

        Returns how many rows it matched.
        """
        return self.read(lambda cursor: cursor.execute(statement, values))

    def rows(self, make: Callable[..., T], statement: str,
             *values: object) -> list[T]:
        """Returns what `make` makes of each row, given its columns in order."""
        return self.read(lambda cursor: cursor.rows(make, statement, *values))

    def records(self, make: Callable[..., T], statement: str,
                *values: object) -> list[T]:
        """Returns what `make` makes of each row, by the columns' names."""
        def work(cursor: Cursor) -> list[T]:
            return cursor.records(make, statement, *values)
        return self.read(work)

    def pairs(self, statement: str, *values: object) -> dict[Left, Right]:
        """Returns two columns as a dict from the first to the second."""
        def work(cursor: Cursor) -> dict[Left, Right]:
            return cursor.pairs(statement, *values)
        return self.read(work)

    def attempt(self, work: Callable[[Cursor], T]) -> T | None:
        """Tries once to do what may as well fail; returns None if it did."""
        try:
            return work(self._cursor())
        except Problem:
            return None
        except _Driver().MySQLError as error:
            if classify_error(error)[0] is not ErrorClass.BUG:
                self.close()
            return None

    def sleep(self, seconds: int, note: str) -> bool:
        """Sleeps in the server, as `note`; says whether KILL QUERY ended it."""
        statement = f"SELECT SLEEP({seconds}) /* {note} */"
        def work(cursor: Cursor) -> bool:
            """Returns True if the sleep was ended early."""
            try:
                # MySQL answers 1, MariaDB with an error.
                return bool(cursor.value(statement))
            except _Driver().OperationalError as error:
                if error.args[0] != QUERY_KILLED:
                    raise
                return True
        return self.read(work)

    def skip_locked(self, cursor: Cursor) -> str:
        """Returns SKIP LOCKED if the server knows it and heeds it, or ""."""
        if self._skip_locked is None:
            # Asked once a connection: the next one may go to another server.
            try:
                cursor.execute(
                    "SELECT 1 FROM queues LIMIT 1 FOR UPDATE SKIP LOCKED")
                self._skip_locked = "SKIP LOCKED"
            except _Driver().ProgrammingError:
                self._skip_locked = ""
            # TiDB takes the words, and does not skip.
            if "TiDB" in self.version:
                self._skip_locked = ""
        return self._skip_locked

    def lock_free(self, cursor: Cursor, make: Callable[..., T], statement: str,
                  keys: Sequence[object]) -> list[T]:
        """Locks what `statement` selects by `IN %s`, but for what others hold.

        Returns what `make` makes of the rows that are ours now. It never waits:
        without SKIP LOCKED it asks for one row after the other, NOWAIT.
        """
        if self.skip_locked(cursor):
            return cursor.rows(make, f"{statement} FOR UPDATE SKIP LOCKED", keys)
        free = []
        for key in keys:
            try:
                free += cursor.rows(make, f"{statement} FOR UPDATE NOWAIT", [key])
            except _Driver().OperationalError as error:
                # MariaDB says that it timed out, the others that it is held.
                if error.args[0] not in (LOCK_WAIT_TIMEOUT, LOCK_NOWAIT):
                    raise
        return free

    @property
    def mariadb(self) -> bool:
        return "MariaDB" in self.version

    def close(self) -> None:
        """Closes the connection; the next statement makes another."""
        session = self._session
        self._session = None
        self._skip_locked = None
        if session:
            _close_quietly(session.connection)

    def _cursor(self) -> Cursor:
        """Returns a cursor for statements that each commit by themselves."""
        session = self._ready_session()
        inner = session.connection.cursor()
        return Cursor(inner, session.packed_bytes, self.read_committed)

    def _ready_session(self) -> Session:
        """Returns the session; if there is none on the route's host, a new one.
        """
        if self._connector.target != self.target:
            self.close()
            self._connector = self._connector.towards(self.target)
        session = self._session
        # Another connection of this process may have left that host.
        if session and session.host != self.route.first:
            self.close()
            session = None
        if not session:
            session = self._connector.connect(self.policy, self.read_committed)
            self._session = session
            self.version = session.version
            self.packet_bytes = session.packet_bytes
        return session

    def _retry(self, attempt: Callable[[], T], tries: Tries) -> T:
        """Returns what `attempt` does, once it succeeds."""
        while True:
            try:
                result = attempt()
            except _Driver().MySQLError as error:
                self._on_failure(error, tries)
            except BaseException:
                # The next BEGIN would commit what was left half done. And after
                # Ctrl-C the answer that is on its way would be taken for the
                # next statement's.
                self.close()
                raise
            else:
                self._outage.ends(self.policy)
                return result

    def _on_failure(self, error: Exception, tries: Tries) -> None:
        """Cleans up after a failure; returns once it is time for another try.
        """
        error_class, code = classify_error(error)
        # An error that nobody foresaw ends a command. But after a COMMIT it
        # may stand, which must be looked for; and running jobs go on.
        unforeseen = (error_class is ErrorClass.BUG
                      and isinstance(error, _Driver().OperationalError))
        if unforeseen and (tries.unsure or self.policy.endless):
            error_class = ErrorClass.RECONNECT
        sent = 0
        if self._session:
            sent = self._session.wire.statement_bytes
        # A try that has not come to the work says nothing of its statements.
        if tries.begun:
            tries.waited(timed_out(error), sent)
        self._roll_back(error_class, code)
        if error_class is ErrorClass.ROW:
            raise RowRefused(code, str(error.args[-1])) from None
        tries.failed(error_class)
        # A password that was changed, say: perhaps we are to know it by now.
        if code in ACCOUNT_CODES and self.find_target:
            self.target = self.find_target() or self.target
        if _is_for_next_host(error, tries):
            self._connector.leave_host()
        self._back_off_or_raise(error_class, error, tries)

    def _roll_back(self, error_class: ErrorClass, code: int) -> None:
        """Leaves no half-open transaction behind."""
        if code == BINLOG_NEEDS_REPEATABLE_READ and self.read_committed:
            self.read_committed = False
            self.policy.say(
                "the server's binlog_format is STATEMENT: claims wait for "
                "each other; set it to ROW or MIXED")
        # After these the connection is well: keeping it is cheaper.
        keep = error_class in (ErrorClass.REPEAT, ErrorClass.ROW)
        if keep and self._session:
            try:
                self._session.connection.rollback()
                return
            except _Driver().MySQLError:
                pass  # the connection died too: it is thrown away below
        self.close()

    def _back_off_or_raise(self, error_class: ErrorClass, error: Exception,
                           tries: Tries) -> None:
        """Pauses before the next try, or raises what a person should read."""
        problem = explain_error(self.target, error)
        problem.sent = tries.unsure or tries.lost
        # No waiting mends a wrong password, or a mere guess of an address.
        guessed = not self.target.explicit and _refused(error)
        hopeless = error_class is ErrorClass.SETUP or guessed
        # The same again would fail again, for a worker as well.
        if error_class is ErrorClass.BUG:
            raise problem from error
        pause_s = _pause_s(error_class, tries.count, self.policy.timeout_s)
        waited_s = time.monotonic() - tries.since
        if hopeless and not self.policy.endless:
            raise problem
        if waited_s + pause_s > self.policy.retry_for_s:
            raise problem
        # Others that hold locks are no outage.
        if error_class is not ErrorClass.REPEAT:
            self._outage.goes_on(self.policy, problem.what)
        time.sleep(pause_s)

# -- the tables

def schema_of(row: object, database: str) -> int:
    """Returns the schema that a version row tells of.

    It raises a Problem for tables newer than we may write, or of no queue.
    """
    words = str(row).split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        what = (f"the database {database} has a config table without queuectl's "
                "schema version: it is not a queue")
        hint = "name another database in DB_NAME"
        raise Problem(what, hint, UNAVAILABLE)
    version, oldest_writer = map(int, words)
    # A newer schema may still let this program write.
    if oldest_writer > SCHEMA_VERSION:
        what = (f"the tables in {database} are of schema {version}, newer than "
                f"this program ({VERSION}, schema {SCHEMA_VERSION})")
        hint = "install the newer queuectl.py on this host"
        raise Problem(what, hint, UNAVAILABLE)
    return version

def check_schema(row: object, database: str) -> None:
    """Raises a Problem for tables that this program does not know."""
    version = schema_of(row, database)
    if version < SCHEMA_VERSION:
        what = (f"the tables in {database} are of schema {version}, older than "
                f"this program needs ({SCHEMA_VERSION})")
        raise Problem(what, "run: queuectl db init", UNAVAILABLE)

# MySQL before this one has no default that is an expression, and so no column
# whose default is the time in UTC.
OLDEST_MYSQL = [8, 0, 13]
OLDEST_MARIADB = [10, 6]

def release_of(version: str) -> list[int]:
    """Returns the numbers that a server's version begins with."""
    digits = re.findall(r"\d+", version)
    return [int(part) for part in digits[:3]]

def check_server(version: str) -> None:
    """Raises a Problem for a MySQL that cannot have our tables."""
    # Others give the number of the MySQL that they resemble.
    mysql = not re.search("MariaDB|TiDB|Vitess|aurora", version)
    if mysql and release_of(version) < OLDEST_MYSQL:
        what = (f"the server is MySQL {excerpt(version)}, which cannot have "
                "queuectl's tables (a default that is an expression): nothing "
                "was changed")
        hint = "use MySQL from 8.0.13 on, or MariaDB from 10.6 on"
        raise Problem(what, hint, UNAVAILABLE)

def init_database(target: ConnectionInfo) -> str:
    """Creates or upgrades the database and its tables; says what was done.

    Refused, with nothing changed: a server that is too old, tables newer than
    this program, and a `jobs` table that is not ours. Two at once wait for each
    other by a named lock.
    """
    def work(cursor: Cursor) -> str:
        """Returns what was done, as a sentence."""
        check_server(database.version)
        _enter_database(cursor, target.database)
        lock = f"queuectl:{target.database}"[:64]
        if not cursor.value("SELECT GET_LOCK(%s, 10)", lock):
            what = "another queuectl db init is at work"
            raise Problem(what, "try again soon")
        # While we wait for a long transaction all others wait for us.
        cursor.execute("SET SESSION lock_wait_timeout = 1")
        found = _existing_schema(cursor, target.database)
        if found <= SCHEMA_VERSION:
            _upgrade(cursor, found)
        if not found:
            done = f"{SCHEMA_VERSION} created"
        elif found >= SCHEMA_VERSION:
            done = f"{found} is there already"
        else:
            done = f"{found} upgraded to {SCHEMA_VERSION}"
        return f"schema {done} in {target}"
    # Closing lets the lock go.
    with contextlib.closing(Database(target, UPGRADING, bare=True)) as database:
        return database.read(work)

def _enter_database(cursor: Cursor, database: str) -> None:
    """Enters the database, and creates it first where there is none."""
    # CREATE DATABASE needs a right that the account may lack, also where there
    # is nothing left to create.
    there = cursor.value(
        "SELECT COUNT(*) FROM information_schema.schemata "
        "WHERE schema_name = %s", database)
    name = quote_name(database)
    if not there:
        cursor.execute(
            f"CREATE DATABASE IF NOT EXISTS {name} "
            "DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    cursor.execute(f"USE {name}")

def _existing_schema(cursor: Cursor, database: str) -> int:
    """Returns the schema; 0 if there is none, or its making broke off."""
    tables = cursor.rows(
        str, "SELECT table_name FROM information_schema.tables "
        "WHERE table_schema = %s", database)
    if "config" in tables:
        version = cursor.value(SCHEMA_ROW)
        # A making that broke off may leave an empty config table alone.
        ours = version is not None or "jobs" in tables
        if ours or cursor.rows(str, "SELECT value FROM config LIMIT 1"):
            return schema_of(version, database)
    elif "jobs" in tables:
        what = (f"{database} has a jobs table that is not queuectl's: nothing "
                "was changed")
        hint = "name another database in DB_NAME"
        raise Problem(what, hint, UNAVAILABLE)
    return 0

def _upgrade(cursor: Cursor, found: int) -> None:
    """Adds what is missing; broken off, it is done again from its beginning."""
    for statement in schema_statements():
        cursor.execute(statement)
    for step in UPGRADES:
        there = cursor.rows(
            str, """
            SELECT 1 FROM information_schema.columns
             WHERE table_schema = DATABASE()
               AND (table_name, column_name) = (%s, %s)
             UNION ALL
            SELECT 1 FROM information_schema.statistics
             WHERE table_schema = DATABASE()
               AND (table_name, index_name) = (%s, %s)
            """, *step.adds, *step.adds)
        if found < step.to and not there:
            cursor.execute(step.statement)
    # The version comes last: until it stands, the upgrade is not done.
    cursor.execute(
        "UPDATE config SET value = %s WHERE `key` = 'schema_version'",
        (f"{SCHEMA_VERSION}/{OLDEST_WRITER}",))


# ---- job model ---------------------------------------------------------------
#
# What a job may say, and how its row looks to us. Whatever a person or a
# program hands in is checked here, key by key, before anything is stored;
# whatever is read becomes a record whose fields make the SELECT list. Nothing
# here asks the database.

COMMAND_BYTES_MAX = 131000  # the kernel takes 131,071 bytes in one argument
# Nor does it take more in one variable, as NAME=VALUE. All of a program's
# arguments and variables may have 2 MiB, where the stack may grow to the usual
# 8 MiB: of that the command and what the worker was started with get half.
VARIABLE_BYTES_MAX = COMMAND_BYTES_MAX
ENV_BYTES_MAX = 1_000_000
# What a variable costs beyond its name and value: a sign, a NUL, a pointer.
VARIABLE_COST = 10
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
    total = 0
    for name, value in found.items():
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(text)
        if not re.fullmatch(r"[^=\0]+", name):
            raise ValueError(text)
        # A lone surrogate cannot be encoded, which is a ValueError too.
        size = len(f"{name}={value}".encode())
        total += size + VARIABLE_COST
        if size > VARIABLE_BYTES_MAX:
            raise _too_large(f"the variable {excerpt(name)}", size,
                             VARIABLE_BYTES_MAX)
    if total > ENV_BYTES_MAX:
        raise _too_large("all the variables", total, ENV_BYTES_MAX)
    # Canonical, since it is signed.
    return json.dumps(found, sort_keys=True, separators=(",", ":"),
                      ensure_ascii=False)

def _too_large(what: str, size: int, most: int) -> Problem:
    """Returns what to say of an `env` that no program could be started with."""
    return Problem(
        f"env: {what} would take {size:,} bytes, of at most {most:,}",
        "put it into a file, and give the job the file's path", USAGE)

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

class OutputPiece(NamedTuple):
    """Some of a run's output, and how much is missing before it."""
    data: bytes
    left_out: int = 0  # bytes of the middle that were not kept

def output_since(kept: bytes, total: int, seen: int) -> list[OutputPiece]:
    """Returns what follows the first `seen` bytes of a stream of `total`
    bytes.

    `kept` is what OutputBuffer.kept left of the stream. Let it be `abcde`, the
    cut mark and `vwxyz`, of 26 letters: who has seen 3 gets `de`, and `vwxyz`
    with 16 left out before it; who has seen 23 gets `xyz`, for those are in
    the part after the mark.
    """
    if total <= seen:
        return []
    head, mark, tail = kept.partition(cut_mark(total))
    new = total - seen
    if not mark:
        return [OutputPiece(head[-new:])]
    if new <= len(tail):
        return [OutputPiece(tail[-new:])]
    read = max(seen, len(head))
    left_out = total - len(tail) - read
    return [OutputPiece(head[seen:]), OutputPiece(tail, left_out)]

def without_output(outcome: RunOutcome, why: str) -> RunOutcome:
    """Returns the outcome of a run whose output cannot be stored.

    Its detail says so, in ASCII, which no server refuses.
    """
    detail = f"{outcome.detail}; output not stored: {why}".lstrip("; ")
    detail = detail.encode("ascii", "replace").decode()
    return dataclasses.replace(outcome, output=b"", to_follow=b"", detail=detail)

def last_line(outcome: RunOutcome) -> str | None:
    """Returns the last line that says something, for the dead letter.

    A NUL is left out: the command for a failure is told the line in its
    environment, which can hold none.
    """
    tail = outcome.output[-4096:].replace(b"\0", b"")
    text = tail.decode("utf-8", "replace").strip()
    line = text.split("\n")[-1].strip() or outcome.detail.replace("\0", "")
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
# The one writer of `jobs.state`, but for a job's first, which enqueue INSERTs. A
# move names its transition, and its WHERE is built from TRANSITIONS: the states
# that it may leave and, for a run, the token: random, and one for all jobs of a
# turn, so that (seq, token) names a run. So a worker that lost a run changes
# nothing, whatever it believes; and where the answer to a COMMIT is lost,
# `TurnTaker._verify_turn` looks whether it stands.
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
    where it needs one, does not carry one of `tokens`. These are not matched
    with `seqs` one to one: who moves several runs has locked their rows, and
    compared seq and token of each. `columns` are set along, from the row as it
    was: the state itself is written last.
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

def settle(cursor: Cursor, packet_bytes: int, settlements: Sequence[Settlement],
           resolves: bool = True) -> Resolution:
    """Writes what became of ended runs, whose rows we have locked.

    What waits for them is resolved as well; of many, the first. The rest is
    returned, for a DependentsResolver; without `resolves` that is all of it.

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
    parents = [one.claim.seq for one in settlements
               if one.claim.has_children and one.to in ENDED]
    waiting = dependents_of(parents)
    if not resolves:
        return Resolution(left=waiting)
    return release_children(cursor, waiting)

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
            detail[:DETAIL_MAX] or None,
            _output_to_store(outcome, packet_bytes) or None,
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

def _output_to_store(outcome: RunOutcome, packet_bytes: int) -> bytes:
    """Returns what is stored of a run's output: what followers need, if it fits."""
    # Its bytes are sent as hexadecimal digits, two for each; the rest of the
    # row and of the statement is small.
    fits = 2 * len(outcome.to_follow) + 65536 <= packet_bytes
    if outcome.to_follow and fits:
        return outcome.to_follow
    return outcome.output

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

    A job that somebody's own UPDATE brought back may have one of before: it is
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

# So many dependents are resolved in one transaction. More would hold their rows
# for seconds, and everybody who wants one of them would wait.
DEPENDENTS_AT_ONCE = 500
# A generation down a chain counts as so many: each takes some round trips.
GENERATION_COST = 10

class BlockedJob(NamedTuple):
    """A blocked job: how many of its parents it waits for, and which are hopeless."""
    seq: int
    id: str
    unmet: int
    hopeless: int
    why: str | None  # which parent will never end as it should
    later: bool  # it has a later time of its own

class Dependency(NamedTuple):
    """One job that waits for another, by their seqs."""
    parent: int
    child: int

class Dependents(NamedTuple):
    """What waits for some ended jobs, as far as it is yet to be resolved."""
    parents: Sequence[int]  # ascending
    after: int = 0  # of the first one's children only those behind this one

    def first(self, cursor: Cursor, most: int) -> list[Dependency]:
        """Returns the first of them, in the order of the index."""
        parent, *others = self.parents
        condition, values = "(parent = %s AND child > %s)", [parent, self.after]
        if others:
            condition += f" OR parent IN ({placeholders(others)})"
            values += others
        return cursor.records(
            Dependency,
            "SELECT parent, child FROM dependencies FORCE INDEX (PRIMARY) "
            f"WHERE {condition} ORDER BY parent, child LIMIT {most} {cursor.share}",
            *values)

    def behind(self, last: Dependency) -> Dependents:
        """Returns those that come after `last`."""
        parents = [seq for seq in self.parents if seq >= last.parent]
        return Dependents(parents, last.child)

@dataclass(frozen=True)
class Resolution:
    """What came of dependents: who died, and what one transaction has left."""
    died: Sequence[BlockedJob] = ()
    left: Sequence[Dependents] = ()
    held: Collection[int] = ()  # blocked jobs whose rows others hold

def dependents_of(ended: Collection[int]) -> list[Dependents]:
    return [Dependents(sorted(ended))] if ended else []

def release_children(cursor: Cursor, waiting: Sequence[Dependents]) -> Resolution:
    """Has what waits for ended jobs run, or die with them, down the chain.

    It resolves some, and returns what it has left: the caller goes on with
    that, or a DependentsResolver does after the COMMIT.
    """
    left, died = list(waiting), list[BlockedJob]()
    room = DEPENDENTS_AT_ONCE
    while left and room > 0:
        one = left.pop(0)
        found = one.first(cursor, room)
        dead = resolve_blocked(cursor, sorted({edge.child for edge in found}))
        if len(found) == room:
            left.insert(0, one.behind(found[-1]))
        left += dependents_of([job.seq for job in dead])
        died += dead
        room -= len(found) + GENERATION_COST
    return Resolution(died, left)

def resolve_blocked(cursor: Cursor, seqs: Sequence[int]) -> list[BlockedJob]:
    """Releases blocked jobs that wait for nothing more; those that never can
    run die.

    Returns the latter. The children are written before their
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
        SELECT child AS seq, MIN(jobs.id) AS id, SUM(NOT {MET_SQL}) AS unmet,
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
    return [job for job in found if job.hopeless]

DEATH_NOTES_MAX = 20

def death_notes(died: Sequence[BlockedJob]) -> list[str]:
    """Returns what the log is to say of jobs that died with what they waited for.

    Those that waited for the same job share a line, and a long chain is cut.
    """
    by_cause: dict[str, list[str]] = {}
    for job in died:
        by_cause.setdefault(str(job.why), []).append(job.id)
    notes = []
    for why, ids in itertools.islice(by_cause.items(), DEATH_NOTES_MAX):
        jobs = "job" if len(ids) == 1 else "jobs"
        notes.append(f"{jobs} {abbreviated(ids)}: {why}: dead")
    more = sum(map(len, by_cause.values())) - sum(
        len(ids) for ids in itertools.islice(by_cause.values(), DEATH_NOTES_MAX))
    if more:
        notes.append(f"and {more} more jobs that waited for these: dead")
    return notes

# How long the database thread may be at this in one turn: results wait for it.
RESOLVED_WITHIN_S = 0.5
# How often it is tried to get blocked jobs whose rows others hold.
HELD_PAUSE_S = 1.0

class DependentsResolver:
    """Resolves what the settlement of many dependents' parents has left.

    It goes batch by batch, each in a transaction of its own, and never waits
    for a row that others hold: it comes back to that. Should it be cut short,
    the blocked jobs that are looked at now and then are the net.
    """
    def __init__(self, database: Database) -> None:
        """Has nothing to resolve yet."""
        self._database = database
        self._left: list[Dependents] = []
        # Blocked jobs by themselves: others held their rows, or the net found
        # that they wait for nothing more.
        self._blocked: set[int] = set()
        self._blocked_at = 0.0  # when to try these next
        self._died: list[BlockedJob] = []  # and was not told of yet

    @property
    def goes_on(self) -> bool:
        """Whether there is more that can be done at once."""
        return bool(self._left)

    def add(self, resolution: Resolution) -> None:
        """Takes on what a committed transaction has left."""
        self._died += resolution.died
        self._left += resolution.left
        self._blocked |= set(resolution.held)

    def add_blocked(self, seqs: Collection[int]) -> None:
        """Takes on blocked jobs that wait for nothing more, or in vain."""
        self._blocked |= set(seqs)
        self._blocked_at = 0.0

    def run(self, longest_s: float) -> list[BlockedJob]:
        """Resolves batch by batch for so long.

        Returns which jobs have died since it was last called.
        """
        until = time.monotonic() + longest_s
        if self._blocked and time.monotonic() >= self._blocked_at:
            blocked, self._blocked = sorted(self._blocked), set()
            for seqs in batched(blocked, DEPENDENTS_AT_ONCE):
                self._resolve(seqs)
            self._blocked_at = time.monotonic() + HELD_PAUSE_S
        while self._left and time.monotonic() < until:
            self._resolve_next(self._left.pop(0))
        died, self._died = self._died, []
        return died

    def _resolve_next(self, dependents: Dependents) -> None:
        """Resolves the first of these; what is behind them is left."""
        found = self._database.read(
            lambda cursor: dependents.first(cursor, DEPENDENTS_AT_ONCE))
        if len(found) == DEPENDENTS_AT_ONCE:
            self._left.insert(0, dependents.behind(found[-1]))
        self._resolve(sorted({edge.child for edge in found}))

    def _resolve(self, seqs: Sequence[int]) -> None:
        """Resolves those of these jobs that nobody holds.

        A job whose row the server refuses is found by halves, and set aside.
        """
        if not seqs:
            return
        try:
            self.add(self._database.transact(
                lambda cursor: self._resolve_free(cursor, seqs)))
        except RowRefused:
            if len(seqs) == 1:
                refuse(self._database, seqs[0], None)
                return
            middle = len(seqs) // 2
            self._resolve(seqs[:middle])
            self._resolve(seqs[middle:])

    def _resolve_free(self, cursor: Cursor, seqs: Sequence[int]) -> Resolution:
        """Does it in one transaction: found without a lock, then locked by key."""
        blocked = "FROM jobs FORCE INDEX (PRIMARY) WHERE state = 'blocked'"
        found = cursor.rows(int, f"SELECT seq {blocked} AND seq IN %s", seqs)
        if not found:
            return Resolution()
        free = self._database.lock_free(
            cursor, int, f"SELECT seq {blocked} AND seq IN %s", found)
        died = resolve_blocked(cursor, sorted(free))
        return Resolution(died, dependents_of([job.seq for job in died]),
                          set(found) - set(free))

def refuse(database: Database, seq: int, token: str | None) -> bool:
    """Sets a job aside whose row the server refuses to write: it is dead.

    `token` is that of its run, None: it has none. Returns False where the
    server refuses even this. The dead letter is written where it is taken.
    """
    name = "refuse unrun" if token is None else "refuse"
    def set_aside(cursor: Cursor) -> None:
        move(cursor, name, [seq], tokens=[token or ""], token=None,
             reason=Reason.REFUSED, next_run_at=NOT_LATER_SQL, finished_at=NOW_SQL)
    def tell_others(cursor: Cursor) -> None:
        """Writes what follows from its death; of many dependents the first."""
        died = "SELECT 1 FROM jobs WHERE seq = %s AND state = 'dead' AND reason = %s"
        if not cursor.rows(int, died, seq, Reason.REFUSED):
            return
        write_dead_letters(cursor, {seq: None})
        release_children(cursor, dependents_of([seq]))
    def work(cursor: Cursor) -> None:
        set_aside(cursor)
        tell_others(cursor)
    # Without its letter a job is in no list of the dead, and dead all the same.
    for least in (work, set_aside):
        with contextlib.suppress(RowRefused):
            database.transact(least)
            return True
    return False


# ---- enqueue -----------------------------------------------------------------
#
# A job's way into the table. Whatever was checked is spooled to disk first, so
# a million jobs take no memory, and is then committed in one transaction: all
# of it, or nothing. A job has its id before it is sent: after a COMMIT whose
# answer was lost its row can be looked for, and whoever enqueued it can repeat
# it under the same id. Nothing here claims a job, or wakes a worker.

# A huge enqueue stays uncommitted for seconds, and each claim would have to
# come by its rows. So from this many jobs on they are staged: they go in as
# `blocked`, where no claim looks, and are made pending after the COMMIT. A row
# of `config`, whose key is STAGED and the batch, tells the workers of them: if
# whoever enqueued them dies, a worker releases the rest.
STAGED = "staged "
STAGED_FROM = 200_000
RELEASED_AT_ONCE = 2000
# From this many jobs on the next INSERT is made while the last one is sent.
PREFETCHED_FROM = 1000

# The keys that a job names, in their order.
Shape = Tuple[str, ...]

class RowTemplate(NamedTuple):
    """How jobs that name the same keys are written."""
    text: str  # one row of VALUES
    order: list[int]  # which of the job's values are bound into it

class Spool:
    """Checked jobs on disk: a million of them take no memory.

    A line holds the number of a job's shape, and the job's values.
    """
    def __init__(self) -> None:
        """Opens a file that has no name, and so vanishes with this process."""
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._count = 0
        self._shapes: dict[Shape, int] = {}
        self.columns: list[str] = []  # those that any of the jobs names
        self.first_id = ""
        self.linked = False  # whether some wait for others
        self.queues: set[str] = set()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, object]]:
        for shape, values in self._read():
            yield dict(zip(shape, values))

    def _read(self) -> Iterator[tuple[Shape, list[object]]]:
        """Yields each job's shape and values, in the order they came in."""
        shapes = list(self._shapes)
        self._file.seek(0)
        for line in self._file:
            number, *values = json.loads(line)
            shape = shapes[number]
            yield shape, values

    def add(self, values: JobValues) -> None:
        """Spools one checked job, signed if this user has a signing key."""
        if signing_key():
            parts = [values.get(name) for name in SIGNED]
            signature = sign(*parts)
            values = {**values, "signature": signature}
        shape = tuple(values)
        if shape not in self._shapes:
            self._add_shape(shape)
        number = self._shapes[shape]
        line = json.dumps([number, *values.values()])
        self._file.write(line + "\n")
        self._count += 1
        if not self.first_id:
            self.first_id = str(values["id"])
        queue_name = values.get("queue", "default")
        self.queues.add(str(queue_name))

    def _add_shape(self, shape: Shape) -> None:
        """Numbers a new shape, and notes which columns it asks for."""
        number = len(self._shapes)
        self._shapes[shape] = number
        for name in shape:
            column = COLUMN_OF.get(name, name)
            if name in NEEDS:
                self.linked = True
            elif column not in self.columns:
                self.columns.append(column)

    def columns_with(self, staged: Mapping[str, str]) -> list[str]:
        """Returns the columns of the INSERT: the jobs' own, and `staged`."""
        columns = list(self.columns)
        for column in staged:
            if column not in columns:
                columns.append(column)
        return columns

    def rows(self, batch: str,
             staged: Mapping[str, str]) -> Iterator[tuple[str, list[object]]]:
        """Yields each job as a row of VALUES, and what is bound into that.

        A job that would be pending gets the SQL values of `staged` instead.
        """
        columns = self.columns_with(staged)
        templates: dict[Shape, RowTemplate] = {}
        for shape, values in self._read():
            template = templates.get(shape)
            if template is None:
                template = _row_template(shape, columns, batch, staged)
                templates[shape] = template
            bound = [values[at] for at in template.order]
            yield template.text, bound

def _row_template(shape: Shape, columns: Sequence[str], batch: str,
                  staged: Mapping[str, str]) -> RowTemplate:
    """Returns how jobs of this shape are written into these columns."""
    position: dict[str, int] = {}
    for at, name in enumerate(shape):
        # What a job waits for is no column: it becomes rows of its own.
        if name not in NEEDS:
            column = COLUMN_OF.get(name, name)
            position[column] = at
    # Whoever names a state is scheduled or blocked, and stays it: no claim
    # comes by such a row anyway.
    others = {} if "state" in position else staged
    parts: list[str] = []
    order: list[int] = []
    for column in columns:
        if column in position:
            at = position[column]
            part = EXPRESSIONS.get(shape[at], "%s")
            order.append(at)
        else:
            # Another job of the spool names it.
            part = others.get(column, "DEFAULT")
        parts.append(part)
    parts.append(f"'{batch}'")
    row = ", ".join(parts)
    return RowTemplate(f"({row})", order)

# -- lines of a file

def spool_lines(file: Iterable[bytes], as_json: bool,
                defaults: JobValues) -> Spool:
    """Spools every line of `file` as a job: its JSON, or else its command.

    A bad line is a Problem that names its number; empty ones are passed over.
    """
    spool = Spool()
    plain: JobValues = {}
    if not as_json:
        # Such jobs differ by id and command alone: the rest is completed once.
        plain = complete_job({"command": ""}, defaults)
    for position, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        # What Windows has saved may begin with a byte order mark.
        encoding = "utf-8-sig" if position == 1 else "utf-8"
        try:
            line = raw.decode(encoding).rstrip("\r\n")
            if as_json:
                job = check_job(parse_json(line), defaults)
            else:
                job = _job_of_line(line, plain, defaults)
            spool.add(job)
        except UnicodeDecodeError:
            raise Problem(
                f"line {position}: not UTF-8; nothing was enqueued",
                status=USAGE) from None
        except Problem as problem:
            raise Problem(
                f"line {position}: {problem.what}; nothing was enqueued",
                problem.hint,
                USAGE) from None
    return spool

def _job_of_line(line: str, plain: JobValues,
                 defaults: JobValues) -> dict[str, object]:
    """Returns the job whose command is this line, else as in `plain`."""
    kind = JOB_KEYS["command"].kind
    command = kind.read(line, "command")
    job_id = defaults.get("id") or new_id()
    return {**plain, "id": job_id, "command": command}

# -- into the table

class Batch:
    """One spool's jobs on their way into the table.

    Their rows carry the batch, a random text that no other enqueue has. It
    tells our rows from others with the same ids: after a COMMIT whose answer
    was lost, and where --if-absent passes over jobs that were there before.
    """
    def __init__(self, spool: Spool, if_absent: bool) -> None:
        """Names the batch, and decides whether it is staged."""
        self.spool = spool
        self.if_absent = if_absent
        self.name = secrets.token_hex(8)
        # Staged rows are found again by this next_run_at, which is indexed. It
        # lies so far ahead that nobody takes them for due; its microseconds
        # tell batches apart that are staged at the same time.
        number = int(self.name, 16)
        microseconds = number % 10**6
        self.moment = f"9000-01-01 00:00:00.{microseconds:06}"
        self.staged: dict[str, str] = {}  # columns, with their SQL values
        if len(spool) > STAGED_FROM:
            self.staged["state"] = f"'{State.BLOCKED}'"
            self.staged["next_run_at"] = f"'{self.moment}'"

    def insert(self, cursor: Cursor, packet_bytes: int) -> dict[str, str]:
        """Inserts the jobs.

        Returns, with if_absent, the ids of those whose unique key another job
        has, each with the id of that job.
        """
        inserts = self._inserts(cursor, packet_bytes)
        if len(self.spool) > PREFETCHED_FROM:
            inserts = prefetch(inserts)
        for statement in inserts:
            cursor.execute(statement)
        if self.staged:
            # With if_absent the whole may be done twice.
            cursor.execute(
                "INSERT INTO config (`key`, value) VALUES (%s, %s) "
                "ON DUPLICATE KEY UPDATE value = VALUES(value)",
                (STAGED + self.name, self.moment))
        if self.spool.linked:
            add_dependencies(cursor, self.spool, self.name)
        if self.if_absent:
            return dict(key_holders(cursor, self.spool))
        return {}

    def _inserts(self, cursor: Cursor, packet_bytes: int) -> Iterator[str]:
        """Yields the INSERTs, each of a quarter packet at most."""
        columns = self.spool.columns_with(self.staged)
        head = f"INSERT INTO jobs ({', '.join(columns)}, batch) VALUES"
        tail = ""
        if self.if_absent:
            # A row that is there stays as it is.
            tail = "ON DUPLICATE KEY UPDATE batch = jobs.batch"
        rows = self.spool.rows(self.name, self.staged)
        return batched_inserts(cursor, packet_bytes, head, rows, tail)

    def verify(self, cursor: Cursor) -> dict[str, str] | None:
        """Returns what `insert` returned, if the batch is there; else None."""
        # One row stands for all, for they were committed together. It is
        # locked: a COMMIT that is still under way has to end first.
        ours = cursor.value(
            "SELECT seq FROM jobs WHERE id = %s AND batch = %s FOR UPDATE",
            self.spool.first_id, self.name)
        return {} if ours else None

    def release(self, cursor: Cursor) -> int:
        """Makes some of the jobs pending; returns how many, at the end 0."""
        key = STAGED + self.name
        return release_staged(cursor, key, self.moment)

def enqueue(database: Database, spool: Spool,
            if_absent: bool) -> dict[str, str]:
    """Commits all jobs of the spool, or none.

    `if_absent` passes over ids and unique keys that are in use. Returned is,
    for each job that was passed over for its unique key, its id with the id of
    the job that has the key. A job that is refused is a Problem.
    """
    batch = Batch(spool, if_absent)
    def work(cursor: Cursor) -> dict[str, str]:
        # How much a packet may hold is known once there is a connection.
        return batch.insert(cursor, database.packet_bytes)
    # With if_absent the work may as well be done twice: the second time
    # passes over the rows of the first.
    verify = None if if_absent else batch.verify
    try:
        holders = database.transact(work, verify)
    except Unreachable as problem:
        if problem.sent:
            problem.hint = _unknown_whether_accepted(spool)
        raise
    except RowRefused as refused:
        raise _explain_refusal(database, refused, spool) from None
    if batch.staged:
        # The jobs are accepted: if this fails, the workers do the rest.
        with contextlib.suppress(Problem):
            while database.transact(batch.release):
                pass
    return holders

def prefetch(items: Iterator[str]) -> Iterator[str]:
    """Yields the same texts, each made by a thread while the last one is used.

    So an INSERT is put together while the server works on the one before it:
    one costs about as much as the other. An empty text would be taken for the
    end.
    """
    # It takes milliseconds to load, which a small enqueue need not spend.
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, items, "")
        while True:
            item = coming.result()
            if not item:
                return
            coming = maker.submit(next, items, "")
            yield item

def key_holders(cursor: Cursor, spool: Spool) -> Iterator[tuple[str, str]]:
    """Yields each job whose unique key another has: its id, and the other's."""
    for page in batched(_unique_keys(spool)):
        # live_key is the unique key of a job that has not ended.
        keys = [key for key, _ in page]
        holders: dict[str, str] = cursor.pairs(
            "SELECT live_key, id FROM jobs WHERE live_key IN %s", keys)
        for key, job_id in page:
            holder = holders.get(key, job_id)
            if holder != job_id:
                yield job_id, holder

def _unique_keys(spool: Spool) -> Iterator[tuple[str, str]]:
    for job in spool:
        if "unique" in job:
            yield str(job["unique"]), str(job["id"])

def release_staged(cursor: Cursor, key: str, moment: str) -> int:
    """Makes some jobs of a staged batch pending; returns how many.

    0: there were none left, and the row of `config` that told of them is gone.
    It takes few at a time, for it locks them against the claims; enqueuer and
    workers may release the same batch at once.
    """
    seqs = cursor.rows(
        int,
        f"""
        SELECT seq FROM jobs FORCE INDEX (jobs_due)
         WHERE state = 'blocked' AND next_run_at = %s
         ORDER BY seq
         LIMIT {RELEASED_AT_ONCE}
           FOR UPDATE
        """, moment)
    if seqs:
        return move(cursor, "release", seqs, next_run_at=Sql("created_at"))
    cursor.execute("DELETE FROM config WHERE `key` = %s", (key,))
    return 0

# -- what may go wrong

DUPLICATE_ENTRY = 1062  # the server's code for a key that is there already

def _unknown_whether_accepted(spool: Spool) -> str:
    """Returns the hint where a COMMIT was sent and not answered."""
    jobs = f"id {spool.first_id}"
    others = len(spool) - 1
    if others:
        jobs += f" and {others} more"
    return f"unknown whether accepted: {jobs}; repeat with --if-absent"

def _explain_refusal(database: Database, refused: RowRefused,
                     spool: Spool) -> Problem:
    """Returns what to tell of a row that the server did not take."""
    # The server's text alone says which value it was, and of which index.
    taken = re.search(r"Duplicate entry '(.*)' for key", refused.text)
    if refused.code != DUPLICATE_ENTRY or not taken:
        return Problem(f"the server refused a job: {refused.text}",
                       "nothing was enqueued", USAGE)
    entry = taken[1]
    if "jobs_live_key" in refused.text:
        what = _who_holds_key(database, entry, spool)
    else:
        what = _who_has_id(database, entry)
    return Problem(
        what,
        "nothing was enqueued; --if-absent passes over ids and keys in use")

def _who_holds_key(database: Database, key: str, spool: Spool) -> str:
    """Says which job has the first key of the spool that is in use."""
    def find(cursor: Cursor) -> dict[str, str]:
        return dict(key_holders(cursor, spool))
    holders = database.read(find)
    for job in spool:
        job_id = str(job["id"])
        holder = holders.get(job_id)
        if holder:
            return f"key {job['unique']} is held by job {holder}"
    return f"key {key} stands twice in the input"

def _who_has_id(database: Database, job_id: str) -> str:
    """Says what has this id: a job, or another one of the same input."""
    states = database.rows(str, "SELECT state FROM jobs WHERE id = %s", job_id)
    who = "it stands twice in the input"
    if states:
        who = f"a {states[0]} job has it"
    return f"id {job_id} is taken: {who}"

# -- jobs that wait for others

class Edge(NamedTuple):
    """One job that waits for another: their ids, and what it needs of it."""
    child: str
    parent: str
    needs: str

def _edges(spool: Spool) -> Iterator[Edge]:
    """Yields what the spool's jobs wait for."""
    for job in spool:
        child = str(job["id"])
        for key, needs in NEEDS.items():
            parents = as_list(job.get(key))
            for parent in parents:
                yield Edge(child, str(parent), needs)

def add_dependencies(cursor: Cursor, spool: Spool, batch: str) -> None:
    """Enters what the spool's jobs wait for; releases what need not wait.

    From here to the COMMIT the parents' rows are locked, and marked as having
    children: whoever settles a parent has either done so before that, and we
    see its end; or it does so later, and sees the mark.
    """
    for page in batched(_edges(spool)):
        _add_edges(cursor, page, batch)
    for ids in batched(_waiting_ids(spool)):
        seqs = cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_id) "
            "WHERE batch = %s AND id IN %s", batch, ids)
        # A parent may have ended long ago, and so may never settle again.
        died = resolve_blocked(cursor, seqs)
        left: Sequence[Dependents] = dependents_of([job.seq for job in died])
        while left:
            left = release_children(cursor, left).left

def _waiting_ids(spool: Spool) -> Iterator[str]:
    for job in spool:
        if any(job.get(key) for key in NEEDS):
            yield str(job["id"])

def _add_edges(cursor: Cursor, page: Sequence[Edge], batch: str) -> None:
    """Writes these edges; one to a job that is not older is a Problem."""
    child_ids = [edge.child for edge in page]
    parent_ids = [edge.parent for edge in page]
    children = _lock_ids(cursor, f"batch = '{batch}' AND", child_ids)
    parents = _lock_ids(cursor, "", parent_ids)
    rows = _edge_rows(page, children, parents)
    if not rows:
        return
    marked = [parent for parent, _, _ in rows]
    cursor.defer(
        "UPDATE jobs FORCE INDEX (PRIMARY) SET has_children = 1 "
        "WHERE seq IN %s", [marked])
    # A job may name a parent in both ways, and the stricter one is read last:
    # that is the one to stay.
    cursor.defer(
        "INSERT INTO dependencies (parent, child, needs) "
        f"VALUES {placeholders(rows)} "
        "ON DUPLICATE KEY UPDATE needs = VALUES(needs)", rows)

def _edge_rows(page: Sequence[Edge], children: Mapping[str, int],
               parents: Mapping[str, int]) -> list[tuple[int, int, str]]:
    """Returns these edges as rows of `dependencies`."""
    rows = []
    for edge in page:
        child = children.get(edge.child)
        if child is None:
            # It was there already, and --if-absent leaves it as it is.
            continue
        parent = parents.get(edge.parent)
        # Since a parent's row is the older one, no cycle can be made.
        if parent is None or parent >= child:
            raise Problem(
                f"job {edge.child} cannot wait for {edge.parent}: there is no "
                "such job before it",
                "a finished one may have been purged; nothing was enqueued",
                USAGE)
        rows.append((parent, child, edge.needs))
    return rows

def _lock_ids(cursor: Cursor, only: str,
              ids: Sequence[str]) -> dict[str, int]:
    """Locks the jobs of these ids, and returns their seqs.

    They are locked in the order of seq, as everywhere: two who lock the same
    rows then meet at the first of them, and not crosswise.
    """
    found: dict[str, int] = cursor.pairs(
        f"""
        SELECT id, seq FROM jobs FORCE INDEX (jobs_id)
         WHERE {only} id IN %s
         ORDER BY seq
           FOR UPDATE
        """, ids)
    return found


# ---- claim -------------------------------------------------------------------
#
# Taking pending jobs for one worker: how much of each queue may run, marking
# rows with a fresh token, and reading back after COMMIT which of them really
# carry it. Only those may start: that holds even where SKIP LOCKED locks
# nothing. SKIP LOCKED is for speed. So a claim starts at most once. After a loss
# the next run may overlap the old one, if its worker lives on unreachable: that
# ends its runs when it hears of it. A worker that stood still between a claim
# and a start hands back instead: see Timers.start_by.

# Slower than this inside the server, a claim has walked over many dead entries.
SLOW_CLAIM_US = 20_000
# A look finds so many queues with pending jobs; the next one goes on behind them.
QUEUES_AT_ONCE = 100
QUEUES_SOUGHT_SINGLY = 8
# How many jobs of a queue may run at once; NULL: there is no limit.
QUEUE_LIMIT_SQL = "IF(paused_at IS NULL, max_running, 0)"
# Who takes only jobs that must run alone looks so far into a queue for one.
LONE_SOUGHT_AMONG = 1000

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
    found_after_us: int  # how long the server had looked when it came to it

    @property
    def alone(self) -> bool:
        """Whether it must run alone."""
        return self.losses >= ALONE_AFTER_LOSSES

@dataclass
class LoneJobs:
    """What one claim is to do about jobs that must run alone."""
    idle: bool = False  # the worker runs nothing, so that it may take one
    only: bool = False  # it takes nothing else
    may_lend: bool = False  # a busy worker may leave a slot free for one
    kept: int = 0  # how many slots the claim has left free: one at most
    taken: bool = False  # the claim has taken one, and takes nothing beside it

class Position(NamedTuple):
    """Where a claim in a queue ended; the next one may go on behind it."""
    claim_order: int
    seq: int

class QueueCapacity(NamedTuple):
    """How many more jobs of a limited queue may run now; NULL: any number."""
    name: str
    free: int | None

# How long a row that the server refuses is left alone.
PASSED_OVER_S = 20.0

class Refusals:
    """What the server's refusals of rows have taught us."""
    def __init__(self) -> None:
        """Nothing was refused yet."""
        # So many may be claimed at once: few after a refusal, to find whose it
        # was.
        self.at_most = sys.maxsize
        # Rows that the server lets nobody write, and when to try each again.
        self._passed_over: dict[int, float] = {}

    def narrow(self, seqs: Sequence[int]) -> int | None:
        """Has fewer claimed at once, after these were refused together.

        Returns the seq of the job that is to blame, once it was alone.
        """
        self.at_most = max(1, len(seqs) // 2)
        return seqs[0] if len(seqs) == 1 else None

    def widen(self) -> None:
        """Has more claimed at once again, after a try that was taken."""
        self.at_most = min(2 * self.at_most, sys.maxsize)

    def pass_over(self, seq: int) -> None:
        """Has this row left alone for a while; the veto may be lifted then."""
        self._passed_over[seq] = time.monotonic() + PASSED_OVER_S

    def and_not_refused(self) -> str:
        """Returns the end of a WHERE that leaves out what is passed over."""
        now = time.monotonic()
        for seq in [seq for seq, until in self._passed_over.items() if until < now]:
            del self._passed_over[seq]
        if not self._passed_over:
            return ""
        seqs = ", ".join(map(str, sorted(self._passed_over)))
        return f"AND seq NOT IN ({seqs})"

class Claimer:
    """Claims jobs for one worker, turn by turn.

    `token` is that of the present turn, `seqs` are the rows that it has marked
    so far. It goes through a list of queues with pending jobs, in the order of
    their names and round and round: whoever had its turn goes to the end, and
    who had nothing more goes off the list. The list is made anew by a look.
    """
    def __init__(self, database: Database, identity: WorkerIdentity,
                 use_skip_locked: bool) -> None:
        """`use_skip_locked` is False where a person has switched it off."""
        self.token = ""
        self.seqs: list[int] = []
        self._database, self._identity = database, identity
        self._use_skip_locked = use_skip_locked
        # The queues that are thought to have pending jobs, the next one first.
        self._queues: list[str] = []
        self._last_queue = ""  # the last one that had its turn
        self._look_owed = True
        self._has_more = False  # whether there are queues beyond the list
        self._limits: dict[str, int | None] = {}
        self._positions: dict[str, Position] = {}
        self.refusals = Refusals()

    def begin_turn(self) -> None:
        """Makes the token for what this turn claims: random, and never used again."""
        self.token = secrets.token_hex(8)
        self.seqs = []

    def begin_try(self) -> None:
        """Forgets what an earlier try of the same turn marked: it was rolled back."""
        # Those jobs wait again, in queues that may have gone off the list.
        if self.seqs:
            self.owe_look()
        self.seqs = []

    def owe_look(self) -> None:
        """Has the next claim find the queues anew, each from its head on.

        That claim may come much later, once a slot is free.
        """
        self._look_owed = True

    def read_limits(self, cursor: Cursor) -> None:
        """Learns which queues have a limit, or are paused."""
        self._limits = cursor.pairs(
            f"SELECT name, {QUEUE_LIMIT_SQL} FROM queues "
            "WHERE paused_at IS NOT NULL OR max_running IS NOT NULL")

    def claim(self, cursor: Cursor, wanted: int, lone: LoneJobs) -> bool:
        """Marks up to `wanted` jobs with the token, shared over the queues
        with some.

        Returns whether there may be more for what is still free, in queues
        behind those of the list. In `lone` it notes the slot that it leaves.
        """
        if self._look_owed or not self._queues:
            self._find_queues(cursor)
        capacity = self._free_capacity(cursor)
        # First to each queue its share, rounded up; then the rest to who has
        # more.
        wanted = min(wanted, self.refusals.at_most)
        open_queues = [name for name in self._queues if capacity.get(name) != 0]
        share = -(-wanted // max(1, len(open_queues)))
        for at_most in sorted({share, wanted}):
            self._go_round(cursor, capacity, lone, at_most, wanted)
        if self.seqs and self._locks(cursor):
            defer_claim(cursor, self.seqs, self.token, self._identity.id)
        # A list whose queues are all paused or full is still there.
        full = len(self.seqs) + lone.kept >= wanted
        return self._has_more and not full and not self._queues

    def _find_queues(self, cursor: Cursor) -> None:
        """Lists the next queues that have pending jobs, or those that are served."""
        last = self._last_queue
        names = sorted(self._identity.queues)
        if not names:
            begin = last if self._has_more else ""
            names = queues_behind(cursor, State.PENDING, begin)
            if begin and len(names) < QUEUES_AT_ONCE:
                names += queues_behind(cursor, State.PENDING, "")
                names = sorted(set(names), key=names.index)
            self._has_more = len(names) >= QUEUES_AT_ONCE
            del names[QUEUES_AT_ONCE:]
        # Round and round: those behind the last one come first.
        self._queues = sorted(names, key=lambda name: (name <= last, name))
        self._look_owed = False
        self._positions.clear()

    def _go_round(self, cursor: Cursor, capacity: dict[str, int], lone: LoneJobs,
                  at_most: int, wanted: int) -> None:
        """Marks up to `at_most` jobs of each queue on the list, `wanted` in all."""
        for name in list(self._queues):
            before, kept = len(self.seqs), lone.kept
            if before + kept >= wanted or lone.taken or not self._queues:
                return
            room = min(at_most, wanted - before - kept)
            limit = min(room, capacity.get(name, room))
            if limit > 0:
                self._claim_from_queue(cursor, name, limit, lone)
            taken = len(self.seqs) - before
            limit -= lone.kept - kept
            if name in capacity:
                capacity[name] -= taken
            self._queues.remove(name)
            # Who gave less than asked for is empty: it is not asked again. One
            # that is paused or full stays on the list.
            if taken == limit or lone.taken:
                self._queues.append(name)
            self._last_queue = name
            if lone.taken:
                return
            # One that gave nothing was emptied by another worker, which is
            # about to empty the next ones, too. Where there are so many that
            # the list holds only some, we go on at a distance from it.
            if limit and not taken and self._has_more:
                self._last_queue = random.choice(self._queues or [name])
                self._queues.clear()

    def _locks(self, cursor: Cursor) -> bool:
        """Returns whether claims lock what they find, and skip what others locked."""
        return self._use_skip_locked and bool(self._database.skip_locked(cursor))

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
                          lone: LoneJobs) -> None:
        """Marks jobs of one queue.

        A job that must run alone is taken only by a process with no other run.
        Any other passes it over; where it may lend, it leaves it a slot.
        """
        if not self._locks(cursor):
            self._claim_by_update(cursor, name, wanted, lone)
            return
        if lone.only:
            self._claim_lone(cursor, name, lone)
            return
        found = self._candidates(cursor, name, wanted)
        may_take = lone.idle and not self.seqs
        if may_take and found and found[0].alone:
            lone.taken = True
            found = found[:1]
        elif any(job.alone for job in found):
            if lone.may_lend and not lone.kept:
                lone.kept = 1
                wanted -= 1
            ordinary = f"AND losses < {ALONE_AFTER_LOSSES}"
            found = self._candidates(cursor, name, wanted, ordinary)
        if found:
            self._note_position(name, found[-1])
        self.seqs += [job.seq for job in found]

    def _claim_lone(self, cursor: Cursor, name: str, lone: LoneJobs) -> None:
        """Marks a job of one queue that must run alone, if there is one.

        It is sought without a lock, which others would have to pass over.
        """
        found = cursor.records(
            Candidate,
            f"""
            SELECT seq, losses, claim_order, 0 AS found_after_us
              FROM (SELECT seq, losses, claim_order FROM jobs FORCE INDEX (jobs_claim)
                     WHERE state = 'pending' AND queue = %s
                           {self.refusals.and_not_refused()}
                     ORDER BY claim_order, seq LIMIT {LONE_SOUGHT_AMONG}) AS first_ones
             WHERE losses >= {ALONE_AFTER_LOSSES}
             ORDER BY claim_order, seq LIMIT 1
            """, name)
        for job in found:
            this_one = f"AND claim_order = {job.claim_order} AND seq = {job.seq}"
            locked = self._candidates(cursor, name, 1, this_one)
            self.seqs += [one.seq for one in locked if one.alone]
        lone.taken = bool(self.seqs)

    def _note_position(self, name: str, last: Candidate) -> None:
        """Has the next claim in a queue begin behind `last`, if this one was slow."""
        if name in self._positions or last.found_after_us > SLOW_CLAIM_US:
            self._positions[name] = Position(last.claim_order, last.seq)

    def _candidates(self, cursor: Cursor, name: str, wanted: int,
                    condition: str = "") -> list[Candidate]:
        """Locks and returns the next pending jobs of a queue, of those that
        `condition` leaves.

        Under a long snapshot (a mysqldump) the index keeps the entries of
        claimed rows, and a claim walks over them all. So where a claim was
        slow, the next one starts where it ended, until the next look; that
        finds what has a higher priority, too. The server tells how long it
        took: NOW is when the statement began, and a slow wire does not count.
        """
        reached = self._positions.get(name)
        if reached:
            order, seq = reached
            later = f"claim_order = {order} AND seq > {seq}"
            condition += f" AND (claim_order > {order} OR ({later}))"
        and_not_refused = self.refusals.and_not_refused()
        return cursor.records(
            Candidate,
            f"""
            SELECT seq, losses, claim_order,
                   TIMESTAMPDIFF(MICROSECOND, NOW(6), SYSDATE(6)) AS found_after_us
              FROM jobs FORCE INDEX (jobs_claim)
             WHERE state = 'pending' AND queue = %s {condition} {and_not_refused}
             ORDER BY claim_order, seq LIMIT {wanted}
               FOR UPDATE SKIP LOCKED
            """, name)

    def _claim_by_update(self, cursor: Cursor, name: str, wanted: int,
                         lone: LoneJobs) -> None:
        """Claims without SKIP LOCKED: by one guarded UPDATE, then a read by
        token.

        A job that must run alone waits until nothing else waits, and a process
        is idle or may lend.
        """
        where = f"queue = %s {self.refusals.and_not_refused()}"
        ordinary = SqlCondition(f"{where} AND losses < {ALONE_AFTER_LOSSES}", [name])
        alone = SqlCondition(f"{where} AND losses >= {ALONE_AFTER_LOSSES}", [name])
        worker = self._identity.id
        claimed = 0
        if not lone.only:
            claimed = claim_next(cursor, ordinary, wanted, self.token, worker)
        if not claimed and lone.idle and not self.seqs:
            claim_next(cursor, alone, 1, self.token, worker)
        elif claimed < wanted and lone.may_lend and not lone.kept:
            lone.kept = len(cursor.rows(
                int, "SELECT 1 FROM jobs FORCE INDEX (jobs_claim) "
                f"WHERE state = 'pending' AND {alone.where} LIMIT 1", *alone.values))
        losses: dict[int, int] = cursor.pairs(
            "SELECT seq, losses FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'processing' AND token = %s", self.token)
        self.seqs = list(losses)
        lone.taken = any(count >= ALONE_AFTER_LOSSES for count in losses.values())

def queues_with(cursor: Cursor, state: State) -> list[str]:
    """Returns all queues that have jobs in this state, in the order of their names."""
    names: list[str] = []
    full = True
    while full:
        last = names[-1] if names else ""
        found = queues_behind(cursor, state, last)
        names += found
        full = len(found) == QUEUES_AT_ONCE
    return names

def queues_behind(cursor: Cursor, state: State, last: str) -> list[str]:
    """Returns the next QUEUES_AT_ONCE queues with jobs in this state, by their
    names from behind `last` on.

    SELECT DISTINCT would read the whole range: 75 ms for 500,000 rows, where a
    seek from one queue to the next takes 0.2. Grouped by both columns of the
    index one statement does so many seeks; but where its statistics are old,
    the server reads the whole range all the same. So it has only what comes
    after the first few queues.
    """
    names: list[str] = []
    waiting = "SELECT queue FROM jobs FORCE INDEX (jobs_claim) " \
              "WHERE state = %s AND queue > %s"
    while len(names) < QUEUES_SOUGHT_SINGLY:
        found = cursor.rows(str, f"{waiting} ORDER BY queue LIMIT 1", state, last)
        if not found:
            return names
        names += found
        last = names[-1]
    limit = QUEUES_AT_ONCE - len(names)
    return names + cursor.rows(
        str, f"{waiting} GROUP BY state, queue LIMIT {limit}", state, last)

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
    # Without retries a job asks for one run at most. Then a lost run is its
    # last, whatever the setting says, and only its own word is to the contrary.
    on_lost = (f"IF(COALESCE(max_retries, {settings.max_retries}) = 0, "
               f"'dead', '{settings.on_lost}')")
    expressions = {
        "token": "COALESCE(token, '')",
        "max_attempts": "COALESCE(max_attempts, max_retries + 1, "
                        f"{settings.max_retries + 1})",
        "backoff_base": f"GREATEST(1, COALESCE(backoff_base, {settings.backoff_base}))",
        "on_lost": f"COALESCE(on_lost, {on_lost})",
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

RUNS_TAKEN_OVER = 500
# How long a lock on the row of a worker that is known to be dead is waited for:
# it may have left one itself, which the server takes back within milliseconds.
DEAD_LOCK_S, DEAD_LOCK_PAUSE_S = 1.0, 0.05

class RunKey(NamedTuple):
    """A job in `processing`, and the token of its run."""
    seq: int
    token: str | None

# Found without a lock: all that are processing would be locked on the way.
PROCESSING_OF_SQL = f"""
    SELECT seq, token FROM jobs FORCE INDEX (jobs_due)
     WHERE state = 'processing' AND worker <=> %s LIMIT {RUNS_TAKEN_OVER}"""

class TakenOver(NamedTuple):
    """Whose runs a lost worker had, and what waits for them."""
    jobs: list[str]  # their ids
    resolution: Resolution

def take_over(database: Database, settings: Settings, worker: str | None,
              heartbeat: int | None) -> TakenOver | None:
    """Settles the runs of a lost worker as lost; None if it is not lost.

    One transaction locks its row, checks that its heartbeat still is
    `heartbeat` (None: that it has no live row; -1: whatever it is), and marks
    it lost. No row that another holds is waited for: a worker whose row is
    locked is in a turn right now, and not dead; a run whose row is locked is
    left, and so are those beyond RUNS_TAKEN_OVER. They have no live worker from
    then on, and are taken over as such. So is each by itself where the server
    refuses one of them; that one is set aside.
    """
    def mark(cursor: Cursor) -> bool:
        """Marks the worker as lost; returns whether it is."""
        if not _is_lost(database, cursor, worker, heartbeat):
            return False
        cursor.execute(
            "UPDATE workers SET lost_at = UTC_TIMESTAMP(6), state = 'lost' "
            "WHERE id <=> %s AND lost_at IS NULL", (worker,))
        return True
    def work(cursor: Cursor) -> TakenOver | None:
        """Does it in the order of all transactions: the worker's row, then its runs."""
        if not mark(cursor):
            return None
        runs = cursor.records(RunKey, PROCESSING_OF_SQL, worker)
        return _settle_as_lost(database, cursor, settings, runs)
    give_up_at = time.monotonic() + DEAD_LOCK_S
    while True:
        try:
            taken = database.transact(work)
        except RowRefused:
            if database.transact(mark):
                return _take_over_singly(database, settings, worker)
            taken = None
        late = time.monotonic() > give_up_at
        if taken is not None or heartbeat != -1 or late:
            return taken
        time.sleep(DEAD_LOCK_PAUSE_S)

def _take_over_singly(database: Database, settings: Settings,
                      worker: str | None) -> TakenOver:
    """Settles the runs of a lost worker one by one, and sets aside what is refused."""
    jobs: list[str] = []
    left: list[Dependents] = []
    for run in database.records(RunKey, PROCESSING_OF_SQL, worker):
        settle_one = functools.partial(
            _settle_as_lost, database, settings=settings, runs=[run], resolves=False)
        try:
            taken = database.transact(settle_one)
        except RowRefused:
            refuse(database, run.seq, run.token or "")
            continue
        jobs += taken.jobs
        left += taken.resolution.left
    return TakenOver(jobs, Resolution(left=left))

def _is_lost(database: Database, cursor: Cursor, worker: str | None,
             heartbeat: int | None) -> bool:
    """Returns whether a worker is lost, by its row, which is locked then."""
    live = "SELECT beat FROM workers WHERE lost_at IS NULL AND id IN %s"
    if heartbeat is not None:
        free = database.lock_free(cursor, int, live, [worker])
        if free:
            return heartbeat in (-1, free[0])
    # A row that is not ours may be held, or not be there. Once it is gone, it
    # never comes back: ids are not used twice, so this needs no lock.
    gone = not cursor.rows(int, live, [worker])
    return gone and heartbeat in (-1, None)

def _settle_as_lost(database: Database, cursor: Cursor, settings: Settings,
                    runs: Sequence[RunKey], resolves: bool = True) -> TakenOver:
    """Settles those of these runs whose rows nobody holds."""
    if not runs:
        return TakenOver([], Resolution())
    free = database.lock_free(
        cursor, int, "SELECT seq FROM jobs FORCE INDEX (PRIMARY) "
        "WHERE state = 'processing' AND seq IN %s", sorted(run.seq for run in runs))
    if not free:
        return TakenOver([], Resolution())
    tokens = {run.seq: run.token for run in runs}
    condition = SqlCondition("seq IN %s FOR UPDATE", [free])
    locked = read_processing(cursor, settings, "PRIMARY", condition)
    # Since they were found, some may have been claimed anew, by others.
    jobs = [job for job in locked if job.claim.token == (tokens[job.claim.seq] or "")]
    lost = RunOutcome(Reason.LOST)
    resolution = settle(
        cursor, database.packet_bytes,
        [decide_settlement(job.claim, lost, settings) for job in jobs], resolves)
    return TakenOver([job.claim.id for job in jobs], resolution)

def forget_lost_workers(database: Database, workers: Sequence[str]) -> None:
    """Removes rows of workers that were lost long ago, but for those that others hold.
    """
    def work(cursor: Cursor) -> None:
        free = database.lock_free(
            cursor, str, "SELECT id FROM workers WHERE id IN %s", workers)
        if free:
            cursor.execute("DELETE FROM workers WHERE id IN %s", [free])
    # By id: a scan would wait for every worker in a turn.
    if workers:
        database.transact(work)

class PartTakenOver(NamedTuple):
    """What came of the runs of a dead worker some of which do not end."""
    taken: list[str]  # the ids of the jobs whose runs were settled as lost
    kept: list[str]  # the ids of the jobs that stay processing
    resolution: Resolution  # what waits for those that were settled

def take_over_but(database: Database, settings: Settings, worker: str,
                  surviving: Mapping[str, int]) -> PartTakenOver | None:
    """Settles as lost what a dead worker ran, but for the runs that go on.

    `surviving` gives a process of each of these by run tag. They stay
    processing, with a note, and the dead worker's heartbeat is raised, so that
    nobody else takes them over. None: it was taken over, or its row is locked.
    """
    def work(cursor: Cursor) -> PartTakenOver | None:
        """Does it in the order of all transactions: the worker's row, then its runs."""
        found = database.lock_free(
            cursor, str,
            "SELECT id FROM workers WHERE lost_at IS NULL AND id IN %s", [worker])
        if not found:
            return None
        # Not the time of its last heartbeat: people see by it that it is silent.
        cursor.execute("UPDATE workers SET beat = beat + 1 WHERE id = %s", (worker,))
        # Found without a lock, so that no stranger's row is waited for.
        seqs = cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'processing' AND worker = %s", worker)
        if not seqs:
            return PartTakenOver([], [], Resolution())
        jobs = read_processing(
            cursor, settings, "PRIMARY",
            SqlCondition("worker = %s AND seq IN %s FOR UPDATE", [worker, seqs]))
        settlements = []
        kept = []
        for claim in (job.claim for job in jobs):
            pid = surviving.get(claim.run_tag)
            if pid is None:
                lost = RunOutcome(Reason.LOST)
                settlements.append(decide_settlement(claim, lost, settings))
            else:
                note = (f"its worker died, and process {pid} of it does not end; "
                        "it is looked at again with each heartbeat")
                kept.append((claim, RunOutcome(None, detail=note)))
        resolution = settle(cursor, database.packet_bytes, settlements)
        write_history(cursor, database.packet_bytes, kept)
        ids = [claim.id for claim, _ in kept]
        taken = [one.claim.id for one in settlements]
        return PartTakenOver(taken, ids, resolution)
    return database.transact(work)

def say_taken(job_ids: Sequence[str], done: str) -> str:
    """Returns words for the runs that were taken over, which name their jobs."""
    if not job_ids:
        return f"no run {done}"
    runs = "1 run" if len(job_ids) == 1 else f"{len(job_ids)} runs"
    return f"{runs} {done}: {abbreviated(job_ids)}"

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

# So long after its end a run has more of its output stored than is kept, for
# those who follow it and may be late.
FOLLOWED_S = 10.0
# A worker that stops waits only as long as a follower pauses.
FOLLOWED_AT_STOP_S = 0.3
TRIMMED_AT_ONCE = 100
TRIMMED_FOR_S = 0.5  # no longer at a time, so that turns go on

class OutputTrimmer:
    """Cuts the output of runs that ended down to what is kept, after a while.

    A run's end is written at once, with as much of its output as those need
    who follow it. So no run waits for a follower, and a follower that is late
    loses nothing. Should a worker die before it has trimmed one, more stays.
    """
    TRIM = """
        UPDATE runs
           SET output = CONCAT(LEFT(output, %s), %s, RIGHT(output, %s))
         WHERE job_seq = %s AND run = %s
           AND output_bytes = %s AND LENGTH(output) > %s
        """

    def __init__(self, database: Database) -> None:
        self._database = database
        # When each is to be trimmed, and the values of TRIM; the oldest first.
        self._waiting: collections.deque[tuple[float, Values]] = collections.deque()

    def add(self, settlements: Iterable[Settlement]) -> None:
        """Takes the runs whose end was just written."""
        trim_at = time.monotonic() + FOLLOWED_S
        for one in settlements:
            claim, outcome = one.claim, one.outcome
            if not outcome.to_follow:
                continue
            # What is kept is all in the database: its form is enough.
            mark = cut_mark(outcome.output_bytes)
            head, _, tail = outcome.output.partition(mark)
            self._waiting.append((trim_at, (
                len(head), mark, len(tail), claim.seq, claim.run,
                outcome.output_bytes, len(outcome.output))))

    def run(self) -> None:
        """Trims those for which it is time, as many as it may at a time."""
        now = time.monotonic()
        while self._trim_some(now):
            if time.monotonic() > now + TRIMMED_FOR_S:
                return

    def finish(self) -> None:
        """Trims all that are left, before their worker leaves."""
        if self._waiting:
            time.sleep(FOLLOWED_AT_STOP_S)
        while self._trim_some(math.inf):
            pass

    def _trim_some(self, now: float) -> bool:
        """Trims a batch, the oldest first; returns whether there were any."""
        batch: list[Values] = []
        while self._waiting and len(batch) < TRIMMED_AT_ONCE:
            trim_at, values = self._waiting[0]
            if trim_at > now:
                break
            batch.append(values)
            self._waiting.popleft()

        def work(cursor: Transaction) -> None:
            for values in batch:
                cursor.execute(self.TRIM, values)

        if batch:
            # To trim it twice changes nothing.
            self._database.transact(work)
        return bool(batch)

class Maintenance:
    """When each of these was done last, and how far it came."""
    def __init__(self, database: Database, resolver: DependentsResolver) -> None:
        """What it finds to wait for nothing more, `resolver` is to resolve."""
        self._database = database
        self._resolver = resolver
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
        """Looks at the blocked jobs once more: the net, should a wake-up be
        lost.

        It walks through all of them, batch by batch, then pauses. It takes no
        lock: nearly all of them wait as they should.
        """
        until = time.monotonic() + RESOLVED_WITHIN_S
        while time.monotonic() >= self._recheck_at:
            if time.monotonic() > until:
                return
            if not self._recheck_some():
                self._recheck_at = time.monotonic() + 10 * settings.heartbeat

    def _recheck_some(self) -> bool:
        """Looks at the next blocked jobs; returns whether there are more."""
        after, seq = self._rechecked
        found = self._database.rows(
            lambda at, number: (at, number),
            "SELECT next_run_at, seq FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'blocked' AND next_run_at BETWEEN %s AND '9000-01-01' "
            "AND (next_run_at > %s OR seq > %s) "
            f"ORDER BY next_run_at, seq LIMIT {RECHECKED_AT_ONCE}",
            after, after, seq)
        if found:
            self._resolver.add_blocked(self._database.rows(
                int,
                f"""
                SELECT child FROM {PARENTS_SQL} WHERE child IN %s
                 GROUP BY child
                HAVING SUM(NOT {MET_SQL}) = 0 OR SUM({HOPELESS_SQL}) > 0
                """, [number for _, number in found]))
        more = len(found) == RECHECKED_AT_ONCE
        self._rechecked = found[-1] if more else (DATETIME_MIN, 0)
        return more


# ---- turn --------------------------------------------------------------------
#
# One round of a worker with the database. Its core is one transaction, always in
# the same lock order, which `TurnTaker._transaction` shows. Before it, now and
# then, comes a look at the queue by one statement, and after it, in transactions
# of their own, what the look shows to be owed. A batch grows with the load by
# itself: all that ended since the last turn is settled in this one, and as
# much is claimed as there are slots.

RELEASED_WHEN_DUE = 500
# How soon to look again for due rows that another worker is about to release.
OTHERS_RELEASE_S = 0.05
# How soon to try a turn again that was refused for no claim of its own.
REFUSED_AGAIN_S = 1.0

@dataclass(frozen=True)
class TurnRequest:
    """What a worker wants of one turn."""
    ended: Sequence[Ended] = ()
    flushes: Sequence[Ended] = ()  # output so far of runs that go on
    running: Collection[tuple[int, str]] = ()  # (seq, token) of the runs that go on
    free: int = 0  # how many jobs it may claim
    alone_only: bool = False  # it claims only jobs that must run alone
    may_lend: bool = False  # it may leave one slot free for such a job
    look: bool = False  # for cancellations, settings, due jobs and new queues
    detect: bool = False  # raise the heartbeat in any case, and look for lost workers
    all_runs: bool = False  # look at the runs of all workers, not at our own alone
    drain: bool = False  # say whether anything is left to run
    state: str = "running"

@dataclass
class QueueSnapshot:
    """What a worker reads when it looks around."""
    config: dict[str, str]
    # Ours, and whether each is to be cancelled: of those that we know of, or,
    # where all runs were looked at, of all.
    runs: dict[tuple[int, str], bool]
    others_cancelled: bool  # a run of another worker is to be cancelled
    waiting: bool  # there are pending jobs
    due_s: float  # until the next scheduled or failed job is due
    heartbeats: dict[str, tuple[int, float]]  # of the others, each with its lease
    orphaned: list[str | None]  # workers that have runs and no live row
    expired: list[str]  # workers that were lost a day ago
    staged: list[str]  # the keys in `config` of batches still to be released
    drained: bool = False  # a worker that may leave has nothing more to run

@dataclass(frozen=True)
class TurnResult:
    """What came of a turn."""
    alive: bool = True  # False: we were declared lost, and nothing else was done
    jobs: Sequence[ClaimedJob] = ()
    snapshot: QueueSnapshot | None = None
    due_s: float = math.inf  # until the next scheduled or failed job is due
    settlements: Sequence[Settlement] = ()
    slot_kept: bool = False  # a slot was left free for a job that must run alone
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
#   cancelled  the same of another worker's run that is to be cancelled; only
#              where all runs are looked at
#   waiting    there is a pending job that we serve
#   due        microseconds until a scheduled, or a failed, job is due
SNAPSHOT_SQL = """
SELECT 'config' AS what, CAST(`key` AS CHAR) AS one, CAST(value AS CHAR) AS two,
       NULL AS three FROM config
UNION ALL
SELECT IF(worker = %s, 'run', 'cancelled'), CAST(token AS CHAR), CAST(seq AS CHAR),
       CAST(cancel_requested_at IS NOT NULL AS CHAR)
  FROM jobs FORCE INDEX ({index})
 WHERE state = 'processing' AND {runs}
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
                  request: TurnRequest) -> QueueSnapshot:
    """Returns all that an idle worker wants to know, by one statement.

    Our own runs are found by their numbers. To find more is to read the
    processing rows of all workers: with a heartbeat, and when we were called.
    """
    index, runs = "PRIMARY", "seq IN %s"
    values: list[object] = [identity.id, [0, *(seq for seq, _ in request.running)]]
    if request.detect or request.all_runs:
        index, runs = "jobs_due", "(worker = %s OR cancel_requested_at IS NOT NULL)"
        values = [identity.id, identity.id]
    served = ""
    if identity.queues:
        served = "AND queue IN %s"
        values.append(identity.queues)
    statement = SNAPSHOT_SQL.format(index=index, runs=runs, served=served)
    if request.detect:
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

# The states of a job that a draining worker waits for.
MAY_RUN = (State.PENDING, State.FAILED, State.PROCESSING)

def is_drained(cursor: Cursor, served: Sequence[str]) -> bool:
    """Returns whether these queues, paused ones aside, hold nothing that may
    still run.

    No queue named means all. What is `scheduled` is not waited for, unless a
    blocked job waits for it.
    """
    paused = cursor.rows(str, "SELECT name FROM queues WHERE paused_at > 0")
    # Names as values, and not a subquery: the index then passes over a paused
    # queue, however many jobs wait in it.
    here, values = "TRUE", list[object]()
    if paused:
        here += " AND queue NOT IN %s"
        values.append(paused)
    children, parents = "TRUE", "TRUE"
    if served:
        here += " AND queue IN %s"
        values.append(served)
        children, parents = "jobs.queue IN %s", "parents.queue IN %s"
    # One statement, so that all is seen at one moment: a job that is retried
    # between two of them would be in none of the states asked for.
    left = [f"SELECT 1 FROM jobs FORCE INDEX (jobs_claim) "
            f"WHERE state = '{state}' AND {here}" for state in MAY_RUN]
    blocked = (f"SELECT 1 FROM {PARENTS_SQL} JOIN jobs ON jobs.seq = child "
               f"WHERE jobs.state = 'blocked' AND {children}")
    left.append(f"{blocked} AND parents.state IN ('scheduled', 'blocked') "
                f"AND {parents}")
    # All that it waited for has ended: it is released, or dies, any moment.
    left.append(f"{blocked} GROUP BY child "
                f"HAVING SUM(NOT {MET_SQL}) = 0 OR SUM({HOPELESS_SQL}) > 0")
    any_left = " OR ".join(f"EXISTS ({query})" for query in left)
    names = [served] if served else []
    return not cursor.value(f"SELECT {any_left}",
                            *values * len(MAY_RUN), *names * 3)

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
    LEAST_BYTES, FIRST_BYTES, MOST_BYTES = 1 << 10, 256 << 10, 64 << 20
    FAST_S = 0.5  # what was carried in less may be doubled

    def __init__(self) -> None:
        self.load = Load()
        self._bytes_at_once = self.FIRST_BYTES

    def pack(self, tries: Tries, ended: Sequence[Ended],
             flushes: Sequence[Ended] = ()) -> Load:
        """Returns what the next try is to carry of these results, at least one."""
        last = self.load.ended
        if tries.slow and len(last) > 1:
            sent = sum(map(self._bytes_of, last))
            # Results without output are sent however little that is.
            self._bytes_at_once = max(sent // 2, self.LEAST_BYTES)
        left = self._bytes_at_once
        taken: list[Ended] = []
        for claim, outcome in ended:
            # A slow wire has no time for what will be trimmed again.
            if tries.slow:
                outcome = dataclasses.replace(outcome, to_follow=b"")
            if left > 0:
                taken.append((claim, outcome))
                left -= self._bytes_of(taken[-1])
        # The first try has no heartbeat right before it; each repeat has.
        if tries.slow > 1 and len(last) == 1:
            claim, outcome = taken[0]
            why = "the database is too slow to reach"
            taken[0] = claim, without_output(outcome, why)
        shown: list[Ended] = []
        unflushed: list[tuple[int, str]] = []
        for claim, outcome in flushes:
            left -= self._bytes_of((claim, outcome))
            first = not taken and not shown and not tries.slow
            if left > 0 or first:
                shown.append((claim, outcome))
            else:
                unflushed.append(claim.key)
        self.load = Load(taken, shown, ended[len(taken):], unflushed)
        return self.load

    @staticmethod
    def _bytes_of(ended: Ended) -> int:
        """Returns how much output goes with a result."""
        _, outcome = ended
        return len(outcome.to_follow or outcome.output)

    def took(self, seconds: float) -> None:
        """Learns how long it took; where more was waiting, more may go at once."""
        if self.load.unsettled and seconds < self.FAST_S:
            self._bytes_at_once = min(2 * self._bytes_at_once, self.MOST_BYTES)

# -- the turn

class RefusedRows:
    """The rows that the server refuses to write: found, set aside, and told.

    A trigger may veto a job, and one such job is not to stop the others.
    """
    def __init__(self, database: Database, claimer: Claimer) -> None:
        # Runs whose row takes nothing, and when each is handed back all the same.
        self._aside: dict[tuple[int, str], float] = {}
        self._database, self._claimer = database, claimer
        self._noted: set[str] = set()  # refusals that the log has

    def set_aside_claim(self, refused: RowRefused) -> list[str]:
        """Sets a pending job aside that the server let nobody claim.

        Where it is not yet known which one it is, fewer are claimed at once.
        Where nothing was claimed, it may be a row that was to be released.
        """
        if not self._claimer.seqs:
            return self._release_one_by_one()
        seq = self._claimer.refusals.narrow(self._claimer.seqs)
        return [] if seq is None else [self._set_aside(seq, refused)]

    def leave_alone(self, run: tuple[int, str]) -> None:
        """Has a run whose row takes nothing left alone for a while."""
        self._aside[run] = time.monotonic() + PASSED_OVER_S

    def aside(self) -> set[tuple[int, str]]:
        """Returns the runs that are left alone now."""
        now = time.monotonic()
        return {run for run, until in self._aside.items() if until > now}

    def set_aside_run(self, claim: Claim, refused: RowRefused) -> str:
        """Sets a job aside whose result is refused; returns what to say of it."""
        if refuse(self._database, claim.seq, claim.token):
            return f"job {claim.id} is dead: its result was refused: {refused}"
        self.leave_alone(claim.key)
        return f"job {claim.id} stays as it is, its row is refused: {refused}"

    def _set_aside(self, seq: int, refused: RowRefused) -> str:
        """Sets a waiting job aside; returns what to say of it."""
        became = "is dead" if refuse(self._database, seq, None) else "is passed over"
        self._claimer.refusals.pass_over(seq)
        return (f"the job with seq {seq} {became}, the database refuses to write "
                f"its row: {refused}")

    def _release_one_by_one(self) -> list[str]:
        """Releases due rows singly, and sets those aside that are refused."""
        notes = []
        due = self._database.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state IN ('scheduled', 'failed') "
            f"AND next_run_at <= UTC_TIMESTAMP(6) LIMIT {RELEASED_WHEN_DUE}")
        for seq in due:
            release = functools.partial(move, name="release", seqs=[seq])
            try:
                self._database.transact(release)
            except RowRefused as refused:
                notes.append(self._set_aside(seq, refused))
        return notes

    def bear(self, notes: list[str], what: str, work: Thunk) -> None:
        """Does the work; where a row is refused, notes once what was not done."""
        try:
            work()
        except RowRefused as refused:
            text = f"{what}: {refused}"
            if text not in self._noted:
                self._noted.add(text)
                notes.append(text)

class Aftermath:
    """What follows from a turn, or from a look, in transactions of its own.

    It takes over from lost workers, resolves what waits for jobs that ended,
    and does the maintenance.
    """
    def __init__(self, database: Database, served: Sequence[str],
                 refused: RefusedRows) -> None:
        """`served` are the queues that its worker serves; none: all."""
        self.purges = False  # whether this worker does the maintenance
        self.refused = refused
        self.resolver = DependentsResolver(database)
        self.trimmer = OutputTrimmer(database)
        self._database, self._served = database, served
        self._detector = FailureDetector()
        self._maintenance = Maintenance(database, self.resolver)

    def resolve_dependents(self, result: TurnResult) -> TurnResult:
        """Goes on with dependents that were left; returns the turn's result anew."""
        died = self.resolver.run(RESOLVED_WITHIN_S)
        notes = [*result.notes, *death_notes(died)]
        due_s = 0.0 if self.resolver.goes_on else result.due_s
        return dataclasses.replace(result, notes=notes, due_s=due_s)

    def look_around(self, settings: Settings, request: TurnRequest,
                    result: TurnResult, snapshot: QueueSnapshot) -> TurnResult:
        """Does what follows from a snapshot, each in a transaction of its own."""
        # What is due at once is work, and all queues need not be gone through.
        idle = not (request.running or result.jobs) and result.due_s > 0
        if request.alone_only:
            snapshot.drained = idle
        elif request.drain and idle:
            snapshot.drained = self._database.read(
                lambda cursor: is_drained(cursor, self._served))
        lost: dict[str, int] = {}
        orphaned: Sequence[str | None] = ()
        if request.detect:
            lost = self._detector.observe(time.monotonic(), snapshot.heartbeats,
                                          settings.heartbeat)
            orphaned = snapshot.orphaned
            forget_lost_workers(self._database, snapshot.expired)
        self.trimmer.run()
        notes = [*result.notes]
        if self.purges:
            run = functools.partial(self._maintenance.run, settings)
            self.refused.bear(notes, "maintenance was refused", run)
        return dataclasses.replace(result, snapshot=snapshot, lost=lost,
                                   orphaned=orphaned, notes=notes)

    def take_over(self, settings: Settings, worker: str | None,
                  heartbeat: int | None) -> list[str] | None:
        """Settles the runs of a lost worker as lost.

        Returns the ids of their jobs, or None if it is not lost.
        """
        taken = take_over(self._database, settings, worker, heartbeat)
        if taken is None:
            return None
        self.resolver.add(taken.resolution)
        return taken.jobs

    def take_over_but(self, settings: Settings, worker: str,
                      surviving: Mapping[str, int]) -> PartTakenOver | None:
        """Settles the runs of a dead worker, but for those that do not end."""
        taken = take_over_but(self._database, settings, worker, surviving)
        if taken:
            self.resolver.add(taken.resolution)
        return taken

    def take_over_lost(self, settings: Settings, result: TurnResult) -> list[str]:
        """Takes over what has no live worker; returns what is to be said of
        it.

        Before that, what lost workers of this host left running must have been
        ended.
        """
        notes: list[str] = []
        # What is not reached by then is found again by the next look.
        until = time.monotonic() + settings.lease_s / 8
        for worker, heartbeat in result.lost.items():
            if time.monotonic() > until:
                break
            taken = self._take_over(settings, worker, heartbeat, notes)
            if taken is not None and result.snapshot:
                silence = say_duration(result.snapshot.heartbeats[worker][1])
                notes.append(f"worker {worker} is lost, no heartbeat for {silence}; "
                             + say_taken(taken, "taken over"))
        for orphaned in result.orphaned:
            if time.monotonic() > until:
                break
            taken = self._take_over(settings, orphaned, None, notes)
            if taken:
                notes.append(f"worker {orphaned} has no live row; "
                             + say_taken(taken, "taken over"))
        return notes

    def _take_over(self, settings: Settings, worker: str | None,
                   heartbeat: int | None, notes: list[str]) -> list[str] | None:
        """Takes over from one worker; notes once where a row is refused."""
        taken: list[str] | None = None
        def work() -> None:
            nonlocal taken
            taken = self.take_over(settings, worker, heartbeat)
        what = f"runs of worker {worker} cannot be taken over"
        self.refused.bear(notes, what, work)
        return taken

class TurnTaker:
    """Takes one worker's turns with the database."""
    def __init__(self, database: Database, identity: WorkerIdentity,
                 use_skip_locked: bool) -> None:
        """`use_skip_locked` is False where a person has switched it off."""
        self.database, self.identity = database, identity
        self.settings = Settings()
        self._claimer = Claimer(database, identity, use_skip_locked)
        self._packer = Packer()
        self._refused = RefusedRows(database, self._claimer)
        self.after = Aftermath(database, identity.queues, self._refused)
        # Of the present try: what it settled, and what it left of dependents.
        self._settlements: list[Settlement] = []
        self._resolution = Resolution()
        self._lone = LoneJobs()
        self._state = ""  # as our row says

    def take(self, request: TurnRequest) -> TurnResult:
        """Looks around where asked, settles what ended, claims as much as is free."""
        self._claimer.begin_turn()
        # With every slot busy nothing can be claimed now: the next claim looks.
        if request.look or not (request.running or request.ended):
            self._claimer.owe_look()
        # Each repeat of anything shows first that we live: a long wait for a
        # lock takes the heartbeat of its own transaction back.
        self.database.between_tries = functools.partial(
            self._raise_heartbeat, state=request.state)
        snapshot = None
        if request.look:
            snapshot = self.database.read(lambda cursor: read_snapshot(
                cursor, self.identity, request))
        started = time.monotonic()
        try:
            result = self._carry_out(request, snapshot)
        except RowRefused as refused:
            if request.ended or request.flushes:
                return self._settle_one_by_one(request, refused)
            # The refused try took our heartbeat back.
            alive = self.database.read(
                lambda cursor: self._raise_heartbeat(cursor, request.state))
            due_s = 0.0 if self._claimer.seqs else REFUSED_AGAIN_S
            notes = self._refused.set_aside_claim(refused)
            return TurnResult(alive=alive, due_s=due_s, notes=notes)
        self._claimer.refusals.widen()
        self._packer.took(time.monotonic() - started)
        self.after.trimmer.add(result.settlements)
        if not result.alive:
            return result
        result = self.after.resolve_dependents(result)
        if not snapshot:
            return result
        self._hand_back_unknown(request, snapshot)
        result = self.after.look_around(self.settings, request, result, snapshot)
        return self.after.resolve_dependents(result)

    def _carry_out(self, request: TurnRequest,
                   snapshot: QueueSnapshot | None) -> TurnResult:
        """Does the turn's transaction, where there is anything to do in one.

        A heartbeat alone is one statement, and often it is not even due.
        """
        anything = not snapshot or request.ended or request.flushes \
            or snapshot.due_s <= 0 or snapshot.staged \
            or (request.free and snapshot.waiting)
        if anything:
            result = self.database.transact(
                lambda cursor: self._transaction(cursor, request, snapshot),
                self._verify_turn)
            self.after.resolver.add(self._resolution)
            return result
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
        self._resolution = Resolution()
        if not self._raise_heartbeat(cursor, request.state):
            return TurnResult(alive=False)
        load = self._packer.pack(cursor.tries, request.ended, request.flushes)
        self._settlements = self._settle(cursor, load)
        # A child may have become pending in a queue that had nothing before.
        if any(one.claim.has_children for one in self._settlements):
            self._claimer.owe_look()
        due_s = self._release(cursor, snapshot)
        if self._claim(cursor, request, len(load.unsettled)):
            due_s = 0.0
        if self._claimer.seqs:
            cursor.commit_with_next()
        jobs = self._claimer.read_back(cursor, self.settings)
        return self._result(jobs, due_s)

    def _result(self, jobs: Sequence[ClaimedJob], due_s: float) -> TurnResult:
        """Returns what the present try has come to."""
        load = self._packer.load
        return TurnResult(jobs=jobs, due_s=due_s, settlements=self._settlements,
                          slot_kept=bool(self._lone.kept),
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

    def _settle(self, cursor: Cursor, load: Load,
                resolves: bool = True) -> list[Settlement]:
        """Settles the runs that are still ours, and shows the output so far of
        others.

        What is no longer ours, by its token, is left alone. Without `resolves`
        what waits for these jobs is left for after the COMMIT.
        """
        self._resolution = Resolution()
        if not (load.ended or load.flushes):
            return []
        seqs = [claim.seq for claim, _ in (*load.ended, *load.flushes)]
        ours = lock_runs(cursor, seqs)
        write_history(cursor, self.database.packet_bytes, [
            (claim, outcome) for claim, outcome in load.flushes
            if claim.key in ours])
        settlements = []
        for claim, outcome in load.ended:
            row = ours.get(claim.key)
            if row:
                now = dataclasses.replace(claim, cancel_requested=bool(row.cancelled),
                                          has_children=bool(row.has_children))
                settlements.append(decide_settlement(now, outcome, self.settings))
        self._resolution = settle(
            cursor, self.database.packet_bytes, settlements, resolves)
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
                f"{self._claimer.refusals.and_not_refused()} "
                f"ORDER BY next_run_at LIMIT {RELEASED_WHEN_DUE} "
                f"FOR UPDATE {self.database.skip_locked(cursor)}", state)
            released += len(seqs)
            if seqs:
                defer_move(cursor, "release", seqs)
        # A due row that we did not get is being released by another: no hurry
        # for us.
        return 0.0 if released else OTHERS_RELEASE_S

    def _claim(self, cursor: Cursor, request: TurnRequest, unsettled: int) -> bool:
        """Claims for the free slots; results that wait for the next turn take
        one each.

        Else they would pile up where jobs end faster than their output can be
        sent. It returns whether there may be more in further queues.
        """
        wanted = request.free - unsettled
        self._lone = LoneJobs(idle=not request.running, only=request.alone_only,
                              may_lend=request.may_lend)
        if wanted <= 0:
            return False
        return self._claimer.claim(cursor, wanted, self._lone)

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
        notes = []
        settlements: list[Settlement] = []
        if request.ended:
            notes.append(f"a result was refused by the database: {refused}")
        for claim, outcome in request.ended:
            # What follows a run is not worth another refusal.
            outcome = dataclasses.replace(outcome, to_follow=b"")
            try:
                settlements += self._settle_now([(claim, outcome)])
            except RowRefused as error:
                notes.append(self._settle_without_output(claim, outcome, error))
        # A flush that was refused is dropped: the run's end brings all of it.
        rest = self.take(dataclasses.replace(request, ended=(), flushes=()))
        return dataclasses.replace(
            rest, notes=[*notes, *rest.notes],
            settlements=[*settlements, *rest.settlements])

    def _settle_without_output(self, claim: Claim, outcome: RunOutcome,
                               refused: RowRefused) -> str:
        """Settles a run that was refused with its output; returns what to say of it.

        If it is the row that takes nothing, the job is set aside.
        """
        try:
            self._settle_now([(claim, without_output(outcome, str(refused)))])
            return f"job {claim.id}: its output could not be stored: {refused}"
        except RowRefused as error:
            return self._refused.set_aside_run(claim, error)

    def _settle_now(self, ended: Sequence[Ended]) -> list[Settlement]:
        """Settles these runs, in as many transactions as it takes.

        Returns what became of them, for the log.
        """
        settlements: list[Settlement] = []
        def work(cursor: Transaction) -> None:
            # Whatever waits for them is not to be to blame for a refusal.
            load = self._packer.pack(cursor.tries, left)
            self._settle(cursor, load, resolves=False)
        left = ended
        while left:
            self.database.transact(work)
            self.after.resolver.add(self._resolution)
            settlements += self._settlements
            left = self._packer.load.unsettled
        return settlements

    def _hand_back_unknown(self, request: TurnRequest, snapshot: QueueSnapshot) -> None:
        """Hands back rows under our id that we do not run: a read-back had failed."""
        known = {*request.running,
                 *(claim.key for claim, _ in request.ended)}
        known |= self._refused.aside()
        unknown = [seq for seq, _ in snapshot.runs.keys() - known]
        if not unknown:
            return
        condition = SqlCondition("worker = %s AND seq IN %s",
                                 [self.identity.id, unknown])
        jobs = self.database.read(lambda cursor: read_processing(
            cursor, self.settings, "PRIMARY", condition))
        handed_back = RunOutcome(Reason.HANDED_BACK)
        for job in jobs:
            try:
                self._settle_now([(job.claim, handed_back)])
            except RowRefused:
                self._refused.leave_alone(job.claim.key)


# ---- queries -----------------------------------------------------------------
#
# What status, list, show and wait ask. Every answer is a record, whose fields
# are what --json prints, in their order. Nothing here changes a row or takes a
# lock, and what may be large is capped or read page by page: a question must
# not slow down a queue of millions.

# Counting goes no further than this, unless an exact count is asked for.
COUNTED_UP_TO = 100_000
# So many rows are sorted by age sooner than all jobs are walked by age.
SORTED_UP_TO = 10_000
PAGE = 1000  # rows of one statement, where all are read
NO_LIMIT = 1 << 63  # more than any seq or count, and still a BIGINT UNSIGNED

# -- records

@dataclass(frozen=True)
class WorkerRow:
    """A worker that is not lost."""
    id: str
    host: str
    pid: int
    slots: int
    busy: int  # how many of its slots run a job
    queues: list[str]  # empty: all
    heartbeat_at: str | None
    state: str  # or `silent`: no heartbeat for longer than a lease

    def serves(self, queue_name: str) -> bool:
        return not self.queues or queue_name in self.queues

class WorkerColumns(NamedTuple):
    """The same, as the database gives it, by the columns' names."""
    id: str
    host: str
    pid: int
    slots: int
    busy: int
    queues: str | None
    heartbeat_at: Moment
    state: str

@dataclass(frozen=True)
class QueueRow:
    """A queue with pending or processing jobs, and how many of each."""
    queue: str
    pending: int
    processing: int

@dataclass(frozen=True)
class QueueStats:
    """A queue that has jobs to run or a limit, and how it moves."""
    queue: str
    depth: int
    running: int
    limit: int | None
    paused: bool
    oldest_waiting: str | None  # when that job was enqueued
    rate: int  # runs that ended within the last minute

@dataclass(frozen=True)
class QueueLimit:
    """What a person has set for a queue."""
    name: str
    max_running: int | None
    paused_at: Moment

    @property
    def limits(self) -> bool:
        return self.max_running is not None or self.paused_at is not None

@dataclass(frozen=True)
class DeadGroup:
    """Dead letters that are alike but for the digits in their last line."""
    count: int
    exit_code: int | None
    reason: str | None
    last_line: str | None  # N for each number
    last_died_at: str | None
    example: str  # one job's id

class DeadLetter(NamedTuple):
    """A dead job, and when it died."""
    row: JobRow
    died_at: Moment

@dataclass(frozen=True)
class DeadJobRow(JobRow):
    """A dead job and its dead letter, as one row of a join."""
    died_at: Moment

@dataclass(frozen=True)
class FullJobRow(JobRow):
    """A job with what only `show` prints."""
    cwd: str | None
    env: str | None

def _job_row(wider: JobRow) -> JobRow:
    """Returns the fields of a JobRow alone."""
    # A job is printed field by field, and these must be its own.
    names = [field.name for field in dataclasses.fields(JobRow)]
    return JobRow(**{name: getattr(wider, name) for name in names})

@dataclass(frozen=True)
class TemplateRow:
    """What a job like this one is enqueued with; named as the columns are."""
    signature: str | None
    id: str
    command: str
    cwd: str | None
    env: str | None
    on_failure: str | None
    queue: str
    priority: int
    max_retries: int | None
    timeout: float | None
    backoff_base: float | None
    permanent_exit_codes: str | None
    on_lost: str | None
    unique_key: str | None

def states_of(database: Database, ids: Sequence[str]) -> dict[str, str]:
    """Returns the present states of those jobs that are there, by id."""
    # What cannot be an id is not asked for: the server might refuse it.
    named = [one for one in ids if NAME.fullmatch(one)]
    if not named:
        return {}
    found: dict[str, str] = database.pairs(
        "SELECT id, state FROM jobs WHERE id IN %s", named)
    return found

def read_config(database: Database) -> dict[str, str]:
    """Returns the stored settings; `config` has rows that are none, too."""
    found: dict[str, str] = database.pairs("SELECT `key`, value FROM config")
    return {key: value for key, value in found.items() if key in SETTINGS}

# -- why a job can never run

class HopelessParent(NamedTuple):
    """A job that ended, and not as `child` needs it."""
    child: int
    seq: int
    id: str
    state: str
    reason: str | None
    exit_code: int | None

    @property
    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.reason == Reason.EXIT:
            return f"{self.reason} {self.exit_code}"
        return self.reason or self.state

def roots_of(cursor: Cursor, seq: int) -> list[HopelessParent]:
    """Returns the jobs that a job's death of what it waited for goes back to.

    Up the chain it follows those that themselves died so; a root is one that
    did not, or whose own parents are well again. None: the job may come back.
    """
    roots: list[HopelessParent] = []
    # The jobs to ask about, and what is known of them; each is met once.
    asked: dict[int, HopelessParent | None] = {seq: None}
    met = {seq}
    while asked:
        found = cursor.records(
            HopelessParent,
            f"""
            SELECT child, parents.seq, parents.id, parents.state,
                   parents.reason, parents.exit_code
              FROM {PARENTS_SQL}
             WHERE child IN %s AND {HOPELESS_SQL}
             ORDER BY parent
            """, list(asked))
        waited_in_vain = {one.child for one in found}
        roots += [job for job in asked.values()
                  if job and job.seq not in waited_in_vain]
        asked = {one.seq: one for one in found if one.seq not in met}
        met |= set(asked)
        ended_so = {one.seq for one in asked.values()
                    if one and one.reason == Reason.DEPENDENCY}
        roots += [job for job in asked.values() if job and job.seq not in ended_so]
        asked = {seq: asked[seq] for seq in ended_so}
    return roots

def bring_back(roots: Sequence[HopelessParent]) -> str:
    """Returns the command that puts these back, and all that died with them."""
    ids = " ".join(root.id for root in roots)
    return f"queuectl dlq retry {ids} --dependents"

# -- following a job

SLOW_START_S = 2.0
FOLLOW_PAUSE_S = 0.1  # the longest pause of whoever follows a run's output
# Pauses begin with this, so that a short job is told of at once, and grow by
# half each time, so that a long one costs the server little.
FIRST_PAUSE_S = 0.02
WAITED_S_MAX = 0.25  # the longest pause of whoever waits for jobs to end

class RunOutput(NamedTuple):
    """A job's state, and what one of its runs has written."""
    state: str
    run: int | None  # None: it has no run yet
    output_bytes: int | None
    kept: bytes | None  # None: nothing that we have not read

class OutputFollower:
    """Reads a job's output while the job runs, through all its retries."""
    def __init__(self, database: Database, job_id: str, run: int,
                 when_slow: Thunk) -> None:
        """Begins with run number `run`, or where that is 0 with the first."""
        self._database = database
        self._job_id = job_id
        self._run = run
        self._seen = 0  # how many bytes of this run were given out
        self._pause_s = FIRST_PAUSE_S
        self._when_slow = when_slow

    def follow(self) -> Iterator[OutputPiece]:
        """Yields what is new, until the job has ended."""
        slow_at = time.monotonic() + SLOW_START_S
        while True:
            found = self._read()
            yield from self._new_output(found)
            # A job's end and its last output are committed together: who sees
            # the one has the other.
            state = found[-1].state
            if state in ENDED:
                return
            if time.monotonic() > slow_at:
                # It is told once at most.
                slow_at = math.inf
                if state != State.PROCESSING and not self._run:
                    self._when_slow()
            time.sleep(self._pause_s)
            self._pause_s = min(1.5 * self._pause_s, FOLLOW_PAUSE_S)

    def _read(self) -> list[RunOutput]:
        """Returns the present run and later ones, with output that is new."""
        found = self._database.records(
            RunOutput,
            """
            SELECT state, run, output_bytes,
                   IF(run > %s OR output_bytes > %s, output, NULL) AS kept
              FROM jobs LEFT JOIN runs ON job_seq = seq AND run >= %s
             WHERE id = %s
             ORDER BY run
            """, self._run, self._seen, self._run, self._job_id)
        if not found:
            raise no_such_job(self._job_id)
        return found

    def _new_output(self, found: Iterable[RunOutput]) -> Iterator[OutputPiece]:
        """Yields what we have not seen of these runs."""
        for row in found:
            if row.run and row.run != self._run:
                # The job was retried. The old run's row came before this one,
                # so its last bytes are given out. Each run's are counted anew.
                self._run = row.run
                self._seen = 0
            if row.kept and row.output_bytes:
                yield from output_since(row.kept, row.output_bytes, self._seen)
                self._seen = row.output_bytes
                # Where something came, more may come soon.
                self._pause_s = FIRST_PAUSE_S

class EndWaiter:
    """Waits for jobs to end, no longer than its time allows."""
    def __init__(self, database: Database, ids: Sequence[str],
                 timeout_s: float) -> None:
        """Begins to count its time now."""
        self._database = database
        # A set that keeps the order: what ends at once is told of in the order
        # in which it was asked for.
        self._left = dict.fromkeys(ids)
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s

    def wait(self, one_is_enough: bool) -> Iterator[ActionResult]:
        """Yields each job as it ends, or the first alone.

        It is a Problem when the time is up.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            for page in batched(list(self._left)):
                for result in self._ended(page):
                    yield result
                    # A job that is not there has not ended: go on.
                    if one_is_enough and result.state:
                        return
            if not self._left:
                return
            left_s = self._until - time.monotonic()
            if left_s <= 0:
                raise self._too_late()
            time.sleep(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, WAITED_S_MAX)

    def _ended(self, page: Sequence[str]) -> Iterator[ActionResult]:
        """Yields those that have ended or are not there, and drops them."""
        states = self._states(page)
        for job_id in page:
            state = states.get(job_id)
            if state and state not in ENDED:
                continue
            del self._left[job_id]
            error = no_such_job(job_id).what
            if state:
                error = f"job {job_id} is {state}"
            completed = state == State.COMPLETED
            yield ActionResult(job_id, completed, state, error, f"is {state}")

    def _states(self, ids: Sequence[str]) -> dict[str, str]:
        """Returns the present states of jobs.

        An outage that lasts until our time is up counts as that: whoever asked
        for a timeout is told of one.
        """
        policy = self._database.policy
        left_s = max(0.0, self._until - time.monotonic())
        self._database.policy = dataclasses.replace(
            policy, retry_for_s=min(policy.retry_for_s, left_s))
        try:
            return states_of(self._database, ids)
        except Unreachable:
            if left_s > policy.retry_for_s:
                raise
            raise self._too_late() from None

    def _too_late(self) -> Problem:
        left = list(self._left)
        waited = say_duration(self._timeout_s)
        return Problem(f"not ended within {waited}: {abbreviated(left)}",
                       f"see: queuectl explain {left[0]}", TIMED_OUT)

# -- the store's questions

def _nothing() -> None:
    pass

class JobQueries:
    """What a person asks of the queue."""
    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.rows = database.rows
        self.max_retries = settings.max_retries
        self._columns = job_columns(settings)

    def jobs(self, state: str | None, queue_name: str | None,
             limit: int) -> Iterator[JobRow]:
        """Yields the newest jobs first; a limit of 0: all.

        They are read page by page: there may be millions.
        """
        only = _job_condition(state, queue_name)
        matching = self.count_rows(f"jobs WHERE {only.where}", only.values,
                                   SORTED_UP_TO + 1)
        # Few among many are found by their index, and sorted; of what is
        # frequent, the newest are soon met by walking back from the end.
        index = "PRIMARY"
        if only.values and matching <= SORTED_UP_TO:
            index = "jobs_claim"
        statement = f"""
            SELECT {self._columns}
              FROM jobs FORCE INDEX ({index})
             WHERE seq < %s AND {only.where}
             ORDER BY seq DESC
             LIMIT %s
            """
        left = limit or sys.maxsize
        below = NO_LIMIT
        while left > 0:
            size = min(PAGE, left)
            values = [below, *only.values, size]
            page = self.database.records(JobRow, statement, *values)
            yield from page
            if len(page) < size:
                return
            left -= size
            # The next page begins where this one ended, and not after so many
            # rows: OFFSET would read them all again.
            below = page[-1].seq

    def count(self, state: str | None, queue_name: str | None) -> int:
        only = _job_condition(state, queue_name)
        return self.count_rows(f"jobs WHERE {only.where}", only.values,
                               COUNTED_UP_TO + 1)

    def count_rows(self, source: str, values: Sequence[object] = (),
                   most: int = 0) -> int:
        """Returns how many rows there are; at `most` it stops, 0: never."""
        if most:
            # A plain COUNT(*) walks the whole index, for seconds on millions.
            source = f"(SELECT 1 FROM {source} LIMIT {most}) AS some"
        [count] = self.rows(int, f"SELECT COUNT(*) FROM {source}", *values)
        return count

    def states(self, exact: bool) -> tuple[dict[str, int], list[str]]:
        """Returns the number of jobs in each state, and where it is capped.

        Unless it is to be exact, counting stops at COUNTED_UP_TO.
        """
        most = 0 if exact else COUNTED_UP_TO + 1
        counts: dict[str, int] = {}
        capped: list[str] = []
        for state in State:
            count = self.count_rows("jobs WHERE state = %s", [state], most)
            if most and count == most:
                # One more was looked for, to tell that many from more.
                capped.append(str(state))
                count = COUNTED_UP_TO
            counts[str(state)] = count
        return counts, capped

    # -- one job

    def details(self, job_id: str) -> JobDetails:
        """Returns everything about one job; a Problem if there is none."""
        found: list[FullJobRow] = []
        if NAME.fullmatch(job_id):
            columns = f"{self._columns}, cwd, env"
            found = self.database.records(
                FullJobRow,
                f"SELECT {columns} FROM jobs WHERE id = %s", job_id)
        if not found:
            raise no_such_job(job_id)
        [row] = found
        history = self.database.records(
            RunRecord,
            f"SELECT {field_list(RunRecord)} FROM runs "
            "WHERE job_seq = %s ORDER BY run", row.seq)
        after = self.rows(
            str, f"SELECT parents.id FROM {PARENTS_SQL} "
            "WHERE child = %s ORDER BY parent", row.seq)
        output = b""
        if history:
            output = self.output(row.seq, history[-1].run)
        return JobDetails(
            row=_job_row(row),
            cwd=row.cwd,
            env=env_of(row.env),
            after=after,
            history=history,
            output=output)

    def output(self, seq: int, run: int) -> bytes:
        """Returns what is kept of one run's output."""
        found = self.rows(
            lambda kept: kept or b"",
            "SELECT output FROM runs WHERE job_seq = %s AND run = %s",
            seq, run)
        return found[0] if found else b""

    def check_may_follow(self) -> None:
        """Raises a Problem where our account may not read all that of a job
        which it enqueues: its output, and why it does not start."""
        self.database.run(
            "SELECT 1 FROM runs, workers, queues, dependencies, dlq LIMIT 0")

    def follow(self, job_id: str, run: int,
               when_slow: Thunk = _nothing) -> Iterator[OutputPiece]:
        """Yields a job's output, from run number `run` on, until it has ended.

        `when_slow` is called if it has not started after SLOW_START_S.
        """
        follower = OutputFollower(self.database, job_id, run, when_slow)
        yield from follower.follow()

    def wait(self, ids: Sequence[str], one_is_enough: bool,
             timeout_s: float) -> Iterator[ActionResult]:
        """Yields each job as it ends, or the first alone.

        It is a Problem when `timeout_s` has passed. A job that is not there is
        told of at once.
        """
        waiter = EndWaiter(self.database, ids, timeout_s)
        yield from waiter.wait(one_is_enough)

    def job_template(self, job_id: str) -> dict[str, object]:
        """Returns a job's values, as complete_job takes them for another one.

        A job without a valid signature is a Problem: if we enqueued it anew,
        we would sign what nobody with our key has seen.
        """
        # What cannot be an id is not asked for, here as in `details`.
        found: list[TemplateRow] = []
        if NAME.fullmatch(job_id):
            columns = field_list(TemplateRow)
            found = self.database.records(
                TemplateRow,
                f"SELECT {columns} FROM jobs WHERE id = %s", job_id)
        if not found:
            raise no_such_job(job_id)
        values = dict(vars(found[0]))
        signature = values.pop("signature")
        if not is_signed(signature, *[values[name] for name in SIGNED]):
            raise Problem(
                f"job {job_id} is not signed with this QUEUECTL_SIGNING_KEY",
                "look at its command, then enqueue it anew")
        # The new job gets an id of its own.
        del values["id"]
        values["unique"] = values.pop("unique_key")
        # What the old one left to the settings, this one does, too.
        return {name: value for name, value in values.items()
                if value is not None}

    # -- dead letters

    def dead_letters(self, limit: int, only: SqlCondition) -> list[DeadLetter]:
        """Returns the dead jobs, the last to die first; a limit of 0: all."""
        # Those that died in one turn have the same time: seq puts them in order.
        found = self.database.records(
            DeadJobRow,
            f"""
            SELECT {self._columns}, died_at
              FROM dlq JOIN jobs ON jobs.seq = job_seq
             WHERE {only.where}
             ORDER BY died_at DESC, job_seq DESC
             LIMIT %s
            """, *only.values, limit or NO_LIMIT)
        return [DeadLetter(_job_row(row), row.died_at) for row in found]

    def dead_ids(self, only: SqlCondition) -> list[str]:
        """Returns the ids of the dead jobs, the first to die first."""
        return self.rows(
            str,
            f"""
            SELECT dlq.id FROM dlq JOIN jobs ON jobs.seq = job_seq
             WHERE {only.where}
             ORDER BY died_at, job_seq
            """, *only.values)

    def count_dead_letters(self, only: SqlCondition) -> int:
        source = f"dlq JOIN jobs ON jobs.seq = job_seq WHERE {only.where}"
        return self.count_rows(source, only.values, COUNTED_UP_TO + 1)

    def dead_groups(self) -> list[DeadGroup]:
        """Returns the dead letters in groups, the largest first.

        Lines that differ by a number, a path's or an id's, tell of one cause.
        """
        line = "REGEXP_REPLACE(last_line, '[0-9]+', 'N')"
        # GROUP BY names the expression: `last_line` there would be the column,
        # and not what is selected under its name.
        found = self.database.records(
            DeadGroup,
            f"""
            SELECT COUNT(*) AS count, exit_code, reason, {line} AS last_line,
                   MAX(died_at) AS last_died_at, MAX(id) AS example
              FROM dlq
             GROUP BY exit_code, reason, {line}
             ORDER BY COUNT(*) DESC
            """)
        # Whoever prints a group gets its time as text.
        groups = []
        for group in found:
            died_at = say_time(group.last_died_at)
            groups.append(dataclasses.replace(group, last_died_at=died_at))
        return groups

    # -- queues and workers

    def queues(self) -> list[QueueRow]:
        """Returns the queues with pending or processing jobs."""
        processing: dict[str, int] = self.database.pairs(
            "SELECT queue, COUNT(*) FROM jobs WHERE state = 'processing' "
            "GROUP BY queue")
        waiting = self.database.read(
            lambda cursor: queues_with(cursor, State.PENDING))
        pending: dict[str, int] = {}
        # Few run at once, and one statement counts them. Millions may wait: each
        # queue's are counted for themselves, so that each count is capped.
        for name in waiting:
            pending[name] = self.count_rows(
                "jobs WHERE state = 'pending' AND queue = %s",
                [name],
                COUNTED_UP_TO)
        return [QueueRow(name, pending.get(name, 0), processing.get(name, 0))
                for name in sorted({*pending, *processing})]

    def queue_stats(self) -> list[QueueStats]:
        """Returns the queues that have jobs to run or a limit."""
        set_limits = self.database.records(
            QueueLimit, f"SELECT {field_list(QueueLimit)} FROM queues")
        limits = {one.name: one for one in set_limits}
        rates = _ended_in_last_minute(self.database)
        busy = {row.queue: row for row in self.queues()}
        # A row of `queues` may be left of a limit that was taken away.
        limited = [name for name, limit in limits.items() if limit.limits]
        found = []
        for name in sorted({*busy, *limited}):
            row = busy.get(name, QueueRow(name, 0, 0))
            limit = limits.get(name, QueueLimit(name, None, None))
            found.append(QueueStats(
                queue=name,
                depth=row.pending,
                running=row.processing,
                limit=limit.max_running,
                paused=limit.paused_at is not None,
                oldest_waiting=_oldest_waiting(self.database, name),
                rate=rates.get(name, 0)))
        return found

    def workers(self) -> list[WorkerRow]:
        return _live_workers(self.database)

    def unserved(self) -> list[str]:
        """Returns the queues where jobs wait and no live worker serves."""
        # One that drains or is silent may never take another job.
        running = [worker for worker in self.workers()
                   if worker.state == "running"]
        names = []
        for row in self.queues():
            served = any(worker.serves(row.queue) for worker in running)
            if row.pending and not served:
                names.append(row.queue)
        return names

    def running_under(self, host: str, supervisor: int) -> list[str]:
        """Returns the ids of the jobs that one supervisor's workers run."""
        # A lost worker's number may be another process's by now.
        return self.rows(
            str,
            """
            SELECT jobs.id FROM jobs JOIN workers ON workers.id = jobs.worker
             WHERE jobs.state = 'processing' AND host = %s AND supervisor = %s
                   AND lost_at IS NULL
             ORDER BY seq
            """, host, supervisor)

def _job_condition(state: str | None, queue_name: str | None) -> SqlCondition:
    """Returns the condition that `list` filters by.

    Without a filter it is TRUE, and has no values.
    """
    if not state and not queue_name:
        return SqlCondition("TRUE", [])
    # The index begins with the state: to seek in it, all states are named.
    states = [state] if state else list(State)
    if not queue_name:
        return SqlCondition("state IN %s", [states])
    return SqlCondition("state IN %s AND queue = %s", [states, queue_name])

def _live_workers(database: Database) -> list[WorkerRow]:
    """Returns the workers that are not lost."""
    # One clock, the database's, says which is silent. Whether it is lost is
    # for the failure detector to say, which goes by no clock.
    found = database.records(
        WorkerColumns,
        """
        SELECT id, host, pid, slots,
               (SELECT COUNT(*) FROM jobs
                 WHERE jobs.state = 'processing'
                       AND worker = workers.id) AS busy,
               queues, heartbeat_at,
               IF(heartbeat_at < UTC_TIMESTAMP(6)
                                 - INTERVAL lease_s SECOND,
                  'silent', state) AS state
          FROM workers
         WHERE lost_at IS NULL
         ORDER BY host, pid
        """)
    workers = []
    for row in found:
        values = row._asdict()
        values["queues"] = row.queues.split(",") if row.queues else []
        values["heartbeat_at"] = say_time(row.heartbeat_at)
        workers.append(WorkerRow(**values))
    return workers

def _ended_in_last_minute(database: Database) -> dict[str, int]:
    """Returns how many runs ended within a minute, by queue.

    No index leads to them by time: of the runs of the newest jobs, 5000 are
    looked at.
    """
    found: dict[str, int] = database.pairs(
        """
        SELECT queue, COUNT(*)
          FROM (SELECT job_seq, finished_at FROM runs
                 ORDER BY job_seq DESC LIMIT 5000) AS latest
          JOIN jobs ON seq = job_seq
         WHERE latest.finished_at > UTC_TIMESTAMP(6) - INTERVAL 1 MINUTE
         GROUP BY queue
        """)
    return found

def _oldest_waiting(database: Database, queue_name: str) -> str | None:
    """Returns when the oldest waiting job of a queue was enqueued."""
    # Among jobs of one priority the first is the oldest. So the first 1000
    # tell as much as all, unless more have a higher priority than it has.
    [oldest] = database.rows(
        say_time,
        """
        SELECT MIN(created_at)
          FROM (SELECT created_at FROM jobs FORCE INDEX (jobs_claim)
                 WHERE state = 'pending' AND queue = %s
                 ORDER BY claim_order, seq LIMIT 1000) AS first
        """, queue_name)
    return oldest


# ---- actions -----------------------------------------------------------------
#
# What a person changes: cancel, retry, limits, settings. A verb on a job locks
# its row first, and then does what its state allows; what it cannot do it says
# as a result, and not by an exception, so that a verb on many jobs goes on. A
# run is never ended from here: its worker is asked to.

class UnmetParent(NamedTuple):
    """A job that another still waits for."""
    hopeless: int  # 1: it has ended, and not as it should
    id: str
    state: str

class KeyConflict(NamedTuple):
    """A job that cannot live again, since another has its unique key."""
    state: str
    unique_key: str
    holder: str

class Counting(NamedTuple):
    """What a revived job's row says of its attempts: values for `move`."""
    max_attempts: object
    attempts: object

# What a verb does to a job that is locked. And, of the row as it was and as it
# is: whether that was done, where a COMMIT was not answered.
Act = Callable[[Cursor, LockedJob], ActionResult]
Stands = Callable[[LockedJob, LockedJob], bool]
Lock = Callable[[Cursor, str], Optional[LockedJob]]

class JobStore(JobQueries):
    """What a person asks of the queue, or changes in it."""

    def cancel(self, job_id: str) -> ActionResult:
        """Ends a waiting job now; asks a running one's worker to end it."""
        resolution = Resolution()  # of the last try
        def act(cursor: Cursor, job: LockedJob) -> ActionResult:
            nonlocal resolution
            result, resolution = _cancel(cursor, job_id, job)
            return result
        def stands(was: LockedJob, now: LockedJob) -> bool:
            # What runs now may have been claimed since: it is asked to end in
            # any case, and to ask twice does no harm.
            return now.state is State.CANCELLED
        result = self._on_one(job_id, act, stands)
        resolver = DependentsResolver(self.database)
        resolver.add(resolution)
        # It is cancelled: if this fails, the workers do the rest.
        with contextlib.suppress(Problem):
            resolver.run(math.inf)
        return result

    def revive(self, job_id: str, name: str, retries: int = 1,
               reset: bool = False) -> ActionResult:
        """Puts a job back by the transition `name`, which is retry or revive.

        It is due now, or blocked while it has to wait for others. It keeps its
        attempts, and a dead one gets `retries` more runs; `reset` counts anew.
        """
        counting = self._counting(retries, reset)
        def act(cursor: Cursor, job: LockedJob) -> ActionResult:
            return _revive(cursor, job_id, job, name, counting)
        def stands(was: LockedJob, now: LockedJob) -> bool:
            # It may have run since, and be where it was.
            return now.state is not was.state or now.runs > was.runs
        return self._on_one(job_id, act, stands, _lock_with_parents)

    def _counting(self, retries: int, reset: bool) -> Counting:
        """Returns how a revived job's attempts are counted from now on."""
        if reset:
            return Counting(None, 0)
        # One that did not die by running keeps the runs that are left to it.
        # The state that this asks for is the one it had: `move` sets it last.
        granted = Sql(
            "IF((state <> 'dead' OR reason = 'dependency') "
            "AND attempts < COALESCE(max_attempts, max_retries + 1, %s), "
            "max_attempts, attempts + %s)",
            [self.max_retries + 1, retries])
        return Counting(granted, Sql("attempts"))

    def revive_dependents(self, job_ids: Sequence[str]) -> Iterator[ActionResult]:
        """Puts back what died with these jobs, and what died with that.

        The parents come first: while one is dead, its children cannot come
        back.
        """
        parents = collections.deque(job_ids)
        # Another parent of theirs is still dead, and may be on its way.
        refused: dict[str, ActionResult] = {}
        while parents:
            children = self.rows(
                str,
                f"""
                SELECT jobs.id FROM {PARENTS_SQL} JOIN jobs ON jobs.seq = child
                 WHERE parents.id = %s AND jobs.state = 'dead'
                       AND jobs.reason = 'dependency'
                 ORDER BY child
                """, parents.popleft())
            for child in children:
                result = self.revive(child, "revive")
                if result.ok:
                    parents.append(child)
                    refused.pop(child, None)
                    yield result
                else:
                    refused[child] = result
        yield from refused.values()

    def limit(self, name: str, what: str, value: object) -> None:
        """Sets `max_running` or `paused_at` of a queue; None takes it away."""
        self.database.run(
            f"""
            INSERT INTO queues (name, {what}) VALUES (%s, %s)
                ON DUPLICATE KEY UPDATE {what} = VALUES({what}),
                   touched = touched + 1
            """, name, value)

    def set_config(self, key: str, value: str | None) -> None:
        """Stores one setting; None removes it."""
        if value is None:
            self.database.run("DELETE FROM config WHERE `key` = %s", key)
            return
        self.database.run(
            """
            INSERT INTO config (`key`, value) VALUES (%s, %s)
                ON DUPLICATE KEY UPDATE value = VALUES(value),
                   changed_at = UTC_TIMESTAMP(6)
            """, key, value)

    # -- a verb on one job

    def _on_one(self, job_id: str, act: Act, stands: Stands,
                lock: Lock | None = None) -> ActionResult:
        """Locks one job, and returns what came of `act`.

        `lock` locks what it needs beside the job's own row.

        A COMMIT's answer may be lost. Then `stands` says, from the row as it
        was and as it is, whether what was done stands; where it does not, or
        nobody can tell, it is done again.
        """
        nothing = ActionResult(job_id, False, None, no_such_job(job_id).what)
        # Each try notes the row as it was, and what came of it. Only the last
        # can be the one whose COMMIT was not answered.
        tries: list[tuple[LockedJob, ActionResult]] = []
        def work(cursor: Cursor) -> ActionResult:
            """Does what the job's state allows."""
            job = (lock or _lock_job)(cursor, job_id)
            if not job:
                return nothing
            result = act(cursor, job)
            tries.append((job, result))
            return result
        def verify(cursor: Cursor) -> ActionResult | None:
            """Returns what the last try did, if it stands."""
            now = _lock_job(cursor, job_id)
            if not now or not tries:
                return None
            was, result = tries[-1]
            return result if result.ok and stands(was, now) else None
        # What cannot be an id is not asked for: the server might refuse it.
        if not NAME.fullmatch(job_id):
            return nothing
        try:
            return self.database.transact(work, verify)
        except RowRefused:
            # Its unique key is in use by now: a living job has it alone.
            return self._key_conflict(job_id)

    def _key_conflict(self, job_id: str) -> ActionResult:
        """Returns why a job cannot come back: another has its unique key."""
        [found] = self.database.records(
            KeyConflict,
            """
            SELECT jobs.state, jobs.unique_key, other.id AS holder
              FROM jobs
              LEFT JOIN jobs AS other ON other.live_key = jobs.unique_key
             WHERE jobs.id = %s
            """, job_id)
        error = (f"job {job_id} stays {found.state}: "
                 f"key {found.unique_key} is held by job {found.holder}")
        return ActionResult(job_id, False, found.state, error)

def _lock_job(cursor: Cursor, job_id: str) -> LockedJob | None:
    """Locks a job's row, and returns it; None: there is none."""
    found = cursor.rows(
        lambda seq, state, runs: LockedJob(seq, State(state), runs),
        "SELECT seq, state, runs FROM jobs WHERE id = %s FOR UPDATE", job_id)
    return found[0] if found else None

def _lock_with_parents(cursor: Cursor, job_id: str) -> LockedJob | None:
    """Locks a job's row, and before it those of the jobs that it waits for.

    A parent is either settled before that, and we see its end; or it is settled
    later, and finds its child blocked. Parents come first, as their seqs do:
    whoever settles one locks in this order, too.
    """
    parents = cursor.rows(
        int, "SELECT parent FROM dependencies JOIN jobs ON seq = child "
        "WHERE id = %s", job_id)
    if parents:
        # Shared: two of its children may come back at the same moment.
        cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (PRIMARY) WHERE seq IN %s "
            "ORDER BY seq LOCK IN SHARE MODE", parents)
    return _lock_job(cursor, job_id)

# -- what a verb does

def _cancel(cursor: Cursor, job_id: str,
            job: LockedJob) -> tuple[ActionResult, Resolution]:
    """Cancels a job that we have locked, or asks for that.

    Returns beside the result what it has left of the job's dependents.
    """
    if job.state is State.PROCESSING:
        _ask_to_end(cursor, job)
        asked = ActionResult(job_id, True, job.state, None,
                             "is running: its worker ends it")
        return asked, Resolution()
    rule = TRANSITIONS["cancel"]
    if job.state not in rule.leaves:
        error = f"job {job_id} is {job.state}: nothing to cancel"
        return ActionResult(job_id, False, job.state, error), Resolution()
    move(cursor, "cancel", [job.seq],
         reason=Reason.CANCELLED,
         finished_at=NOW_SQL,
         next_run_at=NOT_LATER_SQL)
    # What needs it to complete dies with it; what needs its end may run.
    resolution = release_children(cursor, dependents_of([job.seq]))
    return ActionResult(job_id, True, rule.to, None, "is cancelled"), resolution

def _ask_to_end(cursor: Cursor, job: LockedJob) -> None:
    """Notes that a running job is to be cancelled: its worker will see it."""
    # Its state stays: whoever settles the run carries the cancel out. The time
    # of the first request is kept.
    cursor.execute(
        """
        UPDATE jobs FORCE INDEX (PRIMARY)
           SET cancel_requested_at = COALESCE(cancel_requested_at,
                                              UTC_TIMESTAMP(6))
         WHERE seq = %s AND state = 'processing'
        """, (job.seq,))

def _revive(cursor: Cursor, job_id: str, job: LockedJob, name: str,
            counting: Counting) -> ActionResult:
    """Puts back a job that we have locked, if it may and can run again."""
    rule = TRANSITIONS[name]
    if job.state not in rule.leaves:
        only = " or ".join(one for one in State if one in rule.leaves)
        error = (f"job {job_id} is {job.state}: "
                 f"only {only} jobs can be put back")
        return ActionResult(job_id, False, job.state, error)
    unmet = _unmet_parents(cursor, job.seq)
    for parent in unmet:
        if parent.hopeless:
            error = _waits_in_vain(job_id, parent, roots_of(cursor, job.seq))
            return ActionResult(job_id, False, job.state, error)
    to = State.BLOCKED if unmet else rule.to
    # MySQL assigns from left to right: what max_attempts is made of must be
    # read before anything else is set.
    move(cursor, name, [job.seq],
         to=to,
         max_attempts=counting.max_attempts,
         attempts=counting.attempts,
         losses=0,
         next_run_at=NOW_SQL)
    cursor.execute("DELETE FROM dlq WHERE job_seq = %s", (job.seq,))
    return ActionResult(job_id, True, to, None, f"is {to} again")

def _waits_in_vain(job_id: str, parent: UnmetParent,
                   roots: Sequence[HopelessParent]) -> str:
    """Returns why a job cannot come back, and the command that helps."""
    return (f"job {job_id} waits for {parent.id}, which is {parent.state}: "
            f"{bring_back(roots)} brings all back")

def _unmet_parents(cursor: Cursor, seq: int) -> list[UnmetParent]:
    """Returns the jobs that this one still waits for."""
    return cursor.records(
        UnmetParent,
        f"""
        SELECT {HOPELESS_SQL} AS hopeless, parents.id, parents.state
          FROM {PARENTS_SQL}
         WHERE child = %s AND NOT {MET_SQL} {cursor.share}
        """, seq)


# ---- doorbell ----------------------------------------------------------------
#
# MySQL has no NOTIFY. A supervisor with a free slot parks a sleep on a
# connection of its own; who has something for it finds that sleep in the
# server's process list and ends it by KILL QUERY. The connection does nothing
# else, so nothing else can be hit. This is for speed alone: where it cannot
# work (a proxy, another account, a cluster's other node) the poll finds the
# work.

DOORBELL = "queuectl doorbell"
# A sleep outlives its killed client by so many seconds at most.
PARKED_S = 10
# A parked sleep, as the process list shows it: with the id of the worker that
# it wakes, and the queues which that one serves, "-" for all of them.
PARKED = re.compile(
    rf"SELECT SLEEP\({PARKED_S}\) /\* {DOORBELL} (\S+) (\S+) \*/")

class ParkedSleep(NamedTuple):
    """A sleep that is parked in the server, and whom its end wakes."""
    connection: int
    worker: str
    queues: frozenset[str]  # {"-"}: all of them

    def serves(self, queues: Collection[str]) -> bool:
        """Returns whether it wakes who serves one of these, if there are any."""
        if not queues or self.queues == {"-"}:
            return True
        return not self.queues.isdisjoint(queues)

OLDER_PROCESS_LIST = "information_schema.processlist"

def _process_list(database: Database) -> str:
    """Returns the table of the server's connections and their statements."""
    if database.mariadb:
        return OLDER_PROCESS_LIST
    # The newer one came with 8.0.22. MySQL deprecates the older, which holds
    # up all connections while it is read.
    if release_of(database.version) < [8, 0, 22]:
        return OLDER_PROCESS_LIST
    return "performance_schema.processlist"

def _parked_sleeps(cursor: Cursor, process_list: str) -> list[ParkedSleep]:
    """Returns the sleeps that are parked in this database."""
    def parked(connection: int, statement: str | None) -> ParkedSleep | None:
        """Returns what a row of the process list stands for."""
        # What is merely like ours is left alone.
        match = PARKED.fullmatch(statement or "")
        if not match:
            return None
        worker, queues = match.groups()
        return ParkedSleep(connection, worker, frozenset(queues.split(",")))

    rows = cursor.rows(
        parked,
        f"SELECT id, info FROM {process_list} "
        "WHERE db = DATABASE() AND info LIKE %s OR id = CONNECTION_ID()",
        f"SELECT SLEEP(%) /* {DOORBELL} %")
    # Not even we are in the list: performance_schema is switched off.
    if not rows and process_list != OLDER_PROCESS_LIST:
        return _parked_sleeps(cursor, OLDER_PROCESS_LIST)
    return [sleep for sleep in rows if sleep]

def _end_sleep(cursor: Cursor, connection: int) -> None:
    cursor.execute("KILL QUERY %s", (connection,))

def ring(database: Database, count: int = sys.maxsize,
         queues: Collection[str] = (), worker: str = "") -> None:
    """Wakes up to `count` idle supervisors, and one more, lest one be dead.

    With `queues` it wakes those that serve one of them, with `worker` the one
    that has this worker, and else any. It never fails: whoever is not woken
    finds the work by its poll.
    """
    def find(cursor: Cursor) -> list[ParkedSleep]:
        """Returns the sleeps that may be ended."""
        # Only now, with a connection, is the server's version known.
        sleeps = _parked_sleeps(cursor, _process_list(database))
        if worker:
            sleeps = [sleep for sleep in sleeps if sleep.worker == worker]
        return [sleep for sleep in sleeps if sleep.serves(queues)]

    sleeps = database.attempt(find) or []
    # Those who ring at the same time are not all to end the same sleep.
    random.shuffle(sleeps)
    for sleep in sleeps[:count + 1]:
        end_it = functools.partial(_end_sleep, connection=sleep.connection)
        database.attempt(end_it)

def say_nothing(text: str) -> None:
    """Stands in for `say` where somebody else meets and tells the same."""

class Doorbell:
    """A thread that parks a sleep when told to, and says when it was ended."""
    def __init__(self, target: ConnectionInfo, note: str,
                 rung: Callable[[], None], route: Route | None = None,
                 find_target: Callable[[], ConnectionInfo | None] | None = None,
                 ) -> None:
        """Starts the thread, which calls `rung` whenever it was rung.

        `note` is the worker's id and its queues, as in PARKED. With `route`
        the sleep is parked on the host that the worker itself uses;
        `find_target` is asked where the server refuses the account.
        """
        # The server answers when the sleep is over, and not before.
        policy = RetryPolicy(
            retry_for_s=math.inf,
            timeout_s=1.5 * PARKED_S,
            say=say_nothing)
        self._database = Database(target, policy, route=route)
        self._database.find_target = find_target
        self._note = f"{DOORBELL} {note}"
        self._rung = rung
        self._wanted = threading.Event()
        thread = threading.Thread(target=self._keep_parked, daemon=True)
        thread.start()

    def park(self) -> bool:
        """Has a sleep parked from now until it is rung.

        Returns False if one is parked already.
        """
        if self._wanted.is_set():
            return False
        self._wanted.set()
        return True

    def use_target(self, target: ConnectionInfo) -> None:
        """Has the next sleep be parked there."""
        self._database.target = target

    def leave(self) -> None:
        """Lets the sleep that is parked be the last."""
        self._wanted.clear()

    def _keep_parked(self) -> None:
        """Parks one sleep after the other, while any is wanted."""
        # A Problem ends the thread: the worker meets it too, and says so.
        with contextlib.suppress(Problem):
            while self._wanted.wait():
                ended_early = self._database.sleep(PARKED_S, self._note)
                if ended_early:
                    # Cleared first: who is told so may park anew at once.
                    self._wanted.clear()
                    self._rung()


# ---- OS processes ------------------------------------------------------------
#
# The only room that signals, reaps, or reads /proc. What it ends it pins by a
# descriptor where the kernel has them, and then looks at once more, so that no
# stranger is hit who was given the number of a process that is gone; a child of
# ours keeps its number until we reap it. Who ends what: a worker its runs; its
# supervisor, the guardian, or a new worker those of a dead one, by their run
# tags; a supervisor its children; `worker stop` whoever holds the PID file; `db
# stop` the private server. It finds
# what belongs to a run by the session, and by the run tag in the environment
# that all its processes inherit. Without a /proc it ends process groups alone.

# How often we look whether what was signalled is gone.
END_CHECK_S = 0.05
# It holds <token>-<seq>, the run tag, in the environment of all that a run
# starts.
RUN_TAG_VARIABLE = "QUEUECTL_RUN"
RUN_TAG_PREFIX = f"{RUN_TAG_VARIABLE}=".encode()

# -- children

def reap() -> Iterator[tuple[int, int]]:
    """Yields each ended child, adopted or not: pid, and status or -signal."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)

def has_adopted(shells: Collection[int]) -> bool:
    """Returns whether we have other children than these; True if unseen.

    Whoever loses its parent below us becomes our child. So without others
    nothing of a shell that ended is left below us.
    """
    pid = os.getpid()
    try:
        with open(f"/proc/self/task/{pid}/children", "rb") as file:
            children = file.read().split()
    # Not Linux, or a kernel that does not list them.
    except OSError:
        return True
    return any(int(child) not in shells for child in children)

# From <sys/prctl.h>.
PR_SET_CHILD_SUBREAPER = 36

def become_subreaper() -> None:
    """Has orphans below us become our children, where the kernel can."""
    if sys.platform == "linux":
        # Nothing else needs it, and to import it takes a while.
        import ctypes
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

# A job's score is so much above its worker's.
JOB_OOM_SCORE_ADDED = 500
OOM_SCORE_MAX = 1000

class OomScore:
    """Our oom_score_adj: how readily the kernel kills us for want of memory.

    Whatever we spawn inherits it, so it is raised for that moment: then the
    kernel kills a job, and not the worker with all its jobs. Where there is no
    such score, nothing happens.
    """
    def __init__(self) -> None:
        """Reads the score that we have."""
        self._handle = -1
        self._own = self._raised = b"0"
        # Not Linux, or a /proc that is read-only.
        with contextlib.suppress(OSError, ValueError):
            self._handle = os.open("/proc/self/oom_score_adj", os.O_RDWR)
            own = int(os.read(self._handle, 16))
            raised = min(own + JOB_OOM_SCORE_ADDED, OOM_SCORE_MAX)
            self._own = b"%d" % own
            self._raised = b"%d" % raised

    def raise_for_job(self) -> None:
        """Sets the score that a job is to inherit."""
        self._set(self._raised)

    def restore(self) -> None:
        """Sets the score that we had."""
        self._set(self._own)

    def _set(self, score: bytes) -> None:
        if self._handle >= 0:
            # Some sandboxes let nobody write it: a job runs all the same.
            with contextlib.suppress(OSError):
                os.pwrite(self._handle, score, 0)

# -- a process apart

def fork_apart(name: str, kept: Collection[int], ignored: Collection[int],
               work: Callable[[], object]) -> None:
    """Has a process of this name do `work`, which no kill of our group hits.

    Nor does one of our children: it is none of them, unless we are a
    subreaper. It has a session of its own, ignores the signals `ignored`, and
    has of our descriptors `kept` alone. Raises OSError if the host has no
    process to spare.
    """
    # Until it ignores them, it would pass them on by the pipe that wakes us.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
    try:
        between = os.fork()
        if not between:
            _fork_once_more(name, kept, ignored, work)
        _, status = os.waitpid(between, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if status:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

def _fork_once_more(name: str, kept: Collection[int], ignored: Collection[int],
                    work: Callable[[], object]) -> NoReturn:
    """Leaves the session, forks the process that is to do `work`, and ends."""
    status = 1
    try:
        os.setsid()
        if not os.fork():
            signal.set_wakeup_fd(-1)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            _keep_only(kept)
            # A directory in use could not be unmounted.
            os.chdir("/")
            # For people: so it stands in what ps and top list.
            with contextlib.suppress(OSError), \
                    open("/proc/self/comm", "w") as file:
                file.write(name)
            work()
        status = 0
    finally:
        # It never returns into its parent's stack.
        os._exit(status)

def _keep_only(kept: Collection[int]) -> None:
    """Closes all descriptors but these; the first three are the null device's."""
    null = os.open(os.devnull, os.O_RDWR)
    for handle in range(3):
        os.dup2(null, handle)
    handles: Iterable[str | int] = range(3, 1024)
    if os.path.isdir("/dev/fd"):
        handles = os.listdir("/dev/fd")
    for name in handles:
        handle = int(name)
        if handle > 2 and handle not in kept:
            # It is closed by now if the listing itself had it open.
            with contextlib.suppress(OSError):
                os.close(handle)

# -- signals

@contextlib.contextmanager
def open_pidfd(pid: int) -> Iterator[int]:
    """Gives a descriptor of a process, -1 where the kernel has none.

    While it is open, the descriptor stands for this one process and no other.
    ProcessLookupError if there is no such process.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    # A kernel before 5.3, a sandbox that forbids it, or not Linux.
    except (OSError, AttributeError):
        handle = -1
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)

def send_signal(pid: int, number: int, handle: int = -1) -> None:
    """Signals a process, by its descriptor if there is one.

    It may be gone already. Raises a Problem if it belongs to another user.
    """
    try:
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        # What was wanted of it has come about.
        pass
    except PermissionError:
        raise Problem(
            f"process {pid} belongs to another user",
            "try again as that user or as root") from None

def signal_group(group: int, number: int) -> None:
    """Signals a process group.

    Raises ProcessLookupError or PermissionError if it cannot. Only for a group
    whose leader is a child of ours that was not reaped yet: until then its
    number can belong to nobody else.
    """
    os.killpg(group, number)

def group_exists(group: int) -> bool:
    """Returns whether a process group has members, be they zombies."""
    return _exists(-group)

def is_alive(pid: int) -> bool:
    """Returns whether a process is there; reaps it if it is an ended child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return _exists(pid)

def _exists(target: int) -> bool:
    """Returns whether a process is there, or with -PID a group; zombies are."""
    try:
        os.kill(target, 0)
    except OSError as error:
        # It is there, and another user's.
        return error.errno == errno.EPERM
    return True

# -- what /proc says

class ProcessStat(NamedTuple):
    """What /proc/PID/stat says of a living process."""
    group: int
    session: int
    started: str  # in ticks since the boot

def _read_stat(pid: int) -> ProcessStat:
    """Returns what /proc says of a process; OSError if it has ended."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read()
    # The second field is the program's name in parentheses, which may hold
    # blanks and parentheses itself. So `fields` begins with the third of
    # proc(5), the state.
    fields = text.rpartition(b") ")[2].split()
    # A zombie, or one that is being removed, has ended.
    if not fields or fields[0] in (b"Z", b"X"):
        raise ProcessLookupError
    return ProcessStat(
        group=int(fields[2]),
        session=int(fields[3]),
        started=fields[19].decode())

class ProcessInfo(NamedTuple):
    """A living process: what it belongs to."""
    group: int
    session: int
    # QUEUECTL_RUN=<token>-<seq> from its environment; empty if it has none.
    tag_entry: bytes

def read_process(pid: int) -> ProcessInfo | None:
    """Returns what /proc says of a process; None if it has ended."""
    try:
        stat = _read_stat(pid)
        environment = b""
        # It is another user's, or its program changed its user: then its
        # session alone says what it belongs to.
        with contextlib.suppress(PermissionError), \
                open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
    except OSError:
        return None
    tag_entry = b""
    for entry in environment.split(b"\0"):
        if entry.startswith(RUN_TAG_PREFIX):
            tag_entry = entry
            break
    return ProcessInfo(stat.group, stat.session, tag_entry)

def has_file_open(pid: int, path: str) -> bool:
    """Returns whether a process has this file open; True if we may not see."""
    try:
        wanted = os.stat(path)
        handles = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return True
    for name in handles:
        # It may have closed this one since.
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if os.path.samestat(found, wanted):
                return True
    return False

def process_identity(pid: int) -> str:
    """Returns boot, PID namespace and start time; "" where they are not seen.

    With them a pid stands for one process: alone, it is given out again.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = _read_stat(pid).started
    except OSError:
        return ""
    return f"{boot}/{namespace}/{started}"

def is_gone(pid: int, identity: str) -> bool:
    """Returns whether a process of this boot and this PID namespace has ended.

    False for any other process: what became of it cannot be seen from here.
    """
    own = process_identity(os.getpid())
    own_place, _, _ = own.rpartition("/")
    place, _, started = identity.rpartition("/")
    if not own or place != own_place:
        return False
    try:
        return _read_stat(pid).started != started
    # Its entry says that it has ended, and only waits to be reaped.
    except ProcessLookupError:
        return True
    # That /proc has no entry says nothing: with hidepid, which ProtectProc of
    # systemd sets, it hides the processes of other users.
    except OSError:
        return not _exists(pid)

# -- ending what belongs to a run

class Remains(NamedTuple):
    """What was left of a run."""
    left: int  # so many processes, less those that refused
    pid: int  # one of them; 0: nothing is left
    # One that refused the signal, since it is another user's; 0: none did.
    refused: int

class ProcessTable:
    """Who lives, as one pass over /proc has found it.

    The pass is made when first asked for. All runs that are to end together
    share one: with a pass for each, many would live past their kill_grace.
    """
    @functools.cached_property
    def _processes(self) -> dict[int, ProcessInfo]:
        """All living processes but our own, by pid."""
        names: list[str] = []
        # No /proc here: then the groups alone are ended.
        with contextlib.suppress(OSError):
            names = os.listdir("/proc")
        pids = {int(name) for name in names if name.isdigit()}
        processes = {}
        for pid in pids - {os.getpid()}:
            info = read_process(pid)
            if info:
                processes[pid] = info
        return processes

    @functools.cached_property
    def _by_session(self) -> dict[int, set[int]]:
        """The pids of each session."""
        sessions: dict[int, set[int]] = {}
        for pid, info in self._processes.items():
            sessions.setdefault(info.session, set()).add(pid)
        return sessions

    @functools.cached_property
    def _by_tag(self) -> dict[bytes, set[int]]:
        """The pids of those that carry the same run tag."""
        tagged: dict[bytes, set[int]] = {}
        for pid, info in self._processes.items():
            tagged.setdefault(info.tag_entry, set()).add(pid)
        return tagged

    def session_left_by(self, shell: int) -> int:
        """Returns the session of a shell that was reaped; 0 if it is another's.

        The kernel keeps the number while somebody is left in the session. Then
        it may give it to a new process, which may begin a session in turn.
        """
        return 0 if shell in self._processes else shell

    def signal(self, run_tag: str, session: int, number: int,
               but_group: int = 0) -> Remains:
        """Signals what is left of a run, or with `number` 0 only looks.

        To the run belong its session, what carries its tag, and the sessions
        of that. A group that has had this signal already is passed over.
        """
        tag_entry = RUN_TAG_PREFIX + run_tag.encode()
        tagged = self._by_tag.get(tag_entry, set())
        sessions = {self._processes[pid].session for pid in tagged}
        sessions.add(session)
        # 0 is no session that we could know: the kernel's threads have it. And
        # ours is the worker's, even where a worker is itself part of a job.
        sessions -= {0, os.getsid(0)}

        def to_signal(info: ProcessInfo) -> bool:
            """Whether a process is of the run, and was not signalled yet."""
            if but_group and info.group == but_group:
                return False
            return info.tag_entry == tag_entry or info.session in sessions

        pids = set(tagged)
        for one in sessions:
            pids |= self._by_session.get(one, set())
        refused = 0
        if number:
            for pid in set(pids):
                if not _signal_if(pid, number, to_signal):
                    pids.discard(pid)
                    refused = pid
        return Remains(len(pids), min(pids, default=0), refused)

def _signal_if(pid: int, number: int,
               to_signal: Callable[[ProcessInfo], bool]) -> bool:
    """Signals a process if it is one `to_signal`; False if it refused."""
    with contextlib.suppress(ProcessLookupError), open_pidfd(pid) as handle:
        # The number may have passed to a stranger since the table was made.
        # From here on the descriptor stands for whom we look at now.
        info = read_process(pid)
        if info and to_signal(info):
            try:
                send_signal(pid, number, handle)
            except Problem:
                return False
    return True

# What KILL has not ended after so long is stuck in the kernel, most often in a
# disk or a mount that does not answer.
KILL_WAIT_S = 1.0

class OrphanedRuns:
    """What dead workers left of their runs, while it is being ended.

    It gets TERM and, when its grace is over, KILL. Each step is one pass over
    /proc for all of them together.
    """
    def __init__(self) -> None:
        # By run tag: when KILL is due.
        self._kill_at: dict[str, float] = {}

    def end(self, run_tags: Iterable[str], grace_s: float) -> dict[str, int]:
        """Brings the end of these runs a step further; others are forgotten.

        Returns those of which something is left, each with a process of it.
        `grace_s` is for runs that were not there in the step before. It does
        not wait.
        """
        now = time.monotonic()
        process_table = ProcessTable()
        kill_at = {}
        left = {}
        for run_tag in run_tags:
            # TERM is sent once, since twice means "now" to many programs; KILL
            # is sent until nothing is left, since who lives may fork.
            number = 0
            if run_tag not in self._kill_at:
                number = int(signal.SIGTERM)
            elif now >= self._kill_at[run_tag]:
                number = int(signal.SIGKILL)
            # They are no children of ours whose session we knew: 0.
            remains = process_table.signal(run_tag, 0, number)
            if remains.left:
                left[run_tag] = remains.pid
                kill_at[run_tag] = self._kill_at.get(run_tag, now + grace_s)
        self._kill_at = kill_at
        return left

    def end_all(self, run_tags: Sequence[str], grace_s: float,
                kill_wait_s: float = KILL_WAIT_S) -> dict[str, int]:
        """Ends these runs; returns those that go on, each with a process of it.

        It waits for them as long as `grace_s`, and `kill_wait_s` more: what
        had as long as that in an earlier call is not waited for.
        """
        left = {}
        # A pass over /proc has its price.
        if run_tags:
            left = self.end(run_tags, grace_s)
        while left:
            until = max(self._kill_at.values()) + kill_wait_s
            if time.monotonic() >= until:
                break
            time.sleep(END_CHECK_S)
            left = self.end(left, grace_s)
        return left


# ---- runs --------------------------------------------------------------------
#
# One shell command: its output, its time limit, its end. There is one way to
# end a run, whatever the cause: TERM to all that belongs to it, kill_grace,
# KILL, until nothing of it is left. Nothing here waits or sleeps: the worker's
# loop calls when a pipe is readable, a child has ended, or a deadline is over.

# -- output

# As much as a pipe holds by default.
READ_BYTES = 65536
# After what a run writes first, output is flushed soon: many say at once what
# is wrong with them. Then it is flushed at intervals that the database can
# bear from many runs.
FIRST_FLUSH_S = 0.05
NEXT_FLUSH_S = 1.0
# While a run goes on, and FOLLOWED_S after its end, its row has the last part of
# its output at so many times the limit.
FOLLOWED_LIMITS = 4
# How many reads empty a pipe: the largest that an ordinary user can make holds
# 1 MiB, and this is twice as much.
LAST_READS = 32

class OutputBuffer:
    """The first and the last bytes of a stream, `limit` in all, the cut marked.

    For those who follow it, FOLLOWED_LIMITS times that is there: they lose
    nothing even if they miss a flush.
    """
    def __init__(self, limit: int) -> None:
        self.total = 0  # bytes, kept or not
        self._limit = limit
        self._head_max = limit // 2
        self._head = bytearray()
        self._tail = bytearray()

    @property
    def _followed_max(self) -> int:
        """How many bytes of the last part are there for those who follow."""
        return FOLLOWED_LIMITS * self._limit

    def add(self, data: bytes) -> None:
        """Takes the next bytes of the stream."""
        self.total += len(data)
        room = self._head_max - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        # What is too old is deleted now and then, not with each read: that
        # would move the rest each time.
        most = self._followed_max
        if len(self._tail) > most + 2 * READ_BYTES:
            # One byte more than is needed: with a limit of 0, [:-0] would
            # delete nothing.
            del self._tail[:-most - 1]

    # Let the limit be 200, and 1000 bytes be written, so that the cut mark has
    # 55: the head is bytes 0 to 99.
    #
    #     kept()       0..99, mark, 955..999   in all 200
    #     to_follow()  0..99, mark, 255..999   the mark and 745 are 4 * 200
    #
    # The mark counts as part of the tail. Let the limit be 10, and 30 bytes be
    # written: the head is bytes 0 to 4, and the mark has more bytes than the 5
    # that a tail may have.
    #
    #     kept()       0..4, mark              the mark is never cut
    #     to_follow()  0..29                   no more than 5 + 4 * 10: no cut

    def kept(self) -> bytes:
        """Returns what is kept: all, or head, cut mark and tail."""
        return self._with_tail(self._limit - self._head_max)

    def to_follow(self) -> bytes:
        """Returns what those need who follow the run; b"" if they need no more."""
        if self.total <= self._limit:
            return b""
        return self._with_tail(self._followed_max)

    def _with_tail(self, tail_max: int) -> bytes:
        """Returns all, or the head and `tail_max` bytes of cut mark and tail."""
        if self.total <= self._head_max + tail_max:
            return bytes(self._head + self._tail)
        mark = cut_mark(self.total)
        room = tail_max - len(mark)
        # Without the test, [-0:] would be all of it.
        tail = self._tail[-room:] if room > 0 else b""
        return bytes(self._head + mark + tail)

class OutputPipe:
    """Our end of a run's pipe, what came of it, and what of that was flushed.

    `handle` is -1 while it is closed. `flush_at` says when there is something
    to flush; infinite: nothing new has come.
    """
    def __init__(self, limit: int) -> None:
        """Keeps `limit` bytes of what comes; `open` makes the pipe."""
        self.handle = -1
        self.buffer = OutputBuffer(limit)
        self.flush_at = math.inf
        self._flushed_bytes = 0

    @property
    def unflushed_bytes(self) -> int:
        """How many bytes have come since the last flush."""
        return self.buffer.total - self._flushed_bytes

    def open(self) -> int:
        """Makes the pipe; returns the end that a run writes to; OSError."""
        self.handle, write_end = os.pipe()
        os.set_blocking(self.handle, False)
        return write_end

    def read(self) -> bool:
        """Takes some of what the pipe holds; returns False at its end."""
        try:
            data = os.read(self.handle, READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        if math.isinf(self.flush_at):
            pause_s = NEXT_FLUSH_S if self.buffer.total else FIRST_FLUSH_S
            self.flush_at = time.monotonic() + pause_s
        self.buffer.add(data)
        return True

    def close(self) -> None:
        """Takes what is still in the pipe, and closes it."""
        # What was written before the shell's end is in there: at most the
        # pipe's capacity. There is a bound because what it left running may
        # hold the pipe open, and write for ever.
        for _ in range(LAST_READS):
            before = self.buffer.total
            if not self.read() or self.buffer.total == before:
                break
        os.close(self.handle)
        self.handle = -1

    def flush(self) -> bool:
        """Counts all that came as flushed; returns whether any was new."""
        self.flush_at = math.inf
        if not self.unflushed_bytes:
            return False
        self._flushed_bytes = self.buffer.total
        return True

    def put_off_flush(self) -> None:
        """Has it flushed again: what was flushed last has not arrived."""
        self._flushed_bytes = 0
        self.flush_at = time.monotonic() + NEXT_FLUSH_S

# -- starting

SHELL = b"/bin/sh"
# A job's directory may lie on a mount that hangs, so nothing but the job's own
# process ever touches it. A shell of this script changes into $1 and becomes
# the one that runs the command $2; where it cannot, it says so on descriptor 3,
# which the command never has. OLDPWD would name the worker's directory, of
# which the job knows nothing.
ENTER_DIRECTORY = b"""
if command cd -P -- "$1" 2> /dev/null
then
    unset OLDPWD
    exec /bin/sh -c "$2" 3>&-
fi
why='it is not there, or this account may not see it'
if [ -d "$1" ]; then why='this account may not enter it'
elif [ -e "$1" ]; then why='it is not a directory'
fi
echo "$QUEUECTL_RUN $why" >&3
exit 126
"""
ENTRY_FAILURES = 3

class EntryFailures:
    """Why shells could not change into their directories, as they tell it.

    All shells of a worker share one pipe: a line is shorter than what a pipe
    takes in one piece. A shell has told before it ends.
    """
    def __init__(self) -> None:
        """Makes the pipe."""
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._told = b""

    def take(self, run_tag: str) -> str:
        """Returns why the shell of this run could not; "" if it could.

        It is asked once the shell has ended.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                self._told += os.read(self._read_end, READ_BYTES)
        why = ""
        left = []
        for line in self._told.splitlines(keepends=True):
            tag, _, reason = line.decode().partition(" ")
            if tag == run_tag:
                why = reason.strip()
            else:
                left.append(line)
        self._told = b"".join(left)
        return why

class JobSpawner:
    """What each run starts from: environment, score, and where a start fails."""
    def __init__(self, variables: Mapping[bytes, bytes]) -> None:
        """Takes our environment, of which jobs inherit what is not private."""
        self._entry_failures = EntryFailures()
        self._environment = {}
        for name, value in variables.items():
            if not PRIVATE_VARIABLE.fullmatch(os.fsdecode(name)):
                self._environment[name] = value
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._oom_score = OomScore()
        _keep_descriptors_from_jobs()

    def spawn(self, command: bytes, cwd: bytes, output: int,
              variables: Mapping[bytes, bytes]) -> int:
        """Starts a shell for `command` in its own session; returns its pid.

        Raises OSError or ValueError if it cannot. Without `cwd` the command
        runs in our directory. The shell inherits its score from us, who have
        it just for that moment: so posix_spawn can do it, which in Python 3.9
        is twice as fast as Popen.
        """
        argv = [SHELL, b"-c", command]
        file_actions = [
            (os.POSIX_SPAWN_DUP2, self._null, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        if cwd:
            folder = _unmistakable(cwd)
            argv = [SHELL, b"-c", ENTER_DIRECTORY, SHELL, folder, command]
            write_end = self._entry_failures.write_end
            tells = (os.POSIX_SPAWN_DUP2, write_end, ENTRY_FAILURES)
            file_actions.append(tells)
        try:
            self._oom_score.raise_for_job()
            return os.posix_spawn(
                SHELL,
                argv,
                {**self._environment, **variables},
                file_actions=file_actions,
                setsid=True,
                setsigmask=(),
                # Python ignores SIGXFSZ, and what is ignored is inherited;
                # what has a handler is reset by itself.
                setsigdef=(signal.SIGXFSZ,))
        finally:
            self._oom_score.restore()

    def entry_failure(self, run_tag: str, cwd: str) -> str:
        """Returns why a run's shell did not get into `cwd`; "" if it did.

        It is asked once that shell has ended.
        """
        why = self._entry_failures.take(run_tag)
        if not why:
            return ""
        folder = excerpt(cwd, 200)
        host = socket.gethostname()
        return f"cannot change into {folder}: {why}, on {host}"

def check_spawning() -> None:
    """Raises a Problem where this Python cannot start jobs, as PyPy cannot."""
    if not hasattr(os, "posix_spawn"):
        raise Problem(
            f"this Python ({sys.executable}) cannot start jobs: it has no "
            "posix_spawn",
            "run workers by CPython, 3.9 or later",
            UNAVAILABLE)

def _unmistakable(folder: bytes) -> bytes:
    """Returns the path as `cd` takes it for a path, and looks nowhere else.

    "-" is another directory to it, and CDPATH tells where to look for "a".
    """
    if folder.startswith(b"/"):
        return folder
    return b"./" + folder

def _keep_descriptors_from_jobs() -> None:
    """Has jobs inherit nothing of what we were given, but the first three."""
    handles: Iterable[str | int] = range(3, 64)
    if os.path.isdir("/dev/fd"):
        handles = os.listdir("/dev/fd")
    for name in handles:
        handle = int(name)
        # It is closed by now if the listing itself had it open.
        with contextlib.suppress(OSError):
            os.set_inheritable(handle, handle < 3)

# What a start fails with where it is not the job's fault: the host lacks
# descriptors, processes or memory.
HOST_IS_SHORT = (
    errno.EMFILE,  # this process has no descriptor left
    errno.ENFILE,  # nor has the whole host
    errno.EAGAIN,  # no more processes for this user
    errno.ENOMEM,
)

# -- a run

class Phase(enum.Enum):
    """How far a run is from its end.

             started        TERM sent            kill_grace over
        O ----------> RUNNING -----> TERMINATING -----> KILLED
        |                |                |               |
        | not            | the shell      | nothing       | nothing of it is
        | started        | ended, and     | of it is      | left, or it refuses
        |                | well or alone  | left          | the signal
        v                v                v               v
        +----------------+----> GONE <----+---------------+
    """
    RUNNING = enum.auto()
    TERMINATING = enum.auto()  # it was told to end, or what its shell left was
    KILLED = enum.auto()       # KILL is sent as long as something is left
    GONE = enum.auto()         # its outcome can be asked for

@dataclass
class RunTimes:
    """When a run began and ended, and its deadlines.

    All are seconds of the monotonic clock; an infinite one is never reached.
    """
    started: float
    # When its time limit is over; while it ends, when to look at it next.
    check_at: float
    # When its kill_grace is over; infinite until it is told to end.
    kill_at: float = math.inf
    # When its shell ended, as far as that was seen.
    shell_ended: float | None = None

def _run_variables(job: ClaimedJob, run_tag: str) -> dict[bytes, bytes]:
    """Returns what a run has in its environment besides what all runs have.

    Raises ValueError if the job's own variables are no object of strings, as
    somebody's INSERT may have them.
    """
    claim = job.claim
    variables = {
        "QUEUECTL_JOB_ID": claim.id,
        "QUEUECTL_ATTEMPT": str(claim.attempts),
        "QUEUECTL_MAX_ATTEMPTS": str(claim.max_attempts),
        "QUEUECTL_QUEUE": job.queue,
    }
    if job.env:
        own = json.loads(_read_env(job.env))
        variables.update(own)
    # The last word, since the run is found and ended by it.
    variables[RUN_TAG_VARIABLE] = run_tag
    encoded = {}
    for name, text in variables.items():
        encoded[name.encode()] = text.encode()
    return encoded

def uptime_s() -> float:
    """Returns a time in seconds that goes on while the host is suspended.

    Where the kernel has none (only Linux has), it is `time.monotonic()`.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()

class RunningJob:
    """One run of a job: its shell, its pipe, its time limit, and its end.

    `pid` is its shell's until that is reaped: then the kernel may give the number
    to anybody. `cause` says why we end it, None if it ends by itself. `status` is what
    `reap` gave for the shell, None until then. `failure` says why the command
    did not start. `survivor` is the pid of a process that refused our signal.
    """
    def __init__(self, job: ClaimedJob, settings: Settings,
                 spawner: JobSpawner) -> None:
        """Starts the run; if that fails, it is gone at once."""
        now = time.monotonic()
        limit_at = now + job.timeout_s if job.timeout_s else math.inf
        claim = job.claim
        self.job = job
        self.settings = settings
        # What names the run: in a turn, and in its processes' environment.
        self.key = claim.key
        self.run_tag = claim.run_tag
        self.cause: Reason | None = None
        self.status: int | None = None
        self.failure = ""
        self.survivor = 0
        self.phase = Phase.RUNNING
        self.pid = 0
        self._times = RunTimes(started=now, check_at=limit_at)
        self._output = OutputPipe(settings.output_limit)
        self._start(spawner)

    # -- what the loop waits for

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left, as far as we can tell."""
        return self.phase is Phase.GONE

    @property
    def pipe(self) -> int:
        """Our end of its pipe, -1 once that is closed."""
        return self._output.handle

    @property
    def check_at(self) -> float:
        """When to call `tick`."""
        return self._times.check_at

    @property
    def flush_at(self) -> float:
        """When to call `flush`."""
        return self._output.flush_at

    def _start(self, spawner: JobSpawner) -> None:
        """Makes the pipe and starts the shell, or notes why that failed."""
        write_end = -1
        try:
            write_end = self._output.open()
            variables = _run_variables(self.job, self.run_tag)
            command = self.job.command.encode()
            cwd = (self.job.cwd or "").encode()
            self.pid = spawner.spawn(command, cwd, write_end, variables)
        except (OSError, ValueError) as error:
            self.failure = f"{error}, on {socket.gethostname()}"
            self.phase = Phase.GONE
            if isinstance(error, OSError) and error.errno in HOST_IS_SHORT:
                self.cause = Reason.HANDED_BACK
        finally:
            # The pipe ends once nobody has this end, so we must not keep it.
            if write_end >= 0:
                os.close(write_end)

    # -- output

    def read(self) -> bool:
        """Takes some of what the pipe holds; returns False at its end."""
        return self._output.read()

    def close_pipe(self) -> None:
        """Takes what is still in the pipe, and closes it."""
        self._output.close()

    def flush(self) -> Ended | None:
        """Returns the output so far, if there is some that was not flushed."""
        if not self._output.flush():
            return None
        buffer = self._output.buffer
        so_far = RunOutcome(
            None,
            output=buffer.kept(),
            output_bytes=buffer.total,
            to_follow=buffer.to_follow())
        return self.job.claim, so_far

    def put_off_flush(self) -> None:
        """Has the output flushed again: the last flush has not arrived."""
        self._output.put_off_flush()

    # -- ending

    def terminate(self, cause: Reason | None,
                  process_table: ProcessTable) -> None:
        """Begins to end the run, by TERM to all that belongs to it.

        The first cause stands, and so does the end of a shell that ended by
        itself. LOST alone may still become the cause of a run that ends
        without one: it says that nothing of the run is ours to settle.
        """
        if self.gone:
            return
        running = self.phase is Phase.RUNNING
        if running or cause is Reason.LOST:
            self.cause = self.cause or cause
        if running:
            self._send_term(process_table)

    def _send_term(self, process_table: ProcessTable) -> None:
        """Sends TERM once, and sets the deadline of KILL."""
        now = time.monotonic()
        self.phase = Phase.TERMINATING
        self._times.kill_at = now + self.settings.kill_grace
        self._times.check_at = now + END_CHECK_S
        signalled = 0
        if self.status is None:
            # Not reaped yet, so the group's number cannot belong to anybody
            # else. Permission lacks where the shell has become another user's
            # program, say by exec sudo.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal_group(self.pid, signal.SIGTERM)
                # Passed over below: TERM twice means "now" to many programs.
                signalled = self.pid
        session = _session_of(self, process_table)
        remains = process_table.signal(self.run_tag, session, signal.SIGTERM,
                                       signalled)
        # Of a shell that ended by itself nothing else was left.
        if self.status is not None and not any(remains):
            self.phase = Phase.GONE

    def shorten_grace(self, now: float) -> None:
        """Has KILL sent kill_grace from now, if not before."""
        times = self._times
        kill_at = now + self.settings.kill_grace
        times.kill_at = min(times.kill_at, kill_at)
        times.check_at = min(times.check_at, times.kill_at)

    def reaped(self, status: int, process_table: ProcessTable,
               adopted: bool) -> None:
        """Takes the shell's end: the run's too, unless others must go first.

        What a shell leaves running that ended well is a daemon, and lives on.
        What one leaves that failed is ended before the job may run again. It
        may be in another session: `adopted` says whether there is anybody.
        """
        self.status = status
        self._times.shell_ended = time.monotonic()
        if self.phase is not Phase.RUNNING:
            # The next tick looks whether anything is left.
            self._times.check_at = 0.0
        elif status and (adopted or group_exists(self.pid)):
            self.terminate(None, process_table)
        else:
            self.phase = Phase.GONE

    def tick(self, now: float, process_table: ProcessTable) -> None:
        """Acts on the time limit, or brings the end a step further."""
        times = self._times
        if self.gone or now < times.check_at:
            return
        if self.phase is Phase.RUNNING:
            self.terminate(Reason.TIMEOUT, process_table)
            return
        if now >= times.kill_at:
            self.phase = Phase.KILLED
        if self.phase is Phase.KILLED:
            self._kill(process_table)
        elif self.status is None:
            # The shell lives, and its end will wake us: before that there is
            # nothing to see.
            times.check_at = times.kill_at
            return
        else:
            self._look(process_table, 0)
        times.check_at = now + END_CHECK_S

    def _kill(self, process_table: ProcessTable) -> None:
        """Sends KILL to all that is left, the shell's group first."""
        if self.status is None:
            try:
                signal_group(self.pid, signal.SIGKILL)
            except PermissionError:
                # Its shell became another user's program, which we cannot end
                # and so do not wait for.
                self.survivor = self.pid
                self.phase = Phase.GONE
        self._look(process_table, signal.SIGKILL)

    def _look(self, process_table: ProcessTable, number: int) -> None:
        """Signals what is left, or with 0 looks; if nothing is, it is gone."""
        session = _session_of(self, process_table)
        remains = process_table.signal(self.run_tag, session, number)
        self.survivor = self.survivor or remains.refused
        if self.status is not None and not remains.left:
            self.phase = Phase.GONE

    # -- how it ended

    def outcome(self) -> RunOutcome:
        """Returns how the run ended; asked once it is gone."""
        reason, exit_code, detail = self._reason_and_code()
        if self.survivor:
            refusal = f"process {self.survivor} refused the signal and goes on"
            detail = f"{detail}; {refusal}" if detail else refusal
        ended = self._times.shell_ended
        if ended is None:
            ended = time.monotonic()
        buffer = self._output.buffer
        return RunOutcome(
            reason,
            exit_code,
            detail,
            duration_s=ended - self._times.started,
            output=buffer.kept(),
            output_bytes=buffer.total,
            to_follow=buffer.to_follow())

    def _reason_and_code(self) -> tuple[Reason, int | None, str]:
        """Returns why it ended, its exit code if any, and a detail or ""."""
        if self.failure:
            return self.cause or Reason.SPAWN, None, self.failure
        if self.cause is Reason.TIMEOUT:
            # Whatever the shell made of our signal, the code is that of
            # timeout(1).
            return Reason.TIMEOUT, TIMED_OUT, _timeout_detail(self.job)
        status = self.status
        code = status
        if status is not None and status < 0:
            # As a shell says it.
            code = 128 - status
        if self.cause:
            return self.cause, code, ""
        if status is None:
            return Reason.LOST, None, "its end was not seen"
        if status < 0:
            return Reason.SIGNAL, code, f"ended by {_signal_name(-status)}"
        # The shell found no such command, or could not execute it.
        if code in (126, 127):
            return Reason.EXIT, code, _not_found_detail(self.job)
        return Reason.EXIT, code, ""

def _session_of(process: RunningJob, process_table: ProcessTable) -> int:
    """Returns the session that a run's shell began; 0 if it is another's."""
    if process.status is None:
        return process.pid
    return process_table.session_left_by(process.pid)

def _timeout_detail(job: ClaimedJob) -> str:
    """Returns which time limit was met, and how to give a longer one."""
    limit = say_duration(job.timeout_s)
    detail = f"timed out after {limit} ({job.timeout_name})"
    # Nobody has set this limit for the job itself.
    if "setting" in job.timeout_name:
        detail += ("; give it more: --timeout 10m, "
                   "or config set job_timeout 10m")
    return detail

def _signal_name(number: int) -> str:
    """Returns the name of a signal; most of the real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

def _not_found_detail(job: ClaimedJob) -> str:
    """Returns where a command was looked for in vain, and what helps."""
    folder = excerpt(job.cwd or _own_folder(), 200)
    host = socket.gethostname()
    search_path = os.environ.get("PATH", "")
    return (f"in {folder} on {host}, PATH={search_path}; name it by its path, "
            "or give the job an env with that PATH")

def _own_folder() -> str:
    """Returns the worker's directory, in which a job runs that names none."""
    try:
        return os.getcwd()
    except OSError:
        return "a directory that is gone"


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
    # kill_grace once it has opened, the third how long its orphans are given,
    # and each of the others, one a slot, the tag of a run.
    CELL = 64
    FIRST_RUN = 3

    def __init__(self, slots: int) -> None:
        cells = slots + self.FIRST_RUN
        self._memory = mmap.mmap(-1, cells * self.CELL)
        self._free = list(range(self.FIRST_RUN, cells))

    def sign(self, worker: str) -> None:
        """Writes down the worker's id."""
        self._write(0, worker)

    def open(self, settings: Settings) -> None:
        """Says that the worker has opened, and how long a run takes at most to end.

        What it inherited is written off by then, and only its own runs matter.
        """
        for cell in self._free:
            self._write(cell, "")
        self._write(2, str(settings.orphan_grace_s))
        self._write(1, str(settings.kill_grace))

    def pass_on(self) -> None:
        """Makes room for a dead worker's successor, before that is forked.

        The tags stay until it has opened: were it killed before that, with its
        supervisor, the guardian must find them.
        """
        self._write(0, "")
        self._write(1, "")

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
        worker, opened, _, *cells = self._texts()
        grace_s = None
        if opened:
            grace_s = float(opened)
        run_tags = [text for text in cells if text]
        return worker, grace_s, run_tags

    def orphan_grace(self, default_s: float) -> float:
        """Returns how long what a dead worker left is given to end, in seconds."""
        text = self._texts()[2]
        return float(text) if text else default_s

    def _texts(self) -> list[str]:
        """Returns what stands in each cell."""
        texts = []
        size = len(self._memory)
        for start in range(0, size, self.CELL):
            end = start + self.CELL
            cell = self._memory[start:end]
            text = cell.rstrip(b"\0")
            texts.append(text.decode())
        return texts

    def _write(self, cell: int, text: str) -> None:
        start = cell * self.CELL
        end = start + self.CELL
        data = text.encode()
        self._memory[start:end] = data.ljust(self.CELL, b"\0")

class LentSlot:
    """The slot that one worker process of a supervisor has lent, in memory that
    all share.

    A job that must run alone may find a run in every process. Then one of them
    that has a free slot lends it: the supervisor forks the spare worker, which
    runs such jobs and nothing else, and until that has left, the lender has one
    slot less. So there are never more runs than slots.
    """
    def __init__(self) -> None:
        """Nothing is lent."""
        # The lender's number and one; 0: there is none. Should two lend at the
        # same moment, the second alone goes without its slot, which is enough.
        memory = mmap.mmap(-1, 2)
        self._lender = memoryview(memory).cast("H")

    @property
    def taken(self) -> bool:
        """Whether a slot is lent."""
        return self._lender[0] > 0

    def lend(self, number: int) -> None:
        """Has this worker lend one of its slots."""
        self._lender[0] = number + 1

    def lent_by(self, number: int) -> int:
        """Returns how many slots this worker has lent: one or none."""
        return int(self._lender[0] == number + 1)

    def give_back(self) -> list[int]:
        """Ends the loan; returns the worker that has its slot back, if any."""
        lender = self._lender[0] - 1
        self._lender[0] = 0
        return [lender] if lender >= 0 else []

class SiblingWorkers:
    """How busy each worker process of a supervisor is, in memory that all share.

    A pipe to each of them has it look around.
    """
    def __init__(self, slots: Sequence[int]) -> None:
        """Makes memory and pipes, before the workers are forked."""
        self.lent = LentSlot()
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
            if self._busy[number] < slots - self.lent.lent_by(number):
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
    say: Callable[[str], None]  # never waits
    finish_log: Thunk  # waits for a moment until all that was said is written

class WorkerContext(NamedTuple):
    """One worker process's place among those of its supervisor."""
    number: int
    siblings: SiblingWorkers
    slots: int
    supervisor: int
    lifeline: int  # readable once the supervisor is gone
    ready: int  # written once the worker has entered its row, or lent a slot
    registry: RunRegistry
    # The dead workers whose place it takes, each with the tags of its runs.
    inherited: tuple[tuple[str, tuple[str, ...]], ...]
    spare: bool  # it has the slot that another has lent

    @property
    def slots_left(self) -> int:
        """How many slots it has, less the one that it has lent."""
        return self.slots - self.siblings.lent.lent_by(self.number)

    def report(self, busy: int, slot_kept: bool) -> None:
        """Tells how many slots are taken after a turn, and lends the one that
        the turn has kept free, unless another has lent one since.
        """
        siblings = self.siblings
        siblings.report(self.number, busy)
        if not slot_kept or siblings.lent.taken:
            return
        siblings.lent.lend(self.number)
        # Now the supervisor forks the spare worker. A closed pipe: it is gone,
        # and so are we soon.
        with contextlib.suppress(OSError):
            os.write(self.ready, b"+")

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

def reread(
        say: Callable[[str], None]) -> tuple[Environment, ConnectionInfo] | None:
    """Returns the environment and `.env` as they are now, and where they say
    that the database is.

    Where they are wrong, it says so and returns None.
    """
    try:
        environment = Environment.read()
        load_settings(environment, {})
        target = find_connection(environment)
    # Whatever stands in those files: the work goes on.
    except (Problem, OSError, ValueError) as error:
        say(f"{error}; settings are kept as they were")
        return None
    return environment, target

def reread_target() -> ConnectionInfo | None:
    """Returns where the database is by now, or None where that cannot be read."""
    found = reread(say_nothing)
    return found[1] if found else None

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
          (uptime_s)   instead of started             turn was asked for
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
        thread = threading.Thread(target=self._serve_requests, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise Problem(
                "this host has no thread to spare: raise the limit on processes "
                "(ulimit -u, or pids.max of the control group)") from None

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
        """Knows how to reach the database; nothing is entered yet."""
        self.environment = options.environment
        self.route = Route()
        self._target = options.target
        self._options = options
        self._context = context
        # One worker process tells of an outage for all of the supervisor's.
        say = options.say if context.number == 0 else say_nothing
        lease_s = options.settings.lease_s
        # The worker waits for the server for ever. An answer is waited for no
        # longer than leaves time for a heartbeat before the lease is over.
        self._policy = RetryPolicy(
            retry_for_s=math.inf,
            timeout_s=max(2.0, lease_s / 3),
            say=say,
            longest_s=max(2.0, lease_s / 2))
        self._turns = self._new_turn_taker(options.settings)
        self._orphaned = OrphanedRuns()
        # By dead worker of this host: its runs that do not end, each with a
        # process of it.
        self._surviving: dict[str, dict[str, int]] = {}

    @property
    def worker(self) -> str:
        """The worker's id."""
        return self._turns.identity.id

    @property
    def settings(self) -> Settings:
        """The settings as they are now."""
        return self._turns.settings

    def reload(self, environment: Environment, target: ConnectionInfo) -> None:
        """Has what follows use these; a try that is under way goes on."""
        self.environment = environment
        self._target = target
        self._turns.database.target = target

    def _find_target(self) -> ConnectionInfo | None:
        """Returns where the database is now, for a server that refuses us."""
        target = reread_target()
        if target:
            said = say_new_target(self._target, target)
            if said:
                self._policy.say(said)
            self._target = target
        return target

    def use_settings(self, settings: Settings) -> None:
        """Has the next turn use these settings."""
        self._turns.settings = settings

    def start_over(self) -> None:
        """Becomes a new worker, whose row is yet to be entered."""
        self._turns.database.close()
        self._turns = self._new_turn_taker(self._turns.settings)

    def open(self) -> Opened:
        """Takes over from the dead workers of this host, then enters our row."""
        notes = self._take_over_local(dict(self._context.inherited))
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
        notes = []
        # What the dead left running here must be gone before it runs again.
        # What did not go by itself or by KILL is looked at again.
        if result.lost or (request.detect and self._surviving):
            notes = self._take_over_local({})
        if result.lost or result.orphaned:
            lost = {worker: heartbeat for worker, heartbeat in result.lost.items()
                    if worker not in self._surviving}
            others = dataclasses.replace(result, lost=lost)
            notes += self._turns.after.take_over_lost(self.settings, others)
        if not notes:
            return result
        return dataclasses.replace(result, notes=[*result.notes, *notes])

    def leave(self, ring_own: bool) -> None:
        """Deletes our row, and with `ring_own` ends our own doorbell's sleep."""
        database = self._turns.database
        self._turns.after.trimmer.finish()
        deregister(database, self.worker)
        if ring_own:
            ring(database, worker=self.worker)

    def _take_over_local(
            self, inherited: Mapping[str, Sequence[str]]) -> list[str]:
        """Takes over from dead workers of this host; returns what is to be said.

        Those are the `inherited`, each with the tags of its runs, and all that
        are seen to be gone. What they left running is ended before, all of it
        together, so that no heartbeat of ours waits for one after the other.
        """
        turns, settings = self._turns, self.settings
        dead = exited_local_workers(turns.database, is_gone)
        for worker, run_tags in inherited.items():
            known = dead.get(worker, [])
            dead[worker] = [*known, *(set(run_tags) - set(known))]
        # With the wait for KILL it is a quarter of our lease at most.
        left = self._orphaned.end_all(
            [*itertools.chain.from_iterable(dead.values())],
            settings.orphan_grace_s, settings.lease_s / 20)
        notes = []
        before, self._surviving = self._surviving, {}
        for worker, run_tags in dead.items():
            surviving = {run_tag: left[run_tag]
                         for run_tag in run_tags if run_tag in left}
            if surviving:
                self._surviving[worker] = surviving
                notes += self._keep(worker, surviving, before.get(worker, {}))
                continue
            # -1: its heartbeat does not matter.
            taken = turns.after.take_over(settings, worker, -1)
            if worker in inherited:
                said = say_taken(taken or [], "written off as lost")
                notes.append(f"worker {worker} died; {said}")
            elif taken is not None:
                said = say_taken(taken, "taken over")
                notes.append(f"worker {worker} here is gone; {said}")
        return notes

    def _keep(self, worker: str, surviving: Mapping[str, int],
              before: Mapping[str, int]) -> list[str]:
        """Keeps others from runs that do not end; returns what is new of that.

        The dead worker's other runs are taken over. `before` are those that
        went on when they were last looked at.
        """
        turns = self._turns
        result = turns.after.take_over_but(self.settings, worker, surviving)
        if not result or surviving.keys() <= before.keys():
            return []
        pids = ", ".join(str(pid) for pid in sorted(surviving.values()))
        taken = say_taken(result.taken, "taken over")
        return [f"worker {worker} here is gone; {taken}, but "
                f"process {pids} does not end, not even by KILL: "
                f"{', '.join(result.kept)} stays processing, and is looked at again"]

    def _new_turn_taker(self, settings: Settings) -> TurnTaker:
        """Returns what takes a new worker's turns, and signs the registry."""
        identity = self._new_identity()
        self._context.registry.sign(identity.id)
        database = Database(self._target, self._policy, route=self.route)
        database.find_target = self._find_target
        skip_locked = self.environment.get("QUEUECTL_SKIP_LOCKED")
        switched_off = skip_locked.lower() in ("off", "0", "no")
        turns = TurnTaker(database, identity, not switched_off)
        turns.settings = settings
        # One worker process does the maintenance for all of the supervisor's.
        turns.after.purges = self._context.number == 0
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

# How long a sleep takes in the server until others can find it.
PARKING_S = 0.005

class WakeCalls:
    """Who tells us that there is something to look at, and whom we tell.

    An enqueue rings the doorbell, which the first worker process parks for all
    of its supervisor's; the siblings call one another.
    """
    def __init__(self, options: WorkerOptions, context: WorkerContext,
                 wake_end: int) -> None:
        """Listens to the siblings; the doorbell is made when it is first parked."""
        self.came = False  # somebody called since the last turn was asked for
        self.rung = False  # the doorbell rang since the last look was asked for
        self.listener = context.siblings.listener(context.number)
        self.doorbell: Doorbell | None = None  # made when it is first parked
        self._options = options
        self._target = options.target
        self._siblings = context.siblings
        self._number = context.number
        self._wake_end = wake_end

    def use_target(self, target: ConnectionInfo) -> None:
        """Has the next sleep be parked there."""
        self._target = target
        if self.doorbell:
            self.doorbell.use_target(target)

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
            queues = ",".join(self._options.queues) or "-"
            note = f"{worker} {queues}"
            # Where the host has no thread to spare the poll finds the work, and
            # the next turn tries again.
            with contextlib.suppress(RuntimeError):
                self.doorbell = Doorbell(self._target, note, self._on_rung, route,
                                         reread_target)
        return bool(self.doorbell and self.doorbell.park())

    def call_siblings(self, snapshot: QueueSnapshot, all_busy: bool) -> None:
        """Tells siblings what a snapshot of ours shows to concern them."""
        siblings = self._siblings
        others = set(range(len(siblings)))
        others.discard(self._number)
        # All of them see a cancellation: it is enough that the first one tells.
        cancelled = snapshot.others_cancelled and self._number == 0
        if snapshot.drained or cancelled:
            siblings.wake(others)
            return
        if snapshot.waiting and all_busy:
            # One is called; it calls another if it cannot take all of it.
            idle = [number for number in siblings.idle() if number in others]
            siblings.wake(idle[:1])

    def _on_rung(self) -> None:
        """Hears the doorbell, whose own thread calls this."""
        # The flags before the byte: once awake, the loop must find them set.
        self.rung = True
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
        """Begins with nothing claimed and nothing running."""
        self.claimed: collections.deque[ClaimedJob] = collections.deque()
        # By key; also those that are being ended.
        self.running: dict[tuple[int, str], RunningJob] = {}
        # By pid, until it is reaped: the next shell may get the same number.
        self._shells: dict[int, RunningJob] = {}
        self.results = Results()
        # What ran when we were declared lost, and is not gone yet.
        self._lost: list[RunningJob] = []
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
        # What we lost is pending again, maybe for us: it must not start beside
        # its old run, which we still end.
        if self._lost:
            return 0
        short_at = self._timers.host_short_at
        if now < short_at + SHORT_PAUSE_S:
            return 0
        free = self._context.slots_left - len(claims)
        # A short host takes one at a time, and leaves the others to others.
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
            if stopping or uptime_s() > self._timers.start_by:
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
        self._context.registry.note(claim.run_tag)
        process = RunningJob(job, self._settings, self._spawner)
        if process.gone:
            # Only a failure that is not the job's own has a cause.
            if process.cause:
                self._on_host_short(process)
            self._settle(process)
            return
        self.running[process.key] = process
        self._shells[process.pid] = process
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
        # What else was readable may have closed it since: the end of its shell,
        # or a stop that reaped.
        if process.pipe >= 0 and not process.read():
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
        # All of them, before the pass that finds what they have left.
        ended = list(reap())
        process_table = ProcessTable()
        failed = any(status for _, status in ended)
        adopted = failed and has_adopted(self._shells)
        for pid, status in ended:
            process = self._shells.pop(pid, None)
            # Any other is an orphan that we adopted.
            if process:
                self._hang_up(process)
                if status and process.job.cwd:
                    process.failure = self._spawner.entry_failure(
                        process.run_tag, process.job.cwd)
                process.reaped(status, process_table, adopted)

    def tick(self) -> None:
        """Acts on the grace and the time limits, and takes down what ended."""
        now = time.monotonic()
        if now >= self._timers.grace_over_at:
            self._timers.grace_over_at = math.inf
            self.end_all(Reason.HANDED_BACK)
        process_table = ProcessTable()
        for process in list(self.running.values()):
            process.tick(now, process_table)
            if process.gone:
                del self.running[process.key]
                # Its shell refused our signal, and goes on without us.
                if process.status is None:
                    del self._shells[process.pid]
                self._settle(process)

    def _settle(self, process: RunningJob) -> None:
        """Takes down how a run ended; the next turn writes it."""
        self._hang_up(process)
        self._context.registry.strike(process.run_tag)
        if process in self._lost:
            self._lost.remove(process)
            # With the last of them we may claim again.
            self._timers.look_within(0.0)
        # What is lost has been settled already, by who declared us lost.
        if process.cause is Reason.LOST:
            return
        outcome = process.outcome()
        self.results.add(process.job.claim, outcome)

    def cancel(self, runs: Mapping[tuple[int, str], bool]) -> None:
        """Begins to end the runs that are to be cancelled."""
        # One whose shell has ended needs no end from us.
        self.reap()
        process_table = ProcessTable()
        for process in self.running.values():
            cancelled = runs.get(process.key)
            if cancelled:
                process.terminate(Reason.CANCELLED, process_table)

    def end_all(self, cause: Reason) -> None:
        """Begins to end all that runs; none gets more than kill_grace from now."""
        # What has ended by now ended by itself, and is not to be handed back.
        self.reap()
        process_table = ProcessTable()
        for process in self.running.values():
            process.terminate(cause, process_table)
            process.shorten_grace(time.monotonic())

    def drop_lost(self) -> None:
        """Ends what runs, and forgets the rest: all this is others' by now."""
        self.end_all(Reason.LOST)
        self._lost = list(self.running.values())
        self.claimed.clear()
        self.results = Results()

# -- the loop

# With more claimed jobs than these left to start, the next turn can wait.
LOW_WATER = 8

class TurnPlanner:
    """When a turn is worth asking for, and what it is to carry."""
    def __init__(self, options: WorkerOptions, context: WorkerContext,
                 timers: Timers, runs: RunTable, wake_calls: WakeCalls) -> None:
        """Plans for one worker; nothing is asked for yet."""
        self._drain = options.drain
        self._context = context
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
        # With the last result of a draining worker the queue may be drained,
        # and with that of the spare there may be nothing more for it.
        may_leave = self._drain or self._context.spare
        if may_leave and ended and not runs.busy:
            look = True
        if not (ended or flushes or look or called):
            return None
        detect = self._set_timers(now, look, settings)
        # A ring may tell of a cancellation, and of a sibling's run, too.
        all_runs = look and self._wake_calls.rung
        if all_runs:
            self._wake_calls.rung = False
        free = 0 if stopping else runs.free_slots(now)
        running = [claim.key for claim in runs.claims()]
        return TurnRequest(
            ended=runs.results.take(),
            flushes=flushes,
            running=running,
            free=free,
            alone_only=self._context.spare,
            may_lend=not self._context.siblings.lent.taken,
            look=look,
            detect=detect,
            all_runs=all_runs,
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
        """Catches the signals, and begins to listen."""
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
        self._planner = TurnPlanner(options, context, timers, runs, wake_calls)
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
            on_turn = functools.partial(self._on_turn, uptime_s())
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
        self.context.registry.open(settings)

    def _on_turn(self, asked_at: float, result: TurnResult) -> None:
        """Acts on what came of a turn that was asked for at `asked_at`, in uptime."""
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
        self.context.report(runs.busy, result.slot_kept)
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
        all_busy = runs.busy >= self.context.slots_left
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
                found = reread(say_nothing)
                if found:
                    environment, target = found
                    self._membership.reload(environment, target)
                    self._wake_calls.use_target(target)
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
# The process above the workers: it forks them, restarts the ones that crash,
# and stops them; and the daemon's PID file and log. It promises that at most
# one daemon holds a PID file, that nothing a dead worker ran is left behind,
# and that no stranger is ever signalled. It must never open a connection to
# the database, since its children would share that.

# -- the log

# A log beyond this size is renamed, and a new one begins.
LOG_BYTES_MAX = 10 << 20
# So many lines wait to be written, in each process. More of them come only
# where nobody takes them: a pager, a full tee, a disk that hangs.
LOG_LINES_MAX = 1000
# How long a process that ends waits for its last lines to be taken.
LOG_FINISH_S = 1.0

class Log:
    """Lines on standard error, each with its time and the writer's PID.

    Given a path, standard output and error go to that file. It grows to about
    10 MB and is then renamed to `.1`, in the place of the one before.

    Each process that says something has a thread that writes it, so that
    nobody who says it ever waits for whoever reads it.
    """
    def __init__(self, path: str = "") -> None:
        """Opens the file if one is given."""
        self.path = path
        self._begin()
        # A fork takes no thread along. What waits is its parent's to write.
        os.register_at_fork(after_in_child=self._begin)
        if path:
            self._open()

    def _begin(self) -> None:
        """Begins anew, with nothing said and no thread to write it."""
        self._lines: list[str] = []
        self._left_out = 0  # how many did not fit
        self._started = False  # there is a thread
        self._writing = False  # it has lines that it has not written yet
        self._changed = threading.Condition()

    def say(self, text: str) -> None:
        """Has a line written soon; it is counted instead if too many wait."""
        line = _log_line(text)
        with self._changed:
            if len(self._lines) < LOG_LINES_MAX:
                self._lines.append(line)
            else:
                self._left_out += 1
            self._changed.notify_all()
            if not self._started:
                self._start()

    def finish(self) -> None:
        """Returns once all was written, or has waited for long enough."""
        with self._changed:
            self._changed.wait_for(self._is_written, LOG_FINISH_S)
            # Where the host has no thread to spare, the last words matter most.
            if not self._started:
                for line in self._lines:
                    self._write(line)

    def _is_written(self) -> bool:
        return not self._lines and not self._writing

    def _start(self) -> None:
        """Starts the thread; where the host has none to spare, the next line does."""
        thread = threading.Thread(target=self._write_lines, daemon=True)
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._started = True

    def _write_lines(self) -> None:
        """Writes what is said, for ever; this is the thread."""
        # Signals are for the loop; here they would only interrupt a write.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        while True:
            for line in self._next_lines():
                self._write(line)

    def _next_lines(self) -> list[str]:
        """Returns all that waits, once something does."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines)
            lines = self._lines
            if self._left_out:
                text = (f"{self._left_out} lines are missing here: nobody "
                        "took them in time")
                lines.append(_log_line(text))
            self._lines = []
            self._left_out = 0
            self._writing = True
            return lines

    def _write(self, line: str) -> None:
        """Writes a line; a log that cannot be written is passed over."""
        # A full disk must not end the work.
        with contextlib.suppress(OSError):
            if self.path:
                # Where the log cannot be renamed, the old one takes the line.
                with contextlib.suppress(OSError):
                    self._rotate()
            os.write(2, line.encode("utf-8", "replace"))

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        handle = os.open(self.path, flags, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    def _rotate(self) -> None:
        """Renames a full file, or follows where another process has done so.

        It raises BlockingIOError while another process is about it.
        """
        if os.fstat(2).st_size > LOG_BYTES_MAX:
            # Several processes find the file full at once, and whoever gets
            # its lock renames it. The descriptor must be our own: a lock
            # belongs to what `open` made, and forks share that.
            with open(self.path, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another may have renamed it before we had the lock.
                if _same_file(2, self.path):
                    os.rename(self.path, self.path + ".1")
        if not _same_file(2, self.path):
            self._open()

def _log_line(text: str) -> str:
    """Returns a line of the log, of what is said at this moment."""
    now = datetime.datetime.now(datetime.timezone.utc)
    stamp = say_time(now.replace(tzinfo=None))
    printable = text.translate(MULTILINE)
    return f"{stamp} [{os.getpid()}] {printable}\n"

def _same_file(handle: int, path: str) -> bool:
    """Returns whether the path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False

def _log_tail(path: str) -> str:
    """Returns a log's last lines, to stand after a message; "" if it has none."""
    lines = []
    with contextlib.suppress(OSError), open(path, errors="replace") as log:
        for line in log.readlines()[-5:]:
            lines.append(line.rstrip())
    if not lines:
        return ""
    return ":\n  " + "\n  ".join(lines)

# -- the PID file

class PidFileStatus(NamedTuple):
    """What a PID file says: whether it is there, and whom it names."""
    found: bool
    pid: int  # 0 while no number is written
    alive: bool  # whether a daemon holds its lock

def probe_pid_file(path: str) -> PidFileStatus:
    """Returns whether a daemon holds the PID file, and the PID in it.

    It raises a Problem if the file is there but cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return PidFileStatus(False, 0, False)
    except OSError as error:
        what = f"cannot read the PID file {path}: {error.strerror}"
        raise Problem(what) from None
    try:
        pid = _pid_in(handle)
        alive = _is_locked(handle)
    finally:
        os.close(handle)
    return PidFileStatus(True, pid, alive)

def _pid_in(handle: int) -> int:
    """Returns the PID on the first line; 0 if that holds none."""
    lines = os.read(handle, 64).split(b"\n")
    first = lines[0]
    # Whatever stands in the file, a number is taken only if it may be a PID.
    if first.isdigit() and len(first) < 10:
        return int(first)
    return 0

def _is_locked(handle: int) -> bool:
    """Returns whether a daemon has the file locked.

    The shared lock that tells is given up when the handle is closed.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False

class LockedPidFile(NamedTuple):
    """A PID file that we hold, until every copy of its handle is closed."""
    path: str
    handle: int

    def write_pid(self) -> None:
        """Writes our own PID on its first line."""
        line = f"{os.getpid()}\n"
        os.pwrite(self.handle, line.encode(), 0)

    def remove(self) -> None:
        """Removes the file, if it is still ours."""
        # Somebody may have removed it, and another daemon have made its own.
        if _same_file(self.handle, self.path):
            with contextlib.suppress(OSError):
                os.unlink(self.path)

def lock_pid_file(path: str) -> LockedPidFile:
    """Returns the PID file, locked for us and with no number in it yet.

    It raises a Problem if another daemon holds it, or if it cannot be written.
    """
    # A daemon that stops, or somebody who probes the file, holds it for an
    # instant more.
    until = time.monotonic() + 1
    while True:
        handle = _open_pid_file(path)
        if _lock_now(handle, path):
            _make_room(handle, path)
            return LockedPidFile(path, handle)
        os.close(handle)
        if time.monotonic() > until:
            pid = probe_pid_file(path).pid or "?"
            raise Problem(
                f"a worker daemon runs already: PID {pid} holds {path}",
                "stop it (queuectl worker stop), or give another --pid-file")
        time.sleep(0.02)

def _open_pid_file(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None

def _lock_now(handle: int, path: str) -> bool:
    """Returns whether we have got the lock of the file that the path names."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # A daemon that stops may have removed the file since we opened it: the
    # lock of such a file keeps nobody out.
    return _same_file(handle, path)

def _make_room(handle: int, path: str) -> None:
    """Empties the file, and makes sure that the disk has room for a number."""
    os.ftruncate(handle, 0)
    try:
        os.write(handle, b"\n" * 12)
    except OSError as error:
        os.unlink(path)
        raise _unwritable(path, error) from None

def _unwritable(path: str, error: OSError) -> Problem:
    return Problem(
        f"cannot write the PID file {path}: {error.strerror}",
        "name another one: --pid-file FILE")

# -- keeping workers up

# A worker that ended in a crash is replaced after a pause. The pause doubles
# with each crash up to the greatest one, and is short again after a worker
# that ran steadily for some seconds.
RESPAWN_PAUSE_S = 0.1
RESPAWN_PAUSE_MAX_S = 30.0
STEADY_AFTER_S = 10.0
# The spare worker is forked no more often than this.
SPARE_PAUSE_S = 1.0
# Where the host has no process to spare, forking is tried again after so long.
FORK_PAUSE_S = 1.0
# After a second stop signal a worker has its kill_grace and this much more:
# then it is killed.
FORCED_STOP_S = 3
# The signals that stop a supervisor. SIGHUP is one where a terminal went away.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
# What a child exits with that an exception ended: EX_SOFTWARE of sysexits.h.
CHILD_FAILED = 70

def fork_child(work: Callable[[], int], say: Callable[[str], None],
               finish_log: Thunk) -> int:
    """Returns the PID of a child that does `work` and exits with its status."""
    with warnings.catch_warnings():
        # From Python 3.12 on it warns where there are threads. Ours writes the
        # log, and the child begins one of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = CHILD_FAILED
    try:
        status = work()
    except Problem as problem:
        say(problem.what)
    except BaseException:
        say(traceback.format_exc())
    finally:
        # A child never returns into its parent's stack.
        try:
            finish_log()
        finally:
            os._exit(status)

class Pipe(NamedTuple):
    """A pipe that the supervisor shares with its workers."""
    read_end: int
    write_end: int

@dataclass
class ChildProcess:
    """A worker process as its supervisor knows it."""
    slots: int
    registry: RunRegistry
    # The dead workers whose place it takes, each with the tags of its runs.
    inherited: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pid: int = 0  # 0 while it does not run
    started: float = 0.0
    pause_s: float = RESPAWN_PAUSE_S
    # When to fork it; infinite once it is not to be replaced.
    spawn_at: float = 0.0
    spare: bool = False  # it is forked only for a slot that another has lent

    def spawn_spare(self) -> None:
        """Has it forked soon, unless it runs already or is about to.

        As an earlier spare left in good order, it inherits nothing.
        """
        if self.spawn_at < math.inf:
            return
        self.inherited = ()
        self.registry.pass_on()
        self.spawn_at = self.started + SPARE_PAUSE_S

    @property
    def opened(self) -> bool:
        """Whether its worker got as far as to come after those it inherited."""
        _, kill_grace, _ = self.registry.read()
        return kill_grace is not None

# How long the guardian sends KILL, and how long an orderly stop waits for it.
GUARDIAN_KILLS_S = 5.0
GUARDIAN_LEAVES_S = 1.0

def readable_of(handles: Iterable[int], wait_s: float | None) -> set[int]:
    """Returns which of these descriptors can be read, after `wait_s` at most."""
    # Unlike the default selector it is no descriptor, which a fork would share.
    selector = selectors.PollSelector()
    for handle in handles:
        selector.register(handle, selectors.EVENT_READ)
    return {key.fd for key, _ in selector.select(wait_s)}

class Guardian:
    """A process apart that ends what runs when all who would do so were killed.

    A worker ends its runs once its supervisor is gone, and a supervisor those
    of a worker. The guardian is for a kill that meets both. It has a pipe for
    each worker, whose writing end that worker and the supervisor hold, and
    nobody writes to: it closes when both are gone. What the worker's registry
    names then, the guardian ends; and when all pipes are closed, it leaves. It
    has no connection to the database, and nothing open but those pipes.
    """
    def __init__(self, registries: Sequence[RunRegistry],
                 settings: Settings) -> None:
        """Makes the pipes; the process is forked by `start`."""
        self.ended = -1  # readable once the process is gone; -1: it never was
        self.start_at = 0.0  # when to fork it; infinite while it runs
        self._registries = registries
        self._pause_s = RESPAWN_PAUSE_S
        self._grace_s = settings.orphan_grace_s
        self._pipes = [Pipe(*os.pipe()) for _ in registries]

    def start(self) -> None:
        """Forks the process; raises OSError if the host has none to spare."""
        kept = [pipe.read_end for pipe in self._pipes]
        ended = Pipe(*os.pipe())
        try:
            fork_apart("queuectl-guard", [*kept, ended.write_end], HANDLED,
                       self._guard)
        except OSError:
            os.close(ended.read_end)
            raise
        finally:
            os.close(ended.write_end)
        self.ended = ended.read_end
        self.start_at = math.inf

    def plan(self) -> None:
        """Has the process forked after a pause, which grows, since there is none."""
        if self.ended >= 0:
            os.close(self.ended)
        self.ended = -1
        self.start_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RESPAWN_PAUSE_MAX_S)

    def enter_worker(self, number: int) -> None:
        """Keeps, in a worker, only the end by which the guardian knows it."""
        for other, pipe in enumerate(self._pipes):
            os.close(pipe.read_end)
            if other != number:
                os.close(pipe.write_end)
        if self.ended >= 0:
            os.close(self.ended)

    def dismiss(self) -> None:
        """Lets the process end, and waits a moment for that."""
        for pipe in self._pipes:
            os.close(pipe.write_end)
        if self.ended >= 0:
            readable_of([self.ended], GUARDIAN_LEAVES_S)

    def _guard(self) -> None:
        """Ends what each worker leaves; this is the process."""
        selector = selectors.DefaultSelector()
        for pipe, registry in zip(self._pipes, self._registries):
            selector.register(pipe.read_end, selectors.EVENT_READ, registry)
        orphaned = OrphanedRuns()
        left: list[str] = []
        grace_s, until = 0.0, 0.0
        while left or selector.get_map():
            for key, _ in selector.select(END_CHECK_S if left else None):
                selector.unregister(key.fileobj)
                registry = key.data
                _, _, run_tags = registry.read()
                left += run_tags
                grace_s = registry.orphan_grace(self._grace_s)
                until = time.monotonic() + grace_s + GUARDIAN_KILLS_S
            left = list(orphaned.end(left, grace_s))
            if time.monotonic() > until:
                left = []

class Supervisor:
    """Forks the workers, keeps them up, and stops them."""
    def __init__(self, options: WorkerOptions, count: int,
                 private_handles: Collection[int] = ()) -> None:
        """Prepares for `count` slots; nothing is forked before `run`."""
        self.options = options
        self.stopping = False
        # The second stop signal: the exit status is then 128 and its number.
        self.stop_signal = 0
        self.status = 0
        # Descriptors that no worker may have, for they hold a lock.
        self._private_handles = private_handles
        self._kill_at = math.inf
        # It is asked now, since the terminal is gone by the time it hangs up.
        # Under nohup no hang-up may stop us: SIGHUP is a request to reload then.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._on_terminal = _has_terminal() and not ignored
        shares = _shares(count)
        self._children = []
        for slots in shares:
            child = ChildProcess(slots, RunRegistry(slots))
            self._children.append(child)
        # The last one is the spare. It has no slot but the one that is lent.
        spare = ChildProcess(1, RunRegistry(1), spawn_at=math.inf, spare=True)
        self._children.append(spare)
        registries = [child.registry for child in self._children]
        self._guardian = Guardian(registries, options.settings)
        self._siblings = SiblingWorkers([*shares, 0])
        # Only we hold its writing end: it closes when we are gone, however
        # that came about.
        self._lifeline = Pipe(*os.pipe())
        # A worker writes to it once it has entered its row, or lent a slot.
        self._ready = Pipe(*os.pipe())

    def run(self, announce: Callable[[], None]) -> int:
        """Keeps the workers up until told to stop, or all have drained.

        It calls `announce` once, when the first worker has entered its row,
        and returns the exit status.
        """
        wake, _ = catch_signals()
        # Before we are a subreaper, so that it is no child of ours.
        self._start_guardian()
        # What a worker leaves behind becomes ours, to be reaped.
        become_subreaper()
        ready = self._ready.read_end
        announced = False
        while not self._all_ended():
            wait_s = self._spawn_missing()
            readable = self._wait_for(wake, ready, wait_s)
            if self._guardian.ended in readable:
                self.options.say("the guardian has ended: starting another")
                self._guardian.plan()
            if wake in readable:
                for number in os.read(wake, 4096):
                    self._handle_signal(number)
            if ready in readable:
                os.read(ready, 4096)
                if not announced:
                    announced = True
                    announce()
                if self._siblings.lent.taken:
                    self._children[-1].spawn_spare()
            self._reap()
            self._kill_if_due()
        self._end_inherited()
        self._guardian.dismiss()
        if self.stop_signal:
            return 128 + self.stop_signal
        return self.status

    def _wait_for(self, wake: int, ready: int, wait_s: float | None) -> set[int]:
        """Returns which descriptors can be read, after `wait_s` at most."""
        handles = [wake, ready]
        # The guardian's is another one after each of its deaths.
        if self._guardian.ended >= 0:
            handles.append(self._guardian.ended)
        return readable_of(handles, wait_s)

    def _all_ended(self) -> bool:
        """Returns whether we are stopping and no worker is left."""
        running = any(child.pid for child in self._children)
        return self.stopping and not running

    # -- forking

    def _spawn_missing(self) -> float | None:
        """Forks what is due; returns the seconds until the next timer, if any."""
        self._start_guardian()
        now = time.monotonic()
        soonest = min(self._kill_at, self._guardian.start_at)
        for child in self._children:
            if child.pid or self.stopping:
                continue
            if now >= child.spawn_at:
                self._fork(child)
            else:
                soonest = min(soonest, child.spawn_at)
        if math.isinf(soonest):
            return None
        return max(0.0, soonest - now)

    def _start_guardian(self) -> None:
        """Forks the guardian if that is due, or plans to do so later."""
        if time.monotonic() < self._guardian.start_at:
            return
        try:
            self._guardian.start()
        except OSError as error:
            self.options.say(f"cannot start the guardian: {error.strerror}")
            self._guardian.plan()

    def _fork(self, child: ChildProcess) -> None:
        """Forks a worker, or plans to do so later where the host is short."""
        supervisor = os.getpid()
        work = functools.partial(self._run_worker, child, supervisor)
        # Until the child has a pipe for signals of its own, it shares ours:
        # what reached it there would reach us.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            child.pid = fork_child(work, self.options.say,
                                   self.options.finish_log)
            child.started = time.monotonic()
        except OSError as error:
            self.options.say(f"cannot start a worker process: {error.strerror}")
            child.spawn_at = time.monotonic() + FORK_PAUSE_S
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _run_worker(self, child: ChildProcess, supervisor: int) -> int:
        """Runs a worker, in the child; returns its exit status."""
        signal.set_wakeup_fd(-1)
        lifeline, ready = self._lifeline, self._ready
        # With a copy of the lifeline's writing end in a worker, the others
        # would not see our end.
        ours = (*self._private_handles, lifeline.write_end, ready.read_end)
        for handle in ours:
            os.close(handle)
        number = self._children.index(child)
        self._guardian.enter_worker(number)
        become_subreaper()
        context = WorkerContext(
            number,
            self._siblings,
            child.slots,
            supervisor,
            lifeline.read_end,
            ready.write_end,
            child.registry,
            child.inherited,
            child.spare)
        worker = Worker(self.options, context)
        return worker.run()

    # -- when a worker has ended

    def _reap(self) -> None:
        """Acts on the ends of workers, of all that have ended together."""
        orphaned: list[str] = []
        for pid, status in reap():
            for child in self._children:
                if child.pid == pid:
                    child.pid = 0
                    orphaned += self._on_end(child, status)
        self._end_orphaned(orphaned)

    def _on_end(self, child: ChildProcess, status: int) -> list[str]:
        """Tells a worker that is over from a crash, which we make good.

        Returns the tags of what we must end ourselves.
        """
        # With status 1 it is unable to go on, and another would be no better.
        told = self.stopping or self.options.drain or child.spare
        if status == 1 or (status == 0 and told):
            self._on_over(child, status)
            return []
        worker, _, run_tags = child.registry.read()
        how = f"exit status {status}"
        if status < 0:
            how = f"signal {-status}"
        who = worker or "an unknown worker"
        self.options.say(f"worker process of {who} ended: {how}")
        if self.stopping:
            # Nobody comes after it who would end its runs.
            self.status = 1
            return run_tags
        self._replace(child)
        return []

    def _on_over(self, child: ChildProcess, status: int) -> None:
        """Keeps a worker's status; once all are over, so are we."""
        self.status = max(self.status, status)
        child.spawn_at = math.inf
        if child.spare:
            self._siblings.wake(self._siblings.lent.give_back())
        for other in self._children:
            if other.pid or other.spawn_at != math.inf:
                return
        self.stopping = True

    def _replace(self, child: ChildProcess) -> None:
        """Plans a new worker, which inherits what the dead one left running."""
        worker, _, run_tags = child.registry.read()
        # One that had opened was done with what it had inherited itself. One
        # that had not had no runs: these tags are what it inherited.
        if child.opened:
            child.inherited = ()
        else:
            run_tags = []
        if worker:
            orphaned = (worker, tuple(run_tags))
            child.inherited = (*child.inherited, orphaned)
        child.registry.pass_on()
        now = time.monotonic()
        if now - child.started > STEADY_AFTER_S:
            child.pause_s = RESPAWN_PAUSE_S
        child.spawn_at = now + child.pause_s
        child.pause_s = min(2 * child.pause_s, RESPAWN_PAUSE_MAX_S)

    def _end_inherited(self) -> None:
        """Ends what dead workers left running, where nobody came after them."""
        orphaned: list[str] = []
        for child in self._children:
            if child.opened:
                continue
            for _, run_tags in child.inherited:
                orphaned.extend(run_tags)
        if orphaned:
            self.status = 1
            self._end_orphaned(orphaned)

    def _end_orphaned(self, run_tags: Sequence[str]) -> None:
        """Ends these runs, all of them together, and says what does not end."""
        left = OrphanedRuns().end_all(run_tags, self._kill_grace())
        if left:
            pids = ", ".join(str(pid) for pid in sorted(left.values()))
            self.options.say(f"process {pids} does not end, not even by KILL")

    def _kill_grace(self) -> float:
        """Returns the longest kill_grace that we or a worker know of, in seconds."""
        # The workers read the settings in the database too, as we do not.
        longest_s = self.options.settings.kill_grace
        for child in self._children:
            _, grace_s, _ = child.registry.read()
            longest_s = max(longest_s, grace_s or 0.0)
        return longest_s

    # -- signals

    def _handle_signal(self, number: int) -> None:
        """Acts on a signal: reads the settings again, stops, or stops at once."""
        if number == signal.SIGHUP and not self._on_terminal:
            self._reload()
        elif number not in STOPS:
            # SIGCHLD did enough by waking the loop.
            return
        elif not self.stopping:
            self.stopping = True
            self.options.say("stopping: running jobs may end; once more ends them now")
            self._signal(signal.SIGTERM)
        elif not self.stop_signal:
            self.stop_signal = number
            self.options.say("stopping now: running jobs are ended and handed back")
            self._signal(STOP_NOW_SIGNAL)
            wait_s = self._kill_grace() + FORCED_STOP_S
            self._kill_at = time.monotonic() + wait_s

    def _reload(self) -> None:
        """Reads the settings again, and has the workers do so."""
        self.options.say("SIGHUP: reading the settings again")
        found = reread(self.options.say)
        if found:
            environment, target = found
            said = say_new_target(self.options.target, target)
            if said:
                self.options.say(said)
            # Workers that are forked from now on begin with it.
            self.options = dataclasses.replace(
                self.options, environment=environment, target=target)
            self._signal(signal.SIGHUP)

    def _kill_if_due(self) -> None:
        """Kills, once, the workers that outlived the time of a forced stop."""
        if time.monotonic() >= self._kill_at:
            self._kill_at = math.inf
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.pid:
                send_signal(child.pid, number)

def _has_terminal() -> bool:
    """Returns whether a terminal controls us: then SIGHUP means that it went away."""
    with contextlib.suppress(OSError):
        handle = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        os.close(handle)
        return True
    return False

def _shares(count: int) -> list[int]:
    """Returns the slots of each worker process, at most one process a CPU."""
    processes = min(count, os.cpu_count() or 1)
    least, rest = divmod(count, processes)
    shares = [least] * processes
    for number in range(rest):
        shares[number] += 1
    return shares

# -- starting workers, here or as a daemon

# How long the starter of a daemon waits for it to be ready.
READY_WAIT_S = 30.0

def run_workers(options: WorkerOptions, count: int,
                pid_file: str, log_file: str) -> int:
    """Runs workers here or, given a log, as a daemon; returns the exit status.

    A daemon always has a PID file; in the foreground that may be "".
    """
    locked = None
    if pid_file:
        locked = lock_pid_file(pid_file)
    if locked and log_file:
        return _start_daemon(options, count, locked, log_file)
    return _run_supervisor(options, count, locked)

def _run_supervisor(options: WorkerOptions, count: int,
                    pid_file: LockedPidFile | None, starter: int = -1) -> int:
    """Runs the workers until they stop; returns the exit status.

    Once the first is ready, that is said, and written to the pipe `starter`
    if one is given.
    """
    private_handles = []
    if pid_file:
        pid_file.write_pid()
        private_handles.append(pid_file.handle)

    def announce() -> None:
        """Says that we are ready, in the log and to the starter."""
        options.say(_ready_line(options, count))
        if starter >= 0:
            # The starter may not have waited for us.
            with contextlib.suppress(BrokenPipeError):
                os.write(starter, b"+")
            os.close(starter)

    try:
        supervisor = Supervisor(options, count, private_handles)
        return supervisor.run(announce)
    finally:
        options.say("stopped")
        options.finish_log()
        if pid_file:
            pid_file.remove()

def _ready_line(options: WorkerOptions, count: int) -> str:
    slots = "1 slot" if count == 1 else f"{count} slots"
    served = "all queues"
    if options.queues:
        served = f"queues {', '.join(options.queues)}"
    return f"{slots} ready, serving {served} of {options.target}"

def _start_daemon(options: WorkerOptions, count: int,
                  pid_file: LockedPidFile, log_file: str) -> int:
    """Forks the daemon and returns 0 once it is ready.

    If it dies first, or takes too long, it raises a Problem that shows its log.
    """
    # This comes first: the daemon itself could tell nobody.
    _check_log(log_file)
    pipe = Pipe(*os.pipe())

    def run_daemon() -> int:
        """Is the daemon; returns its exit status."""
        os.close(pipe.read_end)
        _leave_terminal()
        log = Log(log_file)
        quiet = dataclasses.replace(
            options, say=log.say, finish_log=log.finish, verbose=False)
        return _run_supervisor(quiet, count, pid_file, pipe.write_end)

    pid = fork_child(run_daemon, options.say, options.finish_log)
    # Our copies: the pipe must close when the daemon dies, and the daemon
    # alone must hold the lock.
    os.close(pipe.write_end)
    os.close(pid_file.handle)
    _await_ready(pid, pipe.read_end, log_file)
    print(f"worker daemon started: PID {pid} in {pid_file.path}, "
          f"log in {log_file}",
          file=sys.stderr)
    return 0

def _check_log(path: str) -> None:
    """Raises a Problem unless the log can be written; makes it if need be."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise Problem(
            f"cannot write the log {path}: {error.strerror}",
            "name another one: --log-file FILE") from None
    os.close(handle)

def _leave_terminal() -> None:
    """Begins a session without a terminal, and with nothing to read."""
    os.setsid()
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)

def _await_ready(pid: int, handle: int, log_file: str) -> None:
    """Returns once a daemon has written to the pipe `handle`.

    If the pipe closes or nothing comes in time, it raises a Problem.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ)
        readable = selector.select(READY_WAIT_S)
    # The pipe of a daemon that died is readable too, but empty.
    if readable and os.read(handle, 1):
        return
    if not readable:
        send_signal(pid, signal.SIGTERM)
    raise Problem(
        f"the worker daemon did not get ready{_log_tail(log_file)}",
        f"see {log_file}",
        UNAVAILABLE)

# -- stopping a daemon

def stop_daemon(path: str, now: bool, timeout_s: float,
                waits_for: Callable[[int], str]) -> int:
    """Stops the daemon that holds the PID file, and waits for its end.

    It returns the exit status. `waits_for` gives words, or "", for the jobs
    that the supervisor of that PID still waits for.
    """
    standing = _probe_named(path)
    if not standing.alive:
        _say_no_daemon(path, standing)
        return 0
    if not standing.pid:
        raise Problem(
            f"the PID file {path} is held, but names no process",
            "its daemon may be starting; look again: queuectl status")
    # A stranger is never signalled: the process is pinned first, then the
    # lock is looked at again, and only then is the signal sent.
    pid = standing.pid
    with contextlib.suppress(ProcessLookupError), open_pidfd(pid) as handle:
        _check_daemon(path, standing)
        send_signal(pid, signal.SIGTERM, handle)
        if now:
            # The second stop signal is what ends running jobs.
            send_signal(pid, signal.SIGINT, handle)
        return _await_stop(path, standing, timeout_s, waits_for)
    # It has ended since.
    return 0

def _probe_named(path: str) -> PidFileStatus:
    """Returns what the PID file says, once a daemon that holds it is named."""
    standing = probe_pid_file(path)
    until = time.monotonic() + 1
    while standing.alive and not standing.pid:
        if time.monotonic() >= until:
            break
        # It has the lock and is about to write its number.
        time.sleep(0.02)
        standing = probe_pid_file(path)
    return standing

def _say_no_daemon(path: str, standing: PidFileStatus) -> None:
    why = f"there is no PID file {path}"
    if standing.found:
        why = f"the PID file {path} is stale (no daemon holds it)"
    notice(f"no worker daemon: {why}\n"
           "  start one: queuectl worker start --daemon")

def _check_daemon(path: str, standing: PidFileStatus) -> None:
    """Raises a Problem unless the process named is surely the daemon."""
    if probe_pid_file(path) != standing:
        raise Problem(
            f"the PID file {path} has just changed hands",
            "look again: queuectl status")
    # The folder may be shared with a container or another host, where the
    # number is another process's.
    if not has_file_open(standing.pid, path):
        raise Problem(
            f"the PID file {path} names process {standing.pid}, which is "
            "not the one that holds it: nothing was signalled",
            "stop the daemon in the container or on the host it runs in")

def _await_stop(path: str, standing: PidFileStatus, timeout_s: float,
                waits_for: Callable[[int], str]) -> int:
    """Waits until the daemon gives its PID file up; returns the exit status.

    After a second, and every ten seconds then, it says what is waited for.
    """
    started = time.monotonic()
    say_at = started + 1
    daemon = f"worker daemon {standing.pid}"
    while probe_pid_file(path) == standing:
        now = time.monotonic()
        if now - started >= timeout_s:
            waited = say_duration(timeout_s)
            jobs = waits_for(standing.pid)
            notice(f"{daemon} is still stopping after {waited}{jobs}")
            return TIMED_OUT
        if now >= say_at:
            say_at = now + 10
            jobs = waits_for(standing.pid)
            notice(f"{daemon} stops{jobs}")
        time.sleep(0.05)
    notice(f"{daemon} has stopped")
    return 0


# ---- private server ----------------------------------------------------------
#
# A MySQL or MariaDB for a machine without one: its data, its socket and its
# log lie in one folder, and `db start` needs nothing else. It listens on a
# socket only, and the folder's mode is its lock. A server here is started and
# stopped at will; its data must never be lost or half made by that.

# Where servers are installed that an ordinary PATH does not name.
SERVER_FOLDERS = (
    "/usr/sbin",
    "/usr/libexec",
    "/usr/local/sbin",
    "/usr/local/mysql/bin",
)
# The packages that suffice. The latter is for my_print_defaults.
MARIADB = "mariadb-server-core mariadb-client-core"

def find_server() -> str:
    """Returns the path of a mysqld or mariadbd on this machine.

    It raises a Problem if there is none.
    """
    folders = [os.environ.get("PATH", ""), *SERVER_FOLDERS]
    path = os.pathsep.join(folders)
    found = shutil.which("mysqld", path=path)
    if not found:
        found = shutil.which("mariadbd", path=path)
    if not found:
        raise Problem(
            f"no mysqld or mariadbd in PATH, {', '.join(SERVER_FOLDERS)}",
            f"install one (Debian: apt install {MARIADB}), or point DB_HOST "
            "at a server",
            UNAVAILABLE)
    return found

# A MariaDB that starts deletes the temporary tables of all others that share
# its folder for them, and was seen to crash one by that (10.11.19).
OWN_TMPDIR = "--tmpdir=."
# The kernel takes 107 bytes for a socket's path.
SOCKET_PATH_MAX = 100
# How long a server may take to answer, or to end.
SERVER_WAIT_S = 60.0
# How long a start waits for a server that was shut down just before.
DYING_WAIT_S = 10.0

class PrivateServer:
    """A server in a folder of its own: start and stop, as often as one likes."""
    def __init__(self, folder: str, program: str = "") -> None:
        """Takes the folder, which need not be there, and the program if known."""
        self.folder = absolute(folder)
        # Empty until a start has found one.
        self.program = program
        self.log = os.path.join(self.folder, "server.log")
        self._pid_file = os.path.join(self.folder, "mysqld.pid")
        self._data = os.path.join(self.folder, "data")

    @property
    def socket(self) -> str:
        """The path of its socket."""
        return private_socket(self.folder)

    def running(self) -> int:
        """Returns the server's PID, if it answers on its socket; else 0."""
        family = socket.AF_UNIX
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.settimeout(5)
            probe.connect(self.socket)
            # A dying server still accepts, but says nothing.
            if probe.recv(1):
                return self._noted_pid()
        return 0

    def start(self) -> bool:
        """Has the server run, with its data made if need be.

        It returns False if the server ran already, and raises a Problem if it
        cannot be brought up.
        """
        os.makedirs(self.folder, exist_ok=True)
        # This keeps others out: root has no password here.
        os.chmod(self.folder, 0o700)
        # Of two starts at once, the second finds a server that runs.
        lock_path = os.path.join(self.folder, "lock")
        with open(lock_path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.running():
                return False
            if not self.program:
                self.program = find_server()
            self._place_socket()
            self._await_dying()
            if not os.path.isdir(self._data):
                self._install()
            self._launch()
        return True

    def stop(self) -> bool:
        """Shuts the server down and waits for its end; False if it did not run."""
        pid = self.running()
        if not pid:
            return False
        send_signal(pid, signal.SIGTERM)
        self._until(lambda: not is_alive(pid), SERVER_WAIT_S, "did not stop")
        return True

    def _noted_pid(self) -> int:
        """Returns the PID that the server wrote down; 0 if there is none."""
        try:
            with open(self._pid_file) as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def _place_socket(self) -> None:
        """Finds a shorter place for the socket where the folder's path is long."""
        plain = os.path.join(self.folder, "mysqld.sock")
        if len(os.fsencode(plain)) <= SOCKET_PATH_MAX:
            return
        placed = os.path.dirname(self.socket)
        # What was placed before serves again, unless a cleaner of /tmp came.
        if placed != self.folder and os.path.isdir(placed):
            return
        elsewhere = tempfile.mkdtemp(prefix="queuectl-")
        note = os.path.join(self.folder, "socket")
        with open(note, "w") as file:
            file.write(os.path.join(elsewhere, "mysqld.sock"))

    def _await_dying(self) -> None:
        """Waits a while for an earlier server that is still ending."""
        # It holds its socket's lock until it is gone. The number may be an
        # old one that has passed to a stranger, so a start is tried anyway.
        dying = self._noted_pid()
        if not dying:
            return
        with contextlib.suppress(OSError, Problem):
            self._until(
                lambda: not is_alive(dying), DYING_WAIT_S, "is still ending")

    def _mariadb(self) -> bool:
        """Returns whether the program is MariaDB, by its own word."""
        # Its name does not tell: Debian's `mysqld` may be MariaDB.
        told = subprocess.run(
            [self.program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False)
        return "mariadb" in told.stdout.lower()

    def _install(self) -> None:
        """Makes the data folder; it raises a Problem that shows the log."""
        # It is made beside its place and moved there whole: what was cut short
        # is not taken for data.
        making = os.path.join(self.folder, "data.new")
        shutil.rmtree(making, ignore_errors=True)
        if self._mariadb():
            command = self._mariadb_installer()
        else:
            command = [
                self.program, "--no-defaults", "--initialize-insecure",
                f"--datadir={making}", OWN_TMPDIR,
            ]
        command += self._as_root()
        with open(self.log, "ab") as log:
            done = subprocess.run(
                command, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, check=False)
        if done.returncode or not os.path.isdir(making):
            raise self._failure("could not make its data folder")
        os.rename(making, self._data)

    def _mariadb_installer(self) -> list[str]:
        """Returns the command that makes a MariaDB's data, in `data.new`."""
        # The installer runs the first of these, which comes in another package.
        for tool in ("my_print_defaults", "mariadb-install-db"):
            installer = shutil.which(tool)
            if not installer:
                raise Problem(
                    f"{self.program} is there, but {tool} is not",
                    f"install both (Debian: apt install {MARIADB})",
                    UNAVAILABLE)
        return [
            installer or "",
            "--no-defaults",
            "--datadir=./data.new",
            OWN_TMPDIR,
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        ]

    def _launch(self) -> None:
        """Starts the server and waits until it answers, or raises a Problem."""
        command = self._server_command()
        # A session of its own: the terminal's Ctrl-C is not meant for it.
        with open(self.log, "ab") as log:
            server = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True)

        def answers_or_ended() -> bool:
            return bool(self.running()) or server.poll() is not None

        self._until(answers_or_ended, SERVER_WAIT_S, "did not answer")
        if server.poll() is not None:
            raise self._failure("did not start")
        # It outlives us: without this, Python warns of a child left running.
        server.returncode = 0

    def _server_command(self) -> list[str]:
        """Returns the command line of the server itself."""
        command = [
            self.program,
            "--no-defaults",
            f"--datadir={self._data}",
            f"--socket={self.socket}",
            "--skip-networking",
            f"--pid-file={self._pid_file}",
            OWN_TMPDIR,
        ]
        command += self._as_root()
        # MySQL's second protocol would listen at places of its own. MariaDB
        # has none, and refuses the option.
        if not self._mariadb():
            command.append("--mysqlx=OFF")
        return command

    def _as_root(self) -> list[str]:
        """Returns the option without which a server refuses to run as root."""
        if os.geteuid() == 0:
            return ["--user=root"]
        return []

    def _until(self, condition: Callable[[], bool],
               seconds: float, what: str) -> None:
        """Waits for a condition; a Problem says `what` did not come about."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise self._failure(f"{what} within {say_duration(seconds)}")
            time.sleep(0.05)

    def _failure(self, what: str) -> Problem:
        """Returns a Problem that shows the server's last words."""
        hint = f"see {self.log}"
        # A confined program may not use our folder, and its log does not name
        # the cause.
        name = os.path.basename(self.program)
        profile = f"/etc/apparmor.d/usr.sbin.{name}"
        if os.path.exists(profile):
            hint = (
                f"AppArmor confines {self.program} ({profile}): use a server "
                "that is set up (DB_HOST), or have an administrator allow "
                "this folder")
        return Problem(
            f"the private server {what}{_log_tail(self.log)}",
            hint,
            UNAVAILABLE)


# ---- terminal ----------------------------------------------------------------
#
# What a person or a program reads: lines, tables, JSON, a job's output and a
# bar of progress. Results go to standard output and all else to standard
# error. What came out of the database must never steer the terminal: its
# control characters are shown, not sent.

LEFT_OUT_MARK = b"\n[queuectl: %d bytes are left out here]\n"

def escaped(text: str) -> str:
    """Returns the text on one line, with its control characters shown."""
    return text.translate(ESCAPES)

def print_notice(text: str) -> None:
    """Prints a line of talk beside a result, on standard error."""
    print(text, file=sys.stderr)

def print_line(text: str) -> None:
    """Prints a line of the result; what the locale cannot show becomes `?`."""
    try:
        print(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        data = text.encode(encoding, "replace")
        print(data.decode(encoding))

def print_json(document: Json) -> None:
    """Prints a document as JSON, on one line."""
    print(json.dumps(document))

def print_output(pieces: Iterable[OutputPiece]) -> int:
    """Prints a job's output, piece by piece, and ends its last line.

    On a terminal its control characters are shown, and a cut is marked. Into a
    file or a pipe it goes as it is, and nothing else; returns how many bytes
    are missing there.
    """
    # A character may begin in one piece and end in the next.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = "\n"
    missing = 0
    for piece in pieces:
        if sys.stdout.isatty():
            data = piece.data
            if piece.left_out:
                data = LEFT_OUT_MARK % piece.left_out + data
            text = decoder.decode(data)
            printable = text.translate(MULTILINE)
            sys.stdout.write(printable)
            # A piece may be a part of a character only, and print nothing.
            last = printable or last
        else:
            missing += piece.left_out
            sys.stdout.buffer.write(piece.data)
        # Whoever follows a job sees each piece as it comes.
        sys.stdout.flush()
    if not last.endswith("\n"):
        print_line("")
    return missing

# -- widths

def columns_of(text: str) -> int:
    """Returns how many columns a terminal gives the text."""
    if text.isascii():
        return len(text)
    # Most texts are ASCII, and need not pay for this import.
    import unicodedata
    columns = 0
    for char in text:
        # An accent stands above the letter before it.
        if unicodedata.combining(char):
            continue
        # Wide and full-width characters, as Chinese has, take two columns.
        wide = unicodedata.east_asian_width(char) in "WF"
        columns += 1
        if wide:
            columns += 1
    return columns

def fit(text: str, width: int) -> str:
    """Returns the text padded to `width` columns, or cut, with a mark."""
    if columns_of(text) > width:
        while text and columns_of(text) > width - 1:
            text = text[:-1]
        text += "…"
    missing = width - columns_of(text)
    return text + " " * missing

def terminal_width() -> int:
    """Returns the terminal's columns; a generous width where there is none."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 200
    # A terminal that does not know its size says 0.
    return size.columns or 80

# -- tables

# Each row: the left corner, the line, what parts two columns, the right corner.
# They stand for a table's top, its cells, the rule below the titles, its end.
BOX = ("┌─┬┐", "│ ││", "├─┼┤", "└─┴┘")
ASCII_BOX = ("+-++", "| ||", "+-++", "+-++")
# A narrow terminal leaves a table's last column at least so many columns.
LAST_COLUMN_MIN = 12

def print_table(
        titles: Sequence[str],
        rows: Iterable[Sequence[object]],
        spare: Sequence[str] = ()) -> None:
    """Prints a table that fits into the terminal, if it can.

    Where the terminal is too narrow, the last column gives way down to 12
    columns, then the `spare` ones are left out in their order.
    """
    table = [list(titles)]
    for row in rows:
        cells = [_cell_text(cell) for cell in row]
        table.append(cells)
    columns = list(zip(*table))
    widths = []
    for column in columns:
        widths.append(max(map(columns_of, column)))
    last_min = min(widths[-1], LAST_COLUMN_MIN)
    for title in spare:
        if _width_of_last(widths) >= last_min:
            break
        shown = [column[0] for column in columns]
        number = shown.index(title)
        del columns[number]
        del widths[number]
    left = _width_of_last(widths)
    last_max = max(left, last_min)
    widths[-1] = min(widths[-1], last_max)
    _draw_table(columns, widths)

def _cell_text(cell: object) -> str:
    if cell is None:
        return ""
    return escaped(str(cell))

def _width_of_last(widths: Sequence[int]) -> int:
    """Returns what the terminal has left for the last column; it may be negative."""
    others = sum(widths[:-1])
    # Each column has a line and a blank before it and a blank behind it, and a
    # line ends the row.
    frame = 3 * len(widths) + 1
    return terminal_width() - others - frame

def _draw_table(columns: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Prints the columns in a frame, with a rule below their titles."""
    top, sides, middle, bottom = _box()
    side = sides[0]
    print_line(_table_rule(top, widths))
    for number, row in enumerate(zip(*columns)):
        cells = map(fit, row, widths)
        inside = f" {side} ".join(cells)
        print_line(f"{side} {inside} {side}")
        if number == 0:
            print_line(_table_rule(middle, widths))
    print_line(_table_rule(bottom, widths))

def _box() -> Sequence[str]:
    """Returns what tables are drawn with; plain ASCII where no more is shown."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        "".join(BOX).encode(encoding)
    except UnicodeEncodeError:
        return ASCII_BOX
    return BOX

def _table_rule(shape: str, widths: Sequence[int]) -> str:
    """Returns a line across the table, drawn with a row of the box."""
    # A blank stands on either side of what a column shows.
    parts = [shape[1] * (width + 2) for width in widths]
    inside = shape[2].join(parts)
    return shape[0] + inside + shape[3]

def print_rows(
        rows: Sequence[Mapping[str, Json]],
        as_json: bool,
        titles: Sequence[str],
        keys: Sequence[str],
        spare: Sequence[str] = ()) -> None:
    """Prints rows as JSON, an object a line, or as a table of these keys."""
    if as_json:
        for row in rows:
            print_json(dict(row))
        return
    table = []
    for row in rows:
        cells = [_yes_or_blank(row[key]) for key in keys]
        table.append(cells)
    print_table(titles, table, spare)

def _yes_or_blank(value: Json) -> Json:
    """Returns a truth as a table shows it, and any other value as it is."""
    if value is True:
        return "yes"
    if value is False:
        return ""
    return value


# ---- explain -----------------------------------------------------------------
#
# Why a job is where it is, in one sentence: what it waits for, who runs it, how
# it ended, and the command that gets it further where a person is needed. It
# reads what a worker would go by, by the database's clock alone, and changes
# nothing. The queue moves on while it reads: it tells what it met.

class DatabaseTime(NamedTuple):
    """The database's clock, as one row."""
    now: datetime.datetime

class RunningState(NamedTuple):
    """What is asked of a running job, and how its worker is."""
    cancel_requested_at: Moment
    heartbeat_at: Moment  # None: the worker has no row any more
    lease_s: float
    pid: int | None  # the worker process's

class UnmetNeed(NamedTuple):
    """A job that another one still waits for."""
    id: str
    state: str
    worker: str | None

def database_time(database: Database) -> datetime.datetime:
    """Returns the time that all time columns go by: UTC, without a zone."""
    [row] = database.records(DatabaseTime, "SELECT UTC_TIMESTAMP(6) AS now")
    return row.now

def explain(store: JobQueries, job_id: str) -> tuple[JobRow, str]:
    """Returns a job and its sentence; a Problem if there is no such job."""
    # The clock is read first: of what is read later nothing seems overdue that
    # was not.
    now = database_time(store.database)
    details = store.details(job_id)
    return details.row, _Explanation(store, details, now).sentence()

NUMBER_WORDS = (
    "never", "once", "twice", "three times", "four times", "five times")
UNMET_SHOWN = 3  # parents that the sentence names; it counts the others

def _outcome(job: JobRow, times: int) -> str:
    """Returns how a job's last run ended, and how often runs ended so."""
    what = str(job.reason)
    if job.reason == Reason.EXIT:
        what += f" {job.exit_code}"
    how_often = f"{times} times"
    if times < len(NUMBER_WORDS):
        how_often = NUMBER_WORDS[times]
    return f"{what} {how_often}"

def _attempt(job: JobRow, number: int) -> str:
    # The setting max_retries may have been lowered since it ran.
    most = max(job.max_attempts, number)
    return f"attempt {number} of {most}"

def _nobody_serves(queue_name: str) -> str:
    return (f"no live worker serves queue `{queue_name}`; start one: "
            f"queuectl worker start --queue {queue_name}")

class _Explanation:
    """One job as it was read, and the sentence about it.

    Each state has a method of its own, which returns the whole sentence.
    """

    def __init__(self, store: JobQueries, details: JobDetails,
                 now: datetime.datetime) -> None:
        """Takes a job as it was read, and the database's time then."""
        self.store = store
        self.database = store.database
        self.row = details.row
        self.history = details.history
        self.now = now

    def sentence(self) -> str:
        """Returns why the job is where it is."""
        state = self.row.state
        if state == State.PENDING:
            return self._pending()
        if state == State.PROCESSING:
            return self._processing()
        if state == State.BLOCKED:
            return self._blocked()
        if state in (State.SCHEDULED, State.FAILED):
            return self._later()
        if state == State.DEAD:
            return self._dead()
        return self._completed_or_cancelled()

    # -- it may run now

    def _pending(self) -> str:
        """Returns why no worker has claimed it yet.

        What holds up the whole queue is told before what holds up this job.
        """
        limited = self._held_up_by_limit()
        if limited:
            return limited
        serving = self._serving()
        if not serving:
            return _nobody_serves(self.row.queue)
        if self._is_to_run_alone():
            return ("lost with its worker twice: "
                    "it runs alone, once a worker is idle or has a slot to lend")
        queue = f"queue `{self.row.queue}`"
        place = self._ahead() or f"next in {queue}"
        slots = sum(worker.slots for worker in serving)
        busy = sum(worker.busy for worker in serving)
        free = slots - busy
        return f"{place}; {free} of {slots} slots that serve {queue} are free"

    def _held_up_by_limit(self) -> str:
        """Returns how a pause or a limit of its queue holds it up, or ""."""
        name = self.row.queue
        found = self.database.records(
            QueueLimit,
            f"SELECT {field_list(QueueLimit)} FROM queues WHERE name = %s",
            name)
        # Most queues have no row: nobody ever limited them.
        if not found:
            return ""
        [queue] = found
        if queue.paused_at:
            return (f"queue `{name}` paused; "
                    f"resume it: queuectl queue resume {name}")
        if queue.max_running is None:
            return ""
        return self._held_up_at(queue.max_running)

    def _held_up_at(self, limit: int) -> str:
        """Returns who has reached the limit of its queue, or ""."""
        name = self.row.queue
        running = self.database.rows(
            str,
            "SELECT id FROM jobs WHERE state = 'processing' AND queue = %s",
            name)
        if len(running) < limit:
            return ""
        reached = f"limit {limit} of `{name}` reached"
        # A limit of 0 is reached by none.
        if running:
            reached += f" by {abbreviated(running)}"
        ahead = self._ahead()
        return f"{reached}; {ahead}" if ahead else reached

    def _serving(self) -> list[WorkerRow]:
        """Returns the workers that may claim it."""
        serving = []
        for worker in self.store.workers():
            # One that is silent, or stopping, claims nothing.
            if worker.state == "running" and worker.serves(self.row.queue):
                serving.append(worker)
        return serving

    def _is_to_run_alone(self) -> bool:
        """Returns whether it was lost so often that it must run alone."""
        found = self.database.rows(
            int, "SELECT 1 FROM jobs WHERE seq = %s AND losses >= %s",
            self.row.seq, ALONE_AFTER_LOSSES)
        return bool(found)

    def _ahead(self) -> str:
        """Returns how many jobs of its queue are claimed before it, or ""."""
        row = self.row
        # claim_order is the priority with its sign turned around. The index
        # holds the jobs in the order of claims; left to itself, the server may
        # walk the whole table.
        order = -row.priority
        [count] = self.database.rows(
            int,
            f"""
            SELECT COUNT(*)
              FROM (SELECT 1 FROM jobs FORCE INDEX (jobs_claim)
                     WHERE state = 'pending' AND queue = %s
                           AND (claim_order < %s
                                OR (claim_order = %s AND seq < %s))
                     LIMIT {COUNTED_UP_TO}) AS ahead
            """, row.queue, order, order, row.seq)
        if not count:
            return ""
        # Counting stopped there: there may be more.
        amount = f"{count:,}+" if count == COUNTED_UP_TO else f"{count:,}"
        jobs = "job" if count == 1 else "jobs"
        return f"{amount} {jobs} ahead in queue `{row.queue}`"

    # -- it waits

    def _later(self) -> str:
        """Returns when it is due, and what will hold it up then."""
        row = self.row
        attempt = _attempt(row, row.attempts + 1)
        # A worker's next turn makes it pending. What holds up the pending ones
        # holds it up as well.
        if row.next_run_at and row.next_run_at <= self.now:
            return f"due ({attempt}): {self._pending()}"
        text = f"due in {self._since(row.next_run_at)} ({attempt})"
        if row.state == State.FAILED:
            text += f"; {_outcome(row, 1)}"
        if not self._serving():
            text += f"; then {_nobody_serves(row.queue)}"
        return text

    def _blocked(self) -> str:
        """Returns which jobs it waits for, and how each of them is."""
        unmet = self.database.records(
            UnmetNeed,
            f"""
            SELECT id, state, worker
              FROM {PARENTS_SQL}
             WHERE child = %s AND NOT {MET_SQL}
             ORDER BY parent
            """, self.row.seq)
        if not unmet:
            return self._released_soon()
        parents = []
        for parent in unmet[:UNMET_SHOWN]:
            where = f"is {parent.state}"
            if parent.state == State.PROCESSING:
                where = f"runs on {self._host(parent.worker)}"
            parents.append(f"{parent.id}, which {where}")
        text = "waits for " + "; ".join(parents)
        if len(unmet) > UNMET_SHOWN:
            text += f" and {len(unmet) - UNMET_SHOWN} more"
        return text

    def _released_soon(self) -> str:
        """Returns why it is still blocked, although it waits for no job."""
        parents = self.database.rows(
            int, "SELECT parent FROM dependencies WHERE child = %s LIMIT 1",
            self.row.seq)
        # Of the many that wait for one job, some are released at a time.
        if parents:
            return "all that it waited for has ended: it is released next"
        # The jobs of a large enqueue are stored as blocked, and released only
        # after its COMMIT.
        return "being enqueued together with many others"

    # -- it runs

    def _processing(self) -> str:
        """Returns where it runs, for how long, and what is amiss there."""
        row = self.row
        run = _attempt(row, row.attempts)
        if row.timeout:
            run += f", time limit {say_duration(row.timeout)}"
        for_how_long = self._since(row.started_at)
        text = f"runs on {self._host(row.worker)} for {for_how_long} ({run})"
        found = self.database.records(
            RunningState,
            """
            SELECT cancel_requested_at, heartbeat_at, lease_s, pid
              FROM jobs LEFT JOIN workers ON workers.id = worker
             WHERE seq = %s
            """, row.seq)
        # The job may have been purged since: then there is no more to say.
        for running in found:
            if running.pid:
                text += f", by worker {row.worker}, PID {running.pid} there"
            text += self._asked(running)
            text += self._stuck() or self._silence(running)
        return text

    def _stuck(self) -> str:
        """Returns why it still counts as running without a worker, or ""."""
        last_run = self.history[-1] if self.history else None
        # A run without a reason has not ended.
        if last_run and last_run.detail and not last_run.reason:
            return f"; {last_run.detail}"
        return ""

    def _asked(self, running: RunningState) -> str:
        """Returns when a person cancelled it, or ""."""
        asked_at = running.cancel_requested_at
        if not asked_at:
            return ""
        return f"; cancelled {self._ago(asked_at)}, its worker is to end it"

    def _silence(self, running: RunningState) -> str:
        """Returns what its worker's heartbeat gives cause for, or ""."""
        worker, beat_at = self.row.worker, running.heartbeat_at
        if not beat_at:
            return f"; its worker {worker} is gone, another is to take over"
        # A worker raises its heartbeat several times in a lease. Half of one
        # without is worth a word, though nothing is lost yet.
        silent_s = (self.now - beat_at).total_seconds()
        if silent_s <= running.lease_s / 2:
            return ""
        lease = say_duration(running.lease_s)
        # A worker cannot tell of itself that it is lost: another one does.
        silence = self._since(beat_at)
        return (f"; its worker {worker} has been silent for {silence}: "
                f"lost after {lease}, if another is there to see")

    # -- it has ended

    def _completed_or_cancelled(self) -> str:
        """Returns how it ended; where and how long it ran, if it did."""
        row = self.row
        text = row.state
        last_run = self.history[-1] if self.history else None
        # A job that is cancelled while it waits may have run before: its last
        # run then ended for another reason, and is not what ended the job.
        if last_run and last_run.reason == row.reason:
            duration = say_duration(row.duration or 0)
            text += f" on {self._host(row.worker)} in {duration}"
        return f"{text}, {self._ago(row.finished_at)}"

    def _dead(self) -> str:
        """Returns what it died of, how often, and how to put it back."""
        row = self.row
        line = self.database.read(lambda cursor: cursor.value(
            "SELECT last_line FROM dlq WHERE job_seq = %s", row.seq))
        # The dead letter of a job that never ran says what it waited for.
        put_back = f"put it back: queuectl dlq retry {row.id}"
        if row.reason == Reason.DEPENDENCY:
            cause = str(line or "")
            roots = self.database.read(lambda cursor: roots_of(cursor, row.seq))
            if roots:
                named = [f"{root.id} ({root.outcome})" for root in roots]
                cause += f", which goes back to {abbreviated(named)}"
                put_back = f"put all back: {bring_back(roots)}"
        else:
            alike = [run for run in self.history
                     if run.reason == row.reason
                     and run.exit_code == row.exit_code]
            cause = _outcome(row, len(alike))
            if line:
                cause += f', last line "{line}"'
        return f"dead: {cause}, {self._ago(row.finished_at)}; {put_back}"

    # -- words

    def _host(self, worker: str | None) -> str:
        """Returns the host of a worker."""
        worker = str(worker)
        found = self.database.rows(
            str, "SELECT host FROM workers WHERE id = %s", worker)
        if found:
            return found[0]
        # Its row is gone, but its id begins with its host.
        host, _, _ = worker.rpartition("-")
        return host

    def _ago(self, moment: Moment) -> str:
        return f"{self._since(moment)} ago"

    def _since(self, moment: Moment) -> str:
        """Returns how far a moment is from now, be it past or to come."""
        if moment is None:
            moment = self.now
        apart = self.now - moment
        return say_duration(abs(apart.total_seconds()))


# ---- diagnostics -------------------------------------------------------------
#
# What stands between here and a queue that works well: the connection, the
# server's variables, the account's rights, the doorbell, and what the tables
# tell. Each thing is one Check, which carries its remedy, and is told as it
# comes. A check never changes a row, and only the one of the locks takes any.

class Check(NamedTuple):
    """One thing that was checked, and what to do where it is not well."""
    check: str
    ok: bool
    found: str
    remedy: str = ""

# What SHOW VARIABLES and SHOW STATUS say, by name.
ServerVariables = Mapping[str, str]

def check_all(target: ConnectionInfo, settings: Settings) -> Iterator[Check]:
    """Yields the checks of the server and the tables, each as it is made."""
    # What a lock does is only seen from a second connection.
    with contextlib.closing(Database(target, READING)) as one, \
            contextlib.closing(Database(target, READING)) as two:
        connection = _check_connection(one)
        yield connection
        # Each of the others would say the same once more.
        if not connection.ok:
            return
        yield from _check_server(one)
        yield from _check_locks(one, two)
        yield _check_packets(one)
        yield _check_rights(one)
        yield _check_doorbell(one, settings)
        yield from _check_work(JobQueries(one, settings))

def _check_connection(database: Database) -> Check:
    """Returns whether the server answers, and to whom."""
    target = database.target
    try:
        answered = bool(database.rows(int, "SELECT 1"))
    except Problem as problem:
        return Check("connection", False, problem.what, problem.hint)
    return Check(
        "connection", answered,
        f"{target} (from {target.source}), account {target.user!r} "
        f"(from {target.account_source})")

# -- the server

# The isolation level is tx_isolation for MariaDB before 11.1, and
# transaction_isolation for MySQL 8. A server leaves out what it does not know.
VARIABLES_SQL = """
    SHOW VARIABLES
    WHERE Variable_name IN (
        'log_bin', 'transaction_isolation', 'tx_isolation', 'binlog_format',
        'sync_binlog', 'innodb_flush_log_at_trx_commit', 'max_connections',
        'max_allowed_packet')"""
STATUS_SQL = """
    SHOW STATUS WHERE Variable_name IN ('Ssl_cipher', 'Threads_connected')"""

def _check_server(database: Database) -> Iterator[Check]:
    """Yields the checks of the server's release and of how it is set up."""
    variables: dict[str, str] = database.pairs(VARIABLES_SQL)
    status: dict[str, str] = database.pairs(STATUS_SQL)
    yield _check_release(database)
    yield _check_tls(database.target, status)
    yield _check_isolation(database, variables)
    yield _check_durability(variables)
    yield _check_clock(database)
    yield _check_packet(variables)
    yield _check_connections(database, variables, status)

def _check_release(database: Database) -> Check:
    """Returns whether the server is new enough for SKIP LOCKED."""
    oldest = OLDEST_MARIADB if database.mariadb else OLDEST_MYSQL
    needed = ".".join(map(str, oldest))
    return Check(
        "server", release_of(database.version) >= oldest, database.version,
        f"from {needed} on claims do not wait for each other")

# Whatever goes to these stays on this host, and needs no TLS.
LOOPBACK = {"127.0.0.1", "::1", "localhost"}

def _check_tls(target: ConnectionInfo, status: ServerVariables) -> Check:
    """Returns whether what leaves this host is encrypted."""
    cipher = status.get("Ssl_cipher", "")
    remote = {host for host, _ in target.hosts} - LOOPBACK
    found = "none"
    if cipher:
        # The other modes encrypt, but take any certificate.
        verified = target.ssl_mode.startswith("verify")
        sure = "verified" if verified else "not verified"
        found = f"{cipher}, the server's certificate is {sure}"
    elif target.socket:
        found = "none, by a socket"
    return Check(
        "TLS", bool(cipher) or not remote, found,
        "set DB_SSL_MODE=required, or verify_identity and DB_SSL_CA")

def _check_isolation(database: Database, variables: ServerVariables) -> Check:
    """Returns whether our transactions read what others have committed."""
    level = variables.get("transaction_isolation")
    if not level:
        level = variables.get("tx_isolation", "")
    logged = "no binlog"
    if _has_binlog(variables):
        logged = f"binlog_format {variables.get('binlog_format')}"
    # Every session asks for READ COMMITTED. A binlog that logs statements
    # refuses what it writes then, and room "database" falls back.
    ok = level == "READ-COMMITTED" and database.read_committed
    return Check(
        "isolation", ok, f"{level}, {logged}",
        "SET PERSIST binlog_format = 'ROW'")

def _has_binlog(variables: ServerVariables) -> bool:
    return variables["log_bin"] == "ON"

def _check_durability(variables: ServerVariables) -> Check:
    """Returns whether a COMMIT that was answered outlives a crash."""
    names = ["innodb_flush_log_at_trx_commit"]
    # After a crash the binlog decides which transactions stand, so that it
    # must be on the disk as well.
    if _has_binlog(variables):
        names.append("sync_binlog")
    ok = all(variables[name] == "1" for name in names)
    found = [f"{name} {variables[name]}" for name in names]
    return Check(
        "durability", ok, ", ".join(found),
        "set them to 1: else a crash of the server loses "
        "what was acknowledged")

SKEW_S_MAX = 2.0

def _check_clock(database: Database) -> Check:
    """Returns whether this host's clock and the server's agree."""
    there = database_time(database)
    # The time columns are UTC without a zone, and Python compares no such
    # time with one that has a zone.
    here = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    skew_s = abs((here - there).total_seconds())
    return Check(
        "clock", skew_s < SKEW_S_MAX, f"{skew_s:.1f} s apart",
        "run a time service: queuectl compares no clocks, its readers do")

MIB = 1 << 20
PACKET_MIB_MIN = 16

def _check_packet(variables: ServerVariables) -> Check:
    """Returns whether a run's output fits into one statement."""
    packet_mib = int(variables["max_allowed_packet"]) // MIB
    return Check(
        "packet", packet_mib >= PACKET_MIB_MIN,
        f"max_allowed_packet {packet_mib} MiB",
        "set it to 16 MiB or more: else large output is not stored")

def _check_packets(database: Database) -> Check:
    """Returns whether statements share packets, and so round trips."""
    packs = database.read(lambda cursor: cursor.packs)
    found = "several go in one packet"
    if not packs:
        found = "each goes in a packet of its own"
    return Check(
        "statements", packs, found,
        "work is right, only slower: MySQL Router forbids them by "
        "connection_sharing=1")

# So many are to be left for people, and for whatever else uses the server.
SPARE_CONNECTIONS = 10

class WorkerProcesses(NamedTuple):
    """How many processes of live workers there are."""
    workers: int
    supervisors: int

def _check_connections(database: Database, variables: ServerVariables,
                       status: ServerVariables) -> Check:
    """Returns whether the server has connections to spare."""
    [processes] = database.records(
        WorkerProcesses,
        """
        SELECT COUNT(*) AS workers,
               COUNT(DISTINCT host, supervisor) AS supervisors
          FROM workers
         WHERE lost_at IS NULL
        """)
    most = int(variables["max_connections"])
    used = int(status["Threads_connected"])
    # A worker keeps one, and a supervisor's doorbell is one more.
    return Check(
        "connections", most - used >= SPARE_CONNECTIONS,
        f"{used} of {most} in use; the workers here want {processes.workers} "
        f"and {processes.supervisors} more",
        "raise max_connections")

# -- locks and rights

def _check_locks(one: Database, two: Database) -> Iterator[Check]:
    """Yields whether SKIP LOCKED passes over a locked row, and the schema.

    `one` locks the schema's row, and `two` is to find it missing.
    """
    def is_passed_over(cursor: Cursor) -> bool:
        """Returns whether `two` does not see what `one` has locked."""
        locked = cursor.rows(str, f"{SCHEMA_ROW} FOR UPDATE")
        seen = two.rows(str, f"{SCHEMA_ROW} FOR UPDATE SKIP LOCKED")
        return bool(locked) and not seen

    # A server may take the words and not heed them, as TiDB does. Claims then
    # wait for each other, and are right all the same.
    try:
        understood = bool(two.read(two.skip_locked))
        skipped = understood and one.transact(is_passed_over)
        found, hint = "it locks nothing here", "claims are right, only slower"
        if skipped:
            found = "a locked row is passed over"
    except Problem as problem:
        skipped, found, hint = False, problem.what, problem.hint
    yield Check("SKIP LOCKED", skipped, found, hint)
    [version] = one.rows(str, SCHEMA_ROW)
    # What follows the slash says which programs may still write.
    schema, _, _ = version.partition("/")
    yield Check(
        "schema", True, f"schema {schema}, this program's {SCHEMA_VERSION}")

TABLES = ("jobs", "dependencies", "runs", "dlq", "workers", "queues",
          "schedules", "config")

def _check_rights(database: Database) -> Check:
    """Returns whether the account may do what workers do."""
    lacking = []
    for table in TABLES:
        for right, statement in _harmless_statements(table).items():
            try:
                database.run(statement)
            except Problem:
                lacking.append(f"{right} on {table}")
    found = "all that workers need"
    if lacking:
        found = f"lacking: {', '.join(lacking)}"
    return Check(
        "rights", not lacking, found, "grant them: README, Accounts")

def _harmless_statements(table: str) -> dict[str, str]:
    """Returns for each right a statement that needs it, and touches no row."""
    into, columns = table, "*"
    # `jobs` has generated columns, which take no value.
    if table == "jobs":
        into, columns = "jobs (command)", "command"
    # The server checks the rights before it finds that there is no row.
    nothing = f"FROM {table} WHERE FALSE"
    return {
        "SELECT": f"SELECT 1 {nothing}",
        "DELETE": f"DELETE {nothing}",
        "INSERT": f"INSERT INTO {into} SELECT {columns} {nothing}"}

# -- the doorbell

# After so long without an answer the doorbell counts as broken.
RUNG_WITHIN_S = 2

def _check_doorbell(database: Database, settings: Settings) -> Check:
    """Returns whether a parked sleep can be ended, and in what time."""
    if settings.doorbell != "on":
        return Check(
            "doorbell", True, "switched off: the poll finds the work")
    # A name that no worker has: no worker is woken by our rings.
    name = f"check-{secrets.token_hex(4)}"
    rung = threading.Event()
    doorbell = Doorbell(database.target, f"{name} -", rung.set)
    doorbell.park()
    took_s = _ring_until(database, name, rung)
    found = "cannot be rung"
    if rung.is_set():
        found = f"rings in {took_s * 1e3:.1f} ms"
    return Check(
        "doorbell", rung.is_set(), found,
        "config set doorbell off: the poll finds work")

def _ring_until(database: Database, name: str, rung: threading.Event) -> float:
    """Rings until `rung` is set, or for RUNG_WITHIN_S.

    Returns how many seconds the last ring took.
    """
    until = time.monotonic() + RUNG_WITHIN_S
    started = 0.0
    while not rung.is_set() and time.monotonic() < until:
        # The sleep is parked by a thread that has to connect first; a ring
        # that comes before it wakes nobody, and is done again.
        time.sleep(0.05)
        started = time.monotonic()
        ring(database, worker=name)
        rung.wait(0.2)
    return time.monotonic() - started

# -- what the tables tell

DEAD_LETTERS_MAX = 100_000

def _check_work(store: JobQueries) -> Iterator[Check]:
    """Yields whether all queues are served, and how many jobs are dead."""
    unserved = store.unserved()
    found = "all that may run now are served"
    if unserved:
        names = abbreviated(unserved)
        found = f"no live worker serves {names}, where jobs wait"
    queues = ",".join(unserved)
    yield Check(
        "queues", not unserved, found,
        f"start one: queuectl worker start --queue {queues}")
    dead = store.count_dead_letters(SqlCondition("TRUE", ()))
    yield Check(
        "dead letters", dead <= DEAD_LETTERS_MAX, f"{dead:,}",
        "see: queuectl dlq groups; then dlq retry or purge --state dead")


# ---- commands ----------------------------------------------------------------
#
# What a person can type. A command is declared in one place, name, arguments,
# examples and body, and its docstring is its help. It reads its arguments,
# asks one or two things of the rooms above, and prints: results on standard
# output and all else on standard error, so that a pipe gets only results. No
# SQL is made of what a person typed: that is checked, and bound as a value.

# -- how a command is declared

# It gets the arguments; None is exit status 0.
Body = Callable[[argparse.Namespace], Optional[int]]
# The names of an argument, and what argparse is told of it.
Arg = Tuple[Tuple[str, ...], "dict[str, object]"]

class Command(NamedTuple):
    """One thing that a person can type."""
    name: str
    body: Body
    args: tuple[Arg, ...]
    examples: Sequence[str]

    @property
    def summary(self) -> str:
        """The first sentence of its help, without the full stop."""
        text = self.body.__doc__ or ""
        first, _, _ = text.partition("\n")
        return first.rstrip(".")

COMMANDS: dict[str, Command] = {}

def command(name: str, *args: Arg,
            examples: Sequence[str] = ()) -> Callable[[Body], Body]:
    """Returns the decorator that makes a function the command `name`."""
    def declare(body: Body) -> Body:
        COMMANDS[name] = Command(name, body, args, examples)
        return body
    return declare

def arg(*names: str, **options: object) -> Arg:
    return names, options

def option(kind: ValueType[T]) -> Callable[[str], T]:
    """Returns what reads a ValueType for argparse; its errors can be told."""
    def read(text: str) -> T:
        """Returns the value; what it raises, argparse tells in our words."""
        try:
            return kind.convert(text)
        except (ValueError, OverflowError):
            # argparse itself would answer "invalid read value", after this
            # function.
            what = f"expected {kind.expects}, not {excerpt(text)}"
            raise argparse.ArgumentTypeError(what) from None
    return read

def option_of(key: str) -> str:
    return "--" + key.replace("_", "-")

# -- arguments that several commands share

AS_JSON = arg(
    "--json",
    action="store_true",
    help="for programs: an object a line")
IDS = arg("ids", nargs="+", metavar="ID", help="the job's id")
ID = arg("id", metavar="ID", help="the job's id")
LIMIT = arg(
    "--limit",
    type=option(whole(0, 10**9)),
    metavar="N",
    help="at most so many rows; 0: all (default 100, with --json all)")
PID_FILE = arg(
    "--pid-file",
    metavar="FILE",
    help="the daemon's PID file (default $PID_FILE or ./workers.pid)")
COMMAND_OPTION = arg(
    "-c",
    dest="command",
    metavar="CMD",
    help="a shell command",
    type=option(COMMAND))

def _job_options() -> Iterator[Arg]:
    """Yields an option for every key of a job but its command."""
    for name, key in JOB_KEYS.items():
        # A repeated option can be checked only once all its values are
        # there.
        reading: dict[str, object] = {"type": option(key.kind)}
        if name in REPEATABLE:
            reading = {"action": "append"}
        # The command comes by -c, or after --.
        if name != "command":
            yield arg(
                option_of(name),
                dest=name,
                help=key.help,
                metavar=key.metavar,
                **reading)

JOB_OPTIONS = tuple(_job_options())

@dataclass(frozen=True)
class PointInTime:
    """A moment in the past: an age, or a time. The other one is None."""
    age_s: float | None
    utc: str | None  # as the database writes it

    def as_sql(self) -> tuple[str, object]:
        """Returns an SQL expression, and the one value to bind into it."""
        # An age is counted back from the database's clock, like all that is
        # due: this host's may be wrong.
        if self.age_s is not None:
            return "UTC_TIMESTAMP(6) - INTERVAL %s SECOND", self.age_s
        return "%s", self.utc

def _read_point_in_time(text: str) -> PointInTime:
    """Returns the moment that a duration or an ISO 8601 time stands for.

    It raises ValueError for neither, and a Problem for a time without a zone.
    """
    with contextlib.suppress(ValueError):
        age_s = duration().convert(text)
        return PointInTime(age_s, None)
    return PointInTime(None, _read_time(text))

AGE = ValueType(
    _read_point_in_time,
    "a duration such as 7d, or a time such as 2026-11-24T10:00:00Z")

# -- the queue, and what came of it

def configured_by(environment: Environment,
                  policy: RetryPolicy) -> LoadedSettings:
    """Returns the settings in force; the stored ones come from the database."""
    target = find_connection(environment)
    with contextlib.closing(Database(target, policy)) as database:
        return load_settings(environment, read_config(database))

@contextlib.contextmanager
def open_store(policy: RetryPolicy = READING) -> Iterator[JobStore]:
    """Gives the queue as a person reaches it, with the settings in force."""
    environment = Environment.read()
    target = find_connection(environment)
    with contextlib.closing(Database(target, policy)) as database:
        loaded = load_settings(environment, read_config(database))
        yield JobStore(database, loaded.settings)

# What a person, a terminal that goes away, or a service manager sends.
LEAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

@contextlib.contextmanager
def interrupted_by(*numbers: int) -> Iterator[None]:
    """Has these signals raise Interrupted, but for those that are ignored.

    So nohup, and a shell that starts us in the background, keep their word.
    """
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

@contextlib.contextmanager
def ignored(*numbers: int) -> Iterator[None]:
    """Has these signals do nothing."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def report(results: Iterable[ActionResult], as_json: bool,
           store: JobStore | None = None) -> int:
    """Prints what a verb did to each job, and rings the workers of `store`.

    Returns the exit status: 1 where one of them failed.
    """
    status = 0
    for result in results:
        if not result.ok:
            status = CANNOT
        if as_json:
            error = None if result.ok else result.error
            print_json({
                "id": result.id,
                "ok": result.ok,
                "state": result.state,
                "error": error})
        elif result.ok:
            print_line(f"job {result.id} {result.note}")
        else:
            notice(f"{result.error}")
        # The results come one by one, as `wait` meets them, and a reader at
        # the other end of a pipe is to see each at once.
        sys.stdout.flush()
    # One ring for all of them: a worker that wakes takes whatever is due by
    # then.
    if store:
        ring(store.database)
    return status

def _limit(args: argparse.Namespace) -> int:
    """Returns how many rows to show; 0: all."""
    if args.limit is not None:
        return int(args.limit)
    # A program asked for what there is; a person can only read so much.
    return 0 if args.json else 100

def _print_total(shown: int, total: int) -> None:
    """Says how many rows there are, where not all of them were shown."""
    if total <= shown:
        return
    # Counting stops there: to count millions would take longer than the
    # list itself.
    some = f"{total:,}"
    if total > COUNTED_UP_TO:
        some = f"{COUNTED_UP_TO:,}+"
    print_notice(f"{shown:,} of {some}; --limit 0 for all")

def _short(moment: Moment) -> str:
    """Returns a time to the second, for a table; "" where there is none."""
    return str(moment or "")[:19]

def _attempts_of(job: JobRow) -> str:
    return f"{job.attempts}/{job.max_attempts}"

# -- jobs

@command(
    "enqueue",
    arg("document", nargs="?", metavar="JSON",
        help="a job, or an array; - is -f -"),
    COMMAND_OPTION,
    arg("-f", dest="file", metavar="FILE",
        help="JSON jobs, one a line; - is input"),
    arg("--lines", metavar="FILE", help="commands, one a line; - is input"),
    *JOB_OPTIONS,
    arg("--if-absent", action="store_true",
        help="pass over an id that is in use"),
    arg("-q", "--quiet", action="store_true", help="print no ids"),
    AS_JSON,
    examples=("""enqueue '{"command":"echo hello","max_retries":3}'""",
              "enqueue -c 'sleep 5 && echo done' --priority 10",
              "enqueue -- tar czf /backup/etc.tgz /etc",
              "enqueue --lines commands.txt --queue etl"))
def enqueue_jobs(args: argparse.Namespace) -> None:
    """Add jobs to the queue.

    A job comes as JSON, after -c, after --, or a line each from -f or --lines. Options
    fill what the JSON leaves out. More than one job: all or none.
    """
    # All of the input is read and checked before the database is even
    # looked for: bad input is told where no server answers, and a slow pipe
    # keeps no connection open.
    spool = _spool_jobs(args, _job_defaults(args))
    if not len(spool):
        return
    # No stored setting is needed to enqueue, so the config table is not
    # read.
    target = find_connection(Environment.read())
    with contextlib.closing(Database(target, WRITING)) as database:
        holders = enqueue(database, spool, args.if_absent)
        # The jobs stand from here on. The bell comes before the ids:
        # printing a million of them takes seconds, and the workers need not
        # wait for it.
        ring(database, len(spool), spool.queues)
        if not args.quiet:
            may_differ = args.if_absent or spool.linked
            _print_ids(database, spool, holders, args.json, may_differ)

def _job_defaults(args: argparse.Namespace) -> dict[str, object]:
    """Returns the values that options give for the keys of a job, checked."""
    values: dict[str, object] = {}
    for name in JOB_KEYS:
        # The command is no default, and the variables are put together
        # below.
        if name in ("command", "env"):
            continue
        value = getattr(args, name)
        if value is not None:
            values[name] = value
    for name in NEEDS.keys() & values.keys():
        values[name] = JOB_IDS.read_json(values[name], option_of(name))
    if args.env:
        values["env"] = _env_of_options(args.env)
    if "delay" in values and "run_at" in values:
        raise Problem("--delay and --run-at: give only one", status=USAGE)
    return values

def _env_of_options(texts: Sequence[str]) -> object:
    """Returns the `env` of a job from texts of the form NAME=VALUE."""
    variables = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign:
            raise Problem("--env: expected NAME=VALUE", status=USAGE)
        variables[name] = value
    kind = JOB_KEYS["env"].kind
    return kind.read_json(variables, "--env")

def _spool_jobs(args: argparse.Namespace, defaults: JobValues) -> Spool:
    """Returns the jobs of the one source that the command line names."""
    document, path = args.document, args.file
    if document == "-":
        document, path = None, "-"
    program = args.rest or None
    sources = (document, args.command, program, path, args.lines)
    given = sum(source is not None for source in sources)
    if given != 1:
        raise Problem(
            "enqueue takes exactly one of: JSON, -c CMD, -- PROG ARG…, -f FILE, "
            f"--lines FILE; {given} were given",
            "see: queuectl help enqueue",
            USAGE)
    if path is not None:
        with _opened_input(path) as file:
            return spool_lines(file, True, defaults)
    if args.lines is not None:
        with _opened_input(args.lines) as file:
            return spool_lines(file, False, defaults)
    if document is not None:
        return _spool_document(parse_json(document), defaults)
    return _spool_document({"command": _given_command(args)}, defaults)

def _given_command(args: argparse.Namespace) -> str:
    """Returns the command of -c, or the program after --, quoted."""
    # The words after -- are a program's arguments as they are; the shell
    # that will run them must not take a space or a star in them for its
    # own.
    return str(args.command or shlex.join(args.rest))

def _spool_document(document: object, defaults: JobValues) -> Spool:
    """Returns the jobs of a JSON document: one, or an array of them."""
    spool = Spool()
    if not isinstance(document, list):
        spool.add(check_job(document, defaults))
        return spool
    for position, one in enumerate(document, 1):
        try:
            spool.add(check_job(one, defaults))
        except Problem as problem:
            problem.what = f"job {position} of the array: {problem.what}"
            raise
    return spool

def standard_input() -> TextIO:
    """Returns standard input; a Problem where whoever started us closed it."""
    # Python has no object for it then.
    if not sys.stdin:
        raise Problem("standard input is closed", status=USAGE)
    return sys.stdin

def _opened_input(path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Returns the file, opened; for `-` standard input, which stays open."""
    if path == "-":
        return contextlib.nullcontext(standard_input().buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise Problem(what, status=USAGE) from None

def _print_ids(database: Database, spool: Spool, holders: Mapping[str, str],
               as_json: bool, may_differ: bool) -> None:
    """Prints the ids of the spool's jobs, for programs with their states.

    `holders` gives, for an id whose unique key was in use, the id of the job
    that has it. `may_differ`: a job may have left the state it was given.
    """
    # The commands may be long, so a page keeps of each job only these two.
    for page in batched(_ids_and_states(spool, holders)):
        now: dict[str, str] = {}
        # A job that was there before has moved on, and one that waits for
        # others may not have to wait any more: only the database knows.
        if may_differ and as_json:
            ids = [job_id for job_id, _ in page]
            now = states_of(database, ids)
        for job_id, state in page:
            if as_json:
                print_json({"id": job_id, "state": now.get(job_id, state)})
            else:
                print_line(job_id)

def _ids_and_states(spool: Spool,
                    holders: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the id to print for each job, and the state it was given."""
    for job in spool:
        job_id = str(job["id"])
        state = str(job.get("state", State.PENDING))
        yield holders.get(job_id, job_id), state

@command(
    "run",
    COMMAND_OPTION,
    *JOB_OPTIONS,
    examples=("run -- make test",
              "run -c 'make && make install' --queue build"))
def run_here(args: argparse.Namespace) -> int:
    """Enqueue a command, show its output, leave with its status.

    No retries, no time limit, and this directory, unless told. Ctrl-C, TERM and HUP
    cancel it. Exit 74: not all of its output came into the file or pipe.
    """
    # As if the command had been typed without `queuectl run` before it.
    as_typed = {"max_retries": 0, "timeout": 0, "cwd": absolute(".")}
    defaults = {**as_typed, **_job_defaults(args)}
    if bool(args.command) == bool(args.rest):
        what = "run takes -c CMD, or -- PROG ARG…"
        raise Problem(what, "see: queuectl help run", USAGE)
    spool = _spool_document({"command": _given_command(args)}, defaults)
    with open_store(FOLLOWING) as store:
        _check_it_can_be_followed(store)
        try:
            with interrupted_by(*LEAVE_SIGNALS):
                missing = _enqueue_and_follow(store, spool)
        except (KeyboardInterrupt, OSError) as error:
            # Without us nobody watches it, and it may have no time limit.
            with interrupted_by(*LEAVE_SIGNALS):
                _cancel_and_wait(store, spool.first_id)
            if isinstance(error, Interrupted):
                return error.status
            raise
        return _status_of_run(store, spool.first_id, missing)

def _check_it_can_be_followed(store: JobStore) -> None:
    """Raises a Problem where our account may not read what `run` will read."""
    try:
        store.check_may_follow()
    except Problem as problem:
        problem.what = ("nothing was enqueued, since its output could not be "
                        f"followed: {problem.what}")
        raise

def _enqueue_and_follow(store: JobStore, spool: Spool) -> int:
    """Enqueues a job and shows its output until it has ended.

    Returns how many bytes of it are missing in a file or a pipe.
    """
    job_id = spool.first_id

    def say_why_not() -> None:
        _, why = explain(store, job_id)
        notice(f"job {job_id} has not started: {why}")

    enqueue(store.database, spool, False)
    ring(store.database, 1, spool.queues)
    return print_output(store.follow(job_id, 0, say_why_not))

def _cancel_and_wait(store: JobStore, job_id: str) -> None:
    """Cancels the job of a `run` that is to leave, and awaits its end."""
    # The terminal may have gone away, and then nothing can be said.
    with contextlib.suppress(OSError):
        notice(f"cancelling job {job_id}; again leaves it to its worker")
    # We may have been interrupted in the midst of an answer.
    store.database.close()
    # A terminal that goes away sends HUP twice; this must be done even so.
    with ignored(signal.SIGHUP, signal.SIGTERM):
        store.cancel(job_id)
        ring(store.database)
    # The job runs on another host, perhaps: its worker alone can end it. We
    # wait, so that nothing of it runs any more once the prompt is back.
    for _ in store.wait([job_id], False, math.inf):
        pass

def _status_of_run(store: JobStore, job_id: str, missing: int) -> int:
    """Returns what `run` exits with, and says what that does not tell."""
    _say_left_out(job_id, missing)
    job = store.details(job_id).row
    # An exit status speaks for itself; a time limit or a lost worker does not.
    if job.state != State.COMPLETED and job.reason != Reason.EXIT:
        _, why = explain(store, job_id)
        notice(f"job {job_id}: {why}")
    if job.exit_code is None:
        return CANNOT
    return job.exit_code or (OUTPUT_CUT if missing else 0)

def _say_left_out(job_id: str, missing: int) -> None:
    """Says how much of a job's output is missing where it was printed to."""
    if missing:
        notice(
            f"job {job_id} wrote faster than can be followed: {missing:,} bytes "
            "of its output are left out\n"
            "  have more of it kept: queuectl config set output_limit 1048576; "
            "or have the job write to a file")

@command(
    "list",
    arg("--state", metavar="S", help="only jobs in this state"),
    arg("--queue", type=option(QUEUE_NAME), metavar="Q",
        help="only of this queue"),
    LIMIT,
    AS_JSON,
    examples=("list", "list --state failed",
              "list --state pending --queue etl --json"))
def list_jobs(args: argparse.Namespace) -> None:
    """List jobs, the newest first."""
    if args.state is not None and args.state not in list(State):
        what = f"--state: no such state: {excerpt(args.state)}"
        hint = nearest(args.state, State) or f"states: {' '.join(State)}"
        raise Problem(what, hint, USAGE)
    limit = _limit(args)
    with open_store() as store:
        jobs = store.jobs(args.state, args.queue, limit)
        # Page by page: a million jobs pass through without being kept.
        if args.json:
            for job in jobs:
                print_json(job.as_json())
            return
        shown = list(jobs)
        total = len(shown)
        # Fewer than the limit are all there are, and need not be counted.
        if total == limit:
            total = store.count(args.state, args.queue)
    _print_jobs(shown)
    _print_total(len(shown), total)

# A table cuts a command anyway; a longer one is not even measured for it.
SHOWN_COMMAND_MAX = 400

def _print_jobs(jobs: Sequence[JobRow]) -> None:
    """Prints the jobs as a table."""
    rows = []
    for job in jobs:
        when = _short(_time_of(job))
        rows.append([
            job.id,
            job.state,
            _attempts_of(job),
            job.queue,
            when,
            job.command[:SHOWN_COMMAND_MAX]])
    titles = ["Id", "State", "Attempt", "Queue", "When", "Command"]
    print_table(titles, rows, spare=["When", "Queue"])

def _time_of(job: JobRow) -> Moment:
    """Returns the time that matters in the job's state; its end, if it ended."""
    times = {
        State.PROCESSING: job.started_at,
        State.PENDING: job.created_at,
        State.BLOCKED: job.created_at,
        State.SCHEDULED: job.next_run_at,
        State.FAILED: job.next_run_at,
    }
    return times.get(State(job.state), job.finished_at)

@command("show", ID, AS_JSON, examples=("show my-job", "show my-job --json"))
def show(args: argparse.Namespace) -> None:
    """Show all of one job: its settings, history and output."""
    with open_store() as store:
        details = store.details(args.id)
    output = details.output.decode("utf-8", "replace")
    if args.json:
        history: list[Json] = []
        for run in details.history:
            history.append(as_json(run, "run"))
        print_json({
            **details.row.as_json(),
            "cwd": details.cwd,
            "env": dict(details.env),
            "after": list(details.after),
            "output": output,
            "history": history})
        return
    _print_facts(details)
    if details.history:
        print_line("history:")
        _print_history(details.history)
    if output:
        print_line("output:")
        print_line(output.translate(MULTILINE).rstrip("\n"))

def _print_facts(details: JobDetails) -> None:
    """Prints what a job's row says, a line for each key that has a value."""
    # What stands in a variable is often a secret, and screens are looked at
    # by many.
    hidden = [f"{name}=***" for name in details.env]
    facts: dict[str, object] = {
        **details.row.as_json(),
        "attempts": _attempts_of(details.row),
        "cwd": details.cwd,
        "after": " ".join(details.after),
        "env": " ".join(hidden),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, ""):
            print_line(f"{name:{width}}  {escaped(str(value))}")

def _print_history(history: Sequence[RunRecord]) -> None:
    """Prints the runs of a job as a table."""
    rows = []
    for run in history:
        seconds = "" if run.duration is None else f"{run.duration:.3f}"
        # A run without a reason has not ended.
        reason = run.reason or "running"
        if run.detail:
            reason += f": {run.detail}"
        started_at = say_time(run.started_at)
        rows.append([run.run, run.attempt, started_at, seconds,
                     run.exit_code, run.worker, reason])
    titles = ["Run", "Attempt", "Started", "Seconds", "Exit", "Worker",
              "Reason"]
    print_table(titles, rows, spare=["Worker", "Attempt"])

@command("explain", ID, AS_JSON, examples=("explain my-first-job",))
def explain_job(args: argparse.Namespace) -> None:
    """Say in one sentence why a job is where it is."""
    with open_store() as store:
        job, why = explain(store, args.id)
    if args.json:
        print_json({"id": job.id, "state": job.state, "why": why})
    else:
        print_line(f"job {job.id}: {escaped(why)}")

@command(
    "logs",
    ID,
    arg("-f", "--follow", action="store_true",
        help="go on until the job has ended, whatever host it runs on"),
    arg("--run", type=option(whole(1, 2**31)), metavar="N",
        help="of this run, as show numbers them (default: the last)"),
    examples=("logs my-first-job", "logs -f my-first-job",
              "logs my-job > out.bin"))
def logs(args: argparse.Namespace) -> None:
    """Print the output of a job's last run; raw on a pipe."""
    # Whoever follows a job for hours is not to be thrown out by a failover.
    policy = FOLLOWING if args.follow else READING
    with open_store(policy) as store:
        details = store.details(args.id)
        runs = [run.run for run in details.history]
        if args.run and args.run not in runs:
            kept = ", ".join(map(str, runs)) or "none"
            raise Problem(
                f"job {args.id} has no run {args.run} to show: {kept}",
                f"see: queuectl show {args.id}")
        if args.follow:
            first = args.run or max(runs, default=0)
            missing = print_output(store.follow(args.id, first))
            _say_left_out(args.id, missing)
        elif args.run:
            output = store.output(details.row.seq, args.run)
            print_output([OutputPiece(output)])
        else:
            print_output([OutputPiece(details.output)])
    if not runs and not args.follow:
        state = details.row.state
        print_notice(f"job {args.id} is {state} and has not run yet")

@command(
    "wait",
    arg("ids", nargs="+", metavar="ID", help="a job's id; - reads them"),
    arg("--any", action="store_true", help="until one has ended"),
    arg("--timeout", type=option(duration()), default=math.inf, metavar="D",
        help="wait no longer than this: exit 124"),
    AS_JSON,
    examples=("wait build test --timeout 10m",
              "enqueue --lines commands.txt | queuectl wait -"))
def wait(args: argparse.Namespace) -> int:
    """Wait until jobs have ended; exit 0 if all completed.

    Exit 1 if one ended otherwise, 124 if --timeout ran out.
    """
    ids: list[str] = []
    for word in args.ids:
        if word == "-":
            ids += standard_input().read().split()
        else:
            ids.append(word)
    # An outage is borne with for a minute, but never for longer than
    # --timeout.
    retry_for_s = min(FOLLOWING.retry_for_s, args.timeout)
    policy = dataclasses.replace(FOLLOWING, retry_for_s=retry_for_s)
    with open_store(policy) as store:
        return report(store.wait(ids, args.any, args.timeout), args.json)

@command("cancel", IDS, AS_JSON, examples=("cancel my-first-job", "cancel a b c"))
def cancel(args: argparse.Namespace) -> int:
    """Cancel jobs: waiting ones now, running ones by their worker."""
    with open_store(WRITING) as store:
        return report(map(store.cancel, args.ids), args.json, store)

@command("retry", IDS, AS_JSON, examples=("retry my-first-job", "retry a b c"))
def retry(args: argparse.Namespace) -> int:
    """Run failed jobs now; put dead and cancelled ones back."""
    with open_store(WRITING) as store:
        results = (store.revive(job_id, "retry") for job_id in args.ids)
        return report(results, args.json, store)

@command(
    "rerun",
    ID,
    COMMAND_OPTION,
    AS_JSON,
    examples=("rerun my-first-job",
              "rerun my-first-job -c 'echo hello again'"))
def rerun(args: argparse.Namespace) -> None:
    """Enqueue a new job like an old one; print its id."""
    with open_store(WRITING) as store:
        values = store.job_template(args.id)
        if args.command:
            values["command"] = args.command
        spool = Spool()
        # What the old row holds was checked when it came; only an id is
        # missing.
        spool.add(complete_job(values, {}))
        enqueue(store.database, spool, False)
        ring(store.database, 1, spool.queues)
        # The new job waits for no other, so it is pending.
        _print_ids(store.database, spool, {}, args.json, False)

@command(
    "purge",
    arg("--state", required=True, metavar="S",
        help="completed, dead or cancelled"),
    arg("--before", metavar="D|TIME", default="0",
        help="only what ended longer ago than D, or before TIME (default: all)"),
    arg("--dry-run", action="store_true",
        help="only say how many it would be"),
    examples=("purge --state completed --before 7d",
              "purge --state dead --dry-run"))
def purge_jobs(args: argparse.Namespace) -> None:
    """Delete jobs that ended, with their history.

    A job that a blocked one waits for stays.
    """
    if args.state not in ENDED:
        raise Problem(
            f"--state: expected {', '.join(ENDED)}, not {excerpt(args.state)}",
            "only what has ended can be purged",
            USAGE)
    state = State(args.state)
    moment, value = AGE.read(args.before, "--before").as_sql()
    with open_store(WRITING) as store:
        # An age becomes a fixed time, as it is now: else the jobs that go
        # on ending while we delete would keep us at it.
        [before] = store.database.rows(str, f"SELECT {moment}", value)
        if args.dry_run:
            source = f"jobs WHERE {ended_before(state)}"
            count = store.count_rows(source, [before, before])
        else:
            count = _purge_all(store.database, state, before)
    done = "would be purged" if args.dry_run else "purged"
    print_line(f"{count:,} {args.state} jobs {done}")

def _purge_all(database: Database, state: State, before: str) -> int:
    """Deletes batch by batch what ended before that time; returns how many."""
    total = 0
    while True:
        # A batch is a transaction of its own, so that no claim waits for
        # all of them.
        purged = purge(database, state, before)
        if not purged:
            return total
        total += purged

# -- workers

@command(
    "worker start",
    arg("--count", type=option(whole(1, 1024)), default=1, metavar="N",
        help="jobs at once (default 1)"),
    arg("--daemon", action="store_true",
        help="run in the background, with a PID file"),
    arg("--queue", action="append", metavar="A,B",
        help="serve these queues only"),
    arg("--drain", action="store_true",
        help="exit 0 once nothing is left to run"),
    arg("--grace", type=option(duration()), metavar="D",
        help="after a stop, end running jobs after so long and hand them back"),
    PID_FILE,
    arg("--log-file", metavar="FILE",
        help="the daemon's log (default workers.log beside the PID file)"),
    examples=("worker start --count 2", "worker start --count 8 --daemon",
              "worker start --queue etl,mail --drain"))
def worker_start(args: argparse.Namespace) -> int:
    """Run jobs, here or as a daemon.

    Ctrl-C or TERM lets running jobs end; a second one ends them and hands them back.
    """
    check_spawning()
    environment = Environment.read()
    target = find_connection(environment)
    queues = _served_queues(args.queue or [])
    loaded = configured_by(environment, WRITING)
    for complaint in [*loaded.complaints, *_readable_dotenv(environment)]:
        notice(f"warning: {complaint}")
    # A key file that cannot be read is found now, not by the first job.
    signing_key()
    log = Log()
    options = WorkerOptions(
        target,
        environment,
        loaded.settings,
        queues,
        args.drain,
        args.grace,
        sys.stderr.isatty(),
        log.say,
        log.finish)
    pid_file, log_file = _daemon_files(args, environment)
    return run_workers(options, args.count, pid_file, log_file)

def _served_queues(texts: Sequence[str]) -> tuple[str, ...]:
    """Returns the queues that --queue names, each once; none means all."""
    queues = []
    for text in texts:
        for name in text.split(","):
            if name:
                queues.append(QUEUE_NAME.read(name, "--queue"))
    # A worker with an empty list would serve all queues, which nobody asked
    # for who wrote --queue "$UNSET".
    if texts and not queues:
        raise Problem("--queue names no queue", status=USAGE)
    return tuple(dict.fromkeys(queues))

def _daemon_files(args: argparse.Namespace,
                  environment: Environment) -> tuple[str, str]:
    """Returns the paths of the PID file and the log; "" where there is none."""
    # In the foreground there is a PID file only where one is asked for.
    pid_file = args.pid_file or ""
    if args.daemon:
        pid_file = _pid_file(args, environment)
    log_file = ""
    if args.daemon:
        beside = os.path.join(os.path.dirname(pid_file), "workers.log")
        log_file = absolute(args.log_file or beside)
    # The log names it, and is read in other directories.
    return pid_file and absolute(pid_file), log_file

def _pid_file(args: argparse.Namespace, environment: Environment) -> str:
    """Returns the daemon's PID file: by option, variable or default."""
    # An empty PID_FILE would name no file at all; it counts as not set.
    named = args.pid_file or environment.get("PID_FILE")
    return str(named or VARIABLES["PID_FILE"].default)

def _readable_dotenv(environment: Environment) -> list[str]:
    """Returns a complaint for each .env that not only its owner can read."""
    complaints = []
    # The first layer is the process's own environment, which is no file.
    for source, variables in environment.layers[1:]:
        with contextlib.suppress(OSError):
            # One that sets nothing, or is not there, gives nothing away.
            if variables and os.stat(source).st_mode & 0o077:
                complaints.append(
                    f"others can read {source}; mend it: chmod 600 {source}")
    return complaints

@command(
    "worker stop",
    PID_FILE,
    arg("--timeout", type=option(duration()), default=math.inf, metavar="D",
        help="wait no longer than this; still stopping: exit 124"),
    arg("--now", action="store_true",
        help="end running jobs and hand them back"),
    examples=("worker stop", "worker stop --timeout 30s", "worker stop --now"))
def worker_stop(args: argparse.Namespace) -> int:
    """Stop the daemon: its running jobs may end first."""
    environment = Environment.read()
    path = _pid_file(args, environment)

    def waits_for(supervisor: int) -> str:
        return _say_running(environment, supervisor)

    return stop_daemon(path, args.now, args.timeout, waits_for)

def _say_running(environment: Environment, supervisor: int) -> str:
    """Returns words for the jobs that a stopping daemon waits for, or ""."""
    # The daemon stops by a signal, with or without a database: where the
    # server is away these words are left out, soon, and nothing else
    # changes.
    policy = dataclasses.replace(READING, timeout_s=2)
    with contextlib.suppress(Problem):
        target = find_connection(environment)
        with contextlib.closing(Database(target, policy)) as database:
            store = JobStore(database, Settings())
            ids = store.running_under(socket.gethostname(), supervisor)
            if ids:
                return f", waiting for {abbreviated(ids)}"
    return ""

@command("worker list", AS_JSON, examples=("worker list", "worker list --json"))
def worker_list(args: argparse.Namespace) -> None:
    """Show the worker processes of all hosts."""
    with open_store() as store:
        workers = store.workers()
    if args.json:
        for worker in workers:
            print_json(as_json(worker))
        return
    _print_workers(workers)
    slots = sum(worker.slots for worker in workers)
    hosts = len({worker.host for worker in workers})
    print_line(f"{_counted(slots, 'slot')} on {_counted(hosts, 'host')}")

def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

def _print_workers(workers: Sequence[WorkerRow]) -> None:
    """Prints the workers as a table."""
    rows = []
    for worker in workers:
        busy = f"{worker.busy}/{worker.slots}"
        # A worker that names no queue serves every one.
        queues = ", ".join(worker.queues) or "all"
        rows.append([
            worker.id,
            worker.host,
            worker.pid,
            busy,
            worker.heartbeat_at,
            worker.state,
            queues])
    titles = ["Worker", "Host", "PID", "Busy", "Heartbeat", "State", "Queues"]
    print_table(titles, rows, spare=["Heartbeat", "Host"])

@command(
    "status",
    arg("--exact", action="store_true",
        help="count every job, however many"),
    arg("--watch", nargs="?", type=option(number(0.1, 3600)), const=2.0, metavar="S",
        help="show it again every S seconds (default 2)"),
    PID_FILE,
    AS_JSON,
    examples=("status", "status --watch", "status --json"))
def status(args: argparse.Namespace) -> None:
    """Count jobs by state, and show the daemon, queues and workers."""
    path = _pid_file(args, Environment.read())
    with open_store() as store:
        while True:
            if args.watch and sys.stdout.isatty() and not args.json:
                # Clear the screen, and go to its upper left corner.
                print_line("\x1b[2J\x1b[H")
            if args.json:
                _print_status_json(store, path, args.exact)
            else:
                _print_status(store, path, args.exact)
            if not args.watch:
                return
            # Python keeps back what goes to a pipe; its reader waits for
            # this.
            sys.stdout.flush()
            time.sleep(args.watch)

def _say_database(store: JobStore) -> str:
    target = store.database.target
    return f"{target} (from {target.source})"

def _print_status_json(store: JobStore, path: str, exact: bool) -> None:
    """Prints the status as one JSON object."""
    counts, capped = store.states(exact)
    queues = [as_json(queue) for queue in store.queues()]
    workers = [as_json(worker) for worker in store.workers()]
    daemon = probe_pid_file(path)
    print_json({
        "database": _say_database(store),
        "states": dict(counts),
        "capped": list(capped),
        "queues": list(queues),
        "workers": list(workers),
        "daemon": {
            "pid_file": path,
            "pid": daemon.pid or None,
            "alive": daemon.alive}})

def _print_status(store: JobStore, path: str, exact: bool) -> None:
    """Prints the status as tables, and warns of queues that nobody serves."""
    counts, capped = store.states(exact)
    queues = store.queues()
    workers = store.workers()
    daemon = probe_pid_file(path)
    print_line(f"database: {_say_database(store)}")
    print_line("Job counts by state:")
    _print_counts(counts, capped)
    _print_daemon(daemon, path)
    if queues:
        rows = []
        for queue in queues:
            rows.append([queue.queue, queue.pending, queue.processing])
        print_table(["Queue", "Pending", "Processing"], rows)
    if workers:
        _print_workers(workers)
    for name in store.unserved():
        print_notice(
            f"warning: jobs wait in queue {name}, and no live worker "
            f"serves it; start one: queuectl worker start --queue {name}")

def _print_daemon(daemon: PidFileStatus, path: str) -> None:
    """Prints what is known of the daemon of this PID file."""
    if not daemon.found:
        print_line(f"No worker PID file at {path}")
        return
    # A file alone proves nothing: it outlives a daemon that was killed.
    found = f"Worker PID file found at {path}"
    if daemon.alive:
        print_line(found)
        # A line of its own, for programs; the next one is for people.
        print_line(str(daemon.pid))
        print_line("is the PID of the daemon's supervisor, "
                   "which starts the worker processes")
    else:
        print_line(f"{found} (stale, no daemon holds it)")

def _print_counts(counts: Mapping[str, int], capped: Collection[str]) -> None:
    """Prints how many jobs are in each state; + where there are more."""
    rows = []
    for position, state in enumerate(State):
        # The first five are always shown, the others where they say
        # something.
        if position >= 5 and not counts[state]:
            continue
        count = str(counts[state])
        if state in capped:
            count += "+"
        rows.append([state, count])
    print_table(["State", "Count"], rows)

# -- queues

QUEUE = arg(
    "name",
    metavar="NAME",
    type=option(QUEUE_NAME),
    help="the queue's name")

@command("queue list", AS_JSON, examples=("queue list",))
def queue_list(args: argparse.Namespace) -> None:
    """Show depth, limit and pace of every queue in use."""
    with open_store() as store:
        rows = [as_json(queue) for queue in store.queue_stats()]
    titles = ["Queue", "Depth", "Running", "Limit", "Paused", "Rate/min",
              "Oldest waiting"]
    keys = ["queue", "depth", "running", "limit", "paused", "rate",
            "oldest_waiting"]
    print_rows(rows, args.json, titles, keys)

@command(
    "queue limit",
    QUEUE,
    arg("limit", metavar="N|none", help="jobs at once over all hosts"),
    examples=("queue limit video 2", "queue limit video none"))
def queue_limit(args: argparse.Namespace) -> None:
    """Run at most N jobs of a queue at once, over all hosts."""
    most = None
    if args.limit != "none":
        most = whole(0, 10**6).read(args.limit, "N (or none)")
    with open_store(WRITING) as store:
        store.limit(args.name, "max_running", most)
        # A higher limit lets jobs start that idle workers have passed over.
        ring(store.database)

@command("queue pause", QUEUE, examples=("queue pause video",))
def queue_pause(args: argparse.Namespace) -> None:
    """Start no more jobs of a queue; those that run go on."""
    with open_store(WRITING) as store:
        # Nobody is rung: a worker reads it before it claims anyway.
        [now] = store.database.rows(str, "SELECT UTC_TIMESTAMP(6)")
        store.limit(args.name, "paused_at", now)

@command("queue resume", QUEUE, examples=("queue resume video",))
def queue_resume(args: argparse.Namespace) -> None:
    """Start jobs of a paused queue again."""
    with open_store(WRITING) as store:
        store.limit(args.name, "paused_at", None)
        ring(store.database)

# -- dead letters

FILTERS = (
    arg("--reason", metavar="R",
        help="only what died of this (exit, timeout, …)"),
    arg("--exit-code", type=option(whole(0, 255)), metavar="N",
        help="only with this"),
    arg("--match", metavar="TEXT",
        help="only with this in the command or last line"),
    arg("--since", type=option(AGE), metavar="D|TIME",
        help="only what died no longer ago than D, or since TIME"))

def _dead_letter_condition(args: argparse.Namespace) -> SqlCondition:
    """Returns what FILTERS ask for; a condition without values, if nothing."""
    if args.reason is not None and args.reason not in list(Reason):
        what = f"--reason: no such reason: {excerpt(args.reason)}"
        hint = nearest(args.reason, Reason) or f"reasons: {', '.join(Reason)}"
        raise Problem(what, hint, USAGE)
    wanted = [
        ("dlq.reason = %s", args.reason),
        ("dlq.exit_code = %s", args.exit_code),
        # LOCATE takes the text as it is, where LIKE would read its % and _.
        ("LOCATE(%s, CONCAT_WS('\\n', command, last_line)) > 0", args.match),
    ]
    if args.since is not None:
        moment, bound = args.since.as_sql()
        wanted.append((f"died_at >= {moment}", bound))
    parts = ["TRUE"]
    values = []
    for part, value in wanted:
        if value is not None:
            parts.append(part)
            values.append(value)
    return SqlCondition(" AND ".join(parts), values)

@command(
    "dlq list",
    *FILTERS,
    LIMIT,
    AS_JSON,
    examples=("dlq list", "dlq list --exit-code 3 --since 2h --json"))
def dlq_list(args: argparse.Namespace) -> None:
    """List the dead jobs, the last to die first."""
    limit = _limit(args)
    only = _dead_letter_condition(args)
    with open_store() as store:
        letters = store.dead_letters(limit, only)
        total = len(letters)
        # As in `list`: fewer than the limit are all there are.
        if total == limit:
            total = store.count_dead_letters(only)
    if args.json:
        for letter in letters:
            died_at = say_time(letter.died_at)
            print_json({**letter.row.as_json(), "died_at": died_at})
        return
    _print_dead_letters(letters)
    _print_total(len(letters), total)

def _print_dead_letters(letters: Sequence[DeadLetter]) -> None:
    """Prints the dead letters as a table."""
    rows = []
    for letter in letters:
        job = letter.row
        died_at = _short(letter.died_at)
        rows.append([
            job.id,
            _attempts_of(job),
            job.exit_code,
            job.reason,
            died_at,
            job.queue,
            job.command[:SHOWN_COMMAND_MAX]])
    titles = ["Id", "Attempt", "Exit", "Reason", "Died", "Queue", "Command"]
    print_table(titles, rows, spare=["Died", "Queue", "Exit"])

@command("dlq groups", AS_JSON, examples=("dlq groups",))
def dlq_groups(args: argparse.Namespace) -> None:
    """Count dead jobs that are alike, whatever their digits."""
    with open_store() as store:
        rows = [as_json(group) for group in store.dead_groups()]
    titles = ["Count", "Exit", "Reason", "Last died", "Example", "Last line"]
    # The last column is the one that gives way on a narrow terminal.
    keys = ["count", "exit_code", "reason", "last_died_at", "example",
            "last_line"]
    print_rows(rows, args.json, titles, keys, spare=["Last died", "Example"])

@command(
    "dlq retry",
    arg("ids", nargs="*", metavar="ID", help="the job's id"),
    arg("--all", action="store_true", help="all of them"),
    *FILTERS,
    arg("--retries", type=option(whole(1, 1000)), default=1, metavar="N",
        help="grant so many more runs (default 1)"),
    arg("--reset", action="store_true",
        help="start the count of attempts again"),
    arg("--dependents", action="store_true",
        help="and what died because of them"),
    arg("--dry-run", action="store_true", help="only say which it would be"),
    AS_JSON,
    examples=("dlq retry my-first-job", "dlq retry a b --retries 3",
              "dlq retry --reason timeout --since 1d --dry-run"))
def dlq_retry(args: argparse.Namespace) -> int:
    """Put dead jobs back: due now, one more run granted.

    They keep their attempts, unless --reset starts the count again.
    """
    only = _dead_letter_condition(args)
    # A condition without values is no filter. Exactly one of the three must
    # be given: `dlq retry` with nothing after it is never to mean all of
    # them.
    ways = (bool(args.ids), bool(args.all), bool(only.values))
    if sum(ways) != 1:
        raise Problem(
            "dlq retry takes ids, or --all, or filters such as --exit-code",
            "see: queuectl help dlq retry",
            USAGE)
    with open_store(WRITING) as store:
        ids = args.ids or store.dead_ids(only)
        if args.dry_run:
            return report(_would_revive(store, ids), args.json)
        return report(_revived(store, ids, args), args.json, store)

def _would_revive(store: JobStore,
                  ids: Sequence[str]) -> Iterator[ActionResult]:
    """Yields what a dry run says of each job; nothing is changed."""
    states = states_of(store.database, ids)
    for job_id in ids:
        yield ActionResult(
            job_id,
            job_id in states,
            states.get(job_id),
            no_such_job(job_id).what,
            "would be put back")

def _revived(store: JobStore, ids: Sequence[str],
             args: argparse.Namespace) -> Iterator[ActionResult]:
    """Puts each job back, and with --dependents what died because of it."""
    # What died with a job that was cancelled comes back only with that one.
    name = "retry" if args.dependents else "revive"
    revived = []
    for job_id in ids:
        result = store.revive(job_id, name, args.retries, args.reset)
        yield result
        if result.ok:
            revived.append(job_id)
    # All parents come first: while one is dead, its children cannot come back.
    if args.dependents:
        yield from store.revive_dependents(revived)

# -- settings

def known_key(key: str) -> str:
    """Returns the name of a setting; for another, a Problem with a hint."""
    if key not in SETTINGS:
        hint = nearest(key, SETTINGS) or f"settings: {' '.join(SETTINGS)}"
        raise Problem(f"no such setting: {excerpt(key)}", hint, USAGE)
    return key

KEY = arg("key", type=known_key, metavar="KEY", help="the setting's name")

@command(
    "config set",
    KEY,
    arg("value", metavar="VALUE", help="its new value"),
    examples=("config set backoff_base 3", "config set job_timeout 10m"))
def config_set(args: argparse.Namespace) -> None:
    """Store a setting; running workers take it within seconds."""
    kind: ValueType[object] = SETTINGS[args.key].metadata["kind"]
    # It is checked, and stored as it was typed.
    kind.read(args.value, args.key)
    with open_store(WRITING) as store:
        store.set_config(args.key, args.value)
        ring(store.database)
        # As the table alone says: what this shell sets is not what workers
        # have.
        loaded = load_settings(Environment(()), read_config(store.database))
    settings = loaded.settings
    name = variable_of(args.key)
    hidden = Environment.read().find(name)
    if hidden:
        text, source = hidden
        notice(f"warning: {name}={excerpt(text)} ({source}) hides it here")
    if settings.lease_s > settings.worker_timeout:
        lease = say_duration(settings.lease_s)
        notice("warning: worker_timeout is under 4 heartbeats; "
               f"the lease is {lease}")

@command("config get", KEY, examples=("config get backoff_base",))
def config_get(args: argparse.Namespace) -> None:
    """Print the value in force."""
    loaded = configured_by(Environment.read(), READING)
    _, text = loaded.origins[args.key]
    print_line(text)

@command("config unset", KEY, examples=("config unset backoff_base",))
def config_unset(args: argparse.Namespace) -> None:
    """Remove a stored setting: its default holds again."""
    with open_store(WRITING) as store:
        store.set_config(args.key, None)
        ring(store.database)

@command("config list", AS_JSON, examples=("config list",))
def config_list(args: argparse.Namespace) -> None:
    """Show every setting, its value's source and its default."""
    loaded = configured_by(Environment.read(), READING)
    for complaint in loaded.complaints:
        notice(f"warning: {complaint}")
    rows = []
    for key, field in SETTINGS.items():
        source, text = loaded.origins[key]
        about = field.metadata
        default, meaning = about["default"], about["help"]
        rows.append([key, text, source, default, meaning])
        if args.json:
            # Programs get the value itself, a number for a number; the
            # table shows the text that it was read from.
            value = getattr(loaded.settings, key)
            if isinstance(value, frozenset):
                value = sorted(value)
            print_json({
                "key": key,
                "value": value,
                "source": source,
                "default": default,
                "help": meaning})
    if not args.json:
        titles = ["Key", "Value", "Source", "Default", "Help"]
        print_table(titles, rows, spare=["Default"])

# -- database

@command("db init", examples=("db init",))
def db_init(args: argparse.Namespace) -> None:
    """Create the database and its tables, or upgrade older ones."""
    target = find_connection(Environment.read())
    print_line(init_database(target))

@command("db check", PID_FILE, AS_JSON, examples=("db check",))
def db_check(args: argparse.Namespace) -> int:
    """Look for what is off, and say how to mend it; exit 1 if so."""
    environment = Environment.read()
    target = find_connection(environment)
    settings = load_settings(environment, {}).settings
    # Where the server is away or has no tables the checks below say so;
    # they go on with what can be known without it.
    with contextlib.suppress(Problem):
        settings = configured_by(environment, READING).settings
    local = [
        _check_pid_file(_pid_file(args, environment)),
        _check_dotenv(environment),
    ]
    status = 0
    # Each is told as it comes: one that waits for the server is not to hold
    # up others.
    for check in itertools.chain(check_all(target, settings), local):
        if not check.ok:
            status = CANNOT
        _print_check(check, args.json)
    return status

def _check_pid_file(path: str) -> Check:
    """Returns whether the PID file, if any, belongs to a living daemon."""
    daemon = probe_pid_file(path)
    said = "stale, nobody holds it"
    if daemon.alive:
        said = f"PID {daemon.pid} lives"
    elif not daemon.found:
        said = "none"
    return Check(
        "PID file",
        daemon.alive or not daemon.found,
        f"{path}: {said}",
        "start a daemon: queuectl worker start --daemon")

def _check_dotenv(environment: Environment) -> Check:
    complaints = _readable_dotenv(environment)
    found = "; ".join(complaints) or "private, or none"
    return Check(".env", not complaints, found)

def _print_check(check: Check, as_json: bool) -> None:
    """Prints one check; its remedy only where something is off."""
    remedy = "" if check.ok else check.remedy
    if as_json:
        print_json({
            "check": check.check,
            "ok": check.ok,
            "found": check.found,
            "remedy": remedy})
        return
    said = check.found
    if remedy:
        said += f"; {remedy}"
    # Both words are three columns wide, so that the names stand below each
    # other.
    mark = "ok " if check.ok else "OFF"
    print_line(f"{mark} {check.check:12} {said}")

@command("db schema", examples=("db schema | mysql -u root -p",))
def db_schema(args: argparse.Namespace) -> None:
    """Print the schema, as migrations.sql has it."""
    target = find_connection(Environment.read())
    schema = schema_for(target.database)
    print_line(schema.rstrip("\n"))

@command("db start", examples=("db start",))
def db_start(args: argparse.Namespace) -> None:
    """Start a private MySQL in ./.queuectl, where there is none."""
    target = find_connection(Environment.read())
    # An address that the person wrote comes before the private server's, so
    # every other command would pass it by.
    if target.explicit:
        raise Problem(
            f"a private server would not be used: {target.source} names "
            f"{target}",
            "remove what names it there (DB_HOST, DB_PORT, DB_SOCKET or "
            "DATABASE_URL), or use that server")
    folder = find_private_folder() or PRIVATE_FOLDER
    server = PrivateServer(folder)
    done = "started" if server.start() else "runs already"
    print_line(f"private server {done} in {folder}, PID {server.running()}")
    # The address is looked for anew: the folder by which it is found may be
    # there only now.
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
# One door in, one door out. A command line becomes a command of room "commands"
# and its arguments; what goes wrong becomes a message on standard error and an
# exit status, here and nowhere else. What nobody foresaw is a bug, and keeps
# its traceback.

# The order of `queuectl` without a command; a test holds it complete.
GROUPS = (
    ("jobs", ("enqueue", "run", "list", "show", "explain", "logs", "wait",
              "cancel", "retry", "rerun", "purge")),
    ("workers", ("worker start", "worker stop", "worker list", "status")),
    ("queues", ("queue list", "queue limit", "queue pause", "queue resume")),
    ("dead letters", ("dlq list", "dlq groups", "dlq retry")),
    ("settings", ("config set", "config get", "config unset", "config list")),
    ("database", ("db init", "db check", "db schema", "db start", "db stop")),
)
HELP = {"-h", "--help"}

# -- finding the command

def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns the command that `words` name, and the words that are left.

    Options may stand before, between and after the words of its name. A
    Problem says which command there is not, and which may have been meant.
    """
    rest = list(words)
    groups = {name.split()[0] for name in COMMANDS}
    place = _find(groups, rest)
    if place is None:
        raise _no_command(rest, groups)
    name = rest.pop(place)
    if name in COMMANDS:
        return COMMANDS[name], rest
    # It is a group: a word after it says which of its commands.
    verbs = _verbs_of(name)
    after = rest[place:]
    verb_place = _find(verbs, after)
    if verb_place is None:
        raise _no_verb(name, after, verbs)
    verb = rest.pop(place + verb_place)
    return COMMANDS[f"{name} {verb}"], rest

def _verbs_of(group: str) -> list[str]:
    """Returns the second words of a group's commands."""
    verbs = []
    for name in COMMANDS:
        first, _, verb = name.partition(" ")
        if first == group:
            verbs.append(verb)
    return verbs

def _find(names: Collection[str], words: Sequence[str]) -> int | None:
    """Returns the place of the first word that is one of these names."""
    for place, word in enumerate(words):
        if word in names:
            return place
    return None

def _no_command(words: Sequence[str], groups: Collection[str]) -> Problem:
    """Returns what to say where no word is a command."""
    word = _first_plain(words)
    what = "no command"
    if word:
        what = f"no such command: {excerpt(word)}"
    hint = nearest(word, [*groups, *COMMANDS])
    return Problem(what, hint or "see: queuectl", USAGE)

def _no_verb(group: str, words: Sequence[str],
             verbs: Sequence[str]) -> Problem:
    """Returns what to say of a group without one of its commands."""
    word = _first_plain(words)
    what = f"{group}: which of its commands?"
    if word:
        what = f"{group}: no such command: {excerpt(word)}"
    hint = nearest(word, verbs)
    if not hint:
        hint = f"{group} {'|'.join(verbs)}"
    return Problem(what, hint, USAGE)

def _first_plain(words: Sequence[str]) -> str:
    """Returns the first word that is no option, or ""."""
    for word in words:
        if not word.startswith("-"):
            return word
    return ""

# -- reading its arguments

class Parser(argparse.ArgumentParser):
    """An argparse parser that raises Problems."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found wrong, with a hint where one is known."""
        hint = f"see: {self.prog} --help"
        unknown = re.fullmatch(
            r"unrecognized arguments: (--[^ =]+).*", message)
        if unknown:
            options = self._option_string_actions
            hint = nearest(unknown[1], options) or hint
        elif self.prog.endswith("enqueue"):
            hint = ("a program and its arguments go after --: "
                    "enqueue -- echo hi")
        raise Problem(escaped(message), hint, USAGE)

def parser_of(found: Command) -> Parser:
    """Returns the parser of a command's arguments, and its help."""
    examples = ["examples:", *found.examples]
    # An abbreviated option would change its meaning once a longer one comes.
    parser = Parser(
        prog=f"queuectl {found.name}",
        allow_abbrev=False,
        description=found.body.__doc__,
        epilog="\n  queuectl ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, options in found.args:
        parser.add_argument(*names, **options)  # type: ignore[arg-type]
    return parser

# -- running it

def run(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit status."""
    words = list(argv)
    rest: list[str] = []
    # What stands after -- is never an option of ours.
    if "--" in words:
        cut = words.index("--")
        rest = words[cut + 1:]
        words = words[:cut]
    words = _take_defaults_file(words)
    if words[:1] == ["help"]:
        words = words[1:]
        words.append("--help")
    if HELP.issuperset(words):
        if rest:
            what = "no command is given before --"
            raise Problem(what, "see: queuectl", USAGE)
        print_overview()
        return 0
    if words == ["--version"]:
        print_version()
        return 0
    return _run_command(words, rest)

def _run_command(words: Sequence[str], rest: list[str]) -> int:
    """Runs the command that `words` name; `rest` is what stood after --."""
    found, words = find_command(words)
    # Two commands take a program after --; elsewhere it only ends the options.
    if found.name not in ("enqueue", "run"):
        words = [*words, *rest]
    # Options may stand among the ids of the jobs.
    args = parser_of(found).parse_intermixed_args(words)
    args.rest = rest
    return found.body(args) or 0

def _take_defaults_file(words: list[str]) -> list[str]:
    """Returns the words without --defaults-file, which every command takes.

    Its value goes into the environment, where workers that are forked or
    started later find it.
    """
    for place, word in enumerate(words):
        name, sign, path = word.partition("=")
        if name != "--defaults-file":
            continue
        before, after = words[:place], words[place + 1:]
        # Without `=` the path is a word of its own.
        if not sign and after:
            path = after.pop(0)
        if not path:
            raise Problem("--defaults-file: which?", status=USAGE)
        os.environ[DEFAULTS_FILE] = absolute(path)
        return before + after
    return words

def print_overview() -> None:
    """Prints every command in its group, one line each."""
    print_line("queuectl: a queue of shell commands, kept in MySQL")
    for title, names in GROUPS:
        print_line(f"\n{title}:")
        for name in names:
            print_line(f"  {name:14} {COMMANDS[name].summary}")
    print_line("\nqueuectl help COMMAND says more about one; "
               "--version what runs here.")

def print_version() -> None:
    """Prints what an error report should name."""
    python, *_ = sys.version.split()
    print_line(
        f"queuectl {VERSION}, schema {SCHEMA_VERSION}, "
        f"PyMySQL {driver_version()}, Python {python}")

OLDEST_PYTHON = (3, 9)

def check_python() -> None:
    """Raises a Problem where Python is too old.

    An older one than 3.8 does not even compile the file.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        version, *_ = sys.version.split()
        raise Problem(
            f"needs Python 3.9 or later; {sys.executable} is {version}",
            "run it by a newer one: python3.11 queuectl.py",
            UNAVAILABLE)

def check_standard_streams() -> None:
    """Has no file that we open get the number of a stream that is closed.

    Who closed standard error wants to hear nothing, and who closed standard
    input gives nothing. But where there is no standard output it is a Problem:
    else a job would be enqueued, and then its id not be told.
    """
    for handle in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(handle)
            continue
        if handle == 1:
            raise Problem(
                "standard output is closed, so nothing was done",
                "send it somewhere, if only away: >/dev/null")
        # It gets the lowest number that is free, which is this one.
        null = os.open(os.devnull, os.O_WRONLY)
        os.set_inheritable(null, True)
        # Without it, what is printed there would go to standard output.
        if handle == 2:
            sys.stderr = open(null, "w")

def main() -> int:
    """Runs the command line; says what went wrong, and returns the status."""
    try:
        check_python()
        check_standard_streams()
        use_own_environment()
        status = run(sys.argv[1:])
        # What is still buffered must fail here, not while Python exits.
        sys.stdout.flush()
        return status
    except Problem as problem:
        said = problem.what
        if problem.hint:
            said += f"\n  {problem.hint}"
        notice(said)
        return problem.status
    except RowRefused as refused:
        notice(f"the server refused the data: {refused}")
        return CANNOT
    except Interrupted as interrupted:
        return interrupted.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return _lost_output(error)

def _lost_output(error: OSError) -> int:
    """Returns the exit status where output could not be written.

    Any other error is a bug, and is raised again.
    """
    if error.errno not in (errno.EPIPE, errno.ENOSPC):
        raise error
    # What is buffered is flushed once more as Python exits, and must not fail
    # there as well.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    # The reader has had enough (list | head), which is no failure.
    if error.errno == errno.EPIPE:
        return 0
    notice(f"cannot write to standard output or {tempfile.gettempdir()}: "
           f"{error.strerror}")
    return CANNOT

if __name__ == "__main__":
    sys.exit(main())
