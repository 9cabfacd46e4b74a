# make demo: the whole story on real photographs. make test: every test. make coverage: what they reach. make check: style, types, documentation. make gpu: on a GPU.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test coverage check docs bench gpu clean

demo: $(STAMP)
	$(BIN)/ftkit demo

# A browser, compilers that the runners' tests use, and an ssh server; without them those tests are skipped, and say so.
PACKAGES := chromium cmake g++ gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static openssh-server openssh-client

test: $(STAMP)
	@for tool in chromium cmake g++ aarch64-linux-gnu-gcc qemu-aarch64-static sshd; do \
	    PATH="$$PATH:/usr/sbin" command -v $$tool >/dev/null && continue; \
	    { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q && \
	        apt-get install -y -q --no-install-recommends $(PACKAGES); } \
	        || echo "note: without $$tool, some tests of pages, of runners or of ssh are skipped"; \
	done
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same, and which lines no test reaches; a quarter longer.
coverage: $(STAMP)
	$(BIN)/python -m pytest --cov -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The documentation, into site/: open site/index.html.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# About 20 minutes. The long ones (accuracy, races, 300 trials of the gate) have their commands in bench/README.md.
bench: $(STAMP)
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/gate.py --what cost
	$(BIN)/python bench/gate.py --what real
	$(BIN)/python -m pytest bench

# On a machine with an NVIDIA GPU: its tests, then its figures into bench/gpu.md.
gpu: export CUDA_DEVICE_ORDER := PCI_BUS_ID
gpu: $(STAMP)
	@$(BIN)/python -c "import torch, sys; torch.cuda.is_available() or sys.exit('error: make gpu: expected a GPU torch can use, found none. Try ftkit doctor')"
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python bench/gpu.py
	$(BIN)/python bench/scaling.py

$(STAMP): pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null || { echo "error: make: expected $(PYTHON) (3.11 or newer), found none. Try make PYTHON=python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
