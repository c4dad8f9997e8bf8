# `make demo` distils a student, `make test` tests everything; both set up what they need in $(VENV).
VENV ?= .venv
PYTHON ?= python3
bin = $(VENV)/bin

.PHONY: demo test prepare readme tutorials docs clean

demo: $(VENV)/.installed
	$(bin)/fasterai_distill --out demo

test: $(VENV)/.installed-dev
	$(bin)/ruff check
	$(bin)/nbdev-test --n-workers 2 --skip-folder-re '^(tutorials|howto|families)'
	$(bin)/python -m pytest -n 2 --dist loadfile

# After editing a notebook: export, clean, store the outputs, and write the README.
prepare: export PYTHONWARNINGS=ignore
prepare: $(VENV)/.installed-dev
	$(bin)/nbdev-export
	$(bin)/nbdev-test --save --n-workers 2 --skip-folder-re '^(tutorials|howto|families)'
	$(bin)/nbdev-clean
	$(MAKE) readme

readme: $(VENV)/.installed-dev
	$(bin)/python -m nbconvert --config docs/readme.py > README.md

# Train what the tutorials train and store their outputs; `make tutorials NB=nbs/howto/own_loss.ipynb` does one. Needs the data sets, or a network.
NB ?= nbs/tutorials/*.ipynb nbs/howto/*.ipynb nbs/families/*.ipynb
tutorials: export PYTHONWARNINGS=ignore
tutorials: $(VENV)/.installed-dev
	$(bin)/python -m nbconvert --to notebook --execute --inplace --log-level WARN --ExecutePreprocessor.timeout=3600 $(NB)
	$(bin)/nbdev-clean

# The site, into _docs/; no network is needed.
docs: $(VENV)/.installed-docs
	$(bin)/python -m sphinx -E -W --keep-going -q -b html -c docs nbs _docs

clean:
	rm -rf $(VENV) build dist *.egg-info demo _docs jupyter_execute

$(VENV)/.installed: setup.py settings.ini pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(bin)/python -m pip install -q -e '.[dev,docs]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(bin)/python -m pip install -q -e '.[docs]'
	touch $@
