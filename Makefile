# SPDX-License-Identifier: MIT
# make run: live traffic with owners.  make test: all tests this machine can run.  make help: the rest.
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
ENGINE ?= auto
REPEAT ?= 1
LOAD ?= 0
# In a virtual machine that is there for the tests, `make` alone means them.
ifeq ($(PACKET_HUNTER_KERNEL),own)
.DEFAULT_GOAL := test
endif

help:
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

run: ## set up what is missing, show live traffic with owners (ENGINE=module loads the module)
	@sh tests/run.sh $(ENGINE)

test: tools ## lint, unit, host, virtual machine, attribution; a summary with every skip
	@sh tests/tiers.sh $(if $(TIERS),"$(TIERS)")

demo: tools ## the module itself, in a throw-away virtual machine with traffic of its own
	@PYTHONPATH=tests/vm $(PYTHON) -m vmtest.demo

tools:
	@./build.sh --test-tools

lint: tools ## ruff, mypy --strict, shellcheck, sparse in the kernel's own root
	@sh tests/lint.sh

test-unit: tools ## what needs no root
	$(PYTEST) tests/unit
test-host: tools ## real sockets and processes, no module
	$(PYTEST) tests/host
test-vm: tools ## the module on PACKET_HUNTER_KERNEL (default: Debian's 6.1, in QEMU)
	$(PYTEST) tests/vm --ignore tests/vm/test_attribution.py --ignore tests/vm/proof
test-attribution: tools ## the ground-truth suite; ENGINE=ebpf; REPEAT=10: each ten times, LOAD=1: every CPU busy
	PACKET_HUNTER_REPEAT=$(REPEAT) PACKET_HUNTER_LOAD=$(LOAD) PACKET_HUNTER_ENGINE=$(filter ebpf,$(ENGINE)) $(PYTEST) tests/vm/test_attribution.py
test-ebpf: tools ## a part of it with engine ebpf, as make test plays it
	PACKET_HUNTER_ENGINE=ebpf PACKET_HUNTER_SOME=1 $(PYTEST) tests/vm/test_attribution.py
test-matrix: tools ## tests/vm on 5.10, 6.1, 6.12 (two), 7.2, 7.3: a table of build, load, attribution, unload, ebpf, dmesg
	@PYTHONPATH=tests/vm $(PYTHON) -m vmtest.matrix
test-kasan: tools ## tests/vm, stress, failing allocations on 6.1 with KASAN, lockdep, kmemleak, and with KCSAN (PIECES=; each compiled once, 10 min)
	@PYTHONPATH=tests/vm:tests $(PYTHON) -m vmtest.proof kasan $(PIECES)
test-long: tools ## 200 loads, 1,000,000 sockets, attacks, broken packets in full on 6.1 (PIECES=; hours emulated)
	@PYTHONPATH=tests/vm:tests $(PYTHON) -m vmtest.proof long $(PIECES)
test-vagrant: tools ## the commands of the README in a Vagrant machine (root)
	@tests/vagrant/run.sh
test-browser: ## the report in a real browser (root; installs chromium, some 300 MB unpacked)
	@./build.sh --browser
	$(PYTEST) tests/browser
test-packages: tools ## Debian packages and DKMS in a Debian 12 and 13 of their own (root)
	$(PYTEST) tests/packages --ignore tests/packages/test_bare.py
test-bare: tools ## a fresh clone on Debian 12 and 13 with nothing installed (root)
	$(PYTEST) tests/packages/test_bare.py
test-fleet: tools ## two guests with daemons, module and ebpf; three servers of docs/FLEET.md, Debian's and upstream's
	$(PYTEST) tests/fleet
fuzz: ## every reader of foreign input, guided by coverage, SECONDS=600 each (atheris, libFuzzer; NAMES=)
	@./build.sh --fuzz
	$(PYTHON) tests/fuzzing/run.py $(or $(SECONDS),600) $(NAMES)
nonsense: tools ## 10 million bytes of nonsense for a running daemon (root; BYTES=, SEED=)
	$(PYTHON) tests/nonsense.py $(or $(BYTES),10000000) $(SEED)
attack: tools ## one user does the worst on 63 connections while root works: figures (root; SECONDS=30)
	$(PYTHON) tests/attack.py $(or $(SECONDS),30)
soak: tools ## 63 clients, restarts, clock jumps, takeovers for SECONDS=600: memory flat, accounts close (root)
	$(PYTHON) tests/soak.py $(or $(SECONDS),600)

bench: bench-kernel bench-daemon bench-memory bench-start bench-hunter ## all of the following but accuracy; into bench/RESULTS.md
bench-kernel: tools ## what the module costs, in instructions, in QEMU
	PYTHONPATH=tests/vm $(PYTHON) bench/kernel_cost.py
bench-load: tools ## how long engine ebpf takes to load, and the verifier's work (root)
	PYTHONPATH=python:tests/vm:bench $(PYTHON) bench/ebpf_load.py
bench-daemon: tools ## ingest, history at a million flows, port questions
	PYTHONPATH=python $(PYTHON) bench/daemon_cost.py
bench-history: tools ## a month of history at 100 flows/s: its size, questions to it (8 GB in TMPDIR)
	PYTHONPATH=python $(PYTHON) bench/history_cost.py
bench-memory: tools ## the daemon's memory with 1,000 to 1,000,000 flows
	PYTHONPATH=python $(PYTHON) bench/memory_cost.py
bench-start: tools ## the first look at 50,000 sockets, beside psutil and lsof (root)
	PYTHONPATH=python $(PYTHON) bench/start_cost.py
bench-hunter: tools ## top with 10,000 flows, annotate with 1 GB
	PYTHONPATH=python $(PYTHON) bench/hunter_cost.py
bench-fleet: tools ## 2,000 hosts with TLS and keys at one server and one collector; questions to 100 M flows (5 GB in TMPDIR)
	PYTHONPATH=python:tests:bench $(PYTHON) bench/fleet_load.py
	PYTHONPATH=python:bench $(PYTHON) bench/fleet_questions.py
bench-accuracy: tools ## beside nethogs, ss, psutil, tcplife, tcpconnect; all scenarios, both engines (root)
	PYTHONPATH=python:tests/vm:bench $(PYTHON) bench/accuracy_everywhere.py $(WHERE)

menu: ## what is built, loaded and running, and a key for each thing to do
	@[ -x $(PYTHON) ] || ./build.sh --no-module
	@$(PYTHON) python/menu.py

reproducible: tools ## wheel, sdist, eBPF objects and Debian packages built twice: the same hashes
	$(PYTHON) tests/reproducible.py $(PARTS)
sbom: ## what is shipped and what it needs, as CycloneDX JSON into dist/
	@[ -x $(PYTHON) ] || ./build.sh --no-module
	@mkdir -p dist
	$(PYTHON) debian/sbom.py > dist/packet-hunter.cdx.json

deb: ## Debian source and binary packages into dist/ (says which packages it wants)
	@[ -x $(PYTHON) ] || ./build.sh --no-module
	debian/build dist

clean: ## remove what was built, .venv too
	@./build.sh clean
distclean: ## clean, and what tests keep in ~/.cache/packet-hunter (kernels, modules, boxes)
	@./build.sh distclean

.PHONY: bench-history help run demo test tools lint test-unit test-host test-vm test-attribution test-ebpf test-matrix test-kasan test-long test-vagrant test-browser test-packages test-bare test-fleet fuzz nonsense attack soak reproducible sbom bench bench-kernel bench-load bench-daemon bench-memory bench-start bench-hunter bench-fleet bench-accuracy menu deb clean distclean
