# Two commands for a newcomer: `make study` and `make test`. Each sets up .venv by itself; the second time is quick.
VENV := .venv
BIN := $(VENV)/bin
PIP := python3 -m pip --python $(BIN)/python --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: study test peers predictions gpu lint types clean
.DELETE_ON_ERROR:

study: $(VENV)/ready
	$(BIN)/revnet run quickstart --out runs/quickstart

test: $(VENV)/ready-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Threads that wait for each other by spinning make a step many times slower while another process uses the cores. Memory
# that the allocator gives back after one contender's step costs the next one page faults. 99: the profiler is silent.
peers: export OMP_WAIT_POLICY := PASSIVE
peers: export MALLOC_TRIM_THRESHOLD_ := 4000000000
peers: export MALLOC_MMAP_THRESHOLD_ := 33554432
peers: export KINETO_LOG_LEVEL := 99
peers: $(VENV)/ready-peers
	$(BIN)/python -m studies.peers

predictions: export KINETO_LOG_LEVEL := 99
predictions: $(VENV)/ready
	$(BIN)/python -m studies.predictions

# On a machine with PyTorch and CUDA, whose own Python is taken as it is: nothing is installed. DEVICE=cpu runs it all at
# tiny sizes, to see that it runs.
GPU_PYTHON ?= python3
MINUTES ?= 12
DEVICE ?= cuda
OUT ?= docs/results
gpu:
	@for python in "$(GPU_PYTHON)" "$(BIN)/python"; do \
	  if "$$python" -c 'import sys, torch; sys.exit("$(DEVICE)" == "cuda" and not torch.cuda.is_available())' 2>/dev/null; then \
	    exec "$$python" -m studies.gpu all --device $(DEVICE) --minutes $(MINUTES) --out "$(OUT)" $(if $(DATA),--data "$(DATA)"); \
	  fi; \
	done; \
	echo 'make gpu: neither $(GPU_PYTHON) nor $(BIN)/python has a PyTorch that sees a CUDA device.' >&2; \
	echo 'Name one that has with GPU_PYTHON=..., or see it run at tiny sizes on the CPU with DEVICE=cpu. docs/gpu.md says what it needs.' >&2; \
	exit 2

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready-dev
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs build *.egg-info

# Without pip of its own: a Debian python3 has none to give, and the one that is there serves.
$(BIN)/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0])'
	python3 -m venv --without-pip $(VENV)

# torch first and on its own: asked for by another package it would come as several GB of CUDA libraries.
$(VENV)/ready: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(PIP) --editable '.[test]'
	touch $@

# Without their dependencies; see the extra `peers` in pyproject.toml.
$(VENV)/ready-peers: $(VENV)/ready
	$(PIP) --no-deps memcnn revtorch FrEIA
	touch $@

# What `revnet export` writes to; some 235 MB, so only where its tests are to run too.
$(VENV)/ready-trackers: $(VENV)/ready
	$(PIP) --editable '.[mlflow,wandb,tensorboard]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready-test
	$(PIP) --editable '.[dev]'
	touch $@
