#!/bin/sh
# check_library.sh libsparse24.so: the library must load where there is no driver, and keep to itself.
#
# It may not need libcuda, libcudart, torch or Python, and exports its own names only.
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
echo "$library: $(nm -D --defined-only "$library" | wc -l) names exported, needs" $needed
