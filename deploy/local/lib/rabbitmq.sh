# shellcheck shell=bash
# The private RabbitMQ, with an epmd of its own. Everything it opens listens on 127.0.0.1:
# AMQP, management, Erlang's distribution and epmd.

RABBITMQ_NODE=lethe-$CHECKOUT_ID@localhost
RABBITMQ_PID_FILE=$LOCAL_DIR/run/rabbitmq.pid
EPMD_PID_FILE=$LOCAL_DIR/run/epmd.pid

rabbitmq_folder() { printf '%s/rabbitmq' "$STATE_DIR"; }

# What tells our processes from others of the same name.
rabbitmq_mark() { printf -- '-lethe_data %s' "$(rabbitmq_folder)"; }
epmd_mark() { printf -- '-address 127.0.0.1 -port %s' "$EPMD_PORT"; }

rabbitmq_running() { is_ours "$(pid_in "$RABBITMQ_PID_FILE")" "$(rabbitmq_mark)"; }
epmd_running() { is_ours "$(pid_in "$EPMD_PID_FILE")" "$(epmd_mark)"; }

# The management API knows the node to be up once the user can log in; curl reads the password from
# stdin because command lines are public.
rabbitmq_answers() {
    port_answers "$RABBITMQ_PORT" &&
        curl -fsS --noproxy '*' -m 5 -o /dev/null -K - "http://127.0.0.1:$MANAGEMENT_PORT/api/whoami" \
            2>/dev/null <<<"user = \"lethe:$RABBITMQ_PASSWORD\""
}

rabbitmq_start() {
    ! rabbitmq_running || return 0
    local folder
    folder=$(rabbitmq_folder)
    ports_free RABBITMQ_PORT MANAGEMENT_PORT DIST_PORT
    epmd_start
    rabbitmq_configure
    rabbitmq_environment
    spawn "$LOG_DIR/rabbitmq.log" "${AS_SERVER[@]}" env "${RABBITMQ_ENVIRONMENT[@]}" \
        "$(rabbitmq_server)" -lethe_data "$folder"
    RABBITMQ_SPAWNED=$SPAWNED
    printf '%s\n' "$SPAWNED" >"$RABBITMQ_PID_FILE"
}

# Started by us and not by Erlang, so that its pid is known and it ends with the broker.
epmd_start() {
    ! epmd_running || return 0
    ports_free EPMD_PORT
    local words
    read -ra words <<<"$(epmd_mark)"
    spawn "$LOG_DIR/epmd.log" "${AS_SERVER[@]}" "$(epmd_program)" "${words[@]}"
    printf '%s\n' "$SPAWNED" >"$EPMD_PID_FILE"
    wait_until 15 port_answers "$EPMD_PORT" ||
        die_with_log "$LOG_DIR/epmd.log" "epmd did not start"
}

# default_user and default_pass take effect when the node boots for the first time; as they name
# another user, guest is never made.
rabbitmq_configure() {
    local folder
    folder=$(rabbitmq_folder)
    for_server "$folder/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$RABBITMQ_PORT
management.tcp.ip = 127.0.0.1
management.tcp.port = $MANAGEMENT_PORT
default_user = lethe
default_pass = $RABBITMQ_PASSWORD
default_user_tags.administrator = true
default_vhost = /
default_permissions.configure = .*
default_permissions.read = .*
default_permissions.write = .*
max_message_size = 2097152
disk_free_limit.absolute = 50MB
log.console = true
log.console.level = info
log.file = false
CONF
    for_server "$folder/enabled_plugins" <<<'[rabbitmq_management].'
    as_server test -s "$folder/.erlang.cookie" || {
        openssl rand -hex 24 | for_server "$folder/.erlang.cookie"
        as_server chmod 400 "$folder/.erlang.cookie"
    }
}

