# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is read by the files beside this one
# What is chosen once and remembered: the servers' user, where their data lies, ports, passwords.

SERVER_USER=lethe-local
STATE_LINK=$LOCAL_DIR/state
FAR_STATE=/var/tmp/lethe-local-$EUID-$CHECKOUT_ID

# Runs a command as the servers' user. PostgreSQL refuses to run as root.
as_server() {
    if ((EUID == 0)); then
        (cd / && exec setpriv --reuid="$SERVER_USER" --regid="$SERVER_USER" --clear-groups "$@" 9>&-)
    else
        (cd / && exec "$@" 9>&-)
    fi
}

# The same as words, for spawn.
AS_SERVER=(env)
((EUID != 0)) || AS_SERVER=(setpriv "--reuid=$SERVER_USER" "--regid=$SERVER_USER" --clear-groups)

# Where the state lies in truth; the link to it may be out of the servers' user's reach.
state_dir() { (cd "$STATE_LINK" 2>/dev/null && pwd -P) || printf '%s' "$STATE_LINK"; }

prepare_state() {
    create_server_user
    place_state
    STATE_DIR=$(state_dir)
    local part
    for part in postgresql rabbitmq; do
        mkdir -p "$STATE_DIR/$part"
        chmod 700 "$STATE_DIR/$part"
        ((EUID != 0)) || chown "$SERVER_USER:$SERVER_USER" "$STATE_DIR/$part"
    done
    remember_once
    load_state
}

create_server_user() {
    ((EUID == 0)) || return 0
    ! id "$SERVER_USER" >/dev/null 2>&1 || return 0
    useradd --system --user-group --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin "$SERVER_USER"
}

# Below .local where the servers' user can get there; below /var/tmp where it cannot, for example
# with a checkout in root's home.
place_state() {
    if [[ -d $STATE_LINK ]] && as_server test -x "$STATE_LINK/."; then
        return
    fi
    if [[ -L $STATE_LINK ]]; then
        rm -f "$STATE_LINK"
    elif [[ -d $STATE_LINK ]]; then
        die "$STATE_LINK cannot be reached by the user $SERVER_USER any more; run make clean-local"
    fi
    if as_server test -x "$LOCAL_DIR/."; then
        mkdir -m 755 "$STATE_LINK"
        return
    fi
    [[ -d $FAR_STATE ]] || mkdir -m 755 "$FAR_STATE"
    [[ -O $FAR_STATE && ! -L $FAR_STATE ]] || die "$FAR_STATE exists and is not ours"
    ln -s "$FAR_STATE" "$STATE_LINK"
}

remove_state() {
    if [[ -O $FAR_STATE && ! -L $FAR_STATE ]]; then
        rm -rf -- "$FAR_STATE"
    fi
}

remember_once() {
    choose_ports POSTGRESQL_PORT RABBITMQ_PORT MANAGEMENT_PORT DIST_PORT EPMD_PORT
    [[ -s $LOCAL_DIR/credentials ]] || choose_credentials
}

# load_state reads it all back; a checkout that never started has nothing to load.
load_state() {
    POSTGRESQL_PORT=0 RABBITMQ_PORT=0 MANAGEMENT_PORT=0 DIST_PORT=0 EPMD_PORT=0 HTTP_PORT=0
    POSTGRESQL_PASSWORD='' RABBITMQ_PASSWORD=''
    STATE_DIR=$(state_dir)
    local file
    for file in ports credentials; do
        # shellcheck disable=SC1090 # written by choose_ports and choose_credentials
        [[ ! -s $LOCAL_DIR/$file ]] || . "$LOCAL_DIR/$file"
    done
}

# Below 32768, where Linux takes the ports of outgoing connections from.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        [[ " $TAKEN_PORTS " != *" $port "* ]] || continue
        port_answers "$port" || break
    done
    TAKEN_PORTS+=" $port"
    FREE_PORT=$port
}

taken_ports() { cut -d = -f 2 "$LOCAL_DIR/ports" | tr '\n' ' '; }

# choose_ports NAME...: for those that have none yet.
choose_ports() {
    local name
    touch "$LOCAL_DIR/ports"
    for name in "$@"; do
        ! grep -q "^$name=" "$LOCAL_DIR/ports" || continue
        TAKEN_PORTS=$(taken_ports)
        free_port
        printf '%s=%s\n' "$name" "$FREE_PORT" >>"$LOCAL_DIR/ports"
    done
}

# ports_free NAME...: before a server starts. Somebody may have taken its port while it was down;
# then another is chosen.
ports_free() {
    local name port
    for name in "$@"; do
        port=${!name}
        port_answers "$port" || continue
        TAKEN_PORTS=$(taken_ports)
        free_port
        say "port $port is in use by another program: $name is now $FREE_PORT"
        sed -i.old "s/^$name=.*/$name=$FREE_PORT/" "$LOCAL_DIR/ports" && rm -f "$LOCAL_DIR/ports.old"
    done
    load_state
}

# The port of LETHE_PUBLIC_URL, where the first gateway of the fleet listens. While that runs it keeps its port.
prepare_http_port() {
    choose_ports HTTP_PORT
    load_state
    is_ours "$(pid_in "$LOCAL_DIR/run/gateway-1.pid")" /gateway || ports_free HTTP_PORT
}

choose_credentials() {
    (
        umask 077
        printf "%s='%s'\n" POSTGRESQL_PASSWORD "$(openssl rand -hex 24)" \
            RABBITMQ_PASSWORD "$(openssl rand -hex 24)" >"$LOCAL_DIR/credentials"
    )
}

# for_server FILE: stdin becomes a file that only the servers' user reads.
for_server() {
    # shellcheck disable=SC2016 # the inner shell expands it
    as_server sh -c 'umask 077; rm -f -- "$1"; cat >"$1"' sh "$1"
}
