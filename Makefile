# Everything a developer or CI does with Starfish, from a bare machine on. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# Mooncake's libraries; a C compiler for the shim that confines its listeners.
APT_PACKAGES := libibverbs1 libnuma1 libcurl4 gcc libc6-dev
TORCH := torch==2.13.0
PLAYWRIGHT := 1.65.2
# Hundreds of processes load the project's modules: each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE
# A person sees pip's progress; a log only what went wrong. Python compiles what is ever imported.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(shell [ -t 2 ] || echo -qq)
PYTEST := $(BIN)/python -m pytest -q
# Tests that share no machine resource run side by side, a file in one process.
SIDE_BY_SIDE := -n auto --dist loadfile
# Whole instances, which wait for most of their time.
TWO_AT_ONCE := -n 2 --dist loadfile
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
UP_FLAGS ?=
SOAK_FLAGS ?=
KUBE_BIN ?= /usr/local/bin
KUBE_CRDS ?=
# Beside the virtual environment: the pins of other people's clients clash.
CLIENTS := .venv-clients
CLIENT_PINS := tests/clients/requirements
CLIENT_ENVIRONMENTS := $(patsubst $(CLIENT_PINS)/%.txt,$(CLIENTS)/%/.installed,$(sort $(wildcard $(CLIENT_PINS)/*.txt)))
NODE_CLIENTS := tests/clients/node

define say
@printf '\n\033[1m== %s\033[0m\n' "$(1)"
endef

.SILENT:
.PHONY: help install up test lint unit security fuzz sim sim-long integration integration-authenticated clients soak test-page lock test-compose test-cuda-image test-chart release-wheel clean system-packages

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-26s %s\n", $$1, $$2}'

install: $(STAMPS)/warm ## Everything that is missing, into .venv (and Debian's libraries, as root)

up: install ## Start a whole instance, stream one completion, serve until Ctrl-C
	@exec $(BIN)/starfish up $(UP_FLAGS)

test: ## All that CI runs
	$(MAKE) --no-print-directory -j 2 install lint # kernels compile on one core, types are checked on another
	$(MAKE) --no-print-directory unit security sim integration
	$(call say,all tests passed)

lint: $(STAMPS)/package $(STAMPS)/helm ## Format, lint, types, documentation, container files, chart
	$(call say,lint: format)
	$(BIN)/ruff format --check .
	$(call say,lint: ruff)
	$(BIN)/ruff check .
	$(call say,lint: types)
	$(BIN)/mypy
	$(call say,lint: documentation)
	$(BIN)/python -m docs.generate --check
	$(BIN)/python -m docs.check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(call say,lint: container files)
	tests/compose/lint.sh $(BIN)
	$(call say,lint: chart and units)
	tests/deploy/lint.sh $(BIN)

unit: install ## Pure logic, in milliseconds
	$(call say,unit tests)
	$(PYTEST) $(SIDE_BY_SIDE) tests/unit tests/test_architecture.py tests/browser

security: install ## Attacks that must fail, and hostile inputs for some seconds
	$(call say,attacks)
	$(PYTEST) $(TWO_AT_ONCE) tests/security
	$(call say,hostile inputs)
	$(PYTEST) $(SIDE_BY_SIDE) tests/fuzz

fuzz: install ## Fresh hostile inputs, for MINUTES (60) in all; what finds a fault joins the corpus
	$(call say,hostile inputs for $(or $(MINUTES),60) minutes)
	STARFISH_FUZZ_SECONDS=$$(( $(or $(MINUTES),60) * 60 / 4 )) \
	STARFISH_FUZZ_SEED=$(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom)) \
	$(PYTEST) -s tests/fuzz

sim: install ## All services on a fake clock, under seeded faults
	$(call say,simulator)
	$(ONE_THREAD) $(PYTEST) -n auto --dist worksteal tests/sim

sim-long: install ## Thousands of fresh schedules (KIND=faults|changes|etcd SCHEDULES=20000 FIRST_SEED=100000 JOBS=cores)
	$(call say,simulator: $(or $(SCHEDULES),20000) schedules and half as many on cards)
	$(BIN)/python -m tests.sim.many_schedules --schedules $(or $(SCHEDULES),20000) \
	--kind $(or $(KIND),faults) --first-seed $(or $(FIRST_SEED),100000) $(if $(JOBS),--jobs $(JOBS))

integration: install ## Real processes, real etcd, real signals
	$(call say,integration tests)
	$(PYTEST) $(TWO_AT_ONCE) --no-loadscope-reorder tests/integration

integration-authenticated: install ## The same with API keys and the instance's secret everywhere
	$(call say,integration tests with all authentication on)
	STARFISH_TEST_AUTHENTICATED=1 $(PYTEST) $(TWO_AT_ONCE) tests/integration

clients: install $(CLIENT_ENVIRONMENTS) $(CLIENTS)/.node ## Other people's clients, unchanged, each in an environment of its own
	$(call say,clients)
	$(BIN)/python -m tests.clients.run $(CLIENT_ENVIRONMENTS:/.installed=)

soak: install ## Mixed load and a fault every 20 s for MINUTES (10; the long form has 120): nothing may grow
	$(call say,soak of $(or $(MINUTES),10) minutes)
	mkdir -p build
	exec $(BIN)/starfish bench soak --minutes $(or $(MINUTES),10) --report build/soak.json $(SOAK_FLAGS)

test-page: install ## The page in a headless Chromium, which it installs (as root; 400 MB)
	$(call say,page)
	@command -v chromium >/dev/null || { \
	  [ "$$(id -u)" -eq 0 ] || { echo "test-page: run: sudo apt-get install -y chromium" >&2; exit 1; }; \
	  apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }
	$(PIP) playwright==$(PLAYWRIGHT)
	$(PYTEST) tests/browser

lock: install ## Renew requirements/*.lock, from which the images install
	$(call say,locks)
	$(BIN)/python tests/compose/write_locks.py

test-compose: install ## The containers on a real engine of its own (root; FORMS="host cluster", KEEP=folder for its layers)
	$(call say,containers)
	tests/compose/run.sh $(BIN)

test-cuda-image: ## The CUDA image, built and tried without a card on a real engine of its own (root; KEEP=folder for its layers)
	$(call say,CUDA image)
	tests/compose/cuda_image.sh

test-chart: $(STAMPS)/package $(STAMPS)/helm ## The chart on a real API server (KUBE_BIN=folder of kube-apiserver, -controller-manager, -scheduler)
	$(call say,chart)
	$(BIN)/python -m tests.deploy.api_server --kube $(KUBE_BIN) --bin $(BIN) $(if $(KUBE_CRDS),--crds $(KUBE_CRDS))

release-wheel: install ## The wheel of this commit into tests/releases/, in place of the last release's
	rm -f tests/releases/*.whl
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps --wheel-dir tests/releases .

clean: ## Remove what the targets above have made here
	rm -rf $(VENV) $(CLIENTS) $(NODE_CLIENTS)/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stages of the installation, each done once and again when what it depends on has changed.

system-packages:
	@missing=(); for package in $(APT_PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing+=($$package); \
	done; \
	if [ $${#missing[@]} -eq 0 ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "install: this is no Debian; install what corresponds to: $${missing[*]}" >&2; exit 1; fi; \
	if [ "$$(id -u)" -ne 0 ]; then \
	  echo "install: libraries are missing; run: sudo apt-get install -y $${missing[*]}" >&2; exit 1; fi; \
	printf '\n\033[1m== install: Debian packages %s\033[0m\n' "$${missing[*]}"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $${missing[@]}

$(STAMPS)/venv: | system-packages
	@command -v $(PYTHON) >/dev/null || { \
	  echo "install: $(PYTHON) is not here; install it (Debian 12: apt-get install -y python3.11-venv) or pass PYTHON=…" >&2; exit 1; }
	$(call say,install: Python environment in $(VENV))
	test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv $(VENV) || { \
	    [ "$$(id -u)" -eq 0 ] && apt-get update -qq && apt-get install -y -qq python3.11-venv && $(PYTHON) -m venv $(VENV); }; }
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(call say,install: torch (the largest part))
	$(PIP) $(TORCH)
	touch $@

$(STAMPS)/package: pyproject.toml $(STAMPS)/torch
	$(call say,install: Starfish and its dependencies)
	$(PIP) -e '.[dev]'
	touch $@

$(STAMPS)/warm: $(STAMPS)/package $(wildcard gpu_worker/cpu/kernels/*.py)
	$(call say,install: compile the CPU kernels)
	$(BIN)/python -m gpu_worker.model_tools warm-up
	touch $@

$(STAMPS)/helm: $(STAMPS)/package tests/deploy/helm.txt
	$(call say,install: Helm)
	$(BIN)/python tests/deploy/fetch_helm.py $(BIN)
	touch $@

# Every package is pinned, so nothing is left to resolve. guidellm loads torch, which is no pin of
# its file: torch's own requirements differ from index to index.
$(CLIENTS)/%/.installed: $(CLIENT_PINS)/%.txt
	$(call say,clients: install $*)
	$(PYTHON) -m venv --clear $(CLIENTS)/$*
	$(if $(filter guidellm,$*),$(CLIENTS)/$*/bin/python -m pip install --disable-pip-version-check -qq $(TORCH))
	$(CLIENTS)/$*/bin/python -m pip install --disable-pip-version-check -qq --no-deps -r $<
	touch $@

$(CLIENTS)/.node: $(NODE_CLIENTS)/package-lock.json
	$(call say,clients: install those for Node)
	mkdir -p $(CLIENTS)
	if command -v npm >/dev/null; then cd $(NODE_CLIENTS) && npm ci --no-audit --no-fund --silent; \
	else echo "npm is not here: the clients for Node are left out"; fi
	touch $@
