# make setup | make test | make demo [SPEECH=folder/manifest.jsonl] | make bench
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup test lint demo bench

setup: .venv/.done

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest -q tests

lint: setup
	$(PY) -m ruff check .

demo: setup
	$(PY) demo.py $(if $(SPEECH),"speech=$(SPEECH)") $(ARGS)

# glibc would give large blocks back to the system at every free; baseline and ours both run without that
bench: setup
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(PY) bench.py $(ARGS)
