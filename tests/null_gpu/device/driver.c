// The driver's interface, libcuda.so.1: what torch looks up by name, what Triton and Inductor launch with.
#define _GNU_SOURCE
#include <ctype.h>
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "null.h"

#define CONTEXT ((CUcontext)0x1000)  // of whatever device: nobody looks behind it

int null_attribute(int number) {
  switch (number) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;         // kHz
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;  // kHz
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 52428800;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    default: return 0;
  }
}

// --- devices and contexts ----------------------------------------------------------------------------------

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = NULL_CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = null_devices(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  strncpy(name, NULL_NAME, length);
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = NULL_BYTES; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = null_attribute(attribute);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { if (context) *context = CONTEXT; return CUDA_SUCCESS; }
int null_current_device(void);  // runtime.c
CUresult cuCtxGetDevice(CUdevice *device) { *device = null_current_device(); return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **words) { *words = "refused by the null CUDA device"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) { *name = "nullCudaError"; return CUDA_SUCCESS; }

// --- modules: a function is its name, behind the Python file that it is compiled from --------------------------

// The size of a cubin, an ELF file: it ends with its section headers
static size_t image_bytes(const unsigned char *image) {
  if (memcmp(image, "\177ELF", 4)) return 0;
  unsigned long headers = *(const unsigned long *)(image + 40);
  unsigned short each = *(const unsigned short *)(image + 58), count = *(const unsigned short *)(image + 60);
  return headers + (size_t)each * count;
}

// "add_layer_norm.py" of the line table that Triton writes, "" without one. Ops call their kernels alike, so
// that the name of the kernel alone would not tell them apart
static char *source_of(const unsigned char *image) {
  size_t bytes = image_bytes(image);
  const unsigned char *end = bytes ? memmem(image, bytes, ".py", 4) : NULL;
  if (!end) return strdup("");
  const unsigned char *start = end;
  while (start > image && (start[-1] == '_' || isalnum(start[-1]))) start--;
  return strndup((const char *)start, end + 3 - start);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { *module = (CUmodule)strdup(""); return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)source_of(image);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule module) { free(module); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  // Inductor's names say what is in them, and its files are called by a hash
  const char *source = strncmp(name, "triton_", 7) ? (const char *)module : "";
  char *whole = malloc(strlen(source) + strlen(name) + 2);  // kept as long as the process lives
  sprintf(whole, "%s%s%s", source, *source ? ":" : "", name);
  *function = (CUfunction)whole;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
  *blocks = 2;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
CUresult cuLinkCreate(unsigned n, CUjit_option *options, void **values, CUlinkState *state) {
  *state = (CUlinkState)0x2100;
  return CUDA_SUCCESS;
}
CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t bytes, const char *name, unsigned n,
                       CUjit_option *options, void **values) {
  return CUDA_SUCCESS;
}
CUresult cuLinkComplete(CUlinkState state, void **cubin, size_t *bytes) {
  static char nothing[1];
  *cubin = nothing;
  *bytes = 0;
  return CUDA_SUCCESS;
}

// --- launches ----------------------------------------------------------------------------------------------

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  null_count("launch", (const char *)function);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  null_count("launch", (const char *)function);
  return CUDA_SUCCESS;
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                   unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments) {
  null_count("launch", (const char *)function);
  return CUDA_SUCCESS;
}

// --- memory and streams ------------------------------------------------------------------------------------

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  int owner = null_owner((const void *)address);
  if (owner == -2) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)data = address; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = owner < 0 ? 0 : owner; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned *)data = owner == NULL_HOST ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    default: return null_refuse("cuPointerGetAttribute of another attribute");
  }
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t *available, size_t *total) {
  *total = NULL_BYTES;
  *available = NULL_BYTES - NULL_RESERVED - null_used(null_current_device());
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) { null_count("wait", "cuStreamSynchronize"); return CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { null_count("wait", "cuCtxSynchronize"); return CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent event) { null_count("wait", "cuEventSynchronize"); return CUDA_SUCCESS; }
