# Every target makes the virtual environment that it needs, on the first Python >= 3.11 that it finds.
# PYTHON=/path/to/python chooses another; VENV=DIR puts the environment elsewhere.

VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_TPU ?= .venv-tpu
BIN := $(VENV)/bin

# The first of some interpreters that runs and is new enough: $(call python,CANDIDATES,MINOR).
python = $(firstword $(foreach p,$(1),$(shell $(p) -c 'import sys; sys.exit(sys.version_info[:2] < (3,$(2)))' 2>/dev/null && echo $(p))))
PYENV_PYTHONS := $(sort $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.*/bin/python))
PYTHON ?= $(call python,python3 python3.11 python3.12 python3.13 python3.14 $(PYENV_PYTHONS),11)
PYTHON_NEWEST ?= $(call python,python3.14 python3.13 python3 $(PYENV_PYTHONS),13)

.PHONY: demo test test-newest test-tpu lint format bench bench-parts bench-train bench-train-memory \
	bench-accelerators bench-conversion bench-full-size bench-serving docs page-picture \
	ovis-tiny pink short clean

demo: $(VENV)/run
	rm -rf checkpoints/demo
	$(BIN)/python -m convert.from_hf ovis-tiny checkpoints/demo
	@$(call ask,shapes,Describe the picture.)
	@$(call ask,word,Which word is in the picture?)
	@$(call ask,digit,Welche Ziffer zeigt das Bild?)
	@$(call ask,wide,Where is the green heart?)

ask = printf '%s' 'examples/$(1).png: $(2) ' && \
	$(BIN)/ovis-jax generate --model checkpoints/demo --image examples/$(1).png --prompt '$(2)'

# On Python 3.11 this compares with PyTorch; elsewhere with the frozen results of the original code.
test: $(VENV)/test
	$(BIN)/python -m pytest -n auto

# The newest JAX on Python >= 3.13, without PyTorch.
test-newest: $(VENV_NEWEST)/test
	$(VENV_NEWEST)/bin/python -m pytest -n auto

# The 9B compiled for TPUs: no chip is needed. The environment is one of its own: where libtpu is
# installed, every other command looks for chips. Seven minutes.
test-tpu: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m pytest tests/plan/test_compile_tpu.py

lint: $(VENV)/test $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

need_torch = @$(BIN)/python -c 'import torch' 2>/dev/null || \
	{ echo 'PyTorch, which this compares with, comes with Python 3.11 alone: $(VENV) has another'; exit 1; }

# Beside PyTorch, stage by stage, on random weights with the 9B's proportions.
bench: $(VENV)/test
	$(need_torch)
	$(BIN)/python -m benchmarks.against_torch

# Apart from PyTorch: generation, the visual path, compiling.
bench-parts: $(VENV)/test
	$(BIN)/python -m benchmarks.generate --model ovis-tiny
	$(BIN)/python -m benchmarks.vision --model ovis-tiny
	$(BIN)/python -m benchmarks.compile --model ovis-tiny

# One training step beside PyTorch's, on one core each.
bench-train: $(VENV)/test
	$(need_torch)
	$(BIN)/python -m benchmarks.train_against_torch --threads 1

# The 9B model's training steps compiled for eight TPU v5p chips, which the machine need not have.
# Ten minutes.
bench-train-memory: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.train_memory

# Conversions of a checkpoint as large as the published one beside `cp -r`; needs 62 GB of disk.
bench-conversion: $(VENV)/test | checkpoints/random-9b
	$(BIN)/python -m benchmarks.conversion checkpoints/random-9b --folder checkpoints

# The 9B in bfloat16 on this CPU, from the folder to a short answer: 24 GiB of memory, 41 GB of disk.
bench-full-size: $(VENV)/test | checkpoints/converted-9b
	$(BIN)/python -m benchmarks.full_size checkpoints/converted-9b --length 320 --crops 1 --new-tokens 8

checkpoints/random-9b: | $(VENV)/test
	$(BIN)/python -m benchmarks.make_checkpoint --config 9b $@

checkpoints/converted-9b: | checkpoints/random-9b
	$(BIN)/python -m convert.from_hf checkpoints/random-9b $@

# The server with eight questions at once beside one after the other, and a thousand of all kinds.
bench-serving: $(VENV)/test
	$(BIN)/python -m benchmarks.serving --requests 1000

# docs/ as pages, into site/.
docs: $(VENV)/docs
	$(BIN)/mkdocs build

