# `make` or `make help` lists the targets. Settings, given as `make demo WORK_DIR=/elsewhere`:
#   PYTHON          interpreter for the environments (default: the first of 3.11, 3.12, 3.10 found)
#   PIP_FIND_LINKS  folders with ready-made wheels, mmcv's above all
#   WORK_DIR        where the demo writes
#   DEMO_ARGS       more arguments of tools/demo.py, such as --smoke
#   TEST_ARGS       more arguments of pytest, such as -k scan
#   TEST_WORKERS    processes that run the tests, a file each at a time
WORK_DIR ?= work_dirs/demo
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
# A thread each: two that spin for two cores take many times as long.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-openmmlab lint bench env env-openmmlab clean clean-env

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' Makefile

demo: env ## train, evaluate and picture a detector and a segmenter on drawn shapes
	.venv/bin/python tools/demo.py --work-dir "$(WORK_DIR)" $(DEMO_ARGS)

test: env ## run all tests
	$(call PYTEST,.venv) $(TEST_ARGS)

# Everything quick, and of the slow tests those which cover what differs between the two sets.
test-openmmlab: env-openmmlab ## run the tests beside the upstream mm packages
	$(call PYTEST,.venv-openmmlab) -m "openmmlab or not slow" $(TEST_ARGS)

lint: env ## check style, formatting and types
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

bench: env ## time the scan, backbones and whole models on a GPU, into benchmarks/results
	.venv/bin/python benchmarks/scan.py
	.venv/bin/python benchmarks/modes.py
	.venv/bin/python benchmarks/shapes.py
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True .venv/bin/python benchmarks/detector.py

env: ## make or complete .venv (the maintained mm packages)
	@tools/dev/make_env.sh onedl .venv

env-openmmlab: ## make or complete .venv-openmmlab (the upstream mm packages)
	@tools/dev/make_env.sh openmmlab .venv-openmmlab

clean: ## remove caches; environments and results stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

clean-env: ## remove both environments
	rm -rf .venv .venv-openmmlab
