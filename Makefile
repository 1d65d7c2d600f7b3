# make run      train a small Mamba-3 on real text, evaluate it, sample from it (minutes, 2 CPU cores)
# make parity   the state-tracking experiment: what rotation is for
# make test     lint, and the tests of minutes: all that runs in plain XLA, a family of each kernel's in an interpreter,
#               a compile for each TPU; gets libtpu, the compiler for TPUs (213 MB, Linux on x86-64), into build/libtpu,
#               where only the tests that want it look: with it in .venv all JAX looks for a TPU; what is compiled is kept
#               in build/compiled for the rest of make test-all, and for pytest by hand
# make test-all these and the rest: every property of every kernel in an interpreter, every TPU compile, tasks of lm-eval,
#               which it gets (191 MB) into build/lm_eval
# make test-gpu the op and its kernels on this machine's GPU, with the python that has jax for it
# make time-gpu every figure of a GPU in the tables, what matters most first: each is written as it comes
# make track    the state-tracking table on this machine's GPU, each variant written as it comes: the same command goes on
# All but the last three install into .venv first.

PYTHON ?= python3
WORKDIR ?= runs/text
PYTEST ?= -n auto --maxprocesses=8 --dist=worksteal
BIN := .venv/bin
GPU_PYTEST := $(PYTHON) -m pytest tests/ops tests/pallas_kernels --ignore-glob="*tpu*"

.PHONY: run parity test test-all test-gpu time-gpu track install clean

run: install
	$(BIN)/python -m launch.train --config=experiments/text.py --workdir=$(WORKDIR)
	$(BIN)/python -m launch.evaluate --workdir=$(WORKDIR)
	$(BIN)/python -m launch.generate --workdir=$(WORKDIR) --prompt="def " --temperature=0.7
	@echo "The curve: $(WORKDIR)/curve.png"

parity: install
	$(BIN)/python -m launch.sweep --config=experiments/tasks/parity.py --workdir=runs/parity

# On a machine with a GPU, in an environment that has jax for it: the op and its kernels, compiled for real.
# Then, one after another, what wants all of its memory.
test-gpu:
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(GPU_PYTEST) -n 14 -m "not alone and not cpu"
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_ALLOCATOR=platform $(GPU_PYTEST) -m alone

time-gpu:
	$(PYTHON) -m experiments.benchmarks.ssm --name=ssm_hopper --implementations=mosaic_gpu,triton,chunked
	$(PYTHON) -m experiments.benchmarks.train
	$(PYTHON) -m experiments.benchmarks.decode --name=decode_h200
	$(PYTHON) -m experiments.benchmarks.profile --name=profile_hopper --implementation=mosaic_gpu
	$(PYTHON) -m experiments.benchmarks.population --name=population_h200 --implementations=float32:,bfloat16:mosaic_gpu
	$(PYTHON) -m experiments.benchmarks.tune

TRACKED := tracking_parity tracking_arithmetic tracking_brackets

track:
	for name in $(TRACKED); do $(PYTHON) -m launch.sweep --config=experiments/tasks/$$name.py --workdir=runs/$$name \
		--results=experiments/results || exit; done

test: .venv/installed build/libtpu/installed
	@$(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('libtpu') and 'libtpu is in .venv: make clean')"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m experiments.benchmarks.table --check
	$(BIN)/python -m experiments.report --check
	rm -rf build/compiled
	$(BIN)/python -m pytest $(PYTEST) -m "not slow and not full and not libtpu"
	$(BIN)/python -m pytest $(PYTEST) tests/pallas_kernels tests/launch -m "not slow and not full and libtpu"

test-all: test build/lm_eval/installed
	$(BIN)/python -m pytest $(PYTEST) -m "not slow and full and not libtpu"
	$(BIN)/python -m pytest $(PYTEST) tests/pallas_kernels tests/launch -m "not slow and full and libtpu"

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

build/libtpu/installed: .venv/installed requirements-test.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --target=$(@D) --requirement requirements-test.txt
	mkdir -p $(@D) && touch $@

build/lm_eval/installed: .venv/installed requirements-lm-eval.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target=$(@D) --requirement requirements-lm-eval.txt
	touch $@

clean:
	rm -rf .venv build
