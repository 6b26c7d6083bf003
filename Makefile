# Each target creates the virtual environment it needs, with the first Python >= 3.11 it finds.
# PYTHON=/path/to/python selects another interpreter; VENV=DIR another location.

VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_TPU ?= .venv-tpu
VENV_ACCELERATOR ?= .venv-accelerator
VENV_CLIENTS ?= .venv-clients
VENV_RAY ?= .venv-ray
BIN := $(VENV)/bin

# $(call python,CANDIDATES,MINOR): the first candidate that runs and is at least Python 3.MINOR.
python = $(firstword $(foreach p,$(1),$(shell $(p) -c 'import sys; sys.exit(sys.version_info[:2] < (3,$(2)))' 2>/dev/null && echo $(p))))
PYENV_PYTHONS := $(sort $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.*/bin/python))
PYTHON ?= $(call python,python3 python3.11 python3.12 python3.13 python3.14 $(PYENV_PYTHONS),11)
PYTHON_NEWEST ?= $(call python,python3.14 python3.13 python3 $(PYENV_PYTHONS),13)

.PHONY: demo test test-fast test-exhaustive test-newest test-tpu test-clients test-ray lint format dist bench bench-parts \
	bench-train bench-quantization bench-train-memory bench-accelerators accelerator bench-conversion bench-full-size \
	bench-serving docs page-picture ovis-tiny pink short clean

# Converts the bundled checkpoint and asks it about four pictures.
demo: $(VENV)/run
	rm -rf checkpoints/demo
	$(BIN)/python -m convert.from_hf ovis-tiny checkpoints/demo
	@$(call ask,shapes,Describe the picture.)
	@$(call ask,word,Which word is in the picture?)
	@$(call ask,digit,Welche Ziffer zeigt das Bild?)
	@$(call ask,wide,Where is the green heart?)

ask = printf '%s' 'examples/$(1).png: $(2) ' && \
	$(BIN)/ovis-jax generate --model checkpoints/demo --image examples/$(1).png --prompt '$(2)'

# The tests; those that need no optimized programs first, because they compile faster together. On
# Python 3.11 they also compare with PyTorch; on other versions only with the frozen results of the
# original code.
test: $(VENV)/test
	$(BIN)/python -m pytest -n auto -m 'not optimized and not exhaustive'
	$(BIN)/python -m pytest -n auto -m 'optimized and not exhaustive'

# The tests that take long: whole benchmarks, commands of the docs, killed runs.
test-exhaustive: $(VENV)/test
	$(BIN)/python -m pytest -n auto -m 'exhaustive and not optimized'
	$(BIN)/python -m pytest -n auto -m 'exhaustive and optimized'

# The tests to run after an edit, without those that are slow or need PyTorch or a browser. One to two
# and a half minutes on two cores, depending on the processor.
test-fast: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow and not exhaustive and not optimized and not torch and not browser'

# The newest JAX on Python >= 3.13, without PyTorch.
test-newest: $(VENV_NEWEST)/test
	$(VENV_NEWEST)/bin/python -m pytest -n auto -m 'not exhaustive'

# Compiles the 9B for TPUs; no TPU is needed. It has its own environment, because JAX looks for TPUs
# wherever libtpu is installed. Ten minutes.
test-tpu: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m pytest tests/plan/test_compile_tpu.py

# The server with the clients of OpenAI, LangChain, LiteLLM and instructor. They have their own environment, because
# they require other versions of shared packages than the tests.
test-clients: $(VENV_CLIENTS)/clients
	$(VENV_CLIENTS)/bin/python -m pytest tests/clients

# The Ray Serve application with two replicas. Ray has its own environment, because it is large.
test-ray: $(VENV_RAY)/ray
	$(VENV_RAY)/bin/python -m pytest -W ignore tests/server/test_ray_app.py

lint: $(VENV)/test $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Wheel and sdist, into dist/.
dist: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

need_torch = @$(BIN)/python -c 'import torch' 2>/dev/null || \
	{ echo 'this needs PyTorch, which is installed on Python 3.11 only, and $(VENV) has another Python'; \
	exit 1; }

# Compares with PyTorch, stage by stage, on random weights with the 9B's proportions.
bench: $(VENV)/test
	$(need_torch)
	$(BIN)/python -m benchmarks.inference_against_torch

