# Every command a newcomer or the CI needs. `make serve` and `make test` set up what they use.
PYTHON ?= python3
VENV ?= .venv
# Installed before anything that depends on it, so that the version is ours to choose.
TORCH ?= torch==2.13.0
PORT ?= 8000
# The NPU's tests need an environment of their own: torch-npu breaks a plain `import torch` where CANN is missing.
NPU_VENV ?= .venv-npu
TORCH_NPU ?= torch-npu==2.13.0
# What `make serve` serves; nothing: the bundled demo model.
MODEL ?=
PYTEST_ARGS ?=
BIN = $(VENV)/bin

.PHONY: serve test test-npu test-full lint format types package clean

serve: $(VENV)/.installed  ## set up, serve the bundled demo model
	$(BIN)/omni-engine serve $(MODEL) --host 127.0.0.1 --port $(PORT)

test: $(VENV)/.installed-dev  ## set up, run the commit tier
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-npu: $(NPU_VENV)/.installed  ## set up, run the NPU's tests on a simulated device; needs gcc, no NPU and no CANN
	OMNI_ENGINE_CPU_KERNELS=0 $(NPU_VENV)/bin/python -m pytest $(or $(PYTEST_ARGS),tests/npu)

test-full: $(VENV)/.installed-full  ## set up, run every test, the long ones too
	$(BIN)/python -m pytest -m "full or not full" --hypothesis-profile=full $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

package: $(VENV)/.installed-dev  ## build sdist and wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-npu build dist *.egg-info demo-checkpoint

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-full: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[full]"
	touch $@

$(NPU_VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_VENV)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(NPU_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(NPU_VENV)/bin/python -m pip install --quiet "$(TORCH_NPU)" pytest hypothesis --editable ".[npu]"
	touch $@
