/* Makes chosen file operations of a process fail, as a bad disk would.
 *
 * Preloaded (LD_PRELOAD), it passes every call through until faulty_arm() is called; from then on
 * it counts the calls that belong to a class in `classes` and whose file lies below `prefix`, and
 * strikes at the `nth` of them (at every one from there on if `lasting`), or at random ones.
 * What it did is left in a shared file, which survives a kill.
 *
 * Or it only writes down what happens (TRACE), and keeps what each file held when it was fsynced:
 * from that follows what a power loss at any moment would have left on the disk.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same numbers are in _faults.py. */
enum {
    CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, CLOSE = 64,
    OPEN = 128, READ = 256, STAT = 512, LIST = 1024, LOCK = 2048
};
enum { PASS = 0, FAIL = 1, SHORT = 2, KILL = 3, TEAR = 4, TRACE = 5 };

struct report {
    atomic_long calls; /* that belonged to the chosen classes and files */
    atomic_long hits;  /* of them, how many were struck */
    char operation[16];
    char path[488];
};

static struct report *report;
static char prefix[PATH_MAX];
static unsigned classes, seed;
static long nth;
static int lasting, action, error_number;
static double probability;
static int trace_file = -1;
static char trace_folder[PATH_MAX];
static __thread const char *renamed_to = "";

int faulty_arm(const char *prefix_, unsigned classes_, long nth_, int lasting_,
               double probability_, unsigned seed_, int action_, int error_number_,
               const char *report_file)
{
    int file = syscall(SYS_openat, AT_FDCWD, report_file, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof *report) != 0) return -1;
    struct report *mapped =
        mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (mapped == MAP_FAILED) return -1;
    snprintf(prefix, sizeof prefix, "%s", prefix_);
    nth = nth_, lasting = lasting_, probability = probability_, seed = seed_;
    action = action_, error_number = error_number_, classes = classes_;
    if (action == TRACE) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%.*s.trace", PATH_MAX / 2, report_file);
        snprintf(trace_folder, sizeof trace_folder, "%.*s.synced", PATH_MAX / 2, report_file);
        trace_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (trace_file < 0 || syscall(SYS_mkdirat, AT_FDCWD, trace_folder, 0700) != 0) return -1;
    }
    report = mapped;
    return 0;
}

/* A line of the call that is about to happen; a file to be synced gets a second name, by number. */
static void trace(long call, const char *operation, const char *path)
{
    char line[3 * PATH_MAX];
    int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", call, operation, path, renamed_to);
    if (syscall(SYS_write, trace_file, line, n) != n) abort();
    if (strcmp(operation, "fsync") == 0) {
        snprintf(line, sizeof line, "%s/%ld", trace_folder, call);
        syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, line, 0); /* not for folders */
    }
}

static double random_number(long call)
{
    /* A hash of seed and number of the call: the same calls are struck in every run. */
    unsigned long x = (unsigned long)seed * 0x9E3779B97F4A7C15ul + (unsigned long)call;
    x ^= x >> 30, x *= 0xBF58476D1CE4E5B9ul, x ^= x >> 27, x *= 0x94D049BB133111EBul, x ^= x >> 31;
    return (double)(x >> 11) / (double)(1ul << 53);
}

/* What to do with a call of this class on this file: PASS for nothing. */
static int strike(unsigned class_, const char *operation, const char *path)
{
    if (!report || !(classes & class_) || strncmp(path, prefix, strlen(prefix)) != 0) return PASS;
    long call = atomic_fetch_add(&report->calls, 1) + 1;
    if (action == TRACE) {
        int before = errno;
        trace(call, operation, path);
        errno = before;
        return PASS;
    }
    int struck = nth > 0 ? (call == nth || (lasting && call > nth))
                         : random_number(call) < probability;
    if (!struck) return PASS;
    if (atomic_fetch_add(&report->hits, 1) == 0) {
        snprintf(report->operation, sizeof report->operation, "%s", operation);
        snprintf(report->path, sizeof report->path, "%s", path);
    }
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = error_number;
    return action;
}

static const char *absolute(int folder, const char *path, char *buffer)
{
    if (path[0] == '/') return path;
    char link[64], base[PATH_MAX];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    base[n < 0 ? 0 : n] = 0;
    snprintf(buffer, PATH_MAX, "%.*s/%s", PATH_MAX / 2, base, path);
    return buffer;
}

static int strike_path(unsigned class_, const char *operation, int folder, const char *path)
{
    char buffer[PATH_MAX];
    if (!report || !(classes & class_) || !path) return PASS;
    return strike(class_, operation, absolute(folder, path, buffer));
}

static int strike_file(unsigned class_, const char *operation, int file)
{
    char buffer[PATH_MAX], link[64];
    if (!report || !(classes & class_)) return PASS;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, sizeof buffer - 1);
    errno = before;
    buffer[n < 0 ? 0 : n] = 0;
    return strike(class_, operation, buffer);
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The part of a transfer that a struck call still makes; then a torn one ends the process. */
static size_t less(size_t n) { return n > 1 ? n / 2 : n; }
static void tear(int what) { if (what == TEAR) kill(getpid(), SIGKILL); }

