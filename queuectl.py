#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["PyMySQL>=1.0.2"]
# ///
"""queuectl: a queue of shell commands, kept in MySQL.

The file reads downwards: a room uses only the rooms above it.

    errors       what a person can mend, and the exit status that says so
    settings     every knob: its name, its default, where it may be set
    rules        states, moves, backoff, what the end of a run means; no clock, no I/O
    schema       the tables, as migrations.sql prints them
    connection   reaching MySQL, and saying plainly why we could not
    enqueueing   what a job may say, and its way into the table
    claiming     one turn: beat, settle, promote, claim; and taking over what was lost
    looking      what status, list and show ask; cancel, dead letters, settings
    doorbell     waking idle workers at once, by MySQL alone
    runner       one shell command: its output, its time limit, its end
    worker       claim, run, settle, again
    supervisor   keeping workers alive: PID file, log, signals, restarts
    server       a private MySQL for a machine without one
    screen       tables, JSON, escapes
    explain      why a job is where it is, in one sentence
    check        what is off, and its remedy
    bench        measuring the queue
    commands     what a person can type
    main         one door in, one door out
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

VERSION = "0.1.0"
T = TypeVar("T")
Thunk = Callable[[], None]
Values = Union[Sequence[object], Mapping[str, object]]
Json = Union[None, bool, int, float, str, List["Json"], "dict[str, Json]"]


# ---- errors ------------------------------------------------------------------
#
# One kind of error is meant for people. It is raised where the cause is known,
# worded for its reader, and caught only in main; anything else is a bug and shows
# its traceback.

CANNOT, USAGE, UNAVAILABLE, TIMED_OUT, INTERRUPTED = 1, 2, 69, 124, 130

class Problem(Exception):
    """What happened, what to do next, and the exit status that says so."""
    def __init__(self, what: str, hint: str = "", status: int = CANNOT) -> None:
        super().__init__(what)
        self.what, self.hint, self.status = what, hint, status

def excerpt(value: object, limit: int = 60) -> str:
    """`value` for a message: printable, on one line, and short."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else text[: limit - 1] + "…"

def absolute(path: str) -> str:
    """The path from the root on; Problem where the working directory was deleted."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise Problem(f"the working directory is gone: no {excerpt(path)} from here",
                      "cd to a directory that is there, and try again") from None

ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
ESCAPES.update({ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"})
ESCAPES.update({code: f"\\u{code:04x}" for code in  # those that turn text around
                (0x200e, 0x200f, *range(0x2028, 0x202f), *range(0x2066, 0x206a))})
MULTILINE = {code: text for code, text in ESCAPES.items() if code not in (9, 10)}

def nearest(word: str, words: Iterable[str]) -> str:
    """A hint naming the likely word, or an empty one."""
    import difflib
    found = difflib.get_close_matches(word, words, 1)
    return f"did you mean {found[0]}?" if found else ""


# ---- settings ----------------------------------------------------------------
#
# Every knob stands here once, with its type, default, bounds and help; `config`,
# --help, .env.example, README and the checks read this table. The environment (and
# .env, below it) beats the config table, which beats the default.

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TEN_YEARS_S = 10 * 366 * 86400
Value = TypeVar("Value", covariant=True)  # a Kind[int] is a Kind[object]

def parse_duration(text: str) -> float:
    """Seconds from `90`, `90s`, `5m`, `2h30m` or `1d`; ValueError otherwise."""
    if re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text):
        return float(text)
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,6})?[smhd])+", text):
        raise ValueError(text)
    parts = re.findall(r"([\d.]+)([smhd])", text)
    return sum(float(amount) * UNITS_S[unit] for amount, unit in parts)

def say_duration(seconds: float) -> str:
    """A duration for people: `0.2 s`, `41 s`, `2 m 30 s`, `3 h 5 m`, `2 d 1 h`."""
    if seconds < 60:
        digits = 1 if seconds < 10 and seconds % 1 else 0
        return f"{seconds:.{digits}f} s"
    pairs = (("d", "h"), ("h", "m"), ("m", "s"))
    unit, below = next(pair for pair in pairs if seconds >= UNITS_S[pair[0]])
    amount, rest = divmod(int(seconds), UNITS_S[unit])
    rest //= UNITS_S[below]
    return f"{amount} {unit}" + (f" {rest} {below}" if rest else "")

@dataclass(frozen=True)
class Kind(Generic[Value]):
    """One kind of value: how its text is read, and the words for what is expected."""
    convert: Callable[[str], Value]
    expects: str
    json_types: tuple[type, ...] = (str,)

    def read(self, value: object, name: str, types: tuple[type, ...] = (str,)) -> Value:
        try:
            if isinstance(value, bool) or not isinstance(value, types):
                raise ValueError(value)
            return self.convert(value if isinstance(value, str) else json.dumps(value))
        except (ValueError, OverflowError):
            raise Problem(f"{name}: expected {self.expects}, not {excerpt(value)}",
                          status=USAGE) from None

    def read_json(self, value: object, name: str) -> Value:
        """The value of a JSON document, whose type must be right too."""
        return self.read(value, name, self.json_types)

def bounded(value: T, low: float, high: float) -> T:
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(value)
    return value

def whole(low: int, high: int) -> Kind[int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise ValueError(text)
        return bounded(int(text), low, high)
    return Kind(convert, f"a whole number from {low} to {high}", (int,))

def number(low: float, high: float) -> Kind[float]:
    return Kind(lambda text: bounded(float(text), low, high),
                f"a number from {low:g} to {high:g}", (int, float))

def duration(low: float = 0, high: float = TEN_YEARS_S) -> Kind[float]:
    limits = f" of at least {low:g} s" if low else ""
    limits += f" of at most {say_duration(high)}" if high < TEN_YEARS_S else ""
    return Kind(lambda text: bounded(parse_duration(text), low, high),
                f"a duration{limits} such as 90, 90s, 5m or 2h30m", (int, float, str))

def choice(*words: str) -> Kind[str]:
    return Kind(lambda text: words[words.index(text)], " or ".join(words))

def read_codes(text: str) -> frozenset[int]:
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    return frozenset(bounded(int(word), 1, 255) for word in words)

EXIT_CODES = Kind(read_codes, "exit codes from 1 to 255, comma-separated")

def knob(kind: Kind[T], default: str, help_text: str) -> T:
    """A field of Settings: its default is read by the same code as what people type."""
    metadata = {"kind": kind, "default": default, "help": help_text}
    return dataclasses.field(default=kind.convert(default), metadata=metadata)

@dataclass(frozen=True)
class Settings:
    """The runtime settings, as one frozen value; a reload makes a new one."""
    backoff_base: float = knob(
        number(1, 1000), "2", "the delay before retry n is this to the power n, in s")
    backoff_max: float = knob(duration(), "1h", "the longest delay before a retry")
    backoff_jitter: float = knob(
        number(0, 1), "0", "the part of a delay that is random, from 0 to 1")
    max_retries: int = knob(
        whole(0, 1000), "3", "retries of a job that does not say: 3 means up to 4 runs")
    job_timeout: float = knob(
        duration(), "60", "time limit of a job that does not say; 0: none")
    kill_grace: float = knob(
        duration(0, 3600), "5", "seconds from TERM to KILL when a run is ended")
    output_limit: int = knob(
        whole(0, 16 << 20), "65536", "bytes of a run's output that are kept")
    poll_interval: float = knob(
        duration(0.05, 60), "1", "seconds between looks of an idle worker")
    doorbell: str = knob(
        choice("on", "off"), "on", "wake idle workers at once; off behind a proxy")
    heartbeat: float = knob(
        duration(0.1, 600), "5", "the longest time between two beats of a worker")
    worker_timeout: float = knob(
        duration(0.4, 86400), "30",
        "the lease: a worker silent for so long is lost (at least 4 heartbeats)")
    retain_completed: float = knob(
        duration(), "14d", "how long completed jobs are kept; 0: for ever")
    retain_cancelled: float = knob(
        duration(), "14d", "how long cancelled jobs are kept; 0: for ever")
    retain_dead: float = knob(
        duration(), "0", "how long dead jobs are kept; 0: for ever")
    permanent_exit_codes: frozenset[int] = knob(
        EXIT_CODES, "", "exit codes that are never retried")
    on_lost: str = knob(
        choice("retry", "dead"), "retry", "what becomes of a job whose worker was lost")

    @property
    def lease_s(self) -> float:
        return max(self.worker_timeout, 4 * self.heartbeat)

KNOBS = {field.name: field for field in dataclasses.fields(Settings)}

def variable_of(key: str) -> str:
    return f"QUEUECTL_{key.upper()}"

Layer = Tuple[str, Mapping[str, str]]  # what it is called, and what it holds

class Variable(NamedTuple):
    default: str
    help: str

# What only the environment and .env may set.
VARIABLES = {
    "DATABASE_URL": Variable("", "all of the following in one: "
                             "mysql://user:password@host:port/name?ssl-mode=required"),
    "DB_HOST": Variable("127.0.0.1", "server, or several with commas, each with an "
                        "optional :port; the first that takes writes is used"),
    "DB_PORT": Variable("3306", "port of those without one"),
    "DB_SOCKET": Variable("", "path of the server's Unix socket, instead of a host"),
    "DB_USER": Variable("", "account; by default the login name"),
    "DB_PASSWORD": Variable("", "its password"),
    "DB_PASSWORD_FILE": Variable("", "a file whose first line is the password"),
    "DB_NAME": Variable("queuectl", "database"),
    "DB_SSL_MODE": Variable("preferred", "disabled, preferred, required, verify_ca or "
                            "verify_identity"),
    "DB_SSL_CA": Variable("", "file of certificate authorities to verify against"),
    "PID_FILE": Variable("./workers.pid", "PID file of worker start --daemon"),
    "QUEUECTL_SKIP_LOCKED": Variable("", "off: claim without SKIP LOCKED"),
    "QUEUECTL_SIGNING_KEY": Variable("", "a secret: jobs are signed, and only those "
                                     "that are run"),
    "QUEUECTL_SIGNING_KEY_FILE": Variable("", "a file whose first line is that secret"),
}
# What a job does not inherit: ways into the database, tokens, the notify socket.
PRIVATE_VARIABLE = re.compile(
    r"DB_.*|DATABASE_URL|MYSQL_PWD|QUEUECTL_.*(KEY|TOKEN)(_FILE)?|NOTIFY_SOCKET|"
    r"WATCHDOG_.*|LISTEN_.*")

def read_dotenv(path: str) -> dict[str, str]:
    """The variables of a .env file, parsed, never executed; none without a file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise Problem(what, status=UNAVAILABLE) from None
    found = {}
    for position, line in enumerate(lines, 1):
        line, where = line.strip().lstrip("\ufeff"), f"{path}, line {position}"
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)", line)
        if not match:
            raise Problem(f"{where}: expected NAME=VALUE", status=USAGE)
        found[match[1]] = _dotenv_value(match[2], where)
    return found

def _dotenv_value(text: str, where: str) -> str:
    if text[:1] not in ("'", '"'):
        return re.sub(r"(^|\s+)#.*", "", text)
    match = re.fullmatch(r"""(?:'([^']*)'|"((?:[^"\\]|\\.)*)")\s*(?:#.*)?""", text)
    if not match:
        raise Problem(f"{where}: a quote is not closed", status=USAGE)
    if match[1] is not None:
        return match[1]
    return re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), match[2])

class Environment(NamedTuple):
    """Where variables are looked up, in order."""
    layers: tuple[Layer, ...]

    @classmethod
    def read(cls) -> Environment:
        """The process's own variables, then ./.env, then the one beside the script."""
        beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), ".env")
        files = [("./.env", read_dotenv(".env"))]
        same = False
        with contextlib.suppress(OSError):  # one is missing, or this directory is gone
            same = os.path.samefile(".env", beside)
        if not same:
            files.append((beside, read_dotenv(beside)))
        return cls((("environment", dict(os.environ)), *files))

    def find(self, name: str) -> tuple[str, str] | None:
        """Its value and the source, from the first layer that sets it."""
        return next(((variables[name], source) for source, variables in self.layers
                     if name in variables), None)

    def get(self, name: str) -> str:
        found = self.find(name)
        return found[0] if found else VARIABLES[name].default

class Configured(NamedTuple):
    """The settings in force, the source and text of each, and what was unusable."""
    settings: Settings
    origins: dict[str, tuple[str, str]]
    complaints: list[str]

def configure(environment: Environment, table: Mapping[str, str]) -> Configured:
    """Settings from the environment, the config table and the defaults.

    A value in the environment that cannot be read is a Problem; one in the table, which
    somebody else may have written, is passed over with a complaint.
    """
    values: dict[str, object] = {}
    origins, complaints = {}, []
    for key, field in KNOBS.items():
        kind: Kind[object] = field.metadata["kind"]
        origins[key] = ("default", field.metadata["default"])
        if key in table:
            try:
                values[key] = kind.read(table[key], f"config {key}")
                origins[key] = ("config", table[key])
            except Problem as problem:
                complaints.append(f"{problem.what}; the default is used")
        found = environment.find(variable_of(key))
        if found:
            values[key] = kind.read(found[0], f"{variable_of(key)} ({found[1]})")
            origins[key] = (found[1], found[0])
    settings = dataclasses.replace(Settings(), **values)  # type: ignore[arg-type]
    return Configured(settings, origins, complaints)

SSL_MODES = ("disabled", "preferred", "required", "verify_ca", "verify_identity")
LOCAL_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/run/mysqld/mysqld.sock",
                 "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")
PRIVATE_FOLDER = ".queuectl"
PORT = whole(1, 65535)
ADDRESS = {"DB_HOST", "DB_PORT", "DB_SOCKET"}
ACCOUNT = {"DB_USER", "DB_PASSWORD", "DB_PASSWORD_FILE"}
OPTION_FILES = ("/etc/my.cnf", "/etc/mysql/my.cnf", "~/.my.cnf")
OPTION_GROUPS = {"client", "client-server", "client-mariadb", "queuectl"}
OPTIONS = {"host": "DB_HOST", "port": "DB_PORT", "socket": "DB_SOCKET",
           "user": "DB_USER", "password": "DB_PASSWORD", "database": "DB_NAME",
           "ssl-mode": "DB_SSL_MODE", "ssl-ca": "DB_SSL_CA"}
DEFAULTS_FILE = "DB_DEFAULTS_FILE"  # how main passes on --defaults-file
Hosts = Tuple[Tuple[str, int], ...]

@dataclass(frozen=True)
class Target:
    """Where the database is and who we are there; each with the source that said so."""
    hosts: Hosts
    socket: str
    user: str
    password: str = dataclasses.field(repr=False)
    database: str = "queuectl"
    ssl_mode: str = "preferred"
    ssl_ca: str = ""
    source: str = "default"
    account_source: str = "default"
    chosen: bool = False  # the environment or .env names it

    def __str__(self) -> str:
        where = self.socket or ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.database} at {where}"

def private_socket(folder: str) -> str:
    """The socket of the private server in `folder`; a long path is noted in a file."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "socket")) as note:
        return note.read().strip()
    return os.path.join(folder, "mysqld.sock")

def find_private_folder() -> str:
    """The private server's folder, here or beside the script; empty without one."""
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), PRIVATE_FOLDER)
    return next((folder for folder in (PRIVATE_FOLDER, beside)
                 if os.path.isdir(os.path.join(folder, "data"))), "")

def find_target(environment: Environment) -> Target:
    """The database to use: address and account, each whole from the first that says."""
    layers = [(source, expand_url(variables, source))
              for source, variables in environment.layers]
    told, folder = Environment(tuple(layers)), find_private_folder()
    if folder:
        own = {"DB_SOCKET": private_socket(folder), "DB_USER": "root"}
        layers.append((PRIVATE_FOLDER, own))
    if not any(map(names_address, layers)) \
            or not any(ACCOUNT & layer[1].keys() for layer in layers):
        layers.append(read_option_files(os.environ.get(DEFAULTS_FILE, "")))
    nowhere: Layer = ("default", {})
    source, address = next(filter(names_address, layers), nowhere)
    account_source, account = next(
        (layer for layer in layers if ACCOUNT & layer[1].keys()
         and (layer[0] != PRIVATE_FOLDER or source == PRIVATE_FOLDER)), nowhere)
    hosts, sock = _address(address, source)
    chosen = source in dict(told.layers)
    rest = told if chosen else Environment((*told.layers, (source, address)))
    mode = rest.get("DB_SSL_MODE").lower().replace("-", "_")
    if mode not in SSL_MODES:
        raise Problem(f"DB_SSL_MODE: expected {', '.join(SSL_MODES)}, "
                      f"not {excerpt(mode)}", nearest(mode, SSL_MODES), USAGE)
    try:
        user = account.get("DB_USER") or getpass.getuser()
    except (KeyError, OSError):
        raise Problem("this user id has no login name", "set DB_USER", USAGE) from None
    return Target(hosts, sock, user, secret("DB_PASSWORD", account),
                  rest.get("DB_NAME"), mode, rest.get("DB_SSL_CA"), source,
                  account_source, chosen)

def names_address(layer: Layer) -> bool:
    return any(layer[1].get(name) for name in ADDRESS)

def _address(variables: Mapping[str, str], source: str) -> tuple[Hosts, str]:
    """(hosts, socket) of one source."""
    host, port = variables.get("DB_HOST", ""), variables.get("DB_PORT", "")
    sock = variables.get("DB_SOCKET", "")
    if host == "localhost" and not port:
        sock = sock or next(filter(os.path.exists, LOCAL_SOCKETS), "")
    if sock:
        return (), sock
    default_port = PORT.read(port or "3306", f"DB_PORT ({source})")
    return _hosts(host or "127.0.0.1", default_port), ""

def expand_url(variables: Mapping[str, str], source: str) -> Mapping[str, str]:
    """The variables, with what DATABASE_URL adds: address and account each whole."""
    url = variables.get("DATABASE_URL", "")
    if not url:
        return variables
    from urllib.parse import parse_qsl, unquote, urlsplit
    wrong = Problem(f"DATABASE_URL ({source}) cannot be read",  # it holds a password
                    "expected mysql://user:password@host:port/name", USAGE)
    try:
        parts = urlsplit(url)
        query = {name.replace("_", "-").replace("sslmode", "ssl-mode"): value
                 for name, value in parse_qsl(parts.query, strict_parsing=bool(
                     parts.query))}
    except ValueError:
        raise wrong from None
    account, at, host = parts.netloc.rpartition("@")
    user, colon, password = account.partition(":")
    host = unquote(host)
    odd = [name for name in query if name.startswith("ssl") and name not in OPTIONS]
    if not re.fullmatch(r"(mysql2?|mariadb)(\+\w+)?", parts.scheme) or odd:
        raise wrong
    if host.startswith("/"):
        query["socket"] = host
    said = {OPTIONS[name]: value for name, value in query.items() if name in OPTIONS}
    if host and not host.startswith("/"):
        said["DB_HOST"] = host
    if at:
        said["DB_USER"] = unquote(user)
    if colon:
        said["DB_PASSWORD"] = unquote(password)
    if parts.path.strip("/"):
        said["DB_NAME"] = unquote(parts.path.strip("/"))
    beside = {name for name, value in variables.items() if value}
    for group in (ADDRESS, ACCOUNT):
        beside |= group if group & beside else set()
    return {**variables, **{name: value for name, value in said.items()
                            if name not in beside}}

def read_option_files(only: str) -> Layer:
    """What MySQL's option files say to clients, and which of them; `only`: that one."""
    if only and not os.access(only, os.R_OK):
        raise Problem(f"--defaults-file: cannot read {only}", status=USAGE)
    found: dict[str, str] = {}
    sources = []
    for path in [only] if only else map(os.path.expanduser, OPTION_FILES):
        said = dict(_read_options(path, 0))
        found.update(said)
        sources += [path] * bool(said)
    return ", ".join(sources) or "default", found

def _read_options(path: str, depth: int) -> Iterator[tuple[str, str]]:
    """The variables and values of an option file and what it includes, in their order.
    As mysql does, what cannot be read, or anybody may write, is passed over."""
    try:
        if os.stat(path).st_mode & 0o002 and os.path.isfile(path):
            return
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError):  # ValueError: a NUL in its name
        return
    wanted = False
    for line in lines:
        included = re.fullmatch(r"!include(dir)?\s+(.+)", line)
        group = re.match(r"\[\s*([^\]]*?)\s*\]", line)
        if included and depth < 10:
            names = [included[2]]
            if included[1]:
                with contextlib.suppress(OSError, ValueError):
                    names = [os.path.join(included[2], name) for name in
                             sorted(os.listdir(included[2])) if name.endswith(".cnf")]
            for name in names:
                yield from _read_options(name, depth + 1)
        elif group:
            wanted = group[1] in OPTION_GROUPS
        elif wanted and line[:1] not in ("", "#", ";"):
            name, _, value = line.partition("=")
            name = name.strip().replace("_", "-")
            if name.startswith("loose-"):
                name = name[6:]
            if name in OPTIONS:
                yield OPTIONS[name], _option_value(value.strip())

def _option_value(text: str) -> str:
    """A value without its comment, its quotes, and MySQL's escapes."""
    part = r"""(?:'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)|[^#'"])*"""
    found = re.match(part, text)
    text = found[0].strip() if found else ""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    meant = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "s": " "}
    return re.sub(r"""\\([ntrbs\\'"])""", lambda m: meant.get(m[1], m[1]), text)

def _hosts(text: str, default_port: int) -> Hosts:
    found = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?|([^:]+):(\d+)|(.+)", word)
        if not match:
            what = f"DB_HOST: expected host or host:port, not {excerpt(word)}"
            raise Problem(what, status=USAGE)
        name, port = match[1] or match[3] or match[5], match[2] or match[4]
        found.append((name, PORT.read(port or str(default_port), "DB_HOST's port")))
    if not found:
        raise Problem("DB_HOST names no host", status=USAGE)
    return tuple(found)

def secret(name: str, variables: Mapping[str, str]) -> str:
    """A variable, or the first line of the file that NAME_FILE names."""
    path = variables.get(f"{name}_FILE")
    if variables.get(name) or not path:
        return variables.get(name, "")
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in its name
        raise Problem(f"{name}_FILE: cannot read {excerpt(path, 200)}: "
                      f"{getattr(error, 'strerror', '') or 'not a text file'}",
                      status=UNAVAILABLE) from None

@functools.lru_cache(maxsize=1)
def signing_key() -> bytes:
    """The key that jobs are signed with; empty: they are not."""
    name, environment = "QUEUECTL_SIGNING_KEY", Environment.read()
    layer = next((variables for _, variables in environment.layers
                  if {name, f"{name}_FILE"} & variables.keys()), {})
    return secret(name, layer).encode()

def sign(job_id: object, *parts: object) -> str:
    """The signature of a job: its id, command, cwd, env and on_failure."""
    said = [b"-" if part is None else b"+" + str(part).encode()
            for part in (job_id, *parts)]
    text = b"".join(b"%d:%b" % (len(part), part) for part in said)
    return hmac.new(signing_key(), text, "sha256").hexdigest()

def is_signed(signature: object, *parts: object) -> bool:
    """Whether a job may run: its signature fits, or none is asked for."""
    return not signing_key() or hmac.compare_digest(str(signature), sign(*parts))


# ---- rules -------------------------------------------------------------------
#
# States, moves, and what the end of a run means. Plain values in, plain values out:
# no clock, no I/O. The claiming room carries out what is decided here.

class State(str, enum.Enum):
    """Where a job is. The first five are the ones that status always shows."""
    __str__ = str.__str__
    PENDING = "pending"        # may run now
    PROCESSING = "processing"  # one worker holds it, by its token
    COMPLETED = "completed"    # exit status 0; never moves again
    FAILED = "failed"          # waits out its backoff
    DEAD = "dead"              # out of retries, or permanent; only a person moves it
    SCHEDULED = "scheduled"    # waits for its time
    BLOCKED = "blocked"        # waits for other jobs
    CANCELLED = "cancelled"    # a person ended it

class Move(NamedTuple):
    leaves: set[State]
    to: State

MOVES = {
    "release": Move({State.SCHEDULED, State.FAILED, State.BLOCKED}, State.PENDING),
    "defer": Move({State.BLOCKED}, State.SCHEDULED),  # parents done, not yet its time
    "claim": Move({State.PENDING}, State.PROCESSING),
    "complete": Move({State.PROCESSING}, State.COMPLETED),
    "fail": Move({State.PROCESSING}, State.FAILED),
    "bury": Move({State.PROCESSING, State.BLOCKED}, State.DEAD),
    "lose": Move({State.PROCESSING}, State.FAILED),
    "hand back": Move({State.PROCESSING}, State.PENDING),
    "cancel": Move({State.PENDING, State.SCHEDULED, State.BLOCKED, State.FAILED},
                   State.CANCELLED),
    "cancel, ended": Move({State.PROCESSING}, State.CANCELLED),
    "revive": Move({State.DEAD}, State.PENDING),
    "retry": Move({State.FAILED, State.DEAD, State.CANCELLED}, State.PENDING),
}
ENDED = (State.COMPLETED, State.DEAD, State.CANCELLED)

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

ALONE_AFTER_LOSSES = 2

@dataclass(frozen=True)
class Held:
    """A job in `processing`, as its row says; NULLs are filled from the settings."""
    seq: int
    id: str
    token: str
    run: int
    attempts: int
    allowed: int
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
class End:
    """How a run ended, as its worker saw it."""
    reason: Reason | None  # None: it goes on
    exit_code: int | None = None
    detail: str = ""
    duration_s: float | None = None
    output: bytes = b""
    output_bytes: int = 0  # how many it wrote, kept or not

class Verdict(NamedTuple):
    """What an ended run makes of its job."""
    move: str
    wait_s: float = 0.0
    losses: int = 0
    grant: int | None = None  # runs allowed from now on, where that changes

def backoff_s(base: float, attempts: int, settings: Settings, chance: float) -> float:
    """Seconds before the next run: base ^ attempts, at most backoff_max."""
    delay = settings.backoff_max  # compared by logarithms, as the power may overflow
    if delay > 0 and attempts * math.log(base) < math.log(delay):
        delay = base ** attempts
    return delay * (1 - settings.backoff_jitter * chance)

def judge(job: Held, end: End, settings: Settings, chance: float) -> Verdict:
    """The move that the end of a run makes. `chance`, from 0 to 1, feeds the jitter."""
    if job.cancel_requested:
        return Verdict("cancel, ended")
    if end.reason is Reason.HANDED_BACK:
        return Verdict("hand back", losses=job.losses)
    wait_s = backoff_s(job.backoff_base, job.attempts, settings, chance)
    spent = job.attempts >= job.allowed
    if end.reason is Reason.LOST:
        # Only a run that was alone is buried for loss: no neighbour can have caused it.
        if job.on_lost == "dead" or (spent and job.alone):
            return Verdict("bury", losses=job.losses + 1)
        return Verdict("lose", wait_s if job.losses else 0.0, job.losses + 1,
                       job.attempts + 1 if spent else None)
    if end.reason is Reason.EXIT and end.exit_code == 0:
        return Verdict("complete")
    if spent or end.exit_code in job.permanent_exit_codes \
            or end.reason is Reason.SIGNATURE:
        return Verdict("bury")
    return Verdict("fail", wait_s)

