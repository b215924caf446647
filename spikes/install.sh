[ -d site/deepspeed ] || { mkdir -p site bin; python3 -m pip install -q --no-index --no-deps --no-compile --target site .whl/*.whl 2>&1 | grep -v -i warning; }
printf '#!/bin/sh\nexec python3 "$@"\n' > bin/python; chmod +x bin/python  # a link to a virtual environment's python would lose its packages
export PYTHONPATH=$PWD/site:$PWD PYTHONWARNINGS=ignore PATH=$PWD/bin:$PATH
