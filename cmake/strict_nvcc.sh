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
kernel=$(printf '%s\n' "$object" | sed -n 's|.*/\([^/]*/[^/]*\)\.cu\.o$|\1|p')  # such as sm90/Forward_...
allowed=$(awk -v kernel="$kernel" 'kernel != "" && $1 == kernel { print $2 }' "$(dirname "$0")/allowed_spills.txt")
only=$(awk -v kernel="$kernel" 'kernel != "" && $1 == kernel { print $3 }' "$(dirname "$0")/allowed_spills.txt")
spills=$(awk -v allowed="${allowed:-0}" -v only="$only" '
  /Compiling entry function/ { arch = $NF; gsub(/\047/, "", arch) }
  { for (i = 1; i < NF; ++i) if ($(i + 1) == "bytes" && $(i + 2) == "spill" &&
        $i > (only == "" || only == arch ? allowed : 0)) { sub(/^ +/, ""); print; exit } }' "$log")
[ -n "$spills" ] && why="ptxas spilled registers ($spills; ${allowed:-0} bytes allowed for ${kernel:-this file})"
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
