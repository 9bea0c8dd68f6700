// What the files of the null device share: the facts of the GPU it says to be, its counts, its memory.
#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stddef.h>

// --- the GPU it says to be: an H100 SXM of 80 GB ---------------------------------------------------------

#define NULL_NAME "NVIDIA H100 80GB HBM3"
#define NULL_BYTES 85017624576UL    // of its memory
#define NULL_RESERVED 500000000UL   // of these the context's, before anything is allocated
#define NULL_CUDA_VERSION CUDA_VERSION  // of the headers, which are those of the torch it is built for

int null_devices(void);          // NULL_CUDA_DEVICES, 1 if unset; as many of them as CUDA_VISIBLE_DEVICES lists
int null_attribute(int number);  // of CUdevice_attribute or cudaDeviceAttr, which number alike; 0 if unknown

// --- counts ------------------------------------------------------------------------------------------------

// Kinds: "launch" a kernel or a call of a library that starts some; "memset"; "copy"; "wait" of the host for the
// device; "event" recorded or waited for on the device; "allocation".
void null_count(const char *kind, const char *name);

// Say on stderr, once for each name, that a function is not there; the value to return, an error of every library
int null_refuse(const char *name);

// --- memory --------------------------------------------------------------------------------------------------

#define NULL_HOST (-1)  // in place of a device: pinned memory

// Page-aligned memory, or NULL if that device is full. That of a device can be neither read nor written
void *null_allocate(size_t bytes, int device);
void null_free(void *start);
// What holds this address: a device, NULL_HOST, or -2 for memory that is not ours
int null_owner(const void *address);
size_t null_used(int device);

// Copy as far as there is something to copy: what comes from a device is zero, but for what the host has just put
// there; null_forget when a kernel may have written over that
void null_forget(void);
enum null_direction { NULL_UNKNOWN, NULL_TO_DEVICE, NULL_TO_HOST, NULL_WITHIN_DEVICE, NULL_WITHIN_HOST };
void null_copy(void *to, const void *from, size_t bytes, enum null_direction direction);

#endif