# Every path and port is set, so that nothing of the machine's own RabbitMQ is read or used.
# RUNNING_UNDER_SYSTEMD makes RabbitMQ's script exec Erlang, so that there is one process and one pid.
rabbitmq_environment() {
    local folder
    folder=$(rabbitmq_folder)
    RABBITMQ_ENVIRONMENT=(
        -i "PATH=$PATH" LANG=C.UTF-8 "HOME=$folder"
        "ERL_EPMD_PORT=$EPMD_PORT" ERL_EPMD_ADDRESS=127.0.0.1
        "ERL_CRASH_DUMP=$folder/erl_crash.dump"
        RUNNING_UNDER_SYSTEMD=true
        "RABBITMQ_NODENAME=$RABBITMQ_NODE" RABBITMQ_USE_LONGNAME=false
        "RABBITMQ_DIST_PORT=$DIST_PORT"
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}"
        "RABBITMQ_CONF_ENV_FILE=$folder/rabbitmq-env.conf"
        "RABBITMQ_CONFIG_FILE=$folder/rabbitmq.conf"
        "RABBITMQ_CONFIG_FILES=$folder/conf.d/*.conf"
        "RABBITMQ_ADVANCED_CONFIG_FILE=$folder/advanced.config"
        "RABBITMQ_GENERATED_CONFIG_DIR=$folder/config" "RABBITMQ_SCHEMA_DIR=$folder/schema"
        "RABBITMQ_ENABLED_PLUGINS_FILE=$folder/enabled_plugins"
        "RABBITMQ_MNESIA_BASE=$folder/mnesia" "RABBITMQ_LOG_BASE=$folder/log"
        "RABBITMQ_FEATURE_FLAGS_FILE=$folder/feature_flags"
        "RABBITMQ_PID_FILE=$folder/node.pid"
    )
}

rabbitmq_control() {
    rabbitmq_environment
    as_server env "${RABBITMQ_ENVIRONMENT[@]}" "$(dirname "$(rabbitmq_server)")/rabbitmqctl" "$@"
}

rabbitmq_ready_or_dead() {
    rabbitmq_answers || { [[ -n ${RABBITMQ_SPAWNED:-} ]] && ! kill -0 "$RABBITMQ_SPAWNED" 2>/dev/null; }
}

rabbitmq_await() {
    wait_until 120 rabbitmq_ready_or_dead || true
    rabbitmq_answers ||
        die_with_log "$LOG_DIR/rabbitmq.log" "RabbitMQ did not start"
}

rabbitmq_stop() {
    local said='rabbitmq    not running'
    if rabbitmq_running; then
        end_process "$RABBITMQ_PID_FILE" "$(rabbitmq_mark)" 90 ||
            die_with_log "$LOG_DIR/rabbitmq.log" "RabbitMQ did not stop within 90 s"
        said='rabbitmq    stopped'
    fi
    end_process "$EPMD_PID_FILE" "$(epmd_mark)" 15 || die "epmd did not stop"
    rm -f "$RABBITMQ_PID_FILE" "$EPMD_PID_FILE"
    say "$said"
}

# end_process PID_FILE MARK SECONDS: SIGTERM, if it is ours, and waits for its end.
end_process() {
    local pid
    pid=$(pid_in "$1")
    is_ours "$pid" "$2" || return 0
    kill -TERM "$pid" 2>/dev/null || true
    wait_until "$3" is_gone "$pid" "$2"
}

rabbitmq_status() {
    local pid
    pid=$(pid_in "$RABBITMQ_PID_FILE")
    if rabbitmq_running && rabbitmq_answers; then
        say "rabbitmq    running  127.0.0.1:$RABBITMQ_PORT  pid $pid  management http://127.0.0.1:$MANAGEMENT_PORT"
    elif rabbitmq_running; then
        say "rabbitmq    does not answer  pid $pid  see $LOG_DIR/rabbitmq.log"
        return 1
    else
        say "rabbitmq    stopped"
        return 1
    fi
}
