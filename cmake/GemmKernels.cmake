# One source file for each row of an architecture's kernels.def: a GEMM kernel takes over a minute to compile, so each
# has a file of its own, written into the build folder.
#
#   sparse24_gemm_kernels(RESULT sm90 folder)  writes them into `folder` and sets RESULT to their list
#
# SPARSE24_GEMM_GROUP=n puts n kernels into a file. Most of what one takes is reading CUTLASS: on a core, with nvcc 13.0,
# one takes 97 s and 3.0 GB, eight weight gradients 223 s and 4.1 GB. So groups are less work in all, for machines with few
# cores.
#
# As a script, for tests: cmake -DARCH=sm90 -DFOLDER=/tmp/kernels -P cmake/GemmKernels.cmake

function(sparse24_gemm_kernels result arch folder)
  set(table ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/gemm/${arch}/kernels.def)
  if(NOT CMAKE_SCRIPT_MODE_FILE)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${table})
  endif()
  file(STRINGS ${table} rows REGEX "^SP24_GEMM_KERNEL")
  set(names "")
  set(grouped 0)
  foreach(row IN LISTS rows)
    string(REGEX REPLACE "^SP24_GEMM_KERNEL\\((.*)\\)$" "\\1" columns "${row}")
    string(REGEX REPLACE ", *" "_" name "${columns}")
    if(SPARSE24_GEMM_GROUP GREATER 1)
      math(EXPR number "${grouped} / ${SPARSE24_GEMM_GROUP}")
      math(EXPR grouped "${grouped} + 1")
      set(name group_${number})
    endif()
    list(APPEND names ${name})
    string(APPEND kernels_of_${name} "SP24_DEFINE_GEMM_KERNEL(${columns})\n")
  endforeach()
  list(REMOVE_DUPLICATES names)
  set(files "")
  foreach(name IN LISTS names)
    set(file ${folder}/${name}.cu)
    set(content "#include \"gemm/${arch}/kernel.h\"\n\n${kernels_of_${name}}")
    set(old "")
    if(EXISTS ${file})
      file(READ ${file} old)
    endif()
    if(NOT old STREQUAL content)  # an unchanged file is not compiled again
      file(WRITE ${file} "${content}")
    endif()
    list(APPEND files ${file})
  endforeach()
  set(${result} ${files} PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  sparse24_gemm_kernels(ignored ${ARCH} ${FOLDER})
endif()
