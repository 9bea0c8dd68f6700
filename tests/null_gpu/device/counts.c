// Counts by kind and name, and how a program reads them:
//
//     null_cuda_reset()        start again from zero
//     null_cuda_dump(path)     write them, a line each: count, tab, kind, tab, name
//     NULL_CUDA_COUNTS=folder  every process that used the device writes folder/PID.tsv when it ends
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "null.h"

typedef struct {
  const char *kind;
  char *name;
  long count;
} Row;

#define SLOTS 65536  // of the table, a power of two; torch has some ten thousand kernels
static Row rows[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Row *row_of(const char *kind, const char *name) {
  unsigned long hash = 5381;
  for (const char *c = kind; *c; c++) hash = hash * 33 + (unsigned char)*c;
  for (const char *c = name; *c; c++) hash = hash * 33 + (unsigned char)*c;
  for (unsigned long i = hash % SLOTS, tries = 0; tries < SLOTS; i = (i + 1) % SLOTS, tries++) {
    if (!rows[i].name) {
      rows[i].kind = kind;  // a literal
      rows[i].name = strdup(name);
      return &rows[i];
    }
    if (!strcmp(rows[i].name, name) && !strcmp(rows[i].kind, kind)) return &rows[i];
  }
  fputs("null CUDA device: more names than its table holds\n", stderr);
  abort();
}

void null_count(const char *kind, const char *name) {
  bool collective = !strncmp(name, "nccl", 4);  // of one rank: what it is given it gives
  if ((!strcmp(kind, "launch") && !collective) || !strcmp(kind, "memset")) null_forget();
  pthread_mutex_lock(&lock);
  row_of(kind, name)->count++;
  pthread_mutex_unlock(&lock);
}

int null_refuse(const char *name) {
  pthread_mutex_lock(&lock);
  Row *row = row_of("refused", name);
  if (row->count++ == 0) fprintf(stderr, "null CUDA device: %s is not implemented\n", name);
  pthread_mutex_unlock(&lock);
  return 801;  // cudaErrorNotSupported; of the other libraries just not zero
}

void null_cuda_reset(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < SLOTS; i++) rows[i].count = 0;
  pthread_mutex_unlock(&lock);
}

int null_cuda_dump(const char *path) {
  FILE *file = fopen(path, "w");
  if (!file) return 1;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < SLOTS; i++)
    if (rows[i].count) fprintf(file, "%ld\t%s\t%s\n", rows[i].count, rows[i].kind, rows[i].name);
  pthread_mutex_unlock(&lock);
  return fclose(file);
}

__attribute__((destructor)) static void dump_at_exit(void) {
  const char *folder = getenv("NULL_CUDA_COUNTS");
  bool used = false;
  for (int i = 0; i < SLOTS && !used; i++) used = rows[i].count > 0;
  if (!folder || !used) return;  // the shells and compilers that a run starts have nothing to say
  char path[4096];
  snprintf(path, sizeof path, "%s/%d.tsv", folder, (int)getpid());
  null_cuda_dump(path);
}
