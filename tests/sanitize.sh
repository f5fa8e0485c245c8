#!/bin/sh
# Runs the GPU test of the memory-bound kernels under compute-sanitizer: every shape, layout and dtype of it, with buffers
# that end where the tensors end and outputs that start uninitialised.
#
#   tests/sanitize.sh [program] [tool ...]    default: build/cuda/memory_kernels_gpu_test, memcheck racecheck initcheck
#
# Exit status 0 if all tools find nothing and the test passes under each.
set -u
program=${1:-build/cuda/memory_kernels_gpu_test}
[ $# -gt 0 ] && shift
[ $# -eq 0 ] && set -- memcheck racecheck initcheck
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }

status=0
for tool in "$@"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" --tight --quick || { echo "$tool: failed" >&2; status=1; }
done
exit $status
