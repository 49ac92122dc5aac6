# make setup | make test | make demo [SPEECH=folder/manifest.jsonl] | make demo-telephone
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup test lint demo demo-telephone

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

demo-telephone: setup
	$(PY) demo_telephone.py $(ARGS)