class Judge:
    """Which workers are lost, told by their beats and by our own clock alone.

    A worker is lost when its beat stood still for its whole lease, during which all our
    own beats came through, none more than two heartbeats apart. So an outage, a stall,
    a suspended host or a stepped clock starts the count again for everyone.
    """
    def __init__(self) -> None:
        self._since: dict[tuple[str, int], float] = {}  # (worker, beat): first seen
        self._last = -math.inf

    def observe(self, now: float, beats: Mapping[str, tuple[int, float]],
                heartbeat_s: float) -> dict[str, int]:
        """The lost among `beats` (id: (beat, lease)), each with its last beat."""
        if now - self._last > 2 * heartbeat_s:
            self._since.clear()
        self._last = now
        self._since = {(worker, beat): self._since.get((worker, beat), now)
                       for worker, (beat, _) in beats.items()}
        return {worker: beat for worker, (beat, lease) in beats.items()
                if now - self._since[worker, beat] >= lease}


# ---- schema ------------------------------------------------------------------
#
# The whole current schema: migrations.sql is its print, and a test holds the two
# together. Doing it twice, or over an older schema, changes nothing. The version row
# comes first, so that a half-made schema is known as ours and completed.

SCHEMA_VERSION = 1
OLDEST_WRITER = 1  # the oldest schema whose programs may still write
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
  attempts INT NOT NULL DEFAULT 0, attempts_max INT NULL, max_retries INT NULL,
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
  waits_for INT NOT NULL DEFAULT 0, has_children TINYINT NOT NULL DEFAULT 0,
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
  job BIGINT UNSIGNED NOT NULL, run INT NOT NULL, attempt INT NOT NULL,
  worker VARCHAR(64) NULL, started_at DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  duration DOUBLE NULL, exit_code INT NULL, reason VARCHAR(16) NULL,
  detail VARCHAR(1024) COLLATE utf8mb4_bin NULL,
  output LONGBLOB NULL, output_bytes BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (job, run)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS dlq (
  seq BIGINT UNSIGNED NOT NULL PRIMARY KEY, id VARCHAR(128) NOT NULL,
  died_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  exit_code INT NULL, reason VARCHAR(16) NULL,
  last_line VARCHAR(255) COLLATE utf8mb4_bin NULL,
  UNIQUE KEY dlq_id (id),
  KEY dlq_died (died_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS workers (
  id VARCHAR(64) NOT NULL PRIMARY KEY,
  host VARCHAR(255) COLLATE utf8mb4_bin NOT NULL, pid BIGINT NOT NULL,
  supervisor BIGINT NOT NULL, process VARCHAR(255) NOT NULL,
  slots INT NOT NULL, queues TEXT NULL, state VARCHAR(10) NOT NULL DEFAULT 'running',
  beat BIGINT NOT NULL DEFAULT 0, lease DOUBLE NOT NULL,
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

# One that has shipped never changes. Programs of the schema before write on until they
# have read the version row: a step only adds, and what it adds has a default.
UPGRADES: Sequence[Upgrade] = ()

def schema_statements() -> list[str]:
    """The statements of SCHEMA that make tables: without CREATE DATABASE and USE."""
    text = re.sub(r"(?m)^(--.*|CREATE DATABASE [^;]*;|USE .*;)\n", "", SCHEMA)
    return [part.strip() for part in text.split(";\n") if part.strip()]

def schema_for(database: str) -> str:
    """The text of migrations.sql, for a database of this name."""
    return SCHEMA.replace("`queuectl`", quote_name(database))

def quote_name(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


# ---- connection --------------------------------------------------------------
#
# Reaching MySQL, and saying plainly why we could not. `transact` alone decides what
# an error means: repeat, reconnect, the row's fault, or a Problem for a person. No
# other room catches a PyMySQL error. Nobody forks with a connection open.

class Trouble(enum.Enum):
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
    Trouble.REPEAT: {LOCK_WAIT_TIMEOUT, 1213, 1020, 1180, 1206, 1412, 1622, 1969, 3024,
                     3101, 3572},
    Trouble.RECONNECT: {*range(100),  # of its files (3: a full disk), and PyMySQL's 0
                        2002, 2003, 2006, 2013, 2055, 1053, 1079, 1152, 1158, 1159,
                        1160, 1161, 1184, 1317, 1927, 3168, 3169, 4031,
                        BINLOG_NEEDS_REPEATABLE_READ, *REFUSED_BY_CLUSTER,
                        1290, 1792, 1836, 3032, 4311, 4312, 4313,  # no writes here now
                        1021, 1026, 1030, 1037, 1038, 1041, 1114, 3675,  # disk, memory
                        1598, 1950, 1964,  # the binary log did not take the COMMIT
                        1105, 9001},  # unknown; ProxySQL: nobody behind it
    Trouble.CROWDED: {1040, 1203, 1226},
    Trouble.ROW: {1062, 1153, 1264, 1265, 1366, 1406, 3140, 3819, 4025,
                  1197, 1705, 3231},  # more at once than binary log or cluster take
    Trouble.SETUP: {1044, 1045, 1049, 1054, 1129, 1130, 1142, 1143, 1146, 1698, 1862,
                    2026, 2059, 3098, 3118, 3159, 3635},
}
TROUBLE_OF = {code: trouble for trouble, codes in CODES.items() for code in codes}
LONGEST_PAUSE_S, SAY_AFTER_S = 3.0, 1.0
SLOW_WIRE_BYTES_S = 32 * 1024  # the slowest wire that is borne with
TRIES_ON_A_HOST = 3

class RowRefused(Exception):
    """The server will never take this data as it is: `code` and `text` say why."""
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code, self.text = code, text

class Unreachable(Problem):
    """The server stayed away for longer than the caller's patience."""
    sent = False  # whether the transaction may have been carried out

@dataclass(frozen=True)
class Policy:
    """How a caller bears with a server that is away."""
    patience_s: float
    timeout_s: float  # of one answer to a short statement
    say: Callable[[str], None]
    longest_s: float = math.inf  # of one answer to a statement of many bytes

    def answer_s(self, statement_bytes: int) -> float:
        """Seconds that a statement of this size may take, on a slow wire too."""
        wire_s = statement_bytes / SLOW_WIRE_BYTES_S
        return min(self.timeout_s + wire_s, max(self.timeout_s, self.longest_s))

def _whisper(text: str) -> None:
    print(f"queuectl: {text.translate(MULTILINE)}", file=sys.stderr, flush=True)

READING = Policy(patience_s=2, timeout_s=30, say=_whisper)
WRITING = Policy(patience_s=10, timeout_s=10, say=_whisper)
FOLLOWING = Policy(patience_s=60, timeout_s=10, say=_whisper)  # a failover takes 30 s
UPGRADING = Policy(patience_s=20, timeout_s=4 * 3600, say=_whisper)

class RefuseClearText:
    """Answers a server that asks for the password in clear text: with nothing."""
    def __init__(self, connection: object) -> None:
        self._connection = connection

    def authenticate(self, packet: object) -> NoReturn:
        raise Problem("the server asked for the password in clear text: refused",
                      "give the account caching_sha2_password or mysql_native_password",
                      UNAVAILABLE)

def sent_bytes(text: str) -> int:
    return len(text if text.isascii() else text.encode(errors="surrogateescape"))

class Cursor:
    """PyMySQL's cursor, and statements that wait for the next one's round trip."""
    def __init__(self, inner: cursors.Cursor, bytes_max: int,
                 read_committed: bool = True) -> None:
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
        if self._deferred and \
                sum(map(sent_bytes, [*self._deferred, text])) > self._bytes_max:
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
    timed_out_bytes: int = 0  # the statement that the last one waited for in vain

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
    def __init__(self, inner: cursors.Cursor, bytes_max: int, read_committed: bool,
                 tries: Tries) -> None:
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
    def __init__(self, target: Target, policy: Policy, bare: bool = False,
                 route: Route | None = None) -> None:
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

    def transact(self, work: Callable[[Transaction], T],
                 verify: Callable[[Transaction], T | None] | None = None) -> T:
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
        return self._insist(attempt, tries)

    def read(self, work: Callable[[Cursor], T]) -> T:
        """Do `work`, which changes nothing or one thing by one statement."""
        return self._insist(lambda: work(self._cursor()), Tries())

    def rows(self, make: Callable[..., T], statement: str, *values: object) -> list[T]:
        """What `make` makes of each row that one statement finds."""
        return self.read(lambda cursor: cursor.rows(make, statement, *values))

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
            if diagnose(error)[0] is not Trouble.BUG:
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
        transaction = Transaction(self._connection.cursor(), self.packet_bytes // 4,
                                  self.read_committed, tries)
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
        return Cursor(self._connection.cursor(), self.packet_bytes // 4,
                      self.read_committed)

    def _follow_route(self) -> None:
        if self._connection and self._host != self.route.first:
            self.close()  # another connection of this process has left that host

    def _insist(self, attempt: Callable[[], T], tries: Tries) -> T:
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
        trouble, code = diagnose(error)
        if trouble is Trouble.BUG and isinstance(error, _Driver().OperationalError) \
                and (tries.unsure or math.isinf(self.policy.patience_s)):
            # None that we know: after a COMMIT it may stand, and running jobs go on.
            trouble = Trouble.RECONNECT
        tries.timed_out_bytes = 0
        if timed_out(error) and self._connection:
            tries.timed_out_bytes = (
                self._connection.statement_bytes)  # type: ignore[attr-defined]
        self._recover(trouble, code)
        if trouble is Trouble.ROW:
            raise RowRefused(code, str(error.args[-1])) from None
        tries.count += 1
        tries.since = tries.since or time.monotonic()
        tries.lost = tries.lost or (tries.begun and trouble is Trouble.RECONNECT)
        hangs = timed_out(error) or code in REFUSED_BY_CLUSTER or (
            tries.unsure and code == LOCK_WAIT_TIMEOUT)  # a COMMIT holds it that hangs
        conflict = trouble is Trouble.REPEAT and code != LOCK_WAIT_TIMEOUT
        if hangs or (tries.count % TRIES_ON_A_HOST == 0 and not conflict):
            self._leave_host()
        self._bear(trouble, error, tries)

    def _leave_host(self) -> None:
        """Begin with the next host from now on. Not after a mere reset: the next one
        may be a replica that somebody left writable."""
        if len(self.target.hosts) > 1:
            self.route.first = (self.route.first + 1) % len(self.target.hosts)
            self.close()

    def _recover(self, trouble: Trouble, code: int) -> None:
        """Leave no half-open transaction behind."""
        if code == BINLOG_NEEDS_REPEATABLE_READ and self.read_committed:
            self.read_committed = False
            self.policy.say("the server's binlog_format is STATEMENT: claims wait for "
                            "each other; set it to ROW or MIXED")
        if trouble in (Trouble.REPEAT, Trouble.ROW) and self._connection:
            try:
                self._connection.rollback()
                return
            except _Driver().MySQLError:
                pass  # the connection died too: it is thrown away below
        self.close()

    def _bear(self, trouble: Trouble, error: Exception, tries: Tries) -> None:
        """Pause before the next try, or raise what a person should read."""
        if trouble is Trouble.BUG:
            raise error
        problem = explain_error(self.target, error)
        problem.sent = tries.unsure or tries.lost
        hopeless = not math.isinf(self.policy.patience_s) and (
            trouble is Trouble.SETUP or (not self.target.chosen and _refused(error)))
        longest = min(LONGEST_PAUSE_S, self.policy.timeout_s / 4)  # far below a lease
        if trouble is Trouble.REPEAT:
            longest = 0.5
        pause = min(longest, 0.01 * 2 ** min(tries.count, 12)) * random.uniform(0.5, 1)
        if trouble is Trouble.CROWDED:
            pause += 0.2
        if hopeless or time.monotonic() - tries.since + pause > self.policy.patience_s:
            raise problem
        if trouble is not Trouble.REPEAT:
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
                if self._prepare(connection):
                    self._host = self.route.first = at
                    found, connection = connection, None
                    return found
                failure = failure or driver.OperationalError(
                    1290, f"{host}:{port} takes no writes")
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
            return self._dial(host, port, None)
        try:
            return self._dial(host, port, self._context())
        except _Driver().OperationalError as error:
            if mode != "preferred" or error.args[0] != 2026:
                raise
            return self._dial(host, port, None)

    def _dial(self, host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        patience = max(1.0, min(5.0, self.policy.patience_s, self.policy.timeout_s))
        refuse: dict[str, Callable[[Connection], object]] = {
            "mysql_clear_password": RefuseClearText, "dialog": RefuseClearText}
        return _Driver().connect(
            user=self.target.user, password=self.target.password.encode(), host=host,
            port=port, unix_socket=self.target.socket or None, charset="utf8mb4",
            database=None if self.bare else self.target.database, autocommit=True,
            client_flag=_FOUND_ROWS | _MULTI_STATEMENTS, auth_plugin_map=refuse,
            ssl=tls, ssl_disabled=tls is None, connect_timeout=patience,
            read_timeout=patience, write_timeout=patience)

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
                raise Problem(f"DB_SSL_CA: cannot use {path}: {error}",
                              status=UNAVAILABLE) from None
        return self._tls

    def _prepare(self, connection: Connection) -> bool:
        """Set up the session; False for one of several hosts that takes no writes now.

        A session that a partition left behind, with its locks, must not last.
        """
        cursor = Cursor(connection.cursor(), self.packet_bytes)
        cursor.execute("SELECT VERSION(), @@max_allowed_packet, @@read_only, "
                       "@@innodb_read_only")
        version, self.packet_bytes, *read_only = cursor.fetchone() or ("", 0)
        self.version = str(version)
        several = len(self.target.hosts) > 1
        # Asked before the schema, which on a host that was left behind may be old.
        if several and not (takes_writes(read_only) and _can_commit(cursor)):
            return False
        timeout_s = self.policy.timeout_s
        if several:  # where a COMMIT hangs, there must be time to go to the next host
            timeout_s = min(timeout_s, max(1.0, self.policy.patience_s / 3))
        limit = f"max_{'statement' if self.mariadb else 'execution'}_time"
        lock_wait_s = max(1, min(10, int(timeout_s) - 1))
        cursor.execute("SET SESSION sql_mode = 'STRICT_ALL_TABLES', "
                       f"time_zone = '+00:00', {limit} = 0, completion_type = 0, "
                       f"innodb_lock_wait_timeout = {lock_wait_s}, "
                       f"wait_timeout = {int(4 * self.policy.timeout_s)}")
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
    galera = dict(cursor.rows(
        lambda name, value: (name, value), "SHOW STATUS WHERE Variable_name IN "
        "('wsrep_ready', 'wsrep_provider_name')"))
    if galera.get("wsrep_provider_name"):
        return galera.get("wsrep_ready") == "ON"
    try:
        cursor.execute("SELECT COUNT(*), COALESCE(SUM(member_state = 'ONLINE'), 0) "
                       "FROM performance_schema.replication_group_members "
                       "WHERE member_state <> 'OFFLINE'")
    except _Driver().MySQLError as error:
        if diagnose(error)[0] is not Trouble.SETUP:  # no such table, or no right to it
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
            raise Problem(f"PyMySQL is missing for {sys.executable} ({error})",
                          how_to_install(), UNAVAILABLE) from None
        self.version = ".".join(str(part) for part in pymysql.VERSION[:3])
        if pymysql.VERSION[:3] < PYMYSQL_NEEDED:
            needed = ".".join(map(str, PYMYSQL_NEEDED))
            raise Problem(f"PyMySQL {self.version} of {sys.executable} is too old: "
                          f"{needed} is needed", how_to_install(), UNAVAILABLE)
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
                        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                              struct.pack("ii", 1, 0))
                super()._force_close()  # type: ignore[misc]

            def _request_authentication(self) -> None:
                # Older PyMySQL would go on in plain text where TLS is not offered.
                offers: int = getattr(self, "server_capabilities")  # noqa: B009
                if self.ssl and not offers & _TLS_OFFERED:
                    raise pymysql.err.OperationalError(
                        2026, "the server does not offer TLS")
                super()._request_authentication()  # type: ignore[misc]
        self.connect = Connection
        self.MySQLError = pymysql.err.MySQLError
        self.OperationalError = pymysql.err.OperationalError
        self.ProgrammingError = pymysql.err.ProgrammingError

PYMYSQL_NEEDED = (1, 0, 2)
PACKAGES = {"apt-get": "apt install python3-pymysql",
            "dnf": "dnf install python3-PyMySQL", "apk": "apk add py3-pymysql",
            "zypper": "zypper install python3-PyMySQL",
            "pacman": "pacman -S python-pymysql"}

def how_to_install() -> str:
    """How this system gets PyMySQL."""
    own = next((line for tool, line in PACKAGES.items() if shutil.which(tool)), "")
    return ("install it: " + f"{own}, or: " * bool(own)
            + f"{sys.executable} -m pip install PyMySQL")

def use_own_environment() -> None:
    """Go on under the .venv beside the script, where PyMySQL is missing here."""
    import importlib.util
    folder = os.path.join(os.path.dirname(os.path.realpath(__file__)), ".venv")
    python = os.path.join(folder, "bin", "python3")
    if importlib.util.find_spec("pymysql") is None and os.access(python, os.X_OK) \
            and os.path.realpath(sys.prefix) != os.path.realpath(folder):
        os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])

def driver_version() -> str:
    try:
        return _Driver().version
    except Problem as problem:
        return "missing" if "missing" in problem.what else "too old"

def diagnose(error: Exception) -> tuple[Trouble, int]:
    """The class of a PyMySQL error, and its code."""
    import ssl
    code = error.args[0] if error.args and isinstance(error.args[0], int) else -1
    origin = getattr(error, "original_exception", None)
    if isinstance(origin, ssl.SSLCertVerificationError):  # PyMySQL says 2003: away
        return Trouble.SETUP, 2026
    if code == -1 and "Packet sequence" in str(error):
        return Trouble.RECONNECT, code
    return TROUBLE_OF.get(code, Trouble.BUG), code

def timed_out(error: Exception) -> bool:
    """Whether nothing came in time: the server hangs, or the wire to it is slow."""
    causes = (getattr(error, "original_exception", None), error.__context__)
    return any(isinstance(cause, socket.timeout) for cause in causes)

def _refused(error: Exception) -> bool:
    origin = getattr(error, "original_exception", None)
    return isinstance(origin, (ConnectionRefusedError, FileNotFoundError))

def explain_error(target: Target, error: Exception) -> Unreachable:
    """What a person should read about an error; no password in it."""
    code = diagnose(error)[1]
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
        hint = ("grant it (README, Accounts), or use another account; an administrator "
                "makes the tables by: queuectl db schema | mysql -u root -p")
    elif diagnose(error)[0] is Trouble.REPEAT:
        what = f"others hold locks in {place}: {text}"
        hint = "try again; a long transaction is in SHOW PROCESSLIST"
    elif code in (2026, 2059, 3159):
        what = f"no secure connection to {place}: {text}"
        hint = "check DB_SSL_MODE and DB_SSL_CA"
    elif _refused(error) and target.source == PRIVATE_FOLDER:
        what = f"the private server of {place} is stopped"
        hint = "run: queuectl db start"
    elif _refused(error) and not target.chosen:
        where = str(target).partition(" at ")[2]
        where += f" (from {target.source})" if target.source != "default" else ""
        what = (f"no database is configured, and no server answers at {where}; "
                "looked in the environment (DATABASE_URL, DB_HOST, DB_SOCKET), ./.env, "
                f".env beside the script, ./{PRIVATE_FOLDER} and MySQL's option files")
        hint = ("set DB_HOST, DB_USER and DB_PASSWORD, or start a private server: "
                "queuectl db start")
    else:
        what = f"cannot reach the database {place}: {text}"
        hint = "check that the server runs, and DB_HOST, DB_PORT and DB_SOCKET"
    return Unreachable(what, hint, UNAVAILABLE)

def schema_of(row: object, database: str) -> int:
    """The schema that a version row tells of; refused: newer than we may write."""
    words = str(row).split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise Problem(f"the database {database} has a config table without queuectl's "
                      "schema version: it is not a queue",
                      "name another database in DB_NAME", UNAVAILABLE)
    version, oldest_writer = map(int, words)
    if oldest_writer > SCHEMA_VERSION:
        raise Problem(f"the tables in {database} are of schema {version}, newer than "
                      f"this program ({VERSION}, schema {SCHEMA_VERSION})",
                      "install the newer queuectl.py on this host", UNAVAILABLE)
    return version

def check_schema(row: object, database: str) -> None:
    """Refuse tables that this program does not know."""
    version = schema_of(row, database)
    if version < SCHEMA_VERSION:
        raise Problem(f"the tables in {database} are of schema {version}, older than "
                      f"this program needs ({SCHEMA_VERSION})",
                      "run: queuectl db init", UNAVAILABLE)

def placeholders(values: Collection[object]) -> str:
    return ", ".join(["%s"] * len(values))

def insertions(cursor: Cursor, packet_bytes: int, head: str,
               rows: Iterable[tuple[str, Values]], tail: str) -> Iterator[str]:
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

def init_database(target: Target) -> str:
    """Create the database and its tables, or upgrade them; says what was done.

    Refused, with nothing changed: tables newer than this program, and a `jobs` table
    that is not ours. Two at once wait for each other by a named lock.
    """
    name, lock = quote_name(target.database), f"queuectl:{target.database}"[:64]
    def work(cursor: Cursor) -> str:
        if not cursor.value("SELECT COUNT(*) FROM information_schema.schemata "
                            "WHERE schema_name = %s", target.database):
            cursor.execute(f"CREATE DATABASE IF NOT EXISTS {name} "
                           "DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
        cursor.execute(f"USE {name}")
        if not cursor.value("SELECT GET_LOCK(%s, 10)", lock):
            raise Problem("another queuectl db init is at work", "try again soon")
        # While we wait for the end of a long transaction all others wait for us.
        cursor.execute("SET SESSION lock_wait_timeout = 1")
        found = _existing_schema(cursor, target.database)
        if found <= SCHEMA_VERSION:
            _upgrade(cursor, found)
        done = (f"{SCHEMA_VERSION} created" if not found else
                f"{found} is there already" if found >= SCHEMA_VERSION else
                f"{found} upgraded to {SCHEMA_VERSION}")
        return f"schema {done} in {target}"
    # Closing lets the lock go.
    with contextlib.closing(Database(target, UPGRADING, bare=True)) as database:
        return database.read(work)

def _existing_schema(cursor: Cursor, database: str) -> int:
    """0: there is none, or one whose making broke off."""
    tables = cursor.rows(str, "SELECT table_name FROM information_schema.tables "
                         "WHERE table_schema = %s", database)
    if "config" in tables:
        version = cursor.value(SCHEMA_ROW)
        if version is not None or "jobs" in tables or cursor.rows(
                str, "SELECT value FROM config LIMIT 1"):
            return schema_of(version, database)
    elif "jobs" in tables:
        raise Problem(f"{database} has a jobs table that is not queuectl's: nothing "
                      "was changed", "name another database in DB_NAME", UNAVAILABLE)
    return 0

def _upgrade(cursor: Cursor, found: int) -> None:
    """Add what is missing. Broken off, it is done again from its beginning."""
    for statement in schema_statements():
        cursor.execute(statement)
    for step in UPGRADES:
        there = cursor.rows(
            str, "SELECT 1 FROM information_schema.columns WHERE table_schema = "
            "DATABASE() AND (table_name, column_name) = (%s, %s) UNION ALL "
            "SELECT 1 FROM information_schema.statistics WHERE table_schema = "
            "DATABASE() AND (table_name, index_name) = (%s, %s)", *step.adds * 2)
        if found < step.to and not there:
            cursor.execute(step.statement)
    cursor.execute("UPDATE config SET value = %s WHERE `key` = 'schema_version'",
                   (f"{SCHEMA_VERSION}/{OLDEST_WRITER}",))


# ---- enqueueing --------------------------------------------------------------
#
# What a job may say, and its way into the table. Everything is checked and spooled
# before the first INSERT: a bad line refuses the whole input, and a pipe cannot be
# read again. The id is made before the INSERT, so that a repeat is recognised.

STAGED, STAGED_FROM, RELEASED_AT_ONCE = "staged ", 200_000, 2000
COMMAND_BYTES_MAX = 131000  # the kernel takes 131,071 bytes in one argument
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*")
NAMED = "letters, digits and ._:@+-, the first a letter or digit"
NOT_BLANK = re.compile(r"\s*[^\s\0][^\0]*")  # and without NUL

def _text(form: re.Pattern[str], bytes_max: int, expects: str) -> Kind[str]:
    def convert(text: str) -> str:
        if not form.fullmatch(text) or len(text.encode()) > bytes_max:
            raise ValueError(text)
        return text
    return Kind(convert, expects)

def _read_time(text: str) -> str:
    """UTC, as the database writes it, from ISO 8601 with a zone."""
    moment = datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    if moment.tzinfo is None:
        utc, here = f"{moment.isoformat()}Z", moment.astimezone().isoformat()
        raise Problem(f"the time {excerpt(text)} has no time zone",
                      f"say {utc} for UTC, or {here} for this host's time", USAGE)
    return moment.astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")

def _read_env(text: str) -> str:
    """Canonical JSON of an object of strings."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(text) from None
    for name, value in found.items() if isinstance(found, dict) else [("", None)]:
        if not isinstance(value, str) or "\0" in value \
                or not re.fullmatch(r"[^=\0]+", name):
            raise ValueError(text)
        (name + value).encode()  # a lone surrogate is a ValueError too
    return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

def _read_code_list(text: str) -> str:
    codes = read_codes(re.sub(r"^\[(.*)\]$", r"\1", text))
    return ",".join(map(str, sorted(codes)))

def _read_ids(text: str) -> list[str]:
    ids = json.loads(text) if text.startswith("[") else [text]
    return [JOB_ID.convert(one if isinstance(one, str) else "") for one in ids]

QUEUE_NAME = _text(NAME, 64, f"1 to 64 {NAMED}")
JOB_ID = _text(NAME, 128, f"1 to 128 {NAMED}")
JOB_IDS = Kind(_read_ids, "a list of job ids", (list, str))
COMMAND = _text(NOT_BLANK, COMMAND_BYTES_MAX,
                f"a command of 1 to {COMMAND_BYTES_MAX} bytes of UTF-8 without NUL")

class Key(NamedTuple):
    kind: Kind[object]
    help: str
    metavar: str  # the option's placeholder

JOB_KEYS = {
    "id": Key(JOB_ID, "its name; made when not given", "ID"),
    "command": Key(COMMAND, "what /bin/sh -c runs", "CMD"),
    "max_retries": Key(whole(0, 1000), "retries after the first run", "N"),
    "priority": Key(whole(-1000000, 1000000), "higher runs first", "N"),
    "queue": Key(QUEUE_NAME, "the line it waits in", "NAME"),
    "delay": Key(duration(), "not before this much time has passed", "D"),
    "run_at": Key(Kind(_read_time, "a time such as 2026-11-24T10:00:00Z"),
                  "not before this time", "TIME"),
    "timeout": Key(duration(), "a run's time limit, else job_timeout; 0: none", "D"),
    "cwd": Key(_text(NOT_BLANK, 4096, "a path without NUL"), "directory it runs in",
               "DIR"),
    "env": Key(Kind(_read_env, "an object of strings", (dict,)),
               "variable to add to its environment (repeatable)", "NAME=VALUE"),
    "backoff_base": Key(number(1, 1000), "its own backoff_base", "X"),
    "permanent_exit_codes": Key(
        Kind(_read_code_list, EXIT_CODES.expects, (list, str)),
        "exit codes after which it is not retried", "CODES"),
    "on_lost": Key(choice("retry", "dead"), "if its worker is lost: retry or dead",
                   "WHAT"),
    "after": Key(JOB_IDS, "a job that must complete first (repeatable)", "ID"),
    "after_any": Key(JOB_IDS, "a job that must end first (repeatable)", "ID"),
    "unique": Key(_text(re.compile(r"\S(.*\S)?"), 128, "a key of 1 to 128 bytes"),
                  "only if no job with this key lives", "KEY"),
    "on_failure": Key(COMMAND, "a command to enqueue if it dies", "CMD"),
}
# How a key's value is written into the row; the others go in as they are.
EXPRESSIONS = {"delay": "UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND"}
COLUMN_OF = {"delay": "next_run_at", "run_at": "next_run_at", "unique": "unique_key"}
TIMES = {"delay", "run_at"}
NEEDS = {"after_any": "ended", "after": str(State.COMPLETED)}  # rows of another table
REPEATABLE = {"env", *NEEDS}
SIGNED = ("id", "command", "cwd", "env", "on_failure")
Job_Values = Mapping[str, object]

def new_id() -> str:
    """A time-ordered UUID (version 7, RFC 9562): its index pages fill in order."""
    moment, noise = f"{time.time_ns() // 1_000_000:012x}", os.urandom(10).hex()
    variant = "89ab"[int(noise[3], 16) % 4]
    return (f"{moment[:8]}-{moment[8:]}-7{noise[:3]}-{variant}{noise[4:7]}-"
            f"{noise[7:19]}")

def check_job(document: object, defaults: Job_Values) -> dict[str, object]:
    """The checked values of a JSON job, `defaults` filling what it leaves out."""
    if not isinstance(document, dict):
        raise Problem(f"a job is a JSON object, not {excerpt(document)}", status=USAGE)
    values: dict[str, object] = {}
    for name, value in document.items():
        if name not in JOB_KEYS:
            hint = nearest(name, JOB_KEYS) or f"keys: {' '.join(JOB_KEYS)}"
            raise Problem(f"unknown key {excerpt(name)}", hint, USAGE)
        values[name] = JOB_KEYS[name].kind.read_json(value, name)
    return complete_job(values, defaults)

def complete_job(values: dict[str, object], defaults: Job_Values) -> dict[str, object]:
    """`values` with `defaults`, an id and an absolute directory."""
    timed = TIMES & values.keys()
    for name, value in defaults.items():
        if not (timed and name in TIMES):
            values.setdefault(name, value)
    if "command" not in values:
        raise Problem("command: missing", 'say {"command": "…"}', USAGE)
    if values.keys() >= TIMES:
        raise Problem("delay and run_at: give only one", status=USAGE)
    values.setdefault("id", new_id())
    if "cwd" in values:
        values["cwd"] = absolute(str(values["cwd"]))
    if "delay" in values:
        values["delay"] = round(float(str(values["delay"])) * 1e6)
        if not values["delay"]:
            del values["delay"]
    if TIMES & values.keys():
        values["state"] = State.SCHEDULED
    if any(map(values.get, NEEDS)):
        values["state"] = State.BLOCKED
    return values

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

    def add(self, values: Job_Values) -> None:
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

    def rows(self, batch: str, staged: Mapping[str, str]) -> \
            Iterator[tuple[str, list[object]]]:
        """The VALUES template of each job, DEFAULT where it says nothing; values.

        What would be pending gets what `staged` says.
        """
        templates: dict[tuple[str, ...], tuple[str, list[int]]] = {}
        for shape, values in self._read():
            if shape not in templates:
                said = {COLUMN_OF.get(name, name): name
                        for name in shape if name not in NEEDS}
                literal = {} if "state" in said else staged
                columns = list(dict.fromkeys([*self.columns, *staged]))
                parts = [EXPRESSIONS.get(said[column], "%s") if column in said
                         else literal.get(column, "DEFAULT") for column in columns]
                order = [shape.index(said[one]) for one in columns if one in said]
                templates[shape] = f"({', '.join(parts)}, '{batch}')", order
            template, order = templates[shape]
            yield template, [values[at] for at in order]

def parse_json(text: str) -> object:
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
        raise Problem(f"not JSON: {excerpt(str(error), 200)}",
                      """quote it for the shell: enqueue '{"command":"echo hello"}'""",
                      USAGE) from None

def spool_lines(file: Iterable[bytes], as_json: bool, defaults: Job_Values) -> Spool:
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
                spool.add({**plain, "id": defaults.get("id") or new_id(),
                           "command": kind.read(line, "command")})
        except UnicodeDecodeError:
            raise Problem(f"line {position}: not UTF-8; nothing was enqueued",
                          status=USAGE) from None
        except Problem as problem:
            raise Problem(f"line {position}: {problem.what}; nothing was enqueued",
                          problem.hint, USAGE) from None
    return spool

def ahead(items: Iterator[str]) -> Iterator[str]:
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
        made = insertions(cursor, database.packet_bytes, head, rows, tail)
        for one in ahead(made) if len(spool) > 1000 else made:
            cursor.execute(one)
        if staged:
            cursor.execute("INSERT INTO config (`key`, value) VALUES (%s, %s) "
                           "ON DUPLICATE KEY UPDATE value = VALUES(value)",
                           (STAGED + batch, moment))
        if spool.linked:
            _link(cursor, spool, batch)
        return dict(_holders(cursor, spool)) if if_absent else {}
    def verify(cursor: Cursor) -> dict[str, str] | None:
        ours = "SELECT seq FROM jobs WHERE id = %s AND batch = %s FOR UPDATE"
        return {} if cursor.value(ours, spool.first_id, batch) else None
    try:
        held = database.transact(work, None if if_absent else verify)
    except Unreachable as problem:
        if problem.sent:
            also = f" and {len(spool) - 1} more" if len(spool) > 1 else ""
            problem.hint = (f"unknown whether accepted: id {spool.first_id}{also}; "
                            "repeat with --if-absent")
        raise
    except RowRefused as refused:
        raise _explain_refusal(database, refused, spool) from None
    with contextlib.suppress(Problem):  # it is accepted: else the workers do the rest
        released = len(staged)
        while released:
            released = database.transact(
                lambda cursor: release_staged(cursor, STAGED + batch, moment))
    return held

def pages(items: Iterable[T], size: int = 1000) -> Iterator[list[T]]:
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])

def _holders(cursor: Cursor, spool: Spool) -> Iterator[tuple[str, str]]:
    """For each job whose unique key another job has: its id, and the other's."""
    for page in pages((str(job["unique"]), str(job["id"]))
                      for job in spool if "unique" in job):
        keys = dict(page)
        found = dict(cursor.rows(lambda *row: row, "SELECT live_key, id FROM jobs "
                                 "WHERE live_key IN %s", [*keys]))
        yield from ((job_id, holder) for key, job_id in page
                    if (holder := found.get(key, job_id)) != job_id)

def release_staged(cursor: Cursor, key: str, moment: str) -> int:
    """Make some jobs of a staged batch pending; how many, 0 once it is done with.

    A huge enqueue would lie in the claims' way for as long as it is not committed. So
    its rows are blocked, where no claim comes by, and one config row tells of them.
    """
    blocked = "FROM jobs FORCE INDEX (jobs_due) WHERE state = 'blocked' AND next_run_at"
    seqs = cursor.rows(int, f"SELECT seq {blocked} = %s ORDER BY seq "
                       f"LIMIT {RELEASED_AT_ONCE} FOR UPDATE", moment)
    if seqs:
        return cursor.execute(
            "UPDATE jobs FORCE INDEX (PRIMARY) SET state = 'pending', "
            "next_run_at = created_at WHERE state = 'blocked' AND seq IN %s", [seqs])
    return 0 * cursor.execute("DELETE FROM config WHERE `key` = %s", (key,))

def _explain_refusal(database: Database, refused: RowRefused, spool: Spool) -> Problem:
    taken = re.search(r"Duplicate entry '(.*)' for key", refused.text)
    if refused.code != 1062 or not taken:
        return Problem(f"the server refused a job: {refused.text}",
                       "nothing was enqueued", USAGE)
    hint = "nothing was enqueued; --if-absent passes over ids and keys in use"
    if "jobs_live_key" in refused.text:
        holders = dict(database.read(lambda cursor: list(_holders(cursor, spool))))
        for job in spool:
            if job["id"] in holders:
                return Problem(f"key {job['unique']} is held by job "
                               f"{holders[str(job['id'])]}", hint)
        return Problem(f"key {taken[1]} stands twice in the input", hint)
    states = database.rows(
        "a {} job has it".format, "SELECT state FROM jobs WHERE id = %s", taken[1])
    return Problem(f"id {taken[1]} is taken: "
                   f"{states[0] if states else 'it stands twice in the input'}", hint)

def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []

# -- jobs that wait for others

def _link(cursor: Cursor, spool: Spool, batch: str) -> None:
    """Enter what the spool's jobs wait for, and decide which of them need not.

    A parent is an older row, so no cycle can be made. Its row is locked, and marked,
    from here to the COMMIT: whoever settles it comes before that, or sees the mark.
    """
    edges = ((str(job["id"]), str(parent), needs) for job in spool
             for key, needs in NEEDS.items() for parent in as_list(job.get(key)))
    for page in pages(edges):
        ours, old = (dict(cursor.rows(
            lambda *row: row, "SELECT id, seq FROM jobs FORCE INDEX (jobs_id) "
            f"WHERE {only} id IN %s ORDER BY seq FOR UPDATE",
            [edge[end] for edge in page]))
            for end, only in enumerate((f"batch = '{batch}' AND", "")))
        rows = []
        for child, parent, needs in page:
            if child in ours:  # else it was there already
                if old.get(parent, ours[child]) >= ours[child]:
                    raise Problem(f"job {child} cannot wait for {parent}: there is no "
                                  "such job before it", "a finished one may have "
                                  "been purged; nothing was enqueued", USAGE)
                rows.append((old[parent], ours[child], needs))
        if rows:
            cursor.defer("UPDATE jobs FORCE INDEX (PRIMARY) SET has_children = 1 "
                         "WHERE seq IN %s", [[row[0] for row in rows]])
            cursor.defer("INSERT INTO dependencies (parent, child, needs) VALUES "
                         f"{placeholders(rows)} ON DUPLICATE KEY UPDATE "
                         "needs = VALUES(needs)", rows)
    for ids in pages(str(job["id"]) for job in spool if any(map(job.get, NEEDS))):
        release_children(cursor, decide_blocked(cursor, cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_id) WHERE batch = %s AND "
            "id IN %s", batch, ids)))

