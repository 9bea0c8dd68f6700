// What of cuBLAS, cuDNN, NCCL and CUPTI must give a value. Their other functions are made by build.py: those that
// start work are counted, those that only keep handles do nothing.
#include <cuda.h>
#include <cudnn_version.h>
#include <string.h>

#include "null.h"

#define HANDLE ((void *)0x7000)

// --- cuBLAS ----------------------------------------------------------------------------------------------------

int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetVersion_v2(void *handle, int *version) { *version = CUDA_VERSION * 10; return 0; }
size_t cublasLtGetVersion(void) { return CUDA_VERSION * 10; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  *found = 1;  // the caller's own zeros: an algorithm that needs no workspace
  return 0;
}

// --- cuDNN: the version of the headers, so that torch accepts it; torch is told not to use it (build.py) ---------

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
int cudnnGetProperty(int which, int *value) {  // major, minor, patch
  *value = which == 0 ? CUDNN_MAJOR : which == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return 0;
}
size_t cudnnGetCudartVersion(void) { return CUDA_VERSION; }
const char *cudnnGetErrorString(int status) { return "refused by the null CUDA device"; }

// --- NCCL: ranks meet elsewhere; what they exchange is garbage like everything on the device -----------------------

int ncclGetVersion(int *version) { *version = NULL_NCCL_VERSION; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 0, 128); return 0; }
int ncclCommInitRank(void **comm, int ranks, ...) { *comm = HANDLE; return 0; }
int ncclCommInitRankConfig(void **comm, int ranks, ...) { *comm = HANDLE; return 0; }
int ncclCommInitRankScalable(void **comm, int ranks, ...) { *comm = HANDLE; return 0; }
int ncclCommSplit(void *comm, int color, int key, void **split, void *config) { *split = HANDLE; return 0; }
int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "refused by the null CUDA device"; }
const char *ncclGetLastError(void *comm) { return "none"; }

// --- CUPTI: a profiler that sees nothing -----------------------------------------------------------------------------

int cuptiGetVersion(unsigned *version) { *version = 130000; return 0; }
int cuptiGetResultString(int result, const char **words) { *words = "refused by the null CUDA device"; return 0; }
int cuptiActivityGetNextRecord(unsigned char *buffer, size_t bytes, void **record) { return 12; }  // no more
int cuptiActivityGetNumDroppedRecords(void *context, unsigned stream, size_t *dropped) { *dropped = 0; return 0; }
