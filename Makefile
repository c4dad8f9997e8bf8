# `make demo` distils a student, `make test` tests everything; both set up what they need in $(VENV).
VENV ?= .venv
PYTHON ?= python3
bin = $(VENV)/bin

.PHONY: demo test prepare readme clean

demo: $(VENV)/.installed
	$(bin)/fasterai_distill --out demo

test: $(VENV)/.installed-dev
	$(bin)/nbdev-test --n-workers 2
	$(bin)/python -m pytest

# After editing a notebook: export, clean, store the outputs, and write the README.
prepare: export PYTHONWARNINGS=ignore
prepare: $(VENV)/.installed-dev
	$(bin)/nbdev-export
	$(bin)/nbdev-test --save --n-workers 2
	$(bin)/nbdev-clean
	$(MAKE) readme

readme: $(VENV)/.installed-dev
	$(bin)/python -m nbconvert --config docs/readme.py > README.md

clean:
	rm -rf $(VENV) build dist *.egg-info demo _docs

$(VENV)/.installed: setup.py settings.ini pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(bin)/python -m pip install -q -e '.[dev]'
	touch $@