MET = """(parents.state = 'completed' OR (needs = 'ended' AND
          parents.state IN ('dead', 'cancelled')))"""
HOPELESS = "(needs = 'completed' AND parents.state IN ('dead', 'cancelled'))"
PARENTS = "dependencies JOIN jobs AS parents ON parents.seq = parent"

def release_children(cursor: Cursor, ended: Collection[int]) -> None:
    """Have what waits for these ended jobs run or die with them, down the chain."""
    while ended:
        children = cursor.rows(int, "SELECT DISTINCT child FROM dependencies WHERE "
                               f"parent IN %s ORDER BY child {cursor.share}", ended)
        ended = [seq for page in pages(children)
                 for seq in decide_blocked(cursor, page)]

def decide_blocked(cursor: Cursor, seqs: Sequence[int]) -> list[int]:
    """Let go blocked jobs that wait for nothing more, bury the hopeless; the latter.

    They are written before their parents are read: so of two who settle two parents at
    once, one waits here for the other and then sees what it did.
    """
    if not seqs:
        return []
    update = ("UPDATE jobs FORCE INDEX (PRIMARY) SET {} WHERE state = 'blocked' AND "
              "seq IN %s")
    cursor.defer(update.format("waits_for = waits_for + 1"), [seqs])
    found = cursor.rows(
        lambda *row: row, f"SELECT child, SUM(NOT {MET}), SUM({HOPELESS}), CONCAT("
        f"'waited for ', MIN(IF({HOPELESS}, CONCAT(parents.id, ', which was ', "
        f"parents.state), NULL))) FROM {PARENTS} JOIN jobs ON jobs.seq = child "
        f"WHERE jobs.state = 'blocked' AND child IN %s GROUP BY child {cursor.share}",
        seqs)
    free = [seq for seq, unmet, _, _ in found if not unmet]
    dead = {seq: why for seq, _, hopeless, why in found if hopeless}
    if free:
        cursor.defer(update.format(
            "waits_for = 0, state = IF(next_run_at > UTC_TIMESTAMP(6), 'scheduled', "
            "'pending')"), [free])
    if dead:
        cursor.defer(update.format(
            "state = 'dead', reason = 'dependency', finished_at = UTC_TIMESTAMP(6), "
            "next_run_at = LEAST(next_run_at, UTC_TIMESTAMP(6))"), [[*dead]])
        bury(cursor, dead)
    return [*dead]

def bury(cursor: Cursor, dead: Mapping[int, str | None]) -> None:
    """Write the dead letters of jobs that have just died, each with its last line, and
    enqueue their on_failure commands, for the same queue, directory and variables."""
    cursor.defer(
        f"""
        INSERT INTO dlq (seq, id, exit_code, reason, last_line)
        SELECT seq, id, exit_code, reason, ELT(FIELD(seq, {placeholders(dead)}),
               {placeholders(dead)}) FROM jobs FORCE INDEX (PRIMARY) WHERE seq IN %s
            ON DUPLICATE KEY UPDATE died_at = UTC_TIMESTAMP(6), seq = VALUES(seq),
               id = VALUES(id), exit_code = VALUES(exit_code), reason = VALUES(reason),
               last_line = VALUES(last_line)
        """, [*dead, *dead.values(), [*dead]])
    for signature, command, cwd, env, hook, *about in cursor.rows(
            lambda *row: row, "SELECT signature, command, cwd, env, on_failure, "
            "jobs.id, queue, attempts, dlq.reason, dlq.exit_code, last_line FROM jobs "
            "JOIN dlq USING (seq) WHERE seq IN %s AND LENGTH(on_failure) BETWEEN 1 AND "
            f"{COMMAND_BYTES_MAX}", [*dead]):
        if not is_signed(signature, about[0], command, cwd, env, hook):
            continue
        told = {f"QUEUECTL_PARENT_{name}": str(value) for name, value in zip(
            ("ID", "QUEUE", "ATTEMPTS", "REASON", "EXIT_CODE", "LAST_LINE"), about)
            if value is not None}
        row = (new_id(), hook, cwd, json.dumps({**env_of(env), **told}))
        signed = sign(*row, None) if signing_key() else None
        cursor.defer("INSERT INTO jobs (id, command, cwd, env, queue, signature) "
                     "VALUES %s", [(*row, about[1], signed)])

def env_of(text: object) -> dict[str, str]:
    """The variables that a row's env names; none where it cannot be read."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(str(text or "{}"))
        if isinstance(found, dict):
            return {name: str(value) for name, value in found.items()}
    return {}


# ---- claiming ----------------------------------------------------------------
#
# One turn of a worker is one transaction, always in this lock order: beat; settle what
# ended; dead letters; promote what is due; claim. Every UPDATE of a job names the state
# it leaves and, for a run, its token, so a worker that lost a run changes nothing. A
# process starts only for rows that carry the new token after COMMIT: that holds even
# where SKIP LOCKED locks nothing. SKIP LOCKED is for speed.

HISTORY_KEPT = 20
DATETIME_MIN = datetime.datetime(1000, 1, 1)
PURGED_AT_ONCE, PURGE_PAUSE_S = 500, 600.0
PROMOTED_AT_ONCE = 500
RESULT_BYTES_FIRST, RESULT_BYTES_MOST = 256 << 10, 64 << 20
FAST_TURN_S = 0.5
MANY_BYTES = 16 << 10  # a statement of fewer waits for the server, not for the wire
NEIGHBOURS_PROMOTION_S, SLOW_CLAIM_S = 0.05, 0.02
DETAIL_MAX, LAST_LINE_MAX = 1024, 255
Ended = Tuple[Held, End]

class Job(NamedTuple):
    """A claimed job: what to run, and how."""
    held: Held
    command: str
    queue: str
    cwd: str | None
    env: str | None
    on_failure: str | None
    signature: str | None
    timeout_s: float
    timeout_name: str  # which setting gave the time limit

@dataclass(frozen=True)
class Ask:
    """What a worker wants of one turn."""
    ended: Sequence[Ended] = ()
    flushes: Sequence[Ended] = ()  # output so far of runs that go on
    running: Collection[tuple[int, str]] = ()  # (seq, token) of the runs that go on
    free: int = 0
    look: bool = False  # for cancellations, settings, due jobs and new queues
    judge: bool = False  # and beat in any case, and look after the other workers
    drain: bool = False
    state: str = "running"

@dataclass
class Look:
    """What a worker sees when it looks around."""
    config: dict[str, str]
    runs: dict[tuple[int, str], bool]  # ours, and whether each is to be ended
    others_cancelled: bool  # a run of another worker is to be ended
    waiting: bool  # there are pending jobs
    due_s: float  # until the next delayed or failed job is due
    beats: dict[str, tuple[int, float]]  # of the others, each with its lease
    strays: list[str | None]  # workers with runs and no row
    forgotten: list[str]  # workers lost a day ago
    staged: list[str]  # the keys in `config` of batches still to be released
    drained: bool = False

class Change(NamedTuple):
    """One ended run and what it makes of its job: a row of the plan."""
    held: Held
    end: End
    verdict: Verdict

    @property
    def to(self) -> State:
        return MOVES[self.verdict.move].to

@dataclass(frozen=True)
class Turn:
    """What came of a turn."""
    alive: bool = True  # False: we were declared lost, and nothing else was done
    jobs: Sequence[Job] = ()
    look: Look | None = None
    due_s: float = math.inf  # until the next delayed or failed job is due
    changes: Sequence[Change] = ()  # what became of the jobs that ended
    notes: Sequence[str] = ()  # for the log
    unsettled: Sequence[Ended] = ()  # what one turn could not carry: for the next
    unflushed: Collection[tuple[int, str]] = ()  # (seq, token) of the same

class Identity(NamedTuple):
    """One worker process, as its row describes it."""
    id: str
    host: str
    pid: int
    supervisor: int
    process: str  # boot, PID namespace and start time: see process_identity
    slots: int
    queues: tuple[str, ...]  # none: all

class Load(NamedTuple):
    """What one transaction carries of a turn's results, and what it leaves."""
    ended: Sequence[Ended]
    flushes: Sequence[Ended]
    unsettled: Sequence[Ended]
    unflushed: Collection[tuple[int, str]]

