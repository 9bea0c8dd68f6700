// The runtime's interface, libcudart.so: what torch's own kernels are registered and launched with, its memory,
// streams and events. All that is asked of the device is done at once, for there is nothing to do.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "null.h"

// --- kernels: registered when torch's libraries are loaded, by the address of their stub on the host -------

typedef struct {
  const void *stub;
  const char *name;
} Kernel;

#define SLOTS (1UL << 18)  // torch registers some forty thousand
static Kernel *kernels;

static Kernel *slot_of(const void *stub) {
  if (!kernels) kernels = calloc(SLOTS, sizeof *kernels);  // by the loader, before there are threads
  unsigned long i = ((unsigned long)stub >> 4) % SLOTS;
  while (kernels[i].stub && kernels[i].stub != stub) i = (i + 1) % SLOTS;
  return &kernels[i];
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle[1]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 0; }
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes,
                       int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *stub, char *function, const char *name, int limit, uint3 *tid,
                            uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
  static unsigned long registered;
  if (++registered > SLOTS / 2) {
    fputs("null CUDA device: more kernels than its table holds\n", stderr);
    abort();
  }
  *slot_of(stub) = (Kernel){stub, name};
}

static cudaError_t launch(const void *stub) {
  const char *name = slot_of(stub)->name;
  null_count("launch", name ? name : "a kernel that nobody registered");
  return cudaSuccess;
}

typedef struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} Configuration;
static __thread Configuration pushed;  // between <<<...>>> and the launch that it is for

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  pushed = (Configuration){grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void **)stream = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) { *kernel = (cudaKernel_t)stub; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(stub);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *stub, void **arguments) {
  return launch(stub);
}
cudaError_t cudaLaunchCooperativeKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
  return launch(stub);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *stub, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *stub, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *stub, int threads, size_t shared) {
  *blocks = 2;
  return cudaSuccess;
}

// --- devices -------------------------------------------------------------------------------------------------

static __thread int current;
static __thread cudaError_t last_error;  // of this thread, until it is read

int null_current_device(void) { return current; }

cudaError_t cudaGetDeviceCount(int *count) { *count = null_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= null_devices()) return last_error = cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = NULL_CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = NULL_CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = null_attribute(attribute);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, NULL_NAME);
  p->totalGlobalMem = NULL_BYTES;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->sharedMemPerBlock = null_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = null_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = null_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = null_attribute(cudaDevAttrMaxRegistersPerBlock);
  p->regsPerMultiprocessor = null_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->warpSize = null_attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = null_attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = null_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = null_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->multiProcessorCount = null_attribute(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = null_attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = null_attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->major = null_attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = null_attribute(cudaDevAttrComputeCapabilityMinor);
  p->unifiedAddressing = 1;
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = null_attribute(cudaDevAttrMaxBlockDimX + i);
    p->maxGridSize[i] = null_attribute(cudaDevAttrMaxGridDimX + i);
  }
  p->pciBusID = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { null_count("wait", "cudaDeviceSynchronize"); return cudaSuccess; }

cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "refused by the null CUDA device";
  }
}
const char *cudaGetErrorName(cudaError_t error) { return error ? "nullCudaError" : "cudaSuccess"; }

static cudaError_t entry_point(const char *name, void **function, enum cudaDriverEntryPointQueryResult *found) {
  char versioned[256];
  snprintf(versioned, sizeof versioned, "%s_v2", name);  // as the headers name the newer of two
  *function = dlsym(RTLD_DEFAULT, versioned);
  if (!*function) *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  return entry_point(name, function, found);
}
#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *found) {
  return entry_point(name, function, found);
}
#endif

// --- memory ----------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void **address, size_t bytes) {
  *address = null_allocate(bytes, current);
  return *address ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *address) { null_free(address); return cudaSuccess; }
cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) { return cudaMalloc(address, bytes); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  *address = null_allocate(bytes, NULL_HOST);
  return *address ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void **address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }
cudaError_t cudaFreeHost(void *address) { null_free(address); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = NULL_BYTES;
  *available = NULL_BYTES - NULL_RESERVED - null_used(current);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  int owner = null_owner(address);
  memset(a, 0, sizeof *a);
  a->type = owner >= 0 ? cudaMemoryTypeDevice : owner == NULL_HOST ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = owner >= 0 ? owner : 0;
  a->devicePointer = owner == -2 ? NULL : (void *)address;
  a->hostPointer = owner == NULL_HOST ? (void *)address : NULL;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  static void *variables;  // of all kernels: none is ever read
  if (!variables) variables = null_allocate(1 << 16, current);
  *address = variables;
  return cudaSuccess;
}

static enum null_direction direction_of(enum cudaMemcpyKind kind) {
  switch (kind) {
    case cudaMemcpyHostToDevice: return NULL_TO_DEVICE;
    case cudaMemcpyDeviceToHost: return NULL_TO_HOST;
    case cudaMemcpyDeviceToDevice: return NULL_WITHIN_DEVICE;
    case cudaMemcpyHostToHost: return NULL_WITHIN_HOST;
    default: return NULL_UNKNOWN;
  }
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  null_copy(to, from, bytes, direction_of(kind));
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDeviceToDevice) null_count("wait", "cudaMemcpy");
  return cudaMemcpyAsync(to, from, bytes, kind, 0);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t bytes, cudaStream_t s) {
  null_copy(to, from, bytes, NULL_WITHIN_DEVICE);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
  null_count("memset", "memset");
  return cudaSuccess;
}
cudaError_t cudaMemset(void *address, int value, size_t bytes) { return cudaMemsetAsync(address, value, bytes, 0); }

// --- streams and events: handles are numbers, and every interval lasts a millisecond ----------------------------

static void *handle(void) {
  static unsigned long last = 0x10000;
  return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = handle();
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  null_count("wait", "cudaStreamSynchronize");
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  null_count("event", "a stream waits for an event");
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *n) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                        unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                        size_t *n) {
#endif
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return last_error = null_refuse("cudaStreamBeginCapture");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  null_count("event", "an event is recorded");
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { null_count("wait", "cudaEventSynchronize"); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1.0f; return cudaSuccess; }
