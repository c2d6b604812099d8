# make demo | test | check | drop-in | docs, on a fresh clone. The virtual environment is made once, and brought up to date
# when the metadata, the pins or the C++ sources change.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# The first interpreter new enough for the development environment: the packages run on 3.10, diffusers 0.42 needs 3.11.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/anyflow.stamp
EXTENSION_SOURCES := $(wildcard csrc/*)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEVELOPMENT := diffusers,lora,video,bench,serve,dev
PUBLIC := anyflow_kernels anyflow_runtime
CODE := $(PUBLIC) $(wildcard emulator tests bench scripts examples docs) setup.py

.PHONY: demo drop-in test diffusers-tests browser-test emulate emulate-quick check format cuda-check aot-check versions wheel extras hub-kernels docs docs-table clean FORCE

demo: $(STAMP)
	$(PY) -m bench.demo

drop-in: $(STAMP)
	$(PY) -m bench.drop_in

test: $(STAMP)
	$(PY) -m pytest -n auto $(PYTEST_ARGS)

# diffusers' own AnyFlow tests with our code in place; offline: ARGS='--source CHECKOUT'.
diffusers-tests: $(STAMP)
	$(PIP) parameterized requests-mock
	$(PY) scripts/diffusers_tests.py $(ARGS)

# The live view in a headless Chromium.
browser-test: $(STAMP)
	@command -v chromium > /dev/null || { echo "browser-test needs chromium (Debian: apt install chromium)" >&2; exit 1; }
	$(PIP) playwright
	$(PY) -m pytest --run-slow -k browser tests/test_serve_command.py $(PYTEST_ARGS)

# Triton kernels as the PTX of a GPU that is not here (emulator/README.md): all of their tests on every target, or a few.
EMULATED := $(wildcard tests/test_*_triton.py) tests/test_far_attention_gluon.py \
  tests/test_emulator_faults.py tests/test_emulator_coverage.py
emulate: $(STAMP)
	for target in sm_80 sm_89 sm_90; do $(PY) -m pytest -n auto --emulate $$target $(EMULATED) $(PYTEST_ARGS) || exit 1; done

# Every kernel forward and backward on mma.sync and on wgmma, and on sm_90 also a rollout, Gluon and planted faults.
QUICK := slab_values or (bfloat16 and (appends_at or gradients_within_budget or gradients_in_half_precision))
QUICK_HOPPER := rollout_in_bf16 or (compiled_kernel and d128 and bfloat16 and gaps) or test_fault
emulate-quick: $(STAMP)
	$(PY) -m pytest -n auto --emulate sm_80 -k "$(QUICK)" $(EMULATED) $(PYTEST_ARGS)
	$(PY) -m pytest -n auto --emulate sm_90 -k "$(QUICK) or $(QUICK_HOPPER)" $(EMULATED) $(PYTEST_ARGS)

check: $(STAMP) cuda-check aot-check
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy $(addprefix -p ,$(PUBLIC))
	$(VENV)/bin/lint-imports --no-cache --no-logo

format: $(STAMP)
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

cuda-check: $(STAMP)
	scripts/check_cuda.sh $(PY)

# Every Triton kernel for every architecture with launch rows: few spills, tensor cores where they belong and no product
# twice, blocks that fit, bounds as their rows claim.
aot-check: $(STAMP)
	$(PY) -m anyflow_kernels.aot --check

# The same for other versions of Triton, and the interpreter's tests: VERSIONS="3.6.0 newest", or TORCH=2.11.0 with its own.
versions: $(STAMP)
	scripts/check_versions.sh $(PY) $(VERSIONS)

# The wheel of dist/, audited and tried in an environment of its own.
wheel: $(STAMP)
	scripts/check_wheel.sh $(PY)

# The package with no extra and with each one alone, in environments of their own: EXTRAS="core video" for some.
extras: $(STAMP)
	scripts/check_extras.sh $(PY) $(EXTRAS)

# The kernels as a hub kernel repository, and what its loader, from PyPI, says of it.
hub-kernels: $(STAMP)
	$(PY) scripts/hub_kernels.py build/hub-kernels
	$(PIP) --target build/hub-loader --upgrade --no-deps kernels
	PYTHONPATH=build/hub-loader HF_HUB_OFFLINE=1 $(PY) -c "from pathlib import Path; from kernels import get_local_kernel; \
	  print(get_local_kernel(Path('build/hub-kernels'), backend='cpu').available_backends())"

# What combines with accelerate, from tests/combinations.py into docs/drop_in.md.
docs-table: $(STAMP)
	$(PY) -m tests.combinations

# The site of docs/ into site/. Reads sources alone: it needs neither torch nor the extension.
docs: | $(PY)
	$(PIP) mkdocs-material 'mkdocstrings[python]' ruff
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) .versions build dist site *.egg-info anyflow_kernels/_C*.so

$(PY):
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer, as diffusers 0.42 does: make PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON): the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled with its headers (--no-build-isolation). A missing extension is tried again.
$(STAMP): $(if $(wildcard anyflow_kernels/_C*.so),,FORCE) \
		pyproject.toml constraints.txt setup.py $(EXTENSION_SOURCES) | $(PY)
	@echo "installing the pinned packages and building the extension"
	@$(PIP) torch setuptools wheel ninja
	@$(PIP) --no-build-isolation --editable '.[$(DEVELOPMENT)]'
	@touch $@