class Desk:
    """A worker's dealings with the queue."""
    def __init__(self, database: Database, me: Identity, use_skip_locked: bool) -> None:
        self.database, self.me = database, me
        self.settings = Settings()
        self._use_skip_locked = use_skip_locked
        self._queues: list[str] = list(me.queues)
        self._token = ""  # of what this turn claims
        self._marked: list[int] = []  # seqs that it has claimed so far
        self._settled: dict[int, str] = {}  # and what it has settled: seq and token
        self._changes: list[Change] = []
        self._load = Load((), (), (), ())
        self._result_bytes = RESULT_BYTES_FIRST  # that a turn may carry
        self._reached: dict[str, tuple[int, int]] = {}  # where each queue's claim ended
        self._limits: dict[str, int | None] = {}  # of the queues that have one
        self._state = ""  # as our row says
        self.retains, self._purge_at = False, 0.0  # whether we delete what is old
        self._decide_at, self._decided = 0.0, (DATETIME_MIN, 0)
        self._judge = Judge()
        # Ends what the dead processes of this host left running, before it runs again.
        self.end_orphans: Callable[[], object] = list

    # -- one turn

    def turn(self, ask: Ask) -> Turn:
        """Look around where asked, settle what ended, claim up to `free` jobs."""
        self._token = secrets.token_hex(8)
        # Each try of anything shows that we live: a long wait takes its own beat back.
        self.database.between_tries = lambda cursor: self._beat(cursor, ask)
        look = None
        if ask.look:
            look = self.database.read(lambda cursor: self._look(cursor, ask))
        started = time.monotonic()
        try:
            done = self._work(ask, look)
        except RowRefused as refused:
            return self._turn_without(ask, refused)
        if not done.alive:
            return done
        if done.unsettled and time.monotonic() - started < FAST_TURN_S:
            self._result_bytes = min(2 * self._result_bytes, RESULT_BYTES_MOST)
        notes = []
        if look:
            self._hand_back_unrun(ask, look)
            if ask.drain and not (ask.running or done.jobs):
                look.drained = self.database.read(self._drained)
            if ask.judge:
                notes = self._look_after_others(look)
            if self.retains and time.monotonic() >= self._purge_at:
                self._purge_old()
            if self.retains and time.monotonic() >= self._decide_at:
                self._decide_again()
        return dataclasses.replace(done, look=look, notes=notes)

    def _work(self, ask: Ask, look: Look | None) -> Turn:
        """One transaction; a beat alone is one statement, and often not even due."""
        if not look or ask.ended or ask.flushes or look.due_s <= 0 or look.staged \
                or (ask.free and look.waiting):
            return self.database.transact(lambda cursor: self._turn(cursor, ask, look),
                                          self._look_back)
        if ask.judge or ask.state != self._state:
            alive = self.database.read(lambda cursor: self._beat(cursor, ask))
            return Turn(alive=alive, due_s=look.due_s)
        return Turn(due_s=look.due_s)

    def _beat(self, cursor: Cursor, ask: Ask) -> bool:
        """Raise our beat, and learn the limits; False if we were declared lost."""
        cursor.defer(
            "UPDATE workers SET beat = beat + 1, heartbeat_at = UTC_TIMESTAMP(6), "
            "state = %s, lease = %s WHERE id = %s AND lost_at IS NULL",
            (ask.state, self.settings.lease_s, self.me.id))
        self._limits = dict(cursor.rows(
            lambda *row: row, f"SELECT name, {ALLOWED} FROM queues "
            "WHERE paused_at IS NOT NULL OR max_running IS NOT NULL"))
        self._state = ask.state
        return bool(cursor.counts[-1])

    def _turn(self, cursor: Transaction, ask: Ask, look: Look | None) -> Turn:
        self._marked, self._settled, self._changes = [], {}, []
        if not self._beat(cursor, ask):
            return Turn(alive=False)
        load = self._load = self._fitting(cursor.tries, ask.ended, ask.flushes)
        changes = self._changes = self._settle(cursor, load.ended, load.flushes)
        due_s = min((change.verdict.wait_s for change in changes
                     if change.to is State.FAILED), default=math.inf)
        if look:
            due_s = min(due_s, look.due_s if look.due_s > 0 else self._promote(cursor))
            for key in look.staged:
                release_staged(cursor, key, look.config[key])
                due_s = 0.0
        free = ask.free - len(load.unsettled)  # else they would grow without an end
        if free > 0:
            self._claim(cursor, dataclasses.replace(ask, free=free))
        if self._marked:
            cursor.commit_with_next()
        return Turn(jobs=self._read_claimed(cursor), due_s=due_s, changes=changes,
                    unsettled=load.unsettled, unflushed=load.unflushed)

    def _fitting(self, tries: Tries, ended: Sequence[Ended],
                 flushes: Sequence[Ended] = ()) -> Load:
        """What one transaction is to carry of these results, at least one of them.

        On a slow wire a try times out; then half as much is sent. A single result that
        is too much even so goes without its output: but only once our heartbeat came
        through right before it, else it is the server that hangs, not the wire.
        """
        last, too_slow = self._load.ended, tries.timed_out_bytes > MANY_BYTES
        if too_slow and len(last) > 1:
            self._result_bytes = sum(len(end.output) for _, end in last) // 2
        left, taken = self._result_bytes, []
        for held, end in ended:
            if left > 0:
                taken.append((held, end))
                left -= len(end.output)
        if too_slow and len(last) == 1 and tries.count > 1:
            held, end = taken[0]
            taken[0] = held, without_output(end, "the database is too slow to reach")
        shown: list[Ended] = []
        unflushed: list[tuple[int, str]] = []
        for held, end in flushes:
            left -= len(end.output)
            if left > 0 or not (taken or shown or too_slow):
                shown.append((held, end))
            else:
                unflushed.append((held.seq, held.token))
        return Load(taken, shown, ended[len(taken):], unflushed)

    def _look_back(self, cursor: Transaction) -> Turn | None:
        """What came of a turn whose COMMIT was not answered; None if it does not stand.

        Locking reads: a plain one was seen to miss a commit half a second later. Where
        a run that it settled still has its token, it does not stand; where a row that
        it claimed has ours, it does. A turn that did neither is done again.
        """
        seqs = sorted({*self._marked, *self._settled})
        if not seqs:
            return None
        cursor.execute("SELECT seq, token FROM jobs FORCE INDEX (PRIMARY) "
                       "WHERE seq IN %s FOR UPDATE", [seqs])
        found = dict(cursor.fetchall())
        claimed = any(found.get(seq) == self._token for seq in self._marked)
        unsettled = any(found.get(seq) == held for seq, held in self._settled.items())
        if not claimed and (unsettled or self._marked):
            return None
        return Turn(jobs=self._read_claimed(cursor), due_s=0.0, changes=self._changes,
                    unsettled=self._load.unsettled, unflushed=self._load.unflushed)

    def _turn_without(self, ask: Ask, refused: RowRefused) -> Turn:
        """One bad row never blocks the rest: settle each alone, it without output."""
        notes = []
        if not (ask.ended or ask.flushes):
            raise refused  # no result is to blame
        if ask.ended:
            notes.append(f"a result was refused by the database: {refused}")
        for held, end in ask.ended:
            try:
                self._settle_now([(held, end)])
            except RowRefused as error:
                self._settle_now([(held, without_output(end, str(error)))])
                notes.append(f"job {held.id}: its output could not be stored: {error}")
        rest = self.turn(dataclasses.replace(ask, ended=(), flushes=()))
        return dataclasses.replace(rest, notes=notes)

    # -- settle

    def _settle_now(self, ended: Sequence[Ended]) -> None:
        """Settle these runs, in as many transactions as it takes."""
        def work(cursor: Transaction) -> None:
            self._load = self._fitting(cursor.tries, left)
            self._settle(cursor, self._load.ended)
        left = ended
        while left:
            self.database.transact(work)
            left = self._load.unsettled

    def _settle(self, cursor: Cursor, ended: Sequence[Ended],
                flushes: Sequence[Ended] = ()) -> list[Change]:
        """Settle the runs that are still ours, and show the output so far of those that
        go on; the others are left alone."""
        if not (ended or flushes):
            return []
        ours = self._lock_runs(cursor, [held.seq for held, _ in (*ended, *flushes)])
        self._write_history(cursor, [(held, end) for held, end in flushes
                                     if (held.seq, held.token) in ours])
        changes = [self._decide(held, end, *ours[held.seq, held.token])
                   for held, end in ended if (held.seq, held.token) in ours]
        self._settled = {change.held.seq: change.held.token for change in changes}
        self._carry_out(cursor, changes)
        return changes

    @staticmethod
    def _lock_runs(cursor: Cursor, seqs: Sequence[int]) -> \
            dict[tuple[int, str], tuple[bool, bool]]:
        """By (seq, token), those that run: whether cancelled, and waited for."""
        return dict(cursor.rows(
            lambda seq, token, asked, waited: ((seq, token), (bool(asked), waited)),
            "SELECT seq, token, cancel_requested_at IS NOT NULL, has_children "
            "FROM jobs FORCE INDEX (PRIMARY) WHERE seq IN %s "
            "AND state = 'processing' ORDER BY seq FOR UPDATE", seqs))

    def _decide(self, held: Held, end: End, cancelled: bool, waited: bool) -> Change:
        held = dataclasses.replace(held, cancel_requested=cancelled,
                                   has_children=waited)
        verdict = judge(held, end, self.settings, random.random())
        if cancelled:
            end = dataclasses.replace(end, reason=Reason.CANCELLED)
        return Change(held, end, verdict)

    def _carry_out(self, cursor: Cursor, changes: Sequence[Change]) -> None:
        """Write a plan; jobs alike in it share a statement."""
        groups: dict[tuple[object, ...], list[Change]] = {}
        for change in changes:
            key = (change.verdict, change.end.exit_code, change.end.reason)
            groups.setdefault(key, []).append(change)
        for group in groups.values():
            self._move_jobs(cursor, group)
        self._write_history(cursor, [change[:2] for change in changes])
        for held, _, _ in changes:
            if held.run > HISTORY_KEPT:
                cursor.defer("DELETE FROM runs WHERE job = %s AND run <= %s",
                             (held.seq, held.run - HISTORY_KEPT))
        dead = {held.seq: last_line(end) for held, end, verdict in changes
                if MOVES[verdict.move].to is State.DEAD}
        if dead:
            bury(cursor, dead)
        release_children(cursor, [change.held.seq for change in changes
                                  if change.held.has_children and change.to in ENDED])

    @staticmethod
    def _move_jobs(cursor: Cursor, group: Sequence[Change]) -> None:
        (_, end, verdict), to = group[0], group[0].to
        timing = ""
        if to in (State.PENDING, State.FAILED):
            timing = "next_run_at = UTC_TIMESTAMP(6) + INTERVAL %(wait)s MICROSECOND,"
        seqs = [change.held.seq for change in group]
        durations = ", ".join("NULL" if change.end.duration_s is None
                              else f"{change.end.duration_s:.6f}" for change in group)
        cursor.defer(
            f"""
            UPDATE jobs FORCE INDEX (PRIMARY)
               SET state = %(to)s, {timing}
                   finished_at = UTC_TIMESTAMP(6),
                   duration = ELT(FIELD(seq, {', '.join(map(str, seqs))}), {durations}),
                   attempts = attempts - %(given_back)s,
                   attempts_max = COALESCE(%(grant)s, attempts_max),
                   losses = %(losses)s, exit_code = %(exit_code)s,
                   reason = %(reason)s, token = NULL, cancel_requested_at = NULL
             WHERE state = 'processing' AND seq IN %(seqs)s
               AND COALESCE(token, '') IN %(tokens)s
            """,
            {"to": to, "wait": round(verdict.wait_s * 1e6), "grant": verdict.grant,
             "losses": verdict.losses, "exit_code": end.exit_code, "reason": end.reason,
             "given_back": int(verdict.move == "hand back"), "seqs": seqs,
             "tokens": list({change.held.token for change in group})})

    def _write_history(self, cursor: Cursor, found: Iterable[tuple[Held, End]]) -> None:
        """A row of each run that ended; of one that goes on, its output so far."""
        row = "(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, {})"
        made = insertions(
            cursor, self.database.packet_bytes,
            "INSERT INTO runs (job, run, attempt, worker, started_at, duration, "
            "exit_code, reason, detail, output, output_bytes, finished_at) VALUES",
            [(row.format("UTC_TIMESTAMP(6)" if end.reason else "NULL"),
              (held.seq, held.run, held.attempts, held.worker, held.started_at,
               end.duration_s, end.exit_code, end.reason,
               end.detail.encode(errors="backslashreplace").decode()[:DETAIL_MAX]
               or None, end.output or None, end.output_bytes))
             for held, end in found],
            """
            ON DUPLICATE KEY UPDATE finished_at = VALUES(finished_at),
                duration = VALUES(duration), exit_code = VALUES(exit_code),
                reason = VALUES(reason), detail = VALUES(detail),
                output = COALESCE(VALUES(output), output),
                output_bytes = GREATEST(VALUES(output_bytes), output_bytes)
            """)
        for one in made:
            cursor.defer(one)

    # -- promote and claim

    def _promote(self, cursor: Cursor) -> float:
        """Make due jobs pending; how soon to look for more of them."""
        promoted = 0
        for state in (State.SCHEDULED, State.FAILED):
            seqs = cursor.rows(
                int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) "
                "WHERE state = %s AND next_run_at <= UTC_TIMESTAMP(6) "
                f"ORDER BY next_run_at LIMIT {PROMOTED_AT_ONCE} "
                f"FOR UPDATE {self.database.skip_locked(cursor)}", state)
            promoted += len(seqs)
            if seqs:
                cursor.defer("UPDATE jobs FORCE INDEX (PRIMARY) SET state = %s WHERE "
                             "state = %s AND seq IN %s",
                             (MOVES["release"].to, state, seqs))
        # A due row that we did not get is in a neighbour's promotion: no hurry for us.
        return 0.0 if promoted else NEIGHBOURS_PROMOTION_S

    def _claim(self, cursor: Cursor, ask: Ask) -> None:
        """Mark up to `free` jobs with the token, shared over the queues with some."""
        if not self.me.queues and (ask.look or not self._queues):
            self._queues = queues_with(cursor, State.PENDING)
        if not self._queues:
            return
        self._queues.append(self._queues.pop(0))
        if ask.look or not (ask.running or ask.ended):
            self._reached.clear()
        room = self._room(cursor)
        open_ones = [name for name in self._queues if room.get(name) != 0]
        share, idle = -(-ask.free // (len(open_ones) or 1)), not ask.running
        for at_most in sorted({share, ask.free}):  # to each its share, then the rest
            for name in open_ones:
                before = len(self._marked)
                wanted = min(at_most, ask.free - before, room.get(name, ask.free))
                if wanted > 0 and not self._take(cursor, name, wanted, idle):
                    return
                if name in room:
                    room[name] -= len(self._marked) - before

    def _room(self, cursor: Cursor) -> dict[str, int]:
        """How many more jobs of each limited queue may run, by counting what runs.

        Where there seems to be room, the queue's row is written, then counted again: of
        two who would fill the last slot, one waits here, and sees what the other took.
        """
        room = {name: 0 for name in self._queues if name in self._limits}
        names = [name for name in room if self._limits[name] != 0]
        for sure in (False, True) if names else ():
            if sure:
                cursor.defer("UPDATE queues SET touched = touched + 1 "
                             "WHERE name IN %s ORDER BY name", [names])
            found = cursor.rows(
                lambda name, free: (name, free), f"SELECT name, {ALLOWED} - (SELECT "
                "COUNT(*) FROM jobs FORCE INDEX (jobs_claim) WHERE queue = name AND "
                f"state = 'processing' {cursor.share}) FROM queues WHERE name IN %s "
                f"{cursor.share}", names)
            room.update((name, sys.maxsize if free is None else max(0, free))
                        for name, free in found)
            names = [name for name, _ in found if room[name]]
            if not names:
                break
        return room

    def _take(self, cursor: Cursor, name: str, wanted: int, idle: bool) -> bool:
        """Mark jobs of one queue; False when nothing beside them may be claimed.

        A job that must run alone is taken only by a process with no other run; one that
        has others takes nothing behind it, so that it comes to that.
        """
        if not self.database.skip_locked(cursor) or not self._use_skip_locked:
            return self._take_by_update(cursor, name, wanted, idle)
        # Under a long snapshot (a mysqldump) the index keeps the entries of claimed
        # rows, and a claim walks over them all. Then start where the last one ended,
        # until the next look; that finds what has a higher priority, too.
        reached, only = self._reached.get(name), ""
        if reached:
            order, seq = reached
            later = f"claim_order = {order} AND seq > {seq}"
            only = f"AND (claim_order > {order} OR ({later}))"
        started = time.monotonic()
        cursor.execute(
            "SELECT seq, losses, claim_order FROM jobs FORCE INDEX (jobs_claim) "
            f"WHERE state = 'pending' AND queue = %s {only} "
            "ORDER BY claim_order, seq LIMIT %s FOR UPDATE SKIP LOCKED", (name, wanted))
        slow = bool(reached) or time.monotonic() - started > SLOW_CLAIM_S
        seqs: list[int] = []
        alone = False
        for seq, losses, order in cursor.fetchall():
            if slow:
                self._reached[name] = (order, seq)
            alone = losses >= ALONE_AFTER_LOSSES
            if not alone or (idle and not seqs and not self._marked):
                seqs.append(seq)
            if alone:
                break
        if seqs:
            cursor.defer(f"UPDATE jobs FORCE INDEX (PRIMARY) {CLAIM_ASSIGNMENTS} WHERE "
                         "state = 'pending' AND seq IN %s",
                         (self._token, self.me.id, seqs))
            self._marked += seqs
        return not alone

    def _take_by_update(self, cursor: Cursor, name: str, wanted: int,
                        idle: bool) -> bool:
        """The claim without SKIP LOCKED: one guarded UPDATE, then a read by token.

        A job that must run alone waits until a process is idle and nothing else waits.
        """
        kinds = [("<", wanted)]
        if idle and not self._marked:
            kinds.append((">=", 1))
        for comparison, limit in kinds:
            if cursor.execute(
                    f"UPDATE jobs FORCE INDEX (jobs_claim) {CLAIM_ASSIGNMENTS} "
                    f"WHERE state = 'pending' AND queue = %s AND losses {comparison} "
                    f"{ALONE_AFTER_LOSSES} ORDER BY claim_order, seq LIMIT {limit}",
                    (self._token, self.me.id, name)):
                break
        cursor.execute("SELECT seq, losses FROM jobs FORCE INDEX (jobs_due) "
                       "WHERE state = 'processing' AND token = %s", (self._token,))
        marked: dict[int, int] = dict(cursor.fetchall())
        self._marked = list(marked)
        return all(losses < ALONE_AFTER_LOSSES for losses in marked.values())

    def _read_claimed(self, cursor: Cursor) -> list[Job]:
        """The jobs that carry our token after COMMIT: only these may start."""
        if not self._marked:
            return []
        return self._read_jobs(cursor, "PRIMARY", "seq IN %s AND token = %s "
                               "ORDER BY claim_order, seq", [self._marked, self._token])

    def _read_jobs(self, cursor: Cursor, index: str, only: str,
                   values: Sequence[object]) -> list[Job]:
        """The processing jobs that `only` names, NULLs filled from the settings."""
        settings = self.settings
        def permanent(codes: str | None) -> frozenset[int]:
            with contextlib.suppress(ValueError):
                return settings.permanent_exit_codes if codes is None \
                    else read_codes(codes)
            return settings.permanent_exit_codes
        return cursor.rows(
            lambda *row: Job(Held(*[*row[:13], permanent(row[13])]), *row[14:]),
            f"""
            SELECT seq, id, COALESCE(token, ''), runs, attempts,
                   COALESCE(attempts_max, max_retries + 1, {settings.max_retries + 1}),
                   losses, GREATEST(1, COALESCE(backoff_base, {settings.backoff_base})),
                   COALESCE(on_lost, '{settings.on_lost}'),
                   cancel_requested_at IS NOT NULL, has_children, COALESCE(worker, ''),
                   started_at, permanent_exit_codes, command, queue, cwd, env,
                   on_failure, signature,
                   COALESCE(timeout, {settings.job_timeout}),
                   IF(timeout IS NULL, 'setting job_timeout', 'the job''s timeout')
              FROM jobs FORCE INDEX ({index}) WHERE state = 'processing' AND {only}
            """, *values)

    # -- look around

    def _look(self, cursor: Cursor, ask: Ask) -> Look:
        """All that an idle worker wants to know, by one statement."""
        served = [self.me.queues] * bool(self.me.queues)
        values = [self.me.id, self.me.id, *served, *[self.me.id] * ask.judge]
        cursor.execute(LOOK.format(only="AND queue IN %s" * len(served))
                       + LOOK_AT_OTHERS * ask.judge, values)
        seen: dict[str, list[list[str]]] = collections.defaultdict(list)
        for what, *found in cursor.fetchall():
            seen[what].append(found)
        return Look(
            config={name: value for name, value, _ in seen["config"]},
            runs={(int(seq), token): asked == "1" for token, seq, asked in seen["run"]},
            others_cancelled=bool(seen["cancelled"]), waiting=bool(seen["waiting"]),
            due_s=min((int(us) / 1e6 for _, us, _ in seen["due"]), default=math.inf),
            beats={name: (int(beat), float(lease))
                   for name, beat, lease in seen["beat"]},
            strays=[name for name, _, _ in seen["stray"]],
            forgotten=[name for name, _, _ in seen["forgotten"]],
            staged=[key for key, _, _ in seen["config"] if key.startswith(STAGED)])

    def _hand_back_unrun(self, ask: Ask, look: Look) -> None:
        """Hand back rows under our name that we do not run: a read-back failed."""
        known = {*ask.running, *((held.seq, held.token) for held, _ in ask.ended)}
        unrun = [seq for seq, _ in look.runs.keys() - known]
        if unrun:
            jobs = self.database.read(lambda cursor: self._read_jobs(
                cursor, "PRIMARY", "worker = %s AND seq IN %s", (self.me.id, unrun)))
            self._settle_now([(job.held, End(Reason.HANDED_BACK)) for job in jobs])

    def _drained(self, cursor: Cursor) -> bool:
        """Whether our queues, paused ones aside, hold nothing that may still run."""
        paused = cursor.rows(str, "SELECT name FROM queues WHERE paused_at > 0")
        names = {name for state in (State.PENDING, State.FAILED, State.PROCESSING)
                 for name in queues_with(cursor, state)} - {*paused}
        if names & {*(self.me.queues or names)}:
            return False
        served = [self.me.queues] * bool(self.me.queues)
        there = "AND {}.queue IN %s" * len(served)
        return not cursor.rows(
            int, f"SELECT 1 FROM {PARENTS} JOIN jobs ON jobs.seq = child WHERE "
            f"jobs.state = 'blocked' {there.format('jobs')} AND parents.state IN "
            f"('scheduled', 'blocked') {there.format('parents')} LIMIT 1", *served * 2)

    def _purge_old(self) -> None:
        """Delete a batch of what retain_completed and the like let go."""
        settings = self.settings
        kept_s = {State.COMPLETED: settings.retain_completed, State.DEAD:
                  settings.retain_dead, State.CANCELLED: settings.retain_cancelled}
        age = "UTC_TIMESTAMP(6) - INTERVAL {} SECOND"
        old = [purge(self.database, state, age.format(age_s))
               for state, age_s in kept_s.items() if age_s] or [0]
        often = min([PURGE_PAUSE_S, *(one / 10 for one in kept_s.values() if one)])
        pause = max(often, 1.0) if max(old) < PURGED_AT_ONCE else 0.0
        self._purge_at = time.monotonic() + pause

    def _decide_again(self) -> None:
        """Decide some blocked jobs once more: the net, should a wake-up be lost."""
        after, seq = self._decided
        found = self.database.rows(
            lambda *row: row, "SELECT next_run_at, seq FROM jobs FORCE INDEX (jobs_due)"
            " WHERE state = 'blocked' AND next_run_at BETWEEN %s AND '9000-01-01' AND "
            "(next_run_at > %s OR seq > %s) ORDER BY next_run_at, seq LIMIT 500",
            after, after, seq)
        self._decided, pause = (DATETIME_MIN, 0), 10 * self.settings.heartbeat
        if len(found) == 500:
            self._decided, pause = found[-1], 0.0
        self._decide_at = time.monotonic() + pause
        if found:
            self.database.transact(lambda cursor: release_children(
                cursor, decide_blocked(cursor, [seq for _, seq in found])))

    # -- the other workers

    def _look_after_others(self, look: Look) -> list[str]:
        """Judge the others by their beats, and take over what has no live worker."""
        notes = []
        beats, heartbeat_s = look.beats, self.settings.heartbeat
        lost = self._judge.observe(time.monotonic(), beats, heartbeat_s)
        if lost:
            self.end_orphans()
        for worker, beat in lost.items():
            taken = self.take_over(worker, beat)
            if taken is not None:
                silence = say_duration(beats[worker][1])
                notes.append(f"worker {worker} is lost, no beat for {silence}; {taken} "
                             "runs taken over")
        for stray in look.strays:
            taken = self.take_over(stray, None)
            if taken:
                notes.append(f"worker {stray} has no live row; {taken} runs taken over")
        for worker in look.forgotten:  # by id: a scan would wait for all in a turn
            self.database.run("DELETE FROM workers WHERE id = %s", worker)
        return notes

    def take_over(self, worker: str | None, beat: int | None) -> int | None:
        """End the runs of a lost worker as lost: how many, or None if it is not lost.

        One transaction locks its row, checks that its beat still is `beat` (None: that
        it has no live row; -1: whatever it is) and marks it lost.
        """
        def work(cursor: Cursor) -> int | None:
            # A judged worker whose row is locked is in a turn: it is not dead.
            judged = beat is not None and beat >= 0
            skip = self.database.skip_locked(cursor) if judged else ""
            found = cursor.value("SELECT beat FROM workers WHERE id <=> %s "
                                 f"AND lost_at IS NULL FOR UPDATE {skip}", worker)
            if beat not in (-1, found):
                return None
            cursor.execute(
                "UPDATE workers SET lost_at = UTC_TIMESTAMP(6), state = 'lost' "
                "WHERE id <=> %s AND lost_at IS NULL", (worker,))
            jobs = self._read_jobs(cursor, "jobs_due", "worker <=> %s FOR UPDATE",
                                   (worker,))
            self._carry_out(cursor, [
                self._decide(job.held, End(Reason.LOST), job.held.cancel_requested,
                             job.held.has_children) for job in jobs])
            return len(jobs)
        return self.database.transact(work)

    def dead_neighbours(self, gone: Callable[[int, str], bool]) -> dict[str, list[str]]:
        """Workers whose process (pid, identity) is `gone`, with their runs' marks."""
        found = self.database.rows(
            lambda worker, pid, process: (worker, gone(pid, process)),
            "SELECT id, pid, process FROM workers WHERE lost_at IS NULL")
        return {worker: self.database.rows(
            lambda token, seq: f"{token}-{seq}",
            "SELECT token, seq FROM jobs FORCE INDEX (jobs_due) "
            "WHERE state = 'processing' AND worker = %s", worker)
            for worker, is_gone in found if is_gone}

    # -- our own row

    def register(self) -> None:
        """Enter this worker; the same row twice is one."""
        me = self.me
        values = (me.id, me.host, me.pid, me.supervisor, me.process, me.slots,
                  ",".join(me.queues) or None, self.settings.lease_s)
        self.database.run(
            "INSERT INTO workers (id, host, pid, supervisor, process, slots, queues, "
            "lease) VALUES %s ON DUPLICATE KEY UPDATE slots = VALUES(slots)", values)

    def retire(self) -> None:
        """Remove this worker's row: it holds nothing any more."""
        self.database.run("DELETE FROM workers WHERE id = %s", self.me.id)

LOOK = """
SELECT 'config', CAST(`key` AS CHAR), CAST(value AS CHAR), NULL FROM config
UNION ALL
SELECT IF(worker = %s, 'run', 'cancelled'), CAST(token AS CHAR), CAST(seq AS CHAR),
       CAST(cancel_requested_at IS NOT NULL AS CHAR)
  FROM jobs FORCE INDEX (jobs_due)
 WHERE state = 'processing' AND (worker = %s OR cancel_requested_at IS NOT NULL)
UNION ALL
(SELECT 'waiting', NULL, NULL, NULL FROM jobs FORCE INDEX (jobs_claim)
  WHERE state = 'pending' {only} LIMIT 1)
UNION ALL
""" + " UNION ALL ".join(f"""
(SELECT 'due', NULL, CAST(TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), next_run_at)
                          AS CHAR), NULL
   FROM jobs FORCE INDEX (jobs_due) WHERE state = '{state}'
  ORDER BY next_run_at LIMIT 1)""" for state in (State.SCHEDULED, State.FAILED))
LOOK_AT_OTHERS = """
UNION ALL
SELECT IF(lost_at IS NULL, 'beat', 'forgotten'), CAST(id AS CHAR), CAST(beat AS CHAR),
       CAST(lease AS CHAR)
  FROM workers
 WHERE id <> %s AND (lost_at IS NULL OR lost_at < UTC_TIMESTAMP(6) - INTERVAL 1 DAY)
UNION ALL
SELECT DISTINCT 'stray', CAST(jobs.worker AS CHAR), NULL, NULL
  FROM jobs FORCE INDEX (jobs_due)
  LEFT JOIN workers ON workers.id = jobs.worker AND lost_at IS NULL
 WHERE jobs.state = 'processing' AND workers.id IS NULL"""
ALLOWED = "IF(paused_at IS NULL, max_running, 0)"  # to run at once; NULL: no limit
CLAIM_ASSIGNMENTS = """
   SET state = 'processing', token = %s, worker = %s, attempts = attempts + 1,
       runs = runs + 1, started_at = UTC_TIMESTAMP(6), finished_at = NULL,
       duration = NULL, exit_code = NULL, reason = NULL, cancel_requested_at = NULL"""

def ended_before(state: State, age: str) -> str:
    """The condition of jobs that may be purged: of this state, ended before `age`, and
    no blocked job waits for them. next_run_at, indexed, is never later than the end."""
    return (f"state = '{state}' AND next_run_at < {age} AND finished_at < {age} "
            "AND NOT EXISTS (SELECT 1 FROM dependencies JOIN jobs AS waiting "
            "ON waiting.seq = child WHERE parent = jobs.seq "
            "AND waiting.state = 'blocked')")

def purge(database: Database, state: State, age: str) -> int:
    """Delete a batch of jobs with their history and dead letters; how many it were."""
    def work(cursor: Cursor) -> int:
        seqs = cursor.rows(
            int, "SELECT seq FROM jobs FORCE INDEX (jobs_due) WHERE "
            f"{ended_before(state, age)} ORDER BY next_run_at LIMIT {PURGED_AT_ONCE} "
            f"FOR UPDATE {database.skip_locked(cursor)}")
        for table, column in (("runs", "job"), ("dlq", "seq"), ("jobs", "seq"),
                              ("dependencies", "parent"), ("dependencies", "child")):
            if seqs:
                cursor.defer(f"DELETE FROM {table} WHERE {column} IN %s", [seqs])
        return len(seqs)
    return database.transact(work)

def queues_with(cursor: Cursor, state: State) -> list[str]:
    """The queues with jobs in this state, by one index seek each."""
    found = [""]
    while name := cursor.rows(
            str, "SELECT queue FROM jobs FORCE INDEX (jobs_claim) WHERE state = %s "
            "AND queue > %s ORDER BY queue LIMIT 1", state, found[-1]):
        found += name
    return found[1:]

def cut_mark(total: int) -> bytes:
    return b"\n[queuectl: %d bytes in all, the middle is left out]\n" % total

def without_output(end: End, why: str) -> End:
    """The end of a run whose output cannot be stored; its detail says so, in ASCII."""
    detail = f"{end.detail}; output not stored: {why}".lstrip("; ")
    detail = detail.encode("ascii", "replace").decode()
    return dataclasses.replace(end, output=b"", detail=detail)

def last_line(end: End) -> str | None:
    """The last line that says something, for the dead letter."""
    text = end.output[-4096:].decode("utf-8", "replace").strip()
    return (text.split("\n")[-1].strip() or end.detail)[:LAST_LINE_MAX] or None


# ---- looking -----------------------------------------------------------------
#
# What status, list and show ask, and the small writes of a person: cancel, retry a
# dead letter, change a setting. A write names the state it leaves and reads the answer.

SLOW_START_S = 2.0
FOLLOWED_S = 0.3  # how often at least whoever follows a run reads its output
COUNTED_UP_TO, SORTED_UP_TO = 100_000, 10_000
PAGE = 1000
VIEW_COLUMNS = """jobs.seq, jobs.id, command, queue, state, priority, attempts,
       COALESCE(attempts_max, max_retries + 1, {retries} + 1),
       COALESCE(max_retries, {retries}), COALESCE(timeout, {timeout}), next_run_at,
       created_at, started_at, finished_at, duration, jobs.exit_code, jobs.reason,
       worker"""
Moment = Optional[datetime.datetime]

def say_time(moment: object) -> str | None:
    """A DATETIME of the database in ISO 8601, UTC."""
    if not isinstance(moment, datetime.datetime):
        return None
    return moment.isoformat(timespec="milliseconds") + "Z"

def as_json(record: object, *but: str) -> dict[str, Json]:
    return {name: say_time(value) if isinstance(value, datetime.datetime) else value
            for name, value in vars(record).items() if name not in but}

@dataclass(frozen=True)
class View:
    """A job as people see it; settings fill what it leaves open."""
    seq: int
    id: str
    command: str
    queue: str
    state: str
    priority: int
    attempts: int
    allowed: int
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
        return as_json(self, "seq", "allowed")

@dataclass(frozen=True)
class Run:
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

class Whole(NamedTuple):
    """A job with all that is known of it; `output` is its last run's."""
    view: View
    cwd: str | None
    env: dict[str, str]
    after: list[str]
    history: list[Run]
    output: bytes

class Result(NamedTuple):
    """What came of a verb on one job."""
    id: str
    ok: bool
    state: str | None
    error: str | None
    note: str = ""

class Filter(NamedTuple):
    """A condition, and the values that are bound into it."""
    where: str
    values: Sequence[object]

class Locked(NamedTuple):
    """A job's row, locked by us."""
    seq: int
    state: State
    runs: int

class Office:
    """What a person asks of the queue, or changes in it."""
    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.rows = database, database.rows
        self.retries = settings.max_retries
        self._columns = VIEW_COLUMNS.format(retries=settings.max_retries,
                                            timeout=settings.job_timeout)

    def jobs(self, state: str | None, queue_name: str | None,
             limit: int) -> Iterator[View]:
        """The newest jobs first, read page by page; 0: all."""
        where, values = self._filter(state, queue_name)
        # Few of many are sorted; of what is frequent, the newest are found by walking.
        matching = self.tally(f"jobs WHERE {where}", values, SORTED_UP_TO + 1)
        index = "jobs_claim" if values and matching <= SORTED_UP_TO else "PRIMARY"
        left, below = limit or sys.maxsize, 1 << 63
        while left > 0:
            views = self.rows(
                View, f"SELECT {self._columns} FROM jobs FORCE INDEX ({index}) "
                f"WHERE seq < %s AND {where} ORDER BY seq DESC LIMIT %s",
                below, *values, min(PAGE, left))
            yield from views
            if len(views) < min(PAGE, left):
                return
            left, below = left - len(views), views[-1].seq

    def count(self, state: str | None, queue_name: str | None) -> int:
        where, values = self._filter(state, queue_name)
        return self.tally(f"jobs WHERE {where}", values, COUNTED_UP_TO + 1)

    @staticmethod
    def _filter(state: str | None, queue_name: str | None) -> tuple[str, list[object]]:
        if not state and not queue_name:
            return "TRUE", []
        states = [state] if state else list(State)  # all: the index begins with it
        named = [queue_name] if queue_name else []
        return "state IN %s" + " AND queue = %s" * len(named), [states, *named]

    def tally(self, source: str, values: Sequence[object] = (), most: int = 0) -> int:
        """How many rows; counting stops at `most`, 0: never."""
        if most:
            source = f"(SELECT 1 FROM {source} LIMIT {most}) AS some"
        [count] = self.rows(int, f"SELECT COUNT(*) FROM {source}", *values)
        return count

    def follow(self, job_id: str, run: int,
               when_slow: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """The output of a job from its run number `run` on, as it comes, until the job
        has ended; `when_slow` is called if it has not started after SLOW_START_S."""
        seen, pause, slow_at = 0, 0.02, time.monotonic() + SLOW_START_S
        while True:
            found = self.rows(
                lambda *row: row, "SELECT state, run, output_bytes, IF(run > %s OR "
                "output_bytes > %s, output, NULL) FROM jobs LEFT JOIN runs ON job = "
                "seq AND run >= %s WHERE id = %s ORDER BY run", run, seen, run, job_id)
            if not found:
                raise no_such_job(job_id)
            for _, number, total, kept in found:
                run, seen = number or run, seen if number in (run, None) else 0
                if kept:
                    yield unseen(kept, total, seen)
                    seen, pause = total, 0.02
            if found[-1][0] in ENDED:
                return
            if time.monotonic() > slow_at:
                slow_at = math.inf
                if found[-1][0] != State.PROCESSING and not run:
                    when_slow()
            time.sleep(pause)
            pause = min(1.5 * pause, FOLLOWED_S / 3)

    def wait(self, ids: Sequence[str], one_is_enough: bool,
             timeout_s: float) -> Iterator[Result]:
        """Each job as it ends, or the first alone; Problem if that takes too long."""
        until, pause, left = time.monotonic() + timeout_s, 0.02, dict.fromkeys(ids)
        def too_late() -> Problem:
            return Problem(f"not ended within {say_duration(timeout_s)}: "
                           f"{some_of([*left])}",
                           f"see: queuectl explain {next(iter(left))}", TIMED_OUT)
        while left:
            for page in pages(list(left)):
                found = self._states_before(until, page)
                if found is None:
                    raise too_late()
                for job_id in page:
                    state = found.get(job_id)
                    if state is None or state in ENDED:
                        del left[job_id]
                        error = f"job {job_id} is {state}" if state \
                            else no_such_job(job_id).what
                        yield Result(job_id, state == State.COMPLETED, state, error,
                                     f"is {state}")
                        if one_is_enough and state:
                            return
            if left and time.monotonic() >= until:
                raise too_late()
            time.sleep(min(pause, max(0.0, until - time.monotonic())) if left else 0)
            pause = min(1.5 * pause, 0.25)

    def _states_before(self, until: float,
                       ids: Sequence[str]) -> dict[str, str] | None:
        """The present states of jobs; None where an outage lasts past `until`."""
        policy, left_s = self.database.policy, max(0.0, until - time.monotonic())
        self.database.policy = dataclasses.replace(
            policy, patience_s=min(policy.patience_s, left_s))
        try:
            return states_of(self.database, ids)
        except Unreachable:
            if left_s > policy.patience_s:
                raise
            return None

    def whole(self, job_id: str) -> Whole:
        """Everything about one job; Problem if there is none."""
        rows = self.rows(
            lambda cwd, env, *row: (View(*row), cwd, env),
            f"SELECT cwd, env, {self._columns} FROM jobs WHERE id = %s", job_id) \
            if NAME.fullmatch(job_id) else []
        if not rows:
            raise no_such_job(job_id)
        [(view, cwd, env)] = rows
        history = self.rows(
            Run, "SELECT run, attempt, worker, started_at, finished_at, duration, "
            "exit_code, reason, detail FROM runs WHERE job = %s ORDER BY run", view.seq)
        after = self.rows(str, f"SELECT parents.id FROM {PARENTS} WHERE child = %s "
                          "ORDER BY parent", view.seq)
        output = self.output(view.seq, history[-1].run) if history else b""
        return Whole(view, cwd, env_of(env), after, history, output)

    def output(self, seq: int, run: int) -> bytes:
        """What is kept of one run's output."""
        return b"".join(self.rows(lambda kept: bytes(kept or b""), "SELECT output "
                                  "FROM runs WHERE job = %s AND run = %s", seq, run))

    def like(self, job_id: str) -> dict[str, object]:
        """What to enqueue for a job like this one, as complete_job makes it."""
        names = (*SIGNED, "queue", "priority", "max_retries", "timeout", "backoff_base",
                 "permanent_exit_codes", "on_lost", "unique")
        columns = ", ".join(COLUMN_OF.get(name, name) for name in names)
        rows = self.rows(lambda *row: row, f"SELECT signature, {columns} FROM jobs "
                         "WHERE id = %s", job_id) if NAME.fullmatch(job_id) else []
        if not rows:
            raise no_such_job(job_id)
        if not is_signed(*rows[0][:6]):
            raise Problem(f"job {job_id} is not signed with this QUEUECTL_SIGNING_KEY",
                          "look at its command, then enqueue it anew")
        return {name: value for name, value in zip(names[1:], rows[0][2:])
                if value is not None}

    def dead_letters(self, limit: int, only: Filter) -> list[tuple[View, Moment]]:
        """The dead jobs, the last to die first, each with the time of its death."""
        return self.rows(
            lambda died, *row: (View(*row), died), f"SELECT died_at, {self._columns} "
            f"FROM dlq JOIN jobs ON jobs.seq = dlq.seq WHERE {only.where} ORDER BY "
            "died_at DESC, dlq.seq DESC LIMIT %s", *only.values, limit or 1 << 63)

    def dead_ids(self, only: Filter) -> list[str]:
        """The dead jobs, the first to die first."""
        return self.rows(str, "SELECT dlq.id FROM dlq JOIN jobs ON jobs.seq = dlq.seq "
                         f"WHERE {only.where} ORDER BY died_at, dlq.seq", *only.values)

    def dead_groups(self) -> list[dict[str, Json]]:
        """The dead letters that are alike but for digits, the most frequent first."""
        return self.rows(
            lambda count, code, reason, line, last, example: {
                "count": count, "exit_code": code, "reason": reason, "last_line": line,
                "last_died_at": say_time(last), "example": example},
            "SELECT COUNT(*) AS many, exit_code, reason, REGEXP_REPLACE(last_line, "
            "'[0-9]+', 'N') AS line, MAX(died_at), MAX(id) FROM dlq "
            "GROUP BY exit_code, reason, line ORDER BY many DESC")

    def count_dead_letters(self, only: Filter) -> int:
        return self.tally("dlq JOIN jobs ON jobs.seq = dlq.seq WHERE " + only.where,
                           only.values, COUNTED_UP_TO + 1)

    def states(self, exact: bool) -> tuple[dict[str, int], list[str]]:
        """Jobs in each state, and the states whose count stops at COUNTED_UP_TO."""
        most = 0 if exact else COUNTED_UP_TO + 1
        counts = {str(state): self.tally("jobs WHERE state = %s", [state], most)
                  for state in State}
        capped = [state for state, count in counts.items() if most and count == most]
        return {**counts, **dict.fromkeys(capped, COUNTED_UP_TO)}, capped

    def queues(self) -> list[dict[str, Json]]:
        """The queues with pending or processing jobs, with how many."""
        processing = dict(self.rows(
            lambda name, count: (name, count), "SELECT queue, COUNT(*) FROM jobs "
            "WHERE state = 'processing' GROUP BY queue"))
        waiting = "jobs WHERE state = 'pending' AND queue = %s"
        pending = {name: self.tally(waiting, [name], COUNTED_UP_TO)
                   for name in self.database.read(functools.partial(
                       queues_with, state=State.PENDING))}
        return [{"queue": name, str(State.PENDING): pending.get(name, 0),
                 str(State.PROCESSING): processing.get(name, 0)}
                for name in sorted({*pending, *processing})]

    def lines(self) -> list[dict[str, Json]]:
        """The queues that have jobs to run or a limit, and how they move."""
        held = {name: (limit, bool(paused)) for name, limit, paused in self.rows(
            lambda *row: row, "SELECT name, max_running, paused_at FROM queues")}
        ended = dict(self.rows(
            lambda *row: row, "SELECT queue, COUNT(*) FROM (SELECT job, finished_at "
            "FROM runs ORDER BY job DESC LIMIT 5000) AS latest JOIN jobs ON seq = job "
            "WHERE latest.finished_at > UTC_TIMESTAMP(6) - INTERVAL 1 MINUTE "
            "GROUP BY queue"))
        busy = {str(row["queue"]): row for row in self.queues()}
        rows = []
        for name in sorted({*busy, *(one for one, what in held.items()
                                     if what != (None, False))}):
            oldest = self.rows(
                say_time, "SELECT MIN(created_at) FROM (SELECT created_at FROM jobs "
                "FORCE INDEX (jobs_claim) WHERE state = 'pending' AND queue = %s "
                "ORDER BY claim_order, seq LIMIT 1000) AS first", name)
            limit, paused = held.get(name, (None, False))
            row = busy.get(name, {})
            rows.append({"queue": name, "depth": row.get(State.PENDING, 0),
                         "running": row.get(State.PROCESSING, 0), "limit": limit,
                         "paused": paused, "oldest_waiting": oldest[0],
                         "rate": ended.get(name, 0)})
        return rows

    def workers(self) -> list[dict[str, Json]]:
        """The workers that are not lost; `silent`: no beat for longer than a lease."""
        return self.rows(
            lambda worker, host, pid, slots, busy, queues, beat_at, state: {
                "id": worker, "host": host, "pid": pid, "slots": slots, "busy": busy,
                "queues": queues.split(",") if queues else [],
                "heartbeat_at": say_time(beat_at), "state": state},
            "SELECT id, host, pid, slots, (SELECT COUNT(*) FROM jobs "
            "WHERE jobs.state = 'processing' AND worker = workers.id), queues, "
            "heartbeat_at, IF(heartbeat_at < UTC_TIMESTAMP(6) - INTERVAL lease SECOND, "
            "'silent', state) FROM workers WHERE lost_at IS NULL ORDER BY host, pid")

    def unserved(self) -> list[str]:
        """The queues where jobs wait and no live worker serves."""
        served = [as_list(worker["queues"]) for worker in self.workers()
                  if worker["state"] == "running"]
        return [str(row["queue"]) for row in self.queues() if row[State.PENDING]
                and not any(not names or row["queue"] in names for names in served)]

    def running_under(self, host: str, supervisor: int) -> list[str]:
        """The jobs that the workers of one supervisor run."""
        return self.rows(
            str, "SELECT jobs.id FROM jobs JOIN workers ON workers.id = jobs.worker "
            "WHERE jobs.state = 'processing' AND host = %s AND supervisor = %s "
            "AND lost_at IS NULL ORDER BY seq", host, supervisor)

    # -- what a person changes

    def cancel(self, job_id: str) -> Result:
        """End a waiting job now; ask the worker of a running one to end it."""
        def work(cursor: Cursor, seq: int, state: State) -> Result:
            if state is State.PROCESSING:
                cursor.execute(
                    "UPDATE jobs FORCE INDEX (PRIMARY) SET cancel_requested_at = "
                    "COALESCE(cancel_requested_at, UTC_TIMESTAMP(6)) "
                    "WHERE seq = %s AND state = 'processing'", (seq,))
                return Result(job_id, True, state, None,
                              "is running: its worker ends it")
            if state not in MOVES["cancel"].leaves:
                return Result(job_id, False, state,
                              f"job {job_id} is {state}: nothing to cancel")
            cursor.execute(
                "UPDATE jobs FORCE INDEX (PRIMARY) SET state = %s, reason = %s, "
                "finished_at = UTC_TIMESTAMP(6), next_run_at = LEAST(next_run_at, "
                "UTC_TIMESTAMP(6)) WHERE seq = %s AND state = %s",
                (MOVES["cancel"].to, Reason.CANCELLED, seq, state))
            release_children(cursor, [seq])
            return Result(job_id, True, MOVES["cancel"].to, None, "is cancelled")
        return self._on_one(job_id, work, lambda was, now: now.state is State.CANCELLED)

    def revive(self, job_id: str, move: str, retries: int = 1,
               reset: bool = False) -> Result:
        """Put a job back, due now, or blocked while it has to wait for others.

        It keeps its attempts, a dead one gets `retries` more runs; `reset` counts anew.
        """
        def work(cursor: Cursor, seq: int, state: State) -> Result:
            if state not in MOVES[move].leaves:
                only = " or ".join(one for one in State if one in MOVES[move].leaves)
                return Result(job_id, False, state, f"job {job_id} is {state}: "
                              f"only {only} jobs can be put back")
            unmet = cursor.rows(
                lambda *row: row, f"SELECT {HOPELESS}, parents.id, parents.state FROM "
                f"{PARENTS} WHERE child = %s AND NOT {MET}", seq)
            for hopeless, parent, its_state in unmet:
                if hopeless:
                    return Result(job_id, False, state, f"job {job_id} waits for "
                                  f"{parent}, which is {its_state}: queuectl dlq retry "
                                  f"{parent} --dependents brings both back")
            to = State.BLOCKED if unmet else MOVES[move].to
            # One that did not die by running keeps the runs that are left to it.
            counting = ("attempts_max = IF((state <> 'dead' OR reason = 'dependency') "
                        "AND attempts < COALESCE(attempts_max, max_retries + 1, "
                        f"{self.retries + 1}), attempts_max, attempts + {retries})")
            if reset:
                counting = "attempts = 0, attempts_max = NULL"
            cursor.execute(
                f"UPDATE jobs FORCE INDEX (PRIMARY) SET {counting}, state = %s, "
                "losses = 0, next_run_at = UTC_TIMESTAMP(6) "
                "WHERE seq = %s AND state = %s", (to, seq, state))
            cursor.execute("DELETE FROM dlq WHERE seq = %s", (seq,))
            return Result(job_id, True, to, None, f"is {to} again")
        # It may have run since, and be where it was.
        return self._on_one(job_id, work, lambda was, now: now.state is not was.state
                            or now.runs > was.runs)

    def revive_dependents(self, job_id: str) -> Iterator[Result]:
        """Put back what died with a job, and what died with that."""
        parents = [job_id]
        for parent in parents:
            for child in self.rows(
                    str, f"SELECT jobs.id FROM {PARENTS} JOIN jobs ON jobs.seq = child "
                    "WHERE parents.id = %s AND jobs.state = 'dead' AND jobs.reason = "
                    "'dependency' ORDER BY child", parent):
                result = self.revive(child, "revive")
                parents += [child] * result.ok
                yield result

    def limit(self, name: str, what: str, value: object) -> None:
        """Set max_running or paused_at of a queue; None: it limits it no more."""
        self.database.run(f"INSERT INTO queues (name, {what}) VALUES (%s, %s) "
                          f"ON DUPLICATE KEY UPDATE {what} = VALUES({what}), "
                          "touched = touched + 1", name, value)

    def _on_one(self, job_id: str, act: Callable[[Cursor, int, State], Result],
                stands: Callable[[Locked, Locked], bool]) -> Result:
        """Lock one job, and do what its state allows.

        `stands` tells from the row as it was and as it is whether what was done stands,
        after a COMMIT whose answer was lost; where it does not, it is done again.
        """
        nothing = Result(job_id, False, None, no_such_job(job_id).what)
        made: list[tuple[Result, Locked]] = []
        def locked(cursor: Cursor) -> Locked | None:
            found = cursor.rows(
                lambda seq, state, runs: Locked(seq, State(state), runs),
                "SELECT seq, state, runs FROM jobs WHERE id = %s FOR UPDATE", job_id)
            return found[0] if found else None
        def work(cursor: Cursor) -> Result:
            row = locked(cursor)
            if not row:
                return nothing
            made.append((act(cursor, row.seq, row.state), row))
            return made[-1][0]
        def verify(cursor: Cursor) -> Result | None:
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
            return self._clash(job_id)

    def _clash(self, job_id: str) -> Result:
        """Why a job cannot come back: another has its unique key."""
        [(state, key, holder)] = self.rows(
            lambda *row: row, "SELECT jobs.state, jobs.unique_key, other.id FROM jobs "
            "LEFT JOIN jobs AS other ON other.live_key = jobs.unique_key "
            "WHERE jobs.id = %s", job_id)
        return Result(job_id, False, state, f"job {job_id} stays {state}: key {key} is "
                      f"held by job {holder}")

    def set_config(self, key: str, value: str | None) -> None:
        """Store one setting; None removes it."""
        if value is None:
            self.database.run("DELETE FROM config WHERE `key` = %s", key)
            return
        self.database.run("INSERT INTO config (`key`, value) VALUES (%s, %s) "
                "ON DUPLICATE KEY UPDATE value = VALUES(value), "
                "changed_at = UTC_TIMESTAMP(6)", key, value)

def no_such_job(job_id: str) -> Problem:
    return Problem(f"no such job: {excerpt(job_id, 140)}", "see: queuectl list")

def unseen(kept: bytes, total: int, seen: int) -> bytes:
    """What follows the first `seen` bytes of a stream of `total` bytes, of which `kept`
    is there: as Output.kept made it."""
    head, mark, tail = kept.partition(cut_mark(total))
    if total - seen <= len(tail) or not mark:
        return (tail or head)[-(total - seen):] if total > seen else b""
    return head[seen:] + mark + tail

def some_of(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more

def states_of(database: Database, ids: Sequence[str]) -> dict[str, str]:
    """The present states of those of some jobs that are there."""
    named = [one for one in ids if NAME.fullmatch(one)]
    return dict(database.rows(lambda *row: row, "SELECT id, state FROM jobs WHERE id "
                              "IN %s", named)) if named else {}

def read_config(database: Database) -> dict[str, str]:
    """The config table, less the rows that are not settings."""
    found = database.rows(lambda *row: row, "SELECT `key`, value FROM config")
    return {key: value for key, value in found if key in KNOBS}


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
    def __init__(self, target: Target, note: str, rung: Callable[[], None],
                 route: Route | None = None) -> None:
        policy = Policy(math.inf, 1.5 * PARKED_S, say=lambda text: None)
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


# ---- runner ------------------------------------------------------------------
#
# One shell command: its output, its time limit, its end. The only room that kills,
# reaps or reads /proc. There is one way to end a run, whatever the cause: TERM to its
# group, kill_grace, KILL, until nothing of it is left.

READ_BYTES = 65536
FIRST_FLUSH_S, NEXT_FLUSH_S = 0.05, 1.0
STRAY_CHECK_S = 0.05
FOLLOWED_LIMITS = 4
OOM_SCORE_ADJ = 500
HOST_IS_SHORT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
MARK = "QUEUECTL_RUN"  # <token>-<seq>: in the environment of all that a run starts
MARKED = f"{MARK}=".encode()

class Output:
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
            del self._tail[:-most - 1]

    def kept(self, to_follow: bool = False) -> bytes:
        tail_max = self._limit - self._head_max
        if to_follow:
            tail_max = FOLLOWED_LIMITS * self._limit
        if self.total <= self._head_max + tail_max:
            return bytes(self._head + self._tail)
        mark = cut_mark(self.total)
        room = tail_max - len(mark)
        return bytes(self._head + mark + (self._tail[-room:] if room > 0 else b""))

class Launchpad:
    """What every run of this process starts from: environment, directory, score."""
    def __init__(self, variables: Mapping[bytes, bytes]) -> None:
        self._environment = {name: value for name, value in variables.items()
                             if not PRIVATE_VARIABLE.fullmatch(os.fsdecode(name))}
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._home = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
        self._score, self._scores = -1, (b"0", b"0")
        with contextlib.suppress(OSError, ValueError):  # not Linux
            self._score = os.open("/proc/self/oom_score_adj", os.O_RDWR)
            own = int(os.read(self._score, 16))
            self._scores = b"%d" % own, b"%d" % min(own + OOM_SCORE_ADJ, 1000)
        names = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(3, 64)
        for name in names:  # jobs inherit none of what we were given
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), int(name) < 3)

    def spawn(self, command: bytes, cwd: bytes, output: int,
              variables: Mapping[bytes, bytes]) -> int:
        """The pid of a shell that runs `command` in a session of its own.

        It inherits directory and score from us, who have them just for that moment:
        so posix_spawn can do it, which in Python 3.9 is twice as fast as Popen.
        """
        os.chdir(os.fsdecode(cwd) if cwd else self._home)
        try:
            self._rate(1)
            return os.posix_spawn(
                "/bin/sh", [b"/bin/sh", b"-c", command],
                {**self._environment, **variables},
                file_actions=[(os.POSIX_SPAWN_DUP2, self._null, 0),
                              (os.POSIX_SPAWN_DUP2, output, 1),
                              (os.POSIX_SPAWN_DUP2, output, 2)],
                # Python ignores SIGXFSZ; what has a handler is reset by itself.
                setsid=True, setsigmask=(), setsigdef=(signal.SIGXFSZ,))
        finally:
            self._rate(0)
            with contextlib.suppress(OSError):  # the next spawn would tell
                os.chdir(self._home)

    def _rate(self, which: int) -> None:
        if self._score >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._score, self._scores[which], 0)

