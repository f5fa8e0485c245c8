# The CUDA part of libsparse24, for SPARSE24_CUDA_ARCHS: kernels around the products; products for Hopper (sm_90a: wgmma and
# TMA need the `a`), and products for sm_80, 86 and 89.

set(CMAKE_CUDA_ARCHITECTURES OFF)  # given below, in full
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.3)
  message(FATAL_ERROR "sparse24 needs CUDA 12.3 or later, got ${CMAKE_CUDA_COMPILER_VERSION}; "
    "install a newer toolkit, or build for the CPU with SPARSE24_CUDA=0")
endif()
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

include(cmake/CudaArchs.cmake)
sparse24_cuda_archs(cuda_archs)
sparse24_gencode(kernel_gencode ${cuda_archs})
# Products for older GPUs run on a Hopper GPU too, where SPARSE24_ARCH asks: without a compiler, as `90` (no `a`).
string(REPLACE "90a" "90" mma_sp_archs "${cuda_archs}")
sparse24_gencode(mma_sp_gencode ${mma_sp_archs})
# Those of 8 bits from sm_89 on; nvcc knows the instruction since 12.4.
set(float8_archs ${mma_sp_archs})
list(FILTER float8_archs INCLUDE REGEX "^(89|9)")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4 OR cuda_archs STREQUAL "90a")
  set(float8_archs "")
endif()
sparse24_gencode(float8_gencode ${float8_archs})
sparse24_gencode(hopper_gencode 90a)
string(REPLACE ";" ", " archs_text "${cuda_archs}")
string(REPLACE ";" ", " float8_archs_text "${float8_archs}")
message(STATUS "sparse24: kernels for ${archs_text}")
# csrc/common/kernel_arch.h: paths of GPUs that nothing is compiled for are left out.
set(what_is_built "")
if(NOT 90a IN_LIST cuda_archs)
  set(what_is_built SPARSE24_BUILT_SM90=0)
elseif(cuda_archs STREQUAL "90a")
  set(what_is_built SPARSE24_BUILT_SM80=0)
endif()
if(NOT float8_archs)
  list(APPEND what_is_built SPARSE24_BUILT_SM89=0)
endif()

include(cmake/Cutlass.cmake)
sparse24_find_cutlass(cutlass_include)

# Serialised wgmma (ptxas message C7510) costs more than all tuning gains, and the build fails on it.
set(strict_nvcc ${CMAKE_CURRENT_SOURCE_DIR}/cmake/strict_nvcc.sh)

