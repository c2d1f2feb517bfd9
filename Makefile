PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test lint docs liquid-figures bench bench-convolutions bench-data bench-memory bench-precision bench-gpu gpu-training package quality ablations times causal along-the-path figures ship bench-installed install clean

quickstart: install  ## train on the emoji, draw pictures, and show the nearest training picture of each
	$(BIN)/liquid-diffusion train --out $(RUN)
	$(BIN)/liquid-diffusion sample $(RUN) --n 16 --nearest true --out $(RUN)/nearest.png

test: install  ## the whole suite
	$(BIN)/python -m pytest

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-installed  ## speed beside peers of equal parameters, profile and roofline; writes benchmarks/results
	$(BIN)/python benchmarks/speed.py
	for preset in nano small base; do \
	  $(BIN)/python benchmarks/speed.py --preset $$preset --sizes 32 --batches 8 --tasks evaluation "training step"; \
	done
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/performance_tables.py

bench-convolutions: bench-installed  ## our depthwise and 1x1 convolutions beside the library's
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/performance_tables.py

bench-precision: bench-installed  ## what bfloat16 gains over float32 on this machine
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/performance_tables.py

package: install  ## build, install the wheel in a fresh environment, and use it from an empty folder
	rm -rf dist build/package
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	mkdir build/package/empty
	cd build/package/empty && set -ex; PATH="$$PWD/../venv/bin:$$PATH"; unset PYTHONPATH; \
	  liquid-diffusion --help >help.txt; \
	  liquid-diffusion train --image-size 16 --steps 2 --out run; \
	  liquid-diffusion sample run --n 4 --steps 2 --out grid.png; \
	  liquid-diffusion export run --out exported

bench-data: install  ## pictures a second from files, parquet, a stream and cached latents, and how long a step waits
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/performance_tables.py

bench-gpu: bench-installed  ## equality, precision, memory, kernels and speed on a CUDA card; DATA=folder of emoji64x3
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/quality.py --preset tiny --size 64 --optimizer muon --measure 14 $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/performance_tables.py

gpu-training: bench-installed  ## tiny at 64 px on a CUDA card, measured; DATA=folder of emoji64x3
	$(BIN)/liquid-diffusion train --data $(DATA)/emoji64x3-train.parquet --label-column label --image-size 64 \
	  --model tiny --optimizer muon --lr 0.001 --compile true --steps 3000 --out runs/gpu-64
	cp runs/gpu-64/metrics.jsonl benchmarks/results/gpu-training.jsonl
	$(BIN)/liquid-diffusion evaluate runs/gpu-64 --out benchmarks/results/gpu-training.json

bench-memory: install  ## what training takes of a GPU's memory, estimated
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/performance_tables.py

SEEDS ?= 0 1 2
SECONDS ?= 180
LONG_SECONDS ?= 900
TUNING_SECONDS ?= 90
OPTIMIZER ?= muon
QUALITY = $(BIN)/python benchmarks/quality.py --threads 1 --optimizer $(OPTIMIZER) $(if $(DATA),--data $(DATA))

quality: bench-installed  ## our model beside peers, equal time and equal images; DATA=folder of emoji64x3
	$(QUALITY) --models peers ablations --measure 14
	$(QUALITY) --seconds $(TUNING_SECONDS) --clock table --split tune --fractions 1
	$(QUALITY) --seconds $(SECONDS) --clock table --split tune --fractions 1 --models liquid "DiCo block"
	$(QUALITY) --seconds $(SECONDS) --clock table --seeds $(SEEDS)
	$(QUALITY) --images 32000 --clock cpu --seeds $(SEEDS)

ablations: bench-installed  ## variants of the liquid block, equal time; after quality, which chooses the learning rate and measures the steps
	$(QUALITY) --seconds $(SECONDS) --clock table --models ablations --seeds $(SEEDS)
	$(QUALITY) --seconds $(LONG_SECONDS) --clock table --fractions 1 --models liquid plain "relaxation none" --seeds $(SEEDS)

EMOJI = --data emoji --image-size 32 --model nano

times: bench-installed  ## training times nearer to noise: on the tuning split after quality, and on the emoji
	for shift in 1 2; do \
	  $(QUALITY) --images 32000 --clock cpu --split tune --chosen-rates --fractions 1 --time-shift $$shift \
	    --seeds 0 1 --models liquid DiTTransformer2DModel; \
	  $(BIN)/liquid-diffusion train $(EMOJI) --time-shift $$shift --out runs/2000-steps-shift-$$shift; \
	  $(BIN)/liquid-diffusion train $(EMOJI) --steps 9000 --flip true --time-shift $$shift --out runs/9000-steps-shift-$$shift; \
	  for steps in 2000 9000; do \
	    $(BIN)/liquid-diffusion evaluate runs/$$steps-steps-shift-$$shift --n 1898 --reference all \
	      --out benchmarks/results/time-shift/$$steps-steps-shift-$$shift.json; \
	  done; \
	done

along-the-path: bench-installed  ## where on the way from noise to a picture our model and the DiT differ; after quality; DATA=folder of emoji64x3
	$(BIN)/python benchmarks/along_the_path.py --seeds $(SEEDS) $(if $(DATA),--data $(DATA))

causal: bench-installed  ## the packaged model with its liquid layers disturbed
	$(BIN)/python benchmarks/causal.py

SHIP_STEPS ?= 9000

ship: bench-installed  ## train the packaged model again, measure it, and put it into the package
	$(BIN)/liquid-diffusion train $(EMOJI) --steps $(SHIP_STEPS) --flip true --out runs/nano-emoji
	$(BIN)/python benchmarks/ship.py runs/nano-emoji

figures: bench-installed  ## tables and plots of docs/ablations.md from the CSV files alone
	$(BIN)/python benchmarks/figures.py

bench-installed: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"

liquid-figures: bench-installed  ## figures of docs/liquid-block.md, from the packaged model, or from another by RUN=...
	$(BIN)/python benchmarks/liquid_over_time.py $(if $(filter command line,$(origin RUN)),$(RUN))

docs: install  ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv dist build site