class Process:
    """One run: the shell, its pipe, its time limit, and its end."""
    def __init__(self, job: Job, settings: Settings, launchpad: Launchpad) -> None:
        self.job, self.settings = job, settings
        self.key = (job.held.seq, job.held.token)
        self.mark = f"{job.held.token}-{job.held.seq}"
        self.output = Output(settings.output_limit)
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
            self.pid = self._spawn(write_end, launchpad)
        except (OSError, ValueError) as error:
            self.failure, self.gone = f"{error}, on {socket.gethostname()}", True
            if isinstance(error, OSError) and error.errno in HOST_IS_SHORT:
                self.cause = Reason.HANDED_BACK  # not the job's fault
        finally:
            if write_end >= 0:
                os.close(write_end)

    def _spawn(self, write_end: int, launchpad: Launchpad) -> int:
        held, cwd, own = self.job.held, self.job.cwd, self.job.env
        added = {"QUEUECTL_JOB_ID": held.id, "QUEUECTL_ATTEMPT": str(held.attempts),
                 "QUEUECTL_MAX_ATTEMPTS": str(held.allowed),
                 "QUEUECTL_QUEUE": self.job.queue,
                 **(json.loads(_read_env(own)) if own else {}), MARK: self.mark}
        return launchpad.spawn(
            self.job.command.encode(), cwd.encode() if cwd else b"", write_end,
            {name.encode(): text.encode() for name, text in added.items()})

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
        return self.job.held, End(None, output=self.output.kept(True),
                                  output_bytes=self.output.total)

    def put_off_flush(self) -> None:
        """What was to be flushed last was not: have it flushed again."""
        self._flushed_bytes, self.flush_at = 0, time.monotonic() + NEXT_FLUSH_S

    def shown(self, now: float) -> bool:
        """Whether who follows a run had time to read what its final cut leaves out."""
        if math.isinf(self._shown_at):
            unseen_bytes = self.output.total - self._flushed_bytes
            limit = self.settings.output_limit
            cut = self.output.total > limit and unseen_bytes > limit // 4
            self._shown_at = now + FOLLOWED_S * cut
            if cut:
                self.flush_at, self.check_at = now, self._shown_at
        return now >= self._shown_at

    def end(self, cause: Reason | None, survey: Survey) -> None:
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
                os.killpg(self.pid, signal.SIGTERM)
                told = self.pid  # twice means "now" to many programs
        survey.signal(self.mark, self.pid, signal.SIGTERM, told)

    def hurry(self, now: float) -> None:
        """KILL after kill_grace from now, however long it was to take."""
        self._kill_at = min(self._kill_at, now + self.settings.kill_grace)
        self.check_at = min(self.check_at, self._kill_at)

    def reaped(self, status: int, survey: Survey) -> None:
        """The shell ended: the run too, unless others of its group must go first."""
        self.status, self._took = status, time.monotonic() - self._started
        if self.ending:
            self.check_at = 0.0
        elif status and _exists(-self.pid):
            self.end(None, survey)
        else:
            self.gone = True

    def tick(self, now: float, survey: Survey) -> None:
        """Act on the time limit, or bring the end a step further."""
        if self.gone or now < self.check_at:
            return
        if not self.ending:
            self.end(Reason.TIMEOUT, survey)
            return
        number = signal.SIGKILL if now >= self._kill_at else 0
        if self.status is None:
            if not number:
                self.check_at = self._kill_at
                return
            try:
                os.killpg(self.pid, number)
            except PermissionError:
                self.survivor, self.gone = self.pid, True
        left, refused = survey.signal(self.mark, self.pid, number)
        self.survivor = self.survivor or refused
        self.gone = self.gone or (self.status is not None and not left)
        self.check_at = now + STRAY_CHECK_S

    def outcome(self) -> End:
        """How the run ended; asked once it is gone."""
        reason, code, detail = self._judge()
        if self.survivor:
            detail += f"; process {self.survivor} refused the signal and goes on"
        took = time.monotonic() - self._started if self._took is None else self._took
        return End(reason, code, detail.lstrip("; "), took, self.output.kept(),
                   self.output.total)

    def _judge(self) -> tuple[Reason, int | None, str]:
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
            detail = (f"in {place}, PATH={os.environ.get('PATH', '')}; name it by its "
                      "path, or give the job an env with that PATH")
        return Reason.EXIT, code, detail

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
def pinned(pid: int) -> Iterator[int]:
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

def send(pid: int, number: int, handle: int = -1) -> None:
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

class Seen(NamedTuple):
    """A living process: its group, its session, and the mark that it carries."""
    group: int
    session: int
    mark: bytes

def _see(pid: int) -> Seen | None:
    """What /proc says of a process; None if it has ended."""
    try:
        group, session = map(int, _stat(pid)[2:4])
        marks: list[bytes] = []
        with contextlib.suppress(PermissionError), \
                open(f"/proc/{pid}/environ", "rb") as file:
            marks = [one for one in file.read().split(b"\0") if one.startswith(MARKED)]
        return Seen(group, session, marks[0] if marks else b"")
    except OSError:
        return None

class Survey:
    """Who lives: one pass over /proc, made when first asked, for all runs that are to
    end together; a pass for each would keep many runs past their kill_grace."""
    def __init__(self) -> None:
        self._by_session: dict[int, set[int]] = {}
        self._by_mark: dict[bytes, set[int]] = {}

    @functools.cached_property
    def _seen(self) -> dict[int, Seen]:
        pids: list[int] = []
        with contextlib.suppress(OSError):  # no /proc here: groups alone are ended
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        seen = {pid: one for pid in pids if pid != os.getpid() and (one := _see(pid))}
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
            with contextlib.suppress(ProcessLookupError), pinned(pid) as handle:
                # The number may have passed to a stranger since: look again.
                now = _see(pid)
                if now and now.group != (but_group or -1) \
                        and (now.mark == wanted or now.session in sessions):
                    try:
                        send(pid, number, handle)
                    except Problem:  # it belongs to another user
                        left, refused = left - 1, pid
        return left, refused

def holds(pid: int, path: str) -> bool:
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

def end_marked(marks: Sequence[str], grace_s: float) -> None:
    """End what an earlier worker left running of these runs; return once it is gone."""
    kill_at = time.monotonic() + grace_s
    number = int(signal.SIGTERM)
    while marks:
        survey = Survey()
        marks = [mark for mark in marks if survey.signal(mark, 0, number)[0]]
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