add_library(sparse24_cuda_options INTERFACE)
target_link_libraries(sparse24_cuda_options INTERFACE sparse24_options)
target_include_directories(sparse24_cuda_options INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_compile_options(sparse24_cuda_options INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3;--expt-relaxed-constexpr;-Xcompiler=-ffp-contract=off>)
set(for_kernels $<$<COMPILE_LANGUAGE:CUDA>:${kernel_gencode}>)

# The same rounding as on the CPU, so no a*b + c in one step.
set(no_contraction $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>)
# Code for several GPUs is compiled side by side: the largest file would else end long after the rest.
list(LENGTH cuda_archs arch_count)
set(side_by_side $<$<COMPILE_LANGUAGE:CUDA>:--threads=${arch_count}>)
# Kernels around the GEMM.
file(GLOB kernel_sources CONFIGURE_DEPENDS
  csrc/mask/*.cu csrc/pack/*.cu csrc/activation/*.cu csrc/fused/*.cu)
# Host code of the GEMM (heuristics) and its kernels.
file(GLOB_RECURSE gemm_host_sources CONFIGURE_DEPENDS csrc/gemm/*.cpp)
include(cmake/GemmKernels.cmake)
set(gemm_sources "")
if(90a IN_LIST cuda_archs)
  sparse24_gemm_kernels(gemm_sources sm90 ${CMAKE_CURRENT_BINARY_DIR}/gemm/sm90)
endif()
set(gemm_sm80_sources "")
if(NOT cuda_archs STREQUAL "90a")
  sparse24_gemm_kernels(gemm_sm80_sources sm80 ${CMAKE_CURRENT_BINARY_DIR}/gemm/sm80)
endif()
set(gemm_sm89_sources "")
if(float8_archs)
  sparse24_gemm_kernels(gemm_sm89_sources sm89 ${CMAKE_CURRENT_BINARY_DIR}/gemm/sm89)
endif()

target_link_libraries(sparse24_host PRIVATE sparse24_cuda_options)
target_sources(sparse24_host PRIVATE ${gemm_host_sources})
target_compile_definitions(sparse24_host PRIVATE SPARSE24_CUDA_ARCHS="${archs_text}"
  SPARSE24_FLOAT8_ARCHS="${float8_archs_text}" ${what_is_built})

if(kernel_sources)
  add_library(sparse24_kernels OBJECT ${kernel_sources})
  target_link_libraries(sparse24_kernels PRIVATE sparse24_cuda_options)
  target_compile_options(sparse24_kernels PRIVATE ${no_contraction} "${for_kernels}" ${side_by_side})
  target_compile_definitions(sparse24_kernels PRIVATE ${what_is_built})
  set_target_properties(sparse24_kernels PROPERTIES CUDA_COMPILER_LAUNCHER ${strict_nvcc})
  list(APPEND objects $<TARGET_OBJECTS:sparse24_kernels>)
endif()

sparse24_fail_on_spills(fail_on_spills ${CMAKE_CUDA_COMPILER_VERSION})

# sparse24_add_gemm(TARGET GENCODE SOURCE...)  an object library of GEMM kernels
function(sparse24_add_gemm target gencode)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE sparse24_cuda_options)
  target_include_directories(${target} SYSTEM PRIVATE ${cutlass_include})
  target_compile_options(${target} PRIVATE ${no_contraction} ${gencode})
  if(fail_on_spills)  # -v tells of them, and strict_nvcc.sh then fails
    target_compile_options(${target} PRIVATE -Xptxas=-v)
  endif()
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER ${strict_nvcc})
endfunction()

if(gemm_sources)
  sparse24_add_gemm(sparse24_gemm "${hopper_gencode}" ${gemm_sources})
  list(APPEND objects $<TARGET_OBJECTS:sparse24_gemm>)
endif()
if(gemm_sm80_sources)  # seconds each: no CUTLASS collective
  sparse24_add_gemm(sparse24_gemm_sm80 "${mma_sp_gencode}" ${gemm_sm80_sources})
  list(APPEND objects $<TARGET_OBJECTS:sparse24_gemm_sm80>)
endif()
if(gemm_sm89_sources)
  sparse24_add_gemm(sparse24_gemm_sm89 "${float8_gencode}" ${gemm_sm89_sources})
  list(APPEND objects $<TARGET_OBJECTS:sparse24_gemm_sm89>)
endif()

# A GEMM kernel takes about 5 GiB to compile: as many at a time as memory holds.
include(cmake/GemmJobs.cmake)
sparse24_gemm_jobs(gemm_jobs)
if(CMAKE_GENERATOR MATCHES "Ninja")
  set_property(GLOBAL PROPERTY JOB_POOLS gemm=${gemm_jobs})
  if(gemm_sources)
    set_target_properties(sparse24_gemm PROPERTIES JOB_POOL_COMPILE gemm)
  endif()
  list(LENGTH gemm_sources gemm_count)
  message(STATUS "sparse24: ${gemm_count} GEMM files for Hopper, ${gemm_jobs} at a time")
else()
  message(WARNING "Only the Ninja generator limits how many GEMM kernels compile at a time (5 GiB each); "
    "with ${CMAKE_GENERATOR} build with -j${gemm_jobs}, or configure with -G Ninja")
endif()

# Static, and no libcuda: the library must load where there is no driver.
set(SPARSE24_CUDA_LIBRARIES CUDA::cudart_static)
