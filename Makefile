# The two commands of a newcomer, `make demo` and `make test`, and a few more: `make help` lists them. They need
# Python 3.11 or newer (with venv and its headers), a C++ compiler and pip's index; everything else goes into .venv.
#
#   make test PYTHON=python3.12        another Python, for a new .venv
#   make test ARGS="-k swap -x"        ARGS goes to pytest, `convkit demo` or `convkit bench`
#   make gpu-report PYTHON=python3.12  on a machine with a GPU: that Python as it is, with its CUDA build of PyTorch
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                      takes PyTorch's CPU wheel, and spares the gigabytes of its CUDA packages
PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f -not -path 'csrc/cuda/emulation/*')

.PHONY: help demo bench test lint gpu-report readme-tables build clean

help:
	@echo "make demo           train three networks on real digits with convkit's kernels; ends with a table"
	@echo "make bench          measure convkit against PyTorch           (ARGS=... goes to convkit bench)"
	@echo "make test           the whole test suite                      (ARGS=... goes to pytest)"
	@echo "make lint           ruff: rules and format"
	@echo "make gpu-report     build, test and measure on a GPU, in ten minutes (PYTHON=..., OUT=folder)"
	@echo "make readme-tables  fill the tables of README.md from benchmarks/results"
	@echo "make build          .venv with everything pinned in it, and the native module, compiled where it changed"
	@echo "make clean          remove what was built; .venv stays"

demo: build
	.venv/bin/convkit demo $(ARGS)

bench: build
	.venv/bin/convkit bench $(ARGS)

# A process a core, up to eight, as most tests keep one busy.
test: build
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: .venv/.requirements
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Downloads nothing and makes no .venv: the Python that PYTHON= names has a CUDA build of PyTorch, or one line says so.
gpu-report:
	@$(PYTHON) benchmarks/gpu_report.py $(if $(OUT),--out "$(OUT)") $(ARGS)

readme-tables: build
	$(PY) benchmarks/readme_tables.py

build: .venv/.built

# The first pip command compiles in sight; the second finds that done, and makes `import convkit` and the `convkit`
# command work.
.venv/.built: .venv/.requirements $(NATIVE)
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

.venv/.requirements: requirements.txt
	@$(PYTHON) -c "$$CHECK"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -r requirements.txt
	@touch $@

clean:
	rm -rf build dist convkit.egg-info convkit/_C*.so .venv/.built .pytest_cache .hypothesis .benchmarks .ruff_cache
	find convkit tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Looked at before anything is downloaded. setup.py checks the compiler and the headers again, for those who come by
# pip.
define CHECK
import os, shlex, shutil, sys, sysconfig
def stop(message):
    sys.exit("convkit: " + message)
version = ".".join(map(str, sys.version_info[:2]))
if sys.version_info < (3, 11):
    stop("%s is Python %s, 3.11 or newer is needed: type: make PYTHON=python3.12" % (sys.executable, version))
try:
    import ensurepip, venv
except ImportError:
    stop("Python %s has no venv module: type: apt-get install python%s-venv" % (version, version))
compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
if not any(map(shutil.which, compilers)):
    stop("no C++ compiler found (%s): type: apt-get install g++ (dnf install gcc-c++)" % ", ".join(compilers))
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
if not os.path.exists(headers):
    stop("no %s: type: apt-get install python%s-dev (dnf install python%s-devel)" % (headers, version, version))
endef
export CHECK
