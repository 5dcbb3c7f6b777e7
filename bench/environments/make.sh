#!/bin/sh
# Makes a peer's environment: bench/environments/make.sh NAME installs bench/environments/NAME.txt into .venv-NAME at
# the repository's root. Does nothing when the environment was made from the same file. PYTHON chooses the interpreter.
# Where an environment whose file begins with "# optional" cannot be made, the reason is printed and that is no failure.
# One whose file begins with "# alone" holds only what the file names; the environment that borrows it has the rest.
set -eu

name=${1:?usage: bench/environments/make.sh NAME}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
requirements=$here/$name.txt
folder=$root/.venv-$name
python=${PYTHON:-python3}

if [ ! -f "$requirements" ]; then
    echo "$requirements: no such environment" >&2
    exit 2
fi
digest=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$requirements")
stamp=$folder/made-from
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$digest" ]; then
    exit 0
fi
echo "making .venv-$name (a few minutes)"
"$python" -m venv --clear "$folder"
# torch first and pinned, so that nothing that depends on it can choose another build
torch=$(grep '^torch==' "$requirements" || true)
if [ -n "$torch" ]; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" 2>"$folder/pip.log" ||
        { cat "$folder/pip.log" >&2; exit 1; }
fi
alone=
if head -n 1 "$requirements" | grep -q '^# alone'; then alone=--no-deps; fi
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $alone -r "$requirements" 2>>"$folder/pip.log" || {
    if head -n 1 "$requirements" | grep -q '^# optional'; then
        echo ".venv-$name is left out, and so is what needs it: $(grep -v '^WARNING' "$folder/pip.log" | tail -n 1)"
        rm -r "$folder"
        exit 0
    fi
    cat "$folder/pip.log" >&2
    exit 1
}
echo "$digest" >"$stamp"
