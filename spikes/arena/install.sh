mkdir -p site; python3 -m pip install -q --no-index --no-deps --no-compile --target site .whl/*.whl 2>&1 | grep -v -i warning
export PYTHONPATH=$PWD/site:$PWD PYTHONWARNINGS=ignore
mkdir -p bin; ln -sf $(which python3) bin/python; export PATH=$PWD/bin:$PATH
