# make setup | test | lint | demo [SPEECH=folder/manifest.jsonl] | demo-steermoe | demo-telephone | bench
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup test lint demo demo-steermoe demo-telephone bench

setup: .venv/.done

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest -q tests

lint: setup
	$(PY) -m ruff check .

demo: setup
	$(PY) demo.py $(if $(SPEECH),"speech=$(SPEECH)") $(ARGS)

demo-steermoe: setup
	$(PY) demo_steermoe.py $(ARGS)

demo-telephone: setup
	$(PY) demo_telephone.py $(ARGS)

# glibc would give large blocks back to the system at every free; baseline and ours both run without that
bench: setup
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(PY) bench.py $(ARGS)
