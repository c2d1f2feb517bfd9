PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test lint bench bench-depthwise install clean

quickstart: install  ## train on the emoji, draw pictures, and show the nearest training picture of each
	$(BIN)/liquid-diffusion train --out $(RUN)
	$(BIN)/liquid-diffusion sample $(RUN) --n 16 --nearest true --out $(RUN)/nearest.png

test: install  ## the whole suite
	$(BIN)/python -m pytest

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## training step and sampling beside peers of equal parameters; writes benchmarks/results
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/speed.py

bench-depthwise: install  ## our depthwise convolution beside the library's
	$(BIN)/python benchmarks/depthwise.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs dist
