/* Faults at exactly one system call: kills the process there, halfway through a write too, or lets the call fail.
 *
 * Preloaded (LD_PRELOAD) into a process and armed in it, or in a fork of it, through `faults_arm`. It counts the calls
 * that change files under one folder and knows nothing of who makes them. Each counted call is a line of the journal,
 * written before it is made, so that a killed process has told where it died.
 *
 * The calls go to the kernel by syscall(2): nothing has to be looked up, and so nothing can be called too early. Calls
 * that the C library makes inside itself (stdio's writes) are not seen; Python, DuckDB and Arrow make none of those.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#undef open
#undef openat
#undef pwrite
#undef pwritev
#undef ftruncate
#undef creat
#undef fallocate
#undef sendfile
#undef fopen

enum { KILL = 1, TORN = 2, FAIL = 3, SHORT = 4 };
enum { OPEN = 1, WRITE = 2, SYNC = 4, TRUNCATE = 8, RENAME = 16, UNLINK = 32, MKDIR = 64, LINK = 128 };
enum { GO_ON = 0, REFUSE = 1, HALVE = 2 };

static struct {
    atomic_int is_armed;
    char folder[PATH_MAX];
    char files[PATH_MAX]; /* a pattern for the path below the folder */
    size_t length;
    long at;
    int action, error, is_lasting, calls;
    int journal;
    atomic_long count, fired;
} fault = {.journal = -1};

/* Counts the calls in `calls` on files under `folder` that match `files`, and does `action` at call number `at`
 * (0: never), with `error` and from then on where it is lasting. A journal is appended to. 0 when armed. */
int faults_arm(const char *folder, const char *files, const char *journal, long at, int action, int error,
               int is_lasting, int calls)
{
    atomic_store(&fault.is_armed, 0);
    if (strlen(folder) >= sizeof fault.folder || strlen(files) >= sizeof fault.files)
        return -1;
    strcpy(fault.folder, folder);
    strcpy(fault.files, files);
    fault.length = strlen(folder);
    fault.at = at, fault.action = action, fault.error = error, fault.is_lasting = is_lasting, fault.calls = calls;
    if (fault.journal >= 0)
        syscall(SYS_close, fault.journal);
    fault.journal = (int)syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fault.journal < 0)
        return -1;
    atomic_store(&fault.count, 0);
    atomic_store(&fault.fired, 0);
    atomic_store(&fault.is_armed, 1);
    return 0;
}

/* Lets everything through from now on, uncounted. */
void faults_disarm(void) { atomic_store(&fault.is_armed, 0); }

/* Calls counted since the arming, and how many of them were made to fail. */
long faults_count(void) { return atomic_load(&fault.count); }
long faults_fired(void) { return atomic_load(&fault.fired); }

