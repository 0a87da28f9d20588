# shellcheck shell=bash
# The private PostgreSQL: TCP on 127.0.0.1, no Unix socket (their paths have a limit of 107 bytes).

postgresql_folder() { printf '%s/postgresql/data' "$STATE_DIR"; }

# As the servers' user: nobody else may look into PostgreSQL's folder.
postgresql_pid() { as_server sed -n 1p "$(postgresql_folder)/postmaster.pid" 2>/dev/null || true; }

postgresql_running() {
    [[ -d $(postgresql_folder) ]] && is_ours "$(postgresql_pid)" "$(postgresql_folder)"
}

psql_postgres() {
    PGPASSWORD=$POSTGRESQL_PASSWORD PGCONNECT_TIMEOUT=3 "$(psql_program)" -X -q -A -t \
        -v ON_ERROR_STOP=1 -h 127.0.0.1 -p "$POSTGRESQL_PORT" -U lethe -d postgres "$@"
}

postgresql_answers() { psql_postgres -c 'SELECT 1' >/dev/null 2>&1; }

postgresql_start() {
    ! postgresql_running || return 0
    ports_free POSTGRESQL_PORT
    postgresql_finish_failover
    as_server test -f "$(postgresql_folder)/PG_VERSION" || postgresql_create
    postgresql_configure
    postgresql_spawn
}

# A folder is opened by the version that made it, and by no other.
postgresql_fits() {
    local made
    made=$(as_server cat "$(postgresql_folder)/PG_VERSION" 2>/dev/null) || return 0
    [[ $("$(postgresql_bin)/postgres" --version) == *" $made."* ]] ||
        die "$(postgresql_folder) is of PostgreSQL $made, not of that in $(postgresql_bin): choose another LETHE_LOCAL_DIR"
}

postgresql_spawn() {
    spawn "$LOG_DIR/postgresql.log" "${AS_SERVER[@]}" "$(postgresql_bin)/postgres" -D "$(postgresql_folder)"
    POSTGRESQL_SPAWNED=$SPAWNED
}

# Made aside and then moved, so that an interrupted initdb leaves nothing half made.
postgresql_create() {
    local folder=$STATE_DIR/postgresql
    say "creating the PostgreSQL database folder"
    as_server rm -rf "$folder/new"
    for_server "$folder/password" <<<"$POSTGRESQL_PASSWORD"
    as_server "$(postgresql_bin)/initdb" -D "$folder/new" --username=lethe --auth=scram-sha-256 \
        --pwfile="$folder/password" --encoding=UTF8 --locale="$(utf8_locale)" --no-instructions \
        >>"$LOG_DIR/postgresql.log" 2>&1 ||
        die_with_log "$LOG_DIR/postgresql.log" "initdb failed"
    as_server rm -f "$folder/password"
    as_server tee -a "$folder/new/postgresql.conf" >/dev/null <<<"include 'lethe.conf'"
    as_server mv "$folder/new" "$(postgresql_folder)"
}

utf8_locale() {
    if locale -a 2>/dev/null | grep -qiE '^C\.utf-?8$'; then
        printf 'C.UTF-8'
    else
        printf 'C'
    fi
}

# Durability (fsync, synchronous_commit, full_page_writes) stays at its safe defaults: the tests
# kill servers and count on it. Prepared transactions are off by default; whoever brings data in by
# them must be waited for, which the tests try.
postgresql_configure() {
    for_server "$(postgresql_folder)/lethe.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $POSTGRESQL_PORT
unix_socket_directories = ''
max_connections = 400
max_prepared_transactions = 64
shared_buffers = '256MB'
timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = off
log_destination = 'stderr'
log_line_prefix = '%m [%p] %q%u@%d '
cluster_name = 'lethe-local'
CONF
}

# After a kill -9 the remains of the last server refuse a new one for a moment: it is tried again.
postgresql_answers_or_again() {
    postgresql_answers && return
    if [[ -n ${POSTGRESQL_SPAWNED:-} ]] && ! kill -0 "$POSTGRESQL_SPAWNED" 2>/dev/null; then
        ((POSTGRESQL_TRIES++ < 10)) || die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL did not start"
        sleep 0.5
        postgresql_spawn
    fi
    return 1
}

postgresql_await() {
    POSTGRESQL_TRIES=1
    wait_until 60 postgresql_answers_or_again ||
        die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL does not answer"
    [[ $(psql_postgres -c "SELECT count(*) FROM pg_database WHERE datname = 'lethe'") == 1 ]] ||
        psql_postgres -c 'CREATE DATABASE lethe'
}