# ---- worker ------------------------------------------------------------------
#
# One process: one loop over one selector, and one thread that talks to the database.
# The loop never waits for the thread, so a hung server delays no time limit, no pipe
# and no signal. A request is one turn; while it is under way ends gather for the next.

RESULTS_WAIT_S, NOTHING_TO_SETTLE_WAIT_S = 30.0, 5.0
FORCED_WAIT_S, ORPHANED_WAIT_S = 0.5, 1.0
LOOK_WHEN_DRAINING_S = 0.2
SHORT_PAUSE_S, SHORT_MEMORY_S = 1.0, 10.0  # a host without descriptors, or the like
STARTED_AT_ONCE = 4  # then the loop looks at what else has happened
RELAXED = 1.5  # how much longer than poll_interval a look may wait for the doorbell
PARKING_S = 0.005  # how long a sleep takes until others can find it
LOW_WATER = 8  # claimed jobs left to start when the next turn begins
NOW = signal.SIGUSR1  # from the supervisor: end what runs; a terminal cannot send it
HANDLED = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT,
           signal.SIGTERM, signal.SIGPIPE, NOW)

class Ledger:
    """The worker's id and the marks of its runs, in memory shared with the supervisor,
    which must know what to end when the worker is killed."""
    CELL = 64  # bytes; the id, kill_grace once it opened, then a mark for each slot

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, self.CELL * (slots + 2))
        self._free = list(range(2, slots + 2))

    def sign(self, worker: str) -> None:
        self._write(0, worker)

    def open(self, kill_grace: float) -> None:
        """What was inherited is written off: only our own runs matter from now on. So
        long each takes at most to end."""
        self._write(1, str(kill_grace))

    def note(self, mark: str) -> None:
        self._write(self._free.pop(), mark)

    def strike(self, mark: str) -> None:
        # To its end: a turn's marks differ in their numbers only, and 7 begins 70.
        cell = self._memory.find(mark.encode() + b"\0") // self.CELL
        self._write(cell, "")
        self._free.append(cell)

    def read(self) -> tuple[str, float | None, list[str]]:
        """The worker's id, its kill_grace if it opened, and the marks of its runs."""
        worker, opened, *marks = [self._memory[at:at + self.CELL].rstrip(b"\0").decode()
                                  for at in range(0, len(self._memory), self.CELL)]
        grace_s = float(opened) if opened else None
        return worker, grace_s, [mark for mark in marks if mark]

    def _write(self, cell: int, text: str) -> None:
        at, size = cell * self.CELL, self.CELL
        self._memory[at:at + size] = text.encode().ljust(size, b"\0")

