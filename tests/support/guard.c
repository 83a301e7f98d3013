// An allocator for LD_PRELOAD that ends the process at the first access out of bounds.
//
// Aligned memory is what tensors and oneDNN's workspaces are made of. Each piece gets pages of its
// own between two that nobody may touch, is full of NaN at first, and lies against the page behind
// it or, one in four, against the page before it. What is left of its pages has a pattern, which
// free looks at. Freed pages are never used again.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void __libc_free(void*);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_malloc(size_t);

enum { PAGE = 4096, PATTERN = 0xA5 };
static const size_t ARENA = (size_t)8 << 40;  // addresses only: untouched pages take no memory
static _Atomic(uintptr_t) arena, next;
static _Atomic unsigned count;

// In the first of the pages of a piece: header, guard, data…, guard.
typedef struct {
  char *start, *data;
  size_t pages, size;
} Header;

static void die(const char* message) {
  (void)!write(2, message, strlen(message));
  abort();
}

static size_t pages_of(size_t size) { return (size + PAGE - 1) / PAGE; }

static uintptr_t reserve(size_t size) {
  uintptr_t base = atomic_load(&arena);
  if (base == 0) {
    void* fresh =
        mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) die("guard: no address space\n");
    if (atomic_compare_exchange_strong(&arena, &base, (uintptr_t)fresh)) {
      atomic_store(&next, (uintptr_t)fresh);
    } else {
      munmap(fresh, ARENA);
    }
    while (atomic_load(&next) == 0) {
    }
  }
  return atomic_fetch_add(&next, size);
}

static int ours(const void* p) {
  uintptr_t base = atomic_load(&arena), address = (uintptr_t)p;
  return base != 0 && address >= base && address < base + ARENA;
}

static Header* header_of(const void* p) {
  return (Header*)(((uintptr_t)p & ~(uintptr_t)(PAGE - 1)) - 2 * PAGE);
}

static void* allocate(size_t alignment, size_t size) {
  if (alignment < sizeof(void*)) alignment = sizeof(void*);
  size_t pages = pages_of(size ? size : 1), extra = alignment > PAGE ? alignment : 0;
  uintptr_t base = reserve((pages + 3) * PAGE + extra);
  uintptr_t data = base + 2 * PAGE;
  if (extra) data = (data + alignment - 1) / alignment * alignment;
  char* start = (char*)data;
  if (mprotect(start - 2 * PAGE, PAGE, PROT_READ | PROT_WRITE) ||
      mprotect(start, pages * PAGE, PROT_READ | PROT_WRITE)) {
    die("guard: no memory\n");
  }
  int against_end = atomic_fetch_add(&count, 1) % 4 != 3;
  size_t offset = against_end ? (pages * PAGE - size) / alignment * alignment : 0;
  if (offset >= PAGE) offset = 0;
  char* p = start + offset;
  memset(start, PATTERN, pages * PAGE);
  memset(p, 0xFF, size);
  *header_of(start) = (Header){start, p, pages, size};
  return p;
}

static void release(void* p) {
  Header h = *header_of(p);
  if (h.data != p) die("guard: free of what was not allocated\n");
  for (char* c = h.start; c < h.start + h.pages * PAGE; ++c) {
    if (c == h.data) c += h.size;
    if (c == h.start + h.pages * PAGE) break;
    if ((unsigned char)*c != PATTERN) die("guard: written out of bounds\n");
  }
  char* first = h.start - 2 * PAGE;
  if (mmap(first, (h.pages + 2) * PAGE, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
    die("guard: cannot take pages back\n");
  }
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = allocate(alignment, size);
  return 0;
}

void* memalign(size_t alignment, size_t size) { return allocate(alignment, size); }

void* aligned_alloc(size_t alignment, size_t size) { return allocate(alignment, size); }

void free(void* p) {
  int saved = errno;
  if (ours(p)) {
    release(p);
  } else {
    __libc_free(p);
  }
  errno = saved;
}

void* realloc(void* p, size_t size) {
  if (!ours(p)) return __libc_realloc(p, size);
  size_t old = header_of(p)->size;
  void* fresh = __libc_malloc(size);
  memcpy(fresh, p, old < size ? old : size);
  release(p);
  return fresh;
}
