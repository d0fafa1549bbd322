#!/usr/bin/env bash
# smoke-test.sh: real work through queuectl on a real server, in a minute.
#
# Starts a private MySQL or MariaDB in a temporary folder, or uses the server that DB_HOST or
# DB_SOCKET names, in a database of its own. Leaves nothing behind.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d) || exit 1
cd "$work" || exit 1
failed=0

q() { "$python" "$here/queuectl.py" "$@"; }
check() { # check 'what holds' COMMAND...
    local what=$1; shift
    if "$@" >check.out 2>&1; then echo "ok - $what"; else
        failed=$((failed + 1)); echo "not ok - $what"; sed 's/^/#   /' check.out; fi
}
until_true() { # until_true SECONDS COMMAND...: wait for a condition
    local until=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $until ] || return 1; sleep 0.1; done
}
state() { q show "$1" --json | grep -q "\"state\": \"$2\""; }
ends_as() { until_true "${3:-20}" state "$1" "$2" || { q show "$1"; return 1; }; }
cleanup() {
    for pid_file in *.pid; do [ -e "$pid_file" ] && q worker stop --now --pid-file "$pid_file"; done
    if [ -n "$own" ]; then q db stop; else
        "$python" - "$here" <<'PY'
import sys; sys.path.insert(0, sys.argv[1])
import queuectl
queuectl.open_database(queuectl.WRITING).read(
    lambda cursor: cursor.execute(f"DROP DATABASE {queuectl.quote_name(queuectl.os.environ['DB_NAME'])}"))
PY
    fi
    cd / && rm -rf "$work"
} >/dev/null 2>&1
own=; [ -n "${DB_HOST:-}${DB_SOCKET:-}" ] || own=yes
trap cleanup EXIT
trap 'exit 130' INT TERM

if [ -n "$own" ]; then
    unset "${!DB_@}" "${!QUEUECTL_@}"
    check 'a private server starts' q db start
else
    export DB_NAME=queuectl_smoke_$$
    check "tables are made in $DB_NAME" q db init
fi

check 'a job is enqueued by JSON' q enqueue '{"id":"hello","command":"echo Hello from queuectl","max_retries":3}'
check 'a job is enqueued by -c' q enqueue --id sleeper -c 'sleep 1 && echo Done sleeping'
check 'a command that does not exist is accepted' q enqueue '{"id":"missing","command":"invalid_command"}'
check 'a daemon with three slots starts' q worker start --count 3 --daemon
check 'the echo job completes' ends_as hello completed
check 'its output is kept' sh -c "[ \"\$('$python' '$here/queuectl.py' logs hello)\" = 'Hello from queuectl' ]"
check 'the status names the daemon' sh -c "'$python' '$here/queuectl.py' status | grep -A1 'Worker PID file found' | grep -qx '[0-9]*'"

for n in 1 2 3; do q enqueue --id "nap-$n" -c 'date +%s.%N >>naps; sleep 2; date +%s.%N >>naps' -q; done
for n in 1 2 3; do check "sleeping job $n completes" ends_as "nap-$n" completed; done
check 'the three slept at once' "$python" -c \
    'times = [float(line) for line in open("naps")]; assert max(times[:3]) < min(times[3:]), times'

q enqueue --id long -c 'sleep 3' -q
check 'a long job starts' ends_as long processing
check 'a stopped daemon lets it end' q worker stop
check 'and it completed' state long completed

q enqueue --id waiting -c 'echo I waited' -q
[ -z "$own" ] || { check 'the server stops' q db stop; check 'and starts again' q db start; }
check 'the job has outlived the restart' state waiting pending
check 'workers start again' q worker start --count 3 --daemon
check 'and the job completes' ends_as waiting completed

check 'the missing command ends dead' ends_as missing dead 30
check 'it ran four times' sh -c "'$python' '$here/queuectl.py' show missing --json | grep -q '\"attempts\": 4'"
check 'it is in the dead letter queue' sh -c "'$python' '$here/queuectl.py' dlq list | grep -q missing"
check 'it is retried from there' q dlq retry missing
check 'a fifth run, and it is dead again' until_true 10 sh -c \
    "'$python' '$here/queuectl.py' show missing --json | grep '\"attempts\": 5' | grep -q '\"dead\"'"
check 'a setting is stored' q config set backoff_base 3
check 'and read' sh -c "[ \"\$('$python' '$here/queuectl.py' config get backoff_base)\" = 3 ]"

# Real work: the sum of every file under a system folder, by four slots of two supervisors.
for folder in /usr/lib/python3* /usr/share/zoneinfo /usr/share/perl /usr/share/doc /usr/include; do
    find "$folder" -xdev -type f -readable 2>/dev/null | sort >files
    [ "$(wc -l <files)" -ge 500 ] && [ "$(wc -l <files)" -le 5000 ] && break
done
sed "s/'/'\\\\''/g; s/.*/sha256sum '&' >>sums/" files | q enqueue --lines - -q --queue sums
q enqueue --id no-file -c 'sha256sum /no/such/file' --max-retries 0 --queue sums -q
check "$(wc -l <files) sums of files in $folder" sh -c "
    '$python' '$here/queuectl.py' worker start --count 2 --queue sums --drain & first=\$!
    '$python' '$here/queuectl.py' worker start --count 2 --queue sums --drain && wait \$first"
check 'they equal those of a plain sha256sum' sh -c \
    'tr "\n" "\0" <files | xargs -0 sha256sum | sort >plain; sort sums | cmp - plain'
check 'the one that failed is dead' state no-file dead
check 'the daemon stops' q worker stop
[ "$failed" = 0 ] || { echo "# $failed did not hold"; exit 1; }
echo "# all of it holds"
