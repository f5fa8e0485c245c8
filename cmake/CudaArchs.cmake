# For which GPUs kernels are compiled: sparse24_cuda_archs(RESULT) sets RESULT to a list such as 80;86;89;90a;89-virtual.
#
#   80, 86, 89    real code for A100, RTX 3090, RTX 4090
#   90a           real code for Hopper, with wgmma and TMA (the `a`)
#   80-virtual    PTX, which the driver compiles for its GPU when the library is loaded; also 86-virtual, 89-virtual
#
# Without SPARSE24_CUDA_ARCHS: what the GPUs of this machine need, and 90a where there is none.

set(SPARSE24_CUDA_ARCHS "" CACHE STRING
  "GPUs to compile for: all, or a list of 80, 86, 89, 90a, 80-virtual; empty: the environment variable of this name, else this machine's")

set(sparse24_all_archs 80 86 89 90a 89-virtual)
set(sparse24_known_archs 80 86 89 90a 80-virtual 86-virtual 89-virtual)

# What a GPU of compute capability `capability`, such as 8.6, runs.
function(sparse24_arch_of_gpu result capability)
  string(REPLACE "." "" number "${capability}")
  if(number STREQUAL "90")
    set(arch 90a)
  elseif(number MATCHES "^(80|86|89)$")
    set(arch ${number})
  elseif(number STREQUAL "87")
    set(arch 86)
  elseif(number GREATER 90)  # kernels around the products run from PTX
    set(arch 89-virtual)
  else()
    set(arch "")
  endif()
  set(${result} "${arch}" PARENT_SCOPE)
endfunction()

function(sparse24_archs_of_machine result)
  find_program(nvidia_smi nvidia-smi NO_CACHE)
  set(found "")
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE status)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
      foreach(capability IN LISTS capabilities)
        sparse24_arch_of_gpu(arch ${capability})
        list(APPEND found ${arch})
      endforeach()
      list(REMOVE_DUPLICATES found)
    endif()
  endif()
  if(NOT found)
    set(found 90a)
  endif()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

function(sparse24_cuda_archs result)
  set(asked "${SPARSE24_CUDA_ARCHS}")
  if(asked STREQUAL "")
    set(asked "$ENV{SPARSE24_CUDA_ARCHS}")
  endif()
  string(REGEX REPLACE "[ ,;]+" ";" archs "${asked}")
  list(REMOVE_ITEM archs "")
  if(NOT archs)
    sparse24_archs_of_machine(archs)
  elseif(archs STREQUAL "all")
    set(archs ${sparse24_all_archs})
  endif()
  foreach(arch IN LISTS archs)
    if(NOT arch IN_LIST sparse24_known_archs)
      message(FATAL_ERROR "SPARSE24_CUDA_ARCHS must be all, or a list of ${sparse24_known_archs}, got '${asked}'")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
  set(${result} ${archs} PARENT_SCOPE)
endfunction()

# nvcc's flags for a list of architectures.
function(sparse24_gencode result)
  set(flags "")
  foreach(arch IN LISTS ARGN)
    if(arch MATCHES "^([0-9]+)-virtual$")
      list(APPEND flags -gencode=arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1})
    else()
      list(APPEND flags -gencode=arch=compute_${arch},code=sm_${arch})
    endif()
  endforeach()
  set(${result} ${flags} PARENT_SCOPE)
endfunction()
