/* Keeps a virtual machine's free memory from going back to its host while a benchmark runs.
 *
 * With free-page reporting the host takes back free blocks of 2 MiB, and whoever touches them next waits for it (0.4 to
 * 0.9 GB/s, measured): a contender then pays for what the one before it freed. This touches most of the memory once and
 * frees it again but for one page in every MiB, so that no free block of 2 MiB exists. The pages lie in pipes, where
 * compaction cannot move them.
 *
 *     cc -O2 steady.c -o steady && ./steady        prints "ready", then holds until it is killed; wants root for many pipes */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { STEP = 1 << 20, PAGE = 4096, SLOTS = 256 };

int main(void) {
    char line[256];
    size_t available = 0;
    FILE *info = fopen("/proc/meminfo", "r");
    while (info && fgets(line, sizeof line, info)) sscanf(line, "MemAvailable: %zu kB", &available);
    size_t size = available * 1024 / 100 * 92 / STEP * STEP;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) { perror("mmap"); return 1; }
    madvise(memory, size, MADV_NOHUGEPAGE);
    for (size_t at = 0; at < size; at += PAGE) memory[at] = 1;
    int ends[2], held = SLOTS;
    for (size_t at = 0; at < size; at += STEP) {
        if (held == SLOTS) {
            if (pipe(ends) || fcntl(ends[1], F_SETPIPE_SZ, SLOTS * PAGE) < SLOTS * PAGE) { perror("pipe"); return 1; }
            held = 0;
        }
        struct iovec page = {memory + at, PAGE};
        if (vmsplice(ends[1], &page, 1, 0) != PAGE) { perror("vmsplice"); return 1; }
        held++;
    }
    munmap(memory, size);
    puts("ready");
    fflush(stdout);
    for (;;) pause();
}
