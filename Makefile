# Everything runs in a virtual environment of its own, $(VENV); nothing outside this folder is touched.
# TORCH is what a new environment gets. Any torch >= 2.10 works: `make test TORCH="torch==2.11.0"`.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo arc test test-triton test-amx sanitize bench gpu gpu-sanitize lint clean

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

# The Triton of torch 2.10 and 2.11, laid over the one of $(VENV).
TRITON := build/triton-3.6.0
TRITON_TESTS := tests/test_triton.py tests/test_triton_adamw.py tests/test_triton_compile.py
test-triton: $(VENV)/.test      ## the Triton kernels' tests with the oldest Triton that they work with
	test -d $(TRITON) || $(PIP) install -q --no-deps --target $(TRITON) triton==3.6.0
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -n 2 --dist worksteal $(TRITON_TESTS)

# $(call build-beside,FOLDER,OPTIONS): another build of the package in FOLDER, an environment of its own that sees the packages
# of $(VENV). Tests run in that folder, where no sources shadow what was installed.
define build-beside
	test -x $(1)/bin/python || $(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c "import sys; print(*filter(lambda path: path.endswith('site-packages'), sys.path), sep='\n')" \
	  > $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	PYGPT_CUDA=off $(PIP) --python $(1)/bin/python install -q --no-build-isolation --no-deps --force-reinstall \
	  -Cbuild-dir=$(1)/cmake $(addprefix -Ccmake.define.,$(2)) .
endef
TEST_BESIDE := bin/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider
cpu-tests = $(foreach name,$(1),$(CURDIR)/tests/test_$(name).py)

# Leaks are not looked for: Python leaves objects at exit.
SANITIZED := build/sanitize
UNDER_SANITIZERS = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)"
sanitize: $(VENV)/.test         ## tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	$(call build-beside,$(SANITIZED),PYGPT_SANITIZE=ON)
	cd $(SANITIZED) && export $(UNDER_SANITIZERS) && bin/python -c "import pygpt._C" && $(TEST_BESIDE) --timeout 1800 \
	  $(call cpu-tests,attention attention_numerics attention_bias qkvpacked embedding layer_norm gelu linear linear_int8 matmul decode_blocks cross_entropy cross_entropy_kernel optim)

# Of the levels only those that are emulated. SANITIZE=1: also with the sanitizers.
EMULATED := build/amx$(if $(SANITIZE),-sanitize)
NO_AVX512 := $(if $(shell grep -m1 avx512_bf16 /proc/cpuinfo),,yes)
test-amx: $(VENV)/.test         ## tests of the kernels for AMX, and where the processor has no AVX-512 of those for it, emulated
	$(call build-beside,$(EMULATED),PYGPT_AMX_EMULATED=ON PYGPT_AVX512_EMULATED=$(if $(NO_AVX512),ON,OFF) $(if $(SANITIZE),PYGPT_SANITIZE=ON))
	cd $(EMULATED) && $(if $(SANITIZE),export $(UNDER_SANITIZERS) &&) $(TEST_BESIDE) $(if $(SANITIZE),--timeout 1800,-n 2) \
	  -k "amx or matmul or cpp $(if $(NO_AVX512),or avx512)" $(call cpu-tests,amx matmul linear attention attention_numerics \
	  attention_bias qkvpacked cross_entropy cross_entropy_kernel $(if $(NO_AVX512),embedding layer_norm gelu linear_int8 decode_blocks optim))

lint: $(VENV)/.dev              ## formatting, lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench           ## every op, and GPT-2 124M, against their peers (about an hour); writes bench/results/
	$(BIN)/python -m pytest bench
	$(BIN)/python bench/model.py

# With no network: VENV=<an environment that has a CUDA build of torch> TORCH=torch, and what it lacks as wheels named by
# PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>. Tests that fail or hang do not keep the bench from running; the exit status tells.
gpu: $(VENV)/.gpu               ## on a machine with an NVIDIA GPU: GPU tests, then every op and GPT-2 124M against their peers
	$(BIN)/pygpt info
	timeout 100 $(BIN)/python -m pytest -n 6 -k gpu tests/test_gpu.py tests/test_cuda_ptx.py tests/test_cuda_hopper.py; tested=$$?; \
	  timeout 60 $(BIN)/python -m pytest -n 8 tests/test_triton.py tests/test_triton_adamw.py || tested=$$?; \
	  $(BIN)/python bench/gpu.py && exit $$tested

# Tests at sizes that the tools, which slow a kernel down a hundred times, go through in minutes.
gpu-sanitize: $(VENV)/.gpu      ## the CUDA kernels on a GPU under NVIDIA's compute-sanitizer: memory, races, uninitialised reads
	for tool in memcheck racecheck initcheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	  --error-exitcode 1 $(BIN)/python -m pytest --timeout 1800 tests/test_cuda_ptx.py tests/test_cuda_hopper.py tests/test_gpu.py \
	  -k "not triton and not model and not graph and not hundred and not cross_entropy" || exit 1; done

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
