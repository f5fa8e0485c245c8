#!/bin/sh
# check_library.sh libsparse24.so: the library must load where there is no driver, keep to itself, and have the kernels
# that it launches.
#
# It may not need libcuda, libcudart, torch or Python, and exports its own names only. A host compiler that names the types
# of a kernel otherwise than nvcc does makes a launch of a kernel that nobody registered: it compiles, links, and fails
# with cudaErrorInvalidDeviceFunction on a GPU.
set -eu
library=$1

needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
for name in $needed; do
  case $name in
    libcuda* | libcudart* | libnvidia* | libtorch* | libc10* | libpython*)
      echo "error: $library needs $name; it must load without a driver, torch or Python" >&2
      exit 1
      ;;
  esac
done

foreign=$(nm -DC --defined-only "$library" | sed 's/^[0-9a-f]* . //' |
  grep -vE '^(sparse24::|(typeinfo|typeinfo name|vtable) for sparse24::)' || true)
if [ -n "$foreign" ]; then
  echo "error: $library exports names that are not its own; see cmake/exports.map:" >&2
  echo "$foreign" >&2
  exit 1
fi

if ! nm -DC --defined-only "$library" | grep -q 'sparse24::version()'; then
  echo "error: $library does not export sparse24::version()" >&2
  exit 1
fi
# The stub of a kernel is a static function with the kernel's name (an L before it says static); the name that it was
# registered by is a string.
launched=$(nm "$library" 2> /dev/null | awk '$2 == "t" && $3 ~ /^_ZN8sparse24.*_kernel/ && $3 !~ /[.]|device_stub/ {print $3}' |
  sed -E 's/L([0-9]+[a-z0-9_]*_kernel)/\1/' | sort -u)
registered=$(strings -a -n 12 "$library" | grep '^_ZN8sparse24' | sort -u || true)
missing=$(printf '%s\n' "$registered" "$registered" "$launched" | sort | uniq -u)
if [ -n "$missing" ]; then
  echo "error: $library launches kernels that it does not have (tests/test_lambda_types.py names a cause):" >&2
  echo "$missing" | c++filt >&2
  exit 1
fi
echo "$library: $(nm -D --defined-only "$library" | wc -l) names exported, needs" $needed
