# `make demo` and `make test` work on a fresh machine: they make the environment first.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow lint table check-table wheel bench clean

demo: $(READY)
	$(BIN)/jvjepa demo --out demo

# Two processes: nearly all of the time goes into compiling, which takes one core.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The README's tables of weights, from jvjepa/registry.py.
table: $(READY)
	$(BIN)/python .ci/weights_table.py --write

check-table: $(READY)
	$(BIN)/python .ci/weights_table.py --check

# Builds the wheel and imports the installed copy, from a folder without the sources.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed dist/*.whl
	cd build && $(abspath $(BIN))/python -W error -c "import sys; sys.path.insert(0, 'installed'); \
	import jvjepa, jvjepa.convert, jvjepa.train, jvjepa.export, jvjepa.commands; \
	assert 'build/installed' in jvjepa.convert.__file__, jvjepa.convert.__file__; \
	print('installed copy:', jvjepa.__version__, jvjepa.__file__)"

# Half an hour on two idle cores; the table is written to benchmarks/results.
bench: $(READY)
	$(BIN)/python benchmarks/speed.py

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-saccadic build dist demo *.egg-info