class Neighbours:
    """How busy each process of a supervisor is; a pipe to each has it look around."""
    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = slots
        self._busy = memoryview(mmap.mmap(-1, 2 * len(slots))).cast("H")
        self._pipes = [os.pipe() for _ in slots]
        for end in itertools.chain(*self._pipes):
            os.set_blocking(end, False)

    def listener(self, number: int) -> int:
        return self._pipes[number][0]

    def report(self, number: int, busy: int) -> None:
        self._busy[number] = busy

    def __len__(self) -> int:
        return len(self._slots)

    def idle(self) -> list[int]:
        """Those with a free slot."""
        return [number for number, slots in enumerate(self._slots)
                if self._busy[number] < slots]

    def wake(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with contextlib.suppress(BlockingIOError):  # it was told often enough
                os.write(self._pipes[number][1], b"+")

@dataclass(frozen=True)
class Crew:
    """What all worker processes of one supervisor have in common."""
    target: Target
    environment: Environment
    settings: Settings
    queues: tuple[str, ...]
    drain: bool
    grace_s: float | None
    verbose: bool  # whether a job that completed is worth a line
    say: Callable[[str], None]

class Post(NamedTuple):
    """One worker process's place in the crew."""
    number: int
    neighbours: Neighbours
    slots: int
    supervisor: int
    lifeline: int  # readable once the supervisor is gone
    ready: int  # written once the worker has entered its row
    ledger: Ledger
    inherited: tuple[tuple[str, tuple[str, ...]], ...]  # dead workers and their runs

def catch_signals() -> tuple[int, int]:
    """A pipe that gets each handled signal's number as a byte; they are unblocked.

    Real handlers, never ignored ones: jobs inherit what is ignored, and under an
    ignored SIGCHLD a failing job would look well.
    """
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    for number in HANDLED:
        signal.signal(number, lambda signum, frame: None)
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return ends

def reread(say: Callable[[str], None]) -> Environment | None:
    """The environment and `.env` as they are now; None, and said, if they are wrong."""
    try:
        environment = Environment.read()
        configure(environment, {})
        return environment
    except (Problem, OSError, ValueError) as error:  # whatever is there: work goes on
        say(f"{error}; settings are kept as they were")
        return None

class Worker:
    """The loop of one worker process."""
    def __init__(self, crew: Crew, post: Post) -> None:
        self.crew, self.post = crew, post
        self.settings, self.environment = crew.settings, crew.environment
        self.claimed: collections.deque[Job] = collections.deque()  # not yet started
        self.processes: dict[int, Process] = {}  # by pid, also those that are ending
        self.ended: list[Ended] = []
        self.in_flight: Ask | None = None
        self.opened = self.stopping = self.forced = self.retiring = self.retired = False
        self._nudged = False  # somebody says that there is something to look at
        self.grace_at = self.give_up_at = math.inf
        self.next_look = self.next_judge = self.hold_until = self.start_by = 0.0
        self._short_at = -math.inf  # when the host was last too short to start a job
        self.status = 0
        self._selector = selectors.DefaultSelector()
        self._read_wake, self._wake = catch_signals()
        self._selector.register(self._read_wake, selectors.EVENT_READ, self._on_wake)
        self._selector.register(post.lifeline, selectors.EVENT_READ, self._on_orphaned)
        self._nudges = post.neighbours.listener(post.number)
        self._selector.register(self._nudges, selectors.EVENT_READ, self._on_nudged)
        self._launchpad = Launchpad(os.environb)
        # One process tells of an outage for all.
        tell = (lambda text: None) if post.number else crew.say
        lease_s = self.settings.lease_s
        self._policy = Policy(math.inf, max(2.0, lease_s / 3), tell,
                              longest_s=max(2.0, lease_s / 2))
        self._route = Route()
        self._desk = self._new_desk()
        self._asked = False  # a request is under way
        self._requests: queue.SimpleQueue[Callable[[], Thunk]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Thunk] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()
        self._doorbell: Doorbell | None = None  # one for all of the supervisor's

    def run(self) -> int:
        """Work until told to stop, or drained; the exit status."""
        self._request(self._open, self._on_opened)
        while not self._finished():
            self._ask()
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._reap()
            self._tick()
            if not self._answers.empty():
                self._asked = False
                self._answers.get()()
            for _ in range(min(STARTED_AT_ONCE, len(self.claimed))):
                if self.claimed:  # unless all were just handed back
                    self._start(self.claimed.popleft())
        return self.status

    # -- the database's side

    def _request(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Have the thread do `work`, and the loop do `then` with what came of it."""
        def serve() -> Thunk:
            try:
                result = work()
            except Exception as error:
                refused = error
                return lambda: self._on_refused(refused)
            return lambda: then(result)
        self._asked = True
        self._requests.put(serve)

    def _serve(self) -> None:
        """The thread: it alone talks to the database."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        while True:
            self._answers.put(self._requests.get()())
            self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the loop is awake anyway
            os.write(self._wake, b"\0")

    def _on_rung(self) -> None:
        """Called by the doorbell's thread."""
        self._nudged = True
        self._ring()

    def _on_nudged(self) -> None:
        os.read(self._nudges, 4096)
        self._nudged = True

    def _new_desk(self) -> Desk:
        """A desk under a new id: ids are never used twice."""
        host, pid = socket.gethostname(), os.getpid()
        name = f"{re.sub('[^A-Za-z0-9.-]', '-', host)[:40]}-{secrets.token_hex(4)}"
        self.post.ledger.sign(name)
        me = Identity(name, host, pid, self.post.supervisor, process_identity(pid),
                      self.post.slots, self.crew.queues)
        off = self.environment.get("QUEUECTL_SKIP_LOCKED").lower() in ("off", "0", "no")
        database = Database(self.crew.target, self._policy, route=self._route)
        desk = Desk(database, me, not off)
        desk.settings, desk.retains = self.settings, not self.post.number
        desk.end_orphans = self._end_orphans
        return desk

    def _open(self) -> tuple[list[str], Configured]:
        """Write off what dead workers of this host left behind, then enter."""
        notes = []
        for worker, marks in self.post.inherited:
            end_marked(marks, self.settings.kill_grace)
            taken = self._desk.take_over(worker, -1)
            notes.append(f"worker {worker} died; {taken} runs written off as lost")
        for gone in self._end_orphans():
            taken = self._desk.take_over(gone, -1)
            notes.append(f"worker {gone} here is gone; {taken} runs taken over")
        return self._enter(notes)

    def _enter(self, notes: list[str]) -> tuple[list[str], Configured]:
        """Enter our row; the settings may be others than when our supervisor began."""
        self._desk.register()
        return notes, configure(self.environment, read_config(self._desk.database))

    def _end_orphans(self) -> list[str]:
        """End what dead processes of this host left running; their workers."""
        found, settings = self._desk.dead_neighbours(is_gone), self.settings
        for marks in found.values():  # no longer than our own beat may wait
            end_marked(marks, min(settings.kill_grace, settings.lease_s / 4))
        return list(found)

    def _ask(self) -> None:
        """Hand the clerk a turn, if it is free and there is something to say."""
        now = time.monotonic()
        if self._asked or not self.opened or self.retired or now < self.hold_until:
            return
        if len(self.claimed) > LOW_WATER and now < self.next_look and not self._nudged:
            return  # ends gather while there is enough to start
        flushes = [flush for process in self.processes.values()
                   if now >= process.flush_at and (flush := process.flush())]
        look = now >= self.next_look or bool(
            self.crew.drain and self.ended and not self.busy)
        if not (self.ended or flushes or look or self._nudged):
            if self.stopping and not self.busy and not self.retiring:
                self.retiring = True
                self._request(self._retire, self._on_retired)
            return
        ended, self.ended = self.ended, []
        held = [*(job.held for job in self.claimed),
                *(process.job.held for process in self.processes.values())]
        interval = self._look_interval()
        judge = look and now + interval >= self.next_judge
        ask = Ask(ended, flushes, [(one.seq, one.token) for one in held],
                  self._wanted(held, now), look, judge,
                  self.crew.drain and not self.stopping,
                  "stopping" if self.stopping else "running")
        if look:
            self.next_look = now + interval
        if self._nudged:  # the claim comes first, for it is waited for
            self._nudged, self.next_look = False, now + PARKING_S
        if judge:
            self.next_judge = now + self.settings.heartbeat
        self.in_flight = ask
        self._request(lambda: self._desk.turn(ask),
                      lambda turn: self._on_turn(turn, now))

    def _wanted(self, held: Sequence[Held], now: float) -> int:
        """How many jobs the next turn may claim."""
        if self.stopping or any(one.alone for one in held) \
                or now < self._short_at + SHORT_PAUSE_S:
            return 0
        free = self.post.slots - len(held)
        # A host that is short takes one at a time, and leaves the others to others.
        return min(free, 1) if now < self._short_at + SHORT_MEMORY_S else free

    def _look_interval(self) -> float:
        """Seconds between two looks, where nobody says that there is something."""
        settings = self.settings
        if self.crew.drain and not self.busy:
            return min(settings.poll_interval, LOOK_WHEN_DRAINING_S)
        patience = RELAXED if settings.doorbell == "on" else 1.0
        return min(settings.poll_interval * patience, settings.heartbeat)

    def _on_opened(self, opened: tuple[list[str], Configured]) -> None:
        notes, configured = opened
        for note in notes:
            self.crew.say(note)
        self.opened = True
        self._take_settings(configured)
        with contextlib.suppress(OSError):  # nobody waits for it any more
            os.write(self.post.ready, b"+")

    def _take_settings(self, configured: Configured) -> None:
        for complaint in configured.complaints:
            self.crew.say(complaint)
        self.settings = self._desk.settings = configured.settings
        self.post.ledger.open(self.settings.kill_grace)
        for process in self.processes.values():
            process.settings = configured.settings  # one kill_grace for all of us

    def _retire(self) -> None:
        self._desk.retire()
        if self._doorbell:
            ring(self._desk.database, worker=self._desk.me.id)

    def _on_retired(self, _: None) -> None:
        self.retired = True

    def _on_refused(self, problem: Exception) -> None:
        """The schema has moved on: nothing can be settled here."""
        if not isinstance(problem, Problem):
            raise problem
        if not self.stopping:
            self.crew.say(f"{problem.what}; stopping")
        if self.in_flight:
            self.ended = [*self.in_flight.ended, *self.ended]
            self.in_flight = None
        self.status = 1
        self._stop()
        self.hold_until = time.monotonic() + 1.0
        if not self.opened:
            self.retired = True

    def _on_turn(self, turn: Turn, asked_at: float) -> None:
        asked, self.in_flight = self.in_flight, None
        for note in turn.notes:
            self.crew.say(note)
        for change in turn.changes:
            self._report(change)
        if not turn.alive:
            self._on_lost()
            return
        self.ended = [*turn.unsettled, *self.ended]
        for process in self.processes.values():
            if process.key in turn.unflushed:
                process.put_off_flush()
        if turn.jobs:
            self.claimed.extend(turn.jobs)
            self.start_by = asked_at + self.settings.lease_s
        self.post.neighbours.report(self.post.number, self.busy)
        self.next_look = min(self.next_look, time.monotonic() + turn.due_s)
        if turn.look:
            self._on_look(turn.look)
        if not (turn.jobs and asked and asked.ended):  # else more turns follow at once
            self._park()

    def _park(self) -> None:
        """Let whoever has work find this supervisor, while it has a free slot."""
        if self.post.number or self.stopping:
            return
        if self.settings.doorbell != "on" or not self.post.neighbours.idle():
            if self._doorbell:
                self._doorbell.leave()
            return
        if not self._doorbell:
            note = f"{self._desk.me.id} {','.join(self.crew.queues) or '-'}"
            self._doorbell = Doorbell(self.crew.target, note, self._on_rung,
                                      self._route)
        if self._doorbell.park():  # what came just before could not ring
            self.next_look = min(self.next_look, time.monotonic() + PARKING_S)

    def _on_look(self, look: Look) -> None:
        survey = Survey()
        for process in self.processes.values():
            if look.runs.get(process.key):
                process.end(Reason.CANCELLED, survey)
        neighbours, others = self.post.neighbours, {*range(len(self.post.neighbours))}
        others.discard(self.post.number)
        if look.drained or (look.others_cancelled and not self.post.number):
            neighbours.wake(others)
        elif look.waiting and self.busy >= self.post.slots:
            neighbours.wake([one for one in neighbours.idle() if one in others][:1])
        try:
            check_schema(look.config.get("schema_version"), self.crew.target.database)
            configured = configure(self.environment, look.config)
        except Problem as problem:
            if not self.stopping:
                self.crew.say(f"{problem.what}; stopping")
                self.status = 1  # not to be replaced by another like this one
                self._stop()
            return
        if configured.settings != self.settings:
            self._take_settings(configured)
        if look.drained and not self.busy and not self.ended:
            self._stop()

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        return len(self.claimed) + len(self.processes)

    def _on_lost(self) -> None:
        """We were declared lost: our runs are others' now. End them, and enter anew."""
        self.crew.say(f"this worker ({self._desk.me.id}) was declared lost: ending its "
                      f"{len(self.processes)} runs and entering anew")
        self._end_all(Reason.LOST)
        self.claimed.clear()
        self.ended.clear()
        self.opened = False
        self._desk.database.close()
        self._desk = self._new_desk()
        self._request(lambda: self._enter([]), self._on_opened)

    # -- the processes' side

    def _start(self, job: Job) -> None:
        # Stood we still for a lease since we asked, others may run it by now.
        if self.stopping or time.monotonic() > self.start_by:
            self.ended.append((job.held, End(Reason.HANDED_BACK)))
            return
        if not is_signed(job.signature, job.held.id, job.command, job.cwd, job.env,
                         job.on_failure):
            self.ended.append((job.held, End(Reason.SIGNATURE, detail="not enqueued as "
                               "it is by one who has this QUEUECTL_SIGNING_KEY")))
            return
        self.post.ledger.note(f"{job.held.token}-{job.held.seq}")
        process = Process(job, self.settings, self._launchpad)
        if process.gone:
            if process.cause:
                self._on_short(process)
            self._settle(process)
            return
        self.processes[process.pid] = process
        self._selector.register(process.pipe, selectors.EVENT_READ,
                                lambda: self._on_output(process))

    def _on_short(self, process: Process) -> None:
        """The host is short of something: what was claimed goes back, for others."""
        now = time.monotonic()
        if now > self._short_at + SHORT_MEMORY_S:
            self.crew.say(f"cannot start a job: {process.failure}; handing back, and "
                          "one at a time for a while")
        self._short_at, self.next_look = now, now + SHORT_PAUSE_S
        for job in self.claimed:
            self.ended.append((job.held, End(Reason.HANDED_BACK)))
        self.claimed.clear()

    def _on_output(self, process: Process) -> None:
        if not process.read():
            self._hang_up(process)

    def _hang_up(self, process: Process) -> None:
        if process.pipe >= 0:
            with contextlib.suppress(KeyError):  # not watched: it did not start
                self._selector.unregister(process.pipe)
            process.close_pipe()

    def _reap(self) -> None:
        survey = Survey()
        for pid, status in reap():
            process = self.processes.get(pid)
            if process:  # another is an orphan that we adopted
                self._hang_up(process)
                process.reaped(status, survey)

    def _tick(self) -> None:
        now, survey = time.monotonic(), Survey()
        if now >= self.grace_at:
            self.grace_at = math.inf
            self._end_all(Reason.HANDED_BACK)
        for process in list(self.processes.values()):
            process.tick(now, survey)
            if process.gone and process.shown(now):
                del self.processes[process.pid]
                self._settle(process)

    def _settle(self, process: Process) -> None:
        """Take down how a run ended; the next turn writes it."""
        self._hang_up(process)
        self.post.ledger.strike(process.mark)
        if process.cause is not Reason.LOST:  # else who declared us lost wrote it off
            self.ended.append((process.job.held, process.outcome()))

    def _report(self, change: Change) -> None:
        """A line for a job that ended; for a completed one on a terminal only."""
        (held, end, verdict), to = change, change.to
        if to is State.COMPLETED and not self.crew.verbose:
            return
        label = "" if end.reason is Reason.EXIT else ", exit status"
        code = "" if end.exit_code is None else f"{label} {end.exit_code}"
        took = say_duration(end.duration_s or 0)
        then = f"again in {say_duration(verdict.wait_s)}" if to is State.FAILED else to
        detail = f" ({end.detail})" if end.detail else ""
        self.crew.say(f"job {held.id}: {end.reason}{code} after {took}, attempt "
                      f"{held.attempts}/{held.allowed}: {then}{detail}")

    # -- stopping

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._read_wake, 4096):
                if number == signal.SIGTERM:
                    self._stop()
                elif number == NOW:
                    self._stop_now(FORCED_WAIT_S)
                elif number == signal.SIGHUP:
                    self._reread()

    def _on_orphaned(self) -> None:
        """The supervisor is gone: nobody watches over us any more."""
        self._selector.unregister(self.post.lifeline)
        self.crew.say("the supervisor is gone: ending")
        self._stop_now(ORPHANED_WAIT_S)

    def _reread(self) -> None:
        self.environment = reread(self.crew.say) or self.environment
        self.next_look = 0.0

    def _stop(self) -> None:
        """Claim nothing more; let what runs end."""
        if self.stopping:
            return
        self.stopping = True
        self.next_look = 0.0
        if self.crew.grace_s is not None:
            self.grace_at = time.monotonic() + self.crew.grace_s

    def _stop_now(self, wait_s: float) -> None:
        """End what runs, hand it back, and be gone soon, with or without a database."""
        self._stop()
        self.grace_at = math.inf
        if not self.forced:
            self.forced = True
            self._end_all(Reason.HANDED_BACK)
            self.give_up_at = time.monotonic() + self.settings.kill_grace + wait_s

    def _end_all(self, cause: Reason) -> None:
        survey = Survey()
        for process in self.processes.values():
            process.end(cause, survey)
            process.hurry(time.monotonic())

    def _finished(self) -> bool:
        if not self.stopping:
            return False
        unsettled = [*(self.in_flight.ended if self.in_flight else ()), *self.ended]
        now = time.monotonic()
        if not self.busy:
            if self.retired and not self.ended:
                return True
            wait_s = RESULTS_WAIT_S if self.crew.grace_s is None else self.crew.grace_s
            if not unsettled:
                wait_s = NOTHING_TO_SETTLE_WAIT_S
            self.give_up_at = min(self.give_up_at, now + max(wait_s, 1.0))
        if now < self.give_up_at:
            return False
        lost = [held.id for held, _ in unsettled]
        lost += [process.job.held.id for process in self.processes.values()]
        lost += [job.held.id for job in self.claimed]
        if lost:
            self.crew.say("the database did not take the results of "
                          f"{', '.join(lost)}: they will run again")
            self.status = self.status or 1
        return True

    def _pause(self) -> float:
        """Seconds until the next timer."""
        if self.claimed:
            return 0.0
        times = [self.grace_at, self.give_up_at]
        times += [process.check_at for process in self.processes.values()]
        if not self._asked and self.opened and not self.retired:
            due = [self.next_look, *(one.flush_at for one in self.processes.values())]
            to_retire = self.stopping and not self.busy and not self.retiring
            if self.ended or self._nudged or to_retire:
                due = [0.0]
            times.append(max(self.hold_until, min(due)))
        return max(0.0, min(min(times) - time.monotonic(), 3600.0))


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
        line = (f"{say_time(now.replace(tzinfo=None))} [{os.getpid()}] "
                f"{text.translate(MULTILINE)}\n")
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

class Standing(NamedTuple):
    """What a PID file says: whether it is there, its number, and if that is alive."""
    found: bool
    pid: int
    alive: bool

def probe_pid_file(path: str) -> Standing:
    """Whether a daemon holds the PID file, by a shared lock taken for an instant."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Standing(False, 0, False)
    except OSError as error:
        raise Problem(f"cannot read the PID file {path}: {error.strerror}") from None
    try:
        first = os.read(handle, 64).split(b"\n")[0]
        pid = int(first) if first.isdigit() and len(first) < 10 else 0
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return Standing(True, pid, False)
    except BlockingIOError:
        return Standing(True, pid, True)
    finally:
        os.close(handle)

def hold_pid_file(path: str) -> int:
    """A descriptor that holds the PID file for us, emptied; Problem if another does."""
    until = time.monotonic() + 1
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Problem(f"cannot write the PID file {path}: {error.strerror}",
                          "name another one: --pid-file FILE") from None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):  # else a stopping daemon has just removed it
                os.ftruncate(handle, 0)
                try:
                    os.write(handle, b"\n" * 12)  # there is room for the number
                except OSError as error:
                    os.unlink(path)
                    raise Problem(f"cannot write the PID file {path}: {error.strerror}",
                                  "name another one: --pid-file FILE") from None
                return handle
        os.close(handle)
        if time.monotonic() > until:
            pid = probe_pid_file(path).pid or "?"
            raise Problem(f"a worker daemon runs already: PID {pid} holds {path}",
                          "stop it (queuectl worker stop), or give another --pid-file")
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
class _Child:
    """A worker process as its supervisor knows it."""
    slots: int
    ledger: Ledger
    inherited: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pid: int = 0
    started: float = 0.0
    pause_s: float = RESPAWN_PAUSE_S
    spawn_at: float = 0.0

class Supervisor:
    """Forks the crew, keeps it up, and stops it."""
    def __init__(self, crew: Crew, count: int, held: Collection[int] = ()) -> None:
        self.crew = crew
        self.stopping = False
        self.stop_signal = 0  # the second signal: leave with 128 + n
        self.status = 0
        self._held = held  # descriptors that only the supervisor may have
        self._kill_at = math.inf
        # Asked now: the terminal is gone when it hangs up. nohup has it ignored.
        self._on_terminal = _has_terminal() and \
            signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        processes = min(count, os.cpu_count() or 1)
        shares = [len(range(at, count, processes)) for at in range(processes)]
        self._children = [_Child(slots, Ledger(slots)) for slots in shares]
        self._neighbours = Neighbours(shares)
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
                    self._obey(number)
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

    def _fork(self, child: _Child) -> None:
        supervisor = os.getpid()
        def work() -> int:
            signal.set_wakeup_fd(-1)
            for handle in (*self._held, self._life, self._ready):
                os.close(handle)
            become_subreaper()
            number = self._children.index(child)
            post = Post(number, self._neighbours, child.slots, supervisor,
                        self._lifeline, self._ready_end, child.ledger, child.inherited)
            return Worker(self.crew, post).run()
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            child.pid, child.started = fork_child(work, self.crew.say), time.monotonic()
        except OSError as error:
            self.crew.say(f"cannot start a worker process: {error.strerror}")
            child.spawn_at = time.monotonic() + 1.0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _reap(self) -> None:
        for pid, status in reap():
            for child in self._children:
                if child.pid == pid:
                    child.pid = 0
                    self._on_end(child, status)

    def _on_end(self, child: _Child, status: int) -> None:
        """A worker ended: as told, or drained, or in a crash that we make good."""
        if status == 1 or (status == 0 and (self.stopping or self.crew.drain)):
            # Told to, drained, or unable to go on: in each case this one is over.
            self.status = max(self.status, status)
            child.spawn_at = math.inf
            if all(one.spawn_at == math.inf and not one.pid for one in self._children):
                self.stopping = True
            return
        worker, grace_s, marks = child.ledger.read()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self.crew.say(f"worker process of {worker or 'an unknown worker'} ended: {how}")
        if self.stopping:
            end_marked(marks, self._kill_grace())
            self.status = 1
            return
        earlier = () if grace_s is not None else child.inherited
        child.inherited = (*earlier, (worker, tuple(marks))) if worker else earlier
        child.ledger = Ledger(child.slots)
        now = time.monotonic()
        if now - child.started > STEADY_AFTER_S:
            child.pause_s = RESPAWN_PAUSE_S
        child.spawn_at = now + child.pause_s
        child.pause_s = min(2 * child.pause_s, RESPAWN_PAUSE_MAX_S)

    def _kill_grace(self) -> float:
        """As the workers have it, which may have learnt of another."""
        return max(self.crew.settings.kill_grace,
                   *(child.ledger.read()[1] or 0.0 for child in self._children))

    def _end_inherited(self) -> None:
        """End what dead workers left running, where nobody came after them."""
        left = [mark for child in self._children if child.ledger.read()[1] is None
                for _, marks in child.inherited for mark in marks]
        if left:
            end_marked(left, self._kill_grace())
            self.status = 1

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP and not self._on_terminal:
            self.crew.say("SIGHUP: reading the settings again")
            environment = reread(self.crew.say)
            if environment:
                self.crew = dataclasses.replace(self.crew, environment=environment)
                self._signal(signal.SIGHUP)
        elif number in STOPS and not self.stopping:
            self.stopping = True
            self.crew.say("stopping: running jobs may end; once more ends them now")
            self._signal(signal.SIGTERM)
        elif number in STOPS and not self.stop_signal:
            self.stop_signal = number
            self.crew.say("stopping now: running jobs are ended and handed back")
            self._signal(NOW)
            self._kill_at = time.monotonic() + self._kill_grace() + 3

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.pid:
                send(child.pid, number)

def _has_terminal() -> bool:
    """Whether a terminal controls us: then SIGHUP means that it went away."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False

def launch(crew: Crew, count: int, pid_file: str, log_file: str) -> int:
    """Run the crew here or, given a log, as a daemon; the exit status."""
    held = hold_pid_file(pid_file) if pid_file else -1
    if log_file:
        return _daemonize(crew, count, pid_file, log_file, held)
    return _serve(crew, count, pid_file, held)

def _serve(crew: Crew, count: int, pid_file: str, held: int,
           ready_end: int = -1) -> int:
    if held >= 0:
        os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    served = f"queues {', '.join(crew.queues)}" if crew.queues else "all queues"
    slots = f"{count} slot{'s' * (count > 1)}"
    def announce() -> None:
        crew.say(f"{slots} ready, serving {served} of {crew.target}")
        if ready_end >= 0:
            with contextlib.suppress(BrokenPipeError):  # the starter did not wait
                os.write(ready_end, b"+")
            os.close(ready_end)
    try:
        return Supervisor(crew, count, [held] if held >= 0 else []).run(announce)
    finally:
        crew.say("stopped")
        # Somebody may have removed it, and another daemon have made its own.
        if held >= 0 and _same_file(held, pid_file):
            with contextlib.suppress(OSError):
                os.unlink(pid_file)

def _daemonize(crew: Crew, count: int, pid_file: str, log_file: str, held: int) -> int:
    """Fork the daemon and wait until it is ready; if it dies first, print why."""
    read_end, write_end = os.pipe()
    try:
        os.close(os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
    except OSError as error:
        raise Problem(f"cannot write the log {log_file}: {error.strerror}",
                      "name another one: --log-file FILE") from None
    def serve() -> int:
        os.close(read_end)
        os.setsid()
        with open(os.devnull) as null:
            os.dup2(null.fileno(), 0)
        quiet = dataclasses.replace(crew, say=Log(log_file).say, verbose=False)
        return _serve(quiet, count, pid_file, held, write_end)
    pid = fork_child(serve, crew.say)
    os.close(write_end)
    os.close(held)
    ready, _, _ = select.select([read_end], [], [], READY_WAIT_S)
    if ready and os.read(read_end, 1):
        print(f"worker daemon started: PID {pid} in {pid_file}, log in {log_file}",
              file=sys.stderr)
        return 0
    if not ready:
        send(pid, signal.SIGTERM)
    raise Problem(f"the worker daemon did not get ready{_log_tail(log_file)}",
                  f"see {log_file}", UNAVAILABLE)

def _log_tail(path: str) -> str:
    with contextlib.suppress(OSError), open(path, errors="replace") as log:
        lines = [line.rstrip() for line in log.readlines()[-5:]]
        return ":\n  " + "\n  ".join(lines) if lines else ""
    return ""

def stop_daemon(path: str, now: bool, timeout_s: float,
                waits_for: Callable[[int], str]) -> int:
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
        _whisper(f"no worker daemon: {why}\n"
                 "  start one: queuectl worker start --daemon")
        return 0
    if not standing.pid:
        raise Problem(f"the PID file {path} is held, but names no process",
                      "its daemon may be starting; look again: queuectl status")
    with contextlib.suppress(ProcessLookupError), pinned(standing.pid) as handle:
        if probe_pid_file(path) != standing:
            raise Problem(f"the PID file {path} has just changed hands",
                          "look again: queuectl status")
        if not holds(standing.pid, path):
            raise Problem(f"the PID file {path} names process {standing.pid}, which is "
                          "not the one that holds it: nothing was signalled",
                          "stop the daemon in the container or on the host it runs in")
        for number in [signal.SIGTERM] + [signal.SIGINT] * now:
            send(standing.pid, number, handle)
        return _await_end(path, standing, timeout_s, waits_for)
    return 0

def _await_end(path: str, standing: Standing, timeout_s: float,
               waits_for: Callable[[int], str]) -> int:
    started, daemon = time.monotonic(), f"worker daemon {standing.pid}"
    say_at = started + 1
    while probe_pid_file(path) == standing:
        now = time.monotonic()
        if now - started >= timeout_s:
            _whisper(f"{daemon} is still stopping after {say_duration(timeout_s)}"
                     f"{waits_for(standing.pid)}")
            return TIMED_OUT
        if now >= say_at:
            say_at = now + 10
            _whisper(f"{daemon} stops{waits_for(standing.pid)}")
        time.sleep(0.05)
    _whisper(f"{daemon} has stopped")
    return 0


# ---- server ------------------------------------------------------------------
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
            send(pid, signal.SIGTERM)
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


# ---- screen ------------------------------------------------------------------
#
# What people and programs read. Results go to standard output, talk to standard error.
# No control character of a command or its output reaches a terminal.

BOX = ("┌─┬┐", "│ ││", "├─┼┤", "└─┴┘")
ASCII_BOX = ("+-++", "| ||", "+-++", "+-++")

def escaped(text: str) -> str:
    """`text` on one line, with its control characters shown."""
    return text.translate(ESCAPES)

def say(text: str) -> None:
    """A line of talk."""
    print(text, file=sys.stderr)

def put(text: str) -> None:
    """A line of the result; what the locale cannot show becomes `?`."""
    try:
        print(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "replace").decode(encoding))

def put_json(document: Json) -> None:
    print(json.dumps(document))

def put_output(pieces: Iterable[bytes]) -> None:
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
        put("")

def columns_of(text: str) -> int:
    """How many columns a terminal gives `text`."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(1 + (unicodedata.east_asian_width(char) in "WF")
               for char in text if not unicodedata.combining(char))

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

def put_progress(part: float) -> None:
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

def put_table(titles: Sequence[str], rows: Iterable[Sequence[object]],
              spare: Sequence[str] = ()) -> None:
    """A table. Where the terminal is too narrow, its last column gives way down to 12
    columns, then the `spare` ones are left out in their order."""
    columns = [list(column) for column in zip(titles, *(
        [escaped("" if cell is None else str(cell)) for cell in row] for row in rows))]
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
    put(rule(top))
    for number, row in enumerate(zip(*columns)):
        inside = f" {sides[2]} ".join(map(fit, row, widths))
        put(f"{sides[0]} {inside} {sides[3]}")
        if number == 0:
            put(rule(middle))
    put(rule(bottom))

def put_rows(rows: Sequence[Mapping[str, Json]], as_json: bool, titles: Sequence[str],
             keys: Sequence[str], spare: Sequence[str] = ()) -> None:
    """Rows for programs, an object a line, or as a table of these keys."""
    if as_json:
        for row in rows:
            put_json(dict(row))
    else:
        shown = {True: "yes", False: ""}
        put_table(titles, [[shown[cell] if isinstance(cell := row[key], bool) else cell
                            for key in keys] for row in rows], spare)


# ---- explain -----------------------------------------------------------------
#
# Why a job is where it is: one sentence, with the numbers.

TIMES_WORDS = ("never", "once", "twice", "three times", "four times", "five times")

def explain(desk: Office, job_id: str) -> tuple[View, str]:
    """A job, and the sentence; Problem if there is no such job."""
    [now] = desk.rows(lambda now: now, "SELECT UTC_TIMESTAMP(6)")
    found = desk.whole(job_id)
    return found.view, _Explanation(desk, found, now).sentence()

class _Explanation:
    def __init__(self, desk: Office, job: Whole, now: datetime.datetime) -> None:
        self.desk, self.job, self.view, self.now = desk, job, job.view, now

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
        return self.desk.rows(lambda *row: row, statement, *values)

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
        return f"attempt {number} of {max(self.view.allowed, number)}"

    def _later(self) -> str:
        view, next_one = self.view, self._attempt(self.view.attempts + 1)
        if view.next_run_at and view.next_run_at <= self.now:
            return f"due ({next_one}): {self._pending()}"
        failed = f"; {self._outcome(1)}" if view.state == State.FAILED else ""
        unserved = self._unserved()
        return (f"due in {self._since(view.next_run_at)} ({next_one}){failed}"
                + f"; then {unserved}" * bool(unserved))

    def _serving(self) -> list[dict[str, Json]]:
        return [worker for worker in self.desk.workers() if worker["state"] == "running"
                and self.view.queue in (as_list(worker["queues"]) or [self.view.queue])]

    def _unserved(self) -> str:
        name = self.view.queue
        return "" if self._serving() else (
            f"no live worker serves queue `{name}`; start one: "
            f"queuectl worker start --queue {name}")

    def _pending(self) -> str:
        view, name, busy = self.view, self.view.queue, f"queue `{self.view.queue}`"
        for limit, paused in self._rows("SELECT max_running, paused_at FROM queues "
                                        "WHERE name = %s", name):
            if paused:
                return f"{busy} paused; resume it: queuectl queue resume {name}"
            running = [str(one[0]) for one in self._rows(
                "SELECT id FROM jobs WHERE state = 'processing' AND queue = %s", name)]
            if limit is not None and len(running) >= int(limit):
                by = f" by {some_of(running)}" if running else ""
                return f"limit {limit} of `{name}` reached{by}{self._ahead()}"
        unserved = self._unserved()
        if unserved:
            return unserved
        if self._rows("SELECT 1 FROM jobs WHERE seq = %s AND losses >= %s", view.seq,
                      ALONE_AFTER_LOSSES):
            return "lost with its worker twice: it runs alone, once a worker is idle"
        slots, taken = (sum(int(str(one[key])) for one in self._serving())
                        for key in ("slots", "busy"))
        free = f"{slots - taken} of {slots} slots that serve {busy} are free"
        return f"{self._ahead()[2:] or 'next in ' + busy}; {free}"

    def _ahead(self) -> str:
        view = self.view
        [count] = self.desk.rows(
            int, "SELECT COUNT(*) FROM (SELECT 1 FROM jobs FORCE INDEX (jobs_claim) "
            "WHERE state = 'pending' AND queue = %s AND (claim_order < %s OR "
            f"(claim_order = %s AND seq < %s)) LIMIT {COUNTED_UP_TO}) AS ahead",
            view.queue, -view.priority, -view.priority, view.seq)
        more = f"{count:,}" + "+" * (count == COUNTED_UP_TO)
        return f"; {more} job{'s' * (count != 1)} ahead in queue `{view.queue}`" \
            if count else ""

    def _processing(self) -> str:
        view = self.view
        limit = f", time limit {say_duration(view.timeout)}" if view.timeout else ""
        text = (f"runs on {self._host()} for {self._since(view.started_at)} "
                f"({self._attempt(view.attempts)}{limit})")
        for asked, beat_at, lease in self.desk.rows(
                lambda *row: row, "SELECT cancel_requested_at, heartbeat_at, lease "
                "FROM jobs LEFT JOIN workers ON workers.id = worker WHERE seq = %s",
                view.seq):
            if asked:
                text += f"; cancelled {self._ago(asked)}, its worker is to end it"
            if not beat_at:
                text += f"; its worker {view.worker} is gone, another is to take over"
            elif (self.now - beat_at).total_seconds() > lease / 2:
                text += (f"; its worker {view.worker} has been silent for "
                         f"{self._since(beat_at)}: lost after {say_duration(lease)}, "
                         "if another is there to see")
        return text

    def _blocked(self) -> str:
        unmet = self._rows(f"SELECT id, state, worker FROM {PARENTS} WHERE child = %s "
                           f"AND NOT {MET} ORDER BY parent", self.view.seq)
        if not unmet:
            return "being enqueued together with many others"
        told = [f"{name}, which " + (f"runs on {self._host(worker)}" if state ==
                                     State.PROCESSING else f"is {state}")
                for name, state, worker in unmet[:3]]
        more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
        return f"waits for {'; '.join(told)}{more}"

    def _outcome(self, times: int) -> str:
        view = self.view
        what = f"{view.reason} {view.exit_code}" if view.reason == Reason.EXIT \
            else str(view.reason)
        often = TIMES_WORDS[times] if times < len(TIMES_WORDS) else f"{times} times"
        return f"{what} {often}"

    def _dead(self) -> str:
        view = self.view
        times = sum((run.reason, run.exit_code) == (view.reason, view.exit_code)
                    for run in self.job.history)
        [(line,)] = self._rows("SELECT last_line FROM dlq WHERE seq = %s",
                               view.seq) or [("",)]
        if view.reason == Reason.DEPENDENCY:
            return f"dead: {line}"
        last = f', last line "{line}"' if line else ""
        return f"dead: {self._outcome(times)}{last}"


# ---- check -------------------------------------------------------------------
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

def check_all(target: Target, settings: Settings) -> Iterator[Check]:
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
        yield from _check_work(Office(one, settings))

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

def _check_work(desk: Office) -> Iterator[Check]:
    idle = desk.unserved()
    yield Check("queues", not idle, f"no live worker serves {some_of(idle)}, where "
                "jobs wait" if idle else "all that may run now are served",
                f"start one: queuectl worker start --queue {','.join(idle)}")
    dead = desk.count_dead_letters(Filter("TRUE", ()))
    yield Check("dead letters", dead <= MANY_LETTERS, f"{dead:,}",
                "see: queuectl dlq groups; then dlq retry or purge --state dead")


# ---- bench -------------------------------------------------------------------
#
# What this MySQL and this host carry, in one run, in a queue of its own that is gone
# afterwards. Medians of ROUNDS rounds, after one that does not count; each drain stands
# beside xargs, a bare loop of the same spawns.

ROUNDS, PICK_UPS, PICK_UP_S, IDLE_S = 3, 40, 30.0, 6.0

class Bench:
    """One run of the benchmark, in the queue `name`."""
    def __init__(self, desk: Office, count: int, jobs: int) -> None:
        self.desk, self.count, self.jobs = desk, count, jobs
        self.name = f"bench-{secrets.token_hex(4)}"
        self._steps = itertools.count(1)

    def run(self) -> dict[str, Json]:
        """The figures; Problem where other workers would take the jobs."""
        if not shutil.which("xargs"):
            raise Problem("xargs is not here, and the drain is to stand beside it",
                          "install findutils")
        if any(not worker["queues"] for worker in self.desk.workers()):
            raise Problem("workers serve all queues: they would take the bench's jobs",
                          "stop them first: queuectl worker stop")
        try:
            rounds = [self._round() for _ in range(ROUNDS + 1)][1:]
            enqueued, drained, bare = map(median, zip(*rounds))
            command = median([self._timed(lambda: self._queuectl(
                "enqueue", "-q", "-c", "true")) for _ in range(5)])
            return {"server": self.desk.database.version, "cpus": os.cpu_count() or 1,
                    "count": self.count, "jobs": self.jobs,
                    "enqueue_per_s": round(enqueued), "drain_per_s": round(drained),
                    "xargs_per_s": round(bare),
                    "drain_to_xargs": round(drained / bare, 2),
                    "enqueue_command_ms": round(command * 1e3), **self._one_by_one()}
        finally:
            database, ours = self.desk.database, "SELECT seq FROM jobs WHERE queue = %s"
            while seqs := database.rows(int, f"{ours} LIMIT 1000", self.name):
                for table, column in (("runs", "job"), ("dlq", "seq"), ("jobs", "seq")):
                    database.run(f"DELETE FROM {table} WHERE {column} IN %s", seqs)

    def _round(self) -> tuple[float, float, float]:
        """Jobs a second: enqueued, drained by `worker start`, and run by xargs."""
        lines, cpus = b"true\n" * self.jobs, str(os.cpu_count() or 1)
        spool = spool_lines(lines.splitlines(), False, {"queue": self.name})
        return (self.jobs / self._timed(
                    lambda: enqueue(self.desk.database, spool, False)),
                self.jobs / self._timed(lambda: self._queuectl(
                    "worker", "start", "--count", str(self.count), "--drain")),
                self.jobs / self._timed(lambda: subprocess.run(
                    ["xargs", "-P", cpus, "-I{}", "sh", "-c", "{}"], input=lines,
                    check=True)))

    def _one_by_one(self) -> dict[str, Json]:
        """How soon single jobs start on an idle queue, and what idling costs."""
        with tempfile.TemporaryDirectory() as folder:
            worker = self._start("worker", "start")
            try:
                waits = sorted(self._pick_ups(os.path.join(folder, "fifo")))
                before = self._used()
                time.sleep(IDLE_S)
                after = self._used()
            finally:
                worker.terminate()
                worker.wait()
        figures = [waits[len(waits) // 2], waits[len(waits) * 95 // 100], waits[-1]]
        p50, p95, worst = [round(wait * 1e3, 1) for wait in figures]
        return {"pick_up_p50_ms": p50, "pick_up_p95_ms": p95, "pick_up_worst_ms": worst,
                "idle_queries_per_s": round((after[0] - before[0] - 1) / IDLE_S, 2),
                "idle_cpu_s_per_minute": round((after[1] - before[1]) * 60 / IDLE_S, 2)}

    def _pick_ups(self, fifo: str) -> Iterator[float]:
        """Seconds from the commit to the command's first output."""
        os.mkfifo(fifo)
        job = {"command": f"echo >{shlex.quote(fifo)}", "queue": self.name}
        with open(os.open(fifo, os.O_RDWR), "rb", buffering=0) as told:
            for number in range(PICK_UPS + 1):
                spool = Spool()
                spool.add(check_job(job, {}))
                enqueue(self.desk.database, spool, False)
                committed = time.monotonic()
                ring(self.desk.database, 1, spool.queues)
                if not select.select([told], [], [], PICK_UP_S)[0]:
                    raise Problem(f"no job started within {say_duration(PICK_UP_S)}",
                                  "see why: queuectl worker start")
                told.read(1)
                if number:  # the first one waited for the worker's start
                    yield time.monotonic() - committed
                time.sleep(0.1)  # the worker is idle again

    def _used(self) -> tuple[int, float]:
        """Queries that the server has had, and CPU seconds that our worker has used."""
        [questions] = self.desk.rows(
            lambda _, value: int(value), "SHOW GLOBAL STATUS LIKE 'Questions'")
        return questions, sum(cpu_seconds(int(str(worker["pid"])))
                              for worker in self.desk.workers()
                              if worker["queues"] == [self.name])

    def _queuectl(self, *argv: str) -> None:
        if status := self._start(*argv).wait():
            raise Problem(f"queuectl {' '.join(argv)} ended with status {status}",
                          "see why: run it by hand")

    def _start(self, *argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *argv, "--queue", self.name],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _timed(self, work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        took = time.monotonic() - started
        put_progress(next(self._steps) / (3 * (ROUNDS + 1) + 5))
        return took

def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


# ---- commands ----------------------------------------------------------------
#
# What a person can type. A command's name, arguments, help and body stand together; the
# parser, --help, README's table and the tests read COMMANDS.

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

def command(name: str, *args: Arg,
            examples: Sequence[str] = ()) -> Callable[[Body], Body]:
    def declare(body: Body) -> Body:
        COMMANDS[name] = Command(name, body, args, examples)
        return body
    return declare

def arg(*names: str, **options: object) -> Arg:
    return names, options

def option(kind: Kind[T]) -> Callable[[str], T]:
    """A Kind as argparse wants it."""
    def read(text: str) -> T:
        try:
            return kind.convert(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"expected {kind.expects}, not {excerpt(text)}") from None
    return read

AS_JSON = arg("--json", action="store_true", help="for programs: an object a line")
IDS = arg("ids", nargs="+", metavar="ID", help="the job's id")
ID = arg("id", metavar="ID", help="the job's id")
LIMIT = arg("--limit", type=option(whole(0, 10**9)), metavar="N",
            help="at most so many rows; 0: all (default 100, with --json all)")
PID_FILE = arg("--pid-file", metavar="FILE",
               help="the daemon's PID file (default $PID_FILE or ./workers.pid)")
def option_of(key: str) -> str:
    return "--" + key.replace("_", "-")

COMMAND_OPTION = arg("-c", dest="command", metavar="CMD", help="a shell command",
                     type=option(COMMAND))
JOB_OPTIONS = tuple(
    arg(option_of(name), dest=name, help=key.help, metavar=key.metavar,
        **({"action": "append"} if name in REPEATABLE else {"type": option(key.kind)}))
    for name, key in JOB_KEYS.items() if name != "command")

def configured_by(environment: Environment, policy: Policy) -> Configured:
    """The settings in force, the stored ones read from the database."""
    with contextlib.closing(Database(find_target(environment), policy)) as database:
        return configure(environment, read_config(database))

@contextlib.contextmanager
def office(policy: Policy = READING) -> Iterator[Office]:
    """The queue as a person reaches it, with the settings in force."""
    environment = Environment.read()
    with contextlib.closing(Database(find_target(environment), policy)) as database:
        yield Office(database, configure(environment, read_config(database)).settings)

def report(results: Iterable[Result], as_json: bool, desk: Office | None = None) -> int:
    """Print what a verb did to each job, and tell `desk`'s workers; 1 if one failed."""
    status = 0
    for result in results:
        if as_json:
            put_json({"id": result.id, "ok": result.ok, "state": result.state,
                      "error": None if result.ok else result.error})
        elif result.ok:
            put(f"job {result.id} {result.note}")
        else:
            _whisper(f"{result.error}")
        sys.stdout.flush()
        status |= not result.ok
    if desk:
        ring(desk.database)
    return status

# -- enqueue

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
    examples=("""enqueue '{"command":"echo hello","max_retries":3}'""",
              "enqueue -c 'sleep 5 && echo done' --priority 10",
              "enqueue -- tar czf /backup/etc.tgz /etc",
              "enqueue --lines commands.txt --queue etl"))
def enqueue_jobs(args: argparse.Namespace) -> None:
    """Add jobs to the queue.

    A job comes as JSON, after -c, after --, or a line each from -f or --lines. Options
    fill what the JSON leaves out. More than one job: all or none.
    """
    spool = _spool_jobs(args, _job_defaults(args))
    if len(spool):
        target = find_target(Environment.read())
        with contextlib.closing(Database(target, WRITING)) as database:
            held = enqueue(database, spool, args.if_absent)
            ring(database, len(spool), spool.queues)
            if not args.quiet:
                _print_ids(database, spool, args, held)

def _job_defaults(args: argparse.Namespace) -> dict[str, object]:
    values = {name: getattr(args, name) for name in JOB_KEYS
              if name not in ("command", "env") and getattr(args, name) is not None}
    for name in NEEDS.keys() & values.keys():
        values[name] = JOB_IDS.read_json(values[name], option_of(name))
    if args.env:
        pairs = [text.partition("=") for text in args.env]
        if not all(name and sign for name, sign, _ in pairs):
            raise Problem("--env: expected NAME=VALUE", status=USAGE)
        values["env"] = JOB_KEYS["env"].kind.read_json(
            {name: value for name, _, value in pairs}, "--env")
    if "delay" in values and "run_at" in values:
        raise Problem("--delay and --run-at: give only one", status=USAGE)
    return values

def _spool_jobs(args: argparse.Namespace, defaults: Job_Values) -> Spool:
    if args.document == "-":
        args.document, args.file = None, "-"
    sources = (args.document, args.command, args.rest or None, args.file, args.lines)
    given = sum(source is not None for source in sources)
    if given != 1:
        raise Problem("enqueue takes exactly one of: JSON, -c CMD, -- PROG ARG…, "
                      f"-f FILE, --lines FILE; {given} were given",
                      "see: queuectl help enqueue", USAGE)
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

def _print_ids(database: Database, spool: Spool, args: argparse.Namespace,
               held: Mapping[str, str]) -> None:
    """The ids, `held` giving those that stand for another; with --if-absent or a job
    that waits for others, the states as they are now."""
    jobs = ((held.get(str(job["id"]), str(job["id"])),
             str(job.get("state", State.PENDING))) for job in spool)
    for page in pages(jobs):
        now = {}
        if (args.if_absent or spool.linked) and args.json:
            now = states_of(database, [job_id for job_id, _ in page])
        for job_id, state in page:
            if args.json:
                put_json({"id": job_id, "state": now.get(job_id, state)})
            else:
                put(job_id)

# -- workers

@command(
    "worker start", arg("--count", type=option(whole(1, 1024)), default=1, metavar="N",
                        help="jobs at once (default 1)"),
    arg("--daemon", action="store_true", help="run in the background, with a PID file"),
    arg("--queue", action="append", metavar="A,B", help="serve these queues only"),
    arg("--drain", action="store_true", help="exit 0 once nothing is left to run"),
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
    environment = Environment.read()
    target = find_target(environment)
    names = [name for part in args.queue or [] for name in part.split(",") if name]
    queues = tuple(dict.fromkeys(QUEUE_NAME.read(name, "--queue") for name in names))
    if args.queue and not queues:
        raise Problem("--queue names no queue", status=USAGE)
    configured = configured_by(environment, WRITING)
    for complaint in [*configured.complaints, *_readable_dotenv(environment)]:
        _whisper(f"warning: {complaint}")
    signing_key()  # an unreadable file is found now
    # Absolute paths: a job's directory is its worker's too, for a moment.
    target = dataclasses.replace(
        target, socket=target.socket and absolute(target.socket),
        ssl_ca=target.ssl_ca and absolute(target.ssl_ca))
    crew = Crew(target, environment, configured.settings, queues, args.drain,
                args.grace, sys.stderr.isatty(), Log().say)
    pid_file = args.pid_file or (_pid_file(environment) if args.daemon else "")
    log_file = args.log_file or os.path.join(os.path.dirname(pid_file), "workers.log")
    return launch(crew, args.count, pid_file and absolute(pid_file),
                  absolute(log_file) if args.daemon else "")

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
    "worker stop", PID_FILE,
    arg("--timeout", type=option(duration()), default=math.inf, metavar="D",
        help="wait no longer than this; still stopping: exit 124"),
    arg("--now", action="store_true", help="end running jobs and hand them back"),
    examples=("worker stop", "worker stop --timeout 30s", "worker stop --now"))
def worker_stop(args: argparse.Namespace) -> int:
    """Stop the daemon: its running jobs may end first."""
    environment = Environment.read()
    def waits_for(pid: int) -> str:
        policy = dataclasses.replace(READING, timeout_s=2)
        with contextlib.suppress(Problem), \
                contextlib.closing(Database(find_target(environment), policy)) as base:
            ids = Office(base, Settings()).running_under(socket.gethostname(), pid)
            return f", waiting for {some_of(ids)}" if ids else ""
        return ""
    path = args.pid_file or _pid_file(environment)
    return stop_daemon(path, args.now, args.timeout, waits_for)

@command("worker list", AS_JSON, examples=("worker list", "worker list --json"))
def worker_list(args: argparse.Namespace) -> None:
    """Show the worker processes of all hosts."""
    with office() as desk:
        rows = desk.workers()
    if args.json:
        for row in rows:
            put_json(row)
        return
    _put_workers(rows)
    slots = sum(int(str(row["slots"])) for row in rows)
    hosts = len({row["host"] for row in rows})
    put(f"{slots} slot{'s' * (slots != 1)} on {hosts} host{'s' * (hosts != 1)}")

def _put_workers(rows: Sequence[dict[str, Json]]) -> None:
    put_table(["Worker", "Host", "PID", "Busy", "Heartbeat", "State", "Queues"],
              [[row["id"], row["host"], row["pid"], f"{row['busy']}/{row['slots']}",
                row["heartbeat_at"], row["state"],
                ", ".join(map(str, as_list(row["queues"]))) or "all"]
               for row in rows], spare=["Heartbeat", "Host"])

# -- looking

@command(
    "status", arg("--exact", action="store_true", help="count every job, however many"),
    arg("--watch", nargs="?", type=option(number(0.1, 3600)), const=2.0, metavar="S",
        help="show it again every S seconds (default 2)"),
    PID_FILE, AS_JSON, examples=("status", "status --watch", "status --json"))
def status(args: argparse.Namespace) -> None:
    """Count jobs by state, and show the daemon, queues and workers."""
    path = args.pid_file or _pid_file(Environment.read())
    with office() as desk:
        while True:
            if args.watch and sys.stdout.isatty() and not args.json:
                put("\x1b[2J\x1b[H")
            _put_status(desk, path, args)
            if not args.watch:
                return
            sys.stdout.flush()
            time.sleep(args.watch)

def _put_status(desk: Office, path: str, args: argparse.Namespace) -> None:
    counts, capped = desk.states(args.exact)
    queues, workers, standing = desk.queues(), desk.workers(), probe_pid_file(path)
    where = f"{desk.database.target} (from {desk.database.target.source})"
    if args.json:
        put_json({"database": where, "states": dict(counts), "capped": list(capped),
                  "queues": list(queues), "workers": list(workers),
                  "daemon": {"pid_file": path, "pid": standing.pid or None,
                             "alive": standing.alive}})
        return
    put(f"database: {where}\nJob counts by state:")
    put_table(["State", "Count"],
              [[state, f"{counts[state]}{'+' * (state in capped)}"]
               for at, state in enumerate(State) if at < 5 or counts[state]])
    if not standing.found:
        put(f"No worker PID file at {path}")
    elif standing.alive:
        put(f"Worker PID file found at {path}\n{standing.pid}")
    else:
        put(f"Worker PID file found at {path} (stale, no daemon holds it)")
    if queues:
        put_table(["Queue", "Pending", "Processing"],
                  [[row["queue"], row[State.PENDING], row[State.PROCESSING]]
                   for row in queues])
    if workers:
        _put_workers(workers)
    for name in desk.unserved():
        say(f"warning: jobs wait in queue {name}, and no live worker serves it; "
            f"start one: queuectl worker start --queue {name}")

@command(
    "list", arg("--state", metavar="S", help="only jobs in this state"),
    arg("--queue", type=option(QUEUE_NAME), metavar="Q", help="only of this queue"),
    LIMIT, AS_JSON,
    examples=("list", "list --state failed", "list --state pending --queue etl --json"))
def list_jobs(args: argparse.Namespace) -> None:
    """List jobs, the newest first."""
    if args.state is not None and args.state not in list(State):
        raise Problem(f"--state: no such state: {excerpt(args.state)}",
                      nearest(args.state, State) or f"states: {' '.join(State)}", USAGE)
    limit = _limit(args)
    with office() as desk:
        views = desk.jobs(args.state, args.queue, limit)
        if args.json:
            for view in views:
                put_json(view.as_json())
            return
        shown = list(views)
        full = len(shown) == limit
        total = desk.count(args.state, args.queue) if full else len(shown)
    put_table(["Id", "State", "Attempt", "Queue", "When", "Command"],
              [[view.id, view.state, f"{view.attempts}/{view.allowed}", view.queue,
                _short(_when(view)), view.command[:400]] for view in shown],
              spare=["When", "Queue"])
    _say_total(len(shown), total)

def _limit(args: argparse.Namespace) -> int:
    """How many rows to show; 0: all."""
    if args.limit is None:
        return 0 if args.json else 100
    return int(args.limit)

def _say_total(shown: int, total: int) -> None:
    if total > shown:
        some = f"{COUNTED_UP_TO:,}+" if total > COUNTED_UP_TO else f"{total:,}"
        say(f"{shown:,} of {some}; --limit 0 for all")

def _when(view: View) -> Moment:
    """The time that matters in this state."""
    return {State.PROCESSING: view.started_at, State.PENDING: view.created_at,
            State.SCHEDULED: view.next_run_at, State.FAILED: view.next_run_at,
            State.BLOCKED: view.created_at}.get(State(view.state), view.finished_at)

def _short(moment: Moment) -> str:
    return str(moment or "")[:19]

@command("show", ID, AS_JSON, examples=("show my-job", "show my-job --json"))
def show(args: argparse.Namespace) -> None:
    """Show all of one job: its settings, history and output."""
    with office() as desk:
        whole_job = desk.whole(args.id)
    view, history = whole_job.view, whole_job.history
    output = whole_job.output.decode("utf-8", "replace")
    if args.json:
        put_json({**view.as_json(), "cwd": whole_job.cwd, "env": dict(whole_job.env),
                  "after": list(whole_job.after), "output": output,
                  "history": [as_json(run, "run") for run in history]})
        return
    facts = {**view.as_json(), "attempts": f"{view.attempts}/{view.allowed}",
             "cwd": whole_job.cwd, "after": " ".join(whole_job.after),
             "env": " ".join(f"{name}=***" for name in whole_job.env)}
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, ""):
            put(f"{name:{width}}  {escaped(str(value))}")
    if history:
        put("history:")
        put_table(["Run", "Attempt", "Started", "Seconds", "Exit", "Worker", "Reason"],
                  [[run.run, run.attempt, say_time(run.started_at),
                    "" if run.duration is None else f"{run.duration:.3f}",
                    run.exit_code, run.worker, _why(run)] for run in history],
                  spare=["Worker", "Attempt"])
    if output:
        put("output:")
        put(output.translate(MULTILINE).rstrip("\n"))

