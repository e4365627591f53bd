# The one door. `make` alone prints what there is.
PROFILE ?= tiny
PYTHON  ?= python3

# What may be set becomes words of a shell, PROFILE a folder's name: checked first, as text that nothing has expanded.
SIGNS := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 _ . -
less   = $(if $(2),$(call less,$(subst $(firstword $(2)),,$(1)),$(wordlist 2,99,$(2))),$(1))
wrong  = $(filter-out 1,$(words $(1)))$(call less,$(1),$(SIGNS))$(filter .% -%,$(1))
$(if $(call wrong,$(value PROFILE)),$(error PROFILE is "$(value PROFILE)", expected one name from notebooks/profiles: letters, digits, "_", "." and "-"))
define newline


endef
unsafe = $(findstring $$,$(1))$(findstring ',$(1))$(findstring $(newline),$(1))
$(foreach v,PYTHON TO LOCAL,$(if $(call unsafe,$(value $(v))),$(error $(v) is "$(value $(v))", expected a path that has no "$$", no "'" and no line break: rename it)))

NOTEBOOKS := 00_start_here 01_hexainst 02_capture 03_neurons 04_experts 05_generality_uniqueness 06_ablation 07_alteration 08_claims 09_your_own 10_tuning
# 03 to 07 read the counts that 02 wrote and nothing of one another, 09 and 10 nothing of the chain: they may run side by side.
# They start in this order, the longest first, so that no core waits for it at the end.
TOGETHER  := $(foreach n,06 05 07 04 03 10 09,$(filter $(n)_%,$(NOTEBOOKS)))
CHAIN     := $(NOTEBOOKS:%=notebooks/%.ipynb) --together $(TOGETHER)

CONDA := $(firstword $(foreach c,mamba micromamba conda,$(shell command -v $(c) 2>/dev/null)))
PY    := .venv/bin/python
READY := .venv/.ready
$(foreach v,SIGNS less wrong newline unsafe NOTEBOOKS TOGETHER CHAIN CONDA PY READY,$(if $(filter-out file,$(origin $(v))),$(error $(v) is not for the command line; PROFILE, PYTHON, TO and LOCAL are)))

# One thread and no hub traffic unless the caller says otherwise: small matrices run fastest, and two runs agree bit for bit.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export PYTHONHASHSEED = 0
export PYTHONUTF8 = 1
export JUPYTER_PREFER_ENV_PATH = 1

# Recipes are single commands where they run long: make starts those without a shell between, so a signal to make reaches them.
.DEFAULT_GOAL := help
.PHONY: help env lab reproduce test lint refresh models seeds trajectory grid tune hexainst-human bench bench-peers bench-analysis bench-chain plan site clean

help: ## print this list
	@echo "make TARGET [PROFILE=$(PROFILE)]"; grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z-]+:.*## ' Makefile

env: $(READY) ## build .venv from the pins (conda, mamba or micromamba where there is one, else venv + pip)

$(READY): requirements.txt environment.yml
ifneq ($(CONDA),)
	'$(CONDA)' env create --yes --prefix ./.venv --file environment.yml
else
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d found, 3.11 or newer needed: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	'$(PYTHON)' -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
endif
	@$(PY) -c 'import os, sysconfig; open(sysconfig.get_path("purelib") + "/sparcom.pth", "w").write(os.getcwd() + "\n")'
	@touch $@

lab: $(READY) ## open the notebooks in JupyterLab, with this environment's kernel
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks notebooks/00_start_here.ipynb

reproduce: $(READY) ## run the whole chain headless, or what an interrupted run left of it; results in data/results/PROFILE, figures in figures/PROFILE
	$(PY) -m helpers.run chain --profile $(PROFILE) $(CHAIN)

test: $(READY) lint ## unit tests, then strict nbval over the committed notebooks
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests helpers
	$(PY) -m helpers.run check $(CHAIN)

lint: $(READY) ## ruff over code and notebooks
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .

refresh: $(READY) ## re-execute the committed notebooks in place (profile tiny) and make them canonical
	$(PY) -m helpers.run refresh $(CHAIN)

models: $(READY) ## retrain the tiny models from nothing (more than an hour on one core)
	$(PY) -m helpers.run train --pair tiny-dense
	$(PY) -m helpers.run train --pair tiny-dense --seed 1
	$(PY) -m helpers.run train --pair tiny-dense --seed 2
	$(PY) -m helpers.run train --pair tiny-moe

seeds: $(READY) ## train the pairs of the profile tiny-seeds into data/cache/models: two more sparse seeds, eight layers (45 minutes of one core)
	$(PY) -m helpers.run train --pair tiny-moe --seed 1 --out data/cache/models/tiny-moe-s1
	$(PY) -m helpers.run train --pair tiny-moe --seed 2 --out data/cache/models/tiny-moe-s2
	$(PY) -m helpers.run train --pair tiny-deep --out data/cache/models/tiny-deep

trajectory: $(READY) ## tune the tiny bases again with checkpoints kept and measured; writes data/trajectory (an hour of one core)
	$(PY) -m helpers.run trajectory --pair tiny-dense
	$(PY) -m helpers.run trajectory --pair tiny-dense --seed 1
	$(PY) -m helpers.run trajectory --pair tiny-dense --regime lora
	$(PY) -m helpers.run trajectory --pair tiny-moe
	$(PY) -m helpers.run trajectory --pair tiny-moe --seed 1

grid: $(READY) ## the whole grid of ablations, three dense seeds and the sparse pair; writes data/grid (half an hour of one core, resumes)
	$(PY) -m helpers.run grid --profile tiny-full

tune: $(READY) ## tune SmolLM2 six ways, measure each on HexaInst; writes data/tuning (hours of two cores; resumes)
	$(PY) -m helpers.run tune

bench: $(READY) ## cost of capture as ratios in one run; writes data/results/bench.json
	$(PY) -m tests.bench

bench-peers: ## the same beside nnsight and TransformerLens, in an environment of their own
	'$(PYTHON)' -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r requirements.txt nnsight==0.8.1 transformer-lens==4.3.0
	.venv-peers/bin/python -m tests.bench

bench-analysis: $(READY) ## analysis at the paper's scale: 1,200 instructions, up to 2.2 million neurons (6 GB of disk)
	$(PY) -m tests.bench --analysis

bench-chain: $(READY) ## tokens that PROFILE's last chain read, stage by stage, beside the least (runs the chain if none has)
	@ls data/results/$(PROFILE)/notebooks/*.tokens.jsonl >/dev/null 2>&1 || $(PY) -m helpers.run chain --profile $(PROFILE) $(CHAIN)
	$(PY) -m tests.bench --chain $(PROFILE)

plan: $(READY) ## what PROFILE will cost: neurons, passes, disk
	$(PY) -m helpers.run plan --profile $(PROFILE)

site: $(READY) ## write a static site of what PROFILE found (data/results/site, or TO=FOLDER): findings, figures, notebooks, atlas
	$(PY) -m helpers.run site --profile $(PROFILE) $(if $(TO),--to '$(TO)')

hexainst-human: $(READY) ## fetch the human half's sources, or take them from LOCAL=FOLDER, and build data/hexainst/human.jsonl
	$(PY) -m helpers.run human $(if $(LOCAL),--local '$(LOCAL)')

clean: ## delete PROFILE's results, no other's (asks first)
	@printf 'Delete data/results/$(PROFILE)? Counts may take long to compute again. [y/N] '; read answer; \
	  if [ "$$answer" = y ]; then rm -rf 'data/results/$(PROFILE)' && echo deleted; else echo kept; fi
