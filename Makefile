# farm: build, try, test, install. `make` alone lists what there is.

SHELL := /bin/bash
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
DESCRIPTION := $(shell sed -n 's/^description = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
URL := $(shell sed -n 's/^\(repository\|homepage\) = "\(.*\)"/\2/p' Cargo.toml | head -n 1)

# Settings: make install PREFIX=/apps/farm MPI_MODULE=openmpi/4.1; after make cuda: make install FARM_BIN=target/release/farm
PREFIX ?= /usr/local
DESTDIR ?=
FEATURES ?=
MPI_MODULE ?=
LMOD_ROOT ?= $(PREFIX)/share/modulefiles
TCL_ROOT ?= $(PREFIX)/share/modulefiles-tcl
CARGO ?= cargo
FEATURE_FLAGS := $(if $(FEATURES),--features $(FEATURES))
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release/farm

# Kernels for GPUs run on the CPU in tests, where there is a C++ compiler to build them. Looked for when it is needed:
# deps.sh may have installed one.
EMULATOR = $$(command -v c++ > /dev/null && echo emulator)

.PHONY: help build cuda demo demo-finetune test kills bench install fmt lint doc clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

build: ## the release binary, target/release/farm
	@.ci/deps.sh build
	$(CARGO) build --release --locked $(FEATURE_FLAGS)

cuda: ## the same with CUDA and NCCL, without a GPU or a toolkit: CUDA_COMPUTE_CAP=80,90, CUDA=12 for V100
	@.ci/deps.sh build
	.ci/cuda.sh $(CARGO) build --release --locked --features cuda,nccl

demo: build ## install what is missing, build, answer a few prompts on two ranks with the small model
	@.ci/demo.sh $(RELEASE)

demo-finetune: build ## the small model learns a new task on two ranks, in minutes: answers before and after
	@.ci/demo-finetune.sh $(RELEASE)

test: ## every test: unit, the GPU's kernels on the CPU, MPI by mpirun, a Slurm cluster of this machine's own
	@.ci/deps.sh build test
	$(CARGO) test --locked --features "$(EMULATOR)"

kills: build ## the long tests of runs that are killed: thirty kills, short time limits (some ten minutes)
	@.ci/deps.sh test
	FARM_BIN=$(RELEASE) tests/cluster/kills.sh

.PHONY: fuzz
fuzz: ## damaged model files for FARM_FUZZ_SECONDS (20) a kind
	FARM_FUZZ_SECONDS=$${FARM_FUZZ_SECONDS:-20} cargo test --test fuzz

bench: ## the benchmarks
	@.ci/deps.sh build
	$(CARGO) bench --locked $(FEATURE_FLAGS)

fmt: ## format the sources
	$(CARGO) fmt --all

lint: ## clippy, warnings are errors: without and with the code for GPUs (which needs no toolkit for that)
	@.ci/deps.sh build
	$(CARGO) clippy --locked --all-targets -- -D warnings
	FARM_CUDA_CHECK=1 $(CARGO) clippy --locked --all-targets --features "cuda nccl $(EMULATOR)" -- -D warnings

doc: ## the API documentation, warnings are errors
	@.ci/deps.sh build
	RUSTDOCFLAGS="-D warnings" FARM_CUDA_CHECK=1 $(CARGO) doc --locked --no-deps --features "cuda nccl $(EMULATOR)"

clean: ## remove what was built
	$(CARGO) clean

# ---------------------------------------------------------------- install

# FARM_BIN=FILE installs a binary that is already built.
ifdef FARM_BIN
install: ## binary, templates, prompts, small model, module files: PREFIX=… [DESTDIR=…] [MPI_MODULE=openmpi/4.1]
else
FARM_BIN := $(RELEASE)
install: build
endif
	@for path in "$(PREFIX)" "$(LMOD_ROOT)" "$(TCL_ROOT)"; do \
		case "$$path" in /*) ;; *) echo "make install: '$$path' is not an absolute path" >&2; exit 2;; esac; done
	install -d "$(DESTDIR)$(PREFIX)/bin" $(foreach d,slurm prompts models doc,"$(SHARE)/$(d)")
	install -m 755 "$(FARM_BIN)" "$(DESTDIR)$(PREFIX)/bin/farm"
	cp -r prompts/. "$(SHARE)/prompts"
	cp -r models/tiny "$(SHARE)/models"
	install -m 644 slurm/README.md "$(SHARE)/slurm"
	@for file in slurm/*.sbatch slurm/farm-job.sh; do $(call fill,$$file,$(SHARE)/slurm/$${file##*/}); done
	@for file in README.md LICENSE docs/*.md; do [ ! -f $$file ] || install -m 644 $$file "$(SHARE)/doc"; done
	@for page in docs/*.1; do [ ! -f $$page ] || install -D -m 644 -t "$(DESTDIR)$(PREFIX)/share/man/man1" $$page; done
	@install -d "$(DESTDIR)$(LMOD_ROOT)/farm" "$(DESTDIR)$(TCL_ROOT)/farm"
	@$(call fill,modules/farm.lua.in,$(DESTDIR)$(LMOD_ROOT)/farm/$(VERSION).lua)
	@$(call fill,modules/farm.tcl.in,$(DESTDIR)$(TCL_ROOT)/farm/$(VERSION))
	@echo "installed farm $(VERSION); module use $(LMOD_ROOT) && module load farm"

SHARE = $(DESTDIR)$(PREFIX)/share/farm

# fill TEMPLATE FILE: replaces the @NAMES@; lines on MPI or the URL go where there is none
fill = sed -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@VERSION@|$(VERSION)|g' -e 's|@DESCRIPTION@|$(DESCRIPTION)|g' \
	$(if $(URL),-e 's|@URL@|$(URL)|g',-e '/@URL@/d') \
	$(if $(MPI_MODULE),-e 's/^[-\#]*@MPI@ //' -e 's|@MPI_MODULE@|$(MPI_MODULE)|',-e '/@MPI@/d') "$(1)" > "$(2)"
