#!/usr/bin/env bash
# smoke-test.sh: sets up what this machine lacks, then does real work through queuectl on a private
# server in a temporary folder, or in a database of its own on the server that DATABASE_URL, DB_HOST
# or DB_SOCKET in the environment names. `smoke-test.sh tests`: the suite. Leaves nothing behind.
set -u; here=$(cd "$(dirname "$0")" && pwd); own=; [ -n "${DATABASE_URL:-}${DB_HOST:-}${DB_SOCKET:-}" ] || own=yes; packages=() venv=
choose_python() {
    for python in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3 "$here/.venv/bin/python3" ''; do
        "$python" -c 'import sys, pymysql; sys.exit(sys.version_info < (3, 9))' 2>/dev/null && return; done
}
has_server() { # one that can make its tables
    PATH=$PATH:/usr/sbin:/usr/libexec:/usr/local/sbin:/usr/local/mysql/bin command -v mysqld mariadbd >/dev/null &&
        { ! command -v mariadb-install-db >/dev/null || command -v my_print_defaults >/dev/null; }; }
choose_python || { command -v python3 >/dev/null || packages+=(python3); packages+=(python3-pymysql); }
{ [ -z "$own" ] && [ "${1:-}" != tests ]; } || has_server || packages+=(mariadb-server-core mariadb-client-core)
command -v apt-get >/dev/null || case "${packages[*]}" in '') ;; python3-pymysql) packages=() venv=yes ;;
    *) echo "# first: $(command -v brew >/dev/null && echo brew install python3 mariadb || echo dnf install python3 python3-PyMySQL mariadb-server)"; exit 69 ;; esac
