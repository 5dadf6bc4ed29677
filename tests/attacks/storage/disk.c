/* A disk that fails as it is told: loaded into the server before libc (LD_PRELOAD), it looks at
 * every call that changes files below one directory and lets some of them fail.
 *
 * What it does is read from a file that the test maps as well: see struct control, which disk.rs
 * writes at the same offsets. It never fails a read, and never a file elsewhere.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    uint32_t kind;   /* one of the kinds below */
    uint32_t skip;   /* calls that would fail, and are let through first */
    int64_t left;    /* failures still to come; negative: no end */
    uint64_t failed; /* failures so far */
    char only[64];   /* only paths that contain this */
};

enum { NONE, FULL, WRITE_ERROR, SYNC_ERROR, READ_ONLY, KILL };
enum { GROWS = 1, WRITES = 2, SYNCS = 4, CHANGES = 8 };

static struct control *control;
static char root[PATH_MAX];
static size_t root_length;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("POLYLORA_TEST_DISK"), *dir = getenv("POLYLORA_TEST_DIR");
    if (!file || !dir || !realpath(dir, root)) return;
    root_length = strlen(root);
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) control = at;
    close(fd);
}

/* Whether this call on `path` fails; errno says how. */
static int fails(const char *path, int does) {
    if (!control || strncmp(path, root, root_length) != 0) return 0;
    uint32_t kind = __atomic_load_n(&control->kind, __ATOMIC_ACQUIRE);
    int error = 0;
    if (kind == FULL && (does & (GROWS | WRITES))) error = ENOSPC;
    if (kind == WRITE_ERROR && (does & WRITES)) error = EIO;
    if (kind == SYNC_ERROR && (does & SYNCS)) error = EIO;
    if (kind == READ_ONLY && (does & (GROWS | WRITES | CHANGES))) error = EROFS;
    if (kind == KILL && does) error = EIO;
    if (!error || (control->only[0] && !strstr(path, control->only))) return 0;
    uint32_t skip = __atomic_load_n(&control->skip, __ATOMIC_ACQUIRE);
    while (skip > 0)
        if (__atomic_compare_exchange_n(&control->skip, &skip, skip - 1, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
            return 0;
    if (kind == KILL) raise(SIGKILL);
    int64_t left = __atomic_load_n(&control->left, __ATOMIC_ACQUIRE);
    do {
        if (left == 0) return 0;
        if (left < 0) break;
    } while (!__atomic_compare_exchange_n(&control->left, &left, left - 1, 0, __ATOMIC_ACQ_REL,
                                          __ATOMIC_ACQUIRE));
    __atomic_add_fetch(&control->failed, 1, __ATOMIC_ACQ_REL);
    errno = error;
    return 1;
}

static int fd_fails(int fd, int does) {
    char link[64], path[PATH_MAX];
    if (!control || control->kind == NONE) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path, does);
}

/* A path as it is given; one relative to `dir` is put after it. */
static int at_fails(int dir, const char *path, int does) {
    char link[64], whole[2 * PATH_MAX];
    if (!control || control->kind == NONE) return 0;
    if (path[0] == '/') return fails(path, does);
    if (dir == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, whole, PATH_MAX - 1);
    if (n < 0) return 0;
    snprintf(whole + n, sizeof whole - n, "/%s", path);
    return fails(whole, does);
}

static int open_does(int dir, const char *path, int flags) {
    if ((flags & O_CREAT) && faccessat(dir, path, F_OK, 0) != 0) return GROWS | CHANGES;
    return (flags & O_ACCMODE) == O_RDONLY ? 0 : CHANGES;
}

/* What is there already is said to be so by any disk. */
static int mkdir_does(int dir, const char *path) {
    return faccessat(dir, path, F_OK, 0) == 0 ? 0 : GROWS | CHANGES;
}

#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define MODE                                                                                       \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        mode = va_arg(list, mode_t);                                                               \
        va_end(list);                                                                              \
    }

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        MODE REAL(int, name, const char *, int, ...);                                              \
        if (at_fails(AT_FDCWD, path, open_does(AT_FDCWD, path, flags))) return -1;                 \
        return real(path, flags, mode);                                                            \
    }
#define OPENAT(name)                                                                               \
    int name(int dir, const char *path, int flags, ...) {                                          \
        MODE REAL(int, name, int, const char *, int, ...);                                         \
        if (at_fails(dir, path, open_does(dir, path, flags))) return -1;                           \
        return real(dir, path, flags, mode);                                                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define ON_FD(type, name, does, params, args)                                                      \
    type name params {                                                                             \
        static type(*real) params;                                                                 \
        if (!real) real = (type(*) params)dlsym(RTLD_NEXT, #name);                                 \
        if (fd_fails(fd, does)) return -1;                                                         \
        return real args;                                                                          \
    }
ON_FD(ssize_t, write, WRITES, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(ssize_t, writev, WRITES, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(ssize_t, pwrite, WRITES, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(ssize_t, pwrite64, WRITES, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(ssize_t, sendfile, WRITES, (int fd, int f, off_t *o, size_t n), (fd, f, o, n))
ON_FD(ssize_t, sendfile64, WRITES, (int fd, int f, off64_t *o, size_t n), (fd, f, o, n))
ON_FD(int, ftruncate, WRITES, (int fd, off_t n), (fd, n))
ON_FD(int, ftruncate64, WRITES, (int fd, off64_t n), (fd, n))
ON_FD(int, fsync, SYNCS, (int fd), (fd))
ON_FD(int, fdatasync, SYNCS, (int fd), (fd))

ssize_t copy_file_range(int from, off64_t *f, int fd, off64_t *o, size_t n, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    if (fd_fails(fd, WRITES)) return -1;
    return real(from, f, fd, o, n, flags);
}

#define ON_PATH(name, does, params, args)                                                          \
    int name params {                                                                              \
        static int(*real) params;                                                                  \
        if (!real) real = (int(*) params)dlsym(RTLD_NEXT, #name);                                  \
        if (at_fails(dir_of, path, does)) return -1;                                               \
        return real args;                                                                          \
    }
#define dir_of AT_FDCWD
ON_PATH(mkdir, mkdir_does(dir_of, path), (const char *path, mode_t m), (path, m))
ON_PATH(rename, CHANGES, (const char *path, const char *to), (path, to))
ON_PATH(unlink, CHANGES, (const char *path), (path))
ON_PATH(rmdir, CHANGES, (const char *path), (path))
#undef dir_of
#define dir_of dir
ON_PATH(mkdirat, mkdir_does(dir, path), (int dir, const char *path, mode_t m), (dir, path, m))
ON_PATH(unlinkat, CHANGES, (int dir, const char *path, int f), (dir, path, f))