static void tell(const char *sign, long number, const char *name, size_t size, const char *path)
{
    char line[PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%s\t%ld\t%s\t%zu\t%s\n", sign, number, name, size, path);
    syscall(SYS_write, fault.journal, line, length);
}

/* Writes a word of the caller's into the journal: what it is doing from here on. */
void faults_mark(const char *what)
{
    if (atomic_load(&fault.is_armed))
        tell("#", 0, "mark", 0, what);
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* The path below the folder; NULL where it lies elsewhere. */
static const char *below(const char *full)
{
    if (strncmp(full, fault.folder, fault.length) != 0)
        return NULL;
    if (full[fault.length] == '\0')
        return ".";
    return full[fault.length] == '/' ? full + fault.length + 1 : NULL;
}

/* What becomes of one call: counted, told, and judged. */
static int judge(int kind, const char *name, size_t size, const char *full)
{
    const char *path = below(full);
    if (path == NULL || !(fault.calls & kind) || fnmatch(fault.files, path, 0) != 0)
        return GO_ON;
    long number = atomic_fetch_add(&fault.count, 1) + 1;
    int is_hit = fault.at > 0 && (number == fault.at || (number > fault.at && fault.is_lasting));
    tell(is_hit ? "!" : "", number, name, size, path);
    if (!is_hit)
        return GO_ON;
    atomic_fetch_add(&fault.fired, 1);
    int is_write = kind == WRITE && size > 1;
    if (fault.action == KILL || (fault.action == TORN && !is_write))
        die();
    if (fault.action == TORN || (fault.action == SHORT && is_write && number == fault.at))
        return HALVE;
    errno = fault.error;
    return REFUSE;
}

static int of_path(int kind, const char *name, int folder, const char *path)
{
    char full[2 * PATH_MAX];
    if (!atomic_load(&fault.is_armed) || path == NULL)
        return GO_ON;
    if (path[0] == '/')
        return judge(kind, name, 0, path);
    char base[PATH_MAX], link[64];
    ssize_t length;
    if (folder == AT_FDCWD) {
        length = getcwd(base, sizeof base) == NULL ? -1 : (ssize_t)strlen(base);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, base, sizeof base - 1);
    }
    if (length < 0)
        return GO_ON;
    base[length] = '\0';
    snprintf(full, sizeof full, "%s/%s", base, path);
    return judge(kind, name, 0, full);
}

static int of_file(int kind, const char *name, int file, size_t size)
{
    char link[64], full[PATH_MAX];
    if (!atomic_load(&fault.is_armed))
        return GO_ON;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t length = readlink(link, full, sizeof full - 1);
    errno = before;
    if (length < 0)
        return GO_ON;
    full[length] = '\0';
    return judge(kind, name, size, full);
}

/* After half of a write was made: the end of the process, or a short count for the caller to go on from. */
static ssize_t halved(ssize_t written)
{
    if (fault.action == TORN)
        die();
    return written;
}

/* -- opening */

static int opened(const char *name, int folder, const char *path, int flags, mode_t mode)
{
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (writes && of_path(OPEN, name, folder, path) != GO_ON)
        return -1;
    return (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
}

#define MODE_OF(flags)                                                                                                 \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {                                                     \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return opened("open", AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return opened("open", AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return opened("open", folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return opened("open", folder, path, flags, mode);
}
int __open_2(const char *path, int flags) { return opened("open", AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened("open", AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return opened("open", folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return opened("open", folder, path, flags, 0); }
int creat(const char *path, mode_t mode) { return opened("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* -- writing */

ssize_t write(int file, const void *data, size_t size)
{
    int verdict = of_file(WRITE, "write", file, size);
    if (verdict == REFUSE)
        return -1;
    ssize_t written = syscall(SYS_write, file, data, verdict == HALVE ? size / 2 : size);
    return verdict == HALVE ? halved(written) : written;
}

static ssize_t written_at(int file, const void *data, size_t size, off_t offset)
{
    int verdict = of_file(WRITE, "pwrite", file, size);
    if (verdict == REFUSE)
        return -1;
    ssize_t written = syscall(SYS_pwrite64, file, data, verdict == HALVE ? size / 2 : size, offset);
    return verdict == HALVE ? halved(written) : written;
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return written_at(file, data, size, offset); }
ssize_t pwrite64(int file, const void *data, size_t size, off_t offset) { return written_at(file, data, size, offset); }

/* Of a vector the first piece, half of it, is the torn part. */
static ssize_t written_pieces(const char *name, int file, const struct iovec *pieces, int number, off_t offset)
{
    size_t size = 0;
    for (int i = 0; i < number; i++)
        size += pieces[i].iov_len;
    int verdict = of_file(WRITE, name, file, size);
    if (verdict == REFUSE)
        return -1;
    struct iovec half = {0};
    if (verdict == HALVE) {
        half = pieces[0];
        half.iov_len /= 2;
        pieces = &half, number = 1;
    }
    ssize_t written = offset < 0 ? syscall(SYS_writev, file, pieces, number)
                                 : syscall(SYS_pwritev, file, pieces, number, (long)offset, 0L);
    return verdict == HALVE ? halved(written) : written;
}
ssize_t writev(int file, const struct iovec *pieces, int number)
{
    return written_pieces("writev", file, pieces, number, -1);
}
ssize_t pwritev(int file, const struct iovec *pieces, int number, off_t offset)
{
    return written_pieces("pwritev", file, pieces, number, offset);
}
ssize_t pwritev64(int file, const struct iovec *pieces, int number, off_t offset)
{
    return written_pieces("pwritev", file, pieces, number, offset);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size)
{
    int verdict = of_file(WRITE, "sendfile", to, size);
    if (verdict == REFUSE)
        return -1;
    ssize_t written = syscall(SYS_sendfile, to, from, offset, verdict == HALVE ? size / 2 : size);
    return verdict == HALVE ? halved(written) : written;
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) { return sendfile(to, from, offset, size); }

ssize_t copy_file_range(int from, off_t *from_at, int to, off_t *to_at, size_t size, unsigned int flags)
{
    int verdict = of_file(WRITE, "copy_file_range", to, size);
    if (verdict == REFUSE)
        return -1;
    ssize_t written =
        syscall(SYS_copy_file_range, from, from_at, to, to_at, verdict == HALVE ? size / 2 : size, flags);
    return verdict == HALVE ? halved(written) : written;
}

/* -- syncing and sizes */

int fsync(int file) { return of_file(SYNC, "fsync", file, 0) != GO_ON ? -1 : (int)syscall(SYS_fsync, file); }
int fdatasync(int file) { return of_file(SYNC, "fdatasync", file, 0) != GO_ON ? -1 : (int)syscall(SYS_fdatasync, file); }

int ftruncate(int file, off_t size)
{
    return of_file(TRUNCATE, "ftruncate", file, 0) != GO_ON ? -1 : (int)syscall(SYS_ftruncate, file, size);
}
int ftruncate64(int file, off_t size) { return ftruncate(file, size); }
int fallocate(int file, int mode, off_t offset, off_t size)
{
    return of_file(TRUNCATE, "fallocate", file, 0) != GO_ON ? -1 : (int)syscall(SYS_fallocate, file, mode, offset, size);
}
int fallocate64(int file, int mode, off_t offset, off_t size) { return fallocate(file, mode, offset, size); }

/* -- names; what a rename concerns is where it leads to */

static int renamed(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags)
{
    if (of_path(RENAME, "rename", to_folder, to) != GO_ON)
        return -1;
    return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    return renamed(from_folder, from, to_folder, to, 0);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags)
{
    return renamed(from_folder, from, to_folder, to, flags);
}

int unlinkat(int folder, const char *path, int flags)
{
    if (of_path(UNLINK, flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) != GO_ON)
        return -1;
    return (int)syscall(SYS_unlinkat, folder, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path)
{
    struct stat found;
    int is_folder = fstatat(AT_FDCWD, path, &found, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(found.st_mode);
    return unlinkat(AT_FDCWD, path, is_folder ? AT_REMOVEDIR : 0);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    return of_path(MKDIR, "mkdir", folder, path) != GO_ON ? -1 : (int)syscall(SYS_mkdirat, folder, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
    if (of_path(LINK, "link", to_folder, to) != GO_ON)
        return -1;
    return (int)syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
