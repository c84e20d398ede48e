# Everything runs in a virtual environment of its own, $(VENV); nothing outside this folder is touched.
# TORCH is what a new environment gets. Any torch >= 2.10 works: `make test TORCH="torch==2.11.0"`.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo arc test bench gpu lint clean

demo: $(VENV)/.train            ## pretrain a small GPT on Python's standard library and print a sample
	$(BIN)/pygpt info
	$(BIN)/pygpt prepare --tokenizer char --max-chars 127 --out data/stdlib
	$(BIN)/pygpt pretrain --data data/stdlib --out runs/demo --overwrite --n-layer 4 --n-head 4 --n-embd 128 \
	  --batch-size 16 --block-size 128 --steps 1500 --learning-rate 3e-3 --prompt "def " --sample-tokens 500
	@echo "checkpoint: runs/demo/checkpoints   loss plot: runs/demo/loss.png"
	@echo "try: $(BIN)/pygpt generate runs/demo --prompt 'class '"

# The labelled data sets are downloaded, unless SMS and INSTRUCTIONS name files.
arc: $(VENV)/.train,data        ## from raw text to a spam filter and an assistant; writes runs/arc/arc.md
	$(BIN)/python bench/arc.py $(if $(SMS),--sms "$(SMS)") $(if $(INSTRUCTIONS),--instructions "$(INSTRUCTIONS)")

test: $(VENV)/.test             ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev              ## formatting, lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench           ## every op and the model against eager PyTorch; writes bench/results/
	$(BIN)/python -m pytest bench

# With no network: VENV=<an environment that has a CUDA build of torch> TORCH=torch, and what it lacks as wheels named by
# PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>. Tests that fail or hang do not keep the bench from running; the exit status tells.
gpu: $(VENV)/.gpu               ## on a machine with an NVIDIA GPU: GPU tests, then every op and GPT-2 124M against their peers
	timeout 100 $(BIN)/python -m pytest tests/test_gpu.py; tested=$$?; $(BIN)/python bench/gpu.py && exit $$tested

clean:
	rm -rf $(VENV) build

# One stamp file per set of extras: .train, .test, .bench, .dev, also of several, .train,data. dev holds all the others: its
# stamp is theirs too. Building without isolation compiles against the torch that the environment has, instead of
# downloading another one to build with.
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)" "scikit-build-core>=0.10" "pybind11>=2.12" cmake ninja
	$(PIP) install -q --no-build-isolation -e ".[$*]"
	@touch $@ $(if $(filter dev,$*),$(addprefix $(VENV)/.,train test bench))
