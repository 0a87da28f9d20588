# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is read by the files beside this one
# What every local script stands on: folders, messages, waiting, processes, users.

ROOT=$(cd "$HERE/../.." && pwd -P)
LOCAL_DIR=${LETHE_LOCAL_DIR:-$ROOT/.local}
[[ $LOCAL_DIR == /* ]] || LOCAL_DIR=$PWD/$LOCAL_DIR
LOG_DIR=$LOCAL_DIR/log
# Short and stable: tells the checkouts of one machine apart.
CHECKOUT_ID=$(printf '%s' "$LOCAL_DIR" | cksum | cut -d ' ' -f 1)

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() {
    warn "error: $*"
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

prepare_local_dir() {
    mkdir -p "$LOCAL_DIR" "$LOG_DIR" "$LOCAL_DIR/run"
    [[ -O $LOCAL_DIR ]] || die "$LOCAL_DIR belongs to another user; run as that user or remove it"
    # The servers' user passes through here to its own folder; what is secret is mode 600 or 700.
    chmod 755 "$LOCAL_DIR"
    chmod 750 "$LOG_DIR" "$LOCAL_DIR/run"
}

load_env() {
    [[ -r $LOCAL_DIR/env ]] || die "no $LOCAL_DIR/env yet: run deploy/local/servers start"
    # shellcheck disable=SC1091 # written by deploy/local/servers
    . "$LOCAL_DIR/env"
}

# One start or stop at a time per checkout. Where flock is missing (macOS) there is no guard.
take_lock() {
    have flock || return 0
    exec 9>"$LOCAL_DIR/lock"
    flock -w 300 9 || die "another start or stop has held $LOCAL_DIR/lock for five minutes"
}

# wait_until SECONDS COMMAND...: polls until COMMAND succeeds; fails when the time is up.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

# spawn LOG COMMAND...: starts COMMAND so that it outlives this shell and its terminal, with its
# output appended to LOG. Everything on the way is exec'd, so $SPAWNED is COMMAND's own pid.
spawn() {
    local log=$1 detach=nohup
    shift
    ! have setsid || detach=setsid
    (
        cd /
        exec "$detach" "$@" </dev/null >>"$log" 2>&1 9>&-
    ) &
    SPAWNED=$!
}

# The command line of a process, empty when there is none. A zombie has none either.
command_line() {
    if [[ -d /proc/self ]]; then
        { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null || true
    else
        ps -o args= -p "$1" 2>/dev/null || true
    fi
}

# is_ours PID TEXT: the process lives and its command line contains TEXT. Pids are used again, so
# nothing is signalled without this.
is_ours() {
    [[ $1 =~ ^[1-9][0-9]*$ && $(command_line "$1") == *"$2"* ]]
}

is_gone() { ! is_ours "$1" "$2"; }

# The first line of a pid file, empty when there is none.
pid_in() {
    local pid=
    [[ ! -r $1 ]] || read -r pid <"$1" || true
    printf '%s' "$pid"
}

port_answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

show_log() {
    warn "--- the end of $1"
    tail -n 40 "$1" >&2 || true
    warn "---"
}

die_with_log() {
    show_log "$1"
    die "$2"
}
