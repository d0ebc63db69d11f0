/* Preloaded into a process under test: counts what it writes below one folder, and
 * stops or fails it at one chosen write. Everything that is not below that folder, and
 * everything before fault_arm, passes through untouched.
 *
 * A write event is a call that changes what is on disk: open for writing, write,
 * pwrite, truncate, fsync, rename, unlink, mkdir, rmdir, link, copy. It is named by its
 * kind, its path and how many such events of that path came before it, so that threads
 * in another order do not change what is meant.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS, KILL, TEAR, FAIL_ONCE, FAIL_ON };

static struct {
    int armed, mode, error, log, fired;
    long nth, seen;
    char folder[PATH_MAX], kind[32], path[PATH_MAX];
} fault;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Called from Python in the child, right before the command. */
void fault_arm(const char *folder, int log, int mode, int error, const char *kind,
               const char *path, long nth)
{
    snprintf(fault.folder, sizeof fault.folder, "%s/", folder);
    snprintf(fault.kind, sizeof fault.kind, "%s", kind);
    snprintf(fault.path, sizeof fault.path, "%s", path);
    fault.log = log, fault.mode = mode, fault.error = error;
    fault.nth = nth, fault.seen = 0, fault.fired = 0, fault.armed = 1;
}

static void die(void)
{
    syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
    for (;;)
        pause();
}

/* The absolute path without . and .. and doubled slashes; links are left alone. */
static void tidy(char *path)
{
    char *to = path, *from = path;
    while (*from) {
        while (*from == '/')
            from++;
        char *end = strchrnul(from, '/');
        size_t size = end - from;
        if (size == 2 && from[0] == '.' && from[1] == '.') {
            while (to > path && *--to != '/')
                ;
        } else if (size && !(size == 1 && *from == '.')) {
            *to++ = '/';
            memmove(to, from, size);
            to += size;
        }
        from = end;
    }
    *to = 0;
}

static void path_of_fd(int fd, char *out, size_t size)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t found = readlink(link, out, size - 1);
    out[found < 0 ? 0 : found] = 0;
}

static void path_at(int dir, const char *name, char *out, size_t size)
{
    char base[PATH_MAX] = "";
    if (name[0] != '/') {
        if (dir == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) < 0)
                base[0] = 0;
        } else {
            path_of_fd(dir, base, sizeof base);
        }
    }
    snprintf(out, size, "%s/%s", base, name);
    tidy(out);
}

