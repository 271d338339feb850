# Each target makes the virtual environment if it is missing or older than what it is made from.
#   make demo    raw text -> tokenizer -> shards -> training -> export -> scores, on a CPU
#   make test    the test suite, by files over WORKERS=logical|N processes, at most 4; REQUIRE=1
#                fails where a browser is missing that looks at pages, instead of leaving it out
#   make lint    ruff and pyright
#   make faults  the fault matrix: every row, and a table of what was seen
#   make slurm   jobs on a live SLURM of several hosts on this machine; needs root;
#                REQUIRE=1 fails where it cannot run
#   make soak    KILLS=200 random kills against undisturbed runs
#   make matrix  every ZeRO mode against a plain oracle
#   make bench   ratios against peers, written to tests/benchmarks/results/
#   make scores  WORK=scores STEPS= CONFIG= TASKS=: pre-trains on fetched English and fine-tunes on
#                labelled tasks, from its weights and from random ones; hours; writes README.md's table
#   make gpu     PART=tests|attention|layer|step SIZE=large BUDGET_SECONDS=480: GPU tests and
#                benchmarks with the packages that PYTHON has; installs nothing
#   make gpu-wheels  wheels that a GPU machine without a package index needs; make gpu WHEELS=...
#   make kernels-compile  every tile of every kernel, compiled without a GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Named exactly and first: a range would bring gigabytes of CUDA libraries to a machine without a
# GPU. For a GPU: make TORCH="torch==2.13.0 --index-url ...", as pytorch.org says for your driver.
TORCH ?= torch==2.13.0
DEMO ?= demo
KILLS ?= 200
# Cores; `logical` asks the machine.
WORKERS ?= logical
# Tests on a live SLURM wait more than they compute.
SLURM_WORKERS ?= 5

export DS_BUILD_OPS = 0

.PHONY: venv demo test lint faults slurm slurm-packages soak matrix bench scores gpu gpu-wheels kernels-compile clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	# The authors' v2-era encoder, a judge in tests/numerics; its own dependencies no longer install.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt deberta==0.1.12
	# The judge of exported datasets and a peer of the loader; its reader needs no other package.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt megatron-core==0.16.1
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deberta demo --output $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not faults and not slurm" --numprocesses $(WORKERS) --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder --durations 15 --slow-files 20 tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults --seeds 20 --faults-table tests/faults/results/faults.md
	$(BIN)/python -m pytest -m faults tests/distributed

# As root, on Debian; elsewhere it says what is missing.
slurm-packages:
	@tests/slurm/install_packages.sh

slurm: $(STAMP) slurm-packages
	$(BIN)/python -m pytest tests/slurm --numprocesses $(SLURM_WORKERS) --dist loadfile \
		--no-loadscope-reorder --durations 15 --slurm-table tests/slurm/results/slurm.md \
		$(if $(REQUIRE),--require-slurm)

soak: $(STAMP)
	$(BIN)/python -m tests.soak --kills $(KILLS) --output tests/soak/results/soak.md

matrix: $(STAMP)
	$(BIN)/python -m tests.matrix.run --output tests/matrix/results/matrix.json

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py

scores: $(STAMP)
	$(BIN)/python -m tests.benchmarks.labelled_tasks --work $(or $(WORK),scores) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(CONFIG),--config $(CONFIG)) $(if $(TASKS),--tasks $(TASKS))
	$(BIN)/python -m tests.benchmarks.labelled_table --write README.md

gpu:
	$(PYTHON) tests/benchmarks/gpu.py $(if $(PART),--part $(PART)) --size $(or $(SIZE),large) \
		$(if $(BUDGET_SECONDS),--budget-seconds $(BUDGET_SECONDS)) $(if $(WHEELS),--wheels $(WHEELS))

kernels-compile: $(STAMP)
	$(BIN)/python -m tests.benchmarks.kernels_compile

gpu-wheels: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu_wheels.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