# Generation, the visual path and compile times, without PyTorch.
bench-parts: $(VENV)/test
	$(BIN)/python -m benchmarks.generation_speed --model ovis-tiny
	$(BIN)/python -m benchmarks.vision_speed --model ovis-tiny
	$(BIN)/python -m benchmarks.compile_time --model ovis-tiny

# What each quantized format costs in quality and gains in speed, compared with bfloat16. Fifteen minutes.
bench-quantization: $(VENV)/test
	$(BIN)/python -m benchmarks.quantization_quality --model ovis-tiny
	$(BIN)/python -m benchmarks.quantization_quality --preset bench
	$(BIN)/python -m benchmarks.quantized_decode_speed --preset bench

# One training step compared with PyTorch's, on one core each.
bench-train: $(VENV)/test
	$(need_torch)
	$(BIN)/python -m benchmarks.train_against_torch --threads 1

# Compiles the 9B's training steps for eight TPU v5p chips, and larger batches of one block for one
# chip; no TPU is needed. Fifteen minutes.
bench-train-memory: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.compile_train_step
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.compile_train_step --topology v5p:1x1x1 \
		--depth 1 --rows 8 --length 2560 --crops-per-row 10 --trainable visual_tokenizer

# Converts a checkpoint as large as the published one, compared with `cp -r`; needs 62 GB of disk.
bench-conversion: $(VENV)/test | checkpoints/random-9b
	$(BIN)/python -m benchmarks.conversion checkpoints/random-9b --folder checkpoints

# Runs the 9B in bfloat16 on this CPU up to a short answer; needs 24 GiB of memory, 41 GB of disk.
bench-full-size: $(VENV)/test | checkpoints/converted-9b
	$(BIN)/python -m benchmarks.full_size_inference checkpoints/converted-9b --length 320 --crops 1 --new-tokens 8

checkpoints/random-9b: | $(VENV)/test
	$(BIN)/python -m benchmarks.make_checkpoint --config 9b $@

checkpoints/converted-9b: | checkpoints/random-9b
	$(BIN)/python -m convert.from_hf checkpoints/random-9b $@

# The engine's step, then server throughput with eight concurrent requests and with one, then a thousand mixed requests.
bench-serving: $(VENV)/test
	$(BIN)/python -m benchmarks.engine_step --model ovis-tiny
	$(BIN)/python -m benchmarks.engine_step --preset bench --num-seqs 8
	$(BIN)/python -m benchmarks.server_throughput --requests 1000

# Tests and measures ovis_jax on the accelerator of this machine, in an environment of its own.
# ACCELERATOR=cuda12 or tpu selects another plugin.
ACCELERATOR ?= cuda13
accelerator: $(VENV_ACCELERATOR)/$(ACCELERATOR)
	$(VENV_ACCELERATOR)/bin/python -m benchmarks.on_accelerator

# Builds the pages of docs/ into site/.
docs: $(VENV)/docs
	$(BIN)/mkdocs build

# Takes the screenshot of the page for docs/; needs Chromium (a package in Debian).
page-picture: $(VENV)/test
	PYTHONPATH=.:tests $(BIN)/python tests/ui/page_picture.py docs/images/page.png

# Compiles the 9B's decode step and prefill for TPU slices, and the engine's programs with fewer blocks;
# figures of `generate` for GPUs are computed by formula, and the engine's programs for GPUs left out.
bench-accelerators: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.compile_for_accelerators
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.compile_engine_programs

