# make setup | test | torture | lint | bench
# make demo | demo-telephone | demo-steermoe | demo-salm | demo-duplex
# ARGS="key=value ..." goes to the script behind; SPEECH=folder/manifest.jsonl: your own speech
PYTHON ?= python3
PY := .venv/bin/python
SPOKEN := $(if $(SPEECH),speech=$(SPEECH))

.PHONY: setup test torture lint demo demo-telephone demo-steermoe demo-salm demo-duplex bench

setup: .venv/.done

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

torture: setup
	OMP_NUM_THREADS=1 $(PY) tests/torture.py $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check *.py demo bench docs

demo: setup
	$(PY) demo/run.py adaptor $(SPOKEN) $(ARGS)

demo-telephone demo-steermoe demo-salm demo-duplex: setup
	$(PY) demo/run.py $(@:demo-%=%) $(SPOKEN) $(ARGS)

bench: setup
	$(PY) bench/bench.py $(ARGS)