postgresql_stop() {
    if ! postgresql_running; then
        say "postgresql  not running"
        return
    fi
    as_server "$(postgresql_bin)/pg_ctl" stop -s -D "$(postgresql_folder)" -m fast -t 60 ||
        die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL did not stop"
    say "postgresql  stopped"
}

# Not synced: who loses the machine as well loses a copy that nobody counts on. Made aside and then renamed, so that what is
# called "standby" is whole.
postgresql_copy() {
    local folder=$STATE_DIR/postgresql
    # What is half removed is not called so any more.
    ! as_server test -d "$folder/standby" || as_server mv "$folder/standby" "$folder/standby.old"
    as_server rm -rf "$folder/standby.old" "$folder/standby.new"
    if [[ -x $(postgresql_bin)/pg_basebackup ]]; then
        PGPASSWORD=$POSTGRESQL_PASSWORD as_server "$(postgresql_bin)/pg_basebackup" --no-sync --checkpoint=fast \
            -h 127.0.0.1 -p "$POSTGRESQL_PORT" -U lethe -D "$folder/standby.new" >>"$LOG_DIR/postgresql.log" 2>&1 ||
            die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL could not be copied"
    else
        postgresql_copy_files "$folder"
    fi
    as_server mv "$folder/standby.new" "$folder/standby"
}

# What pg_basebackup does, where the package has none and the distribution's is too old for the server. The slot keeps the
# write-ahead log until it is copied as well; both end with the session. psql goes on after a command of the shell that
# failed: what has succeeded is counted. A file that the server changes or removes meanwhile is no failure: the log makes up
# for it.
postgresql_copy_files() {
    local folder=$1
    as_server rm -f "$folder/copied"
    PGPASSWORD=$POSTGRESQL_PASSWORD as_server env FOLDER="$folder" "$(psql_program)" -X -q -A -t -v ON_ERROR_STOP=1 \
        -v label="$folder/standby.new/backup_label" -h 127.0.0.1 -p "$POSTGRESQL_PORT" -U lethe -d postgres \
        >>"$LOG_DIR/postgresql.log" 2>&1 <<'SQL' || die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL could not be copied"
SELECT pg_create_physical_replication_slot('copy', true, true);
SELECT pg_backup_start('copy', true);
\! cd "$FOLDER" && mkdir -m 700 standby.new && { tar -C data --warning=no-file-changed --warning=no-file-removed --ignore-failed-read -cf - . && echo sent >>copied; } | tar -C standby.new -xpf - && echo files >>copied
\! cd "$FOLDER/standby.new" && rm -rf postmaster.* pg_replslot/* pg_dynshmem/* pg_notify/* pg_serial/* pg_snapshots/* pg_subtrans/* && echo rest >>../copied
SELECT labelfile FROM pg_backup_stop(false) \g :label
\! cp -a "$FOLDER/data/pg_wal/." "$FOLDER/standby.new/pg_wal/" && echo log >>"$FOLDER/copied"
SQL
    [[ $(as_server cat "$folder/copied" 2>/dev/null | wc -l) == 4 ]] ||
        die_with_log "$LOG_DIR/postgresql.log" "PostgreSQL could not be copied whole"
}

# The processes of the old server end by themselves once it is gone; they write to the old folder, if at all. That folder
# stays until the copy answers.
postgresql_take_copy() {
    local folder=$STATE_DIR/postgresql pid
    as_server test -f "$folder/standby/PG_VERSION" || die "there is no copy: deploy/local/servers standby"
    pid=$(postgresql_pid)
    if postgresql_running; then
        kill -KILL "$pid"
        wait_until 30 is_gone "$pid" "$folder/data" || die "PostgreSQL ($pid) does not end"
    fi
    as_server rm -rf "$folder/lost"
    as_server mv "$folder/data" "$folder/lost"
    as_server mv "$folder/standby" "$folder/data"
}

# A failover that was interrupted between its two moves: what there is would be taken for no database at all.
postgresql_finish_failover() {
    local folder=$STATE_DIR/postgresql
    ! as_server test -d "$folder/data" || return 0
    if as_server test -d "$folder/standby"; then
        as_server mv "$folder/standby" "$folder/data"
    elif as_server test -d "$folder/lost"; then
        as_server mv "$folder/lost" "$folder/data"
    fi
}

postgresql_status() {
    if postgresql_running && postgresql_answers; then
        say "postgresql  running  127.0.0.1:$POSTGRESQL_PORT  pid $(postgresql_pid)"
    elif postgresql_running; then
        say "postgresql  does not answer  pid $(postgresql_pid)  see $LOG_DIR/postgresql.log"
        return 1
    else
        say "postgresql  stopped"
        return 1
    fi
}
