# What one does with a checkout. "make" alone lists it all.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

LOCAL := $(or $(LETHE_LOCAL_DIR),.local)
# Each version has servers of its own.
ifdef PG
override LOCAL := $(abspath $(LOCAL))/pg$(PG)
export LETHE_LOCAL_DIR := $(LOCAL)
export LETHE_POSTGRESQL := $(PG)
endif
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Real use, the image and the benchmark take the release build; all that is tried on this machine the quick one.
BIN := $(TARGET)/release
QUICK_BIN := $(TARGET)/quick
WORKERS := $(notdir $(wildcard workers/*))
FLEET := --bin lethe $(WORKERS:%=--bin %)
LOCKED := $(if $(filter true,$(CI)),--locked)
WITH_ENV := source "$(LOCAL)/env"

.PHONY: help build servers up down test check schema chaos lint demo bench bench-gain bench-growth scale clean-local

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## Build in release, into target/release/
	cargo build --release $(FLEET) $(LOCKED)
	deploy/no-fault-points $(addprefix $(BIN)/,lethe $(WORKERS))

servers: ## Start private PostgreSQL and RabbitMQ, write .local/env, migrate
	deploy/local/servers install
	deploy/local/servers start
	cargo build --profile quick --bin lethe $(LOCKED)
	$(WITH_ENV); "$(QUICK_BIN)/lethe" migrate

up: servers ## Start servers and one of each worker; ERASURE_EXECUTOR=3 starts three
	cargo build --profile quick $(FLEET) $(LOCKED)
	deploy/local/fleet up

down: ## Stop workers and servers
	deploy/local/fleet down
	deploy/local/servers stop

test: ## Run all tests, against real servers and real binaries; PG=17 against PostgreSQL 17 (15 to 18)
	deploy/local/servers install tests
	cargo build --profile quick --workspace --bins $(LOCKED)
	cargo test --profile quick --workspace --no-run $(LOCKED)
	sync # the servers' commits would wait behind all that the build has written
	deploy/local/servers start
	$(WITH_ENV); \
	if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --cargo-profile quick --workspace $(LOCKED) && \
		cargo test --profile quick --doc --workspace $(LOCKED); \
	else \
		RUST_TEST_THREADS=4 cargo test --profile quick --workspace $(LOCKED); \
	fi

check: ## What needs no servers: format, lints, unit tests, the documents
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(LOCKED) -- -D warnings
	cargo test --profile quick --workspace --lib --bins $(LOCKED) --quiet
	cargo test --profile quick --workspace --test e2e $(LOCKED) --quiet -- house::

schema: ## Write down in shared/db/schema/current.sql what the migrations make
	LETHE_WRITE_SCHEMA=1 deploy/local/with-servers cargo test --profile quick --workspace --test e2e $(LOCKED) -- the_current_schema

chaos: export LETHE_LOCAL_DIR = $(abspath $(LOCAL))/chaos
chaos: ## The fault suite: 20 seeds on servers of its own; SEED=7 SEEDS=1 repeats one
	cargo build --profile quick --workspace --bins $(LOCKED)
	env -u DATABASE_URL -u AMQP_URL deploy/local/with-servers "$(QUICK_BIN)/chaos" \
		--servers "$(CURDIR)/deploy/local/servers" --seeds $(or $(SEEDS),20) $(if $(SEED),--seed $(SEED)) --defects
	env -u DATABASE_URL -u AMQP_URL deploy/local/with-servers cargo test --profile quick --workspace --test e2e $(LOCKED) -- --ignored

lint: ## Check formatting, clippy, the documentation of the code, spelling, shell scripts, the image, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	@if command -v shellcheck >/dev/null; then \
		grep -rlE '^(#!/.*sh$$|# shellcheck shell=)' deploy .ci | xargs shellcheck -x && echo "shellcheck: fine"; \
	else \
		echo "shellcheck is not installed: shell scripts left out"; \
	fi
	@for tool in "typos" "hadolint deploy/Dockerfile"; do \
		if [[ -x "$(LOCAL)/venv-lint/bin/$${tool%% *}" ]]; then \
			"$(LOCAL)/venv-lint/bin/"$$tool && echo "$${tool%% *}: fine"; \
		else \
			echo "$${tool%% *} is not installed (deploy/local/servers install lint): left out"; \
		fi || exit 1; \
	done
	@if cargo deny --version >/dev/null 2>&1; then \
		cargo deny check bans licenses sources; \
	else \
		echo "cargo-deny is not installed: licences and sources left out"; \
	fi

demo: ## The whole life of some thousand requests, from nothing
	deploy/local/with-servers bash -euc 'cargo build --profile quick $(FLEET) --bin demo $(LOCKED); exec "$(QUICK_BIN)/demo"'

bench: ## Measure against the raw cost of the same work; QUICK=1, ROWS="intake release", FLAGS=…
	deploy/local/with-servers bash -euc 'cargo build --release --workspace $(LOCKED); \
		exec "$(BIN)/lethe-bench" rows $(if $(QUICK),--quick) $(FLAGS) $(ROWS)'

bench-gain: ## The gain over an earlier commit, by turns with it: BEFORE=REV; QUICK=1, ROWS=…, FLAGS=…
	@test -n "$(BEFORE)" || { echo "error: say over which commit: make bench-gain BEFORE=REV" >&2; exit 2; }
	git worktree prune
	test -d target/before || git worktree add --detach target/before "$(BEFORE)"
	git -C target/before checkout --detach "$(BEFORE)"
	cargo build --release --workspace $(LOCKED) --manifest-path target/before/Cargo.toml --target-dir target/before/target
	deploy/local/with-servers bash -euc 'cargo build --release --workspace $(LOCKED); \
		exec "$(BIN)/lethe-bench" gain --before target/before/target/release $(if $(QUICK),--quick) $(FLAGS) $(ROWS)'

bench-growth: ## Measure how cost grows, and draw docs/develop/performance/*.png; QUICK=1, CURVES="workers"
	deploy/local/with-servers bash -euc 'cargo build --release --workspace $(LOCKED); \
		"$(BIN)/lethe-bench" growth $(if $(QUICK),--quick) $(FLAGS) $(CURVES)'
	tests/bench/plot.sh

scale: ## Measure beside years of data, in a database of its own; QUICK=1, ROWS="round commands", FLAGS=…
	deploy/local/with-servers bash -euc 'cargo build --release --workspace $(LOCKED); \
		exec "$(BIN)/lethe-bench" scale $(if $(QUICK),--quick) $(FLAGS) $(ROWS)'

clean-local: ## Stop everything and remove .local
	deploy/local/fleet down
	deploy/local/servers clean
