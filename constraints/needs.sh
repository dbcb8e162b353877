# Name what a bare machine lacks, with the line that installs it. Usage: sh needs.sh PYTHON
python=$1
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
    echo "Python 3.11 or 3.12 is needed: apt install python3.11 python3.11-venv" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "Python's venv is missing: apt install python$version-venv" >&2
    exit 2
fi
