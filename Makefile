# Everything a new machine needs: Python 3.11 or later, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test check format clean

install: $(INSTALLED)

# the real nnU-Net, for the tests that compare with it; of what it asks for, timm would bring torchvision and several GB of CUDA
NNUNET := nnunetv2 dynamic-network-architectures acvl-utils batchgenerators batchgeneratorsv2

# torch comes first and pinned: asked for by another package it would bring several GB of CUDA
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(NNUNET)
	touch $@

demo: install
	$(BIN)/ptq3d demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-output runs build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