/* What becomes of an event: PASS, or KILL and TEAR (the caller dies), or an errno. */
static int event(const char *kind, const char *path)
{
    size_t prefix = strlen(fault.folder);
    if (!fault.armed || strncmp(path, fault.folder, prefix))
        return 0;
    path += prefix;
    pthread_mutex_lock(&lock);
    if (fault.log >= 0) {
        char line[PATH_MAX + 40];
        int size = snprintf(line, sizeof line, "%s\t%s\n", kind, path);
        syscall(SYS_write, fault.log, line, (size_t)size);
    }
    int hit = 0;
    if (fault.mode != PASS && !fault.fired && !strcmp(kind, fault.kind) &&
        !strcmp(path, fault.path))
        hit = ++fault.seen == fault.nth;
    fault.fired |= hit;
    /* A full disk stays full, but things can still be removed from it. */
    int full = fault.mode == FAIL_ON && fault.fired && strcmp(kind, "unlink") &&
               strcmp(kind, "rmdir");
    pthread_mutex_unlock(&lock);
    if (hit && fault.mode == KILL)
        die();
    if (hit && fault.mode == TEAR)
        return -1;
    return (hit && fault.mode == FAIL_ONCE) || full ? fault.error : 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define AT(kind, dir, name, failed)                                                    \
    do {                                                                               \
        char at_[PATH_MAX];                                                            \
        path_at(dir, name, at_, sizeof at_);                                           \
        int error_ = event(kind, at_);                                                 \
        if (error_ < 0)                                                                \
            die();                                                                     \
        if (error_) {                                                                  \
            errno = error_;                                                            \
            return failed;                                                             \
        }                                                                              \
    } while (0)
#define ON(kind, fd, failed, half)                                                     \
    do {                                                                               \
        char at_[PATH_MAX];                                                            \
        if (fault.armed) {                                                             \
            path_of_fd(fd, at_, sizeof at_);                                           \
            int error_ = event(kind, at_);                                             \
            if (error_ < 0) {                                                          \
                half;                                                                  \
                die();                                                                 \
            }                                                                          \
            if (error_) {                                                              \
                errno = error_;                                                        \
                return failed;                                                         \
            }                                                                          \
        }                                                                              \
    } while (0)

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...)                                         \
    {                                                                                  \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = va_arg(rest, mode_t);                                            \
        va_end(rest);                                                                  \
        if (fault.armed && WRITES(flags))                                              \
            AT("open", AT_FDCWD, path, -1);                                            \
        return REAL(name)(path, flags, mode);                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                   \
    int name(int dir, const char *path, int flags, ...)                                \
    {                                                                                  \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = va_arg(rest, mode_t);                                            \
        va_end(rest);                                                                  \
        if (fault.armed && WRITES(flags))                                              \
            AT("open", dir, path, -1);                                                 \
        return REAL(name)(dir, path, flags, mode);                                     \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                    \
    FILE *name(const char *path, const char *how)                                      \
    {                                                                                  \
        if (fault.armed && (how[0] != 'r' || strchr(how, '+')))                        \
            AT("open", AT_FDCWD, path, NULL);                                          \
        return REAL(name)(path, how);                                                  \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size)
{
    ON("write", fd, -1, REAL(write)(fd, data, size / 2));
    return REAL(write)(fd, data, size);
}

#define PWRITE(name, offset_t)                                                         \
    ssize_t name(int fd, const void *data, size_t size, offset_t at)                   \
    {                                                                                  \
        ON("pwrite", fd, -1, REAL(name)(fd, data, size / 2, at));                      \
        return REAL(name)(fd, data, size, at);                                         \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    ON("write", fd, -1, REAL(writev)(fd, parts, count / 2));
    return REAL(writev)(fd, parts, count);
}

#define TRUNCATE(name, offset_t)                                                       \
    int name(int fd, offset_t size)                                                    \
    {                                                                                  \
        ON("truncate", fd, -1, );                                                      \
        return REAL(name)(fd, size);                                                   \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int posix_fallocate(int fd, off_t at, off_t size)
{
    ON("truncate", fd, fault.error, );
    return REAL(posix_fallocate)(fd, at, size);
}

#define SYNC(name)                                                                     \
    int name(int fd)                                                                   \
    {                                                                                  \
        ON("fsync", fd, -1, );                                                         \
        return REAL(name)(fd);                                                         \
    }
SYNC(fsync)
SYNC(fdatasync)

ssize_t sendfile(int to, int from, off_t *at, size_t size)
{
    ON("write", to, -1, );
    return REAL(sendfile)(to, from, at, size);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size)
{
    ON("write", to, -1, );
    return REAL(sendfile64)(to, from, at, size);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size,
                        unsigned int flags)
{
    ON("write", to, -1, );
    return REAL(copy_file_range)(from, at, to, to_at, size, flags);
}

int rename(const char *from, const char *to)
{
    AT("rename", AT_FDCWD, from, -1);
    return REAL(rename)(from, to);
}

int renameat(int dir, const char *from, int to_dir, const char *to)
{
    AT("rename", dir, from, -1);
    return REAL(renameat)(dir, from, to_dir, to);
}

int renameat2(int dir, const char *from, int to_dir, const char *to, unsigned int flags)
{
    AT("rename", dir, from, -1);
    return REAL(renameat2)(dir, from, to_dir, to, flags);
}

int link(const char *from, const char *to)
{
    AT("link", AT_FDCWD, to, -1);
    return REAL(link)(from, to);
}

int symlink(const char *from, const char *to)
{
    AT("link", AT_FDCWD, to, -1);
    return REAL(symlink)(from, to);
}

int unlink(const char *path)
{
    AT("unlink", AT_FDCWD, path, -1);
    return REAL(unlink)(path);
}

int unlinkat(int dir, const char *path, int flags)
{
    AT(flags & AT_REMOVEDIR ? "rmdir" : "unlink", dir, path, -1);
    return REAL(unlinkat)(dir, path, flags);
}

int rmdir(const char *path)
{
    AT("rmdir", AT_FDCWD, path, -1);
    return REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode)
{
    AT("mkdir", AT_FDCWD, path, -1);
    return REAL(mkdir)(path, mode);
}

int mkdirat(int dir, const char *path, mode_t mode)
{
    AT("mkdir", dir, path, -1);
    return REAL(mkdirat)(dir, path, mode);
}
