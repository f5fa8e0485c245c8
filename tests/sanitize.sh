#!/usr/bin/env bash
# Runs GPU tests under compute-sanitizer. Of the memory-bound kernels: every shape, layout and dtype, with buffers that
# end where the tensors end and outputs that start uninitialised. Of the sparse GEMM: each pass and tile, with and
# without stream-K, with bias, accumulation and both outputs, at small sizes.
#
#   tests/sanitize.sh [folder or program] [tool ...]    default: build/cuda, all four tools
#
# JOBS (8) run at a time and share the GPU: ten at a time on an H200 took five minutes, one after the other they would
# take forty. What each prints goes to build/sanitize/TOOL-PROGRAM.log. Exit status 0 if all tools find nothing and the
# tests pass under each. SPARSE24_ARCH=sm80 looks at the kernels of older GPUs.
set -u
where=${1:-build/cuda}
[ $# -gt 0 ] && shift
[ $# -eq 0 ] && set -- memcheck racecheck initcheck synccheck
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }

programs=("$where")
if [ -d "$where" ]; then
  programs=("$where"/{float8_kernels,memory_kernels,activation,activation_pack,gemm}_gpu_test) # the longest first
  case ${SPARSE24_ARCH:-} in
    sm80 | sm86) ;; # these have no 8-bit products
    *) programs+=("$where/gemm_float8_gpu_test") ;;
  esac
fi
export LOGS=build/sanitize
mkdir -p "$LOGS"

sanitized() { # TOOL PROGRAM
  local arguments="--tight --quick" log begin=$SECONDS
  log=$LOGS/$1-$(basename "$2").log
  case $2 in *gemm_gpu_test | *gemm_float8_gpu_test) arguments=sanitize ;; esac
  # shellcheck disable=SC2086
  if compute-sanitizer --tool "$1" --error-exitcode 9 "$2" $arguments > "$log" 2>&1; then
    echo "$1 $(basename "$2"): clean, $((SECONDS - begin)) s"
  else
    echo "$1 $(basename "$2"): FAILED, see $log: $(tail -n 1 "$log")"
    return 1
  fi
}
export -f sanitized

for tool in "$@"; do
  for program in "${programs[@]}"; do printf '%s %s\n' "$tool" "$program"; done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'sanitized "$@"' sanitized
[ $? -eq 0 ] || { echo "compute-sanitizer found something, or a test failed under it" >&2; exit 1; }
