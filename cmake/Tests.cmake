# C++ tests: one program a file of tests/cpp. They link the library's objects, not the library, so
# that they reach what it hides.

add_library(sparse24_test_objects STATIC ${objects})
set_target_properties(sparse24_test_objects PROPERTIES LINKER_LANGUAGE CXX)
target_link_libraries(sparse24_test_objects PUBLIC
  sparse24_options Threads::Threads ${SPARSE24_CUDA_LIBRARIES})
target_compile_definitions(sparse24_test_objects PUBLIC ${what_is_built})

file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/*_test.cpp)
add_custom_target(cpp_tests)  # those that need no GPU
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE sparse24_test_objects)
  add_test(NAME ${name} COMMAND ${name})
  add_dependencies(cpp_tests ${name})
endforeach()

# The choice of a GEMM config is host code without CUDA: tested in CPU builds too.
set(gemm_config csrc/gemm/arch.cpp csrc/gemm/config.cpp csrc/gemm/operands.cpp csrc/gemm/sm80/arch.cpp
  csrc/gemm/sm89/arch.cpp csrc/gemm/sm90/arch.cpp)
if(NOT SPARSE24_WITH_CUDA AND TARGET gemm_config_test)
  target_sources(gemm_config_test PRIVATE ${gemm_config})
endif()

if(SPARSE24_WITH_CUDA)
  file(GLOB gpu_test_sources CONFIGURE_DEPENDS tests/cpp/*_gpu_test.cu)
  foreach(source ${gpu_test_sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_link_libraries(${name} PRIVATE sparse24_test_objects sparse24_cuda_options)
    target_include_directories(${name} SYSTEM PRIVATE ${cutlass_include})
    # Plain kernels of a test round as those of the library do (CudaTargets.cmake).
    target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false> "${for_kernels}")
    set_target_properties(${name} PROPERTIES JOB_POOL_COMPILE gemm)
    add_test(NAME ${name} COMMAND ${name})
    set_tests_properties(${name} PROPERTIES LABELS gpu SKIP_RETURN_CODE 77)  # 77: no GPU here
  endforeach()

  # Kernels for older GPUs beside CUTLASS' and cuBLAS'; built by name alone, as CUTLASS' take minutes.
  if(gemm_sm80_sources)
    foreach(pass 0 1 2)
      set(name gemm_sm80_bench_${pass})
      add_executable(${name} EXCLUDE_FROM_ALL tests/cpp/gemm_sm80_bench.cu)
      target_link_libraries(${name} PRIVATE sparse24_test_objects sparse24_cuda_options ${CMAKE_DL_LIBS})
      target_include_directories(${name} SYSTEM PRIVATE ${cutlass_include})
      target_compile_definitions(${name} PRIVATE SP24_BENCH_PASS=${pass})
      target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${mma_sp_gencode}>")
    endforeach()
  endif()
endif()
