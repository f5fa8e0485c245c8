#!/bin/sh
# strict_nvcc.sh: runs the compiler command in its arguments; fails where ptxas reports C7510.
#
# C7510 means that wgmma instructions are serialised: the kernel is right, and slower than a dense
# one. ptxas only informs of it, so its output is read here.
log=$(mktemp "${TMPDIR:-/tmp}/strict_nvcc.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT

"$@" >"$log" 2>&1
status=$?
cat "$log" >&2
if [ "$status" -eq 0 ] && grep -q C7510 "$log"; then
  echo "error: ptxas serialised wgmma (C7510, above); restructure the kernel or lower its register use" >&2
  # Without its object, a build repeated after this failure compiles the file again.
  previous=
  for argument in "$@"; do
    [ "$previous" = "-o" ] && rm -f "$argument"
    previous=$argument
  done
  exit 1
fi
exit "$status"
