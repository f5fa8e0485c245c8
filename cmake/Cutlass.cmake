# CUTLASS headers for the GEMM kernels: sparse24_find_cutlass(RESULT) sets RESULT to their include folders.
#
# CUTLASS_DIR (environment or -D) wins: a CUTLASS checkout, its include folder, or the unpacked wheel.
# Otherwise the PyPI package nvidia-cutlass, which carries the headers, is downloaded once, checked
# against its hash and unpacked into the user's cache.

set(CUTLASS_DIR "" CACHE PATH "CUTLASS >= 4.2: a checkout, its include folder, or the unpacked nvidia-cutlass wheel")
set(cutlass_version 4.2.0.0)
set(cutlass_sha256 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)

# The folder under `root` that holds cutlass/cutlass.h; empty if none does.
function(sparse24_cutlass_include root result)
  set(${result} "" PARENT_SCOPE)
  foreach(below . include cutlass_library/source/include source/include)
    if(EXISTS ${root}/${below}/cutlass/cutlass.h)
      get_filename_component(found ${root}/${below} ABSOLUTE)
      set(${result} ${found} PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

function(sparse24_download_cutlass destination)
  set(remedies
    "Either connect this machine to the package index (or its mirror, as configured for pip), or fetch "
    "nvidia-cutlass==${cutlass_version} elsewhere, unpack it (or take a CUTLASS 4.2 checkout) and set CUTLASS_DIR to "
    "that folder. SPARSE24_CUDA=0 builds for the CPU, without CUTLASS.")
  find_program(python NAMES python3 python HINTS ${SPARSE24_PYTHON_BIN} NO_CACHE)
  if(SPARSE24_PYTHON)
    set(python ${SPARSE24_PYTHON})
  endif()
  if(NOT python)
    message(FATAL_ERROR "CUTLASS headers are missing, and there is no python3 to download them with. " ${remedies})
  endif()

  get_filename_component(parent ${destination} DIRECTORY)
  string(RANDOM LENGTH 8 suffix)
  set(scratch ${parent}/download-${suffix})  # beside the destination, so that the last rename is atomic
  file(MAKE_DIRECTORY ${scratch})
  message(STATUS "sparse24: downloading CUTLASS headers (nvidia-cutlass ${cutlass_version}) into ${parent}")
  execute_process(
    COMMAND ${python} -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all:
      --dest ${scratch} nvidia-cutlass==${cutlass_version}
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  file(GLOB wheel ${scratch}/nvidia_cutlass-*.whl)
  if(failed OR NOT wheel)
    file(REMOVE_RECURSE ${scratch})
    message(FATAL_ERROR "Could not download nvidia-cutlass ${cutlass_version}: ${output}\n" ${remedies})
  endif()
  file(SHA256 ${wheel} hash)
  if(NOT hash STREQUAL cutlass_sha256)
    file(REMOVE_RECURSE ${scratch})
    message(FATAL_ERROR "nvidia-cutlass ${cutlass_version} has SHA-256 ${hash} instead of ${cutlass_sha256}: "
      "not the file we know. " ${remedies})
  endif()
  file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${scratch}/unpacked)
  # Another build may have been faster; its copy is as good.
  if(NOT EXISTS ${destination})
    file(RENAME ${scratch}/unpacked ${destination} RESULT ignored)
  endif()
  file(REMOVE_RECURSE ${scratch})
endfunction()

function(sparse24_find_cutlass result)
  set(root "${CUTLASS_DIR}")
  if(root STREQUAL "")
    set(root "$ENV{CUTLASS_DIR}")
  endif()
  if(NOT root STREQUAL "")
    sparse24_cutlass_include("${root}" include)
    if(NOT include)
      message(FATAL_ERROR "CUTLASS_DIR=${root} has no cutlass/cutlass.h; it must be a CUTLASS checkout, its include "
        "folder, or the unpacked nvidia-cutlass wheel")
    endif()
  else()
    set(cache "$ENV{XDG_CACHE_HOME}")
    if(cache STREQUAL "")
      set(cache "$ENV{HOME}/.cache")
    endif()
    set(root ${cache}/sparse24/cutlass-${cutlass_version})
    sparse24_cutlass_include(${root} include)
    if(NOT include)
      sparse24_download_cutlass(${root})
      sparse24_cutlass_include(${root} include)
    endif()
    if(NOT include)
      message(FATAL_ERROR "${root} has no CUTLASS headers; remove that folder and build again, or set CUTLASS_DIR")
    endif()
  endif()

  file(STRINGS ${include}/cutlass/version.h numbers REGEX "#define CUTLASS_(MAJOR|MINOR) +[0-9]+")
  string(REGEX REPLACE ".*CUTLASS_MAJOR +([0-9]+).*" "\\1" major "${numbers}")
  string(REGEX REPLACE ".*CUTLASS_MINOR +([0-9]+).*" "\\1" minor "${numbers}")
  if("${major}.${minor}" VERSION_LESS 4.2)
    message(FATAL_ERROR "CUTLASS 4.2 or later is needed, ${root} has ${major}.${minor}")
  endif()
  message(STATUS "sparse24: CUTLASS ${major}.${minor} from ${include}")
  set(${result} ${include} PARENT_SCOPE)
endfunction()
