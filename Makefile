# The commands of this project; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
PROFILE ?= quick
ARGS ?=
export PYTHONWARNINGS ?= ignore::DeprecationWarning

PAGE = $(BIN)/python -m cmim_repro.report.page
COPIES = figures/executed/$(PROFILE)
copies = $(1:%=$(COPIES)/run_%.ipynb)
EXHIBITS := $(filter-out audit,$(patsubst nbs/run_%.ipynb,%,$(wildcard nbs/run_*.ipynb)))
TABLES := $(filter table%,$(EXHIBITS))
FIGURES := $(filter figure%,$(EXHIBITS))
BEYOND := $(filter-out $(TABLES) $(FIGURES),$(EXHIBITS))
ASKED := $(if $(filter tables,$(MAKECMDGOALS)),$(TABLES)) $(if $(filter figures,$(MAKECMDGOALS)),$(FIGURES)) \
  $(if $(filter beyond,$(MAKECMDGOALS)),$(BEYOND))

.DEFAULT_GOAL := help
.PHONY: help install table1 tables figures beyond gallery book page FORCE test notebooks pytest slow faults lint export outputs cost pilot lab

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@echo 'Compiling what every process imports.'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import nbdev.test, papermill, cmim_repro.report.exhibit, torchvision, ipykernel.kernelapp, sklearn.datasets'
	@cd .venv/lib/python*/site-packages && ../../../bin/python -m compileall -q -j 0 plotly _plotly_utils matplotlib pandas PIL IPython
	@$(BIN)/python -m compileall -q cmim_repro
	@touch $@

.venv/.frameworks: .venv/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	@touch $@

install: .venv/.installed ## create .venv and install the project with the tested versions

table1: install ## run the main experiment on bundled real data (profile quick); prints the table
	@echo 'Running nbs/run_table1.ipynb in the profile $(PROFILE): some minutes at first, then seconds.'
	@$(PAGE) table1 --profile $(PROFILE) $(ARGS)
	$(if $(findstring plan_only,$(ARGS)),,@cat figures/$(PROFILE)/table1.txt)
	@echo 'Tables and pictures: figures/$(PROFILE)/ (table1.html, cmi_*.png, simplex_*.html).'
	@echo 'The executed notebook: $(COPIES)/run_table1.ipynb'

tables: $(call copies,$(TABLES)) page ## all ten tables and the page; PROFILE=mini and ARGS="-p data_root DIR" change how

figures: $(call copies,$(FIGURES)) page ## all five figures and the page, in the same way; with -j2 two notebooks at once

beyond: $(call copies,$(BEYOND)) page ## what goes beyond the paper, in the same way

gallery: page ## write figures/index.html again, from what is there

book: install ## all notebooks, the reference and the results as one site: figures/book/index.html
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[book]'
	@$(BIN)/python -m cmim_repro.report.book $(ARGS)

# One rule runs a notebook. It always runs: what is trained is in the store, so it only draws again.
# A notebook that fails says so and stops no other; the rule of the page names it once more and fails.
$(COPIES)/run_%.ipynb: nbs/run_%.ipynb FORCE | .venv/.installed
	-@$(PAGE) $* --profile $(PROFILE) $(ARGS)

# Table 9 measures time, so it runs when all others are done.
$(call copies,table9): | $(call copies,$(filter-out table9,$(ASKED)))

page: $(call copies,$(ASKED)) | .venv/.installed
	@$(PAGE) --profile $(PROFILE) --made $(ASKED)

FORCE:

test: notebooks pytest ## all notebooks as tests, then pytest

notebooks: .venv/.frameworks ## all notebooks as tests, in the smoke profile
	CMIM_PROFILE=smoke $(BIN)/nbdev_test --n_workers 2

pytest: .venv/.frameworks ## the tests that tell no story: golden vectors, kills, bad input
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: install ## tests that take more than half a minute each: graph capture of deep networks and the like
	$(BIN)/python -m pytest -q -m slow -n 2 --dist worksteal

faults: install ## campaigns of faults with counts: kills, flipped bits, full disks, bad plans and parameters; some minutes
	$(BIN)/python tests/faults/campaign.py --csv tests/faults/table.csv

lint: install ## ruff on notebooks, package and tests
	$(BIN)/ruff check nbs cmim_repro tests .ci

export: install ## write the package from the notebooks and clean them
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

outputs: .venv/.frameworks ## execute notebooks from top to bottom and keep what they show; NOTEBOOKS="nbs/..." names some
	$(BIN)/python .ci/outputs.py make $(NOTEBOOKS)

cost: install ## time of a training step, CMIM beside cross-entropy, students in teams; an earlier revision beside this one
	$(BIN)/python -m cmim_repro.experiments.cost --networks cnn_small resnet18
	$(BIN)/python -m cmim_repro.experiments.cost --teams
	$(BIN)/python -m cmim_repro.experiments.then_and_now $(ARGS)

pilot: install ## minutes on a GPU: its tests, its speed, a piece of Table 1; DATA=DIR names the folder of CIFAR-100
	$(BIN)/python -m cmim_repro.experiments.pilot --data-root $(or $(DATA),data/downloads) --store data/runs/pilot \
	  --out figures/executed/pilot $(ARGS)

lab: install ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir . $(ARGS) nbs/index.ipynb