def _why(run: Run) -> str:
    """How a run ended, with what is to be said of it."""
    return f"{run.reason or 'running'}{': ' * bool(run.detail)}{run.detail or ''}"

@command(
    "logs", ID, arg("-f", "--follow", action="store_true",
                    help="go on until the job has ended, whatever host it runs on"),
    arg("--run", type=option(whole(1, 2**31)), metavar="N",
        help="of this run, as show numbers them (default: the last)"),
    examples=("logs my-first-job", "logs -f my-first-job", "logs my-job > out.bin"))
def logs(args: argparse.Namespace) -> None:
    """Print the output of a job's last run; raw on a pipe."""
    with office(FOLLOWING if args.follow else READING) as desk:
        whole_job = desk.whole(args.id)
        runs = [run.run for run in whole_job.history]
        if args.run and args.run not in runs:
            kept = ", ".join(map(str, runs)) or "none"
            raise Problem(f"job {args.id} has no run {args.run} to show: {kept}",
                          f"see: queuectl show {args.id}")
        if args.follow:
            put_output(desk.follow(args.id, args.run or max(runs, default=0)))
        elif args.run:
            put_output([desk.output(whole_job.view.seq, args.run)])
        else:
            put_output([whole_job.output])
    if not whole_job.history and not args.follow:
        say(f"job {args.id} is {whole_job.view.state} and has not run yet")

@command(
    "wait", arg("ids", nargs="+", metavar="ID", help="a job's id; - reads them"),
    arg("--any", action="store_true", help="until one has ended"),
    arg("--timeout", type=option(duration()), default=math.inf, metavar="D",
        help="wait no longer than this: exit 124"),
    AS_JSON, examples=("wait build test --timeout 10m",
                       "enqueue --lines commands.txt | queuectl wait -"))
def wait(args: argparse.Namespace) -> int:
    """Wait until jobs have ended; exit 0 if all completed.

    Exit 1 if one ended otherwise, 124 if --timeout ran out.
    """
    ids = [word for one in args.ids for word in
           (sys.stdin.read().split() if one == "-" else [one])]
    policy = dataclasses.replace(
        FOLLOWING, patience_s=min(FOLLOWING.patience_s, args.timeout))
    with office(policy) as desk:
        return report(desk.wait(ids, args.any, args.timeout), args.json)

@command("run", COMMAND_OPTION, *JOB_OPTIONS,
         examples=("run -- make test", "run -c 'make && make install' --queue build"))
def run_here(args: argparse.Namespace) -> int:
    """Enqueue a command, show its output, leave with its status.

    No retries, no time limit, and this directory, unless told. Ctrl-C cancels it.
    """
    given = {"max_retries": 0, "timeout": 0, "cwd": absolute("."),
             **_job_defaults(args)}
    if bool(args.command) == bool(args.rest):
        raise Problem("run takes -c CMD, or -- PROG ARG…", "see: queuectl help run",
                      USAGE)
    spool = Spool()
    spool.add(check_job({"command": args.command or shlex.join(args.rest)}, given))
    with office(FOLLOWING) as desk:
        enqueue(desk.database, spool, False)
        job_id, cancelled = spool.first_id, False
        try:
            ring(desk.database, 1, spool.queues)
            put_output(desk.follow(job_id, 0, lambda: _whisper(
                f"job {job_id} has not started: {explain(desk, job_id)[1]}")))
        except KeyboardInterrupt:
            cancelled = True
            _whisper(f"cancelling job {job_id}; again leaves it to its worker")
            desk.cancel(job_id)
            ring(desk.database)
            any(desk.wait([job_id], False, math.inf))
        view = desk.whole(job_id).view
        if cancelled:
            return INTERRUPTED
        if view.state != State.COMPLETED and view.reason != Reason.EXIT:
            _whisper(f"job {job_id}: {explain(desk, job_id)[1]}")
        return CANNOT if view.exit_code is None else view.exit_code

@command("explain", ID, AS_JSON, examples=("explain my-first-job",))
def explain_job(args: argparse.Namespace) -> None:
    """Say in one sentence why a job is where it is."""
    with office() as desk:
        view, why = explain(desk, args.id)
    if args.json:
        put_json({"id": view.id, "state": view.state, "why": why})
    else:
        put(f"job {view.id}: {escaped(why)}")

@command("retry", IDS, AS_JSON, examples=("retry my-first-job", "retry a b c"))
def retry(args: argparse.Namespace) -> int:
    """Run failed jobs now; put dead and cancelled ones back."""
    with office(WRITING) as desk:
        return report((desk.revive(one, "retry") for one in args.ids), args.json, desk)

@command("rerun", ID, COMMAND_OPTION, AS_JSON,
         examples=("rerun my-first-job", "rerun my-first-job -c 'echo hello again'"))
def rerun(args: argparse.Namespace) -> None:
    """Enqueue a new job like an old one; print its id."""
    with office(WRITING) as desk:
        spool, values = Spool(), desk.like(args.id)
        spool.add(complete_job({**values, "command": args.command or values["command"]},
                               {}))
        enqueue(desk.database, spool, False)
        ring(desk.database, 1, spool.queues)
        args.if_absent = False
        _print_ids(desk.database, spool, args, {})

@command("cancel", IDS, AS_JSON, examples=("cancel my-first-job", "cancel a b c"))
def cancel(args: argparse.Namespace) -> int:
    """Cancel jobs: waiting ones now, running ones by their worker."""
    with office(WRITING) as desk:
        return report(map(desk.cancel, args.ids), args.json, desk)

def _read_age(text: str) -> str:
    with contextlib.suppress(ValueError):
        return f"UTC_TIMESTAMP(6) - INTERVAL {duration().convert(text)} SECOND"
    return f"'{_read_time(text)}'"

AGE = Kind(_read_age, "a duration such as 7d, or a time such as 2026-11-24T10:00:00Z")

@command(
    "purge",
    arg("--state", required=True, metavar="S", help="completed, dead or cancelled"),
    arg("--before", metavar="D|TIME", default="0",
        help="only what ended longer ago than D, or before TIME (default: all)"),
    arg("--dry-run", action="store_true", help="only say how many it would be"),
    examples=("purge --state completed --before 7d", "purge --state dead --dry-run"))
def purge_jobs(args: argparse.Namespace) -> None:
    """Delete jobs that ended, with their history.

    A job that a blocked one waits for stays.
    """
    if args.state not in ENDED:
        raise Problem(f"--state: expected {', '.join(ENDED)}, "
                      f"not {excerpt(args.state)}",
                      "only what has ended can be purged", USAGE)
    state, before = State(args.state), AGE.read(args.before, "--before")
    with office(WRITING) as desk:
        [age] = desk.rows("'{}'".format, f"SELECT {before}")  # as it is now
        if args.dry_run:
            count = desk.tally(f"jobs WHERE {ended_before(state, age)}")
        else:
            count = sum(iter(lambda: purge(desk.database, state, age), 0))
    put(f"{count:,} {args.state} jobs {'would be ' * args.dry_run}purged")

@command(
    "bench", arg("--jobs", type=option(whole(10, 10**6)), default=5000, metavar="N",
                 help="jobs in each round (default 5000)"),
    arg("--count", type=option(whole(1, 1024)), default=0, metavar="N",
        help="jobs at once (default 64 for each CPU)"),
    AS_JSON, examples=("bench", "bench --jobs 5000 --count 128 --json"))
def bench(args: argparse.Namespace) -> None:
    """Measure what this MySQL and this host carry.

    It takes a minute, in a queue of its own that is gone afterwards.
    """
    with office(WRITING) as desk:
        count = args.count or min(64 * (os.cpu_count() or 1), 1024)
        figures = Bench(desk, count, args.jobs).run()
    if args.json:
        put_json(figures)
    else:
        put_table(["Figure", "Value"], list(figures.items()))

# -- dead letters

FILTERS = (
    arg("--reason", metavar="R", help="only what died of this (exit, timeout, …)"),
    arg("--exit-code", type=option(whole(0, 255)), metavar="N", help="only with this"),
    arg("--match", metavar="TEXT", help="only with this in the command or last line"),
    arg("--since", type=option(AGE), metavar="D|TIME",
        help="only what died no longer ago than D, or since TIME"))

def _filter(args: argparse.Namespace) -> Filter:
    if args.reason is not None and args.reason not in list(Reason):
        raise Problem(f"--reason: no such reason: {excerpt(args.reason)}",
                      nearest(args.reason, Reason) or f"reasons: {', '.join(Reason)}",
                      USAGE)
    wanted = [("dlq.reason = %s", args.reason), ("dlq.exit_code = %s", args.exit_code),
              ("LOCATE(%s, CONCAT_WS('\\n', command, last_line)) > 0", args.match)]
    if args.since:
        wanted.append((f"died_at >= {args.since} AND %s", 1))
    found = [(part, value) for part, value in wanted if value is not None]
    return Filter(" AND ".join(["TRUE", *(part for part, _ in found)]),
                  [value for _, value in found])

@command("dlq list", *FILTERS, LIMIT, AS_JSON,
         examples=("dlq list", "dlq list --exit-code 3 --since 2h --json"))
def dlq_list(args: argparse.Namespace) -> None:
    """List the dead jobs, the last to die first."""
    limit, only = _limit(args), _filter(args)
    with office() as desk:
        letters = desk.dead_letters(limit, only)
        total = desk.count_dead_letters(only) if len(letters) == limit else len(letters)
    if args.json:
        for view, died_at in letters:
            put_json({**view.as_json(), "died_at": say_time(died_at)})
        return
    put_table(["Id", "Attempt", "Exit", "Reason", "Died", "Queue", "Command"],
              [[view.id, f"{view.attempts}/{view.allowed}", view.exit_code, view.reason,
                _short(died_at), view.queue, view.command[:400]]
               for view, died_at in letters], spare=["Died", "Queue", "Exit"])
    _say_total(len(letters), total)

@command("dlq groups", AS_JSON, examples=("dlq groups",))
def dlq_groups(args: argparse.Namespace) -> None:
    """Count dead jobs that are alike, whatever their digits."""
    with office() as desk:
        put_rows(desk.dead_groups(), args.json,
                 ["Count", "Exit", "Reason", "Last died", "Example", "Last line"],
                 ["count", "exit_code", "reason", "last_died_at", "example",
                  "last_line"], spare=["Last died", "Example"])

@command(
    "dlq retry", arg("ids", nargs="*", metavar="ID", help="the job's id"),
    arg("--all", action="store_true", help="all of them"), *FILTERS,
    arg("--retries", type=option(whole(1, 1000)), default=1, metavar="N",
        help="grant so many more runs (default 1)"),
    arg("--reset", action="store_true", help="start the count of attempts again"),
    arg("--dependents", action="store_true", help="and what died because of them"),
    arg("--dry-run", action="store_true", help="only say which it would be"),
    AS_JSON, examples=("dlq retry my-first-job", "dlq retry a b --retries 3",
                       "dlq retry --reason timeout --since 1d --dry-run"))
def dlq_retry(args: argparse.Namespace) -> int:
    """Put dead jobs back: due now, one more run granted.

    They keep their attempts, unless --reset starts the count again.
    """
    only = _filter(args)
    if sum((bool(args.ids), args.all, bool(only.values))) != 1:
        raise Problem("dlq retry takes ids, or --all, or filters such as --exit-code",
                      "see: queuectl help dlq retry", USAGE)
    with office(WRITING) as desk:
        ids = args.ids or desk.dead_ids(only)
        if args.dry_run:
            found = states_of(desk.database, ids)
            return report((Result(
                one, one in found, found.get(one), no_such_job(one).what,
                "would be put back") for one in ids), args.json)
        def revived() -> Iterator[Result]:
            for job_id in ids:
                result = desk.revive(job_id, "revive", args.retries, args.reset)
                yield result
                if args.dependents and result.ok:
                    yield from desk.revive_dependents(job_id)
        return report(revived(), args.json, desk)

# -- queues

QUEUE = arg("name", metavar="NAME", type=option(QUEUE_NAME), help="the queue's name")

@command("queue list", AS_JSON, examples=("queue list",))
def queue_list(args: argparse.Namespace) -> None:
    """Show depth, limit and pace of every queue in use."""
    with office() as desk:
        put_rows(desk.lines(), args.json,
                 ["Queue", "Depth", "Running", "Limit", "Paused", "Rate/min",
                  "Oldest waiting"], ["queue", "depth", "running", "limit", "paused",
                                      "rate", "oldest_waiting"])

@command("queue limit", QUEUE,
         arg("limit", metavar="N|none", help="jobs at once over all hosts"),
         examples=("queue limit video 2", "queue limit video none"))
def queue_limit(args: argparse.Namespace) -> None:
    """Run at most N jobs of a queue at once, over all hosts."""
    most = None
    if args.limit != "none":
        most = whole(0, 10**6).read(args.limit, "N (or none)")
    with office(WRITING) as desk:
        desk.limit(args.name, "max_running", most)
        ring(desk.database)

@command("queue pause", QUEUE, examples=("queue pause video",))
def queue_pause(args: argparse.Namespace) -> None:
    """Start no more jobs of a queue; those that run go on."""
    with office(WRITING) as desk:
        [now] = desk.rows(lambda now: now, "SELECT UTC_TIMESTAMP(6)")
        desk.limit(args.name, "paused_at", now)

@command("queue resume", QUEUE, examples=("queue resume video",))
def queue_resume(args: argparse.Namespace) -> None:
    """Start jobs of a paused queue again."""
    with office(WRITING) as desk:
        desk.limit(args.name, "paused_at", None)
        ring(desk.database)

# -- settings

def known_key(key: str) -> str:
    if key not in KNOBS:
        raise Problem(f"no such setting: {excerpt(key)}",
                      nearest(key, KNOBS) or f"settings: {' '.join(KNOBS)}", USAGE)
    return key

KEY = arg("key", type=known_key, metavar="KEY", help="the setting's name")

@command("config set", KEY, arg("value", metavar="VALUE", help="its new value"),
         examples=("config set backoff_base 3", "config set job_timeout 10m"))
def config_set(args: argparse.Namespace) -> None:
    """Store a setting; running workers take it within seconds."""
    KNOBS[args.key].metadata["kind"].read(args.value, args.key)
    with office(WRITING) as desk:
        desk.set_config(args.key, args.value)
        ring(desk.database)
        settings = configure(Environment(()), read_config(desk.database)).settings
    name = variable_of(args.key)
    hidden = Environment.read().find(name)
    if hidden:
        _whisper(f"warning: {name}={excerpt(hidden[0])} ({hidden[1]}) hides it here")
    if settings.lease_s > settings.worker_timeout:
        _whisper("warning: worker_timeout is under 4 heartbeats; the lease is "
                 f"{say_duration(settings.lease_s)}")

@command("config get", KEY, examples=("config get backoff_base",))
def config_get(args: argparse.Namespace) -> None:
    """Print the value in force."""
    put(configured_by(Environment.read(), READING).origins[args.key][1])

@command("config unset", KEY, examples=("config unset backoff_base",))
def config_unset(args: argparse.Namespace) -> None:
    """Remove a stored setting: its default holds again."""
    with office(WRITING) as desk:
        desk.set_config(args.key, None)
        ring(desk.database)

@command("config list", AS_JSON, examples=("config list",))
def config_list(args: argparse.Namespace) -> None:
    """Show every setting, its value's source and its default."""
    configured = configured_by(Environment.read(), READING)
    for complaint in configured.complaints:
        _whisper(f"warning: {complaint}")
    rows = []
    for key, field in KNOBS.items():
        (source, text), about = configured.origins[key], field.metadata
        rows.append([key, text, source, about["default"], about["help"]])
        if args.json:
            value = getattr(configured.settings, key)
            value = sorted(value) if isinstance(value, frozenset) else value
            put_json({"key": key, "value": value, "source": source,
                      "default": about["default"], "help": about["help"]})
    if not args.json:
        put_table(["Key", "Value", "Source", "Default", "Help"], rows, ["Default"])

# -- the database

@command("db init", examples=("db init",))
def db_init(args: argparse.Namespace) -> None:
    """Create the database and its tables, or upgrade older ones."""
    put(init_database(find_target(Environment.read())))

@command("db check", PID_FILE, AS_JSON, examples=("db check",))
def db_check(args: argparse.Namespace) -> int:
    """Look for what is off, and say how to mend it; exit 1 if so."""
    environment = Environment.read()
    target, settings = find_target(environment), configure(environment, {}).settings
    with contextlib.suppress(Problem):
        settings = configured_by(environment, READING).settings
    path = args.pid_file or _pid_file(environment)
    standing, readable = probe_pid_file(path), _readable_dotenv(environment)
    told = f"PID {standing.pid} lives" if standing.alive else "stale, nobody holds it"
    status = 0
    for one in itertools.chain(check_all(target, settings), (
            Check("PID file", standing.alive or not standing.found,
                  f"{path}: {told if standing.found else 'none'}",
                  "start a daemon: queuectl worker start --daemon"),
            Check(".env", not readable, "; ".join(readable) or "private, or none"))):
        status |= not one.ok
        if args.json:
            put_json({**one._asdict(), "remedy": "" if one.ok else one.remedy})
        else:
            remedy = f"; {one.remedy}" if one.remedy and not one.ok else ""
            put(f"{'ok ' if one.ok else 'OFF'} {one.check:12} {one.found}{remedy}")
    return status

@command("db schema", examples=("db schema | mysql -u root -p",))
def db_schema(args: argparse.Namespace) -> None:
    """Print the schema, as migrations.sql has it."""
    put(schema_for(find_target(Environment.read()).database).rstrip("\n"))

@command("db start", examples=("db start",))
def db_start(args: argparse.Namespace) -> None:
    """Start a private MySQL in ./.queuectl, where there is none."""
    target = find_target(Environment.read())
    if target.chosen:
        raise Problem(f"a private server would not be used: {target.source} names "
                      f"{target}", "remove what names it there (DB_HOST, DB_PORT, "
                      "DB_SOCKET or DATABASE_URL), or use that server")
    folder = find_private_folder() or PRIVATE_FOLDER
    server = PrivateServer(folder)
    done = "started" if server.start() else "runs already"
    put(f"private server {done} in {folder}, PID {server.running()}")
    put(init_database(find_target(Environment.read())))

@command("db stop", examples=("db stop",))
def db_stop(args: argparse.Namespace) -> None:
    """Stop the private server; its data stays."""
    folder = find_private_folder()
    if folder and PrivateServer(folder).stop():
        put(f"private server in {folder} stopped")
    else:
        _whisper("no private server runs here")


# ---- main --------------------------------------------------------------------
#
# One door in, one door out: main finds the command, builds its parser alone, runs it,
# and turns a Problem into its message and exit status.

GROUPS = (("jobs", ("enqueue", "run", "list", "show", "explain", "logs", "wait",
                    "cancel", "retry", "rerun", "purge", "bench")),
          ("workers", ("worker start", "worker stop", "worker list", "status")),
          ("queues", ("queue list", "queue limit", "queue pause", "queue resume")),
          ("dead letters", ("dlq list", "dlq groups", "dlq retry")),
          ("settings", ("config set", "config get", "config unset", "config list")),
          ("database", ("db init", "db check", "db schema", "db start", "db stop")))

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
        raise Problem(f"no such command: {excerpt(word)}" if word else "no command",
                      nearest(word, [*firsts, *COMMANDS]) or "see: queuectl", USAGE)
    name = rest.pop(at)
    if name in COMMANDS:
        return COMMANDS[name], rest
    seconds = [one.split()[1] for one in COMMANDS if one.startswith(f"{name} ")]
    second = next((at for at in range(at, len(rest)) if rest[at] in seconds), None)
    if second is None:
        word = _first_plain(rest[at:])
        raise Problem(f"{name}: no such command: {excerpt(word)}" if word
                      else f"{name}: which of its commands?",
                      nearest(word, seconds) or f"{name} {'|'.join(seconds)}", USAGE)
    return COMMANDS[f"{name} {rest.pop(second)}"], rest

def _first_plain(words: Sequence[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")

def parser_of(found: Command) -> Parser:
    parser = Parser(prog=f"queuectl {found.name}", allow_abbrev=False,
                    description=found.body.__doc__,
                    epilog="\n  queuectl ".join(["examples:", *found.examples]),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, options in found.args:
        parser.add_argument(*names, **options)  # type: ignore[arg-type]
    return parser

def put_overview() -> None:
    """Every command in its group, one line each."""
    put("queuectl: a queue of shell commands, kept in MySQL")
    for title, names in GROUPS:
        put(f"\n{title}:")
        for name in names:
            put(f"  {name:14} {COMMANDS[name].summary}")
    put("\nqueuectl help COMMAND says more about one; --version what runs here.")

def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    words, rest = _take_defaults_file(words[:cut]), words[cut + 1:]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not set(words) - {"-h", "--help"}:
        if rest:
            raise Problem("no command is given before --", "see: queuectl", USAGE)
        put_overview()
        return 0
    if words == ["--version"]:
        put(f"queuectl {VERSION}, schema {SCHEMA_VERSION}, PyMySQL {driver_version()}, "
            f"Python {sys.version.split()[0]}")
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
            taken = words[at:at + 1 + (not sign)]
            if not sign and len(taken) < 2:
                raise Problem("--defaults-file: which?", status=USAGE)
            os.environ[DEFAULTS_FILE] = absolute(value or taken[-1])
            return words[:at] + words[at + len(taken):]
    return words

def main() -> int:
    """Run, and turn what goes wrong into a message and an exit status."""
    try:
        use_own_environment()
        status_code = run(sys.argv[1:])
        sys.stdout.flush()
        return status_code
    except Problem as problem:
        _whisper(f"{problem.what}\n  {problem.hint}" if problem.hint else problem.what)
        return problem.status
    except RowRefused as refused:
        _whisper(f"the server refused the data: {refused}")
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
        _whisper(f"cannot write to standard output or {tempfile.gettempdir()}: "
                 f"{error.strerror}")
        return CANNOT

if __name__ == "__main__":
    sys.exit(main())