#define OPENER(name, parameters, call, folder) \
    int name parameters \
    { \
        NEXT(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
        if (strike_path(writes ? CREATE : OPEN, writes ? "create" : "open", folder, path)) \
            return -1; \
        return next call; \
    }

OPENER(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENER(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENER(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPENER(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

/* What _FORTIFY_SOURCE makes of open() with two arguments. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }

#define TRANSFER(name, class_, operation, parameters, call) \
    ssize_t name parameters \
    { \
        NEXT(name); \
        int what = strike_file(class_, operation, file); \
        if (what == FAIL) return -1; \
        if (what != PASS) n = less(n); \
        ssize_t done = next call; \
        tear(what); \
        return done; \
    }

TRANSFER(write, WRITE, "write", (int file, const void *data, size_t n), (file, data, n))
TRANSFER(pwrite, WRITE, "write", (int file, const void *data, size_t n, off_t at),
         (file, data, n, at))
TRANSFER(pwrite64, WRITE, "write", (int file, const void *data, size_t n, off_t at),
         (file, data, n, at))
TRANSFER(read, READ, "read", (int file, void *data, size_t n), (file, data, n))
TRANSFER(pread, READ, "read", (int file, void *data, size_t n, off_t at), (file, data, n, at))
TRANSFER(pread64, READ, "read", (int file, void *data, size_t n, off_t at), (file, data, n, at))

ssize_t __read_chk(int file, void *data, size_t n, size_t room)
{
    (void)room;
    return read(file, data, n);
}

ssize_t __pread64_chk(int file, void *data, size_t n, off_t at, size_t room)
{
    (void)room;
    return pread64(file, data, n, at);
}

ssize_t writev(int file, const struct iovec *parts, int n)
{
    NEXT(writev);
    int what = strike_file(WRITE, "write", file);
    if (what == FAIL) return -1;
    ssize_t done = next(file, parts, what != PASS && n > 1 ? n / 2 : n);
    tear(what);
    return done;
}

#define ON_FILE(name, class_, operation, parameters, call) \
    int name parameters \
    { \
        NEXT(name); \
        return strike_file(class_, operation, file) ? -1 : next call; \
    }

ON_FILE(fsync, SYNC, "fsync", (int file), (file))
ON_FILE(fdatasync, SYNC, "fsync", (int file), (file))
ON_FILE(ftruncate, WRITE, "truncate", (int file, off_t size), (file, size))
ON_FILE(ftruncate64, WRITE, "truncate", (int file, off_t size), (file, size))
ON_FILE(fstat, STAT, "stat", (int file, struct stat *out), (file, out))
ON_FILE(fstat64, STAT, "stat", (int file, struct stat64 *out), (file, out))
ON_FILE(flock, LOCK, "lock", (int file, int how), (file, how))

#define ON_PATH(name, class_, operation, parameters, call, folder) \
    int name parameters \
    { \
        NEXT(name); \
        return strike_path(class_, operation, folder, path) ? -1 : next call; \
    }

ON_PATH(unlink, UNLINK, "unlink", (const char *path), (path), AT_FDCWD)
ON_PATH(unlinkat, UNLINK, "unlink", (int at, const char *path, int flags), (at, path, flags), at)
ON_PATH(mkdir, MKDIR, "mkdir", (const char *path, mode_t mode), (path, mode), AT_FDCWD)
ON_PATH(mkdirat, MKDIR, "mkdir", (int at, const char *path, mode_t mode), (at, path, mode), at)
ON_PATH(stat, STAT, "stat", (const char *path, struct stat *out), (path, out), AT_FDCWD)
ON_PATH(stat64, STAT, "stat", (const char *path, struct stat64 *out), (path, out), AT_FDCWD)
ON_PATH(lstat, STAT, "stat", (const char *path, struct stat *out), (path, out), AT_FDCWD)
ON_PATH(lstat64, STAT, "stat", (const char *path, struct stat64 *out), (path, out), AT_FDCWD)
ON_PATH(fstatat, STAT, "stat", (int at, const char *path, struct stat *out, int flags),
        (at, path, out, flags), at)
ON_PATH(fstatat64, STAT, "stat", (int at, const char *path, struct stat64 *out, int flags),
        (at, path, out, flags), at)

#define RENAMER(name, parameters, call, folder, folder_to) \
    int name parameters \
    { \
        NEXT(name); \
        char buffer[PATH_MAX]; \
        renamed_to = report ? absolute(folder_to, to, buffer) : ""; \
        int what = strike_path(RENAME, "rename", folder, path); \
        renamed_to = ""; \
        return what ? -1 : next call; \
    }

RENAMER(rename, (const char *path, const char *to), (path, to), AT_FDCWD, AT_FDCWD)
RENAMER(renameat, (int at, const char *path, int at_to, const char *to), (at, path, at_to, to),
        at, at_to)

DIR *opendir(const char *path)
{
    NEXT(opendir);
    return strike_path(LIST, "list", AT_FDCWD, path) ? NULL : next(path);
}

/* A close that reports a failed write; the file is closed all the same, as POSIX has it. */
int close(int file)
{
    NEXT(close);
    int what = PASS;
    if (report && (classes & CLOSE)) {
        int flags = fcntl(file, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY)
            what = strike_file(CLOSE, "close", file);
    }
    int done = next(file);
    if (what == FAIL) {
        errno = error_number;
        return -1;
    }
    return done;
}
