# shellcheck shell=bash
# .local/env and the keys it names. Keys are made once and kept.

write_settings() {
    make_keys
    prepare_http_port
    private_dir "$LOCAL_DIR/keystore"
    private_dir "$LOCAL_DIR/results"
    (
        umask 077
        settings "$1" >"$LOCAL_DIR/env.new"
        mv "$LOCAL_DIR/env.new" "$LOCAL_DIR/env"
    )
}

settings() {
    local keys=$LOCAL_DIR/keys
    # Spaces are the one thing in usual paths that a URL cannot hold.
    local url=file://${LOCAL_DIR// /%20}
    if [[ $1 == external ]]; then
        setting LETHE_LOCAL_SERVERS 0
        setting DATABASE_URL "$DATABASE_URL"
        setting AMQP_URL "$AMQP_URL"
        [[ -z ${RABBITMQ_MANAGEMENT_URL:-} ]] || setting RABBITMQ_MANAGEMENT_URL "$RABBITMQ_MANAGEMENT_URL"
    else
        setting LETHE_LOCAL_SERVERS 1
        setting DATABASE_URL "postgres://lethe:$POSTGRESQL_PASSWORD@127.0.0.1:$POSTGRESQL_PORT/lethe"
        setting AMQP_URL "amqp://lethe:$RABBITMQ_PASSWORD@127.0.0.1:$RABBITMQ_PORT/%2f"
        setting RABBITMQ_MANAGEMENT_URL "http://lethe:$RABBITMQ_PASSWORD@127.0.0.1:$MANAGEMENT_PORT"
    fi
    setting LETHE_PROCESSOR_DOMAIN localhost
    setting LETHE_PUBLIC_URL "http://localhost:$HTTP_PORT"
    setting LETHE_HTTP_LISTEN "127.0.0.1:$HTTP_PORT"
    setting LETHE_SIGNING_KEY_FILE "$keys/signing-key.pem"
    setting LETHE_SIGNING_CERT_FILE "$keys/signing-cert.pem"
    setting LETHE_MASTER_KEY_FILE "$keys/master.key"
    setting LETHE_KEY_STORE "$url/keystore"
    # A checkout may sleep for months: nobody has to agree to the clock when it wakes up.
    setting LETHE_CLOCK_ABSENCE 3650d
    setting LETHE_RESULT_STORE "$url/results"
    setting LETHE_CALLBACK_ALLOW '127.0.0.0/8,::1/128,http'
}

# A line that any POSIX shell reads back to exactly the value.
setting() {
    local quote="'\\''"
    printf "export %s='%s'\n" "$1" "${2//\'/"$quote"}"
}

make_keys() {
    local keys=$LOCAL_DIR/keys
    have openssl || die "openssl is needed to make the local keys"
    private_dir "$keys"
    (
        umask 077
        [[ -s $keys/master.key ]] || make_file "$keys/master.key" openssl rand -base64 32
        [[ -s $keys/signing-key.pem ]] || {
            rm -f "$keys/signing-cert.pem"
            make_file "$keys/signing-key.pem" \
                openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048
        }
        [[ -s $keys/signing-cert.pem ]] || {
            certificate_config >"$keys/signing-cert.conf"
            make_file "$keys/signing-cert.pem" openssl req -x509 -new -sha256 -days 3650 \
                -key "$keys/signing-key.pem" -config "$keys/signing-cert.conf"
        }
    )
}

private_dir() {
    mkdir -p "$1"
    chmod 700 "$1"
}

# make_file FILE COMMAND...: the output of COMMAND, and FILE only if COMMAND succeeded.
make_file() {
    local file=$1
    shift
    "$@" >"$file.new" 2>"$LOG_DIR/openssl.log" ||
        die_with_log "$LOG_DIR/openssl.log" "could not make $file"
    mv "$file.new" "$file"
}

# An end-entity certificate: openssl's default would be a CA, which TLS libraries refuse as a server.
certificate_config() {
    cat <<'CONF'
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = localhost
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = DNS:localhost, IP:127.0.0.1
CONF
}