# The picture of the page in docs/, by a browser: needs chromium, which Debian has as a package.
page-picture: $(VENV)/test
	PYTHONPATH=. $(BIN)/python tests/page_picture.py docs/images/page.png

# The 9B's decode step and prefill compiled for TPU slices; the rows for GPUs by arithmetic.
bench-accelerators: $(VENV_TPU)/tpu
	JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m benchmarks.accelerators

# Makes the checkpoint that comes with the library again, from nothing: drawing, tokenizer, training,
# export and scores. 73 minutes on two cores with AVX-512. Huge pages spare a fifth of the time.
TINY := checkpoints/ovis-tiny
TINY_DATA := data/ovis-tiny
ovis-tiny: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
ovis-tiny: $(VENV)/train
	rm -rf $(TINY) $(TINY_DATA) $(TINY_DATA)-hard $(TINY_DATA)-places
	$(BIN)/python -m recipes.ovis_tiny.draw_data $(TINY_DATA)
	$(BIN)/python -m recipes.ovis_tiny.draw_data $(TINY_DATA)-hard --seed 1 --validation 0 --test 0 \
		--more count=2 count_colour=2 exists=2 where=2 follow_up=2
	$(BIN)/python -m recipes.ovis_tiny.draw_data $(TINY_DATA)-places --seed 4 --validation 0 --test 0 \
		--more where=5 follow_up=3 count_colour=2
	$(BIN)/python -m recipes.ovis_tiny.tokenizer $(TINY_DATA)/train.jsonl $(TINY)/tokenizer
	$(BIN)/python -m recipes.ovis_tiny.start $(TINY)/tokenizer $(TINY)/start
	$(BIN)/python -m recipes.ovis_tiny.sight $(TINY)/start $(TINY)/sight
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage1.toml
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage2.toml
	$(BIN)/python -m recipes.ovis_tiny.sight $(TINY)/stage2/model $(TINY)/aligned --words --hold 3 --steps 250 --seed 1
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage3.toml
	$(BIN)/python -m recipes.ovis_tiny.sight $(TINY)/stage3/model $(TINY)/aligned-again --words --hold 6 --steps 300 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage4.toml
	$(BIN)/ovis-jax train recipes/ovis_tiny/stage5.toml
	$(BIN)/python -m convert.to_hf $(TINY)/stage5/model $(TINY)/hub --dtype bfloat16
	$(BIN)/python -m recipes.ovis_tiny.score $(TINY)/hub $(TINY_DATA)/test.jsonl --json $(TINY)/scores.json
	$(BIN)/python -m recipes.ovis_tiny.card $(TINY)/hub $(TINY)/scores.json $(TINY_DATA)/test.jsonl
	rm -rf ovis_jax/assets/ovis-tiny
	cp -r $(TINY)/hub ovis_jax/assets/ovis-tiny

# A colour that ovis-tiny has never seen, by low-rank adapters; and short answers, by DPO. Each prints
# what the model scores before and after.
pink: $(VENV)/train
	rm -rf data/pink checkpoints/pink
	$(BIN)/python -m recipes.ovis_tiny.draw_data data/pink --train 4000 --validation 64 --test 320 --colour pink
	$(BIN)/python -m recipes.ovis_tiny.draw_data data/known --train 0 --validation 0 --test 650 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/pink.toml
	for set in pink known; do \
		$(BIN)/python -m recipes.ovis_tiny.score ovis-tiny data/$$set/test.jsonl; \
		$(BIN)/python -m recipes.ovis_tiny.score ovis-tiny data/$$set/test.jsonl --adapters checkpoints/pink/adapters; \
	done

short: $(VENV)/train
	rm -rf data/pairs checkpoints/short
	$(BIN)/python -m recipes.ovis_tiny.draw_data data/pairs --train 0 --validation 0 --test 650 --pairs 80000 --seed 2
	$(BIN)/ovis-jax train recipes/ovis_tiny/short.toml
	for model in ovis-tiny checkpoints/short/model; do \
		$(BIN)/python -m recipes.ovis_tiny.score $$model data/pairs/test.jsonl --short; \
	done

clean:
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_TPU) checkpoints

# Stamps: an environment with a set of extras installed, made again when pyproject.toml changes.
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

$(VENV_NEWEST)/test: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "no Python >= 3.13 found: install one, or make PYTHON_NEWEST=..."; exit 1; }
	test -x $(VENV_NEWEST)/bin/python || $(PYTHON_NEWEST) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