# Trains the bundled checkpoint from scratch: data, tokenizer, training, export and scores. 73 minutes
# on two cores with AVX-512. Huge pages save a fifth of the time.
TINY := checkpoints/ovis-tiny
TINY_DATA := data/ovis-tiny
ovis-tiny: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
ovis-tiny: $(VENV)/train
	rm -rf $(TINY) $(TINY_DATA) $(TINY_DATA)-hard $(TINY_DATA)-places
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset $(TINY_DATA)
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset $(TINY_DATA)-hard --seed 1 --validation 0 --test 0 \
		--frequency count=2 count_colour=2 exists=2 where=2 follow_up=2
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset $(TINY_DATA)-places --seed 4 --validation 0 --test 0 \
		--frequency where=5 follow_up=3 count_colour=2
	$(BIN)/python -m recipes.ovis_tiny.train_tokenizer $(TINY_DATA)/train.jsonl $(TINY)/tokenizer
	$(BIN)/python -m recipes.ovis_tiny.init_checkpoint $(TINY)/tokenizer $(TINY)/start
	$(BIN)/python -m recipes.ovis_tiny.pretrain_vision $(TINY)/start $(TINY)/pretrained-vision
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage1.toml
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage2.toml
	$(BIN)/python -m recipes.ovis_tiny.pretrain_vision $(TINY)/stage2/model $(TINY)/aligned --align-words --anchor-weight 3 --steps 250 --seed 1
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage3.toml
	$(BIN)/python -m recipes.ovis_tiny.pretrain_vision $(TINY)/stage3/model $(TINY)/aligned-again --align-words --anchor-weight 6 --steps 300 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage4.toml
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage5.toml
	$(BIN)/python -m convert.to_hf $(TINY)/stage5/model $(TINY)/hub --dtype bfloat16
	$(BIN)/python -m recipes.ovis_tiny.measure_accuracy $(TINY)/hub $(TINY_DATA)/test.jsonl --json $(TINY)/accuracy.json
	$(BIN)/python -m recipes.ovis_tiny.model_card $(TINY)/hub $(TINY)/accuracy.json $(TINY_DATA)/test.jsonl
	rm -rf ovis_jax/assets/ovis-tiny
	cp -r $(TINY)/hub ovis_jax/assets/ovis-tiny

# Two fine-tuning examples: LoRA teaches ovis-tiny a new colour, DPO teaches it short answers. Each
# prints the scores before and after.
pink: $(VENV)/train
	rm -rf data/pink checkpoints/pink
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset data/pink --train 4000 --validation 64 --test 320 --colour pink
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset data/known --train 0 --validation 0 --test 650 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/pink.toml
	for set in pink known; do \
		$(BIN)/python -m recipes.ovis_tiny.measure_accuracy ovis-tiny data/$$set/test.jsonl; \
		$(BIN)/python -m recipes.ovis_tiny.measure_accuracy ovis-tiny data/$$set/test.jsonl --adapters checkpoints/pink/adapters; \
	done

short: $(VENV)/train
	rm -rf data/pairs checkpoints/short
	$(BIN)/python -m recipes.ovis_tiny.generate_dataset data/pairs --train 0 --validation 0 --test 650 --pairs 80000 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/short.toml
	for model in ovis-tiny checkpoints/short/model; do \
		$(BIN)/python -m recipes.ovis_tiny.measure_accuracy $$model data/pairs/test.jsonl --accept-short; \
	done

clean:
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_TPU) $(VENV_ACCELERATOR) $(VENV_CLIENTS) $(VENV_RAY) checkpoints

# Stamp files: environments with a set of extras, reinstalled when pyproject.toml changes.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: install one, or make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/train: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@ $(VENV)/run

$(VENV)/test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test,reference]'
	@touch $@ $(VENV)/run $(VENV)/train

$(VENV)/docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@ $(VENV)/run

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV_TPU)/tpu: pyproject.toml
	test -x $(VENV_TPU)/bin/python || $(PYTHON) -m venv $(VENV_TPU)
	$(VENV_TPU)/bin/python -m pip install --quiet --editable '.[tpu]' pytest beartype hypothesis
	@touch $@

$(VENV_ACCELERATOR)/$(ACCELERATOR): pyproject.toml
	test -x $(VENV_ACCELERATOR)/bin/python || $(PYTHON) -m venv $(VENV_ACCELERATOR)
	$(VENV_ACCELERATOR)/bin/python -m pip install --quiet --editable '.[$(ACCELERATOR),train]'
	@touch $@

$(VENV_CLIENTS)/clients: pyproject.toml
	test -x $(VENV_CLIENTS)/bin/python || $(PYTHON) -m venv $(VENV_CLIENTS)
	$(VENV_CLIENTS)/bin/python -m pip install --quiet --editable '.[serve,clients]'
	@touch $@

$(VENV_RAY)/ray: pyproject.toml
	test -x $(VENV_RAY)/bin/python || $(PYTHON) -m venv $(VENV_RAY)
	$(VENV_RAY)/bin/python -m pip install --quiet --editable '.[ray]' pytest beartype hypothesis httpx openai
	@touch $@

$(VENV_NEWEST)/test: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "no Python >= 3.13 found: install one, or make PYTHON_NEWEST=..."; exit 1; }
	test -x $(VENV_NEWEST)/bin/python || $(PYTHON_NEWEST) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
