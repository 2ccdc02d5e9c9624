/* Preloaded into the processes of a fault experiment: files whose writing fails, and another time of day.
 *
 * `struct control` lies in a file that the experiment maps too, named by VPMOE_FAULTS_CONTROL; see disturb.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_ns;   /* added to the time of day */
    int32_t error;      /* errno of what fails; 0: nothing does */
    int32_t spare;      /* matching calls that still succeed */
    int32_t hits;       /* calls that failed */
    char pattern[236];  /* glob over absolute paths; `*` goes over slashes */
};
static struct control nothing, *control = &nothing;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("VPMOE_FAULTS_CONTROL");
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (mapped != MAP_FAILED) control = mapped;
}

static int fails(const char *path) {
    if (!control->error || !path || fnmatch(control->pattern, path, 0)) return 0;
    if (__atomic_fetch_sub(&control->spare, 1, __ATOMIC_SEQ_CST) > 0) return 0;
    __atomic_fetch_add(&control->hits, 1, __ATOMIC_SEQ_CST);
    errno = control->error;
    return 1;
}

static int fails_at(int directory, const char *path) {
    if (!control->error || !path) return 0;
    if (path[0] == '/') return fails(path);
    char base[PATH_MAX], link[64], whole[2 * PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return fails(whole);
}

static int fails_in(int descriptor) {
    if (!control->error) return 0;
    char path[PATH_MAX], link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        static int (*next)(const char *, int, ...); \
        if (!next) next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, int); va_end(rest); \
        if ((flags & O_CREAT) && fails_at(AT_FDCWD, path)) return -1; \
        return next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        static int (*next)(int, const char *, int, ...); \
        if (!next) next = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, int); va_end(rest); \
        if ((flags & O_CREAT) && fails_at(directory, path)) return -1; \
        return next(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *content, size_t size) {
    NEXT(write);
    return fails_in(descriptor) ? -1 : next(descriptor, content, size);
}
ssize_t pwrite(int descriptor, const void *content, size_t size, off_t offset) {
    NEXT(pwrite);
    return fails_in(descriptor) ? -1 : next(descriptor, content, size, offset);
}
ssize_t pwrite64(int descriptor, const void *content, size_t size, off64_t offset) {
    NEXT(pwrite64);
    return fails_in(descriptor) ? -1 : next(descriptor, content, size, offset);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    NEXT(writev);
    return fails_in(descriptor) ? -1 : next(descriptor, parts, count);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    NEXT(sendfile);
    return fails_in(to) ? -1 : next(to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    NEXT(sendfile64);
    return fails_in(to) ? -1 : next(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *offset, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    return fails_in(to) ? -1 : next(from, at, to, offset, size, flags);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return fails_at(AT_FDCWD, path) ? -1 : next(path, mode);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int result = next(clock, now);
    if (!result && control->clock_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t whole = now->tv_sec * 1000000000LL + now->tv_nsec + control->clock_ns;
        now->tv_sec = whole / 1000000000LL;
        now->tv_nsec = whole % 1000000000LL;
    }
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    NEXT(gettimeofday);
    int result = next(now, zone);
    if (!result && now) now->tv_sec += control->clock_ns / 1000000000LL;
    return result;
}
time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
