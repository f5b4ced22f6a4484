/* The floor: what reading two checkpoints and writing one costs without any arithmetic. Two threads, 256 KiB buffers.
 *
 *     cc -O3 -pthread floor.c -o floor && ./floor OUT BASE/*.safetensors -- TUNED/*.safetensors
 *
 * With no files after `--`: a copy. Files are taken in pairs; every byte of both is read, base's bytes are written. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { THREADS = 2, BUFFER = 256 << 10 };

static char **base_files, **tuned_files;
static int files, next_file;
static const char *folder;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what) { perror(what); exit(1); }

static void one_file(const char *base, const char *tuned, char *left, char *right) {
    char name[4096];
    const char *slash = strrchr(base, '/');
    snprintf(name, sizeof name, "%s/%s", folder, slash ? slash + 1 : base);
    int in = open(base, O_RDONLY), other = tuned ? open(tuned, O_RDONLY) : -1;
    int out = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (in < 0 || out < 0 || (tuned && other < 0)) fail(base);
    for (off_t at = 0;;) {
        ssize_t got = pread(in, left, BUFFER, at);
        if (got < 0) fail(base);
        if (got == 0) break;
        if (tuned && pread(other, right, got, at) < 0) fail(tuned);
        if (pwrite(out, left, got, at) != got) fail(name);
        at += got;
    }
    close(in); close(out);
    if (other >= 0) close(other);
}

static void *work(void *unused) {
    char *left = malloc(BUFFER), *right = malloc(BUFFER);
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        int mine = next_file++;
        pthread_mutex_unlock(&lock);
        if (mine >= files) break;
        one_file(base_files[mine], tuned_files ? tuned_files[mine] : NULL, left, right);
    }
    free(left); free(right);
    return NULL;
}

int main(int argc, char **argv) {
    int split = 2;
    while (split < argc && strcmp(argv[split], "--") != 0) split++;
    folder = argv[1];
    base_files = argv + 2;
    files = split - 2;
    if (split + 1 < argc) tuned_files = argv + split + 1;
    mkdir(folder, 0777);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    return 0;
}