if [ ${#packages[@]} -gt 0 ]; then
    install="apt-get -qq -y --no-install-recommends --no-remove -o DPkg::Lock::Timeout=60 install ${packages[*]}"
    echo "# installs ${packages[*]}: $install"
    root=; [ "$(id -u)" = 0 ] || root="sudo -n"
    $root true 2>/dev/null || { echo "# that needs root; do it yourself: sudo apt-get update && sudo $install"; exit 69; }
    said=$({ $root apt-get -qq update && $root env DEBIAN_FRONTEND=noninteractive $install; } </dev/null 2>&1) ||
        { echo "$said"; echo "# not installed: $install"; exit 69; }
elif [ -n "$venv" ]; then
    echo "# installs PyMySQL into $here/.venv"
    python3 -m venv "$here/.venv" && "$here/.venv/bin/python3" -m pip -q install PyMySQL || exit 69
else echo "# installs nothing: $("$python" --version), PyMySQL and a server are there"; fi
choose_python || { echo "# PyMySQL is not there after all: $python"; exit 69; }
export python PYTHONDONTWRITEBYTECODE=1
[ "${1:-}" != tests ] || { cd "$here" && exec "$python" -m unittest test_queuectl; }
work=$(mktemp -d) && cp "$here/queuectl.py" "$work" && cd "$work" || exit 1 # no .env stands beside it there
failed=0; q() { "$python" ./queuectl.py "$@"; }
export -f q
check() { # check 'what holds' COMMAND...
    local what=$1; shift
    if "$@" >check.out 2>&1; then echo "ok - $what"; else
        failed=$((failed + 1)); echo "not ok - $what"; sed 's/^/#   /' check.out; fi
}
until_true() { # until_true SECONDS COMMAND...: wait for a condition
    local until=$((SECONDS + $1)); shift; until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $until ] || return 1; sleep 0.1; done
}
state() { q show "$1" --json | grep -q "\"state\": \"$2\""; }
ends_as() { until_true "${3:-20}" state "$1" "$2" || { q show "$1"; return 1; }; }
cleanup() {
    for pid_file in *.pid; do [ -e "$pid_file" ] && q worker stop --now --pid-file "$pid_file"; done
    if [ -n "$own" ]; then q db stop; else "$python" -c 'import os, queuectl as q
database = q.Database(q.find_connection(q.Environment.read()), q.WRITING)
database.run("DROP DATABASE " + q.quote_name(os.environ["DB_NAME"]))' || echo "# $DB_NAME is left behind" >&3; fi
    cd / && rm -rf "$work"
} 3>&1 >/dev/null 2>&1
trap cleanup EXIT; trap 'exit 130' INT TERM
if [ -n "$own" ]; then
    unset "${!DB_@}" "${!QUEUECTL_@}" DATABASE_URL
    check 'a private server starts' q db start
else
    export DB_NAME=queuectl_smoke_$$
    check "tables are made in $DB_NAME" q db init
    version=$(q db check | sed -n 's/^.\{4\}server *\([^ ]*\).*/\1/p'); [[ $version = *MariaDB* ]] || version="MySQL $version"
    echo "# using $version at $(q status | sed -n '1s/.* at \(.*\) (.*/\1/p'), database $DB_NAME, dropped at the end"
fi
check 'a job is enqueued by JSON' q enqueue '{"id":"hello","command":"echo Hello from queuectl","max_retries":3}'
check 'a job is enqueued by -c' q enqueue --id sleeper -c 'sleep 1 && echo Done sleeping'
check 'a command that does not exist is accepted' q enqueue '{"id":"missing","command":"invalid_command"}'
check 'a daemon with three slots starts' q worker start --count 3 --daemon
check 'the echo job completes' ends_as hello completed
check 'its output is kept' bash -c "[ \"\$(q logs hello)\" = 'Hello from queuectl' ]"
check 'the status names the daemon' bash -c "q status | grep -A1 'Worker PID file found' | grep -qx '[0-9]*'"
for n in 1 2 3; do q enqueue --id "nap-$n" -c 'date +%s.%N >>naps; sleep 2; date +%s.%N >>naps' -q; done
check 'three sleeping jobs complete' q wait nap-1 nap-2 nap-3 --timeout 20
check 'the three slept at once' "$python" -c \
    'times = [float(line) for line in open("naps")]; assert max(times[:3]) < min(times[3:]), times'
check 'run shows the output and leaves with the status' bash -c '[ "$(q run -c "echo here; exit 7"; echo $?)" = "here
7" ]'
q enqueue --id long -c 'sleep 3' -q
check 'a long job starts' ends_as long processing
check 'a stopped daemon lets it end, completed' bash -c "q worker stop && q wait long --timeout 1"
q enqueue --id waiting -c 'echo I waited' -q
[ -z "$own" ] || { check 'the server stops' q db stop; check 'and starts again' q db start; }
check 'the job has outlived the restart' state waiting pending
check 'explain says what it waits for' bash -c "q explain waiting | grep -q 'no live worker serves'"
check 'workers start again' q worker start --count 3 --daemon
check 'and the job completes' ends_as waiting completed
check 'the missing command ends dead' ends_as missing dead 30
check 'it is in the dead letter queue after four runs' bash -c "q dlq list --json | grep missing | grep -q '\"attempts\": 4'"
check 'it is retried from there' q dlq retry missing
check 'a fifth run, and it is dead again' until_true 10 bash -c "q show missing --json | grep '\"attempts\": 5' | grep -q '\"dead\"'"
check 'a setting is stored and read' bash -c "q config set backoff_base 3 && [ \"\$(q config get backoff_base)\" = 3 ]"
# Real work: the sum of every file under a system folder, by four slots of two supervisors.
for folder in /usr/lib/python3* /usr/share/zoneinfo /usr/share/perl /usr/share/doc /usr/include; do
    find "$folder" -xdev -type f -readable 2>/dev/null | sort >files
    [ "$(wc -l <files)" -ge 500 ] && [ "$(wc -l <files)" -le 5000 ] && break
done
sed "s/'/'\\\\''/g; s/.*/sha256sum '&' >>sums/" files | q enqueue --lines - -q --queue sums
q enqueue --id no-file -c 'sha256sum /no/such/file' --max-retries 0 --queue sums -q
check "$(wc -l <files) sums of files in $folder" bash -c "q worker start --count 2 --queue sums --drain & first=\$!
    q worker start --count 2 --queue sums --drain && wait \$first"
check 'they equal those of sha256sum alone' bash -c 'tr "\n" "\0" <files | xargs -0 sha256sum | sort >plain; sort sums | cmp - plain'
check 'the one that failed is dead' state no-file dead
check 'the daemon stops' q worker stop
[ "$failed" = 0 ] || { echo "# $failed did not hold"; exit 1; }; echo "# all of it holds"
