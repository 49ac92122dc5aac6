# make setup | make test | make demo [SPEECH=folder/manifest.jsonl] | make demo-steermoe
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup test lint demo demo-steermoe

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

demo-steermoe: setup
	$(PY) demo_steermoe.py $(ARGS)
