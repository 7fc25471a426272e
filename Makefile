# Every target sets up what it needs; nothing but Python >= 3.11 and make must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export MPLBACKEND := Agg

.PHONY: demo test lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Liquid water in a field of 0.1 V/Å: i-PI moves the nuclei, VoltPI answers, a figure at the end.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/voltpi new water-field demo
	$(BIN)/voltpi run demo/input.xml
	$(BIN)/voltpi analyze polarization demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# The packages are mapped from the top-level folders (pyproject.toml); mypy needs them under one name.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint/voltpi
	for p in potential driver analysis inputs; do ln -sfn ../../../$$p build/lint/voltpi/$$p; done
	MYPYPATH=build/lint $(BIN)/mypy -p voltpi.potential -p voltpi.driver -p voltpi.analysis

clean:
	rm -rf $(VENV) build demo *.egg-info
