#!/bin/sh
# strict_nvcc.sh: runs the compiler command in its arguments; fails where ptxas reports C7510 or spilled registers.
#
# C7510 means that wgmma instructions are serialised: the kernel is right, and slower than a dense one. Spills are told
# of where the command has -Xptxas=-v (SPARSE24_FAIL_ON_SPILLS, for the GEMM): what is spilled in an
# epilogue may be loaded again in every step of the main loop. allowed_spills.txt beside this file has what is known
# and borne, in bytes. ptxas only informs of both, so its output is read here.
log=$(mktemp "${TMPDIR:-/tmp}/strict_nvcc.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT

"$@" >"$log" 2>&1
status=$?
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done

why=
grep -q C7510 "$log" && why="ptxas serialised wgmma (C7510, above)"
folder=$(printf '%s\n' "$object" | sed -n 's|.*/\([^/]*/\)[^/]*\.cu\.o$|\1|p')  # such as sm90/
# A kernel's symbol has its row of kernels.def in it, with the length before it.
spills=$(awk -v folder="$folder" '
  listed { if (index($1, folder) == 1) { row = substr($1, length(folder) + 1); most[row] = $2; only[row] = $3 } next }
  /Compiling entry function/ {
    arch = $NF; gsub(/\047/, "", arch); allowed = 0; kernel = "this kernel"
    for (row in most) if (index($0, length(row) row)) {
      kernel = folder row
      if (only[row] == "" || only[row] == arch) allowed = most[row]
    }
  }
  { for (i = 1; i < NF; ++i) if ($(i + 1) == "bytes" && $(i + 2) == "spill" && $i > allowed + 0) {
      sub(/^ +/, ""); print $0 "; " allowed + 0 " bytes allowed for " (kernel ? kernel : "this file"); exit
    } }' listed=1 "$(dirname "$0")/allowed_spills.txt" listed=0 "$log")
[ -n "$spills" ] && why="ptxas spilled registers ($spills)"
if [ -n "$why" ] || [ "$status" -ne 0 ]; then
  cat "$log" >&2
else
  grep -vE '^ptxas info|bytes stack frame' "$log" >&2
fi
if [ "$status" -eq 0 ] && [ -n "$why" ]; then
  echo "error: $why; restructure the kernel or lower its register use. Another compiler than the one of" \
    "cmake/allowed_spills.txt may spill elsewhere: SPARSE24_FAIL_ON_SPILLS=0 builds all the same" >&2
  # Without its object, a build repeated after this failure compiles the file again.
  [ -n "$object" ] && rm -f "$object"
  exit 1
fi
exit "$status"
