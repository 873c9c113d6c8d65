# Concordat: every command a person needs. `make help` lists them.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One thread per process: several agents share the machine.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
# Byte code is kept, whatever the shell says: a thousand processes would compile the same sources again.
export PYTHONDONTWRITEBYTECODE =
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help install dist demo quick test fuzz lint types index bench proto schemas lock clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## create the virtual environment with everything in it

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[server,client,gpu,postgres,report,demo,dev]"
	@touch $@

dist: $(STAMP) ## build the wheel and the source distribution into dist/
	$(BIN)/python -m hatchling build --directory dist --target wheel --target sdist

demo: $(STAMP) ## three hospitals fine-tune one model together (about ten minutes)
	$(BIN)/python scenarios/hospital/run.py

quick: $(STAMP) ## the tests without processes, PostgreSQL and models: 90 seconds, while one writes
	$(BIN)/python -m pytest --quick -n 2 --dist worksteal

test: $(STAMP) ## all tests
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations=25

fuzz: $(STAMP) ## the fuzz tests with new inputs, ten minutes each (CONCORDAT_FUZZ_MINUTES)
	CONCORDAT_FUZZ_MINUTES=$${CONCORDAT_FUZZ_MINUTES:-10} $(BIN)/python -m pytest -n 2 tests/fuzz

lint: $(STAMP) ## ruff (rules and format), the import contracts and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(STAMP) ## mypy, strict, over the product, the tests and the scenarios
	$(BIN)/mypy

index: $(STAMP) ## rewrite what documents repeat: index of decisions, map of the house, first sentences
	$(BIN)/python tests/helpers/index.py

bench: $(STAMP) ## the benchmarks, one JSON object each
	@for b in $(filter-out %/test_benchmarks.py,$(wildcard tests/benchmarks/*.py)); do echo "== $$b"; $(BIN)/python $$b --json || exit 1; done

proto: $(STAMP) ## regenerate the gRPC stubs
	cd shared && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fl_shared/wire/*.proto
	cp shared/fl_shared/wire/agent_pb2.py shared/fl_shared/wire/agent_pb2.pyi server/fl_server/rounds/app/

schemas: $(STAMP) ## write the JSON Schemas that ship with the declarations
	$(BIN)/python tests/shared/test_schemas.py

lock: $(STAMP) ## write the installed versions to constraints.txt
	@{ echo "# Versions that the demo, the tests and CI install: name==version. Written by 'make lock'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' | grep -E '^[A-Za-z0-9_.-]+==' ; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis scenarios/*/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
