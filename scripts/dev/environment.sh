# SPDX-License-Identifier: Apache-2.0
# Sourced by the other shell scripts: makes .venv once, again only when the requirements change.
# Set PYTHON to choose the interpreter; it must be 3.11 or later.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is not Python 3.11 or later; install it, or set PYTHON to one" >&2
  exit 2
fi
stamp=.venv/requirements-$(cat requirements.txt tests/requirements.txt | cksum | tr ' ' '-')
if [ ! -e "$stamp" ]; then
  echo "setting up .venv (once; a few minutes)"
  "$python" -m venv .venv || { echo "error: no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
  .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
  touch "$stamp"
fi
# Two processes of one thread are faster on two cores than one of two; glibc gives every large tensor back to the
# kernel and takes it again, and keeping it speeds CPU training up several times.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=536870912
