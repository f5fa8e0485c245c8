#!/bin/sh
# Runs GPU tests under compute-sanitizer. Of the memory-bound kernels: every shape, layout and dtype, with buffers that
# end where the tensors end and outputs that start uninitialised. Of the sparse GEMM: each pass and tile, with and
# without stream-K, with bias, accumulation and both outputs, at small sizes.
#
#   tests/sanitize.sh [folder or program] [tool ...]    default: build/cuda, memcheck racecheck initcheck
#
# Exit status 0 if all tools find nothing and the tests pass under each.
set -u
where=${1:-build/cuda}
[ $# -gt 0 ] && shift
[ $# -eq 0 ] && set -- memcheck racecheck initcheck
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }

programs=$where
[ -d "$where" ] && programs="$where/memory_kernels_gpu_test $where/activation_gpu_test $where/float8_kernels_gpu_test $where/gemm_gpu_test $where/gemm_float8_gpu_test"

status=0
for program in $programs; do
  case $program in
    *gemm_gpu_test | *gemm_float8_gpu_test) arguments=sanitize ;;
    *) arguments="--tight --quick" ;;
  esac
  for tool in "$@"; do
    echo "== $tool $program"
    # shellcheck disable=SC2086
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" $arguments || { echo "$tool: failed on $program" >&2; status=1; }
  done
done
exit $status
