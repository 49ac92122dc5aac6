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
	cd old && ../$(PY) -m pytest -q tests

lint: setup
	$(PY) -m ruff check .
