#!/bin/sh
# strict_nvcc.sh: runs the compiler command in its arguments; fails where ptxas reports C7510 or spilled registers.
#
# C7510 means that wgmma instructions are serialised: the kernel is right, and slower than a dense one. Spills are told
# of where the command has -Xptxas=-v (SPARSE24_FAIL_ON_SPILLS=ON): what is spilled in an epilogue may be loaded again in
# every step of the main loop. ptxas only informs of both, so its output is read here.
log=$(mktemp "${TMPDIR:-/tmp}/strict_nvcc.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT

"$@" >"$log" 2>&1
status=$?
why=
grep -q C7510 "$log" && why="ptxas serialised wgmma (C7510, above)"
spills=$(grep -E '[1-9][0-9]* bytes spill (stores|loads)' "$log")
[ -n "$spills" ] && why="ptxas spilled registers (${spills#"${spills%%[![:space:]]*}"})"
if [ -n "$why" ] || [ "$status" -ne 0 ]; then
  cat "$log" >&2
else
  grep -vE '^ptxas info|bytes stack frame' "$log" >&2
fi
if [ "$status" -eq 0 ] && [ -n "$why" ]; then
  echo "error: $why; restructure the kernel or lower its register use" >&2
  # Without its object, a build repeated after this failure compiles the file again.
  previous=
  for argument in "$@"; do
    [ "$previous" = "-o" ] && rm -f "$argument"
    previous=$argument
  done
  exit 1
fi
exit "$status"
