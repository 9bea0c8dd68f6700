// Memory of the device: addresses without anything behind them. Whoever follows one on the host is killed by the
// system, as he would be with a real device; the sizes are kept, so that a device can be full.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "null.h"

typedef struct {
  char *start;
  size_t bytes;
  int owner;  // a device, or NULL_HOST
} Block;

#define DEVICES 16
static Block *blocks;
static size_t num_blocks, room;
static size_t used[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int null_devices(void) {
  const char *wanted = getenv("NULL_CUDA_DEVICES");
  int devices = wanted ? atoi(wanted) : 1;
  devices = devices < 1 ? 0 : devices > DEVICES ? DEVICES : devices;
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");  // of the launcher: which does not matter, they are alike
  if (!visible) return devices;
  int listed = *visible && *visible != '-';
  for (const char *c = visible; listed && *c; c++) listed += *c == ',';
  return listed < devices ? listed : devices;
}

void *null_allocate(size_t bytes, int device) {
  bytes = bytes ? bytes : 1;
  pthread_mutex_lock(&lock);
  char *start = NULL;
  if (device == NULL_HOST || used[device] + bytes <= NULL_BYTES - NULL_RESERVED) {
    int access = device == NULL_HOST ? PROT_READ | PROT_WRITE : PROT_NONE;
    start = mmap(NULL, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) start = NULL;
  }
  if (start) {
    if (num_blocks == room) blocks = realloc(blocks, (room = room ? 2 * room : 256) * sizeof *blocks);
    blocks[num_blocks++] = (Block){start, bytes, device};
    if (device != NULL_HOST) used[device] += bytes;
  }
  pthread_mutex_unlock(&lock);
  if (start) null_count("allocation", device == NULL_HOST ? "pinned memory" : "device memory");
  return start;
}

void null_free(void *start) {
  pthread_mutex_lock(&lock);
  for (size_t i = num_blocks; i-- > 0;) {  // the youngest go first
    Block block = blocks[i];
    if (block.start != start) continue;
    if (block.owner != NULL_HOST) used[block.owner] -= block.bytes;
    munmap(block.start, block.bytes);
    blocks[i] = blocks[--num_blocks];
    break;
  }
  pthread_mutex_unlock(&lock);
}

int null_owner(const void *address) {
  int owner = -2;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < num_blocks && owner == -2; i++) {
    const char *start = blocks[i].start;
    if ((const char *)address >= start && (const char *)address < start + blocks[i].bytes) owner = blocks[i].owner;
  }
  pthread_mutex_unlock(&lock);
  return owner;
}

// --- what the host has just put there -------------------------------------------------------------------------------

// A small copy from the host can be read again until a kernel runs, which may have written over it: so ranks agree
// on lists of numbers, by a copy, a collective and a copy back.
typedef struct {
  const char *to;
  size_t bytes;
  char *value;
} Fresh;

#define FRESH 16
#define FRESH_BYTES (1 << 16)
static Fresh fresh[FRESH];
static int num_fresh;

void null_forget(void) { __atomic_store_n(&num_fresh, 0, __ATOMIC_RELAXED); }

static void remember(void *to, const void *from, size_t bytes) {
  if (bytes > FRESH_BYTES) return;
  pthread_mutex_lock(&lock);
  Fresh *slot = &fresh[num_fresh % FRESH];
  num_fresh = num_fresh % FRESH + 1;
  if (!slot->value) slot->value = malloc(FRESH_BYTES);
  slot->to = to;
  slot->bytes = bytes;
  memcpy(slot->value, from, bytes);
  pthread_mutex_unlock(&lock);
}

static int recall(void *to, const void *from, size_t bytes) {
  int found = 0;
  pthread_mutex_lock(&lock);
  for (int i = num_fresh; i-- > 0 && !found;) {  // the youngest holds
    const char *start = fresh[i].to;
    found = (const char *)from >= start && (const char *)from + bytes <= start + fresh[i].bytes;
    if (found) memcpy(to, fresh[i].value + ((const char *)from - start), bytes);
  }
  pthread_mutex_unlock(&lock);
  return found;
}

size_t null_used(int device) { return used[device]; }

void null_copy(void *to, const void *from, size_t bytes, enum null_direction direction) {
  if (direction == NULL_UNKNOWN) {
    int source = null_owner(from) >= 0, target = null_owner(to) >= 0;
    direction = source ? (target ? NULL_WITHIN_DEVICE : NULL_TO_HOST)
                       : (target ? NULL_TO_DEVICE : NULL_WITHIN_HOST);
  }
  switch (direction) {
    case NULL_TO_HOST:
      // Nothing was computed: whatever a kernel would have written is zero, which is finite and the same in every run
      if (!recall(to, from, bytes)) memset(to, 0, bytes);
      null_count("copy", "device to host");
      break;
    case NULL_WITHIN_HOST:
      memcpy(to, from, bytes);
      break;
    case NULL_TO_DEVICE:
      remember(to, from, bytes);
      null_count("copy", "host to device");
      break;
    default:
      null_count("copy", "within the device");
  }
}
