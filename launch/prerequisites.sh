#!/usr/bin/env bash
# Usage: prerequisites.sh [PYTHON]
# Checks that a Debian or Ubuntu machine has what `make` needs to set up the virtual environment. For each missing
# package prints one line with the apt command that installs it, and exits with 2; prints nothing if none is missing.
set -euo pipefail

python=${1:-python3}
missing=0

# report WHAT WHY PACKAGE
report() {
    echo "error: $1 not found ($2): sudo apt-get install $3" >&2
    missing=1
}

python_ok=0
if ! command -v "$python" >/dev/null; then
    if [[ $python == python3 ]]; then
        report "python3" "3.11, 3.12 or 3.13" "python3 python3-venv python3-dev"
    else
        echo "error: $python not found: give a Python 3.11, 3.12 or 3.13 with make PYTHON=..." >&2
        missing=1
    fi
elif ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    echo "error: $python does not run: give a Python 3.11, 3.12 or 3.13 with make PYTHON=..." >&2
    missing=1
else
    case $version in
        3.11 | 3.12 | 3.13) python_ok=1 ;;
        *)
            hint="install one of these and give it with make PYTHON=..."
            for other in python3.13 python3.12 python3.11; do
                if "$other" -c '' 2>/dev/null; then hint="use make PYTHON=$other"; fi
            done
            echo "error: $python is Python $version, but 3.11, 3.12 or 3.13 is required: $hint" >&2
            missing=1
            ;;
    esac
fi

if ((python_ok)); then
    # Packages of the distribution's default Python are called python3-*, those of any other python3.X-*.
    package=python$version
    if [[ $(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$version" ]]; then
        package=python3
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        report "ensurepip of $python" "creates the virtual environment" "$package-venv"
    fi
    if ! [[ -f $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]]; then
        report "Python.h of $python" "needed to compile DeepSpeed's and torch's extensions" "$package-dev"
    fi
fi

# torch compiles with $CXX, or by default with c++, which the package g++ provides.
if ! command -v "${CXX:-g++}" >/dev/null; then
    report "${CXX:-g++}" "needed to compile DeepSpeed's and torch's extensions" "g++"
fi
if ! command -v make >/dev/null; then
    report "make" "runs the targets of the Makefile" "make"
fi

if ((missing)); then exit 2; fi
